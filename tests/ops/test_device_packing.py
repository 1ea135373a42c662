"""Sequences whose lengths are on the device give what those give whose lengths the host knows."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.ops.attention import CrossPlan, cross_attention, varlen_attention
from blipfast.ops.device_packing import DevicePacking, plan_of
from blipfast.ops.packing import Packing

SEEDS = range(8)


def drawn(seed: int, least: int = 0) -> tuple[list[int], Packing, DevicePacking]:
    draw = random.Random(seed)
    lengths = [draw.choice([least, 1, draw.randint(1, 20)]) for _ in range(draw.randint(1, 9))]
    lengths[0] += 1
    longest = max(lengths) + draw.randint(0, 5)
    room = sum(lengths) + draw.choice([0, 1, draw.randint(2, 60)])
    room = max(room, len(lengths))
    there = DevicePacking.with_room(torch.tensor(lengths), room, longest)
    return lengths, Packing.from_lengths(lengths), there


def of_sequences(values: Tensor, packing: DevicePacking) -> Tensor:
    return values[packing.in_sequences]


@pytest.mark.parametrize("seed", SEEDS)
def test_layout(seed: int) -> None:
    lengths, here, there = drawn(seed)
    assert there.num_sequences == len(lengths)
    assert there.of_sequences(there.lengths_tensor).tolist() == lengths
    assert int(there.lengths_tensor.sum()) == there.total
    assert int(there.lengths_tensor.max()) <= there.max_seqlen
    assert torch.equal(there.first_tokens, here.first_tokens)
    for name in ("sequence_ids", "positions"):
        assert torch.equal(of_sequences(getattr(there, name), there), getattr(here, name))
    assert there.num_following == sum(max(0, n - 1) for n in lengths)
    rows = torch.randn(there.total, 3)
    assert torch.equal(there.unpad(there.pad(rows)), rows)
    assert there.prepare() is there


@pytest.mark.parametrize("seed", SEEDS)
def test_selected_joined_shortened(seed: int) -> None:
    lengths, here, there = drawn(seed, least=1)
    tokens = torch.randn(there.total, 2)
    chosen = torch.randint(len(lengths), (5,))
    expected, index = here.select(chosen.tolist())
    picked, where = there.select(chosen)
    assert isinstance(picked, DevicePacking)
    assert torch.equal(of_sequences(tokens[where], picked), tokens[: here.total][index])
    joined, both = there + picked, here + expected
    assert int(joined.lengths_tensor.sum()) == joined.total
    assert joined.of_sequences(joined.lengths_tensor).tolist() == list(both.lengths)
    rows = torch.cat([tokens, tokens[where]])
    assert torch.equal(
        rows[joined.first_tokens],
        rows[of_sequences(torch.arange(len(rows)), joined)][both.first_tokens],
    )
    shorter, kept = there.without_last()
    assert shorter.of_sequences(shorter.lengths_tensor).tolist() == [n - 1 for n in lengths]
    assert torch.equal(of_sequences(kept, shorter), here.without_last()[1])
    assert there.first_only().lengths == here.first_only().lengths


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_attention(seed: int, impl: str) -> None:
    """Output and gradients; what fills the room is finite and has no part in them."""
    lengths, here, there = drawn(seed)
    sets, total = random.Random(seed).randint(1, 4), sum(lengths)
    index = torch.randint(sets, (len(lengths),))
    plans = CrossPlan.build(here, index, sets), plan_of([there], [index], sets)
    q = torch.randn(there.total, 2, 32)
    k, v = torch.randn(2, sets, 2, 7, 32)
    qkv, weights = torch.randn(there.total, 3, 2, 32), torch.randn(there.total, 2, 32)
    weights[total:] = 0

    def both(rows: int, packing: Packing, plan: CrossPlan) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q[:rows], k, v, qkv[:rows])]
        out = cross_attention(*leaves[:3], plan, impl=impl)
        own = varlen_attention(leaves[3], packing, impl=impl)
        loss = (out * weights[:rows]).sum() + (own * weights[:rows]).sum()
        return [out, own, *torch.autograd.grad(loss, leaves)]

    for ours, expected in zip(
        both(there.total, there, plans[1]), both(total, here, plans[0]), strict=True
    ):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours[: len(expected)], expected)


def test_what_does_not_fit_is_cut_off() -> None:
    """The host cannot be told, but nothing is read out of bounds."""
    packing = DevicePacking.with_room(torch.tensor([4, 99, -3, 7]), 12, 6)
    assert packing.of_sequences(packing.lengths_tensor).tolist() == [4, 6, 0, 2]
    assert packing.cu_seqlens[-1] == 12
    gone = DevicePacking.with_room(torch.tensor([5, 5, 5]), 10, 6)
    assert gone.first_tokens.tolist() == [0, 5, 9]
    plan = plan_of([packing], [torch.tensor([-1, 9, 0, 1])], 2)
    assert plan.kv_index[:4] == (0, 1, 0, 1)


def test_errors() -> None:
    for lengths, room, longest in (
        (torch.ones(2, 2), 9, 3),
        (torch.ones(4), 3, 3),
        (torch.ones(1), 3, 0),
    ):
        with pytest.raises(ShapeError, match="do not go into a room"):
            DevicePacking.with_room(lengths, room, longest)
    with pytest.raises(ShapeError, match="do not go into a room"):
        DevicePacking.with_room(torch.ones(0), 9, 3)
    packing = DevicePacking.with_room(torch.tensor([2, 1]), 5, 3)
    with pytest.raises(ShapeError, match="join only their like"):
        packing + Packing.from_lengths([1])
    with pytest.raises(ShapeError, match="names 3 sets for 2 sequences"):
        plan_of([packing], [torch.tensor([0, 1, 0])], 2)
    assert "2 in 5 tokens" in repr(packing)

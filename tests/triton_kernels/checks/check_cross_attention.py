"""The cross-attention kernels against the formula in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blipfast.kernels import _attention_launch
from blipfast.kernels._tile_table import tile_table
from blipfast.kernels.cross_attention import cross_attention as kernel
from dropout_mask import kept
from place import DEVICE, IMPL, INTERPRETED
from torch import Tensor

from blipfast.errors import BackendError
from blipfast.ops.attention import (
    CrossPlan,
    cross_attention,
    cross_attention_reference,
    cross_backends,
)
from blipfast.ops.device_packing import DevicePacking, plan_of
from blipfast.ops.packing import Packing

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES: dict[str, tuple[list[int], list[int], int, int, int]] = {
    # lengths, kv_index, sets, keys, head_dim
    "one of each": ([1], [0], 1, 1, 32),
    "many texts of one image": ([5, 2, 7, 1], [0, 0, 0, 0], 1, 19, 32),
    "shuffled, one image alone": ([5, 2, 7, 1], [2, 0, 2, 1], 4, 33, 64),
    "empty texts": ([4, 0, 6, 0], [1, 1, 0, 2], 3, 20, 48),
    "more rows than a tile": ([40, 30, 3], [1, 1, 0], 2, 35, 64),
    "wide heads": ([9, 20], [1, 0], 2, 40, 128),
    "padded width": ([3, 4], [0, 1], 2, 17, 80),
}

if not INTERPRETED:  # BLIP's own sizes
    CASES |= {
        "a pre-training batch": (
            [9 + i % 9 for i in range(96)],
            [i % 24 for i in range(96)],
            24,
            197,
            64,
        ),
        "re-ranking": ([9 + i % 9 for i in range(128)], [0] * 128, 1, 577, 64),
        "eight frames": ([12, 14, 9], [0, 1, 0], 2, 4_616, 64),
        "two large images": ([30, 11], [1, 0], 2, 901, 128),
    }


def run(inputs: list[Tensor], weights: Tensor, plan: CrossPlan, impl: str) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = cross_attention(*leaves, plan, impl=impl)
    return [out, *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


def make(
    case: tuple[list[int], list[int], int, int, int], dtype: torch.dtype, masked: bool
) -> tuple[list[Tensor], Tensor, CrossPlan]:
    lengths, kv_index, num_kv, num_keys, dim = case
    packing = Packing.from_lengths(lengths, DEVICE)
    kv_lengths = (torch.arange(num_kv) * 5 + 6) % num_keys + 1 if masked else None
    plan = CrossPlan.build(packing, kv_index, num_kv, kv_lengths)
    inputs = [torch.randn(packing.total, 2, dim), *torch.randn(2, num_kv, 2, num_keys, dim)]
    return [x.to(dtype) for x in inputs], torch.randn(packing.total, 2, dim).to(dtype), plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "ragged keys"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradients(case: Any, masked: bool, dtype: torch.dtype, assert_no_worse) -> None:
    inputs, weights, plan = make(case, dtype, masked)
    ours = run(inputs, weights, plan, IMPL)
    plain = run(inputs, weights, plan, "reference")
    exact = run([x.double() for x in inputs], weights, plan, "reference")
    for name, *values in zip(["out", "dq", "dk", "dv"], ours, plain, exact, strict=True):
        assert_no_worse(*values, name)


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed: int, assert_no_worse) -> None:
    draw = random.Random(seed)
    num_kv, dtype = draw.randint(1, 4), draw.choice(DTYPES)
    lengths = [draw.choice([0, 1, 2, draw.randint(3, 30)]) for _ in range(draw.randint(1, 7))]
    lengths[0] += 1
    index = [draw.randrange(num_kv) for _ in lengths]
    case = (lengths, index, num_kv, draw.randint(1, 70), draw.choice([16, 32, 40, 64, 96]))
    inputs, weights, plan = make(case, dtype, draw.random() < 0.5)
    ours = run(inputs, weights, plan, IMPL)
    plain = run(inputs, weights, plan, "reference")
    exact = run([x.double() for x in inputs], weights, plan, "reference")
    for name, *values in zip(["out", "dq", "dk", "dv"], ours, plain, exact, strict=True):
        assert_no_worse(*values, f"{name} of {case} in {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lengths_and_index_on_the_device(
    case: Any, dtype: torch.dtype, assert_no_worse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host knows only how many tokens there are: programs take their tiles from a table."""
    monkeypatch.setattr(_attention_launch, "_MOST_EMPTY", 0)
    inputs, weights, plan = make(case, dtype, masked=True)
    lengths, kv_index, num_kv, *_ = case
    room = plan.packing.total + 37
    packing = DevicePacking.with_room(torch.tensor(lengths, device=DEVICE), room, max(lengths))
    there = plan_of([packing], [torch.tensor(kv_index, device=DEVICE)], num_kv, plan.kv_lengths)
    q = torch.cat([inputs[0], torch.randn(37, *inputs[0].shape[1:]).to(dtype)])
    ours = run([q, *inputs[1:]], F.pad(weights, (0, 0, 0, 0, 0, 37)), there, IMPL)
    plain = run(inputs, weights, plan, "reference")
    exact = run([x.double() for x in inputs], weights, plan, "reference")
    assert all(x.isfinite().all() for x in ours)
    ours[:2] = [x[: plan.packing.total] for x in ours[:2]]
    for name, *values in zip(["out", "dq", "dk", "dv"], ours, plain, exact, strict=True):
        assert_no_worse(*values, name)


@pytest.mark.parametrize("rows", [[0, 130, 1, 64, 0], [5], [0, 0, 3]])
def test_the_table_of_tiles(rows: list[int]) -> None:
    cu_rows = Packing.from_lengths(rows, DEVICE).cu_seqlens
    table = tile_table(cu_rows, sum(rows), 32).tolist()
    expected = [[b, tile] for b, count in enumerate(rows) for tile in range(-(-count // 32))]
    assert table[: len(expected)] == expected
    for b, tile in table[len(expected) :]:
        assert tile * 32 >= rows[b]


def test_any_strides() -> None:
    inputs, weights, plan = make(CASES["shuffled, one image alone"], torch.float32, True)
    dense = run(inputs, weights, plan, IMPL)
    q, k, v = inputs
    wide = torch.full((q.shape[0], 3, *q.shape[1:]), float("nan"))
    wide[:, 1] = q
    kv = torch.full((k.shape[0], k.shape[2], 2, k.shape[1], 2 * k.shape[3]), float("nan"))
    kv[:, :, 0, :, ::2], kv[:, :, 1, :, ::2] = k.transpose(1, 2), v.transpose(1, 2)
    strided = [wide[:, 1], *(kv[:, :, i, :, ::2].transpose(1, 2) for i in range(2))]
    assert all(torch.equal(a, b) for a, b in zip(strided, inputs, strict=True))
    for a, b in zip(run(strided, weights, plan, IMPL), dense, strict=True):
        assert torch.equal(a, b)
    one = torch.ones(1, 1, 1).expand_as(weights)
    expanded = run(inputs, one, plan, IMPL)
    for a, b in zip(expanded, run(inputs, one.contiguous(), plan, IMPL), strict=True):
        assert torch.equal(a, b)


def test_shared_key_values_may_be_one_expanded_tensor() -> None:
    inputs, weights, _ = make(([4, 3], [0, 1], 2, 9, 32), torch.float32, False)
    plan = CrossPlan.build(Packing.from_lengths([4, 3], DEVICE), [0, 1], 2)
    q, k, v = inputs
    k, v = k[:1].expand_as(k), v[:1].expand_as(v)
    ours = run([q, k, v], weights, plan, IMPL)
    for a, b in zip(ours, run([q, k, v], weights, plan, "reference"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [5, 70])
def test_a_set_without_keys_gives_zero_and_no_gradient(rows: int) -> None:
    packing = Packing.from_lengths([rows, rows], DEVICE)
    plan = CrossPlan.build(packing, [0, 1], 2, torch.tensor([0, 3]))
    q, k, v = torch.randn(2 * rows, 2, 32), *torch.randn(2, 2, 2, 9, 32)
    k[0], v[0] = float("nan"), float("inf")
    k[1, :, 3:], v[1, :, 3:] = float("inf"), float("nan")
    out, dq, dk, dv = run([q, k, v], torch.randn(2 * rows, 2, 32), plan, IMPL)
    for x in (out, dq):
        assert (x[:rows] == 0).all()
        assert x.isfinite().all()
        assert (x[rows:] != 0).any()
    for x in (dk, dv):
        assert (x[0] == 0).all()
        assert (x[1, :, 3:] == 0).all()
        assert x.isfinite().all()


def test_lengths_out_of_range_read_nothing_else() -> None:
    packing = Packing.from_lengths([3, 3], DEVICE)
    q, k, v = torch.randn(6, 2, 32), *torch.randn(2, 2, 2, 9, 32)
    weights = torch.randn(6, 2, 32)
    wrong = CrossPlan.build(packing, [0, 1], 2, torch.tensor([-4, 1000]))
    right = CrossPlan.build(packing, [0, 1], 2, torch.tensor([0, 9]))
    ours = run([q, k, v], weights, wrong, IMPL)
    for a, b in zip(ours, run([q, k, v], weights, right, IMPL), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [(10, 4), (70, 30)], ids=str)
def test_dropout_drops_what_philox_says(rows: tuple[int, int]) -> None:
    """Against the formula with the mask computed apart; so it does not depend on the tiles."""
    p, keys, heads, seed = 0.3, 20, 2, 123456789012345
    q = torch.randn(sum(rows), heads, 32, dtype=torch.float64)
    k, v = torch.randn(2, 2, heads, keys, 32, dtype=torch.float64)
    order = torch.randperm(sum(rows))
    weights = torch.randn_like(q)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = torch.empty_like(q)
    for b, chosen in enumerate(order.split(rows)):
        mask = kept(rows[b], keys, heads, b, p, seed)
        assert 0.6 < mask.double().mean() < 0.8
        scores = torch.einsum("qhd,hkd->hqk", leaves[0][chosen], leaves[1][b]) / 32**0.5
        probs = scores.softmax(-1) * mask / (1 - p)
        exact = exact.index_copy(0, chosen, torch.einsum("hqk,hkd->qhd", probs, leaves[2][b]))
    exact_gradients = torch.autograd.grad(exact, leaves, weights)
    low = [x.float().requires_grad_() for x in (q, k, v)]
    cu_rows = torch.tensor([0, rows[0], sum(rows)], dtype=torch.int32)
    out = kernel(*low, cu_rows, max(rows), order=order, dropout_p=p, seed=torch.tensor([seed]))
    gradients = torch.autograd.grad(out, low, weights.float())
    for a, b in zip([out, *gradients], [exact, *exact_gradients], strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="seed"):
        kernel(*low, cu_rows, max(rows), dropout_p=p)


def test_dropout_draws_from_the_generator() -> None:
    inputs, _, plan = make(CASES["many texts of one image"], torch.float32, False)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(cross_attention(*inputs, plan, dropout_p=0.5, impl=IMPL))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("rows", [4, 70])
def test_opcheck(rows: int) -> None:
    q = torch.randn(rows, 2, 16, requires_grad=True)
    k, v = (torch.randn(2, 5, 2, 16).transpose(1, 2).requires_grad_() for _ in range(2))
    cu_rows = torch.tensor([0, rows - 1, rows], dtype=torch.int32)
    for extra in ((None, None, None), (torch.randperm(rows), torch.tensor([3, 5]), None)):
        arguments = (q, k, v, cu_rows, *extra, rows - 1, 0.0)
        torch.library.opcheck(torch.ops.blipfast.triton_cross_attention, arguments)


def test_compiles_without_a_graph_break() -> None:
    inputs, weights, plan = make(CASES["shuffled, one image alone"], torch.float32, True)
    eager = run(inputs, weights, plan, IMPL)
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = compiled(*leaves, plan, impl=IMPL)
    for a, b in zip([out, *torch.autograd.grad(out, leaves, weights)], eager, strict=True):
        torch.testing.assert_close(a, b)


def test_runs_only_where_it_can_and_only_by_name() -> None:
    q = torch.randn(2, 2, 16)
    assert cross_backends.choose(q)[0] == ("torch" if INTERPRETED else "triton")
    assert cross_backends.choose(q, IMPL)[0] == IMPL
    other = "triton" if INTERPRETED else "triton_interpreter"
    with pytest.raises(BackendError, match="GPU" if INTERPRETED else "TRITON_INTERPRET"):
        cross_backends.choose(q, other)
    with pytest.raises(BackendError, match="float64"):
        cross_backends.choose(q.double(), IMPL)
    with pytest.raises(BackendError, match="128"):
        cross_backends.choose(torch.randn(2, 2, 256), IMPL)


def test_the_reference_is_the_formula() -> None:
    inputs, _, plan = make(CASES["one of each"], torch.float32, False)
    assert torch.equal(cross_attention_reference(*inputs, plan), inputs[2][0].transpose(0, 1))

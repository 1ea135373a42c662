"""Attention without keys and values of its own is the attention to what would be projected."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from blipfast.models.blip import PackedText
from blipfast.models.config import blip_config
from blipfast.ops import absorbed_attention, use_backend
from blipfast.ops.absorbed_attention import absorbed_cross_attention, absorbs
from blipfast.ops.attention import CrossPlan, cross_attention
from blipfast.ops.packing import Packing
from blipfast.tasks.nlvr import BlipForNLVR
from blipfast.tasks.retrieval import BlipForRetrieval

HEADS, DIM, WIDTH = 3, 32, 80


def projected(q: Tensor, embeds: Tensor, weight: Tensor, bias: Tensor, plan: CrossPlan) -> Tensor:
    kv = (embeds @ weight.T + bias).unflatten(-1, (2, HEADS, -1))
    k, v = kv.permute(2, 0, 3, 1, 4)
    return cross_attention(q, k, v, plan, impl="reference")


def inputs(seed: int) -> tuple[list[Tensor], CrossPlan]:
    draw = random.Random(seed)
    sets, size = draw.randint(1, 4), draw.choice([1, 7, 50])
    lengths = [draw.choice([0, 1, draw.randint(2, 20)]) for _ in range(draw.randint(1, 6))]
    lengths[0] += 1
    index = [draw.randrange(sets) for _ in lengths]
    packing = Packing.from_lengths(lengths)
    q, embeds = torch.randn(packing.total, HEADS, DIM), torch.randn(sets, size, WIDTH)
    weight, bias = torch.randn(2 * HEADS * DIM, WIDTH) * 0.2, torch.randn(2 * HEADS * DIM)
    return [q, embeds, weight, bias], CrossPlan.build(packing, index, sets)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_parity(seed: int, dtype: torch.dtype, assert_no_worse) -> None:
    tensors, plan = inputs(seed)
    tensors = [x.to(dtype) for x in tensors]
    ours = absorbed_cross_attention(*tensors, plan)
    plain = projected(*tensors, plan)
    exact = projected(*[x.double() for x in tensors], plan)
    assert ours.dtype == dtype
    assert_no_worse(ours, plain, exact, "out")


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, embeds, weight, _), plan = inputs(1)
    with torch.no_grad():
        assert not absorbs(q, embeds, weight, plan)  # so small a set
        monkeypatch.setattr(absorbed_attention, "_LEAST_SET", 0)
        few = CrossPlan.build(Packing.from_lengths([5, 9]), [0, 1], 2)
        q, embeds = torch.randn(14, HEADS, DIM), torch.randn(2, 9, WIDTH)
        assert absorbs(q, embeds, weight, few)
        many = CrossPlan.build(Packing.from_lengths([20, 21]), [0, 1], 2)
        assert not absorbs(torch.randn(41, HEADS, DIM), embeds, weight, many)
        assert not absorbs(q, embeds.bfloat16(), weight, few)
        padded = CrossPlan.build(few.packing, [0, 1], 2, torch.tensor([9, 4]))
        assert not absorbs(q, embeds, weight, padded)
        with use_backend(cross_attention="torch"):
            assert not absorbs(q, embeds, weight, few)
    assert not absorbs(q, embeds, weight, few)  # with gradients


def test_matching_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text encoder of one image a text, and of two."""
    config = blip_config("blip_tiny")
    side = config.vision.image_size
    text = PackedText(torch.randint(110, 400, (15,)), Packing.from_lengths([6, 4, 5]))
    scorer, reasoner = BlipForRetrieval(config).eval(), BlipForNLVR(config).eval()
    images, pairs = torch.randn(3, 3, side, side), torch.randn(3, 2, 3, side, side)
    mask = text.packing.mask.long()
    ids = text.packing.pad(text.input_ids)
    calls: list[int] = []
    taken = absorbed_attention.absorbs

    def counted(*arguments: object) -> bool:
        calls.append(taken(*arguments))  # type: ignore[arg-type]
        return bool(calls[-1])

    monkeypatch.setattr("blipfast.models.text.absorbs", counted)
    found = []
    for least in (1 << 40, 0):
        monkeypatch.setattr(absorbed_attention, "_LEAST_SET", least)
        with torch.no_grad():
            states = scorer.image_states(scorer.encode_image(images))
            found.append((scorer.match(text, states, [2, 0, 0]), reasoner(pairs, ids, mask)))
        assert all(calls) == (least == 0)
        calls.clear()
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1].logits, found[0][1].logits)

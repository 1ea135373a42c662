"""The operators as modules: what PyTorch's own modules give, where there are any."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import blipfast.ops
from blipfast.errors import ShapeError
from blipfast.ops import (
    ContrastiveLoss,
    CrossAttention,
    CrossPlan,
    HardNegatives,
    LinearCrossEntropy,
    Packing,
)


def features(rows: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 8, dtype=torch.float64), dim=1)


def test_every_public_name_is_there() -> None:
    for name in blipfast.ops.__all__:
        assert getattr(blipfast.ops, name).__name__ == name
    assert set(blipfast.ops.__all__) <= set(dir(blipfast.ops))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blipfast.ops.nothing


def test_contrastive_loss_is_clips() -> None:
    torch.manual_seed(0)
    image, text = features(5).requires_grad_(), features(5).requires_grad_()
    loss_fn = ContrastiveLoss(0.1).double()
    loss = loss_fn(image, text)
    logits = image @ text.T / 0.1
    own = torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, (image, text)) for x in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_contrastive_loss_clamps_and_takes_a_queue() -> None:
    loss_fn = ContrastiveLoss(3.0).double()
    image, text, queue = features(3), features(3), features(7)
    loss = loss_fn(
        image, text, text_keys=[text, queue], image_keys=[image, queue], image_teacher=image
    )
    assert loss_fn.temperature.item() == 0.5
    assert loss.isfinite()
    with pytest.raises(ShapeError, match="same shape"):
        loss_fn(image, text[:2])


def test_hard_negatives_move_on_and_repeat() -> None:
    torch.manual_seed(0)
    query, keys, temperature = features(64), features(64), torch.tensor(0.5)
    draws = HardNegatives(seed=3)
    first, second = draws(query, keys, temperature), draws(query, keys, temperature)
    assert not torch.equal(first, second)
    again = HardNegatives(seed=3)
    assert torch.equal(again(query, keys, temperature), first)
    again.load_state_dict(draws.state_dict())
    assert int(again.step) == 2


def test_linear_cross_entropy_is_torchs() -> None:
    torch.manual_seed(0)
    layer = LinearCrossEntropy(6, 11, label_smoothing=0.1).double()
    hidden = torch.randn(4, 6, dtype=torch.float64)
    labels = torch.tensor([3, -100, 0, 10])
    expected = F.cross_entropy(
        F.linear(hidden, layer.weight, layer.bias), labels, label_smoothing=0.1
    )
    torch.testing.assert_close(layer(hidden, labels), expected)


def test_cross_attention_is_multi_head_attention() -> None:
    torch.manual_seed(0)
    ours = CrossAttention(16, 4, kdim=12).double()
    theirs = torch.nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True).double()
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.query.weight)
        theirs.k_proj_weight.copy_(ours.key_value.weight[:16])
        theirs.v_proj_weight.copy_(ours.key_value.weight[16:])
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    images = torch.randn(2, 5, 12, dtype=torch.float64)
    packing = Packing.from_lengths([3, 2, 4])
    hidden = torch.randn(9, 16, dtype=torch.float64)
    out = ours(hidden, images, CrossPlan.build(packing, [1, 0, 1], 2))
    for rows, image in ((slice(0, 3), 1), (slice(3, 5), 0), (slice(5, 9), 1)):
        each = images[image : image + 1]
        expected = theirs(hidden[None, rows], each, each)[0][0]
        torch.testing.assert_close(out[rows], expected)
    with pytest.raises(ShapeError, match="not a multiple"):
        CrossAttention(10, 4)

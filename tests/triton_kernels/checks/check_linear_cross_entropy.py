"""The cross-entropy kernel against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blipfast.kernels.linear_cross_entropy import losses_then_gradients
from place import DEVICE, IMPL, INTERPRETED
from torch import Tensor

import blipfast.ops._linear_ce_pieces as pieces
from blipfast.ops.linear_ce import linear_cross_entropy

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 7), (13, 2500)] if INTERPRETED else [(1, 7), (13, 2500), (600, 30_524)]


def make(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    tensors = [torch.randn(tokens, 16), torch.randn(vocabulary, 16), torch.randn(vocabulary)]
    labels = torch.randint(vocabulary, (tokens,))
    labels[1::3] = -100
    return [t.to(dtype) for t in tensors], labels


def evaluate(tensors: list[Tensor], labels: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = linear_cross_entropy(*leaves, labels, **options)
    weights = torch.linspace(0.5, 2, len(labels)) if loss.dim() else torch.tensor(1.3)
    return [loss, *torch.autograd.grad(loss, leaves, weights.to(loss.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("tokens", "vocabulary"), SIZES)
def test_losses_and_gradients(
    tokens: int,
    vocabulary: int,
    reduction: Any,
    smoothing: float,
    dtype: torch.dtype,
    assert_no_worse,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "_KERNEL_LOGITS", 4 * vocabulary)  # several pieces, one ragged
    tensors, labels = make(tokens, vocabulary, dtype)
    options: Any = {"reduction": reduction, "label_smoothing": smoothing}
    ours = evaluate(tensors, labels, **options, impl=IMPL)
    plain = evaluate(tensors, labels, **options, impl="reference")
    exact = evaluate([t.double() for t in tensors], labels, **options, impl="reference")
    if reduction != "none":  # whether the errors of tokens cancel in a sum is luck
        options["reduction"] = "none"
        rows, exact_rows = (
            evaluate(given, labels, **options, impl="reference")[0]
            for given in (tensors, [t.double() for t in tensors])
        )
        apart = (rows.double() - exact_rows).abs().sum()
        apart = apart / (labels >= 0).sum() if reduction == "mean" else apart
        plain[0] = (exact[0] + apart).to(ours[0].dtype)
    for name, *values in zip(["loss", "dh", "dw", "db"], ours, plain, exact, strict=True):
        assert_no_worse(*values, name, terms=vocabulary)


def test_only_the_piece_is_changed_and_only_when_asked() -> None:
    wide = torch.full((3, 40), float("nan"))
    wide[:, :25] = torch.randn(3, 25) * 50
    logits, labels = wide[:, :25], torch.tensor([0, 24, 3])
    before = logits.clone()
    losses = losses_then_gradients(logits, labels, 0.1, None)
    assert torch.equal(logits, before)
    exact = torch.nn.functional.cross_entropy(
        before.double().requires_grad_(), labels, reduction="none", label_smoothing=0.1
    )
    torch.testing.assert_close(losses.double(), exact, atol=1e-5, rtol=1e-5)
    again = losses_then_gradients(logits, labels, 0.1, torch.tensor([1.0, 0.0, 2.0]))
    assert torch.equal(again, losses)
    assert (logits[1] == 0).all()
    torch.testing.assert_close(logits.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    assert wide[:, 25:].isnan().all()


@pytest.mark.parametrize("bias", [None, torch.randn(9, device="cpu")], ids=["plain", "bias"])
def test_a_label_out_of_range_gives_nan(bias: Tensor | None) -> None:
    bias = None if bias is None else bias.to(DEVICE)
    losses = losses_then_gradients(torch.randn(3, 9), torch.tensor([9, -1, 8]), 0.1, None, bias)
    assert losses.isnan().tolist() == [True, True, False]


def test_a_bias_is_added_before_anything_is_rounded() -> None:
    product, bias = torch.randn(4, 30).bfloat16(), (8 * torch.randn(30)).bfloat16()
    labels, scale = torch.arange(4), torch.linspace(0.5, 2, 4)
    exact = (product.double() + bias.double()).requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected, exact, scale.double())
    losses = losses_then_gradients(product, labels, 0.0, scale, bias)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(product.double(), gradient, atol=1e-6, rtol=2.0**-8)


def test_nothing_and_ignored_rows() -> None:
    tensors, labels = make(4, 9, torch.float32)
    for some in (labels[:0], torch.full_like(labels, -100)):
        given = [tensors[0][: len(some)], *tensors[1:]]
        results = evaluate(given, some, impl=IMPL)
        assert all((x == 0).all() for x in results)


def test_opcheck_and_compile() -> None:
    tensors, labels = make(5, 11, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    arguments = (*leaves, labels, 0.1, -100)
    ops = torch.ops.blipfast
    torch.library.opcheck(ops.linear_cross_entropy, (*arguments, True, True, True, True, "triton"))
    torch.library.opcheck(ops.linear_cross_entropy_rows, (*arguments, "triton"))
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves, labels, impl=IMPL), leaves),
        torch.autograd.grad(linear_cross_entropy(*leaves, labels, impl="reference"), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)

"""Queries, keys and values of one projection, and where their gradients lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blipfast.ops.split_heads import empty_parts, split_heads


def projection(parts: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, parts, 3, 4, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_values_and_gradients(parts: int) -> None:
    x = projection(parts)
    expected = x.permute(2, 0, 3, 1, 4)
    found = split_heads(x)
    assert len(found) == parts
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    weights = torch.randn(parts, 2, 3, 5, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad(found, x, list(weights))
    (plain,) = torch.autograd.grad(expected, x, weights)
    assert torch.equal(ours, plain)
    assert ours.is_contiguous()


def test_a_part_that_is_not_used_has_no_gradient() -> None:
    x = projection(3)
    (grad,) = torch.autograd.grad(split_heads(x)[1].sum(), x)
    assert grad[:, :, 1].eq(1).all()
    assert not grad[:, :, ::2].any()


def test_gradients_that_lie_together_are_not_copied() -> None:
    x = projection(2)
    grads = empty_parts(split_heads(x)[0], 2)
    for part in grads:
        part.copy_(torch.randn(part.shape))
    (whole,) = torch.autograd.grad(split_heads(x), x, grads)
    assert whole.data_ptr() == grads[0].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(split_heads(whole), grads, strict=True))


@pytest.mark.parametrize("case", ["swapped", "twice the same", "apart", "other layout", "expanded"])
def test_others_are_copied(case: str) -> None:
    x = projection(2)
    first, second = empty_parts(split_heads(x)[0], 2)
    for part in (first, second):
        part.copy_(torch.randn(part.shape))
    grads = {
        "swapped": [second, first],
        "twice the same": [first, first],
        "apart": [first, second.clone()],
        "other layout": [first.contiguous(), second.contiguous()],
        "expanded": [first[:, :, :1].expand(first.shape), second],
    }[case]
    (whole,) = torch.autograd.grad(split_heads(x), x, grads)
    expected = torch.stack(grads).permute(1, 3, 0, 2, 4)
    assert torch.equal(whole, expected)
    assert whole.data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_is_compiled_without_a_break() -> None:
    x = projection(2)
    compiled = torch.compile(
        lambda x: (split_heads(x)[0] * split_heads(x)[1]).sum(), fullgraph=True, backend="aot_eager"
    )
    (grad,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(grad, x.detach().flip(2))

"""Bias and GELU in one pass against the formula in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from blipfast.kernels import _runtime
from blipfast.kernels.bias_gelu import bias_gelu_out, gelu_backward_
from blipfast.kernels.tiles import nth_candidate
from place import INTERPRETED
from torch import Tensor, nn

from blipfast.ops import _native, _triton, feed_forward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (17, 256), (40, 300), (130, 96)]
if not INTERPRETED:  # BLIP's own sizes
    SHAPES += [(90 * 197, 3072), (16 * 577, 4096)]


def by_formula(x: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, bias)]
    y = F.gelu(leaves[0] + leaves[1])
    return [y, *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways(shape: tuple[int, int], place: int, dtype: torch.dtype, assert_no_worse) -> None:
    x, grad = (3 * torch.randn(shape).to(dtype) for _ in range(2))
    bias = torch.randn(shape[1]).to(dtype)
    plain = by_formula(x, bias, grad)
    exact = by_formula(x.double(), bias.double(), grad.double())
    with nth_candidate(place):
        out = bias_gelu_out(x, bias, torch.empty_like(x))
        again = bias_gelu_out(x.clone(), bias, x.clone())
        dx = grad.clone()
        value, d_bias = gelu_backward_(dx, x, bias)
    assert torch.equal(out, again)
    assert torch.equal(out, value)
    ours = [out, dx, d_bias]
    for name, *values in zip(["y", "dx", "dbias"], ours, plain, exact, strict=True):
        assert_no_worse(*values, name, terms=shape[0] if name == "dbias" else 1)


def test_in_place_and_far_out() -> None:
    x = torch.tensor([[-40.0, -1.0, 0.0, 1.0, 40.0, float("nan")]])
    bias = torch.zeros(6)
    expected = by_formula(x, bias, torch.ones(1, 6))
    dx = torch.ones(1, 6)
    gelu_backward_(dx, x, bias)
    torch.testing.assert_close(dx[:, :5], expected[1][:, :5])
    assert bias_gelu_out(x, bias, x) is x
    torch.testing.assert_close(x, expected[0], equal_nan=True)


def test_a_bias_with_gaps() -> None:
    x, grad, bias = torch.randn(5, 12), torch.randn(5, 12), torch.randn(12)
    apart = torch.stack([bias, torch.full_like(bias, float("nan"))], 1)[:, 0]
    for a, b in zip(
        gelu_backward_(grad.clone(), x, apart), gelu_backward_(grad, x, bias), strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(bias_gelu_out(x, apart, torch.empty_like(x)), bias_gelu_out(x, bias, x))


def test_as_many_rows_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card takes 65,535 programs along the second dimension of a grid, and no more."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(_runtime, "recorder", lambda kernel, grid, *_: grids.append(grid))
    x = torch.empty(2_000_000, 3072, dtype=torch.bfloat16, device="meta")
    bias_gelu_out(x, x[0], x)
    gelu_backward_(x, x, x[0])
    assert len(grids) == 2
    assert all(grid[1] <= 65_535 for grid in grids)


def test_no_rows() -> None:
    x, bias = torch.zeros(0, 5), torch.ones(5)
    assert bias_gelu_out(x, bias, x).shape == (0, 5)
    value, d_bias = gelu_backward_(x, x, bias)
    assert value.shape == (0, 5)
    assert not d_bias.any()


def test_in_the_feed_forward_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU takes it, without autocast; the parameters' gradients too."""
    if INTERPRETED:
        monkeypatch.setattr(_triton, "_DEVICES", ("cpu",))
        monkeypatch.setattr(_triton, "_too_old", lambda _: None)
        monkeypatch.setattr(_native, "why_not", lambda *_: "kernels are tried")
    first, second = nn.Linear(16, 40), nn.Linear(40, 16)
    x = torch.randn(2, 9, 16, requires_grad=True)
    leaves = [x, *first.parameters(), *second.parameters()]
    ours, theirs = feed_forward(x, first, second), second(F.gelu(first(x)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(out.sin().sum(), leaves) for out in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(x, first, second), theirs, atol=1e-5, rtol=1e-5)

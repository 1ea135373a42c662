"""Linear layers and word tables used several times in a step: the gradients of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.ops.autocast_copies import autocast_copy
from blipfast.ops.linear_layers import Linear, feed_forward, linear
from blipfast.ops.tied_table import TiedTable


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("uses", [1, 3])
def test_linear_equals_torch(shape: tuple[int, ...], bias: bool, uses: int) -> None:
    torch.manual_seed(0)
    x, weight, b = torch.randn(*shape), torch.randn(4, 6), torch.randn(4)
    leaves = [t.double().requires_grad_() for t in ((x, weight, b) if bias else (x, weight))]

    def loss(layer: Callable[..., Tensor]) -> Tensor:
        inputs, *rest = leaves
        return sum(layer(inputs * (i + 1), *rest).sin().sum() for i in range(uses))  # type: ignore[return-value]

    ours, theirs = (torch.autograd.grad(loss(f), leaves) for f in (linear, F.linear))
    for a, b_ in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b_, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rows", [640, 641, 880, 1407, 1408])
def test_linear_in_pieces_is_whole(rows: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 16), torch.randn(8, 16), torch.randn(8)
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    with torch.no_grad():
        out = linear(x, weight, bias)
    assert out.shape == (rows, 8)
    torch.testing.assert_close(out, F.linear(x, weight, bias), atol=0.02, rtol=0.02)


def test_linear_under_autocast_casts() -> None:
    x, weight = torch.randn(3, 6), torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def _rounding(dtype: torch.dtype) -> float:
    """Of a sum; where products are exact to the dtype, its order alone makes a few units."""
    return torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 8)


@pytest.mark.parametrize("output_layer", [True, False])
def test_tied_table_sums_all_uses(output_layer: bool) -> None:
    """Two lookups with repeats, and the table as output weight, or without it."""
    torch.manual_seed(0)
    first, second = torch.tensor([1, 1, 4]), torch.tensor([[0, 4], [1, 6]])

    def loss(look_up: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
        a, b = look_up(first), look_up(second)
        total = a.sin().sum() + b.cos().sum()
        return total + F.linear(a * 2, weight).exp().sum() if output_layer else total

    leaf = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    table = TiedTable(leaf)
    (ours,) = torch.autograd.grad(loss(table.look_up, table.weight), leaf)
    (theirs,) = torch.autograd.grad(loss(lambda ids: F.embedding(ids, leaf), leaf), leaf)
    assert ours.layout == torch.strided
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_tied_table_with_a_kept_graph() -> None:
    """A second backward gives the same, though the first wrote into the gradient it was given."""
    leaf = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    table = TiedTable(leaf)
    out = linear(table.look_up(torch.tensor([2, 2, 3])), table.weight).sin().sum()
    once, twice = (torch.autograd.grad(out, leaf, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(once, twice, atol=0, rtol=0)


def test_tied_table_compiled_has_all_gradients() -> None:
    leaf = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([2, 2, 3])

    def loss(weight: Tensor) -> Tensor:
        table = TiedTable(weight)
        return linear(table.look_up(ids), table.weight).sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours, plain = (torch.autograd.grad(f(leaf), leaf)[0] for f in (compiled, loss))
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


def _layers(dtype: torch.dtype, width: int = 96, hidden: int = 160) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return Linear(width, hidden, dtype=dtype), nn.Linear(hidden, width, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 2047, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_feed_forward(rows: int, dtype: torch.dtype, processor: str) -> None:
    """Output and every gradient are as near to float64's as plain PyTorch's in the same dtype."""
    first, second = _layers(dtype)
    x = torch.randn(1, rows, 96).to(dtype)
    weights = [*first.parameters(), *second.parameters()]
    grad = torch.randn(1, rows, 96).to(dtype)

    def plain(x: Tensor, *w: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, *w[:2])), *w[2:])

    def run(f: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
        out = f(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    exact = run(plain, *wide)
    x.requires_grad_()
    ours = run(lambda x, *_: feed_forward(x, first, second), x, *weights)
    theirs = run(plain, x, *weights)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        errors = [(t.double() - c).abs().max().item() for t in (a, b)]
        assert errors[0] <= 2 * errors[1] + _rounding(dtype) * c.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(x, first, second), ours[0], atol=0.02, rtol=0.02)


def test_feed_forward_calls_layers_that_are_more_than_weights() -> None:
    first, second = _layers(torch.float32)
    seen: list[int] = []
    first.register_forward_hook(lambda *_: seen.append(1))
    feed_forward(torch.randn(3, 96), first, second)
    assert seen == [1]


@pytest.mark.parametrize("rows", [3, 300])
def test_frozen_layers_get_no_gradients(rows: int, processor: str) -> None:
    first, second = _layers(torch.float32)
    first.requires_grad_(False)
    x = torch.randn(rows, 96, requires_grad=True)
    assert first(x).requires_grad
    feed_forward(x, first, second).sum().backward()
    assert first.weight.grad is None
    assert second.weight.grad is not None
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [64, 411])
def test_wide_weights_have_the_gradients_of_torch(rows: int, dtype: torch.dtype) -> None:
    """Wide enough for the transposed product, with rows and columns that fill no block."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 777), torch.randn(810, 777) / 30, torch.randn(810)
    grad = torch.randn(rows, 810).to(dtype)
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(F.linear(*wide), wide, grad.double())
    ours = torch.autograd.grad(linear(*leaves), leaves, grad)
    theirs = torch.autograd.grad(F.linear(*leaves), leaves, grad)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        errors = [(t.double() - c).abs().max().item() for t in (a, b)]
        rounding = 0.004 if dtype == torch.bfloat16 else _rounding(dtype)
        assert errors[0] <= 2 * errors[1] + rounding * c.abs().max()


def test_autocast_casts_a_weight_once_and_again_when_it_has_changed() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    copy = autocast_copy(weight, torch.bfloat16)
    assert autocast_copy(weight, torch.bfloat16) is copy
    assert autocast_copy(weight, torch.float16) is not copy
    copy = autocast_copy(weight, torch.bfloat16)
    with torch.no_grad():
        weight.add_(1)
    changed = autocast_copy(weight, torch.bfloat16)
    torch.testing.assert_close(changed, weight.bfloat16(), rtol=0, atol=0)
    del copy, changed
    (autocast_copy(weight, torch.bfloat16) * 2).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((4, 6), 2.0))


def test_autocast_sums_the_gradients_of_all_uses() -> None:
    torch.manual_seed(0)
    first, second = _layers(torch.float32)
    x = torch.randn(5, 96)

    def gradients(impl: str) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = feed_forward(x, first, second, impl=impl)
            y = linear(feed_forward(y, first, second, impl=impl), first.weight, impl=impl)
            loss = y.float().square().mean()
        weights = [*first.parameters(), *second.parameters()]
        return list(torch.autograd.grad(loss, weights))

    for ours, theirs in zip(gradients("fused"), gradients("torch"), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=0.03 * theirs.abs().max().item(), rtol=0.05)

"""Dropout: what it keeps, that its backward draws the same mask, and when it is PyTorch's."""

from __future__ import annotations

import pytest
import torch

from blipfast.ops import _native
from blipfast.ops.seeded_dropout import dropout

needs_native = pytest.mark.skipif(
    _native.why_not() is not None, reason=f"no native library: {_native.why_not()}"
)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keeps_the_share_and_the_mean(impl: str, dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    count = 200_000
    out = dropout(torch.ones(count, dtype=dtype), p, impl=impl).double()
    kept = (out != 0).double().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    torch.testing.assert_close(out[out != 0].mean().item(), 1 / (1 - p), rtol=0.005, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (127,), (129, 3), (7, 50, 33)])
def test_backward_draws_the_same_mask(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype).abs().add(1).requires_grad_()
    out = dropout(x, 0.3)
    (grad,) = torch.autograd.grad(out, x, x.detach())
    torch.testing.assert_close(grad, out.detach())


def test_repeats_with_the_generator_and_differs_from_call_to_call() -> None:
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(dropout(x, 0.5), first)
    assert not torch.equal(first, second)


@needs_native
def test_neighbours_are_independent_and_threads_do_not_matter() -> None:
    draw = torch.ops.blipfast_native.dropout
    x = torch.ones(300_001)
    out = draw(x, 0.5, 2**61 + 5)
    with_one = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(draw(x, 0.5, 2**61 + 5), out)
    finally:
        torch.set_num_threads(with_one)
    kept = (out != 0).double() - 0.5
    for lag in (1, 2, 16, 32, 128, 256):
        correlation = (kept[lag:] * kept[:-lag]).mean().item() * 4
        assert abs(correlation) < 5 / len(x) ** 0.5


@needs_native
def test_dropped_infinities_are_zero() -> None:
    out = torch.ops.blipfast_native.dropout(torch.full((4096,), torch.inf), 0.5, 1)
    assert set(out.unique().tolist()) == {0.0, torch.inf}


def test_is_the_identity_outside_training() -> None:
    x = torch.randn(5)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    assert dropout(x, 1.0).count_nonzero() == 0

"""Momentum update: parity with the formula, mixed dtypes, in place, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.ops.momentum_update import momentum_update_

SHAPES: list[tuple[int, ...]] = [(), (1,), (7, 5), (0, 3), (2, 3, 4), (63,)]


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]
    return [*made, made[2].clone().t()]  # not contiguous


@pytest.mark.parametrize("impl", ["torch", "reference", "auto"])
@pytest.mark.parametrize("momentum", [0.0, 0.995, 1.0])
def test_formula(momentum: float, impl: str) -> None:
    targets, sources = tensors(0), tensors(1)
    expected = [t * momentum + s * (1 - momentum) for t, s in zip(targets, sources, strict=True)]
    addresses = [t.data_ptr() for t in targets]
    momentum_update_(targets, sources, momentum, impl=impl)
    torch.testing.assert_close(targets, expected, rtol=1e-14, atol=1e-14)
    assert addresses == [t.data_ptr() for t in targets]
    if momentum == 1:
        assert all(torch.equal(a, b) for a, b in zip(targets, tensors(0), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sources, tensors(1), strict=True))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(target_dtype: torch.dtype, source_dtype: torch.dtype, impl: str) -> None:
    targets, sources = tensors(0, target_dtype), tensors(1, source_dtype)
    exact = [
        t.double() * 0.9 + s.to(t.dtype).double() * 0.1
        for t, s in zip(targets, sources, strict=True)
    ]
    momentum_update_(targets, sources, 0.9, impl=impl)
    for target, value in zip(targets, exact, strict=True):
        assert target.dtype == target_dtype
        bound = 3 * torch.finfo(target_dtype).eps
        torch.testing.assert_close(target.double(), value, rtol=bound, atol=bound)


def test_a_mixture_of_dtypes_in_one_call() -> None:
    targets = [t.to(d) for t in tensors(0) for d in (torch.float32, torch.float64)]
    sources = [t.to(d) for t in tensors(1) for d in (torch.float64, torch.bfloat16)]
    expected = [t * 0.5 + s.to(t.dtype) * 0.5 for t, s in zip(targets, sources, strict=True)]
    momentum_update_(targets, sources, 0.5)
    torch.testing.assert_close(targets, expected)


def test_parameters_are_updated_outside_autograd() -> None:
    target = torch.nn.Parameter(torch.zeros(3))
    source = torch.nn.Parameter(torch.ones(3))
    momentum_update_([target], [source], 0.75)
    assert target.tolist() == [0.25] * 3
    assert target.is_leaf
    assert target.grad_fn is None


def test_nothing_to_do() -> None:
    momentum_update_([], [], 0.5)


@pytest.mark.parametrize(
    ("targets", "sources", "momentum", "words"),
    [
        ([torch.zeros(2)], [], 0.5, "1 targets, 0 sources"),
        ([torch.zeros(2)], [torch.zeros(3)], 0.5, r"target 0 is \(2,\)"),
        ([torch.zeros(2)], [torch.zeros(2, device="meta")], 0.5, "on meta"),
        ([torch.zeros(2).long()], [torch.zeros(2)], 0.5, "not float"),
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, "momentum=1.5"),
        ([torch.zeros(2)], [torch.zeros(2)], float("nan"), "momentum=nan"),
    ],
)
def test_bad_input(
    targets: list[Tensor], sources: list[Tensor], momentum: float, words: str
) -> None:
    with pytest.raises(ShapeError, match=words):
        momentum_update_(targets, sources, momentum)

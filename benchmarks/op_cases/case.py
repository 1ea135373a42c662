"""A case: an operator at one size, with all codes that compute it, and its floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]
BASELINE = "eager"  # the formula in plain PyTorch, as one would write it


@dataclass(frozen=True)
class Case:
    """One operator at one size. run(code) is a `Run`, for a backend's name or the baseline's.

    exact: outputs are compared; of random draws only the shapes are. others: competitors that run.
    axis, size: what varies in a sweep, and its value here.
    """

    name: str
    run: Callable[[str], Run]
    bytes: float
    flops: float
    baseline: str = BASELINE
    exact: bool = True
    others: Mapping[str, Run] = field(default_factory=dict)
    axis: str = ""
    size: int = 0

    def code(self, name: str) -> Run:
        return self.others[name] if name in self.others else self.run(name)


@dataclass(frozen=True)
class Setting:
    device: torch.device
    dtype: torch.dtype
    small: bool = False  # sizes for the interpreter
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def randn(self, *shape: int, grad: bool = False) -> Tensor:
        x = torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)
        return x.requires_grad_() if grad else x

    def unit(self, *shape: int, grad: bool = False) -> Tensor:
        x = F.normalize(self.randn(*shape).float(), dim=-1).to(self.dtype)
        return x.requires_grad_() if grad else x

    @property
    def element(self) -> int:
        return self.dtype.itemsize


def differentiated(
    outputs: Callable[[], Tensor], leaves: tuple[Tensor, ...], weights: Tensor
) -> Run:
    """Forward and backward of the weighted sum: the outputs and the leaves' gradients."""

    def run() -> tuple[Tensor, ...]:
        out = outputs()
        return out.detach(), *torch.autograd.grad(out, leaves, weights)

    return run


def all_differentiated(
    outputs: Mapping[str, Callable[[], Tensor]], leaves: tuple[Tensor, ...], weights: Tensor
) -> dict[str, Run]:
    return {code: differentiated(run, leaves, weights) for code, run in outputs.items()}


def assert_same(
    case: Case, ours: tuple[Any, ...], theirs: tuple[Any, ...], dtype: torch.dtype
) -> None:
    """Equal within what the dtype's rounding explains, relative to each output's size."""
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape, f"{case.name}: {tuple(a.shape)} against {tuple(b.shape)}"
        if case.exact:
            size = b.float().abs().max().clamp(min=1e-6)
            error = (a.float() - b.float()).abs().max() / size
            assert error < tolerance, f"{case.name}: outputs differ by {float(error):.2e}"

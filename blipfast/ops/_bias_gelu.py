"""Bias and GELU in one pass each way, by C++ on a CPU and Triton on a GPU. No gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blipfast.ops import _native, _triton


def bias_gelu(x: Tensor, bias: Tensor, *, in_place: bool = False) -> Tensor:
    """`gelu(x + bias)`; in place where nothing else needs x: fresh memory for the widest activation
    costs page faults."""
    bias = bias.to(x.dtype)
    fused = _fused(x)
    if fused is None:
        return torch.ops.aten.gelu_(x.add_(bias) if in_place else x + bias)
    out = x if in_place else torch.empty_like(x)
    rows = (t.view(-1, t.shape[-1]) for t in (x, out))
    fused.bias_gelu_out(next(rows), bias, next(rows))
    return out


def gelu_backward_(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `gelu(x + bias)` and the bias's gradient; `grad (R, C)` becomes x's in place."""
    fused = _fused(grad)
    if fused is not None:
        return fused.gelu_backward_(grad, x, bias)  # type: ignore[no-any-return]
    biased = x + bias
    grad.copy_(torch.ops.aten.gelu_backward(grad, biased))
    return torch.ops.aten.gelu_(biased), grad.sum(0)


def _fused(x: Tensor) -> Any:
    """What holds both functions for x, or None."""
    if not x.is_contiguous() or type(x) is not Tensor:
        return None
    if _native.why_not(x) is None:
        return torch.ops.blipfast_native
    if _triton.why_not(x) is None:
        from blipfast.kernels import bias_gelu as kernels

        return kernels
    return None

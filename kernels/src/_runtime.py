"""What the launchers share: how a kernel is started, and the choices that depend on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# (kernel, grid, positional arguments, constexprs and options); see `launch`.
Recorder = Callable[[Any, tuple[int, ...], Sequence[Any], dict[str, Any]], None]
hip = torch.version.hip is not None
recorder: Recorder | None = None  # set by benchmarks/aot.py, which compiles instead of running


def launch(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], **meta: Any) -> None:
    """Run `kernel` over `grid` on the device of its first tensor; an empty grid is no launch."""
    if recorder is not None:
        recorder(kernel, grid, args, meta)
        return
    if 0 in grid:
        return
    with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
        kernel[grid](*args, **meta)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """Float32 products in full unless the user allowed TF32, as PyTorch's own matmuls do.

    On CUDA "in full" is three TF32 products on the tensor cores, which leave an error of about
    2^-22: plain multiply-adds of this size run out of registers.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee" if hip else "tf32x3"
    return "tf32" if dtype == torch.float32 and not hip else "ieee"

"""What the launchers share: how a kernel is started, and the choices that depend on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# (kernel, grid, positional arguments, constexprs and options); see `launch`.
Recorder = Callable[[Any, tuple[int, ...], Sequence[Any], dict[str, Any]], None]
# Set by benchmarks/aot.py, which compiles for other cards than the one here instead of running.
recorder: Recorder | None = None
forced_target: int | str | None = None


def launch(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], **meta: Any) -> None:
    """Run `kernel` over `grid` on the device of its first tensor; an empty grid is no launch."""
    if recorder is not None:
        recorder(kernel, grid, args, meta)
        return
    if 0 in grid:
        return
    with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
        kernel[grid](*args, **meta)


def first_output(
    operator: Callable[..., tuple[Tensor, ...]],
    function: type[torch.autograd.Function],
    arguments: tuple[Any, ...],
) -> Tensor:
    """`operator(*arguments)[0]`, by `function`, the same kernels as they are, unless `watched`."""
    if watched(arguments[0]):
        return operator(*arguments)[0]
    return function.apply(*arguments)  # type: ignore[no-any-return]


def watched(tensor: Tensor) -> bool:
    """Whether somebody traces, counts or wraps what is called, and must see an operator.

    Else a plain `autograd.Function` does: through PyTorch's dispatcher a custom operator takes the
    host twice as long.
    """
    plain = type(tensor) in (Tensor, Parameter)
    return not plain or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def short(dtype: torch.dtype) -> str:
    """As "bf16", "fp16" or "fp32"."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def _target(device: torch.device) -> int | str:
    if torch.version.hip is not None:
        return "hip"
    if device.type != "cuda":
        return 90  # the interpreter does not care
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def target(tensor: Tensor) -> int | str:
    """What the kernels for `tensor` are compiled for: 80, 90, 100 … or "hip"."""
    return _target(tensor.device) if forced_target is None else forced_target


def dot_precision(tensor: Tensor) -> str:
    """Float32 products in full unless the user allowed TF32, as PyTorch's own matmuls do.

    On CUDA "in full" is three TF32 products on the tensor cores, which leave an error of about
    2^-22: plain multiply-adds of this size run out of registers.
    """
    if tensor.dtype != torch.float32 or target(tensor) == "hip":
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"

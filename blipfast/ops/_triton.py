"""Whether the Triton kernels can run on a tensor, in words; imports neither Triton nor a kernel.

An operator registers its kernels twice: as "triton", for GPUs, and as "triton_interpreter", last,
for tests of the same kernels on a CPU: `auto` never comes to it, so that the interpreter, which is
thousands of times slower, runs only where it is asked for by name and by TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from blipfast.ops._dispatch import Reason

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENV_VAR = "TRITON_INTERPRET"
_DEVICES = ("cuda",)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


# What a machine has does not change while a compiled graph lives.
@torch.compiler.assume_constant_result
def _missing() -> str | None:
    return None if _has_triton() else "Triton is not installed (pip install triton)"


@torch.compiler.assume_constant_result
def _too_old(index: int | None) -> str | None:
    index = torch.cuda.current_device() if index is None else index
    if torch.version.hip is not None or _capability(index) >= (8, 0):
        return None
    found = ".".join(map(str, _capability(index)))
    return f"the kernels need a card of compute capability 8.0 or newer, this one has {found}"


@torch.compiler.assume_constant_result
def _interpreting() -> bool:
    return os.environ.get(ENV_VAR, "").lower() in ("1", "true", "on", "yes", "y")


def _wrong_dtype(tensor: torch.Tensor) -> str | None:
    if tensor.dtype not in DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    return None


def no_wider(limit: int, of: str, unit: str, why_not: Reason) -> Reason:
    """`why_not`, of kernels whose tiles hold the last dimension whole."""

    def reason(tensor: torch.Tensor) -> str | None:
        if tensor.dim() and tensor.shape[-1] > limit:
            return f"the kernel takes {of} of up to {limit} {unit}, not {tensor.shape[-1]}"
        return why_not(tensor)

    return reason


def why_not(tensor: torch.Tensor) -> str | None:
    """Why the kernels cannot run on this tensor's GPU, or None when they can."""
    if tensor.device.type not in _DEVICES:
        return f"Triton kernels run on a GPU, the tensor is on {tensor.device}"
    return _missing() or _too_old(tensor.device.index) or _wrong_dtype(tensor)


def why_not_interpreter(tensor: torch.Tensor) -> str | None:
    """Why the kernels cannot run in Triton's interpreter, or None when they can."""
    if not _interpreting():
        return f"set {ENV_VAR}=1 before Python starts to run the kernels in Triton's interpreter"
    return _missing() or _wrong_dtype(tensor)

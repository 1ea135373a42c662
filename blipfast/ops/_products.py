"""Matrix products on a CPU, each by the library that is fast there. No gradients.

- In float32 PyTorch takes MKL, which leaves AVX-512 to Intel's processors; oneDNN uses it on all
  that have it, at twice the speed.
- oneDNN multiplies a transposed bf16 matrix at half its speed on AMX, and PyTorch transposes a
  float32 one for it at a quarter of the memory's speed: such a matrix is transposed before.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.ops import _native


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, as `F.linear`: `x (..., in)`, `weight (out, in)` of any strides."""
    if onednn_is_faster(x) and x.numel() * weight.shape[0] >= _WORTH_A_CALL:
        return by_onednn(x, weight, bias)
    if _runs_on_one_thread(x, weight):
        pieces = -(-x.shape[0] // _GOOD_ROWS)
        return torch.cat([F.linear(part, weight, bias) for part in x.chunk(pieces)])
    if bias is not None and _adds_bias_faster(x):
        return by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


_WORTH_A_CALL = 2**20  # multiplications; below, what oneDNN's call costs is what counts


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """The product by oneDNN, with GELU applied before it rounds and writes."""
    name = "gelu" if gelu else "none"
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], "none" if gelu else "")


def onednn_takes(x: Tensor) -> bool:
    """Whether `by_onednn` is there, and autocast does not ask for another dtype."""
    casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.get_autocast_dtype("cpu")
    return x.is_cpu and not casts and _has_onednn()


_MANY_ROWS = 1024  # below it the result is in the caches


def _adds_bias_faster(x: Tensor) -> bool:
    """Whether `by_onednn` should add a bias: PyTorch writes it into the result first, to add to."""
    return (
        x.dtype == torch.bfloat16
        and x.numel() >= _MANY_ROWS * x.shape[-1]
        and bf16_products() is not None
        and onednn_takes(x)
    )


def onednn_is_faster(x: Tensor) -> bool:
    """Whether `by_onednn` beats what PyTorch takes for x's dtype, at any number of rows."""
    return x.dtype == torch.float32 and onednn_takes(x) and mkl_lacks_avx512()


@functools.cache
def bf16_products() -> str | None:
    """What multiplies bf16 on this processor: "amx", "avx512" or nothing."""
    for name, check in (("amx", "_is_amx_tile_supported"), ("avx512", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, check, bool)():
            return name
    return None


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.compiler.assume_constant_result
def mkl_lacks_avx512() -> bool:
    """Whether the processor has AVX-512, but not for MKL."""
    return _mkl_lacks_avx512()


@functools.cache
def _mkl_lacks_avx512() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "vendor_id" in about and "GenuineIntel" not in about


# Of two threads oneDNN (3.x, torch 2.13) leaves one idle between these row counts, at BERT's width.
_GOOD_ROWS, _BAD_ROWS, _BAD_OUT_FEATURES = 640, 1408, 1024


def _runs_on_one_thread(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dim() == 2
        and _GOOD_ROWS < x.shape[0] < _BAD_ROWS
        and weight.shape[0] <= _BAD_OUT_FEATURES
        and x.dtype == torch.bfloat16
        and x.is_cpu
        and torch.get_num_threads() == 2
    )


_SMALL_WEIGHT = 768 * 768  # up to it, transposing bf16 first gains nothing


def parameter_gradients(
    grad: Tensor, x: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of a linear layer's weight and bias, from `grad (R, out)` and `x (R, in)`."""
    if need_weight and _transposes_first(grad, x):
        transposed, sums = torch.ops.blipfast_native.transpose_and_sum(grad.contiguous())
        return product(transposed, x.t()), sums if need_bias else None
    return product(grad.t(), x.t()) if need_weight else None, grad.sum(0) if need_bias else None


def _transposes_first(grad: Tensor, x: Tensor) -> bool:
    """Whether oneDNN is slow on a transposed grad, or PyTorch in transposing it for oneDNN."""
    if not grad.is_cpu:
        return False
    if grad.dtype == torch.bfloat16:
        return grad.shape[1] * x.shape[1] > _SMALL_WEIGHT and _native.amx()
    worth = grad.numel() * x.shape[1] >= _WORTH_A_CALL
    return worth and onednn_is_faster(grad) and _native.avx512()

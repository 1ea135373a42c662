"""Self-attention over packed text by the CUDA kernels of flash-attn, xformers and PyTorch.

Each takes `qkv (T, 3, H, head_dim)`, fp16 or bf16, and a `Packing`, and gives `(T, H, head_dim)`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from blipfast.errors import BackendError
from blipfast.ops.packing import Packing

Attend = Callable[[Tensor, Packing, bool, float], Tensor]
WhyNot = Callable[[Tensor], str | None]


def by_flash_attn(qkv: Tensor, packing: Packing, causal: bool, dropout_p: float) -> Tensor:
    """flash-attn's packed kernel, which reads q, k and v from one tensor."""
    from flash_attn import flash_attn_varlen_qkvpacked_func

    out: Tensor = flash_attn_varlen_qkvpacked_func(
        qkv, packing.cu_seqlens.int(), packing.max_seqlen, dropout_p, causal=causal
    )
    return out


def by_xformers(qkv: Tensor, packing: Packing, causal: bool, dropout_p: float) -> Tensor:
    """xformers' memory-efficient attention, block-diagonal over the texts."""
    from xformers.ops import fmha, memory_efficient_attention

    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens([n for n in packing.lengths if n])
    if causal:
        bias = bias.make_causal()
    q, k, v = qkv[None].unbind(2)  # (1, T, H, head_dim) each
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p)
    return out[0]


def by_torch_varlen(qkv: Tensor, packing: Packing, causal: bool, dropout_p: float) -> Tensor:
    """PyTorch's packed flash attention, which has no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    if dropout_p > 0:
        raise BackendError("varlen_attention: torch_varlen has no dropout; choose another backend")
    cu_seqlens, longest = packing.cu_seqlens.int(), packing.max_seqlen
    window = (-1, 0) if causal else (-1, -1)
    q, k, v = qkv.unbind(1)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window)
    assert isinstance(out, Tensor)
    return out


def without(module: str, function: str, install: str) -> WhyNot:
    """Why a library's kernel cannot run on `qkv`: not installed, another device or dtype."""

    def why_not(qkv: Tensor) -> str | None:
        if qkv.device.type != "cuda":
            return f"{module.split('.')[0]} needs CUDA, the tensor is on {qkv.device.type}"
        if qkv.dtype not in (torch.float16, torch.bfloat16):
            return f"{module.split('.')[0]} takes fp16 and bf16, not {qkv.dtype}"
        if qkv.dim() == 4 and (qkv.shape[3] > 256 or qkv.shape[3] % 8):
            return f"heads of {qkv.shape[3]} are not a multiple of 8 up to 256"
        missing = _missing(module, function)  # last: an import of some seconds where it is there
        return f"{missing}; {install}" if missing else None

    return why_not


@torch.compiler.assume_constant_result  # importing cannot be traced
def _missing(module: str, function: str) -> str | None:
    return _found_missing(module, function)


@functools.cache
def _found_missing(module: str, function: str) -> str | None:
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a build for another torch fails in ways of its own
        return f"{module} cannot be imported ({type(error).__name__})"
    package = sys.modules[module.partition(".")[0]]
    if not getattr(package, "_has_cpp_library", True):  # xformers then imports, and no more
        return f"{package.__name__} was built for another PyTorch"
    return None if hasattr(found, function) else f"this {module} has no {function}"


# Asked first where it is installed, since nobody installs it by chance.
FIRST: dict[str, tuple[Attend, WhyNot]] = {
    "flash_attn": (
        by_flash_attn,
        without("flash_attn", "flash_attn_varlen_qkvpacked_func", "pip install 'blipfast[gpu]'"),
    ),
}
# By name only, until a card has shown where they are the fastest.
BY_NAME: dict[str, tuple[Attend, WhyNot]] = {
    "torch_varlen": (
        by_torch_varlen,
        without("torch.nn.attention.varlen", "varlen_attn", "it comes with PyTorch for CUDA"),
    ),
    "xformers": (
        by_xformers,
        without("xformers.ops", "memory_efficient_attention", "pip install 'blipfast[gpu]'"),
    ),
}

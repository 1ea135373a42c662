"""Loads the optional C++ operators (`kernels/csrc`, built by CMake) and says why when it cannot."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from blipfast.errors import BackendError, ShapeError

LIBRARY = Path(__file__).resolve().parents[1] / "libblipfast_native.so"
ENV_VAR = "BLIPFAST_NATIVE"
AMX_ENV_VAR = "BLIPFAST_AMX"  # "0": take the paths that any processor has
_ISA_NAMES = {4: "AVX-512", 3: "AVX2", 0: "portable"}


@functools.cache
def _load() -> str | None:
    """Load the library once; returns why it is not there, or None."""
    if os.environ.get(ENV_VAR) == "0":
        return f"switched off by {ENV_VAR}=0"
    if not LIBRARY.is_file():
        return (
            "the C++ operators were not built; install cmake and a C++ compiler, then reinstall "
            "blipfast (pip install -v --no-build-isolation -e . shows why a build failed)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load beside torch {torch.__version__}: {error}"
    if not _is_current():
        return f"{LIBRARY.name} is of another version of blipfast; build it again (make native)"
    _register_fakes()
    return None


def _is_current() -> bool:
    """Whether the library has the operators as this version calls them, by the latest change."""
    stream = getattr(torch.ops.blipfast_native, "softmax_mean", None)
    return stream is not None and "avx512" in str(stream.default._schema)


def _register_fakes() -> None:
    @torch.library.register_fake("blipfast_native::softmax_mean")
    def _(rows, keys, temperature, amx, avx512):  # type: ignore[no-untyped-def]
        mean = rows.new_empty(rows.shape, dtype=torch.float32)
        return mean.new_empty(rows.shape[0]), mean

    @torch.library.register_fake("blipfast_native::draw_negatives")
    def _(scores, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
        return scores.new_empty(scores.shape[0], options[-1], dtype=torch.int64)

    @torch.library.register_fake("blipfast_native::few_rows_linear")
    def _(rows: Tensor, weight: Tensor, bias: Tensor, gelu: bool, amx: bool) -> Tensor:
        return rows.new_empty(*rows.shape[:-1], weight.shape[-2])

    @torch.library.register_fake("blipfast_native::varlen_attention")
    def _(qkv: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
        return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])


def why_not(tensor: Tensor | None = None) -> str | None:
    """Why the native operators cannot run (on `tensor`, when given), in words, or None."""
    if tensor is not None and tensor.device.type != "cpu":
        return f"native operators are for the CPU, the tensor is on {tensor.device}"
    if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16):
        return f"native operators take float32 and bfloat16, not {tensor.dtype}"
    return _missing()


# What was loaded does not change while a compiled graph lives, and loading cannot be traced.
@torch.compiler.assume_constant_result
def _missing() -> str | None:
    return _load()


def _may_use_more() -> bool:
    return os.environ.get(AMX_ENV_VAR) != "0"


@torch.compiler.assume_constant_result
def amx() -> bool:
    """Whether the operators are there, and the processor's AMX for bfloat16 may be used."""
    return _may_use_more() and _has_amx()


@functools.cache
def _has_amx() -> bool:
    return _load() is None and bool(torch.ops.blipfast_native.amx_bf16())


@torch.compiler.assume_constant_result
def avx512() -> bool:
    """Whether the operators are there, and AVX-512."""
    return _has_avx512()


@functools.cache
def _has_avx512() -> bool:
    return _load() is None and int(torch.ops.blipfast_native.isa_level()) == 4


@torch.compiler.assume_constant_result
def avx512_bf16() -> bool:
    """Whether the operators are there, and AVX-512's dot products of bfloat16."""
    return _has_avx512_bf16()


@functools.cache
def _has_avx512_bf16() -> bool:
    return _load() is None and bool(torch.ops.blipfast_native.avx512_bf16())


def status() -> str:
    """One line for people: what was loaded, and at which instruction set it runs."""
    reason = _load()
    if reason is not None:
        return f"no native CPU operators: {reason}"
    level = _ISA_NAMES[int(torch.ops.blipfast_native.isa_level())]
    return f"native CPU operators loaded ({level}{', AMX bf16' if amx() else ''})"


def native_online_softmax(
    query: Tensor,
    teacher_query: Tensor | None,
    temperature: Tensor,
    keys: Sequence[Tensor],
    *,
    own_float32: bool = True,
) -> tuple[Tensor, Tensor]:
    """One pass over the keys for the contrastive loss, on the CPU, without a `(R, N)` matrix.

    Where the processor multiplies bf16, queries and keys of it are not widened: products have fp32
    sums, and the softmax weights are rounded to bf16 for the second one. Otherwise everything is
    fp32. The result does not depend on the number of threads.

    Args:
        query: `(B, D)` fp32 or bf16, not divided by the temperature.
        teacher_query: `(B, D)` or None; its rows follow the query's, so that `R` is `B` or `2B`.
        temperature: one element.
        keys: blocks `(N_b, D)`, fp32 or bf16, that count as their concatenation.
        own_float32: whether fp32 products are the operator's own where there is AVX-512, or
            PyTorch's.

    Returns:
        Log-sum-exps of the similarities over the temperature `(R,)` and the softmax-weighted means
        of the keys `(R, D)`, fp32. They carry no gradient.

    Raises:
        BackendError: the library is not there, or the tensors are not for it.
        ShapeError: there is no key.
    """
    reason = why_not(query)
    if reason is not None:
        raise BackendError(f"native contrastive softmax: {reason}")
    blocks = [block.detach().contiguous() for block in keys if len(block)]
    if not blocks:
        raise ShapeError("native contrastive softmax: there are no keys")
    rows = query.detach()
    if teacher_query is not None:
        same = teacher_query.dtype == rows.dtype
        dtype = rows.dtype if same else torch.float32
        rows = torch.cat([rows.to(dtype), teacher_query.detach().to(dtype)])
    rows = rows.contiguous()
    scale = temperature.detach().reshape(()).float()
    run = torch.ops.blipfast_native.softmax_mean
    own = _may_use_more() and (own_float32 or rows.dtype == torch.bfloat16)
    parts = [run(rows, block, scale, amx(), own) for block in blocks]
    if len(parts) == 1:
        lse, mean = parts[0]
        return lse, mean
    lses = torch.stack([lse for lse, _ in parts])
    total = lses.logsumexp(0)
    mean = torch.zeros_like(parts[0][1])
    for lse, block_mean in parts:
        mean.addcmul_((lse - total).exp_().unsqueeze(1), block_mean)
    return total, mean

"""Corrects what Triton's interpreter gets wrong: bfloat16, and a cast under a newer NumPy.

As it ships, the interpreter takes the bits of a bfloat16 for an integer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(data: np.ndarray) -> Any:
    """Float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(data), 0x7FC0, rounded)
    return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


def _corrected(name: str) -> Callable[..., Any]:
    original = getattr(InterpreterBuilder, name)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if not _is_bf16(lhs):
            return original(self, lhs, rhs, op)
        data = op(_widen(lhs).data, _widen(rhs).data)
        return TensorHandle(data, tl.int1) if data.dtype == bool else _narrow(data)

    def cast_impl(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
        if dst_type.scalar == tl.bfloat16 and not _is_bf16(src):
            return _narrow(src.data.astype(np.float32))
        if _is_bf16(src) and dst_type.scalar == tl.float32:
            return _widen(src)
        return original(self, _widen(src), dst_type, *rounding)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return original(self, _widen(a), _widen(b), d, *options)

    return {
        "binary_op": binary_op,
        "cast_impl": cast_impl,
        "create_fp_to_fp": cast_impl,
        "create_dot": create_dot,
    }[name]


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, *scope: Any) -> None:
    _patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


def correct() -> None:
    """For the rest of this process."""
    for name in ("binary_op", "cast_impl", "create_fp_to_fp", "create_dot"):
        setattr(InterpreterBuilder, name, _corrected(name))
    # Triton 3.6 turns arrays of one element into integers in a way that NumPy 2.4 does not take.
    interpreter._patch_lang_tensor = _patch_with_index

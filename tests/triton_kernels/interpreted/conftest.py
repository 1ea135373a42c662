"""For the checks that run under TRITON_INTERPRET=1, each file in a process of its own.

`../test_interpreted.py` starts them; by hand, here: `TRITON_INTERPRET=1 pytest
check_cross_attention.py`. Fresh memory is NaN throughout, so that what a kernel forgets to write
is seen.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 for these checks"

import triton.language as tl  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

torch.set_num_threads(1)


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


# As it ships, the interpreter takes the bits of a bfloat16 for an integer.
for _name in ("binary_op", "cast_impl", "create_fp_to_fp", "create_dot"):
    setattr(InterpreterBuilder, _name, _corrected(_name))


_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, *scope: Any) -> None:
    _patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


# Triton 3.6 turns arrays of one element into integers in a way that NumPy 2.4 no longer takes.
interpreter._patch_lang_tensor = _patch_with_index


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    with np.errstate(divide="ignore", invalid="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_no_worse() -> Callable[..., None]:
    """Our error is at most twice that of plain PyTorch in the same dtype, plus rounding.

    terms: of a sum that a library forms in an order of its own; its rounding grows with their root.
    """

    def check(ours: Tensor, plain: Tensor, exact: Tensor, name: str, terms: int = 1) -> None:
        assert ours.shape == exact.shape, name
        assert ours.dtype == plain.dtype, name
        if not exact.numel():
            return
        eps = torch.finfo(ours.dtype).eps
        # Products of inputs of size 1 are rounded even where they cancel and the result is 0.
        size = exact.abs().max().clamp(min=4 if eps < 1e-6 else 1)
        rounding = 2 * max(1.0, math.sqrt(terms) / 8) * eps * size
        bound = 2 * (plain.double() - exact).abs().max() + rounding
        error = (ours.double() - exact).abs().max()
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"

    return check

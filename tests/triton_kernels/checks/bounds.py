"""Holds every address that a kernel reads or writes in the interpreter against its arguments.

On a card an address out of bounds is an error at best; on a CPU it is somebody else's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

_starts, _stops = np.empty(0, np.uint64), np.empty(0, np.uint64)


class OutOfBoundsError(Exception):
    """A kernel read or wrote outside all tensors that it was given."""


def enforce() -> None:
    """For the rest of this process."""
    call, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _starts, _stops
        _starts, _stops = _extents([*args, *kwargs.values()])
        call(self, *args, **kwargs)

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _check("read", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check("written", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    GridExecutor.__call__ = checked_call
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store


def _extents(args: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """First byte and the one after the last of each tensor, overlapping ones taken together."""
    merged: list[list[int]] = []
    for start, stop in sorted(_extent(x) for x in args if isinstance(x, Tensor) and x.numel()):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    found = np.array(merged, np.uint64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _extent(x: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _check(what: str, ptrs: Any, mask: Any) -> None:
    size = np.uint64(max(1, ptrs.get_element_ty().primitive_bitwidth // 8))
    addresses = np.asarray(ptrs.data)[np.asarray(mask.data, bool)].astype(np.uint64)
    if not addresses.size:
        return
    tensor = np.searchsorted(_starts, addresses, side="right") - 1
    within = (tensor >= 0) & (addresses + size <= _stops[tensor]) if len(_starts) else tensor >= 0
    if not within.all():
        wrong = addresses[~within]
        raise OutOfBoundsError(
            f"{len(wrong)} of {addresses.size} elements are {what} outside the kernel's tensors, "
            f"the first {_distance(int(wrong[0]))}"
        )


def _distance(address: int) -> str:
    if not len(_starts):
        return "of a kernel without tensors"
    beyond = [address - int(stop) for stop in _stops if address >= int(stop)]
    before = [int(start) - address for start in _starts if address < int(start)]
    nearest = min(
        [(n, "beyond the end") for n in beyond] + [(n, "before the start") for n in before]
    )
    return f"{nearest[0]} bytes {nearest[1]} of one"

"""Watches every address that a kernel reads or writes in the interpreter.

It must lie in a tensor that the kernel was given: on a card it would be an error at best, and on a
CPU it is somebody else's memory. And what one program writes no other may read or write: programs
run one after the other here, and on a card in any order. Atomic operations, whose sums depend on
that order, are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

NOBODY, SEVERAL = -1, -2


class OutOfBoundsError(Exception):
    """A kernel read or wrote outside all tensors that it was given."""


class RaceError(Exception):
    """The result of a kernel depends on the order of its programs."""


class Launch:
    """Who has read and written each byte of the tensors of one launch, by its number."""

    def __init__(self, args: Sequence[Any]) -> None:
        merged: list[list[int]] = []  # overlapping tensors taken together
        for start, stop in sorted(_extent(x) for x in args if isinstance(x, Tensor) and x.numel()):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], stop)
            else:
                merged.append([start, stop])
        extents = np.array(merged, np.int64).reshape(-1, 2)
        self.starts, self.stops = extents[:, 0], extents[:, 1]
        lengths = self.stops - self.starts
        self.firsts = np.cumsum(lengths) - lengths
        self.reader = np.full(int(lengths.sum()), NOBODY, np.int32)
        self.writer = self.reader.copy()
        self.program = 0

    def read(self, ptrs: Any, mask: Any) -> None:
        places = self._places("read", ptrs, mask)
        self._refuse("read", self.writer[places], "written")
        before = self.reader[places]
        alone = (before == NOBODY) | (before == self.program)
        self.reader[places] = np.where(alone, self.program, SEVERAL)

    def write(self, ptrs: Any, mask: Any) -> None:
        places = self._places("written", ptrs, mask)
        self._refuse("written", self.writer[places], "written")
        self._refuse("written", self.reader[places], "read")
        self.writer[places] = self.program

    def _refuse(self, what: str, by: np.ndarray, how: str) -> None:
        other = by[(by != NOBODY) & (by != self.program)]
        if other.size:
            who = "several" if other[0] == SEVERAL else f"program {other[0]}"
            raise RaceError(
                f"{other.size} elements are {what} by program {self.program} and {how} by {who}"
            )

    def _places(self, what: str, ptrs: Any, mask: Any) -> np.ndarray:
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        addresses = np.asarray(ptrs.data)[np.asarray(mask.data, bool)].astype(np.int64)
        tensor = np.searchsorted(self.starts, addresses, side="right") - 1
        if len(self.starts):
            within = (tensor >= 0) & (addresses + size <= self.stops[tensor])
        else:
            within = np.zeros(addresses.shape, bool)
        if not within.all():
            wrong = addresses[~within]
            raise OutOfBoundsError(
                f"{len(wrong)} of {addresses.size} elements are {what} outside the kernel's "
                f"tensors, the first {self._distance(int(wrong[0]))}"
            )
        return addresses - self.starts[tensor] + self.firsts[tensor]

    def _distance(self, address: int) -> str:
        found = [(address - int(stop), "beyond the end") for stop in self.stops if stop <= address]
        found += [(int(start) - address, "before the start") for start in self.starts]
        nearest = min((pair for pair in found if pair[0] >= 0), default=(0, "without one"))
        return f"{nearest[0]} bytes {nearest[1]}"


def _extent(x: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


_launch = Launch([])


def watch() -> None:
    """For the rest of this process."""
    call, place = GridExecutor.__call__, InterpreterBuilder.set_grid_idx
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _launch
        _launch = Launch([*args, *kwargs.values()])
        call(self, *args, **kwargs)

    def watched_place(self: Any, *index: int) -> None:
        _launch.program = int(np.ravel_multi_index(index, self.grid_dim))
        place(self, *index)

    def watched_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _launch.read(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _launch.write(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def refused(self: Any, *args: Any) -> Any:
        raise RaceError("an atomic operation: its result depends on the order of the programs")

    GridExecutor.__call__ = watched_call
    InterpreterBuilder.create_atomic_rmw = InterpreterBuilder.create_atomic_cas = refused
    InterpreterBuilder.set_grid_idx = watched_place
    InterpreterBuilder.create_masked_load = watched_load
    InterpreterBuilder.create_masked_store = watched_store

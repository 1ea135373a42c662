"""Ranks share an evaluation: each takes every so-manieth batch, and results come back by number.

So nothing is counted twice, whatever the number of ranks. The batches do not depend on it either:
rounding differs with what a batch holds, and would decide between equal texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from blipfast.errors import DataError
from blipfast.objectives.distributed import world_size

T = TypeVar("T")


def rank() -> int:
    """Number of this process among those that share; 0 if it is alone."""
    return dist.get_rank() if world_size() > 1 else 0


def share(count: int) -> list[int]:
    """Which of `count` items are this rank's."""
    return list(range(rank(), count, world_size()))


def blocks(items: Sequence[int], size: int) -> list[list[int]]:
    """The items in batches of `size`."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def own_blocks(count: int, size: int) -> list[list[int]]:
    """Which batches of `count` items are this rank's."""
    return blocks(range(count), size)[rank() :: world_size()]


def gather(own: Any) -> list[Any]:
    """`own` of every rank, in rank order; every rank must call."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return found


def gather_by_number(own: Mapping[int, T], count: int) -> list[T]:
    """The results of items 0 to `count - 1`, each from the rank that had it.

    Raises DataError when one is missing or came twice.
    """
    found: dict[int, T] = {}
    for part in gather(dict(own)):
        twice = found.keys() & part.keys()
        if twice:
            raise DataError(f"item {min(twice)} was evaluated by two ranks")
        found |= part
    if found.keys() != set(range(count)):
        missing = sorted(set(range(count)) - found.keys())[:3]
        raise DataError(f"{len(found)} of {count} items were evaluated; missing: {missing}")
    return [found[i] for i in range(count)]

"""The ranks of a run: those that torchrun started, or this process alone."""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blipfast.errors import ConfigError, TrainingError
from blipfast.objectives.distributed import world_size

__all__ = [
    "gather_objects", "leave_group", "local_rank", "mean_of_ranks", "process_group", "rank",
    "world_size",
]  # fmt: skip


_RELEASE_SECONDS = 0.2


def rank() -> int:
    """Number of this process among all; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank() -> int:
    """Number of this process on its machine, as torchrun gives it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ


def restarted() -> bool:
    """torchrun has started these processes again after one of them ended early."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def process_group(
    device: torch.device, timeout: float, *, alone_too: bool = False
) -> Iterator[None]:
    """Joins the other ranks for the time of the block, if torchrun started this process.

    timeout: seconds after which a collective that another rank does not join fails.
    alone_too: form a group of one as well, which FSDP needs.

    A group that the caller has formed is used as it is. Raises ConfigError when torchrun started
    more processes here than there are cards.
    """
    if dist.is_initialized() or not (started_by_torchrun() or alone_too):
        yield
        return
    if device.type == "cuda":
        if local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank()} of this machine has no card: there are "
                f"{torch.cuda.device_count()}; start as many by --nproc-per-node"
            )
        torch.cuda.set_device(device)
    # Checkpoints are written in the background, by collectives of the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    if started_by_torchrun():
        store, number, size = next(dist.rendezvous("env://", timeout=limit))
        store = _fresh(store, number, size, timeout)
    else:
        store, number, size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=limit)
    try:
        yield
    finally:
        leave_group()


def leave_group(group: dist.ProcessGroup | None = None) -> None:
    """Ends a group, that of all by default, and gives gloo's threads time for what they still hold.

    One that has done its work drops tensors that Python knows, for which it needs the interpreter's
    lock (torch 2.11 to 2.13). Whoever destroys the group has that lock and waits for the threads to
    end, for ever if one asks for it. FSDP and DDP keep the group, and so its threads, alive longer,
    FSDP until the interpreter ends; a thread that asks for the lock then is ended within a C++
    destructor, which aborts the process (`terminate called without an active exception`).
    """
    time.sleep(_RELEASE_SECONDS)  # without the lock
    dist.destroy_process_group(group)
    gc.collect()
    time.sleep(_RELEASE_SECONDS)


def _fresh(store: dist.Store, number: int, size: int, timeout: float) -> dist.Store:
    """A part of `store` that only the ranks of this start know.

    torchrun may hand the same store to processes that it starts again, with the addresses of the
    dead ones still in it. So rank 0 gives this start a name, and tells it to each rank under that
    rank's own random token, which no earlier start can have used.
    """
    end = time.monotonic() + timeout
    own = uuid.uuid4().hex
    if number > 0:
        store.set(f"blipfast/hello/{number}", own)
        store.wait([f"blipfast/name/{own}"], timedelta(seconds=timeout))
        name = store.get(f"blipfast/name/{own}").decode()
        store.set(f"blipfast/joined/{name}/{number}", "")
        return dist.PrefixStore(f"blipfast/{name}", store)
    answered: dict[int, bytes] = {}
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"blipfast/joined/{own}/{other}"]):
                missing.discard(other)
            elif store.check([f"blipfast/hello/{other}"]):
                token = store.get(f"blipfast/hello/{other}")
                if answered.get(other) != token:  # of this start, or of an earlier one
                    answered[other] = token
                    store.set(f"blipfast/name/{token.decode()}", own)
        if missing and time.monotonic() > end:
            raise TrainingError(
                f"ranks {sorted(missing)} have not joined within {timeout:g} s; look at their logs"
            )
        time.sleep(0.02)
    return dist.PrefixStore(f"blipfast/{own}", store)


def mean_of_ranks(values: Tensor) -> Tensor:
    """`values (N,)` averaged over all ranks; the same on all."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order; plain data only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values

"""Which tiles a kernel runs with: a few candidates each, and what was measured to be best.

A launcher names its kernel, the sizes that matter (a key) and its candidates, best on paper first:
the largest tiles that spill no registers and fit the shared memory of every card. `blipfast tune`
measures them on the card at hand and writes the choices into a table on disk, one for each card,
Triton and state of the kernels' source. Where there is no table, the first candidate is taken.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER_VAR = "BLIPFAST_TILES"  # where tables lie; "0": take the first candidates

Tiles = Mapping[str, int]  # BLOCK_…, num_warps, num_stages
Request = tuple[str, str]  # kernel, key
Observer = Callable[[Request, Sequence[Tiles]], None]

_observer: Observer | None = None
_forced: dict[Request, Tiles] = {}
_place: int | None = None  # see `nth_candidate`


def choose(
    kernel: str, key: str, candidates: Sequence[dict[str, int]], tensor: Tensor
) -> dict[str, int]:
    """The candidate that `tensor`'s card shall run."""
    request = (kernel, key)
    if _observer is not None:
        _observer(request, candidates)
    if request in _forced:
        return dict(_forced[request])
    if _place is not None:
        return dict(candidates[min(_place, len(candidates) - 1)])
    tuned = table(tensor.device).get(kernel, {}).get(key)
    return dict(tuned if tuned in candidates else candidates[0])


@contextmanager
def observed() -> Iterator[dict[Request, list[Tiles]]]:
    """Collects what the launches of a block ask for."""
    global _observer
    found: dict[Request, list[Tiles]] = {}

    def note(request: Request, candidates: Sequence[Tiles]) -> None:
        found.setdefault(request, list(candidates))

    _observer = note
    try:
        yield found
    finally:
        _observer = None


@contextmanager
def forced(request: Request, tiles: Tiles) -> Iterator[None]:
    """One request is answered with these tiles."""
    _forced[request] = tiles
    try:
        yield
    finally:
        del _forced[request]


@contextmanager
def nth_candidate(place: int) -> Iterator[None]:
    """Each request is answered with its candidate at `place`, or its last: to go through all."""
    global _place
    _place = place
    try:
        yield
    finally:
        _place = None


@functools.cache
def path(device: torch.device) -> Path | None:
    """Where the table of a device lies, whether it is there or not; None: tables are not wanted."""
    folder = os.environ.get(FOLDER_VAR, "")
    if folder == "0":
        return None
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(cache, "blipfast", "tiles"))
    card = "interpreter"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
    name = "".join(c if c.isalnum() else "-" for c in card.lower())
    return Path(folder, f"{name}-triton-{_triton_version()}-{_source()}.json")


@functools.cache
def table(device: torch.device) -> dict[str, dict[str, dict[str, int]]]:
    """Tuned tiles by kernel and key; empty where there are none, with a warning if unreadable."""
    where = None if device.type == "meta" else path(device)
    if where is None or not where.is_file():
        return {}
    try:
        read = json.loads(where.read_text())["tiles"]
        return {kernel: dict(chosen) for kernel, chosen in read.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        warnings.warn(
            f"{where} cannot be read ({error}), so that kernels run with their first tiles; "
            "remove it, or write it anew by `blipfast tune`",
            stacklevel=2,
        )
        return {}


def write(device: torch.device, about: Mapping[str, Any], tiles: Mapping[Request, Tiles]) -> Path:
    """Adds choices to a device's table. Raises ValueError where BLIPFAST_TILES=0."""
    where = path(device)
    if where is None:
        raise ValueError(f"{FOLDER_VAR}=0: there is no place for a table")
    merged = {kernel: dict(chosen) for kernel, chosen in table(device).items()}
    for (kernel, key), chosen in tiles.items():
        merged.setdefault(kernel, {})[key] = dict(chosen)
    where.parent.mkdir(parents=True, exist_ok=True)
    partial = where.with_name(f"{where.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps({**about, "tiles": merged}, indent=1) + "\n")
    partial.replace(where)
    table.cache_clear()
    return where


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


@functools.cache
def _source() -> str:
    """Of the kernels: a table made for other code is not read."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]

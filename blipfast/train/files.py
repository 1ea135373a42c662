"""Files that are written whole or not at all, and what can go wrong while writing, in words."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from blipfast.errors import CheckpointError, TrainingError

LAST = "last.pt"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class _Watched:
    """A file that remembers why a write failed: torch's writer keeps it to itself."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Calls `write(file)` on a temporary file, which takes the name `path` once it is on the disk.

    Raises TrainingError when that fails (a full disk); what `path` held before is then unharmed.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    watched: _Watched | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            watched = _Watched(file)
            write(watched)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if watched is None or watched.error is None else watched.error
        if not isinstance(cause, OSError):
            raise
        full = cause.errno in _FULL
        reason = "the disk is full" if full else (cause.strerror or str(cause))
        kept = "; the file that was there before is unharmed" if path.exists() else ""
        advice = "; free some space or choose another folder" if full else ""
        raise TrainingError(f"cannot write {path}: {reason}{kept}{advice}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a training state that `load_state` reads. Raises TrainingError as `write_whole`."""
    write_whole(path, lambda file: torch.save(state, file))


def load_state(path: Path) -> dict[str, Any]:
    """Reads a training state onto the CPU, without unpickling code.

    Raises CheckpointError when the file is missing, damaged or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except Exception as error:  # unpicklers raise many kinds on damaged data
        raise CheckpointError(f"{path} is damaged or no training checkpoint: {error}") from error
    missing = {"model", "optimizer", "step", "rng", "history", "config"} - set(
        state if isinstance(state, dict) else ()
    )
    if missing:
        raise CheckpointError(f"{path} is no training checkpoint: it lacks {sorted(missing)}")
    return state

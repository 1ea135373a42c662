"""Files that are written whole or not at all, and what can go wrong while writing, in words."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from blipfast.errors import TrainingError

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
        kept = "; the file that was there before is unharmed" if path.exists() else ""
        raise TrainingError(describe_write_error(path, cause, kept)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def describe_write_error(path: Path, error: OSError, kept: str = "") -> str:
    """What went wrong, in words; kept: what is unharmed."""
    full = error.errno in _FULL
    reason = "the disk is full" if full else (error.strerror or str(error))
    advice = "; free some space or choose another folder" if full else ""
    return f"cannot write {path}: {reason}{kept}{advice}"

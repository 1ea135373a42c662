"""Files that are written whole or not at all, and what can go wrong while writing, in words."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
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


def quarantine_log(path: Path) -> Callable[[Any], None]:
    """A function that adds a bad record to a JSON Lines file, unless it is there already.

    The file is as good as the moment: a run that is killed has named what it had set aside. Ranks
    may share it, since a short line is added as a whole. Raises TrainingError on a full disk.
    """
    known: set[tuple[str, str]] = set()
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that broke off
                row = json.loads(line)
                known.add((row["shard"], row["key"]))

    def add(bad: Any) -> None:
        if (bad.shard, bad.key) in known:
            return
        known.add((bad.shard, bad.key))
        line = json.dumps(dataclasses.asdict(bad), ensure_ascii=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.write(f"{line}\n".encode())
        except OSError as error:
            raise TrainingError(describe_write_error(path, error)) from error

    return add


def describe_write_error(path: Path, error: OSError, kept: str = "") -> str:
    """What went wrong, in words; kept: what is unharmed."""
    full = error.errno in _FULL
    reason = "the disk is full" if full else (error.strerror or str(error))
    advice = "; free some space or choose another folder" if full else ""
    return f"cannot write {path}: {reason}{kept}{advice}"

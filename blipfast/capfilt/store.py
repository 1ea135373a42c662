"""Captions and scores on their way: a file for each unit of images, whole or not there.

A unit is a run of records of one shard. It is what a worker does at a time and what is saved at a
time; which worker did it, and when, leaves no trace. So any number of processes may work on a run,
be killed, and go on: a unit whose file is there is done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipfast.capfilt.decisions import Candidate, write_lines
from blipfast.data.index import ShardIndex
from blipfast.errors import ConfigError, DataError


@dataclass(frozen=True)
class Unit:
    """Records `start` to `stop` of a shard's index; stem names what comes of the shard."""

    stem: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.stem}/{self.start:08d}.jsonl"


def units_of(indices: Iterable[ShardIndex], size: int) -> list[Unit]:
    """All records of all shards, `size` at a time."""
    return [
        Unit(index.shard.stem, start, min(start + size, len(index)))
        for index in indices
        for start in range(0, len(index), size)
    ]


@dataclass(frozen=True)
class JudgedText(Candidate):
    """A candidate and what each filter thinks of it.

    itm, itc: a number of each filter, as `Score` has them; None where it was not judged.
    """

    itm: tuple[float, ...] | None = None
    itc: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ImageRow:
    """One image: its texts, or why it could not be read."""

    key: str
    texts: tuple[JudgedText, ...] = ()
    error: str | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> ImageRow:
        row = json.loads(line)
        texts = tuple(
            JudgedText(
                one["text"], one["source"], one["captioner"],
                None if one["itm"] is None else tuple(one["itm"]),
                None if one["itc"] is None else tuple(one["itc"]),
            )
            for one in row["texts"]
        )  # fmt: skip
        return cls(row["key"], texts, row["error"])


@dataclass(frozen=True)
class Mark:
    """Of which run a folder is: a fingerprint, and hashes of the models that took part."""

    fingerprint: str
    captioners: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()


class UnitStore:
    """The files of one stage, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._about = folder / "about.json"

    def read_mark(self) -> Mark | None:
        """Of which run the folder is, None when it is of none yet."""
        return read_mark(self._about)

    def claim(self, mark: Mark, settings: dict[str, Any]) -> None:
        """Makes the folder, or makes sure that it is of this run. Raises ConfigError."""
        claim(self._about, mark, settings)

    def done(self, unit: Unit) -> bool:
        return (self.folder / unit.name).exists()

    def write(self, unit: Unit, rows: Iterable[ImageRow]) -> None:
        path = self.folder / unit.name
        _make_folder(path.parent)
        write_lines(path, (row.to_json() for row in rows))

    def read(self, unit: Unit) -> list[ImageRow]:
        """Raises DataError, naming the file, when it is missing or of another shape."""
        path = self.folder / unit.name
        try:
            with open(path, encoding="utf-8") as file:
                rows = [ImageRow.from_json(line) for line in file]
        except FileNotFoundError as error:
            raise DataError(
                f"{path} is missing: the stage before this one is not done yet"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); delete it to make it anew"
            ) from error
        if len(rows) != unit.stop - unit.start:
            raise DataError(f"{path} has {len(rows)} rows, expected {unit.stop - unit.start}")
        return rows


def read_mark(path: Path) -> Mark | None:
    """The mark in a folder's settings file; None when there is no such file."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        names = [tuple(map(str, about[name])) for name in ("captioners", "filters")]
        return Mark(str(about["fingerprint"]), *names)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot use the folder {path.parent}: {path.name}: {error}") from error


def claim(path: Path, mark: Mark, settings: dict[str, Any]) -> None:
    """Writes a folder's settings file, or makes sure that the one there has the same mark."""
    found = read_mark(path)
    if found is not None and found != mark:
        raise ConfigError(
            f"{path.parent} holds the output of a run with other settings or models; choose "
            "another output folder, or delete this one"
        )
    if found is None:
        _make_folder(path.parent)
        body = {**dataclasses.asdict(mark), "config": settings}
        write_lines(path, [json.dumps(body, indent=1)])


def remove_left_overs(folder: Path) -> None:
    """Deletes the temporary files of processes that were killed while they wrote."""
    for left_over in folder.rglob(".*.tmp-*"):
        left_over.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot use the folder {folder}: {error.strerror or error}") from error

"""What a data set's own files give: items to be written, and errors that say what is missing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipfast.data.records import TextEntry
from blipfast.errors import DataError


@dataclass(frozen=True)
class Item:
    """One record before its image is read.

    image: a path, or the encoded bytes themselves. group: items of the same group lie in one shard.
    """

    key: str
    image: Path | bytes
    texts: tuple[TextEntry, ...]
    ids: Mapping[str, int | str] = field(default_factory=dict)
    group: int | str | None = None


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    records: published number of records, texts: of texts; None where the publisher gives none or
    it differs by download.
    """

    records: int | None = None
    texts: int | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set that can be prepared.

    files: what is expected in the source folder and who publishes it, for people. read: from the
    source folder and a split's name, its items, and the annotation files that were read.
    """

    name: str
    files: str
    splits: Mapping[str, Split]
    read: Callable[[Source, str], Iterator[Item]]
    video: bool = False


class Source:
    """A source folder; it remembers which annotation files were read."""

    def __init__(self, folder: Path, expected: str) -> None:
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}. Expected in it:\n{expected}")
        self.folder, self.expected = folder, expected
        self.read: dict[str, str] = {}

    def find(self, *names: str) -> Path:
        """The first of the names that is there. Raises DataError saying what is expected."""
        for name in names:
            if (path := self.folder / name).exists():
                return path
        raise DataError(f"{self.folder} has no {' or '.join(names)}. Expected:\n{self.expected}")

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def text(self, path: Path) -> str:
        """A file's text. Raises DataError when it cannot be read."""
        try:
            content = path.read_bytes()
            self.read[str(path.relative_to(self.folder))] = hashlib.sha256(content).hexdigest()
            return content.decode("utf-8")
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 (byte {error.start})") from error

    def json(self, path: Path) -> Any:
        """A JSON file's content. Raises DataError when it is damaged."""
        try:
            return json.loads(self.text(path))
        except ValueError as error:
            raise DataError(f"{path} is no JSON ({error}); download it again") from error

    def lines(self, path: Path) -> Iterator[dict[str, Any]]:
        """The objects of a JSON Lines file."""
        for number, line in enumerate(self.text(path).splitlines(), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: no JSON ({error})") from error


def rows_of(path: Path, rows: Any, *fields: str) -> list[dict[str, Any]]:
    """The rows of an annotation file, each with the fields that are needed.

    Raises DataError naming the row and the field: the format has changed, or it is another file.
    """
    if not isinstance(rows, list):
        raise DataError(f"{path}: a list was expected, not {type(rows).__name__}")
    for number, row in enumerate(rows):
        missing = [f for f in fields if not isinstance(row, dict) or f not in row]
        if missing:
            raise DataError(
                f"{path}: entry {number} has no {', '.join(missing)}; is it another file, or has "
                "its format changed?"
            )
    return rows


def part_of(path: Path, content: Any, name: str) -> Any:
    """A part of a JSON object by its name. Raises DataError when it is not there."""
    if not isinstance(content, dict) or name not in content:
        raise DataError(f"{path} has no {name!r}; is it another file, or has its format changed?")
    return content[name]


def texts(source: str, *sentences: str) -> tuple[TextEntry, ...]:
    return tuple(TextEntry(sentence, source) for sentence in sentences)


def key_of(name: str) -> str:
    """A record's key from a file's name: its stem, other characters than letters replaced."""
    stem = name.rpartition(".")[0] or name
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-/") else "_" for c in stem)


def by_image(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Sentences of each image, in order of first appearance."""
    found: dict[str, list[str]] = {}
    for image, sentence in rows:
        found.setdefault(image, []).append(sentence)
    return found

"""Items of a data set to shards: images checked, broken ones set aside, counts held to."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from blipfast.data.images import load_image
from blipfast.data.prepare.source import DataSet, Item, Source, Split
from blipfast.data.records import Record, image_extension
from blipfast.data.shards import ShardWriter
from blipfast.errors import DataError

_EARLY_STOP_AFTER = 200
_UNDER_WAY = 256


@dataclass(frozen=True)
class Prepared:
    """What was written of a split; kept as `<split>.json` beside the shards.

    records, texts: written. bad: set aside, listed in `<split>.quarantine.jsonl`. files: SHA-256 of
    the annotation files that were read.
    """

    data_set: str
    split: str
    records: int
    texts: int
    bad: int
    shards: list[str]
    files: dict[str, str]


def prepare_split(
    data_set: DataSet,
    split: str,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    verify: bool = True,
    any_count: bool = False,
    threads: int = 4,
    max_count: int = 1000,
    max_bad_fraction: float = 0.01,
    on_record: Callable[[], None] = lambda: None,
) -> Prepared:
    """Writes a split as `output/<split>-000000.tar`, …; of videos `<split>.videos.jsonl`, a list.

    All of it appears at the end or not at all.

    Args:
        source: the folder with the data set's own files (`data_set.files` says which).
        output: made if it is not there; several splits may share it.
        verify: decode every image fully and set broken ones aside; otherwise look at headers only.
        any_count: accept another number of records than published, as of a partial download.
        threads: that read and decode images.
        max_count: records to a shard.
        max_bad_fraction: share of broken records beyond which the run ends.
        on_record: called for each record, for a progress bar.

    Raises:
        DataError: files are missing or have another format, counts deviate, too much is broken, or
            the disk is full.
    """
    if split not in data_set.splits:
        raise DataError(f"{data_set.name} has no split {split!r}: {', '.join(data_set.splits)}")
    origin, target = Source(Path(source), data_set.files), Path(output)
    if any((target / name).exists() for name in (f"{split}.json", f"{split}-000000.tar")):
        raise DataError(f"{target} has the split {split} already; choose another folder")
    run = _Run(data_set, split, max_bad_fraction)
    with _building(target, split) as folder:
        items = run.counted(data_set.read(origin, split), on_record)
        if data_set.video:
            run.write_manifest(items, folder, target)
        else:
            run.write_shards(items, folder, verify, threads, max_count)
        run.check_counts(data_set.splits[split], any_count)
        result = run.result(origin, folder)
        text = json.dumps(dataclasses.asdict(result), indent=1, ensure_ascii=False)
        (folder / f"{split}.json").write_text(text + "\n", encoding="utf-8")
    return result


class _Run:
    """What is counted while a split is written."""

    def __init__(self, data_set: DataSet, split: str, max_bad_fraction: float) -> None:
        self.data_set, self.split, self.limit = data_set, split, max_bad_fraction
        self.found = self.texts = self.records = 0
        self.bad: list[dict[str, str]] = []

    def counted(self, items: Iterable[Item], on_record: Callable[[], None]) -> Iterator[Item]:
        keys: set[int] = set()
        for item in items:
            self.found += 1
            self.texts += sum(bool(entry.text) for entry in item.texts)
            if isinstance(item.image, Path):  # images from tars are told apart by their tars
                if hash(item.key) in keys:
                    raise DataError(f"{self.data_set.name} has the record {item.key} twice")
                keys.add(hash(item.key))
            on_record()
            yield item

    def write_shards(
        self, items: Iterator[Item], folder: Path, verify: bool, threads: int, max_count: int
    ) -> None:
        def make(group: list[Item]) -> list[Record] | list[dict[str, str]]:
            made: list[Record] = []
            for item in group:
                try:
                    made.append(_record(item, verify))
                except DataError as error:  # a pair of images is of no use without one of them
                    where = "" if isinstance(item.image, bytes) else str(item.image)
                    row = {"file": where, "reason": str(error)}
                    return [{"key": other.key, **row} for other in group]
            return made

        groups = _grouped(items)
        waiting: deque[Any] = deque()
        with ThreadPoolExecutor(threads) as pool, ShardWriter(folder, self.split, max_count) as out:
            try:
                for group in groups:
                    waiting.append(pool.submit(make, group))
                    if len(waiting) > _UNDER_WAY:
                        self._take(waiting.popleft().result(), out)
                while waiting:
                    self._take(waiting.popleft().result(), out)
            finally:
                pool.shutdown(cancel_futures=True)
        self._check_bad(at_end=True)

    def _take(self, made: list[Any], out: ShardWriter) -> None:
        if made and isinstance(made[0], dict):
            self.bad += made
            self._check_bad(at_end=False)
        else:
            out.write(*made)
            self.records += len(made)

    def write_manifest(self, items: Iterator[Item], folder: Path, target: Path) -> None:
        with open(folder / f"{self.split}.videos.jsonl", "w", encoding="utf-8") as file:
            for item in items:
                assert isinstance(item.image, Path)
                if not item.image.is_file() or not item.image.stat().st_size:
                    reason = "there is no such clip" if not item.image.exists() else "it is empty"
                    self.bad.append({"key": item.key, "file": str(item.image), "reason": reason})
                    self._check_bad(at_end=False)
                    continue
                row = {
                    "key": item.key,
                    "video": os.path.relpath(item.image, target),
                    "texts": [dataclasses.asdict(entry) for entry in item.texts],
                    "ids": dict(item.ids),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.records += 1
        self._check_bad(at_end=True)

    def _check_bad(self, at_end: bool) -> None:
        bad, seen = len(self.bad), len(self.bad) + self.records
        if bad <= self.limit * seen or not (at_end or seen >= _EARLY_STOP_AFTER):
            return
        shown = "; ".join(f"{row['key']}: {row['reason']}" for row in self.bad[:3])
        raise DataError(
            f"{bad} of {seen} records of {self.data_set.name} {self.split} cannot be used, more "
            f"than max_bad_fraction={self.limit} allows. First ones: {shown}"
        )

    def check_counts(self, published: Split, any_count: bool) -> None:
        """Raises DataError when there are others than published."""
        pairs = (
            ("records", published.records, self.found),
            ("texts", published.texts, self.texts),
        )
        for what, expected, found in pairs:
            if expected is not None and found != expected and not any_count:
                raise DataError(
                    f"{self.data_set.name} {self.split} has {found:,} {what}, published are "
                    f"{expected:,}: a file is incomplete or of another version. To go on all the "
                    "same, as with a partial download, give any_count"
                )
        if not self.records:
            raise DataError(f"{self.data_set.name} {self.split}: there is no usable record")

    def result(self, origin: Source, folder: Path) -> Prepared:
        if self.bad:
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.bad)
            (folder / f"{self.split}.quarantine.jsonl").write_text(rows, encoding="utf-8")
        return Prepared(
            data_set=self.data_set.name,
            split=self.split,
            records=self.records,
            texts=self.texts,
            bad=len(self.bad),
            shards=sorted(path.name for path in folder.glob("*.tar")),
            files=origin.read,
        )


def _grouped(items: Iterator[Item]) -> Iterator[list[Item]]:
    numbers = itertools.count()
    for _, group in itertools.groupby(
        items, lambda item: next(numbers) if item.group is None else item.group
    ):
        yield list(group)


def _record(item: Item, verify: bool) -> Record:
    """Reads and checks an item's image. Raises DataError saying what is wrong."""
    if isinstance(item.image, bytes):
        data = item.image
    else:
        try:
            data = item.image.read_bytes()
        except OSError as error:
            raise DataError(f"{item.image}: cannot be read ({error.strerror})") from error
    where = item.key if isinstance(item.image, bytes) else str(item.image)
    if verify:
        size = load_image(data, where).size
    else:
        try:
            size = Image.open(io.BytesIO(data)).size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{where}: not an image of a known format") from error
    image_extension(data)
    for entry in item.texts:
        try:
            entry.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: a text is not UTF-8 ({entry.text[:40]!r})") from error
    return Record(item.key, data, item.texts, *size, dict(item.ids))


@contextmanager
def _building(target: Path, split: str) -> Iterator[Path]:
    """A folder beside the target's files, which are moved there when all is done."""
    folder = target / f".{split}.tmp"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
        yield folder
        # The summary comes last: with it the split is whole.
        for path in sorted(folder.iterdir(), key=lambda p: p.name == f"{split}.json"):
            os.replace(path, target / path.name)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""WebDataset shards: tar files of image and JSON pairs, written whole or not at all.

What is particular here:
- A shard appears under its name only when complete and synced; until then it is a dot-file.
- The same records give the same bytes: no times, no owners in the tar headers.
- A bad record is set aside with its shard, key and reason, and counted; it stops the run only
  when the share of bad ones passes a limit.

The standard `tarfile` is used: the webdataset library's handlers drop a damaged record without
saying which, and its writer cannot take a half-written shard back. It reads what we write.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from blipfast.data.images import load_image
from blipfast.data.records import (
    Record,
    TextEntry,
    record_from_members,
    record_to_members,
)
from blipfast.errors import DataError

__all__ = ["BadRecord", "Record", "ShardReader", "ShardWriter", "TextEntry", "read_shards"]

_END_OF_TAR = 2 * tarfile.BLOCKSIZE
_EARLY_STOP_AFTER = 200


class ShardWriter:
    """Writes ``<prefix>-000000.tar``, ``-000001.tar``, … into a folder.

    Use it as a context manager: leaving normally finishes the last shard; leaving by an
    exception (Ctrl-C too) throws the unfinished one away and keeps the finished ones.

    Args:
        directory: made if it is not there.
        prefix: of the file names; several processes need one each.
        max_count: records to a shard.
        max_bytes: size of a shard in bytes; a single larger record gets a shard to itself.
        start_index: number of the first shard, to go on after an interrupted run.

    Raises:
        DataError: if the folder cannot be made, a shard of that name exists, or (in `write`
            and `close`) a record is unusable, a key occurs twice in a shard, or the disk is
            full.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        prefix: str = "shard",
        max_count: int = 1000,
        max_bytes: int = 256 << 20,
        start_index: int = 0,
    ) -> None:
        if max_count < 1 or max_bytes < 1 or start_index < 0:
            raise DataError("max_count and max_bytes must be at least 1, start_index at least 0")
        if not prefix or os.path.basename(prefix) != prefix or prefix.startswith("."):
            raise DataError(f"prefix {prefix!r} must be a plain file name")
        self.directory = Path(directory)
        self.prefix = prefix
        self.max_count = max_count
        self.max_bytes = max_bytes
        self.shards: list[Path] = []
        self.count = 0
        self._index = start_index
        self._tar: tarfile.TarFile | None = None
        self._file: io.BufferedWriter | None = None
        self._keys: set[str] = set()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the folder {self.directory}: {error.strerror}") from error
        for left_over in self.directory.glob(f".{glob.escape(prefix)}-*.tar.tmp"):
            left_over.unlink(missing_ok=True)  # from a run that was killed

    def _final(self) -> Path:
        return self.directory / f"{self.prefix}-{self._index:06d}.tar"

    def _temporary(self) -> Path:
        return self.directory / f".{self._final().name}.tmp"

    def write(self, *records: Record) -> None:
        """Add a record; starts a new shard when this one is full. Several lie in the same shard."""
        members = [member for record in records for member in record_to_members(record)]
        if self._tar is not None:
            size = _padded(self._tar.offset + sum(_member_size(c) for _, c in members))
            if len(self._keys) + len(records) > self.max_count or size > self.max_bytes:
                self._finish()
        keys = [record.key for record in records]
        for i, key in enumerate(keys):
            if key in self._keys or key in keys[:i]:
                raise DataError(f"record {key}: the key is already in shard {self._final()}")
        try:
            if self._tar is None:
                self._start()
            assert self._tar is not None
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                info.mode = 0o644
                self._tar.addfile(info, io.BytesIO(content))
        except OSError as error:
            raise self._failed(error) from error
        except BaseException:
            self.abort()  # half a record may be in it
            raise
        self._keys.update(keys)
        self.count += len(keys)

    def _start(self) -> None:
        if self._final().exists():
            raise DataError(
                f"{self._final()} exists; choose another folder or prefix, or start_index"
            )
        # Both stay open over many calls of write().
        self._file = open(self._temporary(), "wb")  # noqa: SIM115
        self._tar = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115

    def _finish(self) -> None:
        if self._tar is None or self._file is None:
            return
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary(), self._final())
        except OSError as error:
            raise self._failed(error) from error
        except BaseException:
            self.abort()
            raise
        self.shards.append(self._final())
        self._reset()
        self._index += 1

    def _reset(self) -> None:
        self._tar = self._file = None
        self._keys = set()

    def _failed(self, error: OSError) -> DataError:
        shard, lost = self._final(), len(self._keys)
        self.abort()
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror or error)
        return DataError(
            f"cannot write shard {shard}: {reason}. The {lost} records begun in it are "
            f"discarded, {len(self.shards)} whole shards are kept; free some space and go on "
            f"with start_index={self._index}"
        )

    def abort(self) -> None:
        """Throw the unfinished shard away; finished ones stay."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # its buffer does not fit the disk either
                self._file.close()
            self._temporary().unlink(missing_ok=True)
        self.count -= len(self._keys)
        self._reset()

    def close(self) -> list[Path]:
        """Finish the last shard. Returns the paths of all whole shards."""
        self._finish()
        return self.shards

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _padded(offset: int) -> int:
    return -(-(offset + _END_OF_TAR) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _member_size(content: bytes) -> int:
    block = tarfile.BLOCKSIZE
    return block + -(-len(content) // block) * block


@dataclass(frozen=True)
class BadRecord:
    """A record, or the rest of a shard (`key` is ""), that was set aside, and why."""

    shard: str
    key: str
    reason: str


class ShardReader:
    """Iterates over the records of shards; see `read_shards`.

    Attributes:
        shards: the files, in order.
        good: records given in the last iteration.
        quarantine: the bad ones met in it.
    """

    def __init__(self, shards: list[Path], max_bad_fraction: float, verify_images: bool) -> None:
        self.shards = shards
        self.max_bad_fraction = max_bad_fraction
        self.verify_images = verify_images
        self.good = 0
        self.quarantine: list[BadRecord] = []

    def __iter__(self) -> Iterator[Record]:
        self.good = 0
        self.quarantine = []
        for shard in self.shards:
            for key, members, reason in groups_of(shard):
                contents = {extension: member.content for extension, member in members.items()}
                record = self._accept(shard, key, contents, reason)
                if record is not None:
                    self.good += 1
                    yield record
        self._check(at_end=True)

    def _accept(
        self, shard: Path, key: str, members: dict[str, bytes], reason: str
    ) -> Record | None:
        try:
            if reason:
                raise DataError(reason)
            record = record_from_members(key, members)
            if self.verify_images:
                load_image(record.image, "image")
            return record
        except DataError as error:
            self.quarantine.append(BadRecord(str(shard), key, str(error)))
            self._check(at_end=False)
            return None

    def _check(self, at_end: bool) -> None:
        bad = len(self.quarantine)
        seen = self.good + bad
        if bad <= self.max_bad_fraction * seen or not (at_end or seen >= _EARLY_STOP_AFTER):
            return
        shown = "; ".join(f"{b.shard} {b.key or '(rest)'}: {b.reason}" for b in self.quarantine[:3])
        raise DataError(
            f"{bad} of {seen} records are bad, more than max_bad_fraction="
            f"{self.max_bad_fraction} allows. First ones: {shown}"
        )


def read_shards(
    pattern: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    max_bad_fraction: float = 0.01,
    verify_images: bool = True,
) -> ShardReader:
    """Read shards in the order of their names.

    Args:
        pattern: a folder (all its ``*.tar``), a file, a glob, or several of these.
        max_bad_fraction: share of bad records (a shard that breaks off counts as one) beyond
            which reading raises: from 200 records on as soon as it is passed, and at the end.
        verify_images: decode each image fully and set truncated ones aside. Leave it out where
            the reader decodes anyway.

    Returns:
        An iterable of `Record`, with the counts in its attributes; each ``iter`` starts anew.

    Raises:
        DataError: if nothing matches; while iterating, if too many records are bad.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise DataError(f"max_bad_fraction is {max_bad_fraction}; it is a share from 0 to 1")
    patterns = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    shards: list[Path] = []
    for one in patterns:
        path = Path(one)
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
        elif path.is_file():
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob.glob(os.fspath(one)))]
        found = [f for f in found if not f.name.startswith(".")]
        if not found:
            raise DataError(f"no shard matches {os.fspath(one)!r}; give a folder, file or glob")
        shards += found
    return ShardReader(shards, max_bad_fraction, verify_images)


@dataclass(frozen=True)
class Member:
    """One file in a shard: where its content lies, and the content if it was asked for."""

    offset: int
    size: int
    content: bytes


def groups_of(
    shard: Path, with_content: Callable[[str], bool] = lambda extension: True
) -> Iterator[tuple[str, dict[str, Member], str]]:
    """Members with the same key, in order: key, members by extension, reason if unusable.

    with_content: of which extensions the content is read.
    """
    key, members, reason = "", dict[str, Member](), ""
    try:
        with tarfile.open(shard, mode="r:") as tar:
            end = shard.stat().st_size
            if not shard_is_complete(shard):
                # Every record before the break is sound; say that some may be missing.
                yield "", {}, "the shard breaks off: no end-of-archive mark"
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                this = f"{folder}/{stem}" if folder else stem
                if this != key:
                    if key:
                        yield key, members, reason
                    key, members, reason = this, {}, ""
                extension = extension.lower()
                if extension in members:
                    reason = f"two members {extension!r}"
                if info.offset_data + info.size > end:
                    reason = f"the shard breaks off inside {info.name}"
                stream = tar.extractfile(info) if with_content(extension) else None
                content = stream.read() if stream is not None else b""
                members[extension] = Member(info.offset_data, info.size, content)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if key:
            yield key, members, reason
        yield "", {}, f"the shard cannot be read further ({error})"
        return
    if key:
        yield key, members, reason


def shard_is_complete(shard: Path) -> bool:
    """Whether the tar has its end-of-archive mark."""
    with open(shard, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < _END_OF_TAR:
            return False
        file.seek(size - _END_OF_TAR)
        return not any(file.read(_END_OF_TAR))

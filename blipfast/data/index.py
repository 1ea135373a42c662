"""Where each record lies in its shard, so that samples can be read in any order.

An index is made by one pass over a shard's headers and JSON, and kept beside it (or in the user's
cache folder, where the shards cannot be written) until the shard changes. It holds arrays only.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from blipfast.data.records import IMAGE_EXTENSIONS, Record, parse_body, record_from_members
from blipfast.data.shards import BadRecord, groups_of
from blipfast.errors import DataError

_VERSION = 1
_OPEN_FILES = 64
_COLUMNS = ("image", "image_size", "json", "json_size", "first_text", "words", "pair")


@dataclass(frozen=True)
class ShardIndex:
    """The usable records of one shard, `R` of them with `T` texts in all.

    keys: `(R,)` bytes. image, json: `(R,)` int64 offsets of the members' contents; image_size,
    json_size: `(R,)` int64. extensions: `(R,)` bytes, of the images. first_text: `(R + 1,)` int64,
    where a record's texts begin in `words (T,)` int32, the length of each text in words.
    pair: `(R,)` uint64, a hash of `ids["pair"]`, 0 where there is none.
    bad: what cannot be used, and why.
    """

    shard: Path
    keys: np.ndarray
    extensions: np.ndarray
    image: np.ndarray
    image_size: np.ndarray
    json: np.ndarray
    json_size: np.ndarray
    first_text: np.ndarray
    words: np.ndarray
    pair: np.ndarray
    bad: tuple[BadRecord, ...]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_texts(self) -> np.ndarray:
        """`(R,)` texts of each record."""
        return np.diff(self.first_text)


def index_shards(shards: Sequence[Path], threads: int = 4) -> list[ShardIndex]:
    """The index of each shard, read or made. Raises DataError when a shard cannot be opened."""
    with ThreadPoolExecutor(threads, "blipfast-index") as pool:
        return list(pool.map(index_shard, shards))


def index_shard(shard: Path) -> ShardIndex:
    """The index of one shard, read or made."""
    try:
        status = os.stat(shard)
    except OSError as error:
        raise DataError(f"cannot read the shard {shard}: {error.strerror}") from error
    stamp = np.array([_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)
    for place in _places(shard):
        if (found := _read(shard, place, stamp)) is not None:
            return found
    made = _make(shard)
    for place in _places(shard):
        if _write(made, place, stamp):
            break
    return made


def _places(shard: Path) -> tuple[Path, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blipfast" / "index"
    name = hashlib.blake2b(str(shard.resolve()).encode(), digest_size=12).hexdigest()
    return shard.with_name(f".{shard.name}.index.npz"), cache / f"{name}.npz"


def _read(shard: Path, place: Path, stamp: np.ndarray) -> ShardIndex | None:
    try:
        with np.load(place, allow_pickle=False) as arrays:
            if not np.array_equal(arrays["stamp"], stamp):
                return None
            columns = {name: arrays[name] for name in ("keys", "extensions", *_COLUMNS)}
            bad = json.loads(str(arrays["bad"]))
        return ShardIndex(shard, bad=tuple(BadRecord(str(shard), *b) for b in bad), **columns)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None  # none there, or damaged: it is made again


def _write(index: ShardIndex, place: Path, stamp: np.ndarray) -> bool:
    temporary = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    columns = {name: getattr(index, name) for name in ("keys", "extensions", *_COLUMNS)}
    bad = json.dumps([[b.key, b.reason] for b in index.bad])
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, stamp=stamp, bad=np.array(bad), **columns)
        os.replace(temporary, place)
        return True
    except OSError:  # it is only a cache
        temporary.unlink(missing_ok=True)
        return False


def _make(shard: Path) -> ShardIndex:
    rows: list[tuple[int, int, int, int, int]] = []
    keys, extensions, words, first_text = [], [], [], [0]
    bad: list[BadRecord] = []
    for key, members, reason in groups_of(shard, lambda extension: extension == "json"):
        try:
            if reason:
                raise DataError(reason)
            images = [name for name in members if name in IMAGE_EXTENSIONS]
            if len(images) != 1 or "json" not in members:
                record_from_members(key, dict.fromkeys(members, b""))  # raises, saying why
            image, about = members[images[0]], members["json"]
            if image.size == 0:
                raise DataError("the image is empty (0 bytes)")
            body = parse_body(about.content)
        except DataError as error:
            bad.append(BadRecord(str(shard), key, str(error)))
            continue
        keys.append(key.encode())
        extensions.append(images[0].encode())
        pair = _hash(body["ids"].get("pair"))
        rows.append((image.offset, image.size, about.offset, about.size, pair))
        words += [1 + entry["text"].count(" ") for entry in body["texts"]]
        first_text.append(len(words))
    table = np.array(rows, dtype=object).reshape(-1, 5)
    return ShardIndex(
        shard=shard,
        keys=np.array(keys, dtype="S"),
        extensions=np.array(extensions, dtype="S"),
        image=table[:, 0].astype(np.int64),
        image_size=table[:, 1].astype(np.int64),
        json=table[:, 2].astype(np.int64),
        json_size=table[:, 3].astype(np.int64),
        first_text=np.array(first_text, dtype=np.int64),
        words=np.array(words, dtype=np.int32),
        pair=table[:, 4].astype(np.uint64),
        bad=tuple(bad),
    )


def _hash(name: int | str | None) -> int:
    if name is None:
        return 0
    digest = hashlib.blake2b(str(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") | 1


class RecordReader:
    """Reads single records of indexed shards; any thread may call it."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._lock = Lock()

    def read(self, index: ShardIndex, row: int) -> Record:
        """Record `row` of a shard. Raises DataError naming shard and key."""
        key = index.keys[row].decode()
        extension = index.extensions[row].decode()
        image = self._at(index.shard, int(index.image[row]), int(index.image_size[row]))
        body = self._at(index.shard, int(index.json[row]), int(index.json_size[row]))
        return record_from_members(key, {extension: image, "json": body})

    def _at(self, shard: Path, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._files.pop(shard, None)
            if file is None:
                try:
                    file = os.open(shard, os.O_RDONLY)
                except OSError as error:
                    raise DataError(f"cannot read the shard {shard}: {error.strerror}") from error
            self._files[shard] = file
            while len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            own = os.dup(file)  # another thread may push the file out while this one reads
        try:
            content = os.pread(own, size, offset)
        finally:
            os.close(own)
        if len(content) != size:
            raise DataError(f"the shard {shard} has become shorter while it was read")
        return content

    def close(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

"""An index says where the records lie, goes with the shard, and names what cannot be used."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from blipfast.data import Record, ShardWriter, TextEntry, read_shards
from blipfast.data.index import RecordReader, index_shard, index_shards
from blipfast.errors import DataError

PNG = b"\x89PNG\r\n\x1a\n"


def write(folder: Path, count: int = 10) -> Path:
    with ShardWriter(folder) as writer:
        for n in range(count):
            texts = tuple(TextEntry("a b c"[: 1 + 2 * i], "web") for i in range(1 + n % 3))
            ids = {"image": n, "pair": n // 2}
            writer.write(Record(f"k/{n}", PNG + bytes([n]) * n, texts, 5, 6, ids))
    return folder / "shard-000000.tar"


def test_records_read_by_the_index_are_those_of_the_reader(tmp_path):
    shard = write(tmp_path)
    index, reader = index_shard(shard), RecordReader()
    got = [reader.read(index, row) for row in reversed(range(len(index)))]
    assert got[::-1] == list(read_shards(shard, verify_images=False))
    assert index.num_texts.tolist() == [1 + n % 3 for n in range(10)]
    assert index.words[:6].tolist() == [1, 1, 2, 1, 2, 3]
    assert all(index.pair[0::2] == index.pair[1::2])
    assert len(set(index.pair.tolist())) == 5
    reader.close()


def test_it_is_kept_until_the_shard_changes(tmp_path, monkeypatch):
    shard = write(tmp_path)
    first = index_shard(shard)
    kept = tmp_path / ".shard-000000.tar.index.npz"
    assert kept.is_file()
    with monkeypatch.context() as patch:
        patch.setattr("blipfast.data.index._make", lambda shard: pytest.fail("made again"))
        again = index_shard(shard)
    assert np.array_equal(first.keys, again.keys)
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(index_shard(shard)) == 10
    shard.unlink()
    assert len(index_shard(write(tmp_path, 4))) == 4


def test_shards_that_cannot_be_written_beside(tmp_path, monkeypatch):
    shard = write(tmp_path / "shards")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = os.replace
    refused = PermissionError(13, "Permission denied")

    def replace(source, target):
        if Path(target).parent == shard.parent:
            raise refused
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    index_shard(shard)
    assert [p.name for p in shard.parent.iterdir()] == [shard.name]
    assert len(list((tmp_path / "cache/blipfast/index").iterdir())) == 1


def odd_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def body(**more) -> bytes:
    values = {"texts": [{"text": "a", "source": "web"}], "ids": {}, "width": 1, "height": 1}
    return json.dumps(values | more).encode()


def test_what_cannot_be_used_is_named(tmp_path):
    shard = odd_shard(
        tmp_path / "x.tar",
        [
            ("good.png", PNG), ("good.json", body()),
            ("empty.png", b""), ("empty.json", body()),
            ("alone.png", PNG),
            ("blind.json", body()),
            ("latin.png", PNG), ("latin.json", b'{"texts": "\xe9"}'),
            ("mute.png", PNG), ("mute.json", body(texts=[])),
            ("two.png", PNG), ("two.png", PNG), ("two.json", body()),
        ],
    )  # fmt: skip
    index = index_shard(shard)
    assert index.keys.tolist() == [b"good"]
    reasons = {bad.key: bad.reason for bad in index.bad}
    assert reasons.keys() == {"empty", "alone", "blind", "latin", "mute", "two"}
    assert "0 bytes" in reasons["empty"]
    assert reasons["alone"] == "no json member"
    assert reasons["blind"] == "no image"
    assert "cannot be read" in reasons["latin"]
    assert "at least one entry" in reasons["mute"]
    assert "two members" in reasons["two"]
    assert {bad.shard for bad in index.bad} == {str(shard)}


def test_a_shard_that_breaks_off(tmp_path):
    shard = write(tmp_path)
    whole = shard.read_bytes()
    second = index_shard(shard).image[5]
    shard.write_bytes(whole[: int(second) + 2])
    index = index_shard(shard)
    assert len(index) == 5
    assert any("breaks off" in bad.reason for bad in index.bad)
    with pytest.raises(DataError, match="cannot read the shard"):
        index_shards([tmp_path / "none.tar"])


def test_a_shard_that_shrinks_while_it_is_read(tmp_path):
    shard = write(tmp_path)
    index = index_shard(shard)
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(DataError, match="become shorter"):
        RecordReader().read(index, 9)

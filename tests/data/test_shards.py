"""Shards: whole or absent, read back as written, bad records set aside by name."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blipfast.data import Record, ShardWriter, TextEntry, read_shards
from blipfast.errors import DataError


def picture(colour: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (colour % 256, 40, 90)).save(buffer, kind)
    return buffer.getvalue()


def make(i: int, kind: str = "PNG") -> Record:
    texts = (TextEntry(f"a dog, number {i} — café", "web"), TextEntry("a dog", "synthetic"))
    return Record(f"part/{i:04d}", picture(i, kind), texts, 8, 6, {"image": i, "url": "x"})


def write(folder: Path, count: int, **options: int) -> list[Path]:
    with ShardWriter(folder, **options) as writer:
        for i in range(count):
            writer.write(make(i))
    return writer.shards


def rewrite(shard: Path, change: dict[str, bytes | None]) -> None:
    with tarfile.open(shard) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    members.update(change)  # type: ignore[arg-type]
    with tarfile.open(shard, "w") as tar:
        for name, content in members.items():
            if content is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_round_trip(tmp_path: Path, kind: str) -> None:
    with ShardWriter(tmp_path, max_count=2) as writer:
        for i in range(5):
            writer.write(make(i, kind))
    assert names(tmp_path) == [f"shard-{i:06d}.tar" for i in range(3)]
    for pattern in (tmp_path, str(tmp_path / "*.tar"), writer.shards):
        reader = read_shards(pattern)
        assert list(reader) == [make(i, kind) for i in range(5)]
        assert (reader.good, reader.quarantine) == (5, [])
    assert writer.count == 5


def test_same_records_same_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", 3)[0], write(tmp_path / "b", 3)[0]
    assert one.read_bytes() == two.read_bytes()


def test_the_webdataset_library_reads_them(tmp_path: Path) -> None:
    import webdataset

    write(tmp_path, 3)
    loaded = list(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in loaded] == [make(i).key for i in range(3)]
    assert loaded[1]["png"] == make(1).image
    assert json.loads(loaded[1]["json"])["texts"][0]["source"] == "web"


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 12), limit=st.integers(1, 40_000), per=st.integers(1, 5))
def test_limits_hold(tmp_path_factory: pytest.TempPathFactory, count: int, limit: int, per: int):
    folder = tmp_path_factory.mktemp("limits")
    shards = write(folder, count, max_bytes=limit, max_count=per)
    sizes = [len(list(read_shards(shard))) for shard in shards]
    assert sum(sizes) == count
    for shard, size in zip(shards, sizes, strict=True):
        assert size <= per
        assert shard.stat().st_size <= limit or size == 1


def test_interrupt_leaves_whole_shards_only(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_count=2)

    def interrupted() -> None:
        with writer:
            for i in range(5):
                writer.write(make(i))
            assert names(tmp_path)[0].startswith(".shard-000002")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["shard-000000.tar", "shard-000001.tar"]
    assert len(list(read_shards(tmp_path))) == writer.count == 4


def test_interrupt_inside_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, max_count=2)
    for i in range(3):
        writer.write(make(i))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tarfile.TarFile, "addfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.write(make(3))
    assert writer.close() == [tmp_path / "shard-000000.tar"]
    assert names(tmp_path) == ["shard-000000.tar"]


@pytest.mark.parametrize("where", ["addfile", "fsync"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    writer = ShardWriter(tmp_path, max_count=2)
    for i in range(3):
        writer.write(make(i))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((tarfile.TarFile, where) if where == "addfile" else (os, where)), full)

    def go_on() -> None:
        writer.write(make(3))
        writer.close()

    with pytest.raises(DataError, match=r"disk is full.*1 whole shards.*start_index=1"):
        go_on()
    monkeypatch.undo()
    assert names(tmp_path) == ["shard-000000.tar"]
    with ShardWriter(tmp_path, max_count=2, start_index=1) as again:
        again.write(make(2))
    assert len(list(read_shards(tmp_path))) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_the_kernels_own_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr("blipfast.data.shards.open", lambda *_: full, raising=False)
        writer = ShardWriter(tmp_path)
        writer.write(make(0))
        with pytest.raises(DataError, match=r"disk is full\. The 1 records"):
            writer.close()
    assert names(tmp_path) == []


def test_killed_run_is_tidied_and_shards_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".shard-000000.tar.tmp").write_bytes(b"half")
    write(tmp_path, 1)
    assert names(tmp_path) == ["shard-000000.tar"]
    with pytest.raises(DataError, match="exists"):
        write(tmp_path, 1)
    assert len(list(read_shards(tmp_path))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "key 'a.b'"),
        ({"key": "../a"}, "key"),
        ({"key": "/a"}, "key"),
        ({"key": "a" * 91}, "key"),
        ({"image": b"junk"}, "record k: image bytes"),
        ({"texts": ()}, "record k: texts"),
        ({"texts": (TextEntry("\udce9", "web"),)}, "record k: .*undecodable"),
        ({"texts": (TextEntry(3, "web"),)}, "record k: each text"),  # type: ignore[arg-type]
        ({"width": 0}, "record k: width"),
        ({"ids": {"a": 0.5}}, "record k: ids"),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    good = {"key": "k", "image": picture(), "texts": (TextEntry("a", "web"),)}
    with ShardWriter(tmp_path) as writer:
        writer.write(make(0))
        with pytest.raises(DataError, match=message):
            writer.write(Record(**{**good, "width": 8, "height": 6, **change}))  # type: ignore
        with pytest.raises(DataError, match="already"):
            writer.write(make(0))
    assert len(list(read_shards(tmp_path))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"part/0001.png": picture(1)[:-30]}, "truncated"),
        ({"part/0001.png": b""}, "0 bytes"),
        ({"part/0001.png": None}, "no image"),
        ({"part/0001.json": None}, "no json"),
        ({"part/0001.json": b"{"}, "cannot be read"),
        ({"part/0001.json": b"\xff"}, "cannot be read"),
        ({"part/0001.json": b"[]"}, "not an object"),
        ({"part/0001.json": b'{"texts": []}'}, "texts"),
    ],
)
def test_quarantine_names_the_record(
    tmp_path: Path, change: dict[str, bytes | None], reason: str
) -> None:
    shard = write(tmp_path, 4)[0]
    rewrite(shard, change)
    reader = read_shards(tmp_path, max_bad_fraction=0.3)
    assert [record.key for record in reader] == ["part/0000", "part/0002", "part/0003"]
    (bad,) = reader.quarantine
    assert (bad.shard, bad.key) == (str(shard), "part/0001")
    assert reason in bad.reason
    with pytest.raises(DataError, match=r"1 of 4 .*part/0001"):
        list(read_shards(tmp_path, max_bad_fraction=0.2))


def test_unverified_reading_leaves_images_alone(tmp_path: Path) -> None:
    rewrite(write(tmp_path, 2)[0], {"part/0001.png": b""})
    assert len(list(read_shards(tmp_path, verify_images=False))) == 2


def test_too_many_bad_ones_stop_early(tmp_path: Path) -> None:
    shard = write(tmp_path, 320)[0]
    rewrite(shard, {f"part/{i:04d}.png": None for i in range(0, 320, 4)})
    reader = read_shards(tmp_path, max_bad_fraction=0.1)
    with pytest.raises(DataError, match="of 20"):
        list(reader)
    assert reader.good < 160


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 0.999))
def test_broken_off_shards_are_reported(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    folder = tmp_path_factory.mktemp("broken")
    shard = write(folder, 6)[0]
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[-1]
        last = end.offset_data + end.size
    shard.write_bytes(data[: int(share * last)])
    reader = read_shards(folder, max_bad_fraction=1)
    whole = list(reader)
    assert whole == [make(i) for i in range(len(whole))]
    assert len(whole) < 6
    assert reader.quarantine
    assert reader.quarantine[0].shard == str(shard)


def test_not_a_tar(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / "zzz.tar").write_bytes(b"not a tar at all" * 100)
    reader = read_shards(tmp_path, max_bad_fraction=1)
    assert len(list(reader)) == 2
    assert "cannot be read" in reader.quarantine[-1].reason


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shard matches"):
        read_shards(tmp_path / "*.tar")
    with pytest.raises(DataError, match="no shard matches"):
        read_shards(tmp_path)
    with pytest.raises(DataError, match="share from 0 to 1"):
        read_shards(tmp_path, max_bad_fraction=2)
    with pytest.raises(DataError, match="max_count"):
        ShardWriter(tmp_path, max_count=0)
    with pytest.raises(DataError, match="plain file name"):
        ShardWriter(tmp_path, prefix="a/b")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make the folder"):
        ShardWriter(tmp_path / "file" / "x")

"""Pillow's threads and real DALI give the same batches, whatever lies in the shards."""

from __future__ import annotations

import io
import itertools
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blipfast.data import IMAGE_STD, decode
from blipfast.data.ahead import ahead
from blipfast.errors import ConfigError
from blipfast.train.batches import ShardBatches
from blipfast.train.config import DataConfig

sys.path.insert(0, str(Path(__file__).parent))
from shards import pairs, record, tokenizer, write

LEVEL = 1 / 255 / min(IMAGE_STD)  # one grey level of 256, normalised


def photo(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Smooth colours with a little noise, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth).astype(int) + rng.integers(-9, 10, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpegs(count: int) -> list[bytes]:
    """4:4:4, 4:2:0, grey and progressive ones of several sizes."""
    kinds = [{"subsampling": 0}, {"subsampling": 2}, {"grey": True}, {"progressive": True}]
    out = []
    for n in range(count):
        options = dict(kinds[n % 4])
        image = photo(n, 150 + 7 * n, 190 - 3 * n)
        image = image.convert("L") if options.pop("grey", False) else image
        out.append(encoded(image, quality=90, **options))
    return out


def both(folder: Path, records: list, task: str = "pretrain", **values) -> list[ShardBatches]:
    write(folder, records)
    config = DataConfig(
        shards=str(folder), batch_size=4, threads=2, drop_last=False, max_bad_fraction=0.9,
        **values,
    )  # fmt: skip
    return [
        ShardBatches(replace(config, loader=name), tokenizer(), 64, task)
        for name in ("torch", "dali")
    ]


def same(ours: list[dict], theirs: list[dict], levels: float) -> None:
    assert [b["keys"] for b in ours] == [b["keys"] for b in theirs]
    assert [b["position"] for b in ours] == [b["position"] for b in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        apart = (one["pixel_values"] - other["pixel_values"]).abs() / LEVEL
        assert one["pixel_values"].shape == other["pixel_values"].shape
        assert apart.mean() < 0.5, apart.mean()
        assert apart.quantile(0.99) < levels


@pytest.mark.parametrize("augment", [False, True])
def test_same_pixels_of_real_jpegs(tmp_path, augment):
    records = [record(n, [("a dog", "web")], image=image) for n, image in enumerate(jpegs(14))]
    pillow, dali = both(tmp_path, records, augment=augment)
    if augment:  # equalize and the like make a level of difference large
        for batches in (pillow, dali):
            batches._transform.randaugment = None
    same(list(pillow.epoch(0)), list(dali.epoch(0)), levels=3)
    assert (pillow.loader, dali.loader) == ("torch", "dali")


def test_same_operations_are_drawn(tmp_path):
    records = [record(n, [("a dog", "web")], image=image) for n, image in enumerate(jpegs(8))]
    pillow, dali = both(tmp_path, records)
    for ours, theirs in zip(pillow.epoch(1), dali.epoch(1), strict=True):
        assert ours["keys"] == theirs["keys"]
        apart = (ours["pixel_values"] - theirs["pixel_values"]).abs().flatten(1).mean(1)
        assert (apart / LEVEL < 4).all()


def odd_images() -> dict[str, bytes]:
    """What is found in the web; the usable ones first."""
    sixteen = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    frames = [photo(n, 80, 60).quantize() for n in range(3)]
    good = encoded(photo(1), quality=90)
    return {
        "cmyk": encoded(photo(0).convert("CMYK")),
        "sixteen": encoded(Image.fromarray(sixteen), "PNG"),
        "transparent": encoded(photo(2).convert("RGBA"), "PNG"),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp": encoded(photo(3), "WEBP"),
        "truncated": good[: len(good) // 2],
        "without_end": good[:-40],
        "garbage": b"\xff\xd8\xff" + bytes(range(256)) * 4,
        "damaged": good[:600] + bytes(400) + good[1000:],
    }


def test_what_a_card_would_do_gives_the_same_pixels(tmp_path, monkeypatch):
    """A card returns resized crops in one tensor; here DALI's crops are put into that form."""
    records = [record(n, [("a dog", "web")], image=image) for n, image in enumerate(jpegs(12))]
    pillow, dali = both(tmp_path, records)
    real = decode.DaliDecoder._run

    def as_a_card(self, jobs):
        squares = [Image.fromarray(crop).resize((64, 64), 3) for crop in real(self, jobs)]
        return torch.from_numpy(np.stack([np.asarray(square) for square in squares]))

    monkeypatch.setattr(decode.DaliDecoder, "_run", as_a_card)
    for ours, theirs in zip(pillow.epoch(1), dali.epoch(1), strict=True):
        assert ours["keys"] == theirs["keys"]
        apart = (ours["pixel_values"] - theirs["pixel_values"]).abs().flatten(1).mean(1)
        assert (apart / LEVEL < 4).all()


def test_odd_and_broken_images_through_both(tmp_path):
    odd = odd_images()
    records = [record(n, [("a dog", "web")], image=image) for n, image in enumerate(jpegs(12))]
    records += [
        record(100 + n, [("a dog", "web")], image=image) for n, image in enumerate(odd.values())
    ]
    pillow, dali = both(tmp_path, records, augment=False)
    results = [list(batches.epoch(0)) for batches in (pillow, dali)]
    same(*results, levels=3)
    seen = {key for batch in results[0] for key in batch["keys"]}
    names = dict(zip((f"r{100 + n}" for n in range(len(odd))), odd, strict=True))
    refused = {names[bad.key] for bad in pillow.quarantine}
    assert {names[bad.key] for bad in dali.quarantine} == refused
    assert {"truncated", "without_end", "garbage"} <= refused
    assert refused <= {"truncated", "without_end", "garbage", "damaged"}
    assert {names.get(key) for key in seen if key in names} == set(odd) - refused
    assert len([key for key in seen if key not in names]) == 12, "a good sample was lost"
    assert all(bad.shard.endswith(".tar") and bad.reason for bad in dali.quarantine)


def test_dali_goes_on_after_a_corrupt_jpeg_in_every_batch(tmp_path):
    """Such a file is a plain JPEG by its header and end, so it reaches DALI and breaks it."""
    good = jpegs(12)
    tables = good[0].index(b"\xff\xc4") + 5  # of Huffman's codes
    broken = good[0][:tables] + b"\xff" * 16 + good[0][tables + 16 :]
    images = [broken if n % 4 == 1 else image for n, image in enumerate(good)]
    records = [record(n, [("a dog", "web")], image=image) for n, image in enumerate(images)]
    built: list[int] = []
    real = decode._pipeline

    def counting(*arguments):
        built.append(1)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_pipeline", counting)
        pillow, dali = both(tmp_path, records, augment=False, shuffle_buffer=0)
        results = [list(batches.epoch(0)) for batches in (pillow, dali)]
    same(*results, levels=3)
    assert len(built) >= 3, "DALI was not rebuilt"
    assert [bad.key for bad in dali.quarantine] == ["r001", "r005", "r009"]


def test_too_large_an_image_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr("blipfast.data.images.MAX_PIXELS", 10_000)
    records = [
        record(0, [("a dog", "web")], image=encoded(photo(0))),
        record(1, [("a dog", "web")], image=encoded(photo(1, 90, 90))),
    ]
    for batches in both(tmp_path, records, augment=False):
        assert [b["keys"] for b in batches.epoch(0)] == [["r001"]]
        assert "more than the limit" in batches.quarantine[0].reason


def test_pairs_through_both(tmp_path):
    records = pairs(5)
    images = jpegs(10)
    records = [replace(one, image=image) for one, image in zip(records, images, strict=True)]
    pillow, dali = both(tmp_path, records, "nlvr", augment=False)
    same(list(pillow.epoch(0)), list(dali.epoch(0)), levels=3)


def test_a_dali_stream_goes_on_where_it_was(tmp_path):
    records = [record(n, [("a dog", "web")], image=image) for n, image in enumerate(jpegs(10))]
    _, dali = both(tmp_path, records)
    whole = list(itertools.islice(dali, 6))
    rest = list(itertools.islice(dali.stream(whole[2]["position"]), 3))
    assert [b["keys"] for b in rest] == [b["keys"] for b in whole[3:]]
    for ours, theirs in zip(rest, whole[3:], strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_dali_absent_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install nvidia-dali-cuda130"):
        decode.pick_loader("dali", torch.device("cpu"))
    assert decode.pick_loader("auto", torch.device("cuda")) == "torch"


def test_no_thread_is_left_behind(tmp_path):
    records = [record(n, [("a dog", "web")], image=image) for n, image in enumerate(jpegs(10))]
    before = threading.active_count()
    for batches in both(tmp_path, records):
        stream = batches.stream(None)
        next(stream)
        stream.close()
    assert threading.active_count() == before


def test_working_ahead_passes_errors_on_and_stops():
    def numbers():
        try:
            yield from range(3)
            raise ValueError("spoilt")
        finally:
            closed.append(True)

    closed: list[bool] = []
    items = ahead(numbers(), 1)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="spoilt"):
        next(items)
    assert closed == [True]
    items = ahead(itertools.count(), 2)
    assert next(items) == 0
    items.close()
    assert not [t for t in threading.enumerate() if t.name == "blipfast-ahead"]

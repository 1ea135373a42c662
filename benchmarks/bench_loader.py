"""Reading training images: DALI, the thread loader and plain Pillow, each with all threads.

`decode` is JPEG to pixels alone. `whole` is from shards to normalised batches of 224 px, with crop,
flip and RandAugment. The images are JPEGs of 640 x 480 with the texture of photographs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blipfast.data import Record, ShardWriter, TextEntry, TrainTransform, load_image
from blipfast.data.text import CLS, DEC, ENC, MASK, PAD, SEP, UNK, BlipTokenizer
from blipfast.train.batches import ShardBatches
from blipfast.train.config import DataConfig

IMAGES, BATCH, SIDE = 256, 32, 224
THREADS = torch.get_num_threads()


def photograph(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (32, 42, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC))
    noisy = smooth.astype(int) + rng.integers(-10, 11, (480, 640, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [photograph(n) for n in range(IMAGES)]


def by_pillow(images: list[bytes]) -> list[np.ndarray]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda data: np.asarray(load_image(data)), images))


def decoder_of_dali() -> Callable[[list[bytes]], list[Any]]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=THREADS, device_id=None, prefetch_queue_depth=1)
    def decode() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, output_type=types.RGB)

    pipe = decode()
    pipe.build()

    def run(images: list[bytes]) -> list[Any]:
        for first in range(0, len(images), BATCH):
            chunk = [np.frombuffer(data, np.uint8) for data in images[first : first + BATCH]]
            pipe.feed_input("encoded", chunk)
            (out,) = pipe.run()
        return list(np.asarray(out.as_tensor()))  # of the last batch

    return run


@pytest.mark.parametrize("code", ["Pillow", "DALI"])
def test_decode(benchmark: Any, images: list[bytes], code: str) -> None:
    run = by_pillow if code == "Pillow" else decoder_of_dali()
    for ours, theirs in zip(run(images[:BATCH]), by_pillow(images[:BATCH]), strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 0.5
    benchmark.group = f"decoding {IMAGES} JPEGs of 640 x 480"
    benchmark.extra_info.update(code=code, images=IMAGES)
    benchmark.pedantic(run, args=(images,), rounds=5, warmup_rounds=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, max_count=64) as writer:
        for n, data in enumerate(images):
            text = (TextEntry("a photograph of nothing", "web"),)
            writer.write(Record(f"{n:06d}", data, text, 640, 480, {"image": n}))
    return folder


def tokenizer() -> BlipTokenizer:
    return BlipTokenizer([PAD, UNK, CLS, SEP, MASK, *"abcdefghijklmnopqrstuvwxyz", DEC, ENC])


def loader(shards: Path, name: str) -> ShardBatches:
    config = DataConfig(shards=str(shards), batch_size=BATCH, threads=THREADS, loader=name)  # type: ignore[arg-type]
    return ShardBatches(config, tokenizer(), SIDE, "pretrain")


def plainly(images: list[bytes]) -> Iterator[torch.Tensor]:
    """As the original does it: one image after the other in each of the workers."""
    transform = TrainTransform(SIDE, rng=0)
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(images), BATCH):
            views = pool.map(
                lambda n: transform(images[n], rng=np.random.default_rng(n)),
                range(first, first + BATCH),
            )
            yield torch.stack(list(views))


@pytest.mark.parametrize("code", ["Pillow", "blipfast, threads", "blipfast, DALI"])
def test_whole(benchmark: Any, images: list[bytes], shards: Path, code: str) -> None:
    if code == "Pillow":

        def run() -> None:
            assert sum(len(batch) for batch in plainly(images)) == IMAGES
    else:
        batches = loader(shards, "dali" if "DALI" in code else "torch")
        stream = iter(batches)
        other = next(iter(loader(shards, "torch")))
        first = next(stream)
        assert first["keys"] == other["keys"]
        apart = (first["pixel_values"] - other["pixel_values"]).abs().mean()
        assert apart < 0.05  # RandAugment's equalize makes a grey level of difference large

        def run() -> None:
            for _ in islice(stream, IMAGES // BATCH):
                pass

    benchmark.group = f"shards to batches of {SIDE} px, {IMAGES} images"
    benchmark.extra_info.update(code=code, images=IMAGES)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)

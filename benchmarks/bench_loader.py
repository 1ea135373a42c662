"""Reading training images: DALI, the thread loader and plain Pillow, each with all threads.

`decode` is JPEG to pixels alone. `whole` is from shards to normalised batches of 224 px, with crop,
flip and RandAugment. The images are JPEGs of 640 x 480 with the texture of photographs.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blipfast.data import (
    Record,
    ShardWriter,
    TextEntry,
    TrainTransform,
    load_image,
    to_tensor,
)
from blipfast.data.text import CLS, DEC, ENC, MASK, PAD, SEP, UNK, BlipTokenizer
from blipfast.train.batches import ShardBatches
from blipfast.train.config import DataConfig

IMAGES, BATCH, SIDE = 256, 32, 224
DECODED = 64  # at once by DALI: with fewer, one thread waits for the other at a batch's end
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
    """Gives the last ones; like a loader it drops those before."""
    with ThreadPoolExecutor(THREADS) as pool:
        pixels = pool.map(lambda data: np.asarray(load_image(data)), images)
        return list(deque(pixels, maxlen=DECODED))


def decoder_of_dali(images: list[bytes]) -> Callable[[], list[np.ndarray]]:
    """Decodes the images over and over, a batch ahead, as in training; gives the last batch."""
    from nvidia.dali import fn, pipeline_def, types

    encoded = [np.frombuffer(data, np.uint8) for data in images]
    batches = [encoded[first : first + DECODED] for first in range(0, IMAGES, DECODED)]

    @pipeline_def(batch_size=DECODED, num_threads=THREADS, device_id=None, prefetch_queue_depth=2)
    def decode() -> Any:
        source = fn.external_source(source=cycle(batches), dtype=types.UINT8, ndim=1)
        return fn.decoders.image(source, output_type=types.RGB)

    pipe = decode()
    pipe.build()

    def run() -> list[np.ndarray]:
        for _ in batches:
            (out,) = pipe.run()
        return [np.asarray(image) for image in out]

    return run


@pytest.mark.parametrize("code", ["Pillow", "DALI"])
def test_decode(benchmark: Any, images: list[bytes], code: str) -> None:
    run = partial(by_pillow, images) if code == "Pillow" else decoder_of_dali(images)
    for ours, theirs in zip(run(), by_pillow(images), strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 0.5
    benchmark.group = f"decoding {IMAGES} JPEGs of 640 x 480"
    benchmark.extra_info.update(code=code, images=IMAGES)
    # Many in a row, for what DALI decodes ahead of a round's start and after its end.
    benchmark.pedantic(run, rounds=5, iterations=8, warmup_rounds=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, images: list[bytes]) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), images)


def write_shards(folder: Path, images: list[bytes]) -> Path:
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
    """As the original does it: by Pillow alone, one image after the other in each worker."""
    transform = TrainTransform(SIDE)

    def load(number: int) -> torch.Tensor:
        image = load_image(images[number])
        view = transform.plan(*image.size, np.random.default_rng(number))
        square = image.crop(view.box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return to_tensor(view.finish(np.asarray(square)))

    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(images), BATCH):
            yield torch.stack(list(pool.map(load, range(first, first + BATCH))))


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

"""Small shards for the tests of this folder and of the command line."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from blipfast.data import BlipTokenizer, Record, ShardWriter, TextEntry

VOCABULARY = Path(__file__).parents[1] / "fixtures/reference/vocab.txt"


def tokenizer() -> BlipTokenizer:
    return BlipTokenizer.from_file(VOCABULARY)


def picture(number: int, size: int = 40) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def record(number: int, texts: list[tuple[str, str]], image: bytes | None = None, **ids) -> Record:
    return Record(
        f"r{number:03d}",
        picture(number) if image is None else image,
        tuple(TextEntry(text, source) for text, source in texts),
        40,
        40,
        {"image": number, **ids},
    )


def tiny_settings(preset: str | None = None) -> dict:
    """A training of two steps in the time of a test, as settings of `blipfast train`."""
    model = {"image_size": 32} | ({"preset": preset} if preset else {})
    return {
        "model": model,
        "data": {"batch_size": 2, "threads": 1, "augment": False},
        "fit": {"steps": 2, "epochs": None, "warmup_steps": 0, "precision": "fp32"},
        "objective": {"queue_size": 8},
        "watch": {"tensorboard": False},
        "device": "cpu",
    }


def tiny_bootstrap() -> dict:
    """The settings of `blipfast capfilt bootstrap` at that size; every text is kept."""
    capfilt = {"threshold": 0.0, "max_length": 10, "precision": "fp32", "device": "cpu"}
    roles = {name: tiny_settings() for name in ("captioner", "filter", "shared")}
    return {**roles, "pretrain": tiny_settings("blip_tiny"), "capfilt": capfilt}


def captions(count: int, each: int = 1) -> list[Record]:
    return [
        record(n, [(f"a dog {n} on street {i}", "human") for i in range(each)])
        for n in range(count)
    ]


def questions(count: int) -> list[Record]:
    return [
        record(n, [("Is it a dog?", "question"), *[("yes", "answer")] * 3, ("no", "answer")])
        for n in range(count)
    ]


def dialogues(count: int, rounds: int = 3) -> list[Record]:
    def turns() -> list[tuple[str, str]]:
        texts = [("a dog in the snow", "caption")]
        for n in range(1, rounds + 1):
            texts += [(f"is it dog {n}", "question"), (f"yes {n}", "answer")]
            texts += [(f"yes {n}", f"option-{n}"), ("no", f"option-{n}"), ("red", f"option-{n}")]
        return texts

    return [
        record(n, turns(), **{f"gt-{i}": 0 for i in range(1, rounds + 1)}) for n in range(count)
    ]


def pairs(count: int) -> list[Record]:
    text = [("the left dog is red", "human")]
    return [record(n, text, pair=n // 2, label=(n // 2) % 2) for n in range(2 * count)]


def write(folder: Path, records: list[Record], max_count: int = 8) -> Path:
    with ShardWriter(folder, max_count=max_count) as writer:
        for one in records:
            writer.write(one)
    return folder

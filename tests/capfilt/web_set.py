"""A small web set, and tiny models whose captions and scores differ from image to image."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image

from blipfast.data import Record, TextEntry
from blipfast.models.config import blip_config
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.retrieval import BlipForRetrieval

VOCAB = Path(__file__).parents[1] / "fixtures" / "reference" / "vocab.txt"


def jpeg(number: int) -> bytes:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "JPEG")
    return buffer.getvalue()


def record(number: int, text: str = "a dog", image: bytes | None = None) -> Record:
    data = jpeg(number) if image is None else image
    return Record(f"img-{number:03d}", data, (TextEntry(text, "web"),), 40, 40)


def sharpened(seed: int):
    """Random models, sharpened so that what they say differs from image to image."""
    torch.manual_seed(seed)
    config = blip_config("blip_tiny")
    captioner, judge = BlipForCaptioning(config).eval(), BlipForRetrieval(config).eval()
    with torch.no_grad():
        judge.itm_head.weight.mul_(40)
        for model in (captioner, judge):
            for parameter in model.visual_encoder.parameters():
                parameter.mul_(3)
    return captioner, judge

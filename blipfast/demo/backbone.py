"""What stands in for ImageNet: an image encoder that has learnt to name the things in a picture.

The paper starts from a ViT trained on ImageNet, and no such weights come as a package. So a ViT
from scratch first learns to classify pictures of its own, of one kind of thing each, as ImageNet's
are: no caption, no colour, no two things together. Both models of the main job start from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.demo.captions import Layout, Scene
from blipfast.demo.concepts import BACKGROUNDS, CONCEPTS
from blipfast.demo.samples import decode, jitter, normalise
from blipfast.demo.scenes import render
from blipfast.demo.settings import DemoSettings
from blipfast.models.vit import VisionTransformer
from blipfast.train.config import FitConfig
from blipfast.train.engine import fit
from blipfast.train.history import History

_ARTISTS = ("twemoji", "openmoji")
_BATCH = 96


@dataclass
class NamingOutput:
    """Cross-entropy over the concepts (scalar)."""

    loss: Tensor

    def losses(self) -> dict[str, Tensor]:
        return {"naming": self.loss}


class Naming(nn.Module):
    """A ViT and a linear head on its CLS token, one output per concept."""

    def __init__(self, visual_encoder: VisionTransformer, num_concepts: int) -> None:
        super().__init__()
        self.visual_encoder = visual_encoder
        self.head = nn.Linear(visual_encoder.config.hidden_size, num_concepts)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> NamingOutput:
        """pixel_values: `(B, 3, size, size)`. labels: `(B,)` int64, the thing that is there."""
        logits = self.head(self.visual_encoder(pixel_values)[:, 0])
        return NamingOutput(F.cross_entropy(logits.float(), labels))


class _Pictures:
    """Batches of pictures of a thing, once to three times, and which it is."""

    def __init__(self, settings: DemoSettings, count: int) -> None:
        rng = np.random.default_rng(settings.seed + 10_000)
        names = list(CONCEPTS)[: settings.num_concepts]
        self.num_concepts = len(names)
        self.labels = torch.from_numpy(rng.integers(len(names), size=count))
        images = []
        for i in range(count):
            times = int(rng.integers(1, 4))
            layout: Layout = "above" if times == 2 and rng.random() < 0.5 else "beside"
            background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
            scene = Scene((names[int(self.labels[i])],) * times, layout, background)
            images.append(render(scene, _ARTISTS[i % 2], settings.image_size, rng))
        self.pixels = decode(images, [f"picture {i}" for i in range(count)])
        self.generator = torch.Generator().manual_seed(settings.seed)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows in torch.randperm(len(self.pixels), generator=self.generator).split(_BATCH):
            pixels = jitter(self.pixels[rows], self.generator)
            keys = [f"picture {i}" for i in rows.tolist()]
            yield {"pixel_values": normalise(pixels), "labels": self.labels[rows], "keys": keys}


def train_backbone(
    visual_encoder: VisionTransformer, settings: DemoSettings, title: str, progress: Any = None
) -> History:
    """Trains `visual_encoder` in place for `settings.backbone_steps` steps."""
    pictures = _Pictures(settings, settings.num_web)
    model = Naming(visual_encoder, pictures.num_concepts)

    def step_fn(module: Any, batch: dict, step: int, epoch: float) -> NamingOutput:
        return module(batch["pixel_values"], batch["labels"])

    config = FitConfig(
        steps=settings.backbone_steps,
        learning_rate=settings.backbone_rate,
        min_learning_rate=settings.backbone_rate / 100,
        warmup_steps=min(50, max(1, settings.backbone_steps // 8)),
        grad_clip=1.0,
        precision="bf16" if settings.precision == "bf16" else "fp32",
        seed=settings.seed,
    )
    return fit(model, pictures, step_fn, config, title=title, progress=progress)

"""Recorded steps of the original classes, as inputs for the objectives."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from blipfast.objectives.itc import FeatureQueue

ROOT = Path(__file__).parents[1] / "fixtures" / "reference"


@dataclass
class Golden:
    """Tensors and notes of one recorded step."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]

    @classmethod
    def load(cls, name: str, suffix: str = "") -> Golden:
        base = ROOT / name / f"golden{suffix}"
        notes = json.loads(base.with_suffix(".json").read_text())
        return cls(load_file(base.with_suffix(".safetensors")), notes)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Student's image and text features, momentum's image and text features."""
        names = ("image_feat", "text_feat", "image_feat_m", "text_feat_m")
        image, text, image_m, text_m = (self[f"after.{name}"] for name in names)
        return image, text, image_m, text_m


def state_before(name: str) -> tuple[FeatureQueue, Tensor]:
    """Queue and temperature as they were before the step."""
    state = torch.load(ROOT / name / "checkpoint.pth", weights_only=True)["model"]
    queue = FeatureQueue(64, 32, with_ids="idx_queue" in state)
    queue.image_queue.copy_(state["image_queue"].T)
    queue.text_queue.copy_(state["text_queue"].T)
    queue.ptr.copy_(state["queue_ptr" if "queue_ptr" in state else "ptr_queue"][0])
    if queue.id_queue is not None:
        queue.id_queue.copy_(state["idx_queue"][0])
    return queue, state["temp"].clone()

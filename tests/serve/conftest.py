"""Pictures, and small checkpoints of all tasks of the page."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blipfast.checkpoints import save_model
from blipfast.models.config import blip_config
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.retrieval import BlipForRetrieval
from blipfast.tasks.vqa import BlipForVQA

VOCAB = Path(__file__).parents[1] / "fixtures" / "reference" / "vocab.txt"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures, one in a folder below, one broken; and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "below/c.png", "d.jpg", "e.png"]):
        pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    whole = (folder / "b.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    config = blip_config("blip_tiny")
    classes = {"caption": BlipForCaptioning, "vqa": BlipForVQA, "retrieval": BlipForRetrieval}
    for name, cls in classes.items():
        model = cls(config)
        with torch.no_grad():
            for parameter in model.visual_encoder.parameters():
                parameter.mul_(3)
        save_model(model, folder / name)
        shutil.copy(VOCAB, folder / name / "vocab.txt")
    return {name: str(folder / name) for name in classes}

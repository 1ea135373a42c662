"""Pictures, shards and a way to call the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blipfast.cli import main

# The shards of the training tests serve here too.
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three images, one in a folder below, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "below/c.png"]):
        pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command line: status, stdout, stderr."""

    def call(*argv: str) -> tuple[int, str, str]:
        status = main(list(argv))
        out, err = capsys.readouterr()
        return status, out, err

    return call

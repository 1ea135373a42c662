"""The examples, at the size of the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_finetune_folder_goes_on_and_says_what_is_missing(here: Path) -> None:
    common = [
        "my_photos", "--checkpoint", "caption-model", "--vocabulary", "vocab.txt",
        "--fit.epochs", "null", "--data.batch_size", "2", "--model.image_size", "32",
    ]  # fmt: skip
    first = run("finetune_folder.py", *common, "--fit.steps", "2")
    assert first.returncode == 0, first.stderr[-2000:]
    assert first.stdout.count("my_photos/") == 48
    assert (here / "runs" / "mine" / "captioner" / "model" / "vocab.txt").is_file()
    (here / "my_photos" / "dog.txt").unlink()
    other = run("finetune_folder.py", *common, "--fit.steps", "2", "--output", "runs/other")
    assert other.returncode == 2
    assert "1 of 48 images in my_photos have no caption: dog.jpg" in other.stderr


@pytest.mark.slow
def test_the_fused_loss_in_a_plain_loop() -> None:
    done = run("open_clip_loop.py")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("that of the plain code") == 3

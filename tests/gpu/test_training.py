"""Every recipe trains on a card: alone, under torchrun by DDP and FSDP2, stopped and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from test_recipes import tiny, tiny_arguments

from blipfast.train.config import packaged_configs
from blipfast.train.recipes import run_training

pytestmark = pytest.mark.gpu
ON_CARD = ["--device", "cuda", "--watch.tensorboard", "false"]


@pytest.mark.parametrize("name", sorted(packaged_configs()))
def test_every_recipe_trains(name: str, tmp_path: Path) -> None:
    history = run_training(tiny(name, tmp_path, *ON_CARD))
    assert len(history.total) == 2
    assert all(torch.tensor(history.total).isfinite())
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--fit.precision", "bf16"],
        ["--fit.precision", "pure_bf16", "--fit.parallel", "fsdp"],
        ["--fit.precision", "fp32", "--fit.micro_batch", "2"],
        ["--fit.precision", "bf16", "--fit.compile", "true"],
        ["--fit.precision", "bf16", "--fit.grad_checkpointing", "true"],
    ],
    ids=" ".join,
)
def test_ways_to_train(options: list[str], tmp_path: Path) -> None:
    history = run_training(tiny("pretrain", tmp_path, *ON_CARD, *options, "--fit.steps", "6"))
    assert len(history.total) == 6
    assert all(torch.tensor(history.total).isfinite())


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """In bf16 with dropout: the card's random state and the queue come back too."""
    options = [*ON_CARD, "--fit.precision", "bf16", "--fit.schedule", "constant"]
    whole = run_training(tiny("pretrain", tmp_path / "a", *options, "--fit.steps", "6"))
    options += ["--fit.checkpoint_every", "3"]
    run_training(tiny("pretrain", tmp_path / "b", *options, "--fit.steps", "3"))
    resumed = tiny("pretrain", tmp_path / "b", *options, "--fit.steps", "6", "--resume", "true")
    assert run_training(resumed).total == whole.total


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_under_torchrun(parallel: str, tmp_path: Path) -> None:
    arguments = tiny_arguments(
        "pretrain", tmp_path, *ON_CARD, "--fit.parallel", parallel, "--fit.steps", "3",
        "--fit.precision", "bf16",
    )  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        "-m", "blipfast.cli", "train", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]
    (history,) = (tmp_path / "run").glob("**/history.json")
    totals: Any = json.loads(history.read_text())["total"]
    assert len(totals) == 3

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
from test_captured import SIMILAR, UNLIKE, batches_of, model_of
from test_recipes import tiny, tiny_arguments

from blipfast.train.captured import CapturedStep
from blipfast.train.config import FitConfig, ObjectiveConfig, packaged_configs
from blipfast.train.engine import fit
from blipfast.train.recipes import RECIPES, run_training

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
        ["--fit.precision", "bf16", "--fit.cuda_graph", "true"],
    ],
    ids=" ".join,
)
def test_ways_to_train(options: list[str], tmp_path: Path) -> None:
    history = run_training(tiny("pretrain", tmp_path, *ON_CARD, *options, "--fit.steps", "6"))
    assert len(history.total) == 6
    assert all(torch.tensor(history.total).isfinite())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_a_recorded_run_is_the_plain_run(task: str, precision: Any) -> None:
    """Two rooms, each recorded once and replayed; the same negatives are drawn."""
    batches = batches_of([*SIMILAR, *UNLIKE, *SIMILAR, *UNLIKE, *UNLIKE])
    config = FitConfig(steps=len(batches), learning_rate=1e-3, precision=precision, grad_clip=1.0)
    ways = {
        "plain": RECIPES[task].make_step(ObjectiveConfig(queue_size=24), config),
        "recorded": CapturedStep(lambda step: 0.4 * min(1, step / (2 * len(batches))), 0),
    }
    models = {name: model_of(task).to("cuda") for name in ways}
    found = {
        name: fit(models[name], batches, step, config, title=name) for name, step in ways.items()
    }
    most = 1e-3 if precision == "fp32" else 3e-2
    for name, losses in found["plain"].losses.items():
        torch.testing.assert_close(found["recorded"].losses[name], losses, rtol=most, atol=most)
    recorded: Any = ways["recorded"]
    assert [known.recorded for known in recorded._passes.values()] == [True, True]
    queues = [model.state_dict()["queue.ptr"] for model in models.values()]
    assert torch.equal(*queues)


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

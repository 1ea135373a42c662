"""Recorded steps train as plain ones do. Without a GPU a stand-in records, and runs them anew."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blipfast.checkpoints.load import build
from blipfast.errors import ConfigError, ShapeError
from blipfast.models.blip import Blip
from blipfast.models.config import blip_config
from blipfast.train import captured, parallel
from blipfast.train.captured import CapturedStep
from blipfast.train.config import FitConfig, ObjectiveConfig
from blipfast.train.engine import fit
from blipfast.train.recipes import RECIPES, run_training

sys.path.insert(0, str(Path(__file__).parent))
from test_recipes import tiny
from toy import Again

SIZE, COUNT = 32, 4


def model_of(task: str) -> Blip:
    torch.manual_seed(0)
    config = blip_config("blip_tiny", image_size=SIZE)
    text = dataclasses.replace(config.text, dropout=0.0, attention_dropout=0.0)
    objective = ObjectiveConfig(queue_size=24)
    options = RECIPES[task].options(objective)
    return build(task, dataclasses.replace(config, text=text), options)


def batches_of(lengths_of_each: list[list[int]]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    words = blip_config("blip_tiny").text.vocab_size - 10
    batches = []
    for lengths in lengths_of_each:
        width = max(lengths)
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(103, words, (len(lengths), width), generator=generator)
        pixels = torch.randn(len(lengths), 3, SIZE, SIZE, generator=generator)
        batch: dict[str, Tensor] = {"pixel_values": pixels, "input_ids": ids * mask}
        batches.append(batch | {"attention_mask": mask, "image_ids": torch.arange(len(lengths))})
    return batches


SIMILAR = [[3, 12, 7, 5], [5, 5, 9, 4], [8, 3, 3, 12], [14, 9, 5, 6]]
UNLIKE = [[30, 25, 28, 29]]


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_trains_as_plain_steps_do(task: str) -> None:
    batches = batches_of(SIMILAR + UNLIKE + SIMILAR)
    config = FitConfig(steps=len(batches), learning_rate=1e-3, grad_clip=1.0)
    plain, recorded = model_of(task), model_of(task)
    objective = ObjectiveConfig(queue_size=24)
    step = RECIPES[task].make_step(objective, config)
    graphs: list[Again] = []

    def graph() -> Again:
        graphs.append(Again())
        return graphs[-1]

    captured_step = CapturedStep(lambda step: 0.4 * min(1, step / (2 * len(batches))), 0, graph)
    expected = fit(plain, batches, step, config, title="plain")
    found = fit(recorded, batches, captured_step, config, title="recorded")
    for name, losses in expected.losses.items():
        torch.testing.assert_close(found.losses[name], losses, rtol=1e-4, atol=1e-5)
    theirs = plain.state_dict()
    for name, weight in recorded.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4)
    # Two rooms: one for all batches that are alike, and one whose batch came once.
    assert [graph.did for graph in graphs] == [
        ["warm-up", "record", *["replay"] * 7],
        ["warm-up"],
    ]


def test_a_recording_reads_what_is_written_for_it() -> None:
    """The tensors of inputs, losses and gradients stay the same from step to step."""
    model, step = model_of("pretrain").train(), CapturedStep(lambda step: 0.4, 0, Again)
    places = []
    for number, batch in enumerate(batches_of(SIMILAR)):
        step(model, batch, number, 0.0)
        places.append({key: tensor.data_ptr() for key, tensor in step._buffers.items()})
    assert all(place == places[0] for place in places)
    assert float(step._buffers["step", (), torch.int64, torch.device("cpu")]) == 3


def test_rare_rooms_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "_MOST_GRAPHS", 1)
    model, step = model_of("pretrain").train(), CapturedStep(lambda step: 0.4, 0, Again)
    for batch in batches_of([*SIMILAR[:1], *UNLIKE, *UNLIKE, *SIMILAR[:1]]):
        step(model, batch, 0, 0.0)
    assert [known.recorded for known in step._passes.values()] == [True]


def test_an_empty_text_is_named() -> None:
    batch = batches_of([[3, 4, 0, 2]])[0]
    with pytest.raises(ShapeError, match="text 2 of the batch has no tokens"):
        CapturedStep(lambda step: 0.4, 0, Again)(model_of("pretrain"), batch, 0, 0.0)


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_ranks_keep_to_their_own_negatives(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match=f"negatives of the own rank.*=false for {task}"):
        parallel.lay_out(model_of(task), FitConfig(steps=1, cuda_graph=True))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("pretrain", [], "fit.cuda_graph is for GPUs, this run is on a cpu"),
        ("pretrain", ["--fit.micro_batch", "2"], "does not go with fit.micro_batch"),
        ("pretrain", ["--fit.parallel", "fsdp"], "does not go with fit.parallel=fsdp"),
        ("retrieval_coco", ["--fit.grad_checkpointing", "true"], "fit.grad_checkpointing"),
        ("vqa", [], "fit.cuda_graph is for pretrain and retrieval, not for vqa"),
    ],
)
def test_where_it_is_not_for(name: str, options: list[str], said: str, tmp_path: Path) -> None:
    config = tiny(name, tmp_path, "--fit.cuda_graph", "true", "--device", "cpu", *options)
    with pytest.raises(ConfigError, match=said):
        run_training(config)

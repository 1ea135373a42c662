"""The published checkpoints' key names and shapes, at base and large size, load strictly."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from blipfast.checkpoints.load import build, plan_transfer, tie_groups
from blipfast.checkpoints.mapping import Tensors
from blipfast.checkpoints.rules import TRANSFERS
from blipfast.checkpoints.source import original_source
from blipfast.errors import CheckpointError
from blipfast.models.config import blip_config

KEYS = Path(__file__).parent.parent / "fixtures" / "reference" / "original_state_dict_keys.json"
TASK_OF_CLASS = {
    "pretrain": "pretrain",
    "decoder": "caption",
    "itm": "retrieval",
    "retrieval": "retrieval",
    "vqa": "vqa",
    "nlvr": "nlvr",
    "feature_extractor": "features",
}


@cache
def _lists() -> dict[str, dict]:
    return json.loads(KEYS.read_text())


def _source(name: str):
    listed = _lists()[name]
    shapes = {key: tuple(shape) for key, shape in listed["keys"].items()}
    dtypes = {
        key: getattr(torch, d.removeprefix("torch.")) for key, d in listed["non_float32"].items()
    }

    def read(key: str) -> torch.Tensor:
        raise AssertionError(f"planning reads no weights, but {key} was asked for")

    tensors = Tensors(shapes, {**dict.fromkeys(shapes, torch.float32), **dtypes}, read)
    return original_source(tensors, None, None, name)


def _plan(source, task: str, **options):
    with torch.device("meta"):
        model = build(task, source.config, options)
    return model, plan_transfer(source, model, task)


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("name", TASK_OF_CLASS)
def test_own_task(name: str, size: str) -> None:
    source = _source(f"{name}_{size}")
    task = TASK_OF_CLASS[name]
    assert source.task == task
    options = {"train_state": True} if name == "retrieval" else {}
    model, plan = _plan(source, task, **options)
    assert set(plan.reads) == {names[0] for names, _ in tie_groups(model)} - {
        key for keys in plan.report.fresh.values() for key in keys
    }
    assert set(plan.report.unused) <= {"position ids", "momentum cross-attention"}
    assert plan.report.fresh == ({"temperature": ["temp"]} if name == "itm" else {})
    # Every weight is there: the model has as many trainable parameters as the original says.
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    temperature = name == "itm"
    assert trainable - temperature == _lists()[f"{name}_{size}"]["n_trainable"]


@pytest.mark.parametrize("name", ["pretrain_base", "pretrain_large"])
def test_architecture_is_the_preset(name: str) -> None:
    source = _source(name)
    assert source.config == blip_config(f"blip_{name.removeprefix('pretrain_')}")


@pytest.mark.parametrize("task", [dst for src, dst in TRANSFERS if src == "pretrain"])
def test_pretrained_base_becomes(task: str) -> None:
    _, plan = _plan(_source("pretrain_base"), task)
    fresh = {rule for rule, names in plan.report.fresh.items() if names}
    assert fresh == ({"class head", "merge layers"} if task == "nlvr" else set())


def test_pretrained_large_becomes_vqa_only_when_asked() -> None:
    source = _source("pretrain_large")
    with torch.device("meta"):
        model = build("vqa", source.config, {})
    with pytest.raises(CheckpointError, match=r"\[1536, 1024\].*\[1536, 768\]") as error:
        plan_transfer(source, model, "vqa")
    assert "allow_fresh=True" in str(error.value)
    report = plan_transfer(source, model, "vqa", allow_fresh=True).report
    (rule,) = report.fresh
    assert "decoder cross-attention" in rule
    # Keys and values of 12 layers: the biases fit, the weights do not.
    assert len(report.fresh[rule]) == 12

"""A checkpoint appears whole, by itself, and what a killed run left is cleared away."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from blipfast.errors import CheckpointError, TrainingError
from blipfast.train.checkpoints import Checkpoints, read_facts


def state() -> dict[str, torch.Tensor]:
    return {"model.w": torch.arange(12.0).view(3, 4), "model.n": torch.tensor(7)}


def test_it_appears_without_being_waited_for(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    tensors = state()
    checkpoints.save(5, tensors, {"note": "hello"})
    tensors["model.w"].zero_()  # it was copied
    end = time.monotonic() + 20
    while not checkpoints.all() and time.monotonic() < end:
        time.sleep(0.01)
    [path] = checkpoints.all()
    assert read_facts(path)["note"] == "hello"
    loaded = {name: torch.zeros_like(t) for name, t in state().items()}
    assert checkpoints.load(path, loaded, optional="rng.")["step"] == 5
    assert all(torch.equal(loaded[name], t) for name, t in state().items())
    checkpoints.close()


def test_left_overs_of_a_killed_run_go(tmp_path):
    for name in (".step-00000003.tmp", ".step-00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00007-model.safetensors").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.latest() is None
    checkpoints.save(3, state(), {})
    checkpoints.save(4, state(), {})
    checkpoints.close()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_a_name_that_cannot_be_given_is_an_error(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)

    real = os.replace

    def refuse(source, target):
        if Path(target).name == "step-00000002":
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    checkpoints.save(2, state(), {})
    with pytest.raises(TrainingError, match=r"step-00000002: Permission denied"):
        checkpoints.finish()
    assert not list(tmp_path.iterdir())


def test_another_format_is_named(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "state.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="has format 99"):
        read_facts(tmp_path / "step-00000001")

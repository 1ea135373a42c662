"""Loading: every key accounted for, transfers by rule, bad checkpoints refused in words."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from blipfast import load_model
from blipfast.checkpoints.rules import TASKS, TRANSFERS, targets_of
from blipfast.errors import CheckpointError, ConfigError
from blipfast.models.config import blip_config

REFERENCE = Path(__file__).parent.parent / "fixtures" / "reference"
OWN = ["pretrain", "caption", "retrieval", "vqa", "nlvr"]


def _path(name: str) -> Path:
    return REFERENCE / name / "checkpoint.pth"


def _state(name: str) -> dict[str, torch.Tensor]:
    return torch.load(_path(name), weights_only=True)["model"]


def _config(name: str):
    return load_model(_path(name)).config


@pytest.mark.parametrize("name", OWN)
def test_a_models_tensors_are_the_checkpoints(name: str) -> None:
    model, report = load_model(_path(name), return_report=True)
    assert type(model) is TASKS[name]
    assert not model.training
    state = _state(name)
    qkv = model.state_dict()[
        next(n for n in model.state_dict() if n.endswith("layers.1.self_attention.qkv.weight"))
    ]
    part = "text_decoder.bert" if name == "caption" else "text_encoder"
    joined = [
        state[f"{part}.encoder.layer.1.attention.self.{p}.weight"]
        for p in ("query", "key", "value")
    ]
    assert torch.equal(qkv, torch.cat(joined))
    assert not report.fresh
    assert not report.copied


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("change", ["missing", "left over", "misshapen"])
def test_nothing_is_dropped_in_silence(name: str, change: str) -> None:
    state = dict(_state(name))
    key = "visual_encoder.blocks.1.mlp.fc1.bias"
    if change == "missing":
        del state[key]
    elif change == "left over":
        state["visual_encoder.blocks.1.mlp.fc3.bias"] = torch.zeros(3)
        key = "visual_encoder.blocks.*.mlp.fc3.bias [3]"
    else:
        state[key] = torch.zeros(5)
        key = "[5] in the checkpoint, [256] here"
    with pytest.raises(CheckpointError) as error:
        load_model(state, config=_config(name))
    message = str(error.value)
    assert f"{change} (1 tensors)" in message
    assert key.replace("blocks.1", "blocks.*") in message


def test_half_of_a_joined_tensor_is_missing() -> None:
    state = _state("caption")
    del state["text_decoder.bert.encoder.layer.0.attention.self.key.bias"]
    with pytest.raises(CheckpointError, match=r"lacks:\n.*layer\.0\.attention\.self\.key\.bias"):
        load_model(state, config=_config("caption"))


def test_tied_tensors_must_agree() -> None:
    state = dict(_state("pretrain"))
    key = "text_decoder.bert.encoder.layer.0.output.dense.bias"
    state[key] = state[key] + 1
    with pytest.raises(CheckpointError, match="sharing"):
        load_model(state, config=_config("pretrain"))

    untied = dataclasses.replace(_config("pretrain"), sharing="nothing")
    model = load_model(state, config=untied)
    assert torch.equal(model.text_decoder.layers[0].feed_forward.out.dense.bias, state[key])


def test_copies_of_the_output_bias_must_agree() -> None:
    state = dict(_state("caption"))
    key = "text_decoder.cls.predictions.decoder.bias"
    state[key] = state[key] + 1
    with pytest.raises(CheckpointError, match="must be equal"):
        load_model(state, config=_config("caption"))


@pytest.mark.parametrize("source", OWN)
@pytest.mark.parametrize("task", TASKS)
def test_every_pair_of_tasks_loads_by_rule_or_is_refused(source: str, task: str) -> None:
    if (source, task) in TRANSFERS:
        model, report = load_model(_path(source), task, return_report=True)
        assert type(model) is TASKS[task]
        assert report.source_task == source
        return
    with pytest.raises(CheckpointError) as error:
        load_model(_path(source), task)
    message = str(error.value)
    assert f"({source}) does not fit the model ({task})" in message
    assert f"it can be loaded as: {', '.join(targets_of(source))}" in message
    assert "missing" in message or "left over" in message


def test_pretraining_to_nlvr_copies_the_cross_attention_into_both_branches() -> None:
    model, report = load_model(_path("pretrain"), "nlvr", return_report=True)
    state = _state("pretrain")
    cross = model.text_encoder.layers[1].cross_attention
    query = state["text_encoder.encoder.layer.1.crossattention.self.query.weight"]
    for branch in cross.attentions:
        assert torch.equal(branch.query.weight, query)
    for dense in cross.dense:
        weight = state["text_encoder.encoder.layer.1.crossattention.output.dense.weight"]
        assert torch.equal(dense.weight, weight)
    assert report.fresh == {
        "class head": [f"cls_head.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    }
    assert "both image branches" in str(report)


def test_pretraining_to_retrieval_with_training_state() -> None:
    model, report = load_model(_path("pretrain"), "retrieval", train_state=True, return_report=True)
    state = _state("pretrain")
    assert torch.equal(model.twin.text_proj.weight, state["text_proj_m.weight"])
    assert torch.equal(model.queue.image_queue, state["image_queue"].T)
    assert (model.queue.id_queue == -100).all()
    assert report.fresh == {"feature queue": ["queue.id_queue"]}


def test_a_queue_of_another_size_starts_afresh_as_a_whole() -> None:
    model, report = load_model(_path("pretrain"), queue_size=10, return_report=True)
    assert model.queue.image_queue.shape[0] == 10
    assert model.queue.ptr.item() == 0, "a pointer into the old queue means nothing"
    (names,) = report.fresh.values()
    assert set(names) == {"queue.image_queue", "queue.text_queue", "queue.ptr"}


def test_a_scorer_without_twin_gets_a_copy_of_itself() -> None:
    state = {n: t for n, t in _state("retrieval").items() if "_m." not in n and "queue" not in n}
    model, report = load_model(
        state, config=_config("retrieval"), train_state=True, queue_size=6, return_report=True
    )
    assert torch.equal(model.twin.vision_proj.weight, model.vision_proj.weight)
    assert not model.twin.vision_proj.weight.requires_grad
    assert list(report.copied) == ["momentum twin copied from the model"]
    assert list(report.fresh) == ["feature queue"]


def test_options_and_precision() -> None:
    model = load_model(_path("caption"), label_smoothing=0.0, dtype=torch.bfloat16)
    assert model.label_smoothing == 0.0
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    double = {n: t.double() if t.is_floating_point() else t for n, t in _state("caption").items()}
    key = "visual_encoder.cls_token"
    double[key] = double[key] + 1e-12
    model = load_model(double, config=_config("caption"))
    assert torch.equal(model.visual_encoder.cls_token, double[key])
    with pytest.raises(ConfigError, match="label_smothing"):
        load_model(_path("caption"), label_smothing=0.0)
    with pytest.raises(ConfigError, match="no task 'captions'"):
        load_model(_path("caption"), "captions")


def test_heads_that_shapes_do_not_tell(tmp_path: Path) -> None:
    shutil.copy(_path("caption"), tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="number of heads; pass config="):
        load_model(tmp_path / "checkpoint.pth")
    by_preset = load_model(tmp_path / "checkpoint.pth", config="blip_tiny")
    assert by_preset.config == blip_config("blip_tiny")
    config = _config("caption").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path / "checkpoint.pth").config.to_dict() == config


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 cut"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or no torch checkpoint"):
        load_model(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(_path("caption").read_bytes()[:40_000])
    with pytest.raises(CheckpointError, match="damaged or no torch checkpoint"):
        load_model(path, config="blip_tiny")


class _Unwanted:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"temp": torch.zeros(())}, "extra": _Unwanted()}, "checkpoint.pth")
    with pytest.raises(CheckpointError, match="damaged or no torch checkpoint"):
        load_model("checkpoint.pth")
    assert not Path("executed").exists()


def test_other_things_than_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="'bert' model of transformers, not 'blip'"):
        load_model(tmp_path)
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is no BLIP checkpoint: it lacks"):
        load_model(tmp_path / "other.pth")
    torch.save({"model": {"step": 3}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_model(tmp_path / "other.pth")

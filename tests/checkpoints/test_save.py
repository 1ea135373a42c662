"""Writing: bitwise round trips in every direction, whole directories or none."""

from __future__ import annotations

import dataclasses
import errno
import json
import resource
from pathlib import Path

import pytest
import torch

from blipfast import load_model
from blipfast.checkpoints import convert, original_state_dict, save_hf, save_model
from blipfast.checkpoints import save as save_module
from blipfast.checkpoints.rules import TASKS
from blipfast.checkpoints.source import open_weights
from blipfast.errors import CheckpointError, ConfigError
from blipfast.models.config import blip_config

REFERENCE = Path(__file__).parent.parent / "fixtures" / "reference"


def _path(name: str) -> Path:
    return REFERENCE / name / "checkpoint.pth"


def _tiny(task: str, **options):
    config = blip_config("blip_tiny")
    if task == "visdial":  # a caption projection exists only where widths differ
        config = dataclasses.replace(
            config, vision=dataclasses.replace(config.vision, hidden_size=48, num_heads=4)
        )
    if task in ("pretrain", "retrieval"):
        options = {"queue_size": 8, **options}
    return TASKS[task](config, **options).eval()


def _same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("task", TASKS)
def test_our_own_format(task: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = _tiny(task).to(dtype)
    save_model(model, tmp_path / "a")
    again, report = load_model(tmp_path / "a", return_report=True)
    assert type(again) is type(model)
    assert again.config == model.config
    assert not report.fresh
    assert not report.copied
    assert not report.unused
    _same(model, again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("pretrain", {"momentum": 0.9, "exclude_equal_ids": True, "label_smoothing": 0.2}),
        ("retrieval", {"train_state": True, "negatives_from_all_ranks": False}),
        ("vqa", {"label_smoothing": 0.0}),
    ],
)
def test_options_are_kept(task: str, options: dict, tmp_path: Path) -> None:
    model = _tiny(task, **options)
    save_model(model, tmp_path / "a")
    again = load_model(tmp_path / "a")
    for name, value in options.items():
        if name != "train_state":
            assert getattr(again, name) == value
    _same(model, again)


def test_trained_state_survives(tmp_path: Path) -> None:
    model = _tiny("pretrain")
    model.queue.ptr.fill_(5)
    model.twin.vision_proj.weight.add_(1)
    save_model(model, tmp_path / "a")
    again = load_model(tmp_path / "a")
    _same(model, again)
    assert again.text_decoder.embeddings is again.text_encoder.embeddings
    assert again.text_decoder.lm_head.decoder.weight is again.text_encoder.embeddings.word.weight


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    model = _tiny("pretrain")
    save_model(model, tmp_path / "a")
    stored = open_weights(tmp_path / "a").shapes
    assert "text_encoder.embeddings.word.weight" in stored
    assert not any(n.startswith("text_decoder.embeddings") for n in stored)
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers())
    assert sum(torch.Size(shape).numel() for shape in stored.values()) == parameters + buffers


@pytest.mark.parametrize("sharing", ["all", "nothing", "all_but_cross_attention"])
def test_other_sharings(sharing: str, tmp_path: Path) -> None:
    config = dataclasses.replace(blip_config("blip_tiny"), sharing=sharing)
    model = TASKS["pretrain"](config, queue_size=4)
    save_model(model, tmp_path / "a")
    _same(model, load_model(tmp_path / "a"))
    # A captioner made of it has the decoder's own copy of what was shared.
    captioner = load_model(tmp_path / "a", "caption")
    weight = captioner.text_decoder.layers[0].cross_attention.attention.query.weight
    assert torch.equal(weight, model.text_decoder.layers[0].cross_attention.attention.query.weight)


@pytest.mark.parametrize("name", ["pretrain", "caption", "retrieval", "vqa", "nlvr"])
def test_original_ours_original(name: str, tmp_path: Path) -> None:
    state = torch.load(_path(name), weights_only=True)["model"]
    options = {"train_state": True} if name == "retrieval" else {}
    convert(_path(name), tmp_path / "ours", "blipfast", **options)
    back = original_state_dict(load_model(tmp_path / "ours"))
    dropped = {
        key
        for key in state
        if "position_ids" in key or (key.startswith("text_encoder_m.") and "crossatt" in key)
    }
    assert back.keys() == state.keys() - dropped
    for key, tensor in back.items():
        assert tensor.shape == state[key].shape, key
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("task", ["caption", "vqa", "retrieval"])
def test_ours_transformers_ours(task: str, tmp_path: Path) -> None:
    config = dataclasses.replace(blip_config("blip_tiny"), temperature=0.05)
    model = TASKS[task](config).eval()
    save_model(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    report = convert(tmp_path / "hf", tmp_path / "again", "blipfast")
    again = load_model(tmp_path / "again")
    assert again.config == model.config
    # transformers' scorer has no temperature; it starts from the configuration's.
    assert list(report.fresh) == (["temperature"] if task == "retrieval" else [])
    _same(model, again)


def test_pretrained_original_to_a_transformers_captioner(tmp_path: Path) -> None:
    report = convert(_path("pretrain"), tmp_path / "hf", "hf", task="caption")
    assert "text encoder" in report.unused
    one, other = load_model(_path("pretrain"), "caption"), load_model(tmp_path / "hf")
    _same(one, other)
    with pytest.raises(CheckpointError, match="no class for a 'pretrain' model"):
        convert(_path("pretrain"), tmp_path / "no", "hf")
    with pytest.raises(ConfigError, match="no format 'onnx'"):
        convert(_path("pretrain"), tmp_path / "no", "onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "no").exists()


def test_vqa_that_transformers_cannot_hold(tmp_path: Path) -> None:
    config = blip_config("blip_tiny")
    vision = dataclasses.replace(config.vision, hidden_size=32)
    model = TASKS["vqa"](dataclasses.replace(config, vision=vision))
    with pytest.raises(CheckpointError, match="widths 64 and 32"):
        save_hf(model, tmp_path / "hf")


def test_a_tokenizer_goes_along(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    save_hf(_tiny("caption"), tmp_path / "hf", Tokenizer())
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    model = _tiny("caption")
    save_model(model, tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        save_model(_tiny("caption"), tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    other = _tiny("caption")
    save_model(other, tmp_path / "a", overwrite=True)
    _same(other, load_model(tmp_path / "a"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="is no checkpoint, so it is not overwritten"):
        save_model(model, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("save", [save_model, save_hf])
def test_a_file_that_cannot_be_written_whole(save, tmp_path: Path) -> None:
    """The system stops the write half-way, as a full disk or a quota does."""
    good = _tiny("caption")
    save(good, tmp_path / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            save(_tiny("caption"), tmp_path / "a", overwrite=True)
        with pytest.raises(CheckpointError, match="cannot write"):
            save(good, tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "nothing half-written is left"
    _same(good, load_model(tmp_path / "a"))


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_module, "save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full; free some space"):
        save_model(_tiny("caption"), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(tensors: dict, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(save_module, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(_tiny("caption"), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_a_newer_format(tmp_path: Path) -> None:
    save_model(_tiny("caption"), tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "version": 99}))
    with pytest.raises(CheckpointError, match="format version 99"):
        load_model(tmp_path / "a")
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "model"}))
    with pytest.raises(CheckpointError, match="lacks 'model'"):
        load_model(tmp_path / "a")


def test_weights_are_missing_or_damaged(tmp_path: Path) -> None:
    save_model(_tiny("caption"), tmp_path / "a")
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_model(tmp_path / "a")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load_model(tmp_path / "a")

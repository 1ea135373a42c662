"""The packaged recipes say what the paper and the original say, and every one of them trains."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import blipfast
from blipfast.cli._parsing import add_dataclass, make_parser, parse_as
from blipfast.data import load_tokenizer
from blipfast.errors import CheckpointError, ConfigError, DataError
from blipfast.train.config import TrainConfig, packaged_configs
from blipfast.train.history import History
from blipfast.train.recipes import RECIPES, build_model, pick_device, run_training

sys.path.insert(0, str(Path(__file__).parent))
from shards import (
    VOCABULARY,
    captions,
    dialogues,
    pairs,
    picture,
    questions,
    record,
    tokenizer,
    write,
)
from toy import saved_weights

RECORDS = {
    "pretrain": captions, "retrieval": captions, "caption": captions, "vqa": questions,
    "visdial": dialogues,
}  # fmt: skip
TINY = """--model.preset blip_tiny --model.image_size 32 --data.batch_size 4 --data.threads 2
    --objective.queue_size 24 --fit.steps 2""".split()  # noqa: SIM905 - as on a command line


def read(name: str, *overrides: str) -> TrainConfig:
    return parsed(["--config", name, *overrides])


def parsed(arguments: list[str]) -> TrainConfig:
    parser = make_parser("train", "")
    add_dataclass(parser, TrainConfig)
    return parse_as(TrainConfig, parser, arguments, packaged_configs())


def tiny_arguments(name: str, folder: Path, *overrides: str) -> list[str]:
    """What `blipfast train` is given for two small steps of a recipe; its shards are written."""
    task = read(name).task
    records = pairs(8) if task == "nlvr" else RECORDS[task](8)
    shards = write(folder / "shards", records) if not (folder / "shards").exists() else None
    return [
        "--config", name, *TINY, "--data.mix", "null",
        "--data.shards", str(shards or folder / "shards"), "--data.max_dialogue_length", "40",
        "--data.vocabulary", str(VOCABULARY), "--output", str(folder / "run"), *overrides,
    ]  # fmt: skip


def tiny(name: str, folder: Path, *overrides: str) -> TrainConfig:
    return parsed(tiny_arguments(name, folder, *overrides))


# task, preset, image, batch, learning rate, schedule, epochs: the table of the original.
TABLE = {
    "pretrain": ("pretrain", "blip_base", 224, 90, 3e-4, "step", 20),
    "pretrain_large": ("pretrain", "blip_large", 224, 75, 2e-4, "step", 20),
    "retrieval_coco": ("retrieval", "blip_base", 384, 32, 1e-5, "cosine", 6),
    "retrieval_flickr": ("retrieval", "blip_base", 384, 32, 1e-5, "cosine", 6),
    "caption_coco": ("caption", "blip_base", 384, 32, 1e-5, "cosine", 5),
    "vqa": ("vqa", "blip_base", 480, 16, 2e-5, "cosine", 10),
    "nlvr": ("nlvr", "blip_base", 384, 16, 3e-5, "cosine", 15),
    # The paper's.
    "pretrain_14m": ("pretrain", "blip_base", 224, 90, 3e-4, "step", 20),
    "pretrain_129m": ("pretrain", "blip_base", 224, 90, 3e-4, "step", 20),
    "pretrain_large_129m": ("pretrain", "blip_large", 224, 75, 2e-4, "step", 20),
    "capfilt_captioner": ("caption", "blip_base", 384, 32, 1e-5, "cosine", 5),
    "capfilt_captioner_large": ("caption", "blip_large", 384, 16, 2e-6, "cosine", 5),
    "capfilt_filter": ("retrieval", "blip_base", 384, 32, 1e-5, "cosine", 6),
    "capfilt_filter_large": ("retrieval", "blip_large", 384, 16, 5e-6, "cosine", 6),
    "retrieval_coco_large": ("retrieval", "blip_large", 384, 16, 5e-6, "cosine", 6),
    "caption_coco_large": ("caption", "blip_large", 384, 16, 2e-6, "cosine", 5),
    "visdial": ("visdial", "blip_base", 384, 16, 2e-5, "cosine", 10),
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_settings_are_the_published_ones(name):
    config = read(name)
    got = (
        config.task, config.model.preset, config.model.image_size, config.data.batch_size,
        config.fit.learning_rate, config.fit.schedule, config.fit.epochs,
    )  # fmt: skip
    assert got == TABLE[name]
    assert config.fit.weight_decay == 0.05
    if config.task in ("pretrain", "retrieval"):
        assert config.objective.queue_size == 57_600
        assert (config.objective.momentum, config.objective.alpha) == (0.995, 0.4)


@pytest.mark.parametrize("name", ["pretrain", "retrieval_coco", "caption_coco", "vqa"])
def test_parts_of_a_batch_under_fsdp(name: str, tmp_path: Path) -> None:
    """The same steps as with whole parameters, also where one part holds the whole batch."""
    totals = []
    for parallel, size in (("ddp", "2"), ("fsdp", "2"), ("fsdp", "99")):
        options = ["--device", "cpu", "--fit.micro_batch", size, "--fit.parallel", parallel]
        options += ["--fit.precision", "fp32"]  # bf16 rounds parts of another size otherwise
        totals.append(run_training(tiny(name, tmp_path / (parallel + size), *options)).total)
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)
    assert totals[2] == pytest.approx(totals[0], rel=1e-5)


def test_every_packaged_recipe_is_in_the_table():
    assert set(packaged_configs()) == set(TABLE)
    assert {values[0] for values in TABLE.values()} == set(RECIPES)


def test_details_of_the_recipes():
    pretrain = read("pretrain")
    assert (pretrain.fit.warmup_steps, pretrain.fit.warmup_learning_rate) == (3000, 1e-6)
    assert (pretrain.fit.decay, pretrain.fit.min_learning_rate) == (0.9, 1e-6)
    assert pretrain.objective.alpha_ramp_epochs == 2
    coco, flickr = read("retrieval_coco"), read("retrieval_flickr")
    assert coco.objective.alpha_ramp_epochs == flickr.objective.alpha_ramp_epochs == 1
    assert coco.objective.negatives_from_all_ranks
    assert not flickr.objective.negatives_from_all_ranks
    for name, images in (("pretrain_14m", 5), ("pretrain_129m", 6), ("pretrain_large_129m", 6)):
        paper = read(name)
        assert (paper.fit.decay, len(paper.data.sources)) == (0.85, images)
    assert read("pretrain_129m").data.sources["shards/laion"] == 0.2
    assert not read("visdial").data.flip
    caption = read("caption_coco")
    assert (caption.data.prompt, caption.data.max_length) == ("a picture of ", 40)
    assert read("vqa").model.drop_path_rate == read("nlvr").model.drop_path_rate == 0.1


@pytest.mark.parametrize("name", sorted(TABLE))
def test_two_steps_of_every_recipe(name, tmp_path):
    config = tiny(name, tmp_path)
    history = run_training(config)
    assert len(history.total) == 2
    assert all(torch.tensor(history.total).isfinite())
    output = tmp_path / "run"
    assert History.from_json(output / "history.json") == history
    assert json.loads((output / "train.json").read_text())["fit"]["steps_per_epoch"] == 2
    model = blipfast.load_model(output / "model", config.task)
    assert model.config.vision.drop_path_rate == (config.model.drop_path_rate or 0.0) or (
        config.model.preset == "blip_large"
    )
    assert load_tokenizer(None, str(output / "model")).vocab == tokenizer().vocab
    state = model.state_dict()
    trained = saved_weights(output / "checkpoint")
    assert trained.keys() <= state.keys()  # a shared module is saved once
    for key, value in trained.items():
        assert torch.equal(value, state[key]), key


def test_captioner_from_a_pretrained_model_at_another_size(tmp_path):
    run_training(tiny("pretrain", tmp_path))
    config = read(
        "caption_coco", *TINY, "--data.shards", str(tmp_path / "shards"), "--model.checkpoint",
        str(tmp_path / "run" / "model"), "--model.image_size", "48", "--model.drop_path_rate",
        "0.1", "--output", str(tmp_path / "captioner"),
    )  # fmt: skip
    run_training(config)
    model = blipfast.load_model(tmp_path / "captioner" / "model")
    assert model.config.vision.image_size == 48
    assert model.config.vision.drop_path_rate == 0.1


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = run_training(tiny("pretrain", tmp_path, "--fit.steps", "3"))
    state = saved_weights(tmp_path / "run/checkpoint")
    first = tiny("pretrain", tmp_path, "--fit.steps", "1", "--output", str(tmp_path / "parts"))
    run_training(first)
    with pytest.raises(ConfigError, match="holds a run already"):
        run_training(first)
    both = run_training(replace(first, resume=True, fit=replace(first.fit, steps=3)))
    assert both.total == whole.total
    resumed = saved_weights(tmp_path / "parts/checkpoint")
    assert all(torch.equal(state[name], resumed[name]) for name in state)


def test_nan_image_features_leave_the_queue_clean(tmp_path):
    """A skipped step must not leave its features among the negatives."""
    from blipfast.train import FitConfig, ShardBatches, fit

    config = tiny("pretrain", tmp_path)
    torch.manual_seed(0)
    model = build_model(config.model, RECIPES["pretrain"], config.objective, tokenizer())
    batches = list(ShardBatches(config.data, tokenizer(), 32, "pretrain").epoch(0))
    batches[0]["pixel_values"][1, 0, 3, 3] = float("nan")
    run = FitConfig(steps=2, on_nonfinite="skip")
    step = RECIPES["pretrain"].make_step(config.objective, run)
    history = fit(model, batches, step, run, title="pretrain")
    assert history.skipped == [0]
    assert history.steps == [1]
    assert all(t.isfinite().all() for t in model.state_dict().values() if t.is_floating_point())


def test_bad_records_are_listed(tmp_path):
    records = captions(12)
    records[2] = record(2, [("a dog", "human")], image=picture(2)[:200])
    write(tmp_path / "shards", records)
    config = tiny(
        "pretrain", tmp_path, "--data.max_bad_fraction", "0.2", "--fit.steps", "null",
        "--fit.epochs", "1", "--data.drop_last", "false",
    )  # fmt: skip
    run_training(config)
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["key"] for row in rows] == ["r002"]


def test_errors_before_anything_is_written(tmp_path):
    config = tiny("pretrain", tmp_path)
    with pytest.raises(DataError, match="no shard matches"):
        run_training(replace(config, data=replace(config.data, shards=str(tmp_path / "none"))))
    with pytest.raises(ConfigError, match=r"give data\.vocabulary"):
        run_training(replace(config, data=replace(config.data, vocabulary=None)))
    with pytest.raises(ConfigError, match="no preset 'huge'"):
        run_training(replace(config, model=replace(config.model, preset="huge")))
    missing = replace(config.model, checkpoint=str(tmp_path / "none.pth"))
    with pytest.raises(CheckpointError):
        run_training(replace(config, model=missing))
    with pytest.raises(ConfigError, match=r"fit\.steps or fit\.epochs"):
        run_training(replace(config, fit=replace(config.fit, steps=None, epochs=None)))
    with pytest.raises(DataError, match="not one batch of 99"):
        run_training(replace(config, data=replace(config.data, batch_size=99)))
    assert not (tmp_path / "run").exists()


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="unknown"):
        pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA card"):
            pick_device("cuda")

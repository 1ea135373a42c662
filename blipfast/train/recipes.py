"""One recipe per task: which model, what a step is, and the whole run from a `TrainConfig`.

The published settings lie in `blipfast/configs/*.yaml` (`config.packaged_configs`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from blipfast.checkpoints import (
    init_from_timm_vit,
    init_text_from_bert,
    load_model,
    save_model,
)
from blipfast.checkpoints.load import build
from blipfast.data import BlipTokenizer, load_tokenizer
from blipfast.errors import ConfigError, DataError
from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig, blip_config
from blipfast.objectives.itc import alpha_at
from blipfast.tasks.in_parts import backward_in_parts
from blipfast.train.batches import ShardBatches, count_samples
from blipfast.train.captured import CapturedStep
from blipfast.train.checkpoints import Checkpoints
from blipfast.train.config import FitConfig, ModelConfig, ObjectiveConfig, TrainConfig
from blipfast.train.dry_run import show_plan
from blipfast.train.engine import Batch, StepFn, StepOutput, fit
from blipfast.train.files import quarantine_log, write_whole
from blipfast.train.flops import peak_flops, sample_flops
from blipfast.train.history import History
from blipfast.train.parallel import whole_state
from blipfast.train.ranks import (
    local_rank,
    process_group,
    rank,
    restarted,
    started_by_torchrun,
    world_size,
)
from blipfast.train.slices import in_slices
from blipfast.train.watch import StepTimer, Watch

Options = Callable[[ObjectiveConfig], dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """A task: its name in `load_model`, its class's options, and its step.

    make_step: from the objective's settings and the run's length, the step function of `fit`.
    """

    task: str
    options: Options
    make_step: Callable[[ObjectiveConfig, FitConfig], StepFn]


def _contrastive_step(objective: ObjectiveConfig, config: FitConfig) -> StepFn:
    """ITC, ITM (and LM in pre-training) with alpha ramped in over the first epochs."""
    length, ramp = config.epoch_length, objective.alpha_ramp_epochs

    def alpha(step: int) -> float:
        return alpha_at(objective.alpha, 0, step, length, ramp)

    if config.cuda_graph:
        return CapturedStep(alpha, config.seed)

    def step(model: Any, batch: Batch, step: int, epoch: float) -> StepOutput:
        images, texts = batch["pixel_values"], (batch["input_ids"], batch["attention_mask"])
        options = {
            "image_ids": batch["image_ids"],
            "alpha": alpha(step),
            "step": step,
            "seed": config.seed,
        }
        # FSDP gathers parameters for the phases of a step, or for `forward`, not for both.
        size, by_phases = config.micro_batch, config.parallel == "fsdp"
        if size is None or (size >= len(images) and not by_phases):
            return model(images, *texts, **options)
        return backward_in_parts(model, images, *texts, micro_batch=size, **options)

    return step


def _caption_step(objective: ObjectiveConfig, config: FitConfig) -> StepFn:
    """LM, with the prompt given rather than learnt."""

    def step(model: Any, batch: Batch, step: int, epoch: float) -> StepOutput:
        return model(
            batch["pixel_values"],
            batch["input_ids"],
            batch["attention_mask"],
            prompt_length=batch.get("prompt_length", 0),
        )

    return in_slices(step, "caption", config.micro_batch)


def _vqa_step(objective: ObjectiveConfig, config: FitConfig) -> StepFn:
    """LM of every answer, weighed by how many gave it."""

    def step(model: Any, batch: Batch, step: int, epoch: float) -> StepOutput:
        return model(
            batch["pixel_values"],
            batch["input_ids"],
            batch["attention_mask"],
            batch["answer_ids"],
            batch["answer_mask"],
            answers_per_question=batch["answers_per_question"],
            weights=batch["weights"],
        )

    return in_slices(step, "vqa", config.micro_batch)


def _nlvr_step(objective: ObjectiveConfig, config: FitConfig) -> StepFn:
    """Cross-entropy over true and false."""

    def step(model: Any, batch: Batch, step: int, epoch: float) -> StepOutput:
        return model(
            batch["pixel_values"],
            batch["input_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
        )

    return in_slices(step, "nlvr", config.micro_batch)


def _visdial_step(objective: ObjectiveConfig, config: FitConfig) -> StepFn:
    """ITM of a right and a wrong answer to a question in its dialogue."""

    def step(model: Any, batch: Batch, step: int, epoch: float) -> StepOutput:
        return model(
            batch["pixel_values"],
            PackedText.from_padded(batch["input_ids"], batch["attention_mask"]),
            PackedText.from_padded(batch["dialogue_ids"], batch["dialogue_mask"]),
            image_index=batch["image_index"].tolist(),
            labels=batch["labels"],
        )

    return in_slices(step, "visdial", config.micro_batch)


def _picked(*names: str, **more: Any) -> Options:
    return lambda objective: {**{n: getattr(objective, n) for n in names}, **more}


RECIPES: dict[str, Recipe] = {
    "pretrain": Recipe(
        "pretrain",
        _picked("queue_size", "momentum", "across_ranks", "exclude_equal_ids", "label_smoothing"),
        _contrastive_step,
    ),
    "retrieval": Recipe(
        "retrieval",
        _picked(
            "queue_size", "momentum", "across_ranks", "negatives_from_all_ranks", train_state=True
        ),
        _contrastive_step,
    ),
    "caption": Recipe("caption", _picked("label_smoothing"), _caption_step),
    "vqa": Recipe("vqa", _picked("label_smoothing"), _vqa_step),
    "nlvr": Recipe("nlvr", _picked(), _nlvr_step),
    "visdial": Recipe("visdial", _picked(), _visdial_step),
}


def run_training(config: TrainConfig, progress: Progress | None = None) -> History:
    """Trains as configured and writes `config.output`; under torchrun on all its ranks.

    There: `model/` (our format, with its vocab.txt), `history.json`, `train.json` (the settings),
    `checkpoint/` to resume from, and `quarantine.jsonl`, a line for each record that is set aside,
    written at once.

    Raises ConfigError, DataError, CheckpointError and TrainingError, in words; Preempted after
    SIGTERM.
    """
    device = pick_device(config.device)
    if config.fit.cuda_graph and config.task not in ("pretrain", "retrieval"):
        raise ConfigError(f"fit.cuda_graph is for pretrain and retrieval, not for {config.task}")
    # A rank that waits for one that hangs should find out by the watchdog, not by this.
    timeout = 2 * config.fit.hang_timeout
    with process_group(device, timeout, alone_too=config.fit.parallel == "fsdp"):
        return _run_on_ranks(config, device, progress)


def _run_on_ranks(config: TrainConfig, device: torch.device, progress: Progress | None) -> History:
    output = Path(config.output)
    _check_output(output, config.resume)
    tokenizer = load_tokenizer(config.data.vocabulary, config.model.checkpoint)
    recipe = RECIPES[config.task]
    torch.manual_seed(config.fit.seed)  # of the weights that start at random
    model = build_model(config.model, recipe, config.objective, tokenizer)
    if config.fit.grad_checkpointing:
        model.checkpoint_gradients()
    fit_config = with_epoch_length(config)
    size = model.config.vision.image_size
    batches = ShardBatches(
        config.data,
        tokenizer,
        size,
        config.task,
        rank=rank(),
        world_size=world_size(),
        device=device,
    )
    if config.dry_run:
        whole = dataclasses.replace(fit_config, micro_batch=None, cuda_graph=False)
        step = recipe.make_step(config.objective, whole)
        if rank() == 0:
            show_plan(config, fit_config, model, batches, step, device)
        return History(config.task)
    settings = dataclasses.asdict(dataclasses.replace(config, fit=fit_config))
    if rank() == 0:
        text = json.dumps(settings, indent=2)
        write_whole(output / "train.json", lambda file: file.write(text.encode()))
    batches.tell_quarantine(quarantine_log(output / "quarantine.jsonl"))
    history = fit(
        model.to(device),
        batches,
        recipe.make_step(config.objective, fit_config),
        fit_config,
        title=config.task,
        progress=progress,
        checkpoint_dir=output / "checkpoint",
        resume=config.resume,
        watch=Watch(config.watch, output, settings) if rank() == 0 else None,
        timer=_timer(config, model, device),
    )
    weights = whole_state(model)
    if rank() == 0:
        history.to_json(output / "history.json")
        if weights is not None:  # the model's own parameters are shares
            model = build(recipe.task, model.config, recipe.options(config.objective))
            model.load_state_dict(weights)
        save_model(model.cpu(), output / "model", overwrite=True)
        tokenizer.save(output / "model")
    return history


def _timer(config: TrainConfig, model: Blip, device: torch.device) -> StepTimer:
    """One that knows how much arithmetic a sample is, and what the hardware of all ranks can do."""
    batch = config.data.batch_size * world_size()
    flops = sample_flops(model.config, config.task, config.objective, batch=batch)
    peak = peak_flops(device, config.fit.precision != "fp32")
    return StepTimer(flops, None if peak is None else peak * world_size())


def build_model(
    config: ModelConfig, recipe: Recipe, objective: ObjectiveConfig, tokenizer: BlipTokenizer
) -> Blip:
    """The task's model: a checkpoint's weights, or a preset at random with the tokenizer's words.

    Raises ConfigError or CheckpointError.
    """
    options = recipe.options(objective)
    if config.checkpoint is not None:
        if config.image_weights or config.text_weights:
            raise ConfigError("give model.checkpoint, or image_weights and text_weights, not both")
        model = load_model(
            config.checkpoint, recipe.task, image_size=config.image_size,
            allow_fresh=config.allow_fresh, **options,
        )  # fmt: skip
        words = model.config.text.vocab_size
        if tokenizer.vocab_size != words:
            raise ConfigError(
                f"the vocabulary has {tokenizer.vocab_size} pieces, the checkpoint "
                f"{config.checkpoint} {words}: give its own as data.vocabulary"
            )
        if config.drop_path_rate is not None:
            model = _with_drop_path(model, config.drop_path_rate, recipe.task, options)
        return model
    preset = blip_config(config.preset, image_size=config.image_size)
    model = build(recipe.task, _fitted(preset, config, tokenizer), options)
    if config.image_weights is not None:
        init_from_timm_vit(model.visual_encoder, config.image_weights)
    if config.text_weights is not None:
        init_text_from_bert(model, config.text_weights)
    if (twin := getattr(model, "twin", None)) is not None:
        twin.copy_from(model)
    return model


def _fitted(preset: BlipConfig, config: ModelConfig, tokenizer: BlipTokenizer) -> BlipConfig:
    text = dataclasses.replace(
        preset.text,
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        dec_token_id=tokenizer.dec_token_id,
        enc_token_id=tokenizer.enc_token_id,
    )
    vision = preset.vision
    if config.drop_path_rate is not None:
        vision = dataclasses.replace(vision, drop_path_rate=config.drop_path_rate)
    return dataclasses.replace(preset, text=text, vision=vision)


def _with_drop_path(model: Blip, rate: float, task: str, options: dict[str, Any]) -> Blip:
    vision = dataclasses.replace(model.config.vision, drop_path_rate=rate)
    other = build(task, dataclasses.replace(model.config, vision=vision), options)
    other.load_state_dict(model.state_dict())
    return other


def with_epoch_length(config: TrainConfig) -> FitConfig:
    """`config.fit` with `steps_per_epoch` counted from the shards where it is not given."""
    run = config.fit
    if run.steps_per_epoch is not None or run.epochs is None:
        _ = run.total_steps  # raises when the length is open
        return run
    samples, size = count_samples(config.data, config.task), config.data.batch_size
    size *= world_size()
    steps = samples // size if config.data.drop_last else -(-samples // size)
    if steps < 1:
        raise DataError(
            f"the shards {', '.join(config.data.sources)} hold {samples} samples, not one batch of "
            f"{size}"
        )
    return dataclasses.replace(run, steps_per_epoch=steps)


def pick_device(name: str) -> torch.device:
    """`auto` is a CUDA card where there is one; each rank of a machine takes its own.

    Raises ConfigError for what cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; use cpu, cuda or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch sees no CUDA card here; use cpu or auto")
    if device.type == "cuda" and device.index is None:
        own = local_rank() if started_by_torchrun() else torch.cuda.current_device()
        return torch.device("cuda", own)
    return device


def _check_output(output: Path, resume: bool) -> None:
    if resume or restarted() or not Checkpoints(output / "checkpoint", keep=1).all():
        return
    raise ConfigError(
        f"{output} holds a run already: go on with it by resume=true, or choose another output"
    )

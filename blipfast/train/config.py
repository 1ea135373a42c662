"""Typed configurations of a training run; `blipfast train --help` shows each field's help."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blipfast.errors import ConfigError

TaskName = Literal["pretrain", "retrieval", "caption", "vqa", "nlvr", "visdial"]


def described(default: Any, text: str) -> Any:
    """A dataclass field with a default and the help that the command line shows."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class FitConfig:
    """Optimiser, schedule and loop of one `fit`.

    The length is `steps`, or `epochs` of `steps_per_epoch`; with both, `steps` ends the run early
    and the schedule remains that of the epochs. Raises ConfigError for a value out of range.
    """

    steps: int | None = described(None, "length in steps; beside epochs it ends the run early")
    epochs: int | None = described(None, "length in epochs")
    steps_per_epoch: int | None = described(
        None, "steps of one epoch; `blipfast train` counts the shards when it is not given"
    )
    learning_rate: float = described(3e-4, "the highest learning rate")
    min_learning_rate: float = described(0.0, "the floor of the schedule")
    warmup_steps: int = described(0, "steps of linear warm-up")
    warmup_learning_rate: float = described(1e-6, "where the warm-up starts")
    schedule: Literal["cosine", "step", "constant"] = described(
        "cosine", "with epochs it changes once an epoch, with steps at every step"
    )
    decay: float = described(0.9, "factor per epoch of the schedule `step`")
    weight_decay: float = described(0.05, "of AdamW, on all weights")
    betas: tuple[float, float] = described((0.9, 0.999), "of AdamW")
    grad_clip: float | None = described(None, "largest norm of the gradient")
    grad_checkpointing: bool = described(
        False, "keep no activations inside a layer: less memory, a third more computing"
    )
    micro_batch: int | None = described(
        None, "encode so many images at a time; ITC and ITM still see the whole batch"
    )
    layer_decay: float | None = described(
        None, "fine-tuning: each layer's learning rate is this times that of the layer above"
    )
    precision: Literal["fp32", "bf16", "pure_bf16"] = described(
        "fp32", "bf16 computes under autocast; pure_bf16 keeps fp32 master weights only"
    )
    parallel: Literal["ddp", "fsdp"] = described(
        "ddp", "under torchrun: every rank holds the whole model, or its share (FSDP2)"
    )
    seed: int = described(0, "of dropout and of the drawn negatives")
    on_nonfinite: Literal["stop", "skip"] = described(
        "stop", "a loss or gradient that is not finite ends the run, or leaves the step out"
    )
    max_skips: int = described(10, "more left-out steps than this in a row end the run")
    log_every: int = described(50, "steps between lines of output where there is no terminal")
    checkpoint_every: int | None = described(
        None, "steps between checkpoints; by default one each epoch, and one at the end"
    )
    keep_checkpoints: int = described(3, "newest checkpoints kept")
    compile: bool = described(False, "run the model's blocks through torch.compile")
    cuda_graph: bool = described(
        False, "pre-training and retrieval on GPUs: record a step as a CUDA graph and replay it"
    )
    hang_timeout: float = described(
        900.0, "seconds without a step after which a rank writes down its stacks and ends"
    )

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1, "epochs": 1, "steps_per_epoch": 1, "warmup_steps": 0, "log_every": 1,
            "checkpoint_every": 1, "keep_checkpoints": 1, "micro_batch": 1, "max_skips": 0,
            "min_learning_rate": 0.0,
            "warmup_learning_rate": 0.0, "weight_decay": 0.0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"fit.{name} is {value}; it must be at least {least}")
        for name in ("learning_rate", "decay", "grad_clip", "layer_decay", "hang_timeout"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ConfigError(f"fit.{name} is {value}; it must be a finite number above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"fit.betas is {self.betas}; both must lie in [0, 1)")

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run. Raises ConfigError when its length is open."""
        if self.epochs is None:
            return self.epoch_length if self.steps is None else self.steps
        steps = self.epochs * self.epoch_length
        return steps if self.steps is None else min(steps, self.steps)

    @property
    def epoch_length(self) -> int:
        """Steps of one epoch; a run counted in steps alone is one epoch."""
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch
        if self.epochs is not None:
            raise ConfigError("fit.epochs needs fit.steps_per_epoch, the batches of one epoch")
        if self.steps is None:
            raise ConfigError("give the length of the run: fit.steps or fit.epochs")
        return self.steps


@dataclass(frozen=True)
class ModelConfig:
    """Which model: a preset from scratch, or a checkpoint."""

    preset: str = described("blip_base", "blip_base, blip_large, blip_demo or blip_tiny")
    image_size: int | None = described(None, "side of the images; by default the preset's")
    drop_path_rate: float | None = described(None, "stochastic depth; by default the preset's")
    checkpoint: str | None = described(
        None, "start from it: an original .pth, a Hugging Face directory or one of blipfast's"
    )
    image_weights: str | None = described(
        None, "start the image encoder from a timm or DeiT ViT: .pth, .safetensors or folder"
    )
    text_weights: str | None = described(
        None, "start the text transformer from a Hugging Face BERT: folder or .safetensors"
    )
    allow_fresh: bool = described(
        False, "also weights that do not fit this task's model may start fresh (they are listed)"
    )


@dataclass(frozen=True)
class DataConfig:
    """Shards of image and text, and how batches are made of them."""

    shards: str = described("", "folder, file or glob of .tar shards")
    mix: dict[str, float] | None = dataclasses.field(
        default=None,
        metadata={"help": "several sets of shards and how often an epoch has their samples"},
    )
    vocabulary: str | None = described(
        None, "vocab.txt of BERT uncased; by default the one beside the checkpoint"
    )
    batch_size: int = described(32, "images a step")
    max_length: int = described(30, "token limit of a text")
    max_dialogue_length: int = described(
        200, "token limit of a dialogue, of which the beginning is left out"
    )
    prompt: str = described("", "put before every caption and not learnt, as 'a picture of '")
    texts: Literal["each", "random"] = described(
        "each", "an image with several texts: one sample for each, or one drawn each epoch"
    )
    augment: bool = described(True, "random crop, flip and RandAugment")
    crop_scale: tuple[float, float] = described((0.2, 1.0), "share of the image that a crop keeps")
    flip: bool = described(True, "mirror half of the images")
    shuffle_buffer: int = described(
        100_000, "samples that are permuted together, across shards; 0 keeps the order"
    )
    even_lengths: bool = described(True, "batches with about the same number of tokens")
    drop_last: bool = described(
        True, "an epoch ends with the last whole batch; what is left comes in the next"
    )
    threads: int = described(4, "that decode and augment images")
    loader: Literal["auto", "torch", "dali"] = described(
        "auto", "what decodes images: Pillow's threads, or NVIDIA DALI, which auto takes on CUDA"
    )
    seed: int = described(0, "of order and augmentation")
    max_bad_fraction: float = described(0.01, "share of unreadable records that ends the run")

    def __post_init__(self) -> None:
        for name, least in {
            "batch_size": 1,
            "max_length": 3,
            "max_dialogue_length": 3,
            "threads": 1,
        }.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    f"data.{name} is {getattr(self, name)}; it must be at least {least}"
                )
        if self.mix is not None and (self.shards or not self.mix):
            raise ConfigError("give data.shards or data.mix, with at least one set, not both")
        for pattern, weight in (self.mix or {}).items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"data.mix gives {pattern} the weight {weight}; it must be > 0")
        if self.shuffle_buffer < 0:
            raise ConfigError(f"data.shuffle_buffer is {self.shuffle_buffer}, under 0")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction is {self.max_bad_fraction}, not 0 to 1")

    @property
    def sources(self) -> dict[str, float]:
        """Every data set and its weight."""
        return self.mix if self.mix is not None else {self.shards: 1.0}


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings of the losses; a task takes those that it has."""

    queue_size: int = described(57_600, "past features kept as negatives of ITC")
    momentum: float = described(0.995, "of the momentum encoders")
    alpha: float = described(0.4, "weight of the momentum encoders' soft targets")
    alpha_ramp_epochs: int = described(2, "epochs over which alpha rises from 0")
    across_ranks: bool = described(
        True, "ITC and ITM take negatives from all ranks' batches, as one large batch would"
    )
    exclude_equal_ids: bool = described(False, "pre-training: no negatives of the same image id")
    negatives_from_all_ranks: bool = described(True, "retrieval: negatives of all ranks (COCO)")
    label_smoothing: float = described(0.1, "of the language modelling loss")

    def __post_init__(self) -> None:
        if self.queue_size < 1:
            raise ConfigError(f"objective.queue_size is {self.queue_size}; it must be at least 1")
        if self.alpha_ramp_epochs < 0:
            raise ConfigError(f"objective.alpha_ramp_epochs is {self.alpha_ramp_epochs}, under 0")
        for name in ("momentum", "alpha", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"objective.{name} is {getattr(self, name)}; it must be 0 to 1")


@dataclass(frozen=True)
class WatchConfig:
    """Where the figures of a run go, beside the progress bar and history.json."""

    tensorboard: bool = described(True, "files for TensorBoard, where it is installed")
    wandb: str | None = described(None, "project of Weights & Biases")
    every: int = described(10, "steps between figures written")
    profile: int = described(0, "steps to trace, from the third on, into trace.json")

    def __post_init__(self) -> None:
        if self.every < 1 or self.profile < 0:
            raise ConfigError("watch.every must be at least 1, watch.profile at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: `blipfast train`."""

    task: TaskName = dataclasses.field(default="pretrain", metadata={"help": "what to train"})
    output: str = described("runs/blip", "folder for the model, its checkpoints and the history")
    resume: bool = described(False, "go on from the last checkpoint in the output folder")
    device: str = described("auto", "cpu, cuda, or auto")
    dry_run: bool = described(False, "print memory, arithmetic and length of the run, and end")
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    fit: FitConfig = dataclasses.field(default_factory=FitConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)


def packaged_configs() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parents[1] / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}

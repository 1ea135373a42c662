"""What the main job does by default, and what may be changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from blipfast.errors import ConfigError

_DEFAULT_MINUTES = 15.0


def _setting(default: Any, about: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the main job; the defaults take about fifteen minutes on two CPU cores.

    Each field's metadata say what it is for, as does `scripts/demo.py --help`.
    """

    out: str = _setting("outputs/demo", "folder for models, shards, results and the page")
    seed: int = _setting(0, "of the data, the weights and all draws")
    minutes: float = _setting(_DEFAULT_MINUTES, "multiplies all step counts by minutes / 15")
    scale: float = _setting(1.0, "multiplies the amount of data")
    num_concepts: int = _setting(24, "things that the scenes are composed of")
    num_web: int = _setting(6_000, "pairs with noisy texts")
    num_clean: int = _setting(1_200, "pairs with clean texts: all learn from them too")
    num_val: int = _setting(400, "held-out pairs of known things together, to caption")
    num_test: int = _setting(250, "held-out pairs on which the models are compared")
    noise: float = _setting(0.4, "share of web texts that are wrong")
    hard_share: float = _setting(0.5, "of the wrong texts, the share with just one wrong detail")
    image_size: int = _setting(48, "side of the pictures in pixels")
    patch_size: int = _setting(8, "side of a patch in pixels")
    vision_width: int = _setting(192, "width of the image encoder")
    vision_layers: int = _setting(4, "layers of the image encoder")
    text_layers: int = _setting(2, "layers of the text transformer, from a packaged MiniLM")
    embed_dim: int = _setting(128, "width of the contrastive features")
    batch_size: int = _setting(64, "pairs of a step")
    backbone_steps: int = _setting(800, "of the image encoder, which first learns to name things")
    align_steps: int = _setting(250, "of both encoders by the contrastive loss alone")
    pretrain_steps: int = _setting(300, "of all three objectives")
    filter_steps: int = _setting(250, "of the filter by ITC and ITM, on clean pairs")
    caption_steps: int = _setting(150, "of each captioner by LM, on clean pairs")
    backbone_rate: float = _setting(2e-3, "learning rate of the image encoder alone")
    learning_rate: float = _setting(1e-3, "of pre-training")
    finetune_rate: float = _setting(6e-4, "learning rate of the filter and the captioners")
    queue_size: int = _setting(512, "features that the contrastive queue holds")
    momentum: float = _setting(0.99, "of the momentum encoders; the paper's is for longer runs")
    alpha: float = _setting(0.4, "weight of the momentum model in the soft targets")
    # One in three of the pairs that ITM learns from match: its word on one it knows nothing of.
    threshold: float = _setting(1 / 3, "of the filter, for web texts")
    # Stricter: more of what a captioner writes is wrong in some detail.
    synthetic_threshold: float = _setting(0.6, "of the filter, for captions")
    prompt: str = _setting("a picture of ", "what captions begin with")
    top_k_rerank: int = _setting(32, "candidates that ITM ranks anew in retrieval")
    precision: str = _setting("bf16", "bf16 or fp32")
    threads: int = _setting(2, "CPU threads")

    def __post_init__(self) -> None:
        for name in ("minutes", "scale", "learning_rate", "finetune_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"demo.{name} is {getattr(self, name)}; it must be above 0")
        for name in (
            "noise",
            "hard_share",
            "threshold",
            "synthetic_threshold",
            "alpha",
            "momentum",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"demo.{name} is {getattr(self, name)}; it must be 0 to 1")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"demo.precision is {self.precision!r}; choose 'fp32' or 'bf16'")
        steps = ("backbone_steps", "align_steps", "pretrain_steps", "filter_steps", "caption_steps")
        for name in ("batch_size", "threads", *steps):
            if getattr(self, name) < 1:
                raise ConfigError(f"demo.{name} is {getattr(self, name)}; it must be at least 1")

    def scaled(self) -> DemoSettings:
        """The same with `minutes` and `scale` worked into steps and amounts."""
        time = self.minutes / _DEFAULT_MINUTES
        steps = ("backbone_steps", "align_steps", "pretrain_steps", "filter_steps", "caption_steps")
        amounts = ("num_web", "num_clean", "num_val", "num_test")
        changes = {name: max(1, round(getattr(self, name) * time)) for name in steps}
        changes |= {name: max(1, round(getattr(self, name) * self.scale)) for name in amounts}
        return dataclasses.replace(self, minutes=_DEFAULT_MINUTES, scale=1.0, **changes)

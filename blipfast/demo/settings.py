"""What the main job does by default, and what may be changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from blipfast.errors import ConfigError

_DEFAULT_MINUTES = 15.0


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the main job; the defaults take about fifteen minutes on two CPU cores.

    minutes: multiplies all step counts by `minutes / 15`. scale: multiplies the amount of data.
    backbone_steps: of the image encoder, before all else. align_steps: of both encoders,
    contrastive loss alone; pretrain_steps: of all three objectives; filter_steps, caption_steps:
    fine-tuning.
    noise: share of web texts that are wrong; hard_share: of those, the share with one wrong detail.
    prompt: of captioners. threshold: of the filter. One in three of the pairs that ITM learns from
    matches, so a third is what it says of a pair it knows nothing of. synthetic_threshold: of what
    the captioner wrote, stricter: more of it is wrong in some detail.
    """

    out: str = "outputs/demo"
    seed: int = 0
    minutes: float = _DEFAULT_MINUTES
    scale: float = 1.0
    num_concepts: int = 24
    num_web: int = 6_000
    num_clean: int = 1_200
    num_val: int = 400
    num_test: int = 250
    noise: float = 0.4
    hard_share: float = 0.5
    image_size: int = 48
    patch_size: int = 8
    vision_width: int = 192
    vision_layers: int = 4
    text_layers: int = 2
    embed_dim: int = 128
    batch_size: int = 64
    backbone_steps: int = 400
    align_steps: int = 250
    pretrain_steps: int = 300
    filter_steps: int = 250
    caption_steps: int = 150
    backbone_rate: float = 2e-3
    learning_rate: float = 1e-3
    finetune_rate: float = 6e-4
    queue_size: int = 512
    momentum: float = 0.99
    alpha: float = 0.4
    threshold: float = 1 / 3
    synthetic_threshold: float = 0.6
    prompt: str = "a picture of "
    top_k_rerank: int = 32
    precision: str = "bf16"
    threads: int = 2

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

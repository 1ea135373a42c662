"""The settings of one CapFilt run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from blipfast.errors import ConfigError

Method = Literal["nucleus", "beam"]
Keep = Literal["both", "web", "synthetic"]


@dataclass(frozen=True)
class CapFiltConfig:
    """What `run_capfilt` reads, writes and how it decides (BLIP, section 3.3).

    input: folder, file or glob of shards. output: folder for shards and manifest.
    captioner, filter: checkpoints, anything that `load_model` reads; a captioner is not needed with
    keep="web". vocabulary: vocab.txt; by default the one beside the filter.
    method: "nucleus" samples (the paper's choice: diverse captions), "beam" searches.
    captions_per_image: synthetic candidates, all judged. prompt: given to the captioner.
    threshold: a text is kept when its ITM probability reaches it. synthetic_threshold: the same for
    synthetic texts, by default also `threshold`: a captioner that errs often needs a stricter one.
    keep: which texts may enter the new set. trusted: sources whose texts enter it unjudged.
    seed: of the sampling; an image's captions depend on it and on the image's key alone.
    shard_count, shard_bytes: limits of one output shard.
    max_bad_fraction: share of unreadable records in one shard that stops the run.
    """

    input: str
    output: str
    captioner: str | None = None
    filter: str | None = None
    vocabulary: str | None = None
    image_size: int | None = None
    method: Method = "nucleus"
    captions_per_image: int = 1
    prompt: str = "a picture of "
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.1
    num_beams: int = 3
    min_length: int = 5
    max_length: int = 20
    threshold: float = 0.5
    synthetic_threshold: float | None = None
    keep: Keep = "both"
    trusted: tuple[str, ...] = ("human",)
    seed: int = 0
    batch_size: int = 32
    max_text_tokens: int = 35
    shard_count: int = 1000
    shard_bytes: int = 256 << 20
    max_bad_fraction: float = 0.1
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        _choice("method", self.method, ("nucleus", "beam"))
        _choice("keep", self.keep, ("both", "web", "synthetic"))
        _choice("precision", self.precision, ("fp32", "bf16"))
        for name in ("captions_per_image", "batch_size", "num_beams", "shard_count", "shard_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"capfilt.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("threshold", "synthetic_threshold", "max_bad_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"capfilt.{name} is {value}; it must be 0 to 1")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"capfilt.top_p is {self.top_p}; it must be above 0, at most 1")
        if not 0 <= self.min_length <= self.max_length:
            raise ConfigError(
                f"capfilt.min_length {self.min_length} and max_length {self.max_length} "
                "contradict each other"
            )
        if self.max_text_tokens < 3:
            raise ConfigError("capfilt.max_text_tokens must be at least 3")
        if self.method == "beam" and self.captions_per_image > self.num_beams:
            raise ConfigError(
                f"capfilt.captions_per_image {self.captions_per_image} is more than num_beams "
                f"{self.num_beams}: a beam search has no more results"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def fingerprint(self, *models: str) -> str:
        """Changes when the outcome may: with every setting but those of place, speed and device.

        models: hashes of the models' weights.
        """
        free = {
            "output", "batch_size", "device", "captioner", "filter", "vocabulary",
            "max_bad_fraction",
        }  # fmt: skip
        settings = {k: v for k, v in self.to_dict().items() if k not in free}
        text = json.dumps([settings, *models], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"capfilt.{name} is {value!r}; choose {' or '.join(map(repr, allowed))}")

"""The settings of one CapFilt run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from blipfast.errors import ConfigError
from blipfast.train.config import described

Keep = Literal["both", "web", "synthetic"]
Ensemble = Literal["mean", "min", "max"]
Stage = Literal["caption", "score", "filter"]


@dataclass(frozen=True)
class CapFiltConfig:
    """What CapFilt reads, writes and how it decides (BLIP, section 3.3).

    Without captioners no text is added; without filters no text is judged and all are kept: with
    `keep`, the rows of the paper's table of combinations. `keep` is "both", "web" or "synthetic".
    An image's captions depend on the seed and on the image's key alone.
    Raises ConfigError for a value out of range.
    """

    input: str = described("", "folder, file or glob of .tar shards")
    output: str = described("", "folder for the new shards and the manifest")
    captioners: tuple[str, ...] = described((), "checkpoints that write captions")
    filters: tuple[str, ...] = described((), "checkpoints that judge texts")
    vocabulary: str | None = described(
        None, "vocab.txt; by default the one beside the first filter"
    )
    image_size: int | None = described(None, "of both models; by default what they were saved at")
    method: Literal["nucleus", "beam"] = described(
        "nucleus", "nucleus samples diverse captions, as in the paper; beam searches"
    )
    captions_per_image: int = described(1, "synthetic texts of each captioner, all judged")
    prompt: str = described("a picture of ", "what a caption follows")
    top_p: float = described(0.9, "nucleus: least probability of the tokens sampled from")
    top_k: int = described(50, "nucleus: most tokens sampled from; 0 has no limit")
    repetition_penalty: float = described(1.1, "nucleus: of tokens said already")
    num_beams: int = described(3, "beam: width of the search")
    min_length: int = described(5, "tokens of a caption, the prompt included")
    max_length: int = described(20, "tokens of a caption, the prompt included")
    ensemble: Literal["mean", "min", "max"] = described(
        "mean", "how the ITM of several filters becomes one"
    )
    threshold: float = described(0.5, "ITM probability from which a text is kept")
    synthetic_threshold: float | None = described(
        None, "the same for synthetic texts: a captioner that errs often needs a stricter one"
    )
    keep: Literal["both", "web", "synthetic"] = described(
        "both", "which texts may enter the new set"
    )
    trusted: tuple[str, ...] = described(("human",), "sources whose texts enter it unjudged")
    human: tuple[str, ...] = described((), "shards of human-written texts that join the new set")
    seed: int = described(0, "of the sampling")
    batch_size: int = described(32, "images at once in a model")
    unit: int = described(128, "images that are saved together, and lost together by a kill")
    max_text_tokens: int = described(35, "token limit of a judged text")
    shard_count: int = described(1000, "most images of one output shard")
    shard_bytes: int = described(256 << 20, "most bytes of one output shard")
    max_bad_fraction: float = described(
        0.1, "share of unreadable records in a shard that stops the run"
    )
    precision: Literal["fp32", "bf16"] = described("fp32", "of the models' weights and arithmetic")
    device: str = described("auto", "cpu, cuda or auto")
    threads: int = described(4, "that decode images")
    work: str | None = described(
        None, "folder of captions and scores; by default the output. Another run's spares the work"
    )
    runner: Literal["local", "ray"] = described(
        "local", "local: this process, or the ranks of torchrun; ray: Ray Data (blipfast[ray])"
    )
    ray_models: int = described(1, "Ray: processes that hold the models, a card each on CUDA")
    ray_decoders: int = described(2, "Ray: units that are read and decoded at a time")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", Literal["nucleus", "beam"]), ("keep", Keep), ("ensemble", Ensemble),
        ):  # fmt: skip
            _choice(name, getattr(self, name), get_args(allowed))
        _choice("precision", self.precision, ("fp32", "bf16"))
        _choice("runner", self.runner, ("local", "ray"))
        for name in (
            "captions_per_image", "batch_size", "unit", "num_beams", "shard_count", "shard_bytes",
            "threads", "ray_models", "ray_decoders",
        ):  # fmt: skip
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

    @property
    def work_folder(self) -> Path:
        """Where captions and scores lie."""
        return Path(self.work if self.work is not None else self.output)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def fingerprint(self, stage: Stage, *models: str) -> str:
        """Changes when the outcome of a stage may, of which its settings and models decide.

        models: hashes of their weights.
        """
        names = [name for one in _SETTINGS[: STAGES.index(stage) + 1] for name in one]
        settings = {name: getattr(self, name) for name in names}
        text = json.dumps([settings, *models], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


STAGES: tuple[Stage, ...] = get_args(Stage)
# What decides the outcome of each stage, beside what decides that of the stages before it.
_SETTINGS = (
    (
        "input", "image_size", "method", "captions_per_image", "prompt", "top_p", "top_k",
        "repetition_penalty", "num_beams", "min_length", "max_length", "seed", "unit", "precision",
    ),
    ("max_text_tokens",),
    (
        "ensemble", "threshold", "synthetic_threshold", "keep", "trusted", "human", "shard_count",
        "shard_bytes",
    ),
)  # fmt: skip


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"capfilt.{name} is {value!r}; choose {' or '.join(map(repr, allowed))}")

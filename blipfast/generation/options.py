"""What generation can be asked for, checked in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from blipfast.errors import ConfigError

Method = Literal["beam", "greedy", "nucleus"]
BeamLength = Literal["total", "generated"]

# BLIP samples captions with this penalty whatever its caller asks for; CapFilt's captions have it.
NUCLEUS_REPETITION_PENALTY = 1.1


@dataclass(frozen=True)
class GenerationOptions:
    """Options of `generate`. Raises ConfigError naming the field that is out of range.

    method: "beam"; "greedy", which is also what "beam" with one beam means; "nucleus" (sampling).
    max_length, min_length: tokens of the whole sequence, prompt and [SEP] included.
    top_p, top_k: nucleus samples from the `top_k` likeliest tokens (0: all), cut to the smallest
    set with probability `top_p`.
    repetition_penalty: of tokens in the sequence so far; None is 1.1 for nucleus, as in the
    original code, and 1.0 (none) otherwise. Beam search applies it to log-probabilities, the others
    to logits.
    length_penalty: a beam's score is its log-probability over `length ** length_penalty`.
    beam_length: which length that is, and whose beam search is followed. "total": prompt and
    generated tokens without [SEP], as in the paper's code (transformers 4.15). "generated":
    generated tokens with [SEP] (transformers 5).
    num_return_sequences: of each image; at most `num_beams` for beam search, 1 for greedy.
    """

    method: Method = "beam"
    num_beams: int = 3
    max_length: int = 20
    min_length: int = 5
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float | None = None
    length_penalty: float = 1.0
    beam_length: BeamLength = "total"
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        self._one_of("method", ("beam", "greedy", "nucleus"))
        self._one_of("beam_length", ("total", "generated"))
        for name in ("num_beams", "max_length", "num_return_sequences"):
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        self._check("min_length", self.min_length >= 0, "must not be negative")
        shorter = self.min_length <= self.max_length
        self._check("min_length", shorter, f"must not exceed max_length ({self.max_length})")
        self._check("top_p", 0.0 < self.top_p <= 1.0, "must lie in (0, 1]")
        self._check("top_k", self.top_k >= 0, "must be at least 1, or 0 for no limit")
        penalty = self.penalty
        self._check("repetition_penalty", 0 < penalty < math.inf, "must be positive and finite")
        self._check("length_penalty", math.isfinite(self.length_penalty), "must be finite")
        if self.is_greedy:
            must = "must be 1 in greedy search; use method='nucleus' or more beams"
            self._check("num_return_sequences", self.num_return_sequences == 1, must)
        elif self.method == "beam":
            fits = self.num_return_sequences <= self.num_beams
            self._check("num_return_sequences", fits, f"must not exceed num_beams {self.num_beams}")

    @property
    def is_greedy(self) -> bool:
        return self.method == "greedy" or (self.method == "beam" and self.num_beams == 1)

    @property
    def penalty(self) -> float:
        """The repetition penalty in force."""
        if self.repetition_penalty is not None:
            return self.repetition_penalty
        return NUCLEUS_REPETITION_PENALTY if self.method == "nucleus" else 1.0

    @property
    def rows_per_image(self) -> int:
        """Sequences that are decoded side by side for each image."""
        if self.is_greedy:
            return 1
        return self.num_beams if self.method == "beam" else self.num_return_sequences

    def _check(self, name: str, fine: bool, must: str) -> None:
        if not fine:
            raise ConfigError(f"{name} {must}, got {getattr(self, name)!r}")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        self._check(name, getattr(self, name) in allowed, f"must be one of {', '.join(allowed)}")

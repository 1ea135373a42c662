"""What a run recorded: every step's losses, learning rate and time."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipfast.errors import DataError

_MOST = 20_000  # entries: some 4 MB of JSON in every checkpoint


@dataclass
class History:
    """One entry per finished step in `steps`, `total`, `lr`, `seconds`, `samples` and each loss.

    Of long runs, older entries stand for two steps, then four, and so on: the last of them in
    `steps` and `seconds`, their sum in `samples`, their mean over samples elsewhere.
    losses: by name ("itc", "itm", "lm"). total: their sum as it was minimised. grad_norm: before
    clipping. seconds: since the start, pauses between resumed parts left out. skipped: steps left
    out because a loss or gradient was not finite; they have no entry in the other lists.
    """

    title: str = ""
    steps: list[int] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    def add(
        self, step: int, total: float, losses: dict[str, float], lr: float, grad_norm: float,
        seconds: float, samples: int,
    ) -> None:  # fmt: skip
        self.steps.append(step)
        self.total.append(total)
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)
        self.lr.append(lr)
        self.grad_norm.append(grad_norm)
        self.seconds.append(seconds)
        self.samples.append(samples)
        if len(self.steps) > _MOST:
            self._thin()

    def _thin(self) -> None:
        """Joins the older half's entries by pairs."""
        half = len(self.steps) // 4 * 2
        weights = list(zip(self.samples[:half:2], self.samples[1:half:2], strict=True))

        def means(values: list[float]) -> list[float]:
            pairs = zip(values[:half:2], values[1:half:2], weights, strict=False)
            return [(a * n + b * m) / (n + m) for a, b, (n, m) in pairs] + values[half:]

        self.total, self.lr, self.grad_norm = map(means, (self.total, self.lr, self.grad_norm))
        self.losses = {name: means(values) for name, values in self.losses.items()}
        self.steps[:half], self.seconds[:half] = self.steps[1:half:2], self.seconds[1:half:2]
        self.samples[:half] = map(sum, weights)

    def last(self) -> dict[str, float]:
        """The last step's losses, learning rate and gradient norm, by names for a logger."""
        named = {f"loss/{name}": values[-1] for name, values in self.losses.items()}
        named |= {"loss/total": self.total[-1], "optimizer/lr": self.lr[-1]}
        return named | {"optimizer/grad_norm": self.grad_norm[-1]}

    @property
    def samples_per_second(self) -> float:
        """Of all steps but the first, which pays for start-up; 0 before there are two."""
        if len(self.seconds) < 2 or self.seconds[-1] <= self.seconds[0]:
            return 0.0
        return sum(self.samples[1:]) / (self.seconds[-1] - self.seconds[0])

    def mean(self, name: str, last: int = 50) -> float:
        """Mean of a loss over the `last` steps; name is a key of `losses`, or "total"."""
        values = (self.total if name == "total" else self.losses[name])[-last:]
        return sum(values) / len(values) if values else float("nan")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> History:
        """The inverse of `to_dict`. Raises DataError for anything else."""
        try:
            return cls(**values)
        except TypeError as error:
            raise DataError(f"this is no training history: {error}") from error

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON; written whole to `path` if it is given (TrainingError on a full disk)."""
        text = json.dumps(self.to_dict())
        if path is not None:
            from blipfast.train.files import write_whole

            write_whole(Path(path), lambda file: file.write(text.encode()))
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> History:
        """Reads what `to_json` wrote. Raises DataError if it cannot."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the history {os.fspath(path)}: {error}") from error

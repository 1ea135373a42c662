"""What an evaluation gives back, whatever the task."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One thing that was judged, to be looked at.

    images: encoded. right: None where the truth is withheld.
    """

    images: tuple[bytes, ...]
    asked: str
    given: str
    expected: str
    right: bool | None


@dataclass(frozen=True)
class Outcome:
    """metrics: nested by name. files: contents by file name, for the official servers.

    examples: of right and of wrong answers, a few of each; words: what these two are called.
    """

    metrics: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    words: tuple[str, str] = ("right", "wrong")


class Stopwatch:
    """Seconds since it was made, and things done in a second."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def speed(self, what: str, count: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._start
        return {"seconds": round(seconds, 3), f"{what}_per_second": round(count / seconds, 1)}

"""What a run's texts are like: what was kept, how noisy, how diverse (BLIP, section 4.3).

Everything is read from a run's manifest.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from blipfast.capfilt.decisions import SYNTHETIC, Decision

BINS = 40
T = TypeVar("T")


@dataclass(frozen=True)
class Diversity:
    """How varied captions are; `n` is 1 to 3.

    captions: their number. unique: share that no other caption equals. distinct: for each n the
    share of different n-grams among all. entropy: of the n-grams, in bits. words: mean length.
    vocabulary: different words.
    """

    captions: int
    unique: float
    distinct: tuple[float, ...]
    entropy: tuple[float, ...]
    words: float
    vocabulary: int


def diversity(captions: Sequence[str]) -> Diversity:
    """Of captions, lower-cased and split at spaces. All zero where there is none."""
    rows = [caption.lower().split() for caption in captions]
    words = [word for row in rows for word in row]
    counts = [Counter(gram for row in rows for gram in _grams(row, n)) for n in (1, 2, 3)]
    return Diversity(
        len(captions),
        len({*captions}) / max(1, len(captions)),
        tuple(len(count) / max(1, count.total()) for count in counts),
        tuple(entropy(count) for count in counts),
        len(words) / max(1, len(captions)),
        len(counts[0]),
    )


def _grams(row: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(row[i:] for i in range(n)), strict=False)


def entropy(counts: Counter) -> float:
    """Of a distribution given by counts, in bits."""
    total = counts.total()
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


@dataclass
class SourceCounts:
    """Texts of one source: how many, how many accepted, how many the filter rejected."""

    texts: int = 0
    accepted: int = 0
    rejected: int = 0

    @property
    def noise_ratio(self) -> float | None:
        """Share of the judged texts that the filter rejects: the paper's measure of noise."""
        judged = self.accepted + self.rejected
        return self.rejected / judged if judged else None


@dataclass
class RunStatistics:
    """sources: counts by source. scores: by source, how many judged texts have their ITM in each
    of `BINS` equal parts of 0 to 1. synthetic: diversity of the captions, or of as many of them as
    fit a sample. unreadable: images that could not be read."""

    sources: dict[str, SourceCounts] = field(default_factory=dict)
    scores: dict[str, list[int]] = field(default_factory=dict)
    synthetic: Diversity = field(default_factory=lambda: diversity([]))
    unreadable: int = 0


def statistics_of(
    decisions: Iterable[Decision], most_captions: int = 200_000, seed: int = 0
) -> RunStatistics:
    """Of all rows of a manifest, of any length. most_captions: of which diversity is counted."""
    found = RunStatistics()
    captions = Reservoir[str](most_captions, random.Random(seed))
    for row in decisions:
        if row.text is None:
            found.unreadable += 1
            continue
        counts = found.sources.setdefault(row.source, SourceCounts())
        counts.texts += 1
        counts.accepted += row.accepted
        if row.itm is not None:
            bins = found.scores.setdefault(row.source, [0] * BINS)
            bins[min(int(row.itm * BINS), BINS - 1)] += 1
            counts.rejected += not row.accepted and not row.reason
        if row.source == SYNTHETIC and row.reason != "empty text":
            captions.add(row.text)
    found.synthetic = diversity(captions.kept)
    return found


class Reservoir(Generic[T]):
    """A random sample of a stream, each item as likely as any other. seen: items that came."""

    def __init__(self, size: int, rng: random.Random) -> None:
        self.size, self.rng = size, rng
        self.kept: list[T] = []
        self.seen = 0

    def add(self, item: T) -> None:
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(item)
        elif (place := self.rng.randrange(self.seen)) < self.size:
            self.kept[place] = item

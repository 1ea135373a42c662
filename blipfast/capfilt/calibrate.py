"""Thresholds from a sample of texts that people have labelled (beyond the paper, whose is 0.5).

`sample_texts` draws texts evenly over the filter's scores; someone says of each whether it matches
its image; `calibrate` finds where precision is as asked, or F1 highest, for web and synthetic texts
apart.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from blipfast.capfilt.decisions import SYNTHETIC, Decision
from blipfast.capfilt.statistics import Reservoir
from blipfast.errors import ConfigError, DataError

KINDS = ("web", SYNTHETIC)  # "web": every source but the captioners
_BINS = 10


@dataclass(frozen=True)
class Label:
    """A text of an image and its ITM probability.

    weight: how many texts of the run it stands for. match: whether it matches; None before someone
    has said so.
    """

    key: str
    text: str
    source: str
    itm: float
    weight: float = 1.0
    match: bool | None = None

    @property
    def kind(self) -> str:
        return SYNTHETIC if self.source == SYNTHETIC else "web"


def sample_texts(decisions: Iterable[Decision], count: int, seed: int = 0) -> list[Label]:
    """About `count` judged texts, half of each kind, as many of each tenth of the ITM scale.

    So that the few near the threshold are seen too. Raises DataError when no text was judged.
    """
    rng = random.Random(seed)
    bins: dict[tuple[str, int], Reservoir[Label]] = {}
    for row in decisions:
        if row.itm is None or row.text is None or row.reason == "empty text":
            continue
        label = Label(row.key, row.text, row.source, row.itm)
        place = min(int(row.itm * _BINS), _BINS - 1)
        bins.setdefault((label.kind, place), Reservoir(count, rng)).add(label)
    if not bins:
        raise DataError("no text of this run was judged: it had no filter")
    chosen: list[Label] = []
    for kind in KINDS:
        groups = [bins[key] for key in sorted(bins) if key[0] == kind]
        sizes = _even([len(group.kept) for group in groups], count // 2)
        for group, size in zip(groups, sizes, strict=True):
            drawn = rng.sample(group.kept, size)
            chosen += [replace(label, weight=group.seen / size) for label in drawn]
    rng.shuffle(chosen)
    return chosen


def _even(sizes: list[int], count: int) -> list[int]:
    """How many to take of each group, as evenly as their sizes allow."""
    taken = [0] * len(sizes)
    while count > 0 and taken != sizes:
        for i, size in enumerate(sizes):
            if count > 0 and taken[i] < size:
                taken[i] += 1
                count -= 1
    return taken


def labels_to_json(labels: Iterable[Label]) -> list[str]:
    """Lines of a label file; `match` is to be filled in with true or false."""
    return [json.dumps(asdict(label), ensure_ascii=False) for label in labels]


def read_labels(path: str | Path) -> list[Label]:
    """The labelled rows of a label file.

    Raises DataError, naming the line, for a row that is none, and when nothing is labelled.
    """
    labels = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the labels {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            label = Label(
                row["key"], row["text"], row["source"], float(row["itm"]),
                float(row.get("weight", 1.0)), row["match"],
            )  # fmt: skip
            if label.match not in (True, False, None) or not 0 <= label.itm <= 1:
                raise ValueError("match must be true, false or null, itm 0 to 1")
            if not 0 < label.weight < math.inf:
                raise ValueError("weight must be above 0")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: no label row ({error})") from error
        if label.match is not None:
            labels.append(label)
    if not labels:
        raise DataError(f"{path}: no row has match true or false; label some first")
    return labels


@dataclass(frozen=True)
class Curve:
    """Precision and recall of "accepted from this threshold on", of one kind of text.

    Estimates for the whole run: each label counts as the texts that it stands for.

    precision, recall, thresholds: `(N,)` by rising threshold. threshold: the chosen one; chosen:
    its place. labels, matches: how many texts were labelled, and how many of them match.
    """

    kind: str
    precision: list[float]
    recall: list[float]
    thresholds: list[float]
    chosen: int
    labels: int
    matches: int

    @property
    def threshold(self) -> float:
        return self.thresholds[self.chosen]


def calibrate(labels: Sequence[Label], precision: float | None = None) -> dict[str, Curve]:
    """For each kind of text its curve and threshold.

    precision: the least that is asked, of which the threshold with the highest recall is taken; by
    default the threshold of the highest F1.

    A kind of which no label matches, or every one does, has no curve: there is nothing to tell
    apart. Raises DataError when that is so of both, ConfigError for a precision that no threshold
    reaches.
    """
    curves = {}
    for kind in KINDS:
        its = [label for label in labels if label.kind == kind]
        if len({label.match for label in its}) == 2:
            curves[kind] = _curve(kind, its, precision)
    if not curves:
        raise DataError(
            f"{len(labels)} labels tell nothing apart: there must be some that match and some that "
            "do not"
        )
    return curves


def _curve(kind: str, labels: list[Label], precision: float | None) -> Curve:
    labels = sorted(labels, key=lambda label: -label.itm)
    weights = torch.tensor([label.weight for label in labels], dtype=torch.float64)
    truth = torch.tensor([float(bool(label.match)) for label in labels], dtype=torch.float64)
    kept, right = weights.cumsum(0), (weights * truth).cumsum(0)
    # Of equal scores all are kept or none.
    last = [
        i for i in range(len(labels)) if i + 1 == len(labels) or labels[i].itm > labels[i + 1].itm
    ][::-1]
    p, r = (right / kept)[last], (right / right[-1])[last]
    if precision is None:
        place = int((2 * p * r / (p + r).clamp(min=1e-12)).argmax())
    else:
        good = (p >= precision).nonzero()[:, 0]
        if not good.numel():
            raise ConfigError(
                f"no threshold gives {kind} texts a precision of {precision}; the highest is "
                f"{float(p.max()):.3f}"
            )
        place = int(good[r[good].argmax()])
    thresholds = [labels[i].itm for i in last]
    return Curve(kind, p.tolist(), r.tolist(), thresholds, place, len(labels), int(truth.sum()))

"""What CapFilt decides about each text, and the manifest that keeps it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipfast.errors import DataError

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Candidate:
    """A text that may describe an image. source: "synthetic", or where the record has it from."""

    text: str
    source: str


@dataclass(frozen=True)
class Score:
    """What the filter thinks of one image-text pair.

    itm: probability of a match. itc: cosine of image and text in the contrastive space.
    """

    itm: float
    itc: float


@dataclass(frozen=True)
class Decision:
    """One row of the manifest.

    key: the image. text, source: the candidate; the text is None where the image (or the whole
    record) could not be read. itm, itc: its scores, None where it was not judged. accepted: whether
    it is in the new set. reason: why it was decided so without or against the score, else "".
    filter, captioner: hashes of the weights that judged and wrote it. seed: of the sampling.
    """

    key: str
    text: str | None
    source: str
    itm: float | None
    itc: float | None
    accepted: bool
    reason: str
    filter: str | None
    captioner: str | None
    seed: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)


def read_manifest(path: str | os.PathLike[str]) -> Iterator[Decision]:
    """The rows of a manifest, in order.

    Raises:
        DataError: naming file and line, if a row is not whole.
    """
    known = {f.name for f in dataclasses.fields(Decision)}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row: dict[str, Any] = json.loads(line)
                    decision = Decision(**{k: row[k] for k in known})
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {number}: no manifest row ({error})") from error
                yield decision
    except OSError as error:
        raise DataError(f"cannot read the manifest {path}: {error.strerror}") from error


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file whole or not at all. Raises DataError when it cannot (a full disk)."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for line in lines:
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def filter_candidates(
    key: str,
    candidates: list[Candidate],
    scores: list[Score | None],
    *,
    threshold: float,
    synthetic_threshold: float | None = None,
    keep: str = "both",
    trusted: tuple[str, ...] = (),
    filter_hash: str | None = None,
    captioner_hash: str | None = None,
    seed: int = 0,
) -> list[Decision]:
    """Accepts or rejects each candidate text of one image (BLIP, section 3.3).

    Args:
        key: the image.
        candidates: its texts.
        scores: one each; None for a text that could not be judged (empty after clean-up).
        threshold: least ITM probability of an accepted text. synthetic_threshold: of a synthetic
            one, where it is another.
        keep: "both", "web" (all but the synthetic) or "synthetic".
        trusted: sources that are accepted whatever their score.
        filter_hash, captioner_hash, seed: noted in each row.

    Raises:
        DataError: the two lists differ in length.
    """
    if len(candidates) != len(scores):
        raise DataError(f"image {key}: {len(candidates)} texts, but {len(scores)} scores")
    decisions: list[Decision] = []
    taken: set[str] = set()
    for candidate, score in zip(candidates, scores, strict=True):
        synthetic = candidate.source == SYNTHETIC
        least = threshold
        if synthetic and synthetic_threshold is not None:
            least = synthetic_threshold
        accepted, reason = _decide(candidate, score, least, keep, trusted, taken)
        if accepted:
            taken.add(candidate.text)
        decisions.append(
            Decision(
                key,
                candidate.text,
                candidate.source,
                None if score is None else score.itm,
                None if score is None else score.itc,
                accepted,
                reason,
                filter_hash,
                captioner_hash if synthetic else None,
                seed,
            )
        )
    return decisions


def _decide(
    candidate: Candidate,
    score: Score | None,
    threshold: float,
    keep: str,
    trusted: tuple[str, ...],
    taken: set[str],
) -> tuple[bool, str]:
    synthetic = candidate.source == SYNTHETIC
    if score is None:
        return False, "empty text"
    if candidate.text in taken:
        return False, "same as an accepted text of this image"
    if not synthetic and candidate.source in trusted:
        return True, "trusted source"
    if synthetic and keep == "web":
        return False, "synthetic texts are not kept"
    if not synthetic and keep == "synthetic":
        return False, "only synthetic texts are kept"
    return score.itm >= threshold, ""

"""What CapFilt decides about each text, and the manifest that keeps it."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipfast.capfilt.config import Keep
from blipfast.data import pre_caption
from blipfast.errors import DataError

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Candidate:
    """A text that may describe an image. source: "synthetic", or where the record has it from.

    captioner: hash of the weights that wrote it, if one did.
    """

    text: str
    source: str
    captioner: str | None = None


@dataclass(frozen=True)
class Score:
    """What the filter thinks of one image-text pair.

    itm: probability of a match. itc: cosine of image and text in the contrastive space. Of several
    filters they are one number each; itm_each is what each filter said.
    """

    itm: float
    itc: float
    itm_each: tuple[float, ...] = ()


@dataclass(frozen=True)
class Decision:
    """One row of the manifest.

    key: the image. text, source: the candidate; the text is None where the image (or the whole
    record) could not be read. itm, itc: its scores, None where it was not judged. accepted: whether
    it is in the new set. reason: why it was decided so without or against the score, else "".
    filter, captioner: hashes of the weights that judged and wrote it; several filters' are joined
    by "+", and itm_each is what each of them said. seed: of the sampling.
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
    itm_each: tuple[float, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, allow_nan=False)


def read_manifest(path: str | os.PathLike[str]) -> Iterator[Decision]:
    """The rows of a manifest, in order.

    Raises:
        DataError: naming file and line, if a row is not whole.
    """
    known = [f.name for f in dataclasses.fields(Decision)]
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row: dict[str, Any] = json.loads(line)
                    row["itm_each"] = tuple(row.get("itm_each", ()))
                    decision = Decision(**{name: row[name] for name in known})
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{path}, line {number}: no manifest row ({error})") from error
                yield decision
    except OSError as error:
        raise DataError(f"cannot read the manifest {path}: {error.strerror}") from error


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file whole or not at all. Raises DataError when it cannot (a full disk)."""
    # Ranks of several machines may write the same file at the same time.
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")
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
    candidates: Sequence[Candidate],
    scores: Sequence[Score | None],
    *,
    threshold: float,
    synthetic_threshold: float | None = None,
    keep: Keep = "both",
    trusted: tuple[str, ...] = (),
    filter_hash: str | None = None,
    seed: int = 0,
) -> list[Decision]:
    """Accepts or rejects each candidate text of one image (BLIP, section 3.3).

    Args:
        key: the image.
        candidates: its texts.
        scores: one each; None for a text that was not judged.
        threshold: least ITM probability of an accepted text. synthetic_threshold: of a synthetic
            one, where it is another.
        keep: "both", "web" (all but the synthetic) or "synthetic".
        trusted: sources that are accepted whatever their score.
        filter_hash: of the filters; None where there is none, and every text is accepted.
        seed: noted in each row.

    Raises:
        DataError: the two lists differ in length.
    """
    if len(candidates) != len(scores):
        raise DataError(f"image {key}: {len(candidates)} texts, but {len(scores)} scores")
    rule = _Rule(threshold, synthetic_threshold, keep, trusted, filter_hash is not None)
    decisions: list[Decision] = []
    taken: set[str] = set()
    for candidate, score in zip(candidates, scores, strict=True):
        accepted, reason = rule.decide(candidate, score, taken)
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
                None if score is None else filter_hash,
                candidate.captioner,
                seed,
                () if score is None else score.itm_each,
            )
        )
    return decisions


@dataclass(frozen=True)
class _Rule:
    """When a text is accepted. filtered: there are filters."""

    threshold: float
    synthetic_threshold: float | None
    keep: Keep
    trusted: tuple[str, ...]
    filtered: bool

    def decide(
        self, candidate: Candidate, score: Score | None, taken: set[str]
    ) -> tuple[bool, str]:
        """Whether, and why where the score does not say it. taken: accepted of this image."""
        synthetic = candidate.source == SYNTHETIC
        if not says_something(candidate.text):
            return False, "empty text"
        if candidate.text in taken:
            return False, "same as an accepted text of this image"
        if not synthetic and candidate.source in self.trusted:
            return True, "trusted source"
        if synthetic and self.keep == "web":
            return False, "synthetic texts are not kept"
        if not synthetic and self.keep == "synthetic":
            return False, "only synthetic texts are kept"
        if not self.filtered:
            return True, "no filter"
        if score is None:
            return False, "not judged"
        least = self.threshold
        if synthetic and self.synthetic_threshold is not None:
            least = self.synthetic_threshold
        return score.itm >= least, ""


def says_something(text: str) -> bool:
    """Whether a text has a word left after clean-up (and can be encoded at all)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates
        return False
    return bool(pre_caption(text).strip())

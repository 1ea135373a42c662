"""Caption metrics by pycocoevalcap, the official scorer: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

Its tokenizer and METEOR need Java, SPICE also a download of its own, which is never started from
here. Without Java texts are tokenised by `tokenize_caption`: scores are then comparable with each
other, not quite with published ones.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blipfast.errors import BlipfastError, DataError

_PUNCTUATION = re.compile(r"[^\w\s'-]|(?<!\w)['-]|['-](?!\w)")


@dataclass(frozen=True)
class CiderScore:
    """CIDEr-D over a set (1.0 = 100 in papers), and of each caption."""

    mean: float
    each: tuple[float, ...]


def tokenize_caption(text: str) -> list[str]:
    """Lower-case words without punctuation; apostrophes and hyphens inside words stay."""
    return _PUNCTUATION.sub(" ", text.lower()).split()


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CiderScore:
    """CIDEr-D of one caption per image against that image's references.

    Words are weighed by their rarity among the images' references, so a set of one image scores 0.
    An empty caption scores 0.

    Raises:
        DataError: the lists differ in length or are empty, or an image has no reference.
        BlipfastError: pycocoevalcap is not installed.
    """
    _check(captions, references)
    scorer = _scorer("cider.cider", "Cider")
    texts = _tokenised(captions, references, ptb=False)
    with contextlib.redirect_stdout(io.StringIO()):  # it may chat
        mean, each = scorer.compute_score(*texts)
    return CiderScore(float(mean), tuple(float(score) for score in each))


@dataclass(frozen=True)
class CaptionMetrics:
    """Scores in percent by name, of all images and of those of each domain by themselves.

    cider_each: of each image. tokenizer: "ptb", the official one, or "plain" where there is no
    Java. left_out: what was not computed, and why.
    """

    scores: dict[str, float]
    by_domain: dict[str, dict[str, float]]
    cider_each: tuple[float, ...]
    tokenizer: Literal["ptb", "plain"]
    left_out: dict[str, str]


def caption_metrics(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    domains: Sequence[str | None] | None = None,
    *,
    java: bool | None = None,
) -> CaptionMetrics:
    """BLEU-1 to 4, METEOR, ROUGE-L, CIDEr-D and SPICE of one caption per image.

    domains: of each image (NoCaps' in, near and out), None for those that belong to none. Words are
    weighed by their rarity within a domain there: an overall CIDEr is no mean of the domains'.
    java: use it for what needs it; None uses it if it is installed. Raises as `cider` does, and
    BlipfastError when Java was asked for and is absent, or ends early.
    """
    _check(captions, references)
    found = shutil.which("java") is not None
    if java and not found:
        raise BlipfastError("the official tokenizer, METEOR and SPICE need java on the PATH")
    with_java = found if java is None else java
    left_out = {} if with_java else dict.fromkeys(("meteor", "spice"), "needs Java")
    if with_java and not _has_spice():
        left_out["spice"] = "needs Stanford CoreNLP 3.6.0: run pycocoevalcap's Spice() once"
    truth, given = _tokenised(captions, references, ptb=with_java)
    inside: dict[str, list[int]] = {}
    for i, name in enumerate(domains or ()):
        if name is not None:
            inside.setdefault(name, []).append(i)
    with contextlib.redirect_stdout(io.StringIO()), _scorers(left_out) as scorers:
        scores, each = _scores(scorers, (truth, given))
        by_domain = {}
        for name, numbers in sorted(inside.items()):
            part = ({i: truth[i] for i in numbers}, {i: given[i] for i in numbers})
            by_domain[name] = _scores(scorers, part)[0]
    return CaptionMetrics(scores, by_domain, each, "ptb" if with_java else "plain", left_out)


_Texts = tuple[dict[int, list[str]], dict[int, list[str]]]  # references, captions


def _check(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(captions) != len(references) or not captions:
        raise DataError(
            f"captions are scored with one caption per image: got {len(captions)} captions and "
            f"references of {len(references)} images"
        )
    for i, its in enumerate(references):
        if not any(tokenize_caption(text) for text in its):
            raise DataError(f"image {i} has no reference caption")


def _tokenised(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, ptb: bool
) -> _Texts:
    if not ptb:
        truth = {
            i: [" ".join(words) for text in its if (words := tokenize_caption(text))]
            for i, its in enumerate(references)
        }
        return truth, {i: [" ".join(tokenize_caption(text))] for i, text in enumerate(captions)}
    tokenizer = _scorer("tokenizer.ptbtokenizer", "PTBTokenizer")

    def cut(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
        rows = {i: [{"caption": _line(text)} for text in its] for i, its in enumerate(texts)}
        try:
            found: dict[int, list[str]] = tokenizer.tokenize(rows)
        except OSError as error:  # it writes into its own folder
            raise BlipfastError(f"pycocoevalcap's tokenizer cannot run: {error}") from error
        if [len(found.get(i, ())) for i in rows] != [len(its) for its in texts]:
            raise BlipfastError("pycocoevalcap's tokenizer ended early; look at Java's message")
        return found

    return cut([[t for t in its if t.strip()] for its in references]), cut([[t] for t in captions])


def _line(text: str) -> str:
    """Every kind of line end is a space: the tokenizer counts lines."""
    return " ".join(text.split())


@contextlib.contextmanager
def _scorers(left_out: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The scorers by name, but those left out; METEOR's Java program runs all the while."""
    scorers = {"bleu": _scorer("bleu.bleu", "Bleu")}
    if "meteor" not in left_out:
        scorers["meteor"] = _scorer("meteor.meteor", "Meteor")
    scorers["rouge_l"] = _scorer("rouge.rouge", "Rouge")
    scorers["cider"] = _scorer("cider.cider", "Cider")
    if "spice" not in left_out:
        scorers["spice"] = _scorer("spice.spice", "Spice")
    try:
        yield scorers
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BlipfastError(f"a Java program of pycocoevalcap ended early ({error})") from error
    finally:
        lock = getattr(scorers.get("meteor"), "lock", None)
        if lock is not None and lock.locked():  # its destructor waits for it
            lock.release()


def _scores(
    scorers: Mapping[str, Any], texts: _Texts
) -> tuple[dict[str, float], tuple[float, ...]]:
    """In percent, and CIDEr of each image."""
    scores: dict[str, float] = {}
    cider_each: tuple[float, ...] = ()
    for name, scorer in scorers.items():
        if name == "bleu":
            found, _ = scorer.compute_score(*texts, verbose=0)
            scores |= {f"bleu_{n}": 100 * float(value) for n, value in enumerate(found, 1)}
            continue
        mean, each = scorer.compute_score(*texts)
        scores[name] = 100 * float(mean)
        if name == "cider":
            cider_each = tuple(100 * float(one) for one in each)
    return scores, cider_each


def _scorer(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)()
    except ImportError as error:
        raise BlipfastError(
            "caption metrics need pycocoevalcap: pip install 'blipfast[metrics]'"
        ) from error


def _has_spice() -> bool:
    found = importlib.util.find_spec("pycocoevalcap.spice")
    places = list(found.submodule_search_locations or ()) if found else []
    return any((Path(place) / "lib/stanford-corenlp-3.6.0.jar").is_file() for place in places)

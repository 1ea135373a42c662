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
from collections.abc import Iterator, Sequence
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
    """Scores in percent by name, of each image too, and what was not computed and why.

    tokenizer: "ptb", the official one, or "plain" where there is no Java.
    """

    scores: dict[str, float]
    cider_each: tuple[float, ...]
    tokenizer: Literal["ptb", "plain"]
    left_out: dict[str, str]


def caption_metrics(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, java: bool | None = None
) -> CaptionMetrics:
    """BLEU-1 to 4, METEOR, ROUGE-L, CIDEr-D and SPICE of one caption per image.

    java: use it for what needs it; None uses it if it is installed. Raises as `cider` does, and
    BlipfastError when Java was asked for and is absent, or ends early.
    """
    _check(captions, references)
    found = shutil.which("java") is not None
    if java and not found:
        raise BlipfastError("the official tokenizer, METEOR and SPICE need java on the PATH")
    with_java = found if java is None else java
    left_out = {} if with_java else dict.fromkeys(("meteor", "spice"), "needs Java")
    texts = _tokenised(captions, references, ptb=with_java)
    scores: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = _scorer("bleu.bleu", "Bleu").compute_score(*texts, verbose=0)
        scores |= {f"bleu_{n}": 100 * float(value) for n, value in enumerate(bleu, 1)}
        if with_java:
            scores["meteor"] = 100 * _meteor(texts)
        scores["rouge_l"] = 100 * float(_scorer("rouge.rouge", "Rouge").compute_score(*texts)[0])
        mean, each = _scorer("cider.cider", "Cider").compute_score(*texts)
        scores["cider"] = 100 * float(mean)
        if with_java and _has_spice():
            scores["spice"] = 100 * float(_scorer("spice.spice", "Spice").compute_score(*texts)[0])
        elif with_java:
            left_out["spice"] = "needs Stanford CoreNLP 3.6.0: run pycocoevalcap's Spice() once"
    return CaptionMetrics(
        scores, tuple(100 * float(one) for one in each), "ptb" if with_java else "plain", left_out
    )


def metrics_by_domain(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    domains: Sequence[str | None],
    *,
    java: bool | None = None,
) -> tuple[CaptionMetrics, dict[str, dict[str, float]]]:
    """Metrics of all images, and of those of each domain (NoCaps' in, near and out) by themselves.

    Words are weighed by their rarity within a domain there, so that an overall CIDEr is no mean of
    the domains'. domains: None for images that belong to none.
    """
    overall = caption_metrics(captions, references, java=java)
    by_domain = {}
    for domain in sorted({name for name in domains if name is not None}):
        inside = [i for i, name in enumerate(domains) if name == domain]
        by_domain[domain] = caption_metrics(
            [captions[i] for i in inside], [references[i] for i in inside], java=java
        ).scores
    return overall, by_domain


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
    try:
        return tuple(  # type: ignore[return-value]
            tokenizer.tokenize({i: [{"caption": _line(t)} for t in its] for i, its in texts})
            for texts in (
                enumerate([[t for t in its if t.strip()] for its in references]),
                ((i, [text]) for i, text in enumerate(captions)),
            )
        )
    except OSError as error:  # it writes into its own folder
        raise BlipfastError(f"pycocoevalcap's tokenizer cannot run: {error}") from error


def _line(text: str) -> str:
    """Every kind of line end is a space: the tokenizer counts lines."""
    return " ".join(text.split())


def _meteor(texts: _Texts) -> float:
    with _ending(_scorer("meteor.meteor", "Meteor")) as scorer:
        try:
            return float(scorer.compute_score(*texts)[0])
        except (OSError, ValueError) as error:
            raise BlipfastError(f"METEOR's Java program ended early ({error})") from error


@contextlib.contextmanager
def _ending(scorer: Any) -> Iterator[Any]:
    """Its destructor waits for a lock that an error leaves closed."""
    try:
        yield scorer
    finally:
        if scorer.lock.locked():
            scorer.lock.release()


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

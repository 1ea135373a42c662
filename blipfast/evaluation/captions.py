"""Caption metrics: CIDEr, by pycocoevalcap.

Its own tokenizer needs Java, so texts are tokenised here: lower case, punctuation removed, split at
spaces. Scores are comparable with each other, not quite with published ones.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

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
    if len(captions) != len(references) or not captions:
        raise DataError(
            f"CIDEr needs one caption per image: got {len(captions)} captions and references of "
            f"{len(references)} images"
        )
    for i, its in enumerate(references):
        if not any(tokenize_caption(text) for text in its):
            raise DataError(f"image {i} has no reference caption")
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise BlipfastError("CIDEr needs pycocoevalcap: pip install 'blipfast[metrics]'") from error
    truth = {
        i: [" ".join(words) for text in its if (words := tokenize_caption(text))]
        for i, its in enumerate(references)
    }
    found = {i: [" ".join(tokenize_caption(text))] for i, text in enumerate(captions)}
    with contextlib.redirect_stdout(io.StringIO()):  # it may chat
        mean, each = Cider().compute_score(truth, found)
    return CiderScore(float(mean), tuple(float(score) for score in each))

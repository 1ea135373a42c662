"""Text clean-up as BLIP's data sets do it: the original's strings exactly, odd cases included."""

from __future__ import annotations

import re

_PUNCTUATION = re.compile(r"""[.!"()*#:;~]""")
_SPACE_RUN = re.compile(r"\s{2,}")


def _first_words(text: str, max_words: int) -> str:
    # Split at single spaces only: tabs and repeated spaces count as the original counts them.
    words = text.split(" ")
    return " ".join(words[:max_words]) if len(words) > max_words else text


def pre_caption(text: str, max_words: int = 30) -> str:
    """Clean a caption: lower case, ``.!"()*#:;~`` to spaces, runs of space folded, cut.

    Args:
        text: any string; the result may be empty.
        max_words: words kept (30 in pre-training and captioning, 40 for NLVR2 and video).
    """
    text = _PUNCTUATION.sub(" ", text.lower())
    text = _SPACE_RUN.sub(" ", text).rstrip("\n").strip(" ")
    return _first_words(text, max_words)


def pre_question(text: str, max_words: int = 50) -> str:
    """Clean a question: lower case, ``.!"()*#:;~`` removed, spaces at the end dropped, cut.

    Unlike `pre_caption`, inner and leading spaces stay, as in the original.
    """
    return _first_words(_PUNCTUATION.sub("", text.lower()).rstrip(" "), max_words)

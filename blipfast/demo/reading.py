"""Reads captions back into claims, so that what a model writes can be checked against a scene."""

from __future__ import annotations

import re
from collections.abc import Iterable

from blipfast.demo.captions import Claim, Layout, Relation, Scene
from blipfast.demo.concepts import BACKGROUNDS, CONCEPTS

_NOUN_OF = {
    word: noun
    for noun, concept in CONCEPTS.items()
    for word in (noun, concept.plural, *concept.synonyms)
}
_PREFIX = re.compile(r"an? (?:picture|drawing|image|photo) of ")
_BACKGROUND = re.compile(rf" (?:with a|on a|on) ({'|'.join(BACKGROUNDS)})(?: background)?$")
_COUNTS = {"two": 2, "three": 3}
_ROW = re.compile(r"(.+), (.+) and (.+) from (left to right|top to bottom)")
_BETWEEN = re.compile(r"(.+) between (.+) and (.+)")
_LIST = re.compile(r"(?:(.+), )?(.+) and (.+)")
# How two things stand, whether the second is named first, and along which layout.
_PAIRS: tuple[tuple[str, bool, Layout], ...] = (
    (" to the left of ", False, "beside"),
    (" to the right of ", True, "beside"),
    (" above ", False, "above"),
    (" below ", True, "above"),
)


def read_claim(text: str) -> Claim | None:
    """What a caption in `Writer`'s wording says; None for any other text."""
    text = _PREFIX.sub("", text.strip().lower(), count=1)
    background = None
    if found := _BACKGROUND.search(text):
        background, text = found[1], text[: found.start()]
    count, _, plural = text.partition(" ")
    if count in _COUNTS and plural in _NOUN_OF:
        return Claim((_NOUN_OF[plural],) * _COUNTS[count], background=background)
    if found := _ROW.fullmatch(text):
        layout: Layout = "beside" if "left" in found[4] else "above"
        return _claim(found.groups()[:3], background, "order", layout)
    if found := _BETWEEN.fullmatch(text):
        return _claim((found[2], found[1], found[3]), background, "between")
    for words, swapped, layout in _PAIRS:
        first, where, second = text.partition(words)
        if where:
            pair = (second, first) if swapped else (first, second)
            return _claim(pair, background, "order", layout)
    if found := _LIST.fullmatch(text):
        return _claim([phrase for phrase in found.groups() if phrase], background)
    return _claim([text], background)


def is_right(text: str, scene: Scene) -> bool:
    """Whether a caption says something of the scene, and nothing that is wrong."""
    claim = read_claim(text)
    return claim is not None and claim.true_of(scene)


def _claim(
    phrases: Iterable[str],
    background: str | None,
    relation: Relation = "none",
    layout: Layout = "beside",
) -> Claim | None:
    nouns = []
    for phrase in phrases:
        article, _, word = phrase.partition(" ")
        if article not in ("a", "an") or word not in _NOUN_OF:
            return None
        nouns.append(_NOUN_OF[word])
    return Claim(tuple(nouns), relation, layout, background)

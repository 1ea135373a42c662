"""Scenes, what a caption claims about one, and the words for it.

A caption is written from a `Claim`, and a claim can be checked against any scene. So it is known
of each text whether it is right, a "wrong" text is never right by accident, and test captions
fit one image each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from blipfast.demo.concepts import BACKGROUNDS, CONCEPTS
from blipfast.errors import DataError

Layout = Literal["beside", "above"]
Relation = Literal["none", "order", "between"]
NoiseKind = Literal["", "replaced", "object", "background", "relation"]

_COUNTS = ("no", "one", "two", "three")
_PREFIXES = ("a picture of ", "a drawing of ", "an image of ", "a photo of ")
_BACKGROUND_PHRASES = (" on a {} background", " on {}", " with a {} background")


@dataclass(frozen=True)
class Scene:
    """One to three things, left to right ("beside") or top to bottom ("above")."""

    objects: tuple[str, ...]
    layout: Layout
    background: str

    @property
    def distinct(self) -> bool:
        """Whether no thing occurs twice."""
        return len(set(self.objects)) == len(self.objects)


@dataclass(frozen=True)
class Claim:
    """What a caption says.

    Attributes:
        objects: all the things in the picture.
        relation: "none"; "order": they stand in this order along `layout`; "between": the
            second is between the others.
        layout: the direction that "order" speaks of.
        background: its colour, or None where the caption is silent.
    """

    objects: tuple[str, ...]
    relation: Relation = "none"
    layout: Layout = "beside"
    background: str | None = None

    def true_of(self, scene: Scene) -> bool:
        """Whether the scene is as claimed."""
        if Counter(self.objects) != Counter(scene.objects):
            return False
        if self.background is not None and self.background != scene.background:
            return False
        if self.relation == "none":
            return True
        if self.relation == "between":
            return self.objects[1] == scene.objects[1]
        return self.layout == scene.layout and self.objects == scene.objects


def draw_claim(
    scene: Scene, rng: np.random.Generator, say_relation: float = 0.8, say_background: float = 0.7
) -> Claim:
    """A true claim about a scene, with or without its relation and background."""
    relation: Relation = "none"
    if len(scene.objects) > 1 and scene.distinct and rng.random() < say_relation:
        three = len(scene.objects) == 3
        relation = "between" if three and rng.random() < 0.5 else "order"
    background = scene.background if rng.random() < say_background else None
    return Claim(scene.objects, relation, scene.layout, background)


def falsify(
    claim: Claim,
    scene: Scene,
    rng: np.random.Generator,
    kinds: tuple[NoiseKind, ...],
    nouns: Sequence[str] = tuple(CONCEPTS),
    may_meet: Callable[[tuple[str, ...]], bool] = lambda objects: True,
) -> tuple[Claim, NoiseKind]:
    """The claim with one detail wrong: an object, the background or the relation.

    Kinds that the claim says nothing about are left out; an object can always be swapped.
    nouns: what it is swapped for. may_meet: whether things may be named together.
    Raises DataError when no thing may be named in any object's place.
    """
    possible: list[NoiseKind] = ["object"] if "object" in kinds else []
    if "background" in kinds and claim.background is not None:
        possible.append("background")
    if "relation" in kinds and claim.relation != "none":
        possible.append("relation")
    kind: NoiseKind = possible[rng.integers(len(possible))] if possible else "object"
    objects = list(claim.objects)
    if kind == "background":
        others = [colour for colour in BACKGROUNDS if colour != scene.background]
        return replace(claim, background=others[rng.integers(len(others))]), kind
    if kind == "relation":
        if claim.relation == "order":
            objects.reverse()
        else:
            objects[0], objects[1] = objects[1], objects[0]
        return replace(claim, objects=tuple(objects)), kind

    def swaps(old: str) -> list[tuple[str, ...]]:
        new = [tuple(n if o == old else o for o in objects) for n in nouns if n not in objects]
        return [choice for choice in new if may_meet(choice)]

    swapped = swaps(objects[rng.integers(len(objects))])
    swapped = swapped or [choice for old in objects for choice in swaps(old)]
    if not swapped:
        raise DataError(f"nothing may be named in the place of {objects}; ask for more concepts")
    return replace(claim, objects=swapped[rng.integers(len(swapped))]), kind


class Writer:
    """Puts claims into words, varying as people do.

    Args:
        rng: draws the wording.
        prefix: share of captions that begin "a picture of" or the like.
        synonym: share of nouns replaced by another word for the thing.
    """

    def __init__(self, rng: np.random.Generator, prefix: float = 0.0, synonym: float = 0.1) -> None:
        self.rng = rng
        self.prefix = prefix
        self.synonym = synonym

    def write(self, claim: Claim) -> str:
        """One caption: lower case, no full stop."""
        text = self._things(claim)
        if claim.background is not None:
            text += self._pick(_BACKGROUND_PHRASES).format(claim.background)
        if self.rng.random() < self.prefix:
            text = self._pick(_PREFIXES) + text
        return text

    def _pick(self, choices: tuple[str, ...] | list[str]) -> str:
        return choices[int(self.rng.integers(len(choices)))]

    def _noun_phrase(self, noun: str) -> str:
        concept = CONCEPTS[noun]
        word = noun
        if concept.synonyms and self.rng.random() < self.synonym:
            word = self._pick(concept.synonyms)
        return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"

    def _things(self, claim: Claim) -> str:
        names = claim.objects
        if len(set(names)) == 1 and len(names) > 1:
            return f"{_COUNTS[len(names)]} {CONCEPTS[names[0]].plural}"
        phrases = [self._noun_phrase(noun) for noun in names]
        if len(phrases) == 1:
            return phrases[0]
        if claim.relation == "between":
            ends = [phrases[0], phrases[2]]
            self.rng.shuffle(ends)
            return f"{phrases[1]} between {ends[0]} and {ends[1]}"
        if claim.relation == "order":
            return self._in_order(phrases, claim.layout)
        mixed = list(phrases)
        self.rng.shuffle(mixed)
        return ", ".join(mixed[:-1]) + f" and {mixed[-1]}"

    def _in_order(self, phrases: list[str], layout: Layout) -> str:
        if len(phrases) == 3:
            where = "from left to right" if layout == "beside" else "from top to bottom"
            return f"{phrases[0]}, {phrases[1]} and {phrases[2]} {where}"
        first, second = phrases
        if layout == "beside":
            return self._pick(
                [f"{first} to the left of {second}", f"{second} to the right of {first}"]
            )
        return self._pick([f"{first} above {second}", f"{second} below {first}"])


def vocabulary_texts() -> list[str]:
    """Texts that hold every word a caption can use, for `BlipTokenizer.subset`."""
    words = [*_PREFIXES, *_COUNTS, *BACKGROUNDS]
    words += [phrase.replace("{}", "") for phrase in _BACKGROUND_PHRASES]
    for concept in CONCEPTS.values():
        words += [concept.noun, concept.plural, *concept.synonyms]
    words += ["a an and , between above below to the left of right from top bottom"]
    return words

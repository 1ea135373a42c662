"""The forty-eight things that demo scenes are made of, and the backgrounds.

Names are Unicode CLDR short names (through the package `emoji`), shortened to one plain noun.
Chosen so that each is told from the others at twenty pixels in every artist's hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from blipfast.errors import DataError


@dataclass(frozen=True)
class Concept:
    """A thing: its noun, its CLDR name, its plural and other words for it."""

    noun: str
    cldr: str
    plural: str
    synonyms: tuple[str, ...] = ()


# noun, CLDR name where it differs, plural where it is not noun + "s", synonyms
_TABLE = """
dog      | dog_face        |              | puppy
cat      | cat_face        |              | kitten
pig      | pig_face        |              | piglet
frog     |                 |              |
lion     |                 |              |
panda    |                 |              | panda bear
penguin  |                 |              |
owl      |                 |              |
elephant |                 |              |
octopus  |                 | octopuses    |
crab     |                 |              |
butterfly|                 | butterflies  |
turtle   |                 |              | tortoise
fish     | tropical_fish   | fish         |
snail    |                 |              |
whale    | spouting_whale  |              |
apple    | red_apple       |              | red apple
banana   |                 |              |
strawberry |               | strawberries |
watermelon |               |              | melon
carrot   |                 |              |
pizza    |                 |              |
burger   | hamburger       |              | hamburger
mushroom |                 |              |
pineapple |                |              |
lemon    |                 |              |
cookie   |                 |              | biscuit
car      | automobile      |              | red car
tractor  |                 |              |
bicycle  |                 |              | bike
rocket   |                 |              | space rocket
plane    | airplane        |              | airplane
boat     | sailboat        |              | sailing boat
train    | locomotive      |              | steam train
helicopter |               |              |
clock    | alarm_clock     |              | alarm clock
guitar   |                 |              |
key      |                 |              |
house    |                 |              | home
tree     | evergreen_tree  |              | pine tree
sunflower |                |              | yellow flower
cactus   |                 | cactuses     |
crown    |                 |              | golden crown
balloon  |                 |              | red balloon
robot    |                 |              |
ghost    |                 |              |
star     |                 |              | yellow star
drum     |                 |              |
"""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (128, 130, 134),
    "blue": (70, 120, 225),
    "green": (60, 170, 85),
    "yellow": (250, 225, 90),
    "pink": (250, 160, 195),
}
"""Colour name to RGB, before a small variation from scene to scene."""


def _parse(line: str) -> Concept:
    noun, cldr, plural, synonyms = (part.strip() for part in line.split("|"))
    other = tuple(s.strip() for s in synonyms.split(",") if s.strip())
    return Concept(noun, cldr or noun, plural or f"{noun}s", other)


CONCEPTS: dict[str, Concept] = {
    concept.noun: concept for concept in map(_parse, _TABLE.strip().splitlines())
}
"""Noun to concept, in a fixed order."""


@lru_cache(maxsize=1)
def _code_points() -> dict[str, str]:
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise DataError("the demo needs the package emoji: pip install 'blipfast[demo]'") from error
    return {str(entry["en"]).strip(":"): text for text, entry in EMOJI_DATA.items()}


def code_point(noun: str) -> int:
    """Unicode code point of a concept's emoji.

    Raises:
        DataError: if there is no such concept, or the package `emoji` is missing.
    """
    if noun not in CONCEPTS:
        raise DataError(f"no concept {noun!r}; known: {', '.join(CONCEPTS)}")
    characters = _code_points().get(CONCEPTS[noun].cldr)
    if characters is None:
        raise DataError(f"the installed package emoji has no name {CONCEPTS[noun].cldr!r}")
    return ord(characters[0])

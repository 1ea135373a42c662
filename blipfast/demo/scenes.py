"""The demo's data: emoji scenes with noisy "web" captions, clean captions and a held-out test.

What is particular here:
- The test shows pairs of things that training never shows together, nor names together, in right
  or wrong texts; and each test caption is true of one test image only, so recall is well defined.
- Web texts carry a truth flag for scoring the filter; `to_record` leaves it out.
- Everything follows from the seed; sprites are cached, so a scene takes well under 1 ms.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np
from PIL import Image

from blipfast.data import Record, TextEntry
from blipfast.demo.artists import ATTRIBUTION, available_artists, require_artist, sprite
from blipfast.demo.captions import (
    Claim,
    Layout,
    NoiseKind,
    Scene,
    Writer,
    draw_claim,
    falsify,
    vocabulary_texts,
)
from blipfast.demo.concepts import BACKGROUNDS, CONCEPTS
from blipfast.errors import DataError

__all__ = [
    "ATTRIBUTION",
    "DemoData",
    "DemoRecord",
    "Scene",
    "available_artists",
    "build_demo_data",
    "render",
    "vocabulary_texts",
]

HARD_KINDS: tuple[NoiseKind, ...] = ("object", "background", "relation")
_RESERVED_SHARE = 0.15
_MAX_MISSES = 1000
_SIZES = {1: (0.56, 0.76), 2: (0.40, 0.48), 3: (0.30, 0.33)}
# Things, layout and whether they are all alike, with the share of scenes.
_MIXTURE: tuple[tuple[int, Layout, bool, float], ...] = (
    (1, "beside", False, 0.25),
    (2, "beside", True, 0.08),
    (3, "beside", True, 0.07),
    (2, "beside", False, 0.25),
    (2, "above", False, 0.20),
    (3, "beside", False, 0.15),
)


@dataclass(frozen=True)
class DemoRecord:
    """One picture with one text.

    Attributes:
        key: unique name.
        image: JPEG or PNG bytes.
        caption: the text that goes with it in training, or the test caption.
        source: "web" or "human".
        is_correct: whether the text is true. For scoring only: never shown to training.
        noise_kind: how a wrong text was made; "" for a right one.
        references: right descriptions in other words, for CIDEr and galleries.
        artist: who drew it.
        scene: what is in it.
    """

    key: str
    image: bytes
    caption: str
    source: str
    is_correct: bool
    noise_kind: NoiseKind
    references: tuple[str, ...]
    artist: str
    scene: Scene
    image_size: int

    def to_record(self) -> Record:
        """For shards: the picture and its text, without the truth."""
        side = self.image_size
        return Record(self.key, self.image, (TextEntry(self.caption, self.source),), side, side)


@dataclass(frozen=True)
class DemoData:
    """All parts of the demo's data.

    Attributes:
        web: noisy texts, for pre-training.
        clean: right texts, for fine-tuning the captioner and the filter.
        val: as `web`, but other scenes.
        test: held-out combinations, captions unique.
    """

    web: list[DemoRecord]
    clean: list[DemoRecord]
    val: list[DemoRecord]
    test: list[DemoRecord]
    seed: int
    image_size: int
    noise: float
    artists: tuple[str, ...]
    held_out_artist: str | None = None
    attribution: dict[str, str] = field(default_factory=dict)


def render(
    scene: Scene,
    artist: str,
    image_size: int,
    rng: np.random.Generator,
    encoding: Literal["jpeg", "png"] = "jpeg",
) -> bytes:
    """Draw a scene with small variations of place, size and background.

    Args:
        scene: what to draw.
        artist: whose drawings.
        image_size: side in pixels.
        rng: draws the variations.
        encoding: "jpeg" (quality 92) or "png".

    Returns:
        The encoded ``image_size x image_size`` RGB picture.
    """
    shift = rng.integers(-12, 13, size=3)
    base = BACKGROUNDS[scene.background]
    colour = tuple(int(np.clip(c + s, 0, 255)) for c, s in zip(base, shift, strict=True))
    canvas = Image.new("RGB", (image_size, image_size), colour)
    count = len(scene.objects)
    low, high = _SIZES[count]
    for i, noun in enumerate(scene.objects):
        size = max(4, round(image_size * rng.uniform(low, high)))
        cell = image_size / count
        # Along the layout each thing keeps to its cell; across it moves more freely.
        free_along, free_across = (cell - size) / 2, (image_size - size) / 2
        along = (i + 0.5) * cell - size / 2 + rng.uniform(-1, 1) * max(0.0, free_along)
        wander = 0.9 if count == 1 else 0.6
        across = free_across * (1 + wander * rng.uniform(-1, 1))
        x, y = (along, across) if scene.layout == "beside" else (across, along)
        drawing = sprite(artist, noun, size)
        canvas.paste(drawing, (round(x), round(y)), drawing)
    buffer = io.BytesIO()
    if encoding == "jpeg":
        canvas.save(buffer, "JPEG", quality=92, subsampling=0)
    else:
        canvas.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class _Builder:
    def __init__(
        self,
        seed: int,
        image_size: int,
        artists: tuple[str, ...],
        concepts: tuple[str, ...],
        encoding: Literal["jpeg", "png"],
    ) -> None:
        streams = np.random.SeedSequence(seed).spawn(3)
        self.scene_rng, self.text_rng, self.pixel_rng = map(np.random.default_rng, streams)
        self.image_size = image_size
        self.artists = artists
        self.concepts = concepts
        self.encoding: Literal["jpeg", "png"] = encoding
        pairs = [frozenset(pair) for pair in combinations(concepts, 2)]
        chosen = self.scene_rng.permutation(len(pairs))[: round(_RESERVED_SHARE * len(pairs))]
        self.reserved = {pairs[i] for i in chosen}

    def _holds_reserved(self, objects: tuple[str, ...]) -> bool:
        return any(frozenset(pair) in self.reserved for pair in combinations(objects, 2))

    def scene(self, held_out: bool) -> Scene:
        """A training scene (no reserved pair) or a test scene (at least one)."""
        shares = np.array([share for *_, share in _MIXTURE])
        if held_out:  # only different things form a new combination
            shares *= [count > 1 and not alike for count, _, alike, _ in _MIXTURE]
        rng = self.scene_rng
        count, layout, alike, _ = _MIXTURE[rng.choice(len(_MIXTURE), p=shares / shares.sum())]
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        while True:
            drawn = rng.choice(len(self.concepts), size=1 if alike else count, replace=False)
            objects = tuple(self.concepts[i] for i in drawn) * (count if alike else 1)
            if self._holds_reserved(objects) == held_out:
                return Scene(objects, layout, background)

    def record(
        self,
        key: str,
        scene: Scene,
        artist: str,
        claim: Claim,
        source: str,
        noise_kind: NoiseKind = "",
    ) -> DemoRecord:
        """Render and write up one scene. Web texts may begin "a picture of"."""
        writer = Writer(self.text_rng, prefix=0.3 if source == "web" else 0.0)
        plain = Writer(self.text_rng)
        caption = writer.write(claim)
        references = tuple(plain.write(draw_claim(scene, self.text_rng)) for _ in range(5))
        if not noise_kind and source == "human":
            references = (caption, *references[1:])
        image = render(scene, artist, self.image_size, self.pixel_rng, self.encoding)
        return DemoRecord(
            key,
            image,
            caption,
            source,
            not noise_kind,
            noise_kind,
            references,
            artist,
            scene,
            self.image_size,
        )

    def noisy(
        self, name: str, artists: list[str], noise: float, hard_share: float
    ) -> list[DemoRecord]:
        """Scenes of which exactly the share `noise` has a wrong text."""
        count, rng = len(artists), self.text_rng
        scenes = [self.scene(held_out=False) for _ in range(count)]
        claims = [draw_claim(scene, rng) for scene in scenes]
        wrong = rng.permutation(count)[: round(noise * count)]
        hard = set(wrong[: round(hard_share * len(wrong))].tolist())
        final: list[tuple[Claim, NoiseKind]] = [(claim, "") for claim in claims]
        for i in wrong.tolist():
            if i in hard:
                final[i] = falsify(
                    claims[i], scenes[i], rng, HARD_KINDS, self.concepts,
                    lambda objects: not self._holds_reserved(objects),
                )  # fmt: skip
            else:
                final[i] = self._other_claim(scenes[i], claims), "replaced"
        return [
            self.record(f"{name}-{i:06d}", scenes[i], artists[i], claim, "web", kind)
            for i, (claim, kind) in enumerate(final)
        ]

    def _other_claim(self, scene: Scene, claims: list[Claim]) -> Claim:
        # A caption of another picture that is not half right: it must name a thing not here.
        for _ in range(1000):
            claim = claims[self.text_rng.integers(len(claims))]
            if not set(claim.objects) <= set(scene.objects):
                return claim
        raise DataError("too few different scenes to replace texts; ask for more web scenes")

    def test(self, artists: list[str]) -> list[DemoRecord]:
        """Held-out scenes; each caption is true of its own picture only."""
        by_things: dict[tuple[str, ...], list[tuple[Scene, Claim]]] = defaultdict(list)
        records: list[DemoRecord] = []
        misses = 0  # in a row
        while len(records) < len(artists):
            if misses == _MAX_MISSES:
                raise DataError(
                    f"only {len(records)} different test scenes found; ask for fewer than "
                    f"{len(artists)} or for more concepts"
                )
            scene = self.scene(held_out=True)
            claim = draw_claim(scene, self.text_rng, say_relation=0.9, say_background=0.85)
            rivals = by_things[tuple(sorted(scene.objects))]
            if any(claim.true_of(other) or its.true_of(scene) for other, its in rivals):
                misses += 1
                continue
            misses = 0
            rivals.append((scene, claim))
            i = len(records)
            records.append(self.record(f"test-{i:06d}", scene, artists[i], claim, "human"))
        return records


def build_demo_data(
    seed: int = 0,
    num_web: int = 6000,
    num_clean: int = 1000,
    num_test: int = 400,
    num_val: int = 400,
    image_size: int = 64,
    noise: float = 0.3,
    hard_share: float = 0.5,
    artists: Sequence[str] = ("twemoji", "openmoji"),
    held_out_artist: str | None = None,
    held_out_share: float = 0.0,
    num_concepts: int = len(CONCEPTS),
    encoding: Literal["jpeg", "png"] = "jpeg",
) -> DemoData:
    """Draw all parts of the demo's data.

    Args:
        seed: decides everything.
        num_web, num_clean, num_test, num_val: pictures of each part.
        image_size: side in pixels.
        noise: share of web (and val) texts that are wrong.
        hard_share: of those, the share with one detail wrong (object, background, relation);
            the rest have another picture's caption.
        artists: who draws, evenly.
        held_out_artist: one of `artists`, who then draws the whole test and of the other
            parts only `held_out_share`.
        held_out_share: see above.
        num_concepts: use the first so many of the concepts.
        encoding: "jpeg" or "png".

    Raises:
        DataError: for an impossible setting, or if an artist's package is not installed.
    """
    artists = tuple(artists)
    _check(artists, noise, hard_share, held_out_artist, held_out_share, num_concepts, image_size)
    for artist in artists:
        require_artist(artist)
    builder = _Builder(seed, image_size, artists, tuple(CONCEPTS)[:num_concepts], encoding)
    others = [a for a in artists if a != held_out_artist]

    def hands(count: int) -> list[str]:
        rng = builder.pixel_rng
        drawn = [others[i] for i in rng.integers(len(others), size=count)]
        if held_out_artist is not None:
            rare = rng.random(count) < held_out_share
            drawn = [held_out_artist if r else a for a, r in zip(drawn, rare, strict=True)]
        return drawn

    web = builder.noisy("web", hands(num_web), noise, hard_share)
    clean = []
    for i, artist in enumerate(hands(num_clean)):
        scene = builder.scene(held_out=False)
        claim = draw_claim(scene, builder.text_rng)
        clean.append(builder.record(f"clean-{i:06d}", scene, artist, claim, "human"))
    val = builder.noisy("val", hands(num_val), noise, hard_share)
    test = builder.test([held_out_artist] * num_test if held_out_artist else hands(num_test))
    credit = {name: ATTRIBUTION[name] for name in (*artists, "names")}
    return DemoData(
        web, clean, val, test, seed, image_size, noise, artists, held_out_artist, credit
    )


def _check(
    artists: tuple[str, ...],
    noise: float,
    hard_share: float,
    held_out_artist: str | None,
    held_out_share: float,
    num_concepts: int,
    image_size: int,
) -> None:
    shares = {"noise": noise, "hard_share": hard_share, "held_out_share": held_out_share}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise DataError(f"{name} is {share}; it is a share from 0 to 1")
    if not artists:
        raise DataError("no artists; name at least one")
    if held_out_artist is not None and (held_out_artist not in artists or len(artists) < 2):
        raise DataError(f"held_out_artist {held_out_artist!r} must be one of at least two artists")
    if not 8 <= num_concepts <= len(CONCEPTS):
        raise DataError(f"num_concepts is {num_concepts}; it is 8 to {len(CONCEPTS)}")
    if image_size < 16:
        raise DataError(f"image_size is {image_size}; things cannot be told under 16 pixels")

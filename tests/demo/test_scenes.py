"""The demo's data: repeatable, truthful about its noise, and a test that is well defined."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blipfast.data import BlipTokenizer, ShardWriter, load_image, read_shards
from blipfast.demo import artists as artists_module
from blipfast.demo.artists import ATTRIBUTION, available_artists, require_artist, sprite
from blipfast.demo.captions import Claim, Scene, Writer, draw_claim, falsify, vocabulary_texts
from blipfast.demo.concepts import BACKGROUNDS, CONCEPTS, code_point
from blipfast.demo.reading import is_right, read_claim
from blipfast.demo.scenes import DemoData, build_demo_data, render
from blipfast.errors import DataError

VOCAB = Path(__file__).parents[1] / "fixtures" / "reference" / "vocab.txt"


@pytest.fixture(scope="module")
def data() -> DemoData:
    return build_demo_data(3, num_web=400, num_clean=60, num_test=120, num_val=50)


NOUNS = st.sampled_from(list(CONCEPTS))
SCENES = st.builds(
    Scene,
    st.one_of(
        st.lists(NOUNS, min_size=1, max_size=3, unique=True).map(tuple),
        st.tuples(NOUNS, st.integers(2, 3)).map(lambda pair: (pair[0],) * pair[1]),
    ),
    st.sampled_from(["beside", "above"]),
    st.sampled_from(list(BACKGROUNDS)),
)


@settings(max_examples=200, deadline=None)
@given(SCENES, st.integers(0, 10_000))
def test_claims_are_true_and_falsified_ones_are_not(scene: Scene, seed: int) -> None:
    rng = np.random.default_rng(seed)
    claim = draw_claim(scene, rng)
    assert claim.true_of(scene)
    wrong, kind = falsify(claim, scene, rng, ("object", "background", "relation"))
    assert kind in ("object", "background", "relation")
    assert not wrong.true_of(scene)
    words = Writer(rng, prefix=0.5)
    assert is_right(words.write(claim), scene)
    assert not is_right(words.write(wrong), scene)
    assert len(words.write(wrong).split()) <= 24


def test_no_wrong_thing_that_may_be_named() -> None:
    scene = Scene(("cat", "dog"), "beside", "blue")
    options = (Claim(("cat", "dog")), scene, np.random.default_rng(0), ("object",))
    for _ in range(20):  # whatever it would have swapped first
        wrong, _ = falsify(*options, ["cat", "dog", "pig"], lambda things: "cat" in things)
        assert wrong.objects == ("cat", "pig")
    with pytest.raises(DataError, match="more concepts"):
        falsify(*options, ["cat", "dog"])


def test_reading_captions() -> None:
    assert read_claim("A photo of an octopus below a red car on pink") == Claim(
        ("car", "octopus"), "order", "above", "pink"
    )
    assert read_claim("three pandas") == Claim(("panda",) * 3)
    for nonsense in ("", "a", "a cat a dog", "two cat and a dog", "a unicorn", "cat", "a cat on"):
        assert read_claim(nonsense) is None
        assert not is_right(nonsense, Scene(("cat",), "beside", "blue"))


def test_claims_in_detail() -> None:
    scene = Scene(("cat", "dog"), "beside", "blue")
    assert Claim(("dog", "cat")).true_of(scene)
    assert not Claim(("dog", "cat"), "order").true_of(scene)
    assert not Claim(("cat", "dog"), "order", "above").true_of(scene)
    assert not Claim(("cat",)).true_of(scene)
    row = Scene(("cat", "dog", "car"), "beside", "blue")
    assert Claim(("car", "dog", "cat"), "between").true_of(row)
    assert not Claim(("dog", "car", "cat"), "between").true_of(row)
    assert not Claim(("cat", "dog", "car"), background="pink").true_of(row)


def test_wording() -> None:
    def said(claim: Claim) -> set[str]:
        writer = Writer(np.random.default_rng(0), synonym=0)
        return {writer.write(claim) for _ in range(50)}

    assert said(Claim(("octopus",))) == {"an octopus"}
    assert said(Claim(("fish", "fish"), background="pink")) == {
        "two fish on a pink background",
        "two fish on pink",
        "two fish with a pink background",
    }
    assert said(Claim(("cat", "dog"), "order")) == {
        "a cat to the left of a dog",
        "a dog to the right of a cat",
    }
    assert said(Claim(("cat", "dog"), "order", "above")) == {
        "a cat above a dog",
        "a dog below a cat",
    }
    assert "a dog between a car and a cat" in said(Claim(("cat", "dog", "car"), "between"))
    assert said(Claim(("cat", "dog"))) == {"a cat and a dog", "a dog and a cat"}


def test_a_seed_repeats_all(data: DemoData) -> None:
    again = build_demo_data(3, num_web=400, num_clean=60, num_test=120, num_val=50)
    assert again == data
    other = build_demo_data(4, num_web=20, num_clean=1, num_test=1, num_val=1)
    assert [r.caption for r in other.web] != [r.caption for r in data.web[:20]]


def test_parts_have_their_sizes_and_pictures(data: DemoData) -> None:
    assert [len(p) for p in (data.web, data.clean, data.val, data.test)] == [400, 60, 50, 120]
    records = [*data.web, *data.clean, *data.val, *data.test]
    assert len({record.key for record in records}) == len(records)
    for record in records[::20]:
        assert load_image(record.image, record.key).size == (64, 64)
        assert record.image.startswith(b"\xff\xd8")
        assert len(record.references) == 5
    assert {record.artist for record in records} == {"twemoji", "openmoji"}
    assert set(data.attribution) == {"twemoji", "openmoji", "names"}


def test_noise_is_of_the_share_and_kinds_asked_for(data: DemoData) -> None:
    kinds = Counter(record.noise_kind for record in data.web)
    assert kinds[""] == 280
    assert kinds["replaced"] == 60
    assert kinds["object"] + kinds["background"] + kinds["relation"] == 60
    assert min(kinds.values()) >= 5
    assert all(record.is_correct == (not record.noise_kind) for record in data.web)
    assert sum(not record.is_correct for record in data.val) == 15
    assert all(record.is_correct for record in [*data.clean, *data.test])
    assert all(
        record.caption not in r.references for r in data.web for record in [r] if r.noise_kind
    )


def test_test_scenes_are_new_combinations(data: DemoData) -> None:
    """Of things that no picture shows together, and no text, be it right or wrong, names so."""

    def pairs(objects: tuple[str, ...]) -> set[frozenset[str]]:
        return {frozenset(pair) for pair in combinations(objects, 2)}

    seen: set[frozenset[str]] = set()
    for record in [*data.web, *data.clean, *data.val]:
        claim = read_claim(record.caption)
        assert claim is not None
        seen |= pairs(record.scene.objects) | pairs(claim.objects)
    assert all(pairs(record.scene.objects) - seen for record in data.test)


def test_wrong_texts_name_things_of_this_world() -> None:
    few = build_demo_data(0, num_web=200, num_clean=0, num_val=0, num_test=1, num_concepts=10)
    known = set(list(CONCEPTS)[:10])
    claims = [read_claim(record.caption) for record in few.web]
    assert all(claim is not None and set(claim.objects) <= known for claim in claims)


def test_test_captions_fit_one_picture_each(
    data: DemoData, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [record.caption for record in data.test]
    assert len(set(captions)) == len(captions)
    written: list[Claim] = []
    original = Writer.write

    def note(self: Writer, claim: Claim) -> str:
        written.append(claim)
        return original(self, claim)

    monkeypatch.setattr(Writer, "write", note)
    few = build_demo_data(
        5, num_web=1, num_clean=0, num_val=0, num_test=150, num_concepts=10, noise=0
    )
    claims = written[6::6]  # each record writes its caption and five references
    assert len(claims) == 150
    for i, claim in enumerate(claims):
        assert [j for j, r in enumerate(few.test) if claim.true_of(r.scene)] == [i]


def test_too_many_tests_for_few_concepts() -> None:
    with pytest.raises(DataError, match="fewer than 5000"):
        build_demo_data(
            0, num_web=1, num_clean=0, num_val=0, num_test=5000, num_concepts=8, noise=0
        )


def test_held_out_artist() -> None:
    sizes = {"num_web": 300, "num_clean": 20, "num_val": 10, "num_test": 20}
    data = build_demo_data(0, held_out_artist="openmoji", **sizes)
    assert {r.artist for r in [*data.web, *data.clean, *data.val]} == {"twemoji"}
    assert {r.artist for r in data.test} == {"openmoji"}
    rare = build_demo_data(0, held_out_artist="openmoji", held_out_share=0.1, **sizes)
    assert 10 < sum(r.artist == "openmoji" for r in rare.web) < 60


def test_truth_never_reaches_the_shards(data: DemoData, tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for record in data.web[:30]:
            writer.write(record.to_record())
    back = list(read_shards(tmp_path))
    assert [r.texts[0].text for r in back] == [r.caption for r in data.web[:30]]
    assert b"is_correct" not in writer.shards[0].read_bytes()


def test_vocabulary_covers_every_caption(data: DemoData) -> None:
    known = set(" ".join(vocabulary_texts()).split())
    for record in [*data.web, *data.test]:
        for text in (record.caption, *record.references):
            assert set(text.replace(",", "").split()) <= known
    tokenizer, _ = BlipTokenizer.subset(vocabulary_texts(), VOCAB)
    batch = tokenizer([r.caption for r in data.web])
    assert not (batch.input_ids == tokenizer.vocab.index("[UNK]")).any()


def test_every_concept_is_drawn_and_told_apart() -> None:
    assert len(CONCEPTS) == 48
    assert len({code_point(noun) for noun in CONCEPTS}) == 48
    for artist in ("twemoji", "openmoji"):
        small = np.stack(
            [np.asarray(sprite(artist, noun, 20).convert("RGBa"), dtype=float) for noun in CONCEPTS]
        ).reshape(48, -1)
        apart = np.abs(small[:, None] - small[None]).mean(-1) + 1e3 * np.eye(48)
        assert apart.min() > 5
        assert (small.max(axis=1) > 0).all()


def test_render_places_things_as_the_scene_says() -> None:
    rng = np.random.default_rng(0)
    for layout, axis in (("beside", 1), ("above", 0)):
        for _ in range(10):
            scene = Scene(("carrot", "whale"), layout, "white")  # type: ignore[arg-type]
            png = render(scene, "twemoji", 64, rng, "png")
            pixels = np.asarray(Image.open(io.BytesIO(png)), dtype=int)
            orange = np.argwhere((pixels[..., 0] > 200) & (pixels[..., 2] < 100))
            blue = np.argwhere((pixels[..., 2] > 180) & (pixels[..., 0] < 120))
            assert orange[:, axis].mean() < blue[:, axis].mean() - 10


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"noise": 1.5}, "noise"),
        ({"hard_share": -1}, "hard_share"),
        ({"artists": ()}, "no artists"),
        ({"artists": ("rembrandt",)}, "no artist 'rembrandt'"),
        ({"held_out_artist": "noto"}, "held_out_artist"),
        ({"num_concepts": 3}, "num_concepts"),
        ({"image_size": 8}, "image_size"),
    ],
)
def test_bad_settings(setting: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_demo_data(0, num_web=1, **setting)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="dragon"):
        code_point("dragon")


def test_missing_artists_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artists_module.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(artists_module, "_noto_font", lambda: None)
    assert available_artists() == ()
    with pytest.raises(DataError, match=r"pip install 'blipfast\[demo\]'"):
        require_artist("twemoji")
    with pytest.raises(DataError, match="fonts-noto-color-emoji"):
        require_artist("noto")


def test_attribution_names_every_artist() -> None:
    assert set(ATTRIBUTION) == {*artists_module.ARTISTS, "names"}
    assert json.dumps(ATTRIBUTION).count("CC BY") == 2

"""CIDEr and its tokenisation."""

from __future__ import annotations

import pytest

from blipfast.errors import DataError
from blipfast.evaluation.captions import cider, tokenize_caption

pytest.importorskip("pycocoevalcap")

REFERENCES = [
    ["a dog on a blue background", "a dog with a blue background"],
    ["a cat to the left of a car", "a car to the right of a cat"],
    ["three stars", "three yellow stars"],
]


def test_the_tokens() -> None:
    words = tokenize_caption("A dog's ball, (red) -- don't!")
    assert words == ["a", "dog's", "ball", "red", "don't"]
    assert tokenize_caption(" ... ") == []
    assert tokenize_caption("a well-lit 'room'") == ["a", "well-lit", "room"]


def test_right_captions_score_above_half_right_above_wrong() -> None:
    right = cider([its[0] for its in REFERENCES], REFERENCES)
    half = cider(["a dog", "a cat", "stars"], REFERENCES)
    wrong = cider([REFERENCES[(i + 1) % 3][0] for i in range(3)], REFERENCES)
    assert right.mean > half.mean > wrong.mean >= 0
    assert len(right.each) == 3
    assert right.mean == pytest.approx(sum(right.each) / 3)


def test_case_and_punctuation_do_not_count() -> None:
    plain = cider([its[0] for its in REFERENCES], REFERENCES)
    loud = cider([its[0].upper() + "!" for its in REFERENCES], REFERENCES)
    assert plain == loud


def test_an_exact_single_reference_scores_ten() -> None:
    references = [["a dog on grass here"], ["two cars in the snow"]]
    assert cider([r[0] for r in references], references).mean == pytest.approx(10.0)


def test_an_empty_caption_scores_nothing() -> None:
    assert cider(["", "a cat", "three stars"], REFERENCES).each[0] == 0.0


@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 captions and references of 2"),
        ([], [], "one caption per image"),
        (["a", "b"], [["a"], [" . "]], "image 1 has no reference"),
    ],
)
def test_bad_input(captions, references, message) -> None:
    with pytest.raises(DataError, match=message):
        cider(captions, references)

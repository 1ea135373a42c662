"""CIDEr and its tokenisation."""

from __future__ import annotations

import shutil

import pytest

from blipfast.errors import BlipfastError, DataError
from blipfast.evaluation.captions import (
    caption_metrics,
    cider,
    tokenize_caption,
)

pytest.importorskip("pycocoevalcap", reason="needs the extra metrics")

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


CAPTIONS = ["a dog on the blue background", "a cat beside a car", "three red stars"]


def rouge_l(caption: str, references: list[str]) -> float:
    """From the longest common subsequences: the best precision and recall, F with beta 1.2."""

    def common(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return common(a[:-1], b[:-1]) + 1
        return max(common(a[:-1], b), common(a, b[:-1]))

    words = caption.split()
    lengths = [common(words, r.split()) for r in references]
    precision = max(n / len(words) for n in lengths)
    recall = max(n / len(r.split()) for n, r in zip(lengths, references, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def test_scores_are_those_of_independent_computations() -> None:
    from torchmetrics.functional.text import bleu_score

    got = caption_metrics(CAPTIONS, REFERENCES, java=False)
    for n in (1, 2):
        expected = 100 * float(bleu_score(CAPTIONS, REFERENCES, n_gram=n))
        assert got.scores[f"bleu_{n}"] == pytest.approx(expected, rel=1e-4)
    mean = sum(rouge_l(c, r) for c, r in zip(CAPTIONS, REFERENCES, strict=True)) / 3
    assert got.scores["rouge_l"] == pytest.approx(100 * mean)
    alone = cider(CAPTIONS, REFERENCES)
    assert got.scores["cider"] == pytest.approx(100 * alone.mean)
    assert got.cider_each == pytest.approx([100 * one for one in alone.each])
    assert (got.tokenizer, set(got.left_out)) == ("plain", {"meteor", "spice"})


def test_a_domain_is_scored_as_if_it_were_alone() -> None:
    domains = ["in-domain", None, "in-domain"]
    got = caption_metrics(CAPTIONS, REFERENCES, domains, java=False)
    alone = caption_metrics(CAPTIONS[::2], REFERENCES[::2], java=False)
    assert got.by_domain == {"in-domain": alone.scores}
    assert got.scores == caption_metrics(CAPTIONS, REFERENCES, java=False).scores


def test_java_asked_for_and_absent_is_said(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BlipfastError, match="need java on the PATH"):
        caption_metrics(CAPTIONS, REFERENCES, java=True)
    assert caption_metrics(CAPTIONS, REFERENCES).tokenizer == "plain"


def test_a_java_that_fails_is_an_error_and_no_deadlock(tmp_path, monkeypatch) -> None:
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BlipfastError, match="tokenizer ended early"):
        caption_metrics(CAPTIONS, REFERENCES, java=True)


@pytest.mark.slow
def test_with_java_texts_are_cut_as_the_official_tokenizer_does() -> None:
    if shutil.which("java") is None:
        assert caption_metrics(CAPTIONS, REFERENCES).tokenizer == "plain"
        return
    loud = [f"{text.capitalize()}!" for text in CAPTIONS]
    lines = ["", loud[1].replace(" ", "\u2028"), loud[2]]  # an empty one, and a strange line end
    got = caption_metrics(lines, REFERENCES, ["x", "x", "y"])
    assert got.tokenizer == "ptb"
    assert got.cider_each == pytest.approx(
        caption_metrics(["", *CAPTIONS[1:]], REFERENCES, java=False).cider_each
    )
    assert 0 < got.scores["meteor"] < 100
    exact = caption_metrics([its[0] for its in REFERENCES], REFERENCES)
    assert exact.scores["meteor"] == pytest.approx(100.0)
    assert set(got.by_domain) == {"x", "y"}

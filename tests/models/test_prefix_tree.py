"""Decoding texts that begin alike through their common prefixes is decoding each on its own."""

from __future__ import annotations

import pytest
import torch

from blipfast.errors import ShapeError
from blipfast.models.blip import PackedText
from blipfast.models.config import blip_config
from blipfast.models.prefix_tree import PrefixTree
from blipfast.ops.packing import Packing
from blipfast.tasks.vqa import BlipForVQA

TEXTS = [[1, 5, 6, 2], [1, 5, 2], [1, 7, 2], [1, 5, 6, 2], [1, 5, 6, 8, 2], [1, 9, 6, 2]]


def packed(texts: list[list[int]]) -> PackedText:
    ids = torch.tensor([token for text in texts for token in text])
    return PackedText(ids, Packing.from_lengths([len(text) for text in texts]))


def test_one_node_for_each_prefix() -> None:
    tree = PrefixTree.build(packed([[1, 5, 6], [1, 5], [1, 7], [1, 5]]), [0, 0, 0, 2])
    assert tree.text.input_ids.tolist() == [1, 5, 6, 7, 1, 5]
    assert tree.prefixes.positions.tolist() == [0, 1, 2, 1, 0, 1]
    assert tree.sets == (0, 2)
    assert tree.text.packing.lengths == (4, 2)
    assert tree.prefixes.nodes.tolist() == [0, 1, 2, 0, 1, 0, 3, 4, 5]
    assert tree.prefixes.first.tolist() == [0, 1, 2, 6, 7, 8]


def test_sets_must_be_neighbours() -> None:
    with pytest.raises(ShapeError, match="must not decrease"):
        PrefixTree.build(packed([[1], [1], [1]]), [0, 1, 0])


def test_ranking_scores_are_those_of_each_answer_alone() -> None:
    torch.manual_seed(0)
    model = BlipForVQA(blip_config("blip_tiny")).double().eval()
    questions = torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0]])
    pixels = torch.randn(2, 3, model.config.vision.image_size, model.config.vision.image_size)
    with torch.no_grad():
        states = model.encode_question(pixels.double(), questions, (questions != 0).long())
        answers = packed(TEXTS)
        ranked = model.rank(states, answers, k=len(TEXTS))
        for row in range(2):
            each = -model.answer_losses(states, answers, [row] * len(TEXTS))
            torch.testing.assert_close(
                ranked.log_likelihood[row], each[ranked.answer_ids[row]], atol=1e-9, rtol=1e-9
            )


def test_an_answer_beyond_the_positions_is_named() -> None:
    model = BlipForVQA(blip_config("blip_tiny")).eval()
    size = model.config.vision.image_size
    long = [[1, *range(4, 4 + model.text_config.max_positions), 2]]
    with torch.no_grad():
        question = torch.tensor([[1, 4, 2]])
        states = model.encode_question(torch.randn(1, 3, size, size), question, question.sign())
        with pytest.raises(ShapeError, match="truncate it when tokenising"):
            model.rank(states, packed(long), k=1)


def test_texts_with_words_looked_up_keep_their_labels() -> None:
    word = torch.nn.Embedding(12, 4)
    text = packed(TEXTS)
    words = text.looked_up(word, (10, 11)).select([4, 0])
    inputs, labels = words.shifted()
    assert labels.tolist() == text.select([4, 0]).shifted()[1].tolist()
    assert words.words is not None
    first = words.starting_with(11).input_ids[0]
    torch.testing.assert_close(words.words.rows[first], word.weight[11])
    with pytest.raises(ShapeError, match="looked up apart"):
        _ = inputs + text

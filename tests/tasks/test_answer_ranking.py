"""The best answer is the first of the ranking, found with as little work as the model allows."""

from __future__ import annotations

import math

import pytest
import torch

from blipfast.models.blip import PackedText
from blipfast.models.config import blip_config
from blipfast.models.streams import CrossStates
from blipfast.ops.packing import Packing
from blipfast.tasks import answer_ranking
from blipfast.tasks.answer_ranking import best_answers, rank_answers
from blipfast.tasks.vqa import BlipForVQA

ANSWERS, QUESTIONS = 200, 3


def setting(
    smoothing: float, spread: float, dtype: torch.dtype = torch.float64
) -> tuple[BlipForVQA, CrossStates, PackedText]:
    """A model whose logits have a standard deviation of about `spread`."""
    torch.manual_seed(0)
    model = BlipForVQA(blip_config("blip_tiny"), label_smoothing=smoothing).eval()
    model.lm_head.norm.weight.data *= spread / 0.16
    model.to(dtype)
    size = model.config.vision.image_size
    questions = torch.randint(110, 400, (QUESTIONS, 5))
    mask = (torch.arange(5) < torch.tensor([5, 3, 4])[:, None]).long()
    with torch.no_grad():
        pixels = torch.randn(QUESTIONS, 3, size, size, dtype=dtype)
        states = model.encode_question(pixels, questions * mask, mask)
    lengths = torch.randint(3, 7, (ANSWERS,))
    ids = torch.randint(110, 200, (int(lengths.sum()),))
    return model, states, PackedText(ids, Packing.from_lengths(lengths.tolist()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("spread", [0.16, 3.0, 12.0])
@pytest.mark.parametrize("k", [1, 60, ANSWERS])
def test_best_is_the_first_of_the_ranking(smoothing: float, spread: float, k: int) -> None:
    model, states, answers = setting(smoothing, spread)
    ranked = rank_answers(model, states, answers, k)
    best = best_answers(model, states, answers, k)
    torch.testing.assert_close(best.log_likelihood, ranked.log_likelihood[:, 0])
    assert torch.equal(best.answer_ids, ranked.answer_ids[:, 0])
    assert QUESTIONS <= best.scored <= QUESTIONS * k


def test_a_sharp_model_leaves_little_to_score() -> None:
    """As training with smoothed labels makes it: one token stands out, and after a word the end."""
    end, scored = 102, []
    for sharp in (False, True):
        model, states, _ = setting(0.1, 3.0 if sharp else 0.16)
        if sharp:
            words = model.text_config.vocab_size
            model.lm_head.decoder.bias.data[end] += math.log(0.9 * words / 0.1)
        ids = torch.tensor([[101, word, end] for word in range(110, 110 + ANSWERS)])
        answers = PackedText(ids.flatten(), Packing.from_lengths([3] * ANSWERS))
        best = model.best(states, answers, ANSWERS)
        ranked = model.rank(states, answers, ANSWERS)
        assert torch.equal(best.answer_ids, ranked.answer_ids[:, 0])
        scored.append(best.scored)
    assert scored[0] == QUESTIONS * ANSWERS
    assert scored[1] < scored[0] / 10


def test_in_bf16() -> None:
    """Its first tokens' losses differ from pass to pass; the best found is the best to rounding."""
    model, states, answers = setting(0.1, 3.0, torch.bfloat16)
    ranked = rank_answers(model, states, answers, ANSWERS)
    best = best_answers(model, states, answers, ANSWERS)
    torch.testing.assert_close(best.log_likelihood, ranked.log_likelihood[:, 0], rtol=0, atol=0.3)


@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.5, 1.0])
def test_no_token_loses_less_than_the_floor(smoothing: float) -> None:
    words = 50
    floor = answer_ranking._floor(smoothing, words)
    target = torch.full((words,), smoothing / words, dtype=torch.float64)
    target[7] += 1 - smoothing
    for logits in (torch.randn(words) * 4, target.clamp(min=1e-30).log()):
        loss = torch.nn.functional.cross_entropy(
            logits.double()[None], torch.tensor([7]), label_smoothing=smoothing
        )
        assert float(loss) >= floor - 1e-9
    assert math.isclose(float(loss), floor, abs_tol=1e-9)

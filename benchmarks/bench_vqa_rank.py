"""VQA ranking: two questions (on a GPU eight) at 480 px, 128 of 3,128 candidate answers.

The baseline ranks as the original does, by PyTorch's layers with the same weights: question states
and K/V repeated for each candidate, answers padded, logits over the whole vocabulary.

Random weights give flat distributions, in which every candidate has to be scored. Where the best
answer alone is wanted, as in the evaluation, a sharp one leaves most out: for that the logits are
spread to a standard deviation of 3, and [SEP] is raised to a probability of about 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import workloads
from blipfast.evaluation.vqa import rank_plainly
from blipfast.models.blip import PackedText
from blipfast.models.config import blip_config
from blipfast.ops import use_backend
from blipfast.tasks.answer_ranking import RankedAnswers
from blipfast.tasks.vqa import BlipForVQA

QUESTIONS, ANSWERS, K, SEP = workloads.sized(2, 8), 3_128, 128, 102
ROUNDS = workloads.sized(3, 9)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def answer_texts() -> tuple[Tensor, Tensor]:
    """VQA's answers are short: one to three words and two special tokens, eight at the most."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(ANSWERS, generator=generator)
    lengths = 3 + (draws > 0.6).long() + (draws > 0.85).long() + 3 * (draws > 0.99).long()
    return workloads.texts(lengths.tolist(), seed=1)


def sharpen(model: BlipForVQA) -> None:
    words = model.text_config.vocab_size
    model.lm_head.norm.weight.mul_(3 / (0.02 * model.text_config.hidden_size**0.5))
    model.lm_head.decoder.bias[SEP] = math.log(words) + 3**2 / 2 + math.log(0.9 / 0.1)


@pytest.fixture(scope="module", params=DTYPES)
def setting(request: pytest.FixtureRequest) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = DTYPES[request.param]
    model = BlipForVQA(blip_config("blip_base", image_size=480)).eval().to(dtype)
    pixels, ids, answer_mask, question_ids, question_mask = workloads.placed(
        model, workloads.images(QUESTIONS, 480).to(dtype), *answer_texts(),
        *workloads.texts([11, 8, 12, 9, 7, 14, 10, 8][:QUESTIONS]),
    )  # fmt: skip
    answers = PackedText.from_padded(ids, answer_mask)
    with torch.no_grad():
        states = model.encode_question(pixels, question_ids, question_mask)

    @use_backend(linear="torch", feed_forward="torch")
    def per_pass() -> tuple[Tensor, Tensor]:
        return rank_plainly(model, states.embeds[0], question_mask, ids, answer_mask, K)

    chosen, likelihood = per_pass()
    assert_same_ranking(model.rank(states, answers, K), chosen, likelihood, dtype)
    return {"dtype": request.param, "model": model, "states": states, "answers": answers,
            "per_pass": per_pass}  # fmt: skip


def assert_same_ranking(
    ranked: RankedAnswers, chosen: Tensor, likelihood: Tensor, dtype: torch.dtype
) -> None:
    for row in range(QUESTIONS):
        expected = dict(zip(chosen[row].tolist(), likelihood[row].tolist(), strict=True))
        found = zip(
            ranked.answer_ids[row].tolist(), ranked.log_likelihood[row].tolist(), strict=True
        )
        # Answers that share their first token tie in the first stage.
        both = [(x, expected[answer]) for answer, x in found if answer in expected]
        assert len(both) > K / 2
        tolerance = 1e-3 if dtype == torch.float32 else 0.5
        torch.testing.assert_close(*torch.tensor(both).T, atol=tolerance, rtol=1e-2)


@pytest.mark.parametrize("code", ["blipfast", "per-pass"])
def test_vqa_rank(benchmark: Any, setting: dict[str, Any], code: str) -> None:
    model, states, answers = (setting[name] for name in ("model", "states", "answers"))
    run = setting["per_pass"] if code == "per-pass" else lambda: model.rank(states, answers, K)
    timed(benchmark, run, f"VQA ranking, {QUESTIONS} x {K} answers, text side", setting, code)


@pytest.mark.parametrize("code", ["blipfast", "per-pass"])
def test_vqa_best(benchmark: Any, setting: dict[str, Any], code: str) -> None:
    model, states, answers = (setting[name] for name in ("model", "states", "answers"))
    if not setting.get("sharp"):  # the tests above came first
        with torch.no_grad():
            sharpen(model)
        setting["sharp"] = True
    best, (_, likelihood) = model.best(states, answers, K), setting["per_pass"]()
    tolerance = 1e-3 if setting["dtype"] == "fp32" else 0.5
    top = likelihood.amax(1).to(best.log_likelihood)
    torch.testing.assert_close(best.log_likelihood, top, atol=tolerance, rtol=1e-2)
    if code == "blipfast":
        benchmark.extra_info.update(scored=best.scored)
    run = setting["per_pass"] if code == "per-pass" else lambda: model.best(states, answers, K)
    timed(benchmark, run, f"VQA, the best of {QUESTIONS} x {K} answers, sharp", setting, code)


def timed(
    benchmark: Any, run: Callable[[], Any], group: str, setting: dict[str, Any], code: str
) -> None:
    benchmark.group = f"{group}, {setting['dtype']}"
    benchmark.extra_info.update(code=code)
    benchmark.pedantic(workloads.finished(run), rounds=ROUNDS, warmup_rounds=1)

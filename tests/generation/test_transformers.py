"""Token ids of the installed transformers on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration

from blipfast.checkpoints.save import save_hf

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory, make_captioner: Any
) -> dict[int, tuple[Any, Any]]:
    """Our captioner and transformers' with the same weights, by seed."""
    made = {}
    for seed in SEEDS:
        ours = make_captioner(seed)
        folder: Path = tmp_path_factory.mktemp("hf") / "model"
        save_hf(ours, folder)
        made[seed] = (ours, BlipForConditionalGeneration.from_pretrained(folder).eval())
    return made


def theirs(model: Any, embeds: Tensor, prompt: Tensor, **options: Any) -> Any:
    config = model.config.text_config
    with torch.no_grad():
        return model.text_decoder.generate(
            input_ids=prompt.expand(embeds.shape[0], -1),
            eos_token_id=config.sep_token_id,
            pad_token_id=config.pad_token_id,
            encoder_hidden_states=embeds,
            encoder_attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )


def same_ids(ours: Any, expected: Tensor) -> None:
    """Up to what follows a text: in beam search transformers fills up with [SEP] if [PAD] is 0."""
    filled = torch.arange(expected.shape[1]) >= ours.lengths[:, None]
    assert torch.isin(expected[filled], torch.tensor([0, 102])).all()
    torch.testing.assert_close(ours.sequences, expected.masked_fill(filled, 0), rtol=0, atol=0)


def compare(pair: tuple[Any, Any], embeds: Tensor, prompt: Tensor, **options: Any) -> Tensor:
    expected = theirs(pair[1], embeds, prompt, do_sample=False, **options)
    ours = pair[0].generate(
        image_embeds=embeds, prompt_ids=prompt, beam_length="generated", **options
    )
    same_ids(ours, expected.sequences)
    if options["num_beams"] > 1:
        torch.testing.assert_close(ours.scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)
    return ours.lengths


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_beams", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("lengths", [(0, 20), (5, 20), (12, 16), (20, 20), (0, 5)])
def test_beams(pairs, image_embeds, prompt_ids, seed, num_beams, lengths) -> None:
    options = {"num_beams": num_beams, "min_length": lengths[0], "max_length": lengths[1]}
    found = compare(pairs[seed], image_embeds, prompt_ids, **options)
    if lengths == (5, 20):
        assert found.unique().numel() > 1  # the images finished at different times


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("penalty", [1.1, 2.0, 0.8])
def test_repetition_penalty(pairs, image_embeds, prompt_ids, seed, num_beams, penalty) -> None:
    options = {"num_beams": num_beams, "min_length": 5, "max_length": 20}
    compare(pairs[seed], image_embeds, prompt_ids, repetition_penalty=penalty, **options)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 2.0])
def test_length_penalty(pairs, image_embeds, prompt_ids, seed, length_penalty) -> None:
    options = {"num_beams": 3, "min_length": 5, "max_length": 20}
    compare(pairs[seed], image_embeds, prompt_ids, length_penalty=length_penalty, **options)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [2, 4])
def test_num_return_sequences(pairs, image_embeds, prompt_ids, seed, count) -> None:
    options = {"num_beams": 4, "min_length": 5, "max_length": 20}
    compare(pairs[seed], image_embeds, prompt_ids, num_return_sequences=count, **options)


def test_one_token_prompt(pairs, image_embeds, prompt_ids) -> None:
    options = {"num_beams": 3, "min_length": 1, "max_length": 10}
    compare(pairs[0], image_embeds, prompt_ids[:1], **options)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("top", [(50, 0.9), (5, 1.0), (0, 0.7)])
def test_nucleus(pairs, image_embeds, prompt_ids, seed, count, top) -> None:
    """The same draws: torch.multinomial on the whole vocabulary and all rows, ended or not."""
    options = {
        "top_k": top[0],
        "top_p": top[1],
        "repetition_penalty": 1.1,
        "min_length": 5,
        "max_length": 20,
        "num_return_sequences": count,
    }
    torch.manual_seed(7)
    expected = theirs(pairs[seed][1], image_embeds, prompt_ids, do_sample=True, **options)
    total = image_embeds.shape[0] * count

    def draw(probs: Tensor, rows: Tensor, step: int) -> Tensor:
        everyone = torch.ones(total, probs.shape[1])
        everyone[rows] = probs
        return torch.multinomial(everyone, 1)[rows, 0]

    torch.manual_seed(7)
    ours = pairs[seed][0].generate(
        image_embeds=image_embeds, prompt_ids=prompt_ids, method="nucleus", draw=draw, **options
    )
    torch.testing.assert_close(ours.sequences, expected.sequences, rtol=0, atol=0)
    assert ours.lengths.unique().numel() > 1


def test_through_the_image_encoder(pairs, prompt_ids) -> None:
    images = torch.randn(2, 3, 32, 32)
    ours, other = pairs[0]
    with torch.no_grad():
        expected = other.generate(
            images, torch.cat([prompt_ids, prompt_ids[:1]])[None].repeat(2, 1), num_beams=3,
            max_length=20, min_length=5,
        )  # fmt: skip
    out = ours.generate(images, prompt_ids=prompt_ids, beam_length="generated")
    same_ids(out, expected)

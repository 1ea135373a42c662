"""Sampling for a stream of images: each image's texts are those it gets in a batch."""

from __future__ import annotations

import pytest
import torch

from blipfast.errors import ConfigError
from blipfast.generation import generate, generate_stream
from blipfast.models.config import blip_config
from blipfast.models.streams import CrossStates
from blipfast.tasks.caption import BlipForCaptioning

IMAGES = 23


@pytest.fixture(scope="module")
def captioner() -> BlipForCaptioning:
    """Random, in float64 so that roundings do not choose; [SEP] likely, for uneven texts."""
    torch.manual_seed(0)
    model = BlipForCaptioning(blip_config("blip_tiny")).eval().double()
    with torch.no_grad():
        for parameter in model.visual_encoder.parameters():
            parameter.mul_(3)
        model.lm_head.decoder.weight.mul_(3)
        model.lm_head.decoder.bias[model.text_config.sep_token_id] = 1.5
    return model


@pytest.fixture(scope="module")
def states(captioner: BlipForCaptioning) -> CrossStates:
    pixels = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return captioner.image_states(captioner.encode_image(pixels.double()), decoder=True)


def pieces(states: CrossStates, sizes: list[int]):
    start = 0
    for size in sizes:
        yield CrossStates(tuple(e[start : start + size] for e in states.embeds))
        start += size


PROMPT = torch.tensor([30_522, 1037, 3861])


@pytest.mark.parametrize("cross", ["absorbed", "projected"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    ("sizes", "in_flight"),
    [([1] * IMAGES, 1), ([1] * IMAGES, 4), ([4, 4, 4, 4, 4, 3], 9), ([10, 3, 10], 12), ([23], 5)],
)
def test_a_stream_gets_the_texts_of_a_batch(
    captioner, states, cross, samples, sizes, in_flight
) -> None:
    prompt = PROMPT.clamp(max=captioner.text_config.vocab_size - 1)
    options = {
        "method": "nucleus", "num_return_sequences": samples, "max_length": 14, "min_length": 6,
        "seed": 7, "image_ids": list(range(100, 100 + IMAGES)), "cross": cross,
    }  # fmt: skip
    expected = generate(captioner.decoder, states, prompt, **options)
    found = generate_stream(
        captioner.decoder, pieces(states, sizes), prompt, in_flight=in_flight, **options
    )
    assert len(set(expected.lengths.tolist())) > 3  # else nothing would make room early
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.lengths, expected.lengths)
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.prompt_length == expected.prompt_length


def test_greedy(captioner, states) -> None:
    prompt = PROMPT.clamp(max=captioner.text_config.vocab_size - 1)
    options = {"method": "greedy", "max_length": 12}
    expected = generate(captioner.decoder, states, prompt, **options)
    found = generate_stream(
        captioner.decoder, pieces(states, [5] * 4 + [3]), prompt, in_flight=7, **options
    )
    assert torch.equal(found.sequences, expected.sequences)


def test_no_more_images_are_encoded_than_there_is_room_for(captioner) -> None:
    """One piece waits at most, so that memory stays bounded."""
    taken, ended = [], []
    pixels = torch.randn(IMAGES, 3, 32, 32).double()

    def batches():
        for i in range(IMAGES):
            taken.append(i)
            ended.append(len(taken))
            yield pixels[i : i + 1]

    found = captioner.generate_stream(
        batches(), prompt_ids=PROMPT[:1].clamp(max=captioner.text_config.vocab_size - 1),
        in_flight=4, method="nucleus", max_length=10, seed=0,
    )  # fmt: skip
    assert taken == list(range(IMAGES))
    assert len(found.lengths) == IMAGES


def test_bad_input(captioner, states) -> None:
    prompt = PROMPT[:1].clamp(max=captioner.text_config.vocab_size - 1)
    with pytest.raises(ConfigError, match="the stream is empty"):
        generate_stream(captioner.decoder, iter(()), prompt, in_flight=4, method="greedy")
    with pytest.raises(ConfigError, match="beam search"):
        generate_stream(captioner.decoder, pieces(states, [23]), prompt, in_flight=4)

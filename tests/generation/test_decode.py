"""The incremental decoder against a full recomputation of every prefix, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blipfast.errors import ConfigError, ShapeError
from blipfast.generation.decode import IncrementalDecoder
from blipfast.models.config import blip_config
from blipfast.models.reference import encode_padded
from blipfast.models.text import TextTransformer
from blipfast.tasks.nlvr import BlipForNLVR

CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def recomputed(text: TextTransformer, ids: Tensor, embeds: Tensor, lengths: Tensor | None):
    """Logits `(N, V)` after the sequences `ids (N, L)`, nothing cached, nothing shared."""
    mask = None
    if lengths is not None:
        mask = torch.arange(embeds.shape[1]) < lengths[:, None]
    hidden = encode_padded(
        text, ids, torch.ones_like(ids), cross_embeds=embeds, cross_mask=mask, causal=True
    )
    assert text.lm_head is not None
    return text.lm_head(hidden[:, -1])


@pytest.mark.parametrize("cross", ["auto", "absorbed", "projected"])
@pytest.mark.parametrize("projected_before", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("rows", "prompt"), [(1, 1), (1, 3), (3, 1), (3, 4)])
@torch.inference_mode()
def test_equals_recomputation(
    make_captioner, cross, projected_before, padded, rows, prompt
) -> None:
    """Random tokens, random parents at every step, images that drop out on the way."""
    text = make_captioner(dtype=torch.float64).decoder
    embeds = torch.randn(4, 9, 64, dtype=torch.float64)
    lengths = torch.tensor([9, 2, 5, 7]) if padded else None
    states = text.cross_states(embeds, lengths=lengths, project=projected_before)
    decoder = IncrementalDecoder(text, states, rows=rows, max_length=12, cross=cross)
    ids = torch.randint(0, 450, (4, prompt))
    expected = recomputed(text, ids, embeds, lengths)
    torch.testing.assert_close(decoder.prefill(ids), expected, **CLOSE)
    sequences = ids[:, None].expand(-1, rows, -1)  # (B, rows, L)
    images = torch.arange(4)
    for step in range(12 - prompt):
        if step in (2, 4):
            going = torch.tensor([0, 2, 3]) if step == 2 else torch.tensor([1])
            decoder.keep(going)
            images, sequences = images[going], sequences[going]
        parents = torch.randint(0, rows, (len(images), rows))
        if step == 3:
            parents = None
        else:
            sequences = sequences.gather(1, parents[..., None].expand_as(sequences))
        tokens = torch.randint(0, 450, (len(images), rows))
        sequences = torch.cat([sequences, tokens[..., None]], dim=2)
        each = images.repeat_interleave(rows)
        expected = recomputed(
            text, sequences.flatten(0, 1), embeds[each], None if lengths is None else lengths[each]
        )
        logits = decoder.step(tokens, parents)
        torch.testing.assert_close(logits, expected.view_as(logits), **CLOSE)


def test_auto_takes_what_is_cheaper(make_captioner) -> None:
    text = make_captioner().decoder  # head_dim 16
    embeds = torch.randn(2, 9, 64)
    states = text.cross_states(embeds)

    def kind(states, rows, max_length):
        made = IncrementalDecoder(text, states, rows=rows, max_length=max_length)
        return type(made._cross).__name__

    assert kind(states, 1, 16) == "Absorbed"
    assert kind(states, 2, 16) == "Projected"
    assert kind(text.cross_states(embeds, project=True), 1, 16) == "Projected"


@torch.inference_mode()
def test_autocast_sets_the_dtype(make_captioner, image_embeds, prompt_ids) -> None:
    """As exact as the model converted to bfloat16, and the model itself stays as it is."""
    model, lower = make_captioner(), make_captioner(dtype=torch.bfloat16)
    prompt = prompt_ids.expand(5, -1)

    def logits(text, embeds):
        decoder = IncrementalDecoder(text, text.cross_states(embeds), rows=1, max_length=8)
        return decoder.dtype, decoder.prefill(prompt).double()

    exact = logits(make_captioner(dtype=torch.float64).decoder, image_embeds.double())[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dtype, mixed = logits(model.decoder, image_embeds)
        assert (
            model.generate(image_embeds=image_embeds, prompt_ids=prompt_ids).scores.isfinite().all()
        )
    plain = logits(lower.decoder, image_embeds.bfloat16())[1]
    assert dtype == torch.bfloat16
    assert model.decoder.embeddings.word.weight.dtype == torch.float32
    assert 0 < (mixed - exact).norm() <= 1.5 * (plain - exact).norm()


def test_dropout_is_off_and_the_mode_comes_back(make_captioner, image_embeds, prompt_ids) -> None:
    model = make_captioner()
    for layer in model.decoder.layers:
        layer.feed_forward.out.dropout = 0.5
        layer.self_attention.attention_dropout = 0.5
    expected = model.generate(torch.ones(2, 3, 32, 32), prompt_ids=prompt_ids)
    model.train()
    model.visual_encoder.blocks[0].eval()  # frozen: must stay so
    model.visual_encoder.drop_path_rate = 0.9
    assert torch.equal(
        model.generate(torch.ones(2, 3, 32, 32), prompt_ids=prompt_ids).sequences,
        expected.sequences,
    )
    assert model.training
    assert model.visual_encoder.blocks[1].training
    assert not model.visual_encoder.blocks[0].training


def test_what_cannot_be_decoded(make_captioner) -> None:
    config = blip_config("blip_tiny")
    text = make_captioner().decoder
    with pytest.raises(ShapeError, match="width 64"):
        IncrementalDecoder(text, text.cross_states(torch.randn(1, 9, 32)), rows=1, max_length=8)
    with pytest.raises(ConfigError, match="64 positions"):
        IncrementalDecoder(text, text.cross_states(torch.randn(1, 9, 64)), rows=1, max_length=65)
    encoder = TextTransformer(config.text, cross_width=64)
    with pytest.raises(ConfigError, match="LM head"):
        IncrementalDecoder(encoder, text.cross_states(torch.randn(1, 9, 64)), rows=1, max_length=8)
    paired = TextTransformer(config.text, cross_width=64, lm_head=True, paired=True)
    two = paired.cross_states(torch.randn(1, 9, 64), torch.randn(1, 9, 64))
    with pytest.raises(ConfigError, match="one cross-attention"):
        IncrementalDecoder(paired, two, rows=1, max_length=8)
    assert BlipForNLVR(config).text_decoder is None

"""The MED transformer: streams that meet in what they share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from blipfast.errors import ConfigError, ShapeError
from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig, blip_config
from blipfast.models.streams import run_streams
from blipfast.models.text import TextTransformer


def model(**parts) -> Blip:
    blip = Blip(blip_config("blip_tiny"), num_classes=2, contrastive=True, **parts).double().eval()
    with torch.no_grad():
        for parameter in blip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return blip


def texts(lengths: list[int]) -> PackedText:
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return PackedText.from_padded(torch.randint(1, 400, mask.shape) * mask, mask)


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    blip, text = model(text_decoder="image"), texts([5, 9, 2])
    states = blip.image_states(torch.randn(4, 17, 64, dtype=torch.float64))
    together = run_streams([blip.grounded_stream(text, [3, 0, 3])], states)[0]
    alone = [
        run_streams([blip.grounded_stream(text.select([i]), [image])], states)[0]
        for i, image in enumerate([3, 0, 3])
    ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_projected_ahead_is_the_same() -> None:
    blip, text = model(), texts([5, 9, 2])
    embeds = torch.randn(2, 17, 64, dtype=torch.float64)
    lazy, ahead = (blip.image_states(embeds, project=p) for p in (False, True))
    assert torch.equal(blip.match(text, lazy, [0, 1, 0]), blip.match(text, ahead, [0, 1, 0]))


def test_first_only_is_the_first_token() -> None:
    blip, text = model(text_decoder="image"), texts([5, 9, 2])
    states = blip.image_states(torch.randn(3, 17, 64, dtype=torch.float64))

    def run(first_only: bool) -> list[torch.Tensor]:
        grounded = blip.grounded_stream(text, range(3), first_only=first_only)
        return run_streams([grounded, blip.decoder_stream(text, range(3))], states)

    whole, first = run(False), run(True)
    torch.testing.assert_close(first[0], whole[0][text.packing.first_tokens])
    torch.testing.assert_close(first[1], whole[1])


def test_the_decoder_never_looks_ahead() -> None:
    blip = model(text_decoder="image")
    states = blip.image_states(torch.randn(1, 17, 64, dtype=torch.float64), decoder=True)
    text = texts([8])
    changed = PackedText(text.input_ids.clone(), text.packing)
    changed.input_ids[5] += 1
    a, b = (run_streams([blip.decoder_stream(t, [0])], states)[0] for t in (text, changed))
    assert torch.equal(a[:5], b[:5])
    assert not torch.equal(a[5:], b[5:])


def test_shifted_gives_next_tokens() -> None:
    text = texts([4, 2, 3])
    inputs, labels = text.shifted()
    parts = text.input_ids.split([4, 2, 3])
    assert torch.equal(inputs.input_ids, torch.cat([part[:-1] for part in parts]))
    assert torch.equal(labels, torch.cat([part[1:] for part in parts]))
    assert inputs.packing.lengths == (3, 1, 2)


def test_what_cannot_be_is_said() -> None:
    blip = model()
    states = blip.image_states(torch.randn(1, 17, 64, dtype=torch.float64))
    with pytest.raises(ConfigError, match="without a text decoder"):
        blip.decoder_stream(texts([3]), [0])
    with pytest.raises(ShapeError, match="65 tokens, but the model 64 positions"):
        blip.encode_text(texts([65]))
    with pytest.raises(ConfigError, match="both kv_index and states"):
        run_streams([blip.grounded_stream(texts([3]), [0])])
    with pytest.raises(ShapeError, match=r"\[0, 1\)"):
        blip.match(texts([3]), states, [1])
    unimodal = TextTransformer(blip.text_config, cross_width=None).double()
    stream = unimodal.stream(texts([3]).input_ids, texts([3]).packing, kv_index=[0])
    with pytest.raises(ConfigError, match="without cross-attention"):
        run_streams([stream], states)
    with pytest.raises(ShapeError, match="text 1 of the batch has no tokens"):
        PackedText.from_padded(torch.ones(2, 3).long(), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    with pytest.raises(ShapeError, match="same shape"):
        PackedText.from_padded(torch.ones(2, 3).long(), torch.ones(2, 4))


def test_vit_names_the_size_it_wants() -> None:
    with pytest.raises(ShapeError, match=r"\(B, 3, 32, 32\), got \(1, 3, 48, 48\)"):
        model().encode_image(torch.zeros(1, 3, 48, 48, dtype=torch.float64))


def test_recomputed_activations_give_the_same_gradients() -> None:
    blip = model().train()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for recomputed in (0, 2):
        blip.visual_encoder.gradient_checkpointing = recomputed
        blip.zero_grad()
        blip.encode_image(pixels).square().sum().backward()
        results.append(blip.visual_encoder.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*results)


def test_config_errors_name_the_key() -> None:
    config = blip_config("blip_base", image_size=384)
    assert BlipConfig.from_dict(config.to_dict()) == config
    assert config.vision.num_tokens == 577
    values = config.to_dict()
    values["text"]["num_hedas"] = 3
    with pytest.raises(ConfigError, match=r"text\.num_hedas; did you mean text\.num_heads"):
        BlipConfig.from_dict(values)
    with pytest.raises(ConfigError, match="no preset 'blip_huge'"):
        blip_config("blip_huge")
    with pytest.raises(ConfigError, match="no multiple of patch_size"):
        blip_config("blip_base", image_size=225)
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        dataclasses.replace(config.text, vocab_size=100)

"""Maps of cross-attention: distributions, from the model's own weights, in an unchanged pass."""

from __future__ import annotations

import math

import pytest
import torch

from blipfast.errors import ConfigError, ShapeError
from blipfast.models.attention_maps import token_maps
from blipfast.models.blip import PackedText
from blipfast.models.config import blip_config
from blipfast.tasks.retrieval import BlipForRetrieval


@pytest.fixture(scope="module")
def model() -> BlipForRetrieval:
    torch.manual_seed(0)
    model = BlipForRetrieval(blip_config("blip_tiny")).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


@pytest.fixture(scope="module")
def embeds(model) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_image(torch.randn(1, 3, 32, 32).double())


def text(*ids: int) -> PackedText:
    return PackedText.from_padded(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))


def test_each_layer_attends_as_its_weights_say(model, embeds) -> None:
    """The first layer's, from its inputs by hand; all layers' are distributions."""
    words = text(1, 5, 9, 7, 2)
    for layer in range(len(model.encoder.layers)):
        found = token_maps(model, embeds, words, layer=layer, by_gradient=False)
        assert found.probs.shape == (model.text_config.num_heads, 5, embeds.shape[1])
        torch.testing.assert_close(found.probs.sum(-1), torch.ones_like(found.probs[..., 0]))
        torch.testing.assert_close(found.maps, found.probs.mean(0))
    first = model.encoder.layers[0]
    stream = model.grounded_stream(words, [0])
    with torch.no_grad():
        hidden = first.self_attention(stream.hidden, words.packing, False)
        attention = first.cross_attention.attention
        heads = model.text_config.num_heads
        q = attention.query(hidden).view(5, heads, -1)
        width = q.shape[1] * q.shape[2]
        k = embeds[0] @ attention.key_value.weight[:width].T + attention.key_value.bias[:width]
        k = k.view(-1, heads, q.shape[2])
        expected = torch.einsum("qhd,khd->hqk", q, k).div(math.sqrt(q.shape[2])).softmax(-1)
    found = token_maps(model, embeds, words, layer=0, by_gradient=False)
    torch.testing.assert_close(found.probs, expected)


def test_the_pass_is_the_models(model, embeds) -> None:
    words = text(1, 5, 9, 7, 2)
    with torch.no_grad():
        logits = model.match(words, model.image_states(embeds), [0])
    for by_gradient in (False, True):
        found = token_maps(model, embeds, words, by_gradient=by_gradient)
        assert found.itm == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-9)
    assert not model.encoder.layers[0].cross_attention.attention._forward_hooks


def test_weights_are_the_gradients(model, embeds) -> None:
    """A map's gradient says how the matching logit changes when attention does: by differences."""
    words = text(1, 5, 9, 2)
    layer = len(model.encoder.layers) - 1
    plain = token_maps(model, embeds, words, layer=layer, by_gradient=False)
    weighed = token_maps(model, embeds, words, layer=layer)
    assert (weighed.maps >= 0).all()
    assert weighed.maps.any()
    attention = model.encoder.layers[layer].cross_attention.attention
    gradient = torch.zeros_like(plain.probs)
    with torch.no_grad():
        for h, s in ((0, 1), (1, 3), (0, 4)):  # of the first token, which the head reads
            values = []
            for sign in (1, -1):
                probs = plain.probs.clone()
                probs[h, 0, s] += sign * 1e-5

                def swap(module, inputs, output, probs=probs):
                    v = module.project(inputs[1])[1][0]
                    return torch.einsum("hqk,hkd->qhd", probs, v).flatten(1)

                handle = attention.register_forward_hook(swap)
                stream = model.grounded_stream(words, [0])
                from blipfast.models.streams import run_streams

                hidden = run_streams([stream], model.image_states(embeds))[0]
                values.append(model.itm_head(hidden[:1])[0, 1].item())
                handle.remove()
            gradient[h, 0, s] = (values[0] - values[1]) / 2e-5
            heads = plain.probs.shape[0]
            part = plain.probs[h, 0, s] * gradient[h, 0, s].clamp(min=0) / heads
            assert weighed.maps[0, s] >= part - 1e-8
    # Tokens that the last layer's head never reads have no say in a match.
    assert not weighed.maps[1:].any()


def test_bad_input(model, embeds) -> None:
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        token_maps(model, embeds, text(1, 2), layer=9)
    with pytest.raises(ShapeError, match="one image and one text, got 2 and 1"):
        token_maps(model, embeds.expand(2, -1, -1), text(1, 2))

"""Groups of parameters: learning rates by layer, and a state that checkpoints can be read into."""

from __future__ import annotations

import pytest
import torch

from blipfast.models.config import blip_config
from blipfast.tasks.retrieval import BlipForRetrieval
from blipfast.train.config import FitConfig
from blipfast.train.optim import create_state, make_optimizer, named_state, set_learning_rate


def scales(decay: float | None) -> dict[str, float]:
    model = BlipForRetrieval(blip_config("blip_tiny"))
    optimizer = make_optimizer(model, FitConfig(steps=1, layer_decay=decay))
    set_learning_rate(optimizer, 2.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    return {name: rates[id(p)] / 2.0 for name, p in model.named_parameters()}


def test_without_decay_all_learn_alike():
    assert set(scales(None).values()) == {1.0}


def test_layers_learn_the_less_the_lower_they_lie():
    found = scales(0.5)
    blocks, layers = (blip_config("blip_tiny").vision.num_layers, 2)
    assert blocks == layers == 2
    assert found["itm_head.weight"] == found["temp"] == found["vision_proj.weight"] == 1.0
    assert found["visual_encoder.blocks.1.attn.qkv.weight"] == 0.5
    assert found["visual_encoder.blocks.0.attn.qkv.weight"] == 0.25
    assert (
        found["visual_encoder.pos_embed"] == found["visual_encoder.patch_embed.proj.bias"] == 0.125
    )
    assert found["text_encoder.layers.1.feed_forward.intermediate.weight"] == 0.5
    assert found["text_encoder.layers.0.cross_attention.attention.query.weight"] == 0.25
    assert found["text_encoder.embeddings.word.weight"] == 0.125


def test_a_made_state_is_that_before_the_first_step():
    runs = []
    for made in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = make_optimizer(model, FitConfig(steps=1))
        if made:
            create_state(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
        names = {id(p): name for name, p in model.named_parameters()}
        runs.append({**named_state(optimizer, names), **model.state_dict()})
    assert runs[0].keys() == runs[1].keys()
    assert {"weight.exp_avg", "weight.step", "bias.exp_avg_sq"} <= runs[0].keys()
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.parametrize("decay", [0.0, -1.0])
def test_decay_out_of_range(decay):
    with pytest.raises(Exception, match=r"fit\.layer_decay"):
        FitConfig(steps=1, layer_decay=decay)

"""A model whose blocks are compiled: the same numbers, and few graphs however deep it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from blipfast.models.config import blip_config
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.train.compiled import compile_regions


def make_model(layers: int, drop_path_rate: float = 0.0) -> BlipForPretraining:
    torch.manual_seed(0)
    config = blip_config("blip_tiny")
    vision = dataclasses.replace(config.vision, num_layers=layers, drop_path_rate=drop_path_rate)
    text = dataclasses.replace(config.text, num_layers=layers, dropout=0.0, attention_dropout=0.0)
    config = dataclasses.replace(config, vision=vision, text=text)
    return BlipForPretraining(config, queue_size=16).train()


def make_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images and texts of other lengths for each seed."""
    torch.manual_seed(seed)
    size = blip_config("blip_tiny").vision.image_size
    lengths = torch.randint(3, 9, (4,))
    mask = (torch.arange(9) < lengths[:, None]).long()
    return torch.randn(4, 3, size, size), torch.randint(103, 450, (4, 9)) * mask, mask


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def graphs(layers: int) -> int:
    torch._dynamo.reset()
    counters.clear()
    model = make_model(layers, drop_path_rate=0.2)
    compile_regions(model, backend="eager")
    for step in range(4):
        model(*make_batch(step), alpha=0.4, step=step).loss.backward()
    # A frame over the limit of recompilations would be left as it is.
    assert counters["frames"]["total"] == counters["frames"]["ok"]
    return counters["stats"]["unique_graphs"]


def test_neither_depth_nor_the_texts_make_graphs() -> None:
    few = graphs(2)
    assert 0 < few <= 16
    assert graphs(6) == few


def test_the_same_losses_and_gradients() -> None:
    plain, compiled = make_model(2), make_model(2)
    compile_regions(compiled, backend="aot_eager")
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for step in range(2):
        outputs = [m(*make_batch(step), alpha=0.4, step=step) for m in (plain, compiled)]
        for output in outputs:
            output.loss.backward()
        ours, theirs = (torch.stack(list(o.losses().values())) for o in outputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    expected = dict(plain.named_parameters())
    for name, parameter in compiled.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4, msg=name
            )


class Doubling(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_model_without_blocks_is_compiled_whole() -> None:
    model, x = Doubling(), torch.randn(4, 3)
    expected = model(x)
    compile_regions(model, backend="eager")
    torch.testing.assert_close(model(x), expected)
    assert counters["stats"]["unique_graphs"] == 1

"""Steps whose texts' lengths are on the device: the same losses, and no look at what is there."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.models.blip import PackedText
from blipfast.models.config import blip_config
from blipfast.ops import _triton, attention
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.tasks.retrieval import BlipForRetrieval

TASKS: dict[str, Any] = {
    "pretrain": BlipForPretraining,
    "retrieval": lambda config, **options: BlipForRetrieval(config, train_state=True, **options),
}


def config_of(preset: str) -> Any:
    config = blip_config(preset)
    text = dataclasses.replace(config.text, dropout=0.0, attention_dropout=0.0)
    return dataclasses.replace(config, text=text)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("room", [40, 41, 72])
def test_losses_gradients_and_draws(task: str, room: int) -> None:
    config = config_of("blip_tiny")
    model = TASKS[task](config, queue_size=32).train()
    other = copy.deepcopy(model)
    lengths = torch.tensor([3, 12, 7, 5, 9, 4])
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(103, config.text.vocab_size - 10, (6, 12)) * mask
    pixels = torch.randn(6, 3, config.vision.image_size, config.vision.image_size)
    image_ids = torch.tensor([0, 1, 2, 0, 3, 4])
    for step in range(2):
        expected = model(pixels, ids, mask, alpha=0.4, step=step, image_ids=image_ids)
        text = PackedText.with_room(ids, lengths, room)
        on_device = {"alpha": torch.tensor(0.4), "step": torch.tensor(step)}
        found = other(pixels, text, image_ids=image_ids, **on_device)
        for name, loss in expected.losses().items():
            torch.testing.assert_close(found.losses()[name], loss)
        assert torch.equal(found.negatives.text_index, expected.negatives.text_index)
        assert torch.equal(found.negatives.image_index, expected.negatives.image_index)
        torch.testing.assert_close(found.itm_logits, expected.itm_logits)
        expected.loss.backward()
        found.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in other.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    assert torch.equal(other.queue.ptr, model.queue.ptr)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_read_from_the_device(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without contents, forward and backward of a batch of the paper's size, with the
    operators of a GPU: whatever asked what a tensor holds would raise."""
    runtime = pytest.importorskip("blipfast.kernels._runtime", reason="needs Triton")
    launches: dict[str, list[int]] = defaultdict(list)
    note = lambda kernel, grid, *_: launches[kernel.__name__].append(grid[0])  # noqa: E731
    monkeypatch.setattr(runtime, "recorder", note)
    monkeypatch.setattr(_triton, "_DEVICES", ("meta",))
    monkeypatch.setattr(_triton, "_too_old", lambda _: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # there is none there
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    config = config_of("blip_base")
    side = config.vision.image_size
    with torch.device("meta"):
        model = TASKS[task](config).train().to(torch.bfloat16)
        ids, lengths = torch.zeros((90, 32), dtype=torch.int64), torch.zeros(90, dtype=torch.int64)
        pixels = torch.zeros(90, 3, side, side, dtype=torch.bfloat16)
        text = PackedText.with_room(ids, lengths, 1_152)
        on_device = {"alpha": torch.zeros(()), "step": torch.zeros((), dtype=torch.int64)}
        out = model(pixels, text, image_ids=torch.arange(90), **on_device)
        out.loss.backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert attention.cross_backends.choose(out.itm_logits, "auto")[0] == "triton"
    of_rows = {name for name in launches if name.startswith(("normalize", "gelu"))}
    others = [grid for name in launches.keys() - of_rows for grid in launches[name]]
    # A table of the tiles that there can be, not as many for each image as all texts might need.
    assert 40 < len(others) < 300
    assert max(others) < 2_000
    # Of both encoders 49 norms in the ViT and 24 or more in the texts' layers.
    assert 70 < len(launches["normalize"]) < 160
    assert sum(len(launches[name]) for name in of_rows) < 400


def test_what_needs_padded_texts_says_so() -> None:
    model = BlipForPretraining(config_of("blip_tiny"), queue_size=8)
    side = model.config.vision.image_size
    ids: Tensor = torch.full((2, 3), 104)
    with pytest.raises(ShapeError, match="need an attention_mask"):
        model(torch.randn(2, 3, side, side), ids, alpha=0.0, step=0)

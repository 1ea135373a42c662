"""A batch in slices gives the gradients of the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from blipfast.checkpoints.load import build
from blipfast.models.config import blip_config
from blipfast.train.batches import ShardBatches
from blipfast.train.config import DataConfig, FitConfig, ObjectiveConfig
from blipfast.train.recipes import RECIPES

sys.path.insert(0, str(Path(__file__).parent))
from shards import dialogues, pairs, questions, record, tokenizer, write

RECORDS = {
    "caption": [record(n, [("dog " * (n + 1), "human")]) for n in range(5)],
    "vqa": questions(5),
    "nlvr": pairs(5),
    "visdial": dialogues(5),
}


@pytest.mark.parametrize("task", RECORDS)
@pytest.mark.parametrize("micro_batch", [2, 7])
def test_gradients_are_those_of_the_whole(tmp_path, task, micro_batch):
    write(tmp_path, RECORDS[task], max_count=10)
    prompt = "a picture of " if task == "caption" else ""
    data = DataConfig(
        shards=str(tmp_path), batch_size=5, threads=1, prompt=prompt, max_dialogue_length=40
    )
    batch = next(iter(ShardBatches(data, tokenizer(), 32, task)))
    words = tokenizer().vocab_size
    preset = blip_config("blip_tiny", image_size=32)
    text = {**preset.text.__dict__, "vocab_size": words}
    config = type(preset)(**{**preset.__dict__, "text": type(preset.text)(**text)})
    torch.manual_seed(0)
    model = build(task, config, RECIPES[task].options(ObjectiveConfig())).double().eval()
    batch = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    results = []
    for size in (None, micro_batch):
        fit = FitConfig(steps=1, micro_batch=size)
        model.zero_grad()
        output = RECIPES[task].make_step(ObjectiveConfig(), fit)(model, batch, 0, 0.0)
        if output.loss.requires_grad:
            output.loss.backward()
        assert output.loss.requires_grad == (size is None or size > 5)
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append(({n: v.detach() for n, v in output.losses().items()}, grads))
    (losses, grads), (sliced_losses, sliced_grads) = results
    assert losses.keys() == sliced_losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(sliced_losses[name], value, rtol=1e-6, atol=1e-9)
    assert grads.keys() == sliced_grads.keys()
    for name, value in grads.items():
        torch.testing.assert_close(sliced_grads[name], value, rtol=1e-5, atol=1e-8, msg=name)

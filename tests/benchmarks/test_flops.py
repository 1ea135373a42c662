"""The formula against PyTorch's count of what really runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.flops import count_flops
from blipfast.models.blip import PackedText
from blipfast.models.config import blip_config
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.nlvr import BlipForNLVR
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.tasks.retrieval import BlipForRetrieval
from blipfast.tasks.visdial import BlipForVisDial
from blipfast.tasks.vqa import BlipForVQA
from blipfast.train.config import ObjectiveConfig
from blipfast.train.flops import peak_flops, sample_flops

BATCH, LENGTH = 4, 12
OBJECTIVE = ObjectiveConfig(queue_size=40)


def config(size: int):
    made = blip_config("blip_tiny", image_size=size)
    wide = dataclasses.replace(
        made.text, hidden_size=128, intermediate_size=512, num_heads=2, max_positions=128
    )
    return dataclasses.replace(made, text=wide)


def losses(task: str, size: int):
    torch.manual_seed(0)
    made = config(size)
    pixels = torch.randn(BATCH, 3, size, size)
    ids = torch.randint(103, 450, (BATCH, LENGTH))
    mask = torch.ones_like(ids)
    ids_of = {"image_ids": torch.arange(BATCH), "alpha": 0.4, "step": 0}
    if task == "pretrain":
        model = BlipForPretraining(made, queue_size=40)
        return lambda: model(pixels, ids, mask, **ids_of).loss
    if task == "retrieval":
        model = BlipForRetrieval(made, train_state=True, queue_size=40)
        return lambda: model(pixels, ids, mask, **ids_of).loss
    if task == "caption":
        model = BlipForCaptioning(made)
        return lambda: model(pixels, ids, mask).loss
    if task == "nlvr":
        model = BlipForNLVR(made)
        pair = torch.stack([pixels, pixels], 1)
        return lambda: model(pair, ids, mask, labels=torch.tensor([0, 1, 1, 0])).loss
    if task == "vqa":
        model = BlipForVQA(made)
        answers = torch.randint(103, 450, (2 * BATCH, 3))
        return lambda: model(
            pixels, ids, mask, answers, torch.ones_like(answers),
            answers_per_question=[2] * BATCH, weights=torch.ones(2 * BATCH),
        ).loss  # fmt: skip
    model = BlipForVisDial(made)
    caption = PackedText.from_padded(ids, mask)
    long = torch.randint(103, 450, (2 * BATCH, 6 * LENGTH))
    dialogues = PackedText.from_padded(long, torch.ones_like(long))
    index = [i for i in range(BATCH) for _ in range(2)]
    labels = torch.tensor([1, 0] * BATCH)
    return lambda: model(pixels, caption, dialogues, image_index=index, labels=labels).loss


@pytest.mark.parametrize("task", ["pretrain", "retrieval", "caption", "nlvr", "vqa", "visdial"])
@pytest.mark.parametrize("size", [64, 128])
def test_formula_is_what_runs(task, size):
    loss = losses(task, size)
    counted = count_flops(lambda: loss().backward()) / BATCH
    predicted = sample_flops(config(size), task, OBJECTIVE, length=LENGTH, batch=BATCH)
    # The lowest layer needs no gradient of its input, and the C++ operators are not counted.
    assert predicted == pytest.approx(counted, rel=0.06)


def test_the_papers_step():
    """1.57 TFLOP were counted for eight pairs of about 13 tokens in the benchmark."""
    total = 8 * sample_flops(blip_config("blip_base"), "pretrain", ObjectiveConfig(), length=13.4)
    assert total == pytest.approx(1.57e12, rel=0.03)


def test_peak_of_this_machine():
    assert peak_flops(torch.device("cpu"), False) > 1e9

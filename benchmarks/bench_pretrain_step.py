"""One pre-training step, forward and backward: the packed pass against the 2022 formulation.

ViT-B/16 and BERT-base, random weights, batch 8 (on a GPU 90, the recipe's share of one), 224 px,
queue 57,600, captions of natural length, dropout 0.1 in the text transformer as in the recipe.
Without dropout both give the same losses, which is asserted before anything is timed. On a GPU our
step is timed once more, recorded as one CUDA graph (`fit.cuda_graph`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import original, workloads
from benchmarks.flops import count_flops
from benchmarks.memory import extra_peak_of_card, peak_memory
from blipfast.models.config import blip_config
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.train.captured import CapturedStep

BATCH, ALPHA = workloads.sized(8, 90), 0.4


def new_model(dropout: float = 0.1) -> BlipForPretraining:
    torch.manual_seed(0)
    config = blip_config("blip_base")
    text = dataclasses.replace(config.text, dropout=dropout, attention_dropout=dropout)
    return BlipForPretraining(dataclasses.replace(config, text=text)).to(workloads.DEVICE).train()


def new_batch() -> tuple[Tensor, Tensor, Tensor]:
    pixel_values, (ids, mask) = workloads.images(BATCH, 224), workloads.captions(BATCH)
    return tuple(x.to(workloads.DEVICE) for x in (pixel_values, ids, mask))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def model() -> BlipForPretraining:
    assert_parity(new_model(dropout=0.0), new_batch())
    return new_model()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor]:
    return new_batch()


def blipfast_step(model: BlipForPretraining, batch: tuple[Tensor, ...], step: int = 0) -> None:
    model(*batch, alpha=ALPHA, step=step).loss.backward()


def original_step(model: BlipForPretraining, batch: tuple[Tensor, ...]) -> None:
    sum(original.pretrain_losses(model, *batch, alpha=ALPHA)).backward()  # type: ignore[union-attr]


def recorded_step() -> Callable[..., None]:
    """Our step as one graph; its first two runs are those that record it."""
    captured = CapturedStep(lambda step: ALPHA, 0)

    def run(model: BlipForPretraining, batch: tuple[Tensor, ...]) -> None:
        pixel_values, ids, mask = batch
        texts = {"input_ids": ids, "attention_mask": mask.cpu()}
        image_ids = torch.arange(BATCH, device=ids.device)
        captured(model, {"pixel_values": pixel_values, "image_ids": image_ids, **texts}, 0, 0.0)

    return run


STEPS: dict[str, Callable[..., None]] = {"blipfast": blipfast_step, "original": original_step}
if workloads.DEVICE.type == "cuda":
    STEPS["blipfast, one graph"] = recorded_step()


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    with torch.autocast(workloads.DEVICE.type, torch.bfloat16, enabled=name == "bf16"):
        yield


def assert_parity(model: BlipForPretraining, batch: tuple[Tensor, ...]) -> None:
    ours = model(*batch, alpha=ALPHA, step=0, update_state=False)
    theirs = original.pretrain_losses(
        model, *batch, alpha=ALPHA, negatives=ours.negatives, update_state=False
    )
    for name, loss, expected in zip(ours.losses(), ours.losses().values(), theirs, strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("code", STEPS)
def test_pretrain_step(
    benchmark: Any, model: BlipForPretraining, batch: tuple[Tensor, ...], code: str, dtype: str
) -> None:
    step = STEPS[code]

    @workloads.finished
    def run() -> None:
        model.zero_grad(set_to_none=True)
        with precision(dtype):
            step(model, batch)

    benchmark.group = f"pre-training step, batch {BATCH}, {dtype}"
    benchmark.extra_info.update(
        code=code,
        tflop=count_flops(run) / 1e12,
        tokens_per_caption=float(batch[2].sum() / BATCH),
        peak_mib=peak_of_step(run, code, dtype),
    )
    # After a few steps the heap has all the pages it needs.
    benchmark.pedantic(run, rounds=5, warmup_rounds=3)


def peak_of_step(run: Callable[[], None], code: str, dtype: str) -> float:
    """MiB on top of model and batch, by a card's own count or in a process of its own."""
    if workloads.DEVICE.type == "cuda":
        return extra_peak_of_card(run)
    return peak_memory(f"{__name__}:peak_of", code, dtype)


def peak_of(code: str, dtype: str) -> Callable[[], None]:
    """What `peak_memory` runs in a process of its own."""
    own, inputs = new_model(), new_batch()

    def run() -> None:
        with precision(dtype):
            STEPS[code](own, inputs)

    return run

"""Gradient accumulation for tasks whose samples do not meet: a batch goes through slice by slice.

(ITC compares all samples of a batch: `blipfast.tasks.in_parts` is for tasks that have it.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blipfast.train.config import TaskName
from blipfast.train.engine import Batch, FinishedLosses, StepFn
from blipfast.train.ranks import world_size

_BY_ROW = ("pixel_values", "input_ids", "attention_mask", "image_ids", "keys")


def in_slices(step: StepFn, task: TaskName, micro_batch: int | None) -> StepFn:
    """The same step over `micro_batch` samples at a time; it runs the backward passes itself."""
    if micro_batch is None:
        return step
    size = micro_batch

    def sliced(model: Any, batch: Batch, number: int, epoch: float) -> Any:
        if size >= len(batch["pixel_values"]):
            return step(model, batch, number, epoch)
        slices = list(slices_of(batch, task, size))
        sums: dict[str, Tensor] = {}
        for part, weight in zip(slices, _weights(slices, task), strict=True):
            output = step(model, part, number, epoch)
            loss = output.loss * weight
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
            for name, value in output.losses().items():
                sums[name] = sums.get(name, 0) + value.detach() * weight
        return FinishedLosses(sums)

    return sliced


def slices_of(batch: Batch, task: TaskName, size: int) -> Iterator[Batch]:
    """The batch in slices of `size` samples."""
    count = len(batch["pixel_values"])
    answers = batch.get("answers_per_question", [])
    for first in range(0, count, size):
        rows = slice(first, first + size)
        part = {name: value[rows] if name in _BY_ROW else value for name, value in batch.items()}
        if task == "nlvr":
            part["labels"] = batch["labels"][rows]
        elif task == "vqa":
            here = slice(sum(answers[:first]), sum(answers[: first + size]))
            part["answers_per_question"] = answers[rows]
            part |= {n: batch[n][here] for n in ("answer_ids", "answer_mask", "weights")}
        elif task == "visdial":
            here = slice(2 * first, 2 * (first + size))
            part |= {n: batch[n][here] for n in ("dialogue_ids", "dialogue_mask", "labels")}
            part["image_index"] = batch["image_index"][here] - first
        yield part


def _weights(slices: list[Batch], task: TaskName) -> list[Tensor]:
    """Each slice's part of the mean: of the tokens learnt where the loss is a mean over tokens."""
    device = slices[0]["pixel_values"].device
    if task == "caption":
        given = max(1, slices[0].get("prompt_length", 0))
        counts = [(part["attention_mask"].sum(1) - given).clamp(min=0).sum() for part in slices]
        total = torch.stack(counts).to(device, torch.float32)
    else:
        total = torch.tensor([float(len(part["pixel_values"])) for part in slices], device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return list(total / total.sum())

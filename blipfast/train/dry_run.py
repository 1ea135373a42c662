"""`blipfast train --dry_run true`: what a run would be, before any of it is done."""

from __future__ import annotations

import dataclasses

import torch
from rich.console import Console
from rich.table import Table

from blipfast.models.blip import Blip
from blipfast.train.batches import ShardBatches
from blipfast.train.config import FitConfig, TrainConfig
from blipfast.train.engine import StepFn
from blipfast.train.flops import peak_flops, sample_flops
from blipfast.train.memory import Prediction, predict_memory
from blipfast.train.ranks import world_size

_TOKENS_PER_WORD, _SPECIAL = 1.25, 2  # of BERT's vocabulary and English captions


def show_plan(
    config: TrainConfig, fit: FitConfig, model: Blip, batches: ShardBatches, step: StepFn,
    device: torch.device,
) -> Prediction:  # fmt: skip
    """Prints parameters, memory, arithmetic and length of a run; returns the predicted memory.

    step: the recipe's, without micro-batches.
    """
    config = dataclasses.replace(config, fit=fit)
    words = batches.mean_words
    limit = config.data.max_length
    length = int(min(limit, max(3, round(words * _TOKENS_PER_WORD + _SPECIAL))))
    ranks, batch = world_size(), config.data.batch_size
    memory = predict_memory(
        config, model, step, length=length, world_size=ranks, device=device.type
    )
    flops = sample_flops(
        model.config, config.task, config.objective, length=length, batch=batch * ranks
    )
    peak = peak_flops(device, fit.precision != "fp32")
    table = Table(title=f"{config.task}: a plan, nothing is trained", show_header=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = {
        "model": f"{config.model.checkpoint or config.model.preset}, {trained / 1e6:,.1f}M trained",
        "data": f"{batches.samples:,} samples an epoch, {words:.1f} words a text",
        "batch": f"{batch} on each of {ranks} ranks, {batch * ranks:,} in all",
        "length": f"{fit.total_steps:,} steps, {fit.epoch_length:,} to an epoch",
        "schedule": f"{fit.schedule}, {fit.learning_rate:g} after {fit.warmup_steps:,} steps",
        "layout": f"{fit.parallel}, {fit.precision}",
        "a step": f"{flops * batch / 1e12:,.3f} TFLOP on each rank",
    }
    if peak is not None:
        seconds = flops * batch / peak
        rows["a step"] += f", {seconds:.2f} s at this hardware's {peak / 1e12:,.2f} TFLOP/s"
    rows |= {f"  {name}": _size(size) for name, size in memory.parts.items()}
    rows["peak memory"] = f"{_size(memory.peak)} on each rank, on top of the program itself"
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    return memory


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"

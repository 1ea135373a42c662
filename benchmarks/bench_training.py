"""Pre-training by the engine, from shards of JPEGs: how much of a step waits for data.

ViT-B/16 and BERT-base, random weights, bf16, batch 8 (on a GPU 90, the recipe's share of one), 224
px, the recipe's augmentation, all threads. The baseline trains on batches that lie in memory.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from benchmarks import workloads
from benchmarks.bench_loader import IMAGES, SIDE, THREADS, photograph, tokenizer, write_shards
from blipfast.models.config import blip_config
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.train.batches import ShardBatches
from blipfast.train.config import DataConfig, FitConfig, ObjectiveConfig
from blipfast.train.engine import fit
from blipfast.train.recipes import RECIPES
from blipfast.train.watch import StepTimer

BATCH, STEPS = workloads.sized(8, 90), workloads.sized(3, 40)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> ShardBatches:
    images = [photograph(n) for n in range(IMAGES)]
    shards = write_shards(tmp_path_factory.mktemp("shards"), images)
    config = DataConfig(shards=str(shards), batch_size=BATCH, threads=THREADS)
    return ShardBatches(config, tokenizer(), SIDE, "pretrain", device=workloads.DEVICE)


@pytest.fixture(scope="module")
def model() -> BlipForPretraining:
    torch.manual_seed(0)
    return BlipForPretraining(blip_config("blip_base")).to(workloads.DEVICE)


@pytest.mark.parametrize("code", ["blipfast", "in memory"])
def test_training(
    benchmark: Any, batches: ShardBatches, model: BlipForPretraining, code: str
) -> None:
    # A list is begun again when it ends.
    source: Any = batches if code == "blipfast" else list(islice(batches, 2))
    timer = StepTimer()

    def train(steps: int, timer: StepTimer) -> None:
        config = FitConfig(steps=steps, precision="bf16", learning_rate=1e-6, schedule="constant")
        step = RECIPES["pretrain"].make_step(ObjectiveConfig(), config)
        fit(model, source, step, config, title=code, timer=timer)

    train(2, StepTimer())
    benchmark.group = f"training from shards, {STEPS} steps of {BATCH}, bf16"
    benchmark.pedantic(workloads.finished(lambda: train(STEPS, timer)), rounds=2)
    rates = timer.rates()
    benchmark.extra_info.update(
        code=code, samples_per_second=rates.samples, data_wait=rates.data_wait
    )

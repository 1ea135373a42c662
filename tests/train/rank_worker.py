"""One rank of `test_ranks.py`, started by torchrun: `rank_worker.py FOLDER JSON`.

Trains the toy or a tiny BLIP on batches that depend on the step and the global row alone, so that
the same global batches come on any number of ranks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from shards import tokenizer
from toy import Again, Toy, ToyOutput, toy_step

from blipfast.errors import Preempted
from blipfast.models.config import blip_config
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.train import parallel
from blipfast.train.batches import ShardBatches
from blipfast.train.config import DataConfig, FitConfig, ObjectiveConfig
from blipfast.train.engine import fit
from blipfast.train.parallel import whole_state
from blipfast.train.ranks import process_group, rank, world_size
from blipfast.train.recipes import RECIPES

GLOBAL_BATCH = 4


class Batches:
    """Step t has global rows 4t to 4t + 3; a rank takes its share of them."""

    def __init__(self, kind: str, pause: float) -> None:
        self.kind, self.pause = kind, pause

    def combine_positions(self, positions: list[int]) -> int:
        assert len(set(positions)) == 1
        return positions[0]

    def stream(self, position: int | None) -> Iterator[dict[str, Any]]:
        step = 0 if position is None else position
        share = GLOBAL_BATCH // world_size()
        while True:
            first = step * GLOBAL_BATCH + rank() * share
            rows = [self.row(number) for number in range(first, first + share)]
            batch: dict[str, Any] = {name: torch.stack([r[name] for r in rows]) for name in rows[0]}
            step += 1
            time.sleep(self.pause)
            yield batch | {"keys": [f"row{first + i}" for i in range(share)], "position": step}

    def row(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number % 40)
        if self.kind == "toy":
            x = torch.randn(4, generator=generator)
            return {"x": x, "y": x.sum()}
        size = blip_config("blip_tiny").vision.image_size
        ids = torch.randint(103, 450, (6,), generator=generator)
        return {
            "pixel_values": torch.randn(3, size, size, generator=generator),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "image_ids": torch.tensor(number % 40),
        }


class Brightness(torch.nn.Module):
    """Learns from a picture's mean, so that real shards can be read fast."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: torch.Tensor) -> ToyOutput:
        error = (self.scale * pixel_values.mean() - 1).square()
        return ToyOutput(error, 0 * error)


def make_model(kind: str, across_ranks: bool) -> torch.nn.Module:
    if kind == "shards":
        return Brightness()
    if kind == "toy":
        model = Toy()
        model.body[2].p = 0.0  # ranks draw differently
        return model
    torch.manual_seed(3)
    model = BlipForPretraining(blip_config("blip_tiny"), queue_size=16, across_ranks=across_ranks)
    for module in model.modules():
        for name in ("dropout", "attention_dropout"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


def main(folder: Path, options: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    kind, pause = options.pop("kind", "toy"), options.pop("pause", 0.0)
    hang = options.pop("hang", None)
    resume = options.pop("resume", True)
    model = make_model(kind, options.pop("across_ranks", True))
    config = FitConfig(**options)
    plain = toy_step
    batches: Any = Batches(kind, pause)
    if kind == "shards":

        def plain(model: Any, batch: Any, number: int, epoch: float) -> Any:
            time.sleep(pause)
            name = f"keys-{world_size()}-{rank()}.txt"
            with open(folder / name, "a") as file:
                file.write(f"{number} {batch['position']['epoch']} {batch['keys'][0]}\n")
            return model(batch["pixel_values"])

    elif kind != "toy":
        plain = RECIPES["pretrain"].make_step(ObjectiveConfig(), config)
        if config.grad_checkpointing:
            model.checkpoint_gradients()
        if config.cuda_graph:  # without a card, what it records is run anew
            plain.make_graph = Again
            parallel._check_graph = lambda *_: None

    def step(model: Any, batch: Any, number: int, epoch: float) -> Any:
        if hang == [rank(), number]:
            time.sleep(1000)
        with open(folder / f"steps-{rank()}.txt", "a") as file:
            file.write(f"{number} {os.getpid()}\n")
        return plain(model, batch, number, epoch)

    with process_group(torch.device("cpu"), 60.0, alone_too=config.parallel == "fsdp"):
        if kind == "shards":
            data = DataConfig(shards=str(folder / "shards"), batch_size=1, threads=1)
            batches = ShardBatches(data, tokenizer(), 8, "pretrain", rank(), world_size())
        try:
            history = fit(
                model, batches, step, config,
                title="ranks", checkpoint_dir=folder / "checkpoint", resume=resume,
            )  # fmt: skip
        except Preempted:
            return Preempted.exit_code
        state = whole_state(model) or model.state_dict()
        if rank() == 0:
            torch.save(state, folder / "done.pt")
            history.to_json(folder / "history.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))

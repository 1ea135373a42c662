"""A small model with dropout and a queue, whose training the loop's tests drive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blipfast.objectives.distributed import all_gather_no_grad


@dataclass
class ToyOutput:
    a: Tensor
    b: Tensor

    @property
    def loss(self) -> Tensor:
        return self.a + self.b

    def losses(self) -> dict[str, Tensor]:
        return {"a": self.a, "b": self.b}


class Toy(nn.Module):
    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, x: Tensor, y: Tensor) -> ToyOutput:
        # As features enter a queue: those of all ranks.
        self.queue.copy_(0.9 * self.queue + 0.1 * all_gather_no_grad(x).mean(0))
        predicted = self.body(x + 0.1 * self.queue).squeeze(-1)
        return ToyOutput((predicted - y).square().mean(), 0.01 * predicted.square().mean())


def toy_step(model: Toy, batch: dict, step: int, epoch: float) -> ToyOutput:
    return model(batch["x"], batch["y"])


def toy_batches(count: int = 12, bad: int | None = None) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for i in range(count):
        x = torch.randn(5, 4, generator=generator)
        if i == bad:
            x[2, 1] = float("nan")
        batches.append(
            {"x": x, "y": x.nan_to_num().sum(1), "keys": [f"r{i}-{j}" for j in range(5)]}
        )
    return batches


def saved_weights(checkpoints: Path) -> dict[str, Tensor]:
    """The model's tensors in the newest checkpoint of a run of one process."""
    [shard] = max(checkpoints.glob("step-*")).glob("*.safetensors")
    tensors = load_file(shard).items()
    return {name.removeprefix("model."): t for name, t in tensors if name.startswith("model.")}


class Again:
    """Replays by running; like a graph it does nothing while it records."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def warm_up(self, run: Callable[[], None]) -> None:
        self.did.append("warm-up")
        run()

    def record(self, run: Callable[[], None]) -> None:
        self.did.append("record")
        self.run = run

    def replay(self) -> None:
        self.did.append("replay")
        self.run()

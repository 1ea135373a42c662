"""Every generator that a step may draw from: seeded for each rank, saved and restored."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blipfast.train.ranks import rank, world_size


def seed(number: int) -> None:
    """Seeds all global generators; ranks draw differently."""
    chosen = number + 1_000_003 * rank()
    torch.manual_seed(chosen)
    random.seed(chosen)
    np.random.seed(chosen % 2**32)  # noqa: NPY002


def device_state(device: torch.device) -> dict[str, Tensor]:
    """torch's generators of this rank, as uint8 tensors named for it."""
    states = {f"rng.{rank()}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"rng.{rank()}.cuda"] = torch.cuda.get_rng_state(device)
    return states


def host_state() -> dict[str, Any]:
    """Python's and NumPy's generators of this rank, as plain data."""
    version, numbers, spare = random.getstate()
    _, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(numbers), spare],
        "numpy": [keys.tolist(), place, has_gauss, gauss],  # type: ignore[union-attr,attr-defined]
    }


def restore(
    host: list[dict[str, Any]],
    tensors: dict[str, Tensor],
    device: torch.device,
    number: int,
    step: int,
) -> None:
    """Puts this rank's generators back as a checkpoint has them.

    On another number of ranks there is no state to go on from: seeds made of `number` and `step`.
    """
    if len(host) != world_size():
        seed(number + 7_919 * (step + 1))
        return
    version, numbers, spare = host[rank()]["python"]
    random.setstate((version, tuple(numbers), spare))
    keys, place, has_gauss, gauss = host[rank()]["numpy"]
    state = ("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, gauss)
    np.random.set_state(state)  # noqa: NPY002
    torch.set_rng_state(tensors[f"rng.{rank()}.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"rng.{rank()}.cuda"], device)

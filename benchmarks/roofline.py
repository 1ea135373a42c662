"""What the machine can do: bytes per second of a large copy, FLOPs per second of a large product.

Measured, not looked up: the share of these that an operator reaches is a share of what this
machine's PyTorch reaches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from blipfast.ops.linear_layers import linear


@dataclass(frozen=True)
class Roof:
    """bandwidth: bytes read and written per second. flops: multiplications and additions."""

    bandwidth: float
    flops: float

    def floor(self, num_bytes: float, num_flops: float) -> float:
        """The least seconds that so much moving and computing can take."""
        return max(num_bytes / self.bandwidth, num_flops / self.flops)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device: torch.device, dtype: torch.dtype) -> Roof:
    cuda = device.type == "cuda"
    size = 2**28 if cuda else 2**25
    source = torch.ones(size, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    side = 8_192 if cuda else 2_048
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    product = _best(lambda: linear(a, b), device)
    return Roof(2 * 4 * size / copy, 2 * side**3 / product)


def seconds_on_card(run: Callable[[], object], rounds: int = 10) -> float:
    """Median of the card's own time, with no input in its cache and every launch queued ahead."""
    other = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        torch.cuda._sleep(20_000_000)  # about ten milliseconds, in which launches gather
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return statistics.median(times)


def _best(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)

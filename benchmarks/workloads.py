"""What every benchmark runs on: sizes, random weights and texts of natural length."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.roofline import synchronize

T = TypeVar("T")
DEVICE_VAR = "BLIPFAST_BENCH_DEVICE"
DEVICE = torch.device(os.environ.get(DEVICE_VAR, "cpu"))

# Tokens of a caption with its two special ones: COCO's mean is 13.5, most lie between 10 and 17.
_MEAN, _SPREAD, _SHORTEST, _LONGEST = 13.5, 2.5, 9, 30


def sized(on_cpu: T, on_cuda: T) -> T:
    """What fills the device that is measured."""
    return on_cuda if DEVICE.type == "cuda" else on_cpu


def placed(model: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Moves a model, and copies tensors, to the device that is measured."""
    model.to(DEVICE)
    return tuple(x.to(DEVICE) for x in tensors)


def finished(run: Callable[[], T]) -> Callable[[], T]:
    """`run`, and a wait for the device's end."""

    def whole() -> T:
        result = run()
        synchronize(DEVICE)
        return result

    return whole


def caption_lengths(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(count, generator=generator) * _SPREAD + _MEAN
    return lengths.round().long().clamp(_SHORTEST, _LONGEST).tolist()


def captions(count: int, seed: int = 0, vocab_size: int = 30_522) -> tuple[Tensor, Tensor]:
    """Right-padded `input_ids` and `attention_mask`, `(count, longest)`, of random words."""
    return texts(caption_lengths(count, seed), seed, vocab_size)


def texts(lengths: list[int], seed: int = 0, vocab_size: int = 30_522) -> tuple[Tensor, Tensor]:
    """Right-padded texts of the given lengths: [CLS], random words, [SEP]."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    words = torch.randint(1_000, vocab_size, (len(lengths), longest), generator=generator)
    ids = words * mask
    ids[:, 0] = 101
    ids[torch.arange(len(lengths)), mask.sum(1) - 1] = 102
    return ids, mask


def images(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator)

"""The contrastive loss of one direction: 90 queries against 57,690 keys of width 256.

Forward and backward with soft targets; the baseline writes out the whole matrix of similarities.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.ops.contrastive import contrastive_softmax

ROWS, KEYS, WIDTH, ALPHA = 90, 57_690, 256, 0.4
CODES = ("native", "torch", "eager")


@pytest.fixture(scope="module")
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, teacher = (F.normalize(torch.randn(ROWS, WIDTH), dim=-1) for _ in range(2))
    return query.requires_grad_(), teacher, F.normalize(torch.randn(KEYS, WIDTH), dim=-1)


def eager(query: Tensor, teacher: Tensor, keys: Tensor, temperature: Tensor) -> Tensor:
    with torch.no_grad():
        targets = ALPHA * (teacher @ keys.T / temperature).softmax(-1)
        targets[:, :ROWS] += (1 - ALPHA) * torch.eye(ROWS)
    return -((query @ keys.T / temperature).log_softmax(-1) * targets).sum(-1)


@pytest.mark.parametrize("code", CODES)
def test_contrastive(benchmark: Any, tensors: tuple[Tensor, Tensor, Tensor], code: str) -> None:
    query, teacher, keys = tensors
    temperature = torch.tensor(0.07, requires_grad=True)

    def loss() -> Tensor:
        if code == "eager":
            return eager(query, teacher, keys, temperature)
        return contrastive_softmax(
            query, keys, temperature, teacher_query=teacher, alpha=ALPHA, impl=code
        )

    torch.testing.assert_close(
        loss(), eager(query, teacher, keys, temperature), atol=1e-4, rtol=1e-4
    )

    def run() -> None:
        query.grad = temperature.grad = None
        loss().mean().backward()

    benchmark.group = f"contrastive softmax, {ROWS} x {KEYS} x {WIDTH}, forward and backward, fp32"
    benchmark.extra_info.update(code=code)
    benchmark.pedantic(run, rounds=9, warmup_rounds=2)

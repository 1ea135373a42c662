"""The kernels over packed texts alone against the formula in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from blipfast.kernels.varlen_attention import varlen_attention as kernel
from dropout_mask import kept
from place import DEVICE, IMPL, INTERPRETED
from torch import Tensor

from blipfast.errors import BackendError
from blipfast.ops.attention import varlen_attention, varlen_backends
from blipfast.ops.packing import Packing

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES: dict[str, tuple[list[int], int]] = {
    "one token": ([1], 32),
    "captions": ([5, 2, 7, 1], 64),
    "empty texts": ([0, 4, 0, 6, 0], 48),
    "more rows than a tile": ([70, 3, 33], 32),
    "wide heads": ([9, 20], 128),
    "padded width": ([3, 4], 80),
}
if not INTERPRETED:  # BLIP's own sizes
    CASES |= {
        "a pre-training batch": ([9 + i % 9 for i in range(360)], 64),
        "dialogues": ([200, 37, 151], 64),
    }


def run(qkv: Tensor, weights: Tensor, packing: Packing, causal: bool, impl: str) -> list[Tensor]:
    """Output and gradient."""
    qkv = qkv.detach().requires_grad_()
    out = varlen_attention(qkv, packing, causal=causal, impl=impl)
    return [out, *torch.autograd.grad(out, qkv, weights.to(out.dtype))]


def make(lengths: list[int], dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Packing]:
    packing = Packing.from_lengths(lengths, DEVICE)
    qkv = torch.randn(packing.total, 3, 2, dim).to(dtype)
    return qkv, torch.randn(packing.total, 2, dim).to(dtype), packing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_gradient(case: Any, causal: bool, dtype: torch.dtype, assert_no_worse) -> None:
    qkv, weights, packing = make(*case, dtype)
    ours = run(qkv, weights, packing, causal, IMPL)
    plain = run(qkv, weights, packing, causal, "reference")
    exact = run(qkv.double(), weights, packing, causal, "reference")
    for name, *values in zip(["out", "d_qkv"], ours, plain, exact, strict=True):
        assert_no_worse(*values, name)


@pytest.mark.parametrize("seed", range(4))
def test_random_texts(seed: int, assert_no_worse) -> None:
    draw = random.Random(seed)
    dtype, causal = draw.choice(DTYPES), draw.random() < 0.5
    lengths = [draw.choice([0, 1, 2, draw.randint(3, 40)]) for _ in range(draw.randint(1, 7))]
    lengths[0] += 1
    case = (lengths, draw.choice([16, 32, 40, 64, 96]))
    qkv, weights, packing = make(*case, dtype)
    ours = run(qkv, weights, packing, causal, IMPL)
    plain = run(qkv, weights, packing, causal, "reference")
    exact = run(qkv.double(), weights, packing, causal, "reference")
    for name, *values in zip(["out", "d_qkv"], ours, plain, exact, strict=True):
        assert_no_worse(*values, f"{name} of {case} in {dtype}")


def test_any_strides() -> None:
    qkv, weights, packing = make(*CASES["captions"], torch.float32)
    wide = torch.full((qkv.shape[0], 2, *qkv.shape[1:-1], 2 * qkv.shape[-1]), float("nan"))
    wide[:, 1, ..., ::2] = qkv
    dense = run(qkv, weights, packing, True, IMPL)
    for a, b in zip(run(wide[:, 1, ..., ::2], weights, packing, True, IMPL), dense, strict=True):
        assert torch.equal(a, b)
    one = torch.ones(1, 1, 1).expand_as(weights)
    expanded = run(qkv, one, packing, True, IMPL)
    for a, b in zip(expanded, run(qkv, one.contiguous(), packing, True, IMPL), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("lengths", [[5, 8], [70, 9]], ids=str)
def test_dropout_drops_what_philox_says(lengths: list[int], causal: bool) -> None:
    """Against the formula with the mask computed apart; so it does not depend on the tiles."""
    p, heads, seed, total = 0.3, 2, 123456789012345, sum(lengths)
    qkv = torch.randn(total, 3, heads, 32, dtype=torch.float64).requires_grad_()
    weights = torch.randn(total, heads, 32, dtype=torch.float64)
    outputs, first = [], 0
    for number, length in enumerate(lengths):
        mask = kept(length, length, heads, number, p, seed)
        q, k, v = qkv[first : first + length].unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 32**0.5
        if causal:
            ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(ahead, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1) * mask / (1 - p), v))
        first += length
    exact = torch.cat(outputs)
    (exact_gradient,) = torch.autograd.grad(exact, qkv, weights)
    low = qkv.detach().float().requires_grad_()
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    options = {"causal": causal, "dropout_p": p}
    out = kernel(low, cu_seqlens, max(lengths), **options, seed=torch.tensor([seed]))
    (gradient,) = torch.autograd.grad(out, low, weights.float())
    torch.testing.assert_close(out.double(), exact, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="seed"):
        kernel(low, cu_seqlens, max(lengths), **options)


def test_dropout_draws_from_the_generator() -> None:
    qkv, _, packing = make(*CASES["captions"], torch.float32)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(varlen_attention(qkv, packing, dropout_p=0.5, impl=IMPL))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("rows", [4, 70])
def test_opcheck(rows: int) -> None:
    qkv = torch.randn(rows, 3, 2, 16, requires_grad=True)
    cu_seqlens = torch.tensor([0, rows - 1, rows], dtype=torch.int32)
    arguments = (qkv, cu_seqlens, None, rows - 1, True, 0.0)
    torch.library.opcheck(torch.ops.blipfast.triton_varlen_attention, arguments)


def test_compiles_without_a_graph_break() -> None:
    qkv, weights, packing = make(*CASES["captions"], torch.float32)
    packing.prepare()
    eager = run(qkv, weights, packing, True, IMPL)
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    qkv = qkv.detach().requires_grad_()
    out = compiled(qkv, packing, causal=True, impl=IMPL)
    for a, b in zip([out, *torch.autograd.grad(out, qkv, weights)], eager, strict=True):
        torch.testing.assert_close(a, b)


def test_runs_only_where_it_can() -> None:
    qkv = torch.randn(2, 3, 2, 16)
    name = varlen_backends.choose(qkv)[0]
    assert (name == "triton") is not INTERPRETED
    with pytest.raises(BackendError, match="float64"):
        varlen_backends.choose(qkv.double(), IMPL)
    with pytest.raises(BackendError, match="128"):
        varlen_backends.choose(torch.randn(2, 3, 2, 256), IMPL)

"""Operators on a card, where no kernel of ours runs, and what only a card can show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.ops import (
    CrossPlan,
    LayerNorm,
    Packing,
    add_layer_norm,
    contrastive_softmax,
    cross_attention,
    dense_attention,
    feed_forward,
    linear_cross_entropy,
    momentum_update_,
    sample_hard_negatives,
    varlen_attention,
)
from blipfast.ops.attention import varlen_backends
from blipfast.ops.seeded_dropout import dropout

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
LOW = [torch.bfloat16, torch.float16]
LENGTHS = [5, 1, 17, 9, 30, 12]


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the card."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def both_ways(run: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    weights = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_nothing_waits_for_the_card(dtype: torch.dtype) -> None:
    packing = Packing.from_lengths(LENGTHS, DEVICE).prepare()
    plan = CrossPlan.build(packing, [2, 0, 1, 0, 2, 1], 3).prepare()
    q = torch.randn(packing.total, 4, 64, device=DEVICE, dtype=dtype)
    k, v = torch.randn(2, 3, 4, 197, 64, device=DEVICE, dtype=dtype)
    qkv = torch.randn(packing.total, 3, 4, 64, device=DEVICE, dtype=dtype)
    query, teacher, keys = (unit(n, 256, dtype=dtype) for n in (9, 9, 700))
    t = torch.tensor(0.07, device=DEVICE)
    hidden, weight = (torch.randn(n, 64, device=DEVICE, dtype=dtype) for n in (40, 300))
    labels = torch.arange(40, device=DEVICE)
    sources = [torch.randn(30, device=DEVICE) for _ in range(3)]
    targets = [torch.zeros_like(x) for x in sources]

    def all_of_them() -> None:
        for p in (0.0, 0.1):
            both_ways(lambda *x, p=p: cross_attention(*x, plan, dropout_p=p), q, k, v)
            both_ways(lambda x, p=p: varlen_attention(x, packing, causal=True, dropout_p=p), qkv)
        both_ways(
            lambda x, y: contrastive_softmax(x, y, t, teacher_query=teacher, alpha=0.4), query, keys
        )
        sample_hard_negatives(query, keys, t, eps=1e-4, query_ids=labels[:9], key_ids=ids)
        both_ways(lambda x, y: linear_cross_entropy(x, y, None, labels), hidden, weight)
        momentum_update_(targets, sources, 0.9)
        both_ways(lambda x: dropout(x, 0.1), qkv)
        both_ways(lambda x: feed_forward(x, *layers), hidden)
        for p in (0.0, 0.1):
            both_ways(
                lambda *x, p=p: add_layer_norm(*x, dropout_p=p)[1], q, q, k[0, 0, 0], k[0, 0, 1]
            )

    ids = torch.arange(700, device=DEVICE) % 50
    layers = [torch.nn.Linear(*n).to(DEVICE, dtype) for n in ((64, 256), (256, 64))]
    all_of_them()  # compiles
    with no_waiting():
        all_of_them()
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        t.item()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
def test_packed_attention_of_every_library(causal: bool, dtype: torch.dtype) -> None:
    packing = Packing.from_lengths(LENGTHS, DEVICE)
    qkv = torch.randn(packing.total, 3, 4, 64, device=DEVICE, dtype=dtype)

    def run(name: str, x: Tensor) -> list[Tensor]:
        return both_ways(lambda x: varlen_attention(x, packing, causal=causal, impl=name), x)

    exact, plain = run("reference", qkv.double()), run("reference", qkv)
    able = [name for name in varlen_backends.names if varlen_backends.can_run(name, qkv)]
    assert {"triton", "torch", "torch_varlen", "reference"} <= set(able)
    assert varlen_backends.choose(qkv)[0] in ("triton", "flash_attn")
    eps = torch.finfo(dtype).eps
    for name in able:
        for a, b, c in zip(run(name, qkv), exact, plain, strict=True):
            bound = 2 * (c.double() - b).abs().max() + 2 * eps * b.abs().max().clamp(min=1)
            assert (a.double() - b).abs().max() <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dense_attention(causal: bool, dtype: torch.dtype) -> None:
    """With lengths too; an entry without any key gives 0 and no gradient."""
    shapes = [(3, 4, 19, 64), (3, 4, 19, 64), (3, 4, 19, 64)]
    q, k, v = (torch.randn(*s, device=DEVICE, dtype=dtype) for s in shapes)
    lengths = torch.tensor([7, 0, 19], device=DEVICE)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = (torch.arange(19, device=DEVICE) < lengths[:, None])[:, None, None]
        if causal:
            seen = seen & torch.ones(19, 19, dtype=torch.bool, device=DEVICE).tril()
        scores = (q @ k.mT / 8).masked_fill(~seen, -1e30)
        return (scores.softmax(-1) * seen) @ v

    ours = both_ways(lambda *x: dense_attention(*x, key_lengths=lengths, is_causal=causal), q, k, v)
    exact = both_ways(formula, *(x.double() for x in (q, k, v)))
    tolerance = 5e-6 if dtype == torch.float32 else 4e-2
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)


def test_the_same_bits_in_every_run() -> None:
    packing = Packing.from_lengths(LENGTHS * 20, DEVICE)
    plan = CrossPlan.build(packing, [i * 7 % 24 for i in range(120)], 24)
    q = torch.randn(packing.total, 12, 64, device=DEVICE, dtype=torch.bfloat16)
    k, v = torch.randn(2, 24, 12, 577, 64, device=DEVICE, dtype=torch.bfloat16)
    qkv = torch.randn(packing.total, 3, 12, 64, device=DEVICE, dtype=torch.bfloat16)
    query, keys = unit(90, 256), unit(20_000, 256)
    t = torch.tensor(0.07, device=DEVICE)
    weights = torch.randn(2, 64, device=DEVICE)

    def run() -> list[Tensor]:
        return [
            *both_ways(lambda *x: cross_attention(*x, plan), q, k, v),
            *both_ways(lambda *x: contrastive_softmax(*x, t), query, keys),
            *both_ways(lambda x: varlen_attention(x, packing), qkv),
            *both_ways(lambda *x: torch.stack(add_layer_norm(*x)), q, q, *weights),
        ]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_under_autocast(residual: torch.dtype) -> None:
    """The residual's dtype comes out, and what goes into a layer is what autocast would give it."""
    norm, plain = LayerNorm(768).to(DEVICE), torch.nn.LayerNorm(768).to(DEVICE)
    x, y = torch.randn(2, 197, 768, device=DEVICE).to(residual), torch.randn(2, 197, 768).to(DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        h, normed = norm.add(x, y.bfloat16())
        expected = plain(x + y.bfloat16())
    assert h.dtype == normed.dtype == residual
    assert torch.equal(h, x + y.bfloat16())
    torch.testing.assert_close(
        normed.float(), expected, atol=2e-6 + 2e-2 * (residual != torch.float32), rtol=1e-2
    )


def test_draws_are_those_of_a_cpu() -> None:
    query, keys = unit(90, 256), unit(90, 256)
    t = torch.tensor(0.07, device=DEVICE)
    options = {"eps": 1e-4, "seed": 5, "step": 7, "num": 2}
    there = sample_hard_negatives(query, keys, t, **options)
    here = sample_hard_negatives(query.cpu(), keys.cpu(), t.cpu(), **options)
    assert torch.equal(there.cpu(), here)


def test_no_matrix_of_all_keys_is_in_memory() -> None:
    query, teacher, keys = (unit(n, 256, dtype=torch.bfloat16) for n in (2048, 2048, 57_600))
    t = torch.tensor(0.07, device=DEVICE)
    run = lambda x: contrastive_softmax(x, keys, t, teacher_query=teacher, alpha=0.4)  # noqa: E731
    both_ways(run, query)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both_ways(run, query)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.2 * 2048 * 57_600 * 4  # one matrix in float32


@pytest.mark.parametrize("tokens", [98, 1_125])
def test_logits_lie_within_the_weights_gradient(tokens: int) -> None:
    hidden = torch.randn(tokens, 768, device=DEVICE, dtype=torch.bfloat16)
    weight = 0.02 * torch.randn(30_524, 768, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.arange(tokens, device=DEVICE) * 7

    def run(impl: str, x: Tensor, w: Tensor) -> list[Tensor]:
        return both_ways(lambda x, w: linear_cross_entropy(x, w, None, labels, impl=impl), x, w)

    run("triton", hidden, weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = run("triton", hidden, weight)
    assert torch.cuda.max_memory_allocated() - before < 50 * 2**20
    exact = run("reference", hidden.double(), weight.double())
    plain = run("reference", hidden, weight)
    for a, b, c in zip(ours, exact, plain, strict=True):
        error, allowed = (x.double().sub(b).square().mean().sqrt() for x in (a, c))
        assert error <= 2 * allowed + 1e-6 * b.abs().max()


def test_compiled_by_inductor() -> None:
    packing = Packing.from_lengths(LENGTHS, DEVICE).prepare()
    plan = CrossPlan.build(packing, [2, 0, 1, 0, 2, 1], 3).prepare()
    q = torch.randn(packing.total, 4, 64, device=DEVICE)
    k, v = torch.randn(2, 3, 4, 33, 64, device=DEVICE)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cross_attention(2 * q, k, v, plan) + 1

    eager = both_ways(run, q, k, v)
    compiled = both_ways(torch.compile(run, fullgraph=True), q, k, v)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

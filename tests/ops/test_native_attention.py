"""The C++ attention over packed texts, both directions, against the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blipfast.ops import _native
from blipfast.ops.attention import (
    CrossPlan,
    cross_attention,
    cross_attention_reference,
    cross_backends,
    varlen_attention,
    varlen_attention_reference,
    varlen_backends,
)
from blipfast.ops.packing import Packing

pytestmark = pytest.mark.skipif(
    not _native.avx512_bf16(), reason="needs the C++ operators and AVX-512 for bf16"
)
LOW = [torch.float32, torch.bfloat16]
LENGTHS = [[3], [1, 1], [5, 0, 7, 1], [40, 9, 14, 70, 11]]
# Texts' lengths, the image of each, and how many images there are.
LOOKS = {
    "one text": ([3], [0], 1),
    "one image for all": ([5, 2, 7, 1], [0, 0, 0, 0], 1),
    "shuffled, an image nobody looks at": ([5, 2, 70, 1], [2, 0, 2, 1], 4),
    "an empty text": ([4, 0, 6], [1, 1, 0], 2),
    "in order": ([2, 2, 3, 2], [0, 0, 1, 1], 2),
}
Run = Callable[..., Tensor]


def with_gradients(run: Run, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)]


def assert_no_worse(ours: Run, plain: Run, inputs: list[Tensor], weights: Tensor) -> None:
    """Our errors are at most twice those of the plain formula in the same dtype, plus rounding."""
    exact = with_gradients(plain, [x.double() for x in inputs], weights)
    rough = with_gradients(plain, inputs, weights)
    found = with_gradients(ours, inputs, weights)
    for i, (a, b, c) in enumerate(zip(found, rough, exact, strict=True)):
        assert (a.dtype, a.shape) == (inputs[0].dtype, c.shape)
        largest = c.abs().max() if c.numel() else 0.0
        bound = 2 * (b.double() - c).abs().max() + 8 * torch.finfo(a.dtype).eps * largest + 2e-6
        assert (a.double() - c).abs().max() <= bound, f"output or gradient {i}"


@pytest.mark.parametrize("head_dim", [32, 64, 96])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_self_attention(
    lengths: list[int], causal: bool, dtype: torch.dtype, head_dim: int
) -> None:
    torch.manual_seed(0)
    packing = Packing.from_lengths(lengths)
    qkv = torch.randn(packing.total, 3, 2, head_dim).to(dtype)
    weights = torch.randn(packing.total, 2, head_dim)
    assert_no_worse(
        lambda x: varlen_attention(x, packing, causal=causal, impl="native"),
        lambda x: varlen_attention_reference(x, packing, causal),
        [qkv],
        weights,
    )


@pytest.mark.parametrize("padded_keys", [False, True])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", LOOKS)
def test_cross_attention(case: str, dtype: torch.dtype, padded_keys: bool) -> None:
    torch.manual_seed(0)
    lengths, kv_index, num_kv = LOOKS[case]
    packing = Packing.from_lengths(lengths)
    kv_lengths = torch.arange(num_kv) % 5 + 30 if padded_keys else None
    plan = CrossPlan.build(packing, kv_index, num_kv, kv_lengths)
    # As the model lays them out: heads of a token side by side, K and V in one projection.
    q = torch.randn(packing.total, 2, 64).to(dtype)
    k, v = torch.randn(num_kv, 41, 2, 2, 64).to(dtype).permute(2, 0, 3, 1, 4)
    assert_no_worse(
        lambda *x: cross_attention(*x, plan, impl="native"),
        lambda *x: cross_attention_reference(*x, plan),
        [q, k, v],
        torch.randn(packing.total, 2, 64),
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", LOW)
def test_random_shapes(dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    num_kv, heads, head_dim, keys = number(1, 5), number(1, 4), 32 * number(1, 5), number(1, 130)
    packing = Packing.from_lengths([number(0, 25) for _ in range(number(1, 9))])
    index = [number(0, num_kv) for _ in packing.lengths]
    valid = torch.randint(1, keys + 1, (num_kv,), generator=draw)
    plan = CrossPlan.build(packing, index, num_kv, valid)
    q = torch.randn(packing.total, heads, 2 * head_dim).to(dtype)[..., ::2]
    k, v = torch.randn(2, num_kv, heads, keys, head_dim).to(dtype)
    assert_no_worse(
        lambda *x: cross_attention(*x, plan, impl="native"),
        lambda *x: cross_attention_reference(*x, plan),
        [q, k, v],
        torch.randn(packing.total, heads, head_dim),
    )


def test_they_are_taken_for_training() -> None:
    q = torch.randn(3, 2, 64, requires_grad=True)
    assert cross_backends.choose(q)[0] == "native"
    assert varlen_backends.choose(q.unsqueeze(1).expand(3, 3, 2, 64))[0] == "native"
    assert cross_backends.choose(torch.randn(3, 2, 8))[0] == "torch"


@pytest.mark.parametrize("dtype", LOW)
def test_both_directions_drop_the_same_weights(dtype: torch.dtype) -> None:
    """Values that are the unit matrix show the weights, and so what was dropped."""
    torch.manual_seed(0)
    packing = Packing.from_lengths([20, 9, 33])
    plan = CrossPlan.build(packing, [1, 0, 1], 2)
    q, k, v = (torch.randn(*shape).to(dtype) for shape in ((62, 3, 64), *[(2, 3, 64, 64)] * 2))
    unit = torch.eye(64, dtype=dtype).expand(2, 3, 64, 64)

    def run(*x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return cross_attention(*x, plan, dropout_p=0.25, impl="native")

    with torch.no_grad():
        kept = ((run(q, k, unit) != 0) / 0.75).double()  # (T, H, keys)
    assert abs(kept.mean().item() - 1) < 0.02
    images = plan.packing.sequence_ids.new_tensor(plan.kv_index)[packing.sequence_ids]

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("thd,thkd->thk", q, k[images]) / math.sqrt(64)
        return torch.einsum("thk,thkd->thd", scores.softmax(-1) * kept.to(q.dtype), v[images])

    assert_no_worse(run, formula, [q, k, v], torch.randn(62, 3, 64))


@pytest.mark.parametrize("dtype", LOW)
def test_threads_do_not_matter(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packing = Packing.from_lengths([20, 0, 9, 33, 1])
    qkv, weights = torch.randn(63, 3, 5, 32).to(dtype), torch.randn(63, 5, 32)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return varlen_attention(x, packing, causal=True, dropout_p=0.1, impl="native")

    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(with_gradients(run, [qkv], weights))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_texts_do_not_see_each_other() -> None:
    packing = Packing.from_lengths([4, 5, 3])
    qkv = torch.randn(12, 3, 2, 32)
    clean = varlen_attention(qkv, packing, impl="native")
    qkv[5] = math.nan
    out = varlen_attention(qkv, packing, impl="native")
    assert out[4:9].isnan().any()
    assert torch.equal(out[:4], clean[:4])
    assert torch.equal(out[9:], clean[9:])


def test_the_operator_checks_what_is_packed() -> None:
    """Whoever calls it directly reads nothing out of bounds."""
    q, k = torch.randn(1, 2, 6, 32), torch.randn(2, 2, 9, 32)
    starts, order = torch.tensor([0, 2, 6], dtype=torch.int32), torch.arange(6)
    attend = torch.ops.blipfast_native.attention_out
    attend(q, k, k, None, starts, order, False, 0.0, 0, torch.empty_like(q))
    bad = [
        (q, k, starts.long(), order),
        (q, k, starts[:2], order),  # does not reach the last token
        (q, k, torch.tensor([0, 7, 6], dtype=torch.int32), order),
        (q, k, torch.tensor([0, 1, 2, 6], dtype=torch.int32), order),  # of three images
        (q.transpose(0, 2), k, starts, order),
        (q, k, starts, order[:5]),
        (q, k, starts, order.int()),
        (q, k, starts, order + 1),
        (q, k, starts, order - 1),
        (k, k, None, order),
    ]
    for x, keys, cu_seqlens, places in bad:
        with pytest.raises(RuntimeError, match="attention: "):
            attend(x, keys, keys, None, cu_seqlens, places, False, 0.0, 0, torch.empty_like(x))
    lengths = torch.tensor([6])
    with pytest.raises(RuntimeError, match="packed like q"):
        attend(q, q, q, lengths, starts, None, False, 0.0, 0, torch.empty_like(q))

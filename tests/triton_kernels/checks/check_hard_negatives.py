"""The sampling kernel as they run: the very draws of the PyTorch backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from blipfast.kernels import hard_negatives as kernels
from place import IMPL
from torch import Tensor

from blipfast.ops.hard_negatives import hard_negative_weights, sample_hard_negatives, uniform


def features(rows: int, columns: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(rows, width), torch.randn(columns, width)
    return *(torch.nn.functional.normalize(x, dim=1) for x in (q, k)), torch.tensor(0.07)


def both(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    ours = sample_hard_negatives(*arguments, **options, impl=IMPL)
    return ours, sample_hard_negatives(*arguments, **options, impl="torch")


@triton.jit(do_not_specialize=["seed", "step", "stream", "first_row", "first_column"])
def _noise(out, seed, step, stream, first_row, first_column, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    g = kernels._gumbel(rows, columns, seed, step, stream, first_row, first_column)
    tl.store(out + rows[:, None] * N + columns[None, :], g)


@pytest.mark.parametrize(
    "counters",
    [(0, 0, 0, 0, 0), (7, 3, 1, 90, 90), (2**62 + 12345, 2**32 - 1, 2**31, 2**32 - 9, 2**32 - 18)],
)
def test_noise_is_that_of_the_reference(counters: tuple[int, ...]) -> None:
    """Equal to rounding of the logarithms, so equal words: a wrong word is off by about 1."""
    seed, step, stream, first_row, first_column = counters
    out = torch.empty(8, 16)
    _noise[(1,)](out, *counters, M=8, N=16)
    rows, columns = torch.arange(8) + first_row, torch.arange(16) + first_column
    u = uniform(rows, columns, seed=seed, step=step, stream=stream).double()
    torch.testing.assert_close(out.double(), -(-u.log()).log(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 5, 8), (19, 70, 33), (33, 130, 64)])
def test_draws(rows: int, columns: int, width: int, eps: float, dtype: torch.dtype) -> None:
    q, k, t = features(rows, columns, width)
    q, k = q.to(dtype), k.to(dtype)
    for step in range(2):
        for number in (step, torch.tensor(step)):  # known to the host, or to the device alone
            ours, plain = both(q, k, t, eps=eps, seed=3, step=number, stream=1, offset=2)
            assert ours.dtype == plain.dtype
            assert torch.equal(ours, plain)


def test_ids_exclude_and_several_are_drawn_without_repeats() -> None:
    q, k, t = features(20, 37, 16)
    query_ids, key_ids = torch.randint(6, (20,)), torch.randint(6, (37,), dtype=torch.int32)
    options = {"query_ids": query_ids, "key_ids": key_ids, "seed": 11, "first_row": 40}
    ours, plain = both(q, k, t, num=3, first_column=6, **options)
    assert torch.equal(ours, plain)
    assert (query_ids[:, None] != key_ids[ours]).all()
    assert all(len(set(row.tolist())) == 3 for row in ours)


def test_nothing_left_is_reported() -> None:
    q, k, t = features(3, 4, 8)
    same = torch.zeros(4, dtype=torch.int64)
    for options in (
        {"query_ids": same[:3], "key_ids": same},
        {"query_ids": torch.tensor([0, 1, 0]), "key_ids": same},
    ):
        ours, plain = both(q, k, t, eps=1e-4, **options)
        assert torch.equal(ours, plain)
        assert (ours == -1).sum() >= 2
    ours, plain = both(q[:1], k[:1], t)
    assert ours.tolist() == plain.tolist() == [-1]
    ours, plain = both(q, k[:2], t, num=4)
    assert torch.equal(ours, plain)
    assert (ours[:, 2:] == -1).all()
    assert both(q, k[:0], t)[0].tolist() == [-1] * 3
    assert both(q[:0], k, t)[0].shape == (0,)


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_a_bad_temperature_draws_nothing(value: float, eps: float) -> None:
    q, k, _ = features(5, 9, 8)
    ours, plain = both(q, k, torch.tensor(value), eps=eps)
    assert (ours == -1).all()
    assert (plain == -1).all()


def test_any_strides_and_mixed_dtypes() -> None:
    q, k, t = features(6, 11, 24)
    plain = sample_hard_negatives(q, k.half(), t, seed=5, impl="torch")
    wide = torch.full((6, 48), float("nan"))
    wide[:, ::2] = q
    ours = sample_hard_negatives(wide[:, ::2], k.half().T.contiguous().T, t, seed=5, impl=IMPL)
    assert torch.equal(ours, plain)


def test_frequencies_are_the_weights() -> None:
    """Chi-squared at one in ten thousand, over many steps of the noise; scores need no kernel."""
    q, k, t = features(64, 6, 8)
    q = q[:1].expand(64, 8).contiguous()
    drawn = torch.cat(
        [
            sample_hard_negatives(q, k, t, eps=1e-2, offset=6, step=step, impl=IMPL)
            for step in range(40)
        ]
    )
    weights = hard_negative_weights(q[:1], k, t, eps=1e-2, offset=6)[0].double()
    expected = weights / weights.sum() * len(drawn)
    seen = torch.bincount(drawn, minlength=6).double()
    assert ((seen - expected) ** 2 / expected).sum() < 25.7  # five degrees of freedom


def test_opcheck_and_compile() -> None:
    q, k, t = features(5, 9, 8)
    arguments = (q, k, t, None, None, 1e-4, 0, 1, 2, 3, 0, 0, 2)
    torch.library.opcheck(torch.ops.blipfast.triton_sample_hard_negatives, arguments)
    compiled = torch.compile(sample_hard_negatives, fullgraph=True, backend="aot_eager")
    ours = compiled(q, k, t, num=2, seed=9, impl=IMPL)
    assert torch.equal(ours, sample_hard_negatives(q, k, t, num=2, seed=9, impl="torch"))

"""Hard-negative sampling in one launch, without a matrix of probabilities.

    argmax_j  log(softmax_j(q_i . k_j / T) + eps) - log(-log(u_ij))

A program holds a tile of rows and goes over the columns twice: for the log-sum-exp, then for the
best perturbed score. The similarities are computed again rather than kept. `u_ij` is Philox4x32-10
of (seed, step, stream, global row, global column), as `blipfast.ops.hard_negatives` states it, so
that the draw does not depend on the tiles or on the device.

Shapes: `B` queries, `M` keys, `D` width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from blipfast.kernels._runtime import dot_precision, launch, short
from blipfast.kernels.tiles import choose
from torch import Tensor

_COUNTERS = ["offset", "seed", "step", "stream", "first_row", "first_column"]


@triton.jit
def _similarities(
    query,
    keys,
    rows,
    columns,
    strides,
    sizes,
    temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`q . k / T` of a tile; -inf in columns that do not exist."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    q_rows = query + rows.to(tl.int64)[:, None] * strides[0]
    k_rows = keys + columns.to(tl.int64)[:, None] * strides[2]
    for start in range(0, sizes[2], BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q_mask = (rows < sizes[0])[:, None] & (d < sizes[2])[None, :]
        k_mask = (columns < sizes[1])[:, None] & (d < sizes[2])[None, :]
        q_tile = tl.load(q_rows + d[None, :] * strides[1], mask=q_mask, other=0.0)
        k_tile = tl.load(k_rows + d[None, :] * strides[3], mask=k_mask, other=0.0)
        acc = tl.dot(q_tile, tl.trans(k_tile), acc, input_precision=PRECISION)
    return tl.where((columns < sizes[1])[None, :], acc / temperature, float("-inf"))


@triton.jit
def _gumbel(rows, columns, seed, step, stream, first_row, first_column):
    """`-log(-log(u))` of each pair, u strictly between 0 and 1."""
    column = first_column.to(tl.int64) + columns.to(tl.int64)
    zero = tl.zeros_like(rows)[:, None] + tl.zeros_like(columns)[None, :]
    group = (zero + (column >> 2)[None, :]).to(tl.uint32)
    row = (zero + (first_row.to(tl.int64) + rows.to(tl.int64))[:, None]).to(tl.uint32)
    zero = zero.to(tl.int64)
    w0, w1, w2, w3 = tl.philox(
        seed.to(tl.int64), group, row, (zero + step).to(tl.uint32), (zero + stream).to(tl.uint32)
    )
    lane = (zero + (column & 3)[None, :]).to(tl.int32)
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    u = ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    # Near 1 the series is exact where a fast logarithm may return 0.
    t = 1.0 - u
    exponential = tl.where(t < 0.01, t * (1.0 + t * (0.5 + t * (1.0 / 3 + t * 0.25))), -tl.log(u))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=_COUNTERS)
def sample(
    query,
    keys,
    temperature,
    query_ids,
    key_ids,
    counter,
    drawn,
    strides,
    sizes,
    eps,
    offset,
    seed,
    step,
    stream,
    first_row,
    first_column,
    num,
    HAS_IDS: tl.constexpr,
    HAS_EPS: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`num` different columns for each of BLOCK_M rows, best first; -1 where none is left."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.load(temperature).to(tl.float32)
    number = tl.load(counter) if HAS_COUNTER else step
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, sizes[1], BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        s = _similarities(
            query, keys, rows, columns, strides, sizes, t, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
        )
        new_peak = tl.maximum(peak, tl.max(s, 1))
        total = total * tl.exp(peak - new_peak) + tl.sum(tl.exp(s - new_peak[:, None]), 1)
        peak = new_peak
    lse = peak + tl.log(total)

    last = tl.full([BLOCK_M], float("inf"), tl.float32)
    last_column = tl.full([BLOCK_M], -1, tl.int32)
    for n in range(0, num):
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        best_column = tl.full([BLOCK_M], -1, tl.int32)
        for start in range(0, sizes[1], BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            s = _similarities(
                query, keys, rows, columns, strides, sizes, t, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
            )
            s -= lse[:, None]
            if HAS_EPS:
                s = tl.log(tl.exp(s) + eps)
            s += _gumbel(rows, columns, seed, number, stream, first_row, first_column)
            allowed = (columns < sizes[1])[None, :] & (s > float("-inf"))
            if HAS_IDS:
                own = tl.load(query_ids + rows, mask=rows < sizes[0], other=0)
                theirs = tl.load(key_ids + columns, mask=columns < sizes[1], other=0)
                allowed = allowed & (own[:, None] != theirs[None, :])
            else:
                own = rows.to(tl.int64) + offset
                allowed = allowed & (own[:, None] != columns.to(tl.int64)[None, :])
            # Equal scores go by column, the lower one first.
            later = (s == last[:, None]) & (columns[None, :] > last_column[:, None])
            s = tl.where(allowed & ((s < last[:, None]) | later), s, float("-inf"))
            top = tl.max(s, 1)
            first = tl.min(tl.where(s == top[:, None], columns[None, :], 2147483647), 1)
            better = top > best
            best = tl.where(better, top, best)
            best_column = tl.where(better, first, best_column)
        tl.store(
            drawn + rows.to(tl.int64) * num + n, best_column.to(tl.int64), mask=rows < sizes[0]
        )
        last, last_column = best, best_column


def run_sample(
    query: Tensor,
    keys: Tensor,
    temperature: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    eps: float,
    offset: int,
    seed: int,
    step: int,
    stream: int,
    first_row: int,
    first_column: int,
    num: int,
    counter: Tensor | None = None,
) -> Tensor:
    """Arguments as `sample_hard_negatives`; int64 `(B, num)`, -1 where nothing is left to draw.

    counter: an int64 on the device in place of `step`.

    query `(B, D)` and keys `(M, D)`: float32, bfloat16 or float16; float32 when they differ.
    """
    if query.dtype != keys.dtype:
        query, keys = query.float(), keys.float()
    if query_ids is not None and key_ids is not None:
        query_ids, key_ids = query_ids.contiguous(), key_ids.contiguous()
    drawn = torch.empty((query.shape[0], num), dtype=torch.int64, device=query.device)
    sizes = (query.shape[0], keys.shape[0], query.shape[1])
    args: list[Any] = [query, keys, temperature, query_ids, key_ids, counter, drawn]
    args += [(*query.stride(), *keys.stride()), sizes, float(eps)]
    args += [offset, seed, step, stream, first_row, first_column, num]
    chosen = _configuration(query)
    launch(
        sample,
        (-(-query.shape[0] // 16),),
        args,
        HAS_IDS=query_ids is not None,
        HAS_EPS=eps > 0,
        HAS_COUNTER=counter is not None,
        BLOCK_M=16,
        BLOCK_D=64,
        PRECISION=dot_precision(query),
        **chosen,
    )
    return drawn


def _configuration(query: Tensor) -> dict[str, int]:
    """Columns of a tile, warps and stages."""
    if query.dtype == torch.float32:
        return {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    chosen = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    candidates = [chosen, chosen | {"num_stages": 3}, chosen | {"BLOCK_N": 32}]
    return choose("hard_negatives", short(query.dtype), candidates, query)


sample_op = torch.library.custom_op(
    "blipfast::triton_sample_hard_negatives",
    run_sample,
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor temperature, Tensor? query_ids, Tensor? key_ids,"
    " float eps, int offset, int seed, int step, int stream, int first_row, int first_column,"
    " int num, Tensor? counter=None) -> Tensor",
)


@sample_op.register_fake
def _(query, keys, temperature, query_ids, key_ids, *options):  # type: ignore[no-untyped-def]
    return query.new_empty((query.shape[0], options[7]), dtype=torch.int64)

"""Triton kernels of `contrastive`; formulas and shapes as in its launchers.

Logarithms and exponentials are to base 2 inside.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(base, index, size, stride, stride_d, width, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :] * stride_d
    mask = (index < size)[:, None] & (d < width)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _scores(
    a_base,
    a,
    a_size,
    a_stride,
    a_stride_d,
    b_base,
    b,
    b_size,
    b_stride,
    b_stride_d,
    width,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Inner products `(BLOCK_A, BLOCK_B)`, some columns at a time, which holds fewer registers."""
    acc = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for start in range(0, width, BLOCK_D):
        left = width - start
        x = _tile(a_base + start * a_stride_d, a, a_size, a_stride, a_stride_d, left, BLOCK_D)
        y = _tile(b_base + start * b_stride_d, b, b_size, b_stride, b_stride_d, left, BLOCK_D)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
    return acc


@triton.jit
def partial_means(
    rows,
    keys,
    temperature,
    stats,
    partial,
    strides,
    sizes,
    span,
    row_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Peak, sum of weights and weighted sum of keys, over `span` keys."""
    split = tl.program_id(0) // row_tiles
    r = (tl.program_id(0) % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    num_rows, num_keys, width = sizes[0], sizes[1], sizes[2]
    scale = _LOG2_E / tl.load(temperature).to(tl.float32)
    x = _tile(rows, r, num_rows, strides[0], strides[1], width, BLOCK_D)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = split * span
    for start in range(first, tl.minimum(first + span, num_keys), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _tile(keys, n, num_keys, strides[2], strides[3], width, BLOCK_D)
        if BLOCK_S == BLOCK_D:
            s = tl.dot(x, tl.trans(k), input_precision=PRECISION) * scale
        else:
            s = scale * _scores(
                rows, r, num_rows, strides[0], strides[1],
                keys, n, num_keys, strides[2], strides[3],
                width, BLOCK_M, BLOCK_N, BLOCK_S, PRECISION,
            )  # fmt: skip
        s = tl.where((n < num_keys)[None, :], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        low = p.to(k.dtype)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(low, k, acc * fade[:, None], input_precision=PRECISION)
        if k.dtype != tl.float32:
            # What rounding took from the weights: the temperature's gradient is a difference.
            acc = tl.dot((p - low.to(tl.float32)).to(k.dtype), k, acc, input_precision=PRECISION)
        peak = new_peak
    place = stats + split.to(tl.int64) * num_rows + r
    tl.store(place, peak, mask=r < num_rows)
    tl.store(place + strides[4], total, mask=r < num_rows)
    d = tl.arange(0, BLOCK_D)
    out = partial + (split.to(tl.int64) * num_rows + r)[:, None] * width + d[None, :]
    tl.store(out, acc, mask=(r < num_rows)[:, None] & (d < width)[None, :])


@triton.jit
def merge(stats, partial, lse, mean, sizes, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row, some columns: the partial results of all splits made one."""
    num_rows, splits, width, stat = sizes[0], sizes[1], sizes[2], sizes[3]
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    p = tl.arange(0, BLOCK_P)
    there = p < splits
    place = stats + p.to(tl.int64) * num_rows + r
    peaks = tl.load(place, mask=there, other=float("-inf"))
    totals = tl.load(place + stat, mask=there, other=0.0)
    peak = tl.max(peaks, 0)
    factors = tl.exp2(peaks - peak)
    total = tl.sum(factors * totals, 0)
    pointers = partial + (p.to(tl.int64)[:, None] * num_rows + r) * width + d[None, :]
    parts = tl.load(pointers, mask=there[:, None] & (d < width)[None, :], other=0.0)
    value = tl.sum(parts * (factors / total)[:, None], 0)
    tl.store(mean + r * width + d, value, mask=d < width)
    if tl.program_id(1) == 0:
        tl.store(lse + r, (peak + tl.log2(total)) * _LN_2)


@triton.jit
def losses(
    query,
    temperature,
    lse,
    mean,
    own,
    mass,
    alpha,
    loss,
    student,
    target,
    strides,
    sizes,
    HAS_MASS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row: its loss, and the mean keys under p and under the targets, which make gradients."""
    num_rows, width = sizes[0], sizes[1]
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    there = d < width
    x = tl.load(query + i * strides[0] + d * strides[1], mask=there, other=0.0).to(tl.float32)
    goal = tl.load(own + i * strides[2] + d * strides[3], mask=there, other=0.0).to(tl.float32)
    part = 1.0
    if HAS_MASS:
        part = tl.load(mass + i).to(tl.float32)
    if HAS_TEACHER:
        a = tl.load(alpha).to(tl.float32)
        soft = tl.load(mean + (num_rows + i) * width + d, mask=there, other=0.0)
        goal = a * soft + (1.0 - a) * goal
        part = a + (1.0 - a) * part
    met = tl.load(mean + i * width + d, mask=there, other=0.0)
    tl.store(student + i * width + d, met * part, mask=there)
    tl.store(target + i * width + d, goal, mask=there)
    # A row whose id is nowhere among the keys has targets that sum to less than 1.
    met = tl.sum(x * goal, 0) / tl.load(temperature).to(tl.float32)
    tl.store(loss + i, tl.load(lse + i) * part - met)


@triton.jit
def gradients_of_queries(
    grad,
    query,
    temperature,
    student,
    target,
    d_query,
    d_temperature,
    strides,
    width,
    BLOCK_D: tl.constexpr,
):
    """One row: the gradient of its query, and its part of the temperature's."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    there = d < width
    t = tl.load(temperature).to(tl.float32)
    x = tl.load(query + i * strides[1] + d * strides[2], mask=there, other=0.0).to(tl.float32)
    apart = tl.load(student + i * width + d, mask=there, other=0.0)
    apart -= tl.load(target + i * width + d, mask=there, other=0.0)
    value = apart * tl.load(grad + i * strides[0]) / t
    tl.store(d_query + i * width + d, value.to(d_query.dtype.element_ty), mask=there)
    tl.store(d_temperature + i, -tl.sum(x * value, 0) / t)


@triton.jit
def gradients_of_keys(
    rows,
    keys,
    temperature,
    lse,
    student,
    soft,
    hard,
    query_ids,
    key_ids,
    d_keys,
    strides,
    sizes,
    offset,
    HAS_TEACHER: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a tile of keys: one sum over all queries."""
    num_rows, num_keys, width = sizes[0], sizes[1], sizes[2]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _tile(keys, n, num_keys, strides[2], strides[3], width, BLOCK_D)
    t = tl.load(temperature).to(tl.float32)
    scale = _LOG2_E / t
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, num_rows, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        there = i < num_rows
        q = _tile(rows, i, num_rows, strides[0], strides[1], width, BLOCK_D)
        logs = tl.load(lse + i, mask=there, other=0.0) * _LOG2_E
        a = tl.load(student + i, mask=there, other=0.0)
        # (keys, rows)
        if BLOCK_S == BLOCK_D:
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        else:
            s = scale * _scores(
                keys, n, num_keys, strides[2], strides[3],
                rows, i, num_rows, strides[0], strides[1],
                width, BLOCK_N, BLOCK_M, BLOCK_S, PRECISION,
            )  # fmt: skip
        w = tl.exp2(s - logs[None, :]) * a[None, :]
        if HAS_TEACHER:
            r = tl.where(there, i + num_rows, 2 * num_rows)
            logs = tl.load(lse + r, mask=there, other=0.0) * _LOG2_E
            b = tl.load(soft + i, mask=there, other=0.0)
            if BLOCK_S == BLOCK_D:
                x = _tile(rows, r, 2 * num_rows, strides[0], strides[1], width, BLOCK_D)
                s = tl.dot(k, tl.trans(x), input_precision=PRECISION) * scale
            else:
                s = scale * _scores(
                    keys, n, num_keys, strides[2], strides[3],
                    rows, r, 2 * num_rows, strides[0], strides[1],
                    width, BLOCK_N, BLOCK_M, BLOCK_S, PRECISION,
                )  # fmt: skip
            w -= tl.exp2(s - logs[None, :]) * b[None, :]
        c = tl.load(hard + i, mask=there, other=0.0)
        if HAS_IDS:
            own = tl.load(query_ids + i, mask=there, other=0)
            theirs = tl.load(key_ids + n, mask=n < num_keys, other=0)
            positive = theirs[:, None] == own[None, :]
        else:
            positive = n.to(tl.int64)[:, None] == (i.to(tl.int64) + offset)[None, :]
        w -= tl.where(positive, c[None, :], 0.0)
        acc = tl.dot(w.to(q.dtype), q, acc, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    out = d_keys + n.to(tl.int64)[:, None] * strides[4] + d[None, :] * strides[5]
    mask = (n < num_keys)[:, None] & (d < width)[None, :]
    tl.store(out, (acc / t).to(d_keys.dtype.element_ty), mask=mask)

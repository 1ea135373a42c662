"""Triton kernels of `cross_attention` and `varlen_attention`; shapes and layout as there.

Tensors come with four strides, `(set, head, row, column)`; rows of queries have no set (stride 0).
PACKED: neither have keys and values, which lie as the rows do, a set's own rows being its keys.
CAUSAL: of these a row sees those up to its own.
Scores are kept in powers of two (`exp2`), and transposed, `(keys, rows)`, in the backward kernels,
so that three of their five products take their operands as they come.
"""

from __future__ import annotations

import triton
import triton.language as tl
from blipfast.kernels._attention_tiles import (
    keys_of,
    load_rows,
    place_of,
    raise_weights,
    rows_of,
    store_rows,
)


@triton.jit
def forward(
    q,
    k,
    v,
    out,
    lse,
    cu_rows,
    order,
    kv_lengths,
    seed,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    sizes,
    scales,
    tiles,
    table,
    BY_TABLE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log2-sum-exp of a tile of rows; `tiles` programs for each set, or a table's."""
    b, tile = place_of(table, tiles, BY_TABLE)
    h = tl.program_id(1)
    num_rows, head_dim = sizes[1], sizes[2]
    grouped, packed, rows = rows_of(cu_rows, order, b, tile, HAS_ORDER, BLOCK_M)
    first, valid_keys, _num = keys_of(kv_lengths, cu_rows, b, sizes[0], HAS_LENGTHS, PACKED)
    columns = tl.arange(0, BLOCK_D)
    if tl.load(cu_rows + b) + tile * BLOCK_M >= tl.load(cu_rows + b + 1):
        return
    places = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    stop = tl.minimum(valid_keys, (tile + 1) * BLOCK_M) if CAUSAL else valid_keys
    queries = load_rows(q, q_strides, 0, h, packed, rows, columns, head_dim, EVEN_D)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < valid_keys
        k_tile = load_rows(k, k_strides, b, h, first + n, there, columns, head_dim, EVEN_D)
        s = tl.dot(queries, tl.trans(k_tile), input_precision=PRECISION) * scales[1]
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= places[:, None])
        s = tl.where(seen, s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - new_peak[:, None])
        fade = tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(p, 1)
        first_row = tile * BLOCK_M
        p *= raise_weights(
            seed, start, first_row, b, h, scales[2], False, DROPOUT, BLOCK_M, BLOCK_N
        )
        v_tile = load_rows(v, v_strides, b, h, first + n, there, columns, head_dim, EVEN_D)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        peak = new_peak
    total = tl.where(valid_keys > 0, total, 1.0)
    acc = acc / total[:, None]
    store_rows(out, out_strides, 0, h, packed, rows, columns, head_dim, acc)
    tl.store(lse + h.to(tl.int64) * num_rows + grouped, peak + tl.log2(total), mask=rows)


@triton.jit
def _score_gradients(
    k_tile,
    v_tile,
    queries,
    grads,
    lse,
    delta,
    pairs,
    raised,
    scales,
    PRECISION: tl.constexpr,
):
    """`(keys, rows)`: the weights that met V, and the gradient of the scores."""
    s = tl.dot(k_tile, tl.trans(queries), input_precision=PRECISION) * scales[1]
    p = tl.where(pairs, tl.exp2(tl.where(pairs, s - lse[None, :], 0.0)), 0.0)
    dp = tl.dot(v_tile, tl.trans(grads), input_precision=PRECISION)
    ds = p * (dp * raised - delta[None, :]) * scales[0]
    return (p * raised).to(grads.dtype), ds.to(queries.dtype)


@triton.jit
def backward(
    grad,
    q,
    k,
    v,
    out,
    lse,
    dq,
    dk,
    dv,
    cu_rows,
    order,
    kv_lengths,
    seed,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dq_strides,
    dk_strides,
    dv_strides,
    sizes,
    scales,
    HAS_ORDER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one set and head, whose rows fit one tile: everything is read once."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_rows, head_dim = sizes[1], sizes[2]
    grouped, packed, rows = rows_of(cu_rows, order, b, 0, HAS_ORDER, BLOCK_M)
    first, valid_keys, num_keys = keys_of(kv_lengths, cu_rows, b, sizes[0], HAS_LENGTHS, PACKED)
    valid_keys = tl.where(tl.load(cu_rows + b) < tl.load(cu_rows + b + 1), valid_keys, 0)
    columns = tl.arange(0, BLOCK_D)
    queries = load_rows(q, q_strides, 0, h, packed, rows, columns, head_dim, EVEN_D)
    grads = load_rows(grad, grad_strides, 0, h, packed, rows, columns, head_dim, EVEN_D)
    outs = load_rows(out, out_strides, 0, h, packed, rows, columns, head_dim, EVEN_D)
    delta = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
    lses = tl.load(lse + h.to(tl.int64) * num_rows + grouped, mask=rows, other=0.0)
    places = tl.arange(0, BLOCK_M)

    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, valid_keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < valid_keys
        k_tile = load_rows(k, k_strides, b, h, first + n, there, columns, head_dim, EVEN_D)
        v_tile = load_rows(v, v_strides, b, h, first + n, there, columns, head_dim, EVEN_D)
        pairs = there[:, None] & rows[None, :]
        if CAUSAL:
            pairs = pairs & (n[:, None] <= places[None, :])
        raised = raise_weights(seed, start, 0, b, h, scales[2], True, DROPOUT, BLOCK_M, BLOCK_N)
        weights, ds = _score_gradients(
            k_tile, v_tile, queries, grads, lses, delta, pairs, raised, scales, PRECISION
        )
        dv_tile = tl.dot(weights, grads, input_precision=PRECISION)
        store_rows(dv, dv_strides, b, h, first + n, n < num_keys, columns, head_dim, dv_tile)
        dk_tile = tl.dot(ds, queries, input_precision=PRECISION)
        store_rows(dk, dk_strides, b, h, first + n, n < num_keys, columns, head_dim, dk_tile)
        dq_acc = tl.dot(tl.trans(ds), k_tile, dq_acc, input_precision=PRECISION)
    store_rows(dq, dq_strides, 0, h, packed, rows, columns, head_dim, dq_acc)
    nothing = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(tl.cdiv(valid_keys, BLOCK_N) * BLOCK_N, num_keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        store_rows(dk, dk_strides, b, h, n, n < num_keys, columns, head_dim, nothing)
        store_rows(dv, dv_strides, b, h, n, n < num_keys, columns, head_dim, nothing)


@triton.jit
def backward_queries(
    grad,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dq,
    cu_rows,
    order,
    kv_lengths,
    seed,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dq_strides,
    sizes,
    scales,
    tiles,
    table,
    BY_TABLE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of a tile of rows, and their `delta = sum(out * grad)` for `backward_keys`."""
    b, tile = place_of(table, tiles, BY_TABLE)
    h = tl.program_id(1)
    num_rows, head_dim = sizes[1], sizes[2]
    grouped, packed, rows = rows_of(cu_rows, order, b, tile, HAS_ORDER, BLOCK_M)
    if tl.load(cu_rows + b) + tile * BLOCK_M >= tl.load(cu_rows + b + 1):
        return
    first, valid_keys, _num = keys_of(kv_lengths, cu_rows, b, sizes[0], HAS_LENGTHS, PACKED)
    places = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    stop = tl.minimum(valid_keys, (tile + 1) * BLOCK_M) if CAUSAL else valid_keys
    columns = tl.arange(0, BLOCK_D)
    queries = load_rows(q, q_strides, 0, h, packed, rows, columns, head_dim, EVEN_D)
    grads = load_rows(grad, grad_strides, 0, h, packed, rows, columns, head_dim, EVEN_D)
    outs = load_rows(out, out_strides, 0, h, packed, rows, columns, head_dim, EVEN_D)
    deltas = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
    place = h.to(tl.int64) * num_rows + grouped
    tl.store(delta + place, deltas, mask=rows)
    lses = tl.load(lse + place, mask=rows, other=0.0)

    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < valid_keys
        k_tile = load_rows(k, k_strides, b, h, first + n, there, columns, head_dim, EVEN_D)
        v_tile = load_rows(v, v_strides, b, h, first + n, there, columns, head_dim, EVEN_D)
        pairs = there[:, None] & rows[None, :]
        if CAUSAL:
            pairs = pairs & (n[:, None] <= places[None, :])
        first_row = tile * BLOCK_M
        raised = raise_weights(
            seed, start, first_row, b, h, scales[2], True, DROPOUT, BLOCK_M, BLOCK_N
        )
        _, ds = _score_gradients(
            k_tile, v_tile, queries, grads, lses, deltas, pairs, raised, scales, PRECISION
        )
        dq_acc = tl.dot(tl.trans(ds), k_tile, dq_acc, input_precision=PRECISION)
    store_rows(dq, dq_strides, 0, h, packed, rows, columns, head_dim, dq_acc)


@triton.jit
def backward_keys(
    grad,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    cu_rows,
    order,
    kv_lengths,
    seed,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    dk_strides,
    dv_strides,
    sizes,
    scales,
    HAS_ORDER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of a tile of keys: one sum over all the rows of its set."""
    num_rows, head_dim = sizes[1], sizes[2]
    key_tiles = tl.cdiv(sizes[0], BLOCK_N)
    b, h = (tl.program_id(0) // key_tiles).to(tl.int64), tl.program_id(1)
    start = (tl.program_id(0) % key_tiles) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    first, valid_keys, num_keys = keys_of(kv_lengths, cu_rows, b, sizes[0], HAS_LENGTHS, PACKED)
    there = n < valid_keys
    columns = tl.arange(0, BLOCK_D)
    k_tile = load_rows(k, k_strides, b, h, first + n, there, columns, head_dim, EVEN_D)
    v_tile = load_rows(v, v_strides, b, h, first + n, there, columns, head_dim, EVEN_D)
    num_tiles = tl.cdiv(tl.load(cu_rows + b + 1) - tl.load(cu_rows + b), BLOCK_M)
    num_tiles = tl.where(start < valid_keys, num_tiles, 0)
    lse += h.to(tl.int64) * num_rows
    delta += h.to(tl.int64) * num_rows

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    passed = start // BLOCK_M if CAUSAL else 0  # tiles whose rows see none of these keys
    for step in range(0, num_tiles - passed):
        tile = passed + step
        grouped, packed, rows = rows_of(cu_rows, order, b, tile, HAS_ORDER, BLOCK_M)
        queries = load_rows(q, q_strides, 0, h, packed, rows, columns, head_dim, EVEN_D)
        grads = load_rows(grad, grad_strides, 0, h, packed, rows, columns, head_dim, EVEN_D)
        lses = tl.load(lse + grouped, mask=rows, other=0.0)
        deltas = tl.load(delta + grouped, mask=rows, other=0.0)
        pairs = there[:, None] & rows[None, :]
        if CAUSAL:
            places = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            pairs = pairs & (n[:, None] <= places[None, :])
        first_row = tile * BLOCK_M
        raised = raise_weights(
            seed, start, first_row, b, h, scales[2], True, DROPOUT, BLOCK_M, BLOCK_N
        )
        weights, ds = _score_gradients(
            k_tile, v_tile, queries, grads, lses, deltas, pairs, raised, scales, PRECISION
        )
        dv_acc = tl.dot(weights, grads, dv_acc, input_precision=PRECISION)
        dk_acc = tl.dot(ds, queries, dk_acc, input_precision=PRECISION)
    store_rows(dk, dk_strides, b, h, first + n, n < num_keys, columns, head_dim, dk_acc)
    store_rows(dv, dv_strides, b, h, first + n, n < num_keys, columns, head_dim, dv_acc)

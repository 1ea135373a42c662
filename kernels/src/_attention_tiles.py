"""What the attention kernels share: the tiles they take, read and write, and the draws of dropout.

Shapes, letters and strides as in `_attention_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(table, tiles, BY_TABLE: tl.constexpr):
    """The set and the tile of rows that are this program's: by number, or from a list of them."""
    number = tl.program_id(0)
    if BY_TABLE:
        return tl.load(table + 2 * number).to(tl.int64), tl.load(table + 2 * number + 1)
    else:
        return (number // tiles).to(tl.int64), number % tiles


@triton.jit
def rows_of(cu_rows, order, b, tile, HAS_ORDER: tl.constexpr, BLOCK_M: tl.constexpr):
    """Grouped and packed numbers of a tile's rows, and which of them exist."""
    grouped = tl.load(cu_rows + b) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = grouped < tl.load(cu_rows + b + 1)
    if HAS_ORDER:
        packed = tl.load(order + grouped, mask=valid, other=0).to(tl.int64)
    else:
        packed = grouped.to(tl.int64)
    return grouped, packed, valid


@triton.jit
def keys_of(kv_lengths, cu_rows, b, num_keys, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr):
    """Where a set's keys start, how many are valid, how many there are."""
    if PACKED:
        first = tl.load(cu_rows + b)
        count = tl.load(cu_rows + b + 1) - first
        return first.to(tl.int64), count, count
    elif HAS_LENGTHS:
        valid = tl.maximum(tl.minimum(tl.load(kv_lengths + b).to(tl.int32), num_keys), 0)
        return 0, valid, num_keys
    else:
        return 0, num_keys, num_keys


@triton.jit
def load_rows(base, strides, b, h, index, valid, columns, head_dim, EVEN_D: tl.constexpr):
    """Rows `index` of one set and head, `(len(index), BLOCK_D)`, zero where there is nothing."""
    base += b * strides[0] + h * strides[1]
    pointers = base + index[:, None] * strides[2] + columns[None, :] * strides[3]
    if EVEN_D:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        mask = valid[:, None] & (columns[None, :] < head_dim)
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(base, strides, b, h, index, valid, columns, head_dim, value):
    base += b * strides[0] + h * strides[1]
    pointers = base + index[:, None] * strides[2] + columns[None, :] * strides[3]
    mask = valid[:, None] & (columns[None, :] < head_dim)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def raise_weights(
    seed,
    start,
    first_row,
    b,
    h,
    dropout_p,
    TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Factors of the attention weights, `(rows, keys)` or transposed: 0 where dropped.

    start, first_row: of set b, where the tile's keys and rows begin. One draw serves four weights,
    of two keys and two rows that are eight apart: as products of matrices lie in registers, either
    way, one thread holds all four, and the compiler makes one draw of theirs.
    """
    if DROPOUT:
        keys, rows = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
        if TRANSPOSED:
            n, m = keys[:, None], rows[None, :]
        else:
            n, m = keys[None, :], rows[:, None]
        zero = tl.zeros_like(n) + tl.zeros_like(m)
        key, row = start + (n & -9) + zero, first_row + (m & -9) + zero
        w0, w1, w2, w3 = tl.philox(
            tl.load(seed), key, row, h + zero, b.to(tl.int32) + zero, n_rounds=7
        )
        low, high = tl.where((n & 8) == 0, w0, w1), tl.where((n & 8) == 0, w2, w3)
        word = tl.where((m & 8) == 0, low, high)
        dropped = tl.full([1, 1], dropout_p * 4294967296.0, tl.float32).to(tl.uint32)
        return tl.where(word >= dropped, 1.0 / (1.0 - dropout_p), 0.0)
    else:
        return 1.0

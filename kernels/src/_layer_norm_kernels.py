"""The kernels of `add_layer_norm`, whose formulas and letters are there."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def raise_elements(seed, rows, columns, dropout_p):
    """Factors of a branch's elements, 0 where dropped: one draw serves four neighbours in a row."""
    zero = tl.zeros_like(rows) + tl.zeros_like(columns)
    row, column, none = rows + zero, (columns & -4) + zero, zero
    w0, w1, w2, w3 = tl.philox(tl.load(seed), column, row, none, none, n_rounds=7)
    low, high = tl.where((columns & 1) == 0, w0, w1), tl.where((columns & 1) == 0, w2, w3)
    word = tl.where((columns & 2) == 0, low, high)
    dropped = tl.full([1, 1], dropout_p * 4294967296.0, tl.float32).to(tl.uint32)
    return tl.where(word >= dropped, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def normalize(
    residual,
    branch,
    weight,
    bias,
    seed,
    summed,
    normed,
    moments,
    strides,
    num_rows,
    width,
    eps,
    dropout_p,
    HAS_BRANCH: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, columns = row[:, None], tl.arange(0, BLOCK_D)[None, :]
    there = (rows < num_rows) & (columns < width)
    places = rows.to(tl.int64) * width + columns
    at = residual + rows.to(tl.int64) * strides[0] + columns
    h = tl.load(at, mask=there, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        at = branch + rows.to(tl.int64) * strides[1] + columns
        added = tl.load(at, mask=there, other=0.0).to(tl.float32)
        if DROPOUT:
            added *= raise_elements(seed, rows, columns, dropout_p)
        rounded = (h + added).to(summed.dtype.element_ty)
        tl.store(summed + places, rounded, mask=there)
        h = rounded.to(tl.float32)
    mean = tl.sum(h, 1) / width
    centred = tl.where(columns < width, h - mean[:, None], 0.0)
    inverse_std = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    scale = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    offset = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    y = centred * inverse_std[:, None] * scale + offset
    tl.store(normed + places, y.to(normed.dtype.element_ty), mask=there)
    tl.store(moments + row, mean, mask=row < num_rows)
    tl.store(moments + num_rows + row, inverse_std, mask=row < num_rows)


@triton.jit
def normalize_backward(
    grad_normed,
    grad_summed,
    summed,
    weight,
    seed,
    moments,
    grad_residual,
    grad_branch,
    partial,
    strides,
    num_rows,
    width,
    dropout_p,
    HAS_GRAD_SUMMED: tl.constexpr,
    HAS_GRAD_BRANCH: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partial: `(2, programs, D)`, each program's share of the weight's and the bias's gradient."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_D)[None, :]
    inside = columns < width
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    d_scale = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    d_offset = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(program * BLOCK_R, num_rows, programs * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        rows = row[:, None]
        there = (rows < num_rows) & inside
        places = rows.to(tl.int64) * width + columns
        at = summed + rows.to(tl.int64) * strides[2] + columns
        h = tl.load(at, mask=there, other=0.0).to(tl.float32)
        at = grad_normed + rows.to(tl.int64) * strides[0] + columns
        dy = tl.load(at, mask=there, other=0.0).to(tl.float32)
        mean = tl.load(moments + row, mask=row < num_rows, other=0.0)
        inverse_std = tl.load(moments + num_rows + row, mask=row < num_rows, other=0.0)[:, None]
        x = tl.where(there, (h - mean[:, None]) * inverse_std, 0.0)
        d_scale += dy * x
        d_offset += dy
        g = dy * scale
        along = tl.sum(g * x, 1)[:, None] / width
        dh = inverse_std * (g - tl.sum(g, 1)[:, None] / width - x * along)
        if HAS_GRAD_SUMMED:
            at = grad_summed + rows.to(tl.int64) * strides[1] + columns
            dh += tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_residual + places, dh.to(grad_residual.dtype.element_ty), mask=there)
        if HAS_GRAD_BRANCH:
            if DROPOUT:
                dh *= raise_elements(seed, rows, columns, dropout_p)
            tl.store(grad_branch + places, dh.to(grad_branch.dtype.element_ty), mask=there)
    share = partial + program * width + columns
    tl.store(share, tl.sum(d_scale, 0)[None, :], mask=inside)
    tl.store(share + programs * width, tl.sum(d_offset, 0)[None, :], mask=inside)

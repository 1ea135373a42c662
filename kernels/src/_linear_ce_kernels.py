"""The kernels of `linear_cross_entropy`, whose formulas and letters are there.

A program holds a row of a piece's logits `(T, P)`, which come without the bias. `sizes` are T, V
and P; `start` is the piece's first column in V.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_sums(
    logits,
    bias,
    labels,
    sums,
    losses,
    lse,
    row_stride,
    sizes,
    start,
    ignore_index,
    smoothing,
    HAS_BIAS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Takes a piece's columns into the running sums of a row; the last piece gives loss and lse."""
    tokens, vocabulary, columns = sizes
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    sums += row  # peak, total, plain and own, each (T,)
    label = tl.load(labels + row)
    if label == ignore_index:
        if LAST:
            tl.store(losses + row, 0.0)
            tl.store(lse + row, 0.0)
    else:
        here = (label >= start) & (label < start + columns)
        own = tl.load(logits + label - start, mask=here, other=0.0).to(tl.float32)
        if HAS_BIAS:
            own += tl.load(bias + label, mask=here, other=0.0).to(tl.float32)
        if FIRST:  # NaN is what a label out of range leaves
            own = tl.where(here, own, float("nan"))
        else:
            own = tl.where(here, own, tl.load(sums + 3 * tokens))
        peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_V], tl.float32)
        plain = tl.zeros([BLOCK_V], tl.float32)
        # Sums by lane, joined once at the end.
        for first in range(0, columns, BLOCK_V):
            v = first + tl.arange(0, BLOCK_V)
            there = v < columns
            z = tl.load(logits + v, mask=there, other=0.0).to(tl.float32)
            if HAS_BIAS:
                z += tl.load(bias + start + v, mask=there, other=0.0).to(tl.float32)
            new_peak = tl.where(there, tl.maximum(peak, z), peak)
            raised = total * tl.exp(peak - new_peak) + tl.exp(z - new_peak)
            total = tl.where(there, raised, total)
            plain += z
            peak = new_peak
        top = tl.max(peak, 0)
        sum_of_exp = tl.sum(tl.where(peak > float("-inf"), total * tl.exp(peak - top), 0.0), 0)
        sum_of_z = tl.sum(plain, 0)
        if not FIRST:
            before = tl.load(sums)
            new_top = tl.maximum(top, before)
            sum_of_exp *= tl.exp(top - new_top)
            sum_of_exp += tl.load(sums + tokens) * tl.exp(before - new_top)
            sum_of_z += tl.load(sums + 2 * tokens)
            top = new_top
        if LAST:
            whole = top + tl.log(sum_of_exp)
            loss = whole - (1.0 - smoothing) * own - smoothing / vocabulary * sum_of_z
            tl.store(losses + row, loss)
            tl.store(lse + row, whole)
        else:
            tl.store(sums, top)
            tl.store(sums + tokens, sum_of_exp)
            tl.store(sums + 2 * tokens, sum_of_z)
            tl.store(sums + 3 * tokens, own)


@triton.jit
def logit_gradients(
    logits,
    bias,
    labels,
    lse,
    grad,
    strides,
    sizes,
    start,
    ignore_index,
    smoothing,
    HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Writes the gradient of a piece's logits over them."""
    row_stride, grad_stride = strides
    _, vocabulary, columns = sizes
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row)
    counts = label != ignore_index
    factor = tl.load(grad + row * grad_stride, mask=counts, other=0.0).to(tl.float32)
    whole = tl.load(lse + row)
    uniform = smoothing / vocabulary
    for first in range(0, columns, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        there = (v < columns) & counts
        z = tl.load(logits + v, mask=there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + start + v, mask=there, other=0.0).to(tl.float32)
        target = tl.where(start + v == label, 1.0 - smoothing, 0.0) + uniform
        gradient = tl.where(counts, factor * (tl.exp(z - whole) - target), 0.0)
        tl.store(logits + v, gradient.to(logits.dtype.element_ty), mask=v < columns)

"""Bias and GELU of the feed-forward network, in one pass each way.

    y = gelu(x + bias),   gelu(z) = z Phi(z)
    dx = dy (Phi(z) + z phi(z)),   dbias = sum dx over rows

with the normal distribution Phi and its density phi. The backward computes y again beside dx, which
takes dy's place: only x is kept. Shapes: `R` rows, `C` columns, both contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from blipfast.kernels._runtime import launch, short
from blipfast.kernels.tiles import choose
from torch import Tensor


@triton.jit
def gelu_forward(x, bias, out, num_rows, width, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < width
    there = (rows < num_rows)[:, None] & inside[None, :]
    at = rows[:, None].to(tl.int64) * width + columns[None, :]
    z = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


@triton.jit
def gelu_backward(
    grad,
    x,
    bias,
    value,
    partial,
    num_rows,
    width,
    rows_each,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial: `(programs along rows, C)`, each program's share of the bias's gradient."""
    group = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < width
    offset = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    end = tl.minimum(num_rows, (group + 1) * rows_each)
    for first in range(group * rows_each, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        there = (rows < end)[:, None] & inside[None, :]
        at = rows[:, None].to(tl.int64) * width + columns[None, :]
        z = tl.load(x + at, mask=there, other=0.0).to(tl.float32) + offset
        dy = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        dx = dy * (below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z))
        tl.store(value + at, (z * below).to(value.dtype.element_ty), mask=there)
        tl.store(grad + at, dx.to(grad.dtype.element_ty), mask=there)
        sums += dx
    tl.store(partial + group * width + columns, tl.sum(sums, 0), mask=inside)


def bias_gelu_out(x: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """`gelu(x + bias)` of `x (R, C)` into `out`, which may be x itself."""
    rows, width = x.shape
    meta = choose("bias_gelu forward", short(x.dtype), _TILES, x)
    # Rows first: a grid's other dimensions end at 65,535.
    grid = (-(-rows // meta["BLOCK_R"]), -(-width // meta["BLOCK_C"]))
    launch(gelu_forward, grid, [x, bias.contiguous(), out, rows, width], **meta)
    return out


def gelu_backward_(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu(x + bias)` and the bias's gradient; `grad (R, C)` becomes x's in place."""
    rows, width = x.shape
    meta = choose("bias_gelu backward", short(x.dtype), _TILES, x)
    groups = max(1, min(_GROUPS, -(-rows // meta["BLOCK_R"])))
    rows_each = -(-rows // groups)
    value = torch.empty_like(x)
    partial = x.new_empty((groups, width), dtype=torch.float32)
    grid = (-(-width // meta["BLOCK_C"]), groups)
    args = [grad, x, bias.contiguous(), value, partial, rows, width, rows_each]
    launch(gelu_backward, grid, args, **meta)
    return value, partial.sum(0).to(bias.dtype)


_GROUPS = 64  # programs along the rows, each with a partial sum
_TILES = [
    {"BLOCK_R": 8, "BLOCK_C": 256, "num_warps": 4, "num_stages": 1},
    {"BLOCK_R": 16, "BLOCK_C": 128, "num_warps": 4, "num_stages": 1},
]

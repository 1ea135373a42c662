"""Linear layers of few rows, as in each step of generation: bound by reading the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.ops import _native
from blipfast.ops._products import bf16_products, by_onednn, onednn_is_faster

_FEW_ROWS, _BLOCK = 64, 64  # measured on two cores with AMX


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    """`F.linear`, and GELU over it, without gradients: `x (..., in)` to `(..., out)`.

    On a CPU up to 64 rows go where the weight is read as it lies; `F.linear` repacks it at each
    call. In bf16 that is the C++ operator, or oneDNN with the weight as left operand; in float32
    MKL with a batch of small products. oneDNN on AVX-512 reads it so by itself.
    """
    if onednn_is_faster(x):
        return by_onednn(x, weight, bias, gelu=gelu)
    if not _few_rows(x) or not weight.is_contiguous():
        out = F.linear(x, weight, bias)
        return F.gelu(out) if gelu else out
    rows = x.flatten(0, -2)
    if _amx_takes(rows):
        run = torch.ops.blipfast_native.few_rows_linear
        return run(rows.contiguous(), weight, bias, gelu).view(*x.shape[:-1], -1)
    if weight.element_size() >= 4:
        out = _by_blocks(rows, weight, bias)
    elif bf16_products() == "avx512":
        out = F.linear(rows, weight, bias)
    else:
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        torch.add(torch.mm(weight, rows.t()).t(), bias, out=out)
    return (F.gelu(out) if gelu else out).view(*x.shape[:-1], -1)


def few_rows_linears(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Several linear layers side by side, as of attention heads, without gradients.

    x: `(H, R, in)`, weight: `(H, out, in)`, bias: `(H, out)`. Returns `(H, R, out)`.
    """
    if x.is_cpu and x.shape[1] <= _FEW_ROWS and weight.is_contiguous() and _amx_takes(x):
        bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
        return torch.ops.blipfast_native.few_rows_linear(x.contiguous(), weight, bias, False)
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _by_blocks(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    size, width = weight.shape
    whole = size - size % _BLOCK
    out = rows.new_empty(rows.shape[0], size)
    if whole:
        blocks = weight[:whole].view(-1, _BLOCK, width).transpose(1, 2)
        batch = rows.expand(blocks.shape[0], -1, -1)
        part = torch.baddbmm(bias[:whole].view(-1, 1, _BLOCK), batch, blocks)
        out[:, :whole].view(-1, blocks.shape[0], _BLOCK).copy_(part.transpose(0, 1))
    if whole < size:
        out[:, whole:] = F.linear(rows, weight[whole:], bias[whole:])
    return out


def _few_rows(x: Tensor) -> bool:
    return x.is_cpu and x.shape[-1] < x.numel() <= _FEW_ROWS * x.shape[-1]


def _amx_takes(rows: Tensor) -> bool:
    return rows.dtype == torch.bfloat16 and rows.shape[-1] % 32 == 0 and _native.amx()

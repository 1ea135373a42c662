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
    call. That is the C++ operator where `reads_in_place`; without it oneDNN with the weight as left
    operand, or in float32 MKL with a batch of small products.
    """
    if reads_few_rows_in_place(x, weight):
        rows = x.flatten(0, -2).contiguous()
        return _by_operator(rows, weight, bias, gelu).view(*x.shape[:-1], -1)
    if onednn_is_faster(x):
        return by_onednn(x, weight, bias, gelu=gelu)
    if not _few_rows(x) or not weight.is_contiguous():
        out = F.linear(x, weight, bias)
        return F.gelu(out) if gelu else out
    rows = x.flatten(0, -2)
    if weight.element_size() >= 4:
        out = _by_blocks(rows, weight, bias)
    elif bf16_products() == "avx512":  # oneDNN's own order is the faster there
        out = F.linear(rows, weight, bias)
    else:
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        torch.add(torch.mm(weight, rows.t()).t(), bias, out=out)
    return (F.gelu(out) if gelu else out).view(*x.shape[:-1], -1)


def few_rows_linears(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Several linear layers side by side, as of attention heads, without gradients.

    x: `(H, R, in)`, weight: `(H, out, in)`, bias: `(H, out)`. Returns `(H, R, out)`.
    """
    if x.shape[1] <= _FEW_ROWS and weight.is_contiguous() and reads_in_place(x):
        bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
        return _by_operator(x.contiguous(), weight, bias, False)
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def reads_in_place(x: Tensor) -> bool:
    """Whether the C++ operator takes x's dtype and width, and reads a contiguous weight as it lies.

    In float32 only where PyTorch's own library leaves AVX-512 unused.
    """
    if not x.is_cpu or x.shape[-1] % 32 != 0:
        return False
    if x.dtype == torch.bfloat16:
        return _native.amx() or _native.avx512_bf16()
    return onednn_is_faster(x) and _native.avx512_bf16()


def reads_few_rows_in_place(x: Tensor, weight: Tensor) -> bool:
    """Whether x has few rows, and `reads_in_place` holds for both."""
    same = x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    return same and _few_rows(x) and weight.is_contiguous() and reads_in_place(x)


def _by_operator(rows: Tensor, weight: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    amx = rows.dtype == torch.bfloat16 and _native.amx()
    return torch.ops.blipfast_native.few_rows_linear(rows, weight, bias, gelu, amx)


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

"""Linear layers and word tables, where PyTorch's leave much of a CPU unused.

In training, autograd sums the gradients of all uses of a weight. It does so in place only when a
gradient is no view, and that of `F.linear` is one; and an embedding's gradient is as large as its
table, whatever was looked up. Of BERT's weights that is some 900 MB more to write in each step of
pre-training: `linear` and `TiedTable` save them.

In generation, a step has few rows and is bound by reading the weights: `few_rows_linear`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from blipfast.ops import _native


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, to be differentiated once: `x (..., in)`, `weight (out, in)` to `(..., out)`.

    Under autocast it is `F.linear`, which casts a weight once for all uses.
    """
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Linear.apply(x, weight, bias)
    if _runs_on_one_thread(x, weight):
        pieces = -(-x.shape[0] // _GOOD_ROWS)
        return torch.cat([F.linear(part, weight, bias) for part in x.chunk(pieces)])
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.gelu(F.linear(x, weight, bias))`: `x (..., in)` to `(..., out)`.

    Without gradients, in bf16 on a CPU, oneDNN applies GELU before it rounds and writes: a quarter
    less time at ViT's sizes.
    """
    if _fuses_gelu(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
    return F.gelu(F.linear(x, weight, bias))


_MANY_ROWS = 2048  # below it the fused product gains nothing


def _fuses_gelu(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.bfloat16
        and x.numel() >= _MANY_ROWS * x.shape[-1]
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


# Of two threads oneDNN (3.x, torch 2.13) leaves one idle between these row counts, at BERT's width.
_GOOD_ROWS, _BAD_ROWS, _BAD_OUT_FEATURES = 640, 1408, 1024


def _runs_on_one_thread(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dim() == 2
        and _GOOD_ROWS < x.shape[0] < _BAD_ROWS
        and weight.shape[0] <= _BAD_OUT_FEATURES
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and torch.get_num_threads() == 2
        and not torch.is_grad_enabled()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, _, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            grad @ weight if need_x else None,
            rows.t() @ x.flatten(0, -2),
            rows.sum(0) if need_bias else None,
        )


_FEW_ROWS, _BLOCK = 64, 64  # measured on two cores with AMX


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor, *, gelu: bool = False) -> Tensor:
    """`F.linear`, and GELU over it, without gradients: `x (..., in)` to `(..., out)`.

    On a CPU up to 64 rows go where the weight is read as it lies; `F.linear` repacks it at each
    call. In bf16 that is the C++ operator, or oneDNN with the weight as left operand; in float32
    MKL with a batch of small products.
    """
    if not _few_rows(x) or not weight.is_contiguous():
        out = F.linear(x, weight, bias)
        return F.gelu(out) if gelu else out
    rows = x.flatten(0, -2)
    if _amx_takes(rows):
        run = torch.ops.blipfast_native.few_rows_linear
        return run(rows.contiguous(), weight, bias, gelu).view(*x.shape[:-1], -1)
    if weight.element_size() >= 4:
        out = _by_blocks(rows, weight, bias)
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


class TiedTable:
    """A word table `(V, D)` for all uses of a step: rows are looked up, and it weighs the output.

    weight: the table as the output layer should use it. Its gradient is formed once, dense: that of
    the output layer, to which the looked-up rows' is added in place.
    """

    def __init__(self, weight: Tensor) -> None:
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._plain = weight.device.type != "cpu" or torch.compiler.is_compiling()
        self.weight: Tensor = weight if self._plain else _Table.apply(weight, self._rows)

    def look_up(self, input_ids: Tensor) -> Tensor:
        """`F.embedding`: `(...)` int64 to `(..., D)`."""
        if self._plain:  # on a GPU its backward sorts, so that sums are repeatable
            return F.embedding(input_ids, self.weight)
        return _LookUp.apply(self.weight, input_ids, self._rows)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, input_ids: Tensor, rows: list[Any]) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.rows = rows
        return F.embedding(input_ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (input_ids,) = ctx.saved_tensors
        ctx.rows.append((input_ids, grad))  # autograd runs the table's node after all its users
        return None, None, None


class _Table(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: list[Any]) -> Tensor:
        ctx.rows, ctx.like = rows, weight.detach()
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor, None]:
        if grad is None:
            grad = torch.zeros_like(ctx.like)
        elif _graph_is_kept():
            grad = grad.clone()  # a node may hand out the same tensor in the next backward
        while ctx.rows:
            input_ids, rows = ctx.rows.pop()
            grad.index_add_(0, input_ids.flatten(), rows.flatten(0, -2).to(grad.dtype))
        return grad, None


def _graph_is_kept() -> bool:
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())

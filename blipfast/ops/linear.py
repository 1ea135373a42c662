"""Linear layers and embeddings whose weights are used several times in a step.

Autograd sums the gradients of all uses. It does so in place only when a gradient is no view, and
that of `F.linear` is one; and an embedding's gradient is as large as its table, whatever was looked
up. Of BERT's weights that is some 900 MB more to write in each step of pre-training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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


class TiedTable:
    """A word table `(V, D)` for all uses of a step: rows are looked up, and it weighs the output.

    weight: the table as the output layer should use it. Its gradient is formed once, dense: that of
    the output layer, to which the looked-up rows' is added in place.
    """

    def __init__(self, weight: Tensor) -> None:
        self._rows: list[tuple[Tensor, Tensor]] = []
        self.weight: Tensor = _Table.apply(weight, self._rows)

    def look_up(self, input_ids: Tensor) -> Tensor:
        """`F.embedding`: `(...)` int64 to `(..., D)`."""
        if (
            self.weight.device.type != "cpu"
        ):  # where its backward sorts, so that sums are repeatable
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

"""A word table that is looked up and weighs the output too, with one gradient formed for all uses.

Autograd would make a gradient as large as the table for each look-up: of BERT's some 90 MB.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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

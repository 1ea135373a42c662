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
    plain = torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
    if plain or not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


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


def tied_table(weight: Tensor) -> Tensor:
    """An embedding table for all of a step's uses: lookups by `look_up`, and as output weight.

    Its gradient, the sum of all uses, is formed once and is dense.
    """
    return _DenseGradient.apply(weight)


def look_up(input_ids: Tensor, table: Tensor) -> Tensor:
    """Rows of a `tied_table`; on a CPU their gradient joins the table's without a table of zeros."""
    return F.embedding(input_ids, table, sparse=table.device.type == "cpu")


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to_dense() if grad.is_sparse else grad

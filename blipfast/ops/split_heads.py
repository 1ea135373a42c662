"""One projection to queries, keys and values, or to keys and values, whose gradient is one tensor.

Autograd would put the parts' gradients together in the parts' order, and copy that once more into
the order that the projection's matrix product needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def split_heads(x: Tensor) -> tuple[Tensor, ...]:
    """`x (B, L, n, H, head_dim)` to n views `(B, H, L, head_dim)`, to be differentiated once.

    Gradients that lie as the parts of one such tensor (`empty_parts`) are taken as they are; others
    are copied once.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return _parts(x)
    return _Split.apply(x)  # type: ignore[no-any-return]


def empty_parts(part: Tensor, count: int) -> tuple[Tensor, ...]:
    """Memory for `count` tensors of the shape of `part (B, H, L, head_dim)`, as parts of one."""
    batch, heads, length, dim = part.shape
    return _parts(part.new_empty(batch, length, count, heads, dim))


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    return x.permute(2, 0, 3, 1, 4).unbind()


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        return _parts(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        first = grads[0]
        batch, heads, length, dim = first.shape
        whole = (batch, length, len(grads), heads, dim)
        row = len(grads) * heads * dim
        stride = (length * row, dim, row, 1)  # of a part
        if all(
            part.untyped_storage()._cdata == first.untyped_storage()._cdata
            and part.dtype == first.dtype
            and part.storage_offset() == first.storage_offset() + i * heads * dim
            and part.stride() == stride
            for i, part in enumerate(grads)
        ):
            return first.as_strided(whole, (length * row, row, heads * dim, dim, 1))
        return torch.stack([part.transpose(1, 2) for part in grads], 2)

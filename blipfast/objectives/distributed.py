"""Gathering tensors over ranks; every function does nothing without a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_offset(batch: int) -> int:
    """Place of this rank's first row among all ranks' rows, with `batch` rows on every rank."""
    return dist.get_rank() * batch if world_size() > 1 else 0


@torch.no_grad()
def all_gather_no_grad(tensor: Tensor) -> Tensor:
    """`(B, ...)` of this rank to `(ranks * B, ...)` of all, in rank order, cut from the graph.

    All ranks must come with the same shape and dtype.
    """
    if world_size() == 1:
        return tensor.detach()
    parts = [tensor.new_empty(tensor.shape) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """As `all_gather_no_grad`, but in the graph: a row's gradient sums all ranks' losses.

    The backward pass communicates, so every rank must run it.
    """
    if world_size() == 1:
        return tensor
    gathered: Tensor = _AllGather.apply(tensor)
    return gathered


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = tensor.shape[0]
        return all_gather_no_grad(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        first = rank_offset(ctx.rows)
        return total[first : first + ctx.rows]

"""What the objectives exchange over ranks; without a process group each rank is the only one.

A loss over all ranks' batches is the mean of what `mean_over_ranks` returns on each. Its gradient
is therefore the mean of the ranks' gradients, which is what DDP and FSDP form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from blipfast.errors import ShapeError


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


class _Exchange(torch.autograd.Function):
    """Sends `sent[r]` rows to each rank r and receives `received[r]` from it, in rank order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        return _exchange(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grads[0], ctx.received, ctx.sent), None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent)
    return out


def mean_over_ranks(total: Tensor, count: Tensor) -> Tensor:
    """This rank's part of a mean over all ranks' rows, such that the ranks' parts average to it.

    total: the sum over this rank's rows. count: how many they are; 0 on all ranks gives 0.
    """
    counted = count.detach().to(total.dtype, copy=True)
    if world_size() > 1:
        dist.all_reduce(counted)
    return total * world_size() / counted.clamp(min=1)


def gather_texts(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Right-padded `(B, L)` ids and mask of this rank to `(ranks * B, longest L)` of all."""
    if world_size() == 1:
        return input_ids, attention_mask
    width = torch.tensor([input_ids.shape[1]], device=input_ids.device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    more = int(width) - input_ids.shape[1]
    both = torch.stack([input_ids, attention_mask.to(input_ids)], dim=1)
    gathered = all_gather_no_grad(F.pad(both, (0, more)))
    return gathered[:, 0], gathered[:, 1].to(attention_mask.dtype)


def fetch_rows(tensor: Tensor, index: Tensor) -> tuple[Tensor, list[int]]:
    """Rows of all ranks' tensors, of which only those move that another rank asks for.

    tensor: `(B, ...)`, the same shape on all ranks; row i of rank r is number `r * B + i`.
    index: `(N,)` int64 numbers, the same N on all ranks; -1 asks for nothing.

    Returns the rows at hand, `(B + U, ...)`, this rank's own ones first, and the place of each
    number of `index` among them, -1 for -1. The gradient of a row goes back to the rank it came
    from, so every rank must run the backward pass. Raises ShapeError for a number out of range.
    """
    batch, size = tensor.shape[0], world_size()
    asked = all_gather_no_grad(index).view(size, -1).tolist()
    numbers = [number for row in asked for number in row]
    if numbers and not (min(numbers) >= -1 and max(numbers) < batch * size):
        raise ShapeError(f"fetch_rows: {numbers} must lie between -1 and {batch * size - 1}")
    if size == 1:
        return tensor, asked[0]
    rank = dist.get_rank()
    foreign = [
        sorted({number for number in row if number >= 0 and number // batch != r})
        for r, row in enumerate(asked)
    ]
    given = [[number % batch for number in row if number // batch == rank] for row in foreign]
    received = [sum(number // batch == r for number in foreign[rank]) for r in range(size)]
    rows = torch.tensor([row for part in given for row in part], device=tensor.device)
    parcels = tensor.index_select(0, rows.to(torch.int64))
    fetched: Tensor = _Exchange.apply(parcels, [len(part) for part in given], received)
    places = {rank * batch + i: i for i in range(batch)}
    places |= {number: batch + i for i, number in enumerate(foreign[rank])}
    return torch.cat([tensor, fetched]), [places.get(number, -1) for number in asked[rank]]

"""Passes over keys in pieces for the PyTorch backend of `contrastive_softmax`.

Memory beyond the results is one piece of keys in the accumulation dtype and its scores, whatever
the number of keys. Shapes: `B` queries, `N` keys, `D` width, `R` rows of a pass, `C` keys of a
piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blipfast.ops._products import product

# Scores held at a time: about the second-level caches on a CPU, enough to fill a GPU otherwise.
_CPU_SCORES = 1 << 19
_GPU_SCORES = 1 << 24
_MIN_CHUNK = 256


def accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def scaled_rows(query: Tensor, teacher: Tensor | None, temperature: Tensor) -> Tensor:
    """Student above teacher, over the temperature, `(R, D)`: one matmul then serves both."""
    dtype = accumulator(query)
    rows = query if teacher is None else torch.cat([query.to(dtype), teacher.to(dtype)])
    return rows.to(dtype) / temperature.to(dtype)


def chunks(
    keys: Sequence[Tensor], num_rows: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Pieces `(start, (C, D))` of all keys in order, in `dtype`, with `num_rows * C` bounded."""
    start = 0
    for block in filter(len, keys):
        for piece in block.detach().split(_columns(block.device, num_rows)):
            yield start, piece.to(dtype)
            start += len(piece)


def _columns(device: torch.device, num_rows: int) -> int:
    """Keys at a time, so that their scores stay within bounds."""
    budget = _CPU_SCORES if device.type == "cpu" else _GPU_SCORES
    return max(_MIN_CHUNK, budget // max(1, num_rows))


def online_softmax(rows: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of `rows @ keys.T` `(R,)` and the softmax-weighted mean of the keys `(R, D)`."""
    peak = rows.new_full((len(rows), 1), float("-inf"))
    total = rows.new_zeros((len(rows), 1))
    mean = torch.zeros_like(rows)
    for _, piece in chunks(keys, len(rows), rows.dtype):
        scores = product(rows, piece)
        new_peak = torch.maximum(peak, scores.amax(1, keepdim=True))
        weights = scores.sub_(new_peak).exp_()
        fade = (peak - new_peak).exp_()
        total.mul_(fade).add_(weights.sum(1, keepdim=True))
        mean.mul_(fade).add_(product(weights, piece.T))
        peak = new_peak
    return (peak + total.log()).squeeze(1), mean.div_(total)


def loss_and_means(
    query: Tensor,
    temperature: Tensor,
    lse: Tensor,
    means: Tensor,
    own: Tensor,
    mass: Tensor | None,
    alpha: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `(B,)`, and mean keys under p and under the targets `(B, D)`.

    lse, means: of students, then teachers. own: `(B, D)` mean of each row's positives. mass:
    `(B, 1)` what the positives' targets sum to; None for 1. alpha: the soft targets' weight, None
    for no teacher.
    """
    size, rows = len(query), scaled_rows(query, None, temperature)
    target = own.to(rows.dtype, copy=True)  # no part of the keys
    mass = rows.new_ones(size, 1) if mass is None else mass
    if alpha is not None:
        target = alpha * means[size:] + (1 - alpha) * target
        mass = alpha + (1 - alpha) * mass
    # A row whose id is nowhere among the keys has targets that sum to `mass` < 1.
    loss = lse[:size] * mass.squeeze(1) - (rows * target).sum(1)
    return loss, means[:size] * mass, target


def query_gradients(
    grad: Tensor, query: Tensor, temperature: Tensor, student: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries `(B, D)` and the temperature, from the losses' `(B,)`."""
    scale = temperature.to(student.dtype)
    d_query = (student - target).mul_(grad.unsqueeze(1)).div_(scale)
    return d_query, -(query.to(student.dtype) * d_query).sum() / scale


def mean_of_equal_ids(
    keys: Sequence[Tensor], query_ids: Tensor, key_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mean of the keys with each query's id `(B, D)`, 0 if there is none; whether there is one."""
    count = torch.zeros(len(query_ids), 1, dtype=dtype, device=query_ids.device)
    mean = torch.zeros(len(query_ids), keys[0].shape[1], dtype=dtype, device=query_ids.device)
    for start, piece in chunks(keys, len(query_ids), dtype):
        same = (query_ids[:, None] == key_ids[start : start + len(piece)]).to(dtype)
        count += same.sum(1, keepdim=True)
        mean.addmm_(same, piece)
    return mean.div_(count.clamp(min=1)), count.clamp(max=1)


def key_range(keys: Sequence[Tensor], start: int, size: int) -> Tensor:
    """Keys `start` to `start + size` of the blocks taken as one list."""
    pieces = []
    for block in keys:
        low, high = max(start, 0), min(start + size, len(block))
        if low < high:
            pieces.append(block.detach()[low:high])
        size, start = size - max(high - low, 0), max(start - len(block), 0)
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if pieces else keys[0].detach()[:0]


def key_weights(
    grad: Tensor,
    with_teacher: bool,
    alpha: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's `(B, 1)` weights of the student's softmax, the teacher's, and each positive."""
    student = soft = hard = grad
    if with_teacher:
        soft, hard = grad * alpha, grad * (1 - alpha)
    if query_ids is not None and key_ids is not None:
        count = torch.zeros_like(grad)
        for ids in key_ids.split(_columns(key_ids.device, len(grad))):
            count += (query_ids[:, None] == ids).sum(1, keepdim=True)
        student = student - torch.where(count > 0, 0, hard)
        hard = hard / count.clamp(min=1)
    return student, soft, hard


def key_gradients(
    out: Tensor,
    grad: Tensor,
    rows: Tensor,
    keys: Sequence[Tensor],
    alpha: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    offset: int,
    lse: Tensor,
) -> None:
    """Write `d loss / d k_j = sum_i grad_i (mass_i p_ij - t_ij) q_i / T` for every key to `out`."""
    size = len(grad)
    student, soft, hard = key_weights(grad, len(rows) > size, alpha, query_ids, key_ids)
    for start, piece in chunks(keys, len(rows), rows.dtype):
        probabilities = product(rows, piece).sub_(lse.unsqueeze(1)).exp_()
        weights = probabilities[:size].mul_(student)
        if len(rows) > size:
            weights.addcmul_(probabilities[size:], soft, value=-1)
        if query_ids is not None and key_ids is not None:
            same = query_ids[:, None] == key_ids[start : start + len(piece)]
            weights.addcmul_(same.to(weights.dtype), hard, value=-1)
        else:
            _subtract_diagonal(weights, hard, offset - start)
        out[start : start + len(piece)] = (weights.T @ rows[:size]).to(out.dtype)


def _subtract_diagonal(weights: Tensor, values: Tensor, shift: int) -> None:
    """Take `values[i]` from `weights[i, shift + i]` where that column exists."""
    rows, columns = weights.shape
    first, last = max(0, -shift), min(rows, columns - shift)
    if first < last:
        weights[first:last].diagonal(shift + first).sub_(values[first:last, 0])

"""Losses and gradients of a linear layer's cross-entropy, some tokens at a time.

For the PyTorch backend of `linear_cross_entropy`; letters as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.ops._products import by_onednn, onednn_is_faster, product

# Logits held at a time: enough rows that a matmul is efficient at a vocabulary of 30,524.
_CPU_LOGITS = 1 << 25
_GPU_LOGITS = 1 << 27


def by_pieces(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    smoothing: float,
    ignore_index: int,
    scale: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses `(T,)` and, given the weight `scale` `(T,)` of each, the gradients that are needed."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = len(labels)
    valid = labels != ignore_index
    chosen = None
    if hidden.device.type == "cpu":
        chosen = valid.nonzero().squeeze(1)
        hidden, labels = hidden[chosen], labels[chosen]
        scale = None if scale is None else scale[chosen]
        check_labels(labels, len(weight))
    else:
        labels = labels.where(valid, 0)
        scale = None if scale is None else scale * valid
    losses = hidden.new_empty(len(labels), dtype=dtype)
    out = _Gradients(hidden, weight, bias, needs)
    pieces = max(1, -(-len(labels) * len(weight) // logits_at_a_time(hidden)))
    size = max(1, -(-len(labels) // pieces))
    # Buffers for all pieces: fresh memory of this size costs page faults as dear as a matmul.
    raw = hidden.new_empty(min(size, len(labels)), len(weight))
    in_place = raw.dtype == dtype
    values = raw if in_place else torch.empty_like(raw, dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(labels), size):
            piece = slice(start, start + size)
            rows = hidden[piece]
            logits, z = raw[: len(rows)], values[: len(rows)]
            piece_scale = None if scale is None else scale[piece]
            if onednn_is_faster(rows):
                z = logits = by_onednn(rows, weight, bias)
            elif bias is None:
                torch.mm(rows, weight.T, out=logits)
            else:  # rounds once, where a sum of its own would round again
                torch.addmm(bias, rows, weight.T, out=logits)
            if not in_place:
                z.copy_(logits)
            losses[piece] = _losses_then_gradient(z, labels[piece], smoothing, piece_scale)
            if scale is not None:
                out.add(piece, z, logits if in_place else logits.copy_(z))
    d_hidden, d_weight, d_bias = out.results()
    if chosen is None:
        return losses.where(valid, 0.0), d_hidden, d_weight, d_bias
    if needs[0]:
        d_hidden = hidden.new_zeros(total, hidden.shape[1]).index_copy_(0, chosen, d_hidden)
    return losses.new_zeros(total).index_copy_(0, chosen, losses), d_hidden, d_weight, d_bias


def _losses_then_gradient(
    z: Tensor, labels: Tensor, smoothing: float, scale: Tensor | None
) -> Tensor:
    """Losses `(C,)` of logits `z` `(C, V)`, which become `scale` times the losses' gradient."""
    uniform = smoothing / z.shape[1]
    labels, scale = labels.unsqueeze(1), None if scale is None else scale.unsqueeze(1)
    loss = z.gather(1, labels).mul_(smoothing - 1)
    if smoothing:
        loss -= z.sum(1, keepdim=True) * uniform
    peak = z.amax(1, keepdim=True)
    total = z.sub_(peak).exp_().sum(1, keepdim=True)
    loss += peak + total.log()
    if scale is not None:
        z.mul_(scale / total)
        if smoothing:
            z.sub_(scale * uniform)
        z.scatter_add_(1, labels, scale * (smoothing - 1))
    return loss.squeeze(1)


class _Gradients:
    """Sums the gradients of the pieces; float32 sums, so that many pieces cost no precision."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
    ) -> None:
        self.hidden, self.weight, self.bias, self.needs = hidden, weight, bias, needs
        self.d_hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    def add(self, piece: slice, exact: Tensor, d_logits: Tensor) -> None:
        """Gradient of a piece's logits `(C, V)`, in the accumulation dtype and in hidden's."""
        if self.needs[2]:
            d_bias = exact.sum(0, dtype=torch.promote_types(exact.dtype, torch.float32))
            self.d_bias = d_bias if self.d_bias is None else self.d_bias.add_(d_bias)
        if self.needs[0]:
            self.d_hidden[piece] = product(d_logits, self.weight.T)
        if not self.needs[1]:
            return
        if self.d_weight is None:
            self.d_weight = product(d_logits.T, self.hidden[piece].T)
        elif self.weight.dtype in (torch.float32, torch.float64):
            self.d_weight.addmm_(d_logits.T, self.hidden[piece])
        else:
            self.d_weight = self.d_weight.float().add_(d_logits.T @ self.hidden[piece])

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        results = [self.d_hidden]
        like_bias = self.hidden[:0, 0] if self.bias is None else self.bias
        sums = (self.d_weight, self.d_bias)
        for need, value, like in zip(self.needs[1:], sums, (self.weight, like_bias), strict=True):
            if not need:
                results.append(like.new_empty(0))
            else:
                results.append(torch.zeros_like(like) if value is None else value.to(like.dtype))
        return results[0], results[1], results[2]


def logits_at_a_time(hidden: Tensor) -> int:
    return _CPU_LOGITS if hidden.device.type == "cpu" else _GPU_LOGITS


def check_labels(labels: Tensor, vocabulary: int) -> None:
    if labels.numel() and (labels.min() < 0 or labels.max() >= vocabulary):
        raise ShapeError(
            f"linear_cross_entropy: labels run from {int(labels.min())} to {int(labels.max())}, "
            f"but the weight has {vocabulary} rows"
        )

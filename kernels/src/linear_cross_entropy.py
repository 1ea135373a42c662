"""Cross-entropy with label smoothing of a piece of logits, and its gradient in their place.

    loss_t   = logsumexp(z_t) - (1 - e) z_t[y_t] - e / V sum_v z_t[v]
    dz_t[v]  = scale_t (softmax(z_t)[v] - e / V - (1 - e) [v = y_t])

with the logits `z_t = x_t + bias` of a product x. Matrix products stay with the vendor's library,
which no kernel of ours beats; what is fused is all that lies between them. A program holds one row:
it reads the product, then reads it again from the cache and writes the gradient over it, so that no
second matrix of its size exists.

Shapes: `C` tokens of a piece, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from blipfast.kernels._runtime import launch, short
from blipfast.kernels.tiles import choose
from torch import Tensor


@triton.jit
def losses_and_gradients(
    logits,
    bias,
    labels,
    losses,
    scale,
    row_stride,
    vocabulary,
    smoothing,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row)
    known = (label >= 0) & (label < vocabulary)
    own = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)
    if HAS_BIAS:
        own += tl.load(bias + label, mask=known, other=0.0).to(tl.float32)
    peak = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    plain = tl.zeros([BLOCK_V], tl.float32)
    # Sums by lane, joined once at the end.
    for start in range(0, vocabulary, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        there = v < vocabulary
        z = tl.load(logits + v, mask=there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + v, mask=there, other=0.0).to(tl.float32)
        new_peak = tl.where(there, tl.maximum(peak, z), peak)
        raised = total * tl.exp(peak - new_peak) + tl.exp(z - new_peak)
        total = tl.where(there, raised, total)
        plain += z
        peak = new_peak
    top = tl.max(peak, 0)
    lse = top + tl.log(tl.sum(tl.where(peak > float("-inf"), total * tl.exp(peak - top), 0.0), 0))
    uniform = smoothing / vocabulary
    tl.store(losses + row, lse - (1.0 - smoothing) * own - uniform * tl.sum(plain, 0))
    if HAS_SCALE:
        factor = tl.load(scale + row).to(tl.float32)
        for start in range(0, vocabulary, BLOCK_V):
            v = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits + v, mask=v < vocabulary, other=0.0).to(tl.float32)
            if HAS_BIAS:
                z += tl.load(bias + v, mask=v < vocabulary, other=0.0).to(tl.float32)
            target = tl.where(v == label, 1.0 - smoothing, 0.0) + uniform
            gradient = factor * (tl.exp(z - lse) - target)
            tl.store(logits + v, gradient.to(logits.dtype.element_ty), mask=v < vocabulary)


def losses_then_gradients(
    logits: Tensor,
    labels: Tensor,
    smoothing: float,
    scale: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Losses `(C,)` float32 of `logits + bias`; logits become `scale` times the losses' gradient.

    logits: `(C, V)` float32, bfloat16 or float16, each row contiguous, changed in place when
    `scale` is given. bias: `(V,)`, added in float32.
    labels: `(C,)` int64; one outside `0 ... V - 1` gives a NaN loss, and no other reads are wrong.
    scale: `(C,)` float32 or None for losses alone.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    args: list[Any] = [logits, None if bias is None else bias.contiguous()]
    args += [labels.contiguous(), losses]
    args += [None if scale is None else scale.contiguous(), logits.stride(0), logits.shape[1]]
    launch(
        losses_and_gradients,
        (logits.shape[0],),
        [*args, float(smoothing)],
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        **_configuration(logits),
    )
    return losses


def _configuration(logits: Tensor) -> dict[str, int]:
    """Logits of a tile, warps and stages."""
    chosen = {"BLOCK_V": 2048, "num_warps": 8, "num_stages": 2}
    candidates = [chosen, {"BLOCK_V": 1024, "num_warps": 4, "num_stages": 3}]
    return choose("linear_cross_entropy", short(logits.dtype), candidates, logits)

"""Cross-attention that projects no keys and values, for sets that only few rows look at.

With embeddings `e_s` of a set, `K = W_k e + b_k` and `V = W_v e + b_v`, both projections can move
to the other side of the attention:

    softmax_s(q . (W_k e_s + b_k)) = softmax_s((q W_k) . e_s)     (q . b_k is the same for all s)
    sum_s p_s (W_v e_s + b_v)      = W_v (sum_s p_s e_s) + b_v

A row of a head is then compared with whole embeddings, `D` wide in place of `head_dim`, but nothing
is computed for a set on its own. It is less work where fewer rows than `head_dim` look at a set: a
caption or two, a question. (`generation.image_attention` does the same for rows that come one by
one.)

Shapes: `T` packed rows, `H` heads, `B` sets of `S` embeddings of width `D`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blipfast.ops._products import product
from blipfast.ops.attention import CrossPlan, cross_backends
from blipfast.ops.packing import gather_rows, scatter_rows

_MOST_ROWS = 0.6  # of head_dim, on average over the sets: narrow products are slower than wide ones
_LEAST_SET = 1 << 16  # elements; smaller sets are not worth calls of their own


def absorbs(q: Tensor, embeds: Tensor, weight: Tensor, plan: CrossPlan) -> bool:
    """Whether `absorbed_cross_attention` is the faster way and can be gone: without gradients, on a
    CPU, with no padded embeddings, and no backend of `cross_attention` asked for."""
    rows, _, head_dim = q.shape
    return (
        cross_backends.free
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and q.is_cpu
        and q.dtype == embeds.dtype == weight.dtype
        and plan.kv_lengths is None
        and embeds[0].numel() >= _LEAST_SET
        and rows < _MOST_ROWS * head_dim * plan.num_kv
    )


def absorbed_cross_attention(
    q: Tensor, embeds: Tensor, weight: Tensor, bias: Tensor, plan: CrossPlan
) -> Tensor:
    """`cross_attention` to what a linear layer makes of `embeds (B, S, D)`.

    q: `(T, H, head_dim)`, packed. weight, bias: of keys and then values, `(2 H head_dim, D)` and
    `(2 H head_dim,)`. Returns `(T, H, head_dim)`.
    """
    heads, head_dim = q.shape[1:]
    w_k, w_v = weight.view(2, heads, head_dim, -1)
    ordered = q if plan.order is None else gather_rows(q, plan.order)
    looks = torch.bmm(ordered.transpose(0, 1), w_k).mul_(head_dim**-0.5).transpose(0, 1)
    seen = torch.empty_like(looks, memory_format=torch.contiguous_format)  # (T, H, D)
    start = 0
    for rows, its in zip(plan.grouped.lengths, embeds, strict=True):
        if rows:
            part = looks[start : start + rows].flatten(0, 1)
            mean = product(product(part, its).softmax(-1), its.t())
            seen[start : start + rows] = mean.view(rows, heads, -1)
        start += rows
    value_bias = bias.view(2, heads, 1, head_dim)[1]
    out = torch.baddbmm(value_bias, seen.transpose(0, 1), w_v.transpose(1, 2)).transpose(0, 1)
    return out if plan.order is None else scatter_rows(out, plan.order, len(q))

"""MED as the original runs it: padded, eager, one pass for each use.

The plain formulation that the packed one must equal, and the baseline it is timed against: texts
are padded, attention is matmul and softmax, and the image's K/V are projected again in every pass.
It uses the very parameters of a `TextTransformer`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.models.text import CrossAttention, TextLayer, TextTransformer


def encode_padded(
    text: TextTransformer,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    cross_embeds: Tensor | None = None,
    cross_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """`input_ids (N, L)` to `(N, L, D)`, each text with its own `cross_embeds (N, S, W)`.

    attention_mask: `(N, L)`. cross_mask: `(N, S)`, where some of what is looked at is padding.
    """
    length = input_ids.shape[1]
    hidden = text.embeddings(input_ids, torch.arange(length, device=input_ids.device))
    mask = attention_mask.bool()[:, None, None, :]
    if causal:
        mask = mask & mask.new_ones(length, length).tril()
    keep = None if cross_mask is None else cross_mask.bool()[:, None, None, :]
    for layer in text.layers:
        assert isinstance(layer, TextLayer)
        attention = layer.self_attention
        q, k, v = attention.qkv(hidden).chunk(3, dim=-1)
        out = _attend(
            q, k, v, attention.num_heads, mask, attention.attention_dropout * text.training
        )
        hidden = attention.out(out, hidden)
        if cross_embeds is not None:
            cross = layer.cross_attention
            assert isinstance(cross, CrossAttention)
            k, v = cross.attention.key_value(cross_embeds).chunk(2, dim=-1)
            dropout = cross.attention.attention_dropout * text.training
            q = cross.attention.query(hidden)
            hidden = cross.out(_attend(q, k, v, attention.num_heads, keep, dropout), hidden)
        hidden = layer.feed_forward(hidden)
    return hidden


def _attend(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, keep: Tensor | None, dropout: float
) -> Tensor:
    """`(N, L, D)` and `(N, S, D)` twice to `(N, L, D)`, by the formula."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if keep is not None:
        scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    probs = F.dropout(scores.softmax(-1), dropout)
    return (probs @ v).transpose(1, 2).flatten(-2)

"""A decoder's cross-attention to encoded images.

It either projects an image's K/V once, or moves both projections to the query's side:
`q . (W e + b)` is `(q W) . e` up to a constant that softmax removes, and `sum_s p_s (W e_s + b)` is
`W (sum_s p_s e_s) + b`. Then nothing is projected for an image and all layers read the same small
`(S, W)` matrix, a 24th of all layers' K/V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.ops.few_rows import few_rows_linears, reads_in_place

Pair = tuple[Tensor, Tensor]  # weight and bias
_TILE = 32  # states, so that they fill whole tiles on either side of a product


@dataclass(frozen=True)
class LayerWeights:
    qkv: Pair
    self_out: Pair
    self_norm: Pair
    query: Pair
    key_value: Pair
    cross_out: Pair
    cross_norm: Pair
    up: Pair
    down: Pair
    norm: Pair


class ImageAttention(Protocol):
    """Cross-attention of `q (B, H, n, head_dim)` in one layer, to `(B, n, D)`."""

    def attend(self, layer: int, q: Tensor) -> Tensor: ...

    def keep(self, images: Tensor) -> None: ...

    def replace(self, images: Tensor, other: Any) -> None: ...

    def append(self, other: Any) -> None: ...


class Absorbed:
    """The projections of K and V moved to the query's side.

    The states are the weights of two few-row layers: of scores, and of means. They are padded to
    whole tiles; padding and masked states have a score of minus infinity. Where `reads_in_place`
    they are kept in both orders, so that both products read them as they lie.
    """

    def __init__(
        self, embeds: Tensor, valid: Tensor | None, layers: list[LayerWeights], num_heads: int
    ) -> None:
        size = embeds.shape[1]
        in_place = reads_in_place(embeds)
        padding = -size % _TILE if in_place else 0
        self.keys = F.pad(embeds, (0, 0, 0, padding))  # (B, S', W)
        self.values = self.keys.transpose(1, 2)  # (B, W, S')
        if in_place:
            self.values = self.values.contiguous()
        self.bias: Tensor | None = None  # (B, S'), added to the scores
        if padding or valid is not None:
            self.bias = embeds.new_zeros(self.keys.shape[:2])
            self.bias[:, size:] = -torch.inf
        if self.bias is not None and valid is not None:
            self.bias[:, :size].masked_fill_(~valid, -torch.inf)
        self.heads = [_head_weights(layer.key_value, num_heads) for layer in layers]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        batch, heads, rows, head_dim = q.shape
        key, value, value_bias = self.heads[layer]
        q = (q * head_dim**-0.5).transpose(0, 1).reshape(heads, batch * rows, head_dim)
        q = few_rows_linears(q, key).view(heads, batch, rows, -1).transpose(0, 1).flatten(1, 2)
        scores = few_rows_linears(q, self.keys, self.bias)  # (B, H n, S')
        seen = few_rows_linears(scores.softmax(-1), self.values)  # (B, H n, W)
        seen = seen.view(batch, heads, rows, -1).transpose(0, 1).flatten(1, 2)
        out = few_rows_linears(seen, value, value_bias)
        return out.view(heads, batch, rows, head_dim).permute(1, 2, 0, 3).flatten(2)

    def keep(self, images: Tensor) -> None:
        self.keys = self.keys.index_select(0, images)
        self.values = self.values.index_select(0, images)
        self.bias = None if self.bias is None else self.bias.index_select(0, images)

    def replace(self, images: Tensor, other: Absorbed) -> None:
        self.keys.index_copy_(0, images, other.keys)
        self.values.index_copy_(0, images, other.values)
        if self.bias is not None and other.bias is not None:
            self.bias.index_copy_(0, images, other.bias)

    def append(self, other: Absorbed) -> None:
        self.keys = torch.cat([self.keys, other.keys])
        self.values = torch.cat([self.values, other.values])
        if self.bias is not None and other.bias is not None:
            self.bias = torch.cat([self.bias, other.bias])


def _head_weights(key_value: Pair, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each head's part: from a query to what is compared with the states, `(H, W, head_dim)`, whose
    bias is a constant under the softmax; and from the mean state to the output, `(H, head_dim, W)`,
    with its bias.
    """
    weight, bias = key_value
    key, value = weight.view(2, num_heads, -1, weight.shape[1])
    key = key.transpose(1, 2)
    if reads_in_place(weight):
        key = key.contiguous()
    return key, value, bias.view(2, num_heads, -1)[1]


class Projected:
    """K and V of every layer, projected once."""

    def __init__(self, key_values: list[tuple[Tensor, Tensor]], bias: Tensor | None) -> None:
        self.key_values = key_values  # (B, H, S, head_dim) each
        self.bias = None if bias is None else bias[:, None]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, *self.key_values[layer], attn_mask=self.bias)
        return out.transpose(1, 2).flatten(2)

    def keep(self, images: Tensor) -> None:
        for i, (k, v) in enumerate(self.key_values):
            self.key_values[i] = (k.index_select(0, images), v.index_select(0, images))
        self.bias = None if self.bias is None else self.bias.index_select(0, images)

    def replace(self, images: Tensor, other: Projected) -> None:
        for ours, its in zip(self.key_values, other.key_values, strict=True):
            for tensor, new in zip(ours, its, strict=True):
                tensor.index_copy_(0, images, new)
        if self.bias is not None and other.bias is not None:
            self.bias.index_copy_(0, images, other.bias)

    def append(self, other: Projected) -> None:
        self.key_values = [
            (torch.cat([k, new_k]), torch.cat([v, new_v]))
            for (k, v), (new_k, new_v) in zip(self.key_values, other.key_values, strict=True)
        ]
        if self.bias is not None and other.bias is not None:
            self.bias = torch.cat([self.bias, other.bias])

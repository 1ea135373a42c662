"""One token at a time through a decoder, without recomputing anything.

- The rows of an image (its beams or samples) are one query block `(B, H, rows, head_dim)`, so that
  an image's cache and states are read once for all of them.
- Self-attention's cache is never reordered: the tokens of all rows of an image share it, and a mask
  says which of them are a row's own past. Beam search moves rows of the mask only.
- Cross-attention either projects an image's K/V once, or moves both projections to the query's
  side: `q . (W e + b)` is `(q W) . e` up to a constant that softmax removes, and
  `sum_s p_s (W e_s + b)` is `W (sum_s p_s e_s) + b`. Then nothing is projected for an image and all
  layers read the same small `(S, W)` matrix, a 24th of all layers' K/V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.errors import ConfigError, ShapeError
from blipfast.models.streams import CrossStates
from blipfast.models.text import CrossAttention, TextLayer, TextTransformer
from blipfast.ops.linear_layers import few_rows_linear, few_rows_linears

Cross = Literal["auto", "absorbed", "projected"]
_Pair = tuple[Tensor, Tensor]  # weight and bias
_TILE = 32  # states, so that they fill whole tiles on either side of a product


@dataclass(frozen=True)
class _LayerWeights:
    qkv: _Pair
    self_out: _Pair
    self_norm: _Pair
    query: _Pair
    key_value: _Pair
    cross_out: _Pair
    cross_norm: _Pair
    up: _Pair
    down: _Pair
    norm: _Pair


class _ImageAttention(Protocol):
    """Cross-attention of `q (B, H, n, head_dim)` in one layer, to `(B, n, D)`."""

    def attend(self, layer: int, q: Tensor) -> Tensor: ...

    def keep(self, images: Tensor) -> None: ...


class _Absorbed:
    """The projections of K and V moved to the query's side.

    The states are the weights of two few-row layers: of scores, and of means. They are padded to
    whole tiles; padding and masked states have a score of minus infinity. Where `_reads_in_place`
    they are kept in both orders, so that both products read them as they lie.
    """

    def __init__(
        self, embeds: Tensor, valid: Tensor | None, layers: list[_LayerWeights], num_heads: int
    ) -> None:
        size = embeds.shape[1]
        in_place = _reads_in_place(embeds)
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


def _reads_in_place(weight: Tensor) -> bool:
    """Whether a few-row layer reads its weight as it lies, so that its order is worth a copy."""
    return weight.is_cpu and weight.dtype == torch.bfloat16


def _head_weights(key_value: _Pair, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each head's part: from a query to what is compared with the states, `(H, W, head_dim)`, whose
    bias is a constant under the softmax; and from the mean state to the output, `(H, head_dim, W)`,
    with its bias.
    """
    weight, bias = key_value
    key, value = weight.view(2, num_heads, -1, weight.shape[1])
    key = key.transpose(1, 2)
    if _reads_in_place(weight):
        key = key.contiguous()
    return key, value, bias.view(2, num_heads, -1)[1]


class _Projected:
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


class IncrementalDecoder:
    """A decoder over the images of `states`, with `rows` sequences for each.

    Call `prefill` once, then `step` for each token. Dropout is off whatever the module's mode.
    Under autocast the weights are converted once, here; a model converted beforehand saves that.

    cross: "projected" K/V, "absorbed" projections, or "auto": what was projected before is used;
    else absorbed while it costs no more arithmetic than projecting would.
    Raises ConfigError when the decoder has no LM head, cross-attention of another kind, or not
    enough positions; ShapeError when the states do not fit it.
    """

    def __init__(
        self,
        decoder: TextTransformer,
        states: CrossStates,
        *,
        rows: int,
        max_length: int,
        cross: Cross = "auto",
    ) -> None:
        _check(decoder, states, max_length)
        self.config = decoder.config
        self.num_images, self.rows, self.max_length = states.size, rows, max_length
        self.dtype = _compute_dtype(decoder)
        self._layers = [_weights(layer, self.dtype) for layer in decoder.layers]
        assert decoder.lm_head is not None
        self._word = decoder.embeddings.word.weight
        self._positions = decoder.embeddings.position.weight
        self._embed_norm = _pair(decoder.embeddings.norm, self.dtype)
        self._head = [_pair(m, self.dtype) for m in (decoder.lm_head.dense, decoder.lm_head.norm)]
        self._vocab = _pair(decoder.lm_head.decoder, self.dtype)
        self._cross = self._image_attention(states, cross)
        self._cache: list[tuple[Tensor, Tensor]] = []
        self._mask: Tensor | None = None  # (B, rows, slots), 0 where a row may look, else -inf
        self._slots = self._length = 0

    def prefill(self, prompt_ids: Tensor) -> Tensor:
        """`prompt_ids (B, P)`, the same length for all, to the next token's logits `(B, V)`."""
        length = prompt_ids.shape[1]
        self._allocate(prompt_ids.device, length)
        causal = None
        if length > 1:
            causal = torch.full((length, length), -torch.inf, dtype=self.dtype).triu(1)
            causal = causal.to(prompt_ids.device)
        hidden = self._run(prompt_ids, slice(0, length), causal)
        self._slots = self._length = length
        return self._logits(hidden[:, -1])

    def step(self, token_ids: Tensor, parents: Tensor | None = None) -> Tensor:
        """The newest tokens `(B, rows)` to the next tokens' logits `(B, rows, V)`.

        parents: `(B, rows)`, the row that each row continues; None when each continues itself.
        """
        start, stop = self._slots, self._slots + self.rows
        mask = None
        if self._mask is not None:
            if parents is not None:
                index = parents[:, :, None].expand(-1, -1, self._mask.shape[2])
                self._mask = self._mask.gather(1, index)
            self._mask[:, :, start:stop].diagonal(dim1=1, dim2=2).zero_()
            mask = self._mask[:, None, :, :stop]
        hidden = self._run(token_ids, slice(start, stop), mask)
        self._slots, self._length = stop, self._length + 1
        return self._logits(hidden.flatten(0, 1)).unflatten(0, token_ids.shape)

    def keep(self, images: Tensor) -> None:
        """Goes on with the images at these indices only."""
        self.num_images = images.shape[0]
        self._cross.keep(images)
        self._cache = [
            (k.index_select(0, images), v.index_select(0, images)) for k, v in self._cache
        ]
        if self._mask is not None:
            self._mask = self._mask.index_select(0, images)

    def _allocate(self, device: torch.device, prompt_length: int) -> None:
        heads, width = self.config.num_heads, self.config.hidden_size
        slots = prompt_length + self.rows * (self.max_length - prompt_length)
        shape = (self.num_images, heads, slots, width // heads)
        self._cache = [
            (
                torch.empty(shape, dtype=self.dtype, device=device),
                torch.empty(shape, dtype=self.dtype, device=device),
            )
            for _ in self._layers
        ]
        if self.rows > 1:
            mask = (self.num_images, self.rows, slots)
            self._mask = torch.full(mask, -torch.inf, dtype=self.dtype, device=device)
            self._mask[:, :, :prompt_length] = 0

    def _run(self, token_ids: Tensor, slots: slice, mask: Tensor | None) -> Tensor:
        """Tokens `(B, n)` that take the cache's `slots`, to hidden states `(B, n, D)`."""
        width, heads = self.config.hidden_size, self.config.num_heads
        eps = self.config.layer_norm_eps
        # In prefill the n tokens follow each other; in a step they all have the same place.
        count = token_ids.shape[1] if self._length == 0 else 1
        place = self._positions[self._length : self._length + count]
        x = (F.embedding(token_ids, self._word) + place).to(self.dtype)
        x = torch.layer_norm(x, (width,), *self._embed_norm, eps)
        for i, layer in enumerate(self._layers):
            qkv = few_rows_linear(x, *layer.qkv).view(*token_ids.shape, 3, heads, width // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, n, head_dim) each
            keys, values = self._cache[i]
            keys[:, :, slots], values[:, :, slots] = k, v
            out = F.scaled_dot_product_attention(
                q, keys[:, :, : slots.stop], values[:, :, : slots.stop], attn_mask=mask
            )
            out = few_rows_linear(out.transpose(1, 2).flatten(2), *layer.self_out)
            x = torch.layer_norm(x + out, (width,), *layer.self_norm, eps)
            q = few_rows_linear(x, *layer.query).view(*token_ids.shape, heads, width // heads)
            out = few_rows_linear(self._cross.attend(i, q.transpose(1, 2)), *layer.cross_out)
            x = torch.layer_norm(x + out, (width,), *layer.cross_norm, eps)
            out = few_rows_linear(few_rows_linear(x, *layer.up, gelu=True), *layer.down)
            x = torch.layer_norm(x + out, (width,), *layer.norm, eps)
        return x

    def _logits(self, hidden: Tensor) -> Tensor:
        dense, norm = self._head
        x = few_rows_linear(hidden, *dense, gelu=True)
        x = F.layer_norm(x, (self.config.hidden_size,), *norm, self.config.layer_norm_eps)
        logits = few_rows_linear(x, *self._vocab)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return logits.to(dtype)

    def _image_attention(self, states: CrossStates, cross: Cross) -> _ImageAttention:
        embeds = states.embeds[0].to(self.dtype)
        valid = None
        if states.lengths is not None:
            places = torch.arange(embeds.shape[1], device=embeds.device)
            valid = places < states.lengths[:, None]
        if cross == "auto":
            head_dim = self.config.hidden_size // self.config.num_heads
            cheaper = self.rows * self.max_length <= head_dim
            cross = "absorbed" if states.layers is None and cheaper else "projected"
        if cross == "absorbed":
            return _Absorbed(embeds, valid, self._layers, self.config.num_heads)
        bias = None
        if valid is not None:
            bias = embeds.new_zeros(valid.shape).masked_fill(~valid, -torch.inf)[:, None]
        if states.layers is not None:
            done = [(k.to(self.dtype), v.to(self.dtype)) for ((k, v),) in states.layers]
            return _Projected(done, bias)
        heads = self.config.num_heads
        projected = []
        for layer in self._layers:
            kv = F.linear(embeds, *layer.key_value).unflatten(-1, (2, heads, -1))
            k, v = kv.permute(2, 0, 3, 1, 4)
            projected.append((k, v))
        return _Projected(projected, bias)


def _pair(module: nn.Module, dtype: torch.dtype) -> _Pair:
    return module.weight.to(dtype), module.bias.to(dtype)  # type: ignore[operator, return-value]


def _weights(layer: nn.Module, dtype: torch.dtype) -> _LayerWeights:
    layer = cast(TextLayer, layer)
    cross = cast(CrossAttention, layer.cross_attention)
    modules = (
        layer.self_attention.qkv,
        layer.self_attention.out.dense,
        layer.self_attention.out.norm,
        cross.attention.query,
        cross.attention.key_value,
        cross.out.dense,
        cross.out.norm,
        layer.feed_forward.intermediate,
        layer.feed_forward.out.dense,
        layer.feed_forward.out.norm,
    )
    return _LayerWeights(*(_pair(module, dtype) for module in modules))


def _compute_dtype(decoder: TextTransformer) -> torch.dtype:
    weight = decoder.embeddings.word.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _check(decoder: TextTransformer, states: CrossStates, max_length: int) -> None:
    if decoder.lm_head is None:
        raise ConfigError("this text transformer has no LM head, so it cannot generate")
    cross = decoder.layers[0].cross_attention
    if not isinstance(cross, CrossAttention) or len(states.embeds) != 1:
        raise ConfigError("generation needs a decoder with one cross-attention per layer")
    if max_length > decoder.config.max_positions:
        raise ConfigError(
            f"max_length {max_length} exceeds the model's {decoder.config.max_positions} positions"
        )
    width = cross.attention.key_value.in_features
    if states.embeds[0].shape[-1] != width:
        raise ShapeError(
            f"the decoder looks at states of width {width}, got {tuple(states.embeds[0].shape)}"
        )

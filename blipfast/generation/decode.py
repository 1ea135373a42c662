"""One token at a time through a decoder, without recomputing anything.

- The rows of an image (its beams or samples) are one query block `(B, H, rows, head_dim)`, so that
  an image's cache and states are read once for all of them.
- Self-attention's cache is never reordered: the tokens of all rows of an image share it, and a mask
  says which of them are a row's own past. Beam search moves rows of the mask only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.errors import ConfigError, ShapeError
from blipfast.generation.image_attention import (
    Absorbed,
    ImageAttention,
    LayerWeights,
    Pair,
    Projected,
)
from blipfast.models.streams import CrossStates
from blipfast.models.text import CrossAttention, TextLayer, TextTransformer
from blipfast.ops.few_rows import few_rows_linear
from blipfast.ops.linear_layers import linear

Cross = Literal["auto", "absorbed", "projected"]
_Write = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


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
        hidden = self._run(
            prompt_ids, self._positions[:length], causal, self._writer(slice(0, length))
        )
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
        place = self._positions[self._length]
        hidden = self._run(token_ids, place, mask, self._writer(slice(start, stop)))
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

    def _writer(self, slots: slice) -> _Write:
        """Puts a layer's new keys and values into the cache's `slots`, the same of all images."""

        def write(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = self._cache[layer]
            keys[:, :, slots], values[:, :, slots] = k, v
            return keys[:, :, : slots.stop], values[:, :, : slots.stop]

        return write

    def _run(self, token_ids: Tensor, place: Tensor, mask: Tensor | None, write: _Write) -> Tensor:
        """Tokens `(B, n)` to hidden states `(B, n, D)`.

        place: their position embeddings, to be added to `(B, n, D)`. write: puts a layer's keys and
        values `(B, H, n, head_dim)` into the cache and gives all that is to be looked at.
        """
        width, heads = self.config.hidden_size, self.config.num_heads
        eps = self.config.layer_norm_eps
        x = (F.embedding(token_ids, self._word) + place).to(self.dtype)
        x = torch.layer_norm(x, (width,), *self._embed_norm, eps)
        for i, layer in enumerate(self._layers):
            qkv = few_rows_linear(x, *layer.qkv).view(*token_ids.shape, 3, heads, width // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, n, head_dim) each
            out = F.scaled_dot_product_attention(q, *write(i, k, v), attn_mask=mask)
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

    def _image_attention(self, states: CrossStates, cross: Cross) -> ImageAttention:
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
            return Absorbed(embeds, valid, self._layers, self.config.num_heads)
        bias = None
        if valid is not None:
            bias = embeds.new_zeros(valid.shape).masked_fill(~valid, -torch.inf)[:, None]
        if states.layers is not None:
            done = [(k.to(self.dtype), v.to(self.dtype)) for ((k, v),) in states.layers]
            return Projected(done, bias)
        heads = self.config.num_heads
        projected = []
        for layer in self._layers:
            kv = linear(embeds, *layer.key_value).unflatten(-1, (2, heads, -1))
            k, v = kv.permute(2, 0, 3, 1, 4)
            projected.append((k, v))
        return Projected(projected, bias)


def _pair(module: nn.Module, dtype: torch.dtype) -> Pair:
    return module.weight.to(dtype), module.bias.to(dtype)  # type: ignore[operator, return-value]


def _weights(layer: nn.Module, dtype: torch.dtype) -> LayerWeights:
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
    return LayerWeights(*(_pair(module, dtype) for module in modules))


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

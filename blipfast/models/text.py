"""MED, the multimodal mixture of encoder-decoder (BLIP, section 3.1): a BERT-like text transformer.

- One layer is self-attention, then cross-attention to an image, then the feed-forward network, each
  closed by a residual and a LayerNorm (post-LN).
- Texts are packed: no layer computes on padding. `Packing` says where each text lies.
- K/V of an image are projected once per layer, whoever looks at it (`CrossStates`).
- Texts of several kinds go through the layers together (`streams.run_streams`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.errors import ShapeError
from blipfast.models.config import Sharing, TextConfig
from blipfast.models.streams import CrossStates, KeyValue, TextStream, cross_module
from blipfast.ops.absorbed_attention import absorbed_cross_attention, absorbs
from blipfast.ops.attention import CrossPlan, cross_attention, varlen_attention
from blipfast.ops.autocast_copies import cast_together
from blipfast.ops.layer_norm import LayerNorm
from blipfast.ops.linear_layers import Linear, feed_forward
from blipfast.ops.packing import Packing, SharedPrefixes
from blipfast.ops.seeded_dropout import dropout
from blipfast.ops.split_heads import split_heads


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_positions, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, input_ids: Tensor, positions: Tensor, words: Tensor | None = None) -> Tensor:
        word = self.word(input_ids) if words is None else F.embedding(input_ids, words)
        x = self.norm(word + self.position(positions))
        return dropout(x, self.dropout, self.training)


class Residual(nn.Module):
    """Output projection, dropout, residual and LayerNorm, which close every sublayer."""

    def __init__(self, config: TextConfig, in_features: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.dense = Linear(in_features, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.close(self.dense(x), residual)

    def close(self, projected: Tensor, residual: Tensor) -> Tensor:
        return self.norm.add(residual, projected, self.dropout)[1]


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_dropout = config.attention_dropout
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = Residual(config, config.hidden_size)

    def project(self, hidden: Tensor) -> Tensor:
        """`(..., D)` to q, k and v, `(..., 3, H, head_dim)`."""
        return self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1))

    def forward(
        self,
        hidden: Tensor,
        packing: Packing,
        causal: bool,
        prefixes: SharedPrefixes | None = None,
    ) -> Tensor:
        dropout_p = self.attention_dropout if self.training else 0.0
        held = cast_together(self.qkv, self.out.dense)
        qkv = self.project(hidden)
        if prefixes is not None:
            qkv, packing = qkv.index_select(0, prefixes.nodes), prefixes.texts
        out = varlen_attention(qkv, packing, causal=causal, dropout_p=dropout_p)
        if prefixes is not None:
            out = out.index_select(0, prefixes.first)
        closed = self.out(out.flatten(-2), hidden)
        del held
        return closed


class _ImageAttention(nn.Module):
    """Query and key/value projections of cross-attention, without its output."""

    def __init__(self, config: TextConfig, cross_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_dropout = config.attention_dropout
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key_value = Linear(cross_width, 2 * config.hidden_size)

    def project(self, embeds: Tensor) -> KeyValue:
        """`(B, S, cross_width)` to K and V."""
        kv = self.key_value(embeds).unflatten(-1, (2, self.num_heads, -1))
        k, v = split_heads(kv)
        return k, v

    def forward(
        self, hidden: Tensor, embeds: Tensor, plan: CrossPlan, kv: KeyValue | None
    ) -> Tensor:
        q = self.query(hidden).unflatten(-1, (self.num_heads, -1))
        layer = self.key_value
        if kv is None and not self.training and absorbs(q, embeds, layer.weight, plan):
            out = absorbed_cross_attention(q, embeds, layer.weight, layer.bias, plan)
            return out.flatten(-2)
        dropout_p = self.attention_dropout if self.training else 0.0
        k, v = self.project(embeds) if kv is None else kv
        return cross_attention(q, k, v, plan, dropout_p=dropout_p).flatten(-2)


class CrossAttention(nn.Module):
    def __init__(self, config: TextConfig, cross_width: int) -> None:
        super().__init__()
        self.attention = _ImageAttention(config, cross_width)
        self.out = Residual(config, config.hidden_size)

    def project(self, embeds: Sequence[Tensor]) -> tuple[KeyValue, ...]:
        return (self.attention.project(embeds[0]),)

    def forward(
        self,
        hidden: Tensor,
        embeds: Sequence[Tensor],
        plan: CrossPlan,
        kv: Sequence[KeyValue | None],
    ) -> Tensor:
        """Attention to `embeds`, one tensor; kv: what `project` made of them before, or None."""
        held = cast_together(self.attention.query, self.out.dense)
        closed = self.out(self.attention(hidden, embeds[0], plan, kv[0]), hidden)
        del held
        return closed


class PairedCrossAttention(nn.Module):
    """NLVR2's block (section 5.4): one cross-attention for each of two images, outputs merged.

    merge: the two outputs are concatenated and merged by a linear layer; else they are averaged.
    """

    def __init__(self, config: TextConfig, cross_width: int, merge: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.attentions = nn.ModuleList(_ImageAttention(config, cross_width) for _ in range(2))
        self.dense = nn.ModuleList(Linear(width, width) for _ in range(2))
        self.merge = Linear(2 * width, width) if merge else None
        self.dropout = config.dropout
        self.norm = LayerNorm(width, eps=config.layer_norm_eps)

    def project(self, embeds: Sequence[Tensor]) -> tuple[KeyValue, ...]:
        pairs = zip(self.attentions, embeds, strict=True)
        return tuple(attention.project(x) for attention, x in pairs)  # type: ignore[operator]

    def forward(
        self,
        hidden: Tensor,
        embeds: Sequence[Tensor],
        plan: CrossPlan,
        kv: Sequence[KeyValue | None],
    ) -> Tensor:
        """As of `CrossAttention`, to two tensors."""
        parts = zip(self.attentions, self.dense, embeds, kv, strict=True)
        first, second = (
            dense(attention(hidden, its, plan, kv_i)) for attention, dense, its, kv_i in parts
        )
        if self.merge is None:
            merged = (first + second) / 2
        else:
            merged = self.merge(torch.cat([first, second], dim=-1))
        return self.norm.add(hidden, merged, self.dropout)[1]


class FeedForward(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.intermediate = Linear(config.hidden_size, config.intermediate_size)
        self.out = Residual(config, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        held = cast_together(self.intermediate, self.out.dense)
        closed = self.out.close(feed_forward(hidden, self.intermediate, self.out.dense), hidden)
        del held
        return closed


class TextLayer(nn.Module):
    def __init__(self, config: TextConfig, cross: nn.Module | None) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.cross_attention = cross
        self.feed_forward = FeedForward(config)


class LMHead(nn.Module):
    """BERT's prediction head; the output embedding is the input embedding (section 3.1)."""

    def __init__(self, config: TextConfig, word: nn.Embedding) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        self.decoder.weight = word.weight

    def transform(self, hidden: Tensor) -> Tensor:
        """All but the last projection, which the loss fuses with the softmax."""
        return self.norm(F.gelu(self.dense(hidden)))

    def forward(self, hidden: Tensor) -> Tensor:
        """`(..., D)` to logits `(..., V)`."""
        return self.decoder(self.transform(hidden))


class TextTransformer(nn.Module):
    """Embeddings and layers; with `lm_head` a decoder.

    cross_width: width of what cross-attention looks at; None leaves it out.
    paired: two cross-attentions per layer (NLVR2), merged linearly from the layer `merge_from` on.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        cross_width: int | None,
        lm_head: bool = False,
        paired: bool = False,
        merge_from: int = 6,
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # layers compute their activations again in backward
        self.embeddings = Embeddings(config)

        def cross(i: int) -> nn.Module | None:
            if cross_width is None:
                return None
            if paired:
                return PairedCrossAttention(config, cross_width, merge=i >= merge_from)
            return CrossAttention(config, cross_width)

        self.layers = nn.ModuleList(TextLayer(config, cross(i)) for i in range(config.num_layers))
        self.apply(_init_weights)
        self.lm_head = LMHead(config, self.embeddings.word) if lm_head else None
        if self.lm_head is not None:
            _init_weights(self.lm_head.dense)
            nn.init.zeros_(self.lm_head.decoder.bias)

    def share(self, other: TextTransformer, sharing: Sharing) -> None:
        """Makes this decoder use `other`'s modules, as table 3 of the paper names them."""
        if sharing == "nothing":
            return
        self.embeddings = other.embeddings
        if self.lm_head is not None:
            self.lm_head.decoder.weight = other.embeddings.word.weight
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.feed_forward = theirs.feed_forward
            if sharing != "all_but_cross_attention":
                mine.cross_attention = theirs.cross_attention
            if sharing != "all_but_self_attention":
                mine.self_attention = theirs.self_attention

    def stream(
        self,
        input_ids: Tensor,
        packing: Packing,
        *,
        words: Tensor | None = None,
        prefixes: SharedPrefixes | None = None,
        **options: object,
    ) -> TextStream:
        """A `TextStream` of packed `input_ids (T,)`; raises ShapeError if a text is too long.

        words: `(U, D)` word embeddings looked up before, which `input_ids` then number.
        prefixes: of texts whose common prefixes exist once; `input_ids` are then their nodes'.
        """
        texts = packing if prefixes is None else prefixes.texts
        if texts.max_seqlen > self.config.max_positions:
            raise ShapeError(
                f"a text has {texts.max_seqlen} tokens, but the model "
                f"{self.config.max_positions} positions: truncate it when tokenising"
            )
        positions = packing.positions if prefixes is None else prefixes.positions
        hidden = self.embeddings(input_ids, positions, words)
        return TextStream(
            self.layers,
            hidden,
            packing,
            prefixes=prefixes,
            recompute=self.gradient_checkpointing and self.training,
            **options,  # type: ignore[arg-type]
        )

    def cross_states(
        self, *embeds: Tensor, lengths: Tensor | None = None, project: bool = False
    ) -> CrossStates:
        """What this transformer's cross-attention will look at, see `CrossStates`.

        project: compute every layer's K/V now, to be used again and again without gradients.
        """
        states = CrossStates(embeds, lengths)
        if not project:
            return states
        layers = [cross_module(layer).project(embeds) for layer in self.layers]  # type: ignore[operator]
        return replace(states, layers=tuple(layers))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)

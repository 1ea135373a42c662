"""The trunk that every task is built on: image encoder, MED encoder and decoder, and the heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.errors import ConfigError, ShapeError
from blipfast.models.config import BlipConfig, TextConfig
from blipfast.models.streams import CrossStates, TextStream, run_streams
from blipfast.models.text import LMHead, TextTransformer
from blipfast.models.vit import VisionTransformer
from blipfast.ops.device_packing import DevicePacking
from blipfast.ops.packing import Index, Packing
from blipfast.ops.tied_table import TiedTable


@dataclass(frozen=True)
class WordRows:
    """The word embeddings of a batch, looked up once for all passes over its texts.

    token_ids: `(T + special,)`, the texts' tokens and then the special ones. rows: theirs,
    `(T + special, D)`. places: the row of each special one.
    table: what they were looked up in, which may weigh the output too.
    """

    token_ids: Tensor
    rows: Tensor
    places: dict[int, int]
    table: TiedTable


@dataclass(frozen=True)
class PackedText:
    """Texts without padding: `input_ids (T,)` and where each text lies in them.

    words: rows looked up before, which `input_ids` then number instead of the vocabulary's.
    """

    input_ids: Tensor
    packing: Packing
    words: WordRows | None = None

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor) -> PackedText:
        """From right-padded `(N, L)` ids and mask. Raises ShapeError when they disagree.

        The host must know the lengths: a mask on the CPU, whatever the ids' device, saves a wait.
        """
        if input_ids.shape != attention_mask.shape:
            raise ShapeError(
                f"input_ids {tuple(input_ids.shape)} and attention_mask "
                f"{tuple(attention_mask.shape)} must have the same shape (N, L)"
            )
        packing = Packing.from_mask(attention_mask, input_ids.device)
        if 0 in packing.lengths:
            empty = packing.lengths.index(0)
            raise ShapeError(f"text {empty} of the batch has no tokens at all")
        return cls(packing.unpad(input_ids), packing)

    @classmethod
    def of(cls, input_ids: Tensor | PackedText, attention_mask: Tensor | None) -> PackedText:
        """What is packed already, or `from_padded`. Raises ShapeError where a mask is missing."""
        if isinstance(input_ids, PackedText):
            return input_ids
        if attention_mask is None:
            raise ShapeError("padded input_ids (N, L) need an attention_mask (N, L)")
        return cls.from_padded(input_ids, attention_mask)

    @classmethod
    def with_room(cls, input_ids: Tensor, lengths: Tensor, room: int) -> PackedText:
        """From right-padded `(N, L)` ids and lengths `(N,)` on their device, which the host need
        not know: into `room` tokens, which they must not exceed (`ops.device_packing`).
        """
        packing = DevicePacking.with_room(lengths, room, input_ids.shape[1])
        starts = torch.arange(len(input_ids), device=input_ids.device) * input_ids.shape[1]
        return cls(input_ids.flatten()[packing.tokens_from(starts)], packing)

    def looked_up(self, word: nn.Embedding, special: Sequence[int]) -> PackedText:
        """The same texts with their words looked up, and the tokens they may start with."""
        table = TiedTable(word.weight)
        extra = [self.input_ids.new_full((1,), token_id) for token_id in special]
        token_ids = torch.cat([self.input_ids, *extra])
        total = self.packing.total
        places = {token_id: total + i for i, token_id in enumerate(special)}
        numbers = torch.arange(total, device=self.input_ids.device)
        return PackedText(
            numbers, self.packing, WordRows(token_ids, table.look_up(token_ids), places, table)
        )

    def with_words_of(self, other: PackedText) -> tuple[PackedText, PackedText]:
        """These texts, and `other`'s plain ones, with the words of both looked up."""
        if self.words is None:
            return self, other
        mine = self.words
        table = mine.table
        words = WordRows(
            torch.cat([mine.token_ids, other.input_ids]),
            torch.cat([mine.rows, table.look_up(other.input_ids)]),
            mine.places,
            table,
        )
        numbers = torch.arange(other.packing.total, device=other.input_ids.device)
        joined = PackedText(numbers + len(mine.token_ids), other.packing, words)
        return replace(self, words=words), joined

    def without_words(self) -> PackedText:
        """The same texts with the vocabulary's numbers."""
        if self.words is None:
            return self
        return PackedText(self.words.token_ids[self.input_ids], self.packing)

    def starting_with(self, token_id: int) -> PackedText:
        """The same texts with their first token replaced: [CLS], [ENC] or [DEC] choose the mode."""
        first = self.words.places[token_id] if self.words else token_id
        ids = self.input_ids.index_fill(0, self.packing.first_tokens, first)
        return replace(self, input_ids=ids)

    def select(self, index: Index) -> PackedText:
        """The texts at `index`, repeats allowed."""
        if isinstance(index, range) and index == range(self.packing.num_sequences):
            return self
        packing, tokens = self.packing.select(index)
        return PackedText(self.input_ids[tokens], packing, self.words)

    def shifted(self) -> tuple[PackedText, Tensor]:
        """For next-token prediction: the texts without their last tokens, and `(T - N,)` labels.

        A last token predicts nothing and, under a causal mask, no other token sees it.
        """
        shorter, keep = self.packing.without_last()
        shortened = PackedText(self.input_ids[keep], shorter, self.words)
        labels = self.input_ids[keep + 1]
        labels = self.words.token_ids[labels] if self.words else labels
        real = shorter.in_sequences
        return shortened, labels if real is None else labels.masked_fill(~real, -100)

    def __add__(self, other: PackedText) -> PackedText:
        """Both, one after the other; words looked up must be the same."""
        if self.words is not other.words:
            raise ShapeError("texts whose words were looked up apart cannot be joined")
        ids = torch.cat([self.input_ids, other.input_ids])
        return PackedText(ids, self.packing + other.packing, self.words)


class Blip(nn.Module):
    """Image encoder and the parts of MED that a task asks for (BLIP, section 3.1, figure 2).

    text_encoder: "grounded" looks at images, "paired" at two images per text (NLVR2), "unimodal" at
    nothing (a momentum twin); None is absent.
    text_decoder: looks at the "image", or at the encoded "question" (VQA); None is absent.
    contrastive: projections into the space of ITC, and its learned temperature.
    num_classes: outputs of the matching head over [ENC]; None is absent.
    """

    def __init__(
        self,
        config: BlipConfig,
        *,
        text_encoder: Literal["grounded", "paired", "unimodal"] | None = "grounded",
        text_decoder: Literal["image", "question"] | None = None,
        contrastive: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        text, image_width = config.text, config.vision.hidden_size
        self.visual_encoder = VisionTransformer(config.vision)
        self.text_encoder = self.text_decoder = None
        if text_encoder is not None:
            width = None if text_encoder == "unimodal" else image_width
            paired = text_encoder == "paired"
            self.text_encoder = TextTransformer(text, cross_width=width, paired=paired)
        if text_decoder is not None:
            width = image_width if text_decoder == "image" else text.hidden_size
            self.text_decoder = TextTransformer(text, cross_width=width, lm_head=True)
        if contrastive:
            self.vision_proj = nn.Linear(image_width, config.embed_dim)
            self.text_proj = nn.Linear(text.hidden_size, config.embed_dim)
            self.temp = nn.Parameter(torch.tensor(config.temperature))
        if num_classes is not None:
            self.itm_head = nn.Linear(text.hidden_size, num_classes)

    @property
    def text_config(self) -> TextConfig:
        return self.config.text

    @property
    def encoder(self) -> TextTransformer:
        """The text encoder of a model that has one."""
        return _required(self.text_encoder, "text encoder")

    @property
    def decoder(self) -> TextTransformer:
        """The text decoder of a model that has one."""
        return _required(self.text_decoder, "text decoder")

    @property
    def lm_head(self) -> LMHead:
        """The decoder's prediction head."""
        return _required(self.decoder.lm_head, "prediction head")

    def checkpoint_gradients(self) -> None:
        """From now on no layer keeps activations for the backward pass: it computes them again."""
        for module in self.modules():
            if isinstance(module, VisionTransformer):
                module.gradient_checkpointing = len(module.blocks)
            elif isinstance(module, TextTransformer):
                module.gradient_checkpointing = True

    def encode_image(self, pixel_values: Tensor, *, first_only: bool = False) -> Tensor:
        """`(B, 3, image_size, image_size)` to `image_embeds (B, S, D)`; the CLS token's `(B, 1, D)`
        with `first_only`, which is all that `image_features` looks at.
        """
        return self.visual_encoder(pixel_values, first_only=first_only)

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """Unit vectors `(B, embed_dim)` of the CLS tokens, in the contrastive space."""
        return F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)

    def text_features(self, text: PackedText) -> Tensor:
        """Unit vectors `(N, embed_dim)` of texts encoded on their own, starting with [CLS]."""
        return F.normalize(self.text_proj(self.encode_text(text, first_only=True)), dim=-1)

    def encode_text(self, text: PackedText, *, first_only: bool = False) -> Tensor:
        """Unimodal text encoder: `(T, D)`, or the first tokens' `(N, D)`."""
        text = text.starting_with(self.text_config.cls_token_id)
        return run_streams([_stream(self.encoder, text, first_only=first_only)])[0]

    def grounded_stream(
        self, text: PackedText, kv_index: Index, *, first_only: bool = False
    ) -> TextStream:
        """Texts to be encoded in the light of the images they name, starting with [ENC]."""
        text = text.starting_with(self.text_config.enc_token_id)
        return _stream(self.encoder, text, kv_index=kv_index, first_only=first_only)

    def decoder_stream(self, text: PackedText, kv_index: Index) -> TextStream:
        """Texts to be decoded in the light of what they name, starting with [DEC]."""
        text = text.starting_with(self.text_config.dec_token_id)
        return _stream(self.decoder, text, kv_index=kv_index, causal=True)

    def match(self, text: PackedText, states: CrossStates, kv_index: Index) -> Tensor:
        """ITM logits `(N, 2)` of each text with the image it names; class 1 is a match."""
        stream = self.grounded_stream(text, kv_index, first_only=True)
        return self.itm_head(run_streams([stream], states)[0])

    def image_states(
        self,
        image_embeds: Tensor,
        *,
        decoder: bool = False,
        project: bool = False,
    ) -> CrossStates:
        """What the encoder (or the decoder) looks at, `image_embeds (B, S, D)`.

        project: K/V of all layers now, for use without gradients by many texts in several calls.
        """
        module = self.decoder if decoder else self.encoder
        return module.cross_states(image_embeds, project=project)


def _stream(transformer: TextTransformer, text: PackedText, **options: Any) -> TextStream:
    rows = text.words.rows if text.words else None
    return transformer.stream(text.input_ids, text.packing, words=rows, **options)


_Module = TypeVar("_Module", bound=nn.Module)


def _required(module: _Module | None, part: str) -> _Module:
    if module is None:
        raise ConfigError(f"this model was built without a {part}")
    return module

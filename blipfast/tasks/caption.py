"""Captioning: the image-grounded decoder with a prompt (section 5.2). Also CapFilt's captioner."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.generation import Generation, evaluation, generate, generate_stream
from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig
from blipfast.models.streams import run_streams
from blipfast.objectives.lm import lm_loss


@dataclass
class CaptionOutput:
    """The LM loss (scalar)."""

    loss_lm: Tensor

    @property
    def loss(self) -> Tensor:
        return self.loss_lm

    def losses(self) -> dict[str, Tensor]:
        return {"lm": self.loss_lm}


class BlipForCaptioning(Blip):
    """Image encoder and text decoder. label_smoothing: of LM."""

    def __init__(self, config: BlipConfig, *, label_smoothing: float = 0.1) -> None:
        super().__init__(config, text_encoder=None, text_decoder="image")
        self.label_smoothing = label_smoothing

    def decode(self, image_embeds: Tensor, text: PackedText) -> Tensor:
        """Teacher forcing: hidden states `(T, D)` of text n decoded for image n."""
        stream = self.decoder_stream(text, range(text.packing.num_sequences))
        return run_streams([stream], self.image_states(image_embeds, decoder=True))[0]

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        prompt_length: int = 0,
    ) -> CaptionOutput:
        """The LM loss of one caption per image.

        pixel_values: `(B, 3, size, size)`. input_ids, attention_mask: `(B, L)`, right-padded, the
        prompt included. prompt_length: tokens at the start ([DEC] and the prompt) that are given
        rather than learnt.
        """
        text = PackedText.from_padded(input_ids, attention_mask)
        inputs, labels = text.shifted()
        hidden = self.decode(self.encode_image(pixel_values), inputs)
        labels = labels.masked_fill(inputs.packing.positions < prompt_length - 1, -100)
        return CaptionOutput(
            lm_loss(hidden, labels, self.lm_head, label_smoothing=self.label_smoothing)
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        *,
        image_embeds: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        **options: Any,
    ) -> Generation:
        """Captions of images, from `pixel_values (B, 3, size, size)` or `image_embeds (B, S, D)`.

        prompt_ids: `(P,)` for all images or `(B, P)`, as tokenised ("a picture of " in the paper)
        but without the closing [SEP]; the first token becomes [DEC]. None is [DEC] alone.
        options: those of `blipfast.generation.generate`; defaults are beam 3, max 20, min 5.
        Dropout and stochastic depth are off, whatever the module's mode.
        Raises ConfigError for an option that cannot be, ShapeError for images that do not fit.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ShapeError("give either pixel_values or image_embeds")
        if pixel_values is not None:
            with evaluation(self.visual_encoder):
                image_embeds = self.encode_image(pixel_values)
        assert image_embeds is not None
        states = self.image_states(image_embeds, decoder=True)
        return generate(self.decoder, states, self._prompt(prompt_ids), **options)

    @torch.no_grad()
    def generate_stream(
        self,
        images: Iterable[Tensor],
        *,
        prompt_ids: Tensor | None = None,
        in_flight: int,
        **options: Any,
    ) -> Generation:
        """`generate` for batches of images `(B, 3, size, size)`, encoded as there is room for them.

        prompt_ids: `(P,)`. in_flight, options: see `blipfast.generation.generate_stream`.
        """
        with evaluation(self.visual_encoder):
            states = (
                self.image_states(self.encode_image(pixels), decoder=True) for pixels in images
            )
            return generate_stream(
                self.decoder, states, self._prompt(prompt_ids), in_flight=in_flight, **options
            )

    def _prompt(self, prompt_ids: Tensor | None) -> Tensor:
        """Token ids whose first is [DEC], as it is alone without a prompt."""
        dec = self.text_config.dec_token_id
        prompt = torch.tensor([dec]) if prompt_ids is None else torch.as_tensor(prompt_ids).clone()
        prompt[..., :1] = dec
        return prompt

"""Captioning: the image-grounded decoder with a prompt (section 5.2). Also CapFilt's captioner."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig
from blipfast.models.text import run_streams
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

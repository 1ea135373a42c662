"""Visual dialogue (section 5.5): which of the candidate answers continues the dialogue?

The image's and its caption's embeddings are concatenated; the dialogue encoder looks at both while
it reads history, question and candidate, and the matching head says how well the candidate fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.errors import ShapeError
from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig
from blipfast.models.streams import CrossStates, run_streams
from blipfast.models.text import TextTransformer


@dataclass
class VisDialOutput:
    """Cross-entropy over matching (scalar) and logits `(N, 2)`."""

    loss_itm: Tensor
    logits: Tensor

    @property
    def loss(self) -> Tensor:
        return self.loss_itm

    def losses(self) -> dict[str, Tensor]:
        return {"itm": self.loss_itm}


class BlipForVisDial(Blip):
    """Image encoder, caption encoder, dialogue encoder over both, matching head.

    Where the image is wider than the text (ViT-L), a linear layer brings the caption to its width.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config, num_classes=2)
        self.caption_encoder = TextTransformer(config.text, cross_width=None)
        same = config.vision.hidden_size == config.text.hidden_size
        self.caption_proj: nn.Module = (
            nn.Identity() if same else nn.Linear(config.text.hidden_size, config.vision.hidden_size)
        )

    def dialogue_states(self, pixel_values: Tensor, caption: PackedText) -> CrossStates:
        """Image and caption embeddings one after the other, `(B, S + L, D)`, with their lengths."""
        image_embeds = self.encode_image(pixel_values)
        if image_embeds.shape[0] != caption.packing.num_sequences:
            raise ShapeError(
                f"{image_embeds.shape[0]} images came with {caption.packing.num_sequences} captions"
            )
        caption = caption.starting_with(self.text_config.cls_token_id)
        stream = self.caption_encoder.stream(caption.input_ids, caption.packing)
        words = self.caption_proj(caption.packing.pad(run_streams([stream])[0]))
        lengths = caption.packing.lengths_tensor + image_embeds.shape[1]
        return self.encoder.cross_states(
            torch.cat([image_embeds, words], dim=1),
            lengths=None if caption.packing.uniform else lengths,
        )

    def forward(
        self,
        pixel_values: Tensor,
        caption: PackedText,
        dialogues: PackedText,
        *,
        image_index: Sequence[int],
        labels: Tensor,
    ) -> VisDialOutput:
        """ITM loss of dialogues (history, question, answer) with the image each names.

        labels: `(N,)`, 1 where the answer is the true one.
        """
        logits = self.match(dialogues, self.dialogue_states(pixel_values, caption), image_index)
        return VisDialOutput(F.cross_entropy(logits.float(), labels), logits)

    @torch.no_grad()
    def rank(
        self, states: CrossStates, candidates: PackedText, image_index: Sequence[int]
    ) -> Tensor:
        """`(N,)` scores of dialogues that end in a candidate answer; larger is better.

        The candidates of one question share the K/V of its image and caption.
        """
        return self.match(candidates, states, image_index)[:, 1]

"""NLVR2 (section 5.4): is a sentence true of a pair of images?"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.errors import ShapeError
from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig
from blipfast.models.streams import run_streams


@dataclass
class NLVROutput:
    """Cross-entropy (scalar; None without labels) and logits `(B, 2)`."""

    logits: Tensor
    loss_cls: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        assert self.loss_cls is not None, "no labels were given"
        return self.loss_cls

    def losses(self) -> dict[str, Tensor]:
        return {"cls": self.loss}


class BlipForNLVR(Blip):
    """Two cross-attentions per layer, one for each image, and a two-layer head on [ENC]."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config, text_encoder="paired")
        width = config.text.hidden_size
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        labels: Tensor | None = None,
    ) -> NLVROutput:
        """pixel_values: `(B, 2, 3, size, size)`. labels: `(B,)`, 1 for true."""
        if pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
            raise ShapeError(
                f"pixel_values must be (B, 2, 3, H, W), got {tuple(pixel_values.shape)}"
            )
        text = PackedText.from_padded(input_ids, attention_mask)
        embeds = self.encode_image(pixel_values.flatten(0, 1)).unflatten(0, (-1, 2))
        states = self.encoder.cross_states(embeds[:, 0], embeds[:, 1])
        stream = self.grounded_stream(text, range(states.size), first_only=True)
        logits = self.cls_head(run_streams([stream], states)[0])
        return NLVROutput(logits, None if labels is None else F.cross_entropy(logits, labels))

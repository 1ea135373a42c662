"""Momentum distillation's slowly moving copy of the unimodal encoders (BLIP, section 3.2; MoCo)."""

from __future__ import annotations

import torch
from torch import Tensor

from blipfast.models.blip import Blip, PackedText
from blipfast.ops.momentum_update import momentum_update_


class MomentumTwin(Blip):
    """A copy of a model's image encoder, unimodal text encoder and projections.

    It has no cross-attention, since it never looks at an image while reading, and no gradients.
    Its parameters bear the student's names.
    """

    def __init__(self, student: Blip) -> None:
        super().__init__(student.config, text_encoder="unimodal", contrastive=True)
        del self.temp  # soft targets use the student's temperature
        self.requires_grad_(False)
        self.copy_from(student)

    def copy_from(self, student: Blip) -> None:
        """Makes every weight equal to the student's."""
        self.update(student, momentum=0.0)

    @torch.no_grad()
    def update(self, student: Blip, momentum: float = 0.995) -> None:
        """`twin = momentum * twin + (1 - momentum) * student`, for all parameters at once."""
        sources = dict(student.named_parameters())
        named = dict(self.named_parameters())
        targets = [_own_share(parameter) for parameter in named.values()]
        momentum_update_(targets, [_own_share(sources[name]) for name in named], momentum)

    @torch.no_grad()
    def features(self, pixel_values: Tensor, text: PackedText) -> tuple[Tensor, Tensor]:
        """Unit features of images and texts, `(B, embed_dim)` and `(N, embed_dim)`."""
        embeds = self.encode_image(pixel_values, first_only=True)
        return self.image_features(embeds), self.text_features(text)


def _own_share(parameter: Tensor) -> Tensor:
    """Under FSDP a rank moves its share of each parameter, which both models cut alike."""
    to_local = getattr(parameter, "to_local", None)
    return parameter if to_local is None else to_local()

"""Features of images, texts and both, for other people's models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig
from blipfast.models.streams import run_streams


class BlipFeatureExtractor(Blip):
    """Token features in three modes. Texts may be of unequal length and share an image."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)

    def image(self, pixel_values: Tensor) -> Tensor:
        """`(B, S, D)`."""
        return self.encode_image(pixel_values)

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`(N, L, D)`, zeros on padding."""
        text = PackedText.from_padded(input_ids, attention_mask)
        return text.packing.pad(self.encode_text(text))

    def multimodal(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_index: Sequence[int] | None = None,
    ) -> Tensor:
        """`(N, L, D)` of texts grounded in images, zeros on padding.

        image_index: the image of each text; by default text n belongs to image n.
        """
        text = PackedText.from_padded(input_ids, attention_mask)
        index = range(text.packing.num_sequences) if image_index is None else image_index
        states = self.image_states(self.encode_image(pixel_values))
        return text.packing.pad(run_streams([self.grounded_stream(text, index)], states)[0])

"""The image encoder."""

from __future__ import annotations

import torch

from blipfast.models.config import blip_config
from blipfast.models.vit import VisionTransformer


def test_the_first_token_alone_is_the_first_of_all() -> None:
    torch.manual_seed(0)
    config = blip_config("blip_tiny").vision
    vit = VisionTransformer(config).double().eval()
    pixels = torch.randn(2, 3, config.image_size, config.image_size, dtype=torch.float64)
    first, every = vit(pixels, first_only=True), vit(pixels)
    assert first.shape == (2, 1, config.hidden_size)
    torch.testing.assert_close(first, every[:, :1], atol=1e-12, rtol=1e-12)

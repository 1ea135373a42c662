"""Video as a set of frames (section 5.6): zero-shot transfer of the image models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.errors import DataError, ShapeError
from blipfast.models.blip import Blip


def sample_frames(num_frames: int, count: int) -> list[int]:
    """`count` frame indices spread uniformly over a video, each in the middle of its share.

    A video with fewer frames repeats some. Raises DataError for a video without frames.
    """
    if num_frames < 1 or count < 1:
        raise DataError(f"cannot take {count} frames from a video of {num_frames}")
    return [int((i + 0.5) * num_frames / count) for i in range(count)]


def encode_video(model: Blip, frames: Tensor) -> tuple[Tensor, Tensor | None]:
    """A video's tokens, and its contrastive features where the model has such projections.

    frames: `(B, F, 3, size, size)`. Returns the tokens of all frames one after the other,
    `(B, F * S, D)`, to look at, and unit vectors `(B, embed_dim)`: the mean of the frames'
    projected CLS tokens.
    """
    if frames.dim() != 5:
        raise ShapeError(f"frames must be (B, F, 3, H, W), got {tuple(frames.shape)}")
    embeds = model.encode_image(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    features = None
    if hasattr(model, "vision_proj"):
        features = F.normalize(model.vision_proj(embeds[:, :, 0]).mean(dim=1), dim=-1)
    return torch.flatten(embeds, 1, 2), features

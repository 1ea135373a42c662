"""Each word of a text with the part of the image that it looks at, as pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

from blipfast.data import BlipTokenizer
from blipfast.models.attention_maps import token_maps
from blipfast.models.blip import PackedText
from blipfast.tasks.retrieval import BlipForRetrieval

_LONGEST = 512  # pixels of a drawn map
# From dark blue over green to yellow, as most plots of intensities: position, red, green, blue.
_COLOURS = np.array(
    [[0.0, 68, 1, 84], [0.25, 59, 82, 139], [0.5, 33, 145, 140], [0.75, 94, 201, 98],
     [1.0, 253, 231, 37]]
)  # fmt: skip


def word_maps(
    model: BlipForRetrieval,
    tokenizer: BlipTokenizer,
    image_embeds: Tensor,
    text: str,
    *,
    layer: int | None = None,
    by_gradient: bool = True,
) -> list[tuple[str, np.ndarray]]:
    """Each word and its map `(grid, grid)`, the mean of its pieces'; special tokens are left out.

    image_embeds: `(1, S, D)`. layer, by_gradient: see `token_maps`.
    """
    batch = tokenizer([text], max_length=35).to(image_embeds.device)
    packed = PackedText.from_padded(batch.input_ids, batch.attention_mask)
    maps = token_maps(model, image_embeds, packed, layer=layer, by_gradient=by_gradient).maps
    grid = round((maps.shape[1] - 1) ** 0.5)
    squares = maps[:, 1:].unflatten(1, (grid, grid)).float().cpu().numpy()
    words: list[tuple[str, list[np.ndarray]]] = []
    for piece, square in zip(tokenizer.pieces(batch.input_ids[0]), squares, strict=True):
        if piece.startswith("##") and words:
            words[-1] = (words[-1][0] + piece[2:], [*words[-1][1], square])
        elif not (piece.startswith("[") and piece.endswith("]")):
            words.append((piece, [square]))
    return [(word, np.mean(parts, axis=0)) for word, parts in words]


def draw_map(image: Image.Image, weights: np.ndarray, strength: float = 0.6) -> Image.Image:
    """The image, grey, under a map `(grid, grid)` in colours; the map is scaled to its highest."""
    picture = image.convert("RGB")
    picture.thumbnail((_LONGEST, _LONGEST))
    weights = weights - weights.min()
    scaled = (255 * weights / max(float(weights.max()), 1e-12)).astype(np.uint8)
    smooth = Image.fromarray(scaled).resize(picture.size, Image.Resampling.BICUBIC)
    share = np.asarray(smooth, dtype=np.float64) / 255
    colour = np.stack([np.interp(share, _COLOURS[:, 0], _COLOURS[:, i]) for i in (1, 2, 3)], -1)
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[:, :, None]
    mixed = grey * (1 - strength) + colour * strength
    return Image.fromarray(mixed.round().astype(np.uint8))

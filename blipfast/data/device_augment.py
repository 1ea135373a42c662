"""RandAugment's operations on a batch of pixels where they lie, as Pillow does them.

For images that a GPU has decoded. Images with the same operation go through it together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.data.augment import View, affine_matrix, enhancement

_GREY = 128.0


def finish_views(squares: Tensor, views: Sequence[View]) -> Tensor:
    """Mirrors each square and applies its operations, in order.

    squares: ``(N, S, S, 3)`` uint8, crops that are resized already. Returns the same shape and
    dtype; against `View.finish` most values are equal, the others differ by a grey level.
    """
    images = squares.movedim(-1, 1).float()
    mirrored = torch.tensor([view.mirrored for view in views], device=squares.device)
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    for turn in range(max((len(view.operations) for view in views), default=0)):
        rows: dict[str, list[int]] = {}
        for row, view in enumerate(views):
            if turn < len(view.operations):
                rows.setdefault(view.operations[turn][0], []).append(row)
        for name, chosen in rows.items():
            strengths = [views[row].operations[turn][1] for row in chosen]
            where = torch.tensor(chosen, device=images.device)
            images[where] = _apply(images[where], name, strengths)
    return images.to(torch.uint8).movedim(1, -1)


def _apply(images: Tensor, name: str, strengths: list[float]) -> Tensor:
    """One operation on ``(n, 3, S, S)`` whole values from 0 to 255."""
    if name == "identity":
        return images
    if name == "auto_contrast":
        return _auto_contrast(images)
    if name == "equalize":
        return _equalize(images)
    if name in ("brightness", "sharpness"):
        factors = [enhancement(abs(strength)) for strength in strengths]
        factor = torch.tensor(factors, device=images.device).view(-1, 1, 1, 1)
        plain = torch.zeros_like(images) if name == "brightness" else _smooth(images)
        return (plain + factor * (images - plain)).clamp(0, 255).floor()
    return _affine(images, [affine_matrix(name, s, images.shape[-1]) for s in strengths])


def _smooth(images: Tensor) -> Tensor:
    """Pillow's SMOOTH filter, which leaves the border as it is."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    weight = (kernel / 13).expand(3, 1, 3, 3)
    inner = F.conv2d(images, weight, groups=3)
    out = images.clone()
    out[..., 1:-1, 1:-1] = (inner + 0.5).floor().clamp(0, 255)
    return out


def _auto_contrast(images: Tensor) -> Tensor:
    low = images.amin(dim=(-2, -1), keepdim=True)
    high = images.amax(dim=(-2, -1), keepdim=True)
    scale = 255.0 / (high - low).clamp(min=1)
    stretched = (images * scale - low * scale).floor().clamp(0, 255)
    return torch.where(high > low, stretched, images)


def _equalize(images: Tensor) -> Tensor:
    """Each channel's histogram made even, by Pillow's whole-number rule."""
    planes = images.flatten(0, 1).flatten(1).long()
    histogram = torch.zeros(len(planes), 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(1, planes, torch.ones_like(planes))
    levels = torch.arange(256, device=images.device)
    last = torch.where(histogram > 0, levels, -1).amax(dim=1, keepdim=True)
    step = (histogram.sum(1, keepdim=True) - histogram.gather(1, last)) // 255
    before = histogram.cumsum(1) - histogram
    table = (step // 2 + before) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp(max=255), levels)
    return table.gather(1, planes).view_as(images).to(images.dtype)


def _affine(images: Tensor, matrices: list[tuple[float, ...]]) -> Tensor:
    """Output pixels looked up in the input by affine maps, bilinearly; grey from outside."""
    side = images.shape[-1]
    a, b, c, d, e, f = torch.tensor(matrices, device=images.device).T[..., None, None]
    centres = torch.arange(side, device=images.device) + 0.5
    x, y = centres.view(1, 1, -1), centres.view(1, -1, 1)
    xin, yin = a * x + b * y + c, d * x + e * y + f  # (n, S, S)
    inside = (xin >= 0) & (xin < side) & (yin >= 0) & (yin < side)
    xin, yin = xin - 0.5, yin - 0.5
    left, top = xin.floor(), yin.floor()
    flat = images.flatten(2)

    def at(rows: Tensor, columns: Tensor) -> Tensor:
        index = rows.clamp(0, side - 1).long() * side + columns.clamp(0, side - 1).long()
        return flat.gather(2, index.flatten(1)[:, None].expand(-1, 3, -1)).view_as(images)

    dx, dy = (xin - left)[:, None], (yin - top)[:, None]
    upper = torch.lerp(at(top, left), at(top, left + 1), dx)
    lower = torch.lerp(at(top + 1, left), at(top + 1, left + 1), dx)
    mixed = torch.lerp(upper, lower, dy).floor().clamp(0, 255)
    return torch.where(inside[:, None], mixed, torch.full_like(mixed, _GREY))

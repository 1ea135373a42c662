"""Training augmentation: random resized crop, flip, RandAugment."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from blipfast.data.images import ImageSource, load_image, resize, to_tensor
from blipfast.errors import DataError

RANDAUGMENT_OPS = (
    "identity",
    "auto_contrast",
    "brightness",
    "sharpness",
    "equalize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
)
"""The original's ten operations."""

_MAX_STRENGTH = 10
_GREY = (128, 128, 128)
_SHEAR, _TRANSLATE_PIXELS, _ROTATE_DEGREES = 0.3, 10.0, 30.0


def apply_op(image: Image.Image, op: str, strength: float, sign: int = 1) -> Image.Image:
    """One RandAugment operation on an RGB image; uncovered corners become grey (128).

    Args:
        image: RGB.
        op: one of `RANDAUGMENT_OPS`.
        strength: 0 to 10. Brightness and sharpness have factor 0.1 to 1.9, so that 5 leaves
            them as they are, in the original too; shear reaches 0.3, shift 10 pixels, turn 30
            degrees.
        sign: -1 mirrors the geometric operations.
    """
    part = strength / _MAX_STRENGTH
    if op == "identity":
        return image
    if op == "auto_contrast":
        return ImageOps.autocontrast(image)
    if op == "equalize":
        return ImageOps.equalize(image)
    if op in ("brightness", "sharpness"):
        factor = enhancement(strength)
        if factor == 1:  # spares the blurred image, of which nothing would be seen
            return image
        enhance = ImageEnhance.Brightness if op == "brightness" else ImageEnhance.Sharpness
        return enhance(image).enhance(factor)
    if op == "rotate":
        angle = sign * _ROTATE_DEGREES * part
        return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=_GREY)
    matrix = affine_matrix(op, sign * strength, image.width)
    if op.startswith("translate") and (matrix[2] + matrix[5]).is_integer():
        moved = Image.new("RGB", image.size, _GREY)
        moved.paste(image, (-int(matrix[2]), -int(matrix[5])))
        return moved
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_GREY
    )


def enhancement(strength: float) -> float:
    """The factor of brightness and sharpness."""
    return 0.1 + 1.8 * (strength / _MAX_STRENGTH)


def affine_matrix(op: str, strength: float, side: int) -> tuple[float, ...]:
    """Where a geometric operation looks in the input for each output pixel: ``a, b, c, d, e, f`` of
    ``(a x + b y + c, d x + e y + f)``. The strength's sign mirrors it. side: of the square, in
    pixels."""
    part = strength / _MAX_STRENGTH
    if op == "rotate":  # about the centre; y points down
        angle, half = -math.radians(_ROTATE_DEGREES * part), side / 2
        cos, sin = math.cos(angle), math.sin(angle)
        return (cos, sin, half * (1 - cos - sin), -sin, cos, half * (1 + sin - cos))
    shear, shift = _SHEAR * part, _TRANSLATE_PIXELS * part
    matrices = {
        "shear_x": (1.0, shear, 0.0, 0.0, 1.0, 0.0),
        "shear_y": (1.0, 0.0, 0.0, shear, 1.0, 0.0),
        "translate_x": (1.0, 0.0, shift, 0.0, 1.0, 0.0),
        "translate_y": (1.0, 0.0, 0.0, 0.0, 1.0, shift),
    }
    if op not in matrices:
        raise DataError(f"unknown augmentation {op!r}; known: {', '.join(RANDAUGMENT_OPS)}")
    return matrices[op]


def crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box of `scale` of the area and an aspect of 3/4 to 4/3: left, top, right, bottom.

    After ten draws that do not fit, the largest centred box of an allowed aspect.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width / (3 / 4))))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclass(frozen=True)
class View:
    """One way of looking at an image: a crop, resized to a square, mirrored, with operations.

    side: of the square in pixels. box: left, top, right, bottom of the crop in pixels.
    operations: RandAugment's, each with its strength, whose sign mirrors geometric ones.
    """

    side: int
    box: tuple[int, int, int, int]
    mirrored: bool = False
    operations: tuple[tuple[str, float], ...] = ()

    def of(self, image: Image.Image) -> Image.Image:
        """The view of an RGB image."""
        return self.finish(np.asarray(image.crop(self.box)))

    def finish(self, crop: np.ndarray) -> Image.Image:
        """What comes after the crop, ``(H, W, 3)`` uint8: resize, mirror and operations."""
        square = Image.fromarray(resize(crop, self.side))
        if self.mirrored:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for op, strength in self.operations:
            square = apply_op(square, op, abs(strength), 1 if strength >= 0 else -1)
        return square


class TrainTransform:
    """The original's training view: crop, flip, RandAugment, normalise.

    Args:
        image_size: side of the square in pixels.
        scale: share of the area that a crop keeps (0.2 to 1 in pre-training, 0.5 to 1 later).
        flip: mirror half of the images; leave it out where captions say left and right.
        randaugment: number of operations and their strength of 10, or None. Each drawn
            operation is applied with probability 1/2.
        rng: a NumPy generator or a seed. A loader with several workers should rather pass a
            generator of its own to each call.

    Raises:
        DataError: for an impossible setting.
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        randaugment: tuple[int, float] | None = (2, 5),
        rng: np.random.Generator | int | None = None,
    ) -> None:
        if image_size < 1:
            raise DataError(f"image_size is {image_size}; it must be at least 1")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise DataError(f"scale is {scale}; it must be two shares, 0 < low <= high <= 1")
        if randaugment is not None and not (
            randaugment[0] >= 0 and 0 <= randaugment[1] <= _MAX_STRENGTH
        ):
            raise DataError(f"randaugment is {randaugment}; use (operations, strength 0 to 10)")
        self.image_size = image_size
        self.scale = scale
        self.flip = flip
        self.randaugment = randaugment
        self.rng = np.random.default_rng(rng)

    def plan(self, width: int, height: int, rng: np.random.Generator | None = None) -> View:
        """Draws how an image of a size in pixels is to be looked at."""
        rng = self.rng if rng is None else rng
        box = crop_box(width, height, self.scale, rng)
        mirrored = self.flip and bool(rng.random() < 0.5)
        count, strength = self.randaugment or (0, 0)
        drawn = []
        for op in rng.choice(RANDAUGMENT_OPS, size=count):
            sign = 1 if rng.random() < 0.5 else -1
            if rng.random() < 0.5:
                drawn.append((str(op), sign * float(strength)))
        return View(self.image_size, box, mirrored, tuple(drawn))

    def augment(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """The augmented square as a Pillow RGB image."""
        return self.plan(*image.size, rng).of(image)

    def __call__(
        self, image: ImageSource, where: str = "", rng: np.random.Generator | None = None
    ) -> Tensor:
        """``(3, image_size, image_size)`` float32. Raises `DataError` as `load_image` does."""
        return to_tensor(self.augment(load_image(image, where), rng))

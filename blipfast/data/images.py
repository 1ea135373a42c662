"""Images: read safely, and bring to the model's square as the original does.

What is particular here:
- A damaged file is an error naming the file, never a half-grey picture.
- Every mode becomes 8-bit RGB by a stated rule: 16 bits are scaled, transparency lies on white.
- Augmentation draws from a NumPy generator alone, so a seed repeats it.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from blipfast.errors import DataError

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 89_478_485
"""Pixels above which an image is refused (Pillow's own limit: 256 MiB as 24-bit RGB)."""

ImageSource = bytes | bytearray | memoryview | str | os.PathLike[str] | Image.Image

_pillow_lock = threading.Lock()


@contextmanager
def _strict_pillow() -> Iterator[None]:
    # Another library may have told Pillow to accept truncated files: a switch of the whole
    # process, so take it back while we decode. Unset, threads decode side by side.
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _pillow_lock:
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def load_image(
    source: ImageSource,
    where: str = "",
    *,
    max_pixels: int = MAX_PIXELS,
    apply_orientation: bool = False,
) -> Image.Image:
    """Read one image completely, as 8-bit RGB.

    Transparency is laid on white; 16-bit grey is scaled to 8 bits; of an animation the first
    frame counts; CMYK is converted. EXIF orientation is ignored, as in the original, unless
    asked for.

    Args:
        source: encoded bytes, a path, or a Pillow image.
        where: how errors name the image (a path names itself).
        max_pixels: refuse larger images before decoding them.
        apply_orientation: turn the image upright by its EXIF tag.

    Raises:
        DataError: naming `where`, if the source is missing, empty, no image, truncated or
            damaged, too large, or of a kind with no defined RGB form (floating point).
    """
    if isinstance(source, Image.Image):
        name = where or "image"
        image = source
    elif isinstance(source, (bytes, bytearray, memoryview)):
        name = where or "image"
        image = _open(bytes(source), name)
    else:
        name = where or os.fspath(source)
        image = _open(_read(source, name), name)
    if image.width * image.height > max_pixels:
        raise _too_large(name, image.size, max_pixels)
    try:
        with _strict_pillow():
            image.load()
            if apply_orientation:
                image = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise many kinds on damaged data
        raise DataError(f"{name}: truncated or damaged ({error})") from error
    rgb = _to_rgb(image, name)
    return rgb.copy() if rgb is source else rgb


def _read(path: str | os.PathLike[str], name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from error


def _too_large(name: str, size: tuple[int, int], max_pixels: int) -> DataError:
    return DataError(
        f"{name}: {size[0]} x {size[1]} pixels are more than the limit of {max_pixels:,}; "
        "shrink it, or raise max_pixels if you trust it"
    )


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise DataError(f"{name}: the file is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{name}: too large to be decoded safely ({error}); shrink it, or raise Pillow's "
            "MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except Exception as error:  # header parsers raise many kinds on damaged data
        raise DataError(f"{name}: damaged ({error})") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode == "I" or mode.startswith("I;16"):
        return _scale_16_bit(np.asarray(image), name)
    if mode == "F":
        raise DataError(f"{name}: floating-point pixels have no defined range; save it as 8 bits")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(pixels: np.ndarray, name: str) -> Image.Image:
    wide = pixels.astype(np.int64)
    if wide.size and (wide.min() < 0 or wide.max() > 65535):
        raise DataError(f"{name}: grey values beyond 16 bits; save it as 8 or 16 bits")
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")


def resize(pixels: np.ndarray, side: int) -> np.ndarray:
    """``(H, W, 3)`` uint8 to ``(side, side, 3)``, bicubic and antialiased.

    By PyTorch's vectorised kernel, in a fraction of Pillow's time; of its values few differ from
    Pillow's, by a grey level or two. Where the original's pixels are owed, see `EvalTransform`.
    """
    if pixels.shape[:2] == (side, side):
        return pixels
    if not pixels.flags.writeable:  # of which PyTorch would warn
        pixels = pixels.copy()
    # A batch of one keeps the channels last, for which the kernel is made.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    square = F.interpolate(planes, size=(side, side), mode="bicubic", antialias=True)
    return square.permute(0, 2, 3, 1)[0].numpy()


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow RGB image as float32 ``(3, H, W)``, normalised by CLIP's mean and deviation."""
    return normalise(torch.from_numpy(np.array(image, dtype=np.uint8)))


def normalise(pixels: Tensor) -> Tensor:
    """``(..., H, W, 3)`` uint8 to float32 ``(..., 3, H, W)``, by CLIP's mean and deviation."""
    mean = torch.tensor(IMAGE_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=pixels.device).view(3, 1, 1)
    planes = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.div_(255).sub_(mean).div_(std)


def image_size(data: bytes, where: str = "") -> tuple[int, int, bool]:
    """Width, height, and whether it is a plain JPEG, by the header alone.

    A plain JPEG is 8-bit RGB or grey and has its end: every decoder reads it alike. Raises
    `DataError` as `load_image` does.
    """
    name = where or "image"
    image = _open(data, name)
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, image.size, MAX_PIXELS)
    ended = data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")
    return (
        image.width,
        image.height,
        image.format == "JPEG" and image.mode in ("RGB", "L") and ended,
    )


class EvalTransform:
    """Resize to the square (bicubic, aspect not kept, as in the original) and normalise.

    Args:
        image_size: side of the square in pixels.
        apply_orientation: as of `load_image`; for people's photographs, not for a data set.
    """

    def __init__(self, image_size: int, *, apply_orientation: bool = False) -> None:
        if image_size < 1:
            raise DataError(f"image_size is {image_size}; it must be at least 1")
        self.image_size, self.apply_orientation = image_size, apply_orientation

    def __call__(self, image: ImageSource, where: str = "") -> Tensor:
        """``(3, image_size, image_size)`` float32. Raises `DataError` as `load_image` does."""
        rgb = load_image(image, where, apply_orientation=self.apply_orientation)
        side = (self.image_size, self.image_size)
        return to_tensor(rgb.resize(side, Image.Resampling.BICUBIC) if rgb.size != side else rgb)

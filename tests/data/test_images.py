"""Reading images: every mode to RGB, every damage to an error that names the file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from blipfast.data import IMAGE_MEAN, IMAGE_STD, EvalTransform, load_image, to_tensor
from blipfast.data.images import resize
from blipfast.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


ENCODED = {
    "png": encode(PICTURE, "PNG"),
    "jpeg": encode(PICTURE, "JPEG"),
    "progressive": encode(PICTURE, "JPEG", progressive=True),
    "gif": encode(PICTURE, "GIF"),
    "webp": encode(PICTURE, "WEBP", lossless=True),
    "bmp": encode(PICTURE, "BMP"),
}


def bomb(side: int) -> bytes:
    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def test_sources_agree(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(ENCODED["png"])
    for source in (ENCODED["png"], bytearray(ENCODED["png"]), file, str(file), PICTURE):
        image = load_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), PIXELS)


def test_modes_become_rgb() -> None:
    grey = np.array([[0, 257, 65535, 32768]], dtype=np.uint16)
    for image in (Image.fromarray(grey), Image.fromarray(grey.astype(np.int32))):
        assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 1, 255, 128]
    assert np.asarray(load_image(encode(Image.fromarray(grey), "PNG")))[0, 2].tolist() == [255] * 3
    cmyk = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = np.asarray(cmyk)[4, 4].tolist()
    assert red > 180
    assert max(green, blue) < 80
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.asarray(load_image(encode(half, "PNG"))).min() == 255
    assert np.asarray(load_image(half.convert("LA"))).min() == 255
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert np.asarray(load_image(encode(palette, "PNG")))[0, 0].tolist() == [10, 20, 30]
    assert np.asarray(load_image(encode(palette, "PNG", transparency=1))).min() == 255
    assert np.asarray(load_image(Image.new("1", (2, 2), 1))).min() == 255
    keyed = encode(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert np.asarray(load_image(keyed)).min() == 255


def test_animation_gives_the_first_frame() -> None:
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0]


def test_orientation_only_when_asked() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(PICTURE, "JPEG", exif=exif)
    assert load_image(data).size == (31, 24)
    assert load_image(data, apply_orientation=True).size == (24, 31)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image"),
        (b"\xff\xd8\xff", "web/17"),
        (ENCODED["png"][:-200], "truncated"),
        (ENCODED["jpeg"][:-200], "truncated"),
        (ENCODED["png"][:20], "web/17"),
        (bomb(60_000), "too large"),
        (bomb(9_500), "more than the limit"),
        (Image.new("F", (3, 3)), "floating-point"),
        (Image.new("I", (3, 3), 70_000), "beyond 16 bits"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named(source: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_image(source, "web/17")
    assert str(caught.value).startswith("web/17: ")


def test_paths_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            load_image(path)


def test_size_limit_can_be_set() -> None:
    with pytest.raises(DataError, match="limit of 700"):
        load_image(ENCODED["png"], max_pixels=700)
    with pytest.raises(DataError, match="limit of 700"):
        load_image(PICTURE, max_pixels=700)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(ENCODED)), st.floats(0, 1), st.booleans())
def test_truncated_files_never_load_as_whole(kind: str, share: float, lenient: bool) -> None:
    data = ENCODED[kind]
    whole = np.asarray(load_image(data))
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    try:
        # A cut of the closing mark alone leaves every pixel right; nothing else may pass.
        image = load_image(data[: int(share * len(data))], "x")
    except DataError as error:
        assert str(error).startswith("x: ")  # noqa: PT017
    else:
        assert np.array_equal(np.asarray(image), whole)
    finally:
        assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = before


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(ENCODED)), st.integers(0, 10_000), st.integers(0, 255))
def test_damaged_bytes_load_or_raise_data_error(kind: str, place: int, value: int) -> None:
    data = bytearray(ENCODED[kind])
    data[place % len(data)] = value
    try:
        image = load_image(bytes(data), "x", max_pixels=1_000_000)
    except DataError as error:
        assert str(error).startswith("x: ")  # noqa: PT017
    else:
        assert image.mode == "RGB"


@pytest.mark.parametrize("size", [(24, 31), (1, 1), (3, 200), (64, 64), (301, 190)])
@pytest.mark.parametrize("part", [False, True])
def test_resize_is_pillows(size: tuple[int, int], part: bool) -> None:
    """PyTorch rounds to whole levels after each of the two directions, as Pillow does."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    if part:  # a slice, which may not be written
        pixels = np.pad(pixels, ((2, 2), (5, 5), (0, 0)))[2:-2, 5:-5]
        pixels.flags.writeable = False
    theirs = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
    ours = resize(pixels, 64)
    apart = np.abs(ours.astype(int) - np.asarray(theirs))
    assert ours.shape == (64, 64, 3)
    assert apart.max() <= 3
    assert apart.mean() < 0.02


def test_eval_transform_resizes_and_normalises() -> None:
    tensor = EvalTransform(16)(ENCODED["png"])
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    small = np.asarray(PICTURE.resize((16, 16), Image.Resampling.BICUBIC)) / 255
    expected = (small - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    assert np.abs(tensor.permute(1, 2, 0).numpy() - expected).max() < 1e-5
    assert torch.equal(
        EvalTransform(24)(PICTURE.crop((0, 0, 24, 24))), to_tensor(PICTURE.crop((0, 0, 24, 24)))
    )
    with pytest.raises(DataError, match="image_size"):
        EvalTransform(0)
    with pytest.raises(DataError, match="here: "):
        EvalTransform(8)(b"", "here")

"""Training views: repeatable, in range, and each operation does what its name says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from blipfast.data import RANDAUGMENT_OPS, TrainTransform
from blipfast.data.augment import affine_matrix, apply_op, crop_box
from blipfast.errors import DataError

PIXELS = np.random.default_rng(1).integers(30, 200, (40, 48, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def test_a_seed_repeats_the_view() -> None:
    one, two = TrainTransform(32, rng=7), TrainTransform(32, rng=7)
    views = [one(PICTURE) for _ in range(6)]
    assert all(torch.equal(view, two(PICTURE)) for view in views)
    assert views[0].shape == (3, 32, 32)
    assert views[0].dtype == torch.float32
    assert not torch.equal(views[0], views[1])
    own = [one(PICTURE, rng=np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(*own)


def test_flip_can_be_left_out() -> None:
    still = TrainTransform(48, scale=(1, 1), flip=False, randaugment=None, rng=0)
    square = PICTURE.resize((48, 48))
    views = {np.asarray(still.augment(square)).tobytes() for _ in range(20)}
    # A square's whole area fits a crop only undistorted; a drawn aspect falls back to it.
    assert views == {np.asarray(square).tobytes()}
    flipping = TrainTransform(48, scale=(1, 1), flip=True, randaugment=None, rng=0)
    views = {np.asarray(flipping.augment(square)).tobytes() for _ in range(20)}
    mirror = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert views == {np.asarray(square).tobytes(), np.asarray(mirror).tobytes()}


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10_000))
def test_crops_lie_inside(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = crop_box(width, height, (0.2, 1), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crop_area_and_aspect_are_as_asked() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(400, 400, (0.2, 1.0), rng) for _ in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = w * h / 160_000
    assert 0.19 < area.min() < 0.22
    assert area.max() > 0.95
    assert 0.74 < (w / h).min() < 0.78
    assert 1.29 < (w / h).max() < 1.35


def test_each_operation() -> None:
    def run(op: str, strength: float = 5, sign: int = 1) -> np.ndarray:
        return np.asarray(apply_op(PICTURE, op, strength, sign)).astype(int)

    assert len(RANDAUGMENT_OPS) == 10
    for op in ("identity", "brightness", "sharpness"):  # strength 5 is the neutral middle
        assert np.abs(run(op) - PIXELS).max() <= 1
    assert run("brightness", 10).mean() > 1.2 * PIXELS.mean()
    assert run("sharpness", 0).std() < PIXELS.std()
    for op in ("auto_contrast", "equalize"):
        assert run(op).min() == 0 < PIXELS.min()
        assert run(op).max() > 240 > PIXELS.max()
    assert np.array_equal(run("translate_x")[:, :-5], PIXELS[:, 5:])
    assert (run("translate_x")[:, -4:] == 128).all()
    assert np.array_equal(run("translate_y", sign=-1)[5:], PIXELS[:-5])
    # Fixed at the top, shifted by 0.15 pixels more with each row.
    assert np.abs(run("shear_x")[0] - run("shear_x", sign=-1)[0]).mean() < 25
    assert np.abs(run("shear_x")[39, :40] - PIXELS[39, 6:46]).mean() < 10
    for op in ("shear_x", "shear_y", "rotate"):
        assert (run(op) == 128).all(axis=2).sum() > 20
        assert not np.array_equal(run(op), run(op, sign=-1))
    with pytest.raises(DataError, match="solarize"):
        run("solarize")


@pytest.mark.parametrize("strength", [0.0, 1.0, 3.7, 5.0, 10.0])
@pytest.mark.parametrize("op", ["translate_x", "translate_y", "brightness", "sharpness"])
def test_what_is_spared_changes_nothing(op: str, strength: float) -> None:
    """Pillow's long way to a shift by whole pixels, or by a neutral factor, gives the same."""
    for sign in (-1, 1):
        if op.startswith("translate"):
            matrix = affine_matrix(op, sign * strength, PICTURE.width)
            expected = PICTURE.transform(
                PICTURE.size,
                Image.Transform.AFFINE,
                matrix,
                Image.Resampling.BILINEAR,
                fillcolor=(128, 128, 128),
            )
        else:
            enhance = ImageEnhance.Brightness if op == "brightness" else ImageEnhance.Sharpness
            expected = enhance(PICTURE).enhance(0.1 + 0.18 * strength)
        ours = apply_op(PICTURE, op, strength, sign)
        assert np.array_equal(np.asarray(ours), np.asarray(expected))


def test_randaugment_is_applied_half_of_the_time() -> None:
    view = TrainTransform(48, scale=(1, 1), flip=False, randaugment=(1, 5), rng=0)
    square = PICTURE.resize((48, 48))
    same = sum(view.augment(square) == square for _ in range(400)) / 400
    # Half are not applied; three tenths of the rest (identity and the two neutral ones) are same.
    assert 0.58 < same < 0.72


@pytest.mark.parametrize(
    "setting",
    [{"image_size": 0}, {"scale": (0, 1)}, {"scale": (0.9, 0.5)}, {"randaugment": (2, 11)}],
)
def test_bad_settings(setting: dict[str, object]) -> None:
    with pytest.raises(DataError, match=next(iter(setting))):
        TrainTransform(**{"image_size": 8, **setting})  # type: ignore[arg-type]


def test_bad_image_is_named() -> None:
    with pytest.raises(DataError, match="web/3: "):
        TrainTransform(8)(b"junk", "web/3")

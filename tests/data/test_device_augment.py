"""Operations on a batch of pixels against Pillow's on one image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from blipfast.data import RANDAUGMENT_OPS, TrainTransform, View
from blipfast.data.device_augment import finish_views

SIDE = 40


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 220, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def both(views: list[View], images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    squares = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    expected = [np.asarray(v.finish(np.asarray(i))) for v, i in zip(views, images, strict=True)]
    return finish_views(squares, views).numpy().astype(int), np.stack(expected).astype(int)


@pytest.mark.parametrize("op", RANDAUGMENT_OPS)
def test_each_operation(op):
    strengths = [1.0, 5.0, -5.0, 10.0, 7.5, 0.0]
    views = [
        View(SIDE, (0, 0, SIDE, SIDE), n % 2 == 1, ((op, s),)) for n, s in enumerate(strengths)
    ]
    ours, pillow = both(views, [picture(n) for n in range(len(views))])
    apart = np.abs(ours - pillow)
    assert np.quantile(apart, 0.995) <= 1, apart.max()
    assert apart.mean() < 0.3


@pytest.mark.parametrize("flat", [0, 128, 255])
@pytest.mark.parametrize("op", ["auto_contrast", "equalize", "sharpness"])
def test_a_plain_image(op, flat):
    image = Image.new("RGB", (SIDE, SIDE), (flat, flat, 7))
    ours, pillow = both([View(SIDE, (0, 0, SIDE, SIDE), False, ((op, 5.0),))], [image])
    assert np.array_equal(ours, pillow)


def test_drawn_views_in_one_batch():
    transform = TrainTransform(SIDE, rng=0)
    views = [transform.plan(SIDE, SIDE, np.random.default_rng(n)) for n in range(40)]
    assert len({op for view in views for op, _ in view.operations}) > 7
    ours, pillow = both(views, [picture(n) for n in range(40)])
    worst = np.abs(ours - pillow).reshape(40, -1).mean(1)
    # A grey level before equalize can be many after it.
    assert np.median(worst) < 0.3
    assert worst.max() < 6


def test_nothing_to_do_changes_nothing():
    views = [View(SIDE, (0, 0, SIDE, SIDE))] * 3
    ours, pillow = both(views, [picture(n) for n in range(3)])
    assert np.array_equal(ours, pillow)

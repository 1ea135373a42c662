"""The image encoder."""

from __future__ import annotations

import dataclasses

import torch

from blipfast.models.config import blip_config
from blipfast.models.vit import VisionTransformer, _drop_path


def test_the_first_token_alone_is_the_first_of_all() -> None:
    torch.manual_seed(0)
    config = blip_config("blip_tiny").vision
    vit = VisionTransformer(config).double().eval()
    pixels = torch.randn(2, 3, config.image_size, config.image_size, dtype=torch.float64)
    first, every = vit(pixels, first_only=True), vit(pixels)
    assert first.shape == (2, 1, config.hidden_size)
    torch.testing.assert_close(first, every[:, :1], atol=1e-12, rtol=1e-12)


def test_stochastic_depth_drops_branches_of_whole_images() -> None:
    """Of 400 equal images: a last block at rate 0.5 gives each of its four sums as often."""
    torch.manual_seed(0)
    config = dataclasses.replace(blip_config("blip_tiny").vision, num_layers=2, drop_path_rate=0.5)
    vit = VisionTransformer(config)
    size = config.image_size
    pixels = torch.randn(1, 3, size, size).expand(400, -1, -1, -1)
    with torch.no_grad():
        found, counts = (
            vit.train()(pixels)[:, 0].round(decimals=4).unique(dim=0, return_counts=True)
        )
    # The attention's branch and the network's are dropped or kept and doubled: four kinds.
    assert len(found) == 4
    assert (counts > 60).all()
    with torch.no_grad():
        assert len(vit.eval()(pixels)[:, 0].round(decimals=4).unique(dim=0)) == 1
        vit.train().blocks.eval()  # frozen blocks drop nothing
        assert len(vit(pixels)[:, 0].round(decimals=4).unique(dim=0)) == 1


def test_stochastic_depth_keeps_the_mean() -> None:
    torch.manual_seed(0)
    branch, keep = torch.ones(20_000, 1, 3), torch.tensor(0.7)
    dropped = _drop_path(branch, keep)
    assert abs(dropped.mean() - 1) < 0.02
    assert _drop_path(branch.bfloat16(), keep).dtype == torch.bfloat16
    assert torch.equal(_drop_path(branch, torch.tensor(1.0)), branch)

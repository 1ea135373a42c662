"""Models and goldens of the generation tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from blipfast.checkpoints.load import load_model
from blipfast.models.config import blip_config
from blipfast.tasks.caption import BlipForCaptioning

REFERENCE = Path(__file__).parent.parent / "fixtures" / "reference"


@pytest.fixture
def reference(
    device: torch.device,
) -> Callable[[str], tuple[Any, dict[str, Tensor], dict[str, Any]]]:
    """`name` to the original's model, its recorded tensors and the options it was run with."""

    def load(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
        folder = REFERENCE / name
        model = load_model(folder / "checkpoint.pth", name, device=device)
        meta = json.loads((folder / "golden.json").read_text())
        return model, load_file(folder / "golden.safetensors", str(device)), meta

    return load


def lively_captioner(seed: int = 0, dtype: torch.dtype = torch.float32) -> BlipForCaptioning:
    """A tiny captioner at random whose texts differ from image to image and end at many lengths."""
    torch.manual_seed(seed)
    model = BlipForCaptioning(blip_config("blip_tiny"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.25 if "word" in name else 0.15)
        bias = model.lm_head.decoder.bias
        bias[model.text_config.sep_token_id] = 5.0
        bias[model.text_config.pad_token_id] = -20.0
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def make_captioner() -> Callable[..., BlipForCaptioning]:
    """`make_captioner(seed, dtype)`, see `lively_captioner`."""
    return lively_captioner


@pytest.fixture
def vocab_file() -> Path:
    return REFERENCE / "vocab.txt"


@pytest.fixture
def captioner() -> BlipForCaptioning:
    return lively_captioner()


@pytest.fixture
def image_embeds() -> Tensor:
    """Five images' embeddings, `(5, 17, 64)`."""
    return torch.randn(5, 17, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def prompt_ids(captioner: BlipForCaptioning) -> Tensor:
    return torch.tensor([captioner.text_config.dec_token_id, 37, 210, 44])

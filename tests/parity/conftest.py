"""Golden outputs of the original model classes, and the tolerances their README names."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from blipfast import load_model
from blipfast.checkpoints.mapping import to_foreign
from blipfast.checkpoints.save import layout_of
from blipfast.models.blip import Blip, PackedText
from blipfast.objectives.itm import Negatives

REFERENCE = Path(__file__).parent.parent / "fixtures" / "reference"


@dataclass(frozen=True)
class Golden:
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def text(self, prefix: str = "text") -> tuple[Tensor, Tensor]:
        return self[f"{prefix}.input_ids"], self[f"{prefix}.attention_mask"]

    def packed(self, prefix: str = "text") -> PackedText:
        return PackedText.from_padded(*self.text(prefix))

    def negatives(self, name: str = "out.neg_draws") -> Negatives:
        """Recorded draws: first the image for each text, then the text for each image."""
        images, texts = self[name].chunk(2)
        return Negatives(images, texts)


@pytest.fixture
def golden(device: torch.device) -> Callable[..., Golden]:
    def load(name: str, part: str = "golden") -> Golden:
        folder = REFERENCE / name
        meta = json.loads((folder / f"{part}.json").read_text())
        return Golden(load_file(folder / f"{part}.safetensors", str(device)), meta)

    return load


@pytest.fixture
def load(device: torch.device) -> Callable[..., Any]:
    """`load_model`, to where the tests run (`pytest --device cuda`)."""
    return functools.partial(load_model, device=device)


@pytest.fixture
def checkpoint() -> Callable[[str], Path]:
    return lambda name: REFERENCE / name / "checkpoint.pth"


def features_close(ours: Tensor, theirs: Tensor) -> None:
    """Features and logits: 1e-5 absolute, and float32's own rounding of large logits.

    Twice that on a card, whose sums go in other orders than the recorded CPU's.
    """
    places = 2 if ours.is_cuda else 1
    torch.testing.assert_close(ours, theirs, atol=places * 1e-5, rtol=places * 2e-6)


def loss_close(ours: Tensor | float, theirs: Tensor | float) -> None:
    assert float(torch.as_tensor(ours).detach()) == pytest.approx(float(theirs), rel=1e-5)


def gradients_by_original_name(model: Blip) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    grads = {name: t.grad for name, t in state.items() if t.grad is not None}
    return to_foreign(grads, layout_of("original", model))


def check_gradients(
    grads: dict[str, Tensor], tensors: dict[str, Tensor], norms: dict[str, float | None]
) -> None:
    """All gradient norms (1e-4 relative) and the recorded full gradients.

    Beside the relative tolerance stands float32's noise: a key's bias has a gradient of zero in
    theory (softmax is blind to it), and of rounding errors in practice.
    """
    largest = max(norm for norm in norms.values() if norm is not None)
    assert any(norm for norm in norms.values())
    for name, norm in norms.items():
        if norm is None:
            assert name not in grads or not grads[name].any(), f"{name} must get no gradient"
            continue
        got = float(grads[name].norm())
        assert got == pytest.approx(norm, rel=1e-4, abs=1e-6 * largest), name
    full = {n.removeprefix("grad."): t for n, t in tensors.items() if n.startswith("grad.")}
    assert full
    for name, gradient in full.items():
        error = float((grads[name] - gradient).norm())
        assert error <= 1e-4 * float(gradient.norm()), f"{name}: off by {error}"


@pytest.fixture
def check() -> Any:
    """The comparisons above, since tests cannot import a conftest."""

    class Check:
        features = staticmethod(features_close)
        loss = staticmethod(loss_close)

        @staticmethod
        def gradients(model: Blip, golden: Golden, key: str = "grad_norms") -> None:
            check_gradients(gradients_by_original_name(model), golden.tensors, golden.meta[key])

        @staticmethod
        def gradient_tensors(
            grads: dict[str, Tensor], golden: Golden, norms: dict[str, float | None]
        ) -> None:
            check_gradients(grads, golden.tensors, norms)

        by_original_name = staticmethod(gradients_by_original_name)

    return Check

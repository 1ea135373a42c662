"""The fused contrastive loss in a training loop as open_clip's: two towers and a logit scale.

    python docs/examples/open_clip_loop.py

Each step is computed twice, by the plain loss and by `contrastive_softmax`, and must agree. Only
`fused_loss` is new; the loop, the towers and the logit scale stay as they are.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.ops import contrastive_softmax


class Towers(nn.Module):
    """Two encoders into one space, with CLIP's logit scale."""

    def __init__(self, width: int = 32, embed_dim: int = 16) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, embed_dim))
        self.text = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            F.normalize(self.image(images), dim=-1),
            F.normalize(self.text(texts), dim=-1),
            self.logit_scale.exp(),
        )


def plain_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """As it is usually written: a matrix of all pairs, and a cross-entropy each way."""
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def fused_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The same without the matrix, with gradients to both sides and the scale."""
    temperature = 1 / logit_scale
    to_text = contrastive_softmax(image_features, text_features, temperature)
    to_image = contrastive_softmax(text_features, image_features, temperature)
    return (to_text.mean() + to_image.mean()) / 2


def main(steps: int = 30, batch_size: int = 64) -> list[float]:
    torch.manual_seed(0)
    model = Towers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        meaning = torch.randn(batch_size, 32)  # what an image and its text have in common
        images, texts = meaning + 0.3 * torch.randn_like(meaning), meaning.flip(-1)
        outputs = model(images, texts)
        loss = fused_loss(*outputs)
        expected = plain_loss(*outputs)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        parameters = list(model.parameters())
        ours = torch.autograd.grad(loss, parameters, retain_graph=True)
        plain = torch.autograd.grad(expected, parameters)
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
        for parameter, gradient in zip(parameters, ours, strict=True):
            parameter.grad = gradient
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=torch.tensor(100.0).log())
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"step {step + 1}: loss {losses[-1]:.3f}, that of the plain code {expected:.3f}")
    return losses


if __name__ == "__main__":
    sys.exit(0 if main()[-1] < 4 else 1)

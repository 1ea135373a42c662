"""LM: next-token labels of packed texts against the padded formulation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blipfast.errors import ShapeError
from blipfast.models.blip import PackedText
from blipfast.objectives.lm import lm_loss
from blipfast.ops.packing import Packing


class Head(nn.Module):
    """A small prediction head."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.decoder = nn.Linear(6, 6), nn.Linear(6, 19)

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.dense(hidden))


@pytest.mark.parametrize("prompt_length", [0, 1, 3])
@pytest.mark.parametrize("lengths", [[1], [5], [4, 1, 7, 3], [2, 5]])
def test_packed_equals_padded(lengths: list[int], prompt_length: int) -> None:
    torch.manual_seed(0)
    width = max(lengths)
    ids = torch.randint(1, 19, (len(lengths), width))
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    hidden, head = torch.randn(len(lengths), width, 6), Head()
    inputs, labels = PackedText(ids[mask], Packing.from_lengths(lengths)).shifted()
    labels = labels.masked_fill(inputs.packing.positions < prompt_length - 1, -100)
    fed = mask & (torch.arange(width) < torch.tensor(lengths)[:, None] - 1)
    # As the original: targets where padding and prompt are ignored, then a shift by one.
    targets = ids.masked_fill(~mask, -100)
    targets[:, :prompt_length] = -100
    logits = head.decoder(head.transform(hidden))[:, :-1]
    shifted = targets[:, 1:]
    for reduction in ("sum", "mean"):
        if reduction == "mean" and not (shifted != -100).any():
            continue
        expected = F.cross_entropy(
            logits.flatten(0, 1), shifted.flatten(), label_smoothing=0.1, reduction=reduction
        )
        loss = lm_loss(hidden[fed], labels, head, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, expected)
    by_token = lm_loss(hidden[fed], labels, head, reduction="none")
    assert by_token.shape == labels.shape
    assert (by_token[labels == -100] == 0).all()


def test_nothing_to_learn_is_a_loss_of_zero() -> None:
    head = Head()
    loss = lm_loss(torch.randn(2, 6), torch.tensor([-100, -100]), head)
    loss.backward()
    assert loss.item() == 0
    assert (head.decoder.weight.grad == 0).all()


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match="labels must be int64"):
        lm_loss(torch.zeros(3, 6), torch.zeros(2, dtype=torch.int64), Head())

"""ITM: the original's sampling weights and losses; rows with no negative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, state_before
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.objectives.itm import Negatives, draw_negatives, itm_loss
from blipfast.ops.hard_negatives import hard_negative_weights


def test_weights_of_the_originals_pretraining() -> None:
    golden, (_, temperature) = Golden.load("pretrain"), state_before("pretrain")
    image, text, image_m, text_m = golden.features()
    for_texts = hard_negative_weights(text, image_m, temperature, eps=1e-4)
    for_images = hard_negative_weights(image, text_m, temperature, eps=1e-4)
    torch.testing.assert_close(
        torch.cat([for_texts, for_images]), golden["out.neg_weights"], rtol=1e-4, atol=1e-6
    )
    drawn = draw_negatives(image, text, image_m, text_m, temperature, eps=1e-4)
    forced = golden["out.neg_draws"].tolist()  # of two pairs the other is the only choice
    assert drawn.image_index.tolist() + drawn.text_index.tolist() == forced


def test_weights_of_the_originals_fine_tuning() -> None:
    golden, (_, temperature) = Golden.load("retrieval"), state_before("retrieval")
    image, text, _, _ = golden.features()
    ids = {"query_ids": golden["idx"], "key_ids": golden["idx"]}
    weights = [
        hard_negative_weights(text, image, temperature, **ids),
        hard_negative_weights(image, text, temperature, **ids),
    ]
    torch.testing.assert_close(torch.cat(weights), golden["out.neg_weights"], rtol=1e-4, atol=1e-6)
    counts = torch.zeros(8, 4)
    for step in range(400):
        drawn = draw_negatives(
            image, text, image, text, temperature, eps=0.0, image_ids=golden["idx"], step=step
        )
        index = torch.cat([drawn.image_index, drawn.text_index])
        counts += F.one_hot(index, 4)
    expected = golden["out.neg_weights"] / golden["out.neg_weights"].sum(1, keepdim=True) * 400
    assert (counts[expected == 0] == 0).all()
    chi_squared = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    assert chi_squared < 33  # at most 12 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("pretrain", ""),
        ("pretrain_batch4", ""),
        ("retrieval", ""),
        ("retrieval_two_ranks", "_rank0"),
        ("retrieval_two_ranks", "_rank1"),
    ],
)
def test_loss_of_the_original(name: str, suffix: str) -> None:
    golden = Golden.load(name, suffix)
    draws = golden["out.neg_draws"]
    weights = golden["out.neg_weights"]
    assert (weights.gather(1, draws[:, None]) > 0).all()
    loss = itm_loss(golden["out.itm_logits"], Negatives(*draws.chunk(2)))
    torch.testing.assert_close(loss, golden["out.loss_itm"], rtol=1e-5, atol=0)


def features(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 8, generator=generator), dim=1)


def test_both_directions_draw_independently() -> None:
    same = features(1, 0).expand(500, -1)
    drawn = draw_negatives(same, same, same, same, torch.tensor(1.0), eps=0.0)
    assert (drawn.image_index == drawn.text_index).float().mean() < 0.05


def test_equal_ids_are_never_drawn() -> None:
    image, text = features(12, 0), features(12, 1)
    ids = torch.arange(12) % 3
    for step in range(20):
        drawn = draw_negatives(
            image, text, image, text, torch.tensor(0.1), eps=1e-4, image_ids=ids, step=step
        )
        assert drawn.valid.all()
        assert (ids[drawn.image_index] != ids).all()
        assert (ids[drawn.text_index] != ids).all()


@pytest.mark.parametrize("ids", [None, torch.zeros(3, dtype=torch.int64)])
def test_rows_without_a_negative_do_not_count(ids: Tensor | None) -> None:
    batch = 1 if ids is None else 3
    image, text = features(batch, 0), features(batch, 1)
    drawn = draw_negatives(image, text, image, text, torch.tensor(0.1), eps=1e-4, image_ids=ids)
    assert not drawn.valid.any()
    logits = torch.randn(3 * batch, 2, requires_grad=True)
    loss = itm_loss(logits, drawn)
    expected = F.cross_entropy(logits[:batch], torch.ones(batch, dtype=torch.int64))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (logits.grad[batch:] == 0).all()


def test_bad_input() -> None:
    drawn = Negatives(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"2 pairs need \(6, 2\)"):
        itm_loss(torch.zeros(5, 2), drawn)
    with pytest.raises(ShapeError, match="width and device"):
        draw_negatives(
            features(2, 0), features(2, 0), torch.zeros(2, 7), features(2, 0), torch.ones(()), eps=0
        )

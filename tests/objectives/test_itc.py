"""ITC: the original's losses, queue and temperature gradient; ragged batches; bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, state_before
from torch import Tensor

from blipfast.errors import ConfigError, ShapeError
from blipfast.objectives.itc import FeatureQueue, alpha_at, clamp_temperature_, itc_loss


@pytest.mark.parametrize("impl", ["torch", "reference", "auto"])
@pytest.mark.parametrize("name", ["pretrain", "retrieval"])
def test_loss_and_temperature_gradient_of_the_original(name: str, impl: str) -> None:
    golden = Golden.load(name)
    queue, temperature = state_before(name)
    clamp_temperature_(temperature)
    temperature.requires_grad_()
    ids = golden["idx"] if name == "retrieval" else None
    loss = itc_loss(
        *golden.features(), queue, temperature, golden.notes["alpha"], ids=ids, impl=impl
    )
    torch.testing.assert_close(loss, golden["out.loss_ita"], rtol=1e-5, atol=0)
    loss.backward()  # no other loss of a step depends on the temperature
    torch.testing.assert_close(temperature.grad, golden["grad.temp"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["pretrain", "retrieval"])
def test_queue_after_the_step_of_the_original(name: str) -> None:
    golden = Golden.load(name)
    queue, _ = state_before(name)
    _, _, image_feat_m, text_feat_m = golden.features()
    queue.enqueue(image_feat_m, text_feat_m, golden["idx"] if name == "retrieval" else None)
    torch.testing.assert_close(queue.image_queue.T, golden["out.image_queue"], rtol=0, atol=1e-5)
    torch.testing.assert_close(queue.text_queue.T, golden["out.text_queue"], rtol=0, atol=1e-5)
    pointer = golden["out.queue_ptr" if name == "pretrain" else "out.ptr_queue"]
    assert queue.ptr.item() == pointer.item()
    if name == "retrieval":
        assert torch.equal(queue.id_queue, golden["out.idx_queue"][0])


def features(rows: int, seed: int, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=1)


def test_queue_holds_the_last_pairs_for_any_batch_sizes() -> None:
    queue = FeatureQueue(10, 8, with_ids=True)
    torch.testing.assert_close(queue.image_queue.norm(dim=1), torch.ones(10))
    assert (queue.id_queue == -100).all()
    written = 0
    for size in (3, 1, 9, 4, 25, 0, 10, 7):
        numbers = torch.arange(written, written + size)
        rows = numbers[:, None].expand(-1, 8).float()
        queue.enqueue(rows, -rows, numbers)
        written += size
        assert queue.ptr.item() == written % 10
        if written >= 10:
            expected = list(range(written - 10, written))
            assert sorted(queue.id_queue.tolist()) == expected
            assert all(number % 10 == place for place, number in enumerate(queue.id_queue))
            assert torch.equal(queue.image_queue[:, 0], queue.id_queue.float())
            assert torch.equal(queue.text_queue[:, 7], -queue.id_queue.float())


def test_queue_takes_low_precision_and_no_graph() -> None:
    queue = FeatureQueue(4, 8)
    rows = features(2, 0).bfloat16().requires_grad_()
    queue.enqueue(rows, rows)
    assert queue.image_queue.dtype == torch.float32
    assert not queue.image_queue.requires_grad
    assert torch.equal(queue.image_queue[:2], rows.detach().float())
    assert set(FeatureQueue(4, 8, with_ids=True).state_dict()) == {
        "image_queue",
        "text_queue",
        "id_queue",
        "ptr",
    }


@pytest.mark.parametrize("batch", [1, 5])
def test_gradients_reach_students_and_temperature_only(batch: int) -> None:
    tensors = [features(batch, seed).requires_grad_() for seed in range(4)]
    temperature = torch.tensor(0.1, requires_grad=True)
    queue = FeatureQueue(6, 8)
    loss = itc_loss(*tensors, queue, temperature, 0.4)  # type: ignore[arg-type]
    queue.enqueue(tensors[2], tensors[3])  # as in training: the queue is written before backward
    loss.backward()
    assert all(t.grad is not None and t.grad.any() for t in tensors[:2])
    assert temperature.grad is not None
    assert all(t.grad is None for t in tensors[2:])


def test_without_queue_one_pair_has_no_loss() -> None:
    one = features(1, 0)
    loss = itc_loss(one, one, one, one, None, torch.tensor(0.1), 0.4)
    assert loss.item() == pytest.approx(0, abs=1e-5)  # the rounding of a similarity of ten


def test_distinct_ids_equal_no_ids() -> None:
    tensors = [features(4, seed) for seed in range(4)]
    queue = FeatureQueue(6, 8, with_ids=True)
    temperature = torch.tensor(0.1)
    plain = itc_loss(*tensors, queue, temperature, 0.4)  # type: ignore[arg-type]
    with_ids = itc_loss(*tensors, queue, temperature, 0.4, ids=torch.arange(4))  # type: ignore[arg-type]
    torch.testing.assert_close(plain, with_ids)
    equal = itc_loss(*tensors, queue, temperature, 0.4, ids=torch.zeros(4, dtype=torch.int64))  # type: ignore[arg-type]
    assert equal.isfinite()
    assert equal != plain


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_useless_temperature_gives_nan(value: float) -> None:
    tensors = [features(3, seed) for seed in range(4)]
    assert itc_loss(*tensors, FeatureQueue(6, 8), torch.tensor(value), 0.4).isnan()  # type: ignore[arg-type]


def test_temperature_is_clamped_in_place() -> None:
    for before, after in ((-1.0, 0.001), (0.07, 0.07), (3.0, 0.5)):
        temperature = torch.nn.Parameter(torch.tensor(before))
        clamp_temperature_(temperature)
        assert temperature.item() == pytest.approx(after)
        assert temperature.grad_fn is None


def test_alpha_ramp() -> None:
    pretrain = [alpha_at(0.4, epoch, step, 10) for epoch in range(3) for step in (0, 5)]
    assert pretrain == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    retrieval = [
        alpha_at(0.4, epoch, step, 10, ramp_epochs=1) for epoch in (0, 1) for step in (0, 5)
    ]
    assert retrieval == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert alpha_at(0.4, 0, 0, 10, ramp_epochs=0) == 0.4


def test_bad_input() -> None:
    four, three = features(4, 0), features(3, 1)
    temperature = torch.tensor(0.1)
    with pytest.raises(ShapeError, match="features must all be"):
        itc_loss(four, three, four, four, None, temperature, 0.4)
    with pytest.raises(ShapeError, match="the width of query"):
        itc_loss(four, four, four, four, FeatureQueue(5, 7), temperature, 0.4)
    with pytest.raises(ShapeError, match="with_ids=True"):
        itc_loss(four, four, four, four, FeatureQueue(5, 8), temperature, 0.4, ids=torch.arange(4))
    with pytest.raises(ShapeError, match="3 query ids"):
        itc_loss(four, four, four, four, None, temperature, 0.4, ids=torch.arange(3))
    with pytest.raises(ConfigError, match="size=0"):
        FeatureQueue(0, 8)
    for arguments, words in [
        ((four, three), r"must both be \(B, 8\)"),
        ((four[:, :3], four[:, :3]), r"must both be \(B, 8\)"),
        ((four, four, torch.arange(4)), "takes no ids"),
    ]:
        with pytest.raises(ShapeError, match=words):
            FeatureQueue(5, 8).enqueue(*arguments)
    with pytest.raises(ShapeError, match="needs ids"):
        FeatureQueue(5, 8, with_ids=True).enqueue(four, four)
    with pytest.raises(ShapeError, match=r"\(3,\) ids for 4 pairs"):
        FeatureQueue(5, 8, with_ids=True).enqueue(four, four, torch.arange(3))

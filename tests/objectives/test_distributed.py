"""Two processes give what one gives: gathers, queue, negatives, gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.objectives.distributed import (
    all_gather_no_grad,
    fetch_rows,
    gather_texts,
    mean_over_ranks,
    rank_offset,
    world_size,
)
from blipfast.objectives.itc import FeatureQueue, gather_keys, itc_loss
from blipfast.objectives.itm import draw_negatives
from blipfast.train.ranks import leave_group

RANKS, BATCH = 2, 3


def features(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(RANKS * BATCH, 8, generator=generator), dim=1)


def queue() -> FeatureQueue:
    torch.manual_seed(0)
    made = FeatureQueue(7, 8, with_ids=True)
    made.ptr.fill_(5)
    return made


def step(rows: slice, first: int) -> dict[str, Tensor]:
    """What one process computes for its rows, with keys and negatives from all rows."""
    image, text = (features(seed)[rows].requires_grad_() for seed in (0, 1))
    image_m, text_m = (features(seed)[rows] for seed in (2, 3))
    ids, memory, temperature = torch.arange(6)[rows] % 4, queue(), torch.tensor(0.1)
    keys = gather_keys(image_m, text_m, ids)
    losses = [
        itc_loss(image, text, image_m, text_m, memory, temperature, 0.4, i, keys=keys)
        for i in (None, ids)
    ]
    memory.enqueue(keys.image, keys.text, keys.ids)
    # Every rank asks for the first two rows of each rank.
    asked = torch.tensor([0, 1, BATCH, BATCH + 1])
    rows, places = fetch_rows(image, asked)
    fetched = rows[places]
    weights = torch.arange(fetched.numel()).view_as(fetched) * (first + 1.0)
    (sum(losses) + (fetched * weights).sum()).backward()
    drawn = draw_negatives(
        image,
        text,
        all_gather_no_grad(image),
        all_gather_no_grad(text),
        temperature,
        eps=0.0,
        image_ids=ids,
        key_ids=all_gather_no_grad(ids),
        offset=first,
        step=3,
    )
    return {
        "losses": torch.stack(losses).detach(),
        "image_grad": image.grad,
        "text_grad": text.grad,
        "drawn": torch.stack([drawn.image_index, drawn.text_index]),
        "image_queue": memory.image_queue,
        "ids": memory.id_queue,
        "ptr": memory.ptr,
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    try:
        first = rank_offset(BATCH)
        torch.save(step(slice(first, first + BATCH), first), f"{folder}/{rank}.pt")
    finally:
        leave_group()


def test_without_a_process_group_nothing_happens() -> None:
    tensor = features(0).requires_grad_()
    assert world_size() == 1
    assert rank_offset(5) == 0
    assert torch.equal(all_gather_no_grad(tensor), tensor)
    assert not all_gather_no_grad(tensor).requires_grad


def test_alone_all_rows_are_at_hand() -> None:
    tensor = features(0)
    rows, places = fetch_rows(tensor, torch.tensor([2, -1, 5]))
    assert rows is tensor
    assert places == [2, -1, 5]
    ids, mask = torch.ones(2, 3), torch.zeros(2, 3)
    assert gather_texts(ids, mask) == (ids, mask)
    for odd in (-2, RANKS * BATCH):
        with pytest.raises(ShapeError, match="must lie between"):
            fetch_rows(tensor, torch.tensor([odd]))


def test_a_mean_of_nothing_is_zero() -> None:
    assert mean_over_ranks(torch.tensor(0.0), torch.tensor(0)).item() == 0.0
    assert mean_over_ranks(torch.tensor(6.0), torch.tensor(3)).item() == 2.0


def test_two_processes_equal_one(tmp_path: Path) -> None:
    # Processes of this file as a script: pytest's import mode gives it no name to import it by.
    command = [sys.executable, __file__, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(RANKS)]
    try:
        assert [process.wait(timeout=120) for process in workers] == [0] * RANKS
    finally:
        for process in workers:
            process.kill()
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    whole = step(slice(None), 0)
    torch.testing.assert_close((parts[0]["losses"] + parts[1]["losses"]) / 2, whole["losses"])
    for name in ("image_queue", "ids", "ptr"):
        assert torch.equal(parts[0][name], whole[name])
        assert torch.equal(parts[1][name], whole[name])
    assert torch.equal(torch.cat([part["drawn"] for part in parts], dim=1), whole["drawn"])
    # A rank's loss is a mean over half the rows, so its gradient is twice the whole's.
    text_grad = torch.cat([part["text_grad"] for part in parts]) / 2
    torch.testing.assert_close(text_grad, whole["text_grad"])
    # The fetched rows' gradient sums the weights of both ranks: 1 and 4 times the whole's.
    weights = torch.zeros(RANKS * BATCH, 8)
    weights[[0, 1, BATCH, BATCH + 1]] = torch.arange(32.0).view(4, 8)
    own = torch.cat([part["image_grad"] for part in parts]) - 5 * weights
    torch.testing.assert_close(own / 2, whole["image_grad"] - weights, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    worker(int(sys.argv[2]), sys.argv[1])

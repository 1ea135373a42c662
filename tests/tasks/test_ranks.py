"""A global batch gives the same losses and gradients on one rank and on several, whole or in parts.

`python test_ranks.py FOLDER RANK RANKS TASK MICRO_BATCH` is one of the processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from blipfast.models.config import blip_config
from blipfast.tasks.in_parts import backward_in_parts
from blipfast.tasks.pretrain import BlipForPretraining
from blipfast.tasks.retrieval import BlipForRetrieval
from blipfast.train.ranks import leave_group

BATCH, LENGTHS = 8, [5, 11, 2, 8, 7, 3, 9, 4]


def make_model(task: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = blip_config("blip_tiny")
    if task == "pretrain":
        model = BlipForPretraining(config, queue_size=12, exclude_equal_ids=True)
    else:
        model = BlipForRetrieval(config, train_state=True, queue_size=12, across_ranks=True)
    with torch.no_grad():  # the small weights of a fresh model would hide a mixed-up image
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(103, 450, mask.shape, generator=generator) * mask
    size = blip_config("blip_tiny").vision.image_size
    pixels = torch.randn(BATCH, 3, size, size, generator=generator, dtype=torch.float64)
    image_ids = torch.tensor([0, 1, 2, 0, 3, 4, 2, 5])
    return {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": mask,
        "image_ids": image_ids,
    }


def step(model: torch.nn.Module, rows: slice, micro_batch: int) -> dict[str, torch.Tensor]:
    """Losses and gradients of the rows of one rank, and the queue after the step."""
    batch = {name: value[rows] for name, value in make_batch().items()}
    longest = int(batch["attention_mask"].sum(1).max())  # as a loader pads: differs by rank
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][:, :longest]
    options = {"alpha": 0.4, "step": 5, "seed": 1}
    if micro_batch:
        output = backward_in_parts(model, **batch, micro_batch=micro_batch, **options)
    else:
        output = model(**batch, **options, update_state=True)
        output.loss.backward()
    result = {f"loss_{name}": loss.detach() for name, loss in output.losses().items()}
    result |= {"itm_logits": output.itm_logits.detach().unflatten(0, (3, -1))}
    result |= {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return result | {f"queue.{n}": b for n, b in model.queue.named_buffers()}


def worker(folder: str, rank: int, ranks: int, task: str, micro_batch: int) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    share = BATCH // ranks
    result = step(make_model(task), slice(rank * share, (rank + 1) * share), micro_batch)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    leave_group()


def on_ranks(folder: Path, ranks: int, task: str, micro_batch: int) -> list[dict]:
    arguments = [str(ranks), task, str(micro_batch)]
    # Processes that spin for the same cores are tens of times slower: one thread each.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank), *arguments], env=environment)
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(timeout=300) for process in workers] == [0] * ranks
    finally:
        for process in workers:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 3), (2, 0), (2, 3), (4, 0)])
def test_ranks_and_parts_equal_one_whole_batch(tmp_path, task, ranks, micro_batch) -> None:
    whole = step(make_model(task), slice(None), 0)
    parts = on_ranks(tmp_path, ranks, task, micro_batch)
    close = {"rtol": 1e-8, "atol": 1e-11}
    for name, expected in whole.items():
        got = [part[name] for part in parts]
        if name.startswith("queue."):
            assert all(torch.equal(one, got[0]) for one in got[1:]), name
            torch.testing.assert_close(got[0], expected, **close, msg=name)
        elif name == "itm_logits":  # the same negatives were drawn
            torch.testing.assert_close(torch.cat(got, dim=1), expected, **close)
        else:  # DDP averages gradients over ranks
            torch.testing.assert_close(torch.stack(got).mean(0), expected, **close, msg=name)
    assert {f"grad.{part}" for part in ("temp", "vision_proj.weight")} <= whole.keys()
    assert all(part.keys() == whole.keys() for part in parts)


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))

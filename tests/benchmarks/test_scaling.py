"""The bytes of the scaling model are those that real processes hand to their collectives.

`python test_scaling.py FOLDER RANK` is one of the processes.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BATCH, TOKENS, RANKS = 4, 9, 2


def worker(folder: str, rank: int) -> None:
    import torch
    import torch.distributed as dist

    from blipfast.models.config import blip_config
    from blipfast.tasks.pretrain import BlipForPretraining
    from blipfast.train.ranks import leave_group

    sizes: dict[str, int] = {}

    def count(name: str, real):
        def counted(*arguments, **options):
            tensor = arguments[1] if name in ("all_gather", "all_to_all_single") else arguments[0]
            sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()
            return real(*arguments, **options)

        return counted

    faulthandler.dump_traceback_later(120, exit=True)  # a process that hangs says where
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    config = blip_config("blip_tiny")
    model = BlipForPretraining(config, queue_size=16)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)

    for name in ("all_gather", "all_reduce", "all_to_all_single"):
        setattr(dist, name, count(name, getattr(dist, name)))
    torch.manual_seed(rank)
    side = config.vision.image_size
    ids = torch.randint(103, 450, (BATCH, TOKENS))
    output = wrapped(
        torch.randn(BATCH, 3, side, side), ids, torch.ones_like(ids), alpha=0.4, step=0
    )
    output.loss.backward()
    buckets = wrapped._get_ddp_logging_data()["bucket_sizes"]
    sizes["gradients"] = sum(int(size) for size in buckets.split(","))
    drawn = output.negatives.image_index
    foreign = len({i for i in drawn.tolist() if i // BATCH != rank})
    Path(folder, f"{rank}.json").write_text(json.dumps([sizes, foreign]))
    dist.barrier()
    leave_group()


def test_bytes_are_those_of_the_model(tmp_path: Path) -> None:
    from benchmarks.scaling import collectives, parameters
    from blipfast.models.config import blip_config

    # Processes that spin for the same cores are tens of times slower: one thread each.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)], env=environment)
        for rank in range(RANKS)
    ]
    try:
        assert [process.wait(timeout=300) for process in workers] == [0] * RANKS
    finally:
        for process in workers:
            process.kill()
    config = blip_config("blip_tiny")
    expected = collectives(config, BATCH, RANKS, TOKENS)
    (sizes, mine), (_, theirs) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)
    )
    assert sizes["gradients"] == expected["gradients (all-reduce)"] == 4 * parameters(config)[0]
    gathered = sum(expected[name] for name in expected if "all-gather" in name)
    assert sizes["all_gather"] == gathered
    # Each image goes once, however many texts have drawn it, and its gradient comes back.
    image = config.vision.num_tokens * config.vision.hidden_size * 4
    assert sizes["all_to_all_single"] == (theirs + mine) * image
    assert (
        sizes["all_to_all_single"] <= 2 * expected["drawn images and their gradients (all-to-all)"]
    )


@pytest.mark.parametrize("preset", ["blip_tiny", "blip_base"])
def test_parameters_by_formula(preset: str) -> None:
    import torch

    from benchmarks.scaling import parameters
    from blipfast.models.config import blip_config
    from blipfast.tasks.pretrain import BlipForPretraining

    config = blip_config(preset)
    with torch.device("meta"):
        model = BlipForPretraining(config, queue_size=4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters(config)[0] == trained


def test_more_gpus_are_never_faster_than_in_proportion() -> None:
    from benchmarks.scaling import GPUS, Cluster, step_seconds
    from blipfast.models.config import blip_config

    seconds = [sum(step_seconds(blip_config("blip_base"), 90, n, Cluster())) for n in GPUS]
    assert all(later >= seconds[0] for later in seconds)


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]))

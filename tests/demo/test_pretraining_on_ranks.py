"""The demo's pre-training gives the same curve on one process and on two that torchrun starts.

`python test_pretraining_on_ranks.py FOLDER` is one of the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 40


def worker(folder: Path) -> None:
    import torch

    from blipfast.demo.learning import demo_tokenizer, new_model, pretrain
    from blipfast.demo.samples import Samples
    from blipfast.demo.scenes import build_demo_data
    from blipfast.demo.settings import DemoSettings
    from blipfast.train.ranks import process_group, rank, world_size

    torch.set_num_threads(1)
    settings = DemoSettings(
        num_web=256, num_clean=64, num_val=8, num_test=12, batch_size=32, pretrain_steps=STEPS,
        image_size=32, vision_width=64, vision_layers=2, text_layers=1, queue_size=128, threads=1,
        precision="fp32",
    )  # fmt: skip
    data = build_demo_data(
        seed=0, num_web=settings.num_web, num_clean=settings.num_clean, num_val=settings.num_val,
        num_test=settings.num_test, image_size=settings.image_size, noise=settings.noise,
        hard_share=settings.hard_share, num_concepts=settings.num_concepts,
    )  # fmt: skip
    tokenizer, rows = demo_tokenizer()
    with process_group(torch.device("cpu"), 120.0):
        model = new_model(settings, tokenizer, rows)
        samples = Samples.from_demo(data.web) + Samples.from_demo(data.clean)
        history = pretrain(model, samples, tokenizer, settings, "pre-train")
        if rank() == 0:
            history.to_json(folder / f"{world_size()}.json")


def curve(folder: Path, *command: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, __file__, str(folder)], env=environment, check=False,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{2 if command else 1}.json").read_text())


@pytest.mark.slow
def test_same_curve_on_one_process_and_on_two(tmp_path: Path) -> None:
    alone = curve(tmp_path)
    both = curve(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert alone["samples"] == both["samples"] == [32] * STEPS
    for name in ("itc", "itm", "lm"):
        one, two = alone["losses"][name], both["losses"][name]
        # The demo has no dropout: the same batches, negatives and gradients, but for rounding,
        # which in the end may tip the draw of a negative.
        assert two[:10] == pytest.approx(one[:10], rel=1e-3), name
        start, end = sum(one[:5]) / 5, sum(one[-10:]) / 10
        noise = 0.12 * max(abs(start - end), 0.2)
        assert sum(two[-10:]) / 10 == pytest.approx(end, abs=noise), name
    assert alone["losses"]["lm"][-1] < 0.7 * alone["losses"]["lm"][0]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))

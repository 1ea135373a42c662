"""Real torchrun processes: the same run on any number of ranks, also when stopped or killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from shards import captions, write

from blipfast.errors import Preempted
from blipfast.train.checkpoints import read_facts
from blipfast.train.stopping import EXIT_HUNG

WORKER = Path(__file__).parent / "rank_worker.py"
BLIP = {
    "kind": "blip", "epochs": 1, "steps_per_epoch": 5, "schedule": "constant",
    "learning_rate": 1e-3, "checkpoint_every": 3,
}  # fmt: skip
TOY = {"steps": 60, "schedule": "constant", "learning_rate": 1e-2, "checkpoint_every": 2}


def start(folder: Path, ranks: int, options: dict, *torchrun: str) -> subprocess.Popen:
    """Starts `rank_worker.py` on some ranks, by torchrun even if it is one."""
    folder.mkdir(exist_ok=True)
    with open(folder / "errors.txt", "w") as errors:
        return subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
                *torchrun, str(WORKER), str(folder), json.dumps(options),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip


def end(process: subprocess.Popen, folder: Path, timeout: float = 300) -> str:
    """Waits for the end; returns what was written to stderr."""
    try:
        process.wait(timeout)
    finally:
        process.kill()
    return (folder / "errors.txt").read_text()


def run(folder: Path, ranks: int, options: dict, *torchrun: str) -> dict:
    process = start(folder, ranks, options, *torchrun)
    errors = end(process, folder)
    assert process.returncode == 0, errors
    return json.loads((folder / "history.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "done.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a tiny BLIP on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, 1, BLIP)
    return folder


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {}),
        (4, {}),
        (2, {"parallel": "fsdp"}),
        (2, {"micro_batch": 1}),
        (2, {"parallel": "fsdp", "micro_batch": 1}),
        (2, {"parallel": "fsdp", "grad_checkpointing": True, "grad_clip": 1e6}),
        (2, {"parallel": "fsdp", "precision": "pure_bf16"}),
        (2, {"parallel": "fsdp", "precision": "pure_bf16", "micro_batch": 1}),
        (2, {"compile": True}),
        (2, {"compile": True, "parallel": "fsdp"}),
    ],
)
def test_the_same_run_on_any_ranks(tmp_path, alone, ranks, options):
    expected = json.loads((alone / "history.json").read_text())
    got = run(tmp_path / "run", ranks, BLIP | options)
    exact = options.get("precision") is None
    assert got["total"] == pytest.approx(expected["total"], rel=2e-4 if exact else 5e-3)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-4 if exact else 0.1)
    assert got["samples"] == expected["samples"]
    ours, theirs = weights(tmp_path / "run"), weights(alone)
    assert ours.keys() == theirs.keys()
    if exact:  # Adam's first steps of 1e-3 are sensitive to the rounding of tiny gradients
        apart = [(ours[n] - theirs[n]).float().abs().mean() for n in ours]
        assert max(apart) < 2e-4


def test_recorded_steps_on_two_ranks(tmp_path):
    """Collectives are part of what is recorded; gradients are averaged after it."""
    apart = BLIP | {"across_ranks": False}
    expected = run(tmp_path / "plain", 2, apart)
    got = run(tmp_path / "recorded", 2, apart | {"cuda_graph": True})
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-4)
    for name, losses in expected["losses"].items():
        assert got["losses"][name] == pytest.approx(losses, rel=2e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resume_on_as_many_ranks_is_bitwise(tmp_path, parallel):
    options = BLIP | {"parallel": parallel}
    whole = run(tmp_path / "whole", 2, options)
    run(tmp_path / "parts", 2, options | {"steps": 3})
    (tmp_path / "parts" / "done.pt").unlink()
    both = run(tmp_path / "parts", 2, options)
    assert both["total"] == whole["total"]
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(t, expected[n]) for n, t in weights(tmp_path / "parts").items())


@pytest.mark.parametrize(("before", "after"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_resume_on_other_ranks_in_another_layout(tmp_path, alone, before, after):
    run(tmp_path / "run", 2, BLIP | {"parallel": before, "steps": 3})
    got = run(tmp_path / "run", 1, BLIP | {"parallel": after})
    expected = json.loads((alone / "history.json").read_text())
    assert got["steps"] == [0, 1, 2, 3, 4]
    assert got["total"] == pytest.approx(expected["total"], rel=2e-4)


def pids(folder: Path, ranks: int) -> list[int]:
    """The processes that have trained last, in rank order; [] before all have begun."""
    files = [folder / f"steps-{rank}.txt" for rank in range(ranks)]
    if not all(file.exists() and file.read_text().endswith("\n") for file in files):
        return []
    return [int(file.read_text().split()[-1]) for file in files]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        alive = process.poll() is None and time.monotonic() < deadline
        assert alive, (folder / "errors.txt").read_text()[-5000:]
        time.sleep(0.01)


def test_sigterm_saves_and_torchrun_starts_again(tmp_path):
    whole = run(tmp_path / "whole", 2, TOY)
    folder = tmp_path / "told"
    process = start(folder, 2, TOY | {"pause": 0.05, "checkpoint_every": 50}, "--max-restarts", "1")
    wait_for(lambda: len(pids(folder, 2)) == 2, process, folder)
    time.sleep(0.5)
    first = pids(folder, 2)
    os.kill(first[1], signal.SIGTERM)
    errors = end(process, folder)
    assert process.returncode == 0, errors
    assert f"exitcode: {Preempted.exit_code}" in errors
    lines = [line.split() for line in (folder / "steps-0.txt").read_text().splitlines()]
    steps = [int(step) for step, _ in lines]
    assert steps == list(range(60)), "a step was lost or done twice"
    assert len({pid for _, pid in lines}) == 2
    assert json.loads((folder / "history.json").read_text())["total"] == whole["total"]


def test_killed_and_restarted_on_other_ranks_each_sample_is_seen_once(tmp_path):
    write(tmp_path / "shards", captions(60), max_count=11)
    options = {
        "kind": "shards", "steps": 45, "schedule": "constant", "checkpoint_every": 3, "pause": 0.05,
    }  # fmt: skip
    process = start(tmp_path, 2, options)
    logs = [tmp_path / f"keys-2-{rank}.txt" for rank in range(2)]
    wait_for(
        lambda: all(p.exists() and p.read_text().count("\n") > 10 for p in logs), process, tmp_path
    )
    os.kill(pids(tmp_path, 2)[1], signal.SIGKILL)
    end(process, tmp_path)
    saved = read_facts(max((tmp_path / "checkpoint").glob("step-*")))["step"]
    assert 6 <= saved < 30
    run(tmp_path, 3, options)
    seen = []
    for log in tmp_path.glob("keys-*.txt"):
        rows = [line.split() for line in log.read_text().splitlines()]
        # What the killed ranks did after the checkpoint is lost, and done again.
        kept = [row for row in rows if "keys-3" in log.name or int(row[0]) < saved]
        seen += [key for _, epoch, key in kept if epoch == "0"]
    assert sorted(seen) == [f"r{n:03d}" for n in range(60)]


def test_a_rank_that_hangs_is_reported_with_its_stack(tmp_path):
    process = start(tmp_path, 2, TOY | {"hang": [1, 3], "hang_timeout": 4.0})
    errors = end(process, tmp_path)
    assert process.returncode != 0
    assert "rank 1 of 2 has not finished step 3 within 4 s" in errors
    report = errors[errors.index("rank 1 of 2") :]
    assert "rank_worker.py" in report
    assert f"exitcode: {EXIT_HUNG}" in errors


@pytest.mark.slow
def test_killed_twenty_times_it_loses_no_more_than_since_the_last_checkpoint(tmp_path):
    options, rng = TOY | {"steps": 300}, random.Random(0)
    whole = run(tmp_path / "whole", 2, options)
    folder, kills = tmp_path / "killed", 20
    process = start(
        folder, 2, options | {"pause": 0.02}, "--max-restarts", "30", "--monitor-interval", "0.1"
    )
    gone: set[int] = set()
    for _ in range(kills):
        wait_for(lambda gone=gone: len(set(pids(folder, 2)) - gone) == 2, process, folder)
        time.sleep(rng.uniform(0, 0.25))
        gone = gone | set(pids(folder, 2))
        os.kill(rng.choice(pids(folder, 2)), signal.SIGKILL)
        newest = max((folder / "checkpoint").glob("step-*"), default=None)
        assert newest is None or read_facts(newest)["step"] % 2 == 0
    errors = end(process, folder)
    assert process.returncode == 0, errors
    lines = [line.split() for line in (folder / "steps-0.txt").read_text().splitlines()]
    assert len({pid for _, pid in lines}) > kills
    for (step, pid), (next_step, next_pid) in itertools.pairwise(lines):
        if pid == next_pid:
            assert int(next_step) == int(step) + 1
        else:  # the newest checkpoint may still have been under way, the one before it not
            assert int(step) // 2 * 2 - 2 <= int(next_step) <= int(step) + 1
    assert json.loads((folder / "history.json").read_text())["total"] == whole["total"]
    ours, expected = weights(folder), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)

"""One process, the ranks of torchrun, and Ray: the same output, and killed at any moment too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blipfast.capfilt import read_manifest

TORCHRUN = (
    "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
    "--nproc-per-node",
)  # fmt: skip


def start(arguments: list[str], log: Path, ranks: int | None = None) -> subprocess.Popen:
    """`blipfast capfilt`, by itself or on ranks; stderr goes to the log."""
    how = ["-m", "blipfast.cli"] if ranks is None else [*TORCHRUN, str(ranks), "-m", "blipfast.cli"]
    with open(log, "ab") as errors:
        return subprocess.Popen(
            [sys.executable, *how, "capfilt", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
            stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
        )  # fmt: skip


def run(arguments: list[str], log: Path, ranks: int | None = None) -> None:
    process = start(arguments, log, ranks)
    try:
        assert process.wait(300) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def arguments(shards: Path, checkpoints: dict[str, str], output: Path) -> list[str]:
    return [
        "--input", str(shards), "--output", str(output), "--captioner", checkpoints["captioner"],
        "--filter", checkpoints["filter"], "--unit", "2", "--batch_size", "2", "--device", "cpu",
        "--max_length", "12", "--threads", "1",
    ]  # fmt: skip


def output(folder: Path) -> dict[str, bytes]:
    found = [p for p in folder.iterdir() if p.suffix == ".tar" or p.name == "manifest.jsonl"]
    return {path.name: path.read_bytes() for path in found}


@pytest.mark.slow
def test_ranks_and_ray_write_what_one_process_writes(shards, checkpoints, tmp_path) -> None:
    log = tmp_path / "errors.txt"
    for name, ranks, more in (
        ("alone", None, []),
        ("ranks", 2, []),
        ("ray", None, ["--runner", "ray", "--ray_models", "1", "--ray_decoders", "1"]),
    ):
        run([*arguments(shards, checkpoints, tmp_path / name), *more], log, ranks)
    alone = output(tmp_path / "alone")
    assert len(list(read_manifest(tmp_path / "alone" / "manifest.jsonl"))) == 24
    assert output(tmp_path / "ranks") == alone
    assert output(tmp_path / "ray") == alone


@pytest.mark.slow
def test_killed_at_any_moment_no_pair_is_lost_or_doubled(shards, checkpoints, tmp_path) -> None:
    log = tmp_path / "errors.txt"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(arguments(shards, checkpoints, whole), log)
    draws = random.Random(0)
    killed = 0
    for attempt in range(40):
        done = len(list(cut.rglob("0*.jsonl"))) + len(list(cut.glob("manifest/*.jsonl")))
        ranks = draws.choice((None, None, 2))
        process = start(arguments(shards, checkpoints, cut), log, ranks)
        # Until a unit more is there than before, and then a random moment longer.
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            now = len(list(cut.rglob("0*.jsonl"))) + len(list(cut.glob("manifest/*.jsonl")))
            if now > done:
                break
            time.sleep(0.005)
        time.sleep(draws.random() * 0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        ended = process.wait(60)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, (attempt, log.read_text()[-3000:])
    assert killed >= 3
    assert output(cut) == output(whole)
    left = [p for p in cut.rglob(".*") if p.is_file() and "index" not in p.name]
    assert not left

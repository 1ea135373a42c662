"""The plan of a run: all that matters is said, and nothing is done."""

from __future__ import annotations

import sys
from pathlib import Path

from blipfast.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from shards import VOCABULARY, captions, write


def plan(tmp_path: Path, capsys, *more: str) -> str:
    if not (tmp_path / "shards").exists():
        write(tmp_path / "shards", captions(12))
    options = """train --config pretrain --model.preset blip_tiny --model.image_size 32
        --objective.queue_size 64 --data.batch_size 4 --device cpu --dry_run true""".split()  # noqa: SIM905
    options += ["--data.shards", str(tmp_path / "shards"), "--data.vocabulary", str(VOCABULARY)]
    assert main([*options, "--output", str(tmp_path / "run"), *more]) == 0
    return capsys.readouterr().out


def test_a_plan_says_all_and_trains_nothing(tmp_path, capsys):
    text = plan(tmp_path, capsys)
    for said in ("12 samples an epoch", "60 steps, 3 to an epoch", "peak memory", "TFLOP", "MiB"):
        assert said in text, said
    assert not (tmp_path / "run").exists()


def peak(text: str) -> float:
    [line] = [line for line in text.splitlines() if "activations" in line]
    return float(line.split("│")[-2].split()[0].replace(",", ""))


def test_less_memory_where_less_is_kept(tmp_path, capsys):
    size = ["--model.image_size", "128", "--data.batch_size", "12"]
    plain = peak(plan(tmp_path, capsys, *size))
    parts = peak(plan(tmp_path, capsys, *size, "--fit.micro_batch", "3"))
    again = peak(plan(tmp_path, capsys, *size, "--fit.grad_checkpointing", "true"))
    assert parts < 0.6 * plain
    assert again < 0.6 * plain

"""Ctrl-C in a real process: whole files only, and a checkpoint that resumes to the same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from blipfast.train.checkpoints import read_facts

HERE = Path(__file__).parent
SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from toy import Toy, toy_batches, toy_step
from blipfast.train import FitConfig, fit

slow = len(sys.argv) > 3

def step(model, batch, number, epoch):
    if slow:
        print("step", number, flush=True)
        time.sleep(0.05)
    return toy_step(model, batch, number, epoch)

model = Toy()
config = FitConfig(steps=60, learning_rate=1e-2, checkpoint_every=1000)
fit(model, toy_batches(), step, config, title="toy", checkpoint_dir=sys.argv[1], resume=not slow)
torch.save(model.state_dict(), sys.argv[1] + "/done.pt")
"""


def _start(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(HERE), *more]
    # A parent in the background of a shell ignores Ctrl-C, and so would its children.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for(process: subprocess.Popen, line: str) -> None:
    assert process.stdout is not None
    for text in process.stdout:
        if text.strip() == line:
            return
    raise AssertionError(f"the process ended before {line!r}: {process.stderr.read()}")


def test_sigint_saves_and_resumes_to_the_same_weights(tmp_path):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = _start(cut, "slow")
    _wait_for(process, "step 5")
    time.sleep(0.02)  # inside the step
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT or "KeyboardInterrupt" in errors
    [saved] = cut.iterdir()
    state = read_facts(saved)
    assert 6 <= state["step"] < 60
    assert state["history"]["steps"] == list(range(state["step"]))
    for folder in (cut, whole):
        process = _start(folder)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    ours, expected = torch.load(cut / "done.pt"), torch.load(whole / "done.pt")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_two_sigints_do_not_wait(tmp_path):
    process = _start(tmp_path, "slow")
    _wait_for(process, "step 3")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert len([p for p in tmp_path.iterdir() if not p.name.startswith(".")]) <= 1

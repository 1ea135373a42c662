"""Predicted against measured peak memory of training steps: `python -m benchmarks.memory_check`.

Each case runs three steps in a process of its own. `--write` renews `results/memory.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import _resident
from blipfast.environment import keep_freed_memory

ROOT = Path(__file__).parent.parent
LENGTH = 14
CASES: dict[str, dict[str, Any]] = {
    "ViT-B/16, 224 px, batch 4, fp32": {"batch": 4},
    "ViT-B/16, 224 px, batch 8, fp32": {"batch": 8},
    "ViT-B/16, 224 px, batch 8, bf16": {"batch": 8, "precision": "bf16"},
    "ViT-B/16, 384 px, batch 4, fp32": {"batch": 4, "image_size": 384},
    "ViT-B/16, 224 px, batch 16, fp32, checkpointed": {"batch": 16, "grad_checkpointing": True},
    "ViT-B/16, 224 px, batch 16, fp32, micro-batches of 4": {"batch": 16, "micro_batch": 4},
}


def predicted_and_measured(case: dict[str, Any]) -> tuple[float, float]:
    """MiB of a case, run in this process: call it in a fresh one."""
    keep_freed_memory()
    from blipfast.checkpoints.load import build
    from blipfast.models.config import blip_config
    from blipfast.train.config import DataConfig, FitConfig, ObjectiveConfig, TrainConfig
    from blipfast.train.engine import fit
    from blipfast.train.memory import predict_memory, synthetic_batch
    from blipfast.train.recipes import RECIPES

    run = FitConfig(
        steps=3, schedule="constant", precision=case.get("precision", "fp32"),
        grad_checkpointing=case.get("grad_checkpointing", False),
        micro_batch=case.get("micro_batch"),
    )  # fmt: skip
    objective = ObjectiveConfig(queue_size=case.get("queue_size", 57_600))
    config = TrainConfig(
        task=case.get("task", "pretrain"), data=DataConfig(batch_size=case["batch"]), fit=run,
        objective=objective,
    )  # fmt: skip
    preset = blip_config(case.get("preset", "blip_base"), image_size=case.get("image_size"))
    recipe = RECIPES[config.task]
    torch.ones(512, 512) @ torch.ones(512, 512)  # what the libraries take for themselves
    before = _resident("VmRSS")
    model = build(recipe.task, preset, recipe.options(objective))
    if run.grad_checkpointing:
        model.checkpoint_gradients()
    if case["what"] == "predict":
        step = recipe.make_step(objective, dataclasses.replace(run, micro_batch=None))
        return predict_memory(config, model, step, length=LENGTH).peak / 2**20, 0.0
    batch = synthetic_batch(config.task, model.config, case["batch"], LENGTH)
    Path("/proc/self/clear_refs").write_text("5")
    fit(model, [batch] * 3, recipe.make_step(objective, run), run, title="memory")
    return 0.0, _resident("VmHWM") - before


def check(case: dict[str, Any]) -> tuple[float, float]:
    """MiB predicted and measured, each in a process of its own."""
    found = []
    for what in ("predict", "measure"):
        command = [sys.executable, "-m", "benchmarks.memory_check"]
        done = subprocess.run(
            [*command, "--case", json.dumps({**case, "what": what})],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the case {case} failed:\n{done.stderr}")
        found.append(json.loads(done.stdout.splitlines()[-1])[what == "measure"])
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="JSON; run one in this process")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(predicted_and_measured(json.loads(arguments.case))))
        return
    lines = [
        "# Peak memory of a pre-training step: predicted and measured",
        "",
        f"`python -m benchmarks.memory_check --write`; torch {torch.__version__}, on the CPU, "
        f"queue 57,600, texts of {LENGTH} tokens; MiB on top of the program itself.",
        "",
        "| step | predicted | measured | difference |",
        "|---|---|---|---|",
    ]
    for name, case in CASES.items():
        predicted, measured = check(case)
        lines.append(
            f"| {name} | {predicted:,.0f} | {measured:,.0f} | {predicted / measured - 1:+.1%} |"
        )
        print(lines[-1], flush=True)
    if arguments.write:
        (ROOT / "benchmarks/results/memory.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

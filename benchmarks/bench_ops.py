"""Every operator's backends beside plain PyTorch: forward and backward, and the share of the roof.

What is timed is chosen by the options of `python -m benchmarks` (`--op`, `--backend`, `--device`,
`--dtype`, `--sweep`), which come here in the environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.memory import extra_peak, extra_peak_of_card
from benchmarks.op_cases import CASES, SWEEPS, Case, Setting, assert_same, codes_of
from benchmarks.roofline import Roof, measure, seconds_on_card, synchronize

OPTIONS_VAR = "BLIPFAST_BENCH_OPS"
OPTIONS: dict[str, Any] = {
    "op": list(CASES), "backend": "all", "device": "cpu", "dtype": "fp32", "small": False,
    "sweep": False,
    **json.loads(os.environ.get(OPTIONS_VAR, "{}")),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETTING = Setting(torch.device(OPTIONS["device"]), DTYPES[OPTIONS["dtype"]], OPTIONS["small"])
ROUNDS = 3 if SETTING.small else 5 if OPTIONS["sweep"] else 9


@cache
def roof() -> Roof:
    return measure(SETTING.device, SETTING.dtype)


@cache
def cases(op: str) -> list[Case]:
    return SWEEPS[op].cases(SETTING) if OPTIONS["sweep"] else CASES[op](SETTING)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    probe = torch.empty(0, device=SETTING.device, dtype=SETTING.dtype)
    found = [
        pytest.param(op, i, code, id=f"{op}-{i}-{code}")
        for op in OPTIONS["op"]
        for i, case in enumerate(cases(op))
        for code in codes_of(op, case, probe, OPTIONS["backend"])
    ]
    metafunc.parametrize(("op", "index", "code"), found)


def test_op(benchmark: Any, op: str, index: int, code: str) -> None:
    case = cases(op)[index]
    run = case.code(code)
    if code != case.baseline:
        assert_same(case, run(), case.run(case.baseline)(), SETTING.dtype)

    def timed() -> None:
        run()
        synchronize(SETTING.device)

    benchmark.group = f"{case.name}, {OPTIONS['device']}, {OPTIONS['dtype']}"
    benchmark.extra_info.update(code=code, peak_mib=_peak(timed))
    if case.size:
        benchmark.extra_info.update(op=op, axis=case.axis, size=case.size)
    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=1 if SETTING.small else 3)
    seconds = benchmark.stats.stats.median
    if SETTING.device.type == "cuda":  # beside the time that a caller waits
        seconds = seconds_on_card(run)
        benchmark.extra_info["microseconds_on_card"] = 1e6 * seconds
    benchmark.extra_info["share_of_roof"] = roof().floor(case.bytes, case.flops) / seconds


def _peak(run: Callable[[], None]) -> float:
    """MiB that a call needs on top of its inputs."""
    return extra_peak_of_card(run) if SETTING.device.type == "cuda" else extra_peak(run)

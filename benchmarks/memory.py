"""Peak memory of a call, measured by the system: all that is needed, whoever allocates it."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from blipfast.environment import keep_freed_memory

ROOT = Path(__file__).parent.parent


def peak_memory(factory: str, *args: str) -> float:
    """MiB that `factory(*args)()` needs on top of its inputs and the model.

    factory: `"module:function"`; what it returns is run once, in a fresh process on Linux.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", factory, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {factory} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def extra_peak(run: Callable[[], object]) -> float:
    """MiB that a call in this process needs on top of what is there already, on Linux."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what was freed before is no part of what is there
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run()
    return _resident("VmHWM") - before


def extra_peak_of_card(run: Callable[[], object]) -> float:
    """MiB of the current card that a call needs on top of what is there already."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _resident(field: str) -> float:
    """MiB of VmRSS (now) or VmHWM (at the most) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this system does not tell {field}")


def main(factory: str, *args: str) -> None:
    keep_freed_memory()  # as in the processes whose times stand beside
    module, _, name = factory.partition(":")
    print(extra_peak(getattr(importlib.import_module(module), name)(*args)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Peak memory of a call, measured in a process of its own."""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def peak_memory(factory: str, *args: str) -> float:
    """MiB that `factory(*args)()` needs on top of its inputs and the model.

    factory: `"module:function"`; what it returns is run once. The high-water mark of resident
    memory is read before and after, so only a fresh process tells.
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


def _high_water() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(factory: str, *args: str) -> None:
    module, _, name = factory.partition(":")
    run = getattr(importlib.import_module(module), name)(*args)
    before = _high_water()
    run()
    print(_high_water() - before)


if __name__ == "__main__":
    main(*sys.argv[1:])

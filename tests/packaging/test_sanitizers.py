"""The C++ operators' own tests, under sanitizers of addresses and of undefined behaviour."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("native", "native_attention", "few_rows", "hard_negatives", "contrastive")
TESTS += ("attention", "dense", "linear_layers")
RUNTIMES = ("libasan.so", "libubsan.so")


def runtime(name: str) -> str:
    """Where g++ has a sanitizer's library; its bare name where there is none."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_nothing_is_out_of_bounds_or_undefined(build_library: Callable[..., Path]) -> None:
    if not shutil.which("g++"):
        pytest.skip("needs g++, which brings the sanitizers")
    preloaded = [runtime(name) for name in RUNTIMES]
    if not all(Path(path).is_absolute() for path in preloaded):
        pytest.skip("needs g++'s sanitizers (libasan, libubsan)")
    library = build_library("-DBLIPFAST_SANITIZE=ON")
    assert b"__asan_report_load4" in library.read_bytes()

    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment |= {
        "SANITIZED_LIBRARY": str(library),
        "PYTHONPATH": str(Path(__file__).parent),
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",  # Python leaks on purpose
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
    }
    files = [str(ROOT / "tests" / "ops" / f"test_{name}.py") for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "sanitized_library"]
    # Not captured, since a sanitizer's report is the last thing that its process says.
    command += ["-p", "no:cacheprovider", "-s", "-m", "not slow", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout

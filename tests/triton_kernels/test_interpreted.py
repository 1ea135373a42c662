"""Runs each file of `checks/` under TRITON_INTERPRET=1, in a process of its own.

Triton decides when it is imported whether it interprets, so the variable may not be set here, where
other tests of the same worker compile kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
HERE = Path(__file__).parent / "checks"


@pytest.mark.parametrize("file", sorted(HERE.glob("check_*.py")), ids=lambda path: path.stem)
def test_in_the_interpreter(file: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout), result.stdout
    assert "skipped" not in result.stdout, result.stdout

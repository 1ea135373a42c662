"""What tests of the C++ part share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def needs_compiler() -> None:
    if not shutil.which("cmake") or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("needs cmake and a C++ compiler")


@pytest.fixture
def build_library(tmp_path: Path, needs_compiler: None) -> Callable[..., Path]:
    """`build_library(option, …)`: the library, alone in a folder, built by cmake with options."""

    def build(*options: str) -> Path:
        build, out = tmp_path / "build", tmp_path / "out"
        options += (f"-DPython_EXECUTABLE={sys.executable}", f"-DBLIPFAST_OUTPUT_DIR={out}")
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(build), *options],
            ["cmake", "--build", str(build)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr
        return out / "libblipfast_native.so"

    return build

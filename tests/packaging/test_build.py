"""The C++ part: built with a compiler, done without when there is none."""

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


def setup_py_build(target: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_native"]
    command += ["--build-lib", str(target / "lib"), "--build-temp", str(target / "tmp")]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def ours(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("blipfast:")]


def test_without_cmake_the_install_succeeds_with_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    done = setup_py_build(tmp_path, PATH=str(empty), CXX="", BLIPFAST_NATIVE="auto")
    assert done.returncode == 0, done.stderr
    (line,) = ours(done)
    assert "without native CPU operators" in line
    assert "cmake was not found" in line
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_without_a_compiler_the_install_succeeds_with_one_line(tmp_path: Path) -> None:
    only_cmake = tmp_path / "bin"
    only_cmake.mkdir()
    (only_cmake / "cmake").write_text("#!/bin/sh\nexit 0\n")
    (only_cmake / "cmake").chmod(0o755)
    done = setup_py_build(tmp_path, PATH=str(only_cmake), CXX="", BLIPFAST_NATIVE="auto")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in ours(done)[0]


def test_required_and_impossible_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    done = setup_py_build(tmp_path, PATH=str(empty), CXX="", BLIPFAST_NATIVE="1")
    assert done.returncode != 0
    assert "cmake was not found" in done.stderr + done.stdout


def test_a_compile_error_names_its_cause(tmp_path: Path, needs_compiler: None) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns(".git", ".venv*", "build", "tests", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skip)
    (source / "kernels" / "csrc" / "broken.cpp").write_text("#error this does not compile\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_native", "--build-lib", str(tmp_path / "lib")],
        cwd=source,
        env={**os.environ, "BLIPFAST_NATIVE": "auto"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "this does not compile" in ours(done)[0]


def test_cmake_alone_builds_a_library_that_loads(build_library: Callable[..., Path]) -> None:
    library = build_library()
    code = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        "print(torch.ops.blipfast_native.isa_level())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() in ("0", "3", "4"), done.stderr
    assert [path.name for path in library.parent.iterdir()] == ["libblipfast_native.so"]


def test_cmake_without_a_compiler_configures(tmp_path: Path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    done = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_CXX_COMPILER=NOTFOUND"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout + done.stderr


def test_every_constraint_is_an_exact_pin() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 20
    shape = r'([\w.\-]+)==[\w.]+(; python_version (?:<|>=) "3\.11")?'
    found = [re.fullmatch(shape, pin) for pin in pins]
    assert [pin for pin, match in zip(pins, found, strict=True) if match is None] == []
    names = [match.group(1, 2) for match in found if match]
    assert len(set(names)) == len(names), "a package is pinned twice for one Python"


def test_the_version_is_in_one_place() -> None:
    from importlib.metadata import version

    import blipfast

    assert version("blipfast") == blipfast.__version__

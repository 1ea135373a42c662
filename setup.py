"""Builds the optional C++ operators; everything else about the package is in pyproject.toml.

Without cmake, a C++ compiler or torch the install succeeds and says so in one line.
`BLIPFAST_NATIVE=0` skips the build, `BLIPFAST_NATIVE=1` makes a failure an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("BLIPFAST_NATIVE", "auto")
FIND_TORCH = (
    "import importlib.util as u; s = u.find_spec('torch'); "
    "print(s.submodule_search_locations[0] if s else '')"
)


def torch_folder() -> str:
    """Where torch lies, or ''. `-I` sees past the isolated environment that pip builds in."""
    found = subprocess.run([sys.executable, "-I", "-c", FIND_TORCH], capture_output=True, text=True)
    return found.stdout.strip()


def blocker() -> str | None:
    """What keeps the native part from being built, in words, or None."""
    if WANTED == "0":
        return "BLIPFAST_NATIVE=0"
    if shutil.which("cmake") is None:
        return "cmake was not found"
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    if not any(name and shutil.which(name.split()[0]) for name in compilers):
        return "no C++ compiler was found"
    if not torch_folder():
        return "torch is not installed yet (install torch first, then blipfast)"
    return None


def build_native(target: Path, scratch: Path) -> str | None:
    """Put the library into the folder `target`; returns why it could not, or None."""
    reason = blocker()
    if reason is not None:
        return reason
    scratch.mkdir(parents=True, exist_ok=True)
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(scratch), "-DCMAKE_BUILD_TYPE=Release"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DBLIPFAST_OUTPUT_DIR={target}"),
    ]
    for command in (configure, ["cmake", "--build", str(scratch), "--config", "Release"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            log = scratch / "blipfast_build.log"
            log.write_text(done.stdout)
            # Not any line with the word: a folder's name may hold it.
            lines = re.findall(r"^.*\berror(?::| at ).*$", done.stdout, re.I | re.M)
            return f"the C++ build failed: {lines[0].strip() if lines else 'see ' + str(log)}"
    return None


class BuildNative(Command):
    """Runs CMake; in an editable install it also adds the guard of the folder `kernels`."""

    description = "build the optional C++ operators"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [
        ("build-lib=", None, "the folder that receives blipfast/libblipfast_native.so"),
        ("build-temp=", None, "the folder for CMake's files"),
    ]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.build_temp: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options(
            "build", ("build_lib", "build_lib"), ("build_temp", "build_temp")
        )

    def run(self) -> None:
        assert self.build_lib is not None
        assert self.build_temp is not None
        base = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        reason = build_native(base / "blipfast", Path(self.build_temp).resolve() / "native")
        if reason is None:
            print("blipfast: built the native CPU operators")
        elif WANTED == "1":
            raise SystemExit(f"blipfast: BLIPFAST_NATIVE=1, but {reason}")
        else:
            print(f"blipfast: without native CPU operators, PyTorch's are used instead: {reason}")
        if self.editable_mode:
            self._install_guard()

    def _install_guard(self) -> None:
        # In an editable install `install_lib` is the folder that becomes the wheel.
        site = Path(self.get_finalized_command("install").install_lib)
        site.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "kernels" / "_blipfast_checkout_guard.py", site)
        (site / "_blipfast_checkout_guard.pth").write_text(
            "import _blipfast_checkout_guard; _blipfast_checkout_guard.install()\n"
        )

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        sources = [*(ROOT / "kernels" / "csrc").glob("*.*"), ROOT / "CMakeLists.txt"]
        sources += (ROOT / "kernels").glob("*.py")
        return [str(path.relative_to(ROOT)) for path in sources]


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class PlatformWheel(bdist_wheel):
    """One wheel per platform and for every Python: the library knows torch's stable ABI alone."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = blocker() is not None

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(
    # Never the folder `kernels` itself: a package of that name would hide Hugging Face's.
    packages=[*find_packages(include=["blipfast", "blipfast.*"]), "blipfast.kernels"],
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": PlatformWheel},
)

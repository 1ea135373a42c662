"""Compile the Triton kernels for given cards into a folder, so that their first use does not wait.

    python -m benchmarks.aot_bundle --arch 90 --out sm90  # or: cmake --build build --target aot
    TRITON_CACHE_DIR=sm90 torchrun ...                         # on the machines with the card

The folder is Triton's own cache. What is compiled are the shapes and dtypes of `aot_cases.py`,
by the path that a launch takes up to where it would need the card, so that a launch finds them.
Triton looks at the version of itself, of the kernels' source and of the card: a bundle serves those
it was made for, and anything else is compiled on first use as ever.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class _Card:
    """As much of a driver as compiling asks for."""

    def __init__(self, archs: Sequence[str]) -> None:
        self.archs, self.number = list(archs), 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        arch = self.archs[self.number]
        if arch.startswith("gfx"):
            return GPUTarget("hip", arch, 64)
        return GPUTarget("cuda", int(arch), 32)

    def get_current_device(self) -> int:
        return self.number  # a device each, since Triton remembers what a device is

    def get_current_stream(self, device: int) -> int:
        return 0


def bundle(archs: Sequence[str], out: Path, *, quick: bool = False) -> tuple[int, int]:
    """Compiles into `out`; returns how many kernels there are, and how many were compiled now."""
    os.environ["TRITON_CACHE_DIR"] = str(out.resolve())
    os.environ.pop("TRITON_INTERPRET", None)
    from blipfast.kernels import _runtime
    from triton.runtime import driver

    from benchmarks.aot_cases import CASES

    def warm(kernel: Any, grid: Any, args: Sequence[Any], meta: dict[str, Any]) -> None:
        compiled = kernel.run(*args, grid=(1,), warmup=True, **meta)
        wanted.add(compiled.hash)

    before = set(_entries(out))
    wanted: set[str] = set()
    card = _Card(archs)
    driver.set_active(card)
    _runtime.recorder = warm
    try:
        for number, arch in enumerate(archs):
            card.number = number
            _runtime.forced_target = "hip" if arch.startswith("gfx") else int(arch)
            for cases in CASES:
                for label, run in cases(quick):
                    run()
                    print(f"\r{arch}: {len(wanted)} kernels, {label:<60}", end="", file=sys.stderr)
    finally:
        _runtime.recorder = _runtime.forced_target = None
        print(file=sys.stderr)
    return len(wanted), len(set(_entries(out)) - before)


def _entries(folder: Path) -> list[str]:
    """Compiled kernels in one of Triton's caches."""
    found = [*folder.glob("*/*.cubin"), *folder.glob("*/*.hsaco")]
    return [path.parent.name for path in found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100"], help="as 90, or gfx942")
    parser.add_argument("--out", type=Path, required=True, help="the folder")
    parser.add_argument("--quick", action="store_true", help="a few configurations only")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    known, new = bundle(arguments.arch, arguments.out, quick=arguments.quick)
    print(f"{known} kernels in {arguments.out}, {new} of them compiled now")
    return 0


if __name__ == "__main__":
    sys.exit(main())

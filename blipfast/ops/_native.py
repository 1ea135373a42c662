"""Loads the optional C++ operators (`kernels/csrc`, built by CMake) and says why when it cannot."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parents[1] / "libblipfast_native.so"
ENV_VAR = "BLIPFAST_NATIVE"
_ISA_NAMES = {4: "AVX-512", 3: "AVX2", 0: "portable"}


@functools.cache
def _load() -> str | None:
    """Load the library once; returns why it is not there, or None."""
    if os.environ.get(ENV_VAR) == "0":
        return f"switched off by {ENV_VAR}=0"
    if not LIBRARY.is_file():
        return (
            "the C++ operators were not built; install cmake and a C++ compiler, then reinstall "
            "blipfast (pip install -v --no-build-isolation -e . shows why a build failed)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load beside torch {torch.__version__}: {error}"
    return None


def why_not(tensor: torch.Tensor | None = None) -> str | None:
    """Why the native operators cannot run (on `tensor`, when given), in words, or None."""
    if tensor is not None and tensor.device.type != "cpu":
        return f"native operators are for the CPU, the tensor is on {tensor.device}"
    if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16):
        return f"native operators take float32 and bfloat16, not {tensor.dtype}"
    return _load()


def status() -> str:
    """One line for people: what was loaded, and at which instruction set it runs."""
    reason = _load()
    if reason is not None:
        return f"no native CPU operators: {reason}"
    level = int(torch.ops.blipfast_native.isa_level())
    return f"native CPU operators loaded ({_ISA_NAMES[level]})"

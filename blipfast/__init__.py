"""blipfast: BLIP (Li et al. 2022), engineered for speed.

Importing the package is cheap: what it offers is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_LAZY = {
    "load_model": "blipfast.checkpoints",
    "save_model": "blipfast.checkpoints",
    "detect": "blipfast.environment",
}
_SUBMODULES = frozenset(
    {"capfilt", "checkpoints", "cli", "data", "demo", "environment", "errors", "evaluation"}
    | {"generation", "kernels", "models", "objectives", "ops", "tasks", "train"}
)

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return import_module(f"blipfast.{name}")
    raise AttributeError(f"module 'blipfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_SUBMODULES])

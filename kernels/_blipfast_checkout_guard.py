"""Keeps the folder `kernels/` of a checkout from passing for the package of that name.

Standing in a checkout, Python would take that folder for an empty namespace package `kernels`, the
name of a Hugging Face package that transformers looks for. An editable install puts this file and
a `.pth` line beside it; from then on a checkout on `sys.path` has no `kernels`, and the real
package is found wherever it is installed.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from types import ModuleType


def is_checkout(path: str) -> bool:
    """Whether `path` is the root of a blipfast checkout."""
    marks = ("blipfast/ops/_dispatch.py", "kernels/src/__init__.py", "kernels/csrc")
    return all(os.path.exists(os.path.join(path or os.getcwd(), mark)) for mark in marks)


class CheckoutFinder(FileFinder):
    """Finds all that a checkout's root holds, except `kernels`."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return None if fullname == "kernels" else super().find_spec(fullname, target)


def _hook(path: str) -> CheckoutFinder:
    if not is_checkout(path):
        raise ImportError(f"{path} is no blipfast checkout", path=path)
    return CheckoutFinder(
        path,
        (ExtensionFileLoader, EXTENSION_SUFFIXES),
        (SourceFileLoader, SOURCE_SUFFIXES),
        (SourcelessFileLoader, BYTECODE_SUFFIXES),
    )


def install() -> None:
    """Put the guard first among the path hooks, once."""
    if any(getattr(hook, "__name__", "") == "_hook" for hook in sys.path_hooks):
        return
    sys.path_hooks.insert(0, _hook)
    for path in [path for path in sys.path_importer_cache if is_checkout(path)]:
        del sys.path_importer_cache[path]

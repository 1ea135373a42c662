"""A pytest plugin: the C++ operators come from the library that SANITIZED_LIBRARY names."""

from __future__ import annotations

import os
from pathlib import Path

from blipfast.ops import _native

_native.LIBRARY = Path(os.environ["SANITIZED_LIBRARY"])

"""Where the checks run: on the first card, or without one in the interpreter on the CPU."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
assert INTERPRETED or torch.cuda.is_available(), "no card: set TRITON_INTERPRET=1 for these checks"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
IMPL = "triton_interpreter" if INTERPRETED else "triton"

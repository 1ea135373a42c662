"""Training: typed configs, schedules, batches from shards, the loop and one recipe per task.

Importing it is cheap: what it offers is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> the module that defines it.
_LAZY = {
    "DataConfig": "blipfast.train.config",
    "FitConfig": "blipfast.train.config",
    "ModelConfig": "blipfast.train.config",
    "ObjectiveConfig": "blipfast.train.config",
    "TrainConfig": "blipfast.train.config",
    "History": "blipfast.train.history",
    "RECIPES": "blipfast.train.recipes",
    "Recipe": "blipfast.train.recipes",
    "ShardBatches": "blipfast.train.batches",
    "count_samples": "blipfast.train.batches",
    "packaged_configs": "blipfast.train.config",
    "fit": "blipfast.train.engine",
    "run_training": "blipfast.train.recipes",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'blipfast.train' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

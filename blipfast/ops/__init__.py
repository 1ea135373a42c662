"""Operators that any project can import alone: functions, each with a plain reference, and modules.

    from blipfast.ops import contrastive_softmax, cross_attention, CrossPlan, Packing

What is named here is loaded on first use. Backends are chosen by argument (`impl=`), by
`use_backend(...)`, or by BLIPFAST_BACKEND; `blipfast info` says which one runs here, and why.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> the module that defines it.
_LAZY = {
    "CrossPlan": "attention",
    "cross_attention": "attention",
    "cross_attention_reference": "attention",
    "varlen_attention": "attention",
    "varlen_attention_reference": "attention",
    "contrastive_softmax": "contrastive",
    "contrastive_softmax_reference": "contrastive",
    "DevicePacking": "device_packing",
    "dense_attention": "dense",
    "dense_self_attention": "dense",
    "hard_negative_weights": "hard_negatives",
    "sample_hard_negatives": "hard_negatives",
    "sample_hard_negatives_reference": "hard_negatives",
    "LayerNorm": "layer_norm",
    "add_layer_norm": "layer_norm",
    "add_layer_norm_reference": "layer_norm",
    "TiedTable": "tied_table",
    "few_rows_linear": "few_rows",
    "few_rows_linears": "few_rows",
    "dropout": "seeded_dropout",
    "feed_forward": "linear_layers",
    "linear": "linear_layers",
    "linear_cross_entropy": "linear_ce",
    "linear_cross_entropy_reference": "linear_ce",
    "ContrastiveLoss": "modules",
    "CrossAttention": "modules",
    "HardNegatives": "modules",
    "LinearCrossEntropy": "modules",
    "momentum_update_": "momentum_update",
    "momentum_update_reference_": "momentum_update",
    "Packing": "packing",
    "explain": "_dispatch",
    "use_backend": "_dispatch",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'blipfast.ops' has no attribute {name!r}")
    return getattr(import_module(f"blipfast.ops.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

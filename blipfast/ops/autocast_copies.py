"""Autocast's copies of weights, one for all uses in a step.

PyTorch keeps such copies too, but only `F.linear` and its like can see them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

# A graph that used a copy keeps it until its backward is through. It is looked up only while the
# weight has not changed.
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def autocast_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`, with gradients; the same tensor as long as one made before is in use."""
    if weight.dtype == dtype or not weight.requires_grad:
        return weight.to(dtype)
    version, made = _copies.get(weight, (None, None))
    copy = made() if version == weight._version and made is not None else None
    if copy is None or copy.dtype != dtype:
        copy = weight.to(dtype)
        _copies[weight] = weight._version, TensorWeakRef(copy)
    return copy

"""Autocast's copies of weights, one for all uses in a step.

PyTorch keeps such copies too, but only `F.linear` and its like can see them, and makes them one by
one: on a GPU a launch for each weight and each bias, and another for each gradient on its way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

# A graph that used a copy keeps it until its backward is through. It is looked up only while the
# weight has not changed.
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_DEVICES = ("cuda",)
_kept: ContextVar[list[Tensor] | None] = ContextVar("blipfast_kept_copies", default=None)


def autocast_copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight.to(dtype)`, with gradients; the same tensor as long as one made before is in use."""
    if weight.dtype == dtype or not weight.requires_grad:
        return weight.to(dtype)
    copy = copy_in_use(weight, dtype)
    if copy is None:
        copy = weight.to(dtype)
        _remember(weight, copy)
    return copy


def copy_in_use(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The copy that was made before, if somebody still holds it and the weight has not changed."""
    version, made = _copies.get(weight, (None, None))
    copy = made() if version == weight._version and made is not None else None
    # What was made without gradients serves only as long as none are wanted.
    if copy is None or copy.dtype != dtype or (_wants_grad(weight) and not copy.requires_grad):
        return None
    return copy


def cast_together(*layers: nn.Module) -> list[Tensor]:
    """Copies of all weights and biases of `layers` by one launch, where autocast is on for a GPU.

    Their `linear` finds them as long as the result, or `keeping_copies`, holds them. What is no
    plain `nn.Linear` of float32 weights is left to autocast.
    """
    if torch.compiler.is_compiling():
        return []
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    weights = [w for layer in linears for w in (layer.weight, layer.bias) if w is not None]
    if not weights or not casts_together(weights[0]):
        return []
    dtype = torch.get_autocast_dtype(weights[0].device.type)
    held = [copy_in_use(w, dtype) for w in weights]
    found = [copy for copy in held if copy is not None]
    missing = [w for w, copy in zip(weights, held, strict=True) if copy is None]
    if not all(type(w) is nn.Parameter and w.dtype == torch.float32 for w in missing):
        return found
    if any(map(_wants_grad, missing)):
        copies = list(_Together.apply(dtype, *missing))
    else:
        copies = _all_to(dtype, missing) if missing else []
    for weight, copy in zip(missing, copies, strict=True):
        _remember(weight, copy)
    kept = _kept.get()
    if kept is not None:
        kept += copies
    return found + copies


@contextmanager
def keeping_copies() -> Iterator[None]:
    """Within it copies that were made together serve all uses, as autocast's own do."""
    token = _kept.set([])
    try:
        yield
    finally:
        _kept.reset(token)


def casts_together(tensor: Tensor) -> bool:
    """Whether `cast_together` makes the copies that layers use on the tensor's device."""
    kind = tensor.device.type
    return kind in _DEVICES and torch.is_autocast_enabled(kind)


def _wants_grad(weight: Tensor) -> bool:
    return weight.requires_grad and torch.is_grad_enabled()


def _remember(weight: Tensor, copy: Tensor) -> None:
    _copies[weight] = weight._version, TensorWeakRef(copy)


def _all_to(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(_all_to(dtype, list(weights)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        full = iter(_all_to(ctx.dtype, [grad for grad in grads if grad is not None]))
        return None, *(None if grad is None else next(full) for grad in grads)

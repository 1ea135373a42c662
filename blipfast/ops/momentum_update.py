"""Momentum (exponential moving average) update of many tensors at once (BLIP 3.2, MoCo eq. 2).

target <- momentum * target + (1 - momentum) * source
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.ops._dispatch import Backends

backends = Backends("momentum_update_")


@torch.no_grad()
def momentum_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float, *, impl: str = "auto"
) -> None:
    """Move every target towards its source in place, without gradient.

    Args:
        targets: float tensors of any shapes, dtypes and devices. Below float32 a momentum near one
            rounds small steps away: keep targets in float32 and cast a copy of them instead.
        sources: tensors of the same shapes and devices; another dtype is cast to the target's.
        momentum: from 0 (targets become the sources) to 1 (nothing happens).
        impl: backend name or "auto".

    Raises:
        ShapeError: numbers of tensors, shapes or devices differ, or momentum is out of range.
        BackendError: `impl` names a backend that cannot run.
    """
    if len(targets) != len(sources):
        raise ShapeError(f"momentum_update_: {len(targets)} targets, {len(sources)} sources")
    if not 0 <= momentum <= 1:
        raise ShapeError(f"momentum_update_: momentum={momentum} must be in 0 ... 1")
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape or target.device != source.device:
            raise ShapeError(
                f"momentum_update_: target {index} is {tuple(target.shape)} on {target.device}, "
                f"its source {tuple(source.shape)} on {source.device}"
            )
        if not target.is_floating_point():
            raise ShapeError(f"momentum_update_: target {index} is {target.dtype}, not float")
    if targets:
        backends(targets[0], impl)(targets, sources, momentum)


@backends.register("torch")
def _torch_backend(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]]
    groups = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        group = groups[target.device, target.dtype]
        group[0].append(target)
        group[1].append(source if source.dtype == target.dtype else source.to(target.dtype))
    for same_targets, same_sources in groups.values():
        torch._foreach_lerp_(same_targets, same_sources, 1 - momentum)


@backends.register("reference")
def momentum_update_reference_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float
) -> None:
    """The formula, tensor by tensor."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(target * momentum + source.to(target.dtype) * (1 - momentum))

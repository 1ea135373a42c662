"""FLOPs of a call, counted operation by operation (a multiplication and an addition are two)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from blipfast.ops import _native

_aten = torch.ops.aten


def _sdpa(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _sdpa_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _linear(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


# The counter does not know what is the CPU's alone.
_CPU: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    torch.ops.mkldnn._linear_pointwise: _linear,
}


def _scores(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many scores the C++ operator computes; of packed queries only those that there are."""
    if cu_seqlens is None:
        return math.prod(q.shape[:3]) * k.shape[2]
    lengths = cu_seqlens.diff().tolist()
    packed = k.shape[0] != len(lengths)
    return q.shape[1] * sum(n * (n if packed else k.shape[2]) for n in lengths)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Any, cu_seqlens: Any, *_: Any, **__: Any
) -> int:
    return 2 * 2 * _scores(q, k, cu_seqlens) * q.shape[3]


def _attention_backward(
    grad: Any, q: Tensor, k: Tensor, v: Any, lse: Any, lengths: Any, cu: Any, *_: Any, **__: Any
) -> int:
    return 5 * 2 * _scores(q, k, cu) * q.shape[3]


if _native.why_not() is None:
    _CPU[torch.ops.blipfast_native.attention_out] = _attention
    _CPU[torch.ops.blipfast_native.attention_backward_out] = _attention_backward
for _count in (_attention, _attention_backward):
    _count._get_raw = True  # type: ignore[attr-defined,union-attr]  # tensors, not their shapes


def count_flops(fn: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=_CPU) as counter:
        fn()
    return counter.get_total_flops()

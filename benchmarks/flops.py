"""FLOPs of a call, counted operation by operation (a multiplication and an addition are two)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
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


# What the counter does not know: operators of the CPU alone, by shapes, and ours, by tensors.
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


_OURS: dict[Any, Callable[..., int]] = {}
if _native.why_not() is None:
    _OURS[torch.ops.blipfast_native.attention_out] = _attention
    _OURS[torch.ops.blipfast_native.attention_backward_out] = _attention_backward


def _over_images(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return 2 * 2 * q.numel() * k.shape[2]


def _over_images_backward(grad: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return 5 * 2 * q.numel() * k.shape[2]


def _packed(qkv: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any) -> int:
    return 2 * 2 * int(cu_seqlens.diff().square().sum()) * qkv[0, 0].numel()


def _packed_backward(
    grad: Any, qkv: Tensor, out: Any, lse: Any, cu_seqlens: Tensor, *_: Any, **__: Any
) -> int:
    return 5 * 2 * int(cu_seqlens.diff().square().sum()) * qkv[0, 0].numel()


if find_spec("triton"):
    from blipfast.kernels import cross_attention, varlen_attention  # noqa: F401 - their operators

    _blipfast = torch.ops.blipfast
    _OURS |= {
        _blipfast.triton_cross_attention: _over_images,
        _blipfast.triton_cross_attention_backward: _over_images_backward,
        _blipfast.triton_varlen_attention: _packed,
        _blipfast.triton_varlen_attention_backward: _packed_backward,
    }
for _count in _OURS.values():
    _count._get_raw = True  # type: ignore[attr-defined,union-attr]  # tensors, not their shapes


def count_flops(fn: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=_CPU | _OURS) as counter:
        fn()
    return counter.get_total_flops()

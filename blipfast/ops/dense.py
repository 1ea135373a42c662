"""Scaled dot product attention over dense `(B, H, L, head_dim)` tensors, where each CPU is fast.

On a CPU with AVX-512 it is one C++ operator in each direction, which keeps no scores
(`_native_attention`). Elsewhere it is PyTorch's, but for training in bf16 and fp16 on a CPU, whose
backward takes several times as long there as the matrix products it consists of (torch 2.13, BLIP's
shapes): bf16 is computed from the formula where the processor has products of it, the rest in
float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.ops import _native, _native_attention
from blipfast.ops._dispatch import Backends
from blipfast.ops._products import bf16_products
from blipfast.ops.seeded_dropout import dropout
from blipfast.ops.split_heads import split_heads

backends = Backends("dense_attention")


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    impl: str = "auto",
) -> Tensor:
    """`softmax(q k^T / sqrt(head_dim)) v`, to be differentiated once.

    q: `(B, H, L, head_dim)`; k, v: `(B, H, S, head_dim)`, any float dtype. Returns q's shape.
    key_lengths: `(B,)` int64, how many keys of each entry are no padding; an entry without any
    gives 0. is_causal: queries see keys up to their own place. dropout_p: of the weights, always
    applied.
    Raises ShapeError when shapes or dtypes disagree.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ShapeError(
            "q must be (B, H, L, head_dim), k and v (B, H, S, head_dim), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ShapeError(f"q is {tuple(q.shape)}, but k {tuple(k.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(f"q is {q.dtype}, but k {k.dtype} and v {v.dtype}")
    if key_lengths is not None and key_lengths.shape != q.shape[:1]:
        raise ShapeError(f"key_lengths must be ({q.shape[0]},), got {tuple(key_lengths.shape)}")
    if torch.compiler.is_compiling():
        return _sdpa(q, k, v, key_lengths, dropout_p, is_causal)
    return backends(q, impl)(q, k, v, key_lengths, dropout_p, is_causal)


def dense_self_attention(
    qkv: Tensor,
    *,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    impl: str = "auto",
) -> Tensor:
    """`dense_attention` of one projection: `qkv (B, L, 3, H, D)` to `(B, L, H, D)`.

    Its gradient is one tensor too, never put together from those of q, k and v.
    Raises ShapeError when the shape is another.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ShapeError(f"qkv must be (B, L, 3, H, head_dim), got {tuple(qkv.shape)}")
    probe = qkv[:, :, 0].transpose(1, 2)
    if torch.compiler.is_compiling() or backends.choose(probe, impl)[0] != "native":
        options = {"key_lengths": key_lengths, "dropout_p": dropout_p, "is_causal": is_causal}
        return dense_attention(*split_heads(qkv), **options, impl=impl).transpose(1, 2)  # type: ignore[arg-type]
    return _native_attention.self_attention(
        qkv, _native_attention.Options(key_lengths, is_causal=is_causal, dropout_p=dropout_p)
    )


def _slower_native(q: Tensor) -> str | None:
    if q.dim() == 4 and q.shape[0] * q.shape[1] < torch.get_num_threads():
        return "a thread takes a head, and there are more threads than heads"
    return _native_attention.slower(q)


@backends.register("native", _native_attention.why_not, _slower_native)
def _dense_native(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    options = _native_attention.Options(key_lengths, is_causal=is_causal, dropout_p=dropout_p)
    return _native_attention.attention(q, k, v, options)


@backends.register("torch")
def _dense_torch(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    low = q.dtype in (torch.bfloat16, torch.float16)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    options = (key_lengths, dropout_p, is_causal)
    if not q.is_cpu or not wants_grad:
        return _sdpa(q, k, v, *options)
    with torch.autocast("cpu", enabled=False):
        by_products = q.dtype == torch.bfloat16 and bf16_products() is not None
        if by_products or (dropout_p > 0.0 and _native.why_not(q) is None):
            return _from_formula(q, k, v, *options)
        if low:
            return _sdpa(q.float(), k.float(), v.float(), *options).to(q.dtype)
        return _sdpa(q, k, v, *options)


def _seen(q: Tensor, k: Tensor, key_lengths: Tensor | None, is_causal: bool) -> Tensor | None:
    """True for a key to look at, broadcastable to `(B, H, L, S)`; None: all."""
    mask = None
    if key_lengths is not None:
        columns = torch.arange(k.shape[2], device=q.device)
        mask = (columns[None, :] < key_lengths[:, None])[:, None, None, :]
    if is_causal:
        past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = past if mask is None else mask & past
    return mask


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    if key_lengths is None:
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal)
    if q.is_cpu:
        mask = _seen(q, k, key_lengths, is_causal)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
    # cuDNN gives anything where there is no key at all: such an entry looks at one, and counts 0.
    mask = _seen(q, k, key_lengths.clamp(min=1), is_causal)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
    return out.masked_fill((key_lengths == 0)[:, None, None, None], 0.0)


def _from_formula(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    mask = _seen(q, k, key_lengths, is_causal)
    if mask is not None:
        # Finite, so that a row without keys stays free of NaN; then all of it counts for nothing.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1)
    if key_lengths is not None:
        probs = probs.masked_fill(~mask, 0.0)  # type: ignore[operator]
    return dropout(probs, dropout_p) @ v

"""Scaled dot product attention over dense `(B, H, L, head_dim)` tensors, where each CPU is fast.

PyTorch's own is used but on a CPU in bf16 and fp16, where it takes several times as long as the
matrix products it consists of (torch 2.13, BLIP's shapes): its backward everywhere, its forward on
processors that multiply bf16 without AMX. There bf16 is computed from the formula, whose
probabilities are kept for the backward. Training without such products is in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.ops import _native
from blipfast.ops._products import bf16_products
from blipfast.ops.seeded_dropout import dropout


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """`softmax(q k^T / sqrt(head_dim)) v`.

    q: `(B, H, L, head_dim)`; k, v: `(B, H, S, head_dim)`, any float dtype. Returns q's shape.
    attn_mask: bool, True for a key to look at, broadcastable to `(B, H, L, S)`; a row without any
    gives 0. is_causal: queries see keys up to their own place; not together with attn_mask.
    """
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    low = q.dtype in (torch.bfloat16, torch.float16)
    on_cpu = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and wants_grad and dropout_p > 0.0 and _native.why_not(q) is None:
        with torch.autocast("cpu", enabled=False):
            return _from_formula(q, k, v, attn_mask, dropout_p, is_causal)
    plain = attn_mask is None and not is_causal and dropout_p == 0.0
    by_images = plain and q.dtype == torch.bfloat16 and q.shape[2] >= _MANY_QUERIES
    if on_cpu and by_images and not wants_grad and bf16_products() == "avx512":
        with torch.autocast("cpu", enabled=False):
            return _by_images(q, k, v)
    if not on_cpu or not low or not wants_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal)
    with torch.autocast("cpu", enabled=False):
        if q.dtype == torch.bfloat16 and bf16_products() is not None:
            return _from_formula(q, k, v, attn_mask, dropout_p, is_causal)
        out = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask, dropout_p, is_causal
        )
    return out.to(q.dtype)


def _from_formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        # Finite, so that a row without keys stays free of NaN; then all of it counts for nothing.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1)
    if mask is not None and not is_causal:
        probs = probs.masked_fill(~mask, 0.0)
    return dropout(probs, dropout_p) @ v


_MANY_QUERIES = 32  # for fewer, SDPA's blocks are as fast
_CACHED_SCORES = 2**22  # that the processor's caches hold


def _by_images(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula over so few images at a time that their scores stay in the caches."""
    images = max(1, _CACHED_SCORES // max(1, q.shape[1] * q.shape[2] * k.shape[2]))
    # As attention writes it everywhere: the heads of a token side by side.
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    for part, *qkv in zip(*(x.split(images) for x in (out, q, k, v)), strict=True):
        part.copy_(_from_formula(qkv[0], qkv[1], qkv[2], None, 0.0, False))
    return out

"""Attention: MED's texts over images, packed texts, the image encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import competitors
from benchmarks.op_cases.case import (
    BASELINE,
    Case,
    Run,
    Setting,
    all_differentiated,
    differentiated,
)
from benchmarks.workloads import caption_lengths
from blipfast.ops import (
    CrossPlan,
    Packing,
    cross_attention,
    dense_self_attention,
    varlen_attention,
)


def cross_attention_cases(s: Setting) -> list[Case]:
    """MED's texts over image K/V: re-ranking, a pre-training batch, beams over a large image; and
    training's dropout."""
    sizes: list[tuple[Any, ...]] = [
        ("64 texts, 1 image, 577 keys", 64, 1, 577),
        ("96 texts, 24 images, 197 keys", 96, 24, 197),
        ("12 texts, 4 images, 901 keys", 12, 4, 901),
        ("96 texts, 24 images, 197 keys, dropout", 96, 24, 197, 0.1),
    ]
    if s.device.type == "cuda":
        sizes += [
            ("256 texts, 1 image, 577 keys", 256, 1, 577),
            ("360 texts, 90 images, 197 keys", 360, 90, 197),
            ("360 texts, 90 images, 197 keys, dropout", 360, 90, 197, 0.1),
        ]
    if s.small:
        sizes = [("6 texts, 2 images, 19 keys", 6, 2, 19)]
        sizes += [("6 texts, 2 images, 19 keys, dropout", 6, 2, 19, 0.1)]
    return [cross_case(s, *size) for size in sizes]


def cross_case(
    s: Setting, label: str, texts: int, images: int, keys: int, dropout_p: float = 0.0
) -> Case:
    heads, dim = _heads(s)
    packing = Packing.from_lengths(caption_lengths(texts), s.device).prepare()
    index = [i * images // texts for i in range(texts)]
    plan = CrossPlan.build(packing, index, images)
    q = s.randn(packing.total, heads, dim, grad=True)
    k, v = (s.randn(images, heads, keys, dim, grad=True) for _ in range(2))
    weights = s.randn(packing.total, heads, dim)
    where = torch.tensor(index, device=s.device)

    def padded_sdpa() -> Tensor:
        """K and V copied for each text, as code without an index does."""
        grid = packing.pad(q).transpose(1, 2)
        out = F.scaled_dot_product_attention(grid, k[where], v[where], dropout_p=dropout_p)
        return packing.unpad(out.transpose(1, 2))

    leaves = (q, k, v)

    def run(code: str) -> Run:
        if code == BASELINE:
            return differentiated(padded_sdpa, leaves, weights)

        def ours() -> Tensor:
            return cross_attention(q, k, v, plan, dropout_p=dropout_p, impl=code)

        return differentiated(ours, leaves, weights)

    others = all_differentiated(competitors.compiled(padded_sdpa, s.small), leaves, weights)

    # Forward reads q, k, v and writes out; backward reads them with out and its gradient again.
    moved = s.element * (7 * q.numel() + 6 * k.numel())
    name, flops = f"cross_attention, {label}", 14.0 * q.numel() * keys
    return Case(name, run, moved, flops, exact=dropout_p == 0, others=others)


def _heads(s: Setting) -> tuple[int, int]:
    return (2, 32) if s.small else (12, 64)


def varlen_attention_cases(s: Setting) -> list[Case]:
    texts = (6, 5) if s.small else (64, 360)
    return [varlen_case(s, texts[0]), varlen_case(s, texts[1], both_ways=True)]


def varlen_case(s: Setting, texts: int, both_ways: bool = False) -> Case:
    heads, dim = _heads(s)
    packing = Packing.from_lengths(caption_lengths(texts), s.device)
    qkv = s.randn(packing.total, 3, heads, dim, grad=both_ways)
    weights = s.randn(packing.total, heads, dim)
    mask = packing.mask[:, None, None, :]

    def padded_sdpa() -> Tensor:
        q, k, v = packing.pad(qkv).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return packing.unpad(out.transpose(1, 2))

    def timed(attend: Callable[[], Tensor]) -> Run:
        if both_ways:
            return differentiated(attend, (qkv,), weights)
        return lambda: (attend(),)

    def run(code: str) -> Run:
        if code == BASELINE:
            return timed(padded_sdpa)
        return timed(lambda: varlen_attention(qkv, packing, impl=code))

    rivals = competitors.compiled(padded_sdpa, s.small)
    others = {name: timed(rival) for name, rival in rivals.items()}
    pairs = sum(n * n for n in packing.lengths)
    name = f"varlen_attention{'' if both_ways else ' forward'}, {texts} texts"
    moved = s.element * qkv.numel() * (11 if both_ways else 4) / 3
    flops = (14.0 if both_ways else 4.0) * pairs * heads * dim
    return Case(name, run, moved, flops, others=others)


def dense_attention_cases(s: Setting) -> list[Case]:
    """The image encoder's attention, at 224 and at 384 px."""
    sizes = [(2, 19)] if s.small else [(8, 197), (4, 577)]
    return [dense_case(s, *size) for size in sizes]


def dense_case(s: Setting, images: int, tokens: int) -> Case:
    heads, dim = _heads(s)
    qkv = s.randn(images, tokens, 3, heads, dim, grad=True)
    weights = s.randn(images, tokens, heads, dim)

    def sdpa() -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def run(code: str) -> Run:
        if code == BASELINE:
            return differentiated(sdpa, (qkv,), weights)
        return differentiated(lambda: dense_self_attention(qkv, impl=code), (qkv,), weights)

    others = all_differentiated(competitors.compiled(sdpa, s.small), (qkv,), weights)
    # Forward reads qkv and writes out; backward reads both with out's gradient, and writes qkv's.
    moved, pairs = s.element * qkv.numel() * 11 / 3, images * heads * tokens**2
    name = f"dense_attention, {images} images, {tokens} tokens"
    return Case(name, run, moved, 14.0 * pairs * dim, others=others)

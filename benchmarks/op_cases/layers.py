"""What lies between attention and the next of it: LayerNorm with the residual, the feed-forward."""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import competitors
from benchmarks.op_cases.case import (
    BASELINE,
    Case,
    Run,
    Setting,
    all_differentiated,
    differentiated,
)
from blipfast.ops import add_layer_norm, feed_forward


def add_layer_norm_cases(s: Setting) -> list[Case]:
    """A ViT's images, without dropout, and a batch's texts, with it; each of 8 and of 90 pairs."""
    images, texts = (8 * 197, 440) if s.device.type == "cpu" else (90 * 197, 4_870)
    if s.small:
        images, texts = 9, 5
    return [add_layer_norm_case(s, images), add_layer_norm_case(s, texts, 0.1)]


def add_layer_norm_case(s: Setting, rows: int, dropout_p: float = 0.0) -> Case:
    width = 32 if s.small else 768
    residual, branch = (s.randn(rows, width, grad=True) for _ in range(2))
    weight, bias = (s.randn(width, grad=True) for _ in range(2))
    leaves = (residual, branch, weight, bias)
    grad = s.randn(rows, width)

    def added_then(norm: competitors.Norm) -> Tensor:
        return norm(residual + F.dropout(branch, dropout_p), weight, bias)

    def eager() -> Tensor:
        return added_then(lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias))

    def run(code: str) -> Run:
        if code == BASELINE:
            return differentiated(eager, leaves, grad)

        def ours() -> Tensor:
            return add_layer_norm(*leaves, dropout_p=dropout_p, impl=code)[1]

        return differentiated(ours, leaves, grad)

    rivals = competitors.compiled(eager, s.small)
    for code, norm in competitors.layer_norms(residual).items():
        rivals[code] = functools.partial(added_then, norm)
    others = all_differentiated(rivals, leaves, grad)
    # Forward reads both inputs, writes sum and norm; backward reads the sum and a gradient.
    moved = s.element * (7 + (dropout_p > 0)) * residual.numel()
    name = f"add_layer_norm, {rows} x {width}" + ", dropout" * (dropout_p > 0)
    flops = 20.0 * residual.numel()
    return Case(name, run, moved, flops, exact=dropout_p == 0, others=others)


def feed_forward_cases(s: Setting) -> list[Case]:
    """A ViT's images and a batch's texts, of 8 and of 90 pairs; each of base size."""
    sizes = (8 * 197, 403) if s.device.type == "cpu" else (90 * 197, 4_870)
    return [feed_forward_case(s, rows) for rows in ((9,) if s.small else sizes)]


def feed_forward_case(s: Setting, rows: int) -> Case:
    width, hidden = (32, 128) if s.small else (768, 3_072)
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, width)
    first, second = (layer.to(s.device, s.dtype) for layer in (first, second))
    x, grad = s.randn(rows, width, grad=True), s.randn(rows, width)
    leaves = (x, *first.parameters(), *second.parameters())

    def eager() -> Tensor:
        hidden = F.gelu(F.linear(x, first.weight, first.bias))
        return F.linear(hidden, second.weight, second.bias)

    def run(code: str) -> Run:
        if code == BASELINE:
            return differentiated(eager, leaves, grad)
        return differentiated(lambda: feed_forward(x, first, second, impl=code), leaves, grad)

    others = all_differentiated(competitors.compiled(eager, s.small), leaves, grad)
    weights = 2 * width * hidden
    moved = s.element * (3 * weights + 4 * x.numel())
    name = f"feed_forward, {rows} x {width} x {hidden}"
    return Case(name, run, moved, 6.0 * rows * weights, others=others)

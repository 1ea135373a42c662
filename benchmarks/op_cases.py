"""What each operator is timed on: inputs, the codes that compute the same, and their floor.

A case gives every code as a function of no argument that runs forward and backward and returns its
outputs, so that they can be compared before they are timed. The floor is the least that must be
moved and computed, whatever the code: `bytes` counts each input and output once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import competitors
from benchmarks.workloads import caption_lengths
from blipfast.ops import (
    CrossPlan,
    Packing,
    contrastive_softmax,
    cross_attention,
    dense_self_attention,
    hard_negative_weights,
    linear_cross_entropy,
    momentum_update_,
    sample_hard_negatives,
    varlen_attention,
)
from blipfast.ops._dispatch import tables

Run = Callable[[], tuple[Tensor, ...]]
BASELINE = "eager"  # the formula in plain PyTorch, as one would write it


@dataclass(frozen=True)
class Case:
    """One operator at one size. run(code) is a `Run`, for a backend's name or the baseline's.

    exact: outputs are compared; of random draws only the shapes are. others: competitors that run.
    """

    name: str
    run: Callable[[str], Run]
    bytes: float
    flops: float
    baseline: str = BASELINE
    exact: bool = True
    others: Mapping[str, Run] = field(default_factory=dict)

    def code(self, name: str) -> Run:
        return self.others[name] if name in self.others else self.run(name)


@dataclass(frozen=True)
class Setting:
    device: torch.device
    dtype: torch.dtype
    small: bool = False  # sizes for the interpreter
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def randn(self, *shape: int, grad: bool = False) -> Tensor:
        x = torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)
        return x.requires_grad_() if grad else x

    def unit(self, *shape: int, grad: bool = False) -> Tensor:
        x = F.normalize(self.randn(*shape).float(), dim=-1).to(self.dtype)
        return x.requires_grad_() if grad else x

    @property
    def element(self) -> int:
        return self.dtype.itemsize


def differentiated(
    outputs: Callable[[], Tensor], leaves: tuple[Tensor, ...], weights: Tensor
) -> Run:
    """Forward and backward of the weighted sum: the outputs and the leaves' gradients."""

    def run() -> tuple[Tensor, ...]:
        out = outputs()
        return out.detach(), *torch.autograd.grad(out, leaves, weights)

    return run


def all_differentiated(
    outputs: Mapping[str, Callable[[], Tensor]], leaves: tuple[Tensor, ...], weights: Tensor
) -> dict[str, Run]:
    return {code: differentiated(run, leaves, weights) for code, run in outputs.items()}


def cross_attention_cases(s: Setting) -> list[Case]:
    """MED's texts over image K/V: re-ranking, a pre-training batch, beams over a large image."""
    sizes = [
        ("64 texts, 1 image, 577 keys", 64, 1, 577),
        ("96 texts, 24 images, 197 keys", 96, 24, 197),
        ("12 texts, 4 images, 901 keys", 12, 4, 901),
    ]
    if s.small:
        sizes = [("6 texts, 2 images, 19 keys", 6, 2, 19)]
    heads, dim = (2, 32) if s.small else (12, 64)
    return [_cross_case(s, *size, heads, dim) for size in sizes]


def _cross_case(
    s: Setting, label: str, texts: int, images: int, keys: int, heads: int, dim: int
) -> Case:
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
        out = F.scaled_dot_product_attention(grid, k[where], v[where])
        return packing.unpad(out.transpose(1, 2))

    leaves = (q, k, v)

    def run(code: str) -> Run:
        if code == BASELINE:
            return differentiated(padded_sdpa, leaves, weights)
        return differentiated(lambda: cross_attention(q, k, v, plan, impl=code), leaves, weights)

    others = all_differentiated(competitors.compiled(padded_sdpa, s.small), leaves, weights)

    # Forward reads q, k, v and writes out; backward reads them with out and its gradient again.
    moved = s.element * (7 * q.numel() + 6 * k.numel())
    name, flops = f"cross_attention, {label}", 14.0 * q.numel() * keys
    return Case(name, run, moved, flops, others=others)


def varlen_attention_cases(s: Setting) -> list[Case]:
    texts, heads, dim = (6, 2, 32) if s.small else (64, 12, 64)
    packing = Packing.from_lengths(caption_lengths(texts), s.device)
    qkv = s.randn(packing.total, 3, heads, dim)
    mask = packing.mask[:, None, None, :]

    def padded_sdpa() -> tuple[Tensor, ...]:
        q, k, v = packing.pad(qkv).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (packing.unpad(out.transpose(1, 2)),)

    def run(code: str) -> Run:
        if code == BASELINE:
            return padded_sdpa
        return lambda: (varlen_attention(qkv, packing, impl=code),)

    pairs = sum(n * n for n in packing.lengths)
    name = f"varlen_attention forward, {texts} texts"
    moved, flops = s.element * qkv.numel() * 4 / 3, 4.0 * pairs * heads * dim
    return [Case(name, run, moved, flops, others=competitors.compiled(padded_sdpa, s.small))]


def dense_attention_cases(s: Setting) -> list[Case]:
    """The image encoder's attention, at 224 and at 384 px."""
    sizes = [(2, 19, 2, 32)] if s.small else [(8, 197, 12, 64), (4, 577, 12, 64)]
    return [_dense_case(s, *size) for size in sizes]


def _dense_case(s: Setting, images: int, tokens: int, heads: int, dim: int) -> Case:
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


def contrastive_cases(s: Setting) -> list[Case]:
    """BLIP's batch against its queue, and CLIP's without one, where keys need gradients too."""
    queue = (8, 300, 32) if s.small else (90, 57_690, 256)
    clip = (16, 16, 32) if s.small else (2_048, 2_048, 256)
    return [_contrastive_case(s, "queue", *queue), _contrastive_case(s, "in-batch", *clip)]


def _contrastive_case(s: Setting, kind: str, rows: int, keys: int, width: int) -> Case:
    query = s.unit(rows, width, grad=True)
    key = s.unit(keys, width, grad=kind == "in-batch")
    teacher = s.unit(rows, width) if kind == "queue" else None
    alpha = 0.4 if kind == "queue" else 0.0
    temperature = torch.tensor(0.07, device=s.device, requires_grad=True)
    leaves = (query, temperature) + ((key,) if key.requires_grad else ())
    weights = torch.full((rows,), 1.0 / rows, device=s.device)

    def eager() -> Tensor:
        log_p = (query @ key.T / temperature).float().log_softmax(-1)
        own = torch.eye(rows, keys, device=s.device)
        if teacher is None:
            return -(log_p * own).sum(-1)
        with torch.no_grad():
            soft = (teacher @ key.T / temperature).float().softmax(-1)
        return -(log_p * (alpha * soft + (1 - alpha) * own)).sum(-1)

    def run(code: str) -> Run:
        if code == BASELINE:
            return differentiated(eager, leaves, weights)

        def ours() -> Tensor:
            return contrastive_softmax(
                query, key, temperature, teacher_query=teacher, alpha=alpha, impl=code
            )

        return differentiated(ours, leaves, weights)

    rivals = competitors.compiled(eager, s.small)
    if kind == "in-batch":
        rivals |= competitors.in_batch_contrast(query, key, temperature)
    others = all_differentiated(rivals, leaves, weights)
    passes = (2 if teacher is None else 4) + (4 if key.requires_grad else 0)
    moved = s.element * (key.numel() * (3 if key.requires_grad else 1) + 3 * query.numel())
    name = f"contrastive_softmax, {kind}, {rows} x {keys} x {width}"
    return Case(name, run, moved, 2.0 * passes * rows * keys * width, others=others)


def hard_negatives_cases(s: Setting) -> list[Case]:
    sizes = [(8, 8, 32)] if s.small else [(90, 90, 256), (1_024, 4_096, 256)]
    return [_negatives_case(s, *size) for size in sizes]


def _negatives_case(s: Setting, rows: int, keys: int, width: int) -> Case:
    query, key = s.unit(rows, width), s.unit(keys, width)
    temperature = torch.tensor(0.07, device=s.device)

    def loop() -> tuple[Tensor, ...]:
        """One synchronising draw for each row, as in the original."""
        weights = hard_negative_weights(query, key, temperature, eps=1e-4)
        return (torch.tensor([int(torch.multinomial(w.float(), 1)) for w in weights]),)

    def run(code: str) -> Run:
        if code == "loop":
            return loop
        return lambda: (sample_hard_negatives(query, key, temperature, eps=1e-4, impl=code),)

    moved = s.element * (query.numel() + key.numel()) + 8 * rows
    name = f"sample_hard_negatives, {rows} x {keys} x {width}"
    return Case(name, run, moved, 2.0 * rows * keys * width, "loop", exact=False)


def linear_cross_entropy_cases(s: Setting) -> list[Case]:
    """BLIP's head over the tokens of a batch of 8 and of 90; and without bias and smoothing."""
    sizes = [(9, 300, 32)] if s.small else [(98, 30_524, 768), (1_125, 30_524, 768)]
    return [_linear_ce_case(s, *size) for size in sizes] + [
        _linear_ce_case(s, *sizes[-1], smoothing=0.0, biased=False)
    ]


def _linear_ce_case(
    s: Setting, tokens: int, vocab: int, width: int, smoothing: float = 0.1, biased: bool = True
) -> Case:
    hidden, weight = s.randn(tokens, width, grad=True), s.randn(vocab, width)
    weight = weight.mul_(0.02).requires_grad_()
    bias = torch.zeros(vocab, device=s.device, dtype=s.dtype, requires_grad=True)
    leaves: tuple[Tensor, ...] = (hidden, weight) + ((bias,) if biased else ())
    offset = bias if biased else None
    labels = torch.arange(tokens, device=s.device) * 7 % vocab
    one = torch.ones((), device=s.device)

    def eager() -> Tensor:
        logits = F.linear(hidden, weight, offset).float()
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    def run(code: str) -> Run:
        if code == BASELINE:
            return differentiated(eager, leaves, one)

        def ours() -> Tensor:
            return linear_cross_entropy(
                hidden, weight, offset, labels, label_smoothing=smoothing, impl=code
            )

        return differentiated(ours, leaves, one)

    rivals = competitors.compiled(eager, s.small)
    rivals |= competitors.linear_cross_entropy(hidden, weight, offset, labels, smoothing)
    others = all_differentiated(rivals, leaves, one)
    moved = s.element * (3 * weight.numel() + 3 * hidden.numel())
    plain = "" if biased else ", plain"
    name = f"linear_cross_entropy{plain}, {tokens} x {vocab} x {width}"
    return Case(name, run, moved, 6.0 * tokens * vocab * width, others=others)


def momentum_cases(s: Setting) -> list[Case]:
    shapes = [(8, 32)] * 4 if s.small else [(768, 768)] * 48 + [(3_072, 768)] * 24 + [(768,)] * 150
    sources = [s.randn(*shape) for shape in shapes]
    targets = [torch.zeros_like(x) for x in sources]

    def loop() -> tuple[Tensor, ...]:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(target * 0.995 + source * 0.005)
        return (targets[0],)

    def run(code: str) -> Run:
        if code == "loop":
            return loop

        def ours() -> tuple[Tensor, ...]:
            momentum_update_(targets, sources, 0.995, impl=code)
            return (targets[0],)

        return ours

    count = sum(x.numel() for x in sources)
    name = f"momentum_update_, {count / 1e6:.0f} M parameters"
    return [Case(name, run, 3.0 * s.element * count, 3.0 * count, "loop", exact=False)]


CASES: dict[str, Callable[[Setting], list[Case]]] = {
    "contrastive_softmax": contrastive_cases,
    "cross_attention": cross_attention_cases,
    "dense_attention": dense_attention_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "momentum_update_": momentum_cases,
    "sample_hard_negatives": hard_negatives_cases,
    "varlen_attention": varlen_attention_cases,
}


def codes_of(op: str, case: Case, probe: Tensor, wanted: str) -> list[str]:
    """The backends of an operator that can run on `probe`, competitors, and the case's baseline.

    wanted: "all", or names separated by commas, the baseline being kept in any case.
    """
    table = tables()[op]
    able = [name for name in table.names if name != "reference" and table.can_run(name, probe)]
    able += case.others
    if wanted != "all":
        able = [name for name in able if name in wanted.split(",")]
    return [*able, case.baseline]


def assert_same(
    case: Case, ours: tuple[Any, ...], theirs: tuple[Any, ...], dtype: torch.dtype
) -> None:
    """Equal within what the dtype's rounding explains, relative to each output's size."""
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}[dtype]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape, f"{case.name}: {tuple(a.shape)} against {tuple(b.shape)}"
        if case.exact:
            size = b.float().abs().max().clamp(min=1e-6)
            error = (a.float() - b.float()).abs().max() / size
            assert error < tolerance, f"{case.name}: outputs differ by {float(error):.2e}"

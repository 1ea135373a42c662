"""What surrounds the model in training: the losses, negatives, the momentum update."""

from __future__ import annotations

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
from blipfast.ops import (
    contrastive_softmax,
    hard_negative_weights,
    linear_cross_entropy,
    momentum_update_,
    sample_hard_negatives,
)


def contrastive_cases(s: Setting) -> list[Case]:
    """BLIP's batch against its queue, and CLIP's without one, where keys need gradients too."""
    queue = (8, 300, 32) if s.small else (90, 57_690, 256)
    clip = (16, 16, 32) if s.small else (2_048, 2_048, 256)
    return [contrastive_case(s, "queue", *queue), contrastive_case(s, "in-batch", *clip)]


def contrastive_case(s: Setting, kind: str, rows: int, keys: int, width: int) -> Case:
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
    return [negatives_case(s, *size) for size in sizes]


def negatives_case(s: Setting, rows: int, keys: int, width: int) -> Case:
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
    return [linear_ce_case(s, *size) for size in sizes] + [
        linear_ce_case(s, *sizes[-1], smoothing=0.0, biased=False)
    ]


def linear_ce_case(
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
    return [momentum_case(s, 12)]


def momentum_case(s: Setting, layers: int) -> Case:
    """As many layers as of a transformer of base size."""
    of_a_layer = [(8, 32)] if s.small else [(768, 768)] * 4 + [(3_072, 768)] * 2 + [(768,)] * 12
    shapes = of_a_layer * layers
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
    return Case(name, run, 3.0 * s.element * count, 3.0 * count, "loop", exact=False)

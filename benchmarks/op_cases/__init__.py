"""What each operator is timed on: inputs, the codes that compute the same, and their floor.

A case gives every code as a function of no argument that runs forward and backward and returns its
outputs, so that they can be compared before they are timed. The floor is the least that must be
moved and computed, whatever the code: `bytes` counts each input and output once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from benchmarks.op_cases import attention, layers, training
from benchmarks.op_cases.case import Case, Setting, assert_same
from blipfast.ops._dispatch import tables

__all__ = ["CASES", "SWEEPS", "Case", "Setting", "Sweep", "assert_same", "codes_of"]

CASES: dict[str, Callable[[Setting], list[Case]]] = {
    "add_layer_norm": layers.add_layer_norm_cases,
    "contrastive_softmax": training.contrastive_cases,
    "cross_attention": attention.cross_attention_cases,
    "dense_attention": attention.dense_attention_cases,
    "feed_forward": layers.feed_forward_cases,
    "linear_cross_entropy": training.linear_cross_entropy_cases,
    "momentum_update_": training.momentum_cases,
    "sample_hard_negatives": training.hard_negatives_cases,
    "varlen_attention": attention.varlen_attention_cases,
}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One operator over sizes. case(setting, size): the operator at a size of `axis`."""

    axis: str
    sizes: tuple[int, ...]
    small: tuple[int, ...]
    case: Callable[[Setting, int], Case]

    def cases(self, s: Setting) -> list[Case]:
        sizes = self.small if s.small else self.sizes
        return [dataclasses.replace(self.case(s, n), axis=self.axis, size=n) for n in sizes]


def _contrast(s: Setting, keys: int) -> Case:
    rows, width = (8, 32) if s.small else (90, 256)
    return training.contrastive_case(s, "queue", rows, keys, width)


def _texts_of_an_image(s: Setting, texts: int) -> Case:
    return attention.cross_case(s, f"{texts} texts, 1 image", texts, 1, 19 if s.small else 577)


def _images(s: Setting, tokens: int) -> Case:
    return attention.dense_case(s, 2, tokens)


def _tokens(s: Setting, tokens: int) -> Case:
    vocab, width = (300, 32) if s.small else (30_524, 768)
    return training.linear_ce_case(s, tokens, vocab, width)


def _batch(s: Setting, rows: int) -> Case:
    return training.negatives_case(s, rows, rows, 32 if s.small else 256)


SWEEPS: dict[str, Sweep] = {
    "add_layer_norm": Sweep("rows", (64, 512, 4_096, 17_730), (3, 9), layers.add_layer_norm_case),
    "contrastive_softmax": Sweep(
        "keys of the queue", (1_000, 4_000, 16_000, 57_690, 230_000), (40, 90), _contrast
    ),
    "cross_attention": Sweep("texts of one image", (1, 4, 16, 64, 256), (1, 3), _texts_of_an_image),
    "dense_attention": Sweep("tokens of an image", (50, 197, 577, 901), (5, 19), _images),
    "feed_forward": Sweep("rows", (64, 512, 4_096), (3, 9), layers.feed_forward_case),
    "linear_cross_entropy": Sweep("tokens", (32, 128, 512, 2_048), (3, 9), _tokens),
    "momentum_update_": Sweep("layers", (1, 4, 12, 24), (1, 2), training.momentum_case),
    "sample_hard_negatives": Sweep("pairs of a batch", (32, 128, 512, 2_048), (4, 8), _batch),
    "varlen_attention": Sweep("texts", (4, 16, 64, 256), (2, 5), attention.varlen_case),
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

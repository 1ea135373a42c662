"""Decoded texts that begin alike: each prefix is computed once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from blipfast.errors import ShapeError
from blipfast.models.blip import PackedText
from blipfast.ops.packing import Packing, SharedPrefixes


@dataclass(frozen=True)
class PrefixTree:
    """The prefixes of texts as nodes: one for all texts of a set that begin with the same tokens.

    Under a causal mask a token's state depends on what precedes it alone, so that the layers run
    over `U` nodes in place of `T` tokens; of 128 candidate answers to a question, of [DEC] and one
    or two words each, about half.

    text: the nodes' tokens, packed by set. sets: whose nodes each pack is.
    prefixes: how nodes and texts belong together, for self-attention.
    """

    text: PackedText
    sets: tuple[int, ...]
    prefixes: SharedPrefixes

    @classmethod
    def build(cls, text: PackedText, kv_index: Sequence[int]) -> PrefixTree:
        """Of texts that look at the sets in `kv_index`, which must not decrease."""
        if any(a > b for a, b in itertools.pairwise(kv_index)):
            raise ShapeError("texts of one set must be neighbours: kv_index must not decrease")
        ids, device = text.input_ids.tolist(), text.input_ids.device
        known: dict[tuple[int, int], int] = {}  # (parent node, or -1 - set; token) to node
        nodes: list[int] = []
        first: list[int] = []
        sizes: dict[int, int] = {}
        start = 0
        for place, length in zip(kv_index, text.packing.lengths, strict=True):
            parent = -1 - place
            for token in range(start, start + length):
                node = known.setdefault((parent, ids[token]), len(first))
                if node == len(first):
                    first.append(token)
                    sizes[place] = sizes.get(place, 0) + 1
                nodes.append(node)
                parent = node
            start += length
        first_tensor = torch.tensor(first, dtype=torch.int64, device=device)
        packing = Packing.from_lengths(list(sizes.values()), device)
        return cls(
            PackedText(text.input_ids[first_tensor], packing, text.words),
            tuple(sizes),
            SharedPrefixes(
                text.packing,
                torch.tensor(nodes, dtype=torch.int64, device=device),
                first_tensor,
            ),
        )

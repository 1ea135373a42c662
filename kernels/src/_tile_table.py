"""Which tile of rows each program takes, where the host cannot tell how many each set has.

A grid of as many programs for every set as the largest might need is mostly empty when the bound is
loose: of 90 images one may be looked at by most texts of a batch. The table lists the tiles that
there are, one after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from blipfast.kernels._runtime import launch, next_power_of_2
from torch import Tensor


@triton.jit
def assign(
    cu_rows,
    table,
    num_sets,
    num_rows,
    capacity,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: (set, tile) of each entry; entries left over have a tile that no set has."""
    sets = tl.arange(0, BLOCK_S)
    there = sets < num_sets
    first = tl.load(cu_rows + sets, mask=there, other=0)
    rows = tl.load(cu_rows + sets + 1, mask=there, other=0) - first
    tiles = tl.where(there, (rows + BLOCK_M - 1) // BLOCK_M, 0)
    start = tl.cumsum(tiles, 0) - tiles
    for tile in range(0, tl.max(tiles, 0)):
        has = tile < tiles
        tl.store(table + 2 * (start + tile), sets, mask=has)
        tl.store(table + 2 * (start + tile) + 1, tl.zeros_like(sets) + tile, mask=has)
    nowhere = (num_rows + BLOCK_M - 1) // BLOCK_M
    for used in range(tl.sum(tiles, 0), capacity, BLOCK_S):
        entries = used + sets
        left = entries < capacity
        tl.store(table + 2 * entries, tl.zeros_like(sets), mask=left)
        tl.store(table + 2 * entries + 1, tl.zeros_like(sets) + nowhere, mask=left)


def tile_table(cu_rows: Tensor, num_rows: int, block_m: int) -> Tensor:
    """`(P, 2)` int32 of sets and tiles of `block_m` rows; P is the most there can be of them.

    cu_rows: `(B + 1,)` int32, where each set's rows start among `num_rows`.
    """
    num_sets = cu_rows.shape[0] - 1
    capacity = num_sets + num_rows // block_m
    table = torch.empty((capacity, 2), dtype=torch.int32, device=cu_rows.device)
    args = [cu_rows, table, num_sets, num_rows, capacity]
    block_s = max(16, next_power_of_2(num_sets))
    launch(assign, (1,), args, BLOCK_M=block_m, BLOCK_S=block_s, num_warps=4, num_stages=1)
    return table

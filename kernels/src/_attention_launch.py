"""How the kernels of attention are launched, for texts over images and for packed texts alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from blipfast.kernels import _attention_kernels as kernels
from blipfast.kernels._runtime import dot_precision, launch, next_power_of_2, short, target
from blipfast.kernels._tile_table import tile_table
from blipfast.kernels.tiles import choose
from torch import Tensor


class Look(NamedTuple):
    """Which rows look at which keys, and how; letters as in `cross_attention`.

    cu_rows, order, kv_lengths, seed, max_rows, dropout_p: as there.
    causal: of packed keys a row sees those up to its own.
    """

    cu_rows: Tensor
    order: Tensor | None
    kv_lengths: Tensor | None
    seed: Tensor | None
    max_rows: int
    dropout_p: float
    causal: bool = False


def forward(q: Tensor, k: Tensor, v: Tensor, look: Look) -> tuple[Tensor, Tensor]:
    """The output `(T, H, head_dim)` and each row's log2-sum-exp `(H, T)`, in grouped order.

    k, v: `(B, H, S, head_dim)`, or `(T, H, head_dim)` where a set's rows are its keys too.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    block_m, tiles = row_tiles(look.max_rows, q, k)
    args: list[Any] = [q, k, v, out, lse, look.cu_rows, look.order, look.kv_lengths, look.seed]
    programs, table = _programs(q, look, block_m, tiles)
    args += [*_strides(q, k, v, out), *_sizes(q, k, look), tiles, table]
    meta = _meta(q, k, look, block_m)
    launch(kernels.forward, (programs, q.shape[1]), args, BY_TABLE=table is not None, **meta)
    return out, lse


def backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    look: Look,
) -> None:
    """Writes the gradients of q, k and v, which have the inputs' shapes."""
    q, k, v = inputs
    dq, dk, dv = gradients
    index = [look.cu_rows, look.order, look.kv_lengths, look.seed]
    block_m, tiles = row_tiles(look.max_rows, q, k, backward=True)
    sizes = _sizes(q, k, look)
    meta = _meta(q, k, look, block_m, backward=True)
    heads, sets = q.shape[1], _sets(look)
    if tiles == 1 and not (q.dtype == torch.float32 and q.shape[2] > 64):
        args: list[Any] = [grad, q, k, v, out, lse, dq, dk, dv, *index]
        args += [*_strides(grad, q, k, v, out, dq, dk, dv), *sizes]
        launch(kernels.backward, (sets, heads), args, **meta)
        return
    delta = torch.empty_like(lse)
    args = [grad, q, k, v, out, lse, delta, dq, *index]
    programs, table = _programs(q, look, block_m, tiles)
    args += [*_strides(grad, q, k, v, out, dq), *sizes, tiles, table]
    grid = (programs, heads)
    launch(kernels.backward_queries, grid, args, BY_TABLE=table is not None, **meta)
    args = [grad, q, k, v, lse, delta, dk, dv, *index, *_strides(grad, q, k, v, dk, dv), *sizes]
    key_tiles = -(-_num_keys(k, look) // meta["BLOCK_N"])
    # The tiles of a set follow each other, so that its rows are read from the cache.
    launch(kernels.backward_keys, (key_tiles * sets, heads), args, **meta)


# Programs without rows end at once, but so many of them for one that has some take longer to start
# than the table to be made, which is a launch of its own.
_MOST_EMPTY = 8


def _programs(q: Tensor, look: Look, block_m: int, tiles: int) -> tuple[int, Tensor | None]:
    """Programs over tiles of rows and, where most would be empty, the table of those that exist."""
    all_tiles, needed = _sets(look) * tiles, _sets(look) + q.shape[0] // block_m
    if all_tiles <= _MOST_EMPTY * needed:
        return all_tiles, None
    table = tile_table(look.cu_rows, q.shape[0], block_m)
    return table.shape[0], table


def _sets(look: Look) -> int:
    return look.cu_rows.shape[0] - 1


def _num_keys(k: Tensor, look: Look) -> int:
    """The most keys of a set."""
    return k.shape[2] if k.dim() == 4 else look.max_rows


def _sizes(q: Tensor, k: Tensor, look: Look) -> list[tuple[Any, ...]]:
    scale = 1.0 / math.sqrt(q.shape[2])  # for gradients; scores are in powers of two
    scales = (scale, scale * math.log2(math.e), look.dropout_p)
    return [(_num_keys(k, look), q.shape[0], q.shape[2]), scales]


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """`(set, head, row, column)` of each; rows of queries belong to no set."""
    return [
        t.stride() if t.dim() == 4 else (0, t.stride(1), t.stride(0), t.stride(2)) for t in tensors
    ]


def row_tiles(max_rows: int, q: Tensor, k: Tensor, backward: bool = False) -> tuple[int, int]:
    """Rows of a tile (as many as spill no registers), and tiles of the set with the most rows."""
    largest, card = 64, target(q)
    if q.dtype == torch.float32:
        largest = 32 if not backward or 32 < q.shape[2] <= 64 else 16
    elif backward and (k.dim() == 3 or card == "hip" or int(card) < 90):
        largest = 32
    block_m = min(max(16, next_power_of_2(max_rows)), largest)
    return block_m, max(1, -(-max_rows // block_m))


def _meta(q: Tensor, k: Tensor, look: Look, block_m: int, backward: bool = False) -> dict[str, Any]:
    block_d = max(16, next_power_of_2(q.shape[2]))
    packed, dropout = k.dim() == 3, look.dropout_p > 0
    tiles = _configuration(q, block_m, block_d, backward, dropout, packed)
    if packed and q.dtype != torch.float32:  # texts are short
        tiles["BLOCK_N"] = min(tiles["BLOCK_N"], max(16, next_power_of_2(look.max_rows)))
    return {
        "HAS_ORDER": look.order is not None,
        "HAS_LENGTHS": look.kv_lengths is not None,
        "PACKED": packed,
        "CAUSAL": look.causal,
        "DROPOUT": dropout,
        "EVEN_D": block_d == q.shape[2],
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "PRECISION": dot_precision(q),
        **tiles,
    }


def _configuration(
    q: Tensor, block_m: int, block_d: int, backward: bool, dropout: bool, packed: bool
) -> dict[str, int]:
    """Keys of a tile, warps and pipeline stages: the largest that spill no registers."""
    wide = block_d > 64
    if q.dtype == torch.float32 and backward:
        chosen = {"BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    elif q.dtype == torch.float32 or backward:
        chosen = {"BLOCK_N": 32, "num_warps": 8 if wide else 4, "num_stages": 2}
    else:
        eight = wide and block_m == 64
        chosen = {"BLOCK_N": 64, "num_warps": 8 if eight else 4, "num_stages": 2}
    if target(q) == "hip":
        chosen["num_warps"] = 4  # of 64 threads
    if packed:
        return chosen
    candidates = [chosen]
    if q.dtype != torch.float32:  # smaller tiles, for more programs at once
        candidates.append(chosen | {"BLOCK_N": chosen["BLOCK_N"] // 2})
        if target(q) != "hip" and int(target(q)) >= 90:  # another tile in flight: others lack room
            candidates.insert(0, chosen | {"num_stages": 3})  # 1 to 7% faster on an H100
    direction = "backward" if backward else "forward"
    key = f"{short(q.dtype)} d={block_d} m={block_m}" + " dropout" * dropout
    return choose(f"cross_attention {direction}", key, candidates, q)

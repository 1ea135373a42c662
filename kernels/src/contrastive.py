"""One pass over many keys for the contrastive loss: log-sum-exps and softmax-weighted means.

For rows `x_r` (students, then teachers), keys `k_j` and a temperature `T`:

    s_rj = x_r . k_j / T      lse_r = logsumexp_j(s_rj)      mean_r = sum_j softmax_j(s_rj) k_j

which is attention whose values are the keys; loss and gradients of queries and temperature follow
from these two (see `blipfast.ops.contrastive`). Few rows against a long queue leave a GPU idle, so
the keys are split over programs and their partial results merged; programs of different rows that
read the same keys follow each other, so that all but the first find them in the cache. A second
pass, only where keys need a gradient, computes the softmax again. No `(R, N)` matrix exists.

Shapes: `B` queries, `R` rows (`B`, or `2B` with a teacher), `N` keys, `D` width, `P` splits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from blipfast.kernels import _contrastive_kernels as kernels
from blipfast.kernels._runtime import dot_precision, launch, next_power_of_2, short, target
from blipfast.kernels.tiles import choose
from torch import Tensor

MAX_WIDTH = 256
_MAX_SPLITS = 128


def softmax_mean(
    query: Tensor, teacher_query: Tensor | None, temperature: Tensor, keys: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps `(R,)` and means `(R, D)`, float32, of all key blocks taken as one list.

    query, teacher_query: `(B, D)`, keys: blocks `(N_b, D)`, D up to 256; float32, bfloat16 or
    float16 (float32 when they differ). Products have float32 sums, and 16-bit keys are weighted by
    two 16-bit numbers each, so that the means are as good as float32's.
    temperature: one element; zero or NaN gives NaN everywhere.
    """
    rows, blocks = _common(query, teacher_query, keys)
    chosen = _configuration(rows)
    block_m, block_n = chosen["BLOCK_M"], chosen["BLOCK_N"]
    row_tiles = max(1, -(-rows.shape[0] // block_m))
    spans = [_span(block.shape[0], row_tiles, block_n, rows.device) for block in blocks]
    splits = sum(-(-len(b) // span) for b, span in zip(blocks, spans, strict=True))
    stats = rows.new_empty((2, splits, rows.shape[0]), dtype=torch.float32)
    partial = rows.new_empty((splits, *rows.shape), dtype=torch.float32)
    meta = _meta(rows) | chosen
    first = 0
    for block, span in zip(blocks, spans, strict=True):
        sizes = (rows.shape[0], block.shape[0], rows.shape[1])
        args: list[Any] = [rows, block, temperature, stats[:, first:], partial[first:]]
        args += [(*rows.stride(), *block.stride(), stats.stride(0)), sizes, span, row_tiles]
        count = -(-block.shape[0] // span)
        launch(kernels.partial_means, (row_tiles * count,), args, **meta)
        first += count
    lse = rows.new_empty(rows.shape[0], dtype=torch.float32)
    mean = partial[0] if splits == 1 else torch.empty_like(partial[0])
    args = [stats, partial, lse, mean]
    args += [(rows.shape[0], splits, rows.shape[1], stats.stride(0))]
    meta = {"BLOCK_P": max(2, next_power_of_2(splits)), "BLOCK_D": 32}
    meta |= {"num_warps": 4, "num_stages": 1}
    launch(kernels.merge, (rows.shape[0], -(-rows.shape[1] // 32)), args, **meta)
    return lse, mean


def loss_and_means(
    query: Tensor,
    temperature: Tensor,
    lse: Tensor,
    means: Tensor,
    own: Tensor,
    mass: Tensor | None,
    alpha: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss_and_means` of `blipfast.ops._contrastive_stream` in one launch; results are float32."""
    size, width = query.shape
    loss = torch.empty_like(lse[:size])
    student, target = (torch.empty_like(means[:size]) for _ in range(2))
    args: list[Any] = [query, temperature, lse, means, own, mass, alpha, loss, student, target]
    args += [(*query.stride(), *own.stride()), (size, width)]
    meta = {"HAS_MASS": mass is not None, "HAS_TEACHER": alpha is not None}
    launch(kernels.losses, (size,), args, **meta, **_by_row(width))
    return loss, student, target


def query_gradients(
    grad: Tensor, query: Tensor, temperature: Tensor, student: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """`query_gradients` of that file in two launches; the queries' gradients have their dtype."""
    d_query = query.new_empty(query.shape)
    parts = student.new_empty(len(query))
    args: list[Any] = [grad, query, temperature, student, target, d_query, parts]
    args += [(grad.stride(0), *query.stride()), query.shape[1]]
    launch(kernels.gradients_of_queries, (len(query),), args, **_by_row(query.shape[1]))
    return d_query, parts.sum()


def _by_row(width: int) -> dict[str, int]:
    return {"BLOCK_D": max(32, next_power_of_2(width)), "num_warps": 2, "num_stages": 1}


def key_gradients(
    query: Tensor,
    teacher_query: Tensor | None,
    temperature: Tensor,
    keys: Sequence[Tensor],
    lse: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    offset: int,
) -> Tensor:
    """Gradients `(N, D)` of all key blocks, in query's dtype.

        dk_j = sum_i (a_i p_ij - b_i p'_ij - c_i y_ij) q_i / T

    with the softmax p of the students, p' of the teachers and `y_ij` 1 for positives: keys whose id
    is the query's, or key `offset + i` without ids. weights: a, b, c, each float32 `(B,)`.
    """
    rows, blocks = _common(query, teacher_query, keys)
    lengths = [block.shape[0] for block in blocks]
    out = query.new_empty((sum(lengths), query.shape[1]))
    chosen = _configuration(rows, gradients=True)
    block_n = chosen["BLOCK_N"]
    meta = _meta(rows) | chosen
    meta |= {"HAS_TEACHER": teacher_query is not None, "HAS_IDS": query_ids is not None}
    student, soft, hard = (w.contiguous() for w in weights)
    own = None if query_ids is None else query_ids.contiguous()
    first = 0
    for block, d_block in zip(blocks, out.split(lengths), strict=True):
        theirs = None if key_ids is None else key_ids[first : first + len(block)].contiguous()
        sizes = (query.shape[0], block.shape[0], rows.shape[1])
        args: list[Any] = [rows, block, temperature, lse, student, soft, hard, own, theirs, d_block]
        args += [(*rows.stride(), *block.stride(), *d_block.stride()), sizes, offset - first]
        launch(kernels.gradients_of_keys, (-(-block.shape[0] // block_n),), args, **meta)
        first += len(block)
    return out


def _common(
    query: Tensor, teacher_query: Tensor | None, keys: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Students above teachers and the blocks that have keys, all in one dtype."""
    tensors = [query, *([] if teacher_query is None else [teacher_query])]
    blocks = [block.detach() for block in keys if len(block)]
    dtypes = {t.dtype for t in (*tensors, *blocks)}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    rows = [t.detach().to(dtype) for t in tensors]
    whole = rows[0] if teacher_query is None else torch.cat(rows)
    return whole, [block.to(dtype) for block in blocks]


def _meta(rows: Tensor) -> dict[str, object]:
    block_d = max(16, next_power_of_2(rows.shape[1]))
    block_s = min(block_d, 64) if rows.dtype == torch.float32 else block_d
    return {"BLOCK_D": block_d, "BLOCK_S": block_s, "PRECISION": dot_precision(rows)}


def _configuration(rows: Tensor, gradients: bool = False) -> dict[str, int]:
    """Rows and keys of a tile, and launch options: the largest that spill no registers."""
    warps = 4 if target(rows) == "hip" else 8
    if rows.dtype == torch.float32:
        candidates = [{"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": warps, "num_stages": 1}]
    else:
        block_m, block_n = 64, 32
        if gradients:
            block_m, block_n = (32, 64) if warps == 8 else (16, 32)
        first = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 2}
        candidates = [first, first | {"num_stages": 3}, first | {"BLOCK_N": block_n // 2}]
        if target(rows) == 90 and not gradients:
            # A warp group multiplies 64 rows: on an H100 2.4 times as fast as two that share them.
            wide = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
            large = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
            candidates = [wide, large, first]
    key = f"{short(rows.dtype)} d={next_power_of_2(rows.shape[1])}"
    return choose(f"contrastive {'gradients' if gradients else 'means'}", key, candidates, rows)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132 if device.type == "meta" else 4  # an H100's, where kernels are only compiled
    return torch.cuda.get_device_properties(device).multi_processor_count


def _span(num_keys: int, row_tiles: int, block_n: int, device: torch.device) -> int:
    """Keys of one program: two programs a processor, if the row tiles alone are not as many."""
    tiles = -(-num_keys // block_n)
    splits = min(max(1, 2 * _processors(device) // row_tiles), tiles, _MAX_SPLITS)
    return -(-tiles // splits) * block_n

"""Cross-attention with indexed keys and values: many short query rows share one key/value set.

For every query row t of set b (its tokens lie packed, grouped by set through a CSR index):

    out_t = softmax(q_t K_b^T / sqrt(head_dim)) V_b

A tile of query rows spans all the texts of a set, so each K/V tile is read once for them together.
The backward pass needs no atomics: dQ is summed over the keys of one set and dK, dV over the rows
of one set, each by a single program, so that gradients are the same in every run.

Shapes: `T` packed query rows, `H` heads, `B` key/value sets, `S` keys of a set.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from blipfast.kernels import _cross_attention_kernels as kernels
from blipfast.kernels._runtime import dot_precision, launch, next_power_of_2, short, target
from blipfast.kernels.tiles import choose
from torch import Tensor

MAX_HEAD_DIM = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_rows: Tensor,
    max_rows: int,
    *,
    order: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention of packed query rows to the key/value set each belongs to; differentiable.

    Args:
        q: `(T, H, head_dim)`, float32, bfloat16 or float16, any strides; head_dim up to 128.
        k, v: `(B, H, S, head_dim)`, q's dtype, any strides.
        cu_rows: `(B + 1,)` int32: the rows of set b are `cu_rows[b]:cu_rows[b + 1]`, in grouped
            order. Rows outside all ranges are left undefined.
        max_rows: the most rows a set has, known to the host.
        order: `(T,)` int: the packed row of each grouped row, each once; None when they coincide.
        kv_lengths: `(B,)` int: valid keys of each set (clamped to `0 ... S`). A row without any
            valid key gives 0, and no gradient.
        dropout_p: probability of dropping an attention weight, in `[0, 1)`.
        seed: one int64 on the device, needed with dropout. The same seed drops the same weights
            whatever the tiles: Philox4x32-10 keyed by it, counting (key, packed row, head).

    Returns:
        `(T, H, head_dim)`, contiguous, softmax and sums in float32.
    """
    if dropout_p > 0 and seed is None:
        raise ValueError("dropout needs a seed tensor")
    out: Tensor = torch.ops.blipfast.triton_cross_attention(
        q, k, v, cu_rows, order, kv_lengths, seed, max_rows, dropout_p
    )[0]
    return out


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_rows: Tensor,
    order: Tensor | None,
    kv_lengths: Tensor | None,
    seed: Tensor | None,
    max_rows: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The output and, for the backward pass, each row's log2-sum-exp `(H, T)` in grouped order."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    block_m, tiles = row_tiles(max_rows, q)
    args: list[Any] = [q, k, v, out, lse, cu_rows, order, kv_lengths, seed]
    args += _strides(q, k, v, out)
    args += [(k.shape[2], q.shape[0], q.shape[2]), (*_scales(q), dropout_p), tiles]
    meta = _meta(q, order, kv_lengths, dropout_p, block_m)
    launch(kernels.forward, (k.shape[0] * tiles, q.shape[1]), args, **meta)
    return out, lse


_forward = torch.library.custom_op(
    "blipfast::triton_cross_attention",
    run_forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_rows, Tensor? order, Tensor? kv_lengths,"
    " Tensor? seed, int max_rows, float dropout_p) -> (Tensor, Tensor)",
)


@_forward.register_fake
def _(q, k, v, *_args):  # type: ignore[no-untyped-def]
    out = q.new_empty(q.shape)
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_rows: Tensor,
    order: Tensor | None,
    kv_lengths: Tensor | None,
    seed: Tensor | None,
    max_rows: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q `(T, H, head_dim)`, k and v `(B, H, S, head_dim)`."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    inputs = [grad, q, k, v, out, lse]
    index = [cu_rows, order, kv_lengths, seed]
    block_m, tiles = row_tiles(max_rows, q, backward=True)
    sizes = [(k.shape[2], q.shape[0], q.shape[2]), (*_scales(q), dropout_p)]
    meta = _meta(q, order, kv_lengths, dropout_p, block_m, backward=True)
    if tiles == 1 and not (q.dtype == torch.float32 and q.shape[2] > 64):
        outputs = [dq, dk, dv]
        args: list[Any] = [
            *inputs,
            *outputs,
            *index,
            *_strides(grad, q, k, v, out, *outputs),
            *sizes,
        ]
        launch(kernels.backward, (k.shape[0], q.shape[1]), args, **meta)
        return dq, dk, dv
    delta = torch.empty_like(lse)
    args = [*inputs, delta, dq, *index, *_strides(grad, q, k, v, out, dq), *sizes, tiles]
    launch(kernels.backward_queries, (k.shape[0] * tiles, q.shape[1]), args, **meta)
    args = [grad, q, k, v, lse, delta, dk, dv, *index, *_strides(grad, q, k, v, dk, dv), *sizes]
    key_tiles = -(-k.shape[2] // meta["BLOCK_N"])
    # The tiles of a set follow each other, so that its rows are read from the cache.
    launch(kernels.backward_keys, (key_tiles * k.shape[0], q.shape[1]), args, **meta)
    return dq, dk, dv


_backward = torch.library.custom_op(
    "blipfast::triton_cross_attention_backward",
    run_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_rows,"
    " Tensor? order, Tensor? kv_lengths, Tensor? seed, int max_rows, float dropout_p)"
    " -> (Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(grad, q, k, v, *_args):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *index, ctx.max_rows, ctx.dropout_p = inputs
    ctx.save_for_backward(q, k, v, *output, *index)


def _autograd(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.blipfast.triton_cross_attention_backward(
        grad, *ctx.saved_tensors, ctx.max_rows, ctx.dropout_p
    )
    return (*gradients, *[None] * 6)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """`(set, head, row, column)` of each; rows of queries belong to no set."""
    return [
        t.stride() if t.dim() == 4 else (0, t.stride(1), t.stride(0), t.stride(2)) for t in tensors
    ]


def row_tiles(max_rows: int, q: Tensor, backward: bool = False) -> tuple[int, int]:
    """Rows of a tile (as many as spill no registers), and tiles of the set with the most rows."""
    largest, card = 64, target(q)
    if q.dtype == torch.float32:
        largest = 32 if not backward or 32 < q.shape[2] <= 64 else 16
    elif backward and (card == "hip" or int(card) < 90):
        largest = 32
    block_m = min(max(16, next_power_of_2(max_rows)), largest)
    return block_m, max(1, -(-max_rows // block_m))


def _scales(q: Tensor) -> tuple[float, float]:
    """For the gradients, and for scores in powers of two."""
    scale = 1.0 / math.sqrt(q.shape[2])
    return scale, scale * math.log2(math.e)


def _meta(
    q: Tensor,
    order: Tensor | None,
    kv_lengths: Tensor | None,
    dropout_p: float,
    block_m: int,
    backward: bool = False,
) -> dict[str, Any]:
    block_d = max(16, next_power_of_2(q.shape[2]))
    return {
        "HAS_ORDER": order is not None,
        "HAS_LENGTHS": kv_lengths is not None,
        "DROPOUT": dropout_p > 0,
        "EVEN_D": block_d == q.shape[2],
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "PRECISION": dot_precision(q),
        **_configuration(q, block_m, block_d, backward, dropout_p > 0),
    }


def _configuration(
    q: Tensor, block_m: int, block_d: int, backward: bool, dropout: bool
) -> dict[str, int]:
    """Keys of a tile, warps and pipeline stages: the largest that spill no registers."""
    wide = block_d > 64
    if q.dtype == torch.float32 and backward:
        chosen = {"BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    elif q.dtype == torch.float32:
        chosen = {"BLOCK_N": 32, "num_warps": 8 if wide else 4, "num_stages": 2}
    elif backward:
        eight = wide or (dropout and block_m == 64)
        chosen = {"BLOCK_N": 32, "num_warps": 8 if eight else 4, "num_stages": 2}
    else:
        eight = wide and block_m == 64
        chosen = {"BLOCK_N": 64, "num_warps": 8 if eight else 4, "num_stages": 2}
    if target(q) == "hip":
        chosen["num_warps"] = 4  # of 64 threads
    candidates = [chosen]
    if q.dtype != torch.float32:  # smaller tiles, for more programs at once
        candidates.append(chosen | {"BLOCK_N": chosen["BLOCK_N"] // 2})
        if target(q) != "hip" and int(target(q)) >= 90:  # another tile in flight: others lack room
            candidates.append(chosen | {"num_stages": 3})
    direction = "backward" if backward else "forward"
    key = f"{short(q.dtype)} d={block_d} m={block_m}" + " dropout" * dropout
    return choose(f"cross_attention {direction}", key, candidates, q)

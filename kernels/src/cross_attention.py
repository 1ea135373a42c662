"""Cross-attention with indexed keys and values: many short query rows share one key/value set.

For every query row t of set b (its tokens lie packed, grouped by set through a CSR index):

    out_t = softmax(q_t K_b^T / sqrt(head_dim)) V_b

A tile of query rows spans all the texts of a set, so each K/V tile is read once for them together.
The backward pass needs no atomics: dQ is summed over the keys of one set and dK, dV over the rows
of one set, each by a single program, so that gradients are the same in every run.

Shapes: `T` packed query rows, `H` heads, `B` key/value sets, `S` keys of a set.
"""

from __future__ import annotations

from typing import Any

import torch
from blipfast.kernels._attention_launch import Look, backward, forward
from blipfast.kernels._runtime import first_output
from torch import Tensor
from torch.autograd.function import once_differentiable

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
            whatever the tiles, by Philox4x32-7 (the fewest rounds that pass all of BigCrush) keyed
            by it, counting (key, row of the set, head, set). Key and row are taken without their
            bit of value 8: the bits (row, key) number the weight among the four words.

    Returns:
        `(T, H, head_dim)`, contiguous, softmax and sums in float32.
    """
    if dropout_p > 0 and seed is None:
        raise ValueError("dropout needs a seed tensor")
    arguments = (q, k, v, cu_rows, order, kv_lengths, seed, max_rows, dropout_p)
    return first_output(torch.ops.blipfast.triton_cross_attention, _Unwatched, arguments)


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
    look = Look(cu_rows, order, kv_lengths, seed, max_rows, dropout_p)
    return forward(q, k, v, look)


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
    *,
    together: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q `(T, H, head_dim)`, k and v `(B, H, S, head_dim)`.

    together: those of k and v are parts of one `(B, S, 2, H, head_dim)`, as the gradient of a
    projection to both lies. An operator's results may not share memory.
    """
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if together:
        sets, heads, keys, dim = k.shape
        dk, dv = k.new_empty((sets, keys, 2, heads, dim)).permute(2, 0, 3, 1, 4)
    else:
        dk, dv = torch.empty_like(k), torch.empty_like(v)
    gradients = dq, dk, dv
    look = Look(cu_rows, order, kv_lengths, seed, max_rows, dropout_p)
    backward(grad, (q, k, v), out, lse, gradients, look)
    return gradients


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


class _Unwatched(torch.autograd.Function):
    """The same without PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *look: Any) -> Tensor:
        out, lse = run_forward(q, k, v, *look)
        *index, ctx.max_rows, ctx.dropout_p = look
        ctx.save_for_backward(q, k, v, out, lse, *index)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        options = (ctx.max_rows, ctx.dropout_p)
        gradients = run_backward(grad, *ctx.saved_tensors, *options, together=True)
        return (*gradients, *[None] * 6)

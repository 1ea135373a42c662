"""Self-attention within packed texts, one tile of rows a text (or a few): no padding, no copies.

For every text n, whose tokens lie packed at `cu_seqlens[n]:cu_seqlens[n + 1]`, and each head:

    out_n = softmax(q_n k_n^T / sqrt(head_dim)) v_n

The kernels are those of `cross_attention`, whose sets are the texts and whose keys are their rows.

Shapes: `T` packed tokens, `N` texts, `H` heads.
"""

from __future__ import annotations

from typing import Any

import torch
from blipfast.kernels._attention_launch import Look, backward, forward
from blipfast.kernels._runtime import first_output
from torch import Tensor
from torch.autograd.function import once_differentiable


def varlen_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention of each token to its own text; differentiable.

    Args:
        qkv: `(T, 3, H, head_dim)`, float32, bfloat16 or float16, any strides; head_dim up to 128.
        cu_seqlens: `(N + 1,)` int32. Tokens outside all texts are left undefined.
        max_seqlen: of the longest text, known to the host.
        causal: a token sees those before it and itself.
        dropout_p: probability of dropping an attention weight, in `[0, 1)`.
        seed: one int64 on the device, needed with dropout; see `cross_attention`.

    Returns:
        `(T, H, head_dim)`, contiguous, softmax and sums in float32.
    """
    if dropout_p > 0 and seed is None:
        raise ValueError("dropout needs a seed tensor")
    arguments = (qkv, cu_seqlens, seed, max_seqlen, causal, dropout_p)
    return first_output(torch.ops.blipfast.triton_varlen_attention, _Unwatched, arguments)


def run_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The output and, for the backward pass, each token's log2-sum-exp `(H, T)`."""
    look = Look(cu_seqlens, None, None, seed, max_seqlen, dropout_p, causal)
    return forward(*qkv.unbind(1), look)


_forward = torch.library.custom_op(
    "blipfast::triton_varlen_attention",
    run_forward,
    mutates_args=(),
    schema="(Tensor qkv, Tensor cu_seqlens, Tensor? seed, int max_seqlen, bool causal,"
    " float dropout_p) -> (Tensor, Tensor)",
)


@_forward.register_fake
def _(qkv, *_args):  # type: ignore[no-untyped-def]
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((tokens, heads, head_dim))
    return out, qkv.new_empty((heads, tokens), dtype=torch.float32)


def run_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    causal: bool,
    dropout_p: float,
) -> Tensor:
    """The gradient of qkv, one tensor, never put together from three."""
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    look = Look(cu_seqlens, None, None, seed, max_seqlen, dropout_p, causal)
    backward(grad, tuple(qkv.unbind(1)), out, lse, tuple(d_qkv.unbind(1)), look)
    return d_qkv


_backward = torch.library.custom_op(
    "blipfast::triton_varlen_attention_backward",
    run_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, Tensor? seed,"
    " int max_seqlen, bool causal, float dropout_p) -> Tensor",
)


@_backward.register_fake
def _(grad, qkv, *_args):  # type: ignore[no-untyped-def]
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, seed, *ctx.options = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens, seed)


def _autograd(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    d_qkv = torch.ops.blipfast.triton_varlen_attention_backward(
        grad, *ctx.saved_tensors, *ctx.options
    )
    return d_qkv, *[None] * 5


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Unwatched(torch.autograd.Function):
    """The same without PyTorch's dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, *options: Any
    ) -> Tensor:
        out, lse = run_forward(qkv, cu_seqlens, seed, *options)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens, seed)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return run_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 5

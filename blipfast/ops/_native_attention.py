"""Attention by the C++ operator, in both directions (`kernels/csrc/attention*.cpp`).

It has the scores of eight queries at a time and keeps none. Queries of several texts need no
padding: `cu_seqlens` says where each text lies, and `order` which tokens those are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blipfast.ops import _native
from blipfast.ops._products import bf16_products
from blipfast.ops.split_heads import empty_parts


def why_not(q: Tensor) -> str | None:
    """Why the operator cannot run on `q (..., head_dim)`, in words, or None."""
    reason = _native.why_not(q)
    if reason is not None:
        return reason
    if not (_native.avx512_bf16() if q.dtype == torch.bfloat16 else _native.avx512()):
        return f"the processor lacks AVX-512 for {q.dtype}"
    if q.dim() > 1 and (q.shape[-1] == 0 or q.shape[-1] % 32):
        return f"it takes heads of 32, 64, 96 … dimensions, not {q.shape[-1]}"
    return None


def slower(q: Tensor) -> str | None:
    """Why matrix products of whole batches are faster for `q`, or None."""
    if q.dtype == torch.bfloat16 and bf16_products() == "amx":
        return "AMX multiplies whole matrices of bf16 faster"
    return None


@dataclass
class Options:
    """What both directions take beside tensors of heads.

    key_lengths: `(B,)` int64, keys from there on are padding. dropout_p: of the weights.
    cu_seqlens: `(N + 1,)` int32, the queries are those of N texts, one after the other; each
    attends to a set of keys of its own or, in self-attention, to itself. order: `(T,)` int64, where
    the queries that `cu_seqlens` counts lie.
    """

    key_lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    order: Tensor | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    seed: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.dropout_p > 0.0:
            self.seed = int(torch.randint(2**62, ()))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the operators' order."""
        lengths = self.key_lengths
        lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
        where = (lengths, self.cu_seqlens, self.order)
        return *where, self.is_causal, self.dropout_p, self.seed


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """`q (B, H, L, head_dim)`, or packed `(T, H, head_dim)`, and `k`, `v (B, H, S, head_dim)`."""
    return _Attention.apply(q, k, v, options)


def self_attention(qkv: Tensor, options: Options) -> Tensor:
    """`qkv (B, L, 3, H, head_dim)`, or packed `(T, 3, H, head_dim)`, to one dimension less.

    Its gradient is one tensor too, never put together from those of q, k and v.
    """
    return _SelfAttention.apply(qkv, options)


def _by_rows(x: Tensor) -> Tensor:
    """With the elements of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(tokens: Tensor) -> Tensor:
    """`(B, L, H, head_dim)` or `(T, H, head_dim)` to `(B or 1, H, tokens, head_dim)`."""
    return tokens.unsqueeze(0).transpose(1, 2) if tokens.dim() == 3 else tokens.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor) -> Tensor:
    return torch.ops.blipfast_native.attention_out(q, k, v, *options.arguments, out)


def _differentiate(
    grad: Tensor, saved: tuple[Tensor, ...], options: Options, grads: tuple[Tensor, ...]
) -> None:
    run = torch.ops.blipfast_native.attention_backward_out
    run(_by_rows(grad), *saved, *options.arguments, *grads)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        q, k, v = map(_by_rows, (q, k, v))
        packed = q.dim() == 3
        tokens = q if packed else q.transpose(1, 2)
        # As attention writes it everywhere: the heads of a token side by side.
        out = tokens.new_empty(tokens.shape)
        lse = _attend(_heads(tokens), k, v, options, _heads(out))
        ctx.options = options
        ctx.save_for_backward(q, k, v, lse)
        return out if packed else out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse = ctx.saved_tensors
        grad_q, (grad_k, grad_v) = torch.empty_like(q), empty_parts(k, 2)
        grads = grad_q, grad_k, grad_v
        if q.dim() == 3:
            q, grad, grad_q = _heads(q), _heads(grad), _heads(grad_q)
        _differentiate(grad, (q, k, v, lse), ctx.options, (grad_q, grad_k, grad_v))
        return *grads, None


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, options: Options) -> Tensor:
        qkv = _by_rows(qkv)
        q, k, v = map(_heads, qkv.unbind(-3))
        out = qkv.new_empty(*qkv.shape[:-3], *qkv.shape[-2:])
        lse = _attend(q, k, v, options, _heads(out))
        ctx.options = options
        ctx.save_for_backward(qkv, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, lse = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
        heads, grads = (tuple(map(_heads, x.unbind(-3))) for x in (qkv, grad_qkv))
        _differentiate(_heads(grad), (*heads, lse), ctx.options, grads)
        return grad_qkv, None

"""Linear layer and cross-entropy with label smoothing, in little more memory than the gradients.

    z_t      = W h_t + b
    loss_t   = logsumexp(z_t) - (1 - e) z_t[y_t] - e / V sum_v z_t[v]
    dz_t[v]  = grad_t (softmax(z_t)[v] - e / V - (1 - e) [v = y_t])
    dW       = sum_t dz_t h_t,   dh_t = W^T dz_t,   db = sum_t dz_t

The vocabulary is taken a piece at a time: the forward keeps running sums of each row, the backward
forms a piece's logits again and turns them into their gradient in place. A piece is finished with
its rows of dW, so nothing is summed over pieces but dh (in float32), and the logits of a piece lie
in the rows of dW that come later: beside dW no matrix is larger than `hidden`. Products stay with
the vendor's library; what is fused is all that lies between them, one row to a program.

Shapes: `T` tokens, `D` width, `V` vocabulary, `P` columns of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from blipfast.kernels import _linear_ce_kernels as kernels
from blipfast.kernels._runtime import launch, short
from blipfast.kernels.tiles import choose
from torch import Tensor

_MULTIPLE = 128  # columns of a piece: whole tiles of a product, rows that start at 16 bytes
_ALIGNED = 8  # elements of two bytes


def run_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps, both float32 `(T,)`, 0 for ignored rows.

    hidden `(T, D)`, weight `(V, D)` and bias `(V,)`: float32, bfloat16 or float16, alike. labels:
    int64; one outside `0 ... V - 1` gives a NaN loss, and nothing out of bounds is read.
    """
    tokens, vocabulary = len(hidden), len(weight)
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    lse = torch.empty_like(losses)
    sums = hidden.new_empty((4, tokens), dtype=torch.float32)
    bias, labels = None if bias is None else bias.contiguous(), labels.contiguous()
    pieces = list(_in_own_memory(tokens, *weight.shape))
    memory, tiles = hidden.new_empty(_elements(tokens, pieces)), _configuration(hidden)
    for start, stop in pieces:
        logits = _logits(hidden, weight, start, stop, memory)
        args: list[Any] = [logits, bias, labels, sums, losses, lse, logits.stride(0)]
        args += [(tokens, vocabulary, stop - start), start, ignore_index, float(smoothing)]
        launch(
            kernels.row_sums,
            (tokens,),
            args,
            HAS_BIAS=bias is not None,
            FIRST=start == 0,
            LAST=stop == vocabulary,
            **tiles,
        )
    return losses, lse


_forward = torch.library.custom_op(
    "blipfast::triton_linear_cross_entropy",
    run_forward,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float smoothing,"
    " int ignore_index) -> (Tensor, Tensor)",
)


@_forward.register_fake
def _(hidden, *_args):  # type: ignore[no-untyped-def]
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses)


def run_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    smoothing: float,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where not needed; grad: `(T,)`, any stride."""
    d_weight, d_bias = _empty_gradients(weight, needs)
    total = hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=torch.float32)
    arguments = (grad, hidden, weight, bias, labels, lse, smoothing, ignore_index)
    _add_gradients(
        *arguments,
        total if needs[0] else None,
        d_weight if needs[1] else None,
        d_bias if needs[2] else None,
    )
    return total.to(hidden.dtype), d_weight, d_bias


def _add_gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    smoothing: float,
    ignore_index: int,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Adds hidden's gradient to `d_hidden` in float32, and writes the others.

    A function of its own, so that its memory is free when the sum is copied.
    """
    tokens, vocabulary = len(hidden), len(weight)
    bias, labels = None if bias is None else bias.contiguous(), labels.contiguous()
    within: list[tuple[int, int]] = []
    if d_weight is None:
        later = list(_in_own_memory(tokens, *weight.shape))
    else:
        within, later = _within_gradient(tokens, *weight.shape)
    own, tiles = hidden.new_empty(_elements(tokens, later)), _configuration(hidden)
    for place, (start, stop) in enumerate(within + later):
        memory = own if d_weight is None or place >= len(within) else d_weight[stop:].view(-1)
        logits = _logits(hidden, weight, start, stop, memory)
        args: list[Any] = [logits, bias, labels, lse, grad, (logits.stride(0), grad.stride(0))]
        args += [(tokens, vocabulary, stop - start), start, ignore_index, float(smoothing)]
        launch(kernels.logit_gradients, (tokens,), args, HAS_BIAS=bias is not None, **tiles)
        if d_hidden is not None:
            _add_product(d_hidden, logits, weight[start:stop])
        if d_weight is not None:
            torch.mm(logits.T, hidden, out=d_weight[start:stop])
        if d_bias is not None:
            torch.sum(logits, 0, out=d_bias[start:stop])


_backward = torch.library.custom_op(
    "blipfast::triton_linear_cross_entropy_backward",
    run_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor lse,"
    " float smoothing, int ignore_index, bool[] needs) -> (Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(_grad, hidden, weight, _bias, _labels, _lse, _smoothing, _ignore, needs):  # type: ignore[no-untyped-def]
    d_hidden = hidden.new_empty(hidden.shape if needs[0] else 0)
    return d_hidden, *_empty_gradients(weight, needs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.options = inputs[4:]


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:3])
    backward = torch.ops.blipfast.triton_linear_cross_entropy_backward
    gradients = backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 3


_forward.register_autograd(_autograd, setup_context=_save)


def losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    smoothing: float,
    ignore_index: int,
) -> Tensor:
    """`run_forward`'s losses, with their gradient."""
    return _forward(hidden, weight, bias, labels, smoothing, ignore_index)[0]  # type: ignore[no-any-return]


def _in_own_memory(tokens: int, vocabulary: int, width: int) -> Iterator[tuple[int, int]]:
    """Pieces whose logits take no more than the weight's gradient will, or than `hidden`.

    One at least, so that rows have a loss even without any vocabulary.
    """
    columns = max(vocabulary * width // max(tokens, 1), width)
    columns = max(columns // _MULTIPLE, 1) * _MULTIPLE
    for start in range(0, max(vocabulary, 1), columns):
        yield start, min(start + columns, vocabulary)


def _within_gradient(
    tokens: int, vocabulary: int, width: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pieces whose logits fit the weight gradient's rows behind them, and the last few that do not.

    The latter take as much memory of their own as `hidden`.
    """
    own = max(-(-width // _MULTIPLE), 1) * _MULTIPLE
    within, start = [], 0
    while True:
        columns = (vocabulary - start) * width // max(width + tokens, 1) // _MULTIPLE * _MULTIPLE
        if columns < own:
            break
        within.append((start, start + columns))
        start += columns
    starts = range(start, vocabulary, own)
    return within, [(start, min(start + own, vocabulary)) for start in starts]


def _elements(tokens: int, pieces: list[tuple[int, int]]) -> int:
    return tokens * max((_row(stop - start) for start, stop in pieces), default=0)


def _row(columns: int) -> int:
    """Elements from one row of logits to the next."""
    return -(-columns // _ALIGNED) * _ALIGNED


def _logits(hidden: Tensor, weight: Tensor, start: int, stop: int, memory: Tensor) -> Tensor:
    """`(T, P)` of a piece, without the bias, at the beginning of `memory`."""
    row = _row(stop - start)
    logits = memory[: len(hidden) * row].view(len(hidden), row)[:, : stop - start]
    return torch.mm(hidden, weight[start:stop].T, out=logits)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, summed in total's float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _empty_gradients(weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    d_weight = weight.new_empty(weight.shape if needs[1] else 0)
    return d_weight, weight.new_empty(len(weight) if needs[2] else 0)


def _configuration(hidden: Tensor) -> dict[str, int]:
    """Logits of a tile, warps and stages."""
    chosen = {"BLOCK_V": 2048, "num_warps": 8, "num_stages": 2}
    candidates = [chosen, {"BLOCK_V": 1024, "num_warps": 4, "num_stages": 3}]
    return choose("linear_cross_entropy", short(hidden.dtype), candidates, hidden)

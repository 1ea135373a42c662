"""Dropout, residual and LayerNorm as one kernel in each direction.

    h = residual + dropout(branch)        (the residual itself where there is no branch)
    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

Backward, with x = (h - mean) / std and g = weight * dy:

    dh = (g - mean(g) - x mean(g x)) / std + what comes to h from elsewhere
    dweight = sum dy x,  dbias = sum dy   over rows: a partial sum a program, then their sum

What is read is h as it was written, rounded, in both directions; all else is float32. Dropout's
factors are drawn again in the backward. Shapes: `R` rows of width `D`.
"""

from __future__ import annotations

from typing import Any

import torch
from blipfast.kernels import _layer_norm_kernels as kernels
from blipfast.kernels._runtime import launch, next_power_of_2, short, watched
from blipfast.kernels.tiles import choose
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_layer_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`h` and `y` as above, both of `h`'s dtype and contiguous; differentiable once.

    Args:
        residual: `(..., D)`, float32, bfloat16 or float16, D up to 4,096.
        branch: of residual's shape, maybe of another dtype; h then has the wider of both. None: h
            is the residual itself.
        weight, bias: `(D,)`, of any of these dtypes.
        dropout_p: probability of dropping an element of the branch, in `[0, 1)`.
        seed: one int64 on the device, needed with dropout. The same seed drops the same elements
            whatever the tiles, by Philox4x32-7 keyed by it, counting (column, row, 0, 0); the
            lowest two bits of the column, left out of the count, number the element among the four
            words.
    """
    if dropout_p > 0 and seed is None:
        raise ValueError("dropout needs a seed tensor")
    arguments = (residual, branch, weight, bias, seed, eps, dropout_p)
    if not watched(residual):
        return _Unwatched.apply(*arguments)  # type: ignore[no-any-return]
    summed, normed, *_ = torch.ops.blipfast.triton_add_layer_norm(*arguments)
    return (residual if branch is None else summed), normed


def run_forward(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """h (empty without a branch), y, and the mean and 1 / std of rows `(2, R)`."""
    rows = _rows(residual)
    added = None if branch is None else _rows(branch)
    summed, normed, moments = _empty_results(residual, branch)
    strides = (rows.stride(0), 0 if added is None else added.stride(0))
    meta = _configuration(rows, normed.dtype, dropout_p > 0)
    args: list[Any] = [rows, added, weight.contiguous(), bias.contiguous(), seed]
    args += [summed, normed, moments]
    launch(
        kernels.normalize,
        (-(-rows.shape[0] // meta["BLOCK_R"]),),
        [*args, strides, *rows.shape, eps, dropout_p],
        HAS_BRANCH=branch is not None,
        DROPOUT=dropout_p > 0,
        **meta,
    )
    return summed, normed, moments


_forward = torch.library.custom_op(
    "blipfast::triton_add_layer_norm",
    run_forward,
    mutates_args=(),
    schema="(Tensor residual, Tensor? branch, Tensor weight, Tensor bias, Tensor? seed, float eps,"
    " float dropout_p) -> (Tensor, Tensor, Tensor)",
)


@_forward.register_fake
def _(residual, branch, *_args):  # type: ignore[no-untyped-def]
    return _empty_results(residual, branch)


def run_backward(
    grad_summed: Tensor | None,
    grad_normed: Tensor,
    summed: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    moments: Tensor,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual, the branch (empty where the residual's serves), and of weight and
    bias together, `(2, D)`."""
    rows, grad = _rows(summed), _rows(grad_normed)
    elsewhere = None if grad_summed is None else _rows(grad_summed)
    own = _has_own_gradient(residual_dtype, branch_dtype, dropout_p)
    grad_residual, grad_branch = _empty_gradients(summed, residual_dtype, branch_dtype, own)
    meta = _configuration(rows, summed.dtype, dropout_p > 0, backward=True)
    programs = max(1, min(meta.pop("PROGRAMS"), -(-rows.shape[0] // meta["BLOCK_R"])))
    partial = summed.new_empty((2, programs, rows.shape[1]), dtype=torch.float32)
    strides = (grad.stride(0), 0 if elsewhere is None else elsewhere.stride(0), rows.stride(0))
    args: list[Any] = [grad, elsewhere, rows, weight.contiguous(), seed, moments]
    args += [grad_residual, grad_branch]
    launch(
        kernels.normalize_backward,
        (programs,),
        [*args, partial, strides, *rows.shape, dropout_p],
        HAS_GRAD_SUMMED=elsewhere is not None,
        HAS_GRAD_BRANCH=own,
        DROPOUT=dropout_p > 0,
        **meta,
    )
    return grad_residual, grad_branch, partial.sum(1).to(weight.dtype)


_backward = torch.library.custom_op(
    "blipfast::triton_add_layer_norm_backward",
    run_backward,
    mutates_args=(),
    schema="(Tensor? grad_summed, Tensor grad_normed, Tensor summed, Tensor weight, Tensor? seed,"
    " Tensor moments, ScalarType residual_dtype, ScalarType? branch_dtype,"
    " float dropout_p) -> (Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(_gs, _gn, summed, weight, _seed, _moments, residual_dtype, branch_dtype, dropout_p):  # type: ignore[no-untyped-def]
    own = _has_own_gradient(residual_dtype, branch_dtype, dropout_p)
    gradients = _empty_gradients(summed, residual_dtype, branch_dtype, own)
    return *gradients, weight.new_empty((2, *weight.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    residual, branch, weight, _, seed, _, ctx.dropout_p = inputs
    summed, _, moments = output
    ctx.dtypes = residual.dtype, None if branch is None else branch.dtype
    h = residual if branch is None else summed
    ctx.save_for_backward(h, weight, seed, moments)


def _gradients(run: Any, ctx: Any, grad_summed: Any, grad_normed: Tensor) -> tuple[Any, ...]:
    residual, branch, parameters = run(
        grad_summed, grad_normed, *ctx.saved_tensors, *ctx.dtypes, ctx.dropout_p
    )
    if ctx.dtypes[1] is None:
        branch = None
    elif not _has_own_gradient(*ctx.dtypes, ctx.dropout_p):
        branch = residual
    return residual, branch, *parameters.unbind(), None, None, None


def _autograd(ctx: Any, grad_summed: Tensor, grad_normed: Tensor, _: Tensor) -> tuple[Any, ...]:
    elsewhere = None if ctx.dtypes[1] is None else grad_summed
    backward = torch.ops.blipfast.triton_add_layer_norm_backward
    return _gradients(backward, ctx, elsewhere, grad_normed)


_forward.register_autograd(_autograd, setup_context=_save)


class _Unwatched(torch.autograd.Function):
    """The same without PyTorch's dispatcher; without a branch the residual passes through, so that
    the kernel adds what its other uses bring back."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = run_forward(*arguments)
        _save(ctx, arguments, output)
        ctx.set_materialize_grads(False)
        return (arguments[0] if arguments[1] is None else output[0]), output[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_summed: Any, grad_normed: Any) -> tuple[Any, ...]:
        if grad_normed is None:
            grad_normed = torch.zeros_like(ctx.saved_tensors[0])
        return _gradients(run_backward, ctx, grad_summed, grad_normed)


def _empty_results(residual: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = residual.dtype, residual.shape
    if branch is not None:
        dtype = torch.promote_types(dtype, branch.dtype)
    summed = residual.new_empty(0 if branch is None else shape, dtype=dtype)
    moments = residual.new_empty((2, shape[:-1].numel()), dtype=torch.float32)
    return summed, residual.new_empty(shape, dtype=dtype), moments


def _empty_gradients(
    summed: Tensor, residual: torch.dtype, branch: torch.dtype | None, own: bool
) -> tuple[Tensor, Tensor]:
    grad_branch = summed.new_empty(summed.shape if own else 0, dtype=branch)
    return summed.new_empty(summed.shape, dtype=residual), grad_branch


def _has_own_gradient(residual: torch.dtype, branch: torch.dtype | None, dropout_p: float) -> bool:
    return branch is not None and (dropout_p > 0 or residual != branch)


def _rows(x: Tensor) -> Tensor:
    """`(R, D)`, a view wherever the columns of a row lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _configuration(
    rows: Tensor, dtype: torch.dtype, dropout: bool, backward: bool = False
) -> dict[str, int]:
    """Rows of a tile, warps, and programs that share the rows in the backward."""
    block_d = max(16, next_power_of_2(rows.shape[1]))
    at_once = max(1, 2048 // block_d)  # elements of a tile for four warps
    warps = 4 if block_d <= 2048 else 8
    chosen = {"BLOCK_R": min(at_once, 16), "BLOCK_D": block_d, "num_warps": warps, "num_stages": 1}
    candidates = [chosen, chosen | {"BLOCK_R": max(1, chosen["BLOCK_R"] // 2)}]
    if backward:
        # More programs hide more of the memory's latency, and leave more partial sums.
        candidates = [chosen | {"PROGRAMS": count} for count in (512, 1024)]
    direction = "backward" if backward else "forward"
    key = f"{short(dtype)} d={block_d}" + " dropout" * dropout
    return choose(f"add_layer_norm {direction}", key, candidates, rows)

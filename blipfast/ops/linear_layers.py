"""Linear layers and the feed-forward network, where PyTorch's leave much of a CPU unused.

Their matrix products go to the library that is fast on this processor (`_products`). In training:

- Autograd sums the gradients of all uses of a weight, in place only when a gradient is no view, and
  that of `F.linear` is one: some 900 MB more to write in each step of pre-training.
- GELU's output is computed again in the backward, beside its gradient, which takes no new memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blipfast.ops._bias_gelu import bias_gelu, gelu_backward_
from blipfast.ops._dispatch import Backends
from blipfast.ops._products import by_onednn, onednn_takes, parameter_gradients, product
from blipfast.ops.autocast_copies import autocast_copy, casts_together, copy_in_use
from blipfast.ops.few_rows import few_rows_linear, reads_few_rows_in_place

linear_backends = Backends("linear")
feed_forward_backends = Backends("feed_forward")


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """`F.linear`, to be differentiated once: `x (..., in)`, `weight (out, in)` to `(..., out)`.

    Under autocast it computes in autocast's dtype, casting a weight once for all uses of a step.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return linear_backends(x, impl)(x, weight, bias)


def feed_forward(x: Tensor, first: nn.Linear, second: nn.Linear, *, impl: str = "auto") -> Tensor:
    """`second(gelu(first(x)))`, to be differentiated once: `x (..., in)` to `(..., out)`.

    Layers that are more than their weights (adapters, hooks) are called as they are.
    """
    if torch.compiler.is_compiling() or not (_is_plain(first) and _is_plain(second)):
        return second(F.gelu(first(x)))
    run = feed_forward_backends(x, impl)
    return run(x, first.weight, first.bias, second.weight, second.bias)


def _why_not(x: Tensor) -> str | None:
    if not x.is_cpu and _autocasts(x):
        return f"on {x.device.type}, autograd's own linear layer takes less of the host's time"
    return None


@linear_backends.register("fused", _why_not)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(*_cast(x, weight, bias))
    if not weight.requires_grad:  # of one that does, autocast keeps its own copy for all calls
        x, weight, bias = _cast(x, weight, bias)
    if bias is not None and reads_few_rows_in_place(x, weight):
        return few_rows_linear(x, weight, bias)
    return product(x, weight, bias)


@linear_backends.register("torch")
def _linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, with the copies that were made for autocast, if any."""
    return F.linear(x, *_copied(x, weight, bias))  # type: ignore[arg-type]


@feed_forward_backends.register("fused", _why_not)
def _feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w1, b1, w2, b2)):
        return _FeedForward.apply(*_cast(x, w1, b1, w2, b2))
    if reads_few_rows_in_place(x, w1):
        hidden = few_rows_linear(x, w1, b1, gelu=True)
    elif _fuses_gelu(x, w1):
        hidden = by_onednn(x, w1, b1, gelu=True)
    else:
        hidden = bias_gelu(_linear(x, w1, None), b1, in_place=True)
    return _linear(hidden, w2, b2)


@feed_forward_backends.register("torch")
def _feed_forward_torch(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return _linear_torch(F.gelu(_linear_torch(x, w1, b1)), w2, b2)


def _is_plain(layer: nn.Linear) -> bool:
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return type(layer) in (nn.Linear, Linear) and not hooks


def _autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _copied(x: Tensor, *weights: Tensor | None) -> list[Tensor | None]:
    if torch.compiler.is_compiling() or not casts_together(x):
        return list(weights)
    dtype = torch.get_autocast_dtype(x.device.type)
    copies = (None if w is None else copy_in_use(w, dtype) for w in weights)
    return [w if copy is None else copy for w, copy in zip(weights, copies, strict=True)]


def _cast(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """All in the dtype that autocast asks for, if it is on."""
    if not _autocasts(x):
        return x, *weights
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), *(w if w is None else autocast_copy(w, dtype) for w in weights)


_MANY_ROWS = 2048  # below it the fused product gains nothing


def _fuses_gelu(x: Tensor, weight: Tensor) -> bool:
    """In bf16 on a CPU, oneDNN can apply GELU before it rounds and writes."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and x.numel() >= _MANY_ROWS * x.shape[-1]
        and onednn_takes(x)
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if need_x else None,
            *parameter_gradients(grad.flatten(0, -2), x.flatten(0, -2), need_weight, need_bias),
        )


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        projected = product(x, w1)
        ctx.save_for_backward(x, projected, w1, b1, w2)
        return product(bias_gelu(projected, b1), w2, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, projected, w1, b1, w2 = ctx.saved_tensors
        need_x, need_w1, _, need_w2, need_b2 = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grad_projected = product(rows, w2.t())
        hidden, grad_b1 = gelu_backward_(grad_projected, projected.flatten(0, -2), b1)
        grad_w2, grad_b2 = parameter_gradients(rows, hidden, need_w2, need_b2)
        del hidden
        grad_x = product(grad_projected, w1.t()).view_as(x) if need_x else None
        grad_w1, _ = parameter_gradients(grad_projected, x.flatten(0, -2), need_w1, False)
        return grad_x, grad_w1, grad_b1, grad_w2, grad_b2

"""Linear layer and cross-entropy in one, for the language-model head (BLIP section 3.2, LM).

    z_t    = W h_t + b
    loss_t = -(1 - e) * log softmax(z_t)[y_t] - e / V * sum_v log softmax(z_t)[v]

with label smoothing `e`; a row whose label is `ignore_index` has loss 0 and no gradient. It equals
`F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, ...)`, but the logits of all tokens
never exist at once.

PyTorch's backend takes some tokens at a time. For a mean or a sum, the gradients are formed while a
piece's logits are there, so nothing is computed twice; for losses by row, whose weights are not
known yet, the backward pass computes the logits again. Few tokens, which fit one piece, go to
PyTorch's own functions. The kernels take some of the vocabulary at a time and compute logits twice,
in no more memory than the weight's gradient and a few times `hidden`.

Shapes: `T` tokens, `D` width, `V` vocabulary, `C` tokens of a piece.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.ops import _triton
from blipfast.ops._dispatch import Backends
from blipfast.ops._linear_ce_pieces import by_pieces, check_labels, logits_at_a_time
from blipfast.ops.linear_layers import linear

Reduction = Literal["mean", "sum", "none"]

backends = Backends("linear_cross_entropy")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of a linear layer's outputs; the formula heads this module.

    Args:
        hidden: `(T, D)` float. Under autocast it, weight and bias are cast as for `F.linear`.
        weight: `(V, D)`, in hidden's dtype.
        bias: `(V,)` or None.
        labels: `(T,)` int64 in `0 ... V - 1`, or `ignore_index`. On a CPU the ignored rows are left
            out of all the work; elsewhere they are computed, since leaving them out would make the
            host wait.
        label_smoothing: `e`, from 0 to 1.
        ignore_index: the label of rows to ignore.
        reduction: "mean" over the rows with a label (0 when there is none), "sum" or "none".
        impl: backend name or "auto".

    Returns:
        A scalar, or `(T,)` for "none", float32 (float64 for float64 input). Matmuls run in hidden's
        dtype, softmax and sums in float32. There is no second derivative.

    Raises:
        ShapeError: shapes, dtypes or devices do not fit, a label is out of range (seen on a CPU
            only), or an option is unknown.
        BackendError: `impl` names a backend that cannot run.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(hidden, weight, bias, labels, label_smoothing, reduction)
    run = backends(hidden, impl)
    loss: Tensor = run(hidden, weight, bias, labels, label_smoothing, ignore_index, reduction)
    return loss


@backends.register("triton", _triton.why_not)
def _triton_backend(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    from blipfast.kernels.linear_cross_entropy import losses

    rows: Tensor = losses(hidden, weight, bias, labels, label_smoothing, ignore_index)
    if reduction == "none":
        return rows
    count = (labels != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1
    return rows.sum() / count


@backends.register("torch")
def _torch_backend(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    arguments = (hidden, weight, bias, labels, label_smoothing, ignore_index)
    if len(labels) * len(weight) <= logits_at_a_time(hidden):
        return _one_piece(*arguments, reduction)
    if reduction == "none":
        rows: Tensor = torch.ops.blipfast.linear_cross_entropy_rows(*arguments)
        return rows
    grad_on = torch.is_grad_enabled()
    needs = [grad_on and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    run = torch.ops.blipfast.linear_cross_entropy
    loss: Tensor = run(*arguments, reduction == "mean", *needs)[0]
    return loss


@backends.register("reference")
def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The formula on whole logits `(T, V)` in plain PyTorch."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    log_p = torch.log_softmax(F.linear(hidden, weight, bias).to(dtype), dim=1)
    valid = labels != ignore_index
    own = log_p.gather(1, labels.where(valid, 0).unsqueeze(1)).squeeze(1)
    loss = -(1 - label_smoothing) * own - label_smoothing * log_p.mean(1)
    loss = loss.where(valid, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / (valid.sum().clamp(min=1) if reduction == "mean" else 1)


# The same kernel on a CPU, for tests; last, so that `auto` never takes it.
backends.register("triton_interpreter", _triton.why_not_interpreter)(_triton_backend)


def _one_piece(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    chosen, total = None, len(labels)
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        chosen = (labels != ignore_index).nonzero().squeeze(1)
        labels = labels[chosen]
        hidden = hidden if len(chosen) == total else hidden.index_select(0, chosen)
        check_labels(labels, len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear(hidden, weight, bias).to(dtype)
        loss = F.cross_entropy(
            logits,
            labels,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none" if reduction == "none" else "sum",
        )
    if reduction == "mean":
        loss = loss / (labels != ignore_index).sum().clamp(min=1)
    elif reduction == "none" and chosen is not None:
        loss = loss.new_zeros(total).index_copy(0, chosen, loss)
    return loss


@torch.library.custom_op(
    "blipfast::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float label_smoothing,"
    " int ignore_index, bool mean, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _reduced(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    mean: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss `()` and its gradients where needed (else empty): hidden, weight, bias."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    factor = torch.ones((), dtype=dtype, device=hidden.device)
    if mean:
        factor = (labels != ignore_index).sum().clamp(min=1).to(dtype).reciprocal()
    needs = (need_hidden, need_weight, need_bias)
    scale = factor.expand(len(labels)) if any(needs) else None
    rows, *gradients = by_pieces(
        hidden, weight, bias, labels, label_smoothing, ignore_index, scale, needs
    )
    return rows.sum() * factor, gradients[0], gradients[1], gradients[2]


@_reduced.register_fake
def _(hidden, weight, bias, labels, smoothing, ignore, mean, *options):  # type: ignore[no-untyped-def]
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    inputs = (hidden, weight, hidden if bias is None else bias)
    shapes = [t.shape if need else (0,) for t, need in zip(inputs, options[:3], strict=True)]
    return loss, *(t.new_empty(shape) for t, shape in zip(inputs, shapes, strict=True))


@torch.library.custom_op("blipfast::scale_gradients", mutates_args=())
def _scale(gradients: list[Tensor], factor: Tensor) -> list[Tensor]:
    """A node of its own, so that asking for a second derivative raises."""
    return [gradient * factor.to(gradient.dtype) for gradient in gradients]


@_scale.register_fake
def _(gradients, factor):  # type: ignore[no-untyped-def]
    return [torch.empty_like(gradient) for gradient in gradients]


def _reduced_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[7:10]
    ctx.save_for_backward(*(g for g, need in zip(output[1:], ctx.needs, strict=True) if need))


def _reduced_backward(ctx: Any, grad: Tensor, *_unused: Tensor) -> tuple[Any, ...]:
    scaled = list(ctx.saved_tensors)
    # On a CPU looking at the factor is free, and the usual 1 saves a copy of the weight's gradient.
    plain = type(grad) is Tensor and grad.device.type == "cpu" and not torch.is_grad_enabled()
    if not (plain and grad.item() == 1):
        scaled = torch.ops.blipfast.scale_gradients(scaled, grad)
    remaining = iter(scaled)
    gradients = [next(remaining) if need else None for need in ctx.needs]
    return *gradients, *[None] * 7


_reduced.register_autograd(_reduced_backward, setup_context=_reduced_setup)


@torch.library.custom_op(
    "blipfast::linear_cross_entropy_rows",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float label_smoothing,"
    " int ignore_index) -> Tensor",
)
def _rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """Losses `(T,)`."""
    arguments = (hidden, weight, bias, labels, label_smoothing, ignore_index)
    return by_pieces(*arguments, None, (False, False, False))[0]


@_rows.register_fake
def _(hidden, weight, bias, labels, smoothing, ignore):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(hidden.shape[0], dtype=dtype)


@torch.library.custom_op(
    "blipfast::linear_cross_entropy_rows_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels,"
    " float label_smoothing, int ignore_index, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
)
def _rows_gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (need_hidden, need_weight, need_bias)
    arguments = (hidden, weight, bias, labels, label_smoothing, ignore_index)
    return by_pieces(*arguments, grad, needs)[1:]


@_rows_gradients.register_fake
def _(grad, hidden, weight, bias, labels, smoothing, ignore, *options):  # type: ignore[no-untyped-def]
    inputs = (hidden, weight, hidden if bias is None else bias)
    shapes = [t.shape if need else (0,) for t, need in zip(inputs, options[:3], strict=True)]
    return tuple(t.new_empty(shape) for t, shape in zip(inputs, shapes, strict=True))


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.blipfast.linear_cross_entropy_rows_backward(
        grad, *ctx.saved_tensors, *ctx.options, *needs
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 3


_rows.register_autograd(_rows_backward, setup_context=_rows_setup)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    reduction: str,
) -> None:
    name = "linear_cross_entropy"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"{name}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (T, D) "
            "and (V, D)"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ShapeError(
            f"{name}: labels must be int64 ({len(hidden)},), not {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"{name}: bias is {tuple(bias.shape)} for {len(weight)} rows of weight")
    for label, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ShapeError(f"{name}: {label} is {tensor.dtype}, hidden {hidden.dtype}")
    for label, tensor in (("weight", weight), ("bias", bias), ("labels", labels)):
        if tensor is not None and tensor.device != hidden.device:
            raise ShapeError(f"{name}: {label} is on {tensor.device}, hidden on {hidden.device}")
    if not 0 <= label_smoothing <= 1:
        raise ShapeError(f"{name}: label_smoothing={label_smoothing} must be in 0 ... 1")
    if reduction not in ("mean", "sum", "none"):
        raise ShapeError(f"{name}: reduction={reduction!r} must be 'mean', 'sum' or 'none'")

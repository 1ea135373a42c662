"""Contrastive softmax with soft targets over many keys (BLIP section 3.2, ITC; ALBEF eq. 6).

For query features `q_i`, keys `k_j`, temperature `T` and, when given, a teacher's features `q'_i`:

    s_ij   = q_i . k_j / T
    t_ij   = alpha * softmax_j(q'_i . k_j / T) + (1 - alpha) * y_ij
    loss_i = - sum_j t_ij * log softmax_j(s_ij)

What makes it cheap: with `p = softmax(s)`, the mean keys `E_p[k]` and `E_t[k]` (attention outputs
whose values are the keys), and since the targets of a row sum to one,

    loss_i          = logsumexp_j(s_ij) - q_i . E_t[k] / T
    d loss_i / d q_i = (E_p[k] - E_t[k]) / T
    d loss_i / d T   = - q_i . (d loss_i / d q_i) / T

so one pass over the keys with an online softmax gives the loss and the gradients of queries and
temperature. No `(B, N)` matrix exists, and the keys are read again only when they need a gradient.

Shapes: `B` queries, `N` keys, `D` width, `R` rows of a pass (`B`, or `2B` with a teacher).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.ops import _native, _triton
from blipfast.ops._contrastive_stream import (
    accumulator,
    key_gradients,
    key_range,
    key_weights,
    loss_and_means,
    mean_of_equal_ids,
    online_softmax,
    query_gradients,
    scaled_rows,
)
from blipfast.ops._dispatch import Backends
from blipfast.ops._products import mkl_lacks_avx512

Positives = int | tuple[Tensor, Tensor | Sequence[Tensor]] | None

backends = Backends("contrastive_softmax")


def contrastive_softmax(
    query: Tensor,
    keys: Tensor | Sequence[Tensor],
    temperature: Tensor,
    *,
    teacher_query: Tensor | None = None,
    alpha: float | Tensor = 0.0,
    positives: Positives = None,
    impl: str = "auto",
) -> Tensor:
    """Per-row contrastive loss against soft targets; the formula heads this module.

    Args:
        query: `(B, D)` float features, usually of unit length.
        keys: `(N, D)`, or a sequence of blocks `(N_b, D)` that count as their concatenation (batch
            features and queue) without being copied together. A block without `requires_grad` is
            not kept for the backward pass, so a queue may be written to right after the loss.
        temperature: one element. It is used as it is: zero, NaN or infinity gives a NaN loss in
            every row (no error, which would need to wait for the device). Clamp it beforehand.
        teacher_query: `(B, D)` features whose similarities to the same keys, at the same
            temperature, are the soft targets. Never receives a gradient.
        alpha: weight of the soft targets; has no effect without `teacher_query`.
        positives: None: key `i` is the positive of row `i`. An int: key `positives + i` is.
            `(query_ids, key_ids)` of shapes `(B,)` and `(N,)`: all keys with the row's id share the
            weight equally; a row without any such key keeps only its soft targets.
        impl: backend name or "auto".

    Returns:
        `(B,)` losses, float32 (float64 for float64 input), accumulated in that precision. Gradients
        reach query, temperature and the key blocks that require one; there is no second derivative.

    Raises:
        ShapeError: widths, lengths or devices do not fit, there is no key, or a positive lies
            outside the keys.
        BackendError: `impl` names a backend that cannot run.
    """
    blocks = [keys] if isinstance(keys, Tensor) else list(keys)
    query_ids, key_ids, offset = _split_positives(positives)
    _check(query, blocks, temperature, teacher_query, query_ids, key_ids, offset)
    if teacher_query is not None:
        # A Python zero says beforehand that nobody will look at the teacher's similarities.
        teacher_query = None if _is_zero(alpha) else teacher_query.detach()
    dtype = accumulator(query)
    if isinstance(alpha, Tensor):
        weight = alpha.detach().to(query.device, dtype)
    else:  # a fill, where a copy from the host would wait for the device
        weight = torch.full((), alpha, dtype=dtype, device=query.device)
    run = backends(query, impl)
    loss: Tensor = run(
        query, blocks, temperature.reshape(()), teacher_query, weight, query_ids, key_ids, offset
    )
    return loss


def contrastive_softmax_reference(
    query: Tensor,
    keys: Tensor | Sequence[Tensor],
    temperature: Tensor,
    *,
    teacher_query: Tensor | None = None,
    alpha: float | Tensor = 0.0,
    positives: Positives = None,
) -> Tensor:
    """`contrastive_softmax` written out from its formula with whole `(B, N)` matrices."""
    query_ids, key_ids, offset = _split_positives(positives)
    all_keys = keys if isinstance(keys, Tensor) else torch.cat(list(keys))
    dtype = accumulator(query)
    all_keys = all_keys.to(dtype)
    log_p = torch.log_softmax(query.to(dtype) @ all_keys.T / temperature, dim=1)
    targets = torch.zeros_like(log_p)
    if query_ids is None or key_ids is None:
        targets.diagonal(offset).fill_(1.0)
    else:
        same = (query_ids[:, None] == key_ids[None, :]).to(dtype)
        targets = same / same.sum(1, keepdim=True).clamp(min=1)
    if teacher_query is not None:
        with torch.no_grad():
            soft = torch.softmax(teacher_query.to(dtype) @ all_keys.T / temperature, dim=1)
            targets = alpha * soft + (1 - alpha) * targets
    return -(targets * log_p).sum(1)


def _engine(name: str) -> Callable[..., Tensor]:
    """The backend that streams over the keys by `name`: "native", "triton" or "torch"."""

    def run(query: Tensor, keys: list[Tensor], *arguments: Any) -> Tensor:
        loss: Tensor = torch.ops.blipfast.contrastive_softmax(query, keys, *arguments, name)[0]
        return loss

    return run


def _kernels() -> ModuleType:
    from blipfast.kernels import contrastive as kernels

    return kernels


_features_that_fit = partial(_triton.no_wider, 256, "features", "columns")


def _slower_triton(query: Tensor) -> str | None:
    """An H100, 180 rows and 57,690 keys: the kernel 1.8 ms in float32, the library 0.5."""
    if query.dtype == torch.float32:
        return "in float32 the kernel's three products of TF32 are slower than the library's one"
    return None


backends.register("triton", _features_that_fit(_triton.why_not), _slower_triton)(_engine("triton"))


def _slower_native(query: Tensor) -> str | None:
    if query.dim() and query.shape[-1] % 32 and mkl_lacks_avx512():
        return "features of this width go through MKL in C++, and oneDNN is faster here"
    return None


backends.register("native", _native.why_not, _slower_native)(_engine("native"))
backends.register("torch")(_engine("torch"))


@backends.register("reference")
def _reference_backend(
    query: Tensor,
    keys: list[Tensor],
    temperature: Tensor,
    teacher_query: Tensor | None,
    alpha: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    offset: int,
) -> Tensor:
    ids = None if query_ids is None or key_ids is None else (query_ids, key_ids)
    return contrastive_softmax_reference(
        query,
        keys,
        temperature,
        teacher_query=teacher_query,
        alpha=alpha,
        positives=offset if ids is None else ids,
    )


# The same kernels on a CPU, for tests; last, so that `auto` never takes them.
backends.register("triton_interpreter", _features_that_fit(_triton.why_not_interpreter))(
    _engine("triton")
)


@torch.library.custom_op(
    "blipfast::contrastive_softmax",
    mutates_args=(),
    schema="(Tensor query, Tensor[] keys, Tensor temperature, Tensor? teacher_query, Tensor alpha,"
    " Tensor? query_ids, Tensor? key_ids, int offset, str engine)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    query: Tensor,
    keys: Sequence[Tensor],
    temperature: Tensor,
    teacher_query: Tensor | None,
    alpha: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    offset: int,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss `(B,)`, log-sum-exps `(R,)`, mean keys under p and under the targets, both `(B, D)`."""
    with torch.autocast(query.device.type, enabled=False):
        size, mass = query.shape[0], None
        if query_ids is None or key_ids is None:
            own = key_range(keys, offset, size)
        else:
            own, mass = mean_of_equal_ids(keys, query_ids, key_ids, accumulator(query))
        if engine == "native":
            lse, means = _native.native_online_softmax(
                query, teacher_query, temperature, keys, own_float32=mkl_lacks_avx512()
            )
        elif engine == "triton":
            lse, means = _kernels().softmax_mean(query, teacher_query, temperature, keys)
        else:
            lse, means = online_softmax(scaled_rows(query, teacher_query, temperature), keys)
        weight = None if teacher_query is None else alpha
        of_means = _kernels().loss_and_means if engine == "triton" else loss_and_means
        loss, *goal = of_means(query, temperature, lse, means, own, mass, weight)
        return loss, lse, *goal


@_forward.register_fake
def _(query, keys, temperature, teacher_query, alpha, query_ids, key_ids, offset, engine):  # type: ignore[no-untyped-def]
    dtype = accumulator(query)
    size, width = query.shape
    rows = size if teacher_query is None else 2 * size
    means = [query.new_empty((size, width), dtype=dtype) for _ in range(2)]
    return query.new_empty(size, dtype=dtype), query.new_empty(rows, dtype=dtype), *means


@torch.library.custom_op(
    "blipfast::contrastive_softmax_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor[] keys, Tensor temperature, Tensor? teacher_query,"
    " Tensor alpha, Tensor? query_ids, Tensor? key_ids, int offset, Tensor lse,"
    " Tensor mean_student, Tensor mean_target, str engine) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    query: Tensor,
    keys: Sequence[Tensor],
    temperature: Tensor,
    teacher_query: Tensor | None,
    alpha: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    offset: int,
    lse: Tensor,
    mean_student: Tensor,
    mean_target: Tensor,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query `(B, D)`, temperature `()` and of the keys `(N, D)`, if any are given."""
    with torch.autocast(query.device.type, enabled=False):
        grad = grad.to(mean_student.dtype)
        of_queries = _kernels().query_gradients if engine == "triton" else query_gradients
        d_query, d_temperature = of_queries(grad, query, temperature, mean_student, mean_target)
        grad = grad.unsqueeze(1)
        d_keys = query.new_empty((sum(len(k) for k in keys), query.shape[1]), dtype=query.dtype)
        if keys and engine == "triton":
            weights = key_weights(grad, teacher_query is not None, alpha, query_ids, key_ids)
            d_keys = _kernels().key_gradients(
                *(query, teacher_query, temperature, keys, lse, weights),
                *(query_ids, key_ids, offset),
            )
        elif keys:
            rows = scaled_rows(query, teacher_query, temperature)
            key_gradients(d_keys, grad, rows, keys, alpha, query_ids, key_ids, offset, lse)
        return d_query.to(query.dtype), d_temperature.to(temperature.dtype), d_keys


@_backward.register_fake
def _(grad, query, keys, temperature, *_args):  # type: ignore[no-untyped-def]
    d_keys = query.new_empty((sum(len(k) for k in keys), query.shape[1]))
    return torch.empty_like(query), torch.empty_like(temperature), d_keys


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, keys, temperature, teacher_query, alpha, query_ids, key_ids, offset, engine = inputs
    _, lse, mean_student, mean_target = output
    ctx.with_keys = any(key.requires_grad for key in keys)
    ctx.blocks, ctx.offset, ctx.engine = len(keys), offset, engine
    kept = list(keys) if ctx.with_keys else []
    ctx.save_for_backward(
        query,
        temperature,
        teacher_query,
        alpha,
        query_ids,
        key_ids,
        lse,
        mean_student,
        mean_target,
        *kept,
    )


def _autograd(ctx: Any, grad: Tensor, *_unused: Tensor) -> tuple[Any, ...]:
    query, temperature, teacher, alpha, query_ids, key_ids, *rest = ctx.saved_tensors
    stats, keys = rest[:3], rest[3:]
    arguments = (query, keys, temperature, teacher, alpha, query_ids, key_ids, ctx.offset, *stats)
    d_query, d_temperature, d_keys = torch.ops.blipfast.contrastive_softmax_backward(
        grad, *arguments, ctx.engine
    )
    d_blocks: list[Tensor | None] = [None] * ctx.blocks
    if ctx.with_keys:
        parts = d_keys.split([len(key) for key in keys])
        pairs = zip(parts, keys, strict=True)
        d_blocks = [part.to(k.dtype) if k.requires_grad else None for part, k in pairs]
    return d_query, d_blocks, d_temperature, None, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _is_zero(alpha: float | Tensor) -> bool:
    return not isinstance(alpha, Tensor) and alpha == 0


def _split_positives(positives: Positives) -> tuple[Tensor | None, Tensor | None, int]:
    if positives is None or isinstance(positives, int):
        return None, None, positives or 0
    query_ids, key_ids = positives
    if not isinstance(key_ids, Tensor):
        key_ids = torch.cat(list(key_ids))
    return query_ids, key_ids, 0


def _check(
    query: Tensor,
    keys: list[Tensor],
    temperature: Tensor,
    teacher_query: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    offset: int,
) -> None:
    name = "contrastive_softmax"
    if query.ndim != 2 or not query.is_floating_point():
        raise ShapeError(f"{name}: query must be float (B, D), not {_describe(query)}")
    total = 0
    for index, block in enumerate(keys):
        if block.ndim != 2 or block.shape[1] != query.shape[1]:
            raise ShapeError(
                f"{name}: keys[{index}] is {_describe(block)}; give (N, {query.shape[1]}), the "
                "width of query"
            )
        if block.device != query.device:
            raise ShapeError(f"{name}: query is on {query.device}, keys on {block.device}")
        total += block.shape[0]
    if total == 0:
        raise ShapeError(f"{name}: there are no keys")
    if temperature.numel() != 1:
        raise ShapeError(f"{name}: temperature must have one element, not {_describe(temperature)}")
    if teacher_query is not None and teacher_query.shape != query.shape:
        raise ShapeError(
            f"{name}: teacher_query is {_describe(teacher_query)}, query {_describe(query)}"
        )
    if query_ids is None or key_ids is None:
        if offset < 0 or offset + query.shape[0] > total:
            raise ShapeError(
                f"{name}: the positives are keys {offset} to {offset + query.shape[0] - 1}, but "
                f"there are {total} keys"
            )
    elif query_ids.shape != query.shape[:1] or key_ids.shape != (total,):
        raise ShapeError(
            f"{name}: positives have {query_ids.numel()} query ids and {key_ids.numel()} key ids "
            f"for {query.shape[0]} queries and {total} keys"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

"""What `aot.py` compiles: every launcher at BLIP's shapes, on tensors without storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from blipfast.kernels import _runtime


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _cross_attention_cases(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    from blipfast.kernels.cross_attention import run_backward, run_forward

    dims = (64,) if quick else (32, 64, 128)
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32)
    rows = ((56, False), (900, True)) if quick else ((3, False), (20, False), (56, True), (900, 0))
    for dim in dims:
        for dtype in dtypes:
            if dtype == torch.float16 and dim != 64:
                continue  # as bfloat16
            for max_rows, dropout in rows:
                q = _empty(90 * max_rows, 12, dim, dtype=dtype)
                k = _empty(90, 197, 12, dim, dtype=dtype).transpose(1, 2)
                order = _empty(len(q), dtype=torch.int64)
                index: list[Any] = [_empty(91, dtype=torch.int32), order, None]
                index += [_empty(1, dtype=torch.int64) if dropout else None, max_rows]
                index += [0.1 if dropout else 0.0]
                lse = _empty(12, len(q), dtype=torch.float32)
                case = f"cross_attention {_runtime.short(dtype)} d={dim} rows={max_rows}"
                case += " dropout" * bool(dropout)

                def run(q: Any = q, k: Any = k, lse: Any = lse, index: Any = index) -> None:
                    run_forward(q, k, k, *index)
                    run_backward(q, q, k, k, q, lse, *index)

                yield case, run


def _rows_on_the_device_cases(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Cross-attention where the host knows only how many rows there are together."""
    from blipfast.kernels.cross_attention import run_backward, run_forward

    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        for dropout_p in (0.0, 0.1):
            q = _empty(6_336, 12, 64, dtype=dtype)
            k = _empty(90, 197, 12, 64, dtype=dtype).transpose(1, 2)
            seed = _empty(1, dtype=torch.int64) if dropout_p else None
            index: list[Any] = [_empty(91, dtype=torch.int32), _empty(len(q), dtype=torch.int64)]
            index += [None, seed, len(q), dropout_p]
            lse = _empty(12, len(q), dtype=torch.float32)
            case = f"cross_attention {_runtime.short(dtype)} rows on the device"

            def run(q: Any = q, k: Any = k, lse: Any = lse, index: Any = index) -> None:
                run_forward(q, k, k, *index)
                run_backward(q, q, k, k, q, lse, *index)

            yield case + " dropout" * bool(dropout_p), run


def _varlen_attention_cases(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    from blipfast.kernels.varlen_attention import run_backward, run_forward

    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32)
    for dim in (64,) if quick else (32, 64, 128):
        for dtype in dtypes:
            if dtype == torch.float16 and dim != 64:
                continue  # as bfloat16
            usual = quick or dim != 64 or dtype == torch.float16
            for longest, causal in product((30,) if usual else (10, 30, 60, 200), (False, True)):
                qkv = _empty(1_208, 3, 12, dim, dtype=dtype)
                out, lse = qkv[:, 0], _empty(12, len(qkv), dtype=torch.float32)
                dropout_p = 0.1 if longest > 10 else 0.0
                index: list[Any] = [_empty(91, dtype=torch.int32)]
                index += [_empty(1, dtype=torch.int64) if dropout_p else None]
                index += [longest, causal, dropout_p]
                case = f"varlen_attention {_runtime.short(dtype)} d={dim} longest={longest}"
                case += " causal" * causal + " dropout" * bool(dropout_p)

                def run(qkv: Any = qkv, out: Any = out, lse: Any = lse, index: Any = index) -> None:
                    run_forward(qkv, *index)
                    run_backward(out, qkv, out, lse, *index)

                yield case, run


def _hard_negative_cases(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    from blipfast.kernels.hard_negatives import run_sample

    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        for ids in (True,) if quick else (False, True):
            q, k = _empty(90, 256, dtype=dtype), _empty(720, 256, dtype=dtype)
            query_ids, key_ids = (_empty(n, dtype=torch.int64) if ids else None for n in (90, 720))
            numbers = (1e-4, 0, 2**40, 5, 1, 0, 0, 1)

            inputs = (q, k, _empty(), query_ids, key_ids, *numbers)
            for counter in (None, _empty(dtype=torch.int64)):

                def run(arguments: Any = (*inputs, counter)) -> None:
                    run_sample(*arguments)

                case = f"hard_negatives {_runtime.short(dtype)}" + " ids" * ids
                yield case + " counter" * (counter is not None), run


def _contrastive_cases(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    from blipfast.kernels.contrastive import (
        key_gradients,
        loss_and_means,
        query_gradients,
        softmax_mean,
    )

    sizes = ((90, 57690, 256),) if quick else ((90, 57690, 256), (1, 1, 64))
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        for rows, num_keys, width in sizes:
            q, k = _empty(rows, width, dtype=dtype), _empty(num_keys, width, dtype=dtype)
            per_row = _empty(rows, dtype=torch.float32)
            ids = [_empty(n, dtype=torch.int64) for n in (rows, num_keys)]
            lse = _empty(2 * rows, dtype=torch.float32)

            def run(q: Any = q, k: Any = k, weight: Any = per_row, lse: Any = lse) -> None:
                t = _empty(dtype=torch.float32)
                _, means = softmax_mean(q, q, t, [k])
                _, *means_of_rows = loss_and_means(q, t, lse, means, q, None, t)
                query_gradients(weight, q, t, *means_of_rows)
                key_gradients(q, q, t, [k], lse, (weight,) * 3, None, None, 0)

            def with_ids(
                q: Any = q, k: Any = k, weight: Any = per_row, lse: Any = lse, ids: Any = ids
            ) -> None:
                t, means = _empty(dtype=torch.float32), _empty(*q.shape, dtype=torch.float32)
                loss_and_means(q, t, lse, means, means, weight[:, None], None)
                key_gradients(q, None, t, [k], lse, (weight,) * 3, *ids, 0)

            yield f"contrastive {_runtime.short(dtype)} B={rows} d={width}", run
            yield f"contrastive {_runtime.short(dtype)} B={rows} d={width} ids", with_ids


def _linear_cross_entropy_cases(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    from blipfast.kernels.linear_cross_entropy import run_backward, run_forward

    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        weight = _empty(30_524, 768, dtype=dtype)
        for tokens in (98, 3_000):  # the forward takes the vocabulary in one piece, and in several
            hidden, labels = _empty(tokens, 768, dtype=dtype), _empty(tokens, dtype=torch.int64)
            arguments = (hidden, weight, weight[:, 0], labels)
            lse = _empty(tokens, dtype=torch.float32)

            def run(arguments: Any = arguments, lse: Any = lse) -> None:
                run_forward(*arguments, 0.1, -100)
                run_backward(lse, *arguments, lse, 0.1, -100, [True, True, True])

            yield f"linear_cross_entropy {_runtime.short(dtype)} {tokens} tokens", run


def _add_layer_norm_cases(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    from blipfast.kernels.add_layer_norm import run_backward, run_forward

    full, low = torch.float32, torch.bfloat16
    # Of residual, branch and weights: autocast's ViT, its texts, bf16 or float32 throughout.
    mixtures: list[tuple[Any, ...]] = [(low, low, full, 0.0), (full, low, full, 0.1)]
    if not quick:
        mixtures += [(low, None, full, 0.0), (full, None, full, 0.0), (full, full, full, 0.0)]
        mixtures += [(low, low, low, 0.1), (torch.float16, torch.float16, full, 0.1)]
    for width in (768,) if quick else (768, 2048, 4096):
        for residual, branch, weights, dropout_p in mixtures:
            x = _empty(4_870, width, dtype=residual)
            added = None if branch is None else _empty(*x.shape, dtype=branch)
            h = x if added is None else x + added
            weight, moments = _empty(width, dtype=weights), _empty(2, len(x), dtype=full)
            seed = _empty(1, dtype=torch.int64) if dropout_p else None
            forward = (x, added, weight, weight, seed, 1e-12, dropout_p)
            backward = (weight, seed, moments, residual, branch, dropout_p)
            of_branch = "" if branch is None else f" + {_runtime.short(branch)}"
            case = f"add_layer_norm {_runtime.short(residual)}{of_branch} d={width}"

            def run(forward: Any = forward, h: Any = h, backward: Any = backward) -> None:
                run_forward(*forward)
                run_backward(h, h, h, *backward)
                run_backward(None, h, h, *backward)

            yield case + " dropout" * bool(dropout_p), run


def _bias_gelu_cases(quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    from blipfast.kernels.bias_gelu import bias_gelu_out, gelu_backward_

    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        x = _empty(17_730, 3072, dtype=dtype)

        def run(x: Any = x) -> None:
            bias_gelu_out(x, x[0], x)
            gelu_backward_(x, x, x[0])

        yield f"bias_gelu {_runtime.short(dtype)}", run


CASES = [
    _cross_attention_cases,
    _rows_on_the_device_cases,
    _varlen_attention_cases,
    _hard_negative_cases,
    _contrastive_cases,
    _linear_cross_entropy_cases,
    _add_layer_norm_cases,
    _bias_gelu_cases,
]

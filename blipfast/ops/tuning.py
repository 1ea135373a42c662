"""Measures which tiles the kernels should run with on the card at hand (`blipfast tune`).

Each operator runs forward and backward at BLIP's shapes with every candidate of each kernel that it
launches; what is faster than the first by more than the noise goes into the card's table
(`blipfast.kernels.tiles`), which launchers read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.errors import BackendError
from blipfast.ops import _triton
from blipfast.ops.attention import CrossPlan, cross_attention
from blipfast.ops.contrastive import contrastive_softmax
from blipfast.ops.hard_negatives import sample_hard_negatives
from blipfast.ops.layer_norm import add_layer_norm
from blipfast.ops.linear_ce import linear_cross_entropy
from blipfast.ops.linear_layers import feed_forward
from blipfast.ops.packing import Packing

Run = Callable[[], Any]
_NOISE = 0.02  # another candidate must be faster by more than this share


@dataclass(frozen=True)
class Tuned:
    """What was measured of one kernel at one key: seconds of each candidate, and the chosen one."""

    kernel: str
    key: str
    candidates: tuple[Mapping[str, int], ...]
    seconds: tuple[float, ...]

    @property
    def chosen(self) -> Mapping[str, int]:
        best = min(range(len(self.seconds)), key=self.seconds.__getitem__)
        if self.seconds[best] > (1 - _NOISE) * self.seconds[0]:
            best = 0
        return self.candidates[best]


def tune(
    device: torch.device, dtypes: Sequence[torch.dtype], *, small: bool = False
) -> Iterator[Tuned]:
    """Measures kernel by kernel. small: tiny shapes, for the interpreter.

    Raises BackendError when the kernels cannot run on `device`.
    """
    for dtype in dtypes:
        probe = torch.empty(0, device=device, dtype=dtype)
        impl = "triton"
        if _triton.why_not(probe) is not None:
            impl, reason = "triton_interpreter", _triton.why_not_interpreter(probe)
            if reason is not None:
                raise BackendError(f"nothing to tune: {_triton.why_not(probe)}; {reason}")
        from blipfast.kernels import tiles

        done: set[tuple[str, str]] = set()
        for run in jobs(device, dtype, impl, small):
            with tiles.observed() as found:
                run()
            for request, candidates in found.items():
                if request in done or len(candidates) == 1:
                    continue
                done.add(request)
                seconds = []
                for candidate in candidates:
                    with tiles.forced(request, candidate):
                        seconds.append(_seconds(run, device))
                kernel, key = request
                yield Tuned(kernel, key, tuple(candidates), tuple(seconds))


def write(device: torch.device, found: Sequence[Tuned]) -> Path:
    """Writes what was chosen into the device's table. Raises BackendError where there is none."""
    from blipfast.kernels import tiles

    about = {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "seconds": {f"{one.kernel}, {one.key}": list(one.seconds) for one in found},
    }
    try:
        return tiles.write(device, about, {(one.kernel, one.key): one.chosen for one in found})
    except ValueError as error:
        raise BackendError(str(error)) from error


def jobs(device: torch.device, dtype: torch.dtype, impl: str, small: bool) -> Iterator[Run]:
    """The operators whose kernels have tiles, forward and backward, at the shapes that matter."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    # Texts, images, keys: re-ranking, a batch of pre-training, beams.
    looks = [(256, 1, 577), (360, 90, 197), (270, 90, 577)] if not small else [(3, 2, 9)]
    heads, dim = (1, 32) if small else (12, 64)
    for texts, images, keys in looks:
        packing = Packing.from_lengths([10 + i % 8 for i in range(texts)], device)
        plan = CrossPlan.build(packing, [i * images // texts for i in range(texts)], images)
        inputs = [randn(packing.total, heads, dim)]
        inputs += [randn(images, heads, keys, dim) for _ in range(2)]
        for dropout_p in (0.0, 0.1):
            yield _both(
                lambda q, k, v, plan=plan, p=dropout_p: cross_attention(
                    q, k, v, plan, dropout_p=p, impl=impl
                ),
                inputs,
            )
    batch, queue, width = (4, 40, 16) if small else (90, 57_690, 256)
    unit = [F.normalize(randn(n, width).float(), dim=-1).to(dtype) for n in (batch, queue)]
    temperature = torch.tensor(0.07, device=device)
    yield _both(lambda q, k: contrastive_softmax(q, k, temperature, impl=impl), [unit[0], unit[1]])
    yield lambda: sample_hard_negatives(unit[0], unit[0], temperature, eps=1e-4, impl=impl)
    tokens, vocabulary, width = (5, 70, 16) if small else (1_125, 30_524, 768)
    labels = torch.arange(tokens, device=device) % vocabulary
    yield _both(
        lambda x, w, b: linear_cross_entropy(x, w, b, labels, label_smoothing=0.1, impl=impl),
        [randn(tokens, width), randn(vocabulary, width), randn(vocabulary)],
    )
    # Images without dropout, texts with it.
    for rows, dropout_p in ((90 * 197, 0.0), (4_870, 0.1)) if not small else ((5, 0.0), (5, 0.1)):
        yield _both(
            lambda x, y, w, b, p=dropout_p: torch.stack(
                add_layer_norm(x, y, w, b, dropout_p=p, impl=impl)
            ),
            [randn(rows, width), randn(rows, width), randn(width), randn(width)],
        )
    if impl == "triton":  # bias and GELU are no operator by themselves, which tests could name
        first, second = (nn.Linear(*n) for n in ((width, 4 * width), (4 * width, width)))
        layers = [layer.to(device, dtype) for layer in (first, second)]
        yield _both(lambda x: feed_forward(x, *layers), [randn(90 * 197, width)])


def _both(outputs: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Run:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(outputs(*leaves).sum(), leaves)


def _seconds(run: Run, device: torch.device) -> float:
    """Median on a card, the least of three elsewhere; infinite where tiles do not fit the card."""
    from triton.runtime.errors import OutOfResources

    try:
        if device.type == "cuda":
            from triton.testing import do_bench

            return 1e-3 * float(do_bench(run, return_mode="median"))
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)
    except OutOfResources:
        return math.inf

"""Dropout whose backward draws the mask again: no mask in memory, and on a CPU a tenth of the time.

On a CPU with the native operators the draws are Philox's of one seed, which PyTorch's generator
gives for each call; elsewhere it is PyTorch's dropout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from blipfast.ops import _native
from blipfast.ops._dispatch import Backends

backends = Backends("dropout")


def new_seed(device: torch.device) -> Tensor:
    """`(1,)` int64 from the device's generator, for a kernel that draws by itself."""
    return torch.randint(2**62, (1,), device=device)


def dropout(x: Tensor, p: float, training: bool = True, *, impl: str = "auto") -> Tensor:
    """`F.dropout`: elements are zero with probability `p` (on a CPU to the next 65,536th), the
    others scaled up so that the mean stays. To be differentiated once."""
    if not training or p == 0.0:
        return x
    if torch.compiler.is_compiling() or not 0.0 < p < 1.0:
        return F.dropout(x, p)
    return backends(x, impl)(x, p)


@backends.register("native", _native.why_not)
def _dropout_native(x: Tensor, p: float) -> Tensor:
    return _Dropout.apply(x, p, int(torch.randint(2**62, ())))


backends.register("torch")(F.dropout)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return torch.ops.blipfast_native.dropout(x.contiguous(), p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.blipfast_native.dropout(grad.contiguous(), ctx.p, ctx.seed), None, None

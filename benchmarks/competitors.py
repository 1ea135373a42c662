"""Other code for the same job, where it is installed and runs: torch.compile, Liger-Kernel,
cut-cross-entropy, inf-cl, NVIDIA's apex.

Each function gives what can run in a setting, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from blipfast.ops import _triton

Loss = Callable[[], Tensor]
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]  # of rows, by weight and bias
T = TypeVar("T")


def compiled(run: Callable[[], T], small: bool) -> dict[str, Callable[[], T]]:
    """A baseline through torch.compile; not at the interpreter's sizes, where compiling is all."""
    if small:
        return {}
    return {"compiled": torch.compile(run, dynamic=False)}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, smoothing: float
) -> dict[str, Loss]:
    found: dict[str, Loss] = {}
    if find_spec("liger_kernel") and _runs_triton(hidden):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger: Any = LigerFusedLinearCrossEntropyLoss(label_smoothing=smoothing)
        found["liger-kernel"] = lambda: liger(weight, hidden, labels, bias)
    if find_spec("cut_cross_entropy") and bias is None and smoothing == 0.0:
        from cut_cross_entropy import linear_cross_entropy as cut

        # Its own kernel is for GPUs; elsewhere it brings the formula, compiled.
        impl = "cce" if hidden.is_cuda else "torch_compile"
        found["cut-cross-entropy"] = lambda: cut(hidden, weight, labels, impl=impl)
    return found


def layer_norms(x: Tensor) -> dict[str, Norm]:
    """For rows like x on a GPU: Liger-Kernel's does not run in Triton's interpreter."""
    found: dict[str, Norm] = {}
    if not x.is_cuda:
        return found
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_layer_norm

        found["liger-kernel"] = lambda x, weight, bias: liger_layer_norm(x, weight, bias, 1e-5)
    if find_spec("apex") and find_spec("apex.normalization"):
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        found["apex"] = lambda x, weight, bias: fused_layer_norm_affine(
            x, weight, bias, x.shape[-1:], 1e-5
        )
    return found


def in_batch_contrast(query: Tensor, key: Tensor, temperature: Tensor) -> dict[str, Loss]:
    """Losses by row of CLIP's softmax in one direction. inf-cl takes tensors on a GPU alone."""
    if not find_spec("inf_cl") or not query.is_cuda:
        return {}
    from inf_cl import cal_flash_loss

    width = query.shape[1]
    return {
        "inf-cl": lambda: cal_flash_loss(query, key, scale=1 / temperature, head_dim=width),
    }


def _runs_triton(tensor: Tensor) -> bool:
    return _triton.why_not(tensor) is None or _triton.why_not_interpreter(tensor) is None

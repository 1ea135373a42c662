"""LayerNorm with what stands before it in a transformer: the dropout of a branch, and the residual.

Post-LN (MED's text layers) takes the normalised sum alone; pre-LN (the ViT) takes both, and passes
the sum on.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.errors import ShapeError
from blipfast.ops import _triton
from blipfast.ops._dispatch import Backends
from blipfast.ops.seeded_dropout import dropout, new_seed

backends = Backends("add_layer_norm")

_rows_that_fit = partial(_triton.no_wider, 4096, "rows", "elements")


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of the last dimension by `add_layer_norm`."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None)[1]

    def add(
        self, residual: Tensor, branch: Tensor | None, dropout_p: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The sum and its normalisation, see `add_layer_norm`; dropout is for training alone.

        Without a branch the sum is the residual: used in its place, it lets the backward of this
        kernel add up what its uses bring back.
        """
        p = dropout_p if self.training else 0.0
        return add_layer_norm(residual, branch, self.weight, self.bias, eps=self.eps, dropout_p=p)


def add_layer_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`h = residual + dropout(branch)` and `layer_norm(h)`, to be differentiated once.

    Both results have h's dtype, under autocast too: what follows a LayerNorm casts it down again
    anyway, and its own arithmetic is float32 in any case.

    Args:
        residual: `(..., D)`, any float dtype.
        branch: of residual's shape; where its dtype is another, h has the wider of both. None: h is
            the residual itself.
        weight, bias: `(D,)`.
        dropout_p: probability of dropping an element of the branch, in `[0, 1)`; always applied.
        impl: backend name or "auto".

    Raises:
        ShapeError: shapes, devices or the weights' dtypes disagree, or dropout_p is out of range.
        BackendError: `impl` names a backend that cannot run.
    """
    width = residual.shape[-1:]
    if not (width and width.numel()) or weight.shape != width or bias.shape != width:
        raise ShapeError(
            f"residual is {tuple(residual.shape)}, so weight and bias must be "
            f"{tuple(width)}, got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if branch is not None and branch.shape != residual.shape:
        raise ShapeError(f"residual is {tuple(residual.shape)}, but branch {tuple(branch.shape)}")
    for name, x in (("branch", branch), ("weight", weight), ("bias", bias)):
        if x is not None and x.device != residual.device:
            raise ShapeError(f"residual is on {residual.device}, but {name} on {x.device}")
    if weight.dtype != bias.dtype:
        raise ShapeError(f"weight is {weight.dtype}, but bias {bias.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ShapeError(f"dropout_p={dropout_p} must be in [0, 1)")
    wide = branch is not None and branch.dtype.itemsize > residual.dtype.itemsize
    run = backends(branch if wide else residual, impl)  # type: ignore[arg-type]
    found: tuple[Tensor, Tensor]
    found = run(residual, branch, weight, bias, eps, 0.0 if branch is None else dropout_p)
    return found


def _kernel(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """One launch forward, two backward; dropout draws its seed from the device's generator."""
    from blipfast.kernels.add_layer_norm import add_layer_norm as kernel

    seed = new_seed(residual.device) if dropout_p > 0 else None
    found: tuple[Tensor, Tensor] = kernel(
        residual, branch, weight, bias, eps=eps, dropout_p=dropout_p, seed=seed
    )
    return found


def _slower(_: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "the compiler fuses the formula with what surrounds it"
    return None


backends.register("triton", _rows_that_fit(_triton.why_not), _slower)(_kernel)


@backends.register("torch")
def _torch(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    h = residual if branch is None else residual + dropout(branch, dropout_p)
    # Autocast on a GPU makes it float32.
    return h, F.layer_norm(h, weight.shape, weight, bias, eps).to(h.dtype)


@backends.register("reference")
def add_layer_norm_reference(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """From the formula."""
    h = residual if branch is None else residual + F.dropout(branch, dropout_p)
    centred = h - h.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    normed = centred / (variance + eps).sqrt() * weight + bias
    return h, normed.to(h.dtype)


# The same kernel on a CPU, for tests; last, so that `auto` never takes it.
backends.register("triton_interpreter", _rows_that_fit(_triton.why_not_interpreter))(_kernel)

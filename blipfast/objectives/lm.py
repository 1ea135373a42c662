"""Language modelling over packed texts (BLIP section 3.2, LM)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from blipfast.errors import ShapeError
from blipfast.ops.linear_ce import Reduction, linear_cross_entropy

IGNORE = -100


class PredictionHead(Protocol):
    """What `lm_loss` needs of a head: logits are `decoder(transform(hidden))`."""

    @property
    def decoder(self) -> nn.Linear: ...

    def transform(self, hidden: Tensor) -> Tensor: ...


def lm_loss(
    hidden: Tensor,
    labels: Tensor,
    head: PredictionHead,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.1,
    reduction: Reduction = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of the next tokens, without logits of all tokens at once.

    Args:
        hidden: `(T, D)` decoder states.
        labels: `(T,)` int64, the token after each (`lm_labels`), or -100 where none counts.
        head: the decoder's prediction head.
        weight: `(V, D)` in place of the head's own, where an `ops.TiedTable` is in use.
        label_smoothing: 0.1 in all of BLIP, in scores too.
        reduction: "mean" over the labels that count, "sum", or "none" for `(T,)` losses.
        impl: backend of `linear_cross_entropy`.

    Returns:
        Float32; 0 where nothing counts. Raises ShapeError when shapes do not fit.
    """
    projection = head.decoder
    return linear_cross_entropy(
        head.transform(hidden),
        projection.weight if weight is None else weight,
        projection.bias,
        labels,
        label_smoothing=label_smoothing,
        ignore_index=IGNORE,
        reduction=reduction,
        impl=impl,
    )


def lm_labels(input_ids: Tensor, cu_seqlens: Tensor, prompt_length: int = 0) -> Tensor:
    """Next-token labels within each packed text.

    Args:
        input_ids: `(T,)` int64.
        cu_seqlens: `(N + 1,)` integers, where each text starts, and `T`.
        prompt_length: tokens at a text's start, [DEC] among them, that are given and not learnt.

    Returns:
        `(T,)` int64: the following token; -100 at a text's last token, which predicts nothing, and
        where the following token is of the prompt.

    Raises:
        ShapeError: input_ids or cu_seqlens is not flat.
    """
    if input_ids.ndim != 1 or cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ShapeError(
            f"lm_labels: needs input_ids (T,) and cu_seqlens (N + 1,), not "
            f"{tuple(input_ids.shape)} and {tuple(cu_seqlens.shape)}"
        )
    bounds = cu_seqlens.to(torch.int64)
    following = torch.arange(1, len(input_ids) + 1, device=input_ids.device)
    # The text that owns token t is the last one to start at or before it: empty texts own nothing.
    owner = torch.searchsorted(bounds, following - 1, right=True) - 1
    starts, ends = bounds[owner], bounds[(owner + 1).clamp(max=len(bounds) - 1)]
    learnt = (following < ends) & (following - starts >= prompt_length)
    return input_ids.roll(-1).where(learnt, IGNORE)

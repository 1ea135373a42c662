"""Language modelling over packed texts (BLIP section 3.2, LM)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from blipfast.objectives.distributed import mean_over_ranks
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
    count: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of the next tokens, without logits of all tokens at once.

    Args:
        hidden: `(T, D)` decoder states.
        labels: `(T,)` int64, the token after each (`PackedText.shifted`), or -100 for none.
        head: the decoder's prediction head.
        weight: `(V, D)` in place of the head's own, where an `ops.TiedTable` is in use.
        label_smoothing: 0.1 in all of BLIP, in scores too.
        reduction: "mean" over the labels that count on all ranks (of which this is the rank's
            part, `distributed.mean_over_ranks`), "sum", or "none" for `(T,)` losses.
        count: what "mean" divides by, where these labels are only part of a rank's batch.
        impl: backend of `linear_cross_entropy`.

    Returns:
        Float32; 0 where nothing counts. Raises ShapeError when shapes do not fit.
    """
    projection = head.decoder
    loss = linear_cross_entropy(
        head.transform(hidden),
        projection.weight if weight is None else weight,
        projection.bias,
        labels,
        label_smoothing=label_smoothing,
        ignore_index=IGNORE,
        reduction="sum" if reduction == "mean" else reduction,
        impl=impl,
    )
    if reduction != "mean":
        return loss
    if count is None:
        counted = (labels != IGNORE).sum()
    elif isinstance(count, Tensor):
        counted = count
    else:
        counted = torch.full((), count, device=loss.device)
    return mean_over_ranks(loss, counted)

"""Image-text matching with hard negatives (BLIP section 3.2, ITM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.objectives.distributed import mean_over_ranks, rank_offset
from blipfast.ops.hard_negatives import sample_hard_negatives


@dataclass(frozen=True)
class Negatives:
    """What was drawn, as rows of the keys that were drawn from; -1 where nothing could be.

    image_index: `(B,)` int64, an image that does not belong to text i. text_index: `(B,)` int64, a
    text that does not belong to image i.
    """

    image_index: Tensor
    text_index: Tensor

    @property
    def valid(self) -> Tensor:
        """`(2B,)` bool in ITM's order: texts with a drawn image, then images with a drawn text."""
        return torch.cat([self.image_index, self.text_index]) >= 0


def draw_negatives(
    image_feat: Tensor,
    text_feat: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    temperature: Tensor,
    *,
    eps: float,
    image_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    offset: int = 0,
    seed: int = 0,
    step: int | Tensor = 0,
    impl: str = "auto",
) -> Negatives:
    """Draw one image for each text and one text for each image, hard ones with high probability.

    The original's pre-training draws with eps 1e-4 from the student's similarities to the batch's
    momentum features, excluding only the pair itself; its fine-tuning with eps 0 from similarities
    to the student's own features, excluding equal image ids.

    Args:
        image_feat, text_feat: `(B, D)`.
        image_keys, text_keys: `(M, D)`, of this rank's batch (`M = B`) or of all ranks' batches.
        temperature: one element.
        eps: added to the softmax.
        image_ids: `(B,)`: exclude keys with an equal id, not only the pair itself.
        key_ids: `(M,)`; by default `image_ids`.
        offset: row of the keys where this rank's own batch starts.
        seed, step: name the random numbers; those of a pair depend on its place among all ranks'
            pairs, so a run draws the same on any number of ranks.
        impl: backend of `sample_hard_negatives`.

    Returns:
        Rows of the keys. A batch of one, or of equal ids, has nothing to draw: -1.

    Raises:
        ShapeError: shapes or ids do not fit.
    """
    first_row = max(offset, rank_offset(len(image_feat)))

    def draw(query: Tensor, keys: Tensor, stream: int) -> Tensor:
        return sample_hard_negatives(
            query,
            keys,
            temperature,
            eps=eps,
            query_ids=image_ids,
            key_ids=image_ids if key_ids is None else key_ids,
            offset=offset,
            seed=seed,
            step=step,
            stream=stream,
            first_row=first_row,
            first_column=first_row - offset,
            impl=impl,
        )

    return Negatives(draw(text_feat, image_keys, 0), draw(image_feat, text_keys, 1))


def itm_loss(logits: Tensor, negatives: Negatives, part: range | None = None) -> Tensor:
    """Cross-entropy of `logits (3B, 2)`, class 1 being a match; mean over the rows that count.

    Rows: `B` pairs, `B` texts with the image drawn for them, `B` images with the text drawn for
    them. Rows for which nothing was drawn do not count: a batch of one learns from its pair alone.

    part: the `b` pairs that the logits `(3b, 2)` are of; the mean is still over all pairs, so that
    the parts' losses add up.

    Returns a scalar, float32 at least, this rank's part of the mean over all ranks' rows
    (`distributed.mean_over_ranks`). Raises ShapeError when logits and negatives do not fit.
    """
    count = len(negatives.image_index) + negatives.valid.sum()
    if part is not None:
        rows = slice(part.start, part.stop)
        negatives = Negatives(negatives.image_index[rows], negatives.text_index[rows])
    batch = len(negatives.image_index)
    if logits.shape != (3 * batch, 2):
        raise ShapeError(
            f"itm_loss: logits are {tuple(logits.shape)}; {batch} pairs need ({3 * batch}, 2)"
        )
    positive = torch.ones(batch, dtype=torch.int64, device=logits.device)
    negative = torch.where(negatives.valid.to(logits.device), 0, -100)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, torch.cat([positive, negative]), reduction="sum")
    return mean_over_ranks(total, count)

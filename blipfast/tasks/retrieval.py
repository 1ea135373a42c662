"""Image-text retrieval (section 5.1): fine-tuning with ITC and ITM, matching of pairs.

Also the ITM scorer and CapFilt's filter: `match_pairs` gives each pair's matching probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.models.blip import PackedText
from blipfast.models.config import BlipConfig
from blipfast.objectives.distributed import all_gather_no_grad, rank_offset
from blipfast.objectives.itc import FeatureQueue
from blipfast.objectives.itm import Negatives, draw_negatives, itm_loss
from blipfast.objectives.momentum import MomentumTwin
from blipfast.ops.autocast_copies import keeping_copies
from blipfast.tasks.contrastive import Contrast, ContrastiveBlip, Surroundings


@dataclass
class RetrievalOutput:
    """The two losses (scalars), ITM logits `(3B, 2)` and the negatives that were drawn."""

    loss_itc: Tensor
    loss_itm: Tensor
    itm_logits: Tensor
    negatives: Negatives

    @property
    def loss(self) -> Tensor:
        return self.loss_itc + self.loss_itm

    def losses(self) -> dict[str, Tensor]:
        return {"itc": self.loss_itc, "itm": self.loss_itm}


class BlipForRetrieval(ContrastiveBlip):
    """Image-grounded encoder with ITC projections and matching head.

    train_state: keep the momentum twin and queues that fine-tuning needs; a model that only scores
    goes without. across_ranks: of ITC, see `ContrastiveBlip`; not in the original.
    negatives_from_all_ranks: ITM's, as for COCO; own rank only, as for Flickr30K.
    """

    def __init__(
        self,
        config: BlipConfig,
        *,
        train_state: bool = False,
        queue_size: int = 57_600,
        momentum: float = 0.995,
        across_ranks: bool = False,
        negatives_from_all_ranks: bool = True,
    ) -> None:
        super().__init__(config, momentum=momentum, across_ranks=across_ranks)
        self.negatives_from_all_ranks = negatives_from_all_ranks
        self.twin = MomentumTwin(self) if train_state else None
        self.queue = (
            FeatureQueue(queue_size, config.embed_dim, with_ids=True) if train_state else None
        )

    @property
    def draws_from_all_ranks(self) -> bool:
        return self.negatives_from_all_ranks

    @keeping_copies()
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | PackedText,
        attention_mask: Tensor | None = None,
        *,
        image_ids: Tensor,
        alpha: float | Tensor,
        step: int | Tensor,
        seed: int = 0,
        negatives: Negatives | None = None,
        update_state: bool | None = None,
    ) -> RetrievalOutput:
        """One step's losses; every pair with an equal image id is a positive.

        image_ids: `(B,)` int64. The other arguments are those of `BlipForPretraining.forward`.
        """
        contrast, around = self.contrasted(
            pixel_values, input_ids, attention_mask, alpha=alpha, step=step, seed=seed,
            image_ids=image_ids, negatives=negatives, update_state=update_state,
        )  # fmt: skip
        itm_logits = self.ground(around, around.whole)
        loss_itm = itm_loss(itm_logits, contrast.negatives)
        return RetrievalOutput(contrast.loss_itc, loss_itm, itm_logits, contrast.negatives)

    def contrast(
        self,
        features: tuple[Tensor, Tensor],
        features_m: tuple[Tensor, Tensor],
        *,
        alpha: float | Tensor,
        step: int | Tensor,
        seed: int,
        image_ids: Tensor,
        negatives: Negatives | None,
        update_state: bool,
    ) -> Contrast:
        """ITC over the batch's unit features (the student's and the twin's), and negatives drawn
        by the student's similarities to its own features, never of an equal image id."""
        loss, *_ = self.itc(features, features_m, alpha, image_ids, update_state)
        if negatives is None:
            images, texts = (feature.detach() for feature in features)
            first, key_ids = 0, image_ids
            if self.negatives_from_all_ranks:
                first = rank_offset(len(images))
                images, texts = all_gather_no_grad(images), all_gather_no_grad(texts)
                key_ids = all_gather_no_grad(image_ids)
            negatives = draw_negatives(
                *features, images, texts, self.temp, eps=0.0, image_ids=image_ids, key_ids=key_ids,
                offset=first, seed=seed, step=step,
            )  # fmt: skip
        return Contrast(loss, negatives)

    def ground(self, around: Surroundings, part: range) -> Tensor:
        """ITM logits `(3b, 2)` of the `b` texts in `part`."""
        pairs, kv_index = around.itm_pairs(part)
        return self.match(pairs, self.image_states(around.image_embeds), kv_index)

    @torch.no_grad()
    def match_pairs(self, pixel_values: Tensor, text: PackedText) -> tuple[Tensor, Tensor]:
        """ITM's probability `(B,)` that image n and text n match, and their similarity `(B,)`."""
        image_embeds = self.encode_image(pixel_values)
        if image_embeds.shape[0] != text.packing.num_sequences:
            raise ShapeError(
                f"{image_embeds.shape[0]} images came with {text.packing.num_sequences} texts"
            )
        index = range(image_embeds.shape[0])
        logits = self.match(text, self.image_states(image_embeds), index)
        similarity = (self.image_features(image_embeds) * self.text_features(text)).sum(-1)
        return logits.float().softmax(-1)[:, 1], similarity

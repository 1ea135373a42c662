"""Image-text retrieval (section 5.1): fine-tuning with ITC and ITM, matching of pairs.

Also the ITM scorer and CapFilt's filter: `match_pairs` gives each pair's matching probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig
from blipfast.objectives.distributed import all_gather_no_grad, all_gather_with_grad, rank_offset
from blipfast.objectives.itc import FeatureQueue, clamp_temperature_, itc_loss
from blipfast.objectives.itm import Negatives, draw_negatives, itm_loss
from blipfast.objectives.momentum import MomentumTwin
from blipfast.tasks.pretrain import itm_pairs


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


class BlipForRetrieval(Blip):
    """Image-grounded encoder with ITC projections and matching head.

    train_state: keep the momentum twin and queues that fine-tuning needs; a model that only scores
    goes without. negatives_from_all_ranks: as for COCO; own rank only, as for Flickr30K.
    """

    def __init__(
        self,
        config: BlipConfig,
        *,
        train_state: bool = False,
        queue_size: int = 57_600,
        momentum: float = 0.995,
        negatives_from_all_ranks: bool = True,
    ) -> None:
        super().__init__(config, contrastive=True, num_classes=2)
        self.momentum = momentum
        self.negatives_from_all_ranks = negatives_from_all_ranks
        self.twin = MomentumTwin(self) if train_state else None
        self.queue = (
            FeatureQueue(queue_size, config.embed_dim, with_ids=True) if train_state else None
        )

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        image_ids: Tensor,
        alpha: float,
        step: int,
        seed: int = 0,
        negatives: Negatives | None = None,
        update_state: bool | None = None,
    ) -> RetrievalOutput:
        """One step's losses; every pair with an equal image id is a positive.

        image_ids: `(B,)` int64. The other arguments are those of `BlipForPretraining.forward`.
        """
        if self.twin is None or self.queue is None:
            raise ShapeError(
                "this model only scores: build it with train_state=True to fine-tune it"
            )
        text = PackedText.from_padded(input_ids, attention_mask)
        update_state = self.training if update_state is None else update_state
        clamp_temperature_(self.temp)
        image_embeds = self.encode_image(pixel_values)
        image_feat = self.image_features(image_embeds)
        text_feat = self.text_features(text)
        if update_state:
            self.twin.update(self, self.momentum)
        image_feat_m, text_feat_m = self.twin.features(pixel_values, text)
        loss_itc = itc_loss(
            image_feat,
            text_feat,
            image_feat_m,
            text_feat_m,
            self.queue,
            self.temp,
            alpha,
            ids=image_ids,
        )
        if update_state:
            self.queue.enqueue(image_feat_m, text_feat_m, image_ids)
        itm_logits, negatives = self._match_with_negatives(
            image_embeds,
            input_ids,
            attention_mask,
            image_feat,
            text_feat,
            image_ids,
            negatives,
            seed,
            step,
        )
        return RetrievalOutput(loss_itc, itm_loss(itm_logits, negatives), itm_logits, negatives)

    def _match_with_negatives(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_feat: Tensor,
        text_feat: Tensor,
        image_ids: Tensor,
        negatives: Negatives | None,
        seed: int,
        step: int,
    ) -> tuple[Tensor, Negatives]:
        """ITM logits `(3B, 2)` with negatives from this rank's batch, or from all ranks'."""
        batch, first = image_embeds.shape[0], 0
        image_keys, text_keys, key_ids = image_feat.detach(), text_feat.detach(), image_ids
        text = PackedText.from_padded(input_ids, attention_mask)
        pool = text
        if self.negatives_from_all_ranks:
            first = rank_offset(batch)
            image_embeds = all_gather_with_grad(image_embeds)
            image_keys, text_keys = all_gather_no_grad(image_keys), all_gather_no_grad(text_keys)
            key_ids = all_gather_no_grad(image_ids)
            pool = PackedText.from_padded(
                all_gather_no_grad(input_ids), all_gather_no_grad(attention_mask)
            )
        if negatives is None:
            negatives = draw_negatives(
                image_feat,
                text_feat,
                image_keys,
                text_keys,
                self.temp,
                eps=0.0,
                image_ids=image_ids,
                key_ids=key_ids,
                offset=first,
                seed=seed,
                step=step,
            )
        pairs, kv_index = itm_pairs(text, negatives, range(first, first + batch), pool)
        return self.match(pairs, self.image_states(image_embeds), kv_index), negatives

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

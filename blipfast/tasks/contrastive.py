"""What pre-training and retrieval share (BLIP, section 3.2): momentum twin, queue, ITC, negatives.

Their step has three phases, so that a batch can also be gone through in parts
(`blipfast.tasks.in_parts`): `encode` images and texts on their own, `contrast` the whole batch, and
`ground` the texts in the images that were drawn.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig
from blipfast.objectives.distributed import (
    all_gather_no_grad,
    fetch_rows,
    gather_texts,
    world_size,
)
from blipfast.objectives.itc import (
    FeatureQueue,
    clamp_temperature_,
    gather_keys,
    itc_loss,
)
from blipfast.objectives.itm import Negatives
from blipfast.objectives.momentum import MomentumTwin
from blipfast.ops.device_packing import DevicePacking
from blipfast.ops.packing import Index


@dataclass(frozen=True)
class Contrast:
    """ITC's loss (scalar) and the negatives drawn for ITM, numbered over all ranks' pairs where
    the task draws from all ranks."""

    loss_itc: Tensor
    negatives: Negatives


@dataclass(frozen=True)
class Surroundings:
    """All that a batch's texts may be grounded in, at hand on this rank.

    image_embeds: `(B + U, S, D)`, the batch's own images first. image_places: for each text the
    place of the drawn image among them, -1 for none; a tensor where only the device knows. text,
    drawn_texts: the batch's texts, and for each image the drawn one (any, where none was drawn).
    """

    image_embeds: Tensor
    image_places: Index
    text: PackedText
    drawn_texts: PackedText

    @property
    def whole(self) -> range:
        """All texts, as the part to ground."""
        return range(self.text.packing.num_sequences)

    def itm_pairs(self, part: range) -> tuple[PackedText, Index]:
        """ITM's pairs of the texts in `part`, and the image of each: the positives, each text with
        a drawn image, each image with a drawn text.

        A row with nothing to draw stands in for itself; the loss leaves it out.
        """
        text, drawn = self.text.select(part), self.drawn_texts.select(part)
        if isinstance(self.image_places, Tensor):
            own = torch.arange(part.start, part.stop, device=self.image_places.device)
            drawn_images = _or_own(self.image_places[part.start : part.stop], own)
            return text + text + drawn, torch.cat([own, drawn_images, own])
        places = [self.image_places[i] if self.image_places[i] >= 0 else i for i in part]
        return text + text + drawn, [*part, *places, *part]


class ContrastiveBlip(Blip):
    """BLIP with ITC's projections, ITM's head and what they learn with.

    twin, queue: None in a model that only scores. momentum: of the twin's weights.
    across_ranks: ITC compares with the batches of all ranks, as if they were one. The original
        compares with the own rank's batch and the queue.
    moves_twin: a forward pass in training moves the twin. Where parameters are sharded it cannot:
        the training loop then calls `move_twin` before it.
    """

    twin: MomentumTwin | None
    queue: FeatureQueue | None
    # A task's own, over the features `(B, embed_dim)` of student and twin.
    contrast: Callable[..., Contrast]

    def __init__(
        self, config: BlipConfig, *, momentum: float, across_ranks: bool, **parts: Any
    ) -> None:
        super().__init__(config, contrastive=True, num_classes=2, **parts)
        self.momentum, self.across_ranks = momentum, across_ranks
        self.moves_twin = True

    @property
    @abstractmethod
    def draws_from_all_ranks(self) -> bool:
        """Whether ITM's negatives may be other ranks' images and texts, which have to move here."""

    @property
    def teacher(self) -> MomentumTwin:
        """The momentum twin of a model that has one."""
        if self.twin is None:
            raise ShapeError(
                "this model only scores: build it with train_state=True to fine-tune it"
            )
        return self.twin

    def twin_features(self, pixel_values: Tensor, text: PackedText) -> tuple[Tensor, Tensor]:
        """The momentum twin's unit features of images and texts, without gradients."""
        return self.teacher.features(pixel_values, text)

    def move_twin(self) -> None:
        """The momentum update, once before each step."""
        self.teacher.update(self, self.momentum)

    def contrasted(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | PackedText,
        attention_mask: Tensor | None,
        *,
        update_state: bool | None,
        **options: Any,
    ) -> tuple[Contrast, Surroundings]:
        """The phases of a step before `ground`; arguments as of a task's `forward`."""
        _ = self.teacher  # raises where there is none, before any work
        text = PackedText.of(input_ids, attention_mask)
        check_batch(pixel_values, text)
        update_state = self.training if update_state is None else update_state
        clamp_temperature_(self.temp)
        image_embeds = self.encode_image(pixel_values)
        words = self.looked_up(text)
        features = self.image_features(image_embeds), self.text_features(words)
        if update_state and self.moves_twin:
            self.move_twin()
        features_m = self.twin_features(pixel_values, text)
        contrast = self.contrast(features, features_m, update_state=update_state, **options)
        around = self.surroundings(image_embeds, input_ids, attention_mask, contrast, words)
        return contrast, around

    def looked_up(self, text: PackedText) -> PackedText:
        """The texts with their words looked up once for all passes of a step."""
        config = self.text_config
        starts = (config.cls_token_id, config.enc_token_id, config.dec_token_id)
        return text.looked_up(self.encoder.embeddings.word, starts)

    def itc(
        self,
        features: tuple[Tensor, Tensor],
        features_m: tuple[Tensor, Tensor],
        alpha: float | Tensor,
        image_ids: Tensor | None,
        update_state: bool,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """ITC's loss, the momentum keys that negatives can be drawn from, and the own first row.

        features, features_m: of images and texts, `(B, embed_dim)`, the student's and the twin's.
        image_ids: equal ones are positives of each other; the queue then keeps ids.
        """
        keys = gather_keys(*features_m, image_ids)
        compared = keys if self.across_ranks else keys.of_this_rank()
        loss = itc_loss(
            *features, *features_m, self.queue, self.temp, alpha, image_ids, keys=compared
        )
        if update_state and self.queue is not None:
            self.queue.enqueue(keys.image, keys.text, keys.ids)
        return loss, compared.image, compared.text, compared.first

    def of_keys(self, ids: Tensor | None) -> Tensor | None:
        """The image ids `(M,)` of the keys that `itc` returns, from the batch's `(B,)`."""
        return all_gather_no_grad(ids) if self.across_ranks and ids is not None else ids

    def surroundings(
        self,
        image_embeds: Tensor,
        input_ids: Tensor | PackedText,
        attention_mask: Tensor | None,
        contrast: Contrast,
        text: PackedText,
    ) -> Surroundings:
        """Brings the drawn images and texts here; of other ranks' images only the drawn ones."""
        negatives = contrast.negatives
        if self.draws_from_all_ranks and world_size() > 1:
            if isinstance(input_ids, PackedText) or attention_mask is None:
                raise ShapeError(
                    "negatives from all ranks need padded input_ids and attention_mask; packed "
                    "texts go with those of the own rank alone"
                )
            image_embeds, places = fetch_rows(image_embeds, negatives.image_index)
            ids, mask = gather_texts(input_ids, attention_mask)
            rows = negatives.text_index.clamp(min=0)
            drawn = PackedText.from_padded(ids[rows], mask[rows])
            return Surroundings(image_embeds, places, *text.with_words_of(drawn))
        if isinstance(text.packing, DevicePacking):  # and so are the drawn texts' lengths
            own = torch.arange(len(image_embeds), device=image_embeds.device)
            drawn = text.select(_or_own(negatives.text_index, own))
            return Surroundings(image_embeds, negatives.image_index, text, drawn)
        # The forward waits for the device here alone: the host must know what was drawn.
        places, drawn_rows = torch.stack([negatives.image_index, negatives.text_index]).tolist()
        drawn = text.select([row if row >= 0 else i for i, row in enumerate(drawn_rows)])
        return Surroundings(image_embeds, places, text, drawn)


def _or_own(drawn: Tensor, own: Tensor) -> Tensor:
    return drawn.where(drawn >= 0, own)


def check_batch(pixel_values: Tensor, text: PackedText) -> None:
    """Raises ShapeError unless each image came with one text."""
    if pixel_values.shape[0] != text.packing.num_sequences:
        raise ShapeError(
            f"{pixel_values.shape[0]} images came with {text.packing.num_sequences} texts"
        )

"""Pre-training with all three objectives (BLIP, section 3.2).

Per step: momentum update, ITC against momentum features and queue, negatives drawn from the ITC
similarities, then ITM's 3B texts and LM's B texts in one packed pass over shared image K/V.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from blipfast.models.blip import PackedText
from blipfast.models.config import BlipConfig
from blipfast.models.streams import run_streams
from blipfast.objectives.itc import FeatureQueue
from blipfast.objectives.itm import Negatives, draw_negatives, itm_loss
from blipfast.objectives.lm import lm_loss
from blipfast.objectives.momentum import MomentumTwin
from blipfast.ops.autocast_copies import keeping_copies
from blipfast.tasks.contrastive import Contrast, ContrastiveBlip, Surroundings


@dataclass
class PretrainOutput:
    """The three losses (scalars), ITM logits `(3B, 2)` and the negatives that were drawn.

    On several ranks the losses are this rank's parts of the mean over all; negatives from all ranks
    are numbered over all ranks' pairs.
    """

    loss_itc: Tensor
    loss_itm: Tensor
    loss_lm: Tensor
    itm_logits: Tensor
    negatives: Negatives

    @property
    def loss(self) -> Tensor:
        return self.loss_itc + self.loss_itm + self.loss_lm

    def losses(self) -> dict[str, Tensor]:
        return {"itc": self.loss_itc, "itm": self.loss_itm, "lm": self.loss_lm}


class BlipForPretraining(ContrastiveBlip):
    """BLIP with its momentum twin and feature queues.

    queue_size: past features kept as negatives for ITC. momentum: of the twin's weights.
    across_ranks: ITC and ITM take the negatives of all ranks' batches, as one large batch would;
    the original takes the own rank's.
    exclude_equal_ids: never draw a negative with the same image id (the original only excludes the
    pair itself). label_smoothing: of LM.
    """

    twin: MomentumTwin
    queue: FeatureQueue

    def __init__(
        self,
        config: BlipConfig,
        *,
        queue_size: int = 57_600,
        momentum: float = 0.995,
        across_ranks: bool = True,
        exclude_equal_ids: bool = False,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(config, momentum=momentum, across_ranks=across_ranks, text_decoder="image")
        self.decoder.share(self.encoder, config.sharing)
        self.exclude_equal_ids = exclude_equal_ids
        self.label_smoothing = label_smoothing
        self.twin = MomentumTwin(self)
        self.queue = FeatureQueue(queue_size, config.embed_dim)

    @property
    def draws_from_all_ranks(self) -> bool:
        return self.across_ranks

    @keeping_copies()
    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | PackedText,
        attention_mask: Tensor | None = None,
        *,
        alpha: float | Tensor,
        step: int | Tensor,
        seed: int = 0,
        image_ids: Tensor | None = None,
        negatives: Negatives | None = None,
        update_state: bool | None = None,
    ) -> PretrainOutput:
        """One step's losses.

        pixel_values: `(B, 3, size, size)`. input_ids, attention_mask: `(B, L)`, right-padded; or
        the texts as `PackedText`: with `PackedText.with_room` the host never waits for the device.
        alpha: weight of the momentum model's soft targets (`objectives.itc.alpha_at`).
        step, seed: key of the negatives' random draws, so that they can be repeated anywhere.
        alpha and step may be scalars on the device, which a recorded graph reads anew each time.
        image_ids: `(B,)`, used with `exclude_equal_ids`. negatives: given rather than drawn.
        update_state: move the momentum twin and the queue; by default only in training mode.
        """
        contrast, around = self.contrasted(
            pixel_values, input_ids, attention_mask, alpha=alpha, step=step, seed=seed,
            image_ids=image_ids, negatives=negatives, update_state=update_state,
        )  # fmt: skip
        itm_logits, loss_lm = self.ground(around, around.whole)
        loss_itm = itm_loss(itm_logits, contrast.negatives)
        return PretrainOutput(contrast.loss_itc, loss_itm, loss_lm, itm_logits, contrast.negatives)

    def contrast(
        self,
        features: tuple[Tensor, Tensor],
        features_m: tuple[Tensor, Tensor],
        *,
        alpha: float | Tensor,
        step: int | Tensor,
        seed: int,
        image_ids: Tensor | None,
        negatives: Negatives | None,
        update_state: bool,
    ) -> Contrast:
        """ITC over the batch's unit features (the student's and the twin's), and negatives drawn
        by the student's similarities to the twin's features."""
        loss, image_keys, text_keys, first = self.itc(
            features, features_m, alpha, None, update_state
        )
        if negatives is None:
            ids = image_ids if self.exclude_equal_ids else None
            negatives = draw_negatives(
                *features, image_keys, text_keys, self.temp, eps=1e-4, offset=first, seed=seed,
                step=step, image_ids=ids, key_ids=self.of_keys(ids),
            )  # fmt: skip
        return Contrast(loss, negatives)

    def ground(self, around: Surroundings, part: range) -> tuple[Tensor, Tensor]:
        """ITM logits `(3b, 2)` and the LM loss of the `b` texts in `part`, in one pass of 3b
        encoded and b decoded texts. The loss is a mean over all texts, of which the part gives
        its share.
        """
        shared = self.decoder.embeddings is self.encoder.embeddings
        text = around.text.select(part)
        decoded = text if shared else text.without_words()
        inputs, labels = decoded.shifted()
        itm_text, itm_images = around.itm_pairs(part)
        streams = [
            self.grounded_stream(itm_text, itm_images, first_only=True),
            self.decoder_stream(inputs, part),
        ]
        first, hidden = run_streams(streams, self.image_states(around.image_embeds))
        loss_lm = lm_loss(
            hidden,
            labels,
            self.lm_head,
            weight=decoded.words.table.weight if decoded.words else None,
            label_smoothing=self.label_smoothing,
            count=around.text.packing.num_following,
        )
        return self.itm_head(first), loss_lm

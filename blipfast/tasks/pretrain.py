"""Pre-training with all three objectives (BLIP, section 3.2).

Per step: momentum update, ITC against momentum features and queue, negatives drawn from the ITC
similarities, then ITM's 3B texts and LM's B texts in one packed pass over shared image K/V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig
from blipfast.models.streams import run_streams
from blipfast.objectives.itc import FeatureQueue, clamp_temperature_, itc_loss
from blipfast.objectives.itm import Negatives, draw_negatives, itm_loss
from blipfast.objectives.lm import lm_loss
from blipfast.objectives.momentum import MomentumTwin


@dataclass
class PretrainOutput:
    """The three losses (scalars), ITM logits `(3B, 2)` and the negatives that were drawn."""

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


class BlipForPretraining(Blip):
    """BLIP with its momentum twin and feature queues.

    queue_size: past features kept as negatives for ITC. momentum: of the twin's weights.
    exclude_equal_ids: never draw a negative with the same image id (the original only excludes the
    pair itself). label_smoothing: of LM.
    """

    def __init__(
        self,
        config: BlipConfig,
        *,
        queue_size: int = 57_600,
        momentum: float = 0.995,
        exclude_equal_ids: bool = False,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(config, text_decoder="image", contrastive=True, num_classes=2)
        self.decoder.share(self.encoder, config.sharing)
        self.momentum = momentum
        self.exclude_equal_ids = exclude_equal_ids
        self.label_smoothing = label_smoothing
        self.twin = MomentumTwin(self)
        self.queue = FeatureQueue(queue_size, config.embed_dim)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        alpha: float,
        step: int,
        seed: int = 0,
        image_ids: Tensor | None = None,
        negatives: Negatives | None = None,
        update_state: bool | None = None,
    ) -> PretrainOutput:
        """One step's losses.

        pixel_values: `(B, 3, size, size)`. input_ids, attention_mask: `(B, L)`, right-padded.
        alpha: weight of the momentum model's soft targets (`objectives.itc.alpha_at`).
        step, seed: key of the negatives' random draws, so that they can be repeated anywhere.
        image_ids: `(B,)`, used with `exclude_equal_ids`. negatives: given rather than drawn.
        update_state: move the momentum twin and the queue; by default only in training mode.
        """
        text = PackedText.from_padded(input_ids, attention_mask)
        _check_batch(pixel_values, text)
        update_state = self.training if update_state is None else update_state
        clamp_temperature_(self.temp)
        image_embeds = self.encode_image(pixel_values)
        image_feat = self.image_features(image_embeds)
        config = self.text_config
        starts = (config.cls_token_id, config.enc_token_id, config.dec_token_id)
        words = text.looked_up(self.encoder.embeddings.word, starts)
        text_feat = self.text_features(words)
        if update_state:
            self.twin.update(self, self.momentum)
        image_feat_m, text_feat_m = self.twin.features(pixel_values, text)
        loss_itc = itc_loss(
            image_feat, text_feat, image_feat_m, text_feat_m, self.queue, self.temp, alpha
        )
        if update_state:
            self.queue.enqueue(image_feat_m, text_feat_m)
        if negatives is None:
            negatives = draw_negatives(
                image_feat,
                text_feat,
                image_feat_m,
                text_feat_m,
                self.temp,
                eps=1e-4,
                image_ids=image_ids if self.exclude_equal_ids else None,
                seed=seed,
                step=step,
            )
        itm_logits, loss_lm = self.ground(image_embeds, text, negatives, words)
        loss_itm = itm_loss(itm_logits, negatives)
        return PretrainOutput(loss_itc, loss_itm, loss_lm, itm_logits, negatives)

    def ground(
        self,
        image_embeds: Tensor,
        text: PackedText,
        negatives: Negatives,
        words: PackedText | None = None,
    ) -> tuple[Tensor, Tensor]:
        """ITM logits `(3B, 2)` and the LM loss, by one pass of 3B encoded and B decoded texts.

        words: the same texts with their words looked up.
        """
        batch = image_embeds.shape[0]
        encoded = words or text
        shared = self.decoder.embeddings is self.encoder.embeddings
        decoded = encoded if shared else text
        inputs, labels = decoded.shifted()
        itm_text, itm_images = itm_pairs(encoded, negatives, range(batch))
        streams = [
            self.grounded_stream(itm_text, itm_images, first_only=True),
            self.decoder_stream(inputs, range(batch)),
        ]
        first, hidden = run_streams(streams, self.image_states(image_embeds))
        loss_lm = lm_loss(
            hidden,
            labels,
            self.lm_head,
            weight=decoded.words.table.weight if decoded.words else None,
            label_smoothing=self.label_smoothing,
        )
        return self.itm_head(first), loss_lm


def itm_pairs(
    text: PackedText, negatives: Negatives, own: Sequence[int], pool: PackedText | None = None
) -> tuple[PackedText, list[int]]:
    """ITM's 3B pairs: the positives, each text with a drawn image, each image with a drawn text.

    own: the place of the batch's own images among all images looked at. pool: the texts that
    negatives are drawn from, by default `text` itself. A row with nothing to draw stands in for
    itself; the loss leaves it out.
    """
    images = [j if j >= 0 else i for i, j in zip(own, negatives.image_index.tolist(), strict=True)]
    texts = [j if j >= 0 else i for i, j in zip(own, negatives.text_index.tolist(), strict=True)]
    pairs = text + text + (pool or text).select(texts)
    return pairs, [*own, *images, *own]


def _check_batch(pixel_values: Tensor, text: PackedText) -> None:
    if pixel_values.shape[0] != text.packing.num_sequences:
        raise ShapeError(
            f"{pixel_values.shape[0]} images came with {text.packing.num_sequences} texts"
        )

"""Visual question answering (section 5.3): a question encoder and an answer decoder.

Training weighs several answers per question; inference generates, or ranks a fixed list of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.generation import Generation, evaluation, generate
from blipfast.models.blip import Blip, PackedText
from blipfast.models.config import BlipConfig
from blipfast.models.reference import encode_padded
from blipfast.models.streams import CrossStates, run_streams
from blipfast.objectives.lm import lm_loss
from blipfast.tasks.answer_ranking import (
    BestAnswers,
    RankedAnswers,
    best_answers,
    rank_answers,
)


@dataclass
class VQAOutput:
    """The weighted LM loss (scalar) and the loss of each answer `(A,)`."""

    loss_lm: Tensor
    loss_per_answer: Tensor

    @property
    def loss(self) -> Tensor:
        return self.loss_lm

    def losses(self) -> dict[str, Tensor]:
        return {"lm": self.loss_lm}


class BlipForVQA(Blip):
    """Image encoder, image-grounded question encoder, and a decoder that looks at the question.

    label_smoothing: of LM; the original's ranking scores have it in them too.
    """

    def __init__(self, config: BlipConfig, *, label_smoothing: float = 0.1) -> None:
        super().__init__(config, text_decoder="question")
        self.label_smoothing = label_smoothing

    def encode_question(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> CrossStates:
        """What the answer decoder looks at: `(B, L, D)` question states and their lengths."""
        text = PackedText.from_padded(input_ids, attention_mask)
        return self.question_states(self.encode_image(pixel_values), text)

    def question_states(self, image_embeds: Tensor, text: PackedText) -> CrossStates:
        """As `encode_question`, of images encoded before."""
        if image_embeds.shape[0] != text.packing.num_sequences:
            raise ShapeError(
                f"{image_embeds.shape[0]} images came with {text.packing.num_sequences} questions"
            )
        stream = self.grounded_stream(text, range(image_embeds.shape[0]))
        hidden = run_streams([stream], self.image_states(image_embeds))[0]
        lengths = None if text.packing.uniform else text.packing.lengths_tensor
        return self.decoder.cross_states(text.packing.pad(hidden), lengths=lengths)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        image_embeds: Tensor | None = None,
        attend_padding: bool = False,
        **options: Any,
    ) -> Generation:
        """Answers in free form, from `pixel_values (B, 3, size, size)` or `image_embeds (B, S, D)`.

        input_ids, attention_mask: questions `(B, L)`, right-padded; the first token becomes [ENC].
        attend_padding: as the original does (a fault, kept for parity), the answer decoder also
        looks at padded question positions, so that an answer depends on what it is batched with.
        options: those of `blipfast.generation.generate`; here max_length is 10 (with [DEC]) and
        min_length 1 by default, as in the original. Dropout is off, whatever the module's mode.
        Raises ConfigError for an option that cannot be, ShapeError for inputs that do not fit.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ShapeError("give either pixel_values or image_embeds")
        text = PackedText.from_padded(input_ids, attention_mask)
        encoder = self.encoder
        with evaluation(self.visual_encoder, encoder):
            if pixel_values is not None:
                image_embeds = self.encode_image(pixel_values)
            assert image_embeds is not None
            if attend_padding:
                ids = text.starting_with(self.text_config.enc_token_id).input_ids
                padded = input_ids.masked_scatter(attention_mask.bool(), ids)
                hidden = encode_padded(encoder, padded, attention_mask, cross_embeds=image_embeds)
                states = self.decoder.cross_states(hidden)
            else:
                states = self.question_states(image_embeds, text)
        prompt = torch.tensor([self.text_config.dec_token_id])
        return generate(
            self.decoder, states, prompt, **{"max_length": 10, "min_length": 1, **options}
        )

    def answer_losses(
        self, states: CrossStates, answers: PackedText, question_index: Sequence[int]
    ) -> Tensor:
        """`(A,)`: the summed token losses of each answer to the question it names."""
        inputs, labels = answers.shifted()
        hidden = run_streams([self.decoder_stream(inputs, question_index)], states)[0]
        losses = lm_loss(
            hidden,
            labels,
            self.lm_head,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        sums = losses.new_zeros(inputs.packing.num_sequences)
        return sums.index_add(0, inputs.packing.sequence_ids, losses)

    def forward(
        self,
        pixel_values: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        answers_per_question: Sequence[int],
        weights: Tensor,
    ) -> VQAOutput:
        """The answers' weighted losses, summed and divided by the number of images.

        answer_ids: `(A, L)`, the answers of all questions in order, `answers_per_question` of each.
        weights: `(A,)`, e.g. the share of annotators who gave it.
        """
        states = self.encode_question(pixel_values, question_ids, question_mask)
        index = [q for q, n in enumerate(answers_per_question) for _ in range(n)]
        if len(index) != answer_ids.shape[0] or len(answers_per_question) != states.size:
            raise ShapeError(
                f"answers_per_question {list(answers_per_question)} does not fit {states.size} "
                f"questions and {answer_ids.shape[0]} answers"
            )
        answers = PackedText.from_padded(answer_ids, answer_mask)
        losses = self.answer_losses(states, answers, index)
        loss = (losses * weights.to(losses)).sum() / pixel_values.shape[0]
        return VQAOutput(loss, losses)

    def rank(self, states: CrossStates, answers: PackedText, k: int = 128) -> RankedAnswers:
        """Ranks a fixed answer list for each question, as the paper's VQA evaluation does."""
        return rank_answers(self, states, answers, k)

    def best(self, states: CrossStates, answers: PackedText, k: int = 128) -> BestAnswers:
        """The first of `rank` alone, which for a trained model is far less work."""
        return best_answers(self, states, answers, k)

    def first_token_logits(self, states: CrossStates) -> Tensor:
        """`(B, V)`: logits of each question's first answer token."""
        starts = states.embeds[0].new_ones((states.size, 1), dtype=torch.int64)
        text = PackedText.from_padded(starts, starts)
        stream = self.decoder_stream(text, range(states.size))
        return self.lm_head(run_streams([stream], states)[0])

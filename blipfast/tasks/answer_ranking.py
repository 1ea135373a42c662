"""Ranking a list of answers by their likelihood (BLIP, section 5.3; the decoder of VQA).

The probability of an answer's first token selects `k` candidates for each question, and the
log-likelihood of the whole answer orders them. All candidates of a question share its projected
K/V, and what they begin with in common is computed once.

`best_answers` finds the first of that order without looking at all of it. With a label smoothing
`e` over `V` tokens, each token's loss is at least the entropy of its target,

    floor = -(1 - e + e / V) log(1 - e + e / V) - (V - 1) e / V log(e / V)

(0 without smoothing), so an answer cannot lose less than its first token, which is known, and as
many floors as tokens follow. Candidates are scored in the order of that bound until the best one
found is below the bounds of all that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from blipfast.models.blip import PackedText
from blipfast.models.config import TextConfig
from blipfast.models.prefix_tree import PrefixTree
from blipfast.models.streams import CrossStates, run_streams
from blipfast.models.text import LMHead, TextTransformer
from blipfast.ops.linear_ce import linear_cross_entropy

_FIRST_ROUND, _GROWTH = 8, 4  # candidates of a question that are scored at first, then more


class AnswerDecoder(Protocol):
    """What ranking needs of a model."""

    label_smoothing: float

    @property
    def decoder(self) -> TextTransformer: ...

    @property
    def lm_head(self) -> LMHead: ...

    @property
    def text_config(self) -> TextConfig: ...

    def first_token_logits(self, states: CrossStates) -> Tensor: ...


@dataclass
class RankedAnswers:
    """The k candidates of each question, best first.

    answer_ids: `(B, k)` indices into the answer list. log_likelihood: `(B, k)` of the whole answer.
    """

    answer_ids: Tensor
    log_likelihood: Tensor


@dataclass
class BestAnswers:
    """The best candidate of each question.

    answer_ids: `(B,)` indices into the answer list. log_likelihood: `(B,)` of the whole answer.
    scored: how many candidates had to be, of all questions together.
    """

    answer_ids: Tensor
    log_likelihood: Tensor
    scored: int


@torch.no_grad()
def rank_answers(
    model: AnswerDecoder, states: CrossStates, answers: PackedText, k: int
) -> RankedAnswers:
    """All k candidates of each question in their order.

    states: `B` encoded questions. answers: the list; each begins with a token that says nothing.
    """
    states, candidates, _ = _candidates(model, states, answers, k)
    questions = [q for q in range(states.size) for _ in range(candidates.shape[1])]
    losses = _losses(model, states, answers, candidates.flatten(), questions)
    scores = -losses.view(candidates.shape)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return RankedAnswers(candidates.gather(1, order), scores.gather(1, order))


@torch.no_grad()
def best_answers(
    model: AnswerDecoder, states: CrossStates, answers: PackedText, k: int
) -> BestAnswers:
    """The first answer of `rank_answers` (to rounding, where two are as likely) for each question.

    A sharp distribution, as trained models have it, leaves a few candidates to be scored; a flat
    one leaves all, in a few rounds. The host waits for the device once in each.
    """
    states, candidates, first = _candidates(model, states, answers, k)
    lengths = torch.tensor(answers.packing.lengths, device=candidates.device)
    following = (lengths[candidates] - 2).clamp(min=0)
    bounds = first + _floor(model.label_smoothing, model.text_config.vocab_size) * following
    # The first token's loss comes out a little different in another batch.
    slack = 1e-3 if states.embeds[0].dtype == torch.float32 else 0.1
    bounds, order = bounds.sort(dim=1, stable=True)
    candidates = candidates.gather(1, order)
    losses = torch.full_like(bounds, math.inf)
    place = torch.arange(bounds.shape[1], device=bounds.device)
    start, size, scored = 0, _FIRST_ROUND, 0
    while start < bounds.shape[1]:
        best = losses.amin(1, keepdim=True)
        wanted = (bounds < best + slack) & (place >= start) & (place < start + size)
        chosen = wanted.nonzero()
        if not len(chosen):  # bounds rise: what comes later is not wanted either
            break
        of_chosen = candidates[wanted]
        losses[wanted] = _losses(model, states, answers, of_chosen, chosen[:, 0].tolist())
        start, size, scored = start + size, size * _GROWTH, scored + len(chosen)
    best, found = losses.min(1)
    answer_ids = candidates.gather(1, found[:, None]).squeeze(1)
    return BestAnswers(answer_ids, -best, scored)


def _candidates(
    model: AnswerDecoder, states: CrossStates, answers: PackedText, k: int
) -> tuple[CrossStates, Tensor, Tensor]:
    """The questions with K/V of all layers, their candidates and first tokens' losses `(B, k)`."""
    states = model.decoder.cross_states(*states.embeds, lengths=states.lengths, project=True)
    first = answers.input_ids[answers.packing.first_tokens + 1]
    logits = model.first_token_logits(states)
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    k = min(k, answers.packing.num_sequences)
    candidates = log_probs.exp()[:, first].topk(k, dim=1).indices
    own = log_probs.gather(1, first[candidates])
    smoothing = model.label_smoothing
    return states, candidates, -(1 - smoothing) * own - smoothing * log_probs.mean(1, keepdim=True)


def _floor(smoothing: float, vocabulary: int) -> float:
    """The least that a token can lose."""
    if smoothing == 0:
        return 0.0
    share = smoothing / vocabulary
    own = 1 - smoothing + share
    rest = (vocabulary - 1) * share
    return -(own * math.log(own) if own > 0 else 0.0) - rest * math.log(share)


def _losses(
    model: AnswerDecoder,
    states: CrossStates,
    answers: PackedText,
    chosen: Tensor,
    question_index: Sequence[int],
) -> Tensor:
    """`(A,)` summed token losses of the `chosen (A,)` answers, each to the question it names."""
    text = answers.select(chosen.tolist())
    inputs, labels = text.shifted()
    inputs = inputs.starting_with(model.text_config.dec_token_id)
    tree = PrefixTree.build(inputs, question_index)
    stream = model.decoder.stream(
        tree.text.input_ids,
        tree.text.packing,
        kv_index=tree.sets,
        causal=True,
        prefixes=tree.prefixes,
    )
    head, smoothing = model.lm_head, model.label_smoothing
    hidden = head.transform(run_streams([stream], states)[0])
    projection = head.decoder
    own = labels[tree.prefixes.first]  # one label of each node; the others differ by a logit
    losses = linear_cross_entropy(
        hidden,
        projection.weight,
        projection.bias,
        own,
        label_smoothing=smoothing,
        reduction="none",
    )

    def logits(nodes: Tensor, tokens: Tensor) -> Tensor:
        rows = hidden[nodes].to(losses.dtype) * projection.weight[tokens].to(losses.dtype)
        return rows.sum(-1) + projection.bias[tokens]

    nodes = tree.prefixes.nodes
    other = (labels != own[nodes]).nonzero().squeeze(1)
    of_other = nodes[other]
    losses = losses[nodes]
    losses[other] += (1 - smoothing) * (
        logits(of_other, own[of_other]) - logits(of_other, labels[other])
    )
    sums = losses.new_zeros(text.packing.num_sequences)
    return sums.index_add(0, inputs.packing.sequence_ids, losses)

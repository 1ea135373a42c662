"""VisDial v1.0 (section 5.5): candidate answers ranked for each round of a dialogue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blipfast.data import BlipTokenizer, Record, pre_caption, pre_question
from blipfast.errors import DataError
from blipfast.models.blip import PackedText
from blipfast.tasks.visdial import BlipForVisDial

_CAPTION_TOKENS, _DIALOGUE_TOKENS = 40, 200


@dataclass(frozen=True)
class Round:
    """One question: all turns before it and itself, its candidates, the right one if known.

    relevance: of each candidate, where annotated.
    """

    number: int
    turns: tuple[str, ...]
    candidates: tuple[str, ...]
    right: int | None
    relevance: tuple[float, ...] | None


def rounds_of(record: Record) -> tuple[str, list[Round]]:
    """Caption and rounds with candidates of a dialogue in shards.

    Raises DataError when it has none, or texts that do not fit each other.
    """
    by_source: dict[str, list[str]] = {}
    for entry in record.texts:
        by_source.setdefault(entry.source, []).append(entry.text)
    questions, answers = by_source.get("question", []), by_source.get("answer", [])
    rounds = []
    for number, _ in enumerate(questions, 1):
        candidates = tuple(by_source.get(f"option-{number}", ()))
        if not candidates:
            continue
        right = record.ids.get(f"gt-{number}")
        relevance = None
        if record.ids.get("relevance_round") == number:
            relevance = tuple(float(value) for value in str(record.ids["relevance"]).split())
        if relevance is not None and len(relevance) != len(candidates):
            raise DataError(
                f"{record.key}: {len(relevance)} relevances for {len(candidates)} candidates"
            )
        turns = [turn for pair in zip(questions, answers, strict=False) for turn in pair]
        before = (*turns[: 2 * number - 2], questions[number - 1])
        known = None if right is None else int(right)
        rounds.append(Round(number, before, candidates, known, relevance))
    if not rounds or len(by_source.get("caption", [])) != 1:
        raise DataError(f"{record.key}: it has no caption, or no round with candidates")
    return by_source["caption"][0], rounds


@torch.inference_mode()
def score_rounds(
    model: BlipForVisDial,
    tokenizer: BlipTokenizer,
    pixel_values: Tensor,
    caption: str,
    rounds: Sequence[Round],
) -> list[Tensor]:
    """Scores of each round's candidates; larger is better. The image, `(1, 3, size, size)`, and
    caption are encoded once for all rounds."""
    device = next(model.parameters()).device
    tokens = tokenizer(pre_caption(caption), _CAPTION_TOKENS, kind="raw").to(device)
    words = PackedText.from_padded(tokens.input_ids, tokens.attention_mask)
    states = model.dialogue_states(pixel_values, words)
    scores = []
    for one in rounds:
        limit = min(_DIALOGUE_TOKENS, model.text_config.max_positions)
        before = [pre_question(turn) for turn in one.turns]
        texts = [
            tokenizer.last_turns([*before, pre_question(answer)], limit)
            for answer in one.candidates
        ]
        said = tokenizer(texts, limit, kind="raw", allow_empty=True).to(device)
        dialogues = PackedText.from_padded(said.input_ids, said.attention_mask)
        scores.append(model.rank(states, dialogues, [0] * len(texts)).float().cpu())
    return scores


def ranks_of(scores: Tensor) -> list[int]:
    """The rank of each candidate, 1 for the best; equal scores keep their order."""
    order = scores.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1)
    return ranks.tolist()


def ndcg(ranks: Sequence[int], relevance: Sequence[float]) -> float:
    """Discounted gain among as many best candidates as are relevant, of the largest possible."""
    count = sum(value > 0 for value in relevance)
    if not count:
        return 0.0
    discounts = [1 / math.log2(place + 2) for place in range(count)]
    by_rank = [value for _, value in sorted(zip(ranks, relevance, strict=True))]
    ideal = sorted(relevance, reverse=True)
    gain = sum(value * d for value, d in zip(by_rank, discounts, strict=False))
    return gain / sum(value * d for value, d in zip(ideal, discounts, strict=False))


def visdial_metrics(rounds: Sequence[Round], ranks: Sequence[Sequence[int]]) -> dict[str, float]:
    """NDCG, MRR and R@k in percent, and mean rank, over the rounds where they are known."""
    right = [r[one.right] for one, r in zip(rounds, ranks, strict=True) if one.right is not None]
    gains = [
        ndcg(r, one.relevance)
        for one, r in zip(rounds, ranks, strict=True)
        if one.relevance is not None
    ]
    metrics = {}
    if gains:
        metrics["ndcg"] = 100 * sum(gains) / len(gains)
    if right:
        metrics["mrr"] = 100 * sum(1 / rank for rank in right) / len(right)
        for k in (1, 5, 10):
            metrics[f"r@{k}"] = 100 * sum(rank <= k for rank in right) / len(right)
        metrics["mean_rank"] = sum(right) / len(right)
    return metrics

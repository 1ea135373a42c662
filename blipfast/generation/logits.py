"""Changes to next-token scores before a token is chosen."""

from __future__ import annotations

import torch
from torch import Tensor


def penalise_repetition(scores: Tensor, sequences: Tensor, penalty: float) -> Tensor:
    """Scores `(N, V)` with those of the tokens in `sequences (N, L)` made worse by `penalty`.

    Positive scores are divided by it, negative ones multiplied (Keskar et al. 2019, section 4.1).
    """
    if penalty == 1.0:
        return scores
    seen = scores.gather(1, sequences)
    return scores.scatter(1, sequences, torch.where(seen < 0, seen * penalty, seen / penalty))


def forbid(scores: Tensor, token_id: int) -> Tensor:
    """Scores `(N, V)`, which are changed in place, with one token impossible."""
    scores[:, token_id] = -torch.inf
    return scores


def nucleus(scores: Tensor, *, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """What is sampled from, as `(probabilities, token_ids)`, `(N, k)` each, likeliest first.

    The `top_k` likeliest tokens (0: all), cut to the smallest set whose share among them reaches
    `top_p` (Holtzman et al. 2020, section 3.1); what is cut has probability 0. The likeliest stays.
    """
    size = scores.shape[-1]
    values, token_ids = scores.topk(min(top_k or size, size), dim=-1)
    probs = values.softmax(-1)
    # The sum of a token and all less likely ones, added up from the least likely for accuracy.
    tail = probs.flip(-1).cumsum(-1).flip(-1)
    cut = tail <= 1 - top_p
    cut[:, 0] = False
    return values.masked_fill(cut, -torch.inf).softmax(-1), token_ids

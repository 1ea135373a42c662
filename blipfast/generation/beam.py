"""Beam search, by the rules of the paper's code or by those of current transformers.

The two agree on what a beam's continuations are. They differ in what counts as a finished sequence,
how its length is measured and when an image is done; `_PaperRule` and `_CurrentRule` say how.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blipfast.errors import ConfigError
from blipfast.generation.decode import IncrementalDecoder
from blipfast.generation.logits import penalise_repetition
from blipfast.generation.options import GenerationOptions


@dataclass(frozen=True)
class Candidate:
    """A beam and the token that may continue it. score: summed log-probability."""

    score: float
    beam: int
    token: int


@dataclass
class _Search(ABC):
    """One image: running beams and finished sequences, as (score, tokens), best first."""

    options: GenerationOptions
    prompt: list[int]
    sep: int
    done: bool = False
    finished: list[tuple[float, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.beams = [list(self.prompt) for _ in range(self.options.num_beams)]
        self.chosen: list[Candidate] = []

    @property
    def length(self) -> int:
        return len(self.beams[0])

    @abstractmethod
    def advance(self, candidates: list[Candidate]) -> None:
        """Takes the `2 * num_beams` best continuations, best first."""

    def close(self) -> list[tuple[float, list[int]]]:
        """The finished sequences, best first, once no more tokens fit."""
        return self.finished

    def _finish(self, score: float, tokens: list[int]) -> None:
        self.finished.append((score, tokens))
        self.finished.sort(key=lambda item: -item[0])  # stable: of equals the earlier stays ahead
        del self.finished[self.options.num_beams :]

    def _continue(self, chosen: list[Candidate]) -> None:
        self.chosen = chosen
        self.beams = [[*self.beams[c.beam], c.token] for c in chosen]

    @property
    def _full(self) -> bool:
        return len(self.finished) == self.options.num_beams


class _PaperRule(_Search):
    """transformers 4.15: lengths count the prompt, not [SEP]; beams cut off at the end count."""

    def advance(self, candidates: list[Candidate]) -> None:
        n, length = self.options.num_beams, self.length
        scale = length**self.options.length_penalty
        for c in candidates[:n]:
            if c.token == self.sep:
                self._finish(c.score / scale, [*self.beams[c.beam], self.sep])
        self._continue([c for c in candidates if c.token != self.sep][:n])
        best = candidates[0].score
        self.done = self._full and self.finished[-1][0] >= best / scale

    def close(self) -> list[tuple[float, list[int]]]:
        if not self.done:
            for beam, c in zip(self.beams, self.chosen, strict=True):
                self._finish(c.score / len(beam) ** self.options.length_penalty, beam)
        return self.finished


class _CurrentRule(_Search):
    """transformers 5: the length is that of the generated tokens, [SEP] among them."""

    def advance(self, candidates: list[Candidate]) -> None:
        n = self.options.num_beams
        generated = self.length + 1 - len(self.prompt)
        last = self.length + 1 == self.options.max_length
        scale = generated**self.options.length_penalty
        for c in candidates[:n]:
            if last or c.token == self.sep:
                self._finish(c.score / scale, [*self.beams[c.beam], c.token])
        self._continue([c for c in candidates if c.token != self.sep][:n])
        best = self.chosen[0].score
        self.done = last or (self._full and best / scale <= self.finished[-1][0])


def beam_search(
    decoder: IncrementalDecoder, prompt_ids: Tensor, options: GenerationOptions
) -> list[list[tuple[float, list[int]]]]:
    """For each image its `num_return_sequences` best `(score, tokens)`, prompt included.

    prompt_ids: `(B, P)`. Raises ConfigError when the vocabulary has too few tokens for the beams.
    """
    if 2 * options.num_beams > decoder.config.vocab_size:
        raise ConfigError(
            f"num_beams {options.num_beams} is more than half the vocabulary "
            f"({decoder.config.vocab_size} tokens)"
        )
    sep = decoder.config.sep_token_id
    rule = _PaperRule if options.beam_length == "total" else _CurrentRule
    searches: list[_Search] = [rule(options, prompt, sep) for prompt in prompt_ids.tolist()]
    live = searches
    scores = torch.zeros(len(live), 1, device=prompt_ids.device)  # of each running beam
    logits = decoder.prefill(prompt_ids)[:, None]  # all beams start the same: one row will do
    while True:
        for search, candidates in zip(live, _candidates(logits, scores, live), strict=True):
            search.advance(candidates)
        going = [i for i, search in enumerate(live) if not search.done]
        if not going or live[going[0]].length == options.max_length:
            break
        if len(going) < len(live):
            live = [live[i] for i in going]
            decoder.keep(torch.tensor(going, device=prompt_ids.device))
        rows = [[(c.score, c.token, c.beam) for c in search.chosen] for search in live]
        table = torch.tensor(rows, dtype=torch.float64)  # exact for scores, tokens and beams
        scores = table[..., 0].to(prompt_ids.device, logits.dtype)
        tokens, parents = table[..., 1:].long().to(prompt_ids.device).unbind(-1)
        logits = decoder.step(tokens, parents)
    return [search.close()[: options.num_return_sequences] for search in searches]


def _candidates(logits: Tensor, scores: Tensor, live: list[_Search]) -> list[list[Candidate]]:
    """The `2 * num_beams` best continuations of each image, from logits `(B, n, V)`.

    The best of all beams are among the best of each, so only those are normalised.
    """
    options, sep = live[0].options, live[0].sep
    count = 2 * options.num_beams
    batch, beams, size = logits.shape
    flat, each = logits.flatten(0, 1), min(count + 1, size)  # one more, as [SEP] may be forbidden
    if options.penalty != 1.0:
        past = [search.beams[i] for search in live for i in range(beams)]
        past_ids = torch.tensor(past, device=logits.device)
        flat = penalise_repetition(flat.log_softmax(-1), past_ids, options.penalty)
        values, tokens = flat.topk(each, dim=-1)
    else:
        values, tokens = flat.topk(each, dim=-1)
        best = values[:, :1]
        values = values - best - (flat - best).exp().sum(-1, keepdim=True).log()
    if live[0].length < options.min_length:
        values = values.masked_fill(tokens == sep, -torch.inf)
    total = values.view(batch, beams, each) + scores[:, :, None]
    best, index = total.flatten(1).topk(count, dim=-1)
    tokens = tokens.view(batch, -1).gather(1, index)
    table = zip(best.tolist(), (index // each).tolist(), tokens.tolist(), strict=True)
    return [[Candidate(*c) for c in zip(*image, strict=True)] for image in table]

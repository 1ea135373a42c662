"""Greedy search and nucleus sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blipfast.generation.decode import IncrementalDecoder
from blipfast.generation.logits import forbid, nucleus, penalise_repetition
from blipfast.generation.options import GenerationOptions

# draw(probabilities (R, V), rows (R,), step) gives token ids (R,): see `generate`.
Draw = Callable[[Tensor, Tensor, int], Tensor]
_Choose = Callable[[Tensor, Tensor, int], Tensor]  # (scores, rows, step) to token ids


def sample(
    decoder: IncrementalDecoder,
    prompt_ids: Tensor,
    options: GenerationOptions,
    choose: _Choose,
) -> list[list[tuple[float, list[int]]]]:
    """For each image its sequences as `(log-likelihood, tokens)`, prompt included.

    The log-likelihood is the model's own, before penalties and cuts. prompt_ids: `(B, P)`.
    """
    n, sep, pad = decoder.rows, decoder.config.sep_token_id, decoder.config.pad_token_id
    batch, device = prompt_ids.shape[0], prompt_ids.device
    sequences = prompt_ids.repeat_interleave(n, 0)  # (B n, L), live images only
    rows = torch.arange(batch * n, device=device)
    total = torch.zeros(batch * n, device=device)
    ended = torch.zeros(batch * n, dtype=torch.bool, device=device)
    results: list[tuple[float, list[int]]] = [(0.0, [])] * (batch * n)

    def record(chosen: Tensor) -> None:
        items = zip(rows[chosen].tolist(), total[chosen].tolist(), sequences[chosen], strict=True)
        for row, score, tokens in items:
            results[row] = (score, tokens.tolist())

    logits = decoder.prefill(prompt_ids).repeat_interleave(n, 0)
    for step in range(options.max_length - prompt_ids.shape[1]):
        if step:
            logits = decoder.step(sequences[:, -1].view(-1, n)).flatten(0, 1)
        scores = penalise_repetition(logits, sequences, options.penalty)
        if sequences.shape[1] < options.min_length:
            scores = forbid(scores.clone(), sep)
        tokens = torch.where(ended, pad, choose(scores, rows, step))
        gain = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        total = total + gain.masked_fill(ended, 0.0)
        sequences = torch.cat([sequences, tokens[:, None]], dim=1)
        ended = ended | (tokens == sep)
        finished = ended.view(-1, n).all(1)
        if bool(finished.any()):  # these images are left behind
            record(finished.repeat_interleave(n))
            going = (~finished).nonzero()[:, 0]
            if going.numel() == 0:
                return _trimmed(results, n, sep)
            decoder.keep(going)
            left = (~finished).repeat_interleave(n)
            sequences, rows, total, ended = (x[left] for x in (sequences, rows, total, ended))
    record(torch.ones_like(ended))
    return _trimmed(results, n, sep)


def greedy(scores: Tensor, rows: Tensor, step: int) -> Tensor:
    """The likeliest token."""
    return scores.argmax(-1)


def nucleus_chooser(
    options: GenerationOptions, uniforms: Tensor | None, draw: Draw | None
) -> _Choose:
    """Samples by the row's own `uniforms (rows, steps)`, or by the caller's `draw`."""

    def choose(scores: Tensor, rows: Tensor, step: int) -> Tensor:
        if draw is not None:
            probs, token_ids = nucleus(scores, top_k=options.top_k, top_p=options.top_p)
            return draw(torch.zeros_like(scores).scatter(1, token_ids, probs), rows, step)
        assert uniforms is not None
        return take_nucleus(scores, uniforms[rows, step], options)

    return choose


def take_nucleus(scores: Tensor, uniforms: Tensor, options: GenerationOptions) -> Tensor:
    """Samples a token of each row of scores `(R, V)` by its `uniforms (R,)` in [0, 1), float64."""
    probs, token_ids = nucleus(scores, top_k=options.top_k, top_p=options.top_p)
    mass = probs.double().cumsum(-1)
    below = mass[:, -1:] * uniforms[:, None]
    place = torch.searchsorted(mass, below, right=True).clamp(max=mass.shape[-1] - 1)
    # Rounding must not reach into what was cut off.
    place = torch.minimum(place[:, 0], (probs > 0).sum(-1) - 1)
    return token_ids.gather(1, place[:, None])[:, 0]


def uniform_draws(seed: int, image_ids: Sequence[int], samples: int, steps: int) -> Tensor:
    """`(images * samples, steps)` float64 in [0, 1): a stream of its own for each image and sample.

    It depends on nothing else, so that an image gets the same caption in whatever batch it comes.
    """
    streams = []
    for image in image_ids:
        for sample_index in range(samples):
            key = f"{seed}/{image}/{sample_index}".encode()
            state = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
            generator = torch.Generator().manual_seed(state)
            streams.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(streams)


def _trimmed(
    results: list[tuple[float, list[int]]], n: int, sep: int
) -> list[list[tuple[float, list[int]]]]:
    """Without the padding that followed [SEP] while an image's other samples went on."""
    cut = [(score, until(tokens, sep)) for score, tokens in results]
    return [cut[i : i + n] for i in range(0, len(cut), n)]


def until(tokens: list[int], sep: int) -> list[int]:
    """Tokens up to the first [SEP], which is the last."""
    return tokens[: tokens.index(sep) + 1] if sep in tokens else tokens

"""`generate`: token ids from a decoder and what it looks at."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blipfast.errors import ConfigError
from blipfast.generation.beam import beam_search
from blipfast.generation.continuous import Arrivals, StreamSampler
from blipfast.generation.decode import Cross, IncrementalDecoder
from blipfast.generation.options import GenerationOptions
from blipfast.generation.sampling import (
    Draw,
    greedy,
    nucleus_chooser,
    sample,
    take_nucleus,
    uniform_draws,
)
from blipfast.models.streams import CrossStates
from blipfast.models.text import TextTransformer


@dataclass(frozen=True)
class Generation:
    """Generated sequences, `num_return_sequences` (n) of each image, best first for beam search.

    sequences: `(B n, L)` int64, prompt and [SEP] included, padded with [PAD] to the longest.
    lengths: `(B n,)` int64, tokens of each.
    scores: `(B n,)`; beam search: log-probability over length as `beam_length` says; else the
    log-likelihood of the generated tokens under the model.
    prompt_length: tokens at the start that were given.
    """

    sequences: Tensor
    lengths: Tensor
    scores: Tensor
    prompt_length: int

    def new_tokens(self, *, sep_token_id: int) -> list[list[int]]:
        """What was generated, without prompt, [SEP] and padding: cut by count, not by text."""
        rows = []
        for row, length in zip(self.sequences.tolist(), self.lengths.tolist(), strict=True):
            tokens = row[self.prompt_length : length]
            rows.append(tokens[:-1] if tokens and tokens[-1] == sep_token_id else tokens)
        return rows


def generate(
    decoder: TextTransformer,
    states: CrossStates,
    prompt_ids: Tensor,
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    image_ids: Sequence[int] | None = None,
    draw: Draw | None = None,
    cross: Cross = "auto",
    **options: Any,
) -> Generation:
    """Decodes a text for each of the `B` images (or questions) in `states`.

    prompt_ids: `(P,)` for all or `(B, P)`, starting with [DEC]; no padding.
    options: those of `GenerationOptions`.
    seed, image_ids: for nucleus. An image's draws depend on the seed, on its id (by default its
    place in the batch) and on the sample alone, so that batches may be cut anywhere. Without a seed
    one is drawn from `generator`, or from torch's global one.
    draw: for nucleus, draws itself: `draw(probabilities (R, V), rows (R,), step)` gives `(R,)` ids,
    `rows` naming `image * num_return_sequences + sample` of those not left behind yet.
    cross: how cross-attention is computed, see `IncrementalDecoder`.
    Raises ConfigError for an option out of range, an empty prompt, or one that leaves no room.
    """
    checked = _options(options)
    prompt = _prompt(decoder, states, prompt_ids, checked)
    uniforms = None
    if checked.method == "nucleus" and draw is None:
        uniforms = _uniforms(seed, generator, image_ids, states.size, checked).to(prompt.device)
    with torch.inference_mode():
        stepper = IncrementalDecoder(
            decoder,
            states,
            rows=checked.rows_per_image,
            max_length=checked.max_length,
            cross=cross,
        )
        # The decoder has taken autocast's dtype: conversions would cost more than the steps.
        with torch.autocast(prompt.device.type, enabled=False):
            if checked.is_greedy:
                found = sample(stepper, prompt, checked, greedy)
            elif checked.method == "beam":
                found = beam_search(stepper, prompt, checked)
            else:
                found = sample(stepper, prompt, checked, nucleus_chooser(checked, uniforms, draw))
    return _collect(found, decoder.config.pad_token_id, prompt)


def generate_stream(
    decoder: TextTransformer,
    states: Iterable[CrossStates],
    prompt_ids: Tensor,
    *,
    in_flight: int,
    seed: int = 0,
    image_ids: Iterable[int] | None = None,
    cross: Cross = "auto",
    **options: Any,
) -> Generation:
    """`generate`, greedy or nucleus, for a stream of images; the same draws for each, in its order.

    An image whose texts have ended makes room for the next (continuous batching).

    states: pieces of the stream, taken as there is room. prompt_ids: `(P,)`, for all.
    in_flight: images side by side at most, if no piece has more. image_ids: by default their places
    in the stream. Raises as `generate` does, and ConfigError for beam search.
    """
    checked = _options(options)
    if checked.method == "beam" and not checked.is_greedy:
        raise ConfigError("a stream is sampled or decoded greedily; give beam search its batches")
    pieces = iter(states)
    first = next(pieces, None)
    if first is None:
        raise ConfigError("generation needs at least one image; the stream is empty")
    prompt = _prompt(decoder, first, prompt_ids, checked)[0]
    ids = itertools.count() if image_ids is None else iter(image_ids)

    def arrivals() -> Iterator[Arrivals]:
        for piece in itertools.chain([first], pieces):
            its = list(itertools.islice(ids, piece.size))
            uniforms = None
            if checked.method == "nucleus":
                uniforms = _uniforms(seed, None, its, piece.size, checked).to(prompt.device)
            yield Arrivals(piece, uniforms)

    def choose(scores: Tensor, uniforms: Tensor) -> Tensor:
        return scores.argmax(-1) if checked.is_greedy else take_nucleus(scores, uniforms, checked)

    with torch.inference_mode():
        sampler = StreamSampler(decoder, prompt, checked, choose, in_flight=in_flight, cross=cross)
        return _collect(sampler.all(arrivals()), decoder.config.pad_token_id, prompt[None])


def _options(options: dict[str, Any]) -> GenerationOptions:
    known = GenerationOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown generation option {name!r}; there are {', '.join(known)}")
    return GenerationOptions(**options)


def _prompt(
    decoder: TextTransformer, states: CrossStates, prompt_ids: Tensor, options: GenerationOptions
) -> Tensor:
    prompt_ids = torch.as_tensor(prompt_ids, device=states.embeds[0].device)
    if prompt_ids.dim() == 1:
        prompt_ids = prompt_ids.expand(states.size, -1)
    if prompt_ids.dim() != 2 or prompt_ids.shape[0] != states.size:
        raise ConfigError(
            f"prompt_ids must be (P,) or ({states.size}, P), got {tuple(prompt_ids.shape)}"
        )
    if prompt_ids.is_floating_point() or prompt_ids.shape[1] == 0 or states.size == 0:
        raise ConfigError(
            "generation needs at least one image and one prompt token, [DEC], as integers; got "
            f"{tuple(prompt_ids.shape)} {prompt_ids.dtype}"
        )
    if prompt_ids.shape[1] >= options.max_length:
        raise ConfigError(
            f"the prompt has {prompt_ids.shape[1]} tokens, so max_length {options.max_length} "
            "leaves no room for a text: raise max_length, which counts the prompt"
        )
    low, high = int(prompt_ids.min()), int(prompt_ids.max())
    if low < 0 or high >= decoder.config.vocab_size:
        raise ConfigError(
            f"prompt_ids reach from {low} to {high}, outside the vocabulary of "
            f"{decoder.config.vocab_size}"
        )
    return prompt_ids.long()


def _uniforms(
    seed: int | None,
    generator: torch.Generator | None,
    image_ids: Sequence[int] | None,
    num_images: int,
    options: GenerationOptions,
) -> Tensor:
    if seed is not None and generator is not None:
        raise ConfigError("give a seed or a generator, not both")
    if seed is None:
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
    ids = range(num_images) if image_ids is None else image_ids
    if len(ids) != num_images:
        raise ConfigError(f"{len(ids)} image_ids came with {num_images} images")
    return uniform_draws(seed, ids, options.num_return_sequences, options.max_length)


def _collect(
    found: list[list[tuple[float, list[int]]]], pad_token_id: int, prompt: Tensor
) -> Generation:
    rows = [row for image in found for row in image]
    longest = max(len(tokens) for _, tokens in rows)
    padded = [tokens + [pad_token_id] * (longest - len(tokens)) for _, tokens in rows]
    device = prompt.device
    return Generation(
        torch.tensor(padded, device=device),
        torch.tensor([len(tokens) for _, tokens in rows], device=device),
        torch.tensor([score for score, _ in rows], device=device),
        prompt.shape[1],
    )


@contextmanager
def evaluation(*modules: nn.Module) -> Iterator[None]:
    """The modules in evaluation mode within a block, and as they were after it."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True

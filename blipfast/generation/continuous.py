"""Sampling for a stream of images: an image whose texts have ended makes room for the next.

Texts of one image end early, those of another late; in a batch that ends with its longest text the
last steps read all of the decoder's weights for a few rows. Here the number of rows stays up until
the images run out. What is drawn for an image does not depend on its neighbours (`uniform_draws`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from blipfast.generation.decode import Cross, IncrementalDecoder
from blipfast.generation.logits import penalise_repetition
from blipfast.generation.options import GenerationOptions
from blipfast.generation.sampling import until
from blipfast.models.streams import CrossStates
from blipfast.models.text import TextTransformer

Choose = Callable[[Tensor, Tensor], Tensor]  # scores (R, V) and uniforms (R,) to token ids (R,)
Sequences = list[tuple[float, list[int]]]  # of one image: `(log-likelihood, tokens)`


class PlacesDecoder(IncrementalDecoder):
    """A decoder whose images came at different times: each has a place and its own length.

    `prefill` fills the first places; `join` brings the images of another decoder after its prefill.
    """

    def prefill(self, prompt_ids: Tensor) -> Tensor:
        logits = super().prefill(prompt_ids)
        self._prompt_length = prompt_ids.shape[1]
        self.lengths = prompt_ids.new_full((self.num_images,), self._prompt_length)
        for tensor in (each for layer in self._cache for each in layer):
            tensor[:, :, self._prompt_length :] = 0  # hidden, but a NaN would come through
        if self._mask is None:  # one row each: what is not written yet must still be hidden
            shape = (self.num_images, 1, self._cache[0][0].shape[2])
            self._mask = torch.full(shape, -torch.inf, dtype=self.dtype, device=prompt_ids.device)
            self._mask[:, :, : self._prompt_length] = 0
        return logits

    def join(self, other: PlacesDecoder, places: Tensor | None) -> None:
        """Takes the images of `other` into places of their own, or into new ones (None)."""
        assert self._mask is not None
        assert other._mask is not None
        if places is None:
            self.num_images += other.num_images
            self._cross.append(other._cross)
            self._cache = [
                (torch.cat([k, new_k]), torch.cat([v, new_v]))
                for (k, v), (new_k, new_v) in zip(self._cache, other._cache, strict=True)
            ]
            self._mask = torch.cat([self._mask, other._mask])
            self.lengths = torch.cat([self.lengths, other.lengths])
            return
        self._cross.replace(places, other._cross)
        for (k, v), (new_k, new_v) in zip(self._cache, other._cache, strict=True):
            k[places, :, : self._prompt_length] = new_k[:, :, : self._prompt_length]
            v[places, :, : self._prompt_length] = new_v[:, :, : self._prompt_length]
        self._mask[places] = other._mask
        self.lengths[places] = other.lengths

    def step(self, token_ids: Tensor, parents: Tensor | None = None) -> Tensor:
        """The newest tokens `(B, rows)` to the next tokens' logits `(B, rows, V)`."""
        assert parents is None
        assert self._mask is not None
        images = torch.arange(self.num_images, device=token_ids.device)[:, None]
        own = torch.arange(self.rows, device=token_ids.device)
        start = self._prompt_length + self.rows * (self.lengths - self._prompt_length)
        slots = start[:, None] + own  # (B, rows)
        self._mask[images, own, slots] = 0
        stop = int(slots.max()) + 1

        def write(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = self._cache[layer]
            keys[images, :, slots], values[images, :, slots] = k.transpose(1, 2), v.transpose(1, 2)
            return keys[:, :, :stop], values[:, :, :stop]

        place = self._positions[self.lengths][:, None]
        hidden = self._run(token_ids, place, self._mask[:, None, :, :stop], write)
        self.lengths = self.lengths + 1
        return self._logits(hidden.flatten(0, 1)).unflatten(0, token_ids.shape)

    def keep(self, images: Tensor) -> None:
        super().keep(images)
        self.lengths = self.lengths[images]


class Arrivals(NamedTuple):
    """Images that come together: what is looked at, and each row's uniform draws, if it samples."""

    states: CrossStates
    uniforms: Tensor | None


@dataclass
class _Texts:
    """The texts in the places, `n` of each image.

    image: `(P,)` its number in the stream, -1 for an empty place. tokens: `(P, n, max_length)`,
    filled up with the first token, which is in every text. total: `(P, n)` log-likelihoods.
    ended: `(P, n)`. uniforms: `(P, n, steps)`; of width 0 where nothing is drawn.
    """

    image: Tensor
    tokens: Tensor
    total: Tensor
    ended: Tensor
    uniforms: Tensor

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def join(self, other: _Texts, places: Tensor | None) -> None:
        """As `PlacesDecoder.join`."""
        for name, new in other._tensors().items():
            if places is None:
                setattr(self, name, torch.cat([getattr(self, name), new]))
            else:
                getattr(self, name)[places] = new

    def keep(self, places: Tensor) -> None:
        for name, tensor in self._tensors().items():
            setattr(self, name, tensor[places])


class StreamSampler:
    """Samples texts for all images of a stream.

    prompt: `(P,)` token ids, the same for all. choose: how a row takes its token.
    in_flight: images side by side at most, unless more come together.
    """

    def __init__(
        self,
        module: TextTransformer,
        prompt: Tensor,
        options: GenerationOptions,
        choose: Choose,
        *,
        in_flight: int,
        cross: Cross = "auto",
    ) -> None:
        self.module, self.prompt, self.options, self.choose = module, prompt, options, choose
        self.in_flight, self.cross = in_flight, cross
        self.sep, self.pad = module.config.sep_token_id, module.config.pad_token_id
        self.n = options.rows_per_image
        self.came = 0
        self.found: dict[int, Sequences] = {}
        self.decoder: PlacesDecoder | None = None  # None: nothing is under way
        self.texts: _Texts

    def all(self, stream: Iterable[Arrivals]) -> list[Sequences]:
        """For each image its sequences, prompt included, in the order of the stream."""
        waiting = iter(stream)
        coming = next(waiting, None)
        while coming is not None or self.decoder is not None:
            while coming is not None and self._admit(coming):
                coming = next(waiting, None)
            self._take_out(nothing_comes=coming is None)
            if self.decoder is not None:
                place = self.decoder.lengths[:, None, None].expand(-1, self.n, 1)
                newest = self.texts.tokens.gather(2, place)[:, :, 0]
                with torch.autocast(newest.device.type, enabled=False):
                    self._choose(self.decoder, self.texts, self.decoder.step(newest))
        return [self.found[image] for image in range(self.came)]

    def _admit(self, coming: Arrivals) -> bool:
        """Takes images in and chooses their first tokens; False while there is no room."""
        size, free = coming.states.size, None
        if self.decoder is not None:
            free = (self.texts.image < 0).nonzero()[:, 0]
            if free.numel() < size and self.decoder.num_images + size > self.in_flight:
                return False
        decoder = PlacesDecoder(
            self.module, coming.states, rows=self.n, max_length=self.options.max_length,
            cross=self.cross,
        )  # fmt: skip
        texts = self._fresh(coming)
        # The decoder has taken autocast's dtype: conversions would cost more than the steps.
        with torch.autocast(self.prompt.device.type, enabled=False):
            logits = decoder.prefill(self.prompt.expand(size, -1))
            self._choose(decoder, texts, logits[:, None].expand(-1, self.n, -1))
        if self.decoder is None or free is None:
            self.decoder, self.texts = decoder, texts
        else:
            places = free[:size] if free.numel() >= size else None
            self.decoder.join(decoder, places)
            self.texts.join(texts, places)
        return True

    def _fresh(self, coming: Arrivals) -> _Texts:
        size, device = coming.states.size, self.prompt.device
        tokens = self.prompt[:1].repeat(size, self.n, self.options.max_length)
        tokens[:, :, : len(self.prompt)] = self.prompt
        uniforms = torch.empty(size * self.n, 0, device=device)
        if coming.uniforms is not None:
            uniforms = coming.uniforms
        self.came += size
        return _Texts(
            torch.arange(self.came - size, self.came, device=device),
            tokens,
            torch.zeros(size, self.n, device=device),
            torch.zeros(size, self.n, dtype=torch.bool, device=device),
            uniforms.view(size, self.n, -1),
        )

    def _choose(self, decoder: PlacesDecoder, texts: _Texts, logits: Tensor) -> None:
        """Each text's next token, from logits `(P, n, V)`."""
        rows, place = logits.flatten(0, 1), decoder.lengths.repeat_interleave(self.n)
        scores = penalise_repetition(rows, texts.tokens.flatten(0, 1), self.options.penalty)
        if scores is rows:
            scores = scores.clone()
        short = place < self.options.min_length
        scores[:, self.sep].masked_fill_(short, -torch.inf)
        uniforms = texts.uniforms.flatten(0, 1)
        if uniforms.shape[1]:
            uniforms = uniforms.gather(1, (place - len(self.prompt))[:, None])[:, 0]
        ended = texts.ended.flatten()
        tokens = torch.where(ended, self.pad, self.choose(scores, uniforms))
        gain = rows.gather(1, tokens[:, None])[:, 0] - rows.logsumexp(-1)
        texts.total += gain.masked_fill(ended, 0.0).view_as(texts.total)
        texts.tokens.flatten(0, 1).scatter_(1, place[:, None], tokens[:, None])
        texts.ended |= (tokens == self.sep).view_as(texts.ended)

    def _take_out(self, *, nothing_comes: bool) -> None:
        """Writes down the images that are done, and empties their places."""
        decoder, texts = self.decoder, self.texts
        if decoder is None:
            return
        full = decoder.lengths + 1 >= self.options.max_length
        done = (texts.image >= 0) & (texts.ended.all(1) | full)
        if not bool(done.any()):
            return
        numbers, totals = texts.image[done].tolist(), texts.total[done].tolist()
        for number, total, tokens in zip(numbers, totals, texts.tokens[done].tolist(), strict=True):
            self.found[number] = [
                (score, until(row, self.sep)) for score, row in zip(total, tokens, strict=True)
            ]
        texts.image[done] = -1
        decoder.lengths[done] = len(self.prompt)  # an empty place must not run out of its slots
        left = (texts.image >= 0).nonzero()[:, 0]
        if left.numel() == 0:
            self.decoder = None
        elif nothing_comes:
            decoder.keep(left)
            texts.keep(left)

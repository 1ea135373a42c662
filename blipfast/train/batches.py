"""Batches from shards: shuffled by a seed, decoded by threads, with bad records set aside.

The order, the crops and the drawn texts depend on the seed, the epoch and the place in it alone,
not on threads, timing or the number of ranks, so that a resumed run sees what an uninterrupted one
would have seen, and every sample of an epoch is seen once (`blipfast.data.shares`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blipfast.data import (
    BadRecord,
    BlipTokenizer,
    TrainTransform,
    View,
    normalise,
    pre_caption,
    pre_question,
    read_shards,
)
from blipfast.data.ahead import ahead
from blipfast.data.decode import DaliDecoder, Job, pick_loader, plan_job
from blipfast.data.index import RecordReader, ShardIndex, index_shards
from blipfast.data.order import EpochOrder, Source, turn_of
from blipfast.data.shares import Shares, State, combine_positions
from blipfast.errors import DataError
from blipfast.train.config import DataConfig, TaskName
from blipfast.train.loading import Loaded, Place, Results, load_by_dali, load_by_pillow
from blipfast.train.samples import Sample, Units, read_sample, units_of

__all__ = ["ShardBatches", "count_samples"]

_ANSWER_LIMIT = 64  # tokens; answers are a few words long
_MAX_WORDS: dict[str, int] = {"nlvr": 40, "vqa": 50}
_EARLY_STOP_AFTER = 200
_BATCHES_AHEAD = 2
_SIDES = re.compile(r"\b(left|right)\b")


@dataclass(frozen=True)
class _Set:
    """One data set: the samples of each of its shards."""

    shards: list[ShardIndex]
    units: list[Units]
    share: int

    @property
    def sizes(self) -> list[int]:
        return [len(units) for units in self.units]


def _open_sets(config: DataConfig, task: TaskName) -> tuple[list[_Set], list[BadRecord]]:
    """All data sets of a configuration, and what of them makes no sample."""
    sets, bad = [], []
    for pattern, weight in config.sources.items():
        shards = index_shards(read_shards(pattern).shards, config.threads)
        found = [units_of(shard, task, config.texts == "each") for shard in shards]
        bad += [one for shard in shards for one in shard.bad]
        bad += [one for _, odd in found for one in odd]
        units = [units for units, _ in found]
        total = sum(len(one) for one in units)
        if not total:
            shown = "; ".join(f"{b.key}: {b.reason}" for b in bad[:3])
            raise DataError(f"the shards {pattern} hold no usable sample. First faults: {shown}")
        sets.append(_Set(shards, units, max(1, round(weight * total))))
    return sets, bad


def count_samples(config: DataConfig, task: TaskName) -> int:
    """Samples of one epoch, by the shards' indexes alone: no image is read.

    Records whose image cannot be decoded count too. Raises DataError when no shard matches.
    """
    return sum(one.share for one in _open_sets(config, task)[0])


class ShardBatches:
    """Endless batches for a task, epoch after epoch; for one of several ranks.

    A batch is a dict: `pixel_values (B, 3, size, size)` (NLVR2: `(B, 2, 3, size, size)`) float32,
    `input_ids` and `attention_mask` `(B, L)` int64 right-padded, `image_ids (B,)` int64, `keys`
    (list of str) and `position` (where this rank goes on after it). Captioning adds
    `prompt_length`; VisDial `dialogue_ids`, `dialogue_mask` `(2B, L)`, `image_index (2B,)` and
    `labels (2B,)`; VQA `answer_ids`, `answer_mask` `(A, L)`, `answers_per_question` and
    `weights (A,)`; NLVR2 `labels (B,)`.

    Args:
        config: shards, batch size, augmentation, order.
        tokenizer: of the model's vocabulary.
        image_size: of the model.
        task: what a record means, see `blipfast.train.samples`.
        rank, world_size: which part of each epoch to take.
        device: where images are normalised and DALI decodes; what is not pixels stays on the CPU.

    Attributes:
        quarantine: the records that were set aside, each once, and why.

    Raises:
        ConfigError: DALI is asked for and not installed.
        DataError: no shard matches; while iterating, too many bad records, or none left.
    """

    combine_positions = staticmethod(combine_positions)

    def __init__(
        self,
        config: DataConfig,
        tokenizer: BlipTokenizer,
        image_size: int,
        task: TaskName,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.image_size, self.device = image_size, torch.device(device)
        self.loader = pick_loader(config.loader, self.device)
        self._transform = TrainTransform(image_size, scale=config.crop_scale, flip=config.flip)
        prompt = tokenizer(config.prompt, kind="raw", allow_empty=True)
        self.prompt_length = prompt.input_ids.shape[1] - 1  # [DEC] and the prompt, without [SEP]
        self._sets, bad = _open_sets(config, task)
        self.quarantine: list[BadRecord] = bad if rank == 0 else []
        self._set_aside = {(one.shard, one.key) for one in bad}
        self._on_quarantine: Callable[[BadRecord], None] | None = None
        self._reader = RecordReader()
        even = config.even_lengths and config.shuffle_buffer > 0
        turn = turn_of(config.batch_size, world_size, even)
        self._shares = Shares(self._order, self._words, rank, turn)
        self._check(sum(sum(one.sizes) for one in self._sets), len(bad))

    @property
    def samples(self) -> int:
        """Of one epoch, over all ranks."""
        return sum(one.share for one in self._sets)

    @property
    def mean_words(self) -> float:
        """Of a sample's text."""
        lengths = [units.words for one in self._sets for units in one.units]
        return float(np.concatenate(lengths).mean())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.stream(None)

    def stream(self, state: State | None) -> Iterator[dict[str, Any]]:
        """Batches without end, which go on over the end of an epoch: no sample is lost.

        state: what `combine_positions` made of all ranks' positions, or None for the start.
        """
        if state is not None and "turn" in state:
            state = combine_positions([state])
        share = self._shares.remaining(0, []).share_size(self._shares.rank, self._shares.turn)
        if share < self.config.batch_size:
            raise DataError(
                f"the shards {self.config.shards} do not fill one batch of "
                f"{self.config.batch_size} on each rank; lower data.batch_size or add data"
            )
        yield from self._batches(self._shares.stream(state), state, drop_last=True)

    def epoch(self, epoch: int) -> Iterator[dict[str, Any]]:
        """The batches of one epoch alone; the last may be smaller, unless `data.drop_last`."""
        return self._batches(self._shares.epoch(epoch), None, self.config.drop_last)

    def _order(self, epoch: int) -> EpochOrder:
        seed, window = self.config.seed, self.config.shuffle_buffer
        sources = [
            Source(one.sizes, one.share, seed + 7_919 * number, window > 0)
            for number, one in enumerate(self._sets)
        ]
        return EpochOrder(sources, epoch, seed, window)

    def _words(self, order: EpochOrder, position: int) -> int:
        number, shard, sample = order[position]
        return int(self._sets[number].units[shard].words[sample])

    def _batches(
        self, places: Iterator[tuple[int, int, int]], state: State | None, drop_last: bool
    ) -> Iterator[dict[str, Any]]:
        """Batches of the samples at `places`, made a little ahead of their use."""
        return ahead(self._made(places, state, drop_last), _BATCHES_AHEAD)

    def _made(
        self, places: Iterator[tuple[int, int, int]], state: State | None, drop_last: bool
    ) -> Iterator[dict[str, Any]]:
        ready: list[Loaded] = []
        good = bad = 0
        place: Place | None = None
        with ThreadPoolExecutor(self.config.threads, "blipfast-decode") as pool:
            try:
                for now, result in self._loaded(self._located(places), pool):
                    if place is not None and now.epoch != place.epoch:
                        self._check(good, bad)
                        good, bad = 0, 0
                    place = now
                    if isinstance(result, DataError):
                        bad += 1
                        self._put_aside(now, str(result))
                        if good + bad >= _EARLY_STOP_AFTER:
                            self._check(good, bad)
                        continue
                    ready.append(result)
                    good += 1
                    if len(ready) == self.config.batch_size:
                        yield self._collate(ready, now, state)
                        ready = []
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        self._check(good, bad)
        if ready and not drop_last and place is not None:
            yield self._collate(ready, place, state)

    def _located(self, places: Iterator[tuple[int, int, int]]) -> Iterator[Place]:
        order: EpochOrder | None = None
        for epoch, position, taken in places:
            if order is None or order.epoch != epoch:
                order = self._order(epoch)
            number, shard, sample = order[position]
            index, units = self._sets[number].shards[shard], self._sets[number].units[shard]
            row, text = int(units.row[sample]), int(units.text[sample])
            yield Place(epoch, position, taken, index, row, text)

    def _loaded(self, places: Iterator[Place], pool: ThreadPoolExecutor) -> Results:
        batch = self.config.batch_size
        if self.loader == "torch":
            return load_by_pillow(places, self._read, pool, 2 * batch)
        images = 2 * batch if self.task == "nlvr" else batch
        side, threads = self.image_size, self.config.threads
        decoder = DaliDecoder(side, images, threads, self.device, pool)
        return load_by_dali(places, self._read, pool, decoder, batch)

    def _read(self, place: Place) -> tuple[Sample, list[Job]]:
        """A sample and how its images are to be looked at. Raises DataError saying what is wrong
        with it."""
        rng = np.random.default_rng([self.config.seed, place.epoch, place.position])
        draw = int(rng.integers(1 << 30)) if place.text < 0 else 0
        sample = read_sample(self._reader, place.index, place.row, place.text, self.task, draw)
        # A text without a token sets the record aside as well.
        self.tokenizer(self._clean(sample)[len(self.config.prompt) :], kind="raw")
        jobs = [
            plan_job(sample.key, image, lambda width, height: self._plan(width, height, rng))
            for image in sample.images
        ]
        return sample, jobs

    def _plan(self, width: int, height: int, rng: np.random.Generator) -> View:
        if self.config.augment:
            return self._transform.plan(width, height, rng)
        return View(self.image_size, (0, 0, width, height))

    def _put_aside(self, place: Place, reason: str) -> None:
        bad = BadRecord(str(place.index.shard), place.key, reason)
        if (bad.shard, bad.key) not in self._set_aside:
            self._set_aside.add((bad.shard, bad.key))
            self.quarantine.append(bad)
            if self._on_quarantine is not None:
                self._on_quarantine(bad)

    def tell_quarantine(self, told: Callable[[BadRecord], None]) -> None:
        """Calls `told` with each record that was set aside, and from now on with each that is."""
        self._on_quarantine = told
        for bad in self.quarantine:
            told(bad)

    def _clean(self, sample: Sample) -> str:
        if self.task == "vqa":
            text = pre_question(sample.text, _MAX_WORDS["vqa"])
        else:
            text = pre_caption(sample.text, _MAX_WORDS.get(self.task, 30))
        return self.config.prompt + text

    def _collate(self, items: list[Loaded], last: Place, state: State | None) -> dict[str, Any]:
        samples = [sample for sample, _ in items]
        squares = np.stack([np.stack(images) for _, images in items])
        pixels = torch.from_numpy(squares if self.task == "nlvr" else squares[:, 0])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        # As bytes: a quarter of what float32 would move.
        pixel_values = normalise(pixels.to(self.device, non_blocking=True))
        texts = [self._clean(sample) for sample in samples]
        if self.task == "nlvr" and self.config.augment:
            pixel_values, texts = self._swap_sides(pixel_values, texts, last)
        tokens = self.tokenizer(texts, max_length=self.config.max_length, kind="raw")
        batch: dict[str, Any] = {
            "pixel_values": pixel_values,
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "image_ids": torch.tensor([sample.image_id for sample in samples]),
            "keys": [sample.key for sample in samples],
            "position": self._shares.position(last.epoch, last.taken, state),
        }
        if self.task == "caption":
            batch["prompt_length"] = self.prompt_length
        elif self.task == "nlvr":
            batch["labels"] = torch.tensor([sample.label for sample in samples])
        elif self.task == "visdial":
            batch |= self._dialogues(samples)
        elif self.task == "vqa":
            flat = [answer for sample in samples for answer in sample.answers]
            words = [answer for answer, _ in flat]
            answers = self.tokenizer(words, _ANSWER_LIMIT, kind="raw", allow_empty=True)
            batch["answer_ids"], batch["answer_mask"] = answers.input_ids, answers.attention_mask
            batch["answers_per_question"] = [len(sample.answers) for sample in samples]
            batch["weights"] = torch.tensor([weight for _, weight in flat])
        return batch

    def _dialogues(self, samples: list[Sample]) -> dict[str, Any]:
        """History, question and a right or wrong answer as one text, for each sample two."""
        texts, labels, limit = [], [], self.config.max_dialogue_length
        for sample in samples:
            for answer, weight in sample.answers:
                turns = [pre_question(text) for text in (*sample.history, answer)]
                texts.append(self.tokenizer.last_turns(turns, limit))
                labels.append(int(weight))
        tokens = self.tokenizer(texts, limit, kind="raw", allow_empty=True)
        return {
            "dialogue_ids": tokens.input_ids,
            "dialogue_mask": tokens.attention_mask,
            "image_index": torch.arange(len(samples)).repeat_interleave(2),
            "labels": torch.tensor(labels),
        }

    def _swap_sides(
        self, pixel_values: Tensor, texts: list[str], last: Place
    ) -> tuple[Tensor, list[str]]:
        """Half of NLVR2's pairs change places, and "left" and "right" in their texts with them."""
        rng = np.random.default_rng([self.config.seed, last.epoch, last.position, 1])
        swap = rng.random(len(texts)) < 0.5
        other = {"left": "right", "right": "left"}
        texts = [
            _SIDES.sub(lambda side: other[side.group()], text) if swapped else text
            for text, swapped in zip(texts, swap, strict=True)
        ]
        mask = torch.from_numpy(swap).view(-1, 1, 1, 1, 1).to(pixel_values.device)
        return torch.where(mask, pixel_values.flip(1), pixel_values), texts

    def _check(self, good: int, bad: int) -> None:
        """Raises DataError when too many of the samples are bad."""
        seen, limit = good + bad, self.config.max_bad_fraction
        if bad <= limit * seen:
            return
        shown = "; ".join(f"{b.key}: {b.reason}" for b in self.quarantine[:3])
        raise DataError(
            f"{bad} of {seen} samples cannot be used, more than data.max_bad_fraction={limit} "
            f"allows. First ones: {shown}"
        )

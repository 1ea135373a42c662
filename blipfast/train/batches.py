"""Batches from shards: shuffled by a seed, decoded by threads, with bad records set aside.

The order, the crops and the drawn texts depend on the seed, the epoch and the place in it alone,
not on threads or timing, so that a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blipfast.data import (
    BadRecord,
    BlipTokenizer,
    EvalTransform,
    Record,
    ShardReader,
    TrainTransform,
    load_image,
    pre_caption,
    pre_question,
    read_shards,
)
from blipfast.errors import DataError
from blipfast.train.config import DataConfig, TaskName
from blipfast.train.samples import Sample, count_samples, samples_of

__all__ = ["ShardBatches", "count_samples"]

_ANSWER_LIMIT = 64  # tokens; answers are a few words long
_MAX_WORDS: dict[str, int] = {"nlvr": 40, "vqa": 50}
_EARLY_STOP_AFTER = 200
_SIDES = re.compile(r"\b(left|right)\b")


class ShardBatches:
    """Endless batches for a task, epoch after epoch.

    A batch is a dict: `pixel_values (B, 3, size, size)` (NLVR2: `(B, 2, 3, size, size)`) float32,
    `input_ids` and `attention_mask` `(B, L)` int64 right-padded, `image_ids (B,)` int64, `keys`
    (list of str) and `position` (where to go on after it). Captioning adds `prompt_length`; VQA
    `answer_ids`, `answer_mask` `(A, L)`, `answers_per_question` and `weights (A,)`; NLVR2
    `labels (B,)`.

    Args:
        config: shards, batch size, augmentation, order.
        tokenizer: of the model's vocabulary.
        image_size: of the model.
        task: what a record means, see `blipfast.train.samples`.

    Attributes:
        quarantine: the records of the current epoch that were set aside, and why.

    Raises:
        DataError: no shard matches; while iterating, too many bad records, or none left.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: BlipTokenizer,
        image_size: int,
        task: TaskName,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.shards = read_shards(config.shards).shards
        self.augment = TrainTransform(image_size, scale=config.crop_scale, flip=config.flip)
        self.resize = EvalTransform(image_size)
        self.quarantine: list[BadRecord] = []
        prompt = tokenizer(config.prompt, kind="raw", allow_empty=True)
        self.prompt_length = prompt.input_ids.shape[1] - 1  # [DEC] and the prompt, without [SEP]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.stream(None)

    def stream(self, position: dict[str, int] | None) -> Iterator[dict[str, Any]]:
        """Batches without end, from the start or after the batch that had `position`."""
        epoch, taken = (position["epoch"], position["taken"]) if position else (0, 0)
        while True:
            batches = 0
            for batch in self.epoch(epoch, taken):
                batches += 1
                yield batch
            if not batches and not taken:
                raise DataError(
                    f"the shards {self.config.shards} do not fill one batch of "
                    f"{self.config.batch_size}; lower data.batch_size or add data"
                )
            epoch, taken = epoch + 1, 0

    @staticmethod
    def combine_positions(positions: list) -> dict:
        return positions[0]

    def epoch(self, epoch: int, taken: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of one epoch after its first `taken` samples."""
        size, good = self.config.batch_size, 0
        self.quarantine = []
        ready: list[tuple[Sample, Tensor]] = []
        last = taken
        pool = ThreadPoolExecutor(self.config.threads, "blipfast-decode")
        try:
            for index, sample, future in self._decoded(epoch, taken, pool):
                last = index + 1
                try:
                    ready.append((sample, future.result()))
                    good += 1
                except DataError as error:
                    self.quarantine.append(BadRecord("", sample.key, str(error)))
                    self._check(good, at_end=False)
                    continue
                if len(ready) == size:
                    yield self._collate(ready, epoch, last)
                    ready = []
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        self._check(good, at_end=True)
        if ready and not self.config.drop_last:
            yield self._collate(ready, epoch, last)

    def _decoded(
        self, epoch: int, taken: int, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, Sample, Future[Tensor]]]:
        """Samples in order, with their images under way a batch or two ahead."""
        waiting: deque[tuple[int, Sample, Future[Tensor]]] = deque()
        for index, sample in enumerate(self._shuffled(epoch)):
            if index < taken or index % self.world_size != self.rank:
                continue
            waiting.append((index, sample, pool.submit(self._pixels, sample, epoch, index)))
            if len(waiting) > 2 * self.config.batch_size:
                yield waiting.popleft()
        yield from waiting

    def _shuffled(self, epoch: int) -> Iterator[Sample]:
        rng = np.random.default_rng([self.config.seed, epoch])
        room = self.config.shuffle_buffer
        order = rng.permutation(len(self.shards)) if room else range(len(self.shards))
        reader = ShardReader([self.shards[i] for i in order], self.config.max_bad_fraction, False)
        draw = rng if self.config.texts == "random" else None
        buffer: list[Sample] = []
        for sample in samples_of(self._watched(reader), self.task, self.quarantine.append, draw):
            if len(buffer) < room:
                buffer.append(sample)
                continue
            if room:
                i = int(rng.integers(room))
                sample, buffer[i] = buffer[i], sample
            yield sample
        for i in rng.permutation(len(buffer)):
            yield buffer[i]

    def _watched(self, reader: ShardReader) -> Iterable[Record]:
        yield from reader
        self.quarantine += reader.quarantine

    def _pixels(self, sample: Sample, epoch: int, index: int) -> Tensor:
        """`(3, size, size)`, or a pair's `(2, 3, size, size)`. Raises DataError naming the key."""
        rng = np.random.default_rng([self.config.seed, epoch, index])
        images = [load_image(image, sample.key) for image in sample.images]
        if self.config.augment:
            views = [self.augment(image, sample.key, rng) for image in images]
        else:
            views = [self.resize(image, sample.key) for image in images]
        # A text without a token sets the record aside as well.
        self.tokenizer(self._clean(sample)[len(self.config.prompt) :], kind="raw")
        return torch.stack(views) if len(views) > 1 else views[0]

    def _clean(self, sample: Sample) -> str:
        if self.task == "vqa":
            text = pre_question(sample.text, _MAX_WORDS["vqa"])
        else:
            text = pre_caption(sample.text, _MAX_WORDS.get(self.task, 30))
        return self.config.prompt + text

    def _collate(
        self, items: list[tuple[Sample, Tensor]], epoch: int, taken: int
    ) -> dict[str, Any]:
        samples = [sample for sample, _ in items]
        pixel_values = torch.stack([pixels for _, pixels in items])
        texts = [self._clean(sample) for sample in samples]
        if self.task == "nlvr" and self.config.augment:
            pixel_values, texts = self._swap_sides(pixel_values, texts, epoch, taken)
        tokens = self.tokenizer(texts, max_length=self.config.max_length, kind="raw")
        batch: dict[str, Any] = {
            "pixel_values": pixel_values,
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "image_ids": torch.tensor([sample.image_id for sample in samples]),
            "keys": [sample.key for sample in samples],
            "position": {"epoch": epoch, "taken": taken},
        }
        if self.task == "caption":
            batch["prompt_length"] = self.prompt_length
        elif self.task == "nlvr":
            batch["labels"] = torch.tensor([sample.label for sample in samples])
        elif self.task == "vqa":
            flat = [answer for sample in samples for answer in sample.answers]
            words = [answer for answer, _ in flat]
            answers = self.tokenizer(words, _ANSWER_LIMIT, kind="raw", allow_empty=True)
            batch["answer_ids"], batch["answer_mask"] = answers.input_ids, answers.attention_mask
            batch["answers_per_question"] = [len(sample.answers) for sample in samples]
            batch["weights"] = torch.tensor([weight for _, weight in flat])
        return batch

    def _swap_sides(
        self, pixel_values: Tensor, texts: list[str], epoch: int, taken: int
    ) -> tuple[Tensor, list[str]]:
        """Half of NLVR2's pairs change places, and "left" and "right" in their texts with them."""
        rng = np.random.default_rng([self.config.seed, epoch, taken, 1])
        swap = rng.random(len(texts)) < 0.5
        other = {"left": "right", "right": "left"}
        texts = [
            _SIDES.sub(lambda side: other[side.group()], text) if swapped else text
            for text, swapped in zip(texts, swap, strict=True)
        ]
        mask = torch.from_numpy(swap).view(-1, 1, 1, 1, 1)
        return torch.where(mask, pixel_values.flip(1), pixel_values), texts

    def _check(self, good: int, at_end: bool) -> None:
        bad = len(self.quarantine)
        seen, limit = good + bad, self.config.max_bad_fraction
        if bad <= limit * seen or not (at_end or seen >= _EARLY_STOP_AFTER):
            return
        shown = "; ".join(f"{b.key}: {b.reason}" for b in self.quarantine[:3])
        raise DataError(
            f"{bad} of {seen} samples cannot be used, more than data.max_bad_fraction={limit} "
            f"allows. First ones: {shown}"
        )

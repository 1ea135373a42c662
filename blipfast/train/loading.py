"""Samples read and decoded in order, by Pillow's threads or batch by batch by DALI."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from blipfast.data.decode import DaliDecoder, Job, by_pillow
from blipfast.data.index import ShardIndex
from blipfast.errors import DataError
from blipfast.train.samples import Sample

Loaded = tuple[Sample, list[Any]]
"""A sample and its images, `(side, side, 3)` uint8 each."""


@dataclass(frozen=True)
class Place:
    """Where a sample is: in an epoch's order, and in a shard.

    taken: how many samples of its share the rank has used with it. text: which of the record's, -1
    for all or one that is drawn.
    """

    epoch: int
    position: int
    taken: int
    index: ShardIndex
    row: int
    text: int

    @property
    def key(self) -> str:
        return self.index.keys[self.row].decode()


Read = Callable[[Place], tuple[Sample, list[Job]]]
Results = Iterator[tuple[Place, Loaded | DataError]]
_Decoding = tuple[Sample, list[Future[np.ndarray]]]


def load_by_pillow(places: Iterator[Place], read: Read, pool: Executor, under_way: int) -> Results:
    """Each sample, or what is wrong with it; `under_way` of them are in the making."""

    def load(place: Place) -> Loaded | DataError:
        try:
            sample, jobs = read(place)
            return sample, [by_pillow(job) for job in jobs]
        except DataError as error:
            return error

    waiting: deque[tuple[Place, Any]] = deque()
    for place in places:
        waiting.append((place, pool.submit(load, place)))
        if len(waiting) > under_way:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def load_by_dali(
    places: Iterator[Place], read: Read, pool: Executor, decoder: DaliDecoder, batch: int
) -> Results:
    """The same, `batch` samples at a time: while DALI decodes them, the threads read the next ones
    and finish those before."""

    def try_read(place: Place) -> tuple[Sample, list[Job]] | DataError:
        try:
            return read(place)
        except DataError as error:
            return error

    def chunks() -> Iterator[tuple[list[Place], list[Any]]]:
        while chunk := list(itertools.islice(places, batch)):
            yield chunk, [pool.submit(try_read, place) for place in chunk]

    ahead = chunks()
    waiting = deque(itertools.islice(ahead, 2))
    before: Results = iter(())
    while waiting:
        chunk, reads = waiting.popleft()
        started = _decoding([future.result() for future in reads], decoder)
        waiting += itertools.islice(ahead, 1)
        yield from before
        before = _finished(chunk, started)
    yield from before


def _decoding(
    chunk: list[tuple[Sample, list[Job]] | DataError], decoder: DaliDecoder
) -> list[_Decoding | DataError]:
    jobs = [job for got in chunk if not isinstance(got, DataError) for job in got[1]]
    futures = iter(decoder.decode(jobs))
    return [
        got if isinstance(got, DataError) else (got[0], [next(futures) for _ in got[1]])
        for got in chunk
    ]


def _finished(places: list[Place], chunk: list[_Decoding | DataError]) -> Results:
    for place, got in zip(places, chunk, strict=True):
        if isinstance(got, DataError):
            yield place, got
            continue
        sample, futures = got
        try:
            loaded = sample, [future.result() for future in futures]
        except DataError as error:
            yield place, error
        else:
            yield place, loaded

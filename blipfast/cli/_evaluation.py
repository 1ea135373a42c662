"""What the evaluations of `blipfast evaluate` work on: a model, records, and what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blipfast.data import BadRecord, EvalTransform, Record, load_image, read_shards
from blipfast.data.index import RecordReader, index_shards
from blipfast.errors import DataError
from blipfast.evaluation.outcome import Example
from blipfast.evaluation.sharing import gather, share

_EACH = 12  # examples of right and of wrong answers on the page


class Records:
    """Records of shards: their texts and ids lie in memory, their images are read when needed.

    Every image is decoded once beforehand, each rank seeing to its own, so that all ranks agree on
    what is usable. bad: what is not, and what is the partner of such a one. Raises DataError when
    more than `max_bad_fraction` is bad.
    """

    def __init__(self, shards: str, limit: int | None, max_bad_fraction: float) -> None:
        indices = index_shards(read_shards(shards, max_bad_fraction).shards)
        places = [(index, row) for index in indices for row in range(len(index))][:limit]
        self._reader = RecordReader()
        own = set(share(len(places)))
        found: list[Record] = []
        broken: dict[int, BadRecord] = {}
        for number, (index, row) in enumerate(places):
            record = self._reader.read(index, row)
            found.append(replace(record, image=b""))
            try:
                if number in own:
                    load_image(record.image, "image")
            except DataError as error:
                broken[number] = BadRecord(str(index.shard), record.key, str(error))
        broken = {number: bad for part in gather(broken) for number, bad in part.items()}
        kept = [number for number in range(len(places)) if number not in broken]
        for number in _without_partner(found, kept):
            record, (index, _) = found[number], places[number]
            if number + 1 < len(places) or limit is None:  # else the limit has parted them
                reason = "its partner cannot be used"
                broken[number] = BadRecord(str(index.shard), record.key, reason)
            kept.remove(number)
        self.bad = [bad for index in indices for bad in index.bad] + list(broken.values())
        self._places = [places[number] for number in kept]
        self._records = [found[number] for number in kept]
        check_bad(self.bad, len(kept), max_bad_fraction)
        if not kept:
            raise DataError(f"the shards {shards} hold no usable record")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Record:
        """The record without its image."""
        return self._records[number]

    def image(self, number: int) -> bytes:
        """The encoded image of a record."""
        return self._reader.read(*self._places[number]).image


def _without_partner(records: Sequence[Record], kept: Sequence[int]) -> list[int]:
    """Of the records kept, those of a pair (ids["pair"], NLVR2) whose other one is not."""
    pairs = Counter(records[number].ids.get("pair") for number in kept)
    del pairs[None]
    return [number for number in kept if pairs.get(records[number].ids.get("pair")) == 1]


def check_bad(bad: Sequence[BadRecord], good: int, max_bad_fraction: float) -> None:
    """Raises DataError when more than a share of the records cannot be used."""
    if len(bad) > max_bad_fraction * (good + len(bad)):
        shown = "; ".join(f"{one.shard} {one.key or '(rest)'}: {one.reason}" for one in bad[:3])
        raise DataError(
            f"{len(bad)} of {good + len(bad)} records are bad, more than "
            f"--max_bad_fraction {max_bad_fraction} allows. First ones: {shown}"
        )


@dataclass(frozen=True)
class Job:
    """One evaluation. values: the options of the command line, by name."""

    model: Any
    tokenizer: Any
    where: torch.device
    values: dict[str, Any]

    @property
    def image_size(self) -> int:
        return int(self.model.config.vision.image_size)

    def pixels(self, images: Iterable[bytes]) -> Tensor:
        """`(N, 3, size, size)` on the model's device."""
        transform = EvalTransform(self.image_size)
        return torch.stack([transform(image) for image in images]).to(self.where)


class KeptEmbeds:
    """Image embeddings by number, as many as fit into a number of bytes; others are made again."""

    def __init__(self, encode: Callable[[Sequence[int]], Tensor], keep_bytes: int) -> None:
        self.encode, self.left = encode, keep_bytes
        self._kept: dict[int, Tensor] = {}

    def first(self, numbers: Sequence[int]) -> Tensor:
        """Encodes, and keeps what fits."""
        embeds = self.encode(numbers)
        for number, one in zip(numbers, embeds, strict=True):
            if one.nbytes <= self.left:
                self._kept[number] = one.clone()  # not a view, which would hold the whole batch
                self.left -= one.nbytes
        return embeds

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """`(N, S, D)`, of what was not kept encoded again."""
        missing = [number for number in numbers if number not in self._kept]
        again = dict(zip(missing, self.encode(missing), strict=True)) if missing else {}
        return torch.stack([self._kept[n] if n in self._kept else again[n] for n in numbers])


def choose_examples(
    rights: Sequence[bool | None], make: Callable[[int], Example]
) -> tuple[Example, ...]:
    """The first few of those right, wrong and not known, each made by its number."""
    chosen: list[Example] = []
    for kind in (False, True, None):
        numbers = [i for i, right in enumerate(rights) if right is kind]
        chosen += [make(i) for i in numbers[:_EACH]]
    return tuple(chosen)

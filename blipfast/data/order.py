"""In which order an epoch's samples come, and what of it remains for each rank.

The order is a function of the seed, the epoch and the sizes of the shards alone: no rank needs to
hear of another, and a run can go on with other ranks. Ranks take turns in what remains, each skips
its own bad samples, and goes on into the next epoch when its share is used up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blipfast.errors import DataError

ALL = -1  # as a count: a rank's whole share
_EVEN_BATCHES = 16  # among which the lengths are evened out
_STRETCH = 1024  # positions looked up together where they are not


class Source:
    """Samples of one data set in shards, endlessly: shards are permuted anew in each pass.

    sizes: samples of each shard. share: how many of them an epoch takes; beyond the number of
    samples they come again, below it the next epoch goes on where this one ends.
    """

    def __init__(self, sizes: Sequence[int], share: int, seed: int, shuffle: bool) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.total, self.share = int(self.sizes.sum()), share
        self._seed, self._shuffle = seed, shuffle
        self._pass = -1
        self._shards = self._starts = np.empty(0, dtype=np.int64)

    def locate(self, epoch: int, place: int) -> tuple[int, int]:
        """Shard, and sample in it, of the place-th sample that an epoch takes."""
        this_pass, line = divmod(epoch * self.share + place, self.total)
        if this_pass != self._pass:
            count = len(self.sizes)
            rng = np.random.default_rng([self._seed, this_pass])
            self._shards = rng.permutation(count) if self._shuffle else np.arange(count)
            self._starts = np.concatenate([[0], np.cumsum(self.sizes[self._shards])])
            self._pass = this_pass
        i = int(np.searchsorted(self._starts, line, side="right")) - 1
        return int(self._shards[i]), int(line - self._starts[i])


class EpochOrder:
    """The samples of one epoch: `order[position]` is (source, shard, sample in the shard).

    It is cut in windows, in each of which every source has its proportional part, permuted.

    sources: at least one, with samples. window: samples that are permuted together, about; 0 keeps
    the order, one source after the other.
    """

    def __init__(self, sources: Sequence[Source], epoch: int, seed: int, window: int) -> None:
        self.sources, self.epoch, self._seed, self._window = sources, epoch, seed, window
        total = sum(source.share for source in sources)
        parts = max(1, -(-total // window)) if window else 1
        cuts = np.arange(parts + 1, dtype=np.int64)
        self._cuts = [cuts * source.share // parts for source in sources]
        self._starts = np.sum(self._cuts, axis=0)
        self._drawn: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, position: int) -> tuple[int, int, int]:
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        place = int(position - self._starts[part])
        if self._window:
            place = int(self._permutation(part)[place])
        for number, (source, cuts) in enumerate(zip(self.sources, self._cuts, strict=True)):
            here = int(cuts[part + 1] - cuts[part])
            if place < here:
                return number, *source.locate(self.epoch, int(cuts[part]) + place)
            place -= here
        raise IndexError(position)

    def _permutation(self, part: int) -> np.ndarray:
        if part not in self._drawn:
            if len(self._drawn) > 3:
                self._drawn.clear()
            size = int(self._starts[part + 1] - self._starts[part])
            rng = np.random.default_rng([self._seed, self.epoch, part])
            self._drawn[part] = rng.permutation(size)
        return self._drawn[part]


@dataclass(frozen=True)
class Turn:
    """For how long which ranks took turns in an epoch.

    world_size: ranks. window: samples of a rank whose lengths were evened out together, 0 for
    none, and batch its batch size. counts: samples that each rank has used, `ALL` for its share.
    """

    world_size: int
    window: int
    batch: int
    counts: tuple[int, ...]

    def of_same_ranks(self, other: Turn) -> bool:
        """Whether `other`'s ranks can go on in these shares."""
        return (self.world_size, self.window, self.batch) == (
            other.world_size,
            other.window,
            other.batch,
        )


class Remaining:
    """Positions of an epoch that are not used yet: some single ones, then all the rest."""

    def __init__(self, order: EpochOrder, lengths: Any) -> None:
        self.order, self._lengths = order, lengths
        self._head, self._tail = np.empty(0, dtype=np.int64), 0

    def __len__(self) -> int:
        return len(self._head) + len(self.order) - self._tail

    def share(self, rank: int, turn: Turn, start: int = 0) -> Iterator[int]:
        """A rank's positions under a turn of its kind, from its `start`-th on."""
        size, step = self.share_size(rank, turn), turn.window or _STRETCH
        for first in range(start // step * step, size, step):
            places = self._window(rank, turn, first, size)
            for place in places[max(0, start - first) :]:
                yield self._position(place)

    def after(self, turn: Turn) -> Remaining:
        """What remains when the ranks have used their counts. Raises DataError for odd counts."""
        step = turn.window or _STRETCH
        sizes = [self.share_size(rank, turn) for rank in range(turn.world_size)]
        counts = [n if c == ALL else c for c, n in zip(turn.counts, sizes, strict=True)]
        if not all(0 <= count <= size for count, size in zip(counts, sizes, strict=True)):
            raise DataError(f"ranks cannot have used {counts} of {sizes} samples")
        even = min(counts) // step * step  # all ranks have used that much, whatever its order
        used: list[int] = []
        bound = even * turn.world_size
        for rank, (count, size) in enumerate(zip(counts, sizes, strict=True)):
            for first in range(even, count, step):
                places = self._window(rank, turn, first, size)
                used += places[: count - first]
                bound = max(bound, max(places) + 1)
        left = np.setdiff1d(np.arange(even * turn.world_size, bound), np.array(used, np.int64))
        rest = Remaining(self.order, self._lengths)
        head = [self._position(int(place)) for place in left]
        rest._head = np.array(head + list(self._head[bound:]), dtype=np.int64)
        rest._tail = self._tail + max(0, bound - len(self._head))
        return rest

    def share_size(self, rank: int, turn: Turn) -> int:
        """How many positions a rank has under a turn of its kind."""
        return max(0, -(-(len(self) - rank) // turn.world_size))

    def _position(self, place: int) -> int:
        head = len(self._head)
        return int(self._head[place]) if place < head else self._tail + place - head

    def _window(self, rank: int, turn: Turn, first: int, size: int) -> list[int]:
        """Places of a rank's samples `first` and following, dealt to batches by length."""
        count = min(turn.window or _STRETCH, size - first)
        places = [rank + (first + i) * turn.world_size for i in range(count)]
        if turn.window == 0 or count < turn.window:
            return places
        lengths = np.array([self._lengths(self._position(place)) for place in places])
        return [places[i] for i in even_lengths(lengths, turn.batch)]


def even_lengths(lengths: np.ndarray, batch: int) -> np.ndarray:
    """An order of samples, `(n * batch,)`, in which all batches have about the same total length.

    The samples are dealt out from the shortest to the longest, there and back again (as teams are
    picked), and the batches come in the order of their first samples before.
    """
    batches = len(lengths) // batch
    by_length = np.argsort(lengths, kind="stable").reshape(batch, batches)
    by_length[1::2] = by_length[1::2, ::-1]
    dealt = by_length.T
    return dealt[np.argsort(dealt.min(axis=1), kind="stable")].ravel()


def turn_of(rank_batch: int, world_size: int, even: bool) -> Turn:
    """A turn that nobody has used anything of yet."""
    window = _EVEN_BATCHES * rank_batch if even and rank_batch > 1 else 0
    return Turn(world_size, window, rank_batch, (0,) * world_size)

"""Packed sequences whose lengths only the device knows.

A step that never waits for its device, or is recorded as one CUDA graph, cannot be told how long
the texts are that it drew. The host then knows the room alone: how many tokens there may be, and
how long a text may be. What the texts leave of it is filled with sequences of padding, so that
every token belongs to some sequence and whatever is computed of it is finite; nothing looks at
them, and they have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.ops.attention import CrossPlan
from blipfast.ops.packing import Index, Packing, from_host, lazy


class DevicePacking(Packing):
    """`Packing` without lengths on the host: `N` sequences, and others that fill the room.

    total: tokens there is room for. max_seqlen: the longest that a sequence may be.
    parts: of each packing that was joined, its sequences and its fillers.
    lengths_tensor, cu_seqlens, sequence_ids, positions: of sequences and fillers.
    first_tokens: `(N,)`, of the sequences alone.
    """

    parts: tuple[tuple[int, int], ...]

    def __init__(
        self, lengths: Tensor, total: int, max_seqlen: int, parts: tuple[tuple[int, int], ...]
    ) -> None:
        known = {"lengths_tensor": lengths, "total": total, "max_seqlen": max_seqlen}
        self.__dict__.update(device=lengths.device, host=self, uniform=False, parts=parts, **known)

    @classmethod
    def with_room(cls, lengths: Tensor, room: int, max_seqlen: int) -> DevicePacking:
        """`N` sequences of `lengths (N,)`, any integers, in a tensor of `room` tokens.

        What is longer than `max_seqlen`, or lies beyond the room, is cut off: nobody can be told.
        Raises ShapeError when there are no lengths, or no room for a token of each.
        """
        if lengths.dim() != 1 or not 0 < len(lengths) <= room or max_seqlen < 1:
            raise ShapeError(
                f"lengths {tuple(lengths.shape)} of at most {max_seqlen} tokens each do not go "
                f"into a room of {room} tokens"
            )
        ends = lengths.to(torch.int64).clamp(0, max_seqlen).cumsum(0).clamp(max=room)
        fillers = -(-room // max_seqlen)
        filled = torch.arange(1, fillers + 1, device=lengths.device) * max_seqlen + ends[-1]
        ends = torch.cat([ends, filled.clamp(max=room)])
        return cls(
            ends.diff(prepend=ends.new_zeros(1)), room, max_seqlen, ((len(lengths), fillers),)
        )

    def __repr__(self) -> str:
        return f"DevicePacking({self.num_sequences} in {self.total} tokens on {self.device})"

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        """Those of sequences and fillers, for which the host waits."""
        return tuple(self.lengths_tensor.tolist())

    @property
    def num_sequences(self) -> int:
        return sum(texts for texts, _ in self.parts)

    @property
    def num_rows(self) -> int:
        return len(self.lengths_tensor)

    @property
    def any_empty(self) -> bool:
        """Not known; the first token of an empty sequence is another's."""
        return False

    @property
    def num_following(self) -> Tensor:
        return (self.of_sequences(self.lengths_tensor) - 1).clamp(min=0).sum()

    @lazy
    def in_sequences(self) -> Tensor:
        numbers = torch.ones(self.num_sequences, dtype=torch.bool, device=self.device)
        return self.over_all(numbers, numbers.new_zeros)[self.sequence_ids]

    @lazy
    def first_tokens(self) -> Tensor:
        starts = self.of_sequences(self.cu_seqlens[:-1].to(torch.int64))
        return starts.clamp(max=self.total - 1)  # one that was cut off starts beyond the room

    def of_sequences(self, values: Tensor) -> Tensor:
        """From values of sequences and fillers, the sequences'."""
        split = values.split([count for part in self.parts for count in part])
        return split[0] if len(self.parts) == 1 else torch.cat(split[::2])

    def over_all(self, values: Tensor, of_fillers: Callable[[int], Tensor]) -> Tensor:
        """From values of the sequences, those of sequences and fillers.

        of_fillers: gives, for a number of fillers, their values.
        """
        own = values.split([texts for texts, _ in self.parts])
        other = [of_fillers(fillers) for _, fillers in self.parts]
        return torch.cat(list(chain.from_iterable(zip(own, other, strict=True))))

    def select(self, index: Index) -> tuple[Packing, Tensor]:
        chosen = _on(self.device, index)
        lengths = self.of_sequences(self.lengths_tensor)[chosen]
        room = len(chosen) * self.max_seqlen  # enough, whichever they are
        packing = DevicePacking.with_room(lengths, room, self.max_seqlen)
        return packing, packing.tokens_from(self.first_tokens[chosen])

    def first_only(self) -> Packing:
        count = self.num_sequences
        return DevicePacking(torch.ones_like(self.first_tokens), count, 1, ((count, 0),))

    def without_last(self) -> tuple[Packing, Tensor]:
        lengths = self.of_sequences(self.lengths_tensor) - 1
        room = max(self.total - len(lengths), len(lengths))
        packing = DevicePacking.with_room(lengths, room, max(1, self.max_seqlen - 1))
        return packing, packing.tokens_from(self.first_tokens)

    def tokens_from(self, starts: Tensor) -> Tensor:
        """`(T,)`: where the tokens lie of sequences that start at `starts`; a filler's are 0."""
        begin = self.over_all(starts, starts.new_zeros)[self.sequence_ids]
        return (begin + self.positions).where(self.in_sequences, 0)

    def __add__(self, other: Packing) -> Packing:
        if not isinstance(other, DevicePacking):
            raise ShapeError("sequences whose lengths are on the device join only their like")
        return DevicePacking(
            torch.cat([self.lengths_tensor, other.lengths_tensor]),
            self.total + other.total,
            max(self.max_seqlen, other.max_seqlen),
            self.parts + other.parts,
        )


class DevicePlan(CrossPlan):
    """`CrossPlan` whose index is on the device too.

    sets: `(N + fillers,)` int64, what each sequence and each filler looks at; fillers are spread
    over all sets. A set out of range is the nearest one.
    """

    sets: Tensor

    def __init__(
        self, packing: DevicePacking, kv_index: Tensor, num_kv: int, kv_lengths: Tensor | None
    ) -> None:
        def spread(count: int) -> Tensor:
            return torch.arange(count, device=packing.device) % num_kv

        sets = packing.over_all(kv_index.to(torch.int64).clamp(0, num_kv - 1), spread)
        known = {"packing": packing, "num_kv": num_kv, "kv_lengths": kv_lengths}
        self.__dict__.update(sets=sets, host=self, **known)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def kv_index(self) -> tuple[int, ...]:  # type: ignore[override]
        """For each sequence and filler its set, for which the host waits."""
        return tuple(self.sets.tolist())

    @lazy
    def grouped(self) -> Packing:
        rows = self.sets.new_zeros(self.num_kv)
        rows = rows.index_add(0, self.sets, self.packing.lengths_tensor)
        total = self.packing.total
        return DevicePacking(rows, total, total, ((self.num_kv, 0),))

    @lazy
    def order(self) -> Tensor:
        return self.sets[self.packing.sequence_ids].argsort(stable=True)


def plan_of(
    packings: Sequence[Packing],
    indices: Sequence[Index],
    num_kv: int,
    kv_lengths: Tensor | None = None,
) -> CrossPlan:
    """The plan of packings one after the other, each with the sets that its sequences look at.

    Raises ShapeError as `CrossPlan.build`; of an index on the device only its length is checked.
    """
    packing = packings[0]
    for other in packings[1:]:
        packing = packing + other
    if not isinstance(packing, DevicePacking):
        index = list(chain.from_iterable(_on_host(i) for i in indices))
        return CrossPlan.build(packing, index, num_kv, kv_lengths)
    joined = torch.cat([_on(packing.device, index) for index in indices])
    if len(joined) != packing.num_sequences:
        raise ShapeError(f"kv_index names {len(joined)} sets for {packing.num_sequences} sequences")
    return DevicePlan(packing, joined, num_kv, kv_lengths)


def _on(device: torch.device, index: Index) -> Tensor:
    if isinstance(index, Tensor):
        return index.to(device)
    if isinstance(index, range):
        return torch.arange(index.start, index.stop, index.step, device=device)
    return from_host(torch.tensor(index, dtype=torch.int64, device="cpu"), device)


def _on_host(index: Index) -> Sequence[int]:
    return index.tolist() if isinstance(index, Tensor) else index

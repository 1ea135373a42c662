"""The samples of one rank, epoch after epoch, and how a run goes on on any number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from blipfast.data.order import ALL, EpochOrder, Remaining, Turn
from blipfast.errors import DataError

State = dict[str, Any]
"""As JSON: {"epoch": the first that is not used up, "turns": for it and each following open one
the turns taken in it}. None is the start."""


class Shares:
    """Hands out positions of epochs to one of several ranks, each once.

    order_of: the order of an epoch. length_of: of an epoch's order, the length of the text at a
    position. turn: the kind of turn that this run's ranks take (`order.turn_of`).
    """

    def __init__(
        self,
        order_of: Callable[[int], EpochOrder],
        length_of: Callable[[EpochOrder, int], int],
        rank: int,
        turn: Turn,
    ) -> None:
        self._order_of, self._length_of = order_of, length_of
        self.rank, self.turn = rank, turn

    def stream(self, state: State | None) -> Iterator[tuple[int, int, int]]:
        """Epoch, position in its order, and how many this rank has used of its share with it."""
        state = state or {"epoch": 0, "turns": []}
        epoch = int(state["epoch"])
        while True:
            opened = epoch - int(state["epoch"])
            turns = state["turns"][opened] if opened < len(state["turns"]) else []
            yield from self.epoch(epoch, [_turn(values) for values in turns])
            epoch += 1

    def epoch(self, epoch: int, turns: Sequence[Turn] = ()) -> Iterator[tuple[int, int, int]]:
        """What `stream` gives of one epoch, in which `turns` have been taken before."""
        before, start = list(turns), 0
        if before and before[-1].of_same_ranks(self.turn):
            start = before.pop().counts[self.rank]  # these ranks go on in their shares
        if start == ALL:
            return
        remaining = self.remaining(epoch, before)
        for i, position in enumerate(remaining.share(self.rank, self.turn, start)):
            yield epoch, position, start + i + 1

    def remaining(self, epoch: int, turns: Sequence[Turn]) -> Remaining:
        """What of an epoch nobody has used in `turns`."""
        order = self._order_of(epoch)
        remaining = Remaining(order, lambda position: self._length_of(order, position))
        for turn in turns:
            remaining = remaining.after(turn)
        return remaining

    def position(self, epoch: int, taken: int, state: State | None) -> State:
        """Where this rank is in a stream from `state`: plain data for `combine_positions`."""
        turn = dataclasses.asdict(dataclasses.replace(self.turn, counts=()))
        return {"epoch": epoch, "taken": taken, "turn": turn, "start": state}


def combine_positions(positions: Sequence[State]) -> State:
    """The state from which any ranks go on, from where all ranks of a run are at the same step.

    positions: of every rank, in rank order. Raises DataError when they are of different runs.
    """
    kind, start = positions[0]["turn"], positions[0]["start"]
    if any((p["turn"], p["start"]) != (kind, start) for p in positions) or kind[
        "world_size"
    ] != len(positions):
        raise DataError("these positions are not those of all ranks of one run")
    start = start or {"epoch": 0, "turns": []}
    first = min(p["epoch"] for p in positions)
    last = max([start["epoch"] + len(start["turns"]) - 1, *(p["epoch"] for p in positions)])
    turns = []
    for epoch in range(first, last + 1):
        opened = epoch - start["epoch"]
        before = list(start["turns"][opened]) if 0 <= opened < len(start["turns"]) else []
        counts = [
            ALL if p["epoch"] > epoch else (p["taken"] if p["epoch"] == epoch else 0)
            for p in positions
        ]
        turn = {**kind, "counts": counts}
        if before and _turn(before[-1]).of_same_ranks(_turn(turn)):
            same = before.pop()
            counts = [
                old if p["epoch"] < epoch else new
                for p, old, new in zip(positions, same["counts"], counts, strict=True)
            ]
        turns.append([*before, {**kind, "counts": counts}])
    return {"epoch": first, "turns": turns}


def _turn(values: dict[str, Any]) -> Turn:
    return Turn(**{**values, "counts": tuple(values["counts"])})

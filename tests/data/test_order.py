"""Every sample of an epoch once, on any ranks, whenever a run is cut and whoever goes on."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blipfast.data.order import EpochOrder, Source, even_lengths, turn_of
from blipfast.data.shares import Shares, combine_positions
from blipfast.errors import DataError

SIZES = [7, 1, 12, 5, 9, 30]


def order(epoch: int, window: int = 20, sizes=SIZES, share: int | None = None) -> EpochOrder:
    source = Source(sizes, sum(sizes) if share is None else share, 3, window > 0)
    return EpochOrder([source], epoch, 3, window)


def length(order: EpochOrder, position: int) -> int:
    _, shard, sample = order[position]
    return (17 * shard + 5 * sample) % 23


def schedule(rank: int, ranks: int, batch: int = 2, even: bool = True) -> Shares:
    return Shares(order, length, rank, turn_of(batch, ranks, even))


@pytest.mark.parametrize("window", [0, 1, 20, 1000])
def test_an_epoch_is_a_permutation(window):
    for epoch in (0, 1):
        got = [order(epoch, window)[i] for i in range(sum(SIZES))]
        expected = [(0, shard, i) for shard, size in enumerate(SIZES) for i in range(size)]
        assert sorted(got) == expected
        assert (got == expected) == (window == 0)
    if window:
        assert [order(0, window)[i] for i in range(64)] != [order(1, window)[i] for i in range(64)]


def test_sources_are_mixed_evenly_by_weight():
    big, small = Source([100] * 9, 900, 0, True), Source([50] * 2, 200, 1, True)
    mixed = EpochOrder([big, small], 0, 0, 110)
    got = [mixed[i] for i in range(len(mixed))]
    assert len(mixed) == 1100
    times = Counter(got)
    assert all(times[(1, shard, i)] == 2 for shard in range(2) for i in range(50))
    assert all(times[(0, shard, i)] == 1 for shard in range(9) for i in range(100))
    for first in range(0, 1100, 110):
        assert sum(source for source, *_ in got[first : first + 110]) == 20


def test_a_part_of_a_source_goes_on_in_the_next_epoch():
    source = Source(SIZES, sum(SIZES) // 2, 0, True)
    halves = [EpochOrder([source], epoch, 0, 16) for epoch in (0, 1)]
    got = [half[i] for half in halves for i in range(len(half))]
    assert sorted(got) == [(0, shard, i) for shard, size in enumerate(SIZES) for i in range(size)]


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 12)),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_cut_anywhere_each_sample_comes_once(stints, data):
    """Stints of ranks, each rank with its own progress, as bad samples make it."""
    total, seen, state = sum(SIZES), Counter(), None
    for ranks, batch, even, most in stints:
        positions = []
        for rank in range(ranks):
            plan = schedule(rank, ranks, batch, even)
            count = data.draw(st.integers(0, most))
            taken = list(itertools.islice(plan.stream(state), count))
            seen.update((epoch, position) for epoch, position, _ in taken)
            if taken:
                positions.append(plan.position(taken[-1][0], taken[-1][2], state))
            else:
                positions.append(untouched(plan, state))
        state = combine_positions(positions)
    rest = schedule(0, 1, even=False)
    last = max([epoch for epoch, _ in seen], default=0)
    for epoch, position, _ in rest.stream(state):
        if epoch > last:
            break
        seen[epoch, position] += 1
    expected = {(epoch, position) for epoch in range(last + 1) for position in range(total)}
    assert set(seen) == expected
    assert set(seen.values()) == {1}


def untouched(plan: Shares, state) -> dict:
    """The position of a rank that has used nothing yet."""
    epoch, turns = (0, []) if state is None else (state["epoch"], state["turns"])
    taken = 0
    if turns and turns[0]:
        last = turns[0][-1]
        kind = (plan.turn.world_size, plan.turn.window, plan.turn.batch)
        if (last["world_size"], last["window"], last["batch"]) == kind:
            taken = last["counts"][plan.rank]
    if taken == -1:
        return untouched(plan, {"epoch": epoch + 1, "turns": turns[1:]}) | {"start": state}
    return plan.position(epoch, taken, state)


def test_the_same_ranks_go_on_as_if_never_stopped():
    for counts in ([3, 3], [10, 4], [40, 39]):
        whole = [list(itertools.islice(schedule(r, 2).stream(None), 60)) for r in range(2)]
        positions = [
            schedule(r, 2).position(whole[r][n - 1][0], whole[r][n - 1][2], None)
            for r, n in enumerate(counts)
        ]
        state = combine_positions(positions)
        for r, n in enumerate(counts):
            rest = list(itertools.islice(schedule(r, 2).stream(state), 60 - n))
            assert rest == whole[r][n:]


def test_batches_have_even_lengths():
    lengths = np.random.default_rng(0).geometric(0.1, 16 * 32)
    plain = lengths.reshape(16, 32).sum(1)
    even = lengths[even_lengths(lengths, 32)].reshape(16, 32).sum(1)
    assert sorted(even_lengths(lengths, 32)) == list(range(512))
    assert np.std(even) < 0.25 * np.std(plain)


def test_positions_of_other_runs_are_refused():
    positions = [schedule(r, 2).position(0, 4, None) for r in range(2)]
    with pytest.raises(DataError, match="all ranks of one run"):
        combine_positions(positions[:1])
    with pytest.raises(DataError, match="all ranks of one run"):
        combine_positions([positions[0], schedule(1, 2, batch=3).position(0, 4, None)])

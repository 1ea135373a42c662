"""Hard-negative sampling: the generator, the weights, the distribution, invariances, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import blipfast.ops.hard_negatives as hard_negatives
from blipfast.errors import ShapeError
from blipfast.ops import _native
from blipfast.ops.hard_negatives import (
    hard_negative_weights,
    philox,
    sample_hard_negatives,
    uniform,
)

TEMPERATURE = torch.tensor(0.2)
# The C++ operator where it was built; float64 and fp16 are not for it.
IMPLS = ["reference", "torch", *(["native"] if _native.why_not() is None else [])]


def features(rows: int, width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=-1)


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [  # the known answers that Random123 publishes
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            0xFFFFFFFFFFFFFFFF,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], seed: int, words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = counter
    out = philox(torch.tensor([c0]), torch.tensor([c1]), c2, c3, seed=seed)
    assert tuple(int(word) for word in out) == words


def test_uniform_is_uniform_open_and_the_same_for_any_window() -> None:
    rows, columns = torch.arange(200), torch.arange(500)
    u = uniform(rows, columns, seed=3, step=4, stream=1)
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.004
    assert abs(u.var() - 1 / 12) < 0.002
    for start in range(9):
        window = uniform(rows[7:], columns[start : start + 5], seed=3, step=4, stream=1)
        assert torch.equal(window, u[7:, start : start + 5])
    for other in ({"seed": 5}, {"step": 5}, {"stream": 2}):
        v = uniform(rows, columns, **{"seed": 3, "step": 4, "stream": 1, **other})
        assert abs(torch.corrcoef(torch.stack([u.flatten(), v.flatten()]))[0, 1]) < 0.015


@pytest.mark.parametrize("impl", IMPLS)
def test_a_step_on_the_device_draws_as_its_number(impl: str) -> None:
    query, keys = features(30), features(30, seed=1)
    for step in (0, 7, 2**32 - 1):
        options = {"eps": 1e-4, "seed": 5, "impl": impl}
        expected = sample_hard_negatives(query, keys, TEMPERATURE, step=step, **options)
        found = sample_hard_negatives(query, keys, TEMPERATURE, step=torch.tensor(step), **options)
        assert torch.equal(found, expected)


def test_weights_follow_the_formula() -> None:
    query, keys = features(3).double(), features(7, seed=1).double()
    weights = hard_negative_weights(query, keys, TEMPERATURE, eps=1e-4, offset=2)
    for i in range(3):
        powers = [(query[i].dot(keys[j]) / TEMPERATURE).exp() for j in range(7)]
        for j in range(7):
            expected = 0.0 if j == i + 2 else powers[j] / sum(powers) + 1e-4
            torch.testing.assert_close(weights[i, j].item(), float(expected))
    ids = torch.tensor([1, 2, 3]), torch.tensor([3, 1, 1, 5, 6, 2, 3])
    by_id = hard_negative_weights(query, keys, TEMPERATURE, query_ids=ids[0], key_ids=ids[1])
    assert torch.equal(by_id == 0, ids[0][:, None] == ids[1][None, :])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("eps", [0.0, 1e-4, 0.05])
def test_chi_squared(impl: str, eps: float) -> None:
    rows, keys = 20_000, features(9, seed=1)
    query = features(1).expand(rows, -1)
    ids = torch.zeros(rows, dtype=torch.int64), torch.arange(9) % 5
    drawn = sample_hard_negatives(
        query, keys, TEMPERATURE, eps=eps, query_ids=ids[0], key_ids=ids[1], seed=1, impl=impl
    )
    weights = hard_negative_weights(
        query[:1], keys, TEMPERATURE, eps=eps, query_ids=ids[0][:1], key_ids=ids[1]
    )[0]
    possible = weights > 0
    expected = (weights / weights.sum() * rows)[possible]
    assert expected.min() > 5
    by_gumbel = drawn.bincount(minlength=9)
    generator = torch.Generator().manual_seed(0)
    by_multinomial = torch.multinomial(weights, rows, True, generator=generator).bincount(
        minlength=9
    )
    for counts in (by_gumbel, by_multinomial):
        assert (counts[~possible] == 0).all()
        chi_squared = ((counts[possible] - expected) ** 2 / expected).sum()
        assert chi_squared < 24.32  # 6 degrees of freedom, p = 0.00045


def test_without_replacement_second_draw_has_the_conditional_distribution() -> None:
    rows, keys = 20_000, features(6, seed=1)
    query = features(1).expand(rows, -1)
    ids = torch.full((rows,), 5), torch.arange(6)
    drawn = sample_hard_negatives(
        query, keys, TEMPERATURE, query_ids=ids[0], key_ids=ids[1], num=2, seed=2
    )
    assert (drawn[:, 0] != drawn[:, 1]).all()
    p = hard_negative_weights(query[:1], keys, TEMPERATURE, query_ids=ids[0][:1], key_ids=ids[1])[
        0
    ].double()
    p = p / p.sum()
    pairs = p[:, None] * p[None, :] / (1 - p[:, None])
    pairs.fill_diagonal_(0)
    counts = (drawn[:, 0] * 6 + drawn[:, 1]).bincount(minlength=36).reshape(6, 6)
    possible = pairs > 0
    expected = pairs[possible] * rows
    assert ((counts[possible] - expected) ** 2 / expected).sum() < 45.3  # 19 degrees, p = 0.0006


@pytest.mark.parametrize("num", [1, 3, 40])
@pytest.mark.parametrize(("size", "total"), [(1, 1), (1, 2), (5, 5), (13, 37), (64, 64)])
def test_every_backend_draws_the_same(size: int, total: int, num: int) -> None:
    query, keys = features(size), features(total, seed=1)
    for options in (
        {"eps": 1e-4},
        {"query_ids": torch.arange(size) % 3, "key_ids": torch.arange(total) % 4},
        {"offset": total - size, "seed": 1 << 40, "step": 123_456, "stream": 1},
    ):
        options = {"num": num, **options}
        draws = [
            sample_hard_negatives(query, keys, TEMPERATURE, impl=impl, **options)  # type: ignore[arg-type]
            for impl in IMPLS
        ]
        assert all(torch.equal(draw, draws[0]) for draw in draws)
        assert draws[0].shape == ((size,) if num == 1 else (size, num))
        assert draws[0].dtype == torch.int64


def test_same_draw_for_any_block_size_and_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, keys = features(24), features(24, seed=1)
    whole = sample_hard_negatives(query, keys, TEMPERATURE, eps=1e-4, seed=9, step=2)
    monkeypatch.setattr(hard_negatives, "_SCORES", 50)
    assert torch.equal(
        sample_hard_negatives(query, keys, TEMPERATURE, eps=1e-4, seed=9, step=2), whole
    )
    for ranks in (2, 3, 8):
        size = 24 // ranks
        parts = [
            sample_hard_negatives(
                query[r * size : (r + 1) * size],
                keys,
                TEMPERATURE,
                eps=1e-4,
                seed=9,
                step=2,
                offset=r * size,
            )
            for r in range(ranks)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_own_rank_draws_use_global_numbers() -> None:
    query, keys = features(6), features(6, seed=1)
    whole_ids = torch.arange(6)
    rank_1 = sample_hard_negatives(
        query[3:], keys[3:], TEMPERATURE, seed=4, first_row=3, first_column=3
    )
    # Scores of a row differ from those over all keys by a constant, which the draw ignores.
    best = sample_hard_negatives(
        query, keys, TEMPERATURE, seed=4, num=5, query_ids=whole_ids, key_ids=whole_ids
    )[3:]
    first_of_own = [next(int(j) for j in row if j >= 3) - 3 for row in best]
    assert rank_1.tolist() == first_of_own


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_with_nothing_to_draw(impl: str) -> None:
    one = features(1)
    assert sample_hard_negatives(one, one, TEMPERATURE, eps=1e-4, impl=impl).tolist() == [-1]
    same = torch.zeros(4, dtype=torch.int64)
    four = features(4)
    ids = {"query_ids": same, "key_ids": same}
    assert sample_hard_negatives(four, four, TEMPERATURE, impl=impl, **ids).tolist() == [-1] * 4
    none = features(0)
    assert sample_hard_negatives(four, none, TEMPERATURE, impl=impl).tolist() == [-1] * 4
    assert sample_hard_negatives(none, four, TEMPERATURE, impl=impl).shape == (0,)
    few = sample_hard_negatives(four, four, TEMPERATURE, num=5, impl=impl)
    assert (few[:, :3] >= 0).all()
    assert (few[:, 3:] == -1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [0.0, float("nan")])
def test_useless_temperature_draws_nothing(temperature: float, impl: str) -> None:
    drawn = sample_hard_negatives(features(4), features(4), torch.tensor(temperature), impl=impl)
    assert drawn.tolist() == [-1] * 4


def test_tiny_probabilities_can_still_be_drawn() -> None:
    query = torch.eye(3, 8)
    keys = torch.cat([torch.eye(3, 8), -torch.eye(3, 8)])
    ids = {"query_ids": torch.arange(3), "key_ids": torch.tensor([0, 1, 2, 0, 0, 0])}
    drawn = sample_hard_negatives(query, keys, torch.tensor(0.001), **ids)
    assert (drawn >= 0).all()
    assert (ids["key_ids"][drawn] != torch.arange(3)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    query, keys = features(8).to(dtype), features(8, seed=1).to(dtype)
    exact = sample_hard_negatives(query.double(), keys.double(), TEMPERATURE, eps=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sample_hard_negatives(query, keys, TEMPERATURE, eps=1e-4), exact)


def test_opcheck_and_one_graph() -> None:
    query, keys = features(4), features(6, seed=1)
    arguments = (query, keys, TEMPERATURE, None, None, 1e-4, 0, 1, 2, 0, 0, 0, 2)
    torch.library.opcheck(torch.ops.blipfast.sample_hard_negatives.default, arguments)

    def draw(q: Tensor, k: Tensor, step: int) -> Tensor:
        return sample_hard_negatives(q, k, TEMPERATURE, eps=1e-4, step=step, impl="torch")

    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    for step in range(3):
        assert torch.equal(compiled(query, keys, step), draw(query, keys, step))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": torch.zeros(4, 7)}, "width and device must agree"),
        ({"keys": torch.zeros(4, 8, device="meta")}, "width and device must agree"),
        ({"query": torch.zeros(4, 8, dtype=torch.int64)}, "float matrix"),
        ({"temperature": torch.ones(2)}, "one element"),
        ({"query_ids": torch.arange(4)}, "both"),
        ({"query_ids": torch.arange(3), "key_ids": torch.arange(4)}, "ids for 4 rows"),
        ({"num": 0}, "num >= 1"),
        ({"eps": -1.0}, "eps >= 0"),
        ({"seed": -1}, "seed"),
        ({"step": 1 << 32}, "step=4294967296"),
        ({"first_column": -1}, "first_column=-1"),
    ],
)
def test_bad_input(change: dict[str, object], words: str) -> None:
    inputs = {"query": torch.zeros(4, 8), "keys": torch.zeros(4, 8), "temperature": torch.ones(())}
    with pytest.raises(ShapeError, match=words):
        sample_hard_negatives(**{**inputs, **change})  # type: ignore[arg-type]

"""Schedules against values that the original's functions gave."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from blipfast.errors import ConfigError
from blipfast.train.config import FitConfig
from blipfast.train.schedule import cosine_lr, learning_rate_at, step_decay_lr, warmup_lr

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "fixtures/reference/text_and_schedules.json").read_text()
)["lr_schedules"]


def test_golden_values_exactly():
    assert all(GOLDEN[kind] for kind in ("cosine", "warmup", "step"))
    for row in GOLDEN["cosine"]:
        assert cosine_lr(row["epoch"], row["max_epoch"], row["init_lr"], row["min_lr"]) == row["lr"]
    for row in GOLDEN["warmup"]:
        got = warmup_lr(row["step"], row["warmup_steps"], row["warmup_lr"], row["init_lr"])
        assert got == row["lr"]
    for row in GOLDEN["step"]:
        assert step_decay_lr(row["epoch"], row["init_lr"], row["min_lr"], row["decay"]) == row["lr"]


def test_whole_runs_follow_the_golden_values():
    pretrain = FitConfig(
        epochs=61, steps_per_epoch=4000, learning_rate=3e-4, min_learning_rate=1e-6,
        warmup_steps=3000, schedule="step", decay=0.9,
    )  # fmt: skip
    for row in GOLDEN["warmup"][:-1]:
        assert learning_rate_at(row["step"], pretrain) == row["lr"]
    for row in GOLDEN["step"][1:]:
        assert learning_rate_at(row["epoch"] * 4000 + 17, pretrain) == row["lr"]
    caption = FitConfig(epochs=6, steps_per_epoch=10, learning_rate=1e-5)
    for row in GOLDEN["cosine"]:
        assert learning_rate_at(row["epoch"] * 10 + 9, caption) == row["lr"]


def test_long_warmup_does_not_jump_between_epochs():
    config = FitConfig(
        epochs=4, steps_per_epoch=50, learning_rate=1.0, warmup_steps=100, schedule="step"
    )
    rates = [learning_rate_at(step, config) for step in range(200)]
    assert max(b - a for a, b in itertools.pairwise(rates)) < 0.011
    assert max(rates) == pytest.approx(0.9, abs=0.02)


def test_steps_alone_move_the_cosine_at_every_step():
    config = FitConfig(steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, config) for step in range(10)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 10
    assert learning_rate_at(5, config) == pytest.approx(0.5)


def test_steps_beside_epochs_end_early_on_the_same_schedule():
    long = FitConfig(epochs=6, steps_per_epoch=10, learning_rate=1.0)
    short = FitConfig(epochs=6, steps_per_epoch=10, learning_rate=1.0, steps=15)
    assert (long.total_steps, short.total_steps) == (60, 15)
    assert learning_rate_at(12, short) == learning_rate_at(12, long)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, r"fit\.steps is 0"),
        ({"learning_rate": float("nan")}, r"fit\.learning_rate"),
        ({"learning_rate": -1.0}, r"fit\.learning_rate"),
        ({"betas": (0.9, 1.0)}, r"fit\.betas"),
        ({"warmup_steps": -1}, r"fit\.warmup_steps"),
        ({"grad_clip": 0.0}, r"fit\.grad_clip"),
    ],
)
def test_values_out_of_range_are_named(values, words):
    with pytest.raises(ConfigError, match=words):
        FitConfig(**{"steps": 1, **values})


def test_an_open_length_is_an_error():
    with pytest.raises(ConfigError, match=r"fit\.steps or fit\.epochs"):
        _ = FitConfig().total_steps
    with pytest.raises(ConfigError, match="steps_per_epoch"):
        _ = FitConfig(epochs=3).total_steps

"""What a run records, of short and of very long ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from blipfast.errors import DataError
from blipfast.train import history as module
from blipfast.train.history import History


def recorded(steps: int) -> History:
    history = History("run")
    for step in range(steps):
        history.add(step, 3.0, {"itc": 1.0, "itm": float(step)}, 1e-4, 0.5, 2.0 * step, 8)
    return history


def test_every_step_of_a_short_run_is_kept(tmp_path: Path) -> None:
    history = recorded(100)
    assert history.steps == list(range(100))
    assert history.samples_per_second == 4.0
    assert history.mean("itm", 10) == 94.5
    history.to_json(tmp_path / "history.json")
    assert History.from_json(tmp_path / "history.json") == history


def test_a_long_run_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 200)
    history = recorded(5_000)
    lists = [history.steps, history.total, history.lr, history.grad_norm, history.seconds]
    lists += [history.samples, *history.losses.values()]
    assert {len(values) for values in lists} == {len(history.steps)}
    assert 100 < len(history.steps) <= 200
    assert history.steps == sorted(set(history.steps))
    assert history.steps[-50:] == list(range(4_950, 5_000))  # the latest are there one by one
    assert sum(history.samples) == 8 * 5_000
    assert history.samples_per_second == pytest.approx(4.0)
    weights = [samples / 8 for samples in history.samples]
    means = sum(w * loss for w, loss in zip(weights, history.losses["itm"], strict=True))
    assert means / 5_000 == pytest.approx(4_999 / 2, rel=0.01)
    assert history.mean("itm", 20) == 4_989.5
    assert all(math.isclose(value, 3.0) for value in history.total)


def test_what_is_no_history(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training history"):
        History.from_dict({"pace": []})
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(DataError, match="cannot read the history"):
        History.from_json(tmp_path / "history.json")

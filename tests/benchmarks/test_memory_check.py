"""What a training step is predicted to need is what it needs."""

from __future__ import annotations

import pytest

from benchmarks.memory_check import check

SMALL = {"queue_size": 4096, "image_size": 224}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"batch": 4},
        {"batch": 8, "image_size": 160},
        {"batch": 8, "image_size": 160, "precision": "bf16"},
    ],
)
def test_prediction_is_within_fifteen_percent(case):
    predicted, measured = check({**SMALL, **case})
    assert predicted == pytest.approx(measured, rel=0.15)

"""Every tile that a kernel may run with, and the choice between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blipfast.kernels import tiles
from place import DEVICE, IMPL, INTERPRETED

from blipfast.cli import main
from blipfast.ops import tuning


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(tiles.FOLDER_VAR, str(tmp_path))
    tiles.path.cache_clear()
    tiles.table.cache_clear()
    yield tmp_path
    tiles.path.cache_clear()
    tiles.table.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_candidates_compute_the_same(dtype: torch.dtype) -> None:
    asked = set()
    for place in range(3):
        torch.manual_seed(0)
        with tiles.nth_candidate(place), tiles.observed() as found:
            # Dropout and draws do not depend on tiles, so one seed serves all.
            results = []
            for run in tuning.jobs(DEVICE, dtype, IMPL, small=True):
                torch.manual_seed(1)
                outputs = run()
                results.append(outputs if isinstance(outputs, tuple) else (outputs,))
        asked |= {kernel for kernel, _ in found}
        if place == 0:
            first, tolerance = results, {"atol": 2e-2, "rtol": 2e-2}
            if dtype == torch.float32:
                tolerance = {"atol": 1e-5, "rtol": 1e-4}
        for ours, expected in zip(results, first, strict=True):
            torch.testing.assert_close(ours, expected, **tolerance)
    assert {"cross_attention forward", "cross_attention backward", "contrastive means"} <= asked
    assert {"contrastive gradients", "linear_cross_entropy"} <= asked


def test_tuning_writes_what_launches_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1000, 0, -1))  # each candidate faster than the one before
    monkeypatch.setattr(tuning, "_seconds", lambda run, device: (run(), next(times))[1])
    found = list(tuning.tune(DEVICE, [torch.float16], small=True))
    assert all(
        one.chosen == one.candidates[-1 if one.seconds[-1] < 0.98 * one.seconds[0] else 0]
        for one in found
    )
    slow = [one for one in found if one.seconds[-1] < 0.98 * one.seconds[0]]
    path = tuning.write(DEVICE, found)
    assert path.parent == folder
    card = "interpreter" if INTERPRETED else torch.cuda.get_device_name()
    assert path.name.startswith("".join(c if c.isalnum() else "-" for c in card.lower()))
    assert [p.name for p in folder.iterdir()] == [path.name]
    assert json.loads(path.read_text())["card"] == card
    for one in slow or found:
        chosen = tiles.choose(one.kernel, one.key, one.candidates, torch.empty(0))
        assert chosen == one.chosen
    # Another key's choice is added, and what is there stays.
    other = {("linear_cross_entropy", "fp32"): {"BLOCK_V": 1024, "num_warps": 4, "num_stages": 3}}
    tiles.write(DEVICE, {}, other)
    table = tiles.table(DEVICE)
    assert table["linear_cross_entropy"]["fp32"]["BLOCK_V"] == 1024
    assert table[found[0].kernel][found[0].key] == found[0].chosen


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--device", DEVICE.type, "--small", "--dtypes", "[fp16]"]) == 0
    out = capsys.readouterr().out
    (path,) = folder.iterdir()
    assert out.splitlines()[-1] == str(path)
    assert "cross_attention" in out

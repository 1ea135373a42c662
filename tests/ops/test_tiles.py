"""The table of tuned tiles: who reads it, and what happens when it is not as it should be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from blipfast.cli import main

tiles = pytest.importorskip("blipfast.kernels.tiles", reason="needs Triton")
CPU, TENSOR = torch.device("cpu"), torch.empty(0)
CANDIDATES = [{"BLOCK_N": 64, "num_warps": 4}, {"BLOCK_N": 32, "num_warps": 4}]
REQUEST = ("kernel", "bf16 d=64")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(tiles.FOLDER_VAR, str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    tiles.path.cache_clear()
    tiles.table.cache_clear()


def chosen() -> dict[str, int]:
    return tiles.choose(*REQUEST, CANDIDATES, TENSOR)


def test_without_a_table_the_first_is_taken() -> None:
    assert chosen() == CANDIDATES[0]
    with tiles.forced(REQUEST, CANDIDATES[1]):
        assert chosen() == CANDIDATES[1]
    with tiles.nth_candidate(7):
        assert chosen() == CANDIDATES[1]
    assert chosen() == CANDIDATES[0]


def test_a_choice_is_kept_on_disk(folder: Path) -> None:
    path = tiles.write(CPU, {"card": "x"}, {REQUEST: CANDIDATES[1]})
    assert path.parent == folder
    forget()
    assert chosen() == CANDIDATES[1]
    assert tiles.choose("kernel", "another key", CANDIDATES, TENSOR) == CANDIDATES[0]
    chosen()["BLOCK_N"] = 1  # a copy
    assert chosen() == CANDIDATES[1]


def test_a_choice_that_is_no_candidate_any_more_is_not_taken() -> None:
    tiles.write(CPU, {}, {REQUEST: {"BLOCK_N": 512, "num_warps": 4}})
    assert chosen() == CANDIDATES[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"tiles": 3}', '{"tiles": {"kernel": 3}}'])
def test_a_broken_table_is_named(text: str) -> None:
    path = tiles.path(CPU)
    path.write_text(text)
    with pytest.warns(UserWarning, match=path.name):
        assert chosen() == CANDIDATES[0]


def test_other_source_is_another_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.write(CPU, {}, {REQUEST: CANDIDATES[1]})
    monkeypatch.setattr(tiles, "_source", lambda: "changed")
    forget()
    assert chosen() == CANDIDATES[0]


def test_no_tables_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.write(CPU, {}, {REQUEST: CANDIDATES[1]})
    monkeypatch.setenv(tiles.FOLDER_VAR, "0")
    forget()
    assert chosen() == CANDIDATES[0]
    with pytest.raises(ValueError, match=tiles.FOLDER_VAR):
        tiles.write(CPU, {}, {REQUEST: CANDIDATES[1]})


def test_where_tables_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(tiles.FOLDER_VAR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    assert tiles.path(CPU).parent == tmp_path / "cache" / "blipfast" / "tiles"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB")
    assert tiles.path(torch.device("cuda", 0)).name.startswith("nvidia-h100-80gb-triton-")


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="unset TRITON_INTERPRET: the interpreter could tune",
)
def test_tuning_without_a_card_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "nothing to tune" in error
    assert "TRITON_INTERPRET=1" in error

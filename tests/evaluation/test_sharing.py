"""Ranks share the work: the same numbers and files as one process, on odd counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from clip_files import write_clip, write_manifest
from shards import captions, dialogues, pairs, questions, tokenizer, write

from blipfast.checkpoints import save_model
from blipfast.checkpoints.load import build
from blipfast.cli import main
from blipfast.errors import DataError
from blipfast.evaluation import sharing
from blipfast.evaluation.sharing import blocks, gather_by_number, own_blocks, share
from blipfast.models.config import blip_config

TASKS = {
    "retrieval": "retrieval", "caption": "caption", "vqa": "vqa", "nlvr2": "nlvr",
    "visdial": "visdial", "video-retrieval": "retrieval", "video-qa": "vqa",
}  # fmt: skip


def test_alone_a_process_has_all():
    assert share(3) == [0, 1, 2]
    assert blocks([3, 5, 7], 2) == [[3, 5], [7]]
    assert gather_by_number({1: "b", 0: "a"}, 2) == ["a", "b"]


def test_shares_cover_all_once(monkeypatch):
    parts = []
    monkeypatch.setattr(sharing, "world_size", lambda: 3)
    for number in range(3):
        monkeypatch.setattr(sharing, "rank", lambda number=number: number)
        parts.append((share(7), [item for block in own_blocks(7, 2) for item in block]))
    for one in zip(*parts, strict=True):
        assert sorted(item for part in one for item in part) == list(range(7))
    assert parts[0][1] == [0, 1, 6]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{0: "a"}, {0: "a", 1: "b"}], "item 0 was evaluated by two"),
        ([{0: "a"}, {}], r"missing: \[1\]"),
    ],
)
def test_an_item_missing_or_counted_twice_is_an_error(parts, message, monkeypatch):
    monkeypatch.setattr(sharing, "gather", lambda own: parts)
    with pytest.raises(DataError, match=message):
        gather_by_number({}, 2)


def data(folder: Path) -> dict[str, list[str]]:
    """A small set for each task, of a number of items that two ranks cannot halve."""
    write(folder / "captions", captions(5, each=2), max_count=2)
    write(
        folder / "vqa",
        [replace(r, ids={**r.ids, "question": n}) for n, r in enumerate(questions(5))],
    )
    write(folder / "nlvr2", pairs(3), max_count=4)
    write(folder / "visdial", dialogues(3))
    clips = [write_clip(folder / f"v{n}.mp4", 8, hue=n).name for n in range(3)]
    text = [("a dog", "human")]
    write_manifest(folder, [{"video": name, "texts": text} for name in clips])
    asked = [("is it a dog?", "question"), ("yes", "answer")]
    (folder / "qa").mkdir()
    write_manifest(folder / "qa", [{"video": f"../{name}", "texts": asked} for name in clips])
    return {
        "retrieval": ["captions", "--k", "2"], "caption": ["captions"], "vqa": ["vqa"],
        "nlvr2": ["nlvr2"], "visdial": ["visdial"],
        "video-retrieval": ["test.videos.jsonl", "--frames", "2", "--k", "2"],
        "video-qa": ["qa", "--frames", "2"],
    }  # fmt: skip


def calls(folder: Path, out: Path) -> list[list[str]]:
    made = blip_config("blip_tiny", image_size=32)
    config = replace(made, text=replace(made.text, vocab_size=tokenizer().vocab_size))
    for task in set(TASKS.values()):
        torch.manual_seed(0)
        if not (folder / "models" / task).exists():
            save_model(build(task, config, {}), folder / "models" / task)
            tokenizer().save(folder / "models" / task)
    sets = json.loads((folder / "sets.json").read_text())
    common = ["--device", "cpu", "--batch_size", "2"]
    return [
        ["evaluate", what, "--shards", str(folder / sets[what][0]), *sets[what][1:], *common,
         "--checkpoint", str(folder / "models" / task), "--output", str(out / what)]
        for what, task in TASKS.items()
    ]  # fmt: skip


def outputs(folder: Path) -> dict[str, object]:
    """Everything that was written but pages and times."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*.*")):
        if path.suffix == ".json":
            found[str(path.relative_to(folder))] = content = json.loads(path.read_text())
            if path.name == "metrics.json":
                assert content.pop("speed")["seconds"] > 0
        elif path.suffix == ".csv":
            found[str(path.relative_to(folder))] = path.read_text()
    return found


@pytest.mark.slow
def test_every_task_runs_in_bf16(tmp_path):
    """Under autocast the numbers move a little, and nothing stops."""
    (tmp_path / "sets.json").write_text(json.dumps(data(tmp_path)))
    for argv in calls(tmp_path, tmp_path / "out"):
        assert main([*argv, "--precision", "bf16"]) == 0, argv
    scores = json.loads((tmp_path / "out" / "retrieval" / "metrics.json").read_text())
    assert scores["itm"]["ir_r10"] == 100.0  # of five images


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tmp_path):
    (tmp_path / "sets.json").write_text(json.dumps(data(tmp_path)))
    for ranks in (1, 2):
        todo = tmp_path / f"calls{ranks}.json"
        todo.write_text(json.dumps(calls(tmp_path, tmp_path / f"out{ranks}")))
        worker = [str(Path(__file__).parent / "ranks_worker.py"), str(todo)]
        torchrun = [
            "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, *torchrun, *worker],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        # Only one rank speaks.
        assert done.stdout.count('"bad_records"') == len(TASKS)
    one, two = outputs(tmp_path / "out1"), outputs(tmp_path / "out2")
    assert set(one) == set(two)
    assert len(one) == 2 * len(TASKS)
    for name, content in one.items():
        assert two[name] == content, name

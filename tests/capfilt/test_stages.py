"""Stages by themselves, ensembles, and the rows of the paper's table of combinations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from blipfast.capfilt import CapFiltConfig, read_manifest, run_capfilt, run_stage
from blipfast.cli import main
from blipfast.data import Record, ShardWriter, TextEntry, read_shards
from blipfast.errors import ConfigError, DataError


@pytest.fixture
def config(shards: Path, tmp_path: Path, checkpoints: dict[str, str]) -> CapFiltConfig:
    return CapFiltConfig(
        input=str(shards), output=str(tmp_path / "out"), captioners=(checkpoints["captioner"],),
        filters=(checkpoints["filter"],), unit=3, batch_size=2, max_length=12, device="cpu",
    )  # fmt: skip


def files(folder: str | Path) -> dict[str, bytes]:
    """What a run leaves for its users, by name."""
    found = [p for p in Path(folder).iterdir() if p.suffix in (".tar", ".jsonl")]
    return {path.name: path.read_bytes() for path in sorted(found) if path.name[0] != "."}


def rows(config: CapFiltConfig):
    return list(read_manifest(Path(config.output) / "manifest.jsonl"))


def test_stages_one_by_one_are_the_run_as_one(config, tmp_path) -> None:
    run_capfilt(config)
    staged = dataclasses.replace(config, output=str(tmp_path / "staged"))
    run_stage(dataclasses.replace(staged, filters=()), "caption")
    assert not (tmp_path / "staged" / "scores").exists()
    run_stage(dataclasses.replace(staged, captioners=()), "score")
    report = run_stage(dataclasses.replace(staged, captioners=(), filters=()), "filter")
    assert report.images == 12
    assert files(config.output) == files(staged.output)
    assert len(files(staged.output)) > 1


def test_another_threshold_takes_the_scores_of_a_run(config, tmp_path, monkeypatch) -> None:
    run_capfilt(config)
    middle = sorted(row.itm for row in rows(config))[18]
    monkeypatch.setattr("blipfast.capfilt.work.load_model", lambda *a, **k: pytest.fail("a model"))
    again = dataclasses.replace(
        config, work=config.output, output=str(tmp_path / "again"), threshold=middle,
        captioners=(), filters=(),
    )  # fmt: skip
    run_stage(again, "filter")
    decided = rows(again)
    assert [(r.key, r.text, r.itm) for r in decided] == [
        (r.key, r.text, r.itm) for r in rows(config)
    ]
    assert all(r.accepted == (r.itm >= middle) for r in decided if not r.reason)
    assert 0 < sum(r.accepted for r in decided) < len(decided)


def test_ensembles_add_captions_and_combine_scores(config, tmp_path, checkpoints) -> None:
    both = dataclasses.replace(
        config, captioners=(checkpoints["captioner"], checkpoints["captioner2"]),
        filters=(checkpoints["filter"], checkpoints["filter2"]), output=str(tmp_path / "both"),
        captions_per_image=2,
    )  # fmt: skip
    run_capfilt(both)
    found = rows(both)
    assert len(found) == 12 * (1 + 2 * 2)
    writers = {r.captioner for r in found if r.source == "synthetic"}
    assert len(writers) == 2
    assert all(len(r.itm_each) == 2 and r.filter.count("+") == 1 for r in found if not r.reason)
    for r in found:
        assert r.itm == pytest.approx(sum(r.itm_each) / 2)
    strict = dataclasses.replace(
        both, work=both.output, output=str(tmp_path / "strict"), ensemble="min"
    )
    run_stage(strict, "filter")
    assert all(r.itm == min(r.itm_each) for r in rows(strict))
    # Each filter of the ensemble says what it says alone.
    run_capfilt(config)
    alone = {(r.key, r.text): r.itm for r in rows(config)}
    for r in found:
        if (r.key, r.text) in alone:
            assert r.itm_each[0] == pytest.approx(alone[r.key, r.text], abs=1e-6)


def test_captions_without_a_filter_are_all_kept(config, tmp_path) -> None:
    """The paper's row "C": synthetic captions added, nothing filtered."""
    config = dataclasses.replace(config, filters=())
    report = run_capfilt(config)
    assert report.accepted["web"] == 12
    found = rows(config)
    assert {r.reason for r in found if r.accepted} == {"no filter"}
    assert all(r.itm is None and r.filter is None for r in found)
    with pytest.raises(ConfigError, match="neither"):
        run_capfilt(dataclasses.replace(config, captioners=(), output=str(tmp_path / "x")))


def test_human_written_sets_join_the_output(config, tmp_path) -> None:
    with ShardWriter(tmp_path / "coco", "coco") as writer:
        image = next(iter(read_shards(config.input))).image
        for i in range(2):
            texts = (TextEntry("a dog on a mat", "human"),)
            writer.write(Record(f"coco-{i}", image, texts, 40, 40))
    config = dataclasses.replace(config, human=(str(tmp_path / "coco"),))
    report = run_capfilt(config)
    assert [Path(p).name for p in report.human_shards] == ["human-coco-000000.tar"]
    sources = {entry.source for r in read_shards(config.output) for entry in r.texts}
    assert "human" in sources
    with pytest.raises(ConfigError, match="two human-written shards"):
        run_capfilt(dataclasses.replace(
            config, human=(str(tmp_path / "coco"),) * 2, output=str(tmp_path / "x"),
        ))  # fmt: skip


def test_stages_out_of_order_say_what_is_missing(config, shards) -> None:
    with pytest.raises(ConfigError, match="run the stage `score`"):
        run_stage(config, "filter")
    run_stage(config, "caption")
    part = sorted((Path(config.output) / "captions").rglob("0*.jsonl"))[0]
    part.unlink()
    with pytest.raises(DataError, match="finish the stage `caption`"):
        run_stage(dataclasses.replace(config, captioners=()), "score")
    with pytest.raises(ConfigError, match="captions of other settings"):
        run_stage(dataclasses.replace(config, top_p=0.5), "score")
    run_stage(config, "score")
    done = sorted((Path(config.output) / "scores").rglob("0*.jsonl"))[0]
    done.write_text(done.read_text()[:-30])
    with pytest.raises(DataError, match="delete it to make it anew"):
        run_stage(config, "filter")
    done.unlink()
    with pytest.raises(DataError, match="not done yet"):
        run_stage(config, "filter")
    run_stage(config, "score")
    assert run_stage(config, "filter").images == 12


def test_changed_shards_are_noticed(config, shards) -> None:
    run_stage(config, "score")
    first, second = sorted(shards.glob("*.tar"))[:2]
    keep = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(keep)
    with pytest.raises(DataError, match="the shard has changed"):
        run_stage(config, "filter")
    assert not list(Path(config.output).glob("*.tar"))


def test_the_command_line(config, checkpoints, capsys, tmp_path) -> None:
    common = ["--input", config.input, "--device", "cpu", "--unit", "3", "--max_length", "12"]
    models = ["--captioner", checkpoints["captioner"], "--filter", checkpoints["filter"]]
    assert main(["capfilt", *common, *models, "--output", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "of 12 images kept" in out
    assert "manifest.jsonl" in out
    other = ["--output", str(tmp_path / "b"), "--work", str(tmp_path / "a"), "--threshold", "1"]
    assert main(["capfilt", "filter", *common, *other]) == 0
    assert "web: 0 of 12 texts accepted" in capsys.readouterr().out
    two = [*models, "--filter", checkpoints["filter2"], "--output", str(tmp_path / "c")]
    assert main(["capfilt", *common, *two]) == 0
    about = json.loads((tmp_path / "c" / "capfilt.json").read_text())
    assert len(about["filters"]) == 2
    assert about["config"]["filters"] == [checkpoints["filter"], checkpoints["filter2"]]
    assert main(["capfilt", "sift", *common]) == 2
    assert "no stage 'sift'; there are caption, score, filter" in capsys.readouterr().err

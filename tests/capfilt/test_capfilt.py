"""CapFilt at toy size: what is written, what is resumed, and bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from web_set import jpeg, record

from blipfast.capfilt import (
    Candidate,
    CapFiltConfig,
    Score,
    caption_records,
    filter_candidates,
    model_hash,
    read_manifest,
    run_capfilt,
    score_records,
)
from blipfast.capfilt import work as work_module
from blipfast.data import BlipTokenizer, ShardWriter, read_shards
from blipfast.errors import ConfigError, DataError
from blipfast.models.blip import PackedText


def _config(shards: Path, output: Path, **changes) -> CapFiltConfig:
    return CapFiltConfig(
        input=str(shards), output=str(output), batch_size=4, unit=4, max_length=12,
        prompt="a picture of", captions_per_image=2, **changes,
    )  # fmt: skip


def _run(config: CapFiltConfig, models):
    captioner, judge, tokenizer = models
    return run_capfilt(config, captioner=captioner, filter_model=judge, tokenizer=tokenizer)


def _rows(config: CapFiltConfig):
    return list(read_manifest(Path(config.output) / "manifest.jsonl"))


def test_output_is_what_the_manifest_says(shards, tmp_path, models) -> None:
    everything = _config(shards, tmp_path / "all", threshold=0.0)
    _run(everything, models)
    middle = statistics.median(row.itm for row in _rows(everything))
    config = _config(shards, tmp_path / "out", threshold=middle)
    report = _run(config, models)
    rows = _rows(config)
    assert len(rows) == 12 * 3
    assert report.images == 12
    assert report.texts == {"web": 12, "synthetic": 24}
    accepted = defaultdict(set)
    for row in rows:
        if row.accepted:
            assert row.itm >= config.threshold
            accepted[row.key].add((row.text, row.source))
        else:
            assert row.reason or row.itm < config.threshold
        assert row.filter == model_hash(models[1])
        assert row.captioner == (model_hash(models[0]) if row.source == "synthetic" else None)
    assert 0 < sum(map(len, accepted.values())) < len(rows)  # the filter does tell texts apart
    written = {r.key: {(t.text, t.source) for t in r.texts} for r in read_shards(report.shards)}
    assert written == accepted
    assert report.kept == len(accepted)
    originals = {r.key: r.image for r in read_shards(shards)}
    assert all(r.image == originals[r.key] for r in read_shards(report.shards))


def test_scores_are_those_of_the_model_one_pair_at_a_time(models) -> None:
    _, judge, tokenizer = models
    pixels = torch.randn(3, 3, 32, 32)
    texts = [["a dog", "a cat on a mat"], [], ["two men", " ", "a dog"]]
    candidates = [[Candidate(t, "web") for t in its] for its in texts]
    config = CapFiltConfig(input="", output="")
    scores = score_records(judge, tokenizer, pixels, candidates, config)
    assert [[s is None for s in its] for its in scores] == [[False] * 2, [], [False, True, False]]
    for image, its, found in zip(pixels, texts, scores, strict=True):
        for text, score in zip(its, found, strict=True):
            if score is None:
                continue
            batch = tokenizer([text])
            packed = PackedText.from_padded(batch.input_ids, batch.attention_mask)
            itm, itc = judge.match_pairs(image[None], packed)
            assert score.itm == pytest.approx(itm.item(), abs=1e-5)
            assert score.itc == pytest.approx(itc.item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_same_seed_same_output_whatever_the_batch(shards, tmp_path, models, batch_size) -> None:
    one = _config(shards, tmp_path / "one")
    two = dataclasses.replace(_config(shards, tmp_path / "two"), batch_size=batch_size)
    other = dataclasses.replace(_config(shards, tmp_path / "other"), seed=1)
    for config in (one, two, other):
        _run(config, models)
    texts = [[(r.key, r.text, r.accepted) for r in _rows(c)] for c in (one, two, other)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    synthetic = [text for _, text, _ in texts[0][2::3]]
    assert len(set(synthetic)) > 1


def test_resumes_after_an_interruption(shards, tmp_path, models, monkeypatch) -> None:
    whole = _config(shards, tmp_path / "whole")
    _run(whole, models)
    cut = _config(shards, tmp_path / "cut")
    seen = []
    score = work_module.score_records

    def interrupted(*args):
        seen.append(1)
        if len(seen) == 4:  # in the second shard, after its first unit was written
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(work_module, "score_records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(cut, models)
    left = sorted(str(p.relative_to(cut.output)) for p in Path(cut.output).rglob("*.jsonl"))
    assert left == [
        "scores/web-000000/00000000.jsonl",
        "scores/web-000000/00000004.jsonl",
        "scores/web-000001/00000000.jsonl",
    ]
    again = []
    monkeypatch.setattr(work_module, "score_records", lambda *a: again.append(1) or score(*a))
    _run(cut, models)
    assert len(again) == 2  # units of the second and third shard
    names = {p.name for p in Path(whole.output).glob("*.tar")}
    assert names == {p.name for p in Path(cut.output).glob("*.tar")}
    for name in [*names, "manifest.jsonl"]:
        assert (Path(whole.output) / name).read_bytes() == (Path(cut.output) / name).read_bytes()
    assert _run(cut, models).skipped_shards == 3


def test_output_of_other_settings_is_not_mixed(shards, tmp_path, models) -> None:
    config = _config(shards, tmp_path / "out")
    _run(config, models)
    with pytest.raises(ConfigError, match="other settings"):
        _run(dataclasses.replace(config, threshold=0.9), models)


def test_bad_records_are_named(tmp_path, models) -> None:
    folder = tmp_path / "web"
    with ShardWriter(folder, "web") as writer:
        for i in range(6):
            writer.write(record(i, " ... " if i == 1 else "a dog"))
        writer.write(record(6, image=jpeg(6)[:300]))
    config = _config(folder, tmp_path / "out", max_bad_fraction=0.2)
    report = _run(config, models)
    assert report.unreadable == 1
    (bad,) = [r for r in _rows(config) if r.text is None]
    assert bad.key == "img-006"
    assert "runcated" in bad.reason
    assert not bad.accepted
    (empty,) = [r for r in _rows(config) if r.text == " ... "]
    assert (empty.accepted, empty.reason, empty.itm) == (False, "empty text", None)
    strict = _config(folder, tmp_path / "strict", max_bad_fraction=0.1)
    with pytest.raises(DataError, match="img-006"):
        _run(strict, models)
    assert not list(Path(strict.output).glob("*.tar"))


def test_a_broken_record_in_the_shard_is_named(shards, tmp_path, models) -> None:
    first = sorted(shards.glob("*.tar"))[0]
    data = bytearray(first.read_bytes())
    at = data.index(b'"texts"')
    data[at : at + 7] = b'"tekst"'
    first.write_bytes(data)
    config = _config(shards, tmp_path / "out", max_bad_fraction=0.3)
    assert _run(config, models).unreadable == 1
    (bad,) = [r for r in _rows(config) if r.text is None]
    assert bad.key == "img-000"


def test_empty_synthetic_captions_are_rejected(shards, tmp_path, models, monkeypatch) -> None:
    monkeypatch.setattr(
        "blipfast.capfilt.models.caption_stream", lambda *a, **k: [""] * (2 * len(k["image_ids"]))
    )
    config = _config(shards, tmp_path / "out")
    report = _run(config, models)
    synthetic = [r for r in _rows(config) if r.source == "synthetic"]
    assert len(synthetic) == 24
    assert all(r.reason == "empty text" and not r.accepted for r in synthetic)
    assert "synthetic" not in report.accepted


@pytest.mark.parametrize("keep", ["web", "synthetic"])
def test_keep(shards, tmp_path, models, keep) -> None:
    config = _config(shards, tmp_path / "out", keep=keep, threshold=0.0)
    captioner, judge, tokenizer = models
    report = run_capfilt(
        config,
        captioner=None if keep == "web" else captioner,
        filter_model=judge,
        tokenizer=tokenizer,
    )
    assert set(report.accepted) == {keep}


def test_beam_and_greedy_lengths(models) -> None:
    captioner, _, tokenizer = models
    config = CapFiltConfig(input="", output="", method="beam", captions_per_image=2, max_length=9)
    found = caption_records(captioner, tokenizer, ["a", "b"], [torch.randn(2, 3, 32, 32)], config)
    assert [len(its) for its in found] == [2, 2]
    assert all(c.source == "synthetic" and not c.text.startswith("a picture") for c in found[0])


def test_filter_candidates_by_hand() -> None:
    texts = [
        Candidate("a", "web"), Candidate("b", "synthetic"), Candidate("b", "synthetic"),
        Candidate("c", "human"), Candidate("", "synthetic"), Candidate("d", "web"),
    ]  # fmt: skip
    scores = [Score(0.5, 0), Score(0.8, 0), Score(0.8, 0), Score(0.1, 0), None, Score(0.49, 0)]
    options = {"threshold": 0.5, "filter_hash": "f"}
    rows = filter_candidates("k", texts, scores, trusted=("human",), **options)
    assert [r.accepted for r in rows] == [True, True, False, True, False, False]
    assert [r.reason for r in rows] == [
        "", "", "same as an accepted text of this image", "trusted source", "empty text", "",
    ]  # fmt: skip
    with pytest.raises(DataError, match="6 texts, but 1 scores"):
        filter_candidates("k", texts, scores[:1], **options)


def test_a_stricter_threshold_for_synthetic_texts() -> None:
    texts = [Candidate("a", "web"), Candidate("b", "synthetic"), Candidate("c", "synthetic")]
    scores = [Score(0.5, 0), Score(0.5, 0), Score(0.9, 0)]
    rows = filter_candidates(
        "k", texts, scores, threshold=0.5, synthetic_threshold=0.6, filter_hash="f"
    )
    assert [r.accepted for r in rows] == [True, False, True]


def test_models_from_checkpoints(shards, tmp_path, models, checkpoints) -> None:
    config = _config(
        shards, tmp_path / "out", captioners=(checkpoints["captioner"],),
        filters=(checkpoints["filter"],),
    )  # fmt: skip
    run_capfilt(config)
    direct = _config(shards, tmp_path / "direct")
    _run(direct, models)
    manifest = (tmp_path / "out" / "manifest.jsonl").read_text()
    assert manifest == (tmp_path / "direct" / "manifest.jsonl").read_text()
    with pytest.raises(ConfigError, match="neither"):
        run_capfilt(
            dataclasses.replace(config, filters=(), captioners=(), output=str(tmp_path / "x"))
        )


def test_a_missing_vocabulary_is_said(shards, tmp_path, checkpoints) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoints["filter"], bare)
    (bare / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match=r"no vocab.txt beside the checkpoint .*bare"):
        run_capfilt(_config(shards, tmp_path / "out", filters=(str(bare),), keep="web"))


def test_a_vocabulary_of_other_models_is_refused(shards, tmp_path, models) -> None:
    """Their words would be read and written as others."""
    captioner, judge, tokenizer = models
    other, _ = BlipTokenizer.subset(["a dog"], tokenizer)
    with pytest.raises(ConfigError, match="pieces, the BlipForCaptioning"):
        _run(_config(shards, tmp_path / "out"), (captioner, judge, other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "greedy"}, "method"),
        ({"threshold": 1.5}, "threshold"),
        ({"synthetic_threshold": -0.1}, "synthetic_threshold"),
        ({"batch_size": 0}, "batch_size"),
        ({"top_p": 0.0}, "top_p"),
        ({"method": "beam", "captions_per_image": 4}, "captions_per_image"),
        ({"min_length": 30}, "min_length"),
        ({"max_text_tokens": 2}, "max_text_tokens"),
    ],
)
def test_config_says_what_is_wrong(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        CapFiltConfig(input="x", output="y", **changes)


def test_manifest_errors_name_the_line(tmp_path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text(json.dumps({"key": "a"}) + "\n")
    with pytest.raises(DataError, match="line 1"):
        list(read_manifest(file))

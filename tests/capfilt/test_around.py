"""Statistics, calibration and pages around a run, and rounds of bootstrapping."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from shards import tiny_bootstrap

from blipfast.capfilt import CapFiltConfig, Decision, read_manifest, run_capfilt
from blipfast.capfilt.bootstrap import BootstrapConfig, packaged_bootstraps, run_bootstrap
from blipfast.capfilt.calibrate import (
    Label,
    calibrate,
    labels_to_json,
    read_labels,
    sample_texts,
)
from blipfast.capfilt.statistics import Reservoir, diversity, entropy, statistics_of
from blipfast.cli import main
from blipfast.errors import ConfigError, DataError
from blipfast.train.config import packaged_configs


def decision(key: int, text: str, source: str, itm: float | None, accepted: bool, reason: str = ""):
    return Decision(f"k{key}", text, source, itm, itm, accepted, reason, "f", None, 0)


def test_diversity_by_hand() -> None:
    found = diversity(["a red dog", "A red dog", "a cat"])
    assert found.captions == 3
    assert found.unique == 1.0
    assert found.distinct == pytest.approx((4 / 8, 3 / 5, 1 / 2))
    assert found.words == pytest.approx(8 / 3)
    assert found.vocabulary == 4
    assert entropy(Counter({"a": 1, "b": 1, "c": 2})) == pytest.approx(1.5)
    assert found.entropy[2] == pytest.approx(0.0)
    assert diversity([]).entropy == (0.0, 0.0, 0.0)


def test_noise_ratio_counts_what_the_filter_rejects() -> None:
    rows = [
        decision(0, "a", "web", 0.9, True),
        decision(0, "b", "synthetic", 0.2, False),
        decision(0, "c", "synthetic", 0.8, True),
        decision(1, "c", "synthetic", 0.8, False, "same as an accepted text of this image"),
        decision(1, "", "synthetic", None, False, "empty text"),
        Decision("k2", None, "image", None, None, False, "broken", None, None, 0),
    ]
    found = statistics_of(rows)
    assert found.sources["synthetic"].noise_ratio == pytest.approx(0.5)
    assert found.sources["web"].noise_ratio == 0
    assert found.sources["synthetic"].texts == 4
    assert found.synthetic.captions == 3
    assert found.unreadable == 1


def test_a_reservoir_is_fair_and_bounded() -> None:
    counts = Counter()
    for seed in range(3000):
        sample = Reservoir(3, random.Random(seed))
        for item in range(10):
            sample.add(item)
        assert len(sample.kept) == len({*sample.kept}) == 3
        counts.update(sample.kept)
    assert sample.seen == 10
    # Each is kept 3 times in 10; the standard deviation of a count is 25.
    assert all(abs(counts[item] - 900) < 125 for item in range(10))


def noisy_decisions(count: int = 4000):
    """Texts that match with probability `itm ** 2`, and that truth."""
    rng = random.Random(0)
    rows, truth = [], {}
    for i in range(count):
        itm = rng.random() ** 3  # most are bad
        row = decision(i, f"text {i}", "web" if i % 2 else "synthetic", itm, itm >= 0.5)
        rows.append(row)
        truth[row.key] = rng.random() < itm**2
    return rows, truth


def test_a_sample_is_spread_over_the_scores() -> None:
    rows, _ = noisy_decisions()
    labels = sample_texts(rows, 200)
    assert len(labels) == 200
    assert Counter(label.kind for label in labels) == {"web": 100, "synthetic": 100}
    tenths = Counter(int(label.itm * 10) for label in labels)
    assert min(tenths[i] for i in range(10)) >= 18
    # Together they stand for all texts.
    assert sum(label.weight for label in labels) == pytest.approx(len(rows))
    assert sample_texts(rows, 200) == labels
    assert len({label.key for label in labels}) == 200
    assert len(sample_texts(rows[:5], 200)) == 5
    with pytest.raises(DataError, match="no filter"):
        sample_texts([decision(0, "a", "web", None, True, "no filter")], 10)


def test_a_labelled_sample_estimates_the_whole_run() -> None:
    rows, truth = noisy_decisions(20_000)
    labels = [dataclasses.replace(x, match=truth[x.key]) for x in sample_texts(rows, 1200)]
    for kind, curve in calibrate(labels, precision=0.7).items():
        its = [r for r in rows if (r.source == "synthetic") == (kind == "synthetic")]
        kept = [r for r in its if r.itm >= curve.threshold]
        real = sum(truth[r.key] for r in kept) / len(kept)
        found = sum(truth[r.key] for r in kept) / sum(truth[r.key] for r in its)
        assert curve.precision[curve.chosen] >= 0.7
        assert real == pytest.approx(curve.precision[curve.chosen], abs=0.08)
        assert found == pytest.approx(curve.recall[curve.chosen], abs=0.1)


def test_curves_are_those_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import binary_precision_recall_curve

    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(300, generator=generator, dtype=torch.float64) * 50).round() / 50  # ties
    match = torch.rand(300, generator=generator, dtype=torch.float64) < scores
    labels = [
        Label("k", "t", "web", s, 1.0, m)
        for s, m in zip(scores.tolist(), match.tolist(), strict=True)
    ]
    (curve,) = calibrate(labels).values()
    p, r, thresholds = binary_precision_recall_curve(scores, match.long())
    torch.testing.assert_close(torch.tensor(curve.precision), p[:-1].float())
    torch.testing.assert_close(torch.tensor(curve.recall), r[:-1].float())
    torch.testing.assert_close(torch.tensor(curve.thresholds), thresholds.float())
    f1 = [
        2 * a * b / (a + b) if a + b else 0
        for a, b in zip(curve.precision, curve.recall, strict=True)
    ]
    assert f1[curve.chosen] == max(f1)


def test_label_files_that_cannot_be_used(tmp_path) -> None:
    file = tmp_path / "labels.jsonl"
    rows = [Label("k", "t", "web", 0.5), Label("k", "u", "web", 0.6, match=True)]
    file.write_text("\n".join(labels_to_json(rows)) + "\n\n")
    assert read_labels(file) == rows[1:]
    with pytest.raises(DataError, match="tell nothing apart"):
        calibrate(read_labels(file))
    with pytest.raises(ConfigError, match=r"precision of 0.9; the highest is 0.500"):
        calibrate([*rows[1:], Label("k", "v", "web", 0.6, match=False)], precision=0.9)
    for bad, message in (
        ('{"key": "k"}', "line 1"),
        (json.dumps({"key": "k", "text": "t", "source": "web", "itm": 2, "match": True}), "0 to 1"),
        ("", "label some first"),
    ):
        file.write_text(bad)
        with pytest.raises(DataError, match=message):
            read_labels(file)
    with pytest.raises(DataError, match="cannot read"):
        read_labels(tmp_path / "none.jsonl")


def test_pages(shards, checkpoints, tmp_path, capsys) -> None:
    for method in ("nucleus", "beam"):
        run_capfilt(CapFiltConfig(
            input=str(shards), output=str(tmp_path / method), method=method, max_length=12,
            captioners=(checkpoints["captioner"],), filters=(checkpoints["filter"],), device="cpu",
        ))  # fmt: skip
    page = tmp_path / "page.html"
    runs = [str(tmp_path / "nucleus"), str(tmp_path / "beam")]
    assert main(["capfilt", "report", *runs, "--output", str(page)]) == 0
    html = page.read_text()
    assert "<th>nucleus</th><th>beam</th>" in html
    assert "noise ratio" in html
    assert html.count("<img") == 24
    assert "<script" not in html

    labels = tmp_path / "labels.html"
    assert main(["capfilt", "sample", runs[0], "--count", "16", "--output", str(labels)]) == 0
    rows = [json.loads(line) for line in labels.with_suffix(".jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert labels.read_text().count('class="card"') == 16
    middle = sorted(row["itm"] for row in rows)[8]
    for i, row in enumerate(rows):
        row["match"] = row["itm"] >= middle if i else row["itm"] < middle
    labels.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = tmp_path / "thresholds.html"
    said = ["calibrate", str(labels.with_suffix(".jsonl")), "--output", str(chosen)]
    assert main(["capfilt", *said]) == 0
    found = json.loads(chosen.with_suffix(".json").read_text())
    assert set(found) <= {"threshold", "synthetic_threshold"}
    assert "--threshold" in capsys.readouterr().out
    assert "<svg" in chosen.read_text()
    assert main(["capfilt", "report", str(tmp_path)]) == 2
    assert "is no output of CapFilt" in capsys.readouterr().err


@pytest.fixture
def everything(shards, checkpoints, tmp_path) -> list[str]:
    """Arguments of a bootstrap at toy size."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_bootstrap()))
    human = tmp_path / "human"
    shutil.copytree(shards, human)
    for shard in human.glob("*.tar"):
        shard.rename(shard.with_name(shard.name.replace("web", "coco")))
    return [
        "capfilt", "bootstrap", "--config", str(file), "--pretrained", checkpoints["pretrained"],
        "--web", str(shards), "--human", str(human),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "shared", "continued", "web_longer", "two_rounds"])
def test_every_bootstrap_runs_and_goes_on(variant, everything, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    arguments = [*everything[:2], "--config", variant, *everything[2:], "--output", str(output)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    models = [Path(line) for line in said.splitlines() if line.startswith(str(output))]
    assert len(models) == (2 if variant == "two_rounds" else 1)
    assert all((model / "vocab.txt").is_file() for model in models)
    if variant != "web_longer":
        first = output / "round-1"
        rows = list(read_manifest(first / "shards" / "manifest.jsonl"))
        assert {row.source for row in rows} == {"web", "synthetic"}
        assert (first / "shared").is_dir() == (variant == "shared")
        trained = json.loads((first / "model" / "train.json").read_text())
        assert (trained["model"]["checkpoint"] is not None) == (variant == "continued")
        assert trained["data"]["shards"] == str(first / "shards")
    # What is done is not done again; what is gone is made anew.
    shutil.rmtree(models[-1])
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert again.count("done before") == said.count(": train") - 1
    assert (models[-1] / "vocab.txt").is_file()


@pytest.mark.slow
def test_finetuning_alone_is_the_start_of_a_bootstrap(everything, tmp_path, capsys) -> None:
    output = ["--output", str(tmp_path / "out")]
    assert main(["capfilt", "finetune", *everything[2:], *output]) == 0
    said = capsys.readouterr().out.splitlines()
    models = [
        str(tmp_path / "out" / "round-1" / role / "model") for role in ("captioner", "filter")
    ]
    assert said[-2:] == models
    assert not (tmp_path / "out" / "round-1" / "shards").exists()
    assert main([*everything, *output]) == 0
    assert capsys.readouterr().out.count("done before") == 2
    runs = [str(tmp_path / "out" / "round-1" / "shards")] * 2
    page = tmp_path / "rounds.html"
    assert main(["capfilt", "report", *runs, "--output", str(page)]) == 0
    assert "round-1/shards" in page.read_text()


def test_bootstraps_are_the_recipes_of_the_paper() -> None:
    paper = yaml.safe_load(packaged_bootstraps()["paper"].read_text())
    for part, name in (
        ("captioner", "capfilt_captioner"), ("filter", "capfilt_filter"), ("pretrain", "pretrain"),
    ):  # fmt: skip
        recipe = yaml.safe_load(packaged_configs()[name].read_text())
        del recipe["output"]
        assert paper[part] == recipe


def test_bootstrap_says_what_is_missing(capsys) -> None:
    assert main(["capfilt", "bootstrap"]) == 2
    assert "web is not given" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"captioner\.task is pretrain, it must be caption"):
        run_bootstrap(BootstrapConfig(pretrained="m", web="w", human="h"))
    with pytest.raises(ConfigError, match="rounds is -1"):
        BootstrapConfig(rounds=-1)

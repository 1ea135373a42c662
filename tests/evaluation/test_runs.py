"""Whole evaluations through the command line: captions by domain, clips, files, page, bad input."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from clip_files import write_clip, write_manifest
from shards import captions, picture, questions, record, tokenizer, write

from blipfast.checkpoints import save_model
from blipfast.checkpoints.load import build
from blipfast.cli import main
from blipfast.models.config import blip_config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tiny random model of each task."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = blip_config("blip_tiny", image_size=32)
    config = replace(made, text=replace(made.text, vocab_size=tokenizer().vocab_size))
    for task in ("retrieval", "caption", "vqa"):
        torch.manual_seed(1)
        save_model(build(task, config, {}), folder / task)
        tokenizer().save(folder / task)
    return folder


@pytest.fixture
def evaluate(tmp_path, capsys, checkpoints):
    """Calls `blipfast evaluate`: status, metrics without times, stderr."""

    def call(what, task, shards, *more):
        argv = ["evaluate", what, "--shards", str(shards), "--checkpoint", str(checkpoints / task)]
        argv += ["--device", "cpu", "--batch_size", "3", "--output", str(tmp_path / "out"), *more]
        status = main(argv)
        out, err = capsys.readouterr()
        metrics = json.loads(out) if status == 0 else {}
        metrics.pop("speed", None)
        return status, metrics, err

    return call


def output(tmp_path: Path, name: str) -> list:
    return json.loads((tmp_path / "out" / name).read_text())


def test_captions_by_domain(tmp_path, evaluate, monkeypatch):
    monkeypatch.setenv("PATH", "")  # Java would take its time; tests/evaluation/test_captions.py
    pytest.importorskip("pycocoevalcap", reason="needs the extra metrics")
    names = ["in-domain", "near-domain", "out-domain"]
    records = [
        replace(r, ids={**r.ids, "domain": names[n % 3]}) for n, r in enumerate(captions(6, 2))
    ]
    write(tmp_path / "shards", records)
    status, metrics, err = evaluate("caption", "caption", tmp_path / "shards")
    assert status == 0, err
    assert set(metrics["domains"]) == set(names)
    assert {"bleu_4", "rouge_l", "cider"} <= set(metrics) & set(metrics["domains"]["in-domain"])
    assert "bleu_4" in err  # the table
    rows = output(tmp_path, "captions.json")
    assert [row["image_id"] for row in rows] == list(range(6))
    assert [row["caption"] for row in rows][:5] == metrics["first_captions"]


def test_withheld_captions_give_a_file_for_the_server(tmp_path, evaluate):
    write(tmp_path / "shards", [record(n, [("", "withheld")]) for n in range(3)])
    status, metrics, _ = evaluate("caption", "caption", tmp_path / "shards")
    assert status == 0
    assert "cider" not in metrics
    assert len(output(tmp_path, "captions.json")) == 3
    assert "The truth is withheld" in (tmp_path / "out/page.html").read_text()


def test_a_penalty_on_repetition_changes_captions(tmp_path, evaluate):
    write(tmp_path / "shards", [record(n, [("", "withheld")]) for n in range(4)])
    plain = evaluate("caption", "caption", tmp_path / "shards")[1]["first_captions"]
    options = ["--repetition_penalty", "0.01"]
    assert (
        evaluate("caption", "caption", tmp_path / "shards", *options)[1]["first_captions"] != plain
    )


def test_the_page_holds_pictures_and_needs_no_other_file(tmp_path, evaluate):
    pages = [record(n, [("Is <b>it</b> a dog?", "question"), ("yes", "answer")]) for n in range(3)]
    write(tmp_path / "shards", pages)
    (tmp_path / "answers.txt").write_text("yes\nno\n")
    status, _, err = evaluate(
        "vqa", "vqa", tmp_path / "shards", "--answers", str(tmp_path / "answers.txt")
    )
    assert status == 0, err
    page = (tmp_path / "out/page.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "Is &lt;b&gt;it&lt;/b&gt; a dog?" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "accuracy · overall" in page


def test_one_image_of_many_questions_is_encoded_once_a_batch(tmp_path, evaluate, monkeypatch):
    from blipfast.tasks.vqa import BlipForVQA

    sizes = []
    plain = BlipForVQA.encode_image

    def counted(self, pixels, **options):
        sizes.append(len(pixels))
        return plain(self, pixels, **options)

    same = [replace(r, image=picture(n // 3), ids={"image": n // 3, "question": n})
            for n, r in enumerate(questions(6))]  # fmt: skip
    write(tmp_path / "shards", same)
    monkeypatch.setattr(BlipForVQA, "encode_image", counted)
    assert evaluate("vqa", "vqa", tmp_path / "shards")[0] == 0
    assert sizes == [1, 1]
    together = output(tmp_path, "vqa_result.json")
    assert evaluate("vqa", "vqa", tmp_path / "shards", "--batch_size", "1")[0] == 0
    assert output(tmp_path, "vqa_result.json") == together


def clips(folder: Path, count: int = 4) -> Path:
    for n in range(count):
        write_clip(folder / f"v{n}.mp4", 12, hue=n)
    rows = [{"video": f"v{n}.mp4", "texts": [(f"a dog {n}", "human")]} for n in range(count)]
    return write_manifest(folder, [*rows, {"video": "v0.mp4", "texts": [("a red cat", "human")]}])


def test_video_retrieval(tmp_path, evaluate):
    manifest = clips(tmp_path)
    status, metrics, err = evaluate("video-retrieval", "retrieval", manifest, "--frames", "3")
    assert status == 0, err
    assert (metrics["videos"], metrics["texts"], metrics["pairs_through_itm"]) == (4, 5, 20)
    both = metrics["itm"], metrics["itc"]
    assert all(0 <= one["t2v_r1"] <= one["t2v_r5"] == 100 for one in both)
    assert all(1 <= one["t2v_median_rank"] <= 4 for one in both)
    found = output(tmp_path, "video_retrieval.json")
    videos = ["v0.mp4", "v1.mp4", "v2.mp4", "v3.mp4", "v0.mp4"]
    texts = ["a dog 0", "a red cat", "a dog 1", "a dog 2", "a dog 3"]
    truth = dict(
        zip(["a dog 0", "a dog 1", "a dog 2", "a dog 3", "a red cat"], videos, strict=True)
    )
    assert [row["text"] for row in found] == texts
    right = sum(truth[row["text"]] == row["video"] for row in found)
    assert metrics["itm"]["t2v_r1"] == pytest.approx(20.0 * right)
    again = evaluate("video-retrieval", "retrieval", manifest, "--frames", "3", "--keep_bytes", "0")
    assert again[1] == metrics


def test_video_questions(tmp_path, evaluate):
    for n in range(2):
        write_clip(tmp_path / f"v{n}.avi", 20, hue=n)
    rows = []
    for n in range(5):
        texts = [(f"what is it {n}?", "question"), (["Dog", "cat"][n % 2], "answer")]
        rows.append({"video": f"v{n % 2}.avi", "texts": texts, "ids": {"question": 70 + n}})
    manifest = write_manifest(tmp_path, rows)
    (tmp_path / "answers.txt").write_text("dog\ncat\nred\n")
    options = ["--answers", str(tmp_path / "answers.txt"), "--frames", "4"]
    status, metrics, err = evaluate("video-qa", "vqa", manifest, *options)
    assert status == 0, err
    given = {row["question_id"]: row["answer"] for row in output(tmp_path, "video_qa_result.json")}
    assert set(given) == {70, 71, 72, 73, 74}
    right = sum(given[70 + n] == ["dog", "cat"][n % 2] for n in range(5))
    assert metrics == {
        "videos": 2,
        "questions": 5,
        "scored": 5,
        "accuracy": 20.0 * right,
        "bad_records": 0,
    }
    assert evaluate("video-qa", "vqa", manifest, "--frames", "4")[0] == 0  # in free form


def test_a_damaged_clip_is_named_or_left_out(tmp_path, evaluate):
    manifest = clips(tmp_path)
    (tmp_path / "v2.mp4").write_bytes(b"nothing")
    options = ["--frames", "2"]
    status, _, err = evaluate("video-retrieval", "retrieval", manifest, *options)
    assert status == 2
    assert "v2.mp4: damaged, or not a video" in err
    options += ["--max_bad_fraction", "0.5"]
    status, metrics, err = evaluate("video-retrieval", "retrieval", manifest, *options)
    assert (status, metrics["videos"], metrics["texts"], metrics["bad_records"]) == (0, 3, 4, 1)
    assert "left out: " in err


def test_a_truncated_image_is_counted_or_ends_the_run(tmp_path, evaluate):
    records = captions(5)
    records[3] = replace(records[3], image=records[3].image[:200])
    write(tmp_path / "shards", records)
    status, _, err = evaluate("retrieval", "retrieval", tmp_path / "shards")
    assert status == 2
    assert "r003: image: truncated or damaged" in err
    status, metrics, _ = evaluate(
        "retrieval", "retrieval", tmp_path / "shards", "--max_bad_fraction", "0.5"
    )
    assert (status, metrics["images"], metrics["texts"], metrics["bad_records"]) == (0, 4, 4, 1)


@pytest.mark.parametrize(
    ("what", "task", "options", "message"),
    [
        ("vqa", "vqa", [], "0 texts with source question"),
        ("visdial", "vqa", [], "visdial"),
        ("retrieval", "retrieval", ["--k", "0"], "k is 0"),
        ("retrieval", "retrieval", ["--keep_bytes", "-1"], "keep_bytes is -1"),
        ("retrieval", "retrieval", ["--max_bad_fraction", "2"], "max_bad_fraction is 2"),
        ("video-qa", "vqa", ["--frames", "0"], "frames is 0"),
        ("video-qa", "vqa", [], "holds 0 manifests"),
    ],
)
def test_what_cannot_be_evaluated_is_said(what, task, options, message, tmp_path, evaluate):
    write(tmp_path / "shards", captions(3))
    status, _, err = evaluate(what, task, tmp_path / "shards", *options)
    assert status == 2
    assert message in err


def test_an_empty_shard_is_named(tmp_path, evaluate):
    import tarfile

    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    status, _, err = evaluate("vqa", "vqa", tmp_path / "empty.tar")
    assert status == 2
    assert "empty.tar hold no usable record" in err


def test_the_originals_ways_are_options(tmp_path, evaluate, monkeypatch):
    """Padding that is looked at, and a frame step cut to a whole number, reach where they work."""
    import blipfast.cli._videos as videos
    from blipfast.tasks.vqa import BlipForVQA

    seen = []
    generate, read = BlipForVQA.generate, videos.read_frames

    def watched(self, *inputs, **options):
        seen.append(options["attend_padding"])
        return generate(self, *inputs, **options)

    def watched_frames(path, count, **options):
        seen.append(options["sampling"])
        return read(path, count, **options)

    monkeypatch.setattr(BlipForVQA, "generate", watched)
    monkeypatch.setattr(videos, "read_frames", watched_frames)
    write(tmp_path / "shards", questions(2))
    assert evaluate("vqa", "vqa", tmp_path / "shards")[0] == 0
    assert evaluate("vqa", "vqa", tmp_path / "shards", "--attend_padding", "true")[0] == 0
    assert seen == [False, True]
    seen.clear()
    manifest = clips(tmp_path, 1)
    options = ["--sampling", "original", "--frames", "2"]
    assert evaluate("video-retrieval", "retrieval", manifest, *options)[0] == 0
    assert set(seen) == {"original"}

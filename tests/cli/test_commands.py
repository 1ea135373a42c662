"""Every subcommand that reads a model, on small ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shards import VOCABULARY, captions, tokenizer, write

import blipfast

TESTS = Path(__file__).parents[1]
REFERENCE = TESTS / "fixtures/reference"
CAPTIONER = str(REFERENCE / "caption/checkpoint.pth")
SCORER = str(REFERENCE / "retrieval/checkpoint.pth")
WORDS = ["--vocabulary", str(VOCABULARY), "--device", "cpu"]


def test_caption_a_folder(pictures, run):
    status, out, err = run("caption", str(pictures), "--checkpoint", CAPTIONER, *WORDS)
    assert (status, err) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    names = [pictures / name for name in ("a.png", "b.jpg", "below/c.png")]
    assert [Path(path) for path, _ in rows] == names
    assert all("a picture of" not in caption for _, caption in rows)


def test_nucleus_depends_on_the_seed_and_not_on_the_batch(pictures, run):
    def captions_of(*more):
        options = ["--nucleus", "--json", "--max_length", "12", *more]
        status, out, _ = run("caption", str(pictures), "--checkpoint", CAPTIONER, *WORDS, *options)
        assert status == 0
        return [json.loads(line)["caption"] for line in out.splitlines()]

    first = captions_of("--batch_size", "3")
    assert captions_of("--batch_size", "1") == first
    assert captions_of("--seed", "5") != first


def test_a_truncated_image_is_named_and_the_others_go_on(pictures, run):
    whole = (pictures / "b.jpg").read_bytes()
    (pictures / "b.jpg").write_bytes(whole[: len(whole) // 2])
    status, out, err = run("caption", str(pictures), "--checkpoint", CAPTIONER, *WORDS)
    assert status == 1
    assert len(out.splitlines()) == 2
    assert "b.jpg: truncated or damaged" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{empty}", "--checkpoint", CAPTIONER, *WORDS], "no images in this folder"),
        (["{empty}/x.png", "--checkpoint", CAPTIONER, *WORDS], "there is no such file or folder"),
        (["{pictures}", "--checkpoint", "none.pth", *WORDS], "none.pth"),
        (["{pictures}", "--checkpoint", CAPTIONER], "there is no vocab.txt beside the checkpoint"),
        (["{pictures}", "--checkpoint", SCORER, *WORDS], "retrieval"),
        (["{pictures}", "--checkpoint", CAPTIONER, "--beams", "0", *WORDS], "--beams must be"),
        (["{pictures}", "--checkpoint", CAPTIONER, "--batch_size", "0", *WORDS], "batch_size is 0"),
        (["--checkpoint", CAPTIONER], "images"),
    ],
)
def test_caption_errors(arguments, words, pictures, tmp_path, run):
    (tmp_path / "empty").mkdir()
    names = {"empty": tmp_path / "empty", "pictures": pictures}
    status, out, err = run("caption", *[a.format(**names) for a in arguments])
    assert (status, out) == (2, "")
    assert words in err


def test_match_gives_the_models_scores(pictures, run):
    texts = ["a dog on the street", "two women near a red car"]
    arguments = ["--text", texts[0], "--text", texts[1], "--checkpoint", SCORER, *WORDS, "--json"]
    status, out, _ = run("match", str(pictures / "a.png"), *arguments)
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == sorted(rows, key=lambda row: -row["itm"])
    model = blipfast.load_model(SCORER, "retrieval")
    size = model.config.vision.image_size
    pixels = blipfast.data.EvalTransform(size)(pictures / "a.png")[None]
    batch = tokenizer()(texts)
    text = blipfast.models.blip.PackedText.from_padded(batch.input_ids, batch.attention_mask)
    itm, itc = model.match_pairs(pixels.expand(2, -1, -1, -1), text)
    expected = dict(zip(texts, zip(itm.tolist(), itc.tolist(), strict=True), strict=True))
    for row in rows:
        assert (row["itm"], row["itc"]) == pytest.approx(expected[row["text"]], abs=1e-5)


def test_match_errors(pictures, run):
    broken = pictures / "notes.txt"
    arguments = ["--text", "a dog", "--checkpoint", SCORER, *WORDS]
    status, _, err = run("match", str(broken), *arguments)
    assert status == 1
    assert "notes.txt: not an image" in err
    empty = ["--text", "...", "--checkpoint", SCORER, *WORDS]
    status, _, err = run("match", str(pictures / "a.png"), *empty)
    assert status == 2
    assert "empty after clean-up" in err


def test_convert_there_and_back(tmp_path, run):
    ours, hf, again = (str(tmp_path / name) for name in ("ours", "hf", "again"))
    assert run("convert", CAPTIONER, ours, "--to", "blipfast")[0] == 0
    status, out, _ = run("convert", ours, hf, "--to", "hf")
    assert (status, out.splitlines()[-1]) == (0, hf)
    assert "loaded" in out
    assert run("convert", hf, again, "--to", "blipfast")[0] == 0
    first, last = blipfast.load_model(ours).state_dict(), blipfast.load_model(again).state_dict()
    assert all(first[name].equal(last[name]) for name in first)
    status, _, err = run("convert", ours, hf, "--to", "hf")
    assert status == 2
    assert "exists" in err
    assert run("convert", ours, hf, "--to", "hf", "--overwrite")[0] == 0
    assert run("convert", ours, str(tmp_path / "x"), "--to", "onnx")[0] == 2


def test_info_says_which_backend_and_why(run):
    status, out, _ = run("info", "--json", "--device", "cpu")
    assert status == 0
    found = json.loads(out)
    assert found["required"]["torch"]
    assert {"contrastive_softmax", "cross_attention"} <= set(found["backends"])
    assert all(row["backend"] and row["why"] for row in found["backends"].values())
    status, out, _ = run("info", "--device", "cpu")
    assert status == 0
    assert "cross_attention" in out
    assert "blipfast[gpu]" in out.replace("\n", "")


def test_evaluate_retrieval(tmp_path, run):
    shards = write(tmp_path / "shards", captions(6, each=2))
    arguments = ["retrieval", "--shards", str(shards), "--checkpoint", SCORER, *WORDS]
    status, out, _ = run(
        "evaluate", *arguments, "--batch_size", "4", "--json", str(tmp_path / "r.json")
    )
    assert status == 0
    result = json.loads(out)
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert (result["images"], result["texts"], result["pairs_through_itm"]) == (6, 12, 72)
    assert result["itc"]["tr_r10"] > 0
    assert 0 <= result["itm"]["ir_r1"] <= result["itm"]["ir_r5"] <= 100
    beside = json.loads(run("evaluate", *arguments, "--reference_pairs", "20")[1])
    assert beside["reference"]["pairs"] == 20
    assert beside["reference"]["largest_difference_of_logits"] < 1e-4
    assert beside["reference"]["times_as_fast"] > 0
    assert beside["itm"] == result["itm"]
    few = json.loads(run("evaluate", *arguments, "--k", "1", "--limit", "5")[1])
    assert few["images"] == 5
    assert few["pairs_through_itm"] <= 15


def test_evaluate_recomputes_what_does_not_fit(tmp_path, run):
    shards = write(tmp_path / "shards", captions(6))
    arguments = ["retrieval", "--shards", str(shards), "--checkpoint", SCORER, *WORDS]
    results = []
    for kept in ("0", "20000", "1000000000"):  # none, some, all
        results.append(json.loads(run("evaluate", *arguments, "--keep_bytes", kept)[1]))
        assert results[-1].pop("speed")["pairs_per_second"] > 0
    assert results[0] == results[1] == results[2]


def test_evaluate_caption(tmp_path, run):
    pytest.importorskip("pycocoevalcap", reason="needs the extra metrics")
    shards = write(tmp_path / "shards", captions(4, each=2))
    status, out, _ = run(
        "evaluate", "caption", "--shards", str(shards), "--checkpoint", CAPTIONER, *WORDS,
        "--beams", "2", "--max_length", "10",
    )  # fmt: skip
    assert status == 0
    result = json.loads(out)
    assert result["cider"] >= 0
    assert len(result["first_captions"]) == 4


def test_evaluate_errors(tmp_path, run):
    arguments = ["--checkpoint", SCORER, *WORDS]
    status, _, err = run("evaluate", "retrieval", "--shards", str(tmp_path), *arguments)
    assert status == 2
    assert "no shard matches" in err
    assert run("evaluate", "beauty", "--shards", str(tmp_path), *arguments)[0] == 2

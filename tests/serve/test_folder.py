"""Searching a folder: the ranking of the models, the kept index, pictures that cannot be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from blipfast.checkpoints import load_model
from blipfast.cli import main
from blipfast.data import BlipTokenizer, EvalTransform
from blipfast.errors import ConfigError, DataError
from blipfast.models.blip import PackedText
from blipfast.serve.app import ServeConfig, Studio
from blipfast.serve.folder import FolderIndex, find_images
from blipfast.serve.words import draw_map, word_maps


@pytest.fixture
def model(checkpoints):
    return load_model(checkpoints["retrieval"], "retrieval").eval()


@pytest.fixture
def tokenizer(checkpoints):
    return BlipTokenizer.from_pretrained_dir(checkpoints["retrieval"])


def test_the_ranking_is_the_models(pictures, model, tokenizer) -> None:
    failed = []
    index = FolderIndex.build(find_images([pictures]), model, batch_size=2, on_failed=failed.append)
    assert len(index.paths) == 5
    assert "broken.jpg" in str(failed[0])
    texts = ["a dog", "two cats on a mat"]
    found = index.search(model, tokenizer, texts, count=3, candidates=5, batch_size=2)
    for text, its in zip(texts, found, strict=True):
        scores = {}
        for path in index.paths:
            batch = tokenizer([text])
            packed = PackedText.from_padded(batch.input_ids, batch.attention_mask)
            pixels = EvalTransform(model.config.vision.image_size)(path)[None]
            with torch.no_grad():
                logits = model.match(packed, model.image_states(model.encode_image(pixels)), [0])
            itm, itc = model.match_pairs(pixels, packed)
            scores[path] = (logits[0, 1] + itc[0]).item(), itm.item(), itc.item()
        best = sorted(scores, key=lambda path: -scores[path][0])[:3]
        assert [one.path for one in its] == best
        for one in its:
            assert one.itm == pytest.approx(scores[one.path][1], abs=1e-5)
            assert one.itc == pytest.approx(scores[one.path][2], abs=1e-5)


def test_only_what_is_new_is_read_again(pictures, model, tmp_path) -> None:
    file = tmp_path / "index.safetensors"

    def build(**more):
        read = []
        index = FolderIndex.build(
            find_images([pictures]), model, file=file, on_read=lambda: read.append(1), **more
        )
        return index, len(read)

    first, read = build()
    assert read == 6
    again, read = build()
    assert read == 1  # the broken one
    assert torch.equal(first.features, again.features)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(pictures / "a.png")
    (pictures / "d.jpg").unlink()
    changed, read = build()
    assert read == 2
    assert len(changed.paths) == 4
    assert not torch.equal(changed.features[0], first.features[0])
    file.write_bytes(file.read_bytes()[:-3])  # a damaged index is made anew
    assert build()[1] == 5
    with torch.no_grad():
        model.vision_proj.weight.mul_(2)  # another model
    assert build()[1] == 5
    assert not [p for p in tmp_path.iterdir() if ".tmp" in p.name]
    with pytest.raises(DataError, match="cannot write the index"):
        FolderIndex.build(find_images([pictures]), model, file=tmp_path / "no" / "index")


def test_an_index_serves_several_folders(pictures, model, tmp_path) -> None:
    """A search of one folder forgets nothing of another, but for what has gone."""
    inner = tmp_path / "inner"
    inner.mkdir()
    for name in ("x.png", "y.png"):
        Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(inner / name)
    file = tmp_path / "index.safetensors"

    def read(folder) -> int:
        told = []
        FolderIndex.build(find_images([folder]), model, file=file, on_read=lambda: told.append(1))
        return len(told)

    (pictures / "broken.jpg").unlink()
    assert (read(pictures), read(inner), read(pictures), read(inner)) == (5, 2, 0, 0)
    (pictures / "d.jpg").unlink()
    assert read(inner) == 0
    assert "d.jpg" not in str(file.read_bytes())
    with torch.autocast("cpu", torch.bfloat16):  # other features
        assert read(inner) == 2


def test_photographs_are_looked_at_upright(tmp_path, model) -> None:
    upright = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint8).reshape(30, 40, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone held upright writes it
    upright.save(tmp_path / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    features = FolderIndex.build(find_images([tmp_path]), model).features
    torch.testing.assert_close(features[0], features[1])


def test_search_command(pictures, checkpoints, tmp_path, capsys) -> None:
    common = ["--checkpoint", checkpoints["retrieval"], "--device", "cpu"]
    status = main(["search", str(pictures), "a dog", *common, "--count", "2"])
    out, err = capsys.readouterr()
    assert status == 1
    assert "broken.jpg" in err
    assert out.count("ITM") == 1
    assert out.count(str(pictures)) == 2
    (pictures / "broken.jpg").unlink()
    more = ["--json", "--index", str(tmp_path / "i.safetensors")]
    assert main(["search", str(pictures), "a dog", "a cat", *common, *more]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["a dog"] * 5 + ["a cat"] * 5
    assert set(rows[0]) == {"text", "image", "itm", "itc"}
    assert main(["search", str(tmp_path / "none"), "a dog", *common]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err
    assert main(["search", str(pictures), "a dog", *common, "--count", "0"]) == 2


def test_match_command_takes_folders(pictures, checkpoints, capsys) -> None:
    arguments = ["--text", "a dog", "--text", "a cat", "--checkpoint", checkpoints["retrieval"]]
    assert main(["match", str(pictures), *arguments, "--json", "--batch_size", "2"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 10
    assert main(["match", str(pictures / "a.png"), *arguments, "--json"]) == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for one, two in zip(alone, rows[:2], strict=True):
        assert one["text"] == two["text"]
        assert one["itm"] == pytest.approx(two["itm"], abs=1e-5)


def test_word_maps(pictures, model, tokenizer) -> None:
    image = Image.open(pictures / "a.png")
    pixels = EvalTransform(model.config.vision.image_size)(image.convert("RGB"))
    with torch.no_grad():
        embeds = model.encode_image(pixels[None])
    maps = word_maps(model, tokenizer, embeds, "A dog, and an unaffable cat!")
    grid = model.config.vision.image_size // model.config.vision.patch_size
    assert [word for word, _ in maps] == ["a", "dog", ",", "and", "an", "unaffable", "cat"]
    assert all(weights.shape == (grid, grid) for _, weights in maps)
    drawn = draw_map(image, maps[1][1])
    assert drawn.size == (40, 30)
    # Where a map is highest, yellow; where it is lowest, dark.
    weights = np.zeros((4, 4))
    weights[0, 3] = 1.0
    pixels = np.asarray(draw_map(Image.new("RGB", (40, 40)), weights, strength=1.0))
    assert pixels[1, 38].tolist() == [253, 231, 37]
    assert pixels[38, 1].tolist() == [68, 1, 84]


def test_the_studio_encodes_an_image_once(pictures, checkpoints, tmp_path, monkeypatch) -> None:
    """For all that one asks about it; a file that has changed is another image."""
    studio = Studio(ServeConfig(**checkpoints, device="cpu"))
    calls = []
    for task in studio.tasks:
        encode = studio._loaded[task][0].encode_image
        count = lambda *a, encode=encode, task=task, **k: calls.append(task) or encode(*a, **k)  # noqa: E731
        monkeypatch.setattr(studio._loaded[task][0], "encode_image", count)
    path = tmp_path / "x.png"
    Image.open(pictures / "a.png").save(path)
    first = studio.scores(str(path), "a dog\na cat")
    assert studio.words(str(path), "a dog")
    assert studio.scores(str(path), "a dog\na cat") == first
    assert calls == ["retrieval"]
    studio.captions(str(path), 2, 0)
    assert studio.answer(str(path), "is it a dog?") is not None
    assert calls == ["retrieval", "caption", "vqa"]
    Image.new("RGB", (40, 30), "red").save(path)
    assert studio.scores(str(path), "a dog\na cat") != first
    assert len(calls) == 4
    for number in range(20):
        Image.new("RGB", (40, 30 + number)).save(tmp_path / f"{number}.png")
        studio.scores(str(tmp_path / f"{number}.png"), "a dog")
    assert len(studio._encoded) == 8


def test_the_studio_says_what_is_wrong(pictures, checkpoints, tmp_path) -> None:
    studio = Studio(ServeConfig(**checkpoints, device="cpu", max_pixels=1000))
    for act, message in (
        (lambda: studio.answer(None, "why?"), "choose an image first"),
        (lambda: studio.answer(str(pictures / "broken.jpg"), "why?"), "1,000"),
        (lambda: studio.captions(str(pictures / "notes.txt"), 1, 0), "not an image"),
        (lambda: studio.answer(str(pictures / "a.png"), "  "), "write a question first"),
        (lambda: studio.scores(str(pictures / "a.png"), "\n \n"), "at least one text"),
        (lambda: studio.scores(str(pictures / "a.png"), "\n".join("ab" * 20)), "40 texts"),
        (lambda: studio.words(str(pictures / "a.png"), "so " * 61), "up to 60 words"),
        (lambda: studio.search("a dog", 3), "no folder"),
    ):
        with pytest.raises(DataError, match=message):
            act()
    with pytest.raises(ConfigError, match="nothing to serve"):
        ServeConfig()
    with pytest.raises(ConfigError, match="needs --retrieval"):
        ServeConfig(caption="x", folder="y")

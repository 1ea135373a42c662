"""Every data set from a small tree in its exact published format, through to training samples."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blipfast.cli import main
from blipfast.data import Record, read_shards
from blipfast.data.index import RecordReader, index_shards
from blipfast.data.prepare import DATA_SETS, data_set, prepare_split
from blipfast.errors import DataError
from blipfast.train.samples import read_sample, units_of


def jpeg(seed: int = 0, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def put(path: Path, content: object) -> None:
    """A file: bytes and text as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def prepared(name: str, split: str, tmp_path: Path, **options) -> list[Record]:
    options = {"any_count": True, **options}
    done = prepare_split(data_set(name), split, tmp_path / "src", tmp_path / "out", **options)
    records = list(read_shards(tmp_path / "out" / f"{split}-*.tar"))
    assert done.records == len(records)
    return records


def karpathy(folder: Path) -> None:
    rows = []
    parts = ["train", "restval", "val", "test"]
    for n, part in enumerate(parts):
        name = f"COCO_val2014_{n:012d}.jpg"
        put(folder / "val2014" / name, jpeg(n))
        sentences = [{"raw": f"A dog, no. {n}.", "tokens": ["a"], "imgid": n, "sentid": n}] * 2
        rows.append(
            {
                "filepath": "val2014", "filename": name, "cocoid": 100 + n, "imgid": n,
                "split": part, "sentids": [n], "sentences": sentences,
            }
        )  # fmt: skip
    put(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})


def test_coco_by_karpathy(tmp_path):
    karpathy(tmp_path / "src")
    train = prepared("coco", "train", tmp_path)
    assert [r.ids["image"] for r in train] == [100, 101], "restval belongs to train"
    assert train[0].image == jpeg(0), "images are copied byte for byte"
    assert (train[0].width, train[0].height) == (30, 20)
    assert [(t.text, t.source) for t in train[0].texts] == [("A dog, no. 0.", "human")] * 2
    assert [r.ids["image"] for r in prepared("coco", "test", tmp_path)] == [103]
    summary = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (summary["records"], summary["texts"], summary["bad"]) == (2, 4, 0)
    assert list(summary["files"]) == ["dataset_coco.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name[0] != ".") == [
        "test-000000.tar", "test.json", "train-000000.tar", "train.json",
    ]  # fmt: skip


def test_coco_by_blips_lists(tmp_path):
    src = tmp_path / "src"
    for n in (1, 2):
        put(src / f"train2014/COCO_train2014_{n:012d}.jpg", jpeg(n))
    image = "train2014/COCO_train2014_000000000001.jpg"
    rows = [{"caption": c, "image": image, "image_id": "coco_1"} for c in ("one", "two")]
    put(src / "coco_karpathy_train.json", rows)
    other = "train2014/COCO_train2014_000000000002.jpg"
    put(src / "coco_karpathy_test.json", [{"image": other, "caption": ["a", "b", "c"]}])
    [train] = prepared("coco", "train", tmp_path)
    assert ([t.text for t in train.texts], train.ids["image"]) == (["one", "two"], 1)
    [test] = prepared("coco", "test", tmp_path)
    assert [t.text for t in test.texts] == ["a", "b", "c"]


def test_flickr30k(tmp_path):
    put(tmp_path / "src/flickr30k-images/1000092795.jpg", jpeg())
    row = {"filename": "1000092795.jpg", "imgid": 7, "split": "val", "sentences": [{"raw": "x"}]}
    put(tmp_path / "src/dataset_flickr30k.json", {"images": [row], "dataset": "flickr30k"})
    [record] = prepared("flickr30k", "val", tmp_path)
    assert (record.key, record.ids["image"]) == ("flickr30k-images/1000092795", 7)


def test_nocaps(tmp_path):
    src = tmp_path / "src"
    put(src / "val/0013ea2087020901.jpg", jpeg())
    put(src / "test/aa.jpg", jpeg(1))
    image = {"id": 0, "file_name": "0013ea2087020901.jpg", "domain": "near-domain"}
    captions = [{"image_id": 0, "id": i, "caption": f"a baby {i}"} for i in range(10)]
    put(src / "nocaps_val_4500_captions.json", {"images": [image], "annotations": captions})
    put(src / "nocaps_test_image_info.json", {"images": [{"id": 5, "file_name": "aa.jpg"}]})
    [val] = prepared("nocaps", "val", tmp_path)
    assert (val.ids["domain"], len(val.texts)) == ("near-domain", 10)
    [test] = prepared("nocaps", "test", tmp_path)
    assert (test.ids["image"], test.texts[0].source) == (5, "withheld")


def test_visual_genome(tmp_path):
    src = tmp_path / "src"
    put(src / "VG_100K_2/17.jpg", jpeg())
    regions = [{"region_id": 1, "phrase": "a red car"}, {"region_id": 2, "phrase": "a tree"}]
    put(src / "region_descriptions.json", [{"id": 17, "regions": regions}])
    [record] = prepared("vg", "train", tmp_path)
    assert ([t.text for t in record.texts], record.ids["image"]) == (["a red car", "a tree"], 17)


def img2dataset_tar(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for n in range(3):
            facts = {"url": f"http://x/{n}", "caption": f"web {n}", "sha256": f"{n:064d}"}
            members = {
                "jpg": jpeg(n) if n < 2 else jpeg(n)[:50], "txt": f"web {n}".encode(),
                "json": json.dumps(facts).encode(),
            }  # fmt: skip
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{n:09d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("name", ["sbu", "cc3m", "cc12m", "laion"])
def test_web_sets_from_img2dataset_tars(tmp_path, name):
    img2dataset_tar(tmp_path / "src" / "00000.tar")
    records = prepared(name, "train", tmp_path, max_bad_fraction=0.5)
    assert [r.key for r in records] == ["00000/000000000", "00000/000000001"]
    assert [(t.text, t.source) for t in records[1].texts] == [("web 1", "web")]
    assert records[1].ids == {"image": f"{1:064d}", "url": "http://x/1"}
    [bad] = (tmp_path / "out/train.quarantine.jsonl").read_text().splitlines()
    assert json.loads(bad)["key"] == "00000/000000002"


def test_web_sets_from_files_and_from_a_list(tmp_path):
    for n in range(2):
        put(tmp_path / f"src/00000/{n:09d}.jpg", jpeg(n))
        put(tmp_path / f"src/00000/{n:09d}.txt", f"file {n}")
    assert [r.texts[0].text for r in prepared("cc3m", "train", tmp_path)] == ["file 0", "file 1"]
    put(tmp_path / "b/src/captions.json", [{"image": "a.jpg", "caption": "listed"}])
    put(tmp_path / "b/src/a.jpg", jpeg())
    assert [r.texts[0].text for r in prepared("sbu", "train", tmp_path / "b")] == ["listed"]


def vqa(src: Path, count: int = 2) -> None:
    put(src / "train2014/COCO_train2014_000000000009.jpg", jpeg())
    questions = [
        {"image_id": 9, "question": f"Is it {n}?", "question_id": 90 + n} for n in range(count)
    ]
    answers = [
        {"answer": "yes" if i < 7 else "no", "answer_confidence": "yes", "answer_id": i + 1}
        for i in range(10)
    ]
    annotations = [
        {
            "question_type": "is it", "multiple_choice_answer": "yes", "answers": answers,
            "image_id": 9, "answer_type": "yes/no", "question_id": 90 + n,
        }
        for n in range(count)
    ]  # fmt: skip
    put(src / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions})
    put(src / "v2_mscoco_train2014_annotations.json", {"annotations": annotations})


def samples(tmp_path: Path, pattern: str, task: str) -> list:
    reader, out = RecordReader(), []
    for index in index_shards(read_shards(tmp_path / "out" / pattern).shards):
        units, _ = units_of(index, task, True)
        for row, text in zip(units.row, units.text, strict=True):
            out.append(read_sample(reader, index, int(row), int(text), task, 0))
    return out


def test_vqa(tmp_path):
    vqa(tmp_path / "src")
    records = prepared("vqa", "train", tmp_path)
    assert records[0].ids == {
        "question": 90, "image": 9, "answer_type": "yes/no", "question_type": "is it",
    }  # fmt: skip
    first, _ = samples(tmp_path, "train-*.tar", "vqa")
    assert (first.text, dict(first.answers)) == ("Is it 0?", {"yes": 0.7, "no": 0.3})


def test_vqa_test_part_and_visual_genome(tmp_path):
    src = tmp_path / "src"
    put(src / "test2015/COCO_test2015_000000000003.jpg", jpeg())
    rows = [{"image_id": 3, "question": "Why?", "question_id": 30}]
    put(src / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": rows})
    [record] = prepared("vqa", "test-dev", tmp_path)
    assert [t.source for t in record.texts] == ["question"]
    put(src / "VG_100K/4.jpg", jpeg())
    qa = {"question": "What?", "answer": "A dog.", "qa_id": 8, "image_id": 4}
    put(src / "question_answers.json", [{"id": 4, "qas": [qa]}])
    prepared("vqa", "vg", tmp_path)
    [sample] = samples(tmp_path, "vg-*.tar", "vqa")
    assert dict(sample.answers) == {"a dog": 0.2}


def nlvr(src: Path, count: int = 3) -> None:
    lines = []
    for n in range(count):
        for side in (0, 1):
            put(src / f"images/train/36/train-{n}-0-img{side}.png", jpeg(2 * n + side, "PNG"))
        row = {
            "sentence": f"Two dogs {n}.", "identifier": f"train-{n}-0-1", "directory": 36,
            "label": "True" if n % 2 else "False", "left_url": "", "right_url": "",
        }  # fmt: skip
        lines.append(json.dumps(row))
    put(src / "train.json", "\n".join(lines) + "\n")


def test_nlvr2_pairs_stay_together(tmp_path):
    nlvr(tmp_path / "src")
    broken = tmp_path / "src/images/train/36/train-1-0-img1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    records = prepared("nlvr2", "train", tmp_path, max_bad_fraction=0.5, max_count=3)
    assert [r.key for r in records] == [
        f"train-{n}-0-1-img{side}" for n in (0, 2) for side in (0, 1)
    ]
    got = samples(tmp_path, "train-*.tar", "nlvr")
    assert [(s.text, s.label) for s in got] == [("Two dogs 0.", 0), ("Two dogs 2.", 0)]
    assert got[1].images == (jpeg(4, "PNG"), jpeg(5, "PNG"))
    assert len((tmp_path / "out/train.quarantine.jsonl").read_text().splitlines()) == 2


def test_visdial(tmp_path):
    src = tmp_path / "src"
    put(src / "VisualDialog_val2018/VisualDialog_val2018_000000185565.jpg", jpeg())
    options = list(range(100))
    dialog = [
        {"question": n, "answer": n + 5, "answer_options": options, "gt_index": n + 5}
        for n in range(10)
    ]
    data = {
        "dialogs": [{"image_id": 185565, "caption": "a woman skis", "dialog": dialog}],
        "questions": [f"is it {n}" for n in range(10)],
        "answers": [f"answer {n}" for n in range(100)],
    }
    put(src / "visdial_1.0_val.json", {"data": data, "split": "val", "version": "1.0"})
    relevance = [0.0] * 99 + [1.0]
    dense = [{"image_id": 185565, "round_id": 4, "gt_relevance": relevance}]
    put(src / "visdial_1.0_val_dense_annotations.json", dense)
    [record] = prepared("visdial", "val", tmp_path)
    sources = [t.source for t in record.texts]
    assert sources[:3] == ["caption", "question", "answer"]
    assert sources.count("option-10") == 100
    assert (record.ids["gt-1"], record.ids["relevance_round"]) == (5, 4)
    assert record.ids["relevance"].split()[-1] == "1.0"


def test_msrvtt_and_msvd(tmp_path):
    src = tmp_path / "src"
    put(src / "TestVideo/video9770.mp4", b"clip")
    text = io.StringIO()
    writer = csv.DictWriter(text, ["key", "vid_key", "video_id", "sentence"])
    writer.writeheader()
    writer.writerow({"key": "ret0", "vid_key": "m0", "video_id": "video9770", "sentence": "a, b"})
    put(src / "MSRVTT_JSFUSION_test.csv", text.getvalue())
    qa = [{"answer": "couch", "category_id": 14, "id": 1, "question": "what?", "video_id": 9770}]
    put(src / "test_qa.json", qa)
    put(src / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid9770\n")
    put(src / "YouTubeClips/-4wsuPCjDBc_5_15.avi", b"clip")
    for name, split in (("msrvtt", "test"), ("msrvtt", "qa-test"), ("msvd", "qa-test")):
        out = tmp_path / name
        prepare_split(data_set(name), split, src, out, any_count=True)
        [row] = map(json.loads, (out / f"{split}.videos.jsonl").read_text().splitlines())
        assert (out / row["video"]).read_bytes() == b"clip"
        assert row["texts"][0]["text"] == ("a, b" if split == "test" else "what?")


def test_every_set_says_what_it_needs(tmp_path):
    assert len(DATA_SETS) == 14
    (tmp_path / "src").mkdir()
    for name, one in DATA_SETS.items():
        for split in one.splits:
            with pytest.raises(DataError, match="Expected"):
                prepared(name, split, tmp_path)


def test_a_number_other_than_published_is_an_error(tmp_path):
    karpathy(tmp_path / "src")
    with pytest.raises(DataError, match=r"coco train has 2 records, published are 113,287"):
        prepared("coco", "train", tmp_path, any_count=False)
    assert not list((tmp_path / "out").iterdir()), "half a data set was left"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows[0].pop("filename"), r"entry 0 has no filename"),
        (lambda rows: rows[1].pop("sentences"), "a list was expected"),
        (lambda rows: rows.append({**rows[0]}), "the record .* twice"),
    ],
)
def test_a_changed_format_is_named(tmp_path, spoil, message):
    karpathy(tmp_path / "src")
    path = tmp_path / "src/dataset_coco.json"
    content = json.loads(path.read_text())
    spoil(content["images"])
    put(path, content)
    with pytest.raises(DataError, match=message):
        prepared("coco", "train", tmp_path)


def test_a_damaged_annotation_file_is_named(tmp_path):
    put(tmp_path / "src/dataset_coco.json", b'{"images": [')
    with pytest.raises(DataError, match=r"is no JSON .*download it again"):
        prepared("coco", "train", tmp_path)
    put(tmp_path / "src/dataset_coco.json", b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        prepared("coco", "train", tmp_path)


def test_missing_and_truncated_images_are_set_aside_up_to_a_limit(tmp_path):
    karpathy(tmp_path / "src")
    broken = tmp_path / "src/val2014/COCO_val2014_000000000000.jpg"
    broken.write_bytes(jpeg()[:300])
    with pytest.raises(DataError, match=r"1 of 2 records .* damaged"):
        prepared("coco", "train", tmp_path)
    broken.unlink()
    assert len(prepared("coco", "train", tmp_path, max_bad_fraction=0.5)) == 1
    row = json.loads((tmp_path / "out/train.quarantine.jsonl").read_text())
    assert row["file"] == str(broken)
    assert "No such file" in row["reason"]


def test_by_the_command_line(tmp_path, capsys):
    karpathy(tmp_path / "src")
    argv = ["data", "prepare", "coco", "--source", str(tmp_path / "src"), "--output"]
    out = str(tmp_path / "out")
    assert main([*argv, out, "--any_count"]) == 0
    assert "coco train: 2 records, 4 texts" in capsys.readouterr().out
    assert main(["data", "inspect", out]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["records"], summary["texts"]) == (4, 8)
    assert main([*argv, out, "--any_count"]) == 2
    assert "has the split train already" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "x"), "--split", "tset"]) == 2
    assert "has no split 'tset': train, val, test" in capsys.readouterr().err
    argv[2] = "cocoa"
    assert main([*argv, out]) == 2
    assert "unknown data set 'cocoa'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "prepare", "nlvr2", "--help"])
    assert "test1.json" in capsys.readouterr().out

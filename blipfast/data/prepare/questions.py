"""Images with questions, pairs with statements, dialogues: VQA v2, NLVR2, VisDial v1.0."""

from __future__ import annotations

from collections.abc import Iterator

from blipfast.data.prepare.source import DataSet, Item, Source, Split, part_of, rows_of, texts
from blipfast.data.records import TextEntry
from blipfast.errors import DataError

_VQA = {
    "train": ("train2014", "train2014"), "val": ("val2014", "val2014"),
    "test": ("test2015", "test2015"), "test-dev": ("test-dev2015", "test2015"),
}  # fmt: skip


def _vqa(source: Source, split: str) -> Iterator[Item]:
    if split == "vg":
        yield from _genome_questions(source)
        return
    name, images = _VQA[split]
    path = source.find(f"v2_OpenEnded_mscoco_{name}_questions.json")
    questions = part_of(path, source.json(path), "questions")
    answers: dict[int, dict] = {}
    if not split.startswith("test"):
        answers_path = source.find(f"v2_mscoco_{name}_annotations.json")
        rows = part_of(answers_path, source.json(answers_path), "annotations")
        fields = ("question_id", "answers", "answer_type", "question_type")
        answers = {row["question_id"]: row for row in rows_of(answers_path, rows, *fields)}
    for row in rows_of(path, questions, "question_id", "image_id", "question"):
        ids: dict[str, int | str] = {"question": row["question_id"], "image": row["image_id"]}
        entries = texts("question", row["question"])
        if answers:
            found = answers.get(row["question_id"])
            if found is None:
                raise DataError(f"{path}: question {row['question_id']} has no answers")
            entries += texts("answer", *(a["answer"] for a in found["answers"]))
            ids |= {name: found[name] for name in ("answer_type", "question_type")}
        file = f"COCO_{images}_{row['image_id']:012d}.jpg"
        key = f"{split}_{row['question_id']}"
        yield Item(key, source.folder / images / file, entries, ids)


def _genome_questions(source: Source) -> Iterator[Item]:
    path = source.find("question_answers.json")
    for row in rows_of(path, source.json(path), "id", "qas"):
        for qa in rows_of(path, row["qas"], "question", "answer", "qa_id"):
            name = f"{row['id']}.jpg"
            folder = next((f for f in ("VG_100K", "VG_100K_2") if source.has(f"{f}/{name}")), None)
            answer = qa["answer"].rstrip(".").lower()
            entries = texts("question", qa["question"]) + texts("genome_answer", answer)
            ids = {"question": f"vg{qa['qa_id']}", "image": f"vg{row['id']}"}
            place = source.folder / (folder or "VG_100K") / name
            yield Item(f"vg_{qa['qa_id']}", place, entries, ids)


def _nlvr(source: Source, split: str) -> Iterator[Item]:
    path = source.find({"train": "train.json", "dev": "dev.json", "test": "test1.json"}[split])
    fields = ["identifier", "sentence", "label"] + (["directory"] if split == "train" else [])
    for row in rows_of(path, list(source.lines(path)), *fields):
        name = row["identifier"]
        label = {"True": 1, "False": 0}.get(str(row["label"]))
        if label is None:
            raise DataError(f"{path}: {name} has the label {row['label']!r}, not True or False")
        # Several sentences share a pair of images: the last number is the sentence's.
        stem = name.rpartition("-")[0]
        folder = {"train": "images/train", "dev": "dev", "test": "test1"}[split]
        folder += f"/{row['directory']}" if split == "train" else ""
        for side in (0, 1):
            place = source.folder / folder / f"{stem}-img{side}.png"
            ids = {"pair": name, "identifier": name, "label": label, "image": f"{stem}-img{side}"}
            yield Item(f"{name}-img{side}", place, texts("human", row["sentence"]), ids, group=name)


def _visdial(source: Source, split: str) -> Iterator[Item]:
    path = source.find(f"visdial_1.0_{split}.json")
    data = part_of(path, source.json(path), "data")
    questions, answers = part_of(path, data, "questions"), part_of(path, data, "answers")
    dense: dict[int, dict] = {}
    if split == "val" and source.has("visdial_1.0_val_dense_annotations.json"):
        dense_path = source.find("visdial_1.0_val_dense_annotations.json")
        rows = rows_of(dense_path, source.json(dense_path), "image_id", "round_id", "gt_relevance")
        dense = {row["image_id"]: row for row in rows}
    dialogs = rows_of(path, part_of(path, data, "dialogs"), "image_id", "caption", "dialog")
    for row in dialogs:
        image = row["image_id"]
        entries = texts("caption", row["caption"])
        ids: dict[str, int | str] = {"image": image}
        for number, turn in enumerate(rows_of(path, row["dialog"], "question"), 1):
            entries += texts("question", questions[turn["question"]])
            if "answer" in turn:
                entries += texts("answer", answers[turn["answer"]])
            options = [answers[i] for i in turn.get("answer_options", ())]
            entries += tuple(TextEntry(option, f"option-{number}") for option in options)
            if "gt_index" in turn:
                ids[f"gt-{number}"] = turn["gt_index"]
        if image in dense:
            ids["relevance_round"] = dense[image]["round_id"]
            ids["relevance"] = " ".join(str(value) for value in dense[image]["gt_relevance"])
        places = [f"VisualDialog_{split}2018/VisualDialog_{split}2018_{image:012d}.jpg"]
        if split == "train":
            places = [f"{p}/COCO_{p}_{image:012d}.jpg" for p in ("train2014", "val2014")]
        place = next((p for p in places if source.has(p)), places[0])
        yield Item(f"{split}_{image}", source.folder / place, entries, ids)


SETS = (
    DataSet(
        "vqa",
        "  v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json,\n"
        "  v2_mscoco_{train2014,val2014}_annotations.json (VQA v2)\n"
        "  train2014/, val2014/, test2015/ (COCO images)\n"
        "  split vg: question_answers.json, VG_100K/, VG_100K_2/ (Visual Genome)",
        {
            "train": Split(443_757),
            "val": Split(214_354),
            "test": Split(447_793),
            "test-dev": Split(107_394),
            "vg": Split(),
        },
        _vqa,
    ),
    DataSet(
        "nlvr2",
        "  train.json, dev.json, test1.json (NLVR2, Cornell)\n"
        "  images/train/<directory>/, dev/, test1/ (its images)",
        {"train": Split(2 * 86_373), "dev": Split(2 * 6_982), "test": Split(2 * 6_967)},
        _nlvr,
    ),
    DataSet(
        "visdial",
        "  visdial_1.0_{train,val,test}.json, visdial_1.0_val_dense_annotations.json (VisDial)\n"
        "  train2014/, val2014/ (COCO), VisualDialog_val2018/, VisualDialog_test2018/",
        {"train": Split(123_287), "val": Split(2_064), "test": Split(8_000)},
        _visdial,
    ),
)

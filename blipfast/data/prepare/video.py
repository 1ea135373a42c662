"""Clips with descriptions or questions: MSRVTT and MSVD. A manifest names the files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from blipfast.data.prepare.source import DataSet, Item, Source, Split, rows_of, texts
from blipfast.errors import DataError

_QA = {"qa-train": "train_qa.json", "qa-val": "val_qa.json", "qa-test": "test_qa.json"}


def _questions(source: Source, split: str, file_of: dict[int, str] | None) -> Iterator[Item]:
    path = source.find(_QA[split])
    for row in rows_of(path, source.json(path), "id", "video_id", "question", "answer"):
        number = int(row["video_id"])
        if file_of is not None and number not in file_of:
            raise DataError(f"{path}: question {row['id']} is of video {number}, which has no file")
        place = f"TrainValVideo/video{number}.mp4" if file_of is None else file_of[number]
        entries = texts("question", row["question"]) + texts("answer", row["answer"])
        ids = {"video": number, "question": row["id"]}
        yield Item(f"{split}_{row['id']}", source.folder / place, entries, ids)


def _msrvtt(source: Source, split: str) -> Iterator[Item]:
    if split != "test":
        for item in _questions(source, split, None):
            assert not isinstance(item.image, bytes)
            place = item.image
            if not place.exists():  # the test part is published apart
                place = source.folder / "TestVideo" / place.name
            yield Item(item.key, place, item.texts, item.ids)
        return
    if source.has("MSRVTT_JSFUSION_test.csv"):
        path = source.find("MSRVTT_JSFUSION_test.csv")
        rows = rows_of(
            path, list(csv.DictReader(io.StringIO(source.text(path)))), "video_id", "sentence"
        )
        pairs = [(row["video_id"], row["sentence"]) for row in rows]
    else:
        path = source.find("msrvtt_test.jsonl")
        lines = rows_of(path, list(source.lines(path)), "clip_name", "caption")
        pairs = [(row["clip_name"].removesuffix(".mp4"), row["caption"]) for row in lines]
    for name, sentence in pairs:
        folders = ("TestVideo", "TrainValVideo", "videos")
        folder = next((f for f in folders if source.has(f"{f}/{name}.mp4")), folders[0])
        place = source.folder / folder / f"{name}.mp4"
        yield Item(name, place, texts("human", sentence), {"video": name})


def _msvd(source: Source, split: str) -> Iterator[Item]:
    path = source.find("youtube_mapping.txt")
    file_of: dict[int, str] = {}
    for number, line in enumerate(source.text(path).splitlines(), 1):
        if not line.strip():
            continue
        name, _, video = line.strip().rpartition(" ")
        if not name or not video.removeprefix("vid").isdigit():
            raise DataError(f"{path}, line {number}: {line!r} is not a clip's name and its vidN")
        file_of[int(video.removeprefix("vid"))] = f"YouTubeClips/{name}.avi"
    return _questions(source, split, file_of)


SETS = (
    DataSet(
        "msrvtt",
        "  MSRVTT_JSFUSION_test.csv or msrvtt_test.jsonl (the 1k-A test split)\n"
        "  train_qa.json, val_qa.json, test_qa.json (MSRVTT-QA)\n"
        "  TrainValVideo/, TestVideo/ (clips as videoN.mp4)",
        {
            "test": Split(1_000),
            "qa-train": Split(158_581),
            "qa-val": Split(12_278),
            "qa-test": Split(72_821),
        },
        _msrvtt,
        video=True,
    ),
    DataSet(
        "msvd",
        "  train_qa.json, val_qa.json, test_qa.json (MSVD-QA), youtube_mapping.txt\n"
        "  YouTubeClips/ (clips as .avi)",
        {"qa-train": Split(30_933), "qa-val": Split(6_415), "qa-test": Split(13_157)},
        _msvd,
        video=True,
    ),
)

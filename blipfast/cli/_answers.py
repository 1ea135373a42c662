"""`blipfast evaluate vqa|nlvr2|visdial`: metrics, and the files that the official servers take."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipfast.data import Record
from blipfast.errors import DataError

Result = tuple[dict[str, Any], dict[str, str]]
"""Metrics, and files to be written by name."""
Pixels = Callable[[Sequence[bytes]], Tensor]


def vqa(
    model: Any, tokenizer: Any, records: list[Record], pixels: Pixels, values: dict[str, Any]
) -> Result:
    from blipfast.evaluation.vqa import accuracy_by_type, answer_questions, vqa_accuracy

    questions = [_only(record, "question") for record in records]
    candidates = None if values["answers"] is None else read_answers(values["answers"])
    blocks = _blocks(len(records), values["batch_size"])
    batches = (
        (pixels([records[i].image for i in block]), [questions[i] for i in block])
        for block in blocks
    )
    given = list(
        answer_questions(model, tokenizer, batches, candidates=candidates, k=min(values["k"], 128))
    )
    rows = [
        {"question_id": record.ids.get("question", record.key), "answer": answer}
        for record, answer in zip(records, given, strict=True)
    ]
    files = {"vqa_result.json": json.dumps(rows, ensure_ascii=False)}
    annotated = [
        (answer, [entry.text for entry in record.texts if entry.source == "answer"], record)
        for answer, record in zip(given, records, strict=True)
    ]
    scored = [(vqa_accuracy(answer, true), record) for answer, true, record in annotated if true]
    if not scored:  # a test part, whose answers only the server has
        return {"questions": len(records)}, files
    types = [str(record.ids.get("answer_type", "unknown")) for _, record in scored]
    accuracy = accuracy_by_type([score for score, _ in scored], types)
    return {"questions": len(records), "accuracy": accuracy}, files


def nlvr2(
    model: Any, tokenizer: Any, records: list[Record], pixels: Pixels, values: dict[str, Any]
) -> Result:
    from blipfast.evaluation.nlvr import judge_pairs, nlvr_metrics

    pairs = list(zip(records[0::2], records[1::2], strict=False))
    for first, second in pairs:
        if first.ids.get("pair") is None or first.ids.get("pair") != second.ids.get("pair"):
            raise DataError(
                f"records {first.key} and {second.key} are no pair (ids pair); a broken image of a "
                "pair must take its partner out too, as `blipfast data prepare nlvr2` sees to"
            )
    if len(records) % 2:
        raise DataError(f"record {records[-1].key} has no partner")
    sentences = [first.texts[0].text for first, _ in pairs]

    def batches() -> Iterator[tuple[Tensor, list[str]]]:
        for block in _blocks(len(pairs), values["batch_size"]):
            images = pixels([one.image for i in block for one in pairs[i]])
            yield images.unflatten(0, (-1, 2)), [sentences[i] for i in block]

    judged = list(judge_pairs(model, tokenizer, batches()))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for (first, _), one in zip(pairs, judged, strict=True):
        writer.writerow([first.ids.get("identifier", first.key), str(one)])
    labels = [int(first.ids.get("label", -1)) for first, _ in pairs]
    metrics = {} if -1 in labels else nlvr_metrics(judged, labels, sentences)
    return {"pairs": len(pairs), **metrics}, {"nlvr2_predictions.csv": text.getvalue()}


def visdial(
    model: Any, tokenizer: Any, records: list[Record], pixels: Pixels, values: dict[str, Any]
) -> Result:
    from blipfast.evaluation.visdial import ranks_of, rounds_of, score_rounds, visdial_metrics

    rounds, ranks, rows = [], [], []
    for record in records:
        caption, here = rounds_of(record)
        scores = score_rounds(model, tokenizer, pixels([record.image]), caption, here)
        for one, score in zip(here, scores, strict=True):
            rounds.append(one)
            ranks.append(ranks_of(score))
            image = record.ids.get("image", record.key)
            rows.append({"image_id": image, "round_id": one.number, "ranks": ranks[-1]})
    metrics = visdial_metrics(rounds, ranks)
    return {"rounds": len(rounds), **metrics}, {"visdial_ranks.json": json.dumps(rows)}


def read_answers(path: str) -> list[str]:
    """A list of candidate answers: a JSON list, or one a line. Raises DataError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the answers {path}: {error}") from error
    try:
        found = json.loads(text)
    except ValueError:
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(found, list) or not found or not all(isinstance(a, str) for a in found):
        raise DataError(f"{path}: a list of answers was expected, as JSON or one a line")
    twice = [a for a, group in itertools.groupby(sorted(found)) if len(list(group)) > 1]
    if twice:
        raise DataError(f"{path} has {twice[0]!r} twice; each answer may stand once")
    return found


def _only(record: Record, source: str) -> str:
    texts = [entry.text for entry in record.texts if entry.source == source]
    if len(texts) != 1:
        raise DataError(f"record {record.key} has {len(texts)} texts with source {source}, not one")
    return texts[0]


def _blocks(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


TASKS = {"vqa": ("vqa", vqa), "nlvr2": ("nlvr", nlvr2), "visdial": ("visdial", visdial)}
"""What is evaluated: the model's task, and how."""


def stacked(images: Sequence[bytes], transform: Any, where: torch.device) -> Tensor:
    """`(N, 3, size, size)` on the model's device."""
    return torch.stack([transform(image) for image in images]).to(where)

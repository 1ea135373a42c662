"""From shard records to training samples: what one image and its texts mean for each task.

- pre-training, retrieval, captioning: one sample for each text, or for one drawn text.
- VQA: one text with source "question", and answers with source "answer" (one entry per annotator)
  or "genome_answer" (Visual Genome's, which weigh 0.2).
- VisDial: one round of a dialogue, drawn anew each epoch: texts with source "caption", "question"
  and "answer" in order, "option-N" for the candidates of round N; `ids["gt-N"]` is the right one.
- NLVR2: two records in a row with the same `ids["pair"]`; `ids["label"]` is 1 for true.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from blipfast.data import BadRecord, Record
from blipfast.data.index import RecordReader, ShardIndex
from blipfast.errors import DataError
from blipfast.train.config import TaskName

_INT63 = (1 << 63) - 1
GENOME_WEIGHT = 0.2  # of an answer from Visual Genome


@dataclass(frozen=True)
class Sample:
    """One image (or two, for NLVR2), one text and what is to be learnt of them.

    answers: with their weights; of VisDial the right one (1) and a wrong one (0) to the last entry
    of `history`, which has questions and answers in turn. Its text is the caption.
    """

    key: str
    images: tuple[bytes, ...]
    text: str
    image_id: int
    answers: tuple[tuple[str, float], ...] = ()
    label: int | None = None
    history: tuple[str, ...] = ()


def units_of(index: ShardIndex, task: TaskName, each_text: bool) -> tuple[Units, list[BadRecord]]:
    """The samples of a shard for a task, without reading them, and records that make none.

    each_text: a caption makes a sample; otherwise an image does.
    """
    rows = np.arange(len(index))
    if task == "nlvr":
        return _pair_units(index)
    if task in ("vqa", "visdial") or not each_text:
        longest = np.maximum.reduceat(index.words, index.first_text[:-1]) if len(index) else rows
        return Units(rows, np.full(len(rows), -1), longest), []
    texts = index.num_texts
    which = np.arange(len(index.words)) - np.repeat(index.first_text[:-1], texts)
    return Units(np.repeat(rows, texts), which, index.words), []


@dataclass(frozen=True)
class Units:
    """`N` samples: their records' rows in the index, their texts (-1: all, or one that is drawn)
    and the lengths of these in words."""

    row: np.ndarray
    text: np.ndarray
    words: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


def _pair_units(index: ShardIndex) -> tuple[Units, list[BadRecord]]:
    """NLVR2's pairs: two records in a row with the same `ids["pair"]`."""
    rows, bad = [], []
    row, count = 0, len(index)
    while row < count:
        pair = index.pair[row]
        if row + 1 < count and pair and pair == index.pair[row + 1]:
            rows.append(row)
            row += 2
            continue
        reason = "no record with the same ids pair follows; NLVR2 needs two in a row in one shard"
        bad.append(BadRecord(str(index.shard), index.keys[row].decode(), reason))
        row += 1
    first = np.array(rows, dtype=np.int64)
    words = index.words[index.first_text[first]] if rows else first
    return Units(first, np.full(len(first), -1), words), bad


def read_sample(
    reader: RecordReader, index: ShardIndex, row: int, text: int, task: TaskName, draw: int
) -> Sample:
    """Reads one sample. text: -1 takes the `draw`-th of a caption's texts, modulo their number.

    draw: of VisDial it chooses the round and the wrong answer.

    Raises DataError when the record makes no sample for the task.
    """
    record = reader.read(index, row)
    if task == "vqa":
        return _question(record)
    if task == "nlvr":
        return _pair(record, reader.read(index, row + 1))
    if task == "visdial":
        return _dialogue(record, draw)
    chosen = record.texts[draw % len(record.texts) if text < 0 else text].text
    return Sample(record.key, (record.image,), chosen, image_id(record))


def image_id(record: Record) -> int:
    """`ids["image"]`, or 63 bits of a hash of it (of the key where there is none)."""
    name = record.ids.get("image", record.key)
    if isinstance(name, int):
        return name & _INT63
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _INT63


def _question(record: Record) -> Sample:
    questions = [entry.text for entry in record.texts if entry.source == "question"]
    answers = Counter(entry.text for entry in record.texts if entry.source == "answer")
    genome = {entry.text for entry in record.texts if entry.source == "genome_answer"}
    if len(questions) != 1 or not (answers or genome):
        raise DataError(
            f"it has {len(questions)} texts with source question and {len(answers) + len(genome)} "
            "with source answer or genome_answer; VQA needs one question and at least one answer"
        )
    weighed = [(text, count / answers.total()) for text, count in answers.items()]
    weighed += [(text, GENOME_WEIGHT) for text in sorted(genome - set(answers))]
    image = image_id(record)
    return Sample(record.key, (record.image,), questions[0], image, tuple(weighed))


def _dialogue(record: Record, draw: int) -> Sample:
    by_source: dict[str, list[str]] = {}
    for entry in record.texts:
        by_source.setdefault(entry.source, []).append(entry.text)
    captions, questions = by_source.get("caption", []), by_source.get("question", [])
    answers = by_source.get("answer", [])
    rounds = [
        n
        for n in range(1, min(len(questions), len(answers)) + 1)
        if set(by_source.get(f"option-{n}", ())) - {answers[n - 1]}
    ]
    if len(captions) != 1 or not rounds:
        raise DataError(
            f"it has {len(captions)} texts with source caption and {len(rounds)} rounds with a "
            "question, its answer and another option; VisDial needs one caption and such a round"
        )
    draw, which = divmod(draw, len(rounds))
    number = rounds[which]
    right = answers[number - 1]
    wrong = sorted(set(by_source[f"option-{number}"]) - {right})
    turns = [text for pair in zip(questions, answers, strict=False) for text in pair]
    return Sample(
        record.key, (record.image,), captions[0], image_id(record),
        answers=((right, 1.0), (wrong[draw % len(wrong)], 0.0)),
        history=(*turns[: 2 * number - 2], questions[number - 1]),
    )  # fmt: skip


def _pair(first: Record, second: Record) -> Sample:
    label = first.ids.get("label")
    if label not in (0, 1):
        raise DataError(f"ids label is {label!r}; it must be 0 or 1")
    images, text = (first.image, second.image), first.texts[0].text
    return Sample(first.key, images, text, image_id(first), label=int(label))

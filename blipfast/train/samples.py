"""From shard records to training samples: what one image and its texts mean for each task.

- pre-training, retrieval, captioning: one sample for each text, or for one drawn text.
- VQA: one text with source "question", and answers with source "answer" (one entry per annotator)
  or "genome_answer" (Visual Genome's, which weigh 0.2).
- NLVR2: two records in a row with the same `ids["pair"]`; `ids["label"]` is 1 for true.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from blipfast.data import BadRecord, Record, read_shards
from blipfast.errors import DataError
from blipfast.train.config import DataConfig, TaskName

_INT63 = (1 << 63) - 1
GENOME_WEIGHT = 0.2  # of an answer from Visual Genome


@dataclass(frozen=True)
class Sample:
    """One image (or two, for NLVR2), one text and what is to be learnt of them."""

    key: str
    images: tuple[bytes, ...]
    text: str
    image_id: int
    answers: tuple[tuple[str, float], ...] = ()
    label: int | None = None


OnBad = Callable[[BadRecord], None]


def samples_of(
    records: Iterable[Record],
    task: TaskName,
    on_bad: OnBad,
    rng: np.random.Generator | None = None,
) -> Iterator[Sample]:
    """Samples in the order of the records.

    on_bad: told of each record that makes no sample for the task, and why. rng: draw one text of
    each record rather than take all.
    """
    if task == "nlvr":
        yield from _pairs(records, on_bad)
        return
    for record in records:
        try:
            if task == "vqa":
                yield _question(record)
            else:
                yield from _captions(record, rng)
        except DataError as error:
            on_bad(BadRecord("", record.key, str(error)))


def image_id(record: Record) -> int:
    """`ids["image"]`, or 63 bits of a hash of it (of the key where there is none)."""
    name = record.ids.get("image", record.key)
    if isinstance(name, int):
        return name & _INT63
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _INT63


def _captions(record: Record, rng: np.random.Generator | None) -> Iterator[Sample]:
    texts = record.texts if rng is None else (record.texts[int(rng.integers(len(record.texts)))],)
    for entry in texts:
        yield Sample(record.key, (record.image,), entry.text, image_id(record))


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


def _pairs(records: Iterable[Record], on_bad: OnBad) -> Iterator[Sample]:
    first: Record | None = None
    for record in records:
        if first is None:
            first = record
            continue
        pair, label = first.ids.get("pair"), first.ids.get("label")
        if pair is None or pair != record.ids.get("pair"):
            reason = "no record with the same ids pair follows; NLVR2 needs two in a row"
            on_bad(BadRecord("", first.key, reason))
            first = record
            continue
        if label not in (0, 1):
            on_bad(BadRecord("", first.key, f"ids label is {label!r}; it must be 0 or 1"))
        else:
            images, text = (first.image, record.image), first.texts[0].text
            yield Sample(first.key, images, text, image_id(first), label=int(label))
        first = None
    if first is not None:
        on_bad(BadRecord("", first.key, "the last record has no partner; NLVR2 needs two in a row"))


def count_samples(config: DataConfig, task: TaskName) -> int:
    """Samples of one epoch, by the shards' JSON alone: no image is read.

    Unreadable records count too, as far as they can be seen. Raises DataError when no shard
    matches.
    """
    texts = records = 0
    for shard in read_shards(config.shards).shards:
        try:
            with tarfile.open(shard, mode="r:") as tar:
                for member in tar:
                    if member.isfile() and member.name.endswith(".json"):
                        stream = tar.extractfile(member)
                        texts += _count_texts(stream.read() if stream is not None else b"")
                        records += 1
        except (tarfile.TarError, OSError):
            continue  # the reader says what is wrong with it when its turn comes
    if task == "nlvr":
        return records // 2
    return records if task == "vqa" or config.texts == "random" else texts


def _count_texts(body: bytes) -> int:
    try:
        return len(json.loads(body)["texts"])
    except (ValueError, KeyError, TypeError):
        return 0

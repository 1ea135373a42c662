"""`blipfast evaluate vqa|nlvr2|visdial`: what each question, pair or dialogue is given."""

from __future__ import annotations

import csv
import io
import itertools
import json
from pathlib import Path
from typing import Any

from blipfast.cli._evaluation import Job, Records, choose_examples
from blipfast.data import Record
from blipfast.errors import DataError
from blipfast.evaluation.outcome import Example, Outcome, Stopwatch
from blipfast.evaluation.sharing import gather_by_number, own_blocks, rank, share


def vqa(job: Job, records: Records) -> Outcome:
    from blipfast.evaluation.vqa import accuracy_by_type, vqa_accuracy

    answerer = make_answerer(job)
    own: dict[int, str] = {}
    watch = Stopwatch()
    for block in own_blocks(len(records), job.values["batch_size"]):
        # The questions of an image come in a row: it is encoded once for those of a batch.
        images = [records[i].ids.get("image", records[i].key) for i in block]
        first = {image: number for number, image in reversed(list(zip(block, images, strict=True)))}
        pixels = job.pixels(records.image(number) for number in first.values())
        place = {image: i for i, image in enumerate(first)}
        embeds = job.model.encode_image(pixels)[[place[image] for image in images]]
        questions = [only(records[i], "question") for i in block]
        own |= dict(zip(block, answerer(embeds, questions), strict=True))
    given = gather_by_number(own, len(records))
    speed = watch.speed("pairs", answerer.pairs(len(records)))
    rows = [
        {"question_id": records[i].ids.get("question", records[i].key), "answer": answer}
        for i, answer in enumerate(given)
    ]
    answers = [_texts(records[i], "answer") for i in range(len(records))]
    scores = [
        vqa_accuracy(a, true) if true else None for a, true in zip(given, answers, strict=True)
    ]
    known = [i for i, score in enumerate(scores) if score is not None]
    metrics: dict[str, Any] = {"questions": len(records)}
    if known:  # else a test part, whose answers only the server has
        types = [str(records[i].ids.get("answer_type", "unknown")) for i in known]
        metrics["scored"] = len(known)
        metrics["accuracy"] = accuracy_by_type([scores[i] or 0.0 for i in known], types)

    def example(i: int) -> Example:
        named = ", ".join(dict.fromkeys(answers[i]))
        asked = only(records[i], "question")
        return Example((records.image(i),), asked, given[i], named, _right(scores[i]))

    files = {"vqa_result.json": json.dumps(rows, ensure_ascii=False)}
    examples = choose_examples([_right(score) for score in scores], example)
    beside = _beside_reference(job, records, answerer)
    return Outcome({**metrics, "speed": speed, **beside}, files, examples)


def _beside_reference(job: Job, records: Records, answerer: Any) -> dict[str, Any]:
    """The speed of ranking, and of a padded pass for each pair, on a few questions; by one rank."""
    wanted = job.values["reference_pairs"]
    if not wanted or rank() > 0:
        return {}
    count = min(len(records), max(1, wanted // answerer.pairs(1)))
    embeds = job.model.encode_image(job.pixels(records.image(i) for i in range(count)))
    found = answerer.beside_reference(embeds, [only(records[i], "question") for i in range(count)])
    return {} if found is None else {"reference": found}


def _right(score: float | None) -> bool | None:
    return None if score is None else score >= 0.5


def make_answerer(job: Job) -> Any:
    """Of questions about images or clips, by the options of the command line."""
    from blipfast.evaluation.vqa import Answerer

    answers = job.values["answers"]
    candidates = None if answers is None else read_answers(answers)
    k = 128 if job.values["k"] is None else job.values["k"]
    padding = job.values["attend_padding"]
    return Answerer(job.model, job.tokenizer, candidates=candidates, k=k, attend_padding=padding)


def nlvr2(job: Job, records: Records) -> Outcome:
    from blipfast.evaluation.nlvr import judge_pairs, nlvr_metrics

    count = len(records) // 2
    firsts = [records[2 * i] for i in range(count)]
    for i, first in enumerate(firsts):
        second = records[2 * i + 1]
        if first.ids.get("pair") is None or first.ids.get("pair") != second.ids.get("pair"):
            raise DataError(
                f"records {first.key} and {second.key} are no pair (ids pair); the two images of a "
                "statement must follow each other, as `blipfast data prepare nlvr2` writes them"
            )
    sentences = [first.texts[0].text for first in firsts]
    own: dict[int, bool] = {}
    watch = Stopwatch()
    for block in own_blocks(count, job.values["batch_size"]):
        images = (records.image(2 * i + side) for i in block for side in (0, 1))
        pixels = job.pixels(images).unflatten(0, (-1, 2))
        judged = judge_pairs(job.model, job.tokenizer, pixels, [sentences[i] for i in block])
        own |= dict(zip(block, judged, strict=True))
    given = gather_by_number(own, count)
    speed = watch.speed("pairs", count)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for first, one in zip(firsts, given, strict=True):
        writer.writerow([first.ids.get("identifier", first.key), str(one)])
    labels = [first.ids.get("label") for first in firsts]
    metrics: dict[str, Any] = {"pairs": count}
    if all(label in (0, 1) for label in labels):
        metrics |= nlvr_metrics(given, [int(label or 0) for label in labels], sentences)

    def example(i: int) -> Example:
        both = (records.image(2 * i), records.image(2 * i + 1))
        truth = "" if labels[i] is None else str(bool(labels[i]))
        return Example(both, sentences[i], str(given[i]), truth, rights[i])

    rights = [
        None if label is None else bool(label) == one
        for label, one in zip(labels, given, strict=True)
    ]
    files = {"nlvr2_predictions.csv": text.getvalue()}
    return Outcome({**metrics, "speed": speed}, files, choose_examples(rights, example))


def visdial(job: Job, records: Records) -> Outcome:
    from blipfast.evaluation.visdial import ranks_of, rounds_of, score_rounds, visdial_metrics

    dialogues = [rounds_of(records[i]) for i in range(len(records))]
    own: dict[int, list[list[int]]] = {}
    watch = Stopwatch()
    for i in share(len(records)):
        caption, here = dialogues[i]
        pixels = job.pixels([records.image(i)])
        scores = score_rounds(job.model, job.tokenizer, pixels, caption, here)
        own[i] = [ranks_of(score) for score in scores]
    found = gather_by_number(own, len(records))
    rounds = [(i, one) for i, (_, here) in enumerate(dialogues) for one in here]
    speed = watch.speed("pairs", sum(len(one.candidates) for _, one in rounds))
    ranks = [its for here in found for its in here]
    rows = [
        {
            "image_id": records[i].ids.get("image", records[i].key),
            "round_id": one.number,
            "ranks": r,
        }
        for (i, one), r in zip(rounds, ranks, strict=True)
    ]
    rights = [
        None if one.right is None else r[one.right] == 1
        for (_, one), r in zip(rounds, ranks, strict=True)
    ]

    def example(n: int) -> Example:
        i, one = rounds[n]
        best = one.candidates[ranks[n].index(1)]
        truth = "" if one.right is None else one.candidates[one.right]
        return Example((records.image(i),), " ".join(one.turns[-3:]), best, truth, rights[n])

    metrics = {
        "rounds": len(rounds),
        **visdial_metrics([one for _, one in rounds], ranks),
        "speed": speed,
    }
    return Outcome(
        metrics, {"visdial_ranks.json": json.dumps(rows)}, choose_examples(rights, example)
    )


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


def only(record: Record, source: str) -> str:
    """The one text of a source. Raises DataError when there is none, or several."""
    texts = _texts(record, source)
    if len(texts) != 1:
        raise DataError(f"record {record.key} has {len(texts)} texts with source {source}, not one")
    return texts[0]


def _texts(record: Record, source: str) -> list[str]:
    return [entry.text for entry in record.texts if entry.source == source]

"""`blipfast evaluate video-retrieval|video-qa`: image models on clips, zero-shot (section 5.6)."""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blipfast.cli._answers import make_answerer
from blipfast.cli._evaluation import Job, KeptEmbeds, check_bad, choose_examples
from blipfast.cli._images import text_features
from blipfast.data import BadRecord, EvalTransform
from blipfast.errors import DataError
from blipfast.evaluation.clips import Clip, pick_decoder, read_frames, read_manifest
from blipfast.evaluation.outcome import Example, Outcome, Stopwatch
from blipfast.evaluation.sharing import blocks, gather, gather_by_number, own_blocks, share

_SHOWN = 120  # pixels of a frame on the page


class Clips:
    """The clips of a manifest that can be decoded; a file named in several lines is one video.

    Each rank decodes its own. videos: the files; lines: of each, what the manifest says of it.
    """

    def __init__(self, job: Job) -> None:
        values = job.values
        self.count, self.sampling = values["frames"], values["sampling"]
        self.decoder = pick_decoder(values["decoder"])
        self.transform, self.where = EvalTransform(job.image_size), job.where
        by_path: dict[Path, list[Clip]] = {}
        for clip in read_manifest(values["shards"])[: values["limit"]]:
            by_path.setdefault(clip.path, []).append(clip)
        broken: dict[int, BadRecord] = {}
        self.videos = list(by_path)
        for number in share(len(self.videos)):
            try:
                self.frames(number)
            except DataError as error:
                broken[number] = BadRecord("", by_path[self.videos[number]][0].key, str(error))
        broken = {number: bad for part in gather(broken) for number, bad in part.items()}
        self.bad = [broken[number] for number in sorted(broken)]
        self.videos = [path for number, path in enumerate(self.videos) if number not in broken]
        self.lines = [by_path[path] for path in self.videos]
        check_bad(self.bad, len(self.videos), values["max_bad_fraction"])
        for one in self.bad:
            print(f"blipfast: left out: {one.reason}", file=sys.stderr)
        if not self.videos:
            raise DataError(f"{values['shards']}: no clip can be decoded")

    def __len__(self) -> int:
        return len(self.videos)

    def frames(self, number: int, count: int | None = None) -> list[Image.Image]:
        frames = read_frames(
            self.videos[number], count or self.count, sampling=self.sampling, decoder=self.decoder
        )
        return [Image.fromarray(frame) for frame in frames]

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """`(N, F, 3, size, size)` on the model's device."""
        clips = [torch.stack([self.transform(f) for f in self.frames(n)]) for n in numbers]
        return torch.stack(clips).to(self.where)

    def strip(self, number: int) -> bytes:
        """A few frames side by side, for the page."""
        frames = [frame.resize((_SHOWN, _SHOWN)) for frame in self.frames(number, 4)]
        strip = Image.new("RGB", (_SHOWN * len(frames), _SHOWN))
        for i, frame in enumerate(frames):
            strip.paste(frame, (i * _SHOWN, 0))
        file = io.BytesIO()
        strip.save(file, "JPEG", quality=80)
        return file.getvalue()


def video_retrieval(job: Job, clips: Clips) -> Outcome:
    from blipfast.evaluation.retrieval import median_rank, recall_metrics, score_retrieval
    from blipfast.tasks.video import encode_video

    texts_of = [[t.text for line in its for t in line.texts] for its in clips.lines]
    flat = [text for its in texts_of for text in its]
    own: dict[int, Tensor] = {}

    def encode(numbers: Sequence[int]) -> Tensor:
        embeds, features = encode_video(job.model, clips.pixels(numbers))
        assert features is not None  # a retrieval model has projections
        own.update(zip(numbers, features.cpu(), strict=True))
        return embeds

    kept = KeptEmbeds(encode, job.values["keep_bytes"])
    mine = own_blocks(len(clips), job.values["batch_size"])
    with torch.inference_mode():
        for block in mine:
            kept.first(block)
        features = torch.stack(gather_by_number(own, len(clips))).to(job.where)
        packed, text_feats = text_features(job, flat, job.values["max_length"] or 40)
        watch = Stopwatch()
        scores = score_retrieval(
            job.model, kept, features, packed, text_feats, k=job.values["k"] or 128,
            images_per_block=2, own=mine,
        )  # fmt: skip
    speed = watch.speed("pairs", scores.pairs)
    ends = [0, *itertools.accumulate(len(its) for its in texts_of)]
    owned = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    video_of = [number for number, its in enumerate(owned) for _ in its]

    def directions(texts: Tensor, videos: Tensor) -> dict[str, float]:
        recall = recall_metrics(texts, videos, owned)
        return {
            "t2v_r1": recall.ir_r1, "t2v_r5": recall.ir_r5, "t2v_r10": recall.ir_r10,
            "t2v_median_rank": median_rank(videos.T, [[v] for v in video_of]),
            "v2t_r1": recall.tr_r1, "v2t_r5": recall.tr_r5, "v2t_r10": recall.tr_r10,
        }  # fmt: skip

    best = scores.text_to_image.argmax(dim=0).tolist()
    rights: list[bool | None] = [best[t] == video_of[t] for t in range(len(flat))]

    def example(t: int) -> Example:
        strips = clips.strip(best[t]), clips.strip(video_of[t])
        found, true = clips.videos[best[t]].name, clips.videos[video_of[t]].name
        return Example(strips[:1] if rights[t] else strips, flat[t], found, true, rights[t])

    metrics = {
        "videos": len(clips),
        "texts": len(flat),
        "itc": directions(scores.itc, scores.itc),
        "itm": directions(scores.image_to_text, scores.text_to_image),
        "pairs_through_itm": scores.pairs,
        "speed": speed,
    }
    rows = [{"text": text, "video": clips.videos[best[t]].name} for t, text in enumerate(flat)]
    files = {"video_retrieval.json": json.dumps(rows, ensure_ascii=False)}
    return Outcome(metrics, files, choose_examples(rights, example))


def video_qa(job: Job, clips: Clips) -> Outcome:
    from blipfast.tasks.video import encode_video

    answerer = make_answerer(job)
    asked = [(v, line) for v, its in enumerate(clips.lines) for line in its]
    questions = [_only(line, "question") for _, line in asked]
    of_video: dict[int, list[int]] = {}
    for number, (video, _) in enumerate(asked):
        of_video.setdefault(video, []).append(number)
    own: dict[int, str] = {}
    watch = Stopwatch()
    for video in share(len(clips)):
        with torch.inference_mode():  # a clip is decoded and encoded once for all its questions
            embeds, _ = encode_video(job.model, clips.pixels([video]))
        for block in blocks(of_video[video], job.values["batch_size"]):
            found = answerer(embeds.expand(len(block), -1, -1), [questions[i] for i in block])
            own |= dict(zip(block, found, strict=True))
    given = gather_by_number(own, len(asked))
    speed = watch.speed("pairs", answerer.pairs(len(asked)))
    truth = [[t.text for t in line.texts if t.source == "answer"] for _, line in asked]
    rights = [
        _plain(answer) in map(_plain, true) if true else None
        for answer, true in zip(given, truth, strict=True)
    ]
    known = [right for right in rights if right is not None]
    metrics: dict[str, Any] = {"videos": len(clips), "questions": len(asked)}
    if known:
        metrics |= {"scored": len(known), "accuracy": 100 * sum(known) / len(known)}

    def example(i: int) -> Example:
        strip = clips.strip(asked[i][0])
        return Example((strip,), questions[i], given[i], ", ".join(truth[i]), rights[i])

    rows = [
        {"question_id": line.ids.get("question", line.key), "answer": answer}
        for (_, line), answer in zip(asked, given, strict=True)
    ]
    files = {"video_qa_result.json": json.dumps(rows, ensure_ascii=False)}
    return Outcome({**metrics, "speed": speed}, files, choose_examples(rights, example))


def _only(line: Clip, source: str) -> str:
    texts = [entry.text for entry in line.texts if entry.source == source]
    if len(texts) != 1:
        raise DataError(f"clip {line.key} has {len(texts)} texts with source {source}, not one")
    return texts[0]


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split())

"""`blipfast evaluate retrieval|caption`: images and the texts that people wrote about them."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import torch
import torch.nn.functional as F

from blipfast.cli._evaluation import Job, KeptEmbeds, Records, choose_examples
from blipfast.evaluation.outcome import Example, Outcome, Stopwatch
from blipfast.evaluation.sharing import gather_by_number, own_blocks, rank

_TEXTS_AT_ONCE = 256


def text_features(job: Job, texts: list[str], max_length: int) -> tuple[Any, torch.Tensor]:
    """The texts as the model reads them, and their features `(N, E)`, shared among the ranks."""
    from blipfast.models.blip import PackedText

    encoded = job.tokenizer(texts, max_length=max_length).to(job.where)
    packed = PackedText.from_padded(encoded.input_ids, encoded.attention_mask)
    own: dict[int, torch.Tensor] = {}
    for block in own_blocks(len(texts), _TEXTS_AT_ONCE):
        own |= dict(zip(block, job.model.text_features(packed.select(block)).cpu(), strict=True))
    return packed, torch.stack(gather_by_number(own, len(texts))).to(job.where)


def retrieval(job: Job, records: Records) -> Outcome:
    from blipfast.evaluation.retrieval import recall_metrics, score_retrieval

    texts_of = [[entry.text for entry in records[i].texts] for i in range(len(records))]
    flat = [text for its in texts_of for text in its]
    kept = KeptEmbeds(
        lambda numbers: job.model.encode_image(job.pixels(records.image(i) for i in numbers)),
        job.values["keep_bytes"],
    )
    mine = own_blocks(len(records), job.values["batch_size"])
    with torch.inference_mode():
        own: dict[int, torch.Tensor] = {}
        for block in mine:
            features = job.model.image_features(kept.first(block))
            own |= dict(zip(block, features.cpu(), strict=True))
        image_feats = torch.stack(gather_by_number(own, len(records))).to(job.where)
        packed, text_feats = text_features(job, flat, job.values["max_length"] or 35)
        watch = Stopwatch()
        scores = score_retrieval(
            job.model, kept, image_feats, packed, text_feats, k=job.values["k"] or 256,
            own=mine,
        )  # fmt: skip
    speed = watch.speed("pairs", scores.pairs)
    reference = {}
    if job.values["reference_pairs"]:
        reference = {"reference": _beside_reference(job, kept, flat, scores, speed)}
    ends = [0, *itertools.accumulate(len(its) for its in texts_of)]
    owned = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    best = scores.image_to_text.argmax(dim=1).tolist()

    def example(i: int) -> Example:
        return Example((records.image(i),), "", flat[best[i]], " / ".join(texts_of[i]), rights[i])

    rights = [best[i] in owned[i] for i in range(len(records))]
    metrics = {
        "texts": len(flat),
        "itc": recall_metrics(scores.itc, scores.itc, owned).to_dict(),
        "itm": recall_metrics(scores.image_to_text, scores.text_to_image, owned).to_dict(),
        "pairs_through_itm": scores.pairs,
        "speed": speed,
        **reference,
    }
    found = [
        {"image_id": records[i].ids.get("image", records[i].key), "text": flat[best[i]]}
        for i in range(len(records))
    ]
    files = {"retrieval_best_texts.json": json.dumps(found, ensure_ascii=False)}
    return Outcome(metrics, files, choose_examples(rights, example))


def _beside_reference(
    job: Job, kept: KeptEmbeds, texts: list[str], scores: Any, speed: dict[str, float]
) -> dict[str, float]:
    """Some of the pairs scored one image to a pair, padded, as the original does; by one rank."""
    from blipfast.evaluation.retrieval import NOT_A_CANDIDATE, plain_pair_logits

    length, wanted = job.values["max_length"] or 35, job.values["reference_pairs"]
    seconds, count, apart = 0.0, 0, 0.0
    for image, row in enumerate(scores.image_to_text):
        chosen = (row > NOT_A_CANDIDATE).nonzero()[:, 0][: wanted - count]
        if rank() > 0 or not len(chosen):
            break
        batch = job.tokenizer([texts[j] for j in chosen.tolist()], max_length=length).to(job.where)
        padding = (0, max(0, length - batch.input_ids.shape[1]))
        ids, mask = (F.pad(t, padding) for t in (batch.input_ids, batch.attention_mask))
        embeds = kept([image])
        start = time.perf_counter()
        logits = plain_pair_logits(job.model, embeds, ids, mask).float().cpu()
        seconds += time.perf_counter() - start
        count += len(chosen)
        ours = row[chosen] - scores.itc[image, chosen]
        apart = max(apart, (logits - ours.cpu()).abs().max().item())
    if not count:
        return {}
    rate = count / seconds
    return {
        "pairs": count,
        "pairs_per_second": round(rate, 1),
        "times_as_fast": round(speed["pairs_per_second"] / rate, 2),
        "largest_difference_of_logits": apart,
    }


def caption(job: Job, records: Records) -> Outcome:
    from blipfast.evaluation.captions import caption_metrics
    from blipfast.generation import caption_images

    own: dict[int, str] = {}
    watch = Stopwatch()
    for block in own_blocks(len(records), job.values["batch_size"]):
        pixels = job.pixels(records.image(i) for i in block)
        captions = caption_images(
            job.model, job.tokenizer, pixels, prompt=job.values["prompt"],
            num_beams=job.values["beams"], max_length=job.values["max_length"] or 20,
            min_length=job.values["min_length"],
            repetition_penalty=job.values["repetition_penalty"],
        )  # fmt: skip
        own |= dict(zip(block, captions, strict=True))
    given = gather_by_number(own, len(records))
    speed = watch.speed("images", len(records))
    rows = [
        {"image_id": records[i].ids.get("image", records[i].key), "caption": text}
        for i, text in enumerate(given)
    ]
    files = {"captions.json": json.dumps(rows, ensure_ascii=False)}
    if rank() > 0:  # the scores are the first rank's to compute
        return Outcome({}, files)
    truth = [
        [entry.text for entry in records[i].texts if entry.source != "withheld"]
        for i in range(len(records))
    ]
    known = [i for i, its in enumerate(truth) if its]
    metrics: dict[str, Any] = {"first_captions": given[:5], "speed": speed}
    each: dict[int, float] = {}
    if known:  # else a test part, whose captions only the server has
        overall = caption_metrics(
            [given[i] for i in known],
            [truth[i] for i in known],
            [_domain(records[i].ids.get("domain")) for i in known],
        )
        each = dict(zip(known, overall.cider_each, strict=True))
        metrics = {
            **overall.scores,
            "domains": overall.by_domain,
            "tokenizer": overall.tokenizer,
            **metrics,
        }
        metrics["left_out"] = overall.left_out
        metrics = {name: value for name, value in metrics.items() if value != {}}
    middle = sorted(each.values())[len(each) // 2] if each else 0.0

    def example(i: int) -> Example:
        return Example((records.image(i),), "", given[i], " / ".join(truth[i]), rights[i])

    rights = [each[i] >= middle and each[i] > 0 if i in each else None for i in range(len(given))]
    words = ("CIDEr in the upper half", "CIDEr in the lower half")
    return Outcome(metrics, files, choose_examples(rights, example), words)


def _domain(name: int | str | None) -> str | None:
    return None if name is None else str(name)

"""What the models of the main job can do: retrieval, captions, and how well the filter filters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from blipfast.capfilt import Decision
from blipfast.data import BlipTokenizer
from blipfast.demo.reading import is_right
from blipfast.demo.samples import Samples, normalise
from blipfast.demo.scenes import DemoRecord
from blipfast.errors import BlipfastError, DataError
from blipfast.evaluation.captions import cider
from blipfast.evaluation.retrieval import RecallMetrics, recall_metrics, score_retrieval
from blipfast.generation import caption_images
from blipfast.models.blip import Blip, PackedText
from blipfast.tasks.caption import BlipForCaptioning

_CHUNK = 100


@dataclass(frozen=True)
class RetrievalResult:
    """Recall by ITC alone and re-ranked by ITM, and each text's best images `(T, 3)`."""

    itc: RecallMetrics
    itm: RecallMetrics
    best_images: list[list[int]]
    count: int

    def chance(self, k: int) -> float:
        """Recall at k, in percent, of guessing."""
        return 100.0 * min(k, self.count) / self.count


@torch.inference_mode()
def encode_images(model: Blip, pixels: Tensor) -> Tensor:
    """`(N, 3, H, W)` uint8 to `image_embeds (N, S, D)`."""
    return torch.cat([model.encode_image(normalise(part)) for part in pixels.split(_CHUNK)])


@torch.inference_mode()
def measure_retrieval(
    model: Blip, records: Sequence[DemoRecord], tokenizer: BlipTokenizer, k: int
) -> RetrievalResult:
    """Held-out retrieval both ways: each text fits its own image alone.

    model: any with ITC projections and a matching head; k: candidates that ITM re-ranks.
    """
    model.eval()
    embeds = encode_images(model, Samples.from_demo(records).pixels)
    batch = tokenizer([r.caption for r in records])
    text = PackedText.from_padded(batch.input_ids, batch.attention_mask)
    scores = score_retrieval(
        model,  # type: ignore[arg-type]
        embeds,
        model.image_features(embeds),
        text,
        model.text_features(text),
        k=k,
    )
    own = [[i] for i in range(len(records))]
    best = scores.text_to_image.topk(min(3, len(records)), dim=0).indices.T.tolist()
    return RetrievalResult(
        recall_metrics(scores.itc, scores.itc, own),
        recall_metrics(scores.image_to_text, scores.text_to_image, own),
        best,
        len(records),
    )


@dataclass(frozen=True)
class CaptionResult:
    """CIDEr, the share of captions with nothing wrong in them, and the captions these are of."""

    cider: float
    right: float
    captions: list[str]


def measure_captions(
    model: BlipForCaptioning, records: Sequence[DemoRecord], tokenizer: BlipTokenizer, prompt: str
) -> CaptionResult:
    """CIDEr of captions by beam search against the held-out pictures' references."""
    model.eval()
    pixels = Samples.from_demo(records).pixels
    captions: list[str] = []
    for part in pixels.split(_CHUNK):
        captions += caption_images(
            model, tokenizer, normalise(part), prompt=prompt, max_length=30, min_length=6
        )
    right = sum(is_right(text, r.scene) for text, r in zip(captions, records, strict=True))
    score = cider(captions, [r.references for r in records]).mean
    return CaptionResult(score, right / len(records), captions)


@dataclass(frozen=True)
class TextQuality:
    """Texts of one source: how many, and the share that is right; the same of those accepted."""

    texts: int
    right: float
    accepted: int
    accepted_right: float


def measure_texts(
    decisions: Sequence[Decision], records: Sequence[DemoRecord]
) -> dict[str, TextQuality]:
    """By source, how many texts are true of their scenes, which no model has been told."""
    scenes = {record.key: record.scene for record in records}
    found: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for d in decisions:
        if d.text is not None:
            found[d.source].append((is_right(d.text, scenes[d.key]), d.accepted))
    return {source: _quality(rows) for source, rows in sorted(found.items())}


def _quality(rows: list[tuple[bool, bool]]) -> TextQuality:
    kept = [right for right, accepted in rows if accepted]
    right = sum(right for right, _ in rows) / len(rows)
    return TextQuality(len(rows), right, len(kept), sum(kept) / max(1, len(kept)))


@dataclass(frozen=True)
class FilterResult:
    """How well the filter tells wrong web texts.

    Positive is "wrong", found is "rejected". auc: of the ITM probability; by_kind: for each kind of
    wrong text against all right ones. itc_auc: of the contrastive similarity alone.
    roc: points (false positive rate, true positive rate).
    """

    auc: float
    itc_auc: float
    precision: float
    recall: float
    by_kind: dict[str, float]
    roc: list[tuple[float, float]]
    right: list[float]
    wrong: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_filter(
    decisions: Sequence[Decision], records: Sequence[DemoRecord], threshold: float
) -> FilterResult:
    """From the manifest and the truth that no model has seen.

    Raises:
        DataError: a record has no judged web text in the manifest, or all texts are right or wrong.
    """
    try:
        from torchmetrics.functional.classification import (
            binary_auroc,
            binary_precision,
            binary_recall,
            binary_roc,
        )
    except ImportError as error:
        raise BlipfastError(
            "filter metrics need torchmetrics: pip install 'blipfast[metrics]'"
        ) from error
    scored = {d.key: d for d in decisions if d.source == "web" and d.itm is not None}
    missing = [r.key for r in records if r.key not in scored]
    if missing:
        raise DataError(f"{len(missing)} records have no judged web text, first: {missing[0]}")
    itm = torch.tensor([scored[r.key].itm for r in records])
    itc = torch.tensor([scored[r.key].itc for r in records])
    wrong = torch.tensor([not r.is_correct for r in records])
    if bool(wrong.all()) or not bool(wrong.any()):
        raise DataError("the filter cannot be measured where all texts are right, or all wrong")
    suspicion = 1 - itm
    by_kind = {}
    for kind in sorted({r.noise_kind for r in records} - {""}):
        rows = torch.tensor([r.noise_kind in ("", kind) for r in records])
        by_kind[str(kind)] = float(binary_auroc(suspicion[rows], wrong[rows].long()))
    truth, rejected = wrong.long(), (itm < threshold).long()
    false_rate, true_rate, _ = binary_roc(suspicion, truth, thresholds=100)
    return FilterResult(
        float(binary_auroc(suspicion, truth)),
        float(binary_auroc((1 - itc) / 2, truth)),
        float(binary_precision(rejected, truth)),
        float(binary_recall(rejected, truth)),
        by_kind,
        list(zip(false_rate.tolist(), true_rate.tolist(), strict=True)),
        itm[~wrong].tolist(),
        itm[wrong].tolist(),
    )

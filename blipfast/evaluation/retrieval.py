"""Two-stage retrieval (BLIP, section 5.1): ITC proposes k candidates, ITM re-ranks them.

Candidates of both directions are scored together, each pair once, block by block of images: an
image's K/V are projected once for all its texts, and memory is bounded by the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from blipfast.errors import ShapeError
from blipfast.evaluation.sharing import blocks, gather
from blipfast.models.blip import PackedText
from blipfast.models.reference import encode_padded
from blipfast.tasks.retrieval import BlipForRetrieval

NOT_A_CANDIDATE = -100.0  # score of a pair that ITC did not propose
_ROWS = 512  # rows ranked at a time


@dataclass(frozen=True)
class RetrievalScores:
    """Scores `(images, texts)` of ITC alone, and re-ranked for each direction.

    A candidate's re-ranked score is the ITM logit of class 1 plus the ITC similarity; other pairs
    have `NOT_A_CANDIDATE`. pairs: how many pairs went through ITM.
    """

    itc: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    pairs: int


@torch.no_grad()
def score_retrieval(
    model: BlipForRetrieval,
    image_embeds: Tensor | Callable[[Sequence[int]], Tensor],
    image_feats: Tensor,
    text: PackedText,
    text_feats: Tensor,
    *,
    k: int,
    images_per_block: int = 16,
    tokens_per_pass: int = 16_384,
    on_block: Callable[[int], None] | None = None,
    own: Sequence[Sequence[int]] | None = None,
) -> RetrievalScores:
    """Scores every image with every text.

    image_embeds: `(I, S, D)`, or a function that gives those of some images, so that a large set
    need not lie in memory. image_feats: `(I, E)`, text_feats: `(T, E)`, unit vectors.
    k: candidates per image and per text. images_per_block, tokens_per_pass: what bounds the memory.
    on_block: called with the number of images after each block.
    own: the batches of images that are this rank's to score (`evaluation.sharing.own_blocks`), of
    which alone embeddings are asked for; every rank must call, and gets all scores. None is all.
    """
    num_images, num_texts = image_feats.shape[0], text_feats.shape[0]
    if text.packing.num_sequences != num_texts:
        raise ShapeError(f"{num_texts} text features came with {text.packing.num_sequences} texts")
    embeds_of = _lookup(image_embeds)
    with torch.autocast(image_feats.device.type, enabled=False):  # bf16 would make ties of them
        itc = image_feats.float() @ text_feats.float().T
    of_image = _top_k_mask(itc, k, dim=1)
    of_text = _top_k_mask(itc, k, dim=0)
    itm = torch.full_like(itc, NOT_A_CANDIDATE)
    wanted = of_image | of_text
    batches = [range(num_images)] if own is None else own
    for block in (part for batch in batches for part in blocks(batch, images_per_block)):
        states = model.image_states(embeds_of(block), project=True)
        images, texts = wanted[block].nonzero(as_tuple=True)
        for pairs in _passes(
            images.tolist(), texts.tolist(), text.packing.lengths, tokens_per_pass
        ):
            rows, columns = [i for i, _ in pairs], [j for _, j in pairs]
            logits = model.match(text.select(columns), states, rows)[:, 1].float()
            itm[[block[i] for i in rows], columns] = logits.to(itm.device)
        if on_block is not None:
            on_block(len(block))
    if own is not None:
        _exchange(itm, wanted, [i for batch in own for i in batch])
    count = int(wanted.sum())
    del wanted
    scores = itm.add_(itc)  # for COCO's test set each of these matrices is half a gigabyte
    to_image = scores.masked_fill(~of_text, NOT_A_CANDIDATE)
    return RetrievalScores(itc, scores.masked_fill_(~of_image, NOT_A_CANDIDATE), to_image, count)


@torch.no_grad()
def plain_pair_logits(
    model: BlipForRetrieval, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """ITM logits of class 1, `(N,)`, of N texts with one image, as the original scores them.

    Every pair has an image of its own, whose keys and values are projected for it, and texts are
    padded: what `score_retrieval` is measured against. image_embeds: `(1, S, D)`. input_ids,
    attention_mask: `(N, L)`.
    """
    ids = input_ids.clone()
    ids[:, 0] = model.text_config.enc_token_id
    embeds = image_embeds.expand(len(ids), -1, -1).contiguous()
    hidden = encode_padded(model.encoder, ids, attention_mask, cross_embeds=embeds)
    return model.itm_head(hidden[:, 0])[:, 1]


def _exchange(scores: Tensor, wanted: Tensor, own: list[int]) -> None:
    """Fills in the wanted scores of the other ranks' images."""
    for numbers, values in gather((own, scores[own][wanted[own]].cpu())):
        rows = scores[numbers]
        rows[wanted[numbers]] = values.to(scores.device)
        scores[numbers] = rows


@dataclass(frozen=True)
class RecallMetrics:
    """Recall at 1, 5 and 10 in percent: TR retrieves texts for images, IR images for texts."""

    tr_r1: float
    tr_r5: float
    tr_r10: float
    ir_r1: float
    ir_r5: float
    ir_r10: float

    @property
    def tr_mean(self) -> float:
        return (self.tr_r1 + self.tr_r5 + self.tr_r10) / 3

    @property
    def ir_mean(self) -> float:
        return (self.ir_r1 + self.ir_r5 + self.ir_r10) / 3

    @property
    def mean(self) -> float:
        """The mean of both means, by which the original picks its best checkpoint."""
        return (self.tr_mean + self.ir_mean) / 2

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "mean": self.mean}


def recall_metrics(
    image_to_text: Tensor, text_to_image: Tensor, texts_of_image: Sequence[Sequence[int]]
) -> RecallMetrics:
    """Recall from score matrices `(images, texts)`, larger is better.

    texts_of_image: for each image the indices of its true texts; of several, the best one counts.
    Raises ShapeError when they do not cover the matrices.
    """
    num_images, num_texts = image_to_text.shape
    image_of_text = {t: i for i, texts in enumerate(texts_of_image) for t in texts}
    if len(texts_of_image) != num_images or set(image_of_text) != set(range(num_texts)):
        raise ShapeError(
            f"texts_of_image must name each of {num_texts} texts for {num_images} images"
        )
    text_ranks = _ranks(image_to_text, [list(texts) for texts in texts_of_image])
    image_ranks = _ranks(text_to_image.T, [[image_of_text[t]] for t in range(num_texts)])

    def recall(ranks: Tensor, k: int) -> float:
        return 100.0 * (ranks < k).float().mean().item()

    at = (1, 5, 10)
    return RecallMetrics(
        *(recall(text_ranks, k) for k in at), *(recall(image_ranks, k) for k in at)
    )


def median_rank(scores: Tensor, targets: Sequence[Sequence[int]]) -> float:
    """Over the rows, the median of the best rank, from 1, of the row's targets."""
    return float(_ranks(scores, [list(its) for its in targets]).double().quantile(0.5)) + 1


def _ranks(scores: Tensor, targets: list[list[int]]) -> Tensor:
    """For each row the best rank, from 0, of its targets."""
    ranks = []
    places = torch.arange(scores.shape[1], device=scores.device)
    for start in range(0, scores.shape[0], _ROWS):  # sorting all at once would take six times them
        order = scores[start : start + _ROWS].argsort(dim=1, descending=True, stable=True)
        position = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
        its = targets[start : start + _ROWS]
        ranks += [row[target].min() for row, target in zip(position, its, strict=True)]
    return torch.stack(ranks)


def _top_k_mask(scores: Tensor, k: int, dim: int) -> Tensor:
    index = scores.topk(min(k, scores.shape[dim]), dim=dim).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, index, True)


def _lookup(
    embeds: Tensor | Callable[[Sequence[int]], Tensor],
) -> Callable[[Sequence[int]], Tensor]:
    if isinstance(embeds, Tensor):
        stored = embeds
        return lambda index: stored[list(index)]
    return embeds


def _passes(
    images: list[int], texts: list[int], lengths: Sequence[int], tokens: int
) -> Iterator[list[tuple[int, int]]]:
    """Splits pairs into passes of at most `tokens` text tokens (one pair at least)."""
    pairs: list[tuple[int, int]] = []
    total = 0
    for image, text in zip(images, texts, strict=True):
        if pairs and total + lengths[text] > tokens:
            yield pairs
            pairs, total = [], 0
        pairs.append((image, text))
        total += lengths[text]
    if pairs:
        yield pairs

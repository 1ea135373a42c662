"""CapFilt's two models at work: the captioner writes, the filter judges (BLIP, section 3.3)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from blipfast.capfilt.config import CapFiltConfig
from blipfast.capfilt.decisions import SYNTHETIC, Candidate, Score, says_something
from blipfast.data import BlipTokenizer
from blipfast.errors import DataError
from blipfast.generation import caption_images, caption_stream
from blipfast.models.blip import PackedText
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.retrieval import BlipForRetrieval

_ROWS = 64  # texts side by side: as many as the decoder's layers read their weights for at once


def image_number(key: str) -> int:
    """A number that names an image in the sampling, whatever batch it is in: from its key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little") >> 1


@torch.inference_mode()
def caption_records(
    model: BlipForCaptioning,
    tokenizer: BlipTokenizer,
    keys: Sequence[str],
    pixel_values: Iterable[Tensor],
    config: CapFiltConfig,
    *,
    writer: str | None = None,
) -> list[list[Candidate]]:
    """Synthetic captions, `captions_per_image` for each image; some may be empty.

    With nucleus sampling, an image whose captions have ended makes room for the next.

    Args:
        model: the captioner, in evaluation mode.
        tokenizer: its vocabulary.
        keys: `N` names; with nucleus sampling they and `config.seed` decide the draws.
        pixel_values: batches `(B, 3, image_size, image_size)` of the `N` images, on the model's
            device.
        config: method, lengths and prompt.
        writer: the captioner's hash, noted with each text.
    """
    count = config.captions_per_image
    common: dict[str, Any] = {
        "prompt": config.prompt,
        "method": config.method,
        "min_length": config.min_length,
        "max_length": config.max_length,
        "num_return_sequences": count,
    }
    texts: list[str] = []
    if config.method == "beam":
        for batch in pixel_values:
            texts += caption_images(model, tokenizer, batch, num_beams=config.num_beams, **common)
    elif keys:
        texts = caption_stream(
            model,
            tokenizer,
            pixel_values,
            in_flight=max(config.batch_size, _ROWS // count),
            top_p=config.top_p,
            top_k=config.top_k,
            repetition_penalty=config.repetition_penalty,
            seed=config.seed,
            image_ids=[image_number(key) for key in keys],
            **common,
        )
    if len(texts) != count * len(keys):
        raise DataError(f"{len(keys)} keys came with {len(texts) // count} images")
    rows = (texts[i : i + count] for i in range(0, len(texts), count))
    return [[Candidate(text.strip(), SYNTHETIC, writer) for text in row] for row in rows]


@torch.inference_mode()
def score_records(
    model: BlipForRetrieval,
    tokenizer: BlipTokenizer,
    pixel_values: Tensor,
    candidates: Sequence[Sequence[Candidate]],
    config: CapFiltConfig,
) -> list[list[Score | None]]:
    """The filter's scores of each image's candidate texts; None for a text that says nothing.

    Every image is encoded once, whatever number of texts look at it; its keys and values are
    projected once too, or not at all where few do.

    Args:
        model: the filter, in evaluation mode.
        tokenizer: its vocabulary.
        pixel_values: `(B, 3, image_size, image_size)`, on the model's device.
        candidates: `B` lists of texts.
        config: token limit.
    """
    if len(candidates) != pixel_values.shape[0]:
        raise DataError(
            f"{pixel_values.shape[0]} images came with {len(candidates)} lists of texts"
        )
    scores: list[list[Score | None]] = [[None] * len(texts) for texts in candidates]
    wanted = [
        (i, j, candidate.text)
        for i, texts in enumerate(candidates)
        for j, candidate in enumerate(texts)
        if says_something(candidate.text)
    ]
    if not wanted:
        return scores
    batch = tokenizer([text for *_, text in wanted], max_length=config.max_text_tokens)
    device = pixel_values.device
    text = PackedText.from_padded(batch.input_ids.to(device), batch.attention_mask.to(device))
    images = [i for i, *_ in wanted]
    embeds = model.encode_image(pixel_values)
    logits = model.match(text, model.image_states(embeds), images)
    itm = logits.float().softmax(-1)[:, 1]
    itc = (model.image_features(embeds)[images] * model.text_features(text)).float().sum(-1)
    for (i, j, _), p, similarity in zip(wanted, itm.tolist(), itc.tolist(), strict=True):
        scores[i][j] = Score(p, similarity)
    return scores

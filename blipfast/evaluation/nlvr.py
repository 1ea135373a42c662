"""NLVR2 (section 5.4): does a sentence hold for a pair of images? Accuracy and consistency."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blipfast.data import BlipTokenizer, pre_caption
from blipfast.tasks.nlvr import BlipForNLVR


@torch.inference_mode()
def judge_pairs(
    model: BlipForNLVR, tokenizer: BlipTokenizer, pixel_values: Tensor, sentences: Sequence[str]
) -> list[bool]:
    """Whether each sentence is judged true of its pair, `pixel_values (B, 2, 3, size, size)`.

    The images stay on their sides: the original swaps them at random in evaluation too.
    """
    cleaned = [pre_caption(sentence, 40) for sentence in sentences]
    tokens = tokenizer(cleaned, max_length=64, kind="raw").to(pixel_values.device)
    logits = model(pixel_values, tokens.input_ids, tokens.attention_mask).logits
    return logits.argmax(1).bool().tolist()


def nlvr_metrics(
    judged: Sequence[bool], labels: Sequence[int], sentences: Sequence[str]
) -> dict[str, float]:
    """Accuracy, and the share of sentences judged rightly for all of their pairs, in percent."""
    right = [bool(label) == one for one, label in zip(judged, labels, strict=True)]
    whole: dict[str, bool] = {}
    for sentence, one in zip(sentences, right, strict=True):
        whole[sentence] = whole.get(sentence, True) and one
    return {
        "accuracy": 100 * sum(right) / max(1, len(right)),
        "consistency": 100 * sum(whole.values()) / max(1, len(whole)),
    }

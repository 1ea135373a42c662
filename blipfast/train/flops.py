"""How much arithmetic a training step is, by formula, and what the hardware could do.

A multiplication and an addition are two FLOPs. Only the model's own arithmetic counts: neither what
gradient checkpointing nor what micro-batches compute again, as is usual for MFU.
"""

from __future__ import annotations

import time
from functools import cache

import torch

from blipfast.models.config import BlipConfig, TextConfig, VisionConfig
from blipfast.ops.linear_layers import linear
from blipfast.train.config import ObjectiveConfig, TaskName

# FLOP/s of dense matrix products by the makers' data sheets: (bf16, fp32 as TF32 off).
_CARDS = {
    "H200": (989e12, 67e12), "H100 PCIe": (756e12, 51e12), "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12), "B200": (2250e12, 80e12), "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12), "A10": (125e12, 31.2e12), "L4": (121e12, 30.3e12),
    "V100": (125e12, 15.7e12), "RTX 4090": (165e12, 82.6e12), "MI300X": (1307e12, 163e12),
}  # fmt: skip


def image_flops(config: VisionConfig, *, first_only: bool = False) -> float:
    """One forward pass of an image. first_only: the last block gives the CLS token alone."""
    tokens, width = config.num_tokens, config.hidden_size
    hidden = int(width * config.mlp_ratio)
    patch = 2 * (tokens - 1) * 3 * config.patch_size**2 * width

    def block(queries: int) -> float:
        projections = 2 * width * width * (2 * tokens + 2 * queries)
        return projections + 4 * queries * tokens * width + 4 * queries * width * hidden

    last = block(1 if first_only else tokens)
    return patch + (config.num_layers - 1) * block(tokens) + last


def text_flops(
    config: TextConfig, length: float, image_tokens: int = 0, *, first_only: bool = False
) -> float:
    """One forward pass of a text of `length` tokens, which looks at an image of `image_tokens`.

    The image's keys and values are not counted: `key_value_flops`.
    """
    width = config.hidden_size

    def layer(queries: float) -> float:
        own = 8 * length * width * width + 4 * length * length * width
        cross = 4 * queries * width * width + 4 * queries * image_tokens * width
        return own + (cross if image_tokens else 0) + 4 * queries * width * config.intermediate_size

    last = layer(1 if first_only else length)
    return (config.num_layers - 1) * layer(length) + last


def key_value_flops(config: BlipConfig, tokens: int) -> float:
    """Keys and values of `tokens` image tokens, for all layers of the text transformer."""
    text = config.text
    return text.num_layers * 4 * tokens * config.vision.hidden_size * text.hidden_size


def head_flops(config: TextConfig, tokens: float) -> float:
    """The prediction head over `tokens` tokens."""
    return 2 * tokens * config.hidden_size * (config.hidden_size + config.vocab_size)


def sample_flops(
    config: BlipConfig,
    task: TaskName,
    objective: ObjectiveConfig,
    *,
    length: float = 14.0,
    batch: int = 1,
    answer_length: float = 3.0,
    answers: float = 2.0,
) -> float:
    """FLOPs of a training step for one sample, forward and backward.

    length: mean tokens of a text, special ones included. batch: samples of all ranks, which ITC
    compares. answer_length, answers: of a question of VQA.
    """
    vision, text = config.vision, config.text
    tokens = vision.num_tokens
    image = image_flops(vision)
    states = key_value_flops(config, tokens)
    if task in ("pretrain", "retrieval"):
        alone = text_flops(text, length, first_only=True)
        grounded = 3 * text_flops(text, length, tokens, first_only=True)
        student = image + alone + states + grounded
        if task == "pretrain":
            student += text_flops(text, length - 1, tokens) + head_flops(text, length - 1)
        twin = image_flops(vision, first_only=True) + alone
        keys = batch + objective.queue_size
        compared = 4 * 2 * keys * config.embed_dim  # student and twin, both directions
        return 3 * student + twin + compared + 2 * 2 * keys * config.embed_dim
    if task == "caption":
        student = image + states + text_flops(text, length - 1, tokens)
        return 3 * (student + head_flops(text, length - 1))
    if task == "vqa":
        question = text_flops(text, length, tokens)
        answer = text_flops(text, answer_length - 1, int(length))
        answer += head_flops(text, answer_length - 1)
        seen = text.num_layers * 4 * length * text.hidden_size**2
        return 3 * (image + states + question + seen + answers * answer)
    if task == "nlvr":
        both = 2 * (image + states) + 2 * text_flops(text, length, tokens, first_only=True)
        return 3 * (both - text_flops(text, length, first_only=True))
    dialogue = text_flops(text, 6 * length, tokens + int(length), first_only=True)
    caption = text_flops(text, length)
    return 3 * (image + caption + key_value_flops(config, tokens + int(length)) + 2 * dialogue)


@cache
def peak_flops(device: torch.device, low_precision: bool) -> float | None:
    """FLOP/s of one card by its name, of the CPU by a short measurement; None if unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = next((peaks for card, peaks in _CARDS.items() if card in name), None)
        return None if found is None else found[0 if low_precision else 1]
    dtype = torch.bfloat16 if low_precision else torch.float32
    a, b = (torch.ones(1536, 1536, dtype=dtype) for _ in range(2))
    best = min(_timed(a, b) for _ in range(5))
    return 2 * 1536**3 / best


def _timed(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    linear(a, b)
    return time.perf_counter() - start

"""Peak memory of a training step, predicted from small steps of the real model.

What autograd keeps is counted in forward passes of a few samples, which gives its size for any
batch; all else follows from the number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blipfast.models.blip import Blip
from blipfast.models.config import BlipConfig
from blipfast.train.config import FitConfig, TaskName, TrainConfig
from blipfast.train.engine import Batch, StepFn

_FEW, _MORE = 2, 4  # samples of the counted passes
_UNFIT = 0.75  # measured with glibc: share of the gradients that needs fresh memory
_IN_FLIGHT = 3  # tensors of the largest kept size that the backward pass has in its hands


@dataclass
class Kept:
    """Bytes that autograd keeps of one forward pass: of the image encoder, of all else, and the
    largest single tensor."""

    image: int = 0
    rest: int = 0
    largest: int = 0


@dataclass(frozen=True)
class Prediction:
    """Bytes by part, and at the peak of a step from the second on.

    parts: `weights`, `momentum twin`, `queue`, `optimiser`, `gradients`, `activations`, `in flight`
    and, of FSDP, `gathered`.
    """

    parts: dict[str, int] = field(default_factory=dict)
    peak: int = 0


def predict_memory(
    config: TrainConfig, model: Blip, step: StepFn, *, length: int, world_size: int = 1,
    device: str = "cpu",
) -> Prediction:  # fmt: skip
    """What one rank needs for a step of `config`, on top of the program itself.

    model: on the CPU, as the run builds it. step: the recipe's, without micro-batches. length: mean
    tokens of a text. device: kind of device that the run is for.
    """
    fit, batch = config.fit, config.data.batch_size
    at_once = min(batch, fit.micro_batch or batch)
    sizes = (min(_FEW, at_once), min(_MORE, at_once))
    counted = [_count(config, model, step, size, length) for size in sizes]
    image = _extrapolated([kept.image for kept in counted], sizes, at_once)
    rest = _extrapolated([kept.rest for kept in counted], sizes, at_once)
    largest = _extrapolated([kept.largest for kept in counted], sizes, at_once)
    if fit.grad_checkpointing:  # one block is computed again while its gradients are formed
        largest += _one_layer(model.config, at_once)
    if fit.micro_batch is not None and fit.micro_batch < batch:
        vision = model.config.vision
        rest += 2 * 4 * batch * vision.num_tokens * vision.hidden_size  # embeddings, gradients
    return _summed(model, fit, image, rest, _IN_FLIGHT * largest, world_size, device)


def _summed(
    model: nn.Module, fit: FitConfig, image: int, rest: int, in_flight: int, world_size: int,
    device: str,
) -> Prediction:  # fmt: skip
    twin = getattr(model, "twin", None)
    own = {id(p): p for p in model.parameters() if p.requires_grad}.values()
    trained = 4 * sum(p.numel() for p in own)
    encoder: Any = model.visual_encoder
    of_images = 4 * sum(p.numel() for p in encoder.parameters())
    moved = 4 * sum(p.numel() for p in twin.parameters()) if twin is not None else 0
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    shares = world_size if fit.parallel == "fsdp" else 1
    parts = {
        "weights": trained // shares,
        "momentum twin": moved // shares,
        "queue and buffers": buffers,
        "optimiser": 2 * trained // shares,
        "gradients": trained // shares,
        "activations": image + rest,
        "in flight": in_flight,
    }
    if fit.parallel == "fsdp":  # what is not an image block stays whole for the step
        low = 2 if fit.precision == "pure_bf16" else 4
        parts["gathered"] = (trained + moved - 2 * of_images) // 4 * low
    lasting = sum(parts[n] for n in ("weights", "momentum twin", "queue and buffers", "optimiser"))
    lasting += parts.get("gathered", 0)
    reduced_early = world_size > 1 and fit.parallel == "ddp"  # DDP's buckets lie there all the time
    gradients, text = parts["gradients"], (trained - of_images) // shares
    phases = (
        image + rest + in_flight + (gradients if reduced_early else 0),
        image + in_flight + (gradients if reduced_early else text),
        gradients + in_flight,
    )
    if device == "cpu":  # the heap's holes, which activations leave, take only some gradients
        return Prediction(parts, lasting + image + rest + in_flight + int(_UNFIT * gradients))
    return Prediction(parts, lasting + max(phases))


def _count(config: TrainConfig, model: Blip, step: StepFn, size: int, length: int) -> Kept:
    """Runs a forward pass of `size` samples and counts what autograd keeps of it."""
    batch = synthetic_batch(config.task, model.config, size, length)
    bf16 = config.fit.precision != "fp32"
    training, buffers = model.training, [b.clone() for b in model.buffers()]
    model.train()
    with _counting(model) as kept, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        output: Any = step(model, batch, 0, 0.0)
    assert output.loss.requires_grad  # the graph, and with it what it keeps, lives until here
    model.train(training)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return kept


@contextmanager
def _counting(model: nn.Module) -> Iterator[Kept]:
    kept, seen, inside = Kept(), set[int](), [False]
    alive: list[Tensor] = []  # so that no storage takes the place of one that was counted
    lasting = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def pack(tensor: Tensor) -> None:  # nothing: no backward pass will ask for it
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in seen and place not in lasting:
            seen.add(place)
            alive.append(tensor.detach())
            kept.largest = max(kept.largest, size)
            if inside[0]:
                kept.image += size
            else:
                kept.rest += size

    encoder: Any = model.visual_encoder
    hooks = [
        encoder.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)),
        encoder.register_forward_hook(lambda *_: inside.__setitem__(0, False)),
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _extrapolated(values: list[int], sizes: tuple[int, int], target: int) -> int:
    """The line through what was counted for two sizes."""
    if sizes[0] == sizes[1]:
        return values[0]
    slope = (values[1] - values[0]) / (sizes[1] - sizes[0])
    return max(0, math.ceil(values[0] + slope * (target - sizes[0])))


def _one_layer(config: BlipConfig, images: int) -> int:
    """What one block of the image encoder keeps while it is computed again, in float32."""
    vision = config.vision
    return images * vision.num_tokens * vision.hidden_size * 4 * int(9 + 2 * vision.mlp_ratio)


def synthetic_batch(task: TaskName, config: BlipConfig, size: int, length: int) -> Batch:
    """A batch as the loader makes it, of noise, with texts of `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    side, words = config.vision.image_size, config.text.vocab_size

    def texts(count: int, tokens: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(words // 2, words - 2, (count, tokens), generator=generator)
        return ids, torch.ones_like(ids)

    shape = (size, 2, 3, side, side) if task == "nlvr" else (size, 3, side, side)
    ids, mask = texts(size, length)
    batch: Batch = {
        "pixel_values": torch.randn(shape, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "image_ids": torch.arange(size),
        "keys": [str(n) for n in range(size)],
    }
    if task == "nlvr":
        batch["labels"] = torch.arange(size) % 2
    elif task == "vqa":
        batch["answer_ids"], batch["answer_mask"] = texts(2 * size, 4)
        batch |= {"answers_per_question": [2] * size, "weights": torch.ones(2 * size)}
    elif task == "visdial":
        tokens = min(6 * length, config.text.max_positions)
        batch["dialogue_ids"], batch["dialogue_mask"] = texts(2 * size, tokens)
        batch["image_index"] = torch.arange(size).repeat_interleave(2)
        batch["labels"] = torch.tensor([1, 0] * size)
    return batch

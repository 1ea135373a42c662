"""A step of contrastive training that fits a small card, with the gradients of the whole batch.

Gradients of features are cached (Gao et al. 2021): the batch is encoded part by part without a
graph, ITC and the drawing of negatives see all of it, ITM and LM go part by part against the image
embeddings that are kept, and each part is encoded once more to carry the gradients on to the
weights. It costs one further forward pass of the encoders and keeps, of the whole batch, no more
than `image_embeds`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from blipfast.models.blip import PackedText
from blipfast.objectives.itc import clamp_temperature_
from blipfast.objectives.itm import itm_loss
from blipfast.tasks.contrastive import Contrast, ContrastiveBlip, Surroundings, check_batch
from blipfast.tasks.pretrain import BlipForPretraining, PretrainOutput
from blipfast.tasks.retrieval import BlipForRetrieval, RetrievalOutput

Output = TypeVar("Output", PretrainOutput, RetrievalOutput)

# What a step in parts calls in place of the model's `forward`: whoever gathers parameters for that,
# as FSDP does, must do so for these.
METHODS = ("encode_image", "image_features", "text_features", "twin_features", "ground")


def backward_in_parts(
    model: BlipForPretraining | BlipForRetrieval,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    micro_batch: int,
    **contrast_options: Any,
) -> PretrainOutput | RetrievalOutput:
    """One step, forward and backward: adds to the parameters' gradients what the whole batch gives.

    micro_batch: images and texts that are encoded with a graph at a time. The other arguments are
    those of the model's `forward`, which this replaces; the state is always updated.

    Returns the losses without a graph. Raises ShapeError as `forward`.
    """
    text = PackedText.from_padded(input_ids, attention_mask)
    check_batch(pixel_values, text)
    parts = [
        range(start, min(start + micro_batch, len(input_ids)))
        for start in range(0, len(input_ids), micro_batch)
    ]
    clamp_temperature_(model.temp)
    if model.moves_twin:
        model.move_twin()
    states, embeds, text_feat = [], [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(pixel_values.device))
            encoded = _encode(model, pixel_values, text, part)
            embeds.append(encoded[0])
            text_feat.append(encoded[1])
        twin = [
            model.twin_features(pixel_values[part.start : part.stop], text.select(part))
            for part in parts
        ]
    image_embeds = torch.cat(embeds).requires_grad_()
    text_features = torch.cat(text_feat).requires_grad_()
    del embeds, text_feat
    options = {"image_ids": None, "negatives": None, "seed": 0, **contrast_options}
    contrast = model.contrast(
        (model.image_features(image_embeds), text_features),
        (torch.cat([image for image, _ in twin]), torch.cat([words for _, words in twin])),
        update_state=True,
        **options,
    )
    _backward(contrast.loss_itc)
    output = _ground(model, image_embeds, input_ids, attention_mask, contrast, text, parts)
    for part, state in zip(parts, states, strict=True):
        rows = slice(part.start, part.stop)
        with _repeated(state, pixel_values.device):
            encoded = _encode(model, pixel_values, text, part)
        cached = [image_embeds.grad[rows], text_features.grad[rows]]  # type: ignore[index]
        with _without_autocast(pixel_values.device):
            torch.autograd.backward(list(encoded), cached)
    return output


def _encode(
    model: ContrastiveBlip, pixel_values: Tensor, text: PackedText, part: range
) -> tuple[Tensor, Tensor]:
    embeds = model.encode_image(pixel_values[part.start : part.stop])
    return embeds, model.text_features(text.select(part))


def _ground(
    model: BlipForPretraining | BlipForRetrieval,
    image_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    contrast: Contrast,
    text: PackedText,
    parts: list[range],
) -> PretrainOutput | RetrievalOutput:
    """ITM and LM part by part; their gradients gather in `image_embeds.grad`."""
    fetched = model.surroundings(image_embeds, input_ids, attention_mask, contrast, text)
    kept = fetched.image_embeds.detach().requires_grad_()
    around = Surroundings(kept, fetched.image_places, fetched.text, fetched.drawn_texts)
    logits, losses_itm, losses_lm = [], [], []
    for part in parts:
        if isinstance(model, BlipForPretraining):
            part_logits, loss_lm = model.ground(around, part)
            losses_lm.append(loss_lm)
        else:
            part_logits = model.ground(around, part)
        losses_itm.append(itm_loss(part_logits, contrast.negatives, part))
        _backward(sum([losses_itm[-1], *losses_lm[-1:]], start=part_logits.new_zeros(())))
        logits.append(part_logits.detach().unflatten(0, (3, -1)))
    assert kept.grad is not None
    torch.autograd.backward(fetched.image_embeds, kept.grad)
    itm_logits = torch.cat(logits, dim=1).flatten(0, 1)
    itc, itm = contrast.loss_itc.detach(), torch.stack(losses_itm).detach().sum()
    if not losses_lm:
        return RetrievalOutput(itc, itm, itm_logits, contrast.negatives)
    lm = torch.stack(losses_lm).detach().sum()
    return PretrainOutput(itc, itm, lm, itm_logits, contrast.negatives)


def _without_autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, enabled=False)


def _backward(loss: Tensor) -> None:
    with _without_autocast(loss.device):
        loss.backward()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


@contextmanager
def _repeated(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Dropout draws again what it drew at `state`; afterwards the generator goes on as before."""
    devices = [device] if state[1] is not None else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield

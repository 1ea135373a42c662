"""Where in an image each token of a text looks: the cross-attention of one layer, as a map.

The fused operators keep no probabilities, so one layer's are computed again from the formula, in an
ordinary pass. Weighed by the gradient of the matching score they show what speaks for a match
(Grad-CAM, as the authors of ALBEF and BLIP draw it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from blipfast.errors import ConfigError, ShapeError
from blipfast.models.blip import Blip, PackedText
from blipfast.models.streams import run_streams
from blipfast.models.text import CrossAttention, TextLayer


@dataclass(frozen=True)
class TokenMaps:
    """Of one text and one image, for its `T` tokens and the image's `S` (the first is CLS).

    probs: `(H, T, S)`, each row a distribution. maps: `(T, S)`, their mean over heads, weighed by
    the gradient where it was asked for. itm: probability of a match.
    """

    probs: Tensor
    maps: Tensor
    itm: float


def token_maps(
    model: Blip,
    image_embeds: Tensor,
    text: PackedText,
    *,
    layer: int | None = None,
    by_gradient: bool = True,
) -> TokenMaps:
    """One layer's cross-attention while the image-grounded encoder reads a text.

    image_embeds: `(1, S, D)`. text: a single one. layer: counted from 0; by default two thirds up,
    7 of 12 as the authors use. by_gradient: weighed by the gradient of the matching logit, where
    that is positive.
    Raises ShapeError for more than one image or text, ConfigError for a layer that is not there.
    """
    layers = model.encoder.layers
    number = max(0, 2 * len(layers) // 3 - 1) if layer is None else layer
    if not 0 <= number < len(layers):
        raise ConfigError(f"layer {layer}: the text encoder has layers 0 to {len(layers) - 1}")
    if image_embeds.shape[0] != 1 or text.packing.num_sequences != 1:
        raise ShapeError(
            f"maps are of one image and one text, got {image_embeds.shape[0]} and "
            f"{text.packing.num_sequences}"
        )
    layer_module = cast(TextLayer, layers[number])
    attention = cast(CrossAttention, layer_module.cross_attention).attention
    kept: list[Tensor] = []

    def from_formula(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        hidden, embeds, _, kv = inputs
        k, v = module.project(embeds) if kv is None else kv  # type: ignore[operator]
        q = module.query(hidden).unflatten(-1, (module.num_heads, -1))  # type: ignore[operator]
        scores = torch.einsum("qhd,hkd->hqk", q, k[0]) / math.sqrt(q.shape[-1])
        probs = scores.softmax(-1)
        kept.append(probs)
        return torch.einsum("hqk,hkd->qhd", probs, v[0]).flatten(1)

    handle = attention.register_forward_hook(from_formula)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            embeds = image_embeds.detach().clone().requires_grad_(by_gradient)
            stream = model.grounded_stream(text, [0])
            hidden = run_streams([stream], model.image_states(embeds))[0]
            logits = model.itm_head(hidden[:1])[0]
            (probs,) = kept
            maps = probs
            if by_gradient:
                (gradient,) = torch.autograd.grad(logits[1], probs)
                maps = probs * gradient.clamp(min=0)
    finally:
        handle.remove()
        model.train(was_training)
    itm = logits.detach().double().softmax(-1)[1].item()
    return TokenMaps(probs.detach(), maps.detach().mean(0), itm)

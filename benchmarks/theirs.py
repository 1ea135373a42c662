"""transformers' current BLIP classes with the weights of ours, to be timed beside them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor, nn

from blipfast.checkpoints import save_hf
from blipfast.models.blip import Blip

_Hf = TypeVar("_Hf", bound=nn.Module)


def twin_of(model: Blip, hf_class: type[_Hf]) -> _Hf:
    """`hf_class` with the weights of `model`, written and read as any user would."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save_hf(model, directory)
        return hf_class.from_pretrained(directory).eval()  # type: ignore[attr-defined]


@torch.no_grad()
def match_logits(
    model: transformers.BlipForImageTextRetrieval, embeds: Tensor, ids: Tensor, mask: Tensor
) -> Tensor:
    """ITM logits `(N, 2)` of N texts with one encoded image `(1, S, D)`."""
    count, tokens = len(ids), embeds.shape[1]
    hidden = model.text_encoder(
        input_ids=ids,
        attention_mask=mask,
        encoder_hidden_states=embeds.expand(count, -1, -1),
        encoder_attention_mask=mask.new_ones(count, tokens),
    )[0]
    return model.itm_head(hidden[:, 0])


@torch.no_grad()
def caption_ids(
    model: transformers.BlipForConditionalGeneration, embeds: Tensor, prompt: Tensor
) -> Tensor:
    """Beam-3 captions of at most 20 tokens, of encoded images `(B, S, D)`."""
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return model.text_decoder.generate(
        input_ids=prompt.expand(len(embeds), -1),
        eos_token_id=102,
        pad_token_id=0,
        encoder_hidden_states=embeds,
        encoder_attention_mask=mask,
        max_length=20,
        min_length=5,
        num_beams=3,
    )

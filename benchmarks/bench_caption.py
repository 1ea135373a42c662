"""Captioning: four images (on a GPU 32) at 384 px, beam 3, at most 20 tokens.

The baseline is transformers' `generate` on the same weights; the ids must be equal. "text side"
starts from encoded images, "whole" from pixels. [SEP] is made unlikely, so that no caption ends
early.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration

from benchmarks import theirs, workloads
from blipfast.models.config import blip_config
from blipfast.tasks.caption import BlipForCaptioning

IMAGES, ROUNDS = workloads.sized((4, 3), (32, 5))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = torch.tensor([30_522, 1_037, 3_861, 1_997])  # [DEC] a picture of


@pytest.fixture(scope="module", params=DTYPES)
def setting(request: pytest.FixtureRequest) -> dict[str, Any]:
    torch.manual_seed(0)
    ours = BlipForCaptioning(blip_config("blip_base", image_size=384)).eval()
    with torch.no_grad():
        ours.lm_head.decoder.bias[102] = -20.0
    hf = theirs.twin_of(ours, BlipForConditionalGeneration)
    dtype = DTYPES[request.param]
    ours, hf = ours.to(dtype), hf.to(workloads.DEVICE, dtype)
    pixels, prompt = workloads.placed(ours, workloads.images(IMAGES, 384).to(dtype), PROMPT)
    with torch.no_grad():
        embeds = ours.encode_image(pixels)

    def blipfast(**images: Tensor) -> Tensor:
        # transformers divides a beam's score by the generated length alone.
        found = ours.generate(**images, prompt_ids=prompt, beam_length="generated")
        return found.sequences

    @torch.no_grad()
    def whole() -> Tensor:
        return theirs.caption_ids(hf, hf.vision_model(pixels)[0], prompt)

    runs: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("text side", "blipfast"): lambda: blipfast(image_embeds=embeds),
        ("text side", "transformers"): lambda: theirs.caption_ids(hf, embeds, prompt),
        ("whole", "blipfast"): lambda: blipfast(pixel_values=pixels),
        ("whole", "transformers"): whole,
    }
    same = [runs["text side", code]() for code in ("blipfast", "transformers")]
    if dtype == torch.float32:
        assert torch.equal(*same)
    equal = (same[0] == same[1]).float().mean().item() if same[0].shape == same[1].shape else 0.0
    return {"dtype": request.param, "runs": runs, "equal_ids": equal}


@pytest.mark.parametrize("code", ["blipfast", "transformers"])
@pytest.mark.parametrize("part", ["text side", "whole"])
def test_caption(benchmark: Any, setting: dict[str, Any], part: str, code: str) -> None:
    benchmark.group = f"captioning, {IMAGES} images, beam 3, {part}, {setting['dtype']}"
    # Two roundings of bf16 may choose differently between near-equal beams.
    benchmark.extra_info.update(code=code, share_of_equal_ids=setting["equal_ids"])
    benchmark.pedantic(
        workloads.finished(setting["runs"][part, code]), rounds=ROUNDS, warmup_rounds=1
    )

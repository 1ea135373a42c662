"""ITM re-ranking: one image at 384 px, encoded before, against 64 texts of natural length (on a
GPU 256, as many as COCO's protocol takes).

The baseline is the text side of transformers' BlipForImageTextRetrieval on the same weights, with
the texts padded to the longest of the batch, and to 35 as the retrieval recipe does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipForImageTextRetrieval

from benchmarks import theirs, workloads
from benchmarks.original import pad_to
from blipfast.models.blip import PackedText
from blipfast.models.config import blip_config
from blipfast.tasks.retrieval import BlipForRetrieval

TEXTS = workloads.sized(64, 256)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = workloads.sized(3, 9)
CODES = ("blipfast", "transformers", "transformers, padded to 35")


@pytest.fixture(scope="module", params=DTYPES)
def setting(request: pytest.FixtureRequest) -> dict[str, Any]:
    torch.manual_seed(0)
    ours = BlipForRetrieval(blip_config("blip_base", image_size=384)).eval()
    hf = theirs.twin_of(ours, BlipForImageTextRetrieval)
    dtype = DTYPES[request.param]
    ids, mask = workloads.captions(TEXTS)
    ids[:, 0] = ours.text_config.enc_token_id
    embeds = torch.randn(1, 577, 768).to(dtype)
    ours, hf = ours.to(dtype), hf.to(workloads.DEVICE, dtype)
    ids, mask, embeds = workloads.placed(ours, ids, mask, embeds)
    text = PackedText.from_padded(ids, mask)
    longer = pad_to(ids, 35), pad_to(mask, 35)

    @torch.no_grad()
    def blipfast() -> Tensor:
        return ours.match(text, ours.image_states(embeds), [0] * TEXTS)

    runs: dict[str, Callable[[], Tensor]] = {
        "blipfast": blipfast,
        "transformers": lambda: theirs.match_logits(hf, embeds, ids, mask),
        "transformers, padded to 35": lambda: theirs.match_logits(hf, embeds, *longer),
    }
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    expected = runs["transformers"]()
    torch.testing.assert_close(blipfast(), expected, atol=tolerance, rtol=tolerance)
    return {"dtype": request.param, "runs": runs}


@pytest.mark.parametrize("code", CODES)
def test_rerank(benchmark: Any, setting: dict[str, Any], code: str) -> None:
    benchmark.group = f"ITM re-ranking, 1 image x {TEXTS} texts, {setting['dtype']}"
    benchmark.extra_info.update(code=code, pairs=TEXTS)
    benchmark.pedantic(workloads.finished(setting["runs"][code]), rounds=ROUNDS, warmup_rounds=1)

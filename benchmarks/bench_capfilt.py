"""CapFilt of decoded images: one sampled caption each, and the scores of it and of a web text:
ITM and ITC of both. The baseline is the straightforward pipeline of transformers' classes on the
same weights, a batch at a time: `generate` with the same settings of nucleus sampling, then for the
web texts and for the captions a call for ITM and one for ITC, each of which encodes the images; or,
a row that gives less than ours, the calls for ITM alone. [SEP] is made likely enough for captions
of unequal length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from benchmarks import theirs, workloads
from blipfast.capfilt import CapFiltConfig
from blipfast.capfilt.work import Models, UnitImages
from blipfast.data.images import normalise
from blipfast.data.text import CLS, MASK, PAD, SEP, UNK, BlipTokenizer
from blipfast.models.config import blip_config
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.retrieval import BlipForRetrieval

IMAGES, BATCH = workloads.sized((16, 8), (128, 32))
SIDE, SEP_ID = 384, 102
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Captions, and for the web texts and for the captions the scores `(2, IMAGES, 2)` by ITM and ITC.
Result = tuple[list[str], torch.Tensor]


def vocabulary() -> BlipTokenizer:
    """As large as BERT's, of made-up words, with its special tokens where BERT has them."""
    pieces = [f"w{n}" for n in range(30_522)]
    pieces[:1], pieces[100:104] = [PAD], [UNK, CLS, SEP, MASK]
    pieces[1037], pieces[3861], pieces[1997] = "a", "picture", "of"
    return BlipTokenizer(pieces)


class Setting:
    """Both pipelines over the same images, web texts and weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = blip_config("blip_base", image_size=SIDE)
        captioner, judge = BlipForCaptioning(config).eval(), BlipForRetrieval(config).eval()
        with torch.no_grad():
            captioner.lm_head.decoder.bias[SEP_ID] = 3.2
            judge.itm_head.weight.mul_(20)
        self.their_captioner = theirs.twin_of(captioner, BlipForConditionalGeneration)
        self.their_filter = theirs.twin_of(judge, BlipForImageTextRetrieval)
        for model in (self.their_captioner, self.their_filter):
            model.to(workloads.DEVICE, dtype)
        self.settings = CapFiltConfig(
            batch_size=BATCH, device=workloads.DEVICE.type, unit=IMAGES,
            precision="fp32" if dtype == torch.float32 else "bf16",
        )  # fmt: skip
        self.tokenizer = vocabulary()
        self.models = Models(self.settings, [captioner], [judge], self.tokenizer)
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
        ids, mask = workloads.captions(IMAGES)
        self.web = [
            self.tokenizer.decode(row[1 : int(length) - 1].tolist())
            for row, length in zip(ids, mask.sum(1), strict=True)
        ]
        self.dtype = dtype

    def blipfast(self) -> Result:
        images = UnitImages(
            [f"image-{i}" for i in range(IMAGES)], {}, [[(text, "web")] for text in self.web],
            list(range(IMAGES)), {SIDE: self.pixels},
        )  # fmt: skip
        rows = self.models.judged(images, self.models.captioned(images))
        scores = [[[*text.itm, *text.itc] for text in row.texts] for row in rows]  # type: ignore[misc]
        return [row.texts[1].text for row in rows], torch.tensor(scores).transpose(0, 1)

    def batch(self, start: int) -> torch.Tensor:
        pixels = torch.from_numpy(self.pixels[start : start + BATCH]).to(workloads.DEVICE)
        return normalise(pixels).to(self.dtype)

    @torch.no_grad()
    def transformers(self, *, itc: bool = True) -> Result:
        captions: list[str] = []
        scores = []
        prompt = self.tokenizer(self.settings.prompt, kind="raw").input_ids
        for start in range(0, IMAGES, BATCH):
            pixels = self.batch(start)
            prompts = prompt.repeat(len(pixels), 1).to(workloads.DEVICE)
            ids = self.their_captioner.generate(
                pixel_values=pixels, input_ids=prompts, do_sample=True, top_p=0.9,
                top_k=50, repetition_penalty=1.1, max_length=20, min_length=5,
            )  # fmt: skip
            rows = [self.tokenizer.decode(row[4:].tolist()) for row in ids]
            captions += rows
            both = (self.web[start : start + BATCH], rows)
            scores.append(torch.stack([self.their_scores(pixels, its, itc) for its in both]))
        return captions, torch.cat(scores, dim=1)

    def their_scores(self, pixels: torch.Tensor, texts: list[str], itc: bool) -> torch.Tensor:
        """`(B, 1)` ITM probabilities, or `(B, 2)` with cosines, of each image with its text."""
        batch = self.tokenizer(texts, max_length=35)
        words, mask = (x.to(workloads.DEVICE) for x in (batch.input_ids, batch.attention_mask))
        ids = words.clone()
        ids[:, 0] = self.tokenizer.enc_token_id
        scores = [self.their_filter(ids, pixels, attention_mask=mask).itm_score.softmax(-1)[:, 1]]
        if itc:
            found = self.their_filter(words, pixels, attention_mask=mask, use_itm_head=False)
            scores.append(found.itm_score.diagonal())
        return torch.stack(scores, dim=1).float().cpu()

    @torch.no_grad()
    def check(self) -> None:
        """The same scores of the same texts, whose lengths differ."""
        captions, scores = self.blipfast()
        assert len({len(text.split()) for text in captions}) > 3, "captions of one length"
        pixels = self.batch(0)
        atol = 1e-4 if self.dtype == torch.float32 else 0.05
        for ours, texts in zip(scores, (self.web, captions), strict=True):
            expected = self.their_scores(pixels, texts[:BATCH], itc=True)
            torch.testing.assert_close(ours[:BATCH], expected, atol=atol, rtol=0)


@pytest.fixture(scope="module", params=DTYPES)
def setting(request: pytest.FixtureRequest) -> tuple[str, Setting]:
    made = Setting(DTYPES[request.param])
    made.check()
    return request.param, made


@pytest.mark.parametrize("code", ["blipfast", "transformers", "transformers, ITM alone"])
def test_capfilt(benchmark: Any, setting: tuple[str, Setting], code: str) -> None:
    dtype, made = setting
    runs: dict[str, Callable[[], Result]] = {
        "blipfast": made.blipfast,
        "transformers": made.transformers,
        "transformers, ITM alone": lambda: made.transformers(itc=False),
    }
    benchmark.group = f"CapFilt, {IMAGES} images, 1 caption and the scores of 2 texts each, {dtype}"
    benchmark.extra_info.update(code=code, images=IMAGES)
    benchmark.pedantic(workloads.finished(runs[code]), rounds=3, warmup_rounds=0)

"""From images to caption strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from blipfast.generation.api import Generation


class Captioner(Protocol):
    """A `BlipForCaptioning`, or what generates as it does."""

    @property
    def text_config(self) -> Any: ...

    def generate(
        self,
        pixel_values: Tensor | None = None,
        *,
        image_embeds: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        **options: Any,
    ) -> Generation: ...

    def generate_stream(
        self,
        images: Iterable[Tensor],
        *,
        prompt_ids: Tensor | None = None,
        in_flight: int,
        **options: Any,
    ) -> Generation: ...


class CaptionTokenizer(Protocol):
    """A `BlipTokenizer`, or what reads and writes text as it does."""

    def __call__(self, texts: str, *, kind: Any, allow_empty: bool) -> Any: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def caption_images(
    model: Captioner,
    tokenizer: CaptionTokenizer,
    pixel_values: Tensor | None = None,
    *,
    image_embeds: Tensor | None = None,
    prompt: str = "a picture of ",
    **options: Any,
) -> list[str]:
    """A caption (or `num_return_sequences`) for each image, without the prompt (BLIP, section 5.2).

    Give `pixel_values (B, 3, size, size)` or `image_embeds (B, S, D)`. options: see `generate`.
    The prompt is cut off by its number of tokens, so that a caption is whole whatever it spells.
    """
    generated = model.generate(
        pixel_values, image_embeds=image_embeds, prompt_ids=_ids(tokenizer, prompt), **options
    )
    return _texts(model, tokenizer, generated)


def caption_stream(
    model: Captioner,
    tokenizer: CaptionTokenizer,
    pixel_values: Iterable[Tensor],
    *,
    prompt: str = "a picture of ",
    in_flight: int,
    **options: Any,
) -> list[str]:
    """`caption_images` for batches of images, which are taken as there is room (continuous
    batching): sampled, or greedy. options: see `generate_stream`.
    """
    generated = model.generate_stream(
        pixel_values, prompt_ids=_ids(tokenizer, prompt), in_flight=in_flight, **options
    )
    return _texts(model, tokenizer, generated)


def _ids(tokenizer: CaptionTokenizer, prompt: str) -> Tensor:
    return tokenizer(prompt, kind="raw", allow_empty=True).input_ids[0][:-1]


def _texts(model: Captioner, tokenizer: CaptionTokenizer, generated: Generation) -> list[str]:
    rows = generated.new_tokens(sep_token_id=model.text_config.sep_token_id)
    return [tokenizer.decode(row) for row in rows]

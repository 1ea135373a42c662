"""What the page can do, without the page: models, limits, and answers in plain values."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blipfast.checkpoints import load_model
from blipfast.data import BlipTokenizer, EvalTransform, load_image, load_tokenizer
from blipfast.errors import ConfigError, DataError
from blipfast.generation import caption_images
from blipfast.models.blip import PackedText
from blipfast.serve.folder import FolderIndex, Found, find_images
from blipfast.serve.words import draw_map, word_maps
from blipfast.train.config import described
from blipfast.train.recipes import pick_device

_MAX_WORDS, _MAX_TEXTS, _KEPT_IMAGES = 60, 32, 8


@dataclass(frozen=True)
class ServeConfig:
    """What is served, to whom, and within which limits. Raises ConfigError."""

    caption: str | None = described(None, "checkpoint that writes captions")
    vqa: str | None = described(None, "checkpoint that answers questions")
    retrieval: str | None = described(None, "checkpoint that scores texts and searches")
    folder: str | None = described(None, "pictures to search")
    index: str | None = described(None, "file that keeps the folder's features")
    vocabulary: str | None = described(None, "vocab.txt; by default the one beside each checkpoint")
    image_size: int | None = described(None, "side of the images; by default each checkpoint's")
    device: str = described("auto", "cpu, cuda or auto")
    host: str = described("127.0.0.1", "address to listen at; 0.0.0.0 lets others on the net in")
    port: int = described(7860, "port; 0 takes a free one")
    max_upload_mb: float = described(20.0, "largest file that is taken, in MB")
    max_pixels: int = described(50_000_000, "largest image that is decoded, width times height")

    def __post_init__(self) -> None:
        if not (self.caption or self.vqa or self.retrieval):
            raise ConfigError(
                "nothing to serve: name at least one checkpoint by --caption, --vqa or --retrieval"
            )
        if self.folder and not self.retrieval:
            raise ConfigError("searching a folder needs --retrieval, a checkpoint of that task")
        if self.max_upload_mb <= 0 or self.max_pixels < 1 or not 0 <= self.port < 65_536:
            raise ConfigError(
                "max_upload_mb and max_pixels must be above 0, and port from 0 to 65535"
            )


class Studio:
    """The models of a page. One request at a time uses them; errors are DataErrors, in words."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[Any, BlipTokenizer]] = {}
        for task, source in (
            ("caption", config.caption), ("vqa", config.vqa), ("retrieval", config.retrieval),
        ):  # fmt: skip
            if source is not None:
                model = load_model(source, task, image_size=config.image_size, device=self.device)
                self._loaded[task] = model.eval(), load_tokenizer(config.vocabulary, source)
        self._encoded: dict[tuple[Any, ...], Tensor] = {}  # the newest last
        self.index: FolderIndex | None = None
        if config.folder is not None:
            self.index = FolderIndex.build(
                find_images([config.folder]),
                self._loaded["retrieval"][0],
                file=None if config.index is None else Path(config.index),
            )

    @property
    def tasks(self) -> list[str]:
        """Of caption, vqa and retrieval, those that are there."""
        return list(self._loaded)

    def captions(self, path: str | None, samples: int, seed: int) -> tuple[str, list[str]]:
        """The caption of beam search, and sampled ones."""
        model, tokenizer = self._loaded["caption"]
        with self._lock:
            embeds = self._embeds(path, "caption")
            (best,) = caption_images(model, tokenizer, image_embeds=embeds)
            sampled = caption_images(
                model, tokenizer, image_embeds=embeds, method="nucleus",
                num_return_sequences=samples, seed=seed, image_ids=[0],
            )  # fmt: skip
        return best, sampled

    def answer(self, path: str | None, question: str) -> str:
        """An answer in free form."""
        model, tokenizer = self._loaded["vqa"]
        text = _text(question, "a question")
        batch = tokenizer([text], max_length=35, kind="question").to(self.device)
        with self._lock, torch.inference_mode():
            found = model.generate(
                None, batch.input_ids, batch.attention_mask, image_embeds=self._embeds(path, "vqa")
            )
        (answer,) = found.new_tokens(sep_token_id=tokenizer.sep_token_id)
        return tokenizer.decode(answer)

    def scores(self, path: str | None, lines: str) -> list[tuple[str, float, float]]:
        """Each text with its ITM probability and cosine, the best first."""
        model, tokenizer = self._loaded["retrieval"]
        texts = [_text(line, "a text") for line in lines.splitlines() if line.strip()]
        if not texts:
            raise DataError("write at least one text, a line each")
        if len(texts) > _MAX_TEXTS:
            raise DataError(f"{len(texts)} texts are more than the {_MAX_TEXTS} scored at a time")
        batch = tokenizer(texts, max_length=35).to(self.device)
        packed = PackedText.from_padded(batch.input_ids, batch.attention_mask)
        with self._lock, torch.inference_mode():
            embeds = self._embeds(path, "retrieval")
            logits = model.match(packed, model.image_states(embeds), [0] * len(texts)).float()
            cosines = (model.text_features(packed) @ model.image_features(embeds)[0]).float()
        rows = zip(texts, logits.softmax(-1)[:, 1].tolist(), cosines.tolist(), strict=True)
        return sorted(rows, key=lambda row: -row[1])

    def words(self, path: str | None, text: str) -> list[tuple[Image.Image, str]]:
        """For each word of a text the image with where it looks."""
        model, tokenizer = self._loaded["retrieval"]
        text = _text(text, "a text")
        image = self._image(path)
        with self._lock:
            maps = word_maps(model, tokenizer, self._embeds(path, "retrieval", image), text)
        return [(draw_map(image, weights), word) for word, weights in maps]

    def search(self, text: str, count: int) -> list[Found]:
        """The folder's best pictures for a text."""
        if self.index is None:
            raise DataError("no folder is searched here: start with --folder")
        model, tokenizer = self._loaded["retrieval"]
        with self._lock:
            (found,) = self.index.search(model, tokenizer, [_text(text, "a text")], count=count)
        return found

    def _embeds(self, path: str | None, task: str, image: Image.Image | None = None) -> Tensor:
        """An image as a task's model encodes it, `(1, S, D)`; the last ones are kept, since one
        asks several things about a picture. image: the file's, if it is there already."""
        key = (task, path, _version(path))
        embeds = self._encoded.pop(key, None)
        if embeds is None:
            model = self._loaded[task][0]
            image = self._image(path) if image is None else image
            pixels = EvalTransform(model.config.vision.image_size)(image)[None].to(self.device)
            # No inference tensor: a map of words takes a gradient through it.
            with torch.inference_mode(False), torch.no_grad():
                embeds = model.encode_image(pixels)
        self._encoded[key] = embeds
        while len(self._encoded) > _KEPT_IMAGES:
            self._encoded.pop(next(iter(self._encoded)))
        return embeds

    def _image(self, path: str | None) -> Image.Image:
        if not path:
            raise DataError("choose an image first")
        return load_image(
            path, "the image", max_pixels=self.config.max_pixels, apply_orientation=True
        )


def _version(path: str | None) -> tuple[int, int] | None:
    """What changes when a file does; None where there is none."""
    if not path or not os.path.exists(path):
        return None
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns


def _text(text: str, what: str) -> str:
    text = (text or "").strip()
    if not text:
        raise DataError(f"write {what} first")
    if len(text.split()) > _MAX_WORDS:
        raise DataError(f"{what} may have up to {_MAX_WORDS} words, this has {len(text.split())}")
    return text

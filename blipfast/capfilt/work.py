"""One unit of images: read, captioned and judged. The same on one machine, on ranks and on Ray."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from blipfast.capfilt.config import CapFiltConfig, Stage
from blipfast.capfilt.models import caption_records, score_records
from blipfast.capfilt.store import ImageRow, JudgedText, Unit, UnitStore
from blipfast.checkpoints import load_model, model_hash
from blipfast.data import BlipTokenizer, load_image, load_tokenizer
from blipfast.data.images import normalise, resize
from blipfast.data.index import RecordReader, ShardIndex
from blipfast.errors import ConfigError, DataError
from blipfast.models.blip import Blip
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.retrieval import BlipForRetrieval
from blipfast.train.recipes import pick_device

_Model = TypeVar("_Model", bound=Blip)


@dataclass
class UnitImages:
    """The images of a unit as numbers and words alone, so that they travel between processes.

    keys: of all records. errors: why those that cannot be read cannot. texts: `(text, source)` of
    each record. good: places of the readable ones, `G` of them.
    pixels: for each image size `(G, side, side, 3)` uint8.
    """

    keys: list[str]
    errors: dict[int, str]
    texts: list[list[tuple[str, str]]]
    good: list[int]
    pixels: dict[int, np.ndarray]


def read_unit(
    unit: Unit, index: ShardIndex, reader: RecordReader, sides: Iterable[int], pool: Executor
) -> UnitImages:
    """Reads and decodes a unit's images, each once, to squares of every side."""
    sides = sorted(set(sides))

    def one(row: int) -> tuple[list[tuple[str, str]], list[np.ndarray] | str]:
        texts: list[tuple[str, str]] = []
        try:
            record = reader.read(index, row)
            texts = [(entry.text, entry.source) for entry in record.texts]
            image = np.array(load_image(record.image, record.key))
            return texts, [resize(image, side) for side in sides]
        except DataError as error:
            return texts, str(error)

    found = list(pool.map(one, range(unit.start, unit.stop)))
    errors = {i: squares for i, (_, squares) in enumerate(found) if isinstance(squares, str)}
    good = [i for i in range(len(found)) if i not in errors]
    empty = np.empty((0, 1, 1, 3), np.uint8)
    pixels = {
        side: np.stack([found[i][1][at] for i in good]) if good else empty  # type: ignore[misc]
        for at, side in enumerate(sides)
    }
    keys = [index.keys[row].decode() for row in range(unit.start, unit.stop)]
    return UnitImages(keys, errors, [texts for texts, _ in found], good, pixels)


class Models:
    """The captioners and filters of a run, on their device.

    Raises ConfigError when a checkpoint or the vocabulary is not given, or models do not agree.
    """

    def __init__(
        self,
        config: CapFiltConfig,
        captioners: Sequence[BlipForCaptioning],
        filters: Sequence[BlipForRetrieval],
        tokenizer: BlipTokenizer,
    ) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.tokenizer = tokenizer
        for model in (*captioners, *filters):
            words = model.config.text.vocab_size
            if tokenizer.vocab_size != words:
                raise ConfigError(
                    f"the vocabulary has {tokenizer.vocab_size} pieces, the "
                    f"{type(model).__name__} {words}: give the models' own as capfilt.vocabulary"
                )
        self.captioner_hashes = tuple(map(model_hash, captioners))
        self.filter_hashes = tuple(map(model_hash, filters))
        self.captioners = [self._ready(model) for model in captioners]
        self.filters = [self._ready(model) for model in filters]

    @classmethod
    def load(cls, config: CapFiltConfig) -> Models:
        """Those that the settings name; no captioner where its texts would not be kept."""
        size = config.image_size
        writers = config.captioners if config.keep != "web" else ()
        captioners = [load_model(path, "caption", image_size=size) for path in writers]
        filters = [load_model(path, "retrieval", image_size=size) for path in config.filters]
        return cls(config, captioners, filters, find_tokenizer(config))

    def _ready(self, model: _Model) -> _Model:
        if self.config.precision == "bf16":  # a copy: the caller's weights keep their precision
            model = copy.deepcopy(model).to(torch.bfloat16)
        return model.to(self.device).eval()

    @property
    def sides(self) -> set[int]:
        """Of the squares that the models look at, in pixels."""
        return {*map(_side, self.captioners), *map(_side, self.filters)}

    def captioned(self, images: UnitImages) -> list[ImageRow]:
        """What the captioners write about each image; no text that came with it."""
        texts: list[list[JudgedText]] = [[] for _ in images.good]
        for model, writer in zip(self.captioners, self.captioner_hashes, strict=True):
            found = caption_records(
                model,
                self.tokenizer,
                [images.keys[i] for i in images.good],
                (pixels for _, pixels in self._batches(images, model)),
                self.config,
                writer=writer,
            )
            for its, written in zip(texts, found, strict=True):
                its += [JudgedText(one.text, one.source, one.captioner) for one in written]
        return _rows(images, texts)

    def judged(self, images: UnitImages, written: Sequence[ImageRow]) -> list[ImageRow]:
        """Every text of each image, its own first, with what the filters think of it.

        written: of all records of the unit, what `captioned` gave.
        """
        texts = [
            [JudgedText(text, source) for text, source in images.texts[i]] + [*written[i].texts]
            for i in images.good
        ]
        for model in self.filters:
            for start, pixels in self._batches(images, model):
                asked = texts[start : start + len(pixels)]
                scores = score_records(model, self.tokenizer, pixels, asked, self.config)
                for i, its in enumerate(scores, start):
                    texts[i] = [
                        one if score is None else _with(one, score.itm, score.itc)
                        for one, score in zip(texts[i], its, strict=True)
                    ]
        return _rows(images, texts)

    def _batches(self, images: UnitImages, model: Blip) -> Iterable[tuple[int, Tensor]]:
        """The readable images as the model takes them, a batch at a time with its first's place."""
        dtype = next(model.parameters()).dtype
        for start in range(0, len(images.good), self.config.batch_size):
            block = images.pixels[_side(model)][start : start + self.config.batch_size]
            yield start, normalise(torch.from_numpy(block).to(self.device)).to(dtype)


def work_on_unit(
    models: Models,
    captions: UnitStore,
    store: UnitStore,
    unit: Unit,
    images: UnitImages,
    stage: Stage,
) -> None:
    """Captions a unit, or judges it with the captions that are there or that it then writes."""
    if stage == "caption":
        store.write(unit, models.captioned(images))
        return
    if captions.done(unit):
        written = captions.read(unit)
    elif models.captioners or captions.read_mark() is None:
        written = models.captioned(images)
    else:
        raise DataError(
            f"{captions.folder / unit.name} is missing: finish the stage `caption`, or give its "
            "captioners"
        )
    store.write(unit, models.judged(images, written))


def decoding_pool(config: CapFiltConfig) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(config.threads, "blipfast-capfilt")


def find_tokenizer(config: CapFiltConfig) -> BlipTokenizer:
    """Of the vocabulary that the settings name, or of the one beside a model."""
    return load_tokenizer(config.vocabulary, *config.filters, *config.captioners)


def _side(model: Blip) -> int:
    return model.config.vision.image_size


def _with(one: JudgedText, itm: float, itc: float) -> JudgedText:
    return replace(one, itm=(*(one.itm or ()), itm), itc=(*(one.itc or ()), itc))


def _rows(images: UnitImages, texts: Sequence[Sequence[JudgedText]]) -> list[ImageRow]:
    """A row for each record: `texts` are those of the readable ones."""
    of = dict(zip(images.good, texts, strict=True))
    return [
        ImageRow(key, tuple(of.get(i, ())), images.errors.get(i))
        for i, key in enumerate(images.keys)
    ]

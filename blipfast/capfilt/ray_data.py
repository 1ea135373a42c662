"""Units of CapFilt by Ray Data: decoded on CPUs, captioned and judged by processes with the models.

A unit travels as one row, so that the models see the batches that one process would see, and the
output is the same. Each unit's file is written whole by the process that made it: a task that Ray
starts again finds it, or replaces it by the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from blipfast.capfilt.config import CapFiltConfig, Stage
from blipfast.capfilt.store import Unit, UnitStore
from blipfast.capfilt.work import Models, UnitImages, decoding_pool, read_unit, work_on_unit
from blipfast.data.index import RecordReader, index_shard
from blipfast.errors import ConfigError

Row = dict[str, Any]


def work_on_ray(
    config: CapFiltConfig,
    sides: Sequence[int],
    shards: Mapping[str, Path],
    captions: UnitStore,
    store: UnitStore,
    todo: Sequence[Unit],
    stage: Stage,
) -> Iterator[Unit]:
    """Does the units on the Ray cluster of RAY_ADDRESS, or one of this machine's own.

    sides: of the squares that the models look at. shards: by the units' stems. captions, store:
    what earlier stages wrote, and where this one writes.
    Raises ConfigError when Ray is absent.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("capfilt.runner=ray needs Ray: pip install 'blipfast[ray]'") from error
    if not todo:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the run has its own
    rows = [
        {**dataclasses.asdict(unit), "shard": str(shards[unit.stem].resolve())} for unit in todo
    ]
    decoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Decode,  # type: ignore[arg-type]
        fn_constructor_args=(config, sides),
        num_cpus=1,
        concurrency=config.ray_decoders,
    )
    finished = decoded.map_batches(
        _Worker,
        fn_constructor_args=(config, sides, captions.folder, store.folder, stage),
        batch_size=1,
        concurrency=config.ray_models,
        num_gpus=1 if _on_cards(config, ray.cluster_resources()) else 0,
    )
    for row in finished.iter_rows():
        yield _unit(row)


def _on_cards(config: CapFiltConfig, resources: dict[str, float]) -> bool:
    if config.device == "auto":
        return resources.get("GPU", 0) > 0
    return config.device.startswith("cuda")


def _unit(row: Row) -> Unit:
    return Unit(str(row["stem"]), int(row["start"]), int(row["stop"]))


class _Decode:
    """A row that names a unit, to one with its images."""

    def __init__(self, config: CapFiltConfig, sides: Sequence[int]) -> None:
        self.sides = sides
        self.pool, self.reader = decoding_pool(config), RecordReader()
        self.index = lru_cache(maxsize=8)(index_shard)  # its units come one after the other

    def __call__(self, row: Row) -> Row:
        index = self.index(Path(row["shard"]))
        images = read_unit(_unit(row), index, self.reader, self.sides, self.pool)
        words = [images.keys, list(images.errors.items()), images.texts, images.good]
        pixels = {f"pixels_{side}": images.pixels[side].tobytes() for side in self.sides}
        return {**row, "words": json.dumps(words), **pixels}


class _Worker:
    """Holds the models; a row with images to the name of the unit, which is written then."""

    def __init__(
        self,
        config: CapFiltConfig,
        sides: Sequence[int],
        captions: Path,
        store: Path,
        stage: Stage,
    ) -> None:
        self.models, self.sides, self.stage = Models.load(config), sides, stage
        self.captions, self.store = UnitStore(captions), UnitStore(store)

    def __call__(self, batch: Row) -> Row:
        row = {name: values[0] for name, values in batch.items()}
        unit = _unit(row)
        if not self.store.done(unit):
            images = self._images(row)
            work_on_unit(self.models, self.captions, self.store, unit, images, self.stage)
        return {name: np.array([getattr(unit, name)]) for name in ("stem", "start", "stop")}

    def _images(self, row: Row) -> UnitImages:
        keys, errors, texts, good = json.loads(row["words"])
        pixels = {
            side: np.frombuffer(row[f"pixels_{side}"], np.uint8).reshape(-1, side, side, 3).copy()
            for side in self.sides
        }
        pairs = [[(text, source) for text, source in its] for its in texts]
        return UnitImages(keys, dict(errors), pairs, good, pixels)

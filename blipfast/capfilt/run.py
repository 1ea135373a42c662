"""CapFilt from shards to shards, in stages that also run as one (BLIP, section 3.3).

`caption` and `score` work on units of images (`store`), on one process, the ranks of torchrun, or
Ray. `filter` reads what they left and needs no model: for each input shard it writes output shards
and then a part of the manifest, which says that the shard is done. So a run that was killed at any
moment goes on, and no pair is lost, doubled or half-written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from rich.progress import Progress

from blipfast.capfilt.config import CapFiltConfig, Stage
from blipfast.capfilt.report import CapFiltReport
from blipfast.capfilt.store import Mark, Unit, UnitStore, claim, remove_left_overs, units_of
from blipfast.capfilt.work import (
    Models,
    decoding_pool,
    find_tokenizer,
    read_unit,
    work_on_unit,
)
from blipfast.capfilt.write import finish, write_shard
from blipfast.data import BlipTokenizer, read_shards
from blipfast.data.ahead import ahead
from blipfast.data.index import RecordReader, index_shards
from blipfast.errors import ConfigError
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.retrieval import BlipForRetrieval
from blipfast.train.progress import training_progress
from blipfast.train.ranks import (
    gather_objects,
    process_group,
    rank,
    started_by_torchrun,
    world_size,
)
from blipfast.train.recipes import pick_device

_DAY = 86_400.0  # ranks wait for the slowest; torchrun ends them when one dies


def run_capfilt(
    config: CapFiltConfig,
    *,
    captioner: BlipForCaptioning | None = None,
    filter_model: BlipForRetrieval | None = None,
    tokenizer: BlipTokenizer | None = None,
    on_images: Callable[[int], None] | None = None,
) -> CapFiltReport:
    """Captions, judges and writes a bootstrapped data set: all stages.

    Args:
        config: see `CapFiltConfig`.
        captioner, filter_model, tokenizer: used in place of those that the config names.
        on_images: called with the number of images after each unit.

    A run that was interrupted goes on where it was when called again with the same settings.

    Raises:
        ConfigError: neither captioner nor filter, or the output is of a run with other settings.
        DataError: no shards, too many unreadable records, the disk is full.
    """
    models = None
    if captioner is not None or filter_model is not None:
        models = Models(
            config,
            [captioner] if captioner is not None else [],
            [filter_model] if filter_model is not None else [],
            tokenizer or find_tokenizer(config),
        )
    with process_group(pick_device(config.device), _DAY):
        run = CapFiltRun(config, models, on_images)
        run.score()
        return run.filter()


def run_stage(config: CapFiltConfig, stage: Stage) -> CapFiltReport | None:
    """One stage alone; `filter` returns the report. Raises as `run_capfilt` does."""
    with process_group(pick_device(config.device), _DAY):
        run = CapFiltRun(config)
        if stage == "filter":
            return run.filter()
        run.caption() if stage == "caption" else run.score()
        return None


class CapFiltRun:
    """The stages of one run, over its input's units.

    models: in place of those that the config names, which are loaded when they are needed.
    """

    def __init__(
        self,
        config: CapFiltConfig,
        models: Models | None = None,
        on_images: Callable[[int], None] | None = None,
    ) -> None:
        if not config.input or not config.output:
            raise ConfigError("capfilt.input and capfilt.output must be given")
        self.config, self.on_images = config, on_images
        self.indices = {index.shard.stem: index for index in index_shards(input_shards(config))}
        self.units = units_of(self.indices.values(), config.unit)
        if config.runner == "ray" and started_by_torchrun():
            raise ConfigError("capfilt.runner=ray is started once, not by torchrun")
        if config.runner == "ray" and models is not None:
            raise ConfigError("with capfilt.runner=ray name the checkpoints: Ray loads the models")
        self.captions = UnitStore(config.work_folder / "captions")
        self.scores = UnitStore(config.work_folder / "scores")
        self.models_given = models is not None
        self._models = models

    @property
    def models(self) -> Models:
        if self._models is None:
            config = self.config
            if config.runner == "ray":  # this process only names them
                config = dataclasses.replace(config, device="cpu")
            self._models = Models.load(config)
        return self._models

    def caption(self) -> None:
        """Writes captions of all images. Raises ConfigError without a captioner."""
        if not self.config.captioners and not self.models_given:
            raise ConfigError("capfilt.captioners is empty: name the checkpoint of a captioner")
        mark = Mark(
            self.config.fingerprint("caption", *self.models.captioner_hashes),
            self.models.captioner_hashes,
        )
        self._work(self.captions, mark, "caption")

    def score(self) -> None:
        """Judges all texts, and writes the captions that no earlier stage has written."""
        if not (self.config.captioners or self.config.filters or self.models_given):
            if self.scores.read_mark() is None:
                raise ConfigError(
                    "neither capfilt.captioners nor capfilt.filters is given: name a checkpoint"
                )
            return  # done by another run
        written = self.captions.read_mark()
        captioners = self.models.captioner_hashes or (written.captioners if written else ())
        if written is not None and written.fingerprint != self.config.fingerprint(
            "caption", *captioners
        ):
            raise ConfigError(
                f"{self.captions.folder} holds captions of other settings or models; choose "
                "another output (or work) folder, or delete this one"
            )
        filters = self.models.filter_hashes
        fingerprint = self.config.fingerprint("score", *captioners, "", *filters)
        self._work(self.scores, Mark(fingerprint, captioners, filters), "score")

    def filter(self) -> CapFiltReport:
        """Decides by the scores, and writes shards and manifest; needs no model."""
        scored = self.scores.read_mark()
        if scored is None:
            raise ConfigError(
                f"{self.scores.folder} is missing: run the stage `score`, or name by work= the "
                "folder of a run that has scores"
            )
        own = self.config.fingerprint("score", *scored.captioners, "", *scored.filters)
        if own != scored.fingerprint:
            raise ConfigError(
                f"{self.scores.folder} is of a run with other settings: give the same input, unit "
                "and captioning settings"
            )
        fingerprint = self.config.fingerprint("filter", *scored.captioners, "", *scored.filters)
        mark = dataclasses.replace(scored, fingerprint=fingerprint)
        output = Path(self.config.output)
        if rank() == 0:
            claim(output / "capfilt.json", mark, self.config.to_dict())
            remove_left_overs(output)
        gather_objects(None)
        units: dict[str, list[Unit]] = {stem: [] for stem in self.indices}
        for unit in self.units:
            units[unit.stem].append(unit)
        skipped = 0
        for stem in list(self.indices)[rank() :: world_size()]:
            rows = (row for unit in units[stem] for row in self.scores.read(unit))
            skipped += not write_shard(self.config, self.indices[stem], rows, mark)
        skipped = sum(gather_objects(skipped))
        report = CapFiltReport()
        if rank() == 0:
            report = finish(self.config, list(self.indices), skipped)
        return gather_objects(report)[0]

    def _work(self, store: UnitStore, mark: Mark, stage: Stage) -> None:
        """Brings all units of a stage into its store, by this process, all ranks, or Ray."""
        todo: list[Unit] = []
        if rank() == 0:  # its list for all: others would already see units that it has finished
            store.claim(mark, self.config.to_dict())
            remove_left_overs(store.folder)
            todo = [unit for unit in self.units if not store.done(unit)]
        todo = gather_objects(todo)[0]
        with self._progress() as progress:
            bar = progress.add_task(stage, total=sum(u.stop - u.start for u in todo), rate="")
            for unit in self._finished(store, todo, stage):
                progress.advance(bar, (unit.stop - unit.start) * self._abreast)
                if self.on_images is not None:
                    self.on_images(unit.stop - unit.start)
        gather_objects(None)  # the next stage reads what other ranks have written

    @property
    def _abreast(self) -> int:
        """Units that are done in the time of one: this rank's bar speaks for all."""
        return world_size() if self.config.runner == "local" else 1

    def _progress(self) -> Progress:
        return training_progress(disable=rank() > 0 or self.on_images is not None)

    def _finished(self, store: UnitStore, todo: list[Unit], stage: Stage) -> Iterable[Unit]:
        """Does the units and names each when it is written."""
        if self.config.runner == "ray":
            from blipfast.capfilt.ray_data import work_on_ray

            shards = {stem: index.shard for stem, index in self.indices.items()}
            yield from work_on_ray(
                self.config, sorted(self.models.sides), shards, self.captions, store, todo, stage
            )
            return
        own = todo[rank() :: world_size()]
        with decoding_pool(self.config) as pool, closing(RecordReader()) as reader:
            sides = self.models.sides
            decoded = (
                (unit, read_unit(unit, self.indices[unit.stem], reader, sides, pool))
                for unit in own
            )
            for unit, images in ahead(decoded, depth=1):
                work_on_unit(self.models, self.captions, store, unit, images, stage)
                yield unit


def input_shards(config: CapFiltConfig) -> list[Path]:
    """Input shards, whose stems name what comes of them. Raises ConfigError for equal ones."""
    shards: dict[str, Path] = {}
    for path in read_shards(config.input).shards:
        if path.stem in shards:
            raise ConfigError(
                f"two input shards are called {path.name} ({shards[path.stem]} and {path}): run "
                "CapFilt on each folder by itself"
            )
        shards[path.stem] = path
    return list(shards.values())

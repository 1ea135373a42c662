"""CapFilt from shards to shards (BLIP, section 3.3, figure 3).

Each input shard becomes output shards of the same stem and a part of the manifest. The part is put
in place last and says that its shard is done, so that an interrupted run goes on with the next.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from blipfast.capfilt.config import CapFiltConfig
from blipfast.capfilt.decisions import (
    Candidate,
    Decision,
    filter_candidates,
    read_manifest,
    write_lines,
)
from blipfast.capfilt.models import caption_records, model_hash, score_records
from blipfast.checkpoints import load_model
from blipfast.data import (
    BlipTokenizer,
    EvalTransform,
    Record,
    ShardReader,
    ShardWriter,
    TextEntry,
    read_shards,
)
from blipfast.errors import ConfigError, DataError
from blipfast.tasks.caption import BlipForCaptioning
from blipfast.tasks.retrieval import BlipForRetrieval

_PARTS = "manifest"
_SETTINGS = "capfilt.json"


@dataclass
class CapFiltReport:
    """What a run did.

    texts: candidates by source. accepted: those in the new set, by source. images: read. kept:
    with at least one accepted text. unreadable: set aside, named in the manifest. shards: the new
    set. manifest: one row of JSON for each decision. skipped_shards: done by an earlier run.
    """

    shards: list[str]
    manifest: str
    texts: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    images: int = 0
    kept: int = 0
    unreadable: int = 0
    skipped_shards: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def run_capfilt(
    config: CapFiltConfig,
    *,
    captioner: BlipForCaptioning | None = None,
    filter_model: BlipForRetrieval | None = None,
    tokenizer: BlipTokenizer | None = None,
    on_images: Callable[[int], None] | None = None,
) -> CapFiltReport:
    """Captions, judges and writes a bootstrapped data set.

    Args:
        config: see `CapFiltConfig`.
        captioner, filter_model, tokenizer: used in place of those that the config names.
        on_images: called with the number of images after each batch.

    A run that was interrupted goes on where it was when called again with the same settings.

    Raises:
        ConfigError: a model is not given, or the output is of a run with other settings.
        DataError: no shards, too many unreadable records, the disk is full.
    """
    run = _Run(config, captioner, filter_model, tokenizer, on_images)
    return run.all()


class _Run:
    def __init__(
        self,
        config: CapFiltConfig,
        captioner: BlipForCaptioning | None,
        filter_model: BlipForRetrieval | None,
        tokenizer: BlipTokenizer | None,
        on_images: Callable[[int], None] | None,
    ) -> None:
        self.config = config
        self.inputs = _inputs(config.input)
        self.filter = filter_model or _load(config, "filter", "retrieval")
        self.captioner = captioner
        if captioner is None and config.keep != "web":
            self.captioner = _load(config, "captioner", "caption")
        self.tokenizer = tokenizer or _vocabulary(config)
        for model in (self.filter, self.captioner):
            if model is not None:
                model.to(config.device).eval()
        self.filter_hash = model_hash(self.filter)
        self.captioner_hash = None if self.captioner is None else model_hash(self.captioner)
        self.transform = EvalTransform(self.filter.config.vision.image_size)
        self.caption_transform = self.transform
        if self.captioner is not None:
            self.caption_transform = EvalTransform(self.captioner.config.vision.image_size)
        self.on_images = on_images
        self.output = Path(config.output)
        self.parts = self.output / _PARTS

    def all(self) -> CapFiltReport:
        self._claim_output()
        skipped = 0
        for stem, shard in self.inputs.items():
            if (self.parts / f"{stem}.jsonl").exists():
                skipped += 1
            else:
                self._shard(stem, shard)
        return self._finish(skipped)

    def _claim_output(self) -> None:
        """Makes the folder, or makes sure that it is of a run with these settings and models."""
        mark = self.config.fingerprint(self.filter_hash, self.captioner_hash or "")
        settings = self.output / _SETTINGS
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            found = json.loads(settings.read_text())["fingerprint"] if settings.exists() else mark
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"cannot use the output folder {self.output}: {error}") from error
        if found != mark:
            raise ConfigError(
                f"{self.output} holds the output of a run with other settings or models; choose "
                "another output folder, or delete this one"
            )
        body = {"fingerprint": mark, "config": self.config.to_dict()}
        write_lines(settings, [json.dumps(body, indent=1)])

    def _shard(self, stem: str, shard: Path) -> None:
        for left_over in self.output.glob(f"{glob.escape(stem)}-[0-9]*.tar"):
            left_over.unlink()  # whole, but of a shard that was not
        reader = read_shards([shard], max_bad_fraction=1.0, verify_images=False)
        decisions: list[Decision] = []
        images = 0
        with ShardWriter(
            self.output, stem, max_count=self.config.shard_count, max_bytes=self.config.shard_bytes
        ) as writer:
            for records in _batches(reader, self.config.batch_size):
                images += len(records)
                decisions += self._batch(records, writer)
                if self.on_images is not None:
                    self.on_images(len(records))
            for bad in reader.quarantine:
                decisions.append(self._unreadable(bad.key or f"{stem} (rest)", bad.reason))
            self._check_bad(shard, decisions, images + len(reader.quarantine))
        write_lines(self.parts / f"{stem}.jsonl", [d.to_json() for d in decisions])

    def _check_bad(self, shard: Path, decisions: list[Decision], seen: int) -> None:
        bad = [d for d in decisions if d.text is None]
        if len(bad) > self.config.max_bad_fraction * seen:
            shown = "; ".join(f"{d.key}: {d.reason}" for d in bad[:3])
            raise DataError(
                f"{len(bad)} of {seen} records of {shard} cannot be read, more than "
                f"max_bad_fraction={self.config.max_bad_fraction} allows. First ones: {shown}"
            )

    def _unreadable(self, key: str, reason: str) -> Decision:
        seed = self.config.seed
        return Decision(key, None, "image", None, None, False, reason, None, None, seed)

    def _batch(self, records: list[Record], writer: ShardWriter) -> list[Decision]:
        """Judges some images, writes those with an accepted text, and returns all decisions."""
        good, pixels, caption_pixels, decisions = [], [], [], []
        for record in records:
            try:
                pixels.append(self.transform(record.image, record.key))
                caption_pixels.append(self._for_captioner(record, pixels[-1]))
                good.append(record)
            except DataError as error:
                decisions.append(self._unreadable(record.key, str(error)))
        if not good:
            return decisions
        written = self._candidates(good, torch.stack(caption_pixels))
        device = self.config.device
        with _precision(self.config):
            scores = score_records(
                self.filter, self.tokenizer, torch.stack(pixels).to(device), written, self.config
            )
        for record, candidates, its in zip(good, written, scores, strict=True):
            rows = self._decide(record.key, candidates, its)
            decisions += rows
            texts = tuple(TextEntry(d.text or "", d.source) for d in rows if d.accepted)
            if texts:
                writer.write(replace(record, texts=texts))
        return decisions

    def _for_captioner(self, record: Record, pixels: Tensor) -> Tensor:
        if self.caption_transform.image_size == self.transform.image_size:
            return pixels
        return self.caption_transform(record.image, record.key)

    def _candidates(self, records: list[Record], pixel_values: Tensor) -> list[list[Candidate]]:
        own = [[Candidate(t.text, t.source) for t in record.texts] for record in records]
        if self.captioner is None:
            return own
        keys = [record.key for record in records]
        with _precision(self.config):
            synthetic = caption_records(
                self.captioner,
                self.tokenizer,
                keys,
                pixel_values.to(self.config.device),
                self.config,
            )
        return [a + b for a, b in zip(own, synthetic, strict=True)]

    def _decide(self, key: str, candidates: list[Candidate], scores: list) -> list[Decision]:
        return filter_candidates(
            key,
            candidates,
            scores,
            threshold=self.config.threshold,
            synthetic_threshold=self.config.synthetic_threshold,
            keep=self.config.keep,
            trusted=self.config.trusted,
            filter_hash=self.filter_hash,
            captioner_hash=self.captioner_hash,
            seed=self.config.seed,
        )

    def _finish(self, skipped: int) -> CapFiltReport:
        """One manifest of all parts, and the counts."""
        manifest = self.output / "manifest.jsonl"
        texts, accepted = Counter[str](), Counter[str]()
        images, kept, unreadable = set(), set(), 0

        def rows() -> Iterator[str]:
            nonlocal unreadable
            for stem in self.inputs:
                for row in read_manifest(self.parts / f"{stem}.jsonl"):
                    if row.text is None:
                        unreadable += 1
                    else:
                        images.add((stem, row.key))
                        texts[row.source] += 1
                    if row.accepted:
                        kept.add((stem, row.key))
                        accepted[row.source] += 1
                    yield row.to_json()

        write_lines(manifest, rows())
        shards = [
            str(path)
            for stem in self.inputs
            for path in sorted(self.output.glob(f"{glob.escape(stem)}-[0-9]*.tar"))
        ]
        report = CapFiltReport(
            shards, str(manifest), dict(texts), dict(accepted), len(images), len(kept), unreadable,
            skipped,
        )  # fmt: skip
        write_lines(self.output / "report.json", [report.to_json()])
        return report


def _inputs(pattern: str) -> dict[str, Path]:
    """Input shards by stem, which names what comes of them."""
    shards: dict[str, Path] = {}
    for path in read_shards(pattern).shards:
        if path.stem in shards:
            raise ConfigError(
                f"two input shards are called {path.name} ({shards[path.stem]} and {path}): run "
                "CapFilt on each folder by itself"
            )
        shards[path.stem] = path
    return shards


def _batches(reader: ShardReader, size: int) -> Iterator[list[Record]]:
    records: list[Record] = []
    for record in reader:
        records.append(record)
        if len(records) == size:
            yield records
            records = []
    if records:
        yield records


def _precision(config: CapFiltConfig) -> contextlib.AbstractContextManager:
    device = torch.device(config.device).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=config.precision == "bf16")


def _load(config: CapFiltConfig, role: str, task: str):  # type: ignore[no-untyped-def]
    source = getattr(config, role)
    if source is None:
        raise ConfigError(f"capfilt.{role} is not given: name the checkpoint of a {task} model")
    return load_model(source, task, image_size=config.image_size)


def _vocabulary(config: CapFiltConfig) -> BlipTokenizer:
    if config.vocabulary is not None:
        return BlipTokenizer.from_file(config.vocabulary)
    folder = os.fspath(config.filter or "")
    if not os.path.isdir(folder):
        raise ConfigError("capfilt.vocabulary is not given, and no vocab.txt lies with the filter")
    return BlipTokenizer.from_pretrained_dir(folder)

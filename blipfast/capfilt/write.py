"""The end of CapFilt: decisions, output shards, the manifest, and the human-written sets beside."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from blipfast.capfilt.config import CapFiltConfig, Ensemble
from blipfast.capfilt.decisions import (
    Decision,
    Score,
    filter_candidates,
    read_manifest,
    write_lines,
)
from blipfast.capfilt.report import CapFiltReport
from blipfast.capfilt.store import ImageRow, JudgedText, Mark
from blipfast.data import ShardWriter, TextEntry, read_shards
from blipfast.data.index import RecordReader, ShardIndex
from blipfast.errors import ConfigError, DataError

_PARTS = "manifest"


def write_shard(
    config: CapFiltConfig, index: ShardIndex, rows: Iterable[ImageRow], mark: Mark
) -> bool:
    """Decides over one input shard's images and writes what is kept; False if that was done before.

    rows: of all records of the index, in order; not touched when the shard is done.
    Raises DataError when too many records cannot be read, or rows are of other records.
    """
    output, stem = Path(config.output), index.shard.stem
    part = output / _PARTS / f"{stem}.jsonl"
    if part.exists():
        return False
    part.parent.mkdir(exist_ok=True)
    for left_over in output.glob(f"{glob.escape(stem)}-[0-9]*.tar"):
        left_over.unlink()  # whole, but of a shard that was not
    decisions: list[Decision] = []
    reader = RecordReader()
    with ShardWriter(
        output, stem, max_count=config.shard_count, max_bytes=config.shard_bytes
    ) as writer, contextlib.closing(reader):  # fmt: skip
        for number, row in enumerate(rows):
            if index.keys[number].decode() != row.key:
                raise DataError(
                    f"record {number} of {index.shard} is {index.keys[number].decode()}, but the "
                    f"scores are of {row.key}: the shard has changed; choose another output folder"
                )
            its = _decide(config, row, mark)
            decisions += its
            texts = tuple(TextEntry(d.text or "", d.source) for d in its if d.accepted)
            if texts:
                writer.write(replace(reader.read(index, number), texts=texts))
        for bad in index.bad:
            decisions.append(_unreadable(bad.key or f"{stem} (rest)", bad.reason, config))
        _check_bad(config, index.shard, decisions, len(index) + len(index.bad))
    write_lines(part, (d.to_json() for d in decisions))
    return True


def combined(text: JudgedText, ensemble: Ensemble) -> Score | None:
    """One score of what all filters said; None where none was asked."""
    if text.itm is None or text.itc is None:
        return None
    several = text.itm if len(text.itm) > 1 else ()
    if ensemble == "mean":
        itm, itc = (sum(values) / len(values) for values in (text.itm, text.itc))
    else:
        choose = min if ensemble == "min" else max
        itm, itc = choose(text.itm), choose(text.itc)
    return Score(itm, itc, several)


def _decide(config: CapFiltConfig, row: ImageRow, mark: Mark) -> list[Decision]:
    if row.error is not None:
        return [_unreadable(row.key, row.error, config)]
    return filter_candidates(
        row.key,
        row.texts,
        [combined(text, config.ensemble) for text in row.texts],
        threshold=config.threshold,
        synthetic_threshold=config.synthetic_threshold,
        keep=config.keep,
        trusted=config.trusted,
        filter_hash="+".join(mark.filters) or None,
        seed=config.seed,
    )


def _unreadable(key: str, reason: str, config: CapFiltConfig) -> Decision:
    return Decision(key, None, "image", None, None, False, reason, None, None, config.seed)


def _check_bad(config: CapFiltConfig, shard: Path, decisions: list[Decision], seen: int) -> None:
    bad = [d for d in decisions if d.text is None]
    if len(bad) > config.max_bad_fraction * seen:
        shown = "; ".join(f"{d.key}: {d.reason}" for d in bad[:3])
        raise DataError(
            f"{len(bad)} of {seen} records of {shard} cannot be read, more than "
            f"max_bad_fraction={config.max_bad_fraction} allows. First ones: {shown}"
        )


def finish(config: CapFiltConfig, stems: Sequence[str], skipped: int) -> CapFiltReport:
    """One manifest of all parts, the human-written sets beside the shards, and the counts."""
    output = Path(config.output)
    texts, accepted = Counter[str](), Counter[str]()
    images = kept = unreadable = 0

    def rows() -> Iterator[str]:
        nonlocal images, kept, unreadable
        for stem in stems:
            part = read_manifest(output / _PARTS / f"{stem}.jsonl")
            for _, its in groupby(part, key=lambda row: row.key):  # an image's rows are together
                row_of = list(its)
                unreadable += sum(row.text is None for row in row_of)
                images += any(row.text is not None for row in row_of)
                kept += any(row.accepted for row in row_of)
                texts.update(row.source for row in row_of if row.text is not None)
                accepted.update(row.source for row in row_of if row.accepted)
                yield from (row.to_json() for row in row_of)

    write_lines(output / "manifest.jsonl", rows())
    shards = [
        str(path)
        for stem in stems
        for path in sorted(output.glob(f"{glob.escape(stem)}-[0-9]*.tar"))
    ]
    report = CapFiltReport(
        shards=shards,
        manifest=str(output / "manifest.jsonl"),
        human_shards=[str(path) for path in join_human(config.human, output, set(stems))],
        texts=dict(texts),
        accepted=dict(accepted),
        images=images,
        kept=kept,
        unreadable=unreadable,
        skipped_shards=skipped,
    )
    write_lines(output / "report.json", [report.to_json()])
    return report


def join_human(patterns: Sequence[str], output: Path, taken: set[str]) -> list[Path]:
    """Puts shards of human-written texts beside the new ones (section 3.3), as links if they can.

    So that the output folder is the whole bootstrapped set. Raises ConfigError when a name is
    taken, DataError when a shard cannot be copied.
    """
    joined: list[Path] = []
    for pattern in patterns:
        for shard in read_shards(pattern).shards:
            place = output / f"human-{shard.name}"
            if shard.stem in taken:
                raise ConfigError(f"human set: {shard} is a web shard of this run too")
            if place in joined:
                raise ConfigError(f"two human-written shards are called {shard.name}; rename one")
            _link(shard, place)
            joined.append(place)
    return joined


def _link(shard: Path, place: Path) -> None:
    temporary = place.with_name(f".{place.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        try:
            os.link(shard, temporary)
        except OSError as error:  # another file system, or one without links
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.copyfile(shard, temporary)
        os.replace(temporary, place)
    except OSError as error:
        raise DataError(f"cannot write {place}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)

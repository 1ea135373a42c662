"""Pages on CapFilt: the report of runs, texts to label, and the curves of a calibration."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from blipfast.capfilt.calibrate import Curve, Label, labels_to_json
from blipfast.capfilt.decisions import SYNTHETIC, Decision, read_manifest, write_lines
from blipfast.capfilt.statistics import RunStatistics, statistics_of
from blipfast.data import read_shards
from blipfast.data.index import RecordReader, index_shard
from blipfast.errors import ConfigError, DataError
from blipfast.evaluation.figures import as_svg, pyplot
from blipfast.evaluation.page import template, thumbnail

_COLOURS = {SYNTHETIC: "#2e7d4f", "web": "#c0504d"}
_CARDS = 24


@dataclass(frozen=True)
class Run:
    """A finished run, with its name on the page."""

    name: str
    folder: Path
    config: Mapping[str, Any]

    @cached_property
    def statistics(self) -> RunStatistics:
        """Of the whole manifest, which is read for them once."""
        return statistics_of(read_manifest(self.manifest))

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.jsonl"


def open_run(folder: str | Path) -> Run:
    """Reads a run's settings. Raises ConfigError when the folder has none, or no manifest."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "capfilt.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is no output of CapFilt: {error}") from error
    run = Run(folder.name, folder, config)
    if not run.manifest.is_file():
        raise ConfigError(f"{folder} has no manifest yet: run the stage `filter` first")
    return run


def write_report(folders: Sequence[str | Path], output: Path, seed: int = 0) -> None:
    """One page on one or more runs side by side: rounds, or nucleus beside beam.

    Raises ConfigError for folders that are no runs, DataError when the input's images are gone.
    """
    runs = [open_run(folder) for folder in folders]
    labels = _labels(runs)
    galleries = [(labels[i], _gallery(run, seed)) for i, run in enumerate(runs)]
    page = template("blipfast.capfilt", "report.html.j2").render(
        runs=list(zip(labels, runs, strict=True)),
        table=_table(runs),
        histogram=_histogram(dict(zip(labels, runs, strict=True))),
        galleries=galleries,
    )
    write_lines(output, [page])


def _labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run, which says how it captioned."""
    names = [run.name for run in runs]
    if len({*names}) < len(names):  # as round-1/shards and round-2/shards
        names = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    methods = [run.config["method"] for run in runs]
    return [
        name if method in name else f"{name} ({method})"
        for name, method in zip(names, methods, strict=True)
    ]


def _table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of name and a cell for each run."""
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, cells: Iterable[object]) -> None:
        rows.append((name, [str(cell) for cell in cells]))

    every = sorted({source for run in runs for source in run.statistics.sources})
    for source in every:
        its = [run.statistics.sources.get(source) for run in runs]
        add(f"{source} texts", ("–" if one is None else f"{one.texts:,}" for one in its))
        add(f"{source} texts kept", ("–" if one is None else f"{one.accepted:,}" for one in its))
        ratios = [None if one is None else one.noise_ratio for one in its]
        add(
            f"{source}: noise ratio (rejected by the filter)",
            ("–" if one is None else f"{one:.1%}" for one in ratios),
        )
    add("unreadable images", (f"{run.statistics.unreadable:,}" for run in runs))
    said = [run.statistics.synthetic for run in runs]
    add("captions that no other equals", (f"{one.unique:.1%}" for one in said))
    for n in (1, 2, 3):
        add(f"distinct {n}-grams", (f"{one.distinct[n - 1]:.3f}" for one in said))
    for n in (1, 2, 3):
        add(f"entropy of {n}-grams, bits", (f"{one.entropy[n - 1]:.2f}" for one in said))
    add("words a caption", (f"{one.words:.1f}" for one in said))
    add("different words", (f"{one.vocabulary:,}" for one in said))
    return rows


def _histogram(runs: Mapping[str, Run]) -> str:
    """ITM of web and synthetic texts, a panel for each run."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 2.8), squeeze=False)
    for axis, (name, run) in zip(axes[0], runs.items(), strict=True):
        for source, counts in sorted(run.statistics.scores.items()):
            edges = [i / len(counts) for i in range(len(counts) + 1)]
            axis.stairs(
                counts, edges, fill=True, alpha=0.55, label=source, color=_COLOURS.get(source)
            )
        axis.axvline(run.config["threshold"], color="#444", linestyle="--", linewidth=1)
        axis.set_title(name)
        axis.set_xlabel("ITM probability")
        axis.set_yscale("log")
        if run.statistics.scores:
            axis.legend()
    return as_svg(figure)


@dataclass(frozen=True)
class _Card:
    image: str
    texts: list[Decision]


def _gallery(run: Run, seed: int) -> list[_Card]:
    """Some images with their texts, the ones with both kept and rejected texts first."""

    def order(rows: list[Decision]) -> tuple[bool, bytes]:
        name = f"{seed}/{rows[0].key}".encode()
        return len({row.accepted for row in rows}) < 2, hashlib.blake2b(name).digest()

    readable = (row for row in read_manifest(run.manifest) if row.text is not None)
    each = (list(rows) for _, rows in groupby(readable, key=lambda row: row.key))
    chosen = heapq.nsmallest(_CARDS, each, key=order)
    images = _images(run.config["input"], [rows[0].key for rows in chosen])
    return [_Card(images[rows[0].key], rows) for rows in chosen if rows[0].key in images]


def _images(pattern: str, keys: Sequence[str]) -> dict[str, str]:
    """Thumbnails of records by key; what cannot be read is left out. Equal keys: the first."""
    wanted, found = set(keys), dict[str, str]()
    reader = RecordReader()
    try:
        for shard in read_shards(pattern).shards:
            if len(found) == len(wanted):
                break
            index = index_shard(shard)
            for row, key in enumerate(index.keys.tolist()):
                name = key.decode()
                if name in wanted and name not in found:
                    try:
                        found[name] = thumbnail(reader.read(index, row).image)
                    except DataError:
                        continue
    finally:
        reader.close()
    return found


def write_labelling_page(labels: Sequence[Label], run: Run, output: Path) -> None:
    """A page on which one says of each text of a run whether it matches, and saves the label file.

    Beside the page the file is written as it is before anyone has labelled, for those who label
    elsewhere.
    """
    images = _images(run.config["input"], [label.key for label in labels])
    shown = [label for label in labels if label.key in images]
    lines = labels_to_json(shown)
    write_lines(output.with_suffix(".jsonl"), lines)
    cards = [
        (images[label.key], label.text, line) for label, line in zip(shown, lines, strict=True)
    ]
    page = template("blipfast.capfilt", "label.html.j2").render(
        cards=cards, name=output.with_suffix(".jsonl").name
    )
    write_lines(output, [page])


def write_calibration_page(curves: Mapping[str, Curve], output: Path) -> None:
    """Precision and recall of each kind of text, with the chosen threshold."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for kind, curve in curves.items():
        colour = _COLOURS[kind]
        at = f"{kind}: {curve.threshold:.3f}"
        axes[0].plot(curve.recall, curve.precision, color=colour, label=kind)
        axes[0].plot(curve.recall[curve.chosen], curve.precision[curve.chosen], "o", color=colour)
        axes[1].plot(curve.thresholds, curve.precision, color=colour, label=f"{kind}, precision")
        axes[1].plot(curve.thresholds, curve.recall, color=colour, linestyle=":", label="recall")
        axes[1].axvline(curve.threshold, color=colour, linewidth=0.8, label=at)
    for axis, x, y in ((axes[0], "recall", "precision"), (axes[1], "ITM threshold", "")):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(0, 1.03)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    page = template("blipfast.capfilt", "calibration.html.j2").render(
        curves=list(curves.values()), plot=as_svg(figure)
    )
    write_lines(output, [page])

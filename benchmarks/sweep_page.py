"""Operators over sizes: plots of time, memory and share of the roof, and a table of ratios."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import Row, best_of_ours, heading, is_ours, seconds

# What is plotted: its title, how it is read from a row, and the scale of its axis.
_PANELS: list[tuple[str, Any, str]] = [
    ("seconds", lambda row: row.median, "log"),
    ("MiB on top of the inputs", lambda row: max(row.extra["peak_mib"], 0.1), "log"),
    ("share of the roof", lambda row: row.extra["share_of_roof"], "linear"),
]
_OURS = ["#2a7f62", "#7fc4a8", "#b5ddcc", "#d8efe6"]
_OTHERS = ["#444444", "#c06a3a", "#8a6fb0", "#999999"]


def write_sweep_page(results: dict[str, Any], stem: Path) -> Path:
    """Writes `stem.md` and `stem.svg`; returns the page's path."""
    rows = [Row(**row) for row in results["rows"]]
    plot(rows, stem.with_suffix(".svg"))
    lines = [
        *heading(results),
        f"![operators over sizes]({stem.name}.svg)",
        "",
        "Memory is what a call needs on top of its inputs. The roof is the more of two: bytes that "
        "must be moved by a large copy's bandwidth, arithmetic by a large product's speed.",
        "",
        "| operator | over | code | size: seconds (times our fastest) |",
        "|---|---|---|---|",
        *(table_line(op, code, rows) for op, code in lines_of(rows)),
        "",
    ]
    page = stem.with_suffix(".md")
    page.write_text("\n".join(lines))
    return page


def lines_of(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Operator and code of each line of the plots, in the order of the measurement."""
    return list(dict.fromkeys((row.extra["op"], row.code) for row in rows))


def members(op: str, code: str, rows: Iterable[Row]) -> list[Row]:
    """The points of a line, by size."""
    found = [row for row in rows if (row.extra["op"], row.code) == (op, code)]
    return sorted(found, key=lambda row: row.extra["size"])


def table_line(op: str, code: str, rows: list[Row]) -> str:
    points = members(op, code, rows)
    cells = [
        f"{row.extra['size']:,}: {seconds(row.median)} "
        f"({row.median / best_of_ours(row.group, rows).median:.2f}x)"
        for row in points
    ]
    return f"| {op} | {points[0].extra['axis']} | {code} | {', '.join(cells)} |"


def plot(rows: list[Row], path: Path) -> None:
    """A row of panels for each operator."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    lines = lines_of(rows)
    ops = list(dict.fromkeys(op for op, _ in lines))
    figure, axes = plt.subplots(len(ops), 3, figsize=(11, 2.5 * len(ops)), squeeze=False)
    for op, panels in zip(ops, axes, strict=True):
        codes = [code for name, code in lines if name == op]
        greens, others = iter(_OURS), iter(_OTHERS)
        for code in codes:
            points = members(op, code, rows)
            colour = next(greens if is_ours(points[0]) else others)
            sizes = [row.extra["size"] for row in points]
            for axis, (_, value, _scale) in zip(panels, _PANELS, strict=True):
                axis.plot(sizes, list(map(value, points)), "o-", color=colour, ms=3, label=code)
        for axis, (title, _, scale) in zip(panels, _PANELS, strict=True):
            axis.set_xscale("log")
            axis.set_yscale(scale)
            axis.yaxis.set_minor_formatter("")  # names powers of ten alone
            if scale == "linear":
                axis.set_ylim(bottom=0)
            axis.set_xlabel(points[0].extra["axis"], fontsize=8)
            axis.set_title(f"{op}: {title}", fontsize=8, loc="left")
            axis.tick_params(labelsize=7)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        panels[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

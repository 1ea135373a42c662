"""The page of results: a table of ratios and a plot of times, as Markdown beside an SVG."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OURS = "blipfast"
_ON_CARD = "microseconds_on_card"
_FAR = 30  # times ours, from which on a plot is logarithmic


@dataclass(frozen=True)
class Row:
    """One code's time on one workload, in seconds."""

    group: str
    code: str
    median: float
    fastest: float
    slowest: float
    rounds: int
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_page(results: dict[str, Any], stem: Path) -> Path:
    """Writes `stem.md` and `stem.svg`; returns the page's path."""
    rows = [Row(**row) for row in results["rows"]]
    plot(rows, stem.with_suffix(".svg"))
    on_card = any(_ON_CARD in row.extra for row in rows)
    columns = ["work", "code", "seconds", "slowest to fastest", "times ours", "notes"]
    if on_card:
        columns.insert(4, "on the card")
    lines = [
        *heading(results),
        f"![times]({stem.name}.svg)",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(table_line(row, rows, on_card) for row in rows),
        "",
    ]
    page = stem.with_suffix(".md")
    page.write_text("\n".join(lines))
    return page


def heading(results: dict[str, Any]) -> list[str]:
    """What was run, where and how."""
    machine, versions = results["machine"], results["versions"]
    return [
        f"# {machine['name']}, {results['date']}",
        "",
        f"`{results['command']}`; {machine['details']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ". Random weights, base size; medians; each pair gave equal results before it was timed; "
        "freed memory is kept for all (`blipfast.environment.keep_freed_memory`).",
        "",
        *[line for note in results.get("notes", []) for line in (note, "")],
    ]


def best_of_ours(group: str, rows: list[Row]) -> Row:
    """Our row of a group; of several backends of ours the fastest; where none ran, of any code."""
    members = [row for row in rows if row.group == group]
    own = [row for row in members if is_ours(row)]
    return min(own or members, key=cost)


def cost(row: Row) -> float:
    """Seconds: of the card alone, where they were measured, since launches are the host's work."""
    on_card = row.extra.get(_ON_CARD)
    return row.median if on_card is None else 1e-6 * float(on_card)


def is_ours(row: Row) -> bool:
    return row.code in (OURS, "fused", "native", "torch", "triton", "triton_interpreter")


def table_line(row: Row, rows: list[Row], on_card: bool) -> str:
    ratio = cost(row) / cost(best_of_ours(row.group, rows))
    extra = dict(row.extra)
    card = extra.pop(_ON_CARD, None)
    notes = ", ".join(f"{name} {short(value)}" for name, value in extra.items())
    cells = [row.group, row.code, seconds(row.median)]
    cells.append(f"{seconds(row.slowest)} to {seconds(row.fastest)}")
    if on_card:
        cells.append("" if card is None else f"{card:.4g} us")
    return f"| {' | '.join([*cells, f'{ratio:.2f}', notes])} |"


def seconds(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(rows: list[Row], path: Path) -> None:
    """Horizontal bars: each code's time as a multiple of ours."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(row.group for row in rows))
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(8, 0.5 + 0.85 * len(groups)), squeeze=False, sharex=True
    )
    for axis, group in zip(axes[:, 0], groups, strict=True):
        mine = best_of_ours(group, rows)
        members = [row for row in rows if row.group == group][::-1]
        ratios = [cost(row) / cost(mine) for row in members]
        colours = ["#2a7f62" if is_ours(row) else "#b0b0b0" for row in members]
        bars = axis.barh([row.code for row in members], ratios, color=colours)
        axis.bar_label(bars, [f"{r:.1f}x" for r in ratios], padding=3, fontsize=7)
        axis.set_title(group, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    if max(cost(row) / cost(best_of_ours(row.group, rows)) for row in rows) > _FAR:
        axes[-1, 0].set_xscale("log")
    axes[-1, 0].set_xlabel("time, as a multiple of ours", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

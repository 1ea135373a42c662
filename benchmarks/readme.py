"""Writes the README's table and picture from the results: `python -m benchmarks.readme`.

One column, and one colour, for each machine that ran the suite, one row for each of the main jobs.
"""

from __future__ import annotations

import json
import re
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.report import Row, best_of_ours

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
PICTURE = RESULTS / "speedups.svg"
BEGIN, END = "<!-- python -m benchmarks.readme -->", "<!-- end -->"

# What a row says, its group in the results, and the baseline's code there.
_BOTH = [
    (
        "re-rank 64 texts for an image at 384 px",
        "ITM re-ranking, 1 image x 64 texts",
        "transformers",
    ),
    (
        "caption 4 images, beam 3, text side",
        "captioning, 4 images, beam 3, text side",
        "transformers",
    ),
    (
        "rank 128 of 3,128 answers for 2 questions",
        "VQA ranking, 2 x 128 answers, text side",
        "per-pass",
    ),
    (
        "the best of those answers, of a sharp model",
        "VQA, the best of 2 x 128 answers, sharp",
        "per-pass",
    ),
    ("pre-training step, batch 8", "pre-training step, batch 8", "original"),
    (
        "CapFilt, 16 images: a sampled caption, ITM and ITC of 2 texts each",
        "CapFilt, 16 images, 1 caption and the scores of 2 texts each",
        "transformers",
    ),
]
HEADLINES = [
    (f"{work}, {dtype}", f"{group}, {dtype}", code)
    for work, group, code in _BOTH
    for dtype in ("fp32", "bf16")
] + [
    ("decode 256 JPEGs of 640 x 480 by DALI", "decoding 256 JPEGs of 640 x 480", "Pillow"),
    (
        "the same from shards to batches, cropped to 224 px and augmented",
        "shards to batches of 224 px, 256 images",
        "Pillow",
    ),
]
_COLOURS = ["#2a7f62", "#c7683a", "#3b6ea8", "#8a5fa3", "#777777"]
_IN_WORDS = {"per-pass": "a pass per pair", "original": "the 2022 formulation"}


def table(machines: list[dict[str, Any]]) -> str:
    """Markdown of our seconds, the baseline's and their ratio; empty where a machine has none."""
    names = [f"[{m['machine']['name']}]({m['page']})" for m in machines]
    lines = [
        f"| seconds, ours and the baseline's | against | {' | '.join(names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for work, group, code in HEADLINES:
        cells = [cell(m["rows"], group, code) for m in machines]
        lines.append(f"| {work} | {_IN_WORDS.get(code, code)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(rows: list[Row], group: str, baseline: str) -> str:
    found = fastest(rows, group, baseline)
    if found is None:
        return ""
    ours, theirs = found
    return f"{ours:.3g}, {theirs:.3g}: **{theirs / ours:.1f}x**"


def fastest(rows: list[Row], group: str, baseline: str) -> tuple[float, float] | None:
    """Seconds of our fastest round and of the baseline's, if it was measured: what else runs on a
    machine only ever adds."""
    found = [row for row in rows if (row.group, row.code) == (group, baseline)]
    return (best_of_ours(group, rows).fastest, found[0].fastest) if found else None


def plot(machines: list[dict[str, Any]], path: Path) -> None:
    """How many times as fast as its baseline each job is, on each machine and in each dtype."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "blipfast", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    jobs: dict[str, list[tuple[str, str]]] = {}
    for work, group, code in HEADLINES:
        job = work.removesuffix(", fp32").removesuffix(", bf16")
        label = f"{job}, against {_IN_WORDS.get(code, code)}"
        jobs.setdefault(label, []).append((group, code))
    figure, axis = plt.subplots(figsize=(9.5, 0.6 + 0.45 * len(jobs)))
    for i, (machine, colour) in enumerate(zip(machines, cycle(_COLOURS), strict=False)):
        below = 0.5 * (i + 0.5) / len(machines) - 0.25  # a line for each machine
        for place, codes in enumerate(jobs.values()):
            for group, code in codes:
                found = fastest(machine["rows"], group, code)
                if found is not None:
                    ratio, face = found[1] / found[0], "none" if group.endswith("bf16") else colour
                    axis.plot(ratio, place + below, "o", color=colour, markerfacecolor=face)
        axis.plot([], [], "o", color=colour, label=machine["machine"]["name"])
    axis.plot([], [], "o", color="#555", markerfacecolor="none", label="bf16 (filled: fp32)")
    axis.axvline(1, color="#999", linewidth=1)
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 4, 8, 16, 32], ["as fast", *(f"{n}x" for n in (2, 4, 8, 16, 32))])
    axis.minorticks_off()
    axis.set_yticks(range(len(jobs)), list(jobs), fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e5e5e5")
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=7, loc="lower right", frameon=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def machines() -> list[dict[str, Any]]:
    """Results of the whole suite, the widest first."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        results = json.loads(path.read_text())
        rows = [Row(**row) for row in results["rows"]]
        if any(row.group == HEADLINES[0][1] for row in rows):
            page = path.with_suffix(".md").relative_to(README.parent)
            found.append({**results, "rows": rows, "page": page.as_posix()})
    return sorted(found, key=lambda results: -len(results["rows"]))


def updated(text: str, markdown: str) -> str:
    """The README with picture and table between its marks."""
    picture = f"![times as fast]({PICTURE.relative_to(README.parent)})"
    made = f"{BEGIN}\n{picture}\n\n{markdown}\n{END}"
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: made, text, flags=re.DOTALL)


if __name__ == "__main__":
    found = machines()
    plot(found, PICTURE)
    README.write_text(updated(README.read_text(), table(found)))
    print(README)

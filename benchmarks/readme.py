"""Writes the README's table from the results: `python -m benchmarks.readme`.

One column for each machine that ran the suite, one row for each of the main jobs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.report import Row, best_of_ours

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
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
    found = [row for row in rows if (row.group, row.code) == (group, baseline)]
    if not found:
        return ""
    # Of the fastest rounds: what else runs on a machine only ever adds.
    ours, theirs = best_of_ours(group, rows).fastest, found[0].fastest
    return f"{ours:.3g}, {theirs:.3g}: **{theirs / ours:.1f}x**"


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
    """The README with the table between its marks."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{markdown}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(updated(README.read_text(), table(machines())))
    print(README)

"""Writes the README's table from the results: `python -m benchmarks.readme`.

One column for each machine that ran the suite, one row for each of the main jobs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- python -m benchmarks.readme -->", "<!-- end -->"

TRANSFORMERS = "transformers"
# What a row says, its group in the results, and the baseline's name here and there.
_BOTH: list[tuple[str, str, str, str]] = [
    (
        "re-rank 64 texts for an image at 384 px",
        "ITM re-ranking, 1 image x 64 texts",
        *(TRANSFORMERS, TRANSFORMERS),
    ),
    (
        "caption 4 images, beam 3, text side",
        "captioning, 4 images, beam 3, text side",
        *(TRANSFORMERS, TRANSFORMERS),
    ),
    (
        "rank 128 of 3,128 answers for 2 questions",
        "VQA ranking, 2 x 128 answers, text side",
        *("a pass per pair", "per-pass"),
    ),
    (
        "pre-training step, batch 8",
        "pre-training step, batch 8",
        *("the 2022 formulation", "original"),
    ),
    (
        "CapFilt, 16 images: a sampled caption, ITM and ITC of 2 texts each",
        "CapFilt, 16 images, 1 caption and the scores of 2 texts each",
        *(TRANSFORMERS, TRANSFORMERS),
    ),
]
HEADLINES = [
    (f"{work}, {dtype}", f"{group}, {dtype}", against, code)
    for work, group, against, code in _BOTH
    for dtype in ("fp32", "bf16")
] + [
    ("decode 256 JPEGs of 640 x 480 by DALI", "decoding 256 JPEGs of 640 x 480", "Pillow", "Pillow")
]


def table(machines: list[dict[str, Any]]) -> str:
    """Markdown of our seconds, the baseline's and their ratio; empty where a machine has none."""
    names = [f"[{m['machine']['name']}]({m['page']})" for m in machines]
    lines = [
        f"| seconds, ours and the baseline's | against | {' | '.join(names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for work, group, against, code in HEADLINES:
        cells = [cell(m["rows"], group, code) for m in machines]
        lines.append(f"| {work} | {against} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(rows: list[dict[str, Any]], group: str, baseline: str) -> str:
    # Of the fastest rounds: what else runs on a machine only ever adds.
    times = {row["code"]: row["fastest"] for row in rows if row["group"] == group}
    others = [seconds for code, seconds in times.items() if code.split(",")[0] != baseline]
    if baseline not in times or not others:
        return ""
    ours, theirs = min(others), times[baseline]
    return f"{ours:.3g}, {theirs:.3g}: **{theirs / ours:.1f}x**"


def machines() -> list[dict[str, Any]]:
    """Results of the whole suite, the widest first."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        results = json.loads(path.read_text())
        if any(row["group"] == HEADLINES[0][1] for row in results["rows"]):
            page = path.with_suffix(".md").relative_to(README.parent)
            found.append({**results, "page": page.as_posix()})
    return sorted(found, key=lambda results: -len(results["rows"]))


def updated(text: str, markdown: str) -> str:
    """The README with the table between its marks."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{markdown}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(updated(README.read_text(), table(machines())))
    print(README)

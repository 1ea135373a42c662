"""The site builds strictly, from the project's own results and docstrings; nothing is fetched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        "docs/mkdocs.yml",
        "-d",
        str(folder),
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_measured_figures_are_the_committed_ones(site: Path) -> None:
    page = (site / "results" / "index.html").read_text()
    table = (ROOT / "benchmarks" / "results" / "intel-xeon-processor.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| CapFilt")]
    assert rows
    for row in rows:
        assert row.split("|")[3].strip() in page
    assert (site / "results" / "intel-xeon-processor.svg").is_file()


@pytest.mark.slow
def test_the_api_page_has_what_can_be_imported(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    import blipfast.ops

    for name in blipfast.ops.__all__:
        assert f"<code>{name}</code>" in page, name


@pytest.mark.slow
def test_pages_ask_nobody_else(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        for tag, address in re.findall(
            r"<(script|link|img)\b[^>]*?(?:src|href)=\"([^\"]+)\"", text
        ):
            assert not address.startswith(("http:", "https:", "//")), (page, tag, address)


@pytest.mark.slow
def test_pictures_are_whole(site: Path) -> None:
    """Every picture that a page shows is there, and its words lie inside it."""
    shown = set()
    for page in (ROOT / "docs" / "pages").glob("*.md"):
        shown |= set(re.findall(r"\(pictures/([\w-]+)\.svg\)", page.read_text()))
    assert shown == {path.stem for path in (site / "pictures").glob("*.svg")}
    for name in shown:
        root = ET.fromstring((site / "pictures" / f"{name}.svg").read_text())
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for text in root.iter("{http://www.w3.org/2000/svg}text"):
            x, y, size = (float(text.attrib[key]) for key in ("x", "y", "font-size"))
            length = 0.57 * size * len(text.text or "")
            left = x - length / 2 if text.attrib["text-anchor"] == "middle" else x
            assert left >= 0, (name, text.text)
            assert left + length <= width + 2, (name, text.text)
            assert size <= y <= height, (name, text.text)

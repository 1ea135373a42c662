"""The report of the main job: one HTML file with everything in it."""

from __future__ import annotations

import base64
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from blipfast.capfilt import Decision
from blipfast.data.records import image_extension
from blipfast.demo.concepts import CONCEPTS
from blipfast.demo.figures import filter_plots, loss_curves
from blipfast.demo.result import DemoResult
from blipfast.demo.scenes import DemoRecord
from blipfast.errors import DataError
from blipfast.evaluation.page import template

_GALLERY = 24
_EXAMPLES = 8


@dataclass(frozen=True)
class Card:
    """One picture of the gallery with the decisions about its texts."""

    image: str
    texts: list[Decision]
    web_is_wrong: bool
    noise_kind: str


@dataclass(frozen=True)
class Example:
    """A held-out text, its own picture and the three that the model ranks first."""

    text: str
    image: str
    found: list[tuple[str, bool]]
    noisy_caption: str
    bootstrapped_caption: str


def data_uri(image: bytes) -> str:
    """An encoded image as a `data:` address."""
    kind = image_extension(image).replace("jpg", "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def write_page(result: DemoResult, path: Path) -> Path:
    """Writes the page whole, and returns its path. Raises DataError when it cannot."""
    html = render_page(result)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write the page {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render_page(result: DemoResult) -> str:
    """The page as a string."""
    histories = {
        "noisy": result.noisy.pretraining,
        "bootstrapped": result.bootstrapped.pretraining,
    }
    return template("blipfast.demo", "page.html.j2").render(
        r=result,
        s=result.settings,
        rows=comparison_rows(result),
        curves=loss_curves(histories),
        filter_svg=filter_plots(result.filter, result.settings.threshold),
        gallery=gallery(result.data.web, result.decisions),
        examples=examples(result),
        concepts=list(CONCEPTS)[: result.settings.num_concepts],
    )


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    name: str
    noisy: float
    bootstrapped: float
    chance: float | None = None

    @property
    def gain(self) -> float:
        return self.bootstrapped - self.noisy


def comparison_rows(result: DemoResult) -> list[Row]:
    """Recall both ways at 1, 5, 10, by ITC and re-ranked; CIDEr, and captions that are right."""
    rows = []
    for stage, title in (("itc", "ITC alone"), ("itm", "re-ranked by ITM")):
        for way, words in (("tr", "image to text"), ("ir", "text to image")):
            for k in (1, 5, 10):
                noisy, better = (
                    getattr(getattr(side.retrieval, stage), f"{way}_r{k}")
                    for side in (result.noisy, result.bootstrapped)
                )
                chance = result.noisy.retrieval.chance(k)
                rows.append(Row(f"{words} R@{k}, {title}", noisy, better, chance))
    for kind, words in (("captions", "new pairs"), ("known_captions", "known pairs")):
        before, after = (getattr(side, kind) for side in (result.noisy, result.bootstrapped))
        rows.append(Row(f"CIDEr, {words}", 100 * before.cider, 100 * after.cider))
        rows.append(Row(f"right captions, %, {words}", 100 * before.right, 100 * after.right))
    return rows


def gallery(records: list[DemoRecord], decisions: list[Decision]) -> list[Card]:
    """Pictures for the gallery: half with wrong web texts, half with right ones, in order."""
    by_key = defaultdict(list)
    for decision in decisions:
        if decision.text is not None:
            by_key[decision.key].append(decision)
    halves = ([r for r in records if not r.is_correct], [r for r in records if r.is_correct])
    chosen = [r for half in halves for r in half[: _GALLERY // 2]]
    return [Card(data_uri(r.image), by_key[r.key], not r.is_correct, r.noise_kind) for r in chosen]


def examples(result: DemoResult) -> list[Example]:
    """The first held-out texts, whatever was found for them."""
    test = result.data.test
    images = [data_uri(r.image) for r in test]
    found = result.bootstrapped.retrieval.best_images
    return [
        Example(
            test[i].caption,
            images[i],
            [(images[j], j == i) for j in found[i]],
            result.noisy.captions.captions[i],
            result.bootstrapped.captions.captions[i],
        )
        for i in range(min(_EXAMPLES, len(test)))
    ]

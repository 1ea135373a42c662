"""One HTML file on an evaluation: the numbers, and pictures of right and of wrong answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from blipfast.data import load_image
from blipfast.evaluation.outcome import Example, Outcome

_HEIGHT = 130  # pixels of a thumbnail
_WIDEST = 4 * _HEIGHT


@dataclass(frozen=True)
class _Card:
    images: list[str]
    example: Example


def flat_rows(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of each number and word of nested metrics; lists are left out."""
    for name, value in metrics.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flat_rows(value, f"{full} · ")
        elif isinstance(value, float):
            yield full, f"{value:,.2f}"
        elif isinstance(value, int):
            yield full, f"{value:,}"
        elif isinstance(value, str):
            yield full, value


def thumbnail(image: bytes) -> str:
    """A small JPEG of an encoded image as a `data:` address. Raises DataError as `load_image`."""
    small = load_image(image)
    small.thumbnail((_WIDEST, _HEIGHT), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def template(package: str, name: str) -> Template:
    """A page's template that lies in a package; what is filled in is escaped and must be there."""
    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render_page(title: str, metrics: Mapping[str, Any], outcome: Outcome) -> str:
    """The page, with everything in it."""
    words = (*outcome.words, "the truth is withheld")
    groups: list[tuple[str, list[_Card]]] = []
    for word, kind in zip(words, (True, False, None), strict=True):
        chosen = [one for one in outcome.examples if one.right is kind]
        cards = [_Card([thumbnail(image) for image in one.images], one) for one in chosen]
        if cards:
            groups.append((word, cards))
    page = template("blipfast.evaluation", "page.html.j2")
    return page.render(title=title, rows=list(flat_rows(metrics)), groups=groups)

"""Plots for pages, as inline SVG."""

from __future__ import annotations

import io
from typing import Any

from blipfast.errors import BlipfastError


def pyplot() -> Any:
    """matplotlib's, drawing to files. Raises BlipfastError, saying how to get it."""
    try:
        import matplotlib
    except ImportError as error:
        raise BlipfastError("the page needs matplotlib: pip install 'blipfast[demo]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def as_svg(figure: Any) -> str:
    """A matplotlib figure as an `<svg>` element; the figure is closed."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]

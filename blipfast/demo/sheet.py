"""A contact sheet: pictures with their texts on one page, to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from blipfast.errors import DataError

if TYPE_CHECKING:
    from blipfast.demo.scenes import DemoRecord


def contact_sheet(records: Sequence[DemoRecord], path: str | Path, columns: int = 6) -> Path:
    """Draw pictures with their texts (wrong ones in red) on one PNG.

    Returns:
        The path, written whole.
    """
    if not records or columns < 1:
        raise DataError("a contact sheet needs at least one record and one column")
    side = max(record.image_size for record in records)
    width, height = side + 120, side + 56
    rows = -(-len(records) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, record in enumerate(records):
        x, y = i % columns * width + 4, i // columns * height + 4
        sheet.paste(Image.open(io.BytesIO(record.image)), (x, y))
        line, lines = "", []
        for word in record.caption.split():
            if line and pen.textlength(f"{line} {word}", font) > width - 8:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        colour = "black" if record.is_correct else "red"
        pen.multiline_text((x, y + side + 2), "\n".join([*lines, line]), colour, font)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    sheet.save(temporary, "PNG")
    temporary.replace(target)
    return target

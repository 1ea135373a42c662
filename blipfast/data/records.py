"""What one shard record is, and how it looks inside a tar."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blipfast.errors import DataError

_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_MAX_KEY = 90  # with its extension a name then fits a plain tar header
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


@dataclass(frozen=True)
class TextEntry:
    """One text of an image and where it came from ("web", "synthetic", "human")."""

    text: str
    source: str


@dataclass(frozen=True)
class Record:
    """One image with its texts.

    Attributes:
        key: name inside the shard: letters, digits, "_", "-", "/"; no dot.
        image: the encoded image.
        texts: its texts, at least one.
        ids: what the image is called elsewhere, e.g. ``{"image": 17}``.
        width: pixels.
        height: pixels.
    """

    key: str
    image: bytes
    texts: tuple[TextEntry, ...]
    width: int
    height: int
    ids: Mapping[str, int | str] = field(default_factory=dict)


def image_extension(image: bytes) -> str:
    """File extension by the first bytes. Raises `DataError` for an unknown format."""
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    raise DataError("image bytes are neither JPEG, PNG, WebP nor GIF; convert the image first")


def record_to_members(record: Record) -> list[tuple[str, bytes]]:
    """Member names and contents of a record. Raises `DataError` naming the key."""
    if not _KEY.fullmatch(record.key) or len(record.key) > _MAX_KEY:
        raise DataError(
            f"key {record.key!r}: use letters, digits, '_', '-' and '/', {_MAX_KEY} at most"
        )
    try:
        extension = image_extension(record.image)
    except DataError as error:
        raise DataError(f"record {record.key}: {error}") from error
    body = {
        "texts": [{"text": entry.text, "source": entry.source} for entry in record.texts],
        "ids": dict(record.ids),
        "width": record.width,
        "height": record.height,
    }
    _check_body(body, f"record {record.key}")
    encoded = json.dumps(body, ensure_ascii=False, sort_keys=True)
    try:
        content = encoded.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"record {record.key}: a text holds undecodable bytes") from error
    return [(f"{record.key}.{extension}", record.image), (f"{record.key}.json", content)]


def record_from_members(key: str, members: Mapping[str, bytes]) -> Record:
    """A record from its members by extension. Raises `DataError` with the reason."""
    images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        raise DataError(f"{len(images)} image members, expected one" if images else "no image")
    if "json" not in members:
        raise DataError("no json member")
    body = parse_body(members["json"])
    texts = tuple(TextEntry(entry["text"], entry["source"]) for entry in body["texts"])
    return Record(key, members[images[0]], texts, body["width"], body["height"], dict(body["ids"]))


def parse_body(content: bytes) -> dict[str, Any]:
    """The texts, ids and size of a record's JSON member. Raises `DataError` with the reason."""
    try:
        body = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"json cannot be read ({error})") from error
    _check_body(body, "json")
    return body


def _check_body(body: Any, name: str) -> None:
    if not isinstance(body, dict):
        raise DataError(f"{name}: not an object with texts, ids, width and height")
    texts = body.get("texts")
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{name}: texts must be a list with at least one entry")
    for entry in texts:
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(part), str) for part in ("text", "source")
        ):
            raise DataError(f"{name}: each text needs the strings text and source")
    for part in ("width", "height"):
        if not _is_int(body.get(part)) or body[part] < 1:
            raise DataError(f"{name}: {part} must be a whole number of pixels, at least 1")
    ids = body.get("ids")
    if not isinstance(ids, dict) or not all(_is_int(v) or isinstance(v, str) for v in ids.values()):
        raise DataError(f"{name}: ids must map names to whole numbers or strings")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""One's own images: a folder with captions beside them, or in one list."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blipfast.data.prepare.source import (
    DataSet,
    Item,
    Source,
    Split,
    by_image,
    key_of,
    texts,
)
from blipfast.data.records import IMAGE_EXTENSIONS
from blipfast.errors import DataError

_LISTS = tuple(f"{stem}.{kind}" for stem in ("captions", "metadata") for kind in ("csv", "jsonl"))
_IMAGE, _TEXT = ("image", "file_name"), ("caption", "text")
_FILES = """\
  images, in folders below too, and their captions in one of two ways:
  photo.txt beside photo.jpg, one caption a line; or
  captions.csv or captions.jsonl with the columns image (a path in the folder) and caption"""
_SHOWN = 5


def _folder(source: Source, split: str) -> Iterator[Item]:
    images = sorted(
        path
        for path in source.folder.rglob("*")
        if path.is_file()
        and path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(source.folder).parts)
    )
    if not images:
        raise DataError(f"{source.folder} has no images. Expected:\n{source.expected}")
    name = next((name for name in _LISTS if source.has(name)), None)
    found = _from_list(source, source.folder / name) if name else _beside(source, images)
    without = [path for path in images if not found.get(path)]
    if without:
        shown = ", ".join(str(path.relative_to(source.folder)) for path in without[:_SHOWN])
        more = f" and {len(without) - _SHOWN:,} more" if len(without) > _SHOWN else ""
        where = f"add them to {name}" if name else "write a .txt of the same name beside each"
        raise DataError(
            f"{len(without):,} of {len(images):,} images in {source.folder} have no caption: "
            f"{shown}{more}; {where}, or move them out of the folder"
        )
    keys: dict[str, str] = {}
    for path in images:
        place = path.relative_to(source.folder).as_posix()
        key = key_of(place)
        if other := keys.get(key):
            raise DataError(
                f"{source.folder}: {other} and {place} would both be the record {key}; rename one"
            )
        keys[key] = place
        yield Item(key, path, texts("human", *found[path]), {"image": place})


def _beside(source: Source, images: list[Path]) -> dict[Path, list[str]]:
    found = {}
    for path in images:
        beside = path.with_suffix(".txt")
        if beside.is_file():
            lines = source.text(beside).splitlines()
            found[path] = [line.strip() for line in lines if line.strip()]
    return found


def _from_list(source: Source, path: Path) -> dict[Path, list[str]]:
    """Captions by image. Raises DataError for a row without image or caption, or of no image."""
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(source.text(path).removeprefix("\ufeff")))
        rows = list(enumerate(reader, 2))
    else:
        rows = list(enumerate(source.lines(path), 1))
    pairs = []
    for number, row in rows:
        image, caption = (_value(path, number, row, names) for names in (_IMAGE, _TEXT))
        if not isinstance(image, str) or not (source.folder / image).is_file():
            raise DataError(f"{path}, row {number}: there is no image {image!r} in {source.folder}")
        several = caption if isinstance(caption, list) else [caption]
        if not all(isinstance(one, str) for one in several):
            shown = json.dumps(caption)
            raise DataError(f"{path}, row {number}: the caption of {image} is {shown}, not text")
        pairs += [(image, one.strip()) for one in several if one.strip()]
    return {source.folder / image: captions for image, captions in by_image(pairs).items()}


def _value(path: Path, number: int, row: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        if isinstance(row, dict) and row.get(name) is not None:
            return row[name]
    columns = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
    raise DataError(
        f"{path}, row {number}: no {' or '.join(names)}; there are the columns {columns}"
    )


SETS = (DataSet("folder", _FILES, {"train": Split()}, _folder),)

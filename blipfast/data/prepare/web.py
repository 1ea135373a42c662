"""Noisy pairs from the web, as img2dataset has downloaded them: SBU, CC3M, CC12M, LAION."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from blipfast.data.prepare.source import DataSet, Item, Source, Split, key_of, rows_of, texts
from blipfast.data.records import IMAGE_EXTENSIONS
from blipfast.errors import DataError

_FILES = """\
  00000.tar, 00001.tar, … (img2dataset --output_format webdataset), or
  00000/000000000.jpg, .txt, … (img2dataset --output_format files), or
  {name}.json: a list of {{"image": path, "caption": text}}, and the images"""


def _web(source: Source, split: str) -> Iterator[Item]:
    shards = sorted(source.folder.glob("[0-9]*.tar"))
    folders = sorted(p for p in source.folder.glob("[0-9]*") if p.is_dir())
    if shards:
        for shard in shards:
            yield from _tar(shard)
    elif folders:
        for folder in folders:
            yield from _folder(folder)
    else:
        path = source.find(f"{source.folder.name}.json", "captions.json")
        for number, row in enumerate(rows_of(path, source.json(path), "image", "caption")):
            place = source.folder / row["image"]
            yield Item(
                f"{number:09d}", place, texts("web", row["caption"]), {"image": row["image"]}
            )


def _tar(shard: Path) -> Iterator[Item]:
    """img2dataset's tars: an image, its caption in .txt and what is known of it in .json."""
    try:
        with tarfile.open(shard, mode="r:") as tar:
            key, members = "", dict[str, bytes]()
            for info in tar:
                stem, _, extension = info.name.partition(".")
                if stem != key and members:
                    yield _item(f"{shard.stem}/{key}", members, str(shard))
                    members = {}
                key = stem
                stream = tar.extractfile(info)
                members[extension.lower()] = b"" if stream is None else stream.read()
            if members:
                yield _item(f"{shard.stem}/{key}", members, str(shard))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard} cannot be read further ({error}); download it again") from error


def _folder(folder: Path) -> Iterator[Item]:
    names: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        names.setdefault(path.name.partition(".")[0], {})[path.suffix[1:].lower()] = path
    for stem, paths in names.items():
        yield _item(
            f"{folder.name}/{stem}", {e: p.read_bytes() for e, p in paths.items()}, str(folder)
        )


def _item(key: str, members: dict[str, bytes], where: str) -> Item:
    facts = {}
    if "json" in members:
        try:
            facts = json.loads(members["json"])
        except ValueError as error:
            raise DataError(f"{where}, {key}: its .json cannot be read ({error})") from error
    caption = members.get("txt", b"").decode("utf-8", errors="surrogateescape")
    caption = caption or facts.get("caption") or ""
    image = next((content for e, content in members.items() if e in IMAGE_EXTENSIONS), b"")
    ids: dict[str, int | str] = {"image": facts.get("sha256") or key}
    if facts.get("url"):
        ids["url"] = facts["url"]
    return Item(key_of(f"{key}."), image, texts("web", caption), ids)


SETS = tuple(
    DataSet(name, _FILES.format(name=name), {"train": Split()}, _web)
    for name in ("sbu", "cc3m", "cc12m", "laion")
)

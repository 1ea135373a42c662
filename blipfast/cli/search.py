"""`blipfast search`: the pictures of a folder that fit a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blipfast.cli._parsing import make_parser, parse

if TYPE_CHECKING:
    from blipfast.serve.folder import Found

_EXAMPLES = """\
  blipfast search photos/ "a dog on a beach" --checkpoint runs/retrieval/model
  blipfast search photos/ "a dog" "a cat" --checkpoint model_base_retrieval_coco.pth \\
      --vocabulary vocab.txt --index photos.safetensors --count 5 --json"""


def main(argv: Sequence[str]) -> int:
    from blipfast.cli import _inputs

    parser = make_parser(
        "search",
        "The pictures of a folder that fit a text, best first: found by ITC, re-ranked by ITM. "
        "With --index features are kept, of several folders in one file, and the next search "
        "reads only new and changed pictures. "
        "A picture that cannot be read is named on stderr; the others go on and the status is 1.",
        _EXAMPLES,
    )
    parser.add_argument("folder", type=str, help="a folder of pictures, or a picture")
    parser.add_argument("texts", type=str, nargs="+", help="what to look for")
    _inputs.add_model_options(parser)
    parser.add_argument("--count", type=int, default=10, help="pictures for each text")
    parser.add_argument("--candidates", type=int, default=16, help="pictures that ITM re-ranks")
    parser.add_argument("--index", type=str | None, default=None, help="file for the features")
    parser.add_argument("--batch_size", type=int, default=8, help="images at once")
    parser.add_argument("--json", action="store_true", help="JSON Lines: text, image, itm, itc")
    return _run(**parse(parser, argv))


def _run(
    folder: str, texts: list[str], checkpoint: str, vocabulary: str | None, image_size: int | None,
    device: str, precision: str, count: int, candidates: int, index: str | None, batch_size: int,
    json: bool,
) -> int:  # fmt: skip
    from pathlib import Path

    from blipfast.cli import _inputs
    from blipfast.errors import ConfigError, DataError
    from blipfast.serve.folder import FolderIndex, find_images

    if min(count, candidates) < 1:
        raise ConfigError("--count and --candidates must be at least 1")
    paths = find_images([folder])
    model, tokenizer, where = _inputs.load_for(
        "retrieval", checkpoint, vocabulary, device, image_size
    )
    failed: list[DataError] = []

    def on_failed(error: DataError) -> None:
        failed.append(error)
        _inputs.say_failed(error)

    with _inputs.reading(len(paths)) as on_read, _inputs.autocast(where, precision):
        features = FolderIndex.build(
            paths, model, batch_size=batch_size, file=None if index is None else Path(index),
            on_failed=on_failed, on_read=on_read,
        )  # fmt: skip
        found = features.search(
            model, tokenizer, texts, count=count, candidates=candidates, batch_size=batch_size
        )
    for text, its in zip(texts, found, strict=True):
        _print_json(text, its) if json else _print_table(text, its)
    return 1 if failed else 0


def _print_json(text: str, found: list[Found]) -> None:
    for one in found:
        row = {"text": text, "image": str(one.path), "itm": one.itm, "itc": one.itc}
        print(json.dumps(row, ensure_ascii=False))


def _print_table(text: str, found: list[Found]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("picture", "ITM", "ITC", title=escape(text), title_justify="left", box=None)
    for one in found:
        table.add_row(escape(str(one.path)), f"{one.itm:.4f}", f"{one.itc:+.4f}")
    console = Console()
    if not console.is_terminal:  # a pipe takes lines of any length
        console = Console(width=10_000)
    console.print(table)

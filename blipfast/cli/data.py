"""`blipfast data prepare|inspect`: data sets to shards, and what is in shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from blipfast.cli._parsing import make_parser, parse

_EXAMPLES = """\
  # COCO's Karpathy splits; --help after a name lists the files it needs
  blipfast data prepare coco --source /data/coco --output /data/shards/coco
  blipfast data prepare vqa --source /data/vqa --output /data/shards/vqa --split train

  # what img2dataset has downloaded; its number of pairs differs by day
  blipfast data prepare cc3m --source /data/cc3m --output /data/shards/cc3m

  # your own: photo.jpg with photo.txt beside it, or captions.csv
  blipfast data prepare folder --source my_photos/ --output shards/mine

  # a part of a data set only
  blipfast data prepare nlvr2 --source sample/ --output shards/ --split dev --any_count

  blipfast data inspect /data/shards/coco"""


def main(argv: Sequence[str]) -> int:
    if list(argv[:1]) == ["inspect"]:
        return _inspect(argv[1:])
    return _prepare(argv)


def _prepare(argv: Sequence[str]) -> int:
    from blipfast.data.prepare import DATA_SETS

    wanted = DATA_SETS.get(argv[1]) if len(argv) > 1 else None
    about = "Writes a data set's own files as shards: " + ", ".join(DATA_SETS) + "."
    if wanted is not None:
        counts = (
            f"{name} {split.records:,}" if split.records else name
            for name, split in wanted.splits.items()
        )
        about = f"{wanted.name}: expected in the source folder:\n{wanted.files}\n"
        about += f"splits and published records: {', '.join(counts)}"
    parser = make_parser("data", about, _EXAMPLES)
    parser.add_argument("action", type=Literal["prepare", "inspect"], help="what to do")
    parser.add_argument("name", type=str, help="of the data set")
    parser.add_argument("--source", type=str, required=True, help="folder with its files")
    parser.add_argument("--output", type=str, required=True, help="folder for the shards")
    parser.add_argument("--split", type=str | None, default=None, help="one; by default all")
    parser.add_argument("--verify", type=bool, default=True, help="decode every image fully")
    parser.add_argument("--any_count", action="store_true", help="accept a partial download")
    parser.add_argument("--threads", type=int, default=4, help="that read and decode images")
    parser.add_argument("--max_count", type=int, default=1000, help="records to a shard")
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.01,
        help="share of unusable records that ends the run",
    )  # fmt: skip
    values = parse(parser, argv)
    return _run(values)


def _run(values: dict[str, Any]) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from blipfast.data.prepare import data_set, prepare_split

    chosen = data_set(values["name"])
    splits = list(chosen.splits) if values["split"] is None else [values["split"]]
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    bad = 0
    with Progress(*columns) as progress:
        for split in splits:
            known = chosen.splits.get(split)
            total = None if known is None else known.records
            task = progress.add_task(f"{chosen.name} {split}", total=total)
            done = prepare_split(
                chosen, split, values["source"], values["output"],
                verify=values["verify"], any_count=values["any_count"],
                threads=values["threads"], max_count=values["max_count"],
                max_bad_fraction=values["max_bad_fraction"],
                on_record=partial(progress.advance, task),
            )  # fmt: skip
            bad += done.bad
            progress.console.print(
                f"{chosen.name} {split}: {done.records:,} records, {done.texts:,} texts, "
                f"{len(done.shards):,} shards, {done.bad:,} set aside"
            )
    return 1 if bad else 0


def _inspect(argv: Sequence[str]) -> int:
    parser = make_parser("data inspect", "What is in shards, as JSON.", _EXAMPLES)
    parser.add_argument("shards", type=str, help="folder, file or glob of .tar")
    parser.add_argument("--first", type=int, default=3, help="records to show")
    values = parse(parser, argv)
    from blipfast.data import read_shards
    from blipfast.data.index import RecordReader, index_shards

    indexes, reader = index_shards(read_shards(values["shards"]).shards), RecordReader()
    words = Counter[int]()
    for index in indexes:
        words.update(index.words.tolist())
    shown: list[dict[str, Any]] = []
    for index in indexes:
        for row in range(min(len(index), values["first"] - len(shown))):
            record = reader.read(index, row)
            shown.append(
                {
                    "key": record.key, "size": f"{record.width} x {record.height}",
                    "bytes": len(record.image), "ids": dict(record.ids),
                    "texts": [f"{t.source}: {t.text}" for t in record.texts[:8]],
                }
            )  # fmt: skip
    lengths = sorted(words.elements())
    summary = {
        "shards": len(indexes),
        "records": sum(len(index) for index in indexes),
        "texts": len(lengths),
        "words of a text": {
            "median": lengths[len(lengths) // 2] if lengths else 0,
            "longest": max(lengths, default=0),
        },
        "unusable": [[b.shard, b.key, b.reason] for index in indexes for b in index.bad][:20],
        "first": shown,
    }
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    return 0

"""`blipfast capfilt`: caption web images, filter both kinds of text (section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from blipfast.capfilt.config import CapFiltConfig
from blipfast.cli._parsing import add_dataclass, make_parser, parse_as

_EXAMPLES = """\
  blipfast capfilt --input web/ --output clean/ --captioner runs/caption/model \\
      --filter runs/filter/model
  blipfast capfilt --config capfilt.yaml --threshold 0.7 --method beam"""

_HELP = {
    "input": "folder, file or glob of .tar shards",
    "output": "folder for the new shards and the manifest",
    "captioner": "checkpoint that writes captions",
    "filter": "checkpoint that judges texts",
    "vocabulary": "vocab.txt; by default the one beside the filter",
    "method": "nucleus samples diverse captions, as in the paper; beam searches",
    "captions_per_image": "synthetic texts for each image, all judged",
    "prompt": "what a caption follows",
    "threshold": "ITM probability from which a text is kept",
    "synthetic_threshold": "the same for synthetic texts, where it is another",
    "keep": "which texts may enter the new set",
    "trusted": "sources whose texts enter it unjudged",
    "seed": "of the sampling",
    "batch_size": "images at once",
    "max_bad_fraction": "share of unreadable records in a shard that stops the run",
    "precision": "bf16 computes under autocast",
    "device": "cpu or cuda",
}


def main(argv: Sequence[str]) -> int:
    parser = make_parser(
        "capfilt",
        "Captions the images of shards, judges web and synthetic texts by ITM and writes the texts "
        "that match as new shards, with a manifest of every decision. A run that was stopped goes "
        "on where it was.",
        _EXAMPLES,
        usage="blipfast capfilt [--config FILE] --input SHARDS --output FOLDER [--OPTION ...]",
    )
    add_dataclass(parser, CapFiltConfig, helps=_HELP)
    config = parse_as(CapFiltConfig, parser, argv)
    from blipfast.capfilt import run_capfilt

    report = run_capfilt(config)
    for source, count in report.texts.items():
        print(f"{source}: {report.accepted.get(source, 0)} of {count} texts accepted")
    print(f"{report.kept} of {report.images} images kept, {report.unreadable} unreadable")
    print(report.manifest)
    return 0

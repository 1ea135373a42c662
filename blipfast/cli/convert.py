"""`blipfast convert`: checkpoints to another format or task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from blipfast.cli._parsing import make_parser, parse

_EXAMPLES = """\
  blipfast convert model_base_caption.pth caption-hf --to hf
  blipfast convert Salesforce-blip-dir/ ours/ --to blipfast
  blipfast convert model_base.pth scorer/ --to blipfast --task retrieval"""


def main(argv: Sequence[str]) -> int:
    parser = make_parser(
        "convert",
        "Reads an original .pth, a Hugging Face directory or one of blipfast's and writes another "
        "format. Every tensor is accounted for: the report says what became of it.",
        _EXAMPLES,
    )
    parser.add_argument("source", type=str, help="checkpoint to read")
    parser.add_argument("target", type=str, help="directory to write")
    parser.add_argument("--to", type=Literal["hf", "blipfast"], required=True, help="format")
    parser.add_argument(
        "--task", type=str | None, default=None, help="what to make of it; by default what it is"
    )
    parser.add_argument(
        "--image_size", type=int | None, default=None, help="interpolate the positions to this size"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the target")
    parser.add_argument(
        "--allow_fresh", action="store_true", help="let parts that do not fit start at random"
    )
    values = parse(parser, argv)
    from blipfast.checkpoints import convert

    report = convert(
        values["source"], values["target"], values["to"], values["task"],
        overwrite=values["overwrite"], image_size=values["image_size"],
        allow_fresh=values["allow_fresh"],
    )  # fmt: skip
    print(report)
    print(values["target"])
    return 0

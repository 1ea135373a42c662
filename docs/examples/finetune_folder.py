"""Fine-tune a captioner on your own folder of pictures with captions, in one command.

    python docs/examples/finetune_folder.py my_photos/ --checkpoint model_base.pth \\
        --vocabulary vocab.txt --output runs/mine

The folder has photo.txt beside photo.jpg, a caption a line, or one list, captions.csv, with the
columns image and caption. What may follow are options of `blipfast train`, as --fit.epochs 3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from blipfast.cli import main as blipfast


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="pictures and their captions")
    parser.add_argument("--checkpoint", required=True, help="the model to start from")
    parser.add_argument("--vocabulary", required=True, help="its vocab.txt")
    parser.add_argument("--output", default="runs/mine", help="for the shards and the model")
    own, more = parser.parse_known_args(argv)
    shards, run = Path(own.output) / "shards", Path(own.output) / "captioner"
    if not list(shards.glob("*.tar")):
        status = blipfast(
            ["data", "prepare", "folder", "--source", own.folder, "--output", str(shards)]
        )
        if status:
            return status
    status = blipfast(
        [
            "train", "--config", "caption_coco", "--data.shards", str(shards),
            "--model.checkpoint", own.checkpoint, "--data.vocabulary", own.vocabulary,
            "--output", str(run), "--resume", "true", *more,
        ]
    )  # fmt: skip
    if status:
        return status
    return blipfast(["caption", own.folder, "--checkpoint", str(run / "model")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

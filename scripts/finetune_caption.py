"""Fine-tune a captioner: `blipfast train --config caption_coco` with further options."""

import sys

from blipfast.cli import program

if __name__ == "__main__":
    program(["train", "--config", "caption_coco", *sys.argv[1:]])

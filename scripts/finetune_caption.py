"""Fine-tune a captioner: `blipfast train --config caption_coco` with further options."""

import sys

from blipfast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--config", "caption_coco", *sys.argv[1:]]))

"""Fine-tune for retrieval: `blipfast train --config retrieval_coco` with further options."""

import sys

from blipfast.cli import program

if __name__ == "__main__":
    program(["train", "--config", "retrieval_coco", *sys.argv[1:]])

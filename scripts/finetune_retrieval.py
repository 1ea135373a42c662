"""Fine-tune for retrieval: `blipfast train --config retrieval_coco` with further options."""

import sys

from blipfast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--config", "retrieval_coco", *sys.argv[1:]]))

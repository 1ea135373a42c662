"""Pre-train: `blipfast train --config pretrain` with further options."""

import sys

from blipfast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--config", "pretrain", *sys.argv[1:]]))

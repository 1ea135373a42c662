"""Pre-train: `blipfast train --config pretrain` with further options."""

import sys

from blipfast.cli import program

if __name__ == "__main__":
    program(["train", "--config", "pretrain", *sys.argv[1:]])

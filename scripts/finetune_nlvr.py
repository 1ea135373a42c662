"""Fine-tune for NLVR2: `blipfast train --config nlvr` with further options."""

import sys

from blipfast.cli import program

if __name__ == "__main__":
    program(["train", "--config", "nlvr", *sys.argv[1:]])

"""Fine-tune for VisDial: `blipfast train --config visdial` with further options."""

import sys

from blipfast.cli import program

if __name__ == "__main__":
    program(["train", "--config", "visdial", *sys.argv[1:]])

"""Fine-tune for VQA: `blipfast train --config vqa` with further options."""

import sys

from blipfast.cli import program

if __name__ == "__main__":
    program(["train", "--config", "vqa", *sys.argv[1:]])

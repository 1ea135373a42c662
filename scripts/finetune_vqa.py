"""Fine-tune for VQA: `blipfast train --config vqa` with further options."""

import sys

from blipfast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--config", "vqa", *sys.argv[1:]]))

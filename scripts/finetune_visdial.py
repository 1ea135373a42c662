"""Fine-tune for VisDial: `blipfast train --config visdial` with further options."""

import sys

from blipfast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--config", "visdial", *sys.argv[1:]]))

"""Fine-tune for NLVR2: `blipfast train --config nlvr` with further options."""

import sys

from blipfast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "--config", "nlvr", *sys.argv[1:]]))

"""Bootstrap a noisy set: `blipfast capfilt` with its options, alone or under torchrun."""

import sys

from blipfast.cli import main

if __name__ == "__main__":
    sys.exit(main(["capfilt", *sys.argv[1:]]))

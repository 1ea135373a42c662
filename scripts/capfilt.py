"""Bootstrap a noisy set: `blipfast capfilt` with its options, alone or under torchrun."""

import sys

from blipfast.cli import program

if __name__ == "__main__":
    program(["capfilt", *sys.argv[1:]])

"""Evaluate a model by a published protocol: `blipfast evaluate` with its options."""

import sys

from blipfast.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

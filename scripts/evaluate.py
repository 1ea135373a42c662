"""Evaluate a model by a published protocol: `blipfast evaluate` with its options."""

import sys

from blipfast.cli import program

if __name__ == "__main__":
    program(["evaluate", *sys.argv[1:]])

"""`python -m blipfast.cli`."""

from blipfast.cli import program

program()

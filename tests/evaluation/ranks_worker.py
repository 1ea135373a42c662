"""Runs several evaluations on the ranks that torchrun started: `ranks_worker.py FOLDER ARGV...`"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from blipfast.cli import main

if __name__ == "__main__":
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        status = main(argv)
        if status:
            sys.exit(status)

"""`python -m blipfast.cli`."""

import sys

from blipfast.cli import main

sys.exit(main())

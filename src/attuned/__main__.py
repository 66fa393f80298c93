"""Runs the command line; in the wheel this is ``python -m attuned_store``."""

import sys

from .cli import main

sys.exit(main())

"""Runs the command line in a checkout: ``python -m attuned.cli``."""

import sys

from .running import main

sys.exit(main())

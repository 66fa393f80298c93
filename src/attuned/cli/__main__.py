"""Runs the command line: ``python -m attuned.cli`` in a checkout."""

import sys

from .running import main

sys.exit(main())

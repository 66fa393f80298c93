"""How long the import takes, beside that of qdrant_client."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from conftest import Table, contest

TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds_of_import(module: str) -> float:
    """The import alone, in a new process, without the start of the interpreter."""
    command = [sys.executable, "-c", TIMED.format(module)]
    root = Path(__file__).parent.parent
    return float(subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout)


def test_import(benchmark: Any, table: Table) -> None:
    modules = "attuned_store", "qdrant_client"
    outcome = contest(benchmark, {name: partial(seconds_of_import, name) for name in modules}, rounds=9)
    table.add(
        "import attuned_store",
        100 * outcome.ratio(*modules),
        "% of import qdrant_client",
        most=15.0,
        note=", ".join(f"{outcome.median(name) * 1e3:.0f} ms" for name in modules),
    )

"""How long the import takes, beside that of qdrant_client."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from conftest import Table, contest

TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds_of_import(module: str, bytecode: Path) -> float:
    """The import alone, in a new process: without the start of the interpreter, from bytecode at hand."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", TIMED.format(module)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, check=True, text=True)
    return float(run.stdout)


def test_import(benchmark: Any, table: Table, tmp_path: Path) -> None:
    modules = "attuned_store", "qdrant_client"
    contenders = {name: partial(seconds_of_import, name, tmp_path) for name in modules}
    outcome = contest(benchmark, contenders, rounds=9)
    table.add(
        "import attuned_store",
        100 * outcome.ratio(*modules),
        "% of import qdrant_client",
        most=15.0,
        note=", ".join(f"{outcome.median(name) * 1e3:.0f} ms" for name in modules),
    )

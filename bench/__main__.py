"""Run all benchmarks, compare with the last recorded run, and record this one.

python -m bench                   # everything; writes results.json, RESULTS.md, curves.svg and two pages
python -m bench --users 1000      # a quick look: shows the tables and writes nothing
python -m bench -k write          # the same; whatever else is given goes to pytest
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench import report

USERS = "1000,10000,100000"


def cpu_model() -> str:
    """The model of the processor, as the system names it."""
    if (path := Path("/proc/cpuinfo")).exists():
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(found: dict[str, str]) -> dict[str, str]:
    libraries = {"pytest-benchmark": importlib.metadata.version("pytest-benchmark"), **found}
    return {"Python": platform.python_version(), **dict(sorted(libraries.items()))}


def measure(users: str, options: list[str]) -> report.Results | None:
    """Run the benchmarks; None where one failed."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "found.json"
        own = ["-q", "-p", "no:cacheprovider", "--benchmark-quiet", "--timeout=1800"]
        status = pytest.main(
            [str(report.HERE), *own, f"--users={users}", f"--results={path}", *options],
        )
        if status != pytest.ExitCode.OK:
            return None
        found = json.loads(path.read_text("utf-8"))
    machine = {"cpu": cpu_model(), "cores": os.cpu_count()}
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "machine": machine, **found, "versions": versions(found["versions"])}


def record(found: report.Results) -> None:
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    report.RESULTS.write_text(text, "utf-8")
    results: report.Results = json.loads(text)  # the tables are made of what was recorded, in its order
    report.TABLE.write_text(report.table(results), "utf-8")
    report.draw(results)
    for page, block in report.pages(results).items():
        page.write_text(report.with_block(page.read_text("utf-8"), block), "utf-8")


def main() -> int:
    """Exit with 1 where a benchmark failed; a missed target or a worse ratio is reported, and no failure."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--users", default=USERS, help=f"numbers of users (default: {USERS})")
    options, others = parser.parse_known_args()
    before = report.load()
    results = measure(options.users, others)
    if results is None:
        return 1
    if options.users == USERS and not others:
        record(results)
    else:
        sys.stdout.write(report.table(results))
    if before is not None:
        worse = report.what_became_worse(before, results)
        lines = worse or ["Nothing became more than 30 % worse than in the last recorded run."]
        sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Snapshots: how fast they are taken, verified and restored, and how much memory that takes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from conftest import states, user_ids

from attuned_store import QdrantStore, verify_snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Table

NUMBER = 100_000
_T = TypeVar("_T")

# Writes and verifies an archive of so many states, none of which is kept, and prints the memory used at most.
LARGE = """
import sys
import attuned_store as a
number, directory = int(sys.argv[1]), sys.argv[2]
fields = dict(reason="manual", keep=None, keep_remote=False, native=False)
request = a.SnapshotRequest.of(directory, "portable", **fields)
axes = a.Axes({name: place / 23 for place, name in enumerate(a.CANONICAL_AXES)})
origin = a.SnapshotOrigin("bench", "bench", "bench")
with a.PortableSnapshotWriter(request, origin, a.CANONICAL_AXES) as writer:
    for start in range(0, number, 100):
        writer.add([a.StateSnapshot(f"user-{each}", axes, each) for each in range(start, start + 100)])
    report = writer.finish()
assert a.verify_snapshot(report.path).points == number
status = open("/proc/self/status").read()  # ru_maxrss would begin with the parent's
print(status.partition("VmHWM:")[2].split()[0])
"""


def timed(table: Table, question: str, least: float, call: Callable[[], _T]) -> _T:
    began = time.perf_counter()
    answer = call()
    table.add(question, NUMBER / (time.perf_counter() - began), "states a second", least=least)
    return answer


def test_edge(table: Table, tmp_path: Path) -> None:
    """100,000 users on Edge, one state each."""
    with QdrantStore(path=tmp_path / "store", engine="edge") as store:
        store.upsert_many(states(user_ids(NUMBER)))
        report = timed(table, "Edge create_snapshot", 20_000, lambda: store.create_snapshot(tmp_path))
        path = report.path
        assert path is not None
        timed(table, "verify_snapshot", 30_000, lambda: verify_snapshot(path))
        timed(table, "Edge restore_snapshot", 8_000, lambda: store.restore_snapshot(path))
        assert store.count() == NUMBER


def test_memory(table: Table, tmp_path: Path) -> None:
    """The memory that a process takes at most, with ten times the states."""

    def most(number: int) -> int:
        command = [sys.executable, "-c", LARGE, str(number), str(tmp_path)]
        return int(
            subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent
            ).stdout
        )

    small, large = most(NUMBER), most(10 * NUMBER)
    note = f"{small // 1024} MB with {NUMBER:,}, {large // 1024} MB with {10 * NUMBER:,}"
    table.add("memory of a snapshot, ten times the states", large / small, "times", most=1.2, note=note)

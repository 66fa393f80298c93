"""What sixteen writers get out of durability="power" that one does not: writes that share a flush.

It is at most (write + sync) / write: where the disk syncs in less time than a write takes, there is little to
share. What a sync takes stands in the note.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from conftest import AXES, START_MS, us

from attuned_store import AsyncQdrantStore, Axes, QdrantStore, StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Table

WRITERS = 16
EACH = 25
ROUNDS = 7


def written_by(writer: int, age: int) -> list[StateSnapshot]:
    first = START_MS + age * EACH
    return [StateSnapshot(f"user-{writer:02}", Axes(AXES), first + n) for n in range(EACH)]


def by_threads(path: Path, engine: Any) -> Callable[[int, int], float]:
    store = QdrantStore(path=path, engine=engine, durability="power")

    def seconds(writers: int, age: int) -> float:
        def write(snapshots: list[StateSnapshot]) -> None:
            for snapshot in snapshots:
                store.upsert_latest(snapshot)

        batches = [written_by(writer, age) for writer in range(writers)]
        threads = [threading.Thread(target=write, args=(batch,)) for batch in batches]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started

    return seconds


def by_tasks(path: Path, engine: Any) -> Callable[[int, int], float]:
    async def run(writers: int, age: int) -> float:
        async with AsyncQdrantStore(path=path, engine=engine, durability="power") as store:

            async def write(snapshots: list[StateSnapshot]) -> None:
                for snapshot in snapshots:
                    await store.upsert_latest(snapshot)

            batches = [written_by(writer, age) for writer in range(writers)]
            started = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for batch in batches:
                    tasks.create_task(write(batch))
            return time.perf_counter() - started

    return lambda writers, age: asyncio.run(run(writers, age))


def seconds_of_sync(path: Path) -> float:
    """What the disk takes to keep 8 KB more of a file."""
    taken: list[float] = []
    with path.open("wb", buffering=0) as file:
        for _ in range(50):
            file.write(bytes(8192))
            started = time.perf_counter()
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


@pytest.mark.parametrize("kind", [by_threads, by_tasks])
@pytest.mark.parametrize("engine", ["edge", "local"])
def test_sixteen_writers(
    benchmark: Any, table: Table, tmp_path: Path, engine: str, kind: Callable[..., Any]
) -> None:
    pytest.importorskip({"edge": "qdrant_edge", "local": "qdrant_client"}[engine])
    seconds = kind(tmp_path / "store", engine)
    rates: list[tuple[float, float]] = []

    def run() -> None:
        age = len(rates)
        alone, together = seconds(1, 2 * age), seconds(WRITERS, 2 * age + 1)
        rates.append((EACH / alone, WRITERS * EACH / together))

    seconds(WRITERS, 0)
    benchmark.pedantic(run, rounds=ROUNDS)
    one, many = (statistics.median(rate) for rate in zip(*rates, strict=True))
    sync = us(("a sync", seconds_of_sync(tmp_path / "synced")))
    table.add(
        f'{engine}, durability="power", {WRITERS} writers, {kind.__name__.replace("_", " ")}',
        statistics.median(many / one for one, many in rates),
        "times one",
        least=6,
        note=f"one {one:,.0f} writes/s, {WRITERS} {many:,.0f}; {sync}",
    )

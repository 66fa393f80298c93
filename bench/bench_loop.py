"""For how long the long operations keep an event loop from anything else."""

from __future__ import annotations

import contextlib
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from conftest import START_MS, Table, states, user_ids

from attuned_store import AsyncMemoryStore, AsyncQdrantStore, StateSnapshot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

USERS = user_ids()
ROUNDS = 3
TICK = 0.001
MANY = 100_000
MOST = 50.0  # ms, that is asked of every call at so many users


class Ticker:
    """A task that wants to run every millisecond, and the longest that it had to wait in each phase."""

    def __init__(self) -> None:
        self.gaps: dict[str, float] = {}
        self._longest = 0.0

    async def run(self) -> None:
        last = time.perf_counter()
        while True:
            await anyio.sleep(TICK)
            now = time.perf_counter()
            self._longest = max(self._longest, now - last)
            last = now

    @contextlib.asynccontextmanager
    async def phase(self, name: str) -> AsyncIterator[None]:
        await anyio.sleep(5 * TICK)
        self._longest = 0.0
        yield
        await anyio.sleep(5 * TICK)  # a gap is known when it is over
        self.gaps[name] = max(self._longest, self.gaps.get(name, 0.0))


async def scenario(path: Path, engine: Any, snapshots: list[list[StateSnapshot]]) -> dict[str, float]:
    """The longest gap, in seconds, of each long operation: 10,000 users of one snapshot, then two, each."""
    ticker = Ticker()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ticker.run)
        async with ticker.phase("idle loop"):
            await anyio.sleep(1)

        store = AsyncQdrantStore(path=path, engine=engine)
        async with ticker.phase("opening a new one"):
            await store.health()
        async with ticker.phase("upsert_many"):
            assert await store.upsert_many(snapshots[0]) == len(USERS)
        async with ticker.phase("closing"):
            await store.aclose()

        store = AsyncQdrantStore(path=path, engine=engine)
        async with ticker.phase("opening, 20,000 points"):
            await store.health()
        async with ticker.phase("upsert_many, again"):
            assert await store.upsert_many(snapshots[1]) == len(USERS)
        await store.aclose()

        store = AsyncQdrantStore(path=path, engine=engine, max_history_per_user=1)  # so that prune has work
        async with ticker.phase("opening, 30,000 points"):
            await store.health()
        for user_id in USERS[:10]:
            async with ticker.phase("search_similar"):  # each alone: a short call need not suspend
                assert len(await store.search_similar(user_id)) == 10
        async with ticker.phase("users"):
            assert len([user_id async for user_id in store.users()]) == len(USERS)
        async with ticker.phase("count(history=True)"):
            assert await store.count(history=True) == len(USERS)
        async with ticker.phase("prune"):
            assert await store.prune() == len(USERS)
        await store.aclose()

        tasks.cancel_scope.cancel()
    return ticker.gaps


def bound(engine: str, phase: str) -> float | None:
    """The longest gap that is asked for, in ms."""
    if phase == "idle loop":
        return None
    return 20.0 if engine == "edge" and phase.startswith("upsert_many") else 50.0


async def many_users(path: Path, engine: str, snapshots: list[StateSnapshot]) -> dict[str, float]:
    """The longest gap, in seconds, of each long operation on 100,000 users."""
    ticker = Ticker()
    query = {"warmth": 0.9, "formality": 0.2}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ticker.run)
        store: AsyncMemoryStore | AsyncQdrantStore = (
            AsyncMemoryStore() if engine == "memory" else AsyncQdrantStore(path=path / "store", engine="edge")
        )
        async with ticker.phase("opening a new one"):
            await store.health()
        async with ticker.phase("upsert_many"):
            assert await store.upsert_many(snapshots) == MANY
        async with ticker.phase("search_similar"):
            assert len(await store.search_similar(query)) == 10
        async with ticker.phase("search_similar, all"):
            assert len(await store.search_similar(query, limit=MANY)) == MANY
        async with ticker.phase("create_snapshot"):
            report = await store.create_snapshot(path / "snapshots")
        assert report.path is not None
        async with ticker.phase("restore_snapshot"):
            await store.restore_snapshot(report.path)
        assert await store.count() == MANY
        async with ticker.phase("closing"):
            await store.aclose()
        if engine == "edge":
            store = AsyncQdrantStore(path=path / "store", engine="edge")
            async with ticker.phase("opening"):
                await store.health()
            await store.aclose()
        tasks.cancel_scope.cancel()
    return ticker.gaps


@pytest.mark.parametrize("engine", ["memory", "edge"])
def test_longest_gap_of_many_users(benchmark: Any, table: Table, tmp_path: Path, engine: str) -> None:
    if engine == "edge":
        pytest.importorskip("qdrant_edge")
    snapshots = states(user_ids(MANY), START_MS)
    gaps: dict[str, float] = {}

    def run() -> None:
        gaps.update(anyio.run(many_users, tmp_path, engine, snapshots))

    gc.collect()
    gc.freeze()
    try:
        benchmark.pedantic(run, rounds=1)
    finally:
        gc.unfreeze()
    for phase, gap in gaps.items():
        table.add(f"gap, {engine}, {MANY:,} users: {phase}", gap * 1e3, "ms", most=MOST)


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize("engine", ["edge", "local"])
def test_longest_gap(benchmark: Any, table: Table, tmp_path: Path, engine: str, loop: str) -> None:
    pytest.importorskip({"edge": "qdrant_edge", "local": "qdrant_client"}[engine])
    pytest.importorskip(loop)
    snapshots = [states(USERS, START_MS + age) for age in range(2)]
    runs: list[dict[str, float]] = []

    def run() -> None:
        path = Path(tempfile.mkdtemp(dir=tmp_path))
        runs.append(anyio.run(scenario, path, engine, snapshots, backend=loop))

    gc.collect()
    gc.freeze()  # what pytest keeps is not looked through in the middle of a run
    try:
        benchmark.pedantic(run, rounds=ROUNDS)
    finally:
        gc.unfreeze()
    for phase in runs[0]:
        gaps = [gaps[phase] * 1e3 for gaps in runs]
        most = bound(engine, phase)
        median, note = statistics.median(gaps), f"worst of {ROUNDS}: {max(gaps):.3g}"
        table.add(f"gap, {engine}, {loop}: {phase}", median, "ms", most=most, note=note)

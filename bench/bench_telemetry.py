"""What it costs that stores report, with the libraries installed and no tracer provider set."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from conftest import AXES, START_MS, contest, medians
from contenders import Floor, Place

from attuned_store import AsyncMemoryStore, MemoryStore, StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Outcome, Table

pytest.importorskip("prometheus_client", reason="needs prometheus_client, the extra [metrics]")
pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk, with which spans could be recorded")

CALLS = 5_000
ROUNDS = 61
REPORTING, SILENT = "reporting", "telemetry=False"


def repeated(call: Callable[[Any], object], argument: Any) -> Callable[[], object]:
    def turn() -> None:
        for _ in range(CALLS):
            call(argument)

    return turn


def awaited(call: Any, argument: Any) -> Callable[[], object]:
    """The same in one coroutine, which never suspends."""

    async def turn() -> None:
        for _ in range(CALLS):
            await call(argument)

    def run() -> None:
        try:
            turn().send(None)
        except StopIteration:
            return
        raise AssertionError("a memory store has suspended")

    return run


def judge(table: Table, operation: str, outcome: Outcome, *, most: float | None = 0.4) -> None:
    """Show what reporting adds, by the quickest rounds: other work on the machine only ever adds to both."""
    best = {name: min(outcome.seconds[name]) * 1e6 for name in (REPORTING, SILENT)}
    added = best[REPORTING] - best[SILENT]
    table.add(f"metrics add to {operation}", added, "us", most=most, note=medians(outcome, best))


@pytest.fixture
def state() -> StateSnapshot:
    return StateSnapshot("ann", AXES, START_MS)


def test_read(benchmark: Any, table: Table, tmp_path: Path, state: StateSnapshot) -> None:
    with asyncio.Runner() as loop:
        floor = Floor(Place(tmp_path, loop))
    stores = {REPORTING: MemoryStore(), SILENT: MemoryStore(telemetry=False)}
    for store in stores.values():
        store.upsert_latest(state)
    floor.put(state)
    turns = {name: repeated(store.get_latest, "ann") for name, store in stores.items()}
    turns["floor"] = repeated(floor.get, "ann")
    outcome = contest(benchmark, turns, calls=CALLS, rounds=ROUNDS)
    judge(table, "memory get_latest", outcome)
    ratio = outcome.ratio(REPORTING, "floor")
    note = medians(outcome, (REPORTING, "floor"))
    table.add("memory get_latest with metrics", ratio, "x floor", most=4.0, note=note)


def test_write(benchmark: Any, table: Table, state: StateSnapshot) -> None:
    """Shown without a target: the time is beyond the first bucket, and an argument goes by name."""
    stores = {REPORTING: MemoryStore(), SILENT: MemoryStore(telemetry=False)}
    turns = {name: repeated(store.upsert_latest, state) for name, store in stores.items()}
    judge(table, "memory upsert_latest", contest(benchmark, turns, calls=CALLS, rounds=ROUNDS), most=None)


def test_async_read(benchmark: Any, table: Table, state: StateSnapshot) -> None:
    stores = {REPORTING: AsyncMemoryStore(), SILENT: AsyncMemoryStore(telemetry=False)}
    for store in stores.values():
        with asyncio.Runner() as loop:
            loop.run(store.upsert_latest(state))
    turns = {name: awaited(store.get_latest, "ann") for name, store in stores.items()}
    outcome = contest(benchmark, turns, calls=CALLS, rounds=ROUNDS)
    judge(table, "asynchronous memory get_latest", outcome)

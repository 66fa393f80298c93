"""What the memory store costs beside a dict, a Lock and a deque."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from conftest import Floor, Table, batches, contest, medians, states, user_ids

from attuned_store import AsyncMemoryStore, MemoryStore, StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

USERS = user_ids()
ROUNDS = 61
CALLS = 2_000


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    store.upsert_many(states(USERS))
    return store


@pytest.fixture
def floor() -> Floor[StateSnapshot]:
    floor = Floor[StateSnapshot]()
    for snapshot in states(USERS):
        floor.put(snapshot.user_id, snapshot)
    return floor


def test_get_latest(benchmark: Any, table: Table, store: MemoryStore, floor: Floor[StateSnapshot]) -> None:
    def ours() -> None:
        for user_id in USERS:
            store.get_latest(user_id)

    def theirs() -> None:
        for user_id in USERS:
            floor.get(user_id)

    outcome = contest(benchmark, {"store": ours, "floor": theirs}, calls=len(USERS), rounds=ROUNDS)
    table.add(
        "memory get_latest", outcome.ratio("store", "floor"), "x floor", most=1.0, note=medians(outcome)
    )


def test_upsert_latest(benchmark: Any, table: Table, store: MemoryStore, floor: Floor[StateSnapshot]) -> None:
    rounds = batches(USERS, ROUNDS + 2, CALLS)
    for_store, for_floor = iter(rounds), iter(rounds)

    def ours() -> None:
        for snapshot in next(for_store):
            store.upsert_latest(snapshot)

    def theirs() -> None:
        for snapshot in next(for_floor):
            floor.put(snapshot.user_id, snapshot)

    outcome = contest(benchmark, {"store": ours, "floor": theirs}, calls=CALLS, rounds=ROUNDS)
    table.add(
        "memory upsert_latest", outcome.ratio("store", "floor"), "x floor", most=2.5, note=medians(outcome)
    )


def test_async_get_latest(benchmark: Any, table: Table, floor: Floor[StateSnapshot]) -> None:
    """Both awaited inside one coroutine, which never suspends and so needs no event loop."""
    store = AsyncMemoryStore()
    store._store.upsert_many(states(USERS))

    async def get(user_id: str) -> StateSnapshot | None:
        return floor.get(user_id)

    async def ours() -> None:
        for user_id in USERS:
            await store.get_latest(user_id)

    async def theirs() -> None:
        for user_id in USERS:
            await get(user_id)

    contenders: dict[str, Callable[[], object]] = {
        "store": lambda: run_through(ours()),
        "floor": lambda: run_through(theirs()),
    }
    outcome = contest(benchmark, contenders, calls=len(USERS), rounds=ROUNDS)
    ratio = outcome.ratio("store", "floor")
    table.add("async memory get_latest", ratio, "x floor in async def", most=1.0, note=medians(outcome))


def run_through(flow: Coroutine[Any, Any, object]) -> None:
    with pytest.raises(StopIteration):
        flow.send(None)


def test_search_similar(benchmark: Any, table: Table, store: MemoryStore) -> None:
    """All users are taken in already; each search asks like another user."""
    asked = iter(USERS * 2)

    def ours() -> None:
        for _ in range(10):
            assert len(store.search_similar(next(asked))) == 10

    outcome = contest(benchmark, {"store": ours}, calls=10)
    table.add(f"memory search_similar, {len(USERS):,} users", outcome.median("store") * 1e3, "ms", most=3.0)

"""What the store over a server costs, beside the same request made with bare qdrant-client."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from conftest import Table, batches, contest, medians, states, user_ids
from qdrant_client import QdrantClient, models

from attuned_store import AsyncQdrantStore, QdrantStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # the loopback server stands there

CALLS = 40
ROUNDS = 21
USERS = user_ids(200)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A loopback server in a process of its own."""
    from qdrant_server import in_own_process

    with in_own_process() as url:
        yield url


@pytest.fixture
def store(url: str) -> Iterator[QdrantStore]:
    with QdrantStore(url=url) as store:
        store.upsert_many(states(USERS))
        yield store


@pytest.fixture
def client(url: str) -> Iterator[QdrantClient]:
    """A bare client that keeps its connection too, which by default it does not on loopback."""
    client = QdrantClient(url=url, check_compatibility=False, limits=httpx.Limits(max_connections=64))
    yield client
    client.close()


def compare(
    benchmark: Any, table: Table, question: str, ours: Callable[[], object], bare: Callable[[], object]
) -> None:
    outcome = contest(benchmark, {"store": ours, "bare": bare}, calls=CALLS, rounds=ROUNDS)
    table.add(question, outcome.ratio("store", "bare"), "x bare", most=1.1, note=medians(outcome))


def test_get_latest(benchmark: Any, table: Table, store: QdrantStore, client: QdrantClient) -> None:
    core: Any = store._core
    ids = [core._point(snapshot, "latest").id for snapshot in states(USERS[:CALLS])]

    def ours() -> None:
        for user_id in USERS[:CALLS]:
            store.get_latest(user_id)

    def bare() -> None:
        for point_id in ids:
            client.retrieve("attuned_state", [point_id])

    compare(benchmark, table, "server get_latest", ours, bare)


def test_upsert_latest(benchmark: Any, table: Table, store: QdrantStore, client: QdrantClient) -> None:
    core: Any = store._core
    rounds = batches(USERS, ROUNDS + 2, CALLS)

    def points(snapshot: Any) -> list[models.PointStruct]:
        pair = [core._latest_point(snapshot), core._point(snapshot, snapshot.updated_at_unix_ms)]
        return [models.PointStruct(id=p.id, vector=p.vector, payload=p.payload) for p in pair]

    built = iter([[(s.updated_at_unix_ms, points(s)) for s in batch] for batch in rounds])
    snapshots = iter(rounds)

    def ours() -> None:
        for snapshot in next(snapshots):
            core._since_trim.clear()  # trimming is not part of the question
            store.upsert_latest(snapshot)

    def bare() -> None:
        for time_ms, pair in next(built):
            older = models.FieldCondition(key="updated_at_unix_ms", range=models.Range(lte=time_ms))
            client.upsert("attuned_state", pair, update_filter=models.Filter(must=[older]), wait=True)

    compare(benchmark, table, "server upsert_latest", ours, bare)


def test_reads_at_the_same_time(benchmark: Any, table: Table) -> None:
    """64 reads at once against 64 one after another, of a server that takes 5 ms for each."""
    from qdrant_server import in_own_process

    async def both(url: str) -> tuple[float, float]:
        async with AsyncQdrantStore(url=url, pool_size=64) as store:
            await store.upsert_many(states(USERS))
            started = time.perf_counter()
            for user_id in USERS[:64]:
                await store.get_latest(user_id)
            between = time.perf_counter()
            async with anyio.create_task_group() as tasks:
                for user_id in USERS[:64]:
                    tasks.start_soon(store.get_latest, user_id)
            return between - started, time.perf_counter() - between

    with in_own_process("--delay=0.005") as url:
        one_by_one, together = benchmark.pedantic(lambda: anyio.run(both, url), rounds=1)
    table.add("server, 64 reads at once", one_by_one / together, "times one by one", least=4)

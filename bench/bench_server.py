"""What the store over a server costs, beside the same request made with bare qdrant-client."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from conftest import START_MS, Table, batches, contest, medians, states, user_ids
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
    benchmark: Any,
    table: Table,
    question: str,
    ours: Callable[[], object],
    bare: Callable[[], object],
    calls: int = CALLS,
) -> None:
    outcome = contest(benchmark, {"store": ours, "bare": bare}, calls=calls, rounds=ROUNDS)
    table.add(question, outcome.ratio("store", "bare"), "x bare", most=1.1, note=medians(outcome))


def test_get_latest(benchmark: Any, table: Table, store: QdrantStore, client: QdrantClient) -> None:
    core: Any = store._operations.backend
    ids = [core._point(snapshot, "latest").id for snapshot in states(USERS[:CALLS])]

    def ours() -> None:
        for user_id in USERS[:CALLS]:
            store.get_latest(user_id)

    def bare() -> None:
        for point_id in ids:
            client.retrieve("attuned_state", [point_id])

    compare(benchmark, table, "server get_latest", ours, bare)


def test_upsert_latest(benchmark: Any, table: Table, store: QdrantStore, client: QdrantClient) -> None:
    core: Any = store._operations.backend
    rounds = batches(USERS, ROUNDS + 2, CALLS)

    def points(snapshot: Any) -> list[Any]:
        return [core._latest_point(snapshot), core._point(snapshot, snapshot.updated_at_unix_ms)]

    given = iter([[(s.updated_at_unix_ms, points(s)) for s in batch] for batch in rounds])
    snapshots = iter(rounds)

    def ours() -> None:
        for snapshot in next(snapshots):
            core._since_trim.clear()  # trimming is not part of the question
            store.upsert_latest(snapshot)

    def bare() -> None:
        for time_ms, points in next(given):
            pair = [models.PointStruct(id=p.id, vector=p.vector, payload=p.payload) for p in points]
            older = models.FieldCondition(key="updated_at_unix_ms", range=models.Range(lte=time_ms))
            client.upsert("attuned_state", pair, update_filter=models.Filter(must=[older]), wait=True)

    compare(benchmark, table, "server upsert_latest", ours, bare)


def test_get_many(benchmark: Any, table: Table, store: QdrantStore, client: QdrantClient) -> None:
    """100 users in one request."""
    core: Any = store._operations.backend
    users = USERS[:100]
    ids = [core._point(snapshot, "latest").id for snapshot in states(users)]

    def ours() -> None:
        for _ in range(CALLS // 4):
            assert len(store.get_many(users)) == 100

    def bare() -> None:
        for _ in range(CALLS // 4):
            assert len(client.retrieve("attuned_state", ids)) == 100

    compare(benchmark, table, "server get_many(100)", ours, bare, calls=CALLS // 4)


def test_get_history(benchmark: Any, table: Table, store: QdrantStore, client: QdrantClient) -> None:
    """The newest 10 of 20; as many points are asked for as the store asks for."""
    user_id = USERS[0]
    store.upsert_many([snapshot for at in range(20) for snapshot in states([user_id], START_MS + at)])

    def ours() -> None:
        for _ in range(CALLS):
            assert len(store.get_history(user_id, 10)) == 10

    def bare() -> None:
        for _ in range(CALLS):
            client.scroll(
                "attuned_state",
                models.Filter(must=[equal("user_id", user_id)], must_not=[]),
                limit=11,
                order_by=models.OrderBy(key="updated_at_unix_ms", direction=models.Direction.DESC),
            )

    compare(benchmark, table, "server get_history(10)", ours, bare)


def test_search_similar(benchmark: Any, table: Table, store: QdrantStore, client: QdrantClient) -> None:
    core: Any = store._operations.backend
    (query,) = states(USERS[:1])
    vector = core.schema.vector(query.axes)

    def ours() -> None:
        for _ in range(CALLS):
            assert len(store.search_similar(query)) == 10

    def bare() -> None:
        for _ in range(CALLS):
            latest = models.Filter(must=[equal("kind", "latest")], must_not=[])
            client.query_points("attuned_state", query=vector, query_filter=latest, limit=10)

    compare(benchmark, table, "server search_similar", ours, bare)


def equal(key: str, value: str) -> models.FieldCondition:
    return models.FieldCondition(key=key, match=models.MatchValue(value=value))


def test_reads_at_the_same_time(benchmark: Any, table: Table) -> None:
    """64 reads at once against 64 one after another, of a server that takes 5 ms for each."""
    from qdrant_server import in_own_process

    async def one_by_one(store: AsyncQdrantStore) -> float:
        started = time.perf_counter()
        for user_id in USERS[:64]:
            await store.get_latest(user_id)
        return time.perf_counter() - started

    async def together(store: AsyncQdrantStore) -> float:
        started = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for user_id in USERS[:64]:
                tasks.start_soon(store.get_latest, user_id)
        return time.perf_counter() - started

    async def both(url: str) -> list[float]:
        async with AsyncQdrantStore(url=url, pool_size=64) as store:
            await store.upsert_many(states(USERS))
            await together(store)  # connects
            return [await one_by_one(store) / await together(store) for _ in range(5)]

    with in_own_process("--delay=0.005") as url:
        ratios = benchmark.pedantic(lambda: anyio.run(both, url), rounds=1)
    spread = f"{min(ratios):.3g} to {max(ratios):.3g}"
    table.add("server, 64 reads at once", median(ratios), "times one by one", least=4, note=spread)

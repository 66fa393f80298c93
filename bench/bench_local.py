"""What the store over qdrant-client's local mode costs, beside the bare client."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from conftest import START_MS, Table, batches, contest, medians, states, user_ids
from qdrant_client import QdrantClient, models

from attuned_store import QdrantStore, StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CALLS = 50
ROUNDS = 21
HISTORY = 19  # with the latest one 20 points a user
MANY = user_ids(500)  # 10,000 points


@pytest.fixture
def store(tmp_path: Path) -> Iterator[QdrantStore]:
    with QdrantStore(path=tmp_path / "store", engine="local") as store:
        yield store


@pytest.fixture
def client(tmp_path: Path) -> Iterator[QdrantClient]:
    client = QdrantClient(path=str(tmp_path / "bare"))
    client.create_collection("bare", models.VectorParams(size=24, distance=models.Distance.COSINE))
    yield client
    client.close()


def bare_point(snapshot: StateSnapshot, name: str | int, kind: str) -> models.PointStruct:
    """A point as a caller without the store would build it."""
    payload = {**snapshot.to_dict(), "kind": kind}
    vector = [value - 0.5 for value in snapshot.axes.values()] + [0.0]
    point_id = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{snapshot.user_id}::{name}"))
    return models.PointStruct(id=point_id, vector=vector, payload=payload)


def bare_points(snapshot: StateSnapshot) -> list[models.PointStruct]:
    latest = bare_point(snapshot, "latest", "latest")
    return [latest, bare_point(snapshot, snapshot.updated_at_unix_ms, "history")]


def test_upsert_latest(benchmark: Any, table: Table, store: QdrantStore, client: QdrantClient) -> None:
    users = user_ids(1_000)
    store.upsert_many(states(users))
    rounds = batches(users, ROUNDS + 2, CALLS)
    points = iter([[bare_points(snapshot) for snapshot in batch] for batch in rounds])
    snapshots = iter(rounds)

    def ours() -> None:
        for snapshot in next(snapshots):
            store.upsert_latest(snapshot)

    def bare() -> None:
        for pair in next(points):  # built already: the upsert alone
            client.upsert("bare", pair)

    outcome = contest(benchmark, {"store": ours, "bare": bare}, calls=CALLS, rounds=ROUNDS)
    table.add(
        "local upsert_latest",
        outcome.ratio("bare", "store"),
        "times as fast as a bare upsert",
        least=2.5,
        note=medians(outcome),
    )


@pytest.mark.parametrize("cache", ["hot", "cold"])
def test_get_history(benchmark: Any, table: Table, store: QdrantStore, cache: str) -> None:
    for age in range(HISTORY):
        store.upsert_many(states(MANY, START_MS + age))
    assert store.health().points == 10_000
    users = MANY[:100]
    core: Any = store._core
    client = core.engine._client
    order = models.OrderBy(key="updated_at_unix_ms", direction=models.Direction.DESC)

    def ours() -> None:
        for user_id in users:
            assert len(store.get_history(user_id, limit=10)) == 10

    def bare() -> float:
        """The scroll that a caller without the store would ask for: once, as it looks at all points."""
        of_user = models.FieldCondition(key="user_id", match=models.MatchValue(value=users[0]))
        of_kind = models.FieldCondition(key="kind", match=models.MatchValue(value="history"))
        where = models.Filter(must=[of_user, of_kind])
        started = time.perf_counter()
        client.scroll(store.config.collection_name, where, limit=10, order_by=order)
        return (time.perf_counter() - started) * len(users)

    forget = core._recent.clear if cache == "cold" else tuple  # ids of all users are kept, always
    outcome = contest(benchmark, {"store": ours, "bare": bare}, calls=len(users), rounds=11, setup=forget)
    table.add(
        f"local get_history(limit=10), 10,000 points, {cache}",
        outcome.median("store") * 1e3,
        "ms",
        note=medians(outcome),
    )

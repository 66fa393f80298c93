"""What the store over Qdrant Edge costs, beside the bare calls that do the same."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from conftest import START_MS, Table, batches, contest, medians, states, user_ids

from attuned_store import QdrantStore, StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

edge = pytest.importorskip("qdrant_edge")

CALLS = 200
ROUNDS = 41
HISTORY = 19  # with the latest one 20 points a user
MANY = user_ids(2_500)  # 50,000 points


@pytest.fixture
def store(tmp_path: Path) -> Iterator[QdrantStore]:
    with QdrantStore(path=tmp_path / "store", engine="edge") as store:
        yield store


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantStore]:
    """A store of 50,000 points."""
    with QdrantStore(path=tmp_path_factory.mktemp("edge") / "full", engine="edge") as store:
        for age in range(HISTORY):
            store.upsert_many(states(MANY, START_MS + age))
        assert store.health().points == 50_000
        yield store


def core_of(store: QdrantStore) -> Any:
    return store._core


def shard_of(store: QdrantStore) -> Any:
    """What the store writes to, to be called without the store."""
    return core_of(store).engine._shards[store.config.collection_name]


def bare_point(snapshot: StateSnapshot, name: str | int, kind: str) -> Any:
    """A compact point as a caller without the store would build it."""
    payload = {
        "user_id": snapshot.user_id,
        "updated_at_unix_ms": snapshot.updated_at_unix_ms,
        "source": snapshot.source.value,
        "confidence": snapshot.confidence,
        "schema_version": snapshot.schema_version,
        "axes": json.dumps(dict(snapshot.axes)),
        "kind": kind,
    }
    vector = [value - 0.5 for value in snapshot.axes.values()] + [0.0]
    return edge.Point(str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{snapshot.user_id}::{name}")), vector, payload)


def test_upsert_latest(benchmark: Any, table: Table, store: QdrantStore, tmp_path: Path) -> None:
    users = user_ids(1_000)
    store.upsert_many(states(users))
    rounds = batches(users, ROUNDS + 2, CALLS)
    for_store, for_bare = iter(rounds), iter(rounds)
    other = QdrantStore(path=tmp_path / "bare", engine="edge")
    shard = shard_of(other)

    def ours() -> None:
        for snapshot in next(for_store):
            store.upsert_latest(snapshot)

    def bare() -> None:
        for snapshot in next(for_bare):
            latest = bare_point(snapshot, "latest", "latest")
            entry = bare_point(snapshot, snapshot.updated_at_unix_ms, "history")
            shard.update(edge.UpdateOperation.upsert_points([latest, entry]))

    outcome = contest(benchmark, {"store": ours, "bare": bare}, calls=CALLS, rounds=ROUNDS)
    other.close()
    note = f"{medians(outcome)}; mean, flushes included, {outcome.mean('store') * 1e6:.3g} us"
    table.add("edge upsert_latest", outcome.median("store") * 1e6, "us", most=100.0, note=note)


def test_get_latest_cached(benchmark: Any, table: Table, full: QdrantStore) -> None:
    full.get_many(MANY)
    shard = shard_of(full)
    ids = [str(core_of(full)._point(full[user_id], "latest").id) for user_id in MANY]

    def ours() -> None:
        for user_id in MANY:
            full.get_latest(user_id)

    def bare() -> None:
        for point_id in ids:
            shard.retrieve([point_id], with_payload=True, with_vector=False)

    outcome = contest(benchmark, {"store": ours, "bare": bare}, calls=len(MANY))
    table.add("edge get_latest, cached", outcome.median("store") * 1e6, "us", most=1.5, note=medians(outcome))


@pytest.mark.parametrize("cache", ["hot", "cold"])
def test_get_history(benchmark: Any, table: Table, full: QdrantStore, cache: str) -> None:
    users, shard = MANY[:100], shard_of(full)
    order = edge.OrderBy("updated_at_unix_ms", edge.Direction.Desc)

    def ours() -> None:
        for user_id in users:
            assert len(full.get_history(user_id, limit=10)) == 10

    def bare() -> None:
        for user_id in users:
            of_user = edge.FieldCondition(key="user_id", match=edge.MatchValue(user_id))
            of_kind = edge.FieldCondition(key="kind", match=edge.MatchValue("history"))
            where = edge.Filter(must=[of_user, of_kind])
            shard.scroll(edge.ScrollRequest(limit=10, filter=where, with_payload=True, order_by=order))

    forget = core_of(full).forget_everything if cache == "cold" else tuple
    outcome = contest(benchmark, {"store": ours, "bare": bare}, calls=len(users), rounds=ROUNDS, setup=forget)
    table.add(
        f"edge get_history(limit=10), 50,000 points, {cache}",
        outcome.median("store") * 1e3,
        "ms",
        most=0.2,
        note=medians(outcome),
    )

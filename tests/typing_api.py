"""The library as its users write it: checked by mypy and pyright, never run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_type

from starlette.applications import Starlette

import attuned_store
from attuned_store import (
    ANY,
    CANONICAL_AXES,
    AsyncMemoryStore,
    AsyncQdrantStore,
    AsyncStateStore,
    BackendError,
    BreakerPolicy,
    Collection,
    CollectionInfo,
    ConflictError,
    Document,
    DocumentMatch,
    DocumentSet,
    Embedder,
    EmbeddingError,
    HashingEmbedder,
    Health,
    History,
    Match,
    Matches,
    MemoryStore,
    MemoryStoreConfig,
    QdrantStore,
    QdrantStoreConfig,
    RateLimitedError,
    RetryPolicy,
    SnapshotReport,
    Source,
    StateSnapshot,
    StateStore,
    StoreError,
    UpsertReport,
    UserDocuments,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from starlette.requests import Request


def values() -> None:
    snapshot = StateSnapshot("ann", {"warmth": 0.7})
    StateSnapshot(user_id="ann", axes={"warmth": 1}, updated_at_unix_ms=5, source="inferred", confidence=0.5)
    StateSnapshot("ann", snapshot.axes, 5, Source.MIXED, 1, 2)

    assert_type(snapshot.user_id, str)
    assert_type(snapshot.axes["warmth"], float)
    assert_type(snapshot.updated_at_unix_ms, int)
    assert_type(snapshot.source, Source)
    assert_type(snapshot.confidence, float)
    assert_type(snapshot.schema_version, int)
    assert_type(snapshot.axis("warmth"), float)
    assert_type(snapshot.patched({"warmth": 0.8}, confidence=0.9), StateSnapshot)
    assert_type(StateSnapshot.from_dict(snapshot.to_dict()), StateSnapshot)
    canonical: tuple[str, ...] = CANONICAL_AXES
    assert len(canonical) == 23
    axes: Mapping[str, float] = snapshot.axes
    assert hash(snapshot) == hash(snapshot.axes) or axes


def writing(store: StateStore, snapshot: StateSnapshot) -> None:
    store.upsert_latest(snapshot)
    store.upsert_latest(snapshot, expected=None)
    store.upsert_latest(snapshot, expected=store.get_latest("ann"))
    store.upsert_latest(snapshot, expected=ANY)
    assert_type(store.upsert_many([snapshot]), int)
    assert_type(store.upsert_many((s for s in [snapshot]), progress=report), int)
    assert_type(store.patch("ann", {"warmth": 0.8}, source="mixed", confidence=0.5), StateSnapshot)
    assert_type(store.update("ann", warmer, attempts=3), StateSnapshot | None)
    assert_type(store.update("ann", lambda latest: latest and latest.patched({})), StateSnapshot | None)
    assert_type(store.delete("ann"), bool)
    assert_type(store.prune(), int)


def report(done: int, total: int | None) -> None:
    assert total is None or done <= total


def warmer(latest: StateSnapshot | None) -> StateSnapshot | None:
    return latest and latest.patched({"warmth": latest.axis("warmth") / 2 + 0.5})


async def warmer_later(latest: StateSnapshot | None) -> StateSnapshot | None:
    return warmer(latest)


def reading(store: StateStore, snapshot: StateSnapshot) -> None:
    assert_type(store.get_latest("ann"), StateSnapshot | None)
    assert_type(store.get_latest("ann", snapshot), StateSnapshot)
    assert_type(store.get_latest("ann", 5), StateSnapshot | int)
    assert_type(store.get_many({"ann", "bob"}), dict[str, StateSnapshot])
    assert_type(store.get_history("ann", 5, since=0, until=10), list[StateSnapshot])
    assert_type(store.search_similar("ann", limit=3, exclude_user_id=""), list[Match])
    assert_type(
        store.search_similar({"warmth": 0.9}, source=Source.INFERRED, min_confidence=0.5), list[Match]
    )
    assert_type(
        store.search_similar(
            snapshot, score_threshold=0.5, user_id="bob", source="mixed", since=1, until=2, history=True
        ),
        list[Match],
    )
    for match in store.search_similar(snapshot):
        assert_type(match.snapshot, StateSnapshot)
        assert_type(match.score, float)
    users: Iterator[str] = store.users()
    assert_type(next(users), str)
    assert_type(store.count(), int)
    assert_type(store.count(history=True), int)
    assert_type(store.health(), Health)
    assert_type(store.axes, tuple[str, ...])
    assert_type(store.is_closed, bool)
    assert_type(store._repr_html_(), str)
    assert_type(snapshot._repr_html_(), str)
    assert_type(History(store.get_history("ann")), History)
    assert_type(Matches(store.search_similar(snapshot), {"warmth": 0.9}), Matches)
    store.plot_history("ann").set_title("Ann")
    store.plot_history("ann", axes=["warmth"])
    assert_type(store.wait_until_ready(timeout=5), None)


def backing_up(store: StateStore, other: StateStore, path: Path) -> None:
    taken = store.create_snapshot(path, kind="portable", reason="api", keep=7, progress=report)
    assert_type(taken, SnapshotReport)
    assert_type(taken.status, Literal["completed", "failed", "skipped"])
    assert_type(taken.kind, Literal["native", "portable"] | None)
    assert_type(taken.path, Path | None)
    assert_type(taken.created_at, datetime | None)
    assert_type(taken.axes, tuple[str, ...] | None)
    assert_type(taken.users, int | None)
    assert_type(taken.to_dict()["sha256"], Any)
    assert_type(store.restore_snapshot(path, mode="merge", progress=report), SnapshotReport)
    assert_type(attuned_store.verify_snapshot(path, progress=report), SnapshotReport)
    assert_type(attuned_store.list_snapshots(path), list[SnapshotReport])
    assert_type(attuned_store.list_snapshots(), list[SnapshotReport])
    assert_type(attuned_store.copy(store, other, replace=True, progress=report), SnapshotReport)
    assert_type(attuned_store.copy("here", path), SnapshotReport)
    assert_type(attuned_store.snapshot_on_start(store, timeout=5, keep=7), SnapshotReport)


async def backing_up_async(store: AsyncStateStore, other: AsyncStateStore, path: Path) -> None:
    assert_type(await store.create_snapshot(path, keep_remote=True), SnapshotReport)
    assert_type(await store.restore_snapshot(path, mode="skip"), SnapshotReport)
    assert_type(await attuned_store.averify_snapshot(path), SnapshotReport)
    assert_type(await attuned_store.alist_snapshots(path), list[SnapshotReport])
    assert_type(await attuned_store.acopy(store, other), SnapshotReport)
    assert_type(await attuned_store.asnapshot_on_start(store), SnapshotReport)
    await store.wait_until_ready(timeout=5)
    (await store.plot_history("ann", axes=["warmth"])).set_title("Ann")


def serving_from(url: str) -> None:
    retry, breaker = RetryPolicy(attempts=2, base_s=0.5), BreakerPolicy(failures=3, open_s=10)
    with QdrantStore(url=url, retry=retry, breaker=breaker, slow_operation_ms=None, verify=False) as store:
        assert_type(store.config.slow_operation_ms, float | None)
        assert_type(store.config.retry, RetryPolicy)
        assert_type(store.health().version, str | None)


def as_a_mapping(store: StateStore) -> None:
    assert_type(store["ann"], StateSnapshot)
    assert_type("ann" in store, bool)
    assert_type(len(store), int)
    assert_type(sorted(store), list[str])
    assert_type(store.get("ann"), StateSnapshot | None)
    assert_type(store.get("ann", store["bob"]), StateSnapshot)
    assert_type(dict(store), dict[str, StateSnapshot])
    assert_type(dict(store.items()), dict[str, StateSnapshot])
    assert_type(list(store.values()), list[StateSnapshot])


def tables(store: StateStore, path: Path) -> None:
    table = attuned_store.read_table(
        path, format="csv", scale=(0, 31), scales={"calm": (1, 7)}, ignore=["age"]
    )
    assert_type(table, attuned_store.StateTable)
    assert_type(table.axes, tuple[str, ...])
    assert_type(table.check(progress=report).examples, tuple[attuned_store.BadRow, ...])
    assert_type(table.report.span, tuple[float, float] | None)
    assert_type(store.upsert_many(table), int)
    assert_type(store.patch("ann", {"warmth": None, "calm": 0.5}), StateSnapshot)
    assert_type(store.alter_axes(add=["calm"]), tuple[str, ...])
    attuned_store.copy(path, store, rename={"warmth": "kindness"}, drop=["calm"])
    attuned_store.restore(path, path, options={"engine": "local"})
    store.to_dataframe(["ann"], since=5).head()


def opening(path: Path) -> None:
    with MemoryStore(max_history_per_user=5, enable_history=True) as memory:
        assert_type(memory, MemoryStore)
        assert_type(memory.config, MemoryStoreConfig)
    with QdrantStore(path=path, engine="edge", durability="power", history_retention_days=30) as embedded:
        assert_type(embedded, QdrantStore)
        assert_type(embedded.config, QdrantStoreConfig)
    MemoryStore(MemoryStoreConfig(axes=("energetic_arousal",), vector_size=4)).close()
    MemoryStore(MemoryStoreConfig.from_env()).close()
    QdrantStore(
        QdrantStoreConfig(path=str(path), lock_timeout=1.5, cache_size=0, collection_name="mine")
    ).close()
    assert_type(attuned_store.open_store(), StateStore)
    with attuned_store.open_store("memory://") as store:
        assert_type(store, StateStore)
    assert_type(attuned_store.open_store(path, max_history_per_user=5), StateStore)


def catching(store: StateStore, snapshot: StateSnapshot) -> None:
    try:
        store.upsert_latest(snapshot, expected=None)
    except ConflictError as error:
        assert_type(error.ambiguous, bool)
    except RateLimitedError as error:
        assert_type(error.retry_after_s, float)
    except BackendError as error:
        assert_type((error.backend, error.operation, error.retryable), tuple[str, str, bool])
        assert_type(error.status, int | None)
    except StoreError as error:
        assert_type(error.written, int | None)


def vectors_of(texts: list[str]) -> list[list[float]]:
    return [[float(len(text))] for text in texts]


async def vectors_awaited(texts: Sequence[str]) -> list[tuple[float, ...]]:
    return [(float(len(text)),) for text in texts]


def embedding(client: Any) -> None:
    once = RetryPolicy(attempts=1)
    Embedder(vectors_of, name="lengths", dimensions=1)
    Embedder(vectors_awaited, name="lengths", dimensions=1, batch_size=10, max_characters=8_000, retry=once)
    assert_type(
        Embedder(lambda texts: client.embed(input=texts), name="n", dimensions=3, embed_query=client.query),
        Embedder,
    )
    embedder: Embedder = HashingEmbedder(256)
    assert_type((embedder.name, embedder.dimensions, embedder.windows), tuple[str, int, Literal["mean"]])
    error = EmbeddingError("failed", backend="embedder", operation="embed", retryable=True)
    assert_type(error.retryable, bool)


def documents(store: StateStore, when: datetime) -> None:
    trades = store.collection("trades", HashingEmbedder(8), indexes={"symbol": "keyword"}, ttl=60)
    assert_type(trades, Collection)
    mine = trades.for_user("ann")
    assert_type(mine, UserDocuments)
    assert_type(trades.shared(), UserDocuments)
    assert_type(trades.all_users(), DocumentSet)
    document = Document("a", "text", {"symbol": ["NQ"], "at": when}, updated_at=when, ttl=1.5)
    assert_type(document.fields, "Mapping[str, Any]")
    assert_type(document.updated_at, datetime)
    mine.upsert(document)
    assert_type(mine.upsert_many([document], progress=report), UpsertReport)
    assert_type(mine.get("a"), Document | None)
    assert_type(mine.get_many(["a"]), dict[str, Document])
    assert_type(mine.documents({"symbol": "NQ"}, limit=5, newest_first=True), list[Document])
    assert_type(mine.search("text", {"symbol": ["NQ"]}, limit=5, shared=True)[0].score, float)
    assert_type(mine.count(), int)
    assert_type(mine.delete("a"), bool)
    assert_type(mine.delete_many({}), int)
    assert_type(trades.refresh(), UpsertReport)
    assert_type(store.collections(), list[CollectionInfo])
    assert_type(store.erase("ann").documents, "Mapping[str, int]")


async def documents_async(store: AsyncStateStore) -> None:
    mine = store.collection("trades").for_user("ann")
    assert_type(await mine.get("a"), Document | None)
    assert_type(await mine.search([0.1, 0.2]), list[DocumentMatch])
    assert_type(await store.collection("trades").all_users().documents(), list[Document])
    assert_type(await store.collections(), list[CollectionInfo])


async def asynchronous(store: AsyncStateStore, snapshot: StateSnapshot) -> None:
    await store.upsert_latest(snapshot, expected=await store.get_latest("ann"))
    assert_type(await store.upsert_many(iter([snapshot]), progress=report), int)
    assert_type(await store.patch("ann", {"warmth": 0.8}, confidence=0.5), StateSnapshot)
    assert_type(await store.update("ann", warmer), StateSnapshot | None)
    assert_type(await store.update("ann", warmer_later), StateSnapshot | None)
    assert_type(await store.get_latest("ann"), StateSnapshot | None)
    assert_type(await store.get_many(["ann"]), dict[str, StateSnapshot])
    assert_type(await store.get_history("ann", limit=5), list[StateSnapshot])
    assert_type(await store.search_similar("ann", limit=3), list[Match])
    users: AsyncIterator[str] = store.users()
    assert_type(await anext(users), str)
    assert_type([user_id async for user_id in store.users()], list[str])
    assert_type(await store.count(history=True), int)
    assert_type(await store.delete("ann"), bool)
    assert_type(await store.prune(), int)
    assert_type(await store.health(), Health)
    assert_type(store.axes, tuple[str, ...])
    assert_type(store.is_closed, bool)
    await store.aclose()


async def opening_async(path: Path) -> None:
    async with AsyncMemoryStore(max_history_per_user=5) as memory:
        assert_type(memory, AsyncMemoryStore)
        assert_type(memory.config, MemoryStoreConfig)
    async with AsyncQdrantStore(path=path, engine="local") as embedded:
        assert_type(embedded, AsyncQdrantStore)
        assert_type(embedded.config, QdrantStoreConfig)
    async with attuned_store.open_async_store("memory://", history_retention_days=30) as store:
        assert_type(store, AsyncStateStore)


async def is_known(request: Request) -> bool:
    return request.headers.get("x-name") == "ann"


def who_asks(request: Request) -> str | None:
    return request.headers.get("x-name")


def serving(store: StateStore, other: AsyncStateStore, path: Path) -> None:
    assert_type(
        attuned_store.snapshot_app(store, other, authorize=is_known, directory=path, keep=7), Starlette
    )
    assert_type(attuned_store.snapshot_app(store, authorize=lambda request: bool(request.client)), Starlette)
    assert_type(
        attuned_store.service_app(store, other, authorize=who_asks, directory=path, keep=7), Starlette
    )
    assert_type(attuned_store.service_app(store, authorize=is_known), Starlette)


def wrong(store: StateStore, snapshot: StateSnapshot) -> None:
    """What the checkers must refuse: an ignore that is not needed is an error in both."""
    store.upsert_latest("ann")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    store.get_history("ann", since="yesterday")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    store.count(True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    snapshot.confidence = 0.5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    snapshot.axes["warmth"] = 0.5  # type: ignore[index]  # pyright: ignore[reportIndexIssue]
    MemoryStore(colour="red")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    QdrantStore(engine="sqlite")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

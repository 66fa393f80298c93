"""The store on a server: its requests, opening, races, retention, what it refuses and what health says."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import logging
import os
import random
import socket
import ssl
import subprocess
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.lowlevel
import attrs
import certifi
import httpx
import pytest
from conformance import (
    DAY,
    HOUR,
    NOW,
    Awaited,
    Clock,
    archived,
    environment,
    needs,
    script,
    state,
    together,
)
from qdrant_server import (
    Action,
    Exchange,
    QdrantServer,
    Response,
    delay,
    drip,
    drop,
    duplicate,
    edit,
    hang,
    lose_reply,
    not_json,
    other_shape,
    reply,
    reset,
    tear,
    truncate,
)

import attuned_store
from attuned_store import (
    CANONICAL_AXES,
    AsyncQdrantStore,
    AsyncStateStore,
    BackendError,
    BackendRejectedError,
    BackendTimeoutError,
    BackendUnavailableError,
    BreakerPolicy,
    CircuitOpenError,
    ConflictError,
    Put,
    QdrantStore,
    QdrantStoreConfig,
    RetryPolicy,
    SchemaMismatchError,
    StateSnapshot,
    StoreClosedError,
    StoreError,
    UnsupportedServerError,
    UserNotFoundError,
    ValidationError,
    make_point_id,
    open_store,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

pytestmark = [pytest.mark.once, pytest.mark.anyio, pytest.mark.timeout(120)]

C = "attuned_state"
INFO = "GET /"
DESCRIBE = "GET /collections/{collection}"
CREATE = "PUT /collections/{collection}"
INDEX = "PUT /collections/{collection}/index"
UPSERT = "PUT /collections/{collection}/points"
BATCH = "POST /collections/{collection}/points/batch"
RETRIEVE = "POST /collections/{collection}/points"
SCROLL = "POST /collections/{collection}/points/scroll"
QUERY = "POST /collections/{collection}/points/query"
COUNT = "POST /collections/{collection}/points/count"
CLUSTER = "GET /collections/{collection}/cluster"
DELETE = "POST /collections/{collection}/points/delete"
INDEXES = {
    "user_id": "keyword",
    "kind": "keyword",
    "updated_at_unix_ms": "integer",
    "source": "keyword",
    "confidence": "float",
    "restored": "keyword",
}
PATIENT = RetryPolicy(attempts=6, base_s=0)
KEY = "k3y-that-nobody-may-see"

Connect = "Callable[..., AsyncStateStore]"


# ------------------------------------------------------------------------------
# Stores and servers
# ------------------------------------------------------------------------------


def plain(server: QdrantServer | str, **options: Any) -> QdrantStore:
    """A synchronous store on a server, without loading certificates and without waiting to retry."""
    url = server if isinstance(server, str) else server.url
    return QdrantStore(**{"url": url, "verify": False, "retry": RetryPolicy(base_s=0), **options})


@pytest.fixture
async def store(connect: Any, server: QdrantServer) -> AsyncStateStore:
    """A store that has opened its collection; the server counts from here on."""
    store: AsyncStateStore = connect()
    await store.count()
    server.clear()
    return store


@pytest.fixture
def other(server: QdrantServer) -> Iterator[QdrantStore]:
    """Another client of the same collection, opened already."""
    with plain(server) as other:
        other.count()
        server.clear()
        yield other


def points(server: QdrantServer, collection: str = C) -> list[tuple[str, str, int]]:
    """What the server holds, read past the store: user, kind and time of every point."""
    payloads = [point["payload"] for point in server.dump(collection)]
    return sorted((p["user_id"], p["kind"], p["updated_at_unix_ms"] - NOW) for p in payloads)


def times_kept(server: QdrantServer, user_id: str = "ann") -> list[int]:
    """The times of the history points of a user on the server, ascending."""
    return [time_ms for user, kind, time_ms in points(server) if (user, kind) == (user_id, "history")]


def meanwhile(act: Callable[[], object]) -> Action:
    """Let someone else act, from a thread of his own, before the request goes on."""

    async def action(exchange: Exchange) -> Response:
        await asyncio.to_thread(act)
        return await exchange.proceed()

    return action


def meet(number: int) -> Action:
    """Hold answers back until so many requests have been executed."""
    done, all_done = itertools.count(1), asyncio.Event()

    async def action(exchange: Exchange) -> Response:
        response = await exchange.proceed()
        if next(done) >= number:
            all_done.set()
        await asyncio.wait_for(all_done.wait(), 30)
        return response

    return action


async def caught(operation: Awaitable[object]) -> StoreError:
    """The error of an operation, which must be one of ours, in one line."""
    with pytest.raises(StoreError) as raised:
        await operation
    assert len(str(raised.value).splitlines()) == 1
    return raised.value


# ------------------------------------------------------------------------------
# Requests
# ------------------------------------------------------------------------------

Operation = "Callable[[AsyncStateStore], Awaitable[object]]"
REQUESTS: dict[str, tuple[Any, dict[str, int]]] = {
    "upsert_latest": (lambda store: store.upsert_latest(state(at=5)), {UPSERT: 1}),
    "upsert_latest, older": (lambda store: store.upsert_latest(state(at=-5)), {UPSERT: 1}),
    "upsert_latest, expected": (
        lambda store: store.upsert_latest(state(at=5), expected=state()),
        {RETRIEVE: 3, UPSERT: 2},
    ),
    "upsert_many, a batch": (
        lambda store: store.upsert_many([state(f"user-{number}", number) for number in range(64)]),
        {UPSERT: 1},
    ),
    "upsert_many, two batches": (
        lambda store: store.upsert_many([state(f"user-{number}", number) for number in range(501)]),
        {UPSERT: 2},
    ),
    "get_latest": (lambda store: store.get_latest("ann"), {RETRIEVE: 1}),
    "get_latest, unknown": (lambda store: store.get_latest("nobody"), {RETRIEVE: 1}),
    "get_many": (lambda store: store.get_many(["ann", "bob", "nobody"]), {RETRIEVE: 1}),
    "get_many of 500": (lambda store: store.get_many(f"user-{n}" for n in range(500)), {RETRIEVE: 1}),
    "get_many of none": (lambda store: store.get_many([]), {}),
    "get_history": (lambda store: store.get_history("ann"), {SCROLL: 1}),
    "get_history, limit": (lambda store: store.get_history("ann", 1), {SCROLL: 1}),
    "get_history, since": (lambda store: store.get_history("ann", since=NOW), {SCROLL: 1}),
    "get_history, until": (lambda store: store.get_history("ann", until=NOW), {SCROLL: 1}),
    "get_history, both": (lambda store: store.get_history("ann", since=NOW - 1, until=NOW), {SCROLL: 1}),
    "get_history of none": (lambda store: store.get_history("ann", 0), {}),
    "search_similar": (lambda store: store.search_similar({"warmth": 1.0}), {QUERY: 1}),
    "search_similar, filtered": (
        lambda store: store.search_similar(state(), source="inferred", since=NOW, min_confidence=0.5),
        {QUERY: 1},
    ),
    "search_similar to a user": (lambda store: store.search_similar("ann"), {RETRIEVE: 1, QUERY: 1}),
    "patch": (lambda store: store.patch("ann", {"warmth": 0.1}), {RETRIEVE: 4, UPSERT: 2}),
    "count": (lambda store: store.count(), {COUNT: 1}),
    "delete": (lambda store: store.delete("ann"), {RETRIEVE: 1, DELETE: 1}),
    "delete, unknown": (lambda store: store.delete("nobody"), {RETRIEVE: 1, DELETE: 1}),
    "health": (lambda store: store.health(), {INFO: 1, DESCRIBE: 1, CLUSTER: 1, COUNT: 1}),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_every_operation_takes_a_fixed_number_of_requests(
    name: str, store: AsyncStateStore, server: QdrantServer
) -> None:
    """Reads and unconditional writes are one request, deletes two; a conditional write is five."""
    await store.upsert_many([state(), state("bob")])
    server.clear()
    operation, expected = REQUESTS[name]

    await operation(store)

    assert dict(server.counts) == expected


async def test_one_connection_serves_one_caller(store: AsyncStateStore, server: QdrantServer) -> None:
    """Connections are kept and used again: one after another, operations share a single one."""
    await store.upsert_latest(state())
    server.clear()

    for number in range(20):
        await store.upsert_latest(state(at=number))
        await store.get_latest("ann")

    assert server.accepted == 0
    assert len(server.requests) == 40


async def test_the_pool_bounds_the_connections(connect: Any, server: QdrantServer) -> None:
    """However many callers there are, no more than pool_size connections are opened."""
    store = connect(pool_size=3)
    await store.count()
    server.on(delay(0.002))

    await together(store, [functools.partial(store.get_latest, "ann")] * 60)

    assert server.counts[RETRIEVE] == 60
    assert 1 < server.accepted <= 3


@pytest.mark.parametrize("size", [1, 3, 8])
async def test_the_pool_is_used_to_the_full(
    size: int, connect: Any, server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many callers as there are connections are served at the same time."""
    monkeypatch.setattr(attuned_store.ConnectionPools, "CONNECTIONS", 3)
    store = connect(pool_size=size)
    await store.count()
    server.clear()
    server.on(meet(size), route=RETRIEVE)

    await together(store, [functools.partial(store.get_latest, "ann")] * size)

    assert server.accepted == size - 1


async def test_connections_that_the_server_closed_are_replaced(connect: Any, server: QdrantServer) -> None:
    """A server that ends idle connections, as every restart does, is not noticed by the caller."""
    store = connect(retry=PATIENT, breaker=BreakerPolicy(failures=10**6))
    await together(store, [functools.partial(store.get_latest, "ann")] * 8)

    for _ in range(3):
        server.disconnect()
        await together(store, [functools.partial(store.upsert_latest, state(at=at)) for at in range(8)])

    assert times_kept(server) == list(range(8))


async def test_requests_say_how_consistent_and_ordered_they_are_to_be(
    connect: Any, server: QdrantServer
) -> None:
    """read_consistency goes with every read, write_ordering with every write, and writes are waited for."""
    store = connect(read_consistency="majority", write_ordering="strong")
    await store.upsert_latest(state())
    await store.upsert_many([state("bob"), state("cleo")])
    await store.get_latest("ann")
    await store.get_history("ann")
    await store.search_similar({"warmth": 1.0})
    await store.delete("ann")

    reads = [r for r in server.requests if r.route in (RETRIEVE, SCROLL, QUERY)]
    writes = [r for r in server.requests if r.is_write()]
    assert [r.query.get("consistency") for r in reads] == ["majority"] * 4
    assert [(r.query.get("ordering"), r.query.get("wait")) for r in writes] == [("strong", "true")] * 3


# ------------------------------------------------------------------------------
# Event loops
# ------------------------------------------------------------------------------


def wanted(server: QdrantServer, **options: Any) -> AsyncQdrantStore:
    """An asynchronous store that no event loop has used yet."""
    return AsyncQdrantStore(url=server.url, verify=False, retry=RetryPolicy(attempts=1), **options)


async def counts_on(store: AsyncQdrantStore, times: int = 1) -> int:
    """What a loop does with a store: it counts in it, looks at its health, and does not close it."""
    for _ in range(times):
        found = await store.update("ann", lambda old: old.patched({}) if old else state(), attempts=10_000)
        assert await store.get_latest("ann") is not None
    assert (await store.health()).status == "healthy"
    return found.updated_at_unix_ms - NOW


async def ended(server: QdrantServer) -> None:
    """Wait until clients have ended every connection."""
    with anyio.fail_after(30):
        while server.open_connections:  # noqa: ASYNC110 - the server is in another thread
            await anyio.sleep(0.001)


LOOPS = [
    "asyncio",
    pytest.param("trio", marks=needs("trio")),
]


@pytest.mark.parametrize("loop", LOOPS)
def test_an_application_starts_before_its_server(loop: str, closed_port: int) -> None:
    """Entering an asynchronous store connects to nothing; the first operation does."""
    store = AsyncQdrantStore(url=f"http://127.0.0.1:{closed_port}", retry=RetryPolicy(attempts=1))

    async def start() -> None:
        async with store as entered:
            assert entered is store
            assert (await store.health()).status == "unhealthy"
            with pytest.raises(BackendUnavailableError):
                await store.get_latest("ann")
        with pytest.raises(StoreClosedError):
            await store.__aenter__()

    anyio.run(start, backend=loop)


@pytest.mark.parametrize("second", LOOPS)
@pytest.mark.parametrize("first", LOOPS)
def test_a_store_outlives_its_event_loop(first: str, second: str, server: QdrantServer) -> None:
    """One store serves one event loop after another, of asyncio and of trio; none leaves connections open."""
    store = wanted(server)

    for backend in (first, second, first):
        anyio.run(counts_on, store, backend=backend)
        anyio.run(ended, server)
        gc.collect()  # what was left open would warn
        assert cast("Any", store)._operations.place.connection.engine._clients.of_loops == {}

    anyio.run(store.aclose, backend=second)
    assert len(times_kept(server)) == 3


def test_a_store_serves_two_event_loops_at_once(server: QdrantServer) -> None:
    """Two threads, each with an event loop of its own, share one store, and nothing of theirs is lost."""
    store = wanted(server)

    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(asyncio.run, counts_on(store, 20)) for _ in range(2)]
        assert all(run.result(60) for run in runs)

    assert len(times_kept(server)) == 40
    asyncio.run(ended(server))


def test_closing_a_store_closes_the_connections_of_its_loop(server: QdrantServer) -> None:
    """aclose() ends the connections at once; a loop that has made none is none the wiser."""

    async def use_and_close() -> None:
        async with wanted(server) as store:
            await counts_on(store)
            assert server.open_connections
        await ended(server)
        await store.aclose()

    asyncio.run(use_and_close())
    asyncio.run(wanted(server).aclose())
    assert server.open_connections == 0
    assert len(times_kept(server)) == 1  # what it wrote is there


def test_a_store_that_is_dropped_closes_its_connections(server: QdrantServer) -> None:
    """A store that goes without being closed leaves nothing open in an event loop that goes on."""

    async def use_and_drop() -> None:
        await counts_on(wanted(server))
        gc.collect()
        await ended(server)

    asyncio.run(use_and_drop())
    assert server.open_connections == 0
    assert len(times_kept(server)) == 1  # what it wrote is there


# ------------------------------------------------------------------------------
# Opening
# ------------------------------------------------------------------------------


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # no certificates, which take long to load


def ask(server: QdrantServer, method: str, path: str, body: Any = None) -> Any:
    """A request past the store, and the result in its answer."""
    url = f"{server.url}/collections/{path}"
    return httpx.request(method, url, json=body, verify=NO_TLS).raise_for_status().json()["result"]


def make_collection(server: QdrantServer, **changes: Any) -> None:
    """Create the collection as the store would, or with changes, and without indexes."""
    metadata = {"format_version": 1, "axes": list(CANONICAL_AXES), "vector_size": 24}
    body = {"vectors": {"size": 24, "distance": "Cosine"}, "metadata": metadata, **changes}
    ask(server, "PUT", C, body)


def make_indexes(server: QdrantServer, keys: Iterable[str] = INDEXES) -> None:
    for key in keys:
        body = {"field_name": key, "field_schema": INDEXES[key]}
        ask(server, "PUT", f"{C}/index", body)


def described(server: QdrantServer, collection: str = C) -> dict[str, Any]:
    return cast("dict[str, Any]", ask(server, "GET", collection))


async def test_nothing_is_sent_before_the_first_use(connect: Any, server: QdrantServer) -> None:
    """A store is made without its server: not even a connection is opened before it is needed."""
    server.down()
    store = connect()
    assert repr(store.store if isinstance(store, Awaited) else store)
    server.up()
    assert (server.accepted, server.requests) == (0, [])

    await store.upsert_latest(state())

    assert await store.get_latest("ann") == state()


async def test_the_first_use_makes_the_collection(connect: Any, server: QdrantServer) -> None:
    """The collection has 24 dimensions, Cosine, a tenant index and five more, and records its axes."""
    store = connect(shard_number=2, replication_factor=1, write_consistency_factor=1)
    assert await store.get_latest("ann") is None

    found = described(server)
    assert found["config"]["params"]["vectors"] == {"size": 24, "distance": "Cosine"}
    assert {key: schema["data_type"] for key, schema in found["payload_schema"].items()} == INDEXES
    assert found["payload_schema"]["user_id"]["params"]["is_tenant"] is True
    assert found["config"]["metadata"]["axes"] == list(CANONICAL_AXES)
    created = next(request.json for request in server.requests if request.route == CREATE)
    factors = ("shard_number", "replication_factor", "write_consistency_factor")
    assert [created[name] for name in factors] == [2, 1, 1]


async def test_racing_creators_all_succeed(connect: Any, server: QdrantServer) -> None:
    """Stores that all find the collection absent, and all create it, all go on."""
    server.on(meet(6), route=DESCRIBE, times=6)
    stores = [connect() for _ in range(6)]

    await together(
        stores[0], [functools.partial(s.upsert_latest, state(at=at)) for at, s in enumerate(stores)]
    )

    assert server.counts[CREATE] == 6  # so five of them were told 409
    assert described(server)["payload_schema"].keys() == INDEXES.keys()
    assert times_kept(server) == list(range(6))


def test_racing_processes_all_succeed(server: QdrantServer) -> None:
    """Processes that start at once on a new collection all write into it."""
    server.on(meet(3), route=DESCRIBE, times=3)
    code = """
import sys
from attuned_store import QdrantStore, StateSnapshot
with QdrantStore(url=sys.argv[1], verify=False) as store:
    store.upsert_latest(StateSnapshot(sys.argv[2], {}, 5))
"""

    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(lambda name: python(code, server.url, name), ["ann", "bob", "cleo"]))

    assert [(process.returncode, process.stderr) for process in ended] == [(0, "")] * 3
    assert server.counts[CREATE] == 3
    assert {user for user, _, _ in points(server)} == {"ann", "bob", "cleo"}


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        script(code, *arguments), capture_output=True, text=True, env=environment(), timeout=60, check=False
    )


async def test_a_creation_whose_answer_was_lost_is_taken_up(connect: Any, server: QdrantServer) -> None:
    """A lost reply to the creation, and the 409 that the next attempt gets, are no error."""
    server.on(lose_reply(), route=CREATE, times=1)
    server.on(lose_reply(), route=INDEX, times=2)

    await connect().upsert_latest(state())

    assert server.counts[CREATE] == 2
    assert described(server)["payload_schema"].keys() == INDEXES.keys()
    assert len(points(server)) == 2


@pytest.mark.parametrize("present", [(), ("user_id",), ("kind", "source", "updated_at_unix_ms")])
async def test_a_half_made_collection_is_completed(
    present: tuple[str, ...], connect: Any, server: QdrantServer
) -> None:
    """Where the creator died before it had made the indexes, the next one makes those that are missing."""
    make_collection(server)
    make_indexes(server, present)
    server.clear()

    await connect().upsert_latest(state())

    made = [request.json["field_name"] for request in server.requests if request.route == INDEX]
    assert sorted(made) == sorted(INDEXES.keys() - set(present))
    assert described(server)["payload_schema"].keys() == INDEXES.keys()


META = {"format_version": 1, "axes": list(CANONICAL_AXES), "vector_size": 24}
MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another size": ({"vectors": {"size": 12, "distance": "Cosine"}}, {}, "24 and Cosine"),
    "another distance": ({"vectors": {"size": 24, "distance": "Dot"}}, {}, "24 and Cosine"),
    "named vectors": ({"vectors": {"mood": {"size": 24, "distance": "Cosine"}}}, {}, "24 and Cosine"),
    "other axes": ({}, {"axes": ("warmth", "tact"), "vector_size": 24}, "axes"),
    "another vector_size": ({}, {"vector_size": 25}, "vector_size 24; this store asks for 25"),
    "not ours": ({"metadata": None}, {}, "not made by attuned_store"),
    "a newer format": ({"metadata": {**META, "format_version": 99}}, {}, "upgrade"),
}


EARLY = ("other axes", "another vector_size", "a newer format")


@pytest.mark.parametrize(
    ("name", "indexed"),
    [(name, True) for name in MISFITS] + [pytest.param(name, False) for name in MISFITS],
)
async def test_a_collection_that_does_not_fit_is_left_alone(
    name: str, indexed: bool, connect: Any, server: QdrantServer
) -> None:
    """Another size, distance or schema is SchemaMismatchError, and the server is only asked, never told."""
    changes, options, hint = MISFITS[name]
    make_collection(server, **changes)
    if indexed:
        make_indexes(server)
    before = described(server)
    server.clear()

    error = await caught(connect(**options).upsert_latest(state()))

    assert isinstance(error, SchemaMismatchError)
    assert C in str(error)
    assert hint in str(error)
    assert {request.method for request in server.requests} == {"GET"}
    assert (described(server), server.dump(C)) == (before, [])


@pytest.mark.parametrize(
    "metadata",
    [
        {"owner": "someone else"},
        pytest.param({**META, "axes": ["Not An Axis"]}),
        pytest.param({**META, "axes": [5] * 24}),
    ],
)
async def test_metadata_of_someone_else_is_not_ours(
    metadata: dict[str, Any], connect: Any, server: QdrantServer
) -> None:
    """A collection whose metadata is not this library's is SchemaMismatchError."""
    make_collection(server, metadata=metadata)

    assert isinstance(await caught(connect().upsert_latest(state())), SchemaMismatchError)
    assert server.dump(C) == []


async def test_metadata_of_someone_else_is_called_so(connect: Any, server: QdrantServer) -> None:
    """The message says that the collection is another program's, not that its size is wrong."""
    make_collection(server, metadata={"owner": "someone else"})

    assert "not made by attuned_store" in str(await caught(connect().upsert_latest(state())))


@pytest.mark.parametrize("number", ["1.16.3", "1.9.7", "0.11.1"])
async def test_an_older_server_is_refused(number: str, connect: Any, server: QdrantServer) -> None:
    """A server below 1.17 is UnsupportedServerError with its version, and is told nothing."""
    server.version = number

    error = await caught(connect().upsert_latest(state()))

    assert isinstance(error, UnsupportedServerError)
    assert number in str(error)
    assert "1.17" in str(error)
    assert dict(server.counts) == {INFO: 1}


@pytest.mark.parametrize("number", ["1.17.0", "1.17.0-dev", "1.20.3", "2.0.0"])
async def test_a_newer_server_will_do(number: str, connect: Any, server: QdrantServer) -> None:
    """1.17 and everything after it is accepted."""
    server.version = number

    await connect().upsert_latest(state())

    assert len(points(server)) == 2


async def test_a_store_that_could_not_open_opens_later(connect: Any, server: QdrantServer) -> None:
    """Nothing of a failed opening is remembered: once the server has been upgraded, the store works."""
    store = connect()
    server.version = "1.16.0"
    assert isinstance(await caught(store.get_latest("ann")), UnsupportedServerError)

    server.version = "1.17.0"

    assert await store.get_latest("ann") is None


async def test_a_collection_that_vanishes_while_it_is_opened_is_an_error(
    connect: Any, server: QdrantServer
) -> None:
    """A collection that somebody deletes right after its creation is a StoreError, not a crash."""
    store, gone = connect(), server.on(reply(404), route=DESCRIBE)
    await caught(store.get_latest("ann"))
    assert gone.hits

    server.calm()

    assert await store.get_latest("ann") is None
    assert described(server)["payload_schema"].keys() == INDEXES.keys()


async def test_a_collection_that_was_dropped_is_made_again(
    store: AsyncStateStore, server: QdrantServer
) -> None:
    """After somebody has dropped the collection under an open store, its next operation makes it anew."""
    for name, (operation, _) in REQUESTS.items():
        await store.upsert_latest(state())
        ask(server, "DELETE", C)
        server.clear()

        with contextlib.suppress(UserNotFoundError, ConflictError):  # what was expected, or sought, is gone
            await operation(store)

        await store.upsert_latest(state("zoe"))
        assert await store.get_latest("zoe") == state("zoe"), name
        assert described(server)["payload_schema"].keys() == INDEXES.keys(), name


async def test_a_collection_that_is_made_again_has_the_axes_that_it_had(
    connect: Any, server: QdrantServer
) -> None:
    """A store that adopted the axes of its collection keeps them when it makes the collection anew."""
    await connect(axes=("warmth", "tact")).count()
    store = connect()
    await store.upsert_latest(state(axes={"tact": 0.5}))
    ask(server, "DELETE", C)

    await store.upsert_latest(state(axes={"tact": 0.25}))

    assert described(server)["config"]["metadata"]["axes"] == ["warmth", "tact"]
    assert await store.get_latest("ann") == state(axes={"tact": 0.25})


async def test_many_find_at_once_that_the_collection_was_dropped(
    store: AsyncStateStore, server: QdrantServer
) -> None:
    """Threads and tasks that all meet a dropped collection all go on, and nothing of theirs is missing."""
    ask(server, "DELETE", C)
    server.clear()
    server.on(meet(8), route=UPSERT, times=8)

    await together(store, [functools.partial(store.upsert_latest, state(at=at)) for at in range(8)])

    assert times_kept(server) == list(range(8))
    assert server.counts[UPSERT] == 16
    assert server.counts[CREATE] <= 8


async def test_a_collection_that_is_dropped_again_and_again_is_an_error(
    store: AsyncStateStore, server: QdrantServer
) -> None:
    """An operation makes the collection anew once; if that does not help it fails, and does not loop."""
    server.on(meanwhile(functools.partial(ask, server, "DELETE", C)), route=UPSERT)

    error = await caught(store.upsert_latest(state()))

    assert isinstance(error, BackendRejectedError)
    assert "doesn't exist" in str(error)
    assert server.counts[UPSERT] == 2


NOT_FOUND: dict[str, Action] = {
    "another thing": reply(404, {"status": {"error": "Not found: No point with id 5 found"}, "time": 0.0}),
    "another collection": reply(404, {"status": {"error": "Not found: Collection `x` doesn't exist!"}}),
    "a page of a gateway": reply(404, b"<html>Not Found</html>"),
    "nothing": reply(404, b""),
}


@pytest.mark.parametrize("name", NOT_FOUND)
async def test_any_other_404_makes_no_collection(
    name: str, store: AsyncStateStore, server: QdrantServer
) -> None:
    """Only Qdrant's own word that the collection is absent counts: other 404s are raised as they are."""
    server.on(NOT_FOUND[name], route=UPSERT)

    assert isinstance(await caught(store.upsert_latest(state())), BackendRejectedError)
    assert dict(server.counts) == {UPSERT: 1}


# ------------------------------------------------------------------------------
# The newest wins, whoever writes it
# ------------------------------------------------------------------------------

WRITE_SHUFFLED = """
import json, random, sys
from attuned_store import QdrantStore, RetryPolicy, StateSnapshot
url, seed, part, users, steps = sys.argv[1], *map(int, sys.argv[2:])
times = [(user, at) for user in range(users) for at in range(part, steps, 2)]
random.Random(seed + part).shuffle(times)
store = QdrantStore(url=url, verify=False, retry=RetryPolicy(attempts=8, base_s=0))
store.count()
print("ready", flush=True); sys.stdin.readline()
for user, at in times:
    store.upsert_latest(StateSnapshot(f"user-{user}", {"warmth": at / steps}, at))
print("done", flush=True); sys.stdin.readline()
names = [f"user-{user}" for user in range(users)]
latest = {name: found.to_dict() for name, found in store.get_many(names).items()}
print(json.dumps([latest, {name: [s.to_dict() for s in store.get_history(name)] for name in names}]))
"""


@contextlib.contextmanager
def processes(code: str, *calls: tuple[object, ...]) -> Iterator[list[subprocess.Popen[str]]]:
    """Programs that run at once and are spoken to line by line."""
    with contextlib.ExitStack() as stack:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        yield [
            stack.enter_context(subprocess.Popen(script(code, *call), env=environment(), **pipes))
            for call in calls
        ]


def hear(started: list[subprocess.Popen[str]], word: str | None = None) -> list[str]:
    """A line of each, which must be this word."""
    lines = [cast("Any", process.stdout).readline().strip() for process in started]
    assert word is None or lines == [word] * len(lines)
    return lines


def go_on(started: list[subprocess.Popen[str]]) -> None:
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_two_processes_end_with_the_newest(server: QdrantServer, loss: float) -> None:
    """Two processes write the same users in random order: both end with the newest state of each."""
    seed, users, steps = random.randrange(10**6), 4, 60
    server.random.seed(seed)
    calls = [(server.url, seed, part, users, steps) for part in range(2)]
    with processes(WRITE_SHUFFLED, *calls) as started:
        hear(started, "ready")
        server.on(lose_reply(), when=lambda request: request.is_write(), probability=loss)
        go_on(started)
        hear(started, "done")
        server.calm()
        go_on(started)
        first, second = map(json.loads, hear(started))

    assert first == second, f"seed {seed}"
    latest, history = first
    assert {name: found["updated_at_unix_ms"] for name, found in latest.items()} == {
        f"user-{user}": steps - 1 for user in range(users)
    }, f"seed {seed}"
    for name, entries in history.items():
        times = [entry["updated_at_unix_ms"] for entry in entries]
        assert times == list(range(steps - 1, -1, -1)), f"seed {seed}, {name}"
        assert entries[0] == latest[name], f"seed {seed}, {name}"
    assert len(server.dump(C)) == users * (steps + 1)


# ------------------------------------------------------------------------------
# Conditional writes
# ------------------------------------------------------------------------------


def race_before_the_write(server: QdrantServer, *acts: Callable[[], object]) -> None:
    """Between what a conditional write reads and its conditional put, someone else acts."""
    server.on(meanwhile(lambda: [act() for act in acts]), route=UPSERT, times=1)


def race_after_the_write(server: QdrantServer, *acts: Callable[[], object], reads: int = 1) -> None:
    """Between the conditional put, before which there are so many reads, and its reading back."""
    server.on(meanwhile(lambda: [act() for act in acts]), route=RETRIEVE, skip=reads, times=1)


def successors(store: QdrantStore, times: int = 1) -> Callable[[], object]:
    """Conditional writes by another client, each upon the one before, 1 ms later."""

    def later(old: StateSnapshot | None) -> StateSnapshot:
        return state(at=100) if old is None else state(at=old.updated_at_unix_ms - NOW + 1)

    return lambda: [store.update("ann", later) for _ in range(times)]


async def test_a_conditional_write_succeeds(store: AsyncStateStore, server: QdrantServer) -> None:
    """What was read and is still there is replaced, and history has both."""
    await store.upsert_latest(state(), expected=None)
    await store.upsert_latest(state(at=5), expected=state())

    assert points(server) == [("ann", "history", 0), ("ann", "history", 5), ("ann", "latest", 5)]


@pytest.mark.parametrize("times", [1, 5, 20])
async def test_a_conditional_write_that_others_built_upon_has_succeeded(
    times: int, store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """Where the point is gone already, but those that replaced it descend from it, the write counts."""
    await store.upsert_latest(state())
    race_after_the_write(server, successors(other, times))

    await store.upsert_latest(state(at=5), expected=state())

    assert times_kept(server) == [0, *range(5, 6 + times)]
    assert await store.get_latest("ann") == state(at=5 + times)


@pytest.mark.parametrize("times", [1, 5, 20])
async def test_the_second_of_two_conditional_writes_is_a_clean_conflict(
    times: int, store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """When another conditional write was first, nothing was written, and the error says so for certain."""
    await store.upsert_latest(state())
    race_before_the_write(server, successors(other, times))

    error = await caught(store.upsert_latest(state(at=50), expected=state()))

    assert isinstance(error, ConflictError)
    assert not error.ambiguous
    assert times_kept(server) == list(range(1 + times))
    assert (await store.get_history("ann"))[0] == await store.get_latest("ann") == state(at=times)


async def test_the_second_of_two_creations_is_a_clean_conflict(
    store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """Of two clients that create one user, one succeeds and the other one knows that it did not."""
    race_before_the_write(server, lambda: other.upsert_latest(state(at=1), expected=None))

    error = await caught(store.upsert_latest(state(at=5), expected=None))

    assert isinstance(error, ConflictError)
    assert not error.ambiguous
    assert points(server) == [("ann", "history", 1), ("ann", "latest", 1)]


async def test_a_conflict_found_by_reading_writes_nothing(
    store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """A latest that is not the expected one is a clean conflict before anything is written."""
    other.upsert_latest(state(at=7))
    server.clear()

    for expected in (None, state(at=3), state("bob", 7)):
        error = await caught(store.upsert_latest(state(at=9), expected=expected))
        assert isinstance(error, ConflictError)
        assert not error.ambiguous

    assert dict(server.counts) == {RETRIEVE: 3}


HIDING: dict[str, Callable[[QdrantStore], object]] = {
    "an unconditional write": lambda other: other.upsert_latest(state(at=8)),
    "a conditional and an unconditional write": lambda other: [
        successors(other)(),
        other.upsert_many([state(at=80)]),
    ],
    "a deletion": lambda other: other.delete("ann"),
    "a deletion and a creation": lambda other: [other.delete("ann"), successors(other)()],
    "too many writes upon it": lambda other: successors(other, 40)(),
}


@pytest.mark.parametrize("race", [race_before_the_write, race_after_the_write])
@pytest.mark.parametrize("name", HIDING)
async def test_an_outcome_that_someone_hid_is_said_to_be_unknown(
    name: str, race: Any, store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """After an unconditional write, a deletion or very many writes nobody can tell: never a guess."""
    await store.upsert_latest(state())
    race(server, lambda: HIDING[name](other))

    error = await caught(store.upsert_latest(state(at=5), expected=state()))

    assert isinstance(error, ConflictError)
    assert error.ambiguous
    assert other.get_latest("ann") == await store.get_latest("ann")
    built_upon = (race, name) == (race_after_the_write, "a conditional and an unconditional write")
    assert (5 in times_kept(server)) is built_upon or "many" in name  # a successor may have that time


@pytest.mark.parametrize("race", [race_before_the_write, race_after_the_write])
async def test_an_update_never_brings_back_a_deleted_user(
    race: Any, store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """A user who is deleted while a conditional write is on its way stays deleted."""
    await store.upsert_latest(state())
    race(server, lambda: other.delete("ann"))

    error = await caught(store.upsert_latest(state(at=5), expected=state()))

    assert isinstance(error, ConflictError)
    assert error.ambiguous
    assert server.dump(C) == []


async def test_a_creation_never_brings_back_a_deleted_user(
    store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """A user who is created, and deleted before the creator has read it back, stays deleted."""
    race_after_the_write(server, lambda: other.delete("ann"))

    error = await caught(store.upsert_latest(state(at=5), expected=None))

    assert isinstance(error, ConflictError)
    assert error.ambiguous
    assert server.dump(C) == []


APPLIED = {
    "the reply is lost": lose_reply(),
    "the connection is reset": lose_reply(reset=True),
    "the reply is cut off": truncate(),
    "the reply is reset in its middle": reset(),
    "a gateway answers 503": reply(503, apply=True),
    "a gateway answers 504": reply(504, apply=True),
    "it arrives twice": duplicate(),
}


@pytest.mark.parametrize("name", APPLIED)
@pytest.mark.parametrize("old", [None, state()])
async def test_a_conditional_write_whose_reply_was_lost_is_applied_once(
    name: str, old: StateSnapshot | None, store: AsyncStateStore, server: QdrantServer
) -> None:
    """A conditional put that was applied unheard is put again, has no effect, and is a success."""
    if old is not None:
        await store.upsert_latest(old)
    server.clear()
    server.on(APPLIED[name], route=UPSERT, times=1)

    await store.upsert_latest(state(at=5), expected=old)

    revisions = [p["payload"].get("revision") for p in server.dump(C) if p["payload"]["kind"] == "latest"]
    first = next(request.json for request in server.requests if request.route == UPSERT)
    assert revisions == [first["points"][0]["payload"]["revision"]]
    assert times_kept(server) == ([5] if old is None else [0, 5])


async def test_an_applied_write_that_was_built_upon_is_not_applied_again(
    store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """The second attempt after a lost reply does not undo what others did in between."""
    await store.upsert_latest(state())
    server.on(meanwhile(successors(other)), route=UPSERT, skip=1, times=1)  # before the second attempt
    server.on(lose_reply(), route=UPSERT, times=1)

    await store.upsert_latest(state(at=5), expected=state())

    assert await store.get_latest("ann") == state(at=6)
    assert times_kept(server) == [0, 5, 6]


async def test_history_shows_a_write_that_died_before_its_entry(
    store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """A writer that dies between the conditional put and the history entry loses nothing: reads merge."""
    await store.upsert_latest(state())
    server.on(reply(400), route=UPSERT, skip=1, times=1)

    error = await caught(store.upsert_latest(state(at=5), expected=state()))

    assert isinstance(error, BackendRejectedError)
    assert times_kept(server) == [0]
    assert other.get_history("ann") == [state(at=5), state()]
    assert other.get_history("ann", 1) == [state(at=5)]


async def test_the_next_conditional_write_enters_one_that_died_into_history(
    store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """A conditional write that lost its entry in history gets it from the next one, in the same request."""
    await store.upsert_latest(state())
    server.on(reply(400), route=UPSERT, skip=1, times=1)
    await caught(store.upsert_latest(state(at=5), expected=state()))
    assert times_kept(server) == [0]
    server.clear()

    other.upsert_latest(state(at=9), expected=state(at=5))

    assert dict(server.counts) == {RETRIEVE: 3, UPSERT: 1, BATCH: 1}
    assert times_kept(server) == [0, 5, 9]
    assert other.get_history("ann") == [state(at=9), state(at=5), state()]


async def test_what_is_in_history_is_not_entered_again(store: AsyncStateStore, server: QdrantServer) -> None:
    """The entry of the write before is left as it is, and one of the same time is replaced, not doubled."""
    await store.upsert_latest(state(), expected=None)
    for point in server.dump(C):
        ask(
            server, "POST", f"{C}/points/payload?wait=true", {"payload": {"mark": 1}, "points": [point["id"]]}
        )

    await store.upsert_latest(state(at=5), expected=state())
    await store.upsert_latest(state(at=5, axes={"warmth": 0.1}), expected=state(at=5))

    assert server.counts[BATCH] == 1
    payloads = [point["payload"] for point in server.dump(C) if point["payload"]["kind"] == "history"]
    payloads.sort(key=lambda payload: payload["updated_at_unix_ms"])
    assert [(payload.get("mark"), payload["axes"]) for payload in payloads] == [
        (1, dict(state().axes)),
        (None, {"warmth": 0.1}),
    ]


@pytest.mark.parametrize("old", [None, "unconditional", "conditional"])
async def test_a_deletion_before_the_entry_leaves_no_history(
    old: str | None, store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """A user deleted between a conditional write and its entry in history is gone, and stays forgotten."""
    if old:
        await store.upsert_latest(state(), expected=None if old == "conditional" else attuned_store.ANY)
    entry: dict[str, Any] = {"route": BATCH} if old == "conditional" else {"route": UPSERT, "skip": 1}
    server.on(meanwhile(lambda: other.delete("ann")), times=1, **entry)

    await store.upsert_latest(state(at=5), expected=state() if old else None)

    assert server.dump(C) == []
    other.upsert_latest(state(at=9))
    assert other.get_history("ann") == [state(at=9)]


async def test_a_failing_look_for_a_deletion_does_not_fail_the_write(
    store: AsyncStateStore, server: QdrantServer
) -> None:
    """What has been written is not reported as failed because it could not be looked at once more."""
    server.on(reply(400), route=RETRIEVE, skip=2)

    await store.upsert_latest(state(), expected=None)

    server.calm()
    assert times_kept(server) == [0]
    assert await store.get_latest("ann") == state()


async def test_updates_of_one_user_agree_with_one_another(
    store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """An update that comes second does its work again upon the first, and both are in the state."""
    await store.upsert_latest(state(axes={"warmth": 0.1}))
    race_before_the_write(server, lambda: other.patch("ann", {"formality": 0.2}))

    found = await store.patch("ann", {"tolerance_for_complexity": 0.3})

    assert dict(found.axes) == {"warmth": 0.1, "formality": 0.2, "tolerance_for_complexity": 0.3}
    assert len(times_kept(server)) == 3


async def test_an_ambiguous_update_is_raised_and_not_tried_again(
    store: AsyncStateStore, other: QdrantStore, server: QdrantServer
) -> None:
    """An update whose outcome is unknown is not applied a second time: the caller has to look."""
    await store.upsert_latest(state())
    race_after_the_write(server, lambda: other.upsert_latest(state(at=10**12)), reads=2)

    error = await caught(store.patch("ann", {"warmth": 0.3}))

    assert isinstance(error, ConflictError)
    assert error.ambiguous
    assert server.counts[UPSERT] == 3  # the first write, the patch, and that of the other client


# Counters

COUNT_UP = """
import sys
from attuned_store import BreakerPolicy, ConflictError, QdrantStore, RetryPolicy
url, times = sys.argv[1], int(sys.argv[2])
policies = {"retry": RetryPolicy(attempts=12, base_s=0), "breaker": BreakerPolicy(failures=10**6)}
store = QdrantStore(url=url, verify=False, **policies)
store.count()
print("ready", flush=True); sys.stdin.readline()
done = unknown = 0
for _ in range(times):
    try:
        store.update("ann", lambda old: old.patched({}, schema_version=old.schema_version + 1), attempts=1000)
        done += 1
    except ConflictError as error:
        assert error.ambiguous
        unknown += 1
print(done, unknown, flush=True); sys.stdin.readline()
"""


def counted_up(old: StateSnapshot | None) -> StateSnapshot:
    """The function of an update that counts in schema_version."""
    assert old is not None
    return old.patched({}, schema_version=old.schema_version + 1)


def check_counter(server: QdrantServer, done: int, unknown: int) -> None:
    """The counter stands at what was done, give or take what nobody knows; history tells the same."""
    payloads = [point["payload"] for point in server.dump(C)]
    latest = next(payload["schema_version"] for payload in payloads if payload["kind"] == "latest")
    kept = sorted(payload["schema_version"] for payload in payloads if payload["kind"] == "history")
    assert done <= latest - 1 <= done + unknown, (done, unknown, latest)
    assert len(kept) == len(set(kept))
    assert len(kept) >= min(done, QdrantStoreConfig().max_history_per_user)  # older ones are trimmed


async def test_a_counter_kept_by_threads_and_tasks_is_exact(
    face: str, connect: Any, server: QdrantServer
) -> None:
    """8 threads, or 64 tasks, count by update while one reply in ten is lost: nothing is lost or doubled."""
    store = connect(retry=RetryPolicy(attempts=12, base_s=0), breaker=BreakerPolicy(failures=10**6))
    await store.upsert_latest(state())
    jobs, times = (8, 12) if face == "sync" else (64, 1)
    server.on(lose_reply(), when=lambda r: r.is_write() or r.is_read(), probability=0.1)
    outcomes: list[bool] = []

    async def count_up() -> None:
        for _ in range(times):
            try:
                await store.update("ann", counted_up, attempts=10_000)
            except ConflictError as error:
                outcomes.append(False)
                assert error.ambiguous  # noqa: PT017 - whether there is one is left to chance
            else:
                outcomes.append(True)

    await together(store, [count_up] * jobs)

    assert len(outcomes) == jobs * times
    check_counter(server, sum(outcomes), len(outcomes) - sum(outcomes))
    assert sum(outcomes) > 0.9 * len(outcomes)


def test_a_counter_kept_by_two_processes_is_exact(server: QdrantServer) -> None:
    """Two processes count by update while one reply in ten is lost: nothing is lost or doubled."""
    with plain(server) as store:
        store.upsert_latest(state())
    times = 1_000 if os.environ.get("ATTUNED_TEST_LONG") else 30
    with processes(COUNT_UP, *[(server.url, times)] * 2) as started:
        hear(started, "ready")
        server.on(lose_reply(), when=lambda r: r.is_write() or r.is_read(), probability=0.1)
        go_on(started)
        done, unknown = (
            sum(column) for column in zip(*(map(int, line.split()) for line in hear(started)), strict=True)
        )
        go_on(started)

    assert done + unknown == 2 * times
    check_counter(server, done, unknown)


# ------------------------------------------------------------------------------
# Retention
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("maximum", [1, 20, 100])
async def test_trimming_is_a_small_part_of_the_requests(
    maximum: int, connect: Any, server: QdrantServer
) -> None:
    """200 writes of one user cost at most a sixth more requests, and the server never holds much too much."""
    store = connect(max_history_per_user=maximum)
    await store.count()
    server.clear()
    slack, most = max(16, maximum // 4), 0

    for at in range(200):
        await store.upsert_latest(state(at=at))
        most = max(most, len(times_kept(server)))

    assert server.counts[UPSERT] == 200
    assert server.counts[SCROLL] == 200 // slack
    assert len(server.requests) <= 200 + 2 * (200 // slack)
    assert most <= maximum + slack
    assert server.counts[DELETE] == len([at for at in range(1, 200 // slack + 1) if at * slack > maximum])


async def test_reads_honour_both_bounds_at_every_moment(
    connect: Any, server: QdrantServer, clock: Clock
) -> None:
    """However much the server still holds, reads show the newest N, and none that is too old."""
    store = connect(max_history_per_user=10, history_retention_days=1)

    for step in range(42):
        clock.now += (2 if step < 30 else 5) * HOUR
        await store.upsert_latest(StateSnapshot("ann", {"warmth": step / 42}, clock.now))
        history = await store.get_history("ann", 1_000)
        shown = [at for at in times_kept(server) if clock.now - DAY <= NOW + at][-10:]
        assert [s.updated_at_unix_ms - NOW for s in history] == shown[::-1]
        assert len(history) == 10 or step < 10 or step > 30
        if step % 4 == 0:
            assert await store.count(history=True) == len(history)
            found = await store.search_similar({"warmth": 1.0}, history=True, limit=100)
            assert len(found) == len(history)
        assert await store.get_history("ann", 1_000, since=clock.now - 3 * DAY) == history


async def test_the_latest_is_never_aged_out(connect: Any, server: QdrantServer, clock: Clock) -> None:
    """A state that is too old for history is still the latest, before and after prune."""
    store = connect(history_retention_days=1)
    await store.upsert_latest(state())
    clock.now += 10 * DAY

    assert (await store.get_latest("ann"), await store.get_history("ann")) == (state(), [])
    await store.prune()
    assert (await store.get_latest("ann"), await store.get_history("ann")) == (state(), [])


async def test_prune_leaves_what_can_be_read(connect: Any, server: QdrantServer, clock: Clock) -> None:
    """Pruning removes what reads hide, and nothing else; a second one finds nothing to do."""
    writer = connect(max_history_per_user=100)
    for user_id in ("ann", "bob", "cleo"):
        await writer.upsert_many([state(user_id, at * HOUR) for at in range(30)])
    await writer.upsert_many([state("dan", at * HOUR) for at in range(3)])
    store = connect(max_history_per_user=10, history_retention_days=1)
    clock.now = NOW + 28 * HOUR
    names = ["ann", "bob", "cleo", "dan"]
    before = {name: await store.get_history(name, 1_000) for name in names}
    assert [len(entries) for entries in before.values()] == [10, 10, 10, 0]

    assert await store.prune() == 3 * 20 + 2  # the newest of dan is his latest, and stays

    assert {name: await store.get_history(name, 1_000) for name in names} == before
    assert times_kept(server) == [at * HOUR for at in range(20, 30)]
    assert await store.get_many(names) == {
        name: state(name, (29 if name != "dan" else 2) * HOUR) for name in names
    }
    assert await store.prune() == 0


@pytest.mark.parametrize("options", [{"max_history_per_user": 0}, {"enable_history": False}])
async def test_without_history_a_user_is_one_point(
    options: dict[str, Any], connect: Any, server: QdrantServer
) -> None:
    """A store without history writes none, conditionally or not."""
    store = connect(**options)
    await store.upsert_latest(state())
    await store.upsert_latest(state(at=1), expected=state())
    await store.upsert_many([state("bob", at) for at in range(3)])

    assert points(server) == [("ann", "latest", 1), ("bob", "latest", 2)]
    assert await store.get_history("ann") == []


async def test_a_failing_trim_does_not_fail_the_write(connect: Any, server: QdrantServer) -> None:
    """Trimming happens in the background of writes: what it meets is no concern of the caller."""
    store = connect(max_history_per_user=1)
    server.on(reply(400), route=SCROLL)
    server.on(reply(400), route=DELETE)

    for at in range(20):
        await store.upsert_latest(state(at=at))

    assert await store.get_latest("ann") == state(at=19)
    assert any("/scroll" in request.path for request in server.requests)  # it was tried


# ------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens at, and nobody else can take."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def stranger() -> Iterator[int]:
    """The port of a server that speaks something else, such as TLS or gRPC, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1_000)
                        connection.sendall(b"\x15\x03\x01\x00\x02\x02\x46")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


URLS: dict[str, Any] = {
    "no scheme": "127.0.0.1:6333",
    "a name alone": "localhost",
    "another scheme": "ftp://127.0.0.1",
    "grpc": "grpc://127.0.0.1:6334",
    "no host": "http://",
    "no host but a port": "http://:6333",
    "a port in words": "http://localhost:qdrant",
    "port 0": "http://localhost:0",
    "port 65536": "http://localhost:65536",
    "a query": "http://localhost:6333?timeout=5",
    "a fragment": "http://localhost:6333#collections",
    "an open bracket": "http://[::1:6333",
    "an empty text": "",
    "bytes": b"http://localhost:6333",
    "a number": 6333,
    "a space in the host": "http://local host:6333",
    "a space in front": " http://localhost:6333",
    "a line break": "http://localhost:6333\n",
    "a percent sign": "http://%zz:6333",
}
FOREIGN = ("a space in the host", "a space in front", "a line break", "a percent sign")


@pytest.mark.parametrize("kind", [QdrantStore, AsyncQdrantStore])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name) for name in URLS],
)
def test_a_url_that_cannot_be_one_is_refused_when_the_store_is_made(name: str, kind: Any) -> None:
    """A malformed url is ValidationError at once, names the field and shows the value."""
    with pytest.raises(ValidationError, match=r"^url: .*got") as caught:
        kind(url=URLS[name])

    assert len(str(caught.value).splitlines()) == 1


SECRET_URLS = {
    "http://user:pw-12345@localhost:6333": None,
    "https://pw-12345@localhost": None,
    "http://:pw-12345@localhost": None,
    "http://user:pw-12345@localhost:99999": None,
    "ftp://user:pw-12345@localhost": "shown",
    "http://user:pw-12345@localhost?a=b": "shown",
    "http://user:pw-12345@localhost#a": "shown",
    "http://user:pw-12345@": "shown",
    "http://user:p/pw-12345@localhost": "shown",
}


@pytest.mark.parametrize(
    "url",
    [pytest.param(url) for url, how in SECRET_URLS.items()],
)
def test_a_password_in_a_url_is_refused_and_not_shown(url: str) -> None:
    """A url with a user or password is ValidationError, and the message does not repeat them."""
    with pytest.raises(ValidationError, match="url") as caught:
        QdrantStore(url=url)

    assert "pw-12345" not in "".join(traceback.format_exception(caught.value))
    assert "pw-12345" not in repr(caught.value)


OPTIONS: dict[str, Any] = {
    "connect_timeout": [0, -1, float("nan"), float("inf"), "10", None, True],
    "request_timeout": [0, -1, float("nan"), float("inf"), "10", None, True],
    "pool_size": [0, -1, 1.5, "64", None, True, 10**6],
    "cache_ttl": [-1, float("nan"), float("inf"), "1"],
    "verify": [None, 5, b"ca.pem"],
    "api_key": [5, "ké", b"key"],
    "collection_name": ["", "a/b", "../x", ".hidden", "a b", "x" * 201, "a\n", "a?b", "a#b"],
    "read_consistency": [0, -1, "most", 1.5, True],
    "write_ordering": ["fast", 5],
    "shard_number": [-1, 1.5, "2", 2**31],
    "replication_factor": [-1, 1.5, "2", 2**31],
    "write_consistency_factor": [-1, 1.5, "2", 2**31],
    "retry": [None, 3, BreakerPolicy()],
    "breaker": [None, 3, RetryPolicy()],
}
LENIENT: dict[str, list[Any]] = {
    "shard_number": [0],
    "replication_factor": [0],
    "write_consistency_factor": [0],
    "read_consistency": [""],
    "write_ordering": [""],
    "collection_name": [5],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in OPTIONS.items() for value in values]
    + [pytest.param(field, value) for field, values in LENIENT.items() for value in values],
)
def test_an_option_that_makes_no_sense_is_refused(field: str, value: object) -> None:
    """Every field of the configuration is checked when the store is made, and named when it will not do."""
    with pytest.raises(ValidationError, match=rf"^{field}: ") as caught:
        QdrantStore(url="http://localhost:6333", **cast("Any", {field: value}))

    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("policy", "field", "value"),
    [
        (RetryPolicy, field, value)
        for field, values in {
            "attempts": [0, -1, 1.5, "4", True, 10**6],
            "base_s": [-0.1, float("nan"), float("inf"), "1"],
            "cap_s": [-0.1, float("nan"), float("inf"), "1"],
            "deadline_s": [-0.1, float("nan"), float("inf"), "1"],
        }.items()
        for value in values
    ]
    + [
        (BreakerPolicy, field, value)
        for field, values in {
            "failures": [0, -1, 1.5, "5", True],
            "open_s": [-0.1, float("nan"), float("inf"), "30"],
        }.items()
        for value in values
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(policy: Any, field: str, value: object) -> None:
    """The numbers of RetryPolicy and BreakerPolicy are checked when they are given."""
    with pytest.raises(ValidationError, match=rf"^{field}: "):
        policy(**{field: value})


def test_the_policies_are_public() -> None:
    """What a configuration is made of can be imported by a star."""
    assert {"RetryPolicy", "BreakerPolicy"} <= set(attuned_store.__all__)


def test_a_ca_certificate_that_is_not_there_is_refused() -> None:
    """verify= the path of a file that does not exist is a typed error."""
    with pytest.raises(StoreError, match="verify"):
        QdrantStore(url="https://localhost:6333", verify="/no/such/ca.pem")


@pytest.mark.parametrize("kind", [QdrantStore, AsyncQdrantStore])
def test_a_ca_certificate_is_given_by_any_path(kind: Any, tmp_path: Path) -> None:
    """verify= takes a Path as well as a string, and what is no path is a ValidationError that says so."""
    path = tmp_path / "ca.pem"
    with pytest.raises(StoreError, match=r"verify: .*ca.pem.* is no usable certificate"):
        kind(url="https://localhost:6333", verify=path)
    path.write_bytes(Path(certifi.where()).read_bytes())
    for verify in (path, str(path)):
        assert kind(url="https://localhost:6333", verify=verify).config.verify == str(path)

    for wrong in ("", b"ca.pem", "ca\0.pem", "\ud800", 5, None):
        with pytest.raises(ValidationError, match="verify"):
            kind(url="https://localhost:6333", verify=wrong)


async def test_a_closed_port_is_unavailable(connect: Any, closed_port: int) -> None:
    """A wrong port is BackendUnavailableError, which names the url."""
    error = await caught(connect(url=f"http://127.0.0.1:{closed_port}").upsert_latest(state()))

    assert isinstance(error, BackendUnavailableError)
    assert (error.backend, error.retryable) == ("server", True)
    assert f"127.0.0.1:{closed_port}" in str(error)


async def test_an_unknown_host_is_unavailable(connect: Any) -> None:
    """A host that does not exist is BackendUnavailableError, which names it."""
    error = await caught(connect(url="http://no-such-host.invalid:6333").upsert_latest(state()))

    assert isinstance(error, BackendUnavailableError)
    assert "no-such-host.invalid" in str(error)


async def test_the_port_of_grpc_gets_a_hint(connect: Any) -> None:
    """A url with port 6334, which is that of gRPC, is answered with the port of REST."""
    error = await caught(connect(url="http://no-such-host.invalid:6334").upsert_latest(state()))

    assert isinstance(error, BackendUnavailableError)
    assert "6334 is for gRPC" in str(error)
    assert "6333" in str(error)


async def test_a_server_that_speaks_something_else_is_unavailable(connect: Any, stranger: int) -> None:
    """Plain HTTP to a port of TLS or gRPC is BackendUnavailableError."""
    error = await caught(connect(url=f"http://127.0.0.1:{stranger}").upsert_latest(state()))

    assert isinstance(error, BackendUnavailableError)


async def test_tls_to_a_plain_port_is_unavailable(connect: Any, server: QdrantServer) -> None:
    """TLS to a server that speaks plain HTTP is BackendUnavailableError within the timeout."""
    store = connect(url=server.url.replace("http:", "https:"), connect_timeout=5.0)
    started = time.monotonic()

    error = await caught(store.upsert_latest(state()))

    assert isinstance(error, BackendUnavailableError)
    assert time.monotonic() - started < 20
    assert server.requests == []


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("key", [KEY, None])
async def test_a_wrong_api_key_is_rejected_and_never_shown(
    status: int, key: str | None, connect: Any, server: QdrantServer, caplog: pytest.LogCaptureFixture
) -> None:
    """401 and 403 are BackendRejectedError with a hint; the key is in no message, repr, log or health."""
    caplog.set_level(logging.DEBUG)
    server.api_key, server.wrong_key_status = "another key", status
    store = connect(api_key=key)
    itself: Any = store.store if isinstance(store, Awaited) else store

    error = await caught(store.upsert_latest(state()))
    health = await store.health()

    assert isinstance(error, BackendRejectedError)
    assert not error.retryable
    assert str(status if key else 401) in str(error)
    assert "api_key" in str(error)
    assert server.counts[DESCRIBE] == 1 + 1  # that of health
    assert server.counts[CREATE] == 0
    assert health.status == "unhealthy"
    shown = "".join(traceback.format_exception(error))
    for text in (shown, repr(error), repr(itself), repr(itself.config), repr(health), caplog.text):
        assert KEY not in text


async def test_the_right_api_key_opens(connect: Any, server: QdrantServer) -> None:
    """The key goes with every request, those of health too, and nothing shows it."""
    server.api_key = KEY
    store = connect(api_key=KEY)

    await store.upsert_latest(state())

    assert (await store.health()).status == "healthy"
    assert {request.headers.get("api-key") for request in server.requests} == {KEY}
    assert KEY not in repr(await store.health()) + repr(store.config)


async def test_a_key_that_stands_in_tracebacks_opens(connect: Any, server: QdrantServer) -> None:
    """What an answer means does not hang on its cause, which is left out where it would show the key."""
    server.api_key = "qdrant"
    store = connect(api_key="qdrant")

    await store.upsert_latest(state())

    assert await store.count() == 1


@pytest.mark.parametrize("key", [KEY + "\n", " " + KEY, KEY + "\r\nx: y"])
async def test_a_key_that_cannot_be_a_header_is_not_shown(
    key: str, connect: Any, server: QdrantServer
) -> None:
    """A key with a line break at its end, as files have, is refused without being shown."""
    with pytest.raises(StoreError) as caught:
        await connect(api_key=key).upsert_latest(state())

    assert isinstance(caught.value, ValidationError)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("kind", [QdrantStore, AsyncQdrantStore])
@pytest.mark.parametrize(
    "url", ["http://qdrant.example.invalid:6333", "http://192.0.2.1", "http://[2001:db8::1]:6333"]
)
def test_a_key_in_the_clear_is_warned_of(kind: Any, url: str) -> None:
    """An api key over plain http to a host that is not loopback warns, at the line of the caller."""
    with pytest.warns(UserWarning, match="in the clear.*https") as warned:
        kind(url=url, api_key=KEY, verify=False)

    assert len(warned) == 1
    assert KEY not in str(warned[0].message)
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://localhost:6333", KEY),
        ("http://127.0.0.1:6333", KEY),
        ("http://127.8.9.10:6333", KEY),
        ("http://[::1]:6333", KEY),
        ("https://qdrant.example.invalid:6333", KEY),
        ("http://qdrant.example.invalid:6333", None),
    ],
)
def test_a_key_that_is_safe_is_not_warned_of(url: str, key: str | None) -> None:
    """Neither loopback nor https warns, nor a store without a key."""
    with warnings.catch_warnings(record=True, action="always") as warned:
        QdrantStore(url=url, api_key=key, verify=False).close()

    assert warned == []


def test_a_name_that_only_begins_like_loopback_is_warned_of() -> None:
    """A host called 127.example.org is not loopback."""
    with pytest.warns(UserWarning, match="in the clear"):
        QdrantStore(url="http://127.example.invalid:6333", api_key=KEY, verify=False)


# Answers that are not Qdrant's

ANSWERED: dict[str, Any] = {
    "upsert_latest": lambda store: store.upsert_latest(state(at=9)),
    "upsert_many": lambda store: store.upsert_many([state(at=9), state("bob")]),
    "expected": lambda store: store.upsert_latest(state(at=9), expected=state()),
    "get_latest": lambda store: store.get_latest("ann"),
    "get_many": lambda store: store.get_many(["ann", "bob"]),
    "get_history": lambda store: store.get_history("ann"),
    "search_similar": lambda store: store.search_similar({"warmth": 1.0}),
    "count": lambda store: store.count(),
    "count of history": lambda store: store.count(history=True),
    "delete": lambda store: store.delete("ann"),
    "prune": lambda store: store.prune(),
}
BODIES: dict[str, Action] = {
    "a page of HTML": not_json(),
    "nothing": reply(200, b""),
    "half of an answer": reply(200, b'{"result": [{"id": "'),
    "another object": other_shape(),
    "an empty object": other_shape({}),
    "a list": other_shape([]),
    "a text": other_shape("ok"),
    "no result": other_shape({"result": None, "status": "ok", "time": 0.0}),
    "a result of another kind": other_shape({"result": "done", "status": "ok", "time": 0.0}),
    "bytes that are no text": reply(200, b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("body", BODIES)
async def test_an_answer_that_is_not_qdrants_is_an_error(
    body: str, connect: Any, server: QdrantServer
) -> None:
    """Whatever a proxy or a wrong port answers is a BackendError in one line, from every operation."""
    store = connect()
    await store.upsert_latest(state())
    before = server.dump(C)
    server.clear()
    server.on(BODIES[body])

    for operation in ANSWERED.values():
        error = await caught(operation(store))
        assert isinstance(error, BackendError)
        assert not error.retryable
    first = await caught(connect().upsert_latest(state()))

    assert isinstance(first, BackendError)
    assert len(server.requests) == len(ANSWERED) + 1  # none of them was repeated
    assert server.dump(C) == before


async def all_users(store: AsyncStateStore) -> object:
    return [user async for user in store.users()]


FOREIGN_POINTS: dict[str, Any] = {
    "get_latest": lambda store: store.get_latest("ann"),
    "get_history": lambda store: store.get_history("ann"),
    "search_similar": lambda store: store.search_similar({"warmth": 1.0}),
    "users": all_users,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name) for name in FOREIGN_POINTS],
)
async def test_a_point_that_is_not_a_state_is_an_error(
    name: str, store: AsyncStateStore, server: QdrantServer
) -> None:
    """A point of another program in our collection is a BackendError, not a KeyError."""

    def strip(body: Any) -> None:
        found = body["result"]
        for record in found if isinstance(found, list) else found["points"]:
            record["payload"] = {"color": "red"}

    await store.upsert_latest(state())
    server.on(edit(strip))

    assert isinstance(await caught(FOREIGN_POINTS[name](store)), BackendError)


async def test_bad_snapshots_are_refused_without_a_request(
    store: AsyncStateStore, server: QdrantServer
) -> None:
    """What breaks a rule never reaches the server."""
    attempts: list[Any] = [
        lambda: store.upsert_latest(state(axes={"unheard_of": 0.5})),
        lambda: store.upsert_latest(cast("Any", "ann")),
        lambda: store.upsert_latest(state(), expected=cast("Any", "ann")),
        lambda: store.upsert_many([state(), state(axes={"unheard_of": 0.5})]),
        lambda: store.get_latest(""),
        lambda: store.get_history("ann", -1),
        lambda: store.search_similar({"unheard_of": 0.5}),
        lambda: store.delete("\n"),
        lambda: store.patch("ann", {"warmth": 2.0}),
    ]
    for attempt in attempts:
        assert isinstance(await caught(attempt()), ValidationError)

    assert server.requests == []


async def test_a_batch_that_fails_midway_says_how_much_was_written(
    store: AsyncStateStore, server: QdrantServer
) -> None:
    """An upsert_many that the server stops accepting carries the number written before."""
    server.on(reply(413), route=UPSERT, skip=1)

    error = await caught(store.upsert_many([state(f"user-{number}") for number in range(1_100)]))

    assert isinstance(error, BackendRejectedError)
    assert error.written == 500
    assert len(points(server)) == 1_000


async def test_the_newest_of_a_batch_wins_whatever_is_there(
    store: AsyncStateStore, server: QdrantServer, other: QdrantStore
) -> None:
    """Batches in any order, each one operation, leave every user with the newest, and all in the history."""
    order = random.Random(18)
    written: dict[str, dict[int, StateSnapshot]] = {}
    server.clear()
    for _ in range(12):
        batch = [state(f"user-{order.randrange(40)}", order.randrange(30)) for _ in range(60)]
        for each in batch:
            written.setdefault(each.user_id, {})[each.updated_at_unix_ms] = each
        await store.upsert_many(batch)
    assert dict(server.counts) == {UPSERT: 12}

    for user_id, times in written.items():
        assert other.get_latest(user_id) == times[max(times)]
        assert other.get_history(user_id) == [times[time_ms] for time_ms in sorted(times, reverse=True)]


def test_a_large_batch_is_several_requests(server: QdrantServer) -> None:
    """No request has more than 16 MiB, however many axes there are, and no user is torn apart."""
    axes = {f"axis_of_some_length_{number}": 0.1234567890123456 for number in range(1_024)}
    with plain(server, axes=tuple(axes)) as store:
        store.upsert_many([state(f"user-{number}", axes=axes) for number in range(200)])
        assert store.count(history=True) == 200

    written = [request for request in server.requests if request.is_write()]
    assert len(written) > 1
    assert max(len(request.body) for request in written) <= 16 << 20
    users = [{point["payload"]["user_id"] for point in request.json["points"]} for request in written]
    assert sum(map(len, users)) == len(set().union(*users)) == 200


# ------------------------------------------------------------------------------
# Several nodes, and what a node may be
# ------------------------------------------------------------------------------


def test_a_store_goes_on_with_the_next_node(server: QdrantServer) -> None:
    """Of several urls another one is asked at once where one cannot be reached, also for health."""
    with QdrantServer() as second:
        urls = [server.url, second.url]
        for url in (urls, tuple(urls), ",".join(urls)):
            with QdrantStore(url=url, verify=False, retry=RetryPolicy(base_s=0)) as store:
                assert store.config.url == ",".join(urls)
                store.upsert_latest(state())  # a cluster would have it on both
                with plain(second) as there:
                    there.upsert_latest(state("bob"))
                server.down()
                assert list(store.users()) == ["bob"]
                health = store.health()
                assert (health.status, health.users) == ("healthy", 1)
                second.down()
                assert store.health().status == "unhealthy"
                server.up()
                assert list(store.users()) == ["ann"]
                second.up()
            second.wipe()


def test_urls_are_checked_one_by_one() -> None:
    """A url among several that cannot be one is refused."""
    for url in (["http://a:6333", "ftp://b"], "http://a:6333,", ["http://a:6333", 5], []):
        with pytest.raises(ValidationError, match="url"):
            QdrantStoreConfig(url=cast("Any", url))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDRANT_URL", "http://a:6333,https://b:6333")
        assert QdrantStoreConfig.from_env().url == "http://a:6333,https://b:6333"


def test_health_tells_of_replicas(server: QdrantServer) -> None:
    """A replica that is not active degrades health; a shard without one is worse."""
    with plain(server) as store:
        store.count()
        server.shard_state = "Dead"
        server.other_shards = [(0, 7)]
        health = store.health()
        assert (health.status, health.collection_status) == ("degraded", "green")
        assert "1 of 2 replicas not active: shard 0 on peer 1 is Dead" in health.message
        server.other_shards = [(1, 7)]
        health = store.health()
        assert health.status == "unhealthy"
        assert "no replica is active of shard 0" in health.message


def test_of_many_who_open_one_does(server: QdrantServer) -> None:
    """Eight threads of one store that come first make the collection once, and all get their answers."""
    server.on(delay(0.05), route=CREATE)
    with plain(server, breaker=BreakerPolicy(failures=1)) as store, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: store.count(), range(8))) == [0] * 8
    assert [server.counts[route] for route in (INFO, CREATE)] == [1, 1]

    server.down()
    with plain(server, retry=RetryPolicy(attempts=1)) as store, ThreadPoolExecutor(8) as pool:
        errors = [future.exception() for future in [pool.submit(store.count) for _ in range(8)]]
    assert all(isinstance(error, BackendUnavailableError | CircuitOpenError) for error in errors)


def test_a_collection_that_others_made_anew_is_found_out(
    server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other axes it is SchemaMismatchError, of another size at once, of the same one after a while."""
    for axes, after in ((("warmth", "tact"), 0.0), (tuple(f"axis_{n}" for n in range(24)), 0.01)):
        server.wipe()
        monkeypatch.setattr(attuned_store.SharedBackend, "LOOK_AGAIN_S", after or 30.0)
        with plain(server) as store:
            store.upsert_latest(state())
            ask(server, "DELETE", C)
            with plain(server, axes=axes) as another:
                another.count()
            time.sleep(2 * after)
            with pytest.raises(SchemaMismatchError, match="made anew by others"):
                store.upsert_latest(state())
            assert store.health().status == "unhealthy"
            assert points(server) == []


def test_an_index_of_another_kind_is_an_error(server: QdrantServer) -> None:
    """One that reading relies on is not taken for the right one."""
    make_collection(server)
    body = {"field_name": "updated_at_unix_ms", "field_schema": "keyword"}
    ask(server, "PUT", f"{C}/index", body)
    with plain(server) as store, pytest.raises(SchemaMismatchError, match="index of keyword on 'updated"):
        store.count()


def test_who_may_only_read_can_read(server: QdrantServer, tmp_path: Path) -> None:
    """A key that may make neither indexes nor snapshots opens, and takes a portable snapshot."""
    make_collection(server)
    make_indexes(server, ("user_id", "kind", "updated_at_unix_ms", "source"))
    server.on(reply(403), route=INDEX)
    server.on(reply(403), route="POST /collections/{collection}/snapshots")
    with plain(server) as store:
        assert store.count() == 0
        assert store.create_snapshot(tmp_path).kind == "portable"
        with pytest.raises(BackendRejectedError):
            store.create_snapshot(tmp_path, kind="native")


SAID = {
    "a full disk": (500, "No space left on device: WAL buffer size exceeds available disk space", "disk of"),
    "a lock": (403, "Forbidden: Collection is locked for write", "no matter of the key"),
    "a missing node": (500, "2 of 3 read operations failed: unreachable", "node of the cluster seems to be"),
    "a wrong key": (403, "Forbidden: Global access is required", "may this api_key do that"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_server_says_is_explained(name: str, server: QdrantServer) -> None:
    """A full disk, a lock, a missing node and a key that may not are told from each other."""
    status, said, meant = SAID[name]
    with plain(server, breaker=BreakerPolicy(failures=100)) as store:
        store.count()
        with server.on(reply(status, {"status": {"error": said}}), route=UPSERT):
            with pytest.raises(BackendError, match=meant):
                store.upsert_latest(state())
            assert ("disk of the server is full" in store.health().message) == (name == "a full disk")
        store.upsert_latest(state())
        assert store.health().status == "healthy"


def test_an_idle_connection_is_not_used_again(server: QdrantServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the server closes it, which may be just as a request comes."""
    assert attuned_store.ServerClients.KEEP_ALIVE_S < 5
    monkeypatch.setattr(attuned_store.ServerClients, "KEEP_ALIVE_S", 0.1)
    with plain(server) as store:
        store.count()
        before = server.accepted
        time.sleep(0.2)
        store.count()
        assert server.accepted == before + 1


@pytest.mark.parametrize("exact", [True, False])
async def test_a_search_is_exact_unless_the_graph_is_asked_for(
    exact: bool, connect: Any, server: QdrantServer
) -> None:
    """By default the server compares every vector; with exact_search=False it goes through its graph."""
    store = connect(**({} if exact else {"exact_search": False}))
    await store.search_similar({"warmth": 1.0})

    asked = next(request.json for request in server.requests if request.route == QUERY)
    assert bool((asked.get("params") or {}).get("exact")) == exact


async def test_prune_removes_what_is_left_of_the_deleted(
    store: AsyncStateStore, server: QdrantServer, other: QdrantStore
) -> None:
    """Entries of history whose user is gone, which older versions could leave, are removed and counted."""
    await store.upsert_many([state(f"user-{number}", number) for number in range(3)])
    for user_id in ("user-0", "user-2"):
        latest = make_point_id(user_id, "latest")
        ask(server, "POST", f"{C}/points/delete?wait=true", {"points": [latest]})

    assert await store.prune() == 2
    assert points(server) == [("user-1", "history", 1), ("user-1", "latest", 1)]
    server.clear()
    assert await store.prune() == 0
    assert server.counts[SCROLL] == 1  # of users alone


async def test_a_closed_store_sends_nothing(store: AsyncStateStore, server: QdrantServer) -> None:
    """After closing every call is StoreClosedError, closing again is allowed, health tells."""
    await store.aclose()
    await store.aclose()

    for operation in ANSWERED.values():
        assert isinstance(await caught(operation(store)), StoreClosedError)
    assert (await store.health()).status == "unhealthy"
    assert server.requests == []


# ------------------------------------------------------------------------------
# Health and readiness
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("color", "status"),
    [("green", "healthy"), ("yellow", "degraded"), ("grey", "degraded"), ("red", "unhealthy")],
)
async def test_health_follows_the_collection(
    color: str, status: str, store: AsyncStateStore, server: QdrantServer
) -> None:
    """A green collection is healthy, a red one unhealthy, everything between them degraded."""
    await store.upsert_many([state(at=1), state(at=2), state("bob")])
    server.collection_status, server.indexed_vectors = color, 4

    health = await store.health()

    assert (health.status, health.collection_status) == (status, color)
    assert (health.backend, health.version, health.location) == ("server", "1.17.1", server.url)
    assert (health.users, health.points, health.indexed_vectors) == (2, len(server.dump(C)), 4)
    assert health.latency_ms > 0
    assert (color in health.message) == (color != "green")


async def test_health_needs_no_collection_and_makes_none(connect: Any, server: QdrantServer) -> None:
    """Before the first use health is healthy, counts nothing, and creates nothing."""
    health = await connect().health()

    assert (health.status, health.users, health.points, health.version) == ("healthy", 0, 0, "1.17.1")
    assert {request.method for request in server.requests} == {"GET"}


async def test_slow_answers_degrade_health(
    store: AsyncStateStore, server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that takes longer than it should is degraded, and says how long it took."""
    monkeypatch.setattr(attuned_store.ServerPlace, "SLOW_MS", 5.0)
    server.on(delay(0.01))

    health = await store.health()

    assert health.status == "degraded"
    assert "ms" in health.message
    assert health.latency_ms > 5


UNHEALTHY: dict[str, tuple[Action, str]] = {
    "an error": (reply(500), "500"),
    "a refused key": (reply(401), "api_key"),
    "no connection": (drop(reset=True), "cannot be reached"),
    "a page of HTML": (not_json(), "not an answer of Qdrant"),
}
SHAPES = {
    "another object": other_shape(),
    "a list": other_shape([]),
    "a text": other_shape("ok"),
    "no result": other_shape({"result": None, "status": "ok", "time": 0.0}),
    "a result of another kind": other_shape({"result": "done", "status": "ok", "time": 0.0}),
}


@pytest.mark.parametrize("name", UNHEALTHY)
async def test_health_never_raises(name: str, store: AsyncStateStore, server: QdrantServer) -> None:
    """Whatever is wrong with the server, health says so in one line; it asks once and never again."""
    action, hint = UNHEALTHY[name]
    server.on(action)

    health = await store.health()

    assert health.status == "unhealthy"
    assert hint in health.message
    assert len(health.message.splitlines()) == 1
    assert len(server.requests) == 1


@pytest.mark.parametrize("route", [INFO, DESCRIBE, COUNT])
@pytest.mark.parametrize("name", SHAPES)
async def test_health_of_something_else_is_unhealthy(
    name: str,
    route: str,
    store: AsyncStateStore,
    server: QdrantServer,
) -> None:
    """JSON of another shape, from any of the three requests, is unhealthy, and raises nothing."""
    server.on(SHAPES[name], route=route)

    assert (await store.health()).status == "unhealthy"


async def test_health_is_bounded_by_a_timeout_of_its_own(
    store: AsyncStateStore, server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that hangs is unhealthy after health's own timeout, not after that of requests."""
    monkeypatch.setattr(attuned_store.Operations, "STATUS_TIMEOUT", 0.05)
    server.on(hang(30))
    started = time.monotonic()

    health = await store.health()

    assert health.status == "unhealthy"
    assert "in time" in health.message
    assert time.monotonic() - started < 5


async def test_health_is_bounded_as_a_whole(
    store: AsyncStateStore, server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers, each just in time, are together too late."""
    monkeypatch.setattr(attuned_store.Operations, "STATUS_TIMEOUT", 0.2)
    server.on(delay(0.19))
    started = time.monotonic()

    await store.health()

    assert time.monotonic() - started < 0.5  # one after another they take 0.57


@pytest.mark.parametrize("route", [INFO, DESCRIBE, COUNT])
async def test_health_does_not_wait_for_an_answer_in_drips(
    route: str, store: AsyncStateStore, server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends its answer byte by byte, each of them in time, is unhealthy after the timeout."""
    monkeypatch.setattr(attuned_store.Operations, "STATUS_TIMEOUT", 0.1)
    server.on(drip(0.05), route=route)
    started = time.monotonic()

    health = await store.health()

    assert health.status == "unhealthy"
    assert "in time" in health.message
    assert time.monotonic() - started < 1  # the shortest of the answers takes more than 3 s


async def test_health_does_not_wait_for_the_breaker(connect: Any, server: QdrantServer) -> None:
    """While the breaker refuses everything else, health asks the server and reports both."""
    store = connect(retry=RetryPolicy(attempts=1), breaker=BreakerPolicy(failures=1, open_s=3600))
    await store.upsert_latest(state())
    with server.on(reply(503)):
        await caught(store.get_latest("ann"))

    health = await store.health()

    assert health.status == "degraded"
    assert "breaker is open" in health.message
    assert health.users == 1


async def test_health_tells_of_a_half_open_breaker(connect: Any, server: QdrantServer) -> None:
    """A breaker that waits for a probe is degraded; health is no probe and leaves it as it is."""
    store = connect(retry=RetryPolicy(attempts=1), breaker=BreakerPolicy(failures=1, open_s=0))
    await store.upsert_latest(state())
    with server.on(reply(503)):
        await caught(store.get_latest("ann"))

    for _ in range(2):
        health = await store.health()
        assert (health.status, "half-open" in health.message) == ("degraded", True)
    await store.get_latest("ann")
    assert (await store.health()).status == "healthy"


async def test_failures_of_health_do_not_open_the_breaker(connect: Any, server: QdrantServer) -> None:
    """However often health finds nobody, the next operation is let through."""
    store = connect(retry=RetryPolicy(attempts=1), breaker=BreakerPolicy(failures=1))
    await store.count()
    with server.on(reply(503)):
        for _ in range(3):
            assert (await store.health()).status == "unhealthy"

    assert await store.get_latest("ann") is None


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of the store, which are recorded instead of waited for."""
    naps: list[float] = []

    async def nap(_: object, seconds: float) -> None:
        naps.append(seconds)
        await anyio.lowlevel.checkpoint()

    async def blocking_nap(_: object, seconds: float) -> None:
        naps.append(seconds)

    monkeypatch.setattr(attuned_store.Suspending, "sleep", nap)
    monkeypatch.setattr(attuned_store.Blocking, "sleep", blocking_nap)
    return naps


async def test_a_store_waits_until_its_server_is_ready(
    connect: Any, server: QdrantServer, naps: list[float]
) -> None:
    """wait_until_ready returns once the server answers, however it failed to before."""
    server.on(reply(503), times=2)
    server.on(drop(), skip=2, times=1)

    await connect().wait_until_ready()

    assert len(naps) == 3
    assert all(0 < nap <= 0.25 for nap in naps)


async def test_waiting_for_a_server_ends(connect: Any, closed_port: int, naps: list[float]) -> None:
    """wait_until_ready raises what the server said last once the time is up."""
    started = time.monotonic()

    error = await caught(connect(url=f"http://127.0.0.1:{closed_port}").wait_until_ready(0.1))

    # On a busy machine the last try may be cut short.
    assert isinstance(error, BackendUnavailableError | BackendTimeoutError)
    assert 0.1 <= time.monotonic() - started < 10


async def test_a_refusal_is_not_waited_for(connect: Any, server: QdrantServer, naps: list[float]) -> None:
    """What will not change by waiting, such as a wrong key, is raised at once."""
    server.on(reply(401))

    assert isinstance(await caught(connect().wait_until_ready()), BackendRejectedError)
    assert (len(server.requests), naps) == (1, [])


async def test_waiting_for_a_server_that_hangs_is_bounded(
    connect: Any, server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts connections and says nothing is given no more time than was asked for."""
    monkeypatch.setattr(attuned_store.Operations, "STATUS_TIMEOUT", 20.0)
    server.on(hang(30))
    started = time.monotonic()

    assert isinstance(await caught(connect().wait_until_ready(0.02)), BackendTimeoutError)
    assert time.monotonic() - started < 10


async def test_waiting_with_a_closed_store_is_an_error(store: AsyncQdrantStore) -> None:
    """A closed store does not become ready."""
    await store.aclose()

    assert isinstance(await caught(store.wait_until_ready(0.1)), StoreClosedError)


# ------------------------------------------------------------------------------
# Cache, configuration, processes
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({}, 3),
        ({"cache_ttl": 3600.0}, 1),
        ({"cache_ttl": 1e-9}, 3),
        ({"cache_ttl": 60.0, "cache_size": 0}, 3),
    ],
)
async def test_reads_are_cached_when_asked_for(
    options: dict[str, Any], reads: int, connect: Any, server: QdrantServer
) -> None:
    """cache_ttl answers a repeated get_latest from memory for so long; by default nothing is cached."""
    store = connect(**options)
    await store.upsert_latest(state())
    server.clear()

    for _ in range(3):
        assert await store.get_latest("ann") == state()

    assert server.counts[RETRIEVE] == reads


async def test_a_cache_knows_its_own_writes(connect: Any, server: QdrantServer, other: QdrantStore) -> None:
    """What this store writes or deletes is seen at once; what another one writes, when the time is over."""
    store = connect(cache_ttl=3600.0)
    await store.upsert_latest(state())
    assert await store.get_latest("ann") == state()
    await store.upsert_latest(state(at=1))
    assert await store.get_latest("ann") == state(at=1)
    await store.upsert_latest(state(at=2), expected=state(at=1))
    assert await store.get_latest("ann") == state(at=2)
    await store.upsert_many([state(at=3)])
    assert await store.get_latest("ann") == state(at=3)

    other.upsert_latest(state(at=4))
    assert await store.get_latest("ann") == state(at=3)

    await store.delete("ann")
    assert await store.get_latest("ann") is None


async def test_a_cache_that_is_behind_is_no_lasting_conflict(
    connect: Any, server: QdrantServer, other: QdrantStore
) -> None:
    """An update that began with a stale state from the cache ends with the present one."""
    store = connect(cache_ttl=3600.0)
    await store.upsert_latest(state())
    await store.get_latest("ann")
    other.upsert_latest(state(at=5, axes={"formality": 0.25}))

    found = await store.patch("ann", {"warmth": 0.5})

    assert dict(found.axes) == {"formality": 0.25, "warmth": 0.5}


async def test_a_bad_user_id_is_refused_by_a_cache_too(connect: Any, server: QdrantServer) -> None:
    """With something in the cache, a user id of another type is ValidationError as without."""
    store = connect(cache_ttl=3600.0)
    await store.upsert_latest(state())
    await store.get_latest("ann")

    assert isinstance(await caught(store.get_latest(cast("Any", ["ann"]))), ValidationError)


ENVIRONMENT = {
    "QDRANT_URL": ("https://qdrant.example.invalid:6333", "url", "https://qdrant.example.invalid:6333"),
    "QDRANT_API_KEY": (KEY, "api_key", KEY),
    "QDRANT_COLLECTION": ("moods", "collection_name", "moods"),
    "ATTUNED_STORE_CONNECT_TIMEOUT": ("2.5", "connect_timeout", 2.5),
    "ATTUNED_STORE_REQUEST_TIMEOUT": ("7", "request_timeout", 7.0),
    "ATTUNED_STORE_POOL_SIZE": ("8", "pool_size", 8),
    "ATTUNED_STORE_VERIFY": ("no", "verify", False),
    "ATTUNED_STORE_CACHE_TTL": ("1.5", "cache_ttl", 1.5),
    "ATTUNED_STORE_SHARD_NUMBER": ("3", "shard_number", 3),
    "ATTUNED_STORE_REPLICATION_FACTOR": ("2", "replication_factor", 2),
    "ATTUNED_STORE_WRITE_CONSISTENCY_FACTOR": ("1", "write_consistency_factor", 1),
    "ATTUNED_STORE_READ_CONSISTENCY": ("quorum", "read_consistency", "quorum"),
    "ATTUNED_STORE_WRITE_ORDERING": ("medium", "write_ordering", "medium"),
    "ATTUNED_STORE_EXACT_SEARCH": ("no", "exact_search", False),
}


@pytest.mark.parametrize("variable", ENVIRONMENT)
def test_every_server_field_can_come_from_the_environment(variable: str) -> None:
    """QDRANT_URL, QDRANT_API_KEY, QDRANT_COLLECTION and ATTUNED_STORE_* describe a configuration."""
    text, field, value = ENVIRONMENT[variable]

    config = QdrantStoreConfig.from_env({variable: text})

    assert getattr(config, field) == value
    assert type(getattr(config, field)) is type(value)
    assert QdrantStoreConfig.from_env({variable: f"  {text} "}) == config
    assert QdrantStoreConfig.from_env({variable: " "}) == QdrantStoreConfig()


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("ATTUNED_STORE_VERIFY", "/etc/ssl/ca.pem", "/etc/ssl/ca.pem"),
        ("ATTUNED_STORE_VERIFY", "TRUE", True),
        ("ATTUNED_STORE_READ_CONSISTENCY", "2", 2),
    ],
)
def test_a_field_of_two_kinds_takes_either_from_the_environment(
    variable: str, text: str, value: object
) -> None:
    """A number or a word, a switch or a path: whatever the variable holds."""
    field = variable.removeprefix("ATTUNED_STORE_").lower()

    assert getattr(QdrantStoreConfig.from_env({variable: text}), field) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("QDRANT_URL", "localhost:6333"),
        ("QDRANT_COLLECTION", "a/b"),
        ("QDRANT_API_KEY", "k3y-that-nobody-may-see-é"),
        ("ATTUNED_STORE_CONNECT_TIMEOUT", "soon"),
        ("ATTUNED_STORE_CONNECT_TIMEOUT", "0"),
        ("ATTUNED_STORE_REQUEST_TIMEOUT", "nan"),
        ("ATTUNED_STORE_POOL_SIZE", "1.5"),
        ("ATTUNED_STORE_CACHE_TTL", "-1"),
        ("ATTUNED_STORE_SHARD_NUMBER", "many"),
        ("ATTUNED_STORE_READ_CONSISTENCY", "some"),
        ("ATTUNED_STORE_WRITE_ORDERING", "any"),
    ],
)
def test_a_malformed_variable_is_named(variable: str, text: str) -> None:
    """A value that will not do is ValidationError in one line, which names its variable and shows no key."""
    with pytest.raises(ValidationError, match=rf"^{variable}: ") as caught:
        QdrantStoreConfig.from_env({variable: text})

    assert len(str(caught.value).splitlines()) == 1
    assert KEY not in str(caught.value)


def test_the_environment_opens_the_store(server: QdrantServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_store() without a target goes where QDRANT_URL says, with the key and the collection."""
    server.api_key = KEY
    monkeypatch.delenv("ATTUNED_STORE", raising=False)
    for name, text in {"URL": server.url, "API_KEY": KEY, "COLLECTION": "moods"}.items():
        monkeypatch.setenv(f"QDRANT_{name}", text)

    with open_store() as store:
        store.upsert_latest(state())

    assert len(server.dump("moods")) == 2


FORK = """
import asyncio, os, sys
from attuned_store import AsyncQdrantStore, QdrantStore, StateSnapshot, StoreError
url, form, ttl = sys.argv[1], sys.argv[2], float(sys.argv[3])
def run(answer):
    return loop.run_until_complete(answer) if form == "async" else answer
loop = asyncio.new_event_loop()
store = (AsyncQdrantStore if form == "async" else QdrantStore)(url=url, verify=False, cache_ttl=ttl)
run(store.upsert_latest(StateSnapshot("before", {}, 5)))
run(store.get_latest("before"))
child = os.fork()
if child == 0:
    child = StateSnapshot("child", {}, 5)
    for operation in (lambda: store.upsert_latest(child), lambda: store.get_latest("before")):
        try:
            print("answered", run(operation()), flush=True)
        except StoreError as error:
            print(type(error).__name__, error, flush=True)
    print(run(store.health()).status, flush=True)
    run(store.aclose() if form == "async" else store.close())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
run(store.upsert_latest(StateSnapshot("after", {}, 5)))
print(run(store.get_latest("before")) is not None)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("form", ["sync", "async"])
@pytest.mark.parametrize("ttl", [0, pytest.param(60)])
def test_a_forked_child_is_told_to_open_its_own_store(form: str, ttl: int, server: QdrantServer) -> None:
    """A store inherited by a forked child raises StoreError, sends nothing, and the parent goes on."""
    forked = python(FORK, server.url, form, ttl)

    assert forked.returncode == 0, forked.stderr
    write, read, health, parent = forked.stdout.splitlines()
    assert write.startswith("StoreError")
    assert "after the fork" in write
    assert "after the fork" in read
    assert (health, parent) == ("unhealthy", "True")
    assert {user for user, _, _ in points(server)} == {"before", "after"}


def test_of_two_of_one_time_history_shows_the_latest(server: QdrantServer) -> None:
    """Where a conditional write and another of the same time crossed, history shows what the latest is."""
    store = QdrantStore(url=server.url)
    store.upsert_many([state("ann", 1), state("ann", 2)])
    latest = store["ann"]
    crossed = attrs.evolve(latest, axes={"warmth": 0.123})
    backend: Any = store._operations.backend
    attuned_store.run(backend.engine.apply(C, [Put([backend._point(crossed, latest.updated_at_unix_ms)])]))

    assert store.get_history("ann") == [latest, state("ann", 1)]
    copy = attuned_store.MemoryStore()
    attuned_store.copy(store, copy)
    assert copy.get_history("ann") == [latest, state("ann", 1)]


# ------------------------------------------------------------------------------
# What is read while others write
# ------------------------------------------------------------------------------


class Others:
    """Someone who writes and deletes between any two requests, and remembers every state that existed."""

    def __init__(self, store: QdrantStore, users: int, busy: float = 0.5) -> None:
        self.store, self.busy = store, busy
        self.random = random.Random(5)
        self.at = itertools.count(1)
        self.existed = {f"{number:03}-user": set[tuple[StateSnapshot, ...]]() for number in range(users)}
        for user_id in self.existed:
            self._write(user_id)

    def act(self) -> None:
        """Change some users."""
        for user_id in self.existed:
            if self.random.random() < self.busy:
                if self.random.random() < 0.3:
                    self.store.delete(user_id)
                self._write(user_id)

    def _write(self, user_id: str) -> None:
        for _ in range(self.random.randint(1, 3)):
            self.store.upsert_latest(state(user_id, next(self.at)))
            self.existed[user_id].add(tuple(reversed(self.store.get_history(user_id))))

    def check(self, found: Mapping[str, list[StateSnapshot]]) -> set[str]:
        """Who is in a file with states that never were."""
        return {user_id for user_id, states in found.items() if tuple(states) not in self.existed[user_id]}


@pytest.fixture
def others(server: QdrantServer) -> Iterator[Others]:
    """They write past the faults of the test, which know them by their key."""
    with plain(server, api_key="others", max_history_per_user=4) as store:
        yield Others(store, 12)


def of_the_reader(request: Any) -> bool:
    return request.headers.get("api-key") != "others"


@pytest.mark.parametrize("into", ["file", "copy"])
def test_a_snapshot_holds_states_that_existed(
    into: str, server: QdrantServer, others: Others, tmp_path: Path
) -> None:
    """Whoever is written to or deleted between any two requests, each user's states are of one moment."""
    with plain(server, max_history_per_user=4) as store:
        server.on(meanwhile(others.act), route=SCROLL, when=of_the_reader)
        if into == "file":
            report = store.create_snapshot(tmp_path, kind="portable")
            assert report.path is not None
            found = archived(report.path)
            assert report.message == ""
        else:
            target = attuned_store.MemoryStore()
            attuned_store.copy(store, target)
            found = {user_id: [*reversed(target.get_history(user_id))] for user_id in target}

    assert len(found) > 3
    assert others.check(found) == set()


@pytest.mark.parametrize("busy", [0.1, 1.0])
def test_a_snapshot_of_several_shards_says_who_was_not_read_at_rest(
    busy: float, server: QdrantServer, others: Others, tmp_path: Path
) -> None:
    """Shards answer at moments of their own: what moved is read again, or reported."""
    others.busy = busy
    with plain(server, max_history_per_user=4, read_consistency="all") as store:
        server.on(tear(others.act), route=SCROLL, when=of_the_reader)
        report = store.create_snapshot(tmp_path, kind="portable")

    assert report.path is not None
    wrong = others.check(archived(report.path))
    named = {user_id for user_id in others.existed if f"{user_id[:4]}…" in report.message}
    if busy == 1.0:
        assert "could not be read at rest" in report.message
        assert "and others" in report.message
        assert str(report.users) in report.message
    else:
        assert wrong <= named

"""The store on a server: its requests, how it opens, who wins a race, what it refuses and what health says."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

if tuple(map(int, version("qdrant-client").split(".")[:2])) < (1, 20):
    pytest.skip("the local engine of an older qdrant-client differs from the server", allow_module_level=True)

import anyio
import anyio.to_thread
from conformance import (
    DAY,
    FACES,
    HOUR,
    NOW,
    Awaited,
    Clock,
    environment,
    needs,
    point_id,
    run,
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
    drop,
    duplicate,
    edit,
    edit_result,
    hang,
    lose_reply,
    not_json,
    other_shape,
    reply,
    reset,
    truncate,
)

import attuned_store
from attuned_store import (
    ANY,
    CANONICAL_AXES,
    AsyncQdrantStore,
    AsyncStateStore,
    BackendError,
    BackendRejectedError,
    BackendTimeoutError,
    BackendUnavailableError,
    BreakerPolicy,
    ConflictError,
    QdrantStore,
    QdrantStoreConfig,
    RetryPolicy,
    SchemaMismatchError,
    StateSnapshot,
    StoreClosedError,
    StoreError,
    UnsupportedServerError,
    ValidationError,
    open_store,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

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
DELETE = "POST /collections/{collection}/points/delete"
INDEXES = {"user_id": "keyword", "kind": "keyword", "updated_at_unix_ms": "integer", "source": "keyword"}
PATIENT = RetryPolicy(attempts=6, base_s=0)
KEY = "k3y-that-nobody-may-see"

Connect = "Callable[..., AsyncStateStore]"


def defect(reason: str) -> pytest.MarkDecorator:
    """The mark of a test that shows a known defect: it fails until that is mended, and then says so."""
    return pytest.mark.xfail(strict=True, reason=reason)


# ------------------------------------------------------------------------------
# Stores and servers
# ------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    """A server of its own for the test; whatever hangs is let go at the end."""
    with QdrantServer() as server:
        yield server
        server.calm()


@pytest.fixture(
    params=[pytest.param(face, marks=needs("trio" if face == "trio" else None)) for face in FACES]
)
def face(request: pytest.FixtureRequest) -> str:
    """The form of the store: sync, asyncio or trio."""
    return cast("str", request.param)


@pytest.fixture
def anyio_backend(face: str) -> str:
    """The event loop of the face; a synchronous store is called from asyncio."""
    return "trio" if face == "trio" else "asyncio"


def plain(server: QdrantServer | str, **options: Any) -> QdrantStore:
    """A synchronous store on a server, without loading certificates and without waiting to retry."""
    url = server if isinstance(server, str) else server.url
    return QdrantStore(**{"url": url, "verify": False, "retry": RetryPolicy(base_s=0), **options})


@pytest.fixture
async def connect(face: str, server: QdrantServer) -> Any:
    """A function that makes a store of the face, which has not sent anything yet."""
    stores: list[AsyncStateStore] = []

    def connect(**options: Any) -> AsyncStateStore:
        options = {"url": server.url, "verify": False, "retry": RetryPolicy(base_s=0), **options}
        store = Awaited(QdrantStore(**options)) if face == "sync" else AsyncQdrantStore(**options)
        stores.append(cast("AsyncStateStore", store))
        return stores[-1]

    yield connect
    server.calm()
    for store in stores:
        await store.aclose()


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
        import asyncio

        await asyncio.to_thread(act)
        return await exchange.proceed()

    return action


def meet(number: int, *, answered: bool = True) -> Action:
    """Hold requests until so many are there, the answers of all of them known, or none executed yet."""
    arrived: list[Exchange] = []

    async def action(exchange: Exchange) -> Response:
        import asyncio

        response = await exchange.proceed() if answered else None
        arrived.append(exchange)
        with anyio.fail_after(30):
            while len(arrived) < number:
                await asyncio.sleep(0.001)
        return response or await exchange.proceed()

    return action


async def caught(operation: Awaitable[object]) -> StoreError:
    """The error of an operation, which must be one of ours, in one line."""
    try:
        answer = await operation
    except StoreError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        return error
    raise AssertionError(f"no error: {answer!r}")


# ------------------------------------------------------------------------------
# Requests
# ------------------------------------------------------------------------------

Operation = "Callable[[AsyncStateStore], Awaitable[object]]"
REQUESTS: dict[str, tuple[Any, dict[str, int]]] = {
    "upsert_latest": (lambda store: store.upsert_latest(state(at=5)), {UPSERT: 1}),
    "upsert_latest, older": (lambda store: store.upsert_latest(state(at=-5)), {UPSERT: 1}),
    "upsert_latest, expected": (
        lambda store: store.upsert_latest(state(at=5), expected=state()),
        {RETRIEVE: 2, UPSERT: 2},
    ),
    "upsert_many, a batch": (
        lambda store: store.upsert_many([state(f"user-{number}", number) for number in range(64)]),
        {BATCH: 1},
    ),
    "upsert_many, three batches": (
        lambda store: store.upsert_many([state(f"user-{number}", number) for number in range(129)]),
        {BATCH: 2, UPSERT: 1},
    ),
    "get_latest": (lambda store: store.get_latest("ann"), {RETRIEVE: 1}),
    "get_latest, unknown": (lambda store: store.get_latest("nobody"), {RETRIEVE: 1}),
    "get_many": (lambda store: store.get_many(["ann", "bob", "nobody"]), {RETRIEVE: 1}),
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
    "patch": (lambda store: store.patch("ann", {"warmth": 0.1}), {RETRIEVE: 3, UPSERT: 2}),
    "count": (lambda store: store.count(), {COUNT: 1}),
    "delete": (lambda store: store.delete("ann"), {RETRIEVE: 1, DELETE: 1}),
    "delete, unknown": (lambda store: store.delete("nobody"), {RETRIEVE: 1, DELETE: 1}),
    "health": (lambda store: store.health(), {INFO: 1, DESCRIBE: 1, COUNT: 1}),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_every_operation_takes_a_fixed_number_of_requests(
    name: str, store: AsyncStateStore, server: QdrantServer
) -> None:
    """Reads and unconditional writes are one request, deletes two; a conditional write is four."""
    await store.upsert_many([state(), state("bob")])
    server.clear()
    operation, expected = REQUESTS[name]

    await operation(store)

    assert dict(server.counts) == expected


@defect("get_many and upsert_many cut into batches of 64, though a request on a server may hold more")
async def test_a_hundred_users_are_read_in_one_request(store: AsyncStateStore, server: QdrantServer) -> None:
    """get_many is one request, whatever number of users a request can hold."""
    await store.get_many([f"user-{number}" for number in range(100)])

    assert dict(server.counts) == {RETRIEVE: 1}


async def test_one_connection_serves_one_caller(store: AsyncStateStore, server: QdrantServer) -> None:
    """Connections are kept and used again: one after another, operations share a single one."""
    await store.upsert_latest(state())
    server.clear()

    for number in range(20):
        await store.upsert_latest(state(at=number))
        await store.get_latest("ann")

    assert server.accepted == 0
    assert len(server.requests) == 40 + 2  # the history was looked at once, and there was nothing to trim


async def test_the_pool_bounds_the_connections(connect: Any, server: QdrantServer) -> None:
    """However many callers there are, no more than pool_size connections are opened."""
    store = connect(pool_size=3)
    await store.count()
    server.on(delay(0.002))

    await together(store, [functools.partial(store.get_latest, "ann")] * 60)

    assert server.counts[RETRIEVE] == 60
    assert 1 < server.accepted <= 3


async def test_connections_that_the_server_closed_are_replaced(
    connect: Any, server: QdrantServer
) -> None:
    """A server that ends idle connections, as every restart does, is not noticed by the caller."""
    store = connect(retry=PATIENT)
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
# Opening
# ------------------------------------------------------------------------------


def make_collection(server: QdrantServer, **changes: Any) -> None:
    """Create the collection as the store would, or with changes, and without indexes."""
    metadata = {"format_version": 1, "axes": list(CANONICAL_AXES), "vector_size": 24}
    body = {"vectors": {"size": 24, "distance": "Cosine"}, "metadata": metadata, **changes}
    httpx.put(f"{server.url}/collections/{C}", json=body).raise_for_status()


def make_indexes(server: QdrantServer) -> None:
    for key, kind in INDEXES.items():
        body = {"field_name": key, "field_schema": kind}
        httpx.put(f"{server.url}/collections/{C}/index", json=body).raise_for_status()


def described(server: QdrantServer, collection: str = C) -> dict[str, Any]:
    answer = httpx.get(f"{server.url}/collections/{collection}").raise_for_status().json()
    return cast("dict[str, Any]", answer["result"])


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
    """The collection has 24 dimensions, Cosine, a tenant index and three more, and records its axes."""
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
    for key in present:
        body = {"field_name": key, "field_schema": INDEXES[key]}
        httpx.put(f"{server.url}/collections/{C}/index", json=body).raise_for_status()
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


@pytest.mark.parametrize("indexed", [True, pytest.param(False, marks=pytest.mark.xfail(reason="see below"))])
@pytest.mark.parametrize("name", MISFITS)
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
        pytest.param({**META, "axes": ["Not An Axis"]}, marks=defect("ValidationError, not of the schema")),
        pytest.param({**META, "axes": [5] * 24}, marks=defect("ValidationError, not of the schema")),
    ],
)
async def test_metadata_of_someone_else_is_not_ours(
    metadata: dict[str, Any], connect: Any, server: QdrantServer
) -> None:
    """A collection whose metadata is not this library's is SchemaMismatchError."""
    make_collection(server, metadata=metadata)

    assert isinstance(await caught(connect().upsert_latest(state())), SchemaMismatchError)
    assert server.dump(C) == []


@defect("the message asks for a vector size of None")
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


@defect("AttributeError: 'NoneType' object has no attribute 'config'")
async def test_a_collection_that_vanishes_while_it_is_opened_is_an_error(
    connect: Any, server: QdrantServer
) -> None:
    """A collection that somebody deletes right after its creation is a StoreError, not a crash."""
    server.on(reply(404), route=DESCRIBE)

    await caught(connect().get_latest("ann"))


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


def race_after_the_write(server: QdrantServer, *acts: Callable[[], object]) -> None:
    """Between the conditional put and its reading back, someone else acts."""
    server.on(meanwhile(lambda: [act() for act in acts]), route=RETRIEVE, skip=1, times=1)


def successor(store: QdrantStore, times: int = 1) -> Callable[[], object]:
    """Conditional writes by another client, one upon the other."""

    def act() -> None:
        for _ in range(times):
            store.update("ann", lambda old: cast("StateSnapshot", old).patched({"tact": 0}, **LATER(old)))

    return act


def LATER(old: StateSnapshot | None) -> dict[str, Any]:  # noqa: N802 - stands for fields
    return {} if old is None else {"updated_at_unix_ms": old.updated_at_unix_ms + 1}

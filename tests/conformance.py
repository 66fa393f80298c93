"""What every store does, written once.

A backend's test file subclasses these classes and names its backend; `BACKENDS` is the table of all of them.
Every test is written with await: a synchronous store is wrapped in `Awaited`. Nothing here knows an engine.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import sys
import threading
import uuid
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from copy import copy as clone
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import anyio
import anyio.lowlevel
import pytest

from attuned_store import (
    BLOCKING,
    CANONICAL_AXES,
    AsyncMemoryStore,
    AsyncQdrantStore,
    AsyncStateStore,
    BackendError,
    ConflictError,
    Match,
    MemoryStore,
    QdrantStore,
    SchemaMismatchError,
    SnapshotError,
    SnapshotReport,
    Source,
    StateSnapshot,
    StateStore,
    StoreClosedError,
    StoreError,
    StoreLockedError,
    Suspending,
    UserNotFoundError,
    ValidationError,
    acopy,
    copy,
    list_snapshots,
    read_table,
    verify_snapshot,
)
from attuned_store import open_store as open_path

if TYPE_CHECKING:
    from pathlib import Path

# ------------------------------------------------------------------------------
# Backends and faces
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """One row of the table: how a store is made in each form, and the library that it needs."""

    sync: Callable[..., StateStore]
    asynchronous: Callable[..., AsyncStateStore]
    library: str | None = None


# A new backend is one row here and a file with `class TestServer(StoreTests): backends = ("server",)`.
# Each maker gets a path of its own (a directory, or a name to derive one from) and the options of the store.
BACKENDS = {
    "memory": Backend(
        lambda path, **options: MemoryStore(**options),
        lambda path, **options: AsyncMemoryStore(**options),
    ),
    "edge": Backend(
        lambda path, **options: QdrantStore(path=path, **{"engine": "edge", **options}),
        lambda path, **options: AsyncQdrantStore(path=path, **{"engine": "edge", **options}),
        library="qdrant_edge",
    ),
    "local": Backend(
        lambda path, **options: QdrantStore(path=path, **{"engine": "local", **options}),
        lambda path, **options: AsyncQdrantStore(path=path, **{"engine": "local", **options}),
        library="qdrant_client",
    ),
}
FACES = ("sync", "asyncio", "trio")


def synchronous(store: StateStore | AsyncStateStore) -> StateStore:
    """A store in memory, as a synchronous one over the same memory."""
    if isinstance(store, StateStore):
        return store
    other, there = MemoryStore(), store._operations
    other._backend = cast("Any", there.backend)
    other._operations = type(other._operations)(
        there.backend, there.place, BLOCKING, collection=there.collection
    )
    return other


def fill_memory(store: StateStore | AsyncStateStore, states: Sequence[StateSnapshot]) -> None:
    """Write to a store in memory of either form."""
    for each in states:
        synchronous(store).upsert_latest(each)


def collection_of(path: Path) -> str:
    """A collection of its own for what other backends keep in a directory."""
    return f"test_{hashlib.sha256(str(path).encode()).hexdigest()[:40]}"


@functools.cache
def loopback() -> Any:
    """The loopback server of this test run, started when it is first asked for; conftest closes it."""
    from qdrant_server import QdrantServer

    return QdrantServer().start()


def server_backend(url: Callable[[], str]) -> Backend:
    """A backend whose stores are collections of one server."""
    return Backend(
        lambda path, **options: QdrantStore(url=url(), **{"collection_name": collection_of(path), **options}),
        lambda path, **options: AsyncQdrantStore(
            url=url(), **{"collection_name": collection_of(path), **options}
        ),
        library="qdrant_client",
    )


BACKENDS["server"] = server_backend(lambda: loopback().url)
if "QDRANT_TEST_URL" in os.environ:
    BACKENDS["real"] = server_backend(lambda: os.environ["QDRANT_TEST_URL"])


@dataclass(frozen=True)
class Case:
    """One backend in one form, such as edge-trio."""

    backend: str
    face: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.face}"

    @property
    def event_loop(self) -> str:
        return "trio" if self.face == "trio" else "asyncio"

    def open_sync(self, path: Path, **options: Any) -> StateStore:
        return BACKENDS[self.backend].sync(path, **options)

    async def open(self, path: Path, **options: Any) -> AsyncStateStore:
        if self.face == "sync":
            return cast("AsyncStateStore", Awaited(self.open_sync(path, **options)))
        store = BACKENDS[self.backend].asynchronous(path, **options)
        await store.__aenter__()
        return store


def needs(*libraries: str | None) -> pytest.MarkDecorator:
    """The mark that skips a test where one of the optional libraries is not installed."""
    missing = [name for name in libraries if name and importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def cases(backends: Iterable[str], faces: Iterable[str]) -> list[Any]:
    """The parameters backends x faces, with ids such as memory-sync."""
    return [
        pytest.param(
            case, id=str(case), marks=needs(BACKENDS[backend].library, "trio" if face == "trio" else None)
        )
        for backend in backends
        for face in faces
        for case in [Case(backend, face)]
    ]


class Awaited:
    """A synchronous store under the asynchronous names, so that each test is written once."""

    def __init__(self, store: StateStore) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.store, "close" if name == "aclose" else name)
        if not callable(attribute):
            return attribute

        async def call(*args: Any, **kwargs: Any) -> Any:
            return attribute(*args, **kwargs)

        async def iterate() -> AsyncIterator[Any]:
            for item in attribute():
                yield item

        return iterate if name in ("users", "items") else call


# ------------------------------------------------------------------------------
# Small helpers
# ------------------------------------------------------------------------------

Open = Callable[..., Awaitable[AsyncStateStore]]
Content = dict[str, tuple[StateSnapshot | None, list[StateSnapshot]]]
T = TypeVar("T")

COMMANDS = (  # of attuned-store
    "tour",
    "import",
    "export",
    "put",
    "patch",
    "get",
    "history",
    "users",
    "search",
    "delete",
    "prune",
    "health",
    "count",
    "snapshot",
    "restore",
    "verify",
    "snapshots",
    "copy",
    "serve",
)
NOW = 1_768_000_000_000
HOUR = 3_600_000
DAY = 24 * HOUR
LAST_MS = 253_402_300_799_999
LIKE_SECONDS = range(10**9, 10**10 + 1)  # which a caller is not allowed as milliseconds
MANY = 600  # more than one batch of any store


class Clock:
    """The wall clock of the stores under test, which stands still unless it is moved."""

    now: int = NOW

    def __call__(self) -> int:
        return self.now


def state(
    user_id: str = "ann", at: int = 0, axes: Mapping[str, float] | None = None, **fields: Any
) -> StateSnapshot:
    """A snapshot of `user_id` taken `at` milliseconds after NOW, with axes that tell it from others."""
    axes = {"warmth": 0.75, "formality": (at % 97) / 100} if axes is None else axes
    return StateSnapshot(user_id, axes, NOW + at, **fields)


def run(flow: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends."""
    try:
        flow.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    flow.close()
    raise AssertionError("suspended")


def callback(store: AsyncStateStore, fn: Callable[..., Coroutine[Any, Any, T]]) -> Any:
    """`fn` in the form that `store` takes: as it is, or a plain function for a synchronous one."""
    if not isinstance(store, Awaited):
        return fn
    return lambda *args: run(fn(*args))


async def together(store: AsyncStateStore, jobs: Iterable[Callable[[], Coroutine[Any, Any, object]]]) -> None:
    """Run all jobs at once: in tasks, or in threads where the store is synchronous."""
    if isinstance(store, Awaited):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda job: run(job()), jobs))
    else:
        async with anyio.create_task_group() as tasks:
            for job in jobs:
                tasks.start_soon(job)


async def turns_during(call: Callable[[], Awaitable[T]]) -> tuple[int, T]:
    """How often another task had its turn while something was awaited, and what that gave."""
    turns, ended = 0, False

    async def watch() -> None:
        nonlocal turns
        while not ended:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        answer = await call()
        counted, ended = turns, True
    return counted, answer


async def users_of(store: AsyncStateStore) -> list[str]:
    return sorted([user_id async for user_id in store.users()])


async def items_of(store: AsyncStateStore) -> list[tuple[str, StateSnapshot]]:
    return sorted([item async for item in store.items()])


async def content(store: AsyncStateStore) -> Content:
    """All that a store holds, checked against its own counts."""
    users = await users_of(store)
    found: Content = {
        user_id: (await store.get_latest(user_id), await store.get_history(user_id, limit=1_000_000))
        for user_id in users
    }
    assert len(found) == len(users) == await store.count()
    assert sum(len(history) for _, history in found.values()) == await store.count(history=True)
    return found


@asynccontextmanager
async def unchanged(store: AsyncStateStore) -> AsyncIterator[None]:
    """What the block does leaves everything in the store as it was."""
    before = await content(store)
    yield
    assert await content(store) == before


async def refused(
    store: AsyncStateStore,
    attempts: Mapping[str, Callable[[], Awaitable[object]]],
    errors: type[Exception] | tuple[type[Exception], ...] = ValidationError,
) -> None:
    """Every attempt raises one of `errors`, and none of them changes anything."""
    complaints = []
    async with unchanged(store):
        for what, attempt in attempts.items():
            try:
                answer = await attempt()
            except errors:
                continue
            except Exception as error:  # noqa: BLE001
                complaints.append(f"{what}: {error!r}")
            else:
                complaints.append(f"{what}: accepted, {answer!r}")
    assert not complaints, "\n".join(complaints)


def cosine(left: Mapping[str, float], right: Mapping[str, float]) -> float:
    """The score of two states by its definition: the cosine of their axes, centred on neutral."""
    pairs = [(left.get(name, 0.5) - 0.5, right.get(name, 0.5) - 0.5) for name in {*left, *right}]
    norms = math.hypot(*(a for a, _ in pairs)) * math.hypot(*(b for _, b in pairs))
    return sum(a * b for a, b in pairs) / norms if norms else 0.0


def check_scores(matches: Sequence[Match], axes: Mapping[str, float]) -> None:
    """Every score is the cosine to 1e-5, and the best come first."""
    for match in matches:
        assert match.score == pytest.approx(cosine(axes, match.snapshot.axes), abs=1e-5)
    assert [match.score for match in matches] == sorted((match.score for match in matches), reverse=True)


def found_users(matches: Iterable[Match]) -> list[str]:
    return [match.snapshot.user_id for match in matches]


def stream_states(count: int, seed: int) -> Iterator[StateSnapshot]:
    """Snapshots of `count` users with random axes, the same ones for the same seed."""
    source = random.Random(seed)
    for number in range(count):
        names = source.sample(CANONICAL_AXES, source.randint(1, 23))
        yield state(f"user-{number}", number, {name: source.random() for name in names})


def random_states(count: int, seed: int) -> list[StateSnapshot]:
    return list(stream_states(count, seed))


def run_python(code: str, *arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python of its own, which imports the same modules as this one."""
    return subprocess.run(
        script(code, *arguments),
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )


def script(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


BAD_USER_IDS = {
    "an empty user id": "",
    "a user id of 257 bytes": "a" * 257,
    "a user id of 258 bytes in 129 characters": "é" * 129,
    "a user id with a line break": "ann\nbob",
    "a user id with a null character": "ann\0",
    "a user id with DEL": "ann\x7f",
    "a user id with a C1 control character": "ann\x85",
    "a user id with a lone surrogate": "ann\ud800",
    "a user id of bytes": b"ann",
    "a number as a user id": 5,
    "no user id": None,
}
BAD_AXES = {
    "NaN": {"warmth": math.nan},
    "infinity": {"warmth": math.inf},
    "a value above 1": {"warmth": 1.0000001},
    "a value below 0": {"warmth": -0.0000001},
    "a string as a value": {"warmth": "0.5"},
    "a bool as a value": {"warmth": True},
    "None as a value": {"warmth": None},
    "a value too large for a float": {"warmth": 10**400},
    "an axis that the store does not have": {"warmth": 0.5, "unheard_of": 0.5},
    "an axis name in capitals": {"Warmth": 0.5},
    "an axis name of 65 characters": {"a" * 65: 0.5},
    "an axis name with a line break": {"warmth\n": 0.5},
    "an empty axis name": {"": 0.5},
    "a number as an axis name": {5: 0.5},
    "a number as axes": 5,
    "None as axes": None,
}
BAD_BOUNDS: dict[str, dict[str, Any]] = {
    "since as a string": {"since": "yesterday"},
    "since as a float": {"since": 1.5},
    "until as a string": {"until": "now"},
    "until as a float": {"until": 1.5},
}
BAD_FILTERS: dict[str, dict[str, Any]] = {
    "limit 0": {"limit": 0},
    "a negative limit": {"limit": -1},
    "a limit of 1.5": {"limit": 1.5},
    "a limit in words": {"limit": "ten"},
    "NaN as threshold": {"score_threshold": math.nan},
    "a string as threshold": {"score_threshold": "high"},
    "a number as user id": {"user_id": 5},
    "a number as excluded user id": {"exclude_user_id": 5},
    "an unknown source": {"source": "guess"},
    "a number as source": {"source": 5},
    "NaN as confidence": {"min_confidence": math.nan},
    "a confidence above 1": {"min_confidence": 1.5},
    "a string as confidence": {"min_confidence": "high"},
    **BAD_BOUNDS,
}
ODD_USER_IDS = [
    "a",
    " ",
    "a" * 256,
    "é" * 128,
    "ann::latest",
    "ann::latest::latest",
    f"ann::{NOW}",
    "../../etc/passwd",
    "O'Brien; DROP TABLE points",
    "日本語 🙂",
    '%s {0} \\ "',
    "ann@example.org",
    "Å",
    "A\u030a",
]

QUERY = {"warmth": 0.9, "formality": 0.4}
PEOPLE = [
    state("ann", -5, {"warmth": 0.2}, source="inferred", confidence=0.9),
    state("ann", 0, {"warmth": 0.9, "formality": 0.2}),
    state("bob", 5, {"formality": 1.0}, source="mixed", confidence=0.7),
    state("bob", 10, {"warmth": 0.8, "formality": 0.3}, source="inferred", confidence=0.5),
    state("cyd", 20, {"warmth": 0.1, "urgency_sensitivity": 0.9}, source="mixed", confidence=0.7),
    state("dee", 30, {}, source="inferred", confidence=0.9),
    state("eve", 40, {"warmth": 0.6, "anxiety_level": 0.0}, source="inferred", confidence=0.6),
]
LATEST_PEOPLE = [PEOPLE[1], *PEOPLE[3:]]

FILTERS: dict[str, tuple[dict[str, Any], Callable[[StateSnapshot], bool]]] = {
    "one user": ({"user_id": "bob"}, lambda found: found.user_id == "bob"),
    "a user who is not there": ({"user_id": "nobody"}, lambda found: False),
    "all but one user": ({"exclude_user_id": "bob"}, lambda found: found.user_id != "bob"),
    "all but nobody": ({"exclude_user_id": ""}, lambda found: True),
    "a source": ({"source": Source.INFERRED}, lambda found: found.source is Source.INFERRED),
    "a source as a string": ({"source": "mixed"}, lambda found: found.source is Source.MIXED),
    "a confidence, inclusive": ({"min_confidence": 0.7}, lambda found: found.confidence >= 0.7),
    "since, inclusive": ({"since": NOW + 20}, lambda found: found.updated_at_unix_ms >= NOW + 20),
    "until, inclusive": ({"until": NOW + 20}, lambda found: found.updated_at_unix_ms <= NOW + 20),
    "between": (
        {"since": NOW + 10, "until": NOW + 20},
        lambda found: NOW + 10 <= found.updated_at_unix_ms <= NOW + 20,
    ),
    "a threshold": (
        {"score_threshold": 0.3},
        lambda found: cosine(QUERY, found.axes) >= 0.3,
    ),
    "several at once": (
        {"source": "inferred", "min_confidence": 0.6, "until": NOW + 30, "exclude_user_id": "ann"},
        lambda found: (
            found.source == "inferred"
            and found.confidence >= 0.6
            and found.updated_at_unix_ms <= NOW + 30
            and found.user_id != "ann"
        ),
    ),
}


# ------------------------------------------------------------------------------
# Every store
# ------------------------------------------------------------------------------


@pytest.mark.anyio
class StoreTests:
    """What every store does, in both forms and on both event loops."""

    backends: ClassVar[tuple[str, ...]] = ()
    faces: ClassVar[tuple[str, ...]] = FACES

    # Writing and reading one state

    async def test_every_field_of_a_snapshot_is_kept(self, store: AsyncStateStore) -> None:
        """What is read back equals what was written, in every field."""
        axes = {name: number / 22 for number, name in enumerate(CANONICAL_AXES)}
        written = StateSnapshot("ann", axes, NOW, Source.MIXED, 0.123456789012345, 7)

        await store.upsert_latest(written)

        read = await store.get_latest("ann")
        assert read == written
        assert read is not None
        assert isinstance(read.source, Source)
        assert [read] == await store.get_history("ann")

    async def test_extreme_values_are_kept(self, store: AsyncStateStore) -> None:
        """The first and the last millisecond, the largest version and the smallest axis value are kept."""
        first = StateSnapshot("first", {}, 0, confidence=0, schema_version=1)
        last = StateSnapshot(
            "last", {"warmth": 5e-324, "formality": 0.1 + 0.2}, LAST_MS, schema_version=2**63 - 1
        )

        await store.upsert_many([first, last])

        assert await content(store) == {"first": (first, [first]), "last": (last, [last])}

    async def test_users_whose_ids_look_alike_are_kept_apart(self, store: AsyncStateStore) -> None:
        """Any valid user id can be used, and no two of them share anything."""
        for number, user_id in enumerate(ODD_USER_IDS):
            await store.upsert_latest(state(user_id, number))

        expected = {name: state(name, number) for number, name in enumerate(ODD_USER_IDS)}
        assert await content(store) == {name: (found, [found]) for name, found in expected.items()}

    async def test_the_newest_timestamp_wins(self, store: AsyncStateStore) -> None:
        """States may arrive in any order: the one with the greatest timestamp is the latest."""
        for at in (30, 10, 50, 20, 40):
            await store.upsert_latest(state(at=at))

        assert await store.get_latest("ann") == state(at=50)
        assert await store.get_history("ann") == [state(at=at) for at in (50, 40, 30, 20, 10)]

    async def test_an_older_state_leaves_the_latest_alone(self, store: AsyncStateStore) -> None:
        """A state that arrives late goes into history in its place."""
        await store.upsert_latest(state(at=10))
        await store.upsert_latest(state(at=5))

        assert await store.get_latest("ann") == state(at=10)
        assert await store.get_history("ann") == [state(at=10), state(at=5)]

    async def test_of_two_states_with_one_timestamp_the_later_write_wins(
        self, store: AsyncStateStore
    ) -> None:
        """A state with the timestamp of the latest replaces it, in history too."""
        await store.upsert_latest(state(axes={"warmth": 0.1}))
        await store.upsert_latest(state(axes={"warmth": 0.2}))

        winner = state(axes={"warmth": 0.2})
        assert await content(store) == {"ann": (winner, [winner])}

    async def test_an_equal_timestamp_replaces_an_older_entry_of_history(
        self, store: AsyncStateStore
    ) -> None:
        """A state with the timestamp of an earlier one replaces that entry and nothing else."""
        await store.upsert_many([state(at=1), state(at=2), state(at=3)])
        await store.upsert_latest(state(at=2, axes={"warmth": 0.0}))

        history = [state(at=3), state(at=2, axes={"warmth": 0.0}), state(at=1)]
        assert await content(store) == {"ann": (state(at=3), history)}

    async def test_delivering_twice_is_harmless(self, store: AsyncStateStore) -> None:
        """Writing the same states again, in another order, changes nothing."""
        states = [state(user_id, at) for user_id in ("ann", "bob") for at in range(5)]
        await store.upsert_many(states)

        async with unchanged(store):
            await store.upsert_many(states)
            for old in reversed(states):
                await store.upsert_latest(old)

    async def test_a_timestamp_is_the_time_of_construction_by_default(
        self, store: AsyncStateStore, clock: Clock
    ) -> None:
        """A snapshot made without a timestamp carries the present one."""
        clock.now = NOW + 123

        await store.upsert_latest(StateSnapshot("ann", {}))

        latest = await store.get_latest("ann")
        assert latest is not None
        assert latest.updated_at_unix_ms == NOW + 123

    # Deleting

    async def test_deleting_removes_latest_and_history(self, store: AsyncStateStore) -> None:
        """After a delete nothing of the user is left, and other users are untouched."""
        await store.upsert_many([state("ann", 1), state("ann", 2), state("bob", 3)])

        assert await store.delete("ann") is True

        assert await content(store) == {"bob": (state("bob", 3), [state("bob", 3)])}
        assert await store.get_latest("ann") is None
        assert await store.get_history("ann") == []
        assert await store.search_similar({"warmth": 1.0}, user_id="ann", history=True) == []

    async def test_deleting_twice_is_no_error(self, store: AsyncStateStore) -> None:
        """Delete says whether there was anything."""
        await store.upsert_latest(state())

        assert await store.delete("ann") is True
        assert await store.delete("ann") is False
        assert await store.delete("nobody") is False

    async def test_deleting_leaves_no_tombstone(self, store: AsyncStateStore) -> None:
        """An older state delivered after a delete recreates the user."""
        await store.upsert_many([state(at=10), state(at=20)])
        await store.delete("ann")

        await store.upsert_latest(state(at=5))

        assert await content(store) == {"ann": (state(at=5), [state(at=5)])}

    # Reading what is not there

    async def test_an_unknown_user_has_nothing(self, store: AsyncStateStore) -> None:
        """Reads of an unknown user answer None, an empty list or an empty dict."""
        assert await store.get_latest("nobody") is None
        assert await store.get_history("nobody") == []
        assert await store.get_many(["nobody"]) == {}

    async def test_an_empty_store_is_empty_everywhere(self, store: AsyncStateStore) -> None:
        """A new store has no users, no entries and no matches."""
        assert await users_of(store) == []
        assert await store.count() == await store.count(history=True) == 0
        assert await store.search_similar({"warmth": 1.0}) == []
        assert await store.search_similar({"warmth": 1.0}, history=True) == []
        assert await store.get_many([]) == {}
        assert await store.prune() == 0

    async def test_reads_create_nothing(self, store: AsyncStateStore) -> None:
        """Reading, searching and deleting what does not exist leaves no trace."""
        await store.upsert_many([state("bob", 1), state("bob", 2)])

        async with unchanged(store):
            await store.get_latest("nobody")
            await store.get_history("nobody", 5, since=0, until=LAST_MS)
            await store.get_many(["nobody", "bob"])
            await store.search_similar({"warmth": 1.0}, user_id="nobody", history=True)
            await store.search_similar("bob")
            await store.delete("nobody")
            await store.update("nobody", lambda latest: None)
            await store.count(history=True)
            await store.health()
            await store.prune()

    # Many at once

    async def test_a_default_stands_for_an_unknown_user(self, store: AsyncStateStore) -> None:
        """get_latest gives its default where there is nothing of a user, and else what there is."""
        await store.upsert_latest(state())

        assert await store.get_latest("nobody", 5) == 5
        assert await store.get_latest("ann", 5) == state()
        assert await store.get_latest("nobody") is None

    async def test_all_latest_states_are_read_by_pages(self, store: AsyncStateStore) -> None:
        """items() gives each user once, with the latest state."""
        states = random_states(150, 5)
        await store.upsert_many([*states, *(each.patched({}) for each in states[:5])])

        found = [item async for item in store.items()]

        assert len(found) == len(dict(found)) == await store.count()
        assert dict(found) == await store.get_many(user_id for user_id, _ in found)

    @needs("pandas")
    async def test_a_store_becomes_a_data_frame(self, open_store: Open) -> None:
        """to_dataframe has a row for each state of the history, or the latest, sorted by user and time."""
        store = await open_store()
        await store.upsert_many(PEOPLE)

        found = await store.to_dataframe()
        some = await store.to_dataframe(["bob", "nobody", "ann"], since=NOW, until=NOW + 5)

        expected = sorted(PEOPLE, key=lambda each: (each.user_id, each.updated_at_unix_ms))
        assert list(read_table(found)) == expected
        assert [each.user_id for each in read_table(some)] == ["ann", "bob"]
        bare = await open_store("bare", enable_history=False)
        await bare.upsert_many(PEOPLE)
        for user_ids in (None, ["ann", "bob", "cyd", "dee", "eve"]):
            assert list(read_table(await bare.to_dataframe(user_ids))) == LATEST_PEOPLE

    # Axes that are added

    @pytest.mark.parametrize("vector_size", [None, 5])
    async def test_axes_are_added(
        self, open_store: Open, case: Case, clock: Clock, vector_size: int | None
    ) -> None:
        """A store alone with its data gets more axes, with and without room for them; others refuse."""
        store = await open_store(axes=("warmth", "formality"), vector_size=vector_size)
        await store.upsert_many([state(f"user{at:02}", at, LIGHT) for at in range(80)])
        await store.upsert_many([state("ann", at, {"warmth": 0.9}) for at in range(3)])
        before = await content(store)
        if case.backend not in EMBEDDED:
            with pytest.raises(StoreError, match="copy"):
                await store.alter_axes(add=["calm"])
            assert store.axes == ("warmth", "formality")
            return

        assert await store.alter_axes(add=["calm", "hunger"]) == ("warmth", "formality", "calm", "hunger")

        assert store.axes == ("warmth", "formality", "calm", "hunger")
        assert await content(store) == before
        clock.now = NOW + 50
        new = await store.patch("bob", {"hunger": 1.0})
        found = await store.search_similar({"hunger": 0.9}, limit=2, score_threshold=0.5)
        assert [match.snapshot for match in found] == [new]
        assert (await store.search_similar({"warmth": 1.0}, limit=1))[0].snapshot.user_id == "ann"
        assert await store.alter_axes(add=[]) == store.axes

    @pytest.mark.parametrize("add", [["warmth"], ["calm", "calm"], ["Calm"], [5], "calm", None, 5])
    async def test_bad_axes_are_not_added(self, open_store: Open, case: Case, add: Any) -> None:
        """Names that are there, are none, or come twice are refused, and change nothing."""
        store = await open_store(axes=("warmth", "formality"))
        with pytest.raises(ValidationError if case.backend in EMBEDDED else StoreError):
            await store.alter_axes(add=add)
        assert await store.count() == 0  # a server is first asked now
        assert store.axes == ("warmth", "formality")

    async def test_many_users_are_read_at_once(self, store: AsyncStateStore) -> None:
        """get_many answers for those who are there, takes any iterable and ignores repetition."""
        await store.upsert_many([state("ann", 1), state("bob", 2), state("cyd", 3)])

        found = await store.get_many(iter(["bob", "nobody", "ann", "bob"]))

        assert found == {"ann": state("ann", 1), "bob": state("bob", 2)}

    async def test_many_states_are_written_at_once(self, store: AsyncStateStore) -> None:
        """upsert_many does what as many single writes do, and returns how many there were."""
        states = [state(f"user-{number % 500}", (number * 7919) % MANY) for number in range(MANY)]

        assert await store.upsert_many(states) == MANY

        assert await store.count() == 500
        assert await store.count(history=True) == MANY
        for user_id in ("user-0", "user-499"):
            mine = sorted((s for s in states if s.user_id == user_id), key=lambda s: -s.updated_at_unix_ms)
            assert await store.get_history(user_id) == mine
            assert await store.get_latest(user_id) == mine[0]

    async def test_users_are_listed_once_each(self, store: AsyncStateStore) -> None:
        """users() yields every user exactly once, however many pages that takes."""
        await store.upsert_many([state(f"user-{number}", at) for number in range(MANY) for at in (0, 1)])

        assert await users_of(store) == sorted(f"user-{number}" for number in range(MANY))

    async def test_of_one_batch_the_newest_and_the_later_win(self, store: AsyncStateStore) -> None:
        """Within one batch, too, the newest timestamp wins, and of equal ones the later."""
        first, second = state(at=5, axes={"warmth": 0.1}), state(at=5, axes={"warmth": 0.2})

        await store.upsert_many([state(at=9), first, state(at=1), second])

        assert await content(store) == {"ann": (state(at=9), [state(at=9), second, state(at=1)])}

    @pytest.mark.parametrize("empty", [[], (), iter(())], ids=["list", "tuple", "iterator"])
    async def test_writing_nothing_is_no_error(
        self, store: AsyncStateStore, empty: Iterable[StateSnapshot]
    ) -> None:
        """An empty batch writes nothing and says so."""
        assert await store.upsert_many(empty) == 0
        assert await content(store) == {}

    async def test_progress_of_a_list_is_reported_with_its_total(self, store: AsyncStateStore) -> None:
        """After each batch progress is told how many of how many are written."""
        calls: list[tuple[int, int | None]] = []

        await store.upsert_many(
            random_states(MANY, 1), progress=lambda done, total: calls.append((done, total))
        )

        done = [count for count, _ in calls]
        assert done == sorted(set(done))
        assert done[-1] == MANY
        assert {total for _, total in calls} == {MANY}

    async def test_progress_of_an_iterator_has_no_total(self, store: AsyncStateStore) -> None:
        """An iterator is consumed batch by batch, and its total is not known."""
        calls: list[tuple[int, int | None]] = []

        written = await store.upsert_many(
            iter(random_states(MANY, 1)), progress=lambda done, total: calls.append((done, total))
        )

        assert written == MANY
        assert calls[-1] == (MANY, None)
        assert {total for _, total in calls} == {None}

    @pytest.mark.parametrize("kind", [list, tuple])
    @pytest.mark.parametrize(
        "wrong", ["not a snapshot", state(axes={"unheard_of": 0.5})], ids=["string", "axis"]
    )
    async def test_a_list_is_checked_whole_before_anything_is_written(
        self, store: AsyncStateStore, kind: Callable[[list[Any]], Any], wrong: Any
    ) -> None:
        """One bad element at the end of a long list, and none of it is written."""
        await store.upsert_latest(state("bob"))

        async with unchanged(store):
            with pytest.raises(ValidationError) as caught:
                await store.upsert_many(kind([*random_states(MANY, 2), wrong]))

        assert not caught.value.written

    @pytest.mark.parametrize(
        "wrong", ["not a snapshot", state(axes={"unheard_of": 0.5})], ids=["string", "axis"]
    )
    async def test_an_iterator_with_a_bad_element_says_how_many_were_written(
        self, store: AsyncStateStore, wrong: Any
    ) -> None:
        """An iterator is written batch by batch: the error says how many were, the first ones."""
        states = random_states(MANY, 3)

        with pytest.raises(ValidationError) as caught:
            await store.upsert_many(iter([*states, wrong]))

        written = caught.value.written
        assert written is not None
        assert await content(store) == {s.user_id: (s, [s]) for s in states[:written]}

    async def test_an_error_of_the_iterator_itself_reaches_the_caller(self, store: AsyncStateStore) -> None:
        """What the caller's generator raises is raised, and earlier whole batches are kept."""

        def broken() -> Iterator[StateSnapshot]:
            yield from random_states(MANY, 4)
            raise RuntimeError("the line was cut")

        with pytest.raises(RuntimeError, match="the line was cut"):
            await store.upsert_many(broken())

        kept = await store.count()
        assert await users_of(store) == sorted(s.user_id for s in random_states(MANY, 4)[:kept])

    # History

    @pytest.mark.parametrize("maximum", [1, 2, 5])
    async def test_history_holds_the_newest_timestamps(self, open_store: Open, maximum: int) -> None:
        """History never holds more than max_history_per_user entries, whatever the order of arrival."""
        store = await open_store(max_history_per_user=maximum)
        for at in (3, 9, 1, 7, 5, 9, 3, 8):
            await store.upsert_latest(state(at=at))

        newest = [state(at=at) for at in (9, 8, 7, 5, 3)[:maximum]]
        assert await content(store) == {"ann": (state(at=9), newest)}

    async def test_an_arrival_older_than_a_full_history_is_dropped(self, open_store: Open) -> None:
        """A state older than a full history is acknowledged, and changes nothing."""
        store = await open_store(max_history_per_user=2)
        await store.upsert_many([state(at=10), state(at=20)])

        async with unchanged(store):
            await store.upsert_latest(state(at=5))
            await store.upsert_many([state(at=6), state(at=7)])

    async def test_replacing_an_entry_of_a_full_history_drops_no_other(self, open_store: Open) -> None:
        """An equal timestamp takes the place of its entry, so a full history loses nothing by it."""
        store = await open_store(max_history_per_user=2)
        await store.upsert_many([state(at=10), state(at=20)])

        await store.upsert_latest(state(at=10, axes={}))

        assert await store.get_history("ann") == [state(at=20), state(at=10, axes={})]

    async def test_history_holds_a_hundred_by_default(self, store: AsyncStateStore) -> None:
        """Without configuration, history is on, keeps 100 entries and knows no age."""
        await store.upsert_many([StateSnapshot("ann", {}, at) for at in range(101)])

        assert [s.updated_at_unix_ms for s in await store.get_history("ann", limit=1000)] == list(
            range(100, 0, -1)
        )
        assert await store.count(history=True) == 100

    async def test_a_limit_takes_the_newest(self, store: AsyncStateStore) -> None:
        """get_history answers at most `limit` entries, the newest first; with 0, none."""
        await store.upsert_many([state(at=at) for at in range(5)])

        assert await store.get_history("ann", 2) == [state(at=4), state(at=3)]
        assert await store.get_history("ann", limit=0) == []
        assert len(await store.get_history("ann", limit=10**9)) == 5

    async def test_history_is_read_between_two_moments(self, store: AsyncStateStore) -> None:
        """`since` and `until` are inclusive, each of them may be absent, and limit applies after them."""
        await store.upsert_many([state(at=at) for at in range(6)])

        async def read(**bounds: int) -> list[int]:
            return [s.updated_at_unix_ms - NOW for s in await store.get_history("ann", **bounds)]

        assert await read(since=NOW + 2, until=NOW + 4) == [4, 3, 2]
        assert await read(since=NOW + 4) == [5, 4]
        assert await read(until=NOW + 1) == [1, 0]
        assert await read(since=NOW + 3, until=NOW + 3) == [3]
        assert await read(since=NOW + 4, until=NOW + 3) == []
        assert await read(since=NOW + 1, until=NOW + 4, limit=2) == [4, 3]

    async def test_the_bound_on_history_comes_before_since_and_until(self, open_store: Open) -> None:
        """Asking for a time before the newest N entries finds nothing, removed already or not."""
        store = await open_store(max_history_per_user=3)
        await store.upsert_many([state(at=at) for at in range(6)])

        assert await store.get_history("ann", until=NOW + 2) == []
        assert await store.get_history("ann", since=NOW, until=NOW + 4) == [state(at=4), state(at=3)]

    @pytest.mark.parametrize(
        "off", [{"enable_history": False}, {"max_history_per_user": 0}], ids=["off", "zero"]
    )
    async def test_without_history_only_the_latest_is_kept(
        self, open_store: Open, off: dict[str, Any]
    ) -> None:
        """enable_history=False or a maximum of 0 keeps the latest alone; the newest timestamp still wins."""
        store = await open_store(**off)
        await store.upsert_many([state(at=10), state(at=20), state(at=15)])
        await store.upsert_latest(state(at=5))

        assert await content(store) == {"ann": (state(at=20), [])}
        assert await store.search_similar({"warmth": 1.0}, history=True) == []
        assert found_users(await store.search_similar({"warmth": 1.0})) == ["ann"]

    async def test_old_entries_of_history_are_not_read(self, open_store: Open, clock: Clock) -> None:
        """Entries older than history_retention_days are not read, removed or not; an exact age still is."""
        store = await open_store(history_retention_days=2)
        await store.upsert_many([state(at=-2 * DAY), state(at=-DAY), state(at=0)])
        assert len(await store.get_history("ann")) == 3

        clock.now = NOW + 1
        assert await store.get_history("ann") == [state(at=0), state(at=-DAY)]
        assert await store.count(history=True) == 2

        clock.now = NOW + DAY
        assert await store.get_history("ann") == [state(at=0), state(at=-DAY)]
        assert await store.get_history("ann", since=0, until=NOW - DAY) == [state(at=-DAY)]

    async def test_old_entries_of_history_are_not_found(self, open_store: Open, clock: Clock) -> None:
        """A search of history finds what get_history reads."""
        store = await open_store(history_retention_days=2)
        await store.upsert_many([state(at=-DAY), state(at=0)])
        clock.now = NOW + DAY + 1

        found = await store.search_similar({"warmth": 1.0}, history=True)

        assert [match.snapshot for match in found] == await store.get_history("ann") == [state(at=0)]

    async def test_the_latest_never_ages(self, open_store: Open, clock: Clock) -> None:
        """A latest state older than the retention is still the latest, and still found."""
        store = await open_store(history_retention_days=1)
        await store.upsert_latest(state())
        clock.now = NOW + 30 * DAY

        for _ in range(2):
            assert await content(store) == {"ann": (state(), [])}
            assert (await store.get_many(["ann"])) == {"ann": state()}
            assert found_users(await store.search_similar({"warmth": 1.0})) == ["ann"]
            await store.prune()

    async def test_an_old_state_can_still_be_written(self, open_store: Open, clock: Clock) -> None:
        """A state older than the retention can be the first of a user, and never replaces a newer one."""
        store = await open_store(history_retention_days=1)
        old = state(at=-10 * DAY)

        await store.upsert_latest(old)
        assert await content(store) == {"ann": (old, [])}

        await store.upsert_latest(state(at=-11 * DAY))
        assert await content(store) == {"ann": (old, [])}

        await store.upsert_latest(state())
        assert await content(store) == {"ann": (state(), [state()])}

    async def test_both_bounds_hold_together(self, open_store: Open, clock: Clock) -> None:
        """Of the newest N entries, those that are too old are left out."""
        store = await open_store(max_history_per_user=3, history_retention_days=1)
        await store.upsert_many([state(at=hours * HOUR) for hours in (-20, -15, -10, -5, 0)])

        assert len(await store.get_history("ann")) == 3
        clock.now = NOW + 15 * HOUR
        assert await store.get_history("ann") == [state(at=0), state(at=-5 * HOUR)]

    async def test_pruning_removes_what_is_too_old(self, open_store: Open, clock: Clock) -> None:
        """`prune` applies the retention, says how many snapshots it removed, and has nothing to do again."""
        store = await open_store(history_retention_days=10)
        await store.upsert_many([state(name, -days * DAY) for name in ("ann", "bob") for days in range(5)])
        clock.now = NOW + 7 * DAY

        assert await store.prune() == 2
        assert await store.prune() == 0

        kept = {name: [state(name, -days * DAY) for days in range(4)] for name in ("ann", "bob")}
        assert await content(store) == {name: (history[0], history) for name, history in kept.items()}

    async def test_pruning_without_an_age_removes_nothing(self, store: AsyncStateStore, clock: Clock) -> None:
        """By default nothing is too old."""
        await store.upsert_many([state(at=at) for at in range(5)])
        clock.now = NOW + 100_000 * DAY

        async with unchanged(store):
            assert await store.prune() == 0

    async def test_counts_are_of_users_and_of_readable_entries(self, open_store: Open) -> None:
        """count() is the number of users; with history=True, of all entries that get_history could return."""
        store = await open_store(max_history_per_user=2)
        await store.upsert_many([state("ann", at) for at in range(5)] + [state("bob")])

        assert await store.count() == 2
        assert await store.count(history=True) == 3

    # Conditional writes

    async def test_a_write_can_demand_that_nothing_changed(self, store: AsyncStateStore) -> None:
        """expected= the snapshot read before lets the write through only if it is still the latest."""
        await store.upsert_latest(state(at=1))
        seen = await store.get_latest("ann")
        assert seen is not None

        await store.upsert_latest(state(at=2), expected=seen)
        assert await store.get_latest("ann") == state(at=2)

        async with unchanged(store):
            with pytest.raises(ConflictError) as caught:
                await store.upsert_latest(state(at=3), expected=seen)
        assert caught.value.ambiguous is False

    async def test_a_write_can_demand_a_new_user(self, store: AsyncStateStore) -> None:
        """expected=None means that the user must not exist."""
        await store.upsert_latest(state(at=1), expected=None)
        assert await store.get_latest("ann") == state(at=1)

        async with unchanged(store):
            with pytest.raises(ConflictError):
                await store.upsert_latest(state(at=2), expected=None)

    async def test_a_write_can_demand_an_existing_user(self, store: AsyncStateStore) -> None:
        """A snapshot expected of a user who is gone is a conflict, and recreates nothing."""
        await store.upsert_latest(state(at=1))
        await store.delete("ann")

        async with unchanged(store):
            with pytest.raises(ConflictError):
                await store.upsert_latest(state(at=2), expected=state(at=1))

    async def test_what_is_expected_is_compared_by_value(self, store: AsyncStateStore) -> None:
        """The same timestamp with another field is not what was expected."""
        await store.upsert_latest(state(confidence=0.5))

        async with unchanged(store):
            with pytest.raises(ConflictError):
                await store.upsert_latest(state(at=1), expected=state(confidence=0.25))
            with pytest.raises(ConflictError):
                await store.upsert_latest(state(at=1), expected=state(confidence=0.5, axes={}))
        await store.upsert_latest(state(at=1), expected=state(confidence=0.5))
        assert await store.get_latest("ann") == state(at=1)

    async def test_an_older_conflicting_write_leaves_history_alone(self, store: AsyncStateStore) -> None:
        """A refused write leaves no entry in history."""
        await store.upsert_latest(state(at=10))

        async with unchanged(store):
            with pytest.raises(ConflictError):
                await store.upsert_latest(state(at=5), expected=state(at=9))

    async def test_an_older_write_whose_condition_holds_goes_into_history(
        self, store: AsyncStateStore
    ) -> None:
        """A condition says what must be there; the newest timestamp still wins."""
        await store.upsert_latest(state(at=10))

        await store.upsert_latest(state(at=5), expected=state(at=10))

        assert await content(store) == {"ann": (state(at=10), [state(at=10), state(at=5)])}

    # Updating

    async def test_an_update_gets_the_latest_and_returns_the_new_one(self, store: AsyncStateStore) -> None:
        """`update` reads, calls the function, writes its answer and returns it."""
        await store.upsert_latest(state(axes={"warmth": 0.25}))
        seen: list[StateSnapshot | None] = []

        def warmer(latest: StateSnapshot | None) -> StateSnapshot | None:
            seen.append(latest)
            return latest and latest.patched(
                {"warmth": latest.axis("warmth") + 0.25}, updated_at_unix_ms=NOW + 1
            )

        returned = await store.update("ann", warmer)

        new = state(at=1, axes={"warmth": 0.5})
        assert seen == [state(axes={"warmth": 0.25})]
        assert returned == new
        assert await content(store) == {"ann": (new, [new, state(axes={"warmth": 0.25})])}

    async def test_an_update_of_an_unknown_user_gets_none(self, store: AsyncStateStore) -> None:
        """The function is called with None for a user who is not there, and may create one."""
        seen: list[StateSnapshot | None] = []

        assert await store.update("ann", seen.append) is None
        assert await content(store) == {}

        assert await store.update("ann", lambda latest: state()) == state()
        assert await content(store) == {"ann": (state(), [state()])}
        assert seen == [None]

    async def test_an_update_that_answers_none_leaves_things_as_they_are(
        self, store: AsyncStateStore
    ) -> None:
        """With None nothing is written, and the latest is returned."""
        await store.upsert_latest(state())

        async with unchanged(store):
            assert await store.update("ann", lambda latest: None) == state()

    async def test_the_function_of_an_update_may_use_the_store(self, store: AsyncStateStore) -> None:
        """No lock is held while the function runs: it can read and write the same store."""
        await store.upsert_many([state("ann", 1), state("bob", 2)])

        async def copy_of_bob(latest: StateSnapshot | None) -> StateSnapshot:
            bob = await store.get_latest("bob")
            assert bob is not None
            await store.upsert_latest(state("log", 3))
            return state("ann", 5, bob.axes)

        assert await store.update("ann", callback(store, copy_of_bob)) == state(
            "ann", 5, state("bob", 2).axes
        )
        assert await users_of(store) == ["ann", "bob", "log"]

    async def test_an_update_that_lost_a_race_is_tried_again(self, store: AsyncStateStore) -> None:
        """When another write comes between, the function runs again with what that one left."""
        await store.upsert_latest(state(at=1))
        seen: list[StateSnapshot | None] = []

        async def interrupted(latest: StateSnapshot | None) -> StateSnapshot:
            seen.append(latest)
            if len(seen) == 1:
                await store.upsert_latest(state(at=2))
            elif len(seen) == 2:
                await store.delete("ann")
            return state(at=9)

        assert await store.update("ann", callback(store, interrupted)) == state(at=9)
        assert seen == [state(at=1), state(at=2), None]
        assert await content(store) == {"ann": (state(at=9), [state(at=9)])}

    async def test_an_update_gives_up_after_its_attempts(self, store: AsyncStateStore) -> None:
        """An update that loses every race raises ConflictError after `attempts` calls, and writes nothing."""
        calls = 0

        async def always_late(latest: StateSnapshot | None) -> StateSnapshot:
            nonlocal calls
            calls += 1
            await store.upsert_latest(state(at=calls))
            return state(at=100 + calls)

        with pytest.raises(ConflictError):
            await store.update("ann", callback(store, always_late), attempts=3)

        assert calls == 3
        assert await store.get_history("ann") == [state(at=at) for at in (3, 2, 1)]

    async def test_what_an_update_may_not_answer(self, store: AsyncStateStore) -> None:
        """The answer must be a snapshot of the same user, newer than before, with axes the store has."""
        await store.upsert_many([state("ann", 10), state("bob", 0)])
        answers: dict[str, Any] = {
            "another user": state("bob", 20),
            "an older state": state("ann", 5),
            "a state of the same age": state("ann", 10, {}),
            "the state as it was": state("ann", 10),
            "an unknown axis": state("ann", 20, {"unheard_of": 0.5}),
            "a dict": state("ann", 20).to_dict(),
        }

        def answering(answer: Any) -> Callable[[StateSnapshot | None], Any]:
            return lambda latest: answer

        await refused(
            store, {what: partial(store.update, "ann", answering(a)) for what, a in answers.items()}
        )
        await refused(store, {"another new user": partial(store.update, "new", answering(state("newer")))})

    async def test_an_error_in_the_function_of_an_update_reaches_the_caller(
        self, store: AsyncStateStore
    ) -> None:
        """What the function raises is raised, and nothing is written."""
        await store.upsert_latest(state())

        async with unchanged(store):
            with pytest.raises(ZeroDivisionError):
                await store.update("ann", lambda latest: 1 // 0)  # type: ignore[arg-type,return-value]

    async def test_updates_at_the_same_time_all_count(self, store: AsyncStateStore) -> None:
        """Read-modify-write loses nothing, whatever the number of threads or tasks."""
        jobs, rounds = 8, 10

        async def count_up() -> None:
            for _ in range(rounds):
                await store.update("ann", one_more, attempts=1000)

        def one_more(latest: StateSnapshot | None) -> StateSnapshot:
            return latest.patched({}, schema_version=latest.schema_version + 1) if latest else state()

        await together(store, [count_up] * jobs)

        latest = await store.get_latest("ann")
        assert latest is not None
        assert latest.schema_version == jobs * rounds
        assert len(await store.get_history("ann")) == jobs * rounds

    async def test_writes_at_the_same_time_are_all_kept(self, store: AsyncStateStore) -> None:
        """Acknowledged writes of several threads or tasks are all there, and latest and history agree."""
        jobs, rounds = 8, 25

        def job(number: int) -> Callable[[], Coroutine[Any, Any, None]]:
            async def write() -> None:
                for at in range(rounds):
                    await store.upsert_latest(state("shared", at * jobs + number))
                    await store.upsert_latest(state(f"own-{number}", at))
                    history = await store.get_history("shared", 1)
                    latest = await store.get_latest("shared")
                    assert latest is not None
                    assert history[0].updated_at_unix_ms <= latest.updated_at_unix_ms

            return write

        await together(store, [job(number) for number in range(jobs)])

        found = await content(store)
        assert len(found) == jobs + 1
        assert found["shared"][1] == [
            state("shared", at) for at in range(jobs * rounds - 1, jobs * rounds - 101, -1)
        ]
        for number in range(jobs):
            assert found[f"own-{number}"][1] == [state(f"own-{number}", at) for at in reversed(range(rounds))]

    # Patching

    async def test_a_patch_merges_axes_into_the_latest(self, store: AsyncStateStore, clock: Clock) -> None:
        """`patch` changes the axes it names, keeps all else, and returns the new snapshot."""
        await store.upsert_latest(
            state(axes={"warmth": 0.2, "formality": 0.3}, source="inferred", confidence=0.5)
        )
        clock.now = NOW + 50

        new = await store.patch("ann", {"warmth": 0.9, "anxiety_level": 0.1})

        axes = {"warmth": 0.9, "formality": 0.3, "anxiety_level": 0.1}
        assert new == state(at=50, axes=axes, source="inferred", confidence=0.5)
        assert await store.get_latest("ann") == new
        assert len(await store.get_history("ann")) == 2

    async def test_a_patch_sets_fields(self, store: AsyncStateStore, clock: Clock) -> None:
        """Fields given to patch are set with the axes."""
        await store.upsert_latest(state(axes={"warmth": 0.2}))

        new = await store.patch("ann", {}, source="mixed", confidence=0.25, updated_at_unix_ms=NOW + 7)

        assert new == state(at=7, axes={"warmth": 0.2}, source="mixed", confidence=0.25)
        assert await store.get_latest("ann") == new

    async def test_a_patch_removes_axes(self, store: AsyncStateStore, clock: Clock) -> None:
        """An axis that is patched with None is gone, also where there was none; an unknown one is refused."""
        await store.upsert_latest(state(axes={"warmth": 0.2, "formality": 0.3}))
        clock.now = NOW + 50

        new = await store.patch("ann", {"warmth": None, "anxiety_level": None, "formality": 0.5})

        assert new == state(at=50, axes={"formality": 0.5})
        assert await store.get_latest("ann") == new
        async with unchanged(store):
            for name, message in (("unheard_of", "unheard_of"), ("warmht", "did you mean 'warmth'")):
                with pytest.raises(ValidationError, match=message):
                    await store.patch("ann", {name: None})

    async def test_a_patch_creates_a_user(self, store: AsyncStateStore, clock: Clock) -> None:
        """A patch of an unknown user is its first state."""
        new = await store.patch("ann", {"warmth": 0.9}, confidence=0.5)

        assert new == state(axes={"warmth": 0.9}, confidence=0.5)
        assert await content(store) == {"ann": (new, [new])}

    async def test_a_patch_always_becomes_the_latest(self, store: AsyncStateStore, clock: Clock) -> None:
        """A patch is newer than what it patches, even where that is in the future."""
        await store.upsert_latest(state(at=DAY))

        first = await store.patch("ann", {"warmth": 0.1})
        second = await store.patch("ann", {"warmth": 0.2})

        assert [first.updated_at_unix_ms, second.updated_at_unix_ms] == [NOW + DAY + 1, NOW + DAY + 2]
        assert await store.get_latest("ann") == second
        assert len(await store.get_history("ann")) == 3

    async def test_a_patch_with_an_older_timestamp_is_refused(self, store: AsyncStateStore) -> None:
        """A patch must become the latest: an explicit timestamp that is not newer is an error."""
        await store.upsert_latest(state(at=10))

        await refused(
            store,
            {
                "older": partial(store.patch, "ann", {"warmth": 0.1}, updated_at_unix_ms=NOW),
                "equal": partial(store.patch, "ann", {"warmth": 0.1}, updated_at_unix_ms=NOW + 10),
            },
        )

    async def test_a_patch_of_the_last_millisecond_is_refused(self, store: AsyncStateStore) -> None:
        """There is no later moment than the end of the year 9999."""
        await store.upsert_latest(StateSnapshot("ann", {}, LAST_MS))

        await refused(store, {"later than the last": partial(store.patch, "ann", {"warmth": 0.1})})

    # Searching

    async def test_scores_are_cosines_of_centred_axes(self, store: AsyncStateStore) -> None:
        """A score is the cosine of the axes minus 0.5, within 1e-5, and the best match comes first."""
        states = random_states(300, seed=20260117)
        await store.upsert_many(states)

        for query in states[:5]:
            found = await store.search_similar(query, limit=1000)
            check_scores(found, query.axes)
            assert sorted(found_users(found)) == sorted(s.user_id for s in states)

            best = sorted((cosine(query.axes, s.axes) for s in states), reverse=True)[:20]
            scores = [match.score for match in await store.search_similar(query, limit=20)]
            assert scores == pytest.approx(best, abs=1e-5)

    async def test_scores_span_minus_one_to_one(self, store: AsyncStateStore) -> None:
        """The same direction scores 1, the opposite -1, and an unrelated one 0."""
        await store.upsert_many(
            [
                state("same", axes={"warmth": 0.7, "formality": 0.4}),
                state("opposite", axes={"warmth": 0.3, "formality": 0.6}),
                state("unrelated", axes={"urgency_sensitivity": 1.0}),
            ]
        )

        found = await store.search_similar({"warmth": 0.9, "formality": 0.3})

        assert found_users(found) == ["same", "unrelated", "opposite"]
        assert [match.score for match in found] == pytest.approx([1, 0, -1], abs=1e-5)

    @pytest.mark.parametrize("distance", [1e-3, 1e-4, 1e-6, 1e-9, 1e-15])
    async def test_a_state_close_to_neutral_is_compared_by_direction(
        self, store: AsyncStateStore, distance: float
    ) -> None:
        """However close to neutral a state is, its score is that of its direction."""
        slight = {"warmth": 0.5 + distance, "formality": 0.5 - distance}
        await store.upsert_many(
            [state("slight", axes=slight), state("strong", axes={"warmth": 1, "formality": 0})]
        )

        for query in (slight, {"warmth": 0.9}):
            found = await store.search_similar(query)
            assert sorted(found_users(found)) == ["slight", "strong"]
            check_scores(found, query)

    async def test_a_neutral_state_scores_zero(self, open_store: Open) -> None:
        """A state with every axis at 0.5, or with none, has no direction: it is found with a score of 0."""
        store = await open_store(axes=("warmth", "calm"))
        await store.upsert_many([state("none", axes={}), state("half", axes={"warmth": 0.5})])

        for query in ({"warmth": 0.9}, {"warmth": 0.1, "calm": 0.1}):
            found = await store.search_similar(query)
            assert sorted(found_users(found)) == ["half", "none"]
            assert [str(match.score) for match in found] == ["0.0", "0.0"]  # and not -0.0

    async def test_a_neutral_query_scores_zero(self, store: AsyncStateStore) -> None:
        """A query without a direction finds everybody, with a score of 0."""
        await store.upsert_many(PEOPLE)

        for query in ({}, {"warmth": 0.5}):
            found = await store.search_similar(query)
            assert sorted(found_users(found)) == ["ann", "bob", "cyd", "dee", "eve"]
            assert [match.score for match in found] == [0] * 5
            assert len(await store.search_similar(query, limit=2)) == 2

    async def test_a_match_holds_the_whole_latest_snapshot(self, store: AsyncStateStore) -> None:
        """A search finds each user's latest state, whole, and each user once."""
        await store.upsert_many(PEOPLE)

        found = await store.search_similar(QUERY)

        assert sorted(found_users(found)) == ["ann", "bob", "cyd", "dee", "eve"]
        assert {match.snapshot for match in found} == set(LATEST_PEOPLE)

    @pytest.mark.parametrize("history", [False, True], ids=["latest", "history"])
    async def test_every_filter_narrows_a_search(self, store: AsyncStateStore, history: bool) -> None:
        """Filters by user, source, confidence, time and score narrow a search of either kind."""
        await store.upsert_many(PEOPLE)

        for what, (filters, accepted) in FILTERS.items():
            found = await store.search_similar(QUERY, limit=100, history=history, **filters)
            expected = [s for s in (PEOPLE if history else LATEST_PEOPLE) if accepted(s)]
            assert sorted(m.snapshot.updated_at_unix_ms for m in found) == [
                s.updated_at_unix_ms for s in expected
            ], what
            assert {match.snapshot for match in found} == set(expected), what
            check_scores(found, QUERY)

    async def test_a_search_of_history_finds_every_entry_once(self, store: AsyncStateStore) -> None:
        """With history=True the entries of history are searched, the current latest among them only once."""
        states = [state("ann", at, {"warmth": at / 10}) for at in range(10)]
        await store.upsert_many(states)

        found = await store.search_similar({"warmth": 1.0}, limit=100, history=True)

        assert len(found) == 10
        assert {match.snapshot for match in found} == set(states)
        check_scores(found, {"warmth": 1.0})

    async def test_a_search_of_history_is_bounded_as_history_is(self, open_store: Open) -> None:
        """What get_history no longer reads is not found either."""
        store = await open_store(max_history_per_user=2)
        await store.upsert_many([state(at=at) for at in (1, 2, 3, 4)])

        found = await store.search_similar({"warmth": 1.0}, history=True)

        assert {match.snapshot for match in found} == {state(at=4), state(at=3)}

    async def test_a_query_is_a_snapshot_a_mapping_or_a_user(self, store: AsyncStateStore) -> None:
        """A snapshot, its axes and its user id ask the same; the user asked about is left out."""
        await store.upsert_many(PEOPLE)
        ann = PEOPLE[1]

        by_snapshot = await store.search_similar(ann)
        by_mapping = await store.search_similar(dict(ann.axes))
        by_user = await store.search_similar("ann")

        assert by_snapshot == by_mapping
        assert by_snapshot[0].snapshot == ann
        assert found_users(by_user) == found_users(by_snapshot)[1:]
        check_scores(by_user, ann.axes)

    async def test_the_user_asked_about_can_be_asked_for(self, store: AsyncStateStore) -> None:
        """With exclude_user_id="" the user asked about is found as well, and best."""
        await store.upsert_many(PEOPLE)

        assert found_users(await store.search_similar("ann", exclude_user_id=""))[0] == "ann"
        assert "ann" not in found_users(await store.search_similar("ann", history=True))
        assert "ann" in found_users(await store.search_similar("ann", history=True, exclude_user_id=""))
        assert len(await store.search_similar("ann", limit=4)) == 4

    async def test_a_search_like_an_unknown_user_is_an_error(self, store: AsyncStateStore) -> None:
        """Asking for those like somebody unknown raises UserNotFoundError, which is a readable KeyError."""
        await store.upsert_many(PEOPLE)

        with pytest.raises(UserNotFoundError) as caught:
            await store.search_similar("nobody")

        assert isinstance(caught.value, KeyError)
        assert not str(caught.value).startswith(("'", '"'))

    async def test_a_search_finds_ten_unless_told_otherwise(self, store: AsyncStateStore) -> None:
        """The default limit is 10."""
        await store.upsert_many(random_states(12, 5))

        assert len(await store.search_similar({"warmth": 1.0})) == 10
        assert len(await store.search_similar({"warmth": 1.0}, limit=1)) == 1
        assert len(await store.search_similar({"warmth": 1.0}, limit=10**6)) == 12

    async def test_a_threshold_is_a_lower_bound(self, store: AsyncStateStore) -> None:
        """Matches below score_threshold are left out; -1 keeps all, and above 1 there are none."""
        await store.upsert_many(PEOPLE)

        assert len(await store.search_similar(QUERY, score_threshold=-1.01)) == 5
        assert await store.search_similar(QUERY, score_threshold=1.01) == []
        assert "dee" in found_users(await store.search_similar(QUERY, score_threshold=0))

    async def test_a_search_for_all_finds_all(self, store: AsyncStateStore) -> None:
        """More matches than one piece of a search holds are found too: all of them, the best first."""
        newest, older = random_states(MANY, 17), random_states(MANY, 18)
        await store.upsert_many(newest)
        await store.upsert_many(state(each.user_id, -1, each.axes) for each in older)

        found = await store.search_similar(QUERY, limit=10_000)
        assert sorted(found_users(found)) == sorted(each.user_id for each in newest)
        check_scores(found, QUERY)
        entire = await store.search_similar(QUERY, limit=10_000, history=True)
        assert len(entire) == len({match.snapshot for match in entire}) == 2 * MANY
        check_scores(entire, QUERY)

        for history, all_of_them in ((False, found), (True, entire)):
            least = (all_of_them[400].score + all_of_them[401].score) / 2
            for options in ({"limit": 401}, {"limit": 10_000, "score_threshold": least}):
                best = await store.search_similar(QUERY, history=history, **cast("Any", options))
                assert [match.score for match in best] == pytest.approx(
                    [match.score for match in all_of_them[:401]], abs=1e-5
                )

    async def test_a_search_sees_what_was_written_before_it(self, store: AsyncStateStore) -> None:
        """A search after a write, a patch or a delete answers from what is there now."""
        await store.upsert_many([state("ann", axes={"warmth": 0.9}), state("bob", axes={"warmth": 0.1})])
        assert found_users(await store.search_similar({"warmth": 1.0})) == ["ann", "bob"]

        await store.patch("bob", {"warmth": 1.0})
        await store.upsert_latest(state("ann", 1, {"warmth": 0.0}))
        await store.upsert_latest(state("ann", -1, {"warmth": 1.0}))
        assert found_users(await store.search_similar({"warmth": 1.0})) == ["bob", "ann"]

        await store.delete("bob")
        await store.upsert_latest(state("cyd", axes={"formality": 1.0}))
        found = await store.search_similar({"warmth": 1.0})
        assert found_users(found) == ["cyd", "ann"]
        check_scores(found, {"warmth": 1.0})

    async def test_searching_again_and_again_gives_the_same(self, store: AsyncStateStore) -> None:
        """Searches between writes of many users agree with a plain computation."""
        states = random_states(200, 6)
        for start in range(0, 200, 40):
            await store.upsert_many(states[start : start + 40])
            await store.delete(states[start].user_id)
            found = await store.search_similar(QUERY, limit=1000)
            assert len(found) == start + 40 - (start // 40 + 1)
            check_scores(found, QUERY)

    # Bad input changes nothing

    async def test_bad_user_ids_are_refused_by_writes(self, store: AsyncStateStore) -> None:
        """A user id that no snapshot may have is ValidationError, and changes nothing."""
        await store.upsert_many([state(), state("bob")])

        for what, user_id in BAD_USER_IDS.items():
            await refused(
                store,
                {
                    f"patch of {what}": partial(store.patch, cast("Any", user_id), {"warmth": 0.1}),
                    f"update of {what}": partial(store.update, cast("Any", user_id), lambda latest: None),
                    f"delete of {what}": partial(store.delete, cast("Any", user_id)),
                },
            )

    async def test_bad_user_ids_are_refused_by_reads(self, store: AsyncStateStore) -> None:
        """A user id that no snapshot may have is an error to ask for, too."""
        await store.upsert_latest(state())

        for what, user_id in BAD_USER_IDS.items():
            await refused(
                store,
                {
                    f"get_latest of {what}": partial(store.get_latest, cast("Any", user_id)),
                    f"get_history of {what}": partial(store.get_history, cast("Any", user_id)),
                    f"get_many of {what}": partial(store.get_many, cast("Any", ["ann", user_id])),
                    f"search like {what}": partial(store.search_similar, cast("Any", user_id)),
                },
            )

    async def test_bad_axes_are_refused(self, store: AsyncStateStore) -> None:
        """Wrong, unknown or impossible axes are refused by a patch and by a search, and change nothing."""
        await store.upsert_latest(state())

        for what, axes in BAD_AXES.items():
            calls = {f"search with {what}": partial(store.search_similar, cast("Any", axes))}
            if what != "None as a value":  # which removes an axis
                calls[f"patch with {what}"] = partial(store.patch, "ann", cast("Any", axes))
                calls[f"patch of a new user with {what}"] = partial(store.patch, "new", cast("Any", axes))
            await refused(store, calls)

    async def test_bad_fields_are_refused_by_a_patch(self, store: AsyncStateStore) -> None:
        """Wrong fields in a patch are refused, and change nothing."""
        await store.upsert_latest(state())
        fields: list[dict[str, Any]] = [
            {"confidence": 2},
            {"confidence": math.nan},
            {"source": "guess"},
            {"schema_version": 0},
            {"updated_at_unix_ms": -1},
            {"updated_at_unix_ms": LAST_MS + 1},
            {"updated_at_unix_ms": "now"},
        ]

        await refused(
            store,
            {
                f"{wrong} of {who}": partial(store.patch, who, {}, **wrong)
                for wrong in fields
                for who in ("ann", "new")
            },
        )
        await refused(
            store,
            {"a field that does not exist": partial(cast("Any", store).patch, "ann", {}, colour="red")},
            (ValidationError, TypeError),
        )

    async def test_what_is_not_a_snapshot_is_refused(self, store: AsyncStateStore) -> None:
        """Only snapshots with axes that the store has are written."""
        await store.upsert_latest(state())
        wrong: dict[str, Any] = {
            "a dict": state("bob").to_dict(),
            "None": None,
            "a string": "ann",
            "an unknown axis": state("bob", axes={"unheard_of": 0.5}),
            "an unknown axis of a known user": state("ann", 5, {"unheard_of": 0.5}),
        }

        await refused(store, {what: partial(store.upsert_latest, thing) for what, thing in wrong.items()})
        await refused(
            store, {what: partial(store.upsert_many, [state("new"), thing]) for what, thing in wrong.items()}
        )
        await refused(
            store, {"a number": partial(store.upsert_many, cast("Any", 5))}, (ValidationError, TypeError)
        )
        expectations: list[Any] = ["anything", 5, {}]
        await refused(
            store,
            {
                repr(thing): partial(store.upsert_latest, state(at=5), expected=thing)
                for thing in expectations
            },
        )

    async def test_bad_bounds_of_history_are_refused(self, store: AsyncStateStore) -> None:
        """A negative or wrong limit, and moments that are not milliseconds, are ValidationError."""
        await store.upsert_latest(state())
        limits = {what: wrong for what, wrong in BAD_FILTERS.items() if wrong.get("limit")}

        for what, wrong in {**limits, **BAD_BOUNDS}.items():
            await refused(store, {what: partial(store.get_history, "ann", **wrong)})

    async def test_bad_filters_of_a_search_are_refused(self, store: AsyncStateStore) -> None:
        """A search without a positive limit, or with a wrong filter, is ValidationError."""
        await store.upsert_many(PEOPLE)

        for what, wrong in BAD_FILTERS.items():
            for query in (QUERY, "ann"):
                await refused(store, {what: partial(store.search_similar, query, **wrong)})

    async def test_a_query_of_another_kind_is_refused(self, store: AsyncStateStore) -> None:
        """A query is a snapshot, a mapping of known axes or a user id."""
        await store.upsert_many(PEOPLE)
        queries: list[Any] = [None, 5, b"ann", ["warmth"], state(axes={"unheard_of": 0.5})]

        await refused(store, {repr(query): partial(store.search_similar, query) for query in queries})

    async def test_an_update_needs_an_attempt(self, store: AsyncStateStore) -> None:
        """`attempts` must be at least 1."""
        await refused(store, {"0": partial(store.update, "ann", lambda latest: state(), attempts=0)})

    # Values

    async def test_results_share_nothing_with_the_store(self, store: AsyncStateStore) -> None:
        """Changing a list or a dict that was returned changes nothing in the store."""
        await store.upsert_many([state(at=1), state(at=2)])

        async with unchanged(store):
            (await store.get_history("ann")).clear()
            (await store.get_many(["ann"])).clear()
            (await store.search_similar({"warmth": 1.0})).clear()
            latest = await store.get_latest("ann")
            assert latest is not None
            with pytest.raises(TypeError):
                latest.axes["warmth"] = 0.0  # type: ignore[index]
            with pytest.raises(AttributeError):
                latest.confidence = 0.0  # type: ignore[misc]

    async def test_the_caller_keeps_what_it_passed_in(self, store: AsyncStateStore) -> None:
        """Changing a dict or a list after it was passed in changes nothing in the store."""
        axes = {"warmth": 0.25}
        states = [state(axes=axes)]
        await store.upsert_many(states)
        await store.patch("bob", axes, updated_at_unix_ms=NOW)

        async with unchanged(store):
            axes["warmth"] = 0.75
            states.clear()

    async def test_what_was_read_is_not_changed_by_later_writes(self, store: AsyncStateStore) -> None:
        """A list, a dict and a snapshot that were read stay as they were."""
        await store.upsert_latest(state(at=1))
        history = await store.get_history("ann")
        many = await store.get_many(["ann"])
        latest = await store.get_latest("ann")
        found = await store.search_similar({"warmth": 1.0}, history=True)

        await store.upsert_latest(state(at=1, axes={}))
        await store.upsert_latest(state(at=2))
        await store.delete("ann")

        assert history == [state(at=1)] == [match.snapshot for match in found]
        assert many == {"ann": state(at=1)}
        assert latest == state(at=1)

    # Axes

    async def test_a_store_has_the_canonical_axes(self, store: AsyncStateStore) -> None:
        """Without configuration a store has the 23 canonical axes, in their order, once it is open."""
        assert await store.count() == 0
        assert store.axes == CANONICAL_AXES
        assert len(CANONICAL_AXES) == 23

    async def test_a_store_can_have_other_axes(self, open_store: Open) -> None:
        """A store opened with its own axes takes these and no others."""
        store = await open_store(axes=("energetic_arousal", "tense_arousal"))
        mine = state("ann", axes={"energetic_arousal": 0.9, "tense_arousal": 0.1})
        other = state("bob", axes={"energetic_arousal": 0.1, "tense_arousal": 0.9})
        await store.upsert_many([mine, other])

        assert store.axes == ("energetic_arousal", "tense_arousal")
        assert await content(store) == {"ann": (mine, [mine]), "bob": (other, [other])}
        assert found_users(await store.search_similar({"energetic_arousal": 1.0})) == ["ann", "bob"]
        await refused(
            store,
            {
                "write": partial(store.upsert_latest, state("cyd", axes={"warmth": 0.5})),
                "patch": partial(store.patch, "ann", {"warmth": 0.5}),
                "search": partial(store.search_similar, {"warmth": 0.5}),
                "search by snapshot": partial(store.search_similar, state(axes={"warmth": 0.5})),
            },
        )

    async def test_a_store_can_have_room_for_more_axes(self, open_store: Open) -> None:
        """vector_size leaves spare dimensions, which change no score."""
        store = await open_store(axes=("energetic_arousal", "tense_arousal"), vector_size=8)
        await store.upsert_many(
            [state("ann", axes={"energetic_arousal": 0.9}), state("bob", axes={"tense_arousal": 0.9})]
        )

        found = await store.search_similar({"energetic_arousal": 0.75, "tense_arousal": 0.5})

        assert found_users(found) == ["ann", "bob"]
        check_scores(found, {"energetic_arousal": 0.75})

    async def test_bad_options_are_refused(self, open_store: Open) -> None:
        """Options that make no sense are ValidationError when the store is made."""
        options: list[dict[str, Any]] = [
            {"axes": ("warmth", "warmth")},
            {"axes": ("Warmth",)},
            {"axes": ("warmth", 5)},
            {"axes": ("warmth", "formality"), "vector_size": 1},
            {"max_history_per_user": -1},
            {"max_history_per_user": "many"},
            {"max_history_per_user": 1.5},
            {"history_retention_days": -1},
            {"history_retention_days": "a week"},
            {"history_retention_days": math.nan},
        ]
        for wrong in options:
            with pytest.raises(ValidationError):
                await open_store(**wrong)
        with pytest.raises((TypeError, ValidationError)):
            await open_store(colour="red")

    async def test_a_store_shows_its_configuration(self, open_store: Open) -> None:
        """store.config holds what the store was made with."""
        store = await open_store(max_history_per_user=7, history_retention_days=3)

        config = cast("Any", store).config
        assert config.max_history_per_user == 7
        assert config.history_retention_days == 3
        assert config.enable_history is True

    # Health and closing

    async def test_a_store_is_healthy(self, store: AsyncStateStore, case: Case) -> None:
        """health() names the backend and counts the users."""
        await store.upsert_many([state("ann", 1), state("ann", 2), state("bob")])

        health = await store.health()

        assert health.status == "healthy"
        assert health.backend == case.backend.replace("real", "server")
        assert health.users == 2

    async def test_a_closed_store_answers_nothing(self, store: AsyncStateStore) -> None:
        """After close every call raises StoreClosedError, save close itself and health."""
        await store.upsert_latest(state())
        await store.aclose()

        assert store.is_closed
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "upsert_latest": partial(store.upsert_latest, state(at=1)),
            "upsert_many": partial(store.upsert_many, [state(at=1)]),
            "upsert_many of nothing": partial(store.upsert_many, []),
            "patch": partial(store.patch, "ann", {"warmth": 0.1}),
            "update": partial(store.update, "ann", lambda latest: None),
            "get_latest": partial(store.get_latest, "ann"),
            "get_many": partial(store.get_many, ["ann"]),
            "get_many of nobody": partial(store.get_many, []),
            "get_history": partial(store.get_history, "ann"),
            "search_similar": partial(store.search_similar, {"warmth": 1.0}),
            "users": partial(users_of, store),
            "items": partial(items_of, store),
            "to_dataframe": partial(store.to_dataframe),
            "alter_axes": partial(store.alter_axes, add=["calm"]),
            "count": partial(store.count),
            "delete": partial(store.delete, "ann"),
            "prune": partial(store.prune),
        }
        for what, call in calls.items():
            closed = False
            try:
                await call()
            except StoreClosedError:
                closed = True
            assert closed, f"{what} answered"

    async def test_a_closed_store_is_not_entered_again(self, store: AsyncStateStore) -> None:
        """Entering a closed store is an error that says what to do instead."""
        await store.aclose()

        enter: Any = store.__aenter__ if isinstance(store, AsyncStateStore) else store.__enter__
        with pytest.raises(StoreClosedError, match="open_store"):
            await enter()

    async def test_a_store_is_not_pickled(self, store: AsyncStateStore) -> None:
        """Pickling or copying a store is an error that says what to do instead."""
        bare = store.store if isinstance(store, Awaited) else store
        for attempt in (pickle.dumps, clone, deepcopy):
            with pytest.raises(TypeError, match="open a store there"):
                attempt(bare)

    async def test_closing_twice_is_no_error(self, store: AsyncStateStore) -> None:
        """`close` is idempotent, and a closed store reports that it is unhealthy."""
        assert not store.is_closed

        await store.aclose()
        await store.aclose()

        assert store.is_closed
        assert (await store.health()).status == "unhealthy"

    async def test_a_store_shows_itself_in_a_notebook(self, store: AsyncStateStore) -> None:
        """The HTML of a store is short and names no user."""
        await store.upsert_latest(state("somebody@example.org"))

        html = (store.store if isinstance(store, Awaited) else store)._repr_html_()

        assert html.lstrip().startswith("<")
        assert len(html) < 5_000
        assert "someb" not in html


@pytest.mark.anyio
class AsyncStoreTests:
    """What only an asynchronous store does."""

    backends: ClassVar[tuple[str, ...]] = ()
    faces: ClassVar[tuple[str, ...]] = ("asyncio", "trio")

    async def test_a_store_is_used_in_async_with(self, case: Case, tmp_path: Path) -> None:
        """`async with` opens the store and closes it in the end."""
        async with BACKENDS[case.backend].asynchronous(tmp_path / "store") as store:
            await store.upsert_latest(state())
            assert not store.is_closed

        assert store.is_closed

    async def test_a_store_opens_at_the_first_await(self, case: Case, tmp_path: Path) -> None:
        """Without `async with` a store opens when it is first used."""
        store = BACKENDS[case.backend].asynchronous(tmp_path / "store")
        try:
            await store.upsert_latest(state())
            assert await store.get_latest("ann") == state()
        finally:
            await store.aclose()

    async def test_a_store_never_used_can_be_closed(self, case: Case, tmp_path: Path) -> None:
        """Closing a store that was never opened is no error."""
        store = BACKENDS[case.backend].asynchronous(tmp_path / "store")

        await store.aclose()

        with pytest.raises(StoreClosedError):
            await store.get_latest("ann")

    async def test_users_is_an_async_iterator(self, store: AsyncStateStore) -> None:
        """users() is used with `async for`, without an await, and can be left early."""
        await store.upsert_many([state("ann"), state("bob")])

        users = store.users()
        first = await anext(users)

        assert first in ("ann", "bob")
        assert {first, await anext(users)} == {"ann", "bob"}
        with pytest.raises(StopAsyncIteration):
            await anext(users)

    async def test_the_function_of_an_update_may_be_async(self, store: AsyncStateStore) -> None:
        """`update` takes an async function, which may wait, and a plain one."""

        async def slow(latest: StateSnapshot | None) -> StateSnapshot:
            await anyio.lowlevel.checkpoint()
            return latest.patched({"warmth": 0.1}) if latest else state()

        assert await store.update("ann", slow) == state()
        second = await store.update("ann", slow)
        assert second is not None
        assert second.axis("warmth") == 0.1

    async def test_a_long_search_lets_other_tasks_run(
        self, store: AsyncStateStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While many matches are collected, other tasks have their turns."""
        monkeypatch.setattr(Suspending, "TURN_S", 0.0)
        await store.upsert_many(random_states(MANY, 19))
        await store.search_similar(QUERY)  # which may have more to do the first time

        turns, found = await turns_during(partial(store.search_similar, QUERY, limit=10_000))

        assert turns >= 5
        assert len(found) == MANY

    async def test_a_long_search_tells_what_is_written_meanwhile_as_it_is(
        self, store: AsyncStateStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each user is found once, and every score is that of the state told, whoever writes meanwhile."""
        monkeypatch.setattr(Suspending, "TURN_S", 0.0)
        await store.upsert_many(random_states(MANY, 19))

        async def write() -> None:
            for number in range(30):
                axes = {"warmth": number / 30, "formality": 0.25}
                await store.upsert_latest(state(f"user-{20 * number}", 10_000, axes))
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            found = await store.search_similar(QUERY, limit=10_000)

        assert len(set(found_users(found))) == len(found) == MANY
        check_scores(found, QUERY)

    async def test_checking_a_long_list_lets_other_tasks_run(
        self, store: AsyncStateStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A list is checked whole before anything is written, in pieces, and counts as it was given."""
        monkeypatch.setattr(Suspending, "TURN_S", 0.0)
        states: list[Any] = random_states(MANY, 20)
        await store.count()

        async def refuse() -> None:
            with pytest.raises(ValidationError):
                await store.upsert_many([*states, "no state"])

        assert (await turns_during(refuse))[0] >= 5
        assert await store.count() == 0

        async def spoil() -> None:
            states.append("what comes too late")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(spoil)
            assert await store.upsert_many(states) == MANY

    async def test_an_update_that_waits_holds_up_nobody(self, store: AsyncStateStore) -> None:
        """While the function of an update waits, other tasks read and write, that user too."""
        waiting, go_on = anyio.Event(), anyio.Event()
        calls = 0

        async def patient(latest: StateSnapshot | None) -> StateSnapshot:
            nonlocal calls
            calls += 1
            waiting.set()
            await go_on.wait()
            return latest.patched({"warmth": 0.1}) if latest else state(axes={})

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.update, "ann", patient)
            await waiting.wait()
            await store.upsert_latest(state("ann", 5))
            await store.upsert_latest(state("bob", 5))
            assert await store.get_latest("ann") == state("ann", 5)
            go_on.set()

        assert calls == 2
        assert [s.axis("warmth") for s in await store.get_history("ann")] == [0.1, 0.75]

    async def test_a_cancelled_write_is_done_or_not_done(self, store: AsyncStateStore) -> None:
        """A write that is cancelled is there with its history, or not at all, and the store goes on."""
        for number in range(20):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await store.upsert_latest(state(f"user-{number}"))

        for user_id, (latest, history) in (await content(store)).items():
            assert latest == state(user_id)
            assert history == [latest]
        await store.upsert_latest(state("after"))
        assert await store.get_latest("after") == state("after")

    async def test_a_cancelled_batch_is_a_beginning_of_it(self, store: AsyncStateStore) -> None:
        """A long write that is cancelled has written its first snapshots, each of them whole."""
        states = random_states(2 * MANY, 7)
        with anyio.CancelScope() as scope:
            await store.upsert_many(states, progress=lambda done, total: scope.cancel())

        found = await content(store)
        assert found == {s.user_id: (s, [s]) for s in states[: len(found)]}
        assert found

    async def test_a_bulk_write_lets_other_tasks_run(self, store: AsyncStateStore) -> None:
        """While many states are written, other tasks get their turn, and see it grow."""
        seen: list[int] = []
        done = False

        async def watch() -> None:
            while not done:
                seen.append(await store.count())
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            await store.upsert_many(stream_states(4 * MANY, 8))
            done = True

        assert seen == sorted(seen)
        assert len(set(seen)) > 2


class MappingTests:
    """What only a synchronous store does: it reads as a mapping."""

    backends: ClassVar[tuple[str, ...]] = ()
    faces: ClassVar[tuple[str, ...]] = ("sync",)

    def test_a_user_is_read_like_a_key(self, sync_store: StateStore) -> None:
        """store[user_id] is the latest state."""
        sync_store.upsert_latest(state())

        assert sync_store["ann"] == state()

    def test_a_missing_user_is_a_key_error_with_a_readable_message(self, sync_store: StateStore) -> None:
        """store[user_id] of an unknown user raises UserNotFoundError, a KeyError that reads well."""
        with pytest.raises(UserNotFoundError) as caught:
            sync_store["nobody"]

        assert isinstance(caught.value, KeyError)
        assert not str(caught.value).startswith(("'", '"'))
        assert list(sync_store) == []

    def test_membership_is_of_users(self, sync_store: StateStore) -> None:
        """`in` says whether a user is there."""
        sync_store.upsert_latest(state())

        assert "ann" in sync_store
        assert "bob" not in sync_store

    def test_length_and_iteration_are_of_users(self, sync_store: StateStore) -> None:
        """len(store) is the number of users, and iteration yields their ids."""
        sync_store.upsert_many([state("ann", 1), state("ann", 2), state("bob")])

        assert len(sync_store) == 2
        assert sorted(sync_store) == ["ann", "bob"]
        assert sorted(sync_store.users()) == ["ann", "bob"]

    def test_a_store_reads_as_a_mapping(self, sync_store: StateStore) -> None:
        """get, keys, values and items are those of a mapping, so that dict() makes one of a store."""
        sync_store.upsert_many([state("ann", 1), state("ann", 2), state("bob")])
        latest = {"ann": state("ann", 2), "bob": state("bob")}

        assert dict(sync_store) == dict(sync_store.items()) == latest
        assert set(sync_store.keys()) == set(latest)
        assert sorted(sync_store.values(), key=lambda each: each.user_id) == list(latest.values())
        assert sync_store.get("ann") == latest["ann"]
        assert sync_store.get("nobody") is None
        assert sync_store.get("nobody", latest["bob"]) == latest["bob"]

    def test_an_empty_store_is_true(self, sync_store: StateStore) -> None:
        """A store without users is still a store."""
        assert sync_store
        assert len(sync_store) == 0

    def test_users_are_an_iterator(self, sync_store: StateStore) -> None:
        """users() can be taken one by one."""
        sync_store.upsert_many([state("ann"), state("bob")])

        users = sync_store.users()

        assert {next(users), next(users)} == {"ann", "bob"}
        assert next(users, None) is None

    def test_a_store_is_used_in_with(self, case: Case, tmp_path: Path) -> None:
        """`with` closes the store in the end."""
        with case.open_sync(tmp_path / "store") as store:
            store.upsert_latest(state())

        assert store.is_closed
        for read in (
            *(lambda: store["ann"], lambda: "ann" in store, lambda: len(store), lambda: list(store)),
            *(store.items, store.values, store.keys, lambda: store.get("ann")),
        ):
            with pytest.raises(StoreClosedError):
                read()


# ------------------------------------------------------------------------------
# Snapshots
# ------------------------------------------------------------------------------

KIND: Any = {"kind": "portable"}
MODES: tuple[Any, ...] = ("replace", "merge", "skip")


def read_archive(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and states of a portable snapshot, read with gzip and json alone, recounted and rehashed."""
    data = path.read_bytes()
    *lines, last = gzip.decompress(data).splitlines(keepends=True)
    header, *states = map(json.loads, lines)
    assert (header.keys(), header["header"]["format"]) == ({"header"}, "attuned_store")
    (collection,) = header["header"]["collections"]
    assert collection["kind"] == "states"
    members = data[: -len(last) - 23]  # but the last: 10 bytes of gzip, 5 of the block, 8 of gzip
    assert data[len(members) :][15:-8] == last
    assert json.loads(last) == {
        "footer": {
            "collections": [
                {
                    "name": collection["name"],
                    "users": len({state["user_id"] for state in states}),
                    "states": len(states),
                }
            ],
            "sha256": hashlib.sha256(b"".join(lines)).hexdigest(),
            "gzip_sha256": hashlib.sha256(members).hexdigest(),
        }
    }
    return header["header"], states


def states_in(found: Content) -> list[StateSnapshot]:
    """All states of a content, each user's oldest first, the latest also where history does not show it."""
    states = []
    for latest, history in found.values():
        assert latest is not None
        states += [*reversed(history)] or [latest]
    return states


def archived(path: Path) -> dict[str, list[StateSnapshot]]:
    """The states of a portable snapshot by user, in the order of the file."""
    states: dict[str, list[StateSnapshot]] = {}
    for line in read_archive(path)[1]:
        states.setdefault(line["user_id"], []).append(StateSnapshot(**line))
    return states


def by_user(states: Iterable[StateSnapshot]) -> dict[str, list[StateSnapshot]]:
    found: dict[str, list[StateSnapshot]] = {}
    for each in states:
        found.setdefault(each.user_id, []).append(each)
    return found


def snapshot_of(states: Iterable[StateSnapshot], directory: Path, **options: Any) -> Path:
    """A portable snapshot of these states."""
    with MemoryStore(**options) as store:
        store.upsert_many(states)
        path = store.create_snapshot(directory).path
        assert path is not None
        return path


async def copy_between(source: AsyncStateStore, target: AsyncStateStore, **options: Any) -> SnapshotReport:
    """`copy` or `acopy`, as the stores are."""
    if isinstance(source, Awaited) and isinstance(target, Awaited):
        return copy(source.store, target.store, **options)
    return await acopy(source, target, **options)


@pytest.mark.anyio
class SnapshotTests:
    """What every store does with portable snapshots, in both forms and on both event loops."""

    backends: ClassVar[tuple[str, ...]] = ()
    faces: ClassVar[tuple[str, ...]] = FACES

    # Taking one

    async def test_a_snapshot_holds_what_the_store_holds(
        self, store: AsyncStateStore, tmp_path: Path, case: Case
    ) -> None:
        """A portable snapshot, read with gzip and JSON alone, holds every state of the store and no other."""
        await store.upsert_many([*PEOPLE, *random_states(90, 12)])
        found = await content(store)

        report = await store.create_snapshot(tmp_path / "deep" / "snapshots", **KIND)

        assert report.path is not None
        header, lines = read_archive(report.path)
        assert archived(report.path) == by_user(states_in(found))
        assert list(report.path.parent.iterdir()) == [report.path]
        assert report.path.stat().st_mode & 0o777 == 0o600
        data = report.path.read_bytes()
        assert (report.bytes, report.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert (report.status, report.kind, report.reason) == ("completed", "portable", "manual")
        assert (header["version"], header["engine"]) == (2, (await store.health()).backend)
        assert header["collections"][0]["axes"] == list(CANONICAL_AXES)
        told = (len(lines), len(found), CANONICAL_AXES, report.created_at)
        assert report.to_dict()["created_at"] == header["created_at"]
        verified, (listed,) = verify_snapshot(report.path), list_snapshots(report.path.parent)
        restored = await store.restore_snapshot(report.path)
        assert (verified.sha256, restored.sha256, listed.sha256) == (report.sha256, report.sha256, None)
        for each in (report, verified, listed, restored):
            assert (each.points, each.users, each.axes, each.created_at) == told
            assert each.status == "completed"

    async def test_a_long_name_of_a_collection_fits_into_that_of_a_file(
        self, open_store: Open, tmp_path: Path, case: Case
    ) -> None:
        """Collections of 60 letters that are long as escapes are saved, listed, kept apart and restored."""
        names = [f"{'коллекция' * 6}{collection_of(tmp_path)[-5:]}{last}" for last in ("", "й", "я")]
        if case.backend == "memory":
            names = [""]
        kept, backups = [], tmp_path / "backups"
        for name in names:
            store = await open_store(**({"collection_name": name} if name else {}))
            await store.upsert_latest(state(f"user of {name[-2:]}"))
            for _ in range(3):
                report = await store.create_snapshot(backups, **KIND, keep=2)
            assert report.path is not None
            assert len(report.path.name.encode()) <= 255
            assert verify_snapshot(report.path).users == 1
            await store.delete(f"user of {name[-2:]}")
            await store.restore_snapshot(report.path)
            assert await users_of(store) == [f"user of {name[-2:]}"]
            kept += sorted(
                path.name for path in backups.iterdir() if path.name.endswith(report.path.name[20:])
            )

        assert len(kept) == len(set(kept)) == 2 * len(names)
        listed = list_snapshots(backups)
        assert sorted(each.snapshot_name or "" for each in listed) == sorted(kept)
        assert {each.status for each in listed} == {"completed"}

    async def test_an_empty_store_has_a_snapshot(self, store: AsyncStateStore, tmp_path: Path) -> None:
        """A snapshot of an empty store is a file like any other, and restoring it empties a store."""
        path = (await store.create_snapshot(tmp_path, **KIND)).path
        await store.upsert_many(PEOPLE)

        assert read_archive(path)[1] == []
        async with unchanged(store):
            await store.restore_snapshot(path, mode="merge")
        assert (await store.restore_snapshot(path)).points == 0
        assert await content(store) == {}

    async def test_any_user_id_is_kept_by_a_snapshot(self, store: AsyncStateStore, tmp_path: Path) -> None:
        """Any valid user id comes back from a snapshot."""
        await store.upsert_many([state(user_id, number) for number, user_id in enumerate(ODD_USER_IDS)])
        before = await content(store)

        path = (await store.create_snapshot(tmp_path, **KIND)).path
        for user_id in ODD_USER_IDS:
            await store.delete(user_id)
        await store.restore_snapshot(path)

        assert await content(store) == before
        assert sorted(archived(path)) == sorted(ODD_USER_IDS)

    async def test_a_snapshot_keeps_as_many_axes_as_there_can_be(
        self, open_store: Open, tmp_path: Path
    ) -> None:
        """States of 1,024 axes with names of 64 characters come back from a snapshot."""
        axes = tuple(f"{number:04d}{'a' * 60}" for number in range(1024))
        store = await open_store(axes=axes)
        values = {name: number / 1023 for number, name in enumerate(axes)}
        await store.upsert_many([state("ann", at, values) for at in range(3)])
        before = await content(store)

        path = (await store.create_snapshot(tmp_path, **KIND)).path
        await store.delete("ann")
        await store.restore_snapshot(path)

        assert await content(store) == before

    async def test_a_snapshot_holds_what_can_be_read(
        self, open_store: Open, tmp_path: Path, clock: Clock
    ) -> None:
        """What both bounds on history hide is not in a snapshot; the latest always is."""
        store = await open_store(max_history_per_user=3, history_retention_days=2)
        await store.upsert_many([state("ann", -hours * HOUR) for hours in (0, 10, 20, 30)])
        await store.upsert_many([state("bob", -hours * HOUR) for hours in (25, 30)])
        clock.now = NOW + 24 * HOUR

        path = (await store.create_snapshot(tmp_path, **KIND)).path

        assert archived(path) == {
            "ann": [state("ann", -hours * HOUR) for hours in (20, 10, 0)],
            "bob": [state("bob", -25 * HOUR)],
        }

    async def test_a_snapshot_of_a_store_without_history_holds_the_latest(
        self, open_store: Open, tmp_path: Path
    ) -> None:
        """Without history, a snapshot holds the latest state of each user."""
        store = await open_store(enable_history=False)
        await store.upsert_many([state(name, at) for name in ("ann", "bob") for at in range(3)])

        path = (await store.create_snapshot(tmp_path, **KIND)).path

        assert archived(path) == {name: [state(name, 2)] for name in ("ann", "bob")}

    async def test_a_snapshot_taken_while_writers_run_holds_states_that_existed(
        self, store: AsyncStateStore, tmp_path: Path, case: Case
    ) -> None:
        """Taken while writers run, a snapshot holds for each user what the user had at some moment."""
        users = [f"user-{number}" for number in range(8)]
        await store.upsert_many(state(user_id, 0) for user_id in users)
        paths: list[Path] = []

        async def write(user_id: str) -> None:
            for at in range(1, 25):
                await store.upsert_latest(state(user_id, at))

        async def take() -> None:
            paths.append((await store.create_snapshot(tmp_path / "snapshots", **KIND)).path)

        jobs: list[Any] = [partial(write, user_id) for user_id in users]
        await together(store, [*jobs[:4], take, take, *jobs[4:], take])

        for path in paths:
            found = archived(path)
            assert sorted(found) == users
            for user_id, states in found.items():
                if case.backend in EMBEDDED:
                    assert states == [state(user_id, at) for at in range(len(states))]
                assert set(states) <= {state(user_id, at) for at in range(25)}
        verify_snapshot(paths[-1])

    async def test_progress_of_a_snapshot_is_reported(
        self, store: AsyncStateStore, tmp_path: Path, case: Case
    ) -> None:
        """Creating and restoring say how many states are done, in the end all of them."""
        await store.upsert_many(random_states(plenty(case), 5))
        calls: list[tuple[int, int | None]] = []

        def progress(done: int, total: int | None) -> None:
            calls.append((done, total))

        path = (await store.create_snapshot(tmp_path, progress=progress, **KIND)).path
        assert calls[-1] == (plenty(case), None)
        for mode in MODES:
            del calls[:]
            await store.restore_snapshot(path, mode=mode, progress=progress)
            done = [count for count, _ in calls]
            assert sum(later < earlier for earlier, later in itertools.pairwise(done)) <= 1, (
                "verified, then written"
            )
            assert done[-1] == plenty(case)

    async def test_an_error_of_the_callers_progress_leaves_no_file(
        self, store: AsyncStateStore, tmp_path: Path
    ) -> None:
        """What progress raises reaches the caller, and no file and no changed store is left."""
        await store.upsert_many(PEOPLE)

        def broken(done: int, total: int | None) -> None:
            raise RuntimeError("the line was cut")

        with pytest.raises(RuntimeError, match="the line was cut"):
            await store.create_snapshot(tmp_path / "snapshots", progress=broken, **KIND)
        assert list((tmp_path / "snapshots").iterdir()) == []

    async def test_bad_orders_are_refused(self, store: AsyncStateStore, tmp_path: Path, case: Case) -> None:
        """Kinds, reasons, numbers and modes that make no sense are ValidationError, and nothing is made."""
        await store.upsert_many(PEOPLE)
        path = snapshot_of(PEOPLE, tmp_path / "snapshots")
        place, create, restore = tmp_path / "new", cast("Any", store.create_snapshot), store.restore_snapshot
        attempts: dict[str, Callable[[], Awaitable[object]]] = {
            "an unknown kind": lambda: create(place, kind="zip"),
            "an unknown reason": lambda: create(place, reason="why not"),
            "keep 0": lambda: create(place, keep=0),
            "keep in words": lambda: create(place, keep="all"),
            "a number as directory": lambda: create(5),
            "an empty directory": lambda: create(""),
            "a directory with a null character": lambda: create("a\0b"),
            "an unknown mode": lambda: restore(path, mode=cast("Any", "append")),
            "a number as path": lambda: restore(cast("Any", 5)),
        }
        if case.backend in EMBEDDED:
            attempts["a native snapshot"] = lambda: create(place, kind="native")

        await refused(store, attempts)

        assert not place.exists() or list(place.iterdir()) == []

    async def test_a_closed_store_takes_no_snapshot(self, store: AsyncStateStore, tmp_path: Path) -> None:
        """After close, snapshots are neither taken nor restored."""
        path = snapshot_of(PEOPLE, tmp_path / "snapshots")
        await store.aclose()

        with pytest.raises(StoreClosedError):
            await store.create_snapshot(tmp_path / "new", **KIND)
        with pytest.raises(StoreClosedError):
            await store.restore_snapshot(path)
        assert not (tmp_path / "new").exists()

    # Restoring one

    async def test_replacing_makes_the_store_equal_to_the_file(
        self, open_store: Open, tmp_path: Path, case: Case
    ) -> None:
        """Replace leaves exactly what the file holds; other stores on the same place see it at once."""
        kept = [state(name, at) for name in ("ann", "zoe") for at in (1, 3)]
        path = snapshot_of(kept, tmp_path / "snapshots")
        store = await open_store()
        other = await open_store() if case.backend != "memory" else store
        await store.upsert_many([*PEOPLE, state("ann", 2), state("ann", 99)])
        assert len(await content(store)) == len(await content(other)) == 5
        assert len(await store.search_similar(QUERY)) == 5

        report = await store.restore_snapshot(path)

        expected = {name: (state(name, 3), [state(name, 3), state(name, 1)]) for name in ("ann", "zoe")}
        assert (report.status, report.points, report.path) == ("completed", 4, path)
        assert await content(store) == await content(other) == expected
        assert sorted(found_users(await other.search_similar(QUERY, limit=99))) == ["ann", "zoe"]
        assert (await store.health()).points == 6
        await other.upsert_latest(state("ann", 4))
        await store.restore_snapshot(path)
        assert await content(other) == expected
        if case.backend != "memory":
            await store.aclose()
            await other.aclose()
            assert await content(await open_store()) == expected

    async def test_merging_keeps_the_newest_of_both(self, store: AsyncStateStore, tmp_path: Path) -> None:
        """Merge adds what the file holds, in its place; where the times are equal the file wins."""
        theirs = state("ann", 2, {"warmth": 0.1})
        path = snapshot_of([state("ann", 1), theirs, state("bob", 9), state("cyd", 1)], tmp_path)
        await store.upsert_many([state("ann", 2), state("ann", 3), state("bob", 8), state("dee", 1)])

        assert (await store.restore_snapshot(path, mode="merge")).points == 4

        assert await content(store) == {
            "ann": (state("ann", 3), [state("ann", 3), theirs, state("ann", 1)]),
            "bob": (state("bob", 9), [state("bob", 9), state("bob", 8)]),
            "cyd": (state("cyd", 1), [state("cyd", 1)]),
            "dee": (state("dee", 1), [state("dee", 1)]),
        }

    async def test_merging_takes_the_file_for_the_latest_of_equal_times(
        self, store: AsyncStateStore, tmp_path: Path
    ) -> None:
        """A latest state in the file replaces one of the same time."""
        theirs = state("ann", 2, {"warmth": 0.1})
        await store.upsert_latest(state("ann", 2))

        await store.restore_snapshot(snapshot_of([theirs], tmp_path), mode="merge")

        assert await content(store) == {"ann": (theirs, [theirs])}

    async def test_skipping_adds_absent_users_whole(
        self, open_store: Open, tmp_path: Path, case: Case
    ) -> None:
        """Skip adds only users who are absent, with all they have, however many batches that takes."""
        much = 2 * plenty(case)
        long = [state(name, at, LIGHT) for name in ("ann", "bob", "cyd") for at in range(much)]
        path = snapshot_of([*long, state("dee", 7)], tmp_path, max_history_per_user=10_000)
        store = await open_store(max_history_per_user=10_000)
        await store.upsert_many([state("bob", 5, {}), state("eve", 5)])

        await store.restore_snapshot(path, mode="skip")

        found = await content(store)
        assert {name: len(history) for name, (_, history) in found.items()} == {
            "ann": much,
            "bob": 1,
            "cyd": much,
            "dee": 1,
            "eve": 1,
        }
        assert found["bob"][0] == state("bob", 5, {})
        assert found["cyd"][1] == [state("cyd", at, LIGHT) for at in reversed(range(much))]

    async def test_retention_holds_for_what_is_restored(
        self, open_store: Open, tmp_path: Path, clock: Clock
    ) -> None:
        """A store keeps of a snapshot what its own bounds allow, and always the latest."""
        path = snapshot_of([state("ann", at * DAY) for at in range(-4, 1)], tmp_path / "snapshots")

        bounds: list[tuple[dict[str, Any], list[int]]] = [
            ({"max_history_per_user": 2}, [0, -1]),
            ({"history_retention_days": 1}, [0, -1]),
            ({"enable_history": False}, []),
            ({"max_history_per_user": 9, "history_retention_days": 3}, [0, -1, -2, -3]),
        ]
        for number, (options, shown) in enumerate(bounds):
            store = await open_store(str(number), **options)
            for mode in MODES:
                await store.restore_snapshot(path, mode=mode)
                history = [state("ann", at * DAY) for at in shown]
                assert await content(store) == {"ann": (state("ann"), history)}, (options, mode)
                await store.delete("ann")

    async def test_a_snapshot_of_any_engine_is_restored_by_any(
        self, open_store: Open, tmp_path: Path, case: Case
    ) -> None:
        """A portable snapshot is the same from every engine, and every engine restores it."""
        states = [*PEOPLE, *random_states(5, 6)]
        target = await open_store("target")
        for engine, backend in BACKENDS.items():
            if backend.library and importlib.util.find_spec(backend.library) is None:
                continue
            with backend.sync(tmp_path / f"from-{engine}") as source:
                source.upsert_many(states)
                path = source.create_snapshot(tmp_path / engine, kind="portable").path
            assert path is not None
            await target.restore_snapshot(path)
            assert by_user(states_in(await content(target))) == archived(path)
            check_scores(await target.search_similar(QUERY), QUERY)

    async def test_a_snapshot_of_other_axes_is_refused(self, open_store: Open, tmp_path: Path) -> None:
        """A file with an axis that the store does not have is SnapshotError, and changes nothing."""
        other = snapshot_of([state("ann", axes={"valence": 1})], tmp_path / "a", axes=["warmth", "valence"])
        unused = snapshot_of([state("ann", axes={"warmth": 1})], tmp_path / "b", axes=["warmth", "valence"])
        store = await open_store()
        await store.upsert_many(PEOPLE)

        for path in (other, unused):
            for mode in MODES:
                async with unchanged(store):
                    with pytest.raises(SnapshotError, match="valence"):
                        await store.restore_snapshot(path, mode=mode)

    async def test_a_store_with_more_axes_takes_a_snapshot_of_fewer(
        self, open_store: Open, tmp_path: Path
    ) -> None:
        """A file whose axes the store has, among others, is restored."""
        axes = ("tense_arousal", "energetic_arousal", "warmth")
        path = snapshot_of(
            [state("ann", 1, {"warmth": 0.25}), state("ann", 2, {"tense_arousal": 1})],
            tmp_path / "snapshots",
            axes=["warmth", "tense_arousal"],
        )
        store = await open_store(axes=axes)

        for mode in MODES:
            await store.restore_snapshot(path, mode=mode)
            assert await store.get_latest("ann") == state("ann", 2, {"tense_arousal": 1})
            assert len(await store.get_history("ann")) == 2
        assert store.axes == axes
        path = (await store.create_snapshot(tmp_path / "again", **KIND)).path
        assert read_archive(path)[0]["collections"][0]["axes"] == list(axes)

    async def test_a_damaged_file_changes_nothing(
        self, store: AsyncStateStore, tmp_path: Path, case: Case
    ) -> None:
        """A file that turns out damaged at its end is SnapshotError in every mode, and changes nothing."""
        path = snapshot_of(random_states(plenty(case), 8), tmp_path / "snapshots")
        damaged = tmp_path / "damaged.attuned"
        damaged.write_bytes(path.read_bytes()[:-1] + b"?")
        await store.upsert_many(PEOPLE)

        for mode in MODES:
            async with unchanged(store):
                with pytest.raises(SnapshotError, match=r"damaged\.attuned"):
                    await store.restore_snapshot(damaged, mode=mode)
        assert (await store.health()).status == "healthy"

    # Copying

    async def test_a_copy_holds_the_same(self, open_store: Open, tmp_path: Path) -> None:
        """A store is copied to memory and back, latest states and history, with its axes."""
        source, between, target = [await open_store(name) for name in ("source", "between", "target")]
        await source.upsert_many([*PEOPLE, *random_states(70, 7)])
        before = await content(source)
        calls: list[tuple[int, int | None]] = []

        report = await copy_between(source, between, progress=lambda *call: calls.append(call))
        await copy_between(between, target)

        assert await content(between) == await content(target) == before
        assert report.points == len(states_in(before))
        assert calls[-1] == (report.points, None)

    async def test_a_copy_goes_from_memory_and_to_memory(self, open_store: Open, case: Case) -> None:
        """States come from another engine and go there unchanged."""
        asynchronous, synchronous = AsyncMemoryStore(), Awaited(MemoryStore())
        memory: Any = synchronous if case.face == "sync" else asynchronous
        store = await open_store()
        await memory.upsert_many(PEOPLE)
        before = await content(memory)

        await copy_between(memory, store)
        assert await content(store) == before
        await store.upsert_latest(state("fay"))
        await copy_between(store, memory, replace=True)
        assert await content(memory) == await content(store)

    async def test_a_copy_overwrites_nothing_by_itself(self, open_store: Open) -> None:
        """A target that holds something is refused, and replaced as a whole only when that is asked for."""
        source, target = await open_store("source"), await open_store("target")
        await source.upsert_many([state("ann", 1), state("bob", 1)])
        await target.upsert_many([state("ann", 5), state("cyd", 5)])

        async with unchanged(target):
            with pytest.raises(ValidationError, match="replace"):
                await copy_between(source, target)
        await copy_between(source, target, replace=True)

        assert await content(target) == await content(source)

    async def test_a_copy_that_holds_less_is_an_error(self, open_store: Open) -> None:
        """A target that keeps less history than the source is told by the digest."""
        source, target = await open_store("source"), await open_store("target", max_history_per_user=2)
        await source.upsert_many([state("ann", at) for at in range(5)])

        with pytest.raises(SnapshotError, match="max_history_per_user"):
            await copy_between(source, target)

    async def test_a_copy_into_other_axes_is_an_error(self, open_store: Open) -> None:
        """A target without an axis of the source is refused, and keeps what it holds."""
        source, target = await open_store("source"), await open_store("target", axes=("valence",))
        await source.upsert_many(PEOPLE)
        await target.upsert_latest(state("zoe", axes={"valence": 0.25}))

        async with unchanged(target):
            with pytest.raises(StoreError):
                await copy_between(source, target)
            with pytest.raises(ValidationError, match="valence"):
                await copy_between(source, target, replace=True)

    async def test_a_copy_has_other_axes_where_that_is_asked_for(self, open_store: Open) -> None:
        """A copy has the axes of the source under their new names, without those that are dropped."""
        source = await open_store("source", axes=("warmth", "formality", "calm"))
        target = await open_store("target", axes=("kindness", "calm"))
        states = [state("ann", 1, {"warmth": 0.1, "formality": 0.2}), state("ann", 2, {"calm": 0.3})]
        await source.upsert_many(states)
        for options, message in (
            ({"rename": {"warmht": "kindness"}}, "rename: .*'warmht'.*did you mean 'warmth'"),
            ({"drop": ["heat"]}, "drop: .*'heat'"),
            ({"drop": "calm"}, "drop: a list"),
            ({"rename": 5}, "rename: a mapping"),
            ({"rename": {"warmth": "calm"}}, "each name once"),
            ({"drop": ["warmth", "formality", "calm"]}, "one axis at least"),
        ):
            async with unchanged(target):
                with pytest.raises(ValidationError, match=message):
                    await copy_between(source, target, **cast("Any", options))

        await copy_between(source, target, rename={"warmth": "kindness"}, drop=["formality"])

        assert await target.get_history("ann") == [
            state("ann", 2, {"calm": 0.3}),
            state("ann", 1, {"kindness": 0.1}),
        ]

    async def test_a_store_is_copied_by_its_path(self, open_store: Open, tmp_path: Path, case: Case) -> None:
        """Source and target may be what open_store takes; a new target gets the axes of the source."""
        store = await open_store(axes=("warmth", "formality"))
        await store.upsert_many([state("ann", at) for at in range(3)])
        new, absent = str(tmp_path / "new"), str(tmp_path / "absent")

        if isinstance(store, Awaited):
            copy(store.store, new)
            with pytest.raises(StoreError, match="absent"):
                copy(absent, tmp_path / "target")
        else:
            path = str(tmp_path / "store") if case.backend in ("edge", "local") else store
            await acopy(path, new)
            with pytest.raises(StoreError, match="absent"):
                await acopy(absent, tmp_path / "target")

        assert not (tmp_path / "absent").exists()
        assert not (tmp_path / "target").exists()
        with open_path(new) as copied:
            assert copied.axes == ("warmth", "formality")
            assert copied.get_history("ann") == await store.get_history("ann")


EMBEDDED = ("memory", "edge", "local")
LIGHT = {"warmth": 0.25}


def plenty(case: Case) -> int:
    """How many states take several steps of any long operation."""
    return 300 if case.backend in EMBEDDED else 600


@pytest.mark.anyio
class AsyncSnapshotTests:
    """What asynchronous stores do besides: others run meanwhile, and a task may be cancelled."""

    backends: ClassVar[tuple[str, ...]] = ()
    faces: ClassVar[tuple[str, ...]] = ("asyncio", "trio")

    async def test_other_tasks_run_meanwhile(
        self, store: AsyncStateStore, open_store: Open, tmp_path: Path, case: Case
    ) -> None:
        """Creating, restoring and copying let other tasks run between their steps."""
        await store.upsert_many(random_states(plenty(case), 3))
        target = await open_store("target")
        turns = [0]

        async def others() -> None:
            while True:
                await anyio.sleep(0 if case.backend in EMBEDDED else 0.001)
                turns[0] += 1

        async def during(work: Awaitable[T]) -> T:
            turns[0] = 0
            result = await work
            assert turns[0] >= 3
            return result

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(others)
            await anyio.lowlevel.checkpoint()
            report = await during(store.create_snapshot(tmp_path, **KIND))
            for mode in MODES:
                await during(store.restore_snapshot(cast("Path", report.path), mode=mode))
            await during(acopy(store, target))
            tasks.cancel_scope.cancel()

    @pytest.mark.parametrize("after", [0, 1, 2])
    async def test_a_cancelled_snapshot_leaves_no_file(
        self, store: AsyncStateStore, tmp_path: Path, case: Case, after: int
    ) -> None:
        """Cancelled while it is taken, a snapshot leaves no file at all."""
        await store.upsert_many(random_states(plenty(case), 3))

        await cancelled(after, lambda note: store.create_snapshot(tmp_path / "new", progress=note, **KIND))

        assert list((tmp_path / "new").iterdir()) == []
        await store.create_snapshot(tmp_path / "new", **KIND)


@pytest.mark.anyio
class AsyncReplacementTests:
    """What asynchronous stores do that replace all or nothing: not those on a server, changed in place."""

    backends: ClassVar[tuple[str, ...]] = ()
    faces: ClassVar[tuple[str, ...]] = ("asyncio", "trio")

    @pytest.mark.parametrize("after", [0, 1, 2, 5])
    async def test_a_cancelled_replacement_changes_nothing(
        self, store: AsyncStateStore, tmp_path: Path, case: Case, after: int
    ) -> None:
        """Cancelled while it is restored, a snapshot changes nothing, and can be restored afterwards."""
        path = snapshot_of(random_states(plenty(case), 3), tmp_path / "snapshots")
        await store.upsert_many(PEOPLE)
        before = await content(store)

        await cancelled(after, lambda note: store.restore_snapshot(path, progress=note))

        if after < 5:  # which is the last: it is done or not done
            assert await content(store) == before
        await store.restore_snapshot(path)
        assert await store.count() == plenty(case)

    async def test_a_cancelled_copy_changes_nothing(
        self, store: AsyncStateStore, open_store: Open, case: Case
    ) -> None:
        """Cancelled while it is made, a copy leaves its target as it was."""
        target = await open_store("target")
        await store.upsert_many(random_states(plenty(case), 3))

        await cancelled(1, lambda note: acopy(store, target, progress=note))

        assert await content(target) == {}
        await acopy(store, target)


async def cancelled(after: int, work: Callable[[Callable[..., None]], Awaitable[object]]) -> None:
    """Cancel work at its progress of this number, or right after its start; it need not be cancellable."""
    calls = itertools.count(1)
    with anyio.CancelScope() as scope:

        def note(*call: object) -> None:
            if next(calls) == after:
                scope.cancel()

        if not after:
            scope.cancel()
        await work(note)


# ------------------------------------------------------------------------------
# Embedded stores: a directory on disk
# ------------------------------------------------------------------------------

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "attuned_store")


@dataclass(frozen=True)
class Point:
    """A point as the engine's own library reads it; `payload["axes"]` is brought to a plain dict."""

    payload: dict[str, Any]
    vector: list[float]


Points = dict[str, Point]


def point_id(user_id: str, what: object) -> str:
    """The id of a point, computed as the format says."""
    return str(uuid.uuid5(NAMESPACE, f"{user_id}::{what}"))


def expected_points(found: Content) -> dict[str, tuple[str, StateSnapshot]]:
    """The kind and the snapshot of each point that a directory with this content holds, by id."""
    expected: dict[str, tuple[str, StateSnapshot]] = {}
    for user_id, (latest, history) in found.items():
        assert latest is not None
        expected[point_id(user_id, "latest")] = ("latest", latest)
        expected.update({point_id(user_id, s.updated_at_unix_ms): ("history", s) for s in history})
    return expected


def direction(vector: Sequence[float]) -> list[float]:
    length = math.hypot(*vector)
    return [value / length for value in vector] if length else list(vector)


class EmbeddedKit:
    """What a test of an embedded engine adds: a second way to its files, which is not the store."""

    backends: ClassVar[tuple[str, ...]] = ()
    faces: ClassVar[tuple[str, ...]] = FACES

    def read_points(self, path: Path, collection: str = "attuned_state") -> Points:
        """All points of a closed directory, read with the engine's own library."""
        raise NotImplementedError

    def write_points(self, path: Path, points: Points) -> None:
        """Write points into a closed directory with the engine's own library, payload as it is."""
        raise NotImplementedError


@pytest.mark.anyio
class EmbeddedTests(EmbeddedKit):
    """What every embedded store does with its directory."""

    async def test_opening_again_gives_the_same_content(self, open_store: Open) -> None:
        """All that was written is there when the directory is opened again."""
        store = await open_store()
        await store.upsert_many([*PEOPLE, *random_states(50, 9)])
        await store.patch("ann", {"warmth": 0.3})
        await store.delete("bob")
        before = await content(store)
        await store.aclose()

        again = await open_store()

        assert await content(again) == before
        found = await again.search_similar(QUERY, limit=1000)
        assert sorted(found_users(found)) == sorted(before)
        check_scores(found, QUERY)

    async def test_an_open_and_closed_directory_can_be_opened_again_and_again(self, open_store: Open) -> None:
        """Closing gives the directory free at once."""
        for number in range(3):
            store = await open_store()
            await store.upsert_latest(state("ann", number))
            assert len(await store.get_history("ann")) == number + 1
            await store.aclose()

    async def test_points_are_what_the_format_says(self, open_store: Open, tmp_path: Path) -> None:
        """Ids are computed, payloads hold every field by its name, and vectors are the centred axes."""
        store = await open_store()
        await store.upsert_many(PEOPLE)
        expected = expected_points(await content(store))
        await store.aclose()

        points = self.read_points(tmp_path / "store")

        assert points.keys() == expected.keys()
        for key, (kind, snapshot) in expected.items():
            payload, vector = points[key].payload, points[key].vector
            fields = snapshot.to_dict()
            assert payload["kind"] == kind
            assert {name: payload[name] for name in fields} == fields
            centred = [snapshot.axis(name) - 0.5 for name in CANONICAL_AXES]
            assert direction(vector) == pytest.approx([*direction(centred), 0.0], abs=1e-6)

    @pytest.mark.parametrize("form", [dict, json.dumps])
    async def test_points_with_plain_payloads_are_read(
        self, open_store: Open, tmp_path: Path, form: Callable[[Any], object]
    ) -> None:
        """Points with axes as a mapping or as JSON, and with vectors as they were given, read the same."""
        store = await open_store()
        await store.upsert_many(PEOPLE)
        before = await content(store)
        await store.aclose()
        plain = {
            key: Point(
                {**point.payload, "axes": form(point.payload["axes"])},
                [point.payload["axes"].get(name, 0.5) - 0.5 for name in CANONICAL_AXES] + [0.0],
            )
            for key, point in self.read_points(tmp_path / "store").items()
        }

        self.write_points(tmp_path / "store", plain)
        again = await open_store()

        assert await content(again) == before
        check_scores(await again.search_similar(QUERY), QUERY)
        await again.patch("ann", {"warmth": 1.0})
        assert len(await again.get_history("ann")) == 3

    async def test_numbers_keep_every_bit(self, open_store: Open) -> None:
        """A value and a confidence are read as exactly the floats that were written, from disk too."""
        source = random.Random(20260117)
        states = [
            state(f"user-{n}", n, {"warmth": source.random()}, confidence=source.random())
            for n in range(1_000)
        ]
        store = await open_store(cache_size=0)
        await store.upsert_many(states)

        for _ in range(2):
            latest = await store.get_many(s.user_id for s in states)
            matches = await store.search_similar(QUERY, limit=10_000)
            entries = await store.search_similar(QUERY, limit=10_000, history=True)
            assert set(latest.values()) == set(states)
            assert {match.snapshot for match in matches} == set(states)
            assert {match.snapshot for match in entries} == set(states)
            assert [await store.get_history(s.user_id) for s in states] == [[s] for s in states]
            await store.aclose()
            store = await open_store(cache_size=0)

    async def test_deleting_leaves_no_point_behind(self, open_store: Open, tmp_path: Path) -> None:
        """After a delete the engine itself holds nothing of the user."""
        store = await open_store()
        await store.upsert_many([state("ann", at) for at in range(20)] + [state("bob")])
        await store.delete("ann")
        await store.aclose()

        assert self.read_points(tmp_path / "store").keys() == {
            point_id("bob", "latest"),
            point_id("bob", NOW),
        }

    async def test_pruning_leaves_only_what_can_be_read(
        self, open_store: Open, tmp_path: Path, clock: Clock
    ) -> None:
        """After prune the engine holds the latest of each user and the entries that get_history returns.

        The history point of a latest state that is too old itself may stay: it is the latest.
        """
        store = await open_store(max_history_per_user=3, history_retention_days=2)
        await store.upsert_many([state("ann", -hours * HOUR) for hours in range(0, 40, 4)])
        await store.upsert_many([state("bob", -DAY), state("bob", -DAY - HOUR)])
        clock.now = NOW + DAY + 18 * HOUR
        await store.prune()
        found = await content(store)
        await store.aclose()

        assert found == {
            "ann": (state("ann", 0), [state("ann", 0), state("ann", -4 * HOUR)]),
            "bob": (state("bob", -DAY), []),
        }
        points = self.read_points(tmp_path / "store").keys()
        assert points - {point_id("bob", NOW - DAY)} == expected_points(found).keys()

    async def test_history_does_not_grow_on_disk(self, open_store: Open, tmp_path: Path) -> None:
        """Hundreds of writes to one user leave the latest and max_history_per_user entries."""
        store = await open_store(max_history_per_user=3)
        for at in range(200):
            await store.upsert_latest(state(at=at))
        await store.prune()
        found = await content(store)
        await store.aclose()

        assert self.read_points(tmp_path / "store").keys() == expected_points(found).keys()
        assert len(found["ann"][1]) == 3

    async def test_a_refused_write_leaves_no_point(self, open_store: Open, tmp_path: Path) -> None:
        """Bad input and conflicts leave nothing in the engine either."""
        store = await open_store()
        await store.upsert_latest(state())
        before = expected_points(await content(store))

        with pytest.raises(ConflictError):
            await store.upsert_latest(state(at=1), expected=None)
        with pytest.raises(ConflictError):
            await store.upsert_latest(state("bob"), expected=state("bob"))
        with pytest.raises(ValidationError):
            await store.upsert_many([state("cyd"), state("dee", axes={"unheard_of": 0.5})])
        await store.aclose()

        assert self.read_points(tmp_path / "store").keys() == before.keys()

    async def test_a_directory_may_be_named_by_a_string(self, case: Case, tmp_path: Path) -> None:
        """The path is a string or a Path, and its parents are created."""
        path = tmp_path / "deep" / "down" / "store"
        store = await case.open(cast("Any", str(path)))
        await store.upsert_latest(state())
        await store.aclose()

        assert self.read_points(path).keys() == {point_id("ann", "latest"), point_id("ann", NOW)}

    # Schema

    async def test_a_directory_remembers_its_axes(self, open_store: Open) -> None:
        """Opened without axes, a directory has those it was created with."""
        axes = ("energetic_arousal", "tense_arousal")
        store = await open_store(axes=axes)
        await store.upsert_latest(state(axes={"tense_arousal": 0.25}))
        before = await content(store)
        await store.aclose()

        for options in ({}, {"axes": axes}):
            again = await open_store(**options)
            assert again.axes == axes
            assert await content(again) == before
            await again.aclose()

    @pytest.mark.parametrize("vector_size", [None, 5])
    async def test_a_directory_remembers_axes_that_were_added(
        self, open_store: Open, vector_size: int | None
    ) -> None:
        """Axes that one store adds are those of all on the directory, then and when it is opened again."""
        store = await open_store(axes=("warmth", "formality"), vector_size=vector_size)
        other = await open_store()
        await store.upsert_many([state("ann", at) for at in range(3)])
        await store.alter_axes(add=["calm"])
        assert other.axes == store.axes == ("warmth", "formality", "calm")
        await other.upsert_latest(state("bob", axes={"calm": 0.5}))
        before = await content(store)
        await store.aclose()
        await other.aclose()

        again = await open_store()

        assert again.axes == ("warmth", "formality", "calm")
        assert await content(again) == before
        await again.upsert_latest(state("bob", 1, axes={"calm": 1.0}))
        assert (await again.search_similar({"calm": 0.9}, limit=1))[0].snapshot.user_id == "bob"
        await again.aclose()
        with pytest.raises(SchemaMismatchError):
            await open_store(axes=("warmth", "formality"))

    async def test_axes_that_cannot_be_added_leave_the_directory_as_it_was(
        self, open_store: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where what is written anew does not take the place of the old, that stays, and works on."""
        store = await open_store(axes=("warmth", "formality"))
        await store.upsert_many([state("ann", at) for at in range(3)])
        engine = cast("Any", store)._operations.backend.engine

        async def fail(*arguments: Any, **options: Any) -> None:
            raise BackendError("no", backend="test", operation="replace")

        async with unchanged(store):
            with monkeypatch.context() as patch:
                patch.setattr(type(engine), "replace", fail)
                with pytest.raises(BackendError):
                    await store.alter_axes(add=["calm"])
        assert store.axes == ("warmth", "formality")
        await store.upsert_latest(state("ann", 5))
        assert await store.alter_axes(add=["calm"]) == ("warmth", "formality", "calm")
        assert len(await store.get_history("ann")) == 4

    async def test_other_axes_are_refused(self, open_store: Open) -> None:
        """Explicit axes that differ from the recorded ones are SchemaMismatchError, which shows both."""
        store = await open_store(axes=("energetic_arousal", "tense_arousal"))
        await store.upsert_latest(state(axes={"tense_arousal": 0.25}))
        before = await content(store)

        for _ in ("while it is open", "after it was closed"):
            with pytest.raises(SchemaMismatchError) as caught:
                await open_store(axes=("valence", "energetic_arousal"))
            assert "valence" in str(caught.value)
            assert "tense_arousal" in str(caught.value)
            await store.aclose()
        assert await content(await open_store()) == before

    @pytest.mark.parametrize(
        ("options", "size"),
        [
            ({}, 24),
            ({"axes": ("warmth", "formality")}, 2),
            ({"axes": ("warmth", "formality"), "vector_size": 8}, 8),
        ],
        ids=["canonical", "own", "with-room"],
    )
    async def test_vectors_have_one_dimension_for_each_axis_and_spare_ones(
        self, open_store: Open, tmp_path: Path, options: dict[str, Any], size: int
    ) -> None:
        """Canonical axes get 24 dimensions, others their number unless vector_size says more."""
        store = await open_store(**options)
        await store.upsert_latest(state())
        await store.aclose()

        assert {len(point.vector) for point in self.read_points(tmp_path / "store").values()} == {size}

    async def test_a_smaller_bound_applies_when_a_directory_is_opened_again(self, open_store: Open) -> None:
        """Bounds on history are of the store, not of the directory: reading obeys the present ones."""
        store = await open_store()
        await store.upsert_many([state(name, at) for name in ("ann", "bob") for at in range(5)])
        await store.aclose()

        again = await open_store(max_history_per_user=2)
        assert await again.get_history("ann") == [state("ann", 4), state("ann", 3)]
        assert await again.get_history("ann", until=NOW + 2) == []
        assert await again.count(history=True) == 4
        found = await again.search_similar({"warmth": 1.0}, limit=100, history=True)
        assert sorted(match.snapshot.updated_at_unix_ms - NOW for match in found) == [3, 3, 4, 4]
        await again.aclose()

        without = await open_store(enable_history=False)
        assert await content(without) == {name: (state(name, 4), []) for name in ("ann", "bob")}

    # Several stores on one directory

    async def test_stores_on_one_directory_share_it(self, open_store: Open) -> None:
        """Several stores of one process can be open on one directory, and each sees what the others write."""
        one, two = await open_store(), await open_store()

        await one.upsert_latest(state(at=1))
        assert await two.get_latest("ann") == state(at=1)
        await two.upsert_latest(state(at=2))
        assert await one.get_latest("ann") == state(at=2)
        await one.delete("ann")
        assert await content(two) == {}

    async def test_closing_one_store_leaves_the_others_open(self, open_store: Open) -> None:
        """The directory is closed with the last store on it."""
        one, two = await open_store(), await open_store()
        await one.upsert_latest(state())

        await one.aclose()
        await one.aclose()

        with pytest.raises(StoreClosedError):
            await one.get_latest("ann")
        await two.upsert_latest(state(at=1))
        assert await two.get_history("ann") == [state(at=1), state()]
        await two.aclose()
        assert await content(await open_store()) == {"ann": (state(at=1), [state(at=1), state()])}

    async def test_both_forms_share_a_directory(self, case: Case, open_store: Open, tmp_path: Path) -> None:
        """A synchronous and an asynchronous store can be open on one directory."""
        store = await open_store()
        await store.upsert_latest(state(at=1))
        backend = BACKENDS[case.backend]

        with backend.sync(tmp_path / "store") as other:
            assert other.get_latest("ann") == state(at=1)
            other.upsert_latest(state(at=2))
        async with backend.asynchronous(tmp_path / "store") as third:
            assert await third.get_latest("ann") == state(at=2)
            await third.upsert_latest(state(at=3))

        assert await store.get_latest("ann") == state(at=3)

    async def test_a_link_to_a_directory_is_that_directory(
        self, case: Case, open_store: Open, tmp_path: Path
    ) -> None:
        """A directory is known by its real path, however it is spelled."""
        store = await open_store()
        (tmp_path / "link").symlink_to(tmp_path / "store")

        (tmp_path / "other").mkdir()

        linked = await open_store(name="link")
        dotted = await open_store(name="other/../store")

        await linked.upsert_latest(state())
        assert await store.get_latest("ann") == await dotted.get_latest("ann") == state()

    @pytest.mark.parametrize(
        ("option", "first", "second"),
        [
            ("durability", "process", "power"),
            ("max_history_per_user", 12_345, 54_321),
            ("history_retention_days", 123, 321),
        ],
    )
    async def test_opening_an_open_directory_otherwise_is_an_error(
        self, open_store: Open, option: str, first: object, second: object
    ) -> None:
        """While a directory is open, other durability or retention is an error that names both."""
        store = await open_store(**{option: first})
        await store.upsert_latest(state())

        async with unchanged(store):
            with pytest.raises(StoreError) as caught:
                await open_store(**{option: second})
        assert str(first) in str(caught.value)
        assert str(second) in str(caught.value)

        await store.aclose()
        again = await open_store(**{option: second})
        assert await again.get_latest("ann") == state()

    async def test_collections_of_one_directory_are_apart(self, open_store: Open, tmp_path: Path) -> None:
        """Two collections in one directory share no user, and can be open at the same time."""
        one, two = await open_store(collection_name="one"), await open_store(collection_name="two")

        await one.upsert_latest(state("ann", 1))
        await two.upsert_latest(state("ann", 2))
        await two.upsert_latest(state("bob", 3))

        assert await content(one) == {"ann": (state("ann", 1), [state("ann", 1)])}
        assert await users_of(two) == ["ann", "bob"]
        await one.aclose()
        await two.aclose()
        assert len(self.read_points(tmp_path / "store", "one")) == 2
        assert len(self.read_points(tmp_path / "store", "two")) == 4

    # Options

    @pytest.mark.parametrize("size", [0, 1, 2])
    async def test_the_size_of_the_cache_changes_no_answer(self, open_store: Open, size: int) -> None:
        """A store with a tiny read cache, or none, answers as any other."""
        store = await open_store(cache_size=size)
        users = [f"user-{number}" for number in range(6)]

        for at in range(3):
            for user_id in users:
                await store.upsert_latest(state(user_id, at))
                assert await store.get_latest(user_id) == state(user_id, at)
                assert await store.get_latest(users[at]) is not None
        await store.delete(users[0])

        history = [2, 1, 0]
        assert await content(store) == {
            user_id: (state(user_id, 2), [state(user_id, at) for at in history]) for user_id in users[1:]
        }
        assert await store.get_many(users) == {user_id: state(user_id, 2) for user_id in users[1:]}

    async def test_bad_options_of_a_directory_are_refused(self, open_store: Open, tmp_path: Path) -> None:
        """Options that make no sense are ValidationError before anything is created."""
        options: list[dict[str, Any]] = [
            {"engine": "sqlite"},
            {"durability": "maximum"},
            {"lock_timeout": -1},
            {"lock_timeout": "long"},
            {"cache_size": -1},
            {"cache_size": 1.5},
            {"collection_name": ""},
            {"collection_name": "../escape"},
            {"collection_name": "a/b"},
            {"collection_name": ".."},
        ]
        for wrong in options:
            with pytest.raises(ValidationError):
                await open_store(**wrong)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("durability", ["process", "power"])
    async def test_both_durabilities_keep_what_was_written(self, open_store: Open, durability: str) -> None:
        """What was written with either durability is there after opening again."""
        store = await open_store(durability=durability)
        await store.upsert_many(PEOPLE)
        await store.patch("ann", {"warmth": 0.1})
        before = await content(store)
        await store.aclose()

        assert await content(await open_store(durability=durability)) == before

    async def test_an_existing_directory_is_opened_with_the_engine_that_wrote_it(
        self, case: Case, open_store: Open
    ) -> None:
        """engine="auto" recognises a directory by its files."""
        store = await open_store()
        await store.upsert_latest(state())
        await store.aclose()

        again = await open_store(engine="auto")

        assert (await again.health()).backend == case.backend
        assert await again.get_latest("ann") == state()

    async def test_a_directory_is_not_opened_with_another_engine(
        self, case: Case, open_store: Open, tmp_path: Path
    ) -> None:
        """Asking for another engine than the one that wrote a directory is an error, and changes no file."""
        store = await open_store()
        await store.upsert_latest(state())
        before = await content(store)
        await store.aclose()
        files = sorted(tmp_path.rglob("*"))

        with pytest.raises(StoreError):
            await open_store(engine="local" if case.backend == "edge" else "edge")

        assert sorted(tmp_path.rglob("*")) == files
        assert await content(await open_store()) == before

    # Bad directories

    async def test_a_file_is_no_directory(self, open_store: Open, tmp_path: Path) -> None:
        """A path that is a file is an error that names it, and the file stays as it was."""
        (tmp_path / "store").write_text("precious")

        with pytest.raises(StoreError, match="store"):
            await open_store()

        assert (tmp_path / "store").read_text() == "precious"

    async def test_a_directory_that_cannot_be_created_is_an_error(self, case: Case, tmp_path: Path) -> None:
        """A path below a file is an error of the library, not of the operating system."""
        (tmp_path / "file").write_text("precious")

        with pytest.raises(StoreError):
            await case.open(tmp_path / "file" / "store")

        assert (tmp_path / "file").read_text() == "precious"

    async def test_a_directory_that_cannot_be_written_is_an_error(self, case: Case, read_only: Path) -> None:
        """A read-only place is an error that names it."""
        with pytest.raises(StoreError, match=read_only.name):
            await case.open(read_only / "store")


HOLD = """
import sys
from attuned_store import QdrantStore
store = QdrantStore(path=sys.argv[1], engine=sys.argv[2])
print("open", flush=True)
sys.stdin.read()
"""
OPEN = """
import sys
from attuned_store import QdrantStore, StoreLockedError
try:
    QdrantStore(path=sys.argv[1], engine=sys.argv[2])
except StoreLockedError as error:
    print(error)
"""
WRITE_AND_DIE = """
import os, signal, sys
from attuned_store import QdrantStore, StateSnapshot
store = QdrantStore(path=sys.argv[1], engine=sys.argv[2], durability=sys.argv[3])
for number in range(100):
    store.upsert_latest(StateSnapshot(f"user-{number % 10}", {"warmth": number / 100}, number))
    print(number, flush=True)
store.delete("user-0")
os.kill(os.getpid(), signal.SIGKILL)
"""
WRITE_AT_EXIT = """
import atexit, sys
from attuned_store import QdrantStore, StateSnapshot, StoreClosedError
def write(when):
    try:
        store.upsert_latest(StateSnapshot(when, {"warmth": 0.25}))
    except StoreClosedError:
        print(when, "it was closed")
atexit.register(write, "before")
store = QdrantStore(path=sys.argv[1], engine=sys.argv[2])
atexit.register(write, "after")
"""
WRITE_AND_LEAVE = """
import sys
from attuned_store import QdrantStore, StateSnapshot
store = QdrantStore(path=sys.argv[1], engine=sys.argv[2])
store.upsert_many([StateSnapshot(f"user-{number}", {"warmth": 0.25}, number) for number in range(100)])
"""
WRITE_ASYNC_AND_LEAVE = """
import asyncio, sys
from attuned_store import AsyncQdrantStore, StateSnapshot
store = AsyncQdrantStore(path=sys.argv[1], engine=sys.argv[2])
states = [StateSnapshot(f"user-{number}", {"warmth": 0.25}, number) for number in range(100)]
asyncio.run(store.upsert_many(states))
"""
FORK = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from attuned_store import QdrantStore, StateSnapshot, StoreError
store = QdrantStore(path=sys.argv[1], engine=sys.argv[2])
store.upsert_latest(StateSnapshot("before", {}, 1))
child = os.fork()
if child == 0:
    read = lambda: store.get_latest("before")
    write = lambda: store.upsert_latest(StateSnapshot("child", {}, 1))
    for call in (read, write):
        try:
            print("no error", call(), flush=True)
        except StoreError as error:
            print(error, flush=True)
    store.close()
    os._exit(0)
os.waitpid(child, 0)
store.upsert_latest(StateSnapshot("after", {}, 1))
store.close()
"""


class EmbeddedProcessTests(EmbeddedKit):
    """What an embedded store does when there is more than one process, or one ends early."""

    faces: ClassVar[tuple[str, ...]] = ("sync",)

    def test_one_process_owns_a_directory(self, case: Case, tmp_path: Path) -> None:
        """A second process gets StoreLockedError with the path, and the first goes on."""
        path = tmp_path / "store"
        with case.open_sync(path) as store:
            store.upsert_latest(state())
            second = run_python(OPEN, path, case.backend)
            store.upsert_latest(state(at=1))

        assert str(path) in second.stdout, second.stderr
        assert len(self.read_points(path)) == 3

    def test_a_directory_of_another_process_is_locked(self, case: Case, tmp_path: Path) -> None:
        """Opening what another process holds is StoreLockedError; once it is free, it opens."""
        path = tmp_path / "store"
        with holding(path, case.backend) as release:
            with pytest.raises(StoreLockedError, match=path.name):
                case.open_sync(path)
            release()

        with case.open_sync(path) as store:
            assert store.count() == 0

    def test_opening_can_wait_for_another_process(self, case: Case, tmp_path: Path) -> None:
        """With lock_timeout a store waits until the other process has closed."""
        path = tmp_path / "store"
        with holding(path, case.backend) as release:
            threading.Thread(target=release).start()
            with case.open_sync(path, lock_timeout=60.0) as store:
                store.upsert_latest(state())

        assert len(self.read_points(path)) == 2

    @pytest.mark.parametrize("durability", ["process", "power"])
    def test_acknowledged_writes_survive_a_killed_process(
        self, case: Case, tmp_path: Path, durability: str
    ) -> None:
        """What was acknowledged before kill -9 is there, and the directory opens again."""
        path = tmp_path / "store"
        killed = run_python(WRITE_AND_DIE, path, case.backend, durability)
        assert killed.stdout.split() == [str(number) for number in range(100)], killed.stderr
        assert killed.returncode == -9

        with case.open_sync(path) as store:
            assert sorted(store.users()) == [f"user-{number}" for number in range(1, 10)]
            for number in range(1, 10):
                history = store.get_history(f"user-{number}")
                assert [s.updated_at_unix_ms for s in history] == list(range(90 + number, 0, -10))
                assert store.get_latest(f"user-{number}") == history[0]

    @pytest.mark.parametrize("code", [WRITE_AND_LEAVE, WRITE_ASYNC_AND_LEAVE], ids=["sync", "async"])
    def test_a_script_that_does_not_close_ends_quietly(self, case: Case, tmp_path: Path, code: str) -> None:
        """Not closing a store is no warning and loses nothing."""
        path = tmp_path / "store"
        left = run_python(code, path, case.backend)

        assert (left.returncode, left.stdout, left.stderr) == (0, "", "")
        with case.open_sync(path) as store:
            assert store.count() == store.count(history=True) == 100

    def test_a_handler_registered_after_opening_still_writes_at_exit(
        self, case: Case, tmp_path: Path
    ) -> None:
        """A handler of atexit from after the opening finds the store open, one from before it closed."""
        path = tmp_path / "store"
        left = run_python(WRITE_AT_EXIT, path, case.backend)

        assert (left.returncode, left.stdout, left.stderr) == (0, "before it was closed\n", "")
        with case.open_sync(path) as store:
            assert list(store.users()) == ["after"]

    def test_a_forked_child_is_told_to_open_its_own_store(self, case: Case, tmp_path: Path) -> None:
        """A store inherited by a forked child raises StoreError, and the parent loses nothing."""
        path = tmp_path / "store"
        forked = run_python(FORK, path, case.backend)

        assert forked.returncode == 0, forked.stderr
        lines = forked.stdout.splitlines()
        assert len(lines) == 2
        assert all("after the fork" in line for line in lines), lines
        with case.open_sync(path) as store:
            assert sorted(store.users()) == ["after", "before"]


@contextmanager
def holding(path: Path, engine: str) -> Iterator[Callable[[], None]]:
    """Another process that holds a directory open until the function is called, or the block ends."""
    with subprocess.Popen(
        script(HOLD, path, engine),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        try:
            yield process.stdin.close
        finally:
            process.stdin.close()

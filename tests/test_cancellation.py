"""Cancelled at every await, interrupted at every line: done or not done, and the next operation works."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import linecache
import os
import shutil
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import anyio
import pytest
from conformance import BACKENDS, fill_memory, needs, state

import attuned_store
from attuned_store import (
    AsyncMemoryStore,
    AsyncStateStore,
    MemoryStore,
    SnapshotError,
    StateSnapshot,
    StateStore,
    list_snapshots,
    verify_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator

LONG = 60.0
OPTIONS: dict[str, Any] = {"max_history_per_user": 3}
MANY = 150  # snapshots of a batch: three steps
BATCH = [state(f"batch-{number % 3}", number) for number in range(MANY)]
Shown = dict[str, tuple[StateSnapshot | None, list[StateSnapshot]]]

pytestmark = [pytest.mark.faults, pytest.mark.once, pytest.mark.usefixtures("clock")]


@pytest.fixture(autouse=True)
def turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores on Edge let other tasks run before every step, not only every 5 ms."""
    monkeypatch.setattr(attuned_store.Suspending, "TURN_S", -1.0)


# ------------------------------------------------------------------------------
# Operations
# ------------------------------------------------------------------------------


async def all_users(store: AsyncStateStore) -> list[str]:
    return [user_id async for user_id in store.users()]


async def all_items(store: AsyncStateStore) -> list[tuple[str, StateSnapshot]]:
    return [item async for item in store.items()]


def newer(found: StateSnapshot | None) -> StateSnapshot:
    assert found is not None
    return found.patched({"warmth": 0.125})


async def newer_later(found: StateSnapshot | None) -> StateSnapshot:
    await anyio.lowlevel.checkpoint()
    return newer(found)


READING: dict[str, Callable[[Any], Any]] = {
    "get_latest": lambda store: store.get_latest("ann"),
    "get_many": lambda store: store.get_many([f"batch-{number}" for number in range(MANY)]),
    "get_history": lambda store: store.get_history("ann"),
    "search": lambda store: store.search_similar("ann"),
    "search of history": lambda store: store.search_similar({"warmth": 1.0}, history=True),
    "count": lambda store: store.count(),
    "count of history": lambda store: store.count(history=True),
    "health": lambda store: store.health(),
}
ADDED = itertools.count()  # an axis that was added cannot be added again
WRITING: dict[str, Callable[[Any], Any]] = {
    "write": lambda store: store.upsert_latest(state("ann", 9)),
    "older write": lambda store: store.upsert_latest(state("ann", 0)),
    "conditional write": lambda store: store.upsert_latest(state("ann", 9), expected=state("ann", 3)),
    "new user": lambda store: store.upsert_latest(state("new", 1), expected=None),
    "batch": lambda store: store.upsert_many(BATCH),
    "patch": lambda store: store.patch("ann", {"warmth": 0.25}),
    "update": lambda store: store.update("ann", newer),
    "delete": lambda store: store.delete("ann"),
    "prune": lambda store: store.prune(),
    "alter axes": lambda store: store.alter_axes(add=[f"mood_{next(ADDED)}"]),
}
ASYNC: dict[str, Callable[[Any], Any]] = {
    **READING,
    **WRITING,
    "users": all_users,
    "items": all_items,
    "update with an async function": lambda store: store.update("ann", newer_later),
}
SOME = ("write", "update with an async function", "delete")
ALL = bool(os.environ.get("ATTUNED_TEST_LONG"))  # also where it takes long
BEGINNING = [*(state("ann", at) for at in (1, 2, 3)), state("bob", 1)]


def shown(store: StateStore) -> Shown:
    return {user_id: (store.get_latest(user_id), store.get_history(user_id)) for user_id in store.users()}


@functools.cache
def outcomes(name: str) -> list[Shown]:
    """What a store may show in the end: nothing was done, or all, or in a batch a beginning."""
    store = MemoryStore(**OPTIONS)
    store.upsert_many(BEGINNING)
    found = [shown(store)]
    if name == "batch":
        for snapshot in BATCH:
            store.upsert_latest(snapshot)
            found.append(shown(store))
    elif name in WRITING:
        WRITING[name](store)
        found.append(shown(store))
    elif name not in READING:
        store.update("ann", newer)
        found.append(shown(store))
    return found


# ------------------------------------------------------------------------------
# Cancellation
# ------------------------------------------------------------------------------


@types.coroutine
def watched(
    flow: Coroutine[Any, Any, Any], at: int, cancel: Callable[[], object]
) -> Generator[Any, Any, int]:
    """Run a coroutine and call a function when it waits for the so-many-th time; returns how often it did."""
    send: Callable[[], Any] = functools.partial(flow.send, None)
    for count in itertools.count(1):
        try:
            request = send()
        except StopIteration:
            return count - 1
        if count == at:
            cancel()
        try:
            answer = yield request
        except BaseException as error:  # noqa: BLE001 - it belongs into the coroutine
            send = functools.partial(flow.throw, error)
        else:
            send = functools.partial(flow.send, answer)
    raise AssertionError("unreachable")


async def waits_of(awaitable: Awaitable[Any], at: int, how: str) -> int | None:
    """Cancel what waits for the so-many-th time; None if that was done, else how often it waited."""

    async def flow() -> Any:
        return await awaitable

    if how == "task.cancel()":
        task: asyncio.Task[int]
        inner = watched(flow(), at, lambda: task.cancel())  # noqa: PLW0108 - there is no task yet
        task = asyncio.create_task(cast("Coroutine[Any, Any, int]", as_coroutine(inner)))
        (answer,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(answer, asyncio.CancelledError):
            return None
        if isinstance(answer, BaseException):
            raise answer
        return answer if answer < at else None
    with anyio.CancelScope() as scope:
        count = await watched(flow(), at, scope.cancel)
        return count if count < at else None
    return None


async def as_coroutine(awaitable: Any) -> Any:
    return await awaitable


SETTINGS = [
    pytest.param(backend, options, how, id=f"{backend}{'-power' if options else ''}-{how}", marks=marks)
    for backend, options in (
        ("memory", {}),
        ("edge", {}),
        ("edge", {"durability": "power"}),
        ("local", {}),
        ("local", {"durability": "power"}),
        ("server", {}),
    )
    for how in ("asyncio", "trio", "task.cancel()")
    for marks in [needs(BACKENDS[backend].library, "trio" if how == "trio" else None)]
]


async def content(store: AsyncStateStore) -> Shown:
    return {
        user_id: (await store.get_latest(user_id), await store.get_history(user_id))
        for user_id in await all_users(store)
        if user_id != "next"
    }


async def begin(store: AsyncStateStore, found: Shown) -> None:
    """Make the store what it was in the beginning."""
    for user_id in {*found} - {"bob"}:
        await store.delete(user_id)
    await store.upsert_many(BEGINNING)


@pytest.mark.filterwarnings(
    "ignore:Async generator 'httpx:ResourceWarning"
)  # trio tells of what httpx leaves
@pytest.mark.parametrize(("backend", "options", "how"), SETTINGS)
def test_every_operation_can_be_cancelled_at_every_await(
    tmp_path: Path, backend: str, options: dict[str, Any], how: str
) -> None:
    """Whichever await an operation is cancelled at, it is done or not done, and the next ones work."""
    slow = backend == "server" or (backend == "edge" and bool(options))
    operations = {name: ASYNC[name] for name in (SOME if slow and not ALL else ASYNC)}

    async def main() -> None:
        async with BACKENDS[backend].asynchronous(tmp_path / "store", **OPTIONS, **options) as store:
            await store.upsert_many(BEGINNING)
            for name, operation in operations.items():
                for at in itertools.count(1):
                    with anyio.fail_after(LONG):
                        waits = await waits_of(operation(store), at, how)
                        await store.upsert_latest(state("next", at))
                        found = await content(store)
                    assert possible(found, name, backend), (name, at, found)
                    if found != outcomes(name)[0]:
                        await begin(store, found)
                    if waits is not None:
                        break

    anyio.run(main, backend="trio" if how == "trio" else "asyncio")
    gc.collect()  # a coroutine that was never awaited would complain now


def possible(found: Shown, name: str, backend: str) -> bool:
    """Whether a store may show this; a server may show a batch in any order, and what it is about to do."""
    if backend == "server" and name == "batch":
        return all(latest is not None and history for latest, history in found.values())
    return found in outcomes(name)


# ------------------------------------------------------------------------------
# Interrupts
# ------------------------------------------------------------------------------

SYNC = {**READING, **WRITING, "users": list}
SOME_SYNC = ("write", "delete")


class Interrupt:
    """Raises KeyboardInterrupt at the so-many-th line of attuned_store.py that a call comes to."""

    def __init__(self, at: int) -> None:
        self._left = at
        self._file = attuned_store.__file__

    def run(self, call: Callable[[], object]) -> bool:
        """Whether the call came to that line."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    def _enter(self, frame: Any, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename == self._file else None

    def _line(self, frame: Any, event: str, argument: object) -> Any:
        # Python lets no signal in at a `try:`, and none between the end of a block and that of its `with`.
        text = linecache.getline(self._file, frame.f_lineno).lstrip()
        if event == "line" and not text.startswith(("with ", "try:")):
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
        return self._line


def check_interrupt(store: StateStore, name: str, at: int) -> bool:
    """Interrupt an operation at a line; returns whether it came so far."""
    store.upsert_latest(state("kept", at))
    store.delete("gone")
    came = Interrupt(at).run(functools.partial(SYNC[name], store))
    store.upsert_latest(state("next", at))
    everything = shown(store)
    found = {user_id: everything[user_id] for user_id in everything.keys() - {"next", "kept"}}
    assert found in outcomes(name), (name, at, found)
    matches = [match.snapshot for match in store.search_similar({"warmth": 1.0}, limit=100)]
    assert sorted(matches, key=str) == sorted((latest for latest, _ in everything.values()), key=str)
    assert store.count() == len(everything), (name, at)
    store.upsert_latest(state("gone", at))
    assert len(store.search_similar({"warmth": 1.0}, limit=100)) == len(everything) + 1
    if found != outcomes(name)[0]:
        for user_id in {*found} - {"bob"}:
            store.delete(user_id)
        store.upsert_many(BEGINNING)
    return came


# An interrupt between making a coroutine and running it leaves it as it is, which Python tells of.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param(
            backend,
            options,
            id=f"{backend}{'-power' if options else ''}",
            marks=needs(BACKENDS[backend].library),
        )
        for backend, options in (
            ("memory", {}),
            ("edge", {}),
            ("local", {}),
            ("local", {"durability": "power"}),
        )
    ],
)
def test_every_operation_can_be_interrupted_at_every_line(
    tmp_path: Path, backend: str, options: dict[str, Any]
) -> None:
    """Whichever line KeyboardInterrupt comes at, what it ends is done or not done, and the next ones work."""
    step = 1 if ALL else {"memory": 1, "edge": 3, "local": 9}[backend]
    with BACKENDS[backend].sync(tmp_path / "store", **OPTIONS, **options) as store:
        store.upsert_many(BEGINNING)
        for number, name in enumerate(SYNC if ALL or not options else SOME_SYNC):
            at = 1 + number % step
            while check_interrupt(store, name, at):
                at += step if at < 300 else at // 10  # a batch has thousands of lines
    gc.collect()


# ------------------------------------------------------------------------------
# Snapshots
# ------------------------------------------------------------------------------

TAKEN = Path("taken")  # files are named relative to the directory of the test
GIVEN = Path("given.attuned")
NATIVE = Path("native.snap")
STEP = 4  # states in a step: a few of them go into every operation
HELD = [state(user_id, at) for user_id in ("ann", "ben", "cleo", "dora", "eve") for at in (2, 9)]


def asynchronous(store: Any) -> bool:
    return isinstance(store, AsyncStateStore)


def memory_like(store: Any, states: list[StateSnapshot]) -> Any:
    """A store in memory of the same form."""
    other = AsyncMemoryStore(**OPTIONS) if asynchronous(store) else MemoryStore(**OPTIONS)
    fill_memory(other, states)
    return other


def twin(name: str, store: Any) -> Any:
    """The function of the library that works on stores of this form."""
    return getattr(attuned_store, f"a{name}" if asynchronous(store) else name)


def start(store: Any) -> Any:
    attuned_store.STARTS.clear()
    return twin("snapshot_on_start", store)(store)


TAKING: dict[str, Callable[[Any], Any]] = {
    "create": lambda store: store.create_snapshot(TAKEN, kind="portable"),
    "create and keep one": lambda store: store.create_snapshot(TAKEN, kind="portable", keep=1),
    "create as it is usual": lambda store: store.create_snapshot(TAKEN),  # on a server: native
    "start": start,
}
LOOKING: dict[str, Callable[[Any], Any]] = {
    "verify": lambda store: twin("verify_snapshot", store)(GIVEN),
    "list": lambda store: twin("list_snapshots", store)("."),
    "copy from": lambda store: twin("copy", store)(store, memory_like(store, [])),
}
RESTORING: dict[str, Callable[[Any], Any]] = {
    "replace": lambda store: store.restore_snapshot(GIVEN),
    "merge": lambda store: store.restore_snapshot(GIVEN, mode="merge"),
    "skip": lambda store: store.restore_snapshot(GIVEN, mode="skip"),
    "copy to": lambda store: twin("copy", store)(memory_like(store, HELD), store, replace=True),
}
RESTORING_NATIVE = {"replace by a native one": lambda store: store.restore_snapshot(NATIVE, unchecked=True)}
COMPLETED_BY = {"skip": "merge"}  # once it was interrupted; any other by itself


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a snapshot, where snapshots are taken, in small steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QDRANT_SNAPSHOT_ON_START", "1")
    monkeypatch.setenv("QDRANT_SNAPSHOT_DIR", str(TAKEN))
    for backend in (attuned_store.MemoryBackend, attuned_store.PointsBackend, attuned_store.SharedBackend):
        monkeypatch.setattr(backend, "batch_size", STEP)
    with MemoryStore(**OPTIONS) as store:
        store.upsert_many(HELD)
        cast("Path", store.create_snapshot("made").path).rename(GIVEN)
    yield tmp_path
    outcomes_of_restoring.cache_clear()


@functools.cache
def outcomes_of_restoring(name: str) -> list[Shown]:
    """What a store may show in the end: the old content, or the new, or what was added by some steps."""
    store = MemoryStore(**OPTIONS)
    store.upsert_many(BEGINNING)
    found = [shown(store)]
    if name in ("merge", "skip"):
        there = set(store)
        for snapshot in HELD:
            if name == "merge" or snapshot.user_id not in there:
                store.upsert_latest(snapshot)
                found.append(shown(store))
    elif name in RESTORING or name in RESTORING_NATIVE:
        found.append(shown(memory_like(store, HELD)))
    return found


def old_snapshot() -> None:
    """Make the directory one with an older snapshot, and nothing else."""
    shutil.rmtree(TAKEN, ignore_errors=True)
    TAKEN.mkdir()
    shutil.copy(GIVEN, TAKEN / "20200101T000000.000Z-memory.attuned")


def check_taken() -> None:
    """Every file with the name of a snapshot is whole, and there is one at any time."""
    whole = 0
    for report in list_snapshots(TAKEN):
        path = cast("Path", report.path)
        try:
            verify_snapshot(path)
        except SnapshotError:
            assert not path.exists()  # it was an older one
        else:
            whole += 1
            checksum = path.with_name(path.name + ".sha256")
            assert checksum.exists() == (report.kind == "native")
    assert whole


def unnamed() -> list[Path]:
    return list(TAKEN.glob(".attuned-*"))


async def restored(store: AsyncStateStore, name: str) -> None:
    """Do on a server what was interrupted there; then it is complete."""
    name = COMPLETED_BY.get(name, name)
    await {**RESTORING, **RESTORING_NATIVE}[name](store)
    assert await content(store) == outcomes_of_restoring(name)[-1]
    assert (await store.health()).status == "healthy"


async def make_native(store: AsyncStateStore) -> None:
    """Let the server make a snapshot of what is held, for its store to be replaced by."""
    await store.upsert_many(HELD)
    await store.delete("next")
    cast("Path", (await store.create_snapshot("made")).path).rename(NATIVE)
    await begin(store, await content(store))


async def check_cancelling(store: AsyncStateStore, name: str, at: int, how: str) -> int | None:
    """Cancel an operation at an await; None if that was done, else how often it waited."""
    old_snapshot()
    waits = await waits_of(SNAPSHOTS[name](store), at, how)
    assert how == "task.cancel()" or not unnamed()  # the thread of a task cancelled so goes on
    await store.upsert_latest(state("next", at))
    found = await content(store)
    outcomes = outcomes_of_restoring(name)
    if name in RESTORING or name in RESTORING_NATIVE:
        on_server = store.engine == "server"
        degraded = (await store.health()).status == "degraded"
        if not on_server:
            assert found in outcomes, (name, at, found)
            assert not degraded
        else:
            assert degraded or found in outcomes or name in ("merge", "skip"), (name, at, found)
            await restored(store, name)
        await begin(store, await content(store))
    else:
        assert found == outcomes[0], (name, at, found)
    check_taken()
    return waits


SNAPSHOTS = {**TAKING, **LOOKING, **RESTORING, **RESTORING_NATIVE}
PLAIN_SETTINGS = [setting for setting in SETTINGS if not setting.values[1]]


@pytest.mark.filterwarnings("ignore:Async generator 'httpx:ResourceWarning")  # as above
@pytest.mark.parametrize(("backend", "options", "how"), PLAIN_SETTINGS)
def test_every_operation_on_snapshots_can_be_cancelled_at_every_await(
    place: Path, backend: str, options: dict[str, Any], how: str
) -> None:
    """A snapshot is whole or not there, a store old or new, on a server marked until the next try."""
    on_server = backend == "server"
    step = 9 if on_server and not ALL else 1

    async def main() -> None:
        async with BACKENDS[backend].asynchronous(place / "store", **OPTIONS, **options) as store:
            if on_server:
                await make_native(store)
            await store.upsert_many(BEGINNING)
            for number, name in enumerate(SNAPSHOTS):
                if name in RESTORING_NATIVE and not on_server:
                    continue
                for at in itertools.count(1 + number % step, step):
                    with anyio.fail_after(LONG):
                        if await check_cancelling(store, name, at, how) is not None:
                            break

    anyio.run(main, backend="trio" if how == "trio" else "asyncio")
    gc.collect()


def resumed(store: StateStore, name: str) -> None:
    """As `restored`, for a synchronous store."""
    name = COMPLETED_BY.get(name, name)
    store.delete("next")
    RESTORING[name](store)
    assert shown(store) == outcomes_of_restoring(name)[-1]
    assert store.health().status == "healthy"


def check_interrupt_of_snapshot(store: StateStore, name: str, at: int) -> bool:
    """Interrupt an operation on snapshots at a line; returns whether it came so far."""
    old_snapshot()
    came = Interrupt(at).run(functools.partial(SNAPSHOTS[name], store))
    check_taken()
    store.upsert_latest(state("next", at))
    path = cast("Path", store.create_snapshot(TAKEN, kind="portable").path)  # past all that is remembered
    assert not unnamed(), (name, at)
    found = shown(store)
    with MemoryStore(**OPTIONS) as other:
        other.restore_snapshot(path)
        assert shown(other) == found, (name, at)
    del found["next"]
    if store.engine == "server" and name in RESTORING:
        assert store.health().status == "degraded" or possible(found, "batch", "server"), (name, at, found)
        resumed(store, name)
    else:
        assert found in outcomes_of_restoring(name), (name, at, found)
    for user_id in {*store} - {"bob"}:
        store.delete(user_id)
    store.upsert_many(BEGINNING)
    return came


# An interrupt between making a file and entering its block leaves it to Python to close, which tells of it.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # as above
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=needs(BACKENDS[name].library)) for name in BACKENDS]
)
def test_every_operation_on_snapshots_can_be_interrupted_at_every_line(place: Path, backend: str) -> None:
    """After Ctrl-C a snapshot is whole or not there, a store old or new, on a server marked."""
    few, many = {"memory": (31, 1), "edge": (211, 5), "local": (211, 5)}.get(backend, (701, 11))
    step = many if ALL else few
    with BACKENDS[backend].sync(place / "store", **OPTIONS) as store:
        store.upsert_many(BEGINNING)
        for number, name in enumerate([*TAKING, *LOOKING, *RESTORING]):
            at = 1 + number % step
            while check_interrupt_of_snapshot(store, name, at):
                at += step if at < 3_000 else at // 10
    gc.collect()

"""Stores on the embedded engines in trouble: failures, threads, forks, odd directories."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import random
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from conformance import (
    BACKENDS,
    DAY,
    NOW,
    OPEN,
    Awaited,
    Clock,
    EmbeddedKit,
    holding,
    needs,
    run,
    run_python,
    state,
)
from test_edge import EdgeKit
from test_local import LocalKit

import attuned_store
from attuned_store import (
    AsyncQdrantStore,
    AsyncStateStore,
    BackendError,
    MemoryStore,
    QdrantStore,
    SchemaMismatchError,
    StateSnapshot,
    StateStore,
    StoreClosedError,
    StoreError,
    StoreLockedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

T = TypeVar("T")
Shown = dict[str, tuple[StateSnapshot | None, list[StateSnapshot]]]
Engine = Literal["edge", "local"]
Listing = dict[str, tuple[int, str] | None]

LONG = 60.0  # seconds: what is waited for comes at once, unless something is broken
LOOPS = [pytest.param("asyncio"), pytest.param("trio", marks=needs("trio"))]
ENGINES = [pytest.param(name, marks=needs(BACKENDS[name].library)) for name in ("edge", "local")]
KITS: dict[str, EmbeddedKit] = {"edge": EdgeKit(), "local": LocalKit()}


@pytest.fixture(params=ENGINES, scope="module")
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each of the embedded engines."""
    return cast("Engine", request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory that is not there yet."""
    return tmp_path / "store"


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns a thousand times as often, so that races are lost more often too."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


# ------------------------------------------------------------------------------
# Small helpers
# ------------------------------------------------------------------------------


def only_on(names: str, *values: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Parameters of which the first is the engine, skipped where its library is missing."""
    marked = [pytest.param(*each, marks=needs(BACKENDS[each[0]].library)) for each in values]
    return pytest.mark.parametrize(names, marked)


def shown(store: StateStore) -> Shown:
    """All that a store shows."""
    return {
        user_id: (store.get_latest(user_id), store.get_history(user_id, 1_000_000))
        for user_id in sorted(store.users())
    }


def kept(path: Path, engine: Engine, maximum: int = 100) -> Shown:
    """What the files of a closed directory hold, read without the store, cut as history is cut."""
    latest: dict[str, StateSnapshot] = {}
    history: dict[str, list[StateSnapshot]] = {}
    for point in KITS[engine].read_points(path).values():
        fields = {key: value for key, value in point.payload.items() if key in SNAPSHOT_FIELDS}
        snapshot = StateSnapshot(**fields)
        if point.payload["kind"] == "latest":
            latest[snapshot.user_id] = snapshot
        else:
            history.setdefault(snapshot.user_id, []).append(snapshot)
    assert history.keys() <= latest.keys(), "history without a latest state"
    return {
        user_id: (latest[user_id], sorted(history.get(user_id, []), key=time_of, reverse=True)[:maximum])
        for user_id in sorted(latest)
    }


SNAPSHOT_FIELDS = {"user_id", "axes", "updated_at_unix_ms", "source", "confidence", "schema_version"}


def time_of(snapshot: StateSnapshot) -> int:
    return snapshot.updated_at_unix_ms


def close_and_check(store: StateStore, path: Path, engine: Engine, **options: Any) -> Shown:
    """What a store shows is of one mind, is what its files hold, and is there when it is opened again."""
    seen = shown(store)
    for user_id, (latest, history) in seen.items():
        assert history[0] == latest, user_id
    assert store.count() == len(seen)
    assert store.count(history=True) == sum(len(history) for _, history in seen.values())
    store.close()
    assert kept(path, engine, options.get("max_history_per_user", 100)) == seen
    with QdrantStore(path=path, engine=engine, **options) as again:
        assert shown(again) == seen
    return seen


def is_open(path: Path) -> bool:
    return str(path.resolve()) in attuned_store.OPEN.directories


def engine_of(store: StateStore | AsyncStateStore) -> Any:
    """The engine below a store."""
    return cast("Any", store)._operations.place.directory.engine


def run_file(path: Path, code: str, *arguments: object) -> list[str]:
    """The lines that a script in a file of its own prints; it must end well and complain of nothing."""
    file = path / "script.py"
    file.write_text(code, encoding="utf-8")
    main = f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({str(file)!r}, run_name='__main__')"
    done = run_python(main, file, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout.splitlines()


async def in_thread(call: Callable[[], T]) -> T:
    """Wait for a thread without holding up the event loop."""
    return await anyio.to_thread.run_sync(call, abandon_on_cancel=True)


def join_workers() -> None:
    """Wait for the worker threads that a finished asyncio loop left behind; trio's are idle."""
    for thread in threading.enumerate():
        if thread.name.startswith("AnyIO"):
            thread.join(LONG)


def is_locked(path: Path) -> bool:
    """Whether the operating system's lock of a directory is held, by this process or another."""
    try:
        attuned_store.LockFile(path / ".attuned_store.lock").release()
    except BlockingIOError:
        return True
    return False


# ------------------------------------------------------------------------------
# Several collections
# ------------------------------------------------------------------------------


def test_a_collection_that_was_refused_can_be_opened_rightly(engine: Engine, path: Path) -> None:
    """A collection that was asked for with other axes can then be opened with its own."""
    with QdrantStore(path=path, engine=engine, collection_name="one", axes=["warmth"]) as store:
        store.upsert_latest(state(axes={"warmth": 0.25}))

    with QdrantStore(path=path, engine=engine, collection_name="two"):
        with pytest.raises(SchemaMismatchError):
            QdrantStore(path=path, engine=engine, collection_name="one", axes=["formality"])
        with QdrantStore(path=path, engine=engine, collection_name="one") as store:
            assert store.axes == ("warmth",)
            assert store.count() == 1


# ------------------------------------------------------------------------------
# Failure in the middle
# ------------------------------------------------------------------------------

SHORT: Any = {"max_history_per_user": 3}
OPERATIONS: dict[str, Callable[[StateStore, str], object]] = {
    "write": lambda store, name: store.upsert_latest(state(f"{name} ann", 10)),
    "older": lambda store, name: store.upsert_latest(state(f"{name} bob", 0)),
    "batch": lambda store, name: store.upsert_many(
        [state(f"{name} {who}", 10 + at) for at in range(4) for who in ("ann", "cyd", "bob")]
    ),
    "delete": lambda store, name: store.delete(f"{name} ann"),
}
# Each operation meets its failure among users who were in the cache or not, and is tried again or not.
GROUPS = {
    f"{operation} {cache} {then}": operation
    for operation in OPERATIONS
    for cache in ("cold", "warm")
    for then in ("again", "left")
}


def beginning(name: str) -> list[StateSnapshot]:
    """What there is of a group: the history of ann is full, that of bob is not."""
    return [
        state(f"{name} {who}", at) for who, at in (("ann", 1), ("ann", 2), ("ann", 3), ("bob", 1), ("bob", 2))
    ]


def shown_of(store: StateStore, name: str) -> Shown:
    return {user_id: entry for user_id, entry in shown(store).items() if user_id.startswith(name)}


def done(name: str, *operations: str) -> Shown:
    """What a store shows of a group to which nothing has happened but these operations."""
    store = MemoryStore(**SHORT)
    store.upsert_many(beginning(name))
    for operation in operations:
        OPERATIONS[operation](store, name)
    return shown(store)


Break = Callable[[StateStore, pytest.MonkeyPatch], AbstractContextManager[object]]


class Stumbling:
    """A shard whose update fails, before or after it has done its work, at one of the calls of a write."""

    def __init__(self, shard: Any, error: BaseException, *, applied: bool, call: int) -> None:
        self._shard, self._error, self._applied, self._left = shard, error, applied, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shard, name)

    def update(self, operation: Any) -> None:
        self._left -= 1
        if self._left or self._applied:
            self._shard.update(operation)
        if not self._left:
            raise self._error


def stumble(error: BaseException, *, applied: bool, call: int = 1) -> Break:
    """The shard of Edge fails for the time being."""

    @contextmanager
    def broken(store: StateStore, patch: pytest.MonkeyPatch) -> Iterator[None]:
        shards = engine_of(store)._shards
        patch.setitem(
            shards, "attuned_state", Stumbling(shards["attuned_state"], error, applied=applied, call=call)
        )
        yield

    return broken


@contextmanager
def no_flush(store: StateStore, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Edge cannot flush, which is tried at every write."""
    patch.setattr(attuned_store.EdgeEngine, "_FLUSH_EVERY", 1)
    shards = engine_of(store)._shards

    class Unflushed(Stumbling):
        def flush(self) -> None:
            raise OSError("no space left on device")

    patch.setitem(
        shards, "attuned_state", Unflushed(shards["attuned_state"], OSError(), applied=True, call=99)
    )
    yield


@contextmanager
def forgetful(store: StateStore, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """An interrupt comes after the engine has written, before the store has taken notice of all."""
    core: Any = store._operations.backend
    remember, forget = core._remember, core._forget
    left = iter([True])

    def interrupted(user_id: str, draft: Any) -> None:
        if next(left, False):
            remember(user_id, draft)
        raise KeyboardInterrupt

    def interrupted_forget(user_id: str) -> None:
        forget(user_id)
        if next(left, False):
            raise KeyboardInterrupt

    patch.setattr(core, "_remember", interrupted)
    patch.setattr(core, "_forget", interrupted_forget)
    yield


def connection_of(store: StateStore) -> sqlite3.Connection:
    connection: sqlite3.Connection = engine_of(store)._client.collections["attuned_state"].storage.storage
    return connection


@contextmanager
def full_disk(store: StateStore, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """SQLite may not grow: it fills what room there is, then says that the disk is full."""
    connection = connection_of(store)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages}")
    yield
    connection.execute("PRAGMA max_page_count=1073741823")


def failing_commit(error: BaseException, *, done: bool) -> Break:
    """The commit fails, before or after it has happened."""

    @contextmanager
    def broken(store: StateStore, patch: pytest.MonkeyPatch) -> Iterator[None]:
        class Failing(attuned_store.GroupedConnection):
            def commit(self) -> None:
                if done:
                    super().commit()
                raise error

        connection = connection_of(store)
        connection.__class__ = Failing
        yield
        connection.__class__ = attuned_store.GroupedConnection

    return broken


def interrupted_apply(*, after: int) -> Break:
    """An interrupt comes while points are taken into memory, which already are on disk."""

    @contextmanager
    def broken(store: StateStore, patch: pytest.MonkeyPatch) -> Iterator[None]:
        held = engine_of(store)._client.collections["attuned_state"]
        left = iter(range(after))

        def stumbling(method: Callable[..., T]) -> Callable[..., T]:
            def call(*arguments: Any, **options: Any) -> T:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return method(*arguments, **options)

            return call

        for name in ("_upsert_point", "_delete_ids"):
            patch.setattr(held, name, stumbling(getattr(held, name)))
        yield

    return broken


@contextmanager
def interrupted_before_apply(store: StateStore, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """An interrupt comes when the points are on disk, and none of them in memory."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    patch.setattr(attuned_store.LocalCollection, "take_in", interrupted)
    yield


FULL = sqlite3.OperationalError("database or disk is full")
IO = OSError("input/output error")
BREAKS: dict[str, tuple[str, Break]] = {
    "edge fails before": ("edge", stumble(IO, applied=False)),
    "edge fails after": ("edge", stumble(IO, applied=True)),
    "edge fails before deleting": ("edge", stumble(IO, applied=False, call=2)),
    "edge is interrupted before": ("edge", stumble(KeyboardInterrupt(), applied=False)),
    "edge is interrupted after": ("edge", stumble(KeyboardInterrupt(), applied=True)),
    "edge is interrupted before deleting": ("edge", stumble(KeyboardInterrupt(), applied=False, call=2)),
    "edge cannot flush": ("edge", no_flush),
    "edge, not remembered": ("edge", forgetful),
    "local, disk full": ("local", full_disk),
    "local, commit fails": ("local", failing_commit(FULL, done=False)),
    "local, interrupted before the commit": ("local", failing_commit(KeyboardInterrupt(), done=False)),
    "local, interrupted after the commit": ("local", failing_commit(KeyboardInterrupt(), done=True)),
    "local, interrupted between disk and memory": ("local", interrupted_before_apply),
    "local, interrupted at the first point": ("local", interrupted_apply(after=0)),
    "local, interrupted at the second point": ("local", interrupted_apply(after=1)),
    "local, not remembered": ("local", forgetful),
}
BEHIND = {"local, interrupted after the commit", "local, interrupted between disk and memory"}


@only_on("engine, name", *((engine, name) for name, (engine, _) in BREAKS.items()))
def test_what_fails_midway_is_done_or_not_done(
    path: Path, engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure within a write each user has the state before it or the one after it, on disk too."""
    with QdrantStore(path=path, engine=engine, **SHORT) as store:
        for group in GROUPS:
            store.upsert_many(beginning(group))
    store = QdrantStore(path=path, engine=engine, **SHORT)
    failed = set()

    for group, operation in GROUPS.items():
        act = partial(OPERATIONS[operation], store, group)
        if "warm" in group:
            shown_of(store, group)
        with monkeypatch.context() as patch, BREAKS[name][1](store, patch):
            try:
                act()
            except (BackendError, KeyboardInterrupt):
                failed.add(operation)
        before, seen, after = done(group), shown_of(store, group), done(group, operation)
        for user_id in before | after:
            assert seen.get(user_id) in (before.get(user_id), after.get(user_id)), (group, user_id)
        if "again" in group:
            act()
            assert shown_of(store, group) == after, group

    # A flush that nobody waits for is put off: all that was written is in the log.
    assert failed == set() if name == "edge cannot flush" else "batch" in failed
    store.upsert_latest(state("dee", 1))
    close_and_check(store, path, engine, **SHORT)
    with QdrantStore(path=path, engine=engine, **SHORT) as store:
        for group, operation in GROUPS.items():
            OPERATIONS[operation](store, group)
            assert shown_of(store, group) == done(group, operation), group


def test_nobody_sees_a_state_before_it_is_written(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a state is being written, reads that wait for nothing give the one before."""
    with QdrantStore(path=path, engine=engine) as store:
        store.upsert_latest(state("ann", 1))
        below, seen = engine_of(store), list[StateSnapshot | None]()
        write = below.apply

        async def watched(*arguments: Any) -> None:
            seen.append(store.get_latest("ann"))
            await write(*arguments)
            seen.append(store.get_latest("ann"))

        monkeypatch.setattr(below, "apply", watched)
        store.upsert_latest(state("ann", 2))

        assert seen == [state("ann", 1), state("ann", 1)]
        assert store.get_latest("ann") == state("ann", 2)


@needs("qdrant_client")
def test_a_full_disk_is_an_error_of_the_call_that_met_it(path: Path) -> None:
    """Writing goes on until there is no room; what was acknowledged is there, and no more."""
    store = QdrantStore(path=path, engine="local")
    written = list[str]()

    def fill() -> None:
        for number in range(10_000):
            store.upsert_latest(state(f"user-{number}", 1))
            written.append(f"user-{number}")

    with full_disk(store, pytest.MonkeyPatch()), pytest.raises(BackendError, match="full"):
        fill()

    assert close_and_check(store, path, "local").keys() == set(written)


@needs("qdrant_client")
def test_a_rebuild_that_fails_leaves_a_store_that_works(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a collection could not be loaded anew for once, the store goes on with the next call."""
    monkeypatch.setattr(attuned_store.LocalEngine, "_REBUILD_EVERY", 1)
    store = QdrantStore(path=path, engine="local")
    store.upsert_many([state("ann", 1), state("bob", 1)])

    def fail(self: object) -> None:
        raise OSError("too many open files")

    with monkeypatch.context() as patch, suppress(BackendError, OSError):
        patch.setattr(attuned_store.LocalEngine, "_connect", fail)
        store.delete("ann")

    store.upsert_latest(state("cyd"))
    assert close_and_check(store, path, "local").keys() >= {"bob", "cyd"}


# ------------------------------------------------------------------------------
# Threads and tasks
# ------------------------------------------------------------------------------

STEPS = 40


def awaited(store: StateStore) -> AsyncStateStore:
    return cast("AsyncStateStore", Awaited(store))


def bump(found: StateSnapshot | None) -> StateSnapshot:
    """One more than before: the number is in the time, too."""
    return state("counter", 1 if found is None else found.updated_at_unix_ms - NOW + 1)


async def busy(store: AsyncStateStore, twin: MemoryStore, worker: int, seed: int) -> None:
    """Many operations, on users of its own and on those of all, done to a store in memory as well."""
    source = random.Random(f"{seed} {worker}")
    for step in range(STEPS):
        mine = f"user-{worker}-{source.randrange(3)}"
        own = state(mine, source.randrange(8), {"warmth": source.random()})
        match source.randrange(8):
            case 0 | 1:
                await store.upsert_latest(own)
                twin.upsert_latest(own)
            case 2:
                several = [own, state(mine, source.randrange(8)), state("shared", 1_000 * step + worker)]
                await store.upsert_many(several)
                twin.upsert_many(several)
            case 3:
                everybody = state("everybody", worker + 8 * step)
                await store.upsert_latest(everybody)
                twin.upsert_latest(everybody)
            case 4:
                await store.update("counter", bump, attempts=1_000)
                twin.update("counter", bump, attempts=1_000)
            case 5:
                assert await store.delete(mine) == twin.delete(mine)
            case 6:
                latest = await store.get_latest("everybody")
                history = await store.get_history("everybody", 5)
                assert latest is None or history[0].updated_at_unix_ms >= latest.updated_at_unix_ms
                assert [s.updated_at_unix_ms for s in history] == sorted(map(time_of, history), reverse=True)
                assert latest is None or await store.get_many(["everybody", "nobody"])
            case _:
                found = await store.search_similar({"warmth": 1.0}, limit=3, history=True)
                assert [match.score for match in found] == sorted((m.score for m in found), reverse=True)
                assert [user async for user in store.users()].count(mine) == (mine in twin)
                await store.prune()
        assert await store.get_latest(mine) == twin.get_latest(mine)
        assert await store.get_history(mine) == twin.get_history(mine)


def in_threads(jobs: Iterable[Callable[[], object]]) -> None:
    """Run every job in a thread of its own, all beginning at one moment."""
    jobs = list(jobs)
    barrier = threading.Barrier(len(jobs))

    def begin(job: Callable[[], object]) -> object:
        barrier.wait(LONG)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        for answer in [pool.submit(begin, job) for job in jobs]:
            answer.result(LONG)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("stores", [1, 2])
def test_threads_lose_nothing(often: None, path: Path, engine: Engine, stores: int, seed: int) -> None:
    """Whatever eight threads do to one store, or to two on one path, all of it is there and nothing else."""
    options: Any = {"max_history_per_user": 1_000}
    opened = [QdrantStore(path=path, engine=engine, **options) for _ in range(stores)]
    twin = MemoryStore(**options)

    def job(worker: int) -> None:
        run(busy(awaited(opened[worker % stores]), twin, worker, seed))

    in_threads(partial(job, worker) for worker in range(8))

    assert shown(opened[0]) == shown(twin)
    for store in opened[1:]:
        store.close()
    assert close_and_check(opened[0], path, engine, **options) == shown(twin)


@pytest.mark.parametrize("loop", LOOPS)
def test_tasks_and_threads_share_a_path(often: None, path: Path, engine: Engine, loop: str) -> None:
    """Tasks of an asynchronous store and threads of a synchronous one, on one path, lose nothing."""
    options: Any = {"max_history_per_user": 1_000, "engine": engine}
    twin = MemoryStore(max_history_per_user=1_000)
    with QdrantStore(path=path, **options) as store:

        async def main() -> None:
            async with AsyncQdrantStore(path=path, **options) as other, anyio.create_task_group() as tasks:
                for worker in range(4):
                    tasks.start_soon(busy, other, twin, worker, 3)
                await in_thread(partial(in_threads, (partial(thread, worker) for worker in range(4, 8))))

        def thread(worker: int) -> None:
            run(busy(awaited(store), twin, worker, 3))

        anyio.run(main, backend=loop)
        assert close_and_check(store, path, **options) == shown(twin)


def test_many_threads_open_one_path_at_once(
    path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many threads open a path at once, it is opened once, and every store can write to it."""
    made = list[object]()
    original = attuned_store.Directory.__init__

    def counted(self: Any, *arguments: Any) -> None:
        made.append(self)
        original(self, *arguments)

    monkeypatch.setattr(attuned_store.Directory, "__init__", counted)
    stores = list[QdrantStore]()

    def open_and_write(number: int) -> None:
        store = QdrantStore(path=path, engine=engine)
        stores.append(store)
        store.upsert_latest(state(f"user-{number}", number))

    in_threads(partial(open_and_write, number) for number in range(16))

    assert len(made) == 1
    assert {id(engine_of(store)) for store in stores} == {id(engine_of(stores[0]))}
    for store in stores[1:]:
        store.close()
    assert len(close_and_check(stores[0], path, engine)) == 16
    assert not is_open(path)


def test_threads_open_and_close_one_path_again_and_again(path: Path, engine: Engine) -> None:
    """A path can be opened by some threads while others close it; no write is lost, no one is locked out."""

    def come_and_go(worker: int) -> None:
        for step in range(5):
            with QdrantStore(path=path, engine=engine) as store:
                store.upsert_latest(state(f"user-{worker}", step))

    in_threads(partial(come_and_go, worker) for worker in range(6))

    assert not is_open(path)
    found = kept(path, engine)
    assert {user: list(map(time_of, history)) for user, (_, history) in found.items()} == {
        f"user-{worker}": [NOW + step for step in reversed(range(5))] for worker in range(6)
    }


def test_closing_while_others_work_is_an_error_of_theirs(path: Path, engine: Engine) -> None:
    """Threads that work on while their store is closed get StoreClosedError, and what they wrote is there."""
    store = QdrantStore(path=path, engine=engine)
    some = threading.Event()
    acknowledged: list[dict[str, int]] = [{} for _ in range(4)]

    def write(worker: int) -> None:
        with suppress(StoreClosedError):
            for number in range(1_000_000):
                store.upsert_latest(state(f"user-{worker}", number))
                acknowledged[worker] = {f"user-{worker}": NOW + number}
                if number == 20:
                    some.set()

    def close() -> None:
        assert some.wait(LONG)
        store.close()

    in_threads([*(partial(write, worker) for worker in range(4)), close])

    for written in acknowledged:
        for user_id, time_ms in written.items():
            latest, _ = kept(path, engine)[user_id]
            assert latest is not None
            assert latest.updated_at_unix_ms in {time_ms, time_ms + 1}


def test_closing_and_collecting_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """One thread closes a store while another, in an operation on it, collects a third one unclosed."""
    answer = run_python(CLOSE_AND_COLLECT, tmp_path)

    assert answer.stdout.split() == ["done"], answer.stderr


CLOSE_AND_COLLECT = """
import gc, os, sys, threading
import attuned_store
from attuned_store import QdrantStore, StateSnapshot

path = sys.argv[1]
store = QdrantStore(path=path + "/one")
forgotten = [QdrantStore(path=path + "/two")]
engine = store._operations.place.directory.engine
write, inside = engine.apply, threading.Event()

async def collecting(*arguments):
    inside.set()
    closer.join(1)  # by now it holds what it takes to close, and waits for this operation
    forgotten.clear()
    gc.collect()
    return await write(*arguments)

engine.apply = collecting
closer = threading.Thread(target=lambda: inside.wait() and store.close(), daemon=True)
closer.start()
writer = threading.Thread(target=store.upsert_latest, args=[StateSnapshot("ann", {}, 1)], daemon=True)
writer.start()
writer.join(3)
print("deadlock" if writer.is_alive() else "done", flush=True)
os._exit(0)
"""

# ------------------------------------------------------------------------------
# Garbage
# ------------------------------------------------------------------------------


def overwrite(store: StateStore, twin: StateStore, source: random.Random, steps: int) -> None:
    """Overwrite and delete what twenty users have, here and in a store in memory."""
    for _ in range(steps):
        states = [state(f"user-{source.randrange(20)}", source.randrange(1_000_000)) for _ in range(30)]
        gone = f"user-{source.randrange(20)}"
        for each in (store, twin):
            each.upsert_many(states)
            each.delete(gone)


def used(path: Path) -> int:
    """The space that a directory takes, but for the log of Edge, which has a size of its own."""
    return sum(
        file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file() and "wal" not in file.parts
    )


@needs("qdrant_client")
def test_the_garbage_of_local_mode_is_collected(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often states are overwritten and deleted, local mode holds little more than what there is."""
    monkeypatch.setattr(attuned_store.LocalEngine, "_REBUILD_EVERY", 50)
    store, twin = QdrantStore(path=path, engine="local", **SHORT), MemoryStore(**SHORT)
    source = random.Random(11)

    for _ in range(20):
        overwrite(store, twin, source, 5)
        held = engine_of(store)._client.collections["attuned_state"]
        alive = len(held.ids) - int(held.deleted.sum())
        assert len(held.ids) == len(held.ids_inv) <= 2 * alive + 50 + 64
        assert shown(store) == shown(twin), "seed 11"

    assert alive == twin.count() + twin.count(history=True)
    assert close_and_check(store, path, "local", **SHORT) == shown(twin)


@needs("qdrant_edge")
def test_the_garbage_of_edge_is_collected(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """However often states are overwritten and deleted, the directory of Edge does not keep growing."""
    directory = tempfile.TemporaryDirectory()  # on a disk, where a sparse file takes what it holds
    request.addfinalizer(directory.cleanup)
    path = Path(directory.name)
    monkeypatch.setattr(attuned_store.EdgeEngine, "_FLUSH_EVERY", 300)
    monkeypatch.setattr(attuned_store.EdgeEngine, "_REBUILD_EVERY", 600)
    store, twin = QdrantStore(path=path, engine="edge", **SHORT), MemoryStore(**SHORT)
    source = random.Random(12)
    sizes = list[int]()

    for _ in range(16):
        overwrite(store, twin, source, 12)
        sizes.append(used(path))
    assert shown(store) == shown(twin), "seed 12"

    assert min(sizes[-4:]) < 1.3 * max(sizes[:4]), sizes
    assert close_and_check(store, path, "edge", **SHORT) == shown(twin)


# ------------------------------------------------------------------------------
# Locks and forks
# ------------------------------------------------------------------------------

RELOAD = """
import importlib, sys
import attuned_store

path, engine = sys.argv[1:]
store = attuned_store.QdrantStore(path=path, engine=engine)
store.upsert_latest(attuned_store.StateSnapshot("ann", {}, 1))
importlib.reload(attuned_store)
try:
    attuned_store.QdrantStore(path=path, engine=engine)
except attuned_store.StoreLockedError:
    store.close()
assert len(attuned_store.QdrantStore(path=path, engine=engine)) == 1
"""


def test_after_a_reload_closing_lets_go(path: Path, engine: Engine) -> None:
    """A store opened before the module was reloaded holds its directory until it is closed."""
    done = run_python(RELOAD, path, engine)
    assert done.returncode == 0, done.stderr


# The parent forks children that end in different ways, each after using the store that it inherited, and goes
# on; in the end a third process tries to open the directory.
FORKS = f"""
import os, subprocess, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from attuned_store import QdrantStore, StateSnapshot, StoreError, StoreLockedError, LockFile

path, engine = sys.argv[1:]
store = QdrantStore(path=path, engine=engine)
store.upsert_latest(StateSnapshot("before", {{}}, 1))

def use():
    for call in (len, list, lambda store: store["before"], lambda store: store.delete("before")):
        try:
            print("no error", call(store), flush=True)
        except StoreError as error:
            assert "after the fork" in str(error), error
    assert store.health().status == "unhealthy"
    try:
        print("no error", QdrantStore(path=path, engine=engine), flush=True)
    except StoreLockedError:
        pass
    with QdrantStore(path=path + "-of-child", engine=engine) as other:
        other.upsert_latest(StateSnapshot("child", {{}}, other.count()))
    store.close()
    store.close()

for number, how in enumerate(["os._exit", "sys.exit", "error", "end"]):
    child = os.fork()
    if not child:
        use()
        if how == "os._exit":
            os._exit(0)
        if how == "sys.exit":
            sys.exit(0)
        if how == "error":
            sys.stderr = open(os.devnull, "w")
            raise RuntimeError
        break
    _, status = os.waitpid(child, 0)
    for name in (".attuned_store.lock", ".lock") if engine == "local" else (".attuned_store.lock",):
        try:
            LockFile(os.path.join(path, name))
            print(name, "is not locked", flush=True)
        except BlockingIOError:
            pass
    print(how, os.waitstatus_to_exitcode(status), flush=True)
    store.upsert_latest(StateSnapshot(f"after-{{number}}", {{}}, 1))
else:
    third = subprocess.run(
        [sys.executable, "-c", {OPEN!r}, path, engine], capture_output=True, text=True, check=True
    )
    print("another process" in third.stdout, third.stderr)
"""


def test_the_parent_keeps_its_directory_however_a_child_ends(tmp_path: Path, engine: Engine) -> None:
    """A child gets errors from a store that it inherited, can open others, and takes nothing with it."""
    path = tmp_path / "store"

    assert run_file(tmp_path, FORKS, path, engine) == [
        "os._exit 0",
        "sys.exit 0",
        "error 1",
        "end 0",
        "True ",
    ]
    assert kept(path, engine).keys() == {"before", "after-0", "after-1", "after-2", "after-3"}
    assert kept(Path(f"{path}-of-child"), engine).keys() == {"child"}


FORK_AND_REOPEN = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from attuned_store import QdrantStore, StateSnapshot

path, engine = sys.argv[1:]
store = QdrantStore(path=path, engine=engine)
store.upsert_latest(StateSnapshot("before", {}, 1))
stay, leave = os.pipe()
if not os.fork():
    os.close(leave)
    os.read(stay, 1)  # until the parent has ended
    os._exit(0)
store.close()
with QdrantStore(path=path, engine=engine) as store:
    store.upsert_latest(StateSnapshot("after", {}, 1))
print("opened again")
"""


def test_a_child_that_lives_on_holds_no_directory(tmp_path: Path, engine: Engine) -> None:
    """A directory that the parent has closed can be opened while a forked child of it lives."""
    assert run_file(tmp_path, FORK_AND_REOPEN, tmp_path / "store", engine) == ["opened again"]


FORK_ASYNC = """
import asyncio, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from attuned_store import AsyncQdrantStore, QdrantStore, StateSnapshot, StoreError

path, engine = sys.argv[1:]

async def use(store):
    for call in (store.count, store.prune, lambda: store.get_latest("before")):
        try:
            print("no error", await call(), flush=True)
        except StoreError as error:
            assert "after the fork" in str(error), error
    await store.aclose()
    await store.aclose()
    async with AsyncQdrantStore(path=path + "-of-child", engine=engine) as other:
        await other.upsert_latest(StateSnapshot("child", {}, 1))

async def main():
    async with AsyncQdrantStore(path=path, engine=engine) as store:
        await store.upsert_latest(StateSnapshot("before", {}, 1))
        child = os.fork()
        if not child:
            asyncio._set_running_loop(None)
            asyncio.run(use(store))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        await store.upsert_latest(StateSnapshot("after", {}, 1))

asyncio.run(main())
"""


def test_a_child_gets_errors_from_an_asynchronous_store(tmp_path: Path, engine: Engine) -> None:
    """An asynchronous store that a child inherited raises at every use, and can be closed."""
    path = tmp_path / "store"

    assert run_file(tmp_path, FORK_ASYNC, path, engine) == ["0"]
    assert kept(path, engine).keys() == {"before", "after"}
    assert kept(Path(f"{path}-of-child"), engine).keys() == {"child"}


PROCESSES = """
import multiprocessing, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from attuned_store import QdrantStore, StateSnapshot, StoreError, StoreLockedError

store = None

def use(path, engine, answers):
    if store is not None:
        try:
            answers.put(("inherited", store.count()))
        except StoreError as error:
            answers.put(("inherited", "after the fork" in str(error)))
    try:
        answers.put(("the same path", QdrantStore(path=path, engine=engine).count()))
    except StoreLockedError:
        answers.put(("the same path", "locked"))
    with QdrantStore(path=path + "-of-child", engine=engine) as other:
        other.upsert_latest(StateSnapshot("child", {}, 1))
        answers.put(("another path", other.count()))

if __name__ == "__main__":
    path, engine, script = sys.argv[1], sys.argv[2], sys.argv[0]
    store = QdrantStore(path=path, engine=engine)
    for number, method in enumerate(("fork", "spawn")):
        context = multiprocessing.get_context(method)
        answers = context.SimpleQueue()
        child = context.Process(target=use, args=(path, engine, answers))
        child.start()
        child.join()
        found = [method, child.exitcode]
        while not answers.empty():
            found.append(answers.get())
        print(*found)
        store.upsert_latest(StateSnapshot(method, {}, 1))
    store.close()
"""


def test_processes_of_multiprocessing_open_stores_of_their_own(tmp_path: Path, engine: Engine) -> None:
    """Forked and spawned processes get errors from what is not theirs, and can open other directories."""
    path, file = tmp_path / "store", tmp_path / "script.py"
    file.write_text(PROCESSES, encoding="utf-8")
    launch = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"

    done = run_python(launch, file, path, engine)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "fork 0 ('inherited', True) ('the same path', 'locked') ('another path', 1)",
        "spawn 0 ('the same path', 'locked') ('another path', 1)",
    ]
    assert kept(path, engine).keys() == {"fork", "spawn"}


@pytest.mark.parametrize("loop", ["", *LOOPS], ids=["sync", "asyncio", "trio"])
def test_a_store_that_is_forgotten_gives_its_directory_free(path: Path, engine: Engine, loop: str) -> None:
    """A store that was never closed is closed when it is collected, and its writes are there."""
    if loop:

        async def write() -> None:
            store = AsyncQdrantStore(path=path, engine=engine)
            await store.upsert_latest(state())
            assert is_open(path)

        anyio.run(write, backend=loop)
    else:
        store = QdrantStore(path=path, engine=engine)
        store.upsert_latest(state())
        del store
    gc.collect()
    join_workers()
    gc.collect()

    assert not is_open(path)
    assert kept(path, engine).keys() == {"ann"}


def test_the_last_store_to_be_closed_gives_the_directory_free(path: Path, engine: Engine) -> None:
    """A directory stays open until the last of its stores is closed, however often one of them is."""
    options: Any = {"path": path, "engine": engine}
    first, second = QdrantStore(**options), QdrantStore(**options)
    third = QdrantStore(collection_name="other", **options)
    for _ in range(3):
        first.close()
    third.close()
    assert is_locked(path)
    second.upsert_latest(state("ann", 1))

    with QdrantStore(**options) as fourth:
        second.close()
        assert fourth["ann"] == state("ann", 1)
        fourth.upsert_latest(state("ann", 2))

    assert not is_open(path)
    assert not is_locked(path)
    with QdrantStore(**options) as again:
        assert again.count(history=True) == 2


# ------------------------------------------------------------------------------
# Directories in trouble
# ------------------------------------------------------------------------------


def listing(path: Path) -> Listing:
    """Every file of a directory with its size and hash, but for the lock files."""
    return {
        str(file.relative_to(path)): None
        if file.is_dir()
        else (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in sorted(path.rglob("*"))
        if file.name not in {".attuned_store.lock", ".lock"}
    }


def rewrite(change: Callable[[dict[str, Any]], object], file: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    change(found)
    file.write_text(json.dumps(found), encoding="utf-8")


def manifest(path: Path) -> Path:
    return path / "collections" / "attuned_state.json"


def newer_edge(path: Path) -> None:
    rewrite(lambda found: found.update(format_version=99), manifest(path))


def newer_local(path: Path) -> None:
    def change(found: dict[str, Any]) -> None:
        found["collections"]["attuned_state"]["metadata"]["format_version"] = 99

    rewrite(change, path / "meta.json")


def server_storage(path: Path) -> None:
    """What a server keeps of two collections, one of which has our name."""
    shutil.rmtree(path)
    for name in ("attuned_state", "documents"):
        shard = path / "collections" / name / "0"
        shard.mkdir(parents=True)
        (shard.parent / "config.json").write_text('{"params": {"vectors": {"size": 24}}}', encoding="utf-8")
        (shard / "shard_config.json").write_text('{"type": "Local"}', encoding="utf-8")
    (path / "aliases").mkdir()
    (path / "aliases" / "data.json").write_text("{}", encoding="utf-8")
    (path / "raft_state.json").write_text("{}", encoding="utf-8")


def other_engine(path: Path) -> None:
    if (path / "collections").exists():
        (path / "meta.json").write_text('{"collections": {}, "aliases": {}}', encoding="utf-8")
    else:
        (path / "collections").mkdir()


def foreign_collection(path: Path) -> None:
    """A collection with our name that another program made with qdrant-client."""
    from qdrant_client import QdrantClient, models

    shutil.rmtree(path)
    with closing(QdrantClient(path=str(path))) as client:
        client.create_collection("attuned_state", models.VectorParams(size=2, distance=models.Distance.DOT))
        client.upsert("attuned_state", [models.PointStruct(id=1, vector=[3.0, 4.0], payload={"a": 1})])


def overwritten(name: str, text: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text, encoding="utf-8")


TROUBLES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "newer edge": ("edge", newer_edge),
    "newer local": ("local", newer_local),
    "empty manifest": ("edge", overwritten("collections/attuned_state.json", "")),
    "broken manifest": ("edge", overwritten("collections/attuned_state.json", '{"format_version":')),
    "list as manifest": (
        "edge",
        overwritten("collections/attuned_state.json", "[1]"),
    ),
    "manifest of somebody else": (
        "edge",
        overwritten("collections/attuned_state.json", '{"name": "documents"}'),
    ),
    "bad axes in the manifest": (
        "edge",
        overwritten(
            "collections/attuned_state.json", '{"format_version": 1, "axes": ["A B"], "vector_size": 24}'
        ),
    ),
    "no manifest": ("edge", lambda path: manifest(path).unlink()),
    "storage of a server": ("edge", server_storage),
    "both engines, edge first": ("edge", other_engine),
    "both engines, local first": ("local", other_engine),
    "broken meta.json": (
        "local",
        overwritten("meta.json", "{"),
    ),
    "broken SQLite file": (
        "local",
        overwritten("collection/attuned_state/storage.sqlite", "garbage " * 1_000),
    ),
    "collection of somebody else": (
        "local",
        foreign_collection,
    ),
}


@only_on("engine, name", *((engine, name) for name, (engine, _) in TROUBLES.items()))
def test_a_directory_in_trouble_is_refused_and_left_alone(path: Path, engine: Engine, name: str) -> None:
    """A directory that cannot be read is an error of one line that names it, and nothing in it is changed."""
    _, spoil = TROUBLES[name]
    with QdrantStore(path=path, engine=engine) as store:
        store.upsert_many([state("ann", 1), state("ann", 2)])
    spoil(path)
    before = listing(path)

    with pytest.raises(StoreError) as caught:
        QdrantStore(path=path)

    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert listing(path) == before
    assert not is_open(path)


@needs("qdrant_edge")
def test_a_server_that_does_not_have_the_collection_gets_none(path: Path) -> None:
    """The storage of a Qdrant server is no place for a store, whatever collections it holds."""
    path.mkdir()
    server_storage(path)
    before = listing(path)

    with pytest.raises(StoreError, match=path.name):
        QdrantStore(path=path, collection_name="states")
    assert listing(path) == before


@needs("qdrant_edge")
def test_a_collection_that_was_half_made_is_made_anew(path: Path) -> None:
    """What a process that died while creating a collection left behind is no obstacle, and goes away."""
    half = path / "collections" / ".attuned_state.new" / "segments"
    half.mkdir(parents=True)
    (half / "junk").write_bytes(b"junk")
    manifest(path).write_text('{"format_version":', encoding="utf-8")

    with QdrantStore(path=path) as store:
        assert store.health().backend == "edge"
        store.upsert_latest(state())

    assert not half.parent.exists()
    assert kept(path, "edge").keys() == {"ann"}


# ------------------------------------------------------------------------------
# Cancellation
# ------------------------------------------------------------------------------


class Gate:
    """Holds the first write to an engine until it is told to go on."""

    def __init__(self, engine: Any, patch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.calls = 0
        self._write = engine.apply
        patch.setattr(engine, "apply", self.write)

    async def write(self, *arguments: Any) -> None:
        self.calls += 1
        self.reached.set()
        assert self.open.wait(LONG)  # in a worker thread
        await self._write(*arguments)


async def check_after_cancelling(store: AsyncStateStore, gate: Gate, users: Sequence[str]) -> None:
    """The write that had begun is done, those that waited are not, and the next operation works."""
    await store.upsert_latest(state("next", 1))
    assert sorted([user async for user in store.users()]) == sorted(["next", users[0]])
    assert gate.calls == 2
    for user_id in (users[0], "next"):
        assert await store.get_history(user_id) == [await store.get_latest(user_id)]


@needs("qdrant_client")
@pytest.mark.parametrize("loop", LOOPS)
def test_cancelled_tasks_leave_no_half_write(path: Path, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many writes that are cancelled together the one that had begun is done, the others are not."""
    users = [f"user-{number}" for number in range(20)]

    async def main() -> None:
        async with AsyncQdrantStore(path=path, engine="local") as store:
            gate = Gate(engine_of(store), monkeypatch)
            async with anyio.create_task_group() as tasks:
                for user_id in users[:1]:
                    tasks.start_soon(store.upsert_latest, state(user_id, 1))
                await in_thread(partial(gate.reached.wait, LONG))
                for user_id in users[1:]:
                    tasks.start_soon(store.upsert_latest, state(user_id, 1))
                await anyio.wait_all_tasks_blocked() if loop == "trio" else await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
                gate.open.set()
            await check_after_cancelling(store, gate, users)

    anyio.run(main, backend=loop)
    gc.collect()  # a coroutine that was never awaited would complain now
    assert kept(path, "local").keys() == {"user-0", "next"}


@needs("qdrant_client")
def test_cancelled_asyncio_tasks_leave_no_half_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task.cancel() of asyncio does not wait for the write that had begun; it is done all the same."""
    users = [f"user-{number}" for number in range(20)]

    async def main() -> None:
        async with AsyncQdrantStore(path=path, engine="local") as store:
            gate = Gate(engine_of(store), monkeypatch)
            tasks = [asyncio.create_task(store.upsert_latest(state(user_id, 1))) for user_id in users]
            await in_thread(partial(gate.reached.wait, LONG))
            for task in tasks:
                task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(answer) for answer in answers} == {asyncio.CancelledError}
            gate.open.set()
            await check_after_cancelling(store, gate, users)

    asyncio.run(main())
    gc.collect()
    assert kept(path, "local").keys() == {"user-0", "next"}


@needs("qdrant_client")
def test_a_task_cancelled_before_its_thread_has_the_lock_writes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that is cancelled while its thread waits for another thread's operation never happens."""

    async def main() -> None:
        async with AsyncQdrantStore(path=path, engine="local") as store:
            directory: Any = cast("Any", store)._operations.place.directory
            apply, reached = directory.apply, threading.Event()

            def noted(flow: Any) -> Any:
                reached.set()
                return apply(flow)

            monkeypatch.setattr(directory, "apply", noted)
            with directory._lock:
                task = asyncio.create_task(store.upsert_latest(state("ann", 1)))
                assert await in_thread(partial(reached.wait, LONG))
                task.cancel()
                (answer,) = await asyncio.gather(task, return_exceptions=True)
                assert isinstance(answer, asyncio.CancelledError)
            await store.upsert_latest(state("next", 1))
            assert [user async for user in store.users()] == ["next"]

    asyncio.run(main())
    gc.collect()
    assert kept(path, "local").keys() == {"next"}


def cancel_first(tasks: list[asyncio.Task[None]]) -> None:
    tasks[0].cancel()


@pytest.mark.parametrize("how", ["asyncio", "trio", "task.cancel()"])
def test_a_cancelled_batch_ends_between_two_steps(path: Path, engine: Engine, how: str) -> None:
    """A long write that is cancelled has done whole steps, each of them whole, and can be repeated."""
    if how == "trio":
        pytest.importorskip("trio")
    states = [state(f"user-{number % 300}", number) for number in range(1_000)]
    steps = list[int]()

    async def write(store: AsyncStateStore, cancel: Callable[[], object]) -> None:
        def progress(done: int, total: int | None) -> None:
            assert total == 1_000
            steps.append(done)
            if len(steps) == 3:
                cancel()

        await store.upsert_many(states, progress=progress)

    async def main() -> None:
        async with AsyncQdrantStore(path=path, engine=engine) as store:
            if how == "task.cancel()":
                tasks = list[asyncio.Task[None]]()
                tasks.append(asyncio.create_task(write(store, partial(cancel_first, tasks))))
                (answer,) = await asyncio.gather(*tasks, return_exceptions=True)
                assert isinstance(answer, asyncio.CancelledError)
            else:
                with anyio.CancelScope() as scope:
                    await write(store, scope.cancel)
                assert scope.cancelled_caught
            twin = MemoryStore()
            twin.upsert_many(states[: steps[-1]])
            assert await store.count() == twin.count()
            assert await store.count(history=True) == twin.count(history=True) == steps[-1]
            assert await store.upsert_many(states) == 1_000

    if how == "task.cancel()":
        asyncio.run(main())
    else:
        anyio.run(main, backend=how)
    gc.collect()
    twin = MemoryStore()
    twin.upsert_many(states)
    assert kept(path, engine) == shown(twin)


@pytest.mark.parametrize("how", ["asyncio", "trio", "task.cancel()"])
def test_an_opening_that_is_cancelled_leaves_nothing_open(
    path: Path, engine: Engine, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store whose opening was cancelled and that was closed then holds its directory no longer."""
    if how == "trio":
        pytest.importorskip("trio")
    reached, go = threading.Event(), threading.Event()
    acquire = attuned_store.open_directory

    def slowly(config: Any) -> Any:
        reached.set()
        assert go.wait(LONG)
        return acquire(config)

    monkeypatch.setattr(attuned_store, "open_directory", slowly)

    async def main() -> None:
        store = AsyncQdrantStore(path=path, engine=engine)
        if how == "task.cancel()":
            task = asyncio.create_task(store.get_latest("ann"))
            await in_thread(partial(reached.wait, LONG))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            go.set()
        else:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store.get_latest, "ann")
                await in_thread(partial(reached.wait, LONG))
                tasks.cancel_scope.cancel()
                go.set()
        await store.aclose()

    if how == "task.cancel()":
        asyncio.run(main())
    else:
        anyio.run(main, backend=how)
    join_workers()
    gc.collect()

    assert not is_open(path)


def test_a_closing_that_is_cancelled_can_be_repeated(path: Path, engine: Engine) -> None:
    """A store whose closing was cancelled gives its directory free, at the latest when it is closed again."""

    async def main() -> None:
        store = AsyncQdrantStore(path=path, engine=engine)
        await store.upsert_latest(state())
        task = asyncio.create_task(store.aclose())
        await anyio.lowlevel.checkpoint()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.aclose()

    asyncio.run(main())
    join_workers()
    gc.collect()
    assert not is_open(path)


# ------------------------------------------------------------------------------
# Small caches
# ------------------------------------------------------------------------------


PEOPLE = [f"user-{number}" for number in range(5)]


def change(stores: Sequence[StateStore], source: random.Random, clock: Clock) -> None:
    """Do something by chance, to all stores alike."""
    who, at = source.choice(PEOPLE), source.randrange(-30 * DAY, 5 * DAY)
    batch = [state(source.choice(PEOPLE), source.randrange(-12 * DAY, 5 * DAY)) for _ in range(9)]
    kind = source.randrange(8)
    clock.now += DAY if kind == 0 else 0
    answers = list[object]()
    for store in stores:
        match kind:
            case 1 | 2 | 3:
                store.upsert_latest(state(who, at))
            case 4:
                answers.append(store.upsert_many(batch))
            case 5:
                answers.append(store.delete(who))
            case 6:
                store.prune()
                answers.append(store.prune())
            case 7:
                answers.append(store.patch(who, {"warmth": 0.5}))
    assert not answers or answers[0] == answers[1], (kind, who)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_cache_that_is_too_small_changes_no_answer(
    path: Path, engine: Engine, size: int, clock: Clock
) -> None:
    """With a cache for fewer users than there are, everything is as it is in memory, pruning included."""
    bounds: Any = {"max_history_per_user": 4, "history_retention_days": 10}
    store = QdrantStore(path=path, engine=engine, cache_size=size, **bounds)
    twin = MemoryStore(**bounds)
    source = random.Random(size)

    for step in range(250):
        change((store, twin), source, clock)
        asked = {"limit": source.randrange(6), "since": NOW - source.randrange(20 * DAY)}
        other = source.choice(PEOPLE)
        assert store.get_history(other, **asked) == twin.get_history(other, **asked), (step, size)
        assert store.get_latest(other) == twin.get_latest(other), (step, size)
        if step % 10 == 0:
            assert shown(store) == shown(twin), (step, size)
            assert store.count(history=True) == twin.count(history=True), (step, size)

    for each in (store, twin):
        each.upsert_latest(state("last", 1))
        each.prune()
    seen = shown(store)
    assert seen == shown(twin)
    store.close()
    assert {user_id: latest for user_id, (latest, _) in kept(path, engine).items()} == {
        user_id: latest for user_id, (latest, _) in seen.items()
    }


def test_many_users_are_pruned_with_a_cache_for_one(path: Path, engine: Engine) -> None:
    """Pruning removes what is to be removed of every user, whatever the cache has room for."""
    people = [f"user-{number}" for number in range(150)]
    with QdrantStore(path=path, engine=engine, max_history_per_user=5) as store:
        store.upsert_many([state(who, at) for who in people for at in range(5)])

    options: Any = {"engine": engine, "cache_size": 1, "max_history_per_user": 2}
    with QdrantStore(path=path, **options) as store:
        assert store.prune() == 3 * 150
        assert store.prune() == 0
        assert store.count(history=True) == 2 * 150
        assert {len(store.get_history(who)) for who in people} == {2}
        assert store.delete(people[0])
        assert store.get_history(people[0]) == []
    assert len(KITS[engine].read_points(path)) == 3 * 149


# ------------------------------------------------------------------------------
# Waiting for the lock
# ------------------------------------------------------------------------------


@only_on("engine, loop", ("edge", "asyncio"), ("local", "trio"))
def test_waiting_for_another_process_does_not_hold_up_the_event_loop(
    path: Path, engine: Engine, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An asynchronous store waits for a locked directory while other tasks go on, then opens."""
    acquire = attuned_store.open_directory
    refused = list[threading.Thread]()
    gaps = list[float]()

    def counted(config: Any) -> Any:
        try:
            return acquire(config)
        except StoreLockedError:
            refused.append(threading.current_thread())
            raise

    monkeypatch.setattr(attuned_store, "open_directory", counted)

    async def tick(release: Callable[[], object]) -> None:
        """Measure how long the loop is held up, and let the other process go after ten tries."""
        before = time.perf_counter()
        deadline = before + LONG
        while len(refused) < 10 and before < deadline:
            await anyio.lowlevel.checkpoint()
            now = time.perf_counter()
            gaps.append(now - before)
            before = now
        release()

    async def main(release: Callable[[], object]) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick, release)
            async with AsyncQdrantStore(path=path, engine=engine, lock_timeout=LONG) as store:
                await store.upsert_latest(state())
                assert await store.count() == 1

    with holding(path, engine) as release:
        anyio.run(main, release, backend=loop)

    assert len(refused) >= 10
    assert threading.main_thread() not in refused
    held_up = sum(gap for gap in gaps if gap > 0.04)
    assert held_up < sum(gaps) / 2, f"held up for {held_up:.2f} of {sum(gaps):.2f} s"


def test_waiting_for_another_process_ends(path: Path, engine: Engine) -> None:
    """When the directory is not given free in time, opening is StoreLockedError, in both forms."""

    async def wait() -> None:
        await AsyncQdrantStore(path=path, engine=engine, lock_timeout=0.1).count()

    with holding(path, engine):
        with pytest.raises(StoreLockedError, match=path.name):
            QdrantStore(path=path, engine=engine, lock_timeout=0.1)
        with pytest.raises(StoreLockedError, match=path.name):
            asyncio.run(wait())
    assert not is_open(path)

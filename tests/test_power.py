"""durability="power": what is acknowledged is on the disk itself; those who wait for that share a flush."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import anyio
import anyio.to_thread
import pytest
from conformance import BACKENDS, environment, needs, script, state

import attuned_store
from attuned_store import AsyncQdrantStore, BackendError, QdrantStore, StoreClosedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Engine = Literal["edge", "local"]
LONG = 60.0
ENGINES = [pytest.param(name, marks=needs(BACKENDS[name].library)) for name in ("edge", "local")]
LOOPS = [pytest.param("asyncio"), pytest.param("trio", marks=needs("trio"))]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each of the embedded engines."""
    return cast("Engine", request.param)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory that is not there yet."""
    return tmp_path / "store"


class Flushing:
    """Counts the flushes of an engine, holds up the first ones, and makes them fail if told to."""

    def __init__(self, store: Any, *, held: int = 0, failing: BaseException | None = None) -> None:
        directory = store._operations.place.directory
        self._engine, self._held, self._failing = directory.engine, held, failing
        self._flush, self.flushes = self._engine.flush, directory.flushes
        self.reached, self.go = threading.Event(), threading.Event()
        self.writes: list[int] = []  # how many there were when each flush began
        self._engine.flush = self

    def __call__(self) -> None:
        self.writes.append(self._engine.writes)
        if len(self.writes) <= self._held:
            self.reached.set()
            assert self.go.wait(LONG)
            if self._failing is not None:
                raise self._failing
        self._flush()

    def wait_for(self, members: int) -> None:
        """Wait until so many have written and wait for the next flush."""
        deadline = time.monotonic() + LONG
        while self.flushes._open.members < members:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def write_many(store: QdrantStore, flushing: Flushing, count: int, pool: ThreadPoolExecutor) -> list[Any]:
    """One write whose flush is held up, and others that come while it is."""
    answers = [pool.submit(store.upsert_latest, state("first", 1))]
    assert flushing.reached.wait(LONG)
    answers += [pool.submit(store.upsert_latest, state(f"user-{number}", 1)) for number in range(count)]
    flushing.wait_for(count)
    return answers


def test_writes_during_a_flush_share_the_next(path: Path, engine: Engine) -> None:
    """However many threads write while one flush runs, one flush more serves them all."""
    with QdrantStore(path=path, engine=engine, durability="power") as store, ThreadPoolExecutor(16) as pool:
        flushing = Flushing(store, held=1)
        answers = write_many(store, flushing, 15, pool)
        assert not any(answer.done() for answer in answers)

        flushing.go.set()
        for answer in answers:
            answer.result(LONG)

        assert flushing.writes == [1, 16]
        assert store.count() == 16


def test_a_write_returns_after_a_flush_that_began_after_it(path: Path, engine: Engine) -> None:
    """No write, delete or batch is acknowledged by a flush that began before it was applied."""
    with QdrantStore(path=path, engine=engine, durability="power", max_history_per_user=1) as store:
        flushing, below = Flushing(store), cast("Any", store)._operations.place.directory.engine
        operations: dict[str, Callable[[], object]] = {
            "write": lambda: store.upsert_latest(state("ann", 1)),
            "conditional write": lambda: store.upsert_latest(state("bob", 1), expected=None),
            "patch": lambda: store.patch("ann", {"warmth": 0.1}),
            "batch": lambda: store.upsert_many([state(f"user-{number}", 1) for number in range(100)]),
            "delete": lambda: store.delete("ann"),
        }
        for name, operation in operations.items():
            before = below.writes
            operation()
            assert flushing.writes[-1] == below.writes > before, name
        flushed = len(flushing.writes)
        store.get_history("bob")
        store.delete("nobody")
        store.search_similar({"warmth": 1.0})
        assert len(flushing.writes) == flushed, "reads need no flush"


def test_the_other_durability_does_not_wait_for_a_flush(path: Path, engine: Engine) -> None:
    """With durability="process" no write waits for a flush."""
    with QdrantStore(path=path, engine=engine) as store:
        flushing = Flushing(store)
        store.upsert_many([state(f"user-{number}", 1) for number in range(100)])
        store.delete("user-1")
    assert flushing.writes == []


@needs("qdrant_edge")
@pytest.mark.parametrize("loop", LOOPS)
def test_the_flush_now_and_then_leaves_the_loop_free(
    path: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    """The flush that is due after so many changes is no part of the write: others go on meanwhile."""
    monkeypatch.setattr(attuned_store.EdgeEngine, "_FLUSH_EVERY", 200)

    async def main() -> None:
        async with AsyncQdrantStore(path=path, engine="edge") as store:
            await store.upsert_latest(state("ann", 1))
            flushing = Flushing(store, held=1)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(store.upsert_many, [state(f"user-{number}", 1) for number in range(240)])
                assert await anyio.to_thread.run_sync(partial(flushing.reached.wait, LONG))
                assert await store.get_latest("user-100") == state("user-100", 1)
                assert await store.get_latest("user-200") is None
                flushing.go.set()
            assert flushing.writes == [3, 5]  # two points a snapshot, 64 snapshots a step
            assert await store.count() == 241

    anyio.run(main, backend=loop)


@needs("qdrant_edge")
def test_only_a_collection_that_was_written_to_is_flushed(path: Path) -> None:
    """A flush leaves the shards alone that have nothing to be flushed, and reads make no work for it."""
    options: Any = {"path": path, "engine": "edge", "durability": "power"}
    with QdrantStore(**options) as store, QdrantStore(**options, collection_name="other") as other:
        shards, flushed = cast("Any", store)._operations.place.directory.engine._shards, list[str]()

        class Watched:
            def __init__(self, name: str) -> None:
                self._name, self._shard = name, shards[name]

            def __getattr__(self, name: str) -> Any:
                if name == "flush":
                    flushed.append(self._name)
                return getattr(self._shard, name)

        shards.update({name: Watched(name) for name in shards})
        store.upsert_latest(state("ann", 1))
        assert flushed == ["attuned_state"]
        other.upsert_latest(state("bob", 1))
        assert flushed == ["attuned_state", "other"]
        store.delete("ann")
        assert flushed == ["attuned_state", "other", "attuned_state"]
        shards.update({name: shard._shard for name, shard in shards.items()})


def test_a_flush_that_fails_fails_for_all_that_waited_for_it(path: Path, engine: Engine) -> None:
    """Writes that shared a failing flush all raise; the next write gets a flush of its own."""
    error = BackendError("no", backend=engine, operation="flush")
    with QdrantStore(path=path, engine=engine, durability="power") as store, ThreadPoolExecutor(16) as pool:
        flushing = Flushing(store, held=2, failing=error)
        answers = write_many(store, flushing, 15, pool)
        flushing.go.set()

        for answer in answers:
            with pytest.raises(BackendError, match="no") as raised:
                answer.result(LONG)
            assert raised.value.__cause__ is error
        assert flushing.writes == [1, 16]

        store.upsert_latest(state("after", 1))
        assert flushing.writes == [1, 16, 17]
        assert store.count() == 17  # done or not done: here they are done


def test_an_interrupted_flush_is_seen_to_by_another(path: Path, engine: Engine) -> None:
    """Where the thread that flushes for others is interrupted, one of the others does it."""
    with QdrantStore(path=path, engine=engine, durability="power") as store, ThreadPoolExecutor(16) as pool:
        flushing = Flushing(store, held=2, failing=KeyboardInterrupt())
        answers = write_many(store, flushing, 15, pool)
        flushing.go.set()

        outcomes = [type(answer.exception(LONG)) for answer in answers]
        assert sorted(outcomes, key=str) == [KeyboardInterrupt] * 2 + [type(None)] * 14
        store.upsert_latest(state("after", 1))


def test_closing_flushes_for_those_that_wait(path: Path, engine: Engine) -> None:
    """A store that is closed while writes wait for their flush loses none of them."""
    with ThreadPoolExecutor(16) as pool:
        store = QdrantStore(path=path, engine=engine, durability="power")
        flushing = Flushing(store, held=1)
        answers = write_many(store, flushing, 15, pool)
        closing = pool.submit(store.close)
        flushing.go.set()
        closing.result(LONG)
        for answer in answers:
            answer.result(LONG)
    with pytest.raises(StoreClosedError):
        store.count()
    with QdrantStore(path=path, engine=engine, durability="power") as again:
        assert again.count() == 16


class Shard:
    """A shard of Edge, which another writer flushes just before this one's points come."""

    def __init__(self, engine: Any, name: str) -> None:
        self._engine, self._shard = engine, engine._shards[name]
        self.calls: list[str] = []
        engine._shards[name] = self

    def update(self, operation: Any) -> None:
        self._engine.flush()
        self.calls.append("update")
        self._shard.update(operation)

    def flush(self) -> None:
        self.calls.append("flush")
        self._shard.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shard, name)


@needs("qdrant_edge")
def test_a_flush_while_a_write_is_under_way_is_not_taken_for_its_own(tmp_path: Path) -> None:
    """What a write is about to change does not count as flushed by the flush of another one."""
    with QdrantStore(path=tmp_path / "store", engine="edge", durability="power") as store:
        store.upsert_latest(state("ann", 1))
        shard = Shard(cast("Any", store)._operations.place.directory.engine, "attuned_state")
        for at in range(2, 5):
            store.upsert_latest(state("ann", at))
            assert shard.calls[-2:] == ["update", "flush"]
        store.delete("ann")
        assert shard.calls[-2:] == ["update", "flush"]


async def waiting_for_a_flush(tasks: Any, store: AsyncQdrantStore, flushing: Flushing, number: int) -> None:
    """Start a write whose flush is held up, then so many others, and wait until all of these have written."""
    tasks.start_soon(store.upsert_latest, state("first", 1))
    await anyio.to_thread.run_sync(partial(flushing.reached.wait, LONG))
    for user in range(number):
        tasks.start_soon(store.upsert_latest, state(f"user-{user}", 1))
    await anyio.to_thread.run_sync(partial(flushing.wait_for, number))


@pytest.mark.parametrize("loop", LOOPS)
def test_tasks_share_a_flush_and_the_loop_goes_on(path: Path, engine: Engine, loop: str) -> None:
    """While a flush runs the event loop is free, and the tasks that write meanwhile share the next one."""

    async def main() -> None:
        async with AsyncQdrantStore(path=path, engine=engine, durability="power") as store:
            flushing = Flushing(store, held=1)
            async with anyio.create_task_group() as tasks:
                await waiting_for_a_flush(tasks, store, flushing, 63)
                assert await store.get_latest("user-62") == state("user-62", 1)
                flushing.go.set()
            assert flushing.writes == [1, 64]
            assert await store.count() == 64

    anyio.run(main, backend=loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_tasks_cancelled_while_they_wait_for_a_flush_lose_nothing(
    path: Path, engine: Engine, loop: str
) -> None:
    """Tasks cancelled while they wait for a flush have written; others get theirs, and the store goes on."""

    async def main() -> None:
        async with AsyncQdrantStore(path=path, engine=engine, durability="power") as store:
            flushing = Flushing(store, held=1)
            async with anyio.create_task_group() as tasks:
                await waiting_for_a_flush(tasks, store, flushing, 8)
                tasks.cancel_scope.cancel()
                flushing.go.set()
            await store.upsert_latest(state("next", 1))
            assert await store.count() == 10

    anyio.run(main, backend=loop)


# ------------------------------------------------------------------------------
# System calls
# ------------------------------------------------------------------------------

ACKNOWLEDGE = """
import os, sys, threading
from attuned_store import QdrantStore, StateSnapshot
store = QdrantStore(path=sys.argv[1], engine=sys.argv[2], durability="power", max_history_per_user=2)

def acknowledge(number):
    os.write(1, b"ack %d\\n" % number)

for number in range(4):
    store.upsert_latest(StateSnapshot("ann", {"warmth": 0.5}, number))
    acknowledge(number)
store.delete("ann")
acknowledge(4)
store.upsert_many([StateSnapshot(f"user-{number}", {"warmth": 0.5}, number) for number in range(50)])
acknowledge(5)

def work(number):
    store.upsert_latest(StateSnapshot(f"thread-{number}", {"warmth": 0.5}, number))
    acknowledge(number)

threads = [threading.Thread(target=work, args=(number,)) for number in range(6, 10)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
os._exit(0)
"""
CALLS = "openat,write,writev,pwrite64,ftruncate,mmap,munmap,msync,fsync,fdatasync,rename,renameat,renameat2"


def traced(path: Path, engine: Engine) -> list[str]:
    """The system calls of a process that writes and acknowledges, in the order of their ends."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    output = path.with_name("trace")
    launch = ["strace", "-f", "-y", "-s", "16", "-e", f"trace={CALLS}", "-o", str(output)]
    done = subprocess.run(
        [*launch, *script(ACKNOWLEDGE, path, engine)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    if not output.exists() or "PTRACE_TRACEME" in done.stderr or "ptrace" in done.stderr.lower():
        pytest.skip(f"strace may not trace here: {done.stderr[:200]}")
    assert done.returncode == 0, done.stderr
    started: dict[str, str] = {}
    calls = list[str]()
    for line in output.read_text().splitlines():
        thread, call = line.split(maxsplit=1)
        if call.endswith("<unfinished ...>"):
            started[thread] = call.removesuffix("<unfinished ...>")
        elif resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", call):
            calls.append(started.pop(thread) + resumed[1])
        else:
            calls.append(call)
    return calls


class Disk:
    """Which files and names of a directory system calls have changed since they were last synced."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._mapped: dict[int, str] = {}  # file by address, of the mappings that can be written through
        self._named: set[str] = set()
        self.dirty: set[str] = set()
        self.synced: set[str] = set()

    def follow(self, call: str) -> None:
        name, _, rest = call.partition("(")
        file = found[1] if (found := re.match(r"[^,<]*<([^>]*)>", rest)) else ""
        match name:
            case "write" | "writev" | "pwrite64" | "ftruncate" if file.startswith(self._path):
                self.dirty.add(file)
            case "openat" if "O_CREAT" in call and (at := re.search("= .*<(.*)>$", call)):
                self.name(at[1])
            case "fsync" | "fdatasync":
                assert call.endswith("= 0"), call
                self.dirty.discard(file)
                self.synced.add(file)
            case "rename" | "renameat" | "renameat2":
                self.rename(call)
            case "mmap" if "PROT_WRITE, MAP_SHARED" in call and (at := re.search("<(.*)>", call)):
                self._mapped[int(call.rsplit("= ", 1)[1], 16)] = at[1]
            case "msync":
                assert call.endswith("= 0"), call
                file = self._mapped.get(int(rest.split(",")[0], 16), "")
                self.dirty.discard(file)
                self.synced.add(file)
            case _:
                pass

    def rename(self, call: str) -> None:
        """Files go by their new names, those in a directory that is renamed too."""
        names = re.findall(r'(?:<([^>]*)>, )?"([^"]*)"', call)
        old, new = (f"{directory}/{name}" if directory else name for directory, name in names)
        for files in (self.dirty, self._named):
            moved = {each for each in files if each == old or each.startswith(f"{old}/")}
            files.difference_update(moved)
            files.update(new + each.removeprefix(old) for each in moved)
        self.dirty.add(new.rpartition("/")[0])

    def name(self, file: str) -> None:
        """A new name is kept by the directory that it is in."""
        if file.startswith(self._path) and file not in self._named:
            self._named.add(file)
            self.dirty.add(file.rpartition("/")[0])

    def take_synced(self) -> set[str]:
        """The files synced since this was last asked, under the names that they have in the directory."""
        synced, self.synced = self.synced, set()
        return {re.sub(r"/[0-9a-f-]{36}/", "/*/", each.removeprefix(self._path)) for each in synced}


# The bytes of a write go into the log of SQLite; in Edge into a segment, and then it is noted how far it is.
NEEDED = {
    "local": {"/collection/attuned_state/storage.sqlite-wal"},
    "edge": {
        "/collections/attuned_state/segments/*/payload_storage/page_0.dat",
        "/collections/attuned_state/segments/*/vector_storage/vectors/chunk_0.mmap",
        "/collections/attuned_state/segments/*/mutable_id_tracker.versions",
        "/collections/attuned_state/wal",
    },
}
# Neither what SQLite makes anew on opening, nor Edge's own log, once it has flushed, nor the name of a file
# that Edge has just made, which the usual file systems of Linux keep when they sync the file.
NOT_NEEDED = re.compile(r"-shm$|/\.lock$|/wal/(tmp-)?open-\d+$|/vector_storage/vectors$")


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="strace is a program of Linux")
def test_what_is_acknowledged_was_synced_before(path: Path, engine: Engine) -> None:
    """The trace of a process shows the bytes of every write synced before the write is acknowledged."""
    disk, acknowledged = Disk(path), 0
    for call in traced(path, engine):
        disk.follow(call)
        if re.match(r"write\(1<.*>, \"ack", call):
            acknowledged += 1
            if acknowledged <= 6:  # those of one thread: nothing else is written meanwhile
                assert sorted(file for file in disk.dirty if not NOT_NEEDED.search(file)) == [], call
                synced = disk.take_synced()
                assert synced >= NEEDED[engine] or (acknowledged == 5 and synced), call
    assert acknowledged == 10

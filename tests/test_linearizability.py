"""Linearizability: what callers saw at the same time, they could have seen one after the other."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs
import pytest
from conformance import BACKENDS, Awaited, needs, run, state
from linearizability import (
    CONFLICT,
    MAXIMUM,
    Event,
    Program,
    Recorder,
    Step,
    bump,
    find_order,
    make_programs,
    shown,
)

import attuned_store
from attuned_store import (
    AsyncMemoryStore,
    AsyncStateStore,
    MemoryBackend,
    MemoryPlace,
    MemoryStore,
    Operations,
    StateSnapshot,
    StateStore,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

T = TypeVar("T")

LONG = 60.0
HISTORIES = 10_000 if os.environ.get("ATTUNED_TEST_LONG") else 300

# ------------------------------------------------------------------------------
# The checker
# ------------------------------------------------------------------------------

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("clock"), pytest.mark.once]

ONE, TWO, THREE = (state("ann", at, {"warmth": at / 10}) for at in (1, 2, 3))


def events(*rows: tuple[int, int, str, Any, Any]) -> list[Event]:
    """Events of one user, each as when it was called and returned, its kind, argument and answer."""
    return [
        Event(called, back, Step(kind, 0, (argument,) if kind == "write" else argument, answer))
        for called, back, kind, argument, answer in rows
    ]


LEGAL = {
    "nothing": events(),
    "one after the other": events(
        (0, 1, "latest", None, None),
        (2, 3, "write", ONE, None),
        (4, 5, "latest", None, ONE),
        (6, 7, "delete", None, True),
        (8, 9, "history", 3, []),
    ),
    "a read during a write sees it": events((0, 5, "write", ONE, None), (1, 2, "latest", None, ONE)),
    "a read during a write does not see it": events((0, 5, "write", ONE, None), (1, 2, "latest", None, None)),
    "of two writes at one time either may be first": events(
        (0, 9, "write", ONE, None),
        (1, 8, "write", attrs.evolve(ONE, confidence=0.5), None),
        (10, 11, "latest", None, ONE),
    ),
    "an older state goes into history": events(
        (0, 1, "write", TWO, None), (2, 3, "write", ONE, None), (4, 5, "history", 3, [TWO, ONE])
    ),
    "a conflict during the write that it lost to": events(
        (0, 9, "expected", (TWO, None), None), (1, 8, "expected", (ONE, None), CONFLICT)
    ),
    "two updates at one time": events(
        (0, 9, "update", "ann", bump(None, "ann")),
        (1, 8, "update", "ann", bump(bump(None, "ann"), "ann")),
    ),
    "a patch of what was written at the same time": events(
        (0, 9, "write", ONE, None), (1, 8, "patch", THREE, state("ann", 2, THREE.axes))
    ),
    "a deletion between two reads": events(
        (0, 1, "write", ONE, None),
        (2, 9, "delete", None, True),
        (3, 4, "latest", None, ONE),
        (5, 6, "latest", None, None),
        (7, 8, "count", None, 0),
    ),
}
ILLEGAL = {
    "a read after a write does not see it": events((0, 1, "write", ONE, None), (2, 3, "latest", None, None)),
    "a read sees what nobody wrote": events((0, 1, "write", ONE, None), (2, 3, "latest", None, TWO)),
    "a read sees a write before it began": events((0, 1, "latest", None, ONE), (2, 3, "write", ONE, None)),
    "two reads go back in time": events(
        (0, 9, "write", ONE, None), (1, 2, "latest", None, ONE), (3, 4, "latest", None, None)
    ),
    "two readers disagree on the order of two writes": events(
        (0, 9, "write", ONE, None),
        (0, 9, "write", attrs.evolve(ONE, confidence=0.5), None),
        (1, 2, "latest", None, ONE),
        (3, 4, "latest", None, attrs.evolve(ONE, confidence=0.5)),
        (5, 6, "latest", None, ONE),
    ),
    "latest and history disagree": events(
        (0, 9, "write", ONE, None), (1, 2, "latest", None, ONE), (3, 4, "history", 3, [])
    ),
    "a lost update": events(
        (0, 9, "update", "ann", bump(None, "ann")), (1, 8, "update", "ann", bump(None, "ann"))
    ),
    "two conditional writes over one state": events(
        (0, 9, "expected", (ONE, None), None), (1, 8, "expected", (TWO, None), None)
    ),
    "a conflict with nobody": events((0, 1, "expected", (ONE, None), CONFLICT)),
    "a patch that lost what it was to keep": events(
        (0, 1, "write", ONE, None), (2, 3, "patch", THREE, state("ann", 0, THREE.axes))
    ),
    "a deletion of nothing": events((0, 1, "delete", None, True)),
    "a deleted state comes back": events(
        (0, 1, "write", ONE, None), (2, 3, "delete", None, True), (4, 5, "latest", None, ONE)
    ),
    "a history that is too long": events(
        *((2 * at, 2 * at + 1, "write", state("ann", at), None) for at in range(4)),
        (8, 9, "history", 4, [state("ann", at) for at in (3, 2, 1, 0)]),
    ),
    "a history with a hole": events(
        *((2 * at, 2 * at + 1, "write", state("ann", at), None) for at in range(3)),
        (8, 9, "history", 3, [state("ann", at) for at in (2, 0)]),
    ),
    "a wrong count": events((0, 1, "write", ONE, None), (2, 3, "count", None, 2)),
}


@pytest.mark.parametrize("name", LEGAL)
def test_the_checker_accepts_what_is_possible(name: str) -> None:
    """Histories that can be explained are explained, by an order that respects time."""
    order = find_order(LEGAL[name], 1)

    assert order is not None
    assert sorted(order) == list(range(len(LEGAL[name])))
    for position, index in enumerate(order):
        for later in order[position:]:
            assert LEGAL[name][later].returned >= LEGAL[name][index].called


@pytest.mark.parametrize("name", ILLEGAL)
def test_the_checker_refuses_what_is_impossible(name: str) -> None:
    """Histories that no order explains are refused."""
    assert find_order(ILLEGAL[name], 1) is None


def test_the_parts_of_a_batch_keep_their_order() -> None:
    """The states of one user in one batch take effect in their order, if not all at once."""
    first = Event(0, 9, Step("write", 0, (ONE,), None))
    second = Event(0, 9, Step("write", 0, (TWO,), None), first)
    seen = {
        (): True,
        (ONE,): True,
        (TWO, ONE): True,
        (TWO,): False,
    }
    for entries, possible in seen.items():
        read = Event(1, 2, Step("history", 0, 3, list(entries)))
        assert (find_order([read, second, first], 1) is not None) is possible, entries


# ------------------------------------------------------------------------------
# The stores
# ------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A store, or two on one path, and by whom it is used."""

    backend: str
    face: str  # sync, asyncio, trio; mixed-asyncio and mixed-trio: half of the callers are threads
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.backend, self.face, *(str(value) for _, value in self.options)])

    def open(self, store: Callable[..., T], path: Path) -> T:
        return store(path, max_history_per_user=MAXIMUM, **dict(self.options))


NO_CACHE, SMALL_CACHE, POWER = (("cache_size", 0),), (("cache_size", 2),), (("durability", "power"),)
SETTINGS = [
    *(Setting("memory", face) for face in ("sync", "asyncio", "trio")),
    *(
        Setting(backend, face, options)
        for backend in ("edge", "local")
        for face, options in (
            ("sync", ()),
            ("sync", NO_CACHE),
            ("sync", SMALL_CACHE),
            ("asyncio", ()),
            ("trio", SMALL_CACHE),
            ("mixed-asyncio", ()),
            ("mixed-trio", SMALL_CACHE),
            ("mixed-asyncio", POWER),
        )
    ),
]


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns as often as they can, so that races are lost more often too."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(jobs: Sequence[Callable[[], Coroutine[Any, Any, None]]], pool: ThreadPoolExecutor) -> None:
    """Run each job in a thread of its own, all beginning at one moment."""
    barrier = threading.Barrier(len(jobs))

    def begin(job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        barrier.wait(LONG)
        run(job())

    for answer in [pool.submit(begin, job) for job in jobs]:
        answer.result(LONG)


def check(recorder: Recorder, seed: object) -> None:
    order = find_order(recorder.events, len(recorder.names))
    assert order is not None, f"{seed}: no order explains\n{shown(recorder.events)}"


def recorder_of(setting: Setting, number: int, before: int) -> Recorder:
    """A recorder for 1 to 3 users of its own; in memory the states of a batch come one after the other."""
    names = [f"{number}-{user}" for user in range(1 + number % 3)]
    return Recorder(names, whole_batches=setting.backend != "memory", users_before=before)


def check_threads(setting: Setting, store: StateStore, count: int) -> None:
    wrapped = cast("AsyncStateStore", Awaited(store))
    with ThreadPoolExecutor(8) as pool:
        for number in range(count):
            seed = f"{setting} {number}"
            recorder = recorder_of(setting, number, store.count())
            programs = make_programs(seed, recorder.names)
            in_threads([partial(recorder.run, wrapped, program) for program in programs], pool)
            check(recorder, seed)


async def check_tasks(
    setting: Setting, store: AsyncStateStore, count: int, other: StateStore | None = None
) -> None:
    """Let tasks use a store; with another one on the path, every second caller is a thread that uses that."""
    wrapped = cast("AsyncStateStore", Awaited(cast("StateStore", other)))
    with ThreadPoolExecutor(8) as pool:
        for number in range(count):
            seed = f"{setting} {number}"
            recorder = recorder_of(setting, number, await store.count())
            programs = make_programs(seed, recorder.names)
            mine = programs if other is None else programs[::2]
            theirs = [] if other is None else programs[1::2]

            def task(program: Program, recorder: Recorder = recorder) -> Coroutine[Any, Any, None]:
                return recorder.run(store, program, anyio.lowlevel.checkpoint)

            async with anyio.create_task_group() as tasks:
                if theirs:
                    jobs = [partial(recorder.run, wrapped, program) for program in theirs]
                    tasks.start_soon(anyio.to_thread.run_sync, partial(in_threads, jobs, pool))
                for program in mine:
                    tasks.start_soon(task, program)
            check(recorder, seed)


@pytest.mark.timeout(3_600)
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(
            setting,
            id=str(setting),
            marks=needs(BACKENDS[setting.backend].library, "trio" if "trio" in setting.face else None),
        )
        for setting in SETTINGS
    ],
)
def test_every_history_has_an_order(setting: Setting, often: None, tmp_path: Path) -> None:
    """Whatever threads and tasks do to a store at once, one order of it all explains every answer."""
    count = -(-HISTORIES // len(SETTINGS)) * (10 if setting.backend == "memory" else 1)  # which is quick
    backend, path = BACKENDS[setting.backend], tmp_path / "store"
    kind, _, loop = setting.face.rpartition("-")
    if setting.face == "sync":
        with setting.open(backend.sync, path) as store:
            check_threads(setting, store, count)
        return

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            other = stack.enter_context(setting.open(backend.sync, path)) if kind == "mixed" else None
            async with setting.open(backend.asynchronous, path) as store:
                await check_tasks(setting, store, count, other)

    anyio.run(main, backend=loop)


# ------------------------------------------------------------------------------
# Stores that are broken
# ------------------------------------------------------------------------------


def hesitate() -> None:
    """Let another thread run at the very place of a defect, which else it would seldom do there."""
    time.sleep(0)


class Broken(MemoryStore):
    """A store over a backend with a defect."""

    backend_class: type[MemoryBackend] = MemoryBackend

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        waits = self._operations.waits
        self._backend = self.backend_class(self.config, waits)
        self._operations = Operations(self._backend, MemoryPlace(self._backend), waits, collection="")

    def get_latest(self, user_id: str) -> StateSnapshot | None:
        return self._backend.get_latest(user_id)


class UnguardedBackend(MemoryBackend):
    """Updates without looking whether the state is still the one that was read."""

    def upsert_latest(self, snapshot: StateSnapshot, expected: Any) -> None:
        if expected is not attuned_store.ANY and self.get_latest(snapshot.user_id) != expected:
            raise attuned_store.ConflictError("changed")
        hesitate()
        super().upsert_latest(snapshot, attuned_store.ANY)


class ForgetfulBackend(MemoryBackend):
    """Keeps what was read in a cache, which a write empties before it writes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cache: dict[str, StateSnapshot | None] = {}

    def get_latest(self, user_id: str) -> StateSnapshot | None:
        if user_id not in self._cache:
            self._cache[user_id] = super().get_latest(user_id)
        return self._cache.get(user_id)

    def upsert_latest(self, snapshot: StateSnapshot, expected: Any) -> None:
        self._cache.pop(snapshot.user_id, None)
        hesitate()
        super().upsert_latest(snapshot, expected)

    async def delete(self, user_id: str) -> bool:
        self._cache.pop(user_id, None)
        return await super().delete(user_id)

    async def write(self, snapshots: Any) -> None:
        await super().write(snapshots)
        for snapshot in snapshots:
            self._cache.pop(snapshot.user_id, None)


class TornBackend(MemoryBackend):
    """Deletes and writes anew where it should replace."""

    def _put(self, snapshot: StateSnapshot, expected: Any = attuned_store.ANY) -> None:
        timeline = self.timelines.get(snapshot.user_id)
        if timeline is not None and snapshot.updated_at_unix_ms <= timeline[-1].updated_at_unix_ms:
            self.timelines.pop(snapshot.user_id)
            hesitate()
            self.timelines[snapshot.user_id] = timeline
        super()._put(snapshot, expected)


class Unguarded(Broken):
    backend_class = UnguardedBackend


class Forgetful(Broken):
    backend_class = ForgetfulBackend


class Torn(Broken):
    backend_class = TornBackend


@pytest.mark.parametrize("broken", [Unguarded, Forgetful, Torn])
def test_broken_stores_are_found_out(often: None, broken: type[MemoryStore]) -> None:
    """A lost update, a stale cache and a torn write are found, in a few hundred histories at most."""
    with pytest.raises(AssertionError, match="no order explains"):
        check_threads(Setting("memory", "sync"), broken(max_history_per_user=MAXIMUM), 2_000)


@pytest.mark.parametrize("loop", [pytest.param("asyncio"), pytest.param("trio", marks=needs("trio"))])
def test_a_broken_asynchronous_store_is_found_out(loop: str) -> None:
    """A store whose conditional write lets other tasks run between looking and writing is found out."""

    class Suspending(Operations):
        async def upsert_latest(self, snapshot: StateSnapshot, expected: Any = attuned_store.ANY) -> None:
            if expected is not attuned_store.ANY and await self.get_latest(snapshot.user_id) != expected:
                raise attuned_store.ConflictError("changed")
            await anyio.lowlevel.checkpoint()
            await super().upsert_latest(snapshot)

    class Broken(AsyncMemoryStore):
        async def upsert_latest(self, snapshot: StateSnapshot, *, expected: Any = attuned_store.ANY) -> None:
            await self._operations.upsert_latest(snapshot, expected)

    store = Broken(max_history_per_user=MAXIMUM)
    right = store._operations
    store._operations = Suspending(right.backend, right.place, right.waits, collection="")
    with pytest.raises(AssertionError, match="no order explains"):
        anyio.run(check_tasks, Setting("memory", loop), store, 200, backend=loop)

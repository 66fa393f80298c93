"""Races without threads: an engine that suspends at every call, a schedule, and cores right or broken.

Whose turn it is Hypothesis decides, so that what fails can be done again and gets shorter. Every broken
variant that is kept here must be found out: so the tests are known to be able to fail.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from random import Random
from typing import Any, TypeVar, cast

import hypothesis.strategies as st
import pytest
from conformance import NOW, state
from hypothesis import HealthCheck, Phase, find, given, note, settings
from linearizability import KINDS, MAXIMUM, Order, Recorder, find_order, make_programs, shown

import attuned_store
from attuned_store import (
    ANY,
    AsyncQdrantStore,
    Matching,
    MemoryEngine,
    Operations,
    OwnedBackend,
    Page,
    Point,
    Put,
    QdrantStoreConfig,
    Record,
    SharedBackend,
    StateSnapshot,
)

pytestmark = [pytest.mark.once, pytest.mark.faults]

T = TypeVar("T")
Ready = Callable[[], bool]

# ------------------------------------------------------------------------------
# Turns
# ------------------------------------------------------------------------------


def always() -> bool:
    return True


@types.coroutine
def turn(ready: Ready = always) -> Generator[Ready, None, None]:
    """Let others have a turn, and go on once it is ready."""
    yield ready


def interleave(flows: Sequence[Coroutine[Any, Any, object]], schedule: Sequence[int]) -> None:
    """Run all flows to their ends, whose turn it is being read from the schedule; then one by one."""
    waiting: dict[int, Ready] = dict.fromkeys(range(len(flows)), always)
    turns = iter(schedule)
    try:
        while waiting:
            ready = [index for index, is_ready in waiting.items() if is_ready()]
            assert ready, "all flows wait for each other"
            index = ready[next(turns, 0) % len(ready)]
            try:
                waiting[index] = flows[index].send(None)
            except StopIteration:
                del waiting[index]
    finally:
        for flow in flows:
            flow.close()


class Turns:
    """A lock of flows."""

    def __init__(self) -> None:
        self._taken = False

    @contextlib.asynccontextmanager
    async def __call__(self) -> Any:
        await turn(lambda: not self._taken)
        self._taken = True
        try:
            yield
        finally:
            self._taken = False


# ------------------------------------------------------------------------------
# Engines
# ------------------------------------------------------------------------------


class Points(MemoryEngine):
    """An engine with a turn for others before and after the effect of every call."""

    def __init__(self, *, indexed: bool = True) -> None:
        super().__init__()
        self.indexed = indexed

    @contextlib.asynccontextmanager
    async def call(self) -> Any:
        await turn()
        yield
        await turn()

    async def retrieve(self, *arguments: Any, **options: Any) -> list[Record]:
        async with self.call():
            return await super().retrieve(*arguments, **options)

    async def page(self, *arguments: Any, **options: Any) -> Page:
        async with self.call():
            return await super().page(*arguments, **options)

    async def count(self, *arguments: Any, **options: Any) -> int:
        async with self.call():
            return await super().count(*arguments, **options)

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        async with self.call():
            await super().apply(collection, puts, deletes)

    async def once(self, work: Callable[[], Awaitable[object]]) -> None:
        """Opening is harmless when repeated here: nobody waits for another."""
        await work()

    async def _judge(self, *arguments: Any) -> Any:
        """Judge guards without a turn for others, who would come between the judging and the writing."""
        flow = super()._judge(*arguments)
        while True:
            try:
                flow.send(None)
            except StopIteration as done:
                return done.value


# ------------------------------------------------------------------------------
# Stores over them
# ------------------------------------------------------------------------------


class Owned(Operations):
    """The operations of a store over a backend of its own, whose pieces hold a lock, as in a directory."""

    backend_class: type[OwnedBackend | SharedBackend] = OwnedBackend
    engine_class: type[Points] = Points
    indexed = True

    def __init__(self, **options: Any) -> None:
        self.config = QdrantStoreConfig(path="unused", max_history_per_user=MAXIMUM, **options)
        self.engine = self.engine_class(indexed=self.indexed)
        self.lock = Turns()
        backend = cast("Any", self.backend_class)(self.engine, self.config)
        super().__init__(backend, cast("Any", None), attuned_store.Suspending(), collection="unused")

    @property
    def store(self) -> AsyncQdrantStore:
        """The asynchronous store with these operations."""
        store = object.__new__(AsyncQdrantStore)
        store.config, store._operations = self.config, self
        return store

    async def _drive(
        self,
        name: str,
        operation: Callable[[Any], Coroutine[Any, Any, T]],
        about: object = None,
        *,
        long: bool = False,
    ) -> T:
        async with self.lock():
            return await self.backend.begin(operation)


class Unindexed(Owned):
    """The same over an engine without indexes."""

    indexed = False


class Unlocked(Owned):
    """No lock at all."""

    async def _drive(
        self,
        name: str,
        operation: Callable[[Any], Coroutine[Any, Any, T]],
        about: object = None,
        *,
        long: bool = False,
    ) -> T:
        return await self.backend.begin(operation)


class Shared(Unlocked):
    """The store of a server: no lock, and an engine that others use as well."""

    backend_class = SharedBackend


# ------------------------------------------------------------------------------
# Broken ones
# ------------------------------------------------------------------------------


class UnlockedWithoutIndexes(Unlocked):
    indexed = False


class LockedByCall(Unlocked):
    """The lock is taken for each call of the engine, not for the operation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.engine.call = self.lock  # type: ignore[method-assign, assignment]


class CheckedOutside(Owned):
    """The condition of a write is looked at before the lock is taken for writing."""

    async def upsert_latest(self, snapshot: StateSnapshot, expected: Any = ANY) -> None:
        if expected is not ANY and await self.get_latest(snapshot.user_id) != expected:
            raise attuned_store.conflict_error(snapshot.user_id, expected, None)
        await super().upsert_latest(snapshot)


class FilledLate(Owned):
    """A state that was read goes into the cache after the lock has been released."""

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        backend: Any = self.backend
        cached: StateSnapshot | None = backend.cached(user_id)
        if cached is not None:
            return cached

        async def read(_: object) -> StateSnapshot | None:
            found: StateSnapshot | None = await backend.get_latest(user_id)
            backend._latest.pop(user_id, None)
            return found

        found = await self._drive("get", read)
        await turn()
        if found is not None:
            backend._latest[user_id] = found
        return found


class EmptiedLate(Owned):
    """What was deleted leaves the cache after the lock has been released."""

    async def delete(self, user_id: str) -> bool:
        backend: Any = self.backend
        cached = backend.cached(user_id)
        answer = await super().delete(user_id)
        if cached is not None:
            backend._latest[user_id] = cached
            await turn()
            backend._latest.pop(user_id, None)
        return answer


class WrittenInTwo(Owned):
    """The latest point and the history are written under two locks."""

    async def upsert_latest(self, snapshot: StateSnapshot, expected: Any = ANY) -> None:
        later = list[Sequence[Point]]()
        write, backend = self.engine.apply, cast("Any", self.backend)

        async def first_half(
            collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
        ) -> None:
            self.engine.apply = write  # type: ignore[method-assign]
            await write(collection, [Put(puts[0].points[:1])])
            later.append(puts[0].points[1:])

        async def start(_: object) -> None:
            self.engine.apply = first_half  # type: ignore[method-assign]
            try:
                if expected is ANY:
                    await backend.write([snapshot])
                else:
                    await backend.write_expected(snapshot, expected)
            finally:
                self.engine.apply = write  # type: ignore[method-assign]
                backend._forget(snapshot.user_id)

        await self._drive("upsert", start)
        if later:
            await self._drive("upsert", lambda _: write(self.config.collection_name, [Put(later[0])]))
            backend._forget(snapshot.user_id)


class Ungoverned(Points):
    """A server that puts points whatever their guard says."""

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        await super().apply(collection, [Put(put.points) for put in puts], deletes)


class SharedWithoutGuards(Shared):
    engine_class = Ungoverned


class Hopeful(SharedBackend):
    """Takes every conditional write for a success."""

    async def _replace(self, snapshot: StateSnapshot, before: Mapping[str, Any] | None) -> None:
        with contextlib.suppress(attuned_store.ConflictError):
            await super()._replace(snapshot, before)


class SharedAndHopeful(Shared):
    backend_class = Hopeful


class Unconditional(SharedBackend):
    """Looks at the condition, then puts without a guard."""

    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        if await self.get_latest(snapshot.user_id) != expected:
            raise attuned_store.conflict_error(snapshot.user_id, expected, None)
        await self.write([snapshot])


class SharedAndUnconditional(Shared):
    backend_class = Unconditional


class Timeless(Points):
    """A server that puts the latest point without looking whether it is the newest."""

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        await super().apply(collection, [put._replace(newest_by=None) for put in puts], deletes)


class SharedWithoutNewest(Shared):
    engine_class = Timeless


# ------------------------------------------------------------------------------
# Tests
# ------------------------------------------------------------------------------

# On a server, what takes several requests may be seen half done: only latest states are looked at there.
SHARED_KINDS = {kind: weight for kind, weight in KINDS.items() if kind not in ("delete", "history", "count")}
SCHEDULES = st.lists(st.integers(0, 7), max_size=150)
SEEDS = st.integers(0, 2**20)
GENERATE = settings(max_examples=3_000, database=None, deadline=None, phases=[Phase.generate])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still, and waiting is a turn for the others."""

    async def sleep(_: object, seconds: float) -> None:
        await turn()

    monkeypatch.setattr(attuned_store.Suspending, "sleep", sleep)
    monkeypatch.setattr(attuned_store.wall_clock, "now_ms", lambda: NOW)


def play(kind: type[Owned], seed: int, schedule: Sequence[int], **options: Any) -> str:
    """What went wrong when programs used one store, in the order of the schedule; "" for nothing."""
    store = kind(**options)
    shared = isinstance(store, Shared)
    names = [f"user-{number}" for number in range(1 + seed % 2)]
    recorder = Recorder(names, whole_batches=not shared)
    programs = make_programs(str(seed), names, callers=4, kinds=SHARED_KINDS if shared else KINDS)
    interleave([store.backend.open()], [])
    interleave([recorder.run(store.store, program, turn) for program in programs], schedule)
    interleave([recorder.run(store.store, last_look(len(names), history=not shared))], [])
    return "" if find_order(recorder.events, len(names)) else shown(recorder.events)


def last_look(users: int, *, history: bool) -> list[Order]:
    """A program that reads everything."""
    kinds = ["latest", "history"] if history else ["latest"]
    return [Order(kind, [user], [state()], MAXIMUM) for user in range(users) for kind in kinds]


RIGHT: list[type[Owned]] = [Owned, Unindexed, Shared]
BROKEN: list[type[Owned]] = [
    Unlocked,
    UnlockedWithoutIndexes,
    LockedByCall,
    CheckedOutside,
    FilledLate,
    EmptiedLate,
    WrittenInTwo,
    SharedWithoutGuards,
    SharedAndHopeful,
    SharedAndUnconditional,
    SharedWithoutNewest,
]


@pytest.mark.parametrize("kind", RIGHT)
@settings(
    max_examples=5_000 if os.environ.get("ATTUNED_TEST_LONG") else 200,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=SEEDS, schedule=SCHEDULES, cache_size=st.sampled_from([0, 1, 100]))
def test_no_schedule_breaks_a_store(
    kind: type[Owned], seed: int, schedule: list[int], cache_size: int
) -> None:
    """Whoever has a turn when, callers see what they could have seen one after the other."""
    wrong = play(kind, seed, schedule, cache_size=cache_size)
    note(wrong)
    assert not wrong


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_found_out(kind: type[Owned]) -> None:
    """For every way to break a store there is a schedule that shows it."""
    case = find(
        st.tuples(SEEDS, SCHEDULES),
        lambda case: bool(play(kind, *case)),
        settings=GENERATE,
        random=Random(0),
    )

    assert play(kind, *case)  # which does so every time

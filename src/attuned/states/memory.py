"""The backend of memory: a deque a user, nothing between a caller and the dict."""

from __future__ import annotations

import functools
import heapq
import itertools
import operator
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import attrs

from attuned.base.codec import Schema
from attuned.base.errors import ReenteredError, closed_error
from attuned.base.values import ANY, Expected, Health, Match, StateSnapshot, check_user_id, time_of
from attuned.connections.files import OPEN
from attuned.connections.runtime import run
from attuned.engines.memory import MemoryEngine
from attuned.engines.vectors import Vectors, make_vectors
from attuned.states.contract import (
    BATCH_SIZE,
    Cursor,
    HistoryWindow,
    Retention,
    SearchRequest,
    StatesPage,
    clamp_score,
    conflict_error,
    page_of_ids,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from attuned.base.config import MemoryStoreConfig
    from attuned.base.errors import T
    from attuned.connections.runtime import Waits
    from attuned.engines.waist import Engine


class VectorIndex:
    """The latest snapshots as unit vectors. It is told who was written, and catches up when asked."""

    def __init__(self, schema: Schema) -> None:
        self.stale: set[str] = set()
        self._schema = schema
        self.vectors: Vectors | None = None  # until there is something to be taken in
        self._rows: list[StateSnapshot | None] = []
        self._row_of: dict[str, int] = {}
        self._free: list[int] = []

    def catch_up(self, latest: Callable[[str], StateSnapshot | None]) -> bool:
        """Take in some of the users written since; whether all are taken in."""
        for _ in range(min(4 * BATCH_SIZE, len(self.stale))):
            user_id = self.stale.pop()
            self._take(user_id, latest(user_id))
        return not self.stale

    def _take(self, user_id: str, snapshot: StateSnapshot | None) -> None:
        if self.vectors is None:
            self.vectors = make_vectors(self._schema.vector_size)
        row = self._row_of.get(user_id)
        if snapshot is None:
            if row is not None:
                self._free.append(self._row_of.pop(user_id))
                self._rows[row] = None
            return
        if row is None:
            row = self._row_of[user_id] = self._free.pop() if self._free else len(self._rows)
        self._rows[row : row + 1] = [snapshot]
        self.vectors.put(row, self._schema.vector(snapshot.axes))

    def ranking(self, search: SearchRequest) -> Iterator[Match]:
        """What is admitted of the rows as they are now, the best first, at any time later."""
        vectors, rows = self.vectors, list(self._rows)
        if vectors is None:
            return iter(())
        scores = vectors.scores(self._schema.vector(search.axes), len(rows))

        def ranked() -> Iterator[Match]:
            done = set[int]()
            # The best of so many; some may not be admitted: then all.
            for number in (4 * search.limit + BATCH_SIZE, len(rows)):
                for row in vectors.best(scores, number):
                    snapshot, score = rows[row], clamp_score(float(scores[row]))
                    if score < search.score_threshold:
                        return
                    if snapshot is not None and row not in done and search.admits(snapshot):
                        yield Match(snapshot, score)
                    done.add(row)
                if number >= len(rows):
                    return

        return ranked()


class MemoryBackend:
    """States in the memory of this process.

    Reads take no lock, unless on a free-threaded Python a write comes between.
    """

    name = "memory"
    is_open = True
    native_snapshots = False
    batch_size = BATCH_SIZE

    def __init__(self, config: MemoryStoreConfig, waits: Waits) -> None:
        self.config = config
        self.schema = Schema.of(config)
        # One deque a user, ascending in time, the latest at its end: one append changes both at one moment.
        self.timelines: dict[str, deque[StateSnapshot]] = {}
        self._waits = waits
        self._retention = Retention.of(config)
        self._capacity = max(1, self._retention.maximum)
        self._lock: Any = threading.RLock()  # knows whether the thread has it
        self._index = VectorIndex(self.schema)
        self._closed = False
        OPEN.others.add(self)

    def get_latest(self, user_id: str) -> StateSnapshot | None:
        """The latest snapshot of a user, whose id need not have been checked."""
        try:
            return self.timelines[user_id][-1]
        except (KeyError, TypeError):
            self._check_open()
            check_user_id(user_id)
            return None
        except IndexError:  # free threading: it got shorter between the looks at its length and at its end
            with self._lock:
                timeline = self.timelines.get(user_id)
                return timeline[-1] if timeline else None

    def upsert_latest(self, snapshot: StateSnapshot, expected: Expected) -> None:
        """Write a snapshot, which has been checked like ``expected``."""
        if self._lock._is_owned():
            raise ReenteredError("memory://")
        with self._lock:
            self._put(snapshot, expected)

    def _free_lock(self) -> Any:
        """The lock, unless a call comes in the middle of another one of the same thread, which holds it.

        That is asked of the lock itself: a flag would stay behind where an interrupt comes at its line.
        """
        if self._lock._is_owned():
            raise ReenteredError("memory://")
        return self._lock

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error()

    def _put(self, snapshot: StateSnapshot, expected: Expected = ANY) -> None:
        if self._closed:
            raise closed_error()
        user_id = snapshot.user_id
        timeline = self.timelines.get(user_id)
        if expected is not ANY:
            latest = timeline[-1] if timeline else None
            if latest != expected:
                raise conflict_error(user_id, expected, latest)
        self._index.stale.add(user_id)  # first: an interrupt may come after any line
        if timeline is None:
            self.timelines[user_id] = deque((snapshot,), self._capacity)
        elif snapshot.updated_at_unix_ms > timeline[-1].updated_at_unix_ms:
            timeline.append(snapshot)
            if self._retention.days is not None:
                self._trim(timeline)
        else:
            others = [entry for entry in timeline if entry.updated_at_unix_ms != snapshot.updated_at_unix_ms]
            self.timelines[user_id] = deque(sorted([*others, snapshot], key=time_of), self._capacity)

    def _trim(self, timeline: deque[StateSnapshot]) -> int:
        removable = self._retention.removable([entry.updated_at_unix_ms for entry in timeline])
        removable = min(removable, len(timeline) - 1)  # the newest is the latest snapshot, which stays
        for _ in range(removable):
            timeline.popleft()
        return removable

    def _moment(self, user_id: str, *, keep_latest: bool) -> list[StateSnapshot]:
        """What history shows of a user, oldest first, as it is at one moment, or at least the latest."""
        timeline = self.timelines.get(user_id)
        if timeline is None:
            return []
        try:
            entries = list(timeline.copy())
        except RuntimeError:  # free threading: a write came between two entries
            with self._free_lock():
                entries = list(timeline)
        hidden = self._retention.hidden([entry.updated_at_unix_ms for entry in entries])
        return entries[min(hidden, len(entries) - 1) if keep_latest else hidden :]

    # What Backend asks for. Nothing suspends but a search, between two of its steps.

    async def open(self) -> None:
        """See Backend.open."""

    def begin(self, operation: Callable[[Any], Coroutine[Any, Any, T]]) -> Coroutine[Any, Any, T]:
        """See Backend.begin."""
        return operation(self)

    def cached(self, user_id: str) -> StateSnapshot | None:
        """See Backend.cached."""
        return self.get_latest(user_id)

    async def find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        """See Backend.find."""
        found = ((user_id, self.get_latest(user_id)) for user_id in user_ids)
        return {user_id: latest for user_id, latest in found if latest is not None}

    async def history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        """See Backend.history."""
        self._check_open()
        newest_first = reversed(self._moment(user_id, keep_latest=False))
        chosen = (entry for entry in newest_first if window.since <= entry.updated_at_unix_ms <= window.until)
        return list(itertools.islice(chosen, window.limit))

    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """See Backend.write."""
        with self._free_lock():
            for snapshot in snapshots:
                self._put(snapshot)

    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        """See Backend.write_expected."""
        self.upsert_latest(snapshot, expected)

    async def delete(self, user_id: str) -> bool:
        """See Backend.delete."""
        with self._free_lock():
            self._check_open()
            self._index.stale.add(user_id)
            return self.timelines.pop(user_id, None) is not None

    async def search(
        self, request: SearchRequest, cursor: Iterator[Match] | None
    ) -> tuple[list[Match], Cursor]:
        """See Backend.search."""
        self._check_open()
        if cursor is not None:
            page = list(itertools.islice(cursor, min(BATCH_SIZE, request.limit)))
            return page, cursor if page else None
        self.schema.check(request.axes)
        if request.history or request.user_id is not None:
            return await self._scan(request), None
        if self._index.vectors is None and "numpy" not in sys.modules:  # which takes 0.1 s to import
            await self._waits.call(functools.partial(make_vectors, self.schema.vector_size))
        while not self._caught_up():
            await self._waits.pause_if_due()
        with self._free_lock():
            ranking = self._index.ranking(request)
        return await self.search(request, ranking)

    def _caught_up(self) -> bool:
        with self._free_lock():
            try:
                return self._index.catch_up(self.get_latest)
            except BaseException:  # an interrupt, say: begin anew
                self._index = VectorIndex(self.schema)
                self._index.stale.update(self.timelines)
                raise

    async def _scan(self, request: SearchRequest) -> list[Match]:
        """Look at snapshots one by one, where the vectors of the latest ones do not serve."""
        direction, best = self.schema.vector(request.axes), list[Match]()
        score_of = operator.attrgetter("score")
        for user_id in list(self.timelines) if request.user_id is None else [request.user_id]:
            if request.history:
                entries = self._moment(user_id, keep_latest=False)
            else:
                latest = self.get_latest(user_id)
                entries = [] if latest is None else [latest]
            for snapshot in filter(request.admits, entries):
                score = sum(map(operator.mul, direction, self.schema.vector(snapshot.axes)))
                if score >= request.score_threshold:
                    best.append(Match(snapshot, clamp_score(score)))
            if len(best) > 4 * request.limit + BATCH_SIZE:
                best = heapq.nlargest(request.limit, best, key=score_of)
            await self._waits.pause_if_due()
        return heapq.nlargest(request.limit, best, key=score_of)

    async def users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        """See Backend.users."""
        self._check_open()
        return page_of_ids(iter(list(self.timelines)) if cursor is None else cursor, self.batch_size)

    async def states(self, cursor: Cursor) -> StatesPage:
        """See Backend.states."""
        self._check_open()
        remaining: Iterator[str] = iter(list(self.timelines)) if cursor is None else cursor
        states: list[StateSnapshot] = []
        for user_id in remaining:
            states += self._moment(user_id, keep_latest=True)
            if len(states) >= self.batch_size:
                return StatesPage(states, remaining)
        return StatesPage(states)

    async def count(self) -> int:
        """See Backend.count."""
        self._check_open()
        return len(self.timelines)

    async def count_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """See Backend.count_page."""
        page, cursor = await self.users(cursor)
        return sum(len(self._moment(user_id, keep_latest=False)) for user_id in page), cursor

    async def prune_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """See Backend.prune_page."""
        page, cursor = await self.users(cursor)
        with self._free_lock():
            timelines = [self.timelines[user_id] for user_id in page if user_id in self.timelines]
            return sum(self._trim(timeline) for timeline in timelines), cursor

    async def stage(self, token: str) -> MemoryBackend:  # noqa: ARG002 - nothing of this one can be left
        """See Backend.stage."""
        axes = attrs.evolve(self.config, axes=self.schema.axes, vector_size=self.schema.vector_size)
        return MemoryBackend(axes, self._waits)

    async def adopt(self, staged: MemoryBackend) -> None:
        """See Backend.adopt."""
        with self._free_lock():
            self._check_open()
            old, self.timelines, self._index = self.timelines, staged.timelines, staged._index
            staged.timelines = {}  # which are another's now, should this be cancelled
        await self._free(old)

    async def discard(self, staged: MemoryBackend) -> None:
        """See Backend.discard."""
        await staged.close()

    async def add_axes(self, names: Sequence[str]) -> None:
        """See Backend.add_axes."""
        with self._free_lock():
            self._check_open()
            self.schema = self.schema.extended(names)
            self._index = VectorIndex(self.schema)
            self._index.stale.update(self.timelines)

    async def look(self, seconds: float) -> Health:  # noqa: ARG002 - it is there at once
        """See Backend.look."""
        timelines = list(self.timelines.values())
        points = len(timelines) + (sum(map(len, timelines)) if self._retention.maximum else 0)
        return Health("healthy", self.name, 0.0, len(timelines), points)

    def abandon(self) -> None:
        """Go on in a forked child, which has a copy of its own, whatever other threads held at the fork."""
        self._lock = threading.RLock()

    async def close(self) -> None:
        """Forget everything."""
        with self._free_lock():
            self._closed = True
            old, self.timelines, self._index = self.timelines, {}, VectorIndex(self.schema)
        await self._free(old)

    async def _free(self, timelines: dict[str, deque[StateSnapshot]]) -> None:
        """Let go of snapshots in pieces: those of 100,000 users at once take 60 ms."""
        while timelines:
            for _ in range(min(4 * BATCH_SIZE, len(timelines))):
                timelines.popitem()
            if timelines:
                await self._waits.pause_if_due()


class MemoryPlace:
    """The place of a memory store: there is nothing between it and its backend."""

    location = "memory://"
    engine = "memory"
    is_shown = True

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._points = MemoryEngine()
        self._points_lock: Any = threading.RLock()  # knows whether the thread has it
        self._closed = False
        OPEN.others.add(self)

    def abandon(self) -> None:
        """Go on in a forked child, as MemoryBackend.abandon does."""
        self._points_lock = threading.RLock()

    async def open(self) -> MemoryBackend:
        """See Place.open."""
        return self._backend

    async def drive(self, body: Coroutine[Any, Any, T], *, long: bool = False) -> T:  # noqa: ARG002 - none is
        """See Place.drive."""
        return await body

    async def with_engine(self, operation: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """See Place.with_engine; alone, as threads may share the store."""
        if self._points_lock._is_owned():
            raise ReenteredError(self.location)
        with self._points_lock:
            if self._closed:
                raise closed_error()
            return run(operation(self._points))

    async def close(self) -> None:
        """See Place.close."""
        await self._backend.close()
        self._closed = True
        await self._points.close()

    def signs(self, latency_ms: float) -> list[str]:  # noqa: ARG002 - there is no trouble
        """See Place.signs."""
        return []

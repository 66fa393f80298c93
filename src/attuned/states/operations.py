"""The operations of a store, written once: synchronous stores run them, asynchronous ones await them."""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast

import attrs

from attuned.base.config import check_callable, check_flag, check_positive
from attuned.base.errors import (
    BackendError,
    ConflictError,
    ReenteredError,
    SnapshotError,
    StoreClosedError,
    StoreError,
    T,
    ValidationError,
    closed_error,
    plural,
    short_id,
    type_name,
    unknown_user_error,
)
from attuned.base.html import History, Matches
from attuned.base.telemetry import Telemetry, report_slow
from attuned.base.values import (
    ANY,
    MAX_INTEGER,
    NEUTRAL,
    Axes,
    Expected,
    Health,
    Match,
    SnapshotFields,
    SnapshotReport,
    StateSnapshot,
    check_integer,
    check_user_id,
    removed_axes,
    shape_of,
    time_of,
)
from attuned.connections.runtime import Pager, Waits, run
from attuned.snapshots.archive import check_progress
from attuned.snapshots.directory import (
    PortableSnapshotWriter,
    SnapshotFile,
    SnapshotOrigin,
    SnapshotRequest,
)
from attuned.states.contract import (
    BATCH_SIZE,
    CLOSED,
    UNOPENED,
    Backend,
    Cursor,
    HistoryWindow,
    NativeBackend,
    Place,
    SearchRequest,
    StatesPage,
    check_expected,
    check_state,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
    from datetime import datetime

    from attuned.engines.waist import Engine
    from attuned.snapshots.archive import Progress
    from attuned.states.memory import MemoryBackend


U = TypeVar("U")


class Operations:
    """What a store does, over a backend and the place where that is."""

    STATUS_TIMEOUT = 5.0  # seconds that a look at a server may take

    def __init__(self, backend: Backend, place: Place, waits: Waits, *, collection: str) -> None:
        self.backend = backend
        self.place = place
        self.waits = waits
        self.collection = collection
        self._failed_close: StoreError | None = None  # which every further close tells again
        self.reporter: Telemetry | None = None  # of what is slow
        self.slow_ms: float | None = None  # a piece that takes longer is logged
        self.documents: dict[str, Any] = {}  # its collections of them, by name

    # The life of a store

    @property
    def is_closed(self) -> bool:
        """Whether the store has been closed."""
        return self.backend is CLOSED

    def check_open(self) -> None:
        """Raise StoreClosedError where the store has been closed."""
        if self.backend is CLOSED:
            raise closed_error()

    async def open(self) -> None:
        """Make ready what checks need: open what is not open yet, or connect."""
        if self.backend is UNOPENED:
            backend = await self.place.open()
            if self.backend is UNOPENED:  # else another task was faster, or has closed the store
                self.backend = backend
            elif self.backend is CLOSED:
                await self.place.close()
        self.check_open()
        if not self.backend.is_open:
            await self.place.drive(self.backend.open())

    def axes(self) -> tuple[str, ...]:
        """The axes of the store, which must be open."""
        self.check_open()
        if not self.backend.is_open:
            raise StoreError("the axes are known once the store is open: await an operation first")
        return self.backend.schema.axes

    async def close(self) -> None:
        """Release everything; harmless when repeated. One that fails closes too."""
        backend, self.backend = self.backend, CLOSED
        if backend is CLOSED:
            if self._failed_close is not None:
                raise self._failed_close
            return
        try:
            await self.place.close()
        except ReenteredError:
            self.backend = backend  # nothing was done
            raise
        except StoreError as error:
            self._failed_close = error  # it is closed all the same
            raise

    async def _drive(
        self,
        name: str,
        operation: Callable[[Any], Coroutine[Any, Any, T]],
        about: object = None,
        *,
        long: bool = False,
    ) -> T:
        """Run a piece of an operation, which may run while no other one does, and look how long it takes.

        Pieces of bulk operations, which hold as much as fits, are not looked at: whoever calls these expects
        to wait. They have no name.
        """
        if self.backend is UNOPENED:
            await self.open()
        return await self._timed(name, self.place.drive(self.backend.begin(operation), long=long), about)

    async def with_engine(
        self, name: str, operation: Callable[[Engine], Coroutine[Any, Any, T]], about: object = None
    ) -> T:
        """Run a piece of work on the engine of points, as ``_drive`` does on the backend."""
        self.check_open()
        if self.backend is UNOPENED:
            await self.open()
        return await self._timed(name, self.place.with_engine(operation), about)

    async def _timed(self, name: str, piece: Awaitable[T], about: object) -> T:
        began = time.perf_counter()
        try:
            return await piece
        finally:
            seconds = time.perf_counter() - began
            if name and self.slow_ms and seconds * 1000 > self.slow_ms:
                report_slow(self.reporter, self.place.engine, name, seconds, about)

    # Single states

    async def upsert_latest(self, snapshot: StateSnapshot, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""

        async def write(backend: Backend) -> None:
            check_state(backend.schema, snapshot)
            check_expected(expected)
            if expected is ANY:
                await backend.write([snapshot])
            else:
                await backend.write_expected(snapshot, expected)

        await self._drive("upsert", write, snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        """See StateStore.get_latest."""
        cached = self.backend.cached(user_id)
        if cached is not None:
            return cached
        user_id = check_user_id(user_id)
        found: dict[str, StateSnapshot] = await self._drive(
            "get", lambda backend: backend.find([user_id]), user_id
        )
        return found.get(user_id)

    async def update(self, user_id: str, fn: Callable[..., Any], attempts: int) -> StateSnapshot | None:
        """See StateStore.update."""
        check_callable("fn", fn)
        for attempt in range(check_integer("attempts", attempts, 1, MAX_INTEGER)):
            latest = await self.get_latest(user_id)
            new = _check_update(user_id, latest, await self.waits.ask(fn, latest))
            if new is None:
                return latest
            try:
                await self.upsert_latest(new, latest)
            except ConflictError as conflict:
                if conflict.ambiguous:
                    raise
                # Full jitter, none after the first; see Marc Brooker, "Exponential Backoff And Jitter", AWS
                # Architecture Blog, 2015.
                await self.waits.sleep(
                    random.uniform(0.0, min(0.1, 0.001 * 2.0**attempt)) if attempt else 0.0
                )
            else:
                return new
        raise ConflictError(
            f"user {short_id(user_id)!r}: still in conflict after {attempts} attempts; try again later"
        )

    async def patch(
        self, user_id: str, axes: Mapping[str, float | None], fields: SnapshotFields
    ) -> StateSnapshot:
        """See StateStore.patch."""
        first = StateSnapshot(user_id, {}, updated_at_unix_ms=0).patched(
            axes, **fields
        )  # checks, before any read
        if removed := removed_axes(axes):
            await self.open()
            self.backend.schema.check(Axes(dict.fromkeys(removed, NEUTRAL)))

        def merge(latest: StateSnapshot | None) -> StateSnapshot:
            return first if latest is None else latest.patched(axes, **fields)

        return cast("StateSnapshot", await self.update(user_id, merge, 32))

    async def delete(self, user_id: str) -> bool:
        """See StateStore.delete."""
        user_id = check_user_id(user_id)
        return await self._drive("delete", lambda backend: backend.delete(user_id), user_id)

    async def get_history(
        self, user_id: str, limit: int, since: int | datetime | None, until: int | datetime | None
    ) -> list[StateSnapshot]:
        """See StateStore.get_history."""
        user_id = check_user_id(user_id)
        window = HistoryWindow.of(limit, since, until)
        return History(
            await self._drive("history", lambda backend: backend.history(user_id, window), user_id)
        )

    async def states_to_plot(self, user_id: str, limit: int) -> list[StateSnapshot]:
        """The newest snapshots of a user, or the latest alone where there is no history."""
        return await self.get_history(user_id, limit, None, None) or [await self.latest_or_raise(user_id)]

    async def latest_or_raise(self, user_id: str) -> StateSnapshot:
        """The latest snapshot of a user, or UserNotFoundError."""
        latest = await self.get_latest(user_id)
        if latest is None:
            raise unknown_user_error(user_id)
        return latest

    async def search(
        self,
        query: StateSnapshot | Mapping[str, float] | str,
        *,
        exclude_user_id: str | None,
        **options: Any,
    ) -> list[Match]:
        """See StateStore.search_similar."""
        if isinstance(query, str):
            if exclude_user_id is None:
                exclude_user_id = query
            query = await self.latest_or_raise(query)
        request = SearchRequest.of(query, exclude_user_id=exclude_user_id, **options)
        pages = self._pages("search", lambda backend, cursor: backend.search(request, cursor))
        found: dict[tuple[str, int], Match] = {}
        while len(found) < request.limit and (page := await pages.next()) is not None:
            found |= {(match.snapshot.user_id, match.snapshot.updated_at_unix_ms): match for match in page}
        best = sorted(found.values(), key=attrgetter("score"), reverse=True)[: request.limit]
        return Matches(best, request.axes)

    # Many states

    async def upsert_many(self, snapshots: Iterable[StateSnapshot], progress: Progress | None) -> int:
        """See StateStore.upsert_many."""
        self.check_open()
        progress = check_progress(progress)
        await self.open()
        written = 0
        total = len(cast("Any", snapshots)) if hasattr(snapshots, "__len__") else None
        if isinstance(snapshots, list | tuple):
            snapshots = tuple(snapshots)  # of this moment, whatever the caller does to it between two pieces
            for position, snapshot in enumerate(snapshots):
                if position % BATCH_SIZE == 0:
                    await self.waits.pause_if_due()
                check_state(self.backend.schema, snapshot)
        try:
            for batch in self._batches(snapshots):
                await self._write(batch)
                written += len(batch)
                progress(written, total)
                await self.waits.pause()
        except StoreError as error:
            error.written = written
            raise
        return written

    async def _write(self, batch: Sequence[StateSnapshot]) -> None:
        await self._drive("", lambda backend: backend.write(batch))

    def _batches(self, snapshots: Iterable[StateSnapshot]) -> Iterator[list[StateSnapshot]]:
        """Cut into batches, checked before they are handed out: a tuple was, others are batch by batch.

        An error of the caller's iterator is raised when what came before it has been dealt with.
        """
        if isinstance(snapshots, StateSnapshot) or not isinstance(snapshots, Iterable):
            raise ValidationError(
                f"snapshots: an iterable of StateSnapshot is needed, got {type_name(snapshots)}"
            )
        schema, size = self.backend.schema, self.backend.batch_size
        known = isinstance(snapshots, tuple)  # and checked
        failures: list[Exception] = []

        def until_failure() -> Iterator[StateSnapshot]:
            try:
                yield from snapshots
            except Exception as failure:  # noqa: BLE001 - it is raised again
                failures.append(failure)

        remaining = until_failure()
        while batch := list(itertools.islice(remaining, size)):
            if not known:
                for snapshot in batch:
                    check_state(schema, snapshot)
            yield batch
        for failure in failures:
            raise failure

    async def get_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        """See StateStore.get_many."""
        self.check_open()
        if isinstance(user_ids, str) or not isinstance(user_ids, Iterable):
            raise ValidationError(f"user_ids: an iterable of user ids is needed, got {type_name(user_ids)}")
        asked = list(dict.fromkeys(check_user_id(user_id) for user_id in user_ids))
        if asked and self.backend is UNOPENED:
            await self.open()
        found: dict[str, StateSnapshot] = {}
        for start in range(0, len(asked), max(1, self.backend.batch_size)):
            if start:
                await self.waits.pause()
            found.update(await self._find(asked[start : start + self.backend.batch_size]))
        return found

    async def _find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        return await self._drive("get_many", lambda backend: backend.find(user_ids))

    def users(self) -> Pager[list[str]]:
        """The pages of all user ids."""
        return self._pages("users", lambda backend, cursor: backend.users(cursor))

    def latest(self) -> Pager[list[StateSnapshot]]:
        """The pages of all users' latest snapshots."""

        async def page(backend: Backend, cursor: Cursor) -> tuple[list[StateSnapshot], Cursor]:
            user_ids, cursor = await backend.users(cursor)
            return list((await backend.find(user_ids)).values()), cursor

        return self._pages("items", page)

    async def states_of(
        self, user_ids: Iterable[str] | None, since: int | datetime | None, until: int | datetime | None
    ) -> list[StateSnapshot]:
        """All states of some users, or of all: what history shows within a window, and the latest ones."""
        self.check_open()
        window, found = HistoryWindow.of(MAX_INTEGER, since, until), list[StateSnapshot]()
        await self.open()  # for the axes, whoever is asked for
        if user_ids is None:
            pages = self.states()
            while (page := await pages.next()) is not None:
                found += (each for each in page.states if window.since <= time_of(each) <= window.until)
            return found
        for user_id, latest in (await self.get_many(user_ids)).items():
            states = await self.get_history(user_id, window.limit, window.since, window.until)
            if (
                time_of(latest) not in map(time_of, states)
                and window.since <= time_of(latest) <= window.until
            ):
                found.append(latest)  # it has aged out of the history, or there is none
            found += states
        return found

    def states(self) -> Pager[StatesPage]:
        """The pages of all states, each user's together."""

        async def page(backend: Backend, cursor: Cursor) -> tuple[StatesPage, Cursor]:
            found = await backend.states(cursor)
            return found, found.cursor

        return self._pages("", page)

    def _pages(
        self, name: str, fetch: Callable[[Backend, Cursor], Coroutine[Any, Any, tuple[T, Cursor]]]
    ) -> Pager[T]:
        async def page(cursor: Cursor) -> tuple[T, Cursor]:
            return await self._drive(name, lambda backend: fetch(backend, cursor))

        return Pager(page, self.waits)

    async def count(self, *, history: bool) -> int:
        """See StateStore.count."""
        if not check_flag("history", history):
            return await self._drive("count", lambda backend: backend.count())
        return await self._sum(self._pages("count", lambda backend, cursor: backend.count_page(cursor)))

    async def prune(self) -> int:
        """See StateStore.prune."""
        return await self._sum(self._pages("", lambda backend, cursor: backend.prune_page(cursor)))

    async def _sum(self, pages: Pager[int]) -> int:
        total = 0
        while (number := await pages.next()) is not None:
            total += number
        return total

    async def alter_axes(self, add: object) -> tuple[str, ...]:
        """See StateStore.alter_axes."""
        self.check_open()
        if isinstance(add, str) or not isinstance(add, Iterable):
            raise ValidationError(f"add: a list of axes is needed, got {type_name(add)}")
        names = shape_of(tuple(cast("Any", add))).names
        await self.open()
        if names:
            await self._drive("", lambda backend: backend.add_axes(names), long=True)
        return self.axes()

    # How it is

    async def health(self) -> Health:
        """See StateStore.health."""
        started = time.perf_counter()
        place = self.place
        try:
            found = await self._look(self.STATUS_TIMEOUT)
            signs = place.signs((time.perf_counter() - started) * 1000)
        except StoreError as error:
            latency_ms = (time.perf_counter() - started) * 1000
            location = place.location if place.engine not in ("memory", "qdrant") else None
            return Health("unhealthy", place.engine, latency_ms, location=location, message=str(error))
        latency_ms = (time.perf_counter() - started) * 1000
        return attrs.evolve(
            found,
            status="degraded" if found.status == "healthy" and signs else found.status,
            latency_ms=latency_ms,
            location=None if place.engine == "memory" else place.location,
            message="; ".join(filter(None, [found.message, *signs])),
        )

    async def _look(self, seconds: float) -> Health:
        if self.backend is UNOPENED:
            await self.open()
        return await self.place.drive(self.backend.look(seconds))

    async def wait_until_ready(self, timeout: float) -> None:  # noqa: ASYNC109 - as in the public method
        """See StateStore.wait_until_ready."""
        self.check_open()
        check_positive("timeout", timeout, zero=True)
        deadline = time.monotonic() + timeout
        while True:
            try:
                await self._look(max(0.01, min(deadline - time.monotonic(), self.STATUS_TIMEOUT)))
            except BackendError as error:
                left = deadline - time.monotonic()
                if left <= 0 or not error.retryable:
                    raise
                await self.waits.sleep(min(0.25, left))
            else:
                return

    # Backups

    def origin(self) -> SnapshotOrigin:
        """Which store a snapshot is of."""
        return SnapshotOrigin(self.place.location, self.place.engine, self.collection)

    async def create_snapshot(
        self, progress: Progress | None, *, directory: Any, kind: Any, **options: Any
    ) -> SnapshotReport:
        """See StateStore.create_snapshot."""
        self.check_open()
        progress = check_progress(progress)
        request = SnapshotRequest.of(directory, kind, **options, native=self.backend.native_snapshots)
        await self.open()
        if request.kind == "native":
            backend = cast("NativeBackend", self.backend)
            report = await self.place.drive(backend.create_native(request, self.place.location))
            if report is not None:
                return await self._told(report)
            request = attrs.evolve(request, kind="portable")
        with PortableSnapshotWriter(request, self.origin(), self.axes()) as writer:
            pages = self.states()
            while (page := await pages.next()) is not None:
                progress(writer.add(page.states, page.unsettled), None)
            return await self._told(await self.waits.call(writer.finish))

    async def _told(self, report: SnapshotReport) -> SnapshotReport:
        """The report of a backup of states, with the collections of documents that it does not hold.

        On a server, where each would be a request more, they are those that this store has used.
        """

        async def names(engine: Engine) -> list[str]:
            if engine.shared:
                return sorted(self.documents)
            found = await engine.collections()
            return sorted(name for name, metadata in found.items() if metadata.get("kind") == "documents")

        left_out = await self.place.with_engine(names)
        if not left_out:
            return report
        shown = ", ".join(left_out[:5]) + (", and others" if left_out[5:] else "")
        said = f"the documents of {plural(len(left_out), 'collection')} are not in it: {shown}"
        return attrs.evolve(report, message="; ".join(filter(None, [report.message, said])))

    async def restore_snapshot(
        self, path: Any, mode: str, progress: Progress | None, *, unchecked: bool
    ) -> SnapshotReport:
        """See StateStore.restore_snapshot."""
        self.check_open()
        check_flag("unchecked", unchecked)
        progress = check_progress(progress)
        saved = SnapshotFile(path)
        saved.check_mode(mode, native=self.backend.native_snapshots)
        await self.open()
        if saved.kind == "native":
            await self.waits.call(saved.verify)
            if saved.unchecked and not unchecked:
                raise SnapshotError(
                    f"{saved.path}: {saved.unchecked}, and a damaged one may end the server; unchecked=True "
                    "(or --unchecked) restores it all the same"
                )
            backend = cast("NativeBackend", self.backend)
            await self.place.drive(backend.restore_native(saved.path, saved.sha256))
        elif mode == "replace":
            if (
                self.backend.native_snapshots
            ):  # a server is changed in place: all must be known to be right before
                await self._verify(saved, progress)
            await self.replace(saved.sha256, lambda staged: staged.write_from(saved, progress))
        else:
            await self._verify(saved, progress)
            await self.write_from(saved, progress, skip_known=mode == "skip")
        return saved.report(self.place.location)

    async def replace(self, token: str, fill: Callable[[Operations], Awaitable[object]]) -> None:
        """Let ``fill`` write to an empty store, which then takes the place of the contents.

        At a failure it is given up. A server is changed in place, and marked with the token until the end.
        """
        backend = await self._drive("", lambda backend: backend.stage(token), long=True)
        staged = Operations(backend, self.place, self.waits, collection=self.collection)
        try:
            await fill(staged)
            await self._drive("", lambda backend: backend.adopt(staged.backend), long=True)
        except BaseException:
            await self.waits.shielded(self._discard(staged))
            raise

    async def _discard(self, staged: Operations) -> None:
        try:
            await self._drive("", lambda backend: backend.discard(staged.backend), long=True)
        except StoreClosedError:
            return  # the next opening removes it

    async def _verify(self, saved: SnapshotFile, progress: Progress) -> None:
        for done in saved.verifying(self.axes()):
            progress(done, None)
            await self.waits.pause()

    async def write_from(self, saved: SnapshotFile, progress: Progress, *, skip_known: bool = False) -> None:
        """Write what a portable snapshot holds, of users who are not there yet or of all."""
        done, adding = 0, None  # ``adding``: a new user whose snapshots may go on in the next batch
        for batch in saved.batches(self.backend.batch_size, self.axes()):
            done += len(batch)
            chosen = batch
            if skip_known:
                known = await self._find(list(dict.fromkeys(each.user_id for each in batch)))
                chosen = [each for each in batch if each.user_id not in known or each.user_id == adding]
                adding = chosen[-1].user_id if chosen and chosen[-1] is batch[-1] else None
            if chosen:
                await self._write(chosen)
            progress(done, saved.total)
            await self.waits.pause()


class MemoryOperations(Operations):
    """Operations over a backend in memory: there is no lock to take, nor anything that could be slow."""

    backend: MemoryBackend

    async def _drive(
        self,
        name: str,  # noqa: ARG002 - nothing is told of it
        operation: Callable[[Any], Coroutine[Any, Any, T]],
        about: object = None,  # noqa: ARG002
        *,
        long: bool = False,  # noqa: ARG002
    ) -> T:
        return await operation(self.backend)

    async def upsert_latest(self, snapshot: StateSnapshot, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        check_state(self.backend.schema, snapshot)
        check_expected(expected)
        self.backend.upsert_latest(snapshot, expected)


def _check_update(user_id: str, latest: StateSnapshot | None, new: object) -> StateSnapshot | None:
    """Check what the function of an ``update`` gave."""
    if new is None:
        return None
    if not isinstance(new, StateSnapshot):
        raise ValidationError(
            f"update: the function must return a StateSnapshot or None, got {type_name(new)}"
        )
    if new.user_id != user_id:
        raise ValidationError("user_id: the function of an update must return a snapshot of the same user")
    if latest is not None and new.updated_at_unix_ms <= latest.updated_at_unix_ms:
        raise ValidationError(
            f"updated_at_unix_ms: an update must be newer than {latest.updated_at_unix_ms}, "
            f"got {new.updated_at_unix_ms}; StateSnapshot.patched sets it so"
        )
    return new


class PagedIterator(Generic[T, U]):
    """What stands in the pages of a store, made into what is asked for: iterated in place, or awaited."""

    def __init__(self, pages: Pager[list[T]], make: Callable[[T], U]) -> None:
        self._pages, self._make = pages, make
        self._ready: deque[T] = deque()
        self._ended = False

    async def fill(self) -> None:
        """Get some ready, unless there are some or no more."""
        while not self._ready and not self._ended:
            page = await self._pages.next()
            self._ended = page is None
            self._ready.extend(page or ())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> U:
        if not self._ready:
            run(self.fill())
            if not self._ready:
                raise StopIteration
        return self._make(self._ready.popleft())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> U:
        if not self._ready:
            await self.fill()
            if not self._ready:
                raise StopAsyncIteration
        return self._make(self._ready.popleft())

"""The stores that callers use, synchronous and asynchronous."""

from __future__ import annotations

import contextlib
import heapq
import html
import inspect
import itertools
import operator
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, cast

import attrs

from attuned.base.codec import Schema
from attuned.base.config import (
    DEFAULT_COLLECTION,
    MemoryOptions,
    MemoryStoreConfig,
    QdrantOptions,
    QdrantStoreConfig,
    check_callable,
    check_positive,
    make_config,
    make_qdrant_config,
)
from attuned.base.errors import (
    BackendError,
    ConflictError,
    StoreClosedError,
    StoreError,
    StoreLockedError,
    T,
    ValidationError,
    closed_error,
    unknown_user_error,
)
from attuned.base.html import (
    FONT,
    MAX_PLOTTED,
    TABLE,
    History,
    element,
    latest_alone,
    plot_states,
    plotted_axes,
    table_row,
)
from attuned.base.telemetry import SPANS, observe, report_slow, reporting_class
from attuned.base.values import (
    ANY,
    MAX_INTEGER,
    Expected,
    Health,
    Match,
    SnapshotFields,
    SnapshotReason,
    SnapshotReport,
    Source,
    StateSnapshot,
    check_integer,
    check_user_id,
    distinct_users,
    time_of,
)
from attuned.connections.files import (
    Directory,
    FlushRound,
    lock_waits,
    release_in_worker,
    release_unclosed,
    run_in_worker,
    settle_in_worker,
)
from attuned.connections.runtime import async_sleep, run_in_thread, shielded
from attuned.snapshots.archive import Progress, RestoreMode, check_progress
from attuned.snapshots.directory import (
    PortableSnapshotWriter,
    SnapshotFile,
    SnapshotOrigin,
    SnapshotRequest,
    SnapshotRequestFields,
)
from attuned.states.contract import (
    BATCH_SIZE,
    STATUS_TIMEOUT,
    Cursor,
    HistoryWindow,
    Retention,
    SearchRequest,
    check_expected,
    check_history_flag,
    check_snapshot,
    clamp_score,
    conflict_error,
)
from attuned.states.memory import VectorIndex, score_of
from attuned.states.operations import (
    AsyncPages,
    NewUsers,
    UserPages,
    backoff,
    check_batches,
    check_update,
    gave_up_error,
    id_batches,
    iterate_pages,
    known_length,
    next_page,
    numbered_batches,
    patch_function,
    sum_pages,
)
from attuned.states.owned import OwnedBackend, open_directory, open_in_worker
from attuned.states.shared import ServerConnection, SharedBackend, connect_server

if TYPE_CHECKING:
    import os
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Coroutine,
        Generator,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )
    from types import TracebackType

    from attuned.engines.waist import EmbeddedEngine
    from attuned.states.points import PointsBackend

_LONG_OPERATIONS = frozenset({"upsert_many", "prune", "read", "stage", "adopt", "discard"})


def warn_if_slow(store: QdrantStore | AsyncQdrantStore, operation: str, began: float, about: object) -> None:
    """Log a step of an operation, of which everything went through the engine, if it took too long.

    Not those of long operations: their steps hold as much as fits, and whoever calls them expects to wait.
    """
    if operation in _LONG_OPERATIONS:
        return
    limit_ms, took_ms = store.config.slow_operation_ms, (time.perf_counter() - began) * 1000
    if limit_ms and took_ms > limit_ms:
        report_slow(store, operation, took_ms / 1000, about)


def store_html(store: StateStore | AsyncStateStore, health: Health | None) -> str:
    """A store: where it is, how it is and how much it holds; ``health`` None where nobody asked."""
    facts: dict[str, object] = {"place": store._place().strip("'"), "engine": store._engine_name()}
    if store.is_closed:
        facts["health"] = "closed"
    elif health is None:
        facts["health"] = "not asked: await store.health()"
    else:
        facts |= {"health": health.status, "users": health.users, "points": health.points}
        facts |= {"server": health.version, "message": health.message}
    rows = [
        table_row(name, html.escape(f"{fact:,}" if isinstance(fact, int) else str(fact)))
        for name, fact in facts.items()
        if fact not in (None, "")
    ]
    return element("div", FONT, f"<b>{type(store).__name__}</b>", element("table", TABLE, *rows))


class StoreBase(ABC):
    """What both contracts say of a store without waiting for anything."""

    _reports: Collection[str] = SPANS.keys()
    _backend = ""  # the name of the engine, where all stores of a class have the same

    @property
    @abstractmethod
    def axes(self) -> tuple[str, ...]:
        """The names of the axes that this store keeps, in the order of its vectors.

        An asynchronous store on disk or on a server knows them once it is open: StoreError before.
        """

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Whether the store has been closed."""

    @abstractmethod
    def _check(self, snapshot: StateSnapshot) -> None:
        """Raise ValidationError unless this is a snapshot that the store can keep."""

    @abstractmethod
    def _target(self) -> str:
        """What open_store opens it with."""

    @abstractmethod
    def _engine_name(self) -> str:
        """The backend, as health, metrics and snapshots name it."""

    @abstractmethod
    def _collection(self) -> str:
        """The collection, which snapshots are named after."""

    def _origin(self) -> SnapshotOrigin:
        return SnapshotOrigin(self._target(), self._engine_name(), self._collection())

    def _place(self) -> str:
        """What its repr says of where it is."""
        return ""

    def _batch_size(self) -> int:
        """How many snapshots or users one step of a long operation takes."""
        return BATCH_SIZE

    @property
    def _has_native(self) -> bool:
        """Whether this is a server, which takes snapshots of its own and is changed in place."""
        return False

    def _ensure_open(self) -> None:
        if self.is_closed:
            raise closed_error()

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        return f"<{type(self).__name__} {' '.join(filter(None, (self._place(), state)))}>"


class StateStore(StoreBase):
    """The contract of every synchronous store.

    A store keeps, for each user, the *latest* snapshot (the one with the greatest time written since the
    user was last deleted; of two with the same time the later write replaces the other) and a *history* of
    the newest ``max_history_per_user`` distinct times, the latest included. Bad input raises ValidationError
    before anything is written; a write that returned is kept. It can be used from many threads, as a context
    manager, and read like a mapping from user id to latest snapshot.
    """

    # What an engine adds: the primitives of the operations below.

    @abstractmethod
    def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """Write a snapshot: into history, and as the latest if it is not older than the current one.

        With ``expected``, the snapshot read before or None for "must not exist", only if that is still the
        latest; otherwise ConflictError is raised and nothing changes. Raises ValidationError for an axis
        that the store does not have, BackendError.
        """

    @abstractmethod
    def get_latest(self, user_id: str) -> StateSnapshot | None:
        """The latest snapshot of a user; None where there is none. Raises ValidationError, BackendError."""

    @abstractmethod
    def delete(self, user_id: str) -> bool:
        """Remove the latest snapshot and the history of a user; True if there was anything.

        No tombstone is left: an older state written afterwards recreates the user. Raises ValidationError,
        BackendError.
        """

    @abstractmethod
    def health(self) -> Health:
        """How the store is, and how much it holds; never raises: what is wrong is in the ``message``."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; harmless when repeated. Afterwards every other call but health() raises."""

    @abstractmethod
    def _write_batch(self, snapshots: Sequence[StateSnapshot]) -> None: ...

    @abstractmethod
    def _find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]: ...

    @abstractmethod
    def _history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]: ...

    @abstractmethod
    def _search(self, search: SearchRequest) -> list[Match]: ...

    @abstractmethod
    def _page_of_users(self, cursor: Cursor) -> tuple[list[str], Cursor]: ...

    @abstractmethod
    def _count_users(self) -> int: ...

    @abstractmethod
    def _count_page(self, cursor: Cursor) -> tuple[int, Cursor]: ...

    @abstractmethod
    def _prune_page(self, cursor: Cursor) -> tuple[int, Cursor]: ...

    @abstractmethod
    def _page_of_states(self, cursor: Cursor) -> tuple[list[StateSnapshot], Cursor]:
        """All of what some users have, oldest first, as it was at one moment for each."""

    @abstractmethod
    def _stage(self, token: str) -> Self:
        """A store to be written to, whose contents then take the place of this one's."""

    @abstractmethod
    def _adopt(self, staged: Any) -> None:
        """Let what was staged take the place of the contents."""

    @abstractmethod
    def _discard(self, staged: Any) -> None:
        """Give up what was staged."""

    # What every engine shares.

    def upsert_many(self, snapshots: Iterable[StateSnapshot], *, progress: Progress | None = None) -> int:
        """Write many snapshots in batches, each as ``upsert_latest`` would; returns how many were written.

        A list or tuple is checked whole before the first write, any other iterable batch by batch; an error
        carries in ``written`` how many had been written. ``progress(done, total)`` is called after each
        batch, ``total`` None where it is unknown.
        """
        self._ensure_open()
        progress = check_progress(progress)
        self._open()
        total, written = known_length(snapshots), 0
        try:
            for batch in check_batches(snapshots, self._check, self._batch_size()):
                self._write_batch(batch)
                written += len(batch)
                progress(written, total)
        except StoreError as error:
            error.written = written
            raise
        return written

    def patch(
        self, user_id: str, axes: Mapping[str, float], **fields: Unpack[SnapshotFields]
    ) -> StateSnapshot:
        """Merge axes into a user's latest snapshot, creating it where absent; returns the new snapshot.

        Fields are kept unless given; the time is now, and at least 1 ms after the one before. Raises
        ValidationError, ConflictError when other writers never let it through, BackendError.
        """
        return cast("StateSnapshot", self.update(user_id, patch_function(user_id, axes, fields)))

    def update(
        self,
        user_id: str,
        fn: Callable[[StateSnapshot | None], StateSnapshot | None],
        *,
        attempts: int = 32,
    ) -> StateSnapshot | None:
        """Read, change and write a user's latest snapshot without losing another writer's change.

        ``fn`` gets the latest snapshot or None and returns the new one, of the same user and newer, or None
        to leave things as they are. It runs without a lock, may use the store, and may run several times.
        Returns the latest afterwards; raises ConflictError after ``attempts`` conflicts, ValidationError.
        """
        check_callable("fn", fn)
        for attempt in range(check_integer("attempts", attempts, 1, MAX_INTEGER)):
            latest = self.get_latest(user_id)
            new = check_update(user_id, latest, fn(latest))
            if new is None:
                return latest
            try:
                self.upsert_latest(new, expected=latest)
            except ConflictError as conflict:
                if conflict.ambiguous:
                    raise
                time.sleep(backoff(attempt))
            else:
                return new
        raise gave_up_error(user_id, attempts)

    def get_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        """The latest snapshots of those of these users who have one, by user id.

        Each user is read at one moment, not all of them at the same. Raises ValidationError, BackendError.
        """
        self._ensure_open()
        found: dict[str, StateSnapshot] = {}
        for batch in id_batches(user_ids, self._batch_size()):
            found.update(self._find(batch))
        return found

    def get_history(
        self, user_id: str, limit: int = 100, *, since: int | None = None, until: int | None = None
    ) -> list[StateSnapshot]:
        """At most ``limit`` snapshots of a user, newest first; [] for an unknown user.

        ``since`` and ``until`` are milliseconds since 1970, UTC, inclusive. The bounds of the store come
        first: its newest ``max_history_per_user``, of these what is younger than ``history_retention_days``.
        Raises ValidationError, BackendError.
        """
        return History(self._history(check_user_id(user_id), HistoryWindow.of(limit, since, until)))

    def plot_history(self, user_id: str, axes: Iterable[str] | None = None) -> Any:
        """Plot how a user's axes went, as one line each around neutral; returns matplotlib's Axes.

        ``axes`` names those to plot, from above to below; None: all that there are values of. At most the
        newest 1,000 snapshots of the history are shown, or the latest where there is no history. Raises
        UserNotFoundError, ValidationError for an axis that the store does not have, MissingDependencyError.
        """
        shown = self.get_history(user_id, MAX_PLOTTED) or latest_alone(user_id, self.get_latest(user_id))
        return plot_states(shown, plotted_axes(shown, axes, self.axes))

    def search_similar(
        self,
        query: StateSnapshot | Mapping[str, float] | str,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
        user_id: str | None = None,
        exclude_user_id: str | None = None,
        source: Source | str | None = None,
        min_confidence: float | None = None,
        since: int | None = None,
        until: int | None = None,
        history: bool = False,
    ) -> list[Match]:
        """The users whose latest states are most like the query, best first.

        ``query`` is a snapshot, a mapping of axes, or the id of a user, who is then left out of the result
        unless ``exclude_user_id=""``. The score is the cosine of the axes around neutral, from -1 to 1; a
        neutral state scores 0. At most ``limit``, which is 1 or more, with a score of ``score_threshold`` or
        more. The filters: one ``user_id``, a ``source``, at least ``min_confidence`` from 0 to 1, taken
        between ``since`` and ``until``, both inclusive, in milliseconds since 1970, UTC. ``history=True``
        searches all snapshots in history instead of the latest ones. Raises UserNotFoundError where the query
        is an unknown user, ValidationError, BackendError.
        """
        if isinstance(query, str):
            asked = self.get_latest(query)
            if asked is None:
                raise unknown_user_error(query)
            if exclude_user_id is None:
                exclude_user_id = query
            query = asked
        search = SearchRequest(
            axes=query,
            limit=limit,
            score_threshold=score_threshold,
            user_id=user_id,
            exclude_user_id=exclude_user_id,
            source=source,
            min_confidence=min_confidence,
            since=since,
            until=until,
            history=history,
        )
        return self._search(search)

    def users(self) -> Iterator[str]:
        """All user ids, read in pages while the iteration goes on; the order is unspecified.

        A user who is written or deleted meanwhile may be among them or not. Raises BackendError.
        """
        pages = iterate_pages(self._page_of_users)
        first = next(pages)  # a store that is closed says so at once
        return itertools.chain(first, itertools.chain.from_iterable(pages))

    def count(self, *, history: bool = False) -> int:
        """How many users there are; with ``history`` how many snapshots get_history can return for all."""
        return sum(iterate_pages(self._count_page)) if check_history_flag(history) else self._count_users()

    def prune(self) -> int:
        """Remove the history that the bounds hide already; returns how many snapshots were removed."""
        return sum(iterate_pages(self._prune_page))

    def create_snapshot(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        kind: Literal["auto", "native", "portable"] = "auto",
        reason: SnapshotReason = "manual",
        keep: int | None = None,
        keep_remote: bool = False,
        progress: Progress | None = None,
    ) -> SnapshotReport:
        """Write a backup of the store into a directory; the report says where it is.

        The directory is made where absent; without one it is QDRANT_SNAPSHOT_DIR, else
        ./data/qdrant/snapshots. ``kind`` "portable" is a file that every store can restore, holding for each
        user a state that existed while it was taken; "native" a Qdrant server's own, which is removed there
        afterwards unless ``keep_remote``, and is refused where no node has all shards; "auto" native on a
        server where it can be, portable elsewhere. With ``keep``, the new file is read back, then all but the
        newest so many of this collection and kind are removed: give stores whose collections are of one name
        directories of their own. ``reason`` goes into the report.
        ``progress(done, None)`` is called with the number of states written. Raises SnapshotError,
        ValidationError, BackendError; then there is no new file, and none was removed.
        """
        self._ensure_open()
        progress = check_progress(progress)
        fields = SnapshotRequestFields(reason=reason, keep=keep, keep_remote=keep_remote)
        return self._take(SnapshotRequest.of(directory, kind, fields, native=self._has_native), progress)

    def _take(self, order: SnapshotRequest, progress: Progress) -> SnapshotReport:
        self._open()
        with PortableSnapshotWriter(order, self._origin(), self.axes) as taking:
            for states in iterate_pages(self._page_of_states):
                done = taking.add(states)
                progress(done, None)
            return taking.finish()

    def restore_snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        mode: RestoreMode = "replace",
        progress: Progress | None = None,
    ) -> SnapshotReport:
        """Bring back what a snapshot file holds.

        ``mode`` "replace" makes the store equal to the file: all or nothing, in memory and on disk; on a
        server in place, where until the end health() is degraded and a second try completes what an
        interrupted one began. "merge" adds what the file holds, which wins where the times are equal; "skip"
        adds only users who are absent. Either of these that was interrupted is completed by "merge".
        ``progress(done, total)`` is called with the number of states written; before that with the number
        verified, where the file is read twice. Raises SnapshotError for a file that is damaged or of other
        axes, and changes nothing then.
        """
        self._ensure_open()
        progress = check_progress(progress)
        saved = SnapshotFile(path)
        saved.check_mode(mode, native=self._has_native)
        self._bring_back(saved, mode, progress)
        return saved.report(self._target())

    def _bring_back(self, saved: SnapshotFile, mode: RestoreMode, progress: Progress) -> None:
        self._open()
        if mode == "replace":
            self._replace_by(saved, progress)
        else:
            self._add_from(saved, mode, progress)

    @contextlib.contextmanager
    def _replacement(self, token: str) -> Generator[Self]:
        """A store to be filled, which takes this one's place at the end, or is given up at a failure."""
        staged = self._stage(token)
        try:
            yield staged
            self._adopt(staged)
        except BaseException:
            self._discard(staged)
            raise

    def _replace_by(self, saved: SnapshotFile, progress: Progress) -> None:
        if self._has_native:  # a server is changed in place: all must be known to be right before
            saved.verify(self.axes, progress)
        with self._replacement(saved.sha256) as staged:
            for done, batch in numbered_batches(saved.batches(self._batch_size(), self.axes)):
                staged._write_batch(batch)
                progress(done, saved.total)

    def _add_from(self, saved: SnapshotFile, mode: RestoreMode, progress: Progress) -> None:
        saved.verify(self.axes, progress)
        newcomers = NewUsers()
        for done, batch in numbered_batches(saved.batches(self._batch_size(), self.axes)):
            if mode == "skip":
                batch = newcomers.among(batch, self._find(distinct_users(batch)))  # noqa: PLW2901 - what is left of it
            if batch:
                self._write_batch(batch)
            progress(done, saved.total)

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Wait until a server answers, at most ``timeout`` seconds; any other store is ready at once.

        Raises what the server answers last, such as BackendUnavailableError, ValidationError.
        """
        self._ensure_open()
        check_positive("timeout", timeout, zero=True)

    def __getitem__(self, user_id: str) -> StateSnapshot:
        latest = self.get_latest(user_id)
        if latest is None:
            raise unknown_user_error(user_id)
        return latest

    def __contains__(self, user_id: object) -> bool:
        self._ensure_open()
        try:
            return self.get_latest(cast("str", user_id)) is not None
        except ValidationError:
            return False  # what cannot be an id is not in the store

    def __iter__(self) -> Iterator[str]:
        return self.users()

    def __len__(self) -> int:
        return self.count()

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> Self:
        self._ensure_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        return store_html(self, None if self.is_closed else self.health())

    def _open(self) -> None:
        """Make ready what checks need; a store that connects on first use does so here."""


class AsyncStateStore(StoreBase):
    """The contract of every asynchronous store: that of StateStore, to be awaited.

    Cancelling a write leaves it done or not done, never half done. ``close`` is ``aclose``.
    """

    @abstractmethod
    async def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""

    @abstractmethod
    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        """See StateStore.get_latest."""

    @abstractmethod
    async def delete(self, user_id: str) -> bool:
        """See StateStore.delete."""

    @abstractmethod
    async def health(self) -> Health:
        """See StateStore.health."""

    @abstractmethod
    async def aclose(self) -> None:
        """See StateStore.close."""

    @abstractmethod
    async def _open(self) -> None: ...

    @abstractmethod
    async def _write_batch(self, snapshots: Sequence[StateSnapshot]) -> None: ...

    @abstractmethod
    async def _find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]: ...

    @abstractmethod
    async def _history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]: ...

    @abstractmethod
    async def _search(self, search: SearchRequest) -> list[Match]: ...

    @abstractmethod
    async def _page_of_users(self, cursor: Cursor) -> tuple[list[str], Cursor]: ...

    @abstractmethod
    async def _count_users(self) -> int: ...

    @abstractmethod
    async def _count_page(self, cursor: Cursor) -> tuple[int, Cursor]: ...

    @abstractmethod
    async def _prune_page(self, cursor: Cursor) -> tuple[int, Cursor]: ...

    @abstractmethod
    async def _page_of_states(self, cursor: Cursor) -> tuple[list[StateSnapshot], Cursor]: ...

    @abstractmethod
    async def _stage(self, token: str) -> Self: ...

    @abstractmethod
    async def _adopt(self, staged: Any) -> None: ...

    @abstractmethod
    async def _discard(self, staged: Any) -> None: ...

    async def upsert_many(
        self, snapshots: Iterable[StateSnapshot], *, progress: Progress | None = None
    ) -> int:
        """See StateStore.upsert_many; other tasks run between batches."""
        self._ensure_open()
        progress = check_progress(progress)
        await self._open()
        total, written = known_length(snapshots), 0
        try:
            for batch in check_batches(snapshots, self._check, self._batch_size()):
                await self._write_batch(batch)
                written += len(batch)
                progress(written, total)
                await async_sleep(0)
        except StoreError as error:
            error.written = written
            raise
        return written

    async def patch(
        self, user_id: str, axes: Mapping[str, float], **fields: Unpack[SnapshotFields]
    ) -> StateSnapshot:
        """See StateStore.patch."""
        return cast("StateSnapshot", await self.update(user_id, patch_function(user_id, axes, fields)))

    async def update(
        self,
        user_id: str,
        fn: Callable[[StateSnapshot | None], StateSnapshot | Awaitable[StateSnapshot | None] | None],
        *,
        attempts: int = 32,
    ) -> StateSnapshot | None:
        """See StateStore.update; ``fn`` may be an ``async def``."""
        check_callable("fn", fn)
        for attempt in range(check_integer("attempts", attempts, 1, MAX_INTEGER)):
            latest = await self.get_latest(user_id)
            answer = fn(latest)
            new = check_update(user_id, latest, await answer if inspect.isawaitable(answer) else answer)
            if new is None:
                return latest
            try:
                await self.upsert_latest(new, expected=latest)
            except ConflictError as conflict:
                if conflict.ambiguous:
                    raise
                await async_sleep(backoff(attempt))
            else:
                return new
        raise gave_up_error(user_id, attempts)

    async def get_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        """See StateStore.get_many."""
        self._ensure_open()
        found: dict[str, StateSnapshot] = {}
        for batch in id_batches(user_ids, self._batch_size()):
            if found:
                await async_sleep(0)
            found.update(await self._find(batch))
        return found

    async def get_history(
        self, user_id: str, limit: int = 100, *, since: int | None = None, until: int | None = None
    ) -> list[StateSnapshot]:
        """See StateStore.get_history."""
        return History(await self._history(check_user_id(user_id), HistoryWindow.of(limit, since, until)))

    async def plot_history(self, user_id: str, axes: Iterable[str] | None = None) -> Any:
        """See StateStore.plot_history."""
        shown = await self.get_history(user_id, MAX_PLOTTED) or latest_alone(
            user_id, await self.get_latest(user_id)
        )
        return plot_states(shown, plotted_axes(shown, axes, self.axes))

    async def search_similar(
        self,
        query: StateSnapshot | Mapping[str, float] | str,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
        user_id: str | None = None,
        exclude_user_id: str | None = None,
        source: Source | str | None = None,
        min_confidence: float | None = None,
        since: int | None = None,
        until: int | None = None,
        history: bool = False,
    ) -> list[Match]:
        """See StateStore.search_similar."""
        if isinstance(query, str):
            asked = await self.get_latest(query)
            if asked is None:
                raise unknown_user_error(query)
            if exclude_user_id is None:
                exclude_user_id = query
            query = asked
        search = SearchRequest(
            axes=query,
            limit=limit,
            score_threshold=score_threshold,
            user_id=user_id,
            exclude_user_id=exclude_user_id,
            source=source,
            min_confidence=min_confidence,
            since=since,
            until=until,
            history=history,
        )
        return await self._search(search)

    def users(self) -> AsyncIterator[str]:
        """See StateStore.users."""
        self._ensure_open()
        return UserPages(AsyncPages(self._page_of_users))

    async def count(self, *, history: bool = False) -> int:
        """See StateStore.count."""
        if check_history_flag(history):
            return await sum_pages(AsyncPages(self._count_page))
        return await self._count_users()

    async def prune(self) -> int:
        """See StateStore.prune."""
        return await sum_pages(AsyncPages(self._prune_page))

    async def create_snapshot(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        kind: Literal["auto", "native", "portable"] = "auto",
        reason: SnapshotReason = "manual",
        keep: int | None = None,
        keep_remote: bool = False,
        progress: Progress | None = None,
    ) -> SnapshotReport:
        """See StateStore.create_snapshot; cancelled, it leaves the finished file or none."""
        self._ensure_open()
        progress = check_progress(progress)
        fields = SnapshotRequestFields(reason=reason, keep=keep, keep_remote=keep_remote)
        return await self._take(
            SnapshotRequest.of(directory, kind, fields, native=self._has_native), progress
        )

    async def _take(self, order: SnapshotRequest, progress: Progress) -> SnapshotReport:
        await self._open()
        with PortableSnapshotWriter(order, self._origin(), self.axes) as taking:
            async for states in AsyncPages(self._page_of_states):
                done = taking.add(states)
                progress(done, None)
            return await run_in_thread(taking.finish)

    async def restore_snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        mode: RestoreMode = "replace",
        progress: Progress | None = None,
    ) -> SnapshotReport:
        """See StateStore.restore_snapshot; cancelled, a replacement changes nothing, but on a server."""
        self._ensure_open()
        progress = check_progress(progress)
        saved = SnapshotFile(path)
        saved.check_mode(mode, native=self._has_native)
        await self._bring_back(saved, mode, progress)
        return saved.report(self._target())

    async def _bring_back(self, saved: SnapshotFile, mode: RestoreMode, progress: Progress) -> None:
        await self._open()
        if mode == "replace":
            await self._replace_by(saved, progress)
        else:
            await self._add_from(saved, mode, progress)

    @contextlib.asynccontextmanager
    async def _replacement(self, token: str) -> AsyncGenerator[Self]:
        staged = await self._stage(token)
        try:
            yield staged
            await self._adopt(staged)
        except BaseException:
            await shielded(self._discard(staged))
            raise

    async def _replace_by(self, saved: SnapshotFile, progress: Progress) -> None:
        if self._has_native:  # a server is changed in place: all must be known to be right before
            await self._verify(saved, progress)
        async with self._replacement(saved.sha256) as staged:
            for done, batch in numbered_batches(saved.batches(self._batch_size(), self.axes)):
                await staged._write_batch(batch)
                progress(done, saved.total)
                await async_sleep(0)

    async def _add_from(self, saved: SnapshotFile, mode: RestoreMode, progress: Progress) -> None:
        await self._verify(saved, progress)
        newcomers = NewUsers()
        for done, batch in numbered_batches(saved.batches(self._batch_size(), self.axes)):
            if mode == "skip":
                batch = newcomers.among(batch, await self._find(distinct_users(batch)))  # noqa: PLW2901 - what is left of it
            if batch:
                await self._write_batch(batch)
            progress(done, saved.total)
            await async_sleep(0)

    async def _verify(self, saved: SnapshotFile, progress: Progress) -> None:
        for done in saved.verifying(self.axes):
            progress(done, None)
            await async_sleep(0)

    async def wait_until_ready(self, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - as in the other form
        """See StateStore.wait_until_ready."""
        self._ensure_open()
        check_positive("timeout", timeout, zero=True)

    def __aiter__(self) -> AsyncIterator[str]:
        return self.users()

    async def __aenter__(self) -> Self:
        self._ensure_open()
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _repr_html_(self) -> str:
        return store_html(self, None if self.is_closed else self._glance())

    def _glance(self) -> Health | None:
        """How the store is, as far as that can be told without awaiting."""
        return None


class _InMemory(StoreBase):
    """What both memory stores say of themselves."""

    _backend = "memory"

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Make a store that reports from the beginning, if it seems to want that: see reporting_class."""
        config = options.get("config", arguments[0] if arguments else None)
        wanted = options.get("telemetry", getattr(config, "telemetry", True))
        return cast("Self", object.__new__(reporting_class(cls, wanted=wanted is True)))

    def _target(self) -> str:
        return "memory://"

    def _engine_name(self) -> str:
        return "memory"

    def _collection(self) -> str:
        return DEFAULT_COLLECTION


class MemoryStore(_InMemory, StateStore):
    """A store in this process's memory: nothing survives it, and nothing is faster.

    Reads take no lock, unless on a free-threaded Python a write comes between. Options are the fields of
    MemoryStoreConfig. It needs attrs and cachetools alone; searching is faster with numpy.

    >>> store = MemoryStore(axes=["warmth"], max_history_per_user=10)
    >>> store.upsert_latest(StateSnapshot("ada", {"warmth": 1}))
    >>> len(store), store["ada"].axes["warmth"]
    (1, 1.0)
    """

    def __init__(self, config: MemoryStoreConfig | None = None, **options: Unpack[MemoryOptions]) -> None:
        self.config = make_config(MemoryStoreConfig, config, options)
        self._schema = Schema.of(self.config)
        self._retention = Retention.of(self.config)
        # One deque a user, ascending in time, the latest at its end: one append changes both at one moment.
        self._timelines: dict[str, deque[StateSnapshot]] = {}
        self._capacity = max(1, self._retention.maximum)
        self._lock = threading.Lock()
        self._similarity = VectorIndex(self._schema)
        self._closed = False
        observe(self)

    @property
    def axes(self) -> tuple[str, ...]:
        """See StateStore.axes."""
        return self._schema.axes

    @property
    def is_closed(self) -> bool:
        """See StateStore.is_closed."""
        return self._closed

    def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        self._check(snapshot)
        if expected is not ANY:
            check_expected(expected)
        with self._lock:
            self._put(snapshot, expected)

    def get_latest(self, user_id: str) -> StateSnapshot | None:
        """See StateStore.get_latest."""
        try:
            return self._timelines[user_id][-1]
        except (KeyError, TypeError):
            self._ensure_open()
            check_user_id(user_id)
            return None
        except IndexError:  # free threading: it got shorter between the looks at its length and at its end
            with self._lock:
                timeline = self._timelines.get(user_id)
                return timeline[-1] if timeline else None

    _latest_of = get_latest  # as a step of other operations, which is not reported as one of its own

    def delete(self, user_id: str) -> bool:
        """See StateStore.delete."""
        check_user_id(user_id)
        with self._lock:
            self._ensure_open()
            self._similarity.stale.add(user_id)
            return self._timelines.pop(user_id, None) is not None

    def health(self) -> Health:
        """See StateStore.health."""
        started = time.perf_counter()
        if self._closed:
            return Health("unhealthy", "memory", 0.0, message="the store is closed")
        timelines = list(self._timelines.values())
        points = len(timelines) + (sum(map(len, timelines)) if self._retention.maximum else 0)
        return Health("healthy", "memory", (time.perf_counter() - started) * 1000, len(timelines), points)

    def close(self) -> None:
        """Forget everything; harmless when repeated."""
        with self._lock:
            self._closed = True
            self._timelines = {}
            self._similarity = VectorIndex(self._schema)

    def _check(self, snapshot: StateSnapshot) -> None:
        if snapshot.__class__ is not StateSnapshot:
            check_snapshot(snapshot)
        self._schema.check(snapshot.axes)

    def _put(self, snapshot: StateSnapshot, expected: Expected = ANY) -> None:
        if self._closed:
            raise closed_error()
        user_id = snapshot.user_id
        timeline = self._timelines.get(user_id)
        if expected is not ANY:
            latest = timeline[-1] if timeline else None
            if latest != expected:
                raise conflict_error(user_id, expected, latest)
        self._similarity.stale.add(user_id)  # first: an interrupt may come after any line
        if timeline is None:
            self._timelines[user_id] = deque((snapshot,), self._capacity)
        elif snapshot.updated_at_unix_ms > timeline[-1].updated_at_unix_ms:
            timeline.append(snapshot)
            if self._retention.days is not None:
                self._trim(timeline)
        else:
            self._timelines[user_id] = self._with_older(timeline, snapshot)

    def _with_older(self, timeline: deque[StateSnapshot], snapshot: StateSnapshot) -> deque[StateSnapshot]:
        others = [entry for entry in timeline if entry.updated_at_unix_ms != snapshot.updated_at_unix_ms]
        return deque(sorted([*others, snapshot], key=time_of), self._capacity)

    def _moment(self, user_id: str) -> list[StateSnapshot]:
        """All that is kept of a user, oldest first, as it is at one moment."""
        timeline = self._timelines.get(user_id)
        if timeline is None:
            return []
        try:
            return list(timeline.copy())
        except RuntimeError:  # free threading: a write came between two entries
            with self._lock:
                return list(timeline)

    def _trim(self, timeline: deque[StateSnapshot]) -> int:
        removable = self._retention.removable([entry.updated_at_unix_ms for entry in timeline])
        removable = min(removable, len(timeline) - 1)  # the newest is the latest snapshot, which stays
        for _ in range(removable):
            timeline.popleft()
        return removable

    def _entries(self, user_id: str) -> list[StateSnapshot]:
        """What history shows of a user, oldest first."""
        entries = self._moment(user_id)
        return entries[self._retention.hidden([entry.updated_at_unix_ms for entry in entries]) :]

    def _write_batch(self, snapshots: Sequence[StateSnapshot]) -> None:
        with self._lock:
            for snapshot in snapshots:
                self._put(snapshot)

    def _find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        found = ((user_id, self._latest_of(user_id)) for user_id in user_ids)
        return {user_id: latest for user_id, latest in found if latest is not None}

    def _history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        self._ensure_open()
        newest_first = reversed(self._entries(user_id))
        chosen = (entry for entry in newest_first if window.since <= entry.updated_at_unix_ms <= window.until)
        return list(itertools.islice(chosen, window.limit))

    def _search(self, search: SearchRequest) -> list[Match]:
        steps = self._searching(search)
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                return cast("list[Match]", stop.value)

    def _searching(self, search: SearchRequest) -> Generator[None, None, list[Match]]:
        """Search in steps of a few milliseconds, between which others may run."""
        self._ensure_open()
        self._schema.check(search.axes)
        if search.history or search.user_id is not None:
            return (yield from self._scan(search))
        while not self._caught_up():
            yield
        with self._lock:
            return self._similarity.search(search)

    def _caught_up(self) -> bool:
        with self._lock:
            try:
                return self._similarity.catch_up(self._latest_of)
            except BaseException:  # an interrupt, say: begin anew
                self._similarity = VectorIndex(self._schema)
                self._similarity.stale.update(self._timelines)
                raise

    def _scan(self, search: SearchRequest) -> Generator[None, None, list[Match]]:
        """Look at snapshots one by one, where the vectors of the latest ones do not serve."""
        direction, best = self._schema.vector(search.axes), list[Match]()
        for user_id in list(self._timelines) if search.user_id is None else [search.user_id]:
            entries = self._entries(user_id) if search.history else self._find([user_id]).values()
            for snapshot in filter(search.admits, entries):
                score = sum(map(operator.mul, direction, self._schema.vector(snapshot.axes)))
                if score >= search.score_threshold:
                    best.append(Match(snapshot, clamp_score(score)))
            if len(best) > 4 * search.limit + BATCH_SIZE:
                best = heapq.nlargest(search.limit, best, key=score_of)
            yield
        return heapq.nlargest(search.limit, best, key=score_of)

    def _page_of_users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        self._ensure_open()
        return next_page(iter(list(self._timelines)) if cursor is None else cursor)

    def _count_users(self) -> int:
        self._ensure_open()
        return len(self._timelines)

    def _count_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        page, cursor = self._page_of_users(cursor)
        return sum(len(self._entries(user_id)) for user_id in page), cursor

    def _prune_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        page, cursor = self._page_of_users(cursor)
        with self._lock:
            timelines = [self._timelines[user_id] for user_id in page if user_id in self._timelines]
            return sum(self._trim(timeline) for timeline in timelines), cursor

    def _page_of_states(self, cursor: Cursor) -> tuple[list[StateSnapshot], Cursor]:
        self._ensure_open()
        remaining: Iterator[str] = iter(list(self._timelines)) if cursor is None else cursor
        states: list[StateSnapshot] = []
        for user_id in remaining:
            states += self._states(user_id)
            if len(states) >= BATCH_SIZE:
                return states, remaining
        return states, None

    def _states(self, user_id: str) -> list[StateSnapshot]:
        """What history shows of a user, and the latest."""
        entries = self._moment(user_id)
        hidden = self._retention.hidden([entry.updated_at_unix_ms for entry in entries])
        return entries[min(hidden, len(entries) - 1) :]

    def _stage(self, token: str) -> Self:  # noqa: ARG002 - nothing of this one can be left
        return cast("Self", MemoryStore(self.config))

    def _adopt(self, staged: Any) -> None:
        with self._lock:
            self._ensure_open()
            self._timelines, self._similarity = staged._timelines, staged._similarity

    def _discard(self, staged: Any) -> None:
        staged.close()


class _InnerMemoryStore(MemoryStore):
    """A store within an asynchronous one: it reports for that what is a single call, without awaiting."""

    _reports = frozenset({"upsert_latest", "get_latest", "delete"})


class AsyncMemoryStore(_InMemory, AsyncStateStore):
    """MemoryStore for asyncio and trio (which needs anyio).

    Single operations run at once and never suspend; long ones let other tasks run every few milliseconds.
    """

    _reports = SPANS.keys() - _InnerMemoryStore._reports

    def __init__(self, config: MemoryStoreConfig | None = None, **options: Unpack[MemoryOptions]) -> None:
        self._store = _InnerMemoryStore(config, **options)
        self.config = self._store.config
        observe(self)

    @property
    def axes(self) -> tuple[str, ...]:
        """See StateStore.axes."""
        return self._store.axes

    @property
    def is_closed(self) -> bool:
        """See StateStore.is_closed."""
        return self._store.is_closed

    async def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        self._store.upsert_latest(snapshot, expected=expected)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        """See StateStore.get_latest."""
        return self._store.get_latest(user_id)

    async def delete(self, user_id: str) -> bool:
        """See StateStore.delete."""
        return self._store.delete(user_id)

    async def health(self) -> Health:
        """See StateStore.health."""
        return self._store.health()

    async def aclose(self) -> None:
        """See StateStore.close."""
        self._store.close()

    async def _open(self) -> None:
        """Nothing to do: memory is always there."""

    def _check(self, snapshot: StateSnapshot) -> None:
        self._store._check(snapshot)

    async def _write_batch(self, snapshots: Sequence[StateSnapshot]) -> None:
        self._store._write_batch(snapshots)

    async def _find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        return self._store._find(user_ids)

    async def _history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        return self._store._history(user_id, window)

    async def _search(self, search: SearchRequest) -> list[Match]:
        steps = self._store._searching(search)
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                return cast("list[Match]", stop.value)
            await async_sleep(0)

    async def _page_of_users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        return self._store._page_of_users(cursor)

    async def _count_users(self) -> int:
        return self._store._count_users()

    async def _count_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        return self._store._count_page(cursor)

    async def _prune_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        return self._store._prune_page(cursor)

    async def _page_of_states(self, cursor: Cursor) -> tuple[list[StateSnapshot], Cursor]:
        return self._store._page_of_states(cursor)

    async def _stage(self, token: str) -> Self:  # noqa: ARG002 - nothing of this one can be left
        return cast("Self", AsyncMemoryStore(self.config))

    async def _adopt(self, staged: Any) -> None:
        self._store._adopt(staged._store)

    async def _discard(self, staged: Any) -> None:
        staged._store.close()

    def _glance(self) -> Health:
        return self._store.health()


class ClosedBackend:
    """What a closed store has in place of its core: every use raises."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise closed_error()


class UnopenedBackend:
    """What an asynchronous store has in place of its core until it is first awaited."""

    batch = BATCH_SIZE

    def cached(self, user_id: str) -> None:
        """Nothing is known before opening."""


CLOSED = cast("PointsBackend", ClosedBackend())


UNOPENED = cast("PointsBackend", UnopenedBackend())


def health_tries(timeout: float) -> Iterator[tuple[float, float]]:
    """For every try, the seconds that it may take and the moment after which there is no other."""
    check_positive("timeout", timeout, zero=True)
    deadline = time.monotonic() + timeout
    while True:
        yield max(0.01, min(deadline - time.monotonic(), STATUS_TIMEOUT)), deadline


TURN_S = 0.005  # how long an asynchronous store goes on without letting other tasks run


SLOW_HEALTH_MS = 1_000.0  # a look at a server that takes longer is a sign of trouble


def health_report(
    place: Directory | ServerConnection | None, started: float, found: Health | StoreError
) -> Health:
    """What a look found, and what is known besides."""
    backend, location = (place.engine.name, place.path) if place is not None else ("qdrant", None)
    latency_ms = (time.perf_counter() - started) * 1000
    if isinstance(found, StoreError):
        return Health("unhealthy", backend, latency_ms, location=location, message=str(found))
    signs = [found.message] if found.message else []
    if isinstance(place, ServerConnection):
        state = place.engine.resilience.breaker.state
        signs += [f"the circuit breaker is {state}"] if state != "closed" else []
        signs += [f"it took {latency_ms:.0f} ms to answer"] if latency_ms > SLOW_HEALTH_MS else []
    status = "degraded" if found.status == "healthy" and len(signs) > bool(found.message) else found.status
    return attrs.evolve(
        found, status=status, latency_ms=latency_ms, location=location, message="; ".join(signs)
    )


def look_at(place: Directory | ServerConnection, core: PointsBackend) -> Health:
    """How a store is that can be asked without awaiting."""
    started = time.perf_counter()
    try:
        found: Health | StoreError = place.drive(core.look(STATUS_TIMEOUT))
    except StoreError as error:
        found = error
    return health_report(place, started, found)


_AnyQdrantStore = TypeVar("_AnyQdrantStore", bound="QdrantStore | AsyncQdrantStore")


def _with_core(store: _AnyQdrantStore, core: PointsBackend) -> _AnyQdrantStore:
    """The same store over another core, which shares its connection or directory; it is not to be closed."""
    other = object.__new__(type(store))
    vars(other).update(vars(store), _core=core)
    return other


class _OnQdrant(StoreBase):
    """What both stores over Qdrant say of themselves."""

    config: QdrantStoreConfig
    _core: PointsBackend

    @property
    def is_closed(self) -> bool:
        """See StateStore.is_closed."""
        return self._core is CLOSED

    def _check(self, snapshot: StateSnapshot) -> None:
        self._core.check(snapshot)

    def _target(self) -> str:
        return cast("str", self.config.path or self.config.url)

    def _collection(self) -> str:
        return self.config.collection_name

    def _place(self) -> str:
        return repr(self._target())

    def _batch_size(self) -> int:
        return self._core.batch

    @property
    def _has_native(self) -> bool:
        return self.config.url is not None


class QdrantStore(_OnQdrant, StateStore):
    """A store on disk, through Qdrant embedded in this process, or on a Qdrant server.

    Options are the fields of QdrantStoreConfig. ``path`` is a directory, which one process owns; within it
    any number of stores, synchronous and asynchronous, share it. Raises StoreLockedError when another process
    has it, SchemaMismatchError when it holds something else, MissingDependencyError. ``url`` is a server or
    cluster, of version 1.17 or newer, which is connected to on first use.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with QdrantStore(path=directory) as store:
    ...     store.upsert_latest(StateSnapshot("ada", {"warmth": 0.8}))
    >>> with QdrantStore(path=directory) as store:
    ...     store["ada"].axis("warmth")
    0.8
    """

    def __init__(self, config: QdrantStoreConfig | None = None, **options: Unpack[QdrantOptions]) -> None:
        self.config = make_qdrant_config(config, options)
        observe(self)  # before it is opened, which is reported too
        self._held: Directory | ServerConnection
        if self.config.url is None:
            self._held, self._core = self._acquire()
        else:
            self._held, self._core = connect_server(self.config, "in place")
        self._finalizer = weakref.finalize(self, release_unclosed, self._held)

    def _acquire(self) -> tuple[Directory, OwnedBackend]:
        for wait in lock_waits(self.config.lock_timeout):
            try:
                return open_directory(self.config)
            except StoreLockedError:
                time.sleep(wait)
        return open_directory(self.config)

    def _drive(
        self, operation: str, start: Callable[[PointsBackend], Coroutine[Any, Any, T]], about: object = None
    ) -> T:
        began = time.perf_counter()
        try:
            return self._held.drive(self._core.begin(start))
        finally:
            warn_if_slow(self, operation, began, about)

    def _open(self) -> None:
        if isinstance(self._core, SharedBackend):
            self._held.drive(self._core.ensure_open())

    @property
    def axes(self) -> tuple[str, ...]:
        """See StateStore.axes."""
        self._open()
        return self._core.schema.axes

    def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        return self._drive("upsert", lambda core: core.upsert_latest(snapshot, expected), snapshot)

    def get_latest(self, user_id: str) -> StateSnapshot | None:
        """See StateStore.get_latest."""
        return self._core.cached(user_id) or self._drive(
            "get", lambda core: core.get_latest(check_user_id(user_id)), user_id
        )

    def delete(self, user_id: str) -> bool:
        """See StateStore.delete."""
        return self._drive("delete", lambda core: core.delete(check_user_id(user_id)), user_id)

    def health(self) -> Health:
        """See StateStore.health."""
        return look_at(self._held, self._core)

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """See StateStore.wait_until_ready."""
        for seconds, deadline in health_tries(timeout):
            try:
                self._held.drive(self._core.look(seconds))
            except BackendError as error:
                left = deadline - time.monotonic()
                if left <= 0 or not error.retryable:
                    raise
                time.sleep(min(0.25, left))
            else:
                return

    def close(self) -> None:
        """See StateStore.close."""
        self._core = CLOSED
        if self._finalizer.detach():
            self._held.release()

    def _write_batch(self, snapshots: Sequence[StateSnapshot]) -> None:
        return self._drive("upsert_many", lambda core: core.write(snapshots))

    def _find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        return self._drive("get_many", lambda core: core.find(user_ids))

    def _history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        return self._drive("history", lambda core: core.get_history(user_id, window), user_id)

    def _search(self, search: SearchRequest) -> list[Match]:
        return self._drive("search", lambda core: core.search(search))

    def _page_of_users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        return self._drive("users", lambda core: core.page_of_users(cursor))

    def _count_users(self) -> int:
        return self._drive("count", lambda core: core.count_users())

    def _count_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        return self._drive("count", lambda core: core.count_page(cursor))

    def _prune_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        return self._drive("prune", lambda core: core.prune_page(cursor))

    def _engine_name(self) -> str:
        return self._held.engine.name

    def _page_of_states(self, cursor: Cursor) -> tuple[list[StateSnapshot], Cursor]:
        return self._drive("read", lambda core: core.page_of_states(cursor))

    def _stage(self, token: str) -> Self:
        return _with_core(self, self._held.drive(self._core.begin(lambda core: core.stage(token))))

    def _adopt(self, staged: Any) -> None:
        self._held.drive(self._core.begin(lambda core: core.adopt(staged._core)))

    def _discard(self, staged: Any) -> None:
        with contextlib.suppress(StoreClosedError):  # opening removes it
            self._held.drive(self._core.begin(lambda core: core.discard(staged._core)))

    def _take(self, order: SnapshotRequest, progress: Progress) -> SnapshotReport:
        if order.kind == "native":
            self._open()
            core = cast("SharedBackend", self._core)
            report = self._held.drive(core.create_native(order, self._target()))
            if report is not None:
                return report
            order = attrs.evolve(order, kind="portable")
        return super()._take(order, progress)

    def _bring_back(self, saved: SnapshotFile, mode: RestoreMode, progress: Progress) -> None:
        if saved.kind == "portable":
            return super()._bring_back(saved, mode, progress)
        saved.verify()
        return self._held.drive(cast("SharedBackend", self._core).restore_native(saved.path, saved.sha256))


class AsyncQdrantStore(_OnQdrant, AsyncStateStore):
    """QdrantStore for asyncio and trio; it opens on entering ``async with`` or at the first await.

    With a server it connects at the first operation, so that an application may start before its server.
    With Qdrant Edge, whose calls are short and hold the interpreter anyway, operations run in place; with
    qdrant-client's local mode they run in a worker thread. A write that is cancelled is done or not done.
    """

    def __init__(self, config: QdrantStoreConfig | None = None, **options: Unpack[QdrantOptions]) -> None:
        self.config = make_qdrant_config(config, options)
        self._held: Directory | ServerConnection | None = None
        self._core = UNOPENED
        self._yielded = 0.0  # when other tasks were last let run
        self._finalizer: weakref.finalize[..., Any] | None = None
        if self.config.url is not None:
            self._held, self._core = connect_server(self.config, "on loop")
        observe(self)

    async def __aenter__(self) -> Self:
        if self.config.url is None:
            return await super().__aenter__()
        self._ensure_open()  # but no more: an application may start before its server
        return self

    async def _open(self) -> None:
        if isinstance(self._core, SharedBackend):
            await self._core.ensure_open()
        elif self._held is None and self._core is not CLOSED:
            await self._open_directory()

    async def _open_directory(self) -> None:
        directory, core = await self._acquire()
        if self._core is not UNOPENED:  # another task was faster, or has closed the store
            directory.release()
            return
        self._held, self._core = directory, core
        self._finalizer = weakref.finalize(self, release_unclosed, directory)

    async def _acquire(self) -> tuple[Directory, OwnedBackend]:
        for wait in lock_waits(self.config.lock_timeout):
            try:
                return await open_in_worker(self.config)
            except StoreLockedError:
                await async_sleep(wait)
        return await open_in_worker(self.config)

    async def _drive(
        self, operation: str, start: Callable[[PointsBackend], Coroutine[Any, Any, T]], about: object = None
    ) -> T:
        if self._held is None:
            await self._open()
        began = time.perf_counter()
        try:
            return await self._run(self._core.begin(start))
        finally:
            warn_if_slow(self, operation, began, about)

    async def _run(self, flow: Coroutine[Any, Any, T], *, apart: bool = False) -> T:
        """Run a coroutine of the core; ``apart`` in a worker thread, where it would take long in place."""
        if isinstance(self._held, ServerConnection):
            try:
                self._held.check_process()
                return await flow
            finally:
                flow.close()
        directory = cast("Directory", self._held)
        if cast("EmbeddedEngine", directory.engine).runs == "in place" and not apart:
            answer, written = await self._in_place(directory, flow)
        else:
            answer, written = await run_in_worker(directory, flow)
        if written is not None:
            await settle_in_worker(directory, written)
        return answer

    async def _in_place(
        self, directory: Directory, flow: Coroutine[Any, Any, T]
    ) -> tuple[T, FlushRound | None]:
        """Drive a coroutine here, after a turn for other tasks if they have had none for 5 ms."""
        try:
            now = time.monotonic()
            if now - self._yielded > TURN_S:
                self._yielded = now
                await async_sleep(0)
            return directory.apply(flow)
        finally:
            flow.close()

    @property
    def axes(self) -> tuple[str, ...]:
        """See StateStore.axes; raises StoreError before the store is open."""
        if self._core is UNOPENED or (isinstance(self._core, SharedBackend) and not self._core.is_open):
            raise StoreError("the axes are known once the store is open: await an operation first")
        return self._core.schema.axes

    async def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        return await self._drive("upsert", lambda core: core.upsert_latest(snapshot, expected), snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        """See StateStore.get_latest."""
        return self._core.cached(user_id) or await self._drive(
            "get", lambda core: core.get_latest(check_user_id(user_id)), user_id
        )

    async def delete(self, user_id: str) -> bool:
        """See StateStore.delete."""
        return await self._drive("delete", lambda core: core.delete(check_user_id(user_id)), user_id)

    async def health(self) -> Health:
        """See StateStore.health."""
        started = time.perf_counter()
        try:
            found: Health | StoreError = await self._look(STATUS_TIMEOUT)
        except StoreError as error:
            found = error
        return health_report(self._held, started, found)

    async def wait_until_ready(self, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - as in the other form
        """See StateStore.wait_until_ready."""
        for seconds, deadline in health_tries(timeout):
            try:
                await self._look(seconds)
            except BackendError as error:
                left = deadline - time.monotonic()
                if left <= 0 or not error.retryable:
                    raise
                await async_sleep(min(0.25, left))
            else:
                return

    async def _look(self, seconds: float) -> Health:
        if self._held is None:
            await self._open()
        return await self._run(self._core.look(seconds))

    def _glance(self) -> Health | None:
        if not isinstance(self._held, Directory):
            return None  # not open yet, or on a server
        return look_at(self._held, self._core)

    async def aclose(self) -> None:
        """See StateStore.close."""
        was_open, self._core = self._core is not CLOSED, CLOSED
        if isinstance(self._held, ServerConnection):
            if was_open:
                await shielded(self._held.engine.close())
        elif self._finalizer is not None:
            await release_in_worker(cast("Directory", self._held), self._finalizer)

    async def _write_batch(self, snapshots: Sequence[StateSnapshot]) -> None:
        return await self._drive("upsert_many", lambda core: core.write(snapshots))

    async def _find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        return await self._drive("get_many", lambda core: core.find(user_ids))

    async def _history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        return await self._drive("history", lambda core: core.get_history(user_id, window), user_id)

    async def _search(self, search: SearchRequest) -> list[Match]:
        return await self._drive("search", lambda core: core.search(search))

    async def _page_of_users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        return await self._drive("users", lambda core: core.page_of_users(cursor))

    async def _count_users(self) -> int:
        return await self._drive("count", lambda core: core.count_users())

    async def _count_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        return await self._drive("count", lambda core: core.count_page(cursor))

    async def _prune_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        return await self._drive("prune", lambda core: core.prune_page(cursor))

    def _engine_name(self) -> str:
        return "qdrant" if self._held is None else self._held.engine.name

    async def _page_of_states(self, cursor: Cursor) -> tuple[list[StateSnapshot], Cursor]:
        return await self._drive("read", lambda core: core.page_of_states(cursor))

    async def _stage(self, token: str) -> Self:
        await self._open()
        stage = self._core.begin(lambda core: core.stage(token))
        return _with_core(self, await self._run(stage, apart=True))

    async def _adopt(self, staged: Any) -> None:
        await self._run(self._core.begin(lambda core: core.adopt(staged._core)), apart=True)

    async def _discard(self, staged: Any) -> None:
        with contextlib.suppress(StoreClosedError):  # opening removes it
            await self._run(self._core.begin(lambda core: core.discard(staged._core)), apart=True)

    async def _take(self, order: SnapshotRequest, progress: Progress) -> SnapshotReport:
        if order.kind == "native":
            await self._open()
            core = cast("SharedBackend", self._core)
            report = await self._run(core.create_native(order, self._target()))
            if report is not None:
                return report
            order = attrs.evolve(order, kind="portable")
        return await super()._take(order, progress)

    async def _bring_back(self, saved: SnapshotFile, mode: RestoreMode, progress: Progress) -> None:
        if saved.kind == "portable":
            return await super()._bring_back(saved, mode, progress)
        await run_in_thread(saved.verify)
        core = cast("SharedBackend", self._core)
        return await self._run(core.restore_native(saved.path, saved.sha256))

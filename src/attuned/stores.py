"""The stores that callers use: each method is one line over states/operations.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, cast, overload

from attuned.base.config import (
    DEFAULT_COLLECTION,
    MemoryOptions,
    MemoryStoreConfig,
    QdrantOptions,
    QdrantStoreConfig,
    make_config,
    make_qdrant_config,
)
from attuned.base.errors import T, ValidationError
from attuned.base.html import MAX_PLOTTED, plot_states, store_html
from attuned.base.telemetry import REPORTING, SPANS, observe, reporting_class
from attuned.base.values import ANY, Expected, Health, Match, SnapshotFields, Source, StateSnapshot
from attuned.connections.runtime import BLOCKING, Suspending, Waits, run
from attuned.documents.collections import collection_operations, erase_user, list_collections
from attuned.documents.handles import AsyncCollection, Collection
from attuned.states.contract import UNOPENED, check_expected, check_state
from attuned.states.memory import MemoryBackend, MemoryPlace
from attuned.states.operations import MemoryOperations, Operations, PagedIterator
from attuned.states.places import DirectoryPlace, ServerPlace, blocking_twin
from attuned.tables.states import states_dataframe

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
    from datetime import datetime
    from types import TracebackType

    from attuned.base.values import SnapshotReason, SnapshotReport
    from attuned.documents.embedding import Embedder
    from attuned.documents.filters import FieldKind
    from attuned.documents.values import CollectionInfo, ErasureReport
    from attuned.snapshots.archive import Progress, RestoreMode


class StoreBase:
    """What both forms of a store say of it without waiting for anything."""

    _operations: Operations
    _reports: Iterable[str] = SPANS.keys()  # the methods that are reported
    _always_on = ""  # the name of the engine, where all stores of a class have the same

    def __init__(self, config: Any = None, **options: Any) -> None:  # noqa: ARG002 - those of a store
        raise TypeError(
            f"{type(self).__name__} says what stores do; open_store and open_async_store make one"
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes that this store keeps, in the order of its vectors.

        An asynchronous store on disk or on a server knows them once it is open: StoreError before.
        """
        return self._operations.axes()

    @property
    def is_closed(self) -> bool:
        """Whether the store has been closed."""
        return self._operations.is_closed

    @property
    def location(self) -> str:
        """Where the store is, as open_store takes it: a directory, a url, or "memory://"."""
        return self._operations.place.location

    @property
    def engine(self) -> str:
        """The engine: memory, edge, local or server; "qdrant" while a directory has not been opened."""
        return self._operations.place.engine

    def _health_shown(self) -> Health | None:
        """How the store is, as far as that can be told without awaiting."""
        operations = self._operations
        if operations.is_closed or not operations.place.is_shown or operations.backend is UNOPENED:
            return None
        place = operations.place
        if isinstance(place, DirectoryPlace):
            place = blocking_twin(place)
        return run(Operations(operations.backend, place, BLOCKING, collection=operations.collection).health())

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(
            f"a {type(self).__name__} holds what is open in this process and cannot be pickled or copied; "
            "pass on its location, and open a store there"
        )

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        place = "" if self.engine == "memory" else f"{self.location!r} "
        return f"<{type(self).__name__} {place}{state}>"

    def _repr_html_(self) -> str:
        return store_html(self, self._health_shown())


class StateStore(StoreBase):
    """The contract of every synchronous store.

    A store keeps, for each user, the *latest* snapshot (the one with the greatest time written since the
    user was last deleted; of two with the same time the later write replaces the other) and a *history* of
    the newest ``max_history_per_user`` distinct times, the latest included. Bad input raises ValidationError
    before anything is written; a write that returned is kept. It can be used from many threads, as a context
    manager, and read like a mapping from user id to latest snapshot.
    """

    def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """Write a snapshot: into history, and as the latest if it is not older than the current one.

        With ``expected``, the snapshot read before or None for "must not exist", only if that is still the
        latest; otherwise ConflictError is raised and nothing changes. Raises ValidationError for an axis
        that the store does not have, BackendError.
        """
        run(self._operations.upsert_latest(snapshot, expected))

    def upsert_many(self, snapshots: Iterable[StateSnapshot], *, progress: Progress | None = None) -> int:
        """Write many snapshots in batches, each as ``upsert_latest`` would; returns how many were written.

        A list or tuple is checked whole before the first write, any other iterable batch by batch; an error
        carries in ``written`` how many had been written. ``progress(done, total)`` is called after each
        batch, ``total`` None where it is unknown.
        """
        return run(self._operations.upsert_many(snapshots, progress))

    def patch(
        self, user_id: str, axes: Mapping[str, float | None], **fields: Unpack[SnapshotFields]
    ) -> StateSnapshot:
        """Merge axes into a user's latest snapshot, creating it where absent; returns the new snapshot.

        An axis given as None is removed. Fields are kept unless given; the time is now, and at least 1 ms
        after the one before. Raises ValidationError, ConflictError when other writers never let it through,
        BackendError.
        """
        return run(self._operations.patch(user_id, axes, fields))

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
        return run(self._operations.update(user_id, fn, attempts))

    @overload
    def get_latest(self, user_id: str) -> StateSnapshot | None: ...
    @overload
    def get_latest(self, user_id: str, default: T) -> StateSnapshot | T: ...
    def get_latest(self, user_id: str, default: Any = None) -> Any:
        """The latest snapshot of a user, or the default. Raises ValidationError, BackendError."""
        operations = self._operations
        return operations.backend.cached(user_id) or run(operations.get_latest(user_id)) or default

    def get_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        """The latest snapshots of those of these users who have one, by user id.

        Each user is read at one moment, not all of them at the same. Raises ValidationError, BackendError.
        """
        return run(self._operations.get_many(user_ids))

    def get_history(
        self,
        user_id: str,
        limit: int = 100,
        *,
        since: int | datetime | None = None,
        until: int | datetime | None = None,
    ) -> list[StateSnapshot]:
        """At most ``limit`` snapshots of a user, newest first; [] for an unknown user.

        ``since`` and ``until`` are aware datetimes or milliseconds since 1970, UTC, inclusive. The bounds of
        the store come first: its newest ``max_history_per_user``, of these what is younger than
        ``history_retention_days``. Raises ValidationError, BackendError.
        """
        return run(self._operations.get_history(user_id, limit, since, until))

    def plot_history(self, user_id: str, axes: Iterable[str] | None = None) -> Any:
        """Plot how a user's axes went, as one line each around neutral; returns matplotlib's Axes.

        ``axes`` names those to plot, from above to below; None: all that there are values of. At most the
        newest 1,000 snapshots of the history are shown, or the latest where there is no history. Raises
        UserNotFoundError, ValidationError for an axis that the store does not have, MissingDependencyError.
        """
        return plot_states(run(self._operations.states_to_plot(user_id, MAX_PLOTTED)), axes, self.axes)

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
        since: int | datetime | None = None,
        until: int | datetime | None = None,
        history: bool = False,
    ) -> list[Match]:
        """The users whose latest states are most like the query, best first.

        ``query`` is a snapshot, a mapping of axes, or the id of a user, who is then left out of the result
        unless ``exclude_user_id=""``. The score is the cosine of the axes around neutral, from -1 to 1; a
        neutral state scores 0. At most ``limit``, which is 1 or more, with a score of ``score_threshold`` or
        more. The filters: one ``user_id``, a ``source``, at least ``min_confidence`` from 0 to 1, taken
        between ``since`` and ``until``, both inclusive, aware datetimes or milliseconds since 1970, UTC.
        ``history=True`` searches all snapshots in history instead of the latest ones. Raises
        UserNotFoundError where the query is an unknown user, ValidationError, BackendError.
        """
        return run(
            self._operations.search(
                query,
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
        )

    def users(self) -> Iterator[str]:
        """All user ids, read in pages while the iteration goes on; the order is unspecified.

        A user who is written or deleted meanwhile may be among them or not. Raises BackendError.
        """
        return _begun(PagedIterator(self._operations.users(), str))

    def items(self) -> Iterator[tuple[str, StateSnapshot]]:
        """All user ids with their latest snapshots, as ``users`` reads them. Raises BackendError."""
        return _begun(PagedIterator(self._operations.latest(), lambda latest: (latest.user_id, latest)))

    def to_dataframe(
        self,
        user_ids: Iterable[str] | None = None,
        *,
        since: int | datetime | None = None,
        until: int | datetime | None = None,
    ) -> Any:
        """A data frame of pandas with one row a state, of all users or of some, sorted by user and time.

        The states are the latest ones and what ``get_history`` returns, between ``since`` and ``until``. The
        columns are user_id, updated_at (UTC), source, confidence, schema_version, then the axes of the store,
        NaN where a state lacks one. Raises MissingDependencyError, ValidationError, BackendError.
        """
        return states_dataframe(run(self._operations.states_of(user_ids, since, until)), self.axes)

    def alter_axes(self, *, add: Iterable[str]) -> tuple[str, ...]:
        """Add axes to a store in memory, or in a directory and so to all stores on that.

        Returns all axes, those of ``add`` last. Where vectors have no room left, all are written anew, and
        others wait meanwhile; it is done whole or not at all. Raises ValidationError for a bad name or one
        that is there, StoreError for a server, whose axes others hold too: copy it to a new store.
        """
        return run(self._operations.alter_axes(add))

    def count(self, *, history: bool = False) -> int:
        """How many users there are; with ``history`` how many snapshots get_history can return for all."""
        return run(self._operations.count(history=history))

    def delete(self, user_id: str) -> bool:
        """Remove the latest snapshot and the history of a user; True if there was anything.

        No tombstone is left: an older state written afterwards recreates the user. Raises ValidationError,
        BackendError.
        """
        return run(self._operations.delete(user_id))

    def prune(self) -> int:
        """Remove the history that the bounds hide already; returns how many snapshots were removed."""
        return run(self._operations.prune())

    def collection(
        self,
        name: str,
        embedder: Embedder | None = None,
        *,
        indexes: Mapping[str, FieldKind] | None = None,
        ttl: float | None = None,
    ) -> Collection:
        """A collection of documents, which is opened, or made where absent, when it is first used.

        It belongs to the directory, server or memory, whatever the collection of states is called; ``name``
        must be another. With an ``embedder`` its texts are searched; without one a new collection is a keyed
        store. ``indexes`` says which fields of documents are filtered by: keyword, integer, float, bool,
        datetime or text each. Those that there are stay, more may be added. ``ttl`` is for how many seconds
        from their time documents are kept that do not say it themselves. Raises ValidationError; at the first
        use SchemaMismatchError where the collection was made otherwise, BackendError.
        """
        return Collection(collection_operations(self._operations, name, embedder, indexes, ttl))

    def collections(self) -> list[CollectionInfo]:
        """The collections of documents that there are, by name, with their sizes. Raises BackendError."""
        return run(list_collections(self._operations))

    def erase(self, user_id: str) -> ErasureReport:
        """Remove all of a user: states, and the documents in every collection; the report says what went.

        What others share stays. Raises ValidationError, BackendError.
        """
        return run(erase_user(self._operations, user_id))

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
        directories of their own. ``reason`` goes into the report. Documents are in none of them so far; the
        report names their collections in its ``message``.
        ``progress(done, None)`` is called with the number of states written. Raises SnapshotError,
        ValidationError, BackendError; then there is no new file, and none was removed.
        """
        return run(
            self._operations.create_snapshot(
                progress, directory=directory, kind=kind, reason=reason, keep=keep, keep_remote=keep_remote
            )
        )

    def restore_snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        mode: RestoreMode = "replace",
        unchecked: bool = False,
        progress: Progress | None = None,
    ) -> SnapshotReport:
        """Bring back what a snapshot file holds.

        ``mode`` "replace" makes the store equal to the file: all or nothing, in memory and on disk; on a
        server in place, where until the end health() is degraded and a second try completes what an
        interrupted one began. "merge" adds what the file holds, which wins where the times are equal; "skip"
        adds only users who are absent. Either of these that was interrupted is completed by "merge".
        ``progress(done, total)`` is called with the number of states written; before that with the number
        verified, where the file is read twice. Raises SnapshotError for a file that is damaged or of other
        axes, and changes nothing then; also for a native one without the .sha256 beside it, whose contents
        nobody can check, unless ``unchecked``.
        """
        return run(self._operations.restore_snapshot(path, mode, progress, unchecked=unchecked))

    def health(self) -> Health:
        """How the store is, and how much it holds; never raises: what is wrong is in the ``message``."""
        return run(self._operations.health())

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Wait until a server answers, at most ``timeout`` seconds; any other store is ready at once.

        Raises what the server answers last, such as BackendUnavailableError, ValidationError.
        """
        run(self._operations.wait_until_ready(timeout))

    def close(self) -> None:
        """Release everything; harmless when repeated. Afterwards every other call but health() raises."""
        run(self._operations.close())

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes that this store keeps, in the order of its vectors."""
        run(self._operations.open())
        return self._operations.axes()

    def __getitem__(self, user_id: str) -> StateSnapshot:
        return self.get_latest(user_id) or run(self._operations.latest_or_raise(user_id))

    @overload
    def get(self, user_id: str) -> StateSnapshot | None: ...
    @overload
    def get(self, user_id: str, default: T) -> StateSnapshot | T: ...
    def get(self, user_id: str, default: Any = None) -> Any:
        """As ``get_latest``, under the name that a mapping has for it."""
        return self.get_latest(user_id, default)

    def keys(self) -> Iterator[str]:
        """As ``users``, under the name that a mapping has for it."""
        return self.users()

    def values(self) -> Iterator[StateSnapshot]:
        """All users' latest snapshots, as ``users`` reads them. Raises BackendError."""
        return _begun(PagedIterator(self._operations.latest(), lambda latest: latest))

    def __contains__(self, user_id: object) -> bool:
        self._operations.check_open()
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
        self._operations.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        return store_html(self, None if self.is_closed else self.health())


def _begun(items: PagedIterator[Any, T]) -> PagedIterator[Any, T]:
    run(items.fill())  # a store that is closed says so at once
    return items


class AsyncStateStore(StoreBase):
    """The contract of every asynchronous store: that of StateStore, to be awaited.

    Cancelling a write leaves it done or not done, never half done. ``close`` is ``aclose``.
    """

    async def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        await self._operations.upsert_latest(snapshot, expected)

    async def upsert_many(
        self, snapshots: Iterable[StateSnapshot], *, progress: Progress | None = None
    ) -> int:
        """See StateStore.upsert_many; other tasks run between batches."""
        return await self._operations.upsert_many(snapshots, progress)

    async def patch(
        self, user_id: str, axes: Mapping[str, float | None], **fields: Unpack[SnapshotFields]
    ) -> StateSnapshot:
        """See StateStore.patch."""
        return await self._operations.patch(user_id, axes, fields)

    async def update(
        self,
        user_id: str,
        fn: Callable[[StateSnapshot | None], StateSnapshot | Awaitable[StateSnapshot | None] | None],
        *,
        attempts: int = 32,
    ) -> StateSnapshot | None:
        """See StateStore.update; ``fn`` may be an ``async def``."""
        return await self._operations.update(user_id, fn, attempts)

    @overload
    async def get_latest(self, user_id: str) -> StateSnapshot | None: ...
    @overload
    async def get_latest(self, user_id: str, default: T) -> StateSnapshot | T: ...
    async def get_latest(self, user_id: str, default: Any = None) -> Any:
        """See StateStore.get_latest."""
        operations = self._operations
        return operations.backend.cached(user_id) or await operations.get_latest(user_id) or default

    async def get_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        """See StateStore.get_many."""
        return await self._operations.get_many(user_ids)

    async def get_history(
        self,
        user_id: str,
        limit: int = 100,
        *,
        since: int | datetime | None = None,
        until: int | datetime | None = None,
    ) -> list[StateSnapshot]:
        """See StateStore.get_history."""
        return await self._operations.get_history(user_id, limit, since, until)

    async def plot_history(self, user_id: str, axes: Iterable[str] | None = None) -> Any:
        """See StateStore.plot_history."""
        return plot_states(await self._operations.states_to_plot(user_id, MAX_PLOTTED), axes, self.axes)

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
        since: int | datetime | None = None,
        until: int | datetime | None = None,
        history: bool = False,
    ) -> list[Match]:
        """See StateStore.search_similar."""
        return await self._operations.search(
            query,
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

    def users(self) -> AsyncIterator[str]:
        """See StateStore.users."""
        self._operations.check_open()
        return PagedIterator(self._operations.users(), str)

    def items(self) -> AsyncIterator[tuple[str, StateSnapshot]]:
        """See StateStore.items."""
        self._operations.check_open()
        return PagedIterator(self._operations.latest(), lambda latest: (latest.user_id, latest))

    async def to_dataframe(
        self,
        user_ids: Iterable[str] | None = None,
        *,
        since: int | datetime | None = None,
        until: int | datetime | None = None,
    ) -> Any:
        """See StateStore.to_dataframe; the frame is made in a worker thread."""
        operations = self._operations
        states = await operations.states_of(user_ids, since, until)
        return await operations.waits.call(lambda: states_dataframe(states, self.axes))

    async def alter_axes(self, *, add: Iterable[str]) -> tuple[str, ...]:
        """See StateStore.alter_axes."""
        return await self._operations.alter_axes(add)

    async def count(self, *, history: bool = False) -> int:
        """See StateStore.count."""
        return await self._operations.count(history=history)

    async def delete(self, user_id: str) -> bool:
        """See StateStore.delete."""
        return await self._operations.delete(user_id)

    async def prune(self) -> int:
        """See StateStore.prune."""
        return await self._operations.prune()

    def collection(
        self,
        name: str,
        embedder: Embedder | None = None,
        *,
        indexes: Mapping[str, FieldKind] | None = None,
        ttl: float | None = None,
    ) -> AsyncCollection:
        """See StateStore.collection; not to be awaited."""
        return AsyncCollection(collection_operations(self._operations, name, embedder, indexes, ttl))

    async def collections(self) -> list[CollectionInfo]:
        """See StateStore.collections."""
        return await list_collections(self._operations)

    async def erase(self, user_id: str) -> ErasureReport:
        """See StateStore.erase."""
        return await erase_user(self._operations, user_id)

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
        return await self._operations.create_snapshot(
            progress, directory=directory, kind=kind, reason=reason, keep=keep, keep_remote=keep_remote
        )

    async def restore_snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        mode: RestoreMode = "replace",
        unchecked: bool = False,
        progress: Progress | None = None,
    ) -> SnapshotReport:
        """See StateStore.restore_snapshot; cancelled, a replacement changes nothing, but on a server."""
        return await self._operations.restore_snapshot(path, mode, progress, unchecked=unchecked)

    async def health(self) -> Health:
        """See StateStore.health."""
        return await self._operations.health()

    async def wait_until_ready(self, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - as in the other form
        """See StateStore.wait_until_ready."""
        await self._operations.wait_until_ready(timeout)

    async def aclose(self) -> None:
        """See StateStore.close."""
        await self._operations.close()

    def __aiter__(self) -> AsyncIterator[str]:
        return self.users()

    async def __aenter__(self) -> Self:
        self._operations.check_open()
        if self._operations.backend is UNOPENED:  # a server need not be there when an application starts
            await self._operations.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class _InMemory(StoreBase):
    """What is special of reporting what stores in memory do."""

    _always_on = "memory"

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Make a store that reports from the beginning, if it seems to want that: see reporting_class."""
        config = options.get("config", arguments[0] if arguments else None)
        wanted = options.get("telemetry", getattr(config, "telemetry", True))
        return cast("Self", object.__new__(reporting_class(cls, wanted=wanted is True)))


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
        self._backend, self._operations = _in_memory(self.config, BLOCKING)
        observe(self)

    # Plain methods, as nothing here is to be waited for: a body would take longer than what it does.

    def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        check_state(self._backend.schema, snapshot)
        if expected is not ANY:
            check_expected(expected)
        self._backend.upsert_latest(snapshot, expected)

    @overload
    def get_latest(self, user_id: str) -> StateSnapshot | None: ...
    @overload
    def get_latest(self, user_id: str, default: T) -> StateSnapshot | T: ...
    def get_latest(self, user_id: str, default: Any = None) -> Any:
        """See StateStore.get_latest."""
        try:
            return self._backend.timelines[user_id][-1]
        except (KeyError, TypeError, IndexError):
            return self._backend.get_latest(user_id) or default


class AsyncMemoryStore(_InMemory, AsyncStateStore):
    """MemoryStore for asyncio and trio (which needs anyio).

    Single operations run at once and never suspend; long ones let other tasks run every few milliseconds.
    """

    def __init__(self, config: MemoryStoreConfig | None = None, **options: Unpack[MemoryOptions]) -> None:
        self.config = make_config(MemoryStoreConfig, config, options)
        self._backend, self._operations = _in_memory(self.config, Suspending())
        observe(self)

    async def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        check_state(self._backend.schema, snapshot)
        if expected is not ANY:
            check_expected(expected)
        self._backend.upsert_latest(snapshot, expected)

    @overload
    async def get_latest(self, user_id: str) -> StateSnapshot | None: ...
    @overload
    async def get_latest(self, user_id: str, default: T) -> StateSnapshot | T: ...
    async def get_latest(self, user_id: str, default: Any = None) -> Any:
        """See StateStore.get_latest."""
        return self._backend.get_latest(user_id) or default


def _in_memory(config: MemoryStoreConfig, waits: Waits) -> tuple[MemoryBackend, Operations]:
    backend = MemoryBackend(config, waits)
    return backend, MemoryOperations(backend, MemoryPlace(backend), waits, collection=DEFAULT_COLLECTION)


class QdrantStore(StateStore):
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

    config: QdrantStoreConfig

    def __init__(self, config: QdrantStoreConfig | None = None, **options: Unpack[QdrantOptions]) -> None:
        self.config = make_qdrant_config(config, options)
        self._operations = _on_qdrant(self.config, BLOCKING)
        observe(self)  # before it is opened, which is reported too
        if self.config.url is None:
            run(self._operations.open())


class AsyncQdrantStore(AsyncStateStore):
    """QdrantStore for asyncio and trio; it opens on entering ``async with`` or at the first await.

    With a server it connects at the first operation, so that an application may start before its server.
    With Qdrant Edge, whose calls are short and hold the interpreter anyway, operations run in place; with
    qdrant-client's local mode they run in a worker thread. A write that is cancelled is done or not done.
    """

    config: QdrantStoreConfig

    def __init__(self, config: QdrantStoreConfig | None = None, **options: Unpack[QdrantOptions]) -> None:
        self.config = make_qdrant_config(config, options)
        self._operations = _on_qdrant(self.config, Suspending())
        observe(self)


def _on_qdrant(config: QdrantStoreConfig, waits: Waits) -> Operations:
    if config.url is None:
        place: DirectoryPlace | ServerPlace = DirectoryPlace(config, waits)
        backend: Any = UNOPENED
    else:
        place = ServerPlace(config, waits)
        backend = place.connection.backend
    operations = Operations(backend, place, waits, collection=config.collection_name)
    operations.slow_ms = config.slow_operation_ms
    operations.reporter = REPORTING.reporter(wanted=config.telemetry)
    return operations

"""What an engine of points offers: the narrow waist between what is kept and the databases.

An engine knows collections, points, tenants and filters; it knows nothing of users, states and documents.
To write one, offer what ``Engine`` asks for, and of ``Files``, ``Marks`` and ``NativeSnapshots`` what the
database has; ``MemoryEngine`` is the example, and tests/test_waist.py says whether it is right.

Methods are coroutines, so that one body of code stands above all engines. Those of an engine in this
process never suspend. Whoever drives it makes one call at a time, under a lock; only ``flush`` and
``flush_due`` may be used meanwhile. An engine over a connection is called by many threads or tasks at once.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import attrs

from attuned.base.config import MIN_FREE_BYTES
from attuned.base.errors import (
    LOGGER,
    BackendError,
    BackendRejectedError,
    CollectionNotFoundError,
    StoreError,
    T,
)
from attuned.base.telemetry import Telemetry, report_request
from attuned.base.values import MAX_INTEGER
from attuned.connections.files import Files
from attuned.engines.filters import Equal, Filter, Range, matches

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
    from pathlib import Path

    from attuned.snapshots.directory import NativeSnapshotWriter, RemoteSnapshot


class Point(NamedTuple):
    """A point as it is written: ``id`` is a UUID as text, and the same in all tenants.

    The payload is JSON with a mapping at the top. Of the vector the direction is kept, in single precision.
    The tenant becomes part of the payload, under the key that ``CollectionSpec.tenant`` names.
    """

    id: str
    vector: Sequence[float]
    payload: Mapping[str, Any]
    tenant: str | None = None


class Record(NamedTuple):
    """A point as it was read, which never changes any more.

    ``score`` is its cosine where it was searched for; payload and vector are empty where not asked for.
    ``id`` is as the engine gives it, a string or a UUID.
    """

    id: object
    payload: Mapping[str, Any]
    score: float = 0.0
    vector: Sequence[float] = ()


class Page(NamedTuple):
    """Some records and the cursor to the next ones, None at the end."""

    records: list[Record]
    cursor: Any


class Put(NamedTuple):
    """Points to be written where a guard allows it, which is judged for each point by itself.

    ``mode``: "insert" leaves points that exist alone, "update" those that do not; of those that exist, only
    ones that match ``over`` are replaced, and only ones whose number under the key ``newest_by`` is not above
    that of the new point. One that does not exist is inserted whatever these two say.
    """

    points: Sequence[Point]
    mode: Literal["upsert", "insert", "update"] = "upsert"
    over: Filter | None = None
    newest_by: str | None = None

    @property
    def guarded(self) -> bool:
        """Whether there is anything to be judged."""
        return self.mode != "upsert" or self.over is not None or self.newest_by is not None

    def allows(self, point: Point, there: Mapping[str, Any] | None) -> bool:
        """Whether a point may be written where there is one with such a payload, or none."""
        if there is None:
            return self.mode != "update"
        key, guards = self.newest_by, [] if self.over is None else [self.over]
        if key is not None:
            guards.append(Filter((Range(key, lte=point.payload[key]),)))
        return self.mode != "insert" and all(matches(guard, there) for guard in guards)


class Matching(NamedTuple):
    """All points of a tenant, or of all tenants, that match a filter."""

    where: Filter
    tenant: str | None = None


IndexKind = Literal["keyword", "integer", "float", "text"]


@attrs.frozen
class CollectionSpec:
    """What a collection is opened with.

    ``tenant`` is the key of the payload that holds a point's tenant. ``indexes`` are the keys that are
    filtered on or ordered by, with what they hold. ``metadata`` is recorded when the collection is created,
    or amended; ``accept`` raises where that of one that exists will not do, and is asked before anything is
    touched.
    """

    name: str
    vector_size: int
    indexes: Mapping[str, IndexKind]
    metadata: Mapping[str, Any]
    accept: Callable[[Mapping[str, Any]], object] = dict
    tenant: str | None = None


@attrs.frozen
class CollectionStatus:
    """How a collection is; ``details`` are the database's own words."""

    points: int | None  # None where there is none, or, in this process, none is open
    matching: int = 0
    version: str | None = None  # of the server
    details: Mapping[str, Any] = {}


ExecutionMode = Literal["in place", "in thread", "on loop"]


class Engine(Protocol):
    """What stands between what is kept and a database of points.

    A collection is opened before anything else is done with it; until then, and once it is dropped, what is
    asked of it raises CollectionNotFoundError. What a database raises comes as BackendError. ``tenant=None``
    reads the points of all tenants.

    What it can do is said by attributes, which never change:

    ``runs``: how an asynchronous store calls it. "in place": calls are short, and a thread would gain
    nothing; "in thread": they block; "on loop": its coroutines suspend.
    ``indexed``: pages, orders and counts of a filter are found without looking at every point. Where not,
    what stands above keeps in memory what it would have to ask for often.
    ``compact``: nested values in a payload cost more than one string of the same content.
    ``rounds_floats``: a float in a payload may come back changed in its last bit.
    ``reporter``: what requests are reported to, None for nothing.
    ``shared``: others may write between two calls, so that what must hold is said by guards.
    ``amendments``: how often a collection has been amended here. It alone changes.
    """

    name: str
    runs: ExecutionMode
    indexed: bool
    compact: bool
    rounds_floats: bool
    shared: bool
    reporter: Telemetry | None
    amendments: int

    async def open(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """Open a collection, creating it where absent; returns its metadata. Harmless when repeated."""
        ...

    async def amend(self, collection: CollectionSpec) -> None:
        """Put the metadata of a collection that is open over its own, key by key, and add indexes."""
        ...

    async def collections(self) -> Mapping[str, Mapping[str, Any]]:
        """The collections that there are, opened or not, and their metadata."""
        ...

    async def drop(self, collection: str) -> None:
        """Remove a collection, if there is one."""
        ...

    async def retrieve(
        self, collection: str, ids: Sequence[str], *, payload: bool = True, vector: bool = False
    ) -> list[Record]:
        """The points with these ids that there are, in any order."""
        ...

    async def page(
        self,
        collection: str,
        where: Filter,
        *,
        limit: int,
        tenant: str | None = None,
        cursor: Any = None,
        newest_by: str | None = None,
        payload: bool = True,
    ) -> Page:
        """Points one page after another; or, with ``newest_by``, the first in descending order of a key.

        What is there from the first page to the last comes once; what is written meanwhile comes or not. A
        page may hold fewer than ``limit``, or none, and still have a cursor. In an order come the points
        alone that hold a number there; without their payloads they hold that key.
        """
        ...

    async def search(
        self,
        collection: str,
        vector: Sequence[float],
        where: Filter,
        limit: int,
        *,
        tenant: str | None = None,
        payload: bool = True,
    ) -> list[Record]:
        """The nearest points by cosine, best first; without payloads, their ids and scores alone."""
        ...

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """How many points match."""
        ...

    async def count_by(
        self, collection: str, key: str, values: Sequence[str], where: Filter
    ) -> Mapping[str, int]:
        """How many points match for each of these values of a keyword; 0 may be left out."""
        ...

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """Write points, one put after another, then delete others, by their ids or all that match.

        The points of one put are judged against what there was before it; of one id twice in a put the last
        wins. In this process all is seen at one moment. On a server it is as few requests as it takes, and
        others may come between: what must hold is said by guards. The points of a tenant in one put, as long
        as they fit into a request, are one operation there, which is done or not done.
        """
        ...

    async def status(self, collection: str, where: Filter, seconds: float) -> CollectionStatus:
        """How a collection is, and how many of its points match; asked once, within so many seconds.

        On a server the collection need not have been opened.
        """
        ...

    async def close(self) -> None:
        """Flush and release everything."""
        ...


class EmbeddedEngine(Engine, Files, Protocol):
    """An engine in this process that owns its files."""


class Marks(Protocol):
    """What an engine offers whose collections can be marked for all that use them."""

    async def mark(self, collection: str, key: str, value: str | None) -> None:
        """Record something in the metadata of a collection, or remove it."""
        ...

    async def mark_of(self, collection: str, key: str) -> str | None:
        """What ``mark`` recorded; None where there is nothing, or no collection."""
        ...


class NativeSnapshots(Protocol):
    """What an engine offers whose database makes snapshots of its own."""

    async def resolve(self, collection: str) -> str:
        """The name of the collection that an alias stands for, or the same."""
        ...

    async def is_whole(self, collection: str) -> bool:
        """Whether the node that answers has every shard of a collection, so that its snapshot has all."""
        ...

    async def create_snapshot(self, collection: str) -> RemoteSnapshot:
        """Let the database make a snapshot of a collection."""
        ...

    async def download_snapshot(self, collection: str, name: str, taking: NativeSnapshotWriter) -> None:
        """Read a snapshot of the database."""
        ...

    async def delete_snapshot(self, collection: str, name: str) -> None:
        """Remove a snapshot from the database."""
        ...

    async def upload_snapshot(self, collection: str, path: Path, sha256: str) -> None:
        """Let the database replace a collection, or make it, by what a snapshot file holds."""
        ...

    async def finish(self, last: Awaitable[object]) -> None:
        """Await something though being cancelled."""
        ...

    async def apart(self, call: Callable[[], T]) -> T:
        """Make a call that blocks, where it holds up nobody else."""
        ...


class SharedEngine(Engine, Marks, NativeSnapshots, Protocol):
    """An engine over a connection to a database that other processes write to as well."""

    async def once(self, work: Callable[[], Awaitable[object]]) -> None:
        """Do something that many need: one does, the others wait for how it ends."""
        ...

    def is_spread(self, collection: str) -> bool:
        """Whether one reading may meet the points of a collection that is open at several moments."""
        ...


# What engines share


@contextlib.contextmanager
def backend_errors(engine: Engine, operation: str) -> Generator[None]:
    """Turn what a library raises into a BackendError, and report the request."""
    try:
        with report_request(engine.reporter, engine.name, operation):
            yield
    except StoreError:
        raise
    except Exception as error:
        message = f"{engine.name}: {operation} failed: {error or type(error).__name__}"
        raise BackendError(message, backend=engine.name, operation=operation) from error


def not_open(backend: str, collection: str) -> CollectionNotFoundError:
    """The error of an operation on a collection that has not been opened, or has been dropped."""
    message = f"{backend}: collection {collection!r} is not open"
    return CollectionNotFoundError(message, collection=collection, backend=backend, operation="find")


def within(where: Filter, key: str | None, tenant: str | None) -> Filter:
    """A filter that only points of one tenant match, whose collection keeps it under a key."""
    if tenant is None:
        return where
    if key is None:
        raise ValueError("the collection has no tenants")
    return Filter((Equal(key, tenant), *where.must), where.must_not)


def with_tenant(point: Point, key: str | None) -> Point:
    """A point whose payload holds its tenant."""
    if (point.tenant is None) != (key is None):
        raise ValueError(f"point {point.id}: points have a tenant where their collection has a key for it")
    if key is None:
        return point
    return Point(point.id, point.vector, {**point.payload, key: point.tenant}, point.tenant)


def copied(value: Any) -> Any:
    """JSON that shares nothing with the original."""
    if isinstance(value, dict):
        return {key: copied(each) for key, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [copied(each) for each in cast("Sequence[Any]", value)]
    return value


class Opened(NamedTuple):
    """What is known of an open collection."""

    vector_size: int
    tenant: str | None  # the key that holds it


class EngineInProcess(Engine):
    """What the engines in this process do alike: they judge guards here, and count value by value."""

    shared = False
    reporter: Telemetry | None = None

    def __init__(self) -> None:
        self.amendments = 0
        self._open: dict[str, Opened] = {}

    def _opened(self, collection: str) -> Opened:
        try:
            return self._open[collection]
        except KeyError:
            raise not_open(self.name, collection) from None

    def _narrowed(self, collection: str, where: Filter, tenant: str | None) -> Filter:
        return within(where, self._opened(collection).tenant, tenant)

    async def _judge(
        self, collection: str, puts: Sequence[Put], deletes: Sequence[str] | Matching
    ) -> tuple[list[Point], list[str]]:
        """What ``apply`` is to write, and the ids of what it is to delete then."""
        vector_size, key = self._opened(collection)
        asked = [point.id for put in puts if put.guarded for point in put.points]
        found = await self.retrieve(collection, asked) if asked else []
        there = {str(record.id): record.payload for record in found}
        written: dict[str, Point] = {}
        for put in puts:
            points = [with_tenant(point, key) for point in put.points]
            if put.guarded:
                points = [point for point in points if put.allows(point, there.get(point.id))]
            if asked:
                there.update((point.id, point.payload) for point in points)
            written.update((point.id, point) for point in points)
        for point in written.values():  # before any of them is taken in
            if len(point.vector) != vector_size:
                message = f"point {point.id} has {len(point.vector)} dimensions, not {vector_size}"
                raise BackendRejectedError(message, backend=self.name, operation="write")
        if not isinstance(deletes, Matching):
            return list(written.values()), list(deletes)
        where, cursor = within(deletes.where, key, deletes.tenant), None
        gone = [point.id for point in written.values() if matches(where, point.payload)]
        while True:
            page = await self.page(collection, where, limit=1_000, cursor=cursor, payload=False)
            gone += [point_id for record in page.records if (point_id := str(record.id)) not in written]
            if (cursor := page.cursor) is None:
                return list(written.values()), gone

    async def status(self, collection: str, where: Filter, seconds: float) -> CollectionStatus:
        """See Engine.status."""
        del seconds  # the answer is at hand
        if collection not in self._open:
            return CollectionStatus(None)
        return CollectionStatus(await self.count(collection, Filter()), await self.count(collection, where))

    async def count_by(
        self, collection: str, key: str, values: Sequence[str], where: Filter
    ) -> Mapping[str, int]:
        """See Engine.count_by; value by value, which is quickest within the process."""
        narrowed = ((value, where._replace(must=(Equal(key, value), *where.must))) for value in values)
        return {value: await self.count(collection, each) for value, each in narrowed}


def payload_bytes(value: Any) -> int:
    """About how many bytes JSON takes as it is written to a disk, rather too many."""
    if isinstance(value, str):
        return 8 + (len(value) if value.isascii() else 4 * len(value))
    if isinstance(value, dict):
        return sum(
            8 + 4 * len(key) + payload_bytes(each) for key, each in cast("dict[str, Any]", value).items()
        )
    if isinstance(value, list | tuple):
        return sum(map(payload_bytes, cast("Sequence[Any]", value)))
    return 16


class EngineOnDisk(EngineInProcess):
    """What the engines that keep files do alike: they look for room first, and put off what can wait."""

    RETRY_S = 30.0  # until what was put off is tried again, at the next write
    most_left_free = MAX_INTEGER  # as much as ``min_free_bytes`` says
    _POINT_BYTES = 256  # of a point, beside its payload and vector

    def __init__(self, path: Path, min_free_bytes: int = MIN_FREE_BYTES) -> None:
        super().__init__()
        self._root = str(path)
        self.min_free_bytes = min_free_bytes
        self._put_off: dict[str, tuple[str, float]] = {}  # what is the matter, and when it is tried again

    @staticmethod
    def free_bytes(path: str) -> int:
        """How much room there is on the disk of a directory."""
        return shutil.disk_usage(path).free

    def check_room(self, operation: str, size: int = 0) -> None:
        """Raise BackendError where the disk is as good as full, before anything is done."""
        try:
            free = self.free_bytes(self._root)
        except OSError:
            return  # a directory that is gone, of which check_there tells
        needed = min(self.min_free_bytes, self.most_left_free) + size
        if free < needed:
            done = "closed without a flush" if operation == "close" else "nothing was done"
            raise BackendError(
                f"{self._root}: the disk is full: {operation} needs {needed / 2**20:,.1f} MiB free, "
                f"there are {free / 2**20:,.1f}; {done}: make room, or lower min_free_bytes "
                "(ATTUNED_STORE_MIN_FREE_BYTES) on a small device",
                backend=self.name,
                operation=operation,
                retryable=True,
            )

    def check_room_for(self, written: Sequence[Point], deleted: Sequence[str]) -> None:
        """Raise BackendError where there is no room for a write: four times what it holds."""
        size = self._POINT_BYTES * (len(written) + len(deleted))
        size += sum(4 * len(point.vector) + payload_bytes(point.payload) for point in written)
        self.check_room("write", 4 * size)

    def is_due(self, task: str) -> bool:
        """Whether a task has not been put off just now."""
        return task not in self._put_off or time.monotonic() >= self._put_off[task][1]

    def housekeep(self, task: str, work: Callable[[], object]) -> None:
        """Do what no write waits for: where it fails, that is told, once, and it is tried again later."""
        if not self.is_due(task):
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the write before it has been done: whatever it is
            message = f"{task} is put off: {error or type(error).__name__}"
            if task not in self._put_off:
                LOGGER.warning("%s: %s", self._root, message)
            self._put_off[task] = message, time.monotonic() + self.RETRY_S
        else:
            self._put_off.pop(task, None)

    def signs(self) -> list[str]:
        """See Files.signs."""
        signs = [message for message, _ in list(self._put_off.values())]
        try:
            self.check_room("write")
        except BackendError as error:
            signs.append(str(error))
        return signs

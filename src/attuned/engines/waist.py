"""What an engine of points offers: the narrow waist between states and databases."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import attrs

from attuned.base.errors import BackendError, StoreError, T
from attuned.base.telemetry import Telemetry, report_request

# The narrow waist. An engine knows collections, points and neutral filters; it knows nothing of users and
# states. Its methods are coroutines; those of an embedded engine never suspend.
from attuned.connections.files import Files

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
    from pathlib import Path

    from attuned.snapshots.directory import NativeSnapshotWriter, RemoteSnapshot


class Point(NamedTuple):
    id: str
    vector: list[float]
    payload: dict[str, Any]


class Record(NamedTuple):
    """A point as read: ``score`` where it was searched for, an empty payload where none was asked for.

    ``id`` is as the engine gives it, a string or a UUID.
    """

    id: object
    payload: Mapping[str, Any]
    score: float = 0.0


class Equal(NamedTuple):
    key: str
    value: str | int  # not bool, which Qdrant Edge 0.9 takes for an integer


class AnyOf(NamedTuple):
    key: str
    values: Sequence[str] | Sequence[int]


class Range(NamedTuple):
    key: str
    least: float | None = None
    most: float | None = None


class Text(NamedTuple):
    key: str
    words: str


class Absent(NamedTuple):
    key: str


Condition = Equal | AnyOf | Range | Text | Absent


class Filter(NamedTuple):
    must: tuple[Condition, ...] = ()
    must_not: tuple[Condition, ...] = ()


class Page(NamedTuple):
    """Some records and the cursor to the next ones, None at the end."""

    records: list[Record]
    cursor: Any


IndexKind = Literal["tenant", "keyword", "integer", "float", "bool", "datetime", "text"]


@attrs.frozen
class CollectionSpec:
    """What a collection is opened with.

    ``metadata`` is recorded when it is created; ``accept`` raises where that of one that exists will not do,
    and is asked before anything is touched.
    """

    name: str
    vector_size: int
    indexes: Mapping[str, IndexKind]
    metadata: Mapping[str, Any]
    accept: Callable[[Mapping[str, Any]], object] = dict


ExecutionMode = Literal["in place", "in thread", "on loop"]


class Engine(Protocol):
    """What stands between the core and a database of points.

    ``indexed``: filters and orders are answered from indexes, not by looking at every point.
    ``runs``: how an asynchronous store calls it. "in place": calls are short and hold the interpreter, so
    that a thread would gain nothing; "in thread": they block; "on loop": its coroutines suspend.
    ``compact``: nested payload values cost more than strings. ``reporter``: where its requests are reported.
    """

    name: str
    indexed: bool
    runs: ExecutionMode
    compact: bool
    reporter: Telemetry | None

    async def open_collection(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """Open a collection, creating it where absent; returns the metadata that it was created with."""
        ...

    async def retrieve(self, collection: str, ids: Sequence[str], *, payload: bool = True) -> list[Record]:
        """The points with these ids that there are, in any order."""
        ...

    async def page(
        self,
        collection: str,
        where: Filter,
        *,
        limit: int,
        cursor: Any = None,
        newest_by: str | None = None,
        payload: bool = True,
    ) -> Page:
        """Points one page after another; or, with ``newest_by``, the first in descending order of a key."""
        ...

    async def search(self, collection: str, vector: list[float], where: Filter, limit: int) -> list[Record]:
        """The nearest points, best first."""
        ...

    async def count(self, collection: str, where: Filter) -> int:
        """How many points match."""
        ...

    async def count_by(
        self, collection: str, key: str, values: Sequence[str], where: Filter
    ) -> Mapping[str, int]:
        """How many points match for each of these values of a keyword; 0 may be left out."""
        ...

    async def close(self) -> None:
        """Flush and release everything."""
        ...


class EmbeddedEngine(Engine, Files, Protocol):
    """An engine in this process, which owns its files."""

    async def write(self, collection: str, points: Sequence[Point], deleted: Sequence[str] = ()) -> None:
        """Put points, then delete others by id; the points appear all at one moment."""
        ...

    async def drop(self, collection: str) -> None:
        """Remove a collection, if there is one."""
        ...

    async def replace(self, collection: str, by: str) -> None:
        """Let another open collection take the place of one, at one moment; its own name is then free."""
        ...


class Put(NamedTuple):
    """Points to be put where a guard allows it, which is judged for each point by itself.

    ``mode``: "insert" leaves points that exist alone, "update" those that do not; of those that exist,
    only ones that match ``over`` are replaced.
    """

    points: Sequence[Point]
    mode: Literal["upsert", "insert", "update"] = "upsert"
    over: Filter | None = None


class SharedEngine(Engine, Protocol):
    """An engine that other processes write to as well: changes are guarded, requests may be repeated."""

    async def put(self, collection: str, puts: Sequence[Put]) -> None:
        """Put points, one put after another, in one request."""
        ...

    async def delete(self, collection: str, where: Filter | Sequence[str]) -> None:
        """Delete what matches a filter, or has these ids."""
        ...

    async def mark(self, collection: str, key: str, value: str | None) -> None:
        """Record something in the metadata of a collection, or remove it."""
        ...

    async def mark_of(self, collection: str, key: str) -> str | None:
        """What ``mark`` recorded; None where there is nothing, or no collection."""
        ...

    async def finish(self, last: Awaitable[object]) -> None:
        """Await something though being cancelled."""
        ...

    async def resolve(self, collection: str) -> str:
        """The name of the collection that an alias stands for, or the same."""
        ...

    async def is_whole(self, collection: str) -> bool:
        """Whether the node that answers has every shard of a collection."""
        ...

    async def create_snapshot(self, collection: str) -> RemoteSnapshot:
        """Let the server make a snapshot of a collection."""
        ...

    async def download_snapshot(self, collection: str, name: str, taking: NativeSnapshotWriter) -> None:
        """Read a snapshot of the server."""
        ...

    async def delete_snapshot(self, collection: str, name: str) -> None:
        """Remove a snapshot from the server."""
        ...

    async def upload_snapshot(self, collection: str, path: Path, sha256: str) -> None:
        """Let the server replace a collection, or make it, by what a snapshot file holds."""
        ...

    async def apart(self, call: Callable[[], T]) -> T:
        """Make a call that blocks, where it holds up nobody else."""
        ...

    async def status(self, collection: str, seconds: float) -> Mapping[str, Any]:
        """What the server says of itself and of the collection, asked once and without waiting long."""
        ...

    def is_absent(self, collection: str, error: BackendError) -> bool:
        """Whether an operation failed because there is no such collection, and for no other reason."""
        ...


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


def check_dimensions(points: Sequence[Point], vector_size: int) -> None:
    """Refuse a point that does not fit before an engine has taken in those before it."""
    for point in points:
        if len(point.vector) != vector_size:
            raise ValueError(f"point {point.id} has {len(point.vector)} dimensions, not {vector_size}")


class CountsEach(ABC):
    """Counts value by value, which is quickest within the process."""

    @abstractmethod
    async def count(self, collection: str, where: Filter) -> int:
        """See Engine.count."""

    async def count_by(
        self, collection: str, key: str, values: Sequence[str], where: Filter
    ) -> Mapping[str, int]:
        """See Engine.count_by."""
        narrowed = ((value, where._replace(must=(Equal(key, value), *where.must))) for value in values)
        return {value: await self.count(collection, each) for value, each in narrowed}

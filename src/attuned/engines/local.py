"""The engine of qdrant-client's local mode."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from attuned.base.disk import fsync, write_atomically
from attuned.base.errors import BackendError, MissingDependencyError, locked_error
from attuned.engines.client_models import client_filter
from attuned.engines.waist import (
    CollectionSpec,
    CountsEach,
    ExecutionMode,
    Filter,
    Page,
    Point,
    Record,
    backend_errors,
    check_dimensions,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from types import TracebackType

    from attuned.base.telemetry import Telemetry


def import_qdrant_local() -> tuple[Any, Callable[[str], Any]]:
    """The models of qdrant-client and a maker of local clients that do not warn of many points."""
    try:
        from qdrant_client import models
        from qdrant_client.local.qdrant_local import QdrantLocal
    except ImportError as error:
        raise MissingDependencyError("this store needs qdrant-client: pip install qdrant-client") from error

    class _Local(QdrantLocal):
        LARGE_DATA_THRESHOLD = sys.maxsize  # nothing but search looks at all points here

    return models, lambda location: _Local(location, force_disable_check_same_thread=True)


class GroupedConnection(sqlite3.Connection):
    """A connection whose transactions join the one that is open, if there is one.

    qdrant-client commits after each point. Here all points of a write are kept by one commit, or none.
    """

    grouped = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        return False if self.grouped else super().__exit__(kind, error, traceback)

    @contextlib.contextmanager
    def group(self) -> Generator[None]:
        self.grouped = True
        try:
            yield
            self.commit()
        except BaseException:
            self.rollback()
            raise
        finally:
            self.grouped = False


class LocalEngine(CountsEach):
    """qdrant-client's local mode, made durable, atomic and quick to write.

    It keeps all points in memory and, pickled, in SQLite. What is relied on beyond its public interface
    stands in ``_adopt``, ``write`` and ``page``: the collection's storage and its lists of ids and payloads.
    """

    name = "local"
    indexed = False
    runs: ExecutionMode = "in thread"
    compact = False

    _REBUILD_EVERY = 20_000  # deleted points stay in memory until the collection is loaded again

    def __init__(self, path: Path, durability: str, reporter: Telemetry | None = None) -> None:
        self.reporter = reporter
        self._models, self._make_client = import_qdrant_local()
        self._path = path
        self._power = durability == "power"
        self.writes = 0
        self._sizes: dict[str, int] = {}  # of the vectors of the collections that are open
        self._removed: dict[str, int] = {}
        self._connected: Any = None
        self._connect()

    @property
    def _client(self) -> Any:
        """The client, made anew after a failure has closed it."""
        if self._connected is None:
            self._connect()
        return self._connected

    def _connect(self) -> None:
        with backend_errors(self, f"open {self._path}"):
            self._mend_list()
            try:
                client = self._make_client(str(self._path))
            except RuntimeError as error:
                if "already accessed" in str(error):
                    raise locked_error(self._path) from error
                raise
            for name in self._sizes:
                self._adopt(client.collections[name])
                self._removed[name] = 0
        self._connected = client

    def _mend_list(self) -> None:
        """Fill the list of collections, left empty by a process that was killed as it made the directory."""
        names = self._path / "meta.json"
        if names.exists() and names.stat().st_size == 0:
            write_atomically(names, json.dumps({"collections": {}, "aliases": {}}))

    async def open_collection(self, collection: CollectionSpec) -> Mapping[str, Any]:
        models, client = self._models, self._client
        with backend_errors(self, f"open {self._path}"):
            if not client.collection_exists(collection.name):
                # No payload indexes: local mode has none and warns.
                vectors = models.VectorParams(size=collection.vector_size, distance=models.Distance.COSINE)
                client.create_collection(
                    collection.name, vectors_config=vectors, metadata=dict(collection.metadata)
                )
                if self._power:
                    self._sync_new(collection.name)
            config = client.get_collection(collection.name).config
            metadata = dict(config.metadata or {})
            collection.accept(metadata)
            self._adopt(client.collections[collection.name])
        self._sizes[collection.name] = config.params.vectors.size
        self._removed[collection.name] = 0
        return metadata

    def _sync_new(self, name: str) -> None:
        """Make a new collection survive a power cut.

        This comes before _adopt: closing a file of SQLite's here would end the locks that it has on it.
        """
        directory = self._file_of(name).parent
        names = (directory, directory.parent, self._path, self._path.parent)
        fsync(self._path / "meta.json", *directory.iterdir(), *names)

    def _file_of(self, name: str) -> Path:
        return self._path / "collection" / name / "storage.sqlite"

    def _adopt(self, collection: Any) -> None:
        """Put our own connection in the place of the collection's."""
        collection.LARGE_DATA_THRESHOLD = sys.maxsize
        persistence = collection.storage
        persistence.storage.close()
        connection = sqlite3.connect(persistence.location, factory=GroupedConnection, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # flush() does what FULL would, for many at once
        persistence.storage = connection

    flush_due = False  # SQLite sees to that

    async def write(self, collection: str, points: Sequence[Point], deleted: Sequence[str] = ()) -> None:
        held = self._client.collections[collection]
        persistence, make = held.storage, self._models.PointStruct.model_construct
        structs = [make(id=point.id, vector=point.vector, payload=point.payload) for point in points]
        with backend_errors(self, "write"):
            check_dimensions(points, self._sizes[collection])
            try:
                with persistence.storage.group():
                    for struct in structs:
                        persistence.persist(struct)
                    for point_id in deleted:
                        persistence.delete(point_id)
                self._apply(held, structs, deleted)
            except sqlite3.Error:
                raise  # nothing was written
            except BaseException:
                self._disconnect()  # memory may be behind the disk, after an interrupt too: load it again
                raise
            self._tidy(collection, len(deleted))
        self.writes += 1

    def flush(self) -> None:
        """See EmbeddedEngine.flush.

        What has been committed is in SQLite's log, until SQLite has brought it into the file and synced that.
        No lock of SQLite's is on the log, so that it may be opened and closed here.
        """
        with backend_errors(self, "flush"):
            for name in list(self._sizes):
                with contextlib.suppress(FileNotFoundError):
                    fsync(self._file_of(name).with_name("storage.sqlite-wal"))

    def _apply(self, held: Any, structs: list[Any], deleted: Sequence[str]) -> None:
        """Take into memory what is on disk now, without writing it there a second time."""
        persistence, held.storage = held.storage, None
        try:
            if structs:
                held.upsert(structs)
            if deleted:
                held.delete(list(deleted))
        finally:
            held.storage = persistence

    async def drop(self, collection: str) -> None:
        with backend_errors(self, "drop"):
            self._sizes.pop(collection, None)
            held = self._client.collections.get(collection)
            if held is not None:
                held.close()
            # One that is not listed was being created by a process that was killed.
            if held is not None or self._file_of(collection).parent.exists():
                self._client.delete_collection(collection)

    async def replace(self, collection: str, by: str) -> None:
        """Renaming the file of points is the moment."""
        files = [Path(self._client.collections[name].storage.location) for name in (by, collection)]
        with backend_errors(self, "replace"):
            self._disconnect()  # which brings the write-ahead logs into the files, and removes them
            for log in (file.with_name(file.name + "-wal") for file in files):
                if log.exists():
                    raise OSError(f"{log} is in use by another program")
            files[0].replace(files[1])
            del self._sizes[by]
            with contextlib.suppress(OSError):  # the one or the other is there, also after a power cut
                fsync(files[1].parent)
        with contextlib.suppress(BackendError):  # else the next use tries to connect again
            await self.drop(by)

    def _tidy(self, collection: str, removed: int) -> None:
        self._removed[collection] += removed
        slots = len(self._client.collections[collection].ids)
        if self._removed[collection] >= max(self._REBUILD_EVERY, slots // 2):
            self._disconnect()
            self._connect()

    def _disconnect(self) -> None:
        client, self._connected = self._connected, None
        if client is not None:
            client.close()

    async def retrieve(self, collection: str, ids: Sequence[str], *, payload: bool = True) -> list[Record]:
        with backend_errors(self, "retrieve"):
            found = self._client.retrieve(collection, list(ids), with_payload=payload, with_vectors=False)
        return [Record(str(record.id), record.payload or {}) for record in found]

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
        if newest_by is None and where == Filter():
            return self._slice(collection, cursor or 0, limit, payload=payload)
        models = self._models
        order = newest_by and models.OrderBy(key=newest_by, direction=models.Direction.DESC)
        with backend_errors(self, "page"):
            records, following = self._client.scroll(
                collection,
                scroll_filter=client_filter(self._models, where),
                limit=limit,
                order_by=order,
                offset=cursor,
                with_payload=payload or (False if newest_by is None else [newest_by]),
            )
        return Page([Record(str(record.id), record.payload or {}) for record in records], following)

    def _slice(self, collection: str, start: int, limit: int, *, payload: bool) -> Page:
        """All points in the order of their coming: scroll() would sort them anew for every page."""
        held = self._client.collections[collection]
        stop = min(start + limit, len(held.ids_inv))
        rows = (row for row in range(start, stop) if not held.deleted[row])
        records = [Record(str(held.ids_inv[row]), held.payload[row] if payload else {}) for row in rows]
        return Page(records, stop if stop < len(held.ids_inv) else None)

    async def search(self, collection: str, vector: list[float], where: Filter, limit: int) -> list[Record]:
        with backend_errors(self, "search"):
            found = self._client.query_points(
                collection, query=vector, query_filter=client_filter(self._models, where), limit=limit
            )
        return [Record(str(point.id), point.payload or {}, point.score) for point in found.points]

    async def count(self, collection: str, where: Filter) -> int:
        if where == Filter():
            held = self._client.collections[collection]
            return len(held.ids) - int(held.deleted.sum())
        with backend_errors(self, "count"):
            return cast(
                "int", self._client.count(collection, count_filter=client_filter(self._models, where)).count
            )

    async def close(self) -> None:
        with backend_errors(self, "close"):
            self._disconnect()

    def abandon(self) -> None:
        """Close the lock file unlocked: unlocking would let others into the parent's directory."""
        if self._connected is not None:
            self._connected._flock_file.close()

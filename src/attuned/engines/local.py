"""The engine of qdrant-client's local mode."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import sqlite3
import sys
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Literal, cast

from attuned.base.config import MIN_FREE_BYTES
from attuned.base.disk import fsync, read_manifest, write_atomically
from attuned.base.errors import BackendError, MissingDependencyError, locked_error
from attuned.engines.client_models import ClientModels, client_page, client_records
from attuned.engines.filters import Filter, matches
from attuned.engines.waist import (
    CollectionSpec,
    EngineOnDisk,
    ExecutionMode,
    Matching,
    Opened,
    Page,
    Put,
    Record,
    backend_errors,
    copied,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from attuned.base.telemetry import Telemetry


# ------------------------------------------------------------------------------
# Relied on in qdrant-client beyond its public interface, all of it here; tests/test_canaries.py watches it
# ------------------------------------------------------------------------------


def import_qdrant_local() -> tuple[Any, Callable[[str], Any]]:
    """The models of qdrant-client and a maker of local clients that do not warn of many points."""
    try:
        from qdrant_client import models
        from qdrant_client.local.qdrant_local import QdrantLocal
    except ImportError as error:
        raise MissingDependencyError("this store needs qdrant-client: pip install qdrant-client") from error

    class _Local(QdrantLocal):
        LARGE_DATA_THRESHOLD = sys.maxsize  # nothing but search looks at all points here

    def make(location: str) -> Any:
        try:
            return _Local(location, force_disable_check_same_thread=True)
        except RuntimeError as error:
            if "already accessed" in str(error):
                raise locked_error(location) from error
            raise

    return models, make


def local_files(path: Path, collection: str) -> tuple[Path, Path]:
    """The list of all collections, and where the points of one are."""
    return path / "meta.json", path / "collection" / collection / "storage.sqlite"


def close_local(client: Any) -> None:
    """Close a client; where one of its files cannot be closed, the others are, and its lock is let go of."""
    try:
        client.close()
    except BaseException:
        for collection in client.collections.values():
            with contextlib.suppress(Exception):  # the first failure is raised
                collection.close()
        client.collections.clear()
        client.close()
        raise


def abandon_local(client: Any) -> None:
    """Close the lock file of a client unlocked: unlocking would let others into the parent's directory."""
    client._flock_file.close()


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
        """Commit what is done meanwhile at once."""
        self.grouped = True
        try:
            yield
            self.commit()
        except BaseException:
            self.rollback()
            raise
        finally:
            self.grouped = False


class LocalCollection:
    """A collection of local mode: lists of ids and payloads in memory, and SQLite."""

    def __init__(self, client: Any, name: str) -> None:
        self._held = client.collections[name]

    def adopt(self) -> None:
        """Put our own connection in the place of the collection's."""
        self._held.LARGE_DATA_THRESHOLD = sys.maxsize
        persistence = self._held.storage
        persistence.storage.close()
        connection = sqlite3.connect(persistence.location, factory=GroupedConnection, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # flush() does what FULL would, for many at once
        persistence.storage = connection

    def persist(self, points: Sequence[Any], deleted: Sequence[str]) -> None:
        """Write to the disk, in one transaction."""
        persistence = self._held.storage
        with persistence.storage.group():
            for point in points:
                persistence.persist(point)
            for point_id in deleted:
                persistence.delete(point_id)

    def take_in(self, points: Sequence[Any], deleted: Sequence[str]) -> None:
        """Take into memory what is on disk now, without writing it there a second time."""
        held = self._held
        persistence, held.storage = held.storage, None
        try:
            if points:
                held.upsert(list(points))
            if deleted:
                held.delete(list(deleted))
        finally:
            held.storage = persistence

    @property
    def slots(self) -> int:
        """How many places there are in memory, those of deleted points included."""
        return len(self._held.ids_inv)

    def count(self) -> int:
        """How many points there are."""
        return len(self._held.ids) - int(self._held.deleted.sum())

    def ids(self) -> list[str]:
        """The ids of all points, in their order."""
        return sorted(str(each) for each, row in self._held.ids.items() if not self._held.deleted[row])

    def payload(self, point_id: str) -> dict[str, Any]:
        """The payload of a point, which is not to be changed."""
        held = self._held
        return cast("dict[str, Any]", held.payload[held.ids[point_id]])

    def scores(self, point_ids: Sequence[str], vector: Sequence[float]) -> Sequence[float]:
        """The cosines of a vector with those of points."""
        import numpy as np

        (matrix,) = self._held.vectors.values()
        rows = matrix[[self._held.ids[point_id] for point_id in point_ids]]
        asked = np.asarray(vector, dtype=np.float32)
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(asked)
        cosines = rows @ asked / np.where(lengths == 0, 1, lengths)
        return cast("Sequence[float]", np.clip(cosines, -1, 1).tolist())

    def close(self) -> None:
        """Close its file."""
        self._held.close()


# ------------------------------------------------------------------------------


_REPLACED_BY = "replaced_by"  # in the metadata of a collection: whose points are to become its own


def _note_replaced(listed: dict[str, Any], collection: str, by: str) -> None:
    entry = copied(listed[by])
    entry["metadata"][_REPLACED_BY] = by
    listed[collection] = entry


class _TenantIds:
    """The ids of a collection's points by their tenants, which local mode would look for one by one."""

    def __init__(self, held: LocalCollection, key: str) -> None:
        self._key = key
        self._tenants: dict[str, str] = {}  # by id
        self._members: dict[str, dict[str, None]] = {}
        self._sorted: dict[str, list[str]] = {}
        for point_id in held.ids():
            self.put(point_id, held.payload(point_id))

    def put(self, point_id: str, payload: Mapping[str, Any]) -> None:
        tenant = payload.get(self._key)
        if self._tenants.get(point_id) != tenant:
            self.remove(point_id)
            if isinstance(tenant, str):
                self._tenants[point_id] = tenant
                self._members.setdefault(tenant, {})[point_id] = None
                self._sorted.pop(tenant, None)

    def remove(self, point_id: str) -> None:
        tenant = self._tenants.pop(point_id, None)
        if tenant is not None:
            del self._members[tenant][point_id]
            self._sorted.pop(tenant, None)
            if not self._members[tenant]:
                del self._members[tenant]

    def of(self, tenant: str) -> list[str]:
        """Those of a tenant, in their order."""
        found = self._sorted.get(tenant)
        if found is None:
            found = self._sorted[tenant] = sorted(self._members.get(tenant, ()))
        return found


class LocalEngine(EngineOnDisk):
    """qdrant-client's local mode, made durable, atomic and quick to write.

    It keeps all points in memory and, pickled, in SQLite.
    """

    name = "local"
    indexed = False
    runs: ExecutionMode = "in thread"
    compact = False
    rounds_floats = False

    most_left_free = 1 << 20  # SQLite takes back what it has no room for; lists are written in place

    _REBUILD_EVERY = 20_000  # deleted points stay in memory until the collection is loaded again

    def __init__(
        self,
        path: Path,
        durability: str,
        reporter: Telemetry | None = None,
        min_free_bytes: int = MIN_FREE_BYTES,
    ) -> None:
        super().__init__(path, min_free_bytes)
        self.reporter = reporter
        models, self._make_client = import_qdrant_local()
        self._models = ClientModels(models)
        self._path = path
        self._power = durability == "power"
        self.writes = 0
        self._removed: dict[str, int] = {}
        self._tenants: dict[str, _TenantIds] = {}  # of the collections that were read by tenant
        self._sorted: dict[str, list[str]] = {}  # ids, for pages of everything, until the next write
        self._connected: Any = None
        self._connect()

    @property
    def _client(self) -> Any:
        """The client, made anew after a failure, or an interrupt, has closed it."""
        if self._connected is None or self._connected.closed:
            self._connect()
        return self._connected

    def _connect(self) -> None:
        with backend_errors(self, f"open {self._path}"):
            self.check_room("open")
            self._mend_list()
            client = self._make_client(str(self._path))
            try:
                for name in self._open:
                    LocalCollection(client, name).adopt()
                    self._removed[name] = 0
                self._connected = client
            except BaseException:
                close_local(client)
                raise

    def _mend_list(self) -> None:
        """Bring to its end what a process was killed at: making the list of collections, or replacing one."""
        names, _ = local_files(self._path, "")
        if names.exists() and names.stat().st_size == 0:
            write_atomically(names, json.dumps({"collections": {}, "aliases": {}}))
        listed: dict[str, Any] = read_manifest(names) if names.exists() else {}
        entries: dict[str, Any] = listed.get("collections", {})
        replacing: dict[str, str] = {
            name: by
            for name, entry in entries.items()
            if (by := cast("Any", entry.get("metadata") or {}).pop(_REPLACED_BY, None)) is not None
        }
        for name, by in replacing.items():
            points, others = (local_files(self._path, each)[1] for each in (name, by))
            if others.exists():
                others.replace(points)
                fsync(points.parent)
        if replacing:
            write_atomically(names, json.dumps(listed))

    async def describe(self, collection: str, metadata: Mapping[str, Any]) -> None:
        """See Files.describe; the list of collections is written with the client closed."""
        self._relist(collection, lambda listed: listed[collection]["metadata"].update(metadata))

    def _relist(self, collection: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the entry of a collection in the list, and open what it says then."""
        names, _ = local_files(self._path, collection)
        with backend_errors(self, "describe"):
            self.check_room("describe")
            listed = read_manifest(names)
            change(listed["collections"])
            self._disconnect()
            try:
                write_atomically(names, json.dumps(listed))
            finally:
                self._sorted.clear()
                self._connect()

    async def open(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """See Engine.open."""
        client = self._client
        with backend_errors(self, f"open {self._path}"):
            if collection.name in self._open:
                metadata = dict(client.get_collection(collection.name).config.metadata or {})
                collection.accept(metadata)
                return metadata
            if not client.collection_exists(collection.name):
                self.check_room("open")  # the list of collections is written in place
                # No payload indexes: local mode has none and warns.
                client.create_collection(
                    collection.name,
                    vectors_config=self._models.vectors(collection.vector_size),
                    metadata=dict(collection.metadata),
                )
                if self._power:
                    self._sync_new(collection.name)
            config = client.get_collection(collection.name).config
            metadata = dict(config.metadata or {})
            collection.accept(metadata)
            LocalCollection(client, collection.name).adopt()
        self._open[collection.name] = Opened(config.params.vectors.size, collection.tenant)
        self._removed[collection.name] = 0
        return metadata

    async def amend(self, collection: CollectionSpec) -> None:
        """See Engine.amend; there are no indexes."""
        self._opened(collection.name)
        with backend_errors(self, "amend"):
            self.check_room("amend")  # the list of collections is written in place
            self._client.update_collection(collection.name, metadata=dict(collection.metadata))
        self.amendments += 1
        self.writes += 1

    async def collections(self) -> Mapping[str, Mapping[str, Any]]:
        """See Engine.collections."""
        client = self._client
        with backend_errors(self, "list"):
            names = [each.name for each in client.get_collections().collections]
            return {name: dict(client.get_collection(name).config.metadata or {}) for name in names}

    def _sync_new(self, name: str) -> None:
        """Make a new collection survive a power cut.

        This comes before it is adopted: closing a file of SQLite's here would end the locks it has on it.
        """
        names, points = local_files(self._path, name)
        directory = points.parent
        fsync(names, *directory.iterdir(), directory, directory.parent, self._path, self._path.parent)

    flush_due = False  # SQLite sees to that

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """See Engine.apply."""
        written, deleted = await self._judge(collection, puts, deletes)
        held, make = (
            LocalCollection(self._client, collection),
            self._models.models.PointStruct.model_construct,
        )
        structs = [make(id=point.id, vector=list(point.vector), payload=point.payload) for point in written]
        self._sorted.pop(collection, None)
        with backend_errors(self, "write"):
            self.check_room_for(written, deleted)
            tenants = self._tenants.pop(collection, None)  # read anew after a failure
            try:
                held.persist(structs, deleted)
                held.take_in(structs, deleted)
                if tenants is not None:
                    for point in written:
                        tenants.put(point.id, point.payload)
                    for point_id in deleted:
                        tenants.remove(point_id)
                    self._tenants[collection] = tenants
            except sqlite3.Error:
                raise  # nothing was written
            except BaseException:
                self._disconnect()  # memory may be behind the disk, after an interrupt too: load it again
                raise
            self._tidy(collection, len(deleted))
        self.writes += 1

    def flush(self) -> None:
        """See Files.flush.

        What has been committed is in SQLite's log, until SQLite has brought it into the file and synced that.
        No lock of SQLite's is on the log, so that it may be opened and closed here.
        """
        with backend_errors(self, "flush"):
            for name in list(self._open):
                with contextlib.suppress(FileNotFoundError):
                    _, points = local_files(self._path, name)
                    fsync(points.with_name(points.name + "-wal"))

    async def drop(self, collection: str) -> None:
        """See Engine.drop."""
        with backend_errors(self, "drop"):
            listed = self._client.collection_exists(collection)
            if listed:
                self.check_room("drop")  # the list of collections is written in place
            self._open.pop(collection, None)
            self._sorted.pop(collection, None)
            self._tenants.pop(collection, None)
            if listed:
                LocalCollection(self._client, collection).close()
            # One that is not listed was being created by a process that was killed.
            if listed or local_files(self._path, collection)[1].parent.exists():
                self._client.delete_collection(collection)

    async def replace(self, collection: str, by: str, *, described: bool = False) -> None:
        """Renaming the file of points is the moment; with ``described`` writing the list of collections is.

        What the list says then is done by whoever opens it next: see _mend_list.
        """
        if described:
            grown, _ = self._open.pop(by), self._open.pop(collection)
            self._open[collection] = grown
            self._relist(collection, lambda listed: _note_replaced(listed, collection, by))
            with contextlib.suppress(BackendError):  # an empty collection: the next opening drops it
                await self.drop(by)
            return
        files = [local_files(self._path, name)[1] for name in (by, collection)]
        with backend_errors(self, "replace"):
            self.check_room("replace")
            self._disconnect()  # which brings the write-ahead logs into the files, and removes them
            for log in (file.with_name(file.name + "-wal") for file in files):
                if log.exists():
                    raise OSError(f"{log} is in use by another program")
            self._sorted.clear()
            files[0].replace(files[1])
            del self._open[by]
            with contextlib.suppress(OSError):  # the one or the other is there, also after a power cut
                fsync(files[1].parent)
        with contextlib.suppress(BackendError):  # else the next use tries to connect again
            await self.drop(by)

    def _tidy(self, collection: str, removed: int) -> None:
        self._removed[collection] += removed
        slots = LocalCollection(self._client, collection).slots
        if self._removed[collection] < max(self._REBUILD_EVERY, slots // 2):
            return

        def reload() -> None:
            self.check_room("rebuild")
            self._disconnect()
            self._connect()

        self.housekeep("rebuilding", reload)

    def _disconnect(self) -> None:
        self._tenants.clear()
        if self._connected is not None:
            try:
                close_local(self._connected)
            finally:
                self._connected = None

    async def retrieve(
        self, collection: str, ids: Sequence[str], *, payload: bool = True, vector: bool = False
    ) -> list[Record]:
        """See Engine.retrieve."""
        self._opened(collection)
        with backend_errors(self, "retrieve"):
            return client_records(
                self._client.retrieve(collection, list(ids), with_payload=payload, with_vectors=vector)
            )

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
        """See Engine.page."""
        if tenant is not None:
            self._opened(collection)
            matching = self._matching(collection, tenant, where, cursor or "")
            if newest_by is None:
                return self._tenant_page(collection, matching, limit, payload=payload)
            return self._newest(collection, matching, limit, newest_by, payload=payload)
        narrowed = self._narrowed(collection, where, tenant)
        if newest_by is None and narrowed == Filter():  # which scroll() would sort anew for every page
            held, ids = LocalCollection(self._client, collection), self._sorted.get(collection)
            if ids is None:
                ids = self._sorted[collection] = held.ids()
            start = bisect_left(ids, cursor or "")
            found = ids[start : start + limit + 1]
            records = [Record(each, copied(held.payload(each)) if payload else {}) for each in found[:limit]]
            return Page(records, found[limit] if len(found) > limit else None)
        with backend_errors(self, "page"):
            asked = self._models.page(
                self._models.filter(narrowed), limit, cursor, newest_by, payload=payload
            )
            return client_page(self._client.scroll(collection, **asked))

    def _matching(self, collection: str, tenant: str, where: Filter, least: str = "") -> Iterator[str]:
        """The ids of a tenant's points that match, in their order, from one on."""
        key, held = self._opened(collection).tenant, LocalCollection(self._client, collection)
        if key is None:
            raise ValueError("the collection has no tenants")
        tenants = self._tenants.get(collection)
        if tenants is None:
            tenants = self._tenants[collection] = _TenantIds(held, key)
        ids = tenants.of(tenant)
        for position in range(bisect_left(ids, least), len(ids)):
            if matches(where, held.payload(ids[position])):
                yield ids[position]

    def _tenant_page(self, collection: str, ids: Iterator[str], limit: int, *, payload: bool) -> Page:
        held, found = LocalCollection(self._client, collection), list(itertools.islice(ids, limit + 1))
        following = found.pop() if len(found) > limit else None
        return Page(
            [Record(each, copied(held.payload(each)) if payload else {}) for each in found], following
        )

    def _newest(self, collection: str, ids: Iterator[str], limit: int, key: str, *, payload: bool) -> Page:
        held = LocalCollection(self._client, collection)
        numbers = ((held.payload(each).get(key), each) for each in ids)
        ordered = (found for found in numbers if type(found[0]) in (int, float))
        return Page(
            [
                Record(each, copied(held.payload(each)) if payload else {key: number})
                for number, each in heapq.nlargest(limit, ordered)
            ],
            None,
        )

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
        """See Engine.search."""
        narrowed = self._narrowed(collection, where, tenant)
        if tenant is not None:
            held = LocalCollection(self._client, collection)
            ids = list(self._matching(collection, tenant, where))
            scored = zip(held.scores(ids, vector), ids, strict=True) if ids else ()
            return [
                Record(point_id, copied(held.payload(point_id)) if payload else {}, score)
                for score, point_id in heapq.nlargest(limit, scored)
            ]
        with backend_errors(self, "search"):
            arguments = self._models.search(vector, self._models.filter(narrowed), limit, payload=payload)
            return client_records(self._client.query_points(collection, **arguments).points)

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """See Engine.count."""
        narrowed = self._narrowed(collection, where, tenant)
        if tenant is not None:
            return sum(1 for _ in self._matching(collection, tenant, where))
        if narrowed == Filter():
            return LocalCollection(self._client, collection).count()
        with backend_errors(self, "count"):
            counted = self._client.count(collection, count_filter=self._models.filter(narrowed))
            return cast("int", counted.count)

    async def close(self) -> None:
        """See Engine.close."""
        with backend_errors(self, "close"):
            self._disconnect()

    def abandon(self) -> None:
        """See Files.abandon."""
        if self._connected is not None:
            abandon_local(self._connected)

"""The engine of Qdrant Edge, embedded in this process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attuned.base.config import MIN_FREE_BYTES
from attuned.base.disk import fsync, read_manifest, temporary_name, write_atomically
from attuned.base.errors import LOGGER, BackendError, MissingDependencyError, StoreError
from attuned.engines.filters import Absent, AnyOf, Condition, Equal, Filter, Or, Range, Text
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
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from attuned.base.telemetry import Telemetry


def import_qdrant_edge() -> Any:
    """The package qdrant_edge, or MissingDependencyError."""
    try:
        import qdrant_edge
    except ImportError as error:
        raise MissingDependencyError(
            'this store needs Qdrant Edge: pip install qdrant-edge-py; or choose engine="local"'
        ) from error
    return qdrant_edge


# Relied on in Qdrant Edge beyond its public interface; tests/test_canaries.py watches it. Elsewhere, too, it
# is relied on that closing a shard flushes it, that one that was closed can be moved and loaded again, and
# that an ordered page tells the value it was ordered by without its payload.


def abandon_shards(shards: Iterable[Any], directories: Iterable[Path]) -> None:
    """Keep shards for ever, as dropping one writes to its files; let go of their locks.

    These are on the directories of their write-ahead logs. In a forked child the files are the parent's; in
    this process there may be no room on the disk, where writing is a signal that ends it.
    """
    import ctypes

    for shard in shards:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(shard))
    logs = list[os.stat_result]()
    for directory in directories:
        with contextlib.suppress(OSError):  # somebody has removed it
            logs.append((directory / "wal").stat())
    for descriptor in Path("/dev/fd").iterdir() if Path("/dev/fd").is_dir() else ():
        with contextlib.suppress(OSError):
            if any(os.path.samestat(descriptor.stat(), log) for log in logs):
                os.close(int(descriptor.name))


def _bytes_in(directory: Path) -> int:
    """The room that files take, holes left out."""
    found = [file.stat() for file in directory.rglob("*") if file.is_file()]
    return sum(getattr(each, "st_blocks", each.st_size // 512) * 512 for each in found)


# ------------------------------------------------------------------------------


class EdgeEngine(EngineOnDisk):
    """Qdrant Edge: one shard a collection, in collections/<name>/, its manifest beside it."""

    name = "edge"
    indexed = True
    runs: ExecutionMode = "in place"
    compact = True
    rounds_floats = True

    # Flushing is what lets the write-ahead log shrink. It holds up the process, so that it has a turn of its
    # own, apart from the write after which it is due. More often costs throughput; more rarely makes the
    # pause longer (2,000 changes: about 20 ms, 20,000: 100 ms) and opening after a crash slower.
    _FLUSH_EVERY = 2_000
    # Overwritten and deleted points take space until segments are rebuilt, which holds up the process for
    # about 6 us a point: done once for so many changes that it does not matter.
    _REBUILD_EVERY = 200_000

    def __init__(
        self,
        path: Path,
        durability: str,
        reporter: Telemetry | None = None,
        min_free_bytes: int = MIN_FREE_BYTES,
    ) -> None:
        super().__init__(path, min_free_bytes)
        self.reporter = reporter
        self._api = import_qdrant_edge()
        self._path = path / "collections"
        self._power = durability == "power"
        self.writes = 0
        self._shards: dict[str, Any] = {}
        self._directories: dict[str, Path] = {}  # of the shards
        self._done: dict[str, int] = {}  # changes, ever
        self._flushed: dict[str, int] = {}  # of these
        self._changes: dict[str, int] = {}

    async def open(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """See Engine.open."""
        manifest = self._manifest(collection.name)
        if collection.name in self._shards:
            metadata = read_manifest(manifest)
            collection.accept(metadata)
            return metadata
        if self._recorded(collection.name).get("dropped"):
            await self.drop(collection.name)  # which a process began that was killed
        with backend_errors(self, "open"):
            if generations := self._generations(collection.name):
                self.check_room("open", sum(_bytes_in(each / "wal") for each in generations))
            else:
                self.check_room("open")
                self._check_never_replaced(collection.name)
                self._create(collection, self._path / collection.name, manifest)
            metadata = read_manifest(manifest)
            collection.accept(metadata)
            self._load(collection.name, metadata)
            self._remove_strays(collection.name, metadata)
        vector_size = metadata.get("vector_size", collection.vector_size)
        self._open[collection.name] = Opened(vector_size, collection.tenant)
        return metadata

    async def amend(self, collection: CollectionSpec) -> None:
        """See Engine.amend."""
        self._opened(collection.name)
        manifest = self._manifest(collection.name)
        with backend_errors(self, "amend"):
            self.check_room("amend")
            self._create_indexes(self._shards[collection.name], collection)
            write_atomically(manifest, json.dumps({**read_manifest(manifest), **collection.metadata}))
        self.amendments += 1
        self._done[collection.name] += 1
        self.writes += 1

    async def collections(self) -> Mapping[str, Mapping[str, Any]]:
        """See Engine.collections."""
        with backend_errors(self, "list"):
            names = sorted(path.stem for path in self._path.glob("*.json") if self._generations(path.stem))
            found = {name: read_manifest(self._manifest(name)) for name in names}
        return {name: metadata for name, metadata in found.items() if not metadata.get("dropped")}

    def _manifest(self, name: str) -> Path:
        return self._path / f"{name}.json"

    def _directory(self, name: str, metadata: Mapping[str, Any]) -> Path:
        """Where the shard of a collection is: one that was replaced has another generation of it."""
        generation = metadata.get("generation", 0)
        if not isinstance(generation, int) or generation < 0:
            raise StoreError(f"{self._manifest(name)}: generation is not a number")
        return self._path / (f"{name}@{generation}" if generation else name)

    def _recorded(self, name: str) -> dict[str, Any]:
        """What a manifest says, if it can be read."""
        try:
            return read_manifest(self._manifest(name))
        except StoreError:
            return {}

    def _check_never_replaced(self, name: str) -> None:
        """Raise StoreError where there was data that is missing now; a manifest alone is half a making."""
        if generation := self._recorded(name).get("generation"):
            message = f"{self._manifest(name)}: its data, {name}@{generation} beside it, is missing"
            raise BackendError(message, backend="edge", operation="open")

    def _generations(self, name: str) -> list[Path]:
        """The directories of a collection; all but one are what a process left that was killed."""
        later = (path for path in self._path.glob(f"{name}@*") if path.name[len(name) + 1 :].isdecimal())
        return [path for path in (self._path / name, *later) if path.is_dir()]

    def _load(self, name: str, metadata: Mapping[str, Any]) -> None:
        directory = self._directory(name, metadata)
        self._use(name, directory, self._api.EdgeShard.load(str(directory)))

    def _use(self, name: str, directory: Path, shard: Any) -> None:
        self._shards[name], self._directories[name] = shard, directory
        self._done.setdefault(name, 0)  # a flush may be running that reads the one and sets the other
        self._flushed.setdefault(name, 0)
        self._changes[name] = 0

    def _remove_strays(self, name: str, metadata: Mapping[str, Any]) -> None:
        """Remove what a process left that was killed."""
        used = self._directory(name, metadata)
        for path in [*self._generations(name), self._unfinished(name)]:
            if path != used:
                shutil.rmtree(path, ignore_errors=True)
        temporary_name(self._manifest(name)).unlink(missing_ok=True)

    def _unfinished(self, name: str) -> Path:
        """Where the shard of a collection is created."""
        return self._path / f".{name}.new"

    def _create(self, collection: CollectionSpec, directory: Path, manifest: Path) -> None:
        """Create under another name, then rename: a collection that is there is complete."""
        api, beside = self._api, self._unfinished(collection.name)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write_atomically(manifest, json.dumps(collection.metadata))
        vectors = api.EdgeVectorParams(size=collection.vector_size, distance=api.Distance.Cosine)
        # No graph index: building one over 400,000 points holds up the process for 13 s, searching them
        # without takes 6 ms.
        plain = api.HnswIndexConfig(m=0, ef_construct=16, full_scan_threshold=10**9)
        optimizers = api.EdgeOptimizersConfig(indexing_threshold=0)
        shard = api.EdgeShard.create(
            str(beside), api.EdgeConfig(vectors=vectors, hnsw_config=plain, optimizers=optimizers)
        )
        if collection.tenant is not None:
            tenants = api.KeywordIndexParams(is_tenant=True)
            shard.update(api.UpdateOperation.create_field_index(collection.tenant, tenants))
        self._create_indexes(shard, collection)
        shard.close()
        if self._power:
            fsync(beside, *beside.rglob("*"))
        beside.rename(directory)
        if self._power:
            fsync(self._path, self._path.parent, self._path.parent.parent)

    def _create_indexes(self, shard: Any, collection: CollectionSpec) -> None:
        for key, kind in collection.indexes.items():
            index = getattr(self._api.PayloadSchemaType, kind.capitalize())
            shard.update(self._api.UpdateOperation.create_field_index(key, index))

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """See Engine.apply."""
        written, deleted = await self._judge(collection, puts, deletes)
        api, shard, changes = self._api, self._shards[collection], len(written) + len(deleted)
        with backend_errors(self, "write"):
            self.check_room_for(written, deleted)
            try:
                if written:
                    points = [api.Point(point.id, list(point.vector), point.payload) for point in written]
                    shard.update(api.UpdateOperation.upsert_points(points))
                if deleted:
                    shard.update(api.UpdateOperation.delete_points(deleted))
            finally:  # what failed may have been done in part; not before, as a flush may run meanwhile
                self._done[collection] += changes
            self._tidy(collection, changes)
        self.writes += 1

    @property
    def flush_due(self) -> bool:
        """See Files.flush_due."""
        due = any(self._done[name] - self._flushed[name] >= self._FLUSH_EVERY for name in self._shards)
        return due and self.is_due("flushing")

    def flush(self) -> None:
        """See Files.flush; a shard that has not been written to since the last one needs none."""
        with backend_errors(self, "flush"):
            for name, shard in list(self._shards.items()):
                done = self._done[name]
                if done == self._flushed[name]:
                    continue
                self.check_room("flush")
                try:
                    shard.flush()
                except Exception:
                    if self._shards.get(name) is shard:  # else it was closed meanwhile, which flushes
                        raise
                self._flushed[name] = done

    async def drop(self, collection: str) -> None:
        """See Engine.drop; the manifest that says so is the moment, and goes last."""
        manifest = self._manifest(collection)
        with backend_errors(self, "drop"):
            if collection in self._shards:  # else there is nothing but files to be removed, which makes room
                self.check_room("drop")
            if manifest.exists() and self._generations(collection):
                write_atomically(manifest, json.dumps({"dropped": True}))
            self._open.pop(collection, None)
            if shard := self._shards.pop(collection, None):
                del self._directories[collection]
                shard.close()
            for directory in (*self._generations(collection), self._unfinished(collection)):
                shutil.rmtree(directory, ignore_errors=True)
            for file in (temporary_name(manifest), manifest):
                file.unlink(missing_ok=True)

    async def describe(self, collection: str, metadata: Mapping[str, Any]) -> None:
        """See Files.describe."""
        manifest = self._manifest(collection)
        with backend_errors(self, "describe"):
            self.check_room("describe")
            self._record(manifest, {**read_manifest(manifest), **metadata})

    async def replace(self, collection: str, by: str, *, described: bool = False) -> None:
        """The manifest says which generation of the shard is the one; writing it is the moment."""
        manifest = self._manifest(collection)
        metadata = read_manifest(manifest)
        generation = metadata.get("generation", 0) + 1
        if described:
            metadata = read_manifest(self._manifest(by))
        metadata["generation"] = generation
        directory = self._directory(collection, metadata)
        with backend_errors(self, "replace"):
            self.check_room("replace", _bytes_in(self._directories[by] / "wal"))
            shard = self._move(by, directory)
            try:
                fsync(*directory.rglob("*"), directory, self._path)
                self._record(manifest, metadata)
            except BaseException:
                if read_manifest(manifest) == metadata:  # an interrupt, after the moment
                    self._switch(collection, directory, shard)
                else:
                    shard.close()
                    shutil.rmtree(directory, ignore_errors=True)
                raise
            self._switch(collection, directory, shard)
            self._open[collection] = self._open[by]
            await self.drop(by)

    @staticmethod
    def _record(manifest: Path, metadata: Mapping[str, Any]) -> None:
        try:
            write_atomically(manifest, json.dumps(metadata))
        except OSError as error:
            if read_manifest(manifest) != metadata:
                raise
            LOGGER.warning("%s: may be as before after a power cut: %s", manifest, error)

    def _switch(self, collection: str, directory: Path, shard: Any) -> None:
        old, before = self._shards[collection], self._directories[collection]
        self._use(collection, directory, shard)
        old.close()
        shutil.rmtree(before, ignore_errors=True)

    def _move(self, name: str, directory: Path) -> Any:
        """The shard of a collection, closed, moved and loaded again, so that it is known to be whole."""
        self._shards.pop(name).close()  # which flushes it
        shutil.rmtree(directory, ignore_errors=True)
        self._directories.pop(name).rename(directory)
        try:
            return self._api.EdgeShard.load(str(directory))
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _tidy(self, collection: str, changes: int) -> None:
        shard = self._shards[collection]
        self._changes[collection] += changes
        changed = self._changes[collection]
        if changed < self._REBUILD_EVERY or not self.is_due("rebuilding"):
            return

        def rebuild() -> None:
            if changed >= 2 * shard.info().points_count:
                self.check_room("rebuild", _bytes_in(self._directories[collection]))
                shard.optimize()
                self._changes[collection] = 0

        self.housekeep("rebuilding", rebuild)

    async def retrieve(
        self, collection: str, ids: Sequence[str], *, payload: bool = True, vector: bool = False
    ) -> list[Record]:
        """See Engine.retrieve."""
        self._opened(collection)
        with backend_errors(self, "retrieve"):
            found = self._shards[collection].retrieve(list(ids), with_payload=payload, with_vector=vector)
        return [Record(record.id, record.payload or {}, 0.0, record.vector or ()) for record in found]

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
        api, narrowed = self._api, self._filter(self._narrowed(collection, where, tenant))
        with backend_errors(self, "page"):
            records, following = self._shards[collection].scroll(
                api.ScrollRequest(
                    offset=cursor,
                    limit=limit,
                    filter=narrowed,
                    with_payload=payload,
                    order_by=None if newest_by is None else api.OrderBy(newest_by, api.Direction.Desc),
                )
            )
        if newest_by is not None and not payload:  # the order comes with its key: no payload need be read
            return Page([Record(record.id, {newest_by: record.order_value}) for record in records], None)
        return Page([Record(record.id, record.payload or {}) for record in records], following)

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
        api, narrowed = self._api, self._filter(self._narrowed(collection, where, tenant))
        with backend_errors(self, "search"):
            found = self._shards[collection].query(
                api.QueryRequest(
                    limit=limit,
                    query=api.Query.Nearest(list(vector)),
                    filter=narrowed,
                    with_payload=payload,
                )
            )
        return [Record(record.id, record.payload or {}, record.score) for record in found]

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """See Engine.count."""
        narrowed = self._filter(self._narrowed(collection, where, tenant))
        with backend_errors(self, "count"):
            request = self._api.CountRequest(exact=True, filter=narrowed)
            return cast("int", self._shards[collection].count(request))

    async def close(self) -> None:
        """See Engine.close."""
        failures = list[BaseException]()
        with backend_errors(self, "close"):
            for name, shard in self._shards.items():
                try:
                    self.check_room("close")
                    shard.flush()
                    shard.close()
                except BaseException as error:  # noqa: BLE001 - raised once all are let go of
                    failures.append(error)  # what was acknowledged is in the log
                    abandon_shards([shard], [self._directories[name]])
            self._shards.clear()
            self._directories.clear()
            self._open.clear()
            for failure in failures:
                raise failure

    def abandon(self) -> None:
        """See Files.abandon."""
        abandon_shards(self._shards.values(), self._directories.values())

    def _filter(self, where: Filter) -> Any:
        api = self._api
        return api.Filter(
            must=[*map(self._condition, where.must)], must_not=[*map(self._condition, where.must_not)]
        )

    def _condition(self, condition: Condition) -> Any:
        api = self._api
        match condition:
            case Equal(key, value):
                asked = {"match": api.MatchValue(value)}
            case AnyOf(key, values):
                asked = {"match": api.MatchAny(list(values))}
            case Range(key):
                asked = {"range": api.RangeFloat(**condition.bounds())}
            case Text(key, text):
                asked = {"match": api.MatchText(text)}
            case Absent(key):
                return api.IsEmptyCondition(key=key)
            case Or(()):  # an empty "should" would match everything
                return api.HasIdCondition(set())
            case Or(filters):
                return api.Filter(should=[*map(self._filter, filters)])
        return api.FieldCondition(key=key, **asked)

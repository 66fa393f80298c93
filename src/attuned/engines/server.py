"""The engine of a Qdrant server or cluster."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import time
from collections import Counter, defaultdict
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote as urlquote

from attuned.base.errors import (
    LOGGER,
    BackendError,
    BackendRejectedError,
    BackendTimeoutError,
    BackendUnavailableError,
    SchemaMismatchError,
    SnapshotError,
    StoreError,
    T,
    UnsupportedServerError,
    brief,
)
from attuned.base.telemetry import REPORTING, report_request
from attuned.connections.http import (
    MIN_SERVER_VERSION,
    LeastSpeed,
    download_awaiting,
    download_blocking,
    is_file_name,
    snapshots_path,
)
from attuned.connections.resilience import Resilience
from attuned.connections.runtime import Once
from attuned.connections.server_errors import FULL_DISK, ServerErrors
from attuned.engines.client_models import ClientModels, client_page, client_records, import_qdrant_client
from attuned.engines.filters import AnyOf, Filter
from attuned.engines.limits import NO_LIMIT, Limits, cut, portions
from attuned.engines.server_clients import ServerClients
from attuned.engines.waist import (
    CollectionSpec,
    CollectionStatus,
    ExecutionMode,
    Matching,
    Page,
    Point,
    Put,
    Record,
    backend_errors,
    not_open,
    with_tenant,
    within,
)
from attuned.snapshots.directory import NativeSnapshotWriter, RemoteSnapshot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from attuned.base.config import QdrantStoreConfig
    from attuned.connections.runtime import Waits


_REPORTED_AS = {"scroll": "page", "query_points": "search", "facet": "count"}  # as they are reported


class _OpenCollection(NamedTuple):
    """What is known of a collection that is open."""

    tenant: str | None  # the key that holds it
    is_spread: bool  # over several shards
    limits: Limits


def _replicas(cluster: Any) -> list[tuple[int, int, str]]:
    """The replicas of a collection by shard, peer and state, as the node that was asked sees them."""
    here = [{"peer_id": cluster.get("peer_id"), **each} for each in cluster.get("local_shards", ())]
    found = [*here, *cluster.get("remote_shards", ())]
    return sorted((each["shard_id"], each["peer_id"], str(each["state"])) for each in found)


class ServerEngine:
    """A Qdrant server or cluster over REST: qdrant-client, blocking or asynchronous, behind one form."""

    name = "server"
    indexed = True
    compact = False
    rounds_floats = True
    shared = True
    PAGE = 10_000  # points on a page that are only counted
    REQUEST_BYTES = 16 << 20  # of a request; a server refuses those above 32 MiB

    def __init__(self, config: QdrantStoreConfig, waits: Waits) -> None:
        self._models = ClientModels(import_qdrant_client().models)
        self.amendments = 0
        self.runs: ExecutionMode = "in place" if waits.blocking else "on loop"
        self._waits = waits
        self._config = config
        self._opened: dict[str, _OpenCollection] = {}
        self._url = cast("str", config.url)
        self._blocking = waits.blocking
        self._read_options = {"consistency": config.read_consistency}
        self._write_options = {"ordering": config.write_ordering, "wait": True}
        urls = self._url.split(",")
        self.errors = ServerErrors(self._url, config.api_key)
        self._clients = ServerClients(config, urls, blocking=waits.blocking)
        self._limits = self._clients.limits
        self.reporter = REPORTING.reporter(wanted=config.telemetry)
        self.resilience = Resilience(config, waits.sleep, nodes=len(urls))
        self._full_disk = ""  # what the last write met
        self._once = Once(waits)

    @property
    def _client(self) -> Any:
        return self._clients.at(self.resilience.node).qdrant

    @property
    def _raw(self) -> Any:
        return self._clients.at(self.resilience.node).plain

    async def _send(
        self,
        operation: str,
        request: Callable[[], Awaitable[Any]],
        *,
        writes: bool = False,
        seconds: float | None = None,
    ) -> Any:
        """The answer to a request, sent as often as it takes.

        Each try may take ``seconds``, whatever the deadline of all is, or else the time of a whole answer.
        """

        async def attempt(left: float, request: Callable[[], Awaitable[Any]]) -> Any:
            allowed = min(left, self._config.request_timeout) if seconds is None else seconds
            return await self._attempt(operation, allowed, request)

        return await self.resilience.send(operation, request, attempt, writes=writes)

    async def _attempt(self, operation: str, seconds: float, request: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._limits.within(seconds, request)
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - it is raised as one of ours
            raise self.errors.failure(error, operation) from self.errors.cause(error)

    async def open(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """See Engine.open."""
        await self._check_version()
        info = await self._describe(collection.name)
        if info is None:
            await self._create(collection)
            info = await self._describe(collection.name)
        if info is None:
            raise BackendError(
                f"{self._url}: collection {collection.name!r} vanished while it was being opened",
                backend=self.name,
                operation="open",
                retryable=True,
            )
        metadata = dict(info.config.metadata or {})
        collection.accept(metadata)
        vectors = info.config.params.vectors
        found = getattr(vectors, "size", None), getattr(vectors, "distance", None)
        wanted = metadata.get("vector_size", collection.vector_size)
        if found != (wanted, self._models.models.Distance.COSINE):
            raise SchemaMismatchError(
                f"{self._url}: collection {collection.name!r} has {found[0]} dimensions, {found[1]}; "
                f"{wanted} and Cosine are needed"
            )
        await self._create_indexes(collection, info.payload_schema)
        is_spread = (info.config.params.shard_number or 1) > 1
        limits = Limits.of(info.config)
        self._opened[collection.name] = _OpenCollection(collection.tenant, is_spread, limits)
        return metadata

    async def amend(self, collection: CollectionSpec) -> None:
        """See Engine.amend."""
        info, metadata = await self._describe(collection.name), dict(collection.metadata)
        if info is None:
            raise not_open(self.name, collection.name)
        await self._create_indexes(collection, info.payload_schema)
        await self._send(
            "amend",
            lambda: self._client.update_collection(collection.name, metadata=metadata),
            writes=True,
        )
        self.amendments += 1

    async def collections(self) -> Mapping[str, Mapping[str, Any]]:
        """See Engine.collections; each is asked for its metadata, and left out where it goes meanwhile."""
        listed = (await self._send("list", self._client.get_collections)).collections
        found = {each.name: await self._describe(each.name) for each in listed}
        return {name: dict(info.config.metadata or {}) for name, info in found.items() if info is not None}

    async def drop(self, collection: str) -> None:
        """See Engine.drop."""
        self._opened.pop(collection, None)
        await self._send("drop", lambda: self._client.delete_collection(collection), writes=True)

    async def _check_version(self) -> None:
        version = (await self._send("info", self._client.info)).version
        numbers = tuple(int(part[:9]) for part in re.findall(r"[0-9]+", version)[:2])
        if numbers < MIN_SERVER_VERSION:
            found, least = self.errors.said(version), ".".join(map(str, MIN_SERVER_VERSION))
            raise UnsupportedServerError(f"{self._url}: Qdrant {found}; {least} or newer is needed")

    async def _describe(self, name: str) -> Any:
        try:
            return await self._send("describe", lambda: self._client.get_collection(name))
        except BackendRejectedError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    async def _create(self, collection: CollectionSpec) -> None:
        config = self._config
        try:
            await self._send(
                "create",
                lambda: self._client.create_collection(
                    collection.name,
                    vectors_config=self._models.vectors(collection.vector_size),
                    shard_number=config.shard_number,
                    replication_factor=config.replication_factor,
                    write_consistency_factor=config.write_consistency_factor,
                    metadata=dict(collection.metadata),
                ),
            )
        except BackendRejectedError as error:
            if error.status != HTTPStatus.CONFLICT:  # another one was faster
                raise

    async def _create_indexes(self, collection: CollectionSpec, there: Mapping[str, Any]) -> None:
        """Make the indexes that are missing; one of another kind would fail what relies on it."""
        models, name = self._models.models, collection.name
        schemas = {key: models.PayloadSchemaType(kind) for key, kind in collection.indexes.items()}
        if collection.tenant is not None:
            schemas[collection.tenant] = models.KeywordIndexParams(type="keyword", is_tenant=True)
        kinds = {**collection.indexes, **({collection.tenant: "keyword"} if collection.tenant else {})}
        for key, kind in kinds.items():
            if key in there and there[key].data_type != kind:
                raise SchemaMismatchError(
                    f"{self._url}: collection {name!r} has an index of {there[key].data_type} on {key!r}, "
                    f"{kind} is needed: delete that index, the right one is made then"
                )
        for key in [key for key in schemas if key not in there]:
            index = {"field_name": key, "field_schema": schemas[key]}
            make = functools.partial(self._client.create_payload_index, name, **index, wait=True)
            try:
                await self._update("index", make, writes=False)
            except BackendRejectedError as error:
                if error.status != HTTPStatus.FORBIDDEN:
                    raise
                LOGGER.info("collection %s lacks an index of %s, and may not get it: %s", name, key, error)

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """See Engine.apply; several steps are one request too, in which they come one after another."""
        key, models = self._key_of(collection), self._models.models
        limits = self._limits_of(collection)
        requests = list(self._requests(puts, key, limits))
        if isinstance(deletes, Matching):
            narrowed = within(deletes.where, key, deletes.tenant)
            selectors: list[Any] = [
                models.FilterSelector(filter=self._models.filter(narrowed, limits.listed))
            ]
        else:
            selectors = [models.PointIdsList(points=list(ids)) for ids in cut(deletes, limits.points)]
        steps = [models.DeleteOperation(delete=selector) for selector in selectors]
        if requests and limits.points == NO_LIMIT:
            requests[-1] += steps
        else:
            requests += [[step] for step in steps]
        for number, steps in enumerate(requests):
            try:
                await self._send_steps(collection, steps)
            except BackendError as error:
                error.ambiguous = error.ambiguous or number > 0  # some of it has been written
                raise

    async def _send_steps(self, collection: str, steps: Sequence[Any]) -> None:
        """Send the steps of one request; a single one has a request of its own kind."""
        models, options = self._models.models, self._write_options
        written = isinstance(steps[0], models.UpsertOperation)

        def send() -> Awaitable[Any]:
            if len(steps) > 1:
                return cast("Awaitable[Any]", self._client.batch_update_points(collection, steps, **options))
            if not written:
                return cast("Awaitable[Any]", self._client.delete(collection, steps[0].delete, **options))
            upsert = steps[0].upsert
            asked = {name: getattr(upsert, name) for name in ("points", "update_filter", "update_mode")}
            return cast("Awaitable[Any]", self._client.upsert(collection, **asked, **options))

        await self._update("upsert" if written else "delete", send)

    def _requests(self, puts: Sequence[Put], key: str | None, limits: Limits) -> Iterator[list[Any]]:
        """The steps of puts, request by request: as many as fit into one."""
        steps, taken = list[Any](), 0
        for put in puts:
            for portion, size in portions(put.points, limits.points, self.REQUEST_BYTES):
                if steps and (taken + size > self.REQUEST_BYTES or limits.points < NO_LIMIT):
                    yield steps
                    steps, taken = [], 0
                written = [with_tenant(point, key) for point in portion]
                steps.append(self._models.models.UpsertOperation(upsert=self._upsert(put, written)))
                taken += size
        if steps:
            yield steps

    async def _update(
        self, operation: str, request: Callable[[], Awaitable[Any]], *, writes: bool = True
    ) -> None:
        """Send what changes points; only what the server says to be completed has been done."""

        async def update() -> None:
            answer = await request()
            results = cast("Any", answer if isinstance(answer, list) else [answer])
            for result in results:
                if result.status != self._models.models.UpdateStatus.COMPLETED:
                    raise self.errors.unfinished(result.status, operation)

        try:
            await self._send(operation, update, writes=writes)
        except BackendError as error:
            self._full_disk = str(error) if FULL_DISK in str(error) else self._full_disk
            raise
        self._full_disk = ""

    def signs(self) -> list[str]:
        """What is known of trouble that no look at the server tells: that its disk was full just now."""
        return [self._full_disk] if self._full_disk else []

    def _upsert(self, put: Put, points: Sequence[Point]) -> Any:
        models = self._models.models
        return models.PointsList(
            points=[
                models.PointStruct(id=point.id, vector=list(point.vector), payload=point.payload)
                for point in points
            ],
            update_filter=self._guard(put, points) if put.over or put.newest_by else None,
            update_mode=None if put.mode == "upsert" else models.UpdateMode(f"{put.mode}_only"),
        )

    def _guard(self, put: Put, points: Sequence[Point]) -> Any:
        """The filter that says which points may be replaced; where that differs, for each by its id."""
        models, guard = self._models.models, self._models.filter(put.over or Filter())
        if put.newest_by is None:
            return guard
        ids = defaultdict[float, list[str]](list)
        for point in points:
            ids[point.payload[put.newest_by]].append(point.id)
        for number, chosen in ids.items():
            older = models.FieldCondition(key=put.newest_by, range=models.Range(lte=number))
            if len(ids) == 1:
                guard.must.append(older)
            else:
                branch = models.Filter(must=[models.HasIdCondition(has_id=chosen), older])
                guard.should = [*(guard.should or ()), branch]
        return guard

    def _key_of(self, collection: str) -> str | None:
        try:
            return self._opened[collection].tenant
        except KeyError:
            raise not_open(self.name, collection) from None

    def _narrowed(self, collection: str, where: Filter, tenant: str | None) -> Any:
        """A filter of one tenant's points; those of all may be asked for of what is not open here too."""
        within_tenant = where if tenant is None else within(where, self._key_of(collection), tenant)
        return self._models.filter(within_tenant, self._limits_of(collection).listed)

    def _limits_of(self, collection: str) -> Limits:
        return self._opened[collection].limits if collection in self._opened else Limits()

    async def _ask_client(self, method: str, collection: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the client that reads from a collection."""

        def ask() -> Awaitable[Any]:
            return cast("Awaitable[Any]", getattr(self._client, method)(collection, *arguments, **options))

        return await self._send(_REPORTED_AS.get(method, method), ask)

    async def mark(self, collection: str, key: str, value: str | None) -> None:
        """See Marks.mark."""
        await self._send(
            "mark", lambda: self._client.update_collection(collection, metadata={key: value}), writes=True
        )

    async def mark_of(self, collection: str, key: str) -> str | None:
        """See Marks.mark_of."""
        info = await self._describe(collection)
        metadata: Any = info and info.config.metadata
        return cast("str | None", metadata and metadata.get(key))

    async def finish(self, last: Awaitable[object]) -> None:
        """See NativeSnapshots.finish."""
        await self._waits.shielded(last)

    async def retrieve(
        self, collection: str, ids: Sequence[str], *, payload: bool = True, vector: bool = False
    ) -> list[Record]:
        """See Engine.retrieve."""
        asked = {"with_payload": payload, "with_vectors": vector, **self._read_options}
        found = list[Record]()
        for some in cut(ids, self._limits_of(collection).ids):
            found += client_records(await self._ask_client("retrieve", collection, list(some), **asked))
        return found

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
        narrowed = self._narrowed(collection, where, tenant)
        asked = self._models.page(narrowed, limit, cursor, newest_by, payload=payload) | self._read_options
        most = self._limits_of(collection).page
        if newest_by is None or limit <= most:
            asked["limit"] = min(limit, most)
            return client_page(await self._ask_client("scroll", collection, **asked))
        asked |= {"limit": most, "order_by": None}  # an order has no further pages: all are read, and ordered
        found = list[Record]()
        while True:
            page = client_page(await self._ask_client("scroll", collection, **asked))
            found += (each for each in page.records if type(each.payload.get(newest_by)) in (int, float))
            if page.cursor is None:
                found.sort(key=lambda record: record.payload[newest_by], reverse=True)
                return Page(found[:limit], None)
            asked["offset"] = page.cursor

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
        narrowed, limits = self._narrowed(collection, where, tenant), self._limits_of(collection)
        asked = self._models.search(vector, narrowed, limit, payload=payload) | self._read_options
        models = self._models.models
        if self._config.exact_search and limits.exact:
            asked["search_params"] = models.SearchParams(exact=True)
        found = list[Record]()
        while len(found) < limit:
            wanted = min(limit - len(found), limits.page)
            asked["limit"] = wanted
            points = (await self._ask_client("query_points", collection, **asked)).points
            found += client_records(points)
            if len(points) < wanted:
                break
            # Further ones are those without these: an offset would miss some, as equal scores have no order.
            ids = [point.id for point in points]
            narrowed.must_not += [
                models.HasIdCondition(has_id=list(some)) for some in cut(ids, limits.listed)
            ]
        return found

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """See Engine.count."""
        narrowed = self._narrowed(collection, where, tenant)
        if self._limits_of(collection).exact:
            return cast("int", (await self._ask_client("count", collection, narrowed, exact=True)).count)
        return (await self._count_pages(collection, narrowed, None)).total()

    async def _count_pages(self, collection: str, narrowed: Any, key: str | None) -> Counter[Any]:
        """Count by the value of a key, page by page, where strict mode forbids exact counts."""
        counts, cursor = Counter[Any](), None
        while True:
            asked = {"scroll_filter": narrowed, "limit": min(self.PAGE, self._limits_of(collection).page)}
            asked |= {"offset": cursor, "with_payload": [key] if key else False, **self._read_options}
            records, cursor = await self._ask_client("scroll", collection, **asked)
            counts.update(record.payload.get(key) if key else None for record in records)
            if cursor is None:
                return counts

    async def count_by(
        self, collection: str, key: str, values: Sequence[str], where: Filter
    ) -> Mapping[str, int]:
        """See Engine.count_by; in one request, where strict mode allows that."""
        limits, counts = self._limits_of(collection), dict[str, int]()
        for some in cut(values, min(limits.listed, limits.page)):
            narrowed = self._models.filter(where._replace(must=(AnyOf(key, some), *where.must)))
            if limits.exact:
                asked = {"facet_filter": narrowed, "limit": len(some), "exact": True, **self._read_options}
                hits = (await self._ask_client("facet", collection, key, **asked)).hits
                counts |= {hit.value: hit.count for hit in hits if hit.value in some}
            else:
                found = await self._count_pages(collection, narrowed, key)
                counts |= {value: found[value] for value in some}
        return counts

    async def status(self, collection: str, where: Filter, seconds: float) -> CollectionStatus:
        """See Engine.status; without retry and breaker, but of the next node where one cannot be reached."""
        deadline, nodes = time.monotonic() + seconds, self.resilience.nodes()
        with report_request(self.reporter, "server", "health"):
            for left, node in zip(range(len(nodes), 0, -1), nodes, strict=True):
                self.resilience.choose(node)
                now = time.monotonic()
                try:
                    return await self._status(collection, where, now + (deadline - now) / left)
                except (BackendUnavailableError, BackendTimeoutError):
                    if left == 1:
                        raise
        raise AssertionError("unreachable")  # pragma: no cover - there is a node

    async def _status(self, collection: str, where: Filter, deadline: float) -> CollectionStatus:
        place = f"collections/{urlquote(collection, safe='')}"
        try:
            version = self.errors.said((await self._ask("GET", "", deadline))["version"])
            described = await self._ask("GET", place, deadline, absent_ok=True)
            if not described:
                return CollectionStatus(None, version=version)
            strict: Any = cast("Any", described)["result"]["config"].get("strict_mode_config") or {}
            exact = not strict.get("enabled") or strict.get("search_allow_exact") is not False
            counting = {"filter": self._models.filter(where).model_dump(exclude_none=True), "exact": exact}
            counted = await self._ask("POST", f"{place}/points/count", deadline, json=counting)
            shards = await self._ask("GET", f"{place}/cluster", deadline, absent_ok=True)
            details, matching = dict(described["result"]), int(counted["result"]["count"])
            details["status"] = self.errors.said(details.get("status"))
            details["replicas"] = _replicas(shards.get("result") or {})
            return CollectionStatus(int(details.get("points_count", 0)), matching, version, details)
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise self.errors.failure(error, "health") from self.errors.cause(error)

    async def _ask(
        self, method: str, path: str, deadline: float, *, absent_ok: bool = False, **options: Any
    ) -> dict[str, Any]:
        """One plain request, for what may not wait."""
        seconds = max(0.001, deadline - time.monotonic())

        async def ask() -> Any:
            return await self._raw.request(method, f"/{path}", timeout=seconds, **options)

        answer = await self._attempt("health", seconds, ask)
        if answer.status_code == HTTPStatus.NOT_FOUND and absent_ok:
            return {}
        self._check_answer("health", answer, answer.content)
        found = json.loads(answer.content)
        if not isinstance(found, dict):
            raise TypeError("it is not a JSON object")
        return cast("dict[str, Any]", found)

    async def once(self, work: Callable[[], Awaitable[object]]) -> None:
        """See SharedEngine.once."""
        await self._once.do(work)

    def is_spread(self, collection: str) -> bool:
        """See SharedEngine.is_spread; with a read consistency several replicas are asked."""
        opened = self._opened[collection]
        is_parted = opened.is_spread or opened.limits.page < NO_LIMIT
        return is_parted or self._config.read_consistency is not None

    async def resolve(self, collection: str) -> str:
        """See NativeSnapshots.resolve."""
        aliases = (await self._send("aliases", self._client.get_aliases)).aliases
        return next((each.collection_name for each in aliases if each.alias_name == collection), collection)

    async def is_whole(self, collection: str) -> bool:
        """See NativeSnapshots.is_whole."""
        shards = await self._send("cluster", lambda: self._client.collection_cluster_info(collection))
        here = {shard.shard_id for shard in shards.local_shards if shard.state == "Active"}
        return here.issuperset(shard.shard_id for shard in shards.remote_shards)

    async def create_snapshot(self, collection: str) -> RemoteSnapshot:
        """Asked once where the answer does not come: the server is making one already."""
        path = snapshots_path(collection)
        answer = await self._long_request("snapshot", "POST", path)
        try:
            offered: dict[str, Any] = answer["result"]
            name, size, checksum = offered["name"], offered["size"], offered.get("checksum")
        except (KeyError, TypeError, AttributeError) as error:
            raise SnapshotError(f"{self._url}: the server does not say which snapshot it has made") from error
        if not is_file_name(name) or not isinstance(size, int):
            raise SnapshotError(f"{self._url}: the server names its snapshot {brief(name)}, which is no name")
        return RemoteSnapshot(
            name, size, self.errors.said(checksum).lower() if isinstance(checksum, str) else None
        )

    async def _long_request(
        self, operation: str, method: str, path: str, *, upload: Path | None = None, **options: Any
    ) -> Any:
        """A request that is not sent again when the time is up, as what it asks for may go on."""
        allowed = self._config.snapshot_timeout

        async def ask() -> Any:
            with contextlib.ExitStack() as files:
                if upload is not None:
                    file = files.enter_context(upload.open("rb"))
                    options["files"] = {"snapshot": ("snapshot", file, "application/octet-stream")}
                    self._limits.extend(allowed + os.fstat(file.fileno()).st_size / LeastSpeed.BYTES)
                answer = await self._raw.request(
                    method, path, timeout=self._clients.timeout(allowed), **options
                )
            self._check_answer(operation, answer, answer.content)
            return answer.json()

        async def attempt(_left: float, request: Callable[[], Awaitable[Any]]) -> Any:
            try:
                return await self._attempt(operation, allowed, request)
            except BackendTimeoutError as error:
                error.retryable = error.status is not None  # a gateway has answered
                raise

        return await self.resilience.send(operation, ask, attempt, writes=upload is not None)

    async def download_snapshot(self, collection: str, name: str, taking: NativeSnapshotWriter) -> None:
        """See NativeSnapshots.download_snapshot; it may take any time, but not go slower than LeastSpeed."""
        path = f"{snapshots_path(collection)}/{urlquote(name, safe='')}"
        pour = download_blocking if self._blocking else download_awaiting
        check = functools.partial(self._check_answer, "download")
        seconds = self._config.request_timeout

        async def download() -> None:
            taking.begin()
            speed = LeastSpeed(seconds, self._limits.extend)

            def take(piece: bytes) -> None:
                speed.add(len(piece))
                taking.add(piece)

            await pour(self._raw, path, check, take)

        await self._send("download", download, seconds=seconds)

    async def delete_snapshot(self, collection: str, name: str) -> None:
        """See NativeSnapshots.delete_snapshot."""
        path = f"{snapshots_path(collection)}/{urlquote(name, safe='')}"
        await self._long_request("delete", "DELETE", path)

    async def upload_snapshot(self, collection: str, path: Path, sha256: str) -> None:
        """See NativeSnapshots.upload_snapshot."""
        query = {"priority": "snapshot", "wait": "true", "checksum": sha256}
        place = f"{snapshots_path(collection)}/upload"
        await self._long_request("restore", "POST", place, upload=path, params=query)

    async def apart(self, call: Callable[[], T]) -> T:
        """See NativeSnapshots.apart."""
        return await self._waits.call(call)

    def _check_answer(self, operation: str, answer: Any, body: bytes) -> None:
        if not answer.is_success:
            raise self.errors.answer(answer.status_code, body, answer.headers, operation)

    async def close(self) -> None:
        """See Engine.close."""
        self.resilience.close()
        with backend_errors(self, "close"):
            await self._clients.close()

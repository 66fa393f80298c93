"""The engine of a Qdrant server or cluster."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import time
import weakref
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote as urlquote

from attuned.base.errors import (
    BackendError,
    BackendRejectedError,
    BackendTimeoutError,
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
    BlockingClient,
    BlockingLimits,
    LeastSpeed,
    SuspendingLimits,
    cookie_jar,
    download_awaiting,
    download_blocking,
    is_file_name,
    limit_client,
    limit_transport,
    snapshots_path,
)
from attuned.connections.pools import ConnectionPools
from attuned.connections.resilience import Resilience
from attuned.connections.runtime import Waits, run
from attuned.connections.server_errors import ServerErrors, environment_error
from attuned.engines.client_models import ClientModels, client_page, client_records, import_qdrant_client
from attuned.engines.filters import AnyOf, Filter
from attuned.engines.waist import (
    CollectionSpec,
    CollectionStatus,
    ExecutionMode,
    Matching,
    Page,
    Put,
    Record,
    backend_errors,
    not_open,
    with_tenant,
    within,
)
from attuned.snapshots.directory import NativeSnapshotWriter, RemoteSnapshot

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from attuned.base.config import QdrantStoreConfig


class _Clients(NamedTuple):
    """qdrant-client and, for what that does not offer, plain httpx; closing ``ending`` closes both."""

    qdrant: Any
    plain: Any
    ending: AsyncGenerator[None, None] | None = None


def _event_loop() -> object:
    from anyio.lowlevel import current_token

    return current_token()


async def _until_the_end(
    loop: object, clients: _Clients, of: weakref.ref[ServerEngine]
) -> AsyncGenerator[None, None]:
    """Close clients with their event loop, which at its end closes the generators that are left over.

    It also closes one that is collected, as when a store goes without being closed. As the reference is weak,
    this comes before the collection of the sockets, which would warn.
    """
    import anyio

    try:
        yield
    finally:
        if engine := of():
            engine._clients_of.pop(loop, None)
        with anyio.CancelScope(shield=True):
            await clients.qdrant.close()
            await clients.plain.aclose()


# Relied on in qdrant-client and httpx beyond their public interfaces; tests/test_canaries.py watches it


def tune_client(client: Any, timeout: Any, transport: Any, limits: BlockingLimits | None = None) -> str:
    """Set what no parameter of qdrant-client offers; returns the base url of its requests.

    Its ``timeout`` is one for all phases, and ``transport=`` would turn the proxies of the environment off.
    """
    remote = client._client
    wrapped = remote.openapi_client.client
    http = getattr(wrapped, "_client", None) or wrapped._async_client
    if limits is not None:
        limit_client(http, limits)
    http.timeout, http._transport = timeout, transport
    return cast("str", remote.rest_uri)


# ------------------------------------------------------------------------------


class ServerEngine:
    """A Qdrant server or cluster over REST: qdrant-client, blocking or asynchronous, behind one form.

    One blocking client serves all threads. A connection of an asynchronous one belongs to the event loop that
    it was made in: every loop gets clients of its own, which are closed with the store, or with the loop.
    """

    name = "server"
    indexed = True
    compact = False
    rounds_floats = True
    shared = True

    def __init__(self, config: QdrantStoreConfig, waits: Waits) -> None:
        self._models = ClientModels(import_qdrant_client().models)
        self.amendments = 0
        import ssl

        import httpx

        self.runs: ExecutionMode = "in place" if waits.blocking else "on loop"
        self._waits = waits
        self._config = config
        self._tenants: dict[str, str | None] = {}  # the keys that hold them, by collection
        self._spread: set[str] = set()  # the collections that are
        self._url = cast("str", config.url)
        self._blocking = waits.blocking
        headers = {} if config.api_key is None else {"api-key": config.api_key}  # as api_key= it would warn
        limits = httpx.Limits(max_connections=config.pool_size, max_keepalive_connections=config.pool_size)
        verify = config.verify
        trusted = (
            ssl.create_default_context(cafile=verify)
            if isinstance(verify, str)
            else httpx.create_ssl_context(verify)
        )
        self._read_options = {"consistency": config.read_consistency}
        self._write_options = {"ordering": config.write_ordering, "wait": True}
        self._shared: dict[str, Any] = {"headers": headers, "limits": limits, "verify": trusted}
        self._limits = BlockingLimits() if waits.blocking else SuspendingLimits()
        self.errors = ServerErrors(self._url, config.api_key)
        clients = self._make_clients()  # the first take 0.1 s, for which no event loop is to be held up
        self._prepared = [clients]
        self._clients_of: dict[object, _Clients] = {None: clients} if self._blocking else {}
        self.reporter = REPORTING.reporter(wanted=config.telemetry)
        self.resilience = Resilience(config, waits.sleep)

    def _make_clients(self) -> _Clients:
        import httpx

        try:
            return self._clients_for(import_qdrant_client(), httpx)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            if isinstance(error, StoreError):
                raise
            raise environment_error(error) from error

    def _clients_for(self, package: Any, httpx: Any) -> _Clients:
        config, blocking = self._config, self._blocking
        kind = package.QdrantClient if blocking else package.AsyncQdrantClient
        timeout = self._timeout(config.request_timeout)
        limits = self._limits if isinstance(self._limits, BlockingLimits) else None
        pools = ConnectionPools(self._make_pool, config.pool_size, limits)
        client = kind(url=self._url, check_compatibility=False, cookies=cookie_jar(), **self._shared)
        base_url = tune_client(client, timeout, pools, limits)
        plain = (httpx.Client if blocking else httpx.AsyncClient)(
            base_url=base_url, timeout=timeout, cookies=cookie_jar(), **self._shared
        )
        if limits is None:
            return _Clients(client, plain)
        limit_client(plain, limits)
        return _Clients(BlockingClient(client), BlockingClient(plain))

    def _make_pool(self, connections: int) -> Any:
        import httpx

        size = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        options: dict[str, Any] = {"verify": self._shared["verify"], "limits": size}
        if isinstance(self._limits, BlockingLimits):
            return limit_transport(httpx.HTTPTransport(**options), self._limits)
        return httpx.AsyncHTTPTransport(**options)

    def _clients(self) -> _Clients:
        """The clients of this event loop, made when it first needs them."""
        loop = None if self._blocking else _event_loop()
        return self._clients_of.get(loop) or self._adopt(loop)

    def _adopt(self, loop: object) -> _Clients:
        try:
            clients = self._prepared.pop()
        except IndexError:
            clients = self._make_clients()
        ending = _until_the_end(loop, clients, weakref.ref(self))
        run(cast("Any", anext(ending)))
        clients = self._clients_of[loop] = clients._replace(ending=ending)
        return clients

    @property
    def _client(self) -> Any:
        return self._clients().qdrant

    @property
    def _raw(self) -> Any:
        return self._clients().plain

    def _timeout(self, seconds: float) -> Any:
        import httpx

        return httpx.Timeout(seconds, connect=self._config.connect_timeout)

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
        await self._create_indexes(collection, set(info.payload_schema))
        self._tenants[collection.name] = collection.tenant
        if (info.config.params.shard_number or 1) > 1:
            self._spread.add(collection.name)
        else:
            self._spread.discard(collection.name)
        return metadata

    async def amend(self, collection: CollectionSpec) -> None:
        """See Engine.amend."""
        info, metadata = await self._describe(collection.name), dict(collection.metadata)
        if info is None:
            raise not_open(self.name, collection.name)
        await self._create_indexes(collection, set(info.payload_schema))
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
        self._tenants.pop(collection, None)
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

    async def _create_indexes(self, collection: CollectionSpec, there: set[str]) -> None:
        models, name = self._models.models, collection.name
        schemas = {key: models.PayloadSchemaType(kind) for key, kind in collection.indexes.items()}
        if collection.tenant is not None:
            schemas[collection.tenant] = models.KeywordIndexParams(type="keyword", is_tenant=True)
        for key in [key for key in schemas if key not in there]:
            index = {"field_name": key, "field_schema": schemas[key]}
            await self._send(
                "index", functools.partial(self._client.create_payload_index, name, **index, wait=True)
            )

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """See Engine.apply; several steps are one request too, in which they come one after another."""
        key, models, options = self._key_of(collection), self._models.models, self._write_options
        upserts = [self._upsert(put, key) for put in puts if put.points]
        selector = None
        if isinstance(deletes, Matching):
            narrowed = within(deletes.where, key, deletes.tenant)
            selector = models.FilterSelector(filter=self._models.filter(narrowed))
        elif deletes:
            selector = models.PointIdsList(points=list(deletes))
        if len(upserts) == 1 and selector is None:
            asked = {name: getattr(upserts[0], name) for name in ("points", "update_filter", "update_mode")}
            await self._send(
                "upsert", lambda: self._client.upsert(collection, **asked, **options), writes=True
            )
        elif upserts:
            steps = [models.UpsertOperation(upsert=each) for each in upserts]
            steps += [] if selector is None else [models.DeleteOperation(delete=selector)]
            await self._send(
                "upsert",
                lambda: self._client.batch_update_points(collection, steps, **options),
                writes=True,
            )
        elif selector is not None:
            await self._send(
                "delete", lambda: self._client.delete(collection, selector, **options), writes=True
            )

    def _upsert(self, put: Put, key: str | None) -> Any:
        models, points = self._models.models, [with_tenant(point, key) for point in put.points]
        return models.PointsList(
            points=[
                models.PointStruct(id=point.id, vector=list(point.vector), payload=point.payload)
                for point in points
            ],
            update_filter=None if put.over is None else self._models.filter(put.over),
            update_mode=None if put.mode == "upsert" else models.UpdateMode(f"{put.mode}_only"),
        )

    def _key_of(self, collection: str) -> str | None:
        try:
            return self._tenants[collection]
        except KeyError:
            raise not_open(self.name, collection) from None

    def _narrowed(self, collection: str, where: Filter, tenant: str | None) -> Any:
        """A filter of one tenant's points; those of all may be asked for of what is not open here too."""
        return self._models.filter(
            where if tenant is None else within(where, self._key_of(collection), tenant)
        )

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
        found = await self._send("retrieve", lambda: self._client.retrieve(collection, list(ids), **asked))
        return client_records(found)

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
        return client_page(await self._send("page", lambda: self._client.scroll(collection, **asked)))

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
        asked = self._models.search(vector, narrowed, limit, payload=payload) | self._read_options
        found = await self._send("search", lambda: self._client.query_points(collection, **asked))
        return client_records(found.points)

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """See Engine.count."""
        narrowed = self._narrowed(collection, where, tenant)
        counted = await self._send("count", lambda: self._client.count(collection, narrowed, exact=True))
        return cast("int", counted.count)

    async def count_by(
        self, collection: str, key: str, values: Sequence[str], where: Filter
    ) -> Mapping[str, int]:
        """See Engine.count_by; in one request."""
        if not values:
            return {}
        narrowed = self._models.filter(where._replace(must=(AnyOf(key, values), *where.must)))
        asked = {"facet_filter": narrowed, "limit": len(values), "exact": True, **self._read_options}
        found = await self._send("count", lambda: self._client.facet(collection, key, **asked))
        return {hit.value: hit.count for hit in found.hits if hit.value in values}

    async def status(self, collection: str, where: Filter, seconds: float) -> CollectionStatus:
        """See Engine.status; without retry and breaker."""
        with report_request(self.reporter, "server", "health"):
            return await self._status(collection, where, time.monotonic() + seconds)

    async def _status(self, collection: str, where: Filter, deadline: float) -> CollectionStatus:
        place = f"collections/{urlquote(collection, safe='')}"
        counting = {"filter": self._models.filter(where).model_dump(exclude_none=True), "exact": True}
        try:
            version = self.errors.said((await self._ask("GET", "", deadline))["version"])
            described = await self._ask("GET", place, deadline, absent_ok=True)
            if not described:
                return CollectionStatus(None, version=version)
            counted = await self._ask("POST", f"{place}/points/count", deadline, json=counting)
            details, matching = dict(described["result"]), int(counted["result"]["count"])
            details["status"] = self.errors.said(details.get("status"))
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

    def is_spread(self, collection: str) -> bool:
        """See SharedEngine.is_spread; with a read consistency several replicas are asked."""
        return collection in self._spread or self._config.read_consistency is not None

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
                answer = await self._raw.request(method, path, timeout=self._timeout(allowed), **options)
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
            clients = self._clients_of.get(None if self._blocking else _event_loop())
            if clients is not None and clients.ending is not None:
                await clients.ending.aclose()
            elif clients is not None:
                await clients.qdrant.close()
                await clients.plain.close()

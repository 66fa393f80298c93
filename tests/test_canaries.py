"""What is relied on in other libraries beyond their public interfaces: each test fails when that changes."""

from __future__ import annotations

import os
import sqlite3
import sys
import uuid
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from conformance import needs

import attuned_store
from attuned_store import LocalCollection, StoreLockedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qdrant_server import QdrantServer

KEYS = [str(uuid.UUID(int=number)) for number in range(1, 4)]


# ------------------------------------------------------------------------------
# qdrant-client, local mode (engines/local.py)
# ------------------------------------------------------------------------------


@pytest.fixture
def models() -> Any:
    return pytest.importorskip("qdrant_client").models


@pytest.fixture
def local(tmp_path: Path, models: Any) -> Iterator[Any]:
    """A client of local mode with one collection, adopted."""
    _, make = attuned_store.import_qdrant_local()
    client = make(str(tmp_path))
    vectors = models.VectorParams(size=2, distance=models.Distance.COSINE)
    client.create_collection("things", vectors_config=vectors, metadata={"of": "a test"})
    LocalCollection(client, "things").adopt()
    yield client
    client.close()


def structs(models: Any) -> list[Any]:
    make = models.PointStruct.model_construct
    return [make(id=key, vector=[1.0, 2.0], payload={"key": key}) for key in KEYS]


def rows(path: Path) -> int:
    """How many points another connection sees."""
    _, points = attuned_store.local_files(path, "things")
    connection = sqlite3.connect(points)
    try:
        (count,) = connection.execute("SELECT count(*) FROM points").fetchone()
    finally:
        connection.close()
    return int(count)


def test_local_mode_keeps_its_files_where_they_are_looked_for(local: Any, tmp_path: Path) -> None:
    """The list of collections and the points of each have the names that are made and synced by hand."""
    names, points = attuned_store.local_files(tmp_path, "things")
    assert attuned_store.read_manifest(names).keys() >= {"collections", "aliases"}
    assert attuned_store.read_manifest(names)["collections"].keys() == {"things"}
    assert Path(local.collections["things"].storage.location) == points
    assert points.exists()


@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")  # it leaves the file open
def test_local_mode_says_that_a_directory_is_in_use(local: Any, tmp_path: Path) -> None:
    """A second client on a path fails with the words by which that is known, and the lock file has a name."""
    _, make = attuned_store.import_qdrant_local()
    with pytest.raises(StoreLockedError):
        make(str(tmp_path))
    assert not local._flock_file.closed


def test_local_mode_commits_each_point_by_leaving_its_connection(
    local: Any, models: Any, tmp_path: Path
) -> None:
    """Points are committed by `with connection`, which is held back to keep all points of a write or none."""
    held = LocalCollection(local, "things")
    held._held.storage.persist(structs(models)[0])
    assert rows(tmp_path) == 1

    connection = held._held.storage.storage
    assert type(connection) is attuned_store.GroupedConnection
    with connection.group():
        for struct in structs(models):
            held._held.storage.persist(struct)
        held._held.storage.delete(KEYS[0])
        assert rows(tmp_path) == 1
    assert rows(tmp_path) == 2
    with pytest.raises(AttributeError):
        held.persist([*structs(models), "no point"], [KEYS[1]])
    assert rows(tmp_path) == 2


def test_a_client_of_local_mode_says_whether_it_is_closed(local: Any) -> None:
    """A client that an interrupt has left closed is made anew."""
    assert not local.closed
    local.close()
    assert local.closed


def test_local_mode_without_storage_writes_to_memory_alone(local: Any, models: Any, tmp_path: Path) -> None:
    """What is on disk can be taken into memory without being written twice, into lists that are known."""
    held = LocalCollection(local, "things")
    held.take_in(structs(models), [])
    held.take_in([], [KEYS[1]])

    assert rows(tmp_path) == 0
    assert held.ids() == [KEYS[0], KEYS[2]]
    assert held.payload(KEYS[2]) == {"key": KEYS[2]}
    assert (held.count(), held.slots) == (2, 3)
    assert [str(record.id) for record in local.scroll("things")[0]] == held.ids()


def test_local_mode_warns_by_a_number_that_can_be_raised(local: Any) -> None:
    """The warning of many points has a threshold, on the client and on each collection."""
    module = import_module("qdrant_client.local.qdrant_local")
    assert sys.maxsize > module.QdrantLocal.LARGE_DATA_THRESHOLD
    assert sys.maxsize == type(local).LARGE_DATA_THRESHOLD
    assert sys.maxsize == local.collections["things"].LARGE_DATA_THRESHOLD
    assert import_module("qdrant_client.local.local_collection").LocalCollection.LARGE_DATA_THRESHOLD > 0


# ------------------------------------------------------------------------------
# qdrant-client and httpx, over the network (engines/server.py, connections/http.py)
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["QdrantClient", "AsyncQdrantClient"])
@needs("qdrant_client")
def test_a_client_takes_timeouts_and_a_transport(kind: str, server: QdrantServer) -> None:
    """What is set in the client beneath the client is what its requests use."""
    httpx, package = import_module("httpx"), import_module("qdrant_client")
    client = getattr(package, kind)(url=server.url, check_compatibility=False)
    seen = list[Any]()

    class Transport:
        def handle_request(self, request: Any) -> Any:
            seen.append(request)
            return httpx.Response(200, json={"result": {"collections": []}, "status": "ok", "time": 0.0})

        async def handle_async_request(self, request: Any) -> Any:
            return self.handle_request(request)

        def close(self) -> None:
            pass  # there is nothing to close

        async def aclose(self) -> None:
            pass  # there is nothing to close

    base_url = attuned_store.tune_client(client, httpx.Timeout(7.0, connect=3.0), Transport())
    if kind == "QdrantClient":
        assert client.get_collections().collections == []
        client.close()
    else:
        assert anyio.run(client.get_collections).collections == []
        anyio.run(client.close)
    [request] = seen
    assert (request.extensions["timeout"]["connect"], request.extensions["timeout"]["read"]) == (3.0, 7.0)
    assert base_url.rstrip("/") == server.url.rstrip("/")
    assert str(request.url).startswith(base_url)


@needs("httpx")
def test_all_that_a_blocking_client_waits_for_goes_through_its_streams(server: QdrantServer) -> None:
    """The network backend can be replaced in every transport, and sees connections, reads and writes."""
    httpx, seen = import_module("httpx"), list[str]()

    class Limits(attuned_store.BlockingLimits):
        def left(self, timeout: float | None) -> float:
            seen.append("left")
            return super().left(timeout)

        def check(self) -> None:
            seen.append("check")
            super().check()

    with httpx.Client(mounts={"http://elsewhere.invalid": httpx.HTTPTransport()}) as client:
        limits = Limits()
        attuned_store.limit_client(client, limits)
        for transport in (client._transport, *filter(None, client._mounts.values())):
            assert type(transport._pool._network_backend) is attuned_store.LimitedNetwork
        limits.extend(60)
        client.get(server.url)
        assert seen == ["left", *["check", "left"] * 2]  # connect, write, read
        limits.extend(-1)
        with pytest.raises(TimeoutError):
            client.get(server.url)


# ------------------------------------------------------------------------------
# Qdrant Edge (engines/edge.py)
# ------------------------------------------------------------------------------


@pytest.fixture
def api() -> Any:
    return pytest.importorskip("qdrant_edge")


def new_shard(api: Any, path: Path) -> Any:
    path.mkdir()
    vectors = api.EdgeVectorParams(size=2, distance=api.Distance.Cosine)
    shard = api.EdgeShard.create(str(path), api.EdgeConfig(vectors=vectors))
    shard.update(api.UpdateOperation.create_field_index("number", api.PayloadSchemaType.Integer))
    points = [api.Point(key, [1.0, 2.0], {"number": at}) for at, key in enumerate(KEYS)]
    shard.update(api.UpdateOperation.upsert_points(points))
    return shard


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="needs the descriptors of the process as files")
def test_the_lock_of_a_shard_is_on_the_directory_of_its_log(api: Any, tmp_path: Path) -> None:
    """A shard has its write-ahead log's directory open, by which a forked child lets go of the lock."""

    def holding() -> int:
        log = (tmp_path / "shard" / "wal").stat()
        found = 0
        for descriptor in Path("/dev/fd").iterdir():
            try:
                found += os.path.samestat(descriptor.stat(), log)
            except OSError:
                continue  # that of the listing itself
        return found

    shard = new_shard(api, tmp_path / "shard")
    assert holding() in (1, 2)  # the thread that makes the next segment opens it as well, for a moment
    with pytest.raises(Exception, match="WouldBlock"):
        api.EdgeShard.load(str(tmp_path / "shard"))
    shard.close()
    assert holding() == 0


def test_a_closed_shard_can_be_moved_and_loaded(api: Any, tmp_path: Path) -> None:
    """Closing flushes, so that the files are whole without their log and may have another name."""
    new_shard(api, tmp_path / "shard").close()
    (tmp_path / "shard").rename(tmp_path / "moved")
    shard = api.EdgeShard.load(str(tmp_path / "moved"))

    assert shard.count(api.CountRequest(exact=True)) == 3
    shard.close()


def test_an_ordered_page_tells_the_value_of_its_order(api: Any, tmp_path: Path) -> None:
    """Without payloads the value comes, and its type is kept."""
    shard = new_shard(api, tmp_path / "shard")
    order = api.OrderBy("number", api.Direction.Desc)
    records, following = shard.scroll(api.ScrollRequest(limit=2, order_by=order, with_payload=False))

    assert [(str(record.id), record.order_value) for record in records] == [(KEYS[2], 2), (KEYS[1], 1)]
    assert following is None
    shard.close()

"""The test server answers qdrant-client as its own local engine does, and misbehaves exactly as told."""

from __future__ import annotations

import hashlib
import json
import random
import socket
import ssl
import threading
import time
import tracemalloc
import uuid
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import pytest
from qdrant_client import AsyncQdrantClient, QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from qdrant_server import (
    MIB,
    Exchange,
    QdrantServer,
    Request,
    Response,
    any_fault,
    chunked,
    corrupt,
    delay,
    drip,
    drop,
    duplicate,
    edit,
    edit_result,
    find_route,
    go_down,
    hang,
    in_own_process,
    lose_reply,
    not_json,
    other_shape,
    rate_limited,
    reply,
    reset,
    shorten,
    truncate,
)

pytestmark = pytest.mark.once  # what is tested is a stand-in of the tests

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

C = "states"
POINTS = "PUT /collections/{collection}/points"
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # no certificates, which take long to load
SCROLL = "POST /collections/{collection}/points/scroll"
ONE_SOCKET = httpx.Limits(max_connections=1)  # without limits qdrant-client opens a socket for each request


def connect(server: QdrantServer, **options: Any) -> QdrantClient:
    options = {"limits": ONE_SOCKET, "check_compatibility": False, "timeout": 5, "verify": NO_TLS} | options
    return QdrantClient(url=server.url, **options)


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    with QdrantServer() as server:
        yield server


@pytest.fixture
def client(server: QdrantServer) -> Iterator[QdrantClient]:
    client = connect(server)
    create(client)
    server.clear()
    yield client
    client.close()


@pytest.fixture
def http(server: QdrantServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=5, verify=NO_TLS) as http:
        yield http


def create(client: QdrantClient, name: str = C) -> None:
    client.create_collection(name, models.VectorParams(size=4, distance=models.Distance.COSINE))
    client.create_payload_index(name, "user", models.KeywordIndexParams(type="keyword", is_tenant=True))
    client.create_payload_index(name, "kind", models.PayloadSchemaType.KEYWORD)
    client.create_payload_index(name, "ts", models.PayloadSchemaType.INTEGER)


def point(number: int, **payload: Any) -> models.PointStruct:
    vector = [float(number), 1.0, -0.5, 0.25]
    return models.PointStruct(id=point_id(number), vector=vector, payload={"n": number} | payload)


def point_id(number: int) -> str:
    return str(uuid.UUID(int=number))


def match(key: str, *values: str) -> models.FieldCondition:
    wanted = models.MatchValue(value=values[0]) if len(values) == 1 else models.MatchAny(any=list(values))
    return models.FieldCondition(key=key, match=wanted)


def where(*conditions: models.Condition) -> models.Filter:
    return models.Filter(must=list(conditions))


def not_newer(moment: int) -> models.Filter:
    return where(models.FieldCondition(key="ts", range=models.Range(lte=moment)))


def payloads(client: QdrantClient, *numbers: int) -> list[Any]:
    return [found.payload for found in client.retrieve(C, [point_id(n) for n in numbers])]


@contextmanager
def refused(status: int, text: str = "") -> Iterator[None]:
    with pytest.raises(UnexpectedResponse) as caught:
        yield
    assert caught.value.status_code == status
    assert text in caught.value.content.decode()


# Service and collections ----------------------------------------------------------


def test_service_paths(server: QdrantServer, http: httpx.Client) -> None:
    """The version is 1.17.1 unless set; the health checks are text; an unknown path is 404 without a body."""
    assert http.get("/").json()["version"] == "1.17.1"
    server.version = "1.16.3"
    assert http.get("/").json()["version"] == "1.16.3"
    for path in ("/healthz", "/livez", "/readyz"):
        answer = http.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
    unknown = http.get("/nothing")
    assert (unknown.status_code, unknown.content) == (404, b"")
    assert http.delete("/healthz").status_code == 404


def test_the_client_can_check_the_version(server: QdrantServer) -> None:
    """The compatibility check of qdrant-client works against it."""
    server.version = version("qdrant-client")
    before = set(threading.enumerate())
    with_check = QdrantClient(url=server.url)
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert server.counts["GET /"] == 1
    assert with_check.info().version == server.version
    with_check.close()


def test_collection_info(client: QdrantClient) -> None:
    """Information holds parameters, metadata, indexes and counts."""
    vectors = models.VectorParams(size=3, distance=models.Distance.DOT)
    metadata = {"axes": ["a", "b"], "nothing": None}
    options: dict[str, Any] = {"shard_number": 2, "replication_factor": 3, "write_consistency_factor": 2}
    client.create_collection("other", vectors, metadata=metadata, **options)
    client.create_payload_index("other", "user", models.PayloadSchemaType.KEYWORD)
    points = [
        models.PointStruct(id=n, vector=[1, 2, 3], payload={"user": "a"} if n else {}) for n in range(3)
    ]
    client.upsert("other", points)
    info = client.get_collection("other")
    params = info.config.params
    assert isinstance(params.vectors, models.VectorParams)
    assert (params.vectors.size, params.vectors.distance) == (3, models.Distance.DOT)
    assert (params.shard_number, params.replication_factor, params.write_consistency_factor) == (2, 3, 2)
    assert info.config.metadata == metadata
    assert (info.status, info.points_count, info.indexed_vectors_count) == ("green", 3, 3)
    assert {key: (index.data_type, index.points) for key, index in info.payload_schema.items()} == {
        "user": (models.PayloadSchemaType.KEYWORD, 2)
    }
    assert client.get_collection(C).payload_schema["user"].params.is_tenant is True  # type: ignore[union-attr]


def test_collection_life(client: QdrantClient) -> None:
    """Create, list, exists, update the metadata, delete; deleting an absent one is false."""
    assert client.collection_exists(C)
    assert not client.collection_exists("other")
    client.update_collection(C, metadata={"a": 1})
    client.update_collection(C, metadata={"b": 2})
    client.update_collection(C, collection_params=models.CollectionParamsDiff(replication_factor=2))
    config = client.get_collection(C).config
    assert (config.metadata, config.params.replication_factor) == ({"a": 1, "b": 2}, 2)
    assert [each.name for each in client.get_collections().collections] == [C]
    assert client.delete_collection(C)
    assert not client.delete_collection(C)
    assert client.get_collections().collections == []


def test_absent_and_existing_collections(client: QdrantClient) -> None:
    """An absent collection is 404 with the server's text, one that exists 409."""
    for call in (
        partial(client.get_collection, "no"),
        partial(client.retrieve, "no", [1]),
        partial(client.upsert, "no", [point(1)]),
        partial(client.scroll, "no"),
        partial(client.count, "no"),
        partial(client.delete, "no", [1]),
        partial(client.create_snapshot, "no"),
        partial(client.create_payload_index, "no", "a", "keyword"),
    ):
        with refused(404, "Not found: Collection `no` doesn't exist!"):
            call()
    with refused(409, "Wrong input: Collection `states` already exists!"):
        create(client)


def test_racing_creators(server: QdrantServer) -> None:
    """Of many that create the same collection at once one succeeds and the others get 409."""

    def attempt() -> None:
        client = connect(server)
        try:
            client.create_collection("race", models.VectorParams(size=4, distance=models.Distance.DOT))
            outcomes.append(201)
        except UnexpectedResponse as error:
            outcomes.append(error.status_code or 0)
        finally:
            client.close()

    outcomes: list[int] = []
    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [201] + 7 * [409]


def test_aliases(client: QdrantClient) -> None:
    """An alias stands for its collection, can be renamed and deleted, and cannot point at nothing."""
    create_alias = models.CreateAlias(collection_name=C, alias_name="now")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=create_alias)])
    client.upsert("now", [point(1)])
    assert client.count("now").count == client.count(C).count == 1
    assert [each.alias_name for each in client.get_collection_aliases(C).aliases] == ["now"]
    rename = models.RenameAlias(old_alias_name="now", new_alias_name="then")
    client.update_collection_aliases([models.RenameAliasOperation(rename_alias=rename)])
    assert [each.alias_name for each in client.get_aliases().aliases] == ["then"]
    delete = models.DeleteAlias(alias_name="then")
    client.update_collection_aliases([models.DeleteAliasOperation(delete_alias=delete)])
    assert client.get_aliases().aliases == []
    nothing = models.CreateAlias(collection_name="no", alias_name="a")
    with refused(404, "`no` doesn't exist"):
        client.update_collection_aliases([models.CreateAliasOperation(create_alias=nothing)])


def test_indexes_can_be_deleted(client: QdrantClient) -> None:
    """A deleted index is gone from the schema, and filters find the same points without it."""
    client.upsert(C, [point(n, user="a" if n % 2 else "b") for n in range(6)])
    found = client.scroll(C, where(match("user", "a")))
    client.delete_payload_index(C, "user")
    assert "user" not in client.get_collection(C).payload_schema
    assert client.scroll(C, where(match("user", "a"))) == found


# Points ---------------------------------------------------------------------------


def test_newest_wins_in_one_request(client: QdrantClient) -> None:
    """An upsert with update_filter replaces what is not newer, inserts what is absent, and is silent."""
    for moment in (5, 3, 9, 9, 4):
        answer = client.upsert(
            C, [point(1, ts=moment), point(moment, ts=moment)], update_filter=not_newer(moment)
        )
        assert answer.status == models.UpdateStatus.COMPLETED
    assert payloads(client, 1) == [{"n": 1, "ts": 9}]
    assert [each["ts"] for each in payloads(client, 3, 4, 5, 9)] == [3, 4, 5, 9]


def test_update_modes(client: QdrantClient) -> None:
    """insert_only and update_only with a filter skip rather than fail; a deleted point is absent."""
    insert, update = models.UpdateMode.INSERT_ONLY, models.UpdateMode.UPDATE_ONLY
    client.upsert(C, [point(1, v="a")], update_mode=update)
    assert payloads(client, 1) == []
    client.upsert(C, [point(1, v="b")], update_mode=insert)
    client.upsert(C, [point(1, v="c")], update_mode=insert)
    assert payloads(client, 1) == [{"n": 1, "v": "b"}]
    client.upsert(C, [point(1, v="d")], update_mode=update, update_filter=where(match("v", "x")))
    assert payloads(client, 1) == [{"n": 1, "v": "b"}]
    client.upsert(C, [point(1, v="e")], update_mode=update, update_filter=where(match("v", "b")))
    assert payloads(client, 1) == [{"n": 1, "v": "e"}]
    client.delete(C, [point_id(1)])
    client.upsert(C, [point(1, v="f")], update_mode=update)
    assert payloads(client, 1) == []
    client.upsert(C, [point(1, v="g")], update_mode=insert)
    assert payloads(client, 1) == [{"n": 1, "v": "g"}]


def test_one_id_twice_in_a_batch(client: QdrantClient) -> None:
    """The last wins, and the condition is checked against what was there before, as in Qdrant Edge."""
    client.upsert(C, [point(1, ts=5, v="a"), point(1, ts=6, v="b")])
    assert payloads(client, 1)[0]["v"] == "b"
    client.upsert(C, [point(2, v="a"), point(2, v="b")], update_mode=models.UpdateMode.INSERT_ONLY)
    assert payloads(client, 2)[0]["v"] == "b"
    client.upsert(C, [point(1, ts=9, v="c"), point(1, ts=3, v="d")], update_filter=not_newer(7))
    assert payloads(client, 1)[0]["v"] == "d"


def test_one_id_twice_in_edge(tmp_path: Any) -> None:
    """The same three cases in the server's own engine."""
    edge = pytest.importorskip("qdrant_edge")
    parameters = edge.EdgeVectorParams(size=1, distance=edge.Distance.Dot)
    shard = edge.EdgeShard.create(str(tmp_path), edge.EdgeConfig(vectors=parameters))

    def upsert(*points: tuple[int, dict[str, Any]], **options: Any) -> str:
        made = [edge.Point(id=number, vector=[1.0], payload=payload) for number, payload in points]
        shard.update(edge.UpdateOperation.upsert_points(made, **options))
        return str(shard.retrieve([points[0][0]], with_payload=True, with_vector=False)[0].payload["v"])

    insert = edge.UpdateMode.InsertOnly
    older = edge.Filter(must=[edge.FieldCondition(key="ts", range=edge.RangeFloat(lte=7))])
    assert upsert((1, {"ts": 5, "v": "a"}), (1, {"ts": 6, "v": "b"})) == "b"
    assert upsert((2, {"v": "a"}), (2, {"v": "b"}), update_mode=insert) == "b"
    assert upsert((1, {"ts": 9, "v": "c"}), (1, {"ts": 3, "v": "d"}), condition=older) == "d"
    shard.close()


def test_batch(client: QdrantClient) -> None:
    """A batch is done in order; its upserts have conditions of their own."""
    latest = models.PointsList(points=[point(1, ts=3)], update_filter=not_newer(3))
    answers = client.batch_update_points(
        C,
        [
            models.UpsertOperation(upsert=models.PointsList(points=[point(1, ts=7), point(2, ts=7)])),
            models.UpsertOperation(upsert=latest),
            models.DeleteOperation(delete=models.FilterSelector(filter=where(match("user", "nobody")))),
            models.DeleteOperation(delete=models.PointIdsList(points=[point_id(2)])),
        ],
    )
    assert len(answers) == 4
    assert payloads(client, 1, 2) == [{"n": 1, "ts": 7}]


def test_retrieve(client: QdrantClient) -> None:
    """Retrieve keeps the order asked for, drops repeated and unknown ids, and selects payload and vectors."""
    client.upsert(C, [point(n, user="a") for n in range(1, 4)])
    asked = [point_id(n) for n in (3, 1, 3, 9)]
    assert [each.id for each in client.retrieve(C, asked)] == [point_id(3), point_id(1)]
    bare = client.retrieve(C, asked[:1], with_payload=False)[0]
    assert (bare.payload, bare.vector) == (None, None)
    part = client.retrieve(C, asked[:1], with_payload=["user"], with_vectors=True)[0]
    assert part.payload == {"user": "a"}
    assert part.vector == pytest.approx([number / 10.3125**0.5 for number in (3, 1, -0.5, 0.25)])
    assert client.retrieve(C, []) == []


def test_numbers_are_32_bit_floats(client: QdrantClient, http: httpx.Client) -> None:
    """Vectors are written with the digits of a 32 bit float, payload numbers with all of theirs."""
    client.create_collection("dot", models.VectorParams(size=2, distance=models.Distance.DOT))
    client.upsert(
        "dot", [models.PointStruct(id=1, vector=[0.1, 1.0], payload={"x": 0.1 + 0.2, "big": 2**53 + 1})]
    )
    answer = http.get("/collections/dot/points/1").json()["result"]
    assert answer == {
        "id": 1,
        "payload": {"x": 0.1 + 0.2, "big": 2**53 + 1},
        "vector": [0.1, 1.0],
    }


def test_scroll_pages(client: QdrantClient) -> None:
    """Pages come in the order of ids, end with no offset, and together hold every match once."""
    numbers = random.Random(1).sample(range(1000), 30)
    client.upsert(C, [point(n, user="a" if n % 3 else "b") for n in numbers])
    client.delete(C, [point_id(numbers[0])])
    for wanted, chosen in ((None, lambda n: True), (where(match("user", "a")), lambda n: n % 3 != 0)):
        seen: list[str] = []
        offset: Any = None
        while True:
            found, offset = client.scroll(C, wanted, limit=4, offset=offset, with_payload=False)
            seen += [str(each.id) for each in found]
            if offset is None:
                break
        assert seen == [point_id(n) for n in sorted(numbers) if n != numbers[0] and chosen(n)]


def test_ordered_scroll(client: QdrantClient) -> None:
    """order_by sorts by an indexed key, either way, from a value on; without a range index it is refused."""
    client.upsert(C, [point(n, ts=n * 37 % 11, user="a") for n in range(11)])
    for direction in (models.Direction.ASC, models.Direction.DESC):
        order = models.OrderBy(key="ts", direction=direction, start_from=5)
        found, offset = client.scroll(C, where(match("user", "a")), order_by=order, limit=4)
        step = 1 if direction == models.Direction.ASC else -1
        assert [each.payload["ts"] for each in found if each.payload] == [5 + step * n for n in range(4)]
        assert [each.order_value for each in found] == [5 + step * n for n in range(4)]
        assert offset is None
    with refused(400, "No range index for `order_by` key: `n`"):
        client.scroll(C, order_by="n")
    with refused(400, "No range index for `order_by` key: `user`"):
        client.scroll(C, order_by="user")
    with refused(400, "offset"):
        client.scroll(C, order_by="ts", offset=point_id(1))


def test_query(client: QdrantClient) -> None:
    """Best first, filtered, above a threshold; by vector or by the id of a point, which is left out."""
    client.upsert(C, [point(n, user="a" if n % 2 else "b") for n in range(1, 9)])
    client.upsert(C, [models.PointStruct(id=point_id(99), vector=[0, 0, 0, 0], payload={"user": "a"})])
    answer = client.query_points(C, [8, 1, -0.5, 0.25], query_filter=where(match("user", "b")), limit=3)
    assert [each.id for each in answer.points] == [point_id(n) for n in (8, 6, 4)]
    assert answer.points[0].score == pytest.approx(1)
    assert answer.points[0].payload == {"n": 8, "user": "b"}
    near = client.query_points(C, [8, 1, -0.5, 0.25], score_threshold=0.995, with_payload=False).points
    assert [each.id for each in near] == [point_id(n) for n in (8, 7, 6, 5)]
    assert near[0].payload is None
    assert client.query_points(C, point_id(8), limit=1).points[0].id == point_id(7)
    assert client.query_points(C, [1, 1, 1, 1], limit=100, with_vectors=True).points[-1].vector
    scores = {each.id: each.score for each in client.query_points(C, [1, 1, 1, 1], limit=100).points}
    assert scores[point_id(99)] == 0
    assert len(client.query_points(C, limit=100).points) == 9


def test_count_facet_and_delete(client: QdrantClient) -> None:
    """Count and facet respect filters; delete by ids and by filter, and has no count."""
    client.upsert(C, [point(n, user="abc"[n % 3], ts=n) for n in range(9)])
    assert client.count(C).count == 9
    assert client.count(C, count_filter=where(match("user", "a", "b"))).count == 6
    hits = client.facet(C, "user", facet_filter=not_newer(3)).hits
    assert [(each.value, each.count) for each in hits] == [("a", 2), ("b", 1), ("c", 1)]
    with refused(400, "Index required"):
        client.facet(C, "n")
    answer = client.delete(C, models.FilterSelector(filter=where(match("user", "a"))))
    assert set(answer.model_dump(exclude_none=True)) == {"operation_id", "status"}
    client.delete(C, [point_id(1), point_id(12345)])
    assert client.count(C).count == 5


def test_payload_and_vector_operations(client: QdrantClient) -> None:
    """Payload keys are set, replaced, deleted and cleared, vectors replaced; a missing point is 404."""
    client.upsert(C, [point(1, user="a"), point(2, user="b")])
    client.set_payload(C, {"x": 1}, [point_id(1)])
    client.set_payload(C, {"x": 2}, where(match("user", "b")))
    assert payloads(client, 1, 2) == [{"n": 1, "user": "a", "x": 1}, {"n": 2, "user": "b", "x": 2}]
    client.overwrite_payload(C, {"user": "c"}, [point_id(1)])
    client.delete_payload(C, ["n"], [point_id(2)])
    assert payloads(client, 1, 2) == [{"user": "c"}, {"user": "b", "x": 2}]
    assert client.count(C, where(match("user", "a"))).count == 0
    assert client.count(C, where(match("user", "c"))).count == 1
    client.clear_payload(C, [point_id(2)])
    assert payloads(client, 2) == [{}]
    client.update_vectors(C, [models.PointVectors(id=point_id(1), vector=[0, 2, 0, 0])])
    assert client.retrieve(C, [point_id(1)], with_vectors=True)[0].vector == [0, 1, 0, 0]
    with refused(404, "Not found: No point with id"):
        client.set_payload(C, {"x": 1}, [point_id(7)])


def test_wait(server: QdrantServer, client: QdrantClient) -> None:
    """wait=true is answered "completed", wait=false "acknowledged"; operation ids grow."""
    first = client.upsert(C, [point(1)], wait=True)
    second = client.upsert(C, [point(2)], wait=False, ordering=models.WriteOrdering.STRONG)
    assert (first.status, second.status) == ("completed", "acknowledged")
    assert (first.operation_id or 0) < (second.operation_id or 0)
    assert [each.query for each in server.requests] == [
        {"wait": "true"},
        {"wait": "false", "ordering": "strong"},
    ]


# What a real server refuses ---------------------------------------------------------

PATH = f"/collections/{C}/points"
GOOD = {"id": 1, "vector": [1, 2, 3, 4], "payload": {}}
REFUSED = {
    "not JSON": ("PUT", PATH, b"{", 400, "Format error in JSON body"),
    "nothing": ("PUT", PATH, b"", 400, "Format error in JSON body"),
    "NaN": ("PUT", PATH, b'{"points": [{"id": 1, "vector": [1, 2, 3, NaN]}]}', 400, "Format error"),
    "another shape": ("PUT", PATH, {"dots": []}, 400, "Format error in JSON body"),
    "no points": ("PUT", PATH, {"points": []}, 400, "Bad request: Empty update request"),
    "no ids": ("POST", f"{PATH}/delete", {"points": []}, 400, "Empty update request"),
    "id is text": ("PUT", PATH, {"points": [GOOD | {"id": "user-1"}]}, 400, ""),
    "id is negative": ("PUT", PATH, {"points": [GOOD | {"id": -1}]}, 400, ""),
    "wrong size": ("PUT", PATH, {"points": [GOOD | {"vector": [1, 2]}]}, 400, "expected dim: 4, got 2"),
    "one of two": ("PUT", PATH, {"points": [GOOD, GOOD | {"vector": [1]}]}, 400, "expected dim: 4"),
    "wrong mode": ("PUT", PATH, {"points": [GOOD], "update_mode": "maybe"}, 400, "Format error"),
    "wrong filter": ("POST", f"{PATH}/scroll", {"filter": {"must": [{"key": "a"}, 1]}}, 400, "Format error"),
    "limit 0 of scroll": ("POST", f"{PATH}/scroll", {"limit": 0}, 422, "limit: value 0 invalid"),
    "limit 0 of query": ("POST", f"{PATH}/query", {"limit": 0}, 422, "limit: value 0 invalid"),
    "limit 0 of facet": ("POST", f"/collections/{C}/facet", {"key": "user", "limit": 0}, 422, "limit"),
    "query size": ("POST", f"{PATH}/query", {"query": [1, 2]}, 400, "Wrong input"),
    "ordering": ("PUT", f"{PATH}?ordering=no", {"points": [GOOD]}, 400, "Deserialize error in query param"),
    "wait": ("PUT", f"{PATH}?wait=yes", {"points": [GOOD]}, 400, "Deserialize error in query param"),
    "consistency": ("POST", f"{PATH}?consistency=some", {"ids": [1]}, 400, "Deserialize error in query"),
    "timeout": ("POST", f"{PATH}?timeout=0", {"ids": [1]}, 422, "timeout: value 0 invalid"),
    "size 0": ("PUT", "/collections/x", {"vectors": {"size": 0, "distance": "Dot"}}, 400, "size"),
    "name": (
        "PUT",
        "/collections/a%2Fb",
        {"vectors": {"size": 1, "distance": "Dot"}},
        400,
        "Collection name",
    ),
    "shards": ("PUT", "/collections/x", {"vectors": {}, "shard_number": 0}, 422, "shard_number"),
    "recover": (
        "PUT",
        f"/collections/{C}/snapshots/recover",
        {"location": "file:///no"},
        400,
        "does not exist",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refusals(client: QdrantClient, http: httpx.Client, server: QdrantServer, fault: str) -> None:
    """A malformed request gets the server's status and error shape, and changes nothing."""
    method, path, body, status, text = REFUSED[fault]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert text in answer.json()["status"]["error"]
    assert isinstance(answer.json()["time"], float)
    assert server.dump(C) == []
    assert [each.name for each in client.get_collections().collections] == [C]


def test_an_oversized_body_is_refused(client: QdrantClient, http: httpx.Client) -> None:
    """A request above 32 MiB is refused and the connection stays usable; so is one without a JSON type."""
    big = http.put(PATH, content=b" " * (33 * MIB), headers={"Content-Type": "application/json"})
    assert big.status_code == 400
    assert "larger than allowed (limit: 33554432 bytes)" in big.json()["status"]["error"]
    assert http.put(PATH, content=b"{}").json()["status"]["error"] == "Content type error"
    assert client.count(C).count == 0


def test_routes() -> None:
    """Literal segments are preferred to parameters, which are unquoted one by one."""
    assert find_route("POST", "/collections/aliases") == ("POST /collections/aliases", {})
    assert find_route("GET", "/collections/a%2Fb%00")[1] == {"collection": "a/b\0"}
    assert find_route("GET", "/collections/c/snapshots/..%2Fx")[1] == {"collection": "c", "snapshot": "../x"}
    assert find_route("GET", "/collections/") == ("", {})


# Compared with the local engine -----------------------------------------------------


class Pair:
    """Random operations done through the server and directly in memory, and their answers compared."""

    def __init__(self, remote: QdrantClient, seed: int) -> None:
        self.random = random.Random(seed)
        self.remote, self.memory = remote, QdrantClient(":memory:")
        for client in (remote, self.memory):
            client.create_collection(C, models.VectorParams(size=4, distance=models.Distance.COSINE))
        for key in ("user", "tags", "deep.name"):
            remote.create_payload_index(C, key, models.PayloadSchemaType.KEYWORD)
        remote.create_payload_index(C, "ts", models.PayloadSchemaType.INTEGER)

    def same(self, call: Callable[[QdrantClient], Any]) -> None:
        remote, memory = (self._outcome(call, client) for client in (self.remote, self.memory))
        assert alike(remote, memory), (remote, memory)

    def _outcome(self, call: Callable[[QdrantClient], Any], client: QdrantClient) -> Any:
        try:
            return plain(call(client))
        except (UnexpectedResponse, ValueError, KeyError):
            return "refused"

    def number(self) -> int:
        return self.random.randrange(40)

    def user(self) -> str:
        return self.random.choice("abcdef")

    def point(self) -> models.PointStruct:
        payload: dict[str, Any] = {"user": self.user(), "ts": self.random.randrange(1000)}
        if self.random.random() < 0.5:
            payload |= {"tags": self.random.choices("xyz", k=self.random.randrange(3)), "none": None}
        if self.random.random() < 0.5:
            payload["deep"] = {"name": self.user(), "list": [{"a": self.number()}]}
        vector = [self.random.uniform(-1, 1) for _ in range(4)]
        identity = self.random.choice([self.number(), point_id(self.number())])
        return models.PointStruct(id=identity, vector=vector, payload=payload)

    def points(self) -> list[models.PointStruct]:
        return list(
            {each.id: each for each in (self.point() for _ in range(self.random.randrange(5)))}.values()
        )

    def ids(self) -> list[Any]:
        numbers = {self.number() for _ in range(self.random.randrange(5))}
        return [self.random.choice([number, point_id(number)]) for number in numbers]

    def condition(self) -> models.Condition:
        key = self.random.choice(["user", "tags", "deep.name", "user"])
        return self.random.choice(
            [
                match(key, self.user()),
                match(key, *self.random.sample("abcxyz", 3)),
                models.FieldCondition(key="ts", range=models.Range(gte=self.random.randrange(1000))),
                models.HasIdCondition(has_id=self.ids()),
                models.IsEmptyCondition(is_empty=models.PayloadField(key=key)),
                models.FieldCondition(key=key, match=models.MatchExcept(**{"except": ["a", "x"]})),
            ]
        )

    def conditions(self) -> list[Any] | None:
        return (
            [self.condition() for _ in range(self.random.randrange(1, 3))]
            if self.random.random() < 0.5
            else None
        )

    def filter(self) -> models.Filter | None:
        if self.random.random() < 0.2:
            return None
        return models.Filter(must=self.conditions(), should=self.conditions(), must_not=self.conditions())

    def step(self) -> None:
        self.random.choice([self.upsert, self.upsert, self.delete, self.payload, self.batch])()
        self.random.choice([self.retrieve, self.scroll, self.ordered, self.query, self.count, self.facet])()

    def upsert(self) -> None:
        points, mode = self.points(), self.random.choice([None, *models.UpdateMode])
        condition = self.random.choice([None, self.filter()])
        self.same(lambda c: c.upsert(C, points, update_filter=condition, update_mode=mode).status)

    def delete(self) -> None:
        ids, wanted = self.ids(), where(match("user", self.user()), self.condition())
        selector = self.random.choice([ids, models.FilterSelector(filter=wanted)])
        self.same(lambda c: c.delete(C, selector).status)

    def payload(self) -> None:
        ids, payload = self.ids(), {"user": self.user(), "tags": self.user()}
        name = self.random.choice(["set_payload", "overwrite_payload"])
        self.same(lambda c: getattr(c, name)(C, payload, ids).status)

    def batch(self) -> None:
        listed = models.PointsList(points=self.points(), update_filter=self.filter())
        operations = [
            models.UpsertOperation(upsert=listed),
            models.DeleteOperation(delete=models.PointIdsList(points=self.ids())),
            models.SetPayloadOperation(
                set_payload=models.SetPayload(payload={"user": "a"}, points=self.ids())
            ),
        ]
        chosen = self.random.sample(operations, 2)
        self.same(lambda c: len(c.batch_update_points(C, chosen)))

    def retrieve(self) -> None:
        ids = self.ids()
        self.same(lambda c: c.retrieve(C, ids, with_vectors=True))

    def scroll(self) -> None:
        wanted, limit = self.filter(), self.random.randrange(1, 30)
        offset = self.random.choice([None, self.number(), point_id(self.number())])
        self.same(lambda c: c.scroll(C, wanted, limit=limit, offset=offset, with_vectors=True))

    def ordered(self) -> None:
        wanted, limit = self.filter(), self.random.randrange(1, 30)
        start, direction = self.random.choice([None, 500]), self.random.choice(list(models.Direction))
        order = models.OrderBy(key="ts", direction=direction, start_from=start)
        self.same(lambda c: c.scroll(C, wanted, limit=limit, order_by=order))

    def query(self) -> None:
        wanted, vector = self.filter(), [self.random.uniform(-1, 1) for _ in range(4)]
        options: dict[str, Any] = {
            "limit": self.random.randrange(1, 20),
            "offset": self.random.choice([None, 2]),
        }
        options["score_threshold"] = self.random.choice([None, 0.3])
        self.same(
            lambda c: c.query_points(C, vector, query_filter=wanted, with_vectors=True, **options).points
        )

    def count(self) -> None:
        wanted = self.filter()
        self.same(lambda c: c.count(C, wanted))

    def facet(self) -> None:
        wanted = self.filter()
        self.same(lambda c: c.facet(C, "user", wanted, limit=4))


def alike(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of floats."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-5
    return bool(one == other)


def plain(value: Any) -> Any:
    """An answer as lists, dicts and scalars."""
    if hasattr(value, "model_dump"):
        return plain({name: part for name, part in value.model_dump().items() if name != "version"})
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value


@pytest.mark.parametrize("seed", range(8))
def test_answers_equal_those_of_the_local_engine(server: QdrantServer, seed: int) -> None:
    """Random operations, indexed filters among them, have the same outcome over HTTP as in memory."""
    client = connect(server)
    pair = Pair(client, seed)
    for _ in range(120):
        pair.step()
    everything = [plain(each) for each in pair.memory.scroll(C, limit=1000, with_vectors=True)[0]]
    assert [(each["id"], each["payload"]) for each in everything] == [
        (each["id"], each["payload"])
        for each in sorted(server.dump(C), key=lambda e: (str(type(e["id"])), e["id"]))
    ]
    client.close()
    pair.memory.close()


# Asynchronous clients -----------------------------------------------------------------


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def remote(server: QdrantServer) -> AsyncIterator[AsyncQdrantClient]:
    limits = httpx.Limits(max_connections=8)
    client = AsyncQdrantClient(
        url=server.url, check_compatibility=False, limits=limits, timeout=5, verify=NO_TLS
    )
    await client.create_collection(C, models.VectorParams(size=4, distance=models.Distance.COSINE))
    await client.create_payload_index(C, "ts", models.PayloadSchemaType.INTEGER)
    server.clear()
    yield client
    await client.close()


@pytest.mark.anyio
async def test_async_client(remote: AsyncQdrantClient) -> None:
    """AsyncQdrantClient works against it under asyncio and trio."""
    await remote.upsert(C, [point(n, ts=n) for n in range(5)], update_filter=not_newer(4))
    order = models.OrderBy(key="ts", direction=models.Direction.DESC)
    found, _ = await remote.scroll(C, order_by=order, limit=2)
    assert [each.id for each in found] == [point_id(4), point_id(3)]
    assert (await remote.query_points(C, [4, 1, -0.5, 0.25], limit=1)).points[0].id == point_id(4)
    await remote.delete(C, [point_id(0)])
    assert (await remote.count(C)).count == 4
    snapshot = await remote.create_snapshot(C)
    assert snapshot is not None
    assert [each.name for each in await remote.list_snapshots(C)] == [snapshot.name]


@pytest.mark.anyio
async def test_concurrent_reads_share_a_pool(server: QdrantServer, remote: AsyncQdrantClient) -> None:
    """Delayed requests wait side by side, in as many sockets as the pool has."""
    await remote.upsert(C, [point(1)])
    server.clear()
    server.on(delay(0.02), when=Request.is_read)
    async with anyio.create_task_group() as tasks:
        for _ in range(32):
            tasks.start_soon(remote.retrieve, C, [point_id(1)])
    assert server.counts["POST /collections/{collection}/points"] == 32
    assert 1 < server.accepted <= 8


@pytest.mark.anyio
async def test_a_cancelled_request(server: QdrantServer, remote: AsyncQdrantClient) -> None:
    """A client may give up on a request that hangs; the server goes on."""
    server.on(hang(), times=1)
    with anyio.move_on_after(0.05) as scope:
        await remote.count(C)
    assert scope.cancelled_caught
    assert (await remote.count(C)).count == 0


# Recording ----------------------------------------------------------------------------


def test_sockets_and_requests_are_counted(server: QdrantServer, client: QdrantClient) -> None:
    """Requests are kept in order with all they held, sockets counted, and both forgotten by clear()."""
    client.upsert(C, [point(1)])
    client.scroll(C, limit=3)
    assert server.accepted == 0  # the socket that made the collection is still in use
    assert [each.method for each in server.requests] == ["PUT", "POST"]
    first, second = server.requests
    assert (first.route, first.path, first.query) == (POINTS, PATH, {"wait": "true"})
    assert first.json["points"][0]["id"] == point_id(1)
    assert first.headers["content-type"] == "application/json"
    assert (first.ordinal, second.ordinal) == (0, 1)
    assert first.is_write()
    assert not first.is_read()
    assert second.is_read()
    assert server.counts == {POINTS: 1, SCROLL: 1}
    server.clear()
    assert (server.requests, server.counts) == ([], {})
    client.count(C)
    assert server.requests[0].ordinal == 0
    assert server.open_connections == 1


def test_qdrant_client_reuses_no_connection_on_loopback_by_default(server: QdrantServer) -> None:
    """Without limits= qdrant-client opens a socket for each request to 127.0.0.1, whatever pool_size says."""
    client = QdrantClient(url=server.url, check_compatibility=False, pool_size=2)
    for _ in range(3):
        client.get_collections()
    client.close()
    assert server.accepted == 3


def test_wipe(server: QdrantServer, client: QdrantClient) -> None:
    """wipe() deletes everything at once."""
    client.upsert(C, [point(1)])
    client.create_snapshot(C)
    server.wipe()
    assert client.get_collections().collections == []
    assert server.snapshots(C) == []


# Misbehaviour -------------------------------------------------------------------------


def test_api_key(server: QdrantServer, http: httpx.Client) -> None:
    """Without the key 401 in plain text, with a wrong one too (or what is set); the root needs none."""
    server.api_key = "secret"
    answer = http.get("/collections")
    assert (answer.status_code, answer.text[:23]) == (401, "Must provide an API key")
    assert http.get("/collections", headers={"api-key": "wrong"}).status_code == 401
    server.wrong_key_status = 403
    assert http.get("/collections", headers={"api-key": "wrong"}).text == "Invalid API key or JWT"
    assert http.get("/collections", headers={"api-key": "wrong"}).status_code == 403
    assert http.get("/collections", headers={"api-key": "secret"}).status_code == 200
    assert http.get("/collections", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert http.get("/").status_code == http.get("/healthz").status_code == 200


def test_status_codes(server: QdrantServer, client: QdrantClient) -> None:
    """Any status with any body and headers, for as many requests as told; not applied unless told."""
    server.on(reply(503), method="PUT", times=2)
    for _ in range(2):
        with refused(503, "Service Unavailable"):
            client.upsert(C, [point(1)])
    client.upsert(C, [point(1)])
    server.on(reply(418, {"tea": True}, {"X-Pot": "1"}), route=SCROLL, skip=1, times=1)
    client.scroll(C)
    with refused(418, '{"tea": true}'):
        client.scroll(C)
    client.scroll(C)
    server.on(reply(500, apply=True), times=1)
    with refused(500):
        client.upsert(C, [point(2)])
    assert len(server.dump(C)) == 2


def test_rate_limit(server: QdrantServer, client: QdrantClient) -> None:
    """429 carries Retry-After, or not."""
    with server.on(rate_limited(7)), pytest.raises(ResourceExhaustedResponse) as caught:
        client.count(C)
    assert caught.value.retry_after_s == 7
    with server.on(rate_limited(None)), refused(429, "Rate limiting exceeded"):
        client.count(C)
    assert client.count(C).count == 0


BROKEN = {  # the action, and whether the request is applied
    "drop": (drop(), False),
    "drop by reset": (drop(reset=True), False),
    "lose the reply": (lose_reply(), True),
    "lose it by reset": (lose_reply(reset=True), True),
    "reset half-way": (reset(), True),
    "reset after the headers": (reset(0), True),
    "truncate half-way": (truncate(), True),
    "truncate after the headers": (truncate(0), True),
    "hang": (hang(0.02), False),
    "hang once applied": (hang(0.02, apply="before"), True),
    "HTML": (not_json(), False),
    "HTML once applied": (not_json(apply=True), True),
    "another shape": (other_shape(), False),
    "another result": (other_shape({"result": {"points": 1}, "status": "ok", "time": 0}), False),
    "short": (shorten(), True),
    "corrupt": (corrupt(), True),
    "wrong type": (edit_result(status=5), True),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_replies(server: QdrantServer, client: QdrantClient, fault: str) -> None:
    """However a reply is broken, the client cannot tell, and the request was applied or not, as told."""
    action, applied = BROKEN[fault]
    rule = server.on(action, method="PUT", times=1)
    # qdrant-client raises JSONDecodeError (a ValueError), and AssertionError where "result" is absent
    with pytest.raises((ResponseHandlingException, ValueError, AssertionError)):
        client.upsert(C, [point(1)])
    assert (len(server.dump(C)), rule.hits) == (int(applied), 1)
    client.upsert(C, [point(1)])
    assert payloads(client, 1) == [{"n": 1}]


def test_what_the_client_sees(server: QdrantServer, http: httpx.Client) -> None:
    """A truncated body, a reset and a lost reply are different errors."""
    for action, error in (
        (truncate(), httpx.RemoteProtocolError),
        (reset(), httpx.ReadError),
        (lose_reply(), httpx.RemoteProtocolError),
        (lose_reply(reset=True), httpx.ReadError),
    ):
        with server.on(action, times=1), pytest.raises(error):
            http.get("/collections")


def test_duplicate(server: QdrantServer, client: QdrantClient) -> None:
    """A duplicated request is applied twice."""
    server.on(duplicate(), times=1)
    first = client.upsert(C, [point(1)])
    assert client.upsert(C, [point(1)]).operation_id == (first.operation_id or 0) + 1
    assert len(server.requests) == 2


def test_hang_until_released(server: QdrantServer) -> None:
    """A hanging request goes on when released, and others are served meanwhile."""
    slow, quick = connect(server), connect(server)
    create(quick)
    server.on(hang(apply="after"), when=Request.is_write, times=1)
    thread = threading.Thread(target=slow.upsert, args=(C, [point(1)]))
    thread.start()
    while server.counts[POINTS] == 0:
        time.sleep(0.001)
    assert quick.count(C).count == 0
    server.release()
    thread.join()
    assert quick.count(C).count == 1
    slow.close()
    quick.close()


def test_a_late_write(server: QdrantServer, client: QdrantClient) -> None:
    """A write whose client has given up can still be applied later, when it is released."""
    server.on(hang(apply="after"), method="PUT", times=1)
    impatient = connect(server, timeout=None)
    impatient.http.client._client.timeout = httpx.Timeout(0.05)  # qdrant-client counts in whole seconds
    with pytest.raises(ResponseHandlingException):
        impatient.upsert(C, [point(1, v="late")])
    impatient.close()
    client.upsert(C, [point(1, v="new")])
    server.release()
    assert payloads(client, 1) == [{"n": 1, "v": "late"}]


def test_down_and_up(server: QdrantServer, client: QdrantClient) -> None:
    """Down it refuses connections and resets the open ones; up again it has the same port and data."""
    client.upsert(C, [point(1)])
    with server.unreachable():
        for _ in range(2):
            with pytest.raises(ResponseHandlingException):
                client.count(C)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
        server.down()  # twice does no harm
    server.up()
    assert client.count(C).count == 1
    server.on(go_down(apply=True), method="PUT", times=1)
    with pytest.raises(ResponseHandlingException):
        client.upsert(C, [point(2)])
    with pytest.raises(ResponseHandlingException, match="refused"):
        client.count(C)
    server.calm()
    assert client.count(C).count == 2


def test_idle_connections_can_be_ended(server: QdrantServer, client: QdrantClient) -> None:
    """After disconnect() the pool of a client is stale; it opens a new socket."""
    client.count(C)
    server.clear()
    server.disconnect()
    assert client.count(C).count == 0
    assert server.accepted == 1


def test_edited_replies(server: QdrantServer, client: QdrantClient) -> None:
    """A reply can be changed in any way, and an action can be any coroutine function."""

    async def shout(exchange: Exchange) -> Response:
        response = await exchange.proceed()
        assert isinstance(response.body, bytes)
        return Response(response.status, response.body.replace(b'"count":0', b'"count":77'))

    with server.on(shout):
        assert client.count(C).count == 77
    with server.on(edit(lambda body: body["result"].update(count=5))):
        assert client.count(C).count == 5


def test_collection_status_and_indexed_vectors(server: QdrantServer, client: QdrantClient) -> None:
    """The collection can be shown yellow and unindexed."""
    client.upsert(C, [point(1)])
    server.collection_status, server.indexed_vectors = "yellow", 0
    info = client.get_collection(C)
    assert (info.status, info.points_count, info.indexed_vectors_count) == ("yellow", 1, 0)


def test_rules_nest(server: QdrantServer, client: QdrantClient) -> None:
    """Rules work together: delayed, applied twice, then the reply lost."""
    server.on(delay(0.02))
    server.on(lose_reply(), method="PUT")
    server.on(duplicate(), method="PUT")
    started = time.perf_counter()
    with pytest.raises(ResponseHandlingException):
        client.upsert(C, [point(1)])
    assert time.perf_counter() - started >= 0.02
    server.calm()
    assert server.rules == []
    assert client.upsert(C, [point(2)]).operation_id == 5


def test_probability_is_seeded() -> None:
    """The same seed gives the same faults."""

    def run(seed: int) -> list[bool]:
        with QdrantServer(seed=seed) as server, httpx.Client(base_url=server.url, verify=NO_TLS) as http:
            server.on(reply(503), probability=0.3)
            return [http.get("/collections").status_code == 200 for _ in range(60)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert 5 < run(1).count(False) < 35


def test_a_retrying_client_survives_any_fault(server: QdrantServer, client: QdrantClient) -> None:
    """With 10 % faults of every kind, retried conditional writes leave the newest of each point."""
    server.on(any_fault(), when=lambda request: request.is_write() or request.is_read(), probability=0.1)
    chance, newest = random.Random(3), dict.fromkeys(range(20), -1)
    for _ in range(400):
        number, moment = chance.randrange(20), chance.randrange(10_000)
        for _attempt in range(10):
            try:
                client.upsert(C, [point(number, ts=moment)], update_filter=not_newer(moment))
                break
            except (ResponseHandlingException, UnexpectedResponse, ResourceExhaustedResponse):
                continue
        newest[number] = max(newest[number], moment)
    server.calm()
    assert {each["payload"]["n"]: each["payload"]["ts"] for each in server.dump(C)} == newest
    assert len(server.requests) > 420


def test_what_is_not_http(server: QdrantServer) -> None:
    """TLS and other noise get 400 at once, and the server goes on."""
    context = ssl.create_default_context()
    with socket.create_connection(("127.0.0.1", server.port), 1) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw, server_hostname="localhost")
    for noise in (b"\x00\x01", b"hello world\r\n\r\n", b"GET / HTTP/1.1\r\nbad\r\n\r\n", b"A" * 100_000):
        with socket.create_connection(("127.0.0.1", server.port), 1) as raw, raw.makefile("rb") as answer:
            raw.sendall(noise)
            assert answer.read().startswith(b"HTTP/1.1 400")
    with socket.create_connection(("127.0.0.1", server.port), 1) as raw:
        raw.sendall(b"PUT / HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc")  # and no more
    assert httpx.get(server.url).status_code == 200


def test_request_bodies_may_be_chunked(
    client: QdrantClient, http: httpx.Client, server: QdrantServer
) -> None:
    """A chunked request is read like any other, and a reply can be chunked or compressed."""
    body = json.dumps({"points": [GOOD]}).encode()
    headers = {"Content-Type": "application/json"}
    answer = http.put(PATH, content=iter([body[:10], body[10:]]), headers=headers)
    assert answer.json()["status"] == "ok"
    assert client.count(C).count == 1
    with server.on(chunked()):
        answer = http.get("/collections")
    assert (answer.headers.get("content-length"), answer.json()["status"]) == (None, "ok")
    server.compress = True
    answer = http.get("/collections")
    assert (answer.headers["content-encoding"], answer.json()["status"]) == ("gzip", "ok")


def test_http_1_0_style_close(server: QdrantServer) -> None:
    """Connection: close is obeyed."""
    with httpx.Client(base_url=server.url, headers={"Connection": "close"}, verify=NO_TLS) as http:
        assert http.get("/").headers["connection"] == "close"
        assert http.get("/").status_code == 200
    assert server.accepted == 2


# Snapshots ------------------------------------------------------------------------------

SNAPSHOTS = f"/collections/{C}/snapshots"


def upload(http: httpx.Client, path: str, content: Any, **query: str) -> httpx.Response:
    return http.post(f"{path}/upload", params=query, files={"snapshot": ("a.snapshot", content)})


def test_snapshot_round_trip(server: QdrantServer, client: QdrantClient, http: httpx.Client) -> None:
    """Created, listed, downloaded, its size and SHA-256 true, uploaded again: the collection is as it was."""
    client.upsert(C, [point(n, user="a", ts=n, axes={"x": n / 7}) for n in range(50)])
    client.upsert(C, [models.PointStruct(id=7, vector=[0, 0, 0, 0], payload={"none": None})])
    client.delete(C, [point_id(3)])
    before, info = server.dump(C), client.get_collection(C)
    made = client.create_snapshot(C)
    assert made is not None
    assert made.name.startswith("states-")
    assert made.name.endswith(".snapshot")
    assert client.list_snapshots(C) == [made]
    content = http.get(f"{SNAPSHOTS}/{made.name}").content
    assert (len(content), hashlib.sha256(content).hexdigest()) == (made.size, made.checksum)
    client.upsert(C, [point(99)])
    client.delete(C, [point_id(1)])
    assert (
        upload(http, SNAPSHOTS, content, checksum=made.checksum, priority="snapshot").json()["result"] is True
    )
    assert server.dump(C) == before
    assert upload(http, "/collections/copy/snapshots", content).json()["result"] is True
    assert server.dump("copy") == before
    assert client.get_collection("copy").config == info.config
    assert client.get_collection("copy").payload_schema == info.payload_schema
    assert client.count("copy", where(match("user", "a"))).count == 49
    assert client.delete_snapshot(C, made.name)
    assert client.list_snapshots(C) == []
    for request in (
        partial(http.get, f"{SNAPSHOTS}/{made.name}"),
        partial(http.delete, f"{SNAPSHOTS}/{made.name}"),
    ):
        answer = request()
        assert answer.status_code == 404
        assert "Not found: Snapshot" in answer.json()["status"]["error"]


def test_snapshot_recover(server: QdrantServer, client: QdrantClient) -> None:
    """PUT recover takes a file URL or the URL of the download, with its checksum."""
    client.upsert(C, [point(1)])
    made = client.create_snapshot(C)
    assert made is not None
    for number, location in enumerate(
        (f"file:///qdrant/snapshots/{C}/{made.name}", f"{server.url}{SNAPSHOTS}/{made.name}")
    ):
        assert client.recover_snapshot(f"copy{number}", location, checksum=made.checksum)
        assert server.dump(f"copy{number}") == server.dump(C)
    with refused(400, "checksum mismatch"):
        client.recover_snapshot(C, location, checksum="0" * 64)


def test_snapshot_refusals(server: QdrantServer, client: QdrantClient, http: httpx.Client) -> None:
    """A wrong checksum, another vector size and a file that is no snapshot are refused and change nothing."""
    client.upsert(C, [point(1)])
    client.create_snapshot(C)
    content = http.get(f"{SNAPSHOTS}/{server.snapshots(C)[0]}").content
    client.upsert(C, [point(2)])
    client.create_collection("other", models.VectorParams(size=5, distance=models.Distance.COSINE))
    cases = [
        (upload(http, SNAPSHOTS, content, checksum="0" * 64), 400, "Checksum mismatch"),
        (upload(http, SNAPSHOTS, content, checksum="abc"), 422, "checksum"),
        (upload(http, SNAPSHOTS, content, priority="first"), 400, "unknown variant"),
        (upload(http, SNAPSHOTS, b""), 500, "Service internal error"),
        (upload(http, SNAPSHOTS, content[:600]), 500, "Service internal error"),
        (upload(http, SNAPSHOTS, b"not a tar" * 1000), 500, "Service internal error"),
        (upload(http, "/collections/other/snapshots", content), 400, "not compatible"),
        (http.post(f"{SNAPSHOTS}/upload", content=b"--x--"), 400, "Multipart error"),
        (http.post(f"{SNAPSHOTS}/upload", files={"file": b"a"}), 400, "Multipart error"),
    ]
    for answer, status, text in cases:
        assert (answer.status_code, text in answer.json()["status"]["error"]) == (status, True)
    assert len(server.dump(C)) == 2
    assert client.count("other").count == 0


def test_two_snapshots_in_one_second(server: QdrantServer, client: QdrantClient) -> None:
    """As on a real server the name has seconds, so that the second of two replaces the first."""
    names = [made.name for made in (client.create_snapshot(C) for _ in range(20)) if made]
    assert server.snapshots(C) == list(dict.fromkeys(names))
    assert len(set(names)) < 20
    assert http_status(server, "POST", f"{SNAPSHOTS}?wait=false") == 202


def http_status(server: QdrantServer, method: str, path: str) -> int:
    return httpx.request(method, server.url + path).status_code


def test_a_large_snapshot_streams_both_ways(
    server: QdrantServer, client: QdrantClient, http: httpx.Client
) -> None:
    """256 MiB are generated while they are sent: neither side holds more than a few of them."""
    client.upsert(C, [point(1)])
    server.snapshot_padding = 256 * MIB
    made = client.create_snapshot(C)
    assert made is not None
    assert made.size > 256 * MIB
    digest = hashlib.sha256()
    tracemalloc.start()
    with http.stream("GET", f"{SNAPSHOTS}/{made.name}") as answer:
        assert int(answer.headers["content-length"]) == made.size
        for piece in answer.iter_bytes():
            digest.update(piece)
    assert digest.hexdigest() == made.checksum
    body = PaddedFile(64 * MIB)
    assert upload(http, SNAPSHOTS, body).status_code == 500  # not a tar, but read to its end
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * MIB
    assert server.requests[-1].size > 64 * MIB


class PaddedFile:
    """A file of zeros that is not in memory."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0

    def read(self, limit: int = -1) -> bytes:
        piece = bytes(min(self.size - self.at, MIB if limit < 0 else limit))
        self.at += len(piece)
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\0b", "/etc/passwd", "..", ""])
def test_hostile_snapshot_names(
    server: QdrantServer, client: QdrantClient, http: httpx.Client, name: str
) -> None:
    """A snapshot can have any name, under which it can also be downloaded when the name is quoted."""
    server.snapshot_name = name or None
    with server.on(edit_result(name=name)):
        assert client.create_snapshot(C).name == name  # type: ignore[union-attr]
    if name.strip("."):
        quoted = httpx.URL(server.url).copy_with(raw_path=f"{SNAPSHOTS}/{quote(name)}".encode())
        assert http.get(quoted).status_code == 200


def quote(name: str) -> str:
    return "".join(f"%{byte:02X}" for byte in name.encode())


def test_snapshot_faults(server: QdrantServer, client: QdrantClient, http: httpx.Client) -> None:
    """No name, wrong checksum, short, empty, cut and corrupted downloads, a deletion that fails."""
    create_route, download = "POST /collections/{collection}/snapshots", "/snapshots/states-"
    with (
        server.on(edit_result(remove=("name",)), route=create_route),
        pytest.raises(ResponseHandlingException),
    ):
        client.create_snapshot(C)
    server.snapshot_checksum = "0" * 64
    assert client.create_snapshot(C).checksum == "0" * 64  # type: ignore[union-attr]
    server.snapshot_checksum = None
    made = client.create_snapshot(C)
    assert made is not None
    path = f"{SNAPSHOTS}/{made.name}"
    good = http.get(path).content
    for size in (0, 100):
        with server.on(shorten(size), path=download):
            assert http.get(path).content == good[:size]
    for action in (truncate(100), truncate(0), reset(100), reset(0), lose_reply(), truncate(made.size - 1)):
        with server.on(action, path=download), pytest.raises(httpx.TransportError):
            http.get(path)
    with server.on(corrupt(700), path=download):
        bad = http.get(path).content
    assert [n for n, (a, b) in enumerate(zip(good, bad, strict=True)) if a != b] == [700]
    with server.on(chunked(), path=download), server.on(shorten(100), path=download):
        answer = http.get(path)
    assert ("content-length" in answer.headers, answer.content) == (False, good[:100])
    with server.on(reply(500), method="DELETE", path="/snapshots/"), refused(500):
        client.delete_snapshot(C, made.name)
    assert made.name in server.snapshots(C)
    server.compress = True
    with http.stream("GET", path) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert b"".join(answer.iter_bytes()) == good


# The server itself ------------------------------------------------------------------------


def test_it_leaves_nothing_behind() -> None:
    """After the block no thread and no socket is left, even with clients connected and requests hanging."""

    def descriptors() -> int:
        known = Path("/proc/self/fd")
        return len(list(known.iterdir())) if known.exists() else 0

    threads, before = threading.active_count(), descriptors()
    with QdrantServer() as server:
        server.on(hang(60), when=lambda request: request.path == "/healthz")
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        idle[0].sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        idle[1].sendall(b"PUT /collections/x HTTP/1.1\r\nContent-Length: 10\r\n\r\n")
        while not server.requests:
            time.sleep(0.001)
        server.snapshot_padding = 0
        started = time.perf_counter()
    assert time.perf_counter() - started < 1
    assert threading.active_count() == threads
    for connection in idle:
        connection.close()
    assert descriptors() == before
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_a_body_in_drips(server: QdrantServer) -> None:
    """A body can be sent byte by byte, and is whole in the end."""
    server.on(drip(0.001))
    with httpx.stream("GET", server.url) as answer:
        pieces = list(answer.iter_raw())
    assert len(pieces) > 1
    assert json.loads(b"".join(pieces))["version"] == server.version


def test_a_given_port_and_many_servers() -> None:
    """Servers are independent; a port can be named and used again at once."""
    with QdrantServer() as first, QdrantServer() as second:
        assert first.port != second.port
        port = first.port
        httpx.get(first.url)
    with QdrantServer(port) as again:
        assert (again.port, httpx.get(again.url).status_code) == (port, 200)


def test_in_its_own_process() -> None:
    """For measurements it can run in another process, which ends with the block."""
    with in_own_process("--delay=0.05") as url:
        started = time.perf_counter()
        assert httpx.get(f"{url}/livez").status_code == 200
        assert time.perf_counter() - started >= 0.05
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_its_own_failures_are_not_hidden() -> None:
    """A bug of the server or of an action loses the connection, and is an error at the end of the block."""

    async def broken(_: Exchange) -> Response:
        raise ZeroDivisionError

    server = QdrantServer().start()
    server.on(broken, times=1)
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url)
    assert httpx.get(server.url).status_code == 200
    with pytest.raises(AssertionError, match="the test server itself failed"):
        server.__exit__(None, None, None)

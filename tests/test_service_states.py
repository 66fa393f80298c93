"""States over HTTP: requests go through a socket, and what became of them is read from the store itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import quote, urlsplit

import anyio
import anyio.lowlevel
import pytest
from conformance import needs

import attuned_store
from attuned_store import (
    AsyncQdrantStore,
    BreakerPolicy,
    ConflictError,
    MemoryStore,
    QdrantStore,
    RetryPolicy,
    StateSnapshot,
    StateStore,
    ValidationError,
    open_store,
    service_app,
)

httpx = pytest.importorskip("httpx", reason="needs httpx, which comes with qdrant-client")
pytest.importorskip("starlette", reason="needs starlette")
uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.once

TIMEOUT = 60.0  # seconds: for a machine that is busy
NOON = 1_768_651_200_000  # 2026-01-17T12:00Z
JSON = {"Content-Type": "application/json"}
OPERATIONS = {
    (operation.method, operation.path): operation
    for operation in (*attuned_store.STATES, *attuned_store.BACKUPS)
}
# Ids that a path, a query or a file name would take for something else, and the longest ones.
IDS = [
    *(
        "ada",
        "a/b",
        "/",
        "//",
        "a/",
        "/a",
        "history",
        "a/history",
        ".",
        "..",
        "../..",
        "...",
        "%",
        "%2F",
        "%00",
    ),
    *(
        "a b",
        "+",
        "a+b",
        "?",
        "a?b=c",
        "#",
        ";",
        "a;b",
        "&",
        "=",
        "\\",
        "'",
        '"',
        "<script>",
        "{user_id}",
        "*",
    ),
    *(
        "ü",
        "日本",
        "😀",
        "e\u0301",
        "\u202e",
        "\ufeff",
        "\u00a0",
        "x" * 256,
        "é" * 128,
        "api/states/ada",
        "~",
        "@:",
    ),
]


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


class Service:
    """An application under uvicorn on a socket of this machine."""

    def __init__(self, app: Any, **options: Any) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none", **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))
        self._threads = threading.local()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        self._listener.close()

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **more: str
    ) -> Answer:
        """Send a request as it stands, and compare the answer with what the table of operations says."""
        told = dict(headers or {}) | {name.replace("_", "-"): value for name, value in more.items()}
        if body is not None and not isinstance(body, bytes | list):
            body, told = json.dumps(body).encode(), JSON | told
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        with contextlib.closing(connection):
            with contextlib.suppress(
                BrokenPipeError, ConnectionResetError
            ):  # it may answer before all is sent
                if isinstance(body, list):
                    told |= {"Transfer-Encoding": "chunked"}
                    connection.request(method, path, iter(body), told, encode_chunked=True)
                else:
                    connection.request(method, path, body, told)
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read().decode())
        check_answer(method, path, answer)
        return answer


SCHEMAS: dict[str, Any] = attuned_store.openapi_document("")["components"]["schemas"]


def matches_schema(content: Any, name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}
    jsonschema.validate(content, schema, jsonschema.Draft202012Validator)


def operation_of(method: str, path: str) -> Any:
    """The row of the table that a path belongs to, of a service that is not mounted elsewhere."""
    path = path.partition("?")[0]
    for (known, template), operation in OPERATIONS.items():
        pattern = re.escape(template).replace(r"\{user_id\}", "[^/]+")
        if known == ("GET" if method == "HEAD" else method) and re.fullmatch(pattern, path):
            return operation
    return None


def check_answer(method: str, path: str, answer: Answer) -> None:
    """An answer is among those that the description of the service tells, and says nothing it should not."""
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", answer.text) is None
    kind = answer.headers.get("content-type", "")
    if kind == "application/problem+json" and method != "HEAD":
        matches_schema(answer.json(), "Problem")
        assert answer.json()["status"] == answer.status
    operation = operation_of(method, path)
    if operation is None or method == "HEAD":
        return
    assert answer.status in {*operation.answers, *operation.problems(), 500}, (method, path, answer)
    if kind == "application/json":
        matches_schema(answer.json(), operation.answers[answer.status])


def escaped(user_id: str) -> str:
    """An id with every byte percent-encoded."""
    return "".join(f"%{byte:02X}" for byte in user_id.encode())


def place_of(user_id: str, rest: str = "") -> str:
    return f"/api/states/{escaped(user_id)}{rest}"


def says(answer: Any) -> Callable[[object], Any]:
    return lambda _: answer


def bearer(request: Any) -> bool | str | None:
    """Who knows the word may do all; others are who they say they are."""
    name = request.headers.get("authorization", "").removeprefix("Bearer ")
    return True if name == "root" else name


class Served(NamedTuple):
    """A service, and the store that it serves, or another one on the same place."""

    service: Service
    store: StateStore


@pytest.fixture(params=["memory", pytest.param("async edge", marks=needs("qdrant_edge"))], scope="module")
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service that answers whatever it is asked, and the store, or another one on the same place."""
    path = tmp_path_factory.mktemp("service")
    match request.param:
        case "memory":
            with MemoryStore() as witness, Service(service_app(witness, authorize=says(True))) as service:
                yield Served(service, witness)
        case _:
            with open_store(path / "store", engine="edge") as witness:
                store = AsyncQdrantStore(path=path / "store", engine="edge")
                with Service(service_app(store, authorize=says(True))) as service:
                    yield Served(service, witness)
                anyio.run(store.aclose)


@pytest.fixture
def served(opened: Served) -> Served:
    """A service that answers whatever it is asked, over a store that is empty."""
    for user_id in list(opened.store):
        opened.store.delete(user_id)
    return opened


@pytest.fixture
def store() -> MemoryStore:
    """A store with a state of each of two users."""
    store = MemoryStore()
    store.upsert_many([StateSnapshot("ada", {"warmth": 0.25}, NOON), StateSnapshot("bob", {}, NOON)])
    return store


# ------------------------------------------------------------------------------
# Reading and writing
# ------------------------------------------------------------------------------


def test_a_state_is_written_read_merged_and_removed(served: Served) -> None:
    """Each method does what it does in Python, and answers in the shape of to_dict."""
    service, store = served
    assert service.ask("GET", "/api/states/ada").status == 404
    made = service.ask("PUT", "/api/states/ada", {"axes": {"warmth": 0.25}, "updated_at_unix_ms": NOON})
    assert (made.status, made.json()) == (201, store["ada"].to_dict())
    assert store["ada"] == StateSnapshot("ada", {"warmth": 0.25}, NOON)

    whole = StateSnapshot("ada", {"warmth": 0.1, "formality": 1.0}, NOON + 5, "inferred", 0.5, 2)
    written = service.ask("PUT", "/api/states/ada", whole.to_dict())
    assert (written.status, store["ada"]) == (200, whole)
    read = service.ask("GET", "/api/states/ada")
    assert (read.status, StateSnapshot.from_dict(read.json())) == (200, whole)
    assert read.headers["etag"] == written.headers["etag"] != made.headers["etag"]
    assert read.headers["cache-control"] == "no-store"

    merged = service.ask("PATCH", "/api/states/ada", {"axes": {"formality": None, "warmth": 0.7}})
    assert (merged.status, merged.json()) == (200, store["ada"].to_dict())
    assert (dict(store["ada"].axes), store["ada"].confidence) == ({"warmth": 0.7}, 0.5)
    fields = {"source": "mixed", "updated_at_unix_ms": "9000-01-01T00:00:00+00:00"}
    assert service.ask("PATCH", "/api/states/bob", fields).status == 201
    assert (store["bob"].source, store["bob"].updated_at.year) == ("mixed", 9000)

    history = service.ask("GET", "/api/states/ada/history").json()["states"]
    assert history == [state.to_dict() for state in store.get_history("ada")]
    assert len(history) == 3
    assert (service.ask("DELETE", "/api/states/ada").status, "ada" in store) == (204, False)
    assert service.ask("DELETE", "/api/states/ada").status == 404
    assert service.ask("GET", "/api/states/ada/history").status == 404
    assert list(store) == ["bob"]


def test_an_older_state_goes_into_the_history(served: Served) -> None:
    """The newest time wins over HTTP too: an older state is written, and is not the latest."""
    service, store = served
    service.ask("PUT", "/api/states/ada", {"axes": {"warmth": 1}, "updated_at_unix_ms": NOON})
    late = service.ask("PUT", "/api/states/ada", {"axes": {}, "updated_at_unix_ms": NOON - 1})
    assert late.status == 200
    assert [state.updated_at_unix_ms for state in store.get_history("ada")] == [NOON, NOON - 1]
    read = service.ask("GET", "/api/states/ada")
    assert (read.json()["axes"], read.headers["etag"] == late.headers["etag"]) == ({"warmth": 1.0}, False)
    assert service.ask("PUT", "/api/states/ada", {"axes": {}}, If_Match=late.headers["etag"]).status == 412


def test_every_valid_id_can_be_asked_for(served: Served) -> None:
    """Whatever an id holds, its path leads to it and to no other."""
    service, store = served
    for number, user_id in enumerate(IDS):
        body = {"axes": {"warmth": number / 100}, "updated_at_unix_ms": NOON + number}
        assert service.ask("PUT", place_of(user_id), body).status == 201, user_id
    assert sorted(store) == sorted(IDS)
    for number, user_id in enumerate(IDS):
        assert store[user_id].axes == {"warmth": number / 100}
        for written in {escaped(user_id), quote(user_id, safe=""), escaped(user_id).lower()}:
            assert service.ask("GET", f"/api/states/{written}").json()["user_id"] == user_id
            history = service.ask("GET", f"/api/states/{written}/history").json()["states"]
            assert [state["user_id"] for state in history] == [user_id]
        found = service.ask("POST", "/api/search", {"query": {"warmth": 0.0}, "user_id": user_id}).json()
        assert [match["state"]["user_id"] for match in found["matches"]] == [user_id]
        matched = service.ask("GET", f"/api/states?limit=1000&after={escaped(user_id)}").json()["states"]
        assert [state["user_id"] for state in matched] == sorted(each for each in IDS if each > user_id)
    for left, user_id in enumerate(IDS, 1):
        assert service.ask("DELETE", place_of(user_id)).status == 204, user_id
        assert len(store) == len(IDS) - left


def test_paths_that_name_nobody(served: Served) -> None:
    """What is no id is 400, what is no path 404, and neither reads nor writes anything."""
    service, store = served
    store.upsert_latest(StateSnapshot("ada", {}, NOON))
    bad = ["%", "%2", "%zz", "a%", "%FF", "%C3", "%ED%A0%80", "%00", "%0A", "%7F", "%C2%85", "x" * 257]
    for segment in [*bad, escaped("é" * 129)]:
        for method, body in (("GET", None), ("PUT", {"axes": {}}), ("DELETE", None), ("PATCH", {})):
            answer = service.ask(method, f"/api/states/{segment}", body)
            assert (answer.status, answer.json()["error"]) == (400, "ValidationError"), segment
        assert service.ask("GET", f"/api/states/{segment}/history").status == 400
    nowhere = [
        "/api/states/",
        "/api/states//",
        "//api/states/ada",
        "/api/states/ada/",
        "/api/states/ada//history",
    ]
    nowhere += [
        "/api/states/a/b",
        "/api/states/a/b/history",
        "/api/states/x/../ada",
        "/api/states/ada/../../health",
    ]
    nowhere += ["/api/./states/ada", "/api/states/ada/history/", "/api%2Fstates/ada", "/api/states%2Fada"]
    nowhere += ["/API/states/ada", "/api/states;x/ada", "/.%2e/api/states/ada", "/api/states/ada%2Fhistory/x"]
    for path in nowhere:
        for method, body in (("GET", None), ("PUT", {"axes": {}}), ("DELETE", None)):
            assert service.ask(method, path, body).status == 404, path
    for target in (f"http://127.0.0.1:{service.port}/api/states/ada", "api/states/ada", "*"):
        assert service.ask("GET", target).status in {400, 404}
    assert (list(store), store["ada"].updated_at_unix_ms) == (["ada"], NOON)


def test_users_come_in_pages(served: Served) -> None:
    """Each page begins after the one before, so that all users are told once, in their order."""
    service, store = served
    store.upsert_many(
        [StateSnapshot(f"user {number}", {"warmth": number / 40}, NOON) for number in range(40)]
    )
    found, after, pages = [], "", 0
    while after is not None:
        answer = service.ask("GET", f"/api/states?limit=7&after={quote(after)}").json()
        found, after, pages = found + answer["states"], answer["next"], pages + 1
    assert found == [store[user_id].to_dict() for user_id in sorted(store)]
    assert pages == 6
    assert service.ask("GET", "/api/states").json() == {"states": found, "next": None}
    assert service.ask("GET", "/api/states?limit=40").json()["next"] is None
    for limit in ("0", "1001", "-1", "x", "", "1.5", "\u0661", "9" * 30):
        assert service.ask("GET", f"/api/states?limit={quote(limit)}").status == 400


def test_searching(served: Served) -> None:
    """A search answers what search_similar does, with all of its filters."""
    service, store = served
    rng = random.Random(7)
    for number in range(30):
        axes = {"warmth": rng.random(), "formality": rng.random()}
        source = rng.choice(["inferred", "mixed"])
        store.upsert_latest(StateSnapshot(f"u{number}", axes, NOON + number, source, rng.random()))
    queries: list[dict[str, Any]] = [
        {"query": {"warmth": 0.9}},
        {"query": "u7", "limit": 5},
        {"query": "u7", "exclude_user_id": "", "limit": 1},
        {"query": {"warmth": 0.1}, "source": "mixed", "min_confidence": 0.5, "history": True},
        {"query": {"warmth": 0.1}, "since": NOON + 3, "until": NOON + 9},
        {"query": {"warmth": 0.1}, "score_threshold": 0.5, "user_id": "u3"},
    ]
    for body in queries:
        answer = service.ask("POST", "/api/search", body)
        expected = store.search_similar(**body)
        assert [match["state"] for match in answer.json()["matches"]] == [
            match.snapshot.to_dict() for match in expected
        ]
        assert [match["score"] for match in answer.json()["matches"]] == pytest.approx(
            [match.score for match in expected]
        )
    dated = {
        "query": {"warmth": 0.1},
        "since": "2026-01-17T12:00:00.003Z",
        "until": "2026-01-17T13:00:00.009+01:00",
    }
    assert (
        service.ask("POST", "/api/search", dated).text == service.ask("POST", "/api/search", queries[4]).text
    )
    assert service.ask("POST", "/api/search", {"query": "nobody"}).status == 404
    for body in [
        {},
        {"query": None},
        {"query": []},
        {"query": {"warmth": 2}},
        {"query": {"unknown": 1}},
        {"query": ""},
        *({"query": {"warmth": 1}} | wrong for wrong in [{"limit": 0}, {"limit": 1001}, {"limit": None}]),
        *({"query": {"warmth": 1}} | wrong for wrong in [{"limit": True}, {"history": 1}, {"source": "x"}]),
        *({"query": {"warmth": 1}} | wrong for wrong in [{"self": 1}, {"since": "yesterday"}, {"lmit": 1}]),
        *({"query": {"warmth": 1}} | wrong for wrong in [{"since": 1_700_000_000}, {"user_id": "\ud800"}]),
    ]:
        assert service.ask("POST", "/api/search", body).status == 422, body


def test_times_in_a_query(served: Served) -> None:
    """Bounds of a history are milliseconds or ISO 8601 with a time zone, its + encoded or not."""
    service, store = served
    store.upsert_many([StateSnapshot("ada", {}, NOON + 1000 * number) for number in range(5)])

    def found(query: str) -> list[int]:
        states = service.ask("GET", f"/api/states/ada/history?{query}").json()["states"]
        return [(state["updated_at_unix_ms"] - NOON) // 1000 for state in states]

    assert found("limit=2") == [4, 3]
    assert found(f"since={NOON + 3000}") == [4, 3]
    assert found("since=2026-01-17T12:00:01Z&until=2026-01-17T12:00:02Z") == [2, 1]
    assert found("since=2026-01-17T13:00:03+01:00") == found("since=2026-01-17T13:00:03%2B01:00") == [4, 3]
    assert found("until=2026-01-17T07:00:01-05:00") == [1, 0]
    assert found("since=9000-01-01T00:00Z") == []
    for text in (
        "yesterday",
        "2026-01-17T12:00",
        "2026-01-17",
        "1768651200",
        "1.5",
        "-1",
        "",
        "T" * 5000,
        "9" * 30,
    ):
        assert service.ask("GET", f"/api/states/ada/history?since={text}").status == 400, text
    assert service.ask("GET", "/api/states/ada/history?limit=1001").status == 400


def test_a_store_without_history(store: MemoryStore) -> None:
    """A user who is there and has no history is no unknown user."""
    bare = MemoryStore(enable_history=False)
    bare.upsert_latest(store["ada"])
    with Service(service_app(bare, authorize=says(True))) as service:
        assert service.ask("GET", "/api/states/ada/history").json() == {"states": []}
        assert service.ask("GET", "/api/states/bob/history").status == 404


# ------------------------------------------------------------------------------
# Conditional requests
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "there", "absent"),
    [
        ("If-Match", "{tag}", True, False),
        ("If-Match", '"other", {tag}', True, False),
        ("If-Match", "*", True, False),
        ("If-Match", "W/{tag}", False, False),  # compared strongly
        ("If-Match", '"other"', False, False),
        ("If-Match", '""', False, False),
        ("If-None-Match", "{tag}", False, True),
        ("If-None-Match", 'W/"x" ,W/{tag}', False, True),
        ("If-None-Match", "*", False, True),
        ("If-None-Match", '"other"', True, True),
    ],
)
def test_conditions(served: Served, name: str, given: str, there: bool, absent: bool) -> None:
    """A condition lets a request through, or is 412 and nothing changes; of GET it may be 304."""
    service, store = served
    state = StateSnapshot("ada", {"warmth": 0.25}, NOON)
    store.upsert_latest(state)
    tag = service.ask("GET", "/api/states/ada").headers["etag"]
    headers = {name: given.format(tag=tag)}

    read = service.ask("GET", "/api/states/ada", headers=headers)
    assert read.status == (200 if there else 412 if name == "If-Match" else 304)
    assert read.status != 304 or (read.text, read.headers["etag"]) == ("", tag)
    assert service.ask("GET", "/api/states/bob", headers=headers).status == 404
    for method, body in (
        ("PUT", {"axes": {"warmth": 1}}),
        ("PATCH", {"axes": {"warmth": 1}}),
        ("DELETE", None),
    ):
        store.delete("ada")
        store.upsert_latest(state)
        store.delete("bob")
        done = service.ask(method, "/api/states/ada", body, headers)
        assert done.status == ((204 if method == "DELETE" else 200) if there else 412), method
        assert (store.get_latest("ada") == state) is not there
        made = service.ask(method, "/api/states/bob", body, headers)
        created = absent and method != "DELETE"
        assert made.status == (201 if created else 404 if absent else 412), method
        assert ("bob" in store) is created


def test_conditions_that_make_no_sense(served: Served) -> None:
    """A condition that cannot be understood is 400 rather than ignored."""
    service, store = served
    store.upsert_latest(StateSnapshot("ada", {}, NOON))
    for name in ("If-Match", "If-None-Match"):
        for given in ("abc", "", '"a', '"a" "b"', '*, "a"', '"a",', 'w/"a"', "\xff"):
            for method, body in (("PUT", {"axes": {}}), ("PATCH", {}), ("DELETE", None)):
                assert service.ask(method, "/api/states/ada", body, {name: given}).status == 400, given
    assert store.get_history("ada") == [StateSnapshot("ada", {}, NOON)]


def test_no_change_is_lost_between_clients(served: Served) -> None:
    """Clients that read, change and write under If-Match count each other's changes; one alone creates."""
    service, store = served

    def create(number: int) -> int:
        return service.ask("PUT", "/api/states/new", {"axes": {}}, If_None_Match="*").status

    def count(number: int) -> None:
        for _ in range(5):
            while True:
                read = service.ask("GET", "/api/states/ada")
                told = read.json()
                body = {"axes": {}, "schema_version": told["schema_version"] + 1}
                body["updated_at_unix_ms"] = told["updated_at_unix_ms"] + 1
                if service.ask("PUT", "/api/states/ada", body, If_Match=read.headers["etag"]).status == 200:
                    break

    def merge(number: int) -> None:
        for _ in range(5):
            axis = (
                f"axis_{number}"
                if number < 0
                else ("warmth", "formality", "ritual_need", "urgency_sensitivity")[number]
            )
            while service.ask("PATCH", "/api/states/bob", {"axes": {axis: 1}}).status == 409:
                pass

    store.upsert_latest(StateSnapshot("ada", {}, NOON))
    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(create, range(4))) == [201, 412, 412, 412]
        list(threads.map(count, range(4)))
        list(threads.map(merge, range(4)))
    assert store["ada"].schema_version == 1 + 4 * 5
    assert set(store["bob"].axes) == {"warmth", "formality", "ritual_need", "urgency_sensitivity"}


# ------------------------------------------------------------------------------
# Bodies
# ------------------------------------------------------------------------------

MALFORMED = [
    b"",
    b"{",
    b"nonsense",
    b'{"axes": {"warmth": NaN}}',
    b'{"axes": {"warmth": Infinity}}',
    b'{"axes": {"warmth": -Infinity}}',
    b'{"axes": {"warmth": 1e999}}',
    b'{"axes": {}, "axes": {"warmth": 1}}',
    b'{"axes": {"warmth": 0, "warmth": 1}}',
    b'{"axes": {}} {}',
    b'\xef\xbb\xbf{"axes": {}}',
    b'{"axes": {}, "user_id": "\xff"}',
    '{"axes": {}}'.encode("utf-16"),
    b'{"axes": {"warmth": ' + b"1" * 5_000 + b"}}",
    b'{"axes": ' + b"[" * 50 + b"]" * 50 + b"}",
    b"[" * 200_000,
    b'{"a":' * 40_000,
    b'"' + b'\\"' * 100_000,
    b'{"axes": {}, "source": "\x00"}',
]
WRONG: list[Any] = [
    b"[]",
    b"null",
    "text",
    7,
    {"user_id": "ada"},
    {"axes": None},
    {"axes": []},
    {"axes": {"warmth": 2}},
    {"axes": {"warmth": "1"}},
    {"axes": {"warmth": True}},
    {"axes": {"unknown": 1}},
    {"axes": {"no name": 1}},
    {"axes": {}, "user_id": "bob"},
    {"axes": {}, "user_id": None},
    {"axes": {}, "self": 1},
    {"axes": {}, "confidence": 7},
    {"axes": {}, "confidence": None},
    {"axes": {}, "source": "\x1b[31m"},
    {"axes": {}, "schema_version": 0},
    {"axes": {}, "schema_version": 10**30},
    {"axes": {}, "updated_at_unix_ms": 1.5},
    {"axes": {}, "updated_at_unix_ms": 1_700_000_000},
    {"axes": {}, "updated_at_unix_ms": "2026-01-17T12:00"},
    {"axes": {}, "updated_at_unix_ms": "T" * 100_000},
    {"axes": {}, "unknown": 1},
    {"axes": {f"axis_{number}": 0 for number in range(1_025)}},
]


def test_bodies_that_are_refused(served: Served) -> None:
    """What is no JSON is 400, what is no state 422; nothing is written."""
    service, store = served
    state = StateSnapshot("ada", {"warmth": 0.25}, NOON)
    store.upsert_latest(state)
    for method in ("PUT", "PATCH"):
        for body in MALFORMED:
            answer = service.ask(method, "/api/states/ada", body, JSON)
            assert answer.status == 400, (method, body[:60], answer)
        for wrong in WRONG:
            if method == "PUT" or wrong != {"user_id": "ada"}:
                answer = service.ask(method, "/api/states/ada", wrong, JSON)
                assert answer.status == 422, (method, wrong, answer.text)
                assert answer.json()["error"] == "ValidationError"
    assert service.ask("POST", "/api/search", b"{", JSON).status == 400
    assert store.get_history("ada") == [state]
    assert list(store) == ["ada"]


def test_bodies_of_another_type(served: Served) -> None:
    """What a page of another site may send without asking, such as a form, is 415."""
    service, store = served
    body = b'{"axes": {}}'
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
        "json",
        "text/json",
    ):
        assert service.ask("PUT", "/api/states/ada", body, {"Content-Type": kind}).status == 415, kind
    assert service.ask("PUT", "/api/states/ada", body).status == 415
    assert list(store) == []
    for number, kind in enumerate(
        ("application/json; charset=utf-8", "Application/JSON", "application/merge-patch+json")
    ):
        assert service.ask("PUT", f"/api/states/{number}", body, {"Content-Type": kind}).status == 201, kind


def test_large_bodies_are_not_read(served: Served) -> None:
    """A body beyond the bound is 413, whether its length was told or not; the largest state goes through."""
    service, store = served
    large = b'{"axes": {}, "source": "' + b"x" * (256 << 10) + b'"}'
    assert service.ask("PUT", "/api/states/ada", large, JSON).status == 413
    assert service.ask("PUT", "/api/states/ada", [b" " * 65_536] * 5, JSON).status == 413
    assert service.ask("PATCH", "/api/states/ada", [b'{"axes"', b": {}}"], JSON).status == 201
    assert list(store) == ["ada"]


def test_the_largest_state_goes_through() -> None:
    """A state with as many axes as there may be, of the longest names, is written and read over HTTP."""
    names = [f"{number:04}".ljust(64, "x") for number in range(1_024)]
    store = MemoryStore(axes=names)
    state = StateSnapshot("x" * 256, dict.fromkeys(names, 0.12345678901234567), NOON)
    with Service(service_app(store, authorize=says(True))) as service:
        assert service.ask("PUT", place_of(state.user_id), state.to_dict()).status == 201
        assert StateSnapshot.from_dict(service.ask("GET", place_of(state.user_id)).json()) == state
    assert store[state.user_id] == state


def test_a_body_that_ends_early(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    """A client that goes away in the middle of a body leaves nothing written and nothing in the log."""
    with Service(service_app(store, authorize=says(True))) as service:
        head = b"PUT /api/states/new HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: 99\r\n\r\n{"
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", service.port)) as connection:
                connection.sendall(head)
        assert service.ask("GET", "/api/states/ada").status == 200
    assert ("new" in store, caplog.text) == (False, "")


# ------------------------------------------------------------------------------
# Who may ask
# ------------------------------------------------------------------------------

REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "/api/states", None),
    ("GET", "/api/states/ada", None),
    ("HEAD", "/api/states/ada", None),
    ("PUT", "/api/states/ada", {"axes": {"warmth": 1}}),
    ("PATCH", "/api/states/ada", {"axes": {"warmth": 1}}),
    ("GET", "/api/states/ada/history", None),
    ("POST", "/api/search", {"query": {"warmth": 1}}),
    ("POST", "/api/snapshot", None),
    ("GET", "/api/health", None),
    ("GET", "/metrics", None),
    ("GET", "/api/states/%FF", None),
    ("DELETE", "/api/states/ada", None),
]
OPEN = ["/api/ready", "/docs", "/openapi.json", "/"]


def later(answer: Any) -> Callable[[object], Any]:
    async def said(_: object) -> Any:
        await anyio.lowlevel.checkpoint()
        return answer

    return said


def test_nobody_is_let_through(store: MemoryStore, tmp_path: Path) -> None:
    """Whatever is neither True nor somebody's id gets 401 for all but the description and readiness."""
    before = {user_id: store.get_history(user_id) for user_id in store}
    said: list[Any] = [None]
    app = service_app(store, authorize=lambda _: said[0], directory=tmp_path / "backups")
    with Service(app) as service:
        for who in (False, None, "", 1, b"ada", ["ada"], {}, 1.0, later(None), later(False), later(1)):
            for method, path, body in REQUESTS:
                said[0] = who(None) if callable(who) else who
                answer = service.ask(method, path, body)
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer"), (who, path)
        for path in OPEN:
            assert service.ask("GET", path).status in {200, 307}
    assert {user_id: store.get_history(user_id) for user_id in store} == before
    assert not (tmp_path / "backups").exists()


def test_a_user_has_the_own_state_alone(store: MemoryStore, tmp_path: Path) -> None:
    """Who is named may read and change the own state; that of others, searches and the rest are 403."""
    store.upsert_latest(StateSnapshot("ada/history", {}, NOON))
    kept = {user_id: store.get_history(user_id) for user_id in ("ada", "ada/history")}
    with Service(service_app(store, authorize=bearer, directory=tmp_path / "backups")) as service:
        bob = {"Authorization": "Bearer bob"}
        for method, path, body in REQUESTS:
            expected = 400 if "%FF" in path else 403
            assert service.ask(method, path, body, bob).status == (403 if "%FF" in path else expected), path
        for path in (
            "/api/states/Bob",
            "/api/states/bob%20",
            "/api/states/b%C3%B6b",
            "/api/states/ada%2Fhistory",
        ):
            assert service.ask("GET", path, headers=bob).status == 403
        assert service.ask("GET", "/api/states/bob", headers=bob).json() == store["bob"].to_dict()
        assert service.ask("GET", "/api/states/%62ob/history", headers=bob).status == 200
        assert service.ask("PUT", "/api/states/bob", {"axes": {}, "user_id": "ada"}, bob).status == 422
        assert service.ask("PATCH", "/api/states/bob", {"axes": {"warmth": 1}}, bob).status == 200
        assert store["bob"].axes == {"warmth": 1.0}
        assert service.ask("DELETE", "/api/states/bob", headers=bob).status == 204
        assert service.ask("GET", "/api/states/bob", headers=bob).status == 404
        assert service.ask("GET", "/api/states", headers={"Authorization": "Bearer root"}).status == 200
    assert {user_id: store.get_history(user_id) for user_id in store} == kept
    assert not (tmp_path / "backups").exists()


def test_authorize_sees_the_decoded_user(store: MemoryStore) -> None:
    """The function finds the id in the parameters of the path, and one that is none as nobody's."""
    seen: list[Any] = []

    def authorize(request: Any) -> bool:
        seen.append(request.path_params.get("user_id"))
        return True

    with Service(service_app(store, authorize=authorize)) as service:
        for path in (
            "/api/states/a%2Fb",
            "/api/states/%FF",
            "/api/states/a%2Fb/history",
            "/api/health",
            "/docs",
        ):
            service.ask("GET", path)
    assert seen == ["a/b", "", "a/b", None]


def test_an_authorize_that_raises(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    """An HTTPException is the answer, as a problem; what else is raised is 500, in the log, and not told."""
    from starlette.exceptions import HTTPException

    def authorize(request: Any) -> bool:
        if request.method == "PUT":
            raise RuntimeError("password of the directory: hunter2")
        raise HTTPException(429, "slowly", {"Retry-After": "7"})

    with Service(service_app(store, authorize=authorize)) as service:
        slow = service.ask("GET", "/api/unknown")
        assert slow.status == 404
        connection = httpx.get(f"http://127.0.0.1:{service.port}/api/health")
        assert (connection.status_code, connection.headers["retry-after"]) == (429, "7")
        assert connection.json() == {"title": "Too Many Requests", "status": 429, "detail": "slowly"}
        failed = service.ask("PUT", "/api/states/ada", {"axes": {}})
    assert (failed.status, "hunter2" in failed.text) == (500, False)
    assert store["ada"].updated_at_unix_ms == NOON
    assert "hunter2" in caplog.text


CROSS = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "nonsense"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Origin": "http://evil.example", "Referer": "http://127.0.0.1/"},
]


def test_requests_of_another_site(store: MemoryStore, tmp_path: Path) -> None:
    """A page of another site is refused, cookies or not, unless it sends a token, which is then looked at."""
    app = service_app(store, authorize=says(True), directory=tmp_path / "backups")
    before = {user_id: store.get_history(user_id) for user_id in store}
    with Service(app) as service:
        for headers in CROSS:
            for method, path, body in REQUESTS:
                answer = service.ask(method, path, body, headers | {"Cookie": "session=1"})
                assert answer.status == 401, (headers, path)
        own = f"http://127.0.0.1:{service.port}"
        for headers in (
            {"Sec-Fetch-Site": "same-origin", "Origin": own},
            {"Origin": own},
            {"Sec-Fetch-Site": "none"},
        ):
            assert service.ask("GET", "/api/states/ada", headers=headers).status == 200, headers
    assert {user_id: store.get_history(user_id) for user_id in store} == before
    assert not (tmp_path / "backups").exists()
    with Service(service_app(store, authorize=bearer)) as service:
        for headers in CROSS:
            token = headers | {"Authorization": "Bearer bob"}
            assert service.ask("GET", "/api/states/bob", headers=token).status == 200
            assert service.ask("GET", "/api/states/ada", headers=token).status == 403


def test_without_authorize_this_machine_is_served(store: MemoryStore) -> None:
    """Without a function, only who is on this machine and names it is answered, and no proxy for others."""
    with Service(service_app(store)) as service:
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8080", "127.1.2.3", "[::1]:80"):
            assert service.ask("GET", "/api/states/ada", Host=host).status == 200, host
        for host in (
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "",
            "192.0.2.7",
            "[::2]",
        ):
            assert service.ask("GET", "/api/states/ada", Host=host).status == 401, host
        for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"):
            assert service.ask("GET", "/api/states/ada", headers={name: "127.0.0.1"}).status == 401, name
    outside = httpx.ASGITransport(service_app(store), client=("192.0.2.7", 1))

    async def from_outside() -> int:
        async with httpx.AsyncClient(transport=outside, base_url="http://localhost") as client:
            return int((await client.get("/api/states/ada")).status_code)

    assert anyio.run(from_outside) == 401


# ------------------------------------------------------------------------------
# Methods, several stores, failures
# ------------------------------------------------------------------------------


def test_methods_of_every_path(served: Served, tmp_path: Path) -> None:
    """HEAD is GET without the body, OPTIONS tells the methods, others are 405; nothing is done."""
    service, store = served
    store.upsert_latest(StateSnapshot("ada", {}, NOON))
    for path in dict.fromkeys(path for _, path in OPERATIONS):
        known = {method for method, template in OPERATIONS if template == path}
        allowed = known | {"OPTIONS"} | ({"HEAD"} if "GET" in known else set())
        asked = path.replace("{user_id}", "ada")
        told = service.ask(
            "OPTIONS", asked, Access_Control_Request_Method="PUT", Origin="http://evil.example"
        )
        assert (told.status, told.text, set(told.headers["allow"].split(", "))) == (204, "", allowed)
        assert not [name for name in told.headers if name.lower().startswith("access-control")]
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"} - allowed:
            answer = service.ask(method, asked)
            assert (answer.status, set(answer.headers["allow"].split(", "))) == (405, allowed), (method, path)
        if "GET" in known:
            got, head = service.ask("GET", asked), service.ask("HEAD", asked)
            assert (head.status, head.text) == (got.status, "")
            volatile = {"date"} | ({"content-length"} if path in {"/metrics", "/api/health"} else set())
            assert {name: value for name, value in head.headers.items() if name not in volatile} == {
                name: value for name, value in got.headers.items() if name not in volatile
            }
    assert store.get_history("ada") == [StateSnapshot("ada", {}, NOON)]


@needs("qdrant_edge")
def test_several_stores(tmp_path: Path) -> None:
    """A request names the store that it means by its collection; each holds its own."""
    with (
        QdrantStore(path=tmp_path / "one", collection_name="one") as one,
        QdrantStore(path=tmp_path / "two", collection_name="two") as two,
        Service(service_app(one, two, authorize=says(True))) as service,
    ):
        assert service.ask("PUT", "/api/states/ada", {"axes": {}}).status == 400
        assert service.ask("PUT", "/api/states/ada?store=three", {"axes": {}}).status == 404
        assert service.ask("PUT", "/api/states/ada?store=two", {"axes": {"warmth": 1}}).status == 201
        assert (len(one), two["ada"].axes) == (0, {"warmth": 1.0})
        assert service.ask("GET", "/api/states/ada?store=one").status == 404
        assert service.ask("GET", "/api/states/ada/history?store=two").status == 200
        body = {"query": {"warmth": 1}}
        assert len(service.ask("POST", "/api/search?store=two", body).json()["matches"]) == 1
        assert service.ask("GET", "/api/states?store=one").json() == {"states": [], "next": None}
        assert len(service.ask("GET", "/api/health").json()["stores"]) == 2


def test_an_application_that_makes_no_sense(store: MemoryStore) -> None:
    """What the application is made with is checked when it is made."""
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("stores", (), {}),
        ("stores", ("./path",), {}),
        ("stores", (store, MemoryStore()), {}),  # of one name
        ("authorize", (store,), {"authorize": "token"}),
        ("authorize", (store,), {"authorize": ""}),
        ("keep", (store,), {"keep": 0}),
        ("path", (store,), {"directory": ""}),
    ]
    for field, stores, options in wrong:
        with pytest.raises(ValidationError, match=f"^{field}: "):
            service_app(*stores, **options)


def test_a_store_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A server that is not there is 503 with a time to wait; where it should be is for the log alone."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    few = {"retry": RetryPolicy(attempts=1), "breaker": BreakerPolicy(failures=2, first_open_s=30.0)}
    absent = AsyncQdrantStore(url=url, **few)
    with Service(service_app(absent, authorize=says(True))) as service:
        waits = []
        for _ in range(2):
            for method, path, body in REQUESTS[:4]:
                answer = service.ask(method, path, body)
                assert answer.status == 503
                waits.append(int(answer.headers["retry-after"]))
                if method != "HEAD":
                    assert str(port) not in answer.text
                    assert answer.json()["error"] in {"BackendUnavailableError", "CircuitOpenError"}
    assert (waits[0], 20 <= waits[-1] <= 30) == (1, True)
    assert str(port) in caplog.text
    assert "GET /api/states/{user_id}: " in caplog.text

    closed = MemoryStore()
    closed.close()
    with Service(service_app(closed, authorize=says(True))) as service:
        answer = service.ask("GET", "/api/states/ada")
        assert (answer.status, answer.json()["error"]) == (503, "StoreClosedError")
        assert "retry-after" not in answer.headers


def test_conflicts_that_no_condition_asked_for(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conflict that never ends, or that nobody can tell the end of, is 409; the latter says so."""
    ambiguous = True

    def conflict(*_: object, **__: object) -> None:
        raise ConflictError("in conflict", ambiguous=ambiguous)

    monkeypatch.setattr(store, "upsert_latest", conflict)
    with Service(service_app(store, authorize=says(True))) as service:
        told = service.ask("PUT", "/api/states/ada", {"axes": {}}, If_Match="*")
        assert (told.status, told.json()["ambiguous"]) == (409, True)
        ambiguous = False
        told = service.ask("PUT", "/api/states/ada", {"axes": {}}, If_Match="*")
        assert (told.status, "ambiguous" in told.json()) == (409, False)


def test_what_nobody_foresaw(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of another kind is 500 without a word of it."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("inside: hunter2")

    monkeypatch.setattr(store, "get_latest", fail)
    with Service(service_app(store, authorize=says(True))) as service:
        answer = service.ask("GET", "/api/states/ada")
    assert (answer.status, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "hunter2" not in answer.text


@pytest.mark.parametrize("framework", ["starlette", pytest.param("fastapi", marks=needs("fastapi"))])
def test_mounted_below_a_prefix(framework: str, store: MemoryStore) -> None:
    """Mounted, also behind a proxy that strips a prefix, ids with slashes work and the description fits."""
    if framework == "fastapi":
        from fastapi import FastAPI as Application
    else:
        from starlette.applications import Starlette as Application
    app: Any = Application()
    app.mount("/a/mood", service_app(store, authorize=says(True)))
    store.upsert_latest(StateSnapshot("a/b", {}, NOON))
    for root in ("", "/behind/proxy"):
        with Service(app, root_path=root) as service:
            read = service.ask("GET", "/a/mood/api/states/a%2Fb")
            assert (read.status, read.json()["user_id"]) == (200, "a/b")
            assert service.ask("GET", "/a/mood/api/states/a%2Fb/history").status == 200
            assert service.ask("GET", "/a/mood/api/states/a/b").status == 404
            assert service.ask("GET", "/mood/api/states/ada").status == 404
            described = service.ask("GET", "/a/mood/openapi.json").json()
            assert described["servers"] == [{"url": f"{root}/a/mood"}]
            lead = httpx.get(f"http://127.0.0.1:{service.port}/a/mood/", follow_redirects=True)
            assert (lead.status_code, urlsplit(str(lead.url)).path) == (200, "/a/mood/docs")
            assert f"{root}/a/mood/api/states/ada" in lead.text


# ------------------------------------------------------------------------------
# The description
# ------------------------------------------------------------------------------


def test_the_description_is_openapi(store: MemoryStore) -> None:
    """The document is OpenAPI 3.1, tells every route of the application, and no reference leads nowhere."""
    app = service_app(store, authorize=says(True))
    with Service(app) as service:
        text = service.ask("GET", "/openapi.json").text
        page = service.ask("GET", "/docs")
    document = json.loads(text)
    for path in document["paths"]:
        assert path in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<script" not in page.text
    assert re.findall(r'(?:src|href|action)\s*=\s*"?([^">]*)', page.text) == ["openapi.json"]
    assert not re.findall(r"url\(|@import|<(?:img|link|iframe|object)", page.text)

    assert document["openapi"] == "3.1.0"
    assert {route.path for route in app.routes} == set(document["paths"])
    names = set[str]()
    for path, item in document["paths"].items():
        for described in item.values():
            names.add(described["operationId"])
            declared = {each["name"] for each in described["parameters"] if each["in"] == "path"}
            assert declared == set(re.findall(r"\{(\w+)\}", path))
            assert described["responses"]
    assert len(names) == sum(map(len, document["paths"].values()))
    for reference in re.findall(r'"\$ref": "(.*?)"', text):
        found: Any = document
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
    for schema in document["components"]["schemas"].values():
        pytest.importorskip("jsonschema").Draft202012Validator.check_schema(schema)
    models = pytest.importorskip("fastapi.openapi.models")
    models.OpenAPI.model_validate(document)


def test_the_validator_of_openapi_agrees() -> None:
    """What checks OpenAPI documents for others finds nothing wrong."""
    pytest.importorskip("openapi_spec_validator").validate(attuned_store.openapi_document("/mood"))


def test_what_the_description_admits_is_accepted(store: MemoryStore) -> None:
    """The schemas of bodies and the service agree on what is right and what is wrong."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    validator = jsonschema.Draft202012Validator({"$ref": "#/schemas/NewState", "schemas": SCHEMAS})
    right = [
        {"axes": {}},
        store["ada"].to_dict(),
        {"axes": {"warmth": 0}, "updated_at_unix_ms": "2026-01-17T12:00Z"},
    ]
    assert all(map(validator.is_valid, right))
    known_alone = [{"axes": {"unknown": 1}}, {"axes": {}, "user_id": "bob"}]  # to the store, to the path
    beyond_a_schema = [
        wrong for wrong in WRONG if isinstance(wrong, dict) and "T" in str(wrong.get("updated_at_unix_ms"))
    ]
    seconds = {"axes": {}, "updated_at_unix_ms": 1_700_000_000}
    for wrong in WRONG:
        if wrong not in [*known_alone, *beyond_a_schema, seconds]:
            assert not validator.is_valid(wrong), wrong


# ------------------------------------------------------------------------------
# Everything at once
# ------------------------------------------------------------------------------


def any_request(rng: random.Random, name: str) -> tuple[str, str, bytes | None, dict[str, str]]:
    """A request that may be right, or wrong in several ways."""

    def pick(*choices: Any) -> Any:
        return rng.choice(choices)

    others = ("ada", "ada%2Fhistory", "%61da", "%2e%2e", "ada%00", "%FF", "x" * 300, "ad\u00e1")
    user = "bob" if rng.random() < 0.5 else pick(*others)
    path = pick(
        *[f"/api/states/{user}"] * 14,
        *[f"/api/states/{user}/history"] * 2,
        f"/api/states/{user}/../ada",
        f"/api/states/bob/../{user}",
        *("/api/states", "/api/search", "/api/snapshot", "/metrics", "/api/health", "/docs", "/openapi.json"),
    )
    path = quote(path, safe="/%.")
    query = pick("", "", "", "limit=3", "limit=-1", "store=x", "store=attuned_state", "since=1&until=x")
    query += pick("", "", "&user_id=ada", "&after=a")
    value = rng.random()
    good = ({"warmth": value}, {"warmth": value, "formality": 0.5}, {})
    axes = pick(*good, *good, {"warmth": None}, {"x": 1}, {"warmth": "1"}, [], None)
    fields = (
        ("user_id", pick("ada", "bob", 7)),
        ("query", pick("ada", "bob", axes)),
        ("updated_at_unix_ms", pick(NOON, NOON + rng.randrange(10**6), "2026-01-17T12:00Z", -1, "x")),
        ("source", pick("mixed", "x")),
        ("confidence", pick(0.5, 2, None)),
    )
    body = {"axes": axes} | {key: value for key, value in fields if rng.random() < 0.2}
    text: bytes | None = json.dumps(body).encode()
    if rng.random() < 0.2:
        text = pick(None, b"", b"{", text[:9], rng.randbytes(40), b"[" * 5_000, b"\x00" * 300_000)
    more = (
        ("Content-Type", pick("application/json", "application/json", "application/json", "text/plain")),
        ("If-Match", pick("*", '"x"', "x")),
        ("If-None-Match", pick("*", '"x"', "x")),
        ("Origin", "http://evil.example"),
        ("X-Forwarded-For", "127.0.0.1"),
        ("X-HTTP-Method-Override", "DELETE"),
        ("X-Original-URL", "/api/states/ada"),
        ("Host", pick("evil.example", "ada")),
    )
    often = {"Content-Type": 0.9}
    headers = {header: value for header, value in more if rng.random() < often.get(header, 0.12)}
    if rng.random() < 0.9:
        headers["Authorization"] = pick(*[f"Bearer {name}"] * 5, "nobody")
    method = pick("GET", "GET", "PUT", "PUT", "PUT", "PATCH", "PATCH", "DELETE", "POST", "HEAD", "OPTIONS")
    return method, f"{path}?{query}", text, headers


@pytest.mark.parametrize("seed", range(2))
def test_any_requests(seed: int) -> None:
    """Hundreds of requests of one user, right and wrong: never a 500, no trace of another user."""
    store = MemoryStore()
    ada = [
        StateSnapshot("ada", {"warmth": 0.123456789, "ritual_need": 0.987654321}, NOON + n) for n in range(3)
    ]
    store.upsert_many(ada)
    rng, statuses = random.Random(seed), set[int]()
    with Service(service_app(store, authorize=bearer)) as service:
        for _ in range(400):
            method, path, body, headers = any_request(rng, "bob")
            answer = service.ask(method, path, body, headers)
            statuses.add(answer.status)
            assert answer.status < 500, (method, path, body, headers, answer)
            assert "0.123456789" not in answer.text, (method, path, body, headers)
            assert "0.987654321" not in answer.text
            assert store.get_history("ada") == ada[::-1]
            assert set(store) <= {"ada", "bob"}
    assert statuses >= {200, 201, 204, 400, 401, 403, 404, 405, 412, 415, 422}


def test_any_requests_of_who_may_do_all(served: Served) -> None:
    """Whatever is sent by who may do everything is never a 500, and leaves a store of valid states."""
    service, store = served
    rng = random.Random(11)
    for _ in range(150):
        method, path, body, headers = any_request(rng, "root")
        if path.startswith("/api/snapshot"):
            continue
        answer = service.ask(method, path, body, headers)
        assert answer.status < 500, (method, path, body, headers, answer)
        if answer.status in {200, 201} and method in {"PUT", "PATCH"}:
            state = StateSnapshot.from_dict(answer.json())
            assert state in store.get_history(state.user_id)

"""The endpoint that takes snapshots on request: the application in this process, and `serve` as another."""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.lowlevel
import anyio.to_thread
import command
import pytest
from conformance import environment, needs, run_python

from attuned_store import (
    AsyncMemoryStore,
    Health,
    MemoryStore,
    MissingDependencyError,
    StateSnapshot,
    ValidationError,
    open_async_store,
    open_store,
    snapshot_app,
    verify_snapshot,
)

httpx = pytest.importorskip("httpx", reason="needs httpx, which comes with qdrant-client")
starlette = pytest.importorskip("starlette", reason="needs starlette")

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

DEADLINE = 60.0  # seconds: for a machine that is busy
STATES = [
    StateSnapshot("ann", {"warmth": 0.25}, 1_000),
    StateSnapshot("ann", {"warmth": 0.75}, 2_000),
    StateSnapshot("bob", {"warmth": 1.0}, 3_000, "inferred", 0.5),
]
PATHS = {"POST": ["/api/snapshot"], "GET": ["/api/health", "/api/ready", "/metrics"]}

pytestmark = [pytest.mark.anyio, pytest.mark.once]


@pytest.fixture(
    params=["asyncio", pytest.param("trio", marks=needs("trio"))],
)
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's settings reaches a test, and relative paths lead into a folder of its own."""
    for name in [name for name in os.environ if name.startswith(("ATTUNED_STORE", "QDRANT_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def store() -> MemoryStore:
    """A synchronous store with two users and three states."""
    store = MemoryStore()
    store.upsert_many(STATES)
    return store


@asynccontextmanager
async def calling(app: Any, **options: Any) -> AsyncIterator[Any]:
    """A client of the application, without a network between."""
    transport = httpx.ASGITransport(app, **options)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        with anyio.fail_after(DEADLINE):
            yield client


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(DEADLINE):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await anyio.sleep(0.001)


def endpoint_of(app: Any) -> Any:
    return app.routes[0].endpoint.endpoint


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def states_in(path: str | Path) -> list[StateSnapshot]:
    """What an archive holds, oldest first, read with the standard library alone."""
    with gzip.open(path) as lines:
        found = [json.loads(line) for line in lines]
    states = [StateSnapshot.from_dict(fields) for fields in found if "user_id" in fields]
    return sorted(states, key=lambda state: state.updated_at_unix_ms)


class Gated:
    """A store whose snapshots wait until they are let through, and are counted."""

    def __init__(self, store: MemoryStore | AsyncMemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = self.finished = 0
        self.gate = threading.Event()
        self._take: Any = store.create_snapshot
        take = self._sync if isinstance(store, MemoryStore) else self._async
        monkeypatch.setattr(store, "create_snapshot", take)

    def _sync(self, *args: Any, **options: Any) -> Any:
        self.begun += 1
        assert self.gate.wait(DEADLINE)
        report = self._take(*args, **options)
        self.finished += 1
        return report

    async def _async(self, *args: Any, **options: Any) -> Any:
        self.begun += 1
        await until(self.gate.is_set)
        report = await self._take(*args, **options)
        self.finished += 1
        return report


# ------------------------------------------------------------------------------
# Taking snapshots
# ------------------------------------------------------------------------------


async def test_a_request_takes_a_snapshot_of_every_store(store: MemoryStore, tmp_path: Path) -> None:
    """One request takes a snapshot of every store, synchronous or not, and reports each."""
    async with AsyncMemoryStore() as other:
        await other.upsert_latest(STATES[0])
        async with calling(snapshot_app(store, other, directory=tmp_path / "backups")) as client:
            answer = await client.post("/api/snapshot")

    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json()["status"] == "completed"
    first, second = answer.json()["results"]
    assert first["status"] == second["status"] == "completed"
    assert (first["reason"], first["target"], first["kind"]) == ("api", "memory://", "portable")
    assert states_in(first["path"]) == STATES
    assert states_in(second["path"]) == STATES[:1]
    assert names_in(tmp_path / "backups") == [first["snapshot_name"], second["snapshot_name"]]
    for report in (first, second):
        verified = verify_snapshot(report["path"])
        assert (verified.sha256, verified.bytes) == (report["sha256"], report["bytes"])


@pytest.mark.parametrize("engine", [pytest.param("edge", marks=needs("qdrant_edge")), "local"])
@pytest.mark.parametrize("opening", [open_store, open_async_store], ids=["sync", "async"])
async def test_snapshots_of_stores_on_disk(engine: Any, opening: Any, tmp_path: Path) -> None:
    """A store on disk goes on being used while its snapshots are taken; another process can restore them."""
    with open_store(tmp_path / "store", engine=engine) as store:
        store.upsert_many(STATES)
    opened = opening(tmp_path / "store", engine=engine)
    async with calling(snapshot_app(opened, directory=tmp_path / "backups")) as client:
        answer = await client.post("/api/snapshot")
        health = await client.get("/api/health")
    await (opened.aclose() if opening is open_async_store else anyio.to_thread.run_sync(opened.close))

    assert answer.status_code == 200, answer.text
    assert health.json()["stores"][0] | {"latency_ms": 0} == {
        "status": "healthy",
        "backend": engine,
        "latency_ms": 0,
        "users": 2,
        "points": 5,
        "location": str(tmp_path / "store"),
        "message": "",
        "version": None,
        "collection_status": None,
        "indexed_vectors": None,
    }
    code = (
        "import json, sys; from attuned_store import MemoryStore\n"
        "store = MemoryStore(); store.restore_snapshot(sys.argv[1])\n"
        "print(json.dumps([[each.to_dict() for each in store.get_history(user)] for user in sorted(store)]))"
    )
    restored = run_python(code, answer.json()["results"][0]["path"])
    assert restored.returncode == 0, restored.stderr
    assert json.loads(restored.stdout) == [
        [STATES[1].to_dict(), STATES[0].to_dict()],
        [STATES[2].to_dict()],
    ]


async def test_without_a_directory_it_is_the_configured_one(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshots go where create_snapshot puts them, whether or not one is taken on start."""
    async with calling(snapshot_app(store)) as client:
        by_default = (await client.post("/api/snapshot")).json()["results"][0]
        monkeypatch.setenv("QDRANT_SNAPSHOT_ON_START", "no")
        monkeypatch.setenv("QDRANT_SNAPSHOT_DIR", str(tmp_path / "named"))
        named = (await client.post("/api/snapshot")).json()["results"][0]
    assert Path(by_default["path"]).parent == Path("data/qdrant/snapshots").absolute()
    assert Path(named["path"]).parent == tmp_path / "named"


async def test_older_snapshots_are_removed_beyond_keep(store: MemoryStore, tmp_path: Path) -> None:
    """With keep, so many of the newest stay."""
    async with calling(snapshot_app(store, directory=tmp_path / "backups", keep=2)) as client:
        names = [(await client.post("/api/snapshot")).json()["results"][0]["snapshot_name"] for _ in "123"]
    assert names_in(tmp_path / "backups") == names[1:]


async def test_a_failure_is_reported_and_the_others_go_on(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where some stores fail the answer is 207, where all do 503; each has its reason, in the log too."""
    closed = MemoryStore()
    closed.close()
    broken = AsyncMemoryStore()

    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("broken inside")

    monkeypatch.setattr(broken, "create_snapshot", fail)
    async with calling(snapshot_app(broken, store, closed, directory=tmp_path / "backups")) as client:
        answer = await client.post("/api/snapshot")
    assert (answer.status_code, answer.json()["status"]) == (207, "partial")
    results = answer.json()["results"]
    assert [result["status"] for result in results] == ["failed", "completed", "failed"]
    assert [result["reason"] for result in results] == ["api"] * 3
    assert (results[0]["message"], results[0]["path"]) == ("broken inside", None)
    assert "closed" in results[2]["message"]
    assert "broken inside" in caplog.text

    async with calling(snapshot_app(broken, closed, directory=tmp_path / "none")) as client:
        answer = await client.post("/api/snapshot")
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")
    assert len(answer.json()["results"]) == 2


async def test_a_directory_that_cannot_be_made_is_a_failure(store: MemoryStore, tmp_path: Path) -> None:
    """Where nothing can be written the answer says why."""
    (tmp_path / "file").write_text("precious")
    async with calling(snapshot_app(store, directory=tmp_path / "file" / "backups")) as client:
        answer = await client.post("/api/snapshot")
    assert answer.status_code == 503
    assert str(tmp_path / "file") in answer.json()["results"][0]["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are not UTF-8")
async def test_a_directory_whose_name_is_no_text(store: MemoryStore, tmp_path: Path) -> None:
    """Even a path that is not UTF-8 can be answered with."""
    async with calling(snapshot_app(store, directory=tmp_path / os.fsdecode(b"\xff"))) as client:
        answer = await client.post("/api/snapshot")
    assert (answer.status_code, states_in(answer.json()["results"][0]["path"])) == (200, STATES)


async def test_a_request_names_no_path(store: MemoryStore, tmp_path: Path) -> None:
    """Nothing in a request, neither path, query, body nor header, decides where a snapshot goes."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    named = {
        name: str(elsewhere) for name in ("directory", "path", "dir", "target", "file", "QDRANT_SNAPSHOT_DIR")
    }
    app = snapshot_app(store, directory=tmp_path / "backups")
    async with calling(app) as client:
        answers = [
            await client.post("/api/snapshot", params=named),
            await client.post("/api/snapshot", json=named),
            await client.post("/api/snapshot", data=named),
            await client.post("/api/snapshot", headers=named),
            await client.post("/api/snapshot", content=b"\x00" * 100_000),
        ]
        strange = [f"/api/snapshot/{elsewhere}", "/api/snapshot/..%2f..%2felsewhere", "/api/snapshot%00"]
        unknown = [await client.post(path) for path in strange]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert [answer.status_code for answer in unknown] == [404] * 3
    assert len(names_in(tmp_path / "backups")) == 5
    assert not list(elsewhere.iterdir())


# ------------------------------------------------------------------------------
# Several requests at once
# ------------------------------------------------------------------------------

FORMS = pytest.mark.parametrize("form", [MemoryStore, AsyncMemoryStore], ids=["sync", "async"])


@FORMS
async def test_a_second_request_joins_the_first(
    form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that come while one runs get its answer, and nothing is taken twice; later ones take anew."""
    store = form()
    gated = Gated(store, monkeypatch)
    app = snapshot_app(store, directory=tmp_path / "backups")
    answers: list[Any] = []
    later: list[Any] = []
    async with calling(app) as client:

        async def ask() -> None:
            answers.append(await client.post("/api/snapshot"))
            if len(answers) == 1:  # the others are about to get theirs
                later.append(await client.post("/api/snapshot"))

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(ask)
            await until(lambda: getattr(endpoint_of(app)._taking, "requests", 0) == 5)
            assert not answers
            gated.gate.set()
    assert [answer.status_code for answer in answers + later] == [200] * 6
    assert len({answer.text for answer in answers}) == 1
    assert later[0].text != answers[0].text
    assert (gated.begun, gated.finished) == (2, 2)
    assert len(names_in(tmp_path / "backups")) == 2


@FORMS
async def test_when_the_first_is_cancelled_another_goes_on(
    form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is given up leaves those that joined it with an answer, and nothing is done again."""
    quick, slow = form(), form()
    counted, gated = Gated(quick, monkeypatch), Gated(slow, monkeypatch)
    counted.gate.set()
    app = snapshot_app(quick, slow, directory=tmp_path / "backups")
    answers: list[Any] = []
    first = anyio.CancelScope()
    async with calling(app) as client:

        async def ask(scope: anyio.CancelScope) -> None:
            with scope:
                answers.append(await client.post("/api/snapshot"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, first)
            await until(lambda: gated.begun == 1)
            for _ in range(3):
                tasks.start_soon(ask, anyio.CancelScope())
            await until(lambda: endpoint_of(app)._taking.requests == 4)
            first.cancel()
            if form is AsyncMemoryStore:  # a thread is waited for, whatever becomes of its request
                await until(lambda: endpoint_of(app)._taking.requests == 3)
            gated.gate.set()
    waited_for = form is MemoryStore
    assert [answer.status_code for answer in answers] == [200] * (4 if waited_for else 3)
    assert (counted.begun, gated.begun, gated.finished) == (1, 1 if waited_for else 2, 1)
    assert len(names_in(tmp_path / "backups")) == 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled_without_its_thread(
    anyio_backend: str, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where asyncio cancels a request, and its thread goes on, who joined waits for the thread."""
    gated = Gated(store, monkeypatch)
    app = snapshot_app(store, directory=tmp_path / "backups")
    async with calling(app) as client:
        first = asyncio.create_task(client.post("/api/snapshot"))
        await until(lambda: gated.begun == 1)
        second = asyncio.create_task(client.post("/api/snapshot"))
        await until(lambda: endpoint_of(app)._taking.requests == 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gated.gate.set()
        answer = await second
    assert answer.status_code == 200
    assert (gated.begun, gated.finished) == (1, 1)
    assert len(names_in(tmp_path / "backups")) == 1


async def test_after_all_are_cancelled_the_next_takes_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was given up by all is forgotten: the next request reports of now alone."""
    quick, slow = AsyncMemoryStore(), AsyncMemoryStore()
    counted, gated = Gated(quick, monkeypatch), Gated(slow, monkeypatch)
    counted.gate.set()
    app = snapshot_app(quick, slow, directory=tmp_path / "backups")
    async with calling(app) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.post, "/api/snapshot")
            await until(lambda: gated.begun == 1)
            tasks.cancel_scope.cancel()
        assert endpoint_of(app)._taking is None
        gated.gate.set()
        answer = await client.post("/api/snapshot")
    assert answer.status_code == 200
    assert (counted.begun, gated.begun, gated.finished) == (2, 2, 1)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_one_application_in_several_event_loops(
    anyio_backend: str, store: MemoryStore, tmp_path: Path
) -> None:
    """An application made outside of any event loop works in one after another, asyncio or trio."""
    app = snapshot_app(store, directory=tmp_path / "backups")

    async def ask() -> int:
        async with calling(app) as client:
            return int((await client.post("/api/snapshot")).status_code)

    backends = ["asyncio", "asyncio", *(["trio"] if importlib.util.find_spec("trio") else []), "asyncio"]
    assert [anyio.run(ask, backend=backend) for backend in backends] == [200] * len(backends)


# ------------------------------------------------------------------------------
# Who may ask
# ------------------------------------------------------------------------------


def says(answer: Any) -> Callable[[object], Any]:
    return lambda _: answer


def says_later(answer: Any) -> Callable[[object], Awaitable[Any]]:
    async def later(_: object) -> Any:
        await anyio.lowlevel.checkpoint()
        return answer

    return later


@pytest.mark.parametrize(
    ("authorize", "code"),
    [
        *((says(answer), 401) for answer in (False, None, 1, "", says)),
        *((says_later(answer), 401) for answer in (False, None)),
        (says("ann"), 403),  # who is known, and may do nothing here
        (says_later("yes"), 403),
    ],
    ids=["False", "None", "1", "no text", "function", "later False", "later None", "text", "later text"],
)
async def test_who_is_not_authorized_is_refused(
    store: MemoryStore, tmp_path: Path, authorize: Any, code: int
) -> None:
    """Nothing but True, now or awaited, lets a request through; only /api/ready is for all."""
    app = snapshot_app(store, authorize=authorize, directory=tmp_path / "backups")
    async with calling(app) as client:
        for method, paths in PATHS.items():
            for path in paths:
                answer = await client.request(method, path)
                if path == "/api/ready":
                    assert answer.status_code == 200
                    continue
                assert answer.status_code == answer.json()["status"] == code, path
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.headers.get("www-authenticate") == ("Bearer" if code == 401 else None)
        assert (await client.head("/api/health")).status_code == code
    assert not (tmp_path / "backups").exists()


@pytest.mark.parametrize("authorize", [says(True), says_later(True)], ids=["now", "later"])
async def test_who_is_authorized_is_answered(store: MemoryStore, tmp_path: Path, authorize: Any) -> None:
    """True lets a request through, and the function sees the request."""
    seen: list[str] = []

    def watch(request: Any) -> Any:
        seen.append(request.url.path)
        return authorize(request)

    async with calling(snapshot_app(store, authorize=watch, directory=tmp_path / "backups")) as client:
        assert (await client.post("/api/snapshot")).status_code == 200
        assert (await client.get("/api/health")).status_code == 200
    assert seen == ["/api/snapshot", "/api/health"]


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
async def test_an_authorization_that_fails_lets_nobody_through(
    store: MemoryStore, tmp_path: Path, later: bool
) -> None:
    """Where the function raises, the answer is 500 and nothing is done."""

    def fail(_: object) -> bool:
        raise RuntimeError("the directory of users is down")

    async def fail_later(_: object) -> bool:
        await anyio.lowlevel.checkpoint()
        raise RuntimeError("the directory of users is down")

    app = snapshot_app(store, authorize=fail_later if later else fail, directory=tmp_path / "backups")
    async with calling(app, raise_app_exceptions=False) as client:
        answers = [await client.request(method, paths[0]) for method, paths in PATHS.items()]
    assert [answer.status_code for answer in answers] == [500, 500]
    assert "down" not in answers[0].text
    assert not (tmp_path / "backups").exists()


async def test_the_answer_of_an_http_exception_is_its_own(store: MemoryStore, tmp_path: Path) -> None:
    """An authorization may raise the HTTPException of Starlette or FastAPI."""
    from starlette.exceptions import HTTPException

    def fail(_: object) -> bool:
        raise HTTPException(403, "not you")

    async with calling(snapshot_app(store, authorize=fail, directory=tmp_path / "backups")) as client:
        assert (await client.post("/api/snapshot")).status_code == 403
    assert not (tmp_path / "backups").exists()


# ------------------------------------------------------------------------------
# Health, readiness, metrics
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "worst", "code"),
    [
        (["healthy", "healthy"], "healthy", 200),
        (["degraded", "healthy"], "degraded", 200),
        (["healthy", "unhealthy"], "unhealthy", 503),
        (["unhealthy", "degraded"], "unhealthy", 503),
    ],
)
async def test_health_is_that_of_the_worst(
    statuses: list[Any], worst: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The health of all is that of the worst; unhealthy is 503, and is not ready."""
    first, second = MemoryStore(), AsyncMemoryStore()

    async def health() -> Health:
        return Health(statuses[1], "memory", 1.0, users=7)

    monkeypatch.setattr(first, "health", lambda: Health(statuses[0], "memory", 1.0))
    monkeypatch.setattr(second, "health", health)
    async with calling(snapshot_app(first, second)) as client:
        answer, ready = await client.get("/api/health"), await client.get("/api/ready")
    assert (answer.status_code, answer.json()["status"]) == (code, worst)
    assert [found["status"] for found in answer.json()["stores"]] == statuses
    assert answer.json()["stores"][1]["users"] == 7
    assert (ready.status_code, ready.json()) == (code, {"ready": code == 200})


async def test_metrics_are_those_of_prometheus_client(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where prometheus_client is installed its metrics are handed out; elsewhere there are none."""
    pytest.importorskip("prometheus_client", reason="needs prometheus_client")
    async with calling(snapshot_app(store)) as client:
        answer = await client.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert "python_info{" in answer.text
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        assert (await client.get("/metrics")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/api/snapshot", 405),
        ("DELETE", "/api/snapshot", 405),
        ("POST", "/api/health", 405),
        ("POST", "/api/ready", 405),
        ("PUT", "/metrics", 405),
        ("GET", "/", 404),
        ("GET", "/api", 404),
        ("POST", "/api/snapshots", 404),
    ],
)
async def test_what_is_not_there(store: MemoryStore, method: str, path: str, code: int) -> None:
    """A wrong method is 405, an unknown path 404."""
    async with calling(snapshot_app(store)) as client:
        assert (await client.request(method, path)).status_code == code
    assert not Path("data").exists()


# ------------------------------------------------------------------------------
# Mounted, and badly made
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["starlette", pytest.param("fastapi", marks=needs("fastapi"))])
async def test_mounted_in_an_application(framework: str, store: MemoryStore, tmp_path: Path) -> None:
    """Mounted in Starlette or FastAPI it answers under its prefix."""
    if framework == "fastapi":
        from fastapi import FastAPI as Application
    else:
        from starlette.applications import Starlette as Application
    app: Any = Application()
    app.mount("/backup", snapshot_app(store, authorize=says(True), directory=tmp_path / "backups"))
    async with calling(app) as client:
        answer = await client.post("/backup/api/snapshot")
        assert (answer.status_code, states_in(answer.json()["results"][0]["path"])) == (200, STATES)
        assert (await client.get("/backup/api/ready")).json() == {"ready": True}
        assert (await client.get("/api/ready")).status_code == 404


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_an_application_that_makes_no_sense(anyio_backend: str, store: MemoryStore) -> None:
    """What the application is made with is checked when it is made."""
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("stores", (), {}),
        ("stores", ("./path",), {}),
        ("stores", (store, None), {}),
        ("authorize", (store,), {"authorize": "token"}),
        ("keep", (store,), {"keep": 0}),
        ("keep", (store,), {"keep": True}),
        ("path", (store,), {"directory": ""}),
        ("path", (store,), {"directory": 7}),
    ]
    for field, stores, options in wrong:
        with pytest.raises(ValidationError, match=f"^{field}: "):
            snapshot_app(*stores, **options)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_without_starlette_it_says_what_to_install(
    anyio_backend: str, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is asked for when the application is made, and the error says how to install it."""
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(MissingDependencyError, match=r"pip install starlette$"):
        snapshot_app(store)


# ------------------------------------------------------------------------------
# attuned-store serve
# ------------------------------------------------------------------------------

TOKEN = "s3cret-0123456789"  # noqa: S105 - it guards nothing
posix = pytest.mark.skipif(os.name != "posix", reason="needs the signals of POSIX")


class Served:
    """`attuned-store serve` as a process of its own."""

    def __init__(self, place: Path, *arguments: str, token: str | None = None, **variables: str) -> None:
        self.url = ""
        settings = {} if token is None else {"ATTUNED_STORE_TOKEN": token}
        words = [*command.PROGRAM, "--store", place, "serve", "--port", "0", *arguments]
        self.child = subprocess.Popen(
            list(map(str, words)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **environment(),
                "PYTHONPATH": command.environment()["PYTHONPATH"],
                "PYTHONUNBUFFERED": "1",
                **settings,
                **variables,
            },
        )

    def __enter__(self) -> Self:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        found = re.fullmatch(r"serving .*store on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, self.ended())
        self.url = found[1]
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.ended()

    def ended(self) -> tuple[int, str]:
        """Its exit status, and all that it wrote."""
        out, err = self.child.communicate(timeout=DEADLINE)
        return self.child.returncode, out + err


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A store on disk with two users and three states."""
    with open_store(tmp_path / "store") as store:
        store.upsert_many(STATES)
    return tmp_path / "store"


@posix
@pytest.mark.once
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
def test_serve_with_a_token(anyio_backend: str, place: Path, tmp_path: Path, signal_name: str) -> None:
    """Who knows the token is served, nobody else; SIGTERM and Ctrl-C end it, and the status is 0."""
    right = {"Authorization": f"Bearer {TOKEN}"}
    wrong = [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer \xff".encode("latin-1")},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"X-Token": TOKEN},
    ]
    blanks = f" {TOKEN}\n"  # as a file or a form gives it
    served = Served(place, "--directory", str(tmp_path / "backups"), "--keep", "1", token=blanks)
    with served, httpx.Client(base_url=served.url, timeout=DEADLINE) as client:
        for headers in wrong:
            answers = [client.post("/api/snapshot", headers=headers), client.get("/metrics", headers=headers)]
            assert [answer.status_code for answer in answers] == [401, 401], headers
        assert client.post("/api/snapshot", params={"token": TOKEN}).status_code == 401
        assert not (tmp_path / "backups").exists()
        assert client.get("/api/ready").json() == {"ready": True}
        assert client.get("/api/health", headers=right).json()["stores"][0]["users"] == 2
        assert client.get("/metrics", headers=right).status_code == (
            200 if importlib.util.find_spec("prometheus_client") else 404
        )
        assert client.get("/api/snapshot", headers=right).status_code == 405
        taken = [client.post("/api/snapshot", headers=right) for _ in range(2)]
        assert [answer.status_code for answer in taken] == [200, 200]
        assert "server" not in taken[0].headers
        report = taken[1].json()["results"][0]
        assert names_in(tmp_path / "backups") == [report["snapshot_name"]]
        assert states_in(report["path"]) == STATES
        served.child.send_signal(getattr(signal, signal_name))
        status, said = served.ended()
    assert (status, said.count("\n"), TOKEN in said) == (0, 2, False)
    for line, answer in zip(said.splitlines(), taken, strict=True):
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO snapshot ", line)
        assert answer.json()["results"][0]["path"] in line
    with open_store(place) as store:
        assert store.count() == 2


@posix
@pytest.mark.once
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_serve_without_a_token(anyio_backend: str, place: Path, tmp_path: Path) -> None:
    """Without a token this machine is served, but no page in a browser; a snapshot on start is taken."""
    on_start = {"QDRANT_SNAPSHOT_ON_START": "yes", "QDRANT_SNAPSHOT_DIR": str(tmp_path / "backups")}
    served = Served(place, **on_start)
    with served, httpx.Client(base_url=served.url, timeout=DEADLINE) as client:
        assert len(names_in(tmp_path / "backups")) == 1
        foreign = [
            {"Host": "evil.example"},
            {"Host": "127.0.0.1.evil.example"},
            {"Origin": "http://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ]
        for headers in [*foreign, {"Origin": "null"}, {"Host": ""}]:
            assert client.post("/api/snapshot", headers=headers).status_code == 401, headers
            assert client.get("/api/health", headers=headers).status_code == 401, headers
        for host in ("localhost:8080", "LocalHost", "127.0.0.1", "[::1]:8080"):
            assert client.get("/api/health", headers={"Host": host}).status_code == 200, host
        for site in ("none", "same-origin"):
            assert client.get("/api/health", headers={"Sec-Fetch-Site": site}).status_code == 200, site
        assert len(names_in(tmp_path / "backups")) == 1
        assert client.post("/api/snapshot").status_code == 200
        assert len(names_in(tmp_path / "backups")) == 2
        served.child.terminate()
        status, said = served.ended()
    assert (status, said.count(" INFO snapshot "), said.count("\n")) == (0, 2, 2)


@posix
@pytest.mark.once
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_serve_shares_a_directory(anyio_backend: str, place: Path, tmp_path: Path) -> None:
    """States are read and written over HTTP while the directory is taken, and the refusal says so."""
    served = Served(place)
    with served, httpx.Client(base_url=served.url, timeout=DEADLINE) as client:
        refused = run_python("import sys, attuned_store as a; a.open_store(sys.argv[1])", str(place))
        assert "StoreLockedError" in refused.stderr
        assert "attuned-store serve" in refused.stderr
        assert client.get("/api/states/ann").json() == STATES[1].to_dict()
        tag = client.get("/api/states/ann").headers["etag"]
        patch = {"axes": {"warmth": 0.5}, "updated_at_unix_ms": "2026-01-17T12:00Z"}
        merged = client.patch("/api/states/ann", json=patch, headers={"If-Match": tag})
        assert (merged.status_code, merged.json()["axes"]) == (200, {"warmth": 0.5})
        assert client.put("/api/states/c%2Fd", json={"axes": {}}).status_code == 201
        assert (
            client.put("/api/states/x", json={"axes": {}}, headers={"Host": "evil.example"}).status_code
            == 401
        )
        found = client.post("/api/search", json={"query": {"warmth": 1}, "limit": 1}).json()["matches"]
        assert found[0]["state"]["user_id"] == "bob"
        assert client.delete("/api/states/bob").status_code == 204
        lead = client.get("/", follow_redirects=True)
        assert (lead.status_code, lead.url.path, served.url in lead.text) == (200, "/docs", True)
        served.child.terminate()
        assert served.ended() == (0, "")
    with open_store(place) as store:
        assert sorted(store) == ["ann", "c/d"]
        assert [state.axes["warmth"] for state in store.get_history("ann")] == [0.5, 0.75, 0.25]


@posix
@pytest.mark.once
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_serve_without_a_place_for_snapshots(anyio_backend: str, place: Path, tmp_path: Path) -> None:
    """Where the snapshot on start has no place to go, nothing is served."""
    (tmp_path / "file").write_text("precious")
    on_start = {"QDRANT_SNAPSHOT_ON_START": "1", "QDRANT_SNAPSHOT_DIR": str(tmp_path / "file")}
    failed = Served(place, **on_start)
    assert failed.ended() == (1, f"attuned-store: {tmp_path / 'file'}: cannot be made: File exists\n")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_a_token_is_shown_to_nobody(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither repr nor str of what holds the token shows it."""
    monkeypatch.setenv("ATTUNED_STORE_TOKEN", TOKEN)
    authorize = command.module("service").authorization("127.0.0.1")
    assert TOKEN not in f"{authorize!r} {authorize}"

"""Fixtures: a test that asks for a store runs once for each backend and face that its class names."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

ROOT = Path(__file__).resolve().parent.parent
MADE_ANEW = False
if not os.environ.get("ATTUNED_TEST_WHEEL"):
    sys.path.append(str(ROOT / "src"))
    from make import refresh

    MADE_ANEW = refresh(ROOT)  # before it is imported

pytest.register_assert_rewrite("conformance")

from conformance import BACKENDS, FACES, Awaited, Case, Clock, Open, cases, loopback, needs  # noqa: E402

import attuned_store  # noqa: E402
from attuned_store import AsyncQdrantStore, AsyncStateStore, QdrantStore, RetryPolicy, StateStore  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from qdrant_server import QdrantServer


_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory, on Linux
_ROOM = 4 << 30  # bytes: a fresh Edge shard takes 110 MB there
_made_here = pytest.StashKey[str]()


def pytest_report_header() -> list[str]:
    """Say where the file under test was stale."""
    return ["attuned_store.py was stale: made anew from src/attuned"] if MADE_ANEW else []


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Put temporary directories into memory where there is room: making a shard costs a quarter then."""
    if config.option.basetemp is None and _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM:
        config.stash[_made_here] = config.option.basetemp = tempfile.mkdtemp(prefix="pytest-", dir=_MEMORY)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what pytest_configure made; the workers of pytest-xdist are within it."""
    shutil.rmtree(config.stash.get(_made_here, ""), ignore_errors=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `case` the backends and faces of the class of the test: ids are memory-sync, edge-trio, ..."""
    if "case" in metafunc.fixturenames:
        backends = getattr(metafunc.cls, "backends", tuple(BACKENDS))
        faces = getattr(metafunc.cls, "faces", FACES)
        metafunc.parametrize("case", cases(backends, faces))


def pytest_sessionfinish() -> None:
    """Close the loopback server, if a test asked for it."""
    if loopback.cache_info().currsize:
        loopback().close()


@pytest.fixture
def server() -> Iterator[QdrantServer]:
    """A loopback server of its own for the test; whatever hangs is let go at the end."""
    from qdrant_server import QdrantServer

    with QdrantServer() as server:
        yield server
        server.calm()


@pytest.fixture(
    params=[pytest.param(face, marks=needs("trio" if face == "trio" else None)) for face in FACES]
)
def face(request: pytest.FixtureRequest) -> str:
    """The form of a store on a server of its own: sync, asyncio or trio."""
    return cast("str", request.param)


@pytest.fixture
def server_options() -> dict[str, Any]:
    """What `connect` gives every store: no certificates are loaded, and no retry waits."""
    return {"verify": False, "retry": RetryPolicy(base_s=0)}


@pytest.fixture
async def connect(
    face: str, server: QdrantServer, server_options: dict[str, Any]
) -> AsyncIterator[Callable[..., AsyncStateStore]]:
    """A function that makes a store of the face on the server, which has not sent anything yet."""
    stores: list[AsyncStateStore] = []

    def connect(**options: Any) -> AsyncStateStore:
        options = {"url": server.url, **server_options, **options}
        store = Awaited(QdrantStore(**options)) if face == "sync" else AsyncQdrantStore(**options)
        stores.append(cast("AsyncStateStore", store))
        return stores[-1]

    yield connect
    server.calm()
    for store in stores:
        await store.aclose()
    if face == "trio":
        gc.collect(1)  # what warns in the course of it belongs to this test


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The event loop of the case or face; a synchronous store is called from asyncio, as in a notebook."""
    if "case" in request.fixturenames:
        return cast("Case", request.getfixturevalue("case")).event_loop
    return "trio" if request.getfixturevalue("face") == "trio" else "asyncio"


@pytest.fixture
async def open_store(case: Case, tmp_path: Path) -> AsyncIterator[Open]:
    """A function that opens a store with the options given, at one path unless it is given another name."""
    stores: list[AsyncStateStore] = []

    async def open_one(name: str = "store", **options: Any) -> AsyncStateStore:
        stores.append(await case.open(tmp_path / name, **options))
        return stores[-1]

    yield open_one
    for store in stores:
        await store.aclose()


@pytest.fixture
async def store(open_store: Open) -> AsyncStateStore:
    """An empty store with the default options."""
    return await open_store()


@pytest.fixture
def sync_store(case: Case, tmp_path: Path) -> Iterator[StateStore]:
    """An empty synchronous store as it is, not wrapped."""
    with case.open_sync(tmp_path / "store") as store:
        yield store


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The wall clock, which stands at NOW until the test moves it."""
    clock = Clock()
    monkeypatch.setattr(attuned_store.wall_clock, "now_ms", clock)
    attuned_store.wall_clock._given.clear()  # times that other tests were given
    return clock


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing can be created, even by root."""
    path = tmp_path / "read-only"
    path.mkdir(mode=0o500)
    yield Path("/proc") if os.access(path, os.W_OK) else path
    path.chmod(0o700)

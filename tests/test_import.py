"""What importing the library costs, and what works without the optional ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from conformance import QUERY, random_states, run_python

from attuned_store import MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

OPTIONAL = [
    "qdrant_client",
    "qdrant_edge",
    "anyio",
    "numpy",
    "httpx",
    "trio",
    "opentelemetry",
    "prometheus_client",
    "starlette",
    "uvicorn",
]

IMPORTED = """
import json, sys
before = set(sys.modules)
import attuned_store
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(loaded - sys.stdlib_module_names)))
"""
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""
USE = """
import json, sys
from attuned_store import MemoryStore, StateSnapshot
states = [StateSnapshot.from_dict(fields) for fields in json.load(sys.stdin)]
with MemoryStore() as store:
    assert store.upsert_many(states) == len(states)
    assert store.get_latest(states[0].user_id) == states[0] == store[states[0].user_id]
    assert store.get_history(states[0].user_id) == [states[0]]
    assert sorted(store.users()) == sorted(state.user_id for state in states)
    found = store.search_similar(json.loads(sys.argv[2]), limit=len(states), history=sys.argv[3] == "history")
    print(json.dumps({match.snapshot.user_id: match.score for match in found}))
"""
USE_ASYNC = """
import asyncio, json, sys
from attuned_store import AsyncMemoryStore, StateSnapshot
states = [StateSnapshot.from_dict(fields) for fields in json.load(sys.stdin)]
async def main():
    async with AsyncMemoryStore() as store:
        assert await store.upsert_many(iter(states)) == len(states)
        assert {user_id async for user_id in store.users()} == {state.user_id for state in states}
        assert await store.patch("new", {"warmth": 0.5}) == await store.get_latest("new")
        assert await store.delete("new")
        found = await store.search_similar(
            json.loads(sys.argv[2]), limit=len(states), history=sys.argv[3] == "history"
        )
        assert await store.prune() == 0
        print(json.dumps({match.snapshot.user_id: match.score for match in found}))
asyncio.run(main())
"""

CANCELLED = """
import asyncio, threading
from pathlib import Path
from tempfile import mkdtemp
import attuned_store
from attuned_store import AsyncMemoryStore
reached, go = threading.Event(), threading.Event()
real = attuned_store.NewFile.commit
def held_up(new, names):
    reached.set()
    assert go.wait(60)
    return real(new, names)
attuned_store.NewFile.commit = held_up
async def main():
    async with AsyncMemoryStore() as store:
        await store.patch("ann", {"warmth": 0.5})
        directory = Path(mkdtemp())
        task = asyncio.create_task(store.create_snapshot(directory))
        while not reached.is_set():
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()  # its thread still writes to the file
        go.set()
        await asyncio.wait([task])
        assert task.cancelled()
        written, = directory.iterdir()
        print((await attuned_store.averify_snapshot(written)).points)
asyncio.run(main())
"""


def test_importing_loads_attrs_and_cachetools_at_most() -> None:
    """Importing the library loads no other library than attrs and cachetools."""
    answer = run_python(IMPORTED)

    assert answer.returncode == 0, answer.stderr
    loaded = set(json.loads(answer.stdout))
    assert not loaded & set(OPTIONAL)
    assert loaded <= {"attuned_store", "attr", "attrs", "cachetools"}


def test_importing_prints_nothing() -> None:
    """Importing the library writes nothing and warns of nothing."""
    answer = run_python("import warnings; warnings.simplefilter('error'); import attuned_store")

    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


@pytest.mark.parametrize("code", [USE, USE_ASYNC], ids=["sync", "asyncio"])
@pytest.mark.parametrize("blocked", [",".join(OPTIONAL), "numpy"], ids=["all", "numpy"])
@pytest.mark.parametrize("searched", ["latest", "history"])
def test_memory_needs_no_optional_library(code: str, blocked: str, searched: str) -> None:
    """Stores in memory work without any optional library, and without numpy scores are the same."""
    states = random_states(2_000, seed=13)
    store = MemoryStore()
    store.upsert_many(states)
    expected = {m.snapshot.user_id: m.score for m in store.search_similar(QUERY, limit=len(states))}

    answer = run_python(
        BLOCK + code, blocked, json.dumps(QUERY), searched, stdin=json.dumps([s.to_dict() for s in states])
    )

    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("absent", ["attrs", "cachetools"])
def test_what_every_store_needs_is_named(absent: str) -> None:
    """Where a library that every store needs is missing, the last line says what to install."""
    answer = run_python(BLOCK + "import attuned_store", absent)

    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1] == (
        "ImportError: attuned_store needs attrs and cachetools: pip install attrs cachetools"
    )


def test_opening_memory_loads_no_engine() -> None:
    """A program that only uses memory never pays for the engines."""
    answer = run_python(
        "import sys, attuned_store\n"
        "with attuned_store.open_store('memory://') as store:\n"
        "    store.patch('ann', {'warmth': 0.5})\n"
        "print([name for name in ('qdrant_client', 'qdrant_edge', 'httpx', 'trio') if name in sys.modules])"
    )

    assert answer.stdout == "[]\n", answer.stderr


LOADING = """
import asyncio, sys, threading, attuned_store

loading = []

class Finder:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == "anyio._backends._asyncio":
            loading.append(threading.current_thread() is threading.main_thread())

sys.meta_path.insert(0, Finder)

async def main():
    async with OPEN as store:
        await store.upsert_many([attuned_store.StateSnapshot("ann", {"warmth": 0.5})])
        await store.search_similar("ann")

asyncio.run(main())
print(loading)
"""


@pytest.mark.parametrize("store", ["AsyncMemoryStore()", "AsyncQdrantStore(path=sys.argv[1])"])
def test_no_event_loop_is_held_up_by_loading_anyio(store: str, tmp_path: Path) -> None:
    """What anyio loads at its first use takes 0.1 s: a worker thread does that."""
    answer = run_python(LOADING.replace("OPEN", f"attuned_store.{store}"), tmp_path / "states")

    assert answer.stdout == "[False]\n", answer.stderr


def test_a_snapshot_that_is_cancelled_without_anyio_waits_for_its_thread() -> None:
    """The worker thread of asyncio alone is not left behind with a file that is closed under it."""
    answer = run_python(BLOCK + CANCELLED, ",".join(OPTIONAL))

    assert (answer.returncode, answer.stdout) == (0, "1\n"), answer.stderr


@pytest.mark.parametrize("engine", ["edge", "local"])
def test_an_asynchronous_store_on_disk_says_that_it_needs_anyio(engine: str, tmp_path: Path) -> None:
    """It says so when it is opened, before it has made anything."""
    code = (
        "import asyncio, attuned_store, sys\n"
        "try:\n"
        "    asyncio.run(attuned_store.AsyncQdrantStore(path=sys.argv[2], engine=sys.argv[3]).count())\n"
        "except attuned_store.MissingDependencyError as error:\n"
        "    print(error)\n"
    )
    answer = run_python(BLOCK + code, "anyio", tmp_path / "states", engine)

    assert answer.stdout == "an asynchronous store on disk needs anyio: pip install anyio\n", answer.stderr
    assert not (tmp_path / "states").exists()

"""A full disk is an error before anything is written; what can wait is put off; a close that fails closes.

No signal, nothing acknowledged lost, no store that does not open again. Where file systems may be mounted a
small one is filled to the last byte, elsewhere there is a stand-in for what is free alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pytest
from conformance import BACKENDS, NOW, needs, state
from filling import SCENARIOS

import attuned_store
from attuned_store import AsyncQdrantStore, BackendError, MemoryStore, QdrantStore, SchemaMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Engine = Literal["edge", "local"]
MIB = 1 << 20
ROOM = {"edge": 256, "local": 60}  # MiB of the small file system
ENGINES = [pytest.param(name, marks=needs(BACKENDS[name].library)) for name in ("edge", "local")]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each of the embedded engines."""
    return cast("Engine", request.param)


@pytest.fixture
def small_disk(engine: Engine, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    if sys.platform != "linux" or os.geteuid() or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root on Linux")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM[engine]}m", "tmpfs", str(path)]
    mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.once
@pytest.mark.parametrize("_turn", range(7 if os.environ.get("ATTUNED_TEST_LONG") else 1))
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_disk_that_is_filled_to_the_last_byte(
    scenario: str, engine: Engine, small_disk: Path, _turn: int
) -> None:
    """Every way of using a store meets a full disk: errors, no signal, nothing lost, and all goes on."""
    script = Path(__file__).with_name("filling.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(script), scenario, engine, str(small_disk)],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr


def kind_of(engine: Engine) -> Any:
    return {"edge": attuned_store.EdgeEngine, "local": attuned_store.LocalEngine}[engine]


def engine_of(store: QdrantStore) -> Any:
    place: Any = store._operations.place
    return place.directory.engine


@pytest.fixture
def free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that says how many bytes are free."""

    def say(free: int) -> None:
        monkeypatch.setattr(kind_of(engine), "free_bytes", staticmethod(lambda _path: free))

    return say


def test_writes_are_refused_and_reads_go_on(
    engine: Engine, free: Callable[[int], None], tmp_path: Path
) -> None:
    """What changes a store on a full disk is an error that says what to do; then all is as it was."""
    with MemoryStore() as source:
        source.upsert_latest(state("eve"))
        saved = source.create_snapshot(directory=tmp_path / "backups")
    store = QdrantStore(path=tmp_path / "store", engine=engine)
    store.upsert_latest(state("ann", 1))
    free(100_000)

    for change in (
        lambda: store.upsert_latest(state("ann", 2)),
        lambda: store.upsert_latest(state("ann", 2), expected=state("ann", 1)),
        lambda: store.upsert_many([state("ann", 2), state("bob")]),
        lambda: store.patch("ann", {"warmth": 0.75}),
        lambda: store.delete("ann"),
        lambda: store.restore_snapshot(saved.path),
        lambda: store.restore_snapshot(saved.path, mode="merge"),
        lambda: QdrantStore(path=tmp_path / "store", engine=engine, collection_name="other"),
    ):
        with pytest.raises(BackendError, match=r"needs .* free, there are 0\.1; .* min_free_bytes") as caught:
            change()
        assert not caught.value.ambiguous
        assert caught.value.retryable
        assert store.get_history("ann") == [state("ann", 1)]
        assert list(store.users()) == ["ann"]
    health = store.health()
    assert (health.status, "the disk is full" in str(health.message)) == ("degraded", True)

    free(10**12)
    assert store.health().status == "healthy"
    store.upsert_latest(state("ann", 2))
    store.close()
    with QdrantStore(path=tmp_path / "store", engine=engine) as store:
        assert store.get_history("ann") == [state("ann", 2), state("ann", 1)]


@needs("qdrant_edge")
def test_the_limit_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write needs min_free_bytes and four times what it holds; stores on one directory agree on it."""
    monkeypatch.setattr(attuned_store.EdgeEngine, "free_bytes", staticmethod(lambda _path: 10 * MIB))
    with pytest.raises(BackendError, match=r"open needs 64\.0 MiB free, there are 10\.0"):
        QdrantStore(path=tmp_path, engine="edge")
    with QdrantStore(path=tmp_path, engine="edge", min_free_bytes=8 * MIB, max_history_per_user=0) as store:
        store.upsert_latest(state("ann"))
        store.upsert_many([state(f"user-{number}") for number in range(200)])
        with pytest.raises(SchemaMismatchError, match="min_free_bytes"):
            QdrantStore(path=tmp_path, engine="edge", max_history_per_user=0)
    wide = {f"axis_{number}": 0.1234567890123 for number in range(1_000)}
    limit = 10 * MIB - 50_000
    with QdrantStore(
        path=tmp_path, engine="edge", collection_name="wide", axes=list(wide), min_free_bytes=limit
    ) as store:
        store.upsert_latest(state("ann", axes={"axis_1": 0.5}))
        with pytest.raises(BackendError, match="write needs"):
            store.upsert_latest(state("ann", axes=wide))
        assert store.count() == 1


def test_the_room_is_that_of_the_disk(engine: Engine, tmp_path: Path) -> None:
    """What is free is what the operating system says of the directory."""
    found = kind_of(engine).free_bytes(str(tmp_path))
    assert abs(found - shutil.disk_usage(tmp_path).free) < 256 * MIB


# ------------------------------------------------------------------------------
# What can wait
# ------------------------------------------------------------------------------


def test_rebuilding_that_fails_is_put_off(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A write is done though tidying up after it fails: told once, shown in health, and tried again."""
    kind = kind_of(engine)
    monkeypatch.setattr(kind, "_REBUILD_EVERY", 4)
    tried = list[int]()

    def fail(*_: object, **__: object) -> None:
        tried.append(1)
        raise OSError("Not enough space available for optimization")

    store = QdrantStore(path=tmp_path, engine=engine, max_history_per_user=1)
    below = engine_of(store)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "attuned_store"):
        if engine == "edge":

            class Full:
                """A shard that has no room for rebuilding."""

                optimize = fail

                def __init__(self, shard: Any) -> None:
                    self._shard = shard

                def __getattr__(self, name: str) -> Any:
                    return getattr(self._shard, name)

            patch.setitem(below._shards, "attuned_state", Full(below._shards["attuned_state"]))
        else:
            patch.setattr(below, "check_room", fail)
            patch.setattr(below, "check_room_for", lambda *_: None)
        for number in range(12):
            store.update("ann", lambda found, number=number: state("ann", number + 1))
        assert len(tried) == 1  # the next attempt comes later
        below._put_off["rebuilding"] = ("", 0.0)
        store.upsert_latest(state("ann", 13))
        assert len(tried) == 2
        assert store.count(history=True) == 1
    told = [record.message for record in caplog.records]
    assert [("rebuilding is put off" in each, "Not enough space" in each) for each in told] == [(True, True)]
    health = store.health()
    assert (health.status, "rebuilding is put off" in str(health.message)) == ("degraded", True)

    monkeypatch.setattr(kind, "RETRY_S", 0.0)
    below._put_off["rebuilding"] = ("rebuilding is put off", 0.0)
    store.upsert_latest(state("ann", 14))
    assert store.health().status == "healthy"
    store.close()
    with QdrantStore(path=tmp_path, engine=engine, max_history_per_user=1) as store:
        assert store.get_latest("ann") == state("ann", 14)


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_flush_that_fails(
    engine: Engine,
    durability: Literal["process", "power"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a write is to survive a power cut, its error says that it was done; else it is no error."""
    monkeypatch.setattr(attuned_store.EdgeEngine, "_FLUSH_EVERY", 1)
    monkeypatch.setattr(attuned_store.EdgeEngine, "RETRY_S", 0.0)
    with QdrantStore(path=tmp_path, engine=engine, durability=durability) as store:
        store.upsert_latest(state("ann", 1))
        with monkeypatch.context() as patch:
            if engine == "edge":
                # Another process takes what is left between the write and its flush.
                left = iter([10**12])
                patch.setattr(attuned_store.EdgeEngine, "free_bytes", staticmethod(lambda _: next(left, 0)))
            else:

                def fail(descriptor: int) -> None:
                    raise OSError(28, "No space left on device")

                patch.setattr(os, "fsync", fail)
            if durability == "power":
                with pytest.raises(BackendError, match="may not survive a power cut") as caught:
                    store.upsert_latest(state("ann", 2))
                assert caught.value.ambiguous
            else:
                store.upsert_latest(state("ann", 2))
                if engine == "edge":
                    assert "flushing is put off" in str(store.health().message)
            assert store.get_latest("ann") == state("ann", 2)
        store.upsert_latest(state("ann", 3))
        assert store.health().status == "healthy"
    with QdrantStore(path=tmp_path, engine=engine, durability=durability) as store:
        assert [each.updated_at_unix_ms for each in store.get_history("ann")] == [NOW + 3, NOW + 2, NOW + 1]


# ------------------------------------------------------------------------------
# A close that fails
# ------------------------------------------------------------------------------


def fail_to_close(engine: Engine, store: QdrantStore, patch: pytest.MonkeyPatch) -> None:
    """Make one of two collections fail as it is closed, once."""
    below = engine_of(store)
    if engine == "edge":

        class Unclosable:
            """A shard that cannot be flushed."""

            def __init__(self, shard: Any) -> None:
                self._shard = shard

            def __getattr__(self, name: str) -> Any:
                return getattr(self._shard, name)

            def flush(self) -> None:
                raise OSError("input/output error")

        patch.setitem(below._shards, "one", Unclosable(below._shards["one"]))
        return
    held, left = below._client.collections["one"], iter([True])
    close = held.close

    def fail() -> None:
        if next(left, False):
            raise OSError("input/output error")
        close()

    patch.setattr(held, "close", fail)


def test_a_close_that_fails_closes(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is let go of, the first error is told, also by a second close, and all can be opened again."""
    names = ("zero", "one", "two")
    stores = [QdrantStore(path=tmp_path, engine=engine, collection_name=name) for name in names]
    for store in stores:
        store.upsert_latest(state("ann"))
    fail_to_close(engine, stores[0], monkeypatch)
    for store in stores[1:]:
        store.close()
    for _ in range(2):
        with pytest.raises(BackendError, match="close failed: input/output error"):
            stores[0].close()

    for name in names:
        with QdrantStore(path=tmp_path, engine=engine, collection_name=name) as store:
            assert store.get_latest("ann") == state("ann")
            store.upsert_latest(state("bob"))
    code = (
        "import sys; from attuned_store import QdrantStore\n"
        "for name in sys.argv[2:]: assert len(QdrantStore(path=sys.argv[1], collection_name=name)) == 2"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), *names], env=environment, check=True)


@needs("qdrant_edge")
def test_closing_without_room_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An asynchronous store, too, is closed on a full disk, without a flush, and opened with all it held."""

    async def use() -> None:
        store = AsyncQdrantStore(path=tmp_path, engine="edge")
        await store.upsert_many([state(f"user-{number}") for number in range(100)])
        with monkeypatch.context() as patch:
            patch.setattr(attuned_store.EdgeEngine, "free_bytes", staticmethod(lambda _path: 0))
            for _ in range(2):
                with pytest.raises(BackendError, match=r"the disk is full: close .* closed without a flush"):
                    await store.aclose()
        async with AsyncQdrantStore(path=tmp_path, engine="edge") as store:
            assert await store.count() == 100

    asyncio.run(use())

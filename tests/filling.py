"""What a process does to a store while its disk is full: run as a script, a signal would end it.

``python filling.py <scenario> <engine> <disk>``: a small file system, on which each scenario fills all that
is free to the last byte, looks, makes room again and goes on.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attuned_store
from attuned_store import (
    BackendError,
    MemoryStore,
    QdrantStore,
    SnapshotError,
    StateSnapshot,
    StoreError,
    copy,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NOW = 1_768_000_000_000
MIB = 1 << 20
FILL = "import sys\nfile = open(sys.argv[1], 'ab', 0)\nwhile file.write(bytes(4096)):\n    pass"


def states(first: int, end: int, time_ms: int = NOW) -> list[StateSnapshot]:
    axes = dict.fromkeys(attuned_store.CANONICAL_AXES, 0.25)
    return [StateSnapshot(f"user-{number}", axes, time_ms) for number in range(first, end)]


class Disk:
    """A small file system, its store, and the file that fills it."""

    def __init__(self, engine: Any, path: Path) -> None:
        self.path, self.filler = path, path / "filler"
        self.options: dict[str, Any] = {"path": path / "store", "engine": engine, "slow_operation_ms": None}
        self.written: dict[str, int] = {}  # the times of what was acknowledged

    def open(self, **options: Any) -> QdrantStore:
        return QdrantStore(**self.options, **options)

    def free(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def fill(self, leaving: int = 0) -> None:
        """Take what room there is, to the last byte or all but so much."""
        with self.filler.open("ab", 0) as file, contextlib.suppress(OSError):
            while (more := self.free() - leaving) > 0 or not leaving:
                file.write(bytes(max(1, min(MIB, more))))

    def make_room(self) -> None:
        self.filler.unlink(missing_ok=True)

    def write(self, store: QdrantStore, batch: Iterable[StateSnapshot]) -> None:
        batch = list(batch)
        try:
            store.upsert_many(batch)
        except StoreError as error:
            batch = batch[: error.written or 0]
            raise
        finally:
            self.written.update((each.user_id, each.updated_at_unix_ms) for each in batch)

    def check(self, store: QdrantStore) -> None:
        """All that was acknowledged is there, and everything can be read."""
        users = list(self.written)
        found = store.get_many(users)
        assert {user: found[user].updated_at_unix_ms for user in users if user in found} == self.written
        assert set(store.users()) >= set(users)
        assert store.get_history(users[0])
        assert store.search_similar(states(0, 1)[0], limit=3)
        assert store.count() >= len(users)

    def refused(self, call: Callable[[], object], kind: type[StoreError] = BackendError) -> StoreError:
        try:
            call()
        except kind as error:
            return error
        raise AssertionError("a full disk was not noticed")

    def go_on(self) -> None:
        """With room again all goes on, and is there after opening once more."""
        self.make_room()
        for round_ in range(2):
            with self.open() as store:
                self.check(store)
                self.write(store, states(0, 100, NOW + 1_000 + round_))
                self.check(store)
                assert store.health().status == "healthy"


def writing(disk: Disk) -> None:
    """Another process fills the disk while this one writes."""
    store = disk.open()
    disk.write(store, states(0, 500))
    other = subprocess.Popen([sys.executable, "-c", FILL, str(disk.filler)], stderr=subprocess.DEVNULL)

    def write_on() -> None:
        for number in range(100_000):
            disk.write(store, states(500 + 100 * number, 600 + 100 * number))

    error = disk.refused(write_on)
    # It may fill up between the look and the write, which local mode survives.
    assert "min_free_bytes" in str(error) or "disk is full" in str(error), error
    other.wait()
    disk.fill()
    for call in (
        lambda: store.upsert_latest(states(0, 1, NOW + 1)[0]),
        lambda: store.upsert_many(states(0, 90, NOW + 1)),
        lambda: store.delete("user-0"),
        lambda: store.patch("user-0", {"warmth": 0.5}),
    ):
        assert not getattr(disk.refused(call), "ambiguous", False)
    disk.check(store)
    health = store.health()
    assert health.status == "degraded" and "full" in str(health.message), health  # noqa: PT018
    disk.make_room()
    disk.write(store, states(0, 200, NOW + 2))
    assert store.delete("user-7")
    del disk.written["user-7"]
    disk.check(store)
    store.close()
    disk.go_on()


def opening(disk: Disk) -> None:
    """A store whose process was killed is opened on a full disk; and one that is not there yet."""
    child = os.fork()
    if not child:
        disk.write(disk.open(), states(0, 1_500))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    disk.written = {each.user_id: each.updated_at_unix_ms for each in states(0, 1_500)}
    disk.fill()
    for _ in range(2):
        try:
            with disk.open() as store:
                disk.check(store)
        except StoreError as error:
            assert "full" in str(error), error  # noqa: PT017 - a store that opens will do, too
    disk.refused(lambda: QdrantStore(**{**disk.options, "path": disk.path / "new"}), StoreError)
    disk.go_on()
    QdrantStore(**{**disk.options, "path": disk.path / "new"}).close()


def closing(disk: Disk) -> None:
    """A store on a full disk is closed, and opened again in the same process."""
    store = disk.open()
    disk.write(store, states(0, 1_500))
    disk.fill()
    if disk.options["engine"] == "edge":
        error = disk.refused(store.close)
        assert disk.refused(store.close) is error
    store = None  # type: ignore[assignment]
    disk.go_on()
    disk.open()  # which the end of the program closes
    disk.fill()


def flushing(disk: Disk) -> None:
    """The disk fills between a write and its flush."""
    attuned_store.EdgeEngine._FLUSH_EVERY = 1
    attuned_store.EdgeEngine.RETRY_S = 0.0
    store = disk.open()
    place: Any = store._operations.place
    engine = place.directory.engine
    flush = engine.flush

    def fill_and_flush() -> None:
        disk.fill()
        flush()

    engine.flush = fill_and_flush
    disk.write(store, states(0, 50))  # the flush is put off
    disk.check(store)
    if disk.options["engine"] == "edge":
        assert "flushing is put off" in str(store.health().message)
    engine.flush = flush
    disk.make_room()
    disk.write(store, states(50, 100))
    assert store.health().status == "healthy", store.health()
    store.close()
    disk.go_on()


def rebuilding(disk: Disk) -> None:
    """There is room for a write, and none for what is to be tidied up after it."""
    attuned_store.EdgeEngine._REBUILD_EVERY = attuned_store.LocalEngine._REBUILD_EVERY = 50
    attuned_store.EdgeEngine.RETRY_S = attuned_store.LocalEngine.RETRY_S = 0.0
    with disk.open(max_history_per_user=3) as store:
        for time_ms in range(NOW, NOW + 4):
            disk.write(store, states(0, 100, time_ms))
        told = set[str]()
        for step in range(10):
            disk.make_room()
            disk.fill(leaving=(74 - 2 * step) * MIB if step < 9 else 0)
            with contextlib.suppress(BackendError):
                disk.write(store, states(0, 60, NOW + 100 + step))
            told.add(str(store.health().message))
            disk.check(store)
        assert disk.options["engine"] == "local" or any("rebuilding is put off" in each for each in told)
        disk.make_room()
        for time_ms in range(NOW + 200, NOW + 204):
            disk.write(store, states(0, 100, time_ms))
        assert store.health().status == "healthy", store.health()
    disk.options["max_history_per_user"] = 3
    disk.go_on()


def restoring(disk: Disk) -> None:
    """A restore meets a disk that another process fills meanwhile."""
    with tempfile.TemporaryDirectory() as directory, MemoryStore() as source:
        source.upsert_many(states(0, 1_500, NOW + 5))
        saved = source.create_snapshot(directory=directory)
        with disk.open() as store:
            disk.write(store, states(0, 300))

            def fill(done: int, _total: int | None) -> None:
                if done > 500:
                    disk.fill()

            for mode in ("replace", "merge", "skip"):
                disk.make_room()
                before = len(store)
                disk.refused(lambda mode=mode: store.restore_snapshot(saved.path, mode=mode, progress=fill))
                if mode == "replace":
                    assert len(store) == before
                    disk.check(store)
            disk.make_room()
            store.restore_snapshot(saved.path)
            disk.written = {each.user_id: each.updated_at_unix_ms for each in states(0, 1_500, NOW + 5)}
            disk.check(store)
    disk.go_on()


def snapshotting(disk: Disk) -> None:
    """There is no room for a snapshot."""
    with disk.open() as store:
        disk.write(store, states(0, 1_000))
        disk.fill()
        backups = disk.path / "backups"
        disk.refused(lambda: store.create_snapshot(directory=backups), SnapshotError)
        disk.check(store)
        assert not backups.exists() or not list(backups.iterdir())
        disk.make_room()
        store.create_snapshot(directory=backups)
    disk.go_on()


def copying(disk: Disk) -> None:
    """A copy meets a disk that fills meanwhile."""
    with MemoryStore() as source, disk.open() as store:
        disk.write(store, states(0, 10))
        source.upsert_many(states(0, 1_500))

        def fill(done: int, _total: int | None) -> None:
            if done > 500:
                disk.fill()

        disk.refused(lambda: copy(source, store, replace=True, progress=fill))
        disk.check(store)
        disk.make_room()
        copy(source, store, replace=True)
        disk.written = {each.user_id: each.updated_at_unix_ms for each in states(0, 1_500)}
    disk.go_on()


SCENARIOS: dict[str, Callable[[Disk], None]] = {
    each.__name__: each
    for each in (writing, opening, closing, flushing, rebuilding, restoring, snapshotting, copying)
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](Disk(sys.argv[2], Path(sys.argv[3])))

"""The store in a directory, with the local mode of qdrant-client."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from conformance import (
    AsyncStoreTests,
    EmbeddedKit,
    EmbeddedProcessTests,
    EmbeddedTests,
    MappingTests,
    Point,
    Points,
    StoreTests,
    environment,
    needs,
    state,
)

from attuned_store import QdrantStore

if TYPE_CHECKING:
    from pathlib import Path


class LocalKit(EmbeddedKit):
    """A second way to the files of local mode: a bare QdrantClient, and the table it keeps its points in."""

    def read_points(self, path: Path, collection: str = "attuned_state") -> Points:
        from qdrant_client import QdrantClient

        rows = count_rows(path, collection)
        with closing(QdrantClient(path=str(path))) as client:
            records, _ = client.scroll(collection, limit=1_000_000, with_vectors=True)
        assert len(records) == rows
        points: Points = {}
        for record in records:
            assert record.payload is not None
            assert isinstance(record.vector, list)
            points[str(record.id)] = Point(record.payload, [float(value) for value in record.vector])  # type: ignore[arg-type]
        return points

    def write_points(self, path: Path, points: Points) -> None:
        from qdrant_client import QdrantClient, models

        with closing(QdrantClient(path=str(path))) as client:
            client.upsert(
                "attuned_state",
                [models.PointStruct(id=key, vector=p.vector, payload=p.payload) for key, p in points.items()],
            )


def table(path: Path, collection: str) -> sqlite3.Connection:
    return sqlite3.connect(path / "collection" / collection / "storage.sqlite")


def count_rows(path: Path, collection: str = "attuned_state") -> int:
    with closing(table(path, collection)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM points").fetchone()
    return int(count)


class TestLocal(StoreTests):
    backends = ("local",)


class TestAsyncLocal(AsyncStoreTests):
    backends = ("local",)


class TestLocalMapping(MappingTests):
    backends = ("local",)


class TestLocalFiles(LocalKit, EmbeddedTests):
    backends = ("local",)


class TestLocalProcesses(LocalKit, EmbeddedProcessTests):
    backends = ("local",)


@needs("qdrant_client")
def test_the_file_is_in_wal_mode(tmp_path: Path) -> None:
    """The SQLite file of local mode is in WAL mode, while it is open and afterwards."""
    with QdrantStore(path=tmp_path / "store", engine="local") as store:
        store.upsert_latest(state())
        with closing(table(tmp_path / "store", "attuned_state")) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert count_rows(tmp_path / "store") == 2

    with closing(table(tmp_path / "store", "attuned_state")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@needs("qdrant_client")
def test_a_directory_is_shared_with_other_programs(tmp_path: Path) -> None:
    """A directory of another qdrant-client program is recognised, and its collections are left alone."""
    from qdrant_client import QdrantClient, models

    path = tmp_path / "store"
    with closing(QdrantClient(path=str(path))) as client:
        client.create_collection("documents", models.VectorParams(size=2, distance=models.Distance.DOT))
        client.upsert("documents", [models.PointStruct(id=1, vector=[3.0, 4.0], payload={"title": "theirs"})])

    with QdrantStore(path=path) as store:
        assert store.health().backend == "local"
        assert list(store.users()) == []
        store.upsert_latest(state())
        assert store.count() == 1

    with closing(QdrantClient(path=str(path))) as client:
        assert {collection.name for collection in client.get_collections().collections} == {
            "attuned_state",
            "documents",
        }
        (theirs,) = client.retrieve("documents", [1], with_vectors=True)
        assert (theirs.payload, theirs.vector) == ({"title": "theirs"}, [3.0, 4.0])


@needs("qdrant_client")
def test_what_a_bare_client_wrote_is_read(tmp_path: Path) -> None:
    """Points that another program wrote in the documented form, after the store was closed, are read."""
    path = tmp_path / "store"
    with QdrantStore(path=path, engine="local") as store:
        store.upsert_latest(state("ann"))
    mine = LocalKit().read_points(path)

    with QdrantStore(path=tmp_path / "other", engine="local") as store:
        store.upsert_latest(state("bob"))
    LocalKit().write_points(path, LocalKit().read_points(tmp_path / "other"))

    with QdrantStore(path=path, engine="local") as store:
        assert sorted(store.users()) == ["ann", "bob"]
        assert store["bob"] == state("bob")
    assert len(LocalKit().read_points(path)) == len(mine) + 2


KILLED = """
import os, sys
from attuned_store import LocalEngine, QdrantStore, StateSnapshot
store = QdrantStore(path=sys.argv[1], engine="local", axes=("warmth",))
store.upsert_many([StateSnapshot(f"user{at}", {"warmth": at / 9}, at) for at in range(10)])
if sys.argv[2] == "before":
    LocalEngine._mend_list = lambda engine: os._exit(7)  # the list is written, the points are not moved
else:
    relist = LocalEngine._relist
    LocalEngine._relist = lambda *arguments: (relist(*arguments), os._exit(7))  # the other is still listed
store.alter_axes(add=["calm"])
"""


@needs("qdrant_client")
@pytest.mark.parametrize("when", ["before", "after"])
def test_axes_are_added_whole_by_a_process_that_is_killed(tmp_path: Path, when: str) -> None:
    """Where a process is killed between writing the list and moving the points, the next completes it."""
    path = tmp_path / "store"
    command = [sys.executable, "-c", KILLED, str(path), when]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 7, ran.stderr
    with QdrantStore(path=path) as store:
        assert store.axes == ("warmth", "calm")
        assert len(store) == 10
        assert store["user9"].axes == {"warmth": 1.0}
        store.patch("user3", {"calm": 1.0})
        assert store.search_similar({"calm": 1.0}, limit=1)[0].snapshot.user_id == "user3"

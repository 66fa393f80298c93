"""The store in a directory, with Qdrant Edge."""

from __future__ import annotations

import struct
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from conformance import (
    NOW,
    AsyncStoreTests,
    EmbeddedKit,
    EmbeddedProcessTests,
    EmbeddedTests,
    MappingTests,
    Point,
    Points,
    StoreTests,
    needs,
    point_id,
    run_python,
    state,
)

import attuned_store
from attuned_store import QdrantStore, QdrantStoreConfig, ValidationError

if TYPE_CHECKING:
    from pathlib import Path


class EdgeKit(EmbeddedKit):
    """A second way to the files of Edge: the shard, opened with qdrant_edge alone."""

    def read_points(self, path: Path, collection: str = "attuned_state") -> Points:
        from qdrant_edge import EdgeShard, ScrollRequest

        shard = EdgeShard.load(str(path / "collections" / collection))
        try:
            records, _ = shard.scroll(ScrollRequest(limit=1_000_000, with_payload=True, with_vector=True))
            return {str(record.id): readable(record) for record in records}
        finally:
            shard.close()

    def write_points(self, path: Path, points: Points) -> None:
        from qdrant_edge import EdgeShard, UpdateOperation
        from qdrant_edge import Point as EdgePoint

        shard = EdgeShard.load(str(path / "collections" / "attuned_state"))
        try:
            shard.update(
                UpdateOperation.upsert_points(
                    [EdgePoint(key, p.vector, p.payload) for key, p in points.items()]
                )
            )
        finally:
            shard.close()


def readable(record: Any) -> Point:
    """A record of Edge, whose axes are kept as "name,name:" and the digits of their doubles."""
    payload = dict(record.payload)
    names, _, digits = payload["axes"].partition(":")
    values = struct.iter_unpack(">d", bytes.fromhex(digits))
    payload["axes"] = dict(zip(filter(None, names.split(",")), (value for (value,) in values), strict=True))
    return Point(payload, list(record.vector))


class TestEdge(StoreTests):
    backends = ("edge",)


class TestAsyncEdge(AsyncStoreTests):
    backends = ("edge",)


class TestEdgeMapping(MappingTests):
    backends = ("edge",)


class TestEdgeFiles(EdgeKit, EmbeddedTests):
    backends = ("edge",)


class TestEdgeProcesses(EdgeKit, EmbeddedProcessTests):
    backends = ("edge",)


@needs("qdrant_edge")
def test_a_new_directory_is_of_edge(tmp_path: Path) -> None:
    """Where Edge is installed, a new directory is opened with it."""
    with QdrantStore(path=tmp_path / "store") as store:
        assert store.health().backend == "edge"
    assert (tmp_path / "store" / "collections" / "attuned_state").is_dir()


@needs("qdrant_edge")
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_path_is_opened_as_a_directory(tmp_path: Path, prefix: str) -> None:
    """open_store takes a path, or a file:// URL, and the options of the store."""
    with attuned_store.open_store(f"{prefix}{tmp_path}/store", max_history_per_user=1) as store:
        assert isinstance(store, QdrantStore)
        store.upsert_many([state(at=1), state(at=2)])
        assert store.count(history=True) == 1

    with attuned_store.open_store(tmp_path / "store") as store:
        assert store["ann"] == state(at=2)
    assert EdgeKit().read_points(tmp_path / "store").keys() == {
        point_id("ann", "latest"),
        point_id("ann", NOW + 2),
    }


@needs("qdrant_edge")
def test_without_a_target_the_store_is_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a target and without ATTUNED_STORE and QDRANT_URL, the store is ./attuned_state."""
    monkeypatch.chdir(tmp_path)
    for name in ("ATTUNED_STORE", "ATTUNED_STORE_PATH", "QDRANT_URL"):
        monkeypatch.delenv(name, raising=False)

    with attuned_store.open_store() as store:
        store.upsert_latest(state())

    assert [path.name for path in tmp_path.iterdir()] == ["attuned_state"]


def test_the_configuration_of_a_directory_is_read_from_the_environment() -> None:
    """Every option of a directory has a variable of its own."""
    config = QdrantStoreConfig.from_env(
        {
            "ATTUNED_STORE_PATH": "somewhere",
            "ATTUNED_STORE_ENGINE": "local",
            "ATTUNED_STORE_DURABILITY": "power",
            "ATTUNED_STORE_LOCK_TIMEOUT": "2.5",
            "ATTUNED_STORE_CACHE_SIZE": "5",
            "ATTUNED_STORE_MAX_HISTORY_PER_USER": "7",
            "QDRANT_COLLECTION": "states",
        }
    )

    assert str(config.path) == "somewhere"
    assert (config.engine, config.durability, config.lock_timeout) == ("local", "power", 2.5)
    assert (config.cache_size, config.max_history_per_user, config.collection_name) == (5, 7, "states")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ATTUNED_STORE_ENGINE", "sqlite"),
        ("ATTUNED_STORE_DURABILITY", "maximum"),
        ("ATTUNED_STORE_LOCK_TIMEOUT", "long"),
        ("ATTUNED_STORE_CACHE_SIZE", "big"),
    ],
)
def test_a_malformed_variable_of_a_directory_is_named(variable: str, value: str) -> None:
    """A variable that cannot be read is ValidationError with its name."""
    with pytest.raises(ValidationError, match=variable):
        QdrantStoreConfig.from_env({variable: value})


def test_no_secret_is_shown() -> None:
    """The representation of a configuration holds no api key."""
    config = QdrantStoreConfig(url="https://example.org:6333", api_key="s3cr3t-k3y")

    assert "s3cr3t-k3y" not in repr(config)
    assert config.api_key == "s3cr3t-k3y"


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[2]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from attuned_store import MissingDependencyError, QdrantStore
try:
    with QdrantStore(path=sys.argv[1], engine=sys.argv[3]) as store:
        print(store.health().backend)
except MissingDependencyError as error:
    print("missing:", error)
"""


@needs("qdrant_edge")
@pytest.mark.parametrize("engine", ["edge", "auto"])
def test_a_missing_edge_is_an_error_that_names_the_package(tmp_path: Path, engine: str) -> None:
    """A directory of Edge, opened where Edge is not installed, is an error that says what to install."""
    with QdrantStore(path=tmp_path / "store", engine="edge") as store:
        store.upsert_latest(state())

    answer = run_python(WITHOUT, tmp_path / "store", "qdrant_edge", engine)

    assert answer.stdout.startswith("missing:"), answer.stderr
    assert "qdrant-edge-py" in answer.stdout
    assert len(EdgeKit().read_points(tmp_path / "store")) == 2


@needs("qdrant_edge", "qdrant_client")
def test_without_edge_a_new_directory_is_of_local_mode(tmp_path: Path) -> None:
    """Where Edge is not installed, a new directory is opened with local mode."""
    answer = run_python(WITHOUT, tmp_path / "store", "qdrant_edge", "auto")

    assert answer.stdout.strip() == "local", answer.stderr


@needs("qdrant_client")
def test_a_missing_local_mode_is_an_error_that_names_the_package(tmp_path: Path) -> None:
    """Local mode where qdrant-client is not installed is an error that says what to install."""
    answer = run_python(WITHOUT, tmp_path / "store", "qdrant_client", "local")

    assert answer.stdout.startswith("missing:"), answer.stderr
    assert "qdrant-client" in answer.stdout


class CountingShard:
    """A shard that notes how many points each of its calls gives."""

    def __init__(self, shard: Any) -> None:
        self.shard, self.most = shard, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.shard, name)

        def call(*arguments: Any, **options: Any) -> Any:
            found = method(*arguments, **options)
            points = found[0] if isinstance(found, tuple) else found
            self.most = max(self.most, len(points) if isinstance(points, list) else 0)
            return found

        return call


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_many_matches_are_asked_for_in_parts(threshold: float | None, history: bool, tmp_path: Path) -> None:
    """A call of Edge holds up the whole process: none gives many points, and what is found is the same."""
    random = Random(7)
    with QdrantStore(path=tmp_path, engine="edge") as store:
        store.upsert_many(
            state(f"user-{number % 900}", number, {"warmth": random.random(), "ritual_need": random.random()})
            for number in range(1_300)
        )
        wanted: dict[str, Any] = {"limit": 1_200, "score_threshold": threshold, "history": history}
        at_once = store.search_similar({"warmth": 0.9}, **wanted)
        backend: Any = store._operations.backend
        backend.most_ranked = 600
        shards = backend.engine._shards
        shard = shards["attuned_state"] = CountingShard(shards["attuned_state"])

        found = store.search_similar({"warmth": 0.9}, **wanted)

        shards["attuned_state"] = shard.shard
    assert 0 < shard.most <= 600
    assert len(found) == len(at_once)
    assert {match.snapshot for match in found} == {match.snapshot for match in at_once}
    assert [match.score for match in found] == pytest.approx([match.score for match in at_once], abs=1e-6)

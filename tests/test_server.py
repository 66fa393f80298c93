"""The store on a server: the whole contract, over the loopback server and, where there is one, a real one."""

from __future__ import annotations

import math
import os
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from conformance import (
    BACKENDS,
    NOW,
    AsyncStoreTests,
    MappingTests,
    StoreTests,
    archived,
    collection_of,
    loopback,
    state,
)

from attuned_store import MemoryStore, StateStore

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.once

SERVERS = tuple(name for name in ("server", "real") if name in BACKENDS)
if tuple(map(int, version("qdrant-client").split(".")[:2])) < (1, 20):  # its engine differs from the server
    SERVERS = SERVERS[1:]
    if not SERVERS:
        pytest.skip("needs a real server or qdrant-client 1.20", allow_module_level=True)


class TestServer(StoreTests):
    backends = SERVERS


class TestAsyncServer(AsyncStoreTests):
    backends = SERVERS
    faces = ("asyncio", "trio")


class TestServerMapping(MappingTests):
    backends = SERVERS
    faces = ("sync",)


# ------------------------------------------------------------------------------
# Strict mode
# ------------------------------------------------------------------------------

UNINDEXED = {"unindexed_filtering_retrieve": False, "unindexed_filtering_update": False}
LIMITS: dict[str, dict[str, Any]] = {
    "unindexed": UNINDEXED,
    "query": {"max_query_limit": 7},
    "exact": {"search_allow_exact": False},
    "upsert": {"upsert_max_batchsize": 10},
    "condition": {"condition_max_size": 5},
}
LIMITS["all"] = {name: value for limits in LIMITS.values() for name, value in limits.items()}


def limit(backend: str, path: Path, limits: dict[str, Any]) -> None:
    """Let a collection be as strict as a provider's."""
    url = loopback().url if backend == "server" else os.environ["QDRANT_TEST_URL"]
    body = {"strict_mode_config": {"enabled": True, **limits}}
    httpx.patch(f"{url}/collections/{collection_of(path)}", json=body, timeout=30).raise_for_status()


def work(store: StateStore, path: Path) -> list[Any]:
    """A bit of everything, and what came of it."""
    angles = [number / 40 for number in range(100)]
    store.upsert_many(
        state(
            f"user-{number % 20}",
            number,
            axes={"warmth": 0.5 + math.cos(angle) / 2, "formality": 0.5 + math.sin(angle) / 2},
            confidence=number / 100,
        )
        for number, angle in enumerate(angles)
    )
    store.upsert_many([state("ann", number) for number in range(25)])
    found: list[Any] = [store.get_many([f"user-{number}" for number in range(25)])]
    found += [store.get_history("ann"), store.get_history("ann", 3), store.get_history("ann", since=NOW + 20)]
    found += [sorted(store.users()), store.count(), store.count(history=True)]
    for options in ({}, {"history": True}, {"min_confidence": 0.9}):
        matches = store.search_similar({"warmth": 0.1}, limit=18, **options)
        found.append(sorted((match.snapshot.user_id, match.snapshot.updated_at_unix_ms) for match in matches))
    found += [store.prune(), store.delete("user-7"), store.count(history=True)]
    store.upsert_latest(state("bob"), expected=None)
    store.update("bob", lambda old: state("bob", 5))
    archive = path / "archive"
    report = store.create_snapshot(archive, kind="portable")
    assert report.path is not None
    found.append([archived(report.path), report.users])
    store.delete("ann")
    for mode in ("merge", "skip", "replace"):
        store.restore_snapshot(report.path, mode=mode)
        found.append([store.count(), store.count(history=True), store.get_history("ann")])
    return [*found, store.health().users]


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("backend", SERVERS)
def test_everything_works_within_the_limits_of_strict_mode(backend: str, name: str, tmp_path: Path) -> None:
    """Whatever a collection limits, answers are those of a store in memory."""
    options: dict[str, Any] = {"max_history_per_user": 12}
    with BACKENDS[backend].sync(tmp_path, **options) as store:
        store.count()
    limit(backend, tmp_path, LIMITS[name])

    with MemoryStore(**options) as memory:
        expected = work(memory, tmp_path / "memory")
    with BACKENDS[backend].sync(tmp_path, **options) as store:
        assert work(store, tmp_path) == expected


@pytest.mark.parametrize("backend", SERVERS)
def test_requests_keep_to_a_rate(backend: str, tmp_path: Path) -> None:
    """What is more than a minute's share is split, and waits as the server asks."""
    with BACKENDS[backend].sync(tmp_path) as store:
        store.count()
    limit(backend, tmp_path, {"read_rate_limit": 480, "write_rate_limit": 480})
    users = [f"user-{number}" for number in range(245)]

    began = time.monotonic()
    with BACKENDS[backend].sync(tmp_path) as store:
        store.upsert_many(map(state, users))
        assert len(store.get_many([f"user-{number}" for number in range(500)])) == len(users)
    assert time.monotonic() - began < 30

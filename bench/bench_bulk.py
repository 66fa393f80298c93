"""How many snapshots a second upsert_many writes."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import pytest
from conftest import START_MS, states, user_ids

from attuned_store import QdrantStore

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Table

ROUNDS = 3


@pytest.mark.parametrize(("users", "each", "least"), [(10_000, 1, 10_000), (1_000, 10, 15_000)])
@pytest.mark.parametrize("engine", ["edge", "local"])
def test_upsert_many(
    benchmark: Any, table: Table, tmp_path: Path, engine: Any, users: int, each: int, least: float
) -> None:
    """Into a new store, those of a user one after another."""
    pytest.importorskip({"edge": "qdrant_edge", "local": "qdrant_client"}[engine])
    ages = [states(user_ids(users), START_MS + age) for age in range(each)]
    snapshots = [snapshot for of_user in zip(*ages, strict=True) for snapshot in of_user]
    rates: list[float] = []

    def run() -> None:
        path = tempfile.mkdtemp(dir=tmp_path)
        with QdrantStore(path=path, engine=engine) as store:
            started = time.perf_counter()
            assert store.upsert_many(snapshots) == len(snapshots)
            rates.append(len(snapshots) / (time.perf_counter() - started))

    benchmark.pedantic(run, rounds=ROUNDS)
    target = {"least": least} if engine == "edge" else {}
    table.add(f"{engine} upsert_many, {each} a user", statistics.median(rates), "snapshots/s", **target)

"""How many snapshots a second upsert_many writes, ready ones and those of a file."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import pytest
from conftest import AXES, START_MS, contest, states, user_ids

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


@pytest.mark.parametrize("engine", ["edge", "local"])
def test_import_of_a_file(benchmark: Any, table: Table, tmp_path: Path, engine: Any) -> None:
    """The command and a CSV file of 20,000 rows, beside upsert_many of the same snapshots, ready.

    The command checks every row before it writes the first, so that it reads the file twice.
    """
    pytest.importorskip({"edge": "qdrant_edge", "local": "qdrant_client"}[engine])
    from command import main

    snapshots = states(user_ids(20_000))
    file = tmp_path / "rows.csv"
    with file.open("w") as stream:
        stream.write(",".join(["user_id", "updated_at_unix_ms", *AXES]) + "\n")
        for each in snapshots:
            stream.write(",".join([each.user_id, str(START_MS), *map(repr, each.axes.values())]) + "\n")

    def import_file() -> float:
        path = tempfile.mkdtemp(dir=tmp_path)
        started = time.perf_counter()
        assert main(["--store", path, "--engine", engine, "import", str(file)]) == 0
        return time.perf_counter() - started

    def write_ready() -> float:
        with QdrantStore(path=tempfile.mkdtemp(dir=tmp_path), engine=engine, axes=tuple(AXES)) as store:
            started = time.perf_counter()
            store.upsert_many(snapshots)
            return time.perf_counter() - started

    outcome = contest(benchmark, {"import": import_file, "upsert_many": write_ready}, rounds=ROUNDS)
    table.add(
        f"{engine} import of CSV",
        outcome.ratio("import", "upsert_many"),
        "of upsert_many of ready snapshots",
        most=1.5,
        note=f"{len(snapshots) / outcome.median('import'):,.0f} rows/s",
    )

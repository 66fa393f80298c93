"""What it costs to check every value of a snapshot."""

from __future__ import annotations

from typing import Any

import attrs
from conftest import AXES, START_MS, Table, contest, medians

from attuned_store import CANONICAL_AXES, Source, StateSnapshot

CALLS = 100  # 0.2 ms, so that on a busy machine few rounds are interrupted


@attrs.frozen
class Unchecked:
    user_id: str
    axes: dict[str, float]
    updated_at_unix_ms: int
    source: Source = Source.SELF_REPORT
    confidence: float = 1.0
    schema_version: int = 1


def test_construction(benchmark: Any, table: Table) -> None:
    def ours() -> None:
        for _ in range(CALLS):
            StateSnapshot("user-00001", AXES, START_MS)

    def theirs() -> None:
        for _ in range(CALLS):
            Unchecked("user-00001", AXES, START_MS)

    outcome = contest(benchmark, {"checked": ours, "unchecked": theirs}, calls=CALLS, rounds=1_001)
    table.add(
        f"StateSnapshot of {len(CANONICAL_AXES)} axes",
        outcome.ratio("checked", "unchecked"),
        "x unchecked attrs",
        most=6.0,
        note=medians(outcome),
    )

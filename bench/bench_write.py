"""What it costs to write a state: the latest and an entry of the history."""

from __future__ import annotations

from operator import methodcaller
from typing import TYPE_CHECKING, Any

import pytest
from contenders import Contender, LangGraph, OursInMemory, one_by_one

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Race


def put(contender: Contender) -> Callable[[list[Any]], object] | None:
    return one_by_one(contender, "put")


def test_write(race: Race) -> None:
    """Users of whom the process knows already."""
    outcome = race.run("write", put, race.later_states)
    race.target("memory upsert_latest", outcome, ("attuned memory", "floor"), most=2.0)
    race.target("edge upsert_latest", outcome, ("attuned edge", "bare edge"), most=0.6)
    race.target("edge upsert_latest", outcome, ("attuned edge", "SQLite WAL"), most=4.0)
    race.target("edge upsert_latest", outcome, ("attuned edge", "bare qdrant-client local"), least=12)
    race.target("local upsert_latest", outcome, ("attuned local", "bare qdrant-client local"), least=6)


@pytest.mark.families("embedded")
def test_write_cold(race: Race) -> None:
    """Users of whom the process knows nothing yet."""
    race.run("write, cold", put, race.later_states, before=methodcaller("forget"), most_calls=256)


@pytest.mark.families("memory")
def test_write_latest_alone(race: Race) -> None:
    """A put of langgraph keeps no history: one of them beside our whole write."""
    if LangGraph.name not in race.lineup.contenders:
        pytest.skip("langgraph is not installed")

    def put_latest(contender: Contender) -> Callable[[list[Any]], object] | None:
        if isinstance(contender, OursInMemory):
            return one_by_one(contender, "put")
        if not isinstance(contender, LangGraph):
            return None
        store = contender.store

        def each(records: list[dict[str, Any]]) -> None:
            for record in records:
                store.put(("latest",), record["user_id"], record)

        return each

    outcome = race.run("write, latest alone", put_latest, race.later_states)
    race.target("memory upsert_latest", outcome, ("attuned memory", "langgraph"), least=4)

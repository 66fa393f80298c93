"""What it costs to read the newest ten entries of a user's history."""

from __future__ import annotations

import time
from itertools import cycle
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import pytest
from conftest import START_MS, Table, contest, medians, states, user_ids
from contenders import Contender, one_by_one

from attuned_store import QdrantStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Race


def history(contender: Contender) -> Callable[[list[Any]], object] | None:
    return one_by_one(contender, "history")


def test_history_hot(race: Race) -> None:
    """Users whose history has just been read."""
    users = race.lineup.people.deep
    outcome = race.run("history of 10, hot", history, lambda _: cycle(users), warm=len(users))
    race.target("edge get_history(10), hot", outcome, ("attuned edge", "bare edge"), most=0.15)


@pytest.mark.families("embedded")
def test_history_cold(race: Race) -> None:
    """Users of whom the process knows nothing yet."""
    users = race.lineup.people.deep
    outcome = race.run(
        "history of 10, cold",
        history,
        lambda _: cycle(users),
        before=methodcaller("forget"),
        most_calls=len(users),
    )
    race.target("edge get_history(10), cold", outcome, ("attuned edge", "bare edge"), most=1.2)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantStore]:
    """A store in local mode of 50,000 points: 2,500 users with 19 entries each, and the latest."""
    pytest.importorskip("qdrant_client")
    with QdrantStore(path=tmp_path_factory.mktemp("local") / "full", engine="local") as store:
        for age in range(19):
            store.upsert_many(states(user_ids(2_500), START_MS + age))
        assert store.health().points == 50_000
        yield store


@pytest.mark.parametrize("cache", ["hot", "cold"])
def test_ordered_scroll(benchmark: Any, table: Table, full: QdrantStore, cache: str) -> None:
    """The scroll that a caller of the same client would ask for, once a round: it looks at all points."""
    from qdrant_client import models

    users = user_ids(100)
    core: Any = full._operations.backend
    client = core.engine._client
    order = models.OrderBy(key="updated_at_unix_ms", direction=models.Direction.DESC)

    def ours() -> None:
        for user_id in users:
            assert len(full.get_history(user_id, limit=10)) == 10

    def bare() -> float:
        of_user = models.FieldCondition(key="user_id", match=models.MatchValue(value=users[0]))
        of_kind = models.FieldCondition(key="kind", match=models.MatchValue(value="history"))
        where = models.Filter(must=[of_user, of_kind])
        started = time.perf_counter()
        client.scroll(full.config.collection_name, where, limit=10, order_by=order)
        return time.perf_counter() - started

    forget = core._recent.clear if cache == "cold" else tuple  # times of all users are kept, always
    contenders: dict[str, Callable[[], object]] = {"store": ours, "scroll": bare}
    calls = {"store": len(users), "scroll": 1}
    outcome = contest(benchmark, contenders, calls=calls, rounds=7, setup=forget)
    table.add(
        f"local get_history(10), 50,000 points, {cache}",
        outcome.ratio("scroll", "store"),
        "times as fast as an ordered scroll",
        least=1_000,
        note=medians(outcome),
    )

"""What it costs to read the latest state of a user."""

from __future__ import annotations

from itertools import cycle
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import pytest
from contenders import HOT_USERS, Contender, one_by_one

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Race


def get(contender: Contender) -> Callable[[list[Any]], object] | None:
    return one_by_one(contender, "get")


def test_read_hot(race: Race) -> None:
    """Users who have just been read."""
    users = race.lineup.people.sample(HOT_USERS)
    outcome = race.run("read, hot", get, lambda _: cycle(users), warm=len(users))
    race.target("memory get_latest", outcome, ("attuned memory", "floor"), most=0.6)
    race.target("edge get_latest, hot", outcome, ("attuned edge", "bare edge"), most=0.15)


@pytest.mark.families("embedded")
def test_read_cold(race: Race) -> None:
    """Users of whom the process knows nothing yet."""
    users = race.lineup.people.sample(4 * HOT_USERS)
    outcome = race.run(
        "read, cold", get, lambda _: cycle(users), before=methodcaller("forget"), most_calls=512
    )
    race.target("edge get_latest, cold", outcome, ("attuned edge", "bare edge"), most=3.0)

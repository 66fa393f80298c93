"""What it costs to find the ten most similar states."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from contenders import START_MS, axes_of, one_by_one

from attuned_store import StateSnapshot

if TYPE_CHECKING:
    from conftest import Race

ASKED = [StateSnapshot("nobody", axes_of(shape), START_MS) for shape in range(0, 984, 37)]


def test_search_within_a_user(race: Race) -> None:
    """Within the history of one user."""
    asked = [(user_id, ASKED[place % len(ASKED)]) for place, user_id in enumerate(race.lineup.people.deep)]
    outcome = race.run(
        "search within a user", lambda contender: one_by_one(contender, "search_user"), lambda _: cycle(asked)
    )
    race.target("edge search within a user", outcome, ("attuned edge", "bare edge"), most=2.0)


def test_search_over_all(race: Race) -> None:
    """Among the latest states of all users."""
    race.run("search over all", lambda contender: one_by_one(contender, "search_all"), lambda _: cycle(ASKED))

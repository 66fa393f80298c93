"""What history shows is what count, search and snapshots see, whatever the options were before."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from conformance import BACKENDS, DAY, HOUR, NOW, Clock, archived, needs
from hypothesis import HealthCheck, example, given, settings

import attuned_store
from attuned_store import StateSnapshot, StateStore

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.once

ENGINES = [
    pytest.param(name, marks=needs(BACKENDS[name].library))
    for name in ("memory", "edge", "local", "server", "real")
    if name in BACKENDS
]
USERS = ("ann", "bob")
WARM = {"warmth": 1.0}
OPTIONS = st.fixed_dictionaries(
    {
        "enable_history": st.sampled_from([True, True, False]),
        "max_history_per_user": st.sampled_from([0, 1, 2, 3, 100]),
        "history_retention_days": st.sampled_from([None, None, 1, 2]),
    }
)
WRITES = st.builds(
    lambda user_id, at, warmth: StateSnapshot(user_id, {"warmth": warmth}, NOW + at * 6 * HOUR),
    st.sampled_from(USERS),
    st.integers(-8, 4),
    st.sampled_from([0.6, 0.75, 1.0]),
)
STEPS = st.lists(
    WRITES
    | st.tuples(st.just("delete"), st.sampled_from(USERS))
    | st.just("prune")
    | st.just("a day passes"),
    max_size=6,
)
OPENINGS = st.lists(st.tuples(OPTIONS, STEPS), min_size=2, max_size=4)
ON = {"enable_history": True, "max_history_per_user": 3, "history_retention_days": None}
OFF = {**ON, "enable_history": False}


def at(user_id: str, hours: int, warmth: float = 1.0) -> StateSnapshot:
    return StateSnapshot(user_id, {"warmth": warmth}, NOW + hours * HOUR)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
@given(openings=OPENINGS)
@example(openings=[(OFF, [at("ann", 0)]), (ON, [])])
@example(openings=[(ON, [at("ann", 0), at("ann", 6)]), (OFF, [at("ann", 12)]), (ON, [])])
@example(
    openings=[
        (ON, [at("ann", 0), at("ann", 6)]),
        (OFF, [at("ann", 12)]),
        ({**ON, "max_history_per_user": 1}, []),
        ({**ON, "max_history_per_user": 2}, ["prune"]),
    ]
)
@example(openings=[(ON, [at("ann", 0)]), (OFF, [at("ann", 0, 0.6)]), (ON, []), (ON, [at("ann", 6)])])
@example(openings=[(OFF, [at("ann", -48)]), ({**ON, "history_retention_days": 1}, [])])
@example(
    openings=[
        (ON, [at("ann", -40), at("ann", -30)]),
        ({**ON, "history_retention_days": 1}, ["prune"]),
        (ON, []),
    ]
)
@settings(
    max_examples=15,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
def test_everything_sees_what_history_shows(engine: str, openings: list[tuple[dict[str, Any], Any]]) -> None:
    """count, search and snapshots see exactly what get_history shows, after any options and writes before."""
    clock = Clock()
    real_now, attuned_store.wall_clock.now_ms = attuned_store.wall_clock.now_ms, clock
    try:
        with tempfile.TemporaryDirectory(prefix="attuned-history-") as name:
            for store in opened_one_after_another(engine, Path(name), openings, clock):
                check(store, Path(name))
    finally:
        attuned_store.wall_clock.now_ms = real_now


def opened_one_after_another(
    engine: str, path: Path, openings: list[tuple[dict[str, Any], Any]], clock: Clock
) -> Iterator[StateStore]:
    """A store after each opening and each step; one in memory goes on in the next one's."""
    before: list[StateSnapshot] = []
    for options, steps in openings:
        with BACKENDS[engine].sync(path / "store", axes=["warmth"], **options) as store:
            store.upsert_many(before)
            yield store
            for step in steps:
                match step:
                    case "prune":
                        store.prune()
                        assert store.prune() == 0
                    case "a day passes":
                        clock.now += DAY
                    case ("delete", user_id):
                        store.delete(user_id)
                    case _:
                        store.upsert_latest(step)
                yield store
            if engine == "memory":
                before = [*shown(store), *store.get_many(store.users()).values()]
    if engine in ("server", "real"):
        with BACKENDS[engine].sync(path / "store", axes=["warmth"]) as store:
            for user_id in list(store.users()):
                store.delete(user_id)


def shown(store: StateStore) -> list[StateSnapshot]:
    """What get_history shows of all users."""
    return [entry for user_id in store.users() for entry in store.get_history(user_id, 1_000)]


def check(store: StateStore, path: Path) -> None:
    """What every other view has to agree with is what get_history shows."""
    history = shown(store)
    for user_id in store.users():
        mine = store.get_history(user_id, 1_000)
        assert mine[:1] in ([], [store.get_latest(user_id)])
        found = store.search_similar(WARM, limit=1_000, history=True, user_id=user_id)
        assert sorted(match.snapshot.updated_at_unix_ms for match in found) == [
            entry.updated_at_unix_ms for entry in reversed(mine)
        ]
        assert {match.snapshot for match in found} == set(mine)
    assert store.count(history=True) == len(history)
    found = store.search_similar(WARM, limit=1_000, history=True)
    assert len(found) == len(history)
    assert {match.snapshot for match in found} == set(history)
    few = store.search_similar(WARM, limit=2, history=True)
    assert len(few) == min(2, len(history))
    assert [match.score for match in few] == pytest.approx([match.score for match in found[:2]], abs=1e-6)
    warm = [entry for entry in history if entry.updated_at_unix_ms >= NOW]
    found = store.search_similar(WARM, limit=1_000, history=True, since=NOW)
    assert {match.snapshot for match in found} == set(warm)
    report = store.create_snapshot(path / "snapshots", kind="portable")
    assert report.path is not None
    saved = archived(report.path)
    for user_id in store.users():
        mine = store.get_history(user_id, 1_000)
        assert saved[user_id] == (list(reversed(mine)) or [store.get_latest(user_id)])

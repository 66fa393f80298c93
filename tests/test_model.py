"""Any sequence of operations gives the same answers from a store, a plain dict and another store."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hypothesis.strategies as st
import pytest
from conformance import BACKENDS, DAY, HOUR, NOW, Clock, cosine, needs
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import attuned_store
from attuned_store import (
    ANY,
    ConflictError,
    Match,
    Source,
    StateSnapshot,
    StateStore,
    StoreError,
    ValidationError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

# A failure takes minutes to shrink, a success seconds.
pytestmark = [pytest.mark.faults, pytest.mark.once, pytest.mark.timeout(900)]

# ------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------


class Model:
    """What a store does, in a dict of all that was written, by user and time; bounds apply on reading."""

    def __init__(
        self,
        *,
        max_history_per_user: int,
        history_retention_days: int | None = None,
        enable_history: bool = True,
    ) -> None:
        self.written: dict[str, dict[int, StateSnapshot]] = {}
        self.maximum = max_history_per_user if enable_history else 0
        self.days = history_retention_days

    def upsert_latest(self, snapshot: StateSnapshot, *, expected: Any = ANY) -> None:
        if expected is not ANY and self.get_latest(snapshot.user_id) != expected:
            raise ConflictError("changed")
        self.written.setdefault(snapshot.user_id, {})[snapshot.updated_at_unix_ms] = snapshot

    def upsert_many(self, snapshots: Iterable[StateSnapshot]) -> int:
        count = 0
        for count, snapshot in enumerate(snapshots, 1):  # noqa: B007
            self.upsert_latest(snapshot)
        return count

    def update(
        self, user_id: str, fn: Callable[[StateSnapshot | None], StateSnapshot | None]
    ) -> StateSnapshot | None:
        old = self.get_latest(user_id)
        new = fn(old)
        if new is None:
            return old
        if new.user_id != user_id or (old and new.updated_at_unix_ms <= old.updated_at_unix_ms):
            raise ValidationError("not a newer state of the user")
        self.upsert_latest(new)
        return new

    def patch(self, user_id: str, axes: Mapping[str, float], **fields: Any) -> StateSnapshot | None:
        return self.update(
            user_id,
            lambda old: (old or StateSnapshot(user_id, {}, 0)).patched(axes, **fields),
        )

    def delete(self, user_id: str) -> bool:
        return self.written.pop(user_id, None) is not None

    def get_latest(self, user_id: str) -> StateSnapshot | None:
        mine = self.written.get(user_id)
        return mine[max(mine)] if mine else None

    def get_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        return {user_id: latest for user_id in user_ids if (latest := self.get_latest(user_id))}

    def get_history(
        self, user_id: str, limit: int = 100, *, since: int | None = None, until: int | None = None
    ) -> list[StateSnapshot]:
        mine = self.written.get(user_id, {})
        newest = sorted(mine, reverse=True)[: self.maximum]
        oldest = 0 if self.days is None else attuned_store.wall_clock.now_ms() - self.days * DAY
        return [
            mine[at]
            for at in newest
            if at >= oldest and (since is None or at >= since) and (until is None or at <= until)
        ][:limit]

    def search_similar(
        self,
        query: Mapping[str, float],
        *,
        limit: int,
        history: bool,
        min_confidence: float,
        source: Source | None,
    ) -> list[Match]:
        searched = (
            [snapshot for user_id in self.written for snapshot in self.get_history(user_id)]
            if history
            else self.get_many(self.written).values()
        )
        matches = [
            Match(snapshot, cosine(query, snapshot.axes))
            for snapshot in searched
            if snapshot.confidence >= min_confidence and source in (None, snapshot.source)
        ]
        return sorted(matches, key=lambda match: -match.score)[:limit]

    def users(self) -> Iterator[str]:
        return iter(self.written)

    def count(self, *, history: bool = False) -> int:
        return (
            sum(len(self.get_history(user_id)) for user_id in self.written) if history else len(self.written)
        )

    def prune(self) -> int:
        return 0

    def close(self) -> None:
        pass


# ------------------------------------------------------------------------------
# Two of them, driven alike
# ------------------------------------------------------------------------------

USERS = st.sampled_from(["ann", "bob", "ann::latest", "日本 🙂"])
MOMENTS = st.integers(-9, 9).map(lambda step: NOW + step * 6 * HOUR)
VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.5 + 1e-6, 0.75, 1.0]) | st.floats(0, 1)
AXES = st.dictionaries(st.sampled_from(["warmth", "formality", "anxiety_level"]), VALUES)
CONFIDENCES = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)
SNAPSHOTS = st.builds(
    StateSnapshot, USERS, AXES, MOMENTS, st.sampled_from(Source), CONFIDENCES, st.integers(1, 3)
)

Outcome = tuple[str, Any]


class Twins(RuleBasedStateMachine):
    """Each rule does one operation on both sides and demands the same answer, or the same error."""

    names: tuple[str, str]

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="attuned-model-"))
        self.clock = Clock()
        self.real_now, attuned_store.wall_clock.now_ms = attuned_store.wall_clock.now_ms, self.clock
        self.sides: list[Model | StateStore] = []

    def teardown(self) -> None:
        try:
            for side in self.sides:
                side.close()
        finally:
            attuned_store.wall_clock.now_ms = self.real_now
            shutil.rmtree(self.directory)

    @initialize(
        maximum=st.sampled_from([0, 1, 2, 3, 100]),
        days=st.sampled_from([None, 1]),
        enabled=st.sampled_from([True, True, False]),
    )
    def open(self, maximum: int, days: int | None, enabled: bool) -> None:
        self.options = {
            "max_history_per_user": maximum,
            "history_retention_days": days,
            "enable_history": enabled,
        }
        note(f"open {self.names} with {self.options}")
        self.sides = [self.make(name, number) for number, name in enumerate(self.names)]

    def make(self, name: str, number: int) -> Model | StateStore:
        if name == "model":
            return Model(**cast("Any", self.options))
        return BACKENDS[name].sync(self.directory / str(number), **self.options)

    def both(self, operation: Callable[[Any], Any]) -> Outcome:
        """What the operation gives on both sides, which must be the same."""
        first, second = (outcome(operation, side) for side in self.sides)
        note(f"-> {first}")
        assert first == second
        return first

    # Operations

    @rule(snapshot=SNAPSHOTS)
    def write(self, snapshot: StateSnapshot) -> None:
        note(f"write {snapshot.to_dict()}")
        self.both(lambda side: side.upsert_latest(snapshot))

    @rule(snapshots=st.lists(SNAPSHOTS, max_size=8), as_list=st.booleans())
    def write_many(self, snapshots: list[StateSnapshot], as_list: bool) -> None:
        note(f"write {[snapshot.to_dict() for snapshot in snapshots]}")
        self.both(lambda side: side.upsert_many(snapshots if as_list else iter(snapshots)))

    @rule(snapshot=SNAPSHOTS, expected=SNAPSHOTS | st.none() | st.just("latest"))
    def write_conditionally(self, snapshot: StateSnapshot, expected: StateSnapshot | str | None) -> None:
        if expected == "latest":
            expected = self.sides[0].get_latest(snapshot.user_id)
        note(f"write {snapshot.to_dict()}, expected: {expected!r}")
        self.both(lambda side: side.upsert_latest(snapshot, expected=expected))

    @rule(user_id=USERS, answer=SNAPSHOTS | st.none(), same_user=st.booleans())
    def update(self, user_id: str, answer: StateSnapshot | None, same_user: bool) -> None:
        if answer and same_user:
            answer = StateSnapshot.from_dict({**answer.to_dict(), "user_id": user_id})
        note(f"update {user_id!r} to {answer and answer.to_dict()}")
        self.both(lambda side: side.update(user_id, lambda latest: answer))

    @rule(user_id=USERS, axes=AXES, fields=st.sampled_from([{}, {"source": "mixed"}, {"confidence": 0.5}]))
    def patch(self, user_id: str, axes: dict[str, float], fields: dict[str, Any]) -> None:
        note(f"patch {user_id!r} with {axes} {fields}")
        self.both(lambda side: side.patch(user_id, axes, **fields))

    @rule(user_id=USERS)
    def delete(self, user_id: str) -> None:
        note(f"delete {user_id!r}")
        self.both(lambda side: side.delete(user_id))

    @rule(hours=st.sampled_from([1, 6, 24]))
    def time_passes(self, hours: int) -> None:
        note(f"{hours} hours pass")
        self.clock.now += hours * HOUR

    @rule()
    def prune(self) -> None:
        """How much there is to remove depends on what was removed before; afterwards there is nothing."""
        note("prune")
        for side in self.sides:
            assert side.prune() >= 0
            assert side.prune() == 0

    @precondition(lambda self: self.names not in (("model", "memory"), ("memory", "model")))
    @rule()
    def open_again(self) -> None:
        note("close and open again")
        for number, name in enumerate(self.names):
            if name not in ("model", "memory"):
                self.sides[number].close()
                self.sides[number] = self.make(name, number)

    # Questions

    @rule(
        user_id=USERS,
        limit=st.integers(0, 5),
        since=MOMENTS | st.none(),
        until=MOMENTS | st.none(),
    )
    def read_history(self, user_id: str, limit: int, since: int | None, until: int | None) -> None:
        note(f"history of {user_id!r}, limit {limit}, from {since} to {until}")
        self.both(lambda side: side.get_history(user_id, limit, since=since, until=until))

    @rule(
        query=AXES,
        limit=st.integers(1, 12),
        history=st.booleans(),
        min_confidence=st.sampled_from([0.0, 0.5]),
        source=st.none() | st.sampled_from(Source),
    )
    def search(self, query: dict[str, float], **filters: Any) -> None:
        """Scores agree to 1e-5; which of several matches with one score come first is not fixed."""
        note(f"search {query} {filters}")
        everything = {**filters, "limit": 1_000}
        first, second = (side.search_similar(query, **everything) for side in self.sides)
        assert {match.snapshot for match in first} == {match.snapshot for match in second}
        assert len(first) == len(second)
        for side in self.sides:
            found = side.search_similar(query, **filters)
            note(f"-> {[(match.snapshot.to_dict(), match.score) for match in found]}")
            best = sorted((cosine(query, match.snapshot.axes) for match in first), reverse=True)
            scores = [match.score for match in found]
            assert scores == pytest.approx([cosine(query, match.snapshot.axes) for match in found], abs=1e-5)
            assert scores == pytest.approx(best[: filters["limit"]], abs=1e-5)

    # What holds after every step

    @invariant()
    def the_same_users(self) -> None:
        first, second = (list(side.users()) for side in self.sides)
        assert sorted(first) == sorted(second)
        assert len(set(first)) == len(first)

    @invariant()
    def the_same_counts(self) -> None:
        self.both(lambda side: (side.count(), side.count(history=True)))

    @invariant()
    def the_same_content(self) -> None:
        for user_id in ("ann", "bob", "ann::latest", "日本 🙂"):
            self.both(partial(content_of, user_id))

    @invariant()
    def latest_and_history_agree(self) -> None:
        for side in self.sides:
            for user_id, latest in side.get_many(side.users()).items():
                history = side.get_history(user_id)
                assert not history or history[0] == latest


def content_of(user_id: str, side: Model | StateStore) -> tuple[StateSnapshot | None, list[StateSnapshot]]:
    return side.get_latest(user_id), side.get_history(user_id, 1_000)


def outcome(operation: Callable[[Any], Any], side: Model | StateStore) -> Outcome:
    """The answer of an operation, or the class of the error it raised."""
    try:
        return "answer", operation(side)
    except StoreError as error:
        return "error", type(error)


def machine(*names: str) -> Any:
    """The test case that drives these two, skipped where a library is missing."""
    twins = type("Twins_" + "_".join(names), (Twins,), {"names": names})
    case = cast("Any", twins).TestCase
    case.settings = settings(
        max_examples=20,
        stateful_step_count=30,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    )
    return needs(*(BACKENDS[name].library for name in names if name != "model"))(case)


TestMemoryAgainstModel = machine("model", "memory")
TestEdgeAgainstModel = machine("model", "edge")
TestLocalAgainstModel = machine("model", "local")
TestMemoryAgainstEdge = machine("memory", "edge")
TestMemoryAgainstLocal = machine("memory", "local")
TestEdgeAgainstLocal = machine("edge", "local")
TestMemoryAgainstServer = machine("memory", "server")

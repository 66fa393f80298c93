"""Values at the edge: times, subclasses of plain types, what is shown, and errors that travel."""

from __future__ import annotations

import copy
import enum
import pickle
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from multiprocessing import get_context
from typing import Any, cast

import pytest
from conformance import NOW

import attuned_store
from attuned_store import (
    Axes,
    MemoryStore,
    MemoryStoreConfig,
    Source,
    StateSnapshot,
    StoreError,
    ValidationError,
)

pytestmark = pytest.mark.once

NOON = datetime(2026, 1, 17, 12, tzinfo=UTC)
NOON_MS = 1_768_651_200_000


# ------------------------------------------------------------------------------
# Times
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", [NOON, NOON.astimezone(timezone(timedelta(hours=-8)))])
def test_an_aware_datetime_is_a_time(moment: datetime) -> None:
    """A time may be given as an aware datetime of any zone, and is given back as one, in UTC."""
    snapshot = StateSnapshot("ann", {}, cast("Any", moment))
    assert (snapshot.updated_at_unix_ms, snapshot.updated_at) == (NOON_MS, NOON)
    assert snapshot.updated_at.tzinfo is UTC
    assert snapshot.patched({}, updated_at_unix_ms=moment).updated_at == NOON
    store = MemoryStore()
    store.upsert_many([snapshot, StateSnapshot("ann", {}, NOON_MS + 1)])
    assert store.get_history("ann", until=moment) == [snapshot]
    assert len(store.get_history("ann", since=moment)) == 2
    assert len(store.search_similar({"warmth": 1}, since=moment + timedelta(milliseconds=1))) == 1


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (NOON.replace(tzinfo=None), r"datetime\.now\(UTC\)"),
        (1_768_651_200.5, r"int\(time\.time\(\) \* 1000\)"),
        (1_768_651_200, "looks like seconds.*1768651200000"),
        (10**9, "looks like seconds"),
        (10**10, "looks like seconds"),
        ("2026-01-17", r"datetime\.fromisoformat"),
        pytest.param(10**5000, "cannot be shown", id="huge"),
    ],
)
def test_what_is_no_time_is_told_what_to_write(value: Any, hint: str) -> None:
    """A naive datetime, a float and a time in seconds are refused, with what to write instead."""
    with pytest.raises(ValidationError, match=rf"^updated_at_unix_ms: .*{hint}"):
        StateSnapshot("ann", {}, value)
    with pytest.raises(ValidationError, match=rf"^since: .*{hint}"):
        MemoryStore().get_history("ann", since=value)
    with pytest.raises(ValidationError, match=rf"^until: .*{hint}"):
        MemoryStore().search_similar({"warmth": 1}, until=value)


def test_milliseconds_of_1970_that_were_stored_are_read_back(tmp_path: Any) -> None:
    """What was stored is never refused for looking like seconds: not from disk, a file, nor a pickle."""
    early = attuned_store.stored_snapshot("ann", {"warmth": 0.5}, 10**9 + 7, "inferred", 0.5, 1)
    assert pickle.loads(pickle.dumps(early)) == copy.deepcopy(early) == early  # noqa: S301 - our own
    store = MemoryStore()
    store.upsert_latest(early)
    path = store.create_snapshot(tmp_path).path
    assert path is not None
    with attuned_store.open_store(tmp_path / "store") as kept:
        kept.restore_snapshot(path)
    with attuned_store.open_store(tmp_path / "store") as again:
        assert again["ann"] == early


def test_default_times_of_a_user_count_up(clock: Any) -> None:
    """A loop of states with default times leaves a history; users do not put each other off."""
    store = MemoryStore()
    for number in range(50):
        store.upsert_latest(StateSnapshot("ann", {"warmth": number / 50}))
    times = [entry.updated_at_unix_ms for entry in reversed(store.get_history("ann"))]
    assert times == list(range(NOW, NOW + 50))
    assert StateSnapshot("bob", {}).updated_at_unix_ms == NOW
    clock.now += 60_000
    assert StateSnapshot("ann", {}).updated_at_unix_ms == NOW + 60_000


def test_a_storm_of_states_does_not_run_into_the_future(clock: Any) -> None:
    """Default times are at most a second ahead of the clock, however many are asked for."""
    latest = max(StateSnapshot("ann", {}).updated_at_unix_ms for _ in range(5_000))
    assert NOW < latest <= NOW + 1_000


# ------------------------------------------------------------------------------
# Subclasses of plain types
# ------------------------------------------------------------------------------


class Axis(str, enum.Enum):  # noqa: UP042 - its str() is not its value, as it was before StrEnum
    WARMTH = "warmth"
    CALM = "calm"


class Liar(str):
    """A string that says it is another one."""

    __slots__ = ()

    def __str__(self) -> str:
        return "formality"

    def __hash__(self) -> int:
        return hash("warmth")

    def __eq__(self, other: object) -> bool:
        return other == "warmth"


class Number(float):
    def __float__(self) -> float:
        return 0.9


class Count(int):
    def __index__(self) -> int:
        return 7


def test_names_of_axes_become_plain_strings() -> None:
    """Members of an enum and other subclasses of str as names are kept as the strings that they are."""
    plain = StateSnapshot("ann", {"warmth": 0.1, "calm": 0.2}, NOW)
    given = StateSnapshot("ann", {Axis.WARMTH: 0.1, Axis.CALM: 0.2}, NOW)
    assert given == plain
    assert [type(name) for name in given.axes] == [str, str]
    assert list(MemoryStoreConfig(axes=tuple(Axis)).axes or ()) == ["warmth", "calm"]
    assert list(Axes({Liar("calm"): 0.3})) == ["calm"]
    assert Axes({"calm": 0.3}) == Axes({Liar("calm"): 0.3})


def test_a_store_made_with_an_enum_opens_again(tmp_path: Any) -> None:
    """What was written under names of an enum is read under the plain names, also after opening again."""
    for axes in (tuple(Axis), ("warmth", "calm"), None):
        with attuned_store.open_store(tmp_path / "store", axes=cast("Any", axes)) as store:
            assert store.axes == ("warmth", "calm")
            store.upsert_latest(StateSnapshot("ann", {Axis.CALM: 0.25}))
            assert dict(store["ann"].axes) == {"calm": 0.25}
            path = store.create_snapshot(tmp_path / "backups").path
            assert path is not None
            assert attuned_store.verify_snapshot(path).status == "completed"


def test_numbers_and_ids_become_plain() -> None:
    """Subclasses of float, int and str are kept as the numbers and strings that they hold."""
    snapshot = StateSnapshot(
        Liar("ann"), {"warmth": Number(0.25)}, Count(NOW), cast("Any", Source.MIXED), Number(0.5), Count(2)
    )
    assert snapshot == StateSnapshot("ann", {"warmth": 0.25}, NOW, "mixed", 0.5, 2)
    values = (snapshot.user_id, snapshot.axes["warmth"], snapshot.updated_at_unix_ms, snapshot.confidence)
    assert [type(value) for value in values] == [str, float, int, float]


@pytest.mark.parametrize(
    "names", [("a,b",), ("a", "b,c"), ("warmth", 3), ("warmth", None), ("Ä",), ("\ud800",)]
)
def test_names_that_are_none_are_refused(names: tuple[Any, ...]) -> None:
    """What is no name is refused, also where it would be one once it were joined with others."""
    Axes({"a": 0.1, "b": 0.2})
    Axes({"a": 0.1, "b": 0.2, "c": 0.3})
    with pytest.raises(ValidationError, match=r"^axes: a name is 1 to 64"):
        Axes(dict.fromkeys(names, 0.5))


# ------------------------------------------------------------------------------
# What is shown, and errors that travel
# ------------------------------------------------------------------------------


def test_a_snapshot_shows_its_values() -> None:
    """The repr shows the axes, the time in ISO form, and no more of the id than four characters."""
    shown = repr(StateSnapshot("ann-marie", {"warmth": 0.8125, "calm": 1}, NOON_MS, confidence=0.5))
    assert shown == (
        "StateSnapshot('ann-…', {'warmth': 0.8125, 'calm': 1}, 2026-01-17T12:00:00.000Z, "
        "source='self_report', confidence=0.5, schema_version=1)"
    )
    many = repr(StateSnapshot("ann", {f"axis{number}": 0.5 for number in range(11)}, NOON_MS))
    assert "'axis7': 0.5, … 3 more}" in many


def errors() -> list[StoreError]:
    found = list[StoreError]()
    for name in attuned_store.__all__:
        kind = getattr(attuned_store, name)
        if isinstance(kind, type) and issubclass(kind, StoreError):
            where = {"backend": "edge", "operation": "write", "status": 503}
            if issubclass(kind, attuned_store.RateLimitedError | attuned_store.CircuitOpenError):
                found.append(kind("wait", retry_after_s=1.5, **where))
            elif issubclass(kind, attuned_store.BackendError):
                found.append(kind("failed", retryable=True, **where))
            elif kind is attuned_store.ConflictError:
                found.append(kind("lost", ambiguous=True))
            else:
                found.append(kind("wrong"))
            found[-1].written = 3
    return found


@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_errors_survive_pickle_and_copy(error: StoreError) -> None:
    """Every public error comes out of pickle and copy as it went in."""
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301
        assert type(again) is type(error)
        assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def fail(number: int) -> None:
    raise errors()[number]


def test_errors_come_out_of_a_process_pool() -> None:
    """An error of a worker process reaches the caller as itself, and breaks no pool."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for number, error in enumerate(errors()[:4]):
            with pytest.raises(type(error)) as caught:
                pool.submit(fail, number).result()
            assert vars(caught.value)["written"] == 3

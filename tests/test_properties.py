"""What a snapshot accepts, refuses and keeps."""

# ruff: noqa: S301  (the pickles are made here)

from __future__ import annotations

import copy
import json
import math
import pickle
import struct
import unicodedata
import uuid
from collections.abc import Mapping
from typing import Any, cast

import attrs
import hypothesis.strategies as st
import numpy as np
import pytest
from conformance import BAD_USER_IDS, LAST_MS, LIKE_SECONDS, NOW, Clock
from hypothesis import example, given, settings

import attuned_store
from attuned_store import CANONICAL_AXES, Source, StateSnapshot, ValidationError

settings.register_profile("values", deadline=None, print_blob=True, max_examples=200)
VALUES = settings.get_profile("values")

LARGEST_VERSION = 2**63 - 1
USER_IDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=64)
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9_]{0,62}[a-z0-9])?", fullmatch=True)
UNIT = st.floats(0, 1)
AXES = st.dictionaries(NAMES, UNIT, max_size=8)
TIMES = st.integers(0, LAST_MS).filter(lambda time_ms: time_ms not in LIKE_SECONDS)
SNAPSHOTS = st.builds(
    StateSnapshot,
    USER_IDS,
    AXES,
    TIMES,
    st.sampled_from(Source),
    UNIT,
    st.integers(1, LARGEST_VERSION),
)


def make(**fields: Any) -> StateSnapshot:
    """A valid snapshot but for the fields given."""
    return StateSnapshot(**{"user_id": "ann", "axes": {"warmth": 0.25}, "updated_at_unix_ms": NOW, **fields})


def refuse(field: str, value: object, *shown: str) -> None:
    """The value is refused by a ValidationError that names the field, and shows what is given."""
    with pytest.raises(ValidationError) as caught:
        make(**{field: value})
    message = str(caught.value)
    assert field in message
    for text in shown:
        assert text in message
    assert isinstance(caught.value, ValueError)


# ------------------------------------------------------------------------------
# What is accepted
# ------------------------------------------------------------------------------


def test_ids_are_not_normalized() -> None:
    """An id in NFC and the same in NFD are two users, as README says."""
    composed, decomposed = (unicodedata.normalize(form, "Zoé") for form in ("NFC", "NFD"))
    with attuned_store.MemoryStore() as store:
        store.upsert_many([make(user_id=composed), make(user_id=decomposed)])
        assert list(store.users()) == [composed, decomposed]


@VALUES
@given(USER_IDS, AXES, TIMES, st.sampled_from(Source), UNIT, st.integers(1, LARGEST_VERSION))
def test_a_snapshot_keeps_what_it_was_given(
    user_id: str, axes: dict[str, float], at: int, source: Source, confidence: float, version: int
) -> None:
    """Every valid value is kept as it is."""
    snapshot = StateSnapshot(user_id, axes, at, source, confidence, version)

    assert (snapshot.user_id, snapshot.updated_at_unix_ms, snapshot.schema_version) == (user_id, at, version)
    assert (snapshot.source, snapshot.confidence) == (source, confidence)
    assert dict(snapshot.axes) == axes
    assert snapshot.axes == axes


def test_a_snapshot_has_defaults(clock: Clock) -> None:
    """A user id and axes are enough: it is a self-report of now, held with confidence."""
    clock.now = NOW + 7

    assert StateSnapshot("ann", {}) == StateSnapshot("ann", {}, NOW + 7, Source.SELF_REPORT, 1.0, 1)


BOUNDS: dict[str, list[Any]] = {
    "user_id": ["a", "a" * 256, "é" * 128, "🙂" * 64, " "],
    "axes": [
        {},
        {"a": 0, "0": 1, "a__b_9": 0.5, "a" * 64: 0.5},
        {f"axis_{number}": 0.5 for number in range(1_024)},
    ],
    "updated_at_unix_ms": [0, LAST_MS],
    "confidence": [0, 1, 0.0, 1.0],
    "schema_version": [1, LARGEST_VERSION],
}


@pytest.mark.parametrize("field", BOUNDS)
def test_the_bounds_of_every_field_are_accepted(field: str) -> None:
    """The first and the last value that a field may have are both valid."""
    for value in BOUNDS[field]:
        assert getattr(make(**{field: value}), field) == value


@VALUES
@given(
    st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.uint8, int, float]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_numbers_of_numpy_are_kept_as_floats(number: Any, value: float) -> None:
    """Axis values and the confidence may be ints, floats and numpy scalars, and are kept as floats."""
    given_value = number(value)

    snapshot = make(axes={"warmth": given_value}, confidence=given_value)

    assert type(snapshot.axes["warmth"]) is type(snapshot.confidence) is float
    assert snapshot.axes["warmth"] == snapshot.confidence == float(given_value)


@VALUES
@given(st.floats(0, 1, width=32))
def test_a_single_precision_number_keeps_its_value(value: float) -> None:
    """A numpy float32 is kept as the float that it is."""
    assert make(axes={"warmth": np.float32(value)}).axes["warmth"] == value


@pytest.mark.parametrize("source", list(Source))
def test_a_source_is_a_string(source: Source) -> None:
    """A source may be given as a plain string, and reads as one."""
    snapshot = make(source=str(source.value))

    assert snapshot.source is source
    assert snapshot.source == source.value == str(snapshot.source)


def test_the_sources_are_three() -> None:
    """A state is reported by the user, inferred, or both."""
    assert [source.value for source in Source] == ["self_report", "inferred", "mixed"]


# ------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("user_id", BAD_USER_IDS.values(), ids=BAD_USER_IDS)
def test_a_bad_user_id_is_refused(user_id: object) -> None:
    """A user id is a string of 1 to 256 bytes of UTF-8, without control characters and lone surrogates."""
    refuse("user_id", user_id)


@pytest.mark.parametrize(
    "character",
    [
        pytest.param(chr(code), id=f"U+{code:04X}")
        for code in range(0x110000)
        if unicodedata.category(chr(code)) == "Cc"
    ],
)
def test_every_control_character_is_refused(character: str) -> None:
    """No control character may be anywhere in a user id."""
    for user_id in (character, f"ann{character}", f"{character}ann", f"a{character}n"):
        refuse("user_id", user_id)


@VALUES
@given(st.characters(categories=["Cs"]), USER_IDS)
def test_every_lone_surrogate_is_refused(surrogate: str, user_id: str) -> None:
    """What cannot be written as UTF-8 is not a user id."""
    refuse("user_id", user_id[:8] + surrogate)


@VALUES
@given(USER_IDS.filter(lambda text: len(text.encode()) > 1), st.integers(257, 400))
def test_the_length_of_a_user_id_is_in_bytes(user_id: str, size: int) -> None:
    """A user id of more than 256 bytes is refused, however many characters it has."""
    text = (user_id * size).encode()[:size].decode(errors="ignore")
    if len(text.encode()) > 256:
        refuse("user_id", text)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "_",
        "_a",
        "a_",
        "Warmth",
        "war mth",
        "war-mth",
        "wärme",
        "a" * 65,
        "warmth\n",
        "warmth\0",
        "٣",
        "a.b",
        5,
        None,
    ],
    ids=repr,
)
def test_a_bad_axis_name_is_refused(name: Any) -> None:
    """An axis name is 1 to 64 of a-z, 0-9 and _, and neither begins nor ends with _."""
    refuse("axes", {name: 0.5})


@VALUES
@given(st.text(max_size=70))
@example("a\n")
def test_only_the_documented_axis_names_are_accepted(name: str) -> None:
    """A name is accepted if and only if the rule says so."""
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789_")
    if 1 <= len(name) <= 64 and set(name) <= allowed and name[0] != "_" != name[-1]:
        assert name in make(axes={name: 0.5}).axes
    else:
        refuse("axes", {name: 0.5})


def test_more_axes_than_1024_are_refused() -> None:
    """A snapshot has at most 1,024 axes."""
    refuse("axes", {f"axis_{number}": 0.5 for number in range(1_025)})


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        np.float64("nan"),
        np.float32("inf"),
        1.0000001,
        -0.0000001,
        2,
        -1,
        10**400,
        True,
        False,
        np.True_,
        "0.5",
        b"0.5",
        None,
        0.5j,
        np.complex128(0.5),
        [0.5],
        np.array([0.5, 0.5]),
        {},
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_that_is_no_number_in_0_to_1_is_refused(value: object) -> None:
    """An axis value and a confidence are real numbers from 0 to 1: no bools, no strings, no NaN."""
    refuse("axes", {"warmth": value}, "warmth")
    refuse("confidence", value)


@VALUES
@given(st.floats(allow_nan=True).filter(lambda number: not 0 <= number <= 1))
@example(math.nextafter(1, 2))
@example(-math.ulp(0))
def test_every_number_outside_0_to_1_is_refused(value: float) -> None:
    """The smallest step outside of 0 to 1 is refused, and the message shows the value."""
    refuse("axes", {"warmth": value}, "warmth", repr(value))
    refuse("confidence", value, repr(value))


@pytest.mark.parametrize("axes", [None, 5, "warmth", ["warmth"]], ids=repr)
def test_axes_that_are_no_mapping_are_refused(axes: object) -> None:
    """Axes are a mapping of names to values."""
    refuse("axes", axes)


@pytest.mark.parametrize("value", [-1, LAST_MS + 1, 10**30, 1.0, 1.5, math.nan, "now", None, True], ids=repr)
def test_a_bad_timestamp_is_refused(value: object) -> None:
    """A timestamp is an int, from 0 to the last millisecond of the year 9999."""
    refuse("updated_at_unix_ms", value, repr(value))


@pytest.mark.parametrize("value", [0, -1, LARGEST_VERSION + 1, 1.0, "1", None, True], ids=repr)
def test_a_bad_schema_version_is_refused(value: object) -> None:
    """A schema version is an int, at least 1 and at most the largest that engines keep."""
    refuse("schema_version", value, repr(value))


@pytest.mark.parametrize("value", ["guess", "SELF_REPORT", "", 5, None], ids=repr)
def test_a_bad_source_is_refused(value: object) -> None:
    """A source is one of the three."""
    refuse("source", value, repr(value))


def test_there_is_no_other_field() -> None:
    """A field that does not exist is an error, as in any class."""
    with pytest.raises(TypeError):
        make(colour="red")


def test_a_changed_copy_is_validated() -> None:
    """A copy made by attrs.evolve is checked like any other snapshot."""
    assert attrs.evolve(make(), confidence=0.5) == make(confidence=0.5)
    with pytest.raises(ValidationError):
        attrs.evolve(make(), confidence=2)


# ------------------------------------------------------------------------------
# A value
# ------------------------------------------------------------------------------


@VALUES
@given(SNAPSHOTS)
def test_equal_snapshots_have_equal_hashes(snapshot: StateSnapshot) -> None:
    """Snapshots are equal by value, and the order of axes is no part of it."""
    axes = dict(reversed(list(snapshot.axes.items())))
    twin = attrs.evolve(snapshot, axes=axes)

    assert twin == snapshot
    assert hash(twin) == hash(snapshot)
    assert hash(twin.axes) == hash(snapshot.axes)
    assert {snapshot: 1}[twin] == 1


@VALUES
@given(SNAPSHOTS, SNAPSHOTS)
def test_different_snapshots_are_not_equal(one: StateSnapshot, two: StateSnapshot) -> None:
    """Snapshots are equal if and only if all their fields are."""
    assert (one == two) == (one.to_dict() == two.to_dict())


def test_each_field_counts() -> None:
    """A difference in any one field makes snapshots differ."""
    different: list[dict[str, Any]] = [
        {"user_id": "bob"},
        {"axes": {"warmth": 0.5}},
        {"axes": {}},
        {"updated_at_unix_ms": NOW + 1},
        {"source": "mixed"},
        {"confidence": 0.5},
        {"schema_version": 2},
    ]

    assert all(make(**fields) != make() for fields in different)
    assert make() != cast("Any", make().to_dict())


@VALUES
@given(SNAPSHOTS, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_a_snapshot_can_be_pickled_and_copied(snapshot: StateSnapshot, protocol: int) -> None:
    """Pickling, copying and deep copying give an equal snapshot of the same hash."""
    for twin in (
        pickle.loads(pickle.dumps(snapshot, protocol)),
        copy.copy(snapshot),
        copy.deepcopy(snapshot),
    ):
        assert type(twin) is StateSnapshot
        assert twin == snapshot
        assert hash(twin) == hash(snapshot)
        assert twin.source is snapshot.source
    axes = pickle.loads(pickle.dumps(snapshot.axes, protocol))
    assert axes == snapshot.axes == copy.deepcopy(snapshot.axes)
    assert hash(axes) == hash(snapshot.axes)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (struct.pack(">d", 0.625), struct.pack(">d", 7.0)),
        (struct.pack(">d", 0.625), struct.pack(">d", math.nan)),
        (struct.pack(">d", 0.375), struct.pack(">d", -1.0)),
        (b"somebody", b"some\nody"),
        (b"warmth", b"WARMTH"),
    ],
    ids=["axis", "axis-nan", "confidence", "user-id", "axis-name"],
)
def test_unpickling_validates(good: bytes, bad: bytes) -> None:
    """A pickle that holds impossible values is refused."""
    data = pickle.dumps(StateSnapshot("somebody", {"warmth": 0.625}, NOW, confidence=0.375))
    assert data.count(good) == 1

    with pytest.raises(ValidationError):
        pickle.loads(data.replace(good, bad))


def test_a_snapshot_cannot_be_changed() -> None:
    """Neither a field nor an axis can be set, added or removed."""
    snapshot = make()

    for name in ("user_id", "axes", "confidence", "colour"):
        with pytest.raises(AttributeError):
            setattr(snapshot, name, "anything")
    with pytest.raises(AttributeError):
        del snapshot.user_id
    with pytest.raises(TypeError):
        snapshot.axes["warmth"] = 0.5  # type: ignore[index]
    with pytest.raises(TypeError):
        del snapshot.axes["warmth"]  # type: ignore[attr-defined]
    for name in ("clear", "pop", "popitem", "setdefault", "update"):
        assert not hasattr(snapshot.axes, name)
    assert snapshot == make()


def test_a_snapshot_shares_nothing_with_what_it_was_made_from() -> None:
    """Changing the dict that was passed in changes no snapshot."""
    axes = {"warmth": 0.25}
    snapshot = make(axes=axes)

    axes["warmth"] = 0.75
    axes["formality"] = 0.5

    assert snapshot == make(axes={"warmth": 0.25})


def test_axes_read_as_a_mapping() -> None:
    """The axes of a snapshot are a mapping, of a length, with keys, values and items."""
    axes = make(axes={"warmth": 0.25, "formality": 1}).axes

    assert isinstance(axes, Mapping)
    assert (len(axes), set(axes), sorted(axes.values())) == (2, {"warmth", "formality"}, [0.25, 1.0])
    assert axes.get("unheard_of") is None
    assert "warmth" in axes
    assert {**axes} == {"warmth": 0.25, "formality": 1.0}
    with pytest.raises(KeyError):
        axes["unheard_of"]


@VALUES
@given(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=5, max_size=40), AXES)
def test_a_snapshot_shows_at_most_four_characters_of_a_user_id(user_id: str, axes: dict[str, float]) -> None:
    """repr, str and format show at most the first four characters of a user id."""
    snapshot = StateSnapshot(user_id, axes)

    for text in (
        repr(snapshot),
        str(snapshot),
        f"{snapshot}",
        repr([snapshot]),
        repr(attuned_store.Match(snapshot, 0.5)),
    ):
        shown = [character for character in text if "\u4e00" <= character <= "\u9fff"]
        assert len(shown) <= 4
        assert "".join(shown) == user_id[: len(shown)]


# ------------------------------------------------------------------------------
# Its methods
# ------------------------------------------------------------------------------


@VALUES
@given(SNAPSHOTS, NAMES)
def test_an_absent_axis_is_neutral(snapshot: StateSnapshot, name: str) -> None:
    """axis(name) is the value of the axis, and 0.5 where it is absent."""
    assert snapshot.axis(name) == snapshot.axes.get(name, 0.5)
    assert all(snapshot.axis(known) == value for known, value in snapshot.axes.items())


@VALUES
@given(SNAPSHOTS.filter(lambda snapshot: snapshot.updated_at_unix_ms < LAST_MS), AXES, TIMES)
def test_a_patched_snapshot_is_newer_and_merged(
    snapshot: StateSnapshot, axes: dict[str, float], now: int
) -> None:
    """`patched` merges the axes in, keeps all else, and is of now, or of a millisecond later than before."""
    before = snapshot.to_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attuned_store.wall_clock, "now_ms", lambda: now)
        patched = snapshot.patched(axes)

    assert patched.to_dict() == {
        **before,
        "axes": {**before["axes"], **axes},
        "updated_at_unix_ms": max(now, snapshot.updated_at_unix_ms + 1),
    }
    assert snapshot.to_dict() == before


@VALUES
@given(SNAPSHOTS, TIMES, st.sampled_from(Source), UNIT, st.integers(1, LARGEST_VERSION))
def test_a_patched_snapshot_takes_the_fields_it_is_given(
    snapshot: StateSnapshot, at: int, source: Source, confidence: float, version: int
) -> None:
    """Fields given to patched are set; so is a timestamp, even an older one."""
    patched = snapshot.patched(
        {}, updated_at_unix_ms=at, source=source.value, confidence=confidence, schema_version=version
    )

    assert patched == StateSnapshot(snapshot.user_id, snapshot.axes, at, source, confidence, version)


def test_a_patched_snapshot_is_validated() -> None:
    """`patched` refuses what a snapshot refuses."""
    wrong: list[tuple[Any, dict[str, Any]]] = [
        ({"warmth": 2}, {}),
        ({"Warmth": 0.5}, {}),
        (5, {}),
        (None, {}),
        ({}, {"confidence": 2}),
        ({}, {"source": "guess"}),
        ({}, {"updated_at_unix_ms": -1}),
    ]
    for axes, fields in wrong:
        with pytest.raises(ValidationError):
            make().patched(axes, **fields)
    with pytest.raises((TypeError, ValidationError)):
        cast("Any", make()).patched({}, colour="red")
    with pytest.raises(ValidationError, match="updated_at_unix_ms"):
        make(updated_at_unix_ms=LAST_MS).patched({})


@VALUES
@given(SNAPSHOTS)
def test_a_snapshot_survives_a_dict_and_json(snapshot: StateSnapshot) -> None:
    """to_dict gives plain values in the order of the fields, and from_dict gives the snapshot back."""
    plain = snapshot.to_dict()

    assert list(plain) == ["user_id", "axes", "updated_at_unix_ms", "source", "confidence", "schema_version"]
    assert [type(value) for value in plain.values()] == [str, dict, int, str, float, int]
    assert StateSnapshot.from_dict(plain) == snapshot
    assert StateSnapshot.from_dict(json.loads(json.dumps(plain))) == snapshot


def test_a_dict_is_a_copy() -> None:
    """Changing what to_dict returned changes no snapshot."""
    snapshot = make()

    snapshot.to_dict()["axes"]["warmth"] = 0.75

    assert snapshot == make()


def test_a_dict_without_defaults_is_enough(clock: Clock) -> None:
    """from_dict needs a user id and axes, and fills in the defaults."""
    assert StateSnapshot.from_dict({"user_id": "ann", "axes": {}}) == StateSnapshot("ann", {}, NOW)


@pytest.mark.parametrize(
    "wrong",
    [
        {"axes": {}},
        {"user_id": "ann", "axes": {}, "colour": "red"},
        {"user_id": "ann", "axes": {}, 5: "five"},
        {"user_id": "ann", "axes": {"warmth": 2}},
        {"user_id": "", "axes": {}},
        {"user_id": "ann", "axes": {}, "source": None},
        {},
        [],
        "ann",
        None,
    ],
    ids=repr,
)
def test_a_dict_that_is_no_snapshot_is_refused(wrong: Any) -> None:
    """from_dict refuses unknown keys, missing fields and bad values."""
    with pytest.raises(ValidationError):
        StateSnapshot.from_dict(wrong)


def test_the_canonical_axes_are_valid_names() -> None:
    """A snapshot can have all 23 canonical axes, which are all different."""
    snapshot = make(axes=dict.fromkeys(CANONICAL_AXES, 0.5))

    assert tuple(snapshot.axes) == CANONICAL_AXES
    assert len(set(CANONICAL_AXES)) == 23


@given(st.text(min_size=1, max_size=60), st.one_of(st.just("latest"), st.integers(0, 253_402_300_799_999)))
def test_point_ids_are_version_5_uuids(user_id: str, suffix: str | int) -> None:
    """The id of a point is the UUIDv5 of the user and "latest" or the time."""
    namespace = uuid.uuid5(uuid.NAMESPACE_DNS, "attuned_store")
    try:
        name = f"{user_id}::{suffix}"
        name.encode()
    except UnicodeEncodeError:
        return
    assert attuned_store.make_point_id(user_id, suffix) == str(uuid.uuid5(namespace, name))

"""The values that stores keep and answer with: snapshots, matches and reports."""

from __future__ import annotations

import contextlib
import enum
import functools
import itertools
import math
import numbers
import operator
import re
import struct
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict, Unpack, cast

import attrs
from cachetools import FIFOCache

from attuned.base.errors import ValidationError, brief, plural, short_id, type_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CANONICAL_AXES: Final = (
    "cognitive_load",
    "decision_fatigue",
    "tolerance_for_complexity",
    "urgency_sensitivity",
    "emotional_openness",
    "emotional_stability",
    "anxiety_level",
    "need_for_reassurance",
    "warmth",
    "formality",
    "boundary_strength",
    "assertiveness",
    "reciprocity_expectation",
    "ritual_need",
    "transactional_preference",
    "verbosity_preference",
    "directness_preference",
    "autonomy_preference",
    "suggestion_tolerance",
    "interruption_tolerance",
    "reflection_vs_action_bias",
    "stakes_awareness",
    "privacy_sensitivity",
)

MAX_VECTOR_SIZE = 65_536
CANONICAL_VECTOR_SIZE = len(CANONICAL_AXES) + 1  # a spare one: an axis more needs no rebuilding
NEUTRAL = 0.5
MAX_AXES = 1024
_MAX_AXIS_NAME = 64
MAX_USER_ID_BYTES = 256
MAX_TIME_MS = 253_402_300_799_999  # the last millisecond of the year 9999, UTC
MAX_INTEGER = 2**63 - 1  # what Qdrant's payload integers hold
_SHOWN_AXES = 8  # of a snapshot in its repr
_SHOWN_NAMES = 4  # of the axes of a report
_AXIS_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_")


class WallClock:
    """The time of day; every look at it comes through the one below."""

    AHEAD_MS = 1_000  # at most: a storm of states does not run into the future

    def __init__(self) -> None:
        self._given: MutableMapping[object, int] = FIFOCache(1_024)  # the last default times, by user
        self._lock = threading.Lock()

    def now_ms(self) -> int:
        """Milliseconds since 1970, UTC."""
        return time.time_ns() // 1_000_000

    def default_ms(self, user_id: object) -> int:
        """The time of a state that is given none: now, or 1 ms after the last one of the user.

        So a loop of states leaves a history, though a millisecond has room for hundreds of them.
        """
        now = self.now_ms()
        if user_id.__class__ is not str:  # not checked yet
            return now
        with self._lock:
            last = self._given.get(user_id, -1)
            if now <= last < now + self.AHEAD_MS:
                now = last + 1
            self._given[user_id] = now
        return now


wall_clock = WallClock()


class Source(enum.StrEnum):
    """Where a snapshot comes from."""

    SELF_REPORT = "self_report"
    INFERRED = "inferred"
    MIXED = "mixed"


_SOURCES = {source.value: source for source in Source}


class Shape:
    """The names of a set of axes, checked once and then shared by all snapshots that have them."""

    __slots__ = ("heading", "index", "json_form", "names", "packing")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.index = {name: position for position, name in enumerate(names)}
        self.json_form = "{" + ",".join(f'"{name}":%r' for name in names) + "}"
        self.heading = ",".join(names) + ":"
        self.packing = struct.Struct(f">{len(names)}d")


class Shapes(dict[str, Shape]):
    """The shapes in use, by their names, joined by commas, which no name holds.

    What a subclass of str says of itself, as its hash, does not count so. An application has a handful of
    shapes; the bound is for generated names.
    """

    maximum = 1024


SHAPES = Shapes()


def shape_of(names: tuple[Any, ...]) -> Shape:
    """The shape with these names, which are checked where it is a new one."""
    try:
        key = ",".join(names)
        shape = SHAPES.get(key)
    except (TypeError, UnicodeError):
        key, shape = "", None  # one of them is no name, as is said below
    if shape is not None and len(shape.names) == len(names):
        return shape
    if len(names) > MAX_AXES:
        raise ValidationError(f"axes: at most {MAX_AXES} names, got {len(names)}")
    plain = tuple(map(_check_axis_name, names))
    if len(set(plain)) < len(plain):
        raise ValidationError(f"axes: each name once, got {brief(plain)}")
    if len(SHAPES) >= SHAPES.maximum:
        SHAPES.clear()
    shape = SHAPES[key] = Shape(plain)
    return shape


def _check_axis_name(name: object) -> str:
    """A name of an axis as a plain string."""
    plain = str.__str__(name) if isinstance(name, str) else ""
    if (
        not 1 <= len(plain) <= _MAX_AXIS_NAME
        or not _AXIS_CHARACTERS.issuperset(plain)
        or plain[0] == "_"
        or plain[-1] == "_"
    ):
        raise ValidationError(
            f"axes: a name is 1 to {_MAX_AXIS_NAME} of a-z, 0-9 and _, with no _ at either end; "
            f"got {brief(name)}"
        )
    return plain


def axis_name(heading: str) -> str:
    """The name of an axis for a heading, in snake_case: "energetic_arousal" for "Energetic Arousal".

    What has neither letters nor digits gives "", which is no name. Raises ValidationError.
    """
    if not isinstance(heading, str):
        raise ValidationError(f"heading: a string is needed, got {type_name(heading)}")
    return _snake_case(str.__str__(heading))


@functools.lru_cache(4_096)
def _snake_case(heading: str) -> str:
    if re.fullmatch(r"[a-z0-9]+(?:_+[a-z0-9]+)*", heading):
        return heading
    plain = "".join(c for c in unicodedata.normalize("NFKD", heading) if not unicodedata.combining(c))
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain)
    return re.sub(r"[\W_]+", "_", words).strip("_").lower()


class Axes(Mapping[str, float]):
    """The axes of a snapshot: an immutable, hashable, picklable mapping from name to value in [0, 1].

    It keeps the order in which the axes were given and compares equal to any mapping with the same items.
    Raises ValidationError for a bad name or value.
    """

    __slots__ = ("_shape", "_values")
    _shape: Shape
    _values: tuple[float, ...]

    def __new__(cls, axes: Mapping[str, float] | Iterable[tuple[str, float]] = ()) -> Self:
        """Check the axes; what is an Axes already is taken as it is."""
        return cast("Self", _checked_axes(axes))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("Axes are immutable; StateSnapshot.patched gives a changed copy")

    __delattr__ = cast("Any", __setattr__)

    def __getitem__(self, name: str) -> float:
        return self._values[self._shape.index[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shape.names)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Axes) and other._shape is self._shape:
            return self._values == other._values
        return dict(self) == other if isinstance(other, dict | Axes) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __repr__(self) -> str:
        return f"Axes({dict(self)})"

    def __copy__(self) -> Axes:
        return self

    def __deepcopy__(self, memo: object) -> Axes:
        return self

    def __reduce__(self) -> tuple[type[Axes], tuple[dict[str, float]]]:
        return Axes, (dict(self),)  # the constructor, so that unpickling validates


_set_shape = cast("Any", Axes._shape).__set__  # the slots' own setters, which go past __setattr__
_set_values = cast("Any", Axes._values).__set__


def _checked_axes(axes: Mapping[str, float] | Iterable[tuple[str, float]]) -> Axes:
    """What makes Axes. It stands outside of the class because every snapshot is made through it."""
    if axes.__class__ is Axes:  # isinstance() is slow for the subclass of an abstract class
        return cast("Axes", cast("object", axes))
    given = _as_dict(axes)
    return make_axes(shape_of(tuple(given)), tuple(given.values()))


def make_axes(shape: Shape, values: tuple[Any, ...]) -> Axes:
    """Axes of these names, with values that are checked here."""
    for value in values:
        if value.__class__ is not float or not 0.0 <= value <= 1.0:
            values = tuple(map(check_unit, [f"axes[{name!r}]" for name in shape.names], values))
            break
    made = object.__new__(Axes)
    _set_shape(made, shape)
    _set_values(made, values)
    return made


def _as_dict(axes: Any) -> dict[Any, Any]:
    try:
        return dict(axes)  # also a dict: what is checked must be what is kept
    except (TypeError, ValueError):
        raise ValidationError(
            f"axes: a mapping from axis name to value is needed, got {type_name(axes)}"
        ) from None


def removed_axes(axes: Any) -> tuple[str, ...]:
    """The names of those axes of a patch that are to be removed, checked as names."""
    return shape_of(tuple(name for name, value in _as_dict(axes).items() if value is None)).names


def check_unit(field: str, value: object) -> float:
    """A real number in [0, 1] as a float."""
    with contextlib.suppress(ValidationError):
        number = check_number(field, value)
        if 0.0 <= number <= 1.0:
            return number
    raise ValidationError(f"{field}: a real number from 0 to 1 is needed, got {brief(value)}")


def check_number(field: str, value: object) -> float:
    """A real number as a plain float."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer that is larger than any float
            number = float.__float__(value) if isinstance(value, float) else float(value)
            if not math.isnan(number):
                return number
    raise ValidationError(f"{field}: a number is needed, got {brief(value)}")


def check_integer(field: str, value: object, lowest: int, highest: int) -> int:
    """An integer within bounds, as a plain int."""
    if not isinstance(value, bool):
        try:
            number = int.__index__(operator.index(cast("Any", value)))
        except TypeError:
            pass  # not an integer: the error below says so
        else:
            if lowest <= number <= highest:
                return number
    bounds = f"of at least {lowest}" if highest == MAX_INTEGER else f"from {lowest} to {highest}"
    raise ValidationError(f"{field}: an integer {bounds} is needed, got {brief(value)}")


def check_user_id(value: object, field: str = "user_id") -> str:
    """An id of a user, or what follows the same rules, as a plain string."""
    if not isinstance(value, str):
        raise ValidationError(f"{field}: a string is needed, got {type_name(value)}")
    if value.__class__ is not str:
        value = str.__str__(value)
    if value.isascii() and value.isprintable() and 1 <= len(value) <= MAX_USER_ID_BYTES:
        return value
    shown = brief(short_id(value))
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValidationError(f"{field}: a lone surrogate is not valid text, got {shown}") from None
    if not 1 <= size <= MAX_USER_ID_BYTES:
        raise ValidationError(
            f"{field}: 1 to {MAX_USER_ID_BYTES} bytes of UTF-8 are needed, got {size} in {shown}"
        )
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise ValidationError(f"{field}: no control characters, got {shown}")
    return value


_LIKE_SECONDS = range(10**9, 10**10 + 1)  # from 2001 to 2286, in seconds; in milliseconds some weeks of 1970


def check_time_ms(value: object, field: str = "updated_at_unix_ms") -> int:
    """A time in milliseconds since 1970, UTC, of an int or an aware datetime, as a caller gives it."""
    if isinstance(value, datetime):
        if value.tzinfo is None or value.utcoffset() is None:
            raise ValidationError(
                f"{field}: a datetime needs a time zone, as in datetime.now(UTC); got a naive one"
            )
        value = (value - UNIX_EPOCH) // timedelta(milliseconds=1)
    elif isinstance(value, float):
        raise ValidationError(
            f"{field}: whole milliseconds since 1970 or an aware datetime are needed, got {brief(value)}; "
            "int(time.time() * 1000) makes them of the time in seconds"
        )
    elif isinstance(value, str):
        raise ValidationError(
            f"{field}: an aware datetime or whole milliseconds since 1970 are needed, got {brief(value)}; "
            "datetime.fromisoformat makes one of ISO 8601"
        )
    time_ms = check_integer(field, value, 0, MAX_TIME_MS)
    if time_ms in _LIKE_SECONDS:
        raise ValidationError(
            f"{field}: {time_ms} looks like seconds; milliseconds since 1970 are needed: {time_ms}000"
        )
    return time_ms


def check_source(value: Source | str) -> Source:
    """A source, of one or of its value."""
    if value.__class__ is Source:
        return cast("Source", cast("object", value))
    source = _SOURCES.get(value) if isinstance(value, str) else None  # callers need not be typed
    if source is None:
        raise ValidationError(f"source: one of {', '.join(_SOURCES)} is needed, got {brief(value)}")
    return source


class SnapshotFields(TypedDict, total=False):
    """The fields of a snapshot that ``patch`` and ``patched`` can set beside the axes."""

    updated_at_unix_ms: int | datetime
    source: Source | str
    confidence: float
    schema_version: int


@attrs.frozen(repr=False)
class StateSnapshot:
    """The state of one user at one time; immutable, validated at construction, equal by value.

    ``user_id`` is 1 to 256 bytes of UTF-8 without control characters; ``axes`` maps axis names to real
    numbers in [0, 1]; ``updated_at_unix_ms`` is milliseconds since 1970, UTC, or an aware datetime (now
    unless given, and at least 1 ms after the last such state of the user); ``source`` is a ``Source`` or its
    value; ``confidence`` is in [0, 1]; ``schema_version`` is at least 1. A violation raises ValidationError,
    which names the field, the rule and the value.

    >>> StateSnapshot("ada", {"warmth": 0.8}, updated_at_unix_ms=0).axis("formality")
    0.5
    """

    user_id: str
    axes: Axes = attrs.field(converter=_checked_axes)
    updated_at_unix_ms: int = attrs.field(
        default=attrs.Factory(lambda self: wall_clock.default_ms(self.user_id), takes_self=True)
    )
    source: Source = attrs.field(default=Source.SELF_REPORT, converter=check_source)
    confidence: float = 1.0
    schema_version: int = 1

    def __attrs_post_init__(self) -> None:
        # One pass with a fast way for each usual case: a snapshot is built on every read from disk.
        user_id, time_ms, confidence = self.user_id, self.updated_at_unix_ms, self.confidence
        if not (
            user_id.__class__ is str
            and user_id.isascii()
            and user_id.isprintable()
            and 0 < len(user_id) <= MAX_USER_ID_BYTES
        ):
            object.__setattr__(self, "user_id", check_user_id(user_id))
        if time_ms.__class__ is not int or not 0 <= time_ms <= MAX_TIME_MS or time_ms in _LIKE_SECONDS:
            object.__setattr__(self, "updated_at_unix_ms", check_time_ms(time_ms))
        if confidence.__class__ is not float or not 0.0 <= confidence <= 1.0:
            object.__setattr__(self, "confidence", check_unit("confidence", confidence))
        if self.schema_version.__class__ is not int or not 0 < self.schema_version <= MAX_INTEGER:
            version = check_integer("schema_version", self.schema_version, 1, MAX_INTEGER)
            object.__setattr__(self, "schema_version", version)

    @property
    def updated_at(self) -> datetime:
        """The time as an aware datetime, in UTC."""
        return UNIX_EPOCH + timedelta(milliseconds=self.updated_at_unix_ms)

    def __repr__(self) -> str:
        axes = [f"{name!r}: {value:.4g}" for name, value in itertools.islice(self.axes.items(), _SHOWN_AXES)]
        if len(self.axes) > _SHOWN_AXES:
            axes.append(f"… {len(self.axes) - _SHOWN_AXES} more")
        facts = [iso_time(self.updated_at_unix_ms), f"source={self.source.value!r}"]
        facts += [f"confidence={self.confidence:g}", f"schema_version={self.schema_version}"]
        return f"StateSnapshot({short_id(self.user_id)!r}, {{{', '.join(axes)}}}, {', '.join(facts)})"

    def _repr_html_(self) -> str:
        from attuned.base.html import snapshot_html

        return snapshot_html(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return stored_snapshot, attrs.astuple(self, recurse=False)

    def __copy__(self) -> StateSnapshot:
        return self

    def __deepcopy__(self, memo: object) -> StateSnapshot:
        return self

    def axis(self, name: str) -> float:
        """The value of an axis in [0, 1]; 0.5, which is neutral, where the snapshot does not have it.

        Raises ValidationError for what is no name.
        """
        if not isinstance(name, str):
            raise ValidationError(f"axis: a name is needed, got {type_name(name)}")
        return self.axes.get(name, NEUTRAL)

    def patched(self, axes: Mapping[str, float | None], **fields: Unpack[SnapshotFields]) -> StateSnapshot:
        """A new snapshot with these axes merged in, those given as None removed, and these fields set.

        Its time, unless given, is now, and at least 1 ms after that of this snapshot. Raises ValidationError.
        """
        unknown = fields.keys() - SnapshotFields.__annotations__.keys()
        if unknown:
            raise ValidationError(f"patched: unknown field {brief(min(unknown))}")
        given = _as_dict(axes)
        removed = removed_axes(given)
        merged = {**self.axes, **Axes({name: value for name, value in given.items() if value is not None})}
        for name in removed:
            merged.pop(name, None)
        fields.setdefault("updated_at_unix_ms", max(wall_clock.now_ms(), self.updated_at_unix_ms + 1))
        return attrs.evolve(self, axes=merged, **cast("Any", fields))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types, ``axes`` a dict; ``from_dict`` is the inverse."""
        return {**attrs.asdict(self, recurse=False), "axes": dict(self.axes), "source": self.source.value}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StateSnapshot:
        """A snapshot from a mapping with the names of its fields. Raises ValidationError."""
        if not isinstance(fields, Mapping):
            raise ValidationError(
                f"StateSnapshot: a mapping of its fields is needed, got {type_name(fields)}"
            )
        names = {field.name for field in attrs.fields(cls)}
        for name in fields:
            if name not in names:
                raise ValidationError(f"StateSnapshot: unknown field {brief(name)}")
        for name in ("user_id", "axes"):
            if name not in fields:
                raise ValidationError(f"{name}: missing")
        return cls(**fields)


@attrs.frozen
class Match:
    """A result of ``search_similar``: the snapshot and its cosine similarity, from -1 to 1."""

    snapshot: StateSnapshot
    score: float

    def _repr_html_(self) -> str:
        from attuned.base.html import Matches

        return Matches([self])._repr_html_()


@attrs.frozen
class Health:
    """What ``health`` found.

    ``status`` is healthy, degraded or unhealthy; ``backend`` memory, edge, local or server; ``latency_ms``
    how long the look took; ``users`` how many users there are and ``points`` how many latest snapshots and
    how many in history, together; None where unknown; ``location`` the directory or url. For a server:
    its ``version``, and the collection's ``collection_status`` and ``indexed_vectors``.
    """

    status: Literal["healthy", "degraded", "unhealthy"]
    backend: str
    latency_ms: float
    users: int | None = None
    points: int | None = None
    location: str | None = None
    message: str = ""
    version: str | None = None
    collection_status: str | None = None
    indexed_vectors: int | None = None

    def _repr_html_(self) -> str:
        from attuned.base.html import facts_html

        facts = {**attrs.asdict(self), "latency_ms": f"{self.latency_ms:.3g}"}
        return facts_html("Health", facts)


SnapshotReason = Literal["startup", "api", "manual"]


@attrs.frozen(kw_only=True)
class SnapshotReport:
    """What became of a snapshot, which is a backup of a store.

    ``status`` is completed, failed or skipped; ``target`` the store (or, where there is none, the file);
    ``reason`` why it was taken; ``kind`` native, a Qdrant server's own, or portable; ``path`` the file and
    ``snapshot_name`` its name; ``created_at`` when it was taken, UTC; ``axes`` of the store it was taken of;
    ``bytes`` and ``sha256`` of the file; ``users`` and ``points`` how many users and states it holds (a
    native one: points, latest ones and history); ``duration_ms`` how long it took; ``message`` what there
    is to say. None where unknown: a native one does not tell its axes and users.
    """

    status: Literal["completed", "failed", "skipped"]
    target: str
    reason: SnapshotReason = "manual"
    kind: Literal["native", "portable"] | None = None
    path: Path | None = None
    snapshot_name: str | None = None
    created_at: datetime | None = None
    axes: tuple[str, ...] | None = None
    bytes: int | None = None
    sha256: str | None = None
    users: int | None = None
    points: int | None = None
    duration_ms: float = 0.0
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types: ``path`` a string, ``created_at`` in ISO form, ``axes`` a list."""
        return {
            **attrs.asdict(self, recurse=False),
            "path": None if self.path is None else str(self.path),
            "created_at": None if self.created_at is None else iso_time(self.created_at),
            "axes": None if self.axes is None else list(self.axes),
        }

    def _repr_html_(self) -> str:
        from attuned.base.html import facts_html

        axes = ", ".join((self.axes or ())[:_SHOWN_NAMES])
        if self.axes is not None and len(self.axes) > _SHOWN_NAMES:
            axes += f", and {len(self.axes) - _SHOWN_NAMES:,} more"
        facts = {**self.to_dict(), "axes": axes, "duration_ms": f"{self.duration_ms:.3g}"}
        return facts_html("SnapshotReport", facts)


class _Any(enum.Enum):
    ANY = "ANY"

    def __repr__(self) -> str:
        return "ANY"


ANY: Final = _Any.ANY  # the default of expected=: whatever is there
Expected = StateSnapshot | Literal[_Any.ANY] | None
UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def iso_time(moment: int | datetime) -> str:
    """Write milliseconds since 1970, or a datetime in UTC, as ISO 8601."""
    if not isinstance(moment, datetime):
        moment = UNIX_EPOCH + timedelta(milliseconds=moment)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def stored_snapshot(  # noqa: PLR0917 - the fields of a snapshot
    user_id: str,
    axes: Axes | Mapping[str, float],
    updated_at_unix_ms: object,
    source: str,
    confidence: float,
    schema_version: int,
) -> StateSnapshot:
    """A snapshot that is read back: checked, but for the time that from a caller would look like seconds."""
    if updated_at_unix_ms.__class__ is not int or updated_at_unix_ms not in _LIKE_SECONDS:
        return StateSnapshot(
            user_id, axes, cast("int", updated_at_unix_ms), source, confidence, schema_version
        )
    snapshot = StateSnapshot(user_id, axes, 0, source, confidence, schema_version)
    object.__setattr__(snapshot, "updated_at_unix_ms", updated_at_unix_ms)
    return snapshot


def unsettled_message(user_ids: Sequence[str]) -> str:
    """What a report says of users who were not read at rest."""
    if not user_ids:
        return ""
    shown = ", ".join(map(short_id, user_ids[:5])) + (", and others" if user_ids[5:] else "")
    return (
        f"{plural(len(user_ids), 'user')} could not be read at rest, being written to all the while: {shown}"
    )


def distinct_users(snapshots: Iterable[StateSnapshot]) -> list[str]:
    """The users of snapshots, each once, in their order."""
    return list(dict.fromkeys(snapshot.user_id for snapshot in snapshots))


def time_of(snapshot: StateSnapshot) -> int:
    """The time of a snapshot, to sort by."""
    return snapshot.updated_at_unix_ms

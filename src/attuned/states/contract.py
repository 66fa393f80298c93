"""What a backend of states is asked for and answers."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs

from attuned.base.codec import MS_PER_DAY
from attuned.base.config import MemoryStoreConfig, check_flag
from attuned.base.errors import ConflictError, ValidationError, short_id, type_name
from attuned.base.values import (
    ANY,
    MAX_INTEGER,
    MAX_TIME_MS,
    Axes,
    Source,
    StateSnapshot,
    check_integer,
    check_number,
    check_source,
    check_time_ms,
    check_unit,
    check_user_id,
    wall_clock,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@attrs.frozen
class Retention:
    """How much history is kept and shown."""

    maximum: int
    days: float | None

    @classmethod
    def of(cls, config: MemoryStoreConfig) -> Retention:
        return cls(config.max_history_per_user if config.enable_history else 0, config.history_retention_days)

    def cutoff(self) -> int:
        """The oldest time, in ms, that history still shows."""
        return 0 if self.days is None else max(0, math.ceil(wall_clock.now_ms() - self.days * MS_PER_DAY))

    def hidden(self, times: Sequence[int]) -> int:
        """How many of these ascending times history does not show: the first so many."""
        by_number = len(times) - min(self.maximum, len(times))
        return by_number if self.days is None else max(by_number, bisect_left(times, self.cutoff()))

    def removable(self, times: Sequence[int]) -> int:
        """How many may be removed: those hidden, but the newest stays while there is history at all."""
        return self.hidden(times) if self.maximum == 0 else min(self.hidden(times), max(0, len(times) - 1))


def _since(value: int | None) -> int | None:
    return None if value is None else check_time_ms(value, "since")


def _until(value: int | None) -> int | None:
    return None if value is None else check_time_ms(value, "until")


class HistoryWindow(NamedTuple):
    """What get_history was asked for: times in ms, inclusive."""

    limit: int
    since: int
    until: int

    @classmethod
    def of(cls, limit: int, since: int | None, until: int | None) -> HistoryWindow:
        return cls(
            check_integer("limit", limit, 0, MAX_INTEGER),
            _since(since) or 0,
            MAX_TIME_MS if until is None else check_time_ms(until, "until"),
        )


def _asked_axes(query: StateSnapshot | Mapping[str, float]) -> Axes:
    return query.axes if isinstance(query, StateSnapshot) else Axes(query)


def _match_limit(value: int) -> int:
    return check_integer("limit", value, 1, MAX_INTEGER)


def _threshold(value: float | None) -> float:
    return -math.inf if value is None else check_number("score_threshold", value)


def _excluded(value: str | None) -> str | None:
    return None if value in (None, "") else check_user_id(value)


def check_history_flag(value: bool) -> bool:  # noqa: FBT001 - a converter has one argument
    return check_flag("history", value)


def _least_confidence(value: float | None) -> float | None:
    return None if value is None else check_unit("min_confidence", value)


@attrs.frozen(kw_only=True)
class SearchRequest:
    """What search_similar was asked for; checked at construction."""

    axes: Axes = attrs.field(converter=_asked_axes)
    limit: int = attrs.field(converter=_match_limit)
    score_threshold: float = attrs.field(converter=_threshold)
    user_id: str | None = attrs.field(converter=attrs.converters.optional(check_user_id))
    exclude_user_id: str | None = attrs.field(converter=_excluded)
    source: Source | None = attrs.field(converter=attrs.converters.optional(check_source))
    min_confidence: float | None = attrs.field(converter=_least_confidence)
    since: int | None = attrs.field(converter=_since)
    until: int | None = attrs.field(converter=_until)
    history: bool = attrs.field(converter=check_history_flag)

    def admits(self, snapshot: StateSnapshot) -> bool:
        """Whether a snapshot passes the filters."""
        return (
            (self.user_id is None or snapshot.user_id == self.user_id)
            and snapshot.user_id != self.exclude_user_id
            and (self.source is None or snapshot.source is self.source)
            and (self.min_confidence is None or snapshot.confidence >= self.min_confidence)
            and (self.since is None or snapshot.updated_at_unix_ms >= self.since)
            and (self.until is None or snapshot.updated_at_unix_ms <= self.until)
        )


def check_snapshot(value: object) -> StateSnapshot:
    if isinstance(value, StateSnapshot):
        return value
    raise ValidationError(f"snapshot: a StateSnapshot is needed, got {type_name(value)}")


def check_expected(expected: object) -> None:
    if not (expected is ANY or expected is None or isinstance(expected, StateSnapshot)):
        raise ValidationError(f"expected: a StateSnapshot, None or ANY is needed, got {type_name(expected)}")


def conflict_error(
    user_id: str, expected: StateSnapshot | None, found: StateSnapshot | None
) -> ConflictError:
    def at(snapshot: StateSnapshot | None) -> str:
        return "none" if snapshot is None else f"one of {snapshot.updated_at_unix_ms}"

    return ConflictError(
        f"user {short_id(user_id)!r}: expected {at(expected)} as the latest snapshot, found {at(found)}; "
        "read it again and retry, or use update()"
    )


BATCH_SIZE = 64  # snapshots or users in one step of a long operation: about 5 ms on the slowest engine


Cursor = Any  # where the next page begins: known to the engine alone; None begins


def clamp_score(score: float) -> float:
    return max(-1.0, min(1.0, score))  # rounding may lead out of the range of a cosine


STATUS_TIMEOUT = 5.0  # seconds

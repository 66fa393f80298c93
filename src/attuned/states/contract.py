"""The upper waist: what a database does for the states of users, and what it is asked.

``Backend`` is what a new database implements, natively and best: the operations in states/operations.py and
the stores over them need no more. ``Place`` is where a backend is, and how an operation gets there: through
the lock of a directory, over a connection, or not at all. To write a backend, begin with MemoryBackend.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import attrs

from attuned.base.codec import MS_PER_DAY, Schema
from attuned.base.config import MemoryStoreConfig, check_flag
from attuned.base.errors import (
    ConflictError,
    T,
    ValidationError,
    closed_error,
    short_id,
    type_name,
)
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
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from attuned.base.values import Health, Match, SnapshotReport
    from attuned.engines.waist import Engine
    from attuned.snapshots.directory import SnapshotRequest

BATCH_SIZE = 64  # snapshots or users in one step of a long operation: about 5 ms on the slowest engine

Cursor = Any  # where the next page begins: known to the backend alone; None begins


class StatesPage(NamedTuple):
    """All states of some users, each user's together, oldest first, and where the next page begins."""

    states: Sequence[StateSnapshot]
    cursor: Cursor = None
    unsettled: Sequence[str] = ()  # the users whose states may be of several moments


@attrs.frozen
class Retention:
    """How much history is kept and shown."""

    maximum: int
    days: float | None

    @classmethod
    def of(cls, config: MemoryStoreConfig) -> Retention:
        """That of a configuration."""
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


class HistoryWindow(NamedTuple):
    """What get_history was asked for: times in ms, inclusive."""

    limit: int
    since: int
    until: int

    @classmethod
    def of(cls, limit: int, since: int | datetime | None, until: int | datetime | None) -> HistoryWindow:
        """Check what a caller gave."""
        return cls(
            check_integer("limit", limit, 0, MAX_INTEGER),
            0 if since is None else check_time_ms(since, "since"),
            MAX_TIME_MS if until is None else check_time_ms(until, "until"),
        )


@attrs.frozen(kw_only=True)
class SearchRequest:
    """What search_similar was asked for."""

    axes: Axes
    limit: int
    score_threshold: float
    user_id: str | None
    exclude_user_id: str | None
    source: Source | None
    min_confidence: float | None
    since: int | None
    until: int | None
    history: bool

    @classmethod
    def of(
        cls,
        query: StateSnapshot | Mapping[str, float],
        *,
        limit: int,
        score_threshold: float | None,
        user_id: str | None,
        exclude_user_id: str | None,
        source: Source | str | None,
        min_confidence: float | None,
        since: int | datetime | None,
        until: int | datetime | None,
        history: bool,
    ) -> SearchRequest:
        """Check what a caller gave."""
        return cls(
            axes=query.axes if isinstance(query, StateSnapshot) else Axes(query),
            limit=check_integer("limit", limit, 1, MAX_INTEGER),
            score_threshold=-math.inf
            if score_threshold is None
            else check_number("score_threshold", score_threshold),
            user_id=None if user_id is None else check_user_id(user_id),
            exclude_user_id=None if exclude_user_id in (None, "") else check_user_id(exclude_user_id),
            source=None if source is None else check_source(source),
            min_confidence=None if min_confidence is None else check_unit("min_confidence", min_confidence),
            since=None if since is None else check_time_ms(since, "since"),
            until=None if until is None else check_time_ms(until, "until"),
            history=check_flag("history", history),
        )

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


class Backend(Protocol):
    """A database of users and their states.

    ``name`` is that of the engine; ``batch_size`` how many snapshots or users one step of a long operation
    takes; ``schema`` the axes, known once it ``is_open``. ``native_snapshots``: it takes snapshots of its
    own, and is changed in place by a restore. A method that a user's id or a snapshot is given gets it
    checked.
    """

    name: str
    batch_size: int
    is_open: bool
    schema: Schema
    native_snapshots: bool

    async def open(self) -> None:
        """Make ready what is needed, such as tables or a collection; harmless when repeated."""
        ...

    def begin(self, operation: Callable[[Any], Coroutine[Any, Any, T]]) -> Coroutine[Any, Any, T]:
        """The coroutine of an operation on this backend; one that opens itself on first use does so there."""
        ...

    def cached(self, user_id: str) -> StateSnapshot | None:
        """The latest snapshot where memory has it. Safe without a lock: it only looks."""
        ...

    async def find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        """The latest snapshots of those of these users who have one, in this order."""
        ...

    async def history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        """What the history of a user shows within a window, newest first."""
        ...

    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """Write each as if it came alone, in this order: the newest time of a user wins."""
        ...

    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        """Write a snapshot if ``expected`` is the latest, None for none; else raise ConflictError."""
        ...

    async def delete(self, user_id: str) -> bool:
        """Remove all of a user; True if there was anything."""
        ...

    async def search(self, request: SearchRequest, cursor: Cursor) -> tuple[list[Match], Cursor]:
        """A page of the snapshots that the request admits, about in the order of their similarity.

        Further pages hold less similar ones; who asks has enough with as many as the request wants.
        """
        ...

    async def users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        """A page of users."""
        ...

    async def states(self, cursor: Cursor) -> StatesPage:
        """All that history shows of a page of users, and the latest; what is of one user is of one moment."""
        ...

    async def count(self) -> int:
        """How many users there are."""
        ...

    async def count_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """How many snapshots the histories of a page of users show."""
        ...

    async def prune_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """Remove what the histories of a page of users hide; how many snapshots that was."""
        ...

    async def stage(self, token: str) -> Backend:
        """What is written to the backend that this gives takes the place of the contents when adopted."""
        ...

    async def adopt(self, staged: Any) -> None:
        """Let what was staged take the place of the contents."""
        ...

    async def discard(self, staged: Any) -> None:
        """Give up what was staged."""
        ...

    async def add_axes(self, names: Sequence[str]) -> None:
        """Add axes to the schema, whole or not at all; raises StoreError where others hold it too."""
        ...

    async def look(self, seconds: float) -> Health:
        """How it is and how much it holds, found out within so many seconds."""
        ...


class NativeBackend(Backend, Protocol):
    """A backend with ``native_snapshots``."""

    async def create_native(self, request: SnapshotRequest, location: str) -> SnapshotReport | None:
        """Take a snapshot of the database's own; None where a portable one will do and is needed."""
        ...

    async def restore_native(self, path: Path, sha256: str) -> None:
        """Let the database replace the collection by what a snapshot of its own holds."""
        ...


class Place(Protocol):
    """Where the backend of a store is, and how its operations get there.

    ``location`` is what open_store opens it with; ``engine`` the name of the engine, "qdrant" before it is
    known. ``is_shown``: it can be asked how it is without awaiting, as a notebook does.
    """

    location: str
    is_shown: bool

    @property
    def engine(self) -> str:
        """See above."""
        ...

    async def open(self) -> Backend:
        """Open what the store has not opened yet; raises StoreLockedError, SchemaMismatchError."""
        ...

    async def drive(self, body: Coroutine[Any, Any, T], *, long: bool = False) -> T:
        """Run one piece of an operation; ``long``: where it holds up nobody, such as in a worker thread."""
        ...

    async def with_engine(self, operation: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """Run one piece of work on the engine of points here, as ``drive`` would."""
        ...

    async def close(self) -> None:
        """Release everything."""
        ...

    def signs(self, latency_ms: float) -> list[str]:
        """What is known of trouble besides what a look found."""
        ...


class _ClosedBackend:
    """What a closed store has in place of its backend: every use raises."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise closed_error()


class _UnopenedBackend:
    """What a store has in place of its backend until it is opened."""

    batch_size = BATCH_SIZE
    is_open = False
    native_snapshots = False

    def cached(self, user_id: str) -> None:
        """Nothing is known before opening."""


CLOSED = cast("Backend", _ClosedBackend())
UNOPENED = cast("Backend", _UnopenedBackend())


def check_expected(expected: object) -> None:
    """Raise ValidationError unless a caller gave what a write can be conditional on."""
    if not (expected is ANY or expected is None or isinstance(expected, StateSnapshot)):
        raise ValidationError(f"expected: a StateSnapshot, None or ANY is needed, got {type_name(expected)}")


def check_state(schema: Schema, snapshot: object) -> StateSnapshot:
    """A snapshot that a store with this schema can keep."""
    if not isinstance(snapshot, StateSnapshot):
        raise ValidationError(f"snapshot: a StateSnapshot is needed, got {type_name(snapshot)}")
    schema.check(snapshot.axes)
    return snapshot


def conflict_error(
    user_id: str, expected: StateSnapshot | None, found: StateSnapshot | None
) -> ConflictError:
    """What a conditional write raises that found another snapshot, or none."""

    def at(snapshot: StateSnapshot | None) -> str:
        return "none" if snapshot is None else f"one of {snapshot.updated_at_unix_ms}"

    return ConflictError(
        f"user {short_id(user_id)!r}: expected {at(expected)} as the latest snapshot, found {at(found)}; "
        "read it again and retry, or use update()"
    )


def clamp_score(score: float) -> float:
    """A cosine within its range, which rounding may have left; zero has no sign."""
    return max(-1.0, min(1.0, score)) + 0.0


def page_of_ids(remaining: Iterator[str], size: int) -> tuple[list[str], Cursor]:
    """A page of ids that are in memory, and the cursor to the next one."""
    page = list(itertools.islice(remaining, size))
    return page, remaining if len(page) == size else None

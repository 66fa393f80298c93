"""States as points: what backends over an engine of points share."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import operator
from abc import ABC, abstractmethod
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from attuned.base.codec import FORMAT_VERSION, Schema, make_point_id, pack_axes, unpack_axes
from attuned.base.config import QdrantStoreConfig, check_axis_names
from attuned.base.errors import BackendError, SchemaMismatchError, T, ValidationError, brief, one_line
from attuned.base.values import (
    MAX_VECTOR_SIZE,
    Health,
    Match,
    StateSnapshot,
    check_integer,
    stored_snapshot,
    time_of,
)
from attuned.engines.filters import AnyOf, Condition, Equal, Filter, Range
from attuned.engines.waist import CollectionSpec, Engine, IndexKind, Page, Point, Record
from attuned.states.contract import (
    BATCH_SIZE,
    Cursor,
    HistoryWindow,
    Retention,
    SearchRequest,
    StatesPage,
    clamp_score,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence

LATEST = Equal("kind", "latest")
HISTORY = Equal("kind", "history")
LAST_BITS = 1e-12  # by so much an engine may change a float
_MOST_MATCHES = 2**31 - 1
_SCANNED = 500  # points in one step of a search that ranks them here
LINEAGE = 32  # revisions that a point on a server remembers
MAX_COUNTED = 10_000  # users whose writes are counted on a server
WHOLE_HISTORY = 1_000_000  # more entries than the history of one user can sensibly have


def encode_snapshot(snapshot: StateSnapshot, kind: str, engine: Engine) -> dict[str, Any]:
    """The payload of a point, without the user: its axes nested or, where that is cheaper, as a text.

    Where an engine would read a float as another one there is a text that tells the exact one.
    """
    axes, confidence, exact = snapshot.axes, snapshot.confidence, dict[str, str]()
    if engine.rounds_floats:
        if _is_rounded(confidence):
            exact["exact_confidence"] = repr(confidence)
        if not engine.compact and any(map(_is_rounded, axes._values)):
            exact["exact_axes"] = pack_axes(axes)
    return {
        "updated_at_unix_ms": snapshot.updated_at_unix_ms,
        "source": snapshot.source.value,
        "confidence": confidence,
        "schema_version": snapshot.schema_version,
        "axes": pack_axes(axes) if engine.compact else dict(axes),
        "kind": kind,
        **exact,
    }


def _is_rounded(value: float) -> bool:
    """Whether an engine that reads the digits and divides by a power of ten may miss a value from 0 to 1.

    It meets it where all its digits, of which there are at most 15, make an integer.
    """
    text = repr(value)
    return len(text) > len("0.123456789012345") or "e" in text


def decode_snapshot(payload: Mapping[str, Any]) -> StateSnapshot:
    """The snapshot that a payload of either form holds."""
    try:
        axes = payload.get("exact_axes", payload["axes"])
        return stored_snapshot(
            payload["user_id"],
            unpack_axes(axes) if isinstance(axes, str) else axes,
            payload["updated_at_unix_ms"],
            payload["source"],
            float(payload.get("exact_confidence", payload["confidence"])),
            payload["schema_version"],
        )
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise BackendError(
            f"a point does not hold a state snapshot: {one_line(str(error))[:200]}",
            backend="qdrant",
            operation="decode",
        ) from error


def payload_field(record: Record, field: str, kind: type[T]) -> T:
    """A field of a payload that need not hold a snapshot."""
    value = record.payload.get(field)
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    message = f"a point does not hold a state snapshot: it has no {field}"
    raise BackendError(message, backend="qdrant", operation="decode")


def _where(search: SearchRequest) -> Filter:
    # The latest point stands for its state in history too, which may lack it: see PointsBackend._lacking.
    must: list[Condition] = [] if search.history else [LATEST]
    if search.source is not None:
        must.append(Equal("source", search.source.value))
    if search.min_confidence is not None:
        must.append(Range("confidence", gte=search.min_confidence - LAST_BITS))
    if search.since is not None or search.until is not None:
        must.append(Range("updated_at_unix_ms", search.since, search.until))
    excluded = () if search.exclude_user_id is None else (Equal("user_id", search.exclude_user_id),)
    return Filter(tuple(must), excluded)


def recorded_schema(config: QdrantStoreConfig, found: Mapping[str, Any]) -> Schema:
    """The schema of a collection, if it is ours and what the configuration asks for."""
    place = f"{config.path or config.url}: collection {config.collection_name!r}"
    version, axes, vector_size = (found.get(key) for key in ("format_version", "axes", "vector_size"))
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise SchemaMismatchError(
            f"{place} has format {brief(version)}; this version reads up to {FORMAT_VERSION}: "
            "upgrade attuned-store"
        )
    try:
        recorded = check_axis_names(axes) or ()
        size = check_integer("vector_size", vector_size, max(1, len(recorded)), MAX_VECTOR_SIZE)
    except (TypeError, ValidationError):
        recorded, size = (), 0
    if version != FORMAT_VERSION or not recorded:
        raise SchemaMismatchError(f"{place} was not made by attuned_store; choose another collection_name")
    for name, asked, there in (
        ("axes", config.axes, recorded),
        ("vector_size", config.vector_size, size),
    ):
        if asked is not None and asked != there:
            raise SchemaMismatchError(f"{place} has {name} {there}; this store asks for {asked}")
    return Schema(recorded, size)


class _Reading(NamedTuple):
    """Where a reading of all states stands."""

    following: Cursor  # where the next page of users begins
    share: int  # how many users to read at once


class _Scan(NamedTuple):
    """Where a search for very many stands, which is ranked here, page by page."""

    following: Cursor  # where the next page begins
    runs: list[list[tuple[float, str]]]  # scores and ids of the pages so far, the best first in each
    ranked: Iterator[tuple[float, str]] | None  # all of them, once there are no more pages


class _Ranking(NamedTuple):
    """Where a long search stands."""

    ids: Sequence[str]  # of points, the most similar first
    position: int  # of the next of these to be looked at
    asked: int  # how many were asked for; 0 if there are no more


class PointsBackend(ABC):
    """The logic of the Qdrant stores that every engine shares.

    It awaits the engine and itself, nothing else.
    """

    schema: Schema
    batch_size = BATCH_SIZE
    most_ranked = _MOST_MATCHES  # of how many the engine is asked for the order at once
    is_open = False
    native_snapshots = False
    indexes: Mapping[str, IndexKind] = {
        "kind": "keyword",
        "updated_at_unix_ms": "integer",
        "source": "keyword",
    }

    def __init__(self, engine: Engine, config: QdrantStoreConfig, collection: str | None = None) -> None:
        self.engine = engine
        self.name = engine.name
        self.config = config
        self._collection = collection or config.collection_name
        self._retention = Retention.of(config)

    @abstractmethod
    def cached(self, user_id: str) -> StateSnapshot | None:
        """The latest snapshot where a cache has it. Safe without a lock: it only looks."""

    @abstractmethod
    async def find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        """The latest snapshots of those of these users who have one."""

    @abstractmethod
    async def history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        """See Backend.history."""

    @abstractmethod
    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """See Backend.write."""

    @abstractmethod
    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        """See Backend.write_expected."""

    @abstractmethod
    async def delete(self, user_id: str) -> bool:
        """See Backend.delete."""

    @abstractmethod
    async def stage(self, token: str) -> PointsBackend:
        """What is written to the backend that this gives takes the place of the contents when adopted."""

    @abstractmethod
    async def adopt(self, staged: PointsBackend) -> None:
        """Let what was staged take the place of the contents."""

    @abstractmethod
    async def discard(self, staged: PointsBackend) -> None:
        """Give up what was staged."""

    @abstractmethod
    async def add_axes(self, names: Sequence[str]) -> None:
        """See Backend.add_axes."""

    @abstractmethod
    async def _times_of(self, user_id: str) -> list[int]:
        """The times of a user's history, ascending, hidden ones included."""

    @abstractmethod
    async def _remove(self, times: Mapping[str, list[int]]) -> None:
        """Remove the oldest entries of histories, which are given."""

    async def _open_schema(self) -> Schema:
        """Open the collection, creating it where absent: with the axes that it had, if it has been open."""
        fresh = getattr(self, "schema", None) or Schema.of(self.config)
        wanted = {
            "format_version": FORMAT_VERSION,
            "axes": list(fresh.axes),
            "vector_size": fresh.vector_size,
        }
        accept = functools.partial(recorded_schema, self.config)
        collection = CollectionSpec(
            self._collection, fresh.vector_size, self.indexes, wanted, accept, tenant="user_id"
        )
        return accept(await self.engine.open(collection))

    @abstractmethod
    async def open(self) -> None:
        """See Backend.open."""

    def begin(self, operation: Callable[[Any], Coroutine[Any, Any, T]]) -> Coroutine[Any, Any, T]:
        """The coroutine of an operation; one that needs the collection opens it first."""
        return operation(self)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        """The latest snapshot of a user, as a step of other operations."""
        return (await self.find([user_id])).get(user_id)

    async def search(
        self, request: SearchRequest, cursor: _Ranking | _Scan | None
    ) -> tuple[list[Match], Cursor]:
        """See Backend.search."""
        if request.history and not self._retention.maximum:
            return [], None
        if isinstance(cursor, _Scan):
            return await self._scan(request, cursor)
        return await self._rank(request, cursor)

    async def _rank(self, request: SearchRequest, cursor: _Ranking | None) -> tuple[list[Match], Cursor]:
        """A step of a search; where more are wanted than one piece may hold, their ids come first."""
        vector, where = self.schema.vector(request.axes), _where(request)
        wanted = 2 * request.limit + 1 if request.history else request.limit
        find = functools.partial(self.engine.search, self._collection, vector, where, tenant=request.user_id)
        if cursor is None:
            limit = min(wanted, max(4 * BATCH_SIZE, self.batch_size))
            records = await find(limit)
            matches = await self._matches(request, records)
            ended = len(records) < limit or records[-1].score < request.score_threshold
            if ended or len(matches) >= request.limit:
                return matches, None
            return [], _Ranking((), 0, limit)
        if cursor.position >= len(cursor.ids):  # some were not to be shown: look further
            limit = min(max(wanted, 4 * cursor.asked), _MOST_MATCHES)
            if limit > self.most_ranked:
                return await self._scan(request, _Scan(None, [], None))
            records = await find(limit, payload=False)
            least = request.score_threshold - 1e-4
            ids = [str(record.id) for record in records if record.score >= least]
            asked = 0 if len(ids) < limit or limit == _MOST_MATCHES else limit
            return [], _Ranking(ids, cursor.position, asked) if cursor.position < len(ids) else None
        position = cursor.position + self.batch_size
        records = await self.engine.retrieve(self._collection, cursor.ids[cursor.position : position])
        following = cursor._replace(position=position) if cursor.asked or position < len(cursor.ids) else None
        return await self._matches(request, records, vector), following

    async def _scan(self, request: SearchRequest, scan: _Scan) -> tuple[list[Match], Cursor]:
        """A step of a search for very many: to rank a page of all that match, then to read the best."""
        direction = self.schema.vector(request.axes)
        if scan.ranked is not None:
            ids = [point_id for _, point_id in itertools.islice(scan.ranked, self.batch_size)]
            records = await self.engine.retrieve(self._collection, ids) if ids else []
            return await self._matches(request, records, direction), scan if ids else None
        page = await self.engine.page(
            self._collection,
            _where(request),
            limit=_SCANNED,
            tenant=request.user_id,
            cursor=scan.following,
            payload=False,
        )
        ids = [str(record.id) for record in page.records]
        found = await self.engine.retrieve(self._collection, ids, payload=False, vector=True) if ids else []
        scored = ((sum(map(operator.mul, direction, each.vector)), str(each.id)) for each in found)
        least = request.score_threshold - 1e-4
        scan.runs.append(sorted((pair for pair in scored if pair[0] >= least), reverse=True))
        if page.cursor is not None:
            return [], scan._replace(following=page.cursor)
        return [], scan._replace(ranked=heapq.merge(*scan.runs, reverse=True))

    async def _matches(
        self, request: SearchRequest, records: Sequence[Record], direction: Sequence[float] | None = None
    ) -> list[Match]:
        """Those of these records that are to be shown; with a direction they are compared with it anew.

        A state may have been replaced since it was found: what is told of it is what it is now.
        """
        matches: list[Match] = []
        for record in await self._shown(records) if request.history else records:
            entry, score = decode_snapshot(record.payload), record.score
            if direction is not None:
                score = math.fsum(map(operator.mul, direction, self.schema.vector(entry.axes)))
            match = Match(entry, clamp_score(score))
            if match.score >= request.score_threshold and request.admits(entry):
                matches.append(match)
        return matches

    async def _shown(self, records: Sequence[Record]) -> list[Record]:
        """Those records of both kinds that history shows, each state once: one not yet trimmed holds more."""
        users = dict.fromkeys(payload_field(record, "user_id", str) for record in records)
        latest = await self._latest_times(list(users))
        overfull, cutoff = await self._overfull(latest), self._retention.cutoff()
        seen, shown = set[tuple[str, int]](), list[Record]()
        for record in records:
            user_id = payload_field(record, "user_id", str)
            time_ms = payload_field(record, "updated_at_unix_ms", int)
            newest = latest.get(user_id)
            if newest is None or time_ms < cutoff or (user_id, time_ms) in seen:
                continue
            if time_ms == newest and payload_field(record, "kind", str) != "latest":
                continue  # the latest point is what counts, should they differ
            if user_id in overfull:
                times = await self._timeline(user_id, newest)
                if time_ms not in times[self._retention.hidden(times) :]:
                    continue
            seen.add((user_id, time_ms))
            shown.append(record)
        return shown

    async def users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        """See Backend.users."""
        page = await self._latest_page(cursor)
        return [payload_field(record, "user_id", str) for record in page.records], page.cursor

    async def _latest_page(self, cursor: Cursor) -> Page:
        return await self.engine.page(
            self._collection, Filter((LATEST,)), limit=self.batch_size, cursor=cursor
        )

    async def _latest_times(self, user_ids: Sequence[str]) -> dict[str, int]:
        """The times of the latest snapshots of those of these users who have one."""
        return {user_id: time_of(latest) for user_id, latest in (await self.find(user_ids)).items()}

    async def _latest_times_page(self, cursor: Cursor) -> tuple[dict[str, int], Cursor]:
        """A page of users, with the times of their latest snapshots."""
        page = await self._latest_page(cursor)
        pairs = (
            (payload_field(record, "user_id", str), payload_field(record, "updated_at_unix_ms", int))
            for record in page.records
        )
        return dict(pairs), page.cursor

    async def _lacking(self, latest: Mapping[str, int]) -> set[str]:
        """The users whose history holds no copy of their latest snapshot, which counts as an entry of it.

        History was off when that was written, or all of it was pruned for its age.
        """
        ids = {make_point_id(user_id, time_ms): user_id for user_id, time_ms in latest.items()}
        there = await self.engine.retrieve(self._collection, list(ids), payload=False) if ids else []
        found = {str(record.id) for record in there}
        return {user_id for point_id, user_id in ids.items() if point_id not in found}

    async def count(self) -> int:
        """See Backend.count."""
        return await self.engine.count(self._collection, Filter((LATEST,)))

    async def count_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """See Backend.count_page."""
        if not self._retention.maximum:
            return 0, None
        latest, cursor = await self._latest_times_page(cursor)
        cutoff = self._retention.cutoff()
        counts = Counter(await self._count_by_user(list(latest), cutoff))
        counts.update(user_id for user_id in await self._lacking(latest) if latest[user_id] >= cutoff)
        return sum(min(self._retention.maximum, count) for count in counts.values()), cursor

    async def _count_by_user(self, user_ids: Sequence[str], least: int = 0) -> Mapping[str, int]:
        """How many entries the histories of users hold, from a time on."""
        if not user_ids:
            return {}
        where = Filter((HISTORY, Range("updated_at_unix_ms", least)) if least else (HISTORY,))
        return await self.engine.count_by(self._collection, "user_id", user_ids, where)

    async def prune_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """See Backend.prune_page."""
        latest, cursor = await self._latest_times_page(cursor)
        return await self._prune(latest), cursor

    async def _prune(self, latest: Mapping[str, int]) -> int:
        """Remove what the histories of some users hide."""
        hidden, removed = dict[str, list[int]](), 0
        for user_id in await self._overfull(latest):
            held, times = await self._times_of(user_id), await self._timeline(user_id, latest[user_id])
            # The newest entry is the latest snapshot, which stays.
            removed += min(len(held), self._retention.removable(times))
            if old := held[: self._retention.hidden(times)]:
                hidden[user_id] = old
        if hidden:
            await self._remove(hidden)
        return removed

    async def _overfull(self, latest: Mapping[str, int]) -> set[str]:
        """The users whose history holds entries that it does not show."""
        held = await self._count_by_user(list(latest))
        cutoff = self._retention.cutoff()
        shown = await self._count_by_user(list(latest), cutoff) if cutoff else held
        # With the latest, which one that lacks it would show first; it is never removed for that.
        full = self._retention.maximum - 1
        lacking = await self._lacking(
            {user_id: latest[user_id] for user_id, count in held.items() if count > full}
        )
        return {
            user_id
            for user_id, count in held.items()
            if count > min(full + (user_id not in lacking), shown.get(user_id, 0))
        }

    async def _timeline(self, user_id: str, latest_ms: int) -> list[int]:
        """The times of a user's states, ascending, hidden ones included, that of the latest among them."""
        times = await self._times_of(user_id)
        return times if latest_ms in times else sorted([*times, latest_ms])

    async def states(self, cursor: _Reading | None) -> StatesPage:
        """See Backend.states."""
        following, share = cursor or (None, 1)
        page = await self.engine.page(self._collection, Filter((LATEST,)), limit=share, cursor=following)
        latest = {payload_field(record, "user_id", str): record for record in page.records}
        found = await self._read(latest)
        if page.cursor is None:
            return found
        return found._replace(cursor=_Reading(page.cursor, self._share(len(latest), len(found.states))))

    def _share(self, users: int, states: int) -> int:
        """How many users to read at once, going by those just read."""
        return max(1, int(2 * self.batch_size * users / max(users, states, 1)))

    async def _read(self, latest: Mapping[str, Record]) -> StatesPage:
        """All states of users whose latest points have just been read."""
        if not (latest and self._retention.maximum):
            return StatesPage(self._states(latest, ()))
        where = Filter((AnyOf("user_id", list(latest)), HISTORY))
        return StatesPage(self._states(latest, await self._whole(where)))

    async def _whole(self, where: Filter) -> list[Record]:
        """All that matches, in one page where the engine allows that."""
        found, cursor = list[Record](), None
        while True:
            page = await self.engine.page(self._collection, where, limit=WHOLE_HISTORY, cursor=cursor)
            found += page.records
            if (cursor := page.cursor) is None:
                return found

    def _states(self, latest: Mapping[str, Record], histories: Iterable[Record]) -> list[StateSnapshot]:
        """What history shows of users, and the latest."""
        points = {
            user_id: {payload_field(record, "updated_at_unix_ms", int): record}
            for user_id, record in latest.items()
        }
        for record in histories:
            entries = points.get(payload_field(record, "user_id", str), {})
            entries.setdefault(payload_field(record, "updated_at_unix_ms", int), record)
        states = list[StateSnapshot]()
        for entries in points.values():
            times = sorted(entries)
            shown = times[min(self._retention.hidden(times), len(times) - 1) :]
            states += [decode_snapshot(entries[time_ms].payload) for time_ms in shown]
        return states

    async def look(self, seconds: float) -> Health:  # noqa: ARG002 - what is in the process is asked at once
        """How many users and how many points there are, found out within so many seconds."""
        users = await self.count()
        points = await self.engine.count(self._collection, Filter())
        return Health("healthy", self.engine.name, 0.0, users, points)

    async def _newest(self, user_id: str, wanted: int, least: int = 0) -> list[StateSnapshot]:
        """The newest entries of a history from a time on, newest first, in one request.

        The latest point is among them, hence one more, in case history does not hold it: a writer on a server
        died before it wrote the history, or history was off. Without it the user has been deleted, and what
        there is was left by a writer that did not know.
        """
        since = (Range("updated_at_unix_ms", least),) if least else ()
        page = await self.engine.page(
            self._collection,
            Filter(since),
            limit=wanted + 1,
            tenant=user_id,
            newest_by="updated_at_unix_ms",
        )
        if not any(payload_field(record, "kind", str) == "latest" for record in page.records):
            return []
        distinct: dict[int, Record] = {}
        for record in page.records:
            time_ms = payload_field(record, "updated_at_unix_ms", int)
            # The latest counts, if they differ.
            if time_ms not in distinct or payload_field(record, "kind", str) == "latest":
                distinct[time_ms] = record
        return [decode_snapshot(record.payload) for record in itertools.islice(distinct.values(), wanted)]

    async def _history_times(self, user_id: str) -> list[int]:
        page = await self.engine.page(
            self._collection,
            Filter((HISTORY,)),
            limit=WHOLE_HISTORY,
            tenant=user_id,
            newest_by="updated_at_unix_ms",
            payload=False,
        )
        return [payload_field(record, "updated_at_unix_ms", int) for record in reversed(page.records)]

    def _point(self, snapshot: StateSnapshot, suffix: str | int, **extra: Any) -> Point:
        kind = "latest" if suffix == "latest" else "history"
        payload = encode_snapshot(snapshot, kind, self.engine)
        return Point(
            make_point_id(snapshot.user_id, suffix),
            self.schema.vector(snapshot.axes),
            {**payload, **extra} if extra else payload,
            snapshot.user_id,
        )


def same_state(found: StateSnapshot | None, expected: StateSnapshot | None) -> bool:
    """Whether two snapshots are equal, but for the last bits of floats that went through a server."""
    if found is None or expected is None:
        return found is expected
    near = all(
        abs(found.axes[name] - value) <= LAST_BITS if name in found.axes else False
        for name, value in expected.axes.items()
    )
    alike = all(
        getattr(found, field) == getattr(expected, field)
        for field in ("user_id", "updated_at_unix_ms", "source", "schema_version")
    )
    confidence = abs(found.confidence - expected.confidence) <= LAST_BITS
    return near and alike and confidence and len(found.axes) == len(expected.axes)

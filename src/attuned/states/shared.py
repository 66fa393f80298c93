"""States in a collection on a server, which others write to as well."""

from __future__ import annotations

import contextlib
import math
import re
import secrets
import time
from collections import Counter
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import attrs

from attuned.base.codec import Schema, make_point_id
from attuned.base.errors import (
    LOGGER,
    BackendError,
    BackendRejectedError,
    CollectionNotFoundError,
    ConflictError,
    SchemaMismatchError,
    SnapshotError,
    StoreError,
    T,
    plural,
    short_id,
)
from attuned.base.values import MAX_TIME_MS, Health, SnapshotReport, StateSnapshot
from attuned.engines.filters import Absent, AnyOf, Equal, Filter
from attuned.engines.waist import IndexKind, Matching, Point, Put, Record, SharedEngine
from attuned.snapshots.directory import NativeSnapshotWriter, SnapshotOrigin, SnapshotRequest
from attuned.states.contract import Cursor, HistoryWindow, StatesPage, conflict_error
from attuned.states.points import (
    HISTORY,
    LATEST,
    LINEAGE,
    MAX_COUNTED,
    PointsBackend,
    decode_snapshot,
    payload_field,
    recorded_schema,
    same_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
    from pathlib import Path

    from attuned.base.config import QdrantStoreConfig


def _is_marked(collection: Mapping[str, Any]) -> bool:
    """Whether a description of a collection says that a restore is not complete."""
    config: Any = collection.get("config")
    try:
        return bool(config["metadata"]["restoring"])
    except (LookupError, TypeError):
        return False


# What a server rejects where a collection is not, or is not limited, as when it was opened.
_OTHER_COLLECTION = re.compile(r"dimension|vector|index|limit", re.IGNORECASE)


class _Pruning(NamedTuple):
    """Where a pruning stands."""

    following: Cursor  # where the next page of users begins, or of all entries
    entries: int  # of the users so far
    astray: bool  # whether entries are looked for whose users are gone


class SharedBackend(PointsBackend):
    """A collection on a server, which other processes write to as well; opened by the first operation.

    Many threads and tasks run at once, so that nothing here is relied on between two requests but what the
    server guards. Every latest point has a random ``revision``; one written conditionally also names what it
    ``replaces``: the revision before it and those that that one replaced, "" for none at all. So a writer
    whose own point is gone already still finds out whether it was ever there.
    """

    native_snapshots = True
    # Strict mode filters by nothing that has no index.
    indexes: Mapping[str, IndexKind] = {**PointsBackend.indexes, "confidence": "float", "restored": "keyword"}
    batch_size = 500  # a request holds more than a step in the process
    LOOK_AGAIN_S = 30.0
    READINGS = 3  # again, of users who move while they are read

    def __init__(self, engine: SharedEngine, config: QdrantStoreConfig) -> None:
        super().__init__(engine, config)
        self._server = engine
        self._known: Schema | None = None  # what it was opened with, as long as it is the same collection
        self._look_again_at = math.inf
        self._since_trim: dict[str, int] = {}
        self._latest: dict[str, tuple[float, StateSnapshot]] = {}

    async def begin(self, operation: Callable[[PointsBackend], Coroutine[Any, Any, T]]) -> T:
        """See PointsBackend.begin; a collection that somebody has dropped since is made again, once."""
        await self.open()
        schema = self.schema
        try:
            return await operation(self)
        except CollectionNotFoundError as error:
            if error.collection != self._collection:
                raise
        except BackendRejectedError as error:
            if _OTHER_COLLECTION.search(str(error)):
                self.is_open = False
                with contextlib.suppress(BackendError):  # the first one says more
                    await self.open()
            raise
        if self.schema is schema:  # else another thread or task has opened it again already
            self.is_open = False
        await self.open()
        return await operation(self)

    async def open(self) -> None:
        """Connect and open the collection, unless that has been done: one does, the others wait.

        Every so often it is looked at again, as others may have made it anew, with other axes.
        """
        if self.is_open and time.monotonic() > self._look_again_at:
            self.is_open = False
        while not self.is_open:
            await self._server.once(self._open)

    async def _open(self) -> None:
        if not self.is_open:
            found = await self._open_schema()
            self._check_same(found)
            self.schema = self._known = found
            self._look_again_at = time.monotonic() + self.LOOK_AGAIN_S
            self.is_open = True

    def _check_same(self, found: Schema) -> None:
        """Raise SchemaMismatchError where a collection is not that which was opened."""
        known = self._known
        if known is not None and (found.axes, found.vector_size) != (known.axes, known.vector_size):
            raise SchemaMismatchError(
                f"{self.config.url}: collection {self._collection!r} was made anew by others, with axes "
                f"{', '.join(found.axes)}: open the store again"
            )

    # Reads

    def cached(self, user_id: str) -> StateSnapshot | None:
        """See PointsBackend.cached."""
        if not self._latest or user_id.__class__ is not str:
            return None
        until, latest = self._latest.get(user_id, (0.0, None))
        return latest if time.monotonic() < until else None

    async def find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        """See Backend.find."""
        ids = [make_point_id(user_id, "latest") for user_id in user_ids]
        records = await self.engine.retrieve(self._collection, ids) if ids else []
        snapshots = [decode_snapshot(record.payload) for record in records]
        for snapshot in snapshots:
            self._keep(snapshot)
        found = {snapshot.user_id: snapshot for snapshot in snapshots}
        return {user_id: found[user_id] for user_id in user_ids if user_id in found}

    def _keep(self, snapshot: StateSnapshot) -> None:
        if self.config.cache_ttl and self.config.cache_size:
            if len(self._latest) >= self.config.cache_size:
                self._latest.clear()
            self._latest[snapshot.user_id] = (time.monotonic() + self.config.cache_ttl, snapshot)

    async def history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        """See Backend.history."""
        maximum = self._retention.maximum
        wanted = min(maximum, window.limit) if window.until == MAX_TIME_MS else maximum
        if wanted == 0 or window.limit == 0:
            return []
        newest = await self._newest(user_id, wanted, max(window.since, self._retention.cutoff()))
        return [entry for entry in newest if entry.updated_at_unix_ms <= window.until][: window.limit]

    async def _read(self, latest: Mapping[str, Record]) -> StatesPage:
        """See PointsBackend._read; what was read before says of whom, no more: others write meanwhile.

        All of a user is read in one request. Where that meets several shards, each at a moment of its own, it
        is read again until nothing has moved in between.
        """
        points = await self._points_of(list(latest))
        unsettled: list[str] = list(latest) if self._server.is_spread(self._collection) else []
        for _ in range(self.READINGS):
            if not unsettled:
                break
            again = await self._points_of(unsettled)
            moved = [user_id for user_id in unsettled if again[user_id] != points[user_id]]
            points |= again
            unsettled = moved
        newest = {
            user_id: record
            for user_id, records in points.items()
            for record in records.values()
            if payload_field(record, "kind", str) == "latest"
        }
        histories = [
            record
            for user_id in newest
            for record in points[user_id].values()
            if record is not newest[user_id]
        ]
        return StatesPage(self._states(newest, histories), unsettled=unsettled)

    async def _points_of(self, user_ids: Sequence[str]) -> dict[str, dict[object, Record]]:
        """All points of users, by user and id; without those of the history where none is kept."""
        points: dict[str, dict[object, Record]] = {user_id: {} for user_id in user_ids}
        if not user_ids:
            return points
        asked = AnyOf("user_id", user_ids)
        where = Filter((asked,) if self._retention.maximum else (asked, LATEST))
        for record in await self._whole(where):
            points.get(payload_field(record, "user_id", str), {})[record.id] = record
        return points

    async def look(self, seconds: float) -> Health:
        """See Backend.look."""
        status = await self.engine.status(self._collection, Filter((LATEST,)), seconds)
        if status.points is None:
            message = f"collection {self._collection!r} will be made by the first operation"
            return Health("healthy", self.engine.name, 0.0, 0, 0, message=message, version=status.version)
        collection: Any = status.details
        config: Any = collection.get("config") or {}
        self._check_same(recorded_schema(self.config, config.get("metadata") or {}))
        color = str(collection.get("status"))
        signs = [f"the collection is {color}"] if color != "green" else []
        optimizer = collection.get("optimizer_status", "ok")
        if optimizer != "ok":
            signs.append(f"the server cannot optimise: {optimizer}")
        replicas: list[tuple[int, int, str]] = collection.get("replicas", [])
        away = [
            f"shard {shard} on peer {peer} is {state}" for shard, peer, state in replicas if state != "Active"
        ]
        if away:
            signs.append(f"{len(away)} of {plural(len(replicas), 'replica')} not active: {', '.join(away)}")
        served = {shard for shard, _, state in replicas if state == "Active"}
        if lost := sorted({shard for shard, _, _ in replicas} - served):
            color = "red"
            signs.append(f"no replica is active of shard {', '.join(map(str, lost))}")
        if _is_marked(collection):
            signs.append("a restore of a snapshot is going on or was interrupted: restore it again")
        return Health(
            "unhealthy" if color == "red" else "degraded" if signs else "healthy",
            self.engine.name,
            0.0,
            status.matching,
            status.points,
            message="; ".join(signs),
            version=status.version,
            collection_status=str(collection.get("status")),
            indexed_vectors=count
            if isinstance(count := collection.get("indexed_vectors_count"), int)
            else None,
        )

    # Writes

    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """See Backend.write.

        The latest point unless there is a newer one, and the entries of history, whose ids hold their times.
        """
        newest: dict[str, StateSnapshot] = {}
        for snapshot in snapshots:
            known = newest.get(snapshot.user_id)
            if known is None or snapshot.updated_at_unix_ms >= known.updated_at_unix_ms:
                newest[snapshot.user_id] = snapshot
        entries = {(entry.user_id, entry.updated_at_unix_ms): entry for entry in snapshots}
        points = [self._latest_point(snapshot) for snapshot in newest.values()]
        if self._retention.maximum:
            points += [self._point(entry, time_ms) for (_, time_ms), entry in entries.items()]
        await self.engine.apply(self._collection, [Put(points, newest_by="updated_at_unix_ms")])
        entries_of = Counter(user_id for user_id, _ in entries)
        for user_id in newest:
            self._latest.pop(user_id, None)
            await self._trim_in_turn(user_id, entries_of[user_id])

    def _latest_point(self, snapshot: StateSnapshot, **extra: Any) -> Point:
        return self._point(snapshot, "latest", revision=secrets.token_hex(8), **extra)

    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        """See Backend.write_expected."""
        self._latest.pop(snapshot.user_id, None)  # what was read for this may be stale
        before = await self._latest_payload(snapshot.user_id)
        found = None if before is None else decode_snapshot(before)
        if not same_state(found, expected):
            raise conflict_error(snapshot.user_id, expected, found)
        is_newest = found is None or snapshot.updated_at_unix_ms >= found.updated_at_unix_ms
        if is_newest:
            await self._replace(snapshot, before)
            self._latest.pop(snapshot.user_id, None)
        if self._retention.maximum:
            followed = found if before is not None and "replaces" in before else None
            with _after_write() if is_newest else contextlib.nullcontext():
                await self._enter_into_history(snapshot, followed)
        await self._trim_in_turn(snapshot.user_id)

    async def _enter_into_history(self, snapshot: StateSnapshot, followed: StateSnapshot | None) -> None:
        """Put the history point of a conditional write, and that of the conditional one that it followed.

        The writer of that one may have failed in between. Where the user has meanwhile been deleted, neither
        stays behind.
        """
        puts = [Put([self._point(snapshot, snapshot.updated_at_unix_ms)])]
        if followed is not None and followed.updated_at_unix_ms != snapshot.updated_at_unix_ms:
            puts.append(Put([self._point(followed, followed.updated_at_unix_ms)], mode="insert"))
        await self.engine.apply(self._collection, puts)
        try:
            if not await self._is_there(snapshot.user_id):
                ids = [point.id for put in puts for point in put.points]
                await self.engine.apply(self._collection, deletes=ids)
        except BackendError as error:  # what was to be written has been, and is not undone by raising this
            LOGGER.warning("looking after the history of a user failed: %s", error)

    async def _is_there(self, user_id: str) -> bool:
        ids = [make_point_id(user_id, "latest")]
        return bool(await self.engine.retrieve(self._collection, ids, payload=False))

    async def _replace(self, snapshot: StateSnapshot, before: Mapping[str, Any] | None) -> None:
        """Put the latest point in the place of another one, or of none; ConflictError where that failed."""
        replaced = "" if before is None else str(before.get("revision", ""))
        earlier = [] if before is None else list(before.get("replaces", ()))
        point = self._latest_point(snapshot, replaces=[replaced, *earlier][:LINEAGE])
        if before is None:
            put = Put([point], mode="insert")
        else:
            unchanged = Equal("revision", replaced) if replaced else Absent("revision")
            put = Put([point], mode="update", over=Filter((unchanged,)))
        await self.engine.apply(self._collection, [put])
        with _after_write():
            after = await self._latest_payload(snapshot.user_id) or {}
        seen = [after.get("revision"), *after.get("replaces", ())]
        if point.payload["revision"] in seen:
            return
        # Another one replaced what mine was to replace: mine can never happen. Without that, an unconditional
        # write or a deletion may have come after mine.
        raise _lost(snapshot.user_id, ambiguous=replaced not in seen[1:])

    async def _latest_payload(self, user_id: str) -> Mapping[str, Any] | None:
        records = await self.engine.retrieve(self._collection, [make_point_id(user_id, "latest")])
        return records[0].payload if records else None

    async def delete(self, user_id: str) -> bool:
        """See Backend.delete."""
        there = await self._is_there(user_id)
        await self.engine.apply(self._collection, deletes=Matching(Filter(), user_id))
        self._latest.pop(user_id, None)
        return there

    async def _trim_in_turn(self, user_id: str, entries: int = 1) -> None:
        """Every so many entries of a user, remove what its history does not show."""
        slack = max(16, self._retention.maximum // 4)
        written = self._since_trim.get(user_id, 0) + entries
        if written >= slack:
            written = 0
            await self._trim(user_id)
        if len(self._since_trim) >= MAX_COUNTED and user_id not in self._since_trim:
            self._since_trim.clear()
        self._since_trim[user_id] = written

    async def _trim(self, user_id: str) -> None:
        try:
            times = await self._times_of(user_id)
            if number := self._retention.hidden(times):
                await self._remove({user_id: times[:number]})
        except BackendError as error:  # what was to be written has been: its turn comes again
            LOGGER.warning("trimming the history of a user failed: %s", error)

    async def _times_of(self, user_id: str) -> list[int]:
        return await self._history_times(user_id)

    async def _remove(self, times: Mapping[str, list[int]]) -> None:
        ids = [make_point_id(user_id, time_ms) for user_id, old in times.items() for time_ms in old]
        await self.engine.apply(self._collection, deletes=ids)

    async def prune_page(self, cursor: _Pruning | None) -> tuple[int, Cursor]:
        """See Backend.prune_page; what is left of users who are gone comes at the end.

        A writer that knew nothing of a deletion, and died, has left that. Where there is none, the entries of
        those who are there are as many as there are at all.
        """
        following, entries, astray = cursor or _Pruning(None, 0, astray=False)
        if astray:
            return await self._prune_astray(following)
        latest, following = await self._latest_times_page(following)
        removed = await self._prune(latest)
        entries += sum((await self._count_by_user(list(latest))).values())
        if following is not None:
            return removed, _Pruning(following, entries, astray=False)
        if await self.engine.count(self._collection, Filter((HISTORY,))) <= entries:
            return removed, None
        return removed, _Pruning(None, 0, astray=True)

    async def _prune_astray(self, following: Cursor) -> tuple[int, Cursor]:
        """Remove the entries on a page of history whose users have no latest point."""
        page = await self.engine.page(
            self._collection, Filter((HISTORY,)), limit=self.batch_size, cursor=following
        )
        owners = {str(record.id): payload_field(record, "user_id", str) for record in page.records}
        there = await self.find(list(dict.fromkeys(owners.values())))
        astray = [point_id for point_id, user_id in owners.items() if user_id not in there]
        if astray:
            await self.engine.apply(self._collection, deletes=astray)
        return len(astray), None if page.cursor is None else _Pruning(page.cursor, 0, astray=True)

    async def create_native(self, order: SnapshotRequest, target: str) -> SnapshotReport | None:
        """Take a snapshot of the server's own making; None where a portable one will do and is needed.

        The server puts into it what one node has: of a collection that is spread over several, not all.
        """
        with NativeSnapshotWriter(order) as taking:
            collection = await self._server.resolve(self._collection)
            if not await self._server.is_whole(collection):
                if order.any_kind:
                    return None
                raise SnapshotError(
                    f"{target}: no node has all of the collection, and a native snapshot holds what one has; "
                    'take a "portable" one'
                )
            points = await self.engine.count(self._collection, Filter())
            try:
                offered = await self._server.create_snapshot(collection)
            except BackendRejectedError as error:
                if order.any_kind and error.status == HTTPStatus.FORBIDDEN:
                    return None  # whoever may only read may take a portable one
                raise
            try:
                await self._server.download_snapshot(collection, offered.name, taking)
                origin = SnapshotOrigin(target, self.engine.name, collection)
                report = await self._server.apart(lambda: taking.finish(origin, offered, points))
            finally:
                kept = "" if order.keep_remote else await self._delete_remote(collection, offered.name)
        return attrs.evolve(report, message=kept)

    async def _delete_remote(self, collection: str, name: str) -> str:
        """Remove a snapshot from the server; what there is to say where that fails."""
        try:
            await self._server.finish(self._server.delete_snapshot(collection, name))
        except BackendError as error:
            LOGGER.warning("the snapshot %s stays on the server: %s", name, error)
            return f"the snapshot stays on the server: {error}"
        return ""

    async def restore_native(self, path: Path, sha256: str) -> None:
        """Let the server replace the collection by what a snapshot of its own holds."""
        self.is_open, self._known = False, None
        self.forget_everything()
        await self._server.upload_snapshot(await self._server.resolve(self._collection), path, sha256)
        await self.open()
        if await self._server.mark_of(self._collection, "restoring") is not None:
            await self._server.mark(self._collection, "restoring", None)  # of one before, that was cut off

    async def stage(self, token: str) -> PointsBackend:
        """See PointsBackend.stage; the collection is changed in place, and marked until the end."""
        marked = await self._server.mark_of(self._collection, "restoring")
        await self._server.mark(self._collection, "restoring", token)
        return RestoringBackend(self, token, has_begun=marked is not None)

    async def adopt(self, staged: PointsBackend) -> None:
        """Remove what was not written by the restoring, then the mark, which stays where something lacks."""
        restoring = cast("RestoringBackend", staged)
        written = Equal("restored", restoring.token)
        await self._check_restored(restoring)
        await self.engine.apply(self._collection, deletes=Matching(Filter(must_not=(written,))))
        await self._check_restored(restoring)
        await self._server.mark(self._collection, "restoring", None)
        self.forget_everything()

    async def _check_restored(self, restoring: RestoringBackend) -> None:
        """Raise SnapshotError where others restored or wrote meanwhile."""
        if await self._server.mark_of(self._collection, "restoring") != restoring.token:
            message = "another snapshot was restored meanwhile, or the collection made anew"
        else:
            written = Filter((LATEST, Equal("restored", restoring.token)))
            if await self.engine.count(self._collection, written) == restoring.users_written:
                return
            message = "users were written to while it was restored"
        raise SnapshotError(
            f"collection {self._collection!r}: {message}; let nobody write, and restore again"
        )

    async def discard(self, staged: PointsBackend) -> None:
        """See PointsBackend.discard; the mark stays where the collection is not what it was."""
        self.forget_everything()
        if not cast("RestoringBackend", staged).has_begun:
            await self._server.mark(self._collection, "restoring", None)

    async def add_axes(self, names: Sequence[str]) -> None:  # noqa: ARG002
        """See Backend.add_axes: never."""
        raise StoreError(
            "alter_axes: others may hold the axes of a collection on a server; copy it: "
            "copy(source, target) into a store that was made with more axes"
        )

    def forget_everything(self) -> None:
        """Empty the cache."""
        self._latest.clear()


class RestoringBackend(SharedBackend):
    """Writes what a collection is to hold after a restore, over whatever is there.

    Every point carries a token of what is restored, so that those of a restore that was interrupted count
    when it is done again, and the others can be told from them.
    """

    def __init__(self, backend: SharedBackend, token: str, *, has_begun: bool) -> None:
        super().__init__(backend._server, backend.config)
        self.schema, self.is_open = backend.schema, True
        self.token = token
        self.users_written = 0  # written so far
        self.has_begun = has_begun  # to change the collection
        self._last = ""  # who may go on in the next batch

    async def begin(self, operation: Callable[[PointsBackend], Coroutine[Any, Any, T]]) -> T:
        """Without making the collection anew, should it have gone: it would lack what was written before."""
        return await operation(self)

    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """Put the snapshots, each user's together and in order: the last is the latest."""
        self.has_begun = True
        last = {snapshot.user_id: snapshot for snapshot in snapshots}
        points = [self._latest_point(snapshot, restored=self.token) for snapshot in last.values()]
        if self._retention.maximum:
            points += [self._point(each, each.updated_at_unix_ms, restored=self.token) for each in snapshots]
        await self.engine.apply(self._collection, [Put(points)])
        self.users_written += len(last) - (self._last in last)
        self._last = snapshots[-1].user_id


@contextlib.contextmanager
def _after_write() -> Generator[None]:
    """Let what fails say that something has been written already."""
    try:
        yield
    except BackendError as error:
        error.ambiguous = True
        raise


def _lost(user_id: str, *, ambiguous: bool) -> ConflictError:
    if ambiguous:
        message = (
            "was replaced while it was being written; the write may have happened: read before trying again"
        )
    else:
        message = "was written by someone else first; read it again and retry, or use update()"
    return ConflictError(f"user {short_id(user_id)!r}: the latest snapshot {message}", ambiguous=ambiguous)

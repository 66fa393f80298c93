"""States in a collection that this process alone writes to."""

from __future__ import annotations

import itertools
import weakref
from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

import attrs
from cachetools import FIFOCache

from attuned.base.codec import make_point_id
from attuned.base.errors import StoreError, T
from attuned.base.values import MAX_TIME_MS, StateSnapshot, time_of
from attuned.engines.filters import Filter
from attuned.engines.waist import EmbeddedEngine, Point, Put, Record
from attuned.states.contract import Cursor, HistoryWindow, Retention, StatesPage, conflict_error, page_of_ids
from attuned.states.points import PointsBackend, decode_snapshot, payload_field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence

    from attuned.base.config import QdrantStoreConfig


MOST_RANKED = 5_000  # points; Edge takes 3 us for each, besides what looking at all takes


class RecentHistory(NamedTuple):
    """The newest snapshots of a user's history, newest first, and whether they are all."""

    snapshots: tuple[StateSnapshot, ...]
    complete: bool


def covers_window(recent: RecentHistory, window: HistoryWindow, least: int) -> bool:
    """Whether what is at hand of a history answers for a window, whose oldest time is ``least``."""
    if recent.complete or (recent.snapshots and recent.snapshots[-1].updated_at_unix_ms < least):
        return True
    return sum(entry.updated_at_unix_ms <= window.until for entry in recent.snapshots) >= window.limit


def keep_in_cache(cache: MutableMapping[str, T], key: str, value: T) -> None:
    """Put into a cache what fits into it at all."""
    try:
        cache[key] = value
    except ValueError:
        cache.pop(key, None)


class WriteDraft:
    """What becomes of a user's points in a write."""

    __slots__ = ("changed", "latest", "put", "removed", "times")

    def __init__(self, latest: StateSnapshot | None, times: list[int]) -> None:
        self.latest = latest
        self.times = times  # ascending, of the history
        self.put: dict[int, StateSnapshot] = {}
        self.removed: list[int] = []
        self.changed = False  # whether there is a new latest snapshot

    def add(self, snapshot: StateSnapshot, retention: Retention) -> None:
        """Take in a snapshot to be written."""
        time_ms = snapshot.updated_at_unix_ms
        if self.latest is None or time_ms >= self.latest.updated_at_unix_ms:
            self.latest, self.changed = snapshot, True
        position = bisect_left(self.times, time_ms)
        there = self.times[position : position + 1] == [time_ms]
        if retention.maximum == 0:
            if there:  # of when history was on: it must not come back in the place of this one
                self.removed.append(self.times.pop(position))
            return
        if not there:
            self.times.insert(position, time_ms)
        self.put[time_ms] = snapshot
        excess = retention.removable(self.times)
        for old in self.times[:excess]:
            self.put.pop(old, None)
            self.removed.append(old)
        del self.times[:excess]


class OwnedBackend(PointsBackend):
    """A collection that this process owns, in a directory.

    One coroutine runs at a time, alone. Besides the collection there are, bounded by ``cache_size``: the
    latest snapshots and recent history of the users last touched, and the times of their histories. An
    engine without indexes has the times of all users.
    """

    def __init__(
        self, engine: EmbeddedEngine, config: QdrantStoreConfig, collection: str | None = None
    ) -> None:
        super().__init__(engine, config, collection)
        self._files = engine
        if engine.indexed:  # one call of it holds up the process, the more the more it ranks
            self.most_ranked = MOST_RANKED
        self._beside = f".{self._collection}.restoring"  # the collection in which one is restored
        self._staged: Callable[[], OwnedBackend | None] = lambda: None
        self._latest: MutableMapping[str, StateSnapshot] = FIFOCache(config.cache_size)
        self._recent: MutableMapping[str, RecentHistory] = FIFOCache(
            config.cache_size, getsizeof=lambda recent: len(recent.snapshots) + 1
        )
        self._times: MutableMapping[str, list[int]] = FIFOCache(config.cache_size) if engine.indexed else {}

    async def open(self) -> None:
        """Open the collection, and learn what an engine without indexes cannot be asked."""
        if self.is_open:
            return
        await self._files.drop(self._beside)  # a process that was killed may have left it
        self.schema = await self._open_schema()
        if not self.engine.indexed:
            await self._learn_times()
        self.is_open = True

    async def _learn_times(self) -> None:
        cursor, histories = None, list[tuple[str, int]]()
        while True:
            page = await self.engine.page(self._collection, Filter(), limit=1_000, cursor=cursor)
            for record in page.records:
                user_id, kind = record.payload["user_id"], record.payload["kind"]
                if kind == "latest":
                    self._times[user_id] = []
                else:
                    histories.append((user_id, record.payload["updated_at_unix_ms"]))
            if (cursor := page.cursor) is None:
                break
        for user_id, time_ms in histories:
            if user_id in self._times:
                self._times[user_id].append(time_ms)
        for times in self._times.values():
            times.sort()

    # Reads

    def cached(self, user_id: str) -> StateSnapshot | None:
        """See PointsBackend.cached."""
        try:
            return self._latest[user_id]
        except (KeyError, TypeError):
            return None

    async def find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        """See Backend.find."""
        found = {user_id: latest for user_id in user_ids if (latest := self.cached(user_id)) is not None}
        missing = [make_point_id(user_id, "latest") for user_id in user_ids if user_id not in found]
        if missing:
            for record in await self.engine.retrieve(self._collection, missing):
                snapshot = decode_snapshot(record.payload)
                found[snapshot.user_id] = snapshot
                keep_in_cache(self._latest, snapshot.user_id, snapshot)
        return {user_id: found[user_id] for user_id in user_ids if user_id in found}

    async def history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        """See Backend.history."""
        least = max(window.since, self._retention.cutoff())
        recent = self._recent.get(user_id)
        if recent is None or not covers_window(recent, window, least):
            recent = await self._load_recent(user_id, window)
        chosen = (entry for entry in recent.snapshots if least <= entry.updated_at_unix_ms <= window.until)
        return list(itertools.islice(chosen, window.limit))

    async def _load_recent(self, user_id: str, window: HistoryWindow) -> RecentHistory:
        maximum = self._retention.maximum
        wanted = min(maximum, window.limit) if window.until == MAX_TIME_MS else maximum
        if wanted == 0:
            return RecentHistory((), complete=maximum == 0)
        if user_id in self._times or not self.engine.indexed:
            snapshots = await self._newest_by_id(user_id, wanted)
        else:
            snapshots = await self._newest(user_id, wanted)
        recent = RecentHistory(tuple(snapshots), complete=len(snapshots) < wanted or wanted == maximum)
        keep_in_cache(self._recent, user_id, recent)
        return recent

    async def _newest_by_id(self, user_id: str, wanted: int) -> list[StateSnapshot]:
        """As _newest, where the times are known."""
        latest, times = await self.get_latest(user_id), self._times.get(user_id, [])
        ids = [make_point_id(user_id, time_ms) for time_ms in times[-wanted:]]
        records = await self.engine.retrieve(self._collection, ids) if ids else []
        found = {time_of(entry): entry for entry in (decode_snapshot(record.payload) for record in records)}
        if latest is not None:  # which history lacks, or has as it was before, if it was off meanwhile
            found[time_of(latest)] = latest
        return sorted(found.values(), key=time_of, reverse=True)[:wanted]

    async def users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        """See Backend.users."""
        if self.engine.indexed:
            return await super().users(cursor)
        return page_of_ids(iter(list(self._times)) if cursor is None else cursor, self.batch_size)

    async def count(self) -> int:
        """See Backend.count."""
        return await super().count() if self.engine.indexed else len(self._times)

    async def _count_by_user(self, user_ids: Sequence[str], least: int = 0) -> Mapping[str, int]:
        if self.engine.indexed:
            return await super()._count_by_user(user_ids, least)
        histories = ((user_id, self._times.get(user_id, [])) for user_id in user_ids)
        return {user_id: len(times) - bisect_left(times, least) for user_id, times in histories}

    async def _latest_times_page(self, cursor: Cursor) -> tuple[dict[str, int], Cursor]:
        if self.engine.indexed:
            return await super()._latest_times_page(cursor)
        user_ids, cursor = await self.users(cursor)
        ids = [make_point_id(user_id, "latest") for user_id in user_ids]
        records = await self.engine.retrieve(self._collection, ids) if ids else []
        return {each.payload["user_id"]: each.payload["updated_at_unix_ms"] for each in records}, cursor

    async def _lacking(self, latest: Mapping[str, int]) -> set[str]:
        if self.engine.indexed:
            return await super()._lacking(latest)
        return {user_id for user_id, time_ms in latest.items() if time_ms not in self._times[user_id][-1:]}

    # Writes

    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """See Backend.write."""
        drafts = await self._drafts(dict.fromkeys(snapshot.user_id for snapshot in snapshots))
        for snapshot in snapshots:
            drafts[snapshot.user_id].add(snapshot, self._retention)
        points, deleted = list[Point](), list[str]()
        for user_id, draft in drafts.items():
            history = [self._point(entry, entry.updated_at_unix_ms) for entry in draft.put.values()]
            if draft.changed and draft.latest is not None:
                twin = history[-1] if draft.latest is next(reversed(draft.put.values()), None) else None
                points.append(self._latest_point(draft.latest, twin))
            points += history
            deleted += [make_point_id(user_id, time_ms) for time_ms in draft.removed]

        def remember() -> None:
            for user_id, draft in drafts.items():
                self._remember(user_id, draft)

        await self._change(drafts, points, deleted, remember)

    def _latest_point(self, latest: StateSnapshot, twin: Point | None) -> Point:
        """The latest point, made from the same snapshot's point in history where there is one."""
        if twin is None:
            return self._point(latest, "latest")
        payload = {**twin.payload, "kind": "latest"}
        return twin._replace(id=make_point_id(latest.user_id, "latest"), payload=payload)

    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        """See Backend.write_expected."""
        latest = await self.get_latest(snapshot.user_id)
        if latest != expected:
            raise conflict_error(snapshot.user_id, expected, latest)
        await self.write([snapshot])

    async def delete(self, user_id: str) -> bool:
        """See Backend.delete."""
        latest, times = await self.get_latest(user_id), await self._times_of(user_id)
        if latest is None and not times:
            return False
        ids = [make_point_id(user_id, "latest"), *(make_point_id(user_id, time_ms) for time_ms in times)]
        await self._change([user_id], [], ids, lambda: self._forget(user_id))
        return True

    async def _remove(self, times: Mapping[str, list[int]]) -> None:
        ids = [make_point_id(user_id, time_ms) for user_id, old in times.items() for time_ms in old]
        left = {user_id: (await self._times_of(user_id))[len(old) :] for user_id, old in times.items()}

        def remember() -> None:
            for user_id, still in left.items():
                keep_in_cache(self._times, user_id, still)
                self._recent.pop(user_id, None)

        await self._change(times, [], ids, remember)

    async def _drafts(self, user_ids: Iterable[str]) -> dict[str, WriteDraft]:
        """What is there of these users; the histories of new users are known to be empty."""
        latest = await self.find(list(user_ids))
        drafts = {user_id: WriteDraft(None, []) for user_id in user_ids}
        for user_id, snapshot in latest.items():
            draft = drafts[user_id] = WriteDraft(snapshot, list(await self._times_of(user_id)))
            time_ms = snapshot.updated_at_unix_ms
            if time_ms not in draft.times[-1:] and self._retention.maximum:  # history was off
                draft.times.append(time_ms)
                draft.put[time_ms] = snapshot
        return drafts

    async def _times_of(self, user_id: str) -> list[int]:
        times = self._times.get(user_id)
        if times is None:
            times = await self._learn(user_id) if self.engine.indexed else []
        return times

    async def _learn(self, user_id: str) -> list[int]:
        times = await self._history_times(user_id)
        keep_in_cache(self._times, user_id, times)
        return times

    async def _change(
        self,
        user_ids: Iterable[str],
        points: Sequence[Point],
        deleted: Sequence[str],
        remember: Callable[[], None],
    ) -> None:
        """Write, then bring what is known of these users up to date."""
        try:
            await self._files.apply(self._collection, [Put(points)], deleted)
            remember()
        except BaseException:
            # How much of it was done is unknown, also after an interrupt: look again at the next use.
            for user_id in user_ids:
                self._forget(user_id)
                await self._relearn(user_id)
            raise

    def _remember(self, user_id: str, draft: WriteDraft) -> None:
        keep_in_cache(self._times, user_id, draft.times)
        self._remember_recent(user_id, draft)
        if draft.latest is not None:
            keep_in_cache(
                self._latest, user_id, draft.latest
            )  # last: readers without the lock see it from here on

    def _remember_recent(self, user_id: str, draft: WriteDraft) -> None:
        recent = self._recent.pop(user_id, None)
        if recent is None:
            return
        newer = sorted(draft.put.values(), key=time_of, reverse=True)
        if not recent.snapshots or (
            newer and newer[-1].updated_at_unix_ms > recent.snapshots[0].updated_at_unix_ms
        ):
            kept = (*newer, *recent.snapshots)[: self._retention.maximum]
            keep_in_cache(self._recent, user_id, RecentHistory(kept, recent.complete))

    def _forget(self, user_id: str) -> None:
        self._latest.pop(user_id, None)
        self._recent.pop(user_id, None)
        self._times.pop(user_id, None)

    async def stage(self, token: str) -> PointsBackend:  # noqa: ARG002 - nothing of this one can be left
        """See PointsBackend.stage."""
        if self._staged() is not None:
            raise StoreError("a snapshot is being restored into this store already")
        axes = attrs.evolve(self.config, axes=self.schema.axes, vector_size=self.schema.vector_size)
        staged = OwnedBackend(self._files, axes, self._beside)
        await self._files.drop(self._beside)
        await staged.open()
        self._staged = weakref.ref(staged)  # weak: a task that was cancelled may never hear of it
        return staged

    async def adopt(self, staged: PointsBackend) -> None:
        """See PointsBackend.adopt."""
        held = self._staged()
        if held is None or staged is not held:
            raise StoreError("what was restored was given up meanwhile")
        try:
            await self._files.replace(self._collection, self._beside)
        except BaseException:
            await self._relearn_all()  # which of the two is there is unknown, after an interrupt too
            raise
        self._staged = lambda: None
        self.forget_everything()
        if not self.engine.indexed:
            self._times.update(held._times)

    async def discard(self, staged: PointsBackend) -> None:
        """See PointsBackend.discard."""
        if staged is self._staged():
            self._staged = lambda: None
            await self._files.drop(self._beside)

    async def add_axes(self, names: Sequence[str]) -> None:
        """See Backend.add_axes; where vectors have no room left, all is written anew beside this."""
        schema = self.schema.extended(names)
        if schema.vector_size == self.schema.vector_size:
            await self._files.describe(self._collection, {"axes": list(schema.axes)})
            self.schema = schema
            return
        if self._staged() is not None:
            raise StoreError("a snapshot is being restored into this store: add axes afterwards")
        config = attrs.evolve(self.config, axes=schema.axes, vector_size=schema.vector_size)
        grown = OwnedBackend(self._files, config, self._beside)
        try:
            await self._files.drop(self._beside)
            await grown.open()
            page = await self.states(None)
            await grown.write(page.states)
            while page.cursor is not None:
                page = await self.states(page.cursor)
                await grown.write(page.states)
            await self._files.replace(self._collection, self._beside, described=True)
        except BaseException:
            self.schema = (
                await self._open_schema()
            )  # which of the two is there is unknown, after an interrupt
            await self._relearn_all()
            await self._files.drop(self._beside)
            raise
        self.schema = schema
        self.forget_everything()
        if not self.engine.indexed:
            self._times.update(grown._times)

    async def _relearn_all(self) -> None:
        self.forget_everything()
        if not self.engine.indexed:
            await self._learn_times()

    async def states(self, cursor: Cursor) -> StatesPage:
        """See PointsBackend.states."""
        if self.engine.indexed:
            return await super().states(cursor)
        remaining: Iterator[str] = iter(list(self._times)) if cursor is None else cursor
        ids, latest, following = list[str](), dict[str, str](), None
        for user_id in remaining:
            latest[user_id] = make_point_id(user_id, "latest")
            ids += [make_point_id(user_id, time_ms) for time_ms in self._times.get(user_id, ())]
            if len(ids) + len(latest) >= 2 * self.batch_size:
                following = remaining
                break
        records = await self.engine.retrieve(self._collection, [*latest.values(), *ids])
        kinds: dict[str, list[Record]] = {"latest": [], "history": []}
        for record in records:
            kinds[payload_field(record, "kind", str)].append(record)
        heads = {payload_field(record, "user_id", str): record for record in kinds["latest"]}
        return StatesPage(self._states(heads, kinds["history"]), following)

    async def _relearn(self, user_id: str) -> None:
        """Take the times of a history from an engine that cannot be asked at every use."""
        if not self.engine.indexed and await self.get_latest(user_id) is not None:
            await self._learn(user_id)

    def forget_everything(self) -> None:
        """Empty the caches, so that no read is answered from them."""
        self._latest.clear()
        self._recent.clear()
        self._times.clear()

"""The library and what a user would pick instead, each asked in the form in which it likes to be asked.

A write keeps the latest state of a user and an entry of the history. Where a peer has no history, it is kept
in the way that suits the peer; none but this library orders what comes late or bounds a history by itself.
What a call takes is built beforehand, as its caller would have it: a snapshot, a dict or a payload.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
import json
import random
import sqlite3
import threading
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from attuned_store import (
    CANONICAL_AXES,
    AsyncMemoryStore,
    AsyncQdrantStore,
    Axes,
    MemoryStore,
    QdrantStore,
    StateSnapshot,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
    from pathlib import Path

    from attuned_store import AsyncStateStore, StateStore

START_MS = 1_700_000_000_000
HISTORY = 10
DEEP_USERS = 200  # have a history of so many entries; the others one
# Divided by eight threads and by 64 tasks, so that the writes of a user stay in one of them, and in order.
HOT_USERS = 512  # are asked for again and again where the question is about what is at hand

# The record: 24 axes, of which none is neutral.
AXES = (*CANONICAL_AXES, "energetic_arousal")
_VALUES = [(7 * position % 24) / 23 * 0.98 + 0.01 for position in range(24)]


@functools.cache
def axes_of(shape: int) -> Axes:
    """The record turned by some axes and shaded: a thousand states, of which no two point the same way."""
    turned = _VALUES[shape % 24 :] + _VALUES[: shape % 24]
    shade = 0.5 + shape % 41 / 82
    return Axes({name: value * shade for name, value in zip(AXES, turned, strict=True)})


def vector_of(snapshot: StateSnapshot) -> list[float]:
    return [value - 0.5 for value in snapshot.axes.values()]


@attrs.frozen
class People:
    """Who is in the stores, and what is written of them."""

    number: int
    ids: list[str] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "ids", [f"user-{position:06}" for position in range(self.number)])

    @property
    def deep(self) -> list[str]:
        return self.ids[:: max(1, self.number // DEEP_USERS)][:DEEP_USERS]

    def sample(self, number: int) -> list[str]:
        return random.Random(6).sample(self.ids, min(number, self.number))

    def first_states(self) -> Iterator[StateSnapshot]:
        for position, user_id in enumerate(self.ids):
            yield StateSnapshot(user_id, axes_of(position % 984), START_MS)
        for age in range(1, HISTORY):
            for position, user_id in enumerate(self.deep):
                yield StateSnapshot(user_id, axes_of((position + age) % 984), START_MS + age)

    def later_states(self) -> Iterator[StateSnapshot]:
        """Newer states, without end, of users who are written again and again."""
        users = self.sample(HOT_USERS)
        time_ms = START_MS + 1_000
        while True:
            for position, user_id in enumerate(users):
                time_ms += 1
                yield StateSnapshot(user_id, axes_of(position), time_ms)


@attrs.frozen
class Place:
    """Where contenders are: a directory, an event loop, a server."""

    directory: Path
    loop: asyncio.Runner
    url: str = ""


class Contender:
    """What is asked of each; an operation that it does not have is None."""

    name: ClassVar[str]
    module: ClassVar[str] = ""  # to be importable
    library: ClassVar[str] = ""  # whose version is shown
    ours: ClassVar[bool] = False
    most_users: ClassVar[int] = 10**9  # more would take minutes
    serves_threads: ClassVar[bool] = True
    blocks: ClassVar[bool] = False  # waits for a disk, so that an event loop would call it in a thread

    put: Any = None
    get: Any = None
    history: Any = None
    search_user: Any = None
    search_all: Any = None
    async_put: Any = None
    async_get: Any = None

    path: Path | None = None  # where it keeps files, if it does
    newer: Iterator[StateSnapshot]  # what has not been written yet

    def __init__(self, place: Place) -> None:
        self.place = place

    @classmethod
    def is_installed(cls) -> bool:
        return not cls.module or importlib.util.find_spec(cls.module) is not None

    @classmethod
    def version(cls) -> str:
        return importlib.metadata.version(cls.library)

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def form(self, snapshot: StateSnapshot) -> Any:
        """What a write of this snapshot takes."""
        return snapshot

    def fill(self, people: People) -> None:
        assert self.put is not None
        for snapshot in people.first_states():
            self.put(self.form(snapshot))

    def forget(self) -> None:
        """Empty the caches of the process, if there are any."""

    def run(self, flow: Coroutine[Any, Any, Any]) -> Any:
        return self.place.loop.run(flow)


class _Ours(Contender):
    """A store of each form of this library, over the same data."""

    ours = True
    store: Any
    both: Any

    def use(self, store: StateStore, both: AsyncStateStore) -> None:
        self.store, self.both = store, both
        self.put, self.get = store.upsert_latest, store.get_latest
        self.history = lambda user_id: store.get_history(user_id, limit=HISTORY)
        self.search_user = lambda asked: store.search_similar(asked[1], user_id=asked[0], history=True)
        self.search_all = store.search_similar
        self.async_put, self.async_get = both.upsert_latest, both.get_latest


class _OursOpened(_Ours):
    """One that is opened in a place, and filled in batches."""

    def close(self) -> None:
        self.run(self.both.aclose())
        self.store.close()

    def fill(self, people: People) -> None:
        self.store.upsert_many(people.first_states())


# -----------------------------------------------------------------------------
# In memory
# -----------------------------------------------------------------------------


class Floor(Contender):
    """The least that keeps a latest value and a history for threads: dict + Lock + deque(100).

    Its search is one product of a matrix that stands ready, which nothing could do without.
    """

    name = "floor"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._lock = threading.Lock()
        self._latest: dict[str, StateSnapshot] = {}
        self._history: dict[str, deque[StateSnapshot]] = {}

    def open(self) -> None:
        if importlib.util.find_spec("numpy") is not None:
            self.search_all = self._search_all

    def put(self, snapshot: StateSnapshot) -> None:
        user_id = snapshot.user_id
        with self._lock:
            self._latest[user_id] = snapshot
            history = self._history.get(user_id)
            if history is None:
                history = self._history[user_id] = deque(maxlen=100)
            history.append(snapshot)

    def get(self, user_id: str) -> StateSnapshot | None:
        with self._lock:
            return self._latest.get(user_id)

    def history(self, user_id: str) -> list[StateSnapshot]:
        with self._lock:
            return list(self._history[user_id])[: -HISTORY - 1 : -1]

    async def async_put(self, snapshot: StateSnapshot) -> None:
        self.put(snapshot)

    async def async_get(self, user_id: str) -> StateSnapshot | None:
        return self.get(user_id)

    @functools.cached_property
    def _matrix(self) -> tuple[Any, list[StateSnapshot]]:
        import numpy as np

        rows = list(self._latest.values())
        matrix = np.asarray([vector_of(snapshot) for snapshot in rows], dtype=np.float32)
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True), rows

    def _search_all(self, like: StateSnapshot) -> list[tuple[StateSnapshot, float]]:
        import numpy as np

        matrix, rows = self._matrix
        direction = np.asarray(vector_of(like), dtype=np.float32)
        scores = matrix @ (direction / np.linalg.norm(direction))
        best = np.argpartition(-scores, HISTORY)[:HISTORY]
        return [(rows[row], float(scores[row])) for row in best[np.argsort(-scores[best])]]


class OursInMemory(_Ours):
    name = "attuned memory"

    def open(self) -> None:
        options: Any = {"axes": AXES, "telemetry": False}  # bench_telemetry.py shows what that costs
        store, both = MemoryStore(**options), AsyncMemoryStore(**options)
        both._backend, both._operations = store._backend, store._operations  # whose waits never suspend
        self.use(store, both)


class CacheTools(Contender):
    """A bounded cache of one deque a user, behind a lock, as its documentation says."""

    name = "cachetools"
    module = library = "cachetools"

    def open(self) -> None:
        from cachetools import LRUCache

        self._lock = threading.Lock()
        self._cache: LRUCache[str, deque[StateSnapshot]] = LRUCache(10**7)

    def put(self, snapshot: StateSnapshot) -> None:
        with self._lock:
            try:
                self._cache[snapshot.user_id].append(snapshot)
            except KeyError:
                self._cache[snapshot.user_id] = deque((snapshot,), 100)

    def get(self, user_id: str) -> StateSnapshot:
        with self._lock:
            return self._cache[user_id][-1]

    def history(self, user_id: str) -> list[StateSnapshot]:
        with self._lock:
            return list(self._cache[user_id])[: -HISTORY - 1 : -1]


class LangGraph(Contender):
    name = "langgraph"
    module, library = "langgraph.store.memory", "langgraph"

    @classmethod
    def is_installed(cls) -> bool:
        return importlib.util.find_spec("langgraph") is not None

    def open(self) -> None:
        from langgraph.store.memory import InMemoryStore

        store = self.store = InMemoryStore()
        self.get = lambda user_id: store.get(("latest",), user_id)

    def form(self, snapshot: StateSnapshot) -> dict[str, Any]:
        return snapshot.to_dict()

    def put(self, record: dict[str, Any]) -> None:
        user_id = record["user_id"]
        self.store.put(("latest",), user_id, record)
        self.store.put(("history", user_id), str(record["updated_at_unix_ms"]), record)

    def history(self, user_id: str) -> list[Any]:
        found = self.store.search(("history", user_id), limit=1_000_000)
        return sorted(found, key=lambda item: item.key, reverse=True)[:HISTORY]

    async def async_put(self, record: dict[str, Any]) -> None:
        user_id = record["user_id"]
        await self.store.aput(("latest",), user_id, record)
        await self.store.aput(("history", user_id), str(record["updated_at_unix_ms"]), record)

    async def async_get(self, user_id: str) -> Any:
        return await self.store.aget(("latest",), user_id)


class _KeyValue(Contender):
    """py-key-value-aio, which has an asynchronous form alone: the latest with its times, and each entry."""

    library = "py-key-value-aio"
    _store: Any

    @classmethod
    def is_installed(cls) -> bool:
        return importlib.util.find_spec("key_value") is not None

    def form(self, snapshot: StateSnapshot) -> dict[str, Any]:
        return snapshot.to_dict()

    async def async_put(self, record: dict[str, Any]) -> None:
        user_id, time_ms = record["user_id"], record["updated_at_unix_ms"]
        before = await self._store.get(user_id, collection="latest")
        times = [*(before["times"] if before else ()), time_ms][-100:]
        await self._store.put(user_id, {**record, "times": times}, collection="latest")
        await self._store.put(f"{user_id}:{time_ms}", record, collection="history")

    async def async_get(self, user_id: str) -> Any:
        return await self._store.get(user_id, collection="latest")

    async def async_history(self, user_id: str) -> list[Any]:
        times = (await self.async_get(user_id))["times"][: -HISTORY - 1 : -1]
        keys = [f"{user_id}:{time_ms}" for time_ms in times]
        found: list[Any] = await self._store.get_many(keys, collection="history")
        return found

    def fill(self, people: People) -> None:
        async def fill() -> None:
            for snapshot in people.first_states():
                await self.async_put(self.form(snapshot))

        self.run(fill())


class KeyValueMemory(_KeyValue):
    name = "py-key-value memory"

    def open(self) -> None:
        from key_value.aio.stores.memory import MemoryStore as TheirMemoryStore

        self._store = TheirMemoryStore()


# -----------------------------------------------------------------------------
# On disk
# -----------------------------------------------------------------------------


class _OnDisk(Contender):
    """Keeps its files at a path, as a directory or under names that begin with it."""

    path: Path

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.path = place.directory / self.name.replace(" ", "_")


class _OursOnDisk(_OnDisk, _OursOpened):
    engine: ClassVar[Any]

    def open(self) -> None:
        options: Any = {"path": self.path, "engine": self.engine, "axes": AXES, "telemetry": False}
        self.use(QdrantStore(**options), AsyncQdrantStore(**options))

    @property
    def core(self) -> Any:
        return self.store._operations.backend

    def forget(self) -> None:
        if self.core.engine.indexed:
            self.core.forget_everything()
        else:  # times of all users are kept, always
            self.core._latest.clear()
            self.core._recent.clear()


class OursOnEdge(_OursOnDisk):
    name = "attuned edge"
    module, library = "qdrant_edge", "qdrant-edge-py"
    engine = "edge"


class OursInLocalMode(_OursOnDisk):
    name = "attuned local"
    module, library = "qdrant_client", "qdrant-client"
    engine = "local"


def point_id(user_id: str, name: str | int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{user_id}::{name}"))


class _Points(Contender):
    """Bare Qdrant: two nested points a write, with computed ids."""

    @functools.cached_property
    def _ids(self) -> dict[str, str]:
        return {}

    def _id(self, user_id: str) -> str:
        """The id of a latest point, which a caller may keep at hand."""
        found = self._ids.get(user_id)
        if found is None:
            found = self._ids[user_id] = point_id(user_id, "latest")
        return found

    def pair(self, snapshot: StateSnapshot) -> list[tuple[str, list[float], dict[str, Any]]]:
        entry_id = point_id(snapshot.user_id, snapshot.updated_at_unix_ms)
        vector = vector_of(snapshot)
        return [
            (self._id(snapshot.user_id), vector, {**snapshot.to_dict(), "kind": "latest"}),
            (entry_id, vector, {**snapshot.to_dict(), "kind": "history"}),
        ]


class BareEdge(_Points, _OnDisk):
    """A read ends with the payloads as Python values, as everybody's here: Edge makes them when asked for."""

    name = "bare edge"
    module, library = "qdrant_edge", "qdrant-edge-py"

    def open(self) -> None:
        import qdrant_edge as api

        self._api = api
        if self.path.exists():
            self._shard = api.EdgeShard.load(str(self.path))
            return
        self.path.mkdir()
        vectors = api.EdgeVectorParams(size=len(AXES), distance=api.Distance.Cosine)
        self._shard = api.EdgeShard.create(str(self.path), api.EdgeConfig(vectors=vectors))
        indexes: dict[str, Any] = {
            "user_id": api.KeywordIndexParams(is_tenant=True),
            "kind": api.PayloadSchemaType.Keyword,
            "updated_at_unix_ms": api.PayloadSchemaType.Integer,
            "source": api.PayloadSchemaType.Keyword,
        }
        for key, kind in indexes.items():
            self._shard.update(api.UpdateOperation.create_field_index(key, kind))

    def close(self) -> None:
        self._shard.close()

    def form(self, snapshot: StateSnapshot) -> list[tuple[str, list[float], dict[str, Any]]]:
        return self.pair(snapshot)

    def put(self, pair: list[tuple[str, list[float], dict[str, Any]]]) -> None:
        points = [self._api.Point(*point) for point in pair]
        self._shard.update(self._api.UpdateOperation.upsert_points(points))

    def get(self, user_id: str) -> Any:
        found = self._shard.retrieve([self._id(user_id)], with_payload=True, with_vector=False)
        return [record.payload for record in found]

    def _where(self, kind: str, user_id: str | None = None) -> Any:
        api = self._api
        must = [api.FieldCondition(key="kind", match=api.MatchValue(kind))]
        if user_id is not None:
            must.append(api.FieldCondition(key="user_id", match=api.MatchValue(user_id)))
        return api.Filter(must=must)

    def history(self, user_id: str) -> Any:
        api = self._api
        order = api.OrderBy("updated_at_unix_ms", api.Direction.Desc)
        where = self._where("history", user_id)
        found, _ = self._shard.scroll(
            api.ScrollRequest(limit=HISTORY, filter=where, with_payload=True, order_by=order)
        )
        return [record.payload for record in found]

    def _query(self, like: StateSnapshot, where: Any) -> Any:
        api = self._api
        nearest = api.Query.Nearest(vector_of(like))
        found = self._shard.query(
            api.QueryRequest(limit=HISTORY, query=nearest, filter=where, with_payload=True)
        )
        return [(record.payload, record.score) for record in found]

    def search_user(self, asked: tuple[str, StateSnapshot]) -> Any:
        return self._query(asked[1], self._where("history", asked[0]))

    def search_all(self, like: StateSnapshot) -> Any:
        return self._query(like, self._where("latest"))

    async def async_put(self, pair: Any) -> None:
        self.put(pair)

    async def async_get(self, user_id: str) -> Any:
        return self.get(user_id)


class _BareClient(_Points):
    """qdrant-client, over files or over a server."""

    module, library = "qdrant_client", "qdrant-client"
    _client: Any
    _async_client: Any

    def _create(self) -> None:
        from qdrant_client import models

        vectors = models.VectorParams(size=len(AXES), distance=models.Distance.COSINE)
        self._client.create_collection("bare", vectors)

    def form(self, snapshot: StateSnapshot) -> list[Any]:
        from qdrant_client import models

        return [
            models.PointStruct(id=point_id, vector=vector, payload=payload)
            for point_id, vector, payload in self.pair(snapshot)
        ]

    def put(self, points: list[Any]) -> None:
        self._client.upsert("bare", points)

    def get(self, user_id: str) -> Any:
        return self._client.retrieve("bare", [self._id(user_id)])

    def _where(self, kind: str, user_id: str | None = None) -> Any:
        from qdrant_client import models

        must = [models.FieldCondition(key="kind", match=models.MatchValue(value=kind))]
        if user_id is not None:
            must.append(models.FieldCondition(key="user_id", match=models.MatchValue(value=user_id)))
        return models.Filter(must=list(must))

    def history(self, user_id: str) -> Any:
        from qdrant_client import models

        order = models.OrderBy(key="updated_at_unix_ms", direction=models.Direction.DESC)
        return self._client.scroll("bare", self._where("history", user_id), limit=HISTORY, order_by=order)

    def _query(self, like: StateSnapshot, where: Any) -> Any:
        return self._client.query_points("bare", vector_of(like), query_filter=where, limit=HISTORY)

    def search_user(self, asked: tuple[str, StateSnapshot]) -> Any:
        return self._query(asked[1], self._where("history", asked[0]))

    def search_all(self, like: StateSnapshot) -> Any:
        return self._query(like, self._where("latest"))


class BareLocal(_BareClient, _OnDisk):
    """Its upsert commits after each point. Its asynchronous form would hold up the event loop."""

    name = "bare qdrant-client local"
    most_users = 10_000
    serves_threads = False
    blocks = True

    def open(self) -> None:
        from qdrant_client import QdrantClient

        exists = self.path.exists()
        self._client = QdrantClient(path=str(self.path), force_disable_check_same_thread=True)
        if not exists:
            self._create()

    def close(self) -> None:
        self._client.close()


class DiskCache(_OnDisk):
    """An entry for the latest state with the times of the history, and one for each of these."""

    name = "diskcache"
    module = library = "diskcache"
    blocks = True

    def open(self) -> None:
        from diskcache import Cache

        self._cache = Cache(str(self.path), eviction_policy="none", size_limit=2**40)
        self.get = self._cache.__getitem__

    def close(self) -> None:
        self._cache.close()

    def form(self, snapshot: StateSnapshot) -> dict[str, Any]:
        return snapshot.to_dict()

    def put(self, record: dict[str, Any]) -> None:
        user_id, time_ms = record["user_id"], record["updated_at_unix_ms"]
        with self._cache.transact():
            _, times = self._cache.get(user_id, (None, []))
            self._cache[user_id] = record, [*times, time_ms][-100:]
            self._cache[f"{user_id}:{time_ms}"] = record

    def fill(self, people: People) -> None:
        with self._cache.transact():
            super().fill(people)

    def history(self, user_id: str) -> list[Any]:
        _, times = self._cache[user_id]
        return [self._cache[f"{user_id}:{time_ms}"] for time_ms in times[: -HISTORY - 1 : -1]]


class SqliteDict(_OnDisk):
    """As DiskCache; a commit after each write, as what was acknowledged is to be kept."""

    name = "sqlitedict"
    module = library = "sqlitedict"
    blocks = True

    def open(self) -> None:
        from sqlitedict import SqliteDict as TheirDict

        self._dict = TheirDict(f"{self.path}.sqlite", journal_mode="WAL")
        self.get = self._dict.__getitem__

    def close(self) -> None:
        self._dict.close()

    def form(self, snapshot: StateSnapshot) -> dict[str, Any]:
        return snapshot.to_dict()

    def _set(self, record: dict[str, Any]) -> None:
        user_id, time_ms = record["user_id"], record["updated_at_unix_ms"]
        _, times = self._dict.get(user_id, (None, []))
        self._dict[user_id] = record, [*times, time_ms][-100:]
        self._dict[f"{user_id}:{time_ms}"] = record

    def put(self, record: dict[str, Any]) -> None:
        self._set(record)
        self._dict.commit()

    def fill(self, people: People) -> None:
        for snapshot in people.first_states():
            self._set(self.form(snapshot))
        self._dict.commit()

    def history(self, user_id: str) -> list[Any]:
        _, times = self._dict[user_id]
        return [self._dict[f"{user_id}:{time_ms}"] for time_ms in times[: -HISTORY - 1 : -1]]


class SqliteWal(_OnDisk):
    """Two tables; the latest, where newest, and its entry in a transaction with synchronous=NORMAL."""

    name = "SQLite WAL"
    blocks = True
    serves_threads = False

    def open(self) -> None:
        database = sqlite3.connect(f"{self.path}.sqlite", isolation_level=None, check_same_thread=False)
        self._database = database
        database.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
            "CREATE TABLE IF NOT EXISTS latest"
            " (user TEXT PRIMARY KEY, time INTEGER, state TEXT) WITHOUT ROWID;"
            "CREATE TABLE IF NOT EXISTS history"
            " (user TEXT, time INTEGER, state TEXT, PRIMARY KEY (user, time)) WITHOUT ROWID;"
        )

    def close(self) -> None:
        self._database.close()

    def form(self, snapshot: StateSnapshot) -> dict[str, Any]:
        return snapshot.to_dict()

    def _insert(self, record: dict[str, Any]) -> None:
        row = record["user_id"], record["updated_at_unix_ms"], json.dumps(record)
        self._database.execute(
            "INSERT INTO latest VALUES (?, ?, ?) ON CONFLICT DO UPDATE"
            " SET time = excluded.time, state = excluded.state WHERE excluded.time >= latest.time",
            row,
        )
        self._database.execute("INSERT OR REPLACE INTO history VALUES (?, ?, ?)", row)

    def put(self, record: dict[str, Any]) -> None:
        self._database.execute("BEGIN")
        self._insert(record)
        self._database.execute("COMMIT")

    def fill(self, people: People) -> None:
        self._database.execute("BEGIN")
        for snapshot in people.first_states():
            self._insert(self.form(snapshot))
        self._database.execute("COMMIT")

    def get(self, user_id: str) -> Any:
        found = self._database.execute("SELECT state FROM latest WHERE user = ?", (user_id,))
        return json.loads(found.fetchone()[0])

    def history(self, user_id: str) -> list[Any]:
        query = "SELECT state FROM history WHERE user = ? ORDER BY time DESC LIMIT ?"
        return [json.loads(state) for (state,) in self._database.execute(query, (user_id, HISTORY))]


class Lmdb(_OnDisk):
    """Keys in the order of users and times; without a sync for each transaction, as the others here."""

    name = "lmdb"
    module = library = "lmdb"
    blocks = True

    def open(self) -> None:
        import lmdb

        self._environment = lmdb.open(str(self.path), map_size=2**33, max_dbs=2, sync=False)
        self._latest = self._environment.open_db(b"latest")
        self._history = self._environment.open_db(b"history")

    def close(self) -> None:
        self._environment.sync(force=True)
        self._environment.close()

    def form(self, snapshot: StateSnapshot) -> dict[str, Any]:
        return snapshot.to_dict()

    def _insert(self, transaction: Any, record: dict[str, Any]) -> None:
        user, state = record["user_id"].encode(), json.dumps(record).encode()
        transaction.put(user, state, db=self._latest)
        key = user + b"\0" + record["updated_at_unix_ms"].to_bytes(8, "big")
        transaction.put(key, state, db=self._history)

    def put(self, record: dict[str, Any]) -> None:
        with self._environment.begin(write=True) as transaction:
            self._insert(transaction, record)

    def fill(self, people: People) -> None:
        with self._environment.begin(write=True) as transaction:
            for snapshot in people.first_states():
                self._insert(transaction, self.form(snapshot))

    def get(self, user_id: str) -> Any:
        with self._environment.begin() as transaction:
            return json.loads(transaction.get(user_id.encode(), db=self._latest))

    def history(self, user_id: str) -> list[Any]:
        prefix = user_id.encode() + b"\0"
        with self._environment.begin() as transaction, transaction.cursor(self._history) as cursor:
            if cursor.set_range(prefix + b"\xff" * 8):  # the next user's; at the end there is none
                cursor.prev()
            states = list[Any]()
            for key, state in cursor.iterprev():
                if len(states) == HISTORY or not key.startswith(prefix):
                    break
                states.append(json.loads(state))
            return states


class KeyValueDisk(_KeyValue, _OnDisk):
    name = "py-key-value disk"

    @classmethod
    def is_installed(cls) -> bool:
        return super().is_installed() and importlib.util.find_spec("diskcache") is not None

    def open(self) -> None:
        from key_value.aio.stores.disk import DiskStore

        self._store = DiskStore(directory=self.path, max_size=2**40)

    def close(self) -> None:
        self.run(self._store.close())


# -----------------------------------------------------------------------------
# On a server
# -----------------------------------------------------------------------------


class OursOnServer(_OursOpened):
    name = "attuned server"
    module, library = "qdrant_client", "qdrant-client"

    def open(self) -> None:
        options: Any = {"url": self.place.url, "axes": AXES, "telemetry": False}
        self.use(QdrantStore(**options), AsyncQdrantStore(**options))


class BareServer(_BareClient):
    """Clients that keep their connections, which by default they do not on loopback."""

    name = "bare qdrant-client"

    def open(self) -> None:
        import httpx
        from qdrant_client import AsyncQdrantClient, QdrantClient, models

        options: dict[str, Any] = {"check_compatibility": False, "limits": httpx.Limits(max_connections=64)}
        self._client = QdrantClient(url=self.place.url, **options)
        self._async_client = AsyncQdrantClient(url=self.place.url, **options)
        if self._client.collection_exists("bare"):
            return
        self._create()
        for key, kind in (
            ("user_id", models.PayloadSchemaType.KEYWORD),
            ("kind", models.PayloadSchemaType.KEYWORD),
            ("updated_at_unix_ms", models.PayloadSchemaType.INTEGER),
        ):
            self._client.create_payload_index("bare", key, kind)

    def close(self) -> None:
        self.run(self._async_client.close())
        self._client.close()

    def fill(self, people: People) -> None:
        snapshots = people.first_states()
        while batch := list(itertools.islice(snapshots, 128)):
            self._client.upsert("bare", [point for snapshot in batch for point in self.form(snapshot)])

    async def async_put(self, points: list[Any]) -> None:
        await self._async_client.upsert("bare", points)

    async def async_get(self, user_id: str) -> Any:
        return await self._async_client.retrieve("bare", [self._id(user_id)])


FAMILIES: dict[str, Sequence[type[Contender]]] = {
    "memory": (OursInMemory, Floor, CacheTools, LangGraph, KeyValueMemory),
    "embedded": (
        OursOnEdge,
        OursInLocalMode,
        Floor,
        BareEdge,
        BareLocal,
        DiskCache,
        SqliteDict,
        SqliteWal,
        Lmdb,
        KeyValueDisk,
    ),
    "remote": (OursOnServer, Floor, BareServer),
}
# The loopback server looks at every point for a filter: more users would measure it.
MOST_USERS = {"remote": 10_000}


def one_by_one(contender: Contender, operation: str) -> Callable[[Iterable[Any]], object] | None:
    """What calls an operation for each argument, by the event loop where there is no other form."""
    call: Any = getattr(contender, operation, None)
    if call is not None:

        def each(arguments: Iterable[Any]) -> None:
            for argument in arguments:
                call(argument)

        return each
    asynchronous: Any = getattr(contender, f"async_{operation}", None)
    if asynchronous is None:
        return None

    async def await_each(arguments: Iterable[Any]) -> None:
        for argument in arguments:
            await asynchronous(argument)

    return lambda arguments: contender.run(await_each(arguments))

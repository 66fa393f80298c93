"""The engine of points in the memory of this process, and the example of an engine."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import attrs

from attuned.engines.filters import Filter, matches
from attuned.engines.vectors import Vectors, make_vectors
from attuned.engines.waist import (
    CollectionSpec,
    EngineInProcess,
    ExecutionMode,
    Matching,
    Opened,
    Page,
    Point,
    Put,
    Record,
    backend_errors,
    copied,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


class _Tenant:
    """The points of a tenant: a search goes over one matrix, a page over ids in their order."""

    def __init__(self, vector_size: int) -> None:
        self.rows: dict[str, int] = {}
        self._vectors: Vectors = make_vectors(vector_size)
        self._ids: list[str | None] = []  # by row
        self._free: list[int] = []  # rows
        self._sorted: list[str] | None = None

    def put(self, point_id: str, vector: Sequence[float]) -> None:
        row = self.rows.get(point_id)
        if row is None:
            row = self.rows[point_id] = self._free.pop() if self._free else len(self._ids)
            self._ids[row : row + 1] = [point_id]
            self._sorted = None
        self._vectors.put(row, _direction(vector))

    def remove(self, point_id: str) -> None:
        row = self.rows.pop(point_id)
        self._ids[row] = self._sorted = None
        self._free.append(row)

    def vector(self, point_id: str) -> list[float]:
        return self._vectors.get(self.rows[point_id])

    def ids_from(self, least: str) -> list[str]:
        if self._sorted is None:
            self._sorted = sorted(self.rows)
        return self._sorted[bisect_left(self._sorted, least) :]

    def nearest(self, direction: Sequence[float], number: int) -> Iterator[tuple[float, str]]:
        """The best scores and the ids that have them, best first: so many at once, then all."""
        scores = self._vectors.scores(direction, len(self._ids))
        done = set[int]()
        for wanted in (number, len(self._ids)):
            for row in self._vectors.best(scores, wanted):
                if row not in done and (point_id := self._ids[row]) is not None:
                    yield min(1.0, max(-1.0, float(scores[row]))), point_id
                done.add(row)


@attrs.define
class _Collection:
    metadata: Mapping[str, Any]
    vector_size: int
    points: dict[str, Point] = attrs.field(init=False, factory=dict[str, Point])
    tenants: dict[str, _Tenant] = attrs.field(init=False, factory=dict[str, _Tenant])
    sorted_tenants: list[str] | None = None


class MemoryEngine(EngineInProcess):
    """Points in dicts, which go with the engine.

    What it is given is copied, and copied again for whoever reads it: neither side sees what the other does.
    """

    name = "memory"
    runs: ExecutionMode = "in place"
    indexed = True  # by tenant; of all tenants every point is looked at, which takes about a microsecond
    compact = False
    rounds_floats = False

    def __init__(self) -> None:
        super().__init__()
        self._collections: dict[str, _Collection] = {}

    async def open(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """See Engine.open."""
        held = self._collections.get(collection.name)
        if held is None:
            held = _Collection(copied(collection.metadata), collection.vector_size)
        collection.accept(held.metadata)
        self._collections[collection.name] = held
        self._open[collection.name] = Opened(held.vector_size, collection.tenant)
        return held.metadata

    async def amend(self, collection: CollectionSpec) -> None:
        """See Engine.amend; there are no indexes."""
        self._opened(collection.name)
        held = self._collections[collection.name]
        held.metadata = {**held.metadata, **copied(collection.metadata)}
        self.amendments += 1

    async def collections(self) -> Mapping[str, Mapping[str, Any]]:
        """See Engine.collections."""
        return {name: held.metadata for name, held in self._collections.items()}

    async def drop(self, collection: str) -> None:
        """See Engine.drop."""
        self._collections.pop(collection, None)
        self._open.pop(collection, None)

    async def retrieve(
        self, collection: str, ids: Sequence[str], *, payload: bool = True, vector: bool = False
    ) -> list[Record]:
        """See Engine.retrieve."""
        self._opened(collection)
        held = self._collections[collection]
        found = [held.points[point_id] for point_id in dict.fromkeys(ids) if point_id in held.points]
        return [
            _record(
                point,
                payload=payload,
                vector=held.tenants[point.tenant or ""].vector(point.id) if vector else (),
            )
            for point in found
        ]

    async def page(
        self,
        collection: str,
        where: Filter,
        *,
        limit: int,
        tenant: str | None = None,
        cursor: Any = None,
        newest_by: str | None = None,
        payload: bool = True,
    ) -> Page:
        """See Engine.page; points come by tenant and id, and the cursor is those of the next."""
        points = self._matching(collection, where, tenant, cursor)
        if newest_by is not None:
            ordered = (point for point in points if type(point.payload.get(newest_by)) in (int, float))
            newest = heapq.nlargest(limit, ordered, key=lambda point: point.payload[newest_by])
            if payload:
                return Page([_record(point) for point in newest], None)
            return Page([Record(point.id, {newest_by: point.payload[newest_by]}) for point in newest], None)
        records: list[Record] = []
        for point in points:
            if len(records) == limit:
                return Page(records, (point.tenant or "", point.id))
            records.append(_record(point, payload=payload))
        return Page(records, None)

    def _matching(
        self, collection: str, where: Filter, tenant: str | None, cursor: tuple[str, str] | None = None
    ) -> Iterator[Point]:
        held, (first, least) = self._held(collection, tenant), cursor or ("", "")
        if tenant is not None:
            names = [tenant]
        else:
            if held.sorted_tenants is None:
                held.sorted_tenants = sorted(held.tenants)
            names = held.sorted_tenants[bisect_left(held.sorted_tenants, first) :]
        for name in names:
            if (group := held.tenants.get(name)) is not None:
                for point_id in group.ids_from(least if name == first else ""):
                    point = held.points[point_id]
                    if matches(where, point.payload):
                        yield point

    def _held(self, collection: str, tenant: str | None) -> _Collection:
        if self._opened(collection).tenant is None and tenant is not None:
            raise ValueError("the collection has no tenants")
        return self._collections[collection]

    async def search(
        self,
        collection: str,
        vector: Sequence[float],
        where: Filter,
        limit: int,
        *,
        tenant: str | None = None,
        payload: bool = True,
    ) -> list[Record]:
        """See Engine.search."""
        held, direction = self._held(collection, tenant), _direction(vector)
        groups: Iterable[_Tenant | None] = (
            held.tenants.values() if tenant is None else [held.tenants.get(tenant)]
        )
        number = limit if where == Filter() else 4 * limit + 64
        nearest = heapq.merge(
            *(group.nearest(direction, number) for group in groups if group is not None),
            key=lambda scored: scored[0],
            reverse=True,
        )
        records: list[Record] = []
        for score, point_id in nearest:
            point = held.points[point_id]
            if matches(where, point.payload):
                records.append(_record(point, payload=payload, score=score))
                if len(records) == limit:
                    break
        return records

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """See Engine.count."""
        return sum(1 for _ in self._matching(collection, where, tenant))

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """See Engine.apply."""
        written, deleted = await self._judge(collection, puts, deletes)
        with backend_errors(self, "write"):
            held = self._collections[collection]
            for point in written:
                before = held.points.get(point.id)
                if before is not None and before.tenant != point.tenant:
                    self._remove(held, before)
                group = held.tenants.get(point.tenant or "")
                if group is None:
                    group = held.tenants[point.tenant or ""] = _Tenant(held.vector_size)
                    held.sorted_tenants = None
                group.put(point.id, point.vector)
                held.points[point.id] = point._replace(vector=(), payload=copied(point.payload))
            for point_id in deleted:
                if point_id in held.points:
                    self._remove(held, held.points[point_id])

    @staticmethod
    def _remove(held: _Collection, point: Point) -> None:
        group = held.tenants[point.tenant or ""]
        group.remove(point.id)
        del held.points[point.id]
        if not group.rows:
            del held.tenants[point.tenant or ""]
            held.sorted_tenants = None

    async def close(self) -> None:
        """See Engine.close; nothing is left."""
        self._collections.clear()
        self._open.clear()


def _record(
    point: Point, score: float = 0.0, *, payload: bool = True, vector: Sequence[float] = ()
) -> Record:
    return Record(point.id, copied(point.payload) if payload else {}, score, vector)


def _direction(vector: Sequence[float]) -> list[float]:
    length = math.hypot(*vector)
    return [value / length for value in vector] if length else list(vector)

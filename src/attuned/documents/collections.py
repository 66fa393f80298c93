"""What a collection of documents does, written once: synchronous handles run it, asynchronous ones await it.

A document is one point: its vector, its text with the hash of it, its fields as JSON, and those that have
an index once more. All of that is written together, so that no text ever stands beside the vector of
another. Texts are embedded between two pieces of work on the engine, when nothing is held.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import attrs
from cachetools import LRUCache

from attuned.base.config import check_flag
from attuned.base.errors import (
    LOGGER,
    BackendError,
    StoreError,
    ValidationError,
    brief,
    type_name,
)
from attuned.base.values import (
    MAX_INTEGER,
    check_integer,
    check_number,
    check_user_id,
    wall_clock,
)
from attuned.connections.runtime import Pager
from attuned.documents.embedding import Embedder
from attuned.documents.filters import (
    TIME_KEY,
    Where,
    check_indexes,
)
from attuned.documents.opening import PIECE, OpenableCollection
from attuned.documents.points import (
    EMBEDDER_KEY,
    NO_VECTOR,
    SHARED,
    CollectionSettings,
    Draft,
    OpenCollection,
    document_point_id,
)
from attuned.documents.values import (
    CollectionInfo,
    Document,
    DocumentMatch,
    ErasureReport,
    UpsertReport,
    check_ttl,
)
from attuned.engines.filters import Equal, Filter, matches
from attuned.engines.waist import Engine, Matching, Point, Put, Record
from attuned.snapshots.archive import check_progress
from attuned.states.contract import clamp_score

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attuned.snapshots.archive import Progress
    from attuned.states.operations import Operations

_MOST_FOUND = 2**31 - 1


@attrs.define
class _Tally:
    """What has become of documents so far."""

    embedded: int = 0
    moved: int = 0
    unchanged: int = 0
    failed: dict[str, StoreError] = attrs.field(factory=dict[str, "StoreError"])
    outages: int = 0  # batches in a row of which nothing could be embedded

    @property
    def done(self) -> int:
        return self.embedded + self.moved + self.unchanged + len(self.failed)

    def report(self) -> UpsertReport:
        return UpsertReport(
            embedded=self.embedded, moved=self.moved, unchanged=self.unchanged, failed=self.failed
        )


class CollectionOperations(OpenableCollection):
    """What a collection does."""

    SWEEP_EVERY_MS = 60_000  # writes look for expired documents so often
    MOST_OUTAGES = 2  # in a row, before a bulk operation gives up
    CACHED_QUERIES = 1_024

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._queries: LRUCache[str, Sequence[float]] = LRUCache(self.CACHED_QUERIES)
        self._queries_lock = threading.Lock()
        self._next_sweep = 0

    # Reading

    async def get_many(self, user_id: str, document_ids: Iterable[str]) -> dict[str, Document]:
        """See UserDocuments.get_many."""
        if isinstance(document_ids, str) or not isinstance(document_ids, Iterable):
            raise ValidationError(f"ids: an iterable of ids is needed, got {type_name(document_ids)}")
        asked = list(dict.fromkeys(check_user_id(each, "id") for each in document_ids))
        users = tuple(dict.fromkeys((SHARED, user_id)))  # of equal ids the later one wins
        ids = [document_point_id(user, each) for user in users for each in asked]
        documents = [self._document(record, users) for record in await self._find(ids, Filter())]
        found = {document.id: document for document in documents}
        return {each: found[each] for each in asked if each in found}

    async def documents(
        self, user_id: str | None, where: Where | None, *, limit: int | None, newest_first: bool
    ) -> list[Document]:
        """See DocumentSet.documents."""
        most = _MOST_FOUND if limit is None else check_integer("limit", limit, 0, MAX_INTEGER)
        most = min(most, _MOST_FOUND)
        compiled = await self._compiled(where)
        users = None if user_id is None else [user_id]
        records = list[Record]()
        if most and check_flag("newest_first", newest_first):
            records = await self._newest(user_id, compiled, most)
        elif most:
            pages = Pager(lambda cursor: self._page(user_id, compiled, cursor, most), self._waits)
            while len(records) < most and (page := await pages.next()) is not None:
                records += page
        return [self._document(record, users) for record in records[:most]]

    async def _page(
        self, user_id: str | None, where: Filter, cursor: Any, most: int = PIECE
    ) -> tuple[list[Record], Any]:
        async def read(engine: Engine, opened: OpenCollection) -> tuple[list[Record], Any]:
            limit = min(most, PIECE)
            page = await engine.page(
                self.name, opened.alive(where), limit=limit, tenant=user_id, cursor=cursor
            )
            return page.records, page.cursor

        return await self._drive("list_documents", read, user_id)

    async def _newest(self, user_id: str | None, where: Filter, most: int) -> list[Record]:
        """The newest first; where they are more than one piece of work, their ids come before them."""

        async def read(engine: Engine, opened: OpenCollection) -> list[Record]:
            page = await engine.page(
                self.name,
                opened.alive(where),
                limit=most,
                tenant=user_id,
                newest_by=TIME_KEY,
                payload=most <= PIECE,
            )
            return page.records

        records = await self._drive("list_documents", read, user_id)
        if most <= PIECE:
            return records
        return await self._find([str(record.id) for record in records], where)

    async def count(self, user_id: str | None, where: Where | None) -> int:
        """See DocumentSet.count."""
        compiled = await self._compiled(where)

        async def count(engine: Engine, opened: OpenCollection) -> int:
            return await engine.count(self.name, opened.alive(compiled), tenant=user_id)

        return await self._drive("count_documents", count, user_id)

    async def search(
        self,
        user_id: str | None,
        query: str | Sequence[float],
        where: Where | None,
        *,
        limit: int,
        score_threshold: float | None,
        shared: bool = False,
    ) -> list[DocumentMatch]:
        """See UserDocuments.search."""
        limit = check_integer("limit", limit, 1, MAX_INTEGER)
        least = -math.inf if score_threshold is None else check_number("score_threshold", score_threshold)
        check_flag("shared", shared)
        opened, compiled = await self.open(), await self._compiled(where)
        vector = await self._query_vector(opened.settings, query)
        maker = opened.settings.embedder if self.embedder is None else self.embedder.name
        compiled = compiled._replace(must=(Equal(EMBEDDER_KEY, str(maker)), *compiled.must))
        matches = await self._nearest(user_id, vector, compiled, min(limit, _MOST_FOUND))
        if shared and user_id:
            matches += await self._nearest_shared(user_id, vector, compiled, min(limit, _MOST_FOUND))
            matches.sort(key=attrgetter("score"), reverse=True)
        return [match for match in matches[:limit] if match.score >= least]

    async def _nearest(
        self, user_id: str | None, vector: Sequence[float], where: Filter, limit: int
    ) -> list[DocumentMatch]:
        """The nearest; where they are more than one piece of work, their ids come before them."""

        async def read(engine: Engine, opened: OpenCollection) -> list[Record]:
            return await engine.search(
                self.name, vector, opened.alive(where), limit, tenant=user_id, payload=limit <= PIECE
            )

        records = await self._drive("search_documents", read, user_id)
        if limit > PIECE:  # one may have been replaced since: what is told is what it is now
            records = [
                record._replace(score=math.fsum(a * b for a, b in zip(vector, record.vector, strict=True)))
                for record in await self._find([str(each.id) for each in records], where, vectors=True)
            ]
            records.sort(key=attrgetter("score"), reverse=True)
        users = None if user_id is None else [user_id]
        return [DocumentMatch(self._document(record, users), clamp_score(record.score)) for record in records]

    async def _nearest_shared(
        self, user_id: str, vector: Sequence[float], where: Filter, limit: int
    ) -> list[DocumentMatch]:
        """The nearest shared ones without those in whose place the user has one, whatever that holds."""
        asked = limit
        while True:
            found = await self._nearest(SHARED, vector, where, asked)
            ids = [document_point_id(user_id, match.document.id) for match in found]
            own = {self._document(record, [user_id]).id for record in await self._find(ids, Filter())}
            shown = [match for match in found if match.document.id not in own]
            if len(shown) >= limit or len(found) < asked:
                return shown[:limit]
            asked = min(4 * asked, _MOST_FOUND)

    async def _query_vector(
        self, settings: CollectionSettings, query: str | Sequence[float]
    ) -> Sequence[float]:
        """The direction of what is searched with."""
        if settings.embedder is None:
            raise ValidationError(f"{self._location} has no embedder: its documents cannot be searched")
        if not isinstance(query, str):
            return _direction_of(query, settings.vector_size)
        with self._queries_lock:
            known = self._queries.get(query)
        if known is not None:
            return known
        if self.embedder is None:
            raise ValidationError(
                f"query: to search by a text, open {self._location} with its embedder, {settings.embedder}"
            )
        found = await self.embedder.embed_query_text(self._waits, query)
        direction = _direction_of(found, settings.vector_size)
        with self._queries_lock:
            self._queries[query] = direction
        return direction

    # Writing

    async def upsert(self, user_id: str, document: Document) -> None:
        """See UserDocuments.upsert."""
        report = await self.upsert_many(user_id, (document,), None)
        for error in report.failed.values():
            raise error

    async def upsert_many(
        self, user_id: str, documents: Iterable[Document], progress: Progress | None
    ) -> UpsertReport:
        """See UserDocuments.upsert_many.

        What is to be embedded is gathered until a batch of the embedder is full.
        """
        self.operations.check_open()
        progress = check_progress(progress)
        if isinstance(documents, Document) or not isinstance(documents, Iterable):
            raise ValidationError(f"documents: an iterable of Document is needed, got {type_name(documents)}")
        opened = await self.open()
        if self.embedder is None and opened.settings.embedder is not None:
            raise ValidationError(
                f"to write, open {self._location} with its embedder, {opened.settings.embedder}"
            )
        maker = None if self.embedder is None else self.embedder.name
        total = len(cast("Any", documents)) if hasattr(documents, "__len__") else None
        if isinstance(documents, list | tuple):
            documents = tuple(documents)  # of this moment, whatever the caller does to it between two pieces
            for position, document in enumerate(documents):
                if position % PIECE == 0:
                    await self._waits.pause_if_due()
                Draft.of(document, opened.settings, maker)
        tally, batch = _Tally(), dict[str, Draft]()
        full = PIECE if self.embedder is None else self.embedder.batch_size
        try:
            for piece in self._pieces(documents, opened.settings, maker):
                if not batch.keys().isdisjoint(piece):  # one comes again: the later one counts
                    await self._embed(user_id, batch, tally)
                batch |= await self._compare(user_id, piece, tally)
                while len(batch) >= full:
                    await self._embed(user_id, _first(batch, full), tally)
                progress(tally.done, total)
                await self._waits.pause()
            await self._embed(user_id, batch, tally)
            progress(tally.done, total)
        except StoreError as error:
            error.written = tally.embedded + tally.moved
            raise
        return tally.report()

    @staticmethod
    def _pieces(
        documents: Iterable[Document], settings: CollectionSettings, maker: str | None
    ) -> Iterator[dict[str, Draft]]:
        """What is compared in one piece of work: documents by their ids, each once."""
        piece: dict[str, Draft] = {}
        for document in documents:
            draft = Draft.of(document, settings, maker)
            if len(piece) == PIECE or draft.document.id in piece:
                yield piece
                piece = {}
            piece[draft.document.id] = draft
        if piece:
            yield piece

    async def _compare(self, user_id: str, piece: Mapping[str, Draft], tally: _Tally) -> dict[str, Draft]:
        """What of this has a new text; what has the same as before is written, and keeps its vector."""

        async def compare(engine: Engine, opened: OpenCollection) -> tuple[list[str], int, int]:
            ids = {document_point_id(user_id, each): each for each in piece}
            same = await self._with_same_text(engine, opened, user_id, ids, piece, vectors=False)
            unchanged = [
                each for each in same if piece[ids[each]].is_kept_in(same[each].payload, opened.settings.ttl)
            ]
            moved = {point_id: ids[point_id] for point_id in same if point_id not in unchanged}
            if self.embedder is not None and moved:
                same = await self._with_same_text(engine, opened, user_id, moved, piece, vectors=True)
            points = [
                piece[each].point(user_id, same[point_id].vector or NO_VECTOR)
                for point_id, each in moved.items()
                if point_id in same
            ]
            if points:
                await engine.apply(self.name, [Put(points)])
            written = {*unchanged, *(point.id for point in points)}
            new = [each for point_id, each in ids.items() if point_id not in written]
            return new, len(unchanged), len(points)

        new, unchanged, moved = await self._drive("", compare, user_id)
        tally.unchanged += unchanged
        tally.moved += moved
        return {each: piece[each] for each in new}

    async def _with_same_text(
        self,
        engine: Engine,
        opened: OpenCollection,
        user_id: str,
        ids: Mapping[str, str],
        piece: Mapping[str, Draft],
        *,
        vectors: bool,
    ) -> dict[str, Record]:
        """Those of these points that hold the text of their draft, with a vector of the same embedder."""
        found, alive = dict[str, Record](), opened.alive(Filter())
        for record in await engine.retrieve(self.name, list(ids), vector=vectors):
            point_id = str(record.id)
            if record.payload.get("user_id") != user_id or point_id not in ids:
                raise self._wrong("the engine answered with a document of another user; nothing is written")
            if piece[ids[point_id]].has_text_of(record.payload) and matches(alive, record.payload):
                found[point_id] = record
        return found

    async def _embed(self, user_id: str, batch: dict[str, Draft], tally: _Tally) -> None:
        """Embed and write a batch, and empty it; nothing is held while it is embedded."""
        drafts = list(batch.values())
        batch.clear()
        vectors = await self._vectors([draft.document.text for draft in drafts], tally)
        points = list[Point]()
        for draft, vector in zip(drafts, vectors, strict=True):
            if isinstance(vector, StoreError):
                tally.failed[draft.document.id] = vector
            else:
                points.append(draft.point(user_id, vector))
        for start in range(0, len(points), PIECE):
            piece = points[start : start + PIECE]
            await self._write(piece)
            tally.embedded += len(piece)
            await self._waits.pause()
        await self._sweep()

    async def _write(self, points: Sequence[Point]) -> None:
        await self._drive("", lambda engine, _: engine.apply(self.name, [Put(points)]))

    async def _vectors(self, texts: Sequence[str], tally: _Tally) -> Sequence[Sequence[float] | StoreError]:
        """A vector or what is wrong for each text; raises where nothing could be embedded twice in a row."""
        if self.embedder is None or not texts:
            return [NO_VECTOR] * len(texts)
        vectors = await self.embedder.embed_texts(self._waits, texts)
        tally.outages = tally.outages + 1 if all(isinstance(each, BackendError) for each in vectors) else 0
        if tally.outages == self.MOST_OUTAGES:
            raise cast("BackendError", vectors[-1])
        return vectors

    async def _sweep(self) -> None:
        """Now and then, remove some of what has expired."""
        now = wall_clock.now_ms()
        if now < self._next_sweep:
            return
        self._next_sweep = now + self.SWEEP_EVERY_MS

        async def sweep(engine: Engine, opened: OpenCollection) -> bool:
            return (await self._delete_page(engine, opened.expired(), None, None))[1] is not None

        try:
            if await self._drive("", sweep):
                self._next_sweep = 0  # there are more: the next write goes on
        except BackendError as error:  # what was to be written has been
            LOGGER.warning("removing expired documents failed: %s", error)

    # Removing

    async def delete(self, user_id: str, document_id: str) -> bool:
        """See UserDocuments.delete."""
        point_id = document_point_id(user_id, check_user_id(document_id, "id"))

        async def delete(engine: Engine, opened: OpenCollection) -> bool:
            found = [
                self._document(record, [user_id])
                for record in await engine.retrieve(self.name, [point_id])
                if matches(opened.alive(Filter()), record.payload)
            ]
            await engine.apply(self.name, deletes=[point_id])
            return bool(found)

        return await self._drive("delete_document", delete, user_id)

    async def delete_many(self, user_id: str | None, where: Where) -> int:
        """See DocumentSet.delete_many."""
        if not isinstance(where, Mapping):
            raise ValidationError(
                f"where: a mapping from field to value is needed, {{}} for all; got {type_name(where)}"
            )
        return await self._delete(user_id, await self._compiled(where), expired=False)

    async def erase(self, user_id: str) -> int:
        """Remove all that there is of a user; how many documents that was."""
        return await self._delete(user_id, Filter(), expired=True)

    async def _delete(self, user_id: str | None, where: Filter, *, expired: bool) -> int:
        async def page(cursor: Any) -> tuple[int, Any]:
            async def work(engine: Engine, opened: OpenCollection) -> tuple[int, Any]:
                narrowed = where if expired else opened.alive(where)
                return await self._delete_page(engine, narrowed, user_id, cursor)

            return await self._drive("", work, user_id)

        pages, total = Pager(page, self._waits), 0
        while (number := await pages.next()) is not None:
            total += number
        return total

    async def _delete_page(
        self, engine: Engine, where: Filter, user_id: str | None, cursor: Any
    ) -> tuple[int, Any]:
        """Remove some of what matches; all at once where others might write between a look and a removal."""
        if engine.shared:
            number = await engine.count(self.name, where, tenant=user_id)
            if number:
                await engine.apply(self.name, deletes=Matching(where, user_id))
            return number, None
        page = await engine.page(self.name, where, limit=PIECE, tenant=user_id, cursor=cursor, payload=False)
        if page.records:
            await engine.apply(self.name, deletes=[str(record.id) for record in page.records])
        return len(page.records), page.cursor

    # The collection itself

    async def refresh(self, progress: Progress | None) -> UpsertReport:
        """See Collection.refresh."""
        progress, tally, embedder = check_progress(progress), _Tally(), self.embedder
        if embedder is None:
            raise ValidationError(f"to refresh {self._location}, open it with an embedder")
        stale = Filter(must_not=(Equal(EMBEDDER_KEY, embedder.name),))
        before = -1
        while tally.embedded > before:  # what was written to meanwhile is looked at once more
            before, tally.failed = tally.embedded, {}
            total = tally.done + await self._count_points(stale)
            pages = Pager(lambda cursor: self._page(None, stale, cursor), self._waits)
            while (records := await pages.next()) is not None:
                for start in range(0, len(records), embedder.batch_size):  # each is kept before the next
                    batch = records[start : start + embedder.batch_size]
                    await self._embed_anew(batch, embedder.name, tally)
                    progress(tally.done, max(total, tally.done))
        opened = await self.open()
        if opened.settings.embedder != embedder.name and not tally.failed:
            self._opened = await self._amend(attrs.evolve(opened.settings, embedder=embedder.name))
        return tally.report()

    async def _embed_anew(self, records: Sequence[Record], maker: str, tally: _Tally) -> None:
        documents = [self._document(record) for record in records]
        found = await self._vectors([document.text for document in documents], tally)
        read, vectors = list[Record](), list[Sequence[float]]()
        for record, document, vector in zip(records, documents, found, strict=True):
            if isinstance(vector, StoreError):
                tally.failed[document.id] = vector
            else:
                read.append(record)
                vectors.append(vector)
        changes = [{EMBEDDER_KEY: maker}] * len(read)
        await self._drive("", lambda engine, _: self._replace(engine, read, changes, vectors))
        tally.embedded += len(read)

    async def _count_points(self, where: Filter) -> int:
        return await self._drive("", lambda engine, _: engine.count(self.name, where))

    async def info(self) -> CollectionInfo:
        """See Collection.info."""
        number = await self._count_points(Filter())
        settings = (await self.open()).settings
        return CollectionInfo(
            name=self.name,
            documents=number,
            indexes=dict(settings.indexes),
            embedder=settings.embedder,
            dimensions=None if settings.embedder is None else settings.vector_size,
            ttl=settings.ttl,
        )

    async def drop(self) -> None:
        """See Collection.drop."""
        await self._drive("drop_collection", lambda engine, _: engine.drop(self.name))
        self._opened = None


def _first(batch: dict[str, Draft], number: int) -> dict[str, Draft]:
    """Take the first of a batch out of it."""
    return {document_id: batch.pop(document_id) for document_id in list(itertools.islice(batch, number))}


def _direction_of(vector: Sequence[float], dimensions: int) -> Sequence[float]:
    """A vector of length 1, or ValidationError for what has no direction or another number of dimensions."""
    try:
        numbers = list(vector)
        if {*map(type, numbers)} != {float}:
            numbers = [check_number("query", value) for value in numbers]
    except TypeError:
        raise ValidationError(f"query: a text or a vector is needed, got {type_name(vector)}") from None
    if len(numbers) != dimensions:
        raise ValidationError(f"query: {dimensions} dimensions are needed, got {len(numbers)}")
    length = math.hypot(*numbers)
    if not 0 < length < math.inf:
        raise ValidationError(f"query: a vector with a direction is needed, got {brief(numbers)}")
    return [value / length for value in numbers]


def collection_operations(
    operations: Operations,
    name: str,
    embedder: Embedder | None = None,
    indexes: Mapping[str, str] | None = None,
    ttl: float | None = None,
) -> CollectionOperations:
    """What a store does with a collection; the same for the same arguments, so that it is opened once."""
    operations.check_open()
    if embedder is not None and not isinstance(embedder, Embedder):
        raise ValidationError(f"embedder: an Embedder or None is needed, got {type_name(embedder)}")
    asked = embedder, check_indexes({} if indexes is None else indexes), check_ttl(ttl)
    known: CollectionOperations | None = operations.documents.get(name) if isinstance(name, str) else None
    if known is None or known.asked != asked:
        known = operations.documents[name] = CollectionOperations(operations, name, *asked)
    return known


async def list_collections(operations: Operations) -> list[CollectionInfo]:
    """See StateStore.collections."""
    found = await operations.with_engine("list_collections", lambda engine: engine.collections())
    names = sorted(name for name, metadata in found.items() if metadata.get("kind") == "documents")
    return [await CollectionOperations(operations, name, None, {}, None).info() for name in names]


async def erase_user(operations: Operations, user_id: str) -> ErasureReport:
    """See StateStore.erase."""
    user_id = check_user_id(user_id)
    states, erased = await operations.delete(user_id), dict[str, int]()
    for each in await list_collections(operations):
        number = await CollectionOperations(operations, each.name, None, {}, None).erase(user_id)
        if number:
            erased[each.name] = number
    return ErasureReport(states=states, documents=erased)

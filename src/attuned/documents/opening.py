"""How a collection of documents is opened and reached: its settings, its points, pieces of work on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from attuned.base.config import check_collection_name
from attuned.base.errors import (
    BackendError,
    CollectionNotFoundError,
    SchemaMismatchError,
    T,
    ValidationError,
    one_line,
)
from attuned.connections.runtime import Pager
from attuned.documents.filters import compile_filter, engine_indexes, indexed_values
from attuned.documents.points import (
    NO_VECTOR,
    OWN_INDEXES,
    REVISION_KEY,
    CollectionSettings,
    OpenCollection,
    OutdatedError,
    document_of,
    new_revision,
)
from attuned.engines.filters import AnyOf, Filter, matches
from attuned.engines.waist import CollectionSpec, Engine, Point, Put, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from attuned.documents.embedding import Embedder
    from attuned.documents.filters import FieldKind, Where
    from attuned.documents.values import Document
    from attuned.states.operations import Operations

PIECE = 64  # documents in one piece of work: some 5 ms


class OpenableCollection:
    """A collection over the engine of the place where a store is, opened when it is first used."""

    def __init__(
        self,
        operations: Operations,
        name: str,
        embedder: Embedder | None,
        indexes: Mapping[str, FieldKind],
        ttl: float | None,
    ) -> None:
        self.name = check_collection_name("name", name)
        if self.name == operations.collection:
            raise ValidationError(f"name: {name!r} is the collection of the store's states")
        self.operations = operations
        self.asked = embedder, indexes, ttl
        self._waits = operations.waits
        self._opened: OpenCollection | None = None

    @property
    def embedder(self) -> Embedder | None:
        """What the texts are embedded with."""
        return self.asked[0]

    # Opening

    async def _drive(
        self,
        name: str,
        work: Callable[[Engine, OpenCollection], Coroutine[Any, Any, T]],
        user_id: str | None = None,
    ) -> T:
        """Run a piece of work on the open collection; one that was dropped or amended is opened again."""
        lost = 0
        while True:
            opened = await self.open()

            async def piece(engine: Engine, opened: OpenCollection = opened) -> T:
                if engine.amendments != opened.amendments:
                    raise OutdatedError
                return await work(engine, opened)

            try:
                return await self.operations.with_engine(name, piece, user_id)
            except OutdatedError:
                pass  # others have changed its settings: it is opened anew below
            except CollectionNotFoundError as error:
                lost += 1
                if error.collection != self.name or lost > 1:
                    raise
            if self._opened is opened:
                self._opened = None

    async def open(self) -> OpenCollection:
        """Open the collection, creating it where absent; index what was written before an index came."""
        if self._opened is not None:
            return self._opened
        embedder, indexes, ttl = self.asked
        if embedder is None:
            fresh = CollectionSettings(indexes, None, len(NO_VECTOR), ttl)
        else:
            fresh = CollectionSettings(indexes, embedder.name, embedder.dimensions, ttl)

        async def find(engine: Engine) -> OpenCollection:
            metadata = await engine.open(self._spec(fresh))
            return OpenCollection(CollectionSettings.of(metadata, self._location), engine.amendments)

        found = await self.operations.with_engine("", find)
        wanted = self._merged(found.settings)
        opened = found if wanted == found.settings else await self._amend(wanted)
        if wanted.pending:
            await self._index(wanted)
            opened = await self._amend(attrs.evolve(wanted, pending=()))
        self._opened = opened
        return opened

    async def _amend(self, settings: CollectionSettings) -> OpenCollection:
        async def amend(engine: Engine) -> OpenCollection:
            await engine.amend(self._spec(settings))
            return OpenCollection(settings, engine.amendments)

        return await self.operations.with_engine("", amend)

    @property
    def _location(self) -> str:
        return f"{self.operations.place.location}: collection {self.name!r}"

    def _merged(self, found: CollectionSettings) -> CollectionSettings:
        """What there is, with what is asked for; SchemaMismatchError where these do not go together."""
        embedder, indexes, ttl = self.asked
        if embedder is not None and found.embedder is None:
            raise SchemaMismatchError(
                f"{self._location} was made without an embedder, and its documents have no vectors: "
                "write them to another collection"
            )
        if embedder is not None and embedder.dimensions != found.vector_size:
            raise SchemaMismatchError(
                f"{self._location} has vectors of {found.vector_size} dimensions ({found.embedder}), and "
                f"{embedder.name} makes {embedder.dimensions}: refresh() goes over to an embedder of as many "
                "alone; write the documents to another collection"
            )
        for name, kind in indexes.items():
            if found.indexes.get(name, kind) != kind:
                raise SchemaMismatchError(
                    f"{self._location}: the index {name!r} is a {found.indexes[name]}, {kind} is asked for"
                )
        new = [name for name in indexes if name not in found.indexes]
        return attrs.evolve(
            found,
            indexes={**found.indexes, **indexes},
            ttl=found.ttl if ttl is None else ttl,
            pending=(*found.pending, *new),
        )

    def _spec(self, settings: CollectionSettings) -> CollectionSpec:
        return CollectionSpec(
            self.name,
            settings.vector_size,
            {**OWN_INDEXES, **engine_indexes(settings.indexes)},
            settings.metadata(),
            lambda metadata: self._merged(CollectionSettings.of(metadata, self._location)),
            tenant="user_id",
        )

    async def _index(self, settings: CollectionSettings) -> None:
        """Give all points the values of new indexes; one of another kind than its index stays without."""

        async def page(cursor: Any) -> tuple[int, Any]:
            async def work(engine: Engine) -> tuple[int, Any]:
                found = await engine.page(self.name, Filter(), limit=PIECE, cursor=cursor, payload=False)
                ids = [str(record.id) for record in found.records]
                records = await engine.retrieve(self.name, ids, vector=True) if ids else []
                changes = [
                    indexed_values(self._document(record).fields, settings.indexes, strict=False)
                    for record in records
                ]
                await self._replace(engine, records, changes, [record.vector for record in records])
                return len(ids), found.cursor

            return await self.operations.with_engine("", work)

        pages = Pager(page, self._waits)
        while await pages.next() is not None:
            pass

    async def _replace(
        self,
        engine: Engine,
        records: Sequence[Record],
        changes: Sequence[Mapping[str, Any]],
        vectors: Sequence[Sequence[float]],
    ) -> None:
        """Change points that were read, those that are still as they were then."""
        points = list[Point]()
        for record, change, vector in zip(records, changes, vectors, strict=True):
            payload = {**record.payload, **change, REVISION_KEY: new_revision()}
            points.append(Point(str(record.id), vector, payload, payload.pop("user_id")))
        if points:
            read = [str(record.payload[REVISION_KEY]) for record in records]
            await engine.apply(self.name, [Put(points, "update", Filter((AnyOf(REVISION_KEY, read),)))])

    # Reading

    def _document(self, record: Record, users: Sequence[str] | None = None) -> Document:
        """The document of a point, which must be of one of these users; None for whomever."""
        try:
            document = document_of(record)
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
            raise self._wrong(f"a point does not hold a document: {one_line(str(error))[:200]}") from error
        if users is not None and document.user_id not in users:
            raise self._wrong("the engine answered with a document of another user; nothing is shown")
        return document

    def _wrong(self, message: str) -> BackendError:
        engine = self.operations.place.engine
        return BackendError(f"{self._location}: {message}", backend=engine, operation="decode")

    async def _compiled(self, where: Where | None) -> Filter:
        """The filter of what is asked for; an index may have been added since the collection was opened."""
        opened = await self.open()
        try:
            return compile_filter(where, opened.settings.indexes)
        except ValidationError:
            self._opened = None
            return compile_filter(where, (await self.open()).settings.indexes)

    async def _find(self, ids: Sequence[str], where: Filter, *, vectors: bool = False) -> list[Record]:
        """The points with these ids that are there and match, in this order."""
        found: dict[str, Record] = {}
        for start in range(0, len(ids), PIECE):
            piece = ids[start : start + PIECE]

            async def read(engine: Engine, opened: OpenCollection, piece: Sequence[str] = piece) -> None:
                alive = opened.alive(where)
                for record in await engine.retrieve(self.name, piece, vector=vectors):
                    if str(record.id) not in piece:
                        raise self._wrong("the engine answered with another document; nothing is shown")
                    if matches(alive, record.payload):
                        found[str(record.id)] = record

            if start:
                await self._waits.pause()
            await self._drive("get_documents", read)
        return [found[point_id] for point_id in ids if point_id in found]

"""The handles of documents that callers use: each method is one line over documents/collections.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attuned.base.errors import short_id
from attuned.base.values import check_user_id
from attuned.connections.runtime import run
from attuned.documents.points import SHARED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from attuned.documents.collections import CollectionOperations
    from attuned.documents.filters import Where
    from attuned.documents.values import CollectionInfo, Document, DocumentMatch, UpsertReport
    from attuned.snapshots.archive import Progress


class _Handle:
    """Documents of a user, of all (None), or shared ones ("")."""

    def __init__(self, operations: CollectionOperations, user_id: str | None) -> None:
        self._operations = operations
        self._user_id: Any = user_id

    def __repr__(self) -> str:
        whose = {None: "of all users", SHARED: "shared"}.get(
            self._user_id
        ) or f"of {short_id(self._user_id)!r}"
        return f"<{type(self).__name__} {self._operations.name!r} {whose}>"


class DocumentSet(_Handle):
    """Documents to be read and deleted: those of all users, or, as UserDocuments, of one.

    ``where`` is JSON: fields with an index, or ``updated_at``, with a value (equal; of a list of keywords:
    holds it), a list (any of), None (absent) or a mapping of ``gt``, ``gte``, ``lt``, ``lte``, ``ne`` and
    ``text`` (words, all of them, in any case); all must hold, and under ``"or"`` one of a list of such
    mappings. Times are aware datetimes, their ISO 8601 texts, or milliseconds since 1970, UTC. Every method
    raises ValidationError, for a field without an index too, and BackendError.
    """

    def documents(
        self, where: Where | None = None, *, limit: int | None = 100, newest_first: bool = False
    ) -> list[Document]:
        """Those that match ``where``, at most ``limit`` of them (None: all).

        In no particular order, or by their times with ``newest_first``.
        """
        return run(self._operations.documents(self._user_id, where, limit=limit, newest_first=newest_first))

    def count(self, where: Where | None = None) -> int:
        """How many match ``where``."""
        return run(self._operations.count(self._user_id, where))

    def search(
        self,
        query: str | Sequence[float],
        where: Where | None = None,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
    ) -> list[DocumentMatch]:
        """Those most like a query, best first.

        ``query`` is a text, which is embedded, or a vector. Only what the same embedder has made is
        compared. At most ``limit``, which is 1 or more, that match ``where``, with a cosine of
        ``score_threshold`` or more. Raises ValidationError where there is no embedder, EmbeddingError.
        """
        return run(
            self._operations.search(self._user_id, query, where, limit=limit, score_threshold=score_threshold)
        )

    def delete_many(self, where: Where) -> int:
        """Remove those that match ``where``, all with {}; returns how many that were."""
        return run(self._operations.delete_many(self._user_id, where))


class UserDocuments(DocumentSet):
    """The documents of one user, or those that all share; it cannot be widened.

    ``where`` is told at DocumentSet.
    """

    def upsert(self, document: Document) -> None:
        """Write a document, in the place of one with the same id; embed its text where that is new.

        Raises EmbeddingError, and ValidationError for a field that is not of the kind of its index.
        """
        run(self._operations.upsert(self._user_id, document))

    def upsert_many(self, documents: Iterable[Document], *, progress: Progress | None = None) -> UpsertReport:
        """Write many documents; the report says what became of them, and which could not be embedded.

        A text that is there already, embedded by the same embedder, is not embedded again: what was
        interrupted is completed by doing it again. A list or tuple of ``documents`` is checked whole before
        the first write, any other iterable piece by piece. ``progress(done, total)`` is called after each
        piece, ``total`` None where it is unknown. Raises EmbeddingError where the embedder cannot be reached
        at all; an error carries in ``written`` how many had been written.
        """
        return run(self._operations.upsert_many(self._user_id, documents, progress))

    def get(self, id: str) -> Document | None:  # noqa: A002 - what it is called everywhere
        """The document of the user with this ``id``, else the shared one; None where there is neither."""
        return next(iter(run(self._operations.get_many(self._user_id, (id,))).values()), None)

    def get_many(self, ids: Iterable[str]) -> dict[str, Document]:
        """Those of the documents with these ``ids`` that there are, as ``get`` finds them, by id."""
        return run(self._operations.get_many(self._user_id, ids))

    def search(
        self,
        query: str | Sequence[float],
        where: Where | None = None,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
        shared: bool = False,
    ) -> list[DocumentMatch]:
        """As DocumentSet.search; with ``shared`` also among what all share.

        A shared document is left out where the user has one of the same id.
        """
        return run(
            self._operations.search(
                self._user_id, query, where, limit=limit, score_threshold=score_threshold, shared=shared
            )
        )

    def delete(self, id: str) -> bool:  # noqa: A002
        """Remove the document of the user with this ``id``; True if there was one."""
        return run(self._operations.delete(self._user_id, id))


class AsyncDocumentSet(_Handle):
    """DocumentSet, to be awaited."""

    async def documents(
        self, where: Where | None = None, *, limit: int | None = 100, newest_first: bool = False
    ) -> list[Document]:
        """See DocumentSet.documents."""
        return await self._operations.documents(self._user_id, where, limit=limit, newest_first=newest_first)

    async def count(self, where: Where | None = None) -> int:
        """See DocumentSet.count."""
        return await self._operations.count(self._user_id, where)

    async def search(
        self,
        query: str | Sequence[float],
        where: Where | None = None,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
    ) -> list[DocumentMatch]:
        """See DocumentSet.search."""
        return await self._operations.search(
            self._user_id, query, where, limit=limit, score_threshold=score_threshold
        )

    async def delete_many(self, where: Where) -> int:
        """See DocumentSet.delete_many."""
        return await self._operations.delete_many(self._user_id, where)


class AsyncUserDocuments(AsyncDocumentSet):
    """UserDocuments, to be awaited."""

    async def upsert(self, document: Document) -> None:
        """See UserDocuments.upsert."""
        await self._operations.upsert(self._user_id, document)

    async def upsert_many(
        self, documents: Iterable[Document], *, progress: Progress | None = None
    ) -> UpsertReport:
        """See UserDocuments.upsert_many."""
        return await self._operations.upsert_many(self._user_id, documents, progress)

    async def get(self, id: str) -> Document | None:  # noqa: A002
        """See UserDocuments.get."""
        return next(iter((await self._operations.get_many(self._user_id, (id,))).values()), None)

    async def get_many(self, ids: Iterable[str]) -> dict[str, Document]:
        """See UserDocuments.get_many."""
        return await self._operations.get_many(self._user_id, ids)

    async def search(
        self,
        query: str | Sequence[float],
        where: Where | None = None,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
        shared: bool = False,
    ) -> list[DocumentMatch]:
        """See UserDocuments.search."""
        return await self._operations.search(
            self._user_id, query, where, limit=limit, score_threshold=score_threshold, shared=shared
        )

    async def delete(self, id: str) -> bool:  # noqa: A002
        """See UserDocuments.delete."""
        return await self._operations.delete(self._user_id, id)


class _CollectionBase:
    """What both forms of a collection say of it without waiting for anything."""

    def __init__(self, operations: CollectionOperations) -> None:
        self._operations = operations

    @property
    def name(self) -> str:
        """The name of the collection."""
        return self._operations.name

    def __repr__(self) -> str:
        embedder = self._operations.embedder
        return f"<{type(self).__name__} {self.name!r}{'' if embedder is None else f', {embedder.name}'}>"


class Collection(_CollectionBase):
    """A collection of documents; ``store.collection`` gives one, which opens or makes it when first used.

    Documents are reached through a handle: of one user, of what all share, or, to be read and deleted, of
    all users.
    """

    def for_user(self, user_id: str) -> UserDocuments:
        """The documents of one user. Raises ValidationError for None or "" too."""
        return UserDocuments(self._operations, check_user_id(user_id))

    def shared(self) -> UserDocuments:
        """The documents that everybody may read."""
        return UserDocuments(self._operations, SHARED)

    def all_users(self) -> DocumentSet:
        """The documents of all users, and those that they share; ``document.user_id`` says whose one is."""
        return DocumentSet(self._operations, None)

    def refresh(self, *, progress: Progress | None = None) -> UpsertReport:
        """Embed anew what another embedder has made, which is not found until then.

        Writes only where the text is still the same. What was interrupted is completed by doing it again,
        and nothing is embedded twice. ``progress(done, total)`` is called after each piece. Raises
        ValidationError for a collection without an embedder, EmbeddingError as upsert_many, BackendError.
        """
        return run(self._operations.refresh(progress))

    def info(self) -> CollectionInfo:
        """How many documents there are, and what the collection was made with. Raises BackendError."""
        return run(self._operations.info())

    def drop(self) -> None:
        """Remove the collection with all documents of all users. Used again it is made anew, empty."""
        run(self._operations.drop())


class AsyncCollection(_CollectionBase):
    """Collection for asynchronous stores: its handles are awaited."""

    def for_user(self, user_id: str) -> AsyncUserDocuments:
        """See Collection.for_user."""
        return AsyncUserDocuments(self._operations, check_user_id(user_id))

    def shared(self) -> AsyncUserDocuments:
        """See Collection.shared."""
        return AsyncUserDocuments(self._operations, SHARED)

    def all_users(self) -> AsyncDocumentSet:
        """See Collection.all_users."""
        return AsyncDocumentSet(self._operations, None)

    async def refresh(self, *, progress: Progress | None = None) -> UpsertReport:
        """See Collection.refresh."""
        return await self._operations.refresh(progress)

    async def info(self) -> CollectionInfo:
        """See Collection.info."""
        return await self._operations.info()

    async def drop(self) -> None:
        """See Collection.drop."""
        await self._operations.drop()

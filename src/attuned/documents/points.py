"""Documents as points: what a point holds of one, and what a collection records of itself."""

from __future__ import annotations

import json
import secrets
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs

from attuned.base.codec import DOCUMENTS_NAMESPACE, make_uuid
from attuned.base.errors import SchemaMismatchError, ValidationError, type_name
from attuned.base.values import UNIX_EPOCH, wall_clock
from attuned.documents.filters import TIME_KEY, FieldKind, indexed_values
from attuned.documents.values import Document, fields_text, stored_document, text_hash
from attuned.engines.filters import Absent, Filter, Or, Range
from attuned.engines.waist import IndexKind, Point, Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DOCUMENTS_FORMAT = 1
SHARED = ""  # the user of what everybody may read
_EXPIRES_KEY, EMBEDDER_KEY, REVISION_KEY = "expires_at_unix_ms", "embedder", "revision"
OWN_INDEXES: Mapping[str, IndexKind] = {
    TIME_KEY: "integer",
    _EXPIRES_KEY: "integer",
    EMBEDDER_KEY: "keyword",
}
NO_VECTOR = (1.0,)  # of a document in a collection without an embedder, as every point has one


def document_point_id(user_id: str, document_id: str) -> str:
    """The id of a document's point. As it counts the characters of one id, no two pairs are joined alike."""
    return make_uuid(DOCUMENTS_NAMESPACE, f"{len(user_id)}:{user_id}{document_id}")


@attrs.frozen
class CollectionSettings:
    """What a collection was made with, as its metadata records it."""

    indexes: Mapping[str, FieldKind]
    embedder: str | None
    vector_size: int
    ttl: float | None
    pending: Sequence[str] = ()  # indexes that documents written before may lack

    def metadata(self) -> dict[str, Any]:
        """See CollectionSpec."""
        recorded = attrs.asdict(self, recurse=False)
        return {"format_version": DOCUMENTS_FORMAT, "kind": "documents", **recorded}

    @classmethod
    def of(cls, metadata: Mapping[str, Any], place: str) -> CollectionSettings:
        """What metadata records, or SchemaMismatchError."""
        version = metadata.get("format_version")
        if metadata.get("kind") != "documents" or not isinstance(version, int):
            raise SchemaMismatchError(f"{place} does not hold documents; choose another name")
        if version > DOCUMENTS_FORMAT:
            raise SchemaMismatchError(
                f"{place} has format {version}; this version reads up to {DOCUMENTS_FORMAT}: "
                "upgrade attuned-store"
            )
        return cls(
            dict(metadata["indexes"]),
            metadata.get("embedder"),
            metadata["vector_size"],
            metadata.get("ttl"),
            tuple(metadata.get("pending") or ()),
        )


class OutdatedError(Exception):
    """A collection was amended in this process since it was opened: it is opened again."""


class OpenCollection(NamedTuple):
    """A collection as it was found when it was opened."""

    settings: CollectionSettings
    amendments: int  # of its engine then

    def alive(self, where: Filter) -> Filter:
        """Those that match a filter and have not expired."""
        now, ttl = wall_clock.now_ms(), self.settings.ttl
        if ttl is None:
            return where._replace(must_not=(*where.must_not, Range(_EXPIRES_KEY, lte=now)))
        lasting = Filter((Range(_EXPIRES_KEY, gt=now),))
        young = Filter((Range(TIME_KEY, gt=now - round(ttl * 1000)), Absent(_EXPIRES_KEY)))
        return where._replace(must=(*where.must, Or([lasting, young])))

    def expired(self) -> Filter:
        """Those that have."""
        now, ttl = wall_clock.now_ms(), self.settings.ttl
        ended = Filter((Range(_EXPIRES_KEY, lte=now),))
        if ttl is None:
            return ended
        old = Filter((Range(TIME_KEY, lte=now - round(ttl * 1000)), Absent(_EXPIRES_KEY)))
        return Filter((Or([ended, old]),))


class Draft(NamedTuple):
    """A document to be written, and what its point holds of it."""

    document: Document
    payload: dict[str, Any]

    @classmethod
    def of(cls, document: object, settings: CollectionSettings, embedder: str | None) -> Draft:
        """What is written of a document that a caller gave; raises ValidationError."""
        if not isinstance(document, Document):
            raise ValidationError(f"documents: a Document is needed, got {type_name(document)}")
        payload: dict[str, Any] = {
            "id": document.id,
            "text": document.text,
            "hash": text_hash(document.text),
            "fields": fields_text(document.fields),
            TIME_KEY: document.updated_at_unix_ms,
            **indexed_values(document.fields, settings.indexes),
        }
        if document.ttl is not None:
            payload["ttl_ms"] = round(document.ttl * 1000)
            payload[_EXPIRES_KEY] = payload[TIME_KEY] + payload["ttl_ms"]
        if embedder is not None:
            payload[EMBEDDER_KEY] = embedder
        return cls(document, payload)

    def has_text_of(self, found: Mapping[str, Any]) -> bool:
        """Whether a point holds the same text, with a vector of the same embedder."""
        return all(self.payload.get(name) == found.get(name) for name in ("hash", EMBEDDER_KEY))

    def is_kept_in(self, found: Mapping[str, Any], ttl: float | None) -> bool:
        """Whether a point holds all of it; a time that was not given counts only where it prolongs a life."""
        ignored = {REVISION_KEY, "user_id"}
        if not self.document._dated and ttl is None and self.document.ttl is None:
            ignored.add(TIME_KEY)
        names = (self.payload.keys() | found.keys()) - ignored
        return all(self.payload.get(name) == found.get(name) for name in names)

    def point(self, user_id: str, vector: Sequence[float]) -> Point:
        """The point of it."""
        payload = {**self.payload, REVISION_KEY: new_revision()}
        return Point(document_point_id(user_id, self.document.id), vector, payload, user_id)


def new_revision() -> str:
    """What tells whether a point is still the one that was read."""
    return secrets.token_hex(8)


def document_of(record: Record) -> Document:
    """The document that a point holds, with whose it is; LookupError, TypeError or ValueError for none."""
    payload = record.payload
    user_id, document_id, ttl = payload["user_id"], payload["id"], payload.get("ttl_ms")
    if str(record.id) != document_point_id(user_id, document_id):
        raise ValueError("it has the id of another one")
    return stored_document(
        document_id,
        payload["text"],
        json.loads(payload["fields"]),
        UNIX_EPOCH + timedelta(milliseconds=payload[TIME_KEY]),
        None if ttl is None else ttl / 1000,
        user_id,
    )

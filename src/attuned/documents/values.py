"""The values of documents: what is kept, what is found, and what became of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import attrs

from attuned.base.config import check_positive
from attuned.base.errors import ValidationError, brief, short_id, type_name
from attuned.base.values import UNIX_EPOCH, check_time_ms, check_user_id, iso_time, wall_clock

if TYPE_CHECKING:
    from attuned.base.errors import StoreError

MAX_TEXT_BYTES = 1 << 20
MAX_FIELDS_BYTES = 64 << 10
_MAX_NESTING = 32  # of nested fields
# What a subclass, such as an enum, says of itself is not kept.
_PLAIN_FORMS: tuple[tuple[type, Any], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)
_NO_JSON = (math.inf, -math.inf)
_SHOWN_TEXT = 40  # of a text in a repr
_MAX_TTL_S = 1e10  # some three centuries


def check_ttl(ttl: object) -> float | None:
    """For how many seconds documents are kept, in whole milliseconds; None for ever."""
    if ttl is None:
        return None
    check_positive("ttl", ttl)
    milliseconds = round(float(cast("float", ttl)) * 1000)
    if not 1 <= milliseconds <= _MAX_TTL_S * 1000:
        raise ValidationError(f"ttl: from 0.001 to {_MAX_TTL_S:.0f} seconds are needed, got {brief(ttl)}")
    return milliseconds / 1000


def _check_document_text(text: object) -> str:
    if not isinstance(text, str):
        raise ValidationError(f"text: a string is needed, got {type_name(text)}")
    text = str.__str__(text)
    if len(text) > MAX_TEXT_BYTES // 4 or not text.isascii():
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise ValidationError("text: a lone surrogate is not valid text") from None
        if size > MAX_TEXT_BYTES:
            raise ValidationError(f"text: at most {MAX_TEXT_BYTES:,} bytes of UTF-8, got {size:,}")
    return text


def _check_fields(fields: object) -> Mapping[str, Any]:
    """Fields as plain JSON that shares nothing with what was given."""
    if not isinstance(fields, Mapping):
        raise ValidationError(f"fields: a mapping from name to value is needed, got {type_name(fields)}")
    plain = _plain(cast("Any", fields), "fields", 0)
    try:
        size = len(fields_text(plain).encode())
    except UnicodeEncodeError:
        raise ValidationError("fields: a lone surrogate is not valid text") from None
    if size > MAX_FIELDS_BYTES:
        raise ValidationError(f"fields: at most {MAX_FIELDS_BYTES:,} bytes of JSON, got {size:,}")
    return MappingProxyType(plain)


def _plain(value: Any, place: str, depth: int) -> Any:
    """JSON made of plain types alone; a datetime becomes its text in ISO 8601."""
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in _PLAIN_FORMS:
        if isinstance(value, kind) and value not in _NO_JSON and value == value:  # noqa: PLR0124 - NaN is not
            return plain(value)
    if isinstance(value, datetime):
        check_time_ms(value, place)
        return value.isoformat()
    if isinstance(value, Mapping) and depth < _MAX_NESTING:
        return {
            _plain_name(name, place): _plain(each, f"{place}[{name!r}]", depth + 1)
            for name, each in cast("Any", value).items()
        }
    if isinstance(value, list | tuple) and depth < _MAX_NESTING:
        return [_plain(each, place, depth + 1) for each in cast("Any", value)]
    raise ValidationError(
        f"{place}: JSON is needed (None, bools, numbers but NaN and infinity, strings, datetimes, lists and "
        f"mappings, nested up to {_MAX_NESTING} deep), got {brief(cast('Any', value))}"
    )


def _plain_name(name: object, place: str) -> str:
    if isinstance(name, str):
        return str.__str__(name)
    raise ValidationError(f"{place}: names are strings, got {brief(name)}")


def fields_text(fields: Mapping[str, Any]) -> str:
    """Fields as they are kept: JSON, in the order in which they were given."""
    try:
        return json.dumps(dict(fields), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:  # an integer with more digits than Python writes
        raise ValidationError(f"fields: {error}") from None


@attrs.frozen(init=False)
class Document:
    """A text of a user, with fields to filter by.

    ``id`` is the user's own name for it, 1 to 256 bytes; ``text`` what is embedded, at most 1 MiB;
    ``fields`` JSON, at most 64 KiB, which comes back as it was given (a datetime as its ISO 8601 text, a
    tuple as a list); ``updated_at`` an aware datetime or milliseconds since 1970, by default now, kept in
    whole milliseconds, UTC; ``ttl`` for how many seconds from then it is kept, None as long as its collection
    says. ``user_id`` is whose it is, once it has been read: "" of what everybody may read. Raises
    ValidationError.

    >>> Document("t-17", "Bought the breakout", {"symbol": "NQ", "won": True}).fields["symbol"]
    'NQ'
    """

    id: str
    text: str
    fields: Mapping[str, Any] = attrs.field(hash=False)
    updated_at: datetime
    ttl: float | None
    user_id: str | None = attrs.field(eq=False)
    _dated: bool = attrs.field(eq=False)  # its time was given

    def __init__(
        self,
        id: str,  # noqa: A002 - what it is called everywhere
        text: str = "",
        fields: Mapping[str, Any] = MappingProxyType({}),
        updated_at: int | datetime | None = None,
        ttl: float | None = None,
    ) -> None:
        time_ms = wall_clock.now_ms() if updated_at is None else check_time_ms(updated_at, "updated_at")
        cast("Any", self).__attrs_init__(
            check_user_id(id, "id"),
            _check_document_text(text),
            _check_fields(fields),
            UNIX_EPOCH + timedelta(milliseconds=time_ms),
            check_ttl(ttl),
            None,
            updated_at is not None,
        )

    @property
    def updated_at_unix_ms(self) -> int:
        """The time in milliseconds since 1970, UTC."""
        return (self.updated_at - UNIX_EPOCH) // timedelta(milliseconds=1)

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN_TEXT else self.text[:_SHOWN_TEXT] + "…"
        whose = {None: "", "": ", shared"}.get(self.user_id, f", user {short_id(self.user_id or '')!r}")
        return (
            f"Document({self.id!r}, {text!r}, {brief(dict(self.fields))}, {iso_time(self.updated_at)}{whose})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (
            self.id,
            self.text,
            dict(self.fields),
            self.updated_at,
            self.ttl,
            self.user_id,
            self._dated,
        )
        return stored_document, arguments

    def __copy__(self) -> Document:
        return self

    def __deepcopy__(self, memo: object) -> Document:
        return self


def stored_document(  # noqa: PLR0917 - the fields of a document
    id: str,  # noqa: A002
    text: str,
    fields: dict[str, Any],
    updated_at: datetime,
    ttl: float | None,
    user_id: str | None,
    dated: bool = True,  # noqa: FBT001, FBT002 - as pickle hands it on
) -> Document:
    """A document that is read back, which was checked when it was made."""
    document = object.__new__(Document)
    cast("Any", document).__attrs_init__(id, text, MappingProxyType(fields), updated_at, ttl, user_id, dated)
    return document


def text_hash(text: str) -> str:
    """What tells whether a text is still the same: 128 bits of BLAKE2b."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@attrs.frozen
class DocumentMatch:
    """A result of a search: the document and its cosine similarity to the query, from -1 to 1."""

    document: Document
    score: float


@attrs.frozen(kw_only=True)
class UpsertReport:
    """What became of documents that were written; each counts in one place.

    ``embedded``: written with a new embedding, or, in a collection without an embedder, as a new text;
    ``moved``: the text was the same, its fields or time were not; ``unchanged``: nothing was to be done;
    ``failed``: the errors of those that were not written, by id.
    """

    embedded: int = 0
    moved: int = 0
    unchanged: int = 0
    failed: Mapping[str, StoreError] = attrs.field(factory=dict[str, "StoreError"])


@attrs.frozen(kw_only=True)
class CollectionInfo:
    """What a store says of one of its collections.

    ``documents`` is how many there are, of all users, expired ones that are not yet removed included;
    ``indexes`` the fields that are filtered by; ``embedder`` the name of what its texts were embedded with
    and ``dimensions`` how long its vectors are, None without one.
    """

    name: str
    documents: int
    indexes: Mapping[str, str]
    embedder: str | None
    dimensions: int | None
    ttl: float | None


@attrs.frozen(kw_only=True)
class ErasureReport:
    """What a store held of a user, and holds no more.

    ``states``: whether there were any; ``documents``: how many in each collection that had some.
    """

    states: bool
    documents: Mapping[str, int]

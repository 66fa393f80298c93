"""Collections of documents in both forms, for tests that are written once, with await."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import attuned_store
from attuned_store import Collection, Document, DocumentSet, Embedder, StateStore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from conformance import Awaited

    from attuned_store import AsyncStateStore

INDEXES: dict[str, Any] = {
    "symbol": "keyword",
    "size": "integer",
    "gain": "float",
    "won": "bool",
    "closed_at": "datetime",
    "note": "text",
}
DIMENSIONS = 16


class Words:
    """An embedder by hashing that tells which texts it was given, and fails for those that say so."""

    def __init__(self, name: str = "words") -> None:
        self.given: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.meanwhile: Any = lambda: None  # called while it embeds
        self._hashing = attuned_store.HashingEmbedder(DIMENSIONS)
        self.embedder = Embedder(
            self.embed,
            name=name,
            dimensions=DIMENSIONS,
            batch_size=8,
            retry=attuned_store.RetryPolicy(attempts=2, base_s=0),
        )

    def embed(self, texts: Sequence[str]) -> Any:
        self.meanwhile()
        for text in texts:
            if error := self.fails.get(text):
                raise error
        self.given += texts
        return self._hashing.embed(list(texts))


class _Awaited:
    """A synchronous collection or handle whose methods are awaited."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._handle, name)
        if name in ("for_user", "shared", "all_users"):
            return lambda *arguments: _Awaited(found(*arguments))
        if not callable(found):
            return found

        async def call(*arguments: Any, **options: Any) -> Any:
            return found(*arguments, **options)

        return call


async def collection_of(
    store: AsyncStateStore | Awaited, name: str = "trades", *arguments: Any, **options: Any
) -> Any:
    """A collection of a store of either form, to be awaited."""
    made: Any = store.collection(name, *arguments, **options)
    return _Awaited(await made) if hasattr(made, "__await__") else made


def plain(store: StateStore, name: str = "trades", **options: Any) -> Collection:
    return store.collection(name, **options)


def ids(found: Sequence[Any]) -> list[str]:
    """The ids of documents or matches."""
    return [getattr(each, "document", each).id for each in found]


# ------------------------------------------------------------------------------
# What a filter means: the predicate that every engine is held to
# ------------------------------------------------------------------------------


def meets(fields: Mapping[str, Any], where: Mapping[str, Any], indexes: Mapping[str, str] = INDEXES) -> bool:
    """Whether the fields of a document match a filter."""
    return all(
        any(meets(fields, branch) for branch in asked)
        if name == "or"
        else _meets(indexes[name], fields.get(name), asked)
        for name, asked in where.items()
    )


def _meets(kind: str, value: Any, asked: Any) -> bool:
    absent = value is None or value == []
    if asked is None:
        return absent
    if isinstance(asked, dict):
        return all(_compares(kind, value, operator, operand) for operator, operand in asked.items())
    if isinstance(asked, list):
        return any(_equal(kind, value, each) for each in asked)
    return _equal(kind, value, asked)


def _compares(kind: str, value: Any, operator: str, operand: Any) -> bool:
    if operator == "ne":
        return not _meets(kind, value, operand)
    if value is None:
        return False
    if operator == "text":
        wanted = {word.lower() for word in re.findall(r"[^\W_]+", operand)}
        return bool(wanted) and wanted <= {word.lower() for word in re.findall(r"[^\W_]+", value)}
    left, right = _number(kind, value), _number(kind, operand)
    return {"gt": left > right, "gte": left >= right, "lt": left < right, "lte": left <= right}[operator]


def _equal(kind: str, value: Any, wanted: Any) -> bool:
    if value is None:
        return False
    if kind == "keyword":
        return wanted in (value if isinstance(value, list) else [value])
    return _number(kind, value) == _number(kind, wanted)


def _number(kind: str, value: Any) -> float:
    if kind == "datetime":
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        return (moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1000 // 1
    return float(f"{value:.15g}") if kind == "float" else value


__all__ = [
    "DIMENSIONS",
    "INDEXES",
    "Document",
    "DocumentSet",
    "Words",
    "collection_of",
    "ids",
    "meets",
    "plain",
]

"""What engines over qdrant-client ask alike, in its models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attuned.base.errors import MissingDependencyError
from attuned.engines.filters import Absent, AnyOf, Condition, Equal, Filter, Or, Range, Text, words
from attuned.engines.waist import Page, Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def import_qdrant_client() -> Any:
    """The package qdrant_client, or MissingDependencyError."""
    try:
        import qdrant_client
    except ImportError as error:
        raise MissingDependencyError(
            "a Qdrant server needs qdrant-client: pip install qdrant-client"
        ) from error
    return qdrant_client


_NOTHING = Filter((Or(()),))


class ClientModels:
    """Filters and requests in the models of qdrant-client, and records out of them."""

    def __init__(self, models: Any) -> None:
        self.models = models

    def vectors(self, size: int) -> Any:
        """The parameters of a new collection's vectors."""
        return self.models.VectorParams(size=size, distance=self.models.Distance.COSINE)

    def filter(self, where: Filter, listed: int | None = None) -> Any:
        """A filter, which may be empty; no condition of which lists more values than ``listed``."""
        if any(condition in where.must for condition in where.must_not):
            where = _NOTHING  # a server takes both on one index for the first alone
        must, must_not = ([self._condition(each, listed) for each in conditions] for conditions in where)
        return self.models.Filter(must=must, must_not=must_not)

    def _condition(self, condition: Condition, listed: int | None) -> Any:
        models = self.models
        match condition:
            case AnyOf(key, values) if listed is not None and len(values) > listed:
                pieces = (values[start : start + listed] for start in range(0, len(values), listed))
                return models.Filter(should=[self._condition(AnyOf(key, each), None) for each in pieces])
            case Equal(key, value):
                asked = {"match": models.MatchValue(value=value)}
            case AnyOf(key, values):
                asked = {"match": models.MatchAny(any=list(values))}
            case Range(key):
                asked = {"range": models.Range(**condition.bounds())}
            case Text(_, text) if not words(text):  # which a server finds everywhere
                return models.HasIdCondition(has_id=[])
            case Text(key, text):
                asked = {"match": models.MatchText(text=text)}
            case Absent(key):
                return models.IsEmptyCondition(is_empty=models.PayloadField(key=key))
            case Or(()):  # an empty "should" would match everything
                return models.HasIdCondition(has_id=[])
            case Or(filters):
                return models.Filter(should=[self.filter(each, listed) for each in filters])
        return models.FieldCondition(key=key, **asked)

    def page(
        self, narrowed: Any, limit: int, cursor: Any, newest_by: str | None, *, payload: bool
    ) -> dict[str, Any]:
        """The arguments of scroll() for Engine.page."""
        order = newest_by and self.models.OrderBy(key=newest_by, direction=self.models.Direction.DESC)
        return {
            "scroll_filter": narrowed,
            "limit": limit,
            "offset": cursor,
            "order_by": order,
            "with_payload": payload or (False if newest_by is None else [newest_by]),
        }

    def search(self, vector: Sequence[float], narrowed: Any, limit: int, *, payload: bool) -> dict[str, Any]:
        """The arguments of query_points() for Engine.search."""
        return {
            "query": list(vector),
            "query_filter": narrowed,
            "limit": limit,
            "with_payload": payload,
        }


def client_records(found: Iterable[Any]) -> list[Record]:
    """What a client has found, searched for or not."""
    return [
        Record(str(each.id), each.payload or {}, getattr(each, "score", 0.0), each.vector or ())
        for each in found
    ]


def client_page(found: tuple[Iterable[Any], Any]) -> Page:
    """What scroll() has found."""
    records, following = found
    return Page(client_records(records), following)

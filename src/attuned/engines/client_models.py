"""Neutral filters in the models of qdrant-client."""

from __future__ import annotations

from typing import Any

from attuned.base.errors import MissingDependencyError
from attuned.engines.waist import Absent, AnyOf, Condition, Equal, Filter, Range, Text


def client_filter(models: Any, where: Filter) -> Any:
    """A filter in the models of qdrant-client."""
    must, must_not = ([_client_condition(models, each) for each in conditions] for conditions in where)
    return models.Filter(must=must, must_not=must_not)


def _client_condition(models: Any, condition: Condition) -> Any:
    match condition:
        case Equal(key, value):
            return models.FieldCondition(key=key, match=models.MatchValue(value=value))
        case AnyOf(key, values):
            return models.FieldCondition(key=key, match=models.MatchAny(any=list(values)))
        case Range(key, least, most):
            return models.FieldCondition(key=key, range=models.Range(gte=least, lte=most))
        case Text(key, words):
            return models.FieldCondition(key=key, match=models.MatchText(text=words))
        case Absent(key):
            return models.IsEmptyCondition(is_empty=models.PayloadField(key=key))


def import_qdrant_client() -> Any:
    try:
        import qdrant_client
    except ImportError as error:
        raise MissingDependencyError(
            "a Qdrant server needs qdrant-client: pip install qdrant-client"
        ) from error
    return qdrant_client

"""Filters of points, and what they mean: the same on every engine."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A condition looks at one key at the top of a payload, a name without dots and brackets. A value that is a
# list meets it when one of its elements does. Where the key has an index, its values are of that kind.


class Equal(NamedTuple):
    """The value is this string or integer; neither a bool, which is kept as 0 or 1, nor a float."""

    key: str
    value: str | int


class AnyOf(NamedTuple):
    """The value is one of these strings or integers; of none, nothing matches."""

    key: str
    values: Sequence[str] | Sequence[int]


class Range(NamedTuple):
    """The value is a number within these bounds, compared as a double."""

    key: str
    gte: float | None = None
    lte: float | None = None
    gt: float | None = None
    lt: float | None = None

    def bounds(self) -> dict[str, float | None]:
        """The bounds by name, the stricter of two on a side: the indexes of Qdrant heed but one of them."""
        gte, lte, gt, lt = self[1:]
        if gte is not None and gt is not None:
            gte, gt = (None, gt) if gt >= gte else (gte, None)
        if lte is not None and lt is not None:
            lte, lt = (None, lt) if lt <= lte else (lte, None)
        return {"gte": gte, "lte": lte, "gt": gt, "lt": lt}


class Text(NamedTuple):
    """The value is one text with all of these words, in any order and case; without a word, nothing matches.

    In a list of texts engines look for the words in one of them, or, with an index, in all of them together.
    """

    key: str
    words: str


class Absent(NamedTuple):
    """There is no value: the key is missing, or holds None or an empty list."""

    key: str


class Or(NamedTuple):
    """At least one of these filters matches, none of which holds an Or; of none, nothing matches."""

    filters: Sequence[Filter]


Condition: TypeAlias = "Equal | AnyOf | Range | Text | Absent | Or"


class Filter(NamedTuple):
    """All of some conditions, and none of others; without any, everything matches."""

    must: tuple[Condition, ...] = ()
    must_not: tuple[Condition, ...] = ()


def matches(where: Filter, payload: Mapping[str, Any]) -> bool:
    """Whether a payload matches a filter; this is what engines are held to."""
    for condition in where.must:
        if not _holds(condition, payload):
            return False
    return not any(_holds(condition, payload) for condition in where.must_not)


def _holds(condition: Condition, payload: Mapping[str, Any]) -> bool:
    if isinstance(condition, Or):
        return any(matches(each, payload) for each in condition.filters)
    value: Any = payload.get(condition.key)
    if isinstance(condition, Absent):
        return value is None or value == []
    values: Sequence[Any] = cast("Sequence[Any]", value) if isinstance(value, list) else (value,)
    match condition:
        case Equal(_, wanted):
            return any(each == wanted and type(each) not in (bool, float) for each in values)
        case AnyOf(_, wanted):
            return any(each in wanted and type(each) not in (bool, float) for each in values)
        case Range():
            return any(type(each) in (int, float) and _within(condition, float(each)) for each in values)
        case Text(_, text):
            sought = words(text)
            return bool(sought) and any(isinstance(each, str) and sought <= words(each) for each in values)


def _within(bounds: Range, number: float) -> bool:
    return (
        (bounds.gte is None or number >= bounds.gte)
        and (bounds.lte is None or number <= bounds.lte)
        and (bounds.gt is None or number > bounds.gt)
        and (bounds.lt is None or number < bounds.lt)
    )


@functools.lru_cache(1_024)
def words(text: str) -> frozenset[str]:
    """The words of a text: its runs of letters and digits, in lower case."""
    return frozenset(word.lower() for word in re.findall(r"[^\W_]+", text))

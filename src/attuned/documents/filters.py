"""Filters of documents as callers write them, and the values of fields that they compare.

A field with an index is kept beside the text of all fields, in the form that engines compare: a bool as 0
or 1, a datetime as milliseconds, a float with the 15 digits that every engine reads alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from attuned.base.errors import ValidationError, brief, type_name
from attuned.base.values import check_integer, check_number, check_time_ms
from attuned.engines.filters import Absent, AnyOf, Condition, Equal, Filter, Or, Range, Text

if TYPE_CHECKING:
    from attuned.engines.waist import IndexKind

FieldKind = Literal["keyword", "integer", "float", "bool", "datetime", "text"]
Where: TypeAlias = Mapping[str, Any]

_FIELD_KINDS = get_args(FieldKind)
_BENEATH: Mapping[str, IndexKind] = {"bool": "integer", "datetime": "integer"}
_INDEX_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_RESERVED = {
    "user_id": "documents are reached by their user alone, with for_user",
    "updated_at": "the time of a document always has one",
    "or": "it is a word of filters",
}
_MAX_INDEXES = 64
_EXACT = 2**53  # integers up to it are compared as doubles without loss
_LARGEST = 1e290  # of floats
_BOUNDS = ("gt", "gte", "lt", "lte")
TIME_KEY = "updated_at_unix_ms"


def key_of(field: str) -> str:
    """Where the payload of a point holds the value of an indexed field."""
    return TIME_KEY if field == "updated_at" else f"field_{field}"


def check_indexes(indexes: object) -> dict[str, FieldKind]:
    """The fields to be indexed, with their kinds, as a caller gives them."""
    if not isinstance(indexes, Mapping):
        raise ValidationError(
            f"indexes: a mapping from field to kind is needed, such as {{'symbol': 'keyword'}}; "
            f"got {type_name(indexes)}"
        )
    found = dict(cast("Any", indexes))
    for name, kind in found.items():
        if not (isinstance(name, str) and _INDEX_NAME.fullmatch(name)):
            raise ValidationError(
                f"indexes: a name is 1 to 64 letters, digits, _ and -, with a letter or _ in front; "
                f"got {brief(name)}"
            )
        if name in _RESERVED:
            raise ValidationError(f"indexes: {name!r} cannot be one: {_RESERVED[name]}")
        if not (isinstance(kind, str) and kind in _FIELD_KINDS):
            raise ValidationError(
                f"indexes: {name}: one of {', '.join(_FIELD_KINDS)} is needed, got {brief(kind)}"
            )
    if len(found) > _MAX_INDEXES:
        raise ValidationError(f"indexes: at most {_MAX_INDEXES}, got {len(found)}")
    return {str.__str__(name): str.__str__(kind) for name, kind in found.items()}  # type: ignore[misc]


def engine_indexes(indexes: Mapping[str, FieldKind]) -> dict[str, IndexKind]:
    """The indexes of an engine for those of a collection."""
    return {key_of(name): _BENEATH.get(kind, cast("IndexKind", kind)) for name, kind in indexes.items()}


def indexed_values(
    fields: Mapping[str, Any], indexes: Mapping[str, FieldKind], *, strict: bool = True
) -> dict[str, Any]:
    """What the payload of a point holds of a document's fields for its indexes; None and [] are absent.

    Raises ValidationError for a value that is not of the kind of its index, which else is left out.
    """
    values: dict[str, Any] = {}
    for name, kind in indexes.items():
        value = fields.get(name)
        if value is None or value == []:
            continue
        place = f"fields[{name!r}]"
        try:
            if kind == "keyword" and isinstance(value, list):
                values[key_of(name)] = [_native(place, kind, each) for each in cast("Any", value)]
            else:
                values[key_of(name)] = _native(place, kind, value)
        except ValidationError:
            if strict:
                raise
    return values


def _native(field: str, kind: FieldKind, value: Any) -> str | int | float:
    """A value in the form in which engines compare it."""
    if isinstance(value, str) and kind in ("keyword", "text"):
        return str.__str__(value)
    if isinstance(value, bool) and kind == "bool":
        return int(value)
    if kind == "integer":
        return check_integer(field, value, -_EXACT, _EXACT)
    if kind == "float" and abs(number := check_number(field, value)) <= _LARGEST:
        return 0.0 if abs(number) < 1 / _LARGEST else float(f"{number:.15g}")
    if kind == "datetime":
        return _milliseconds(field, value)
    words = {"keyword": "a string", "text": "a string", "bool": "True or False"}
    wanted = words.get(kind, f"a number from -{_LARGEST} to {_LARGEST}")
    raise ValidationError(f"{field}: {wanted} is needed ({kind}), got {brief(value)}")


def _milliseconds(field: str, value: object) -> int:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValidationError(
                f"{field}: an aware datetime, its ISO 8601 text or milliseconds since 1970 are needed "
                f"(datetime), got {brief(value)}"
            ) from None
    return check_time_ms(value, field)


def compile_filter(where: Where | None, indexes: Mapping[str, FieldKind]) -> Filter:
    """The filter of an engine for what a caller asks for, as told at DocumentSet. Raises ValidationError."""
    known: dict[str, FieldKind] = {**indexes, "updated_at": "datetime"}
    return _Conditions(known, "where").add_all(where)


class _Conditions:
    """Conditions that must hold, and that must not, gathered of what is asked of fields."""

    def __init__(self, known: Mapping[str, FieldKind], place: str) -> None:
        self._known = known
        self._place = place
        self._must: list[Condition] = []
        self._must_not: list[Condition] = []

    def add_all(self, where: object) -> Filter:
        """The filter of a mapping; one that stands under "or" holds no other."""
        if where is not None and not isinstance(where, Mapping):
            raise ValidationError(
                f"{self._place}: a mapping from field to value is needed, such as {{'symbol': 'NQ'}}; "
                f"got {type_name(where)}"
            )
        for field, asked in cast("Any", where or {}).items():
            if field != "or":
                self._add(field, asked)
            elif self._place != "where":
                raise ValidationError("where: 'or' stands at the top alone, not within another one")
            elif isinstance(asked, str) or not isinstance(asked, Sequence):
                raise ValidationError(f"where: 'or' takes a list of mappings, got {type_name(asked)}")
            else:
                branches = cast("Any", asked)
                self._must.append(
                    Or([_Conditions(self._known, "where['or']").add_all(each) for each in branches])
                )
        return Filter(tuple(self._must), tuple(self._must_not))

    def _add(self, field: object, asked: Any) -> None:
        if not isinstance(field, str) or field not in self._known:
            raise _unknown_field(field, self._known)
        kind, key, place = self._known[field], key_of(field), f"{self._place}[{field!r}]"
        if asked is None:
            self._must.append(Absent(key))
        elif isinstance(asked, Mapping):
            self._add_operators(key, kind, place, cast("Any", asked))
        elif isinstance(asked, list | tuple | set | frozenset):
            values = cast("Any", asked)
            self._must.append(_any_of(key, kind, [_comparable(place, kind, each) for each in values]))
        else:
            self._must.append(_equal(key, kind, _comparable(place, kind, asked)))

    def _add_operators(self, key: str, kind: FieldKind, place: str, asked: Mapping[Any, Any]) -> None:
        bounds: dict[str, float] = {}
        for word, operand in asked.items():
            if word == "ne":
                unwanted = (
                    _equal(key, kind, _comparable(place, kind, operand)) if operand is not None else None
                )
                self._must_not.append(unwanted or Absent(key))
            elif word == "text" and kind == "text":
                if not isinstance(operand, str):
                    raise ValidationError(f"{place}: text: a string is needed, got {brief(operand)}")
                self._must.append(Text(key, str.__str__(operand)))
            elif word in _BOUNDS and kind in ("integer", "float", "datetime"):
                bounds[word] = _bound(place, kind, operand)
            elif word in (*_BOUNDS, "text"):
                needed = "a text" if word == "text" else "an integer, float or datetime"
                raise ValidationError(f"{place}: {word} needs {needed} index, this one is a {kind}")
            else:
                raise _operator_error(place, brief(word))
        if bounds:
            self._must.append(_range(key, kind, **bounds))
        if not asked:
            raise _operator_error(place, "none")


def _operator_error(place: str, got: str) -> ValidationError:
    return ValidationError(f"{place}: gt, gte, lt, lte, ne or text are needed, got {got}")


def _bound(place: str, kind: FieldKind, value: object) -> float:
    if kind == "integer" and isinstance(value, float) and math.isfinite(value):
        return float(value)  # between two integers, say
    return cast("float", _native(place, kind, value))


def _comparable(place: str, kind: FieldKind, value: object) -> Any:
    if kind == "text":
        raise ValidationError(f"{place}: a text index is searched for words: {{'text': ...}}, or None")
    if isinstance(value, float) and kind == "integer" and value.is_integer():
        value = int(value)
    return _native(place, kind, value)


def _equal(key: str, kind: FieldKind, value: Any) -> Condition:
    return _range(key, kind, gte=value, lte=value) if kind == "float" else Equal(key, value)


def _any_of(key: str, kind: FieldKind, values: Sequence[Any]) -> Condition:
    if kind == "float":
        return Or([Filter((_equal(key, kind, value),)) for value in values])
    return AnyOf(key, values)


def _range(key: str, kind: FieldKind, **bounds: float) -> Range:
    """A range; one of floats allows for the last bits that an engine may change.

    Two numbers of 15 digits are further apart than that, so that nothing else is let in or kept out.
    """
    if kind == "float":
        for operator, outward in (("gte", -math.inf), ("lt", -math.inf), ("lte", math.inf), ("gt", math.inf)):
            if operator in bounds:
                bounds[operator] = math.nextafter(math.nextafter(bounds[operator], outward), outward)
    return Range(key, **bounds)


def _unknown_field(field: object, known: Mapping[str, FieldKind]) -> ValidationError:
    import difflib

    near = difflib.get_close_matches(field, known, 1) if isinstance(field, str) else []
    hint = f", did you mean {near[0]!r}?" if near else ";"
    names = ", ".join(sorted(known))
    return ValidationError(
        f"where: {brief(field)} is not among the indexes{hint} the collection has {names}; "
        "add it with indexes= when the collection is opened"
    )

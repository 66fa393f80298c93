"""Tables as states, and states as a table: a row becomes a state, or it is told what is wrong with it."""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import math
import numbers
import operator
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast, get_args

import attrs

from attuned.base.config import check_flag
from attuned.base.errors import (
    MissingDependencyError,
    ValidationError,
    brief,
    nearest,
    plural,
    type_name,
)
from attuned.base.values import (
    UNIX_EPOCH,
    Shape,
    StateSnapshot,
    axis_name,
    check_number,
    make_axes,
    shape_of,
    time_of,
)
from attuned.snapshots.archive import check_progress
from attuned.tables.reports import TableReport, Tally
from attuned.tables.rows import (
    CsvRows,
    RowError,
    RowSource,
    TableFormat,
    rows_of_arrow,
    rows_of_file,
    rows_of_pandas,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from attuned.snapshots.archive import Progress

_TIME_COLUMNS = ("updated_at_unix_ms", "updated_at")  # as export writes it, and as to_dataframe does
_FIELDS = ("source", "confidence", "schema_version")
_LIKE_AN_ID = re.compile(r"(?:^|_)(?:id|user|name|e?mail|participant|subject|person|respondent|code)(?:_|$)")

# What a spreadsheet would run as a formula. Export puts an apostrophe before it, and before what has one
# already, so that reading can tell its own apostrophes from those of an id.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")

# Unlike what float() takes: neither nan nor 1_000.
_DECIMAL_NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*", re.ASCII)
_WHOLE = re.compile(r"\s*[+-]?\d{1,19}\s*", re.ASCII)  # no more digits than int() takes
_LIKE_A_NUMBER = re.compile(r"\s*[+-]?[\d\s.,']*\d[\d\s.,']*(?:[eE][+-]?\d+)?\s*%?\s*", re.ASCII)
_LIKE_A_TIME = re.compile(r"\s*\d{1,4}([-/.])\d{1,2}\1\d{1,4}(?:\D|$)", re.ASCII)
_LIKE_ABSENT = {"nan", "null", "none", "n/a", "#n/a", "#nv", "-", ".", "?", "nil", "<na>", "nat"}

_LOOKED_AT = 1_000  # rows, to tell what columns hold
_NUMERIC = frozenset([int, float])
_MOST_DIGITS = 20  # that int() is given
_MILLISECOND = timedelta(milliseconds=1)


@attrs.frozen(kw_only=True)
class _Choices:
    """What read_table was asked for, checked."""

    scale: tuple[float, float]
    scales: Mapping[str, tuple[float, float]]
    user_column: str | None
    time_column: str | None
    time_format: str | None
    axes: tuple[str, ...] | None
    ignore: frozenset[str]
    ignore_text: bool
    absent: frozenset[str]
    encoding: str
    raw: bool

    def ignores(self, heading: str) -> bool:
        """Whether a column is to be left out, by its heading or what becomes of that."""
        return heading in self.ignore or axis_name(heading) in self.ignore


# Rows and states


class _Roles:
    """Which column is what, and how a row becomes a state."""

    def __init__(self, source: RowSource, choices: _Choices, now_ms: int) -> None:
        self._choices, self._now_ms = choices, now_ms
        self._typed = source.typed
        self._decimal = source.decimal if isinstance(source, CsvRows) else "."
        self.headings = source.headings
        self.axes = tuple[str, ...]()
        self._places: dict[str, int] = {}  # of user_id, updated_at_unix_ms and the other fields, by column
        self._columns: dict[str, int] = {}  # of the axes
        if self.headings is not None:
            self._find_columns(self.headings, list(itertools.islice(source.rows(), _LOOKED_AT)))
        else:
            looked_at = [row for _, row in itertools.islice(source.rows(), _LOOKED_AT)]
            rows: list[dict[str, Any]] = [row for row in looked_at if isinstance(row, dict)]
            flat = [row for row in rows if not isinstance(row.get("axes"), dict)]
            self._find_names(rows, flat)
        self._shape: Shape = shape_of(self.axes)
        self._scales: list[tuple[float, float]] = [self._scale_of(name) for name in self.axes]
        self._as_is = all(scale == (0, 1) for scale in self._scales)
        self._others = [name for name in _FIELDS if source.headings is None or name in self._places]
        picks = tuple(self._columns.values())
        self._pick: Callable[[Sequence[Any]], tuple[Any, ...]] = (
            operator.itemgetter(*picks) if len(picks) > 1 else lambda cells: tuple(cells[at] for at in picks)
        )

    def _scale_of(self, name: str) -> tuple[float, float]:
        return self._choices.scales.get(name, self._choices.scale)

    # Columns

    def _find_columns(self, headings: list[str], looked_at: list[tuple[int, Any]]) -> None:
        choices, rows = self._choices, [row for _, row in looked_at if not isinstance(row, ValueError)]
        rows = [row for row in rows if len(row) == len(headings)]
        names = [axis_name(heading) for heading in headings]
        kept = [at for at, heading in enumerate(headings) if not choices.ignores(heading)]
        if kept[:1] == [0] and _is_index(headings[0], [row[0] for row in rows]):
            del kept[0]  # the row numbers of pandas or R
        self._check_asked([names[at] for at in kept], headings)
        user = axis_name(choices.user_column or "user_id")
        times = self._time_names()
        wanted = None if choices.axes is None else set(map(axis_name, choices.axes))
        if wanted is not None:
            own = {user, *times, *_FIELDS}
            kept = [at for at in kept if names[at] in own or names[at] in wanted]
        for at in kept:
            if not names[at]:
                raise ValidationError(f"column {at + 1} has no name ({headings[at]!r}); ignore leaves it out")
        found = Counter(names[at] for at in kept)
        if twice := [f"{headings[at]!r} ({names[at]})" for at in kept if found[names[at]] > 1]:
            raise ValidationError(f"columns of the same name: {_listed(twice)}")
        by_name = {names[at]: at for at in kept}
        if user not in by_name:
            self._refuse_without_user(user, list(by_name))
        self._places["user_id"] = by_name.pop(user)
        for at, name in enumerate(name for name in times if name in by_name):
            place = by_name.pop(name)
            if at == 0:
                self._places["updated_at_unix_ms"] = place
        self._places |= {name: by_name.pop(name) for name in _FIELDS if name in by_name}
        examples = {name: self._text_in(row[at] for row in rows) for name, at in by_name.items()}
        self._refuse_text({name: text for name, text in examples.items() if text is not None}, by_name)
        self._columns = by_name
        self.axes = tuple(by_name)

    def _find_names(self, rows: list[dict[str, Any]], flat: list[dict[str, Any]]) -> None:
        """As _find_columns, where rows name their own columns."""
        choices = self._choices
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        if rows:
            self._check_asked(names, names)
            if len(rows) == 1 and all(isinstance(value, dict) for value in rows[0].values()):
                raise ValidationError(
                    "an object of columns, not of one row; pandas writes rows with to_json(orient='records')"
                )
            user = axis_name(choices.user_column or "user_id")
            if user not in names and (choices.user_column or len(rows) == _LOOKED_AT):
                self._refuse_without_user(user, names)
        own = {axis_name(choices.user_column or "user_id"), *self._time_names(), *_FIELDS, "axes"}
        columns = {
            name: at
            for at, name in enumerate(dict.fromkeys(itertools.chain.from_iterable(flat)))
            if name not in own and not choices.ignores(name)
        }
        if choices.axes is not None:
            columns = {name: at for name, at in columns.items() if name in map(axis_name, choices.axes)}
        examples = {name: self._text_in(row.get(name) for row in flat) for name in columns}
        self._ignored: set[str] = set()
        texts = {name: text for name, text in examples.items() if text is not None}
        self._refuse_text(texts, columns)
        self._ignored.update(texts)

    def _time_names(self) -> tuple[str, ...]:
        column = self._choices.time_column
        return _TIME_COLUMNS if column is None else (axis_name(column),)

    def _check_asked(self, names: list[str], headings: list[str]) -> None:
        """Raise ValidationError for a column that was asked for and is not there."""
        choices = self._choices
        asked = [
            ("user_column", [choices.user_column] if choices.user_column else []),
            ("time_column", [choices.time_column] if choices.time_column else []),
            ("axes", list(choices.axes or ())),
            ("scales", list(choices.scales)),
            ("ignore", sorted(choices.ignore)),
        ]
        known = {*names, *map(axis_name, headings), *headings}
        for option, columns in asked:
            for column in columns:
                if column not in known and axis_name(column) not in known and self.headings is not None:
                    shown = nearest(axis_name(column), names) or f" among {_listed(names)}"
                    raise ValidationError(f"{option}: there is no column {brief(column)}{shown}")

    def _refuse_without_user(self, user: str, names: list[str]) -> None:
        likely = [name for name in names if _LIKE_AN_ID.search(name)]
        advice = (
            f"; if it is {likely[0]}: user_column={likely[0]!r} (or --user-column {likely[0]})"
            if likely
            else "; user_column (or --user-column) names the column that says whose states they are"
        )
        raise ValidationError(f"there is no column {user} among {_listed(names)}{advice}")

    def _text_in(self, values: Iterable[Any]) -> str | None:
        """What a column holds that has no number, nor what might be meant as one; None for a good column."""
        example: str | None = None
        for value in values:
            if value is None or (isinstance(value, str) and value.strip() in self._choices.absent):
                continue
            if isinstance(value, str):
                text = value.strip()
                meant = (_LIKE_A_NUMBER.fullmatch(text) and not _LIKE_A_TIME.match(text)) or (
                    text.lower() in _LIKE_ABSENT
                )
            else:
                text = str(value)
                meant = isinstance(value, numbers.Real | RowError) and not isinstance(value, bool)
            if meant:
                return None
            example = example or text[:30]
        return example

    def _refuse_text(self, texts: Mapping[str, str], columns: dict[str, int]) -> None:
        """Leave out columns of text where that is wished, else raise ValidationError."""
        choices = self._choices
        if not texts:
            return
        named = [name for name in texts if choices.axes is not None]
        if named or not choices.ignore_text:
            shown = _listed([f"{name} ({text!r})" for name, text in texts.items()])
            times = [name for name, text in texts.items() if _LIKE_A_TIME.match(text)]
            advice = "ignore_text=True (or --ignore-text) leaves them out"
            if times and "updated_at_unix_ms" not in self._places:
                advice += f"; for times: time_column={times[0]!r} (or --time-column {times[0]})"
            raise ValidationError(f"columns without numbers: {shown}; {advice}")
        for name in texts:
            del columns[name]

    # Rows

    def state(self, row: Any, tally: Tally) -> StateSnapshot:
        """The state of a row, or a ValueError that says what is wrong with it."""
        if isinstance(row, ValueError):
            raise row
        return self._of_names(row, tally) if self.headings is None else self._of_cells(row, tally)

    def _of_cells(self, cells: Sequence[Any], tally: Tally) -> StateSnapshot:
        if len(cells) != len(cast("list[str]", self.headings)):
            columns = plural(len(cast("list[str]", self.headings)), "column")
            raise RowError(f"{plural(len(cells), 'cell')} under {columns}", "another number of cells")
        places = self._places
        fields = {name: cells[at] for name, at in places.items()}
        values = self._quick(self._pick(cells))
        if values is not None:
            with contextlib.suppress(ValidationError):  # what is out of the scale is told below
                return self._snapshot(fields, make_axes(self._shape, values), tally)
        given = {name: cells[at] for name, at in self._columns.items()}
        return self._snapshot(fields, self._scaled(given, tally), tally)

    def _quick(self, values: tuple[Any, ...]) -> tuple[float, ...] | None:
        """The scaled values of a row that has nothing but numbers, NaN for one outside; None for others."""
        if self._typed:
            if not _NUMERIC.issuperset(map(type, values)):
                return None
        else:
            joined = "".join(values)
            if "_" in joined or not joined.isascii():  # which float() would take
                return None
            if self._decimal != ".":
                values = tuple([value.replace(self._decimal, ".") for value in values])
        try:
            found = tuple(map(float, values))
        except (ValueError, OverflowError):
            return None
        if self._as_is:
            return found
        return tuple(
            [
                (value - low) / (high - low) if low <= value <= high else math.nan
                for value, (low, high) in zip(found, self._scales, strict=True)
            ]
        )

    def _of_names(self, row: dict[str, Any], tally: Tally) -> StateSnapshot:
        choices = self._choices
        row = {name: value for name, value in row.items() if value is not None and not choices.ignores(name)}
        fields: dict[str, Any] = {}
        if (user := axis_name(choices.user_column or "user_id")) in row:
            fields["user_id"] = row.pop(user)
        for name in reversed([name for name in self._time_names() if name in row]):
            fields["updated_at_unix_ms"] = row.pop(name)
        fields |= {name: row.pop(name) for name in _FIELDS if name in row}
        given = row
        if isinstance(row.get("axes"), dict):  # what export writes, or flat
            given = row.pop("axes")
            beside = [name for name in row if name not in self._ignored]
            if beside and choices.axes is None:
                raise RowError(f"{beside[0][:64]!r} is neither a field nor in axes")
        wanted = None if choices.axes is None else set(map(axis_name, choices.axes))
        given = {
            name: value
            for name, value in given.items()
            if name not in self._ignored and (wanted is None or name in wanted) and not choices.ignores(name)
        }
        return self._snapshot(fields, self._scaled(given, tally), tally)

    def _scaled(self, given: Mapping[str, Any], tally: Tally) -> dict[str, float]:
        """The axes of a row, one value after the other."""
        found: dict[str, float] = {}
        for name, value in given.items():
            number = self._number(name, value, tally)
            if number is not None:
                found[name] = number
        scales = {name: self._scale_of(name) for name in found}
        outside = [name for name, value in found.items() if not scales[name][0] <= value <= scales[name][1]]
        if not outside:
            return {
                name: (value - low) / (high - low)
                for (name, value), (low, high) in zip(found.items(), scales.values(), strict=True)
            }
        if any(name not in self._choices.scales for name in outside):
            tally.outside += 1
            for name, value in found.items():
                if name not in self._choices.scales and math.isfinite(value):
                    low, high = tally.spans.get(name, (value, value))
                    tally.spans[name] = min(low, value), max(high, value)
        (low, high), name = scales[outside[0]], outside[0]
        raise RowError(
            f"{name}: {found[name]:g} is outside of the scale {low:g}:{high:g}",
            f"{name}: outside of the scale {low:g}:{high:g}",
        )

    def _number(self, name: str, value: Any, tally: Tally) -> float | None:
        """The number that a value is; None where it is absent."""
        if isinstance(value, RowError):
            raise RowError(f"{name}: {value}")
        text = value.strip() if isinstance(value, str) else None
        if value is None or text in self._choices.absent:
            return None
        if text is not None and not self._typed:
            plain = text.replace(self._decimal, ".")
            if _DECIMAL_NUMBER.fullmatch(plain):
                return float(plain)
            shown = repr(plain[:40])
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return math.inf if cast("Any", value) > 0 else -math.inf
        else:
            shown = brief(value)
        if text is not None and text.lower() in _LIKE_ABSENT:
            tally.absent.add(text)
        raise RowError(f"{name}: not a number: {shown}", f"{name}: not a number")

    def _snapshot(self, fields: dict[str, Any], axes: Any, tally: Tally) -> StateSnapshot:
        user_id = fields.get("user_id")
        if user_id is None:
            raise RowError("user_id is missing")
        if user_id.__class__ is not str:
            user_id = self._user_id(user_id)
        elif user_id[:1] == "'" and not self._typed and not self._choices.raw and _FORMULA.match(user_id):
            user_id = user_id[1:]
        given, time_ms = fields.get("updated_at_unix_ms"), self._now_ms
        if given is not None and (found := self._time(given)) is not None:
            time_ms = found
        others: dict[str, Any] = {}
        for name in self._others:
            value = fields.get(name)
            if value is not None and (value := self._field(name, value, tally)) is not None:
                others[name] = value
        made = StateSnapshot(user_id, axes, time_ms, **others)
        tally.newest = max(tally.newest, made.updated_at_unix_ms)
        if (shape := made.axes._shape) not in tally.shapes:
            tally.shapes.add(shape)
            tally.axes |= dict.fromkeys(shape.names)
        return made

    def _user_id(self, value: Any) -> Any:
        """An id that is no text: a number in a column is one."""
        if self.headings is not None and isinstance(value, numbers.Real) and not isinstance(value, bool):
            if (whole := cast("Any", value)) == int(whole):
                return str(int(whole))
            raise RowError(f"user_id: text or a whole number is needed, got {brief(value)}")
        return value

    def _time(self, value: Any) -> Any:
        """A time in milliseconds since 1970, where it is one; None where it is absent."""
        form = self._choices.time_format
        if isinstance(value, str):
            if (
                value.isdecimal()
                and value.isascii()
                and len(value) < _MOST_DIGITS
                and not (form or self._typed)
            ):
                return int(value)  # by far the most
            text = value.strip()
            if text in self._choices.absent:
                return None
            plain = text.replace(self._decimal, ".")
            try:
                if form is not None and form not in ("ms", "s"):
                    value = datetime.strptime(text, form)  # noqa: DTZ007 - as below
                elif self._typed or not _DECIMAL_NUMBER.fullmatch(plain):
                    value = datetime.fromisoformat(text)
                else:
                    value = int(text) if _WHOLE.fullmatch(text) else float(plain)
            except ValueError:
                needed = form or "milliseconds since 1970, or ISO 8601 as in 2026-01-17T12:00Z"
                raise RowError(
                    f"updated_at_unix_ms: not a time: {text[:40]!r} ({needed})",
                    f"updated_at_unix_ms: not a time ({needed})",
                ) from None
        if isinstance(value, date):
            if not isinstance(value, datetime):
                value = datetime(value.year, value.month, value.day, tzinfo=UTC)
            aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            return (aware - UNIX_EPOCH) // _MILLISECOND
        if form == "s" and isinstance(value, int | float) and math.isfinite(value):
            return round(value * 1_000)
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def _field(self, name: str, value: Any, tally: Tally) -> Any:
        """The value of a field beside user, time and axes; None where it is absent."""
        if isinstance(value, str):
            if name == "source":
                return None if (text := value.strip()) in self._choices.absent else text
            if not self._typed and _WHOLE.fullmatch(value):
                return int(value)
        if name != "source" and not self._typed:
            value = self._number(name, value, tally)
        if name == "schema_version" and isinstance(value, float) and value.is_integer():
            return int(value)  # as pandas writes it
        if isinstance(value, RowError):
            raise value
        return value


def _listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most:,} more" if len(names) > most else "")


def _is_index(heading: str, values: list[Any]) -> bool:
    """Whether a column is that of the row numbers, which pandas and R write before the others."""
    if heading.strip() and not re.fullmatch(r"Unnamed: \d+", heading):
        return False
    texts = [str(value) for value in values]
    return bool(texts) and texts in (
        [str(at) for at in range(len(texts))],
        [str(at + 1) for at in range(len(texts))],
    )


class StateTable:
    """The states in a table, read row by row each time it is iterated; bad rows are left out and counted.

    ``axes`` are the names of its axes, ``report`` tells what the last reading found so far.
    ``has_heading`` is False for JSON, whose rows name their own axes.
    """

    def __init__(self, source: RowSource, choices: _Choices) -> None:
        self.has_heading = source.headings is not None
        self._source = source
        self._roles = _Roles(source, choices, time.time_ns() // 1_000_000)
        self._tally = Tally()
        self._checked = False

    def __iter__(self) -> Iterator[StateSnapshot]:
        tally = self._tally = Tally()
        make = self._roles.state
        for number, row in self._source.rows():
            try:
                snapshot = make(row, tally)
            except ValueError as error:  # ValidationError is one
                tally.add_bad(number, error)
            else:
                tally.good += 1
                yield snapshot

    def __repr__(self) -> str:
        tally = self._tally
        return f"<StateTable of {len(self.axes):,} axes, {tally.good:,} rows read, {tally.bad:,} bad>"

    def check(self, *, progress: Progress | None = None) -> TableReport:
        """Read all rows, and say what was found.

        ``progress(done, None)`` is called now and then with the number of rows read. Raises ValidationError
        where the file cannot be read to its end, OSError.
        """
        heard = check_progress(progress)
        for _ in self:
            if self._tally.good % 512 == 0:
                heard(self._tally.good + self._tally.bad, None)
        self._checked = True
        return self.report

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes: of the columns, in their order; JSON, which has none, is read for them."""
        if self.has_heading:
            return self._roles.axes
        if not self._checked:
            before, _ = self._tally, self.check()
            found, self._tally = tuple(self._tally.axes), before
            self._found = found
        return self._found

    @property
    def report(self) -> TableReport:
        """What the last reading found, or the one that goes on has found so far."""
        return self._tally.report(self._source.unit)


def read_table(
    source: Any,
    *,
    format: TableFormat | None = None,  # noqa: A002 - as pandas and others name it
    user_column: str | None = None,
    time_column: str | None = None,
    time_format: str | None = None,
    axes: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    ignore_text: bool = False,
    scale: tuple[float, float] = (0.0, 1.0),
    scales: Mapping[str, tuple[float, float]] | None = None,
    absent: Iterable[str] = ("", "NA"),
    encoding: str = "utf-8-sig",
    raw: bool = False,
) -> StateTable:
    r"""The states in a CSV, JSON or Parquet file, or in a data frame: to be iterated, as by upsert_many.

    ``source`` is a path, a stream of bytes, or a data frame of pandas or of what has Arrow's stream
    interface (Parquet and the latter need pyarrow). ``format`` is "csv", "jsonl" (an object a line), "json"
    (an array of objects) or "parquet"; None: by the name or the content; gzip is unpacked; text is in
    ``encoding``. CSV is separated by commas, tabs, or semicolons, with which commas are decimal marks.

    The column ``user_column`` (user_id) says whose states they are; ``time_column`` (updated_at_unix_ms or
    updated_at) when, in milliseconds since 1970 or in ISO 8601, UTC unless it says otherwise;
    ``time_format`` is "s" for seconds, or a form as of strptime; a row without a time gets that of this
    call. source, confidence and schema_version are themselves; all others, or those of ``axes`` alone, are
    axes, their names brought to snake_case, but for those of ``ignore``. Columns without any number are an
    error, unless ``ignore_text``. The ends of ``scale``, or of ``scales`` for one axis, become 0 and 1. What
    is in ``absent`` counts as nothing. ``raw`` leaves apostrophes before ids such as =1+1 where they are.

    Raises ValidationError for a heading or an option that does not fit, OSError for a file that cannot be
    read, MissingDependencyError. A row that is no state is left out and counted: see StateTable.report.

    >>> table = read_table(io.BytesIO(b"user_id,calm\nada,24\nbob,x\n"), scale=(0, 31))
    >>> [snapshot.user_id for snapshot in table], table.report.bad
    (['ada'], 1)
    """
    choices = _Choices(
        scale=_check_scale("scale", scale),
        scales={axis_name(name): _check_scale("scales", each) for name, each in _mapping(scales)},
        user_column=_check_text("user_column", user_column),
        time_column=_check_text("time_column", time_column),
        time_format=_check_text("time_format", time_format),
        axes=None if axes is None else _texts("axes", axes),
        ignore=frozenset(_texts("ignore", ignore)),
        ignore_text=check_flag("ignore_text", ignore_text),
        absent=frozenset(_texts("absent", absent)),
        encoding=_check_encoding(encoding),
        raw=check_flag("raw", raw),
    )
    if format is not None and format not in get_args(TableFormat):
        raise ValidationError(
            f"format: one of {', '.join(get_args(TableFormat))} is needed, got {brief(format)}"
        )
    if isinstance(source, str | os.PathLike) or (hasattr(source, "read") and hasattr(source, "seekable")):
        return StateTable(rows_of_file(source, format, choices.encoding, choices.user_column), choices)
    if type(source).__module__.partition(".")[0] == "pandas" and hasattr(source, "iloc"):
        return StateTable(rows_of_pandas(source), choices)
    if hasattr(source, "__arrow_c_stream__") and not isinstance(source, type):
        return StateTable(rows_of_arrow(source), choices)
    raise ValidationError(
        f"source: a path, a stream of bytes or a data frame is needed, got {type_name(source)}"
    )


def _check_text(field: str, value: object) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValidationError(f"{field}: a text is needed, got {brief(value)}")


def _texts(field: str, values: object) -> tuple[str, ...]:
    """Some texts; a text alone is a mistake that would be taken for its letters."""
    found = tuple(cast("Any", values)) if isinstance(values, Iterable) and not isinstance(values, str) else ()
    if not isinstance(values, Iterable) or isinstance(values, str) or not set(map(type, found)) <= {str}:
        raise ValidationError(f"{field}: a list of texts is needed, got {type_name(cast('Any', values))}")
    return found


def _mapping(scales: object) -> Any:
    if scales is None:
        return ()
    if not isinstance(scales, Mapping):
        raise ValidationError(f"scales: a mapping from axis to scale is needed, got {brief(scales)}")
    return cast("Any", scales).items()


def _check_scale(field: str, value: object) -> tuple[float, float]:
    ends: list[Any] = list(cast("Any", value)) if isinstance(value, tuple | list) else []
    if len(ends) == 2:  # noqa: PLR2004 - from low to high
        low, high = (check_number(field, end) for end in ends)
        if 0 < high - low < math.inf:
            return low, high
    raise ValidationError(
        f"{field}: two numbers, the lower first, are needed, as in (0, 31); got {brief(cast('Any', value))}"
    )


def _check_encoding(value: object) -> str:
    with contextlib.suppress(LookupError, TypeError, ValueError):
        io.TextIOWrapper(io.BytesIO(), encoding=cast("str", value))
        return codecs.lookup(cast("str", value)).name
    raise ValidationError(f"encoding: the name of one is needed, as utf-8, got {brief(value)}")


# What a store holds, as a table


def states_dataframe(states: Iterable[StateSnapshot], axes: Sequence[str]) -> Any:
    """A data frame of pandas, one row a state, sorted by user and time."""
    try:
        pd: Any = import_module("pandas")
    except ImportError as error:
        raise MissingDependencyError(
            'to_dataframe needs pandas: pip install "attuned-store[dataframe]"'
        ) from error
    chosen = sorted(states, key=lambda state: (state.user_id, time_of(state)))
    times = pd.Series([state.updated_at_unix_ms for state in chosen], dtype="int64")
    columns: dict[str, Any] = {
        "user_id": [state.user_id for state in chosen],
        "updated_at": times.astype("datetime64[ms]").dt.tz_localize("UTC"),
        "source": [state.source.value for state in chosen],
        "confidence": pd.Series([state.confidence for state in chosen], dtype="float64"),
        "schema_version": pd.Series([state.schema_version for state in chosen], dtype="int64"),
    }
    columns |= {
        name: pd.Series([state.axes.get(name, math.nan) for state in chosen], dtype="float64")
        for name in axes
    }
    return pd.DataFrame(columns)

"""Reads CSV and JSON lines as snapshots, a row at a time; a bad row is told by its line and reason."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import re
import sys
import tempfile
import time
import unicodedata
from collections import deque
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO, cast

from attuned_store import StateSnapshot

from .showing import CommandError, listed, plural

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

FIELDS = ("user_id", "updated_at_unix_ms", "source", "confidence", "schema_version")

# What a spreadsheet would run as a formula. Export puts an apostrophe before it, and before what has one
# already, so that import can tell its own apostrophes from those of an id.
FORMULA = re.compile(r"'*[=+\-@\t\r]")

# The longest honest row, 1,024 axes with names of 64 characters, is about 100 KB; a file without line ends
# must not fill the memory.
_MAX_LINE = 1 << 20

# How far a quote may run on: enough for a heading with line breaks; a stray one costs one row, not the file.
_MAX_ROW_LINES = 16


class BadRow(NamedTuple):
    """A row that is no snapshot: the physical line it begins on, and why."""

    line: int
    reason: str


def snake_case(name: str) -> str:
    """Brings a heading to snake_case: 'Energetic Arousal' and 'EnergeticArousal' to 'energetic_arousal'."""
    if re.fullmatch(r"[a-z0-9]+(?:_+[a-z0-9]+)*", name):
        return name
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain)
    return re.sub(r"[\W_]+", "_", words).strip("_").lower()


def read_number(text: str) -> int | float:
    """Reads a decimal number; unlike float() neither 'nan' nor '1_000', and an endless integer as infinite."""
    if re.fullmatch(r"\s*[+-]?\d{1,19}\s*", text, re.ASCII):
        return int(text)
    if not re.fullmatch(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*", text, re.ASCII):
        raise ValueError(f"not a number: {text[:40]!r}")
    return float(text)


def file_kind(path: str, chosen: str | None) -> str | None:
    """Tells CSV from JSON lines by the name of the file; None: by what is in it."""
    suffixes = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
    return chosen or suffixes.get(Path(path).suffix.lower())


@contextlib.contextmanager
def open_input(path: str) -> Generator[TextIO]:
    """Opens a file, or stdin for -, so that it can be read twice: a pipe goes to a temporary file first."""
    with contextlib.ExitStack() as stack:
        stream: IO[bytes] = sys.stdin.buffer if path == "-" else stack.enter_context(Path(path).open("rb"))
        if path == "-" or not stream.seekable():
            source = cast("io.BufferedReader", stream)
            stream = stack.enter_context(tempfile.TemporaryFile(prefix="attuned-store-"))
            while piece := source.read1(1 << 16):  # within one long read() Ctrl-C may go unnoticed
                stream.write(piece)
        # A byte that is not UTF-8 becomes a surrogate, so that it costs its row and not the file.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield stack.enter_context(text)


class Table:
    """A file of rows, CSV or JSON lines, read from its beginning as often as asked.

    ``kind`` is csv, jsonl or None for what its first line looks like; the ends of ``scale`` become 0 and 1;
    ``raw`` leaves apostrophes before formulas where they are.
    """

    def __init__(
        self, stream: TextIO, kind: str | None, scale: tuple[float, float], *, raw: bool = False
    ) -> None:
        self._stream, self._scale, self._raw = stream, scale, raw
        self._now = time.time_ns() // 1_000_000  # of the rows that name no time: one and the same for all
        _, first = next(self._lines())
        self._kind = kind or ("jsonl" if first.lstrip().startswith("{") else "csv")
        # A comma, unless only a tab or a semicolon makes a column user_id.
        marks = (mark for mark in ",\t;" if "user_id" in map(snake_case, first.split(mark)))
        self._delimiter = next(marks, ",")
        self._decimal = "," if self._delimiter == ";" else "."  # Excel: a comma cannot be both
        self._columns: list[str] = []
        if self._kind == "csv":
            _, heading, cells = next(self._records())
            self._columns = _columns(heading, cells)
        self.axes = [column for column in self._columns if column not in FIELDS]
        self.failure: Exception | None = None

    def rows(self) -> Iterator[StateSnapshot | BadRow]:
        """Yields each row as a snapshot, or as what is wrong with it."""
        records = itertools.islice(self._records(), int(self._kind == "csv"), None)
        for line, text, cells in records:
            try:
                if not text.isascii() and re.search("[\udc80-\udcff]", text):
                    raise ValueError("not UTF-8")
                yield self._snapshot(self._csv_row(cells) if self._kind == "csv" else _json_row(text))
            except ValueError as error:
                yield BadRow(line, str(error))

    def snapshots(self) -> Iterator[StateSnapshot]:
        """Yields the good rows; a failure to read ends them and is kept: what came before is written."""
        try:
            for row in self.rows():
                if not isinstance(row, BadRow):
                    yield row
        except (OSError, CommandError) as error:
            self.failure = error

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yields the physical lines with their numbers, from the first that is not blank."""
        self._stream.seek(0)
        begun = False
        for number in itertools.count(1):
            line = self._stream.readline(_MAX_LINE + 1)
            if len(line) > _MAX_LINE:
                raise CommandError(f"line {number} is longer than {_MAX_LINE:,} characters")
            if not line:
                break
            begun = begun or not line.isspace()
            if begun:
                yield number, line
        if not begun:
            raise CommandError("the file is empty")

    def _records(self) -> Iterator[tuple[int, str, list[str] | None]]:
        """Yields, for each record, the line it begins on, its text, and its cells where its quotes match."""
        lines = self._lines()
        if self._kind == "jsonl":
            yield from ((number, line, None) for number, line in lines if not line.isspace())
            return
        source = _Record(lines)
        reader = csv.reader(source, delimiter=self._delimiter, strict=True)
        while True:
            source.taken.clear()
            cells: list[str] | None = None
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:  # a quote left open spoils its line only: those after it are read again
                source.ahead.extendleft(reversed(source.taken[1:]))
                del source.taken[1:]
            if cells != []:
                yield source.taken[0][0], "".join(text for _, text in source.taken), cells

    def _csv_row(self, cells: list[str] | None) -> dict[str, object]:
        if cells is None:
            raise ValueError("a quote is not closed, or not where a cell begins")
        if len(cells) != len(self._columns):
            raise ValueError(f"{plural(len(cells), 'cell')} under {plural(len(self._columns), 'column')}")
        row: dict[str, object] = {}
        for column, text in zip(self._columns, cells, strict=True):
            if column == "user_id":
                quoted = text.startswith("'") and FORMULA.match(text) and not self._raw
                row[column] = text[1:] if quoted else text
            elif text.strip() in ("", "NA"):
                pass  # absent
            elif column == "source":
                row[column] = text.strip()
            else:
                try:
                    row[column] = read_number(text.replace(self._decimal, "."))
                except ValueError as error:
                    raise ValueError(f"{column}: {error}") from None
        return row

    def _snapshot(self, row: dict[str, object]) -> StateSnapshot:
        """Makes the snapshot of one row; None stands for an absent value."""
        row = {name: value for name, value in row.items() if value is not None}
        fields: dict[str, Any] = {"updated_at_unix_ms": self._now}
        fields.update((name, row.pop(name)) for name in FIELDS if name in row)
        if "user_id" not in fields:
            raise ValueError("user_id is missing")
        for name in ("updated_at_unix_ms", "schema_version"):
            if isinstance(fields.get(name), float) and fields[name].is_integer():  # as pandas writes it
                fields[name] = int(fields[name])
        if isinstance(row.get("axes"), dict):  # what export writes; else a flat object like a row of CSV
            nested = cast("dict[str, object]", row.pop("axes"))
            if row:
                raise ValueError(f"{next(iter(row))[:64]!r} is neither a field nor in axes")
            row = nested
        axes = {name: self._scaled(name, value) for name, value in row.items() if value is not None}
        return StateSnapshot(axes=cast("dict[str, float]", axes), **fields)

    def _scaled(self, axis: str, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value  # the snapshot says what is wrong with it
        low, high = self._scale
        if not low <= value <= high:
            raise ValueError(f"{axis}: {value:g} is outside of the --scale {low:g}:{high:g}")
        return (value - low) / (high - low)


class _Record:
    """Gives csv.reader the lines of one record, and keeps them to be read again."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self.ahead: deque[tuple[int, str]] = deque()
        self.taken: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if len(self.taken) == _MAX_ROW_LINES:
            raise StopIteration  # for the reader, the file ends within quotes
        self.taken.append(self.ahead.popleft() if self.ahead else next(self._lines))
        return self.taken[-1][1]


def _columns(text: str, heading: Sequence[str] | None) -> list[str]:
    """The heading of a CSV file in snake_case."""
    if re.search("[\udc80-\udcff]", text):
        raise CommandError("not UTF-8: save the file as UTF-8 first")
    if heading is None:
        raise CommandError("the quotes of the heading do not match")
    columns = [snake_case(name) for name in heading]
    pairs = zip(heading, columns, strict=True)
    twice = [f"{name!r} ({column})" for name, column in pairs if columns.count(column) > 1]
    if "" in columns:
        raise CommandError(f"column {columns.index('') + 1} has no name ({heading[columns.index('')]!r})")
    if twice:
        raise CommandError(f"columns of the same name: {listed(twice)}")
    if "user_id" not in columns:
        raise CommandError(f"there is no column user_id among {listed(columns)}")
    return columns


def _json_row(text: str) -> dict[str, object]:
    try:
        row: object = json.loads(
            text, object_pairs_hook=_unique_names, parse_constant=_no_constant, parse_int=read_number
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not a row: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - a bad row, as every other
    return cast("dict[str, object]", row)


def _unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object with its names in snake_case; json alone keeps the last of equal names."""
    found: dict[str, object] = {}
    for given, value in pairs:
        name = snake_case(given)
        if name in found:
            raise ValueError(f"{name[:64]} is there twice")
        found[name] = value
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"not a number: {text}")

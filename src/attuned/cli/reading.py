"""Reads CSV and JSON lines as snapshots, a row at a time; a bad row is told by its line and reason."""

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
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO, cast

from attuned_store import StateSnapshot

from .showing import CommandError, listed, plural

FIELDS = ("user_id", "updated_at_unix_ms", "source", "confidence", "schema_version")

# What a spreadsheet would run as a formula. Export puts an apostrophe before it, and before what has one
# already, so that import can tell its own apostrophes from those of an id.
FORMULA = re.compile(r"'*[=+\-@\t\r]")

# The longest honest row, 1,024 axes with names of 64 characters, is about 100 KB; a file without line ends
# must not fill the memory.
_MAX_LINE = 1 << 20

# How far a quote may run on: enough for a heading with line breaks; a stray one costs one row, not the file.
_MAX_ROW_LINES = 16

_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, as the file is decoded


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


def number(text: str) -> int | float:
    """Reads a decimal number; unlike float() neither 'nan' nor '1_000', and no integer is too long for it."""
    if re.fullmatch(r"\s*[+-]?\d{1,19}\s*", text, re.ASCII):
        return int(text)
    if not re.fullmatch(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*", text, re.ASCII):
        raise ValueError(f"not a number: {text[:40]!r}")
    return float(text)


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
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield stack.enter_context(text)


class Table:
    """A file of rows, read from its beginning as often as asked.

    ``kind`` is csv, jsonl or None for what its first line looks like; the ends of ``scale`` become 0 and 1;
    ``raw`` leaves apostrophes before formulas where they are.
    """

    def __init__(
        self, stream: TextIO, kind: str | None, scale: tuple[float, float], *, raw: bool = False
    ) -> None:
        self._stream, self._scale, self._raw = stream, scale, raw
        self._now = time.time_ns() // 1_000_000  # of the rows that name no time: one and the same for all
        first = next(self._lines())[1]
        self._csv = kind == "csv" or (kind is None and not first.lstrip().startswith("{"))
        # A comma, unless only a tab or a semicolon makes a column user_id.
        marks = (mark for mark in ",\t;" if "user_id" in map(snake_case, first.split(mark)))
        self._delimiter = next(marks, ",")
        self._decimal = "," if self._delimiter == ";" else "."  # Excel: a comma cannot be both
        self._columns = self._heading() if self._csv else []
        self.axes = [column for column in self._columns if column not in FIELDS]
        self.failure: Exception | None = None

    def rows(self) -> Iterator[StateSnapshot | BadRow]:
        """Yields each row as a snapshot, or as what is wrong with it."""
        for line, text, cells in itertools.islice(self._records(), int(self._csv), None):
            try:
                if not text.isascii() and _NOT_UTF8.search(text):
                    raise ValueError("not UTF-8")
                yield self._snapshot(self._csv_row(cells) if self._csv else _json_row(text))
            except ValueError as error:
                yield BadRow(line, str(error))

    def snapshots(self) -> Iterator[StateSnapshot]:
        """Yields the good rows; a failure to read ends them and is kept: what came before is written."""
        try:
            yield from (row for row in self.rows() if not isinstance(row, BadRow))
        except (OSError, CommandError) as error:
            self.failure = error

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yields the physical lines with their numbers, from the first that is not blank."""
        self._stream.seek(0)
        begun = False
        for at in itertools.count(1):
            line = self._stream.readline(_MAX_LINE + 1)
            if len(line) > _MAX_LINE:
                raise CommandError(f"line {at} is longer than {_MAX_LINE:,} characters")
            begun = begun or bool(line.strip())
            if not line:
                break
            if begun:
                yield at, line
        if not begun:
            raise CommandError("the file is empty")

    def _records(self) -> Iterator[tuple[int, str, list[str] | None]]:
        """Yields, for each record, the line it begins on, its text, and its cells where its quotes match."""
        lines = self._lines()
        if not self._csv:
            yield from ((at, line, None) for at, line in lines if not line.isspace())
            return
        taken: list[tuple[int, str]] = []
        ahead: deque[tuple[int, str]] = deque()

        def record() -> Iterator[str]:  # to end within quotes is an error for the reader
            while len(taken) < _MAX_ROW_LINES and (line := ahead.popleft() if ahead else next(lines, None)):
                taken.append(line)
                yield line[1]

        reader: Iterator[list[str]] | None = None
        while True:
            taken.clear()
            reader = reader or csv.reader(record(), delimiter=self._delimiter, strict=True)
            try:
                cells = next(reader, None)
                if cells is None:
                    return
            except csv.Error:  # a quote left open spoils its line only: those after it are read again
                cells = reader = None
                ahead.extendleft(reversed(taken[1:]))
                del taken[1:]
            if cells != []:
                yield taken[0][0], "".join(text for _, text in taken), cells

    def _heading(self) -> list[str]:
        """The names of the columns of a CSV file, in snake_case."""
        _, text, names = next(self._records())
        if _NOT_UTF8.search(text):
            raise CommandError("not UTF-8: save the file as UTF-8 first")
        if names is None:
            raise CommandError("the quotes of the heading do not match")
        columns = [snake_case(name) for name in names]
        pairs = zip(names, columns, strict=True)
        if "" in columns:
            raise CommandError(f"column {columns.index('') + 1} has no name ({names[columns.index('')]!r})")
        if twice := [f"{name!r} ({column})" for name, column in pairs if columns.count(column) > 1]:
            raise CommandError(f"columns of the same name: {listed(twice)}")
        if "user_id" not in columns:
            raise CommandError(f"there is no column user_id among {listed(columns)}")
        return columns

    def _csv_row(self, cells: list[str] | None) -> dict[str, Any]:
        if cells is None:
            raise ValueError("a quote is not closed, or not where a cell begins")
        if len(cells) != len(self._columns):
            raise ValueError(f"{plural(len(cells), 'cell')} under {plural(len(self._columns), 'column')}")
        row: dict[str, Any] = {}
        for column, text in zip(self._columns, cells, strict=True):
            if column == "user_id":
                quoted = text.startswith("'") and FORMULA.match(text) and not self._raw
                row[column] = text[1:] if quoted else text
            elif text.strip() not in ("", "NA"):
                try:
                    row[column] = (
                        text.strip() if column == "source" else number(text.replace(self._decimal, "."))
                    )
                except ValueError as error:
                    raise ValueError(f"{column}: {error}") from None
        return row

    def _snapshot(self, row: dict[str, Any]) -> StateSnapshot:
        """Makes the snapshot of one row; None stands for an absent value."""
        row = {name: value for name, value in row.items() if value is not None}
        fields: dict[str, Any] = {"updated_at_unix_ms": self._now}
        fields |= {name: row.pop(name) for name in FIELDS if name in row}
        if "user_id" not in fields:
            raise ValueError("user_id is missing")
        for name in ("updated_at_unix_ms", "schema_version"):
            if isinstance(fields.get(name), float) and fields[name].is_integer():  # as pandas writes it
                fields[name] = int(fields[name])
        axes = row.pop("axes") if isinstance(row.get("axes"), dict) else row  # what export writes, or flat
        if row and axes is not row:
            raise ValueError(f"{next(iter(row))[:64]!r} is neither a field nor in axes")
        low, high = self._scale
        scaled: dict[str, Any] = {}
        for name, value in axes.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                if not low <= value <= high:
                    raise ValueError(f"{name}: {value:g} is outside of the --scale {low:g}:{high:g}")
                scaled[name] = (value - low) / (high - low)
            elif value is not None:
                scaled[name] = value  # the snapshot says what is wrong with it
        return StateSnapshot(axes=scaled, **fields)


def _json_row(text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # json alone keeps the last of equal names
        found: dict[str, Any] = {}
        for given, value in pairs:
            if (name := snake_case(given)) in found:
                raise ValueError(f"{name[:64]} is there twice")
            found[name] = value
        return found

    try:
        row = json.loads(text, object_pairs_hook=unique, parse_int=number, parse_constant=number)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not a row: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return cast("dict[str, Any]", row)

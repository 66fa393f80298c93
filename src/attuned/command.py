"""The command line."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import csv
import functools
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
import time
import unicodedata
from collections import deque
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, TextIO, cast

import attrs

from attuned.base.config import HEADER_TEXT, MemoryStoreConfig, is_loopback
from attuned.base.errors import (
    LOGGER,
    MissingDependencyError,
    StoreError,
    ValidationError,
    one_line,
    plural,
    printable,
    unknown_user_error,
)
from attuned.base.values import (
    CANONICAL_AXES,
    MAX_INTEGER,
    UNIX_EPOCH,
    Match,
    SnapshotReport,
    Source,
    StateSnapshot,
    iso_time,
    wall_clock,
)
from attuned.copying import copy, list_snapshots, snapshot_on_start, verify_snapshot
from attuned.open import default_target, is_absent, open_store, target_options
from attuned.service import snapshot_app
from attuned.snapshots.directory import DEFAULT_SNAPSHOT_DIRECTORY, SnapshotFile, snapshot_directory
from attuned.stores import MemoryStore, StateStore

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from starlette.requests import Request

_ABSENT_CELLS = frozenset({"", "NA"})


_SOURCE_NAMES = [source.value for source in Source]


# The longest honest row, 1,024 axes with names of 64 characters, is about 100 KB; a file without line ends
# must not fill the memory.
_MAX_LINE = 1 << 20


# How far a quote may run on: enough for a heading with line breaks; a stray one costs one row, not the file.
_MAX_ROW_LINES = 16


class _CommandError(Exception):
    """Ends the command with one line on stderr and an exit status: 1 failed, 2 wrongly used."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class _BadRow(NamedTuple):
    """A row that is no snapshot: the physical line it begins on, and why."""

    line: int
    reason: str


class _Scale(NamedTuple):
    """What the axes of a file were measured on, mapped linearly to 0..1."""

    low: float
    high: float

    def __call__(self, axis: str, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value  # the snapshot says what is wrong with it

        if not self.low <= value <= self.high:
            raise ValueError(f"{axis}: {value:g} is outside of the --scale {self.low:g}:{self.high:g}")
        return (value - self.low) / (self.high - self.low)


class _Rules(NamedTuple):
    """How rows become snapshots: the scale, and the time of those that name none."""

    scale: _Scale
    now: int


# Names, numbers and times


def _snake_case(name: str) -> str:
    """Bring a heading to snake_case: 'Energetic Arousal' and 'EnergeticArousal' to 'energetic_arousal'."""
    if re.fullmatch(r"[a-z0-9]+(?:_+[a-z0-9]+)*", name):
        return name

    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain)
    return re.sub(r"[\W_]+", "_", words).strip("_").lower()


def _read_number(text: str) -> float:
    """Read a decimal number; unlike float() neither 'nan' nor '1_000'."""
    if not re.fullmatch(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*", text, re.ASCII):
        raise ValueError(f"not a number: {text[:40]!r}")
    return float(text)


def _read_whole(text: str) -> int:
    """Read a whole number, '820540800000.0' as pandas writes it included."""
    if re.fullmatch(r"\s*[+-]?\d{1,19}\s*", text, re.ASCII):
        return int(text)

    number = _read_number(text)
    if not number.is_integer() or abs(number) >= 2**53:
        raise ValueError(f"not a whole number: {text[:40]!r}")
    return int(number)


def _read_scale(text: str) -> _Scale:
    """Read LOW:HIGH."""
    low, _, high = text.partition(":")
    try:
        scale = _Scale(_read_number(low), _read_number(high))
    except ValueError:
        raise argparse.ArgumentTypeError(f"LOW:HIGH is two numbers, as in 0:31, not {text!r}") from None

    if not 0 < scale.high - scale.low < math.inf:
        raise argparse.ArgumentTypeError(f"LOW is to be less than HIGH, not {text!r}")
    return scale


def _read_moment(text: str) -> int:
    """Read a time: milliseconds since 1970, or ISO 8601, which is UTC unless it says otherwise."""
    if re.fullmatch(r"-?\d{1,19}", text, re.ASCII):
        return int(text)

    try:
        moment = datetime.fromisoformat(text)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return (aware - UNIX_EPOCH) // timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        message = f"a time is milliseconds since 1970 or ISO 8601, as in 2026-01-17T12:00Z, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _read_pairs(texts: Sequence[str]) -> dict[str, float]:
    """Read axis=value arguments."""
    axes: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        axis = _snake_case(name)
        if not equals or not axis:
            raise _CommandError(f"axes are given as AXIS=VALUE, as in warmth=0.7, not {text!r}", 2)
        if axis in axes:
            raise _CommandError(f"{axis} is given twice", 2)
        try:
            axes[axis] = _read_number(value)
        except ValueError as error:
            raise _CommandError(f"{axis}: {error}", 2) from None
    return axes


def _name_list(names: Sequence[str], most: int = 10) -> str:
    more = f", and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# Reading rows

_FIELD_READERS: dict[str, Callable[[str], object]] = {
    "user_id": str,
    "updated_at_unix_ms": _read_whole,
    "source": str.strip,
    "confidence": _read_number,
    "schema_version": _read_whole,
}


def _snapshot_of_row(
    fields: Mapping[str, object], axes: Mapping[str, object], rules: _Rules
) -> StateSnapshot:
    """Make the snapshot of one row; None stands for an absent value."""
    named = {"updated_at_unix_ms": rules.now} | {k: v for k, v in fields.items() if v is not None}
    if "user_id" not in named:
        raise ValueError("user_id is missing")

    values = {name: rules.scale(name, value) for name, value in axes.items() if value is not None}
    return StateSnapshot(axes=cast("dict[str, float]", values), **cast("dict[str, Any]", named))


def _check_text(text: str) -> None:
    """Refuse bytes that are not UTF-8; the file is decoded with surrogateescape so that one costs one row."""
    if not text.isascii() and re.search("[\udc80-\udcff]", text):
        raise ValueError("not UTF-8")


def _read_cell(column: str, text: str, decimal: str) -> object:
    if column not in ("user_id", "source"):
        text = text.replace(decimal, ".")
    try:
        return _FIELD_READERS.get(column, _read_number)(text)
    except ValueError as error:
        raise ValueError(f"{column}: {error}") from None


def _csv_row(
    cells: Sequence[str] | None, columns: Sequence[str], decimal: str, rules: _Rules
) -> StateSnapshot:
    if cells is None:
        raise ValueError("a quote is not closed, or not where a cell begins")
    if len(cells) != len(columns):
        raise ValueError(f"{plural(len(cells), 'cell')} under {plural(len(columns), 'column')}")

    _check_text("".join(cells))
    given = {
        c: t for c, t in zip(columns, cells, strict=True) if c == "user_id" or t.strip() not in _ABSENT_CELLS
    }
    row = {column: _read_cell(column, text, decimal) for column, text in given.items()}
    axes = {name: value for name, value in row.items() if name not in _FIELD_READERS}
    return _snapshot_of_row(
        {name: value for name, value in row.items() if name in _FIELD_READERS}, axes, rules
    )


def _unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Make a JSON object with its names in snake_case; json alone keeps the last of equal names."""
    names = [_snake_case(name) for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:64]} is there twice")
    return dict(zip(names, (value for _, value in pairs), strict=True))


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"not a number: {text}")


def _parse_object(text: str) -> dict[str, object]:
    try:
        row: object = json.loads(text, object_pairs_hook=_unique_names, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not a row: nested too deeply") from None

    if isinstance(row, dict):
        return cast("dict[str, object]", row)
    raise ValueError("not a JSON object")


def _json_row(text: str, rules: _Rules) -> StateSnapshot:
    """Read what export writes, or a flat object like a row of CSV."""
    _check_text(text)
    row = _parse_object(text)
    fields = {name: row.pop(name) for name in _FIELD_READERS if name in row}
    axes = row.get("axes")
    if not isinstance(axes, dict):
        return _snapshot_of_row(fields, row, rules)

    del row["axes"]
    if row:
        raise ValueError(f"{next(iter(row))[:64]!r} is neither a field nor in axes")
    return _snapshot_of_row(fields, cast("dict[str, object]", axes), rules)


def _numbered_lines(stream: TextIO) -> Iterator[tuple[int, str]]:
    """Yield the physical lines with their numbers."""
    number = 0
    while line := stream.readline(_MAX_LINE + 1):
        number += 1
        if len(line) > _MAX_LINE:
            raise _CommandError(f"line {number} is longer than {_MAX_LINE:,} characters")
        yield number, line


def _split_record(text: str, delimiter: str) -> list[str] | None:
    """Split one record of CSV; None where its quotes do not match."""
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error:
        return None


def _csv_records(lines: Iterator[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, list[str] | None]]:
    """Yield the records of CSV with the line each begins on; a quote left open spoils its line only."""
    ahead: deque[tuple[int, str]] = deque()
    while first := ahead.popleft() if ahead else next(lines, None):
        taken = [first]
        cells = _split_record(first[1], delimiter)
        while cells is None and len(taken) < _MAX_ROW_LINES:
            more = ahead.popleft() if ahead else next(lines, None)
            if more is None:
                break
            taken.append(more)
            cells = _split_record("".join(text for _, text in taken), delimiter)

        if cells is None:
            ahead.extendleft(reversed(taken[1:]))
        if cells != []:
            yield first[0], cells


def _find_delimiter(heading: str) -> str:
    """Choose what separates the columns: a comma, unless only a tab or a semicolon makes a user_id column."""
    for delimiter in ",\t;":
        if "user_id" in map(_snake_case, _split_record(heading, delimiter) or []):
            return delimiter
    return ","


def _check_heading(heading: Sequence[str] | None) -> list[str]:
    """Check the heading of a CSV file, and bring it to snake_case."""
    if heading is None:
        raise _CommandError("the quotes of the heading do not match")
    try:
        _check_text("".join(heading))
    except ValueError:
        raise _CommandError("not UTF-8: save the file as UTF-8 first") from None

    columns = [_snake_case(name) for name in heading]
    twice = [
        f"{name!r} ({column})"
        for name, column in zip(heading, columns, strict=True)
        if columns.count(column) > 1
    ]
    if "" in columns:
        raise _CommandError(f"column {columns.index('') + 1} has no name ({heading[columns.index('')]!r})")
    if twice:
        raise _CommandError(f"columns of the same name: {_name_list(twice)}")
    if "user_id" not in columns:
        raise _CommandError(f"there is no column user_id among {_name_list(columns)}")
    return columns


class _Table:
    """A file of rows, CSV or JSON lines, read from its beginning as often as asked, a row at a time."""

    def __init__(self, stream: TextIO, name: str, kind: str | None, rules: _Rules) -> None:
        self._stream, self._rules = stream, rules
        self.name = name
        self._kind = kind or self._sniff()
        self.failure: Exception | None = None
        self._decimal = "."
        self.columns = self._csv()[0] if self._kind == "csv" else []

    def _numbered(self) -> Iterator[tuple[int, str]]:
        """Start again, at the first line that is not blank."""
        self._stream.seek(0)
        lines = _numbered_lines(self._stream)
        first = next((line for line in lines if line[1].strip()), None)
        if first is None:
            raise _CommandError("the file is empty")
        return itertools.chain([first], lines)

    def _sniff(self) -> str:
        return "jsonl" if next(self._numbered())[1].lstrip().startswith("{") else "csv"

    def _csv(self) -> tuple[list[str], Iterator[tuple[int, list[str] | None]]]:
        lines = self._numbered()
        first = next(lines)
        delimiter = _find_delimiter(first[1])
        self._decimal = "," if delimiter == ";" else "."  # Excel's semicolons leave the comma to decimals
        records = _csv_records(itertools.chain([first], lines), delimiter)
        return _check_heading(next(records)[1]), records

    def _readers(self) -> Iterator[tuple[int, Callable[[], StateSnapshot]]]:
        if self._kind == "csv":
            columns, records = self._csv()
            for line, cells in records:
                yield line, functools.partial(_csv_row, cells, columns, self._decimal, self._rules)
        else:
            for line, text in self._numbered():
                if text.strip():
                    yield line, functools.partial(_json_row, text, self._rules)

    def rows(self) -> Iterator[StateSnapshot | _BadRow]:
        """Yield each row as a snapshot, or as what is wrong with it."""
        for line, read in self._readers():
            try:
                yield read()
            except ValueError as error:
                yield _BadRow(line, str(error))

    def snapshots(self) -> Iterator[StateSnapshot]:
        """Yield the good rows; a failure to read ends them and is kept: what came before is written."""
        try:
            for row in self.rows():
                if not isinstance(row, _BadRow):
                    yield row
        except (OSError, _CommandError) as error:
            self.failure = error


# Showing things


def _complain(message: str) -> None:
    """Write one line to stderr, over a progress line; a closed stderr must not stop an import."""
    width = 70 if _is_terminal(sys.stderr) else 0
    line = ("\r" if width else "") + f"attuned-store: {one_line(message)}".ljust(width)
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        _mute(sys.stderr)


def _mute(stream: TextIO | None) -> None:
    """Point a stream nowhere, so that the interpreter does not fail to flush it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, cast("TextIO", stream).fileno())
        os.close(nowhere)


def _say(text: str) -> None:
    """Print to stdout; a character that it cannot show comes out as an escape."""
    try:
        print(text)
    except UnicodeEncodeError:
        print(text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding))


def _show_record(args: argparse.Namespace, record: Mapping[str, object], text: str) -> None:
    _say(json.dumps(record) if _wants_json(args) else text)


def _wants_json(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "json", False))


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Set rows in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _axis_pairs(snapshot: StateSnapshot, order: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, f"{snapshot.axes[name]:.3f}") for name in order if name in snapshot.axes]


def _state_text(snapshot: StateSnapshot, order: Sequence[str]) -> str:
    """Write a snapshot for people, its axes in the order of the store."""
    axes = [(f"  {name}", value) for name, value in _axis_pairs(snapshot, order)]
    head = [
        ("user_id", snapshot.user_id),
        ("updated_at", iso_time(snapshot.updated_at_unix_ms)),
        ("source", str(snapshot.source)),
        ("confidence", f"{snapshot.confidence:g}"),
        ("schema_version", str(snapshot.schema_version)),
        ("axes", "" if axes else "none (neutral)"),
    ]
    return _aligned([*head, *axes])


def _history_table(entries: Sequence[StateSnapshot], order: Sequence[str]) -> str:
    rows = [("updated_at", "source", "confidence", "axes")]
    for entry in entries:
        axes = " ".join(f"{name}={value}" for name, value in _axis_pairs(entry, order))
        rows.append(
            (
                iso_time(entry.updated_at_unix_ms),
                str(entry.source),
                f"{entry.confidence:g}",
                axes or "neutral",
            )
        )
    return _aligned(rows)


def _match_table(matches: Sequence[Match]) -> str:
    rows = [("score", "user_id", "updated_at", "source", "confidence")]
    for match in matches:
        found = match.snapshot
        time_and_source = iso_time(found.updated_at_unix_ms), str(found.source)
        rows.append((f"{match.score:.4f}", found.user_id, *time_and_source, f"{found.confidence:g}"))
    return _aligned(rows)


class _ProgressLine:
    """What is going on, on the last line of a terminal, once it takes over a second; nothing elsewhere.

    With rich installed and the total known, a bar shows how far it is.
    """

    _BAR = 24  # columns of the bar; 70 are rewritten

    def __init__(self, doing: str) -> None:
        self._doing, self._begun = doing, time.monotonic()
        self._done, self._total = 0, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        if _is_terminal(sys.stderr):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def count(self, done: int, total: int | None = None) -> None:
        """Note how far it is; cheap, for use on every row."""
        self._done, self._total = done, total or self._total

    def _tick(self) -> None:
        shown = False
        while not self._end.wait(1):
            done = f" {self._done:,}" if self._done else ""
            total = f" of {self._total:,}" if self._total else ""
            bar, columns = self._bar()
            text = f"{done}{total}, {time.monotonic() - self._begun:.0f} s"
            self._rewrite(f"\r{self._doing}{bar}{text}".ljust(70 + len(bar) - columns))
            shown = True
        if shown:
            self._rewrite("\r" + " " * 70 + "\r")

    def _bar(self) -> tuple[str, int]:
        """The bar with its colours, and how many columns it takes."""
        if not self._total:
            return "", 0
        try:
            console = import_module("rich.console").Console(file=sys.stderr)
            bar = import_module("rich.progress_bar").ProgressBar(self._total, self._done, self._BAR)
        except ImportError:
            return "", 0
        with console.capture() as drawn:
            console.print(bar, end="")
        return " " + drawn.get().rstrip("\n"), self._BAR + 1

    def _rewrite(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


# The store


def _target_of(args: argparse.Namespace) -> str:
    """Say which store is meant."""
    named: str | None = getattr(args, "store", None)
    if named == "":
        raise _CommandError("--store is empty", 2)
    return default_target() if named is None else named


def _require_store(args: argparse.Namespace) -> None:
    """Refuse to go on without a store, which reading must not make."""
    target = _target_of(args)
    if is_absent(target):
        make = f"attuned-store --store {target} import FILE"
        raise _CommandError(f"there is no store at {target}; 'put' makes one, or '{make}'")


def _open_target(
    args: argparse.Namespace, *, create: bool = False, axes: Sequence[str] | None = None
) -> StateStore:
    """Open the store; only a command that writes may make a new one."""
    target = _target_of(args)
    if not create:
        _require_store(args)

    with _ProgressLine("opening"):
        return open_store(target) if axes is None else open_store(target, axes=tuple(axes))


def _rehearse(args: argparse.Namespace, snapshot: StateSnapshot) -> None:
    """Write to memory first, so that a bad first write leaves no empty store behind."""
    if is_absent(_target_of(args)):
        with MemoryStore(MemoryStoreConfig.from_env()) as store:
            store.upsert_latest(snapshot)


def _refuse_unknown_axes(given: Sequence[str], known: Sequence[str], name: str) -> None:
    """Refuse a file with columns that the store has no axis for."""
    unknown = [axis for axis in given if axis not in frozenset(known)]
    if unknown:
        has = f"it has {_name_list(sorted(known))}"
        raise _CommandError(
            f"{name}: nothing was written: the store has no axis {_name_list(unknown)} ({has})"
        )


# import


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy what comes through a pipe piece by piece; within one long read() Ctrl-C may go unnoticed."""
    while piece := cast("io.BufferedReader", source).read1(1 << 16):
        target.write(piece)


@contextlib.contextmanager
def _open_input(path: str) -> Generator[TextIO]:
    """Open a file, or stdin for -, so that it can be read twice: a pipe goes to a temporary file first."""
    with contextlib.ExitStack() as stack:
        stream: IO[bytes] = sys.stdin.buffer if path == "-" else stack.enter_context(Path(path).open("rb"))
        if path == "-" or not stream.seekable():
            spool = stack.enter_context(tempfile.TemporaryFile(prefix="attuned-store-"))
            _copy(stream, spool)
            stream = spool
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield stack.enter_context(text)


def _file_kind(path: str, chosen: str | None) -> str | None:
    """Tell CSV from JSON lines by the name of the file; None: by what is in it."""
    suffixes = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
    return chosen or suffixes.get(Path(path).suffix.lower())


class _Survey(NamedTuple):
    """What a first reading found: the axes in use, and how many rows are good and bad."""

    axes: list[str]
    good: int
    bad: int


def _check_axis_columns(axes: Sequence[str], name: str) -> None:
    """Refuse columns that cannot be axes, before a store is made for them."""
    try:
        StateSnapshot("columns", dict.fromkeys(axes, 0.5))
    except ValidationError as error:
        raise _CommandError(f"{name}: nothing was written: {error}") from None


def _survey_table(table: _Table, progress: _ProgressLine) -> _Survey:
    """Read the file through and report its bad rows; nothing is written before."""
    axes = dict.fromkeys(column for column in table.columns if column not in _FIELD_READERS)
    good = bad = 0
    for row in table.rows():
        if isinstance(row, _BadRow):
            bad += 1
            _complain(f"{table.name}: line {row.line}: {row.reason}")
        else:
            good += 1
            axes.update(dict.fromkeys(row.axes))
        progress.count(good + bad)
    return _Survey(list(axes), good, bad)


def _check_survey(found: _Survey, *, strict: bool, name: str) -> None:
    if found.bad and strict:
        raise _CommandError(f"{name}: nothing was written: {plural(found.bad, 'bad row')}, and --strict")
    if found.bad and not found.good:
        raise _CommandError(f"{name}: nothing was written: there is no good row")


def _axes_of_new_store(table: _Table, found: _Survey) -> list[str] | None:
    """Choose the axes of a new store: those configured, else those of the file.

    JSON lines have no heading: where all their axes are canonical, so is the store.
    """
    configured = MemoryStoreConfig.from_env().axes
    if configured is not None:
        _refuse_unknown_axes(found.axes, configured, table.name)
        return None

    canonical = not table.columns and set(found.axes) <= set(CANONICAL_AXES)
    return None if canonical or not found.axes else found.axes


def _write_table(store: StateStore, table: _Table, found: _Survey) -> int:
    """Write the good rows, which are known by now to be good."""
    with _ProgressLine("importing") as progress:
        written = store.upsert_many(
            table.snapshots(), progress=lambda done, _: progress.count(done, found.good)
        )

    why = table.failure or ("the file changed while it was read" if written != found.good else None)
    if why is not None:
        raise _CommandError(f"{table.name}: {why} ({plural(written, 'snapshot')} before that were written)")
    return written


def _import_table(args: argparse.Namespace, table: _Table, stack: contextlib.ExitStack) -> int:
    """Check the heading, then every row, and only then make a new store and write."""
    target = _target_of(args)
    fresh = is_absent(target) or target_options(target)[0]
    axes = [column for column in table.columns if column not in _FIELD_READERS]
    _check_axis_columns(axes, table.name)
    store = None if fresh else stack.enter_context(_open_target(args))
    if store is not None:
        _refuse_unknown_axes(axes, store.axes, table.name)

    with _ProgressLine("reading") as progress:
        found = _survey_table(table, progress)
    _check_survey(found, strict=args.strict, name=table.name)
    if store is None:
        store = stack.enter_context(_open_target(args, create=True, axes=_axes_of_new_store(table, found)))
    _refuse_unknown_axes(found.axes, store.axes, table.name)

    _report_import(args, store, _write_table(store, table, found), found.bad)
    return 1 if found.bad else 0


def _report_import(args: argparse.Namespace, store: StateStore, written: int, bad: int) -> None:
    """Say what was imported, and what the store holds now."""
    users, snapshots = store.count(), store.count(history=True)
    record = {"written": written, "bad_rows": bad, "users": users, "snapshots": snapshots}
    skipped = f", skipped {plural(bad, 'bad row')}" if bad else ""
    now = f"{_target_of(args)} has {plural(users, 'user')}, {plural(snapshots, 'snapshot')}"
    _show_record(args, record, f"imported {plural(written, 'snapshot')}{skipped}; {now}")


def _command_import(args: argparse.Namespace) -> int:
    name = "stdin" if args.file == "-" else str(args.file)
    with contextlib.ExitStack() as stack:
        with _ProgressLine("waiting for input"):
            stream = stack.enter_context(_open_input(args.file))
        try:
            table = _Table(
                stream, name, _file_kind(args.file, args.format), _Rules(args.scale, wall_clock.now_ms())
            )
        except _CommandError as error:
            raise _CommandError(f"{name}: nothing was written: {error}") from None
        return _import_table(args, table, stack)


# export


@contextlib.contextmanager
def _atomic_file(path: Path) -> Generator[TextIO]:
    """Write a file beside the one named, and put it in its place when all is on the disk."""
    final = path.resolve()
    beside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        with beside.open("x", encoding="utf-8", newline="") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(final)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(beside):
            error.filename = str(path)  # the name that was asked for
        raise


@contextlib.contextmanager
def _open_output(path: str) -> Generator[TextIO]:
    """Open what export writes to, in UTF-8: stdout for -, a pipe or device in place, a file atomically."""
    if path == "-":
        binary: IO[bytes] | None = getattr(sys.stdout, "buffer", None)  # a notebook's stdout has none
        yield cast("TextIO", codecs.getwriter("utf-8")(binary)) if binary else sys.stdout
    elif Path(path).exists() and not Path(path).is_file():
        with Path(path).open("w", encoding="utf-8", newline="") as stream:
            yield stream
    else:
        with _atomic_file(Path(path)) as stream:
            yield stream


def _snapshot_writer(stream: TextIO, kind: str, axes: Sequence[str]) -> Callable[[StateSnapshot], object]:
    """Make the function that writes one snapshot."""
    if kind == "jsonl":
        return lambda snapshot: stream.write(json.dumps(snapshot.to_dict()) + "\n")

    named = [axis for axis in axes if axis in _FIELD_READERS]
    if named:
        raise _CommandError(f"the axis {named[0]} has the name of a field; export with --format jsonl")
    rows = csv.DictWriter(stream, [*_FIELD_READERS, *axes], lineterminator="\n")
    rows.writeheader()
    return lambda snapshot: rows.writerow(_flat_row(snapshot))


def _flat_row(snapshot: StateSnapshot) -> dict[str, object]:
    record = snapshot.to_dict()
    return {**{name: record[name] for name in _FIELD_READERS}, **snapshot.axes}


def _all_states(store: StateStore, *, latest_only: bool) -> Iterator[StateSnapshot]:
    """Yield everything kept, each user's oldest first; the latest may have aged out of the history."""
    for user_id in store.users():
        latest = store.get_latest(user_id)
        history = [] if latest_only else store.get_history(user_id, MAX_INTEGER)
        yield from reversed(history)
        if latest is not None and latest not in history:
            yield latest


def _command_export(args: argparse.Namespace) -> int:
    kind = _file_kind(args.file, args.format) or "jsonl"
    count = 0
    with (
        _open_target(args) as store,
        _open_output(args.file) as stream,
        _ProgressLine("exporting") as progress,
    ):
        write = _snapshot_writer(stream, kind, store.axes)
        for snapshot in _all_states(store, latest_only=args.latest):
            write(snapshot)
            count += 1
            progress.count(count)

    if args.file != "-":
        _show_record(
            args,
            {"written": count, "file": args.file},
            f"exported {plural(count, 'snapshot')} to {args.file}",
        )
    return 0


# The other commands


def _given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Collect the fields named on the command line; the others keep their defaults."""
    names = {
        "at": "updated_at_unix_ms",
        "source": "source",
        "confidence": "confidence",
        "schema": "schema_version",
    }
    return {field: getattr(args, name) for name, field in names.items() if getattr(args, name) is not None}


def _show_state(args: argparse.Namespace, snapshot: StateSnapshot, store: StateStore) -> None:
    _show_record(args, snapshot.to_dict(), _state_text(snapshot, store.axes))


def _require_user(args: argparse.Namespace) -> None:
    """Refuse an axis where the user should be: it would become a user of that name."""
    try:
        _read_pairs([args.user])
    except _CommandError:
        return
    raise _CommandError(f"the user comes first, as in '{args.command} alice {args.user}'", 2)


def _command_put(args: argparse.Namespace) -> int:
    _require_user(args)
    snapshot = StateSnapshot(user_id=args.user, axes=_read_pairs(args.pairs), **_given_fields(args))
    _rehearse(args, snapshot)
    with _open_target(args, create=True) as store:
        store.upsert_latest(snapshot)
        _show_state(args, snapshot, store)
    return 0


def _command_patch(args: argparse.Namespace) -> int:
    _require_user(args)
    axes, fields = _read_pairs(args.pairs), _given_fields(args)
    _rehearse(args, StateSnapshot(user_id=args.user, axes=axes, **fields))
    with _open_target(args, create=True) as store:
        _show_state(args, store.patch(args.user, axes, **fields), store)
    return 0


def _command_get(args: argparse.Namespace) -> int:
    with _open_target(args) as store:
        snapshot = store.get_latest(args.user)
        if snapshot is None:
            raise unknown_user_error(args.user)
        _show_state(args, snapshot, store)
    return 0


def _command_history(args: argparse.Namespace) -> int:
    with _open_target(args) as store:
        entries = store.get_history(args.user, args.limit, since=args.since, until=args.until)
        if not entries and store.get_latest(args.user) is None:
            raise unknown_user_error(args.user)
        order = store.axes

    if _wants_json(args):
        for entry in entries:
            _say(json.dumps(entry.to_dict()))
    else:
        _say(_history_table(entries, order) if entries else "no history")
    return 0


def _command_users(args: argparse.Namespace) -> int:
    with _open_target(args) as store:
        for user_id in store.users():
            _show_record(args, {"user_id": user_id}, user_id)
    return 0


def _search_query(args: argparse.Namespace) -> str | dict[str, float]:
    """Take what to search for, one of two."""
    if bool(args.pairs) == (args.like is not None):
        raise _CommandError("search needs either --like USER or AXIS=VALUE pairs", 2)
    return args.like if args.like is not None else _read_pairs(args.pairs)


def _command_search(args: argparse.Namespace) -> int:
    query = _search_query(args)
    with _open_target(args) as store, _ProgressLine("searching"):
        matches = store.search_similar(
            query,
            limit=args.limit,
            score_threshold=args.threshold,
            user_id=args.user,
            exclude_user_id="" if args.include_self else args.exclude,
            source=args.source,
            min_confidence=args.min_confidence,
            since=args.since,
            until=args.until,
            history=args.history,
        )

    if _wants_json(args):
        for match in matches:
            _say(json.dumps({"score": match.score, **match.snapshot.to_dict()}))
    else:
        _say(_match_table(matches) if matches else "no match")
    return 0


def _confirm(args: argparse.Namespace, question: str, otherwise: str) -> None:
    """Ask before something is lost; where nobody can answer, refuse."""
    if args.yes:
        return
    if not (_is_terminal(sys.stdin) and _is_terminal(sys.stderr)):
        raise _CommandError(f"{args.command} asks on a terminal; elsewhere it needs --yes", 2)

    print(one_line(f"{question}? [y/N]"), end=" ", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise _CommandError(otherwise)


def _command_delete(args: argparse.Namespace) -> int:
    _require_store(args)
    for user_id in args.users:
        StateSnapshot(user_id, {})  # a bad id is found before the first is deleted

    whose = f"{plural(len(args.users), 'user')} ({_name_list(args.users)})"
    _confirm(args, f"delete {whose} with all history from {_target_of(args)}", "nothing was deleted")
    with _open_target(args) as store, _ProgressLine("deleting") as progress:
        for done, user_id in enumerate(args.users, 1):
            deleted = store.delete(user_id)
            text = f"deleted {user_id}" if deleted else f"there was no {user_id}"
            _show_record(args, {"user_id": user_id, "deleted": deleted}, text)
            progress.count(done, len(args.users))
    return 0


def _command_prune(args: argparse.Namespace) -> int:
    with _open_target(args) as store, _ProgressLine("pruning"):
        removed = store.prune()
    _show_record(args, {"removed": removed}, f"removed {plural(removed, 'snapshot')}")
    return 0


def _command_health(args: argparse.Namespace) -> int:
    with _open_target(args) as store, _ProgressLine("checking"):
        health = store.health()
    record = {name: value for name, value in attrs.asdict(health).items() if value is not None}
    _show_record(args, record, _aligned([(name, _plain(value)) for name, value in record.items()]))
    return 1 if health.status == "unhealthy" else 0


def _plain(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else one_line(str(value))


def _command_count(args: argparse.Namespace) -> int:
    with _open_target(args) as store, _ProgressLine("counting"):
        number = store.count(history=args.history)
    _show_record(args, {"snapshots" if args.history else "users": number}, str(number))
    return 0


# Snapshots


def _report_text(report: SnapshotReport) -> str:
    """Say what is in a snapshot file."""
    count = None if report.points is None else plural(report.points, "state")
    if report.kind == "native" and report.points is not None:
        count = plural(report.points, "point")
    size = None if report.bytes is None else plural(report.bytes, "byte")
    return ", ".join(filter(None, (report.kind, count, size)))


def _command_snapshot(args: argparse.Namespace) -> int:
    with _open_target(args) as store, _ProgressLine("taking the snapshot:") as progress:
        report = store.create_snapshot(
            args.directory,
            kind=args.kind,
            keep=args.keep,
            keep_remote=args.keep_remote,
            progress=progress.count,
        )
    took = f"{report.duration_ms / 1000:.2f} s"
    _show_record(args, report.to_dict(), f"wrote {report.path}: {_report_text(report)}, {took}")
    return 0


def _axes_of_snapshot(args: argparse.Namespace) -> Sequence[str] | None:
    """Check a snapshot file before a new store is made for it, and choose the axes of that store."""
    saved = SnapshotFile(args.file)
    saved.check_mode(args.mode, native=target_options(_target_of(args))[1].get("url") is not None)
    with _ProgressLine("verifying") as progress:
        saved.verify(progress=progress.count)

    configured = MemoryStoreConfig.from_env().axes
    if saved.contents is None or configured is None:
        return saved.contents and saved.contents.axes
    _refuse_unknown_axes(saved.contents.axes, configured, args.file)
    return None


def _open_to_restore(args: argparse.Namespace) -> StateStore:
    """Open the store, or make one that a snapshot file fits into."""
    target = _target_of(args)
    if is_absent(target) or target_options(target)[0]:
        return _open_target(args, create=True, axes=_axes_of_snapshot(args))
    SnapshotFile(args.file)  # a file that is not there is no reason to ask anything
    return _open_target(args)


def _command_restore(args: argparse.Namespace) -> int:
    with _open_to_restore(args) as store:
        users = store.count() if args.mode == "replace" else 0
        if users:
            question = f"replace {plural(users, 'user')} of {_target_of(args)} by what {args.file} holds"
            _confirm(args, question, "nothing was restored")
        with _ProgressLine("restoring") as progress:
            report = store.restore_snapshot(args.file, mode=args.mode, progress=progress.count)
        now = f"{plural(store.count(), 'user')}, {plural(store.count(history=True), 'snapshot')}"

    text = f"restored {args.file} ({args.mode}: {_report_text(report)}); {_target_of(args)} has {now}"
    _show_record(args, report.to_dict(), text)
    return 0


def _command_verify(args: argparse.Namespace) -> int:
    return max([_verify_file(args, file) for file in args.files])


def _verify_file(args: argparse.Namespace, file: str) -> int:
    """Check one file and say how it is; the exit status."""
    try:
        with _ProgressLine("verifying") as progress:
            report = verify_snapshot(file, progress=progress.count)
    except StoreError as error:
        if _wants_json(args):
            _say(json.dumps(SnapshotReport(status="failed", target=file, message=str(error)).to_dict()))
        else:
            _complain(str(error))
        return 1
    _show_record(args, report.to_dict(), f"{file} is good: {_report_text(report)}")
    return 0


def _command_snapshots(args: argparse.Namespace) -> int:
    reports = list_snapshots(snapshot_directory(args.directory))
    if _wants_json(args):
        for report in reports:
            _say(json.dumps(report.to_dict()))
        return 0

    rows = [
        (
            printable(report.snapshot_name),
            str(report.kind),
            report.message if report.bytes is None else f"{report.bytes:,}",
        )
        for report in reports
    ]
    _say(_aligned([("snapshot", "kind", "bytes"), *rows]) if rows else "no snapshots")
    return 0


def _command_copy(args: argparse.Namespace) -> int:
    with _ProgressLine("copying") as progress:
        report = copy(args.source, args.target, replace=args.replace, progress=progress.count)
    states = plural(report.points or 0, "state")
    _show_record(args, report.to_dict(), f"copied {states} from {args.source} to {args.target}")
    return 0


# serve


class _Bearer:
    """Authorizes requests that carry a token; it shows it to nobody."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def __call__(self, request: Request) -> bool:
        import hmac

        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token)


def _is_local_request(request: Request) -> bool:
    """Authorize, without a token, requests to this machine by name, and none that a page sent from a browser.

    A page may send requests here, or give its own host the address 127.0.0.1: neither gets past this.
    """
    host = re.fullmatch(r"\[?(.*?)\]?(?::\d+)?", request.headers.get("host", ""))
    return host is not None and is_loopback(host[1].lower()) and "origin" not in request.headers


def _authorization(host: str) -> Callable[[Request], bool]:
    """Choose who may ask: who knows the token, or, where there is none, who is on this machine."""
    token = os.environ.get("ATTUNED_STORE_TOKEN")
    if token is None and not is_loopback(host):
        raise _CommandError(
            f"{host} may be reached from other machines: set ATTUNED_STORE_TOKEN to a secret, or serve on "
            "127.0.0.1",
            2,
        )
    if token is not None and not HEADER_TEXT.fullmatch(token):
        raise _CommandError("ATTUNED_STORE_TOKEN is empty, or holds blanks or what is not ASCII", 2)
    return _is_local_request if token is None else _Bearer(token)


def _uvicorn() -> Any:
    try:
        import uvicorn
    except ImportError as error:
        raise MissingDependencyError("serve needs uvicorn: pip install starlette uvicorn") from error
    return uvicorn


@contextlib.contextmanager
def _listening(host: str, port: int) -> Generator[socket.socket]:
    """Take the port before anything else is done."""
    import socket

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _CommandError(f"{host} is no address of this machine: {error.strerror}") from error
    with listener:
        if os.name == "posix":  # elsewhere this would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise _CommandError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
        yield listener


@contextlib.contextmanager
def _ended_by_signals() -> Generator[None]:
    """Let SIGTERM and Ctrl-C end the block: that is how it is meant to end."""
    import signal

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def _logged_to_stderr() -> Generator[None]:
    """Show what happens while nobody looks: the snapshots that were taken, and what went wrong."""
    handler, level = logging.StreamHandler(), LOGGER.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)


def _command_serve(args: argparse.Namespace) -> int:
    uvicorn, authorize = _uvicorn(), _authorization(args.host)
    with (
        _ended_by_signals(),
        _logged_to_stderr(),
        _listening(args.host, args.port) as listener,
        _open_target(args) as store,
    ):
        app = snapshot_app(store, authorize=authorize, directory=args.directory, keep=args.keep)
        snapshot_on_start(store, keep=args.keep)
        listener.listen()
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        _show_record(args, {"url": url, "store": _target_of(args)}, f"serving {_target_of(args)} on {url}")
        getattr(sys.stdout, "flush", int)()
        options = {"log_config": None, "access_log": False, "lifespan": "off", "ws": "none"}
        config = uvicorn.Config(app, proxy_headers=False, server_header=False, **options)
        uvicorn.Server(config).run(sockets=[listener])
    return 0


# Arguments


class _CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise _CommandError(f"{message} (see {self.prog} --help)", 2)


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < least:
            raise argparse.ArgumentTypeError(f"a whole number from {least} is needed, not {text!r}")
        return int(text)

    return parse


def _read_real(text: str) -> float:
    try:
        return _read_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="CSV or JSON lines, in UTF-8; - is stdin")
    parser.add_argument(
        "--scale",
        type=_read_scale,
        default="0:1",
        metavar="LOW:HIGH",
        help="what the axes were measured on; becomes 0..1; default: 0:1",
    )
    parser.add_argument(
        "--format", choices=["csv", "jsonl"], help="default: by the name of the file, or its content"
    )
    parser.add_argument("--strict", action="store_true", help="write nothing at all if any row is bad")


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="default: stdout")
    parser.add_argument(
        "--format", choices=["csv", "jsonl"], help="default: by the name of the file, or jsonl"
    )
    parser.add_argument("--latest", action="store_true", help="only each user's latest state, no history")


def _state_arguments(parser: argparse.ArgumentParser) -> None:
    _user_argument(parser)
    _pairs_argument(parser, "a value from 0 to 1")
    parser.add_argument(
        "--at", type=_read_moment, metavar="TIME", help="milliseconds since 1970, or ISO 8601; default: now"
    )
    parser.add_argument("--source", choices=_SOURCE_NAMES)
    parser.add_argument("--confidence", type=_read_real, metavar="0..1")
    parser.add_argument("--schema-version", type=_at_least(1), metavar="N", dest="schema")


def _user_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("user", metavar="USER")


def _pairs_argument(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("pairs", metavar="AXIS=VALUE", nargs="*", help=text)
    parser.set_defaults(more="pairs")


def _range_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--since", type=_read_moment, metavar="TIME", help="milliseconds since 1970, or ISO 8601; inclusive"
    )
    parser.add_argument("--until", type=_read_moment, metavar="TIME", help="the same")


def _history_arguments(parser: argparse.ArgumentParser) -> None:
    _user_argument(parser)
    parser.add_argument("--limit", type=_at_least(0), default=100, metavar="N", help="default: 100")
    _range_arguments(parser)


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    _pairs_argument(parser, "what to look for, unless --like")
    parser.add_argument(
        "--like", metavar="USER", help="look for states like this user's latest, others' only"
    )
    parser.add_argument("--limit", type=_at_least(1), default=10, metavar="N", help="default: 10")
    parser.add_argument("--threshold", type=_read_real, metavar="SCORE", help="the least score, -1..1")
    parser.add_argument("--user", metavar="USER", help="only this user's states")
    leave_out = parser.add_mutually_exclusive_group()
    leave_out.add_argument("--exclude", metavar="USER", help="all but this user's states")
    leave_out.add_argument("--include-self", action="store_true", help="do not leave out the user of --like")
    parser.add_argument("--source", choices=_SOURCE_NAMES)
    parser.add_argument("--min-confidence", type=_read_real, metavar="0..1")
    _range_arguments(parser)
    parser.add_argument(
        "--history", action="store_true", help="search all of the history, not only the latest states"
    )


def _delete_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("users", metavar="USER", nargs="+")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(more="users")


def _count_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--history", action="store_true", help="count the snapshots in the history")


def _snapshot_arguments(parser: argparse.ArgumentParser) -> None:
    _directory_argument(parser)
    text = "default: the server's own on a server whose node has all shards, portable elsewhere"
    parser.add_argument("--kind", choices=["auto", "native", "portable"], default="auto", help=text)
    _keep_argument(parser)
    parser.add_argument(
        "--keep-remote", action="store_true", help="leave a native snapshot on the server too"
    )


def _directory_argument(parser: argparse.ArgumentParser) -> None:
    text = f"default: $QDRANT_SNAPSHOT_DIR or {DEFAULT_SNAPSHOT_DIRECTORY}"
    parser.add_argument("directory", metavar="DIRECTORY", nargs="?", help=text)


def _keep_argument(parser: argparse.ArgumentParser) -> None:
    text = "then remove all but the newest N of this collection and kind"
    parser.add_argument("--keep", type=_at_least(1), metavar="N", help=text)


def _restore_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--mode",
        choices=["replace", "merge", "skip"],
        default="replace",
        help="replace what is there (the default), merge, or skip users who are there",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before replacing")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+")
    parser.set_defaults(more="files")


def _copy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a directory, or http(s)://host:6333")
    parser.add_argument("target", metavar="TARGET", help="the same; a new store gets the axes of the source")
    parser.add_argument("--replace", action="store_true", help="replace what the target holds")


def _read_port(text: str) -> int:
    port = _at_least(0)(text)
    if port >= 1 << 16:
        raise argparse.ArgumentTypeError(f"a port is at most 65535, not {text}")
    return port


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="default: 127.0.0.1; others need $ATTUNED_STORE_TOKEN"
    )
    parser.add_argument(
        "--port", type=_read_port, default=8080, metavar="N", help="default: 8080; 0: one that is free"
    )
    parser.add_argument(
        "--directory",
        metavar="DIRECTORY",
        help=f"of the snapshots; default: $QDRANT_SNAPSHOT_DIR or {DEFAULT_SNAPSHOT_DIRECTORY}",
    )
    _keep_argument(parser)


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has only the common options."""


class _Command(NamedTuple):
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None]
    help: str
    example: str


_COMMANDS = {
    "import": _Command(
        _command_import, _import_arguments, "read states from a file", "import film_mood.csv --scale 0:31"
    ),
    "export": _Command(_command_export, _export_arguments, "write all states to a file", "export states.csv"),
    "put": _Command(
        _command_put, _state_arguments, "write a user's state", "put alice warmth=0.8 urgency_sensitivity=0.2"
    ),
    "patch": _Command(
        _command_patch, _state_arguments, "change some axes of a user's state", "patch alice warmth=0.6"
    ),
    "get": _Command(_command_get, _user_argument, "show a user's latest state", "get alice --json"),
    "history": _Command(
        _command_history, _history_arguments, "show a user's states, newest first", "history alice --limit 5"
    ),
    "users": _Command(_command_users, _no_arguments, "list the users", "users"),
    "search": _Command(
        _command_search, _search_arguments, "find similar states, best first", "search --like alice --limit 3"
    ),
    "delete": _Command(
        _command_delete, _delete_arguments, "delete users and their history", "delete alice bob --yes"
    ),
    "prune": _Command(_command_prune, _no_arguments, "remove what is past its retention", "prune"),
    "health": _Command(
        _command_health, _no_arguments, "check the store; the status is 1 if unhealthy", "health"
    ),
    "count": _Command(_command_count, _count_arguments, "count the users", "count --history"),
    "snapshot": _Command(
        _command_snapshot, _snapshot_arguments, "write a backup of the store", "snapshot backups --keep 7"
    ),
    "restore": _Command(
        _command_restore,
        _restore_arguments,
        "bring back what a backup holds",
        "restore backups/20260117T120000.123Z-attuned_state.attuned --yes",
    ),
    "verify": _Command(
        _command_verify,
        _verify_arguments,
        "check backups; the status is 1 if one is bad",
        "verify backups/20260117T120000.123Z-attuned_state.attuned",
    ),
    "snapshots": _Command(
        _command_snapshots, _directory_argument, "list the backups in a directory", "snapshots backups"
    ),
    "copy": _Command(
        _command_copy,
        _copy_arguments,
        "copy a whole store into another",
        "copy http://localhost:6333 ./attuned_state",
    ),
    "serve": _Command(
        _command_serve, _serve_arguments, "take backups on request, over HTTP", "serve --directory backups"
    ),
}


_NOTES = {
    "import": """
The columns user_id (required), updated_at_unix_ms, source, confidence and schema_version
are themselves; every other column is an axis, its name brought to snake_case. Empty cells
and NA are absent; a row without a time gets the time of the import. A bad row is reported
with its line and skipped, and the exit status is then 1. A new store takes the file's
columns as its axes (unless ATTUNED_STORE_AXES names them); an existing one keeps its own.
Columns are separated by commas, by tabs, or by semicolons, as Excel writes them with decimal
commas.
""",
    "serve": """
POST /api/snapshot takes a snapshot; GET /api/health, /api/ready and (where prometheus_client
is installed) /metrics. With ATTUNED_STORE_TOKEN set, requests but those for /api/ready need the
header "Authorization: Bearer" with it; without, only this machine is served. On start a snapshot
is taken if QDRANT_SNAPSHOT_ON_START is true. SIGTERM and Ctrl-C end it, and are no failure.
""",
}


def _make_parser() -> _CommandParser:
    from attuned import __version__

    common = _CommandParser(add_help=False)
    text = "a directory, or http(s)://host:6333; default: $ATTUNED_STORE, $QDRANT_URL, "
    text += "$ATTUNED_STORE_PATH or ./attuned_state"
    common.add_argument("--store", metavar="TARGET", default=argparse.SUPPRESS, help=text)
    common.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="JSON, one object a line"
    )

    options: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    about = "Keeps the latest state of every user, and a bounded history."
    first = "example: attuned-store --store ./mood import film_mood.csv --scale 0:31"
    parser = _CommandParser(
        prog="attuned-store", parents=[common], description=about, epilog=first, **options
    )
    parser.add_argument("--version", action="version", version=f"attuned-store {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        about = command.help[0].upper() + command.help[1:] + "." + _NOTES.get(name, "")
        example = f"example: attuned-store {command.example}"
        child = commands.add_parser(
            name, parents=[common], help=command.help, description=about, epilog=example, **options
        )
        command.arguments(child)
    return parser


def _join_values(argv: Sequence[str]) -> list[str]:
    """Bind '--scale -3:3' together, which argparse takes for two options."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] in {"--scale", "--threshold"} and re.match(r"-[\d.]", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _parse_command(argv: Sequence[str]) -> argparse.Namespace:
    """Parse; pairs and users may stand on both sides of an option, which argparse allows in no subcommand."""
    args, rest = _make_parser().parse_known_args(_join_values(argv))
    more: str | None = getattr(args, "more", None)
    wrong = [word for word in rest if more is None or (word.startswith("-") and word != "--")]
    if wrong:
        raise _CommandError(
            f"not understood: {_name_list(wrong)} (see attuned-store {args.command} --help)", 2
        )
    if more is not None:
        setattr(args, more, [*getattr(args, more), *(word for word in rest if word != "--")])
    return args


# Running


def _reason(error: BaseException) -> str:
    """What went wrong; where the system refused a file, as other commands say it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _report_failure(error: BaseException) -> int:
    """Report what ended the command in one line; the exit status."""
    if isinstance(error, KeyboardInterrupt):
        _complain("interrupted")
        return 130

    written: int | None = getattr(error, "written", None)
    unexpected = not isinstance(error, (_CommandError, StoreError, OSError, NotImplementedError))
    kind = f"unexpected {type(error).__name__}: " if unexpected else ""
    _complain(
        f"{kind}{_reason(error)}" + (f" ({plural(written, 'snapshot')} were written)" if written else "")
    )
    return (
        error.status if isinstance(error, _CommandError) else 2 if isinstance(error, ValidationError) else 1
    )


def _run_command(argv: Sequence[str]) -> int:
    try:
        args = _parse_command(argv)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    return _COMMANDS[args.command].run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 done, 1 failed or rows skipped, 2 wrongly used, 130 interrupted. What goes wrong is one line on stderr,
    never a traceback (except with python -X dev); a reader that closes the pipe is no error.
    """
    status = 0
    try:
        status = _run_command(sys.argv[1:] if argv is None else argv)
        getattr(sys.stdout, "flush", int)()
    except BrokenPipeError:
        _mute(sys.stdout)
    except (KeyboardInterrupt, Exception) as error:
        if sys.flags.dev_mode:
            raise
        status = _report_failure(error)
        _flush_stdout()
    return status


def _flush_stdout() -> None:
    """Write out what was printed before a failure, or give it up."""
    try:
        getattr(sys.stdout, "flush", int)()
    except OSError:
        _mute(sys.stdout)

"""Where the rows of tables come from: CSV, JSON and Parquet files, and data frames."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import tempfile
import weakref
from collections import Counter, deque
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, cast

from attuned.base.config import check_path
from attuned.base.errors import (
    MissingDependencyError,
    ValidationError,
    one_line,
    printable,
)
from attuned.base.values import axis_name

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping


TableFormat = Literal["csv", "jsonl", "json", "parquet"]

_SUFFIXES: Mapping[str, TableFormat] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}

# The longest honest row, 1,024 axes with names of 64 characters, is about 100 KB; a file without line ends
# must not fill the memory.
_MAX_LINE = 1 << 20

# How far a quote may run on: enough for a heading with line breaks; a stray one costs one row, not the file.
_MAX_ROW_LINES = 16

_NOT_DECODED = re.compile("[\udc80-\udcff]")  # a byte that is not of the encoding
_BATCH_ROWS = 1_024  # of what is held by columns


class RowError(ValueError):
    """What is wrong with a row, and the reason that it shares with others."""

    def __init__(self, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason or text


class RowSource(Protocol):
    """Where rows come from. ``headings`` are those of the columns; None where rows name their own.

    A row is a sequence under the headings, or a mapping; or an error that says what is wrong with it.
    ``typed``: values are numbers and times already, not texts.
    """

    unit: str
    typed: bool

    @property
    def headings(self) -> list[str] | None:
        """See above."""
        ...

    def rows(self) -> Iterator[tuple[int, Any]]:
        """All rows, each with its number."""
        ...


class InputFile:
    """A file or stream of bytes, to be read as often as asked; a pipe is kept in a file first."""

    def __init__(self, source: Any, encoding: str) -> None:
        self.encoding = encoding
        self._stream: IO[bytes] | None = None
        if isinstance(source, str | os.PathLike):
            self.path: Path | None = Path(check_path(cast("Any", source))).expanduser()
            self.name = printable(self.path.name)
            self.suffixes = [suffix.lower() for suffix in self.path.suffixes]
            if self.path.exists() and not self.path.is_file() and not self.path.is_dir():
                with self.path.open("rb") as pipe:
                    self._keep(pipe)
        else:
            self.path, self.name, self.suffixes = None, "the stream", []
            if not source.seekable():
                self._keep(source)
            else:
                self._stream = source

    def _keep(self, pipe: Any) -> None:
        kept = self._stream = tempfile.TemporaryFile(prefix="attuned-store-")  # noqa: SIM115 - as long as this
        weakref.finalize(self, kept.close)
        read = getattr(pipe, "read1", pipe.read)  # within one long read() Ctrl-C may go unnoticed
        while piece := read(1 << 16):
            kept.write(piece)

    @contextlib.contextmanager
    def bytes(self) -> Generator[IO[bytes]]:
        """The bytes from the beginning, unpacked."""
        with contextlib.ExitStack() as stack:
            if self._stream is None:
                opened: IO[bytes] = stack.enter_context(cast("Path", self.path).open("rb"))
            else:
                opened = self._stream
                opened.seek(0)
            magic = opened.read(4)
            opened.seek(0)
            if magic.startswith(b"\x1f\x8b"):
                unpacked: Any = gzip.GzipFile(fileobj=opened)
                opened = stack.enter_context(unpacked)
            elif magic == b"PK\x03\x04":
                raise ValidationError(
                    f"{self.name}: a zip or Excel file; save it as CSV in UTF-8, or give what "
                    "pandas.read_excel makes of it"
                )
            yield opened

    @contextlib.contextmanager
    def text(self) -> Generator[io.TextIOWrapper]:
        """The text from the beginning; bytes that are none are told row by row."""
        with self.bytes() as opened:
            text = io.TextIOWrapper(opened, encoding=self.encoding, errors="surrogateescape", newline="")
            try:
                yield text
            finally:
                with contextlib.suppress(ValueError):  # who opened the bytes closes them
                    text.detach()

    def lines(self) -> Iterator[tuple[int, str]]:
        """The physical lines with their numbers, from the first that is not blank."""
        begun = False
        with self.text() as text:
            for at in itertools.count(1):
                line = text.readline(_MAX_LINE + 1)
                if len(line) > _MAX_LINE:
                    raise ValidationError(f"{self.name}: line {at} is longer than {_MAX_LINE:,} characters")
                begun = begun or bool(line.strip())
                if not line:
                    break
                if begun:
                    yield at, line
        if not begun:
            raise ValidationError(f"{self.name}: the file is empty")

    def check(self, text: str) -> str:
        """The text of a row, or an error where it is not of the encoding."""
        if not text.isascii() and _NOT_DECODED.search(text):
            encoding = self.encoding.upper().removesuffix("-SIG")
            raise RowError(f"not {encoding}")
        return text


class CsvRows:
    """Rows of cells, separated by commas, unless only a tab or a semicolon makes a column of the users."""

    unit = "line"
    typed = False
    headings: list[str]

    def __init__(self, file: InputFile, first: str, user_column: str | None) -> None:
        self._file = file
        user = axis_name(user_column or "user_id")
        marks = [mark for mark in ",\t;" if user in map(axis_name, first.split(mark))]
        self._delimiter = (marks or sorted(",\t;", key=first.count, reverse=True))[0]
        self.decimal = "," if self._delimiter == ";" else "."  # Excel: a comma cannot be both
        _, text, names = next(self._records())
        try:
            file.check(text)
        except ValueError as error:
            likely = "utf-16" if text.startswith(("\udcff\udcfe", "\udcfe\udcff")) else "cp1252"
            raise ValidationError(
                f"{error}: save the file as UTF-8 first, or name its encoding, as in encoding={likely!r} "
                f"(or --encoding {likely})"
            ) from None
        if names is None:
            raise ValidationError("the quotes of the heading do not match")
        self.headings = names

    def rows(self) -> Iterator[tuple[int, Any]]:
        """See RowSource."""
        for line, text, cells in itertools.islice(self._records(), 1, None):
            try:
                self._file.check(text)
            except RowError as error:
                yield line, error
            else:
                bad = RowError("a quote is not closed, or not where a cell begins")
                yield line, bad if cells is None else cells

    def _records(self) -> Iterator[tuple[int, str, list[str] | None]]:
        """For each record, the line it begins on, its text, and its cells where its quotes match."""
        lines = self._file.lines()
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
            cells: list[str] | None
            try:
                cells = next(reader, None)
                if cells is None:
                    return
            except csv.Error:  # a quote left open spoils its line only: those after it are read again
                cells = reader = None
                ahead.extendleft(reversed(taken[1:]))
                del taken[1:]
            if cells != []:
                at, text = taken[0]
                yield at, text if len(taken) == 1 else "".join(each for _, each in taken), cells


def _json_integer(text: str) -> int | float:
    return int(text) if len(text) < 20 else float(text)  # noqa: PLR2004 - no integer is too long


def _json_object(pairs: list[tuple[str, Any]]) -> Any:
    """An object with its names in snake_case, or what is wrong with it: json keeps the last of equals."""
    found = {axis_name(given): value for given, value in pairs}
    if len(found) < len(pairs):
        names = Counter(axis_name(given) for given, _ in pairs)
        return RowError(f"{names.most_common(1)[0][0][:64]} is there twice")
    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_json_object,
    parse_int=_json_integer,
    parse_constant=lambda text: RowError(f"not a number: {text!r}"),
)


def _json_row(value: object) -> Any:
    if isinstance(value, dict | RowError):
        return cast("Any", value)
    return RowError("not a JSON object")


class JsonLines:
    """An object a line."""

    unit = "line"
    typed = True
    headings: list[str] | None = None

    def __init__(self, file: InputFile) -> None:
        self._file = file

    def rows(self) -> Iterator[tuple[int, Any]]:
        """See RowSource."""
        for at, line in self._file.lines():
            if line.isspace():
                continue
            try:
                yield at, _json_row(_DECODER.decode(self._file.check(line)))
            except json.JSONDecodeError as error:
                yield at, RowError(f"not JSON: {error.msg} at character {error.pos + 1}", "not JSON")
            except RecursionError:
                yield at, RowError("not a row: nested too deeply")
            except RowError as error:
                yield at, error


class JsonArray:
    """An array of objects, which may stand on one line."""

    unit = "row"
    typed = True
    headings: list[str] | None = None

    def __init__(self, file: InputFile) -> None:
        self._file = file

    def rows(self) -> Iterator[tuple[int, Any]]:
        """See RowSource; bounded in memory, whatever the length of the array."""
        number, ended = 0, False
        with self._file.text() as stream:
            text = stream.read(1 << 16).lstrip().removeprefix("[")
            while True:
                text = text.lstrip()
                if number:
                    text = text.removeprefix(",").lstrip()
                if text.startswith("]"):
                    break
                try:
                    value, end = _DECODER.raw_decode(text)
                except RecursionError:
                    raise ValidationError(f"{self._file.name}: row {number} is nested too deeply") from None
                except json.JSONDecodeError as error:
                    end, value = 0, None
                    if ended or len(text) > _MAX_LINE:
                        raise ValidationError(
                            f"{self._file.name}: not a JSON array: {error.msg} in row {number}"
                        ) from None
                if not end or (end == len(text) and not ended):  # it may go on
                    ended = not (piece := stream.read(1 << 16))
                    text += piece
                    continue
                yield number, self._checked(text[:end], value)
                text, number = text[end:], number + 1
        if not number:
            raise ValidationError(f"{self._file.name}: the array is empty")

    def _checked(self, text: str, value: object) -> Any:
        try:
            self._file.check(text)
        except RowError as error:
            return error
        return _json_row(value)


class ColumnRows:
    """What is held by columns: batches of them, each a list of lists."""

    unit = "row"
    typed = True

    def __init__(self, headings: Iterable[object], batches: Callable[[], Iterator[list[list[Any]]]]) -> None:
        self.headings: list[str] = [str(heading) for heading in headings]
        self._batches = batches

    def rows(self) -> Iterator[tuple[int, Any]]:
        """See RowSource."""
        batches = self._batches()
        return enumerate(row for columns in batches for row in zip(*columns, strict=True))


def rows_of_pandas(frame: Any) -> ColumnRows:
    """The rows of a data frame of pandas; an index that has a name is a column."""
    if any(name is not None for name in frame.index.names):  # as groupby and set_index leave it
        frame = frame.reset_index()

    def column(series: Any) -> list[Any]:
        values, missing = series.tolist(), series.isna()
        if not missing.any():
            return cast("list[Any]", values)
        return [None if gone else value for value, gone in zip(values, missing, strict=True)]

    def batches() -> Iterator[list[list[Any]]]:
        for start in range(0, len(frame), _BATCH_ROWS):
            part = frame.iloc[start : start + _BATCH_ROWS]
            yield [column(part.iloc[:, position]) for position in range(part.shape[1])]

    return ColumnRows(frame.columns, batches)


def _import_pyarrow() -> Any:
    try:
        import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet files, and data frames of other libraries than pandas, need pyarrow: "
            'pip install "attuned-store[parquet]"'
        ) from error
    return import_module("pyarrow")


def _lists(batch: Any) -> list[list[Any]]:
    return [column.to_pylist() for column in batch.columns]


def rows_of_arrow(source: Any) -> ColumnRows:
    """The rows of what has Arrow's stream interface."""
    table = _import_pyarrow().table(source)
    return ColumnRows(table.column_names, lambda: map(_lists, table.to_batches(max_chunksize=_BATCH_ROWS)))


def _of_parquet(file: InputFile) -> ColumnRows:
    pa = _import_pyarrow()

    def batches() -> Iterator[list[list[Any]]]:
        with refused(), file.bytes() as opened:
            yield from map(_lists, pa.parquet.ParquetFile(opened).iter_batches(_BATCH_ROWS))

    @contextlib.contextmanager
    def refused() -> Generator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValidationError(f"{file.name}: no Parquet file: {one_line(str(error))[:200]}") from error

    with refused(), file.bytes() as opened:
        names = pa.parquet.ParquetFile(opened).schema_arrow.names
    return ColumnRows(names, batches)


def rows_of_file(source: Any, kind: str | None, encoding: str, user_column: str | None) -> RowSource:
    """The rows of a file or stream of bytes, of the kind that was named, or else that it looks like."""
    file = InputFile(source, encoding)
    with file.bytes() as opened:
        magic = opened.read(4)
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    kind = (
        kind or _SUFFIXES.get(suffixes[-1] if suffixes else "") or ("parquet" if magic == b"PAR1" else None)
    )
    if kind == "parquet":
        return _of_parquet(file)
    with file.text() as text:
        beginning = text.read(1 << 16).lstrip()
    if kind is None:
        kind = {"{": "jsonl", "[": "json"}.get(beginning[:1], "csv")
    if kind == "csv":
        return CsvRows(file, beginning.partition("\n")[0], user_column)
    return JsonLines(file) if kind == "jsonl" else JsonArray(file)

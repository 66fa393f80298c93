"""What the command shows: lines, tables, JSON, progress, questions and complaints."""

import contextlib
import json
import os
import re
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Self

# What a terminal obeys, ends lines or turns the direction of writing; other languages' joiners stay.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WIDTH = 70  # of the line that tells progress without rich


class CommandError(Exception):
    """Ends the command with one line on stderr and an exit status: 1 failed, 2 wrongly used."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def printable(text: str) -> str:
    """The text with escapes for controls, and for what stdout cannot encode."""
    escaped = _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def plural(count: int, noun: str) -> str:
    """The count with its noun: 1 user, 1,234 users."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most:,} more" if len(names) > most else "")


def iso_time(at: int | datetime) -> str:
    """A time, also in milliseconds since 1970, as ISO 8601 in UTC."""
    moment = at if isinstance(at, datetime) else _EPOCH + timedelta(milliseconds=at)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_terminal(stream: Any) -> bool:
    """Whether somebody watches the stream, which may be None or closed."""
    return stream is not None and not stream.closed and stream.isatty()


def mute(stream: Any) -> None:
    """Points a stream nowhere, so that the interpreter does not fail to flush it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may have no file, or be None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def complain(message: str) -> None:
    """Writes one line to stderr, over a line of progress; a closed stderr must not stop an import."""
    line = "attuned-store: " + printable(re.sub(r"[\r\n]+", " ", message).strip())
    try:
        print("\r" + line.ljust(_WIDTH) if is_terminal(sys.stderr) else line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        mute(sys.stderr)


def show(args: Namespace, record: Mapping[str, object], text: str) -> int:
    """Prints a record as JSON where that was asked for, else a line of text; gives the exit status, 0."""
    print(json.dumps(record) if args.json else printable(text))
    return 0


def show_table(
    args: Namespace,
    records: Iterable[Mapping[str, object]],
    rows: Sequence[Sequence[str]],
    heading: Sequence[str] = (),
    otherwise: str = "",
) -> int:
    """Prints records as JSON, one a line, where that was asked for, else rows as a table; gives 0.

    On a terminal rich draws it, where it is installed; elsewhere it is aligned text, two spaces apart.
    """
    if args.json or not rows:
        for line in map(json.dumps, records) if args.json else [otherwise]:
            print(line)
        return 0
    cells = [[printable(cell) for cell in row] for row in rows]
    with contextlib.suppress(ImportError):  # without rich, plain text
        if is_terminal(sys.stdout):
            from rich import box, console, table, text

            drawn = table.Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=bool(heading))
            for name in heading or rows[0]:
                drawn.add_column(name, overflow="fold")  # nothing is cut off
            for row in cells:
                drawn.add_row(*map(text.Text, row))
            console.Console().print(drawn)
            return 0
    cells = [list(heading), *cells] if heading else cells
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


class Progress:
    """Shows on a terminal what takes over a second: a bar, or without rich the numbers."""

    total: int | None = None

    def __init__(self, doing: str) -> None:
        self._doing, self.done = doing, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        if is_terminal(sys.stderr):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def count(self, done: int, total: int | None = None) -> None:
        """Notes how far it is; cheap, for use on every row."""
        self.done, self.total = done, total or self.total

    def _numbers(self, began: float) -> str:
        total = f" of {self.total:,}" if self.total else ""
        done = f"{self.done:,}{total}, " if self.done else ""
        return f"{done}{time.monotonic() - began:.0f} s"

    def _run(self) -> None:
        began = time.monotonic()
        if self._ended.wait(1):
            return
        with contextlib.suppress(OSError, ValueError):  # the terminal has gone: the work goes on
            try:
                from rich import console, progress
            except ImportError:
                while not self._ended.is_set():
                    line = f"\r{self._doing}: {self._numbers(began)}"
                    print(line.ljust(_WIDTH), end="", file=sys.stderr, flush=True)
                    self._ended.wait(1)
                print("\r" + " " * _WIDTH, end="\r", file=sys.stderr, flush=True)
                return
            columns = ("{task.description}", progress.BarColumn(24), "{task.fields[numbers]}")
            screen = console.Console(stderr=True)
            # rich keeps the bar below what is printed to stderr meanwhile; stdout may be a file.
            with progress.Progress(*columns, console=screen, transient=True, redirect_stdout=False) as bar:
                task = bar.add_task(self._doing, numbers=self._numbers(began), total=self.total)
                while not self._ended.is_set():
                    bar.update(task, completed=self.done, total=self.total, numbers=self._numbers(began))
                    bar.refresh()
                    self._ended.wait(0.2)


def confirm(args: Namespace, question: str, otherwise: str) -> None:
    """Asks before something is lost; where nobody can answer, refuses."""
    if args.yes:
        return
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        raise CommandError(f"{args.command} asks on a terminal; elsewhere it needs --yes", 2)
    print(printable(f"{question}? [y/N]"), end=" ", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise CommandError(otherwise)

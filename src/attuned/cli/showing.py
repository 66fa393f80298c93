"""What the command shows: lines, tables, JSON, progress, questions and complaints."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Self

# What a terminal obeys, ends lines or turns the direction of writing; other languages' joiners stay.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_PROGRESS_WIDTH = 70


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
    more = f", and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def iso_time(milliseconds: int) -> str:
    """A time in milliseconds since 1970 as ISO 8601 in UTC."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody watches the stream."""
    return stream is not None and not stream.closed and stream.isatty()


def mute(stream: TextIO | None) -> None:
    """Points a stream nowhere, so that the interpreter does not fail to flush it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may have no file, or be None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, cast("TextIO", stream).fileno())
        os.close(nowhere)


def complain(message: str) -> None:
    """Writes one line to stderr, over a line of progress; a closed stderr must not stop an import."""
    line = "attuned-store: " + printable(re.sub(r"[\r\n]+", " ", message).strip())
    try:
        if is_terminal(sys.stderr):
            line = "\r" + line.ljust(_PROGRESS_WIDTH)
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        mute(sys.stderr)


def show(args: argparse.Namespace, record: Mapping[str, object], text: str) -> None:
    """Prints a record as JSON where that was asked for, else a line of text."""
    print(json.dumps(record) if args.json else printable(text))


def show_table(
    args: argparse.Namespace,
    records: Iterable[Mapping[str, object]],
    rows: Sequence[Sequence[str]],
    *,
    heading: Sequence[str] = (),
    otherwise: str = "",
) -> None:
    """Prints records as JSON, one a line, where that was asked for, else rows as a table.

    On a terminal rich draws it, where it is installed; elsewhere it is aligned text, two spaces apart.
    """
    if args.json:
        for record in records:
            print(json.dumps(record))
        return
    if not rows:
        print(otherwise)
        return
    cells = [[printable(cell) for cell in row] for row in rows]
    if is_terminal(sys.stdout):
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass  # plain text, below
        else:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=bool(heading), show_edge=False)
            for name in heading or rows[0]:
                table.add_column(name, overflow="fold")  # nothing is cut off
            for row in cells:
                table.add_row(*map(Text, row))
            Console().print(table)
            return
    cells = [list(heading), *cells] if heading else cells
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())


class Progress:
    """Shows on a terminal what is going on once it takes over a second; nothing elsewhere.

    rich draws a bar where it is installed; without it, the last line of the terminal tells the numbers.
    """

    def __init__(self, doing: str) -> None:
        self.done = 0
        self.total: int | None = None
        self._doing = doing
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

    def _run(self) -> None:
        began = time.monotonic()
        if self._ended.wait(1):
            return

        def numbers() -> str:
            total = f" of {self.total:,}" if self.total else ""
            done = f"{self.done:,}{total}, " if self.done else ""
            return f"{done}{time.monotonic() - began:.0f} s"

        with contextlib.suppress(OSError, ValueError):  # the terminal has gone: the work goes on
            try:
                from rich import console, progress
            except ImportError:
                self._run_plain(numbers)
                return
            columns = ("{task.description}", progress.BarColumn(24), "{task.fields[numbers]}")
            screen = console.Console(stderr=True)
            # rich keeps the bar below what is printed to stderr meanwhile; stdout may be a file.
            with progress.Progress(*columns, console=screen, transient=True, redirect_stdout=False) as bar:
                task = bar.add_task(self._doing, total=None, numbers=numbers())
                while not self._ended.wait(0.2):
                    bar.update(task, completed=self.done, total=self.total, numbers=numbers())

    def _run_plain(self, numbers: Callable[[], str]) -> None:
        while True:
            sys.stderr.write(f"\r{self._doing}: {numbers()}".ljust(_PROGRESS_WIDTH))
            sys.stderr.flush()
            if self._ended.wait(1):
                break
        sys.stderr.write("\r" + " " * _PROGRESS_WIDTH + "\r")
        sys.stderr.flush()


def confirm(args: argparse.Namespace, question: str, otherwise: str) -> None:
    """Asks before something is lost; where nobody can answer, refuses."""
    if args.yes:
        return
    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        raise CommandError(f"{args.command} asks on a terminal; elsewhere it needs --yes", 2)

    print(printable(f"{question}? [y/N]"), end=" ", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise CommandError(otherwise)

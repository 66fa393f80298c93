"""The commands import and export: between a store and a file of CSV or JSON lines."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import os
import secrets
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO, cast

from attuned_store import (
    CANONICAL_AXES,
    MemoryStoreConfig,
    StateSnapshot,
    StateStore,
    ValidationError,
    open_store,
    store_exists,
)

from .reading import FIELDS, FORMULA, BadRow, Table, file_kind, open_input
from .showing import CommandError, Progress, complain, is_terminal, listed, plural, show
from .states import open_existing, read_scale, target_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Iterator, Sequence

    from .states import Add


def _import(args: argparse.Namespace) -> int:
    """Checks the heading, then every row, and only then makes a new store and writes."""
    name, target = "stdin" if args.file == "-" else str(args.file), target_of(args)
    progress = Progress("importing")
    with contextlib.ExitStack() as stack:
        try:
            with Progress("waiting for input"):
                stream = stack.enter_context(open_input(args.file))
            store = stack.enter_context(open_existing(args)) if store_exists(target) else None
            axes = MemoryStoreConfig.from_env().axes if store is None else tuple(store.axes)
            try:
                table = Table(stream, file_kind(args.file, args.format), args.scale, raw=args.raw)
                StateSnapshot("columns", dict.fromkeys(table.axes, 0.5))  # names that can be axes, and not too many
                found, good, bad = _survey(table, name, axes)
                if bad and (args.strict or not good):
                    why = f"{plural(bad, 'bad row')}, and --strict" if args.strict else "there is no good row"
                    raise CommandError(why)
            except (CommandError, ValidationError) as error:
                raise CommandError(f"{name}: nothing was written: {error}") from None

            if store is None:
                # JSON lines have no heading: where all their axes are canonical, so is the store.
                canonical = not table.axes and set(found) <= set(CANONICAL_AXES)
                options = {} if axes or canonical else {"axes": tuple(found)}
                store = stack.enter_context(open_store(target, **options))
            with progress:
                counted = lambda done, _: progress.count(done, good)
                written = store.upsert_many(table.snapshots(), progress=counted)
        except KeyboardInterrupt:
            done = f"{plural(progress.done, 'snapshot')} were written" if progress.done else "nothing was written"
            raise CommandError(f"interrupted: {done}; importing {name} again is harmless", 130) from None

        why = table.failure or (written != good and "the file changed while it was read")
        if why:
            raise CommandError(f"{name}: {why} ({plural(written, 'snapshot')} before that were written)")
        users, snapshots = store.count(), store.count(history=True)
    record = {"written": written, "bad_rows": bad, "users": users, "snapshots": snapshots}
    skipped = f", skipped {plural(bad, 'bad row')}" if bad else ""
    now = f"{target} has {plural(users, 'user')}, {plural(snapshots, 'snapshot')}"
    show(args, record, f"imported {plural(written, 'snapshot')}{skipped}; {now}")
    return 1 if bad else 0


def _survey(table: Table, name: str, known: Sequence[str] | None) -> tuple[list[str], int, int]:
    """Reads the file through and reports its bad rows; gives its axes, and how many rows are good and bad."""

    def check() -> None:
        unknown = [axis for axis in axes if known is not None and axis not in known]
        if unknown:
            has = f"it has {listed(sorted(known or ()))}"
            raise CommandError(f"the store has no axis {listed(unknown)} ({has})")

    axes = dict.fromkeys(table.axes)
    check()
    good = bad = 0
    with Progress("reading") as progress:
        for row in table.rows():
            if isinstance(row, BadRow):
                bad += 1
                complain(f"{name}: line {row.line}: {row.reason}")
            else:
                good += 1
                axes.update(dict.fromkeys(row.axes))
            progress.count(good + bad)
    check()
    return list(axes), good, bad


@contextlib.contextmanager
def _open_output(path: str) -> Generator[TextIO]:
    """Opens what export writes to, in UTF-8: stdout for -, a pipe or device in place, a file atomically."""
    if path == "-":
        binary: IO[bytes] | None = getattr(sys.stdout, "buffer", None)  # a notebook's stdout has none
        yield cast("TextIO", codecs.getwriter("utf-8")(binary)) if binary else sys.stdout
        return
    if Path(path).exists() and not Path(path).is_file():
        with Path(path).open("w", encoding="utf-8", newline="") as stream:
            yield stream
        return
    final = Path(path).resolve()
    beside = final.with_name(f".attuned-store-{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("x", encoding="utf-8", newline="") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(final)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(beside):
            error.filename = path  # the name that was asked for
        raise


def _writer(
    stream: TextIO, kind: str, axes: Sequence[str], *, raw: bool
) -> Callable[[StateSnapshot], object]:
    """Makes the function that writes one snapshot."""
    if kind == "jsonl":
        return lambda snapshot: stream.write(json.dumps(snapshot.to_dict()) + "\n")
    named = [axis for axis in axes if axis in FIELDS]
    if named:
        raise CommandError(f"the axis {named[0]} has the name of a field; export with --format jsonl")
    rows = csv.DictWriter(stream, [*FIELDS, *axes], lineterminator="\n", extrasaction="ignore")
    rows.writeheader()

    def write(snapshot: StateSnapshot) -> None:
        user_id = snapshot.user_id
        formula = not raw and FORMULA.match(user_id)
        row = {**snapshot.axes, **snapshot.to_dict(), "user_id": f"'{user_id}" if formula else user_id}
        rows.writerow(row)

    return write


def _all_states(store: StateStore, *, latest_only: bool) -> Iterator[StateSnapshot]:
    """Yields everything kept, each user's oldest first; the latest may have aged out of the history."""
    for user_id in store.users():
        latest = store.get_latest(user_id)
        history = [] if latest_only else store.get_history(user_id, 2**63 - 1)
        yield from reversed(history)
        if latest is not None and latest not in history:
            yield latest


def _export(args: argparse.Namespace) -> int:
    kind, count = file_kind(args.file, args.format) or "jsonl", 0
    watched = args.file == "-" and is_terminal(sys.stdout)  # what scrolls by needs no progress
    progress = Progress("exporting")
    with (
        open_existing(args) as store,
        _open_output(args.file) as stream,
        contextlib.nullcontext() if watched else progress,
    ):
        write = _writer(stream, kind, store.axes, raw=args.raw)
        for count, snapshot in enumerate(_all_states(store, latest_only=args.latest), 1):
            write(snapshot)
            progress.count(count)
    if args.file != "-":
        record = {"written": count, "file": args.file}
        show(args, record, f"exported {plural(count, 'snapshot')} to {args.file}")
    return 0


_NOTES = """
The columns user_id (required), updated_at_unix_ms, source, confidence and schema_version
are themselves; every other column is an axis, its name brought to snake_case. Empty cells
and NA are absent; a row without a time gets the time of the import. A bad row is reported
with its line and skipped, and the exit status is then 1. A new store takes the file's
columns as its axes (unless ATTUNED_STORE_AXES names them); an existing one keeps its own.
Columns are separated by commas, by tabs, or by semicolons, as Excel writes them with decimal
commas. Importing a file again changes nothing.
"""


def add_commands(add: Add) -> None:
    """Adds the commands import and export."""
    formats = ["csv", "jsonl"]
    parser = add(_import, "import", "read states from a file", "import film_mood.csv --scale 0:31", _NOTES)
    parser.add_argument("file", metavar="FILE", help="CSV or JSON lines, in UTF-8; - is stdin")
    scale = "what the axes were measured on; becomes 0..1; default: 0:1"
    parser.add_argument("--scale", type=read_scale, default="0:1", metavar="LOW:HIGH", help=scale)
    text = "default: by the name of the file, or its content"
    parser.add_argument("--format", choices=formats, help=text)
    parser.add_argument("--strict", action="store_true", help="write nothing at all if any row is bad")
    raw = "keep the apostrophe that export puts before ids such as '=1+1"
    parser.add_argument("--raw", action="store_true", help=raw)

    parser = add(_export, "export", "write all states to a file", "export states.csv")
    parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="default: stdout")
    text = "default: by the name of the file, or jsonl"
    parser.add_argument("--format", choices=formats, help=text)
    parser.add_argument("--latest", action="store_true", help="only each user's latest state, no history")
    raw = "put no apostrophe before ids in CSV that a spreadsheet would run, such as =1+1"
    parser.add_argument("--raw", action="store_true", help=raw)

"""The commands between stores and files: import, export, snapshot, restore, verify, snapshots, copy."""

import codecs
import contextlib
import csv
import json
import os
import re
import secrets
import sys
from argparse import Namespace
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import IO, TextIO, cast

import attuned_store
from attuned_store import (
    SnapshotReport,
    StateSnapshot,
    StateTable,
    TableReport,
    read_table,
    store_exists,
)

from . import showing
from .arguments import (
    Command,
    argument,
    did_you_mean,
    engine_of,
    is_memory,
    names,
    open_new,
    open_target,
    pair,
    scale,
    target_of,
    whole,
)
from .showing import CommandError, Progress, complain, confirm, listed, plural, show

# What export can write, by the ends of names; others are refused, none is JSON lines.
_WRITTEN = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", "": "jsonl"}
_FIELDS = ("user_id", "updated_at_unix_ms", "source", "confidence", "schema_version")
# What a spreadsheet would run gets an apostrophe, which read_table takes away again.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_MOST_COUNTED = 10_000  # users whose histories are counted after an import: 0.1 ms each


def _import(args: Namespace) -> int:
    """Checks the heading, then every row, and only then makes a new store and writes."""
    name, target = "stdin" if args.file == "-" else args.file, target_of(args)
    importing, report = Progress("importing"), TableReport()
    with contextlib.ExitStack() as stack:
        try:
            try:
                with Progress("waiting for input"):
                    table = _table(args)
                store = stack.enter_context(open_target(args)) if store_exists(target) else None
                known = store.axes if store else attuned_store.MemoryStoreConfig.from_env().axes
                _check_axes(table.axes, known)
                with Progress("reading") as progress:
                    report = table.check(progress=progress.count)
                _tell_bad_rows(name, report)
                _check_axes(table.axes, known)
                if report.bad and (args.strict or not report.good):
                    strict = f"{plural(report.bad, 'bad row')}, and --strict"
                    raise CommandError(strict if args.strict else "there is no good row")
            except (CommandError, attuned_store.ValidationError) as error:
                raise CommandError(f"{name}: nothing was written: {error}") from None

            if store is None:
                # JSON lines have no heading: where all their axes are canonical, so is the store.
                canonical = not table.has_heading and set(table.axes) <= set(attuned_store.CANONICAL_AXES)
                axes = None if known or canonical or not table.axes else table.axes
                store = stack.enter_context(open_new(args, axes))
            importing.total = report.good
            with importing:
                written = store.upsert_many(table, progress=importing.count)
            if written != report.good:
                raise CommandError("the file changed while it was read")
        except KeyboardInterrupt:
            done = f"{plural(importing.done, 'snapshot')} were" if importing.done else "nothing was"
            message = f"interrupted: {done} written; importing {name} again is harmless"
            raise CommandError(message, 130) from None
        except (OSError, CommandError, attuned_store.ValidationError) as error:
            if importing.total is None:
                raise
            done = f"{plural(importing.done, 'snapshot')} before that were written"
            raise CommandError(f"{name}: {error} ({done})") from None
        users = store.count()
        snapshots = store.count(history=True) if users <= _MOST_COUNTED else None
    skipped = f", skipped {plural(report.bad, 'bad row')}" if report.bad else ""
    now = f"{target} has {plural(users, 'user')}"
    now += "" if snapshots is None else f", {plural(snapshots, 'snapshot')}"
    record = {"written": written, "bad_rows": report.bad, "users": users, "snapshots": snapshots}
    show(args, record, f"imported {plural(written, 'snapshot')}{skipped}; {now}")
    return 1 if report.bad else 0


def _table(args: Namespace) -> StateTable:
    """The table that the arguments of import name."""
    scales = dict(args.scale)  # the last of each
    return read_table(
        sys.stdin.buffer if args.file == "-" else args.file,
        format=args.format,
        user_column=args.user_column,
        time_column=args.time_column,
        time_format=args.time_format,
        axes=args.axes,
        ignore=args.ignore,
        ignore_text=args.ignore_text,
        scale=scales.pop("", (0.0, 1.0)),
        scales=scales,
        absent=["", *args.absent],
        encoding=args.encoding,
        raw=args.raw,
    )


def _tell_bad_rows(name: str, report: TableReport) -> None:
    """Tells the first bad rows, how many others there are for what reason, and what may help."""
    for each in report.examples:
        complain(f"{name}: {report.unit} {each.row}: {each.reason}")
    if report.bad > len(report.examples):
        reasons = [f"{count:,} x {reason}" for reason, count in report.reasons.items()]
        complain(f"{name}: {plural(report.bad, 'bad row')}: {listed(reasons, 5)}")
    if report.span is not None:
        low, high = report.span
        complain(f"{name}: values span {low:g} to {high:g}: try --scale {low:g}:{high:g}")
    for hint in report.hints:
        complain(f"{name}: {hint}")


def _check_axes(axes: Iterable[str], known: Sequence[str] | None) -> None:
    """Refuses names that cannot be axes, or too many, and those that the store does not have."""
    StateSnapshot("columns", dict.fromkeys(axes, 0.5))
    if known is not None and (unknown := [axis for axis in axes if axis not in known]):
        without = f"--ignore {','.join(unknown[:10])} leaves out what it has not"
        near = did_you_mean(unknown[0], known)
        raise CommandError(
            f"the store has no axis {listed(unknown)} (it has {listed(sorted(known))}){near}; {without}"
        )


def _export(args: Namespace) -> int:
    suffix = Path(args.file).suffix.lower() if args.file != "-" else ""
    kind, count = args.format or _WRITTEN.get(suffix), 0
    if kind is None:
        raise CommandError(f"export writes no {suffix} file: .csv, .json, .jsonl, or --format", 2)
    # What scrolls by on a terminal needs no progress.
    watched = args.file == "-" and showing.is_terminal(sys.stdout)
    progress = Progress("exporting")
    with (
        open_target(args) as store,
        _open_output(args.file) as stream,
        contextlib.nullcontext() if watched else progress,
    ):
        named = [axis for axis in store.axes if axis in _FIELDS]
        if named and kind == "csv":
            raise CommandError(f"the axis {named[0]} has the name of a field; export with --format jsonl")
        rows = csv.DictWriter(stream, [*_FIELDS, *store.axes], lineterminator="\n", extrasaction="ignore")
        if kind == "csv":
            rows.writeheader()
        first, between, last = ("[\n", ",\n", "\n]\n") if kind == "json" else ("", "\n", "\n")
        for user_id in store.users():
            latest = store.get_latest(user_id)
            states = [] if args.latest else store.get_history(user_id, 2**63 - 1)[::-1]
            if latest is not None and latest not in states:  # it has aged out of the history
                states.append(latest)
            for state in states:
                count += 1
                record = state.to_dict()
                if kind != "csv":
                    stream.write((between if count > 1 else first) + json.dumps(record))
                    continue
                formula = _FORMULA.match(user_id) and not args.raw
                rows.writerow({**state.axes, **record, "user_id": f"'{user_id}" if formula else user_id})
            progress.count(count)
        if kind != "csv" and (count or kind == "json"):
            stream.write(last if count else first + last)
    if args.file != "-":
        record = {"written": count, "file": args.file}
        show(args, record, f"exported {plural(count, 'snapshot')} to {args.file}")
    return 0


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


def _described(report: SnapshotReport) -> str:
    """Says what is in a snapshot file."""
    counted = "point" if report.kind == "native" else "state"
    count = None if report.points is None else plural(report.points, counted)
    size = None if report.bytes is None else plural(report.bytes, "byte")
    return ", ".join(filter(None, (report.kind, count, size)))


def _refuse_memory(target: str) -> None:
    if is_memory(target):
        raise CommandError(f"{target} is gone when the command ends: name a directory or a server", 2)


def _snapshot(args: Namespace) -> int:
    with open_target(args) as store, Progress("taking the snapshot") as progress:
        options = {"kind": args.kind, "keep": args.keep, "keep_remote": args.keep_remote}
        report = store.create_snapshot(args.directory, **options, progress=progress.count)
    took = f"{report.duration_ms / 1000:.2f} s"
    return show(args, report.to_dict(), f"wrote {report.path}: {_described(report)}, {took}")


def _restore(args: Namespace) -> int:
    target = target_of(args)
    _refuse_memory(target)
    if args.mode == "replace" and not args.yes and store_exists(target):
        with open_target(args) as store:
            users = store.count()
        if users:
            with Progress("verifying") as progress:  # a bad file is no reason to ask anything
                attuned_store.verify_snapshot(args.file, progress=progress.count)
            question = f"replace {plural(users, 'user')} of {target} by what {args.file} holds"
            confirm(args, question, "nothing was restored")
    options = engine_of(args)
    with Progress("restoring") as progress:
        report = attuned_store.restore(
            args.file,
            target,
            mode=args.mode,
            unchecked=args.unchecked,
            progress=progress.count,
            options=options,
        )
    with open_target(args) as store:
        now = f"{plural(store.count(), 'user')}, {plural(store.count(history=True), 'snapshot')}"
    text = f"restored {args.file} ({args.mode}: {_described(report)}); {target} has {now}"
    return show(args, report.to_dict(), text)


def _verify(args: Namespace) -> int:
    status = 0
    for file in args.files:
        try:
            with Progress("verifying") as progress:
                report = attuned_store.verify_snapshot(file, progress=progress.count)
        except attuned_store.StoreError as error:
            status, report = 1, SnapshotReport(status="failed", target=file, message=str(error))
            if not args.json:
                complain(str(error))
                continue
        more = _described(report)
        more += "" if report.users is None else f", {plural(report.users, 'user')}"
        more += "" if report.created_at is None else f", made {showing.iso_time(report.created_at)}"
        more += "" if report.axes is None else f", axes {listed(report.axes)}"
        verdict = f"is good, but {report.message}" if report.message else "is good"
        show(args, report.to_dict(), f"{file} {verdict}: {more}")
    return status


def _snapshots(args: Namespace) -> int:
    rows: list[list[str]] = []
    for report in (reports := attuned_store.list_snapshots(args.directory)):
        counts = (report.users, report.points, report.axes and len(report.axes), report.bytes)
        numbers = ["" if count is None else f"{count:,}" for count in counts]
        created_at = showing.iso_time(report.created_at) if report.created_at else ""
        rows.append([str(report.snapshot_name), str(report.kind), created_at, *numbers])
    heading = ("snapshot", "kind", "created_at", "users", "states", "axes", "bytes")
    records = [report.to_dict() for report in reports]
    return showing.show_table(args, records, rows, heading, otherwise="no snapshots")


def _copy(args: Namespace) -> int:
    _refuse_memory(args.target)
    with Progress("copying") as progress:
        report = attuned_store.copy(
            args.source,
            args.target,
            replace=args.replace,
            rename=dict(args.rename),
            drop=args.drop,
            progress=progress.count,
            options=engine_of(args),
        )
    text = f"copied {plural(report.points or 0, 'state')} from {args.source} to {args.target}"
    return show(args, report.to_dict(), text)


_NOTES = """
The columns user_id (required), updated_at_unix_ms or updated_at, source, confidence and
schema_version are themselves; every other column is an axis, its name brought to snake_case.
Times are milliseconds since 1970 or ISO 8601, in UTC unless they say otherwise; a row without
one gets the time of the import. Empty cells and NA are absent. Bad rows are skipped; the first
five are told with their reason, the others counted, and the exit status is then 1.

A new store takes the file's columns as its axes (unless ATTUNED_STORE_AXES names them); an
existing one keeps its own. CSV is separated by commas, by tabs, or by semicolons, as Excel
writes it with decimal commas. Importing a file again changes nothing, if its rows name their
time.
"""
_KIND = "default: native on a server whose node has all shards, portable elsewhere"
_BY_NAME = "default: by the file's name, else its content"
_READ = ["csv", "jsonl", "json", "parquet"]
IN_PLACE = "default: $QDRANT_SNAPSHOT_DIR or ./data/qdrant/snapshots"
_DIRECTORY = argument("directory", metavar="DIRECTORY", nargs="?", help=IN_PLACE)
_KEEP_HELP = "then remove all but the newest N of this collection and kind"
KEEP = argument("--keep", type=whole(1), metavar="N", help=_KEEP_HELP)
_FILE = argument("file", metavar="FILE")
_FILES = argument("files", metavar="FILE", nargs="+")
_NAME = "backups/20260117T120000.123Z-mood.attuned"
_ONE_SCALE = "what the axes, or one of them, were measured on; becomes 0..1; default: 0:1"
_IMPORT = (
    argument("file", metavar="FILE", help="CSV, JSON lines, a JSON array or Parquet; - is stdin"),
    argument("--scale", type=scale, action="append", default=[], metavar="[AXIS=]LOW:HIGH", help=_ONE_SCALE),
    argument("--user-column", metavar="NAME", help="whose states they are; default: user_id"),
    argument("--time-column", metavar="NAME", help="default: updated_at_unix_ms or updated_at"),
    argument("--time-format", metavar="FORM", help="s for seconds, or as of strptime, as in %%d.%%m.%%Y"),
    argument(
        "--axes", type=names, metavar="NAMES", help="the columns that are axes, between commas; no others"
    ),
    argument("--ignore", type=names, default=[], metavar="NAMES", help="columns to leave out"),
    argument("--ignore-text", action="store_true", help="leave out columns without numbers"),
    argument("--absent", type=names, default=["NA"], metavar="TEXTS", help="what no value is; default: NA"),
    argument("--encoding", default="utf-8-sig", metavar="NAME", help="default: UTF-8"),
    argument("--format", choices=_READ, help=_BY_NAME),
    argument("--strict", action="store_true", help="write nothing at all if any row is bad"),
    argument("--raw", action="store_true", help="keep the apostrophe before ids such as '=1+1"),
)
_EXPORT = (
    argument("file", metavar="FILE", nargs="?", default="-", help="default: stdout"),
    argument("--format", choices=["csv", "jsonl", "json"], help="default: by the file's name, else jsonl"),
    argument("--latest", action="store_true", help="only each user's latest state, no history"),
    argument("--raw", action="store_true", help="put no apostrophe before ids such as =1+1, a formula"),
)
_TAKE = (
    _DIRECTORY,
    argument("--kind", choices=["auto", "native", "portable"], default="auto", help=_KIND),
    KEEP,
    argument("--keep-remote", action="store_true", help="leave a native snapshot on the server too"),
)
_MODES = ["replace", "merge", "skip"]
_RESTORE = (
    _FILE,
    argument("--mode", choices=_MODES, default="replace", help="skip: users who are there; default: replace"),
    argument("--unchecked", action="store_true", help="also a native snapshot without its .sha256"),
    argument("--yes", action="store_true", help="do not ask before replacing"),
)
_ENDS = (
    argument("source", metavar="SOURCE", help="a directory, or http(s)://host:6333"),
    argument("target", metavar="TARGET", help="the same; a new store gets the axes of the source"),
    argument("--replace", action="store_true", help="replace what the target holds"),
    argument("--rename", type=pair, action="append", default=[], metavar="OLD=NEW", help="rename an axis"),
    argument("--drop", type=names, default=[], metavar="NAMES", help="axes to leave out, between commas"),
)

ROWS = (
    Command("import", _import, "read states from a file", "mood.csv --scale 0:31", _IMPORT, notes=_NOTES),
    Command("export", _export, "write all states to a file", "states.csv", _EXPORT),
)
BACKUPS = (
    Command("snapshot", _snapshot, "write a backup of the store", "backups --keep 7", _TAKE),
    Command("restore", _restore, "bring back what a backup holds", f"{_NAME} --yes", _RESTORE),
    Command("verify", _verify, "check backups; the status is 1 if one is bad", _NAME, (_FILES,), "files"),
    Command("snapshots", _snapshots, "list the backups in a directory", "backups", (_DIRECTORY,)),
    Command("copy", _copy, "copy a whole store into another", "http://localhost:6333 ./attuned_state", _ENDS),
)

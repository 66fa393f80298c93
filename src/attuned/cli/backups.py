"""The commands on backups: snapshot, restore, verify, snapshots, copy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from attuned_store import (
    SnapshotReport,
    StoreError,
    copy,
    list_snapshots,
    open_store,
    restore,
    store_exists,
    verify_snapshot,
)

from .showing import CommandError, Progress, complain, confirm, plural, show, show_table
from .states import is_memory, open_existing, target_of, whole

if TYPE_CHECKING:
    import argparse
    from datetime import datetime

    from .states import Add


def _described(report: SnapshotReport) -> str:
    """Says what is in a snapshot file."""
    counted = "point" if report.kind == "native" else "state"
    count = None if report.points is None else plural(report.points, counted)
    size = None if report.bytes is None else plural(report.bytes, "byte")
    return ", ".join(filter(None, (report.kind, count, size)))


def _iso(moment: datetime | None) -> str:
    return "" if moment is None else moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _refuse_memory(target: str) -> None:
    if is_memory(target):
        raise CommandError(f"{target} is gone when the command ends: name a directory or a server", 2)


def _snapshot(args: argparse.Namespace) -> int:
    with open_existing(args) as store, Progress("taking the snapshot") as progress:
        report = store.create_snapshot(
            args.directory,
            kind=args.kind,
            keep=args.keep,
            keep_remote=args.keep_remote,
            progress=progress.count,
        )
    took = f"{report.duration_ms / 1000:.2f} s"
    show(args, report.to_dict(), f"wrote {report.path}: {_described(report)}, {took}")
    return 0


def _restore(args: argparse.Namespace) -> int:
    target = target_of(args)
    _refuse_memory(target)
    if args.mode == "replace" and not args.yes and store_exists(target):
        with open_existing(args) as store:
            users = store.count()
        if users:
            with Progress("verifying") as progress:  # a bad file is no reason to ask anything
                verify_snapshot(args.file, progress=progress.count)
            question = f"replace {plural(users, 'user')} of {target} by what {args.file} holds"
            confirm(args, question, "nothing was restored")
    with Progress("restoring") as progress:
        report = restore(args.file, target, mode=args.mode, progress=progress.count)
    with open_store(target) as store:
        now = f"{plural(store.count(), 'user')}, {plural(store.count(history=True), 'snapshot')}"
    text = f"restored {args.file} ({args.mode}: {_described(report)}); {target} has {now}"
    show(args, report.to_dict(), text)
    return 0


def _verify(args: argparse.Namespace) -> int:
    status = 0
    for file in args.files:
        try:
            with Progress("verifying") as progress:
                report = verify_snapshot(file, progress=progress.count)
        except StoreError as error:
            status = 1
            if args.json:
                print(json.dumps(SnapshotReport(status="failed", target=file, message=str(error)).to_dict()))
            else:
                complain(str(error))
            continue
        users = None if report.users is None else plural(report.users, "user")
        axes = None if report.axes is None else plural(len(report.axes), "axis").replace("axiss", "axes")
        made = report.created_at and f"made {_iso(report.created_at)}"
        more = ", ".join(filter(None, (_described(report), users, axes, made)))
        show(args, report.to_dict(), f"{file} is good: {more}")
    return status


def _snapshots(args: argparse.Namespace) -> int:
    reports = list_snapshots(args.directory)
    heading = ("snapshot", "kind", "created_at", "users", "states", "axes", "bytes")
    rows = [
        (
            str(report.snapshot_name),
            str(report.kind),
            _iso(report.created_at),
            *(
                "" if number is None else f"{number:,}"
                for number in (report.users, report.points, report.axes and len(report.axes), report.bytes)
            ),
        )
        for report in reports
    ]
    records = [report.to_dict() for report in reports]
    show_table(args, records, rows, heading=heading, otherwise="no snapshots")
    return 0


def _copy(args: argparse.Namespace) -> int:
    _refuse_memory(args.target)
    with Progress("copying") as progress:
        report = copy(args.source, args.target, replace=args.replace, progress=progress.count)
    states = plural(report.points or 0, "state")
    show(args, report.to_dict(), f"copied {states} from {args.source} to {args.target}")
    return 0


DIRECTORY = "default: $QDRANT_SNAPSHOT_DIR or ./data/qdrant/snapshots"
KEEP = "then remove all but the newest N of this collection and kind"
_EXAMPLE = "backups/20260117T120000.123Z-attuned_state.attuned"


def add_commands(add: Add) -> None:
    """Adds the commands on backups."""
    parser = add(_snapshot, "snapshot", "write a backup of the store", "snapshot backups --keep 7")
    parser.add_argument("directory", metavar="DIRECTORY", nargs="?", help=DIRECTORY)
    text = "default: the server's own on a server whose node has all shards, portable elsewhere"
    parser.add_argument("--kind", choices=["auto", "native", "portable"], default="auto", help=text)
    parser.add_argument("--keep", type=whole(1), metavar="N", help=KEEP)
    text = "leave a native snapshot on the server too"
    parser.add_argument("--keep-remote", action="store_true", help=text)

    parser = add(_restore, "restore", "bring back what a backup holds", f"restore {_EXAMPLE} --yes")
    parser.add_argument("file", metavar="FILE")
    text = "replace what is there (the default), merge, or skip users who are there"
    parser.add_argument("--mode", choices=["replace", "merge", "skip"], default="replace", help=text)
    parser.add_argument("--yes", action="store_true", help="do not ask before replacing")

    text = "check backups; the status is 1 if one is bad"
    parser = add(_verify, "verify", text, f"verify {_EXAMPLE}", more="files")
    parser.add_argument("files", metavar="FILE", nargs="+")

    parser = add(_snapshots, "snapshots", "list the backups in a directory", "snapshots backups")
    parser.add_argument("directory", metavar="DIRECTORY", nargs="?", help=DIRECTORY)

    example = "copy http://localhost:6333 ./attuned_state"
    parser = add(_copy, "copy", "copy a whole store into another", example)
    parser.add_argument("source", metavar="SOURCE", help="a directory, or http(s)://host:6333")
    text = "the same; a new store gets the axes of the source"
    parser.add_argument("target", metavar="TARGET", help=text)
    parser.add_argument("--replace", action="store_true", help="replace what the target holds")

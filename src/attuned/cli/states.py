"""The commands on states: put, patch, get, history, users, search, delete, prune, health, count."""

from __future__ import annotations

import argparse
import math
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import attrs

from attuned_store import Source, StateSnapshot, StateStore, default_target, open_store, store_exists

from .reading import read_number, snake_case
from .showing import CommandError, Progress, confirm, iso_time, listed, plural, printable, show, show_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    class Add(Protocol):
        """Adds a command to the parser, and gives the parser of its arguments."""

        def __call__(
            self,
            run: Callable[[argparse.Namespace], int],
            name: str,
            help_: str,
            example: str,
            notes: str = "",
            *,
            more: str | None = None,
        ) -> argparse.ArgumentParser: ...


# The store that is meant


def target_of(args: argparse.Namespace) -> str:
    """Says which store is meant."""
    if args.store == "":
        raise CommandError("--store is empty", 2)
    return default_target() if args.store is None else args.store


def is_memory(target: str) -> bool:
    """Whether the store is gone when the command ends."""
    return re.fullmatch("memory:///?", target, re.IGNORECASE) is not None


def require_store(target: str) -> None:
    """Refuses to go on without a store, which reading must not make."""
    if not store_exists(target) and not is_memory(target):
        make = f"attuned-store --store {target} import FILE"
        raise CommandError(f"there is no store at {target}; 'put' makes one, or '{make}'")


def open_existing(args: argparse.Namespace) -> StateStore:
    """Opens the store for a command that must not make one."""
    target = target_of(args)
    require_store(target)
    with Progress("opening"):
        return open_store(target)


def _open_for(args: argparse.Namespace, snapshot: StateSnapshot) -> StateStore:
    """Opens the store, or makes one, for a snapshot to be written."""
    target = target_of(args)
    if not store_exists(target):  # a bad first write must leave no empty store behind: try it in memory
        with open_store("memory://") as rehearsal:
            rehearsal.upsert_latest(snapshot)
    with Progress("opening"):
        return open_store(target)


# Writing and reading


def _axes(texts: Sequence[str]) -> dict[str, float]:
    """Reads AXIS=VALUE arguments."""
    axes: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        axis = snake_case(name)
        if not equals or not axis:
            raise CommandError(f"axes are given as AXIS=VALUE, as in warmth=0.7, not {text!r}", 2)
        if axis in axes:
            raise CommandError(f"{axis} is given twice", 2)
        try:
            axes[axis] = read_number(value)
        except ValueError as error:
            raise CommandError(f"{axis}: {error}", 2) from None
    return axes


def _written(args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """The axes and fields that put and patch were given."""
    name, equals, value = args.user.partition("=")
    if equals and snake_case(name) and value:  # it would become a user of that name
        raise CommandError(f"the user comes first, as in '{args.command} alice {args.user}'", 2)
    names = ("updated_at_unix_ms", "source", "confidence", "schema_version")
    return _axes(args.pairs), {name: vars(args)[name] for name in names if vars(args)[name] is not None}


def _axes_shown(snapshot: StateSnapshot, order: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, f"{snapshot.axes[name]:.3f}") for name in order if name in snapshot.axes]


def _show_state(args: argparse.Namespace, snapshot: StateSnapshot, order: Sequence[str]) -> int:
    axes = [(f"  {name}", value) for name, value in _axes_shown(snapshot, order)]
    rows = [
        ("user_id", snapshot.user_id),
        ("updated_at", iso_time(snapshot.updated_at_unix_ms)),
        ("source", str(snapshot.source)),
        ("confidence", f"{snapshot.confidence:g}"),
        ("schema_version", str(snapshot.schema_version)),
        ("axes", "" if axes else "none (neutral)"),
        *axes,
    ]
    show_table(args, [snapshot.to_dict()], rows)
    return 0


def _put(args: argparse.Namespace) -> int:
    axes, fields = _written(args)
    snapshot = StateSnapshot(user_id=args.user, axes=axes, **fields)
    with _open_for(args, snapshot) as store:
        store.upsert_latest(snapshot)
        return _show_state(args, snapshot, store.axes)


def _patch(args: argparse.Namespace) -> int:
    axes, fields = _written(args)
    with _open_for(args, StateSnapshot(user_id=args.user, axes=axes, **fields)) as store:
        return _show_state(args, store.patch(args.user, axes, **fields), store.axes)


def _get(args: argparse.Namespace) -> int:
    with open_existing(args) as store:
        return _show_state(args, store[args.user], store.axes)


def _history(args: argparse.Namespace) -> int:
    with open_existing(args) as store:
        states = store.get_history(args.user, args.limit, since=args.since, until=args.until)
        _ = states or store[args.user]  # raises where there is no such user
        order = store.axes
    rows = [
        (
            iso_time(state.updated_at_unix_ms),
            str(state.source),
            f"{state.confidence:g}",
            " ".join(map("=".join, _axes_shown(state, order))) or "neutral",
        )
        for state in states
    ]
    heading = ("updated_at", "source", "confidence", "axes")
    show_table(args, [state.to_dict() for state in states], rows, heading=heading, otherwise="no history")
    return 0


def _users(args: argparse.Namespace) -> int:
    with open_existing(args) as store:
        for user_id in store.users():
            show(args, {"user_id": user_id}, user_id)
    return 0


def _search(args: argparse.Namespace) -> int:
    if bool(args.pairs) == (args.like is not None):
        raise CommandError("search needs either --like USER or AXIS=VALUE pairs", 2)
    query = _axes(args.pairs) if args.like is None else args.like
    with open_existing(args) as store, Progress("searching"):
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
    rows = [
        (
            f"{match.score:.4f}",
            match.snapshot.user_id,
            iso_time(match.snapshot.updated_at_unix_ms),
            str(match.snapshot.source),
            f"{match.snapshot.confidence:g}",
        )
        for match in matches
    ]
    records = [{"score": match.score, **match.snapshot.to_dict()} for match in matches]
    heading = ("score", "user_id", "updated_at", "source", "confidence")
    show_table(args, records, rows, heading=heading, otherwise="no match")
    return 0


def _delete(args: argparse.Namespace) -> int:
    target = target_of(args)
    require_store(target)
    for user_id in args.users:
        StateSnapshot(user_id, {})  # a bad id is found before the first is deleted
    whose = f"{plural(len(args.users), 'user')} ({listed(args.users)})"
    confirm(args, f"delete {whose} with all history from {target}", "nothing was deleted")
    with open_existing(args) as store:
        for user_id in args.users:
            deleted = store.delete(user_id)
            text = f"deleted {user_id}" if deleted else f"there was no {user_id}"
            show(args, {"user_id": user_id, "deleted": deleted}, text)
    return 0


def _prune(args: argparse.Namespace) -> int:
    with open_existing(args) as store, Progress("pruning"):
        removed = store.prune()
    show(args, {"removed": removed}, f"removed {plural(removed, 'snapshot')}")
    return 0


def _health(args: argparse.Namespace) -> int:
    with open_existing(args) as store, Progress("checking"):
        health = store.health()
    record = {name: value for name, value in attrs.asdict(health).items() if value is not None}
    rows = [(name, f"{found:.3f}" if isinstance(found, float) else str(found)) for name, found in record.items()]
    show_table(args, [record], rows)
    return 1 if health.status == "unhealthy" else 0


def _count(args: argparse.Namespace) -> int:
    with open_existing(args) as store, Progress("counting"):
        number = store.count(history=args.history)
    show(args, {"snapshots" if args.history else "users": number}, str(number))
    return 0


# Arguments


def whole(least: int, most: int = 10**9 - 1) -> Callable[[str], int]:
    """Makes the reader of a whole number within bounds."""

    def read(text: str) -> int:
        if re.fullmatch(r"\d{1,9}", text, re.ASCII) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"a whole number from {least} to {most} is needed, not {text!r}")

    return read


def read_scale(text: str) -> tuple[float, float]:
    """Reads LOW:HIGH."""
    low, _, high = text.partition(":")
    try:
        scale = read_number(low), read_number(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"LOW:HIGH is two numbers, as in 0:31, not {text!r}") from None
    if not 0 < scale[1] - scale[0] < math.inf:
        raise argparse.ArgumentTypeError(f"LOW is to be less than HIGH, not {text!r}")
    return scale


def _real(text: str) -> float:
    try:
        return read_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _moment(text: str) -> int:
    """Reads a time: milliseconds since 1970, or ISO 8601, which is UTC unless it says otherwise."""
    if re.fullmatch(r"-?\d{1,19}", text, re.ASCII):
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    except (ValueError, OverflowError):
        message = f"a time is milliseconds since 1970 or ISO 8601, as in 2026-01-17T12:00Z, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None


_SOURCES = [source.value for source in Source]
_TIME = "milliseconds since 1970, or ISO 8601"


def _add_range(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", type=_moment, metavar="TIME", help=f"{_TIME}; inclusive")
    parser.add_argument("--until", type=_moment, metavar="TIME", help="the same")


def add_commands(add: Add) -> None:
    """Adds the commands on states."""
    for run, name, text, example in (
        (_put, "put", "write a user's state", "put alice warmth=0.8 urgency_sensitivity=0.2"),
        (_patch, "patch", "change some axes of a user's state", "patch alice warmth=0.6"),
    ):
        parser = add(run, name, text, example, more="pairs")
        parser.add_argument("user", metavar="USER")
        parser.add_argument("pairs", metavar="AXIS=VALUE", nargs="*", help="a value from 0 to 1")
        at = {"type": _moment, "metavar": "TIME", "dest": "updated_at_unix_ms"}
        parser.add_argument("--at", **at, help=f"{_TIME}; default: now")
        parser.add_argument("--source", choices=_SOURCES)
        parser.add_argument("--confidence", type=_real, metavar="0..1")
        parser.add_argument("--schema-version", type=whole(1), metavar="N")

    parser = add(_get, "get", "show a user's latest state", "get alice --json")
    parser.add_argument("user", metavar="USER")

    parser = add(_history, "history", "show a user's states, newest first", "history alice --limit 5")
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--limit", type=whole(0), default=100, metavar="N", help="default: 100")
    _add_range(parser)

    add(_users, "users", "list the users", "users")

    example = "search --like alice --limit 3"
    parser = add(_search, "search", "find similar states, best first", example, more="pairs")
    parser.add_argument("pairs", metavar="AXIS=VALUE", nargs="*", help="what to look for, unless --like")
    like = "look for states like this user's latest, others' only"
    parser.add_argument("--like", metavar="USER", help=like)
    parser.add_argument("--limit", type=whole(1), default=10, metavar="N", help="default: 10")
    parser.add_argument("--threshold", type=_real, metavar="SCORE", help="the least score, -1..1")
    parser.add_argument("--user", metavar="USER", help="only this user's states")
    leave_out = parser.add_mutually_exclusive_group()
    leave_out.add_argument("--exclude", metavar="USER", help="all but this user's states")
    leave_out.add_argument("--include-self", action="store_true", help="do not leave out the user of --like")
    parser.add_argument("--source", choices=_SOURCES)
    parser.add_argument("--min-confidence", type=_real, metavar="0..1")
    _add_range(parser)
    history = "search all of the history, not only the latest states"
    parser.add_argument("--history", action="store_true", help=history)

    example = "delete alice bob --yes"
    parser = add(_delete, "delete", "delete users and their history", example, more="users")
    parser.add_argument("users", metavar="USER", nargs="+")
    parser.add_argument("--yes", action="store_true", help="do not ask")

    add(_prune, "prune", "remove what is past its retention", "prune")
    add(_health, "health", "check the store; the status is 1 if unhealthy", "health")
    parser = add(_count, "count", "count the users", "count --history")
    parser.add_argument("--history", action="store_true", help="count the snapshots in the history")

"""The commands on states: put, patch, get, history, users, search, delete, prune, health, count."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import attrs

from attuned_store import Source, StateSnapshot, axis_name, store_exists

from .arguments import Command, argument, axes_of, naming_users, number, open_target, target_of, whole
from .showing import CommandError, Progress, confirm, iso_time, listed, plural, show, show_table
from .times import FORMS, moment


def _state_given(args: Namespace) -> tuple[dict[str, float], dict[str, Any]]:
    """The axes and fields that put and patch were given."""
    name, _, value = args.user.partition("=")
    if value and axis_name(name):  # it would become a user of that name
        raise CommandError(f"the user comes first, as in '{args.command} alice {args.user}'", 2)
    names = ("updated_at_unix_ms", "source", "confidence", "schema_version")
    return axes_of(args.pairs), {name: vars(args)[name] for name in names if vars(args)[name] is not None}


def _axes(state: StateSnapshot, order: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, f"{state.axes[name]:.3f}") for name in order if name in state.axes]


def _fields(state: StateSnapshot) -> tuple[str, str, str]:
    return iso_time(state.updated_at_unix_ms), str(state.source), f"{state.confidence:g}"


def _show_state(args: Namespace, state: StateSnapshot, order: Sequence[str]) -> int:
    axes = [(f"  {name}", value) for name, value in _axes(state, order)]
    fields = (state.user_id, *_fields(state), str(state.schema_version), "" if axes else "none (neutral)")
    names = ("user_id", "updated_at", "source", "confidence", "schema_version", "axes")
    return show_table(args, [state.to_dict()], [*zip(names, fields, strict=True), *axes])


def _put(args: Namespace) -> int:
    axes, fields = _state_given(args)
    state = StateSnapshot(user_id=args.user, axes=axes, **fields)
    with open_target(args, state) as store:
        store.upsert_latest(state)
        return _show_state(args, state, store.axes)


def _patch(args: Namespace) -> int:
    axes, fields = _state_given(args)
    with open_target(args, StateSnapshot(user_id=args.user, axes=axes, **fields)) as store:
        return _show_state(args, store.patch(args.user, axes, **fields), store.axes)


def _get(args: Namespace) -> int:
    with open_target(args) as store, naming_users(store, args.user):
        return _show_state(args, store[args.user], store.axes)


def _history(args: Namespace) -> int:
    with open_target(args) as store, naming_users(store, args.user):
        states = store.get_history(args.user, args.limit, since=args.since, until=args.until)
        _ = states or store[args.user]  # raises where there is no such user
        axes = [" ".join(map("=".join, _axes(state, store.axes))) or "neutral" for state in states]
    rows = [(*_fields(state), shown) for state, shown in zip(states, axes, strict=True)]
    heading = ("updated_at", "source", "confidence", "axes")
    return show_table(args, [state.to_dict() for state in states], rows, heading, otherwise="no history")


def _users(args: Namespace) -> int:
    with open_target(args) as store:
        for user_id in sorted(store.users()):
            show(args, {"user_id": user_id}, user_id)
    return 0


def _search(args: Namespace) -> int:
    if args.pairs and "=" not in args.pairs[0] and args.store is None and store_exists(args.pairs[0]):
        args.store = args.pairs.pop(0)
    if bool(args.pairs) == (args.like is not None):
        raise CommandError("search needs either --like USER or AXIS=VALUE pairs", 2)
    if args.include_self and args.exclude is not None:
        raise CommandError("--exclude is not allowed with --include-self", 2)
    query = axes_of(args.pairs) if args.like is None else args.like
    with open_target(args) as store, naming_users(store, args.like), Progress("searching"):
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
    found = [(match.score, match.snapshot) for match in matches]
    records = [{"score": score, **state.to_dict()} for score, state in found]
    rows = [(f"{score:.4f}", state.user_id, *_fields(state)) for score, state in found]
    heading = ("score", "user_id", "updated_at", "source", "confidence")
    return show_table(args, records, rows, heading, otherwise="no match")


def _delete(args: Namespace) -> int:
    open_target(args).close()  # a store that is not there is no reason to ask anything
    for user_id in args.users:
        StateSnapshot(user_id, {})  # a bad id is found before the first is deleted
    whose = f"{plural(len(args.users), 'user')} ({listed(args.users)})"
    confirm(args, f"delete {whose} with all history from {target_of(args)}", "nothing was deleted")
    with open_target(args) as store:
        for user_id in args.users:
            deleted = store.delete(user_id)
            text = f"deleted {user_id}" if deleted else f"there was no {user_id}"
            show(args, {"user_id": user_id, "deleted": deleted}, text)
    return 0


def _prune(args: Namespace) -> int:
    with open_target(args) as store, Progress("pruning"):
        removed = store.prune()
    return show(args, {"removed": removed}, f"removed {plural(removed, 'snapshot')}")


def _health(args: Namespace) -> int:
    with open_target(args) as store, Progress("checking"):
        health = store.health()
    record = {name: value for name, value in attrs.asdict(health).items() if value is not None}
    rows = [(name, f"{it:.3f}" if isinstance(it, float) else str(it)) for name, it in record.items()]
    show_table(args, [record], rows)
    return 1 if health.status == "unhealthy" else 0


def _count(args: Namespace) -> int:
    with open_target(args) as store, Progress("counting"):
        count = store.count(history=args.history)
    return show(args, {"snapshots" if args.history else "users": count}, str(count))


_USER = argument("user", metavar="USER")
_SOURCE = argument("--source", choices=[source.value for source in Source])
_SINCE = argument("--since", type=moment, metavar="TIME", help=f"{FORMS}; inclusive")
_UNTIL = argument("--until", type=moment, metavar="TIME", help="the same")
_STATE = (
    _USER,
    argument("pairs", metavar="AXIS=VALUE", nargs="*", help="a value from 0 to 1"),
    argument("--at", type=moment, metavar="TIME", dest="updated_at_unix_ms", help=f"{FORMS}; default: now"),
    _SOURCE,
    argument("--confidence", type=number, metavar="0..1"),
    argument("--schema-version", type=whole(1), metavar="N"),
)
_HISTORY = (
    _USER,
    argument("--limit", type=whole(0), default=100, metavar="N", help="default: 100"),
    _SINCE,
    _UNTIL,
)
_SEARCH = (
    argument("pairs", metavar="[STORE] AXIS=VALUE", nargs="*", help="what to look for, unless --like"),
    argument("--like", metavar="USER", help="look for states like this user's latest, others' only"),
    argument("--limit", type=whole(1), default=10, metavar="N", help="default: 10"),
    argument("--threshold", type=number, metavar="SCORE", help="the least score, -1..1"),
    argument("--user", metavar="USER", help="only this user's states"),
    argument("--exclude", metavar="USER", help="all but this user's states"),
    argument("--include-self", action="store_true", help="do not leave out the user of --like"),
    _SOURCE,
    argument("--min-confidence", type=number, metavar="0..1"),
    _SINCE,
    _UNTIL,
    argument("--history", action="store_true", help="search all of the history, not only the latest states"),
)
_DELETE = (
    argument("users", metavar="USER", nargs="+"),
    argument("--yes", action="store_true", help="do not ask"),
)
_ALL = (argument("--history", action="store_true", help="count the snapshots in the history"),)

COMMANDS = (
    Command("put", _put, "write a user's state", "alice warmth=0.8 formality=0.2", _STATE, "pairs"),
    Command("patch", _patch, "change some axes of a user's state", "alice warmth=0.6", _STATE, "pairs"),
    Command("get", _get, "show a user's latest state", "alice --json", (_USER,)),
    Command("history", _history, "show a user's states, newest first", "alice --limit 5", _HISTORY),
    Command("users", _users, "list the users", ""),
    Command("search", _search, "find similar states, best first", "--like alice", _SEARCH, "pairs"),
    Command("delete", _delete, "delete users and their history", "alice bob --yes", _DELETE, "users"),
    Command("prune", _prune, "remove what is past its retention", ""),
    Command("health", _health, "check the store; the status is 1 if unhealthy", ""),
    Command("count", _count, "count the users", "--history", _ALL),
)

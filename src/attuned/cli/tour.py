"""The command tour: one user's state, who is alike and in what, and where to go on."""

import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from attuned_store import Axes

from .arguments import Command, argument, open_target, target_of
from .showing import CommandError, iso_time, plural, printable, show_table

_NAME = "attuned-store"
_MOST_COLUMNS = 3  # axes beside each of the alike: what fits into a terminal
_HALF = 10  # characters on each side of neutral


def _leaning(value: float) -> str:
    """A value as a bar from neutral, which is in the middle."""
    length = round(abs(value - 0.5) * 2 * _HALF)
    below, above = ("=" * length, "") if value < 0.5 else ("", "=" * length)
    return f"{below:>{_HALF}}|{above:<{_HALF}}"


def _tour(args: Namespace) -> int:
    target = target_of(args)
    with open_target(args) as store:
        user_id = args.user if args.user is not None else next(iter(store), None)
        if user_id is None:
            raise CommandError(f"{target} has no users yet: put or import some")
        state, users, order = store[user_id], store.count(), store.axes
        before = next((entry.axes for entry in store.get_history(user_id, 2)[1:]), Axes())
        strongest = sorted(state.axes, key=lambda name: -abs(state.axes[name] - 0.5))
        leans = any(value != 0.5 for value in state.axes.values())
        matches = store.search_similar(user_id, limit=5) if leans else []
    if args.json:
        alike = [{"score": match.score, **match.snapshot.to_dict()} for match in matches]
        return show_table(args, [{"state": state.to_dict(), "alike": alike}], [])

    facts = f"{iso_time(state.updated_at)}, {state.source}, confidence {state.confidence:g}"
    print(printable(f"{user_id}: {facts}"), end="\n\n")
    heading = ("axis", "now", "before", f"0{'neutral':^{2 * _HALF - 1}}1")
    axes = [
        (
            name,
            f"{state.axes[name]:.3f}",
            f"{before[name]:.3f}" if name in before else "",
            _leaning(state.axes[name]),
        )
        for name in order
        if name in state.axes
    ]
    show_table(args, [], axes, heading, otherwise="no axes: neutral")
    print(f"\nMost like this, of {plural(users, 'user')}:\n")
    columns = [name for name in order if name in strongest[:_MOST_COLUMNS]]
    rows = [
        [
            f"{match.score:.4f}",
            match.snapshot.user_id,
            *(f"{match.snapshot.axis(name):.3f}" for name in columns),
        ]
        for match in matches
    ]
    otherwise = "nobody else is there" if leans else "a neutral state leans nowhere"
    show_table(args, [], rows, ("score", "user_id", *columns), otherwise=otherwise)

    # In an environment that is not activated the command is called by its path, as it was now.
    called = sys.argv[0] if Path(sys.argv[0]).name == _NAME and shutil.which(_NAME) is None else _NAME
    prefix = f"{called} " + (f"--store {shlex.quote(target)} " if args.store is not None else "")
    who, axis = shlex.quote(user_id), strongest[0] if strongest else order[0]
    ways = (
        ("the states before", f"history {who}"),
        ("who is high in an axis", f"search {axis}=0.9"),
        ("to change one axis", f"patch {who} {axis}=0.6"),
        ("a backup of everything", "snapshot backups"),
        ("all commands", "--help"),
    )
    print("\nThe score compares directions: 1 is the same, -1 the opposite. Where to go on:\n")
    for what, words in ways:
        print(printable(f"  {what:<22}  {prefix}{words}"))
    return 0


_ARGUMENTS = (argument("user", metavar="USER", nargs="?", help="default: the first one that the store has"),)
TOUR = Command("tour", _tour, "show one user, who is alike, and where to go on", "alice", _ARGUMENTS)

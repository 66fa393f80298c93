"""The arguments of the command: how commands declare theirs, what they are read as, which store is meant."""

import argparse
import contextlib
import difflib
import itertools
import math
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

from attuned_store import (
    QdrantOptions,
    StateSnapshot,
    StateStore,
    UserNotFoundError,
    axis_name,
    default_target,
    open_store,
    store_exists,
)

from .showing import CommandError, Progress

Argument = tuple[tuple[str, ...], dict[str, Any]]


class Command(NamedTuple):
    """A command; its argument ``more`` may stand on both sides of an option."""

    name: str
    run: Callable[[argparse.Namespace], int]
    help: str
    example: str
    arguments: Sequence[Argument] = ()
    more: str | None = None
    notes: str = ""


def argument(*names: str, **options: Any) -> Argument:
    """What argparse's add_argument takes."""
    return names, options


def whole(least: int, most: int = 10**9 - 1) -> Callable[[str], int]:
    """Makes the reader of a whole number within bounds."""

    def read(text: str) -> int:
        if re.fullmatch(r"\d{1,9}", text, re.ASCII) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"a whole number from {least} to {most} is needed, not {text!r}")

    return read


def number(text: str) -> int | float:
    """Reads a decimal number; unlike float() neither 'nan' nor '1_000', and no integer is too long for it."""
    if re.fullmatch(r"\s*[+-]?\d{1,19}\s*", text, re.ASCII):
        return int(text)
    if not re.fullmatch(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*", text, re.ASCII):
        raise ValueError(f"not a number: {text[:40]!r}")
    return float(text)


def scale(text: str) -> tuple[str, tuple[float, float]]:
    """Reads LOW:HIGH, of all axes (""), or AXIS=LOW:HIGH."""
    axis, equals, ends = text.rpartition("=")
    try:
        low, high = map(number, ends.split(":"))
        if 0 < high - low < math.inf and bool(equals) == bool(axis):
            return axis, (low, high)
    except ValueError:
        pass  # as below
    raise argparse.ArgumentTypeError(f"LOW:HIGH is two numbers, the lower first, as in 0:31, not {text!r}")


def names(text: str) -> list[str]:
    """Reads names between commas."""
    return text.split(",")


def pair(text: str) -> tuple[str, str]:
    """Reads OLD=NEW."""
    old, equals, new = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"OLD=NEW is needed, not {text!r}")
    return old, new


def axes_of(texts: Sequence[str]) -> dict[str, float]:
    """Reads AXIS=VALUE arguments."""
    axes: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        axis = axis_name(name)
        if not equals or not axis:
            raise CommandError(f"axes are given as AXIS=VALUE, as in warmth=0.7, not {text!r}", 2)
        if axis in axes:
            raise CommandError(f"{axis} is given twice", 2)
        try:
            axes[axis] = number(value)
        except ValueError as error:
            raise CommandError(f"{axis}: {error}", 2) from None
    return axes


def target_of(args: argparse.Namespace) -> str:
    """Says which store is meant."""
    if args.store == "":
        raise CommandError("--store is empty", 2)
    return default_target() if args.store is None else args.store


def is_memory(target: str) -> bool:
    """Whether the store is gone when the command ends."""
    return re.fullmatch("memory:///?", target, re.IGNORECASE) is not None


def engine_of(args: argparse.Namespace) -> QdrantOptions:
    """The options of a store that --engine makes."""
    return {} if args.engine is None else {"engine": args.engine}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name may add: a known one that is like it."""
    found = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def open_new(args: argparse.Namespace, axes: Sequence[str] | None = None) -> StateStore:
    """Opens the store, with these axes where there are any."""
    options = engine_of(args)
    if axes is not None:
        options["axes"] = tuple(axes)
    with Progress("opening"):
        return open_store(target_of(args), **options)


def open_target(args: argparse.Namespace, first: StateSnapshot | None = None) -> StateStore:
    """Opens the store; makes one only for a first snapshot, which is tried in memory before.

    So reading makes no store, and a bad first write leaves no empty one behind.
    """
    target = target_of(args)
    if not store_exists(target) and not is_memory(target):
        if first is None:
            make = f"'put' makes one, or 'attuned-store --store {target} import FILE'"
            raise CommandError(f"there is no store at {target}; {make}")
        with open_store("memory://") as rehearsal:
            rehearsal.upsert_latest(first)
    return open_new(args)


_MOST_COMPARED = 20_000  # users, where one is not known


@contextlib.contextmanager
def naming_users(store: StateStore, user_id: str | None) -> Generator[None]:
    """Tells of a user who is not there with the whole id, and with one that is like it."""
    try:
        yield
    except UserNotFoundError:
        if user_id is None:
            raise
        users = itertools.islice(store.users(), _MOST_COMPARED)
        raise CommandError(f"no user {user_id!r}{did_you_mean(user_id, users)} in the store") from None

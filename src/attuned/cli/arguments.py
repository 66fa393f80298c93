"""The arguments of the command: how commands declare theirs, what they are read as, which store is meant."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from attuned_store import StateSnapshot, StateStore, default_target, open_store, store_exists

from .reading import number, snake_case
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


def scale(text: str) -> tuple[float, float]:
    """Reads LOW:HIGH."""
    try:
        low, high = map(number, text.split(":"))
        if 0 < high - low < math.inf:
            return low, high
    except ValueError:
        pass  # as below
    raise argparse.ArgumentTypeError(f"LOW:HIGH is two numbers, the lower first, as in 0:31, not {text!r}")


def axes_of(texts: Sequence[str]) -> dict[str, float]:
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
    with Progress("opening"):
        return open_store(target)

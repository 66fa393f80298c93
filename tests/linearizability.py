"""Whether there is an order in which what happened at one time could have happened one after the other.

A `Recorder` notes when each operation was called, when it returned and with what. `find_order` looks for
an order of the effects that a store with one caller could show, each at a moment between call and return: the
search of Wing and Gong, which never looks twice at one state after the same operations (Lowe).
"""

from __future__ import annotations

import itertools
import math
import random
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
from conformance import callback, state

from attuned_store import ConflictError, StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence

    from attuned_store import AsyncStateStore

MAXIMUM = 3  # entries in a history
CONFLICT = "conflict"
AMBIGUOUS = "conflict, or not"  # the write may have happened

Timeline = tuple[StateSnapshot, ...]  # of one user, ascending in time
World = tuple[Timeline, ...]  # of all users

# ------------------------------------------------------------------------------
# The store with one caller
# ------------------------------------------------------------------------------


class Step(NamedTuple):
    """One effect on one user (for a count, on any), and what the caller was answered."""

    kind: str
    user: int
    argument: Any
    answer: Any


def put(timeline: Timeline, *snapshots: StateSnapshot) -> Timeline:
    entries = {entry.updated_at_unix_ms: entry for entry in timeline}
    for snapshot in snapshots:
        entries[snapshot.updated_at_unix_ms] = snapshot
        entries = {time_ms: entries[time_ms] for time_ms in sorted(entries)[-MAXIMUM:]}
    return tuple(entries.values())


def newest(timeline: Timeline) -> StateSnapshot | None:
    return timeline[-1] if timeline else None


def bump(found: StateSnapshot | None, user_id: str) -> StateSnapshot:
    """What an update makes of the latest: it counts, so that none can get lost."""
    if found is None:
        return state(user_id, 0, {"formality": 0.0})
    count = round(found.axes.get("formality", 0.0) * 1_000) + 1
    axes = {**found.axes, "formality": count / 1_000}
    return attrs.evolve(found, axes=axes, updated_at_unix_ms=found.updated_at_unix_ms + 1)


def merged(found: StateSnapshot | None, snapshot: StateSnapshot) -> StateSnapshot:
    """What a patch with the axes of a snapshot makes of the latest; the clock of the test stands still."""
    return (found or StateSnapshot(snapshot.user_id, {}, 0)).patched(snapshot.axes)


def expecting(timeline: Timeline, argument: Any, answer: Any) -> Timeline | None:
    snapshot, expected = argument
    if newest(timeline) != expected:
        return timeline if answer == CONFLICT else None
    return put(timeline, snapshot) if answer is None else None


def replacing(timeline: Timeline, new: StateSnapshot, answer: Any) -> Timeline | None:
    return put(timeline, new) if answer == new else None


# What a user's timeline is after a step with this argument and answer; None: the answer cannot be.
STEPS: dict[str, Callable[[Timeline, Any, Any], Timeline | None]] = {
    "write": lambda timeline, snapshots, answer: put(timeline, *snapshots),
    "expected": expecting,
    "patch": lambda timeline, axes, answer: replacing(timeline, merged(newest(timeline), axes), answer),
    "update": lambda timeline, name, answer: replacing(timeline, bump(newest(timeline), name), answer),
    "delete": lambda timeline, _, answer: () if answer == bool(timeline) else None,
    "latest": lambda timeline, _, answer: timeline if answer == newest(timeline) else None,
    "history": lambda timeline, limit, answer: timeline if answer == [*timeline[::-1]][:limit] else None,
}
READS = frozenset({"latest", "history", "count"})


def take(world: World, step: Step) -> list[World]:
    """What a store may hold after a step; nothing where it would have answered something else."""
    if step.kind == "count":
        return [world] if step.answer == sum(map(bool, world)) else []
    if step.answer == AMBIGUOUS:
        return [world, *take(world, step._replace(answer=success(world[step.user], step)))]
    after = STEPS[step.kind](world[step.user], step.argument, step.answer)
    return [] if after is None else [(*world[: step.user], after, *world[step.user + 1 :])]


def success(timeline: Timeline, step: Step) -> StateSnapshot | None:
    """What a write would have answered that took effect now."""
    match step.kind:
        case "patch":
            return merged(newest(timeline), step.argument)
        case "update":
            return bump(newest(timeline), step.argument)
        case _:
            return None


# ------------------------------------------------------------------------------
# The search
# ------------------------------------------------------------------------------


class Event(NamedTuple):
    """A step with the moments of its call and return, and the one of the same batch that comes before it."""

    called: int
    returned: int
    step: Step
    after: Event | None = None


class Choice(NamedTuple):
    """An event that may come next, and what then has been done, as a set of bits, and is there."""

    index: int
    done: int
    world: World


class Search:
    """Puts one event after another, and takes them back where it is stuck."""

    def __init__(self, events: Sequence[Event], users: int) -> None:
        self._events = events
        self._by_call = sorted(range(len(events)), key=lambda index: events[index].called)
        self._index_of = {id(event): index for index, event in enumerate(events)}
        self._all = (1 << len(events)) - 1
        self._empty: World = ((),) * users

    def order(self) -> list[int] | None:
        chosen, seen = list[int](), set[tuple[int, World]]()
        stack = [self._choices(0, self._empty)]
        while len(chosen) < len(self._events):
            choice = next((each for each in stack[-1] if each[1:] not in seen), None)
            if choice is not None:
                seen.add(choice[1:])
                chosen.append(choice.index)
                stack.append(self._choices(choice.done, choice.world))
            elif chosen:
                stack.pop()
                chosen.pop()
            else:
                return None
        return chosen

    def _choices(self, done: int, world: World) -> Iterator[Choice]:
        """A read that can come now comes now, which loses nothing; only other events are tried in turn."""
        found = list[Choice]()
        for index in self._possible(done):
            step = self._events[index].step
            choices = [Choice(index, done | 1 << index, after) for after in take(world, step)]
            if choices and (step.kind in READS or step.answer == CONFLICT):
                return iter(choices)
            found += choices
        return iter(found)

    def _possible(self, done: int) -> list[int]:
        """The events that were called before any other that is left had returned."""
        first_return, found = math.inf, list[int]()
        for index in self._by_call:
            event = self._events[index]
            if event.called > first_return:
                break
            if not done >> index & 1:
                first_return = min(first_return, event.returned)
                if event.after is None or done >> self._index_of[id(event.after)] & 1:
                    found.append(index)
        return found


def find_order(events: Sequence[Event], users: int) -> list[int] | None:
    """An order of the events, by their indexes, that explains every answer; None if there is none."""
    return Search(events, users).order()


def shown(events: Sequence[Event]) -> str:
    """The events, one a line, for a message."""
    in_order = sorted(events, key=lambda event: event.called)
    return "\n".join(f"{event.called:4}..{event.returned:<4} {event.step}" for event in in_order)


# ------------------------------------------------------------------------------
# Programs and what they do
# ------------------------------------------------------------------------------


class Order(NamedTuple):
    """One operation that a program asks for: on which users, with which snapshots."""

    kind: str
    users: Sequence[int]
    snapshots: Sequence[StateSnapshot]
    limit: int


Program = list[Order]
Latest = dict[int, StateSnapshot | None]  # what a caller last read of a user
KINDS = {
    "write": 5,
    "expected": 2,
    "batch": 2,
    "patch": 2,
    "update": 3,
    "delete": 2,
    "latest": 4,
    "history": 3,
    "many": 2,
    "count": 1,
}


def make_programs(
    seed: str, names: Sequence[str], *, callers: int = 8, kinds: Mapping[str, int] = KINDS
) -> list[Program]:
    """What so many callers at most do, the same for the same seed; no two snapshots are alike."""
    source, numbers = random.Random(seed), itertools.count(1)

    def order() -> Order:
        (kind,) = source.choices(list(kinds), list(kinds.values()))
        users = source.choices(range(len(names)), k=source.randint(1, 4) if kind == "batch" else 1)
        snapshots = [
            state(names[user], source.randrange(-4, 5), {"warmth": next(numbers) / 1_000}) for user in users
        ]
        return Order(
            kind, range(len(names)) if kind == "many" else users, snapshots, source.randint(1, MAXIMUM)
        )

    return [[order() for _ in range(source.randint(2, 6))] for _ in range(source.randint(2, callers))]


class Recorder:
    """Runs programs against a store and notes what happened when.

    ``whole_batches``: the snapshots of one user in a batch are seen all at once, not one after the other.
    """

    def __init__(self, names: Sequence[str], *, whole_batches: bool, users_before: int = 0) -> None:
        self.names = names
        self.events: list[Event] = []
        self._whole_batches = whole_batches
        self._before = users_before
        self._clock = itertools.count()
        self._ticking = threading.Lock()  # counting alone is not safe without the lock of the interpreter

    async def run(
        self,
        store: AsyncStateStore,
        program: Program,
        pause: Callable[[], Coroutine[Any, Any, object]] | None = None,
    ) -> None:
        """Do what a program asks for, one after the other, letting others run in between."""
        last: Latest = {}
        for order in program:
            if pause is not None:
                await pause()
            expected = last.get(order.users[0])
            called = self._tick()
            try:
                answer = await self._start(store, order, expected)
            except ConflictError as conflict:
                answer = AMBIGUOUS if conflict.ambiguous else CONFLICT
            returned = self._tick()
            if order.kind == "latest":
                last[order.users[0]] = answer
            self.events += self._events_of(called, returned, order, expected, answer)

    def _tick(self) -> int:
        with self._ticking:
            return next(self._clock)

    def _start(self, store: AsyncStateStore, order: Order, expected: StateSnapshot | None) -> Awaitable[Any]:
        name = self.names[order.users[0]]
        operations: dict[str, Callable[[], Awaitable[Any]]] = {
            "write": lambda: store.upsert_latest(order.snapshots[0]),
            "expected": lambda: store.upsert_latest(order.snapshots[0], expected=expected),
            "batch": lambda: store.upsert_many(order.snapshots),
            "patch": lambda: store.patch(name, order.snapshots[0].axes),
            "update": lambda: store.update(name, callback(store, bumping(name)), attempts=1_000),
            "delete": lambda: store.delete(name),
            "latest": lambda: store.get_latest(name),
            "history": lambda: store.get_history(name, order.limit),
            "many": lambda: store.get_many([self.names[user] for user in order.users]),
            "count": store.count,
        }
        return operations[order.kind]()

    def _events_of(
        self, called: int, returned: int, order: Order, expected: StateSnapshot | None, answer: Any
    ) -> list[Event]:
        """What an operation did, step by step: what concerns many users is one step for each of them."""
        user, (snapshot, *_) = order.users[0], order.snapshots
        match order.kind:
            case "batch":
                return self._batch_events(called, returned, order)
            case "many":
                steps = [Step("latest", each, None, answer.get(self.names[each])) for each in order.users]
            case "write":
                steps = [Step("write", user, (snapshot,), answer)]
            case "expected":
                steps = [Step("expected", user, (snapshot, expected), answer)]
            case "patch":
                steps = [Step("patch", user, snapshot, answer)]
            case "update":
                steps = [Step("update", user, self.names[user], answer)]
            case "count":
                steps = [Step("count", user, None, answer - self._before)]
            case kind:
                steps = [Step(kind, user, order.limit, answer)]
        return [Event(called, returned, step) for step in steps]

    def _batch_events(self, called: int, returned: int, order: Order) -> list[Event]:
        by_user: dict[int, list[StateSnapshot]] = {}
        for user, snapshot in zip(order.users, order.snapshots, strict=True):
            by_user.setdefault(user, []).append(snapshot)
        events = list[Event]()
        for user, snapshots in by_user.items():
            before = None
            for part in [snapshots] if self._whole_batches else [[snapshot] for snapshot in snapshots]:
                before = Event(called, returned, Step("write", user, tuple(part), None), before)
                events.append(before)
        return events


def bumping(name: str) -> Callable[[StateSnapshot | None], Coroutine[Any, Any, StateSnapshot]]:
    """The function of an update."""

    async def fn(found: StateSnapshot | None) -> StateSnapshot:
        return bump(found, name)

    return fn

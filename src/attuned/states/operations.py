"""The operations of a store, written once for both forms."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from attuned.base.errors import ConflictError, T, ValidationError, short_id, type_name
from attuned.base.values import SnapshotFields, StateSnapshot, check_user_id
from attuned.connections.runtime import async_sleep
from attuned.states.contract import BATCH_SIZE, Cursor


def check_update(user_id: str, latest: StateSnapshot | None, new: object) -> StateSnapshot | None:
    """Check what the function of an ``update`` gave."""
    if new is None:
        return None
    if not isinstance(new, StateSnapshot):
        raise ValidationError(
            f"update: the function must return a StateSnapshot or None, got {type_name(new)}"
        )
    if new.user_id != user_id:
        raise ValidationError("user_id: the function of an update must return a snapshot of the same user")
    if latest is not None and new.updated_at_unix_ms <= latest.updated_at_unix_ms:
        raise ValidationError(
            f"updated_at_unix_ms: an update must be newer than {latest.updated_at_unix_ms}, "
            f"got {new.updated_at_unix_ms}; StateSnapshot.patched sets it so"
        )
    return new


def backoff(attempt: int, *, base: float = 0.001, cap: float = 0.1) -> float:
    """Seconds to wait after a failed attempt, counted from 0: full jitter, none after the first.

    Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return random.uniform(0.0, min(cap, base * 2.0**attempt)) if attempt else 0.0


def next_page(remaining: Iterator[str]) -> tuple[list[str], Iterator[str] | None]:
    """A page of ids that are in memory, and the cursor to the next one."""
    page = list(itertools.islice(remaining, BATCH_SIZE))
    return page, remaining if len(page) == BATCH_SIZE else None


def check_batches(
    snapshots: Iterable[StateSnapshot], check: Callable[[StateSnapshot], object], size: int
) -> Iterator[list[StateSnapshot]]:
    """Cut into batches, checked before they are handed out: a list or tuple whole, others batch by batch."""
    if isinstance(snapshots, StateSnapshot) or not isinstance(snapshots, Iterable):
        raise ValidationError(
            f"snapshots: an iterable of StateSnapshot is needed, got {type_name(snapshots)}"
        )
    known = isinstance(snapshots, list | tuple)
    if known:
        for snapshot in snapshots:
            check(snapshot)
    failures: list[Exception] = []
    remaining = _until_failure(iter(snapshots), failures)
    while batch := list(itertools.islice(remaining, size)):
        if not known:
            for snapshot in batch:
                check(snapshot)
        yield batch
    for failure in failures:
        raise failure


def _until_failure(items: Iterator[T], failures: list[Exception]) -> Iterator[T]:
    """Note an error of the caller's iterator, so that what came before it is dealt with first."""
    try:
        yield from items
    except Exception as failure:  # noqa: BLE001 - it is raised again
        failures.append(failure)


def known_length(snapshots: Iterable[StateSnapshot]) -> int | None:
    try:
        return len(cast("Any", snapshots))
    except TypeError:
        return None


def id_batches(user_ids: Iterable[str], size: int) -> Iterator[list[str]]:
    if isinstance(user_ids, str) or not isinstance(user_ids, Iterable):
        raise ValidationError(f"user_ids: an iterable of user ids is needed, got {type_name(user_ids)}")
    checked = list(dict.fromkeys(check_user_id(user_id) for user_id in user_ids))
    return (checked[start : start + size] for start in range(0, len(checked), size))


def patch_function(
    user_id: str, axes: Mapping[str, float], fields: SnapshotFields
) -> Callable[[StateSnapshot | None], StateSnapshot]:
    """The function of the update that a patch is."""
    patch = StateSnapshot(user_id, {}, updated_at_unix_ms=0).patched(axes, **fields)  # raises before any read

    def merge(latest: StateSnapshot | None) -> StateSnapshot:
        return patch if latest is None else latest.patched(axes, **fields)

    return merge


def gave_up_error(user_id: str, attempts: int) -> ConflictError:
    return ConflictError(
        f"user {short_id(user_id)!r}: still in conflict after {attempts} attempts; try again later"
    )


def numbered_batches(batches: Iterable[list[StateSnapshot]]) -> Iterator[tuple[int, list[StateSnapshot]]]:
    """With every batch, how many snapshots there are by its end."""
    done = 0
    for batch in batches:
        done += len(batch)
        yield done, batch


def iterate_pages(page: Callable[[Cursor], tuple[T, Cursor]]) -> Iterator[T]:
    """What the pages of a store hold, one after another."""
    held, cursor = page(None)
    yield held
    while cursor is not None:
        held, cursor = page(cursor)
        yield held


class NewUsers:
    """The snapshots of users whom a store did not have before; each user's come together."""

    def __init__(self) -> None:
        self._adding: str | None = None  # whose snapshots may go on in the next batch

    def among(
        self, batch: Sequence[StateSnapshot], there: Mapping[str, StateSnapshot]
    ) -> list[StateSnapshot]:
        """Those of a batch, of whose users these are there by now."""
        chosen = [each for each in batch if each.user_id not in there or each.user_id == self._adding]
        self._adding = chosen[-1].user_id if chosen and chosen[-1] is batch[-1] else None
        return chosen


class AsyncPages(AsyncIterator[T]):
    """The asynchronous form of iterate_pages, in which other tasks run between two of them.

    Not an asynchronous generator, which would want closing when an iteration is left early.
    """

    def __init__(self, page: Callable[[Cursor], Awaitable[tuple[T, Cursor]]]) -> None:
        self._page = page
        self._cursor: Cursor = None
        self._begun = False

    async def __anext__(self) -> T:
        if self._begun:
            if self._cursor is None:
                raise StopAsyncIteration
            await async_sleep(0)
        held, self._cursor = await self._page(self._cursor)
        self._begun = True
        return held


class UserPages(AsyncIterator[str]):
    """The users of one page after another."""

    def __init__(self, pages: AsyncIterator[list[str]]) -> None:
        self._pages = pages
        self._ready: deque[str] = deque()

    async def __anext__(self) -> str:
        while not self._ready:
            self._ready.extend(await anext(self._pages))
        return self._ready.popleft()


async def sum_pages(pages: AsyncIterator[int]) -> int:
    total = 0
    async for count in pages:
        total += count
    return total

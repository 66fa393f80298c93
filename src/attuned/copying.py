"""From store to store, and snapshots when an application starts."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, cast

from attuned.base.config import FALSE_WORDS, TRUE_WORDS, check_flag
from attuned.base.errors import LOGGER, SnapshotError, StoreError, ValidationError, type_name
from attuned.base.values import SnapshotReason, SnapshotReport, StateSnapshot
from attuned.connections.runtime import run_in_thread
from attuned.open import is_absent, open_async_store, open_store
from attuned.snapshots.archive import Progress, check_progress
from attuned.snapshots.directory import (
    NewFile,
    SnapshotFile,
    absolute_path,
    describe_snapshot,
    make_snapshot_directory,
    snapshot_directory,
    snapshot_errors,
    snapshots_in,
)
from attuned.states.operations import AsyncPages, iterate_pages
from attuned.stores import AsyncQdrantStore, AsyncStateStore, QdrantStore, StateStore

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def verify_snapshot(path: str | os.PathLike[str], *, progress: Progress | None = None) -> SnapshotReport:
    """Check a snapshot file, without a store.

    A portable one is read through: its digests, counts and every state. Of a native one, which only a server
    can read, the SHA-256 that was kept beside it, and its frame. ``progress(done, None)`` is called with the
    number of states read. Raises SnapshotError, which says what is wrong.
    """
    progress = check_progress(progress)
    saved = SnapshotFile(path)
    saved.verify(progress=progress)
    return saved.report(str(saved.path))


async def averify_snapshot(
    path: str | os.PathLike[str], *, progress: Progress | None = None
) -> SnapshotReport:
    """As verify_snapshot, in a worker thread, where ``progress`` is called too."""
    return await run_in_thread(lambda: verify_snapshot(path, progress=progress))


def list_snapshots(directory: str | os.PathLike[str] | None = None) -> list[SnapshotReport]:
    """The snapshot files in a directory, or in the configured one, newest first.

    Of each, the beginning and the end are read, not what is between: what a portable one says of its time,
    axes, users and states, unverified. ``axes``, ``users`` and ``points`` are None for native ones and those
    of version 0.1, whose time is that in their name; ``sha256`` is None for all. A file that is no snapshot,
    or of which beginning or end cannot be read, is listed with the status "failed" and a message. Raises
    SnapshotError for a directory that cannot be listed.
    """
    found = map(describe_snapshot, snapshots_in(snapshot_directory(directory)))
    return [report for report in found if report is not None]


async def alist_snapshots(directory: str | os.PathLike[str] | None = None) -> list[SnapshotReport]:
    """As list_snapshots, in a worker thread."""
    return await run_in_thread(lambda: list_snapshots(directory))


_Target = str | os.PathLike[str]


class _Digest:
    """What a store holds, in whatever order it comes: how much, and the sum of the SHA-256 of each state.

    Numbers count to about 1e-7: a server may change their last bits. The scale is an odd one, so that no
    decimal fraction stands where one such bit would make a difference.
    """

    def __init__(self) -> None:
        self.count = self._sum = 0

    def add(self, states: Iterable[StateSnapshot]) -> None:
        """Take in states."""
        for state in states:
            fields = (state.user_id, state.updated_at_unix_ms, state.source.value, state.schema_version)
            numbers = [(name, self._whole(value)) for name, value in sorted(state.axes.items())]
            text = repr((fields, self._whole(state.confidence), numbers))
            self._sum += int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
            self.count += 1

    @staticmethod
    def _whole(value: float) -> int:
        return math.floor((value + 0.0123456789) * 9_999_991.7)

    def check(self, other: _Digest) -> None:
        """Raise SnapshotError where another store does not hold the same."""
        if (self.count, self._sum % 2**256) != (other.count, other._sum % 2**256):
            raise SnapshotError(
                f"the copy holds {other.count} states, {self.count} were read, or they differ: is it written "
                "to by others, or does it keep less history (max_history_per_user, history_retention_days)?"
            )


def _copied(target: str, began: float, digest: _Digest) -> SnapshotReport:
    duration_ms = (time.perf_counter() - began) * 1000
    return SnapshotReport(
        status="completed", target=target, kind="portable", points=digest.count, duration_ms=duration_ms
    )


STORE_FORMS: dict[type, str] = {
    StateStore: "a synchronous store (open_store)",
    AsyncStateStore: "an asynchronous store (open_async_store)",
}


def _check_ends(source: object, target: object, kind: type[StateStore | AsyncStateStore]) -> None:
    """Raise where a copy has no source, or an end that is neither a store nor the place of one."""
    for name, end in (("source", source), ("target", target)):
        if not isinstance(end, kind | str | os.PathLike):
            raise ValidationError(
                f"{name}: {STORE_FORMS[kind]}, a path or a url is needed, got {type_name(end)}"
            )
    if isinstance(source, str | os.PathLike) and is_absent(cast("_Target", source)):
        raise StoreError(f"there is no store at {source}")


def _check_free(users: int, target: str, *, replace: bool) -> None:
    if users and not replace:
        raise ValidationError(
            f"replace: {target} holds {users} users; replace=True (or --replace) replaces them"
        )


def copy(
    source: StateStore | str | os.PathLike[str],
    target: StateStore | str | os.PathLike[str],
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> SnapshotReport:
    """Copy all that a store holds, latest states and history, to another one, of whatever engine.

    Both are stores or what open_store takes; a new target gets the axes of the source. The target must be
    empty, unless ``replace``; what it holds then is replaced as by restore_snapshot. At the end it is read
    and compared with what was read from the source. ``progress(done, None)`` is called with the number of
    states copied. Raises SchemaMismatchError, ValidationError, SnapshotError where the copy is not the same.
    """
    began, read = time.perf_counter(), _Digest()
    check_flag("replace", replace)
    progress = check_progress(progress)
    _check_ends(source, target, StateStore)
    with contextlib.ExitStack() as stack:
        origin = source if isinstance(source, StateStore) else stack.enter_context(open_store(source))
        if not isinstance(target, StateStore):
            target = stack.enter_context(open_store(target, axes=origin.axes))
        _check_free(target.count(), target._target(), replace=replace)
        with target._replacement(secrets.token_hex(16)) as staged:
            for states in iterate_pages(origin._page_of_states):
                read.add(states)
                staged.upsert_many(states)
                progress(read.count, None)
            if not target._has_native:  # a server is changed in place: nothing is beside it
                read.check(_digest(staged))
        read.check(_digest(target))
        return _copied(target._target(), began, read)


def _digest(store: StateStore) -> _Digest:
    digest = _Digest()
    for states in iterate_pages(store._page_of_states):
        digest.add(states)
    return digest


async def acopy(
    source: AsyncStateStore | str | os.PathLike[str],
    target: AsyncStateStore | str | os.PathLike[str],
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> SnapshotReport:
    """As copy, between asynchronous stores; other tasks run between batches."""
    began, read = time.perf_counter(), _Digest()
    check_flag("replace", replace)
    progress = check_progress(progress)
    await run_in_thread(lambda: _check_ends(source, target, AsyncStateStore))
    async with contextlib.AsyncExitStack() as stack:
        if not isinstance(source, AsyncStateStore):
            source = await stack.enter_async_context(open_async_store(source))
        await source._open()
        if not isinstance(target, AsyncStateStore):
            target = await stack.enter_async_context(open_async_store(target, axes=source.axes))
        _check_free(await target.count(), target._target(), replace=replace)
        async with target._replacement(secrets.token_hex(16)) as staged:
            async for states in AsyncPages(source._page_of_states):
                read.add(states)
                await staged.upsert_many(states)
                progress(read.count, None)
            if not target._has_native:  # as in copy
                read.check(await _adigest(staged))
        read.check(await _adigest(target))
        return _copied(target._target(), began, read)


async def _adigest(store: AsyncStateStore) -> _Digest:
    digest = _Digest()
    async for states in AsyncPages(store._page_of_states):
        digest.add(states)
    return digest


# On start

STARTED: set[tuple[str, str]] = set()  # what was done in this process, by target and collection


STARTED_STORES: weakref.WeakSet[Any] = weakref.WeakSet()  # of those in memory, which have no place


_started_lock = threading.Lock()


def snapshot_on_start(store: StateStore, *, timeout: float = 60.0, keep: int | None = None) -> SnapshotReport:
    """Take a snapshot when an application starts, if QDRANT_SNAPSHOT_ON_START is true, 1, yes, y or on.

    Once per process and store, into QDRANT_SNAPSHOT_DIR (default ./data/qdrant/snapshots), after waiting at
    most ``timeout`` seconds for a server; ``keep`` as in create_snapshot. Raises SnapshotError where the
    directory cannot be made or written, before the store is contacted. Any other failure is logged and
    returned as a report with the status "failed": it does not keep the application from starting.
    """
    skipped, directory = _start(store, StateStore)
    if skipped is not None:
        return skipped
    try:
        store.wait_until_ready(timeout)
        return store.create_snapshot(directory, reason="startup", keep=keep)
    except Exception as error:  # noqa: BLE001 - no backup is worse than no application, but not by much
        return failed_report(store._target(), "startup", error)


async def asnapshot_on_start(
    store: AsyncStateStore,
    *,
    timeout: float = 60.0,  # noqa: ASYNC109 - as in the other form
    keep: int | None = None,
) -> SnapshotReport:
    """As snapshot_on_start, for an asynchronous store."""
    skipped, directory = _start(store, AsyncStateStore)
    if skipped is not None:
        return skipped
    try:
        await store.wait_until_ready(timeout)
        return await store.create_snapshot(directory, reason="startup", keep=keep)
    except Exception as error:  # noqa: BLE001 - as in the other form
        return failed_report(store._target(), "startup", error)


def _start(
    store: StateStore | AsyncStateStore, kind: type[StateStore | AsyncStateStore]
) -> tuple[SnapshotReport | None, Path | None]:
    """The report where there is nothing to do, else the directory, which can be written to."""
    if not isinstance(store, kind):
        raise ValidationError(f"store: {STORE_FORMS[kind]} is needed, got {type_name(store)}")

    def skipped(message: str) -> tuple[SnapshotReport, None]:
        report = SnapshotReport(status="skipped", target=store._target(), reason="startup", message=message)
        return report, None

    wish = os.environ.get("QDRANT_SNAPSHOT_ON_START", "").strip().lower()
    if wish not in TRUE_WORDS:
        state = f"{wish[:40]!r}, not true, 1, yes, y or on" if wish else "not set"
        message = f"QDRANT_SNAPSHOT_ON_START is {state}"
        if wish and wish not in FALSE_WORDS:
            LOGGER.warning("no snapshot is taken: %s", message)
        return skipped(message)
    directory = make_snapshot_directory(None)
    with snapshot_errors(directory, "cannot be written"):
        NewFile(directory).discard()
    if not _is_first_start(store):
        return skipped("the snapshot on start was taken or tried in this process already")
    return None, directory


def _is_first_start(store: StateStore | AsyncStateStore) -> bool:
    if isinstance(store, QdrantStore | AsyncQdrantStore):
        config = store.config
        place = config.url or os.path.realpath(absolute_path(cast("str", config.path)))
        started: Any = STARTED
        key: Any = (place, config.collection_name)
    else:
        started, key = STARTED_STORES, store
    with _started_lock:
        first = key not in started
        started.add(key)
    return first


def failed_report(target: str, reason: SnapshotReason, error: Exception) -> SnapshotReport:
    LOGGER.error("the snapshot of %s failed: %s", target, error)
    return SnapshotReport(status="failed", target=target, reason=reason, message=str(error))

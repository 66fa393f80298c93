"""From store to store, from files to stores, and snapshots when an application starts."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import attrs

from attuned.base.config import (
    FALSE_WORDS,
    TRUE_WORDS,
    MemoryStoreConfig,
    QdrantOptions,
    absolute_path,
    check_flag,
)
from attuned.base.errors import LOGGER, SnapshotError, StoreError, ValidationError, brief, nearest, type_name
from attuned.base.values import (
    SnapshotReason,
    SnapshotReport,
    StateSnapshot,
    shape_of,
    stored_snapshot,
    unsettled_message,
)
from attuned.connections.runtime import BLOCKING, Suspending, Waits, run
from attuned.open import open_async_store, open_store, store_exists, target_options
from attuned.snapshots.archive import Progress, RestoreMode, check_progress
from attuned.snapshots.directory import (
    NewFile,
    SnapshotFile,
    describe_snapshot,
    make_snapshot_directory,
    snapshot_directory,
    snapshot_errors,
    snapshots_in,
)
from attuned.stores import AsyncQdrantStore, AsyncStateStore, QdrantStore, StateStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from attuned.states.operations import Operations

AnyStore = StateStore | AsyncStateStore
Kind = TypeVar("Kind", bound=AnyStore)


@attrs.frozen
class Form(Generic[Kind]):
    """One of the two forms of stores."""

    kind: type[Kind]
    open: Callable[..., Kind]
    words: str
    make_waits: Callable[[], Waits]

    def check(self, name: str, store: object) -> None:
        """Raise ValidationError unless this is a store of the form."""
        if not isinstance(store, self.kind):
            raise ValidationError(f"{name}: {self.words} is needed, got {type_name(store)}")


SYNCHRONOUS = Form(StateStore, open_store, "a synchronous store (open_store)", lambda: BLOCKING)
ASYNCHRONOUS = Form(AsyncStateStore, open_async_store, "an asynchronous store (open_async_store)", Suspending)


# Files


def verify_snapshot(path: str | os.PathLike[str], *, progress: Progress | None = None) -> SnapshotReport:
    """Check a snapshot file, without a store.

    A portable one is read through: its digests, counts and every state. Of a native one, which only a server
    can read, the SHA-256 that was kept beside it, and its frame; where none is, the ``message`` of the report
    says so. ``progress(done, None)`` is called with the
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
    return await Suspending().call(lambda: verify_snapshot(path, progress=progress))


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
    return await Suspending().call(lambda: list_snapshots(directory))


def restore(
    path: str | os.PathLike[str],
    target: StateStore | str | os.PathLike[str],
    *,
    mode: RestoreMode = "replace",
    unchecked: bool = False,
    progress: Progress | None = None,
    options: QdrantOptions | None = None,
) -> SnapshotReport:
    """Bring back what a snapshot file holds into a store, which is made where there is none.

    ``target`` is a store, or a path or url, opened with the ``options`` of open_store; a new store gets
    the axes of the file, which is verified before. ``mode``, ``unchecked`` and ``progress`` are as in
    restore_snapshot. Raises SnapshotError, ValidationError.
    """
    return run(
        _restore(SYNCHRONOUS, path, target, options, mode=mode, unchecked=unchecked, progress=progress)
    )


async def arestore(
    path: str | os.PathLike[str],
    target: AsyncStateStore | str | os.PathLike[str],
    *,
    mode: RestoreMode = "replace",
    unchecked: bool = False,
    progress: Progress | None = None,
    options: QdrantOptions | None = None,
) -> SnapshotReport:
    """As restore, into an asynchronous store."""
    return await _restore(
        ASYNCHRONOUS, path, target, options, mode=mode, unchecked=unchecked, progress=progress
    )


async def _restore(
    form: Form[Kind],
    path: str | os.PathLike[str],
    target: Kind | str | os.PathLike[str],
    given: Mapping[str, Any] | None,
    *,
    mode: RestoreMode,
    unchecked: bool,
    progress: Progress | None,
) -> SnapshotReport:
    waits, options = form.make_waits(), dict(given or {})
    heard = check_progress(progress)
    ends = _Ends(form, waits)
    ends.check("target", target, options, writes=True)
    if isinstance(target, str | os.PathLike) and not await waits.call(lambda: store_exists(target)):
        saved = SnapshotFile(path)
        saved.check_mode(mode, native=target_options(target)[1].get("url") is not None)
        await waits.call(lambda: saved.verify(progress=heard))
        if saved.contents is not None:
            options.setdefault("axes", MemoryStoreConfig.from_env().axes or saved.contents.axes)
            unknown = sorted(set(saved.contents.axes).difference(options["axes"]))
            if unknown:
                raise SnapshotError(
                    f"{saved.path}: the configured axes (ATTUNED_STORE_AXES) lack {', '.join(unknown[:10])}"
                )
    try:
        store = await ends.open(target, **options)
        return await store.restore_snapshot(path, mode, progress, unchecked=unchecked)
    finally:
        await ends.close()


# Stores


class _Ends(Generic[Kind]):
    """The stores that something is copied between: those opened for it are closed at the end."""

    def __init__(self, form: Form[Kind], waits: Waits) -> None:
        self._form, self._waits = form, waits
        self._opened: list[Operations] = []

    def check(
        self, name: str, end: object, options: Mapping[str, Any] | None = None, *, writes: bool = False
    ) -> None:
        """Raise ValidationError for what is neither a store of this form nor the place of one."""
        if options and isinstance(end, self._form.kind):
            raise ValidationError(
                f"{min(options)}: the {name} is open already; options are for a path or url"
            )
        if not isinstance(end, self._form.kind | str | os.PathLike):
            raise ValidationError(
                f"{name}: {self._form.words}, a path or a url is needed, got {type_name(end)}"
            )
        if writes and isinstance(end, str) and target_options(end)[0]:
            raise ValidationError(
                f"{name}: what is written to {end} alone is gone at once; give an open store"
            )

    async def open(self, end: Kind | str | os.PathLike[str], **options: Any) -> Operations:
        """The operations of a store, opened where it is given by its place."""
        if isinstance(end, self._form.kind):
            operations = end._operations
        else:
            operations = self._form.open(end, **options)._operations
            self._opened.append(operations)
        await operations.open()
        return operations

    async def close(self) -> None:
        """Close what was opened, the last first."""
        while self._opened:
            await self._waits.shielded(self._opened.pop().close())


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


def copy(
    source: StateStore | str | os.PathLike[str],
    target: StateStore | str | os.PathLike[str],
    *,
    replace: bool = False,
    rename: Mapping[str, str] | None = None,
    drop: Iterable[str] = (),
    progress: Progress | None = None,
    options: QdrantOptions | None = None,
) -> SnapshotReport:
    """Copy all that a store holds, latest states and history, to another one, of whatever engine.

    Both are stores or what open_store takes, for the target with ``options``; a new target gets the axes of
    the source, those in ``rename`` under their new names, without those in ``drop``. The target must be
    empty, unless ``replace``; what it holds then is replaced as by restore_snapshot. At the end it is read
    and compared with what was read from the source. ``progress(done, None)`` is called with the number of
    states copied. Raises SchemaMismatchError, ValidationError, SnapshotError where the copy is not the same.
    """
    return run(
        _copy_states(
            SYNCHRONOUS, source, target, options, rename=rename, drop=drop, replace=replace, progress=progress
        )
    )


async def acopy(
    source: AsyncStateStore | str | os.PathLike[str],
    target: AsyncStateStore | str | os.PathLike[str],
    *,
    replace: bool = False,
    rename: Mapping[str, str] | None = None,
    drop: Iterable[str] = (),
    progress: Progress | None = None,
    options: QdrantOptions | None = None,
) -> SnapshotReport:
    """As copy, between asynchronous stores; other tasks run between batches."""
    return await _copy_states(
        ASYNCHRONOUS, source, target, options, rename=rename, drop=drop, replace=replace, progress=progress
    )


def _kept_axes(axes: Sequence[str], rename: Any, drop: Any) -> dict[str, str]:
    """The axes of a copy and what they are in the source, in the order of that."""
    renamed: Any = {} if rename is None else rename
    if not isinstance(renamed, Mapping):
        raise ValidationError(f"rename: a mapping from old to new names is needed, got {type_name(rename)}")
    if isinstance(drop, str) or not isinstance(drop, Iterable):
        raise ValidationError(f"drop: a list of axes is needed, got {type_name(drop)}")
    new_names = dict[Any, Any](cast("Any", renamed))
    dropped: list[Any] = list(cast("Any", drop))
    for option, named in (("rename", list(new_names)), ("drop", dropped)):
        for name in named:
            if name not in axes:
                near = nearest(name, axes) if isinstance(name, str) else ""
                raise ValidationError(f"{option}: the source has no axis {brief(name)}{near}")
    kept = [name for name in axes if name not in dropped]
    targets = shape_of(tuple(new_names.get(name, name) for name in kept)).names  # each once
    if not targets:
        raise ValidationError("drop: one axis at least must stay")
    return dict(zip(targets, kept, strict=True))


def _with_axes(state: StateSnapshot, kept: Mapping[str, str]) -> StateSnapshot:
    axes = {new: state.axes[old] for new, old in kept.items() if old in state.axes}
    fields = state.updated_at_unix_ms, state.source.value, state.confidence, state.schema_version
    return stored_snapshot(state.user_id, axes, *fields)


async def _copy_states(
    form: Form[Kind],
    source: Kind | str | os.PathLike[str],
    target: Kind | str | os.PathLike[str],
    options: Mapping[str, Any] | None,
    *,
    rename: object,
    drop: object,
    replace: bool,
    progress: Progress | None,
) -> SnapshotReport:
    began, read, waits = time.perf_counter(), _Digest(), form.make_waits()
    unsettled: list[str] = []
    check_flag("replace", replace)
    heard = check_progress(progress)
    ends = _Ends(form, waits)
    ends.check("source", source)
    ends.check("target", target, options, writes=True)
    if isinstance(source, str | os.PathLike) and not await waits.call(lambda: store_exists(source)):
        raise StoreError(f"there is no store at {source}")
    try:
        origin = await ends.open(source)
        kept = _kept_axes(origin.axes(), rename, drop)
        end = await ends.open(target, **{"axes": tuple(kept), **(options or {})})
        users = await end.count(history=False)
        if users and not replace:
            raise ValidationError(
                f"replace: {end.place.location} holds {users} users; "
                "replace=True (or --replace) replaces them"
            )

        async def fill(staged: Operations) -> None:
            pages = origin.states()
            while (page := await pages.next()) is not None:
                unsettled.extend(page.unsettled)
                states = [_with_axes(state, kept) for state in page.states] if rename or drop else page.states
                read.add(states)
                await staged.upsert_many(states, None)
                heard(read.count, None)
            if not end.backend.native_snapshots:  # a server is changed in place: nothing is beside it
                read.check(await _digest(staged))

        await end.replace(secrets.token_hex(16), fill)
        read.check(await _digest(end))
    finally:
        await ends.close()
    return SnapshotReport(
        status="completed",
        target=end.place.location,
        kind="portable",
        points=read.count,
        duration_ms=(time.perf_counter() - began) * 1000,
        message=unsettled_message(unsettled),
    )


async def _digest(store: Operations) -> _Digest:
    digest, pages = _Digest(), store.states()
    while (page := await pages.next()) is not None:
        digest.add(page.states)
    return digest


# On start


class Starts:
    """The stores of which a snapshot on start was taken or tried in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: set[tuple[str, str]] = set()  # by target and collection
        self._stores: weakref.WeakSet[Any] = weakref.WeakSet()  # those in memory, which have no place

    def is_first(self, store: AnyStore) -> bool:
        """Whether this store has not been here before."""
        seen: Any
        key: Any
        if isinstance(store, QdrantStore | AsyncQdrantStore):
            config = store.config
            place = config.url or os.path.realpath(absolute_path(cast("str", config.path)))
            seen, key = self._places, (place, config.collection_name)
        else:
            seen, key = self._stores, store
        with self._lock:
            first = key not in seen
            seen.add(key)
        return first

    def clear(self) -> None:
        """Forget all."""
        self._places.clear()
        self._stores.clear()


STARTS = Starts()


def snapshot_on_start(store: StateStore, *, timeout: float = 60.0, keep: int | None = None) -> SnapshotReport:
    """Take a snapshot when an application starts, if QDRANT_SNAPSHOT_ON_START is true, 1, yes, y or on.

    Once per process and store, into QDRANT_SNAPSHOT_DIR (default ./data/qdrant/snapshots), after waiting at
    most ``timeout`` seconds for a server; ``keep`` as in create_snapshot. Raises SnapshotError where the
    directory cannot be made or written, before the store is contacted. Any other failure is logged and
    returned as a report with the status "failed": it does not keep the application from starting.
    """
    SYNCHRONOUS.check("store", store)
    return run(_snapshot_on_start(store, timeout, keep))


async def asnapshot_on_start(
    store: AsyncStateStore,
    *,
    timeout: float = 60.0,  # noqa: ASYNC109 - as in the other form
    keep: int | None = None,
) -> SnapshotReport:
    """As snapshot_on_start, for an asynchronous store."""
    ASYNCHRONOUS.check("store", store)
    return await _snapshot_on_start(store, timeout, keep)


async def _snapshot_on_start(store: AnyStore, timeout: float, keep: int | None) -> SnapshotReport:  # noqa: ASYNC109
    def skipped(message: str) -> SnapshotReport:
        return SnapshotReport(status="skipped", target=store.location, reason="startup", message=message)

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
    if not STARTS.is_first(store):
        return skipped("the snapshot on start was taken or tried in this process already")
    operations = store._operations
    try:
        await operations.wait_until_ready(timeout)
        return await operations.create_snapshot(
            None, directory=directory, kind="auto", reason="startup", keep=keep, keep_remote=False
        )
    except Exception as error:  # noqa: BLE001 - no backup is worse than no application, but not by much
        return failed_report(store.location, "startup", error)


def failed_report(target: str, reason: SnapshotReason, error: Exception) -> SnapshotReport:
    """Log that a snapshot failed; the report says so."""
    LOGGER.error("the snapshot of %s failed: %s", target, error)
    return SnapshotReport(status="failed", target=target, reason=reason, message=str(error))

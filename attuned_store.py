"""The latest state snapshot of every user, with a bounded history, in memory or on disk.

A *state snapshot* holds some twenty axes such as warmth or cognitive_load, each from 0 to 1, with the
time it was taken, its source and a confidence. The same contract holds for every store, synchronous
(``MemoryStore``, ``QdrantStore``) and asynchronous (``AsyncMemoryStore``, ``AsyncQdrantStore``):

>>> store = open_store("memory://")
>>> store.upsert_latest(StateSnapshot("ada", {"warmth": 0.8, "urgency_sensitivity": 0.3}))
>>> store.get_latest("ada").axis("warmth")
0.8
>>> store.patch("ada", {"warmth": 0.6}).axis("urgency_sensitivity")
0.3
>>> [snapshot.axis("warmth") for snapshot in store.get_history("ada")]
[0.6, 0.8]
>>> store.search_similar({"warmth": 0.9}, limit=1)[0].snapshot.user_id
'ada'

``open_store("some/directory")`` gives the same store on disk, through Qdrant embedded in the process.

Every error is a ``StoreError``; its docstring shows the tree. Stores may be shared between threads, and
the asynchronous ones between tasks, under asyncio and trio. What a read returned never changes.
"""

# Made by src/make.py from src/attuned: edit there.

from __future__ import annotations

import base64
import codecs
import contextlib
import csv
import enum
import functools
import gzip
import hashlib
import heapq
import html
import inspect
import io
import itertools
import json
import logging
import math
import numbers
import operator
import os
import random
import re
import secrets
import shutil
import sqlite3
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import uuid
import warnings
import weakref
import zlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta
from http import HTTPStatus
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    ClassVar,
    Final,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    Self,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    get_args,
    overload,
)
from urllib.parse import quote, quote_plus, unquote_to_bytes, urlsplit
from urllib.parse import quote as urlquote

try:
    import attrs
    from cachetools import FIFOCache, LRUCache
except ImportError as error:
    raise ImportError("attuned_store needs attrs and cachetools: pip install attrs cachetools") from error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator
    from types import TracebackType

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

__version__ = "0.1.0"

__all__ = [
    "ANY",
    "CANONICAL_AXES",
    "AsyncCollection",
    "AsyncDocumentSet",
    "AsyncMemoryStore",
    "AsyncQdrantStore",
    "AsyncStateStore",
    "AsyncUserDocuments",
    "Axes",
    "BackendError",
    "BackendRejectedError",
    "BackendTimeoutError",
    "BackendUnavailableError",
    "BadRow",
    "BreakerPolicy",
    "CircuitOpenError",
    "Collection",
    "CollectionInfo",
    "ConflictError",
    "Document",
    "DocumentMatch",
    "DocumentSet",
    "Embedder",
    "EmbeddingError",
    "ErasureReport",
    "HashingEmbedder",
    "Health",
    "History",
    "Match",
    "Matches",
    "MemoryOptions",
    "MemoryStore",
    "MemoryStoreConfig",
    "MissingDependencyError",
    "QdrantOptions",
    "QdrantStore",
    "QdrantStoreConfig",
    "RateLimitedError",
    "RetryPolicy",
    "SchemaMismatchError",
    "SnapshotError",
    "SnapshotFields",
    "SnapshotReport",
    "Source",
    "StateSnapshot",
    "StateStore",
    "StateTable",
    "StoreClosedError",
    "StoreError",
    "StoreLockedError",
    "TableReport",
    "UnsupportedServerError",
    "UpsertReport",
    "UserDocuments",
    "UserNotFoundError",
    "ValidationError",
    "acopy",
    "alist_snapshots",
    "arestore",
    "asnapshot_on_start",
    "averify_snapshot",
    "axis_name",
    "copy",
    "default_target",
    "list_snapshots",
    "open_async_store",
    "open_store",
    "read_table",
    "restore",
    "service_app",
    "snapshot_app",
    "snapshot_on_start",
    "store_exists",
    "verify_snapshot",
]


# ------------------------------------------------------------------------------------------------------------
# attuned.base
# The bottom: errors, values, configuration, and what shows and reports them.
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# attuned.base.errors
# The errors that stores raise, and how their messages show values.
# ------------------------------------------------------------------------------------------------------------


T = TypeVar("T")
LOGGER = logging.getLogger("attuned_store")

# For what is slow, which nobody wants on the stderr of a program that has not set up logging.
SLOW_LOGGER = logging.getLogger("attuned_store.slow")


SLOW_LOGGER.addHandler(logging.NullHandler())


_SHOWN_CHARACTERS = 80  # of a value in an error message
_SHOWN_ID_CHARACTERS = 4


def brief(value: object) -> str:
    """A value for an error message: its repr, cut to a readable length."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - of a foreign class, or of an integer with more digits than Python writes
        return f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


def one_line(text: str) -> str:
    """Take line ends, terminal controls and lone surrogates out of a message."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+", " ", text).strip()


def printable(text: object) -> str:
    """A file's name for a message: what a terminal would obey, or not show, is written as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def type_name(value: object) -> str:
    """The type of a wrong argument, which may be somebody's id, for an error message."""
    return type(value).__name__


def short_id(user_id: str) -> str:
    """At most the first four characters: ids are personal data and must not fill logs."""
    return user_id if len(user_id) <= _SHOWN_ID_CHARACTERS else user_id[:_SHOWN_ID_CHARACTERS] + "…"


def plural(count: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


class StoreError(Exception):
    """Base of every error that a store raises.

    StoreError
    ├── ValidationError (ValueError)
    ├── UserNotFoundError (KeyError)
    ├── ConflictError
    ├── SchemaMismatchError
    ├── StoreClosedError
    ├── StoreLockedError
    ├── MissingDependencyError (ImportError)
    ├── UnsupportedServerError
    ├── SnapshotError
    └── BackendError
        ├── BackendUnavailableError
        ├── BackendTimeoutError
        ├── RateLimitedError
        ├── BackendRejectedError
        ├── CircuitOpenError
        └── EmbeddingError

    ``written`` is how many snapshots of an ``upsert_many`` had been written when it failed, else None.
    """

    written: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake_error, (type(self), self.args, dict(vars(self)))


def _remake_error(
    kind: type[StoreError], arguments: tuple[Any, ...], attributes: dict[str, Any]
) -> StoreError:
    """An error that was pickled or copied, whatever its constructor asks for."""
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    vars(error).update(attributes)
    return error


class ValidationError(StoreError, ValueError):
    """A value breaks a rule; nothing was written. The message names field, rule and value."""


class UserNotFoundError(StoreError, KeyError):
    """The store holds nothing for this user."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class ConflictError(StoreError):
    """The latest snapshot is not the expected one; nothing was written.

    With ``ambiguous`` the write may have happened and been overwritten since: read before trying again.
    """

    def __init__(self, message: str, *, ambiguous: bool = False) -> None:
        super().__init__(message)
        self.ambiguous = ambiguous


class SchemaMismatchError(StoreError):
    """The store on disk, or the one already open in this process, has another schema or setting."""


class StoreClosedError(StoreError):
    """The store was used after it had been closed."""


class StoreLockedError(StoreError):
    """Another process has the directory open."""


class MissingDependencyError(StoreError, ImportError):
    """An optional library is needed; the message says what to install."""


class UnsupportedServerError(StoreError):
    """The Qdrant server is too old."""


class SnapshotError(StoreError):
    """A backup is corrupt, incomplete, too new or unsafe."""


class BackendError(StoreError):
    """The engine beneath the store failed; ``from`` keeps its own error.

    ``backend`` and ``operation`` say where, ``retryable`` whether the same call may succeed later. With
    ``ambiguous`` what was asked for may have been done, as where a reply was lost, or where a flush failed
    after the write; without it, it has not been done. ``status`` is the HTTP status of a server's answer,
    None where none came.
    """

    def __init__(
        self,
        message: str,
        *,
        backend: str,
        operation: str,
        retryable: bool = False,
        ambiguous: bool = False,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.backend = backend
        self.operation = operation
        self.retryable = retryable
        self.ambiguous = ambiguous
        self.status = status


class BackendUnavailableError(BackendError):
    """The backend refused or dropped the connection, or answered 5xx."""


class BackendTimeoutError(BackendError):
    """The backend did not answer in time."""


class BackendRejectedError(BackendError):
    """The backend rejected the request (4xx); it is never sent again."""


class CollectionNotFoundError(BackendRejectedError):
    """There is no such collection, or it has not been opened."""

    def __init__(
        self, message: str, *, collection: str, backend: str, operation: str, status: int | None = None
    ) -> None:
        super().__init__(message, backend=backend, operation=operation, status=status)
        self.collection = collection


class EmbeddingError(BackendError):
    """A text was not embedded: the embedder's function failed, or what it returned is no vector of it.

    ``retryable`` says that the function failed for a reason that passes, as where a server was busy.
    """


class WaitError(BackendError):
    """A failure with a known time to wait."""

    def __init__(
        self, message: str, *, retry_after_s: float, backend: str, operation: str, status: int | None = None
    ) -> None:
        super().__init__(message, backend=backend, operation=operation, retryable=True, status=status)
        self.retry_after_s = retry_after_s


class RateLimitedError(WaitError):
    """The backend asks to wait for ``retry_after_s`` seconds."""


class CircuitOpenError(WaitError):
    """The circuit breaker is open; it lets a probe through after ``retry_after_s`` seconds."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What follows an unknown name in a message: a known one that is like it, where there is one."""
    import difflib

    found = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def closed_error() -> StoreClosedError:
    """What a closed store raises."""
    return StoreClosedError("the store is closed, and stays so; call open_store or open_async_store again")


def unknown_user_error(user_id: str) -> UserNotFoundError:
    """What is raised for a user of whom there is nothing."""
    return UserNotFoundError(f"no user {short_id(user_id)!r} in the store")


def locked_error(path: str | Path) -> StoreLockedError:
    """What is raised for a directory that another process has open."""
    return StoreLockedError(
        f"{path}: another process has this directory open; share it over HTTP ('attuned-store serve' there, "
        "see its /docs), close it there, wait for it with lock_timeout (ATTUNED_STORE_LOCK_TIMEOUT) in "
        "seconds, or let both use a Qdrant server"
    )


def forked_error(place: str) -> StoreError:
    """What is raised in a forked child for what the parent has open."""
    return StoreError(f"{place}: the store was opened before the fork; open it after the fork")


class ReenteredError(StoreError):
    """A call came in the middle of another one of the same thread, where waiting would never end."""

    def __init__(self, place: str) -> None:
        super().__init__(
            f"{place}: called in the middle of another call of this thread, as by a signal handler or "
            "a __del__; nothing was done: let the handler note what is to be done, and do it afterwards"
        )


# ------------------------------------------------------------------------------------------------------------
# attuned.base.disk
# Durable files and the locks of the operating system.
# ------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, even after a power cut."""
    temporary = temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)


def temporary_name(path: Path) -> Path:
    """The name under which a file is written before it gets its own."""
    return path.with_name(path.name + ".tmp")


def fsync(*paths: Path) -> None:
    """Make files, and the names in directories, survive a power cut."""
    for path in paths:
        if path.is_dir() and sys.platform == "win32":
            continue  # which keeps names without being asked
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest, a file with one JSON object, holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read as a manifest: {error}") from error
    if not isinstance(found, dict):
        raise StoreError(f"{path}: is no manifest, which is a JSON object")
    return cast("dict[str, Any]", found)


if sys.platform == "win32":

    def lock_descriptor(descriptor: int) -> None:
        """Take the operating system's lock on an open file, or raise OSError at once."""
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock_descriptor(descriptor: int) -> None:
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:

    def lock_descriptor(descriptor: int) -> None:
        """Take the operating system's lock on an open file, or raise OSError at once."""
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock_descriptor(descriptor: int) -> None:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)


class LockFile:
    """The operating system's lock on a file: it goes with the process that holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock_descriptor(self._descriptor)
        except OSError:
            os.close(self._descriptor)
            raise

    def is_there(self) -> bool:
        """Whether the file still has its name: nobody has removed or replaced it, or a directory above it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Give the lock up, also where a child that was just forked still has the file open."""
        _unlock_descriptor(self._descriptor)
        os.close(self._descriptor)

    def abandon(self) -> None:
        """Let go of the file in a forked child; the lock stays the parent's."""
        os.close(self._descriptor)


def open_private(path: str, flags: int) -> int:
    """Open a file that its owner alone can read; an opener for open()."""
    return os.open(path, flags, 0o600)


# ------------------------------------------------------------------------------------------------------------
# attuned.base.metrics
# Metrics of Prometheus: each thread adds up its own numbers, collected when asked for.
# ------------------------------------------------------------------------------------------------------------


SECONDS = (1e-6, 1e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_SNAPSHOT_SECONDS = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)
_CIRCUIT_STATES = {"closed": 0, "half-open": 1, "open": 2}

_OPERATIONS = "attuned_store_operation_duration_seconds"  # with the status, which its own labels leave out
_METRICS: dict[
    str, tuple[str, list[str], tuple[float, ...]]
] = {  # counters, and histograms of seconds by their bounds
    _OPERATIONS: ("Of stores.", ["backend", "operation"], SECONDS),
    "attuned_store_slow_operations_total": ("Steps slower than allowed.", ["backend", "operation"], ()),
    "attuned_qdrant_request_duration_seconds": ("Each try of its own.", ["operation"], SECONDS),
    "attuned_qdrant_errors_total": ("Requests that failed.", ["operation", "kind"], ()),
    "attuned_qdrant_retries_total": ("Requests sent again.", [], ()),
    "attuned_snapshot_duration_seconds": ("Of snapshots taken and restored.", [], _SNAPSHOT_SECONDS),
}


class Series:
    """A counter, or a histogram where there are bounds: for each thread a cell, to which it alone adds.

    A cell holds the sum of the seconds, how many were within the first bound, in each later bucket and beyond
    the last. Cells of threads that have ended are folded into one. The id of such a thread is given to a new
    one, which goes on with its cell where it finds it: there is no other left to do so.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.cells: dict[int, list[float]] = {}  # by the id of the thread
        self._removed: list[tuple[int, list[float]]] = []  # from the cells, and not folded yet
        self._folded: list[float] = [0] * (len(bounds) + 2)
        self._fold_at = 64  # cells: they must not pile up where nobody collects
        self._lock = threading.Lock()  # of what is folded

    def count(self, seconds: float = 0.0) -> None:
        """Count one that took so long."""
        thread = threading.get_ident()
        cell = self.cells.get(thread)
        if cell is None:
            cell = self.cells[thread] = [0] * (len(self.bounds) + 2)
        cell[0] += seconds
        cell[1 + bisect_left(self.bounds, seconds)] += 1
        # Without waiting: it may be this thread that is folding, where a finalizer counts.
        if len(self.cells) > self._fold_at and self._lock.acquire(blocking=False):
            try:
                self._fold()
                self._fold_at = 2 * len(self.cells) + 64
            finally:
                self._lock.release()

    def total(self) -> list[float]:
        """The sums over all threads, of which none ever becomes less."""
        with self._lock:
            self._fold()
            removed = (cell for _, cell in self._removed)
            cells = [self._folded, *removed, *self.cells.copy().values()]
            return [sum(each) for each in zip(*(cell.copy() for cell in cells), strict=True)]

    def _fold(self) -> None:
        running = set(sys._current_frames())
        for thread in self.cells.copy():
            if thread not in running:
                self._removed.append((thread, self.cells.pop(thread)))
        # Looked at anew: a thread that was given such an id meanwhile may be about to add to a cell that it
        # found before this was removed. A thread that adds is running: the cells of the others are at rest.
        running, removed, self._removed = set(sys._current_frames()), self._removed, []
        for thread, cell in removed:
            if thread in running:
                self._removed.append((thread, cell))
            else:
                self._folded = list(map(operator.add, self._folded, cell))


class Metrics:
    """The metrics of this process, which a registry of prometheus_client collects."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant: a store may be collected while it is held
        self.breakers: weakref.WeakSet[Any] = (
            weakref.WeakSet()
        )  # of the open stores; their class stands below
        self.snapshot_bytes = 0
        self._series: dict[tuple[str, ...], Series] = {}  # by the metric and the values of its labels
        self.series("attuned_qdrant_retries_total")
        self.series("attuned_snapshot_duration_seconds")

    def series(self, metric: str, *labels: str) -> Series:
        """What counts for a metric under these values of its labels."""
        found = self._series.get((metric, *labels))
        return found or self._series.setdefault((metric, *labels), Series(_METRICS[metric][2]))

    def operations(self, backend: str, operation: str, status: str) -> Series:
        """What counts and times the operations of stores."""
        return self.series(_OPERATIONS, backend, operation, status)

    def collect(self) -> Iterator[Any]:
        """Everything that has been counted, as prometheus_client wants it."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        families: dict[str, Any] = {
            metric: (HistogramMetricFamily if bounds else CounterMetricFamily)(metric, meaning, labels=labels)
            for metric, (meaning, labels, bounds) in _METRICS.items()
        }
        counted = CounterMetricFamily(
            "attuned_store_operations_total", "Of stores.", labels=["backend", "operation", "status"]
        )
        sums: dict[tuple[str, ...], list[float]] = {}
        for (metric, *labels), series in self._series.copy().items():
            total = series.total()
            if metric == _OPERATIONS:
                number = sum(total[1:])
                if not number:
                    continue  # made for what has not been called so far
                counted.add_metric(labels, number)
                labels = labels[:-1]  # noqa: PLW2901 - the histogram sums over the status
            known = sums.get((metric, *labels))
            sums[metric, *labels] = list(map(operator.add, known, total)) if known else total
        for (metric, *labels), (seconds, *counts) in sums.items():
            if bounds := _METRICS[metric][2]:
                names = [*(repr(float(bound)) for bound in bounds), "+Inf"]
                buckets = list(zip(names, itertools.accumulate(counts), strict=True))
                families[metric].add_metric(labels, buckets, seconds)
            else:
                families[metric].add_metric(labels, *counts)
        with self.lock:
            breakers = tuple(self.breakers)
        worst = max((_CIRCUIT_STATES[breaker.state] for breaker in breakers), default=0)
        meaning = "0 closed, 1 half-open, 2 open; the worst of all stores."
        yield from (counted, *families.values())
        yield GaugeMetricFamily("attuned_qdrant_circuit_state", meaning, worst)
        yield GaugeMetricFamily(
            "attuned_snapshot_bytes", "Size of the last snapshot file.", self.snapshot_bytes
        )


# ------------------------------------------------------------------------------------------------------------
# attuned.base.values
# The values that stores keep and answer with: snapshots, matches and reports.
# ------------------------------------------------------------------------------------------------------------


CANONICAL_AXES: Final = (
    "cognitive_load",
    "decision_fatigue",
    "tolerance_for_complexity",
    "urgency_sensitivity",
    "emotional_openness",
    "emotional_stability",
    "anxiety_level",
    "need_for_reassurance",
    "warmth",
    "formality",
    "boundary_strength",
    "assertiveness",
    "reciprocity_expectation",
    "ritual_need",
    "transactional_preference",
    "verbosity_preference",
    "directness_preference",
    "autonomy_preference",
    "suggestion_tolerance",
    "interruption_tolerance",
    "reflection_vs_action_bias",
    "stakes_awareness",
    "privacy_sensitivity",
)

MAX_VECTOR_SIZE = 65_536
CANONICAL_VECTOR_SIZE = len(CANONICAL_AXES) + 1  # a spare one: an axis more needs no rebuilding
NEUTRAL = 0.5
MAX_AXES = 1024
_MAX_AXIS_NAME = 64
MAX_USER_ID_BYTES = 256
MAX_TIME_MS = 253_402_300_799_999  # the last millisecond of the year 9999, UTC
MAX_INTEGER = 2**63 - 1  # what Qdrant's payload integers hold
_SHOWN_AXES = 8  # of a snapshot in its repr
_SHOWN_NAMES = 4  # of the axes of a report
_AXIS_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_")


class WallClock:
    """The time of day; every look at it comes through the one below."""

    AHEAD_MS = 1_000  # at most: a storm of states does not run into the future

    def __init__(self) -> None:
        self._given: MutableMapping[object, int] = FIFOCache(1_024)  # the last default times, by user
        self._lock = threading.Lock()

    def now_ms(self) -> int:
        """Milliseconds since 1970, UTC."""
        return time.time_ns() // 1_000_000

    def default_ms(self, user_id: object) -> int:
        """The time of a state that is given none: now, or 1 ms after the last one of the user.

        So a loop of states leaves a history, though a millisecond has room for hundreds of them.
        """
        now = self.now_ms()
        if user_id.__class__ is not str:  # not checked yet
            return now
        with self._lock:
            last = self._given.get(user_id, -1)
            if now <= last < now + self.AHEAD_MS:
                now = last + 1
            self._given[user_id] = now
        return now


wall_clock = WallClock()


class Source(enum.StrEnum):
    """Where a snapshot comes from."""

    SELF_REPORT = "self_report"
    INFERRED = "inferred"
    MIXED = "mixed"


_SOURCES = {source.value: source for source in Source}


class Shape:
    """The names of a set of axes, checked once and then shared by all snapshots that have them."""

    __slots__ = ("heading", "index", "json_form", "names", "packing")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.index = {name: position for position, name in enumerate(names)}
        self.json_form = "{" + ",".join(f'"{name}":%r' for name in names) + "}"
        self.heading = ",".join(names) + ":"
        self.packing = struct.Struct(f">{len(names)}d")


class Shapes(dict[str, Shape]):
    """The shapes in use, by their names, joined by commas, which no name holds.

    What a subclass of str says of itself, as its hash, does not count so. An application has a handful of
    shapes; the bound is for generated names.
    """

    maximum = 1024


SHAPES = Shapes()


def shape_of(names: tuple[Any, ...]) -> Shape:
    """The shape with these names, which are checked where it is a new one."""
    try:
        key = ",".join(names)
        shape = SHAPES.get(key)
    except (TypeError, UnicodeError):
        key, shape = "", None  # one of them is no name, as is said below
    if shape is not None and len(shape.names) == len(names):
        return shape
    if len(names) > MAX_AXES:
        raise ValidationError(f"axes: at most {MAX_AXES} names, got {len(names)}")
    plain = tuple(map(_check_axis_name, names))
    if len(set(plain)) < len(plain):
        raise ValidationError(f"axes: each name once, got {brief(plain)}")
    if len(SHAPES) >= SHAPES.maximum:
        SHAPES.clear()
    shape = SHAPES[key] = Shape(plain)
    return shape


def _check_axis_name(name: object) -> str:
    """A name of an axis as a plain string."""
    plain = str.__str__(name) if isinstance(name, str) else ""
    if (
        not 1 <= len(plain) <= _MAX_AXIS_NAME
        or not _AXIS_CHARACTERS.issuperset(plain)
        or plain[0] == "_"
        or plain[-1] == "_"
    ):
        raise ValidationError(
            f"axes: a name is 1 to {_MAX_AXIS_NAME} of a-z, 0-9 and _, with no _ at either end; "
            f"got {brief(name)}"
        )
    return plain


def axis_name(heading: str) -> str:
    """The name of an axis for a heading, in snake_case: "energetic_arousal" for "Energetic Arousal".

    What has neither letters nor digits gives "", which is no name. Raises ValidationError.
    """
    if not isinstance(heading, str):
        raise ValidationError(f"heading: a string is needed, got {type_name(heading)}")
    return _snake_case(str.__str__(heading))


@functools.lru_cache(4_096)
def _snake_case(heading: str) -> str:
    if re.fullmatch(r"[a-z0-9]+(?:_+[a-z0-9]+)*", heading):
        return heading
    plain = "".join(c for c in unicodedata.normalize("NFKD", heading) if not unicodedata.combining(c))
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", plain)
    return re.sub(r"[\W_]+", "_", words).strip("_").lower()


class Axes(Mapping[str, float]):
    """The axes of a snapshot: an immutable, hashable, picklable mapping from name to value in [0, 1].

    It keeps the order in which the axes were given and compares equal to any mapping with the same items.
    Raises ValidationError for a bad name or value.
    """

    __slots__ = ("_shape", "_values")
    _shape: Shape
    _values: tuple[float, ...]

    def __new__(cls, axes: Mapping[str, float] | Iterable[tuple[str, float]] = ()) -> Self:
        """Check the axes; what is an Axes already is taken as it is."""
        return cast("Self", _checked_axes(axes))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("Axes are immutable; StateSnapshot.patched gives a changed copy")

    __delattr__ = cast("Any", __setattr__)

    def __getitem__(self, name: str) -> float:
        return self._values[self._shape.index[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shape.names)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Axes) and other._shape is self._shape:
            return self._values == other._values
        return dict(self) == other if isinstance(other, dict | Axes) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __repr__(self) -> str:
        return f"Axes({dict(self)})"

    def __copy__(self) -> Axes:
        return self

    def __deepcopy__(self, memo: object) -> Axes:
        return self

    def __reduce__(self) -> tuple[type[Axes], tuple[dict[str, float]]]:
        return Axes, (dict(self),)  # the constructor, so that unpickling validates


_set_shape = cast("Any", Axes._shape).__set__  # the slots' own setters, which go past __setattr__
_set_values = cast("Any", Axes._values).__set__


def _checked_axes(axes: Mapping[str, float] | Iterable[tuple[str, float]]) -> Axes:
    """What makes Axes. It stands outside of the class because every snapshot is made through it."""
    if axes.__class__ is Axes:  # isinstance() is slow for the subclass of an abstract class
        return cast("Axes", cast("object", axes))
    given = _as_dict(axes)
    return make_axes(shape_of(tuple(given)), tuple(given.values()))


def make_axes(shape: Shape, values: tuple[Any, ...]) -> Axes:
    """Axes of these names, with values that are checked here."""
    for value in values:
        if value.__class__ is not float or not 0.0 <= value <= 1.0:
            values = tuple(map(check_unit, [f"axes[{name!r}]" for name in shape.names], values))
            break
    made = object.__new__(Axes)
    _set_shape(made, shape)
    _set_values(made, values)
    return made


def _as_dict(axes: Any) -> dict[Any, Any]:
    try:
        return dict(axes)  # also a dict: what is checked must be what is kept
    except (TypeError, ValueError):
        raise ValidationError(
            f"axes: a mapping from axis name to value is needed, got {type_name(axes)}"
        ) from None


def removed_axes(axes: Any) -> tuple[str, ...]:
    """The names of those axes of a patch that are to be removed, checked as names."""
    return shape_of(tuple(name for name, value in _as_dict(axes).items() if value is None)).names


def check_unit(field: str, value: object) -> float:
    """A real number in [0, 1] as a float."""
    with contextlib.suppress(ValidationError):
        number = check_number(field, value)
        if 0.0 <= number <= 1.0:
            return number
    raise ValidationError(f"{field}: a real number from 0 to 1 is needed, got {brief(value)}")


def check_number(field: str, value: object) -> float:
    """A real number as a plain float."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer that is larger than any float
            number = float.__float__(value) if isinstance(value, float) else float(value)
            if not math.isnan(number):
                return number
    raise ValidationError(f"{field}: a number is needed, got {brief(value)}")


def check_integer(field: str, value: object, lowest: int, highest: int) -> int:
    """An integer within bounds, as a plain int."""
    if not isinstance(value, bool):
        try:
            number = int.__index__(operator.index(cast("Any", value)))
        except TypeError:
            pass  # not an integer: the error below says so
        else:
            if lowest <= number <= highest:
                return number
    bounds = f"of at least {lowest}" if highest == MAX_INTEGER else f"from {lowest} to {highest}"
    raise ValidationError(f"{field}: an integer {bounds} is needed, got {brief(value)}")


def check_user_id(value: object, field: str = "user_id") -> str:
    """An id of a user, or what follows the same rules, as a plain string."""
    if not isinstance(value, str):
        raise ValidationError(f"{field}: a string is needed, got {type_name(value)}")
    if value.__class__ is not str:
        value = str.__str__(value)
    if value.isascii() and value.isprintable() and 1 <= len(value) <= MAX_USER_ID_BYTES:
        return value
    shown = brief(short_id(value))
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValidationError(f"{field}: a lone surrogate is not valid text, got {shown}") from None
    if not 1 <= size <= MAX_USER_ID_BYTES:
        raise ValidationError(
            f"{field}: 1 to {MAX_USER_ID_BYTES} bytes of UTF-8 are needed, got {size} in {shown}"
        )
    if any(unicodedata.category(character) == "Cc" for character in value):
        raise ValidationError(f"{field}: no control characters, got {shown}")
    return value


_LIKE_SECONDS = range(10**9, 10**10 + 1)  # from 2001 to 2286, in seconds; in milliseconds some weeks of 1970


def check_time_ms(value: object, field: str = "updated_at_unix_ms") -> int:
    """A time in milliseconds since 1970, UTC, of an int or an aware datetime, as a caller gives it."""
    if isinstance(value, datetime):
        if value.tzinfo is None or value.utcoffset() is None:
            raise ValidationError(
                f"{field}: a datetime needs a time zone, as in datetime.now(UTC); got a naive one"
            )
        value = (value - UNIX_EPOCH) // timedelta(milliseconds=1)
    elif isinstance(value, float):
        raise ValidationError(
            f"{field}: whole milliseconds since 1970 or an aware datetime are needed, got {brief(value)}; "
            "int(time.time() * 1000) makes them of the time in seconds"
        )
    elif isinstance(value, str):
        raise ValidationError(
            f"{field}: an aware datetime or whole milliseconds since 1970 are needed, got {brief(value)}; "
            "datetime.fromisoformat makes one of ISO 8601"
        )
    time_ms = check_integer(field, value, 0, MAX_TIME_MS)
    if time_ms in _LIKE_SECONDS:
        raise ValidationError(
            f"{field}: {time_ms} looks like seconds; milliseconds since 1970 are needed: {time_ms}000"
        )
    return time_ms


def check_source(value: Source | str) -> Source:
    """A source, of one or of its value."""
    if value.__class__ is Source:
        return cast("Source", cast("object", value))
    source = _SOURCES.get(value) if isinstance(value, str) else None  # callers need not be typed
    if source is None:
        raise ValidationError(f"source: one of {', '.join(_SOURCES)} is needed, got {brief(value)}")
    return source


class SnapshotFields(TypedDict, total=False):
    """The fields of a snapshot that ``patch`` and ``patched`` can set beside the axes."""

    updated_at_unix_ms: int | datetime
    source: Source | str
    confidence: float
    schema_version: int


@attrs.frozen(repr=False)
class StateSnapshot:
    """The state of one user at one time; immutable, validated at construction, equal by value.

    ``user_id`` is 1 to 256 bytes of UTF-8 without control characters; ``axes`` maps axis names to real
    numbers in [0, 1]; ``updated_at_unix_ms`` is milliseconds since 1970, UTC, or an aware datetime (now
    unless given, and at least 1 ms after the last such state of the user); ``source`` is a ``Source`` or its
    value; ``confidence`` is in [0, 1]; ``schema_version`` is at least 1. A violation raises ValidationError,
    which names the field, the rule and the value.

    >>> StateSnapshot("ada", {"warmth": 0.8}, updated_at_unix_ms=0).axis("formality")
    0.5
    """

    user_id: str
    axes: Axes = attrs.field(converter=_checked_axes)
    updated_at_unix_ms: int = attrs.field(
        default=attrs.Factory(lambda self: wall_clock.default_ms(self.user_id), takes_self=True)
    )
    source: Source = attrs.field(default=Source.SELF_REPORT, converter=check_source)
    confidence: float = 1.0
    schema_version: int = 1

    def __attrs_post_init__(self) -> None:
        # One pass with a fast way for each usual case: a snapshot is built on every read from disk.
        user_id, time_ms, confidence = self.user_id, self.updated_at_unix_ms, self.confidence
        if not (
            user_id.__class__ is str
            and user_id.isascii()
            and user_id.isprintable()
            and 0 < len(user_id) <= MAX_USER_ID_BYTES
        ):
            object.__setattr__(self, "user_id", check_user_id(user_id))
        if time_ms.__class__ is not int or not 0 <= time_ms <= MAX_TIME_MS or time_ms in _LIKE_SECONDS:
            object.__setattr__(self, "updated_at_unix_ms", check_time_ms(time_ms))
        if confidence.__class__ is not float or not 0.0 <= confidence <= 1.0:
            object.__setattr__(self, "confidence", check_unit("confidence", confidence))
        if self.schema_version.__class__ is not int or not 0 < self.schema_version <= MAX_INTEGER:
            version = check_integer("schema_version", self.schema_version, 1, MAX_INTEGER)
            object.__setattr__(self, "schema_version", version)

    @property
    def updated_at(self) -> datetime:
        """The time as an aware datetime, in UTC."""
        return UNIX_EPOCH + timedelta(milliseconds=self.updated_at_unix_ms)

    def __repr__(self) -> str:
        axes = [f"{name!r}: {value:.4g}" for name, value in itertools.islice(self.axes.items(), _SHOWN_AXES)]
        if len(self.axes) > _SHOWN_AXES:
            axes.append(f"… {len(self.axes) - _SHOWN_AXES} more")
        facts = [iso_time(self.updated_at_unix_ms), f"source={self.source.value!r}"]
        facts += [f"confidence={self.confidence:g}", f"schema_version={self.schema_version}"]
        return f"StateSnapshot({short_id(self.user_id)!r}, {{{', '.join(axes)}}}, {', '.join(facts)})"

    def _repr_html_(self) -> str:
        return snapshot_html(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return stored_snapshot, attrs.astuple(self, recurse=False)

    def __copy__(self) -> StateSnapshot:
        return self

    def __deepcopy__(self, memo: object) -> StateSnapshot:
        return self

    def axis(self, name: str) -> float:
        """The value of an axis in [0, 1]; 0.5, which is neutral, where the snapshot does not have it.

        Raises ValidationError for what is no name.
        """
        if not isinstance(name, str):
            raise ValidationError(f"axis: a name is needed, got {type_name(name)}")
        return self.axes.get(name, NEUTRAL)

    def patched(self, axes: Mapping[str, float | None], **fields: Unpack[SnapshotFields]) -> StateSnapshot:
        """A new snapshot with these axes merged in, those given as None removed, and these fields set.

        Its time, unless given, is now, and at least 1 ms after that of this snapshot. Raises ValidationError.
        """
        unknown = fields.keys() - SnapshotFields.__annotations__.keys()
        if unknown:
            raise ValidationError(f"patched: unknown field {brief(min(unknown))}")
        given = _as_dict(axes)
        removed = removed_axes(given)
        merged = {**self.axes, **Axes({name: value for name, value in given.items() if value is not None})}
        for name in removed:
            merged.pop(name, None)
        fields.setdefault("updated_at_unix_ms", max(wall_clock.now_ms(), self.updated_at_unix_ms + 1))
        return attrs.evolve(self, axes=merged, **cast("Any", fields))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types, ``axes`` a dict; ``from_dict`` is the inverse."""
        return {**attrs.asdict(self, recurse=False), "axes": dict(self.axes), "source": self.source.value}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> StateSnapshot:
        """A snapshot from a mapping with the names of its fields. Raises ValidationError."""
        if not isinstance(fields, Mapping):
            raise ValidationError(
                f"StateSnapshot: a mapping of its fields is needed, got {type_name(fields)}"
            )
        names = {field.name for field in attrs.fields(cls)}
        for name in fields:
            if name not in names:
                raise ValidationError(f"StateSnapshot: unknown field {brief(name)}")
        for name in ("user_id", "axes"):
            if name not in fields:
                raise ValidationError(f"{name}: missing")
        return cls(**fields)


@attrs.frozen
class Match:
    """A result of ``search_similar``: the snapshot and its cosine similarity, from -1 to 1."""

    snapshot: StateSnapshot
    score: float

    def _repr_html_(self) -> str:
        return Matches([self])._repr_html_()


@attrs.frozen
class Health:
    """What ``health`` found.

    ``status`` is healthy, degraded or unhealthy; ``backend`` memory, edge, local or server; ``latency_ms``
    how long the look took; ``users`` how many users there are and ``points`` how many latest snapshots and
    how many in history, together; None where unknown; ``location`` the directory or url. For a server:
    its ``version``, and the collection's ``collection_status`` and ``indexed_vectors``.
    """

    status: Literal["healthy", "degraded", "unhealthy"]
    backend: str
    latency_ms: float
    users: int | None = None
    points: int | None = None
    location: str | None = None
    message: str = ""
    version: str | None = None
    collection_status: str | None = None
    indexed_vectors: int | None = None

    def _repr_html_(self) -> str:
        facts = {**attrs.asdict(self), "latency_ms": f"{self.latency_ms:.3g}"}
        return facts_html("Health", facts)


SnapshotReason = Literal["startup", "api", "manual"]


@attrs.frozen(kw_only=True)
class SnapshotReport:
    """What became of a snapshot, which is a backup of a store.

    ``status`` is completed, failed or skipped; ``target`` the store (or, where there is none, the file);
    ``reason`` why it was taken; ``kind`` native, a Qdrant server's own, or portable; ``path`` the file and
    ``snapshot_name`` its name; ``created_at`` when it was taken, UTC; ``axes`` of the store it was taken of;
    ``bytes`` and ``sha256`` of the file; ``users`` and ``points`` how many users and states it holds (a
    native one: points, latest ones and history); ``duration_ms`` how long it took; ``message`` what there
    is to say. None where unknown: a native one does not tell its axes and users.
    """

    status: Literal["completed", "failed", "skipped"]
    target: str
    reason: SnapshotReason = "manual"
    kind: Literal["native", "portable"] | None = None
    path: Path | None = None
    snapshot_name: str | None = None
    created_at: datetime | None = None
    axes: tuple[str, ...] | None = None
    bytes: int | None = None
    sha256: str | None = None
    users: int | None = None
    points: int | None = None
    duration_ms: float = 0.0
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types: ``path`` a string, ``created_at`` in ISO form, ``axes`` a list."""
        return {
            **attrs.asdict(self, recurse=False),
            "path": None if self.path is None else str(self.path),
            "created_at": None if self.created_at is None else iso_time(self.created_at),
            "axes": None if self.axes is None else list(self.axes),
        }

    def _repr_html_(self) -> str:
        axes = ", ".join((self.axes or ())[:_SHOWN_NAMES])
        if self.axes is not None and len(self.axes) > _SHOWN_NAMES:
            axes += f", and {len(self.axes) - _SHOWN_NAMES:,} more"
        facts = {**self.to_dict(), "axes": axes, "duration_ms": f"{self.duration_ms:.3g}"}
        return facts_html("SnapshotReport", facts)


class _Any(enum.Enum):
    ANY = "ANY"

    def __repr__(self) -> str:
        return "ANY"


ANY: Final = _Any.ANY  # the default of expected=: whatever is there
Expected = StateSnapshot | Literal[_Any.ANY] | None
UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def iso_time(moment: int | datetime) -> str:
    """Write milliseconds since 1970, or a datetime in UTC, as ISO 8601."""
    if not isinstance(moment, datetime):
        moment = UNIX_EPOCH + timedelta(milliseconds=moment)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def stored_snapshot(  # noqa: PLR0917 - the fields of a snapshot
    user_id: str,
    axes: Axes | Mapping[str, float],
    updated_at_unix_ms: object,
    source: str,
    confidence: float,
    schema_version: int,
) -> StateSnapshot:
    """A snapshot that is read back: checked, but for the time that from a caller would look like seconds."""
    if updated_at_unix_ms.__class__ is not int or updated_at_unix_ms not in _LIKE_SECONDS:
        return StateSnapshot(
            user_id, axes, cast("int", updated_at_unix_ms), source, confidence, schema_version
        )
    snapshot = StateSnapshot(user_id, axes, 0, source, confidence, schema_version)
    object.__setattr__(snapshot, "updated_at_unix_ms", updated_at_unix_ms)
    return snapshot


def unsettled_message(user_ids: Sequence[str]) -> str:
    """What a report says of users who were not read at rest."""
    if not user_ids:
        return ""
    shown = ", ".join(map(short_id, user_ids[:5])) + (", and others" if user_ids[5:] else "")
    return (
        f"{plural(len(user_ids), 'user')} could not be read at rest, being written to all the while: {shown}"
    )


def distinct_users(snapshots: Iterable[StateSnapshot]) -> list[str]:
    """The users of snapshots, each once, in their order."""
    return list(dict.fromkeys(snapshot.user_id for snapshot in snapshots))


def time_of(snapshot: StateSnapshot) -> int:
    """The time of a snapshot, to sort by."""
    return snapshot.updated_at_unix_ms


# ------------------------------------------------------------------------------------------------------------
# attuned.base.codec
# How states become text, ids and vectors.
# ------------------------------------------------------------------------------------------------------------


FORMAT_VERSION = 1
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "attuned_store")
DOCUMENTS_NAMESPACE = uuid.uuid5(_NAMESPACE, "documents")
MS_PER_DAY = 86_400_000


def make_point_id(user_id: str, suffix: str | int) -> str:
    """The id of a user's point: UUIDv5 (RFC 9562) of "user::latest" or "user::<updated_at_unix_ms>"."""
    return make_uuid(_NAMESPACE, f"{user_id}::{suffix}")


def make_uuid(namespace: uuid.UUID, name: str) -> str:
    """UUIDv5 as uuid.uuid5 makes it, as text and in a third of the time."""
    digest = hashlib.sha1(namespace.bytes + name.encode(), usedforsecurity=False).hexdigest()
    variant = "89ab"[int(digest[16], 16) & 3]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:32]}"


def pack_axes(axes: Axes) -> str:
    """Axes as "name,name:values", the values as the hexadecimal digits of big-endian doubles.

    It is exact, and written and read in a tenth of the time of JSON.
    """
    shape = axes._shape
    return shape.heading + shape.packing.pack(*axes._values).hex()


def unpack_axes(text: str) -> Axes:
    """What pack_axes wrote, or the JSON of earlier versions."""
    if text.startswith("{"):
        return Axes(json.loads(text))
    heading, _, digits = text.partition(":")
    shape = _shape_of_heading(heading)
    try:
        return make_axes(shape, shape.packing.unpack(bytes.fromhex(digits)))
    except struct.error as error:
        raise ValueError(f"axes: {error}") from None


@functools.lru_cache(SHAPES.maximum)
def _shape_of_heading(heading: str) -> Shape:
    names = tuple(heading.split(",")) if heading else ()
    if len(set(names)) < len(names):
        raise ValueError("axes: a name is there twice")
    return shape_of(names)


class Schema:
    """The axes of a store and where each stands in its vectors."""

    __slots__ = ("_positions", "axes", "vector_size")

    def __init__(self, axes: tuple[str, ...], vector_size: int) -> None:
        self.axes = axes
        self.vector_size = vector_size
        self._positions: dict[Shape, tuple[int, ...]] = {}

    @classmethod
    def of(cls, config: MemoryStoreConfig) -> Schema:
        """The schema of a new store."""
        default = CANONICAL_VECTOR_SIZE if config.axes in (None, CANONICAL_AXES) else len(config.axes or ())
        return cls(config.axes or CANONICAL_AXES, config.vector_size or default)

    def extended(self, names: Sequence[str]) -> Schema:
        """The schema with more axes, the new ones last."""
        for name in names:
            if name in self.axes:
                raise ValidationError(f"add: the store has the axis {name!r} already")
        axes = shape_of((*self.axes, *names)).names
        return Schema(axes, max(self.vector_size, len(axes)))

    def check(self, axes: Axes) -> None:
        """Raise ValidationError where an axis is not one of the store's."""
        if axes._shape not in self._positions:
            self._add(axes._shape)

    def _add(self, shape: Shape) -> tuple[int, ...]:
        own = {name: position for position, name in enumerate(self.axes)}
        for name in shape.names:
            if name not in own:
                raise ValidationError(
                    f"axes: the store has no axis {name!r}{nearest(name, self.axes)}; it has "
                    + ", ".join(self.axes)
                )
        if len(self._positions) >= SHAPES.maximum:
            self._positions.clear()
        positions = self._positions[shape] = tuple(own[name] for name in shape.names)
        return positions

    def vector(self, axes: Axes) -> list[float]:
        """Axis values around neutral, 0 for absent axes and spare dimensions, brought to length 1.

        Engines would do that too, but take a short vector for a zero one. The zero vector stays as it is.
        """
        positions = self._positions.get(axes._shape)  # once: another thread may drop them after any look
        if positions is None:
            positions = self._add(axes._shape)
        vector = [0.0] * self.vector_size
        for position, value in zip(positions, axes._values, strict=True):
            vector[position] = value - NEUTRAL
        length = math.hypot(*vector)
        return [value / length for value in vector] if length else vector


# ------------------------------------------------------------------------------------------------------------
# attuned.base.config
# How stores are configured: options, their checks, and the environment.
# ------------------------------------------------------------------------------------------------------------


TRUE_WORDS = frozenset({"true", "1", "yes", "y", "on"})
_LOOPBACK = re.compile(r"127(?:\.\d+){3}|::1")
HEADER_TEXT = re.compile(r"[!-~]+")
_HOST = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::\d+)?")  # with its port
_MAX_FACTOR = 2**31 - 1
_COLLECTION_NAME = re.compile(r"[^\W.-][\w.-]{0,199}")  # it names files on disk
FALSE_WORDS = frozenset({"false", "0", "no", "n", "off"})
DEFAULT_COLLECTION = "attuned_state"


# Qdrant Edge writes through memory maps, where a full disk is a signal that ends the process. With another
# process filling the disk at the same time, 16 MiB were too few in 2 of 24 runs, 64 MiB in none.
MIN_FREE_BYTES = 64 << 20


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an address, is this machine and can be reached from no other."""
    return host == "localhost" or _LOOPBACK.fullmatch(host) is not None


def check_axis_names(value: Iterable[str] | None) -> tuple[str, ...] | None:
    """Names of axes as a tuple of plain strings; None for those of the store."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValidationError(f"axes: names are needed, such as a tuple of strings; got {brief(value)}")
    try:
        names = shape_of(tuple(value)).names
    except TypeError:
        raise ValidationError(f"axes: strings are needed as names, got {brief(value)}") from None
    if len(set(names)) != len(names):
        raise ValidationError(f"axes: each name once, got {brief(names)}")
    if not names:
        raise ValidationError("axes: at least one name, or None for those of the store")
    return names


def check_path(value: str | os.PathLike[str]) -> str:
    """A path as a string, or ValidationError."""
    try:
        path = os.fspath(value)
        encoded = os.fsencode(path)
    except (TypeError, UnicodeEncodeError):  # a lone surrogate is in no path
        path, encoded = None, b""
    if isinstance(path, str) and encoded and b"\0" not in encoded:
        return path
    raise ValidationError(f"path: a directory is needed, got {brief(value)}")


def check_verify(value: bool | str | os.PathLike[str]) -> bool | str:  # noqa: FBT001 - it is a value
    """True, False, or the path of a certificate as a string; ValidationError for what is neither."""
    if isinstance(value, bool):
        return value
    try:
        return check_path(value)
    except ValidationError:
        raise ValidationError(f"verify: True, False or a path is needed, got {brief(value)}") from None


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """A path as it is meant now: absolute, with ~ expanded."""
    expanded = os.path.expanduser(check_path(path))  # noqa: PTH111 - Path.expanduser raises for an unknown user
    return Path(expanded).absolute()


def shown_url(url: str) -> str:
    """A url, or what was meant as one, for an error message: without what may be a secret."""
    return brief(re.sub(r"[?#].*", "?…", re.sub(r"//.*@", "//…@", url, flags=re.DOTALL), flags=re.DOTALL))


def _check_url(url: object) -> None:
    if not isinstance(url, str):
        raise ValidationError(f"url: a string is needed, got {type_name(url)}")
    if "@" in url:  # whatever stands before it may be a secret
        raise ValidationError(
            "url: must not hold a user or password, got one with @; give the key as api_key"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValidationError(f"url: not a url, got {shown_url(url)}") from None
    usual = parts.scheme in ("http", "https") and not parts.query and not parts.fragment and port != 0
    if not usual or not parts.hostname or not _HOST.fullmatch(parts.netloc) or url.strip() != url:
        raise ValidationError(
            f"url: http://<host>:6333 or https://<host>:6333 is needed, got {shown_url(url)}"
        )


def _join_urls(value: str | Iterable[str] | None) -> Any:
    """The addresses of several nodes as one text, with commas between; what is wrong is found later."""
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return ",".join(value)
    return value


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValidationError unless a value is one of some."""
    if value not in choices:
        raise ValidationError(f"{field}: one of {', '.join(choices)} is needed, got {brief(value)}")


def check_flag(field: str, value: object) -> bool:
    """True or False, or ValidationError."""
    if isinstance(value, bool):
        return value
    raise ValidationError(f"{field}: True or False is needed, got {brief(value)}")


def check_collection_name(field: str, value: object) -> str:
    """The name of a collection, which also names its files, as a plain string."""
    if isinstance(value, str) and _COLLECTION_NAME.fullmatch(value):
        return str.__str__(value)
    raise ValidationError(
        f"{field}: 1 to 200 of letters, digits and _ - . (not in front) are needed, got {brief(value)}"
    )


def check_callable(field: str, value: object) -> None:
    """Raise ValidationError unless a value can be called."""
    if not callable(value):
        raise ValidationError(f"{field}: a function is needed, got {type_name(value)}")


def check_positive(field: str, value: object, *, zero: bool = False) -> None:
    """Raise ValidationError unless a value is a finite number above 0, or from 0."""
    number = check_number(field, value)
    if not (0 <= number < math.inf) or (number == 0 and not zero):
        raise ValidationError(
            f"{field}: a finite number {'from' if zero else 'above'} 0 is needed, got {brief(value)}"
        )


class MemoryOptions(TypedDict, total=False):
    """The fields of MemoryStoreConfig, as options of the memory stores."""

    axes: Iterable[str] | None
    vector_size: int | None
    enable_history: bool
    max_history_per_user: int
    history_retention_days: float | None
    telemetry: bool


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often and how patiently a request to a server is repeated.

    ``attempts`` in all; between them a random wait from 0 to ``base_s`` doubled each time, at most ``cap_s``
    (full jitter; see Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015), or
    what the server asks for with 429; none that would end later than ``deadline_s`` after the first began.
    All in seconds. Raises ValidationError.
    """

    attempts: int = 4
    base_s: float = 0.1
    cap_s: float = 5.0
    deadline_s: float = 60.0

    def __attrs_post_init__(self) -> None:
        check_integer("attempts", self.attempts, 1, 1_000)
        for field in ("base_s", "cap_s", "deadline_s"):
            check_positive(field, getattr(self, field), zero=True)


@attrs.frozen(kw_only=True)
class BreakerPolicy:
    """When a store stops asking a server that fails: after ``failures`` in a row, those of one moment as one.

    After ``first_open_s`` seconds one request is let through; it closes the breaker or opens it again, for
    twice as long each time, at most for ``open_s`` seconds. Raises ValidationError.
    """

    failures: int = 5
    open_s: float = 30.0
    first_open_s: float = 1.0

    def __attrs_post_init__(self) -> None:
        check_integer("failures", self.failures, 1, MAX_INTEGER)
        for field in ("open_s", "first_open_s"):
            check_positive(field, getattr(self, field), zero=True)


class QdrantOptions(MemoryOptions, total=False):
    """The fields of QdrantStoreConfig, as options of the Qdrant stores."""

    path: str | os.PathLike[str] | None
    url: str | Sequence[str] | None
    api_key: str | None
    collection_name: str
    engine: Literal["auto", "edge", "local"]
    durability: Literal["process", "power"]
    lock_timeout: float
    cache_size: int
    slow_operation_ms: float | None
    min_free_bytes: int
    connect_timeout: float
    request_timeout: float
    pool_size: int
    verify: bool | str | os.PathLike[str]
    cache_ttl: float
    snapshot_timeout: float
    shard_number: int | None
    replication_factor: int | None
    write_consistency_factor: int | None
    read_consistency: int | Literal["majority", "quorum", "all"] | None
    write_ordering: Literal["weak", "medium", "strong"] | None
    exact_search: bool
    retry: RetryPolicy
    breaker: BreakerPolicy


@attrs.frozen(kw_only=True)
class MemoryStoreConfig:
    """How a memory store keeps its snapshots; every field is also an option of the store.

    ``axes`` names the schema (None: the canonical ones); ``vector_size`` the dimensions of its vectors (None:
    one per axis, and a spare one with the canonical axes). History keeps the newest ``max_history_per_user``
    of each user, and shows none older than ``history_retention_days``. Without ``telemetry`` the store
    reports nothing, neither spans nor metrics. Raises ValidationError.
    """

    axes: tuple[str, ...] | None = attrs.field(default=None, converter=check_axis_names)
    vector_size: int | None = None
    enable_history: bool = True
    max_history_per_user: int = 100
    history_retention_days: float | None = None
    telemetry: bool = True

    def __attrs_post_init__(self) -> None:
        least = len(self.axes or ()) or 1
        if self.vector_size is not None:
            check_integer("vector_size", self.vector_size, least, MAX_VECTOR_SIZE)
        check_flag("enable_history", self.enable_history)
        check_flag("telemetry", self.telemetry)
        check_integer("max_history_per_user", self.max_history_per_user, 0, MAX_INTEGER)
        if self.history_retention_days is not None:
            check_positive("history_retention_days", self.history_retention_days)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The configuration that the variables ATTUNED_STORE_<FIELD> describe, in capitals.

        Lists are separated by commas. Raises ValidationError, which names the variable.
        """
        if not isinstance(environ, Mapping):
            raise ValidationError(f"environ: a mapping is needed, got {type_name(environ)}")
        found: dict[str, Any] = {}
        for field in attrs.fields(cls):
            if field.name in ("retry", "breaker"):
                continue  # more than one variable can say
            variable = _variable(field.name)
            text = environ.get(variable, "")
            if not isinstance(text, str):
                raise ValidationError(f"{variable}: a string is needed, got {type_name(text)}")
            if text.strip():
                found[field.name] = _parsed(variable, text.strip(), str(field.type))
        try:
            return cls(**found)
        except ValidationError as error:
            field_name, _, rule = str(error).partition(":")
            raise ValidationError(f"{_variable(field_name)}:{rule}") from None


@attrs.frozen(kw_only=True)
class QdrantStoreConfig(MemoryStoreConfig):
    """Where and how a Qdrant store keeps its snapshots; every field is also an option of the store.

    ``path`` is a directory (made where absent) for embedded Qdrant, ``url`` a server; ``engine`` which
    embedded form a new directory gets (auto: edge where qdrant-edge-py is installed, else local).
    ``durability`` "process" survives the death of the process, "power" a power cut too, at the cost of a
    flush, which those who write at the same time share. ``lock_timeout`` is how many seconds to wait for a
    directory that another process has open; ``cache_size`` how many snapshots the read cache holds (0: none).
    A step that takes longer than ``slow_operation_ms`` is logged as a warning (0 or None: none is). A disk
    with less than ``min_free_bytes`` free (local mode: 1 MiB at most), and room for what is to be written, is
    full: nothing is written.

    For a server: ``url``, of several nodes of a cluster a list, or a text with commas: where one cannot be
    reached, the next is asked. ``api_key``; ``connect_timeout`` and ``request_timeout`` in seconds,
    ``snapshot_timeout`` for making or restoring a native snapshot; ``pool_size``, the number of connections
    kept; ``verify``, False or the path of a CA certificate; ``cache_ttl``, the seconds for which a read may
    be answered from memory though other processes write (0: never). A collection is made with
    ``shard_number``, ``replication_factor`` and ``write_consistency_factor``; requests carry
    ``read_consistency`` and ``write_ordering``. A search looks at every state, unless ``exact_search`` is
    False: then the server's graph is asked, which is quicker with millions of users, and misses some.
    ``retry`` and ``breaker`` say what follows a failure. Raises ValidationError.
    """

    path: str | None = attrs.field(default=None, converter=attrs.converters.optional(check_path))
    url: str | None = attrs.field(default=None, converter=_join_urls)
    api_key: str | None = attrs.field(default=None, repr=False)
    collection_name: str = DEFAULT_COLLECTION
    engine: Literal["auto", "edge", "local"] = "auto"
    durability: Literal["process", "power"] = "process"
    lock_timeout: float = 0.0
    cache_size: int = 10_000
    slow_operation_ms: float | None = 100.0
    min_free_bytes: int = MIN_FREE_BYTES
    connect_timeout: float = 10.0
    request_timeout: float = 30.0
    pool_size: int = 64
    verify: bool | str = attrs.field(default=True, converter=check_verify)
    cache_ttl: float = 0.0
    snapshot_timeout: float = 600.0
    shard_number: int | None = None
    replication_factor: int | None = None
    write_consistency_factor: int | None = None
    read_consistency: int | Literal["majority", "quorum", "all"] | None = None
    write_ordering: Literal["weak", "medium", "strong"] | None = None
    exact_search: bool = True
    retry: RetryPolicy = attrs.field(factory=RetryPolicy)
    breaker: BreakerPolicy = attrs.field(factory=BreakerPolicy)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        check_collection_name("collection_name", self.collection_name)
        check_choice("engine", self.engine, ("auto", "edge", "local"))
        check_choice("durability", self.durability, ("process", "power"))
        check_positive("lock_timeout", self.lock_timeout, zero=True)
        check_integer("cache_size", self.cache_size, 0, MAX_INTEGER)
        check_integer("min_free_bytes", self.min_free_bytes, 0, MAX_INTEGER)
        if self.slow_operation_ms is not None:
            check_positive("slow_operation_ms", self.slow_operation_ms, zero=True)
        self._check_server_fields()

    def _check_server_fields(self) -> None:
        if self.url is not None:
            for url in self.url.split(",") if isinstance(self.url, str) else (self.url,):
                _check_url(url)
        key = self.api_key
        if key is not None and not (isinstance(key, str) and HEADER_TEXT.fullmatch(key)):
            raise ValidationError(
                "api_key: printable ASCII characters are needed"
            )  # the value is never shown
        for field in ("connect_timeout", "request_timeout", "snapshot_timeout"):
            check_positive(field, getattr(self, field))
        check_positive("cache_ttl", self.cache_ttl, zero=True)
        check_flag("exact_search", self.exact_search)
        check_integer("pool_size", self.pool_size, 1, 65_535)
        for field in ("shard_number", "replication_factor", "write_consistency_factor"):
            if getattr(self, field) is not None:
                check_integer(field, getattr(self, field), 1, _MAX_FACTOR)
        self._check_policies()

    def _check_policies(self) -> None:
        if isinstance(self.read_consistency, int):
            check_integer("read_consistency", self.read_consistency, 1, _MAX_FACTOR)
        elif self.read_consistency is not None:
            check_choice("read_consistency", self.read_consistency, ("majority", "quorum", "all"))
        if self.write_ordering is not None:
            check_choice("write_ordering", self.write_ordering, ("weak", "medium", "strong"))
        for field, kind in (("retry", RetryPolicy), ("breaker", BreakerPolicy)):
            value = getattr(self, field)
            if not isinstance(value, kind):
                raise ValidationError(f"{field}: a {kind.__name__} is needed, got {brief(value)}")


def _variable(field: str) -> str:
    shared = {"url": "QDRANT_URL", "api_key": "QDRANT_API_KEY", "collection_name": "QDRANT_COLLECTION"}
    return shared.get(field) or f"ATTUNED_STORE_{field.upper()}"


def _parsed(variable: str, text: str, kind: str) -> object:
    try:
        if kind.startswith("bool"):
            return {**dict.fromkeys(TRUE_WORDS, True), **dict.fromkeys(FALSE_WORDS, False)}[text.lower()]
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
    except (ValueError, KeyError):
        if "str" in kind or "Literal" in kind:
            return text  # the field says whether the text will do
        raise ValidationError(f"{variable}: {kind.partition(' ')[0]} is needed, got {brief(text)}") from None
    return tuple(name.strip() for name in text.split(",")) if kind.startswith("tuple") else text


_Config = TypeVar("_Config", bound=MemoryStoreConfig)


def make_config(kind: type[_Config], config: _Config | None, options: Mapping[str, Any]) -> _Config:
    """The configuration with these options instead of its own."""
    if not isinstance(config, kind | None):
        raise ValidationError(
            f"config: a {kind.__name__} is needed, got {type_name(config)}; a place is given by name, "
            "as in path='./mood', or to open_store"
        )
    known = [field.name for field in attrs.fields(kind)]
    for option in options:
        if option not in known:
            raise ValidationError(f"{option}: not an option here; there are {', '.join(known)}")
    return attrs.evolve(config if config is not None else kind(), **options)


def make_qdrant_config(config: QdrantStoreConfig | None, options: Mapping[str, Any]) -> QdrantStoreConfig:
    """The configuration of a Qdrant store, which has a path or a url."""
    if options.get("path") is not None:
        options = {"url": None, **options}  # what is asked for here counts, whatever the configuration says
    elif options.get("url") is not None:
        options = {"path": None, **options}
    config = make_config(QdrantStoreConfig, config, options)
    if (config.path is None) == (config.url is None):
        raise ValidationError("path, url: one of them is needed, a directory or a server")
    return config


# ------------------------------------------------------------------------------------------------------------
# attuned.base.html
# What notebooks show: states, histories, matches, stores and reports as HTML, and plots.
# ------------------------------------------------------------------------------------------------------------


# What Jupyter shows: HTML with inline styles alone, everything escaped, of a user id the first four
# characters; colours that can be read on a light and on a dark page.

_MOST_BARS = 64  # axes of a snapshot
_MOST_COLUMNS = 50  # snapshots of a history
_SHOWN_MATCHES = 50
_MOST_REASONS = 5  # axes of a match: those in which the query leans most
_BAR_WIDTH = 140  # pixels
MAX_PLOTTED = 1_000
_ABOVE, _BELOW = (59, 125, 216), (214, 111, 33)  # blue and orange: told apart by all kinds of eyes
FONT = "font-family:sans-serif;font-size:12px;line-height:1.3"
_CELL = "padding:1px 6px;text-align:left;border:none;white-space:nowrap"
_NUMBER = "font-variant-numeric:tabular-nums"
_ROW = "background:none"
TABLE = "border-collapse:collapse;font:inherit;color:inherit"


def _rgba(value: float) -> str:
    """The colour of a value in [0, 1]: none at neutral, full at the ends."""
    red, green, blue = _ABOVE if value > NEUTRAL else _BELOW
    return f"rgba({red},{green},{blue},{2 * abs(value - NEUTRAL):.2f})"


def element(tag: str, style: str, *contents: str, title: str = "") -> str:
    """An HTML element; its contents are HTML already, its title is not."""
    hint = f' title="{html.escape(title)}"' if title else ""
    return f'<{tag} style="{style}"{hint}>{"".join(contents)}</{tag}>'


def table_row(*cells: str) -> str:
    """A row of an HTML table."""
    return element("tr", _ROW, *(element("td", _CELL, cell) for cell in cells))


def _bar(value: float) -> str:
    """A bar from neutral, which is in the middle, to the value."""
    start, width = 100 * min(value, NEUTRAL), 100 * abs(value - NEUTRAL)
    colour = _ABOVE if value > NEUTRAL else _BELOW
    fill = f"position:absolute;top:0;height:100%;left:{start:.1f}%;width:{width:.1f}%;background:rgb{colour}"
    middle = "position:absolute;top:0;height:100%;left:50%;width:1px;background:currentColor;opacity:.6"
    box = f"position:relative;width:{_BAR_WIDTH}px;height:10px;background:rgba(128,128,128,.15)"
    return element("div", box, element("div", fill), element("div", middle))


def _heading(snapshot: StateSnapshot) -> str:
    facts = (iso_time(snapshot.updated_at_unix_ms), snapshot.source, f"confidence {snapshot.confidence:g}")
    return f"<b>{html.escape(short_id(snapshot.user_id))}</b> {html.escape(', '.join(facts))}"


def _more(count: int, noun: str) -> str:
    return element("div", "opacity:.7", f"and {count:,} more {noun}") if count > 0 else ""


def _scale(width: int) -> str:
    """The ends of a scale from 0 to 1, and neutral in its middle."""
    ends = "display:flex;justify-content:space-between;opacity:.7"
    return element("div", f"width:{width}px;{ends}", *(element("span", "", end) for end in ("0", "0.5", "1")))


def snapshot_html(snapshot: StateSnapshot) -> str:
    """A snapshot: its axes as bars around neutral."""
    rows = [
        table_row(html.escape(name), _bar(value), element("span", _NUMBER, f"{value:.3f}"))
        for name, value in itertools.islice(snapshot.axes.items(), _MOST_BARS)
    ]
    scale = table_row("", _scale(_BAR_WIDTH), "")
    shown = element("table", TABLE, *rows, scale) if rows else element("div", "", "no axes: neutral")
    return element("div", FONT, _heading(snapshot), shown, _more(len(snapshot.axes) - len(rows), "axes"))


def _names_in(history: Iterable[StateSnapshot], order: Iterable[str] = ()) -> list[str]:
    """The axes that snapshots have, in this order, then in theirs."""
    there = dict.fromkeys(name for snapshot in history for name in snapshot.axes)
    return list(dict.fromkeys([*(name for name in order if name in there), *there]))


def _history_html(history: Sequence[StateSnapshot]) -> str:
    """Snapshots as a heat map: a row for each axis, a column for each snapshot, the newest at the right.

    The title of a cell tells its value; without one it has no colour.
    """
    shown = history[:_MOST_COLUMNS][::-1]
    if not shown:
        return element("div", FONT, "<b>no history</b>")
    rows = list[str]()
    for name in _names_in(history)[:_MOST_BARS]:
        cells = [element("td", _CELL, html.escape(name))]
        for each in shown:
            said = f"{each.axes[name]:.3f}" if name in each.axes else "no value"
            title = f"{iso_time(each.updated_at_unix_ms)}, {each.source}, {each.confidence:g}: {said}"
            colour = f"padding:0;border:none;min-width:12px;height:12px;background:{_rgba(each.axis(name))}"
            cells.append(element("td", colour, title=title))
        rows.append(element("tr", _ROW, *cells))
    users = html.escape(", ".join(map(short_id, distinct_users(shown))))
    first, last = (iso_time(shown[end].updated_at_unix_ms) for end in (0, -1))
    facts = f"<b>{users}</b> {plural(len(shown), 'snapshot')}, from {first} at the left to {last}"
    older = _more(len(history) - len(shown), "older snapshots")
    colours = ", ".join(_rgba(part / 4) for part in range(5))
    gradient = (
        f"width:{_BAR_WIDTH}px;height:8px;margin-top:4px;background:linear-gradient(to right, {colours})"
    )
    scale = element("div", gradient) + _scale(_BAR_WIDTH)
    return element("div", FONT, facts, element("table", TABLE, *rows), scale, older)


class History(list[StateSnapshot]):
    """What get_history returns: a list, which a notebook shows as a heat map.

    It equals a list of the same snapshots, and what is pickled or copied of it is a plain list.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type[list[StateSnapshot]], tuple[list[StateSnapshot]]]:
        return list, (self[:],)

    def _repr_html_(self) -> str:
        return _history_html(self)


def _reason(axes: Mapping[str, float], name: str) -> str:
    """A value of a match as a coloured cell with its number."""
    value = axes.get(name)
    colour = f"{_CELL};{_NUMBER};background:{_rgba(NEUTRAL if value is None else value)}"
    return element("td", colour, "" if value is None else f"{value:.2f}")


def _matches_html(matches: Matches) -> str:
    """Matches as rows below what was asked for, with the axes in which that leans most."""
    if not matches:
        return element("div", FONT, "<b>no match</b>")
    shown, asked = matches[:_SHOWN_MATCHES], matches.query
    leaning = sorted(asked, key=lambda name: -abs(asked[name] - NEUTRAL))
    names = leaning[:_MOST_REASONS] or _names_in(match.snapshot for match in shown)[:_MOST_REASONS]
    titles = ("score", "user", "time", "source", *names)
    rows = [element("tr", _ROW, *(element("td", _CELL, f"<b>{html.escape(title)}</b>") for title in titles))]
    if asked:
        cells = (element("td", _CELL, text) for text in ("", "asked for", "", ""))
        rows.append(element("tr", _ROW, *cells, *(_reason(asked, name) for name in names)))
    for match in shown:
        state = match.snapshot
        facts = (
            f"{match.score:.4f}",
            short_id(state.user_id),
            iso_time(state.updated_at_unix_ms),
            state.source,
        )
        cells = (element("td", f"{_CELL};{_NUMBER}", html.escape(fact)) for fact in facts)
        rows.append(element("tr", _ROW, *cells, *(_reason(state.axes, name) for name in names)))
    more = _more(len(asked) - len(names), "axes") + _more(len(matches) - len(shown), "matches")
    return element("div", FONT, element("table", TABLE, *rows), more)


class Matches(list[Match]):
    """What search_similar returns: a list, which a notebook shows beside ``query``, the axes asked for.

    It equals a list of the same matches, and what is pickled or copied of it is a plain list.
    """

    __slots__ = ("query",)

    def __init__(self, matches: Iterable[Match] = (), query: Mapping[str, float] | None = None) -> None:
        super().__init__(matches)
        self.query: Mapping[str, float] = {} if query is None else query

    def __reduce__(self) -> tuple[type[list[Match]], tuple[list[Match]]]:
        return list, (self[:],)

    def _repr_html_(self) -> str:
        return _matches_html(self)


def facts_html(title: str, facts: Mapping[str, object]) -> str:
    """What there is to say of one thing, a row each; what is None or empty is left out."""
    rows = [
        table_row(name, html.escape(f"{fact:,}" if isinstance(fact, int) else str(fact)))
        for name, fact in facts.items()
        if fact not in (None, "")
    ]
    return element("div", FONT, f"<b>{html.escape(title)}</b>", element("table", TABLE, *rows))


def store_html(store: Any, health: Health | None) -> str:
    """A store: where it is, how it is and how much it holds; ``health`` None where nobody asked."""
    facts: dict[str, object] = {
        "place": "" if store.engine == "memory" else store.location,
        "engine": store.engine,
    }
    if store.is_closed:
        facts["health"] = "closed"
    elif health is None:
        facts["health"] = "not asked: await store.health()"
    else:
        facts |= {"health": health.status, "users": health.users, "points": health.points}
        facts |= {"server": health.version, "message": health.message}
    return facts_html(type(store).__name__, facts)


def plot_states(history: Sequence[StateSnapshot], axes: Iterable[str] | None, known: Sequence[str]) -> Any:
    """Each axis as a line of its own, one below the other: its steps through time, around neutral.

    ``axes`` are those to plot, of those that the store knows; None for all that there is anything of.
    """
    if axes is None:
        names = _names_in(history, known) or list(known)
    else:
        names = list(check_axis_names(axes) or ())
        for name in names:
            if name not in known:
                raise ValidationError(f"axes: the store has no axis {brief(name)}; it has {', '.join(known)}")
    try:  # not import statements, at which a type checker would want matplotlib wherever this file is copied
        pyplot: Any = import_module("matplotlib.pyplot")
        dates: Any = import_module("matplotlib.dates")
    except ImportError as error:
        raise MissingDependencyError("plotting needs matplotlib: pip install matplotlib") from error
    entries = history[::-1]
    times = [datetime.fromtimestamp(each.updated_at_unix_ms / 1000, UTC) for each in entries]
    held = (times[-1] - times[0]) * 0.04 or timedelta(hours=1)  # what the last state is drawn for
    height = max(0.34, 0.7 - 0.04 * len(names))  # few axes get more room each
    _, plot = pyplot.subplots(figsize=(9, 1.0 + height * len(names)), layout="constrained")
    for row, name in enumerate(names):
        _plot_axis(plot, row, [*times, times[-1] + held], [each.axis(name) for each in entries])
    plot.set_yticks(range(len(names)), names)
    plot.set_ylim(len(names) - 0.4, -0.6)
    plot.set_xlim(times[0], times[-1] + held)
    plot.xaxis.set_major_formatter(dates.ConciseDateFormatter(plot.xaxis.get_major_locator(), tz=UTC))
    title = f"{short_id(history[0].user_id)}, values from 0 to 1 around neutral 0.5, times in UTC"
    plot.set_title(title, loc="left", fontsize="medium")
    plot.spines[["top", "right", "left"]].set_visible(False)
    plot.tick_params(axis="y", length=0)
    return plot


def _plot_axis(plot: Any, row: int, times: Sequence[datetime], values: Sequence[float]) -> None:
    """One axis: filled above neutral in one colour and below in the other, a dot at each snapshot."""
    heights = [0.9 * (value - NEUTRAL) for value in [*values, values[-1]]]
    for colour, part in ((_ABOVE, max), (_BELOW, min)):
        edge = [row - part(height, 0.0) for height in heights]  # rows are counted downwards
        fill = [channel / 255 for channel in colour]
        plot.fill_between(times, row, edge, step="post", color=fill, alpha=0.55, linewidth=0)
    plot.axhline(row, color="gray", linewidth=0.6)
    dots = [row - height for height in heights[:-1]]
    plot.plot(times[:-1], dots, ".", color="gray", markersize=3)
    at_the_right = plot.get_yaxis_transform()
    plot.text(1.01, row, f"{values[-1]:.2f}", transform=at_the_right, va="center", fontsize="small")


# ------------------------------------------------------------------------------------------------------------
# attuned.base.telemetry
# What stores report to, where it is installed: OpenTelemetry and prometheus_client.
# ------------------------------------------------------------------------------------------------------------


# A store that reports is of a subclass whose public methods do; without the libraries, or with
# telemetry=False, it stays of its own class and nothing is in the way.

UNREPORTED = contextlib.nullcontext()

_REQUESTS = {"retrieve": "get", "write": "upsert"}  # by other names than the engines'
_SYSTEMS = dict.fromkeys(("edge", "local", "server"), "qdrant")  # the others are called as their backend
_OF_A_USER = {  # whose first parameter tells whom it is about
    "upsert_latest",
    "patch",
    "update",
    "get_latest",
    "get_history",
    "search_similar",
    "delete",
}
SPANS = {
    "upsert_latest": "attuned.store.upsert",
    "upsert_many": "attuned.store.upsert_many",
    "patch": "attuned.store.patch",
    "update": "attuned.store.update",
    "get_latest": "attuned.store.get",
    "get_many": "attuned.store.get_many",
    "get_history": "attuned.store.history",
    "search_similar": "attuned.store.search",
    "delete": "attuned.store.delete",
    "count": "attuned.store.count",
    "prune": "attuned.store.prune",
    "create_snapshot": "attuned.snapshot.create",
    "restore_snapshot": "attuned.snapshot.restore",
}


class _Observable(Protocol):
    config: Any
    _operations: Any

    @property
    def engine(self) -> str: ...


class _PublicProvider:
    """The tracer provider by the public interface of opentelemetry, which takes longer."""

    def __init__(self, trace: Any) -> None:
        self._trace = trace

    @property
    def _TRACER_PROVIDER(self) -> Any:  # noqa: N802 - stands in for that of opentelemetry
        provider = self._trace.get_tracer_provider()
        return None if isinstance(provider, self._trace.ProxyTracerProvider) else provider


def provider_source(trace: Any) -> Any:
    """What has the application's tracer provider as ``_TRACER_PROVIDER``, None where it has set none so far.

    All that is relied on beyond the public interface of opentelemetry: that opentelemetry.trace has it so.
    """
    if trace is None:
        return SimpleNamespace(_TRACER_PROVIDER=None)
    trace.get_tracer_provider()  # makes the one that OTEL_PYTHON_TRACER_PROVIDER names
    return trace if hasattr(trace, "_TRACER_PROVIDER") else _PublicProvider(trace)


class Telemetry:
    """Spans and metrics, either of which may be absent."""

    def __init__(self, trace: Any, metrics: Metrics | None) -> None:
        self.metrics = metrics
        self.source = provider_source(trace)
        self.classes: dict[type, type] = {}  # those that report here, by those that do not
        self._trace = trace
        self._tracer: tuple[Any, Any] = (None, None)  # the provider that it is from, and the tracer

    @contextlib.contextmanager
    def _span(self, name: str, attributes: Mapping[str, Any], *, request: bool = False) -> Generator[Any]:
        """A span, or None where the application has set no provider so far."""
        trace, provider = self._trace, self.source._TRACER_PROVIDER
        if provider is None:
            yield None
            return
        known, tracer = self._tracer
        if known is not provider:
            tracer = provider.get_tracer("attuned_store", __version__)
            self._tracer = provider, tracer
        backend = attributes["backend"]
        given = {f"attuned.{key}": value for key, value in attributes.items() if "." not in key}
        given |= {key: value for key, value in attributes.items() if "." in key}
        given |= {
            "db.system.name": _SYSTEMS.get(backend, backend),
            "db.operation.name": attributes["operation"],
        }
        with tracer.start_as_current_span(
            name,
            kind=trace.SpanKind.CLIENT if request and backend == "server" else trace.SpanKind.INTERNAL,
            attributes={key: value for key, value in given.items() if value is not None},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                kind = _reported_kind(error, request=request)
                span.set_attribute("error.type", kind.__name__)
                # Not the message: a server's answer, or a value that was refused, may hold a user id.
                meaning = (kind.__doc__ or "").partition("\n")[0] if issubclass(kind, StoreError) else ""
                span.set_status(trace.Status(trace.StatusCode.ERROR, meaning or kind.__name__))
                raise

    @contextlib.contextmanager
    def operation(self, name: str, store: _Observable, about: object) -> Generator[None]:
        """Report an operation of a store, about a user or nobody."""
        began, status, operation = time.perf_counter(), "error", name.rpartition(".")[2]
        known = {"backend": store.engine, "operation": operation, "user": id_for_logs(about)}
        try:
            with self._span(name, {**known, "db.collection.name": store._operations.collection}) as span:
                try:
                    yield
                finally:
                    if span is not None:  # an asynchronous store may have been opened only now
                        span.set_attribute("attuned.backend", store.engine)
            status = "ok"
        finally:
            if self.metrics is not None:
                series = self.metrics.operations(store.engine, operation, status)
                series.count(time.perf_counter() - began)

    @contextlib.contextmanager
    def request(self, backend: str, operation: str, attempt: int = 1) -> Generator[None]:
        """Report one try of a request to a backend."""
        began, name = time.perf_counter(), _REQUESTS.get(operation, operation.partition(" ")[0])
        metrics = self.metrics
        if metrics is not None and attempt > 1:
            metrics.series("attuned_qdrant_retries_total").count()
        try:
            attributes = {"backend": backend, "operation": name, "attempt": attempt}
            with self._span(f"attuned.qdrant.{name}", attributes, request=True):
                yield
        except BaseException as error:
            if metrics is not None:
                kind = _reported_kind(error, request=True).__name__
                metrics.series("attuned_qdrant_errors_total", name, kind).count()
            raise
        finally:
            if metrics is not None:
                series = metrics.series("attuned_qdrant_request_duration_seconds", name)
                series.count(time.perf_counter() - began)

    def noted(self, answer: T) -> T:
        """Give back what an operation answered; where it is a report of a snapshot, count that."""
        if isinstance(answer, SnapshotReport) and self.metrics is not None:
            self.metrics.series("attuned_snapshot_duration_seconds").count(answer.duration_ms / 1000)
            self.metrics.snapshot_bytes = answer.bytes or 0
        return answer


def _reported_kind(error: BaseException, *, request: bool) -> type[BaseException]:
    """What an error is called; what an engine itself raises is on its way to be a BackendError."""
    own = isinstance(error, StoreError) or not isinstance(error, Exception)
    return BackendError if request and not own else type(error)


def find_telemetry() -> Telemetry | None:
    """What the libraries that are installed offer to report to."""
    trace: Any = None
    metrics: Metrics | None = None
    with contextlib.suppress(ImportError):
        from opentelemetry import trace
    with contextlib.suppress(ImportError, ValueError):  # another copy of this library may have the names
        from prometheus_client import REGISTRY

        if {"PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"} & os.environ.keys():
            LOGGER.warning(
                "no metrics: they are counted by process, and prometheus_client is in multiprocess mode"
            )
        else:
            REGISTRY.register(found := Metrics())
            metrics = found
    return Telemetry(trace, metrics) if trace or metrics else None


class Reporting:
    """What the stores of this process report to: found when the first asks; None without either library."""

    def __init__(self) -> None:
        self.telemetry: Telemetry | None = None
        self._found = False
        self._lock = threading.RLock()

    def reporter(self, *, wanted: bool) -> Telemetry | None:
        """What to report to, for those who want to."""
        if not wanted:
            return None
        with self._lock:
            if not self._found:
                self.telemetry, self._found = find_telemetry(), True
        return self.telemetry


REPORTING = Reporting()


def report_request(
    reporter: Telemetry | None, backend: str, operation: str, attempt: int = 1
) -> contextlib.AbstractContextManager[None]:
    """Report a request to a backend, if there is anything to report to."""
    return UNREPORTED if reporter is None else reporter.request(backend, operation, attempt)


def report_slow(
    reporter: Telemetry | None, backend: str, operation: str, seconds: float, about: object
) -> None:
    """Log a step of an operation that took too long, and count it where there is anything to report to."""
    user_id = id_for_logs(about)
    whose = "" if user_id is None else f", user {user_id!r}"
    SLOW_LOGGER.warning("slow: %s took %.0f ms on %s%s", operation, seconds * 1000, backend, whose)
    if reporter is not None and reporter.metrics is not None:
        reporter.metrics.series("attuned_store_slow_operations_total", backend, operation).count()


def id_for_logs(first: object) -> str | None:
    """The beginning of the id of the user that an operation is about."""
    user_id = first.user_id if isinstance(first, StateSnapshot) else first
    if not isinstance(user_id, str):
        return None
    return short_id(user_id).encode(errors="replace").decode()  # it has not been checked


def observe(store: _Observable) -> None:
    """Let a store report its operations, or not, as its configuration says."""
    kind = reporting_class(type(store), wanted=store.config.telemetry)
    if type(store) is not kind:
        cast("Any", store).__class__ = kind


def reporting_class(kind: type[Any], *, wanted: bool) -> type[Any]:
    """The class that reports what a class of stores does, or that class itself where nothing is reported.

    ``_reports`` names its methods, ``_always_on`` the engine where that never changes, which saves asking
    each time. A store is best made of it: one whose class is set later is slower at every attribute.
    """
    kind = vars(kind).get("_reported_class", kind)
    telemetry = REPORTING.reporter(wanted=wanted)
    if telemetry is None:
        return kind
    if kind not in telemetry.classes:  # otherwise it is the same class, by name too
        members = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
        members |= {
            name: _reporting(getattr(kind, name), telemetry, kind._always_on) for name in kind._reports
        }
        members["_reported_class"] = kind
        make = cast("Any", type(kind))  # the metaclass
        telemetry.classes.setdefault(kind, make(kind.__name__, (kind,), members))
    return telemetry.classes[kind]


# A method that reports is compiled for the signature of the method: to pass on *args and **kwargs would take
# 0.2 us, twice what a read from memory does. For the same reason it does itself what Series.count does.
_REPORTING = """
{define} {name}{signature}:
    if {always}_source._TRACER_PROVIDER is not None:
        with _operation({span!r}, self, {about}):
            return _noted({call})
"""
_COUNTING = """
    _began = _clock()
    try:
        _answer = {call}
    except BaseException:
        _count(self, "error", _clock() - _began)
        raise
    _seconds = _clock() - _began
    try:
        _cell = {cells}[_thread()]
    except KeyError:
        _count(self, "ok", _seconds)
    else:
        _cell[0] += _seconds
        _cell[1 if _seconds <= {quick} else 2 if _seconds <= {short} else 1 + _bisect(_bounds, _seconds)] += 1
    return _answer
"""


def _reporting(method: Callable[..., Any], telemetry: Telemetry, backend: str) -> Callable[..., Any]:
    """A method that reports: in full where there is a tracer provider, else in numbers, at little cost."""
    name, metrics = method.__name__, telemetry.metrics
    operation = SPANS[name].rpartition(".")[2]
    cells: dict[Any, Any] = {}  # of what succeeds: by thread, or by backend and thread

    def count(store: _Observable, status: str, seconds: float) -> None:
        engine = store.engine
        series = cast("Metrics", metrics).operations(engine, operation, status)
        series.count(seconds)
        if status == "ok" and not backend:
            cells[engine] = series.cells

    if metrics is not None and backend:
        cells = metrics.operations(backend, operation, "ok").cells
    kinds, empty = inspect.Parameter, inspect.Parameter.empty
    forms: dict[Any, str] = {
        kinds.KEYWORD_ONLY: "{0}={0}",
        kinds.VAR_POSITIONAL: "*{0}",
        kinds.VAR_KEYWORD: "**{0}",
    }
    signature = inspect.signature(method)
    bare = [
        each.replace(annotation=empty, default=empty if each.default is empty else None)
        for each in signature.parameters.values()
    ]
    given = ", ".join(forms.get(each.kind, "{0}").format(each.name) for each in bare)
    waits = inspect.iscoroutinefunction(method)
    code = (_REPORTING + (_COUNTING if metrics else "    return {call}")).format(
        define="async def" if waits else "def",
        name=name,
        signature=inspect.Signature(bare),
        always="True or " if SPANS[name].startswith("attuned.snapshot.") else "",
        span=SPANS[name],
        about=bare[1].name if name in _OF_A_USER else None,
        call=f"{'await ' if waits else ''}_method({given})",
        cells="_cells" if backend else "_cells[self.engine]",
        quick=SECONDS[0],
        short=SECONDS[1],
    )
    names: dict[str, Any] = {
        "_source": telemetry.source,
        "_operation": telemetry.operation,
        "_noted": telemetry.noted,
        "_method": method,
        "_clock": time.perf_counter,
        "_count": count,
        "_cells": cells,
        "_thread": threading.get_ident,
        "_bisect": bisect_left,
        "_bounds": SECONDS,
    }
    exec(compile(code, f"<reporting {name}>", "exec"), names)  # noqa: S102 - of what stands above alone
    made: Any = functools.wraps(method)(names[name])
    made.__defaults__, made.__kwdefaults__ = method.__defaults__, method.__kwdefaults__
    return cast("Callable[..., Any]", made)


# ------------------------------------------------------------------------------------------------------------
# attuned.snapshots
# Snapshots, which are backups: their format, and files in a directory.
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# attuned.snapshots.archive
# The format of portable snapshots: write, read, verify.
#
# A portable snapshot is gzipped JSON lines, which ``zcat FILE | jq`` reads: a header, then one state a line,
# then a footer. Each is one line; here they are broken.
#
#     {"header":{"format":"attuned_store","version":2,"engine":"edge","created_at":"2026-01-17T12:00:00.123Z",
#     "collections":[{"name":"attuned_state","kind":"states","axes":["warmth","formality"]}]}}
#     {"user_id":"ada","axes":{"warmth":0.8},"updated_at_unix_ms":1768651200123,"source":"self_report",
#     "confidence":1.0,"schema_version":1}
#     {"footer":{"collections":[{"name":"attuned_state","users":1,"states":1}], "sha256":"<of all lines
#     before>","gzip_sha256":"<of all bytes of the file before this gzip member>"}}
#
# The states of a user stand together, each newer than the one before. What else a header or a footer has is
# ignored; another "kind" of collection, or a higher "version", is for a newer library. A line ends with a
# newline and has at most 1 MiB, a footer 64 KiB. All is UTF-8; this library writes ASCII alone.
#
# The file is two members of gzip. The first holds the header and the states. The second holds the footer and
# is one certain sequence of bytes: a header without a time, and one stored block. So the footer is found from
# the end of the file without reading the rest (the last four bytes are the size of its line), and no byte of
# the file can change unnoticed: those before it are in its digest, and its own are compared. gzip's own
# checks alone would miss some: of the header, between blocks, and where another encoding gives the same
# contents.
# ------------------------------------------------------------------------------------------------------------


_FORMAT, _VERSION = "attuned_store", 2
_MAX_LINE_BYTES = 1 << 20  # a state of 1,024 axes has 100 KB
READ_BYTES = 1 << 16
GZIP_MAGIC = b"\x1f\x8b"
_FOOTER_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x01"  # of gzip; then that of a last, stored block
_FOOTER_START = len(_FOOTER_HEAD) + 4
_FOOTER_FRAME = _FOOTER_START + 8
_MAX_FOOTER_BYTES = READ_BYTES - _FOOTER_FRAME  # one stored block holds little more
_STATE_FIELDS = frozenset(field.name for field in attrs.fields(StateSnapshot))

_quoted: Callable[[str], str] = json.encoder.encode_basestring_ascii
_compact = json.JSONEncoder(separators=(",", ":")).encode

Progress = Callable[[int, int | None], object]
SnapshotKind = Literal["native", "portable"]
RestoreMode = Literal["replace", "merge", "skip"]
SNAPSHOT_SUFFIXES: Mapping[SnapshotKind, str] = {"native": ".snap", "portable": ".attuned"}


def ignore_progress(done: int, total: int | None) -> None:
    """The progress of an operation of which nobody wants to know."""


def check_progress(progress: Progress | None) -> Progress:
    """What to call after each batch; raises before anything is done, not after the first."""
    if progress is None:
        return ignore_progress
    check_callable("progress", progress)
    return progress


class ArchiveContents(NamedTuple):
    """What a portable snapshot holds, as it says itself: the counts stand in its footer."""

    engine: str
    created_at: datetime
    collection: str
    axes: tuple[str, ...]
    users: int | None = None
    states: int | None = None


class StateCounter:
    """Counts states and users, who come one after another, each user's states oldest first."""

    def __init__(self) -> None:
        self.users = self.states = 0
        self.axes: set[str] = set()  # that occur
        self._last: StateSnapshot | None = None
        self._shape: Shape | None = None
        self._hashes = [array("q") for _ in range(256)]  # of the users, by which one who comes twice is found

    def add(self, states: Iterable[StateSnapshot]) -> None:
        """Count more; raises SnapshotError where a user's order is broken."""
        for state in states:
            last, self._last = self._last, state
            self.states += 1
            if state.axes._shape is not self._shape:
                self._shape = state.axes._shape
                self.axes.update(self._shape.names)
            if last is None or last.user_id != state.user_id:
                self.users += 1
                found = hash(state.user_id)
                self._hashes[found & 0xFF].append(found)
            elif last.updated_at_unix_ms >= state.updated_at_unix_ms:
                raise SnapshotError("updated_at_unix_ms: a user's states are not in order, or one twice")

    def check_users(self) -> None:
        """Raise SnapshotError where a user came twice; of 10**9, chance makes two alike in 3 % of cases."""
        if any(len(set(hashes)) < len(hashes) for hashes in self._hashes):
            raise SnapshotError("the states of a user do not stand together")

    def check_axes(self, axes: Iterable[str]) -> None:
        """Raise SnapshotError where an axis occurs that is none of these."""
        if strange := self.axes.difference(axes):
            raise SnapshotError(f"a state has the axis {min(strange)!r}, which the file does not name")


def _state_line(state: StateSnapshot) -> str:
    """A state as one line of JSON, of ASCII alone, with the names of its fields."""
    axes = state.axes
    return (
        f'{{"user_id":{_quoted(state.user_id)},"axes":{axes._shape.json_form % axes._values},'
        f'"updated_at_unix_ms":{state.updated_at_unix_ms},"source":"{state.source.value}",'
        f'"confidence":{state.confidence!r},"schema_version":{state.schema_version}}}\n'
    )


def _footer_member(line: bytes) -> bytes:
    """The one gzip member in which this footer may stand."""
    size = len(line)
    lengths, checks = struct.pack("<HH", size, size ^ 0xFFFF), struct.pack("<II", zlib.crc32(line), size)
    return _FOOTER_HEAD + lengths + line + checks


class ArchiveWriter:
    """Writes a portable snapshot into a file, block by block."""

    block_bytes = 1 << 18  # of lines, compressed at once in 3 ms

    def __init__(self, file: IO[bytes], contents: ArchiveContents) -> None:
        self._file, self.contents = file, contents
        self._gzip = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._lines_digest, self._digest = hashlib.sha256(), hashlib.sha256()
        collection = {"name": contents.collection, "kind": "states", "axes": contents.axes}
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "engine": contents.engine,
            "created_at": iso_time(contents.created_at),
            "collections": [collection],
        }
        self._lines = [_compact({"header": header}) + "\n"]
        self._size = 0  # of the lines
        self.bytes = 0
        self.counted = StateCounter()

    def add(self, states: Sequence[StateSnapshot]) -> None:
        """Take in states: all of a user, oldest first."""
        self.counted.add(states)
        for state in states:
            line = _state_line(state)
            self._lines.append(line)
            self._size += len(line)
            if self._size >= self.block_bytes:
                self._compress_lines()

    def _compress_lines(self) -> None:
        data = "".join(self._lines).encode()
        self._lines, self._size = [], 0
        self._lines_digest.update(data)
        self._write(self._gzip.compress(data))

    def _write(self, packed: bytes) -> None:
        self._file.write(packed)
        self._digest.update(packed)
        self.bytes += len(packed)

    def finish(self) -> str:
        """Write what is left, and the footer; returns the SHA-256 of the file."""
        self.counted.check_users()  # what could not be read back is no backup
        self.counted.check_axes(self.contents.axes)
        self._compress_lines()
        self._write(self._gzip.flush())
        name, counted = self.contents.collection, self.counted
        counts = {"name": name, "users": counted.users, "states": counted.states}
        digests = {"sha256": self._lines_digest.hexdigest(), "gzip_sha256": self._digest.hexdigest()}
        footer = _compact({"footer": {"collections": [counts], **digests}}) + "\n"
        self._write(_footer_member(footer.encode()))
        return self._digest.hexdigest()


class GzipReader:
    """The first member of a gzip file, read forward in bounded pieces; SnapshotError where it is damaged."""

    block_bytes = 1 << 18

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._gzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._packed = b""  # what was last read from the file
        self._ready = bytearray()
        self._digest = hashlib.sha256()

    def starts_with(self, prefix: bytes) -> bool:
        """Whether the contents begin so; nothing was taken yet."""
        while len(self._ready) < len(prefix) and not self._gzip.eof:
            self._decompress_more()
        return self._ready.startswith(prefix)

    def take(self, size: int) -> bytes:
        """The next so many bytes."""
        while len(self._ready) < size:
            if self._gzip.eof:
                raise SnapshotError("it ends too early")
            self._decompress_more()
        return self._take_ready(size)

    def take_lines(self, least: int) -> bytes:
        """The next lines, as many as make so many bytes; at the end what there is, if only half a line."""
        while not (end := self._ready.find(b"\n", least - 1) + 1) and not self._gzip.eof:
            if len(self._ready) > least + _MAX_LINE_BYTES:
                raise SnapshotError(f"a line is longer than {_MAX_LINE_BYTES:,} bytes")
            self._decompress_more()
        return self._take_ready(end or len(self._ready))

    def _take_ready(self, size: int) -> bytes:
        taken = bytes(self._ready[:size])
        del self._ready[:size]
        return taken

    def _decompress_more(self) -> None:
        packed = self._gzip.unconsumed_tail or self._read()
        if not packed:
            raise SnapshotError("it is cut short")
        try:
            self._ready += self._gzip.decompress(packed, self.block_bytes)
        except zlib.error as error:
            raise SnapshotError(f"it is damaged: {error}") from error

    def _read(self) -> bytes:
        self._digest.update(self._packed)
        self._packed = self._file.read(READ_BYTES)
        return self._packed

    def finish(self) -> tuple[str, bytes]:
        """Check that all was taken; returns the SHA-256 of the member, and what follows, up to 64 KiB."""
        while not self._ready and not self._gzip.eof:
            self._decompress_more()
        if self._ready:
            raise SnapshotError("something stands behind its end")
        rest = self._gzip.unused_data
        self._digest.update(self._packed[: len(self._packed) - len(rest)])
        sha256 = self._digest.hexdigest()
        rest += self._file.read(READ_BYTES)  # more than may be there
        self._digest.update(rest)
        return sha256, rest

    def sha256(self) -> str:
        """The SHA-256 of the file, once it is read to its end."""
        return self._digest.hexdigest()


class ArchiveReader:
    """Reads a portable snapshot forward, once; everything is checked on the way.

    What is wrong is a SnapshotError. States come before all is known to be right: who changes a store with
    them must be able to take that back, or have read them once before.
    """

    block_bytes = 1 << 15  # of lines, parsed at once in 2 ms

    def __init__(self, unpacked: GzipReader) -> None:
        self._unpacked = unpacked
        self._lines_digest = hashlib.sha256()
        self.contents = _parse_header(self._take_lines(1))
        self.axes = self.contents.axes
        self.sha256 = ""  # known at the end

    def _take_lines(self, least: int) -> bytes:
        lines = self._unpacked.take_lines(least)
        self._lines_digest.update(lines)
        return lines

    def states(self) -> Iterator[list[StateSnapshot]]:
        """All states, so many at a time as stand in a block of lines."""
        counted = StateCounter()
        while lines := self._take_lines(self.block_bytes):
            states = parse_states(lines, 2 + counted.states)
            counted.add(states)
            counted.check_axes(self.axes)
            yield states
        counted.check_users()
        gzip_sha256, rest = self._unpacked.finish()
        footer, counts = _parse_footer(rest)
        digests = {"sha256": self._lines_digest.hexdigest(), "gzip_sha256": gzip_sha256}
        check_same("its footer", footer, digests)
        read = {"name": self.contents.collection, "users": counted.users, "states": counted.states}
        check_same("its footer", counts, read)
        self.contents = self.contents._replace(users=counted.users, states=counted.states)
        self.sha256 = self._unpacked.sha256()


def read_summary(unpacked: GzipReader, file: IO[bytes]) -> ArchiveContents:
    """What the header and the footer of a portable snapshot say; what is between is not read."""
    contents = ArchiveReader(unpacked).contents
    file_size = file.seek(-4, os.SEEK_END) + 4
    size = _FOOTER_FRAME + int.from_bytes(file.read(4), "little")
    file.seek(-min(size, file_size, READ_BYTES), os.SEEK_END)
    counts = _parse_footer(file.read())[1]
    users, states = counts.get("users"), counts.get("states")
    if not isinstance(users, int) or not isinstance(states, int):
        raise SnapshotError("its footer: numbers of users and states are needed")
    return contents._replace(users=users, states=states)


def _parse_header(line: bytes) -> ArchiveContents:
    fields = _unwrap(line, "header")
    if fields.get("format") != _FORMAT:
        raise SnapshotError("it is no portable snapshot of attuned_store")
    version = fields.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise SnapshotError(
            f"it has format {brief(version)}; up to {_VERSION} is read: upgrade attuned-store"
        )
    check_same("its header", fields, {"version": _VERSION})
    return parse_contents(fields, parse_collection(fields))


def _parse_footer(rest: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the footer says, and of its collection; its gzip member must be these bytes, and no more."""
    line = rest[_FOOTER_START:-8]
    if len(line) > _MAX_FOOTER_BYTES or rest != _footer_member(line):
        raise SnapshotError("it is cut short, altered or packed anew: it does not end with its own footer")
    if line.find(b"\n") != len(line) - 1:
        raise SnapshotError("its footer is not one line")
    fields = _unwrap(line, "footer")
    return fields, parse_collection(fields)


def _unwrap(line: bytes, name: str) -> dict[str, Any]:
    """What stands in the header or the footer."""
    found = parse_object(line, f"its {name}").get(name)
    if not isinstance(found, dict):
        raise SnapshotError(f'its {name}: {{"{name}": ...}} is needed')
    return cast("dict[str, Any]", found)


def check_same(what: str, found: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Raise SnapshotError where something says other than what there is."""
    for name, value in read.items():
        if found.get(name).__class__ is not value.__class__ or found[name] != value:
            raise SnapshotError(f"{what}: {name}: {brief(found.get(name))} differs from {brief(value)}")


def parse_collection(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a header or footer says of its only collection."""
    found = cast("list[Any] | None", fields.get("collections"))
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        raise SnapshotError(f"collections: one is read, got {brief(found)}")
    return cast("dict[str, Any]", found[0])


def parse_contents(fields: Mapping[str, Any], collection: Mapping[str, Any]) -> ArchiveContents:
    """What a header says, which may be anything."""
    kind = collection.get("kind", "states")
    if kind != "states":
        raise SnapshotError(f"it holds a collection of the kind {brief(kind)}: upgrade attuned-store")
    try:
        created_at = datetime.fromisoformat(cast("str", fields.get("created_at")))
        axes = check_axis_names(collection.get("axes"))
        if created_at.tzinfo is None or axes is None:
            raise ValidationError("created_at with its time zone and axes are needed")
        created_at = created_at.astimezone(UTC)
    except (TypeError, ValueError, OverflowError) as error:
        raise SnapshotError(f"its header: {one_line(str(error))}") from error
    return ArchiveContents(str(fields.get("engine")), created_at, str(collection.get("name")), axes)


def parse_states(block: bytes, first: int) -> list[StateSnapshot]:
    """The states of whole lines, the first of which has this number."""
    if not block.endswith(b"\n"):
        raise SnapshotError("its last line has no end")
    states: list[StateSnapshot] = []
    for number, line in enumerate(block[:-1].split(b"\n"), first):
        try:
            states.append(_parse_state(line))
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"line {number}: {one_line(str(error))}") from error
    return states


def _parse_state(line: bytes) -> StateSnapshot:
    text = line.decode()
    fields: Any = json.loads(text)
    if not isinstance(fields, dict) or fields.keys() != _STATE_FIELDS:
        raise ValueError(f"an object with {', '.join(sorted(_STATE_FIELDS))} is needed, and nothing else")
    fields = cast("dict[str, Any]", fields)
    if not isinstance(fields["axes"], dict):
        raise ValueError("axes: an object is needed")  # noqa: TRY004 - as for every wrong line
    strings = len(fields) + len(cast("dict[str, Any]", fields["axes"])) + 2  # and the values of two fields
    if text.count('"') != 2 * strings:  # a name is there twice, or a quote is escaped
        json.loads(text, object_pairs_hook=_each_once)
    return stored_snapshot(**fields)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What json makes of an object, which by itself keeps the last of two equal names."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is there twice")
    return made


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object with each name once."""
    try:
        found: Any = json.loads(data.decode(), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{what}: {one_line(str(error))}") from error
    if not isinstance(found, dict):
        raise SnapshotError(f"{what}: a JSON object is needed")
    return cast("dict[str, Any]", found)


# ------------------------------------------------------------------------------------------------------------
# attuned.snapshots.legacy
# Archives of version 0.1, which are read: a gzipped tar of JSON lines.
#
# Members snapshots-00000.jsonl, snapshots-00001.jsonl and so on, of about 256 KiB each, then manifest.json
# with the counts; behind the gzip member an empty one, whose extra field (RFC 1952, 2.3.1.1) holds the
# SHA-256 of the first: so no byte is altered, whatever is not looked at here.
# ------------------------------------------------------------------------------------------------------------


TAR_BLOCK = 512  # bytes, of tar
_MANIFEST = "manifest.json"
_MAX_MEMBER_BYTES = 1 << 20
_SEAL_HEAD = b"\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x24\x00AS\x20\x00"
_SEAL_TAIL = b"\x03\x00" + bytes(8)
_SEAL_BYTES = len(_SEAL_HEAD) + 32 + len(_SEAL_TAIL)


class LegacyReader:
    """Reads an archive of version 0.1, as ArchiveReader does those of today."""

    def __init__(self, unpacked: GzipReader) -> None:
        self._unpacked = unpacked
        self._members = self._bytes = 0
        self.contents: ArchiveContents | None = None  # known at the end
        self.axes: Iterable[str] = ()  # that occurred until now; at the end those of the store
        self.sha256 = ""

    def states(self) -> Iterator[list[StateSnapshot]]:
        """The states of one member after another."""
        counted = StateCounter()
        self.axes = counted.axes
        while (member := self._take_member())[0] != _MANIFEST:
            states = parse_states(member[1], 1 + counted.states)
            counted.add(states)
            yield states
        counted.check_users()
        manifest = parse_object(member[1], _MANIFEST)
        check_same(_MANIFEST, manifest, {"format_version": 1})
        collection = parse_collection(manifest)
        check_same(_MANIFEST, collection, {"users": counted.users, "snapshots": counted.states})
        contents = parse_contents(manifest, collection)
        counted.check_axes(contents.axes)
        self._unpacked.take(2 * TAR_BLOCK)
        sha256, rest = self._unpacked.finish()
        if rest != _SEAL_HEAD + bytes.fromhex(sha256) + _SEAL_TAIL:
            raise SnapshotError("it is cut short, altered or packed anew: it does not end with its own seal")
        self.contents = contents._replace(users=counted.users, states=counted.states)
        self.axes, self.sha256 = contents.axes, self._unpacked.sha256()

    def _take_member(self) -> tuple[str, bytes]:
        import tarfile

        try:
            header = tarfile.TarInfo.frombuf(self._unpacked.take(TAR_BLOCK), "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise SnapshotError(f"it is no archive of attuned_store: {error}") from error
        expected = (f"snapshots-{self._members:05d}.jsonl", _MANIFEST)
        if header.type != tarfile.REGTYPE or header.name not in expected:
            raise SnapshotError(f"{brief(header.name)} is not {expected[0]}")
        # The manifest has some 200 bytes for each member, which all have 256 KiB but the last.
        most = _MAX_MEMBER_BYTES + (self._bytes // 1024 if header.name == _MANIFEST else 0)
        if not 0 <= header.size <= most:
            raise SnapshotError(f"{header.name} would be {header.size} bytes; none is so large")
        self._members += 1
        self._bytes += header.size
        data = self._unpacked.take(header.size)
        self._unpacked.take(-header.size % TAR_BLOCK)
        return header.name, data

    def check_ends(self, file: IO[bytes]) -> None:
        """Look at the beginning and the end alone: SnapshotError where it cannot be an archive."""
        self._take_member()
        file.seek(-min(_SEAL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        end = file.read()
        if not end.startswith(_SEAL_HEAD) or not end.endswith(_SEAL_TAIL):
            raise SnapshotError("it is cut short: it does not end with a seal")


# ------------------------------------------------------------------------------------------------------------
# attuned.snapshots.directory
# Snapshot files in a directory: written whole or not at all, named, verified, listed.
# ------------------------------------------------------------------------------------------------------------


class NewFile:
    """A file that appears under a final name whole and durable, or not at all.

    While it is open it is locked, so that what a killed process left is known from what another one is
    writing, and removed by the next. It is readable by its owner alone: it holds personal data.
    """

    def __init__(self, directory: Path) -> None:
        _remove_abandoned(directory)
        while True:
            self.path = directory / f".attuned-{secrets.token_hex(8)}.tmp"
            # Not a bare descriptor: after an interrupt that would keep its lock until the process ends.
            self.file = open(self.path, "x+b", opener=open_private)  # noqa: SIM115 - until it is discarded
            try:
                lock_descriptor(self.file.fileno())
                if os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                    break
            except (BlockingIOError, FileNotFoundError):
                pass  # taken for an abandoned one before it was locked: try another name
            except OSError:  # a file system without locks, where none is taken for abandoned either
                break
            self.file.close()

    def commit(self, names: Iterable[str]) -> Path:
        """Give the file the first of these names that is free in its directory."""
        self.file.flush()
        os.fsync(self.file.fileno())
        for name in names:
            final = self.path.with_name(name)
            if _link_or_rename(self.path, final):
                try:
                    fsync(final.parent)
                except BaseException:
                    final.unlink()
                    raise
                return final
        raise FileExistsError("all names are taken")

    def discard(self) -> None:
        """Close the file, and remove it unless it was given its name."""
        with contextlib.suppress(OSError):  # the next one removes it
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what could not be written then is not needed now
            self.file.close()


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed processes left: files without a name, and checksums without their snapshot."""
    orphans = filter(_is_orphan, directory.glob("*.snap.sha256"))
    for path in [*directory.glob(".attuned-????????????????.tmp"), *orphans]:
        with contextlib.suppress(OSError):  # it is being written, or gone by now
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                lock_descriptor(descriptor)
                # Still an orphan: its snapshot may have come before the lock went.
                if path.suffix == ".tmp" or _is_orphan(path):
                    path.unlink()
            finally:
                os.close(descriptor)


def _is_orphan(checksum: Path) -> bool:
    snapshot = checksum.with_suffix("")
    return SNAPSHOT_NAME.fullmatch(snapshot.name) is not None and not os.path.lexists(snapshot)


def _link_or_rename(path: Path, final: Path) -> bool:
    """Give a file a new name unless that is taken, which os.rename would overwrite."""
    try:
        os.link(path, final)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if os.path.lexists(final):
            return False
        path.rename(final)
    return True


DEFAULT_SNAPSHOT_DIRECTORY = "./data/qdrant/snapshots"
_LONGEST_NAME = 200  # of a collection, in the name of a file
SNAPSHOT_NAME = re.compile(r"(\d{8}T\d{6}\.\d{3}Z)-(.+)\.(snap|attuned)")
_KINDS: dict[str, SnapshotKind] = {suffix: kind for kind, suffix in SNAPSHOT_SUFFIXES.items()}


def _time_in_name(path: Path) -> datetime | None:
    """When a snapshot was taken, by the name of its file; None where that tells no time."""
    named = SNAPSHOT_NAME.fullmatch(path.name)
    try:
        return named and datetime.fromisoformat(named[1])
    except ValueError:  # the 99th of a month
        return None


def _snapshot_names(time_ms: int, collection: str, kind: SnapshotKind) -> Iterator[str]:
    """The name of a snapshot, and those of the milliseconds that follow, should it be taken."""
    named = urlquote(collection, safe="", errors="replace")  # a server's own may be anything
    if len(named) > _LONGEST_NAME:  # which, with what comes before and after, is longer than a file's may be
        digest = hashlib.sha256(collection.encode(errors="replace")).hexdigest()[:16]
        named = re.sub("%.?$", "", named[: _LONGEST_NAME - 17]) + "+" + digest  # no other name has a "+"
    for moment in itertools.count(time_ms):
        stamp = iso_time(moment).replace("-", "").replace(":", "")
        yield f"{stamp}-{named}{SNAPSHOT_SUFFIXES[kind]}"


def snapshot_directory(directory: str | os.PathLike[str] | None) -> Path:
    """The directory that was asked for, or the configured one: absolute."""
    given = os.environ.get("QDRANT_SNAPSHOT_DIR", "").strip() or DEFAULT_SNAPSHOT_DIRECTORY
    return absolute_path(given if directory is None else directory)


def make_snapshot_directory(directory: str | os.PathLike[str] | None) -> Path:
    """The directory that was asked for, or the configured one: absolute, and there."""
    path = snapshot_directory(directory)
    with snapshot_errors(path, "cannot be made"):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def snapshot_errors(path: str | os.PathLike[str], failed: str) -> Generator[None]:
    """Turn an error of the file system into a SnapshotError, and say which file one is about."""
    shown = printable(path)
    try:
        yield
    except OSError as error:
        raise SnapshotError(f"{shown}: {failed}: {error.strerror or error}") from error
    except SnapshotError as error:
        if shown in str(error):
            raise
        raise SnapshotError(f"{shown}: {error}") from error.__cause__


@attrs.frozen(kw_only=True)
class SnapshotRequest:
    """A snapshot to be taken."""

    directory: Path
    kind: SnapshotKind
    any_kind: bool  # nobody asked for this one
    reason: SnapshotReason
    keep: int | None
    keep_remote: bool
    created_ms: int = attrs.field(factory=lambda: wall_clock.now_ms(), init=False)  # noqa: PLW0108 - looked up anew: tests replace the clock
    began: float = attrs.field(factory=time.perf_counter, init=False)

    @classmethod
    def of(
        cls,
        directory: str | os.PathLike[str] | None,
        kind: Literal["auto", "native", "portable"],
        *,
        reason: SnapshotReason,
        keep: int | None,
        keep_remote: bool,
        native: bool,
    ) -> SnapshotRequest:
        """Check what was asked of a store, which can take native ones or not; then make the directory."""
        check_choice("kind", kind, ("auto", "native", "portable"))
        if kind == "native" and not native:
            raise ValidationError(
                'kind: native snapshots are made by a Qdrant server; take a "portable" one here'
            )
        check_choice("reason", reason, ("startup", "api", "manual"))
        if keep is not None:
            check_integer("keep", keep, 1, MAX_INTEGER)
        check_flag("keep_remote", keep_remote)
        return cls(
            directory=make_snapshot_directory(directory),
            kind=kind if kind != "auto" else "native" if native else "portable",
            any_kind=kind == "auto",
            reason=reason,
            keep=keep,
            keep_remote=keep_remote,
        )

    @property
    def created_at(self) -> datetime:
        """When the snapshot is taken, UTC."""
        return UNIX_EPOCH + timedelta(milliseconds=self.created_ms)

    def completed(self, path: Path, **found: Any) -> SnapshotReport:
        """The report of a snapshot that has its file; older ones are removed, if so many are to be kept."""
        if self.keep is not None:
            _remove_older(path, self.keep)
        report = SnapshotReport(
            status="completed",
            reason=self.reason,
            kind=self.kind,
            path=path,
            snapshot_name=path.name,
            created_at=self.created_at,
            duration_ms=(time.perf_counter() - self.began) * 1000,
            **found,
        )
        shown, taken_ms = printable(path), report.duration_ms
        LOGGER.info("snapshot %s: %s, %s bytes, %.0f ms", path.name, shown, report.bytes, taken_ms)
        return report


def _remove_older(newest: Path, keep: int) -> None:
    """Remove the older snapshots of the same collection and kind, beyond so many.

    What is dated in the future, or not what its name says, does not count, and stays.
    """
    stamp_size = newest.name.index("-")
    try:
        for path in snapshots_in(newest.parent):
            if path.name[stamp_size:] == newest.name[stamp_size:] and path.name < newest.name:
                report = describe_snapshot(path)
                if report is not None and report.status == "completed" and _time_in_name(path):
                    keep -= 1
                    if keep < 1:
                        path.unlink(missing_ok=True)
                        checksum_file(path).unlink(missing_ok=True)
    except (OSError, SnapshotError) as error:  # the new one is there: one too many is no failure
        LOGGER.warning("removing older snapshots than %s failed: %s", printable(newest), error)


def snapshots_in(directory: Path) -> list[Path]:
    """The files with names of snapshots, newest first."""
    with snapshot_errors(directory, "cannot be listed"):
        with os.scandir(directory) as entries:
            named = [entry for entry in entries if SNAPSHOT_NAME.fullmatch(entry.name)]
        plain = [entry.name for entry in named if entry.is_file(follow_symlinks=False)]
    return [directory / name for name in sorted(plain, reverse=True)]


def checksum_file(path: Path) -> Path:
    """What holds the SHA-256 of a native snapshot, as sha256sum writes it."""
    return path.with_name(path.name + ".sha256")


class SnapshotOrigin(NamedTuple):
    """Which store a snapshot is of."""

    target: str
    engine: str
    collection: str


class SnapshotWriter:
    """Takes a snapshot; as a context manager it leaves the finished file or none."""

    def __init__(self, request: SnapshotRequest) -> None:
        self._request = request
        with self._errors():
            self._new = NewFile(request.directory)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return snapshot_errors(self._request.directory, "cannot be written")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._new.discard()

    def _check_written(self, sha256: str) -> None:
        """Read the file back before older ones are given up for it."""
        if self._request.keep is not None:
            self._new.file.flush()
            self._new.file.seek(0)
            if self._read_back(self._new.file) != sha256:
                raise SnapshotError("what was written is not what is read back; is the disk sound?")

    def _read_back(self, file: IO[bytes]) -> str:
        """The SHA-256 of what was written, read to the end."""
        return hashlib.file_digest(cast("Any", file), "sha256").hexdigest()


class PortableSnapshotWriter(SnapshotWriter):
    """Takes a portable snapshot."""

    def __init__(self, request: SnapshotRequest, origin: SnapshotOrigin, axes: Sequence[str]) -> None:
        super().__init__(request)
        self._origin = origin
        self._unsettled: list[str] = []
        contents = ArchiveContents(origin.engine, request.created_at, origin.collection, tuple(axes))
        self._archive = ArchiveWriter(self._new.file, contents)

    def add(self, states: Sequence[StateSnapshot], unsettled: Sequence[str] = ()) -> int:
        """Take in states, all of a user, oldest first; returns how many there are by now.

        ``unsettled`` are the users whose states may be of several moments.
        """
        with self._errors():
            self._archive.add(states)
        self._unsettled += unsettled
        return self._archive.counted.states

    def finish(self) -> SnapshotReport:
        """Give the file its name; then remove older ones, if so many are to be kept."""
        request, archive = self._request, self._archive
        with self._errors():
            sha256 = archive.finish()
            self._check_written(sha256)
            path = self._new.commit(_snapshot_names(request.created_ms, self._origin.collection, "portable"))
        return request.completed(
            path,
            target=self._origin.target,
            bytes=archive.bytes,
            sha256=sha256,
            axes=archive.contents.axes,
            users=archive.counted.users,
            points=archive.counted.states,
            message=unsettled_message(self._unsettled),
        )

    def _read_back(self, file: IO[bytes]) -> str:
        reader = ArchiveReader(GzipReader(file))
        for _ in reader.states():
            pass
        return reader.sha256


class RemoteSnapshot(NamedTuple):
    """A snapshot as a server describes it. The name is data: nothing is named after it here."""

    name: str
    size: int
    sha256: str | None


class NativeSnapshotWriter(SnapshotWriter):
    """Takes in the snapshot of a server."""

    def __init__(self, request: SnapshotRequest) -> None:
        super().__init__(request)
        self.begin()

    def begin(self) -> None:
        """Start anew: what was taken in of an earlier try is forgotten."""
        self._digest, self._size = hashlib.sha256(), 0
        with self._errors():
            self._new.file.seek(0)
            self._new.file.truncate()

    def add(self, piece: bytes) -> None:
        """Take in a piece of the file."""
        self._digest.update(piece)
        self._size += len(piece)
        with self._errors():
            self._new.file.write(piece)

    def finish(self, origin: SnapshotOrigin, offered: RemoteSnapshot, points: int) -> SnapshotReport:
        """Compare the file with what the server said of it, and give it its name."""
        sha256 = self._digest.hexdigest()
        if self._size == 0:
            raise SnapshotError(f"{origin.target}: the snapshot is empty")
        if self._size != offered.size or offered.sha256 not in (None, sha256):
            raise SnapshotError(
                f"{origin.target}: the snapshot has {self._size} bytes and the SHA-256 {sha256}, "
                f"the server said {offered.size} and {offered.sha256}"
            )
        with self._errors():
            self._check_written(sha256)
            path = self._commit(origin.collection, sha256)
        return self._request.completed(
            path, target=origin.target, bytes=self._size, sha256=sha256, points=points
        )

    def _commit(self, collection: str, sha256: str) -> Path:
        """Name the file, after its checksum file: it is never without."""
        checksum = NewFile(self._request.directory)
        try:
            for name in _snapshot_names(self._request.created_ms, collection, "native"):
                final, beside = self._request.directory / name, None
                if os.path.lexists(final):
                    continue
                checksum.file.seek(0)
                checksum.file.write(f"{sha256}  {name}\n".encode())  # of one length under every name
                try:
                    beside = checksum.commit([checksum_file(final).name])
                    return self._new.commit([name])
                except BaseException as error:
                    taken = isinstance(error, FileExistsError)
                    if beside and (taken or not os.path.lexists(final)):  # else an interrupt came right after
                        beside.unlink()
                    if not taken:
                        raise
        finally:
            checksum.discard()
        raise AssertionError("unreachable")  # pragma: no cover - the names do not end


class SnapshotFile:
    """A snapshot file to be verified or restored; it may be read more than once."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = absolute_path(path)
        self.kind: SnapshotKind = "portable"
        self.contents: ArchiveContents | None = None  # known once it was read to its end
        self.sha256 = ""
        self.unchecked = ""  # what could not be verified
        self._began = time.perf_counter()
        with self._errors(), self._opened() as file:
            self.bytes = os.fstat(file.fileno()).st_size
            guessed: SnapshotKind = "portable" if file.read(2) == GZIP_MAGIC else "native"
            self.kind = _KINDS.get(self.path.suffix) or guessed

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return snapshot_errors(self.path, "cannot be read")

    def _opened(self) -> IO[bytes]:
        if not stat.S_ISREG(self.path.stat().st_mode):
            raise SnapshotError("is not a file")
        return self.path.open("rb")

    def header(self) -> ArchiveContents | None:
        """What a portable snapshot says of itself in its header and footer; what is between is not read.

        None for a native one and one of version 0.1. Raises SnapshotError where either is damaged.
        """
        with self._errors(), self._opened() as file:
            if self.kind == "native":
                _member_size(file)
                return None
            unpacked = GzipReader(file)
            if unpacked.starts_with(b"{"):
                return read_summary(unpacked, file)
            LegacyReader(unpacked).check_ends(file)
            return None

    def axes(self) -> tuple[str, ...] | None:
        """The axes of a portable snapshot, by its header; one of version 0.1 is read to its end for them."""
        contents = self.contents or self.header()
        if contents is None and self.kind == "portable":
            self.verify()
            contents = self.contents
        return contents and contents.axes

    def states(self, axes: Sequence[str] | None = None) -> Iterator[list[StateSnapshot]]:
        """The states of a portable snapshot, for a store with these axes.

        What is read at the end may show that it is damaged.
        """
        with self._errors(), self._opened() as file:
            unpacked = GzipReader(file)
            reader = (ArchiveReader if unpacked.starts_with(b"{") else LegacyReader)(unpacked)
            for states in itertools.chain(reader.states(), [[]]):  # version 0.1 names its axes at the end
                strange = sorted(set(reader.axes).difference(reader.axes if axes is None else axes))
                if strange:
                    raise SnapshotError(
                        f"has other axes than the store: {', '.join(strange[:10])}; "
                        f"the store has {', '.join(axes or ())}"
                    )
                yield states
            if self.sha256 not in ("", reader.sha256):
                raise SnapshotError("it was changed while it was read")
            self.contents, self.sha256 = reader.contents, reader.sha256

    def batches(self, size: int, axes: Sequence[str]) -> Iterator[list[StateSnapshot]]:
        """The states of a portable snapshot, so many at a time, for a store with these axes."""
        for states in self.states(axes):
            yield from (states[start : start + size] for start in range(0, len(states), size))

    @property
    def total(self) -> int | None:
        """How many states there are, once that is known."""
        return self.contents and self.contents.states

    def check_mode(self, mode: str, *, native: bool) -> None:
        """Raise ValidationError or SnapshotError where a store cannot do with the file what was asked for."""
        check_choice("mode", mode, ("replace", "merge", "skip"))
        if self.kind == "native" and not native:
            raise SnapshotError(
                f"{printable(self.path)}: is no portable snapshot; a Qdrant server restores native ones"
            )
        if self.kind == "native" and mode != "replace":
            raise ValidationError(f'mode: a native snapshot can only "replace", not {mode}')

    def verify(self, axes: Sequence[str] | None = None, progress: Progress = ignore_progress) -> None:
        """Read all of it; raises SnapshotError where something is wrong."""
        if self.kind == "native":
            with self._errors(), self._opened() as file:
                self.sha256, is_known = _check_native(file, checksum_file(self.path))
            if not is_known:
                self.unchecked = (
                    f"its contents were not checked: there is no {printable(checksum_file(self.path).name)}"
                )
            return
        for done in self.verifying(axes):
            progress(done, None)

    def verifying(self, axes: Sequence[str] | None) -> Iterator[int]:
        """Read all of a portable one; gives the number of states read by and by."""
        return itertools.accumulate(len(states) for states in self.states(axes) if states)

    def report(self, target: str, contents: ArchiveContents | None = None) -> SnapshotReport:
        """What became of it; what it holds is what was read, unless it is given."""
        contents = contents or self.contents
        return SnapshotReport(
            status="completed",
            target=target,
            kind=self.kind,
            path=self.path,
            snapshot_name=self.path.name,
            created_at=contents.created_at if contents else _time_in_name(self.path),
            axes=contents and contents.axes,
            bytes=self.bytes,
            sha256=self.sha256 or None,
            users=contents and contents.users,
            points=contents and contents.states,
            duration_ms=(time.perf_counter() - self._began) * 1000,
            message=self.unchecked,
        )


def describe_snapshot(path: Path) -> SnapshotReport | None:
    """What header and footer of a file say, or why they say nothing; None where there is no file any more."""
    try:
        saved = SnapshotFile(path)
        return saved.report(str(path), saved.header())
    except SnapshotError as error:
        if not os.path.lexists(path):
            return None
        return SnapshotReport(
            status="failed",
            target=str(path),
            kind=_KINDS.get(path.suffix),
            path=path,
            snapshot_name=path.name,
            created_at=_time_in_name(path),
            message=str(error),
        )


def _check_native(file: IO[bytes], checksum: Path) -> tuple[str, bool]:
    """Walk through the tar that a native snapshot is, and compare its SHA-256 with the one kept beside it.

    Returns it, and whether there was another one to compare it with.
    """
    sha256 = hashlib.file_digest(cast("Any", file), "sha256").hexdigest()
    total = file.tell()
    file.seek(0)
    while (size := _member_size(file)) is not None:
        if not 0 <= size < total:
            raise SnapshotError("is cut short, or damaged")
        file.seek(size + -size % TAR_BLOCK, os.SEEK_CUR)
    try:
        kept = checksum.read_text(encoding="utf-8", errors="replace").split(maxsplit=1)
    except FileNotFoundError:
        return sha256, False
    if kept[:1] != [sha256]:
        raise SnapshotError(f"is damaged: its SHA-256 is not that of {printable(checksum.name)}")
    return sha256, True


def _member_size(file: IO[bytes]) -> int | None:
    """How much follows the next header in a tar; None at its end."""
    import tarfile

    block = file.read(TAR_BLOCK)
    if not block:
        raise SnapshotError("is cut short")
    if not any(block):
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise SnapshotError(f"is not a snapshot of a server, nor a portable one: {error}") from error
    if header.type == tarfile.GNUTYPE_SPARSE:
        # Its map may go on in blocks, each of which says whether there is another.
        extended = block[482:483]
        while any(extended):
            extended = file.read(TAR_BLOCK)[504:505]
    return header.size


# ------------------------------------------------------------------------------------------------------------
# attuned.connections
# How a store reaches its data: files of this process, requests, and how both forms wait.
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# attuned.connections.http
# HTTP requests to a server: blocking or awaited, within a deadline.
# ------------------------------------------------------------------------------------------------------------


class BlockingClient:
    """A blocking client whose methods are coroutines, which never suspend."""

    def __init__(self, client: object) -> None:
        self.blocking = client

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = getattr(self.blocking, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            return method(*arguments, **options)

        self.__dict__[name] = call
        return call


def cookie_jar() -> Any:
    """A cookie jar that takes only what can be sent again: another one would make all requests fail."""
    from http.cookiejar import CookieJar, DefaultCookiePolicy

    class Policy(DefaultCookiePolicy):
        def set_ok(self, cookie: Any, request: Any) -> bool:
            return f"{cookie.name}{cookie.value}".isascii() and super().set_ok(cookie, request)

    return CookieJar(Policy())


_MAX_FILE_NAME = 1024  # characters, of the name of a snapshot on a server
MIN_SERVER_VERSION = (1, 17)  # conditional upserts with update modes


def snapshots_path(collection: str) -> str:
    """The path of the snapshots of a collection, in the REST interface."""
    return f"/collections/{urlquote(collection, safe='')}/snapshots"


def is_file_name(name: object) -> bool:
    """Whether a name that a server gave is that of a file, and of no other place."""
    plain = isinstance(name, str) and 0 < len(name) <= _MAX_FILE_NAME and name not in (".", "..")
    return plain and not re.search(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", cast("str", name))


class BlockingLimits(threading.local):
    """When the request that a thread is in must have ended, which the network streams of its client know."""

    ends = math.inf

    async def within(self, seconds: float, request: Callable[[], Awaitable[T]]) -> T:
        """The answer to a request, or TimeoutError."""
        self.extend(seconds)
        try:
            return await request()
        finally:
            self.ends = math.inf

    def extend(self, seconds: float) -> None:
        """Let the request go on for so long from now."""
        self.ends = time.monotonic() + seconds

    def left(self, timeout: float | None) -> float:
        """A timeout, or what is left where that is less; never quite 0, which would mean not to wait."""
        left = self.ends - time.monotonic()
        return max(0.001, left if timeout is None else min(timeout, left))

    def check(self) -> None:
        """Raise TimeoutError where no time is left."""
        if self.ends < time.monotonic():
            raise TimeoutError("the answer takes too long")


class SuspendingLimits:
    """As BlockingLimits, for requests that are awaited."""

    def __init__(self) -> None:
        self._scope: ContextVar[Any] = ContextVar("scope")

    async def within(self, seconds: float, request: Callable[[], Awaitable[T]]) -> T:
        """The answer to a request, or TimeoutError; in a task of its own, which a cancel scope cancels.

        asyncio's own task.cancel() can take a connection from httpcore's pool for good (encode/httpcore#658,
        #830): it gives them back under a shield that only scopes know.
        """
        import anyio

        answers, failures = list[T](), list[Exception]()

        async def attempt() -> None:
            self._scope.set(scope)
            try:
                answers.append(await request())
            except Exception as failure:  # noqa: BLE001 - it is raised below, not in a group
                failures.append(failure)

        with anyio.fail_after(seconds) as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(attempt)
        for failure in failures:
            raise failure
        return answers[0]

    def extend(self, seconds: float) -> None:
        """See BlockingLimits.extend."""
        import anyio

        self._scope.get().deadline = anyio.current_time() + seconds


# Relied on in httpx and httpcore beyond their public interfaces; tests/test_canaries.py watches it


def limit_transport(transport: Any, limits: BlockingLimits) -> Any:
    """Let the network streams of a blocking transport end when the limits say so; returns the transport.

    The timeouts of httpx are for each piece that comes, so that a server that drips would never meet them.
    """
    pool = transport._pool
    pool._network_backend = LimitedNetwork(pool._network_backend, limits)
    return transport


def limit_client(client: Any, limits: BlockingLimits) -> None:
    """As limit_transport, for all transports of a blocking client: its own and those of proxies."""
    for transport in filter(None, (client._transport, *client._mounts.values())):
        limit_transport(transport, limits)


class LimitedNetwork:
    """A network backend of httpcore whose streams know when they must end."""

    def __init__(self, network: Any, limits: BlockingLimits) -> None:
        self._network, self._limits = network, limits

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, **options: Any
    ) -> LimitedStream:
        """A connection; one address of the host after another gets the time that is left."""
        stream = self._network.connect_tcp(host, port, timeout=self._limits.left(timeout), **options)
        return LimitedStream(stream, self._limits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


class LimitedStream:
    """A stream of httpcore that ends in time, whether it is read from, written to or secured."""

    PIECE = 65_536  # bytes; within one write the stream beneath begins to wait anew after each part

    def __init__(self, stream: Any, limits: BlockingLimits) -> None:
        self._stream, self._limits = stream, limits

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read what is there."""
        self._limits.check()
        return cast("bytes", self._stream.read(max_bytes, timeout=self._limits.left(timeout)))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write all of it."""
        for start in range(0, len(buffer), self.PIECE):
            self._limits.check()
            piece = buffer[start : start + self.PIECE] if len(buffer) > self.PIECE else buffer
            self._stream.write(piece, timeout=self._limits.left(timeout))

    def start_tls(self, *arguments: Any, timeout: float | None = None, **options: Any) -> LimitedStream:
        """The stream within the encrypted one."""
        secured = self._stream.start_tls(*arguments, timeout=self._limits.left(timeout), **options)
        return LimitedStream(secured, self._limits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# ------------------------------------------------------------------------------


_UNPACKED = {"accept-encoding": "identity"}


class LeastSpeed:
    """Lets a download go on as long as it wants, but not slower than so many bytes a second."""

    BYTES = 1_024

    def __init__(self, seconds: float, extend: Callable[[float], None]) -> None:
        self._seconds, self._extend = seconds, extend
        self._missing = self.BYTES * seconds

    def add(self, size: int) -> None:
        """Count a piece; the time begins anew when enough has come."""
        self._missing -= size
        if self._missing <= 0:
            self._missing = self.BYTES * self._seconds
            self._extend(self._seconds)


async def download_awaiting(
    client: Any, path: str, check: Callable[[Any, bytes], None], take: Callable[[bytes], None]
) -> None:
    """Take in a file piece by piece, unless the answer does not pass the check."""
    async with client.stream("GET", path, headers=_UNPACKED) as answer:
        check(answer, b"" if answer.is_success else await answer.aread())
        async for piece in answer.aiter_raw():
            take(piece)


async def download_blocking(
    client: Any, path: str, check: Callable[[Any, bytes], None], take: Callable[[bytes], None]
) -> None:
    """As download_awaiting, over a blocking client."""
    with client.blocking.stream("GET", path, headers=_UNPACKED) as answer:
        check(answer, b"" if answer.is_success else answer.read())
        for piece in answer.iter_raw():
            take(piece)


# ------------------------------------------------------------------------------------------------------------
# attuned.connections.pools
# Connection pools of HTTP clients.
# ------------------------------------------------------------------------------------------------------------


class ConnectionPools:
    """Several small connection pools of httpx in the place of a large one.

    For each request httpcore compares every connection with every other one, three times over: 64 idle ones
    cost more than 2 ms (encode/httpcore#929). The first of the least busy pools is taken, so that one caller
    stays on one connection.
    """

    CONNECTIONS = 8  # of a pool

    def __init__(
        self, make: Callable[[int], Any], connections: int, limits: BlockingLimits | None = None
    ) -> None:
        number = math.ceil(connections / self.CONNECTIONS)
        self._pools = [make((connections + place) // number) for place in reversed(range(number))]
        self._busy = [0] * len(self._pools)
        self._lock = threading.RLock()
        self._limits = limits

    @contextlib.contextmanager
    def _least_busy(self) -> Generator[Any]:
        with self._lock:
            place = self._busy.index(min(self._busy))
            self._busy[place] += 1
        try:
            yield self._pools[place]
        finally:
            with self._lock:
                self._busy[place] -= 1

    def handle_request(self, request: Any) -> Any:
        """Send a request over one of the pools."""
        if self._limits is not None:
            timeouts = request.extensions["timeout"]
            timeouts["pool"] = self._limits.left(timeouts["pool"])
        with self._least_busy() as pool:
            return pool.handle_request(request)

    async def handle_async_request(self, request: Any) -> Any:
        """As handle_request, to be awaited."""
        with self._least_busy() as pool:
            return await pool.handle_async_request(request)

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools:
            pool.close()

    async def aclose(self) -> None:
        """As close, to be awaited."""
        for pool in self._pools:
            await pool.aclose()


# ------------------------------------------------------------------------------------------------------------
# attuned.connections.resilience
# Retries and the circuit breaker of requests to a server.
# ------------------------------------------------------------------------------------------------------------


MAX_WAIT_S = 10**9  # that a server may ask for; more is as good as for ever


class CircuitBreaker:
    """A circuit breaker, shared by all threads and tasks of a store."""

    def __init__(self, policy: BreakerPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._lock = threading.RLock()
        self._failures = 0
        self._failed_at = -math.inf  # when the last of these was known
        self._pauses = 0  # in a row
        self._opened_at: float | None = None
        self._probing = False

    def _pause_s(self) -> float:
        """How long it lets nothing through: at first for a moment, then longer and longer."""
        first, longest = self._policy.first_open_s, self._policy.open_s
        return min(longest, first * 2.0 ** min(self._pauses - 1, 64))

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """What the next request meets."""
        if self._opened_at is None:
            return "closed"
        return "open" if self._clock() < self._opened_at + self._pause_s() else "half-open"

    def is_open_in(self, seconds: float) -> bool:
        """Whether it lets nothing through now, and will not after so many seconds."""
        opened_at = self._opened_at
        return opened_at is not None and self._clock() + seconds < opened_at + self._pause_s()

    def enter(self, backend: str, operation: str) -> bool:
        """Let a request through, or raise CircuitOpenError; returns whether it is a probe."""
        with self._lock:
            state = self.state
            if state == "open" or (state == "half-open" and self._probing):
                left = max(0.0, cast("float", self._opened_at) + self._pause_s() - self._clock())
                raise CircuitOpenError(
                    f"{backend}: not asked to {operation}: it failed {self._failures} times in a row; "
                    f"try again in {left:.1f} s",
                    retry_after_s=left,
                    backend=backend,
                    operation=operation,
                )
            probe = state == "half-open"
            self._probing = self._probing or probe
            return probe

    def leave(self, *, failed: bool, probe: bool | None = None, began: float = math.inf) -> None:
        """Say how a request that was let through, at some time, ended: by default the probe if there is one.

        While the breaker is open only a probe counts: the others were sent before. So are those that had
        begun when the last failure was known: many requests that fail at one moment are one failure.
        """
        with self._lock:
            if self._opened_at is not None and not (self._probing if probe is None else probe):
                return
            self._probing = False
            if not failed:
                self._failures, self._pauses, self._opened_at = 0, 0, None
                return
            if began < self._failed_at:
                return
            self._failures, self._failed_at = self._failures + 1, self._clock()
            if self._failures >= self._policy.failures:
                self._pauses, self._opened_at = self._pauses + 1, self._clock()

    def give_up(self, *, probe: bool = True) -> None:
        """Say that a request was let through and cancelled: nothing was learnt."""
        with self._lock:
            self._probing = self._probing and not probe


def jittered_pause(policy: RetryPolicy, attempt: int, least: float = 0.0) -> float:
    """Seconds to wait after an attempt that failed, counted from 0, and at least what was asked for."""
    return max(least, random.uniform(0.0, min(policy.cap_s, policy.base_s * 2.0**attempt)))


def parse_retry_after(text: str) -> float | None:
    """The seconds that Retry-After asks to wait, a number of them or a date; None where it is neither."""
    try:
        seconds = float(text)
    except ValueError:
        from email.utils import parsedate_to_datetime

        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, LookupError, OSError):
            return None
    return max(0.0, min(seconds, MAX_WAIT_S)) if math.isfinite(seconds) else None


class Resilience:
    """Sends requests under a retry policy and a circuit breaker; waiting is handed in, as it differs."""

    def __init__(
        self,
        config: QdrantStoreConfig,
        sleep: Callable[[float], Awaitable[object]],
        clock: Callable[[], float] = time.monotonic,
        *,
        nodes: int = 1,
    ) -> None:
        self.breakers = [CircuitBreaker(config.breaker, clock) for _ in range(nodes)]
        self.breaker = self.breakers[0]
        self._first = 0  # the node that is asked first
        self._node: ContextVar[int] = ContextVar("node", default=0)
        self._reporter = REPORTING.reporter(wanted=config.telemetry)
        self._metrics = None if self._reporter is None else self._reporter.metrics
        if self._metrics is not None:
            with self._metrics.lock:
                self._metrics.breakers.update(self.breakers)
        self._policy = config.retry
        self._sleep = sleep
        self._clock = clock

    @property
    def node(self) -> int:
        """The number of the node that the request of this thread or task goes to."""
        return self._node.get()

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """What the next request meets: the best of all nodes."""
        states = {breaker.state for breaker in self.breakers}
        return "closed" if "closed" in states else "half-open" if "half-open" in states else "open"

    def nodes(self) -> list[int]:
        """The numbers of all nodes, in the order in which they are asked."""
        return [(self._first + step) % len(self.breakers) for step in range(len(self.breakers))]

    def choose(self, node: int) -> None:
        """Let the requests of this thread or task go to a node."""
        self._node.set(node)

    def _enter(self, operation: str) -> tuple[CircuitBreaker, bool]:
        """Choose a node whose breaker lets a request through; whether it is a probe."""
        refusals: list[CircuitOpenError] = []
        for node in self.nodes():
            try:
                probe = self.breakers[node].enter("server", operation)
            except CircuitOpenError as error:
                refusals.append(error)
            else:
                self._node.set(node)
                return self.breakers[node], probe
        raise min(refusals, key=lambda refusal: refusal.retry_after_s)

    def close(self) -> None:
        """Let the breaker count no longer in the state of all breakers."""
        if self._metrics is not None:
            with self._metrics.lock:
                self._metrics.breakers.difference_update(self.breakers)

    async def send(
        self,
        operation: str,
        request: Callable[[], Awaitable[T]],
        within: Callable[[float, Callable[[], Awaitable[T]]], Awaitable[T]] | None = None,
        *,
        writes: bool = False,
    ) -> T:
        """Send a request until it succeeds, or there is no sense in going on.

        ``within`` awaits a try for so many seconds. The error of a write is ambiguous where any of the tries
        may have been carried out.
        """
        begun, unsure = self._clock(), False
        for attempt in itertools.count():
            try:
                breaker, probe = self._enter(operation)
            except CircuitOpenError as error:
                error.ambiguous = unsure
                raise
            tried = self._clock()
            try:
                with report_request(self._reporter, "server", operation, attempt + 1):
                    answer = await (request() if within is None else within(self._left(begun), request))
            except BackendError as error:
                error.ambiguous = unsure = writes and (unsure or error.ambiguous)
                refused = error.status is not None and error.status < HTTPStatus.INTERNAL_SERVER_ERROR
                failed = error.retryable and not refused
                breaker.leave(failed=failed, probe=probe, began=tried)
                wait = self._wait(error, attempt)
                if failed and len(self.breakers) > 1:
                    if self.node == self._first:  # else another request has moved on already
                        self._first = (self._first + 1) % len(self.breakers)
                    wait = wait and (0.0 if attempt + 1 < len(self.breakers) else wait)
                if wait is None or self._clock() + wait > begun + self._policy.deadline_s:
                    raise
                # Where the next attempt would be refused, this failure says more.
                if all(each.is_open_in(wait) for each in self.breakers):
                    raise
            except BaseException:
                breaker.give_up(probe=probe)
                raise
            else:
                breaker.leave(failed=False, probe=probe)
                return answer
            await self._sleep(wait)
        raise AssertionError("unreachable")  # pragma: no cover - count() does not end

    def _left(self, begun: float) -> float:
        """The seconds that a try may take; a deadline of 0 means a single one, which takes its time."""
        deadline = self._policy.deadline_s
        return max(0.001, begun + deadline - self._clock()) if deadline else math.inf

    def _wait(self, error: BackendError, attempt: int) -> float | None:
        """Seconds to wait after a failed attempt, counted from 0; None where it was the last."""
        if not error.retryable or attempt + 1 >= self._policy.attempts:
            return None
        asked = error.retry_after_s if isinstance(error, RateLimitedError) else 0.0
        return jittered_pause(self._policy, attempt, asked)


# ------------------------------------------------------------------------------------------------------------
# attuned.connections.runtime
# How one body serves both forms: a synchronous store runs it, an asynchronous one awaits it.
#
# The operations of stores are coroutines over awaitable primitives. Where a store is synchronous, those block
# and never suspend, so that one ``send(None)`` runs a body to its end; where it is asynchronous, the body is
# awaited. What must differ is one object, ``Waits``: bodies await it, the backend and themselves, never an
# event loop.
# ------------------------------------------------------------------------------------------------------------


def run(body: Coroutine[Any, Any, T]) -> T:
    """Run a body over primitives that never suspend."""
    try:
        body.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    body.close()
    raise RuntimeError("a body over blocking primitives tried to suspend")


async def run_in_thread(call: Callable[[], T], limiter: Any = None) -> T:
    """Run a blocking call in a worker thread; being cancelled meanwhile, wait for it."""
    try:
        import anyio.to_thread
    except ImportError:
        import asyncio

        running = asyncio.get_running_loop().run_in_executor(None, call)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise
    return await anyio.to_thread.run_sync(call, limiter=limiter)


async def load_anyio() -> None:
    """Load what anyio needs under asyncio, in a thread: it takes 0.1 s, which the first use would hold up."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or "anyio._backends._asyncio" in sys.modules:
        return

    def load() -> None:
        with contextlib.suppress(ImportError):
            import anyio

            anyio.run(anyio.sleep, 0)

    with contextlib.suppress(RuntimeError):  # another event loop's, as trio's
        await asyncio.get_running_loop().run_in_executor(None, load)


def require_anyio(what: str) -> None:
    """Raise MissingDependencyError where anyio is not installed, before anything has been done."""
    try:
        import_module("anyio")
    except ImportError as error:
        raise MissingDependencyError(f"{what} needs anyio: pip install anyio") from error


class Worker:
    """One worker thread for a purpose and event loop: more would only wait for each other."""

    def __init__(self) -> None:
        self._limiters: Any = None

    def limiter(self) -> Any:
        """The limiter of this event loop."""
        from anyio import CapacityLimiter
        from anyio.lowlevel import RunVar

        if self._limiters is None:
            self._limiters = RunVar(f"worker {uuid.uuid4()}")  # anyio 4.5 tells them apart by the name
        limiter = self._limiters.get(None)
        if limiter is None:
            limiter = CapacityLimiter(1)
            self._limiters.set(limiter)
        return limiter


class Once:
    """What many need and one of them does, while the others wait for how it ends."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._busy = threading.Lock()
        self._ended = 0  # how often it has been done, or tried
        self._failure: StoreError | None = None

    async def do(self, work: Callable[[], Awaitable[object]]) -> None:
        """Do it, or wait for who is at it; what fails there is raised here too."""
        ended, wait = self._ended, 0.001
        if self._busy.acquire(blocking=False):
            self._failure = None
            try:
                await work()
            except StoreError as error:
                self._failure = error
                raise
            finally:
                self._ended += 1
                self._busy.release()
            return
        while self._ended == ended:
            await self._waits.sleep(wait)
            wait = min(0.05, 2 * wait)
        if (failure := self._failure) is not None:
            make, arguments = failure.__reduce__()  # one of its own for each who waits
            raise make(*arguments) from failure.__cause__


class Waits(Protocol):
    """How a body waits: in place, or on an event loop."""

    blocking: bool

    async def pause(self) -> None:
        """Let other tasks run, where there are others."""
        ...

    async def pause_if_due(self) -> None:
        """As ``pause``, unless they had a turn a moment ago."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for a time."""
        ...

    async def call(
        self,
        function: Callable[[], T],
        worker: Worker | None = None,
        done: Callable[[], bool] | None = None,
    ) -> T:
        """Call what blocks: in place, or in a worker thread.

        ``done`` says that there is nothing to wait for any more: then it is called in place.
        """
        ...

    async def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the caller's, which may be a coroutine function in an asynchronous store."""
        ...

    async def shielded(self, last: Awaitable[T]) -> T:
        """Await something though being cancelled, as far as the event loop allows that."""
        ...


class Blocking:
    """The waits of synchronous stores, which never suspend."""

    blocking = True

    async def pause(self) -> None:
        """See Waits.pause."""

    async def pause_if_due(self) -> None:
        """See Waits.pause_if_due."""

    async def sleep(self, seconds: float) -> None:
        """See Waits.sleep."""
        time.sleep(seconds)  # noqa: ASYNC251 - this is the waiting of what blocks

    async def call(
        self,
        function: Callable[[], T],
        worker: Worker | None = None,  # noqa: ARG002 - there is but this thread
        done: Callable[[], bool] | None = None,  # noqa: ARG002
    ) -> T:
        """See Waits.call."""
        return function()

    async def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See Waits.ask; a StopIteration of the function's comes as a RuntimeError, as in every coroutine."""
        return function(*arguments)

    async def shielded(self, last: Awaitable[T]) -> T:
        """See Waits.shielded."""
        return await last


class Suspending:
    """The waits of asynchronous stores, under asyncio and trio (which needs anyio)."""

    blocking = False
    TURN_S = 0.005  # how long a store goes on without letting other tasks run

    def __init__(self) -> None:
        self._paused = 0.0  # when other tasks were last let run
        self._loaded = False

    async def pause(self) -> None:
        """See Waits.pause."""
        await self.sleep(0)

    async def pause_if_due(self) -> None:
        """See Waits.pause_if_due."""
        now = time.monotonic()
        if now - self._paused > self.TURN_S:
            self._paused = now
            await self.sleep(0)

    async def sleep(self, seconds: float) -> None:
        """See Waits.sleep."""
        await self._load()
        try:
            import anyio
        except ImportError:
            import asyncio

            await asyncio.sleep(seconds)
        else:
            await anyio.sleep(seconds)

    async def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            await load_anyio()

    async def call(
        self,
        function: Callable[[], T],
        worker: Worker | None = None,
        done: Callable[[], bool] | None = None,
    ) -> T:
        """See Waits.call."""
        await self._load()
        if worker is None:
            return await run_in_thread(function)
        if done is None:
            return await run_in_thread(function, worker.limiter())
        async with worker.limiter():  # the first goes to the thread, the others wait for it here
            return function() if done() else await run_in_thread(function)

    async def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See Waits.ask."""
        answer = function(*arguments)
        return await answer if inspect.isawaitable(answer) else answer

    async def shielded(self, last: Awaitable[T]) -> T:
        """See Waits.shielded."""
        try:
            import anyio
        except ImportError:
            return await last
        answers: list[T] = []
        with anyio.CancelScope(shield=True):  # which by its type may swallow what is raised in it
            answers.append(await last)
        return answers[0]


BLOCKING = Blocking()


class Pager(Generic[T]):
    """What one page after another holds, for bodies: each begins where the one before ended.

    Not an asynchronous generator: an event loop that is running in the thread would adopt one that a
    synchronous store iterates, and would close it.
    """

    def __init__(self, fetch: Callable[[Any], Awaitable[tuple[T, Any]]], waits: Waits) -> None:
        self._fetch, self._waits = fetch, waits
        self._cursor: Any = None
        self._begun = False

    async def next(self) -> T | None:
        """The next page, after a pause between two; None at the end."""
        if self._begun:
            if self._cursor is None:
                return None
            await self._waits.pause()
        page, self._cursor = await self._fetch(self._cursor)
        self._begun = True
        return page


# ------------------------------------------------------------------------------------------------------------
# attuned.connections.files
# Directories that this process has open: locks, group commit, forks.
# ------------------------------------------------------------------------------------------------------------


class Files(Protocol):
    """What is asked of an engine that keeps its own files."""

    name: str
    writes: int  # how many have been done
    min_free_bytes: int  # below which a disk counts as full
    runs: Literal[
        "in place", "in thread", "on loop"
    ]  # "in thread": calls block; "in place": they are short and hold the interpreter anyway

    @property
    def flush_due(self) -> bool:
        """Whether so much has been written since the last flush that it is time for another."""
        ...

    def flush(self) -> None:
        """Make what has been written survive a power cut; others may use the engine meanwhile."""
        ...

    def housekeep(self, task: str, work: Callable[[], object]) -> None:
        """Do what no write waits for: where it fails, it is told in health, and tried again later."""
        ...

    def signs(self) -> list[str]:
        """What is put off, and whether the disk is full."""
        ...

    async def replace(self, collection: str, by: str, *, described: bool = False) -> None:
        """Let another open collection take the place of one, at one moment; its own name is then free.

        ``described``: its metadata and the size of its vectors take the place of the others, too.
        """
        ...

    async def describe(self, collection: str, metadata: Mapping[str, Any]) -> None:
        """Change some of the metadata of a collection."""
        ...

    def abandon(self) -> None:
        """Let go of what a forked child inherited, without touching what the parent goes on using."""
        ...

    async def close(self) -> None:
        """Flush and release everything, also where that fails for a part of it."""
        ...


class FlushRound:
    """Writes that one flush makes survive a power cut."""

    def __init__(self) -> None:
        self.turn = threading.RLock()  # of the member that sees to the flush; the others wait for it
        self.members = 0
        self.ended = False
        self.error: BackendError | None = None


class GroupCommit:
    """Group commit: the writers that wait at one time share one flush.

    There is no state but under ``with``, so that an interrupted thread leaves its part to another one.
    """

    def __init__(self, engine: Files) -> None:
        self._engine = engine
        self._joined = threading.Condition()
        self.flushing: Any = threading.RLock()
        self._open = FlushRound()  # which the next flush will serve
        self._served = 0  # members of the last round
        self._duration = 0.0  # of the last flush, in seconds

    def join(self) -> FlushRound:
        """The round that makes safe what has been written until now."""
        with self._joined:
            self._open.members += 1
            self._joined.notify()
            return self._open

    def settle(self, mine: FlushRound) -> None:
        """Wait for the flush of a round, which the first that waits sees to; raises its failure."""
        with mine.turn:
            if not mine.ended:
                with self.flushing:
                    self._gather(mine)
                    self._flush(mine)
        if mine.error is not None:
            error = mine.error
            raise BackendError(
                f"{error}; what was written may not survive a power cut",
                backend=error.backend,
                operation=error.operation,
                ambiguous=True,
            ) from error

    def _gather(self, mine: FlushRound) -> None:
        """Close a round; where there are several writers, once no other has come along for a moment."""
        with self._joined:
            if mine is self._open:
                while max(mine.members, self._served) > 1 and self._joined.wait(self._duration / 8):
                    pass
                self._open, self._served = FlushRound(), mine.members

    def _flush(self, mine: FlushRound) -> None:
        started = time.monotonic()
        try:
            self._engine.flush()
        except BackendError as error:
            mine.error = error
        self._duration = time.monotonic() - started
        mine.ended = True


class Directory:
    """A directory of embedded Qdrant, opened once in this process and shared by every store on it."""

    def __init__(self, path: str, durability: str, make_engine: Callable[[Path, str], Any]) -> None:
        self.path = path
        self.durability = durability
        self.stores = 0
        self.used = False  # by a store, now or before
        self.gone = threading.Event()
        self.opening = threading.Lock()  # of collections; the other lock may be waited for while it is held
        self.backends: dict[str, Any] = {}  # by collection
        self.writer, self.flusher = Worker(), Worker()  # of asynchronous stores
        self._orphaned = self._closing = self._closed = False
        self._lock: Any = threading.RLock()  # knows whether the thread has it
        _make_directory(path)
        self._lock_file = self._take_lock()
        try:
            self.engine: Files = make_engine(Path(path), durability)
        except BaseException:
            self._lock_file.release()
            raise
        self.flushes = GroupCommit(self.engine)

    @property
    def blocks(self) -> bool:
        """Whether calls of the engine block, so that an event loop leaves them to a worker thread."""
        return self.engine.runs == "in thread"

    def _take_lock(self) -> LockFile:
        try:
            return LockFile(Path(self.path) / ".attuned_store.lock")
        except BlockingIOError as error:
            raise locked_error(self.path) from error
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be locked, is it writable? {error}") from error

    def check_free(self) -> None:
        """Raise ReenteredError in the middle of another call of this thread, which would wait for itself.

        That is asked of the locks: a note of it would stay behind where an interrupt comes at its line.
        """
        if self._lock._is_owned() or self.flushes.flushing._is_owned():
            raise ReenteredError(self.path)

    def is_there(self) -> bool:
        """Whether the directory is still where it was opened."""
        return self._closed or self._lock_file.is_there()

    def drive(self, body: Coroutine[Any, Any, T]) -> T:
        """Run one body to its end, alone; what it wrote is kept."""
        answer, written = self.apply(body)
        if written is not None:
            self.settle(written)
        return answer

    def apply(self, body: Coroutine[Any, Any, T]) -> tuple[T, FlushRound | None]:
        """Run one body to its end, alone; returns its answer, and what is to be settled."""
        try:
            if self._orphaned:
                raise forked_error(self.path)
            self.check_free()
            with self._lock:
                if self._closed:
                    raise closed_error()
                before = self.engine.writes
                answer = run(body)
                wrote = self.engine.writes > before
                if wrote:
                    self.check_there()
                flush = wrote and (self.durability == "power" or self.engine.flush_due)
                return answer, self.flushes.join() if flush else None
        finally:
            body.close()

    def check_there(self) -> None:
        """Raise BackendError where somebody has removed the directory: what is written is lost."""
        if not self._lock_file.is_there():
            raise BackendError(
                f"{self.path}: the directory was removed or replaced while it was open: what is written "
                "to it is lost; close the store and open it again",
                backend=self.engine.name,
                operation="write",
            )

    def settle(self, written: FlushRound) -> None:
        """Wait until what was written is safe, if it is to survive a power cut; else a flush may fail."""
        if self.durability == "power":
            self.flushes.settle(written)
        else:
            self.engine.housekeep("flushing", functools.partial(self.flushes.settle, written))

    def release(self) -> None:
        """Give up a store's hold on the directory, and close it with the last."""
        with OPEN.lock:
            self.stores -= 1
            if self.stores > 0 or self._closing:
                return
            self._closing = True
        # Without the lock of all directories: an operation that is waited for here may collect a store of
        # another one, which then wants that lock. Who opens this directory meanwhile waits for ``gone``.
        try:
            self._close()
        finally:
            with OPEN.lock:
                if OPEN.directories.get(self.path) is self:
                    del OPEN.directories[self.path]
            self.gone.set()

    def _close(self) -> None:
        """Flush and release; nothing happens in a forked child, where the files are the parent's."""
        if self._orphaned:
            return
        with self._lock, self.flushes.flushing:  # those that wait for a flush find all flushed
            self._closed = True
            try:
                run(self.engine.close())
            finally:
                self._lock_file.release()

    def abandon(self) -> None:
        """Make every use in a forked child an error, and leave the parent's files and locks alone."""
        self._orphaned = True
        for backend in self.backends.values():
            backend.forget_everything()
        self._lock_file.abandon()
        self.engine.abandon()


def _make_directory(path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StoreError(f"{path}: is a file; a store needs a directory") from error
    except OSError as error:
        raise StoreError(f"{path}: cannot be made: {error}") from error


class OpenPlaces:
    """What this process has open, and what becomes of it in a forked child."""

    def __init__(self) -> None:
        self.directories: dict[str, Directory] = {}
        self.others: weakref.WeakSet[Any] = weakref.WeakSet()  # connections, and what is in memory
        self.lock = threading.RLock()  # reentrant: a store may be collected, and released, while it is held
        self._abandoned: list[Directory] = []  # kept, so that a child never cleans up the parent's objects

    def directory_at(self, path: str, durability: str, make_engine: Callable[[Path, str], Any]) -> Directory:
        """The opened directory, with one store more on it."""
        while True:
            with self.lock:
                directory = self.directories.get(path)
                if directory is None or not directory.is_there():
                    directory = self.directories[path] = Directory(path, durability, make_engine)
                if directory.stores > 0 or not directory.used:
                    directory.stores += 1
                    directory.used = True
                    return directory
            directory.gone.wait()

    def after_fork_in_child(self) -> None:
        """Abandon everything."""
        self.lock = threading.RLock()  # another thread may have held it at the fork
        for directory in self.directories.values():
            directory.abandon()
            self._abandoned.append(directory)
        self.directories.clear()
        for other in self.others:
            other.abandon()


OPEN = OpenPlaces()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OPEN.after_fork_in_child)


# ------------------------------------------------------------------------------------------------------------
# attuned.connections.server_errors
# What failed requests to a server mean, said without secrets.
# ------------------------------------------------------------------------------------------------------------


class ErrorOrigin(TypedDict):
    """What every BackendError says of its origin."""

    backend: str
    operation: str
    status: int | None


_SAID_CHARACTERS = 200  # of what a server says, in an error message
_LEAST_SECRET = 4  # characters; a shorter one would be found in any text
_HINTS = {401: "; is api_key right?", 403: "; may this api_key do that?"}
FULL_DISK = "the disk of the server is full"
_MEANINGS = {  # of what a server says, whatever the status
    r"no space left|disk usage is at|out of disk": f"; {FULL_DISK}: make room there, reading goes on",
    r"\block(ed)?\b": "; it is locked, which is no matter of the key: unlock it",
    r"enough active replicas|of \d+ read operations failed": "; a node of the cluster seems to be missing",
}
_REDIRECTS = (301, 302, 303, 307, 308)


class ServerErrors:
    """What failed requests to a server mean, in messages of one line that hold no secret."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._secrets = re.compile(
            "|".join(map(re.escape, _written_forms(api_key or ""))) or "(?!)", re.IGNORECASE
        )

    def hide(self, text: str) -> str:
        """Put stars in the place of the api key, however it is written."""
        return self._secrets.sub("***", text)

    def said(self, text: object) -> str:
        """What a server says, for a message."""
        return one_line(self.hide(str(text)))[:_SAID_CHARACTERS]

    def cause(self, error: Exception) -> Exception | None:
        """What an error may show as its cause: the answer without the api key, or nothing."""
        from qdrant_client.http.exceptions import UnexpectedResponse

        if isinstance(error, UnexpectedResponse):
            error.content = self.hide(error.content.decode(errors="replace")).encode()
            error.reason_phrase = self.said(error.reason_phrase)
        shown = "".join(traceback.format_exception(error))
        return error if self.hide(shown) == shown else None

    def _origin(self, operation: str, status: int | None = None) -> tuple[str, ErrorOrigin]:
        origin = ErrorOrigin(backend="server", operation=operation, status=status)
        return f"Qdrant at {self._url}: {operation}", origin

    def failure(self, error: Exception, operation: str) -> BackendError:
        """What a failed request means; ``ambiguous`` where it may have been carried out all the same."""
        import httpx
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        if isinstance(error, QdrantException):  # its own exceptions are of answers with 429 and Retry-After
            asked, where = self._origin(operation, HTTPStatus.TOO_MANY_REQUESTS)
            wait = _retry_after(error)
            return RateLimitedError(
                f"{asked}: too many requests, wait {wait:g} s", retry_after_s=wait, **where
            )
        if isinstance(error, UnexpectedResponse):
            return self.answer(error.status_code or 0, error.content, error.headers, operation)
        asked, where = self._origin(operation)
        cause = error.source if isinstance(error, ResponseHandlingException) else error
        said = self.said(cause) or type(cause).__name__
        unsent = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
        arrived = not isinstance(cause, (*unsent, httpx.UnsupportedProtocol, httpx.LocalProtocolError))
        if isinstance(cause, httpx.TimeoutException | TimeoutError):
            message = f"{asked}: no answer in time ({type(cause).__name__})"
            return BackendTimeoutError(message, retryable=True, ambiguous=arrived, **where)
        if isinstance(cause, httpx.TransportError):
            hint = "; port 6334 is for gRPC, REST is usually at 6333" if ":6334" in self._url else ""
            message = f"{asked}: cannot be reached: {said}{hint}"
            return BackendUnavailableError(message, retryable=True, ambiguous=arrived, **where)
        return BackendError(f"{asked}: not an answer of Qdrant: {said}", ambiguous=arrived, **where)

    def unfinished(self, status: object, operation: str) -> BackendTimeoutError:
        """What it means that a server has taken a write in, and has not done it in time."""
        asked, where = self._origin(operation)
        message = f"{asked}: not done in time: the server says {self.said(status)}"
        return BackendTimeoutError(message, retryable=True, ambiguous=True, **where)

    def answer(self, status: int, content: bytes, headers: Mapping[str, str], operation: str) -> BackendError:
        """What an answer with another status than asked for means."""
        asked, where = self._origin(operation, status)
        try:
            said = str(json.loads(content)["status"]["error"])
        except (ValueError, LookupError, TypeError, RecursionError):
            said = content.decode(errors="replace")
        means = (text for words, text in _MEANINGS.items() if re.search(words, said, re.IGNORECASE))
        message = f"{asked}: HTTP {status}: {self.said(said)}{next(means, _HINTS.get(status, ''))}"
        if status in _REDIRECTS:
            target = self.said(_without_secrets(headers.get("location", "")))
            pointed = f"it redirects to {target}" if target else "it redirects without saying where to"
            message = f"{asked}: HTTP {status}: {pointed}; redirects are not followed: give the url of Qdrant"
        if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.GATEWAY_TIMEOUT):
            return BackendTimeoutError(message, retryable=True, ambiguous=True, **where)
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            limited = RateLimitedError(message, retry_after_s=0.0, **where)
            limited.retryable = False  # Qdrant says how long to wait, unless waiting never helps
            return limited
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            retryable = status in (
                HTTPStatus.INTERNAL_SERVER_ERROR,
                HTTPStatus.BAD_GATEWAY,
                HTTPStatus.SERVICE_UNAVAILABLE,
            )
            return BackendUnavailableError(message, retryable=retryable, ambiguous=True, **where)
        # A gateway, too, answers 404: what counts is what Qdrant says.
        absent = re.search(r"Collection `(.*)` doesn't exist", said)
        if status == HTTPStatus.NOT_FOUND and absent:
            return CollectionNotFoundError(message, collection=absent[1], **where)
        return BackendRejectedError(message, ambiguous=status < HTTPStatus.MULTIPLE_CHOICES, **where)


def environment_error(error: Exception) -> StoreError:
    """What it means that httpx does not make a client: it cannot do with a proxy of the environment."""
    from urllib.request import getproxies

    import httpx

    for scheme, address in getproxies().items():
        if scheme not in ("http", "https", "all") or not address:
            continue
        try:
            httpx.HTTPTransport(
                verify=False, proxy=address if "://" in address else f"http://{address}"
            ).close()
        except ImportError:
            return MissingDependencyError(
                f"{_proxy_variable(scheme)}: a SOCKS proxy needs socksio: pip install socksio, or unset it"
            )
        except (ValueError, httpx.InvalidURL):
            return ValidationError(
                f"{_proxy_variable(scheme)}: no proxy: http://, https:// or socks5://host:port is needed"
            )
    try:
        httpx.Client(verify=False).close()  # noqa: S501 - it connects to nothing
    except (ValueError, httpx.InvalidURL):
        return ValidationError(
            f"{_proxy_variable('no')}: an entry is neither a host nor an address, as ranges of IPv6 such "
            "as ::1/128 are not: leave them out"
        )
    return ValidationError(f"url: no client can be made for it: {type(error).__name__}")


def _proxy_variable(scheme: str) -> str:
    """The environment variable that a proxy comes from: written small where there are two."""
    names = [name for name in os.environ if name.lower() == f"{scheme}_proxy"]
    return max(names, default=f"the system's settings for proxies ({scheme})")


def _written_forms(secret: str) -> list[str]:
    """How a secret may stand in a text: as it is, in urls, JSON, HTML and base64; the longest first."""
    from html import escape as html_escape

    forms = {secret, urlquote(secret, safe=""), urlquote(secret), quote_plus(secret)}
    forms |= {json.dumps(secret)[1:-1], html_escape(secret)}
    for before in range(
        3
    ):  # other bytes stand in front of it, as in "user:"; what shares bits with them is left
        encoded = base64.b64encode(bytes(before) + secret.encode()).decode().rstrip("=")
        whole = (before + len(secret.encode())) * 8 // 6
        inner = encoded[-(-before * 8 // 6) : whole]
        forms |= {inner, inner.replace("+", "-").replace("/", "_")}
    return sorted((form for form in forms if len(form) >= _LEAST_SECRET), key=len, reverse=True)


def _retry_after(error: Exception) -> float:
    """The seconds that a server asks to wait: a whole number of them, or else what the refusal quotes."""
    seconds = getattr(error, "retry_after_s", None)
    if isinstance(seconds, int):
        return float(max(0, min(seconds, MAX_WAIT_S)))
    wait = parse_retry_after(str(error).rpartition("integer: ")[2])
    return 1.0 if wait is None else wait


def _without_secrets(url: str) -> str:
    """An address without the user, the query and the fragment, which may hold what nobody else is to see."""
    plain = re.split(r"[?#]", url, maxsplit=1)[0]
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*:)?(//)[^/]*@", r"\1\2", plain)


# ------------------------------------------------------------------------------------------------------------
# attuned.engines
# Databases of points, behind one protocol: they know no users and no states.
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.filters
# Filters of points, and what they mean: the same on every engine.
# ------------------------------------------------------------------------------------------------------------


# A condition looks at one key at the top of a payload, a name without dots and brackets. A value that is a
# list meets it when one of its elements does. Where the key has an index, its values are of that kind.


class Equal(NamedTuple):
    """The value is this string or integer; neither a bool, which is kept as 0 or 1, nor a float."""

    key: str
    value: str | int


class AnyOf(NamedTuple):
    """The value is one of these strings or integers; of none, nothing matches."""

    key: str
    values: Sequence[str] | Sequence[int]


class Range(NamedTuple):
    """The value is a number within these bounds, compared as a double."""

    key: str
    gte: float | None = None
    lte: float | None = None
    gt: float | None = None
    lt: float | None = None

    def bounds(self) -> dict[str, float | None]:
        """The bounds by name, the stricter of two on a side: the indexes of Qdrant heed but one of them."""
        gte, lte, gt, lt = self[1:]
        if gte is not None and gt is not None:
            gte, gt = (None, gt) if gt >= gte else (gte, None)
        if lte is not None and lt is not None:
            lte, lt = (None, lt) if lt <= lte else (lte, None)
        return {"gte": gte, "lte": lte, "gt": gt, "lt": lt}


class Text(NamedTuple):
    """The value is one text with all of these words, in any order and case; without a word, nothing matches.

    In a list of texts engines look for the words in one of them, or, with an index, in all of them together.
    """

    key: str
    words: str


class Absent(NamedTuple):
    """There is no value: the key is missing, or holds None or an empty list."""

    key: str


class Or(NamedTuple):
    """At least one of these filters matches, none of which holds an Or; of none, nothing matches."""

    filters: Sequence[Filter]


Condition: TypeAlias = "Equal | AnyOf | Range | Text | Absent | Or"


class Filter(NamedTuple):
    """All of some conditions, and none of others; without any, everything matches."""

    must: tuple[Condition, ...] = ()
    must_not: tuple[Condition, ...] = ()


def matches(where: Filter, payload: Mapping[str, Any]) -> bool:
    """Whether a payload matches a filter; this is what engines are held to."""
    for condition in where.must:
        if not _holds(condition, payload):
            return False
    return not any(_holds(condition, payload) for condition in where.must_not)


def _holds(condition: Condition, payload: Mapping[str, Any]) -> bool:
    if isinstance(condition, Or):
        return any(matches(each, payload) for each in condition.filters)
    value: Any = payload.get(condition.key)
    if isinstance(condition, Absent):
        return value is None or value == []
    values: Sequence[Any] = cast("Sequence[Any]", value) if isinstance(value, list) else (value,)
    match condition:
        case Equal(_, wanted):
            return any(each == wanted and type(each) not in (bool, float) for each in values)
        case AnyOf(_, wanted):
            return any(each in wanted and type(each) not in (bool, float) for each in values)
        case Range():
            return any(type(each) in (int, float) and _within(condition, float(each)) for each in values)
        case Text(_, text):
            sought = words(text)
            return bool(sought) and any(isinstance(each, str) and sought <= words(each) for each in values)


def _within(bounds: Range, number: float) -> bool:
    return (
        (bounds.gte is None or number >= bounds.gte)
        and (bounds.lte is None or number <= bounds.lte)
        and (bounds.gt is None or number > bounds.gt)
        and (bounds.lt is None or number < bounds.lt)
    )


@functools.lru_cache(1_024)
def words(text: str) -> frozenset[str]:
    """The words of a text: its runs of letters and digits, in lower case."""
    return frozenset(word.lower() for word in re.findall(r"[^\W_]+", text))


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.vectors
# Unit vectors in the memory of this process, and their similarity.
# ------------------------------------------------------------------------------------------------------------


class Vectors(Protocol):
    """Unit vectors in numbered rows, in single precision where numpy is there."""

    def put(self, row: int, direction: Sequence[float]) -> None:
        """Set a row: one that there is, or the next."""
        ...

    def get(self, row: int) -> list[float]:
        """What a row was set to."""
        ...

    def scores(self, direction: Sequence[float], rows: int) -> Any:
        """The products of a direction with each of the first rows."""
        ...

    def best(self, scores: Any, number: int) -> Iterable[int]:
        """The rows of the best scores, best first, at least ``number`` of them or all."""
        ...


class PlainVectors(Vectors):
    """Rows as lists, where numpy is absent."""

    def __init__(self) -> None:
        self._rows: list[Sequence[float]] = []

    def put(self, row: int, direction: Sequence[float]) -> None:
        """See Vectors.put."""
        self._rows[row : row + 1] = [direction]

    def get(self, row: int) -> list[float]:
        """See Vectors.get."""
        return list(self._rows[row])

    def scores(self, direction: Sequence[float], rows: int) -> list[float]:
        """See Vectors.scores."""
        return [sum(map(operator.mul, direction, row)) for row in self._rows[:rows]]

    def best(self, scores: list[float], number: int) -> Iterable[int]:  # noqa: ARG002 - sorts all anyhow
        """See Vectors.best."""
        return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)


class NumpyVectors(Vectors):
    """Rows as matrices of so many each: a single one would take long to be doubled."""

    _ROWS = 4_096  # 4 times a power of two

    def __init__(self, vector_size: int) -> None:
        import numpy as np

        self._numpy = np
        self._none = np.zeros((4, vector_size), dtype=np.float32)
        self._matrices = [self._none.copy()]  # the last one is doubled when full, up to so many rows

    def put(self, row: int, direction: Sequence[float]) -> None:
        """See Vectors.put."""
        number, place = divmod(row, self._ROWS)
        if number == len(self._matrices):
            self._matrices.append(self._none.copy())
        matrix = self._matrices[number]
        if place >= len(matrix):
            matrix = self._numpy.concatenate([matrix, self._numpy.zeros_like(matrix)])
            self._matrices[number] = matrix
        matrix[place] = direction

    def get(self, row: int) -> list[float]:
        """See Vectors.get."""
        number, place = divmod(row, self._ROWS)
        return cast("list[float]", self._matrices[number][place].tolist())

    def scores(self, direction: Sequence[float], rows: int) -> Any:
        """See Vectors.scores."""
        wanted = self._numpy.asarray(direction, dtype=self._numpy.float32)
        return self._numpy.concatenate([matrix @ wanted for matrix in self._matrices])[:rows]

    def best(self, scores: Any, number: int) -> Iterable[int]:
        """See Vectors.best."""
        if number < len(scores):
            rows = self._numpy.argpartition(-scores, number)[:number]
            rows = rows[self._numpy.argsort(-scores[rows])]
        else:
            rows = self._numpy.argsort(-scores)
        return cast("list[int]", rows.tolist())


def make_vectors(vector_size: int) -> Vectors:
    """No rows yet, of so many dimensions."""
    try:
        return NumpyVectors(vector_size)
    except ImportError:
        return PlainVectors()


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.waist
# What an engine of points offers: the narrow waist between what is kept and the databases.
#
# An engine knows collections, points, tenants and filters; it knows nothing of users, states and documents.
# To write one, offer what ``Engine`` asks for, and of ``Files``, ``Marks`` and ``NativeSnapshots`` what the
# database has; ``MemoryEngine`` is the example, and tests/test_waist.py says whether it is right.
#
# Methods are coroutines, so that one body of code stands above all engines. Those of an engine in this
# process never suspend. Whoever drives it makes one call at a time, under a lock; only ``flush`` and
# ``flush_due`` may be used meanwhile. An engine over a connection is called by many threads or tasks at once.
# ------------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A point as it is written: ``id`` is a UUID as text, and the same in all tenants.

    The payload is JSON with a mapping at the top. Of the vector the direction is kept, in single precision.
    The tenant becomes part of the payload, under the key that ``CollectionSpec.tenant`` names.
    """

    id: str
    vector: Sequence[float]
    payload: Mapping[str, Any]
    tenant: str | None = None


class Record(NamedTuple):
    """A point as it was read, which never changes any more.

    ``score`` is its cosine where it was searched for; payload and vector are empty where not asked for.
    ``id`` is as the engine gives it, a string or a UUID.
    """

    id: object
    payload: Mapping[str, Any]
    score: float = 0.0
    vector: Sequence[float] = ()


class Page(NamedTuple):
    """Some records and the cursor to the next ones, None at the end."""

    records: list[Record]
    cursor: Any


class Put(NamedTuple):
    """Points to be written where a guard allows it, which is judged for each point by itself.

    ``mode``: "insert" leaves points that exist alone, "update" those that do not; of those that exist, only
    ones that match ``over`` are replaced, and only ones whose number under the key ``newest_by`` is not above
    that of the new point. One that does not exist is inserted whatever these two say.
    """

    points: Sequence[Point]
    mode: Literal["upsert", "insert", "update"] = "upsert"
    over: Filter | None = None
    newest_by: str | None = None

    @property
    def guarded(self) -> bool:
        """Whether there is anything to be judged."""
        return self.mode != "upsert" or self.over is not None or self.newest_by is not None

    def allows(self, point: Point, there: Mapping[str, Any] | None) -> bool:
        """Whether a point may be written where there is one with such a payload, or none."""
        if there is None:
            return self.mode != "update"
        key, guards = self.newest_by, [] if self.over is None else [self.over]
        if key is not None:
            guards.append(Filter((Range(key, lte=point.payload[key]),)))
        return self.mode != "insert" and all(matches(guard, there) for guard in guards)


class Matching(NamedTuple):
    """All points of a tenant, or of all tenants, that match a filter."""

    where: Filter
    tenant: str | None = None


IndexKind = Literal["keyword", "integer", "float", "text"]


@attrs.frozen
class CollectionSpec:
    """What a collection is opened with.

    ``tenant`` is the key of the payload that holds a point's tenant. ``indexes`` are the keys that are
    filtered on or ordered by, with what they hold. ``metadata`` is recorded when the collection is created,
    or amended; ``accept`` raises where that of one that exists will not do, and is asked before anything is
    touched.
    """

    name: str
    vector_size: int
    indexes: Mapping[str, IndexKind]
    metadata: Mapping[str, Any]
    accept: Callable[[Mapping[str, Any]], object] = dict
    tenant: str | None = None


@attrs.frozen
class CollectionStatus:
    """How a collection is; ``details`` are the database's own words."""

    points: int | None  # None where there is none, or, in this process, none is open
    matching: int = 0
    version: str | None = None  # of the server
    details: Mapping[str, Any] = {}


ExecutionMode = Literal["in place", "in thread", "on loop"]


class Engine(Protocol):
    """What stands between what is kept and a database of points.

    A collection is opened before anything else is done with it; until then, and once it is dropped, what is
    asked of it raises CollectionNotFoundError. What a database raises comes as BackendError. ``tenant=None``
    reads the points of all tenants.

    What it can do is said by attributes, which never change:

    ``runs``: how an asynchronous store calls it. "in place": calls are short, and a thread would gain
    nothing; "in thread": they block; "on loop": its coroutines suspend.
    ``indexed``: pages, orders and counts of a filter are found without looking at every point. Where not,
    what stands above keeps in memory what it would have to ask for often.
    ``compact``: nested values in a payload cost more than one string of the same content.
    ``rounds_floats``: a float in a payload may come back changed in its last bit.
    ``reporter``: what requests are reported to, None for nothing.
    ``shared``: others may write between two calls, so that what must hold is said by guards.
    ``amendments``: how often a collection has been amended here. It alone changes.
    """

    name: str
    runs: ExecutionMode
    indexed: bool
    compact: bool
    rounds_floats: bool
    shared: bool
    reporter: Telemetry | None
    amendments: int

    async def open(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """Open a collection, creating it where absent; returns its metadata. Harmless when repeated."""
        ...

    async def amend(self, collection: CollectionSpec) -> None:
        """Put the metadata of a collection that is open over its own, key by key, and add indexes."""
        ...

    async def collections(self) -> Mapping[str, Mapping[str, Any]]:
        """The collections that there are, opened or not, and their metadata."""
        ...

    async def drop(self, collection: str) -> None:
        """Remove a collection, if there is one."""
        ...

    async def retrieve(
        self, collection: str, ids: Sequence[str], *, payload: bool = True, vector: bool = False
    ) -> list[Record]:
        """The points with these ids that there are, in any order."""
        ...

    async def page(
        self,
        collection: str,
        where: Filter,
        *,
        limit: int,
        tenant: str | None = None,
        cursor: Any = None,
        newest_by: str | None = None,
        payload: bool = True,
    ) -> Page:
        """Points one page after another; or, with ``newest_by``, the first in descending order of a key.

        What is there from the first page to the last comes once; what is written meanwhile comes or not. A
        page may hold fewer than ``limit``, or none, and still have a cursor. In an order come the points
        alone that hold a number there; without their payloads they hold that key.
        """
        ...

    async def search(
        self,
        collection: str,
        vector: Sequence[float],
        where: Filter,
        limit: int,
        *,
        tenant: str | None = None,
        payload: bool = True,
    ) -> list[Record]:
        """The nearest points by cosine, best first; without payloads, their ids and scores alone."""
        ...

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """How many points match."""
        ...

    async def count_by(
        self, collection: str, key: str, values: Sequence[str], where: Filter
    ) -> Mapping[str, int]:
        """How many points match for each of these values of a keyword; 0 may be left out."""
        ...

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """Write points, one put after another, then delete others, by their ids or all that match.

        The points of one put are judged against what there was before it; of one id twice in a put the last
        wins. In this process all is seen at one moment. On a server it is as few requests as it takes, and
        others may come between: what must hold is said by guards. The points of a tenant in one put, as long
        as they fit into a request, are one operation there, which is done or not done.
        """
        ...

    async def status(self, collection: str, where: Filter, seconds: float) -> CollectionStatus:
        """How a collection is, and how many of its points match; asked once, within so many seconds.

        On a server the collection need not have been opened.
        """
        ...

    async def close(self) -> None:
        """Flush and release everything."""
        ...


class EmbeddedEngine(Engine, Files, Protocol):
    """An engine in this process that owns its files."""


class Marks(Protocol):
    """What an engine offers whose collections can be marked for all that use them."""

    async def mark(self, collection: str, key: str, value: str | None) -> None:
        """Record something in the metadata of a collection, or remove it."""
        ...

    async def mark_of(self, collection: str, key: str) -> str | None:
        """What ``mark`` recorded; None where there is nothing, or no collection."""
        ...


class NativeSnapshots(Protocol):
    """What an engine offers whose database makes snapshots of its own."""

    async def resolve(self, collection: str) -> str:
        """The name of the collection that an alias stands for, or the same."""
        ...

    async def is_whole(self, collection: str) -> bool:
        """Whether the node that answers has every shard of a collection, so that its snapshot has all."""
        ...

    async def create_snapshot(self, collection: str) -> RemoteSnapshot:
        """Let the database make a snapshot of a collection."""
        ...

    async def download_snapshot(self, collection: str, name: str, taking: NativeSnapshotWriter) -> None:
        """Read a snapshot of the database."""
        ...

    async def delete_snapshot(self, collection: str, name: str) -> None:
        """Remove a snapshot from the database."""
        ...

    async def upload_snapshot(self, collection: str, path: Path, sha256: str) -> None:
        """Let the database replace a collection, or make it, by what a snapshot file holds."""
        ...

    async def finish(self, last: Awaitable[object]) -> None:
        """Await something though being cancelled."""
        ...

    async def apart(self, call: Callable[[], T]) -> T:
        """Make a call that blocks, where it holds up nobody else."""
        ...


class SharedEngine(Engine, Marks, NativeSnapshots, Protocol):
    """An engine over a connection to a database that other processes write to as well."""

    async def once(self, work: Callable[[], Awaitable[object]]) -> None:
        """Do something that many need: one does, the others wait for how it ends."""
        ...

    def is_spread(self, collection: str) -> bool:
        """Whether one reading may meet the points of a collection that is open at several moments."""
        ...


# What engines share


@contextlib.contextmanager
def backend_errors(engine: Engine, operation: str) -> Generator[None]:
    """Turn what a library raises into a BackendError, and report the request."""
    try:
        with report_request(engine.reporter, engine.name, operation):
            yield
    except StoreError:
        raise
    except Exception as error:
        message = f"{engine.name}: {operation} failed: {error or type(error).__name__}"
        raise BackendError(message, backend=engine.name, operation=operation) from error


def not_open(backend: str, collection: str) -> CollectionNotFoundError:
    """The error of an operation on a collection that has not been opened, or has been dropped."""
    message = f"{backend}: collection {collection!r} is not open"
    return CollectionNotFoundError(message, collection=collection, backend=backend, operation="find")


def within(where: Filter, key: str | None, tenant: str | None) -> Filter:
    """A filter that only points of one tenant match, whose collection keeps it under a key."""
    if tenant is None:
        return where
    if key is None:
        raise ValueError("the collection has no tenants")
    return Filter((Equal(key, tenant), *where.must), where.must_not)


def with_tenant(point: Point, key: str | None) -> Point:
    """A point whose payload holds its tenant."""
    if (point.tenant is None) != (key is None):
        raise ValueError(f"point {point.id}: points have a tenant where their collection has a key for it")
    if key is None:
        return point
    return Point(point.id, point.vector, {**point.payload, key: point.tenant}, point.tenant)


def copied(value: Any) -> Any:
    """JSON that shares nothing with the original."""
    if isinstance(value, dict):
        return {key: copied(each) for key, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [copied(each) for each in cast("Sequence[Any]", value)]
    return value


class Opened(NamedTuple):
    """What is known of an open collection."""

    vector_size: int
    tenant: str | None  # the key that holds it


class EngineInProcess(Engine):
    """What the engines in this process do alike: they judge guards here, and count value by value."""

    shared = False
    reporter: Telemetry | None = None

    def __init__(self) -> None:
        self.amendments = 0
        self._open: dict[str, Opened] = {}

    def _opened(self, collection: str) -> Opened:
        try:
            return self._open[collection]
        except KeyError:
            raise not_open(self.name, collection) from None

    def _narrowed(self, collection: str, where: Filter, tenant: str | None) -> Filter:
        return within(where, self._opened(collection).tenant, tenant)

    async def _judge(
        self, collection: str, puts: Sequence[Put], deletes: Sequence[str] | Matching
    ) -> tuple[list[Point], list[str]]:
        """What ``apply`` is to write, and the ids of what it is to delete then."""
        vector_size, key = self._opened(collection)
        asked = [point.id for put in puts if put.guarded for point in put.points]
        found = await self.retrieve(collection, asked) if asked else []
        there = {str(record.id): record.payload for record in found}
        written: dict[str, Point] = {}
        for put in puts:
            points = [with_tenant(point, key) for point in put.points]
            if put.guarded:
                points = [point for point in points if put.allows(point, there.get(point.id))]
            if asked:
                there.update((point.id, point.payload) for point in points)
            written.update((point.id, point) for point in points)
        for point in written.values():  # before any of them is taken in
            if len(point.vector) != vector_size:
                message = f"point {point.id} has {len(point.vector)} dimensions, not {vector_size}"
                raise BackendRejectedError(message, backend=self.name, operation="write")
        if not isinstance(deletes, Matching):
            return list(written.values()), list(deletes)
        where, cursor = within(deletes.where, key, deletes.tenant), None
        gone = [point.id for point in written.values() if matches(where, point.payload)]
        while True:
            page = await self.page(collection, where, limit=1_000, cursor=cursor, payload=False)
            gone += [point_id for record in page.records if (point_id := str(record.id)) not in written]
            if (cursor := page.cursor) is None:
                return list(written.values()), gone

    async def status(self, collection: str, where: Filter, seconds: float) -> CollectionStatus:
        """See Engine.status."""
        del seconds  # the answer is at hand
        if collection not in self._open:
            return CollectionStatus(None)
        return CollectionStatus(await self.count(collection, Filter()), await self.count(collection, where))

    async def count_by(
        self, collection: str, key: str, values: Sequence[str], where: Filter
    ) -> Mapping[str, int]:
        """See Engine.count_by; value by value, which is quickest within the process."""
        narrowed = ((value, where._replace(must=(Equal(key, value), *where.must))) for value in values)
        return {value: await self.count(collection, each) for value, each in narrowed}


def payload_bytes(value: Any) -> int:
    """About how many bytes JSON takes as it is written to a disk, rather too many."""
    if isinstance(value, str):
        return 8 + (len(value) if value.isascii() else 4 * len(value))
    if isinstance(value, dict):
        return sum(
            8 + 4 * len(key) + payload_bytes(each) for key, each in cast("dict[str, Any]", value).items()
        )
    if isinstance(value, list | tuple):
        return sum(map(payload_bytes, cast("Sequence[Any]", value)))
    return 16


class EngineOnDisk(EngineInProcess):
    """What the engines that keep files do alike: they look for room first, and put off what can wait."""

    RETRY_S = 30.0  # until what was put off is tried again, at the next write
    most_left_free = MAX_INTEGER  # as much as ``min_free_bytes`` says
    _POINT_BYTES = 256  # of a point, beside its payload and vector

    def __init__(self, path: Path, min_free_bytes: int = MIN_FREE_BYTES) -> None:
        super().__init__()
        self._root = str(path)
        self.min_free_bytes = min_free_bytes
        self._put_off: dict[str, tuple[str, float]] = {}  # what is the matter, and when it is tried again

    @staticmethod
    def free_bytes(path: str) -> int:
        """How much room there is on the disk of a directory."""
        return shutil.disk_usage(path).free

    def check_room(self, operation: str, size: int = 0) -> None:
        """Raise BackendError where the disk is as good as full, before anything is done."""
        try:
            free = self.free_bytes(self._root)
        except OSError:
            return  # a directory that is gone, of which check_there tells
        needed = min(self.min_free_bytes, self.most_left_free) + size
        if free < needed:
            done = "closed without a flush" if operation == "close" else "nothing was done"
            raise BackendError(
                f"{self._root}: the disk is full: {operation} needs {needed / 2**20:,.1f} MiB free, "
                f"there are {free / 2**20:,.1f}; {done}: make room, or lower min_free_bytes "
                "(ATTUNED_STORE_MIN_FREE_BYTES) on a small device",
                backend=self.name,
                operation=operation,
                retryable=True,
            )

    def check_room_for(self, written: Sequence[Point], deleted: Sequence[str]) -> None:
        """Raise BackendError where there is no room for a write: four times what it holds."""
        size = self._POINT_BYTES * (len(written) + len(deleted))
        size += sum(4 * len(point.vector) + payload_bytes(point.payload) for point in written)
        self.check_room("write", 4 * size)

    def is_due(self, task: str) -> bool:
        """Whether a task has not been put off just now."""
        return task not in self._put_off or time.monotonic() >= self._put_off[task][1]

    def housekeep(self, task: str, work: Callable[[], object]) -> None:
        """Do what no write waits for: where it fails, that is told, once, and it is tried again later."""
        if not self.is_due(task):
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the write before it has been done: whatever it is
            message = f"{task} is put off: {error or type(error).__name__}"
            if task not in self._put_off:
                LOGGER.warning("%s: %s", self._root, message)
            self._put_off[task] = message, time.monotonic() + self.RETRY_S
        else:
            self._put_off.pop(task, None)

    def signs(self) -> list[str]:
        """See Files.signs."""
        signs = [message for message, _ in list(self._put_off.values())]
        try:
            self.check_room("write")
        except BackendError as error:
            signs.append(str(error))
        return signs


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.client_models
# What engines over qdrant-client ask alike, in its models.
# ------------------------------------------------------------------------------------------------------------


def import_qdrant_client() -> Any:
    """The package qdrant_client, or MissingDependencyError."""
    try:
        import qdrant_client
    except ImportError as error:
        raise MissingDependencyError(
            "a Qdrant server needs qdrant-client: pip install qdrant-client"
        ) from error
    return qdrant_client


_NOTHING = Filter((Or(()),))


class ClientModels:
    """Filters and requests in the models of qdrant-client, and records out of them."""

    def __init__(self, models: Any) -> None:
        self.models = models

    def vectors(self, size: int) -> Any:
        """The parameters of a new collection's vectors."""
        return self.models.VectorParams(size=size, distance=self.models.Distance.COSINE)

    def filter(self, where: Filter, listed: int | None = None) -> Any:
        """A filter, which may be empty; no condition of which lists more values than ``listed``."""
        if any(condition in where.must for condition in where.must_not):
            where = _NOTHING  # a server takes both on one index for the first alone
        must, must_not = ([self._condition(each, listed) for each in conditions] for conditions in where)
        return self.models.Filter(must=must, must_not=must_not)

    def _condition(self, condition: Condition, listed: int | None) -> Any:
        models = self.models
        match condition:
            case AnyOf(key, values) if listed is not None and len(values) > listed:
                pieces = (values[start : start + listed] for start in range(0, len(values), listed))
                return models.Filter(should=[self._condition(AnyOf(key, each), None) for each in pieces])
            case Equal(key, value):
                asked = {"match": models.MatchValue(value=value)}
            case AnyOf(key, values):
                asked = {"match": models.MatchAny(any=list(values))}
            case Range(key):
                asked = {"range": models.Range(**condition.bounds())}
            case Text(_, text) if not words(text):  # which a server finds everywhere
                return models.HasIdCondition(has_id=[])
            case Text(key, text):
                asked = {"match": models.MatchText(text=text)}
            case Absent(key):
                return models.IsEmptyCondition(is_empty=models.PayloadField(key=key))
            case Or(()):  # an empty "should" would match everything
                return models.HasIdCondition(has_id=[])
            case Or(filters):
                return models.Filter(should=[self.filter(each, listed) for each in filters])
        return models.FieldCondition(key=key, **asked)

    def page(
        self, narrowed: Any, limit: int, cursor: Any, newest_by: str | None, *, payload: bool
    ) -> dict[str, Any]:
        """The arguments of scroll() for Engine.page."""
        order = newest_by and self.models.OrderBy(key=newest_by, direction=self.models.Direction.DESC)
        return {
            "scroll_filter": narrowed,
            "limit": limit,
            "offset": cursor,
            "order_by": order,
            "with_payload": payload or (False if newest_by is None else [newest_by]),
        }

    def search(self, vector: Sequence[float], narrowed: Any, limit: int, *, payload: bool) -> dict[str, Any]:
        """The arguments of query_points() for Engine.search."""
        return {
            "query": list(vector),
            "query_filter": narrowed,
            "limit": limit,
            "with_payload": payload,
        }


def client_records(found: Iterable[Any]) -> list[Record]:
    """What a client has found, searched for or not."""
    return [
        Record(str(each.id), each.payload or {}, getattr(each, "score", 0.0), each.vector or ())
        for each in found
    ]


def client_page(found: tuple[Iterable[Any], Any]) -> Page:
    """What scroll() has found."""
    records, following = found
    return Page(client_records(records), following)


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.edge
# The engine of Qdrant Edge, embedded in this process.
# ------------------------------------------------------------------------------------------------------------


def import_qdrant_edge() -> Any:
    """The package qdrant_edge, or MissingDependencyError."""
    try:
        import qdrant_edge
    except ImportError as error:
        raise MissingDependencyError(
            'this store needs Qdrant Edge: pip install qdrant-edge-py; or choose engine="local"'
        ) from error
    return qdrant_edge


# Relied on in Qdrant Edge beyond its public interface; tests/test_canaries.py watches it. Elsewhere, too, it
# is relied on that closing a shard flushes it, that one that was closed can be moved and loaded again, and
# that an ordered page tells the value it was ordered by without its payload.


def abandon_shards(shards: Iterable[Any], directories: Iterable[Path]) -> None:
    """Keep shards for ever, as dropping one writes to its files; let go of their locks.

    These are on the directories of their write-ahead logs. In a forked child the files are the parent's; in
    this process there may be no room on the disk, where writing is a signal that ends it.
    """
    import ctypes

    for shard in shards:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(shard))
    logs = list[os.stat_result]()
    for directory in directories:
        with contextlib.suppress(OSError):  # somebody has removed it
            logs.append((directory / "wal").stat())
    for descriptor in Path("/dev/fd").iterdir() if Path("/dev/fd").is_dir() else ():
        with contextlib.suppress(OSError):
            if any(os.path.samestat(descriptor.stat(), log) for log in logs):
                os.close(int(descriptor.name))


def _bytes_in(directory: Path) -> int:
    """The room that files take, holes left out."""
    found = [file.stat() for file in directory.rglob("*") if file.is_file()]
    return sum(getattr(each, "st_blocks", each.st_size // 512) * 512 for each in found)


# ------------------------------------------------------------------------------


class EdgeEngine(EngineOnDisk):
    """Qdrant Edge: one shard a collection, in collections/<name>/, its manifest beside it."""

    name = "edge"
    indexed = True
    runs: ExecutionMode = "in place"
    compact = True
    rounds_floats = True

    # Flushing is what lets the write-ahead log shrink. It holds up the process, so that it has a turn of its
    # own, apart from the write after which it is due. More often costs throughput; more rarely makes the
    # pause longer (2,000 changes: about 20 ms, 20,000: 100 ms) and opening after a crash slower.
    _FLUSH_EVERY = 2_000
    # Overwritten and deleted points take space until segments are rebuilt, which holds up the process for
    # about 6 us a point: done once for so many changes that it does not matter.
    _REBUILD_EVERY = 200_000

    def __init__(
        self,
        path: Path,
        durability: str,
        reporter: Telemetry | None = None,
        min_free_bytes: int = MIN_FREE_BYTES,
    ) -> None:
        super().__init__(path, min_free_bytes)
        self.reporter = reporter
        self._api = import_qdrant_edge()
        self._path = path / "collections"
        self._power = durability == "power"
        self.writes = 0
        self._shards: dict[str, Any] = {}
        self._directories: dict[str, Path] = {}  # of the shards
        self._done: dict[str, int] = {}  # changes, ever
        self._flushed: dict[str, int] = {}  # of these
        self._changes: dict[str, int] = {}

    async def open(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """See Engine.open."""
        manifest = self._manifest(collection.name)
        if collection.name in self._shards:
            metadata = read_manifest(manifest)
            collection.accept(metadata)
            return metadata
        if self._recorded(collection.name).get("dropped"):
            await self.drop(collection.name)  # which a process began that was killed
        with backend_errors(self, "open"):
            if generations := self._generations(collection.name):
                self.check_room("open", sum(_bytes_in(each / "wal") for each in generations))
            else:
                self.check_room("open")
                self._check_never_replaced(collection.name)
                self._create(collection, self._path / collection.name, manifest)
            metadata = read_manifest(manifest)
            collection.accept(metadata)
            self._load(collection.name, metadata)
            self._remove_strays(collection.name, metadata)
        vector_size = metadata.get("vector_size", collection.vector_size)
        self._open[collection.name] = Opened(vector_size, collection.tenant)
        return metadata

    async def amend(self, collection: CollectionSpec) -> None:
        """See Engine.amend."""
        self._opened(collection.name)
        manifest = self._manifest(collection.name)
        with backend_errors(self, "amend"):
            self.check_room("amend")
            self._create_indexes(self._shards[collection.name], collection)
            write_atomically(manifest, json.dumps({**read_manifest(manifest), **collection.metadata}))
        self.amendments += 1
        self._done[collection.name] += 1
        self.writes += 1

    async def collections(self) -> Mapping[str, Mapping[str, Any]]:
        """See Engine.collections."""
        with backend_errors(self, "list"):
            names = sorted(path.stem for path in self._path.glob("*.json") if self._generations(path.stem))
            found = {name: read_manifest(self._manifest(name)) for name in names}
        return {name: metadata for name, metadata in found.items() if not metadata.get("dropped")}

    def _manifest(self, name: str) -> Path:
        return self._path / f"{name}.json"

    def _directory(self, name: str, metadata: Mapping[str, Any]) -> Path:
        """Where the shard of a collection is: one that was replaced has another generation of it."""
        generation = metadata.get("generation", 0)
        if not isinstance(generation, int) or generation < 0:
            raise StoreError(f"{self._manifest(name)}: generation is not a number")
        return self._path / (f"{name}@{generation}" if generation else name)

    def _recorded(self, name: str) -> dict[str, Any]:
        """What a manifest says, if it can be read."""
        try:
            return read_manifest(self._manifest(name))
        except StoreError:
            return {}

    def _check_never_replaced(self, name: str) -> None:
        """Raise StoreError where there was data that is missing now; a manifest alone is half a making."""
        if generation := self._recorded(name).get("generation"):
            message = f"{self._manifest(name)}: its data, {name}@{generation} beside it, is missing"
            raise BackendError(message, backend="edge", operation="open")

    def _generations(self, name: str) -> list[Path]:
        """The directories of a collection; all but one are what a process left that was killed."""
        later = (path for path in self._path.glob(f"{name}@*") if path.name[len(name) + 1 :].isdecimal())
        return [path for path in (self._path / name, *later) if path.is_dir()]

    def _load(self, name: str, metadata: Mapping[str, Any]) -> None:
        directory = self._directory(name, metadata)
        self._use(name, directory, self._api.EdgeShard.load(str(directory)))

    def _use(self, name: str, directory: Path, shard: Any) -> None:
        self._shards[name], self._directories[name] = shard, directory
        self._done.setdefault(name, 0)  # a flush may be running that reads the one and sets the other
        self._flushed.setdefault(name, 0)
        self._changes[name] = 0

    def _remove_strays(self, name: str, metadata: Mapping[str, Any]) -> None:
        """Remove what a process left that was killed."""
        used = self._directory(name, metadata)
        for path in [*self._generations(name), self._unfinished(name)]:
            if path != used:
                shutil.rmtree(path, ignore_errors=True)
        temporary_name(self._manifest(name)).unlink(missing_ok=True)

    def _unfinished(self, name: str) -> Path:
        """Where the shard of a collection is created."""
        return self._path / f".{name}.new"

    def _create(self, collection: CollectionSpec, directory: Path, manifest: Path) -> None:
        """Create under another name, then rename: a collection that is there is complete."""
        api, beside = self._api, self._unfinished(collection.name)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write_atomically(manifest, json.dumps(collection.metadata))
        vectors = api.EdgeVectorParams(size=collection.vector_size, distance=api.Distance.Cosine)
        # No graph index: building one over 400,000 points holds up the process for 13 s, searching them
        # without takes 6 ms.
        plain = api.HnswIndexConfig(m=0, ef_construct=16, full_scan_threshold=10**9)
        optimizers = api.EdgeOptimizersConfig(indexing_threshold=0)
        shard = api.EdgeShard.create(
            str(beside), api.EdgeConfig(vectors=vectors, hnsw_config=plain, optimizers=optimizers)
        )
        if collection.tenant is not None:
            tenants = api.KeywordIndexParams(is_tenant=True)
            shard.update(api.UpdateOperation.create_field_index(collection.tenant, tenants))
        self._create_indexes(shard, collection)
        shard.close()
        if self._power:
            fsync(beside, *beside.rglob("*"))
        beside.rename(directory)
        if self._power:
            fsync(self._path, self._path.parent, self._path.parent.parent)

    def _create_indexes(self, shard: Any, collection: CollectionSpec) -> None:
        for key, kind in collection.indexes.items():
            index = getattr(self._api.PayloadSchemaType, kind.capitalize())
            shard.update(self._api.UpdateOperation.create_field_index(key, index))

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """See Engine.apply."""
        written, deleted = await self._judge(collection, puts, deletes)
        api, shard, changes = self._api, self._shards[collection], len(written) + len(deleted)
        with backend_errors(self, "write"):
            self.check_room_for(written, deleted)
            try:
                if written:
                    points = [api.Point(point.id, list(point.vector), point.payload) for point in written]
                    shard.update(api.UpdateOperation.upsert_points(points))
                if deleted:
                    shard.update(api.UpdateOperation.delete_points(deleted))
            finally:  # what failed may have been done in part; not before, as a flush may run meanwhile
                self._done[collection] += changes
            self._tidy(collection, changes)
        self.writes += 1

    @property
    def flush_due(self) -> bool:
        """See Files.flush_due."""
        due = any(self._done[name] - self._flushed[name] >= self._FLUSH_EVERY for name in self._shards)
        return due and self.is_due("flushing")

    def flush(self) -> None:
        """See Files.flush; a shard that has not been written to since the last one needs none."""
        with backend_errors(self, "flush"):
            for name, shard in list(self._shards.items()):
                done = self._done[name]
                if done == self._flushed[name]:
                    continue
                self.check_room("flush")
                try:
                    shard.flush()
                except Exception:
                    if self._shards.get(name) is shard:  # else it was closed meanwhile, which flushes
                        raise
                self._flushed[name] = done

    async def drop(self, collection: str) -> None:
        """See Engine.drop; the manifest that says so is the moment, and goes last."""
        manifest = self._manifest(collection)
        with backend_errors(self, "drop"):
            if collection in self._shards:  # else there is nothing but files to be removed, which makes room
                self.check_room("drop")
            if manifest.exists() and self._generations(collection):
                write_atomically(manifest, json.dumps({"dropped": True}))
            self._open.pop(collection, None)
            if shard := self._shards.pop(collection, None):
                del self._directories[collection]
                shard.close()
            for directory in (*self._generations(collection), self._unfinished(collection)):
                shutil.rmtree(directory, ignore_errors=True)
            for file in (temporary_name(manifest), manifest):
                file.unlink(missing_ok=True)

    async def describe(self, collection: str, metadata: Mapping[str, Any]) -> None:
        """See Files.describe."""
        manifest = self._manifest(collection)
        with backend_errors(self, "describe"):
            self.check_room("describe")
            self._record(manifest, {**read_manifest(manifest), **metadata})

    async def replace(self, collection: str, by: str, *, described: bool = False) -> None:
        """The manifest says which generation of the shard is the one; writing it is the moment."""
        manifest = self._manifest(collection)
        metadata = read_manifest(manifest)
        generation = metadata.get("generation", 0) + 1
        if described:
            metadata = read_manifest(self._manifest(by))
        metadata["generation"] = generation
        directory = self._directory(collection, metadata)
        with backend_errors(self, "replace"):
            self.check_room("replace", _bytes_in(self._directories[by] / "wal"))
            shard = self._move(by, directory)
            try:
                fsync(*directory.rglob("*"), directory, self._path)
                self._record(manifest, metadata)
            except BaseException:
                if read_manifest(manifest) == metadata:  # an interrupt, after the moment
                    self._switch(collection, directory, shard)
                else:
                    shard.close()
                    shutil.rmtree(directory, ignore_errors=True)
                raise
            self._switch(collection, directory, shard)
            self._open[collection] = self._open[by]
            await self.drop(by)

    @staticmethod
    def _record(manifest: Path, metadata: Mapping[str, Any]) -> None:
        try:
            write_atomically(manifest, json.dumps(metadata))
        except OSError as error:
            if read_manifest(manifest) != metadata:
                raise
            LOGGER.warning("%s: may be as before after a power cut: %s", manifest, error)

    def _switch(self, collection: str, directory: Path, shard: Any) -> None:
        old, before = self._shards[collection], self._directories[collection]
        self._use(collection, directory, shard)
        old.close()
        shutil.rmtree(before, ignore_errors=True)

    def _move(self, name: str, directory: Path) -> Any:
        """The shard of a collection, closed, moved and loaded again, so that it is known to be whole."""
        self._shards.pop(name).close()  # which flushes it
        shutil.rmtree(directory, ignore_errors=True)
        self._directories.pop(name).rename(directory)
        try:
            return self._api.EdgeShard.load(str(directory))
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _tidy(self, collection: str, changes: int) -> None:
        shard = self._shards[collection]
        self._changes[collection] += changes
        changed = self._changes[collection]
        if changed < self._REBUILD_EVERY or not self.is_due("rebuilding"):
            return

        def rebuild() -> None:
            if changed >= 2 * shard.info().points_count:
                self.check_room("rebuild", _bytes_in(self._directories[collection]))
                shard.optimize()
                self._changes[collection] = 0

        self.housekeep("rebuilding", rebuild)

    async def retrieve(
        self, collection: str, ids: Sequence[str], *, payload: bool = True, vector: bool = False
    ) -> list[Record]:
        """See Engine.retrieve."""
        self._opened(collection)
        with backend_errors(self, "retrieve"):
            found = self._shards[collection].retrieve(list(ids), with_payload=payload, with_vector=vector)
        return [Record(record.id, record.payload or {}, 0.0, record.vector or ()) for record in found]

    async def page(
        self,
        collection: str,
        where: Filter,
        *,
        limit: int,
        tenant: str | None = None,
        cursor: Any = None,
        newest_by: str | None = None,
        payload: bool = True,
    ) -> Page:
        """See Engine.page."""
        api, narrowed = self._api, self._filter(self._narrowed(collection, where, tenant))
        with backend_errors(self, "page"):
            records, following = self._shards[collection].scroll(
                api.ScrollRequest(
                    offset=cursor,
                    limit=limit,
                    filter=narrowed,
                    with_payload=payload,
                    order_by=None if newest_by is None else api.OrderBy(newest_by, api.Direction.Desc),
                )
            )
        if newest_by is not None and not payload:  # the order comes with its key: no payload need be read
            return Page([Record(record.id, {newest_by: record.order_value}) for record in records], None)
        return Page([Record(record.id, record.payload or {}) for record in records], following)

    async def search(
        self,
        collection: str,
        vector: Sequence[float],
        where: Filter,
        limit: int,
        *,
        tenant: str | None = None,
        payload: bool = True,
    ) -> list[Record]:
        """See Engine.search."""
        api, narrowed = self._api, self._filter(self._narrowed(collection, where, tenant))
        with backend_errors(self, "search"):
            found = self._shards[collection].query(
                api.QueryRequest(
                    limit=limit,
                    query=api.Query.Nearest(list(vector)),
                    filter=narrowed,
                    with_payload=payload,
                )
            )
        return [Record(record.id, record.payload or {}, record.score) for record in found]

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """See Engine.count."""
        narrowed = self._filter(self._narrowed(collection, where, tenant))
        with backend_errors(self, "count"):
            request = self._api.CountRequest(exact=True, filter=narrowed)
            return cast("int", self._shards[collection].count(request))

    async def close(self) -> None:
        """See Engine.close."""
        failures = list[BaseException]()
        with backend_errors(self, "close"):
            for name, shard in self._shards.items():
                try:
                    self.check_room("close")
                    shard.flush()
                    shard.close()
                except BaseException as error:  # noqa: BLE001 - raised once all are let go of
                    failures.append(error)  # what was acknowledged is in the log
                    abandon_shards([shard], [self._directories[name]])
            self._shards.clear()
            self._directories.clear()
            self._open.clear()
            for failure in failures:
                raise failure

    def abandon(self) -> None:
        """See Files.abandon."""
        abandon_shards(self._shards.values(), self._directories.values())

    def _filter(self, where: Filter) -> Any:
        api = self._api
        return api.Filter(
            must=[*map(self._condition, where.must)], must_not=[*map(self._condition, where.must_not)]
        )

    def _condition(self, condition: Condition) -> Any:
        api = self._api
        match condition:
            case Equal(key, value):
                asked = {"match": api.MatchValue(value)}
            case AnyOf(key, values):
                asked = {"match": api.MatchAny(list(values))}
            case Range(key):
                asked = {"range": api.RangeFloat(**condition.bounds())}
            case Text(key, text):
                asked = {"match": api.MatchText(text)}
            case Absent(key):
                return api.IsEmptyCondition(key=key)
            case Or(()):  # an empty "should" would match everything
                return api.HasIdCondition(set())
            case Or(filters):
                return api.Filter(should=[*map(self._filter, filters)])
        return api.FieldCondition(key=key, **asked)


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.limits
# What one request to a Qdrant server may hold: in bytes, and by the limits of strict mode.
# ------------------------------------------------------------------------------------------------------------


NO_LIMIT = 2**31 - 1


class Limits(NamedTuple):
    """What strict mode allows requests to one collection; without it only the bytes of a request count."""

    page: int = NO_LIMIT  # points in an answer
    points: int = NO_LIMIT  # in one operation that writes or deletes
    listed: int = NO_LIMIT  # values in one condition
    ids: int = NO_LIMIT  # points retrieved by their ids
    exact: bool = True

    @classmethod
    def of(cls, config: Any) -> Limits:
        """Those in the configuration of a collection, as the client gives it."""
        strict = config.strict_mode_config
        if strict is None or not strict.enabled:
            return cls()

        def least(*limits: int | None) -> int:
            return min((max(1, limit) for limit in limits if limit is not None), default=NO_LIMIT)

        return cls(
            page=least(strict.max_query_limit),
            points=least(strict.upsert_max_batchsize, strict.write_rate_limit),
            listed=least(strict.condition_max_size),
            ids=least(strict.read_rate_limit),
            exact=strict.search_allow_exact is not False,
        )


def cut(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut values into pieces of a size."""
    return (values[start : start + size] for start in range(0, len(values), size))


def portions(points: Sequence[Point], most: int, most_bytes: int) -> Iterator[tuple[list[Point], int]]:
    """Cut points into what one operation may hold, with its size in bytes.

    Those of a tenant stay together, unless they alone are more than that.
    """
    portion, taken = list[Point](), 0
    last = {point.id: point for point in points}.values()  # of one id twice
    for _, group in itertools.groupby(sorted(last, key=_tenant_of), _tenant_of):
        sized = [(point, _request_bytes(point)) for point in group]
        whole = len(sized) <= most and sum(size for _, size in sized) <= most_bytes
        for piece in [sized] if whole else [[each] for each in sized]:
            size = sum(size for _, size in piece)
            if portion and (taken + size > most_bytes or len(portion) + len(piece) > most):
                yield portion, taken
                portion, taken = [], 0
            portion += [point for point, _ in piece]
            taken += size
    if portion:
        yield portion, taken


def _tenant_of(point: Point) -> str:
    return point.tenant or ""


def _request_bytes(point: Point) -> int:
    """About how many bytes a point takes in a request, rather too many."""
    return 100 + 24 * len(point.vector) + payload_bytes(point.payload)


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.local
# The engine of qdrant-client's local mode.
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------
# Relied on in qdrant-client beyond its public interface, all of it here; tests/test_canaries.py watches it
# ------------------------------------------------------------------------------


def import_qdrant_local() -> tuple[Any, Callable[[str], Any]]:
    """The models of qdrant-client and a maker of local clients that do not warn of many points."""
    try:
        from qdrant_client import models
        from qdrant_client.local.qdrant_local import QdrantLocal
    except ImportError as error:
        raise MissingDependencyError("this store needs qdrant-client: pip install qdrant-client") from error

    class _Local(QdrantLocal):
        LARGE_DATA_THRESHOLD = sys.maxsize  # nothing but search looks at all points here

    def make(location: str) -> Any:
        try:
            return _Local(location, force_disable_check_same_thread=True)
        except RuntimeError as error:
            if "already accessed" in str(error):
                raise locked_error(location) from error
            raise

    return models, make


def local_files(path: Path, collection: str) -> tuple[Path, Path]:
    """The list of all collections, and where the points of one are."""
    return path / "meta.json", path / "collection" / collection / "storage.sqlite"


def close_local(client: Any) -> None:
    """Close a client; where one of its files cannot be closed, the others are, and its lock is let go of."""
    try:
        client.close()
    except BaseException:
        for collection in client.collections.values():
            with contextlib.suppress(Exception):  # the first failure is raised
                collection.close()
        client.collections.clear()
        client.close()
        raise


def abandon_local(client: Any) -> None:
    """Close the lock file of a client unlocked: unlocking would let others into the parent's directory."""
    client._flock_file.close()


class GroupedConnection(sqlite3.Connection):
    """A connection whose transactions join the one that is open, if there is one.

    qdrant-client commits after each point. Here all points of a write are kept by one commit, or none.
    """

    grouped = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Literal[False]:
        return False if self.grouped else super().__exit__(kind, error, traceback)

    @contextlib.contextmanager
    def group(self) -> Generator[None]:
        """Commit what is done meanwhile at once."""
        self.grouped = True
        try:
            yield
            self.commit()
        except BaseException:
            self.rollback()
            raise
        finally:
            self.grouped = False


class LocalCollection:
    """A collection of local mode: lists of ids and payloads in memory, and SQLite."""

    def __init__(self, client: Any, name: str) -> None:
        self._held = client.collections[name]

    def adopt(self) -> None:
        """Put our own connection in the place of the collection's."""
        self._held.LARGE_DATA_THRESHOLD = sys.maxsize
        persistence = self._held.storage
        persistence.storage.close()
        connection = sqlite3.connect(persistence.location, factory=GroupedConnection, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")  # flush() does what FULL would, for many at once
        persistence.storage = connection

    def persist(self, points: Sequence[Any], deleted: Sequence[str]) -> None:
        """Write to the disk, in one transaction."""
        persistence = self._held.storage
        with persistence.storage.group():
            for point in points:
                persistence.persist(point)
            for point_id in deleted:
                persistence.delete(point_id)

    def take_in(self, points: Sequence[Any], deleted: Sequence[str]) -> None:
        """Take into memory what is on disk now, without writing it there a second time."""
        held = self._held
        persistence, held.storage = held.storage, None
        try:
            if points:
                held.upsert(list(points))
            if deleted:
                held.delete(list(deleted))
        finally:
            held.storage = persistence

    @property
    def slots(self) -> int:
        """How many places there are in memory, those of deleted points included."""
        return len(self._held.ids_inv)

    def count(self) -> int:
        """How many points there are."""
        return len(self._held.ids) - int(self._held.deleted.sum())

    def ids(self) -> list[str]:
        """The ids of all points, in their order."""
        return sorted(str(each) for each, row in self._held.ids.items() if not self._held.deleted[row])

    def payload(self, point_id: str) -> dict[str, Any]:
        """The payload of a point, which is not to be changed."""
        held = self._held
        return cast("dict[str, Any]", held.payload[held.ids[point_id]])

    def scores(self, point_ids: Sequence[str], vector: Sequence[float]) -> Sequence[float]:
        """The cosines of a vector with those of points."""
        import numpy as np

        (matrix,) = self._held.vectors.values()
        rows = matrix[[self._held.ids[point_id] for point_id in point_ids]]
        asked = np.asarray(vector, dtype=np.float32)
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(asked)
        cosines = rows @ asked / np.where(lengths == 0, 1, lengths)
        return cast("Sequence[float]", np.clip(cosines, -1, 1).tolist())

    def close(self) -> None:
        """Close its file."""
        self._held.close()


# ------------------------------------------------------------------------------


_REPLACED_BY = "replaced_by"  # in the metadata of a collection: whose points are to become its own


def _note_replaced(listed: dict[str, Any], collection: str, by: str) -> None:
    entry = copied(listed[by])
    entry["metadata"][_REPLACED_BY] = by
    listed[collection] = entry


class _TenantIds:
    """The ids of a collection's points by their tenants, which local mode would look for one by one."""

    def __init__(self, held: LocalCollection, key: str) -> None:
        self._key = key
        self._tenants: dict[str, str] = {}  # by id
        self._members: dict[str, dict[str, None]] = {}
        self._sorted: dict[str, list[str]] = {}
        for point_id in held.ids():
            self.put(point_id, held.payload(point_id))

    def put(self, point_id: str, payload: Mapping[str, Any]) -> None:
        tenant = payload.get(self._key)
        if self._tenants.get(point_id) != tenant:
            self.remove(point_id)
            if isinstance(tenant, str):
                self._tenants[point_id] = tenant
                self._members.setdefault(tenant, {})[point_id] = None
                self._sorted.pop(tenant, None)

    def remove(self, point_id: str) -> None:
        tenant = self._tenants.pop(point_id, None)
        if tenant is not None:
            del self._members[tenant][point_id]
            self._sorted.pop(tenant, None)
            if not self._members[tenant]:
                del self._members[tenant]

    def of(self, tenant: str) -> list[str]:
        """Those of a tenant, in their order."""
        found = self._sorted.get(tenant)
        if found is None:
            found = self._sorted[tenant] = sorted(self._members.get(tenant, ()))
        return found


class LocalEngine(EngineOnDisk):
    """qdrant-client's local mode, made durable, atomic and quick to write.

    It keeps all points in memory and, pickled, in SQLite.
    """

    name = "local"
    indexed = False
    runs: ExecutionMode = "in thread"
    compact = False
    rounds_floats = False

    most_left_free = 1 << 20  # SQLite takes back what it has no room for; lists are written in place

    _REBUILD_EVERY = 20_000  # deleted points stay in memory until the collection is loaded again

    def __init__(
        self,
        path: Path,
        durability: str,
        reporter: Telemetry | None = None,
        min_free_bytes: int = MIN_FREE_BYTES,
    ) -> None:
        super().__init__(path, min_free_bytes)
        self.reporter = reporter
        models, self._make_client = import_qdrant_local()
        self._models = ClientModels(models)
        self._path = path
        self._power = durability == "power"
        self.writes = 0
        self._removed: dict[str, int] = {}
        self._tenants: dict[str, _TenantIds] = {}  # of the collections that were read by tenant
        self._sorted: dict[str, list[str]] = {}  # ids, for pages of everything, until the next write
        self._connected: Any = None
        self._connect()

    @property
    def _client(self) -> Any:
        """The client, made anew after a failure, or an interrupt, has closed it."""
        if self._connected is None or self._connected.closed:
            self._connect()
        return self._connected

    def _connect(self) -> None:
        with backend_errors(self, f"open {self._path}"):
            self.check_room("open")
            self._mend_list()
            client = self._make_client(str(self._path))
            try:
                for name in self._open:
                    LocalCollection(client, name).adopt()
                    self._removed[name] = 0
                self._connected = client
            except BaseException:
                close_local(client)
                raise

    def _mend_list(self) -> None:
        """Bring to its end what a process was killed at: making the list of collections, or replacing one."""
        names, _ = local_files(self._path, "")
        if names.exists() and names.stat().st_size == 0:
            write_atomically(names, json.dumps({"collections": {}, "aliases": {}}))
        listed: dict[str, Any] = read_manifest(names) if names.exists() else {}
        entries: dict[str, Any] = listed.get("collections", {})
        replacing: dict[str, str] = {
            name: by
            for name, entry in entries.items()
            if (by := cast("Any", entry.get("metadata") or {}).pop(_REPLACED_BY, None)) is not None
        }
        for name, by in replacing.items():
            points, others = (local_files(self._path, each)[1] for each in (name, by))
            if others.exists():
                others.replace(points)
                fsync(points.parent)
        if replacing:
            write_atomically(names, json.dumps(listed))

    async def describe(self, collection: str, metadata: Mapping[str, Any]) -> None:
        """See Files.describe; the list of collections is written with the client closed."""
        self._relist(collection, lambda listed: listed[collection]["metadata"].update(metadata))

    def _relist(self, collection: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the entry of a collection in the list, and open what it says then."""
        names, _ = local_files(self._path, collection)
        with backend_errors(self, "describe"):
            self.check_room("describe")
            listed = read_manifest(names)
            change(listed["collections"])
            self._disconnect()
            try:
                write_atomically(names, json.dumps(listed))
            finally:
                self._sorted.clear()
                self._connect()

    async def open(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """See Engine.open."""
        client = self._client
        with backend_errors(self, f"open {self._path}"):
            if collection.name in self._open:
                metadata = dict(client.get_collection(collection.name).config.metadata or {})
                collection.accept(metadata)
                return metadata
            if not client.collection_exists(collection.name):
                self.check_room("open")  # the list of collections is written in place
                # No payload indexes: local mode has none and warns.
                client.create_collection(
                    collection.name,
                    vectors_config=self._models.vectors(collection.vector_size),
                    metadata=dict(collection.metadata),
                )
                if self._power:
                    self._sync_new(collection.name)
            config = client.get_collection(collection.name).config
            metadata = dict(config.metadata or {})
            collection.accept(metadata)
            LocalCollection(client, collection.name).adopt()
        self._open[collection.name] = Opened(config.params.vectors.size, collection.tenant)
        self._removed[collection.name] = 0
        return metadata

    async def amend(self, collection: CollectionSpec) -> None:
        """See Engine.amend; there are no indexes."""
        self._opened(collection.name)
        with backend_errors(self, "amend"):
            self.check_room("amend")  # the list of collections is written in place
            self._client.update_collection(collection.name, metadata=dict(collection.metadata))
        self.amendments += 1
        self.writes += 1

    async def collections(self) -> Mapping[str, Mapping[str, Any]]:
        """See Engine.collections."""
        client = self._client
        with backend_errors(self, "list"):
            names = [each.name for each in client.get_collections().collections]
            return {name: dict(client.get_collection(name).config.metadata or {}) for name in names}

    def _sync_new(self, name: str) -> None:
        """Make a new collection survive a power cut.

        This comes before it is adopted: closing a file of SQLite's here would end the locks it has on it.
        """
        names, points = local_files(self._path, name)
        directory = points.parent
        fsync(names, *directory.iterdir(), directory, directory.parent, self._path, self._path.parent)

    flush_due = False  # SQLite sees to that

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """See Engine.apply."""
        written, deleted = await self._judge(collection, puts, deletes)
        held, make = (
            LocalCollection(self._client, collection),
            self._models.models.PointStruct.model_construct,
        )
        structs = [make(id=point.id, vector=list(point.vector), payload=point.payload) for point in written]
        self._sorted.pop(collection, None)
        with backend_errors(self, "write"):
            self.check_room_for(written, deleted)
            tenants = self._tenants.pop(collection, None)  # read anew after a failure
            try:
                held.persist(structs, deleted)
                held.take_in(structs, deleted)
                if tenants is not None:
                    for point in written:
                        tenants.put(point.id, point.payload)
                    for point_id in deleted:
                        tenants.remove(point_id)
                    self._tenants[collection] = tenants
            except sqlite3.Error:
                raise  # nothing was written
            except BaseException:
                self._disconnect()  # memory may be behind the disk, after an interrupt too: load it again
                raise
            self._tidy(collection, len(deleted))
        self.writes += 1

    def flush(self) -> None:
        """See Files.flush.

        What has been committed is in SQLite's log, until SQLite has brought it into the file and synced that.
        No lock of SQLite's is on the log, so that it may be opened and closed here.
        """
        with backend_errors(self, "flush"):
            for name in list(self._open):
                with contextlib.suppress(FileNotFoundError):
                    _, points = local_files(self._path, name)
                    fsync(points.with_name(points.name + "-wal"))

    async def drop(self, collection: str) -> None:
        """See Engine.drop."""
        with backend_errors(self, "drop"):
            listed = self._client.collection_exists(collection)
            if listed:
                self.check_room("drop")  # the list of collections is written in place
            self._open.pop(collection, None)
            self._sorted.pop(collection, None)
            self._tenants.pop(collection, None)
            if listed:
                LocalCollection(self._client, collection).close()
            # One that is not listed was being created by a process that was killed.
            if listed or local_files(self._path, collection)[1].parent.exists():
                self._client.delete_collection(collection)

    async def replace(self, collection: str, by: str, *, described: bool = False) -> None:
        """Renaming the file of points is the moment; with ``described`` writing the list of collections is.

        What the list says then is done by whoever opens it next: see _mend_list.
        """
        if described:
            grown, _ = self._open.pop(by), self._open.pop(collection)
            self._open[collection] = grown
            self._relist(collection, lambda listed: _note_replaced(listed, collection, by))
            with contextlib.suppress(BackendError):  # an empty collection: the next opening drops it
                await self.drop(by)
            return
        files = [local_files(self._path, name)[1] for name in (by, collection)]
        with backend_errors(self, "replace"):
            self.check_room("replace")
            self._disconnect()  # which brings the write-ahead logs into the files, and removes them
            for log in (file.with_name(file.name + "-wal") for file in files):
                if log.exists():
                    raise OSError(f"{log} is in use by another program")
            self._sorted.clear()
            files[0].replace(files[1])
            del self._open[by]
            with contextlib.suppress(OSError):  # the one or the other is there, also after a power cut
                fsync(files[1].parent)
        with contextlib.suppress(BackendError):  # else the next use tries to connect again
            await self.drop(by)

    def _tidy(self, collection: str, removed: int) -> None:
        self._removed[collection] += removed
        slots = LocalCollection(self._client, collection).slots
        if self._removed[collection] < max(self._REBUILD_EVERY, slots // 2):
            return

        def reload() -> None:
            self.check_room("rebuild")
            self._disconnect()
            self._connect()

        self.housekeep("rebuilding", reload)

    def _disconnect(self) -> None:
        self._tenants.clear()
        if self._connected is not None:
            try:
                close_local(self._connected)
            finally:
                self._connected = None

    async def retrieve(
        self, collection: str, ids: Sequence[str], *, payload: bool = True, vector: bool = False
    ) -> list[Record]:
        """See Engine.retrieve."""
        self._opened(collection)
        with backend_errors(self, "retrieve"):
            return client_records(
                self._client.retrieve(collection, list(ids), with_payload=payload, with_vectors=vector)
            )

    async def page(
        self,
        collection: str,
        where: Filter,
        *,
        limit: int,
        tenant: str | None = None,
        cursor: Any = None,
        newest_by: str | None = None,
        payload: bool = True,
    ) -> Page:
        """See Engine.page."""
        if tenant is not None:
            self._opened(collection)
            matching = self._matching(collection, tenant, where, cursor or "")
            if newest_by is None:
                return self._tenant_page(collection, matching, limit, payload=payload)
            return self._newest(collection, matching, limit, newest_by, payload=payload)
        narrowed = self._narrowed(collection, where, tenant)
        if newest_by is None and narrowed == Filter():  # which scroll() would sort anew for every page
            held, ids = LocalCollection(self._client, collection), self._sorted.get(collection)
            if ids is None:
                ids = self._sorted[collection] = held.ids()
            start = bisect_left(ids, cursor or "")
            found = ids[start : start + limit + 1]
            records = [Record(each, copied(held.payload(each)) if payload else {}) for each in found[:limit]]
            return Page(records, found[limit] if len(found) > limit else None)
        with backend_errors(self, "page"):
            asked = self._models.page(
                self._models.filter(narrowed), limit, cursor, newest_by, payload=payload
            )
            return client_page(self._client.scroll(collection, **asked))

    def _matching(self, collection: str, tenant: str, where: Filter, least: str = "") -> Iterator[str]:
        """The ids of a tenant's points that match, in their order, from one on."""
        key, held = self._opened(collection).tenant, LocalCollection(self._client, collection)
        if key is None:
            raise ValueError("the collection has no tenants")
        tenants = self._tenants.get(collection)
        if tenants is None:
            tenants = self._tenants[collection] = _TenantIds(held, key)
        ids = tenants.of(tenant)
        for position in range(bisect_left(ids, least), len(ids)):
            if matches(where, held.payload(ids[position])):
                yield ids[position]

    def _tenant_page(self, collection: str, ids: Iterator[str], limit: int, *, payload: bool) -> Page:
        held, found = LocalCollection(self._client, collection), list(itertools.islice(ids, limit + 1))
        following = found.pop() if len(found) > limit else None
        return Page(
            [Record(each, copied(held.payload(each)) if payload else {}) for each in found], following
        )

    def _newest(self, collection: str, ids: Iterator[str], limit: int, key: str, *, payload: bool) -> Page:
        held = LocalCollection(self._client, collection)
        numbers = ((held.payload(each).get(key), each) for each in ids)
        ordered = (found for found in numbers if type(found[0]) in (int, float))
        return Page(
            [
                Record(each, copied(held.payload(each)) if payload else {key: number})
                for number, each in heapq.nlargest(limit, ordered)
            ],
            None,
        )

    async def search(
        self,
        collection: str,
        vector: Sequence[float],
        where: Filter,
        limit: int,
        *,
        tenant: str | None = None,
        payload: bool = True,
    ) -> list[Record]:
        """See Engine.search."""
        narrowed = self._narrowed(collection, where, tenant)
        if tenant is not None:
            held = LocalCollection(self._client, collection)
            ids = list(self._matching(collection, tenant, where))
            scored = zip(held.scores(ids, vector), ids, strict=True) if ids else ()
            return [
                Record(point_id, copied(held.payload(point_id)) if payload else {}, score)
                for score, point_id in heapq.nlargest(limit, scored)
            ]
        with backend_errors(self, "search"):
            arguments = self._models.search(vector, self._models.filter(narrowed), limit, payload=payload)
            return client_records(self._client.query_points(collection, **arguments).points)

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """See Engine.count."""
        narrowed = self._narrowed(collection, where, tenant)
        if tenant is not None:
            return sum(1 for _ in self._matching(collection, tenant, where))
        if narrowed == Filter():
            return LocalCollection(self._client, collection).count()
        with backend_errors(self, "count"):
            counted = self._client.count(collection, count_filter=self._models.filter(narrowed))
            return cast("int", counted.count)

    async def close(self) -> None:
        """See Engine.close."""
        with backend_errors(self, "close"):
            self._disconnect()

    def abandon(self) -> None:
        """See Files.abandon."""
        if self._connected is not None:
            abandon_local(self._connected)


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.embedded
# Which embedded engine a directory belongs to.
# ------------------------------------------------------------------------------------------------------------


def engine_class(path: Path, config: QdrantStoreConfig) -> type[EdgeEngine | LocalEngine]:
    """The engine that wrote a directory, or the one for a new one; its library is there."""
    written = engine_of(path)
    if written is not None and config.engine not in ("auto", written):
        raise SchemaMismatchError(
            f'{path}: written by engine="{written}", not by "{config.engine}"; '
            f'open it with engine="auto", or export it and import that elsewhere'
        )
    engine = written or config.engine
    if engine == "local":
        import_qdrant_local()
        return LocalEngine
    try:
        import_qdrant_edge()
    except MissingDependencyError:
        if engine == "auto":
            with contextlib.suppress(MissingDependencyError):
                import_qdrant_local()
                return LocalEngine
        raise
    return EdgeEngine


def engine_of(path: Path) -> Literal["edge", "local"] | None:
    """The engine whose files a directory holds; None for neither."""
    try:
        edge, local = (path / "collections").exists(), (path / "meta.json").exists()
        shards = (path / "collections").iterdir() if edge else ()
        found = [each for each in shards if each.is_dir() and each.name[0] != "."]
        manifests = {each.with_name(each.name.partition("@")[0] + ".json") for each in found}
        foreign = bool(found) and not any(manifest.exists() for manifest in manifests)  # ours come first
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    if edge and local:
        raise StoreError(f"{path}: holds the files of two engines (collections/ of edge, meta.json of local)")
    if foreign:
        raise StoreError(f"{path}: holds collections of something else, such as a Qdrant server")
    return "edge" if edge else "local" if local else None


def collection_exists(config: QdrantStoreConfig) -> bool:
    """Whether a directory holds the collection, as far as can be seen without opening it."""
    path = absolute_path(cast("str", config.path))
    match engine_of(path):
        case "edge":
            return (path / "collections" / f"{config.collection_name}.json").exists()
        case "local":
            return config.collection_name in read_manifest(path / "meta.json").get("collections", {})
        case None:
            return False


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.memory
# The engine of points in the memory of this process, and the example of an engine.
# ------------------------------------------------------------------------------------------------------------


class _Tenant:
    """The points of a tenant: a search goes over one matrix, a page over ids in their order."""

    def __init__(self, vector_size: int) -> None:
        self.rows: dict[str, int] = {}
        self._vectors: Vectors = make_vectors(vector_size)
        self._ids: list[str | None] = []  # by row
        self._free: list[int] = []  # rows
        self._sorted: list[str] | None = None

    def put(self, point_id: str, vector: Sequence[float]) -> None:
        row = self.rows.get(point_id)
        if row is None:
            row = self.rows[point_id] = self._free.pop() if self._free else len(self._ids)
            self._ids[row : row + 1] = [point_id]
            self._sorted = None
        self._vectors.put(row, _direction(vector))

    def remove(self, point_id: str) -> None:
        row = self.rows.pop(point_id)
        self._ids[row] = self._sorted = None
        self._free.append(row)

    def vector(self, point_id: str) -> list[float]:
        return self._vectors.get(self.rows[point_id])

    def ids_from(self, least: str) -> list[str]:
        if self._sorted is None:
            self._sorted = sorted(self.rows)
        return self._sorted[bisect_left(self._sorted, least) :]

    def nearest(self, direction: Sequence[float], number: int) -> Iterator[tuple[float, str]]:
        """The best scores and the ids that have them, best first: so many at once, then all."""
        scores = self._vectors.scores(direction, len(self._ids))
        done = set[int]()
        for wanted in (number, len(self._ids)):
            for row in self._vectors.best(scores, wanted):
                if row not in done and (point_id := self._ids[row]) is not None:
                    yield min(1.0, max(-1.0, float(scores[row]))), point_id
                done.add(row)


@attrs.define
class _Collection:
    metadata: Mapping[str, Any]
    vector_size: int
    points: dict[str, Point] = attrs.field(init=False, factory=dict[str, Point])
    tenants: dict[str, _Tenant] = attrs.field(init=False, factory=dict[str, _Tenant])
    sorted_tenants: list[str] | None = None


class MemoryEngine(EngineInProcess):
    """Points in dicts, which go with the engine.

    What it is given is copied, and copied again for whoever reads it: neither side sees what the other does.
    """

    name = "memory"
    runs: ExecutionMode = "in place"
    indexed = True  # by tenant; of all tenants every point is looked at, which takes about a microsecond
    compact = False
    rounds_floats = False

    def __init__(self) -> None:
        super().__init__()
        self._collections: dict[str, _Collection] = {}

    async def open(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """See Engine.open."""
        held = self._collections.get(collection.name)
        if held is None:
            held = _Collection(copied(collection.metadata), collection.vector_size)
        collection.accept(held.metadata)
        self._collections[collection.name] = held
        self._open[collection.name] = Opened(held.vector_size, collection.tenant)
        return held.metadata

    async def amend(self, collection: CollectionSpec) -> None:
        """See Engine.amend; there are no indexes."""
        self._opened(collection.name)
        held = self._collections[collection.name]
        held.metadata = {**held.metadata, **copied(collection.metadata)}
        self.amendments += 1

    async def collections(self) -> Mapping[str, Mapping[str, Any]]:
        """See Engine.collections."""
        return {name: held.metadata for name, held in self._collections.items()}

    async def drop(self, collection: str) -> None:
        """See Engine.drop."""
        self._collections.pop(collection, None)
        self._open.pop(collection, None)

    async def retrieve(
        self, collection: str, ids: Sequence[str], *, payload: bool = True, vector: bool = False
    ) -> list[Record]:
        """See Engine.retrieve."""
        self._opened(collection)
        held = self._collections[collection]
        found = [held.points[point_id] for point_id in dict.fromkeys(ids) if point_id in held.points]
        return [
            _record(
                point,
                payload=payload,
                vector=held.tenants[point.tenant or ""].vector(point.id) if vector else (),
            )
            for point in found
        ]

    async def page(
        self,
        collection: str,
        where: Filter,
        *,
        limit: int,
        tenant: str | None = None,
        cursor: Any = None,
        newest_by: str | None = None,
        payload: bool = True,
    ) -> Page:
        """See Engine.page; points come by tenant and id, and the cursor is those of the next."""
        points = self._matching(collection, where, tenant, cursor)
        if newest_by is not None:
            ordered = (point for point in points if type(point.payload.get(newest_by)) in (int, float))
            newest = heapq.nlargest(limit, ordered, key=lambda point: point.payload[newest_by])
            if payload:
                return Page([_record(point) for point in newest], None)
            return Page([Record(point.id, {newest_by: point.payload[newest_by]}) for point in newest], None)
        records: list[Record] = []
        for point in points:
            if len(records) == limit:
                return Page(records, (point.tenant or "", point.id))
            records.append(_record(point, payload=payload))
        return Page(records, None)

    def _matching(
        self, collection: str, where: Filter, tenant: str | None, cursor: tuple[str, str] | None = None
    ) -> Iterator[Point]:
        held, (first, least) = self._held(collection, tenant), cursor or ("", "")
        if tenant is not None:
            names = [tenant]
        else:
            if held.sorted_tenants is None:
                held.sorted_tenants = sorted(held.tenants)
            names = held.sorted_tenants[bisect_left(held.sorted_tenants, first) :]
        for name in names:
            if (group := held.tenants.get(name)) is not None:
                for point_id in group.ids_from(least if name == first else ""):
                    point = held.points[point_id]
                    if matches(where, point.payload):
                        yield point

    def _held(self, collection: str, tenant: str | None) -> _Collection:
        if self._opened(collection).tenant is None and tenant is not None:
            raise ValueError("the collection has no tenants")
        return self._collections[collection]

    async def search(
        self,
        collection: str,
        vector: Sequence[float],
        where: Filter,
        limit: int,
        *,
        tenant: str | None = None,
        payload: bool = True,
    ) -> list[Record]:
        """See Engine.search."""
        held, direction = self._held(collection, tenant), _direction(vector)
        groups: Iterable[_Tenant | None] = (
            held.tenants.values() if tenant is None else [held.tenants.get(tenant)]
        )
        number = limit if where == Filter() else 4 * limit + 64
        nearest = heapq.merge(
            *(group.nearest(direction, number) for group in groups if group is not None),
            key=lambda scored: scored[0],
            reverse=True,
        )
        records: list[Record] = []
        for score, point_id in nearest:
            point = held.points[point_id]
            if matches(where, point.payload):
                records.append(_record(point, payload=payload, score=score))
                if len(records) == limit:
                    break
        return records

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """See Engine.count."""
        return sum(1 for _ in self._matching(collection, where, tenant))

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """See Engine.apply."""
        written, deleted = await self._judge(collection, puts, deletes)
        with backend_errors(self, "write"):
            held = self._collections[collection]
            for point in written:
                before = held.points.get(point.id)
                if before is not None and before.tenant != point.tenant:
                    self._remove(held, before)
                group = held.tenants.get(point.tenant or "")
                if group is None:
                    group = held.tenants[point.tenant or ""] = _Tenant(held.vector_size)
                    held.sorted_tenants = None
                group.put(point.id, point.vector)
                held.points[point.id] = point._replace(vector=(), payload=copied(point.payload))
            for point_id in deleted:
                if point_id in held.points:
                    self._remove(held, held.points[point_id])

    @staticmethod
    def _remove(held: _Collection, point: Point) -> None:
        group = held.tenants[point.tenant or ""]
        group.remove(point.id)
        del held.points[point.id]
        if not group.rows:
            del held.tenants[point.tenant or ""]
            held.sorted_tenants = None

    async def close(self) -> None:
        """See Engine.close; nothing is left."""
        self._collections.clear()
        self._open.clear()


def _record(
    point: Point, score: float = 0.0, *, payload: bool = True, vector: Sequence[float] = ()
) -> Record:
    return Record(point.id, copied(point.payload) if payload else {}, score, vector)


def _direction(vector: Sequence[float]) -> list[float]:
    length = math.hypot(*vector)
    return [value / length for value in vector] if length else list(vector)


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.server_clients
# The clients of a server: one pair for all threads, or one for each event loop.
# ------------------------------------------------------------------------------------------------------------


class Clients(NamedTuple):
    """qdrant-client of one address and, for what that does not offer, plain httpx."""

    qdrant: Any
    plain: Any


class _OfLoop(NamedTuple):
    """The clients of an event loop, one pair for each address; closing ``ending`` closes them."""

    clients: Sequence[Clients]
    ending: AsyncGenerator[None, None] | None = None


def _event_loop() -> object:
    from anyio.lowlevel import current_token

    return current_token()


async def _until_the_end(
    loop: object, clients: Sequence[Clients], of: weakref.ref[ServerClients]
) -> AsyncGenerator[None, None]:
    """Close clients with their event loop, which at its end closes the generators that are left over.

    It also closes one that is collected, as when a store goes without being closed. As the reference is weak,
    this comes before the collection of the sockets, which would warn.
    """
    import anyio

    try:
        yield
    finally:
        if there := of():
            there.of_loops.pop(loop, None)
        with anyio.CancelScope(shield=True):
            for each in clients:
                await each.qdrant.close()
                await each.plain.aclose()


# Relied on in qdrant-client and httpx beyond their public interfaces; tests/test_canaries.py watches it


def tune_client(client: Any, timeout: Any, transport: Any, limits: BlockingLimits | None = None) -> str:
    """Set what no parameter of qdrant-client offers; returns the base url of its requests.

    Its ``timeout`` is one for all phases, and ``transport=`` would turn the proxies of the environment off.
    """
    remote = client._client
    wrapped = remote.openapi_client.client
    http = getattr(wrapped, "_client", None) or wrapped._async_client
    if limits is not None:
        limit_client(http, limits)
    http.timeout, http._transport = timeout, transport
    return cast("str", remote.rest_uri)


# ------------------------------------------------------------------------------


class ServerClients:
    """The clients of a server or of the nodes of a cluster, made when an event loop first needs them.

    A connection of an asynchronous client belongs to the event loop that it was made in: every loop gets
    clients of its own, which are closed with the store, or with the loop.
    """

    KEEP_ALIVE_S = 3.0  # of an idle connection: a server closes it after 5, perhaps just as a request comes

    def __init__(self, config: QdrantStoreConfig, urls: Sequence[str], *, blocking: bool) -> None:
        import ssl

        import httpx

        self._config, self._urls, self._blocking = config, urls, blocking
        headers = {} if config.api_key is None else {"api-key": config.api_key}  # as api_key= it would warn
        verify = config.verify
        trusted = (
            ssl.create_default_context(cafile=verify)
            if isinstance(verify, str)
            else httpx.create_ssl_context(verify)
        )
        limits = self._pool_limits(config.pool_size)
        self._shared: dict[str, Any] = {"headers": headers, "limits": limits, "verify": trusted}
        self.limits = BlockingLimits() if blocking else SuspendingLimits()
        clients = self._make()  # the first take 0.1 s, for which no event loop is to be held up
        self._prepared = [clients]
        self.of_loops: dict[object, _OfLoop] = {None: _OfLoop(clients)} if blocking else {}

    def timeout(self, seconds: float) -> Any:
        """The timeouts of a request that may take so long."""
        import httpx

        return httpx.Timeout(seconds, connect=self._config.connect_timeout)

    def _make(self) -> list[Clients]:
        import httpx

        try:
            return [self._make_for(url, import_qdrant_client(), httpx) for url in self._urls]
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            if isinstance(error, StoreError):
                raise
            raise environment_error(error) from error

    def _make_for(self, url: str, package: Any, httpx: Any) -> Clients:
        config, blocking = self._config, self._blocking
        kind = package.QdrantClient if blocking else package.AsyncQdrantClient
        timeout = self.timeout(config.request_timeout)
        limits = self.limits if isinstance(self.limits, BlockingLimits) else None
        pools = ConnectionPools(self._make_pool, config.pool_size, limits)
        client = kind(url=url, check_compatibility=False, cookies=cookie_jar(), **self._shared)
        base_url = tune_client(client, timeout, pools, limits)
        plain = (httpx.Client if blocking else httpx.AsyncClient)(
            base_url=base_url, timeout=timeout, cookies=cookie_jar(), **self._shared
        )
        if limits is None:
            return Clients(client, plain)
        limit_client(plain, limits)
        return Clients(BlockingClient(client), BlockingClient(plain))

    def _pool_limits(self, connections: int) -> Any:
        import httpx

        return httpx.Limits(
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=self.KEEP_ALIVE_S,
        )

    def _make_pool(self, connections: int) -> Any:
        import httpx

        options: dict[str, Any] = {"verify": self._shared["verify"], "limits": self._pool_limits(connections)}
        if isinstance(self.limits, BlockingLimits):
            return limit_transport(httpx.HTTPTransport(**options), self.limits)
        return httpx.AsyncHTTPTransport(**options)

    def at(self, number: int) -> Clients:
        """The clients of an address, for this event loop."""
        loop = None if self._blocking else _event_loop()
        return (self.of_loops.get(loop) or self._adopt(loop)).clients[number]

    def _adopt(self, loop: object) -> _OfLoop:
        try:
            clients = self._prepared.pop()
        except IndexError:
            clients = self._make()
        ending = _until_the_end(loop, clients, weakref.ref(self))
        run(cast("Any", anext(ending)))
        adopted = self.of_loops[loop] = _OfLoop(clients, ending)
        return adopted

    async def close(self) -> None:
        """Close the clients of this event loop, or of all threads."""
        found = self.of_loops.get(None if self._blocking else _event_loop())
        if found is None:
            return
        if found.ending is not None:
            await found.ending.aclose()
            return
        for each in found.clients:
            await each.qdrant.close()
            await each.plain.close()


# ------------------------------------------------------------------------------------------------------------
# attuned.engines.server
# The engine of a Qdrant server or cluster.
# ------------------------------------------------------------------------------------------------------------


_REPORTED_AS = {"scroll": "page", "query_points": "search", "facet": "count"}  # as they are reported


class _OpenCollection(NamedTuple):
    """What is known of a collection that is open."""

    tenant: str | None  # the key that holds it
    is_spread: bool  # over several shards
    limits: Limits


def _replicas(cluster: Any) -> list[tuple[int, int, str]]:
    """The replicas of a collection by shard, peer and state, as the node that was asked sees them."""
    here = [{"peer_id": cluster.get("peer_id"), **each} for each in cluster.get("local_shards", ())]
    found = [*here, *cluster.get("remote_shards", ())]
    return sorted((each["shard_id"], each["peer_id"], str(each["state"])) for each in found)


class ServerEngine:
    """A Qdrant server or cluster over REST: qdrant-client, blocking or asynchronous, behind one form."""

    name = "server"
    indexed = True
    compact = False
    rounds_floats = True
    shared = True
    PAGE = 10_000  # points on a page that are only counted
    REQUEST_BYTES = 16 << 20  # of a request; a server refuses those above 32 MiB

    def __init__(self, config: QdrantStoreConfig, waits: Waits) -> None:
        self._models = ClientModels(import_qdrant_client().models)
        self.amendments = 0
        self.runs: ExecutionMode = "in place" if waits.blocking else "on loop"
        self._waits = waits
        self._config = config
        self._opened: dict[str, _OpenCollection] = {}
        self._url = cast("str", config.url)
        self._blocking = waits.blocking
        self._read_options = {"consistency": config.read_consistency}
        self._write_options = {"ordering": config.write_ordering, "wait": True}
        urls = self._url.split(",")
        self.errors = ServerErrors(self._url, config.api_key)
        self._clients = ServerClients(config, urls, blocking=waits.blocking)
        self._limits = self._clients.limits
        self.reporter = REPORTING.reporter(wanted=config.telemetry)
        self.resilience = Resilience(config, waits.sleep, nodes=len(urls))
        self._full_disk = ""  # what the last write met
        self._once = Once(waits)

    @property
    def _client(self) -> Any:
        return self._clients.at(self.resilience.node).qdrant

    @property
    def _raw(self) -> Any:
        return self._clients.at(self.resilience.node).plain

    async def _send(
        self,
        operation: str,
        request: Callable[[], Awaitable[Any]],
        *,
        writes: bool = False,
        seconds: float | None = None,
    ) -> Any:
        """The answer to a request, sent as often as it takes.

        Each try may take ``seconds``, whatever the deadline of all is, or else the time of a whole answer.
        """

        async def attempt(left: float, request: Callable[[], Awaitable[Any]]) -> Any:
            allowed = min(left, self._config.request_timeout) if seconds is None else seconds
            return await self._attempt(operation, allowed, request)

        return await self.resilience.send(operation, request, attempt, writes=writes)

    async def _attempt(self, operation: str, seconds: float, request: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._limits.within(seconds, request)
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001 - it is raised as one of ours
            raise self.errors.failure(error, operation) from self.errors.cause(error)

    async def open(self, collection: CollectionSpec) -> Mapping[str, Any]:
        """See Engine.open."""
        await self._check_version()
        info = await self._describe(collection.name)
        if info is None:
            await self._create(collection)
            info = await self._describe(collection.name)
        if info is None:
            raise BackendError(
                f"{self._url}: collection {collection.name!r} vanished while it was being opened",
                backend=self.name,
                operation="open",
                retryable=True,
            )
        metadata = dict(info.config.metadata or {})
        collection.accept(metadata)
        vectors = info.config.params.vectors
        found = getattr(vectors, "size", None), getattr(vectors, "distance", None)
        wanted = metadata.get("vector_size", collection.vector_size)
        if found != (wanted, self._models.models.Distance.COSINE):
            raise SchemaMismatchError(
                f"{self._url}: collection {collection.name!r} has {found[0]} dimensions, {found[1]}; "
                f"{wanted} and Cosine are needed"
            )
        await self._create_indexes(collection, info.payload_schema)
        is_spread = (info.config.params.shard_number or 1) > 1
        limits = Limits.of(info.config)
        self._opened[collection.name] = _OpenCollection(collection.tenant, is_spread, limits)
        return metadata

    async def amend(self, collection: CollectionSpec) -> None:
        """See Engine.amend."""
        info, metadata = await self._describe(collection.name), dict(collection.metadata)
        if info is None:
            raise not_open(self.name, collection.name)
        await self._create_indexes(collection, info.payload_schema)
        await self._send(
            "amend",
            lambda: self._client.update_collection(collection.name, metadata=metadata),
            writes=True,
        )
        self.amendments += 1

    async def collections(self) -> Mapping[str, Mapping[str, Any]]:
        """See Engine.collections; each is asked for its metadata, and left out where it goes meanwhile."""
        listed = (await self._send("list", self._client.get_collections)).collections
        found = {each.name: await self._describe(each.name) for each in listed}
        return {name: dict(info.config.metadata or {}) for name, info in found.items() if info is not None}

    async def drop(self, collection: str) -> None:
        """See Engine.drop."""
        self._opened.pop(collection, None)
        await self._send("drop", lambda: self._client.delete_collection(collection), writes=True)

    async def _check_version(self) -> None:
        version = (await self._send("info", self._client.info)).version
        numbers = tuple(int(part[:9]) for part in re.findall(r"[0-9]+", version)[:2])
        if numbers < MIN_SERVER_VERSION:
            found, least = self.errors.said(version), ".".join(map(str, MIN_SERVER_VERSION))
            raise UnsupportedServerError(f"{self._url}: Qdrant {found}; {least} or newer is needed")

    async def _describe(self, name: str) -> Any:
        try:
            return await self._send("describe", lambda: self._client.get_collection(name))
        except BackendRejectedError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    async def _create(self, collection: CollectionSpec) -> None:
        config = self._config
        try:
            await self._send(
                "create",
                lambda: self._client.create_collection(
                    collection.name,
                    vectors_config=self._models.vectors(collection.vector_size),
                    shard_number=config.shard_number,
                    replication_factor=config.replication_factor,
                    write_consistency_factor=config.write_consistency_factor,
                    metadata=dict(collection.metadata),
                ),
            )
        except BackendRejectedError as error:
            if error.status != HTTPStatus.CONFLICT:  # another one was faster
                raise

    async def _create_indexes(self, collection: CollectionSpec, there: Mapping[str, Any]) -> None:
        """Make the indexes that are missing; one of another kind would fail what relies on it."""
        models, name = self._models.models, collection.name
        schemas = {key: models.PayloadSchemaType(kind) for key, kind in collection.indexes.items()}
        if collection.tenant is not None:
            schemas[collection.tenant] = models.KeywordIndexParams(type="keyword", is_tenant=True)
        kinds = {**collection.indexes, **({collection.tenant: "keyword"} if collection.tenant else {})}
        for key, kind in kinds.items():
            if key in there and there[key].data_type != kind:
                raise SchemaMismatchError(
                    f"{self._url}: collection {name!r} has an index of {there[key].data_type} on {key!r}, "
                    f"{kind} is needed: delete that index, the right one is made then"
                )
        for key in [key for key in schemas if key not in there]:
            index = {"field_name": key, "field_schema": schemas[key]}
            make = functools.partial(self._client.create_payload_index, name, **index, wait=True)
            try:
                await self._update("index", make, writes=False)
            except BackendRejectedError as error:
                if error.status != HTTPStatus.FORBIDDEN:
                    raise
                LOGGER.info("collection %s lacks an index of %s, and may not get it: %s", name, key, error)

    async def apply(
        self, collection: str, puts: Sequence[Put] = (), deletes: Sequence[str] | Matching = ()
    ) -> None:
        """See Engine.apply; several steps are one request too, in which they come one after another."""
        key, models = self._key_of(collection), self._models.models
        limits = self._limits_of(collection)
        requests = list(self._requests(puts, key, limits))
        if isinstance(deletes, Matching):
            narrowed = within(deletes.where, key, deletes.tenant)
            selectors: list[Any] = [
                models.FilterSelector(filter=self._models.filter(narrowed, limits.listed))
            ]
        else:
            selectors = [models.PointIdsList(points=list(ids)) for ids in cut(deletes, limits.points)]
        steps = [models.DeleteOperation(delete=selector) for selector in selectors]
        if requests and limits.points == NO_LIMIT:
            requests[-1] += steps
        else:
            requests += [[step] for step in steps]
        for number, steps in enumerate(requests):
            try:
                await self._send_steps(collection, steps)
            except BackendError as error:
                error.ambiguous = error.ambiguous or number > 0  # some of it has been written
                raise

    async def _send_steps(self, collection: str, steps: Sequence[Any]) -> None:
        """Send the steps of one request; a single one has a request of its own kind."""
        models, options = self._models.models, self._write_options
        written = isinstance(steps[0], models.UpsertOperation)

        def send() -> Awaitable[Any]:
            if len(steps) > 1:
                return cast("Awaitable[Any]", self._client.batch_update_points(collection, steps, **options))
            if not written:
                return cast("Awaitable[Any]", self._client.delete(collection, steps[0].delete, **options))
            upsert = steps[0].upsert
            asked = {name: getattr(upsert, name) for name in ("points", "update_filter", "update_mode")}
            return cast("Awaitable[Any]", self._client.upsert(collection, **asked, **options))

        await self._update("upsert" if written else "delete", send)

    def _requests(self, puts: Sequence[Put], key: str | None, limits: Limits) -> Iterator[list[Any]]:
        """The steps of puts, request by request: as many as fit into one."""
        steps, taken = list[Any](), 0
        for put in puts:
            for portion, size in portions(put.points, limits.points, self.REQUEST_BYTES):
                if steps and (taken + size > self.REQUEST_BYTES or limits.points < NO_LIMIT):
                    yield steps
                    steps, taken = [], 0
                written = [with_tenant(point, key) for point in portion]
                steps.append(self._models.models.UpsertOperation(upsert=self._upsert(put, written)))
                taken += size
        if steps:
            yield steps

    async def _update(
        self, operation: str, request: Callable[[], Awaitable[Any]], *, writes: bool = True
    ) -> None:
        """Send what changes points; only what the server says to be completed has been done."""

        async def update() -> None:
            answer = await request()
            results = cast("Any", answer if isinstance(answer, list) else [answer])
            for result in results:
                if result.status != self._models.models.UpdateStatus.COMPLETED:
                    raise self.errors.unfinished(result.status, operation)

        try:
            await self._send(operation, update, writes=writes)
        except BackendError as error:
            self._full_disk = str(error) if FULL_DISK in str(error) else self._full_disk
            raise
        self._full_disk = ""

    def signs(self) -> list[str]:
        """What is known of trouble that no look at the server tells: that its disk was full just now."""
        return [self._full_disk] if self._full_disk else []

    def _upsert(self, put: Put, points: Sequence[Point]) -> Any:
        models = self._models.models
        return models.PointsList(
            points=[
                models.PointStruct(id=point.id, vector=list(point.vector), payload=point.payload)
                for point in points
            ],
            update_filter=self._guard(put, points) if put.over or put.newest_by else None,
            update_mode=None if put.mode == "upsert" else models.UpdateMode(f"{put.mode}_only"),
        )

    def _guard(self, put: Put, points: Sequence[Point]) -> Any:
        """The filter that says which points may be replaced; where that differs, for each by its id."""
        models, guard = self._models.models, self._models.filter(put.over or Filter())
        if put.newest_by is None:
            return guard
        ids = defaultdict[float, list[str]](list)
        for point in points:
            ids[point.payload[put.newest_by]].append(point.id)
        for number, chosen in ids.items():
            older = models.FieldCondition(key=put.newest_by, range=models.Range(lte=number))
            if len(ids) == 1:
                guard.must.append(older)
            else:
                branch = models.Filter(must=[models.HasIdCondition(has_id=chosen), older])
                guard.should = [*(guard.should or ()), branch]
        return guard

    def _key_of(self, collection: str) -> str | None:
        try:
            return self._opened[collection].tenant
        except KeyError:
            raise not_open(self.name, collection) from None

    def _narrowed(self, collection: str, where: Filter, tenant: str | None) -> Any:
        """A filter of one tenant's points; those of all may be asked for of what is not open here too."""
        within_tenant = where if tenant is None else within(where, self._key_of(collection), tenant)
        return self._models.filter(within_tenant, self._limits_of(collection).listed)

    def _limits_of(self, collection: str) -> Limits:
        return self._opened[collection].limits if collection in self._opened else Limits()

    async def _ask_client(self, method: str, collection: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the client that reads from a collection."""

        def ask() -> Awaitable[Any]:
            return cast("Awaitable[Any]", getattr(self._client, method)(collection, *arguments, **options))

        return await self._send(_REPORTED_AS.get(method, method), ask)

    async def mark(self, collection: str, key: str, value: str | None) -> None:
        """See Marks.mark."""
        await self._send(
            "mark", lambda: self._client.update_collection(collection, metadata={key: value}), writes=True
        )

    async def mark_of(self, collection: str, key: str) -> str | None:
        """See Marks.mark_of."""
        info = await self._describe(collection)
        metadata: Any = info and info.config.metadata
        return cast("str | None", metadata and metadata.get(key))

    async def finish(self, last: Awaitable[object]) -> None:
        """See NativeSnapshots.finish."""
        await self._waits.shielded(last)

    async def retrieve(
        self, collection: str, ids: Sequence[str], *, payload: bool = True, vector: bool = False
    ) -> list[Record]:
        """See Engine.retrieve."""
        asked = {"with_payload": payload, "with_vectors": vector, **self._read_options}
        found = list[Record]()
        for some in cut(ids, self._limits_of(collection).ids):
            found += client_records(await self._ask_client("retrieve", collection, list(some), **asked))
        return found

    async def page(
        self,
        collection: str,
        where: Filter,
        *,
        limit: int,
        tenant: str | None = None,
        cursor: Any = None,
        newest_by: str | None = None,
        payload: bool = True,
    ) -> Page:
        """See Engine.page."""
        narrowed = self._narrowed(collection, where, tenant)
        asked = self._models.page(narrowed, limit, cursor, newest_by, payload=payload) | self._read_options
        most = self._limits_of(collection).page
        if newest_by is None or limit <= most:
            asked["limit"] = min(limit, most)
            return client_page(await self._ask_client("scroll", collection, **asked))
        asked |= {"limit": most, "order_by": None}  # an order has no further pages: all are read, and ordered
        found = list[Record]()
        while True:
            page = client_page(await self._ask_client("scroll", collection, **asked))
            found += (each for each in page.records if type(each.payload.get(newest_by)) in (int, float))
            if page.cursor is None:
                found.sort(key=lambda record: record.payload[newest_by], reverse=True)
                return Page(found[:limit], None)
            asked["offset"] = page.cursor

    async def search(
        self,
        collection: str,
        vector: Sequence[float],
        where: Filter,
        limit: int,
        *,
        tenant: str | None = None,
        payload: bool = True,
    ) -> list[Record]:
        """See Engine.search."""
        narrowed, limits = self._narrowed(collection, where, tenant), self._limits_of(collection)
        asked = self._models.search(vector, narrowed, limit, payload=payload) | self._read_options
        models = self._models.models
        if self._config.exact_search and limits.exact:
            asked["search_params"] = models.SearchParams(exact=True)
        found = list[Record]()
        while len(found) < limit:
            wanted = min(limit - len(found), limits.page)
            asked["limit"] = wanted
            points = (await self._ask_client("query_points", collection, **asked)).points
            found += client_records(points)
            if len(points) < wanted:
                break
            # Further ones are those without these: an offset would miss some, as equal scores have no order.
            ids = [point.id for point in points]
            narrowed.must_not += [
                models.HasIdCondition(has_id=list(some)) for some in cut(ids, limits.listed)
            ]
        return found

    async def count(self, collection: str, where: Filter, *, tenant: str | None = None) -> int:
        """See Engine.count."""
        narrowed = self._narrowed(collection, where, tenant)
        if self._limits_of(collection).exact:
            return cast("int", (await self._ask_client("count", collection, narrowed, exact=True)).count)
        return (await self._count_pages(collection, narrowed, None)).total()

    async def _count_pages(self, collection: str, narrowed: Any, key: str | None) -> Counter[Any]:
        """Count by the value of a key, page by page, where strict mode forbids exact counts."""
        counts, cursor = Counter[Any](), None
        while True:
            asked = {"scroll_filter": narrowed, "limit": min(self.PAGE, self._limits_of(collection).page)}
            asked |= {"offset": cursor, "with_payload": [key] if key else False, **self._read_options}
            records, cursor = await self._ask_client("scroll", collection, **asked)
            counts.update(record.payload.get(key) if key else None for record in records)
            if cursor is None:
                return counts

    async def count_by(
        self, collection: str, key: str, values: Sequence[str], where: Filter
    ) -> Mapping[str, int]:
        """See Engine.count_by; in one request, where strict mode allows that."""
        limits, counts = self._limits_of(collection), dict[str, int]()
        for some in cut(values, min(limits.listed, limits.page)):
            narrowed = self._models.filter(where._replace(must=(AnyOf(key, some), *where.must)))
            if limits.exact:
                asked = {"facet_filter": narrowed, "limit": len(some), "exact": True, **self._read_options}
                hits = (await self._ask_client("facet", collection, key, **asked)).hits
                counts |= {hit.value: hit.count for hit in hits if hit.value in some}
            else:
                found = await self._count_pages(collection, narrowed, key)
                counts |= {value: found[value] for value in some}
        return counts

    async def status(self, collection: str, where: Filter, seconds: float) -> CollectionStatus:
        """See Engine.status; without retry and breaker, but of the next node where one cannot be reached."""
        deadline, nodes = time.monotonic() + seconds, self.resilience.nodes()
        with report_request(self.reporter, "server", "health"):
            for left, node in zip(range(len(nodes), 0, -1), nodes, strict=True):
                self.resilience.choose(node)
                now = time.monotonic()
                try:
                    return await self._status(collection, where, now + (deadline - now) / left)
                except (BackendUnavailableError, BackendTimeoutError):
                    if left == 1:
                        raise
        raise AssertionError("unreachable")  # pragma: no cover - there is a node

    async def _status(self, collection: str, where: Filter, deadline: float) -> CollectionStatus:
        place = f"collections/{urlquote(collection, safe='')}"
        try:
            version = self.errors.said((await self._ask("GET", "", deadline))["version"])
            described = await self._ask("GET", place, deadline, absent_ok=True)
            if not described:
                return CollectionStatus(None, version=version)
            strict: Any = cast("Any", described)["result"]["config"].get("strict_mode_config") or {}
            exact = not strict.get("enabled") or strict.get("search_allow_exact") is not False
            counting = {"filter": self._models.filter(where).model_dump(exclude_none=True), "exact": exact}
            counted = await self._ask("POST", f"{place}/points/count", deadline, json=counting)
            shards = await self._ask("GET", f"{place}/cluster", deadline, absent_ok=True)
            details, matching = dict(described["result"]), int(counted["result"]["count"])
            details["status"] = self.errors.said(details.get("status"))
            details["replicas"] = _replicas(shards.get("result") or {})
            return CollectionStatus(int(details.get("points_count", 0)), matching, version, details)
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise self.errors.failure(error, "health") from self.errors.cause(error)

    async def _ask(
        self, method: str, path: str, deadline: float, *, absent_ok: bool = False, **options: Any
    ) -> dict[str, Any]:
        """One plain request, for what may not wait."""
        seconds = max(0.001, deadline - time.monotonic())

        async def ask() -> Any:
            return await self._raw.request(method, f"/{path}", timeout=seconds, **options)

        answer = await self._attempt("health", seconds, ask)
        if answer.status_code == HTTPStatus.NOT_FOUND and absent_ok:
            return {}
        self._check_answer("health", answer, answer.content)
        found = json.loads(answer.content)
        if not isinstance(found, dict):
            raise TypeError("it is not a JSON object")
        return cast("dict[str, Any]", found)

    async def once(self, work: Callable[[], Awaitable[object]]) -> None:
        """See SharedEngine.once."""
        await self._once.do(work)

    def is_spread(self, collection: str) -> bool:
        """See SharedEngine.is_spread; with a read consistency several replicas are asked."""
        opened = self._opened[collection]
        is_parted = opened.is_spread or opened.limits.page < NO_LIMIT
        return is_parted or self._config.read_consistency is not None

    async def resolve(self, collection: str) -> str:
        """See NativeSnapshots.resolve."""
        aliases = (await self._send("aliases", self._client.get_aliases)).aliases
        return next((each.collection_name for each in aliases if each.alias_name == collection), collection)

    async def is_whole(self, collection: str) -> bool:
        """See NativeSnapshots.is_whole."""
        shards = await self._send("cluster", lambda: self._client.collection_cluster_info(collection))
        here = {shard.shard_id for shard in shards.local_shards if shard.state == "Active"}
        return here.issuperset(shard.shard_id for shard in shards.remote_shards)

    async def create_snapshot(self, collection: str) -> RemoteSnapshot:
        """Asked once where the answer does not come: the server is making one already."""
        path = snapshots_path(collection)
        answer = await self._long_request("snapshot", "POST", path)
        try:
            offered: dict[str, Any] = answer["result"]
            name, size, checksum = offered["name"], offered["size"], offered.get("checksum")
        except (KeyError, TypeError, AttributeError) as error:
            raise SnapshotError(f"{self._url}: the server does not say which snapshot it has made") from error
        if not is_file_name(name) or not isinstance(size, int):
            raise SnapshotError(f"{self._url}: the server names its snapshot {brief(name)}, which is no name")
        return RemoteSnapshot(
            name, size, self.errors.said(checksum).lower() if isinstance(checksum, str) else None
        )

    async def _long_request(
        self, operation: str, method: str, path: str, *, upload: Path | None = None, **options: Any
    ) -> Any:
        """A request that is not sent again when the time is up, as what it asks for may go on."""
        allowed = self._config.snapshot_timeout

        async def ask() -> Any:
            with contextlib.ExitStack() as files:
                if upload is not None:
                    file = files.enter_context(upload.open("rb"))
                    options["files"] = {"snapshot": ("snapshot", file, "application/octet-stream")}
                    self._limits.extend(allowed + os.fstat(file.fileno()).st_size / LeastSpeed.BYTES)
                answer = await self._raw.request(
                    method, path, timeout=self._clients.timeout(allowed), **options
                )
            self._check_answer(operation, answer, answer.content)
            return answer.json()

        async def attempt(_left: float, request: Callable[[], Awaitable[Any]]) -> Any:
            try:
                return await self._attempt(operation, allowed, request)
            except BackendTimeoutError as error:
                error.retryable = error.status is not None  # a gateway has answered
                raise

        return await self.resilience.send(operation, ask, attempt, writes=upload is not None)

    async def download_snapshot(self, collection: str, name: str, taking: NativeSnapshotWriter) -> None:
        """See NativeSnapshots.download_snapshot; it may take any time, but not go slower than LeastSpeed."""
        path = f"{snapshots_path(collection)}/{urlquote(name, safe='')}"
        pour = download_blocking if self._blocking else download_awaiting
        check = functools.partial(self._check_answer, "download")
        seconds = self._config.request_timeout

        async def download() -> None:
            taking.begin()
            speed = LeastSpeed(seconds, self._limits.extend)

            def take(piece: bytes) -> None:
                speed.add(len(piece))
                taking.add(piece)

            await pour(self._raw, path, check, take)

        await self._send("download", download, seconds=seconds)

    async def delete_snapshot(self, collection: str, name: str) -> None:
        """See NativeSnapshots.delete_snapshot."""
        path = f"{snapshots_path(collection)}/{urlquote(name, safe='')}"
        await self._long_request("delete", "DELETE", path)

    async def upload_snapshot(self, collection: str, path: Path, sha256: str) -> None:
        """See NativeSnapshots.upload_snapshot."""
        query = {"priority": "snapshot", "wait": "true", "checksum": sha256}
        place = f"{snapshots_path(collection)}/upload"
        await self._long_request("restore", "POST", place, upload=path, params=query)

    async def apart(self, call: Callable[[], T]) -> T:
        """See NativeSnapshots.apart."""
        return await self._waits.call(call)

    def _check_answer(self, operation: str, answer: Any, body: bytes) -> None:
        if not answer.is_success:
            raise self.errors.answer(answer.status_code, body, answer.headers, operation)

    async def close(self) -> None:
        """See Engine.close."""
        self.resilience.close()
        with backend_errors(self, "close"):
            await self._clients.close()


# ------------------------------------------------------------------------------------------------------------
# attuned.states
# States of users: what a database does for them, and the operations of stores.
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# attuned.states.contract
# The upper waist: what a database does for the states of users, and what it is asked.
#
# ``Backend`` is what a new database implements, natively and best: the operations in states/operations.py and
# the stores over them need no more. ``Place`` is where a backend is, and how an operation gets there: through
# the lock of a directory, over a connection, or not at all. To write a backend, begin with MemoryBackend.
# ------------------------------------------------------------------------------------------------------------


BATCH_SIZE = 64  # snapshots or users in one step of a long operation: about 5 ms on the slowest engine

Cursor = Any  # where the next page begins: known to the backend alone; None begins


class StatesPage(NamedTuple):
    """All states of some users, each user's together, oldest first, and where the next page begins."""

    states: Sequence[StateSnapshot]
    cursor: Cursor = None
    unsettled: Sequence[str] = ()  # the users whose states may be of several moments


@attrs.frozen
class Retention:
    """How much history is kept and shown."""

    maximum: int
    days: float | None

    @classmethod
    def of(cls, config: MemoryStoreConfig) -> Retention:
        """That of a configuration."""
        return cls(config.max_history_per_user if config.enable_history else 0, config.history_retention_days)

    def cutoff(self) -> int:
        """The oldest time, in ms, that history still shows."""
        return 0 if self.days is None else max(0, math.ceil(wall_clock.now_ms() - self.days * MS_PER_DAY))

    def hidden(self, times: Sequence[int]) -> int:
        """How many of these ascending times history does not show: the first so many."""
        by_number = len(times) - min(self.maximum, len(times))
        return by_number if self.days is None else max(by_number, bisect_left(times, self.cutoff()))

    def removable(self, times: Sequence[int]) -> int:
        """How many may be removed: those hidden, but the newest stays while there is history at all."""
        return self.hidden(times) if self.maximum == 0 else min(self.hidden(times), max(0, len(times) - 1))


class HistoryWindow(NamedTuple):
    """What get_history was asked for: times in ms, inclusive."""

    limit: int
    since: int
    until: int

    @classmethod
    def of(cls, limit: int, since: int | datetime | None, until: int | datetime | None) -> HistoryWindow:
        """Check what a caller gave."""
        return cls(
            check_integer("limit", limit, 0, MAX_INTEGER),
            0 if since is None else check_time_ms(since, "since"),
            MAX_TIME_MS if until is None else check_time_ms(until, "until"),
        )


@attrs.frozen(kw_only=True)
class SearchRequest:
    """What search_similar was asked for."""

    axes: Axes
    limit: int
    score_threshold: float
    user_id: str | None
    exclude_user_id: str | None
    source: Source | None
    min_confidence: float | None
    since: int | None
    until: int | None
    history: bool

    @classmethod
    def of(
        cls,
        query: StateSnapshot | Mapping[str, float],
        *,
        limit: int,
        score_threshold: float | None,
        user_id: str | None,
        exclude_user_id: str | None,
        source: Source | str | None,
        min_confidence: float | None,
        since: int | datetime | None,
        until: int | datetime | None,
        history: bool,
    ) -> SearchRequest:
        """Check what a caller gave."""
        return cls(
            axes=query.axes if isinstance(query, StateSnapshot) else Axes(query),
            limit=check_integer("limit", limit, 1, MAX_INTEGER),
            score_threshold=-math.inf
            if score_threshold is None
            else check_number("score_threshold", score_threshold),
            user_id=None if user_id is None else check_user_id(user_id),
            exclude_user_id=None if exclude_user_id in (None, "") else check_user_id(exclude_user_id),
            source=None if source is None else check_source(source),
            min_confidence=None if min_confidence is None else check_unit("min_confidence", min_confidence),
            since=None if since is None else check_time_ms(since, "since"),
            until=None if until is None else check_time_ms(until, "until"),
            history=check_flag("history", history),
        )

    def admits(self, snapshot: StateSnapshot) -> bool:
        """Whether a snapshot passes the filters."""
        return (
            (self.user_id is None or snapshot.user_id == self.user_id)
            and snapshot.user_id != self.exclude_user_id
            and (self.source is None or snapshot.source is self.source)
            and (self.min_confidence is None or snapshot.confidence >= self.min_confidence)
            and (self.since is None or snapshot.updated_at_unix_ms >= self.since)
            and (self.until is None or snapshot.updated_at_unix_ms <= self.until)
        )


class Backend(Protocol):
    """A database of users and their states.

    ``name`` is that of the engine; ``batch_size`` how many snapshots or users one step of a long operation
    takes; ``schema`` the axes, known once it ``is_open``. ``native_snapshots``: it takes snapshots of its
    own, and is changed in place by a restore. A method that a user's id or a snapshot is given gets it
    checked.
    """

    name: str
    batch_size: int
    is_open: bool
    schema: Schema
    native_snapshots: bool

    async def open(self) -> None:
        """Make ready what is needed, such as tables or a collection; harmless when repeated."""
        ...

    def begin(self, operation: Callable[[Any], Coroutine[Any, Any, T]]) -> Coroutine[Any, Any, T]:
        """The coroutine of an operation on this backend; one that opens itself on first use does so there."""
        ...

    def cached(self, user_id: str) -> StateSnapshot | None:
        """The latest snapshot where memory has it. Safe without a lock: it only looks."""
        ...

    async def find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        """The latest snapshots of those of these users who have one, in this order."""
        ...

    async def history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        """What the history of a user shows within a window, newest first."""
        ...

    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """Write each as if it came alone, in this order: the newest time of a user wins."""
        ...

    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        """Write a snapshot if ``expected`` is the latest, None for none; else raise ConflictError."""
        ...

    async def delete(self, user_id: str) -> bool:
        """Remove all of a user; True if there was anything."""
        ...

    async def search(self, request: SearchRequest, cursor: Cursor) -> tuple[list[Match], Cursor]:
        """A page of the snapshots that the request admits, about in the order of their similarity.

        Further pages hold less similar ones; who asks has enough with as many as the request wants.
        """
        ...

    async def users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        """A page of users."""
        ...

    async def states(self, cursor: Cursor) -> StatesPage:
        """All that history shows of a page of users, and the latest; what is of one user is of one moment."""
        ...

    async def count(self) -> int:
        """How many users there are."""
        ...

    async def count_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """How many snapshots the histories of a page of users show."""
        ...

    async def prune_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """Remove what the histories of a page of users hide; how many snapshots that was."""
        ...

    async def stage(self, token: str) -> Backend:
        """What is written to the backend that this gives takes the place of the contents when adopted."""
        ...

    async def adopt(self, staged: Any) -> None:
        """Let what was staged take the place of the contents."""
        ...

    async def discard(self, staged: Any) -> None:
        """Give up what was staged."""
        ...

    async def add_axes(self, names: Sequence[str]) -> None:
        """Add axes to the schema, whole or not at all; raises StoreError where others hold it too."""
        ...

    async def look(self, seconds: float) -> Health:
        """How it is and how much it holds, found out within so many seconds."""
        ...


class NativeBackend(Backend, Protocol):
    """A backend with ``native_snapshots``."""

    async def create_native(self, request: SnapshotRequest, location: str) -> SnapshotReport | None:
        """Take a snapshot of the database's own; None where a portable one will do and is needed."""
        ...

    async def restore_native(self, path: Path, sha256: str) -> None:
        """Let the database replace the collection by what a snapshot of its own holds."""
        ...


class Place(Protocol):
    """Where the backend of a store is, and how its operations get there.

    ``location`` is what open_store opens it with; ``engine`` the name of the engine, "qdrant" before it is
    known. ``is_shown``: it can be asked how it is without awaiting, as a notebook does.
    """

    location: str
    is_shown: bool

    @property
    def engine(self) -> str:
        """See above."""
        ...

    async def open(self) -> Backend:
        """Open what the store has not opened yet; raises StoreLockedError, SchemaMismatchError."""
        ...

    async def drive(self, body: Coroutine[Any, Any, T], *, long: bool = False) -> T:
        """Run one piece of an operation; ``long``: where it holds up nobody, such as in a worker thread."""
        ...

    async def with_engine(self, operation: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """Run one piece of work on the engine of points here, as ``drive`` would."""
        ...

    async def close(self) -> None:
        """Release everything."""
        ...

    def signs(self, latency_ms: float) -> list[str]:
        """What is known of trouble besides what a look found."""
        ...


class _ClosedBackend:
    """What a closed store has in place of its backend: every use raises."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise closed_error()


class _UnopenedBackend:
    """What a store has in place of its backend until it is opened."""

    batch_size = BATCH_SIZE
    is_open = False
    native_snapshots = False

    def cached(self, user_id: str) -> None:
        """Nothing is known before opening."""


CLOSED = cast("Backend", _ClosedBackend())
UNOPENED = cast("Backend", _UnopenedBackend())


def check_expected(expected: object) -> None:
    """Raise ValidationError unless a caller gave what a write can be conditional on."""
    if not (expected is ANY or expected is None or isinstance(expected, StateSnapshot)):
        raise ValidationError(f"expected: a StateSnapshot, None or ANY is needed, got {type_name(expected)}")


def check_state(schema: Schema, snapshot: object) -> StateSnapshot:
    """A snapshot that a store with this schema can keep."""
    if not isinstance(snapshot, StateSnapshot):
        raise ValidationError(f"snapshot: a StateSnapshot is needed, got {type_name(snapshot)}")
    schema.check(snapshot.axes)
    return snapshot


def conflict_error(
    user_id: str, expected: StateSnapshot | None, found: StateSnapshot | None
) -> ConflictError:
    """What a conditional write raises that found another snapshot, or none."""

    def at(snapshot: StateSnapshot | None) -> str:
        return "none" if snapshot is None else f"one of {snapshot.updated_at_unix_ms}"

    return ConflictError(
        f"user {short_id(user_id)!r}: expected {at(expected)} as the latest snapshot, found {at(found)}; "
        "read it again and retry, or use update()"
    )


def clamp_score(score: float) -> float:
    """A cosine within its range, which rounding may have left; zero has no sign."""
    return max(-1.0, min(1.0, score)) + 0.0


def page_of_ids(remaining: Iterator[str], size: int) -> tuple[list[str], Cursor]:
    """A page of ids that are in memory, and the cursor to the next one."""
    page = list(itertools.islice(remaining, size))
    return page, remaining if len(page) == size else None


# ------------------------------------------------------------------------------------------------------------
# attuned.states.memory
# The backend of memory: a deque a user, nothing between a caller and the dict.
# ------------------------------------------------------------------------------------------------------------


class VectorIndex:
    """The latest snapshots as unit vectors. It is told who was written, and catches up when asked."""

    def __init__(self, schema: Schema) -> None:
        self.stale: set[str] = set()
        self._schema = schema
        self.vectors: Vectors | None = None  # until there is something to be taken in
        self._rows: list[StateSnapshot | None] = []
        self._row_of: dict[str, int] = {}
        self._free: list[int] = []

    def catch_up(self, latest: Callable[[str], StateSnapshot | None]) -> bool:
        """Take in some of the users written since; whether all are taken in."""
        for _ in range(min(4 * BATCH_SIZE, len(self.stale))):
            user_id = self.stale.pop()
            self._take(user_id, latest(user_id))
        return not self.stale

    def _take(self, user_id: str, snapshot: StateSnapshot | None) -> None:
        if self.vectors is None:
            self.vectors = make_vectors(self._schema.vector_size)
        row = self._row_of.get(user_id)
        if snapshot is None:
            if row is not None:
                self._free.append(self._row_of.pop(user_id))
                self._rows[row] = None
            return
        if row is None:
            row = self._row_of[user_id] = self._free.pop() if self._free else len(self._rows)
        self._rows[row : row + 1] = [snapshot]
        self.vectors.put(row, self._schema.vector(snapshot.axes))

    def ranking(self, search: SearchRequest) -> Iterator[Match]:
        """What is admitted of the rows as they are now, the best first, at any time later."""
        vectors, rows = self.vectors, list(self._rows)
        if vectors is None:
            return iter(())
        scores = vectors.scores(self._schema.vector(search.axes), len(rows))

        def ranked() -> Iterator[Match]:
            done = set[int]()
            # The best of so many; some may not be admitted: then all.
            for number in (4 * search.limit + BATCH_SIZE, len(rows)):
                for row in vectors.best(scores, number):
                    snapshot, score = rows[row], clamp_score(float(scores[row]))
                    if score < search.score_threshold:
                        return
                    if snapshot is not None and row not in done and search.admits(snapshot):
                        yield Match(snapshot, score)
                    done.add(row)
                if number >= len(rows):
                    return

        return ranked()


class MemoryBackend:
    """States in the memory of this process.

    Reads take no lock, unless on a free-threaded Python a write comes between.
    """

    name = "memory"
    is_open = True
    native_snapshots = False
    batch_size = BATCH_SIZE

    def __init__(self, config: MemoryStoreConfig, waits: Waits) -> None:
        self.config = config
        self.schema = Schema.of(config)
        # One deque a user, ascending in time, the latest at its end: one append changes both at one moment.
        self.timelines: dict[str, deque[StateSnapshot]] = {}
        self._waits = waits
        self._retention = Retention.of(config)
        self._capacity = max(1, self._retention.maximum)
        self._lock: Any = threading.RLock()  # knows whether the thread has it
        self._index = VectorIndex(self.schema)
        self._closed = False
        OPEN.others.add(self)

    def get_latest(self, user_id: str) -> StateSnapshot | None:
        """The latest snapshot of a user, whose id need not have been checked."""
        try:
            return self.timelines[user_id][-1]
        except (KeyError, TypeError):
            self._check_open()
            check_user_id(user_id)
            return None
        except IndexError:  # free threading: it got shorter between the looks at its length and at its end
            with self._lock:
                timeline = self.timelines.get(user_id)
                return timeline[-1] if timeline else None

    def upsert_latest(self, snapshot: StateSnapshot, expected: Expected) -> None:
        """Write a snapshot, which has been checked like ``expected``."""
        if self._lock._is_owned():
            raise ReenteredError("memory://")
        with self._lock:
            self._put(snapshot, expected)

    def _free_lock(self) -> Any:
        """The lock, unless a call comes in the middle of another one of the same thread, which holds it.

        That is asked of the lock itself: a flag would stay behind where an interrupt comes at its line.
        """
        if self._lock._is_owned():
            raise ReenteredError("memory://")
        return self._lock

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error()

    def _put(self, snapshot: StateSnapshot, expected: Expected = ANY) -> None:
        if self._closed:
            raise closed_error()
        user_id = snapshot.user_id
        timeline = self.timelines.get(user_id)
        if expected is not ANY:
            latest = timeline[-1] if timeline else None
            if latest != expected:
                raise conflict_error(user_id, expected, latest)
        self._index.stale.add(user_id)  # first: an interrupt may come after any line
        if timeline is None:
            self.timelines[user_id] = deque((snapshot,), self._capacity)
        elif snapshot.updated_at_unix_ms > timeline[-1].updated_at_unix_ms:
            timeline.append(snapshot)
            if self._retention.days is not None:
                self._trim(timeline)
        else:
            others = [entry for entry in timeline if entry.updated_at_unix_ms != snapshot.updated_at_unix_ms]
            self.timelines[user_id] = deque(sorted([*others, snapshot], key=time_of), self._capacity)

    def _trim(self, timeline: deque[StateSnapshot]) -> int:
        removable = self._retention.removable([entry.updated_at_unix_ms for entry in timeline])
        removable = min(removable, len(timeline) - 1)  # the newest is the latest snapshot, which stays
        for _ in range(removable):
            timeline.popleft()
        return removable

    def _moment(self, user_id: str, *, keep_latest: bool) -> list[StateSnapshot]:
        """What history shows of a user, oldest first, as it is at one moment, or at least the latest."""
        timeline = self.timelines.get(user_id)
        if timeline is None:
            return []
        try:
            entries = list(timeline.copy())
        except RuntimeError:  # free threading: a write came between two entries
            with self._free_lock():
                entries = list(timeline)
        hidden = self._retention.hidden([entry.updated_at_unix_ms for entry in entries])
        return entries[min(hidden, len(entries) - 1) if keep_latest else hidden :]

    # What Backend asks for. Nothing suspends but a search, between two of its steps.

    async def open(self) -> None:
        """See Backend.open."""

    def begin(self, operation: Callable[[Any], Coroutine[Any, Any, T]]) -> Coroutine[Any, Any, T]:
        """See Backend.begin."""
        return operation(self)

    def cached(self, user_id: str) -> StateSnapshot | None:
        """See Backend.cached."""
        return self.get_latest(user_id)

    async def find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        """See Backend.find."""
        found = ((user_id, self.get_latest(user_id)) for user_id in user_ids)
        return {user_id: latest for user_id, latest in found if latest is not None}

    async def history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        """See Backend.history."""
        self._check_open()
        newest_first = reversed(self._moment(user_id, keep_latest=False))
        chosen = (entry for entry in newest_first if window.since <= entry.updated_at_unix_ms <= window.until)
        return list(itertools.islice(chosen, window.limit))

    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """See Backend.write."""
        with self._free_lock():
            for snapshot in snapshots:
                self._put(snapshot)

    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        """See Backend.write_expected."""
        self.upsert_latest(snapshot, expected)

    async def delete(self, user_id: str) -> bool:
        """See Backend.delete."""
        with self._free_lock():
            self._check_open()
            self._index.stale.add(user_id)
            return self.timelines.pop(user_id, None) is not None

    async def search(
        self, request: SearchRequest, cursor: Iterator[Match] | None
    ) -> tuple[list[Match], Cursor]:
        """See Backend.search."""
        self._check_open()
        if cursor is not None:
            page = list(itertools.islice(cursor, min(BATCH_SIZE, request.limit)))
            return page, cursor if page else None
        self.schema.check(request.axes)
        if request.history or request.user_id is not None:
            return await self._scan(request), None
        if self._index.vectors is None and "numpy" not in sys.modules:  # which takes 0.1 s to import
            await self._waits.call(functools.partial(make_vectors, self.schema.vector_size))
        while not self._caught_up():
            await self._waits.pause_if_due()
        with self._free_lock():
            ranking = self._index.ranking(request)
        return await self.search(request, ranking)

    def _caught_up(self) -> bool:
        with self._free_lock():
            try:
                return self._index.catch_up(self.get_latest)
            except BaseException:  # an interrupt, say: begin anew
                self._index = VectorIndex(self.schema)
                self._index.stale.update(self.timelines)
                raise

    async def _scan(self, request: SearchRequest) -> list[Match]:
        """Look at snapshots one by one, where the vectors of the latest ones do not serve."""
        direction, best = self.schema.vector(request.axes), list[Match]()
        score_of = operator.attrgetter("score")
        for user_id in list(self.timelines) if request.user_id is None else [request.user_id]:
            if request.history:
                entries = self._moment(user_id, keep_latest=False)
            else:
                latest = self.get_latest(user_id)
                entries = [] if latest is None else [latest]
            for snapshot in filter(request.admits, entries):
                score = sum(map(operator.mul, direction, self.schema.vector(snapshot.axes)))
                if score >= request.score_threshold:
                    best.append(Match(snapshot, clamp_score(score)))
            if len(best) > 4 * request.limit + BATCH_SIZE:
                best = heapq.nlargest(request.limit, best, key=score_of)
            await self._waits.pause_if_due()
        return heapq.nlargest(request.limit, best, key=score_of)

    async def users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        """See Backend.users."""
        self._check_open()
        return page_of_ids(iter(list(self.timelines)) if cursor is None else cursor, self.batch_size)

    async def states(self, cursor: Cursor) -> StatesPage:
        """See Backend.states."""
        self._check_open()
        remaining: Iterator[str] = iter(list(self.timelines)) if cursor is None else cursor
        states: list[StateSnapshot] = []
        for user_id in remaining:
            states += self._moment(user_id, keep_latest=True)
            if len(states) >= self.batch_size:
                return StatesPage(states, remaining)
        return StatesPage(states)

    async def count(self) -> int:
        """See Backend.count."""
        self._check_open()
        return len(self.timelines)

    async def count_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """See Backend.count_page."""
        page, cursor = await self.users(cursor)
        return sum(len(self._moment(user_id, keep_latest=False)) for user_id in page), cursor

    async def prune_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """See Backend.prune_page."""
        page, cursor = await self.users(cursor)
        with self._free_lock():
            timelines = [self.timelines[user_id] for user_id in page if user_id in self.timelines]
            return sum(self._trim(timeline) for timeline in timelines), cursor

    async def stage(self, token: str) -> MemoryBackend:  # noqa: ARG002 - nothing of this one can be left
        """See Backend.stage."""
        axes = attrs.evolve(self.config, axes=self.schema.axes, vector_size=self.schema.vector_size)
        return MemoryBackend(axes, self._waits)

    async def adopt(self, staged: MemoryBackend) -> None:
        """See Backend.adopt."""
        with self._free_lock():
            self._check_open()
            old, self.timelines, self._index = self.timelines, staged.timelines, staged._index
            staged.timelines = {}  # which are another's now, should this be cancelled
        await self._free(old)

    async def discard(self, staged: MemoryBackend) -> None:
        """See Backend.discard."""
        await staged.close()

    async def add_axes(self, names: Sequence[str]) -> None:
        """See Backend.add_axes."""
        with self._free_lock():
            self._check_open()
            self.schema = self.schema.extended(names)
            self._index = VectorIndex(self.schema)
            self._index.stale.update(self.timelines)

    async def look(self, seconds: float) -> Health:  # noqa: ARG002 - it is there at once
        """See Backend.look."""
        timelines = list(self.timelines.values())
        points = len(timelines) + (sum(map(len, timelines)) if self._retention.maximum else 0)
        return Health("healthy", self.name, 0.0, len(timelines), points)

    def abandon(self) -> None:
        """Go on in a forked child, which has a copy of its own, whatever other threads held at the fork."""
        self._lock = threading.RLock()

    async def close(self) -> None:
        """Forget everything."""
        with self._free_lock():
            self._closed = True
            old, self.timelines, self._index = self.timelines, {}, VectorIndex(self.schema)
        await self._free(old)

    async def _free(self, timelines: dict[str, deque[StateSnapshot]]) -> None:
        """Let go of snapshots in pieces: those of 100,000 users at once take 60 ms."""
        while timelines:
            for _ in range(min(4 * BATCH_SIZE, len(timelines))):
                timelines.popitem()
            if timelines:
                await self._waits.pause_if_due()


class MemoryPlace:
    """The place of a memory store: there is nothing between it and its backend."""

    location = "memory://"
    engine = "memory"
    is_shown = True

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._points = MemoryEngine()
        self._points_lock: Any = threading.RLock()  # knows whether the thread has it
        self._closed = False
        OPEN.others.add(self)

    def abandon(self) -> None:
        """Go on in a forked child, as MemoryBackend.abandon does."""
        self._points_lock = threading.RLock()

    async def open(self) -> MemoryBackend:
        """See Place.open."""
        return self._backend

    async def drive(self, body: Coroutine[Any, Any, T], *, long: bool = False) -> T:  # noqa: ARG002 - none is
        """See Place.drive."""
        return await body

    async def with_engine(self, operation: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """See Place.with_engine; alone, as threads may share the store."""
        if self._points_lock._is_owned():
            raise ReenteredError(self.location)
        with self._points_lock:
            if self._closed:
                raise closed_error()
            return run(operation(self._points))

    async def close(self) -> None:
        """See Place.close."""
        await self._backend.close()
        self._closed = True
        await self._points.close()

    def signs(self, latency_ms: float) -> list[str]:  # noqa: ARG002 - there is no trouble
        """See Place.signs."""
        return []


# ------------------------------------------------------------------------------------------------------------
# attuned.states.operations
# The operations of a store, written once: synchronous stores run them, asynchronous ones await them.
# ------------------------------------------------------------------------------------------------------------


U = TypeVar("U")


class Operations:
    """What a store does, over a backend and the place where that is."""

    STATUS_TIMEOUT = 5.0  # seconds that a look at a server may take

    def __init__(self, backend: Backend, place: Place, waits: Waits, *, collection: str) -> None:
        self.backend = backend
        self.place = place
        self.waits = waits
        self.collection = collection
        self._failed_close: StoreError | None = None  # which every further close tells again
        self.reporter: Telemetry | None = None  # of what is slow
        self.slow_ms: float | None = None  # a piece that takes longer is logged
        self.documents: dict[str, Any] = {}  # its collections of them, by name

    # The life of a store

    @property
    def is_closed(self) -> bool:
        """Whether the store has been closed."""
        return self.backend is CLOSED

    def check_open(self) -> None:
        """Raise StoreClosedError where the store has been closed."""
        if self.backend is CLOSED:
            raise closed_error()

    async def open(self) -> None:
        """Make ready what checks need: open what is not open yet, or connect."""
        if self.backend is UNOPENED:
            backend = await self.place.open()
            if self.backend is UNOPENED:  # else another task was faster, or has closed the store
                self.backend = backend
            elif self.backend is CLOSED:
                await self.place.close()
        self.check_open()
        if not self.backend.is_open:
            await self.place.drive(self.backend.open())

    def axes(self) -> tuple[str, ...]:
        """The axes of the store, which must be open."""
        self.check_open()
        if not self.backend.is_open:
            raise StoreError("the axes are known once the store is open: await an operation first")
        return self.backend.schema.axes

    async def close(self) -> None:
        """Release everything; harmless when repeated. One that fails closes too."""
        backend, self.backend = self.backend, CLOSED
        if backend is CLOSED:
            if self._failed_close is not None:
                raise self._failed_close
            return
        try:
            await self.place.close()
        except ReenteredError:
            self.backend = backend  # nothing was done
            raise
        except StoreError as error:
            self._failed_close = error  # it is closed all the same
            raise

    async def _drive(
        self,
        name: str,
        operation: Callable[[Any], Coroutine[Any, Any, T]],
        about: object = None,
        *,
        long: bool = False,
    ) -> T:
        """Run a piece of an operation, which may run while no other one does, and look how long it takes.

        Pieces of bulk operations, which hold as much as fits, are not looked at: whoever calls these expects
        to wait. They have no name.
        """
        if self.backend is UNOPENED:
            await self.open()
        return await self._timed(name, self.place.drive(self.backend.begin(operation), long=long), about)

    async def with_engine(
        self, name: str, operation: Callable[[Engine], Coroutine[Any, Any, T]], about: object = None
    ) -> T:
        """Run a piece of work on the engine of points, as ``_drive`` does on the backend."""
        self.check_open()
        if self.backend is UNOPENED:
            await self.open()
        return await self._timed(name, self.place.with_engine(operation), about)

    async def _timed(self, name: str, piece: Awaitable[T], about: object) -> T:
        began = time.perf_counter()
        try:
            return await piece
        finally:
            seconds = time.perf_counter() - began
            if name and self.slow_ms and seconds * 1000 > self.slow_ms:
                report_slow(self.reporter, self.place.engine, name, seconds, about)

    # Single states

    async def upsert_latest(self, snapshot: StateSnapshot, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""

        async def write(backend: Backend) -> None:
            check_state(backend.schema, snapshot)
            check_expected(expected)
            if expected is ANY:
                await backend.write([snapshot])
            else:
                await backend.write_expected(snapshot, expected)

        await self._drive("upsert", write, snapshot)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        """See StateStore.get_latest."""
        cached = self.backend.cached(user_id)
        if cached is not None:
            return cached
        user_id = check_user_id(user_id)
        found: dict[str, StateSnapshot] = await self._drive(
            "get", lambda backend: backend.find([user_id]), user_id
        )
        return found.get(user_id)

    async def update(self, user_id: str, fn: Callable[..., Any], attempts: int) -> StateSnapshot | None:
        """See StateStore.update."""
        check_callable("fn", fn)
        for attempt in range(check_integer("attempts", attempts, 1, MAX_INTEGER)):
            latest = await self.get_latest(user_id)
            new = _check_update(user_id, latest, await self.waits.ask(fn, latest))
            if new is None:
                return latest
            try:
                await self.upsert_latest(new, latest)
            except ConflictError as conflict:
                if conflict.ambiguous:
                    raise
                # Full jitter, none after the first; see Marc Brooker, "Exponential Backoff And Jitter", AWS
                # Architecture Blog, 2015.
                await self.waits.sleep(
                    random.uniform(0.0, min(0.1, 0.001 * 2.0**attempt)) if attempt else 0.0
                )
            else:
                return new
        raise ConflictError(
            f"user {short_id(user_id)!r}: still in conflict after {attempts} attempts; try again later"
        )

    async def patch(
        self, user_id: str, axes: Mapping[str, float | None], fields: SnapshotFields
    ) -> StateSnapshot:
        """See StateStore.patch."""
        first = StateSnapshot(user_id, {}, updated_at_unix_ms=0).patched(
            axes, **fields
        )  # checks, before any read
        if removed := removed_axes(axes):
            await self.open()
            self.backend.schema.check(Axes(dict.fromkeys(removed, NEUTRAL)))

        def merge(latest: StateSnapshot | None) -> StateSnapshot:
            return first if latest is None else latest.patched(axes, **fields)

        return cast("StateSnapshot", await self.update(user_id, merge, 32))

    async def delete(self, user_id: str) -> bool:
        """See StateStore.delete."""
        user_id = check_user_id(user_id)
        return await self._drive("delete", lambda backend: backend.delete(user_id), user_id)

    async def get_history(
        self, user_id: str, limit: int, since: int | datetime | None, until: int | datetime | None
    ) -> list[StateSnapshot]:
        """See StateStore.get_history."""
        user_id = check_user_id(user_id)
        window = HistoryWindow.of(limit, since, until)
        return History(
            await self._drive("history", lambda backend: backend.history(user_id, window), user_id)
        )

    async def states_to_plot(self, user_id: str, limit: int) -> list[StateSnapshot]:
        """The newest snapshots of a user, or the latest alone where there is no history."""
        return await self.get_history(user_id, limit, None, None) or [await self.latest_or_raise(user_id)]

    async def latest_or_raise(self, user_id: str) -> StateSnapshot:
        """The latest snapshot of a user, or UserNotFoundError."""
        latest = await self.get_latest(user_id)
        if latest is None:
            raise unknown_user_error(user_id)
        return latest

    async def search(
        self,
        query: StateSnapshot | Mapping[str, float] | str,
        *,
        exclude_user_id: str | None,
        **options: Any,
    ) -> list[Match]:
        """See StateStore.search_similar."""
        if isinstance(query, str):
            if exclude_user_id is None:
                exclude_user_id = query
            query = await self.latest_or_raise(query)
        request = SearchRequest.of(query, exclude_user_id=exclude_user_id, **options)
        pages = self._pages("search", lambda backend, cursor: backend.search(request, cursor))
        found: dict[tuple[str, int], Match] = {}
        while len(found) < request.limit and (page := await pages.next()) is not None:
            found |= {(match.snapshot.user_id, match.snapshot.updated_at_unix_ms): match for match in page}
        best = sorted(found.values(), key=attrgetter("score"), reverse=True)[: request.limit]
        return Matches(best, request.axes)

    # Many states

    async def upsert_many(self, snapshots: Iterable[StateSnapshot], progress: Progress | None) -> int:
        """See StateStore.upsert_many."""
        self.check_open()
        progress = check_progress(progress)
        await self.open()
        written = 0
        total = len(cast("Any", snapshots)) if hasattr(snapshots, "__len__") else None
        if isinstance(snapshots, list | tuple):
            snapshots = tuple(snapshots)  # of this moment, whatever the caller does to it between two pieces
            for position, snapshot in enumerate(snapshots):
                if position % BATCH_SIZE == 0:
                    await self.waits.pause_if_due()
                check_state(self.backend.schema, snapshot)
        try:
            for batch in self._batches(snapshots):
                await self._write(batch)
                written += len(batch)
                progress(written, total)
                await self.waits.pause()
        except StoreError as error:
            error.written = written
            raise
        return written

    async def _write(self, batch: Sequence[StateSnapshot]) -> None:
        await self._drive("", lambda backend: backend.write(batch))

    def _batches(self, snapshots: Iterable[StateSnapshot]) -> Iterator[list[StateSnapshot]]:
        """Cut into batches, checked before they are handed out: a tuple was, others are batch by batch.

        An error of the caller's iterator is raised when what came before it has been dealt with.
        """
        if isinstance(snapshots, StateSnapshot) or not isinstance(snapshots, Iterable):
            raise ValidationError(
                f"snapshots: an iterable of StateSnapshot is needed, got {type_name(snapshots)}"
            )
        schema, size = self.backend.schema, self.backend.batch_size
        known = isinstance(snapshots, tuple)  # and checked
        failures: list[Exception] = []

        def until_failure() -> Iterator[StateSnapshot]:
            try:
                yield from snapshots
            except Exception as failure:  # noqa: BLE001 - it is raised again
                failures.append(failure)

        remaining = until_failure()
        while batch := list(itertools.islice(remaining, size)):
            if not known:
                for snapshot in batch:
                    check_state(schema, snapshot)
            yield batch
        for failure in failures:
            raise failure

    async def get_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        """See StateStore.get_many."""
        self.check_open()
        if isinstance(user_ids, str) or not isinstance(user_ids, Iterable):
            raise ValidationError(f"user_ids: an iterable of user ids is needed, got {type_name(user_ids)}")
        asked = list(dict.fromkeys(check_user_id(user_id) for user_id in user_ids))
        if asked and self.backend is UNOPENED:
            await self.open()
        found: dict[str, StateSnapshot] = {}
        for start in range(0, len(asked), max(1, self.backend.batch_size)):
            if start:
                await self.waits.pause()
            found.update(await self._find(asked[start : start + self.backend.batch_size]))
        return found

    async def _find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        return await self._drive("get_many", lambda backend: backend.find(user_ids))

    def users(self) -> Pager[list[str]]:
        """The pages of all user ids."""
        return self._pages("users", lambda backend, cursor: backend.users(cursor))

    def latest(self) -> Pager[list[StateSnapshot]]:
        """The pages of all users' latest snapshots."""

        async def page(backend: Backend, cursor: Cursor) -> tuple[list[StateSnapshot], Cursor]:
            user_ids, cursor = await backend.users(cursor)
            return list((await backend.find(user_ids)).values()), cursor

        return self._pages("items", page)

    async def states_of(
        self, user_ids: Iterable[str] | None, since: int | datetime | None, until: int | datetime | None
    ) -> list[StateSnapshot]:
        """All states of some users, or of all: what history shows within a window, and the latest ones."""
        self.check_open()
        window, found = HistoryWindow.of(MAX_INTEGER, since, until), list[StateSnapshot]()
        await self.open()  # for the axes, whoever is asked for
        if user_ids is None:
            pages = self.states()
            while (page := await pages.next()) is not None:
                found += (each for each in page.states if window.since <= time_of(each) <= window.until)
            return found
        for user_id, latest in (await self.get_many(user_ids)).items():
            states = await self.get_history(user_id, window.limit, window.since, window.until)
            if (
                time_of(latest) not in map(time_of, states)
                and window.since <= time_of(latest) <= window.until
            ):
                found.append(latest)  # it has aged out of the history, or there is none
            found += states
        return found

    def states(self) -> Pager[StatesPage]:
        """The pages of all states, each user's together."""

        async def page(backend: Backend, cursor: Cursor) -> tuple[StatesPage, Cursor]:
            found = await backend.states(cursor)
            return found, found.cursor

        return self._pages("", page)

    def _pages(
        self, name: str, fetch: Callable[[Backend, Cursor], Coroutine[Any, Any, tuple[T, Cursor]]]
    ) -> Pager[T]:
        async def page(cursor: Cursor) -> tuple[T, Cursor]:
            return await self._drive(name, lambda backend: fetch(backend, cursor))

        return Pager(page, self.waits)

    async def count(self, *, history: bool) -> int:
        """See StateStore.count."""
        if not check_flag("history", history):
            return await self._drive("count", lambda backend: backend.count())
        return await self._sum(self._pages("count", lambda backend, cursor: backend.count_page(cursor)))

    async def prune(self) -> int:
        """See StateStore.prune."""
        return await self._sum(self._pages("", lambda backend, cursor: backend.prune_page(cursor)))

    async def _sum(self, pages: Pager[int]) -> int:
        total = 0
        while (number := await pages.next()) is not None:
            total += number
        return total

    async def alter_axes(self, add: object) -> tuple[str, ...]:
        """See StateStore.alter_axes."""
        self.check_open()
        if isinstance(add, str) or not isinstance(add, Iterable):
            raise ValidationError(f"add: a list of axes is needed, got {type_name(add)}")
        names = shape_of(tuple(cast("Any", add))).names
        await self.open()
        if names:
            await self._drive("", lambda backend: backend.add_axes(names), long=True)
        return self.axes()

    # How it is

    async def health(self) -> Health:
        """See StateStore.health."""
        started = time.perf_counter()
        place = self.place
        try:
            found = await self._look(self.STATUS_TIMEOUT)
            signs = place.signs((time.perf_counter() - started) * 1000)
        except StoreError as error:
            latency_ms = (time.perf_counter() - started) * 1000
            location = place.location if place.engine not in ("memory", "qdrant") else None
            return Health("unhealthy", place.engine, latency_ms, location=location, message=str(error))
        latency_ms = (time.perf_counter() - started) * 1000
        return attrs.evolve(
            found,
            status="degraded" if found.status == "healthy" and signs else found.status,
            latency_ms=latency_ms,
            location=None if place.engine == "memory" else place.location,
            message="; ".join(filter(None, [found.message, *signs])),
        )

    async def _look(self, seconds: float) -> Health:
        if self.backend is UNOPENED:
            await self.open()
        return await self.place.drive(self.backend.look(seconds))

    async def wait_until_ready(self, timeout: float) -> None:  # noqa: ASYNC109 - as in the public method
        """See StateStore.wait_until_ready."""
        self.check_open()
        check_positive("timeout", timeout, zero=True)
        deadline = time.monotonic() + timeout
        while True:
            try:
                await self._look(max(0.01, min(deadline - time.monotonic(), self.STATUS_TIMEOUT)))
            except BackendError as error:
                left = deadline - time.monotonic()
                if left <= 0 or not error.retryable:
                    raise
                await self.waits.sleep(min(0.25, left))
            else:
                return

    # Backups

    def origin(self) -> SnapshotOrigin:
        """Which store a snapshot is of."""
        return SnapshotOrigin(self.place.location, self.place.engine, self.collection)

    async def create_snapshot(
        self, progress: Progress | None, *, directory: Any, kind: Any, **options: Any
    ) -> SnapshotReport:
        """See StateStore.create_snapshot."""
        self.check_open()
        progress = check_progress(progress)
        request = SnapshotRequest.of(directory, kind, **options, native=self.backend.native_snapshots)
        await self.open()
        if request.kind == "native":
            backend = cast("NativeBackend", self.backend)
            report = await self.place.drive(backend.create_native(request, self.place.location))
            if report is not None:
                return await self._told(report)
            request = attrs.evolve(request, kind="portable")
        with PortableSnapshotWriter(request, self.origin(), self.axes()) as writer:
            pages = self.states()
            while (page := await pages.next()) is not None:
                progress(writer.add(page.states, page.unsettled), None)
            return await self._told(await self.waits.call(writer.finish))

    async def _told(self, report: SnapshotReport) -> SnapshotReport:
        """The report of a backup of states, with the collections of documents that it does not hold.

        On a server, where each would be a request more, they are those that this store has used.
        """

        async def names(engine: Engine) -> list[str]:
            if engine.shared:
                return sorted(self.documents)
            found = await engine.collections()
            return sorted(name for name, metadata in found.items() if metadata.get("kind") == "documents")

        left_out = await self.place.with_engine(names)
        if not left_out:
            return report
        shown = ", ".join(left_out[:5]) + (", and others" if left_out[5:] else "")
        said = f"the documents of {plural(len(left_out), 'collection')} are not in it: {shown}"
        return attrs.evolve(report, message="; ".join(filter(None, [report.message, said])))

    async def restore_snapshot(
        self, path: Any, mode: str, progress: Progress | None, *, unchecked: bool
    ) -> SnapshotReport:
        """See StateStore.restore_snapshot."""
        self.check_open()
        check_flag("unchecked", unchecked)
        progress = check_progress(progress)
        saved = SnapshotFile(path)
        saved.check_mode(mode, native=self.backend.native_snapshots)
        await self.open()
        if saved.kind == "native":
            await self.waits.call(saved.verify)
            if saved.unchecked and not unchecked:
                raise SnapshotError(
                    f"{saved.path}: {saved.unchecked}, and a damaged one may end the server; unchecked=True "
                    "(or --unchecked) restores it all the same"
                )
            backend = cast("NativeBackend", self.backend)
            await self.place.drive(backend.restore_native(saved.path, saved.sha256))
        elif mode == "replace":
            if (
                self.backend.native_snapshots
            ):  # a server is changed in place: all must be known to be right before
                await self._verify(saved, progress)
            await self.replace(saved.sha256, lambda staged: staged.write_from(saved, progress))
        else:
            await self._verify(saved, progress)
            await self.write_from(saved, progress, skip_known=mode == "skip")
        return saved.report(self.place.location)

    async def replace(self, token: str, fill: Callable[[Operations], Awaitable[object]]) -> None:
        """Let ``fill`` write to an empty store, which then takes the place of the contents.

        At a failure it is given up. A server is changed in place, and marked with the token until the end.
        """
        backend = await self._drive("", lambda backend: backend.stage(token), long=True)
        staged = Operations(backend, self.place, self.waits, collection=self.collection)
        try:
            await fill(staged)
            await self._drive("", lambda backend: backend.adopt(staged.backend), long=True)
        except BaseException:
            await self.waits.shielded(self._discard(staged))
            raise

    async def _discard(self, staged: Operations) -> None:
        try:
            await self._drive("", lambda backend: backend.discard(staged.backend), long=True)
        except StoreClosedError:
            return  # the next opening removes it

    async def _verify(self, saved: SnapshotFile, progress: Progress) -> None:
        for done in saved.verifying(self.axes()):
            progress(done, None)
            await self.waits.pause()

    async def write_from(self, saved: SnapshotFile, progress: Progress, *, skip_known: bool = False) -> None:
        """Write what a portable snapshot holds, of users who are not there yet or of all."""
        done, adding = 0, None  # ``adding``: a new user whose snapshots may go on in the next batch
        for batch in saved.batches(self.backend.batch_size, self.axes()):
            done += len(batch)
            chosen = batch
            if skip_known:
                known = await self._find(list(dict.fromkeys(each.user_id for each in batch)))
                chosen = [each for each in batch if each.user_id not in known or each.user_id == adding]
                adding = chosen[-1].user_id if chosen and chosen[-1] is batch[-1] else None
            if chosen:
                await self._write(chosen)
            progress(done, saved.total)
            await self.waits.pause()


class MemoryOperations(Operations):
    """Operations over a backend in memory: there is no lock to take, nor anything that could be slow."""

    backend: MemoryBackend

    async def _drive(
        self,
        name: str,  # noqa: ARG002 - nothing is told of it
        operation: Callable[[Any], Coroutine[Any, Any, T]],
        about: object = None,  # noqa: ARG002
        *,
        long: bool = False,  # noqa: ARG002
    ) -> T:
        return await operation(self.backend)

    async def upsert_latest(self, snapshot: StateSnapshot, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        check_state(self.backend.schema, snapshot)
        check_expected(expected)
        self.backend.upsert_latest(snapshot, expected)


def _check_update(user_id: str, latest: StateSnapshot | None, new: object) -> StateSnapshot | None:
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


class PagedIterator(Generic[T, U]):
    """What stands in the pages of a store, made into what is asked for: iterated in place, or awaited."""

    def __init__(self, pages: Pager[list[T]], make: Callable[[T], U]) -> None:
        self._pages, self._make = pages, make
        self._ready: deque[T] = deque()
        self._ended = False

    async def fill(self) -> None:
        """Get some ready, unless there are some or no more."""
        while not self._ready and not self._ended:
            page = await self._pages.next()
            self._ended = page is None
            self._ready.extend(page or ())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> U:
        if not self._ready:
            run(self.fill())
            if not self._ready:
                raise StopIteration
        return self._make(self._ready.popleft())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> U:
        if not self._ready:
            await self.fill()
            if not self._ready:
                raise StopAsyncIteration
        return self._make(self._ready.popleft())


# ------------------------------------------------------------------------------------------------------------
# attuned.states.points
# States as points: what backends over an engine of points share.
# ------------------------------------------------------------------------------------------------------------


LATEST = Equal("kind", "latest")
HISTORY = Equal("kind", "history")
LAST_BITS = 1e-12  # by so much an engine may change a float
_MOST_MATCHES = 2**31 - 1
_SCANNED = 500  # points in one step of a search that ranks them here
LINEAGE = 32  # revisions that a point on a server remembers
MAX_COUNTED = 10_000  # users whose writes are counted on a server
WHOLE_HISTORY = 1_000_000  # more entries than the history of one user can sensibly have


def encode_snapshot(snapshot: StateSnapshot, kind: str, engine: Engine) -> dict[str, Any]:
    """The payload of a point, without the user: its axes nested or, where that is cheaper, as a text.

    Where an engine would read a float as another one there is a text that tells the exact one.
    """
    axes, confidence, exact = snapshot.axes, snapshot.confidence, dict[str, str]()
    if engine.rounds_floats:
        if _is_rounded(confidence):
            exact["exact_confidence"] = repr(confidence)
        if not engine.compact and any(map(_is_rounded, axes._values)):
            exact["exact_axes"] = pack_axes(axes)
    return {
        "updated_at_unix_ms": snapshot.updated_at_unix_ms,
        "source": snapshot.source.value,
        "confidence": confidence,
        "schema_version": snapshot.schema_version,
        "axes": pack_axes(axes) if engine.compact else dict(axes),
        "kind": kind,
        **exact,
    }


def _is_rounded(value: float) -> bool:
    """Whether an engine that reads the digits and divides by a power of ten may miss a value from 0 to 1.

    It meets it where all its digits, of which there are at most 15, make an integer.
    """
    text = repr(value)
    return len(text) > len("0.123456789012345") or "e" in text


def decode_snapshot(payload: Mapping[str, Any]) -> StateSnapshot:
    """The snapshot that a payload of either form holds."""
    try:
        axes = payload.get("exact_axes", payload["axes"])
        return stored_snapshot(
            payload["user_id"],
            unpack_axes(axes) if isinstance(axes, str) else axes,
            payload["updated_at_unix_ms"],
            payload["source"],
            float(payload.get("exact_confidence", payload["confidence"])),
            payload["schema_version"],
        )
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise BackendError(
            f"a point does not hold a state snapshot: {one_line(str(error))[:200]}",
            backend="qdrant",
            operation="decode",
        ) from error


def payload_field(record: Record, field: str, kind: type[T]) -> T:
    """A field of a payload that need not hold a snapshot."""
    value = record.payload.get(field)
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    message = f"a point does not hold a state snapshot: it has no {field}"
    raise BackendError(message, backend="qdrant", operation="decode")


def _where(search: SearchRequest) -> Filter:
    # The latest point stands for its state in history too, which may lack it: see PointsBackend._lacking.
    must: list[Condition] = [] if search.history else [LATEST]
    if search.source is not None:
        must.append(Equal("source", search.source.value))
    if search.min_confidence is not None:
        must.append(Range("confidence", gte=search.min_confidence - LAST_BITS))
    if search.since is not None or search.until is not None:
        must.append(Range("updated_at_unix_ms", search.since, search.until))
    excluded = () if search.exclude_user_id is None else (Equal("user_id", search.exclude_user_id),)
    return Filter(tuple(must), excluded)


def recorded_schema(config: QdrantStoreConfig, found: Mapping[str, Any]) -> Schema:
    """The schema of a collection, if it is ours and what the configuration asks for."""
    place = f"{config.path or config.url}: collection {config.collection_name!r}"
    version, axes, vector_size = (found.get(key) for key in ("format_version", "axes", "vector_size"))
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise SchemaMismatchError(
            f"{place} has format {brief(version)}; this version reads up to {FORMAT_VERSION}: "
            "upgrade attuned-store"
        )
    try:
        recorded = check_axis_names(axes) or ()
        size = check_integer("vector_size", vector_size, max(1, len(recorded)), MAX_VECTOR_SIZE)
    except (TypeError, ValidationError):
        recorded, size = (), 0
    if version != FORMAT_VERSION or not recorded:
        raise SchemaMismatchError(f"{place} was not made by attuned_store; choose another collection_name")
    for name, asked, there in (
        ("axes", config.axes, recorded),
        ("vector_size", config.vector_size, size),
    ):
        if asked is not None and asked != there:
            raise SchemaMismatchError(f"{place} has {name} {there}; this store asks for {asked}")
    return Schema(recorded, size)


class _Reading(NamedTuple):
    """Where a reading of all states stands."""

    following: Cursor  # where the next page of users begins
    share: int  # how many users to read at once


class _Scan(NamedTuple):
    """Where a search for very many stands, which is ranked here, page by page."""

    following: Cursor  # where the next page begins
    runs: list[list[tuple[float, str]]]  # scores and ids of the pages so far, the best first in each
    ranked: Iterator[tuple[float, str]] | None  # all of them, once there are no more pages


class _Ranking(NamedTuple):
    """Where a long search stands."""

    ids: Sequence[str]  # of points, the most similar first
    position: int  # of the next of these to be looked at
    asked: int  # how many were asked for; 0 if there are no more


class PointsBackend(ABC):
    """The logic of the Qdrant stores that every engine shares.

    It awaits the engine and itself, nothing else.
    """

    schema: Schema
    batch_size = BATCH_SIZE
    most_ranked = _MOST_MATCHES  # of how many the engine is asked for the order at once
    is_open = False
    native_snapshots = False
    indexes: Mapping[str, IndexKind] = {
        "kind": "keyword",
        "updated_at_unix_ms": "integer",
        "source": "keyword",
    }

    def __init__(self, engine: Engine, config: QdrantStoreConfig, collection: str | None = None) -> None:
        self.engine = engine
        self.name = engine.name
        self.config = config
        self._collection = collection or config.collection_name
        self._retention = Retention.of(config)

    @abstractmethod
    def cached(self, user_id: str) -> StateSnapshot | None:
        """The latest snapshot where a cache has it. Safe without a lock: it only looks."""

    @abstractmethod
    async def find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        """The latest snapshots of those of these users who have one."""

    @abstractmethod
    async def history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        """See Backend.history."""

    @abstractmethod
    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """See Backend.write."""

    @abstractmethod
    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        """See Backend.write_expected."""

    @abstractmethod
    async def delete(self, user_id: str) -> bool:
        """See Backend.delete."""

    @abstractmethod
    async def stage(self, token: str) -> PointsBackend:
        """What is written to the backend that this gives takes the place of the contents when adopted."""

    @abstractmethod
    async def adopt(self, staged: PointsBackend) -> None:
        """Let what was staged take the place of the contents."""

    @abstractmethod
    async def discard(self, staged: PointsBackend) -> None:
        """Give up what was staged."""

    @abstractmethod
    async def add_axes(self, names: Sequence[str]) -> None:
        """See Backend.add_axes."""

    @abstractmethod
    async def _times_of(self, user_id: str) -> list[int]:
        """The times of a user's history, ascending, hidden ones included."""

    @abstractmethod
    async def _remove(self, times: Mapping[str, list[int]]) -> None:
        """Remove the oldest entries of histories, which are given."""

    async def _open_schema(self) -> Schema:
        """Open the collection, creating it where absent: with the axes that it had, if it has been open."""
        fresh = getattr(self, "schema", None) or Schema.of(self.config)
        wanted = {
            "format_version": FORMAT_VERSION,
            "axes": list(fresh.axes),
            "vector_size": fresh.vector_size,
        }
        accept = functools.partial(recorded_schema, self.config)
        collection = CollectionSpec(
            self._collection, fresh.vector_size, self.indexes, wanted, accept, tenant="user_id"
        )
        return accept(await self.engine.open(collection))

    @abstractmethod
    async def open(self) -> None:
        """See Backend.open."""

    def begin(self, operation: Callable[[Any], Coroutine[Any, Any, T]]) -> Coroutine[Any, Any, T]:
        """The coroutine of an operation; one that needs the collection opens it first."""
        return operation(self)

    async def get_latest(self, user_id: str) -> StateSnapshot | None:
        """The latest snapshot of a user, as a step of other operations."""
        return (await self.find([user_id])).get(user_id)

    async def search(
        self, request: SearchRequest, cursor: _Ranking | _Scan | None
    ) -> tuple[list[Match], Cursor]:
        """See Backend.search."""
        if request.history and not self._retention.maximum:
            return [], None
        if isinstance(cursor, _Scan):
            return await self._scan(request, cursor)
        return await self._rank(request, cursor)

    async def _rank(self, request: SearchRequest, cursor: _Ranking | None) -> tuple[list[Match], Cursor]:
        """A step of a search; where more are wanted than one piece may hold, their ids come first."""
        vector, where = self.schema.vector(request.axes), _where(request)
        wanted = 2 * request.limit + 1 if request.history else request.limit
        find = functools.partial(self.engine.search, self._collection, vector, where, tenant=request.user_id)
        if cursor is None:
            limit = min(wanted, max(4 * BATCH_SIZE, self.batch_size))
            records = await find(limit)
            matches = await self._matches(request, records)
            ended = len(records) < limit or records[-1].score < request.score_threshold
            if ended or len(matches) >= request.limit:
                return matches, None
            return [], _Ranking((), 0, limit)
        if cursor.position >= len(cursor.ids):  # some were not to be shown: look further
            limit = min(max(wanted, 4 * cursor.asked), _MOST_MATCHES)
            if limit > self.most_ranked:
                return await self._scan(request, _Scan(None, [], None))
            records = await find(limit, payload=False)
            least = request.score_threshold - 1e-4
            ids = [str(record.id) for record in records if record.score >= least]
            asked = 0 if len(ids) < limit or limit == _MOST_MATCHES else limit
            return [], _Ranking(ids, cursor.position, asked) if cursor.position < len(ids) else None
        position = cursor.position + self.batch_size
        records = await self.engine.retrieve(self._collection, cursor.ids[cursor.position : position])
        following = cursor._replace(position=position) if cursor.asked or position < len(cursor.ids) else None
        return await self._matches(request, records, vector), following

    async def _scan(self, request: SearchRequest, scan: _Scan) -> tuple[list[Match], Cursor]:
        """A step of a search for very many: to rank a page of all that match, then to read the best."""
        direction = self.schema.vector(request.axes)
        if scan.ranked is not None:
            ids = [point_id for _, point_id in itertools.islice(scan.ranked, self.batch_size)]
            records = await self.engine.retrieve(self._collection, ids) if ids else []
            return await self._matches(request, records, direction), scan if ids else None
        page = await self.engine.page(
            self._collection,
            _where(request),
            limit=_SCANNED,
            tenant=request.user_id,
            cursor=scan.following,
            payload=False,
        )
        ids = [str(record.id) for record in page.records]
        found = await self.engine.retrieve(self._collection, ids, payload=False, vector=True) if ids else []
        scored = ((sum(map(operator.mul, direction, each.vector)), str(each.id)) for each in found)
        least = request.score_threshold - 1e-4
        scan.runs.append(sorted((pair for pair in scored if pair[0] >= least), reverse=True))
        if page.cursor is not None:
            return [], scan._replace(following=page.cursor)
        return [], scan._replace(ranked=heapq.merge(*scan.runs, reverse=True))

    async def _matches(
        self, request: SearchRequest, records: Sequence[Record], direction: Sequence[float] | None = None
    ) -> list[Match]:
        """Those of these records that are to be shown; with a direction they are compared with it anew.

        A state may have been replaced since it was found: what is told of it is what it is now.
        """
        matches: list[Match] = []
        for record in await self._shown(records) if request.history else records:
            entry, score = decode_snapshot(record.payload), record.score
            if direction is not None:
                score = math.fsum(map(operator.mul, direction, self.schema.vector(entry.axes)))
            match = Match(entry, clamp_score(score))
            if match.score >= request.score_threshold and request.admits(entry):
                matches.append(match)
        return matches

    async def _shown(self, records: Sequence[Record]) -> list[Record]:
        """Those records of both kinds that history shows, each state once: one not yet trimmed holds more."""
        users = dict.fromkeys(payload_field(record, "user_id", str) for record in records)
        latest = await self._latest_times(list(users))
        overfull, cutoff = await self._overfull(latest), self._retention.cutoff()
        seen, shown = set[tuple[str, int]](), list[Record]()
        for record in records:
            user_id = payload_field(record, "user_id", str)
            time_ms = payload_field(record, "updated_at_unix_ms", int)
            newest = latest.get(user_id)
            if newest is None or time_ms < cutoff or (user_id, time_ms) in seen:
                continue
            if time_ms == newest and payload_field(record, "kind", str) != "latest":
                continue  # the latest point is what counts, should they differ
            if user_id in overfull:
                times = await self._timeline(user_id, newest)
                if time_ms not in times[self._retention.hidden(times) :]:
                    continue
            seen.add((user_id, time_ms))
            shown.append(record)
        return shown

    async def users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        """See Backend.users."""
        page = await self._latest_page(cursor)
        return [payload_field(record, "user_id", str) for record in page.records], page.cursor

    async def _latest_page(self, cursor: Cursor) -> Page:
        return await self.engine.page(
            self._collection, Filter((LATEST,)), limit=self.batch_size, cursor=cursor
        )

    async def _latest_times(self, user_ids: Sequence[str]) -> dict[str, int]:
        """The times of the latest snapshots of those of these users who have one."""
        return {user_id: time_of(latest) for user_id, latest in (await self.find(user_ids)).items()}

    async def _latest_times_page(self, cursor: Cursor) -> tuple[dict[str, int], Cursor]:
        """A page of users, with the times of their latest snapshots."""
        page = await self._latest_page(cursor)
        pairs = (
            (payload_field(record, "user_id", str), payload_field(record, "updated_at_unix_ms", int))
            for record in page.records
        )
        return dict(pairs), page.cursor

    async def _lacking(self, latest: Mapping[str, int]) -> set[str]:
        """The users whose history holds no copy of their latest snapshot, which counts as an entry of it.

        History was off when that was written, or all of it was pruned for its age.
        """
        ids = {make_point_id(user_id, time_ms): user_id for user_id, time_ms in latest.items()}
        there = await self.engine.retrieve(self._collection, list(ids), payload=False) if ids else []
        found = {str(record.id) for record in there}
        return {user_id for point_id, user_id in ids.items() if point_id not in found}

    async def count(self) -> int:
        """See Backend.count."""
        return await self.engine.count(self._collection, Filter((LATEST,)))

    async def count_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """See Backend.count_page."""
        if not self._retention.maximum:
            return 0, None
        latest, cursor = await self._latest_times_page(cursor)
        cutoff = self._retention.cutoff()
        counts = Counter(await self._count_by_user(list(latest), cutoff))
        counts.update(user_id for user_id in await self._lacking(latest) if latest[user_id] >= cutoff)
        return sum(min(self._retention.maximum, count) for count in counts.values()), cursor

    async def _count_by_user(self, user_ids: Sequence[str], least: int = 0) -> Mapping[str, int]:
        """How many entries the histories of users hold, from a time on."""
        if not user_ids:
            return {}
        where = Filter((HISTORY, Range("updated_at_unix_ms", least)) if least else (HISTORY,))
        return await self.engine.count_by(self._collection, "user_id", user_ids, where)

    async def prune_page(self, cursor: Cursor) -> tuple[int, Cursor]:
        """See Backend.prune_page."""
        latest, cursor = await self._latest_times_page(cursor)
        return await self._prune(latest), cursor

    async def _prune(self, latest: Mapping[str, int]) -> int:
        """Remove what the histories of some users hide."""
        hidden, removed = dict[str, list[int]](), 0
        for user_id in await self._overfull(latest):
            held, times = await self._times_of(user_id), await self._timeline(user_id, latest[user_id])
            # The newest entry is the latest snapshot, which stays.
            removed += min(len(held), self._retention.removable(times))
            if old := held[: self._retention.hidden(times)]:
                hidden[user_id] = old
        if hidden:
            await self._remove(hidden)
        return removed

    async def _overfull(self, latest: Mapping[str, int]) -> set[str]:
        """The users whose history holds entries that it does not show."""
        held = await self._count_by_user(list(latest))
        cutoff = self._retention.cutoff()
        shown = await self._count_by_user(list(latest), cutoff) if cutoff else held
        # With the latest, which one that lacks it would show first; it is never removed for that.
        full = self._retention.maximum - 1
        lacking = await self._lacking(
            {user_id: latest[user_id] for user_id, count in held.items() if count > full}
        )
        return {
            user_id
            for user_id, count in held.items()
            if count > min(full + (user_id not in lacking), shown.get(user_id, 0))
        }

    async def _timeline(self, user_id: str, latest_ms: int) -> list[int]:
        """The times of a user's states, ascending, hidden ones included, that of the latest among them."""
        times = await self._times_of(user_id)
        return times if latest_ms in times else sorted([*times, latest_ms])

    async def states(self, cursor: _Reading | None) -> StatesPage:
        """See Backend.states."""
        following, share = cursor or (None, 1)
        page = await self.engine.page(self._collection, Filter((LATEST,)), limit=share, cursor=following)
        latest = {payload_field(record, "user_id", str): record for record in page.records}
        found = await self._read(latest)
        if page.cursor is None:
            return found
        return found._replace(cursor=_Reading(page.cursor, self._share(len(latest), len(found.states))))

    def _share(self, users: int, states: int) -> int:
        """How many users to read at once, going by those just read."""
        return max(1, int(2 * self.batch_size * users / max(users, states, 1)))

    async def _read(self, latest: Mapping[str, Record]) -> StatesPage:
        """All states of users whose latest points have just been read."""
        if not (latest and self._retention.maximum):
            return StatesPage(self._states(latest, ()))
        where = Filter((AnyOf("user_id", list(latest)), HISTORY))
        return StatesPage(self._states(latest, await self._whole(where)))

    async def _whole(self, where: Filter) -> list[Record]:
        """All that matches, in one page where the engine allows that."""
        found, cursor = list[Record](), None
        while True:
            page = await self.engine.page(self._collection, where, limit=WHOLE_HISTORY, cursor=cursor)
            found += page.records
            if (cursor := page.cursor) is None:
                return found

    def _states(self, latest: Mapping[str, Record], histories: Iterable[Record]) -> list[StateSnapshot]:
        """What history shows of users, and the latest."""
        points = {
            user_id: {payload_field(record, "updated_at_unix_ms", int): record}
            for user_id, record in latest.items()
        }
        for record in histories:
            entries = points.get(payload_field(record, "user_id", str), {})
            entries.setdefault(payload_field(record, "updated_at_unix_ms", int), record)
        states = list[StateSnapshot]()
        for entries in points.values():
            times = sorted(entries)
            shown = times[min(self._retention.hidden(times), len(times) - 1) :]
            states += [decode_snapshot(entries[time_ms].payload) for time_ms in shown]
        return states

    async def look(self, seconds: float) -> Health:  # noqa: ARG002 - what is in the process is asked at once
        """How many users and how many points there are, found out within so many seconds."""
        users = await self.count()
        points = await self.engine.count(self._collection, Filter())
        return Health("healthy", self.engine.name, 0.0, users, points)

    async def _newest(self, user_id: str, wanted: int, least: int = 0) -> list[StateSnapshot]:
        """The newest entries of a history from a time on, newest first, in one request.

        The latest point is among them, hence one more, in case history does not hold it: a writer on a server
        died before it wrote the history, or history was off. Without it the user has been deleted, and what
        there is was left by a writer that did not know.
        """
        since = (Range("updated_at_unix_ms", least),) if least else ()
        page = await self.engine.page(
            self._collection,
            Filter(since),
            limit=wanted + 1,
            tenant=user_id,
            newest_by="updated_at_unix_ms",
        )
        if not any(payload_field(record, "kind", str) == "latest" for record in page.records):
            return []
        distinct: dict[int, Record] = {}
        for record in page.records:
            time_ms = payload_field(record, "updated_at_unix_ms", int)
            # The latest counts, if they differ.
            if time_ms not in distinct or payload_field(record, "kind", str) == "latest":
                distinct[time_ms] = record
        return [decode_snapshot(record.payload) for record in itertools.islice(distinct.values(), wanted)]

    async def _history_times(self, user_id: str) -> list[int]:
        page = await self.engine.page(
            self._collection,
            Filter((HISTORY,)),
            limit=WHOLE_HISTORY,
            tenant=user_id,
            newest_by="updated_at_unix_ms",
            payload=False,
        )
        return [payload_field(record, "updated_at_unix_ms", int) for record in reversed(page.records)]

    def _point(self, snapshot: StateSnapshot, suffix: str | int, **extra: Any) -> Point:
        kind = "latest" if suffix == "latest" else "history"
        payload = encode_snapshot(snapshot, kind, self.engine)
        return Point(
            make_point_id(snapshot.user_id, suffix),
            self.schema.vector(snapshot.axes),
            {**payload, **extra} if extra else payload,
            snapshot.user_id,
        )


def same_state(found: StateSnapshot | None, expected: StateSnapshot | None) -> bool:
    """Whether two snapshots are equal, but for the last bits of floats that went through a server."""
    if found is None or expected is None:
        return found is expected
    near = all(
        abs(found.axes[name] - value) <= LAST_BITS if name in found.axes else False
        for name, value in expected.axes.items()
    )
    alike = all(
        getattr(found, field) == getattr(expected, field)
        for field in ("user_id", "updated_at_unix_ms", "source", "schema_version")
    )
    confidence = abs(found.confidence - expected.confidence) <= LAST_BITS
    return near and alike and confidence and len(found.axes) == len(expected.axes)


# ------------------------------------------------------------------------------------------------------------
# attuned.states.owned
# States in a collection that this process alone writes to.
# ------------------------------------------------------------------------------------------------------------


MOST_RANKED = 5_000  # points; Edge takes 3 us for each, besides what looking at all takes


class RecentHistory(NamedTuple):
    """The newest snapshots of a user's history, newest first, and whether they are all."""

    snapshots: tuple[StateSnapshot, ...]
    complete: bool


def covers_window(recent: RecentHistory, window: HistoryWindow, least: int) -> bool:
    """Whether what is at hand of a history answers for a window, whose oldest time is ``least``."""
    if recent.complete or (recent.snapshots and recent.snapshots[-1].updated_at_unix_ms < least):
        return True
    return sum(entry.updated_at_unix_ms <= window.until for entry in recent.snapshots) >= window.limit


def keep_in_cache(cache: MutableMapping[str, T], key: str, value: T) -> None:
    """Put into a cache what fits into it at all."""
    try:
        cache[key] = value
    except ValueError:
        cache.pop(key, None)


class WriteDraft:
    """What becomes of a user's points in a write."""

    __slots__ = ("changed", "latest", "put", "removed", "times")

    def __init__(self, latest: StateSnapshot | None, times: list[int]) -> None:
        self.latest = latest
        self.times = times  # ascending, of the history
        self.put: dict[int, StateSnapshot] = {}
        self.removed: list[int] = []
        self.changed = False  # whether there is a new latest snapshot

    def add(self, snapshot: StateSnapshot, retention: Retention) -> None:
        """Take in a snapshot to be written."""
        time_ms = snapshot.updated_at_unix_ms
        if self.latest is None or time_ms >= self.latest.updated_at_unix_ms:
            self.latest, self.changed = snapshot, True
        position = bisect_left(self.times, time_ms)
        there = self.times[position : position + 1] == [time_ms]
        if retention.maximum == 0:
            if there:  # of when history was on: it must not come back in the place of this one
                self.removed.append(self.times.pop(position))
            return
        if not there:
            self.times.insert(position, time_ms)
        self.put[time_ms] = snapshot
        excess = retention.removable(self.times)
        for old in self.times[:excess]:
            self.put.pop(old, None)
            self.removed.append(old)
        del self.times[:excess]


class OwnedBackend(PointsBackend):
    """A collection that this process owns, in a directory.

    One coroutine runs at a time, alone. Besides the collection there are, bounded by ``cache_size``: the
    latest snapshots and recent history of the users last touched, and the times of their histories. An
    engine without indexes has the times of all users.
    """

    def __init__(
        self, engine: EmbeddedEngine, config: QdrantStoreConfig, collection: str | None = None
    ) -> None:
        super().__init__(engine, config, collection)
        self._files = engine
        if engine.indexed:  # one call of it holds up the process, the more the more it ranks
            self.most_ranked = MOST_RANKED
        self._beside = f".{self._collection}.restoring"  # the collection in which one is restored
        self._staged: Callable[[], OwnedBackend | None] = lambda: None
        self._latest: MutableMapping[str, StateSnapshot] = FIFOCache(config.cache_size)
        self._recent: MutableMapping[str, RecentHistory] = FIFOCache(
            config.cache_size, getsizeof=lambda recent: len(recent.snapshots) + 1
        )
        self._times: MutableMapping[str, list[int]] = FIFOCache(config.cache_size) if engine.indexed else {}

    async def open(self) -> None:
        """Open the collection, and learn what an engine without indexes cannot be asked."""
        if self.is_open:
            return
        await self._files.drop(self._beside)  # a process that was killed may have left it
        self.schema = await self._open_schema()
        if not self.engine.indexed:
            await self._learn_times()
        self.is_open = True

    async def _learn_times(self) -> None:
        cursor, histories = None, list[tuple[str, int]]()
        while True:
            page = await self.engine.page(self._collection, Filter(), limit=1_000, cursor=cursor)
            for record in page.records:
                user_id, kind = record.payload["user_id"], record.payload["kind"]
                if kind == "latest":
                    self._times[user_id] = []
                else:
                    histories.append((user_id, record.payload["updated_at_unix_ms"]))
            if (cursor := page.cursor) is None:
                break
        for user_id, time_ms in histories:
            if user_id in self._times:
                self._times[user_id].append(time_ms)
        for times in self._times.values():
            times.sort()

    # Reads

    def cached(self, user_id: str) -> StateSnapshot | None:
        """See PointsBackend.cached."""
        try:
            return self._latest[user_id]
        except (KeyError, TypeError):
            return None

    async def find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        """See Backend.find."""
        found = {user_id: latest for user_id in user_ids if (latest := self.cached(user_id)) is not None}
        missing = [make_point_id(user_id, "latest") for user_id in user_ids if user_id not in found]
        if missing:
            for record in await self.engine.retrieve(self._collection, missing):
                snapshot = decode_snapshot(record.payload)
                found[snapshot.user_id] = snapshot
                keep_in_cache(self._latest, snapshot.user_id, snapshot)
        return {user_id: found[user_id] for user_id in user_ids if user_id in found}

    async def history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        """See Backend.history."""
        least = max(window.since, self._retention.cutoff())
        recent = self._recent.get(user_id)
        if recent is None or not covers_window(recent, window, least):
            recent = await self._load_recent(user_id, window)
        chosen = (entry for entry in recent.snapshots if least <= entry.updated_at_unix_ms <= window.until)
        return list(itertools.islice(chosen, window.limit))

    async def _load_recent(self, user_id: str, window: HistoryWindow) -> RecentHistory:
        maximum = self._retention.maximum
        wanted = min(maximum, window.limit) if window.until == MAX_TIME_MS else maximum
        if wanted == 0:
            return RecentHistory((), complete=maximum == 0)
        if user_id in self._times or not self.engine.indexed:
            snapshots = await self._newest_by_id(user_id, wanted)
        else:
            snapshots = await self._newest(user_id, wanted)
        recent = RecentHistory(tuple(snapshots), complete=len(snapshots) < wanted or wanted == maximum)
        keep_in_cache(self._recent, user_id, recent)
        return recent

    async def _newest_by_id(self, user_id: str, wanted: int) -> list[StateSnapshot]:
        """As _newest, where the times are known."""
        latest, times = await self.get_latest(user_id), self._times.get(user_id, [])
        ids = [make_point_id(user_id, time_ms) for time_ms in times[-wanted:]]
        records = await self.engine.retrieve(self._collection, ids) if ids else []
        found = {time_of(entry): entry for entry in (decode_snapshot(record.payload) for record in records)}
        if latest is not None:  # which history lacks, or has as it was before, if it was off meanwhile
            found[time_of(latest)] = latest
        return sorted(found.values(), key=time_of, reverse=True)[:wanted]

    async def users(self, cursor: Cursor) -> tuple[list[str], Cursor]:
        """See Backend.users."""
        if self.engine.indexed:
            return await super().users(cursor)
        return page_of_ids(iter(list(self._times)) if cursor is None else cursor, self.batch_size)

    async def count(self) -> int:
        """See Backend.count."""
        return await super().count() if self.engine.indexed else len(self._times)

    async def _count_by_user(self, user_ids: Sequence[str], least: int = 0) -> Mapping[str, int]:
        if self.engine.indexed:
            return await super()._count_by_user(user_ids, least)
        histories = ((user_id, self._times.get(user_id, [])) for user_id in user_ids)
        return {user_id: len(times) - bisect_left(times, least) for user_id, times in histories}

    async def _latest_times_page(self, cursor: Cursor) -> tuple[dict[str, int], Cursor]:
        if self.engine.indexed:
            return await super()._latest_times_page(cursor)
        user_ids, cursor = await self.users(cursor)
        ids = [make_point_id(user_id, "latest") for user_id in user_ids]
        records = await self.engine.retrieve(self._collection, ids) if ids else []
        return {each.payload["user_id"]: each.payload["updated_at_unix_ms"] for each in records}, cursor

    async def _lacking(self, latest: Mapping[str, int]) -> set[str]:
        if self.engine.indexed:
            return await super()._lacking(latest)
        return {user_id for user_id, time_ms in latest.items() if time_ms not in self._times[user_id][-1:]}

    # Writes

    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """See Backend.write."""
        drafts = await self._drafts(dict.fromkeys(snapshot.user_id for snapshot in snapshots))
        for snapshot in snapshots:
            drafts[snapshot.user_id].add(snapshot, self._retention)
        points, deleted = list[Point](), list[str]()
        for user_id, draft in drafts.items():
            history = [self._point(entry, entry.updated_at_unix_ms) for entry in draft.put.values()]
            if draft.changed and draft.latest is not None:
                twin = history[-1] if draft.latest is next(reversed(draft.put.values()), None) else None
                points.append(self._latest_point(draft.latest, twin))
            points += history
            deleted += [make_point_id(user_id, time_ms) for time_ms in draft.removed]

        def remember() -> None:
            for user_id, draft in drafts.items():
                self._remember(user_id, draft)

        await self._change(drafts, points, deleted, remember)

    def _latest_point(self, latest: StateSnapshot, twin: Point | None) -> Point:
        """The latest point, made from the same snapshot's point in history where there is one."""
        if twin is None:
            return self._point(latest, "latest")
        payload = {**twin.payload, "kind": "latest"}
        return twin._replace(id=make_point_id(latest.user_id, "latest"), payload=payload)

    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        """See Backend.write_expected."""
        latest = await self.get_latest(snapshot.user_id)
        if latest != expected:
            raise conflict_error(snapshot.user_id, expected, latest)
        await self.write([snapshot])

    async def delete(self, user_id: str) -> bool:
        """See Backend.delete."""
        latest, times = await self.get_latest(user_id), await self._times_of(user_id)
        if latest is None and not times:
            return False
        ids = [make_point_id(user_id, "latest"), *(make_point_id(user_id, time_ms) for time_ms in times)]
        await self._change([user_id], [], ids, lambda: self._forget(user_id))
        return True

    async def _remove(self, times: Mapping[str, list[int]]) -> None:
        ids = [make_point_id(user_id, time_ms) for user_id, old in times.items() for time_ms in old]
        left = {user_id: (await self._times_of(user_id))[len(old) :] for user_id, old in times.items()}

        def remember() -> None:
            for user_id, still in left.items():
                keep_in_cache(self._times, user_id, still)
                self._recent.pop(user_id, None)

        await self._change(times, [], ids, remember)

    async def _drafts(self, user_ids: Iterable[str]) -> dict[str, WriteDraft]:
        """What is there of these users; the histories of new users are known to be empty."""
        latest = await self.find(list(user_ids))
        drafts = {user_id: WriteDraft(None, []) for user_id in user_ids}
        for user_id, snapshot in latest.items():
            draft = drafts[user_id] = WriteDraft(snapshot, list(await self._times_of(user_id)))
            time_ms = snapshot.updated_at_unix_ms
            if time_ms not in draft.times[-1:] and self._retention.maximum:  # history was off
                draft.times.append(time_ms)
                draft.put[time_ms] = snapshot
        return drafts

    async def _times_of(self, user_id: str) -> list[int]:
        times = self._times.get(user_id)
        if times is None:
            times = await self._learn(user_id) if self.engine.indexed else []
        return times

    async def _learn(self, user_id: str) -> list[int]:
        times = await self._history_times(user_id)
        keep_in_cache(self._times, user_id, times)
        return times

    async def _change(
        self,
        user_ids: Iterable[str],
        points: Sequence[Point],
        deleted: Sequence[str],
        remember: Callable[[], None],
    ) -> None:
        """Write, then bring what is known of these users up to date."""
        try:
            await self._files.apply(self._collection, [Put(points)], deleted)
            remember()
        except BaseException:
            # How much of it was done is unknown, also after an interrupt: look again at the next use.
            for user_id in user_ids:
                self._forget(user_id)
                await self._relearn(user_id)
            raise

    def _remember(self, user_id: str, draft: WriteDraft) -> None:
        keep_in_cache(self._times, user_id, draft.times)
        self._remember_recent(user_id, draft)
        if draft.latest is not None:
            keep_in_cache(
                self._latest, user_id, draft.latest
            )  # last: readers without the lock see it from here on

    def _remember_recent(self, user_id: str, draft: WriteDraft) -> None:
        recent = self._recent.pop(user_id, None)
        if recent is None:
            return
        newer = sorted(draft.put.values(), key=time_of, reverse=True)
        if not recent.snapshots or (
            newer and newer[-1].updated_at_unix_ms > recent.snapshots[0].updated_at_unix_ms
        ):
            kept = (*newer, *recent.snapshots)[: self._retention.maximum]
            keep_in_cache(self._recent, user_id, RecentHistory(kept, recent.complete))

    def _forget(self, user_id: str) -> None:
        self._latest.pop(user_id, None)
        self._recent.pop(user_id, None)
        self._times.pop(user_id, None)

    async def stage(self, token: str) -> PointsBackend:  # noqa: ARG002 - nothing of this one can be left
        """See PointsBackend.stage."""
        if self._staged() is not None:
            raise StoreError("a snapshot is being restored into this store already")
        axes = attrs.evolve(self.config, axes=self.schema.axes, vector_size=self.schema.vector_size)
        staged = OwnedBackend(self._files, axes, self._beside)
        await self._files.drop(self._beside)
        await staged.open()
        self._staged = weakref.ref(staged)  # weak: a task that was cancelled may never hear of it
        return staged

    async def adopt(self, staged: PointsBackend) -> None:
        """See PointsBackend.adopt."""
        held = self._staged()
        if held is None or staged is not held:
            raise StoreError("what was restored was given up meanwhile")
        try:
            await self._files.replace(self._collection, self._beside)
        except BaseException:
            await self._relearn_all()  # which of the two is there is unknown, after an interrupt too
            raise
        self._staged = lambda: None
        self.forget_everything()
        if not self.engine.indexed:
            self._times.update(held._times)

    async def discard(self, staged: PointsBackend) -> None:
        """See PointsBackend.discard."""
        if staged is self._staged():
            self._staged = lambda: None
            await self._files.drop(self._beside)

    async def add_axes(self, names: Sequence[str]) -> None:
        """See Backend.add_axes; where vectors have no room left, all is written anew beside this."""
        schema = self.schema.extended(names)
        if schema.vector_size == self.schema.vector_size:
            await self._files.describe(self._collection, {"axes": list(schema.axes)})
            self.schema = schema
            return
        if self._staged() is not None:
            raise StoreError("a snapshot is being restored into this store: add axes afterwards")
        config = attrs.evolve(self.config, axes=schema.axes, vector_size=schema.vector_size)
        grown = OwnedBackend(self._files, config, self._beside)
        try:
            await self._files.drop(self._beside)
            await grown.open()
            page = await self.states(None)
            await grown.write(page.states)
            while page.cursor is not None:
                page = await self.states(page.cursor)
                await grown.write(page.states)
            await self._files.replace(self._collection, self._beside, described=True)
        except BaseException:
            self.schema = (
                await self._open_schema()
            )  # which of the two is there is unknown, after an interrupt
            await self._relearn_all()
            await self._files.drop(self._beside)
            raise
        self.schema = schema
        self.forget_everything()
        if not self.engine.indexed:
            self._times.update(grown._times)

    async def _relearn_all(self) -> None:
        self.forget_everything()
        if not self.engine.indexed:
            await self._learn_times()

    async def states(self, cursor: Cursor) -> StatesPage:
        """See PointsBackend.states."""
        if self.engine.indexed:
            return await super().states(cursor)
        remaining: Iterator[str] = iter(list(self._times)) if cursor is None else cursor
        ids, latest, following = list[str](), dict[str, str](), None
        for user_id in remaining:
            latest[user_id] = make_point_id(user_id, "latest")
            ids += [make_point_id(user_id, time_ms) for time_ms in self._times.get(user_id, ())]
            if len(ids) + len(latest) >= 2 * self.batch_size:
                following = remaining
                break
        records = await self.engine.retrieve(self._collection, [*latest.values(), *ids])
        kinds: dict[str, list[Record]] = {"latest": [], "history": []}
        for record in records:
            kinds[payload_field(record, "kind", str)].append(record)
        heads = {payload_field(record, "user_id", str): record for record in kinds["latest"]}
        return StatesPage(self._states(heads, kinds["history"]), following)

    async def _relearn(self, user_id: str) -> None:
        """Take the times of a history from an engine that cannot be asked at every use."""
        if not self.engine.indexed and await self.get_latest(user_id) is not None:
            await self._learn(user_id)

    def forget_everything(self) -> None:
        """Empty the caches, so that no read is answered from them."""
        self._latest.clear()
        self._recent.clear()
        self._times.clear()


# ------------------------------------------------------------------------------------------------------------
# attuned.states.shared
# States in a collection on a server, which others write to as well.
# ------------------------------------------------------------------------------------------------------------


def _is_marked(collection: Mapping[str, Any]) -> bool:
    """Whether a description of a collection says that a restore is not complete."""
    config: Any = collection.get("config")
    try:
        return bool(config["metadata"]["restoring"])
    except (LookupError, TypeError):
        return False


# What a server rejects where a collection is not, or is not limited, as when it was opened.
_OTHER_COLLECTION = re.compile(r"dimension|vector|index|limit", re.IGNORECASE)


class _Pruning(NamedTuple):
    """Where a pruning stands."""

    following: Cursor  # where the next page of users begins, or of all entries
    entries: int  # of the users so far
    astray: bool  # whether entries are looked for whose users are gone


class SharedBackend(PointsBackend):
    """A collection on a server, which other processes write to as well; opened by the first operation.

    Many threads and tasks run at once, so that nothing here is relied on between two requests but what the
    server guards. Every latest point has a random ``revision``; one written conditionally also names what it
    ``replaces``: the revision before it and those that that one replaced, "" for none at all. So a writer
    whose own point is gone already still finds out whether it was ever there.
    """

    native_snapshots = True
    # Strict mode filters by nothing that has no index.
    indexes: Mapping[str, IndexKind] = {**PointsBackend.indexes, "confidence": "float", "restored": "keyword"}
    batch_size = 500  # a request holds more than a step in the process
    LOOK_AGAIN_S = 30.0
    READINGS = 3  # again, of users who move while they are read

    def __init__(self, engine: SharedEngine, config: QdrantStoreConfig) -> None:
        super().__init__(engine, config)
        self._server = engine
        self._known: Schema | None = None  # what it was opened with, as long as it is the same collection
        self._look_again_at = math.inf
        self._since_trim: dict[str, int] = {}
        self._latest: dict[str, tuple[float, StateSnapshot]] = {}

    async def begin(self, operation: Callable[[PointsBackend], Coroutine[Any, Any, T]]) -> T:
        """See PointsBackend.begin; a collection that somebody has dropped since is made again, once."""
        await self.open()
        schema = self.schema
        try:
            return await operation(self)
        except CollectionNotFoundError as error:
            if error.collection != self._collection:
                raise
        except BackendRejectedError as error:
            if _OTHER_COLLECTION.search(str(error)):
                self.is_open = False
                with contextlib.suppress(BackendError):  # the first one says more
                    await self.open()
            raise
        if self.schema is schema:  # else another thread or task has opened it again already
            self.is_open = False
        await self.open()
        return await operation(self)

    async def open(self) -> None:
        """Connect and open the collection, unless that has been done: one does, the others wait.

        Every so often it is looked at again, as others may have made it anew, with other axes.
        """
        if self.is_open and time.monotonic() > self._look_again_at:
            self.is_open = False
        while not self.is_open:
            await self._server.once(self._open)

    async def _open(self) -> None:
        if not self.is_open:
            found = await self._open_schema()
            self._check_same(found)
            self.schema = self._known = found
            self._look_again_at = time.monotonic() + self.LOOK_AGAIN_S
            self.is_open = True

    def _check_same(self, found: Schema) -> None:
        """Raise SchemaMismatchError where a collection is not that which was opened."""
        known = self._known
        if known is not None and (found.axes, found.vector_size) != (known.axes, known.vector_size):
            raise SchemaMismatchError(
                f"{self.config.url}: collection {self._collection!r} was made anew by others, with axes "
                f"{', '.join(found.axes)}: open the store again"
            )

    # Reads

    def cached(self, user_id: str) -> StateSnapshot | None:
        """See PointsBackend.cached."""
        if not self._latest or user_id.__class__ is not str:
            return None
        until, latest = self._latest.get(user_id, (0.0, None))
        return latest if time.monotonic() < until else None

    async def find(self, user_ids: Sequence[str]) -> dict[str, StateSnapshot]:
        """See Backend.find."""
        ids = [make_point_id(user_id, "latest") for user_id in user_ids]
        records = await self.engine.retrieve(self._collection, ids) if ids else []
        snapshots = [decode_snapshot(record.payload) for record in records]
        for snapshot in snapshots:
            self._keep(snapshot)
        found = {snapshot.user_id: snapshot for snapshot in snapshots}
        return {user_id: found[user_id] for user_id in user_ids if user_id in found}

    def _keep(self, snapshot: StateSnapshot) -> None:
        if self.config.cache_ttl and self.config.cache_size:
            if len(self._latest) >= self.config.cache_size:
                self._latest.clear()
            self._latest[snapshot.user_id] = (time.monotonic() + self.config.cache_ttl, snapshot)

    async def history(self, user_id: str, window: HistoryWindow) -> list[StateSnapshot]:
        """See Backend.history."""
        maximum = self._retention.maximum
        wanted = min(maximum, window.limit) if window.until == MAX_TIME_MS else maximum
        if wanted == 0 or window.limit == 0:
            return []
        newest = await self._newest(user_id, wanted, max(window.since, self._retention.cutoff()))
        return [entry for entry in newest if entry.updated_at_unix_ms <= window.until][: window.limit]

    async def _read(self, latest: Mapping[str, Record]) -> StatesPage:
        """See PointsBackend._read; what was read before says of whom, no more: others write meanwhile.

        All of a user is read in one request. Where that meets several shards, each at a moment of its own, it
        is read again until nothing has moved in between.
        """
        points = await self._points_of(list(latest))
        unsettled: list[str] = list(latest) if self._server.is_spread(self._collection) else []
        for _ in range(self.READINGS):
            if not unsettled:
                break
            again = await self._points_of(unsettled)
            moved = [user_id for user_id in unsettled if again[user_id] != points[user_id]]
            points |= again
            unsettled = moved
        newest = {
            user_id: record
            for user_id, records in points.items()
            for record in records.values()
            if payload_field(record, "kind", str) == "latest"
        }
        histories = [
            record
            for user_id in newest
            for record in points[user_id].values()
            if record is not newest[user_id]
        ]
        return StatesPage(self._states(newest, histories), unsettled=unsettled)

    async def _points_of(self, user_ids: Sequence[str]) -> dict[str, dict[object, Record]]:
        """All points of users, by user and id; without those of the history where none is kept."""
        points: dict[str, dict[object, Record]] = {user_id: {} for user_id in user_ids}
        if not user_ids:
            return points
        asked = AnyOf("user_id", user_ids)
        where = Filter((asked,) if self._retention.maximum else (asked, LATEST))
        for record in await self._whole(where):
            points.get(payload_field(record, "user_id", str), {})[record.id] = record
        return points

    async def look(self, seconds: float) -> Health:
        """See Backend.look."""
        status = await self.engine.status(self._collection, Filter((LATEST,)), seconds)
        if status.points is None:
            message = f"collection {self._collection!r} will be made by the first operation"
            return Health("healthy", self.engine.name, 0.0, 0, 0, message=message, version=status.version)
        collection: Any = status.details
        config: Any = collection.get("config") or {}
        self._check_same(recorded_schema(self.config, config.get("metadata") or {}))
        color = str(collection.get("status"))
        signs = [f"the collection is {color}"] if color != "green" else []
        optimizer = collection.get("optimizer_status", "ok")
        if optimizer != "ok":
            signs.append(f"the server cannot optimise: {optimizer}")
        replicas: list[tuple[int, int, str]] = collection.get("replicas", [])
        away = [
            f"shard {shard} on peer {peer} is {state}" for shard, peer, state in replicas if state != "Active"
        ]
        if away:
            signs.append(f"{len(away)} of {plural(len(replicas), 'replica')} not active: {', '.join(away)}")
        served = {shard for shard, _, state in replicas if state == "Active"}
        if lost := sorted({shard for shard, _, _ in replicas} - served):
            color = "red"
            signs.append(f"no replica is active of shard {', '.join(map(str, lost))}")
        if _is_marked(collection):
            signs.append("a restore of a snapshot is going on or was interrupted: restore it again")
        return Health(
            "unhealthy" if color == "red" else "degraded" if signs else "healthy",
            self.engine.name,
            0.0,
            status.matching,
            status.points,
            message="; ".join(signs),
            version=status.version,
            collection_status=str(collection.get("status")),
            indexed_vectors=count
            if isinstance(count := collection.get("indexed_vectors_count"), int)
            else None,
        )

    # Writes

    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """See Backend.write.

        The latest point unless there is a newer one, and the entries of history, whose ids hold their times.
        """
        newest: dict[str, StateSnapshot] = {}
        for snapshot in snapshots:
            known = newest.get(snapshot.user_id)
            if known is None or snapshot.updated_at_unix_ms >= known.updated_at_unix_ms:
                newest[snapshot.user_id] = snapshot
        entries = {(entry.user_id, entry.updated_at_unix_ms): entry for entry in snapshots}
        points = [self._latest_point(snapshot) for snapshot in newest.values()]
        if self._retention.maximum:
            points += [self._point(entry, time_ms) for (_, time_ms), entry in entries.items()]
        await self.engine.apply(self._collection, [Put(points, newest_by="updated_at_unix_ms")])
        entries_of = Counter(user_id for user_id, _ in entries)
        for user_id in newest:
            self._latest.pop(user_id, None)
            await self._trim_in_turn(user_id, entries_of[user_id])

    def _latest_point(self, snapshot: StateSnapshot, **extra: Any) -> Point:
        return self._point(snapshot, "latest", revision=secrets.token_hex(8), **extra)

    async def write_expected(self, snapshot: StateSnapshot, expected: StateSnapshot | None) -> None:
        """See Backend.write_expected."""
        self._latest.pop(snapshot.user_id, None)  # what was read for this may be stale
        before = await self._latest_payload(snapshot.user_id)
        found = None if before is None else decode_snapshot(before)
        if not same_state(found, expected):
            raise conflict_error(snapshot.user_id, expected, found)
        is_newest = found is None or snapshot.updated_at_unix_ms >= found.updated_at_unix_ms
        if is_newest:
            await self._replace(snapshot, before)
            self._latest.pop(snapshot.user_id, None)
        if self._retention.maximum:
            followed = found if before is not None and "replaces" in before else None
            with _after_write() if is_newest else contextlib.nullcontext():
                await self._enter_into_history(snapshot, followed)
        await self._trim_in_turn(snapshot.user_id)

    async def _enter_into_history(self, snapshot: StateSnapshot, followed: StateSnapshot | None) -> None:
        """Put the history point of a conditional write, and that of the conditional one that it followed.

        The writer of that one may have failed in between. Where the user has meanwhile been deleted, neither
        stays behind.
        """
        puts = [Put([self._point(snapshot, snapshot.updated_at_unix_ms)])]
        if followed is not None and followed.updated_at_unix_ms != snapshot.updated_at_unix_ms:
            puts.append(Put([self._point(followed, followed.updated_at_unix_ms)], mode="insert"))
        await self.engine.apply(self._collection, puts)
        try:
            if not await self._is_there(snapshot.user_id):
                ids = [point.id for put in puts for point in put.points]
                await self.engine.apply(self._collection, deletes=ids)
        except BackendError as error:  # what was to be written has been, and is not undone by raising this
            LOGGER.warning("looking after the history of a user failed: %s", error)

    async def _is_there(self, user_id: str) -> bool:
        ids = [make_point_id(user_id, "latest")]
        return bool(await self.engine.retrieve(self._collection, ids, payload=False))

    async def _replace(self, snapshot: StateSnapshot, before: Mapping[str, Any] | None) -> None:
        """Put the latest point in the place of another one, or of none; ConflictError where that failed."""
        replaced = "" if before is None else str(before.get("revision", ""))
        earlier = [] if before is None else list(before.get("replaces", ()))
        point = self._latest_point(snapshot, replaces=[replaced, *earlier][:LINEAGE])
        if before is None:
            put = Put([point], mode="insert")
        else:
            unchanged = Equal("revision", replaced) if replaced else Absent("revision")
            put = Put([point], mode="update", over=Filter((unchanged,)))
        await self.engine.apply(self._collection, [put])
        with _after_write():
            after = await self._latest_payload(snapshot.user_id) or {}
        seen = [after.get("revision"), *after.get("replaces", ())]
        if point.payload["revision"] in seen:
            return
        # Another one replaced what mine was to replace: mine can never happen. Without that, an unconditional
        # write or a deletion may have come after mine.
        raise _lost(snapshot.user_id, ambiguous=replaced not in seen[1:])

    async def _latest_payload(self, user_id: str) -> Mapping[str, Any] | None:
        records = await self.engine.retrieve(self._collection, [make_point_id(user_id, "latest")])
        return records[0].payload if records else None

    async def delete(self, user_id: str) -> bool:
        """See Backend.delete."""
        there = await self._is_there(user_id)
        await self.engine.apply(self._collection, deletes=Matching(Filter(), user_id))
        self._latest.pop(user_id, None)
        return there

    async def _trim_in_turn(self, user_id: str, entries: int = 1) -> None:
        """Every so many entries of a user, remove what its history does not show."""
        slack = max(16, self._retention.maximum // 4)
        written = self._since_trim.get(user_id, 0) + entries
        if written >= slack:
            written = 0
            await self._trim(user_id)
        if len(self._since_trim) >= MAX_COUNTED and user_id not in self._since_trim:
            self._since_trim.clear()
        self._since_trim[user_id] = written

    async def _trim(self, user_id: str) -> None:
        try:
            times = await self._times_of(user_id)
            if number := self._retention.hidden(times):
                await self._remove({user_id: times[:number]})
        except BackendError as error:  # what was to be written has been: its turn comes again
            LOGGER.warning("trimming the history of a user failed: %s", error)

    async def _times_of(self, user_id: str) -> list[int]:
        return await self._history_times(user_id)

    async def _remove(self, times: Mapping[str, list[int]]) -> None:
        ids = [make_point_id(user_id, time_ms) for user_id, old in times.items() for time_ms in old]
        await self.engine.apply(self._collection, deletes=ids)

    async def prune_page(self, cursor: _Pruning | None) -> tuple[int, Cursor]:
        """See Backend.prune_page; what is left of users who are gone comes at the end.

        A writer that knew nothing of a deletion, and died, has left that. Where there is none, the entries of
        those who are there are as many as there are at all.
        """
        following, entries, astray = cursor or _Pruning(None, 0, astray=False)
        if astray:
            return await self._prune_astray(following)
        latest, following = await self._latest_times_page(following)
        removed = await self._prune(latest)
        entries += sum((await self._count_by_user(list(latest))).values())
        if following is not None:
            return removed, _Pruning(following, entries, astray=False)
        if await self.engine.count(self._collection, Filter((HISTORY,))) <= entries:
            return removed, None
        return removed, _Pruning(None, 0, astray=True)

    async def _prune_astray(self, following: Cursor) -> tuple[int, Cursor]:
        """Remove the entries on a page of history whose users have no latest point."""
        page = await self.engine.page(
            self._collection, Filter((HISTORY,)), limit=self.batch_size, cursor=following
        )
        owners = {str(record.id): payload_field(record, "user_id", str) for record in page.records}
        there = await self.find(list(dict.fromkeys(owners.values())))
        astray = [point_id for point_id, user_id in owners.items() if user_id not in there]
        if astray:
            await self.engine.apply(self._collection, deletes=astray)
        return len(astray), None if page.cursor is None else _Pruning(page.cursor, 0, astray=True)

    async def create_native(self, order: SnapshotRequest, target: str) -> SnapshotReport | None:
        """Take a snapshot of the server's own making; None where a portable one will do and is needed.

        The server puts into it what one node has: of a collection that is spread over several, not all.
        """
        with NativeSnapshotWriter(order) as taking:
            collection = await self._server.resolve(self._collection)
            if not await self._server.is_whole(collection):
                if order.any_kind:
                    return None
                raise SnapshotError(
                    f"{target}: no node has all of the collection, and a native snapshot holds what one has; "
                    'take a "portable" one'
                )
            points = await self.engine.count(self._collection, Filter())
            try:
                offered = await self._server.create_snapshot(collection)
            except BackendRejectedError as error:
                if order.any_kind and error.status == HTTPStatus.FORBIDDEN:
                    return None  # whoever may only read may take a portable one
                raise
            try:
                await self._server.download_snapshot(collection, offered.name, taking)
                origin = SnapshotOrigin(target, self.engine.name, collection)
                report = await self._server.apart(lambda: taking.finish(origin, offered, points))
            finally:
                kept = "" if order.keep_remote else await self._delete_remote(collection, offered.name)
        return attrs.evolve(report, message=kept)

    async def _delete_remote(self, collection: str, name: str) -> str:
        """Remove a snapshot from the server; what there is to say where that fails."""
        try:
            await self._server.finish(self._server.delete_snapshot(collection, name))
        except BackendError as error:
            LOGGER.warning("the snapshot %s stays on the server: %s", name, error)
            return f"the snapshot stays on the server: {error}"
        return ""

    async def restore_native(self, path: Path, sha256: str) -> None:
        """Let the server replace the collection by what a snapshot of its own holds."""
        self.is_open, self._known = False, None
        self.forget_everything()
        await self._server.upload_snapshot(await self._server.resolve(self._collection), path, sha256)
        await self.open()
        if await self._server.mark_of(self._collection, "restoring") is not None:
            await self._server.mark(self._collection, "restoring", None)  # of one before, that was cut off

    async def stage(self, token: str) -> PointsBackend:
        """See PointsBackend.stage; the collection is changed in place, and marked until the end."""
        marked = await self._server.mark_of(self._collection, "restoring")
        await self._server.mark(self._collection, "restoring", token)
        return RestoringBackend(self, token, has_begun=marked is not None)

    async def adopt(self, staged: PointsBackend) -> None:
        """Remove what was not written by the restoring, then the mark, which stays where something lacks."""
        restoring = cast("RestoringBackend", staged)
        written = Equal("restored", restoring.token)
        await self._check_restored(restoring)
        await self.engine.apply(self._collection, deletes=Matching(Filter(must_not=(written,))))
        await self._check_restored(restoring)
        await self._server.mark(self._collection, "restoring", None)
        self.forget_everything()

    async def _check_restored(self, restoring: RestoringBackend) -> None:
        """Raise SnapshotError where others restored or wrote meanwhile."""
        if await self._server.mark_of(self._collection, "restoring") != restoring.token:
            message = "another snapshot was restored meanwhile, or the collection made anew"
        else:
            written = Filter((LATEST, Equal("restored", restoring.token)))
            if await self.engine.count(self._collection, written) == restoring.users_written:
                return
            message = "users were written to while it was restored"
        raise SnapshotError(
            f"collection {self._collection!r}: {message}; let nobody write, and restore again"
        )

    async def discard(self, staged: PointsBackend) -> None:
        """See PointsBackend.discard; the mark stays where the collection is not what it was."""
        self.forget_everything()
        if not cast("RestoringBackend", staged).has_begun:
            await self._server.mark(self._collection, "restoring", None)

    async def add_axes(self, names: Sequence[str]) -> None:  # noqa: ARG002
        """See Backend.add_axes: never."""
        raise StoreError(
            "alter_axes: others may hold the axes of a collection on a server; copy it: "
            "copy(source, target) into a store that was made with more axes"
        )

    def forget_everything(self) -> None:
        """Empty the cache."""
        self._latest.clear()


class RestoringBackend(SharedBackend):
    """Writes what a collection is to hold after a restore, over whatever is there.

    Every point carries a token of what is restored, so that those of a restore that was interrupted count
    when it is done again, and the others can be told from them.
    """

    def __init__(self, backend: SharedBackend, token: str, *, has_begun: bool) -> None:
        super().__init__(backend._server, backend.config)
        self.schema, self.is_open = backend.schema, True
        self.token = token
        self.users_written = 0  # written so far
        self.has_begun = has_begun  # to change the collection
        self._last = ""  # who may go on in the next batch

    async def begin(self, operation: Callable[[PointsBackend], Coroutine[Any, Any, T]]) -> T:
        """Without making the collection anew, should it have gone: it would lack what was written before."""
        return await operation(self)

    async def write(self, snapshots: Sequence[StateSnapshot]) -> None:
        """Put the snapshots, each user's together and in order: the last is the latest."""
        self.has_begun = True
        last = {snapshot.user_id: snapshot for snapshot in snapshots}
        points = [self._latest_point(snapshot, restored=self.token) for snapshot in last.values()]
        if self._retention.maximum:
            points += [self._point(each, each.updated_at_unix_ms, restored=self.token) for each in snapshots]
        await self.engine.apply(self._collection, [Put(points)])
        self.users_written += len(last) - (self._last in last)
        self._last = snapshots[-1].user_id


@contextlib.contextmanager
def _after_write() -> Generator[None]:
    """Let what fails say that something has been written already."""
    try:
        yield
    except BackendError as error:
        error.ambiguous = True
        raise


def _lost(user_id: str, *, ambiguous: bool) -> ConflictError:
    if ambiguous:
        message = (
            "was replaced while it was being written; the write may have happened: read before trying again"
        )
    else:
        message = "was written by someone else first; read it again and retry, or use update()"
    return ConflictError(f"user {short_id(user_id)!r}: the latest snapshot {message}", ambiguous=ambiguous)


# ------------------------------------------------------------------------------------------------------------
# attuned.states.places
# Where Qdrant backends are: in a directory of this process, or on a server over a connection.
#
# An embedded engine is opened once per real path and process, and shared by every store on it.
# ------------------------------------------------------------------------------------------------------------


class DirectoryPlace:
    """A directory, as one store has it open."""

    is_shown = True

    def __init__(self, config: QdrantStoreConfig, waits: Waits) -> None:
        path = str(absolute_path(cast("str", config.path)))  # of the current directory as it is now
        self._config, self._waits = attrs.evolve(config, path=path), waits
        self.location = cast("str", config.path)
        self.directory: Directory | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    @property
    def engine(self) -> str:
        """See Place.engine."""
        return "qdrant" if self.directory is None else self.directory.engine.name

    async def open(self) -> OwnedBackend:
        """See Place.open; waits for another process for as long as ``lock_timeout`` says."""
        if not self._waits.blocking:
            require_anyio("an asynchronous store on disk")
        deadline = time.monotonic() + self._config.lock_timeout
        while True:
            try:
                directory, backend = await self._acquire()
                break
            except StoreLockedError:
                if (left := deadline - time.monotonic()) <= 0:
                    raise
                await self._waits.sleep(min(0.05, left))
        if self.directory is not None:  # another task was faster
            directory.release()
            return backend
        self.directory = directory
        self._finalizer = weakref.finalize(self, _release_unclosed, directory)
        return backend

    async def _acquire(self) -> tuple[Directory, OwnedBackend]:
        """Open; what a worker thread opens for a task that was cancelled meanwhile is released."""
        guard, wanted, opened = threading.Lock(), [True], list[tuple[Directory, OwnedBackend]]()

        def acquire() -> None:
            found = open_directory(self._config)
            with guard:
                if wanted:
                    opened.append(found)
                    return
            found[0].release()

        try:
            await self._waits.call(acquire)
        except BaseException:
            with guard:
                wanted.clear()
            for directory, _ in opened:
                directory.release()
            raise
        return opened[0]

    async def drive(self, body: Coroutine[Any, Any, T], *, long: bool = False) -> T:
        """See Place.drive: alone, under the lock of the directory; what was written is then kept."""
        directory = cast("Directory", self.directory)
        try:
            if long or directory.blocks:
                answer, written = await self._waits.call(
                    functools.partial(directory.apply, body), directory.writer
                )
            else:
                await self._waits.pause_if_due()
                answer, written = directory.apply(body)
        finally:
            if inspect.getcoroutinestate(body) == inspect.CORO_CREATED:  # cancelled before it started
                with contextlib.suppress(ValueError):  # a worker has started it just now, and will close it
                    body.close()
        if written is not None:
            settle = functools.partial(directory.settle, written)
            await self._waits.call(settle, directory.flusher, lambda: written.ended)
        return answer

    async def with_engine(self, operation: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """See Place.with_engine."""
        return await self.drive(operation(cast("Engine", cast("Directory", self.directory).engine)))

    async def close(self) -> None:
        """See Place.close; also while being cancelled, as nobody would do it later."""
        finalizer, directory = self._finalizer, self.directory
        if finalizer is None or directory is None:
            return

        if self._waits.blocking:
            directory.check_free()

        def release() -> None:
            if finalizer.detach():  # once, by whoever comes first
                directory.release()

        try:
            await self._waits.shielded(self._waits.call(release))
        except BaseException:
            release()  # asyncio's own cancelling knows no shield
            raise

    def signs(self, latency_ms: float) -> list[str]:  # noqa: ARG002 - a disk has its moments
        """See Place.signs."""
        if self.directory is None:
            return []
        self.directory.check_there()
        return self.directory.engine.signs()


def open_directory(config: QdrantStoreConfig) -> tuple[Directory, OwnedBackend]:
    """The opened directory and the backend of a store; the directory is to be released."""
    path = os.path.realpath(absolute_path(cast("str", config.path)))
    kind = engine_class(Path(path), config)  # a missing library is found before anything is made
    # Stores share a directory and its engine: whether its requests are reported is up to the first of them.
    make_engine = functools.partial(
        kind,
        reporter=REPORTING.reporter(wanted=config.telemetry),
        min_free_bytes=config.min_free_bytes,
    )
    directory = OPEN.directory_at(path, config.durability, make_engine)
    try:
        _agree(path, "durability", directory.durability, config.durability)
        _agree(path, "min_free_bytes", directory.engine.min_free_bytes, config.min_free_bytes)
        with directory.opening:
            return directory, _backend_in(directory, config)
    except BaseException:
        directory.release()
        raise


def _backend_in(directory: Directory, config: QdrantStoreConfig) -> OwnedBackend:
    backend: OwnedBackend | None = directory.backends.get(config.collection_name)
    if backend is None:
        backend = OwnedBackend(cast("EmbeddedEngine", directory.engine), config)
        directory.drive(backend.open())
        directory.backends[config.collection_name] = backend
    for field in ("enable_history", "max_history_per_user", "history_retention_days"):
        _agree(directory.path, field, getattr(backend.config, field), getattr(config, field))
    for field, there in (("axes", backend.schema.axes), ("vector_size", backend.schema.vector_size)):
        _agree(directory.path, field, there, getattr(config, field) or there)
    if config.engine not in ("auto", directory.engine.name):
        _agree(directory.path, "engine", directory.engine.name, config.engine)
    return backend


def _agree(path: str, field: str, there: object, asked: object) -> None:
    if there != asked:
        raise SchemaMismatchError(
            f"{path}: already open in this process with {field}={there!r}; this store asks for {asked!r}"
        )


def _release_unclosed(held: Directory | Connection) -> None:
    """Release what a store holds that was collected, or left open at the end of the program.

    What was acknowledged is in the engine's log already: a failure here, as where the directory is gone,
    loses nothing, and there is nobody to raise it to.
    """
    try:
        held.release()
    except StoreError as error:
        LOGGER.info("closing %s failed: %s", held.path, error)


class Connection:
    """A connection to a server, of one store."""

    def __init__(self, config: QdrantStoreConfig, waits: Waits) -> None:
        self.path = cast("str", config.url)
        try:
            self.engine = ServerEngine(config, waits)
        except OSError as error:
            message = f"verify: {brief(config.verify)} is no usable certificate: {error}"
            if config.verify is True and (named := os.environ.get("SSL_CERT_FILE")):
                message = f"SSL_CERT_FILE: {brief(named)} is no usable certificate: {error}"
            raise ValidationError(message) from error
        self.backend = SharedBackend(self.engine, config)
        self.orphaned = False
        self._entered = threading.local()
        OPEN.others.add(self)

    def entering(self) -> Any:
        """A lock of this thread alone, which tells when a call comes in the middle of another one of it."""
        lock: Any = getattr(self._entered, "lock", None)
        if lock is None:
            lock = self._entered.lock = threading.RLock()
        if lock._is_owned():
            raise ReenteredError(self.path)
        return lock

    def release(self) -> None:
        """Close a blocking connection."""
        if not self.orphaned:
            run(self.engine.close())

    def abandon(self) -> None:
        """Make every use in a forked child an error: two processes cannot share a connection."""
        self.orphaned = True
        self.backend.forget_everything()


class ServerPlace:
    """A server, over the connection of one store, which is used first when it is needed."""

    engine = "server"
    is_shown = False
    SLOW_MS = 1_000.0  # a look that takes longer is a sign of trouble

    def __init__(self, config: QdrantStoreConfig, waits: Waits) -> None:
        self.location = cast("str", config.url)
        self._waits = waits
        parts = urlsplit(self.location)
        if config.api_key and parts.scheme == "http" and not is_loopback(str(parts.hostname)):
            message = f"the api key is sent in the clear to {parts.hostname}: use https"
            warnings.warn(message, UserWarning, stacklevel=4)
        self.connection = Connection(config, waits)
        # A connection of an event loop is closed with that.
        self._finalizer = (
            weakref.finalize(self, _release_unclosed, self.connection) if waits.blocking else None
        )

    async def open(self) -> SharedBackend:
        """See Place.open; nothing is sent yet."""
        return self.connection.backend

    async def drive(self, body: Coroutine[Any, Any, T], *, long: bool = False) -> T:  # noqa: ARG002 - it waits
        """See Place.drive; many run at once."""
        try:
            if self.connection.orphaned:
                raise forked_error(self.location)
            if not self._waits.blocking:
                return await body
            with self.connection.entering():
                return await body
        except StoreError as error:  # it may be of what the server says, as where it holds something else
            told: BaseException | None = error
            while told is not None:
                told.args = tuple(
                    self.connection.engine.errors.hide(each) if isinstance(each, str) else each
                    for each in told.args
                )
                told = told.__cause__
            raise
        finally:
            body.close()

    async def with_engine(self, operation: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """See Place.with_engine."""
        return await self.drive(operation(self.connection.engine))

    async def close(self) -> None:
        """See Place.close."""
        if self._waits.blocking:
            self.connection.entering()
        if self._finalizer is None or (self._finalizer.detach() and not self.connection.orphaned):
            await self._waits.shielded(self.connection.engine.close())

    def signs(self, latency_ms: float) -> list[str]:
        """See Place.signs."""
        state = self.connection.engine.resilience.state
        slow = [f"it took {latency_ms:.0f} ms to answer"] if latency_ms > self.SLOW_MS else []
        trouble = self.connection.engine.signs()
        return [*trouble, *([f"the circuit breaker is {state}"] if state != "closed" else []), *slow]


def blocking_twin(place: DirectoryPlace) -> DirectoryPlace:
    """The place of the same directory for what may not await, as a notebook's display."""
    twin = DirectoryPlace(place._config, BLOCKING)
    twin.directory = place.directory
    return twin


# ------------------------------------------------------------------------------------------------------------
# attuned.documents
# Documents of users: texts with fields and embeddings.
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# attuned.documents.embedding
# Embedders: what makes vectors of texts, in batches, whatever function the caller has for it.
#
# A batch that is refused is halved until the text that it is refused for stands alone; what fails for other
# reasons is tried again by the retry policy. No lock is held meanwhile, by the rule of those who call.
# ------------------------------------------------------------------------------------------------------------


_RAISED_CHARACTERS = 200  # of what a caller's function raised, in an error message
_WEAKEST, _STRONGEST = 1e-15, 1e15  # vectors, whose squares single precision still holds
_CANCELLED = 1e-6  # the length of a sum of unit vectors that is nothing but rounding
_CAUSES = 16  # at most, looked at behind an error
_NO_STATUS = 600
_PASSING = frozenset({408, 409, 425, 429})
_UNSUITABLE = frozenset(
    {401, 402, 404, 405, 407, 429, 501, 505}
)  # where they last: of any text, and for long
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError)
# Of httpx, openai, aiohttp and urllib3, which need not be installed; requests' are OSErrors.
_CONNECTION_ERRORS = frozenset(
    {"TransportError", "APIConnectionError", "ClientConnectionError", "ProtocolError"}
)
# Users in urls, queries, tokens in headers, keys.
_SECRET = re.compile(
    r"(?<=//)[^/\s@]+(?=@)|(?<=\?)[^\s'\"]+|(?<=bearer )\S+|(?<=basic )\S+|\bsk-[\w-]+", re.IGNORECASE
)
_WORD = re.compile(r"\w+")
_UP_TO_SPACE = re.compile(r".*\s", re.DOTALL)


class _NoVectorsError(Exception):
    """An answer is no vectors, whatever the texts were."""


class _OtherNumberError(Exception):
    """An answer has more or fewer vectors than there were texts."""


@attrs.frozen(repr=False)
class Embedder:
    """A function from texts to vectors, called in batches, and the name that its vectors go by.

    ``embed`` takes a list of texts and returns a vector for each, in order: lists, tuples, arrays, a matrix,
    or an iterator of them. It may be a coroutine function in an asynchronous store, where a plain one is
    called in a worker thread. ``name`` must change whenever the vectors would, as with another model; each
    has ``dimensions`` numbers. ``embed_query`` makes the vector of one text that is searched with, where
    that differs. At most ``batch_size`` texts are handed over in a call. A text with more than
    ``max_characters`` is cut into windows, at spaces where possible, and its vector is the mean of theirs
    (``windows="mean"``; None: no text is cut). What fails in passing is tried again as ``retry`` says: the
    HTTP status (408, 409, 425, 429, 5xx) and Retry-After of the client's errors count, timeouts and lost
    connections. A client that repeats requests itself is better told not to::

        client = openai.OpenAI(max_retries=0)
        Embedder(
            lambda texts: [each.embedding for each in client.embeddings.create(input=texts, model=name).data],
            name=name,
            dimensions=1536,
        )
        Embedder(SentenceTransformer(name).encode, name=name, dimensions=384)
        Embedder(fastembed.TextEmbedding(name).embed, name=name, dimensions=384)

    Raises ValidationError.
    """

    embed: Callable[[list[str]], Any]
    name: str = attrs.field(kw_only=True)
    dimensions: int = attrs.field(kw_only=True)
    embed_query: Callable[[str], Any] | None = attrs.field(default=None, kw_only=True)
    batch_size: int = attrs.field(default=50, kw_only=True)
    max_characters: int | None = attrs.field(default=None, kw_only=True)
    windows: Literal["mean"] = attrs.field(default="mean", kw_only=True)
    retry: RetryPolicy = attrs.field(factory=RetryPolicy, kw_only=True)

    _clock = staticmethod(time.monotonic)
    # So many in a row, and the rest of a call is not tried: texts that are refused, each for itself, and
    # batches that fail whatever their texts are.
    MAX_REFUSED: ClassVar[int] = 50
    MAX_FAILED: ClassVar[int] = 2

    def __attrs_post_init__(self) -> None:
        check_callable("embed", self.embed)
        check_user_id(self.name, "name")
        check_integer("dimensions", self.dimensions, 1, MAX_VECTOR_SIZE)
        if self.embed_query is not None:
            check_callable("embed_query", self.embed_query)
        check_integer("batch_size", self.batch_size, 1, MAX_INTEGER)
        if self.max_characters is not None:
            check_integer("max_characters", self.max_characters, 1, MAX_INTEGER)
        check_choice("windows", self.windows, ("mean",))
        if not isinstance(self.retry, RetryPolicy):
            raise ValidationError(f"retry: a RetryPolicy is needed, got {brief(self.retry)}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, dimensions={self.dimensions})"

    async def embed_texts(self, waits: Waits, texts: Sequence[str]) -> list[Sequence[float] | StoreError]:
        """A vector for each of the texts, in order, or the error of that text; ``waits`` is the store's.

        A vector has ``dimensions`` finite numbers and a direction. Equal texts are embedded once. The error
        is a ValidationError for a text that is empty or none, else an EmbeddingError. Raises ValidationError
        where the function is asynchronous and the store is not.
        """
        if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
            raise ValidationError(f"texts: a sequence of strings is needed, got {type_name(texts)}")
        checked = [_checked_text(text) for text in texts]
        cut = {text: self._cut(text) for text in checked if isinstance(text, str)}
        pieces = list(dict.fromkeys(itertools.chain.from_iterable(cut.values())))
        vectors = await self._embed_pieces(waits, pieces)
        whole = {text: self._mean([vectors[piece] for piece in of]) for text, of in cut.items()}
        return [whole[text] if isinstance(text, str) else text for text in checked]

    async def embed_query_text(self, waits: Waits, text: str) -> Sequence[float]:
        """The vector of a text that is searched with, by ``embed_query`` where there is one.

        ``waits`` is the store's. Raises ValidationError for a text that is empty or none, and EmbeddingError.
        """
        checked = _checked_text(text)
        if isinstance(checked, StoreError):
            raise checked
        pieces = self._cut(checked)
        found = list[Any]()
        if self.embed_query is None:
            vectors = await self._embed_pieces(waits, pieces)
            found = [vectors[piece] for piece in pieces]
        else:
            for piece in pieces:
                found += await self._ask(waits, self.embed_query, piece)
        vector = self._mean(found)
        if isinstance(vector, StoreError):
            raise vector
        return vector

    async def _embed_pieces(self, waits: Waits, pieces: list[str]) -> dict[str, Sequence[float] | StoreError]:
        """A vector or an error for each of some different texts that need not be cut."""
        found = dict[str, Sequence[float] | StoreError]()
        waiting = [
            pieces[start : start + self.batch_size] for start in range(0, len(pieces), self.batch_size)
        ]
        waiting.reverse()
        in_a_row = Counter[bool]()  # what failed since anything was embedded: texts refused, other failures
        while waiting:
            batch = waiting.pop()
            try:
                found.update(zip(batch, await self._ask(waits, self.embed, batch), strict=True))
                in_a_row.clear()
            except EmbeddingError as error:
                refused = not error.retryable and _may_be_the_text(error.__cause__)
                if refused and len(batch) > 1:
                    middle = len(batch) // 2
                    waiting += [batch[middle:], batch[:middle]]
                    continue
                found.update(dict.fromkeys(batch, error))
                in_a_row[refused] += 1
                if in_a_row[refused] == (self.MAX_REFUSED if refused else self.MAX_FAILED):
                    untried = self._error(
                        f"not tried, as others failed: {error}",
                        retryable=error.retryable,
                        status=error.status,
                    )
                    found.update(dict.fromkeys(itertools.chain(*waiting), untried))
                    break
        return found

    async def _ask(
        self, waits: Waits, function: Callable[[Any], Any], asked: list[str] | str
    ) -> list[Sequence[float] | StoreError]:
        """What a function makes of texts, or of one, tried again while it fails in passing."""
        begun = self._clock()
        for attempt in itertools.count():
            answer = await self._call(waits, function, asked)
            if not isinstance(answer, Exception):
                return answer
            passing = _passes(answer)
            wait = jittered_pause(self.retry, attempt, _asked_to_wait(answer))
            late = self._clock() + wait > begun + self.retry.deadline_s
            if not passing or late or attempt + 1 >= self.retry.attempts:
                texts = 1 if isinstance(asked, str) else len(asked)
                message = f"{plural(texts, 'text')}: {_said(answer)}"
                raise self._error(message, retryable=passing, status=_status(answer)) from answer
            await waits.sleep(wait)
        raise AssertionError("unreachable")  # pragma: no cover - count() does not end

    async def _call(
        self, waits: Waits, function: Callable[[Any], Any], asked: list[str] | str
    ) -> list[Sequence[float] | StoreError] | Exception:
        """What a function makes of texts, or what it raises: no StopIteration comes out of a coroutine.

        It is handed a list of its own: it may do with that what it likes.
        """
        of = asked if isinstance(asked, str) else [*asked]

        def call() -> tuple[Any]:  # since trio lets no thread return a coroutine
            try:
                answer = function(of)
                return (answer if inspect.isawaitable(answer) else self._vectors(answer, asked),)
            except Exception as error:  # noqa: BLE001 - it is judged by those who call
                return (error,)

        (answer,) = call() if _is_asynchronous(function) else await waits.call(call)
        if inspect.isawaitable(answer):
            if waits.blocking:
                if inspect.iscoroutine(answer):
                    answer.close()
                raise ValidationError(
                    f"embedder {self.name!r}: its function is asynchronous: give a plain one, or use an "
                    "asynchronous store"
                )
            try:
                return self._vectors(await answer, asked)
            except Exception as error:  # noqa: BLE001
                return error
        outcome: list[Sequence[float] | StoreError] | Exception = answer
        return outcome

    def _vectors(self, answer: Any, asked: list[str] | str) -> list[Sequence[float] | StoreError]:
        """The vectors of an answer, each checked for itself."""
        if isinstance(asked, str):
            return [self._vector(answer)]
        if hasattr(answer, "tolist"):
            answer = answer.tolist()  # a matrix all at once
        if issubclass(type(answer), str | bytes | Mapping) or not hasattr(answer, "__iter__"):
            raise _NoVectorsError(f"a vector for each text is needed, got {type_name(answer)}")
        texts = len(asked)
        vectors = list[Any](itertools.islice(answer, texts + 1))
        if len(vectors) != texts:
            got = str(len(vectors)) if len(vectors) < texts else "more"
            raise _OtherNumberError(
                f"{plural(texts, 'vector')} {'is' if texts == 1 else 'are'} needed, got {got}"
            )
        return [self._vector(vector) for vector in vectors]

    def _vector(self, vector: Any) -> Sequence[float] | StoreError:
        """One vector as a list of floats, or what is wrong with it."""
        needed = f"a vector of {plural(self.dimensions, 'number')} is needed, got"
        try:
            given = vector.tolist() if hasattr(vector, "tolist") else vector
            numbers = array("d", [*given]).tolist()
        except (TypeError, OverflowError):
            return self._error(f"{needed} {type_name(vector)}, which is not that")
        if len(numbers) != self.dimensions:
            return self._error(f"{needed} {len(numbers):,}")
        strength = math.hypot(*numbers)
        if not math.isfinite(strength):
            return self._error(f"{needed} one with NaN or infinity")
        if not _WEAKEST < strength < _STRONGEST:
            return self._error(f"{needed} one of length {strength:g}, which has no direction to compare")
        return numbers

    def _cut(self, text: str) -> list[str]:
        """The windows of a text, or the text itself where it is short enough."""
        most = self.max_characters
        return [text] if most is None or len(text) <= most else [*_windows(text.strip(), most)]

    def _mean(self, vectors: list[Sequence[float] | StoreError]) -> Sequence[float] | StoreError:
        """The mean direction of the windows of a text, as a unit vector; what a single one has, as it is."""
        total = [0.0] * self.dimensions
        for vector in vectors:
            if isinstance(vector, StoreError) or len(vectors) == 1:
                return vector
            strength = math.hypot(*vector)
            total = [before + value / strength for before, value in zip(total, vector, strict=True)]
        strength = math.hypot(*total)
        if strength < _CANCELLED:
            return self._error("the vectors of the windows of a text cancel each other out")
        return [value / strength for value in total]

    def _error(self, message: str, *, retryable: bool = False, status: int | None = None) -> EmbeddingError:
        return EmbeddingError(
            f"embedder {self.name!r}: {message}",
            backend="embedder",
            operation="embed",
            retryable=retryable,
            status=status,
        )


class HashingEmbedder(Embedder):
    """An embedder that needs nothing: the words of a text, and parts of them, hashed into ``dimensions``.

    It finds texts that share words or parts of words, as for examples, tests and first tries, and knows
    nothing of their meaning. Its vectors are the same in every process and on every platform.

    >>> embedder = HashingEmbedder(256)
    >>> note, query, other = embedder.embed(["Bought the breakout", "breakouts bought", "Rain all day"])
    >>> sum(map(float.__mul__, note, query)) > 0.5 > sum(map(float.__mul__, note, other))
    True

    Raises ValidationError.
    """

    def __init__(self, dimensions: int = 768) -> None:
        dimensions = check_integer("dimensions", dimensions, 1, MAX_VECTOR_SIZE)
        super().__init__(_Hashing(dimensions), name=f"hashing-{dimensions}", dimensions=dimensions)

    def __repr__(self) -> str:
        return f"HashingEmbedder({self.dimensions})"


@attrs.frozen
class _Hashing:
    """The hashing trick (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", 2009).

    Another way of doing it needs another name: vectors that are kept are compared with new ones.
    """

    dimensions: int

    def __call__(self, texts: list[str]) -> list[list[float]]:
        return [self._hash(unicodedata.normalize("NFKC", text).casefold()) for text in texts]

    def _hash(self, text: str) -> list[float]:
        vector = [0.0] * self.dimensions
        words = Counter(_WORD.findall(text) or text.split())
        for word, times in words.items():
            # The shorter a word, the less it says. Square roots are the same everywhere, to the last bit.
            weight = math.sqrt(times) * (math.sqrt(len(word)) - 0.9)
            self._add(vector, word, weight)
            ends = f"<{word}>"
            parts = [ends[at : at + size] for size in (3, 4, 5) for at in range(len(ends) - size + 1)]
            for part in parts:
                self._add(vector, part, weight / math.sqrt(len(parts)))
        strength = math.sqrt(math.fsum(value * value for value in vector))
        if not strength:  # what was added cancelled itself out
            self._add(vector, "", 1.0)
            strength = 1.0
        return [value / strength for value in vector]

    def _add(self, vector: list[float], feature: str, weight: float) -> None:
        number = zlib.crc32(feature.encode("utf-8", "surrogatepass"))
        vector[number % self.dimensions] += weight if number >> 31 else -weight


def _checked_text(text: object) -> str | ValidationError:
    """A text as a plain string, or what is wrong with it."""
    if not isinstance(text, str):
        return ValidationError(f"text: a string is needed, got {type_name(text)}")
    text = str.__str__(text)
    return text if text.strip() else ValidationError("text: it is empty; leave it out, or give it words")


def _windows(text: str, most: int) -> Iterator[str]:
    """Cut a text into about even parts of at most so many characters, at spaces where possible."""
    begin = 0
    while (left := len(text) - begin) > most:
        even = -(-left // -(-left // most))
        # None is shorter than half of that: in the mean each counts as much as any other.
        spaces = _UP_TO_SPACE.match(text, begin + even // 2, begin + even + 1)
        end = spaces.end() if spaces else begin + even
        if window := text[begin:end].strip():
            yield window
        begin = end
    yield text[begin:].strip()


def _is_asynchronous(function: Callable[..., Any]) -> bool:
    called = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it: clients wrap what happened, and so do callers."""
    for _ in range(_CAUSES):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _found(holder: object, name: str) -> Any:
    """An attribute of a foreign object, or None, whatever looking at it raises."""
    try:
        return getattr(holder, name, None)
    except Exception:  # noqa: BLE001
        return None


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of a client tells, where it tells one."""
    for each in _behind(error):
        for holder in (each, _found(each, "response")):
            for name in ("status_code", "status", "code"):
                value = _found(holder, name)
                if isinstance(value, int) and HTTPStatus.BAD_REQUEST <= value < _NO_STATUS:
                    return int(value)
    return None


def _asked_to_wait(error: BaseException) -> float:
    """The seconds that the headers of an answer ask to wait, or 0."""
    for each in _behind(error):
        for holder in (_found(each, "response"), each):
            headers = _found(holder, "headers")
            try:
                given = {str(name).lower(): str(value) for name, value in headers.items()}
            except Exception:  # noqa: BLE001, S112 - there are none
                continue
            milliseconds = parse_retry_after(given.get("retry-after-ms", ""))
            seconds = parse_retry_after(given.get("retry-after", ""))
            return milliseconds / 1_000 if milliseconds is not None else seconds or 0.0
    return 0.0


def _passes(error: BaseException) -> bool:
    """Whether the same request may succeed later: by the status of an answer, else where there was none."""
    status = _status(error)
    if status is None:
        return any(
            (isinstance(each, OSError) and not isinstance(each, _LASTING))
            or not _CONNECTION_ERRORS.isdisjoint(kind.__name__ for kind in type(each).__mro__)
            for each in _behind(error)
        )
    if any(_found(each, "code") == "insufficient_quota" for each in _behind(error)):
        return False  # of OpenAI's, with 429: until somebody pays
    return status in _PASSING or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _UNSUITABLE)


def _may_be_the_text(error: BaseException | None) -> bool:
    """Whether a failure that lasts may be that of one text in a batch."""
    if error is None or isinstance(error, _NoVectorsError | ImportError | OSError):
        return False
    return _status(error) not in _UNSUITABLE


def _said(error: BaseException) -> str:
    """What a caller's function raised, in one line that holds no secret."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - of a foreign class
        text = ""
    status = _status(error)
    kind = type(error).__name__ if not isinstance(error, _NoVectorsError | _OtherNumberError) else ""
    parts = [
        kind,
        f"HTTP {status}" if status else "",
        _SECRET.sub("***", one_line(text))[:_RAISED_CHARACTERS],
    ]
    return ": ".join(filter(None, parts))


# ------------------------------------------------------------------------------------------------------------
# attuned.documents.filters
# Filters of documents as callers write them, and the values of fields that they compare.
#
# A field with an index is kept beside the text of all fields, in the form that engines compare: a bool as 0
# or 1, a datetime as milliseconds, a float with the 15 digits that every engine reads alike.
# ------------------------------------------------------------------------------------------------------------


FieldKind = Literal["keyword", "integer", "float", "bool", "datetime", "text"]
Where: TypeAlias = Mapping[str, Any]

_FIELD_KINDS = get_args(FieldKind)
_BENEATH: Mapping[str, IndexKind] = {"bool": "integer", "datetime": "integer"}
_INDEX_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_RESERVED = {
    "user_id": "documents are reached by their user alone, with for_user",
    "updated_at": "the time of a document always has one",
    "or": "it is a word of filters",
}
_MAX_INDEXES = 64
_EXACT = 2**53  # integers up to it are compared as doubles without loss
_LARGEST = 1e290  # of floats
_BOUNDS = ("gt", "gte", "lt", "lte")
TIME_KEY = "updated_at_unix_ms"


def key_of(field: str) -> str:
    """Where the payload of a point holds the value of an indexed field."""
    return TIME_KEY if field == "updated_at" else f"field_{field}"


def check_indexes(indexes: object) -> dict[str, FieldKind]:
    """The fields to be indexed, with their kinds, as a caller gives them."""
    if not isinstance(indexes, Mapping):
        raise ValidationError(
            f"indexes: a mapping from field to kind is needed, such as {{'symbol': 'keyword'}}; "
            f"got {type_name(indexes)}"
        )
    found = dict(cast("Any", indexes))
    for name, kind in found.items():
        if not (isinstance(name, str) and _INDEX_NAME.fullmatch(name)):
            raise ValidationError(
                f"indexes: a name is 1 to 64 letters, digits, _ and -, with a letter or _ in front; "
                f"got {brief(name)}"
            )
        if name in _RESERVED:
            raise ValidationError(f"indexes: {name!r} cannot be one: {_RESERVED[name]}")
        if not (isinstance(kind, str) and kind in _FIELD_KINDS):
            raise ValidationError(
                f"indexes: {name}: one of {', '.join(_FIELD_KINDS)} is needed, got {brief(kind)}"
            )
    if len(found) > _MAX_INDEXES:
        raise ValidationError(f"indexes: at most {_MAX_INDEXES}, got {len(found)}")
    return {str.__str__(name): str.__str__(kind) for name, kind in found.items()}  # type: ignore[misc]


def engine_indexes(indexes: Mapping[str, FieldKind]) -> dict[str, IndexKind]:
    """The indexes of an engine for those of a collection."""
    return {key_of(name): _BENEATH.get(kind, cast("IndexKind", kind)) for name, kind in indexes.items()}


def indexed_values(
    fields: Mapping[str, Any], indexes: Mapping[str, FieldKind], *, strict: bool = True
) -> dict[str, Any]:
    """What the payload of a point holds of a document's fields for its indexes; None and [] are absent.

    Raises ValidationError for a value that is not of the kind of its index, which else is left out.
    """
    values: dict[str, Any] = {}
    for name, kind in indexes.items():
        value = fields.get(name)
        if value is None or value == []:
            continue
        place = f"fields[{name!r}]"
        try:
            if kind == "keyword" and isinstance(value, list):
                values[key_of(name)] = [_native(place, kind, each) for each in cast("Any", value)]
            else:
                values[key_of(name)] = _native(place, kind, value)
        except ValidationError:
            if strict:
                raise
    return values


def _native(field: str, kind: FieldKind, value: Any) -> str | int | float:
    """A value in the form in which engines compare it."""
    if isinstance(value, str) and kind in ("keyword", "text"):
        return str.__str__(value)
    if isinstance(value, bool) and kind == "bool":
        return int(value)
    if kind == "integer":
        return check_integer(field, value, -_EXACT, _EXACT)
    if kind == "float" and abs(number := check_number(field, value)) <= _LARGEST:
        return 0.0 if abs(number) < 1 / _LARGEST else float(f"{number:.15g}")
    if kind == "datetime":
        return _milliseconds(field, value)
    words = {"keyword": "a string", "text": "a string", "bool": "True or False"}
    wanted = words.get(kind, f"a number from -{_LARGEST} to {_LARGEST}")
    raise ValidationError(f"{field}: {wanted} is needed ({kind}), got {brief(value)}")


def _milliseconds(field: str, value: object) -> int:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValidationError(
                f"{field}: an aware datetime, its ISO 8601 text or milliseconds since 1970 are needed "
                f"(datetime), got {brief(value)}"
            ) from None
    return check_time_ms(value, field)


def compile_filter(where: Where | None, indexes: Mapping[str, FieldKind]) -> Filter:
    """The filter of an engine for what a caller asks for, as told at DocumentSet. Raises ValidationError."""
    known: dict[str, FieldKind] = {**indexes, "updated_at": "datetime"}
    return _Conditions(known, "where").add_all(where)


class _Conditions:
    """Conditions that must hold, and that must not, gathered of what is asked of fields."""

    def __init__(self, known: Mapping[str, FieldKind], place: str) -> None:
        self._known = known
        self._place = place
        self._must: list[Condition] = []
        self._must_not: list[Condition] = []

    def add_all(self, where: object) -> Filter:
        """The filter of a mapping; one that stands under "or" holds no other."""
        if where is not None and not isinstance(where, Mapping):
            raise ValidationError(
                f"{self._place}: a mapping from field to value is needed, such as {{'symbol': 'NQ'}}; "
                f"got {type_name(where)}"
            )
        for field, asked in cast("Any", where or {}).items():
            if field != "or":
                self._add(field, asked)
            elif self._place != "where":
                raise ValidationError("where: 'or' stands at the top alone, not within another one")
            elif isinstance(asked, str) or not isinstance(asked, Sequence):
                raise ValidationError(f"where: 'or' takes a list of mappings, got {type_name(asked)}")
            else:
                branches = cast("Any", asked)
                self._must.append(
                    Or([_Conditions(self._known, "where['or']").add_all(each) for each in branches])
                )
        return Filter(tuple(self._must), tuple(self._must_not))

    def _add(self, field: object, asked: Any) -> None:
        if not isinstance(field, str) or field not in self._known:
            raise _unknown_field(field, self._known)
        kind, key, place = self._known[field], key_of(field), f"{self._place}[{field!r}]"
        if asked is None:
            self._must.append(Absent(key))
        elif isinstance(asked, Mapping):
            self._add_operators(key, kind, place, cast("Any", asked))
        elif isinstance(asked, list | tuple | set | frozenset):
            values = cast("Any", asked)
            self._must.append(_any_of(key, kind, [_comparable(place, kind, each) for each in values]))
        else:
            self._must.append(_equal(key, kind, _comparable(place, kind, asked)))

    def _add_operators(self, key: str, kind: FieldKind, place: str, asked: Mapping[Any, Any]) -> None:
        bounds: dict[str, float] = {}
        for word, operand in asked.items():
            if word == "ne":
                unwanted = (
                    _equal(key, kind, _comparable(place, kind, operand)) if operand is not None else None
                )
                self._must_not.append(unwanted or Absent(key))
            elif word == "text" and kind == "text":
                if not isinstance(operand, str):
                    raise ValidationError(f"{place}: text: a string is needed, got {brief(operand)}")
                self._must.append(Text(key, str.__str__(operand)))
            elif word in _BOUNDS and kind in ("integer", "float", "datetime"):
                bounds[word] = _bound(place, kind, operand)
            elif word in (*_BOUNDS, "text"):
                needed = "a text" if word == "text" else "an integer, float or datetime"
                raise ValidationError(f"{place}: {word} needs {needed} index, this one is a {kind}")
            else:
                raise _operator_error(place, brief(word))
        if bounds:
            self._must.append(_range(key, kind, **bounds))
        if not asked:
            raise _operator_error(place, "none")


def _operator_error(place: str, got: str) -> ValidationError:
    return ValidationError(f"{place}: gt, gte, lt, lte, ne or text are needed, got {got}")


def _bound(place: str, kind: FieldKind, value: object) -> float:
    if kind == "integer" and isinstance(value, float) and math.isfinite(value):
        return float(value)  # between two integers, say
    return cast("float", _native(place, kind, value))


def _comparable(place: str, kind: FieldKind, value: object) -> Any:
    if kind == "text":
        raise ValidationError(f"{place}: a text index is searched for words: {{'text': ...}}, or None")
    if isinstance(value, float) and kind == "integer" and value.is_integer():
        value = int(value)
    return _native(place, kind, value)


def _equal(key: str, kind: FieldKind, value: Any) -> Condition:
    return _range(key, kind, gte=value, lte=value) if kind == "float" else Equal(key, value)


def _any_of(key: str, kind: FieldKind, values: Sequence[Any]) -> Condition:
    if kind == "float":
        return Or([Filter((_equal(key, kind, value),)) for value in values])
    return AnyOf(key, values)


def _range(key: str, kind: FieldKind, **bounds: float) -> Range:
    """A range; one of floats allows for the last bits that an engine may change.

    Two numbers of 15 digits are further apart than that, so that nothing else is let in or kept out.
    """
    if kind == "float":
        for operator, outward in (("gte", -math.inf), ("lt", -math.inf), ("lte", math.inf), ("gt", math.inf)):
            if operator in bounds:
                bounds[operator] = math.nextafter(math.nextafter(bounds[operator], outward), outward)
    return Range(key, **bounds)


def _unknown_field(field: object, known: Mapping[str, FieldKind]) -> ValidationError:
    import difflib

    near = difflib.get_close_matches(field, known, 1) if isinstance(field, str) else []
    hint = f", did you mean {near[0]!r}?" if near else ";"
    names = ", ".join(sorted(known))
    return ValidationError(
        f"where: {brief(field)} is not among the indexes{hint} the collection has {names}; "
        "add it with indexes= when the collection is opened"
    )


# ------------------------------------------------------------------------------------------------------------
# attuned.documents.values
# The values of documents: what is kept, what is found, and what became of it.
# ------------------------------------------------------------------------------------------------------------


MAX_TEXT_BYTES = 1 << 20
MAX_FIELDS_BYTES = 64 << 10
_MAX_NESTING = 32  # of nested fields
# What a subclass, such as an enum, says of itself is not kept.
_PLAIN_FORMS: tuple[tuple[type, Any], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)
_NO_JSON = (math.inf, -math.inf)
_SHOWN_TEXT = 40  # of a text in a repr
_MAX_TTL_S = 1e10  # some three centuries


def check_ttl(ttl: object) -> float | None:
    """For how many seconds documents are kept, in whole milliseconds; None for ever."""
    if ttl is None:
        return None
    check_positive("ttl", ttl)
    milliseconds = round(float(cast("float", ttl)) * 1000)
    if not 1 <= milliseconds <= _MAX_TTL_S * 1000:
        raise ValidationError(f"ttl: from 0.001 to {_MAX_TTL_S:.0f} seconds are needed, got {brief(ttl)}")
    return milliseconds / 1000


def _check_document_text(text: object) -> str:
    if not isinstance(text, str):
        raise ValidationError(f"text: a string is needed, got {type_name(text)}")
    text = str.__str__(text)
    if len(text) > MAX_TEXT_BYTES // 4 or not text.isascii():
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise ValidationError("text: a lone surrogate is not valid text") from None
        if size > MAX_TEXT_BYTES:
            raise ValidationError(f"text: at most {MAX_TEXT_BYTES:,} bytes of UTF-8, got {size:,}")
    return text


def _check_fields(fields: object) -> Mapping[str, Any]:
    """Fields as plain JSON that shares nothing with what was given."""
    if not isinstance(fields, Mapping):
        raise ValidationError(f"fields: a mapping from name to value is needed, got {type_name(fields)}")
    plain = _plain(cast("Any", fields), "fields", 0)
    try:
        size = len(fields_text(plain).encode())
    except UnicodeEncodeError:
        raise ValidationError("fields: a lone surrogate is not valid text") from None
    if size > MAX_FIELDS_BYTES:
        raise ValidationError(f"fields: at most {MAX_FIELDS_BYTES:,} bytes of JSON, got {size:,}")
    return MappingProxyType(plain)


def _plain(value: Any, place: str, depth: int) -> Any:
    """JSON made of plain types alone; a datetime becomes its text in ISO 8601."""
    if value is None or isinstance(value, bool):
        return value
    for kind, plain in _PLAIN_FORMS:
        if isinstance(value, kind) and value not in _NO_JSON and value == value:  # noqa: PLR0124 - NaN is not
            return plain(value)
    if isinstance(value, datetime):
        check_time_ms(value, place)
        return value.isoformat()
    if isinstance(value, Mapping) and depth < _MAX_NESTING:
        return {
            _plain_name(name, place): _plain(each, f"{place}[{name!r}]", depth + 1)
            for name, each in cast("Any", value).items()
        }
    if isinstance(value, list | tuple) and depth < _MAX_NESTING:
        return [_plain(each, place, depth + 1) for each in cast("Any", value)]
    raise ValidationError(
        f"{place}: JSON is needed (None, bools, numbers but NaN and infinity, strings, datetimes, lists and "
        f"mappings, nested up to {_MAX_NESTING} deep), got {brief(cast('Any', value))}"
    )


def _plain_name(name: object, place: str) -> str:
    if isinstance(name, str):
        return str.__str__(name)
    raise ValidationError(f"{place}: names are strings, got {brief(name)}")


def fields_text(fields: Mapping[str, Any]) -> str:
    """Fields as they are kept: JSON, in the order in which they were given."""
    try:
        return json.dumps(dict(fields), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:  # an integer with more digits than Python writes
        raise ValidationError(f"fields: {error}") from None


@attrs.frozen(init=False)
class Document:
    """A text of a user, with fields to filter by.

    ``id`` is the user's own name for it, 1 to 256 bytes; ``text`` what is embedded, at most 1 MiB;
    ``fields`` JSON, at most 64 KiB, which comes back as it was given (a datetime as its ISO 8601 text, a
    tuple as a list); ``updated_at`` an aware datetime or milliseconds since 1970, by default now, kept in
    whole milliseconds, UTC; ``ttl`` for how many seconds from then it is kept, None as long as its collection
    says. ``user_id`` is whose it is, once it has been read: "" of what everybody may read. Raises
    ValidationError.

    >>> Document("t-17", "Bought the breakout", {"symbol": "NQ", "won": True}).fields["symbol"]
    'NQ'
    """

    id: str
    text: str
    fields: Mapping[str, Any] = attrs.field(hash=False)
    updated_at: datetime
    ttl: float | None
    user_id: str | None = attrs.field(eq=False)
    _dated: bool = attrs.field(eq=False)  # its time was given

    def __init__(
        self,
        id: str,  # noqa: A002 - what it is called everywhere
        text: str = "",
        fields: Mapping[str, Any] = MappingProxyType({}),
        updated_at: int | datetime | None = None,
        ttl: float | None = None,
    ) -> None:
        time_ms = wall_clock.now_ms() if updated_at is None else check_time_ms(updated_at, "updated_at")
        cast("Any", self).__attrs_init__(
            check_user_id(id, "id"),
            _check_document_text(text),
            _check_fields(fields),
            UNIX_EPOCH + timedelta(milliseconds=time_ms),
            check_ttl(ttl),
            None,
            updated_at is not None,
        )

    @property
    def updated_at_unix_ms(self) -> int:
        """The time in milliseconds since 1970, UTC."""
        return (self.updated_at - UNIX_EPOCH) // timedelta(milliseconds=1)

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN_TEXT else self.text[:_SHOWN_TEXT] + "…"
        whose = {None: "", "": ", shared"}.get(self.user_id, f", user {short_id(self.user_id or '')!r}")
        return (
            f"Document({self.id!r}, {text!r}, {brief(dict(self.fields))}, {iso_time(self.updated_at)}{whose})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (
            self.id,
            self.text,
            dict(self.fields),
            self.updated_at,
            self.ttl,
            self.user_id,
            self._dated,
        )
        return stored_document, arguments

    def __copy__(self) -> Document:
        return self

    def __deepcopy__(self, memo: object) -> Document:
        return self


def stored_document(  # noqa: PLR0917 - the fields of a document
    id: str,  # noqa: A002
    text: str,
    fields: dict[str, Any],
    updated_at: datetime,
    ttl: float | None,
    user_id: str | None,
    dated: bool = True,  # noqa: FBT001, FBT002 - as pickle hands it on
) -> Document:
    """A document that is read back, which was checked when it was made."""
    document = object.__new__(Document)
    cast("Any", document).__attrs_init__(id, text, MappingProxyType(fields), updated_at, ttl, user_id, dated)
    return document


def text_hash(text: str) -> str:
    """What tells whether a text is still the same: 128 bits of BLAKE2b."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@attrs.frozen
class DocumentMatch:
    """A result of a search: the document and its cosine similarity to the query, from -1 to 1."""

    document: Document
    score: float


@attrs.frozen(kw_only=True)
class UpsertReport:
    """What became of documents that were written; each counts in one place.

    ``embedded``: written with a new embedding, or, in a collection without an embedder, as a new text;
    ``moved``: the text was the same, its fields or time were not; ``unchanged``: nothing was to be done;
    ``failed``: the errors of those that were not written, by id.
    """

    embedded: int = 0
    moved: int = 0
    unchanged: int = 0
    failed: Mapping[str, StoreError] = attrs.field(factory=dict[str, "StoreError"])


@attrs.frozen(kw_only=True)
class CollectionInfo:
    """What a store says of one of its collections.

    ``documents`` is how many there are, of all users, expired ones that are not yet removed included;
    ``indexes`` the fields that are filtered by; ``embedder`` the name of what its texts were embedded with
    and ``dimensions`` how long its vectors are, None without one.
    """

    name: str
    documents: int
    indexes: Mapping[str, str]
    embedder: str | None
    dimensions: int | None
    ttl: float | None


@attrs.frozen(kw_only=True)
class ErasureReport:
    """What a store held of a user, and holds no more.

    ``states``: whether there were any; ``documents``: how many in each collection that had some.
    """

    states: bool
    documents: Mapping[str, int]


# ------------------------------------------------------------------------------------------------------------
# attuned.documents.points
# Documents as points: what a point holds of one, and what a collection records of itself.
# ------------------------------------------------------------------------------------------------------------


DOCUMENTS_FORMAT = 1
SHARED = ""  # the user of what everybody may read
_EXPIRES_KEY, EMBEDDER_KEY, REVISION_KEY = "expires_at_unix_ms", "embedder", "revision"
OWN_INDEXES: Mapping[str, IndexKind] = {
    TIME_KEY: "integer",
    _EXPIRES_KEY: "integer",
    EMBEDDER_KEY: "keyword",
}
NO_VECTOR = (1.0,)  # of a document in a collection without an embedder, as every point has one


def document_point_id(user_id: str, document_id: str) -> str:
    """The id of a document's point. As it counts the characters of one id, no two pairs are joined alike."""
    return make_uuid(DOCUMENTS_NAMESPACE, f"{len(user_id)}:{user_id}{document_id}")


@attrs.frozen
class CollectionSettings:
    """What a collection was made with, as its metadata records it."""

    indexes: Mapping[str, FieldKind]
    embedder: str | None
    vector_size: int
    ttl: float | None
    pending: Sequence[str] = ()  # indexes that documents written before may lack

    def metadata(self) -> dict[str, Any]:
        """See CollectionSpec."""
        recorded = attrs.asdict(self, recurse=False)
        return {"format_version": DOCUMENTS_FORMAT, "kind": "documents", **recorded}

    @classmethod
    def of(cls, metadata: Mapping[str, Any], place: str) -> CollectionSettings:
        """What metadata records, or SchemaMismatchError."""
        version = metadata.get("format_version")
        if metadata.get("kind") != "documents" or not isinstance(version, int):
            raise SchemaMismatchError(f"{place} does not hold documents; choose another name")
        if version > DOCUMENTS_FORMAT:
            raise SchemaMismatchError(
                f"{place} has format {version}; this version reads up to {DOCUMENTS_FORMAT}: "
                "upgrade attuned-store"
            )
        return cls(
            dict(metadata["indexes"]),
            metadata.get("embedder"),
            metadata["vector_size"],
            metadata.get("ttl"),
            tuple(metadata.get("pending") or ()),
        )


class OutdatedError(Exception):
    """A collection was amended in this process since it was opened: it is opened again."""


class OpenCollection(NamedTuple):
    """A collection as it was found when it was opened."""

    settings: CollectionSettings
    amendments: int  # of its engine then

    def alive(self, where: Filter) -> Filter:
        """Those that match a filter and have not expired."""
        now, ttl = wall_clock.now_ms(), self.settings.ttl
        if ttl is None:
            return where._replace(must_not=(*where.must_not, Range(_EXPIRES_KEY, lte=now)))
        lasting = Filter((Range(_EXPIRES_KEY, gt=now),))
        young = Filter((Range(TIME_KEY, gt=now - round(ttl * 1000)), Absent(_EXPIRES_KEY)))
        return where._replace(must=(*where.must, Or([lasting, young])))

    def expired(self) -> Filter:
        """Those that have."""
        now, ttl = wall_clock.now_ms(), self.settings.ttl
        ended = Filter((Range(_EXPIRES_KEY, lte=now),))
        if ttl is None:
            return ended
        old = Filter((Range(TIME_KEY, lte=now - round(ttl * 1000)), Absent(_EXPIRES_KEY)))
        return Filter((Or([ended, old]),))


class Draft(NamedTuple):
    """A document to be written, and what its point holds of it."""

    document: Document
    payload: dict[str, Any]

    @classmethod
    def of(cls, document: object, settings: CollectionSettings, embedder: str | None) -> Draft:
        """What is written of a document that a caller gave; raises ValidationError."""
        if not isinstance(document, Document):
            raise ValidationError(f"documents: a Document is needed, got {type_name(document)}")
        payload: dict[str, Any] = {
            "id": document.id,
            "text": document.text,
            "hash": text_hash(document.text),
            "fields": fields_text(document.fields),
            TIME_KEY: document.updated_at_unix_ms,
            **indexed_values(document.fields, settings.indexes),
        }
        if document.ttl is not None:
            payload["ttl_ms"] = round(document.ttl * 1000)
            payload[_EXPIRES_KEY] = payload[TIME_KEY] + payload["ttl_ms"]
        if embedder is not None:
            payload[EMBEDDER_KEY] = embedder
        return cls(document, payload)

    def has_text_of(self, found: Mapping[str, Any]) -> bool:
        """Whether a point holds the same text, with a vector of the same embedder."""
        return all(self.payload.get(name) == found.get(name) for name in ("hash", EMBEDDER_KEY))

    def is_kept_in(self, found: Mapping[str, Any], ttl: float | None) -> bool:
        """Whether a point holds all of it; a time that was not given counts only where it prolongs a life."""
        ignored = {REVISION_KEY, "user_id"}
        if not self.document._dated and ttl is None and self.document.ttl is None:
            ignored.add(TIME_KEY)
        names = (self.payload.keys() | found.keys()) - ignored
        return all(self.payload.get(name) == found.get(name) for name in names)

    def point(self, user_id: str, vector: Sequence[float]) -> Point:
        """The point of it."""
        payload = {**self.payload, REVISION_KEY: new_revision()}
        return Point(document_point_id(user_id, self.document.id), vector, payload, user_id)


def new_revision() -> str:
    """What tells whether a point is still the one that was read."""
    return secrets.token_hex(8)


def document_of(record: Record) -> Document:
    """The document that a point holds, with whose it is; LookupError, TypeError or ValueError for none."""
    payload = record.payload
    user_id, document_id, ttl = payload["user_id"], payload["id"], payload.get("ttl_ms")
    if str(record.id) != document_point_id(user_id, document_id):
        raise ValueError("it has the id of another one")
    return stored_document(
        document_id,
        payload["text"],
        json.loads(payload["fields"]),
        UNIX_EPOCH + timedelta(milliseconds=payload[TIME_KEY]),
        None if ttl is None else ttl / 1000,
        user_id,
    )


# ------------------------------------------------------------------------------------------------------------
# attuned.documents.handles
# The handles of documents that callers use: each method is one line over documents/collections.py.
# ------------------------------------------------------------------------------------------------------------


class _Handle:
    """Documents of a user, of all (None), or shared ones ("")."""

    def __init__(self, operations: CollectionOperations, user_id: str | None) -> None:
        self._operations = operations
        self._user_id: Any = user_id

    def __repr__(self) -> str:
        whose = {None: "of all users", SHARED: "shared"}.get(
            self._user_id
        ) or f"of {short_id(self._user_id)!r}"
        return f"<{type(self).__name__} {self._operations.name!r} {whose}>"


class DocumentSet(_Handle):
    """Documents to be read and deleted: those of all users, or, as UserDocuments, of one.

    ``where`` is JSON: fields with an index, or ``updated_at``, with a value (equal; of a list of keywords:
    holds it), a list (any of), None (absent) or a mapping of ``gt``, ``gte``, ``lt``, ``lte``, ``ne`` and
    ``text`` (words, all of them, in any case); all must hold, and under ``"or"`` one of a list of such
    mappings. Times are aware datetimes, their ISO 8601 texts, or milliseconds since 1970, UTC. Every method
    raises ValidationError, for a field without an index too, and BackendError.
    """

    def documents(
        self, where: Where | None = None, *, limit: int | None = 100, newest_first: bool = False
    ) -> list[Document]:
        """Those that match ``where``, at most ``limit`` of them (None: all).

        In no particular order, or by their times with ``newest_first``.
        """
        return run(self._operations.documents(self._user_id, where, limit=limit, newest_first=newest_first))

    def count(self, where: Where | None = None) -> int:
        """How many match ``where``."""
        return run(self._operations.count(self._user_id, where))

    def search(
        self,
        query: str | Sequence[float],
        where: Where | None = None,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
    ) -> list[DocumentMatch]:
        """Those most like a query, best first.

        ``query`` is a text, which is embedded, or a vector. Only what the same embedder has made is
        compared. At most ``limit``, which is 1 or more, that match ``where``, with a cosine of
        ``score_threshold`` or more. Raises ValidationError where there is no embedder, EmbeddingError.
        """
        return run(
            self._operations.search(self._user_id, query, where, limit=limit, score_threshold=score_threshold)
        )

    def delete_many(self, where: Where) -> int:
        """Remove those that match ``where``, all with {}; returns how many that were."""
        return run(self._operations.delete_many(self._user_id, where))


class UserDocuments(DocumentSet):
    """The documents of one user, or those that all share; it cannot be widened.

    ``where`` is told at DocumentSet.
    """

    def upsert(self, document: Document) -> None:
        """Write a document, in the place of one with the same id; embed its text where that is new.

        Raises EmbeddingError, and ValidationError for a field that is not of the kind of its index.
        """
        run(self._operations.upsert(self._user_id, document))

    def upsert_many(self, documents: Iterable[Document], *, progress: Progress | None = None) -> UpsertReport:
        """Write many documents; the report says what became of them, and which could not be embedded.

        A text that is there already, embedded by the same embedder, is not embedded again: what was
        interrupted is completed by doing it again. A list or tuple of ``documents`` is checked whole before
        the first write, any other iterable piece by piece. ``progress(done, total)`` is called after each
        piece, ``total`` None where it is unknown. Raises EmbeddingError where the embedder cannot be reached
        at all; an error carries in ``written`` how many had been written.
        """
        return run(self._operations.upsert_many(self._user_id, documents, progress))

    def get(self, id: str) -> Document | None:  # noqa: A002 - what it is called everywhere
        """The document of the user with this ``id``, else the shared one; None where there is neither."""
        return next(iter(run(self._operations.get_many(self._user_id, (id,))).values()), None)

    def get_many(self, ids: Iterable[str]) -> dict[str, Document]:
        """Those of the documents with these ``ids`` that there are, as ``get`` finds them, by id."""
        return run(self._operations.get_many(self._user_id, ids))

    def search(
        self,
        query: str | Sequence[float],
        where: Where | None = None,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
        shared: bool = False,
    ) -> list[DocumentMatch]:
        """As DocumentSet.search; with ``shared`` also among what all share.

        A shared document is left out where the user has one of the same id.
        """
        return run(
            self._operations.search(
                self._user_id, query, where, limit=limit, score_threshold=score_threshold, shared=shared
            )
        )

    def delete(self, id: str) -> bool:  # noqa: A002
        """Remove the document of the user with this ``id``; True if there was one."""
        return run(self._operations.delete(self._user_id, id))


class AsyncDocumentSet(_Handle):
    """DocumentSet, to be awaited."""

    async def documents(
        self, where: Where | None = None, *, limit: int | None = 100, newest_first: bool = False
    ) -> list[Document]:
        """See DocumentSet.documents."""
        return await self._operations.documents(self._user_id, where, limit=limit, newest_first=newest_first)

    async def count(self, where: Where | None = None) -> int:
        """See DocumentSet.count."""
        return await self._operations.count(self._user_id, where)

    async def search(
        self,
        query: str | Sequence[float],
        where: Where | None = None,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
    ) -> list[DocumentMatch]:
        """See DocumentSet.search."""
        return await self._operations.search(
            self._user_id, query, where, limit=limit, score_threshold=score_threshold
        )

    async def delete_many(self, where: Where) -> int:
        """See DocumentSet.delete_many."""
        return await self._operations.delete_many(self._user_id, where)


class AsyncUserDocuments(AsyncDocumentSet):
    """UserDocuments, to be awaited."""

    async def upsert(self, document: Document) -> None:
        """See UserDocuments.upsert."""
        await self._operations.upsert(self._user_id, document)

    async def upsert_many(
        self, documents: Iterable[Document], *, progress: Progress | None = None
    ) -> UpsertReport:
        """See UserDocuments.upsert_many."""
        return await self._operations.upsert_many(self._user_id, documents, progress)

    async def get(self, id: str) -> Document | None:  # noqa: A002
        """See UserDocuments.get."""
        return next(iter((await self._operations.get_many(self._user_id, (id,))).values()), None)

    async def get_many(self, ids: Iterable[str]) -> dict[str, Document]:
        """See UserDocuments.get_many."""
        return await self._operations.get_many(self._user_id, ids)

    async def search(
        self,
        query: str | Sequence[float],
        where: Where | None = None,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
        shared: bool = False,
    ) -> list[DocumentMatch]:
        """See UserDocuments.search."""
        return await self._operations.search(
            self._user_id, query, where, limit=limit, score_threshold=score_threshold, shared=shared
        )

    async def delete(self, id: str) -> bool:  # noqa: A002
        """See UserDocuments.delete."""
        return await self._operations.delete(self._user_id, id)


class _CollectionBase:
    """What both forms of a collection say of it without waiting for anything."""

    def __init__(self, operations: CollectionOperations) -> None:
        self._operations = operations

    @property
    def name(self) -> str:
        """The name of the collection."""
        return self._operations.name

    def __repr__(self) -> str:
        embedder = self._operations.embedder
        return f"<{type(self).__name__} {self.name!r}{'' if embedder is None else f', {embedder.name}'}>"


class Collection(_CollectionBase):
    """A collection of documents; ``store.collection`` gives one, which opens or makes it when first used.

    Documents are reached through a handle: of one user, of what all share, or, to be read and deleted, of
    all users.
    """

    def for_user(self, user_id: str) -> UserDocuments:
        """The documents of one user. Raises ValidationError for None or "" too."""
        return UserDocuments(self._operations, check_user_id(user_id))

    def shared(self) -> UserDocuments:
        """The documents that everybody may read."""
        return UserDocuments(self._operations, SHARED)

    def all_users(self) -> DocumentSet:
        """The documents of all users, and those that they share; ``document.user_id`` says whose one is."""
        return DocumentSet(self._operations, None)

    def refresh(self, *, progress: Progress | None = None) -> UpsertReport:
        """Embed anew what another embedder has made, which is not found until then.

        Writes only where the text is still the same. What was interrupted is completed by doing it again,
        and nothing is embedded twice. ``progress(done, total)`` is called after each piece. Raises
        ValidationError for a collection without an embedder, EmbeddingError as upsert_many, BackendError.
        """
        return run(self._operations.refresh(progress))

    def info(self) -> CollectionInfo:
        """How many documents there are, and what the collection was made with. Raises BackendError."""
        return run(self._operations.info())

    def drop(self) -> None:
        """Remove the collection with all documents of all users. Used again it is made anew, empty."""
        run(self._operations.drop())


class AsyncCollection(_CollectionBase):
    """Collection for asynchronous stores: its handles are awaited."""

    def for_user(self, user_id: str) -> AsyncUserDocuments:
        """See Collection.for_user."""
        return AsyncUserDocuments(self._operations, check_user_id(user_id))

    def shared(self) -> AsyncUserDocuments:
        """See Collection.shared."""
        return AsyncUserDocuments(self._operations, SHARED)

    def all_users(self) -> AsyncDocumentSet:
        """See Collection.all_users."""
        return AsyncDocumentSet(self._operations, None)

    async def refresh(self, *, progress: Progress | None = None) -> UpsertReport:
        """See Collection.refresh."""
        return await self._operations.refresh(progress)

    async def info(self) -> CollectionInfo:
        """See Collection.info."""
        return await self._operations.info()

    async def drop(self) -> None:
        """See Collection.drop."""
        await self._operations.drop()


# ------------------------------------------------------------------------------------------------------------
# attuned.documents.opening
# How a collection of documents is opened and reached: its settings, its points, pieces of work on it.
# ------------------------------------------------------------------------------------------------------------


PIECE = 64  # documents in one piece of work: some 5 ms


class OpenableCollection:
    """A collection over the engine of the place where a store is, opened when it is first used."""

    def __init__(
        self,
        operations: Operations,
        name: str,
        embedder: Embedder | None,
        indexes: Mapping[str, FieldKind],
        ttl: float | None,
    ) -> None:
        self.name = check_collection_name("name", name)
        if self.name == operations.collection:
            raise ValidationError(f"name: {name!r} is the collection of the store's states")
        self.operations = operations
        self.asked = embedder, indexes, ttl
        self._waits = operations.waits
        self._opened: OpenCollection | None = None

    @property
    def embedder(self) -> Embedder | None:
        """What the texts are embedded with."""
        return self.asked[0]

    # Opening

    async def _drive(
        self,
        name: str,
        work: Callable[[Engine, OpenCollection], Coroutine[Any, Any, T]],
        user_id: str | None = None,
    ) -> T:
        """Run a piece of work on the open collection; one that was dropped or amended is opened again."""
        lost = 0
        while True:
            opened = await self.open()

            async def piece(engine: Engine, opened: OpenCollection = opened) -> T:
                if engine.amendments != opened.amendments:
                    raise OutdatedError
                return await work(engine, opened)

            try:
                return await self.operations.with_engine(name, piece, user_id)
            except OutdatedError:
                pass  # others have changed its settings: it is opened anew below
            except CollectionNotFoundError as error:
                lost += 1
                if error.collection != self.name or lost > 1:
                    raise
            if self._opened is opened:
                self._opened = None

    async def open(self) -> OpenCollection:
        """Open the collection, creating it where absent; index what was written before an index came."""
        if self._opened is not None:
            return self._opened
        embedder, indexes, ttl = self.asked
        if embedder is None:
            fresh = CollectionSettings(indexes, None, len(NO_VECTOR), ttl)
        else:
            fresh = CollectionSettings(indexes, embedder.name, embedder.dimensions, ttl)

        async def find(engine: Engine) -> OpenCollection:
            metadata = await engine.open(self._spec(fresh))
            return OpenCollection(CollectionSettings.of(metadata, self._location), engine.amendments)

        found = await self.operations.with_engine("", find)
        wanted = self._merged(found.settings)
        opened = found if wanted == found.settings else await self._amend(wanted)
        if wanted.pending:
            await self._index(wanted)
            opened = await self._amend(attrs.evolve(wanted, pending=()))
        self._opened = opened
        return opened

    async def _amend(self, settings: CollectionSettings) -> OpenCollection:
        async def amend(engine: Engine) -> OpenCollection:
            await engine.amend(self._spec(settings))
            return OpenCollection(settings, engine.amendments)

        return await self.operations.with_engine("", amend)

    @property
    def _location(self) -> str:
        return f"{self.operations.place.location}: collection {self.name!r}"

    def _merged(self, found: CollectionSettings) -> CollectionSettings:
        """What there is, with what is asked for; SchemaMismatchError where these do not go together."""
        embedder, indexes, ttl = self.asked
        if embedder is not None and found.embedder is None:
            raise SchemaMismatchError(
                f"{self._location} was made without an embedder, and its documents have no vectors: "
                "write them to another collection"
            )
        if embedder is not None and embedder.dimensions != found.vector_size:
            raise SchemaMismatchError(
                f"{self._location} has vectors of {found.vector_size} dimensions ({found.embedder}), and "
                f"{embedder.name} makes {embedder.dimensions}: refresh() goes over to an embedder of as many "
                "alone; write the documents to another collection"
            )
        for name, kind in indexes.items():
            if found.indexes.get(name, kind) != kind:
                raise SchemaMismatchError(
                    f"{self._location}: the index {name!r} is a {found.indexes[name]}, {kind} is asked for"
                )
        new = [name for name in indexes if name not in found.indexes]
        return attrs.evolve(
            found,
            indexes={**found.indexes, **indexes},
            ttl=found.ttl if ttl is None else ttl,
            pending=(*found.pending, *new),
        )

    def _spec(self, settings: CollectionSettings) -> CollectionSpec:
        return CollectionSpec(
            self.name,
            settings.vector_size,
            {**OWN_INDEXES, **engine_indexes(settings.indexes)},
            settings.metadata(),
            lambda metadata: self._merged(CollectionSettings.of(metadata, self._location)),
            tenant="user_id",
        )

    async def _index(self, settings: CollectionSettings) -> None:
        """Give all points the values of new indexes; one of another kind than its index stays without."""

        async def page(cursor: Any) -> tuple[int, Any]:
            async def work(engine: Engine) -> tuple[int, Any]:
                found = await engine.page(self.name, Filter(), limit=PIECE, cursor=cursor, payload=False)
                ids = [str(record.id) for record in found.records]
                records = await engine.retrieve(self.name, ids, vector=True) if ids else []
                changes = [
                    indexed_values(self._document(record).fields, settings.indexes, strict=False)
                    for record in records
                ]
                await self._replace(engine, records, changes, [record.vector for record in records])
                return len(ids), found.cursor

            return await self.operations.with_engine("", work)

        pages = Pager(page, self._waits)
        while await pages.next() is not None:
            pass

    async def _replace(
        self,
        engine: Engine,
        records: Sequence[Record],
        changes: Sequence[Mapping[str, Any]],
        vectors: Sequence[Sequence[float]],
    ) -> None:
        """Change points that were read, those that are still as they were then."""
        points = list[Point]()
        for record, change, vector in zip(records, changes, vectors, strict=True):
            payload = {**record.payload, **change, REVISION_KEY: new_revision()}
            points.append(Point(str(record.id), vector, payload, payload.pop("user_id")))
        if points:
            read = [str(record.payload[REVISION_KEY]) for record in records]
            await engine.apply(self.name, [Put(points, "update", Filter((AnyOf(REVISION_KEY, read),)))])

    # Reading

    def _document(self, record: Record, users: Sequence[str] | None = None) -> Document:
        """The document of a point, which must be of one of these users; None for whomever."""
        try:
            document = document_of(record)
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
            raise self._wrong(f"a point does not hold a document: {one_line(str(error))[:200]}") from error
        if users is not None and document.user_id not in users:
            raise self._wrong("the engine answered with a document of another user; nothing is shown")
        return document

    def _wrong(self, message: str) -> BackendError:
        engine = self.operations.place.engine
        return BackendError(f"{self._location}: {message}", backend=engine, operation="decode")

    async def _compiled(self, where: Where | None) -> Filter:
        """The filter of what is asked for; an index may have been added since the collection was opened."""
        opened = await self.open()
        try:
            return compile_filter(where, opened.settings.indexes)
        except ValidationError:
            self._opened = None
            return compile_filter(where, (await self.open()).settings.indexes)

    async def _find(self, ids: Sequence[str], where: Filter, *, vectors: bool = False) -> list[Record]:
        """The points with these ids that are there and match, in this order."""
        found: dict[str, Record] = {}
        for start in range(0, len(ids), PIECE):
            piece = ids[start : start + PIECE]

            async def read(engine: Engine, opened: OpenCollection, piece: Sequence[str] = piece) -> None:
                alive = opened.alive(where)
                for record in await engine.retrieve(self.name, piece, vector=vectors):
                    if str(record.id) not in piece:
                        raise self._wrong("the engine answered with another document; nothing is shown")
                    if matches(alive, record.payload):
                        found[str(record.id)] = record

            if start:
                await self._waits.pause()
            await self._drive("get_documents", read)
        return [found[point_id] for point_id in ids if point_id in found]


# ------------------------------------------------------------------------------------------------------------
# attuned.documents.collections
# What a collection of documents does, written once: synchronous handles run it, asynchronous ones await it.
#
# A document is one point: its vector, its text with the hash of it, its fields as JSON, and those that have
# an index once more. All of that is written together, so that no text ever stands beside the vector of
# another. Texts are embedded between two pieces of work on the engine, when nothing is held.
# ------------------------------------------------------------------------------------------------------------


_MOST_FOUND = 2**31 - 1


@attrs.define
class _Tally:
    """What has become of documents so far."""

    embedded: int = 0
    moved: int = 0
    unchanged: int = 0
    failed: dict[str, StoreError] = attrs.field(factory=dict[str, "StoreError"])
    outages: int = 0  # batches in a row of which nothing could be embedded

    @property
    def done(self) -> int:
        return self.embedded + self.moved + self.unchanged + len(self.failed)

    def report(self) -> UpsertReport:
        return UpsertReport(
            embedded=self.embedded, moved=self.moved, unchanged=self.unchanged, failed=self.failed
        )


class CollectionOperations(OpenableCollection):
    """What a collection does."""

    SWEEP_EVERY_MS = 60_000  # writes look for expired documents so often
    MOST_OUTAGES = 2  # in a row, before a bulk operation gives up
    CACHED_QUERIES = 1_024

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._queries: LRUCache[str, Sequence[float]] = LRUCache(self.CACHED_QUERIES)
        self._queries_lock = threading.Lock()
        self._next_sweep = 0

    # Reading

    async def get_many(self, user_id: str, document_ids: Iterable[str]) -> dict[str, Document]:
        """See UserDocuments.get_many."""
        if isinstance(document_ids, str) or not isinstance(document_ids, Iterable):
            raise ValidationError(f"ids: an iterable of ids is needed, got {type_name(document_ids)}")
        asked = list(dict.fromkeys(check_user_id(each, "id") for each in document_ids))
        users = tuple(dict.fromkeys((SHARED, user_id)))  # of equal ids the later one wins
        ids = [document_point_id(user, each) for user in users for each in asked]
        documents = [self._document(record, users) for record in await self._find(ids, Filter())]
        found = {document.id: document for document in documents}
        return {each: found[each] for each in asked if each in found}

    async def documents(
        self, user_id: str | None, where: Where | None, *, limit: int | None, newest_first: bool
    ) -> list[Document]:
        """See DocumentSet.documents."""
        most = _MOST_FOUND if limit is None else check_integer("limit", limit, 0, MAX_INTEGER)
        most = min(most, _MOST_FOUND)
        compiled = await self._compiled(where)
        users = None if user_id is None else [user_id]
        records = list[Record]()
        if most and check_flag("newest_first", newest_first):
            records = await self._newest(user_id, compiled, most)
        elif most:
            pages = Pager(lambda cursor: self._page(user_id, compiled, cursor, most), self._waits)
            while len(records) < most and (page := await pages.next()) is not None:
                records += page
        return [self._document(record, users) for record in records[:most]]

    async def _page(
        self, user_id: str | None, where: Filter, cursor: Any, most: int = PIECE
    ) -> tuple[list[Record], Any]:
        async def read(engine: Engine, opened: OpenCollection) -> tuple[list[Record], Any]:
            limit = min(most, PIECE)
            page = await engine.page(
                self.name, opened.alive(where), limit=limit, tenant=user_id, cursor=cursor
            )
            return page.records, page.cursor

        return await self._drive("list_documents", read, user_id)

    async def _newest(self, user_id: str | None, where: Filter, most: int) -> list[Record]:
        """The newest first; where they are more than one piece of work, their ids come before them."""

        async def read(engine: Engine, opened: OpenCollection) -> list[Record]:
            page = await engine.page(
                self.name,
                opened.alive(where),
                limit=most,
                tenant=user_id,
                newest_by=TIME_KEY,
                payload=most <= PIECE,
            )
            return page.records

        records = await self._drive("list_documents", read, user_id)
        if most <= PIECE:
            return records
        return await self._find([str(record.id) for record in records], where)

    async def count(self, user_id: str | None, where: Where | None) -> int:
        """See DocumentSet.count."""
        compiled = await self._compiled(where)

        async def count(engine: Engine, opened: OpenCollection) -> int:
            return await engine.count(self.name, opened.alive(compiled), tenant=user_id)

        return await self._drive("count_documents", count, user_id)

    async def search(
        self,
        user_id: str | None,
        query: str | Sequence[float],
        where: Where | None,
        *,
        limit: int,
        score_threshold: float | None,
        shared: bool = False,
    ) -> list[DocumentMatch]:
        """See UserDocuments.search."""
        limit = check_integer("limit", limit, 1, MAX_INTEGER)
        least = -math.inf if score_threshold is None else check_number("score_threshold", score_threshold)
        check_flag("shared", shared)
        opened, compiled = await self.open(), await self._compiled(where)
        vector = await self._query_vector(opened.settings, query)
        maker = opened.settings.embedder if self.embedder is None else self.embedder.name
        compiled = compiled._replace(must=(Equal(EMBEDDER_KEY, str(maker)), *compiled.must))
        matches = await self._nearest(user_id, vector, compiled, min(limit, _MOST_FOUND))
        if shared and user_id:
            matches += await self._nearest_shared(user_id, vector, compiled, min(limit, _MOST_FOUND))
            matches.sort(key=attrgetter("score"), reverse=True)
        return [match for match in matches[:limit] if match.score >= least]

    async def _nearest(
        self, user_id: str | None, vector: Sequence[float], where: Filter, limit: int
    ) -> list[DocumentMatch]:
        """The nearest; where they are more than one piece of work, their ids come before them."""

        async def read(engine: Engine, opened: OpenCollection) -> list[Record]:
            return await engine.search(
                self.name, vector, opened.alive(where), limit, tenant=user_id, payload=limit <= PIECE
            )

        records = await self._drive("search_documents", read, user_id)
        if limit > PIECE:  # one may have been replaced since: what is told is what it is now
            records = [
                record._replace(score=math.fsum(a * b for a, b in zip(vector, record.vector, strict=True)))
                for record in await self._find([str(each.id) for each in records], where, vectors=True)
            ]
            records.sort(key=attrgetter("score"), reverse=True)
        users = None if user_id is None else [user_id]
        return [DocumentMatch(self._document(record, users), clamp_score(record.score)) for record in records]

    async def _nearest_shared(
        self, user_id: str, vector: Sequence[float], where: Filter, limit: int
    ) -> list[DocumentMatch]:
        """The nearest shared ones without those in whose place the user has one, whatever that holds."""
        asked = limit
        while True:
            found = await self._nearest(SHARED, vector, where, asked)
            ids = [document_point_id(user_id, match.document.id) for match in found]
            own = {self._document(record, [user_id]).id for record in await self._find(ids, Filter())}
            shown = [match for match in found if match.document.id not in own]
            if len(shown) >= limit or len(found) < asked:
                return shown[:limit]
            asked = min(4 * asked, _MOST_FOUND)

    async def _query_vector(
        self, settings: CollectionSettings, query: str | Sequence[float]
    ) -> Sequence[float]:
        """The direction of what is searched with."""
        if settings.embedder is None:
            raise ValidationError(f"{self._location} has no embedder: its documents cannot be searched")
        if not isinstance(query, str):
            return _direction_of(query, settings.vector_size)
        with self._queries_lock:
            known = self._queries.get(query)
        if known is not None:
            return known
        if self.embedder is None:
            raise ValidationError(
                f"query: to search by a text, open {self._location} with its embedder, {settings.embedder}"
            )
        found = await self.embedder.embed_query_text(self._waits, query)
        direction = _direction_of(found, settings.vector_size)
        with self._queries_lock:
            self._queries[query] = direction
        return direction

    # Writing

    async def upsert(self, user_id: str, document: Document) -> None:
        """See UserDocuments.upsert."""
        report = await self.upsert_many(user_id, (document,), None)
        for error in report.failed.values():
            raise error

    async def upsert_many(
        self, user_id: str, documents: Iterable[Document], progress: Progress | None
    ) -> UpsertReport:
        """See UserDocuments.upsert_many.

        What is to be embedded is gathered until a batch of the embedder is full.
        """
        self.operations.check_open()
        progress = check_progress(progress)
        if isinstance(documents, Document) or not isinstance(documents, Iterable):
            raise ValidationError(f"documents: an iterable of Document is needed, got {type_name(documents)}")
        opened = await self.open()
        if self.embedder is None and opened.settings.embedder is not None:
            raise ValidationError(
                f"to write, open {self._location} with its embedder, {opened.settings.embedder}"
            )
        maker = None if self.embedder is None else self.embedder.name
        total = len(cast("Any", documents)) if hasattr(documents, "__len__") else None
        if isinstance(documents, list | tuple):
            documents = tuple(documents)  # of this moment, whatever the caller does to it between two pieces
            for position, document in enumerate(documents):
                if position % PIECE == 0:
                    await self._waits.pause_if_due()
                Draft.of(document, opened.settings, maker)
        tally, batch = _Tally(), dict[str, Draft]()
        full = PIECE if self.embedder is None else self.embedder.batch_size
        try:
            for piece in self._pieces(documents, opened.settings, maker):
                if not batch.keys().isdisjoint(piece):  # one comes again: the later one counts
                    await self._embed(user_id, batch, tally)
                batch |= await self._compare(user_id, piece, tally)
                while len(batch) >= full:
                    await self._embed(user_id, _first(batch, full), tally)
                progress(tally.done, total)
                await self._waits.pause()
            await self._embed(user_id, batch, tally)
            progress(tally.done, total)
        except StoreError as error:
            error.written = tally.embedded + tally.moved
            raise
        return tally.report()

    @staticmethod
    def _pieces(
        documents: Iterable[Document], settings: CollectionSettings, maker: str | None
    ) -> Iterator[dict[str, Draft]]:
        """What is compared in one piece of work: documents by their ids, each once."""
        piece: dict[str, Draft] = {}
        for document in documents:
            draft = Draft.of(document, settings, maker)
            if len(piece) == PIECE or draft.document.id in piece:
                yield piece
                piece = {}
            piece[draft.document.id] = draft
        if piece:
            yield piece

    async def _compare(self, user_id: str, piece: Mapping[str, Draft], tally: _Tally) -> dict[str, Draft]:
        """What of this has a new text; what has the same as before is written, and keeps its vector."""

        async def compare(engine: Engine, opened: OpenCollection) -> tuple[list[str], int, int]:
            ids = {document_point_id(user_id, each): each for each in piece}
            same = await self._with_same_text(engine, opened, user_id, ids, piece, vectors=False)
            unchanged = [
                each for each in same if piece[ids[each]].is_kept_in(same[each].payload, opened.settings.ttl)
            ]
            moved = {point_id: ids[point_id] for point_id in same if point_id not in unchanged}
            if self.embedder is not None and moved:
                same = await self._with_same_text(engine, opened, user_id, moved, piece, vectors=True)
            points = [
                piece[each].point(user_id, same[point_id].vector or NO_VECTOR)
                for point_id, each in moved.items()
                if point_id in same
            ]
            if points:
                await engine.apply(self.name, [Put(points)])
            written = {*unchanged, *(point.id for point in points)}
            new = [each for point_id, each in ids.items() if point_id not in written]
            return new, len(unchanged), len(points)

        new, unchanged, moved = await self._drive("", compare, user_id)
        tally.unchanged += unchanged
        tally.moved += moved
        return {each: piece[each] for each in new}

    async def _with_same_text(
        self,
        engine: Engine,
        opened: OpenCollection,
        user_id: str,
        ids: Mapping[str, str],
        piece: Mapping[str, Draft],
        *,
        vectors: bool,
    ) -> dict[str, Record]:
        """Those of these points that hold the text of their draft, with a vector of the same embedder."""
        found, alive = dict[str, Record](), opened.alive(Filter())
        for record in await engine.retrieve(self.name, list(ids), vector=vectors):
            point_id = str(record.id)
            if record.payload.get("user_id") != user_id or point_id not in ids:
                raise self._wrong("the engine answered with a document of another user; nothing is written")
            if piece[ids[point_id]].has_text_of(record.payload) and matches(alive, record.payload):
                found[point_id] = record
        return found

    async def _embed(self, user_id: str, batch: dict[str, Draft], tally: _Tally) -> None:
        """Embed and write a batch, and empty it; nothing is held while it is embedded."""
        drafts = list(batch.values())
        batch.clear()
        vectors = await self._vectors([draft.document.text for draft in drafts], tally)
        points = list[Point]()
        for draft, vector in zip(drafts, vectors, strict=True):
            if isinstance(vector, StoreError):
                tally.failed[draft.document.id] = vector
            else:
                points.append(draft.point(user_id, vector))
        for start in range(0, len(points), PIECE):
            piece = points[start : start + PIECE]
            await self._write(piece)
            tally.embedded += len(piece)
            await self._waits.pause()
        await self._sweep()

    async def _write(self, points: Sequence[Point]) -> None:
        await self._drive("", lambda engine, _: engine.apply(self.name, [Put(points)]))

    async def _vectors(self, texts: Sequence[str], tally: _Tally) -> Sequence[Sequence[float] | StoreError]:
        """A vector or what is wrong for each text; raises where nothing could be embedded twice in a row."""
        if self.embedder is None or not texts:
            return [NO_VECTOR] * len(texts)
        vectors = await self.embedder.embed_texts(self._waits, texts)
        tally.outages = tally.outages + 1 if all(isinstance(each, BackendError) for each in vectors) else 0
        if tally.outages == self.MOST_OUTAGES:
            raise cast("BackendError", vectors[-1])
        return vectors

    async def _sweep(self) -> None:
        """Now and then, remove some of what has expired."""
        now = wall_clock.now_ms()
        if now < self._next_sweep:
            return
        self._next_sweep = now + self.SWEEP_EVERY_MS

        async def sweep(engine: Engine, opened: OpenCollection) -> bool:
            return (await self._delete_page(engine, opened.expired(), None, None))[1] is not None

        try:
            if await self._drive("", sweep):
                self._next_sweep = 0  # there are more: the next write goes on
        except BackendError as error:  # what was to be written has been
            LOGGER.warning("removing expired documents failed: %s", error)

    # Removing

    async def delete(self, user_id: str, document_id: str) -> bool:
        """See UserDocuments.delete."""
        point_id = document_point_id(user_id, check_user_id(document_id, "id"))

        async def delete(engine: Engine, opened: OpenCollection) -> bool:
            found = [
                self._document(record, [user_id])
                for record in await engine.retrieve(self.name, [point_id])
                if matches(opened.alive(Filter()), record.payload)
            ]
            await engine.apply(self.name, deletes=[point_id])
            return bool(found)

        return await self._drive("delete_document", delete, user_id)

    async def delete_many(self, user_id: str | None, where: Where) -> int:
        """See DocumentSet.delete_many."""
        if not isinstance(where, Mapping):
            raise ValidationError(
                f"where: a mapping from field to value is needed, {{}} for all; got {type_name(where)}"
            )
        return await self._delete(user_id, await self._compiled(where), expired=False)

    async def erase(self, user_id: str) -> int:
        """Remove all that there is of a user; how many documents that was."""
        return await self._delete(user_id, Filter(), expired=True)

    async def _delete(self, user_id: str | None, where: Filter, *, expired: bool) -> int:
        async def page(cursor: Any) -> tuple[int, Any]:
            async def work(engine: Engine, opened: OpenCollection) -> tuple[int, Any]:
                narrowed = where if expired else opened.alive(where)
                return await self._delete_page(engine, narrowed, user_id, cursor)

            return await self._drive("", work, user_id)

        pages, total = Pager(page, self._waits), 0
        while (number := await pages.next()) is not None:
            total += number
        return total

    async def _delete_page(
        self, engine: Engine, where: Filter, user_id: str | None, cursor: Any
    ) -> tuple[int, Any]:
        """Remove some of what matches; all at once where others might write between a look and a removal."""
        if engine.shared:
            number = await engine.count(self.name, where, tenant=user_id)
            if number:
                await engine.apply(self.name, deletes=Matching(where, user_id))
            return number, None
        page = await engine.page(self.name, where, limit=PIECE, tenant=user_id, cursor=cursor, payload=False)
        if page.records:
            await engine.apply(self.name, deletes=[str(record.id) for record in page.records])
        return len(page.records), page.cursor

    # The collection itself

    async def refresh(self, progress: Progress | None) -> UpsertReport:
        """See Collection.refresh."""
        progress, tally, embedder = check_progress(progress), _Tally(), self.embedder
        if embedder is None:
            raise ValidationError(f"to refresh {self._location}, open it with an embedder")
        stale = Filter(must_not=(Equal(EMBEDDER_KEY, embedder.name),))
        before = -1
        while tally.embedded > before:  # what was written to meanwhile is looked at once more
            before, tally.failed = tally.embedded, {}
            total = tally.done + await self._count_points(stale)
            pages = Pager(lambda cursor: self._page(None, stale, cursor), self._waits)
            while (records := await pages.next()) is not None:
                for start in range(0, len(records), embedder.batch_size):  # each is kept before the next
                    batch = records[start : start + embedder.batch_size]
                    await self._embed_anew(batch, embedder.name, tally)
                    progress(tally.done, max(total, tally.done))
        opened = await self.open()
        if opened.settings.embedder != embedder.name and not tally.failed:
            self._opened = await self._amend(attrs.evolve(opened.settings, embedder=embedder.name))
        return tally.report()

    async def _embed_anew(self, records: Sequence[Record], maker: str, tally: _Tally) -> None:
        documents = [self._document(record) for record in records]
        found = await self._vectors([document.text for document in documents], tally)
        read, vectors = list[Record](), list[Sequence[float]]()
        for record, document, vector in zip(records, documents, found, strict=True):
            if isinstance(vector, StoreError):
                tally.failed[document.id] = vector
            else:
                read.append(record)
                vectors.append(vector)
        changes = [{EMBEDDER_KEY: maker}] * len(read)
        await self._drive("", lambda engine, _: self._replace(engine, read, changes, vectors))
        tally.embedded += len(read)

    async def _count_points(self, where: Filter) -> int:
        return await self._drive("", lambda engine, _: engine.count(self.name, where))

    async def info(self) -> CollectionInfo:
        """See Collection.info."""
        number = await self._count_points(Filter())
        settings = (await self.open()).settings
        return CollectionInfo(
            name=self.name,
            documents=number,
            indexes=dict(settings.indexes),
            embedder=settings.embedder,
            dimensions=None if settings.embedder is None else settings.vector_size,
            ttl=settings.ttl,
        )

    async def drop(self) -> None:
        """See Collection.drop."""
        await self._drive("drop_collection", lambda engine, _: engine.drop(self.name))
        self._opened = None


def _first(batch: dict[str, Draft], number: int) -> dict[str, Draft]:
    """Take the first of a batch out of it."""
    return {document_id: batch.pop(document_id) for document_id in list(itertools.islice(batch, number))}


def _direction_of(vector: Sequence[float], dimensions: int) -> Sequence[float]:
    """A vector of length 1, or ValidationError for what has no direction or another number of dimensions."""
    try:
        numbers = list(vector)
        if {*map(type, numbers)} != {float}:
            numbers = [check_number("query", value) for value in numbers]
    except TypeError:
        raise ValidationError(f"query: a text or a vector is needed, got {type_name(vector)}") from None
    if len(numbers) != dimensions:
        raise ValidationError(f"query: {dimensions} dimensions are needed, got {len(numbers)}")
    length = math.hypot(*numbers)
    if not 0 < length < math.inf:
        raise ValidationError(f"query: a vector with a direction is needed, got {brief(numbers)}")
    return [value / length for value in numbers]


def collection_operations(
    operations: Operations,
    name: str,
    embedder: Embedder | None = None,
    indexes: Mapping[str, str] | None = None,
    ttl: float | None = None,
) -> CollectionOperations:
    """What a store does with a collection; the same for the same arguments, so that it is opened once."""
    operations.check_open()
    if embedder is not None and not isinstance(embedder, Embedder):
        raise ValidationError(f"embedder: an Embedder or None is needed, got {type_name(embedder)}")
    asked = embedder, check_indexes({} if indexes is None else indexes), check_ttl(ttl)
    known: CollectionOperations | None = operations.documents.get(name) if isinstance(name, str) else None
    if known is None or known.asked != asked:
        known = operations.documents[name] = CollectionOperations(operations, name, *asked)
    return known


async def list_collections(operations: Operations) -> list[CollectionInfo]:
    """See StateStore.collections."""
    found = await operations.with_engine("list_collections", lambda engine: engine.collections())
    names = sorted(name for name, metadata in found.items() if metadata.get("kind") == "documents")
    return [await CollectionOperations(operations, name, None, {}, None).info() for name in names]


async def erase_user(operations: Operations, user_id: str) -> ErasureReport:
    """See StateStore.erase."""
    user_id = check_user_id(user_id)
    states, erased = await operations.delete(user_id), dict[str, int]()
    for each in await list_collections(operations):
        number = await CollectionOperations(operations, each.name, None, {}, None).erase(user_id)
        if number:
            erased[each.name] = number
    return ErasureReport(states=states, documents=erased)


# ------------------------------------------------------------------------------------------------------------
# attuned.tables
# Tables of states, from files and data frames and to them.
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# attuned.tables.rows
# Where the rows of tables come from: CSV, JSON and Parquet files, and data frames.
# ------------------------------------------------------------------------------------------------------------


TableFormat = Literal["csv", "jsonl", "json", "parquet"]

_SUFFIXES: Mapping[str, TableFormat] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}

# The longest honest row, 1,024 axes with names of 64 characters, is about 100 KB; a file without line ends
# must not fill the memory.
_MAX_LINE = 1 << 20

# How far a quote may run on: enough for a heading with line breaks; a stray one costs one row, not the file.
_MAX_ROW_LINES = 16

_NOT_DECODED = re.compile("[\udc80-\udcff]")  # a byte that is not of the encoding
_BATCH_ROWS = 1_024  # of what is held by columns


class RowError(ValueError):
    """What is wrong with a row, and the reason that it shares with others."""

    def __init__(self, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason or text


class RowSource(Protocol):
    """Where rows come from. ``headings`` are those of the columns; None where rows name their own.

    A row is a sequence under the headings, or a mapping; or an error that says what is wrong with it.
    ``typed``: values are numbers and times already, not texts.
    """

    unit: str
    typed: bool

    @property
    def headings(self) -> list[str] | None:
        """See above."""
        ...

    def rows(self) -> Iterator[tuple[int, Any]]:
        """All rows, each with its number."""
        ...


class InputFile:
    """A file or stream of bytes, to be read as often as asked; a pipe is kept in a file first."""

    def __init__(self, source: Any, encoding: str) -> None:
        self.encoding = encoding
        self._stream: IO[bytes] | None = None
        if isinstance(source, str | os.PathLike):
            self.path: Path | None = Path(check_path(cast("Any", source))).expanduser()
            self.name = printable(self.path.name)
            self.suffixes = [suffix.lower() for suffix in self.path.suffixes]
            if self.path.exists() and not self.path.is_file() and not self.path.is_dir():
                with self.path.open("rb") as pipe:
                    self._keep(pipe)
        else:
            self.path, self.name, self.suffixes = None, "the stream", []
            if not source.seekable():
                self._keep(source)
            else:
                self._stream = source

    def _keep(self, pipe: Any) -> None:
        kept = self._stream = tempfile.TemporaryFile(prefix="attuned-store-")  # noqa: SIM115 - as long as this
        weakref.finalize(self, kept.close)
        read = getattr(pipe, "read1", pipe.read)  # within one long read() Ctrl-C may go unnoticed
        while piece := read(1 << 16):
            kept.write(piece)

    @contextlib.contextmanager
    def bytes(self) -> Generator[IO[bytes]]:
        """The bytes from the beginning, unpacked."""
        with contextlib.ExitStack() as stack:
            if self._stream is None:
                opened: IO[bytes] = stack.enter_context(cast("Path", self.path).open("rb"))
            else:
                opened = self._stream
                opened.seek(0)
            magic = opened.read(4)
            opened.seek(0)
            if magic.startswith(b"\x1f\x8b"):
                unpacked: Any = gzip.GzipFile(fileobj=opened)
                opened = stack.enter_context(unpacked)
            elif magic == b"PK\x03\x04":
                raise ValidationError(
                    f"{self.name}: a zip or Excel file; save it as CSV in UTF-8, or give what "
                    "pandas.read_excel makes of it"
                )
            yield opened

    @contextlib.contextmanager
    def text(self) -> Generator[io.TextIOWrapper]:
        """The text from the beginning; bytes that are none are told row by row."""
        with self.bytes() as opened:
            text = io.TextIOWrapper(opened, encoding=self.encoding, errors="surrogateescape", newline="")
            try:
                yield text
            finally:
                with contextlib.suppress(ValueError):  # who opened the bytes closes them
                    text.detach()

    def lines(self) -> Iterator[tuple[int, str]]:
        """The physical lines with their numbers, from the first that is not blank."""
        begun = False
        with self.text() as text:
            for at in itertools.count(1):
                line = text.readline(_MAX_LINE + 1)
                if len(line) > _MAX_LINE:
                    raise ValidationError(f"{self.name}: line {at} is longer than {_MAX_LINE:,} characters")
                begun = begun or bool(line.strip())
                if not line:
                    break
                if begun:
                    yield at, line
        if not begun:
            raise ValidationError(f"{self.name}: the file is empty")

    def check(self, text: str) -> str:
        """The text of a row, or an error where it is not of the encoding."""
        if not text.isascii() and _NOT_DECODED.search(text):
            encoding = self.encoding.upper().removesuffix("-SIG")
            raise RowError(f"not {encoding}")
        return text


class CsvRows:
    """Rows of cells, separated by commas, unless only a tab or a semicolon makes a column of the users."""

    unit = "line"
    typed = False
    headings: list[str]

    def __init__(self, file: InputFile, first: str, user_column: str | None) -> None:
        self._file = file
        user = axis_name(user_column or "user_id")
        marks = [mark for mark in ",\t;" if user in map(axis_name, first.split(mark))]
        self._delimiter = (marks or sorted(",\t;", key=first.count, reverse=True))[0]
        self.decimal = "," if self._delimiter == ";" else "."  # Excel: a comma cannot be both
        _, text, names = next(self._records())
        try:
            file.check(text)
        except ValueError as error:
            likely = "utf-16" if text.startswith(("\udcff\udcfe", "\udcfe\udcff")) else "cp1252"
            raise ValidationError(
                f"{error}: save the file as UTF-8 first, or name its encoding, as in encoding={likely!r} "
                f"(or --encoding {likely})"
            ) from None
        if names is None:
            raise ValidationError("the quotes of the heading do not match")
        self.headings = names

    def rows(self) -> Iterator[tuple[int, Any]]:
        """See RowSource."""
        for line, text, cells in itertools.islice(self._records(), 1, None):
            try:
                self._file.check(text)
            except RowError as error:
                yield line, error
            else:
                bad = RowError("a quote is not closed, or not where a cell begins")
                yield line, bad if cells is None else cells

    def _records(self) -> Iterator[tuple[int, str, list[str] | None]]:
        """For each record, the line it begins on, its text, and its cells where its quotes match."""
        lines = self._file.lines()
        taken: list[tuple[int, str]] = []
        ahead: deque[tuple[int, str]] = deque()

        def record() -> Iterator[str]:  # to end within quotes is an error for the reader
            while len(taken) < _MAX_ROW_LINES and (line := ahead.popleft() if ahead else next(lines, None)):
                taken.append(line)
                yield line[1]

        reader: Iterator[list[str]] | None = None
        while True:
            taken.clear()
            reader = reader or csv.reader(record(), delimiter=self._delimiter, strict=True)
            cells: list[str] | None
            try:
                cells = next(reader, None)
                if cells is None:
                    return
            except csv.Error:  # a quote left open spoils its line only: those after it are read again
                cells = reader = None
                ahead.extendleft(reversed(taken[1:]))
                del taken[1:]
            if cells != []:
                at, text = taken[0]
                yield at, text if len(taken) == 1 else "".join(each for _, each in taken), cells


def _json_integer(text: str) -> int | float:
    return int(text) if len(text) < 20 else float(text)  # noqa: PLR2004 - no integer is too long


def _json_object(pairs: list[tuple[str, Any]]) -> Any:
    """An object with its names in snake_case, or what is wrong with it: json keeps the last of equals."""
    found = {axis_name(given): value for given, value in pairs}
    if len(found) < len(pairs):
        names = Counter(axis_name(given) for given, _ in pairs)
        return RowError(f"{names.most_common(1)[0][0][:64]} is there twice")
    return found


_DECODER = json.JSONDecoder(
    object_pairs_hook=_json_object,
    parse_int=_json_integer,
    parse_constant=lambda text: RowError(f"not a number: {text!r}"),
)


def _json_row(value: object) -> Any:
    if isinstance(value, dict | RowError):
        return cast("Any", value)
    return RowError("not a JSON object")


class JsonLines:
    """An object a line."""

    unit = "line"
    typed = True
    headings: list[str] | None = None

    def __init__(self, file: InputFile) -> None:
        self._file = file

    def rows(self) -> Iterator[tuple[int, Any]]:
        """See RowSource."""
        for at, line in self._file.lines():
            if line.isspace():
                continue
            try:
                yield at, _json_row(_DECODER.decode(self._file.check(line)))
            except json.JSONDecodeError as error:
                yield at, RowError(f"not JSON: {error.msg} at character {error.pos + 1}", "not JSON")
            except RecursionError:
                yield at, RowError("not a row: nested too deeply")
            except RowError as error:
                yield at, error


class JsonArray:
    """An array of objects, which may stand on one line."""

    unit = "row"
    typed = True
    headings: list[str] | None = None

    def __init__(self, file: InputFile) -> None:
        self._file = file

    def rows(self) -> Iterator[tuple[int, Any]]:
        """See RowSource; bounded in memory, whatever the length of the array."""
        number, ended = 0, False
        with self._file.text() as stream:
            text = stream.read(1 << 16).lstrip().removeprefix("[")
            while True:
                text = text.lstrip()
                if number:
                    text = text.removeprefix(",").lstrip()
                if text.startswith("]"):
                    break
                try:
                    value, end = _DECODER.raw_decode(text)
                except RecursionError:
                    raise ValidationError(f"{self._file.name}: row {number} is nested too deeply") from None
                except json.JSONDecodeError as error:
                    end, value = 0, None
                    if ended or len(text) > _MAX_LINE:
                        raise ValidationError(
                            f"{self._file.name}: not a JSON array: {error.msg} in row {number}"
                        ) from None
                if not end or (end == len(text) and not ended):  # it may go on
                    ended = not (piece := stream.read(1 << 16))
                    text += piece
                    continue
                yield number, self._checked(text[:end], value)
                text, number = text[end:], number + 1
        if not number:
            raise ValidationError(f"{self._file.name}: the array is empty")

    def _checked(self, text: str, value: object) -> Any:
        try:
            self._file.check(text)
        except RowError as error:
            return error
        return _json_row(value)


class ColumnRows:
    """What is held by columns: batches of them, each a list of lists."""

    unit = "row"
    typed = True

    def __init__(self, headings: Iterable[object], batches: Callable[[], Iterator[list[list[Any]]]]) -> None:
        self.headings: list[str] = [str(heading) for heading in headings]
        self._batches = batches

    def rows(self) -> Iterator[tuple[int, Any]]:
        """See RowSource."""
        batches = self._batches()
        return enumerate(row for columns in batches for row in zip(*columns, strict=True))


def rows_of_pandas(frame: Any) -> ColumnRows:
    """The rows of a data frame of pandas; an index that has a name is a column."""
    if any(name is not None for name in frame.index.names):  # as groupby and set_index leave it
        frame = frame.reset_index()

    def column(series: Any) -> list[Any]:
        values, missing = series.tolist(), series.isna()
        if not missing.any():
            return cast("list[Any]", values)
        return [None if gone else value for value, gone in zip(values, missing, strict=True)]

    def batches() -> Iterator[list[list[Any]]]:
        for start in range(0, len(frame), _BATCH_ROWS):
            part = frame.iloc[start : start + _BATCH_ROWS]
            yield [column(part.iloc[:, position]) for position in range(part.shape[1])]

    return ColumnRows(frame.columns, batches)


def _import_pyarrow() -> Any:
    try:
        import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet files, and data frames of other libraries than pandas, need pyarrow: "
            'pip install "attuned-store[parquet]"'
        ) from error
    return import_module("pyarrow")


def _lists(batch: Any) -> list[list[Any]]:
    return [column.to_pylist() for column in batch.columns]


def rows_of_arrow(source: Any) -> ColumnRows:
    """The rows of what has Arrow's stream interface."""
    table = _import_pyarrow().table(source)
    return ColumnRows(table.column_names, lambda: map(_lists, table.to_batches(max_chunksize=_BATCH_ROWS)))


def _of_parquet(file: InputFile) -> ColumnRows:
    pa = _import_pyarrow()

    def batches() -> Iterator[list[list[Any]]]:
        with refused(), file.bytes() as opened:
            yield from map(_lists, pa.parquet.ParquetFile(opened).iter_batches(_BATCH_ROWS))

    @contextlib.contextmanager
    def refused() -> Generator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValidationError(f"{file.name}: no Parquet file: {one_line(str(error))[:200]}") from error

    with refused(), file.bytes() as opened:
        names = pa.parquet.ParquetFile(opened).schema_arrow.names
    return ColumnRows(names, batches)


def rows_of_file(source: Any, kind: str | None, encoding: str, user_column: str | None) -> RowSource:
    """The rows of a file or stream of bytes, of the kind that was named, or else that it looks like."""
    file = InputFile(source, encoding)
    with file.bytes() as opened:
        magic = opened.read(4)
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    kind = (
        kind or _SUFFIXES.get(suffixes[-1] if suffixes else "") or ("parquet" if magic == b"PAR1" else None)
    )
    if kind == "parquet":
        return _of_parquet(file)
    with file.text() as text:
        beginning = text.read(1 << 16).lstrip()
    if kind is None:
        kind = {"{": "jsonl", "[": "json"}.get(beginning[:1], "csv")
    if kind == "csv":
        return CsvRows(file, beginning.partition("\n")[0], user_column)
    return JsonLines(file) if kind == "jsonl" else JsonArray(file)


# ------------------------------------------------------------------------------------------------------------
# attuned.tables.reports
# What the reading of a table found: good and bad rows, why those are bad, and what may help.
# ------------------------------------------------------------------------------------------------------------


_SHOWN_BAD_ROWS = 5
_REASONS_SHOWN = 100
_SEVERAL = 10
_MOST_OF_A_SCALE = 10**8  # no scale that anybody answers on
_DAYS = 10_000  # about as many as there are since 1970: taken for milliseconds they are seconds
_LATE_1970 = 31_000_000_000


@attrs.frozen
class BadRow:
    """A row that is no state: ``row`` is the line it begins on, or where there are none its number from 0."""

    row: int
    reason: str


@attrs.frozen(kw_only=True)
class TableReport:
    """What was read of a table so far.

    ``good`` and ``bad`` rows; ``examples`` are the first five bad ones, ``reasons`` how many were bad for
    what; ``unit`` says what rows are numbered by, "line" or "row". ``span`` is the lowest and the highest
    value of rows with values outside of the scale, else None. ``hints`` say what else may help.
    """

    good: int = 0
    bad: int = 0
    unit: str = "line"
    examples: tuple[BadRow, ...] = ()
    reasons: Mapping[str, int] = attrs.field(factory=dict[str, int])
    span: tuple[float, float] | None = None
    hints: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{plural(self.good, 'good row')}, {plural(self.bad, 'bad row')}"]
        lines += [f"{self.unit} {each.row}: {each.reason}" for each in self.examples]
        if self.bad > len(self.examples):
            lines += [f"{count:,} times {reason}" for reason, count in self.reasons.items()]
        if self.span is not None:
            low, high = self.span
            lines.append(f"values span {low:g} to {high:g}: try scale=({low:g}, {high:g})")
        return "\n".join([*lines, *self.hints])


class Tally:
    """What one reading found."""

    def __init__(self) -> None:
        self.good = self.bad = 0
        self.examples: list[BadRow] = []
        self.reasons: Counter[str] = Counter()
        self.spans: dict[str, tuple[float, float]] = {}  # by axis, of rows with values outside of the scale
        self.outside = 0  # rows with values outside of the scale
        self.axes: dict[str, None] = {}
        self.shapes: set[Shape] = set()
        self.absent: set[str] = set()  # what may stand for an absent value
        self.newest = 0

    def add_bad(self, row: int, error: ValueError) -> None:
        """Count a bad row."""
        self.bad += 1
        text = str(error)
        if len(self.examples) < _SHOWN_BAD_ROWS:
            self.examples.append(BadRow(row, text))
        reason = error.reason if isinstance(error, RowError) else text.partition(", got ")[0]
        reason = re.sub(r"\d{10,}", "a number", reason.partition("; ")[0])
        if reason not in self.reasons and len(self.reasons) >= _REASONS_SHOWN:
            reason = "something else"
        self.reasons[reason] += 1

    def report(self, unit: str) -> TableReport:
        """What was found so far, of rows that are numbered by this unit."""
        hints: list[str] = []
        times = [name for name, (low, _) in self.spans.items() if low > _MOST_OF_A_SCALE]
        spans = [span for name, span in self.spans.items() if name not in times]
        if times:
            hints.append(
                f"{times[0]} looks like times: time_column={times[0]!r} (or --time-column {times[0]})"
            )
        mostly_bad = self.bad >= self.good
        if mostly_bad and any("looks like seconds" in each.reason for each in self.examples):
            hints.append('times in seconds: try time_format="s" (or --time-format s)')
        elif mostly_bad and any(": not a time" in reason for reason in self.reasons):
            hints.append(
                'times in another form: say in which, as time_format="%d.%m.%Y %H:%M" '
                '(or --time-format "%d.%m.%Y %H:%M")'
            )
        elif _DAYS < self.newest < _LATE_1970 and self.good >= _SEVERAL:
            hints.append("all times lie in 1970: are they in milliseconds?")
        if (
            self.outside >= self.good
            and spans
            and min(high for _, high in spans) < max(high for _, high in spans) / 2
        ):
            shown = [
                f"{name} {low:g} to {high:g}"
                for name, (low, high) in list(self.spans.items())[:5]
                if name not in times
            ]
            hints.append(
                f"axes differ ({', '.join(shown)}): scales (or --scale AXIS=LOW:HIGH) says so for one of them"
            )
        if self.absent:
            texts = ",".join(sorted(self.absent))
            hints.append(f"where {texts} stands for nothing: absent (or --absent {texts})")
        return TableReport(
            good=self.good,
            bad=self.bad,
            unit=unit,
            examples=tuple(self.examples),
            reasons=dict(self.reasons.most_common()),
            span=(min(low for low, _ in spans), max(high for _, high in spans))
            if spans and self.outside >= self.good
            else None,
            hints=tuple(hints),
        )


# ------------------------------------------------------------------------------------------------------------
# attuned.tables.states
# Tables as states, and states as a table: a row becomes a state, or it is told what is wrong with it.
# ------------------------------------------------------------------------------------------------------------


_TIME_COLUMNS = ("updated_at_unix_ms", "updated_at")  # as export writes it, and as to_dataframe does
_FIELDS = ("source", "confidence", "schema_version")
_LIKE_AN_ID = re.compile(r"(?:^|_)(?:id|user|name|e?mail|participant|subject|person|respondent|code)(?:_|$)")

# What a spreadsheet would run as a formula. Export puts an apostrophe before it, and before what has one
# already, so that reading can tell its own apostrophes from those of an id.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")

# Unlike what float() takes: neither nan nor 1_000.
_DECIMAL_NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*", re.ASCII)
_WHOLE = re.compile(r"\s*[+-]?\d{1,19}\s*", re.ASCII)  # no more digits than int() takes
_LIKE_A_NUMBER = re.compile(r"\s*[+-]?[\d\s.,']*\d[\d\s.,']*(?:[eE][+-]?\d+)?\s*%?\s*", re.ASCII)
_LIKE_A_TIME = re.compile(r"\s*\d{1,4}([-/.])\d{1,2}\1\d{1,4}(?:\D|$)", re.ASCII)
_LIKE_ABSENT = {"nan", "null", "none", "n/a", "#n/a", "#nv", "-", ".", "?", "nil", "<na>", "nat"}

_LOOKED_AT = 1_000  # rows, to tell what columns hold
_NUMERIC = frozenset([int, float])
_MOST_DIGITS = 20  # that int() is given
_MILLISECOND = timedelta(milliseconds=1)


@attrs.frozen(kw_only=True)
class _Choices:
    """What read_table was asked for, checked."""

    scale: tuple[float, float]
    scales: Mapping[str, tuple[float, float]]
    user_column: str | None
    time_column: str | None
    time_format: str | None
    axes: tuple[str, ...] | None
    ignore: frozenset[str]
    ignore_text: bool
    absent: frozenset[str]
    encoding: str
    raw: bool

    def ignores(self, heading: str) -> bool:
        """Whether a column is to be left out, by its heading or what becomes of that."""
        return heading in self.ignore or axis_name(heading) in self.ignore


# Rows and states


class _Roles:
    """Which column is what, and how a row becomes a state."""

    def __init__(self, source: RowSource, choices: _Choices, now_ms: int) -> None:
        self._choices, self._now_ms = choices, now_ms
        self._typed = source.typed
        self._decimal = source.decimal if isinstance(source, CsvRows) else "."
        self.headings = source.headings
        self.axes = tuple[str, ...]()
        self._places: dict[str, int] = {}  # of user_id, updated_at_unix_ms and the other fields, by column
        self._columns: dict[str, int] = {}  # of the axes
        if self.headings is not None:
            self._find_columns(self.headings, list(itertools.islice(source.rows(), _LOOKED_AT)))
        else:
            looked_at = [row for _, row in itertools.islice(source.rows(), _LOOKED_AT)]
            rows: list[dict[str, Any]] = [row for row in looked_at if isinstance(row, dict)]
            flat = [row for row in rows if not isinstance(row.get("axes"), dict)]
            self._find_names(rows, flat)
        self._shape: Shape = shape_of(self.axes)
        self._scales: list[tuple[float, float]] = [self._scale_of(name) for name in self.axes]
        self._as_is = all(scale == (0, 1) for scale in self._scales)
        self._others = [name for name in _FIELDS if source.headings is None or name in self._places]
        picks = tuple(self._columns.values())
        self._pick: Callable[[Sequence[Any]], tuple[Any, ...]] = (
            operator.itemgetter(*picks) if len(picks) > 1 else lambda cells: tuple(cells[at] for at in picks)
        )

    def _scale_of(self, name: str) -> tuple[float, float]:
        return self._choices.scales.get(name, self._choices.scale)

    # Columns

    def _find_columns(self, headings: list[str], looked_at: list[tuple[int, Any]]) -> None:
        choices, rows = self._choices, [row for _, row in looked_at if not isinstance(row, ValueError)]
        rows = [row for row in rows if len(row) == len(headings)]
        names = [axis_name(heading) for heading in headings]
        kept = [at for at, heading in enumerate(headings) if not choices.ignores(heading)]
        if kept[:1] == [0] and _is_index(headings[0], [row[0] for row in rows]):
            del kept[0]  # the row numbers of pandas or R
        self._check_asked([names[at] for at in kept], headings)
        user = axis_name(choices.user_column or "user_id")
        times = self._time_names()
        wanted = None if choices.axes is None else set(map(axis_name, choices.axes))
        if wanted is not None:
            own = {user, *times, *_FIELDS}
            kept = [at for at in kept if names[at] in own or names[at] in wanted]
        for at in kept:
            if not names[at]:
                raise ValidationError(f"column {at + 1} has no name ({headings[at]!r}); ignore leaves it out")
        found = Counter(names[at] for at in kept)
        if twice := [f"{headings[at]!r} ({names[at]})" for at in kept if found[names[at]] > 1]:
            raise ValidationError(f"columns of the same name: {_listed(twice)}")
        by_name = {names[at]: at for at in kept}
        if user not in by_name:
            self._refuse_without_user(user, list(by_name))
        self._places["user_id"] = by_name.pop(user)
        for at, name in enumerate(name for name in times if name in by_name):
            place = by_name.pop(name)
            if at == 0:
                self._places["updated_at_unix_ms"] = place
        self._places |= {name: by_name.pop(name) for name in _FIELDS if name in by_name}
        examples = {name: self._text_in(row[at] for row in rows) for name, at in by_name.items()}
        self._refuse_text({name: text for name, text in examples.items() if text is not None}, by_name)
        self._columns = by_name
        self.axes = tuple(by_name)

    def _find_names(self, rows: list[dict[str, Any]], flat: list[dict[str, Any]]) -> None:
        """As _find_columns, where rows name their own columns."""
        choices = self._choices
        names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
        if rows:
            self._check_asked(names, names)
            if len(rows) == 1 and all(isinstance(value, dict) for value in rows[0].values()):
                raise ValidationError(
                    "an object of columns, not of one row; pandas writes rows with to_json(orient='records')"
                )
            user = axis_name(choices.user_column or "user_id")
            if user not in names and (choices.user_column or len(rows) == _LOOKED_AT):
                self._refuse_without_user(user, names)
        own = {axis_name(choices.user_column or "user_id"), *self._time_names(), *_FIELDS, "axes"}
        columns = {
            name: at
            for at, name in enumerate(dict.fromkeys(itertools.chain.from_iterable(flat)))
            if name not in own and not choices.ignores(name)
        }
        if choices.axes is not None:
            columns = {name: at for name, at in columns.items() if name in map(axis_name, choices.axes)}
        examples = {name: self._text_in(row.get(name) for row in flat) for name in columns}
        self._ignored: set[str] = set()
        texts = {name: text for name, text in examples.items() if text is not None}
        self._refuse_text(texts, columns)
        self._ignored.update(texts)

    def _time_names(self) -> tuple[str, ...]:
        column = self._choices.time_column
        return _TIME_COLUMNS if column is None else (axis_name(column),)

    def _check_asked(self, names: list[str], headings: list[str]) -> None:
        """Raise ValidationError for a column that was asked for and is not there."""
        choices = self._choices
        asked = [
            ("user_column", [choices.user_column] if choices.user_column else []),
            ("time_column", [choices.time_column] if choices.time_column else []),
            ("axes", list(choices.axes or ())),
            ("scales", list(choices.scales)),
            ("ignore", sorted(choices.ignore)),
        ]
        known = {*names, *map(axis_name, headings), *headings}
        for option, columns in asked:
            for column in columns:
                if column not in known and axis_name(column) not in known and self.headings is not None:
                    shown = nearest(axis_name(column), names) or f" among {_listed(names)}"
                    raise ValidationError(f"{option}: there is no column {brief(column)}{shown}")

    def _refuse_without_user(self, user: str, names: list[str]) -> None:
        likely = [name for name in names if _LIKE_AN_ID.search(name)]
        advice = (
            f"; if it is {likely[0]}: user_column={likely[0]!r} (or --user-column {likely[0]})"
            if likely
            else "; user_column (or --user-column) names the column that says whose states they are"
        )
        raise ValidationError(f"there is no column {user} among {_listed(names)}{advice}")

    def _text_in(self, values: Iterable[Any]) -> str | None:
        """What a column holds that has no number, nor what might be meant as one; None for a good column."""
        example: str | None = None
        for value in values:
            if value is None or (isinstance(value, str) and value.strip() in self._choices.absent):
                continue
            if isinstance(value, str):
                text = value.strip()
                meant = (_LIKE_A_NUMBER.fullmatch(text) and not _LIKE_A_TIME.match(text)) or (
                    text.lower() in _LIKE_ABSENT
                )
            else:
                text = str(value)
                meant = isinstance(value, numbers.Real | RowError) and not isinstance(value, bool)
            if meant:
                return None
            example = example or text[:30]
        return example

    def _refuse_text(self, texts: Mapping[str, str], columns: dict[str, int]) -> None:
        """Leave out columns of text where that is wished, else raise ValidationError."""
        choices = self._choices
        if not texts:
            return
        named = [name for name in texts if choices.axes is not None]
        if named or not choices.ignore_text:
            shown = _listed([f"{name} ({text!r})" for name, text in texts.items()])
            times = [name for name, text in texts.items() if _LIKE_A_TIME.match(text)]
            advice = "ignore_text=True (or --ignore-text) leaves them out"
            if times and "updated_at_unix_ms" not in self._places:
                advice += f"; for times: time_column={times[0]!r} (or --time-column {times[0]})"
            raise ValidationError(f"columns without numbers: {shown}; {advice}")
        for name in texts:
            del columns[name]

    # Rows

    def state(self, row: Any, tally: Tally) -> StateSnapshot:
        """The state of a row, or a ValueError that says what is wrong with it."""
        if isinstance(row, ValueError):
            raise row
        return self._of_names(row, tally) if self.headings is None else self._of_cells(row, tally)

    def _of_cells(self, cells: Sequence[Any], tally: Tally) -> StateSnapshot:
        if len(cells) != len(cast("list[str]", self.headings)):
            columns = plural(len(cast("list[str]", self.headings)), "column")
            raise RowError(f"{plural(len(cells), 'cell')} under {columns}", "another number of cells")
        places = self._places
        fields = {name: cells[at] for name, at in places.items()}
        values = self._quick(self._pick(cells))
        if values is not None:
            with contextlib.suppress(ValidationError):  # what is out of the scale is told below
                return self._snapshot(fields, make_axes(self._shape, values), tally)
        given = {name: cells[at] for name, at in self._columns.items()}
        return self._snapshot(fields, self._scaled(given, tally), tally)

    def _quick(self, values: tuple[Any, ...]) -> tuple[float, ...] | None:
        """The scaled values of a row that has nothing but numbers, NaN for one outside; None for others."""
        if self._typed:
            if not _NUMERIC.issuperset(map(type, values)):
                return None
        else:
            joined = "".join(values)
            if "_" in joined or not joined.isascii():  # which float() would take
                return None
            if self._decimal != ".":
                values = tuple([value.replace(self._decimal, ".") for value in values])
        try:
            found = tuple(map(float, values))
        except (ValueError, OverflowError):
            return None
        if self._as_is:
            return found
        return tuple(
            [
                (value - low) / (high - low) if low <= value <= high else math.nan
                for value, (low, high) in zip(found, self._scales, strict=True)
            ]
        )

    def _of_names(self, row: dict[str, Any], tally: Tally) -> StateSnapshot:
        choices = self._choices
        row = {name: value for name, value in row.items() if value is not None and not choices.ignores(name)}
        fields: dict[str, Any] = {}
        if (user := axis_name(choices.user_column or "user_id")) in row:
            fields["user_id"] = row.pop(user)
        for name in reversed([name for name in self._time_names() if name in row]):
            fields["updated_at_unix_ms"] = row.pop(name)
        fields |= {name: row.pop(name) for name in _FIELDS if name in row}
        given = row
        if isinstance(row.get("axes"), dict):  # what export writes, or flat
            given = row.pop("axes")
            beside = [name for name in row if name not in self._ignored]
            if beside and choices.axes is None:
                raise RowError(f"{beside[0][:64]!r} is neither a field nor in axes")
        wanted = None if choices.axes is None else set(map(axis_name, choices.axes))
        given = {
            name: value
            for name, value in given.items()
            if name not in self._ignored and (wanted is None or name in wanted) and not choices.ignores(name)
        }
        return self._snapshot(fields, self._scaled(given, tally), tally)

    def _scaled(self, given: Mapping[str, Any], tally: Tally) -> dict[str, float]:
        """The axes of a row, one value after the other."""
        found: dict[str, float] = {}
        for name, value in given.items():
            number = self._number(name, value, tally)
            if number is not None:
                found[name] = number
        scales = {name: self._scale_of(name) for name in found}
        outside = [name for name, value in found.items() if not scales[name][0] <= value <= scales[name][1]]
        if not outside:
            return {
                name: (value - low) / (high - low)
                for (name, value), (low, high) in zip(found.items(), scales.values(), strict=True)
            }
        if any(name not in self._choices.scales for name in outside):
            tally.outside += 1
            for name, value in found.items():
                if name not in self._choices.scales and math.isfinite(value):
                    low, high = tally.spans.get(name, (value, value))
                    tally.spans[name] = min(low, value), max(high, value)
        (low, high), name = scales[outside[0]], outside[0]
        raise RowError(
            f"{name}: {found[name]:g} is outside of the scale {low:g}:{high:g}",
            f"{name}: outside of the scale {low:g}:{high:g}",
        )

    def _number(self, name: str, value: Any, tally: Tally) -> float | None:
        """The number that a value is; None where it is absent."""
        if isinstance(value, RowError):
            raise RowError(f"{name}: {value}")
        text = value.strip() if isinstance(value, str) else None
        if value is None or text in self._choices.absent:
            return None
        if text is not None and not self._typed:
            plain = text.replace(self._decimal, ".")
            if _DECIMAL_NUMBER.fullmatch(plain):
                return float(plain)
            shown = repr(plain[:40])
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return math.inf if cast("Any", value) > 0 else -math.inf
        else:
            shown = brief(value)
        if text is not None and text.lower() in _LIKE_ABSENT:
            tally.absent.add(text)
        raise RowError(f"{name}: not a number: {shown}", f"{name}: not a number")

    def _snapshot(self, fields: dict[str, Any], axes: Any, tally: Tally) -> StateSnapshot:
        user_id = fields.get("user_id")
        if user_id is None:
            raise RowError("user_id is missing")
        if user_id.__class__ is not str:
            user_id = self._user_id(user_id)
        elif user_id[:1] == "'" and not self._typed and not self._choices.raw and _FORMULA.match(user_id):
            user_id = user_id[1:]
        given, time_ms = fields.get("updated_at_unix_ms"), self._now_ms
        if given is not None and (found := self._time(given)) is not None:
            time_ms = found
        others: dict[str, Any] = {}
        for name in self._others:
            value = fields.get(name)
            if value is not None and (value := self._field(name, value, tally)) is not None:
                others[name] = value
        made = StateSnapshot(user_id, axes, time_ms, **others)
        tally.newest = max(tally.newest, made.updated_at_unix_ms)
        if (shape := made.axes._shape) not in tally.shapes:
            tally.shapes.add(shape)
            tally.axes |= dict.fromkeys(shape.names)
        return made

    def _user_id(self, value: Any) -> Any:
        """An id that is no text: a number in a column is one."""
        if self.headings is not None and isinstance(value, numbers.Real) and not isinstance(value, bool):
            if (whole := cast("Any", value)) == int(whole):
                return str(int(whole))
            raise RowError(f"user_id: text or a whole number is needed, got {brief(value)}")
        return value

    def _time(self, value: Any) -> Any:
        """A time in milliseconds since 1970, where it is one; None where it is absent."""
        form = self._choices.time_format
        if isinstance(value, str):
            if (
                value.isdecimal()
                and value.isascii()
                and len(value) < _MOST_DIGITS
                and not (form or self._typed)
            ):
                return int(value)  # by far the most
            text = value.strip()
            if text in self._choices.absent:
                return None
            plain = text.replace(self._decimal, ".")
            try:
                if form is not None and form not in ("ms", "s"):
                    value = datetime.strptime(text, form)  # noqa: DTZ007 - as below
                elif self._typed or not _DECIMAL_NUMBER.fullmatch(plain):
                    value = datetime.fromisoformat(text)
                else:
                    value = int(text) if _WHOLE.fullmatch(text) else float(plain)
            except ValueError:
                needed = form or "milliseconds since 1970, or ISO 8601 as in 2026-01-17T12:00Z"
                raise RowError(
                    f"updated_at_unix_ms: not a time: {text[:40]!r} ({needed})",
                    f"updated_at_unix_ms: not a time ({needed})",
                ) from None
        if isinstance(value, date):
            if not isinstance(value, datetime):
                value = datetime(value.year, value.month, value.day, tzinfo=UTC)
            aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
            return (aware - UNIX_EPOCH) // _MILLISECOND
        if form == "s" and isinstance(value, int | float) and math.isfinite(value):
            return round(value * 1_000)
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def _field(self, name: str, value: Any, tally: Tally) -> Any:
        """The value of a field beside user, time and axes; None where it is absent."""
        if isinstance(value, str):
            if name == "source":
                return None if (text := value.strip()) in self._choices.absent else text
            if not self._typed and _WHOLE.fullmatch(value):
                return int(value)
        if name != "source" and not self._typed:
            value = self._number(name, value, tally)
        if name == "schema_version" and isinstance(value, float) and value.is_integer():
            return int(value)  # as pandas writes it
        if isinstance(value, RowError):
            raise value
        return value


def _listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most:,} more" if len(names) > most else "")


def _is_index(heading: str, values: list[Any]) -> bool:
    """Whether a column is that of the row numbers, which pandas and R write before the others."""
    if heading.strip() and not re.fullmatch(r"Unnamed: \d+", heading):
        return False
    texts = [str(value) for value in values]
    return bool(texts) and texts in (
        [str(at) for at in range(len(texts))],
        [str(at + 1) for at in range(len(texts))],
    )


class StateTable:
    """The states in a table, read row by row each time it is iterated; bad rows are left out and counted.

    ``axes`` are the names of its axes, ``report`` tells what the last reading found so far.
    ``has_heading`` is False for JSON, whose rows name their own axes.
    """

    def __init__(self, source: RowSource, choices: _Choices) -> None:
        self.has_heading = source.headings is not None
        self._source = source
        self._roles = _Roles(source, choices, time.time_ns() // 1_000_000)
        self._tally = Tally()
        self._checked = False

    def __iter__(self) -> Iterator[StateSnapshot]:
        tally = self._tally = Tally()
        make = self._roles.state
        for number, row in self._source.rows():
            try:
                snapshot = make(row, tally)
            except ValueError as error:  # ValidationError is one
                tally.add_bad(number, error)
            else:
                tally.good += 1
                yield snapshot

    def __repr__(self) -> str:
        tally = self._tally
        return f"<StateTable of {len(self.axes):,} axes, {tally.good:,} rows read, {tally.bad:,} bad>"

    def check(self, *, progress: Progress | None = None) -> TableReport:
        """Read all rows, and say what was found.

        ``progress(done, None)`` is called now and then with the number of rows read. Raises ValidationError
        where the file cannot be read to its end, OSError.
        """
        heard = check_progress(progress)
        for _ in self:
            if self._tally.good % 512 == 0:
                heard(self._tally.good + self._tally.bad, None)
        self._checked = True
        return self.report

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes: of the columns, in their order; JSON, which has none, is read for them."""
        if self.has_heading:
            return self._roles.axes
        if not self._checked:
            before, _ = self._tally, self.check()
            found, self._tally = tuple(self._tally.axes), before
            self._found = found
        return self._found

    @property
    def report(self) -> TableReport:
        """What the last reading found, or the one that goes on has found so far."""
        return self._tally.report(self._source.unit)


def read_table(
    source: Any,
    *,
    format: TableFormat | None = None,  # noqa: A002 - as pandas and others name it
    user_column: str | None = None,
    time_column: str | None = None,
    time_format: str | None = None,
    axes: Iterable[str] | None = None,
    ignore: Iterable[str] = (),
    ignore_text: bool = False,
    scale: tuple[float, float] = (0.0, 1.0),
    scales: Mapping[str, tuple[float, float]] | None = None,
    absent: Iterable[str] = ("", "NA"),
    encoding: str = "utf-8-sig",
    raw: bool = False,
) -> StateTable:
    r"""The states in a CSV, JSON or Parquet file, or in a data frame: to be iterated, as by upsert_many.

    ``source`` is a path, a stream of bytes, or a data frame of pandas or of what has Arrow's stream
    interface (Parquet and the latter need pyarrow). ``format`` is "csv", "jsonl" (an object a line), "json"
    (an array of objects) or "parquet"; None: by the name or the content; gzip is unpacked; text is in
    ``encoding``. CSV is separated by commas, tabs, or semicolons, with which commas are decimal marks.

    The column ``user_column`` (user_id) says whose states they are; ``time_column`` (updated_at_unix_ms or
    updated_at) when, in milliseconds since 1970 or in ISO 8601, UTC unless it says otherwise;
    ``time_format`` is "s" for seconds, or a form as of strptime; a row without a time gets that of this
    call. source, confidence and schema_version are themselves; all others, or those of ``axes`` alone, are
    axes, their names brought to snake_case, but for those of ``ignore``. Columns without any number are an
    error, unless ``ignore_text``. The ends of ``scale``, or of ``scales`` for one axis, become 0 and 1. What
    is in ``absent`` counts as nothing. ``raw`` leaves apostrophes before ids such as =1+1 where they are.

    Raises ValidationError for a heading or an option that does not fit, OSError for a file that cannot be
    read, MissingDependencyError. A row that is no state is left out and counted: see StateTable.report.

    >>> table = read_table(io.BytesIO(b"user_id,calm\nada,24\nbob,x\n"), scale=(0, 31))
    >>> [snapshot.user_id for snapshot in table], table.report.bad
    (['ada'], 1)
    """
    choices = _Choices(
        scale=_check_scale("scale", scale),
        scales={axis_name(name): _check_scale("scales", each) for name, each in _mapping(scales)},
        user_column=_check_text("user_column", user_column),
        time_column=_check_text("time_column", time_column),
        time_format=_check_text("time_format", time_format),
        axes=None if axes is None else _texts("axes", axes),
        ignore=frozenset(_texts("ignore", ignore)),
        ignore_text=check_flag("ignore_text", ignore_text),
        absent=frozenset(_texts("absent", absent)),
        encoding=_check_encoding(encoding),
        raw=check_flag("raw", raw),
    )
    if format is not None and format not in get_args(TableFormat):
        raise ValidationError(
            f"format: one of {', '.join(get_args(TableFormat))} is needed, got {brief(format)}"
        )
    if isinstance(source, str | os.PathLike) or (hasattr(source, "read") and hasattr(source, "seekable")):
        return StateTable(rows_of_file(source, format, choices.encoding, choices.user_column), choices)
    if type(source).__module__.partition(".")[0] == "pandas" and hasattr(source, "iloc"):
        return StateTable(rows_of_pandas(source), choices)
    if hasattr(source, "__arrow_c_stream__") and not isinstance(source, type):
        return StateTable(rows_of_arrow(source), choices)
    raise ValidationError(
        f"source: a path, a stream of bytes or a data frame is needed, got {type_name(source)}"
    )


def _check_text(field: str, value: object) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValidationError(f"{field}: a text is needed, got {brief(value)}")


def _texts(field: str, values: object) -> tuple[str, ...]:
    """Some texts; a text alone is a mistake that would be taken for its letters."""
    found = tuple(cast("Any", values)) if isinstance(values, Iterable) and not isinstance(values, str) else ()
    if not isinstance(values, Iterable) or isinstance(values, str) or not set(map(type, found)) <= {str}:
        raise ValidationError(f"{field}: a list of texts is needed, got {type_name(cast('Any', values))}")
    return found


def _mapping(scales: object) -> Any:
    if scales is None:
        return ()
    if not isinstance(scales, Mapping):
        raise ValidationError(f"scales: a mapping from axis to scale is needed, got {brief(scales)}")
    return cast("Any", scales).items()


def _check_scale(field: str, value: object) -> tuple[float, float]:
    ends: list[Any] = list(cast("Any", value)) if isinstance(value, tuple | list) else []
    if len(ends) == 2:  # noqa: PLR2004 - from low to high
        low, high = (check_number(field, end) for end in ends)
        if 0 < high - low < math.inf:
            return low, high
    raise ValidationError(
        f"{field}: two numbers, the lower first, are needed, as in (0, 31); got {brief(cast('Any', value))}"
    )


def _check_encoding(value: object) -> str:
    with contextlib.suppress(LookupError, TypeError, ValueError):
        io.TextIOWrapper(io.BytesIO(), encoding=cast("str", value))
        return codecs.lookup(cast("str", value)).name
    raise ValidationError(f"encoding: the name of one is needed, as utf-8, got {brief(value)}")


# What a store holds, as a table


def states_dataframe(states: Iterable[StateSnapshot], axes: Sequence[str]) -> Any:
    """A data frame of pandas, one row a state, sorted by user and time."""
    try:
        pd: Any = import_module("pandas")
    except ImportError as error:
        raise MissingDependencyError(
            'to_dataframe needs pandas: pip install "attuned-store[dataframe]"'
        ) from error
    chosen = sorted(states, key=lambda state: (state.user_id, time_of(state)))
    times = pd.Series([state.updated_at_unix_ms for state in chosen], dtype="int64")
    columns: dict[str, Any] = {
        "user_id": [state.user_id for state in chosen],
        "updated_at": times.astype("datetime64[ms]").dt.tz_localize("UTC"),
        "source": [state.source.value for state in chosen],
        "confidence": pd.Series([state.confidence for state in chosen], dtype="float64"),
        "schema_version": pd.Series([state.schema_version for state in chosen], dtype="int64"),
    }
    columns |= {
        name: pd.Series([state.axes.get(name, math.nan) for state in chosen], dtype="float64")
        for name in axes
    }
    return pd.DataFrame(columns)


# ------------------------------------------------------------------------------------------------------------
# attuned.openapi
# What the service answers, in one table: its routes, its OpenAPI document and its page are made of it.
# ------------------------------------------------------------------------------------------------------------


MAX_PAGE: Final = 1_000  # states or matches in one answer


class Operation(NamedTuple):
    """One method of one path; ``name`` is that of the method of Endpoint that answers.

    ``answers`` tells of each status the schema of its body, or the media type where it is no JSON; ``body``
    the schema of what is sent.
    """

    method: str
    path: str
    name: str
    summary: str
    answers: Mapping[int, str]
    parameters: tuple[str, ...] = ()
    body: str = ""

    @property
    def who(self) -> Literal["anybody", "user", "all"]:
        """Who may ask: anybody, the user of the path, or only who may do everything."""
        if self.name in {"ready", "openapi", "docs", "root"}:
            return "anybody"
        return "user" if "user_id" in self.parameters else "all"

    def problems(self) -> set[int]:
        """The statuses of the problems that it may answer with."""
        found: list[tuple[bool, tuple[int, ...]]] = [
            (self.who != "anybody", (401, 403)),
            (bool(self.parameters), (400, 404, 503)),
            (bool(self.body), (413, 415, 422)),
            ("If-Match" in self.parameters, (412,)),
            (self.method in ("PUT", "PATCH"), (409,)),
            (self.name == "metrics", (404,)),
        ]
        return {status for applies, statuses in found if applies for status in statuses}


_STATE = "/api/states/{user_id}"
_PAGE = ("limit", "after", "store")
_RANGE = ("user_id", "limit", "since", "until", "store")
_CONDITIONS = ("user_id", "If-Match", "If-None-Match", "store")
_WRITTEN = {200: "State", 201: "State"}
_REPORTS = {200: "Reports", 207: "Reports", 503: "Reports"}
_LOOKED = {200: "Health", 503: "Health"}
_PUT_SUMMARY = "Writes a state: into history, and as the latest if none is newer."
_PATCH_SUMMARY = "Merges axes and fields into the latest state; null removes an axis."
BACKUPS = (
    Operation("POST", "/api/snapshot", "snapshot", "Takes a snapshot (a backup) of every store.", _REPORTS),
    Operation("GET", "/api/health", "health", "How each store is, and the worst of them.", _LOOKED),
    Operation("GET", "/api/ready", "ready", "Whether every store answers.", {200: "Ready", 503: "Ready"}),
    Operation("GET", "/metrics", "metrics", "What prometheus_client collects.", {200: "text/plain"}),
)
STATES = (
    Operation("GET", "/api/states", "list_states", "The latest states of all users.", {200: "Page"}, _PAGE),
    Operation("GET", _STATE, "get_state", "The latest state.", {200: "State", 304: ""}, _CONDITIONS),
    Operation("PUT", _STATE, "put_state", _PUT_SUMMARY, _WRITTEN, _CONDITIONS, "NewState"),
    Operation("PATCH", _STATE, "patch_state", _PATCH_SUMMARY, _WRITTEN, _CONDITIONS, "Patch"),
    Operation("DELETE", _STATE, "delete_state", "Removes a user's states.", {204: ""}, _CONDITIONS),
    Operation("GET", f"{_STATE}/history", "get_history", "States, newest first.", {200: "States"}, _RANGE),
    Operation(
        "POST", "/api/search", "search", "Who feels most alike.", {200: "Matches"}, ("store",), "Search"
    ),
    Operation("GET", "/openapi.json", "openapi", "This, as OpenAPI 3.1.", {200: "OpenAPI"}),
    Operation("GET", "/docs", "docs", "This, to be read.", {200: "text/html"}),
    Operation("GET", "/", "root", "Leads to /docs.", {307: ""}),
)
_PARAMETERS = {
    "user_id": f"1 to {MAX_USER_ID_BYTES} bytes of UTF-8, percent-encoded: a slash is %2F.",
    "store": "The collection of the store, where several are served.",
    "limit": f"At most so many, 1 to {MAX_PAGE}; default: 100.",
    "after": "Only users after this one, as the next of the page before says.",
    "since": "Not before: milliseconds since 1970, or ISO 8601 with a time zone.",
    "until": "Not after; as since.",
    "If-Match": "Only if the latest state has this ETag, or with * if there is one; else 412.",
    "If-None-Match": "Only if it has another ETag, or with * if there is none; else 412, or 304 to GET.",
}


def _parameter(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if name == "limit":
        schema = {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 100}
    place = "path" if name == "user_id" else "header" if name[0].isupper() else "query"
    required = place == "path"
    return {
        "name": name,
        "in": place,
        "required": required,
        "description": _PARAMETERS[name],
        "schema": schema,
    }


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    """The schema of an object that has these members and no others."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _list_of(name: str) -> dict[str, Any]:
    return {"type": "array", "items": {"$ref": f"#/components/schemas/{name}"}}


def _schemas() -> dict[str, Any]:
    """The schemas of what is sent and answered."""
    text: dict[str, Any] = {"type": "string"}
    unit = {"type": "number", "minimum": 0, "maximum": 1}
    user_id = text | {"minLength": 1, "maxLength": MAX_USER_ID_BYTES}
    time = {"type": "integer", "minimum": 0, "maximum": MAX_TIME_MS}
    any_time = {"oneOf": [time, text | {"format": "date-time"}]}
    source = text | {"enum": [source.value for source in Source]}
    axes = {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z0-9]([a-z0-9_]{0,62}[a-z0-9])?$"},
        "additionalProperties": unit,
        "maxProperties": MAX_AXES,
    }
    state = {
        "user_id": user_id,
        "axes": axes,
        "updated_at_unix_ms": time,
        "source": source,
        "confidence": unit,
        "schema_version": {"type": "integer", "minimum": 1, "maximum": MAX_INTEGER},
    }
    given = state | {"updated_at_unix_ms": any_time}
    merged = axes | {"additionalProperties": {"oneOf": [unit, {"type": "null"}]}}
    search = {
        "query": {"oneOf": [axes, user_id], "description": "Axes, or the id of a user, who is left out."},
        "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 10},
        "score_threshold": {"type": "number"},
        "user_id": user_id,
        "exclude_user_id": text,
        "source": source,
        "min_confidence": unit,
        "since": any_time,
        "until": any_time,
        "history": {"type": "boolean", "default": False},
    }
    one_state = {"$ref": "#/components/schemas/State"}
    loose = {"type": "object"}
    return {
        "State": _object(state),
        "NewState": _object(given, ["axes"]),
        "Patch": _object(given | {"axes": merged}, []),
        "Page": _object({"states": _list_of("State"), "next": {"type": ["string", "null"]}}),
        "States": _object({"states": _list_of("State")}),
        "Search": _object(search, ["query"]),
        "Match": _object({"state": one_state, "score": {"type": "number"}}),
        "Matches": _object({"matches": _list_of("Match")}),
        "Ready": _object({"ready": {"type": "boolean"}}),
        "Health": _object({"status": text, "stores": {"type": "array", "items": loose}}),
        "Reports": _object({"status": text, "results": {"type": "array", "items": loose}}),
        "OpenAPI": loose,
        "Problem": {
            "type": "object",
            "description": "RFC 9457; `error` names the error of the library, where it is one.",
            "properties": {
                "title": text,
                "status": {"type": "integer"},
                "detail": text,
                "error": text,
                "ambiguous": {"type": "boolean", "description": "It may have been done."},
            },
            "required": ["title", "status", "detail"],
        },
    }


def _described(operation: Operation) -> dict[str, Any]:
    """An operation, as OpenAPI describes it."""
    responses: dict[str, Any] = {}
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    problems = operation.problems()
    for status in sorted({*operation.answers} | problems):
        kind = operation.answers.get(status, "")
        response: dict[str, Any] = {"description": HTTPStatus(status).phrase}
        if "/" in kind:
            response["content"] = {kind: {"schema": {"type": "string"}}}
        elif kind:
            schema = {"$ref": f"#/components/schemas/{kind}"}
            response["content"] = {"application/json": {"schema": schema}}
        if status in problems:
            response["content"] = response.get("content", {}) | problem
        if kind == "State":
            response["headers"] = {"ETag": {"schema": {"type": "string"}}}
        responses[str(status)] = response
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": list(map(_parameter, operation.parameters)),
        "responses": responses,
    }
    if operation.body:
        schema = {"$ref": f"#/components/schemas/{operation.body}"}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if operation.who == "anybody":
        described["security"] = []
    return described


def openapi_document(prefix: str) -> dict[str, Any]:
    """The service as an OpenAPI 3.1 document; ``prefix`` is the path that it is mounted under."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in (*STATES, *BACKUPS):
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "attuned_store", "version": __version__},
        "servers": [{"url": prefix or "/"}],
        "security": [{"bearer": []}, {}],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 13px/1.5 ui-monospace, monospace }
pre { padding: .7rem 1rem; overflow-x: auto; background: rgba(128, 128, 128, .12); border-radius: 6px }
h2 { font-size: 1rem; margin: 2rem 0 .2rem }
h2 b { display: inline-block; min-width: 4.5rem; color: #3b7dd8 }
p { margin: .2rem 0 } dl { margin: .4rem 0 } dt { float: left; clear: left }
dd { margin-left: 9rem } small { opacity: .75 }
"""
_EXAMPLES = {
    "put_state": """curl -X PUT {url}/api/states/ada --json '{"axes": {"warmth": 0.8}, "confidence": 0.9}'""",
    "patch_state": """curl -X PATCH {url}/api/states/ada --json '{"axes": {"warmth": 0.6}}'""",
    "get_state": "curl -i {url}/api/states/ada",
    "get_history": "curl '{url}/api/states/ada/history?limit=10&since=2026-01-01T00:00Z'",
    "search": """curl {url}/api/search --json '{"query": {"warmth": 0.9}, "limit": 5}'""",
}


def docs_page(url: str) -> str:
    """The service as a page of HTML, which fetches nothing; ``url`` is where it is."""
    parts: list[str] = []
    for operation in (*STATES, *BACKUPS):
        parts.append(f"<h2><b>{operation.method}</b> <code>{html.escape(operation.path)}</code></h2>")
        parts.append(f"<p>{html.escape(operation.summary)}</p>")
        told = "".join(
            f"<dt><code>{name}</code></dt><dd>{html.escape(_PARAMETERS[name])}</dd>"
            for name in operation.parameters
        )
        parts.append(f"<dl>{told}</dl>" if told else "")
        answers = ", ".join(map(str, sorted({*operation.answers} | operation.problems())))
        body = f"Body: {operation.body}. " if operation.body else ""
        parts.append(f"<p><small>{body}Answers: {answers}</small></p>")
        if operation.name in _EXAMPLES:
            parts.append(f"<pre>{html.escape(_EXAMPLES[operation.name].replace('{url}', url))}</pre>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>attuned_store</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style><h1>attuned_store</h1>"
        "<p>The states of users over HTTP: JSON in and out, problems as RFC 9457 has them. "
        "A token, where one is asked for, goes into <code>Authorization: Bearer</code>. "
        'Schemas are in <a href="openapi.json">openapi.json</a>.</p>' + "".join(parts) + "</html>\n"
    )


# ------------------------------------------------------------------------------------------------------------
# attuned.stores
# The stores that callers use: each method is one line over states/operations.py.
# ------------------------------------------------------------------------------------------------------------


class StoreBase:
    """What both forms of a store say of it without waiting for anything."""

    _operations: Operations
    _reports: Iterable[str] = SPANS.keys()  # the methods that are reported
    _always_on = ""  # the name of the engine, where all stores of a class have the same

    def __init__(self, config: Any = None, **options: Any) -> None:  # noqa: ARG002 - those of a store
        raise TypeError(
            f"{type(self).__name__} says what stores do; open_store and open_async_store make one"
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes that this store keeps, in the order of its vectors.

        An asynchronous store on disk or on a server knows them once it is open: StoreError before.
        """
        return self._operations.axes()

    @property
    def is_closed(self) -> bool:
        """Whether the store has been closed."""
        return self._operations.is_closed

    @property
    def location(self) -> str:
        """Where the store is, as open_store takes it: a directory, a url, or "memory://"."""
        return self._operations.place.location

    @property
    def engine(self) -> str:
        """The engine: memory, edge, local or server; "qdrant" while a directory has not been opened."""
        return self._operations.place.engine

    def _health_shown(self) -> Health | None:
        """How the store is, as far as that can be told without awaiting."""
        operations = self._operations
        if operations.is_closed or not operations.place.is_shown or operations.backend is UNOPENED:
            return None
        place = operations.place
        if isinstance(place, DirectoryPlace):
            place = blocking_twin(place)
        return run(Operations(operations.backend, place, BLOCKING, collection=operations.collection).health())

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(
            f"a {type(self).__name__} holds what is open in this process and cannot be pickled or copied; "
            "pass on its location, and open a store there"
        )

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open"
        place = "" if self.engine == "memory" else f"{self.location!r} "
        return f"<{type(self).__name__} {place}{state}>"

    def _repr_html_(self) -> str:
        return store_html(self, self._health_shown())


class StateStore(StoreBase):
    """The contract of every synchronous store.

    A store keeps, for each user, the *latest* snapshot (the one with the greatest time written since the
    user was last deleted; of two with the same time the later write replaces the other) and a *history* of
    the newest ``max_history_per_user`` distinct times, the latest included. Bad input raises ValidationError
    before anything is written; a write that returned is kept. It can be used from many threads, as a context
    manager, and read like a mapping from user id to latest snapshot.
    """

    def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """Write a snapshot: into history, and as the latest if it is not older than the current one.

        With ``expected``, the snapshot read before or None for "must not exist", only if that is still the
        latest; otherwise ConflictError is raised and nothing changes. Raises ValidationError for an axis
        that the store does not have, BackendError.
        """
        run(self._operations.upsert_latest(snapshot, expected))

    def upsert_many(self, snapshots: Iterable[StateSnapshot], *, progress: Progress | None = None) -> int:
        """Write many snapshots in batches, each as ``upsert_latest`` would; returns how many were written.

        A list or tuple is checked whole before the first write, any other iterable batch by batch; an error
        carries in ``written`` how many had been written. ``progress(done, total)`` is called after each
        batch, ``total`` None where it is unknown.
        """
        return run(self._operations.upsert_many(snapshots, progress))

    def patch(
        self, user_id: str, axes: Mapping[str, float | None], **fields: Unpack[SnapshotFields]
    ) -> StateSnapshot:
        """Merge axes into a user's latest snapshot, creating it where absent; returns the new snapshot.

        An axis given as None is removed. Fields are kept unless given; the time is now, and at least 1 ms
        after the one before. Raises ValidationError, ConflictError when other writers never let it through,
        BackendError.
        """
        return run(self._operations.patch(user_id, axes, fields))

    def update(
        self,
        user_id: str,
        fn: Callable[[StateSnapshot | None], StateSnapshot | None],
        *,
        attempts: int = 32,
    ) -> StateSnapshot | None:
        """Read, change and write a user's latest snapshot without losing another writer's change.

        ``fn`` gets the latest snapshot or None and returns the new one, of the same user and newer, or None
        to leave things as they are. It runs without a lock, may use the store, and may run several times.
        Returns the latest afterwards; raises ConflictError after ``attempts`` conflicts, ValidationError.
        """
        return run(self._operations.update(user_id, fn, attempts))

    @overload
    def get_latest(self, user_id: str) -> StateSnapshot | None: ...
    @overload
    def get_latest(self, user_id: str, default: T) -> StateSnapshot | T: ...
    def get_latest(self, user_id: str, default: Any = None) -> Any:
        """The latest snapshot of a user, or the default. Raises ValidationError, BackendError."""
        operations = self._operations
        return operations.backend.cached(user_id) or run(operations.get_latest(user_id)) or default

    def get_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        """The latest snapshots of those of these users who have one, by user id.

        Each user is read at one moment, not all of them at the same. Raises ValidationError, BackendError.
        """
        return run(self._operations.get_many(user_ids))

    def get_history(
        self,
        user_id: str,
        limit: int = 100,
        *,
        since: int | datetime | None = None,
        until: int | datetime | None = None,
    ) -> list[StateSnapshot]:
        """At most ``limit`` snapshots of a user, newest first; [] for an unknown user.

        ``since`` and ``until`` are aware datetimes or milliseconds since 1970, UTC, inclusive. The bounds of
        the store come first: its newest ``max_history_per_user``, of these what is younger than
        ``history_retention_days``. Raises ValidationError, BackendError.
        """
        return run(self._operations.get_history(user_id, limit, since, until))

    def plot_history(self, user_id: str, axes: Iterable[str] | None = None) -> Any:
        """Plot how a user's axes went, as one line each around neutral; returns matplotlib's Axes.

        ``axes`` names those to plot, from above to below; None: all that there are values of. At most the
        newest 1,000 snapshots of the history are shown, or the latest where there is no history. Raises
        UserNotFoundError, ValidationError for an axis that the store does not have, MissingDependencyError.
        """
        return plot_states(run(self._operations.states_to_plot(user_id, MAX_PLOTTED)), axes, self.axes)

    def search_similar(
        self,
        query: StateSnapshot | Mapping[str, float] | str,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
        user_id: str | None = None,
        exclude_user_id: str | None = None,
        source: Source | str | None = None,
        min_confidence: float | None = None,
        since: int | datetime | None = None,
        until: int | datetime | None = None,
        history: bool = False,
    ) -> list[Match]:
        """The users whose latest states are most like the query, best first.

        ``query`` is a snapshot, a mapping of axes, or the id of a user, who is then left out of the result
        unless ``exclude_user_id=""``. The score is the cosine of the axes around neutral, from -1 to 1; a
        neutral state scores 0. At most ``limit``, which is 1 or more, with a score of ``score_threshold`` or
        more. The filters: one ``user_id``, a ``source``, at least ``min_confidence`` from 0 to 1, taken
        between ``since`` and ``until``, both inclusive, aware datetimes or milliseconds since 1970, UTC.
        ``history=True`` searches all snapshots in history instead of the latest ones. Raises
        UserNotFoundError where the query is an unknown user, ValidationError, BackendError.
        """
        return run(
            self._operations.search(
                query,
                limit=limit,
                score_threshold=score_threshold,
                user_id=user_id,
                exclude_user_id=exclude_user_id,
                source=source,
                min_confidence=min_confidence,
                since=since,
                until=until,
                history=history,
            )
        )

    def users(self) -> Iterator[str]:
        """All user ids, read in pages while the iteration goes on; the order is unspecified.

        A user who is written or deleted meanwhile may be among them or not. Raises BackendError.
        """
        return _begun(PagedIterator(self._operations.users(), str))

    def items(self) -> Iterator[tuple[str, StateSnapshot]]:
        """All user ids with their latest snapshots, as ``users`` reads them. Raises BackendError."""
        return _begun(PagedIterator(self._operations.latest(), lambda latest: (latest.user_id, latest)))

    def to_dataframe(
        self,
        user_ids: Iterable[str] | None = None,
        *,
        since: int | datetime | None = None,
        until: int | datetime | None = None,
    ) -> Any:
        """A data frame of pandas with one row a state, of all users or of some, sorted by user and time.

        The states are the latest ones and what ``get_history`` returns, between ``since`` and ``until``. The
        columns are user_id, updated_at (UTC), source, confidence, schema_version, then the axes of the store,
        NaN where a state lacks one. Raises MissingDependencyError, ValidationError, BackendError.
        """
        return states_dataframe(run(self._operations.states_of(user_ids, since, until)), self.axes)

    def alter_axes(self, *, add: Iterable[str]) -> tuple[str, ...]:
        """Add axes to a store in memory, or in a directory and so to all stores on that.

        Returns all axes, those of ``add`` last. Where vectors have no room left, all are written anew, and
        others wait meanwhile; it is done whole or not at all. Raises ValidationError for a bad name or one
        that is there, StoreError for a server, whose axes others hold too: copy it to a new store.
        """
        return run(self._operations.alter_axes(add))

    def count(self, *, history: bool = False) -> int:
        """How many users there are; with ``history`` how many snapshots get_history can return for all."""
        return run(self._operations.count(history=history))

    def delete(self, user_id: str) -> bool:
        """Remove the latest snapshot and the history of a user; True if there was anything.

        No tombstone is left: an older state written afterwards recreates the user. Raises ValidationError,
        BackendError.
        """
        return run(self._operations.delete(user_id))

    def prune(self) -> int:
        """Remove the history that the bounds hide already; returns how many snapshots were removed."""
        return run(self._operations.prune())

    def collection(
        self,
        name: str,
        embedder: Embedder | None = None,
        *,
        indexes: Mapping[str, FieldKind] | None = None,
        ttl: float | None = None,
    ) -> Collection:
        """A collection of documents, which is opened, or made where absent, when it is first used.

        It belongs to the directory, server or memory, whatever the collection of states is called; ``name``
        must be another. With an ``embedder`` its texts are searched; without one a new collection is a keyed
        store. ``indexes`` says which fields of documents are filtered by: keyword, integer, float, bool,
        datetime or text each. Those that there are stay, more may be added. ``ttl`` is for how many seconds
        from their time documents are kept that do not say it themselves. Raises ValidationError; at the first
        use SchemaMismatchError where the collection was made otherwise, BackendError.
        """
        return Collection(collection_operations(self._operations, name, embedder, indexes, ttl))

    def collections(self) -> list[CollectionInfo]:
        """The collections of documents that there are, by name, with their sizes. Raises BackendError."""
        return run(list_collections(self._operations))

    def erase(self, user_id: str) -> ErasureReport:
        """Remove all of a user: states, and the documents in every collection; the report says what went.

        What others share stays. Raises ValidationError, BackendError.
        """
        return run(erase_user(self._operations, user_id))

    def create_snapshot(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        kind: Literal["auto", "native", "portable"] = "auto",
        reason: SnapshotReason = "manual",
        keep: int | None = None,
        keep_remote: bool = False,
        progress: Progress | None = None,
    ) -> SnapshotReport:
        """Write a backup of the store into a directory; the report says where it is.

        The directory is made where absent; without one it is QDRANT_SNAPSHOT_DIR, else
        ./data/qdrant/snapshots. ``kind`` "portable" is a file that every store can restore, holding for each
        user a state that existed while it was taken; "native" a Qdrant server's own, which is removed there
        afterwards unless ``keep_remote``, and is refused where no node has all shards; "auto" native on a
        server where it can be, portable elsewhere. With ``keep``, the new file is read back, then all but the
        newest so many of this collection and kind are removed: give stores whose collections are of one name
        directories of their own. ``reason`` goes into the report. Documents are in none of them so far; the
        report names their collections in its ``message``.
        ``progress(done, None)`` is called with the number of states written. Raises SnapshotError,
        ValidationError, BackendError; then there is no new file, and none was removed.
        """
        return run(
            self._operations.create_snapshot(
                progress, directory=directory, kind=kind, reason=reason, keep=keep, keep_remote=keep_remote
            )
        )

    def restore_snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        mode: RestoreMode = "replace",
        unchecked: bool = False,
        progress: Progress | None = None,
    ) -> SnapshotReport:
        """Bring back what a snapshot file holds.

        ``mode`` "replace" makes the store equal to the file: all or nothing, in memory and on disk; on a
        server in place, where until the end health() is degraded and a second try completes what an
        interrupted one began. "merge" adds what the file holds, which wins where the times are equal; "skip"
        adds only users who are absent. Either of these that was interrupted is completed by "merge".
        ``progress(done, total)`` is called with the number of states written; before that with the number
        verified, where the file is read twice. Raises SnapshotError for a file that is damaged or of other
        axes, and changes nothing then; also for a native one without the .sha256 beside it, whose contents
        nobody can check, unless ``unchecked``.
        """
        return run(self._operations.restore_snapshot(path, mode, progress, unchecked=unchecked))

    def health(self) -> Health:
        """How the store is, and how much it holds; never raises: what is wrong is in the ``message``."""
        return run(self._operations.health())

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Wait until a server answers, at most ``timeout`` seconds; any other store is ready at once.

        Raises what the server answers last, such as BackendUnavailableError, ValidationError.
        """
        run(self._operations.wait_until_ready(timeout))

    def close(self) -> None:
        """Release everything; harmless when repeated. Afterwards every other call but health() raises."""
        run(self._operations.close())

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes that this store keeps, in the order of its vectors."""
        run(self._operations.open())
        return self._operations.axes()

    def __getitem__(self, user_id: str) -> StateSnapshot:
        return self.get_latest(user_id) or run(self._operations.latest_or_raise(user_id))

    @overload
    def get(self, user_id: str) -> StateSnapshot | None: ...
    @overload
    def get(self, user_id: str, default: T) -> StateSnapshot | T: ...
    def get(self, user_id: str, default: Any = None) -> Any:
        """As ``get_latest``, under the name that a mapping has for it."""
        return self.get_latest(user_id, default)

    def keys(self) -> Iterator[str]:
        """As ``users``, under the name that a mapping has for it."""
        return self.users()

    def values(self) -> Iterator[StateSnapshot]:
        """All users' latest snapshots, as ``users`` reads them. Raises BackendError."""
        return _begun(PagedIterator(self._operations.latest(), lambda latest: latest))

    def __contains__(self, user_id: object) -> bool:
        self._operations.check_open()
        try:
            return self.get_latest(cast("str", user_id)) is not None
        except ValidationError:
            return False  # what cannot be an id is not in the store

    def __iter__(self) -> Iterator[str]:
        return self.users()

    def __len__(self) -> int:
        return self.count()

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> Self:
        self._operations.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _repr_html_(self) -> str:
        return store_html(self, None if self.is_closed else self.health())


def _begun(items: PagedIterator[Any, T]) -> PagedIterator[Any, T]:
    run(items.fill())  # a store that is closed says so at once
    return items


class AsyncStateStore(StoreBase):
    """The contract of every asynchronous store: that of StateStore, to be awaited.

    Cancelling a write leaves it done or not done, never half done. ``close`` is ``aclose``.
    """

    async def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        await self._operations.upsert_latest(snapshot, expected)

    async def upsert_many(
        self, snapshots: Iterable[StateSnapshot], *, progress: Progress | None = None
    ) -> int:
        """See StateStore.upsert_many; other tasks run between batches."""
        return await self._operations.upsert_many(snapshots, progress)

    async def patch(
        self, user_id: str, axes: Mapping[str, float | None], **fields: Unpack[SnapshotFields]
    ) -> StateSnapshot:
        """See StateStore.patch."""
        return await self._operations.patch(user_id, axes, fields)

    async def update(
        self,
        user_id: str,
        fn: Callable[[StateSnapshot | None], StateSnapshot | Awaitable[StateSnapshot | None] | None],
        *,
        attempts: int = 32,
    ) -> StateSnapshot | None:
        """See StateStore.update; ``fn`` may be an ``async def``."""
        return await self._operations.update(user_id, fn, attempts)

    @overload
    async def get_latest(self, user_id: str) -> StateSnapshot | None: ...
    @overload
    async def get_latest(self, user_id: str, default: T) -> StateSnapshot | T: ...
    async def get_latest(self, user_id: str, default: Any = None) -> Any:
        """See StateStore.get_latest."""
        operations = self._operations
        return operations.backend.cached(user_id) or await operations.get_latest(user_id) or default

    async def get_many(self, user_ids: Iterable[str]) -> dict[str, StateSnapshot]:
        """See StateStore.get_many."""
        return await self._operations.get_many(user_ids)

    async def get_history(
        self,
        user_id: str,
        limit: int = 100,
        *,
        since: int | datetime | None = None,
        until: int | datetime | None = None,
    ) -> list[StateSnapshot]:
        """See StateStore.get_history."""
        return await self._operations.get_history(user_id, limit, since, until)

    async def plot_history(self, user_id: str, axes: Iterable[str] | None = None) -> Any:
        """See StateStore.plot_history."""
        return plot_states(await self._operations.states_to_plot(user_id, MAX_PLOTTED), axes, self.axes)

    async def search_similar(
        self,
        query: StateSnapshot | Mapping[str, float] | str,
        *,
        limit: int = 10,
        score_threshold: float | None = None,
        user_id: str | None = None,
        exclude_user_id: str | None = None,
        source: Source | str | None = None,
        min_confidence: float | None = None,
        since: int | datetime | None = None,
        until: int | datetime | None = None,
        history: bool = False,
    ) -> list[Match]:
        """See StateStore.search_similar."""
        return await self._operations.search(
            query,
            limit=limit,
            score_threshold=score_threshold,
            user_id=user_id,
            exclude_user_id=exclude_user_id,
            source=source,
            min_confidence=min_confidence,
            since=since,
            until=until,
            history=history,
        )

    def users(self) -> AsyncIterator[str]:
        """See StateStore.users."""
        self._operations.check_open()
        return PagedIterator(self._operations.users(), str)

    def items(self) -> AsyncIterator[tuple[str, StateSnapshot]]:
        """See StateStore.items."""
        self._operations.check_open()
        return PagedIterator(self._operations.latest(), lambda latest: (latest.user_id, latest))

    async def to_dataframe(
        self,
        user_ids: Iterable[str] | None = None,
        *,
        since: int | datetime | None = None,
        until: int | datetime | None = None,
    ) -> Any:
        """See StateStore.to_dataframe; the frame is made in a worker thread."""
        operations = self._operations
        states = await operations.states_of(user_ids, since, until)
        return await operations.waits.call(lambda: states_dataframe(states, self.axes))

    async def alter_axes(self, *, add: Iterable[str]) -> tuple[str, ...]:
        """See StateStore.alter_axes."""
        return await self._operations.alter_axes(add)

    async def count(self, *, history: bool = False) -> int:
        """See StateStore.count."""
        return await self._operations.count(history=history)

    async def delete(self, user_id: str) -> bool:
        """See StateStore.delete."""
        return await self._operations.delete(user_id)

    async def prune(self) -> int:
        """See StateStore.prune."""
        return await self._operations.prune()

    def collection(
        self,
        name: str,
        embedder: Embedder | None = None,
        *,
        indexes: Mapping[str, FieldKind] | None = None,
        ttl: float | None = None,
    ) -> AsyncCollection:
        """See StateStore.collection; not to be awaited."""
        return AsyncCollection(collection_operations(self._operations, name, embedder, indexes, ttl))

    async def collections(self) -> list[CollectionInfo]:
        """See StateStore.collections."""
        return await list_collections(self._operations)

    async def erase(self, user_id: str) -> ErasureReport:
        """See StateStore.erase."""
        return await erase_user(self._operations, user_id)

    async def create_snapshot(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        kind: Literal["auto", "native", "portable"] = "auto",
        reason: SnapshotReason = "manual",
        keep: int | None = None,
        keep_remote: bool = False,
        progress: Progress | None = None,
    ) -> SnapshotReport:
        """See StateStore.create_snapshot; cancelled, it leaves the finished file or none."""
        return await self._operations.create_snapshot(
            progress, directory=directory, kind=kind, reason=reason, keep=keep, keep_remote=keep_remote
        )

    async def restore_snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        mode: RestoreMode = "replace",
        unchecked: bool = False,
        progress: Progress | None = None,
    ) -> SnapshotReport:
        """See StateStore.restore_snapshot; cancelled, a replacement changes nothing, but on a server."""
        return await self._operations.restore_snapshot(path, mode, progress, unchecked=unchecked)

    async def health(self) -> Health:
        """See StateStore.health."""
        return await self._operations.health()

    async def wait_until_ready(self, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - as in the other form
        """See StateStore.wait_until_ready."""
        await self._operations.wait_until_ready(timeout)

    async def aclose(self) -> None:
        """See StateStore.close."""
        await self._operations.close()

    def __aiter__(self) -> AsyncIterator[str]:
        return self.users()

    async def __aenter__(self) -> Self:
        self._operations.check_open()
        if self._operations.backend is UNOPENED:  # a server need not be there when an application starts
            await self._operations.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class _InMemory(StoreBase):
    """What is special of reporting what stores in memory do."""

    _always_on = "memory"

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Make a store that reports from the beginning, if it seems to want that: see reporting_class."""
        config = options.get("config", arguments[0] if arguments else None)
        wanted = options.get("telemetry", getattr(config, "telemetry", True))
        return cast("Self", object.__new__(reporting_class(cls, wanted=wanted is True)))


class MemoryStore(_InMemory, StateStore):
    """A store in this process's memory: nothing survives it, and nothing is faster.

    Reads take no lock, unless on a free-threaded Python a write comes between. Options are the fields of
    MemoryStoreConfig. It needs attrs and cachetools alone; searching is faster with numpy.

    >>> store = MemoryStore(axes=["warmth"], max_history_per_user=10)
    >>> store.upsert_latest(StateSnapshot("ada", {"warmth": 1}))
    >>> len(store), store["ada"].axes["warmth"]
    (1, 1.0)
    """

    def __init__(self, config: MemoryStoreConfig | None = None, **options: Unpack[MemoryOptions]) -> None:
        self.config = make_config(MemoryStoreConfig, config, options)
        self._backend, self._operations = _in_memory(self.config, BLOCKING)
        observe(self)

    # Plain methods, as nothing here is to be waited for: a body would take longer than what it does.

    def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        check_state(self._backend.schema, snapshot)
        if expected is not ANY:
            check_expected(expected)
        self._backend.upsert_latest(snapshot, expected)

    @overload
    def get_latest(self, user_id: str) -> StateSnapshot | None: ...
    @overload
    def get_latest(self, user_id: str, default: T) -> StateSnapshot | T: ...
    def get_latest(self, user_id: str, default: Any = None) -> Any:
        """See StateStore.get_latest."""
        try:
            return self._backend.timelines[user_id][-1]
        except (KeyError, TypeError, IndexError):
            return self._backend.get_latest(user_id) or default


class AsyncMemoryStore(_InMemory, AsyncStateStore):
    """MemoryStore for asyncio and trio (which needs anyio).

    Single operations run at once and never suspend; long ones let other tasks run every few milliseconds.
    """

    def __init__(self, config: MemoryStoreConfig | None = None, **options: Unpack[MemoryOptions]) -> None:
        self.config = make_config(MemoryStoreConfig, config, options)
        self._backend, self._operations = _in_memory(self.config, Suspending())
        observe(self)

    async def upsert_latest(self, snapshot: StateSnapshot, *, expected: Expected = ANY) -> None:
        """See StateStore.upsert_latest."""
        check_state(self._backend.schema, snapshot)
        if expected is not ANY:
            check_expected(expected)
        self._backend.upsert_latest(snapshot, expected)

    @overload
    async def get_latest(self, user_id: str) -> StateSnapshot | None: ...
    @overload
    async def get_latest(self, user_id: str, default: T) -> StateSnapshot | T: ...
    async def get_latest(self, user_id: str, default: Any = None) -> Any:
        """See StateStore.get_latest."""
        return self._backend.get_latest(user_id) or default


def _in_memory(config: MemoryStoreConfig, waits: Waits) -> tuple[MemoryBackend, Operations]:
    backend = MemoryBackend(config, waits)
    return backend, MemoryOperations(backend, MemoryPlace(backend), waits, collection=DEFAULT_COLLECTION)


class QdrantStore(StateStore):
    """A store on disk, through Qdrant embedded in this process, or on a Qdrant server.

    Options are the fields of QdrantStoreConfig. ``path`` is a directory, which one process owns; within it
    any number of stores, synchronous and asynchronous, share it. Raises StoreLockedError when another process
    has it, SchemaMismatchError when it holds something else, MissingDependencyError. ``url`` is a server or
    cluster, of version 1.17 or newer, which is connected to on first use.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with QdrantStore(path=directory) as store:
    ...     store.upsert_latest(StateSnapshot("ada", {"warmth": 0.8}))
    >>> with QdrantStore(path=directory) as store:
    ...     store["ada"].axis("warmth")
    0.8
    """

    config: QdrantStoreConfig

    def __init__(self, config: QdrantStoreConfig | None = None, **options: Unpack[QdrantOptions]) -> None:
        self.config = make_qdrant_config(config, options)
        self._operations = _on_qdrant(self.config, BLOCKING)
        observe(self)  # before it is opened, which is reported too
        if self.config.url is None:
            run(self._operations.open())


class AsyncQdrantStore(AsyncStateStore):
    """QdrantStore for asyncio and trio; it opens on entering ``async with`` or at the first await.

    With a server it connects at the first operation, so that an application may start before its server.
    With Qdrant Edge, whose calls are short and hold the interpreter anyway, operations run in place; with
    qdrant-client's local mode they run in a worker thread. A write that is cancelled is done or not done.
    """

    config: QdrantStoreConfig

    def __init__(self, config: QdrantStoreConfig | None = None, **options: Unpack[QdrantOptions]) -> None:
        self.config = make_qdrant_config(config, options)
        self._operations = _on_qdrant(self.config, Suspending())
        observe(self)


def _on_qdrant(config: QdrantStoreConfig, waits: Waits) -> Operations:
    if config.url is None:
        place: DirectoryPlace | ServerPlace = DirectoryPlace(config, waits)
        backend: Any = UNOPENED
    else:
        place = ServerPlace(config, waits)
        backend = place.connection.backend
    operations = Operations(backend, place, waits, collection=config.collection_name)
    operations.slow_ms = config.slow_operation_ms
    operations.reporter = REPORTING.reporter(wanted=config.telemetry)
    return operations


# ------------------------------------------------------------------------------------------------------------
# attuned.open
# Stores by their address.
# ------------------------------------------------------------------------------------------------------------


_DEFAULT_TARGET = "./attuned_state"
_BARE_ADDRESS = re.compile(r":?[\w.-]{2,}:(?=\d|/|$)")  # localhost:6333, :memory: or file:/mood, not C:\mood


def target_options(target: str | os.PathLike[str] | None) -> tuple[bool, dict[str, Any]]:
    """Whether a target is memory, and otherwise the path or url that it means."""
    text = target if target is not None else default_target()
    if not isinstance(text, str):
        return False, {"path": check_path(text), "url": None}
    scheme, separator, rest = text.partition("://")
    if not separator and not _BARE_ADDRESS.match(text):
        return False, {"path": text, "url": None}
    match scheme.lower():
        case "memory" if rest in ("", "/"):
            return True, {}
        case "file":
            from urllib.request import url2pathname  # a third of the time of importing this file

            return False, {"path": url2pathname(rest), "url": None}
        case "http" | "https":
            return False, {"path": None, "url": text}
        case _:
            pass
    raise ValidationError(
        f"target: {shown_url(text)} is not understood; use memory://, a path such as ./mood, file://<path>, "
        "http://<host>:6333 or https://<host>:6333"
    )


def default_target() -> str:
    """What open_store opens without a target."""
    named = (
        os.environ.get(name, "").strip() for name in ("ATTUNED_STORE", "QDRANT_URL", "ATTUNED_STORE_PATH")
    )
    return next(filter(None, named), _DEFAULT_TARGET)


def open_store(target: str | os.PathLike[str] | None = None, **options: Unpack[QdrantOptions]) -> StateStore:
    """A synchronous store: "memory://", a path or "file://<path>", or "http(s)://<host>:6333".

    Without a target: what ATTUNED_STORE names, else QDRANT_URL, else ATTUNED_STORE_PATH, else
    ./attuned_state. Options are the fields
    of the store's configuration; those not given come from the environment (see from_env). Raises
    ValidationError for a target of another kind, and what the store raises on opening.
    """
    in_memory, place = target_options(target)
    if in_memory:
        return MemoryStore(MemoryStoreConfig.from_env(), **cast("MemoryOptions", options))
    return QdrantStore(attrs.evolve(QdrantStoreConfig.from_env(), **place), **options)


def open_async_store(
    target: str | os.PathLike[str] | None = None, **options: Unpack[QdrantOptions]
) -> AsyncStateStore:
    """The asynchronous store for a target, as open_store; not to be awaited: it opens when first used."""
    in_memory, place = target_options(target)
    if in_memory:
        return AsyncMemoryStore(MemoryStoreConfig.from_env(), **cast("MemoryOptions", options))
    return AsyncQdrantStore(attrs.evolve(QdrantStoreConfig.from_env(), **place), **options)


def store_exists(target: str | os.PathLike[str] | None = None) -> bool:
    """Whether there is a store at a target, so that open_store would not make a new one.

    False for "memory://"; True for a server that cannot be asked, so that opening tells why.
    """
    in_memory, place = target_options(target)
    if in_memory:
        return False
    config = attrs.evolve(QdrantStoreConfig.from_env(), **place)
    if config.url is None:
        return collection_exists(config) or absolute_path(cast("str", config.path)).is_file()
    with QdrantStore(config) as store:
        health = store.health()
        return health.status == "unhealthy" or health.collection_status is not None


# ------------------------------------------------------------------------------------------------------------
# attuned.copying
# From store to store, from files to stores, and snapshots when an application starts.
# ------------------------------------------------------------------------------------------------------------


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


# ------------------------------------------------------------------------------------------------------------
# attuned.service
# Stores over HTTP.
# ------------------------------------------------------------------------------------------------------------


_Who = bool | str | None
_Authorize = Callable[["Request"], _Who | Awaitable[_Who]]
_STATUSES = ("healthy", "degraded", "unhealthy")  # the worst comes last
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_MAX_BODY = 256 << 10  # bytes: a state of as many axes as there may be has 90 KiB
_MAX_DEPTH = 32
_MAX_ATTEMPTS = 32
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)
_TAGS = re.compile(r'\*|(?:W/)?"[!#-~]*"(?:[ \t]*,[ \t]*(?:W/)?"[!#-~]*")*')
_SEARCH_FIELDS = inspect.signature(StateStore.search_similar).parameters.keys() - {"self"}


class Problem(Exception):  # noqa: N818 - RFC 9457 calls it so
    """An answer that says what is wrong with a request; ``members`` are told beside."""

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.headers, self.members = status, headers, members

    @classmethod
    def of(cls, error: StoreError, operation: Operation) -> Problem:
        """What an error of a store is to who sent the request."""
        members: dict[str, Any] = {"error": type(error).__name__}
        if getattr(error, "ambiguous", False):
            members["ambiguous"] = True
        status = 422 if operation.body else 400
        for kind, other in ((UserNotFoundError, 404), (ConflictError, 409), (ValidationError, status)):
            if isinstance(error, kind):
                return cls(other, str(error), **members)
        # What is wrong beneath may name hosts and directories, which is for the log alone.
        LOGGER.warning("%s %s: %s", operation.method, operation.path, one_line(str(error)))
        headers = dict[str, str]()
        if isinstance(error, StoreLockedError) or (isinstance(error, BackendError) and error.retryable):
            wait_s = error.retry_after_s if isinstance(error, WaitError) else 1.0
            headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
        return cls(503, "the store cannot do this now; the log of the service says why", headers, **members)

    def response(self) -> Response:
        """The problem as a response, without control characters."""
        if self.status == HTTPStatus.NOT_MODIFIED:
            return _answer(None, self.status, self.headers)
        content = {"title": HTTPStatus(self.status).phrase, "status": self.status}
        detail = one_line(str(self))
        return _answer(
            {**content, "detail": detail, **self.members},
            self.status,
            self.headers,
            "application/problem+json",
        )


def _answer(
    content: Mapping[str, Any] | None,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    media_type: str = "application/json",
) -> Response:
    from starlette.responses import Response

    # Of ASCII alone: a path may hold bytes that are no text, which JSONResponse cannot send.
    told = {**_HEADERS, **(headers or {})}
    if content is None:
        return Response(None, status, told)
    return Response(json.dumps(content) + "\n", status, told, media_type)


async def _call(store: AnyStore, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of a store of either form."""
    call = functools.partial(getattr(store, method), *arguments, **options)
    return await run_in_thread(call) if isinstance(store, StateStore) else await call()


# Who may ask.


def _is_cross_site(request: Request) -> bool:
    """Whether a page of another site sends the request, as the browser tells."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin, host = request.headers.get("origin"), request.headers.get("host")
    return origin is not None and (not host or origin.partition("://")[2].lower() != host.lower())


def _is_local(request: Request) -> bool:
    """Authorizes requests that come from this machine and name it.

    A page may give its own host the address 127.0.0.1, and a proxy hands on what comes from anywhere: neither
    gets past this.
    """
    headers, client = request.headers, request.client
    host = re.fullmatch(r"\[?(.*?)\]?(?::\d+)?", headers.get("host", ""))
    forwarded = {"forwarded", "via", "x-forwarded-for", "x-real-ip"} & set(headers)
    # A server that believes X-Forwarded-For may know of nobody.
    local = client is not None and is_loopback(client.host or "") and not forwarded
    return local and host is not None and is_loopback(host[1].lower())


def _is_anybody(request: Request) -> bool:  # noqa: ARG001 - whoever it is
    return True


class _EncodedPaths:
    """Lets an application see paths as they were sent, so that an encoded slash parts nothing."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            root, path = scope.get("root_path", ""), scope["path"]
            prefix = root if path.startswith(f"{root}/") else ""
            sent = (scope.get("raw_path") or quote(path).encode()).partition(b"?")[0].decode("latin-1")
            below = sent.split("/")[1 + prefix.count("/") :]
            scope = {**scope, "path": "/".join([prefix, *below])}
        await self._app(scope, receive, send)


def _user_of(segment: str) -> str:
    """The user that a segment of a path names."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", segment):
        raise ValidationError("user_id: a % in a path begins an escape such as %2F, and is itself %25")
    try:
        return check_user_id(unquote_to_bytes(segment.encode("latin-1")).decode())
    except UnicodeDecodeError:
        raise ValidationError("user_id: a path is percent-encoded UTF-8") from None


class _Resource:
    """What answers requests for one path: an ASGI application over the methods of an endpoint."""

    def __init__(self, endpoint: Endpoint, operations: Sequence[Operation], authorize: _Authorize) -> None:
        self.endpoint = endpoint
        self._operations = {operation.method: operation for operation in operations}
        self._authorize = authorize
        methods = {"OPTIONS", *self._operations, *(["HEAD"] if "GET" in self._operations else [])}
        self._allow = {"Allow": ", ".join(sorted(methods))}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import ClientDisconnect, Request

        request = Request(scope, receive)
        operation = self._operations.get("GET" if request.method == "HEAD" else request.method)
        try:
            if operation is not None:
                response = await self._respond(request, operation)
            elif request.method == "OPTIONS":
                response = _answer(None, 204, self._allow)
            else:
                response = Problem(405, f"allowed are {self._allow['Allow']}", self._allow).response()
        except Problem as problem:
            response = problem.response()
        except ClientDisconnect:
            response = Problem(400, "the body ended early").response()
        await response(scope, receive, send)

    async def _respond(self, request: Request, operation: Operation) -> Response:
        bad: ValidationError | None = None
        if "user_id" in request.path_params:  # authorize sees it decoded, and one that is none as nobody
            try:
                request.path_params["user_id"] = _user_of(request.path_params["user_id"])
            except ValidationError as error:
                request.path_params["user_id"], bad = "", error
        if operation.who != "anybody":
            await self._admit(request, operation)
        if bad is not None:
            raise Problem(400, str(bad), error=type(bad).__name__)
        try:
            return await cast("Awaitable[Response]", getattr(self.endpoint, operation.name)(request))
        except StoreError as error:
            raise Problem.of(error, operation) from error

    async def _admit(self, request: Request, operation: Operation) -> None:
        """Raise unless who sent a request may do what it asks for."""
        challenge = {"WWW-Authenticate": "Bearer"}
        if "authorization" not in request.headers and _is_cross_site(request):
            raise Problem(401, "a request of another site needs the header Authorization", challenge)
        who = self._authorize(request)
        if inspect.isawaitable(who):
            who = await who
        if who is True:
            return
        if not isinstance(who, str) or not who:
            raise Problem(401, "not authorized", challenge)
        if operation.who != "user" or request.path_params["user_id"] != who:
            raise Problem(403, "a user may read and change the own state alone")


# What a request holds.


def _moment(field: str, value: Any) -> Any:
    """A time as a store takes it, of what a query or a body holds."""
    if not isinstance(value, str):
        return value
    try:
        if re.fullmatch(r"\d{1,19}", value, re.ASCII):
            return int(value)
        if len(value) <= 40:  # noqa: PLR2004 - the longest way to write a time has 35
            # In a query a + that is not encoded is a blank.
            return datetime.fromisoformat(re.sub(r"(T.*) (\d\d:?\d\d)$", r"\1+\2", value))
    except ValueError:
        pass  # as below
    raise ValidationError(
        f"{field}: milliseconds since 1970 or ISO 8601 with a time zone are needed, got {brief(value)}"
    )


def _limit_of(request: Request) -> int:
    text = request.query_params.get("limit", "100")
    return check_integer("limit", int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text, 1, MAX_PAGE)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a member is there twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("no number of JSON, or too large a one")
    return number


async def _body_of(request: Request) -> dict[str, Any]:
    """The object that a request brings, read and taken apart within bounds."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(?:[\w.-]+\+)?json", kind):  # a page of another site cannot send it
        raise Problem(
            415, "the body is to be JSON, with Content-Type: application/json (curl --json sends it)"
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise Problem(413, f"a body has at most {_MAX_BODY:,} bytes")
    depth = deepest = 0
    for token in _BRACKETS.finditer(body):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        deepest = max(depth, deepest)
    if deepest > _MAX_DEPTH:
        raise Problem(400, f"a body has at most {_MAX_DEPTH} levels")
    try:
        found = json.loads(
            body.decode(), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Problem(400, f"the body is not JSON: see {where}") from None
    except ValueError:
        reason = "UTF-8, each member of an object once, and finite numbers are needed"
        raise Problem(400, f"the body is not JSON: {reason}") from None
    if not isinstance(found, dict):
        raise ValidationError(f"the body: an object is needed, got {type_name(found)}")
    return cast("dict[str, Any]", found)


async def _state_fields(request: Request, known: Sequence[str]) -> dict[str, Any]:
    """The fields of a state that a request brings, with the user of its path."""
    user_id = request.path_params["user_id"]
    fields = {"user_id": user_id, **await _body_of(request)}
    if fields["user_id"] != user_id:
        raise ValidationError("user_id: the body is to name the user of the path, or none")
    if not isinstance(fields.get("axes", {}), dict):
        raise ValidationError(f"axes: an object is needed, got {type_name(fields['axes'])}")
    if "updated_at_unix_ms" in fields:
        fields["updated_at_unix_ms"] = _moment("updated_at_unix_ms", fields["updated_at_unix_ms"])
    _check_known(fields, known)
    return fields


def _check_known(fields: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in fields:
        if name not in known:
            raise ValidationError(f"unknown field {brief(name)}; known are {', '.join(known)}")


# Conditional requests (RFC 9110): the ETag of a user's latest state.


def _tag(state: StateSnapshot) -> str:
    text = json.dumps(state.to_dict(), sort_keys=True)
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


def _is_conditional(request: Request) -> bool:
    return "if-match" in request.headers or "if-none-match" in request.headers


def _check_conditions(request: Request, latest: StateSnapshot | None) -> None:
    """Raise unless the latest state is what the request's conditions say."""
    tag = "" if latest is None else _tag(latest)
    for header, weak in (("If-Match", ""), ("If-None-Match", "(?:W/)?")):
        if header.lower() not in request.headers:
            continue
        given = ", ".join(request.headers.getlist(header)).strip()
        if not _TAGS.fullmatch(given):
            raise Problem(400, f'{header}: * or ETags in quotes are needed, as in "0a1b"')
        named = given == "*" or re.search(rf"(?:^|[ \t,]){weak}{tag}", given) is not None
        if (bool(tag) and named) is not bool(weak):
            continue
        if weak and request.method in ("GET", "HEAD"):
            raise Problem(304, "", {"ETag": tag})
        raise Problem(412, f"{header}: the latest state is another one, or not there")


def _state_answer(state: StateSnapshot, status: int = 200) -> Response:
    return _answer(state.to_dict(), status, {"ETag": _tag(state)})


class _Requested:
    """A snapshot of one store after another, for all requests that come before its end.

    One of them takes the snapshots while the others wait; is it cancelled, another goes on where it was.
    """

    def __init__(self, stores: Sequence[AnyStore], directory: Path | None, keep: int | None) -> None:
        from anyio import Lock

        self._stores, self._directory, self._keep = stores, directory, keep
        self._turn = Lock()
        self._thread_turn = threading.Lock()
        self.requests = 0
        self.reports: list[SnapshotReport] = []

    async def finish(self) -> None:
        """Take the snapshots that are left to be taken."""
        async with self._turn:
            while not self.is_done:
                number = len(self.reports)
                store = self._stores[number]
                if isinstance(store, StateStore):
                    await run_in_thread(functools.partial(self._take, store, number))
                else:
                    self.reports.append(await self._async_take(store))

    @property
    def is_done(self) -> bool:
        return len(self.reports) == len(self._stores)

    def _take(self, store: StateStore, number: int) -> None:
        with self._thread_turn:  # asyncio may have cancelled a request without its thread, which goes on
            if number == len(self.reports):
                try:
                    report = store.create_snapshot(self._directory, reason="api", keep=self._keep)
                except Exception as error:  # noqa: BLE001 - the other stores come next
                    report = failed_report(store.location, "api", error)
                self.reports.append(report)

    async def _async_take(self, store: AsyncStateStore) -> SnapshotReport:
        try:
            return await store.create_snapshot(self._directory, reason="api", keep=self._keep)
        except Exception as error:  # noqa: BLE001 - the other stores come next
            return failed_report(store.location, "api", error)


class Endpoint:
    """What answers the requests; it belongs to no event loop."""

    def __init__(self, stores: Sequence[AnyStore], directory: Path | None, keep: int | None) -> None:
        self._stores, self._directory, self._keep = stores, directory, keep
        self._taking: _Requested | None = None

    def _store_of(self, request: Request) -> AnyStore:
        """The store that a request names, or the only one."""
        stores = {store._operations.collection: store for store in self._stores}
        name = request.query_params.get("store")
        if name is None and len(self._stores) == 1:
            return self._stores[0]
        if name is None:
            raise Problem(400, f"store: one of {', '.join(stores)} is needed")
        if name not in stores:
            raise Problem(404, f"store: there is none of this name; there are {', '.join(stores)}")
        return stores[name]

    async def list_states(self, request: Request) -> Response:
        """A page of states, by user id."""
        store, limit = self._store_of(request), _limit_of(request)
        after = request.query_params.get("after", "")
        if isinstance(store, StateStore):
            users = store.users  # read in pages, in the thread
            chosen = await run_in_thread(
                lambda: heapq.nsmallest(limit + 1, (user for user in users() if user > after))
            )
        else:
            chosen = heapq.nsmallest(limit + 1, [user async for user in store.users() if user > after])
        page = chosen[:limit]
        states = await _call(store, "get_many", page)
        shown = [states[user].to_dict() for user in page if user in states]
        return _answer({"states": shown, "next": page[-1] if len(chosen) > limit else None})

    async def get_state(self, request: Request) -> Response:
        """The latest state of a user."""
        user_id = request.path_params["user_id"]
        latest = await _call(self._store_of(request), "get_latest", user_id)
        if latest is None:
            raise unknown_user_error(user_id)
        _check_conditions(request, latest)
        return _state_answer(latest)

    async def put_state(self, request: Request) -> Response:
        """Write a state of a user."""
        store, user_id = self._store_of(request), request.path_params["user_id"]
        known = [field.name for field in attrs.fields(StateSnapshot)]
        state = StateSnapshot.from_dict(await _state_fields(request, known))
        for _ in range(_MAX_ATTEMPTS):
            latest = await _call(store, "get_latest", user_id)
            _check_conditions(request, latest)
            try:
                expected = latest if _is_conditional(request) else ANY
                await _call(store, "upsert_latest", state, expected=expected)
            except ConflictError as conflict:
                if conflict.ambiguous:
                    raise
            else:
                return _state_answer(state, 201 if latest is None else 200)
        raise Problem(409, "others write to this user all the while; try again later")

    async def patch_state(self, request: Request) -> Response:
        """Merge axes and fields into the latest state of a user."""
        store = self._store_of(request)
        fields = await _state_fields(request, ["user_id", "axes", *SnapshotFields.__annotations__])
        user_id, axes = fields.pop("user_id"), fields.pop("axes", {})
        given = {name: value for name, value in axes.items() if value is not None}
        found: list[StateSnapshot | None] = []

        def merge(latest: StateSnapshot | None) -> StateSnapshot:
            _check_conditions(request, latest)
            found.append(latest)
            merged = (latest or StateSnapshot(user_id, {}, 0)).patched(
                given, **cast("SnapshotFields", fields)
            )
            kept = {name: value for name, value in merged.axes.items() if name in given or name not in axes}
            return attrs.evolve(merged, axes=kept)

        state = await _call(store, "update", user_id, merge)
        return _state_answer(state, 201 if found[-1] is None else 200)

    async def delete_state(self, request: Request) -> Response:
        """Remove all states of a user."""
        store, user_id = self._store_of(request), request.path_params["user_id"]
        if _is_conditional(request):
            _check_conditions(request, await _call(store, "get_latest", user_id))
        if not await _call(store, "delete", user_id):
            raise unknown_user_error(user_id)
        return _answer(None, 204)

    async def get_history(self, request: Request) -> Response:
        """The states of a user, newest first."""
        store, user_id = self._store_of(request), request.path_params["user_id"]
        bounds = {name: _moment(name, request.query_params.get(name)) for name in ("since", "until")}
        states = await _call(store, "get_history", user_id, _limit_of(request), **bounds)
        if not states and await _call(store, "get_latest", user_id) is None:
            raise unknown_user_error(user_id)
        return _answer({"states": [state.to_dict() for state in states]})

    async def search(self, request: Request) -> Response:
        """The users whose latest states are most like a query."""
        store, options = self._store_of(request), await _body_of(request)
        _check_known(options, sorted(_SEARCH_FIELDS))
        query = options.pop("query", None)
        if not isinstance(query, str | dict):
            raise ValidationError("query: axes, or the id of a user, are needed")
        check_integer("limit", options.get("limit", 1), 1, MAX_PAGE)
        times = {name: _moment(name, options[name]) for name in ("since", "until") if name in options}
        matches = await _call(store, "search_similar", query, **options | times)
        return _answer(
            {"matches": [{"state": match.snapshot.to_dict(), "score": match.score} for match in matches]}
        )

    async def openapi(self, request: Request) -> Response:
        """The service as OpenAPI."""
        return _answer(openapi_document(request.scope.get("root_path", "")))

    async def docs(self, request: Request) -> Response:
        """The service as a page, which fetches nothing."""
        from starlette.responses import HTMLResponse

        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        url = f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '')}"
        return HTMLResponse(docs_page(url), headers={**_HEADERS, **policy})

    async def root(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Lead to the page."""
        from starlette.responses import RedirectResponse

        return RedirectResponse("docs")

    async def snapshot(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Take a snapshot of every store, or join the request that does."""
        if self._taking is None:
            self._taking = _Requested(self._stores, self._directory, self._keep)
        joined = self._taking
        joined.requests += 1
        try:
            await joined.finish()
        finally:
            joined.requests -= 1
            if self._taking is joined and (joined.is_done or not joined.requests):
                self._taking = None
        completed = [report.status == "completed" for report in joined.reports]
        status, code = (
            ("completed", 200) if all(completed) else ("partial", 207) if any(completed) else ("failed", 503)
        )
        return _answer({"status": status, "results": [report.to_dict() for report in joined.reports]}, code)

    async def health(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Say how every store is."""
        found = [await _call(store, "health") for store in self._stores]
        worst = max((health.status for health in found), key=_STATUSES.index)
        content = {"status": worst, "stores": [attrs.asdict(health) for health in found]}
        return _answer(content, 503 if worst == "unhealthy" else 200)

    async def ready(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Say whether every store answers, and no more: anybody may ask."""
        found = [await _call(store, "health") for store in self._stores]
        ready = all(health.status != "unhealthy" for health in found)
        return _answer({"ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Hand out what prometheus_client has collected in this process."""
        from starlette.responses import Response

        try:
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
        except ImportError:
            raise Problem(404, "prometheus_client is not installed") from None
        return Response(generate_latest(), headers={**_HEADERS, "Content-Type": CONTENT_TYPE_LATEST})


def _application(
    stores: Sequence[AnyStore],
    operations: Sequence[Operation],
    authorize: _Authorize,
    directory: str | os.PathLike[str] | None,
    keep: int | None,
) -> Starlette:
    """The application that answers some operations."""
    if not stores:
        raise ValidationError("stores: at least one store is needed")
    for store in stores:
        if not isinstance(store, StateStore | AsyncStateStore):
            raise ValidationError(f"stores: a store is needed, got {type_name(store)}")
    check_callable("authorize", authorize)
    if keep is not None:
        check_integer("keep", keep, 1, MAX_INTEGER)
    names = [store._operations.collection for store in stores]
    if (keep is not None or STATES[0] in operations) and len(set(names)) < len(names):
        raise ValidationError(
            f"{'stores' if keep is None else 'keep'}: the stores' collections are to have different names, "
            "or each its own app"
        )
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.routing import Route
    except ImportError as error:
        raise MissingDependencyError("this needs Starlette: pip install starlette") from error

    async def tell(request: Request, error: Exception) -> Response:  # noqa: ARG001 - as Starlette calls it
        if isinstance(error, HTTPException):
            return Problem(error.status_code, str(error.detail), error.headers).response()
        return Problem(500, "an error within the service, or in what authorizes its requests").response()

    endpoint = Endpoint(stores, None if directory is None else absolute_path(directory), keep)
    routes = [
        Route(path, _Resource(endpoint, [row for row in operations if row.path == path], authorize))
        for path in dict.fromkeys(operation.path for operation in operations)
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_EncodedPaths)],
        exception_handlers={HTTPException: tell, Exception: tell},
    )
    app.router.redirect_slashes = False
    return app


def service_app(
    *stores: StateStore | AsyncStateStore,
    authorize: Callable[[Request], bool | str | Awaitable[bool | str | None] | None] | None = None,
    directory: str | os.PathLike[str] | None = None,
    keep: int | None = None,
) -> Starlette:
    """An ASGI application that serves stores: their states, histories and searches, as JSON over HTTP.

    ``GET``, ``PUT``, ``PATCH``, ``DELETE /api/states/{user_id}``, ``GET /api/states/{user_id}/history``,
    ``GET /api/states``, ``POST /api/search``, and what snapshot_app answers, with ``directory`` and ``keep``;
    ``GET /docs`` and ``/openapi.json`` describe it. States have the shape of StateSnapshot.to_dict, and an
    ETag for conditional writes (a DELETE is checked against its condition just before). Where there are
    several stores, ``?store=`` names the collection of the one that is meant.

    ``authorize`` gets each request but those for /api/ready and the description, with the id in
    ``request.path_params["user_id"]``. It returns, or returns an awaitable of, True for who may do
    everything, the id of a user who may read and change the own state alone, or False or None for nobody;
    it may raise an HTTPException. Without it, only requests from this machine to this machine are answered.
    Requests that a page of another site sends are refused unless they have the header Authorization.

    Mount it in FastAPI or Starlette, or run it by itself; the stores stay the caller's to close. Raises
    ValidationError, also where collections of several stores have the same name, MissingDependencyError.
    """
    chosen = _is_local if authorize is None else authorize
    return _application(stores, (*STATES, *BACKUPS), chosen, directory, keep)


def snapshot_app(
    *stores: StateStore | AsyncStateStore,
    authorize: Callable[[Request], bool | Awaitable[bool]] | None = None,
    directory: str | os.PathLike[str] | None = None,
    keep: int | None = None,
) -> Starlette:
    """An ASGI application that takes snapshots of stores on request, and tells how they are.

    ``POST /api/snapshot`` calls create_snapshot of one store after another, with ``directory`` and ``keep``,
    and answers with a report of each: 200 when all are completed, 207 when some failed, 503 when all did; a
    request that comes meanwhile gets the same answer. ``GET /api/health``, ``GET /api/ready`` (503 where a
    store is unhealthy) and, where prometheus_client is installed, ``GET /metrics``. ``authorize`` gets each
    request but those for /api/ready and returns, or returns an awaitable of, True to let it through.
    Mount it in FastAPI or Starlette, or run it by itself; the stores stay the caller's to close. Raises
    ValidationError, MissingDependencyError.
    """
    chosen = _is_anybody if authorize is None else authorize
    return _application(stores, BACKUPS, chosen, directory, keep)


if __name__ == "__main__":
    sys.stderr.write(
        'This file is the library. For the command: pip install "attuned-store[cli]", '
        "then attuned-store or python -m attuned_store\n"
    )
    sys.exit(2)

"""Directories that this process has open: locks, group commit, forks."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attuned.base.disk import LockFile
from attuned.base.errors import (
    BackendError,
    ReenteredError,
    StoreError,
    T,
    closed_error,
    forked_error,
    locked_error,
)
from attuned.connections.runtime import Worker, run

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping


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

"""Directories that this process has open: locks, group commit, forks."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attuned.base.disk import LockFile
from attuned.base.errors import LOGGER, BackendError, StoreError, T, closed_error, forked_error, locked_error
from attuned.connections.runtime import run_blocking, run_in_thread, shielded

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator


class Files(Protocol):
    """What is asked of an engine that keeps its own files."""

    name: str
    writes: int  # how many have been done

    @property
    def flush_due(self) -> bool:
        """Whether so much has been written since the last flush that it is time for another."""
        ...

    def flush(self) -> None:
        """Make what has been written survive a power cut; others may use the engine meanwhile."""
        ...

    async def replace(self, collection: str, by: str) -> None:
        """Let another open collection take the place of one, at one moment; its own name is then free."""
        ...

    def abandon(self) -> None:
        """Let go of what a forked child inherited, without touching what the parent goes on using."""
        ...

    async def close(self) -> None:
        """Flush and release everything."""
        ...


class FlushRound:
    """Writes that one flush makes survive a power cut."""

    def __init__(self) -> None:
        self.turn = threading.Lock()  # of the member that sees to the flush; the others wait for it
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
        self.flushing = threading.Lock()
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
            raise BackendError(str(error), backend=error.backend, operation=error.operation) from error

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

    def __init__(self, path: str, durability: str, make_engine: Callable[[Path, str], Files]) -> None:
        self.path = path
        self.durability = durability
        self.stores = 0
        self.used = False  # by a store, now or before
        self.gone = threading.Event()
        self.opening = threading.Lock()  # of collections; the other lock may be waited for while it is held
        self.cores: dict[str, Any] = {}  # by collection; the core stands below
        self.limiters: dict[str, Any] = {}  # of the worker threads of asynchronous stores, by purpose
        self._orphaned = self._closed = False
        self._lock = threading.Lock()
        _make_directory(path)
        self._lock_file = self._take_lock()
        try:
            self.engine = make_engine(Path(path), durability)
        except BaseException:
            self._lock_file.release()
            raise
        self.flushes = GroupCommit(self.engine)

    def _take_lock(self) -> LockFile:
        try:
            return LockFile(Path(self.path) / ".attuned_store.lock")
        except BlockingIOError as error:
            raise locked_error(self.path) from error
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be locked, is it writable? {error}") from error

    def drive(self, flow: Coroutine[Any, Any, T]) -> T:
        """Run one coroutine of a core to its end, alone; what it wrote is kept."""
        answer, written = self.apply(flow)
        if written is not None:
            self.flushes.settle(written)
        return answer

    def apply(self, flow: Coroutine[Any, Any, T]) -> tuple[T, FlushRound | None]:
        """Run one coroutine of a core to its end, alone; returns its answer, and what is to be settled."""
        try:
            if self._orphaned:
                raise forked_error(self.path)
            with self._lock:
                if self._closed:
                    raise closed_error()
                before = self.engine.writes
                answer = run_blocking(flow)
                wrote = self.engine.writes > before
                flush = wrote and (self.durability == "power" or self.engine.flush_due)
                return answer, self.flushes.join() if flush else None
        finally:
            flow.close()

    def release(self) -> None:
        """Give up a store's hold on the directory, and close it with the last."""
        with OPEN.lock:
            self.stores -= 1
            if self.stores > 0 or OPEN.directories.get(self.path) is not self:
                return
        # Without the lock of all directories: an operation that is waited for here may collect a store of
        # another one, which then wants that lock. Who opens this directory meanwhile waits for ``gone``.
        try:
            self._close()
        finally:
            with OPEN.lock:
                OPEN.directories.pop(self.path, None)
            self.gone.set()

    def _close(self) -> None:
        """Flush and release; nothing happens in a forked child, where the files are the parent's."""
        if self._orphaned:
            return
        with self._lock, self.flushes.flushing:  # those that wait for a flush find all flushed
            self._closed = True
            try:
                run_blocking(self.engine.close())
            finally:
                self._lock_file.release()

    def abandon(self) -> None:
        """Make every use in a forked child an error, and leave the parent's files and locks alone."""
        self._orphaned = True
        for core in self.cores.values():
            core.forget_everything()
        self._lock_file.abandon()
        self.engine.abandon()


def _make_directory(path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StoreError(f"{path}: is a file; a store needs a directory") from error
    except OSError as error:
        raise StoreError(f"{path}: cannot be made: {error}") from error


class Held(Protocol):
    """A directory or connection that a store holds until it is closed."""

    path: str

    def release(self) -> None:
        """Give it up."""
        ...

    def abandon(self) -> None:
        """Make every use in a forked child an error, and leave what is the parent's alone."""
        ...


class OpenPlaces:
    """What this process has open, and what becomes of it in a forked child."""

    def __init__(self) -> None:
        self.directories: dict[str, Directory] = {}
        self.connections: weakref.WeakSet[Any] = weakref.WeakSet()  # to servers
        self.lock = threading.RLock()  # reentrant: a store may be collected, and released, while it is held
        self._abandoned: list[Directory] = []  # kept, so that a child never cleans up the parent's objects

    def directory_at(
        self, path: str, durability: str, make_engine: Callable[[Path, str], Files]
    ) -> Directory:
        """The opened directory, with one store more on it."""
        while True:
            with self.lock:
                directory = self.directories.get(path)
                if directory is None:
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
        for connection in self.connections:
            connection.abandon()


OPEN = OpenPlaces()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=OPEN.after_fork_in_child)


def release_unclosed(held: Held) -> None:
    """Release what a store holds that was collected, or left open at the end of the program.

    What was acknowledged is in the engine's log already: a failure here, as where the directory is gone,
    loses nothing, and there is nobody to raise it to.
    """
    try:
        held.release()
    except StoreError as error:
        LOGGER.info("closing %s failed: %s", held.path, error)


def lock_waits(lock_timeout: float) -> Iterator[float]:
    """Seconds to wait between tries for a lock, until the time is up."""
    deadline = time.monotonic() + lock_timeout
    while (left := deadline - time.monotonic()) > 0:
        yield min(0.05, left)


async def run_in_worker(directory: Directory, flow: Coroutine[Any, Any, T]) -> tuple[T, FlushRound | None]:
    """Drive a coroutine in a worker thread; it is closed here if cancelled before it started."""
    try:
        return await run_in_thread(lambda: directory.apply(flow), _limiter(directory, "write"))
    finally:
        if inspect.getcoroutinestate(flow) == inspect.CORO_CREATED:
            with contextlib.suppress(ValueError):  # the worker has started it just now, and will close it
                flow.close()


async def settle_in_worker(directory: Directory, written: FlushRound) -> None:
    """Settle writes in a worker thread; one task goes there, those of the same round wait for it here."""
    settle = functools.partial(directory.flushes.settle, written)
    async with _limiter(directory, "flush"):
        if not written.ended:
            return await run_in_thread(settle)
    return settle()


def _limiter(directory: Directory, purpose: str) -> Any:
    """One worker for a purpose, directory and event loop: more would only wait for each other."""
    from anyio import CapacityLimiter
    from anyio.lowlevel import RunVar

    held = directory.limiters.setdefault(purpose, RunVar(purpose))
    limiter = held.get(None)
    if limiter is None:
        limiter = CapacityLimiter(1)
        held.set(limiter)
    return limiter


async def release_in_worker(directory: Directory, finalizer: weakref.finalize[..., Any]) -> None:
    """Release in a worker thread, also while being cancelled: nobody would do it later."""

    def release() -> None:
        if finalizer.detach():  # once, by whoever comes first
            directory.release()

    try:
        await shielded(run_in_thread(release))
    except BaseException:
        release()  # asyncio's own cancelling knows no shield
        raise

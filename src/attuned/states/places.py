"""Where Qdrant backends are: in a directory of this process, or on a server over a connection.

An embedded engine is opened once per real path and process, and shared by every store on it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import attrs

from attuned.base.config import QdrantStoreConfig, absolute_path, is_loopback
from attuned.base.errors import (
    LOGGER,
    ReenteredError,
    SchemaMismatchError,
    StoreError,
    StoreLockedError,
    T,
    ValidationError,
    brief,
    forked_error,
)
from attuned.base.telemetry import REPORTING
from attuned.connections.files import OPEN, Directory
from attuned.connections.runtime import BLOCKING, Waits, require_anyio, run
from attuned.engines.embedded import engine_class
from attuned.engines.server import ServerEngine
from attuned.states.owned import OwnedBackend
from attuned.states.shared import SharedBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from attuned.engines.waist import EmbeddedEngine, Engine


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

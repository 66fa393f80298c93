"""How one body serves both forms: a synchronous store runs it, an asynchronous one awaits it.

The operations of stores are coroutines over awaitable primitives. Where a store is synchronous, those block
and never suspend, so that one ``send(None)`` runs a body to its end; where it is asynchronous, the body is
awaited. What must differ is one object, ``Waits``: bodies await it, the backend and themselves, never an
event loop.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import time
import uuid
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, Protocol, cast

from attuned.base.errors import MissingDependencyError, StoreError, T

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine


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

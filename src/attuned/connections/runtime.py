"""How one body serves both forms: it is run in place, or awaited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from attuned.base.errors import T


async def async_sleep(seconds: float) -> None:
    """Let other tasks run; under trio this needs anyio."""
    try:
        import anyio
    except ImportError:
        import asyncio

        await asyncio.sleep(seconds)
    else:
        await anyio.sleep(seconds)


async def run_in_thread(call: Callable[[], T], limiter: Any = None) -> T:
    """Run a blocking call in a worker thread; being cancelled meanwhile, wait for it."""
    try:
        import anyio.to_thread
    except ImportError:
        return await _in_thread_of_asyncio(call)
    return await anyio.to_thread.run_sync(call, limiter=limiter)


async def _in_thread_of_asyncio(call: Callable[[], T]) -> T:
    import asyncio

    running = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def shielded(last: Awaitable[object]) -> None:
    """Await something though being cancelled, as far as the event loop allows that."""
    try:
        import anyio
    except ImportError:
        await last
    else:
        with anyio.CancelScope(shield=True):
            await last


def run_blocking(flow: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends."""
    try:
        flow.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    flow.close()
    raise RuntimeError("a coroutine over an embedded engine tried to suspend")

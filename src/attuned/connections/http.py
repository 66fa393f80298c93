"""HTTP requests to a server: blocking or awaited, within a deadline."""

from __future__ import annotations

import math
import re
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote as urlquote

from attuned.base.errors import T

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine


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

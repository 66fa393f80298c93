"""HTTP requests to a server: blocking or awaited, within a deadline."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import threading
import time
import traceback
from contextvars import ContextVar
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypedDict, cast
from urllib.parse import quote as urlquote
from urllib.parse import quote_plus

from attuned.base.errors import (
    BackendError,
    BackendRejectedError,
    BackendTimeoutError,
    BackendUnavailableError,
    CollectionNotFoundError,
    MissingDependencyError,
    RateLimitedError,
    StoreError,
    T,
    ValidationError,
    one_line,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping


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


class ErrorOrigin(TypedDict):
    """What every BackendError says of its origin."""

    backend: str
    operation: str


_SAID_CHARACTERS = 200  # of what a server says, in an error message
_MAX_WAIT_S = 10**9  # that a server may ask for; more is as good as for ever


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

    def _origin(self, operation: str) -> tuple[str, ErrorOrigin]:
        return f"Qdrant at {self._url}: {operation}", ErrorOrigin(backend="server", operation=operation)

    def failure(self, error: Exception, operation: str) -> BackendError:
        """What a failed request means; ``ambiguous`` where it may have been carried out all the same."""
        import httpx
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        asked, where = self._origin(operation)
        if isinstance(error, QdrantException):  # its own exceptions are of answers with 429 and Retry-After
            wait = _retry_after(error)
            return RateLimitedError(
                f"{asked}: too many requests, wait {wait:g} s", retry_after_s=wait, **where
            )
        if isinstance(error, UnexpectedResponse):
            return self.answer(error.status_code or 0, error.content, error.headers, operation)
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

    def answer(self, status: int, content: bytes, headers: Mapping[str, str], operation: str) -> BackendError:
        """What an answer with another status than asked for means."""
        asked, where = self._origin(operation)
        try:
            said = str(json.loads(content)["status"]["error"])
        except (ValueError, LookupError, TypeError, RecursionError):
            said = content.decode(errors="replace")
        message = f"{asked}: HTTP {status}: {self.said(said)}{_HINTS.get(status, '')}"
        if status in _REDIRECTS:
            target = self.said(_without_secrets(headers.get("location", "")))
            pointed = f"it redirects to {target}" if target else "it redirects without saying where to"
            message = f"{asked}: HTTP {status}: {pointed}; redirects are not followed: give the url of Qdrant"
        if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.GATEWAY_TIMEOUT):
            return BackendTimeoutError(message, retryable=True, ambiguous=True, **where)
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return RateLimitedError(message, retry_after_s=0.0, **where)
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


def cookie_jar() -> Any:
    """A cookie jar that takes only what can be sent again: another one would make all requests fail."""
    from http.cookiejar import CookieJar, DefaultCookiePolicy

    class Policy(DefaultCookiePolicy):
        def set_ok(self, cookie: Any, request: Any) -> bool:
            return f"{cookie.name}{cookie.value}".isascii() and super().set_ok(cookie, request)

    return CookieJar(Policy())


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


_HINTS = {401: "; is api_key right?", 403: "; may this api_key do that?"}


_REDIRECTS = (301, 302, 303, 307, 308)


def _written_forms(secret: str) -> list[str]:
    """How a secret may stand in a text: as it is, in urls, JSON, HTML and base64; the longest first."""
    from html import escape as html_escape

    forms = {secret, urlquote(secret, safe=""), urlquote(secret), quote_plus(secret)}
    forms |= {json.dumps(secret)[1:-1], html_escape(secret)}
    for before in range(
        3
    ):  # other bytes in front of it, as "user:" has; what shares bits with them is left out
        encoded = base64.b64encode(bytes(before) + secret.encode()).decode().rstrip("=")
        whole = (before + len(secret.encode())) * 8 // 6
        inner = encoded[-(-before * 8 // 6) : whole]
        forms |= {inner, inner.replace("+", "-").replace("/", "_")}
    return sorted((form for form in forms if len(form) >= _LEAST_SECRET), key=len, reverse=True)


_LEAST_SECRET = 4  # characters; a shorter one would be found in any text


def _retry_after(error: Exception) -> float:
    """The seconds that a server asks to wait: a whole number of them, or a date, which comes as a refusal."""
    from email.utils import parsedate_to_datetime

    seconds = getattr(error, "retry_after_s", None)
    if isinstance(seconds, int):
        return float(max(0, min(seconds, _MAX_WAIT_S)))
    try:
        until = parsedate_to_datetime(str(error).rpartition("integer: ")[2])
        return max(0.0, min(until.timestamp() - time.time(), _MAX_WAIT_S))
    except (ValueError, TypeError, OverflowError, LookupError, OSError):
        return 1.0


def _without_secrets(url: str) -> str:
    """An address without the user, the query and the fragment, which may hold what nobody else is to see."""
    plain = re.split(r"[?#]", url, maxsplit=1)[0]
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*:)?(//)[^/]*@", r"\1\2", plain)


_MAX_FILE_NAME = 1024  # characters, of the name of a snapshot on a server
MIN_SERVER_VERSION = (1, 17)  # conditional upserts with update modes


def http_status_of(error: BackendError) -> int | None:
    """The HTTP status behind an error, where an answer had come."""
    return getattr(error.__cause__, "status_code", None)


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

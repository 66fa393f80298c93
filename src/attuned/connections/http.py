"""HTTP requests to a server: blocking or awaited, within a deadline."""

from __future__ import annotations

import json
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypedDict, cast
from urllib.parse import quote as urlquote

from attuned.base.errors import (
    BackendError,
    BackendRejectedError,
    BackendTimeoutError,
    BackendUnavailableError,
    CollectionNotFoundError,
    RateLimitedError,
    T,
    one_line,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from attuned.snapshots.directory import NativeSnapshotWriter


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


def server_error(error: Exception, operation: str, url: str) -> BackendError:
    """What a failed request to a server means; the message says it in one line and holds no secret."""
    import httpx
    from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

    asked, where = f"Qdrant at {url}: {operation}", ErrorOrigin(backend="server", operation=operation)
    if isinstance(error, ResourceExhaustedResponse):
        wait = float(error.retry_after_s)
        return RateLimitedError(f"{asked}: too many requests, wait {wait:g} s", retry_after_s=wait, **where)
    if isinstance(error, QdrantException) and "Retry-After" in str(error):  # not a whole number
        return RateLimitedError(f"{asked}: too many requests", retry_after_s=1.0, **where)
    if isinstance(error, UnexpectedResponse):
        return status_error(error.status_code or 0, error.content, asked, where)
    cause = error.source if isinstance(error, ResponseHandlingException) else error
    said = one_line(str(cause))[:_SAID_CHARACTERS] or type(cause).__name__
    if isinstance(cause, httpx.TimeoutException | TimeoutError):
        message = f"{asked}: no answer in time ({type(cause).__name__})"
        return BackendTimeoutError(message, retryable=True, **where)
    if isinstance(cause, httpx.TransportError):
        hint = "; port 6334 is for gRPC, REST is usually at 6333" if ":6334" in url else ""
        message = f"{asked}: cannot be reached: {said}{hint}"
        return BackendUnavailableError(message, retryable=True, **where)
    return BackendError(f"{asked}: not an answer of Qdrant: {said}", **where)


def status_error(status: int, content: bytes, asked: str, where: ErrorOrigin) -> BackendError:
    """What an answer with an error status means."""
    try:
        said = str(json.loads(content)["status"]["error"])
    except (ValueError, KeyError, TypeError):
        said = content.decode(errors="replace")
    hints = {401: "; is api_key right?", 403: "; may this api_key do that?"}
    message = f"{asked}: HTTP {status}: {one_line(said)[:_SAID_CHARACTERS]}{hints.get(status, '')}"
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.GATEWAY_TIMEOUT):
        return BackendTimeoutError(message, retryable=True, **where)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return RateLimitedError(message, retry_after_s=0.0, **where)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        retryable = status in (
            HTTPStatus.INTERNAL_SERVER_ERROR,
            HTTPStatus.BAD_GATEWAY,
            HTTPStatus.SERVICE_UNAVAILABLE,
        )
        return BackendUnavailableError(message, retryable=retryable, **where)
    # A gateway, too, answers 404: what counts is what Qdrant says.
    absent = re.search(r"Collection `(.*)` doesn't exist", said)
    if status == HTTPStatus.NOT_FOUND and absent:
        return CollectionNotFoundError(message, collection=absent[1], **where)
    return BackendRejectedError(message, **where)


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


class RemainingTime(dict[str, float]):
    """What httpcore looks up a timeout in when a phase of a request begins: each gets what is left by then.

    That it asks when each phase begins is no part of its interface; tests/test_canaries.py watches it.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def get(self, phase: str, default: Any = None) -> float:  # noqa: ARG002 - the same for every phase
        """The seconds that are left."""
        return max(0.001, self._deadline - time.monotonic())


async def read_awaiting(
    client: Any, deadline: float, method: str, path: str, options: Mapping[str, Any]
) -> tuple[int, bytes]:
    """The status and the body of an answer, or TimeoutError at the deadline."""
    import anyio

    with anyio.fail_after(deadline - time.monotonic()):
        answer = await client.request(method, path, **options)
    return answer.status_code, answer.content


async def read_blocking(
    client: Any, deadline: float, method: str, path: str, options: Mapping[str, Any]
) -> tuple[int, bytes]:
    """The status and the body of an answer, or TimeoutError at the first piece after the deadline."""
    pieces: list[bytes] = []
    with client.blocking.stream(method, path, **options) as answer:
        for piece in answer.iter_bytes():
            pieces.append(piece)
            if time.monotonic() > deadline:
                raise TimeoutError("the answer takes too long")
    return answer.status_code, b"".join(pieces)


_UNPACKED = {"accept-encoding": "identity"}


async def download_awaiting(
    client: Any, path: str, check: Callable[[int, bytes], None], taking: NativeSnapshotWriter
) -> None:
    """Take in a file piece by piece, unless the answer does not pass the check."""
    async with client.stream("GET", path, headers=_UNPACKED) as answer:
        check(answer.status_code, await answer.aread() if answer.is_error else b"")
        async for piece in answer.aiter_raw():
            taking.add(piece)


async def download_blocking(
    client: Any, path: str, check: Callable[[int, bytes], None], taking: NativeSnapshotWriter
) -> None:
    """As download_awaiting, over a blocking client."""
    with client.blocking.stream("GET", path, headers=_UNPACKED) as answer:
        check(answer.status_code, answer.read() if answer.is_error else b"")
        for piece in answer.iter_raw():
            taking.add(piece)


async def run_in_task(request: Callable[[], Awaitable[T]]) -> T:
    """Await a request in a task of its own, which is cancelled by a cancel scope.

    asyncio's own task.cancel() can take a connection from httpcore's pool for good (encode/httpcore#658,
    #830): it gives them back under a shield that only scopes know.
    """
    import anyio

    answers, failures = list[T](), list[Exception]()

    async def attempt() -> None:
        try:
            answers.append(await request())
        except Exception as failure:  # noqa: BLE001 - it is raised below, not in a group
            failures.append(failure)

    async with anyio.create_task_group() as group:
        group.start_soon(attempt)
    for failure in failures:
        raise failure
    return answers[0]

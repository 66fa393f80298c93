"""What failed requests to a server mean, said without secrets."""

from __future__ import annotations

import base64
import json
import os
import re
import traceback
from http import HTTPStatus
from typing import TYPE_CHECKING, TypedDict
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
    ValidationError,
    one_line,
)
from attuned.connections.resilience import MAX_WAIT_S, parse_retry_after

if TYPE_CHECKING:
    from collections.abc import Mapping


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

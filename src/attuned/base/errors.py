"""The errors that stores raise, and how their messages show values."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

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

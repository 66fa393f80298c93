"""Embedders: what makes vectors of texts, in batches, whatever function the caller has for it.

A batch that is refused is halved until the text that it is refused for stands alone; what fails for other
reasons is tried again by the retry policy. No lock is held meanwhile, by the rule of those who call.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
import time
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from attuned.base.config import RetryPolicy, check_callable, check_choice
from attuned.base.errors import (
    EmbeddingError,
    StoreError,
    ValidationError,
    brief,
    one_line,
    plural,
    type_name,
)
from attuned.base.values import MAX_INTEGER, MAX_VECTOR_SIZE, check_integer, check_user_id
from attuned.connections.resilience import jittered_pause, parse_retry_after

if TYPE_CHECKING:
    from collections.abc import Iterator

    from attuned.connections.runtime import Waits

_RAISED_CHARACTERS = 200  # of what a caller's function raised, in an error message
_WEAKEST, _STRONGEST = 1e-15, 1e15  # vectors, whose squares single precision still holds
_CANCELLED = 1e-6  # the length of a sum of unit vectors that is nothing but rounding
_CAUSES = 16  # at most, looked at behind an error
_NO_STATUS = 600
_PASSING = frozenset({408, 409, 425, 429})
_UNSUITABLE = frozenset(
    {401, 402, 404, 405, 407, 429, 501, 505}
)  # where they last: of any text, and for long
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError)
# Of httpx, openai, aiohttp and urllib3, which need not be installed; requests' are OSErrors.
_CONNECTION_ERRORS = frozenset(
    {"TransportError", "APIConnectionError", "ClientConnectionError", "ProtocolError"}
)
# Users in urls, queries, tokens in headers, keys.
_SECRET = re.compile(
    r"(?<=//)[^/\s@]+(?=@)|(?<=\?)[^\s'\"]+|(?<=bearer )\S+|(?<=basic )\S+|\bsk-[\w-]+", re.IGNORECASE
)
_WORD = re.compile(r"\w+")
_UP_TO_SPACE = re.compile(r".*\s", re.DOTALL)


class _NoVectorsError(Exception):
    """An answer is no vectors, whatever the texts were."""


class _OtherNumberError(Exception):
    """An answer has more or fewer vectors than there were texts."""


@attrs.frozen(repr=False)
class Embedder:
    """A function from texts to vectors, called in batches, and the name that its vectors go by.

    ``embed`` takes a list of texts and returns a vector for each, in order: lists, tuples, arrays, a matrix,
    or an iterator of them. It may be a coroutine function in an asynchronous store, where a plain one is
    called in a worker thread. ``name`` must change whenever the vectors would, as with another model; each
    has ``dimensions`` numbers. ``embed_query`` makes the vector of one text that is searched with, where
    that differs. At most ``batch_size`` texts are handed over in a call. A text with more than
    ``max_characters`` is cut into windows, at spaces where possible, and its vector is the mean of theirs
    (``windows="mean"``; None: no text is cut). What fails in passing is tried again as ``retry`` says: the
    HTTP status (408, 409, 425, 429, 5xx) and Retry-After of the client's errors count, timeouts and lost
    connections. A client that repeats requests itself is better told not to::

        client = openai.OpenAI(max_retries=0)
        Embedder(
            lambda texts: [each.embedding for each in client.embeddings.create(input=texts, model=name).data],
            name=name,
            dimensions=1536,
        )
        Embedder(SentenceTransformer(name).encode, name=name, dimensions=384)
        Embedder(fastembed.TextEmbedding(name).embed, name=name, dimensions=384)

    Raises ValidationError.
    """

    embed: Callable[[list[str]], Any]
    name: str = attrs.field(kw_only=True)
    dimensions: int = attrs.field(kw_only=True)
    embed_query: Callable[[str], Any] | None = attrs.field(default=None, kw_only=True)
    batch_size: int = attrs.field(default=50, kw_only=True)
    max_characters: int | None = attrs.field(default=None, kw_only=True)
    windows: Literal["mean"] = attrs.field(default="mean", kw_only=True)
    retry: RetryPolicy = attrs.field(factory=RetryPolicy, kw_only=True)

    _clock = staticmethod(time.monotonic)
    # So many in a row, and the rest of a call is not tried: texts that are refused, each for itself, and
    # batches that fail whatever their texts are.
    MAX_REFUSED: ClassVar[int] = 50
    MAX_FAILED: ClassVar[int] = 2

    def __attrs_post_init__(self) -> None:
        check_callable("embed", self.embed)
        check_user_id(self.name, "name")
        check_integer("dimensions", self.dimensions, 1, MAX_VECTOR_SIZE)
        if self.embed_query is not None:
            check_callable("embed_query", self.embed_query)
        check_integer("batch_size", self.batch_size, 1, MAX_INTEGER)
        if self.max_characters is not None:
            check_integer("max_characters", self.max_characters, 1, MAX_INTEGER)
        check_choice("windows", self.windows, ("mean",))
        if not isinstance(self.retry, RetryPolicy):
            raise ValidationError(f"retry: a RetryPolicy is needed, got {brief(self.retry)}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, dimensions={self.dimensions})"

    async def embed_texts(self, waits: Waits, texts: Sequence[str]) -> list[Sequence[float] | StoreError]:
        """A vector for each of the texts, in order, or the error of that text; ``waits`` is the store's.

        A vector has ``dimensions`` finite numbers and a direction. Equal texts are embedded once. The error
        is a ValidationError for a text that is empty or none, else an EmbeddingError. Raises ValidationError
        where the function is asynchronous and the store is not.
        """
        if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
            raise ValidationError(f"texts: a sequence of strings is needed, got {type_name(texts)}")
        checked = [_checked_text(text) for text in texts]
        cut = {text: self._cut(text) for text in checked if isinstance(text, str)}
        pieces = list(dict.fromkeys(itertools.chain.from_iterable(cut.values())))
        vectors = await self._embed_pieces(waits, pieces)
        whole = {text: self._mean([vectors[piece] for piece in of]) for text, of in cut.items()}
        return [whole[text] if isinstance(text, str) else text for text in checked]

    async def embed_query_text(self, waits: Waits, text: str) -> Sequence[float]:
        """The vector of a text that is searched with, by ``embed_query`` where there is one.

        ``waits`` is the store's. Raises ValidationError for a text that is empty or none, and EmbeddingError.
        """
        checked = _checked_text(text)
        if isinstance(checked, StoreError):
            raise checked
        pieces = self._cut(checked)
        found = list[Any]()
        if self.embed_query is None:
            vectors = await self._embed_pieces(waits, pieces)
            found = [vectors[piece] for piece in pieces]
        else:
            for piece in pieces:
                found += await self._ask(waits, self.embed_query, piece)
        vector = self._mean(found)
        if isinstance(vector, StoreError):
            raise vector
        return vector

    async def _embed_pieces(self, waits: Waits, pieces: list[str]) -> dict[str, Sequence[float] | StoreError]:
        """A vector or an error for each of some different texts that need not be cut."""
        found = dict[str, Sequence[float] | StoreError]()
        waiting = [
            pieces[start : start + self.batch_size] for start in range(0, len(pieces), self.batch_size)
        ]
        waiting.reverse()
        in_a_row = Counter[bool]()  # what failed since anything was embedded: texts refused, other failures
        while waiting:
            batch = waiting.pop()
            try:
                found.update(zip(batch, await self._ask(waits, self.embed, batch), strict=True))
                in_a_row.clear()
            except EmbeddingError as error:
                refused = not error.retryable and _may_be_the_text(error.__cause__)
                if refused and len(batch) > 1:
                    middle = len(batch) // 2
                    waiting += [batch[middle:], batch[:middle]]
                    continue
                found.update(dict.fromkeys(batch, error))
                in_a_row[refused] += 1
                if in_a_row[refused] == (self.MAX_REFUSED if refused else self.MAX_FAILED):
                    untried = self._error(
                        f"not tried, as others failed: {error}",
                        retryable=error.retryable,
                        status=error.status,
                    )
                    found.update(dict.fromkeys(itertools.chain(*waiting), untried))
                    break
        return found

    async def _ask(
        self, waits: Waits, function: Callable[[Any], Any], asked: list[str] | str
    ) -> list[Sequence[float] | StoreError]:
        """What a function makes of texts, or of one, tried again while it fails in passing."""
        begun = self._clock()
        for attempt in itertools.count():
            answer = await self._call(waits, function, asked)
            if not isinstance(answer, Exception):
                return answer
            passing = _passes(answer)
            wait = jittered_pause(self.retry, attempt, _asked_to_wait(answer))
            late = self._clock() + wait > begun + self.retry.deadline_s
            if not passing or late or attempt + 1 >= self.retry.attempts:
                texts = 1 if isinstance(asked, str) else len(asked)
                message = f"{plural(texts, 'text')}: {_said(answer)}"
                raise self._error(message, retryable=passing, status=_status(answer)) from answer
            await waits.sleep(wait)
        raise AssertionError("unreachable")  # pragma: no cover - count() does not end

    async def _call(
        self, waits: Waits, function: Callable[[Any], Any], asked: list[str] | str
    ) -> list[Sequence[float] | StoreError] | Exception:
        """What a function makes of texts, or what it raises: no StopIteration comes out of a coroutine.

        It is handed a list of its own: it may do with that what it likes.
        """
        of = asked if isinstance(asked, str) else [*asked]

        def call() -> tuple[Any]:  # since trio lets no thread return a coroutine
            try:
                answer = function(of)
                return (answer if inspect.isawaitable(answer) else self._vectors(answer, asked),)
            except Exception as error:  # noqa: BLE001 - it is judged by those who call
                return (error,)

        (answer,) = call() if _is_asynchronous(function) else await waits.call(call)
        if inspect.isawaitable(answer):
            if waits.blocking:
                if inspect.iscoroutine(answer):
                    answer.close()
                raise ValidationError(
                    f"embedder {self.name!r}: its function is asynchronous: give a plain one, or use an "
                    "asynchronous store"
                )
            try:
                return self._vectors(await answer, asked)
            except Exception as error:  # noqa: BLE001
                return error
        outcome: list[Sequence[float] | StoreError] | Exception = answer
        return outcome

    def _vectors(self, answer: Any, asked: list[str] | str) -> list[Sequence[float] | StoreError]:
        """The vectors of an answer, each checked for itself."""
        if isinstance(asked, str):
            return [self._vector(answer)]
        if hasattr(answer, "tolist"):
            answer = answer.tolist()  # a matrix all at once
        if issubclass(type(answer), str | bytes | Mapping) or not hasattr(answer, "__iter__"):
            raise _NoVectorsError(f"a vector for each text is needed, got {type_name(answer)}")
        texts = len(asked)
        vectors = list[Any](itertools.islice(answer, texts + 1))
        if len(vectors) != texts:
            got = str(len(vectors)) if len(vectors) < texts else "more"
            raise _OtherNumberError(
                f"{plural(texts, 'vector')} {'is' if texts == 1 else 'are'} needed, got {got}"
            )
        return [self._vector(vector) for vector in vectors]

    def _vector(self, vector: Any) -> Sequence[float] | StoreError:
        """One vector as a list of floats, or what is wrong with it."""
        needed = f"a vector of {plural(self.dimensions, 'number')} is needed, got"
        try:
            given = vector.tolist() if hasattr(vector, "tolist") else vector
            numbers = array("d", [*given]).tolist()
        except (TypeError, OverflowError):
            return self._error(f"{needed} {type_name(vector)}, which is not that")
        if len(numbers) != self.dimensions:
            return self._error(f"{needed} {len(numbers):,}")
        strength = math.hypot(*numbers)
        if not math.isfinite(strength):
            return self._error(f"{needed} one with NaN or infinity")
        if not _WEAKEST < strength < _STRONGEST:
            return self._error(f"{needed} one of length {strength:g}, which has no direction to compare")
        return numbers

    def _cut(self, text: str) -> list[str]:
        """The windows of a text, or the text itself where it is short enough."""
        most = self.max_characters
        return [text] if most is None or len(text) <= most else [*_windows(text.strip(), most)]

    def _mean(self, vectors: list[Sequence[float] | StoreError]) -> Sequence[float] | StoreError:
        """The mean direction of the windows of a text, as a unit vector; what a single one has, as it is."""
        total = [0.0] * self.dimensions
        for vector in vectors:
            if isinstance(vector, StoreError) or len(vectors) == 1:
                return vector
            strength = math.hypot(*vector)
            total = [before + value / strength for before, value in zip(total, vector, strict=True)]
        strength = math.hypot(*total)
        if strength < _CANCELLED:
            return self._error("the vectors of the windows of a text cancel each other out")
        return [value / strength for value in total]

    def _error(self, message: str, *, retryable: bool = False, status: int | None = None) -> EmbeddingError:
        return EmbeddingError(
            f"embedder {self.name!r}: {message}",
            backend="embedder",
            operation="embed",
            retryable=retryable,
            status=status,
        )


class HashingEmbedder(Embedder):
    """An embedder that needs nothing: the words of a text, and parts of them, hashed into ``dimensions``.

    It finds texts that share words or parts of words, as for examples, tests and first tries, and knows
    nothing of their meaning. Its vectors are the same in every process and on every platform.

    >>> embedder = HashingEmbedder(256)
    >>> note, query, other = embedder.embed(["Bought the breakout", "breakouts bought", "Rain all day"])
    >>> sum(map(float.__mul__, note, query)) > 0.5 > sum(map(float.__mul__, note, other))
    True

    Raises ValidationError.
    """

    def __init__(self, dimensions: int = 768) -> None:
        dimensions = check_integer("dimensions", dimensions, 1, MAX_VECTOR_SIZE)
        super().__init__(_Hashing(dimensions), name=f"hashing-{dimensions}", dimensions=dimensions)

    def __repr__(self) -> str:
        return f"HashingEmbedder({self.dimensions})"


@attrs.frozen
class _Hashing:
    """The hashing trick (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", 2009).

    Another way of doing it needs another name: vectors that are kept are compared with new ones.
    """

    dimensions: int

    def __call__(self, texts: list[str]) -> list[list[float]]:
        return [self._hash(unicodedata.normalize("NFKC", text).casefold()) for text in texts]

    def _hash(self, text: str) -> list[float]:
        vector = [0.0] * self.dimensions
        words = Counter(_WORD.findall(text) or text.split())
        for word, times in words.items():
            # The shorter a word, the less it says. Square roots are the same everywhere, to the last bit.
            weight = math.sqrt(times) * (math.sqrt(len(word)) - 0.9)
            self._add(vector, word, weight)
            ends = f"<{word}>"
            parts = [ends[at : at + size] for size in (3, 4, 5) for at in range(len(ends) - size + 1)]
            for part in parts:
                self._add(vector, part, weight / math.sqrt(len(parts)))
        strength = math.sqrt(math.fsum(value * value for value in vector))
        if not strength:  # what was added cancelled itself out
            self._add(vector, "", 1.0)
            strength = 1.0
        return [value / strength for value in vector]

    def _add(self, vector: list[float], feature: str, weight: float) -> None:
        number = zlib.crc32(feature.encode("utf-8", "surrogatepass"))
        vector[number % self.dimensions] += weight if number >> 31 else -weight


def _checked_text(text: object) -> str | ValidationError:
    """A text as a plain string, or what is wrong with it."""
    if not isinstance(text, str):
        return ValidationError(f"text: a string is needed, got {type_name(text)}")
    text = str.__str__(text)
    return text if text.strip() else ValidationError("text: it is empty; leave it out, or give it words")


def _windows(text: str, most: int) -> Iterator[str]:
    """Cut a text into about even parts of at most so many characters, at spaces where possible."""
    begin = 0
    while (left := len(text) - begin) > most:
        even = -(-left // -(-left // most))
        # None is shorter than half of that: in the mean each counts as much as any other.
        spaces = _UP_TO_SPACE.match(text, begin + even // 2, begin + even + 1)
        end = spaces.end() if spaces else begin + even
        if window := text[begin:end].strip():
            yield window
        begin = end
    yield text[begin:].strip()


def _is_asynchronous(function: Callable[..., Any]) -> bool:
    called = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it: clients wrap what happened, and so do callers."""
    for _ in range(_CAUSES):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _found(holder: object, name: str) -> Any:
    """An attribute of a foreign object, or None, whatever looking at it raises."""
    try:
        return getattr(holder, name, None)
    except Exception:  # noqa: BLE001
        return None


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of a client tells, where it tells one."""
    for each in _behind(error):
        for holder in (each, _found(each, "response")):
            for name in ("status_code", "status", "code"):
                value = _found(holder, name)
                if isinstance(value, int) and HTTPStatus.BAD_REQUEST <= value < _NO_STATUS:
                    return int(value)
    return None


def _asked_to_wait(error: BaseException) -> float:
    """The seconds that the headers of an answer ask to wait, or 0."""
    for each in _behind(error):
        for holder in (_found(each, "response"), each):
            headers = _found(holder, "headers")
            try:
                given = {str(name).lower(): str(value) for name, value in headers.items()}
            except Exception:  # noqa: BLE001, S112 - there are none
                continue
            milliseconds = parse_retry_after(given.get("retry-after-ms", ""))
            seconds = parse_retry_after(given.get("retry-after", ""))
            return milliseconds / 1_000 if milliseconds is not None else seconds or 0.0
    return 0.0


def _passes(error: BaseException) -> bool:
    """Whether the same request may succeed later: by the status of an answer, else where there was none."""
    status = _status(error)
    if status is None:
        return any(
            (isinstance(each, OSError) and not isinstance(each, _LASTING))
            or not _CONNECTION_ERRORS.isdisjoint(kind.__name__ for kind in type(each).__mro__)
            for each in _behind(error)
        )
    if any(_found(each, "code") == "insufficient_quota" for each in _behind(error)):
        return False  # of OpenAI's, with 429: until somebody pays
    return status in _PASSING or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _UNSUITABLE)


def _may_be_the_text(error: BaseException | None) -> bool:
    """Whether a failure that lasts may be that of one text in a batch."""
    if error is None or isinstance(error, _NoVectorsError | ImportError | OSError):
        return False
    return _status(error) not in _UNSUITABLE


def _said(error: BaseException) -> str:
    """What a caller's function raised, in one line that holds no secret."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - of a foreign class
        text = ""
    status = _status(error)
    kind = type(error).__name__ if not isinstance(error, _NoVectorsError | _OtherNumberError) else ""
    parts = [
        kind,
        f"HTTP {status}" if status else "",
        _SECRET.sub("***", one_line(text))[:_RAISED_CHARACTERS],
    ]
    return ": ".join(filter(None, parts))

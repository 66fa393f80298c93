"""Embedders: any function from texts to vectors, whatever goes wrong in it, and how good they are."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import pickle
import struct
import threading
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import minilm
import pytest
from embedding_server import DIMENSIONS, EmbeddingServer, Exchange, vector_of
from hypothesis import given, settings
from hypothesis import strategies as st

import attuned_store
from attuned_store import (
    BLOCKING,
    Embedder,
    EmbeddingError,
    HashingEmbedder,
    RetryPolicy,
    StoreError,
    ValidationError,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

NOTES = Path(__file__).parent / "data" / "postgres_notes.jsonl"
Outcome = Sequence[float] | StoreError


# ------------------------------------------------------------------------------
# Time, and both ways of waiting
# ------------------------------------------------------------------------------


class Time:
    """A clock that moves by what is slept alone, and what was slept."""

    def __init__(self) -> None:
        self.now, self.slept = 1_000.0, list[float]()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class LongestPauses:
    """Jitter that always takes the longest wait it may."""

    @staticmethod
    def uniform(least: float, most: float) -> float:
        assert least == 0.0
        return most


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Time:
    """The time of embedders; pauses are as long as they may be."""
    fake = Time()
    monkeypatch.setattr(Embedder, "_clock", staticmethod(lambda: fake.now))
    monkeypatch.setattr(attuned_store, "random", LongestPauses())
    return fake


class Caller:
    """Calls an embedder as a store of one face does."""

    def __init__(self, face: str, fake: Time) -> None:
        self.blocking = face == "sync"
        self.waits: Any = (attuned_store.Blocking if self.blocking else attuned_store.Suspending)()
        self.waits.sleep = fake.sleep

    async def texts(self, embedder: Embedder, texts: Sequence[str]) -> list[Outcome]:
        body = embedder.embed_texts(self.waits, texts)
        return attuned_store.run(body) if self.blocking else await body

    async def query(self, embedder: Embedder, text: str) -> Sequence[float]:
        body = embedder.embed_query_text(self.waits, text)
        return attuned_store.run(body) if self.blocking else await body


@pytest.fixture
def caller(face: str, fake: Time) -> Caller:
    """Calls of a store of the face: sync, asyncio, trio."""
    return Caller(face, fake)


def embed(embedder: Embedder, texts: Sequence[str]) -> list[Outcome]:
    """What a synchronous store gets."""
    return attuned_store.run(embedder.embed_texts(BLOCKING, texts))


def embed_query(embedder: Embedder, text: str) -> Sequence[float]:
    return attuned_store.run(embedder.embed_query_text(BLOCKING, text))


def embedder_of(function: Callable[..., Any], **options: Any) -> Embedder:
    return Embedder(function, **{"name": "test", "dimensions": DIMENSIONS, **options})


class Recorder:
    """A function that embeds, and refuses batches with a text that it does not like."""

    def __init__(self, *bad: str) -> None:
        self.bad, self.calls = frozenset(bad), list[list[str]]()

    def __call__(self, texts: list[str]) -> list[list[float]]:
        self.calls.append([*texts])
        if not self.bad.isdisjoint(texts):
            raise ValueError("one of them is bad")
        return [vector_of(text) for text in texts]


def failed(outcome: Outcome) -> EmbeddingError:
    """An outcome that is an EmbeddingError with a message of one line."""
    assert isinstance(outcome, EmbeddingError), outcome
    assert (outcome.backend, outcome.operation, outcome.ambiguous) == ("embedder", "embed", False)
    assert len(str(outcome).splitlines()) == 1
    return outcome


# ------------------------------------------------------------------------------
# What a function may return
# ------------------------------------------------------------------------------


class Tensor:
    """What has nothing but tolist()."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def tolist(self) -> Any:
        return self.values


def numpy(kind: str) -> Callable[[Any], Any]:
    return lambda values: pytest.importorskip("numpy").array(values, kind)


RETURNED: dict[str, Callable[[list[list[float]]], Any]] = {
    "lists": lambda vectors: vectors,
    "tuples": lambda vectors: tuple(map(tuple, vectors)),
    "a generator": iter,
    "deques": lambda vectors: deque(map(deque, vectors)),
    "arrays": lambda vectors: [array("f", vector) for vector in vectors],
    "memory views": lambda vectors: [memoryview(array("d", vector)) for vector in vectors],
    "a matrix": numpy("float64"),
    "a matrix of single precision": numpy("float32"),
    "a matrix of half precision": numpy("float16"),
    "rows": lambda vectors: [numpy("float32")(vector) for vector in vectors],
    "a generator of rows": lambda vectors: (numpy("float32")(vector) for vector in vectors),
    "lists of numpy's numbers": lambda vectors: [[*numpy("float32")(vector)] for vector in vectors],
    "tensors": lambda vectors: [Tensor(vector) for vector in vectors],
    "a tensor": Tensor,
    "a tensor of tensors": lambda vectors: Tensor([Tensor(vector) for vector in vectors]),
    "fractions": lambda vectors: [[*map(Fraction, vector)] for vector in vectors],
    "decimals": lambda vectors: [[*map(Decimal, vector)] for vector in vectors],
}


@pytest.mark.parametrize("shape", RETURNED)
async def test_vectors_come_in_any_form(shape: str, caller: Caller) -> None:
    """Lists, tuples, arrays, matrices, tensors and iterators of them become vectors of plain floats."""
    embedder = embedder_of(lambda texts: RETURNED[shape]([vector_of(text) for text in texts]))
    found = await caller.texts(embedder, ["one", "two", "three"])
    assert found == [vector_of("one"), vector_of("two"), vector_of("three")]
    assert {type(value) for vector in found for value in vector} == {float}  # type: ignore[union-attr]


GOOD = vector_of("good")
VECTORS: dict[str, tuple[Any, str]] = {
    "NaN": ([math.nan, *GOOD[1:]], "got one with NaN or infinity"),
    "infinity": ([*GOOD[1:], -math.inf], "got one with NaN or infinity"),
    "too large a number": ([10**400, *GOOD[1:]], "got list, which is not that"),
    "a number missing": (GOOD[1:], "got 7"),
    "a number too many": ([*GOOD, 1.0], "got 9"),
    "none at all": ([], "got 0"),
    "zeros": ([0.0] * DIMENSIONS, "got one of length 0, which has no direction to compare"),
    "too weak": ([1e-30] * DIMENSIONS, "which has no direction to compare"),
    "too strong": ([1e30] * DIMENSIONS, "which has no direction to compare"),
    "None": (None, "got NoneType, which is not that"),
    "a number": (0.5, "got float, which is not that"),
    "words": ("12345678", "got str, which is not that"),
    "numbers as words": ([*map(str, GOOD)], "got list, which is not that"),
    "complex numbers": ([1j] * DIMENSIONS, "got list, which is not that"),
    "a matrix": ([GOOD], "got list, which is not that"),
    "a mapping": (dict.fromkeys("abcdefgh", 0.5), "got dict, which is not that"),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_a_bad_vector_is_the_error_of_its_text(kind: str) -> None:
    """What is no vector, or none that can be compared, fails its text alone, in one call."""
    vector, message = VECTORS[kind]
    recorder = Recorder()

    def function(texts: list[str]) -> list[Any]:
        return [
            vector if text == "bad" else found for text, found in zip(texts, recorder(texts), strict=True)
        ]

    one, two, three = embed(embedder_of(function), ["one", "bad", "three"])
    assert [one, three] == [vector_of("one"), vector_of("three")]
    assert message in str(failed(two))
    assert "embedder 'test': a vector of 8 numbers is needed" in str(two)
    assert not failed(two).retryable
    assert len(recorder.calls) == 1
    with pytest.raises(EmbeddingError, match="a vector of 8 numbers is needed"):
        embed_query(embedder_of(function), "bad")


@pytest.mark.parametrize("answer", [None, 5, "text", b"text", {"one": GOOD}, object()], ids=type)
def test_an_answer_that_is_no_vectors_is_asked_for_once(answer: Any) -> None:
    """What is no vectors, whatever the texts were, fails all of them, in one call."""
    calls = list[int]()

    def function(texts: list[str]) -> Any:
        calls.append(len(texts))
        return answer

    for outcome in embed(embedder_of(function), ["one", "two", "three"]):
        assert f"a vector for each text is needed, got {type(answer).__name__}" in str(failed(outcome))
    assert calls == [3]


@pytest.mark.parametrize("change", [-1, 1, 10**9])
def test_another_number_of_vectors_is_never_paired(change: int) -> None:
    """Where there are always more or fewer vectors than texts, no text has one."""

    def function(texts: list[str]) -> Any:
        return itertools.islice(itertools.repeat(GOOD), len(texts) + change)

    found = embed(embedder_of(function), ["one", "two", "three"])
    got = "got 0" if change < 0 else "got more"
    assert all(f"1 vector is needed, {got}" in str(failed(outcome)) for outcome in found)


def test_a_server_that_answers_some_of_a_batch_is_given_less() -> None:
    """Where only the first of a batch are answered, smaller batches are, each in whole."""
    recorder = Recorder()
    texts = [f"text {number}" for number in range(50)]
    found = embed(embedder_of(lambda texts: recorder(texts)[:32]), texts)
    assert found == [*map(vector_of, texts)]
    assert [*map(len, recorder.calls)] == [50, 25, 25]


# ------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------

WORDS = st.sampled_from(["a", "b", "c d", "é", "🙂", "\ud800", "x" * 30]) | st.text(max_size=8)


@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(WORDS, max_size=40),
    bad=st.sets(WORDS, max_size=5),
    batch_size=st.integers(1, 12),
)
def test_each_text_has_its_own_outcome(texts: list[str], bad: set[str], batch_size: int) -> None:
    """In order, each text has the vector or the error that it has alone; none is embedded twice."""
    recorder = Recorder(*bad)
    found = embed(embedder_of(recorder, batch_size=batch_size), texts)

    assert len(found) == len(texts)
    for text, outcome in zip(texts, found, strict=True):
        if not text.strip():
            assert isinstance(outcome, ValidationError)
        elif text in bad:
            assert "one of them is bad" in str(failed(outcome))
        else:
            assert outcome == vector_of(text)
    embedded = [text for call in recorder.calls if bad.isdisjoint(call) for text in call]
    assert len(embedded) == len(set(embedded))
    assert max(map(len, recorder.calls), default=0) <= batch_size
    assert all(text.strip() for call in recorder.calls for text in call)


def test_a_bad_text_among_fifty_takes_thirteen_calls() -> None:
    """A refused batch of 50 is halved until the bad text stands alone, wherever it is."""
    texts = [f"text {number}" for number in range(50)]
    for bad in texts:
        recorder = Recorder(bad)
        found = embed(embedder_of(recorder), texts)
        assert [
            text for text, outcome in zip(texts, found, strict=True) if isinstance(outcome, StoreError)
        ] == [bad]
        assert len(recorder.calls) in (11, 13)


def test_a_function_that_refuses_everything_is_not_asked_for_ever() -> None:
    """After fifty texts in a row that were refused, each for itself, the rest is not tried."""
    texts = [f"text {number}" for number in range(1_000)]
    recorder = Recorder(*texts)
    found = embed(embedder_of(recorder), texts)
    assert all("one of them is bad" in str(failed(outcome)) for outcome in found)
    assert sum("not tried, as others failed" in str(outcome) for outcome in found) == 950
    assert len(recorder.calls) == 99


@pytest.mark.parametrize("text", ["", " ", "\n\t\u2003", None, 5, b"text"], ids=repr)
def test_an_empty_text_is_refused(text: Any) -> None:
    """A text without a character that is seen, or that is no text, is refused and not handed over."""
    recorder = Recorder()
    found = embed(embedder_of(recorder), ["one", text])
    assert isinstance(found[1], ValidationError)
    assert str(found[1]).startswith("text: ")
    assert recorder.calls == [["one"]]
    with pytest.raises(ValidationError, match=r"text: "):
        embed_query(embedder_of(recorder), text)


@pytest.mark.parametrize("texts", ["text", b"text", None, {"a": 1}, iter(["a"])], ids=type)
def test_texts_are_a_sequence(texts: Any) -> None:
    """A single text in the place of a list of them is refused, not taken for its letters."""
    with pytest.raises(ValidationError, match=r"texts: a sequence of strings is needed"):
        embed(embedder_of(Recorder()), texts)


def test_a_function_may_change_what_it_is_handed() -> None:
    """The list handed over is the function's own: what it does to it changes no outcome."""

    def function(texts: list[str]) -> list[list[float]]:
        vectors = [vector_of(text) for text in texts]
        texts.clear()
        return vectors

    assert embed(embedder_of(function), ["one", "two"]) == [vector_of("one"), vector_of("two")]


# ------------------------------------------------------------------------------
# Long texts
# ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("ab \n\u2003🙂"), min_size=1, max_size=200), most=st.integers(1, 50))
def test_windows_hold_all_of_a_text(text: str, most: int) -> None:
    """The windows of a text are of at most so many characters, none empty, and lose nothing but spaces."""
    windows = embedder_of(Recorder(), max_characters=most)._cut(text) if text.strip() else []
    if len(text) > most and text.strip():
        assert all(0 < len(window) <= most and window == window.strip() for window in windows)
        assert "".join("".join(windows).split()) == "".join(text.split())


def test_windows_end_at_spaces_and_are_about_even() -> None:
    """Words are kept whole where they are no longer than a window, and no window is a small rest."""
    words = [f"word{number:03}" for number in range(145)]
    windows = embedder_of(Recorder(), max_characters=100)._cut(" ".join(words))
    assert " ".join(windows).split() == words
    assert all(len(window) > 25 for window in windows)
    assert len(windows) in (12, 13, 14)
    early = embedder_of(Recorder(), max_characters=100)._cut("a " + "x" * 150)
    assert [*map(len, early)] == [76, 76]  # a space so early would leave a window of a letter


def test_cutting_a_long_text_takes_no_time() -> None:
    """A text of 1 MiB is cut into windows in time that grows with its length alone."""
    begun = time.process_time()
    windows = embedder_of(Recorder(), max_characters=100)._cut("word " * 200_000)
    assert len(windows) >= 10_000
    assert time.process_time() - begun < 2


async def test_a_long_text_is_the_mean_of_its_windows(caller: Caller) -> None:
    """The vector of a text that is cut is the mean direction of its windows, which share the batches."""
    recorder = Recorder()
    embedder = embedder_of(recorder, max_characters=10, batch_size=3)
    long, vector = await caller.texts(embedder, ["first part second one", "short"])

    windows = recorder.calls[0] + recorder.calls[1]
    assert vector == vector_of("short")
    assert windows == ["first", "part", "second one", "short"]
    units = [[value / math.hypot(*vector_of(part)) for value in vector_of(part)] for part in windows[:-1]]
    mean = [sum(values) for values in zip(*units, strict=True)]
    assert long == pytest.approx([value / math.hypot(*mean) for value in mean])
    assert await caller.query(embedder, "first part second one") == long


def test_a_long_text_fails_with_a_window() -> None:
    """Where a window of a text is refused, so is the text; a window that others have too is embedded once."""
    recorder = Recorder("second one")
    found = embed(embedder_of(recorder, max_characters=10), ["first part second one", "first part", "part"])
    assert "one of them is bad" in str(failed(found[0]))
    assert found[1:] == [vector_of("first part"), vector_of("part")]
    assert (
        sum(call == ["part"] or ("part" in call and "second one" not in call) for call in recorder.calls) == 1
    )


def test_windows_that_cancel_each_other_out_are_an_error() -> None:
    """The mean of opposite vectors has no direction: that text has an error."""
    opposite = embedder_of(
        lambda texts: [[1.0, 0.5] if text == "up" else [-1.0, -0.5] for text in texts],
        dimensions=2,
        max_characters=4,
    )
    assert "cancel each other out" in str(failed(embed(opposite, ["up down"])[0]))
    with pytest.raises(EmbeddingError, match="cancel each other out"):
        embed_query(opposite, "up down")


# ------------------------------------------------------------------------------
# Queries
# ------------------------------------------------------------------------------


async def test_a_query_has_a_function_of_its_own(caller: Caller) -> None:
    """Where there is embed_query, it is handed the text of a query, and gives one vector; else embed is."""
    recorder = Recorder()
    assert await caller.query(embedder_of(recorder), "text") == vector_of("text")
    assert recorder.calls == [["text"]]

    async def awaited(text: str) -> list[float]:
        return vector_of(f"query: {text}")

    def plain(text: str) -> list[float]:
        return vector_of(f"query: {text}")

    embedder = embedder_of(recorder, embed_query=plain if caller.blocking else awaited, max_characters=5)
    assert await caller.query(embedder, "text") == vector_of("query: text")
    assert (await caller.query(embedder, "text and more"))[0] != vector_of("query: text")[0]
    assert recorder.calls == [["text"]]
    nested = embedder_of(recorder, embed_query=lambda text: [plain(text)])
    with pytest.raises(EmbeddingError, match="got list, which is not that"):
        await caller.query(nested, "text")


# ------------------------------------------------------------------------------
# Plain and asynchronous functions
# ------------------------------------------------------------------------------


async def awaited(texts: list[str]) -> list[list[float]]:
    await anyio.lowlevel.checkpoint()
    return [vector_of(text) for text in texts]


class Asynchronous:
    async def __call__(self, texts: list[str]) -> list[list[float]]:
        return await awaited(texts)


ASYNCHRONOUS: dict[str, Callable[[list[str]], Any]] = {
    "a coroutine function": awaited,
    "a partial one": partial(awaited),
    "an object": Asynchronous(),
    "a function that returns a coroutine": lambda texts: awaited([*texts]),
}


@pytest.mark.parametrize("kind", ASYNCHRONOUS)
async def test_a_function_may_be_asynchronous(kind: str, caller: Caller) -> None:
    """An asynchronous function is awaited by an asynchronous store; a synchronous one says what to do."""
    embedder = embedder_of(ASYNCHRONOUS[kind])
    if caller.blocking:
        with pytest.raises(ValidationError, match="give a plain one, or use an asynchronous store"):
            await caller.texts(embedder, ["text"])
        with pytest.raises(ValidationError, match="give a plain one, or use an asynchronous store"):
            await caller.query(embedder, "text")
    else:
        assert await caller.texts(embedder, ["text"]) == [vector_of("text")]
        assert await caller.query(embedder, "text") == vector_of("text")


async def test_a_plain_function_holds_up_no_event_loop(caller: Caller) -> None:
    """In an asynchronous store a plain function is called in a worker thread, an asynchronous one is not."""
    threads = list[int]()

    def plain(texts: list[str]) -> Iterator[list[float]]:
        for text in texts:
            threads.append(threading.get_ident())
            yield vector_of(text)

    await caller.texts(embedder_of(plain), ["one", "two"])
    here = threading.get_ident()
    assert all((thread == here) is caller.blocking for thread in threads)
    assert len(threads) == 2


async def test_an_asynchronous_function_can_be_cancelled(caller: Caller) -> None:
    """Cancelling reaches what an asynchronous function awaits; it is no failure that is tried again."""
    if caller.blocking:
        pytest.skip("nothing is cancelled there")
    calls = list[int]()

    async def hanging(texts: list[str]) -> Any:
        calls.append(len(texts))
        await anyio.sleep_forever()

    with anyio.move_on_after(0.05) as scope:
        await caller.texts(embedder_of(hanging), ["one", "two"])
    assert scope.cancelled_caught
    assert calls == [2]


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_the_end_of_an_iterator_is_an_error(kind: type[Exception], caller: Caller) -> None:
    """A StopIteration of the function's is its error, and not taken for the end of anything here."""

    def function(texts: list[str]) -> Any:
        raise kind

    async def awaiting(texts: list[str]) -> Any:
        raise kind

    for each in (function,) if caller.blocking else (function, awaiting):
        outcome = failed((await caller.texts(embedder_of(each), ["one"]))[0])
        assert kind.__name__ in f"{outcome} {outcome.__cause__.__cause__!r}"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [GeneratorExit, KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_goes_through(kind: type[BaseException]) -> None:
    """An interruption is not tried again, and no outcome of a text."""
    calls = list[int]()

    def function(texts: list[str]) -> Any:
        calls.append(len(texts))
        raise kind

    with pytest.raises(kind):
        embed(embedder_of(function), ["one", "two"])
    assert calls == [2]


# ------------------------------------------------------------------------------
# What passes, and what does not
# ------------------------------------------------------------------------------


class Response:
    """What the errors of httpx, requests and openai have beside them."""

    def __init__(self, status_code: int, **headers: str) -> None:
        self.status_code = status_code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class StatusError(Exception):
    """As openai's and cohere's."""

    def __init__(self, status_code: int, **headers: str) -> None:
        super().__init__(f"it said {status_code}")
        self.status_code = status_code
        self.response = Response(status_code, **headers)


class ResponseError(OSError):
    """As those of requests and httpx, which have the status at the response alone."""

    def __init__(self, status_code: int) -> None:
        super().__init__("it said no")
        self.response = Response(status_code)


class CodeError(Exception):
    """As Google's and urllib's."""

    def __init__(self, code: int) -> None:
        super().__init__("it said no")
        self.code = code


class TransportError(Exception):
    """As httpx's, by name."""


class APIConnectionError(Exception):
    """As openai's, by name."""


class OddError(Exception):
    """An error that has nothing to say, and is hard to look at."""

    @property
    def status_code(self) -> int:
        raise RuntimeError

    def __str__(self) -> str:
        raise RuntimeError


def wrapped(error: Exception, *, hidden: bool = False) -> Exception:
    outer = RuntimeError("embedding failed")
    outer.__cause__ = None if hidden else error
    return outer


def raising(errors: Sequence[Exception | None]) -> tuple[Callable[[list[str]], Any], Recorder]:
    """A function that raises these one after another, and None where it does its work; the last for ever."""
    recorder, left = Recorder(), deque(errors)

    def function(texts: list[str]) -> Any:
        vectors = recorder(texts)
        error = left.popleft() if len(left) > 1 else left[0]
        if error is not None:
            raise error
        return vectors

    return function, recorder


PASSING: dict[str, Exception] = {
    **{
        f"status {status}": StatusError(status)
        for status in (408, 409, 425, 429, 500, 502, 503, 504, 520, 529)
    },
    "status 503 at a response": ResponseError(503),
    "code 503": CodeError(503),
    "TimeoutError": TimeoutError(),
    "ConnectionResetError": ConnectionResetError("reset by peer"),
    "BrokenPipeError": BrokenPipeError(),
    "OSError": OSError(113, "No route to host"),
    "TransportError": TransportError("all gone"),
    "APIConnectionError": APIConnectionError("Connection error."),
    "one behind another": wrapped(wrapped(StatusError(503))),
    "a timeout behind another": wrapped(TimeoutError()),
}
LASTING: dict[str, Exception] = {
    **{f"status {status}": StatusError(status) for status in (400, 401, 403, 404, 413, 422, 501, 505)},
    "status 400 at a response": ResponseError(400),
    "FileNotFoundError": FileNotFoundError("model.safetensors"),
    "PermissionError": PermissionError("model.safetensors"),
    "ValueError": ValueError("no"),
    "hidden": wrapped(StatusError(503), hidden=True),
    "odd": OddError(),
}


@pytest.mark.parametrize("kind", PASSING)
async def test_what_passes_is_tried_again(kind: str, caller: Caller, fake: Time) -> None:
    """After a failure that passes the batch is handed over again, with doubled waits, until it succeeds."""
    function, recorder = raising([PASSING[kind], PASSING[kind], PASSING[kind], None])
    assert await caller.texts(embedder_of(function), ["one", "two"]) == [vector_of("one"), vector_of("two")]
    assert recorder.calls == [["one", "two"]] * 4
    assert fake.slept == [0.1, 0.2, 0.4]
    assert await caller.query(embedder_of(function), "one") == vector_of("one")


@pytest.mark.parametrize("kind", PASSING)
def test_attempts_are_counted(kind: str, fake: Time) -> None:
    """Where it does not pass in as many attempts as the policy has, no text of the batch is embedded."""
    function, recorder = raising([PASSING[kind]])
    sync = Caller("sync", fake)
    embedder = embedder_of(function, retry=RetryPolicy(attempts=3))
    found = attuned_store.run(embedder.embed_texts(sync.waits, ["one", "two"]))
    assert all(failed(outcome).retryable for outcome in found)
    assert failed(found[0]).__cause__ is PASSING[kind]
    assert "embedder 'test': 2 texts: " in str(found[0])
    assert recorder.calls == [["one", "two"]] * 3  # a batch that is not refused is not halved


@pytest.mark.parametrize("kind", LASTING)
def test_what_lasts_is_not_tried_again(kind: str, fake: Time) -> None:
    """Any other failure is told at once."""
    function, recorder = raising([LASTING[kind]])
    (outcome,) = embed(embedder_of(function), ["one"])
    assert not failed(outcome).retryable
    assert outcome.__cause__ is LASTING[kind]  # type: ignore[union-attr]
    assert (recorder.calls, fake.slept) == ([["one"]], [])


@pytest.mark.parametrize("status", [401, 402, 404, 405, 407, 501])
def test_what_fails_whatever_the_texts_is_not_halved(status: int) -> None:
    """A wrong key or model fails every text: after two batches the others are not tried."""
    function, recorder = raising([StatusError(status)])
    found = embed(embedder_of(function, batch_size=10), [f"text {number}" for number in range(50)])
    assert [*map(len, recorder.calls)] == [10, 10]
    assert all(f"HTTP {status}" in str(failed(outcome)) for outcome in found)
    assert {failed(outcome).status for outcome in found} == {status}
    assert ["not tried" in str(outcome) for outcome in found] == [False] * 20 + [True] * 30


def test_one_batch_that_fails_stops_no_other(fake: Time) -> None:
    """Where a batch fails for good and the next one succeeds, the others are embedded."""
    recorder = Recorder()

    def function(texts: list[str]) -> Any:
        vectors = recorder(texts)
        if "text 15" in texts or "text 35" in texts:
            raise StatusError(500)
        return vectors

    sync = Caller("sync", fake)
    texts = [f"text {number}" for number in range(50)]
    found = attuned_store.run(embedder_of(function, batch_size=10).embed_texts(sync.waits, texts))
    assert [isinstance(outcome, EmbeddingError) for outcome in found] == (
        [False] * 10 + [True] * 10 + [False] * 10 + [True] * 10 + [False] * 10
    )


def test_no_attempt_begins_after_the_deadline(fake: Time) -> None:
    """A wait that would end after the deadline of the policy is not begun."""
    sync = Caller("sync", fake)
    function, recorder = raising([StatusError(503)])
    policy = RetryPolicy(attempts=100, base_s=1, cap_s=4, deadline_s=10)
    attuned_store.run(embedder_of(function, retry=policy).embed_texts(sync.waits, ["one"]))
    assert fake.slept == [1, 2, 4]
    function, recorder = raising([StatusError(429, retry_after="61")])
    (outcome,) = attuned_store.run(embedder_of(function).embed_texts(sync.waits, ["one"]))
    assert failed(outcome).retryable
    assert len(recorder.calls) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after": "7"}, 7.0),
        ({"Retry_After": "7.5"}, 7.5),
        ({"retry_after_ms": "1500"}, 1.5),
        ({"retry_after_ms": "1500", "retry_after": "2"}, 1.5),
        ({"retry_after": "0"}, 0.1),
        ({"retry_after": "-5"}, 0.1),
        ({"retry_after": "nan"}, 0.1),
        ({"retry_after": "soon"}, 0.1),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.1),
        ({}, 0.1),
    ],
)
def test_a_client_waits_as_it_is_asked_to(headers: dict[str, str], seconds: float, fake: Time) -> None:
    """Retry-After counts in seconds, milliseconds or as a date, whatever carries it; else the policy does."""
    sync = Caller("sync", fake)
    function, _ = raising([wrapped(StatusError(429, **headers)), None])
    assert attuned_store.run(embedder_of(function).embed_texts(sync.waits, ["one"])) == [vector_of("one")]
    assert fake.slept == [seconds]


def test_a_date_is_waited_for(fake: Time) -> None:
    """A Retry-After that is a date is waited for by the clock of this machine."""
    sync = Caller("sync", fake)
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    function, _ = raising([StatusError(429, retry_after=date), None])
    attuned_store.run(embedder_of(function).embed_texts(sync.waits, ["one"]))
    assert fake.slept == [pytest.approx(29, abs=2)]


def test_messages_hold_no_secret() -> None:
    """Keys, tokens, users and queries of addresses that an error quotes are not in the message."""
    quoted = (
        "401 for https://ann:geheim@host/v1?key=geheim Authorization: Bearer geheim, sk-geheim-1\n"
        "authorization: basic geheim"
    )
    function, _ = raising([ValueError(quoted)])
    message = str(failed(embed(embedder_of(function), ["one"])[0]))
    assert "geheim" not in message
    assert "https://***@host/v1?***" in message


# ------------------------------------------------------------------------------
# OpenAI's client and a server that fails
# ------------------------------------------------------------------------------

KEY = "sk-loopback"


@pytest.fixture
def server() -> Iterator[EmbeddingServer]:
    """A loopback server for embeddings."""
    server = EmbeddingServer()
    yield server
    server.close()


@pytest.fixture
async def openai_embedder(caller: Caller, server: EmbeddingServer) -> AsyncIterator[Embedder]:
    """An embedder with the official client, the asynchronous one in an asynchronous store."""
    openai = pytest.importorskip("openai", reason="needs openai")
    options = {"base_url": server.url, "api_key": KEY, "max_retries": 0, "timeout": 5.0}
    client = openai.OpenAI(**options) if caller.blocking else openai.AsyncOpenAI(**options)

    def plain(texts: list[str]) -> list[list[float]]:
        return [each.embedding for each in client.embeddings.create(input=texts, model="loopback").data]

    async def awaiting(texts: list[str]) -> list[list[float]]:
        answer = await client.embeddings.create(input=texts, model="loopback")
        return [each.embedding for each in answer.data]

    yield embedder_of(plain if caller.blocking else awaiting, name="loopback")
    if caller.blocking:
        client.close()
    else:
        await client.close()


def refuse(status: int, **options: str) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.refuse(status, **options)


FAULTS: dict[str, tuple[Callable[[Exchange], None], float]] = {
    "429 with Retry-After": (refuse(429, retry_after="7"), 7.0),
    "429 with milliseconds": (refuse(429, retry_after_ms="250"), 0.25),
    "429 without": (refuse(429), 0.1),
    "500": (refuse(500), 0.1),
    "503": (refuse(503, retry_after="3"), 3.0),
    "a lost connection": (Exchange.drop, 0.1),
}
TEXTS = [f"text {number}" for number in range(50)]


@pytest.mark.once
@pytest.mark.parametrize("kind", FAULTS)
async def test_openai_is_asked_again(
    kind: str, caller: Caller, openai_embedder: Embedder, server: EmbeddingServer, fake: Time
) -> None:
    """What passes at a server is waited for as it asks to, and all texts are embedded."""
    fault, seconds = FAULTS[kind]
    server.faults = [fault]
    assert await caller.texts(openai_embedder, TEXTS) == [*map(vector_of, TEXTS)]
    assert await caller.query(openai_embedder, "text") == vector_of("text")
    assert server.batches == [TEXTS, TEXTS, ["text"]]
    assert fake.slept == [seconds]


@pytest.mark.once
async def test_openai_that_hangs(
    caller: Caller, openai_embedder: Embedder, server: EmbeddingServer, fake: Time
) -> None:
    """A server that does not answer is asked again once the client's own timeout has passed."""
    server.faults = [Exchange.hang]
    hasty = attrs.evolve(openai_embedder, embed=with_timeout(openai_embedder.embed, 0.2))
    assert await caller.texts(hasty, ["one"]) == [vector_of("one")]
    assert fake.slept == [0.1]
    server.faults = [Exchange.hang] * 4
    (outcome,) = await caller.texts(hasty, ["one"])
    assert failed(outcome).retryable
    assert "APITimeoutError" in str(outcome)


def with_timeout(function: Any, seconds: float) -> Any:
    """The same function, with another timeout of the client in its closure."""
    cell = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))["client"]
    cell.cell_contents = cell.cell_contents.with_options(timeout=seconds)
    return function


@pytest.mark.once
async def test_openai_that_refuses_a_text(
    caller: Caller, openai_embedder: Embedder, server: EmbeddingServer, fake: Time
) -> None:
    """One text among fifty that a server refuses, between answers of 429, costs it alone: 17 requests."""
    poison = refuse(400, message="the input cannot be embedded")
    server.faults = [refuse(429)]
    later = iter([None, refuse(429), None, refuse(429), None, None, refuse(429)])

    def when(texts: list[str]) -> Callable[[Exchange], None] | None:
        return next(later, None) or (poison if "text 49" in texts else None)

    server.when = when
    found = await caller.texts(openai_embedder, TEXTS)
    assert [text for text, outcome in zip(TEXTS, found, strict=True) if isinstance(outcome, StoreError)] == [
        "text 49"
    ]
    assert "HTTP 400" in str(failed(found[49]))
    assert "the input cannot be embedded" in str(found[49])
    assert not failed(found[49]).retryable
    assert len(server.batches) == 17
    assert len(fake.slept) == 4


@pytest.mark.once
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda exchange: exchange.answer([vector_of(text)[1:] for text in exchange.texts]), "got 7"),
        (lambda exchange: exchange.answer([[math.nan] * 8 for _ in exchange.texts]), "NaN"),
        (lambda exchange: exchange.answer([[0.0] * 8 for _ in exchange.texts]), "no direction"),
        (lambda exchange: exchange.answer([GOOD for _ in exchange.texts[1:]]), "vectors are needed, got 2"),
        (lambda exchange: exchange.send(200, {"odd": True}), "3 texts: "),
        (refuse(401), "HTTP 401"),
        (refuse(429, code="insufficient_quota"), "HTTP 429"),
    ],
    ids=["length", "NaN", "zeros", "number", "no embeddings", "401", "quota"],
)
async def test_openai_that_answers_badly(
    fault: Any, message: str, caller: Caller, openai_embedder: Embedder, server: EmbeddingServer, fake: Time
) -> None:
    """Vectors that are none, and answers that will be the same again, are told and not waited for."""
    server.when = lambda texts: fault if len(texts) == 3 or message != "vectors are needed, got 2" else None
    found = await caller.texts(openai_embedder, ["one", "two", "three"])
    if message == "vectors are needed, got 2":
        assert found == [vector_of("one"), vector_of("two"), vector_of("three")]
        assert [*map(len, server.batches)] == [3, 1, 2]
    else:
        assert all(isinstance(outcome, EmbeddingError) and not outcome.retryable for outcome in found)
        assert KEY not in str(found)
        if message != "3 texts: ":
            assert all(message in str(outcome) for outcome in found)
            assert len(server.batches) == 1
    assert fake.slept == []


# ------------------------------------------------------------------------------
# The embedder itself
# ------------------------------------------------------------------------------

BAD_OPTIONS: dict[str, list[Any]] = {
    "embed": [None, "text", 5],
    "name": ["", "a" * 257, "a\nb", "\ud800", None, 5],
    "dimensions": [0, -1, 65_537, 1.5, True, None, "8"],
    "embed_query": ["text", 5],
    "batch_size": [0, -1, 1.5, None],
    "max_characters": [0, -1, 1.5, "8"],
    "windows": ["head", "", None, 5],
    "retry": [None, 4, {"attempts": 4}],
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_options_are_refused(option: str) -> None:
    """Each option of an embedder is checked when it is made, and named."""
    for value in BAD_OPTIONS[option]:
        options = {"embed": Recorder(), "name": "test", "dimensions": DIMENSIONS, option: value}
        with pytest.raises(ValidationError, match=rf"^{option}: "):
            Embedder(**options)


def test_an_embedder_is_a_value() -> None:
    """It has the options that it was made with, cannot be changed, compares by value and is pickled."""
    embedder = embedder_of(len, max_characters=8_000)
    assert repr(embedder) == "Embedder('test', dimensions=8)"
    assert embedder == embedder_of(len, max_characters=8_000) != embedder_of(len)
    assert (embedder.batch_size, embedder.embed_query, embedder.retry) == (50, None, RetryPolicy())
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        embedder.name = "other"  # type: ignore[misc]
    for each in (embedder, HashingEmbedder(), HashingEmbedder(5)):
        again = pickle.loads(pickle.dumps(each))  # noqa: S301
        assert (type(again), again, repr(again)) == (type(each), each, repr(each))


# ------------------------------------------------------------------------------
# Hashing
# ------------------------------------------------------------------------------

HASHED = [
    "Bought the breakout on NQ",
    "naïve Café ﬁnance",
    "株式を買った",
    "🙂 🙂",
    "...",
    "\ud800",
    "a" * 300,
]
GOLDEN = "6656b9e95f5118d6"


def digest(texts: list[str], dimensions: int) -> str:
    vectors = HashingEmbedder(dimensions).embed(texts)
    return hashlib.sha256(b"".join(struct.pack(f"<{dimensions}d", *each) for each in vectors)).hexdigest()[
        :16
    ]


def test_hashing_is_the_same_everywhere() -> None:
    """The vectors are, to the last bit, those that other processes and platforms make: some are kept."""
    assert digest(HASHED, 768) == GOLDEN
    assert digest(HASHED[::-1], 768) != GOLDEN


@settings(deadline=None, max_examples=300)
@given(text=st.text(min_size=1), dimensions=st.sampled_from([1, 2, 3, 64, 768]))
def test_hashing_takes_any_text(text: str, dimensions: int) -> None:
    """Every text that is not empty has a unit vector, which case and width of letters do not change."""
    embedder = HashingEmbedder(dimensions)
    (vector,) = embed(embedder, [text])
    if not text.strip():
        assert isinstance(vector, ValidationError)
        return
    assert math.hypot(*vector) == pytest.approx(1.0)  # type: ignore[misc]
    assert embed_query(embedder, text) == vector


def test_hashing_finds_words_and_parts_of_them() -> None:
    """Texts that share words, or parts of them, are nearer to each other than those that do not."""
    query, same, part, other = HashingEmbedder().embed(
        ["breakout trades", "Trades: a BREAKOUT", "breakouts, trading", "rain in the evening"]
    )
    near = [sum(map(float.__mul__, query, vector)) for vector in (same, part, other)]
    assert near[0] > near[1] > near[2] + 0.2
    assert near[0] > 0.7


# ------------------------------------------------------------------------------
# A real model
# ------------------------------------------------------------------------------


def pairs(every: int = 1) -> tuple[list[str], list[str]]:
    """Titles and explanations of release notes: people wrote them as pairs."""
    notes = [json.loads(line) for line in NOTES.read_text("utf-8").splitlines()]
    chosen = [note for note in notes if len(note["text"]) > 40][::every]
    return [note["title"] for note in chosen], [note["text"] for note in chosen]


def reciprocal_rank(embedder: Embedder, titles: list[str], texts: list[str]) -> float:
    """MRR@10 of the texts, where one searches with their titles."""
    np = pytest.importorskip("numpy")
    queries = np.array(embed(embedder, titles))
    scores = queries @ np.array(embed(embedder, texts)).T
    ranks = (scores > scores.diagonal()[:, None]).sum(axis=1) + 1
    return float(np.where(ranks <= 10, 1 / ranks, 0).mean())


@pytest.fixture(scope="module")
def model() -> Embedder:
    """MiniLM as an embedder."""
    if minilm.MISSING:
        pytest.skip(minilm.REASON)
    return Embedder(minilm.MiniLM().embed, name=minilm.NAME, dimensions=minilm.DIMENSIONS)


@pytest.mark.once
def test_the_model_is_the_one_that_it_says(model: Embedder) -> None:
    """Its cosines are those that its makers publish for the same sentences."""
    sentences = [
        "The cat sits outside",
        "The dog plays in the garden",
        "A man is playing guitar",
        "A woman watches TV",
        "The new movie is awesome",
        "The new movie is so great",
    ]
    vectors = embed(model, sentences)
    found = [sum(map(float.__mul__, *vectors[place : place + 2])) for place in (0, 2, 4)]  # type: ignore[arg-type]
    assert found == pytest.approx([0.2838, -0.0327, 0.8939], abs=0.002)


@pytest.mark.once
def test_titles_find_their_explanations(model: Embedder) -> None:
    """With a real model the title of a change finds its explanation: MRR@10 is at least 0.50."""
    titles, texts = pairs(every=1 if os.environ.get("ATTUNED_TEST_LONG") else 6)
    assert reciprocal_rank(model, titles, texts) >= 0.50


def test_titles_find_their_explanations_by_hashing() -> None:
    """Words alone find a good part of them, among all."""
    assert reciprocal_rank(HashingEmbedder(), *pairs(every=5)) > 0.3

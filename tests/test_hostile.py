"""Servers that say anything: only documented errors come out, without secrets, whatever an answer holds."""

from __future__ import annotations

import base64
import copy
import html
import json
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, quote_plus

import hypothesis.strategies as st
import pytest
from conformance import needs, state
from hypothesis import HealthCheck, given, settings
from qdrant_server import Action, QdrantServer, edit, rate_limited, reply
from test_fuzz import LONG

from attuned_store import (
    AsyncQdrantStore,
    AsyncStateStore,
    BackendError,
    BreakerPolicy,
    MissingDependencyError,
    QdrantStore,
    RateLimitedError,
    RetryPolicy,
    StoreError,
    ValidationError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.faults, pytest.mark.once, pytest.mark.anyio, pytest.mark.timeout(600)]

KEY = "s3cret/k+y=<with>all&sorts"
ONCE = RetryPolicy(attempts=1)
NEVER = BreakerPolicy(failures=10**6)
PROXIES = ["http_proxy", "https_proxy", "all_proxy", "no_proxy"]


async def caught(operation: Awaitable[object]) -> StoreError:
    """The error of an operation, which must be one of ours, in one line that can be printed anywhere."""
    with pytest.raises(StoreError) as raised:
        await operation
    assert len(str(raised.value).splitlines()) == 1
    str(raised.value).encode()
    return raised.value


# ------------------------------------------------------------------------------
# Secrets
# ------------------------------------------------------------------------------

FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "shouted": str.upper,
    "in a url": lambda key: quote(key, safe=""),
    "in a path": quote,
    "in a form": quote_plus,
    "small escapes": lambda key: quote(key, safe="").lower(),
    "in JSON": lambda key: json.dumps(key + '"'),
    "in HTML": html.escape,
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 for urls": lambda key: base64.urlsafe_b64encode(key.encode()).decode().rstrip("="),
    "basic": lambda key: base64.b64encode(f"me:{key}".encode()).decode(),
    "basic, longer": lambda key: base64.b64encode(f"user:{key}".encode()).decode(),
    "cut by the limit": lambda key: "x" * 190 + key,
}
ECHOES: dict[str, Callable[[str], Action]] = {
    "Qdrant's error": lambda text: reply(400, {"status": {"error": f"no: {text}"}, "time": 0.0}),
    "a page": lambda text: reply(502, f"<p>no: {text}".encode()),
    "JSON of another shape": lambda text: reply(200, {"no": text}),
    "not JSON": lambda text: reply(200, f"no: {text}".encode()),
    "a redirect": lambda text: reply(
        307, b"", {"Location": f"http://elsewhere.invalid/{text.encode().hex()}"}
    ),
    "a version": lambda text: reply(200, {"title": "qdrant", "version": f"0.1 {text}"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("echo", ECHOES)
async def test_a_key_that_a_server_echoes_is_not_shown(
    form: str, echo: str, connect: Any, server: QdrantServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The api key, however it is written, is in no message, traceback, log or health."""
    caplog.set_level("DEBUG")
    said = FORMS[form](KEY)
    store: AsyncStateStore = connect(api_key=KEY, retry=ONCE)
    server.on(ECHOES[echo](said))

    error = await caught(store.upsert_latest(state()))
    health = await store.health()

    inner = FORMS[form](KEY)[4:-6] if "bas" in form else KEY[:6]
    shown = "".join(traceback.format_exception(error)) + repr(health) + caplog.text
    assert inner.lower() not in shown.lower()
    assert said.lower() not in shown.lower()


@pytest.mark.parametrize("field", ["source", "axes"])
async def test_a_key_in_what_a_collection_holds_is_not_shown(
    field: str, connect: Any, server: QdrantServer
) -> None:
    """A point or a schema that holds the key where it does not belong is refused without showing it."""
    store: AsyncStateStore = connect(api_key=KEY, retry=ONCE)
    await store.upsert_latest(state())
    assert await store.get_latest("ann") == state()

    def echo(body: Any) -> None:
        for point in body["result"]:
            point["payload"][field] = KEY

    server.on(edit(echo), route="POST /collections/{collection}/points")

    error = await caught(store.get_many(["ann"]))

    assert KEY[:6] not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://db.example.invalid/qdrant", "https://db.example.invalid/qdrant;"),
        ("https://me:pa55@db.example.invalid/x?api-key=pa55#pa55", "https://db.example.invalid/x;"),
        ("//me:pa55@db.example.invalid/", "//db.example.invalid/;"),
        ("/login?next=pa55", "/login;"),
        ("", "without saying where"),
        (None, "without saying where"),
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_says_where_to(
    status: int, location: str | None, shown: str, connect: Any, server: QdrantServer
) -> None:
    """A redirect is not followed: error and health say where it points, without secrets, and what to do."""
    store: AsyncStateStore = connect(retry=ONCE)
    server.on(reply(status, b"", {} if location is None else {"Location": location}))

    error = await caught(store.upsert_latest(state()))

    for message in (str(error), (await store.health()).message):
        assert shown in message
        assert "redirect" in message
        assert "url" in message
        assert "pa55" not in message
    assert not isinstance(error, BackendError) or not error.ambiguous


# ------------------------------------------------------------------------------
# Proxies of the environment
# ------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("kind", [QdrantStore, AsyncQdrantStore])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("ALL_PROXY", "socks5://me:pa55@localhost:1080", MissingDependencyError),
        ("all_proxy", "socks5h://localhost:1080", MissingDependencyError),
        ("HTTP_PROXY", "gopher://me:pa55@localhost:1", ValidationError),
        ("https_proxy", "ftp://localhost:1", ValidationError),
        ("HTTPS_PROXY", "http://me:pa55@localhost:notaport", ValidationError),
        ("http_proxy", "http://[::1", ValidationError),
        ("NO_PROXY", "localhost, ::1/128", ValidationError),
        ("no_proxy", "fd00::/8", ValidationError),
    ],
)
@needs("qdrant_client")
def test_a_proxy_of_the_environment_that_does_not_work_is_named(
    kind: Any, name: str, value: str, error: type[StoreError], environment: pytest.MonkeyPatch
) -> None:
    """What httpx cannot do with comes as an error of ours that names the variable, and not its value."""
    environment.setenv(name, value)

    with pytest.raises(error, match=rf"^{name}: ") as raised:
        kind(url="http://localhost:6333", verify=False)

    assert "pa55" not in "".join(traceback.format_exception(raised.value))


@needs("qdrant_client")
def test_the_variable_that_counts_is_named(environment: pytest.MonkeyPatch) -> None:
    """Where a variable is there in both spellings, the small one is used: that one is named."""
    environment.setenv("HTTP_PROXY", "gopher://localhost")
    environment.setenv("http_proxy", "gopher://localhost")
    environment.setenv("NO_PROXY", "localhost")

    with pytest.raises(ValidationError, match=r"^http_proxy: "):
        QdrantStore(url="http://localhost:6333", verify=False)


@needs("qdrant_client")
def test_certificates_of_the_environment_that_are_missing_are_named(environment: pytest.MonkeyPatch) -> None:
    """SSL_CERT_FILE is httpx' way to other certificates: where there are none the error names it."""
    environment.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")

    with pytest.raises(ValidationError, match=r"^SSL_CERT_FILE: "):
        QdrantStore(url="https://localhost:6333")


# ------------------------------------------------------------------------------
# Anything
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        ("9" * 400, 1e6, 1e10),
        ("9" * 5_000, 0, 1e10),
        ("-" + "9" * 400, 0, 0),
        ("-1", 0, 0),
        ("1e999", 0, 10),
        ("nan", 0, 10),
        (timedelta(hours=1), 3000, 3600),
        (timedelta(hours=-1), 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 -2359", 0, 1e12),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0, 10),
        ("Mon, 99 Jan 2030 99:99:99 GMT", 0, 10),
        ("integer: " * 30, 0, 10),
    ],
)
async def test_a_retry_after_of_any_kind_is_a_429(
    said: str | timedelta, least: float, most: float, connect: Any, server: QdrantServer
) -> None:
    """However long the server asks to wait, and in whatever words, the error is a RateLimitedError."""
    store: AsyncStateStore = connect(retry=ONCE)
    if isinstance(said, timedelta):
        said = format_datetime(datetime.now(UTC) + said, usegmt=True)
    server.on(rate_limited(said))

    error = await caught(store.get_latest("ann"))

    assert isinstance(error, RateLimitedError)
    assert least <= error.retry_after_s <= most


HUGE = [10**400, -(10**400), 10**4299, 2**63, 2**64, -1, 0, 1e308, float("inf"), float("nan"), 0.5]
odd = st.one_of(
    st.sampled_from(HUGE),
    st.none(),
    st.booleans(),
    st.sampled_from(["", "x", "\ud800", "\x1b[2J\n", "9" * 5_000, "1.18.0", "latest", "history", "ann"]),
    st.sampled_from([[], {}, [[]], {"x": {}}, ["ann"], {"status": []}, {"status": {"error": 10**400}}]),
)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Any], Any]:
    """A change of some places of any JSON, chosen by numbers, as it is not known yet."""
    choices = draw(st.lists(st.tuples(st.integers(0, 10**6), odd, st.booleans()), min_size=1, max_size=3))

    def change(body: Any) -> Any:
        body = json.loads(json.dumps(body))
        for number, value, removes in choices:
            places = [(body, key) for key in body] if isinstance(body, dict) else []
            for holder, key in places:
                inner = holder[key]
                if isinstance(inner, dict | list):
                    places += [
                        (inner, each) for each in (inner if isinstance(inner, dict) else range(len(inner)))
                    ]
            if not places:
                return value
            holder, key = places[number % len(places)]
            if removes and isinstance(holder, dict):
                del holder[key]
            else:
                holder[key] = copy.deepcopy(value)
        return body

    return change


raw = st.one_of(
    st.binary(max_size=64),
    st.sampled_from(
        [b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5_000, b'{"status":' + b"9" * 5_000 + b"}", b"null"]
    ),
    odd.map(lambda value: json.dumps(value).encode()),
)
header = st.tuples(
    st.sampled_from(["Retry-After", "Location", "Content-Type", "Content-Encoding", "Set-Cookie", "X-Any"]),
    st.one_of(
        st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30),
        st.sampled_from(
            ["9" * 400, "gzip", "br", "http://[", "http://a:b:c", "//\xff", "text/html; charset=nope"]
        ),
    ),
)
answers = st.builds(
    lambda status, body, headers: reply(status, body, dict(headers)),
    st.one_of(
        st.sampled_from([200, 201, 204, 301, 307, 400, 404, 408, 429, 500, 503]), st.integers(200, 999)
    ),
    raw,
    st.lists(header, max_size=2),
)
CALLS: dict[str, Callable[[Any, Any], object]] = {
    "upsert_latest": lambda store, _: store.upsert_latest(state(at=1)),
    "expected": lambda store, _: store.upsert_latest(state(at=1), expected=state()),
    "upsert_many": lambda store, _: store.upsert_many([state(f"u{n}", n) for n in range(3)]),
    "get_latest": lambda store, _: store.get_latest("ann"),
    "get_many": lambda store, _: store.get_many(["ann", "bob"]),
    "get_history": lambda store, _: store.get_history("ann"),
    "search": lambda store, _: store.search_similar({"warmth": 0.9}),
    "search history": lambda store, _: store.search_similar({"warmth": 0.9}, history=True),
    "users": lambda store, _: [user for user, _ in zip(store.users(), range(99), strict=False)],
    "count": lambda store, _: store.count(history=True),
    "delete": lambda store, _: store.delete("ann"),
    "prune": lambda store, _: store.prune(),
    "health": lambda store, _: store.health(),
    "portable": lambda store, path: store.create_snapshot(path, kind="portable"),
    "native": lambda store, path: store.create_snapshot(path, kind="native"),
}


class Hostile(NamedTuple):
    """A server, a store whose answers it makes up, and another one that nobody disturbs."""

    server: QdrantServer
    store: QdrantStore
    spared: QdrantStore


@pytest.fixture(scope="module")
def hostile() -> Iterator[Hostile]:
    pytest.importorskip("qdrant_client")
    with QdrantServer() as server:
        options: dict[str, Any] = {"url": server.url, "verify": False, "max_history_per_user": 2}
        with (
            QdrantStore(**options, retry=ONCE, breaker=NEVER, request_timeout=20.0) as store,
            QdrantStore(**options) as spared,
        ):
            store.count()
            yield Hostile(server, store, spared)


@pytest.mark.parametrize("name", CALLS)
def test_no_answer_makes_an_undocumented_error(name: str, hostile: Hostile, tmp_path: Path) -> None:
    """Whatever an answer holds, a call gives an answer or a StoreError in one printable line."""
    server, store, spared = hostile

    @settings(
        max_examples=700 if LONG else 25,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(mutations().map(edit), answers), st.integers(0, 5), st.booleans())
    def tried(action: Action, skip: int, opened: bool) -> None:
        server.rules.clear()
        for at in range(4):
            spared.upsert_latest(state(at=at))
        store._operations.backend.is_open = opened
        server.on(action, skip=skip, times=2)
        failures = list[StoreError]()
        try:
            CALLS[name](store, tmp_path)
        except StoreError as error:
            failures.append(error)
        server.errors.clear()
        for failure in failures:
            assert len(str(failure).splitlines()) <= 1
            str(failure).encode()

    try:
        tried()
    finally:
        server.rules.clear()

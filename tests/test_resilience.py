"""What a store does when its server fails: retries, the circuit breaker, thousands of faults, an outage."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import anyio
import anyio.lowlevel
import attrs
import pytest
from conformance import NOW, Awaited, run, state, together
from qdrant_server import (
    Action,
    Exchange,
    QdrantServer,
    Request,
    Response,
    any_fault,
    drip,
    drip_head,
    drop,
    go_down,
    hang,
    keep_promising,
    lose_reply,
    not_json,
    one_of,
    other_shape,
    postpone,
    rate_limited,
    reply,
    reset,
    truncate,
)

import attuned_store
from attuned_store import (
    AsyncQdrantStore,
    AsyncStateStore,
    BackendError,
    BackendRejectedError,
    BackendTimeoutError,
    BackendUnavailableError,
    BreakerPolicy,
    CircuitOpenError,
    ConflictError,
    QdrantStore,
    QdrantStoreConfig,
    RateLimitedError,
    RetryPolicy,
    StateSnapshot,
    StoreError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.once,  # the same on every Python
    pytest.mark.anyio,
    pytest.mark.timeout(120),
    # Under trio httpx leaves the body of a request that broke off to the garbage collector.
    pytest.mark.filterwarnings("ignore:Async generator 'httpx:ResourceWarning"),
]

C = "attuned_state"
UPSERT = "PUT /collections/{collection}/points"
RETRIEVE = "POST /collections/{collection}/points"
DEFAULT = RetryPolicy()
ONCE = RetryPolicy(attempts=1)
NEVER = BreakerPolicy(failures=10**6)


# ------------------------------------------------------------------------------
# Stores, servers and time
# ------------------------------------------------------------------------------


class Time:
    """A clock that moves by what is slept, and what was slept."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.waits: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def fake() -> Time:
    """The time of the stores under test."""
    return Time()


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jitter always takes the longest wait that it may."""

    class Random:
        @staticmethod
        def uniform(least: float, most: float) -> float:
            assert least == 0.0
            return most

    monkeypatch.setattr(attuned_store, "random", Random())


def itself(store: AsyncStateStore) -> Any:
    """The store within its wrapper."""
    return store.store if isinstance(store, Awaited) else store


def resilience(store: AsyncStateStore) -> Any:
    return itself(store)._operations.place.connection.engine.resilience


@pytest.fixture
def server_options() -> dict[str, Any]:
    """The stores retry as they do by default."""
    return {"verify": False}


@pytest.fixture
def connect(server: QdrantServer, fake: Time, connect: Callable[..., AsyncStateStore]) -> Any:
    """A function that opens a store of the face, whose waits are recorded and whose clock is the fake one."""

    async def opening(*, opened: bool = True, real: bool = False, **options: Any) -> AsyncStateStore:
        store = connect(**options)
        if not real:
            engine = itself(store)._operations.place.connection.engine
            engine.resilience = attuned_store.Resilience(itself(store).config, fake.sleep, fake.clock)
        if opened:
            await store.count()
            server.clear()
        return store

    return opening


async def caught(operation: Awaitable[object]) -> StoreError:
    """The error of an operation, which must be one of ours, in one line."""
    with pytest.raises(StoreError) as raised:
        await operation
    assert len(str(raised.value).splitlines()) == 1
    return raised.value


def points(server: QdrantServer) -> list[tuple[str, str, int]]:
    """What the server holds, read past the store: user, kind and time of every point."""
    payloads = [point["payload"] for point in server.dump(C)]
    return sorted((p["user_id"], p["kind"], p["updated_at_unix_ms"] - NOW) for p in payloads)


# ------------------------------------------------------------------------------
# Retries
# ------------------------------------------------------------------------------

TRANSIENT: dict[str, tuple[Action, type[BackendError]]] = {
    "408": (reply(408), BackendTimeoutError),
    "429": (rate_limited(0), RateLimitedError),
    "500": (reply(500), BackendUnavailableError),
    "502": (reply(502, b"<html>Bad Gateway</html>"), BackendUnavailableError),
    "503": (reply(503), BackendUnavailableError),
    "504": (reply(504), BackendTimeoutError),
    "a closed connection": (drop(), BackendUnavailableError),
    "a reset connection": (drop(reset=True), BackendUnavailableError),
    "a lost reply": (lose_reply(), BackendUnavailableError),
    "a truncated reply": (truncate(), BackendUnavailableError),
    "a reply reset in its middle": (reset(), BackendUnavailableError),
}
LASTING = [400, 401, 403, 404, 405, 409, 413, 422, 451, 501, 505, 507]


@pytest.mark.parametrize("name", TRANSIENT)
async def test_what_passes_is_tried_again(
    name: str, connect: Any, server: QdrantServer, fake: Time, longest: None
) -> None:
    """After a transient failure the same request is sent again, with doubled waits, until it succeeds."""
    store = await connect()
    server.on(TRANSIENT[name][0], route=UPSERT, times=3)

    await store.upsert_latest(state())

    assert server.counts[UPSERT] == 4
    assert len({request.body for request in server.requests}) == 1  # the same points, revision and all
    assert fake.waits == [0.1, 0.2, 0.4]
    assert points(server) == [("ann", "history", 0), ("ann", "latest", 0)]
    assert resilience(store).breaker.state == "closed"


async def test_429_without_a_time_to_wait_is_not_repeated(
    connect: Any, server: QdrantServer, fake: Time
) -> None:
    """Qdrant says how long to wait, unless a request is larger than what may be asked for in a minute."""
    store = await connect()
    server.on(rate_limited(None))

    error = await caught(store.get_latest("ann"))

    assert isinstance(error, RateLimitedError)
    assert not error.retryable
    assert (len(server.requests), fake.waits) == (1, [])


@pytest.mark.parametrize("status", ["wait_timeout", "acknowledged"])
@pytest.mark.parametrize("write", ["upsert_latest", "expected", "upsert_many", "patch", "delete"])
async def test_only_what_is_completed_has_been_done(
    write: str, status: str, connect: Any, server: QdrantServer, fake: Time
) -> None:
    """A write that the server has only taken in is sent again; where that does not help, it is a timeout."""
    store = await connect()
    await store.upsert_latest(state())
    with server.on(postpone(status), when=Request.is_write, times=2):
        await WRITES[write](store)
    found = await store.get_latest("ann")
    assert found is None if write == "delete" else found is not None and found != state()

    await store.delete("ann")
    await store.upsert_latest(state())
    server.on(postpone(status), when=Request.is_write)
    error = await caught(WRITES[write](store))

    assert isinstance(error, BackendTimeoutError)
    assert status in str(error)
    assert (error.retryable, error.ambiguous) == (True, True)


@pytest.mark.parametrize("name", TRANSIENT)
async def test_attempts_are_counted(
    name: str, connect: Any, server: QdrantServer, fake: Time, longest: None
) -> None:
    """A request is sent so many times as the policy says, and its last failure is raised."""
    store = await connect(retry=RetryPolicy(attempts=3), breaker=NEVER)
    action, kind = TRANSIENT[name]
    server.on(action)

    error = await caught(store.get_latest("ann"))

    assert type(error) is kind
    assert isinstance(error, BackendError)
    assert (error.backend, error.operation, error.retryable) == ("server", "retrieve", True)
    assert error.status == (int(name) if name.isdigit() else None)
    assert error.__cause__ is not None
    assert (len(server.requests), fake.waits) == (3, [0.1, 0.2])


@pytest.mark.parametrize("status", LASTING)
async def test_what_lasts_is_not_tried_again(
    status: int, connect: Any, server: QdrantServer, fake: Time
) -> None:
    """Any other error status is raised at once, however often it comes, and leaves the breaker closed."""
    store = await connect(breaker=BreakerPolicy(failures=2))
    server.on(reply(status, {"status": {"error": "No way:\n\tnot so"}, "time": 0.0}))

    for number in range(1, 6):
        error = await caught(store.get_latest("ann"))
        assert isinstance(error, BackendRejectedError if status < 500 else BackendUnavailableError)
        assert not error.retryable
        assert error.status == status
        assert f"HTTP {status}" in str(error)
        assert "No way: not so" in str(error)
        assert len(server.requests) == number

    assert fake.waits == []
    assert resilience(store).breaker.state == "closed"


async def test_waits_are_capped(connect: Any, server: QdrantServer, fake: Time, longest: None) -> None:
    """Waits double up to the cap."""
    policy = RetryPolicy(attempts=8, base_s=0.25, cap_s=2.0, deadline_s=1_000)
    store = await connect(retry=policy, breaker=NEVER)
    server.on(reply(503))

    await caught(store.get_latest("ann"))

    assert fake.waits == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0, 2.0]


async def test_waits_have_full_jitter(connect: Any, server: QdrantServer, fake: Time) -> None:
    """Each wait is anywhere from nothing to its bound, so that clients do not come back together."""
    store = await connect(breaker=NEVER)
    server.on(reply(503))

    for _ in range(60):
        await caught(store.get_latest("ann"))

    for bound, waits in zip((0.1, 0.2, 0.4), (fake.waits[step::3] for step in range(3)), strict=True):
        assert len(waits) == 60
        assert 0 <= min(waits) < bound / 4
        assert bound * 3 / 4 < max(waits) <= bound


async def test_one_attempt_means_no_retry(connect: Any, server: QdrantServer, fake: Time) -> None:
    """With attempts=1 nothing is ever sent twice."""
    store = await connect(retry=ONCE)
    server.on(reply(503), times=1)

    await caught(store.get_latest("ann"))

    assert (len(server.requests), fake.waits) == (1, [])
    assert await store.get_latest("ann") is None


async def test_the_server_says_how_long_to_wait(
    connect: Any, server: QdrantServer, fake: Time, longest: None
) -> None:
    """Retry-After is waited for, unless the backoff is longer anyway."""
    store = await connect()
    server.on(rate_limited(7), times=1)
    server.on(rate_limited(0), skip=1, times=1)

    assert await store.get_latest("ann") is None

    assert fake.waits == [7.0, 0.2]
    assert len(server.requests) == 3


async def test_a_wait_beyond_the_deadline_is_not_begun(
    connect: Any, server: QdrantServer, fake: Time
) -> None:
    """A server that asks for more time than there is gets its way: the caller is told how long it takes."""
    store = await connect(retry=RetryPolicy(deadline_s=60))
    server.on(rate_limited(61))

    error = await caught(store.get_latest("ann"))

    assert isinstance(error, RateLimitedError)
    assert error.retry_after_s == 61
    assert (len(server.requests), fake.waits) == (1, [])


@pytest.mark.parametrize("text", ["Wed, 21 Oct 2026 07:28:00 GMT", "0.5", "soon"])
async def test_a_retry_after_that_is_no_integer_is_still_a_429(
    text: str, connect: Any, server: QdrantServer
) -> None:
    """A gateway may send Retry-After as a date or a fraction: the request is still tried again."""
    store = await connect(retry=RetryPolicy(deadline_s=10**9))
    server.on(rate_limited(text), times=1)

    assert await store.get_latest("ann") is None


async def test_the_deadline_ends_the_attempts(
    connect: Any, server: QdrantServer, fake: Time, longest: None
) -> None:
    """No wait is begun that would end after the deadline, however many attempts are left."""
    store = await connect(retry=RetryPolicy(attempts=100, base_s=1, cap_s=100, deadline_s=10), breaker=NEVER)
    server.on(reply(503))
    begun = fake.now

    await caught(store.get_latest("ann"))

    assert fake.waits == [1, 2, 4]  # 8 more would be 15
    assert fake.now - begun <= 10


async def test_the_time_that_requests_take_counts(
    connect: Any, server: QdrantServer, fake: Time, longest: None
) -> None:
    """A server that is slow to fail uses up the deadline as waiting does."""
    store = await connect(retry=RetryPolicy(attempts=100, base_s=1, cap_s=1, deadline_s=10), breaker=NEVER)

    async def slowly(exchange: Exchange) -> Response:
        fake.now += 5
        return await reply(503)(exchange)

    server.on(slowly)

    await caught(store.get_latest("ann"))

    assert (len(server.requests), fake.waits) == (2, [1])


async def test_a_server_that_hangs_is_a_timeout(connect: Any, server: QdrantServer, fake: Time) -> None:
    """A request without an answer ends after request_timeout, is tried again, and says what it was."""
    store = await connect(request_timeout=0.05, retry=RetryPolicy(attempts=2))
    server.on(hang(30))

    error = await caught(store.get_latest("ann"))

    assert isinstance(error, BackendTimeoutError)
    assert error.retryable
    assert (len(server.requests), len(fake.waits)) == (2, 1)


DRIPS = {
    "the body": drip(0.04),
    "the head": drip_head(0.04),
    "100 Continue": keep_promising(0.04),
    "nothing": hang(30),
}


@pytest.mark.parametrize("name", DRIPS)
@pytest.mark.parametrize("opened", [True, False], ids=["opened", "unopened"])
async def test_a_call_ends_whatever_a_server_sends(
    name: str, connect: Any, server: QdrantServer, *, opened: bool
) -> None:
    """Every try has the time of a whole answer, and all of them have the deadline, however it drips."""
    policy = RetryPolicy(attempts=100, base_s=0.01, cap_s=0.01, deadline_s=1.5)
    store = await connect(opened=opened, real=True, request_timeout=0.5, retry=policy, breaker=NEVER)
    server.on(DRIPS[name])
    begun = time.monotonic()

    error = await caught(store.upsert_latest(state()))

    took = time.monotonic() - begun
    assert isinstance(error, BackendTimeoutError)
    assert "in time" in str(error)
    assert 1.0 < took < 10
    assert 1 < len(server.requests) < 6


async def test_the_deadline_is_that_of_the_first_try_too(connect: Any, server: QdrantServer) -> None:
    """A deadline below the time of an answer ends the first try; one of 0 means one try with all its time."""
    store = await connect(real=True, request_timeout=30, retry=RetryPolicy(deadline_s=1.0))
    server.on(drip(0.04))
    begun = time.monotonic()

    assert isinstance(await caught(store.get_latest("ann")), BackendTimeoutError)

    assert time.monotonic() - begun < 10
    store = await connect(opened=False, real=True, request_timeout=30, retry=RetryPolicy(deadline_s=0))
    server.rules.clear()
    assert await store.get_latest("ann") is None


async def test_a_slow_answer_in_time_is_taken(connect: Any, server: QdrantServer) -> None:
    """What comes byte by byte and is whole in time is an answer; the next one has its own time."""
    store = await connect(real=True, request_timeout=2.0)
    server.on(drip(0.001))

    for at in range(3):
        await store.upsert_latest(state(at=at))

    assert await store.get_latest("ann") == state(at=2)


async def test_a_server_that_reads_in_drips_is_a_timeout(connect: Any) -> None:
    """A body that a server takes in a little at a time ends at the deadline too."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        over = threading.Event()

        def sip() -> None:
            connection, _ = listener.accept()
            with connection:
                while not over.wait(0.05) and connection.recv(512):
                    pass

        with ThreadPoolExecutor() as pool:
            pool.submit(sip)
            config = QdrantStoreConfig(
                url=f"http://127.0.0.1:{listener.getsockname()[1]}", request_timeout=0.5, retry=ONCE
            )
            waits = attuned_store.BLOCKING
            engine = attuned_store.ServerEngine(config, waits)
            begun = time.monotonic()
            content = bytes(16 << 20)
            send = engine._send("test", lambda: engine._raw.request("POST", "/", content=content))
            with pytest.raises(BackendTimeoutError):
                run(send)
            over.set()
            run(engine.close())
        assert time.monotonic() - begun < 10


async def test_waiting_can_be_cancelled(face: str, server: QdrantServer) -> None:
    """Between two attempts an asynchronous store can be cancelled; it sends nothing more."""
    if face == "sync":
        pytest.skip("threads cannot be cancelled")
    slow = RetryPolicy(base_s=1_000, cap_s=1_000, deadline_s=10**6)
    async with AsyncQdrantStore(url=server.url, verify=False, retry=slow) as store:
        await store.count()
        server.clear()
        server.on(reply(503))
        with anyio.fail_after(30), anyio.move_on_after(0.1) as scope:
            await store.get_latest("ann")

        assert scope.cancelled_caught
        assert len(server.requests) == 1
        server.calm()
        assert await store.get_latest("ann") is None


# ------------------------------------------------------------------------------
# The circuit breaker
# ------------------------------------------------------------------------------


async def test_the_breaker_opens_after_so_many_failures_in_a_row(
    connect: Any, server: QdrantServer, fake: Time
) -> None:
    """After 5 failures in a row calls fail at once, with the time after which it makes sense to try again."""
    store = await connect(retry=ONCE, breaker=BreakerPolicy(first_open_s=30))
    server.on(reply(503), times=5)

    for _ in range(5):
        assert type(await caught(store.get_latest("ann"))) is BackendUnavailableError
    fake.now += 12.5
    for operation in (store.get_latest("ann"), store.upsert_latest(state()), store.count()):
        error = await caught(operation)
        assert isinstance(error, CircuitOpenError)
        assert error.retry_after_s == 17.5
        assert error.retryable
        assert "17.5 s" in str(error)

    assert len(server.requests) == 5
    assert fake.waits == []
    fake.now += 17.4999
    assert isinstance(await caught(store.count()), CircuitOpenError)
    fake.now += 0.0002
    assert await store.count() == 0
    assert resilience(store).breaker.state == "closed"


async def test_a_success_starts_the_count_anew(connect: Any, server: QdrantServer) -> None:
    """Only failures in a row open the breaker."""
    store = await connect(retry=ONCE, breaker=BreakerPolicy(failures=3))

    for _ in range(4):
        with server.on(reply(503)):
            for _ in range(2):
                assert type(await caught(store.count())) is BackendUnavailableError
        assert await store.count() == 0


@pytest.mark.parametrize("failure", [reply(404), reply(429), rate_limited(0)], ids=["404", "429", "wait 0"])
async def test_an_answer_is_no_failure_of_the_server(
    failure: Action, connect: Any, server: QdrantServer
) -> None:
    """4xx do not count: not when there are many of them, and not towards the failures around them."""
    store = await connect(retry=ONCE, breaker=BreakerPolicy(failures=2))
    server.on(failure)

    for _ in range(10):
        assert not isinstance(await caught(store.count()), CircuitOpenError)

    assert len(server.requests) == 10


@pytest.mark.parametrize("asked", ["through the client", "plainly"])
async def test_408_is_no_failure_of_the_server(
    asked: str, connect: Any, server: QdrantServer, tmp_path: Path
) -> None:
    """A 4xx does not count as a failure, 408 included, whichever way it was asked for."""
    store = await connect(retry=ONCE, breaker=BreakerPolicy(failures=2))
    await store.upsert_latest(state())
    server.on(reply(408), route="POST /collections/{collection}/snapshots" if asked == "plainly" else None)

    for _ in range(4):
        failing = store.create_snapshot(tmp_path) if asked == "plainly" else store.count()
        assert isinstance(await caught(failing), BackendTimeoutError)


@pytest.mark.parametrize(
    ("open_s", "attempts"),
    [(30, 2), (0.21, 2), (0.2, 4)],  # the wait after the second attempt is 0.2
)
async def test_attempts_count_each(
    open_s: float, attempts: int, connect: Any, server: QdrantServer, fake: Time, longest: None
) -> None:
    """A call that opens the breaker raises what failed, at once, unless the breaker lets it try again."""
    store = await connect(breaker=BreakerPolicy(failures=2, open_s=open_s, first_open_s=open_s))
    server.on(reply(503))

    assert type(await caught(store.count())) is BackendUnavailableError
    assert fake.waits == [0.1, 0.2, 0.4][: attempts - 1]
    assert len(server.requests) == attempts


async def test_a_failed_probe_opens_the_breaker_again(connect: Any, server: QdrantServer, fake: Time) -> None:
    """After the time is up one request goes through; if it fails, the whole time begins anew."""
    store = await connect(retry=ONCE, breaker=BreakerPolicy(failures=3, open_s=10, first_open_s=10))
    server.on(reply(503))
    for _ in range(3):
        await caught(store.count())

    for number in range(4, 7):
        fake.now += 10
        assert resilience(store).breaker.state == "half-open"
        assert type(await caught(store.count())) is BackendUnavailableError
        error = await caught(store.count())
        assert isinstance(error, CircuitOpenError)
        assert error.retry_after_s == 10
        assert len(server.requests) == number

    server.calm()
    fake.now += 10
    assert await store.count() == 0
    assert await store.count() == 0


async def test_one_probe_at_a_time(face: str, connect: Any, server: QdrantServer, fake: Time) -> None:
    """While a probe is on its way, all other threads and tasks are refused at once."""
    store = await connect(retry=ONCE, breaker=BreakerPolicy(failures=1))
    with server.on(reply(503)):
        await caught(store.count())
    fake.now += 30
    server.clear()
    outcomes: list[str] = []
    others_are_done = threading.Event()

    async def hold(exchange: Exchange) -> Response:
        assert await asyncio.to_thread(others_are_done.wait, 30)
        return await exchange.proceed()

    server.on(hold, times=1)

    async def call() -> None:
        try:
            await store.count()
        except CircuitOpenError:
            outcomes.append("refused")
        else:
            outcomes.append("answered")
        if len(outcomes) == 7:  # the others have been refused while the probe is on its way
            others_are_done.set()

    await together(store, [call] * 8)

    assert outcomes == ["refused"] * 7 + ["answered"]
    assert len(server.requests) == 1
    assert await store.count() == 0


async def test_a_cancelled_probe_does_not_lock_the_breaker(
    face: str, connect: Any, server: QdrantServer, fake: Time
) -> None:
    """A probe that is cancelled has found out nothing: the next request is the probe."""
    if face == "sync":
        pytest.skip("threads cannot be cancelled")
    store = await connect(retry=ONCE, breaker=BreakerPolicy(failures=1))
    with server.on(reply(503)):
        await caught(store.count())
    fake.now += 30
    server.clear()
    server.on(hang(30), times=1)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.count)
            while not server.requests:  # noqa: ASYNC110 - the server is in another thread
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()

    assert resilience(store).breaker.state == "half-open"
    assert await store.count() == 0
    assert resilience(store).breaker.state == "closed"


async def test_threads_and_tasks_share_the_breaker(face: str, connect: Any, server: QdrantServer) -> None:
    """Failures of several threads or tasks count together, and open the breaker for all."""
    store = await connect(retry=ONCE, breaker=BreakerPolicy(failures=6))
    server.on(reply(503))

    async def fail() -> None:
        assert type(await caught(store.count())) is BackendUnavailableError

    await together(store, [fail] * 6)

    async def refused() -> None:
        assert isinstance(await caught(store.count()), CircuitOpenError)

    await together(store, [refused] * 6)
    assert len(server.requests) == 6


def test_failures_of_one_moment_count_once(fake: Time) -> None:
    """Many requests that fail together are one failure; the first pause is short, and grows."""
    ours = breaker(fake, failures=2, open_s=5, first_open_s=1)
    for _ in range(2):
        assert ours.state == "closed"
        together_at = fake.now
        for _ in range(6):
            ours.enter("server", "test")
        fake.now += 0.5
        for _ in range(6):
            ours.leave(failed=True, probe=False, began=together_at)
        fake.now += 0.5

    for pause in (1, 2, 4, 5, 5):
        with pytest.raises(CircuitOpenError) as refused:
            ours.enter("server", "test")
        fake.now += refused.value.retry_after_s
        assert refused.value.retry_after_s == pytest.approx(pause, abs=0.6)
        assert ours.enter("server", "test")
        ours.leave(failed=True, probe=True, began=fake.now)
    fake.now += 5
    assert ours.enter("server", "test")
    ours.leave(failed=False, probe=True)
    assert ours.state == "closed"


async def test_stores_have_breakers_of_their_own(connect: Any, server: QdrantServer) -> None:
    """What one store learnt is not held against another."""
    one, two = await connect(retry=ONCE, breaker=BreakerPolicy(failures=1)), await connect(retry=ONCE)
    with server.on(reply(503)):
        await caught(one.count())

    assert isinstance(await caught(one.count()), CircuitOpenError)
    assert await two.count() == 0


def breaker(fake: Time, **policy: Any) -> attuned_store.CircuitBreaker:
    """A breaker whose first pause is as long as its longest, unless that is given."""
    policy = {"first_open_s": policy.get("open_s", 1.0), **policy}
    return attuned_store.CircuitBreaker(BreakerPolicy(**policy), fake.clock)


def enter(breaker: attuned_store.CircuitBreaker) -> bool:
    """Whether a request is let through."""
    try:
        breaker.enter("server", "test")
    except CircuitOpenError as error:
        assert error.retry_after_s >= 0  # noqa: PT017 - whether there is one is the answer
        return False
    return True


def test_of_many_threads_one_gets_to_probe(fake: Time) -> None:
    """However many threads come at the very moment that the breaker is half-open, one gets through."""
    ours = breaker(fake, failures=1, open_s=5)
    assert enter(ours)
    ours.leave(failed=True)
    for _ in range(20):
        fake.now += 5
        barrier = threading.Barrier(16)

        def come(barrier: threading.Barrier = barrier) -> bool:
            barrier.wait(30)
            return enter(ours)

        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(lambda _: come(), range(16))) == 1
        ours.leave(failed=True)


@pytest.mark.parametrize("end", ["failed", "cancelled", "succeeded"])
def test_a_cancelled_request_says_nothing(fake: Time, end: str) -> None:
    """The breaker passes through closed, open, half-open and back; giving up changes no count."""
    ours = breaker(fake, failures=2, open_s=5)
    for _ in range(10):
        assert enter(ours)
        ours.give_up()
    assert enter(ours)
    ours.leave(failed=True)
    assert enter(ours)
    ours.give_up()
    assert ours.state == "closed"
    assert enter(ours)
    ours.leave(failed=True)
    assert [str(ours.state), enter(ours)] == ["open", False]
    fake.now += 5
    assert [str(ours.state), enter(ours), enter(ours)] == ["half-open", True, False]
    {"failed": lambda: ours.leave(failed=True), "cancelled": ours.give_up}.get(
        end, lambda: ours.leave(failed=False)
    )()

    assert ours.state == {"failed": "open", "cancelled": "half-open", "succeeded": "closed"}[end]
    assert enter(ours) is (end != "failed")


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_a_late_request_does_not_let_a_second_probe_in(fake: Time, end: str) -> None:
    """A request from before the breaker opened, which ends during the probe, is not the probe."""
    ours = breaker(fake, failures=1, open_s=5)
    assert enter(ours)  # slow
    assert enter(ours)
    ours.leave(failed=True)
    fake.now += 5
    assert enter(ours)  # the probe
    if end == "failed":
        ours.leave(failed=True, probe=False)
        fake.now += 5
    else:
        ours.give_up(probe=False)

    assert not enter(ours)


def test_the_default_policies() -> None:
    """By default there are 4 attempts within a minute, and 5 failures open the breaker, for 30 s at most."""
    config = QdrantStoreConfig()

    assert config.retry == RetryPolicy(attempts=4, base_s=0.1, cap_s=5.0, deadline_s=60.0)
    assert config.breaker == BreakerPolicy(failures=5, open_s=30.0, first_open_s=1.0)


def test_a_request_of_any_kind_is_sent_by_the_same_rules(fake: Time, longest: None) -> None:
    """Retry and breaker know no Qdrant: any coroutine that raises BackendError is treated alike."""
    sender = attuned_store.Resilience(QdrantStoreConfig(), fake.sleep, fake.clock)
    where: Any = {"backend": "server", "operation": "test"}
    failures = [BackendUnavailableError("no", retryable=True, **where) for _ in range(3)]

    async def request() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert run(sender.send("test", request)) == "done"
    assert fake.waits == [0.1, 0.2, 0.4]

    async def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(sender.send("test", broken))
    assert sender.breaker.state == "closed"


# ------------------------------------------------------------------------------
# Whether a write that failed may have happened
# ------------------------------------------------------------------------------


def later(old: StateSnapshot | None) -> StateSnapshot:
    return state(at=99)


WRITES: dict[str, Callable[[AsyncStateStore], Awaitable[object]]] = {
    "upsert_latest": lambda store: store.upsert_latest(state(at=1)),
    "expected": lambda store: store.upsert_latest(state(at=1), expected=state()),
    "upsert_many": lambda store: store.upsert_many([state("ann", 1), state("bob", 1)]),
    "update": lambda store: store.update("ann", later),
    "patch": lambda store: store.patch("ann", {"warmth": 0.25}),
    "delete": lambda store: store.delete("ann"),
}
READS: dict[str, Callable[[AsyncStateStore], Awaitable[object]]] = {
    "get_latest": lambda store: store.get_latest("ann"),
    "get_history": lambda store: store.get_history("ann"),
    "count": lambda store: store.count(),
}
UNSURE = {
    "lost": lose_reply(),
    "lost, reset": lose_reply(reset=True),
    "dropped": drop(),
    "truncated": truncate(),
    "no answer": hang(30),
    "drips": drip(0.05),
    "408": reply(408),
    "500": reply(500),
    "503": reply(503, apply=True),
    "504": reply(504),
    "not JSON": not_json(apply=True),
    "other JSON": other_shape(apply=True),
    "204": reply(204, b""),
    "wait_timeout": postpone(),
    "acknowledged": postpone("acknowledged", apply=True),
}
SLOW = [UNSURE["no answer"], UNSURE["drips"]]
SURE = {
    "400": reply(400),
    "401": reply(401),
    "403": reply(403),
    "404": reply(404),
    "409": reply(409),
    "429": rate_limited(None),
    "429, Retry-After": rate_limited(0),
    "307": reply(307, headers={"Location": "/"}),
}


def hurry(store: AsyncStateStore) -> None:
    """Give answers a second from now on: opening may have taken longer."""
    engine = itself(store)._operations.place.connection.engine
    engine._config = attrs.evolve(engine._config, request_timeout=1.0)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("fault", [*UNSURE, *SURE])
async def test_a_write_says_whether_it_may_have_happened(
    fault: str, write: str, connect: Any, server: QdrantServer
) -> None:
    """A failure after the request may have been sent is ambiguous; one that says no, or refuses, is not."""
    await (await connect()).upsert_latest(state())
    store = await connect(retry=ONCE)
    if UNSURE.get(fault) in SLOW:
        hurry(store)
    server.on((UNSURE | SURE)[fault], when=Request.is_write)

    error = await caught(WRITES[write](store))

    assert isinstance(error, BackendError)
    assert error.ambiguous == (fault in UNSURE)


@pytest.mark.parametrize("read", [*READS, *WRITES])
@pytest.mark.parametrize("fault", [*UNSURE, *SURE])
async def test_a_read_never_is_ambiguous(fault: str, read: str, connect: Any, server: QdrantServer) -> None:
    """Nothing has been written by what only asked, nor by a write that failed while it looked before."""
    await (await connect()).upsert_latest(state())
    store = await connect(retry=ONCE)
    if UNSURE.get(fault) in SLOW:
        hurry(store)
    server.on((UNSURE | SURE)[fault], when=lambda request: not request.is_write())

    try:
        await (READS | WRITES)[read](store)
    except BackendError as error:
        looked_after = read in ("expected", "update", "patch") and server.counts[UPSERT] > 1
        assert error.ambiguous == looked_after  # noqa: PT017 - a write that need not look does not fail
    else:
        assert read in ("upsert_latest", "upsert_many")


@pytest.mark.parametrize("then", ["refused", "400", "429", "open"])
async def test_a_lost_reply_is_not_forgotten_by_later_tries(
    then: str, connect: Any, server: QdrantServer
) -> None:
    """Whatever the last try met, the first one may have written."""
    failures = 1 if then == "open" else 10**6
    policy = BreakerPolicy(failures=failures, open_s=0)
    store = await connect(retry=RetryPolicy(attempts=2, base_s=0), breaker=policy)
    server.on(go_down(apply=True) if then == "refused" else lose_reply(), when=Request.is_write, times=1)
    if then == "open":

        async def sleep(seconds: float) -> None:
            resilience(store).breaker._probing = True  # by another thread

        resilience(store)._sleep = sleep
    elif then != "refused":
        server.on(reply(int(then)), when=Request.is_write)

    error = await caught(store.upsert_latest(state()))

    assert isinstance(error, BackendError)
    assert error.ambiguous
    assert isinstance(error, CircuitOpenError) == (then == "open")


async def test_what_was_never_sent_is_not_ambiguous(connect: Any, server: QdrantServer) -> None:
    """A refused connection, and an open breaker, have written nothing."""
    store = await connect(retry=ONCE, breaker=BreakerPolicy(failures=1, open_s=1000))
    server.down()

    for kind in (BackendUnavailableError, CircuitOpenError):
        error = await caught(store.upsert_latest(state()))
        assert isinstance(error, kind)
        assert not cast("BackendError", error).ambiguous


@pytest.mark.parametrize("fault", [reply(400), reply(503), drop()], ids=["400", "503", "dropped"])
async def test_a_conditional_write_that_cannot_look_afterwards_is_ambiguous(
    fault: Action, connect: Any, server: QdrantServer
) -> None:
    """update() has written when the reading that was to tell, or the history, fails: it says so."""
    store = await connect(retry=ONCE)
    for number, (skip, route) in enumerate([(2, RETRIEVE), (1, UPSERT)]):
        await store.upsert_latest(state(at=number))
        with server.on(fault, route=route, skip=skip):
            error = await caught(store.update("ann", lambda old: state(at=old.updated_at_unix_ms - NOW + 10)))
        assert isinstance(error, BackendError)
        assert error.ambiguous
        assert (await store.get_latest("ann")) == state(at=number + 10)
        await store.delete("ann")


# ------------------------------------------------------------------------------
# Outages
# ------------------------------------------------------------------------------

FAST = RetryPolicy(attempts=2, base_s=0)
AT_ONCE = BreakerPolicy(failures=3, open_s=0)


async def test_a_server_may_start_after_the_store(connect: Any, server: QdrantServer) -> None:
    """A store made while its server is down works as soon as it is up."""
    server.down()
    store = await connect(opened=False, real=True, retry=FAST, breaker=AT_ONCE)
    for _ in range(4):
        error = await caught(store.upsert_latest(state()))
        assert isinstance(error, BackendUnavailableError | CircuitOpenError)
    assert (await store.health()).status == "unhealthy"

    server.up()

    await store.upsert_latest(state())
    assert await store.get_latest("ann") == state()
    assert (await store.health()).status == "healthy"


async def test_a_store_recovers_without_being_reopened(connect: Any, server: QdrantServer) -> None:
    """A server that goes away and comes back is found again by the store, with every state in it."""
    store = await connect(real=True, retry=FAST, breaker=AT_ONCE)

    for round_number in range(3):
        await store.upsert_latest(state(at=round_number))
        with server.unreachable():
            for operation in (
                store.get_latest("ann"),
                store.upsert_latest(state(at=99)),
                store.delete("ann"),
            ):
                assert isinstance(await caught(operation), BackendUnavailableError | CircuitOpenError)
        assert await store.get_latest("ann") == state(at=round_number)

    assert [entry for entry in points(server) if entry[1] == "history"] == [
        ("ann", "history", at) for at in range(3)
    ]


async def test_an_open_breaker_is_no_obstacle_for_long(
    connect: Any, server: QdrantServer, fake: Time
) -> None:
    """After an outage that opened the breaker, the first call after open_s finds the server again."""
    store = await connect(breaker=BreakerPolicy(failures=5, open_s=30))
    await store.upsert_latest(state())
    with server.unreachable():
        for _ in range(3):
            await caught(store.get_latest("ann"))
    assert isinstance(await caught(store.get_latest("ann")), CircuitOpenError)

    fake.now += 30

    assert await store.get_latest("ann") == state()


async def test_readiness_follows_an_outage(connect: Any, server: QdrantServer) -> None:
    """Waiting until it is ready asks the server itself: an open breaker does not matter to it."""
    store: Any = await connect(retry=ONCE, breaker=BreakerPolicy(failures=1, open_s=3_600))
    with server.unreachable():
        await caught(store.get_latest("ann"))

    await store.wait_until_ready(10)

    assert isinstance(await caught(store.get_latest("ann")), CircuitOpenError)


# ------------------------------------------------------------------------------
# Thousands of operations at ten percent faults
# ------------------------------------------------------------------------------

DOCUMENTED = (
    BackendUnavailableError,
    BackendTimeoutError,
    RateLimitedError,
    CircuitOpenError,
    ConflictError,
)


class Worker:
    """A client that writes users shared with others, counts with others, and keeps a user of its own.

    It remembers what was acknowledged. Its own user, which nobody else writes, it also deletes.
    """

    def __init__(self, store: AsyncStateStore, number: int, seed: int) -> None:
        self.store = store
        self.name = f"own-{number}"
        self.random = random.Random(f"{seed}/{number}")
        self.step = 0
        self.acknowledged: dict[str, int] = {}  # the newest time, by user
        self.written: dict[str, dict[int, StateSnapshot]] = {}  # everything that may be there
        self.counted = self.unknown = self.operations = 0
        self.errors: list[StoreError] = []

    def new(self, user_id: str) -> StateSnapshot:
        """A state that no other worker writes: the number of the worker is in its time."""
        at = self.random.randrange(1_000) * 64 + int(self.name.partition("-")[2])
        snapshot = state(user_id, at, {"warmth": self.random.random()})
        known = self.written.setdefault(user_id, {})
        return known.setdefault(snapshot.updated_at_unix_ms, snapshot)

    def acknowledge(self, *snapshots: StateSnapshot) -> None:
        for snapshot in snapshots:
            newest = max(self.acknowledged.get(snapshot.user_id, 0), snapshot.updated_at_unix_ms)
            self.acknowledged[snapshot.user_id] = newest

    async def write(self) -> None:
        snapshot = self.new(self.random.choice(["ann", "bob", "cleo", self.name]))
        await self.store.upsert_latest(snapshot)
        self.acknowledge(snapshot)

    async def write_many(self) -> None:
        snapshots = [self.new(self.random.choice(["ann", "bob", self.name])) for _ in range(5)]
        await self.store.upsert_many(snapshots)
        self.acknowledge(*snapshots)

    async def read(self) -> None:
        user_id = self.random.choice(["ann", "bob", "cleo", self.name])
        newest = self.acknowledged.get(user_id, 0)
        found = await self.store.get_latest(user_id)
        assert newest <= (found.updated_at_unix_ms if found else 0)

    async def read_more(self) -> None:
        user_id = self.random.choice(["ann", "bob", self.name])
        times = [entry.updated_at_unix_ms for entry in await self.store.get_history(user_id)]
        assert times == sorted(set(times), reverse=True)
        found = await self.store.search_similar({"warmth": 0.9}, limit=3)
        assert len(found) <= 3

    async def count(self) -> None:
        try:
            await self.store.update("counter", counted_up, attempts=10_000)
        except StoreError:
            self.unknown += 1
            raise
        self.counted += 1

    async def delete(self) -> None:
        before, self.acknowledged[self.name] = self.written.pop(self.name, {}), 0
        try:
            await self.store.delete(self.name)
        except StoreError:
            self.written[self.name] = before  # perhaps it is still there
            raise
        assert await self.store.get_latest(self.name) is None

    async def work(self, times: int) -> None:
        for _ in range(times):
            (act,) = self.random.choices(
                [self.write, self.write_many, self.read, self.read_more, self.count, self.delete],
                [10, 2, 5, 2, 2, 1],
            )
            self.operations += 1
            try:
                await act()
            except StoreError as error:
                self.errors.append(error)


def counted_up(old: StateSnapshot | None) -> StateSnapshot:
    assert old is not None
    return old.patched({}, schema_version=old.schema_version + 1)


async def test_thousands_of_operations_survive_faults(face: str, connect: Any, server: QdrantServer) -> None:
    """With a fault in every tenth request nothing acknowledged is lost; only documented errors are seen."""
    seed = random.randrange(10**6)
    server.random.seed(seed)
    store = await connect(
        real=True,
        retry=RetryPolicy(attempts=3, base_s=0.001, cap_s=0.004),
        breaker=BreakerPolicy(failures=8, open_s=0.01),
        max_history_per_user=20,
    )
    await store.upsert_latest(state("counter"))
    number, times = {"sync": (8, 200), "asyncio": (16, 100), "trio": (16, 40)}[face]
    workers = [Worker(store, index, seed) for index in range(number)]
    faults = server.on(any_fault(), when=lambda r: r.is_write() or r.is_read(), probability=0.1)

    await together(store, [partial(worker.work, times) for worker in workers])

    server.calm()
    blame = f"seed {seed}, {face}"
    errors = [error for worker in workers for error in worker.errors]
    for error in errors:
        assert type(error) in DOCUMENTED, f"{blame}: {error!r}"
        assert not isinstance(error, ConflictError) or error.ambiguous, f"{blame}: {error!r}"
    assert sum(worker.operations for worker in workers) == number * times
    assert faults.hits > number * times / 20 > len(errors), blame

    dump = [point["payload"] for point in server.dump(C)]
    latest = {payload["user_id"]: payload for payload in dump if payload["kind"] == "latest"}
    for user_id in ["ann", "bob", "cleo", *(worker.name for worker in workers)]:
        acknowledged = max(worker.acknowledged.get(user_id, 0) for worker in workers)
        written = {at: s for worker in workers for at, s in worker.written.get(user_id, {}).items()}
        found = await store.get_latest(user_id)
        assert found is not None or not acknowledged, f"{blame}: {user_id} lost"
        if found is not None:
            assert found.updated_at_unix_ms >= acknowledged, f"{blame}: {user_id} went back"
            assert found == written[found.updated_at_unix_ms], f"{blame}: {user_id} was never so"
            assert latest[user_id]["updated_at_unix_ms"] == found.updated_at_unix_ms
            assert (await store.get_history(user_id))[0] == found, f"{blame}: history of {user_id}"

    counted = latest["counter"]["schema_version"] - 1
    least, unknown = (sum(getattr(worker, name) for worker in workers) for name in ("counted", "unknown"))
    assert least <= counted <= least + unknown, blame


async def test_reads_survive_every_mixture_of_faults(face: str, connect: Any, server: QdrantServer) -> None:
    """With enough attempts callers notice nothing at all, whatever half of the requests meets."""
    store = await connect(real=True, retry=RetryPolicy(attempts=40, base_s=0), breaker=NEVER)
    faults = one_of(any_fault(), drop(), lose_reply(reset=True), reply(503, apply=True))

    def in_scope(request: Request) -> bool:
        return request.is_read() or request.is_write()

    server.on(faults, when=in_scope, probability=0.5)

    for at in range(40):
        await store.upsert_latest(state(at=at))
        assert await store.get_latest("ann") == state(at=at)
    assert [entry.updated_at_unix_ms - NOW for entry in await store.get_history("ann")] == [
        *range(39, -1, -1)
    ]
    assert await store.delete("ann") in (True, False)
    assert server.dump(C) == []


async def test_a_half_sent_batch_is_written_in_the_end(connect: Any, server: QdrantServer) -> None:
    """A batch whose reply was lost is sent again whole, and counts as written once."""
    store = await connect(real=True, retry=FAST)
    server.on(lose_reply(), when=Request.is_write, times=1)
    done: list[int] = []

    written = await store.upsert_many(
        [state(f"user-{number}") for number in range(100)], progress=lambda so_far, total: done.append(so_far)
    )

    assert (written, done) == (100, [100])
    assert len(server.dump(C)) == 200


def test_a_synchronous_store_can_be_interrupted_between_attempts(
    server: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a synchronous store waits comes through, and leaves the store usable."""
    with QdrantStore(url=server.url, verify=False, breaker=BreakerPolicy(failures=2, open_s=0)) as store:
        store.count()

        async def interrupt(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(resilience(cast("Any", store)), "_sleep", interrupt)
        with server.on(reply(503)), contextlib.suppress(KeyboardInterrupt):
            store.count()
            pytest.fail("not interrupted")

        assert store.count() == 0

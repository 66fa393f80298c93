"""Retries and the circuit breaker of requests to a server."""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from contextvars import ContextVar
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, cast

from attuned.base.errors import BackendError, CircuitOpenError, RateLimitedError, T
from attuned.base.telemetry import REPORTING, report_request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from attuned.base.config import BreakerPolicy, QdrantStoreConfig, RetryPolicy

MAX_WAIT_S = 10**9  # that a server may ask for; more is as good as for ever


class CircuitBreaker:
    """A circuit breaker, shared by all threads and tasks of a store."""

    def __init__(self, policy: BreakerPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._lock = threading.RLock()
        self._failures = 0
        self._failed_at = -math.inf  # when the last of these was known
        self._pauses = 0  # in a row
        self._opened_at: float | None = None
        self._probing = False

    def _pause_s(self) -> float:
        """How long it lets nothing through: at first for a moment, then longer and longer."""
        first, longest = self._policy.first_open_s, self._policy.open_s
        return min(longest, first * 2.0 ** min(self._pauses - 1, 64))

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """What the next request meets."""
        if self._opened_at is None:
            return "closed"
        return "open" if self._clock() < self._opened_at + self._pause_s() else "half-open"

    def is_open_in(self, seconds: float) -> bool:
        """Whether it lets nothing through now, and will not after so many seconds."""
        opened_at = self._opened_at
        return opened_at is not None and self._clock() + seconds < opened_at + self._pause_s()

    def enter(self, backend: str, operation: str) -> bool:
        """Let a request through, or raise CircuitOpenError; returns whether it is a probe."""
        with self._lock:
            state = self.state
            if state == "open" or (state == "half-open" and self._probing):
                left = max(0.0, cast("float", self._opened_at) + self._pause_s() - self._clock())
                raise CircuitOpenError(
                    f"{backend}: not asked to {operation}: it failed {self._failures} times in a row; "
                    f"try again in {left:.1f} s",
                    retry_after_s=left,
                    backend=backend,
                    operation=operation,
                )
            probe = state == "half-open"
            self._probing = self._probing or probe
            return probe

    def leave(self, *, failed: bool, probe: bool | None = None, began: float = math.inf) -> None:
        """Say how a request that was let through, at some time, ended: by default the probe if there is one.

        While the breaker is open only a probe counts: the others were sent before. So are those that had
        begun when the last failure was known: many requests that fail at one moment are one failure.
        """
        with self._lock:
            if self._opened_at is not None and not (self._probing if probe is None else probe):
                return
            self._probing = False
            if not failed:
                self._failures, self._pauses, self._opened_at = 0, 0, None
                return
            if began < self._failed_at:
                return
            self._failures, self._failed_at = self._failures + 1, self._clock()
            if self._failures >= self._policy.failures:
                self._pauses, self._opened_at = self._pauses + 1, self._clock()

    def give_up(self, *, probe: bool = True) -> None:
        """Say that a request was let through and cancelled: nothing was learnt."""
        with self._lock:
            self._probing = self._probing and not probe


def jittered_pause(policy: RetryPolicy, attempt: int, least: float = 0.0) -> float:
    """Seconds to wait after an attempt that failed, counted from 0, and at least what was asked for."""
    return max(least, random.uniform(0.0, min(policy.cap_s, policy.base_s * 2.0**attempt)))


def parse_retry_after(text: str) -> float | None:
    """The seconds that Retry-After asks to wait, a number of them or a date; None where it is neither."""
    try:
        seconds = float(text)
    except ValueError:
        from email.utils import parsedate_to_datetime

        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError, LookupError, OSError):
            return None
    return max(0.0, min(seconds, MAX_WAIT_S)) if math.isfinite(seconds) else None


class Resilience:
    """Sends requests under a retry policy and a circuit breaker; waiting is handed in, as it differs."""

    def __init__(
        self,
        config: QdrantStoreConfig,
        sleep: Callable[[float], Awaitable[object]],
        clock: Callable[[], float] = time.monotonic,
        *,
        nodes: int = 1,
    ) -> None:
        self.breakers = [CircuitBreaker(config.breaker, clock) for _ in range(nodes)]
        self.breaker = self.breakers[0]
        self._first = 0  # the node that is asked first
        self._node: ContextVar[int] = ContextVar("node", default=0)
        self._reporter = REPORTING.reporter(wanted=config.telemetry)
        self._metrics = None if self._reporter is None else self._reporter.metrics
        if self._metrics is not None:
            with self._metrics.lock:
                self._metrics.breakers.update(self.breakers)
        self._policy = config.retry
        self._sleep = sleep
        self._clock = clock

    @property
    def node(self) -> int:
        """The number of the node that the request of this thread or task goes to."""
        return self._node.get()

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """What the next request meets: the best of all nodes."""
        states = {breaker.state for breaker in self.breakers}
        return "closed" if "closed" in states else "half-open" if "half-open" in states else "open"

    def nodes(self) -> list[int]:
        """The numbers of all nodes, in the order in which they are asked."""
        return [(self._first + step) % len(self.breakers) for step in range(len(self.breakers))]

    def choose(self, node: int) -> None:
        """Let the requests of this thread or task go to a node."""
        self._node.set(node)

    def _enter(self, operation: str) -> tuple[CircuitBreaker, bool]:
        """Choose a node whose breaker lets a request through; whether it is a probe."""
        refusals: list[CircuitOpenError] = []
        for node in self.nodes():
            try:
                probe = self.breakers[node].enter("server", operation)
            except CircuitOpenError as error:
                refusals.append(error)
            else:
                self._node.set(node)
                return self.breakers[node], probe
        raise min(refusals, key=lambda refusal: refusal.retry_after_s)

    def close(self) -> None:
        """Let the breaker count no longer in the state of all breakers."""
        if self._metrics is not None:
            with self._metrics.lock:
                self._metrics.breakers.difference_update(self.breakers)

    async def send(
        self,
        operation: str,
        request: Callable[[], Awaitable[T]],
        within: Callable[[float, Callable[[], Awaitable[T]]], Awaitable[T]] | None = None,
        *,
        writes: bool = False,
    ) -> T:
        """Send a request until it succeeds, or there is no sense in going on.

        ``within`` awaits a try for so many seconds. The error of a write is ambiguous where any of the tries
        may have been carried out.
        """
        begun, unsure = self._clock(), False
        for attempt in itertools.count():
            try:
                breaker, probe = self._enter(operation)
            except CircuitOpenError as error:
                error.ambiguous = unsure
                raise
            tried = self._clock()
            try:
                with report_request(self._reporter, "server", operation, attempt + 1):
                    answer = await (request() if within is None else within(self._left(begun), request))
            except BackendError as error:
                error.ambiguous = unsure = writes and (unsure or error.ambiguous)
                refused = error.status is not None and error.status < HTTPStatus.INTERNAL_SERVER_ERROR
                failed = error.retryable and not refused
                breaker.leave(failed=failed, probe=probe, began=tried)
                wait = self._wait(error, attempt)
                if failed and len(self.breakers) > 1:
                    if self.node == self._first:  # else another request has moved on already
                        self._first = (self._first + 1) % len(self.breakers)
                    wait = wait and (0.0 if attempt + 1 < len(self.breakers) else wait)
                if wait is None or self._clock() + wait > begun + self._policy.deadline_s:
                    raise
                # Where the next attempt would be refused, this failure says more.
                if all(each.is_open_in(wait) for each in self.breakers):
                    raise
            except BaseException:
                breaker.give_up(probe=probe)
                raise
            else:
                breaker.leave(failed=False, probe=probe)
                return answer
            await self._sleep(wait)
        raise AssertionError("unreachable")  # pragma: no cover - count() does not end

    def _left(self, begun: float) -> float:
        """The seconds that a try may take; a deadline of 0 means a single one, which takes its time."""
        deadline = self._policy.deadline_s
        return max(0.001, begun + deadline - self._clock()) if deadline else math.inf

    def _wait(self, error: BackendError, attempt: int) -> float | None:
        """Seconds to wait after a failed attempt, counted from 0; None where it was the last."""
        if not error.retryable or attempt + 1 >= self._policy.attempts:
            return None
        asked = error.retry_after_s if isinstance(error, RateLimitedError) else 0.0
        return jittered_pause(self._policy, attempt, asked)

"""What a call costs where eight threads call at once: the time of all of them, divided by their calls."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import TYPE_CHECKING, Any

import pytest
from contenders import HOT_USERS, Contender

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Race

THREADS = 8


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS) as pool:
        yield pool


def spread(pool: ThreadPoolExecutor, operation: str) -> Callable[[Contender], Any]:
    """Calls of an operation by eight threads; what does not serve threads by itself stands behind a lock."""

    def way(contender: Contender) -> Callable[[list[Any]], object] | None:
        call = getattr(contender, operation)
        if call is None:
            return None
        lock = threading.Lock()

        def each(arguments: list[Any]) -> None:
            for argument in arguments:
                call(argument)

        def each_alone(arguments: list[Any]) -> None:
            for argument in arguments:
                with lock:
                    call(argument)

        calls = each if contender.serves_threads else each_alone
        return lambda arguments: list(pool.map(calls, [arguments[n::THREADS] for n in range(THREADS)]))

    return way


def test_threads_write(race: Race, pool: ThreadPoolExecutor) -> None:
    race.run("write, 8 threads", spread(pool, "put"), race.later_states)


def test_threads_read(race: Race, pool: ThreadPoolExecutor) -> None:
    users = race.lineup.people.sample(HOT_USERS)
    race.run("read, 8 threads", spread(pool, "get"), lambda _: cycle(users), warm=len(users))

"""What a call costs where 64 tasks of an event loop call at once."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import TYPE_CHECKING, Any

import pytest
from conftest import contest, medians
from contenders import HOT_USERS, Contender, Floor, OursInMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from conftest import Race

TASKS = 64


@pytest.fixture(scope="module")
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as worker:
        yield worker


def awaitable(contender: Contender, operation: str, worker: ThreadPoolExecutor) -> Any:
    """An operation as an application would await it.

    What has no asynchronous form is called in a worker thread where it waits for a disk, else in place.
    """
    plain: Any = getattr(contender, operation)
    own: Any = getattr(contender, f"async_{operation}")
    if own is not None or plain is None:
        return own

    async def in_worker(argument: Any) -> object:
        return await asyncio.get_running_loop().run_in_executor(worker, plain, argument)

    async def in_place(argument: Any) -> object:
        return plain(argument)

    return in_worker if contender.blocks else in_place


def together(worker: ThreadPoolExecutor, operation: str) -> Callable[[Contender], Any]:
    """Calls of an operation by 64 tasks."""

    def way(contender: Contender) -> Callable[[list[Any]], object] | None:
        call = awaitable(contender, operation, worker)

        async def each(arguments: list[Any]) -> None:
            for argument in arguments:
                await call(argument)

        async def all_tasks(arguments: list[Any]) -> None:
            async with asyncio.TaskGroup() as tasks:
                for number in range(TASKS):
                    tasks.create_task(each(arguments[number::TASKS]))

        return None if call is None else lambda arguments: contender.run(all_tasks(arguments))

    return way


def test_tasks_write(race: Race, worker: ThreadPoolExecutor) -> None:
    race.run("write, 64 tasks", together(worker, "put"), race.later_states)


def test_tasks_read(race: Race, worker: ThreadPoolExecutor) -> None:
    users = race.lineup.people.sample(HOT_USERS)
    race.run("read, 64 tasks", together(worker, "get"), lambda _: cycle(users), warm=len(users))


@pytest.mark.families("memory")
def test_async_read(race: Race) -> None:
    """Both awaited inside one coroutine, which never suspends and so needs no event loop."""
    if not race.lineup.decides:
        pytest.skip("asked once")
    users = race.lineup.people.sample(HOT_USERS)

    def through(name: str) -> Callable[[], object]:
        get: Any = race.lineup.contenders[name].async_get

        async def each() -> None:
            for user_id in users:
                await get(user_id)

        return lambda: run_through(each())

    ways = {name: through(name) for name in (OursInMemory.name, Floor.name)}
    outcome = contest(race.benchmark, ways, calls=len(users), rounds=101)
    ratio = outcome.ratio(*ways)
    race.table.add("async memory get_latest", ratio, "x floor in async def", most=1.0, note=medians(outcome))


def run_through(flow: Coroutine[Any, Any, object]) -> None:
    with pytest.raises(StopIteration):
        flow.send(None)

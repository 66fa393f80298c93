"""Soak: many threads and tasks on one store for a while, which grows nothing but what it is given to keep."""

from __future__ import annotations

import gc
import logging
import os
import random
import re
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from conformance import BACKENDS, Backend, needs, state
from test_engines import join_workers, shown

from attuned_store import AsyncMemoryStore, AsyncStateStore, MemoryStore, StateStore

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 20.0 if os.environ.get("ATTUNED_TEST_LONG") else 0.5  # and twice as long once more
MORE = (("memory", "trio"), ("edge", "asyncio"), ("local", "trio")) if SECONDS > 1 else ()
THREADS, TASKS, USERS = 8, 64, 4
OPTIONS: dict[str, Any] = {"max_history_per_user": 5}
LONG = 60.0

pytestmark = [pytest.mark.faults, pytest.mark.once, pytest.mark.timeout(1_200)]


def users_of(worker: int) -> list[str]:
    return [f"worker-{worker}-user-{number}" for number in range(USERS)]


class Worker:
    """Uses a store on users of its own, and does the same to a store in memory."""

    def __init__(self, number: int, seed: int) -> None:
        self.twin = MemoryStore(**OPTIONS)
        self.steps = 0
        self._users = users_of(number)
        self._random = random.Random(f"{seed} {number}")

    def next_step(self) -> tuple[str, Any]:
        """A method of the store, and what it is called with."""
        self.steps += 1
        user_id = self._random.choice(self._users)
        entry = state(user_id, self._random.randrange(20), {"warmth": self._random.random()})
        match self._random.randrange(8):
            case 0:
                return "delete", user_id
            case 1:
                return "upsert_many", [entry, state(user_id, 21)]
            case 2:
                return "get_history", user_id
            case 3:
                return "get_many", self._users
            case _:
                return "upsert_latest", entry

    def check(self, method: str, argument: Any, answer: Any) -> None:
        assert answer == getattr(self.twin, method)(argument)


class Process:
    """What this process holds: bytes of Python, resident bytes, threads, and open files."""

    def __init__(self) -> None:
        join_workers()
        gc.collect()
        self.bytes, _ = tracemalloc.get_traced_memory()
        self.resident = resident_bytes()
        # Trio keeps threads that have nothing to do for the next ten seconds.
        self.threads = sum(not thread.name.startswith("Trio") for thread in threading.enumerate())
        self.files = len(list(FILES.iterdir())) if FILES.is_dir() else 0


FILES = Path("/dev/fd")
STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """The memory of this process, without that of the files that engines map."""
    text = STATUS.read_text(encoding="ascii") if STATUS.exists() else ""
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def use_in_thread(store: StateStore, worker: Worker, deadline: float) -> None:
    while time.monotonic() < deadline:
        method, argument = worker.next_step()
        worker.check(method, argument, getattr(store, method)(argument))


async def use_in_task(store: AsyncStateStore, worker: Worker, deadline: float) -> None:
    while time.monotonic() < deadline:
        method, argument = worker.next_step()
        worker.check(method, argument, await getattr(store, method)(argument))
        await anyio.lowlevel.checkpoint()


async def use(
    open_async: Callable[[], AsyncStateStore], store: StateStore, workers: list[Worker], seconds: float
) -> None:
    """Let threads use one form of a store and tasks the other."""
    deadline = time.monotonic() + seconds
    other = open_async()
    with ThreadPoolExecutor(THREADS) as pool:
        threads = [pool.submit(use_in_thread, store, worker, deadline) for worker in workers[:THREADS]]
        async with anyio.create_task_group() as tasks:
            for worker in workers[THREADS:]:
                tasks.start_soon(use_in_task, other, worker, deadline)
        for thread in threads:
            await anyio.to_thread.run_sync(partial(thread.result, LONG))
    await other.aclose()


@pytest.mark.parametrize(
    ("backend", "loop"),
    [
        pytest.param(*each, marks=needs(BACKENDS[each[0]].library, "trio" if each[1] == "trio" else None))
        for each in (("memory", "asyncio"), ("edge", "trio"), ("local", "asyncio"), *MORE)
    ],
)
def test_nothing_grows_but_the_data(
    tmp_path: Path, backend: str, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    """8 threads and 64 tasks on one store leave exactly what they wrote, and no memory, threads or files."""
    caplog.set_level(logging.CRITICAL, "attuned_store")  # pytest would keep what is logged
    path, kind = tmp_path / "store", BACKENDS[backend]
    workers = [Worker(number, seed=5) for number in range(THREADS + TASKS)]
    store = kind.sync(path, **OPTIONS)
    tracemalloc.start()
    try:
        run = partial(anyio.run, use, form_of(store, kind, path), store, workers, backend=loop)
        run(SECONDS)
        before, steps = Process(), sum(worker.steps for worker in workers)
        run(2 * SECONDS)
        after = Process()
    finally:
        tracemalloc.stop()

    assert after.threads <= before.threads
    assert after.files <= before.files + 2  # of the engine, which opens segments when it needs them
    assert after.bytes - before.bytes < 4_000_000, f"after {steps} steps and as many again"
    assert after.resident - before.resident < 64_000_000
    expected = {user_id: entry for worker in workers for user_id, entry in shown(worker.twin).items()}
    assert shown(store) == dict(sorted(expected.items()))
    store.close()
    if backend != "memory":
        with kind.sync(path, **OPTIONS) as again:
            assert shown(again) == dict(sorted(expected.items()))


def form_of(store: StateStore, kind: Backend, path: Path) -> Callable[[], AsyncStateStore]:
    """What makes the asynchronous form of a store; that of one in memory is around the same memory."""
    if not isinstance(store, MemoryStore):
        return partial(kind.asynchronous, path, **OPTIONS)
    other = AsyncMemoryStore(**OPTIONS)
    other._backend, other._operations = store._backend, store._operations
    other.aclose = other.health  # type: ignore[method-assign, assignment] - it goes on being used
    return lambda: other

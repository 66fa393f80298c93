"""What a process does to a store until it is killed: run as a script, and read by the test that kills it.

As a script it is asked, by one line of JSON each, to fork children that write; the asker kills them. No child
inherits a store, as none is open here.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import os
import random
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from attuned_store import (
    AsyncQdrantStore,
    AsyncStateStore,
    EdgeEngine,
    LocalEngine,
    QdrantStore,
    StateSnapshot,
    StateStore,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = 1_768_000_000_000
STEP = 64  # snapshots that a batch writes at one moment


class Task(NamedTuple):
    """What a child is to do: which workers write how, to which directory."""

    path: str
    engine: Literal["edge", "local"]
    form: str
    durability: Literal["process", "power"]
    maximum: int
    workers: int
    seed: str
    rebuild_every: int | None = None  # changes, far fewer than usual

    @property
    def options(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "engine": self.engine,
            "durability": self.durability,
            "max_history_per_user": self.maximum,
        }


class Operation(NamedTuple):
    """One operation of a worker on users that are its own."""

    kind: str
    user_id: str
    snapshots: list[StateSnapshot]


def users_of(worker: int) -> list[str]:
    return [f"worker-{worker}-user-{number}" for number in range(5)]


def operations(seed: str, worker: int) -> Iterator[Operation]:
    """What a worker does, one after the other and without an end, the same for the same seed."""
    source, users = random.Random(f"{seed} {worker}"), users_of(worker)
    numbers = itertools.count(1)

    def snapshot(user_id: str) -> StateSnapshot:
        axes = {"warmth": next(numbers) % 1_000 / 1_000, "formality": source.random()}
        return StateSnapshot(user_id, axes, NOW + source.randrange(30))

    kinds = {"write": 8, "batch": 2, "large batch": 1, "update": 3, "delete": 2, "prune": 1}
    sizes = {"batch": 8, "large batch": 150}
    while True:
        (kind,) = source.choices(list(kinds), list(kinds.values()))
        user_id = source.choice(users)
        chosen = [source.choice(users) for _ in range(sizes[kind])] if kind in sizes else [user_id]
        yield Operation(kind, user_id, [snapshot(each) for each in chosen])


def bump(found: StateSnapshot | None, user_id: str) -> StateSnapshot:
    if found is None:
        return StateSnapshot(user_id, {"warmth": 0.0}, NOW)
    return found.patched(
        {"warmth": (found.axis("warmth") + 0.01) % 1}, updated_at_unix_ms=found.updated_at_unix_ms + 1
    )


def start(store: StateStore | AsyncStateStore, operation: Operation) -> Any:
    """Do an operation, or begin it where the store is asynchronous."""
    match operation.kind:
        case "write":
            return store.upsert_latest(operation.snapshots[0])
        case "update":
            return store.update(operation.user_id, lambda found: bump(found, operation.user_id))
        case "delete":
            return store.delete(operation.user_id)
        case "prune":
            return store.prune()
        case _:
            return store.upsert_many(operation.snapshots)


def acknowledge(worker: int) -> None:
    os.write(1, f"done {worker}\n".encode())


def work(store: StateStore, task: Task, worker: int) -> None:
    for operation in operations(task.seed, worker):
        start(store, operation)
        acknowledge(worker)


async def work_async(store: AsyncStateStore, task: Task, worker: int) -> None:
    for operation in operations(task.seed, worker):
        await start(store, operation)
        acknowledge(worker)


async def run_async(task: Task) -> None:
    async with AsyncQdrantStore(**task.options) as store:
        await asyncio.gather(*(work_async(store, task, worker) for worker in range(task.workers)))


def run(task: Task) -> None:
    """Write until the process is killed."""
    if task.rebuild_every is not None:
        EdgeEngine._REBUILD_EVERY = LocalEngine._REBUILD_EVERY = task.rebuild_every
    if task.form == "async":
        asyncio.run(run_async(task))
    store = QdrantStore(**task.options)
    for worker in range(1, task.workers):
        threading.Thread(target=work, args=(store, task, worker), daemon=True).start()
    work(store, task, 0)


def serve() -> None:
    """Fork a child for every task that is read, and say how it ended."""
    warnings.simplefilter("ignore", DeprecationWarning)
    for library in sys.argv[1:]:  # once, not in every child
        importlib.import_module(library)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            run(Task(*json.loads(line)))
            os._exit(1)  # it was to be killed
        os.write(1, f"child {child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(1, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    serve()

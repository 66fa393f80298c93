"""Kill -9 at any moment: what was acknowledged is there, and nothing is half done."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crashing
import pytest
from conformance import BACKENDS, environment, needs, state
from crashing import STEP, Operation, Task
from test_engines import Shown, close_and_check, shown

from attuned_store import MemoryStore, QdrantStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the children that are killed are forked"),
    pytest.mark.timeout(3_600),
]

LIBRARIES = {"edge": "qdrant_edge", "local": "qdrant_client.local.qdrant_local"}
BOUNDS = (
    12,
    6,
    3,
    2,
)  # of a history, in one directory after the other: a smaller one leaves work for prune()
KILLS = 1_000 if os.environ.get("ATTUNED_TEST_LONG") else 32
FORMS = [
    pytest.param(engine, form, id=f"{engine}-{form}", marks=needs(BACKENDS[engine].library))
    for engine in ("edge", "local")
    for form in ("sync", "async")
]


class Killer:
    """A process whose children write until they are killed."""

    def __init__(self, engine: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, crashing.__file__, LIBRARIES[engine]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment(),
        )

    def run(self, task: Task, acknowledgements: int, delay: float) -> dict[int, int]:
        """Kill a child some time after so many acknowledgements; returns how many there were by worker."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        done, child, total = dict.fromkeys(range(task.workers), 0), 0, 0
        killed = False
        for word, number in self._answers():
            match word:
                case "child":
                    child = number
                case "done":
                    done[number] += 1
                    total += 1
                case _:
                    assert number == -signal.SIGKILL, f"{task}: ended with {number}"
                    return done
            if total >= acknowledgements and child and not killed:
                time.sleep(delay)  # a moment by chance, within the next operation
                os.kill(child, signal.SIGKILL)
                killed = True
        raise AssertionError(f"{task}: the process that forks has ended")

    def _answers(self) -> Iterator[tuple[str, int]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, number = line.split()
            yield word, int(number)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def copy_of(content: Shown, maximum: int) -> MemoryStore:
    """A store in memory with this content."""
    store = MemoryStore(max_history_per_user=maximum)
    for _, history in content.values():
        store.upsert_many(history)
    return store


def part_of(content: Mapping[str, Any], worker: int) -> dict[str, Any]:
    return {user_id: content[user_id] for user_id in crashing.users_of(worker) if user_id in content}


def possible(before: Shown, task: Task, worker: int, done: int) -> list[dict[str, Any]]:
    """What may be there of a worker's users: what was acknowledged, with or without the next operation."""
    store, following = copy_of(part_of(before, worker), task.maximum), crashing.operations(task.seed, worker)
    for _ in range(done):
        crashing.start(store, next(following))
    found = [shown(store)]
    for part in parts_of(next(following)):
        crashing.start(store, part)
        found.append(shown(store))
    return found


def parts_of(operation: Operation) -> list[Operation]:
    """What an operation does at one moment each."""
    if "batch" not in operation.kind:
        return [operation]
    snapshots = operation.snapshots
    return [
        operation._replace(snapshots=snapshots[begin : begin + STEP])
        for begin in range(0, len(snapshots), STEP)
    ]


@pytest.mark.once
@pytest.mark.parametrize(
    "rebuild_every", [None, 20], ids=["any moment", "rebuilding"]
)  # most of the time then goes into that
@pytest.mark.parametrize(("engine", "form"), FORMS)
def test_killed_processes_lose_nothing(
    tmp_path: Path, engine: Any, form: str, rebuild_every: int | None
) -> None:
    """After kill -9 at any moment what was acknowledged is there, and what was going on is done or not."""
    killer = Killer(engine)
    try:
        for number in range(KILLS // len(FORMS)):
            directory, turn = divmod(number, len(BOUNDS))
            source = random.Random(f"{engine} {form} {number}")
            task = Task(
                str(tmp_path / f"store-{directory}"),
                engine,
                form,
                source.choice(["process", "process", "power"]),
                BOUNDS[turn],
                source.randint(1, 3),
                f"{engine} {form} {number}",
                rebuild_every,
            )
            check_one_kill(killer, task, source)
            if turn == len(BOUNDS) - 1:
                shutil.rmtree(task.path)  # a shard of Edge is large where files have no holes
    finally:
        killer.close()


def check_one_kill(killer: Killer, task: Task, source: random.Random) -> None:
    options: Any = {"engine": task.engine, "max_history_per_user": task.maximum}
    before, path = Shown(), Path(task.path)
    if path.exists():
        with QdrantStore(path=task.path, **options) as store:
            before = shown(store)
    acknowledgements = source.choice([0, source.randint(1, 10), source.randint(10, 200)])
    done = killer.run(task, acknowledgements, source.random() * 0.01)

    store = QdrantStore(path=task.path, **options)
    after = shown(store)
    for worker, count in done.items():
        assert part_of(after, worker) in possible(before, task, worker, count), (task, worker, count)
    idle = {user_id for user_id in before | after if int(user_id.split("-")[1]) not in done}
    assert all(before[user_id] == after[user_id] for user_id in idle)
    close_and_check(store, path, task.engine, max_history_per_user=task.maximum)


# What a process leaves that is killed while it makes a directory, at moments too short to be met by chance.
LEFT_OVER = {
    "edge, a manifest half written": ("edge", "collections/attuned_state.json.tmp", "{"),
    "edge, a collection half made": ("edge", "collections/.attuned_state.new/wal/open-1", ""),
    "local, no list of collections yet": ("local", "meta.json", ""),
    "local, a list of collections half written": ("local", "meta.json.tmp", "{"),
    "local, a collection that is in no list": ("local", "collection/attuned_state/storage.sqlite", ""),
}


@pytest.mark.parametrize(
    ("engine", "file", "text"),
    [
        pytest.param(*each, id=name, marks=needs(BACKENDS[each[0]].library))
        for name, each in LEFT_OVER.items()
    ],
)
def test_a_directory_that_was_half_made_is_made_anew(
    tmp_path: Path, engine: Any, file: str, text: str
) -> None:
    """A directory in whose making a process was killed opens, and is empty."""
    left = tmp_path / "store" / file
    left.parent.mkdir(parents=True)
    left.write_text(text, encoding="utf-8")

    store = QdrantStore(path=tmp_path / "store", engine=engine)
    assert shown(store) == {}
    store.upsert_latest(state())
    assert close_and_check(store, tmp_path / "store", engine).keys() == {"ann"}

"""Calls at a bad moment end: from a signal handler, from a finalizer, and in the child of a fork."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from conformance import needs, state

from attuned_store import MemoryStore, QdrantStore, StateStore, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.once

LONG = 60.0
KINDS = [
    "memory",
    pytest.param("edge", marks=needs("qdrant_edge")),
    pytest.param("local", marks=needs("qdrant_client")),
]


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StateStore]:
    """A store of each kind in this process, with one state."""
    kind = request.param
    with MemoryStore() if kind == "memory" else QdrantStore(path=tmp_path / "store", engine=kind) as store:
        store.upsert_latest(state("ann", 1))
        yield store


def within(store: StateStore, call: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Let a call come in the middle of the next write of the same thread, as a signal handler would."""
    backend: Any = store._operations.backend
    owner, name = (backend, "_put") if isinstance(store, MemoryStore) else (backend, "_drafts")
    original, left = getattr(owner, name), [True]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if left:
            left.clear()
            call()
        return original(*arguments, **options)

    patch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("operation", ["upsert_latest", "delete", "upsert_many", "count history", "close"])
def test_a_call_in_the_middle_of_another_one_is_refused(
    store: StateStore, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that would wait for its own thread raises at once and changes nothing; the outer one goes on."""
    calls: dict[str, Callable[[], object]] = {
        "upsert_latest": lambda: store.upsert_latest(state("bob", 1)),
        "delete": lambda: store.delete("ann"),
        "upsert_many": lambda: store.upsert_many([state("bob", 1)]),
        "count history": store.prune,
        "close": store.close,
    }
    refused = list[StoreError]()

    def call() -> None:
        try:
            calls[operation]()
        except StoreError as error:
            refused.append(error)

    within(store, call, monkeypatch)
    store.upsert_latest(state("ann", 2))

    assert len(refused) == 1
    assert "in the middle of another call of this thread" in str(refused[0])
    assert store.get_latest("ann") == state("ann", 2)
    assert store.get_latest("bob") is None
    store.upsert_latest(state("bob", 3))
    assert store.count() == 2


SIGNALLED = """
import signal, sys, threading, time
import attuned_store
from attuned_store import StateSnapshot, StoreError, open_store

store, ended, outcomes = open_store(sys.argv[1]), threading.Event(), {"done": 0, "refused": 0}

def handler(number, frame):
    try:
        store.upsert_latest(StateSnapshot("handler", {"warmth": 0.5}))
        outcomes["done"] += 1
    except StoreError:
        outcomes["refused"] += 1

def shoot():
    while not ended.is_set():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        time.sleep(0.0005)

signal.signal(signal.SIGUSR1, handler)
shooter = threading.Thread(target=shoot, daemon=True)
shooter.start()
deadline = time.monotonic() + 20
number = 0
while sum(outcomes.values()) < 200 and time.monotonic() < deadline:
    number += 1
    store.upsert_latest(StateSnapshot("main", {"warmth": 0.25}, 1_768_000_000_000 + number))
ended.set()
shooter.join()
assert store["main"].updated_at_unix_ms == 1_768_000_000_000 + number
store.close()
print(sum(outcomes.values()) >= 200)
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals are sent to a thread of POSIX")
@pytest.mark.parametrize("kind", ["memory", pytest.param("edge", marks=needs("qdrant_edge"))])
def test_a_signal_handler_may_write(kind: str, tmp_path: Path) -> None:
    """A handler that writes at any moment of another write ends: it has written, or is told why not."""
    target = "memory://" if kind == "memory" else str(tmp_path / "store")
    answer = subprocess.run(
        [sys.executable, "-c", SIGNALLED, target], capture_output=True, text=True, timeout=LONG, check=False
    )
    assert answer.stdout.split() == ["True"], answer.stderr


def test_a_finalizer_that_the_collector_runs_ends(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A __del__ that writes, run by the collector in the middle of another write, does not hang."""
    refused = list[BaseException]()

    class Writer:
        def __del__(self) -> None:
            try:
                store.upsert_latest(state("bob", 1))
            except StoreError as error:
                refused.append(error)

    def collect() -> None:
        writer: Any = Writer()
        writer.itself = writer
        del writer
        gc.collect()

    within(store, collect, monkeypatch)
    store.upsert_latest(state("ann", 2))

    assert len(refused) == 1
    assert store["ann"] == state("ann", 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
def test_a_memory_store_works_in_a_forked_child() -> None:
    """A child forked while another thread is in the middle of a write has a store of its own that works."""
    store = MemoryStore()
    store.upsert_latest(state("ann", 1))
    backend: Any = store._operations.backend
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with backend._lock:
            held.set()
            assert go.wait(LONG)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(LONG)
    child = os.fork()
    if child == 0:
        signal.alarm(int(LONG))  # a child that hangs is ended
        store.upsert_latest(state("ann", 2))
        os._exit(0 if store.get_latest("ann") == state("ann", 2) else 1)
    go.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store["ann"] == state("ann", 1)

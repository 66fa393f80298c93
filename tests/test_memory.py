"""The store in memory."""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conformance import NOW, AsyncStoreTests, MappingTests, StoreTests, cosine, random_states, run, state

import attuned_store
from attuned_store import (
    AsyncMemoryStore,
    AsyncStateStore,
    MemoryStore,
    MemoryStoreConfig,
    StateStore,
    StoreError,
    ValidationError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from conformance import Clock


class TestMemory(StoreTests):
    backends = ("memory",)


class TestAsyncMemory(AsyncStoreTests):
    backends = ("memory",)


class TestMemoryMapping(MappingTests):
    backends = ("memory",)


def test_stores_in_memory_share_nothing() -> None:
    """Each store in memory has its own content."""
    one, two = MemoryStore(), MemoryStore()

    one.upsert_latest(state())

    assert two.count() == 0


def test_a_store_in_memory_takes_a_configuration() -> None:
    """A store is made from a configuration, or from its fields as keywords."""
    config = MemoryStoreConfig(max_history_per_user=2)

    assert MemoryStore(config).config == MemoryStore(max_history_per_user=2).config == config
    assert AsyncMemoryStore(config).config == config


def test_the_default_configuration() -> None:
    """By default history is on, holds 100 entries and knows no age, and the axes are the canonical ones."""
    config = MemoryStoreConfig()

    assert (config.enable_history, config.max_history_per_user, config.history_retention_days) == (
        True,
        100,
        None,
    )
    assert (config.axes, config.vector_size) == (None, None)


def test_a_configuration_is_read_from_the_environment() -> None:
    """ATTUNED_STORE_ and the name of a field, in capitals, set that field."""
    config = MemoryStoreConfig.from_env(
        {
            "ATTUNED_STORE_AXES": "energetic_arousal,tense_arousal",
            "ATTUNED_STORE_VECTOR_SIZE": "8",
            "ATTUNED_STORE_ENABLE_HISTORY": "No",
            "ATTUNED_STORE_MAX_HISTORY_PER_USER": "7",
            "ATTUNED_STORE_HISTORY_RETENTION_DAYS": "30",
            "UNRELATED": "value",
        }
    )

    assert config == MemoryStoreConfig(
        axes=("energetic_arousal", "tense_arousal"),
        vector_size=8,
        enable_history=False,
        max_history_per_user=7,
        history_retention_days=30,
    )
    assert MemoryStoreConfig.from_env({}) == MemoryStoreConfig()


@pytest.mark.parametrize("word", ["true", "1", "yes", "y", "on", "TRUE", "On"])
def test_many_words_mean_true(word: str) -> None:
    """A switch is on with true, 1, yes, y or on, in any case."""
    assert MemoryStoreConfig.from_env({"ATTUNED_STORE_ENABLE_HISTORY": word}).enable_history is True


@pytest.mark.parametrize("word", ["false", "0", "no", "n", "off", "FALSE", "Off"])
def test_many_words_mean_false(word: str) -> None:
    """A switch is off with false, 0, no, n or off, in any case."""
    assert MemoryStoreConfig.from_env({"ATTUNED_STORE_ENABLE_HISTORY": word}).enable_history is False


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ATTUNED_STORE_ENABLE_HISTORY", "perhaps"),
        ("ATTUNED_STORE_MAX_HISTORY_PER_USER", "many"),
        ("ATTUNED_STORE_MAX_HISTORY_PER_USER", "-1"),
        ("ATTUNED_STORE_HISTORY_RETENTION_DAYS", "a week"),
        ("ATTUNED_STORE_VECTOR_SIZE", "1.5"),
        ("ATTUNED_STORE_AXES", "Warm th"),
    ],
)
def test_a_malformed_variable_is_named(variable: str, value: str) -> None:
    """A variable that cannot be read is ValidationError with its name."""
    with pytest.raises(ValidationError, match=variable):
        MemoryStoreConfig.from_env({variable: value})


def test_memory_is_opened_by_its_url() -> None:
    """open_store("memory://") and its async twin make stores in memory."""
    store = attuned_store.open_store("memory://", max_history_per_user=3)
    asynchronous = attuned_store.open_async_store("memory://", max_history_per_user=3)

    assert isinstance(store, MemoryStore)
    assert isinstance(store, StateStore)
    assert isinstance(asynchronous, AsyncMemoryStore)
    assert isinstance(asynchronous, AsyncStateStore)
    assert store.config.max_history_per_user == asynchronous.config.max_history_per_user == 3


def test_the_environment_names_the_store_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a target, open_store opens what ATTUNED_STORE names."""
    monkeypatch.setenv("ATTUNED_STORE", "memory://")

    assert isinstance(attuned_store.open_store(), MemoryStore)
    assert isinstance(attuned_store.open_async_store(), AsyncMemoryStore)


@pytest.mark.parametrize("target", ["redis://localhost", "postgresql://localhost/db", "ftp://example.org"])
def test_an_unknown_scheme_is_an_error_that_lists_the_known_ones(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target with an unknown scheme is refused with the schemes there are, and nothing is created."""
    monkeypatch.chdir(tmp_path)

    for opening in (attuned_store.open_store, attuned_store.open_async_store):
        with pytest.raises(StoreError) as caught:
            opening(target)
        for scheme in ("memory", "file", "http"):
            assert scheme in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "target",
    [
        "localhost:6333",
        "127.0.0.1:6333/",
        "qdrant.example:6333",
        ":memory:",
        "memory:",
        "memory:/",
        "file:/x",
    ],
)
def test_an_address_without_its_scheme_is_no_directory(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was meant for a server or for memory does not silently become a directory of that name."""
    monkeypatch.chdir(tmp_path)
    for opening in (attuned_store.open_store, attuned_store.open_async_store):
        with pytest.raises(ValidationError, match=r"^target: .*http://<host>:6333"):
            opening(target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("./localhost:6333", "./localhost:6333"),
        (Path("localhost:6333"), "localhost:6333"),
        ("C:/mood", "C:/mood"),
        ("mood: today", "mood: today"),
        ("localhost", "localhost"),
    ],
)
def test_other_names_with_a_colon_are_directories(target: Any, path: str) -> None:
    """A colon alone makes no address: a path, a drive and words are directories."""
    assert attuned_store.target_options(target) == (False, {"path": path, "url": None})


@pytest.mark.parametrize("kind", ["MemoryStore", "AsyncMemoryStore", "QdrantStore", "AsyncQdrantStore"])
def test_a_place_where_the_configuration_should_be(kind: str, tmp_path: Path) -> None:
    """QdrantStore("./mood") says how to name a directory, instead of an error of another library."""
    with pytest.raises(ValidationError, match=r"^config: a \w+StoreConfig is needed, got str; .*path="):
        getattr(attuned_store, kind)(str(tmp_path / "mood"))
    assert list(tmp_path.iterdir()) == []


def test_single_operations_of_an_async_store_in_memory_never_suspend() -> None:
    """A single operation of AsyncMemoryStore is done at once: it needs no event loop at all."""
    store = AsyncMemoryStore()
    beneath = MemoryStore()  # what it keeps, past its coroutines
    beneath._backend, beneath._operations = store._backend, store._operations

    run(store.upsert_latest(state()))
    assert beneath.get_latest("ann") == run(store.get_latest("ann")) == state()
    patched = run(store.patch("ann", {"warmth": 0.1}))
    assert beneath.get_history("ann") == run(store.get_history("ann")) == [patched, state()]
    assert run(store.get_many(["ann", "bob"])) == {"ann": patched}
    assert run(store.health()).users == 1
    assert run(store.delete("ann"))
    assert list(beneath.users()) == []
    run(store.aclose())
    assert beneath.is_closed


def test_ten_thousand_users_are_searched_alike_before_and_after_a_write() -> None:
    """A search over many users, repeated and after single writes, agrees with the plain cosine."""
    states = random_states(10_000, seed=11)
    store = MemoryStore()
    store.upsert_many(states)
    current = {s.user_id: s for s in states}

    for number in (0, 4_999, 9_999):
        query = states[number]
        best = sorted((cosine(query.axes, s.axes) for s in current.values()), reverse=True)[:5]
        found = store.search_similar(query, limit=5)
        assert [match.score for match in found] == pytest.approx(best, abs=1e-5)
        assert found[0].snapshot == query

        user_id = f"user-{number}"
        current[user_id] = store.patch(user_id, {"warmth": 0.0, "formality": 1.0})
        store.delete("user-77")
        current.pop("user-77", None)
        assert "user-77" not in {
            match.snapshot.user_id for match in store.search_similar(states[77], limit=10_000)
        }


async def turns_during(call: Coroutine[Any, Any, object]) -> int:
    """How often another task of the event loop gets its turn while a call runs."""
    turns, ended = 0, False

    async def count() -> None:
        nonlocal turns
        while not ended:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)
    turns = 0
    await call
    found, ended = turns, True
    await counting
    return found


async def long_calls(path: Path) -> dict[str, int]:
    store = AsyncMemoryStore()
    turns = {"write": await turns_during(store.upsert_many(random_states(3_000, seed=3)))}
    turns["search"] = await turns_during(store.search_similar({"warmth": 0.5}, limit=3_000))
    report = await store.create_snapshot(path)
    assert report.path is not None
    restoring = MemoryStore()
    restoring.restore_snapshot(report.path)
    staged = await store._operations.backend.stage("")
    staged.timelines = restoring._backend.timelines
    turns["switch"] = await turns_during(store._operations.backend.adopt(staged))
    assert await store.count() == 3_000
    turns["close"] = await turns_during(store.aclose())
    return turns


def test_other_tasks_run_while_much_is_searched_replaced_or_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long calls of an asynchronous store are made of pieces, letting go of what a store held included."""
    monkeypatch.setattr(attuned_store.Suspending, "TURN_S", -1.0)

    turns = asyncio.run(long_calls(tmp_path))

    assert min(turns.values()) >= 10, turns


# ------------------------------------------------------------------------------
# Threads
# ------------------------------------------------------------------------------


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns as often as they can; without the global lock they all run at once anyhow."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def check_reads_during(write: Callable[[], object], *reads: Callable[[], object]) -> None:
    """Let each read be done by a thread of its own, again and again, until the write is done."""
    written = threading.Event()

    def keep_reading(read: Callable[[], object]) -> None:
        read()
        while not written.is_set():
            read()

    with ThreadPoolExecutor(len(reads)) as pool:
        reading = [pool.submit(keep_reading, read) for read in reads]
        try:
            write()
        finally:
            written.set()
        for answer in reading:
            answer.result()


BOUNDS: dict[str, dict[str, Any]] = {
    "no history": {"enable_history": False},
    "one entry": {"max_history_per_user": 1},
    "full": {"max_history_per_user": 3},
    "long": {"max_history_per_user": 100},
    "aged": {"history_retention_days": 1},
}


@pytest.mark.parametrize("bounds", BOUNDS)
def test_readers_see_a_user_at_one_moment_while_others_write(bounds: str, often: None, clock: Clock) -> None:
    """Without waiting for writers, a reader sees a latest snapshot always, newer ones only, and no gaps."""
    store = MemoryStore(**BOUNDS[bounds])
    store.upsert_latest(state("ann", 0))
    seen = [NOW]  # by the one that reads the latest

    def write() -> None:
        for at in range(1, 5_000):
            clock.now = NOW + at * 10_000_000  # some three hours: what is aged is trimmed in most writes
            store.upsert_latest(state("ann", at * 10_000_000))

    def read_latest() -> None:
        latest = store.get_latest("ann")
        assert latest is not None
        assert latest.updated_at_unix_ms >= seen[0]
        seen[0] = latest.updated_at_unix_ms

    def read_history() -> None:
        before = store["ann"].updated_at_unix_ms
        times = [entry.updated_at_unix_ms for entry in store.get_history("ann")]
        assert len(times) <= store.config.max_history_per_user * store.config.enable_history
        assert times == [times[0] - number * 10_000_000 for number in range(len(times))]
        assert not times or times[0] >= before

    check_reads_during(write, read_latest, read_history)


def test_searches_with_many_sets_of_axes_do_not_disturb_each_other(
    often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a store has noted of a set of axes may be dropped by another thread at any moment."""
    monkeypatch.setattr(attuned_store.SHAPES, "maximum", 1)
    store = MemoryStore()
    store.upsert_many(random_states(10, seed=3))

    def search(axis: str) -> None:
        for _ in range(3_000):
            assert len(store.search_similar({axis: 1.0}, limit=10, score_threshold=-1.0)) == 10

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(search, store.axes[:4]))

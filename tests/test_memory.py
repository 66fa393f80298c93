"""The store in memory."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from conformance import AsyncStoreTests, MappingTests, StoreTests, cosine, random_states, run, state

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
    assert attuned_store._target_options(target) == (False, {"path": path, "url": None})


@pytest.mark.parametrize("kind", ["MemoryStore", "AsyncMemoryStore", "QdrantStore", "AsyncQdrantStore"])
def test_a_place_where_the_configuration_should_be(kind: str, tmp_path: Path) -> None:
    """QdrantStore("./mood") says how to name a directory, instead of an error of another library."""
    with pytest.raises(ValidationError, match=r"^config: a \w+StoreConfig is needed, got str; .*path="):
        getattr(attuned_store, kind)(str(tmp_path / "mood"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", [datetime(2026, 1, 17), datetime(2026, 1, 17, tzinfo=UTC)])  # noqa: DTZ001
def test_a_datetime_is_told_how_to_become_milliseconds(moment: datetime) -> None:
    """A datetime is no time in milliseconds; the error says how to make them of it."""
    with pytest.raises(ValidationError, match=r"^updated_at_unix_ms: .* int\(moment.timestamp\(\) \* 1000\)"):
        attuned_store.StateSnapshot("ann", {}, cast("Any", moment))
    with pytest.raises(ValidationError, match=r"^since: .* int\(moment.timestamp\(\) \* 1000\)"):
        MemoryStore().get_history("ann", since=cast("Any", moment))


def test_single_operations_of_an_async_store_in_memory_never_suspend() -> None:
    """A single operation of AsyncMemoryStore is done at once: it needs no event loop at all."""
    store = AsyncMemoryStore()
    beneath = store._store  # what it keeps, past its coroutines

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

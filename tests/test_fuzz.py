"""Garbage: whatever is handed in, only documented errors come out, and an error has changed nothing."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from conformance import BACKENDS, NOW, needs, state
from hypothesis import HealthCheck, given, note, settings

import attuned_store
from attuned_store import (
    Axes,
    BreakerPolicy,
    MemoryStore,
    MemoryStoreConfig,
    QdrantStoreConfig,
    RetryPolicy,
    StateSnapshot,
    StateStore,
    UserNotFoundError,
    ValidationError,
)

LONG = bool(os.environ.get("ATTUNED_TEST_LONG"))
FUZZ = settings(
    max_examples=5_000 if LONG else 150,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

pytestmark = [pytest.mark.once, pytest.mark.timeout(3_600)]

# ------------------------------------------------------------------------------
# Garbage
# ------------------------------------------------------------------------------

ODD_TEXT = st.sampled_from(
    [
        "",
        "ann",
        "a" * 257,
        "ann\0",
        "\ud800",
        "é" * 200,
        "NaN",
        "1e400",
        "-1",
        "__class__",
        "{0}",
        "%s",
        "warmth",
    ]
) | st.text(st.characters(), max_size=20)
ODD_NUMBERS = (
    st.sampled_from(
        [0, 1, -1, 2**63, 10**400, True, False, 0.5, -0.0, math.nan, math.inf, 1 + 2j, Fraction(1, 3)]
    )
    | st.integers()
    | st.floats()
)
ODD_THINGS = st.sampled_from(
    [None, object(), object, len, b"ann", bytearray(b"ann"), range(3), Path("ann"), NotImplemented, ...]
)
LEAVES = ODD_TEXT | ODD_NUMBERS | ODD_THINGS
GARBAGE = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(ODD_TEXT | st.integers(), inner, max_size=3)
        | st.sets(st.integers(), max_size=2)
        | st.lists(inner, max_size=2).map(iter)
    ),
    max_leaves=5,
)
GOOD_AXES = st.dictionaries(st.sampled_from(["warmth", "formality"]), st.floats(0, 1))
SNAPSHOTS = st.builds(
    StateSnapshot, st.sampled_from(["ann", "bob", "new"]), GOOD_AXES, st.integers(0, 2 * NOW)
)


def often(good: Any) -> st.SearchStrategy[Any]:
    """Something right half of the time, so that what comes after it is reached, too."""
    return st.one_of(good if isinstance(good, st.SearchStrategy) else st.just(good), GARBAGE)


USER_IDS = often(st.sampled_from(["ann", "bob", "unknown"]))
AXES = often(GOOD_AXES)
TIMES = often(st.sampled_from([None, 0, NOW]))
LIMITS = often(st.integers(0, 5))


def some(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of these keyword arguments."""
    return st.fixed_dictionaries({}, optional=values)


FIELDS = some(
    updated_at_unix_ms=TIMES,
    source=often("inferred"),
    confidence=often(0.5),
    schema_version=often(2),
)


def outcome(call: Callable[[], Any], *errors: type[Exception]) -> str:
    """How a call ends: with an answer, or one of these errors; any other fails the test."""
    try:
        call()
    except errors as error:
        message = str(error)
    else:
        return "answer"
    note(message[:200])
    assert 0 < len(message) < 5_000
    return "error"


# ------------------------------------------------------------------------------
# Values and configurations
# ------------------------------------------------------------------------------


@FUZZ
@given(user_id=USER_IDS, axes=AXES, fields=FIELDS)
def test_a_snapshot_of_garbage_is_refused(user_id: Any, axes: Any, fields: dict[str, Any]) -> None:
    """A snapshot is made of what is valid, and of everything else ValidationError."""
    outcome(lambda: StateSnapshot(user_id, axes, **fields), ValidationError)
    outcome(lambda: StateSnapshot.from_dict({"user_id": user_id, "axes": axes, **fields}), ValidationError)
    outcome(lambda: StateSnapshot.from_dict(axes), ValidationError)
    outcome(lambda: state().patched(axes, **fields), ValidationError)
    outcome(lambda: Axes(axes), ValidationError)


@FUZZ
@given(
    options=some(
        axes=often(["warmth"]),
        vector_size=often(24),
        enable_history=often(True),
        max_history_per_user=often(5),
        history_retention_days=often(5),
    )
)
def test_a_memory_configuration_of_garbage_is_refused(options: dict[str, Any]) -> None:
    """The options of a store in memory are right, or ValidationError."""
    outcome(lambda: MemoryStore(**options), ValidationError)


@FUZZ
@given(
    options=some(
        path=often("somewhere"),
        url=often("http://localhost:6333"),
        engine=often("local"),
        durability=often("power"),
        collection_name=often("states"),
        lock_timeout=often(1.0),
        cache_size=often(10),
        api_key=often("key"),
        connect_timeout=often(1.0),
        request_timeout=often(1.0),
        pool_size=often(5),
        verify=often(False),
        cache_ttl=often(1.0),
        retry=often(RetryPolicy()),
        breaker=often(BreakerPolicy()),
    )
)
def test_a_configuration_of_garbage_is_refused(options: dict[str, Any]) -> None:
    """The configuration of a store on Qdrant is right, or ValidationError; nothing is opened for it."""
    outcome(lambda: QdrantStoreConfig(**options), ValidationError)


@FUZZ
@given(first=GARBAGE, second=GARBAGE)
def test_policies_of_garbage_are_refused(first: Any, second: Any) -> None:
    """What is no number of attempts or seconds is ValidationError."""
    for name in ("attempts", "base_s", "cap_s", "deadline_s"):
        outcome(lambda name=name: RetryPolicy(**{name: first}), ValidationError)
    for name in attrs_of(BreakerPolicy):
        outcome(lambda name=name: BreakerPolicy(**{name: second}), ValidationError)


def attrs_of(kind: Any) -> list[str]:
    return [attribute.name for attribute in kind.__attrs_attrs__]


VARIABLES = ["ATTUNED_STORE_" + name.upper() for name in attrs_of(QdrantStoreConfig)]


@FUZZ
@given(variables=st.dictionaries(st.sampled_from(VARIABLES), ODD_TEXT))
def test_an_environment_of_garbage_is_refused(variables: dict[str, str]) -> None:
    """Variables that cannot be read are ValidationError."""
    outcome(lambda: MemoryStoreConfig.from_env(variables), ValidationError)
    outcome(lambda: QdrantStoreConfig.from_env(variables), ValidationError)


@FUZZ
@given(
    target=GARBAGE.filter(lambda target: not isinstance(target, str | os.PathLike))
    | st.builds("{}://{}".format, ODD_TEXT, ODD_TEXT).filter(lambda target: not target.startswith("file:"))
)
def test_a_target_of_garbage_is_refused(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no path and no address is ValidationError, and no directory is made."""
    if target is None:
        target = "ftp://host"
    outcome(lambda: attuned_store.open_store(target), ValidationError)
    outcome(lambda: attuned_store.open_async_store(target), ValidationError)


# ------------------------------------------------------------------------------
# Stores
# ------------------------------------------------------------------------------

FILTERS = some(
    limit=LIMITS,
    score_threshold=often(0.1),
    user_id=USER_IDS,
    exclude_user_id=USER_IDS,
    source=often("inferred"),
    min_confidence=often(0.5),
    since=TIMES,
    until=TIMES,
    history=often(st.booleans()),
)
Call = Callable[[StateStore], Any]
ARGUMENTS: dict[str, st.SearchStrategy[Call]] = {
    "upsert_latest": st.builds(
        lambda snapshot, options: lambda store: store.upsert_latest(snapshot, **options),
        often(SNAPSHOTS),
        some(expected=often(SNAPSHOTS)),
    ),
    "upsert_many": st.builds(
        lambda snapshots: lambda store: store.upsert_many(snapshots),
        often(st.lists(often(SNAPSHOTS), max_size=4)),
    ),
    "patch": st.builds(
        lambda user_id, axes, fields: lambda store: store.patch(user_id, axes, **fields),
        USER_IDS,
        AXES,
        FIELDS,
    ),
    "update": st.builds(
        lambda user_id, answer, attempts: (
            lambda store: store.update(user_id, lambda _: answer, attempts=attempts)
        ),
        USER_IDS,
        often(SNAPSHOTS),
        often(3),
    ),
    "get_latest": st.builds(lambda user_id: lambda store: store.get_latest(user_id), USER_IDS),
    "get_many": st.builds(
        lambda user_ids: lambda store: store.get_many(user_ids), often(st.lists(USER_IDS, max_size=4))
    ),
    "get_history": st.builds(
        lambda user_id, limit, bounds: lambda store: store.get_history(user_id, limit, **bounds),
        USER_IDS,
        LIMITS,
        some(since=TIMES, until=TIMES),
    ),
    "search_similar": st.builds(
        lambda query, filters: lambda store: store.search_similar(query, **filters),
        often(GOOD_AXES) | SNAPSHOTS | USER_IDS,
        FILTERS,
    ),
    "delete": st.builds(lambda user_id: lambda store: store.delete(user_id), USER_IDS),
    "contains": st.builds(lambda user_id: lambda store: user_id in store, USER_IDS),
    "getitem": st.builds(lambda user_id: lambda store: store[user_id], USER_IDS),
}
READS = {"get_latest", "get_many", "get_history", "search_similar", "contains", "getitem"}
BEGINNING = [*(state("ann", at) for at in (1, 2, 3)), state("bob", 1, source="inferred", confidence=0.4)]


def content(store: StateStore) -> Any:
    return {user_id: (store.get_latest(user_id), store.get_history(user_id)) for user_id in store}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, StateStore]]:
    """One store of each kind that there is, opened once."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(BACKENDS[name].sync(tmp_path_factory.mktemp("fuzz") / name))
            for name in ("memory", "edge", "local", "server")
            if not needs(BACKENDS[name].library).args[0]
        }


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=needs(BACKENDS[name].library))
        for name in ("memory", "edge", "local", "server")
    ],
)
@pytest.mark.parametrize("operation", ARGUMENTS)
def test_garbage_changes_nothing(stores: dict[str, StateStore], backend: str, operation: str) -> None:
    """An operation with garbage raises a documented error and has changed nothing, or it was valid."""
    store = stores[backend]
    begin(store)
    before = content(store)

    @settings(FUZZ, max_examples=1_000 if LONG else 60)
    @given(call=ARGUMENTS[operation])
    def check(call: Call) -> None:
        ended = outcome(lambda: call(store), ValidationError, UserNotFoundError, attuned_store.ConflictError)
        if ended == "answer" and operation not in READS:
            begin(store)
        else:
            assert content(store) == before

    check()


def begin(store: StateStore) -> None:
    """Make the store what it is in the beginning."""
    for user_id in list(store):
        store.delete(user_id)
    store.upsert_many(BEGINNING)


# ------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------

WORDS = [
    "put",
    "patch",
    "get",
    "history",
    "users",
    "search",
    "delete",
    "count",
    "prune",
    "health",
    "import",
    "export",
    "--store",
    "--json",
    "--limit",
    "--since",
    "--until",
    "--yes",
    "--format",
    "--dry-run",
    "--strict",
    "--history",
    "--user",
    "--axis",
    "--source",
    "--confidence",
    "--help",
    "--version",
    "-",
    "--",
    "ann",
    "bob",
    "warmth=0.5",
    "warmth=nan",
    "warmth=",
    "=",
    "0",
    "-1",
    "nan",
    "2026-01-01",
    "1768000000000",
    "memory://",
    "ftp://x",
]
ARGUMENT_LISTS = st.lists(st.sampled_from(WORDS) | ODD_TEXT.filter(lambda text: "/" not in text), max_size=7)
FILES = st.binary(max_size=200) | st.builds(
    lambda heading, rows: (heading + "\n" + "\n".join(rows)).encode("utf-8", "surrogatepass"),
    st.sampled_from(
        ["user_id,warmth", "user_id;warmth;updated_at_unix_ms", '{"user_id": "ann"}', "", "warmth"]
    ),
    st.lists(ODD_TEXT | st.sampled_from(["ann,0.5", "ann;1;5", '{"user_id": "ann", "axes": {"warmth": 1}}'])),
)


def run_command(arguments: list[str], stdin: bytes) -> tuple[int, str]:
    """The status and the complaints of the command."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    real = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(stdin), "utf-8"), out, err
    try:
        status = attuned_store.main(arguments)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.stdin, sys.stdout, sys.stderr = real
    err.flush()
    return status, err.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=needs(BACKENDS[name].library)) for name in ("edge", "local")]
)
def test_the_command_survives_garbage(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the command is called with, it ends with a status and without a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTUNED_STORE", str(tmp_path / "store"))
    path = tmp_path / "store"
    with BACKENDS[engine].sync(path) as store:
        store.upsert_many(BEGINNING)
        before = content(store)

    @settings(FUZZ, max_examples=2_000 if LONG else 40)
    @given(arguments=ARGUMENT_LISTS, stdin=FILES)
    def check(arguments: list[str], stdin: bytes) -> None:
        status, complaints = run_command(arguments, stdin)
        note(complaints[:500])
        assert status in range(4)
        assert "Traceback" not in complaints
        with BACKENDS[engine].sync(path) as store:
            if status == 0:
                begin(store)
            else:
                assert content(store) == before

    check()

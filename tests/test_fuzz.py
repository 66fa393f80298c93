"""Garbage: whatever is handed in, only documented errors come out, and an error has changed nothing."""

from __future__ import annotations

import contextlib
import enum
import inspect
import io
import math
import os
import sys
import typing
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import hypothesis.strategies as st
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from command import main
from conformance import BACKENDS, COMMANDS, LIKE_SECONDS, NOW, fill_memory, needs, state, synchronous
from hypothesis import HealthCheck, given, note, settings

import attuned_store
from attuned_store import (
    AsyncMemoryStore,
    AsyncQdrantStore,
    AsyncStateStore,
    Axes,
    BackendError,
    BreakerPolicy,
    ConflictError,
    MemoryStore,
    MemoryStoreConfig,
    QdrantStore,
    QdrantStoreConfig,
    RetryPolicy,
    SnapshotError,
    StateSnapshot,
    StateStore,
    StoreError,
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


class Lying(str):
    """A text that says of itself what is not so, as enumerations and lazy translations do."""

    __slots__ = ()

    def __str__(self) -> str:
        return "no text\n"

    def __repr__(self) -> str:
        return "nothing"

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


class Word(enum.StrEnum):
    """Names as an application has them."""

    ANN = "ann"
    WARMTH = "warmth"


class Whole(int):
    """A number that looks like another one."""

    def __repr__(self) -> str:
        return "many"

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 2


class Real(float):
    """A number that shows something else."""

    def __repr__(self) -> str:
        return "nothing"


class Several(list[Any]):
    """A list that has another length than it says."""

    def __len__(self) -> int:
        return 10**6


SUBCLASSES = st.sampled_from(
    [
        Word.ANN,
        Word.WARMTH,
        Lying("ann"),
        Lying("warmth"),
        Lying("good.attuned"),
        Lying("memory://"),
        Whole(1),
        Whole(NOW),
        Whole(10**400),
        Real(0.5),
        Real(math.nan),
        Several(["warmth"]),
        Several(),
        MappingProxyType({"warmth": 0.5}),
        UserDict({"warmth": 0.5, "user_id": "ann"}),
    ]
)
HUGE = st.sampled_from([2**64, -(2**63) - 1, 10**19, 10**20 + 1]) | st.sampled_from([1, -1]).map(
    lambda sign: sign * 10**5_000  # more digits than Python writes, also in the names of strategies
)
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
LEAVES = ODD_TEXT | ODD_NUMBERS | ODD_THINGS | SUBCLASSES | HUGE
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
    StateSnapshot,
    st.sampled_from(["ann", "bob", "new"]),
    GOOD_AXES,
    st.integers(0, 2 * NOW).filter(lambda time_ms: time_ms not in LIKE_SECONDS),
)


NOT_CALLABLE = GARBAGE.filter(lambda thing: not callable(thing))  # what a function raises is its own affair
PROGRESS = st.sampled_from([None, lambda done, total: None]) | NOT_CALLABLE


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


# Files are named relative to the directory of the test (see `place`). Nothing is written outside it.
def is_inside(thing: object) -> bool:
    return not isinstance(thing, str) or not ("/" in thing or thing.startswith(("~", "..")))


FILES_OF_SNAPSHOTS = often(
    st.sampled_from(["good.attuned", "damaged.attuned", "store.snap", "absent.attuned"])
)
DIRECTORIES = often(st.sampled_from([None, "backups", Path("others"), "good.attuned"])).filter(is_inside)
SAVED = [*(state("ann", at) for at in (2, 9)), state("saved", 1)]  # what the good snapshot holds


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of its own for the test, with snapshots that are good and not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QDRANT_SNAPSHOT_ON_START", "1")
    monkeypatch.setenv("QDRANT_SNAPSHOT_DIR", "backups")
    with MemoryStore() as store:
        store.upsert_many(SAVED)
        good = cast("Path", store.create_snapshot("backups").path).rename("good.attuned")
    Path("damaged.attuned").write_bytes(good.read_bytes()[:-9])
    Path("store.snap").write_bytes(b"no tar")


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    """An event loop in another thread, for what is asynchronous."""
    with start_blocking_portal() as portal:
        yield portal


def outcome(portal: BlockingPortal, call: Callable[[], Any], errors: tuple[type[Exception], ...]) -> str:
    """How a call ends: with an answer, or one of these errors; any other fails the test."""

    async def finish(answer: Any) -> None:
        await answer

    try:
        answer = call()
        if inspect.isawaitable(answer):
            portal.call(finish, answer)
    except errors as error:
        message = str(error)
    else:
        return "answer"
    note(message[:200])
    assert 0 < len(message) < 5_000
    return "error"


def public_methods(kind: type, among: Mapping[str, Any]) -> set[str]:
    """The names of the public methods in a namespace of a class that take an argument."""
    special = ("__contains__", "__getitem__")
    functions = {
        name: inspect.unwrap(getattr(kind, name))
        for name in among
        if (name in special or not name.startswith("_")) and callable(getattr(kind, name))
    }
    return {
        name
        for name, function in functions.items()
        if inspect.signature(function).parameters.keys() - {"self"}
    }


# ------------------------------------------------------------------------------
# Values, configurations and files
# ------------------------------------------------------------------------------

MEMORY_OPTIONS = {
    "axes": often(["warmth"]),
    "vector_size": often(24),
    "enable_history": often(True),
    "max_history_per_user": often(5),
    "history_retention_days": often(5),
}
QDRANT_OPTIONS = {
    **MEMORY_OPTIONS,
    "path": often("somewhere"),
    "url": often("http://localhost:6333"),
    "engine": often("local"),
    "durability": often("power"),
    "collection_name": often("states"),
    "lock_timeout": often(1.0),
    "cache_size": often(10),
    "slow_operation_ms": often(10.0),
    "min_free_bytes": often(0),
    "api_key": often("key"),
    "connect_timeout": often(1.0),
    "request_timeout": often(1.0),
    "snapshot_timeout": often(1.0),
    "pool_size": often(5),
    "verify": often(False),
    "cache_ttl": often(1.0),
    "shard_number": often(1),
    "replication_factor": often(1),
    "write_consistency_factor": often(1),
    "read_consistency": often("quorum"),
    "write_ordering": often("strong"),
    "exact_search": often(False),
    "retry": often(RetryPolicy()),
    "breaker": often(BreakerPolicy()),
}
BAD_URL = "http://localhost:0"
NO_URL = {name: values for name, values in QDRANT_OPTIONS.items() if name != "url"}


def attrs_of(kind: Any) -> list[str]:
    return [attribute.name for attribute in kind.__attrs_attrs__]


VARIABLES = ["ATTUNED_STORE_" + name.upper() for name in attrs_of(QdrantStoreConfig)]
ENVIRONMENTS = often(st.dictionaries(st.sampled_from(VARIABLES), ODD_TEXT | GARBAGE))
NO_PLACES = GARBAGE.filter(
    lambda target: target is not None and not isinstance(target, str | os.PathLike)
) | st.sampled_from(["ftp://host", "", "ann\0", "a" * 300, "\ud800", "good.attuned", b"ann"])
TARGETS = NO_PLACES | st.builds("{}://{}".format, ODD_TEXT, ODD_TEXT).filter(
    lambda target: not target.lower().startswith("file:")
)


def calls(function: Callable[..., Any], *arguments: Any, **options: Any) -> st.SearchStrategy[Any]:
    """Calls of a function with these arguments and some of these options."""
    return st.builds(
        lambda given, fields: lambda: function(*given, **fields), st.tuples(*arguments), some(**options)
    )


def fields_of(user_id: Any, axes: Any, fields: dict[str, Any]) -> dict[str, Any]:
    return {"user_id": user_id, "axes": axes, **fields}


EMBEDDER = {
    "name": often("words"),
    "dimensions": often(2),
    "embed_query": often(None),
    "batch_size": often(50),
    "max_characters": often(10),
    "windows": often("mean"),
    "retry": often(RetryPolicy()),
}
WORDS = attuned_store.HashingEmbedder(4)
TEXTS = often(st.lists(ODD_TEXT | GARBAGE, max_size=5))


TRADES = attuned_store.MemoryStore().collection(
    "trades", WORDS, indexes={"symbol": "keyword", "size": "float", "note": "text", "closed": "datetime"}
)
MINE = TRADES.for_user("ann")
FIELD_NAMES = st.sampled_from(["symbol", "size", "note", "closed", "else"])
ODD_FIELDS = st.dictionaries(FIELD_NAMES, GARBAGE, max_size=4)
DOCUMENTS = st.builds(lambda text: attuned_store.Document("d", text), st.sampled_from(["a word", "b"]))
OPERATOR_NAMES = st.sampled_from(["gt", "gte", "lt", "lte", "ne", "text", "?"])
OPERATORS = st.dictionaries(OPERATOR_NAMES, GARBAGE, max_size=3)
WHERE = often(
    st.dictionaries(
        st.sampled_from(["symbol", "size", "note", "closed", "updated_at", "or", "user_id"]),
        GARBAGE | OPERATORS | st.lists(GARBAGE | ODD_FIELDS, max_size=3),
        max_size=3,
    )
)
VECTORS = ODD_TEXT | GARBAGE | st.lists(st.floats(), min_size=4, max_size=4)
SEARCH = {"limit": often(3), "score_threshold": often(0.1)}
LISTING = {"limit": often(3), "newest_first": often(st.booleans())}

VARIABLES_OF_TARGETS = st.dictionaries(
    st.sampled_from(["ATTUNED_STORE", "QDRANT_URL", "ATTUNED_STORE_PATH"]),
    ODD_TEXT.filter(lambda text: "\0" not in text and "\ud800" not in text),
)


def fields_kept(fields: dict[str, Any]) -> Any:
    """A document with these fields, if it may have them."""
    try:
        return attuned_store.Document("d", "a word", fields)
    except ValidationError:
        return None


def default_target_of(variables: dict[str, str]) -> None:
    """What is opened without a target is a text that is not blank, whatever the variables hold."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        assert attuned_store.default_target().strip()


FUNCTIONS: dict[str, st.SearchStrategy[Callable[[], Any]]] = {
    "StateSnapshot": st.builds(
        lambda *given: lambda: StateSnapshot(**fields_of(*given)), USER_IDS, AXES, FIELDS
    ),
    "StateSnapshot.from_dict": calls(
        StateSnapshot.from_dict, often(st.builds(fields_of, USER_IDS, AXES, FIELDS))
    ),
    "StateSnapshot.patched": st.builds(
        lambda axes, fields: lambda: state().patched(axes, **fields), AXES, FIELDS
    ),
    "StateSnapshot.axis": calls(state().axis, GARBAGE),
    "Axes": calls(Axes, AXES),
    "RetryPolicy": calls(RetryPolicy, **{name: often(1.0) for name in attrs_of(RetryPolicy)}),
    "BreakerPolicy": calls(BreakerPolicy, **{name: often(1.0) for name in attrs_of(BreakerPolicy)}),
    "MemoryStoreConfig": calls(MemoryStoreConfig, **MEMORY_OPTIONS),
    "MemoryStoreConfig.from_env": calls(MemoryStoreConfig.from_env, ENVIRONMENTS),
    "QdrantStoreConfig": calls(QdrantStoreConfig, **QDRANT_OPTIONS),
    "QdrantStoreConfig.from_env": calls(QdrantStoreConfig.from_env, ENVIRONMENTS),
    "MemoryStore": calls(MemoryStore, often(MemoryStoreConfig()), **MEMORY_OPTIONS),
    "AsyncMemoryStore": calls(AsyncMemoryStore, often(MemoryStoreConfig()), **MEMORY_OPTIONS),
    # With a url that no store is made with, whatever else is right.
    "QdrantStore": calls(partial(QdrantStore, url=BAD_URL), often(QdrantStoreConfig()), **NO_URL),
    "AsyncQdrantStore": calls(partial(AsyncQdrantStore, url=BAD_URL), often(QdrantStoreConfig()), **NO_URL),
    "Embedder": calls(partial(attuned_store.Embedder, name="words", dimensions=2), often(len), **EMBEDDER),
    "Embedder.embed_texts": calls(WORDS.embed_texts, st.just(attuned_store.BLOCKING), TEXTS),
    "Embedder.embed_query_text": calls(
        WORDS.embed_query_text, st.just(attuned_store.BLOCKING), ODD_TEXT | GARBAGE
    ),
    "HashingEmbedder": calls(attuned_store.HashingEmbedder, often(4)),
    "HashingEmbedder.embed_texts": calls(WORDS.embed_texts, st.just(attuned_store.BLOCKING), TEXTS),
    "HashingEmbedder.embed_query_text": calls(
        WORDS.embed_query_text, st.just(attuned_store.BLOCKING), ODD_TEXT | GARBAGE
    ),
    "Document": st.builds(
        lambda name, text, fields, time, ttl: lambda: attuned_store.Document(name, text, fields, time, ttl),
        USER_IDS,
        ODD_TEXT | GARBAGE,
        often(ODD_FIELDS),
        TIMES,
        often(1.0),
    ),
    "Collection.for_user": calls(TRADES.for_user, USER_IDS),
    "Collection.refresh": calls(TRADES.refresh, progress=PROGRESS),
    "DocumentSet.documents": calls(TRADES.all_users().documents, WHERE, **LISTING),
    "DocumentSet.count": calls(TRADES.all_users().count, WHERE),
    "DocumentSet.search": calls(TRADES.all_users().search, VECTORS, WHERE, **SEARCH),
    "DocumentSet.delete_many": calls(TRADES.all_users().delete_many, WHERE),
    "UserDocuments.documents": calls(MINE.documents, WHERE, **LISTING),
    "UserDocuments.count": calls(MINE.count, WHERE),
    "UserDocuments.search": calls(MINE.search, VECTORS, WHERE, shared=often(st.booleans()), **SEARCH),
    "UserDocuments.delete_many": calls(MINE.delete_many, WHERE),
    "UserDocuments.delete": calls(MINE.delete, USER_IDS),
    "UserDocuments.get": calls(MINE.get, USER_IDS),
    "UserDocuments.get_many": calls(MINE.get_many, often(st.lists(USER_IDS, max_size=4))),
    "UserDocuments.upsert": st.builds(
        lambda document: lambda: MINE.upsert(document),
        DOCUMENTS | GARBAGE | st.builds(fields_kept, ODD_FIELDS),
    ),
    "UserDocuments.upsert_many": calls(
        MINE.upsert_many, often(st.lists(often(DOCUMENTS), max_size=4)), progress=PROGRESS
    ),
    "open_store": calls(attuned_store.open_store, TARGETS, **MEMORY_OPTIONS),
    "open_async_store": calls(attuned_store.open_async_store, TARGETS, **MEMORY_OPTIONS),
    "store_exists": calls(attuned_store.store_exists, TARGETS),
    "default_target": st.builds(lambda values: partial(default_target_of, values), VARIABLES_OF_TARGETS),
    "verify_snapshot": calls(attuned_store.verify_snapshot, FILES_OF_SNAPSHOTS, progress=PROGRESS),
    "averify_snapshot": calls(attuned_store.averify_snapshot, FILES_OF_SNAPSHOTS, progress=PROGRESS),
    "list_snapshots": calls(attuned_store.list_snapshots, DIRECTORIES),
    "alist_snapshots": calls(attuned_store.alist_snapshots, DIRECTORIES),
    "axis_name": calls(attuned_store.axis_name, GARBAGE),
    "read_table": calls(
        attuned_store.read_table,
        often(
            st.builds(io.BytesIO, st.sampled_from([b"user_id,warmth\na,1\n", b"[{}]", b"x"]) | st.binary())
        ),
        format=often(st.sampled_from(["csv", "json", "jsonl"])),
        user_column=often("user_id"),
        time_column=often("warmth"),
        time_format=often("s"),
        axes=often(["warmth"]),
        ignore=often(["warmth"]),
        ignore_text=often(True),
        scale=often((0, 31)),
        scales=often({"warmth": (0, 31)}),
        absent=often(["", "NA"]),
        encoding=often("utf-8"),
        raw=often(True),
    ),
}
# Beyond ValidationError; opening raises what the store does, such as for a path that no directory can have.
ERRORS: dict[str, tuple[type[Exception], ...]] = {
    "open_store": (StoreError,),
    "store_exists": (StoreError,),
    "verify_snapshot": (SnapshotError,),
    "averify_snapshot": (SnapshotError,),
    "list_snapshots": (SnapshotError,),
    "alist_snapshots": (SnapshotError,),
    "read_table": (OSError,),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_garbage_is_refused(portal: BlockingPortal, name: str) -> None:
    """Whatever is called with garbage raises a documented error and leaves no file, or it was right."""
    before = files()

    @FUZZ
    @given(call=FUNCTIONS[name])
    def check(call: Callable[[], Any]) -> None:
        outcome(portal, call, (ValidationError, *ERRORS.get(name, ())))
        assert files() == before

    check()


def files() -> set[Path]:
    return set(Path().rglob("*"))


GIVEN_OUT = {  # made by a store, not by who calls it; the asynchronous handles are checked alike
    "AsyncCollection",
    "AsyncDocumentSet",
    "AsyncUserDocuments",
    "BadRow",
    "CollectionInfo",
    "DocumentMatch",
    "ErasureReport",
    "Health",
    "History",
    "Match",
    "Matches",
    "SnapshotReport",
    "StateTable",
    "TableReport",
    "UpsertReport",
}
HANDLES = {"Collection", "DocumentSet", "UserDocuments"}  # too, but their methods are called


def callable_names() -> Iterator[str]:
    """The functions, classes and methods of classes that a caller calls, the methods of stores left out."""
    for name in attuned_store.__all__:
        thing = getattr(attuned_store, name)
        if inspect.isfunction(thing):
            yield name
        elif inspect.isclass(thing) and not (
            name in {*GIVEN_OUT, "StateStore", "AsyncStateStore"}
            or inspect.isabstract(thing)
            or issubclass(thing, Exception | enum.Enum)
            or typing.is_typeddict(thing)
        ):
            if name not in HANDLES:
                yield name
            if not issubclass(thing, StateStore | AsyncStateStore):
                yield from (f"{name}.{method}" for method in public_methods(thing, methods_of(thing)))


def methods_of(kind: type) -> dict[str, Any]:
    """What this library's classes have, without what Python's own ones gave them."""
    return {
        name: member
        for each in kind.__mro__
        if each.__module__ == attuned_store.__name__
        for name, member in vars(each).items()
        if not name.startswith("__")
    }


def test_no_public_function_is_missing() -> None:
    """Each public function and class is called with garbage, and each method that takes something."""
    on_a_store = {"a" * asynchronous + name for name in STORE_FUNCTIONS for asynchronous in (0, 1)}
    assert {*callable_names()} - FUNCTIONS.keys() - on_a_store == set()
    for kind in (StateStore, MemoryStore, QdrantStore, AsyncStateStore, AsyncMemoryStore, AsyncQdrantStore):
        assert public_methods(kind, dict.fromkeys(dir(kind))) - ARGUMENTS.keys() == set()


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
Call = Callable[[Any], Any]
ANSWERS = st.builds(lambda answer: lambda latest: answer, often(SNAPSHOTS))


def method(name: str, *arguments: Any, **options: Any) -> st.SearchStrategy[Call]:
    """Calls of a method of a store, with some of these options."""
    return st.builds(
        lambda given, fields: lambda store: getattr(store, name)(*given, **fields),
        st.tuples(*arguments),
        some(**options),
    )


# Ends of a copy: this store, another one, a place where a store may be opened, or garbage.
def this_store(store: Any) -> Any:
    return store


def other_store(store: Any) -> Any:
    other = AsyncMemoryStore() if isinstance(store, AsyncStateStore) else MemoryStore()
    fill_memory(other, SAVED)
    return other


def ends(garbage: st.SearchStrategy[Any]) -> st.SearchStrategy[Call]:
    fixed = (garbage | st.just("memory://")).map(lambda thing: lambda store: thing)
    return st.sampled_from([this_store, other_store]) | fixed


def on_store(name: str, *places: st.SearchStrategy[Call], **options: Any) -> st.SearchStrategy[Call]:
    """Calls of the function that works on stores of this form, with some of these options."""

    def call(places: tuple[Call, ...], fields: dict[str, Any]) -> Call:
        def called(store: Any) -> Any:
            attuned_store.STARTS.clear()
            has_twin = isinstance(store, AsyncStateStore) and not name.endswith("_app")
            function = getattr(attuned_store, f"a{name}" if has_twin else name)
            return function(*(place(store) for place in places), **fields)

        return called

    return st.builds(call, st.tuples(*places), some(**options))


STORE_FUNCTIONS: dict[str, st.SearchStrategy[Call]] = {
    "copy": on_store(
        "copy",
        ends(GARBAGE.filter(is_inside)),
        ends(NO_PLACES),
        replace=often(st.booleans()),
        rename=often(st.dictionaries(st.sampled_from(["warmth", "x", 5, None]), often("mood"), max_size=2)),
        drop=often(st.lists(often("warmth"), max_size=2)),
        progress=PROGRESS,
    ),
    "restore": on_store(
        "restore",
        FILES_OF_SNAPSHOTS.map(lambda file: lambda store: file),
        ends(NO_PLACES),
        mode=often(st.sampled_from(["replace", "merge", "skip"])),
        progress=PROGRESS,
    ),
    "snapshot_on_start": on_store(
        "snapshot_on_start", ends(GARBAGE), timeout=often(1.0), keep=often(st.integers(1, 3))
    ),
    "snapshot_app": on_store(
        "snapshot_app",
        ends(GARBAGE),
        authorize=often(st.sampled_from([None, bool])),
        directory=DIRECTORIES,
        keep=often(st.integers(1, 3)),
    ),
    "service_app": on_store(
        "service_app",
        ends(GARBAGE),
        authorize=often(st.sampled_from([None, bool])),
        directory=DIRECTORIES,
        keep=often(st.integers(1, 3)),
    ),
}
ARGUMENTS: dict[str, st.SearchStrategy[Call]] = {
    "upsert_latest": method("upsert_latest", often(SNAPSHOTS), expected=often(SNAPSHOTS)),
    "upsert_many": method("upsert_many", often(st.lists(often(SNAPSHOTS), max_size=4)), progress=PROGRESS),
    "patch": st.builds(
        lambda user_id, axes, fields: lambda store: store.patch(user_id, axes, **fields),
        USER_IDS,
        AXES,
        FIELDS,
    ),
    "update": method("update", USER_IDS, ANSWERS | NOT_CALLABLE, attempts=often(3)),
    "get_latest": method("get_latest", USER_IDS, default=GARBAGE),
    "get": method("get", USER_IDS, default=GARBAGE),
    "to_dataframe": method(
        "to_dataframe", often(st.none() | st.lists(USER_IDS, max_size=4)), since=TIMES, until=TIMES
    ),
    "alter_axes": often(st.lists(often("mood"), max_size=2)).map(
        lambda add: lambda store: store.alter_axes(add=add)
    ),
    "get_many": method("get_many", often(st.lists(USER_IDS, max_size=4))),
    "get_history": method("get_history", USER_IDS, LIMITS, since=TIMES, until=TIMES),
    "plot_history": method("plot_history", USER_IDS, often(st.lists(often("warmth"), max_size=2))),
    "search_similar": st.builds(
        lambda query, filters: lambda store: store.search_similar(query, **filters),
        often(GOOD_AXES) | SNAPSHOTS | USER_IDS,
        FILTERS,
    ),
    "count": method("count", history=often(st.booleans())),
    "delete": method("delete", USER_IDS),
    "collection": method(
        "collection",
        ODD_TEXT | GARBAGE | st.just("attuned_state"),
        often(WORDS),
        indexes=often(st.dictionaries(ODD_TEXT, st.sampled_from(["keyword", "?"]), max_size=2)),
        ttl=often(1.0),
    ),
    "erase": method("erase", USER_IDS),
    "create_snapshot": method(
        "create_snapshot",
        DIRECTORIES,
        kind=often(st.sampled_from(["auto", "native", "portable"])),
        reason=often("manual"),
        keep=often(st.integers(1, 3)),
        keep_remote=often(st.booleans()),
        progress=PROGRESS,
    ),
    "restore_snapshot": method(
        "restore_snapshot",
        FILES_OF_SNAPSHOTS,
        mode=often(st.sampled_from(["replace", "merge", "skip"])),
        progress=PROGRESS,
    ),
    "wait_until_ready": method("wait_until_ready", often(1.0)),
    "__contains__": method("__contains__", USER_IDS),
    "__getitem__": method("__getitem__", USER_IDS),
}
CHANGING = {
    "alter_axes",
    "upsert_latest",
    "upsert_many",
    "patch",
    "update",
    "delete",
    "erase",
    "restore_snapshot",
    "restore",
    "copy",
}
DOCUMENTED: dict[str, tuple[type[Exception], ...]] = {
    "alter_axes": (StoreError,),  # on a server
    "create_snapshot": (SnapshotError,),
    "restore_snapshot": (SnapshotError,),
    "restore": (StoreError,),
    "copy": (StoreError,),  # no store at the source, or none to be opened at the target
    "snapshot_on_start": (SnapshotError,),
    "wait_until_ready": (BackendError,),  # the time may be short
}
BEGINNING = [*(state("ann", at) for at in (1, 2, 3)), state("bob", 1, source="inferred", confidence=0.4)]


def content(store: StateStore) -> Any:
    """What a store holds, as it is read, and page by page past what it remembers."""
    pager, pages = store._operations.states(), list[StateSnapshot]()
    while (page := attuned_store.run(pager.next())) is not None:
        pages += page.states
    return (
        {user_id: (store.get_latest(user_id), store.get_history(user_id)) for user_id in store},
        sorted(pages, key=lambda state: (state.user_id, state.updated_at_unix_ms)),
    )


def begin(store: StateStore) -> None:
    """Make the store what it is in the beginning."""
    for user_id in list(store):
        store.delete(user_id)
    store.upsert_many(BEGINNING)


class Pair(NamedTuple):
    """A store, and another one on the same place that sees what became of it."""

    store: StateStore | AsyncStateStore
    witness: StateStore


Pairs = Callable[[str, str], Pair]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, portal: BlockingPortal) -> Iterator[Pairs]:
    """A function that gives the stores of a backend and form; each is opened once."""
    opened: dict[tuple[str, str], Pair] = {}
    root = tmp_path_factory.mktemp("fuzz")
    with contextlib.ExitStack() as stack:

        def pair(backend: str, form: str) -> Pair:
            if (backend, form) not in opened:
                opened[backend, form] = open_pair(backend, form)
            return opened[backend, form]

        def open_pair(backend: str, form: str) -> Pair:
            if form == "sync":
                store: Any = stack.enter_context(BACKENDS[backend].sync(root / backend))
            else:
                store = BACKENDS[backend].asynchronous(root / backend)
                stack.enter_context(portal.wrap_async_context_manager(store))
            if backend == "memory":
                return Pair(store, synchronous(store))
            return Pair(store, stack.enter_context(BACKENDS[backend].sync(root / backend)))

        yield pair


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plots are thrown away in the end."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


OPERATIONS = {**ARGUMENTS, **STORE_FUNCTIONS}
FORMS = ("sync", "async")


def examples(backend: str, form: str) -> int:
    """How many: both forms share what checks arguments, and every look at a server takes ten requests."""
    if LONG:
        return 1_000
    return {"memory": 60, "server": 20}.get(backend, 40) // (1 if form == "sync" else 3)


@pytest.mark.filterwarnings("ignore:More than 20 figures:RuntimeWarning")  # they are thrown away in the end
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=needs(BACKENDS[name].library))
        for name in ("memory", "edge", "local", "server")
    ],
)
@pytest.mark.parametrize(
    ("operation", "form"),
    [
        (operation, form)
        for form in FORMS
        for operation in OPERATIONS
        if form == "sync" or not (operation.startswith("__") or operation == "get")
    ],
)
def test_garbage_changes_nothing(
    pairs: Pairs, portal: BlockingPortal, backend: str, operation: str, form: str
) -> None:
    """An operation with garbage raises a documented error and has changed nothing, or it was valid."""
    store, witness = pairs(backend, form)
    begin(witness)
    before = content(witness)
    errors = (ValidationError, UserNotFoundError, ConflictError, *DOCUMENTED.get(operation, ()))

    @settings(FUZZ, max_examples=examples(backend, form))
    @given(call=OPERATIONS[operation])
    def check(call: Call) -> None:
        ended = outcome(portal, lambda: call(store), errors)
        assert not list(Path().rglob(".attuned-*"))
        if ended == "answer" and operation in CHANGING:
            begin(witness)
        else:
            assert content(witness) == before

    check()


# ------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------

WORDS = [
    *COMMANDS,
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
    "--kind",
    "--keep",
    "--keep-remote",
    "--mode",
    "--replace",
    "--directory",
    "--host",
    "--port",
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
    "portable",
    "native",
    "merge",
    "skip",
    "good.attuned",
    "damaged.attuned",
    "store.snap",
    "backups",
    "store",
    "127.0.0.1",
    "::",
]
NAMED = st.sampled_from(WORDS)
# What begins like a command of snapshots gets far enough to do something more often.
LED = st.sampled_from(
    [
        ["snapshot", "backups"],
        ["restore", "good.attuned"],
        ["restore", "damaged.attuned", "--yes"],
        ["restore", "--mode", "merge"],
        ["verify", "good.attuned"],
        ["snapshots", "backups"],
        ["copy", "store"],
        ["copy", "memory://", "store"],
        ["serve", "--port", "0"],
    ]
)
ANY_WORDS = st.lists(NAMED | ODD_TEXT.filter(is_inside), max_size=7)
ARGUMENT_LISTS = ANY_WORDS | st.builds(
    list.__add__, LED, st.lists(NAMED | ODD_TEXT.filter(is_inside), max_size=3)
)
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
        status = main(arguments)
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
    monkeypatch.setenv("ATTUNED_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)  # it would serve until it is told to end
    path = tmp_path / "store"
    with BACKENDS[engine].sync(path) as store:
        store.upsert_many(BEGINNING)
        before = content(store)

    @settings(FUZZ, max_examples=2_000 if LONG else 80)
    @given(arguments=ARGUMENT_LISTS, stdin=FILES)
    def check(arguments: list[str], stdin: bytes) -> None:
        status, complaints = run_command(arguments, stdin)
        note(complaints[:500])
        assert status in range(4)
        assert "Traceback" not in complaints
        assert not list(tmp_path.rglob(".attuned-*"))
        with BACKENDS[engine].sync(path) as store:
            if status == 0:
                begin(store)
            else:
                assert content(store) == before

    check()

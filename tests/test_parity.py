"""Both forms of every store have the same methods with the same parameters."""

from __future__ import annotations

import inspect
from typing import Any

import attrs
import pytest

import attuned_store
from attuned_store import (
    ANY,
    AsyncMemoryStore,
    AsyncQdrantStore,
    AsyncStateStore,
    MemoryStore,
    MemoryStoreConfig,
    QdrantStore,
    QdrantStoreConfig,
    StateStore,
    StoreError,
)

PAIRS = [(StateStore, AsyncStateStore), (MemoryStore, AsyncMemoryStore), (QdrantStore, AsyncQdrantStore)]
CONCRETE = [
    (StateStore, MemoryStore),
    (StateStore, QdrantStore),
    (AsyncStateStore, AsyncMemoryStore),
    (AsyncStateStore, AsyncQdrantStore),
]
# Names that only one form has: the synchronous one reads as a mapping too.
ASYNC_NAMES = {"close": "aclose", "__enter__": "__aenter__", "__exit__": "__aexit__"}
OF_A_MAPPING = {"get", "keys", "values"}
OPERATIONS = {
    "upsert_latest": "(self, snapshot, *, expected=ANY)",
    "upsert_many": "(self, snapshots, *, progress=None)",
    "patch": "(self, user_id, axes, **fields)",
    "update": "(self, user_id, fn, *, attempts=32)",
    "get_latest": "(self, user_id, default=None)",
    "get_many": "(self, user_ids)",
    "get_history": "(self, user_id, limit=100, *, since=None, until=None)",
    "search_similar": (
        "(self, query, *, limit=10, score_threshold=None, user_id=None, exclude_user_id=None, source=None, "
        "min_confidence=None, since=None, until=None, history=False)"
    ),
    "users": "(self)",
    "items": "(self)",
    "to_dataframe": "(self, user_ids=None, *, since=None, until=None)",
    "alter_axes": "(self, *, add)",
    "count": "(self, *, history=False)",
    "delete": "(self, user_id)",
    "prune": "(self)",
    "health": "(self)",
    "close": "(self)",
}
# The options of a store as keyword arguments, and the configuration they are the fields of.
# Where a TypedDict has another name, this is the place to say so.
OPTIONS = [("MemoryOptions", MemoryStoreConfig), ("QdrantOptions", QdrantStoreConfig)]

names = [f"{one.__name__}-{two.__name__}" for one, two in PAIRS]
concrete_names = [two.__name__ for _, two in CONCRETE]


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def signature(cls: object, name: str) -> str:
    """The parameters of a method without their annotations."""
    found = inspect.signature(getattr(cls, name))
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()
    ]
    bare = inspect.Signature(parameters)
    return str(bare).replace(repr(ANY), "ANY").replace("/, ", "")


def methods(cls: type) -> set[str]:
    return {name for name in public(cls) if callable(getattr(cls, name))}


def options_of(name: str) -> Any:
    """The TypedDict of that name."""
    return getattr(attuned_store, name)


@pytest.mark.parametrize(("sync", "asynchronous"), PAIRS, ids=names)
def test_both_forms_have_the_same_names(sync: type, asynchronous: type) -> None:
    """Whatever one form can do, the other can, under the same name; close is aclose."""
    assert {ASYNC_NAMES.get(name, name) for name in public(sync) - OF_A_MAPPING} == public(asynchronous)
    assert all(hasattr(asynchronous, name) for name in ("__aenter__", "__aexit__", "_repr_html_"))
    assert all(hasattr(sync, name) for name in ("__enter__", "__exit__", "_repr_html_"))


@pytest.mark.parametrize(("sync", "asynchronous"), PAIRS, ids=names)
def test_both_forms_have_the_same_parameters(sync: type, asynchronous: type) -> None:
    """The parameters of a method and their defaults are the same in both forms."""
    for name in methods(sync) - OF_A_MAPPING:
        twin = ASYNC_NAMES.get(name, name)
        assert signature(sync, name) == signature(asynchronous, twin), name


@pytest.mark.parametrize(("sync", "asynchronous"), PAIRS, ids=names)
def test_every_async_method_is_awaited_but_iterators(sync: type, asynchronous: type) -> None:
    """Every method of the async form is awaited, but the iterators and collection()."""
    plain = {
        name for name in methods(asynchronous) if not inspect.iscoroutinefunction(getattr(asynchronous, name))
    }

    assert plain == {"collection", "items", "users"}
    assert not any(inspect.iscoroutinefunction(getattr(sync, name)) for name in methods(sync))


@pytest.mark.parametrize(("contract", "store"), CONCRETE, ids=concrete_names)
def test_every_store_keeps_to_the_contract(contract: type, store: type) -> None:
    """A store has the methods of its contract, with the same parameters."""
    assert issubclass(store, contract)
    assert public(store) >= public(contract)
    for name in methods(contract):
        assert signature(store, name) == signature(contract, name), name


@pytest.mark.parametrize("cls", [StateStore, AsyncStateStore], ids=lambda cls: cls.__name__)
def test_the_contract_is_the_documented_one(cls: type) -> None:
    """Every operation has the parameters that the documentation gives it."""
    for name, expected in OPERATIONS.items():
        found = ASYNC_NAMES.get(name, name) if cls is AsyncStateStore else name
        assert signature(cls, found) == expected, name
    for name in ("axes", "is_closed"):
        assert isinstance(inspect.getattr_static(cls, name), property), name


def test_only_the_synchronous_form_is_a_mapping() -> None:
    """Reading as a mapping is of the synchronous form alone."""
    for name in ("__getitem__", "__contains__", "__len__", "__iter__", *OF_A_MAPPING):
        assert hasattr(StateStore, name)
        assert not hasattr(AsyncStateStore, name)


@pytest.mark.parametrize("contract", [StateStore, AsyncStateStore], ids=lambda cls: cls.__name__)
def test_a_contract_is_abstract(contract: type) -> None:
    """A contract cannot be made: it says what a store does."""
    with pytest.raises(TypeError):
        contract()


def test_both_openers_have_the_same_parameters() -> None:
    """open_store and open_async_store are plain functions that take the same."""
    assert signature(attuned_store, "open_store") == "(target=None, **options)"
    assert signature(attuned_store, "open_async_store") == "(target=None, **options)"
    assert not inspect.iscoroutinefunction(attuned_store.open_async_store)


@pytest.mark.parametrize(("name", "config"), OPTIONS, ids=[name for name, _ in OPTIONS])
def test_the_options_are_the_fields_of_the_configuration(name: str, config: type) -> None:
    """What a store takes as keywords is what its configuration has as fields, and all of it is optional."""
    options = options_of(name)

    assert set(options.__annotations__) | set(options.__optional_keys__) == {
        f.name for f in attrs.fields(config)
    }
    assert not options.__required_keys__
    assert all(field.kw_only for field in attrs.fields(config))


def test_every_configuration_of_a_directory_has_the_options_of_memory() -> None:
    """The five options of a store in memory are options of every store."""
    memory = {field.name: field.default for field in attrs.fields(MemoryStoreConfig)}
    qdrant = {field.name: field.default for field in attrs.fields(QdrantStoreConfig)}

    assert memory.items() <= qdrant.items()


def test_every_public_name_is_there() -> None:
    """__all__ names what exists, each name once."""
    assert len(set(attuned_store.__all__)) == len(attuned_store.__all__)
    assert all(hasattr(attuned_store, name) for name in attuned_store.__all__)


@pytest.mark.parametrize(
    ("name", "parents"),
    [
        ("ValidationError", (StoreError, ValueError)),
        ("UserNotFoundError", (StoreError, KeyError)),
        ("StoreClosedError", (StoreError,)),
        ("MissingDependencyError", (StoreError, ImportError)),
        ("ConflictError", (StoreError,)),
        ("SchemaMismatchError", (StoreError,)),
        ("StoreLockedError", (StoreError,)),
        ("UnsupportedServerError", (StoreError,)),
        ("SnapshotError", (StoreError,)),
        ("BackendError", (StoreError,)),
    ],
)
def test_errors_are_one_tree(name: str, parents: tuple[type, ...]) -> None:
    """Every error is a StoreError, and where Python has a class for it, that as well."""
    error = getattr(attuned_store, name)

    assert all(issubclass(error, parent) for parent in parents)
    assert name in attuned_store.__all__

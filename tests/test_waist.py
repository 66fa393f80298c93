"""The engines of points: one truth for memory, with numpy and without, Edge, local mode and a server."""

from __future__ import annotations

import functools
import math
import os
import random
import shutil
import uuid
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import pytest
from conformance import loopback, needs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attuned_store
from attuned_store import (
    Absent,
    AnyOf,
    BackendError,
    CollectionNotFoundError,
    CollectionSpec,
    Equal,
    Filter,
    Matching,
    MemoryEngine,
    Or,
    Point,
    Put,
    QdrantStoreConfig,
    Range,
    Record,
    RetryPolicy,
    Text,
    matches,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from attuned_store import IndexKind


def server_engine(path: Path, url: Callable[[], str]) -> Any:
    config = QdrantStoreConfig(url=url(), verify=False, retry=RetryPolicy(base_s=0))
    return attuned_store.ServerEngine(config, attuned_store.BLOCKING)


KINDS: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "memory": (lambda path: MemoryEngine(), "numpy"),
    "plain": (lambda path: MemoryEngine(), None),
    "edge": (lambda path: attuned_store.EdgeEngine(path, "process"), "qdrant_edge"),
    "local": (lambda path: attuned_store.LocalEngine(path, "process"), "qdrant_client"),
    "server": (functools.partial(server_engine, url=lambda: loopback().url), "qdrant_client"),
}
if "QDRANT_TEST_URL" in os.environ:
    KINDS["real"] = (functools.partial(server_engine, url=lambda: os.environ["QDRANT_TEST_URL"]), None)

INDEXES: dict[str, IndexKind] = {
    "colour": "keyword",
    "number": "integer",
    "weight": "float",
    "text": "text",
}
TEXTS = ("the quick brown fox", "A lazy dog, asleep", "Quick: thinking!", "nothing")


class Place:
    """Where an engine keeps its collections. Its methods are called, not awaited; it can be opened again."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.make = functools.partial(KINDS[kind][0], path)
        self.engine = self.make()
        self.names = list[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.engine, name)
        return lambda *arguments, **options: attuned_store.run(method(*arguments, **options))

    def create(self, *points: Point, **changes: Any) -> str:
        """A new collection that holds these points."""
        self.names.append(f"test-{uuid.uuid4().hex}")
        self.open(spec(self.names[-1], **changes))
        self.apply(self.names[-1], [Put(points)])
        return self.names[-1]

    def again(self) -> Place:
        """The same place, opened again; what is in memory stays open."""
        if not isinstance(self.engine, MemoryEngine):
            self.close()
            self.engine = self.make()
        return self

    def leave(self) -> None:
        for name in self.names:
            self.drop(name)
        self.close()


def spec(name: str, **changes: Any) -> CollectionSpec:
    made = CollectionSpec(name, 2, INDEXES, {"made_by": "a test", "vector_size": 2}, tenant="owner")
    return attrs.evolve(made, **changes)


def engines(*kinds: str) -> list[Any]:
    """The engines as parameters, all or some; one whose library is missing is skipped."""
    return [
        pytest.param(kind, marks=needs(library))
        for kind, (_, library) in KINDS.items()
        if kind in (kinds or KINDS)
    ]


@pytest.fixture(params=engines(), scope="module")
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the engines."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(attuned_store, "make_vectors", lambda vector_size: attuned_store.PlainVectors())
        yield request.param


@pytest.fixture(scope="module")
def place(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One engine for all tests that change collections of their own."""
    place = Place(kind, tmp_path_factory.mktemp(kind))
    yield place
    place.leave()


@pytest.fixture
def shelf(place: Place) -> str:
    """A collection of twenty documents."""
    return place.create(*map(document, range(20)))


def key_of(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


def document(number: int, **changes: Any) -> Point:
    """A point with a value for every index; every third has no note, or an empty one."""
    angle = number / 10
    payload: dict[str, Any] = {
        "colour": ("red", "green", "blue", "grey")[number % 4],
        "number": number,
        "weight": number / 4,
        "text": TEXTS[number % 4],
        "nested": {"of": [number, {"deep": None}]},
    }
    if number % 3:
        payload["note"] = "a note" if number % 3 == 1 else []
    point = Point(key_of(number), [math.cos(angle), math.sin(angle)], payload, f"owner-{number % 3}")
    return point._replace(**changes)


def kept(point: Point) -> dict[str, Any]:
    """The payload of a point as it is read."""
    return {**point.payload, "owner": point.tenant}


def numbers(records: Iterable[Record]) -> list[int]:
    """The documents by their numbers, in the order in which they came."""
    return [uuid.UUID(str(record.id)).int - 1 for record in records]


def where(*must: Any, without: tuple[Any, ...] = ()) -> Filter:
    return Filter(must, without)


EVERYTHING = Filter()
RED = Equal("colour", "red")


def walk(
    place: Place, name: str, condition: Filter = EVERYTHING, limit: int = 7, **options: Any
) -> list[int]:
    """All that the pages of a filter hold, by number; no page is longer than asked for."""
    found, cursor = list[int](), None
    while True:
        page = place.page(name, condition, limit=limit, cursor=cursor, **options)
        assert len(page.records) <= limit
        found += numbers(page.records)
        if (cursor := page.cursor) is None:
            return sorted(found)


def contents(place: Place, name: str) -> dict[int, dict[str, Any]]:
    """The payloads of all points."""
    records = place.page(name, where(), limit=10_000).records
    found = dict(zip(numbers(records), (dict(record.payload) for record in records), strict=True))
    assert len(found) == len(records)
    return found


# ------------------------------------------------------------------------------
# Collections
# ------------------------------------------------------------------------------


def test_a_collection_keeps_its_metadata(place: Place) -> None:
    """The metadata of a collection is what it was created with, whatever it is opened with later."""
    name = place.create(document(1))
    place.again()
    assert place.open(spec(name, metadata={"made_by": "another"})) == {"made_by": "a test", "vector_size": 2}
    assert contents(place, name) == {1: kept(document(1))}


def test_a_collection_that_will_not_do_is_left_alone(place: Place, shelf: str) -> None:
    """Where the metadata is refused the error comes through, and nothing has changed."""

    def refuse(metadata: Mapping[str, Any]) -> None:
        assert metadata["made_by"] == "a test"
        raise attuned_store.SchemaMismatchError("of another kind")

    place.again()
    with pytest.raises(attuned_store.SchemaMismatchError, match="another kind"):
        place.open(spec(shelf, metadata={"made_by": "another"}, accept=refuse))
    place.open(spec(shelf))
    assert place.count(shelf, where()) == 20


def test_collections_are_listed_with_their_metadata(place: Place) -> None:
    """Every collection is listed, opened or not, until it is dropped."""
    first, second = place.create(), place.create(metadata={"of": ["others"]})
    place.again()
    place.open(spec(first))

    listed = place.collections()
    assert listed[first] == {"made_by": "a test", "vector_size": 2}
    assert listed[second] == {"of": ["others"]}
    place.drop(first)
    assert first not in place.collections()
    assert second in place.collections()


def test_collections_know_nothing_of_each_other(place: Place, shelf: str) -> None:
    """Two collections hold points of their own, with the same ids."""
    other = place.create(document(0, vector=[0.0, 1.0, 0.0]), vector_size=3, metadata={"vector_size": 3})
    place.apply(shelf, deletes=[key_of(1)])

    assert walk(place, other) == [0]
    assert walk(place, shelf) == [0, *range(2, 20)]


def test_a_collection_that_was_dropped_can_be_made_anew(place: Place, shelf: str) -> None:
    """Dropping removes a collection with all that is in it; its name is free for another kind of it."""
    place.drop(shelf)
    place.drop(shelf)
    place.open(spec(shelf, vector_size=3, metadata={"made_by": "another", "vector_size": 3}))

    assert place.count(shelf, where()) == 0
    place.apply(shelf, [Put([document(1, vector=[1.0, 0.0, 0.0])])])
    assert place.collections()[shelf]["made_by"] == "another"


@pytest.mark.parametrize("kind", engines("edge", "local"), indirect=True)
def test_a_collection_takes_the_place_of_another(place: Place, shelf: str) -> None:
    """What replaces a collection is there under its name, now and later, and can be replaced or dropped."""
    for number in (50, 51):
        beside = place.create(document(number))
        place.replace(shelf, beside)
        assert walk(place, shelf) == [number]
        assert beside not in place.collections()
        with pytest.raises(CollectionNotFoundError):
            place.count(beside, where())
    place.again()
    place.open(spec(shelf))
    assert walk(place, shelf) == [51]
    place.drop(shelf)
    assert shelf not in place.again().collections()
    place.open(spec(shelf))
    assert walk(place, shelf) == []


@pytest.mark.parametrize("kind", engines("edge"), indirect=True)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_collection_that_was_half_dropped_is_gone(
    place: Place, shelf: str, *, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed while it dropped a collection leaves none behind, and one can be made anew."""
    if replaced:
        place.replace(shelf, place.create(document(50)))

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            place.drop(shelf)
    assert shelf not in place.again().collections()
    place.open(spec(shelf))
    assert walk(place, shelf) == []


USES: dict[str, Callable[[Place, str], object]] = {
    "retrieve": lambda place, name: place.retrieve(name, [key_of(1)]),
    "page": lambda place, name: place.page(name, where(), limit=1),
    "a tenant's page": lambda place, name: place.page(name, where(), limit=1, tenant="ann"),
    "search": lambda place, name: place.search(name, [1.0, 0.0], where(), 1),
    "count": lambda place, name: place.count(name, where(), tenant="ann"),
    "count_by": lambda place, name: place.count_by(name, "colour", ["red"], where()),
    "put": lambda place, name: place.apply(name, [Put([document(1)])]),
    "guarded put": lambda place, name: place.apply(name, [Put([document(1)], "insert")]),
    "delete": lambda place, name: place.apply(name, deletes=[key_of(1)]),
    "delete by filter": lambda place, name: place.apply(name, deletes=Matching(where())),
}


@pytest.mark.parametrize("use", USES)
def test_a_collection_that_is_not_there_is_an_error_of_its_own(place: Place, shelf: str, use: str) -> None:
    """Whatever is asked of a collection that was never made, or was dropped, says that there is none."""
    place.drop(shelf)
    for name in (shelf, f"test-{uuid.uuid4().hex}"):
        with pytest.raises(CollectionNotFoundError):
            USES[use](place, name)
        assert name not in place.collections()


def test_the_status_of_a_collection(place: Place, shelf: str) -> None:
    """The status says how many points there are and how many match; of no collection it says so."""
    status = place.status(shelf, where(RED), 10.0)
    assert (status.points, status.matching) == (20, 5)
    assert place.status(f"test-{uuid.uuid4().hex}", where(), 10.0).points is None


# ------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------


def test_points_are_put_replaced_and_deleted_in_one_call(place: Place, shelf: str) -> None:
    """One call puts points, replaces others whole and deletes by id; absent ids are no error."""
    changed = document(3, payload={"colour": "pink"})

    place.apply(shelf, [Put([document(30), changed])], [key_of(0), key_of(1), key_of(99)])

    assert walk(place, shelf) == [*range(2, 20), 30]
    assert contents(place, shelf)[3] == {"colour": "pink", "owner": "owner-0"}


def test_a_call_may_only_delete_or_do_nothing(place: Place, shelf: str) -> None:
    """Nothing to do is no error, and deleting needs no points."""
    place.apply(shelf)
    place.apply(shelf, [Put([])], [])
    place.apply(shelf, deletes=[key_of(number) for number in range(19)])

    assert walk(place, shelf) == [19]


def test_what_matches_is_deleted(place: Place, shelf: str) -> None:
    """What matches a filter is deleted, of one tenant or of all, also what the same call has put."""
    place.apply(shelf, deletes=Matching(where(RED), "owner-0"))
    assert walk(place, shelf) == [n for n in range(20) if n not in {0, 12}]

    red = document(25, payload={"colour": "red"})
    changed = document(4, payload={"colour": "green"})
    place.apply(shelf, [Put([red, changed, document(26)])], Matching(where(RED)))
    assert walk(place, shelf) == [n for n in (*range(20), 26) if n not in {0, 8, 12, 16}]

    place.apply(shelf, deletes=Matching(where(), "owner-1"))
    assert walk(place, shelf) == [n for n in (*range(20), 26) if n not in {0, 8, 12, 16} and n % 3 != 1]
    place.apply(shelf, deletes=Matching(where()))
    assert walk(place, shelf) == []


def test_a_deleted_point_can_come_back(place: Place, shelf: str) -> None:
    """An id that was deleted is free for another point."""
    place.apply(shelf, deletes=[key_of(5)])
    assert place.retrieve(shelf, [key_of(5)]) == []
    place.apply(shelf, [Put([document(5, payload={"number": 55})])])

    assert contents(place, shelf)[5] == {"number": 55, "owner": "owner-2"}
    assert place.count(shelf, where()) == 20


def test_a_point_that_does_not_fit_is_refused_with_all_that_came_with_it(place: Place, shelf: str) -> None:
    """A vector of another length changes nothing, nor does a point without a tenant."""
    with pytest.raises(BackendError):
        place.apply(shelf, [Put([document(21), document(22, vector=[1.0])])], [key_of(1)])
    with pytest.raises(ValueError, match="tenant"):
        place.apply(shelf, [Put([document(21), document(22, tenant=None)])], [key_of(1)])

    place.apply(shelf, [Put([document(23)])])
    assert walk(place, shelf) == [*range(20), 23]


NEW, THERE = document(21, payload={"number": 0}), document(4, payload={"number": 0})
GUARDS: dict[str, tuple[Put, set[int]]] = {
    "upsert": (Put([NEW, THERE]), {21, 4}),
    "insert": (Put([NEW, THERE], "insert"), {21}),
    "update": (Put([NEW, THERE], "update"), {4}),
    "upsert over what matches": (Put([NEW, THERE], over=where(RED)), {21, 4}),
    "upsert over what does not": (Put([NEW, THERE], over=where(without=(RED,))), {21}),
    "insert over what matches": (Put([NEW, THERE], "insert", where(RED)), {21}),
    "update over what matches": (Put([NEW, THERE], "update", where(RED)), {4}),
    "update over what does not": (Put([NEW, THERE], "update", where(Absent("colour"))), set()),
    "over an older one": (Put([NEW, THERE], over=where(Range("number", lte=4))), {21, 4}),
    "over a younger one": (Put([NEW, THERE], over=where(Range("number", lte=3))), {21}),
}


@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_is_judged_for_each_point(place: Place, shelf: str, name: str) -> None:
    """Modes and guards let through what they say, of those that are there and of those that are not."""
    put, written = GUARDS[name]
    place.apply(shelf, [put])

    found = contents(place, shelf)
    assert {number for number in (21, 4) if number in found and found[number]["number"] == 0} == written
    assert len(found) == 20 + (21 in written)


def test_the_newest_wins_point_by_point(place: Place, shelf: str) -> None:
    """Each point replaces one that is not newer by a key, whatever the others of the same put hold."""
    new = {4: 4, 5: 4, 6: 7, 7: 0, 21: 0, 22: 9}  # where each is there, its number is that of the point
    put = Put([document(number, payload={"number": at}) for number, at in new.items()], newest_by="number")
    place.apply(shelf, [put])

    found = contents(place, shelf)
    replaced = {number for number in new if "colour" not in found[number]}
    assert replaced == {4, 6, 21, 22}
    assert found[6]["number"] == 7

    place.apply(shelf, [put._replace(over=where(Range("number", gte=5))), put._replace(mode="update")])
    assert {number for number in new if "colour" not in contents(place, shelf)[number]} == replaced
    place.apply(shelf, [Put([document(8, payload={"number": 9})], newest_by="number")])
    assert contents(place, shelf)[8] == {"number": 9, "owner": "owner-2"}


def test_puts_come_one_after_another(place: Place, shelf: str) -> None:
    """A put is judged against what those before it wrote, but not against itself; of one id the last wins."""
    first, second = (document(40, payload={"number": number}) for number in (1, 2))

    place.apply(shelf, [Put([first]), Put([second], "insert"), Put([second], over=where(Equal("number", 7)))])
    assert contents(place, shelf)[40]["number"] == 1
    place.apply(shelf, [Put([first], over=where(Equal("number", 1))), Put([second], "update")])
    assert contents(place, shelf)[40]["number"] == 2
    place.apply(shelf, [Put([document(41), document(41, payload={"number": 9})], "insert")])
    assert contents(place, shelf)[41] == {"number": 9, "owner": "owner-2"}
    place.apply(shelf, [Put([second])], [key_of(40)])
    assert 40 not in contents(place, shelf)


@pytest.fixture(scope="module")
def slate(place: Place) -> str:
    """A collection that every example empties."""
    return place.create()


STEPS = st.lists(
    st.tuples(
        st.lists(
            st.tuples(
                st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=4),
                st.sampled_from(["upsert", "insert", "update"]),
                st.none() | st.builds(lambda most: where(Range("number", lte=most)), st.integers(0, 3)),
            ),
            max_size=3,
        ),
        st.lists(st.integers(0, 5), max_size=3)
        | st.builds(lambda least: Matching(where(Range("number", gt=least))), st.integers(0, 3))
        | st.sampled_from([Matching(where(), "ann"), Matching(where(), "bob")]),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_any_writes_do_what_a_dict_would(place: Place, slate: str, steps: list[Any]) -> None:
    """Any sequence of puts, guards and deletes leaves what it would leave in a dict."""
    place.apply(name := slate, deletes=Matching(where()))
    model: dict[int, dict[str, Any]] = {}

    for puts, deletes in steps:
        asked = list[Put]()
        for points, mode, over in puts:
            made = [(n, {"number": at, "owner": "ann" if at % 2 else "bob"}) for n, at in points]
            asked.append(
                Put(
                    [
                        document(n, payload={"number": kept["number"]}, tenant=kept["owner"])
                        for n, kept in made
                    ],
                    mode,
                    over,
                )
            )
            before = dict(model)
            for number, payload in made:
                there = before.get(number)
                most = math.inf if over is None else over.must[0].lte
                if mode != "update" if there is None else mode != "insert" and there["number"] <= most:
                    model[number] = payload
        if not isinstance(deletes, Matching):
            gone = set(deletes)
        elif deletes.tenant:
            gone = {number for number, payload in model.items() if payload["owner"] == deletes.tenant}
        else:
            gone = {
                number for number, payload in model.items() if payload["number"] > deletes.where.must[0].gt
            }
        ids = deletes if isinstance(deletes, Matching) else [*map(key_of, deletes)]
        place.apply(name, asked, ids)
        model = {number: payload for number, payload in model.items() if number not in gone}

        assert contents(place, name) == model
        for owner in ("ann", "bob"):
            mine = [number for number, payload in model.items() if payload["owner"] == owner]
            assert walk(place, name, limit=2, tenant=owner) == sorted(mine)


# ------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------


def test_points_are_retrieved_by_their_ids(place: Place, shelf: str) -> None:
    """Those that are there are retrieved whole, the others left out."""
    found = place.retrieve(shelf, [key_of(7), key_of(99), key_of(2)])

    assert {str(record.id): record.payload for record in found} == {
        key_of(number): kept(document(number)) for number in (2, 7)
    }
    assert place.retrieve(shelf, [key_of(99)]) == []
    assert place.retrieve(shelf, []) == []


def test_points_are_retrieved_without_their_payloads(place: Place, shelf: str) -> None:
    """Without payloads the ids alone come."""
    found = place.retrieve(shelf, [key_of(7), key_of(2)], payload=False)

    read = sorted((str(record.id), record.payload, record.score, list(record.vector)) for record in found)
    assert read == [(key_of(2), {}, 0.0, []), (key_of(7), {}, 0.0, [])]


def test_vectors_are_retrieved_as_directions(place: Place, shelf: str) -> None:
    """With vectors the direction of each comes; a vector of zeros stays one."""
    place.apply(shelf, [Put([document(30, vector=[-30.0, 40.0]), document(31, vector=[0.0, 0.0])])])
    found = place.retrieve(shelf, [key_of(3), key_of(30), key_of(31)], payload=False, vector=True)

    directions = {number: list(record.vector) for number, record in zip(numbers(found), found, strict=True)}
    assert directions[3] == pytest.approx([math.cos(0.3), math.sin(0.3)], abs=1e-6)
    assert directions[30] == pytest.approx([-0.6, 0.8], abs=1e-6)
    assert directions[31] == [0.0, 0.0]


def test_what_was_read_never_changes(place: Place) -> None:
    """Neither a later write nor what a caller does with what it gave or got is seen by another."""
    given = {"nested": {"of": [1]}, "number": 1}
    name = place.create(document(1, payload=given))
    given["nested"]["of"].append(2)  # type: ignore[index]
    reads: list[Callable[[], Record]] = [
        lambda: place.retrieve(name, [key_of(1)])[0],
        lambda: place.page(name, where(), limit=1).records[0],
        lambda: place.page(name, where(), limit=1, tenant="owner-1").records[0],
        lambda: place.page(name, where(), limit=1, newest_by="number").records[0],
        lambda: place.search(name, [1.0, 0.0], where(), 1)[0],
    ]
    for read in reads:
        read().payload["nested"]["of"].append(3)
        assert read().payload == {"nested": {"of": [1]}, "number": 1, "owner": "owner-1"}
    before = [read() for read in reads]
    place.apply(name, [Put([document(1, payload={"nested": "another"})])])

    assert {str(record.payload["nested"]) for record in before} == {"{'of': [1]}"}


def test_pages_hold_every_point_once(place: Place, shelf: str) -> None:
    """Pages of any length hold all points, each once, deleted ones not."""
    place.apply(shelf, [Put([document(3)])], [key_of(4), key_of(19)])

    for limit in (1, 3, 17, 18, 19, 20, 21):
        assert walk(place, shelf, limit=limit) == [n for n in range(20) if n not in {4, 19}]
        assert walk(place, shelf, where(RED), limit) == [0, 8, 12, 16]


@pytest.mark.parametrize("condition", [where(), where(RED)])
@pytest.mark.parametrize("tenant", [None, "owner-1"])
def test_pages_come_without_payloads(place: Place, shelf: str, condition: Filter, tenant: str | None) -> None:
    """A page without payloads holds the ids alone."""
    page = place.page(shelf, condition, limit=100, tenant=tenant, payload=False)

    expected = [n for n in range(20) if (not condition.must or n % 4 == 0) and (tenant is None or n % 3 == 1)]
    assert sorted(numbers(page.records)) == expected
    assert {str(record.payload) for record in page.records} == {"{}"}


@pytest.mark.parametrize("options", [{}, {"tenant": "owner-1"}, {"condition": where(Range("number", gte=0))}])
def test_what_stays_comes_once_while_others_write(place: Place, options: dict[str, Any]) -> None:
    """While points come, go and change between two pages, those that stay come exactly once."""
    source = random.Random(0)
    stay, name = set(range(0, 60, 3)), place.create()
    tenant = "owner-1"
    place.apply(name, [Put([document(number, tenant=tenant) for number in range(60)])])
    condition, found, cursor = options.get("condition", where()), list[int](), None
    while True:
        page = place.page(name, condition, limit=7, cursor=cursor, tenant=options.get("tenant"))
        found += numbers(page.records)
        if (cursor := page.cursor) is None:
            break
        others = [number for number in range(90) if number not in stay]
        come, go = source.sample(others, 8), source.sample(others, 8)
        same = source.sample(sorted(stay), 3)
        place.apply(
            name, [Put([document(number, tenant=tenant) for number in (*come, *same)])], list(map(key_of, go))
        )

    assert sorted(number for number in found if number in stay) == sorted(stay)


def test_the_newest_come_first(place: Place, shelf: str) -> None:
    """In descending order of a key the first come first, of those that match and have one."""
    place.apply(shelf, [Put([document(40, payload={"colour": "red"})])])  # has no such key

    for key in ("number", "weight"):
        assert numbers(place.page(shelf, where(), limit=3, newest_by=key).records) == [19, 18, 17]
        page = place.page(shelf, where(RED), limit=3, newest_by=key)
        assert [record.payload for record in page.records] == [kept(document(n)) for n in (16, 12, 8)]
        assert page.cursor is None
        page = place.page(shelf, where(RED), limit=10, newest_by=key, tenant="owner-1")
        assert numbers(page.records) == [16, 4]


@pytest.mark.parametrize("key", ["number", "weight"])
def test_the_newest_come_without_payloads_but_for_the_key(place: Place, shelf: str, key: str) -> None:
    """Without payloads each record still holds the key that it was ordered by, with its type."""
    page = place.page(shelf, where(RED), limit=100, newest_by=key, payload=False)

    expected = [{key: document(number).payload[key]} for number in (16, 12, 8, 4, 0)]
    assert [record.payload for record in page.records] == expected
    assert [type(record.payload[key]) for record in page.records] == [type(expected[0][key])] * 5


def test_a_search_gives_the_nearest_first(place: Place, shelf: str) -> None:
    """The nearest points come best first, with their cosines and payloads, no more than asked for."""
    found = place.search(shelf, [2.0, 0.0], where(), 4)

    assert numbers(found) == [0, 1, 2, 3]
    assert [record.score for record in found] == pytest.approx([math.cos(n / 10) for n in range(4)], abs=1e-5)
    assert found[3].payload == kept(document(3))
    assert numbers(place.search(shelf, [1.0, 0.0], where(without=(RED,)), 4)) == [1, 2, 3, 5]
    assert len(place.search(shelf, [1.0, 0.0], where(), 1_000_000)) == 20
    assert numbers(place.search(shelf, [1.0, 0.0], where(), 100, tenant="owner-2")) == list(range(2, 20, 3))


def test_a_search_is_exact(place: Place) -> None:
    """What is found is what numpy finds, with its scores, of all points, some or those of a tenant."""
    source = np.random.default_rng(0)
    vectors = source.normal(size=(300, 8))
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    points = [document(number, vector=vector.tolist()) for number, vector in enumerate(vectors)]
    name = place.create(*points, vector_size=8, metadata={"vector_size": 8})
    place.apply(name, [Put(points[:50])], [point.id for point in points[290:]])

    for query in source.normal(size=(5, 8)):
        scores = directions @ (query / np.linalg.norm(query))
        for condition, tenant in (
            (where(), None),
            (where(RED), None),
            (where(), "owner-1"),
            (where(RED), "owner-2"),
        ):
            left = [
                n
                for n in range(290)
                if matches(condition, points[n].payload) and tenant in (None, points[n].tenant)
            ]
            best = sorted(left, key=scores.__getitem__, reverse=True)[:10]
            found = place.search(name, query.tolist(), condition, 10, tenant=tenant)
            assert numbers(found) == best
            assert [record.score for record in found] == pytest.approx(scores[best].tolist(), abs=1e-5)


def test_points_are_counted_by_a_keyword(place: Place, shelf: str) -> None:
    """Points are counted for each of the values asked for, also of the key that holds the tenant."""
    light = Range("weight", lte=2.0)  # the first nine
    for key, values in (("owner", ["owner-0", "owner-2", "nobody"]), ("colour", ["red", "grey", "pink"])):
        counts = place.count_by(shelf, key, values, where(light))
        expected = {value: sum(kept(document(n))[key] == value for n in range(9)) for value in values}
        assert {value: count for value, count in counts.items() if count} == {
            value: count for value, count in expected.items() if count
        }
    assert not place.count_by(shelf, "owner", [], where())


# ------------------------------------------------------------------------------
# Tenants
# ------------------------------------------------------------------------------

TENANTS = [
    "ann",
    "Ann",
    "",
    " ",
    "ann ",
    "owner",
    "ümlaut",
    "a:b",
    "1",
    "None",
    str(uuid.UUID(int=7)),
    "a" * 256,
    "*",
    "ann\\",
]


def test_tenants_never_mix(place: Place) -> None:
    """Whatever is read of a tenant is that tenant's, however alike two of them are."""
    points = [
        document(10 * at + n, tenant=tenant, vector=[1.0, n / 10])
        for at, tenant in enumerate(TENANTS)
        for n in range(4)
    ]
    name = place.create(*random.Random(0).sample(points, len(points)))

    for at, tenant in enumerate(TENANTS):
        mine = [10 * at + n for n in range(4)]
        assert walk(place, name, limit=3, tenant=tenant) == mine
        assert place.count(name, where(), tenant=tenant) == 4
        assert place.count(name, where(Range("number", gt=10 * at)), tenant=tenant) == 3
        assert numbers(place.search(name, [1.0, 0.0], where(), 10, tenant=tenant)) == mine
        newest = place.page(name, where(), limit=10, newest_by="number", tenant=tenant).records
        assert numbers(newest) == mine[::-1]
        assert {record.payload["owner"] for record in newest} == {tenant}
    for nobody in ("bob", "ANN", "ann\x00"):
        assert walk(place, name, tenant=nobody) == []
        assert place.count(name, where(), tenant=nobody) == 0
        assert place.search(name, [1.0, 0.0], where(), 10, tenant=nobody) == []
    assert len(walk(place, name)) == len(points)


def test_a_point_may_move_to_another_tenant(place: Place, shelf: str) -> None:
    """A point that is put for another tenant is no longer the first one's."""
    place.apply(shelf, [Put([document(3, tenant="bob")])])
    place.apply(shelf, [Put([document(3, tenant="cyd")])])

    assert walk(place, shelf, tenant="owner-0") == [0, 6, 9, 12, 15, 18]
    assert walk(place, shelf, tenant="bob") == []
    assert walk(place, shelf, tenant="cyd") == [3]
    assert place.search(shelf, [1.0, 0.0], where(), 5, tenant="bob") == []
    assert place.count(shelf, where()) == 20


def test_a_collection_may_have_no_tenants(place: Place) -> None:
    """Without a key for them points have no tenants, and none can be asked for."""
    name = place.create(*(document(n, tenant=None) for n in range(3)), tenant=None)

    assert contents(place, name)[1] == document(1).payload
    with pytest.raises(ValueError, match="tenant"):
        place.page(name, where(), limit=1, tenant="ann")
    with pytest.raises(ValueError, match="tenant"):
        place.apply(name, [Put([document(1)])])


# ------------------------------------------------------------------------------
# Filters
# ------------------------------------------------------------------------------

CONDITIONS: dict[str, tuple[Any, Callable[[dict[str, Any]], bool]]] = {
    "a tenant": (Equal("owner", "owner-1"), lambda found: found["owner"] == "owner-1"),
    "a keyword": (Equal("colour", "blue"), lambda found: found["colour"] == "blue"),
    "a keyword of nobody": (Equal("colour", "pink"), lambda found: False),
    "an integer": (Equal("number", 1), lambda found: found["number"] == 1),
    "some keywords": (
        AnyOf("colour", ["red", "grey", "pink"]),
        lambda found: found["colour"] in {"red", "grey"},
    ),
    "some integers": (AnyOf("number", (3, 5, 70)), lambda found: found["number"] in {3, 5}),
    "one of nothing": (AnyOf("colour", []), lambda found: False),
    "at least": (Range("number", 7), lambda found: found["number"] >= 7),
    "more than": (Range("number", gt=7), lambda found: found["number"] > 7),
    "at most": (Range("weight", lte=1.25), lambda found: found["weight"] <= 1.25),
    "less than": (Range("weight", lt=1.25), lambda found: found["weight"] < 1.25),
    "between": (Range("weight", 1.25, 2.5), lambda found: 1.25 <= found["weight"] <= 2.5),
    "between nothing": (Range("number", 5, 4), lambda found: False),
    "a word": (Text("text", "quick"), lambda found: "uick" in found["text"]),
    "two words, in any order": (Text("text", "fox quick"), lambda found: found["text"] == TEXTS[0]),
    "a part of a word": (Text("text", "think"), lambda found: False),
    "no word": (Text("text", " ?"), lambda found: False),
    "absent or empty": (Absent("note"), lambda found: not found.get("note")),
    "absent everywhere": (Absent("unheard_of"), lambda found: True),
    "absent nowhere": (Absent("number"), lambda found: False),
    "one or the other": (
        Or([where(Equal("number", 3)), where(RED, without=(Equal("number", 4),))]),
        lambda found: found["number"] in {3, 0, 8, 12, 16},
    ),
    "anything or": (Or([where(), where(RED)]), lambda found: True),
    "none of none": (Or([]), lambda found: False),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_every_condition_means_the_same(place: Place, library: str, name: str) -> None:
    """Every condition, demanded or excluded, means the same to pages, counts and searches."""
    condition, holds = CONDITIONS[name]
    payloads = {number: kept(document(number)) for number in range(20)}
    inside = [number for number, payload in payloads.items() if holds(payload)]
    outside = [number for number in payloads if number not in inside]

    for asked, expected in ((where(condition), inside), (where(without=(condition,)), outside)):
        assert [number for number, payload in payloads.items() if matches(asked, payload)] == expected
        check_filter(place, library, asked, None, expected)


def check_filter(place: Place, name: str, asked: Filter, tenant: str | None, expected: list[int]) -> None:
    assert walk(place, name, asked, 50, tenant=tenant) == expected
    assert place.count(name, asked, tenant=tenant) == len(expected)
    assert sorted(numbers(place.search(name, [1.0, 1.0], asked, 1_000, tenant=tenant))) == expected


@pytest.fixture(scope="module")
def library(place: Place) -> str:
    """A collection of twenty documents, to be read only."""
    return place.create(*map(document, range(20)))


WORDS = ["Fox", "naïve", "ÉCLAIR", "x1", "42", "snake_case", "it's", "中文", "straße", "e-mail", "...", ""]
VALUES: dict[str, list[Any]] = {
    "colour": ["red", "green", "RED", "", "red ", "1", "ümlaut"],
    "number": [0, 1, -1, 7, 2**53 - 1, -(2**53) + 1],
    "weight": [0.0, 0.5, -2.25, 1e300, 3.0, 7, 1e-9],
    "text": [" ".join(pair) for pair in ((a, b) for a in WORDS for b in WORDS[::3])],
}


def odd_document(number: int, source: random.Random) -> Point:
    """A point whose values are absent, null, single, or several."""
    payload = dict[str, Any]()
    for key, values in VALUES.items():
        kind = source.choice(["one", "one", "one", "several", "absent", "null", "empty"])
        one, several = source.choice(values), source.sample(values, source.randint(1, 3))
        if (
            key == "text"
        ):  # of several texts a text index takes the words together, and what has none does not
            several = one
        if kind != "absent":
            payload[key] = {"one": one, "several": several, "null": None, "empty": []}[kind]
    vector = [source.uniform(0.1, 1), source.uniform(0.1, 1)]
    return Point(key_of(number), vector, payload, source.choice(["ann", "bob"]))


ODD = [odd_document(number, random.Random(number)) for number in range(120)]


@pytest.fixture(scope="module", params=[INDEXES, {}], ids=["indexed", "not indexed"])
def oddities(place: Place, request: pytest.FixtureRequest) -> str:
    """A collection of odd documents, with indexes or without."""
    return place.create(*ODD, indexes=request.param)


def limits(key: str) -> st.SearchStrategy[Any]:
    return st.none() | st.sampled_from(VALUES[key]) | st.floats(-10, 10)


def ranges(key: str) -> st.SearchStrategy[Any]:
    return st.builds(Range, st.just(key), *[limits(key)] * 4)


def equals(key: str) -> st.SearchStrategy[Any]:
    value = st.sampled_from(VALUES[key])
    return st.builds(Equal, st.just(key), value) | st.builds(AnyOf, st.just(key), st.lists(value, max_size=3))


SIMPLE = (
    equals("colour")
    | equals("number")
    | ranges("number")
    | ranges("weight")
    | st.builds(Text, st.just("text"), st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join))
    | st.builds(Absent, st.sampled_from([*VALUES, "other"]))
    | st.builds(Equal, st.just("owner"), st.sampled_from(["ann", "cyd"]))
)


def filters(condition: st.SearchStrategy[Any], *, most: int = 2) -> st.SearchStrategy[Filter]:
    conditions = st.lists(condition, max_size=most).map(tuple)
    return st.builds(Filter, conditions, conditions)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    asked=filters(SIMPLE | st.builds(Or, st.lists(filters(SIMPLE), max_size=3))),
    tenant=st.sampled_from([None, "ann", "bob", "cyd"]),
)
def test_every_filter_means_what_the_predicate_says(
    place: Place, oddities: str, asked: Filter, tenant: str | None
) -> None:
    """Any filter over odd values matches on every engine what it matches in Python."""
    expected = [
        number
        for number, point in enumerate(ODD)
        if matches(asked, kept(point)) and tenant in (None, point.tenant)
    ]
    check_filter(place, oddities, asked, tenant, expected)


def test_the_predicate_knows_types() -> None:
    """Bools and floats equal no integer, a bool is in no range, and words are whole."""
    payload = {"a": True, "b": 1.0, "c": [True, 2], "d": "Two Words"}
    assert not matches(where(Equal("a", 1)), payload)
    assert not matches(where(AnyOf("a", [1, 0])), payload)
    assert not matches(where(Range("a", 0, 2)), payload)
    assert not matches(where(Equal("b", 1)), payload)
    assert matches(where(Range("b", 1, 1)), payload)
    assert matches(where(Equal("c", 2)), payload)
    assert not matches(where(Equal("c", 1)), payload)
    assert matches(where(Text("d", "WORDS two")), payload)
    assert not matches(where(Text("d", "word")), payload)

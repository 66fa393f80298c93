"""Documents: one truth for every engine, in both forms."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conformance import BACKENDS, NOW, Case, needs
from documents import DIMENSIONS, INDEXES, Words, collection_of, ids, meets
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import attuned_store
from attuned_store import (
    BackendError,
    Document,
    EmbeddingError,
    HashingEmbedder,
    MemoryStore,
    QdrantStore,
    SchemaMismatchError,
    StateSnapshot,
    StoreClosedError,
    ValidationError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conformance import Clock, Open
    from qdrant_server import QdrantServer

    from attuned_store import AsyncStateStore, Collection

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("clock")]
LONG = bool(os.environ.get("ATTUNED_TEST_LONG"))
WHEN = datetime(2026, 1, 9, 12, tzinfo=UTC)


def trade(number: int, text: str | None = None, **fields: Any) -> Document:
    return Document(f"t-{number}", f"trade number {number}" if text is None else text, fields, NOW + number)


# ------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _is_text(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@given(fields=st.dictionaries(st.text(), JSON, max_size=4).filter(_is_text))
def test_a_document_is_a_value(fields: dict[str, Any]) -> None:
    """A document equals a copy, pickled or not, and shares nothing with what it was made of."""
    document = Document("a", "text", fields, NOW, 1.5)
    before = json.dumps(fields)

    pickled = pickle.loads(pickle.dumps(document))  # noqa: S301 - of what was made here
    assert document == pickled == copy.deepcopy(document)
    assert document != Document("a", "text", fields, NOW)
    assert json.dumps(dict(document.fields)) == before
    fields["more"] = 1
    assert document != Document("a", "text", fields, NOW, 1.5)
    with pytest.raises(TypeError):
        document.fields["more"] = 1  # type: ignore[index]


def test_what_a_document_says(clock: Clock) -> None:
    """The time is now and aware; a datetime in the fields becomes its text; the repr is short."""
    document = Document("a", "x" * 100, {"when": WHEN, "of": (1, 2)})

    assert document.updated_at_unix_ms == clock.now
    assert document.updated_at == datetime(2026, 1, 9, 23, 6, 40, tzinfo=UTC)
    assert dict(document.fields) == {"when": WHEN.isoformat(), "of": [1, 2]}
    assert len(repr(document)) < 200
    assert document.user_id is None
    assert {document, Document("a", "x" * 100, {"when": WHEN, "of": (1, 2)})} == {document}


BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "no id": (("",), "id: 1 to 256 bytes"),
    "a long id": (("x" * 257,), "id: 1 to 256 bytes"),
    "another type of text": (("a", 5), "text: a string"),
    "a long text": (("a", "ä" * 2**19 + "x"), "text: at most 1,048,576 bytes"),
    "half a character": (("a", "\ud800"), "text: a lone surrogate"),
    "no fields": (("a", "", [1]), "fields: a mapping"),
    "a name that is none": (("a", "", {1: 2}), "fields: names are strings"),
    "no number": (("a", "", {"b": math.nan}), r"fields\['b'\]: JSON is needed"),
    "no JSON": (("a", "", {"b": {"c": {1}}}), r"fields\['b'\]\['c'\]: JSON is needed"),
    "fields that are too long": (("a", "", {"b": "x" * 2**16}), "fields: at most 65,536 bytes"),
    "a naive datetime": (("a", "", {"b": datetime(2026, 1, 1)}), "needs a time zone"),  # noqa: DTZ001
    "a time in seconds": (("a", "", {}, 1_768_000_000), "looks like seconds"),
    "no time to live": (("a", "", {}, NOW, 0), "ttl: a finite number above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_refused(name: str) -> None:
    """What is wrong with a document is told, with the field and the rule."""
    arguments, message = BAD[name]
    with pytest.raises(ValidationError, match=message):
        Document(*arguments)


def test_fields_that_hold_themselves_are_refused() -> None:
    """Fields are nested so deep at most, which ends those that hold themselves."""
    endless: dict[str, Any] = {}
    endless["more"] = endless
    with pytest.raises(ValidationError, match="nested up to 32 deep"):
        Document("a", "", endless)


# ------------------------------------------------------------------------------
# On every engine, in both forms
# ------------------------------------------------------------------------------


@pytest.mark.anyio
class DocumentTests:
    """What every collection does."""

    async def test_a_document_comes_back_as_it_was(self, store: AsyncStateStore) -> None:
        """Text and fields come back to the last bit, also where an engine would change a float."""
        rng = random.Random(5)
        fields = {
            "floats": [rng.random() for _ in range(50)],
            "large": 2**70,
            "gain": 0.1 + 0.2,
            "nested": {"of": [None, {"ä": "\U0001f600\0"}]},
            "won": True,
            "size": 2**53,
        }
        mine = (await collection_of(store, indexes=INDEXES)).for_user("ada")
        document = Document("t-1", "Ein Text\0 \U0001f600", fields, NOW - 5, ttl=1.25)
        await mine.upsert(document)

        found = await mine.get("t-1")
        assert found == document
        assert json.dumps(dict(found.fields)) == json.dumps(fields)
        assert found.user_id == "ada"
        assert await mine.documents() == [document]

    async def test_the_newest_come_first(self, store: AsyncStateStore) -> None:
        """Documents are listed by their times, at most so many, also more than one piece of work."""
        mine = (await collection_of(store, indexes=INDEXES)).for_user("ada")
        await mine.upsert_many([trade(number, size=number % 2) for number in range(150)])

        assert ids(await mine.documents(newest_first=True, limit=3)) == ["t-149", "t-148", "t-147"]
        odd = await mine.documents({"size": 1}, newest_first=True, limit=70)
        assert ids(odd) == [f"t-{number}" for number in range(149, 9, -2)]
        everything = await mine.documents(limit=None)
        assert sorted(ids(everything)) == sorted(f"t-{number}" for number in range(150))
        assert len(await mine.documents()) == 100
        assert await mine.documents(limit=0) == []
        assert await mine.count({"updated_at": {"gte": NOW + 100}}) == 50

    async def test_documents_are_deleted(self, store: AsyncStateStore) -> None:
        """One is deleted by its id, many by a filter, of this user alone."""
        trades = await collection_of(store, indexes=INDEXES)
        mine, others = trades.for_user("ada"), trades.for_user("bob")
        for handle in (mine, others):
            await handle.upsert_many([trade(number, size=number) for number in range(100)])

        assert await mine.delete("t-1")
        assert not await mine.delete("t-1")
        assert await mine.delete_many({"size": {"lt": 90}}) == 89
        assert await mine.count() == 10
        assert await others.count() == 100
        assert await trades.all_users().delete_many({"size": 95}) == 2
        assert await mine.delete_many({}) == 9
        with pytest.raises(ValidationError, match="for all"):
            await mine.delete_many(None)
        assert await trades.all_users().count() == 99

    async def test_what_is_shared_is_read_by_all(self, store: AsyncStateStore) -> None:
        """Everybody reads shared documents by their ids; of equal ids the user's own wins."""
        trades = await collection_of(store)
        mine = trades.for_user("ada")
        await trades.shared().upsert_many([Document("a", "shared"), Document("b", "shared")])
        await mine.upsert(Document("a", "own"))

        found = await mine.get_many(["b", "a", "c", "a"])
        assert [(each.id, each.text, each.user_id) for each in found.values()] == [
            ("b", "shared", ""),
            ("a", "own", "ada"),
        ]
        assert ids(await mine.documents()) == ["a"]
        assert not await mine.delete("b")
        assert (await trades.for_user("bob").get("a")).text == "shared"
        assert await trades.shared().get("c") is None

    async def test_a_handle_is_of_somebody(self, store: AsyncStateStore) -> None:
        """A missing login is no user, and does not become everybody."""
        trades = await collection_of(store)
        for user_id in (None, "", 5, ["ada"]):
            with pytest.raises(ValidationError, match="user_id"):
                trades.for_user(user_id)

    async def test_documents_expire(self, store: AsyncStateStore, clock: Clock) -> None:
        """None is read once its time has come, its own before that of the collection; a write removes it."""
        trades = await collection_of(store, ttl=10)
        mine, words = trades.for_user("ada"), await collection_of(store, "words")
        await mine.upsert_many(
            [Document("long", "x", ttl=100), Document("short", "x", ttl=1), Document("usual", "x")]
        )
        await words.for_user("ada").upsert_many([Document("a", "x", ttl=1), Document("b", "x")])

        for seconds, left in ((0.999, 3), (1, 2), (9.999, 2), (10, 1), (100, 0)):
            clock.now = NOW + round(seconds * 1000)
            assert await mine.count() == left
            assert len(await mine.documents()) == left
            assert len(await mine.documents(newest_first=True)) == left
            assert len(await mine.get_many(["long", "short", "usual"])) == left
        assert not await mine.delete("long")
        assert ids(await words.all_users().documents()) == ["b"]

        clock.now += 60_000
        await mine.upsert(Document("new"))
        assert (await trades.info()).documents == 1

    async def test_writing_again_prolongs_a_life(self, store: AsyncStateStore, clock: Clock) -> None:
        """The same document written again lives on from now; without an end it is left as it is."""
        trades = await collection_of(store, ttl=10)
        mine, words = trades.for_user("ada"), (await collection_of(store, "words")).for_user("ada")
        await mine.upsert(Document("a"))
        await words.upsert(Document("a"))
        clock.now += 6_000

        assert (await mine.upsert_many([Document("a")])).moved == 1
        assert (await words.upsert_many([Document("a")])).unchanged == 1
        clock.now += 6_000
        assert await mine.get("a") is not None

    async def test_an_unchanged_text_is_not_embedded_again(self, store: AsyncStateStore) -> None:
        """What is the same is left alone, what moved keeps its vector, and each counts in one place."""
        words = Words()
        trades = await collection_of(store, "trades", words.embedder, indexes=INDEXES)
        mine, documents = trades.for_user("ada"), [trade(number, size=1) for number in range(30)]
        told: list[tuple[int, int | None]] = []

        report = await mine.upsert_many(documents, progress=lambda done, total: told.append((done, total)))
        assert (report.embedded, report.moved, report.unchanged) == (30, 0, 0)
        assert told[-1] == (30, 30)
        assert sorted(words.given) == sorted(each.text for each in documents)
        before = await mine.search("trade number 7", limit=5)
        words.given.clear()

        changed = [trade(number, size=2 if number < 10 else 1) for number in range(30)]
        changed[29] = trade(29, "something else")
        report = await mine.upsert_many(iter(changed))
        assert (report.embedded, report.moved, report.unchanged) == (1, 10, 19)
        assert words.given == ["something else"]
        assert [(each.document.id, each.score) for each in await mine.search("trade number 7", limit=5)] == [
            (each.document.id, pytest.approx(each.score, abs=1e-6)) for each in before
        ]
        assert await mine.count({"size": 2}) == 10

    async def test_the_last_of_equal_ids_wins(self, store: AsyncStateStore) -> None:
        """A document that comes twice in one call is what it was last."""
        words = Words()
        mine = (await collection_of(store, "trades", words.embedder)).for_user("ada")
        report = await mine.upsert_many([Document("a", "one"), Document("b", "two"), Document("a", "three")])

        assert report.embedded == 3
        assert (await mine.get("a")).text == "three"
        assert ids(await mine.search("three", limit=1)) == ["a"]

    async def test_a_text_that_cannot_be_embedded_is_told(self, store: AsyncStateStore) -> None:
        """One bad text takes no other with it; the report names it, and a single write raises."""
        words = Words()
        words.fails["bad"] = ValueError("refused")
        mine = (await collection_of(store, "trades", words.embedder)).for_user("ada")
        texts = ["one", "bad", "two", "", "three"]

        report = await mine.upsert_many([Document(str(n), text) for n, text in enumerate(texts)])
        assert report.embedded == 3
        assert {name: type(error) for name, error in report.failed.items()} == {
            "1": EmbeddingError,
            "3": ValidationError,
        }
        assert sorted(ids(await mine.documents())) == ["0", "2", "4"]
        with pytest.raises(EmbeddingError):
            await mine.upsert(Document("1", "bad"))

    async def test_an_embedder_that_is_down_ends_it(self, store: AsyncStateStore) -> None:
        """Where nothing can be embedded, a bulk write raises, says how much is done, and can be repeated."""
        words = Words()
        mine = (await collection_of(store, "trades", words.embedder)).for_user("ada")
        documents = [trade(number) for number in range(60)]

        def down() -> None:
            if len(words.given) >= 16:
                raise ConnectionError("down")

        words.meanwhile = down
        with pytest.raises(EmbeddingError) as failed:
            await mine.upsert_many(documents)
        assert failed.value.written == await mine.count() == 16
        words.meanwhile = lambda: None
        report = await mine.upsert_many(documents)
        assert (report.embedded, report.unchanged) == (44, 16)
        assert len(words.given) == len(set(words.given)) == 60

    async def test_the_nearest_are_found(self, store: AsyncStateStore) -> None:
        """A search finds what numpy would, best first, within a user, a filter and a threshold."""
        words = Words()
        trades = await collection_of(store, "trades", words.embedder, indexes=INDEXES)
        documents = [trade(n, f"text {n} about {n % 7} and {n % 3}", size=n % 2) for n in range(150)]
        mine = trades.for_user("ada")
        await mine.upsert_many(documents)
        await trades.for_user("bob").upsert_many(documents)

        direction = words.embed(["text 5 about 5"])[0]
        scores = {
            each.id: _cosine(direction, vector)
            for each, vector in zip(documents, words.embed([each.text for each in documents]), strict=True)
        }
        for limit in (3, 100):
            found = await mine.search("text 5 about 5", limit=limit)
            best = sorted(scores.values(), reverse=True)[:limit]
            assert [match.score for match in found] == pytest.approx(best, abs=1e-5)
            assert all(match.score == pytest.approx(scores[match.document.id], abs=1e-5) for match in found)
            assert {match.document.user_id for match in found} == {"ada"}
        odd = await mine.search(direction, {"size": 1}, limit=5)
        assert all(match.document.fields["size"] == 1 for match in odd)
        some = await mine.search("text 5 about 5", limit=150, score_threshold=0.6)
        assert len(some) == sum(score >= 0.6 for score in scores.values())
        assert len(await trades.all_users().search(direction, limit=300)) == 300

    async def test_shared_documents_are_found_too(self, store: AsyncStateStore) -> None:
        """A search may look at shared documents, but for those in whose place the user has one."""
        trades = await collection_of(store, "trades", Words().embedder)
        mine = trades.for_user("ada")
        await trades.shared().upsert_many([trade(n, f"common word {n}") for n in range(9)])
        await mine.upsert_many([trade(0, "entirely different"), trade(20, "common word")])

        found = await mine.search("common word", limit=4, shared=True)
        assert found[0].document.id == "t-20"
        everything = await mine.search("common word", limit=50, shared=True)
        assert len(everything) == 10
        assert "common word 0" not in {match.document.text for match in everything}
        assert {match.document.user_id for match in found} == {"", "ada"}
        assert sorted(ids(await mine.search("common word", limit=50))) == ["t-0", "t-20"]

    async def test_a_query_is_embedded_once(self, store: AsyncStateStore) -> None:
        """The vector of a query is remembered, the answer is not."""
        words = Words()
        mine = (await collection_of(store, "trades", words.embedder)).for_user("ada")
        assert await mine.search("one") == []
        await mine.upsert(Document("a", "one"))
        assert ids(await mine.search("one")) == ["a"]
        assert words.given == ["one", "one"]  # the query, and the document

    async def test_only_vectors_of_one_embedder_are_compared(self, store: AsyncStateStore) -> None:
        """What another embedder made is not found until it was refreshed, which embeds each text once."""
        old, new = Words("old"), Words("new")
        first = await collection_of(store, "trades", old.embedder)
        await first.for_user("ada").upsert_many([trade(number) for number in range(70)])
        await first.shared().upsert(trade(100))
        second = await collection_of(store, "trades", new.embedder)
        mine = second.for_user("ada")
        await mine.upsert(trade(3))
        assert ids(await mine.search("trade number 5", limit=100)) == ["t-3"]
        new.given.clear()

        told: list[tuple[int, int | None]] = []
        report = await second.refresh(progress=lambda done, total: told.append((done, total)))
        assert report.embedded == 70
        assert told[-1] == (70, 70)
        assert len(new.given) == len(set(new.given)) == 70
        assert len(await mine.search("trade number 5", limit=100)) == 70
        assert await first.for_user("ada").search("trade number 5") == []
        assert (await second.info()).embedder == "new"
        assert (await second.refresh()).embedded == 0

    async def test_refreshing_leaves_what_changed_meanwhile(self, store: AsyncStateStore) -> None:
        """A document that is changed or deleted while its text is embedded stays changed or deleted."""
        old, new = Words("old"), Words("new")
        mine = (await collection_of(store, "trades", old.embedder)).for_user("ada")
        await mine.upsert_many([trade(number) for number in range(6)])
        trades = await collection_of(store, "trades", new.embedder)
        if getattr(store, "store", None) is None:
            pytest.skip("the embedder of an asynchronous store runs in a thread")

        def meanwhile() -> None:
            new.meanwhile = lambda: None
            handle = mine._handle
            handle.upsert(trade(1, "changed meanwhile"))
            handle.upsert(trade(2, moved=True))
            handle.delete("t-3")

        new.meanwhile = meanwhile
        report = await trades.refresh()
        assert report.failed == {}
        assert (await mine.get("t-1")).text == "changed meanwhile"
        assert dict((await mine.get("t-2")).fields) == {"moved": True}
        assert await mine.get("t-3") is None
        found = await trades.for_user("ada").search("changed meanwhile", limit=10)
        assert len(found) == 5
        assert (found[0].document.id, found[0].score) == ("t-1", pytest.approx(1, abs=1e-5))

    async def test_a_collection_is_opened_again(self, open_store: Open, case: Case) -> None:
        """Settings stay with a collection: whoever opens it has them, what contradicts them is refused."""
        store = await open_store()
        words = Words()
        first = await collection_of(store, "trades", words.embedder, indexes={"symbol": "keyword"}, ttl=50)
        await first.for_user("ada").upsert(trade(1, symbol="NQ"))
        if case.backend != "memory":
            await store.aclose()
            store = await open_store()

        again = await collection_of(store)
        assert ids(await again.for_user("ada").documents({"symbol": "NQ"})) == ["t-1"]
        info = await again.info()
        assert (info.name, info.documents, info.indexes) == ("trades", 1, {"symbol": "keyword"})
        assert (info.embedder, info.dimensions, info.ttl) == ("words", DIMENSIONS, 50)
        with pytest.raises(ValidationError, match="with its embedder, words"):
            await again.for_user("ada").upsert(trade(2))
        with pytest.raises(ValidationError, match="with its embedder, words"):
            await again.for_user("ada").search("a text")
        for arguments, options, message in (
            ((), {"indexes": {"symbol": "integer"}}, "the index 'symbol' is a keyword, integer is asked for"),
            ((HashingEmbedder(8),), {}, "16 dimensions .* hashing-8 makes 8"),
        ):
            other = await collection_of(store, "trades", *arguments, **options)
            with pytest.raises(SchemaMismatchError, match=message):
                await other.for_user("ada").count()
        keyed = await collection_of(store, "keyed")
        assert await keyed.for_user("ada").count() == 0
        with pytest.raises(SchemaMismatchError, match="made without an embedder"):
            await (await collection_of(store, "keyed", words.embedder)).for_user("ada").count()
        with pytest.raises(ValidationError, match="has no embedder"):
            await keyed.for_user("ada").search([1.0])

    async def test_an_index_is_added(self, open_store: Open, case: Case) -> None:
        """Documents from before are found by an index that is added later, also after opening again."""
        store = await open_store()
        words = Words()
        mine = (await collection_of(store, "trades", words.embedder)).for_user("ada")
        await mine.upsert_many([trade(number, size=number) for number in range(100)])
        await mine.upsert(trade(100, size="large"))
        with pytest.raises(ValidationError, match="'size' is not among the indexes"):
            await mine.count({"size": 5})
        words.given.clear()

        more = (await collection_of(store, "trades", words.embedder, indexes={"size": "integer"})).for_user(
            "ada"
        )
        assert ids(await more.documents({"size": 5})) == ["t-5"]
        assert await more.count({"size": None}) == 1  # of another kind
        assert await mine.count({"size": {"lt": 5}}) == 5  # the handle from before knows it too
        await mine.upsert(trade(200, size=4))
        assert await more.count({"size": {"lt": 5}}) == 6
        assert ids(await more.search("trade number 7", limit=1)) == ["t-7"]
        assert words.given == ["trade number 200", "trade number 7"]
        if case.backend != "memory":
            await store.aclose()
            store = await open_store()
            again = (await collection_of(store)).for_user("ada")
            assert await again.count({"size": {"lt": 5}}) == 6

    async def test_collections_are_listed_and_dropped(self, open_store: Open) -> None:
        """A store lists its collections with their sizes; one that was dropped is made anew when used."""
        store = await open_store()
        there = {each.name for each in await store.collections()}  # of other tests, on a server
        one, two = await collection_of(store, "doc-one"), await collection_of(store, "doc-two", ttl=5)
        await one.for_user("ada").upsert(Document("a"))
        await two.for_user("ada").count()

        found = {each.name: each for each in await store.collections()}
        assert found.keys() - there == {"doc-one", "doc-two"}
        assert (found["doc-one"].documents, found["doc-two"].documents) == (1, 0)
        await one.drop()
        await two.drop()
        assert {each.name for each in await store.collections()} == there
        assert await one.for_user("ada").get("a") is None
        await one.for_user("ada").upsert(Document("b"))
        assert ids(await one.for_user("ada").documents()) == ["b"]
        await one.drop()

    async def test_a_user_is_erased(self, store: AsyncStateStore, clock: Clock) -> None:
        """States and documents of a user go, in every collection, expired ones too; of others nothing."""
        trades, notes = await collection_of(store), await collection_of(store, "notes")
        await store.upsert_latest(StateSnapshot("ada", {"warmth": 1}))
        for user_id in ("ada", "bob"):
            await trades.for_user(user_id).upsert_many([trade(number) for number in range(70)])
        await notes.for_user("ada").upsert(Document("a", ttl=1))
        await notes.shared().upsert(Document("b"))
        clock.now += 2_000

        report = await store.erase("ada")
        assert report.states
        assert dict(report.documents) == {"notes": 1, "trades": 70}
        assert await store.get_latest("ada") is None
        assert await trades.for_user("ada").count() == 0
        assert await trades.for_user("bob").count() == 70
        assert await notes.shared().count() == 1
        again = await store.erase("ada")
        assert (again.states, dict(again.documents)) == (False, {})

    async def test_a_snapshot_tells_what_it_does_not_hold(
        self, store: AsyncStateStore, tmp_path: Path
    ) -> None:
        """Documents are in no snapshot so far: its report names their collections, restoring leaves them."""
        await store.upsert_latest(StateSnapshot("ada", {"warmth": 1}))
        assert (await store.create_snapshot(tmp_path / "none", kind="portable")).message == ""
        trades = await collection_of(store)
        await trades.for_user("ada").upsert(Document("a"))

        report = await store.create_snapshot(tmp_path / "snapshots", kind="portable")
        assert report.message == "the documents of 1 collection are not in it: trades"
        assert report.path is not None
        await store.restore_snapshot(report.path)
        assert await trades.for_user("ada").count() == 1

    async def test_the_states_are_no_documents(self, store: AsyncStateStore) -> None:
        """The collection of the states cannot be used for documents, nor is it listed."""
        await store.upsert_latest(StateSnapshot("ada", {"warmth": 1}))
        with pytest.raises(ValidationError, match="collection of the store's states"):
            await collection_of(store, store._operations.collection)
        assert store._operations.collection not in {each.name for each in await store.collections()}

    async def test_a_closed_store_has_no_documents(self, store: AsyncStateStore) -> None:
        """Once the store is closed, every use of a collection says so."""
        trades = await collection_of(store)
        mine = trades.for_user("ada")
        await mine.upsert(Document("a"))
        await store.aclose()
        for call in (mine.get("a"), mine.documents(), mine.upsert(Document("b")), trades.info()):
            with pytest.raises(StoreClosedError):
                await call
        with pytest.raises(StoreClosedError):
            await collection_of(store, "more")

    async def test_a_field_of_another_kind_is_refused(self, store: AsyncStateStore) -> None:
        """A list is checked whole before the first write; an iterator is written piece by piece."""
        mine = (await collection_of(store, indexes=INDEXES)).for_user("ada")
        documents = [trade(number) for number in range(100)]
        for field, value in (
            ("symbol", 5),
            ("symbol", ["NQ", 5]),
            ("size", 1.5),
            ("size", 2**53 + 1),
            ("gain", "1"),
            ("won", 1),
            ("closed_at", "yesterday"),
            ("closed_at", "2026-01-01T00:00:00"),
            ("note", ["a"]),
        ):
            with pytest.raises(ValidationError, match=rf"fields\['{field}'\]"):
                await mine.upsert_many([*documents, trade(100, **{field: value})])
        assert await mine.count() == 0
        with pytest.raises(ValidationError) as failed:
            await mine.upsert_many(iter([*documents, trade(100, symbol=5)]))
        assert failed.value.written == await mine.count() == 64


def _cosine(one: Any, other: Any) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)


class TestMemory(DocumentTests):
    backends = ("memory",)


class TestEdge(DocumentTests):
    backends = ("edge",)


class TestLocal(DocumentTests):
    backends = ("local",)
    faces = ("sync", "asyncio")


SERVERS = tuple(name for name in ("server", "real") if name in BACKENDS)


class TestServer(DocumentTests):
    backends = SERVERS
    faces = ("sync", "trio")

    @pytest.fixture(autouse=True)
    def empty(self, case: Case, tmp_path: Path) -> Iterator[None]:
        """Collections of documents belong to a whole server: those of one test are gone in the next."""
        yield
        with BACKENDS[case.backend].sync(tmp_path / "cleaning") as store:
            for each in store.collections():
                store.collection(each.name).drop()


# ------------------------------------------------------------------------------
# Filters: the same on every engine as in plain Python
# ------------------------------------------------------------------------------

KINDS = ("memory", "edge", "local", *SERVERS)
WORDS = st.lists(st.sampled_from(["quick", "Brown", "fox", "FOX,", "lazy-dog", "ä"]), max_size=3).map(
    " ".join
)
TIMES = st.sampled_from([NOW + 1_000 * number for number in range(4)]).map(
    lambda ms: datetime.fromtimestamp(ms / 1000, UTC)
)
FLOATS = st.sampled_from([0.0, -0.0, 0.1, 0.1 + 0.2, 0.3, -1 / 3, 1e-20, 1 / 7, 1e22, 2.5]) | st.floats(
    -1e6, 1e6
)
SMALL = st.integers(-3, 3)
VALUES: dict[str, Any] = {
    "symbol": st.sampled_from(["NQ", "ES", "nq", "or"]),
    "size": SMALL | st.sampled_from([2**53, -(2**53), 2**53 - 1]),
    "gain": FLOATS | SMALL,
    "won": st.booleans(),
    "closed_at": TIMES | TIMES.map(lambda time: time.isoformat()),
    "note": WORDS,
}
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        name: st.none() | (st.lists(values, max_size=3) | values if name == "symbol" else values)
        for name, values in VALUES.items()
    },
)


def _asked(name: str) -> st.SearchStrategy[Any]:
    """What may be asked of a field."""
    values = VALUES[name]
    compared = st.fixed_dictionaries({}, optional={"ne": st.none() | values})
    if name == "note":
        return st.none() | st.fixed_dictionaries({"text": WORDS}) | st.just({"ne": None})
    if name in ("size", "gain", "closed_at"):
        optional = dict.fromkeys(("gt", "gte", "lt", "lte"), values) | {"ne": st.none() | values}
        compared = st.fixed_dictionaries({}, optional=optional)
    return st.none() | values | st.lists(values, max_size=3) | compared.filter(bool)


BRANCHES = st.fixed_dictionaries({}, optional={name: _asked(name) for name in VALUES})
FILTERS = st.fixed_dictionaries(
    {}, optional={**{name: _asked(name) for name in VALUES}, "or": st.lists(BRANCHES, max_size=3)}
)


@pytest.fixture(
    params=[pytest.param(name, marks=needs(BACKENDS[name].library)) for name in KINDS], scope="module"
)
def shelf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A collection with every kind of index on each engine."""
    with BACKENDS[request.param].sync(tmp_path_factory.mktemp(request.param)) as store:
        collection = store.collection("filtered", indexes=INDEXES)
        yield collection
        collection.drop()


def test_filters_mean_on_every_engine_what_they_mean_in_python(shelf: Any) -> None:
    """What a filter finds, counts and deletes is what a predicate over the fields says."""
    batch = itertools.count()

    @settings(max_examples=400 if LONG else 25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(fields=st.lists(FIELDS, min_size=1, max_size=8), filters=st.lists(FILTERS, min_size=4, max_size=8))
    def check(fields: list[dict[str, Any]], filters: list[dict[str, Any]]) -> None:
        mine = shelf.for_user(f"user-{next(batch)}")
        documents = [Document(str(number), "", each) for number, each in enumerate(fields)]
        mine.upsert_many(documents)
        for where in filters:
            if _is_known_fault(where):
                continue
            wanted = sorted(each.id for each in documents if meets(each.fields, where))
            note(str(where))
            assert sorted(ids(mine.documents(where))) == wanted
            assert mine.count(where) == len(wanted)
        assert mine.delete_many(where) == len(wanted)
        assert mine.count() == len(documents) - len(wanted)

    check()


def _is_known_fault(where: dict[str, Any]) -> bool:
    """A real server takes "X and not X" of an indexed keyword for true."""
    return "QDRANT_TEST_URL" in os.environ and "ne" in str(where) and "or" in where


BAD_FILTERS: dict[str, tuple[Any, str]] = {
    "another type": ([1], "where: a mapping from field to value is needed"),
    "an unknown field": ({"symbl": 1}, "'symbl' is not among the indexes, did you mean 'symbol'"),
    "the user": ({"user_id": "bob"}, "'user_id' is not among the indexes"),
    "what is kept beneath": ({"field_symbol": "NQ"}, "not among the indexes"),
    "a path": ({"symbol.x": 1}, "not among the indexes"),
    "an operator of others": ({"$or": []}, "not among the indexes"),
    "an unknown operator": ({"size": {"$gt": 1}}, "gt, gte, lt, lte, ne or text are needed, got '.gt'"),
    "no operator": ({"size": {}}, "gt, gte, lt, lte, ne or text are needed, got none"),
    "an or of something else": ({"or": {"size": 1}}, "'or' takes a list of mappings"),
    "an or in an or": ({"or": [{"or": []}]}, "'or' stands at the top alone"),
    "no mapping in an or": ({"or": [5]}, "a mapping from field to value"),
    "a range of keywords": ({"symbol": {"gt": "A"}}, "gt needs an integer, float or datetime index"),
    "words of a keyword": ({"symbol": {"text": "A"}}, "text needs a text index"),
    "a text as a whole": ({"note": "A"}, "a text index is searched for words"),
    "a number for a keyword": ({"symbol": 5}, r"where\['symbol'\]: a string is needed"),
    "a bool for a number": ({"size": True}, r"where\['size'\]: an integer"),
    "a number for a bool": ({"won": 1}, "True or False is needed"),
    "no number": ({"gain": math.nan}, "a number is needed"),
    "a naive time": ({"closed_at": datetime(2026, 1, 1)}, "needs a time zone"),  # noqa: DTZ001
    "a time in seconds": ({"updated_at": {"gt": 1_768_000_000}}, "looks like seconds"),
}


@pytest.mark.parametrize("name", BAD_FILTERS)
def test_a_bad_filter_is_refused(name: str) -> None:
    """What is wrong with a filter is told by every method that takes one, and nothing is done."""
    where, message = BAD_FILTERS[name]
    mine = MemoryStore().collection("trades", HashingEmbedder(4), indexes=INDEXES).for_user("ada")
    mine.upsert(Document("a", "text"))
    for call in (mine.documents, mine.count, mine.delete_many, functools.partial(mine.search, "text")):
        with pytest.raises(ValidationError, match=message):
            call(where)
    assert mine.count() == 1


# ------------------------------------------------------------------------------
# Tenant isolation
# ------------------------------------------------------------------------------

# Ids that collide when they are joined, and what an engine or a filter might take for something else.
PARTS = ["a", "b", ":", "::", "1", "11", "/", "|", "*", "%", "$or", "ä", "user_id", "a:b", " ", "None", '"']
USERS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join)
OPERATORS = st.sampled_from(["ne", "gt", "gte", "lt", "lte", "text", "$ne", "$or", "or"])
ATTACKED = st.sampled_from(["symbol", "size", "or", "$or", "user_id", "id", "ne", "note"])
ATTACKS = st.recursive(
    st.none() | USERS | st.integers() | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(ATTACKED, inner, max_size=3)
        | st.dictionaries(OPERATORS, inner, max_size=2)
    ),
    max_leaves=6,
)


def test_nobody_reads_what_is_of_another(shelf: Any) -> None:
    """Whatever ids and filters are tried, a handle shows, changes and deletes documents of its user alone."""
    attempts = itertools.count()
    rounds = 12_500 if LONG else 60

    @settings(max_examples=rounds, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        victim=USERS,
        attacker=USERS,
        document_ids=st.lists(USERS, min_size=1, max_size=3, unique=True),
        attacks=st.lists(
            st.dictionaries(USERS | st.sampled_from([*VALUES, "or"]), ATTACKS, max_size=2), max_size=4
        ),
    )
    def check(victim: str, attacker: str, document_ids: list[str], attacks: list[Any]) -> None:
        if victim == attacker:
            return
        theirs, mine = shelf.for_user(victim), shelf.for_user(attacker)
        secret = [Document(each, "secret", {"symbol": attacker, "size": 1}) for each in document_ids]
        theirs.upsert_many(secret)
        mine.upsert(Document(attacker + "x", "own", {"symbol": victim}))
        seen = list(mine.get_many(document_ids).values()) + list(
            mine.get_many([victim, victim + "x"]).values()
        )
        for document_id in document_ids:
            mine.delete(document_id)
        for where in ({"or": [{}]}, {"symbol": {"ne": "x"}}, *attacks):
            next(attempts)
            try:
                seen += mine.documents(where) + mine.documents(where, newest_first=True)
                mine.count(where)
                mine.delete_many(where)
            except ValidationError:
                pass  # refused before anything was asked
        assert {document.user_id for document in seen} <= {attacker}
        assert sorted(each.text for each in theirs.get_many(document_ids).values()) == ["secret"] * len(
            secret
        )
        theirs.delete_many({})
        mine.delete_many({})

    check()
    assert next(attempts) >= 2 * rounds // 3


def test_no_two_pairs_of_ids_share_a_point() -> None:
    """Pairs of a user and a document whose joined ids are equal have points of their own."""
    names = sorted({"".join(parts) for parts in itertools.product(["a", "b", ":", "1", "::"], repeat=3)})
    pairs = [*itertools.product(names[:80], names[:80]), *(("", name) for name in names)]
    assert len({attuned_store.document_point_id(*pair) for pair in pairs}) == len(pairs)


@needs("qdrant_client")
def test_a_server_that_answers_with_another_user(server: QdrantServer) -> None:
    """Points of another user, or under another id, are an error wherever they come: nothing is shown."""
    from qdrant_server import edit

    forged: dict[str, Any] = {}

    def forge(body: Any) -> None:
        """Put something else into every point of an answer."""
        result = body["result"]
        for point in result if isinstance(result, list) else result["points"]:
            point.update(forged)

    with QdrantStore(url=server.url, verify=False) as store:
        trades = store.collection("trades", HashingEmbedder(4), indexes=INDEXES)
        mine = trades.for_user("ada")
        mine.upsert(trade(1, "own", size=1))
        calls: list[Callable[[], Any]] = [
            functools.partial(mine.get, "t-1"),
            mine.documents,
            functools.partial(mine.documents, newest_first=True, limit=10),
            functools.partial(mine.search, "secret"),
            functools.partial(mine.search, "secret", shared=True),
            functools.partial(mine.delete, "t-1"),
            functools.partial(mine.upsert, trade(1, "new")),
        ]
        payload = {
            **attuned_store.Draft.of(
                trade(1, "secret"), attuned_store.CollectionSettings({}, "x", 4, None), "hashing-4"
            ).payload,
            "user_id": "bob",
        }
        theirs = attuned_store.document_point_id("bob", "t-1")
        own = attuned_store.document_point_id("ada", "t-1")
        answers: list[dict[str, Any]] = [
            {"id": theirs, "payload": payload},  # of another user
            {"id": own, "payload": payload},  # of another user in the place of this one's
            {"id": theirs, "payload": {**payload, "user_id": "ada"}},
            {"id": own, "payload": {}},
        ]
        for answer in answers:
            forged.update(answer)
            with server.on(edit(forge), method="POST", path="/points(/scroll|/query)?$"):
                for call in calls:
                    with pytest.raises(BackendError, match=r"nothing is|does not hold a document"):
                        call()
        assert mine.get("t-1") == trade(1, "own", size=1)


# ------------------------------------------------------------------------------
# Engines agree
# ------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "d"])
OWNERS = st.sampled_from(["ada", "bob", ""])
SIZES = st.none() | st.integers(0, 2)


class Agreement(RuleBasedStateMachine):
    """A collection in memory, and one on another engine, which is to do the same."""

    both: tuple[Collection, Collection]
    clock: Any
    step: Callable[[], int]

    def __init__(self) -> None:
        super().__init__()
        for collection in self.both:
            collection.all_users().delete_many({})
        self.maker = 0

    def _do(self, owner: str, act: Callable[[Any], Any]) -> None:
        one, other = (act(each.for_user(owner) if owner else each.shared()) for each in self.both)
        assert one == other

    @rule(owner=OWNERS, name=NAMES, text=st.sampled_from(["one", "two", "three"]), size=SIZES, ttl=SIZES)
    def upsert(self, owner: str, name: str, text: str, size: int | None, ttl: int | None) -> None:
        # A time of its own, so that the order of the newest is one.
        document = Document(name, text, {"size": size}, self.step(), None if not ttl else ttl * 10)
        self._do(owner, lambda handle: handle.upsert_many([document, document]))

    @rule(owner=OWNERS, name=NAMES)
    def delete(self, owner: str, name: str) -> None:
        self._do(owner, lambda handle: handle.delete(name))

    @rule(owner=OWNERS, size=SIZES)
    def delete_many(self, owner: str, size: int | None) -> None:
        self._do(owner, lambda handle: handle.delete_many({"size": size}))

    @rule(owner=OWNERS, text=st.sampled_from(["one", "two", "four"]), size=SIZES, shared=st.booleans())
    def search(self, owner: str, text: str, size: int | None, *, shared: bool) -> None:
        found: list[set[Any]] = []
        for each in self.both:
            handle = each.for_user(owner) if owner else each.shared()
            matches = handle.search(text, {"size": {"ne": size}}, limit=50, shared=shared)
            found.append({(match.document, round(match.score, 4)) for match in matches})
        assert found[0] == found[1]

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds * 1000

    @invariant()
    def same(self) -> None:
        """Both hold the same documents, of the same users, in the same order of time."""
        one, other = (each.all_users().documents(newest_first=True) for each in self.both)
        assert [(each, each.user_id) for each in one] == [(each, each.user_id) for each in other]
        for owner in ("ada", "bob", ""):
            self._do(owner, lambda handle: handle.get_many(["a", "b", "c", "d", "e"]))
            self._do(owner, lambda handle: (handle.count(), handle.count({"size": {"gte": 1}})))


@pytest.mark.parametrize(
    "other", [pytest.param(name, marks=needs(BACKENDS[name].library)) for name in KINDS if name != "memory"]
)
def test_two_engines_agree(other: str, tmp_path: Path, clock: Clock) -> None:
    """Whatever is done in any order, another engine shows what memory does."""
    times, embedder, options = itertools.count(NOW), Words().embedder, {"indexes": INDEXES}
    with MemoryStore() as memory, BACKENDS[other].sync(tmp_path / "store") as store:
        both = tuple(each.collection("agreed", embedder, **options) for each in (memory, store))

        class Machine(Agreement):
            pass

        Machine.both, Machine.clock, Machine.step = both, clock, staticmethod(lambda: next(times))  # type: ignore[assignment]
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=300 if LONG else 8,
                stateful_step_count=20,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        both[1].drop()


# ------------------------------------------------------------------------------
# Killed at any moment; what the documentation shows
# ------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from attuned_store import Document, open_store
from documents import Words
words, calls = Words(), int(sys.argv[4])
def embedding():
    global calls
    calls -= 1
    if not calls:
        os.kill(os.getpid(), signal.SIGKILL)
words.meanwhile = embedding
store = open_store(sys.argv[3], engine=sys.argv[6])
if sys.argv[5] == "upsert_many":
    documents = [Document(str(number), f"text {number}", updated_at=number) for number in range(60)]
    store.collection("trades", words.embedder).for_user("ada").upsert_many(documents)
else:
    words.embedder = __import__("attrs").evolve(words.embedder, name="new")
    store.collection("trades", words.embedder).refresh()
"""


@pytest.mark.parametrize("engine", [pytest.param("edge", marks=needs("qdrant_edge")), "local"])
@pytest.mark.parametrize("operation", ["upsert_many", "refresh"])
def test_what_was_killed_goes_on(engine: str, operation: str, tmp_path: Path) -> None:
    """Killed between two batches, a bulk operation done again embeds what is left, and that alone."""
    path, here = tmp_path / "store", Path(__file__).parent
    words = Words("words" if operation == "upsert_many" else "new")
    documents = [Document(str(number), f"text {number}", updated_at=number) for number in range(60)]
    if operation == "refresh":
        with QdrantStore(path=path, engine=engine) as store:
            store.collection("trades", Words().embedder).for_user("ada").upsert_many(documents)
    arguments = [str(here.parent), str(here), str(path), "4", operation, engine]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()

    with QdrantStore(path=path, engine=engine) as store:
        trades = store.collection("trades", words.embedder)
        mine = trades.for_user("ada")
        done = len(mine.search([1.0] * DIMENSIONS, limit=100))
        assert done == 24
        report = trades.refresh() if operation == "refresh" else mine.upsert_many(documents)
        assert report.embedded == len(words.given) == len(set(words.given)) == 60 - done
        assert len(mine.search([1.0] * DIMENSIONS, limit=100)) == 60
        assert sorted(mine.documents(limit=None), key=lambda each: int(each.id)) == documents

"""Portable snapshots: those of every store, bad input, the files and their faults, and the one on start."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import json
import logging
import os
import random
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import tracemalloc
import zlib
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import anyio
import pytest
from conformance import (
    BACKENDS,
    EMBEDDED,
    LIKE_SECONDS,
    NOW,
    PEOPLE,
    AsyncReplacementTests,
    AsyncSnapshotTests,
    Clock,
    SnapshotTests,
    archived,
    environment,
    needs,
    random_states,
    run_python,
    script,
    snapshot_of,
    state,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attuned_store
from attuned_store import (
    CANONICAL_AXES,
    MemoryStore,
    QdrantStore,
    SnapshotError,
    StateSnapshot,
    StateStore,
    StoreError,
    ValidationError,
    alist_snapshots,
    averify_snapshot,
    list_snapshots,
    snapshot_on_start,
    verify_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.once

LONG = bool(os.environ.get("ATTUNED_TEST_LONG"))
DATA = Path(__file__).parent / "data"  # of version 0.1 are those that are called so
MIB = 1 << 20


SERVERS = tuple(name for name in BACKENDS if name not in EMBEDDED)


class TestSnapshots(SnapshotTests):
    backends = EMBEDDED


class TestAsyncSnapshots(AsyncSnapshotTests):
    backends = EMBEDDED


class TestAsyncReplacements(AsyncReplacementTests):
    backends = EMBEDDED


@pytest.mark.once
class TestServerSnapshots(SnapshotTests):
    backends = SERVERS
    faces = ("sync", "asyncio")


@pytest.mark.once
class TestAsyncServerSnapshots(AsyncSnapshotTests):
    backends = SERVERS


# ------------------------------------------------------------------------------
# Archives made here, byte by byte
# ------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {
    "user_id": "ann",
    "axes": {"warmth": 0.5},
    "updated_at_unix_ms": 5,
    "source": "self_report",
    "confidence": 1.0,
    "schema_version": 1,
}
HEADER: dict[str, Any] = {
    "format": "attuned_store",
    "version": 2,
    "engine": "memory",
    "created_at": "2026-01-17T12:00:00.000Z",
    "collections": [{"name": "attuned_state", "kind": "states", "axes": list(CANONICAL_AXES)}],
}


def line(**fields: Any) -> bytes:
    return json.dumps({**FIELDS, **fields}).encode() + b"\n"


def header_line(**changes: Any) -> bytes:
    """A header that is right but for the changes; those of a collection are named with collection_."""
    fields = {name: value for name, value in changes.items() if not name.startswith("collection_")}
    collection = {**HEADER["collections"][0]}
    collection.update({name[11:]: value for name, value in changes.items() if name not in fields})
    return json.dumps({"header": {**HEADER, "collections": [collection], **fields}}).encode() + b"\n"


GOOD = header_line()


def stored(data: bytes) -> bytes:
    """The one gzip member in which a footer may stand, as the format says: not compressed."""
    head = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    block = struct.pack("<BHH", 1, len(data) & 0xFFFF, ~len(data) & 0xFFFF)
    return head + block + data + struct.pack("<II", zlib.crc32(data), len(data))


def footer_line(before: bytes, packed: bytes, **changes: Any) -> bytes:
    """A footer, counted as an honest writer would, but for the changes."""
    states = before.splitlines()[1:]
    users = set(re.findall(rb'"user_id": ("(?:[^"\\]|\\.)*")', b"".join(states)))
    collection = {"name": "attuned_state", "users": len(users), "states": len(states)}
    collection.update({name: changes.pop(name) for name in [*changes] if name in collection})
    digests = {
        "sha256": hashlib.sha256(before).hexdigest(),
        "gzip_sha256": hashlib.sha256(packed).hexdigest(),
    }
    return json.dumps({"footer": {"collections": [collection], **digests, **changes}}).encode() + b"\n"


def archive(*lines: bytes, header: bytes = GOOD, **changes: Any) -> bytes:
    """A snapshot of these lines whose footer is right but for the changes."""
    before = header + b"".join(lines)
    packed = gzip.compress(before, 1, mtime=0)
    return packed + stored(footer_line(before, packed, **changes))


def ending(footer: bytes | str) -> bytes:
    """A snapshot with this text as its footer."""
    return gzip.compress(GOOD + ONE, 1) + stored(footer if isinstance(footer, bytes) else footer.encode())


ONE = line()
PACKED = gzip.compress(GOOD + ONE, 1, mtime=0)
HONEST = footer_line(GOOD + ONE, PACKED).decode()


def content_of(store: StateStore) -> dict[str, list[StateSnapshot]]:
    return {user_id: store.get_history(user_id, 10**6) for user_id in store.users()}


def check_refused(path: Path, match: str, store: StateStore | None = None) -> None:
    """Verifying, and restoring in every mode, raise SnapshotError that says this; the store is as before."""
    with pytest.raises(SnapshotError, match=match) as caught:
        verify_snapshot(path)
    assert str(path) in str(caught.value)
    if store is None:
        store = MemoryStore()
        store.upsert_many(PEOPLE)
    before = content_of(store)
    for mode in ("replace", "merge", "skip"):
        with pytest.raises(SnapshotError, match=match):
            store.restore_snapshot(path, mode=cast("Any", mode))
    assert content_of(store) == before


def test_an_archive_of_another_program_is_read(tmp_path: Path) -> None:
    """An archive that another program wrote, as the format says, is restored; the order of fields is free."""
    path = tmp_path / "theirs.attuned"
    fields = dict(reversed(FIELDS.items()))
    mine = json.dumps({**fields, "updated_at_unix_ms": 7, "axes": {"warmth": 1, "formality": 0}}).encode()
    odd = line(user_id='a":"b\\', axes={}, source="mixed", confidence=0.25, schema_version=3)
    spaced = header_line(created_at="2026-01-17T13:00:00+01:00", more=[1]).replace(b":", b" : ")
    spaced = spaced.replace(b"13 : 00 : 00+01 : 00", b"13:00:00+01:00")
    path.write_bytes(archive(ONE, mine + b"\n", odd, header=spaced, more="of it"))
    store = MemoryStore()

    assert store.restore_snapshot(path).points == verify_snapshot(path).points == 3

    assert verify_snapshot(path).created_at == datetime(2026, 1, 17, 12, tzinfo=UTC)
    assert content_of(store) == {
        "ann": [
            StateSnapshot("ann", {"warmth": 1, "formality": 0}, 7),
            StateSnapshot("ann", {"warmth": 0.5}, 5),
        ],
        'a":"b\\': [StateSnapshot('a":"b\\', {}, 5, "mixed", 0.25, 3)],
    }


# ------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------

SECOND = line(updated_at_unix_ms=6)
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"warmth\n", "line 2"),
    "an empty line": (b"\n", "line 2"),
    "an array": (b"[1]\n", "an object"),
    "a string": (b'"ann"\n', "an object"),
    "null": (b"null\n", "an object"),
    "a header": (GOOD, "line 2: an object with"),
    "a footer": (HONEST.encode(), "line 2: an object with"),
    "a field too few": (line().replace(b'"confidence": 1.0, ', b""), "an object with"),
    "a field too many": (line(mood="good"), "an object with"),
    "NaN": (line(axes={"warmth": float("nan")}), "warmth"),
    "infinity": (line(axes={"warmth": float("inf")}), "warmth"),
    "NaN as confidence": (line(confidence=float("nan")), "confidence"),
    "1e999": (line().replace(b"1.0", b"1e999"), "confidence"),
    "an axis above 1": (line(axes={"warmth": 1.5}), "warmth"),
    "an axis as text": (line(axes={"warmth": "0.5"}), "warmth"),
    "an axis as bool": (line(axes={"warmth": True}), "warmth"),
    "an axis as object": (line(axes={"warmth": {}}), "warmth"),
    "axes as number": (line(axes=5), "axes"),
    "axes as null": (line(axes=None), "axes"),
    "axes as text": (line(axes="warmth"), "axes"),
    "axes as list": (line(axes=["warmth"]), "axes"),
    "a user id as number": (line(user_id=5), "user_id"),
    "a user id as list": (line(user_id=["ann"]), "user_id"),
    "an empty user id": (line(user_id=""), "user_id"),
    "half a surrogate": (line(user_id="\ud800"), "user_id"),
    "a time as text": (line(updated_at_unix_ms="5"), "updated_at_unix_ms"),
    "a time as float": (line(updated_at_unix_ms=5.0), "updated_at_unix_ms"),
    "a time as bool": (line(updated_at_unix_ms=True), "updated_at_unix_ms"),
    "a negative time": (line(updated_at_unix_ms=-1), "updated_at_unix_ms"),
    "a number of 5,000 digits": (line().replace(b" 5,", b" " + b"9" * 5000 + b","), "line 2"),
    "an unknown source": (line(source="guess"), "source"),
    "a source as number": (line(source=5), "source"),
    "a confidence as text": (line(confidence="1"), "confidence"),
    "a version as bool": (line(schema_version=True), "schema_version"),
    "not UTF-8": (line().replace(b"ann", b"\xff\xfe"), "line 2"),
    "UTF-16": (json.dumps(FIELDS).encode("utf-16-be") + b"\0\n", "line 2"),
    "a byte order mark": (b"\xef\xbb\xbf" + line(), "line 2"),
    "nested too deep": (b"[" * 100_000 + b"\n", "line 2"),
    "a name twice": (line().replace(b'"axes"', b'"user_id": "bob", "axes"'), "twice"),
    "a name twice, spaced": (line().replace(b'"axes"', b'"user_id" : "bob", "axes"'), "twice"),
    "an axis twice": (line().replace(b'{"warmth": 0.5}', b'{"warmth": 0.5, "warmth" : 0.7}'), "twice"),
    "an axis twice, escaped": (
        line().replace(b'{"warmth": 0.5}', b'{"warmth": 0.5, "\\u0077armth": 0.7}'),
        "twice",
    ),
    "no end of the last line": (line()[:-1], "no end"),
    "a state twice": (ONE + ONE, "order"),
    "states of a user out of order": (SECOND + ONE, "order"),
    "a user at two places": (ONE + line(user_id="bob") + SECOND, "stand together"),
    "a bad line behind good ones": (ONE + SECOND + b"x\n", "line 4"),
    "an axis that the header does not name": (line(axes={"valence": 1}), "valence"),
    "a line of 2 MiB": (line()[:-2] + b" " * 2 * MIB + b"}\n", "longer than"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_line_is_refused(what: str, tmp_path: Path) -> None:
    """Whatever is wrong with the states of an archive is SnapshotError that says so."""
    data, match = BAD_LINES[what]
    (tmp_path / "bad.attuned").write_bytes(archive(data, users=1, states=1))

    check_refused(tmp_path / "bad.attuned", match)


def with_header(line: bytes | str) -> bytes:
    return archive(ONE, header=line if isinstance(line, bytes) else line.encode())


BAD_ARCHIVES: dict[str, tuple[bytes, str]] = {
    # The header
    "no header": (with_header(b""), "header"),
    "an empty header": (with_header("\n"), "too early"),
    "a header that is no JSON": (with_header("{hello}\n"), "header"),
    "a header that is not UTF-8": (with_header(b'{"\xff": 1}\n'), "header"),
    "a header nested too deep": (with_header('{"header": ' + "[" * 100_000 + "\n"), "header"),
    "a header of nothing": (with_header("{}\n"), "header"),
    "a header that is a list": (with_header('{"header": []}\n'), "header"),
    "a header that is null": (with_header('{"header": null}\n'), "header"),
    "a header of another program": (with_header('{"header": {"format": "zip"}}\n'), "no portable snapshot"),
    "a header twice": (with_header(GOOD + GOOD), "line 2: an object with"),
    "a name twice in the header": (
        with_header(GOOD.replace(b'"engine"', b'"version": 2, "engine"')),
        "twice",
    ),
    "no format": (with_header(header_line(format=None)), "no portable snapshot"),
    "a newer format": (with_header(header_line(version=3)), "format 3.*upgrade"),
    "a newer format with other lines": (
        archive(b"anything\n", header=b'{"header": {"format": "attuned_store", "version": 4}}\n'),
        "format 4.*upgrade",
    ),
    "format 1": (with_header(header_line(version=1)), "version: 1"),
    "a format in words": (with_header(header_line(version="2")), "version"),
    "a format as bool": (with_header(header_line(version=True)), "version"),
    "a format as float": (with_header(header_line(version=2.0)), "version"),
    "no version": (with_header(header_line(version=None)), "version"),
    "no time": (with_header(header_line(created_at=None)), "header"),
    "a time as number": (with_header(header_line(created_at=5)), "header"),
    "a time in words": (with_header(header_line(created_at="noon")), "header: Invalid"),
    "a time without a zone": (with_header(header_line(created_at="2026-01-17T12:00:00")), "time zone"),
    "a time before all time": (with_header(header_line(created_at="0001-01-01T00:00:00+14:00")), "header"),
    "no collections": (with_header(header_line(collections=[])), "collections: one"),
    "two collections": (with_header(header_line(collections=HEADER["collections"] * 2)), "collections: one"),
    "collections as text": (with_header(header_line(collections="one")), "collections: one"),
    "collections as null": (with_header(header_line(collections=None)), "collections: one"),
    "a collection as text": (with_header(header_line(collections=["one"])), "collections: one"),
    "documents": (with_header(header_line(collection_kind="documents")), "kind 'documents': upgrade"),
    "no axes": (with_header(header_line(collection_axes=None)), "axes"),
    "an empty list of axes": (with_header(header_line(collection_axes=[])), "axes"),
    "axes as text": (with_header(header_line(collection_axes="warmth")), "axes"),
    "axes as number": (with_header(header_line(collection_axes=5)), "axes"),
    "an axis as number": (with_header(header_line(collection_axes=[5])), "axes"),
    "an axis as list": (with_header(header_line(collection_axes=[[]])), "axes"),
    "an axis twice": (with_header(header_line(collection_axes=["warmth", "warmth"])), "once"),
    "fewer axes than occur": (with_header(header_line(collection_axes=["formality"])), "warmth"),
    # The members
    "an empty file": (b"", "cut short"),
    "no gzip": (b"hello " * 1000, "damaged"),
    "a zip": (b"PK\x03\x04" + bytes(100), "damaged"),
    "a tar": (gzip.compress(tarfile.TarInfo("notes.txt").tobuf() + bytes(1024)), "notes.txt"),
    "other text": (gzip.compress(b"hello " * 1000), "no archive"),
    "nothing packed": (gzip.compress(b""), "too early"),
    "nothing packed, twice": (gzip.compress(b"") + stored(HONEST.encode()), "too early"),
    "the header alone": (gzip.compress(GOOD), "footer"),
    "half a header": (gzip.compress(GOOD[:50]), "header"),
    "no end of the last line": (archive(ONE[:-1]), "no end"),
    "no footer": (PACKED, "cut short"),
    "the footer in the first member": (gzip.compress(GOOD + ONE + HONEST.encode()), "line 3: an object with"),
    "a compressed footer": (PACKED + gzip.compress(HONEST.encode()), "packed anew"),
    "a footer with a time": (
        archive(ONE)[: len(PACKED) + 4] + b"\1" + archive(ONE)[len(PACKED) + 5 :],
        "altered",
    ),
    "packed anew": (gzip.compress(gzip.decompress(archive(ONE)), 6), "line 3: an object with"),
    "another footer": (PACKED + archive(SECOND)[-len(stored(HONEST.encode())) :], "sha256"),
    "half a footer": (archive(ONE)[:-20], "cut short"),
    "a byte less": (archive(ONE)[:-1], "cut short"),
    "a byte more": (archive(ONE) + b"x", "altered"),
    "much more": (archive(ONE) + bytes(MIB), "altered"),
    "the footer twice": (archive(ONE) + stored(HONEST.encode()), "altered"),
    "an empty member behind": (archive(ONE) + gzip.compress(b""), "altered"),
    "an empty member between": (PACKED + gzip.compress(b"") + stored(HONEST.encode()), "altered"),
    "states in a second member": (PACKED + gzip.compress(SECOND) + stored(HONEST.encode()), "altered"),
    "two archives": (archive(ONE) * 2, "altered"),
    "the lines of two archives": (
        gzip.compress(gzip.decompress(archive(ONE)) * 2),
        "line 3: an object with",
    ),
    # The footer
    "an empty footer": (ending(""), "footer"),
    "a footer without an end": (ending(HONEST[:-1]), "one line"),
    "a footer of two lines": (ending(HONEST + "\n"), "one line"),
    "a footer that is no JSON": (ending("hello\n"), "footer"),
    "a footer that is a list": (ending("[]\n"), "object"),
    "a footer that is not UTF-8": (ending(b'{"\xff": 1}\n'), "footer"),
    "a footer nested too deep": (ending("[" * 50_000 + "\n"), "footer"),
    "a footer of nothing": (ending("{}\n"), "footer"),
    "a state as footer": (ending(SECOND), "footer"),
    "a footer of 70 KB": (ending(json.dumps({"footer": {"more": "x" * 70_000}}) + "\n"), "altered"),
    "a name twice in the footer": (ending(HONEST.replace('"sha256"', '"sha256": "", "sha256"')), "twice"),
    "a count twice in the footer": (ending(HONEST.replace('"users"', '"users": 2, "users"')), "twice"),
    "no counts": (archive(ONE, collections=[]), "collections: one"),
    "counts of two collections": (archive(ONE, collections=[{}, {}]), "collections: one"),
    "counts of another collection": (archive(ONE, name="other"), "name: 'other' differs"),
    "too many users": (archive(ONE, users=2), "users: 2 differs from 1"),
    "too few users": (archive(ONE, users=0), "users: 0 differs from 1"),
    "users in words": (archive(ONE, users="1"), "users"),
    "users as bool": (archive(ONE, users=True), "users"),
    "no users": (archive(ONE, users=None), "users"),
    "too few states": (archive(ONE, states=0), "states: 0 differs from 1"),
    "too many states": (archive(ONE, states=2), "states: 2 differs from 1"),
    "states as float": (archive(ONE, states=1.0), "states"),
    "a wrong digest": (archive(ONE, sha256="0" * 64), "sha256"),
    "no digest": (archive(ONE, sha256=None), "sha256"),
    "a wrong digest of the member": (archive(ONE, gzip_sha256="0" * 64), "gzip_sha256"),
    "no digest of the member": (archive(ONE, gzip_sha256=None), "gzip_sha256"),
}


@pytest.mark.parametrize("what", BAD_ARCHIVES)
def test_a_bad_archive_is_refused(what: str, tmp_path: Path) -> None:
    """Whatever is wrong with an archive is SnapshotError that says so, and changes nothing."""
    data, match = BAD_ARCHIVES[what]
    (tmp_path / "bad.attuned").write_bytes(data)

    check_refused(tmp_path / "bad.attuned", match)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.attuned"]


def test_the_good_archive_of_these_tests_is_good(tmp_path: Path) -> None:
    """What the bad archives are made from would be read."""
    (tmp_path / "good.attuned").write_bytes(archive(ONE))

    assert verify_snapshot(tmp_path / "good.attuned").points == 1


@pytest.fixture(scope="module")
def small() -> bytes:
    """A small snapshot, as a store writes it."""
    with tempfile.TemporaryDirectory() as directory:
        return snapshot_of(PEOPLE, Path(directory)).read_bytes()


def test_verifying_and_listing_have_asynchronous_forms(tmp_path: Path) -> None:
    """averify_snapshot and alist_snapshots do the same in a worker thread, progress included."""
    path = snapshot_of(PEOPLE, tmp_path)
    calls: list[tuple[int, int | None]] = []

    async def both() -> tuple[Any, Any]:
        verified = await averify_snapshot(path, progress=lambda *call: calls.append(call))
        return verified, await alist_snapshots(tmp_path)

    verified, (listed,) = anyio.run(both)

    assert (verified.path, verified.points, listed.path) == (path, 7, path)
    assert calls == [(7, None)]


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A store that holds something, which reads in small blocks."""
    monkeypatch.setattr(attuned_store.GzipReader, "block_bytes", 400)
    monkeypatch.setattr(attuned_store.ArchiveReader, "block_bytes", 400)
    store = MemoryStore()
    store.upsert_many([state("zoe", 1), state("ann", 99)])
    return store


def check_damaged(store: StateStore, path: Path, data: bytes, what: object) -> None:
    path.write_bytes(data)
    before = content_of(store)
    for attempt in (verify_snapshot, store.restore_snapshot):
        try:
            attempt(path)
        except SnapshotError as error:
            assert str(path) in str(error)  # noqa: PT017 - any other error is the failure
        else:
            pytest.fail(f"accepted: {what}")
    assert content_of(store) == before, what


def test_a_snapshot_cut_anywhere_is_refused(small: bytes, holder: MemoryStore, tmp_path: Path) -> None:
    """A file cut short at any byte is SnapshotError, and changes nothing."""
    for length in range(len(small)):
        check_damaged(holder, tmp_path / "cut.attuned", small[:length], length)
    (tmp_path / "whole.attuned").write_bytes(small)
    assert holder.restore_snapshot(tmp_path / "whole.attuned").points == len(PEOPLE)


def test_a_snapshot_altered_anywhere_is_refused(small: bytes, holder: MemoryStore, tmp_path: Path) -> None:
    """A file with any byte altered is SnapshotError, and changes nothing."""
    for position, byte in enumerate(small):
        altered = small[:position] + bytes([byte ^ 0xFF]) + small[position + 1 :]
        check_damaged(holder, tmp_path / "altered.attuned", altered, position)


@pytest.mark.once
def test_a_single_altered_bit_is_refused(small: bytes, holder: MemoryStore, tmp_path: Path) -> None:
    """A file with a single bit altered, wherever that is, is SnapshotError."""
    path, bits, seed = tmp_path / "altered.attuned", range(8 * len(small)), random.randrange(10**6)
    for number in bits if LONG else random.Random(seed).sample(bits, len(small)):
        position, bit = divmod(number, 8)
        altered = small[:position] + bytes([small[position] ^ 1 << bit]) + small[position + 1 :]
        path.write_bytes(altered)
        try:
            verify_snapshot(path)
        except SnapshotError:
            continue
        pytest.fail(f"accepted: bit {bit} of byte {position} altered")


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    """Directories, FIFOs and what is not there are SnapshotError, and nothing waits for a FIFO."""
    (tmp_path / "dir.attuned").mkdir()
    os.mkfifo(tmp_path / "fifo.attuned")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop.attuned").symlink_to(tmp_path / "loop.attuned")

    check_refused(tmp_path / "dir.attuned", "not a file")
    check_refused(tmp_path / "fifo.attuned", "not a file")
    check_refused(tmp_path / "fifo", "not a file")
    check_refused(tmp_path / "missing.attuned", "cannot be read: No such file")
    check_refused(tmp_path / "loop.attuned", "cannot be read")
    check_refused(tmp_path / ("a" * 300), "cannot be read")
    with pytest.raises(SnapshotError, match="cannot be read"):
        verify_snapshot("~nobody-of-this-name/x.attuned")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that may not be opened, or fails while it is read, is SnapshotError."""
    path = snapshot_of(PEOPLE, tmp_path)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        check_refused(path, "cannot be read: Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(attuned_store.GzipReader, "_read", fail)
        check_refused(path, "cannot be read: Input/output error")


def test_a_footer_may_be_large_but_not_larger(tmp_path: Path) -> None:
    """A footer of as many bytes as are read is a good one, in verifying and in the list; of one more not."""
    path = tmp_path / "20260117T120000.000Z-a.attuned"
    room = (1 << 16) - len(stored(HONEST.encode())) - len(', "more": ""')

    path.write_bytes(archive(ONE, more="x" * room))
    assert verify_snapshot(path).points == 1
    assert [report.points for report in list_snapshots(tmp_path)] == [1]
    path.write_bytes(archive(ONE, more="x" * (room + 1)))
    check_refused(path, "own footer")
    assert [report.status for report in list_snapshots(tmp_path)] == ["failed"]


@pytest.mark.parametrize("size", [-1, -512, -1024, 1 << 40, 1 << 63, 1 << 80])
def test_a_native_snapshot_with_an_absurd_size_is_refused(size: int, tmp_path: Path) -> None:
    """A member that claims to be larger than the file, or smaller than nothing, is SnapshotError at once."""
    header = tarfile.TarInfo("a")
    header.size = size
    path = tmp_path / "a.snap"
    path.write_bytes(tarfile.TarInfo("b").tobuf() * 2 + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))

    with pytest.raises(SnapshotError, match="cut short, or damaged"):
        verify_snapshot(path)


def test_what_could_not_be_restored_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that gives a user at two places, or out of order, has no snapshot rather than a bad one."""
    pages: tuple[list[StateSnapshot], ...] = ()

    async def wrong_page(cursor: Any) -> Any:
        number = cursor or 0
        return attuned_store.StatesPage(pages[number], number + 1 if number + 1 < len(pages) else None)

    store = MemoryStore()
    monkeypatch.setattr(store._backend, "states", wrong_page)
    ann, bob, later = state("ann", 1), state("bob", 1), state("ann", 2)
    for wrong, said in (
        (([ann], [bob], [later]), "stand together"),
        (([later, ann],), "order"),
        (([ann], [ann]), "order"),
        (([state("ann", axes={"valence": 1})],), "valence"),
    ):
        pages = wrong
        with pytest.raises(SnapshotError, match=said):
            store.create_snapshot(tmp_path)
        assert list(tmp_path.iterdir()) == []
    pages = ([ann], [later], [bob])
    assert store.create_snapshot(tmp_path, keep=1).users == 2


def test_another_file_is_said_to_be_no_snapshot(tmp_path: Path) -> None:
    """A file of another kind is not mistaken for a damaged snapshot of a server."""
    (tmp_path / "notes.txt").write_text("hello")

    with pytest.raises(SnapshotError, match=r"notes\.txt: is no portable snapshot"):
        MemoryStore().restore_snapshot(tmp_path / "notes.txt")
    with pytest.raises(SnapshotError, match="not a snapshot of a server"):
        verify_snapshot(tmp_path / "notes.txt")


def test_a_file_that_changes_while_it_is_restored_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is another one when it is read again, after it was verified, is SnapshotError."""
    path, other = snapshot_of(PEOPLE, tmp_path / "a"), snapshot_of(PEOPLE[:3], tmp_path / "b")
    store = MemoryStore()

    verifying = attuned_store.SnapshotFile.verifying

    def verifying_and_changing(saved: Any, *arguments: Any) -> Iterator[int]:
        yield from verifying(saved, *arguments)
        other.replace(path)

    monkeypatch.setattr(attuned_store.SnapshotFile, "verifying", verifying_and_changing)

    with pytest.raises(SnapshotError, match="changed while it was read"):
        store.restore_snapshot(path, mode="merge")


# Memory


class Deflated:
    """A gzip file whose contents are a few pieces repeated as often as wanted, made without holding them."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._crc = self._size = 0
        self._digest = hashlib.sha256()
        self._put(b"\x1f\x8b\x08\0\0\0\0\0\x04\x03")

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def add(self, data: bytes, times: int = 1) -> None:
        """Compressed once: a flushed block may be repeated."""
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        block = packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)
        for _ in range(times):
            self._put(block)
            self._crc = zlib.crc32(data, self._crc)
        self._size += len(data) * times

    def finish(self) -> None:
        self._put(b"\x03\0" + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF))
        counts = {"name": "attuned_state", "users": 1, "states": 1}
        digests = {"sha256": "0" * 64, "gzip_sha256": self._digest.hexdigest()}
        footer = {"footer": {"collections": [counts], **digests}}
        self._file.write(stored(json.dumps(footer).encode() + b"\n"))
        self._file.close()


def a_line_of_1_gib(out: Deflated) -> None:
    out.add(GOOD)
    out.add(b"a" * MIB, 1024)


def a_header_of_1_gib(out: Deflated) -> None:
    out.add(GOOD[:-3] + b', "more": "')
    out.add(b"a" * MIB, 1024)


def zeros_behind_the_end(out: Deflated) -> None:
    out.add(GOOD + ONE)
    out.add(bytes(MIB), 1024)


def many_empty_lines(out: Deflated) -> None:
    out.add(GOOD)
    out.add(b"\n" * MIB, 1024)


def a_line_of_many_lists(out: Deflated) -> None:
    out.add(GOOD + b"[")
    out.add(b"[],[],[],[]," * 80_000 + b"[]]\n")


def a_header_of_many_lists(out: Deflated) -> None:
    out.add(b'{"header": [')
    out.add(b"[],[],[],[]," * 80_000 + b"[]]}\n")


def one_state_again_and_again(out: Deflated) -> None:
    out.add(GOOD)
    out.add(ONE * 10_000, 100)


def an_old_member_of_1_gib(out: Deflated) -> None:
    header = tarfile.TarInfo("snapshots-00000.jsonl")
    header.size = 1 << 30
    out.add(header.tobuf())
    out.add(b"a" * MIB, 1024)


def an_old_manifest_of_1_gib(out: Deflated) -> None:
    header = tarfile.TarInfo("manifest.json")
    header.size = 1 << 30
    out.add(header.tobuf())
    out.add(b"[],[],[],[]," * 87_381, 1024)


@pytest.mark.parametrize(
    "bomb",
    [
        a_line_of_1_gib,
        a_header_of_1_gib,
        zeros_behind_the_end,
        many_empty_lines,
        a_line_of_many_lists,
        a_header_of_many_lists,
        one_state_again_and_again,
        an_old_member_of_1_gib,
        an_old_manifest_of_1_gib,
    ],
)
def test_no_archive_takes_up_much_memory(bomb: Callable[[Deflated], None], tmp_path: Path) -> None:
    """An archive that unpacks to gigabytes is refused within a few MiB, whether it is read or listed."""
    path = tmp_path / "20260117T120000.000Z-bomb.attuned"
    out = Deflated(path)
    bomb(out)
    out.finish()
    assert path.stat().st_size < 3 * MIB

    tracemalloc.start()
    try:
        with pytest.raises(SnapshotError, match=r"bytes|longer|line [12]|header|order"):
            MemoryStore().restore_snapshot(path)
        assert len(list_snapshots(tmp_path)) == 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 48 * MIB


@pytest.mark.once
def test_memory_does_not_grow_with_the_number_of_states(tmp_path: Path) -> None:
    """Creating and verifying take the same memory for many states as for few."""

    def peak_of(number: int) -> int:
        """How much a store takes of so many users, whose states are made while they are read."""

        async def states(cursor: Any) -> Any:
            start = cursor or 0
            stop = min(start + 64, number)
            made = [state(f"user-{each}", each) for each in range(start, stop)]
            return attuned_store.StatesPage(made, stop if stop < number else None)

        store = MemoryStore()
        store._backend.states = states  # type: ignore[method-assign]
        tracemalloc.start()
        try:
            path = store.create_snapshot(tmp_path).path
            assert path is not None
            assert verify_snapshot(path).points == number
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_of(100)
    few, many = peak_of(4_000), peak_of(14_000)

    assert many < few + 64 * 10_000, (few, many)


# Any content

names = st.sampled_from(CANONICAL_AXES)
values = st.floats(0, 1)
ids = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60)
snapshots = st.builds(
    StateSnapshot,
    user_id=ids,
    axes=st.dictionaries(names, values, max_size=23),
    updated_at_unix_ms=st.integers(0, 253402300799999).filter(lambda time_ms: time_ms not in LIKE_SECONDS),
    source=st.sampled_from(["self_report", "inferred", "mixed"]),
    confidence=values,
    schema_version=st.integers(1, 2**63 - 1),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states=st.lists(snapshots, max_size=20), block_bytes=st.sampled_from([1, 200, 1000, 1 << 18]))
def test_any_content_comes_back_from_a_snapshot(states: list[StateSnapshot], block_bytes: int) -> None:
    """Whatever a store holds, its snapshot gives the same back, to the last bit."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(attuned_store.ArchiveWriter, "block_bytes", block_bytes)
        patch.setattr(attuned_store.GzipReader, "block_bytes", block_bytes)
        patch.setattr(attuned_store.ArchiveReader, "block_bytes", block_bytes)
        store, other = MemoryStore(max_history_per_user=99), MemoryStore(max_history_per_user=99)
        store.upsert_many(states)
        path = store.create_snapshot(directory).path
        assert path is not None
        other.restore_snapshot(path)

        found = content_of(store)
        assert content_of(other) == found
        assert archived(path) == {user_id: history[::-1] for user_id, history in found.items()}


# ------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------


def filled() -> MemoryStore:
    store = MemoryStore()
    store.upsert_many(random_states(50, 1))
    return store


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path, read_only: Path) -> None:
    """A directory below a file, or in a read-only place, is SnapshotError with its path."""
    (tmp_path / "file").write_text("precious")

    for place in (tmp_path / "file", tmp_path / "file" / "deeper", read_only / "snapshots"):
        with pytest.raises(SnapshotError, match=f"{place.name}: cannot be made"):
            filled().create_snapshot(place)
    with pytest.raises(SnapshotError, match="cannot be made"):
        filled().create_snapshot("~nobody-of-this-name/\N{SNOWMAN}" + "a" * 300)
    assert (tmp_path / "file").read_text() == "precious"


def fail_with(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["open", "fsync", "link"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_failing_system_call_leaves_no_file(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails while a snapshot is written is SnapshotError; no file is left, and no older one gone."""
    store, (older,) = filled(), [filled().create_snapshot(tmp_path).path]
    monkeypatch.setattr(os, call, fail_with(number))
    if call == "link":  # a file system without links renames
        monkeypatch.setattr(Path, "rename", fail_with(number))

    with pytest.raises(SnapshotError, match=f"cannot be written: {os.strerror(number)}") as caught:
        store.create_snapshot(tmp_path, keep=1)

    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [older]


def test_a_directory_that_cannot_be_synced_has_no_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the new name may not survive a power cut, it is taken back."""
    monkeypatch.setattr(attuned_store, "fsync", fail_with(errno.EIO))

    with pytest.raises(SnapshotError, match="cannot be written"):
        filled().create_snapshot(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no links the file is renamed, and overwrites nothing."""
    monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
    monkeypatch.setattr(attuned_store.wall_clock, "now_ms", lambda: NOW)

    paths = [filled().create_snapshot(tmp_path).path for _ in range(3)]

    assert len(set(paths)) == 3
    assert names_in(tmp_path) == sorted(path.name for path in paths if path)


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no locks snapshots are taken all the same, and nothing is taken for abandoned."""
    (tmp_path / ".attuned-0123456789abcdef.tmp").write_text("whose?")
    monkeypatch.setattr(attuned_store, "lock_descriptor", fail_with(errno.ENOLCK))

    report = filled().create_snapshot(tmp_path)

    assert names_in(tmp_path) == [".attuned-0123456789abcdef.tmp", report.snapshot_name]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from attuned_store import MemoryStore, QdrantStore, SnapshotError, StateSnapshot
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = MemoryStore()
store.upsert_many([StateSnapshot(f"user-{n}", {"warmth": n / 30000}, n) for n in range(30000)])
directory, limit = Path(sys.argv[1]), int(sys.argv[2])
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
try:
    store.create_snapshot(directory)
except SnapshotError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, before)
print([path.name for path in directory.iterdir()])
"""


@pytest.mark.once
@pytest.mark.parametrize("limit", [0, 5_000, 100_000])
def test_a_full_disk_leaves_no_file(limit: int, tmp_path: Path) -> None:
    """Where there is no room for the file, SnapshotError says so, and nothing is left."""
    done = run_python(FULL_DISK, tmp_path / "snapshots", limit)

    first, second = done.stdout.splitlines()
    assert "snapshots: cannot be written: File too large" in first, done.stderr
    assert (second, done.stderr) == ("[]", "")


def test_snapshots_of_one_millisecond_have_names_of_their_own(tmp_path: Path, clock: Clock) -> None:
    """Two snapshots of the same millisecond do not overwrite each other."""
    clock.now = 1_768_651_200_123
    store = filled()

    names = [store.create_snapshot(tmp_path).snapshot_name for _ in range(3)]

    assert names == [f"20260117T120000.{number}Z-attuned_state.attuned" for number in (123, 124, 125)]
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_keep_removes_only_older_snapshots_of_the_same_kind(tmp_path: Path, clock: Clock) -> None:
    """Beyond the newest so many, files of the same collection and kind are removed, and no others."""
    store = filled()
    others = [
        "20200101T000000.000Z-attuned_state.snap",
        "20200101T000000.000Z-attuned_state.snap.sha256",
        "20200101T000000.000Z-attuned_state2.attuned",
        "20200101T000000.000Z-other-attuned_state.attuned",
        "20200101T000000.000Z-attuned_state.attuned.bak",
        "20200101-attuned_state.attuned",
        "attuned_state.attuned",
        "copy of 20200101T000000.000Z-attuned_state.attuned",
        "notes.txt",
    ]
    for name in others:
        (tmp_path / name).write_text("precious")
    (tmp_path / "20200102T000000.000Z-attuned_state.attuned").mkdir()
    (tmp_path / "20200103T000000.000Z-attuned_state.attuned").symlink_to(tmp_path / "notes.txt")
    before = names_in(tmp_path)

    made: list[str] = []
    for number in range(5):
        clock.now = NOW + number * 1000
        made.append(cast("str", store.create_snapshot(tmp_path).snapshot_name))
    assert names_in(tmp_path) == sorted([*before, *made])
    clock.now = NOW + 9000
    made.append(cast("str", store.create_snapshot(tmp_path, keep=3).snapshot_name))

    assert names_in(tmp_path) == sorted([*before, *made[-3:]])
    clock.now = NOW + 19000
    made.append(cast("str", store.create_snapshot(tmp_path, keep=1).snapshot_name))
    assert names_in(tmp_path) == sorted([*before, made[-1]])


def test_keep_counts_good_snapshots_of_the_past_alone(tmp_path: Path, clock: Clock) -> None:
    """What is dated in the future, or never, or is damaged, neither counts nor is removed."""
    store, made = filled(), []
    for number in range(4):
        clock.now = NOW + number
        made.append(cast("Path", store.create_snapshot(tmp_path).path))
    stamp = made[0].name.index("-")
    strange = {
        "29990101T000000.000Z": made[0].read_bytes(),  # the future
        "20250199T000000.000Z": made[0].read_bytes(),  # no date
        "20260101T000000.001Z": b"",
        "20260101T000000.002Z": b"hello",
        "20260101T000000.003Z": made[0].read_bytes()[:-1],
        "20260101T000000.004Z": made[0].read_bytes()[:100],
        "20260101T000000.005Z": b"x" + made[0].read_bytes()[1:],
        "20260101T000000.006Z": gzip.compress(b""),
        "20260101T000000.007Z": (DATA / "0.1-history.attuned").read_bytes()[:-5],
    }
    for when, data in strange.items():
        (tmp_path / f"{when}{made[0].name[stamp:]}").write_bytes(data)
    old = tmp_path / f"20260101T000000.000Z{made[0].name[stamp:]}"
    old.write_bytes((DATA / "0.1-history.attuned").read_bytes())
    before = {*names_in(tmp_path)}

    clock.now = NOW + 10
    made.append(cast("Path", store.create_snapshot(tmp_path, keep=5).path))
    assert {*names_in(tmp_path)} == {*before, made[4].name} - {old.name}
    clock.now = NOW + 11
    made.append(cast("Path", store.create_snapshot(tmp_path, keep=2).path))
    assert {*names_in(tmp_path)} == {*before, *(path.name for path in made[4:])} - {
        old.name,
        *(path.name for path in made[:4]),
    }


def test_nothing_is_removed_before_the_new_file_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where reading the new snapshot back fails, older ones stay and the new one goes."""
    store = filled()
    kept = [store.create_snapshot(tmp_path).path for _ in range(3)]

    class Rotten(attuned_store.GzipReader):
        def _read(self) -> bytes:
            return super()._read().replace(b"\x00\x00", b"\x00\x01")

    with monkeypatch.context() as patch:
        patch.setattr(attuned_store, "GzipReader", Rotten)
        with pytest.raises(SnapshotError, match=tmp_path.name):
            store.create_snapshot(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(attuned_store.GzipReader, "sha256", lambda self: "0" * 64)
        with pytest.raises(SnapshotError, match="read back"):
            store.create_snapshot(tmp_path, keep=1)
    assert sorted(tmp_path.iterdir()) == kept

    store.create_snapshot(tmp_path, keep=1)
    assert len(names_in(tmp_path)) == 1


def test_an_older_snapshot_that_cannot_be_removed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new snapshot is there: what cannot be removed is logged."""
    store = filled()
    store.create_snapshot(tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(attuned_store, "snapshots_in", fail_with(errno.EACCES))
        assert store.create_snapshot(tmp_path, keep=1).status == "completed"

    assert "removing older snapshots" in caplog.text
    assert len(names_in(tmp_path)) == 2


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    """Temporary files that nobody writes are removed by the next snapshot, those of the living are not."""
    (tmp_path / ".attuned-00000000000000aa.tmp").write_text("left")
    (tmp_path / "20200101T000000.000Z-attuned_state.snap.sha256").write_text("of a file that never came")
    (tmp_path / "precious").write_text("precious")
    for name in (".attuned-00000000000000bb.tmp", "20200103T000000.000Z-a.snap.sha256"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    (tmp_path / ".attuned-00000000000000cc.tmp").symlink_to(tmp_path / "never")
    (tmp_path / ".attuned-00000000000000dd.tmp").mkdir()
    others = [".attuned-short.tmp", "other.tmp", "backup.snap.sha256", "20200104T000000.000Z-a.snap"]
    for name in [*others, "20200104T000000.000Z-a.snap.sha256"]:
        (tmp_path / name).write_text("theirs")
    living = [tmp_path / ".attuned-00000000000000ee.tmp", tmp_path / "20200102T000000.000Z-a.snap.sha256"]
    before = names_in(tmp_path)

    with living[0].open("w") as one, living[1].open("w") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        fcntl.flock(two, fcntl.LOCK_EX)
        made = filled().create_snapshot(tmp_path).snapshot_name
        gone = [".attuned-00000000000000aa.tmp", "20200101T000000.000Z-attuned_state.snap.sha256"]
        expected = {*before, made, *(path.name for path in living)} - {*gone}
        assert set(names_in(tmp_path)) == expected
    made = filled().create_snapshot(tmp_path).snapshot_name
    assert set(names_in(tmp_path)) == {*expected, made} - {path.name for path in living}
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_file_that_another_process_took_for_abandoned_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that another process locks, or removes, before its maker has locked it, is made again."""
    lock = attuned_store.lock_descriptor
    made: list[int] = []

    def be_late(descriptor: int) -> None:
        made.append(descriptor)
        (path,) = tmp_path.glob(".attuned-*.tmp")
        if len(made) == 1:
            path.unlink()
        if len(made) == 2:
            path.unlink()
            raise BlockingIOError
        lock(descriptor)

    monkeypatch.setattr(attuned_store, "lock_descriptor", be_late)

    report = filled().create_snapshot(tmp_path)

    assert len(made) == 3
    assert names_in(tmp_path) == [report.snapshot_name]


def test_snapshots_are_listed_newest_first(tmp_path: Path, clock: Clock) -> None:
    """list_snapshots tells of every snapshot in a directory, and of nothing else."""
    store = filled()
    made = []
    for number in (0, 2, 1):
        clock.now = NOW + number
        made.append(store.create_snapshot(tmp_path))
    (tmp_path / "20200101T000000.000Z-a.snap").write_bytes(b"any")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "20200101T000000.000Z-a.attuned").mkdir()

    found = list_snapshots(str(tmp_path))

    *ours, theirs = found
    assert [report.path for report in ours] == [made[1].path, made[2].path, made[0].path]
    for report, written in zip(ours, (made[1], made[2], made[0]), strict=True):
        assert (report.status, report.kind, report.bytes) == ("completed", "portable", written.bytes)
        assert (report.points, report.users, report.axes) == (50, written.users, CANONICAL_AXES)
        assert report.created_at == written.created_at
        assert report.created_at.tzinfo is UTC
    assert (theirs.path, theirs.kind) == (tmp_path / "20200101T000000.000Z-a.snap", "native")
    assert (theirs.status, theirs.created_at) == ("failed", datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(SnapshotError, match="missing"):
        list_snapshots(tmp_path / "missing")


def test_the_configured_directory_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a directory the configured one is listed, in both forms."""
    monkeypatch.setenv("QDRANT_SNAPSHOT_DIR", str(tmp_path / "set"))
    path = filled().create_snapshot().path

    assert [report.path for report in list_snapshots()] == [path]
    assert [report.path for report in anyio.run(alist_snapshots)] == [path]


def test_blanks_around_the_configured_directory_are_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QDRANT_SNAPSHOT_DIR with blanks around it, or a line end, names the directory without them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QDRANT_SNAPSHOT_DIR", f" {tmp_path / 'set'}\n")
    path = filled().create_snapshot().path
    assert path is not None
    assert path.parent == tmp_path / "set"

    monkeypatch.setenv("QDRANT_SNAPSHOT_DIR", "  ")
    path = filled().create_snapshot().path
    assert path is not None
    assert path.parent == tmp_path / "data/qdrant/snapshots"


def test_one_unreadable_file_does_not_end_the_list(tmp_path: Path, clock: Clock) -> None:
    """A file that is damaged, empty or may not be read is listed as failed, with what is wrong."""
    paths = []
    for number in range(5):
        clock.now = NOW + number
        paths.append(cast("Path", filled().create_snapshot(tmp_path).path))
    whole = paths[1].read_bytes()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(whole[:-1])
    paths[3].write_bytes(archive(ONE, header=header_line(version=9)))
    if os.getuid():
        paths[4].chmod(0)
    else:
        paths[4].write_bytes(b"hello")

    good, *bad = reversed(list_snapshots(tmp_path))

    assert (good.status, good.points, good.message) == ("completed", 50, "")
    assert [report.path for report in bad] == paths[1:]
    for report, said in zip(
        bad, ("cut short", "cut short", "upgrade", "cannot be read|damaged"), strict=True
    ):
        assert (report.status, report.kind, report.points, report.axes) == ("failed", "portable", None, None)
        assert re.search(said, report.message)
        assert str(report.path) in report.message
        json.dumps(report.to_dict())


def test_listing_does_not_read_what_is_between(tmp_path: Path) -> None:
    """The list looks at header and footer: what is damaged between is found by verifying alone."""
    store = MemoryStore()
    store.upsert_many(random_states(3_000, 1))
    path = snapshot_path(store, tmp_path)
    data = bytearray(path.read_bytes())
    assert len(data) > 400_000
    data[300_000] ^= 1
    path.write_bytes(data)

    assert [report.points for report in list_snapshots(tmp_path)] == [3_000]
    with pytest.raises(SnapshotError):
        verify_snapshot(path)


@pytest.mark.parametrize("version", ["now", "0.1"])
def test_the_axes_are_known_before_all_is_read(version: str, tmp_path: Path) -> None:
    """A file tells its axes before it is restored; one of version 0.1 once it is read."""
    path = DATA / "0.1-parts.attuned"
    if version == "now":
        path = snapshot_of([state("ann", axes={"valence": 1})], tmp_path, axes=["valence", "arousal"])
    saved = attuned_store.SnapshotFile(path)

    header = saved.header()
    assert (header and header.axes) == (("valence", "arousal") if version == "now" else None)
    assert saved.contents is None
    assert saved.axes() == ("valence", "arousal")
    assert (saved.contents is None) == (version == "now")
    saved.verify()
    assert saved.contents is not None
    assert header in (None, saved.contents)


def test_a_name_that_a_terminal_would_obey_is_shown_escaped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Names with escape sequences, line ends or bytes that are no text are written as escapes in messages."""
    caplog.set_level(logging.INFO, logger="attuned_store")
    evil = tmp_path / "a\x1b[2J\nb\u202ec\udcff"
    evil.mkdir()
    path = filled().create_snapshot(evil).path
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1])
    (other := evil / "x.snap").write_bytes(b"hello")
    shown = r"a\x1b[2J\nb\u202ec\udcff"

    said = [record.getMessage() for record in caplog.records]
    said += [str(report.message) for report in list_snapshots(evil)]
    for attempt in (
        lambda: verify_snapshot(path),
        lambda: verify_snapshot(other),
        lambda: filled().restore_snapshot(path),
        lambda: filled().restore_snapshot(other),
        lambda: list_snapshots(evil / "missing"),
        lambda: filled().create_snapshot(other),
    ):
        with pytest.raises(SnapshotError) as caught:
            attempt()
        said.append(str(caught.value))
    assert len(said) == 8
    for text in said:
        assert shown in text
        assert text.isprintable()


def test_a_snapshot_that_goes_while_it_is_listed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that another process removes meanwhile is no error."""
    path = filled().create_snapshot(tmp_path).path
    gone = tmp_path / "20200101T000000.000Z-a.attuned"
    monkeypatch.setattr(attuned_store, "snapshots_in", lambda directory: [path, gone])

    assert [report.path for report in list_snapshots(tmp_path)] == [path]


# ------------------------------------------------------------------------------
# Interrupted
# ------------------------------------------------------------------------------

# Forks a worker for every line of input, lets it run for so many seconds once it has begun, and kills it.
NURSERY = """
import importlib, itertools, os, signal, sys, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import attuned_store
from attuned_store import QdrantStore
what, engine, path, *files = sys.argv[1:]
importlib.import_module({"edge": "qdrant_edge", "local": "qdrant_client.local.qdrant_local"}[engine])
def work(begun):
    store = QdrantStore(path=path, engine=engine)
    os.write(begun, b"!")
    for number in itertools.count():
        if what == "create":
            store.create_snapshot(files[0], keep=2)
        else:
            store.restore_snapshot(files[number % 2])
for seconds in sys.stdin:
    begun, begins = os.pipe()
    if not (worker := os.fork()):
        os.close(begun)
        work(begins)
    os.close(begins)
    os.read(begun, 1)
    time.sleep(float(seconds))
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    os.close(begun)
    print("killed", flush=True)
"""
KILLS = 17 if LONG else 4  # of each of three: 51 or 12


@contextmanager
def nursery(*arguments: object) -> Iterator[Callable[[float], None]]:
    """A function that lets a worker run for so many seconds and kills it."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(script(NURSERY, *arguments), env=environment(), **pipes) as process:

        def kill_after(seconds: float) -> None:
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
            assert process.stdout.readline() == "killed\n"

        try:
            yield kill_after
        finally:
            process.stdin.close()


def tree(path: Path) -> list[str]:
    """The names of what is in a directory of a store, those of the engine's own files left out."""
    return sorted(
        str(found.relative_to(path)) for found in path.rglob("*") if len(found.relative_to(path).parts) <= 2
    )


def pattern(names: list[str]) -> list[str]:
    """The same with the generations of a collection made alike."""
    return sorted(re.sub(r"/attuned_state(@\d+)?$", "/*", name) for name in names)


@pytest.mark.once
@needs("qdrant_edge", "qdrant_client")
def test_a_process_killed_while_it_takes_snapshots_leaves_whole_ones(tmp_path: Path) -> None:
    """Killed at any moment of taking a snapshot, a process leaves no partial file under a final name."""
    seed = random.randrange(10**6)
    moments, directory = random.Random(seed), tmp_path / "snapshots"
    with QdrantStore(path=tmp_path / "store", engine="edge") as store:
        store.upsert_many(random_states(400, 2))
        before = content_of(store)

    with nursery("create", "edge", tmp_path / "store", directory) as kill_after:
        for number in range(KILLS):
            kill_after(moments.uniform(0, 0.12))
            for report in list_snapshots(directory) if directory.exists() else []:
                assert verify_snapshot(cast("Path", report.path)).points == 400, f"seed {seed}, {number}"
            with QdrantStore(path=tmp_path / "store") as store:
                assert store.count() == 400, f"seed {seed}, {number}"

    with QdrantStore(path=tmp_path / "store") as store:
        assert content_of(store) == before
        report = store.create_snapshot(directory, keep=1)
    assert names_in(directory) == [report.snapshot_name], f"seed {seed}"


@pytest.mark.once
@pytest.mark.parametrize(
    "engine",
    [pytest.param("edge", marks=needs("qdrant_edge")), pytest.param("local", marks=needs("qdrant_client"))],
)
def test_a_process_killed_while_it_restores_leaves_the_old_or_the_new(engine: Any, tmp_path: Path) -> None:
    """Killed at any moment of a replacement, the store holds what it held or what the file holds."""
    seed, path = random.randrange(10**6), tmp_path / "store"
    moments = random.Random(seed)
    files = [snapshot_of(random_states(150 + part, part), tmp_path / str(part)) for part in range(2)]
    contents = []
    with QdrantStore(path=path, engine=engine) as store:
        shape = pattern(tree(path))
        for file in files:
            store.restore_snapshot(file)
            contents.append(content_of(store))

    with nursery("restore", engine, path, *files) as kill_after:
        for number in range(KILLS):
            kill_after(moments.uniform(0, 0.25))
            with QdrantStore(path=path) as store:
                assert content_of(store) in contents, f"seed {seed}, kill {number}"
                assert pattern(tree(path)) == shape, f"seed {seed}, kill {number}"
                store.upsert_latest(state("zoe", number))
                store.delete("zoe")


@needs("qdrant_client")
def test_a_collection_that_was_being_made_for_a_restore_is_removed_on_opening(tmp_path: Path) -> None:
    """Killed before local mode had listed it, a process leaves a directory that nothing speaks of."""
    path = tmp_path / "store"
    with QdrantStore(path=path, engine="local") as store:
        store.upsert_latest(state("ann", 1))
        before, shape = content_of(store), tree(path)
    beside = path / "collection" / ".attuned_state.restoring"
    beside.mkdir()
    shutil.copy(path / "collection" / "attuned_state" / "storage.sqlite", beside)

    with QdrantStore(path=path) as store:
        assert content_of(store) == before
        assert not beside.exists()
        store.restore_snapshot(snapshot_of([state("zoe", 1)], tmp_path / "other"))
        assert list(store.users()) == ["zoe"]
    assert tree(path) == shape


EMBEDDED_ENGINES = [
    pytest.param("edge", marks=needs("qdrant_edge")),
    pytest.param("local", marks=needs("qdrant_client")),
]


@pytest.fixture(params=EMBEDDED_ENGINES)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[QdrantStore]:
    """A store on disk that holds something."""
    with QdrantStore(path=tmp_path / "store", engine=request.param) as store:
        store.upsert_many(PEOPLE)
        yield store


def check_kept(store: QdrantStore, before: object, file: Path) -> None:
    """The store is as it was, now and when it is opened again, and takes the snapshot then."""
    shape = pattern(tree(Path(cast("str", store.config.path))))
    assert content_of(store) == before
    store.upsert_latest(state("zoe"))
    store.delete("zoe")
    store.close()
    with QdrantStore(path=store.config.path) as again:
        assert content_of(again) == before
        assert pattern(tree(Path(cast("str", store.config.path)))) == shape
        again.restore_snapshot(file)
        assert again.count() == 150


@contextmanager
def switching(do: Callable[[pytest.MonkeyPatch], None]) -> Iterator[None]:
    """While the block lasts, something is done right before what was restored takes the place of the old."""
    adopt = attuned_store.OwnedBackend.adopt

    async def adopt_so(core: Any, staged: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            do(patch)
            await adopt(core, staged)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attuned_store.OwnedBackend, "adopt", adopt_so)
        yield


try:
    from qdrant_edge import EdgeShard
except ImportError:
    EdgeShard = None

FAULTS: dict[str, list[tuple[Any, str]]] = {
    "edge": [
        (Path, "rename"),
        (Path, "replace"),
        (os, "fsync"),
        (attuned_store, "write_atomically"),
        (attuned_store.EdgeEngine, "_move"),
        (EdgeShard, "load"),
    ],
    "local": [(Path, "replace"), (attuned_store.LocalEngine, "_disconnect")],
}


def test_a_replacement_that_fails_changes_nothing(kept: QdrantStore, tmp_path: Path) -> None:
    """A replacement that fails at its last step leaves what was there, also on disk."""
    file = snapshot_of(random_states(150, 5), tmp_path / "snapshots")
    before, backend = content_of(kept), kept.health().backend

    for owner, name in FAULTS[backend]:
        with (
            switching(lambda patch, at=(owner, name): patch.setattr(*at, fail_with(errno.EIO))),
            pytest.raises(StoreError, match="Input/output error"),
        ):
            kept.restore_snapshot(file)
        assert content_of(kept) == before, name

    check_kept(kept, before, file)


def test_a_name_that_may_not_be_durable_is_no_failure(kept: QdrantStore, tmp_path: Path) -> None:
    """Where the directory cannot be synced after the switch, the new content is there: nothing is lost."""
    file = snapshot_of(random_states(150, 5), tmp_path / "snapshots")
    sync = attuned_store.fsync

    def fail_on_directories(*paths: Path) -> None:
        if len(paths) == 1 and paths[0].is_dir():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(*paths)

    with switching(lambda patch: patch.setattr(attuned_store, "fsync", fail_on_directories)):
        kept.restore_snapshot(file)

    assert kept.count() == 150
    kept.upsert_latest(state("zoe"))
    kept.close()
    with QdrantStore(path=kept.config.path) as again:
        assert again.count() == 151


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_switch_leaves_the_one_or_the_other(
    kept: QdrantStore, moment: str, tmp_path: Path
) -> None:
    """Ctrl-C at the last step leaves a store that goes on with what is on disk."""
    file = snapshot_of(random_states(150, 5), tmp_path / "snapshots")
    before, local = content_of(kept), kept.health().backend == "local"
    write_file = attuned_store.write_atomically

    def interrupt(*arguments: Any) -> None:
        if moment == "after" and not local:
            write_file(*arguments)
        raise KeyboardInterrupt

    async def interrupt_drop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    def interrupting(patch: pytest.MonkeyPatch) -> None:
        if not local:
            patch.setattr(attuned_store, "write_atomically", interrupt)
        elif moment == "before":
            patch.setattr(attuned_store.LocalEngine, "_disconnect", interrupt)
        else:
            patch.setattr(attuned_store.LocalEngine, "drop", interrupt_drop)

    with switching(interrupting), pytest.raises(KeyboardInterrupt):
        kept.restore_snapshot(file)

    found = content_of(kept)
    assert len(found) in (len(before), 150)
    assert (found == before) == (moment == "before")
    kept.upsert_latest(state("zoe"))
    kept.close()
    with QdrantStore(path=kept.config.path) as again:
        again.delete("zoe")
        assert content_of(again) == found


FORK_AFTER_RESTORE = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from attuned_store import QdrantStore, StateSnapshot, StoreError
store = QdrantStore(path=sys.argv[1], engine=sys.argv[2])
store.restore_snapshot(sys.argv[3])
child = os.fork()
if child == 0:
    try:
        print(store.count(), flush=True)
    except StoreError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
store.close()
with QdrantStore(path=sys.argv[1]) as store:
    print(store.count())
"""


@pytest.mark.parametrize("engine", EMBEDDED_ENGINES)
def test_a_restored_store_may_be_forked(engine: str, tmp_path: Path) -> None:
    """A child that inherits a store into which a snapshot was restored is told so, and the parent goes on."""
    file = snapshot_of(PEOPLE, tmp_path / "snapshots")

    done = run_python(FORK_AFTER_RESTORE, tmp_path / "store", engine, file)

    first, second = done.stdout.splitlines()
    assert "after the fork" in first, done.stderr
    assert (second, done.stderr) == ("5", "")


def test_one_snapshot_is_restored_at_a_time(kept: QdrantStore, tmp_path: Path) -> None:
    """A second replacement while one is going on is an error, and the first one ends well."""
    file = snapshot_of(random_states(150, 5), tmp_path / "snapshots")
    refused: list[StoreError] = []

    def again(done: int, total: int | None) -> None:
        with pytest.raises(StoreError, match="already") as caught:
            kept.restore_snapshot(file)
        refused.append(caught.value)

    kept.restore_snapshot(file, progress=again)

    assert len(refused) >= 2
    assert kept.count() == 150


def driven(store: QdrantStore, operation: Any) -> Any:
    """What an operation on the backend of a store gives."""
    return attuned_store.run(store._operations._drive("", operation))


def test_what_was_staged_for_nobody_is_in_nobodys_way(kept: QdrantStore, tmp_path: Path) -> None:
    """A replacement whose task never heard that it had begun does not block the next one."""
    driven(kept, lambda backend: backend.stage(""))

    kept.restore_snapshot(snapshot_of(random_states(150, 5), tmp_path / "snapshots"))

    assert kept.count() == 150
    staged = driven(kept, lambda backend: backend.stage(""))
    driven(kept, lambda backend: backend.discard(staged))
    with pytest.raises(StoreError, match="given up"):
        driven(kept, lambda backend: backend.adopt(staged))


# ------------------------------------------------------------------------------
# On start
# ------------------------------------------------------------------------------


@pytest.fixture
def on_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of snapshots on start, which are switched on."""
    monkeypatch.setenv("QDRANT_SNAPSHOT_ON_START", "true")
    monkeypatch.setenv("QDRANT_SNAPSHOT_DIR", str(tmp_path / "deep" / "start"))
    return tmp_path / "deep" / "start"


@pytest.mark.parametrize("word", ["true", "1", "yes", "y", "on", "TRUE", "Yes", "oN", " true "])
def test_a_snapshot_is_taken_on_start(
    word: str, on_start: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With QDRANT_SNAPSHOT_ON_START, in any case, a snapshot is taken, and logged with all that is known."""
    monkeypatch.setenv("QDRANT_SNAPSHOT_ON_START", word)
    caplog.set_level(logging.INFO, logger="attuned_store")
    store = filled()

    report = snapshot_on_start(store)

    assert (report.status, report.reason, report.kind, report.points) == (
        "completed",
        "startup",
        "portable",
        50,
    )
    assert verify_snapshot(cast("Path", report.path)).points == 50
    assert names_in(on_start) == [report.snapshot_name]
    (record,) = caplog.records
    for said in (str(report.snapshot_name), str(report.path), f"{report.bytes} bytes", "ms"):
        assert said in record.getMessage()


@pytest.mark.parametrize("word", [None, "", "false", "0", "no", "off", "n", "perhaps"])
def test_without_the_switch_nothing_is_done_on_start(
    word: str | None, on_start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is switched on, nothing is taken and no directory is made."""
    monkeypatch.delenv("QDRANT_SNAPSHOT_ON_START")
    if word is not None:
        monkeypatch.setenv("QDRANT_SNAPSHOT_ON_START", word)

    report = snapshot_on_start(filled())

    assert (report.status, report.path) == ("skipped", None)
    assert "QDRANT_SNAPSHOT_ON_START" in report.message
    assert not on_start.exists()


@pytest.mark.parametrize(
    ("word", "said", "warnings"),
    [
        ("", "is not set", 0),
        ("off", "is 'off', not true", 0),
        ("ja", "is 'ja', not true, 1, yes, y or on", 1),
    ],
)
def test_a_switch_that_is_not_understood_is_said(
    word: str,
    said: str,
    warnings: int,
    on_start: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A value that is neither yes nor no takes no snapshot, but is a warning: somebody meant something."""
    monkeypatch.setenv("QDRANT_SNAPSHOT_ON_START", word)

    report = snapshot_on_start(filled())

    assert (report.status, on_start.exists()) == ("skipped", False)
    assert said in report.message
    assert [said in record.getMessage() for record in caplog.records] == [True] * warnings


def test_a_start_with_the_other_form_of_store_is_refused(on_start: Path) -> None:
    """The two functions do not take each other's stores, nor places."""
    with pytest.raises(ValidationError, match=r"^store: a synchronous store .* got AsyncMemoryStore"):
        snapshot_on_start(cast("Any", attuned_store.AsyncMemoryStore()))
    with pytest.raises(ValidationError, match=r"^store: a synchronous store .* got str"):
        snapshot_on_start(cast("Any", "./mood"))
    with pytest.raises(ValidationError, match=r"^store: an asynchronous store .* got MemoryStore"):
        anyio.run(attuned_store.asnapshot_on_start, filled())
    assert not on_start.exists()


def test_the_default_directory_of_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without QDRANT_SNAPSHOT_DIR it is ./data/qdrant/snapshots, made absolute."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QDRANT_SNAPSHOT_DIR", raising=False)
    monkeypatch.setenv("QDRANT_SNAPSHOT_ON_START", "1")

    report = snapshot_on_start(filled())

    assert cast("Path", report.path).parent == tmp_path / "data" / "qdrant" / "snapshots"


def test_on_start_is_once_for_each_process_and_store(on_start: Path, tmp_path: Path) -> None:
    """A second store on the same place is skipped, another place or collection is not."""
    with QdrantStore(path=tmp_path / "store") as store, QdrantStore(path=f"{tmp_path}/./store") as same:
        other = QdrantStore(path=tmp_path / "store", collection_name="other")
        reports = [snapshot_on_start(each) for each in (store, store, same, other, filled(), filled())]
        other.close()
    memory = filled()
    reports += [snapshot_on_start(memory), snapshot_on_start(memory)]

    done = [report.status for report in reports]
    assert done == ["completed", "skipped", "skipped", *["completed"] * 4, "skipped"]
    assert "already" not in reports[0].message
    assert "taken or tried in this process already" in reports[1].message
    assert len(names_in(on_start)) == 5


def test_on_start_keeps_so_many(on_start: Path) -> None:
    """On start, too, older snapshots can be removed."""
    for _ in range(3):
        assert snapshot_on_start(filled(), keep=2).status == "completed"

    assert len(names_in(on_start)) == 2


def test_a_directory_for_the_start_is_checked_before_the_store_is_asked(
    on_start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that cannot be made or written is SnapshotError each time, and no store is contacted."""

    def contacted(*_: Any) -> None:
        raise AssertionError("contacted")

    store = MemoryStore()
    monkeypatch.setattr(store._operations, "wait_until_ready", contacted)
    on_start.parent.mkdir()
    on_start.write_text("in the way")
    for _ in range(2):
        with pytest.raises(SnapshotError, match="cannot be made"):
            snapshot_on_start(store)
    on_start.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail_with(errno.EROFS))
        with pytest.raises(SnapshotError, match="cannot be written"):
            snapshot_on_start(store)
    assert snapshot_on_start(store).status == "failed"


def test_a_failing_snapshot_on_start_is_logged_and_returned(
    on_start: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever fails but the directory is logged at error level and returned; it is raised to nobody."""
    store, closed = filled(), filled()
    closed.close()
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))

    for each, said in ((store, "No space left"), (closed, "closed")):
        caplog.clear()
        report = snapshot_on_start(each)
        assert (report.status, report.reason, report.path) == ("failed", "startup", None)
        assert said in report.message
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        assert said in record.getMessage()
    assert names_in(on_start) == []


# ------------------------------------------------------------------------------
# What is missing, and copies that must not be made
# ------------------------------------------------------------------------------


@needs("qdrant_edge")
def test_a_replaced_collection_that_is_missing_is_no_empty_one(tmp_path: Path) -> None:
    """Where the data of a replaced collection is gone, opening says so, and makes no empty one instead."""
    source = MemoryStore()
    source.upsert_latest(state("ann"))
    with QdrantStore(path=tmp_path / "store", engine="edge") as store:
        store.restore_snapshot(snapshot_path(source, tmp_path))
    (data,) = (tmp_path / "store" / "collections").glob("attuned_state@*")
    data.rename(tmp_path / "elsewhere")

    with pytest.raises(StoreError, match="is missing"):
        QdrantStore(path=tmp_path / "store", engine="edge")

    (tmp_path / "elsewhere").rename(data)
    with QdrantStore(path=tmp_path / "store", engine="edge") as store:
        assert list(store.users()) == ["ann"]


def snapshot_path(store: StateStore, directory: Path) -> Path:
    path = store.create_snapshot(directory).path
    assert path is not None
    return path


@pytest.mark.parametrize("source", [None, 5, b"path"])
def test_a_copy_from_nothing_is_refused(source: Any) -> None:
    """An end of a copy that is neither a store nor a place is refused, whatever the target holds."""
    target = MemoryStore()
    target.upsert_latest(state("ann"))
    with pytest.raises(ValidationError, match="source: a synchronous store"):
        attuned_store.copy(source, target, replace=True)
    assert list(target.users()) == ["ann"]


def test_a_copy_that_would_lose_history_changes_nothing() -> None:
    """A target that keeps less than the source holds is left as it was."""
    source, target = MemoryStore(), MemoryStore(max_history_per_user=2)
    source.upsert_many([state("bob", moment) for moment in (1, 2, 3)])
    target.upsert_latest(state("ann"))
    with pytest.raises(SnapshotError, match="keep less history"):
        attuned_store.copy(source, target, replace=True)
    assert list(target.users()) == ["ann"]

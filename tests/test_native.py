"""Snapshots of a server: its own, their faults on the way, and portable ones restored in place."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
from conformance import NOW, PEOPLE, Awaited, Clock, content, run_python, snapshot_of, state
from qdrant_server import (
    Action,
    QdrantServer,
    Response,
    Stream,
    corrupt,
    delay,
    drip,
    drop,
    edit,
    edit_result,
    hang,
    in_own_process,
    lose_reply,
    not_json,
    other_shape,
    reply,
    reset,
    shorten,
    truncate,
)

import attuned_store
from attuned_store import (
    AsyncStateStore,
    BackendError,
    BackendRejectedError,
    BackendTimeoutError,
    BackendUnavailableError,
    BreakerPolicy,
    MemoryStore,
    QdrantStore,
    RetryPolicy,
    SnapshotError,
    SnapshotReport,
    StoreError,
    ValidationError,
    asnapshot_on_start,
    snapshot_on_start,
    verify_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.once, pytest.mark.anyio, pytest.mark.timeout(120)]

C = "attuned_state"
MAKE = "POST /collections/{collection}/snapshots"
DOWNLOAD = "GET /collections/{collection}/snapshots/{snapshot}"
REMOVE = "DELETE /collections/{collection}/snapshots/{snapshot}"
UPLOAD = "POST /collections/{collection}/snapshots/upload"
WRITE = "PUT /collections/{collection}/points"
KEY = "k3y-that-nobody-may-see"
OPTIONS: dict[str, Any] = {
    "verify": False,
    "retry": RetryPolicy(attempts=3, base_s=0),
    "breaker": BreakerPolicy(failures=1000),
}


@pytest.fixture
def server_options() -> dict[str, Any]:
    """What the stores of this file are made with."""
    return OPTIONS


@pytest.fixture
async def store(connect: Any, server: QdrantServer) -> AsyncStateStore:
    """A store that holds something; the server counts from here on."""
    store: AsyncStateStore = connect()
    await store.upsert_many(PEOPLE)
    server.clear()
    return store


@pytest.fixture
def plain(server: QdrantServer) -> Iterator[QdrantStore]:
    """A synchronous store that holds something, for what is the same in both forms."""
    with QdrantStore(url=server.url, **OPTIONS) as store:
        store.upsert_many(PEOPLE)
        server.clear()
        yield store


def path_of(report: SnapshotReport) -> Path:
    assert report.path is not None
    return report.path


async def failing(store: AsyncStateStore, directory: Path, **options: Any) -> StoreError:
    """The error of a snapshot, one of ours and in one line, which has left nothing behind."""
    with pytest.raises(StoreError) as caught:
        await store.create_snapshot(directory, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert list(directory.iterdir()) == []
    return caught.value


# ------------------------------------------------------------------------------
# Taking one
# ------------------------------------------------------------------------------


async def test_a_snapshot_of_the_server_is_downloaded_whole(
    store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """By default a server's store takes the server's own snapshot, which is then removed there."""
    sent: list[bytes] = []

    async def keep(exchange: Any) -> Response:
        response = await exchange.proceed()
        sent.append(b"".join(response.pieces()))
        return cast("Response", response)

    server.on(keep, route=DOWNLOAD)

    report = await store.create_snapshot(tmp_path)

    data = path_of(report).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    assert [data] == sent
    assert (report.status, report.kind, report.bytes, report.sha256) == (
        "completed",
        "native",
        len(data),
        sha256,
    )
    assert (report.points, report.message, report.target) == (2 * 5 + 2, "", server.url)
    checksum = tmp_path / f"{report.snapshot_name}.sha256"
    assert checksum.read_text() == f"{sha256}  {report.snapshot_name}\n"
    assert sorted(tmp_path.iterdir()) == [report.path, checksum]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert str(report.snapshot_name).endswith(f"-{C}.snap")
    assert verify_snapshot(path_of(report)).sha256 == sha256
    assert server.snapshots(C) == []
    assert (server.counts[MAKE], server.counts[DOWNLOAD], server.counts[REMOVE]) == (1, 1, 1)


async def in_fifteen_pieces(exchange: Any) -> Response:
    """Send the body in so many pieces, a tenth of a second apart."""
    response = await exchange.proceed()
    size = -(-response.length // 15)

    def cut(pieces: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
        data = b"".join(pieces())
        return (data[start : start + size] for start in range(0, len(data), size))

    body = Stream(response.length, functools.partial(cut, response.pieces))
    return dataclasses.replace(response, body=body, pause=0.1)


async def test_a_download_may_take_longer_than_an_answer(
    connect: Any, server: QdrantServer, tmp_path: Path
) -> None:
    """As long as enough bytes a second come, a file may take any time."""
    store: AsyncStateStore = connect(request_timeout=1.0, retry=RetryPolicy(attempts=1, deadline_s=1.0))
    await store.upsert_many(PEOPLE)
    server.on(in_fifteen_pieces, route=DOWNLOAD)
    begun = time.monotonic()

    report = await store.create_snapshot(tmp_path, kind="native")

    assert time.monotonic() - begun > 1.4
    assert path_of(report).stat().st_size == report.bytes
    assert verify_snapshot(path_of(report)).sha256 == report.sha256


async def test_a_download_that_drips_ends(connect: Any, server: QdrantServer, tmp_path: Path) -> None:
    """A file that comes slower than the least speed is a timeout, although no single byte is late."""
    store: AsyncStateStore = connect(request_timeout=0.5, retry=RetryPolicy(attempts=1))
    await store.upsert_many(PEOPLE)
    server.on(drip(0.02), route=DOWNLOAD)
    begun = time.monotonic()

    error = await failing(store, tmp_path, kind="native")

    assert isinstance(error, BackendTimeoutError)
    assert time.monotonic() - begun < 10


SPREAD = {
    "other shards elsewhere": ([(1, 2), (2, 3)], "Active"),
    "its own is not ready": ([(0, 2)], "Partial"),
}


@pytest.mark.parametrize("spread", SPREAD)
async def test_a_node_that_has_not_all_makes_no_native_snapshot(
    spread: str, store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """A native snapshot holds what one node has: of a spread collection the default is a portable one."""
    server.other_shards, server.shard_state = SPREAD[spread]

    report = await store.create_snapshot(tmp_path)
    assert (report.status, report.kind, report.points) == ("completed", "portable", 7)
    assert list(tmp_path.iterdir()) == [report.path]

    (tmp_path / "native").mkdir()
    error = await failing(store, tmp_path / "native", kind="native")
    assert 'take a "portable" one' in str(error)
    assert server.counts[MAKE] == 0


async def test_a_node_that_has_replicas_of_all_makes_native_snapshots(
    store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """Where every shard has a replica on the node, a native snapshot holds all."""
    server.other_shards = [(0, 2), (0, 3)]
    assert (await store.create_snapshot(tmp_path)).kind == "native"


async def test_the_servers_copy_may_be_kept(
    store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """With keep_remote the server keeps its snapshot."""
    await store.create_snapshot(tmp_path, kind="native", keep_remote=True)

    assert len(server.snapshots(C)) == 1
    assert server.counts[REMOVE] == 0


async def test_a_server_takes_portable_snapshots_too(
    store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """With kind="portable" the states are read, and the server makes no snapshot."""
    report = await store.create_snapshot(tmp_path, kind="portable")

    assert (report.kind, report.points, server.counts[MAKE]) == ("portable", 7, 0)


def make_alias(server: QdrantServer, name: str) -> None:
    make = {"create_alias": {"collection_name": C, "alias_name": name}}
    httpx.post(f"{server.url}/collections/aliases", json={"actions": [make]}).raise_for_status()


async def test_an_alias_is_resolved(connect: Any, server: QdrantServer, tmp_path: Path) -> None:
    """The snapshot is one of the collection that an alias stands for, and is named after it."""
    store = connect()
    await store.upsert_many(PEOPLE)
    make_alias(server, "current")
    aliased = connect(collection_name="current")

    report = await aliased.create_snapshot(tmp_path)
    await store.delete("ann")
    await aliased.restore_snapshot(report.path)

    assert str(report.snapshot_name).endswith(f"Z-{C}.snap")
    assert await store.count() == 5


async def test_the_name_behind_an_alias_is_no_path(
    store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """A collection that calls itself ../../evil leads nowhere."""
    aliases = [{"alias_name": C, "collection_name": "../../evil"}]
    description = {"name": "x", "size": 5, "checksum": hashlib.sha256(b"hello").hexdigest()}
    server.on(edit_result(aliases=aliases), route="GET /aliases")
    server.on(reply(200, {"result": description}), path="evil/snapshots$")
    server.on(reply(200, {"result": {"count": 0}}), path="evil/points/count$")
    shards = {"peer_id": 1, "shard_count": 1, "local_shards": [], "remote_shards": [], "shard_transfers": []}
    server.on(reply(200, {"result": shards}), path="evil/cluster$")
    server.on(reply(200, b"hello"), path="evil/snapshots/x$")

    report = await store.create_snapshot(tmp_path / "deep" / "down")

    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "deep" / "down"}
    assert str(report.snapshot_name).endswith("Z-..%2F..%2Fevil.snap")


async def test_a_compressing_server_sends_the_file_as_it_is(
    store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """A server that compresses its answers is asked not to."""
    server.compress = True

    assert verify_snapshot(path_of(await store.create_snapshot(tmp_path))).kind == "native"


async def test_two_snapshots_of_one_millisecond(
    store: AsyncStateStore, server: QdrantServer, tmp_path: Path, clock: Clock
) -> None:
    """Each has a name, and a checksum file, of its own."""
    clock.now = NOW
    (tmp_path / "20260109T230640.000Z-attuned_state.snap").write_text("theirs")
    (tmp_path / "20260109T230640.001Z-attuned_state.snap.sha256").symlink_to(tmp_path / "nowhere")

    reports = [await store.create_snapshot(tmp_path) for _ in range(2)]

    stamps = [str(report.snapshot_name)[16:19] for report in reports]
    assert stamps == ["002", "003"]
    for report in reports:
        verify_snapshot(path_of(report))


async def test_keep_removes_older_snapshots_with_their_checksums(
    store: AsyncStateStore, server: QdrantServer, tmp_path: Path, clock: Clock
) -> None:
    """Older ones go after the new one has been read back, never before."""
    kept = []
    for number in range(3):
        clock.now = NOW + number
        kept.append(path_of(await store.create_snapshot(tmp_path, keep=2)))
    expected = sorted(path.name for path in kept[1:])
    assert sorted(path.name for path in tmp_path.glob("*.snap")) == expected
    assert sorted(path.name for path in tmp_path.glob("*.sha256")) == [f"{name}.sha256" for name in expected]

    server.on(corrupt(3), route=DOWNLOAD)
    with pytest.raises(SnapshotError):
        await store.create_snapshot(tmp_path, keep=1)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_that_does_not_read_back_is_given_up(
    plain: QdrantStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk does not give back what was written, older ones stay."""
    older = path_of(plain.create_snapshot(tmp_path))
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: hashlib.sha256())

    with pytest.raises(SnapshotError, match="read back"):
        plain.create_snapshot(tmp_path, keep=1)

    assert sorted(tmp_path.iterdir()) == [older, tmp_path / f"{older.name}.sha256"]


@pytest.mark.parametrize("call", ["open", "fsync", "link"])
def test_a_failing_disk_leaves_nothing(
    call: str, plain: QdrantStore, server: QdrantServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails on disk is SnapshotError; no file, no checksum and no copy on the server stay."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if call == "link":
            patch.setattr(Path, "rename", fail)
        with pytest.raises(SnapshotError, match="cannot be written: No space left"):
            plain.create_snapshot(tmp_path)

    assert list(tmp_path.iterdir()) == []
    assert server.snapshots(C) == []


@pytest.mark.parametrize("fault", [FileExistsError(17, "taken"), OSError(5, "Input/output error")])
def test_a_checksum_never_stays_without_its_file(
    fault: OSError, plain: QdrantStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file cannot have the name after all, the checksum that came first is taken back."""
    link, calls = os.link, itertools.count()

    def fail_second(*arguments: Any) -> None:
        if next(calls) == 1:
            raise fault
        link(*arguments)

    monkeypatch.setattr(os, "link", fail_second)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(fault))

    if isinstance(fault, FileExistsError):
        names = [str(plain.create_snapshot(tmp_path).snapshot_name)]
    else:
        with pytest.raises(SnapshotError, match="Input/output error"):
            plain.create_snapshot(tmp_path)
        names = []
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, *(f"{name}.sha256" for name in names)]


# ------------------------------------------------------------------------------
# Faults on the way
# ------------------------------------------------------------------------------

LONG_NAME = "x" * 2000
ODD_ANSWERS: dict[str, Action] = {
    "a name that leads out": edit_result(name="../../x"),
    "a name with a slash": edit_result(name="a/b"),
    "an absolute name": edit_result(name="/etc/passwd"),
    "a name with a backslash": edit_result(name="..\\x"),
    "a name with NUL": edit_result(name="a\0b"),
    "a name with a line break": edit_result(name="a\nb"),
    "half a surrogate as name": edit_result(name="a\ud800"),
    "an empty name": edit_result(name=""),
    "a dot": edit_result(name="."),
    "two dots": edit_result(name=".."),
    "a name of 2,000 characters": edit_result(name=LONG_NAME),
    "a number as name": edit_result(name=5),
    "null as name": edit_result(name=None),
    "no name": edit_result(remove=("name",)),
    "no size": edit_result(remove=("size",)),
    "a size in words": edit_result(size="large"),
    "no result": edit(lambda body: {**body, "result": None}),
    "a list": edit(lambda body: {**body, "result": [1]}),
    "a number": other_shape(5),
    "another shape": other_shape(),
    "a page of HTML": not_json(),
    "an empty body": reply(200, b""),
}


@pytest.mark.parametrize("what", ODD_ANSWERS)
def test_an_odd_description_is_refused(
    what: str, plain: QdrantStore, server: QdrantServer, tmp_path: Path
) -> None:
    """A server that names its snapshot oddly, or not at all, is an error, and nothing is written anywhere."""
    server.on(ODD_ANSWERS[what], route=MAKE)

    with pytest.raises((SnapshotError, BackendError)) as caught:
        plain.create_snapshot(tmp_path / "deep" / "down")

    assert len(str(caught.value)) < 500
    assert server.url in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert server.counts[DOWNLOAD] == 0


@pytest.mark.parametrize("route", [MAKE, DOWNLOAD])
@pytest.mark.parametrize(
    ("status", "kind", "requests"),
    [
        (400, BackendRejectedError, 1),
        (403, BackendRejectedError, 1),
        (404, BackendRejectedError, 1),
        (500, BackendUnavailableError, 3),
        (503, BackendUnavailableError, 3),
    ],
)
async def test_what_the_server_refuses_is_raised_with_its_words(
    route: str,
    status: int,
    kind: type[StoreError],
    requests: int,
    connect: Any,
    server: QdrantServer,
    tmp_path: Path,
) -> None:
    """A status is an error with what the server said, and never with the api key; 5xx are tried again."""
    server.api_key = KEY
    store = connect(api_key=KEY)
    await store.upsert_many(PEOPLE)
    server.clear()
    server.on(reply(status, {"status": {"error": "the disk\nis full"}}), route=route)

    error = await failing(store, tmp_path, kind="native")

    assert type(error) is kind
    assert f"HTTP {status}" in str(error)
    assert "the disk is full" in str(error)
    assert KEY not in repr(error)
    assert server.counts[route] == requests
    assert server.snapshots(C) == []


CUTS: dict[str, Action] = {
    "before the headers": drop(),
    "before the headers, reset": drop(reset=True),
    "after the headers": truncate(0),
    "after a byte": truncate(1),
    "in the middle": truncate(),
    "in the middle, reset": reset(),
    "at the last byte": truncate(-1),
    "by a busy server": reply(503),
}


def cut(what: str, size: int) -> Action:
    return truncate(size - 1) if what == "at the last byte" else CUTS[what]


@pytest.mark.parametrize("what", CUTS)
async def test_a_stream_that_is_cut_is_read_again(
    what: str, store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """Cut at any place, a download is begun anew; cut always, it is an error and leaves nothing."""
    size = (await store.create_snapshot(tmp_path / "first")).bytes
    assert size is not None

    with server.on(cut(what, size), route=DOWNLOAD, times=2):
        report = await store.create_snapshot(tmp_path / "second")
    assert report.bytes == size
    verify_snapshot(path_of(report))

    server.on(cut(what, size), route=DOWNLOAD)
    (tmp_path / "third").mkdir()
    error = await failing(store, tmp_path / "third")
    assert isinstance(error, BackendUnavailableError)
    assert server.snapshots(C) == []


@pytest.mark.parametrize(
    ("action", "said"),
    [(shorten(0), "empty"), (shorten(1), "1 bytes"), (shorten(700), "700 bytes"), (corrupt(600), "SHA-256")],
    ids=["empty", "one-byte", "short", "altered"],
)
async def test_a_body_that_is_not_what_was_said_is_refused(
    action: Action, said: str, store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """A file of another size or SHA-256 than the server said is SnapshotError, and does not stay."""
    server.on(action, route=DOWNLOAD)

    error = await failing(store, tmp_path)

    assert isinstance(error, SnapshotError)
    assert said in str(error)
    assert server.snapshots(C) == []


def test_a_wrong_checksum_is_refused(plain: QdrantStore, server: QdrantServer, tmp_path: Path) -> None:
    """A server that reports another SHA-256, size or an empty file is not believed; no SHA-256 will do."""
    for number, action in enumerate(
        [
            edit_result(checksum="0" * 64),
            edit_result(checksum=""),
            edit_result(size=5),
            edit_result(size=-1),
            edit_result(size=0),
        ]
    ):
        with server.on(action, route=MAKE), pytest.raises(SnapshotError, match="the server said"):
            plain.create_snapshot(tmp_path / str(number))
        assert list((tmp_path / str(number)).iterdir()) == []

    with server.on(edit_result(remove=("checksum",)), route=MAKE):
        verify_snapshot(path_of(plain.create_snapshot(tmp_path)))
    with server.on(edit(lambda body: {"result": {**body["result"], "checksum": "A" * 64}}), route=MAKE):
        server.snapshot_checksum = "A" * 64
        with pytest.raises(SnapshotError):
            plain.create_snapshot(tmp_path)


@pytest.mark.parametrize("status", [404, 500])
async def test_a_deletion_that_fails_is_told(
    status: int,
    store: AsyncStateStore,
    server: QdrantServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A snapshot that stays on the server is a completed one, with a message."""
    server.on(reply(status), route=REMOVE)

    report = await store.create_snapshot(tmp_path)

    assert report.status == "completed"
    assert "stays on the server" in report.message
    assert f"HTTP {status}" in caplog.text
    assert verify_snapshot(path_of(report)).bytes == report.bytes
    assert len(server.snapshots(C)) == 1


async def test_a_server_may_take_long_to_make_a_snapshot(
    connect: Any, server: QdrantServer, tmp_path: Path
) -> None:
    """Making a snapshot has a timeout of its own, longer than that of other requests."""
    store = connect(request_timeout=0.3, snapshot_timeout=30.0)
    await store.upsert_many(PEOPLE)
    server.on(delay(0.6), route=MAKE)

    assert (await store.create_snapshot(tmp_path)).status == "completed"


@pytest.mark.parametrize("key", [None, "httpx"])  # the second stands in every traceback of a request
async def test_a_snapshot_that_takes_too_long_is_not_asked_for_again(
    key: str | None, connect: Any, server: QdrantServer, tmp_path: Path
) -> None:
    """When the time is up the server may still be at it: it is not asked to make another one."""
    server.api_key = key
    store = connect(api_key=key, snapshot_timeout=0.2)
    await store.upsert_many(PEOPLE)
    server.clear()
    server.on(hang(), route=MAKE)

    assert isinstance(await failing(store, tmp_path), BackendTimeoutError)
    assert server.counts[MAKE] == 1


def test_a_count_that_fails_leaves_no_snapshot_on_the_server(
    plain: QdrantStore, server: QdrantServer, tmp_path: Path
) -> None:
    """What else is asked of the server is asked before it makes anything."""
    server.on(reply(400), route="POST /collections/{collection}/points/count")

    with pytest.raises(BackendRejectedError):
        plain.create_snapshot(tmp_path)
    assert server.snapshots(C) == []


LARGE = """
import asyncio, resource, sys
from attuned_store import AsyncQdrantStore, QdrantStore, StateSnapshot
url, directory = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
async def async_restore(path):
    async with AsyncQdrantStore(url=url, verify=False) as store:
        await store.count()
        before = peak()
        await store.restore_snapshot(path)
        return peak() - before, await store.count()
with QdrantStore(url=url, verify=False) as store:
    store.upsert_latest(StateSnapshot("ann", {"warmth": 0.5}, 5))
    before = peak()
    report = store.create_snapshot(directory)
    print(report.bytes, peak() - before, *asyncio.run(async_restore(report.path)))
"""


def test_a_large_snapshot_never_is_in_memory(tmp_path: Path) -> None:
    """256 MiB stream down and up again within a few MiB of memory."""
    with in_own_process("--padding", str(256 << 20)) as url:
        done = run_python(LARGE, url, tmp_path)

    assert done.returncode == 0, done.stderr
    size, down, up, users = map(int, done.stdout.split())
    assert size > 256 << 20
    assert (down < 32, up < 32, users) == (True, True, 1), (down, up, users)


# ------------------------------------------------------------------------------
# Restoring one
# ------------------------------------------------------------------------------


async def test_a_native_snapshot_is_restored_in_place(
    connect: Any, server: QdrantServer, tmp_path: Path
) -> None:
    """The store holds what it held, and goes on without being opened again, whatever it had cached."""
    store, other = connect(cache_ttl=300.0), connect()
    await store.upsert_many(PEOPLE)
    before = await content(store)
    report = await store.create_snapshot(tmp_path)
    await store.upsert_many([state("ann", 99), state("zoe", 1)])
    await store.delete("bob")
    assert len(await content(store)) == 5
    server.clear()

    restored = await store.restore_snapshot(report.path)

    (upload,) = [request for request in server.requests if request.route == UPLOAD]
    assert upload.query["checksum"] == restored.sha256 == report.sha256
    assert upload.query["priority"] == "snapshot"
    assert await content(store) == await content(other) == before
    await store.upsert_latest(state("ann", 99))
    assert await other.get_latest("ann") == state("ann", 99)


def test_a_native_snapshot_makes_a_collection(
    plain: QdrantStore, server: QdrantServer, tmp_path: Path
) -> None:
    """Restored into a collection that does not exist, a native snapshot makes it."""
    path = path_of(plain.create_snapshot(tmp_path))
    with QdrantStore(url=server.url, collection_name="new", **OPTIONS) as store:
        store.restore_snapshot(path)
        assert store.count() == plain.count()


def tar(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_a_native_snapshot_that_nobody_can_check_is_asked_for(
    plain: QdrantStore, server: QdrantServer, tmp_path: Path
) -> None:
    """Without its .sha256 verifying says so, and it is restored where the caller wants that all the same."""
    plain.upsert_many(PEOPLE)
    path = path_of(plain.create_snapshot(tmp_path))
    assert verify_snapshot(path).message == ""
    path.with_name(path.name + ".sha256").unlink()
    server.clear()

    assert "not checked" in verify_snapshot(path).message
    for refused in (lambda: plain.restore_snapshot(path), lambda: attuned_store.restore(path, plain)):
        with pytest.raises(SnapshotError, match="unchecked=True"):
            refused()
    assert server.counts[UPLOAD] == 0
    for restored in (
        lambda: plain.restore_snapshot(path, unchecked=True),
        lambda: attuned_store.restore(path, plain, unchecked=True),
    ):
        assert "not checked" in restored().message


def test_a_damaged_native_snapshot_is_not_sent(
    plain: QdrantStore, server: QdrantServer, tmp_path: Path
) -> None:
    """A file that is not what its checksum says, cut short or no tar is SnapshotError; nothing is sent."""
    whole = path_of(plain.create_snapshot(tmp_path)).read_bytes()
    path, beside = tmp_path / "x.snap", tmp_path / "x.snap.sha256"
    good = hashlib.sha256(whole).hexdigest()
    altered = whole[:700] + bytes([whole[700] ^ 1]) + whole[701:]
    cases = {
        "a wrong checksum": (whole, f"{'0' * 64}  x.snap\n", "SHA-256"),
        "an empty checksum": (whole, "", "SHA-256"),
        "a checksum that is no text": (whole, "\udcff\udcfe", "SHA-256"),
        "an altered byte": (altered, good, "SHA-256"),
        "an altered header": (b"x" + whole[1:], None, "not a snapshot of a server"),
        "cut at the end": (whole[:-1024], None, "cut short"),
        "cut in the middle": (whole[: len(whole) // 2], None, "cut short"),
        "cut in a header": (whole[:100], None, "not a snapshot of a server"),
        "cut by a byte": (whole[:-1], good, "SHA-256"),
        "empty": (b"", None, "cut short"),
        "no tar": (b"hello " * 1000, None, "not a snapshot of a server"),
        "more behind": (whole + b"x", good, "SHA-256"),
    }
    server.clear()
    for what, (data, checksum, said) in cases.items():
        path.write_bytes(data)
        beside.unlink(missing_ok=True)
        if checksum is not None:
            beside.write_bytes(checksum.encode("utf-8", "surrogateescape"))
        for attempt in (verify_snapshot, plain.restore_snapshot):
            with pytest.raises(SnapshotError, match=said) as caught:
                attempt(path)
            assert str(path) in str(caught.value), what
    beside.unlink()
    beside.mkdir()
    path.write_bytes(whole)
    with pytest.raises(SnapshotError, match="cannot be read"):
        plain.restore_snapshot(path)
    assert server.counts[UPLOAD] == 0


def test_a_sparse_member_is_walked_through(tmp_path: Path) -> None:
    """Servers pack sparse files, whose maps may go on in blocks of their own."""
    header = tarfile.TarInfo("holes")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 1000
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[482] = 1
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    data = bytes(block) + maps + b"x" * 1000 + bytes(24) + tar(("last", b"y"))
    (tmp_path / "a.snap").write_bytes(data)
    (tmp_path / "cut.snap").write_bytes(data[:700])

    assert verify_snapshot(tmp_path / "a.snap").bytes == len(data)
    with pytest.raises(SnapshotError, match="cut short"):
        verify_snapshot(tmp_path / "cut.snap")


def test_a_native_snapshot_can_only_replace(plain: QdrantStore, server: QdrantServer, tmp_path: Path) -> None:
    """Merging into a server, and restoring elsewhere, is refused."""
    path = path_of(plain.create_snapshot(tmp_path))

    for mode in ("merge", "skip"):
        with pytest.raises(ValidationError, match="replace"):
            plain.restore_snapshot(path, mode=cast("Any", mode))
    with pytest.raises(SnapshotError, match="Qdrant server"):
        MemoryStore().restore_snapshot(path)
    assert server.counts[UPLOAD] == 0


async def test_an_upload_that_fails_is_tried_again(
    store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """A connection that is cut is tried again with the whole file; a refusal is raised; the store goes on."""
    path = path_of(await store.create_snapshot(tmp_path))
    before = await content(store)
    server.clear()

    for action in (drop(), lose_reply(), reply(503)):
        with server.on(action, route=UPLOAD, times=2):
            await store.restore_snapshot(path)
    assert server.counts[UPLOAD] == 9
    for action, kind in ((reply(400), BackendRejectedError), (drop(), BackendUnavailableError)):
        with server.on(action, route=UPLOAD), pytest.raises(kind):
            await store.restore_snapshot(path)
    assert await content(store) == before


# Portable ones, in place


async def test_a_restore_in_place_is_marked_until_it_is_complete(
    store: AsyncStateStore, connect: Any, server: QdrantServer, tmp_path: Path
) -> None:
    """Until it is complete health is degraded; a second run completes it and removes what is not in it."""
    states = [state(f"user-{number}", at) for number in range(400) for at in range(3)]
    path, other = snapshot_of(states, tmp_path), connect()
    assert (await other.health()).status == "healthy"
    with server.on(reply(400), route=WRITE, skip=1) as rule:
        with pytest.raises(BackendRejectedError):
            await store.restore_snapshot(path)
        assert rule.hits == 1

    health = await other.health()
    assert health.status == "degraded"
    assert "restore it again" in health.message
    assert 0 < len([p for p in server.dump(C) if "restored" in p["payload"]]) < 2400
    assert len([p for p in server.dump(C) if "restored" not in p["payload"]]) == 12

    seen = []

    def look(done: int, total: int | None) -> None:
        found = json.loads(httpx.get(f"{server.url}/collections/{C}").content)
        seen.append(found["result"]["config"]["metadata"].get("restoring"))

    report = await store.restore_snapshot(path, progress=look)

    assert set(seen) == {report.sha256}
    assert (await other.health()).status == "healthy"
    assert len(server.dump(C)) == 400 + 3 * 400
    assert sorted(p["payload"]["user_id"] for p in server.dump(C) if p["payload"]["kind"] == "latest") == (
        sorted({each.user_id for each in states})
    )
    assert await other.get_history("user-399") == list(reversed(states[-3:]))
    await other.upsert_latest(state("user-399", 9))
    await store.restore_snapshot(path)
    assert await other.get_latest("user-399") == state("user-399", 2)


async def test_a_restore_that_cannot_begin_leaves_no_mark(
    store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """A damaged file is found out before the server is touched."""
    path = snapshot_of(PEOPLE, tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    server.clear()

    with pytest.raises(SnapshotError):
        await store.restore_snapshot(path)

    assert not any(request.is_write() or request.method == "PATCH" for request in server.requests)
    assert (await store.health()).status == "healthy"


@pytest.mark.parametrize("step", ["mark", "sweep", "unmark"])
async def test_a_failing_step_of_a_restore_is_made_good_by_another(
    step: str, store: AsyncStateStore, server: QdrantServer, tmp_path: Path
) -> None:
    """Whichever step of a restore fails, the next run completes it."""
    path = snapshot_of([state("zoe", at) for at in range(3)], tmp_path)
    rules: dict[str, dict[str, Any]] = {
        "mark": {"method": "PATCH"},
        "sweep": {"route": "POST /collections/{collection}/points/delete"},
        "unmark": {"method": "PATCH", "skip": 1},
    }
    with server.on(reply(400), **rules[step]), pytest.raises(BackendRejectedError):
        await store.restore_snapshot(path)

    assert (await store.health()).status == ("healthy" if step == "mark" else "degraded")
    await store.restore_snapshot(path)
    assert (await store.health()).status == "healthy"
    assert len(server.dump(C)) == 4


# ------------------------------------------------------------------------------
# On start
# ------------------------------------------------------------------------------


async def started(store: AsyncStateStore, **options: Any) -> SnapshotReport:
    if isinstance(store, Awaited):
        return snapshot_on_start(store.store, **options)
    return await asnapshot_on_start(store, **options)


@pytest.fixture
def on_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of snapshots on start, which are switched on; nothing was taken in this process yet."""
    monkeypatch.setenv("QDRANT_SNAPSHOT_ON_START", "yes")
    monkeypatch.setenv("QDRANT_SNAPSHOT_DIR", str(tmp_path / "start"))
    attuned_store.STARTS.clear()
    return tmp_path / "start"


async def test_a_server_is_waited_for_on_start(connect: Any, server: QdrantServer, on_start: Path) -> None:
    """A server that comes up a little later than the application is waited for."""
    server.on(reply(503), times=4)

    report = await started(connect())

    assert (report.status, report.reason, report.kind) == ("completed", "startup", "native")
    assert verify_snapshot(path_of(report)).bytes == report.bytes
    assert (await started(connect())).status == "skipped"


async def test_a_failing_server_on_start_is_logged_with_its_words(
    connect: Any, server: QdrantServer, on_start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that refuses is a failed report and an error in the log, with its words and no api key."""
    server.api_key = KEY
    server.on(reply(507, {"status": {"error": "no space for snapshots"}}), route=MAKE)
    store = connect(api_key=KEY)

    report = await started(store)

    assert (report.status, report.reason, report.path) == ("failed", "startup", None)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    for text in (report.message, record.getMessage()):
        assert "no space for snapshots" in text
        assert server.url in text
        assert KEY not in text
    assert list(on_start.iterdir()) == []


async def test_a_server_that_never_comes_up_is_a_failed_report(
    connect: Any, server: QdrantServer, on_start: Path
) -> None:
    """After the timeout the application goes on without a snapshot."""
    server.on(reply(503))

    assert (await started(connect(), timeout=0.3)).status == "failed"


async def test_a_bad_directory_on_start_is_found_before_the_server_is_asked(
    connect: Any, server: QdrantServer, on_start: Path
) -> None:
    """The directory is tried first: it is the application's to mend."""
    on_start.write_text("in the way")

    with pytest.raises(SnapshotError, match="cannot be made"):
        await started(connect())
    assert server.requests == []


# ------------------------------------------------------------------------------
# Others who are at it meanwhile
# ------------------------------------------------------------------------------


def saved(directory: Path, users: int, prefix: str = "user") -> Path:
    """A portable snapshot of so many users: more than one request writes."""
    store = MemoryStore()
    store.upsert_many([state(f"{prefix}-{number}", 1_000 + number) for number in range(users)])
    path = store.create_snapshot(directory).path
    assert path is not None
    return path


def stage(store: QdrantStore, token: str) -> None:
    """Begin to replace what a store holds."""
    attuned_store.run(store._operations._drive("", lambda backend: backend.stage(token)))


def interfere(then: Any) -> Any:
    """A progress that does something once, when the first states of a restore have been written."""
    pending = [then]

    def progress(_: int, total: int | None) -> None:
        if total is not None and pending:
            pending.pop()()

    return progress


def test_a_restore_notices_another_one(server: QdrantServer, tmp_path: Path) -> None:
    """Of two restores at once into a server, the overtaken one fails, and the collection is marked."""
    first, second = QdrantStore(url=server.url, **OPTIONS), QdrantStore(url=server.url, **OPTIONS)
    other = saved(tmp_path / "other", 3, "other")
    overtake = interfere(lambda: stage(second, "another"))

    with pytest.raises(SnapshotError, match="another snapshot was restored meanwhile"):
        first.restore_snapshot(saved(tmp_path, 1_200), progress=overtake)

    assert first.health().status == "degraded"
    second.restore_snapshot(other)
    assert sorted(second.users()) == ["other-0", "other-1", "other-2"]
    assert second.health().status == "healthy"


def test_a_restore_notices_writers(server: QdrantServer, tmp_path: Path) -> None:
    """A user who is written to during a restore is not lost: it fails, and a second one completes it."""
    store, path = QdrantStore(url=server.url, **OPTIONS), saved(tmp_path, 1_200)
    write = interfere(lambda: store.upsert_latest(state("user-0", 9_000)))

    with pytest.raises(SnapshotError, match="written to while it was restored"):
        store.restore_snapshot(path, progress=write)

    assert store["user-0"].updated_at_unix_ms == NOW + 9_000
    assert store.health().status == "degraded"
    store.restore_snapshot(path)
    assert (store.count(), store["user-0"].updated_at_unix_ms) == (1_200, NOW + 1_000)
    assert store.health().status == "healthy"


def test_a_restore_does_not_go_on_in_another_collection(server: QdrantServer, tmp_path: Path) -> None:
    """A collection that is dropped during a restore is not made anew with the half of it."""
    store, path = QdrantStore(url=server.url, **OPTIONS), saved(tmp_path, 1_200)
    drop_it = interfere(lambda: httpx.delete(f"{server.url}/collections/{C}"))
    with pytest.raises(BackendRejectedError, match="404"):
        store.restore_snapshot(path, progress=drop_it)

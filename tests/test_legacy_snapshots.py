"""Portable snapshots of version 0.1: what it wrote into tests/data, the same damaged, and forged ones."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import attuned_store
from attuned_store import (
    CANONICAL_AXES,
    MemoryStore,
    SnapshotError,
    StateSnapshot,
    list_snapshots,
    verify_snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.once

DATA = Path(__file__).parent / "data"
HISTORY, EMPTY, PARTS = (DATA / f"0.1-{name}.attuned" for name in ("history", "empty", "parts"))
TAKEN = datetime(2026, 1, 17, 12, 0, 0, 123_000, UTC)
AT = 1_768_600_000_000


def everything(store: MemoryStore) -> list[StateSnapshot]:
    """All states of a store, by user, oldest first."""
    return [each for user_id in sorted(store.users()) for each in reversed(store.get_history(user_id, 10**6))]


def states_of_parts() -> list[StateSnapshot]:
    """What was written into the file of several parts, made again."""
    numbers, axes = random.Random(5), ("valence", "arousal")
    return [
        StateSnapshot(f"user-{number:02d}", {axis: numbers.random() for axis in axes}, AT + moment)
        for number in range(20)
        for moment in range(3)
    ]


EXPECTED = {
    HISTORY: [
        StateSnapshot('a":"b\\ \u00fc\u2028\U0001f600', {"warmth": 1.0, "anxiety_level": 0.0}, 0),
        StateSnapshot("ada", {"warmth": 0.8, "formality": 0.1}, AT, "inferred", 0.75, 2),
        StateSnapshot("ada", {"warmth": 0.1 + 0.2}, AT + 1, "mixed"),
        StateSnapshot("ada", {}, AT + 86_400_000),
    ],
    EMPTY: [],
    PARTS: states_of_parts(),
}


@pytest.mark.parametrize("mode", ["replace", "merge", "skip"])
@pytest.mark.parametrize("path", EXPECTED, ids=lambda path: path.stem)
def test_a_snapshot_of_version_0_1_is_restored(path: Path, mode: Any) -> None:
    """All that version 0.1 had written comes back, to the last bit, and the report tells what it was."""
    axes = ("valence", "arousal") if path is PARTS else CANONICAL_AXES
    store = MemoryStore(axes=axes)
    expected, seen = EXPECTED[path], []

    report = store.restore_snapshot(path, mode=mode, progress=lambda done, total: seen.append(done))

    assert everything(store) == expected
    verified = verify_snapshot(path)
    assert verified.sha256 == report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for each in (report, verified):
        assert (each.points, each.users) == (len(expected), len({state.user_id for state in expected}))
        assert (each.created_at, each.axes, each.kind) == (TAKEN, axes, "portable")
    assert seen == sorted(seen) if mode == "replace" else seen[-1:] == [len(expected)][: len(seen)]


def test_snapshots_of_version_0_1_are_listed(tmp_path: Path) -> None:
    """The list tells the time in the name; what stands at the end of the contents alone is not looked for."""
    named = tmp_path / "20260117T120000.123Z-attuned_state.attuned"
    named.write_bytes(PARTS.read_bytes())

    (report,) = list_snapshots(tmp_path)

    assert (report.status, report.kind, report.path) == ("completed", "portable", named)
    assert (report.created_at, report.bytes) == (TAKEN, named.stat().st_size)
    assert (report.axes, report.users, report.points) == (None, None, None)


def test_a_snapshot_of_version_0_1_of_other_axes_is_refused() -> None:
    """Axes that the store does not have are SnapshotError, and nothing is changed."""
    store = MemoryStore()
    store.upsert_latest(StateSnapshot("zoe", {}))
    with pytest.raises(SnapshotError, match="other axes than the store: arousal, valence"):
        store.restore_snapshot(PARTS)
    assert list(store.users()) == ["zoe"]


def check_refused(path: Path, data: bytes, match: str | None = None) -> None:
    path.write_bytes(data)
    store = MemoryStore(axes=("valence", "arousal", "warmth"))
    for attempt in (verify_snapshot, store.restore_snapshot):
        with pytest.raises(SnapshotError, match=match) as caught:
            attempt(path)
        assert str(path) in str(caught.value)
    assert list(store.users()) == []


def test_a_snapshot_of_version_0_1_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Cut short at any byte it is SnapshotError."""
    data = PARTS.read_bytes()
    for length in range(len(data)):
        check_refused(tmp_path / "cut.attuned", data[:length])


def test_a_snapshot_of_version_0_1_altered_anywhere_is_refused(tmp_path: Path) -> None:
    """With any byte altered it is SnapshotError."""
    data = PARTS.read_bytes()
    for position, byte in enumerate(data):
        altered = data[:position] + bytes([byte ^ 0xFF]) + data[position + 1 :]
        check_refused(tmp_path / "altered.attuned", altered)


# Forged ones: made here, byte by byte, with a seal that is right

PART = "snapshots-00000.jsonl"
ONE = (
    b'{"user_id": "ann", "axes": {"warmth": 0.5}, "updated_at_unix_ms": 5, "source": "mixed", '
    b'"confidence": 1.0, "schema_version": 1}\n'
)
TWO = ONE.replace(b": 5,", b": 6,")
END = bytes(1024)


def member(name: str, data: bytes, **fields: Any) -> bytes:
    """A member of a tar; its header may say anything."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for field, value in fields.items():
        setattr(header, field, value)
    return header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def manifest(states: int = 1, users: int = 1, **changes: Any) -> bytes:
    collection = {"name": "attuned_state", "axes": ["warmth"], "users": users, "snapshots": states}
    collection.update({name: changes.pop(name) for name in [*changes] if name in collection})
    top = {"format_version": 1, "engine": "memory", "created_at": "2026-01-17T12:00:00.123Z"}
    return member("manifest.json", json.dumps({**top, "collections": [collection], **changes}).encode())


def packed(*members: bytes) -> bytes:
    data = gzip.compress(b"".join(members), 1, mtime=0)
    seal = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x24\0AS\x20\0" + hashlib.sha256(data).digest()
    return data + seal + b"\x03\0" + bytes(8)


def parts(*data_of_parts: bytes) -> list[bytes]:
    return [member(f"snapshots-{number:05d}.jsonl", data) for number, data in enumerate(data_of_parts)]


def whole(data_of_parts: Sequence[bytes], **changes: Any) -> bytes:
    return packed(*parts(*data_of_parts), manifest(**changes), END)


FORGED: dict[str, tuple[bytes, str]] = {
    "a bad line": (whole([ONE + b"x\n"]), "line 2"),
    "a bad line in a second part": (whole([ONE + TWO, b"x\n"]), "line 3"),
    "half a line": (whole([ONE[:-1]]), "no end"),
    "an empty part": (whole([b""]), "no end"),
    "a state twice": (whole([ONE, ONE], states=2), "order"),
    "a user at two places": (whole([ONE, ONE.replace(b"ann", b"bob"), TWO], states=3, users=2), "together"),
    "too few states": (whole([ONE], states=0), "snapshots: 0 differs"),
    "too many users": (whole([ONE], users=2), "users: 2 differs"),
    "an axis that is not named": (whole([ONE], axes=["valence"]), "warmth"),
    "no axes": (whole([ONE], axes=None), "axes"),
    "no time": (whole([ONE], created_at=None), "header"),
    "another format": (whole([ONE], format_version=2), "format_version"),
    "two collections": (whole([ONE], collections=[{}, {}]), "collections: one"),
    "a manifest that is no JSON": (packed(*parts(ONE), member("manifest.json", b"hello"), END), "manifest"),
    "no manifest": (packed(*parts(ONE), END), "no archive"),
    "an extra member": (packed(*parts(ONE), member("notes.txt", b"hi"), manifest(), END), "notes.txt"),
    "a part twice": (packed(*parts(ONE), *parts(TWO), manifest(2), END), "is not snapshots-00001"),
    "a name that leads out": (packed(member("../../evil", ONE), manifest(), END), r"\.\./\.\./evil"),
    "a link": (packed(member(PART, b"", type=tarfile.SYMTYPE), manifest(), END), "is not"),
    "a member of 1 GiB": (packed(member(PART, b"", size=1 << 30)), "bytes"),
    "a negative size": (packed(member(PART, b"", size=-1)), "bytes"),
    "no end of the tar": (packed(*parts(ONE), manifest()), "too early"),
    "more behind the tar": (packed(*parts(ONE), manifest(), END, b"x"), "behind its end"),
    "no seal": (packed(*parts(ONE), manifest(), END)[:-58], "own seal"),
    "another seal": (whole([ONE])[:-58] + whole([TWO])[-58:], "own seal"),
    "two archives": (whole([ONE]) * 2, "own seal"),
    "a byte more": (whole([ONE]) + b"x", "own seal"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_snapshot_of_version_0_1_is_refused(what: str, tmp_path: Path) -> None:
    """Whatever is wrong with an old archive that is sealed is SnapshotError that says so."""
    check_refused(tmp_path / "forged.attuned", *FORGED[what])


def test_what_the_forged_ones_are_made_from_is_good(tmp_path: Path) -> None:
    """The archive that is forged above is read as it is."""
    (tmp_path / "good.attuned").write_bytes(whole([ONE, TWO], states=2))

    assert verify_snapshot(tmp_path / "good.attuned").points == 2


def test_a_manifest_grows_with_the_parts_alone(tmp_path: Path) -> None:
    """A large manifest is read behind large parts, not behind many small ones, which could hold anything."""
    lines = [ONE.replace(b"ann", b"user-%05d" % number) for number in range(3_000)]
    large = [b"".join(lines[start : start + 10]) for start in range(0, 3_000, 10)]
    many = manifest(3_000, 3_000, more="x" * ((1 << 20) + 100_000))

    check_refused(tmp_path / "small.attuned", packed(*parts(*large), many, END), "bytes; none is so large")
    more = manifest(3_000, 3_000, more="x" * ((1 << 20) - 1_000))
    (tmp_path / "good.attuned").write_bytes(packed(*parts(*large), more, END))
    assert verify_snapshot(tmp_path / "good.attuned").users == 3_000


def test_the_beginning_and_the_end_of_an_old_one_are_looked_at(tmp_path: Path) -> None:
    """What is listed as good begins and ends as an archive does."""
    data = HISTORY.read_bytes()
    for number, bad in enumerate((data[:-1], data[:-100], data[:60], b"x" + data[1:], gzip.compress(b"x"))):
        path = tmp_path / f"20260117T120000.00{number}Z-a.attuned"
        path.write_bytes(bad)
        with pytest.raises(SnapshotError):
            attuned_store.SnapshotFile(path).header()
    assert [report.status for report in list_snapshots(tmp_path)] == ["failed"] * 5

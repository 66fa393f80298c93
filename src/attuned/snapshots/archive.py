"""The format of portable snapshots: write, read, verify.

A portable snapshot is gzipped JSON lines, which ``zcat FILE | jq`` reads: a header, then one state a line,
then a footer. Each is one line; here they are broken.

    {"header":{"format":"attuned_store","version":2,"engine":"edge","created_at":"2026-01-17T12:00:00.123Z",
    "collections":[{"name":"attuned_state","kind":"states","axes":["warmth","formality"]}]}}
    {"user_id":"ada","axes":{"warmth":0.8},"updated_at_unix_ms":1768651200123,"source":"self_report",
    "confidence":1.0,"schema_version":1}
    {"footer":{"collections":[{"name":"attuned_state","users":1,"states":1}], "sha256":"<of all lines
    before>","gzip_sha256":"<of all bytes of the file before this gzip member>"}}

The states of a user stand together, each newer than the one before. What else a header or a footer has is
ignored; another "kind" of collection, or a higher "version", is for a newer library. A line ends with a
newline and has at most 1 MiB, a footer 64 KiB. All is UTF-8; this library writes ASCII alone.

The file is two members of gzip. The first holds the header and the states. The second holds the footer and
is one certain sequence of bytes: a header without a time, and one stored block. So the footer is found from
the end of the file without reading the rest (the last four bytes are the size of its line), and no byte of
the file can change unnoticed: those before it are in its digest, and its own are compared. gzip's own
checks alone would miss some: of the header, between blocks, and where another encoding gives the same
contents.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import IO, Any, Literal, NamedTuple, cast

import attrs

from attuned.base.config import check_axis_names, check_callable
from attuned.base.errors import SnapshotError, ValidationError, brief, one_line
from attuned.base.values import Shape, StateSnapshot, iso_time, stored_snapshot

_FORMAT, _VERSION = "attuned_store", 2
_MAX_LINE_BYTES = 1 << 20  # a state of 1,024 axes has 100 KB
READ_BYTES = 1 << 16
GZIP_MAGIC = b"\x1f\x8b"
_FOOTER_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x01"  # of gzip; then that of a last, stored block
_FOOTER_START = len(_FOOTER_HEAD) + 4
_FOOTER_FRAME = _FOOTER_START + 8
_MAX_FOOTER_BYTES = READ_BYTES - _FOOTER_FRAME  # one stored block holds little more
_STATE_FIELDS = frozenset(field.name for field in attrs.fields(StateSnapshot))

_quoted: Callable[[str], str] = json.encoder.encode_basestring_ascii
_compact = json.JSONEncoder(separators=(",", ":")).encode

Progress = Callable[[int, int | None], object]
SnapshotKind = Literal["native", "portable"]
RestoreMode = Literal["replace", "merge", "skip"]
SNAPSHOT_SUFFIXES: Mapping[SnapshotKind, str] = {"native": ".snap", "portable": ".attuned"}


def ignore_progress(done: int, total: int | None) -> None:
    """The progress of an operation of which nobody wants to know."""


def check_progress(progress: Progress | None) -> Progress:
    """What to call after each batch; raises before anything is done, not after the first."""
    if progress is None:
        return ignore_progress
    check_callable("progress", progress)
    return progress


class ArchiveContents(NamedTuple):
    """What a portable snapshot holds, as it says itself: the counts stand in its footer."""

    engine: str
    created_at: datetime
    collection: str
    axes: tuple[str, ...]
    users: int | None = None
    states: int | None = None


class StateCounter:
    """Counts states and users, who come one after another, each user's states oldest first."""

    def __init__(self) -> None:
        self.users = self.states = 0
        self.axes: set[str] = set()  # that occur
        self._last: StateSnapshot | None = None
        self._shape: Shape | None = None
        self._hashes = [array("q") for _ in range(256)]  # of the users, by which one who comes twice is found

    def add(self, states: Iterable[StateSnapshot]) -> None:
        """Count more; raises SnapshotError where a user's order is broken."""
        for state in states:
            last, self._last = self._last, state
            self.states += 1
            if state.axes._shape is not self._shape:
                self._shape = state.axes._shape
                self.axes.update(self._shape.names)
            if last is None or last.user_id != state.user_id:
                self.users += 1
                found = hash(state.user_id)
                self._hashes[found & 0xFF].append(found)
            elif last.updated_at_unix_ms >= state.updated_at_unix_ms:
                raise SnapshotError("updated_at_unix_ms: a user's states are not in order, or one twice")

    def check_users(self) -> None:
        """Raise SnapshotError where a user came twice; of 10**9, chance makes two alike in 3 % of cases."""
        if any(len(set(hashes)) < len(hashes) for hashes in self._hashes):
            raise SnapshotError("the states of a user do not stand together")

    def check_axes(self, axes: Iterable[str]) -> None:
        """Raise SnapshotError where an axis occurs that is none of these."""
        if strange := self.axes.difference(axes):
            raise SnapshotError(f"a state has the axis {min(strange)!r}, which the file does not name")


def _state_line(state: StateSnapshot) -> str:
    """A state as one line of JSON, of ASCII alone, with the names of its fields."""
    axes = state.axes
    return (
        f'{{"user_id":{_quoted(state.user_id)},"axes":{axes._shape.json_form % axes._values},'
        f'"updated_at_unix_ms":{state.updated_at_unix_ms},"source":"{state.source.value}",'
        f'"confidence":{state.confidence!r},"schema_version":{state.schema_version}}}\n'
    )


def _footer_member(line: bytes) -> bytes:
    """The one gzip member in which this footer may stand."""
    size = len(line)
    lengths, checks = struct.pack("<HH", size, size ^ 0xFFFF), struct.pack("<II", zlib.crc32(line), size)
    return _FOOTER_HEAD + lengths + line + checks


class ArchiveWriter:
    """Writes a portable snapshot into a file, block by block."""

    block_bytes = 1 << 18  # of lines, compressed at once in 3 ms

    def __init__(self, file: IO[bytes], contents: ArchiveContents) -> None:
        self._file, self.contents = file, contents
        self._gzip = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._lines_digest, self._digest = hashlib.sha256(), hashlib.sha256()
        collection = {"name": contents.collection, "kind": "states", "axes": contents.axes}
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "engine": contents.engine,
            "created_at": iso_time(contents.created_at),
            "collections": [collection],
        }
        self._lines = [_compact({"header": header}) + "\n"]
        self._size = 0  # of the lines
        self.bytes = 0
        self.counted = StateCounter()

    def add(self, states: Sequence[StateSnapshot]) -> None:
        """Take in states: all of a user, oldest first."""
        self.counted.add(states)
        for state in states:
            line = _state_line(state)
            self._lines.append(line)
            self._size += len(line)
            if self._size >= self.block_bytes:
                self._compress_lines()

    def _compress_lines(self) -> None:
        data = "".join(self._lines).encode()
        self._lines, self._size = [], 0
        self._lines_digest.update(data)
        self._write(self._gzip.compress(data))

    def _write(self, packed: bytes) -> None:
        self._file.write(packed)
        self._digest.update(packed)
        self.bytes += len(packed)

    def finish(self) -> str:
        """Write what is left, and the footer; returns the SHA-256 of the file."""
        self.counted.check_users()  # what could not be read back is no backup
        self.counted.check_axes(self.contents.axes)
        self._compress_lines()
        self._write(self._gzip.flush())
        name, counted = self.contents.collection, self.counted
        counts = {"name": name, "users": counted.users, "states": counted.states}
        digests = {"sha256": self._lines_digest.hexdigest(), "gzip_sha256": self._digest.hexdigest()}
        footer = _compact({"footer": {"collections": [counts], **digests}}) + "\n"
        self._write(_footer_member(footer.encode()))
        return self._digest.hexdigest()


class GzipReader:
    """The first member of a gzip file, read forward in bounded pieces; SnapshotError where it is damaged."""

    block_bytes = 1 << 18

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._gzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._packed = b""  # what was last read from the file
        self._ready = bytearray()
        self._digest = hashlib.sha256()

    def starts_with(self, prefix: bytes) -> bool:
        """Whether the contents begin so; nothing was taken yet."""
        while len(self._ready) < len(prefix) and not self._gzip.eof:
            self._decompress_more()
        return self._ready.startswith(prefix)

    def take(self, size: int) -> bytes:
        """The next so many bytes."""
        while len(self._ready) < size:
            if self._gzip.eof:
                raise SnapshotError("it ends too early")
            self._decompress_more()
        return self._take_ready(size)

    def take_lines(self, least: int) -> bytes:
        """The next lines, as many as make so many bytes; at the end what there is, if only half a line."""
        while not (end := self._ready.find(b"\n", least - 1) + 1) and not self._gzip.eof:
            if len(self._ready) > least + _MAX_LINE_BYTES:
                raise SnapshotError(f"a line is longer than {_MAX_LINE_BYTES:,} bytes")
            self._decompress_more()
        return self._take_ready(end or len(self._ready))

    def _take_ready(self, size: int) -> bytes:
        taken = bytes(self._ready[:size])
        del self._ready[:size]
        return taken

    def _decompress_more(self) -> None:
        packed = self._gzip.unconsumed_tail or self._read()
        if not packed:
            raise SnapshotError("it is cut short")
        try:
            self._ready += self._gzip.decompress(packed, self.block_bytes)
        except zlib.error as error:
            raise SnapshotError(f"it is damaged: {error}") from error

    def _read(self) -> bytes:
        self._digest.update(self._packed)
        self._packed = self._file.read(READ_BYTES)
        return self._packed

    def finish(self) -> tuple[str, bytes]:
        """Check that all was taken; returns the SHA-256 of the member, and what follows, up to 64 KiB."""
        while not self._ready and not self._gzip.eof:
            self._decompress_more()
        if self._ready:
            raise SnapshotError("something stands behind its end")
        rest = self._gzip.unused_data
        self._digest.update(self._packed[: len(self._packed) - len(rest)])
        sha256 = self._digest.hexdigest()
        rest += self._file.read(READ_BYTES)  # more than may be there
        self._digest.update(rest)
        return sha256, rest

    def sha256(self) -> str:
        """The SHA-256 of the file, once it is read to its end."""
        return self._digest.hexdigest()


class ArchiveReader:
    """Reads a portable snapshot forward, once; everything is checked on the way.

    What is wrong is a SnapshotError. States come before all is known to be right: who changes a store with
    them must be able to take that back, or have read them once before.
    """

    block_bytes = 1 << 15  # of lines, parsed at once in 2 ms

    def __init__(self, unpacked: GzipReader) -> None:
        self._unpacked = unpacked
        self._lines_digest = hashlib.sha256()
        self.contents = _parse_header(self._take_lines(1))
        self.axes = self.contents.axes
        self.sha256 = ""  # known at the end

    def _take_lines(self, least: int) -> bytes:
        lines = self._unpacked.take_lines(least)
        self._lines_digest.update(lines)
        return lines

    def states(self) -> Iterator[list[StateSnapshot]]:
        """All states, so many at a time as stand in a block of lines."""
        counted = StateCounter()
        while lines := self._take_lines(self.block_bytes):
            states = parse_states(lines, 2 + counted.states)
            counted.add(states)
            counted.check_axes(self.axes)
            yield states
        counted.check_users()
        gzip_sha256, rest = self._unpacked.finish()
        footer, counts = _parse_footer(rest)
        digests = {"sha256": self._lines_digest.hexdigest(), "gzip_sha256": gzip_sha256}
        check_same("its footer", footer, digests)
        read = {"name": self.contents.collection, "users": counted.users, "states": counted.states}
        check_same("its footer", counts, read)
        self.contents = self.contents._replace(users=counted.users, states=counted.states)
        self.sha256 = self._unpacked.sha256()


def read_summary(unpacked: GzipReader, file: IO[bytes]) -> ArchiveContents:
    """What the header and the footer of a portable snapshot say; what is between is not read."""
    contents = ArchiveReader(unpacked).contents
    file_size = file.seek(-4, os.SEEK_END) + 4
    size = _FOOTER_FRAME + int.from_bytes(file.read(4), "little")
    file.seek(-min(size, file_size, READ_BYTES), os.SEEK_END)
    counts = _parse_footer(file.read())[1]
    users, states = counts.get("users"), counts.get("states")
    if not isinstance(users, int) or not isinstance(states, int):
        raise SnapshotError("its footer: numbers of users and states are needed")
    return contents._replace(users=users, states=states)


def _parse_header(line: bytes) -> ArchiveContents:
    fields = _unwrap(line, "header")
    if fields.get("format") != _FORMAT:
        raise SnapshotError("it is no portable snapshot of attuned_store")
    version = fields.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise SnapshotError(
            f"it has format {brief(version)}; up to {_VERSION} is read: upgrade attuned-store"
        )
    check_same("its header", fields, {"version": _VERSION})
    return parse_contents(fields, parse_collection(fields))


def _parse_footer(rest: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the footer says, and of its collection; its gzip member must be these bytes, and no more."""
    line = rest[_FOOTER_START:-8]
    if len(line) > _MAX_FOOTER_BYTES or rest != _footer_member(line):
        raise SnapshotError("it is cut short, altered or packed anew: it does not end with its own footer")
    if line.find(b"\n") != len(line) - 1:
        raise SnapshotError("its footer is not one line")
    fields = _unwrap(line, "footer")
    return fields, parse_collection(fields)


def _unwrap(line: bytes, name: str) -> dict[str, Any]:
    """What stands in the header or the footer."""
    found = parse_object(line, f"its {name}").get(name)
    if not isinstance(found, dict):
        raise SnapshotError(f'its {name}: {{"{name}": ...}} is needed')
    return cast("dict[str, Any]", found)


def check_same(what: str, found: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Raise SnapshotError where something says other than what there is."""
    for name, value in read.items():
        if found.get(name).__class__ is not value.__class__ or found[name] != value:
            raise SnapshotError(f"{what}: {name}: {brief(found.get(name))} differs from {brief(value)}")


def parse_collection(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a header or footer says of its only collection."""
    found = cast("list[Any] | None", fields.get("collections"))
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], dict):
        raise SnapshotError(f"collections: one is read, got {brief(found)}")
    return cast("dict[str, Any]", found[0])


def parse_contents(fields: Mapping[str, Any], collection: Mapping[str, Any]) -> ArchiveContents:
    """What a header says, which may be anything."""
    kind = collection.get("kind", "states")
    if kind != "states":
        raise SnapshotError(f"it holds a collection of the kind {brief(kind)}: upgrade attuned-store")
    try:
        created_at = datetime.fromisoformat(cast("str", fields.get("created_at")))
        axes = check_axis_names(collection.get("axes"))
        if created_at.tzinfo is None or axes is None:
            raise ValidationError("created_at with its time zone and axes are needed")
        created_at = created_at.astimezone(UTC)
    except (TypeError, ValueError, OverflowError) as error:
        raise SnapshotError(f"its header: {one_line(str(error))}") from error
    return ArchiveContents(str(fields.get("engine")), created_at, str(collection.get("name")), axes)


def parse_states(block: bytes, first: int) -> list[StateSnapshot]:
    """The states of whole lines, the first of which has this number."""
    if not block.endswith(b"\n"):
        raise SnapshotError("its last line has no end")
    states: list[StateSnapshot] = []
    for number, line in enumerate(block[:-1].split(b"\n"), first):
        try:
            states.append(_parse_state(line))
        except (ValueError, RecursionError) as error:
            raise SnapshotError(f"line {number}: {one_line(str(error))}") from error
    return states


def _parse_state(line: bytes) -> StateSnapshot:
    text = line.decode()
    fields: Any = json.loads(text)
    if not isinstance(fields, dict) or fields.keys() != _STATE_FIELDS:
        raise ValueError(f"an object with {', '.join(sorted(_STATE_FIELDS))} is needed, and nothing else")
    fields = cast("dict[str, Any]", fields)
    if not isinstance(fields["axes"], dict):
        raise ValueError("axes: an object is needed")  # noqa: TRY004 - as for every wrong line
    strings = len(fields) + len(cast("dict[str, Any]", fields["axes"])) + 2  # and the values of two fields
    if text.count('"') != 2 * strings:  # a name is there twice, or a quote is escaped
        json.loads(text, object_pairs_hook=_each_once)
    return stored_snapshot(**fields)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What json makes of an object, which by itself keeps the last of two equal names."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is there twice")
    return made


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object with each name once."""
    try:
        found: Any = json.loads(data.decode(), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{what}: {one_line(str(error))}") from error
    if not isinstance(found, dict):
        raise SnapshotError(f"{what}: a JSON object is needed")
    return cast("dict[str, Any]", found)

"""The format of portable snapshots: write, read, verify."""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal, NamedTuple, cast

import attrs

from attuned.base.config import check_axis_names, check_callable
from attuned.base.errors import SnapshotError, ValidationError, brief, one_line
from attuned.base.values import Shape, StateSnapshot, iso_time, stored_snapshot

# A portable snapshot is a gzipped tar: snapshots-00000.jsonl, snapshots-00001.jsonl and so on, one
# StateSnapshot a line, those of a user together and oldest first; at the end manifest.json, since only then
# everything is known; and a seal. So it is written and read forward, in pieces, whatever its size. All parts
# but the last are about 256 KiB: what is larger, or smaller in great number, is not read, so that no file can
# take up much memory.

_ARCHIVE_VERSION = 1


_MANIFEST = "manifest.json"


TAR_BLOCK = 512  # bytes, of tar


PART_BYTES = 1 << 18  # of lines in one member, about; compressing them takes 3 ms


_MAX_PART_BYTES = 1 << 20  # a part that claims more is not read; one line has 100 KB at most


_MANIFEST_BYTES_PER_PART = 512  # at most, and as much as a part may have besides


READ_BYTES = 1 << 16


GZIP_MAGIC = b"\x1f\x8b"


_STATE_FIELDS = frozenset(field.name for field in attrs.fields(StateSnapshot))


_quoted: Callable[[str], str] = json.encoder.encode_basestring_ascii


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


def _line(snapshot: StateSnapshot) -> str:
    """A snapshot as one line of JSON, with the names of its fields."""
    axes = snapshot.axes
    return (
        f'{{"user_id":{_quoted(snapshot.user_id)},"axes":{axes._shape.json_form % axes._values},'
        f'"updated_at_unix_ms":{snapshot.updated_at_unix_ms},"source":"{snapshot.source.value}",'
        f'"confidence":{snapshot.confidence!r},"schema_version":{snapshot.schema_version}}}\n'
    )


def _part_name(number: int) -> str:
    return f"snapshots-{number:05d}.jsonl"


def _seal(digest: bytes) -> bytes:
    """An empty gzip member whose extra field (RFC 1952, 2.3.1.1) holds the SHA-256 of what stands before it.

    Other programs read past it. gzip's own checks cover the contents; this one covers every byte of the file.
    """
    header = b"\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff"
    extra = b"AS" + len(digest).to_bytes(2, "little") + digest
    return header + len(extra).to_bytes(2, "little") + extra + b"\x03\x00" + bytes(8)


class ArchiveContents(NamedTuple):
    """What a portable snapshot holds."""

    collection: str
    axes: tuple[str, ...]
    users: int
    snapshots: int


class _UserHashes:
    """Notices users who come twice, at 8 bytes a user."""

    def __init__(self) -> None:
        self._hashes = [array("q") for _ in range(256)]

    def add(self, user_id: str) -> None:
        """Take in a user."""
        found = hash(user_id)
        self._hashes[found & 0xFF].append(found)

    def repeated(self) -> bool:
        """Whether some user came twice. Among 1,000 million users, chance makes two alike in 3 % of cases."""
        return any(len(set(hashes)) < len(hashes) for hashes in self._hashes)


class StateCounter:
    """Counts snapshots and users, who come one after another, each user's snapshots oldest first."""

    def __init__(self, hashes: _UserHashes | None = None) -> None:
        self.users = self.snapshots = 0
        self.axes: set[str] = set()  # that occur
        self._hashes = hashes
        self._last: StateSnapshot | None = None
        self._shape: Shape | None = None

    def add(self, snapshots: Iterable[StateSnapshot]) -> None:
        """Take in more; raises ValidationError where a user's order is broken."""
        for snapshot in snapshots:
            last, self._last = self._last, snapshot
            self.snapshots += 1
            if snapshot.axes._shape is not self._shape:
                self._shape = snapshot.axes._shape
                self.axes.update(self._shape.names)
            if last is None or last.user_id != snapshot.user_id:
                self.users += 1
                if self._hashes is not None:
                    self._hashes.add(snapshot.user_id)
            elif last.updated_at_unix_ms >= snapshot.updated_at_unix_ms:
                raise ValidationError("updated_at_unix_ms: a user's snapshots are not in order, or one twice")


class ArchiveWriter:
    """Writes a portable snapshot into a file, piece by piece."""

    def __init__(self, file: IO[bytes], created_ms: int) -> None:
        self._file = file
        self._created_ms = created_ms
        self._gzip = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._digest = hashlib.sha256()
        self._lines: list[str] = []
        self._size = 0  # of the lines
        self._parts: list[dict[str, Any]] = []
        self.bytes = 0
        self.counted = StateCounter()

    def add(self, snapshots: Sequence[StateSnapshot]) -> None:
        """Take in snapshots: all of a user, oldest first."""
        self.counted.add(snapshots)
        for snapshot in snapshots:
            line = _line(snapshot)  # of ASCII alone
            self._lines.append(line)
            self._size += len(line)
            if self._size >= PART_BYTES:
                self._end_part()

    def _end_part(self) -> None:
        name, data = _part_name(len(self._parts)), "".join(self._lines).encode()
        sha256 = hashlib.sha256(data).hexdigest()
        self._parts.append({"name": name, "size": len(data), "sha256": sha256, "snapshots": len(self._lines)})
        self._lines, self._size = [], 0
        self._put_member(name, data)

    def _put_member(self, name: str, data: bytes) -> None:
        import tarfile

        header = tarfile.TarInfo(name)
        header.size, header.mtime = len(data), self._created_ms // 1000
        self._put(header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % TAR_BLOCK))

    def _put(self, data: bytes) -> None:
        self._put_packed(self._gzip.compress(data))

    def _put_packed(self, packed: bytes) -> None:
        self._file.write(packed)
        self._digest.update(packed)
        self.bytes += len(packed)

    def finish(self, engine: str, collection: str, axes: Sequence[str]) -> str:
        """Write what stands at the end; returns the SHA-256 of the file."""
        if self._lines:
            self._end_part()
        contents = {
            "name": collection,
            "axes": list(axes),
            "users": self.counted.users,
            "snapshots": self.counted.snapshots,
            "parts": self._parts,
        }
        manifest = {
            "format_version": _ARCHIVE_VERSION,
            "engine": engine,
            "created_at": iso_time(self._created_ms),
            "collections": [contents],
        }
        self._put_member(_MANIFEST, json.dumps(manifest, indent=1).encode())
        self._put(bytes(2 * TAR_BLOCK))
        self._put_packed(self._gzip.flush())
        self._put_packed(_seal(self._digest.digest()))
        return self._digest.hexdigest()


class GzipReader:
    """The contents of a gzip file, read forward in bounded pieces; SnapshotError where it is damaged."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._gzip = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._packed = b""  # what was last read from the file
        self._ready = bytearray()
        self._digest = hashlib.sha256()

    def take(self, size: int) -> bytes:
        """The next so many bytes."""
        while len(self._ready) < size:
            if self._gzip.eof:
                raise SnapshotError("it ends too early")
            self._ready += self._more()
        taken = bytes(self._ready[:size])
        del self._ready[:size]
        return taken

    def _more(self) -> bytes:
        packed = self._gzip.unconsumed_tail
        if not packed:
            packed = self._read()
            if not packed:
                raise SnapshotError("it is cut short")
        try:
            return self._gzip.decompress(packed, PART_BYTES)
        except zlib.error as error:
            raise SnapshotError(f"it is damaged: {error}") from error

    def _read(self) -> bytes:
        self._digest.update(self._packed)
        self._packed = self._file.read(READ_BYTES)
        return self._packed

    def finish(self) -> str:
        """Check that nothing follows but the seal of all that was read; returns the SHA-256 of the file."""
        while not self._ready and not self._gzip.eof:
            self._ready += self._more()
        if self._ready:
            raise SnapshotError("something stands behind its end")
        rest = self._gzip.unused_data
        self._digest.update(self._packed[: len(self._packed) - len(rest)])
        seal = _seal(self._digest.digest())
        rest += self._file.read(len(seal) + 1 - len(rest)) if len(rest) <= len(seal) else b""
        if rest != seal:
            raise SnapshotError("it is cut short, altered or packed anew: it does not end with its own seal")
        self._digest.update(seal)
        return self._digest.hexdigest()


class ArchiveReader:
    """Reads a portable snapshot forward, once; everything is checked on the way.

    What is wrong is a SnapshotError. Snapshots come before all is known to be right: who changes a store
    with them must be able to take that back, or have read them once before.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._unpacked = GzipReader(file)
        self._parts: list[dict[str, Any]] = []
        self._hashes = _UserHashes()
        self._counted = StateCounter(self._hashes)
        self.contents: ArchiveContents | None = None  # known at the end
        self.sha256 = ""

    def parts(self) -> Iterator[list[StateSnapshot]]:
        """The snapshots of one member after another."""
        while True:
            name, data = self._member()
            if name == _MANIFEST:
                break
            if name != _part_name(len(self._parts)):
                raise SnapshotError(f"{brief(name)} should be {_part_name(len(self._parts))}")
            if self._parts and self._parts[-1]["size"] < PART_BYTES // 4:
                raise SnapshotError(f"{self._parts[-1]['name']} is too small for one that is not the last")
            yield self._part(name, data)
        if self._hashes.repeated():
            raise SnapshotError("the snapshots of a user do not stand together")
        self.contents = self._check_manifest(data)
        if any(self._unpacked.take(2 * TAR_BLOCK)):
            raise SnapshotError(f"something stands behind {_MANIFEST}, which is the last")
        self.sha256 = self._unpacked.finish()

    def _member(self) -> tuple[str, bytes]:
        import tarfile

        try:
            header = tarfile.TarInfo.frombuf(self._unpacked.take(TAR_BLOCK), "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise SnapshotError(f"it is no archive of ours: {error}") from error
        if header.type != tarfile.REGTYPE:
            raise SnapshotError(f"{brief(header.name)} is not a plain file")
        most = _MAX_PART_BYTES
        if header.name == _MANIFEST:
            most += _MANIFEST_BYTES_PER_PART * len(self._parts)
        if not 0 <= header.size <= most:
            raise SnapshotError(f"{brief(header.name)} would be {header.size} bytes; no part is so large")
        data = self._unpacked.take(header.size)
        if any(self._unpacked.take(-header.size % TAR_BLOCK)):
            raise SnapshotError(f"something stands behind the end of {brief(header.name)}")
        return header.name, data

    def _part(self, name: str, data: bytes) -> list[StateSnapshot]:
        if not data.endswith(b"\n"):
            raise SnapshotError(f"{name}: its last line has no end")
        lines = data[:-1].split(b"\n")
        snapshots: list[StateSnapshot] = []
        for number, line in enumerate(lines, 1):
            try:
                snapshots.append(_snapshot_of_line(line))
            except (ValueError, RecursionError) as error:
                raise SnapshotError(f"{name}: line {number}: {one_line(str(error))}") from error
        try:
            self._counted.add(snapshots)
        except ValidationError as error:
            raise SnapshotError(f"{name}: {error}") from error
        sha256 = hashlib.sha256(data).hexdigest()
        self._parts.append({"name": name, "size": len(data), "sha256": sha256, "snapshots": len(snapshots)})
        return snapshots

    def _check_manifest(self, data: bytes) -> ArchiveContents:
        """Compare what the manifest says with what was read."""
        manifest = _json_object(data)
        version = manifest.get("format_version")
        if isinstance(version, int) and version > _ARCHIVE_VERSION:
            raise SnapshotError(
                f"it has format {version}; this version reads up to {_ARCHIVE_VERSION}: upgrade attuned-store"
            )
        if version != _ARCHIVE_VERSION or not isinstance(manifest.get("collections"), list):
            raise SnapshotError(f"{_MANIFEST} is not one of a portable snapshot")
        return self._check_collections(manifest["collections"])

    def _check_collections(self, collections: list[Any]) -> ArchiveContents:
        if len(collections) != 1 or not isinstance(collections[0], dict):
            raise SnapshotError(f"it holds {len(collections)} collections; one is read")
        found = cast("dict[str, Any]", collections[0])
        counted = self._counted
        read = {"users": counted.users, "snapshots": counted.snapshots, "parts": self._parts}
        for key, value in read.items():
            if found.get(key) != value:
                raise SnapshotError(f"{_MANIFEST}: {key} differ from what there is")
        contents = ArchiveContents(
            str(found.get("name")), _listed_axes(found), counted.users, counted.snapshots
        )
        if not counted.axes.issubset(contents.axes):
            strange = min(counted.axes.difference(contents.axes))
            raise SnapshotError(f"{_MANIFEST} does not name the axis {strange!r}, which there is")
        return contents


def _snapshot_of_line(line: bytes) -> StateSnapshot:
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


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        found: Any = json.loads(data.decode(), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{_MANIFEST}: {one_line(str(error))}") from error
    if not isinstance(found, dict):
        raise SnapshotError(f"{_MANIFEST}: a JSON object is needed")
    return cast("dict[str, Any]", found)


def _listed_axes(found: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        return check_axis_names(found.get("axes")) or ()
    except (TypeError, ValidationError) as error:
        raise SnapshotError(f"{_MANIFEST}: {one_line(str(error))}") from error

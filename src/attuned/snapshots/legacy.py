"""Archives of version 0.1, which are read: a gzipped tar of JSON lines.

Members snapshots-00000.jsonl, snapshots-00001.jsonl and so on, of about 256 KiB each, then manifest.json
with the counts; behind the gzip member an empty one, whose extra field (RFC 1952, 2.3.1.1) holds the
SHA-256 of the first: so no byte is altered, whatever is not looked at here.
"""

from __future__ import annotations

import os
from typing import IO, TYPE_CHECKING

from attuned.base.errors import SnapshotError, brief
from attuned.snapshots.archive import (
    ArchiveContents,
    GzipReader,
    StateCounter,
    check_same,
    parse_collection,
    parse_contents,
    parse_object,
    parse_states,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from attuned.base.values import StateSnapshot

TAR_BLOCK = 512  # bytes, of tar
_MANIFEST = "manifest.json"
_MAX_MEMBER_BYTES = 1 << 20
_SEAL_HEAD = b"\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x24\x00AS\x20\x00"
_SEAL_TAIL = b"\x03\x00" + bytes(8)
_SEAL_BYTES = len(_SEAL_HEAD) + 32 + len(_SEAL_TAIL)


class LegacyReader:
    """Reads an archive of version 0.1, as ArchiveReader does those of today."""

    def __init__(self, unpacked: GzipReader) -> None:
        self._unpacked = unpacked
        self._members = self._bytes = 0
        self.contents: ArchiveContents | None = None  # known at the end
        self.axes: Iterable[str] = ()  # that occurred until now; at the end those of the store
        self.sha256 = ""

    def states(self) -> Iterator[list[StateSnapshot]]:
        """The states of one member after another."""
        counted = StateCounter()
        self.axes = counted.axes
        while (member := self._take_member())[0] != _MANIFEST:
            states = parse_states(member[1], 1 + counted.states)
            counted.add(states)
            yield states
        counted.check_users()
        manifest = parse_object(member[1], _MANIFEST)
        check_same(_MANIFEST, manifest, {"format_version": 1})
        collection = parse_collection(manifest)
        check_same(_MANIFEST, collection, {"users": counted.users, "snapshots": counted.states})
        contents = parse_contents(manifest, collection)
        counted.check_axes(contents.axes)
        self._unpacked.take(2 * TAR_BLOCK)
        sha256, rest = self._unpacked.finish()
        if rest != _SEAL_HEAD + bytes.fromhex(sha256) + _SEAL_TAIL:
            raise SnapshotError("it is cut short, altered or packed anew: it does not end with its own seal")
        self.contents = contents._replace(users=counted.users, states=counted.states)
        self.axes, self.sha256 = contents.axes, self._unpacked.sha256()

    def _take_member(self) -> tuple[str, bytes]:
        import tarfile

        try:
            header = tarfile.TarInfo.frombuf(self._unpacked.take(TAR_BLOCK), "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise SnapshotError(f"it is no archive of attuned_store: {error}") from error
        expected = (f"snapshots-{self._members:05d}.jsonl", _MANIFEST)
        if header.type != tarfile.REGTYPE or header.name not in expected:
            raise SnapshotError(f"{brief(header.name)} is not {expected[0]}")
        # The manifest has some 200 bytes for each member, which all have 256 KiB but the last.
        most = _MAX_MEMBER_BYTES + (self._bytes // 1024 if header.name == _MANIFEST else 0)
        if not 0 <= header.size <= most:
            raise SnapshotError(f"{header.name} would be {header.size} bytes; none is so large")
        self._members += 1
        self._bytes += header.size
        data = self._unpacked.take(header.size)
        self._unpacked.take(-header.size % TAR_BLOCK)
        return header.name, data

    def check_ends(self, file: IO[bytes]) -> None:
        """Look at the beginning and the end alone: SnapshotError where it cannot be an archive."""
        self._take_member()
        file.seek(-min(_SEAL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        end = file.read()
        if not end.startswith(_SEAL_HEAD) or not end.endswith(_SEAL_TAIL):
            raise SnapshotError("it is cut short: it does not end with a seal")

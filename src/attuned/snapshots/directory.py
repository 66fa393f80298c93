"""Snapshot files in a directory: written whole or not at all, named, verified, listed."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import secrets
import stat
import time
from datetime import datetime, timedelta
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast
from urllib.parse import quote as urlquote

import attrs

from attuned.base.config import absolute_path, check_choice, check_flag
from attuned.base.disk import fsync, lock_descriptor, open_private
from attuned.base.errors import LOGGER, SnapshotError, ValidationError, printable
from attuned.base.values import (
    MAX_INTEGER,
    UNIX_EPOCH,
    SnapshotReason,
    SnapshotReport,
    StateSnapshot,
    check_integer,
    iso_time,
    unsettled_message,
    wall_clock,
)
from attuned.snapshots.archive import (
    GZIP_MAGIC,
    SNAPSHOT_SUFFIXES,
    ArchiveContents,
    ArchiveReader,
    ArchiveWriter,
    GzipReader,
    Progress,
    SnapshotKind,
    ignore_progress,
    read_summary,
)
from attuned.snapshots.legacy import TAR_BLOCK, LegacyReader

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence
    from pathlib import Path


class NewFile:
    """A file that appears under a final name whole and durable, or not at all.

    While it is open it is locked, so that what a killed process left is known from what another one is
    writing, and removed by the next. It is readable by its owner alone: it holds personal data.
    """

    def __init__(self, directory: Path) -> None:
        _remove_abandoned(directory)
        while True:
            self.path = directory / f".attuned-{secrets.token_hex(8)}.tmp"
            # Not a bare descriptor: after an interrupt that would keep its lock until the process ends.
            self.file = open(self.path, "x+b", opener=open_private)  # noqa: SIM115 - until it is discarded
            try:
                lock_descriptor(self.file.fileno())
                if os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                    break
            except (BlockingIOError, FileNotFoundError):
                pass  # taken for an abandoned one before it was locked: try another name
            except OSError:  # a file system without locks, where none is taken for abandoned either
                break
            self.file.close()

    def commit(self, names: Iterable[str]) -> Path:
        """Give the file the first of these names that is free in its directory."""
        self.file.flush()
        os.fsync(self.file.fileno())
        for name in names:
            final = self.path.with_name(name)
            if _link_or_rename(self.path, final):
                try:
                    fsync(final.parent)
                except BaseException:
                    final.unlink()
                    raise
                return final
        raise FileExistsError("all names are taken")

    def discard(self) -> None:
        """Close the file, and remove it unless it was given its name."""
        with contextlib.suppress(OSError):  # the next one removes it
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what could not be written then is not needed now
            self.file.close()


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed processes left: files without a name, and checksums without their snapshot."""
    orphans = filter(_is_orphan, directory.glob("*.snap.sha256"))
    for path in [*directory.glob(".attuned-????????????????.tmp"), *orphans]:
        with contextlib.suppress(OSError):  # it is being written, or gone by now
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                lock_descriptor(descriptor)
                # Still an orphan: its snapshot may have come before the lock went.
                if path.suffix == ".tmp" or _is_orphan(path):
                    path.unlink()
            finally:
                os.close(descriptor)


def _is_orphan(checksum: Path) -> bool:
    snapshot = checksum.with_suffix("")
    return SNAPSHOT_NAME.fullmatch(snapshot.name) is not None and not os.path.lexists(snapshot)


def _link_or_rename(path: Path, final: Path) -> bool:
    """Give a file a new name unless that is taken, which os.rename would overwrite."""
    try:
        os.link(path, final)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if os.path.lexists(final):
            return False
        path.rename(final)
    return True


DEFAULT_SNAPSHOT_DIRECTORY = "./data/qdrant/snapshots"
_LONGEST_NAME = 200  # of a collection, in the name of a file
SNAPSHOT_NAME = re.compile(r"(\d{8}T\d{6}\.\d{3}Z)-(.+)\.(snap|attuned)")
_KINDS: dict[str, SnapshotKind] = {suffix: kind for kind, suffix in SNAPSHOT_SUFFIXES.items()}


def _time_in_name(path: Path) -> datetime | None:
    """When a snapshot was taken, by the name of its file; None where that tells no time."""
    named = SNAPSHOT_NAME.fullmatch(path.name)
    try:
        return named and datetime.fromisoformat(named[1])
    except ValueError:  # the 99th of a month
        return None


def _snapshot_names(time_ms: int, collection: str, kind: SnapshotKind) -> Iterator[str]:
    """The name of a snapshot, and those of the milliseconds that follow, should it be taken."""
    named = urlquote(collection, safe="", errors="replace")  # a server's own may be anything
    if len(named) > _LONGEST_NAME:  # which, with what comes before and after, is longer than a file's may be
        digest = hashlib.sha256(collection.encode(errors="replace")).hexdigest()[:16]
        named = re.sub("%.?$", "", named[: _LONGEST_NAME - 17]) + "+" + digest  # no other name has a "+"
    for moment in itertools.count(time_ms):
        stamp = iso_time(moment).replace("-", "").replace(":", "")
        yield f"{stamp}-{named}{SNAPSHOT_SUFFIXES[kind]}"


def snapshot_directory(directory: str | os.PathLike[str] | None) -> Path:
    """The directory that was asked for, or the configured one: absolute."""
    given = os.environ.get("QDRANT_SNAPSHOT_DIR", "").strip() or DEFAULT_SNAPSHOT_DIRECTORY
    return absolute_path(given if directory is None else directory)


def make_snapshot_directory(directory: str | os.PathLike[str] | None) -> Path:
    """The directory that was asked for, or the configured one: absolute, and there."""
    path = snapshot_directory(directory)
    with snapshot_errors(path, "cannot be made"):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def snapshot_errors(path: str | os.PathLike[str], failed: str) -> Generator[None]:
    """Turn an error of the file system into a SnapshotError, and say which file one is about."""
    shown = printable(path)
    try:
        yield
    except OSError as error:
        raise SnapshotError(f"{shown}: {failed}: {error.strerror or error}") from error
    except SnapshotError as error:
        if shown in str(error):
            raise
        raise SnapshotError(f"{shown}: {error}") from error.__cause__


@attrs.frozen(kw_only=True)
class SnapshotRequest:
    """A snapshot to be taken."""

    directory: Path
    kind: SnapshotKind
    any_kind: bool  # nobody asked for this one
    reason: SnapshotReason
    keep: int | None
    keep_remote: bool
    created_ms: int = attrs.field(factory=lambda: wall_clock.now_ms(), init=False)  # noqa: PLW0108 - looked up anew: tests replace the clock
    began: float = attrs.field(factory=time.perf_counter, init=False)

    @classmethod
    def of(
        cls,
        directory: str | os.PathLike[str] | None,
        kind: Literal["auto", "native", "portable"],
        *,
        reason: SnapshotReason,
        keep: int | None,
        keep_remote: bool,
        native: bool,
    ) -> SnapshotRequest:
        """Check what was asked of a store, which can take native ones or not; then make the directory."""
        check_choice("kind", kind, ("auto", "native", "portable"))
        if kind == "native" and not native:
            raise ValidationError(
                'kind: native snapshots are made by a Qdrant server; take a "portable" one here'
            )
        check_choice("reason", reason, ("startup", "api", "manual"))
        if keep is not None:
            check_integer("keep", keep, 1, MAX_INTEGER)
        check_flag("keep_remote", keep_remote)
        return cls(
            directory=make_snapshot_directory(directory),
            kind=kind if kind != "auto" else "native" if native else "portable",
            any_kind=kind == "auto",
            reason=reason,
            keep=keep,
            keep_remote=keep_remote,
        )

    @property
    def created_at(self) -> datetime:
        """When the snapshot is taken, UTC."""
        return UNIX_EPOCH + timedelta(milliseconds=self.created_ms)

    def completed(self, path: Path, **found: Any) -> SnapshotReport:
        """The report of a snapshot that has its file; older ones are removed, if so many are to be kept."""
        if self.keep is not None:
            _remove_older(path, self.keep)
        report = SnapshotReport(
            status="completed",
            reason=self.reason,
            kind=self.kind,
            path=path,
            snapshot_name=path.name,
            created_at=self.created_at,
            duration_ms=(time.perf_counter() - self.began) * 1000,
            **found,
        )
        shown, taken_ms = printable(path), report.duration_ms
        LOGGER.info("snapshot %s: %s, %s bytes, %.0f ms", path.name, shown, report.bytes, taken_ms)
        return report


def _remove_older(newest: Path, keep: int) -> None:
    """Remove the older snapshots of the same collection and kind, beyond so many.

    What is dated in the future, or not what its name says, does not count, and stays.
    """
    stamp_size = newest.name.index("-")
    try:
        for path in snapshots_in(newest.parent):
            if path.name[stamp_size:] == newest.name[stamp_size:] and path.name < newest.name:
                report = describe_snapshot(path)
                if report is not None and report.status == "completed" and _time_in_name(path):
                    keep -= 1
                    if keep < 1:
                        path.unlink(missing_ok=True)
                        checksum_file(path).unlink(missing_ok=True)
    except (OSError, SnapshotError) as error:  # the new one is there: one too many is no failure
        LOGGER.warning("removing older snapshots than %s failed: %s", printable(newest), error)


def snapshots_in(directory: Path) -> list[Path]:
    """The files with names of snapshots, newest first."""
    with snapshot_errors(directory, "cannot be listed"):
        with os.scandir(directory) as entries:
            named = [entry for entry in entries if SNAPSHOT_NAME.fullmatch(entry.name)]
        plain = [entry.name for entry in named if entry.is_file(follow_symlinks=False)]
    return [directory / name for name in sorted(plain, reverse=True)]


def checksum_file(path: Path) -> Path:
    """What holds the SHA-256 of a native snapshot, as sha256sum writes it."""
    return path.with_name(path.name + ".sha256")


class SnapshotOrigin(NamedTuple):
    """Which store a snapshot is of."""

    target: str
    engine: str
    collection: str


class SnapshotWriter:
    """Takes a snapshot; as a context manager it leaves the finished file or none."""

    def __init__(self, request: SnapshotRequest) -> None:
        self._request = request
        with self._errors():
            self._new = NewFile(request.directory)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return snapshot_errors(self._request.directory, "cannot be written")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._new.discard()

    def _check_written(self, sha256: str) -> None:
        """Read the file back before older ones are given up for it."""
        if self._request.keep is not None:
            self._new.file.flush()
            self._new.file.seek(0)
            if self._read_back(self._new.file) != sha256:
                raise SnapshotError("what was written is not what is read back; is the disk sound?")

    def _read_back(self, file: IO[bytes]) -> str:
        """The SHA-256 of what was written, read to the end."""
        return hashlib.file_digest(cast("Any", file), "sha256").hexdigest()


class PortableSnapshotWriter(SnapshotWriter):
    """Takes a portable snapshot."""

    def __init__(self, request: SnapshotRequest, origin: SnapshotOrigin, axes: Sequence[str]) -> None:
        super().__init__(request)
        self._origin = origin
        self._unsettled: list[str] = []
        contents = ArchiveContents(origin.engine, request.created_at, origin.collection, tuple(axes))
        self._archive = ArchiveWriter(self._new.file, contents)

    def add(self, states: Sequence[StateSnapshot], unsettled: Sequence[str] = ()) -> int:
        """Take in states, all of a user, oldest first; returns how many there are by now.

        ``unsettled`` are the users whose states may be of several moments.
        """
        with self._errors():
            self._archive.add(states)
        self._unsettled += unsettled
        return self._archive.counted.states

    def finish(self) -> SnapshotReport:
        """Give the file its name; then remove older ones, if so many are to be kept."""
        request, archive = self._request, self._archive
        with self._errors():
            sha256 = archive.finish()
            self._check_written(sha256)
            path = self._new.commit(_snapshot_names(request.created_ms, self._origin.collection, "portable"))
        return request.completed(
            path,
            target=self._origin.target,
            bytes=archive.bytes,
            sha256=sha256,
            axes=archive.contents.axes,
            users=archive.counted.users,
            points=archive.counted.states,
            message=unsettled_message(self._unsettled),
        )

    def _read_back(self, file: IO[bytes]) -> str:
        reader = ArchiveReader(GzipReader(file))
        for _ in reader.states():
            pass
        return reader.sha256


class RemoteSnapshot(NamedTuple):
    """A snapshot as a server describes it. The name is data: nothing is named after it here."""

    name: str
    size: int
    sha256: str | None


class NativeSnapshotWriter(SnapshotWriter):
    """Takes in the snapshot of a server."""

    def __init__(self, request: SnapshotRequest) -> None:
        super().__init__(request)
        self.begin()

    def begin(self) -> None:
        """Start anew: what was taken in of an earlier try is forgotten."""
        self._digest, self._size = hashlib.sha256(), 0
        with self._errors():
            self._new.file.seek(0)
            self._new.file.truncate()

    def add(self, piece: bytes) -> None:
        """Take in a piece of the file."""
        self._digest.update(piece)
        self._size += len(piece)
        with self._errors():
            self._new.file.write(piece)

    def finish(self, origin: SnapshotOrigin, offered: RemoteSnapshot, points: int) -> SnapshotReport:
        """Compare the file with what the server said of it, and give it its name."""
        sha256 = self._digest.hexdigest()
        if self._size == 0:
            raise SnapshotError(f"{origin.target}: the snapshot is empty")
        if self._size != offered.size or offered.sha256 not in (None, sha256):
            raise SnapshotError(
                f"{origin.target}: the snapshot has {self._size} bytes and the SHA-256 {sha256}, "
                f"the server said {offered.size} and {offered.sha256}"
            )
        with self._errors():
            self._check_written(sha256)
            path = self._commit(origin.collection, sha256)
        return self._request.completed(
            path, target=origin.target, bytes=self._size, sha256=sha256, points=points
        )

    def _commit(self, collection: str, sha256: str) -> Path:
        """Name the file, after its checksum file: it is never without."""
        checksum = NewFile(self._request.directory)
        try:
            for name in _snapshot_names(self._request.created_ms, collection, "native"):
                final, beside = self._request.directory / name, None
                if os.path.lexists(final):
                    continue
                checksum.file.seek(0)
                checksum.file.write(f"{sha256}  {name}\n".encode())  # of one length under every name
                try:
                    beside = checksum.commit([checksum_file(final).name])
                    return self._new.commit([name])
                except BaseException as error:
                    taken = isinstance(error, FileExistsError)
                    if beside and (taken or not os.path.lexists(final)):  # else an interrupt came right after
                        beside.unlink()
                    if not taken:
                        raise
        finally:
            checksum.discard()
        raise AssertionError("unreachable")  # pragma: no cover - the names do not end


class SnapshotFile:
    """A snapshot file to be verified or restored; it may be read more than once."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = absolute_path(path)
        self.kind: SnapshotKind = "portable"
        self.contents: ArchiveContents | None = None  # known once it was read to its end
        self.sha256 = ""
        self.unchecked = ""  # what could not be verified
        self._began = time.perf_counter()
        with self._errors(), self._opened() as file:
            self.bytes = os.fstat(file.fileno()).st_size
            guessed: SnapshotKind = "portable" if file.read(2) == GZIP_MAGIC else "native"
            self.kind = _KINDS.get(self.path.suffix) or guessed

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return snapshot_errors(self.path, "cannot be read")

    def _opened(self) -> IO[bytes]:
        if not stat.S_ISREG(self.path.stat().st_mode):
            raise SnapshotError("is not a file")
        return self.path.open("rb")

    def header(self) -> ArchiveContents | None:
        """What a portable snapshot says of itself in its header and footer; what is between is not read.

        None for a native one and one of version 0.1. Raises SnapshotError where either is damaged.
        """
        with self._errors(), self._opened() as file:
            if self.kind == "native":
                _member_size(file)
                return None
            unpacked = GzipReader(file)
            if unpacked.starts_with(b"{"):
                return read_summary(unpacked, file)
            LegacyReader(unpacked).check_ends(file)
            return None

    def axes(self) -> tuple[str, ...] | None:
        """The axes of a portable snapshot, by its header; one of version 0.1 is read to its end for them."""
        contents = self.contents or self.header()
        if contents is None and self.kind == "portable":
            self.verify()
            contents = self.contents
        return contents and contents.axes

    def states(self, axes: Sequence[str] | None = None) -> Iterator[list[StateSnapshot]]:
        """The states of a portable snapshot, for a store with these axes.

        What is read at the end may show that it is damaged.
        """
        with self._errors(), self._opened() as file:
            unpacked = GzipReader(file)
            reader = (ArchiveReader if unpacked.starts_with(b"{") else LegacyReader)(unpacked)
            for states in itertools.chain(reader.states(), [[]]):  # version 0.1 names its axes at the end
                strange = sorted(set(reader.axes).difference(reader.axes if axes is None else axes))
                if strange:
                    raise SnapshotError(
                        f"has other axes than the store: {', '.join(strange[:10])}; "
                        f"the store has {', '.join(axes or ())}"
                    )
                yield states
            if self.sha256 not in ("", reader.sha256):
                raise SnapshotError("it was changed while it was read")
            self.contents, self.sha256 = reader.contents, reader.sha256

    def batches(self, size: int, axes: Sequence[str]) -> Iterator[list[StateSnapshot]]:
        """The states of a portable snapshot, so many at a time, for a store with these axes."""
        for states in self.states(axes):
            yield from (states[start : start + size] for start in range(0, len(states), size))

    @property
    def total(self) -> int | None:
        """How many states there are, once that is known."""
        return self.contents and self.contents.states

    def check_mode(self, mode: str, *, native: bool) -> None:
        """Raise ValidationError or SnapshotError where a store cannot do with the file what was asked for."""
        check_choice("mode", mode, ("replace", "merge", "skip"))
        if self.kind == "native" and not native:
            raise SnapshotError(
                f"{printable(self.path)}: is no portable snapshot; a Qdrant server restores native ones"
            )
        if self.kind == "native" and mode != "replace":
            raise ValidationError(f'mode: a native snapshot can only "replace", not {mode}')

    def verify(self, axes: Sequence[str] | None = None, progress: Progress = ignore_progress) -> None:
        """Read all of it; raises SnapshotError where something is wrong."""
        if self.kind == "native":
            with self._errors(), self._opened() as file:
                self.sha256, is_known = _check_native(file, checksum_file(self.path))
            if not is_known:
                self.unchecked = (
                    f"its contents were not checked: there is no {printable(checksum_file(self.path).name)}"
                )
            return
        for done in self.verifying(axes):
            progress(done, None)

    def verifying(self, axes: Sequence[str] | None) -> Iterator[int]:
        """Read all of a portable one; gives the number of states read by and by."""
        return itertools.accumulate(len(states) for states in self.states(axes) if states)

    def report(self, target: str, contents: ArchiveContents | None = None) -> SnapshotReport:
        """What became of it; what it holds is what was read, unless it is given."""
        contents = contents or self.contents
        return SnapshotReport(
            status="completed",
            target=target,
            kind=self.kind,
            path=self.path,
            snapshot_name=self.path.name,
            created_at=contents.created_at if contents else _time_in_name(self.path),
            axes=contents and contents.axes,
            bytes=self.bytes,
            sha256=self.sha256 or None,
            users=contents and contents.users,
            points=contents and contents.states,
            duration_ms=(time.perf_counter() - self._began) * 1000,
            message=self.unchecked,
        )


def describe_snapshot(path: Path) -> SnapshotReport | None:
    """What header and footer of a file say, or why they say nothing; None where there is no file any more."""
    try:
        saved = SnapshotFile(path)
        return saved.report(str(path), saved.header())
    except SnapshotError as error:
        if not os.path.lexists(path):
            return None
        return SnapshotReport(
            status="failed",
            target=str(path),
            kind=_KINDS.get(path.suffix),
            path=path,
            snapshot_name=path.name,
            created_at=_time_in_name(path),
            message=str(error),
        )


def _check_native(file: IO[bytes], checksum: Path) -> tuple[str, bool]:
    """Walk through the tar that a native snapshot is, and compare its SHA-256 with the one kept beside it.

    Returns it, and whether there was another one to compare it with.
    """
    sha256 = hashlib.file_digest(cast("Any", file), "sha256").hexdigest()
    total = file.tell()
    file.seek(0)
    while (size := _member_size(file)) is not None:
        if not 0 <= size < total:
            raise SnapshotError("is cut short, or damaged")
        file.seek(size + -size % TAR_BLOCK, os.SEEK_CUR)
    try:
        kept = checksum.read_text(encoding="utf-8", errors="replace").split(maxsplit=1)
    except FileNotFoundError:
        return sha256, False
    if kept[:1] != [sha256]:
        raise SnapshotError(f"is damaged: its SHA-256 is not that of {printable(checksum.name)}")
    return sha256, True


def _member_size(file: IO[bytes]) -> int | None:
    """How much follows the next header in a tar; None at its end."""
    import tarfile

    block = file.read(TAR_BLOCK)
    if not block:
        raise SnapshotError("is cut short")
    if not any(block):
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise SnapshotError(f"is not a snapshot of a server, nor a portable one: {error}") from error
    if header.type == tarfile.GNUTYPE_SPARSE:
        # Its map may go on in blocks, each of which says whether there is another.
        extended = block[482:483]
        while any(extended):
            extended = file.read(TAR_BLOCK)[504:505]
    return header.size

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
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypedDict, cast
from urllib.parse import quote as urlquote

import attrs

from attuned.base.config import absolute_path, check_choice, check_flag
from attuned.base.disk import fsync, lock_descriptor, open_private
from attuned.base.errors import LOGGER, SnapshotError, ValidationError
from attuned.base.values import (
    MAX_INTEGER,
    SnapshotReason,
    SnapshotReport,
    StateSnapshot,
    check_integer,
    iso_time,
    wall_clock,
)
from attuned.snapshots.archive import (
    GZIP_MAGIC,
    READ_BYTES,
    SNAPSHOT_SUFFIXES,
    TAR_BLOCK,
    ArchiveContents,
    ArchiveReader,
    ArchiveWriter,
    Progress,
    SnapshotKind,
    ignore_progress,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence


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
            if self._is_kept():
                break
            self.file.close()

    def _is_kept(self) -> bool:
        """Whether nobody took it for an abandoned one before it was locked."""
        try:
            lock_descriptor(self.file.fileno())
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except (BlockingIOError, FileNotFoundError):
            return False
        except OSError:  # a file system without locks, where none is taken for abandoned either
            return True

    def commit(self, names: Iterable[str]) -> Path:
        """Give the file the first of these names that is free in its directory."""
        self.file.flush()
        os.fsync(self.file.fileno())
        for name in names:
            final = self.path.with_name(name)
            if _name_anew(self.path, final):
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
    orphans = (path for path in directory.glob("*.snap.sha256") if _is_orphan(path))
    for path in [*directory.glob(".attuned-????????????????.tmp"), *orphans]:
        with contextlib.suppress(OSError):  # it is being written, or gone by now
            _remove_unlocked(path)


def _is_orphan(checksum: Path) -> bool:
    snapshot = checksum.with_suffix("")
    return SNAPSHOT_NAME.fullmatch(snapshot.name) is not None and not os.path.lexists(snapshot)


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        lock_descriptor(descriptor)
        # Still an orphan: its snapshot may have come before the lock went.
        if path.suffix == ".tmp" or _is_orphan(path):
            path.unlink()
    finally:
        os.close(descriptor)


def _name_anew(path: Path, final: Path) -> bool:
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


# Files of snapshots in a directory

DEFAULT_SNAPSHOT_DIRECTORY = "./data/qdrant/snapshots"


SNAPSHOT_NAME = re.compile(r"(\d{8}T\d{6}\.\d{3}Z)-(.+)\.(snap|attuned)")


def time_stamp(time_ms: int) -> str:
    """A time as it stands in names: 20260117T120000.123Z."""
    return iso_time(time_ms).replace("-", "").replace(":", "")


def _snapshot_names(time_ms: int, collection: str, kind: SnapshotKind) -> Iterator[str]:
    """The name of a snapshot, and those of the milliseconds that follow, should it be taken."""
    named = urlquote(collection, safe="", errors="replace")  # a server's own may be anything
    return (f"{time_stamp(moment)}-{named}{SNAPSHOT_SUFFIXES[kind]}" for moment in itertools.count(time_ms))


def snapshot_directory(directory: str | os.PathLike[str] | None) -> Path:
    """The directory that was asked for, or the configured one: absolute."""
    given = os.environ.get("QDRANT_SNAPSHOT_DIR") or DEFAULT_SNAPSHOT_DIRECTORY
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
    try:
        yield
    except OSError as error:
        raise SnapshotError(f"{path}: {failed}: {error.strerror or error}") from error
    except SnapshotError as error:
        if str(path) in str(error):
            raise
        raise SnapshotError(f"{path}: {error}") from error.__cause__


class SnapshotRequestFields(TypedDict):
    reason: SnapshotReason
    keep: int | None
    keep_remote: bool


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
        fields: SnapshotRequestFields,
        *,
        native: bool,
    ) -> SnapshotRequest:
        """Check what was asked of a store, which can take native ones or not; then make the directory."""
        check_choice("kind", kind, ("auto", "native", "portable"))
        if kind == "native" and not native:
            raise ValidationError(
                'kind: native snapshots are made by a Qdrant server; take a "portable" one here'
            )
        check_choice("reason", fields["reason"], ("startup", "api", "manual"))
        if fields["keep"] is not None:
            check_integer("keep", fields["keep"], 1, MAX_INTEGER)
        check_flag("keep_remote", fields["keep_remote"])
        chosen: SnapshotKind = kind if kind != "auto" else "native" if native else "portable"
        place = make_snapshot_directory(directory)
        return cls(**fields, kind=chosen, any_kind=kind == "auto", directory=place)

    def completed(self, path: Path, **found: Any) -> SnapshotReport:
        """The report of a snapshot that has its file."""
        report = SnapshotReport(
            status="completed",
            reason=self.reason,
            kind=self.kind,
            path=path,
            snapshot_name=path.name,
            duration_ms=(time.perf_counter() - self.began) * 1000,
            **found,
        )
        LOGGER.info("snapshot %s: %s, %s bytes, %.0f ms", path.name, path, report.bytes, report.duration_ms)
        return report


class SnapshotOrigin(NamedTuple):
    """Which store a snapshot is of."""

    target: str
    engine: str
    collection: str


class SnapshotWriter:
    """Takes a snapshot; as a context manager it leaves the finished file or none."""

    def __init__(self, order: SnapshotRequest) -> None:
        self._order = order
        with self._errors():
            self._new = NewFile(order.directory)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return snapshot_errors(self._order.directory, "cannot be written")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._new.discard()


class PortableSnapshotWriter(SnapshotWriter):
    """Takes a portable snapshot."""

    def __init__(self, order: SnapshotRequest, origin: SnapshotOrigin, axes: Sequence[str]) -> None:
        super().__init__(order)
        self._origin, self._axes = origin, axes
        self._writer = ArchiveWriter(self._new.file, order.created_ms)

    def add(self, snapshots: Sequence[StateSnapshot]) -> int:
        """Take in snapshots, all of a user, oldest first; returns how many there are by now."""
        with self._errors():
            self._writer.add(snapshots)
        return self._writer.counted.snapshots

    def finish(self) -> SnapshotReport:
        """Give the file its name; then remove older ones, if so many are to be kept."""
        order, origin = self._order, self._origin
        with self._errors():
            sha256 = self._writer.finish(origin.engine, origin.collection, self._axes)
            self._new.file.flush()
            if order.keep is not None:
                _check_written(self._new, sha256)
            path = self._new.commit(_snapshot_names(order.created_ms, origin.collection, "portable"))
        _remove_older(path, order.keep)
        return order.completed(
            path,
            target=origin.target,
            bytes=self._writer.bytes,
            sha256=sha256,
            points=self._writer.counted.snapshots,
        )


def _check_written(new: NewFile, sha256: str) -> None:
    """Read a portable snapshot back before older ones are given up for it."""
    new.file.seek(0)
    reader = ArchiveReader(new.file)
    for _ in reader.parts():
        pass
    if reader.sha256 != sha256:
        raise _not_read_back()


def _not_read_back() -> SnapshotError:
    return SnapshotError("what was written is not what is read back; is the disk sound?")


def _remove_older(newest: Path, keep: int | None) -> None:
    """Remove the older snapshots of the same collection and kind, beyond so many."""
    named = SNAPSHOT_NAME.fullmatch(newest.name)
    if keep is None or named is None:
        return
    alike = newest.name[len(named[1]) :]
    try:
        same = [path for path in snapshots_in(newest.parent) if path.name[len(named[1]) :] == alike]
        for path in [path for path in same if path != newest][keep - 1 :]:
            path.unlink(missing_ok=True)
            checksum_file(path).unlink(missing_ok=True)
    except (OSError, SnapshotError) as error:  # the new one is there: one too many is no failure
        LOGGER.warning("removing older snapshots than %s failed: %s", newest, error)


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


class RemoteSnapshot(NamedTuple):
    """A snapshot as a server describes it. The name is data: nothing is named after it here."""

    name: str
    size: int
    sha256: str | None


class NativeSnapshotWriter(SnapshotWriter):
    """Takes in the snapshot of a server."""

    def __init__(self, order: SnapshotRequest) -> None:
        super().__init__(order)
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
        order, sha256 = self._order, self._digest.hexdigest()
        if self._size == 0:
            raise SnapshotError(f"{origin.target}: the snapshot is empty")
        if self._size != offered.size:
            raise SnapshotError(
                f"{origin.target}: the snapshot has {self._size} bytes, the server said {offered.size}"
            )
        if offered.sha256 not in (None, sha256):
            raise SnapshotError(
                f"{origin.target}: the snapshot has the SHA-256 {sha256}, the server said {offered.sha256}"
            )
        with self._errors():
            if order.keep is not None:
                self._check_written(sha256)
            path = self._commit(origin.collection, sha256)
        _remove_older(path, order.keep)
        return order.completed(path, target=origin.target, bytes=self._size, sha256=sha256, points=points)

    def _check_written(self, sha256: str) -> None:
        """Read the file back before older ones are given up for it."""
        self._new.file.seek(0)
        if hashlib.file_digest(cast("Any", self._new.file), "sha256").hexdigest() != sha256:
            raise _not_read_back()

    def _commit(self, collection: str, sha256: str) -> Path:
        """Name the file, after its checksum file: it is never without."""
        checksum = NewFile(self._order.directory)
        try:
            for name in _snapshot_names(self._order.created_ms, collection, "native"):
                if path := self._commit_as(name, checksum, sha256):
                    return path
        finally:
            checksum.discard()
        raise AssertionError("unreachable")  # pragma: no cover - the names do not end

    def _commit_as(self, name: str, checksum: NewFile, sha256: str) -> Path | None:
        """Give both files their names; None where one is taken."""
        if os.path.lexists(self._order.directory / name):
            return None
        checksum.file.seek(0)
        checksum.file.write(f"{sha256}  {name}\n".encode())  # of one length under every name
        try:
            beside = checksum.commit([checksum_file(Path(name)).name])
        except FileExistsError:
            return None
        try:
            return self._new.commit([name])
        except FileExistsError:
            beside.unlink()
            return None
        except BaseException:
            if not os.path.lexists(self._order.directory / name):  # else an interrupt came right after
                beside.unlink()
            raise


class SnapshotFile:
    """A snapshot file to be verified or restored; it may be read more than once."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = absolute_path(path)
        self.kind: SnapshotKind = "portable"
        self.contents: ArchiveContents | None = None
        self.sha256 = ""
        self._began = time.perf_counter()
        with self._errors(), self._opened() as file:
            self.bytes = os.fstat(file.fileno()).st_size
            kinds: dict[str, SnapshotKind] = {suffix: kind for kind, suffix in SNAPSHOT_SUFFIXES.items()}
            guessed: SnapshotKind = "portable" if file.read(2) == GZIP_MAGIC else "native"
            self.kind = kinds.get(self.path.suffix) or guessed

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return snapshot_errors(self.path, "cannot be read")

    def _opened(self) -> IO[bytes]:
        if not stat.S_ISREG(self.path.stat().st_mode):
            raise SnapshotError("is not a file")
        return self.path.open("rb")

    def parts(self) -> Iterator[list[StateSnapshot]]:
        """The states of a portable snapshot; what is read at the end may show that it is damaged."""
        with self._errors(), self._opened() as file:
            reader = ArchiveReader(file)
            yield from reader.parts()
            if self.sha256 not in ("", reader.sha256):
                raise SnapshotError("it was changed while it was read")
            self.contents, self.sha256 = reader.contents, reader.sha256

    def batches(self, size: int, axes: Sequence[str]) -> Iterator[list[StateSnapshot]]:
        """The states of a portable snapshot, so many at a time, for a store with these axes."""
        for part in self.parts():
            shapes = {snapshot.axes._shape for snapshot in part}
            self._check_axes({name for shape in shapes for name in shape.names}, axes)
            yield from (part[start : start + size] for start in range(0, len(part), size))
        self._check_axes(self._known().axes, axes)

    def _check_axes(self, found: Iterable[str], known: Sequence[str]) -> None:
        strange = sorted(set(found).difference(known))
        if strange:
            raise SnapshotError(
                f"{self.path}: has other axes than the store: {', '.join(strange[:10])}; "
                f"the store has {', '.join(known)}"
            )

    @property
    def total(self) -> int | None:
        """How many states there are, once that is known."""
        return None if self.contents is None else self.contents.snapshots

    def check_mode(self, mode: str, *, native: bool) -> None:
        """Raise ValidationError or SnapshotError where a store cannot do with the file what was asked for."""
        check_choice("mode", mode, ("replace", "merge", "skip"))
        if self.kind == "native" and not native:
            raise SnapshotError(
                f"{self.path}: is no portable snapshot; a native one is restored by a Qdrant server alone"
            )
        if self.kind == "native" and mode != "replace":
            raise ValidationError(f'mode: a native snapshot can only "replace", not {mode}')

    def _known(self) -> ArchiveContents:
        if self.contents is None:
            raise SnapshotError("has not been read to its end")
        return self.contents

    def verify(self, axes: Sequence[str] | None = None, progress: Progress = ignore_progress) -> None:
        """Read all of it; raises SnapshotError where something is wrong."""
        if self.kind == "native":
            with self._errors(), self._opened() as file:
                self.sha256 = _check_native(file, self.path)
            return
        for done in self.verifying(axes):
            progress(done, None)

    def verifying(self, axes: Sequence[str] | None) -> Iterator[int]:
        """Read all of a portable one; gives the number of states read by and by."""
        done = 0
        for part in self.parts():
            done += len(part)
            yield done
        if axes is not None:
            self._check_axes(self._known().axes, axes)

    def report(self, target: str) -> SnapshotReport:
        """What became of it."""
        return SnapshotReport(
            status="completed",
            target=target,
            kind=self.kind,
            path=self.path,
            snapshot_name=self.path.name,
            bytes=self.bytes,
            sha256=self.sha256 or None,
            points=self.total,
            duration_ms=(time.perf_counter() - self._began) * 1000,
        )


class _Hashed:
    """A file that is read forward, and its SHA-256 so far."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self.digest.update(piece)
        return piece

    def skip(self, size: int) -> None:
        while size > 0:
            piece = self.read(min(size, READ_BYTES))
            if not piece:
                raise SnapshotError("is cut short")
            size -= len(piece)


def _check_native(file: IO[bytes], path: Path) -> str:
    """Walk through the tar that a native snapshot is, and compare its SHA-256 with the one kept beside it."""
    hashed = _Hashed(file)
    while any(block := hashed.read(TAR_BLOCK)):
        _skip_member(hashed, block)
    if not block:
        raise SnapshotError("is cut short")
    while hashed.read(READ_BYTES):
        pass
    sha256 = hashed.digest.hexdigest()
    _compare_checksum(sha256, path)
    return sha256


def _skip_member(hashed: _Hashed, block: bytes) -> None:
    import tarfile

    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise SnapshotError(f"is not a snapshot of a server, nor a portable one: {error}") from error
    if header.type == tarfile.GNUTYPE_SPARSE:
        # Its map may go on in blocks, each of which says whether there is another.
        extended = block[482:483]
        while any(extended):
            extended = hashed.read(TAR_BLOCK)[504:505]
    hashed.skip(header.size + -header.size % TAR_BLOCK)


def _compare_checksum(sha256: str, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        kept = checksum_file(path).read_text(encoding="utf-8", errors="replace").split(maxsplit=1)
        if kept[:1] != [sha256]:
            raise SnapshotError(f"is damaged: its SHA-256 is not that of {checksum_file(path).name}")

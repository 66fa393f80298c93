"""Durable files and the locks of the operating system."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any, cast

from attuned.base.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, even after a power cut."""
    temporary = temporary_name(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync(path.parent)


def temporary_name(path: Path) -> Path:
    """The name under which a file is written before it gets its own."""
    return path.with_name(path.name + ".tmp")


def fsync(*paths: Path) -> None:
    """Make files, and the names in directories, survive a power cut."""
    for path in paths:
        if path.is_dir() and sys.platform == "win32":
            continue  # which keeps names without being asked
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest, a file with one JSON object, holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read as a manifest: {error}") from error
    if not isinstance(found, dict):
        raise StoreError(f"{path}: is no manifest, which is a JSON object")
    return cast("dict[str, Any]", found)


if sys.platform == "win32":

    def lock_descriptor(descriptor: int) -> None:
        """Take the operating system's lock on an open file, or raise OSError at once."""
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock_descriptor(descriptor: int) -> None:
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:

    def lock_descriptor(descriptor: int) -> None:
        """Take the operating system's lock on an open file, or raise OSError at once."""
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock_descriptor(descriptor: int) -> None:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)


class LockFile:
    """The operating system's lock on a file: it goes with the process that holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock_descriptor(self._descriptor)
        except OSError:
            os.close(self._descriptor)
            raise

    def is_there(self) -> bool:
        """Whether the file still has its name: nobody has removed or replaced it, or a directory above it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except OSError:
            return False

    def release(self) -> None:
        """Give the lock up, also where a child that was just forked still has the file open."""
        _unlock_descriptor(self._descriptor)
        os.close(self._descriptor)

    def abandon(self) -> None:
        """Let go of the file in a forked child; the lock stays the parent's."""
        os.close(self._descriptor)


def open_private(path: str, flags: int) -> int:
    """Open a file that its owner alone can read; an opener for open()."""
    return os.open(path, flags, 0o600)

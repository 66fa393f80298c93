"""How far a long operation is: told to a callable, and on a terminal shown by the command."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command import PACKAGE, environment
from conformance import Awaited, content, needs, state

import attuned_store
from attuned_store import AsyncStateStore, MemoryStore, ValidationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from conformance import Open

pytestmark = pytest.mark.once

STATES = [state(f"user-{number}") for number in range(1_000)]
posix = pytest.mark.skipif(os.name != "posix", reason="needs terminals of POSIX")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Steps(list[tuple[int, "int | None"]]):
    """What a callable was told."""

    def __call__(self, done: int, total: int | None) -> None:
        self.append((done, total))

    def check(self, done: int, total: int | None) -> None:
        assert all(one[0] <= other[0] for one, other in itertools.pairwise(self))
        assert self[-1] == (done, total)
        assert {step[1] for step in self} == {total}


async def awaited(answer: Any) -> Any:
    return await answer if hasattr(answer, "__await__") else answer


@pytest.mark.anyio
async def test_long_operations_tell_how_far_they_are(open_store: Open, tmp_path: Path) -> None:
    """Everything that takes long tells a callable how far it is, and the total where it is known."""
    store, other = await open_store(), await open_store("other")
    sync = isinstance(store, Awaited)
    one, two = (store.store, other.store) if sync and isinstance(other, Awaited) else (store, other)
    verify: Callable[..., Any] = attuned_store.verify_snapshot if sync else attuned_store.averify_snapshot
    copy: Callable[..., Any] = attuned_store.copy if sync else attuned_store.acopy

    await store.upsert_many(STATES, progress=(written := Steps()))
    report = await store.create_snapshot(tmp_path, kind="portable", progress=(taken := Steps()))
    await awaited(verify(report.path, progress=(verified := Steps())))
    await store.restore_snapshot(report.path, mode="merge", progress=(restored := Steps()))
    await awaited(copy(one, two, progress=(copied := Steps())))

    written.check(1_000, 1_000)
    assert len(written) > 1
    taken.check(1_000, None)
    verified.check(1_000, None)
    verified_first = Steps(step for step in restored if step[1] is None)
    verified_first.check(1_000, None)
    Steps(step for step in restored if step[1] is not None).check(1_000, 1_000)
    assert restored[0][1] is None
    copied.check(1_000, None)


SHOWN = f"""
import sys, time
if sys.argv[1] == "plain":
    sys.modules["rich"] = None
from {PACKAGE}.showing import Progress
with Progress("importing") as progress:
    progress.count(500, int(sys.argv[2]) or None)
    time.sleep(2.5)
print("end", file=sys.stderr)
"""


def shown(form: str, total: int, **variables: str) -> str:
    """What a terminal gets to see of a progress that lasts longer than a second."""
    import pty

    master, slave = pty.openpty()
    env = environment(TERM="xterm-256color", COLUMNS="80", **variables)
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        env.pop(variable, None)
    words = [sys.executable, "-c", SHOWN, form, str(total)]
    with subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=env) as child:
        os.close(slave)
        seen = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(master, 4096):
                seen += data
        os.close(master)
    assert child.returncode == 0
    return seen.decode()


@posix
@needs("rich")
def test_a_terminal_shows_a_bar() -> None:
    """On a terminal, where rich is installed and the end is known, the command shows a bar, and wipes it."""
    seen = shown("rich", 1_000)
    drawn = [CONTROL.sub("", line) for line in seen.split("\r")]
    assert any(re.fullmatch(r"importing ━{12}.━{11} 500 of 1,000, \d s", line) for line in drawn), drawn
    assert re.search(r"\x1b\[2K\r?end", seen), seen


@posix
@needs("rich")
def test_a_bar_is_of_plain_characters_where_there_are_no_others() -> None:
    """A terminal of ASCII gets a bar of ASCII."""
    seen = shown("rich", 1_000, PYTHONIOENCODING="ascii")
    assert seen.isascii()
    assert re.search(r"-{12}.*500 of 1,000", seen)


@posix
@pytest.mark.parametrize(
    ("total", "line"), [(1_000, "importing: 500 of 1,000, 1 s"), (0, "importing: 500, 1 s")]
)
def test_without_rich_it_is_a_plain_line(total: int, line: str) -> None:
    """Without rich the line tells the numbers alone, and is wiped away."""
    lines = shown("plain", total).split("\r")
    assert lines[1] == line.ljust(69)  # the first is empty
    assert lines[-3:] == [" " * 70, "end", "\n"]


def test_an_error_of_the_callable_is_the_callers(tmp_path: Path) -> None:
    """What a callable for progress raises ends the operation, and reaches the caller."""
    store = MemoryStore()

    def fail(done: int, total: int | None) -> None:
        raise RuntimeError(f"{done} of {total}")

    with pytest.raises(RuntimeError, match="64 of 1000"):
        store.upsert_many(STATES, progress=fail)
    with pytest.raises(RuntimeError):
        store.create_snapshot(tmp_path, progress=fail)
    assert list(tmp_path.iterdir()) == []


TAKING_PROGRESS: dict[str, Callable[[Any, Any], Any]] = {
    "upsert_many": lambda store, name: store.upsert_many(STATES, progress=5),
    "create_snapshot": lambda store, name: store.create_snapshot("taken", kind="portable", progress=5),
    "replace": lambda store, name: store.restore_snapshot(name, progress=5),
    "merge": lambda store, name: store.restore_snapshot(name, mode="merge", progress=5),
    "skip": lambda store, name: store.restore_snapshot(name, mode="skip", progress=5),
    "verify": lambda store, name: attuned_store.verify_snapshot(name, progress=5),
    "averify": lambda store, name: attuned_store.averify_snapshot(name, progress=5),
    "copy": lambda store, name: twin_of_copy(store)("memory://", store, replace=True, progress=5),
}


def twin_of_copy(store: Any) -> Callable[..., Any]:
    return attuned_store.acopy if isinstance(store, AsyncStateStore) else attuned_store.copy


@pytest.mark.anyio
async def test_what_is_no_function_is_refused_before_anything_is_written(
    open_store: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A progress that cannot be called is an error at once, not after the first batch."""
    monkeypatch.chdir(tmp_path)
    store = await open_store()
    await store.upsert_latest(state("ann", 1))
    with MemoryStore() as other:
        other.upsert_many(STATES)
        name = other.create_snapshot("given").path

    for operation in TAKING_PROGRESS.values():
        with pytest.raises(ValidationError, match="progress: a function is needed, got int"):
            await awaited(operation(getattr(store, "store", store), name))

    assert await content(store) == {"ann": (state("ann", 1), [state("ann", 1)])}
    assert not Path("taken").exists()

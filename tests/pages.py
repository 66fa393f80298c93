"""Pages of documentation for the tests: what stands on them, and what happens where their code is run."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from command import PROGRAM, environment, main, module

import attuned_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]

SERVER = "http://localhost:6333"
PORTS = ("8000", "8080")  # of the servers that the pages start; the last one is that of `serve`
HOME = "/home/ada"
NOON = datetime(2026, 1, 17, 12, tzinfo=UTC)  # when the commands are run

_BLOCK = re.compile(
    r"(?:^`(?P<file>[\w.]+)`:\n\n)?"
    r"^```(?P<language>python|console)\n(?P<text>.*?)^```\n"
    r"(?:\nIt prints:\n\n```text\n(?P<shown>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
_COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
_PLAIN = re.compile(r"(?:[A-Z_]+=\S+ )*attuned-store [^|&;$*>]*")  # what needs no shell
_PROGRAMS = {
    "attuned-store": PROGRAM,
    "python": (sys.executable,),
    "pytest": (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore"),  # of others
    "uvicorn": (sys.executable, "-m", "uvicorn"),
}


class Block(NamedTuple):
    """A block of Python, or of commands with what they print.

    ``shown`` is what stands after "It prints:"; ``file`` the name under which a block is to be saved.
    """

    line: int
    language: str
    text: str
    shown: str
    file: str


class Page:
    """A page by its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (ROOT / name).read_text("utf-8")

    def blocks(self) -> list[Block]:
        """The blocks that are run, in their order."""
        found = [
            Block(
                self.text.count("\n", 0, each.start("text")) + 1,
                each["language"],
                each["text"],
                each["shown"] or "",
                each["file"] or "",
            )
            for each in _BLOCK.finditer(self.text)
        ]
        fences = re.findall(r"^```(?:python|console)$", self.text, re.MULTILINE)
        assert len(found) == len(fences), self.name
        return found

    def section(self, title: str) -> str:
        """The text under a heading."""
        pattern = rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)"
        found = re.search(pattern, self.text, re.MULTILINE | re.DOTALL)
        assert found, title
        return found[1]

    def marked(self, name: str) -> str:
        """The command between two markers."""
        pattern = rf"^<!-- {name}: begin -->\n```sh\n(.*)\n```\n<!-- {name}: end -->$"
        found = re.search(pattern, self.text, re.MULTILINE)
        assert found, name
        return found[1]

    def needs(self) -> list[str]:
        """The libraries that it imports and the programs that it calls, of those that are not there."""
        code = "".join(block.text for block in self.blocks() if block.language == "python")
        ours = {Path(block.file).stem for block in self.blocks()}
        imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) - ours
        lines = [
            line for block in self.blocks() if block.language == "console" for line, _ in sessions(block)
        ]
        called = {word for line in lines for word in re.findall(r"(?:^|\| )(curl|jq|zcat)\b", line)}
        if any(re.search(r"\buvicorn |attuned-store .*\bserve ", line) for line in lines):
            imported.add("uvicorn")
        return sorted(name for name in imported if importlib.util.find_spec(name) is None) + sorted(
            name for name in called if shutil.which(name) is None
        )


def sessions(block: Block) -> list[tuple[str, str]]:
    """The commands of a block, each with what is shown below it."""
    found = _COMMAND.findall(block.text)
    assert "".join(f"$ {line}\n{shown}" for line, shown in found) == block.text, block.line
    return found


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a text, without headings."""
    lines = re.findall(r"^\| ?(.*?) ?\|$", text, re.MULTILINE)
    tables = [[cell.strip() for cell in line.split("|")] for line in lines]
    rules = [index for index, cells in enumerate(tables) if set("".join(cells)) <= set("-:")]
    headings = {*rules, *(index - 1 for index in rules)}
    return [cells for index, cells in enumerate(tables) if index not in headings]


def without_what_varies(text: str) -> str:
    """Put one size and one duration in the place of those that vary with the machine and its zlib."""
    text = re.sub(r"passed in \d+\.\d\ds", "passed in <time>", text)
    text = re.sub(r"(\.attuned  portable  .*  )[\d,]+$", r"\1<size>", text, flags=re.MULTILINE)
    return re.sub(r"[\d,]+ bytes, \d+\.\d\d s$|[\d,]+(?= bytes)", "<size>", text, flags=re.MULTILINE)


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run `VARIABLE=value attuned-store ...` at noon; returns its status and all of its output."""
    words = shlex.split(line)
    start = next(index for index, word in enumerate(words) if Path(word).name == "attuned-store")
    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(attuned_store.wall_clock, "now_ms", lambda: int(NOON.timestamp() * 1000))
        patch.setattr(module("times"), "now", lambda: NOON)
        for setting in words[:start]:
            patch.setenv(*setting.split("=", 1))
        with contextlib.redirect_stderr(output):
            status = main(words[start + 1 :])
    return status, output.getvalue()


class Reader:
    """Somebody who does what a page says, block after block, in the current folder.

    ``programs`` is a folder for the programs that the page calls, ``server`` the url of its Qdrant server.
    """

    def __init__(self, page: Page, monkeypatch: pytest.MonkeyPatch, programs: Path, server: str) -> None:
        self._page, self._monkeypatch = page, monkeypatch
        self._names: dict[str, Any] = {}  # what blocks of Python leave for the later ones
        self._servers: list[subprocess.Popen[bytes]] = []
        self._places = {SERVER: server}  # addresses as the page shows them, and as they are here
        for name, command in _PROGRAMS.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', "utf-8")
            program.chmod(0o755)
        self._environment = {
            name: value for name, value in environment().items() if not name.startswith("PYTEST_")
        }
        self._environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = (
            "1"  # a second is lost with the plugins that are here
        )
        self._environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"

    def read(self) -> None:
        """Do all of it, and end what was started."""
        try:
            for block in self._page.blocks():
                if block.language == "console":
                    for line, shown in sessions(block):
                        self._run(line, shown)
                elif block.file:
                    Path(block.file).write_text(block.text, "utf-8")
                elif block.text.startswith(">>>"):
                    self._run_doctest(block)
                else:
                    self._run_script(block)
        finally:
            for server in self._servers:
                server.send_signal(signal.SIGTERM)
            statuses = [server.wait(30) for server in self._servers]
        assert set(statuses) <= {0, -signal.SIGTERM}, self._page.name

    def _run_doctest(self, block: Block) -> None:
        test = doctest.DocTestParser().get_doctest(
            block.text, self._names, self._page.name, self._page.name, block.line - 1
        )
        output, runner = io.StringIO(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        failed, tried = runner.run(test, out=output.write, clear_globs=False)
        self._names = test.globs
        assert tried
        assert not failed, output.getvalue()

    def _run_script(self, block: Block) -> None:
        assert block.shown, f"{self._page.name}, line {block.line}: what does it print?"
        script = Path(f"line_{block.line}.py")
        script.write_text(block.text, "utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self._names = runpy.run_path(str(script), init_globals=self._names, run_name="__main__")
        assert output.getvalue() == block.shown, f"{self._page.name}, line {block.line}"

    def _run(self, line: str, shown: str) -> None:
        if line.endswith("&"):
            self._start(line.removesuffix("&").strip(), shown)
            return
        here = self._here(line)
        if _PLAIN.fullmatch(line):
            status, output = run_command(here, self._monkeypatch)
        else:
            done = subprocess.run(
                ["sh", "-c", here], env=self._environment, capture_output=True, text=True, check=False
            )
            status, output = done.returncode, done.stdout + done.stderr
        output = without_what_varies(self._as_shown(output))
        same = output.rstrip() == without_what_varies(shown).rstrip()  # curl ends no line
        assert same, f"{line}\n{output}"
        assert (status == 0) is not shown.startswith("attuned-store: "), line

    def _start(self, line: str, shown: str) -> None:
        """Start a server on a port of its own, and wait until it listens and has said what is shown."""
        port = next((port for port in PORTS if port in line), PORTS[-1])
        self._places[port] = free_port()
        here = self._here(line if port in line else f"{line} --port {port}")
        log = Path(f"log_{port}.txt")
        with log.open("wb") as output:
            server = subprocess.Popen(
                ["sh", "-c", f"exec env {here}"], env=self._environment, stdout=output, stderr=output
            )
        self._servers.append(server)
        while server.poll() is None:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", int(self._places[port]))),
            ):
                if shown in self._as_shown(log.read_text("utf-8")):
                    break
            time.sleep(0.05)
        assert shown in self._as_shown(log.read_text("utf-8")), line
        assert server.poll() is None, log.read_text("utf-8")

    def _here(self, line: str) -> str:
        """A command with the addresses that are used here."""
        for shown, place in self._places.items():
            line = line.replace(shown, place)
        return line

    def _as_shown(self, output: str) -> str:
        """What was printed, with the addresses that the page shows."""
        for shown, place in self._places.items():
            output = output.replace(place, shown)
        return output.replace(str(Path.cwd()), HOME)


def free_port() -> str:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def links(page: Page) -> Iterator[tuple[str, str]]:
    """The files and the headings that a page refers to."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.text):
        if "://" not in target:
            path, _, heading = target.partition("#")
            yield path, heading


def headings(text: str) -> set[str]:
    """What headings are referred to by."""
    found = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}

"""README.md: short, and what it says of the project is so; tests/test_docs.py runs what it shows."""

from __future__ import annotations

import doctest
import io
import os
import re
import shutil
import tempfile
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pages import ROOT, Page, rows, run_command

import attuned_store

README = Page("README.md")
SAMPLE = Path("tests", "data", "film_mood.csv")

TRY = (
    "python3 -m venv .venv && .venv/bin/python -m pip install --quiet . && "
    ".venv/bin/attuned-store import tests/data/film_mood.csv --scale 0:31 && "
    ".venv/bin/attuned-store tour maps_001"
)
TESTS = "python3 -m venv .venv && .venv/bin/python -m pip install --quiet tox tox-uv && .venv/bin/tox run"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that has the sample, as the checkout does, and none of our variables."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith(("ATTUNED_STORE", "QDRANT_"))]:
        monkeypatch.delenv(variable)
    SAMPLE.parent.mkdir(parents=True)
    shutil.copy(ROOT / SAMPLE, SAMPLE)
    return tmp_path


def test_it_is_short() -> None:
    """README.md is read in five minutes: what is longer stands in docs/."""
    assert len(README.text.encode()) <= 10_000


def test_docstrings_show_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example in a docstring of the file gives what is shown."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Not testmod(), which looks at private objects too and stumbles over the core of a closed store.
    found = doctest.DocTestFinder(recurse=False).find(attuned_store)
    for name in attuned_store.__all__:
        documented = getattr(attuned_store, name)
        if getattr(documented, "__module__", None) == "attuned_store":
            found += doctest.DocTestFinder().find(documented, name, attuned_store)
    runner, output = doctest.DocTestRunner(), io.StringIO()
    for test in found:
        runner.run(test, out=output.write)
    assert not runner.failures, output.getvalue()
    assert runner.tries >= 10


@pytest.mark.parametrize(("name", "command"), [("try", TRY), ("tests", TESTS)])
def test_marked_commands_are_there(name: str, command: str) -> None:
    """The two commands stand between their markers, once and as they are."""
    assert README.marked(name) == command
    assert README.text.count(f"<!-- {name}: begin -->") == README.text.count(f"<!-- {name}: end -->") == 1


def test_command_to_try_succeeds_once_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first command runs after installing shows a person, who is alike and in what, and ways on."""
    lines = [line for line in README.marked("try").split(" && ") if "/attuned-store " in line]
    assert len(lines) == 2
    for line in lines:
        status, output = run_command(line, monkeypatch)
        assert status == 0, output
    person, _, others = output.partition("Most like this")
    alike, _, ways = others.partition("Where to go on")
    assert re.search(r"^maps_001: 1996-01-02T00:15:00.000Z", person)
    assert re.search(r"^positive_affect +0.226 +0.839 ", person, re.MULTILINE)
    assert re.search(r"^score +user_id +energetic_arousal ", alike, re.MULTILINE)
    assert re.search(r"^0.9927 +maps_091 +0.", alike, re.MULTILINE)
    assert "maps_001" not in alike
    for line in re.findall(r"  (attuned-store .*)$", ways, re.MULTILINE):
        status, output = run_command(line, monkeypatch)
        assert status == 0, output


def test_every_extra_is_listed() -> None:
    """The table of extras lists every extra, with what it brings."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    listed = {cells[0].strip("`"): cells[1].lower() for cells in rows(README.section("Install and try"))}
    assert listed == {name: ", ".join(Requirement(line).name for line in extras[name]) for name in extras}

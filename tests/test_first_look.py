"""The command for a newcomer: the tour, and times as people type them."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from command import main, module

from attuned_store import StateSnapshot, open_store

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.once

times = module("times")
Run = Callable[..., tuple[int, str, str]]
NOW = datetime(2026, 3, 1, 13, 30, 15, 250_000, tzinfo=UTC)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command in a folder of its own, at a time that stands still."""
    for name in [name for name in os.environ if name.startswith(("ATTUNED_STORE", "QDRANT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(times, "now", lambda: NOW)

    def call(*words: str) -> tuple[int, str, str]:
        status = main(words)
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", NOW),
        ("today", datetime(2026, 3, 1, tzinfo=UTC)),
        ("Yesterday", datetime(2026, 2, 28, tzinfo=UTC)),
        ("0s", NOW),
        ("90s", NOW - timedelta(seconds=90)),
        ("45m", NOW - timedelta(minutes=45)),
        ("36h", NOW - timedelta(hours=36)),
        ("7d", NOW - timedelta(days=7)),
        ("2W", NOW - timedelta(weeks=2)),
        ("2026-02-03", datetime(2026, 2, 3, tzinfo=UTC)),
        ("2026-02-03T12:00", datetime(2026, 2, 3, 12, tzinfo=UTC)),
        ("2026-02-03 12:00+02:00", datetime(2026, 2, 3, 10, tzinfo=UTC)),
        ("2026-02-03T12:00:00.123456Z", datetime(2026, 2, 3, 12, microsecond=123_000, tzinfo=UTC)),
        ("1770120000000", datetime(2026, 2, 3, 12, tzinfo=UTC)),
    ],
)
def test_a_time_is_typed_as_people_do(monkeypatch: pytest.MonkeyPatch, text: str, expected: datetime) -> None:
    """Times are ISO 8601, ages, words and milliseconds; what names no time zone is UTC."""
    monkeypatch.setattr(times, "now", lambda: NOW)
    assert times.moment(text) == round(expected.timestamp() * 1000)


@pytest.mark.parametrize(
    "text", ["soon", "d", "7days", "-7d", "7.5d", "1234567d", "tomorrow", "2026-02-30", ""]
)
def test_what_is_no_time_names_the_forms(text: str) -> None:
    """What is no time is refused, with the forms that there are."""
    with pytest.raises(argparse.ArgumentTypeError, match=r"ISO 8601, an age such as 7d.*yesterday"):
        times.moment(text)


def test_ages_and_words_are_taken_wherever_a_time_is(run: Run) -> None:
    """put, history and search take an age or a word, and show times as ISO 8601."""
    assert run("put", "ada", "warmth=0.8", "--at", "3d")[0] == 0
    assert run("put", "ada", "warmth=0.9", "--at", "yesterday")[0] == 0
    assert run("put", "ben", "warmth=0.7", "--at", "now")[0] == 0
    _, out, _ = run("history", "ada", "--since", "7d", "--until", "36h")
    assert re.findall(r"^2026\S+", out, re.MULTILINE) == [
        "2026-02-28T00:00:00.000Z",
        "2026-02-26T13:30:15.250Z",
    ]
    _, out, _ = run("search", "warmth=1", "--since", "today")
    assert re.findall(r"^\d\.\d+ +(\w+) +(\S+)", out, re.MULTILINE) == [("ben", "2026-03-01T13:30:15.250Z")]
    status, _, err = run("history", "ada", "--since", "1770120000")
    assert (status, err.count("\n")) == (2, 1)
    assert "looks like seconds; milliseconds since 1970 are needed: 1770120000000" in err
    assert run("history", "ada", "--since", "99999w")[0] == 2  # before 1970


def test_the_tour_shows_one_user_and_who_is_alike(run: Run) -> None:
    """The tour shows a user's axes, now and before, who leans the same way and in which axes, and ways on."""
    with open_store("a store") as store:
        store.upsert_latest(StateSnapshot("ada", {"warmth": 0.4, "formality": 0.9}, 1_000))
        store.upsert_latest(
            StateSnapshot("ada", {"warmth": 0.75, "ritual_need": 0.4, "formality": 1}, 2_000, "mixed")
        )
        store.upsert_latest(StateSnapshot("ben", {"warmth": 0.25, "formality": 0.0}, 3_000))
        store.upsert_latest(StateSnapshot("cleopatra VII", {"warmth": 0.7, "formality": 0.9}, 4_000))

    status, out, err = run("--store", "a store", "tour", "ada")

    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "ada: 1970-01-01T00:00:02.000Z, mixed, confidence 1"
    assert lines[2:6] == [
        "axis         now    before  0      neutral      1",
        "warmth       0.750  0.400             |=====",
        "formality    1.000  0.900             |==========",
        "ritual_need  0.400                  ==|",
    ]
    assert "of 3 users" in out
    found = re.findall(r"^(-?\d\.\d{4}) +(\S.*?)  +(0\.\d+)  +(\d\.\d+)  +(0\.\d+)$", out, re.MULTILINE)
    assert [(user, *axes) for _, user, *axes in found] == [
        ("cleopatra VII", "0.700", "0.900", "0.500"),
        ("ben", "0.250", "0.000", "0.500"),
    ]
    ways = re.findall(r"  (attuned-store --store 'a store' \S.*)$", out, re.MULTILINE)
    assert ways[0] == "attuned-store --store 'a store' history ada"
    assert len(ways) == 5


def test_the_tour_begins_with_the_first_user(run: Run) -> None:
    """Without a user the tour takes one that is there, be it alone or neutral."""
    run("put", "a b", "warmth=0.5")
    _, out, _ = run("tour")
    assert out.startswith("a b: ")
    assert "a neutral state leans nowhere" in out
    assert re.search(r"  attuned-store history 'a b'$", out, re.MULTILINE)
    run("put", "a b", "warmth=0.75")
    assert "nobody else is there" in run("tour")[1]
    run("put", "c", "--at", "1")
    assert "no axes: neutral" in run("tour", "c")[1]


def test_the_tour_names_the_command_as_it_was_called(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the command is not on the path, what the tour suggests begins as the tour itself was called."""
    run("put", "ada", "warmth=0.8")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", [".venv/bin/attuned-store", "tour"])
    assert "  .venv/bin/attuned-store history ada\n" in run("tour")[1]


def test_the_tour_of_nothing_says_what_to_do(run: Run) -> None:
    """Where there is no store, or nobody in it, or not the one who was named, the error says what to do."""
    assert "there is no store at ./attuned_state; 'put' makes one" in run("tour")[2]
    run("put", "ada", "warmth=1")
    assert run("tour", "nobody")[0] == 1
    run("delete", "ada", "--yes")
    status, out, err = run("tour")
    assert (status, out) == (1, "")
    assert "has no users yet: put or import some" in err


def test_the_tour_for_programs(run: Run) -> None:
    """With --json the tour is one object: the state, and the alike with their scores."""
    run("put", "ada", "warmth=0.8")
    run("put", "ben", "warmth=0.9")
    found = json.loads(run("tour", "ada", "--json")[1])
    assert found["state"]["axes"] == {"warmth": 0.8}
    assert [(each["score"], each["user_id"]) for each in found["alike"]] == [(1.0, "ben")]

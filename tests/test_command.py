"""The command, through its entry point: main() for most, a real process where only a process can tell."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import PACKAGE, PROGRAM, environment, main, module
from conformance import COMMANDS, needs

import attuned_store
from attuned_store import StateSnapshot, open_store

SAMPLE = Path(__file__).parent / "data" / "film_mood.csv"
MOODS = ("energetic_arousal", "tense_arousal", "positive_affect", "negative_affect")
DEADLINE = 120.0  # seconds: for a machine that is busy, not for the command

ENGINES = [
    pytest.param(
        engine,
        marks=pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}"),
    )
    for engine, library in (("edge", "qdrant_edge"), ("local", "qdrant_client"))
]
posix = pytest.mark.skipif(os.name != "posix", reason="needs pipes and terminals of POSIX")


# ------------------------------------------------------------------------------
# Running it
# ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What one run of the command left behind."""

    status: int
    out: str
    err: str

    @property
    def records(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Ran]
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's settings reaches a test, and ./attuned_state lies in a folder of its own."""
    for name in list(os.environ):
        if name.startswith(("ATTUNED_STORE", "QDRANT_")):
            monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process."""

    def call(*argv: object) -> Ran:
        capfd.readouterr()
        status = main([str(word) for word in argv])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Ran(status, out, err)

    return call


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Lay bytes ready on stdin."""
    return lambda data: monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    )


@pytest.fixture(params=ENGINES)
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a new store would be made, by one engine and by the other."""
    monkeypatch.setenv("ATTUNED_STORE_ENGINE", request.param)
    return tmp_path / "store"


@pytest.fixture
def mood(path: Path, run: Run) -> Path:
    """A store with the sample in it."""
    assert run("--store", path, "import", SAMPLE, "--scale", "0:31").status == 0
    return path


@pytest.fixture
def small(path: Path) -> Path:
    """A store with two users and three states."""
    with open_store(path, axes=("calm", "warmth")) as store:
        store.upsert_latest(StateSnapshot("alice", {"calm": 0.25, "warmth": 0.75}, 1_000))
        store.upsert_latest(StateSnapshot("alice", {"calm": 0.5}, 2_000, "inferred", 0.5, 2))
        store.upsert_latest(StateSnapshot("bob", {"warmth": 1.0}, 3_000))
    return path


def kept(path: Path) -> dict[str, tuple[StateSnapshot | None, list[StateSnapshot]]]:
    """All that is in a store: each user's latest and history."""
    with open_store(path) as store:
        return {user: (store.get_latest(user), store.get_history(user)) for user in store.users()}


def axes_of(path: Path) -> tuple[str, ...]:
    with open_store(path) as store:
        return tuple(store.axes)


def one_line(ran: Ran, status: int, reason: str = "") -> None:
    """The command failed as it should: one line on stderr that says why, and nothing on stdout."""
    assert (ran.status, ran.out) == (status, "")
    assert re.fullmatch(r"attuned-store: [^\n]*\n", ran.err), ran.err
    assert re.search(reason, ran.err), ran.err


@pytest.fixture
def start() -> Iterator[Start]:
    """Start the command as a process; none outlives its test."""
    with contextlib.ExitStack() as ended:

        def call(*argv: object, words: Sequence[str] = (), **options: Any) -> subprocess.Popen[bytes]:
            first = words or PROGRAM
            options.setdefault("env", environment())
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            child = subprocess.Popen([*first, *map(str, argv)], **{**pipes, **options})
            ended.enter_context(child)
            ended.callback(child.kill)  # before the exit of Popen waits for it
            return child

        yield call


def finished(child: subprocess.Popen[bytes]) -> Ran:
    out, err = child.communicate(timeout=DEADLINE)
    return Ran(child.returncode, (out or b"").decode(), (err or b"").decode())


# ------------------------------------------------------------------------------
# The real file
# ------------------------------------------------------------------------------


def test_importing_the_sample_gives_330_users_with_two_states_each(path: Path, run: Run) -> None:
    """One command makes a durable store of the sample: 330 users, 660 snapshots, two in each history."""
    ran = run("--store", path, "import", SAMPLE, "--scale", "0:31")

    assert (ran.status, ran.err) == (0, "")
    assert "imported 660 snapshots" in ran.out
    assert "330 users" in ran.out
    stored = kept(path)
    assert len(stored) == 330
    assert all(len(history) == 2 and latest == history[0] for latest, history in stored.values())
    latest, history = stored["maps_001"]
    assert latest is not None
    assert latest.updated_at_unix_ms == 820541700000
    assert dict(history[1].axes) == dict(zip(MOODS, (24 / 31, 14 / 31, 26 / 31, 2 / 31), strict=True))


def test_a_new_store_takes_the_columns_as_its_axes(mood: Path) -> None:
    """The axes of a new store are the file's columns, in their order and in snake_case."""
    assert axes_of(mood) == MOODS


def test_importing_again_changes_nothing(mood: Path, run: Run) -> None:
    """Importing a file twice is harmless."""
    before = kept(mood)
    assert run("import", SAMPLE, "--scale", "0:31", "--store", mood).status == 0
    assert kept(mood) == before


def test_count_tells_users_and_snapshots(mood: Path, run: Run) -> None:
    """Count gives the users, and with --history the snapshots."""
    assert run("--store", mood, "count").out == "330\n"
    assert run("--store", mood, "count", "--history").out == "660\n"
    assert run("--store", mood, "count", "--json").records == [{"users": 330}]
    assert run("--store", mood, "count", "--json", "--history").records == [{"snapshots": 660}]


def test_searching_like_a_person_gives_others_best_first(mood: Path, run: Run) -> None:
    """Searching like one person finds people, best first, and never the person asked about."""
    found = run("--store", mood, "search", "--like", "maps_001", "--limit", "50", "--json").records

    assert len(found) == 50
    scores = [match["score"] for match in found]
    assert scores == sorted(scores, reverse=True)
    people = [match["user_id"] for match in found]
    assert len(set(people)) == 50
    assert "maps_001" not in people


def test_searching_can_include_the_person_asked_about(mood: Path, run: Run) -> None:
    """With --include-self the person asked about is the best match."""
    found = run("--store", mood, "search", "--like", "maps_001", "--include-self", "--json").records
    assert found[0]["user_id"] == "maps_001"
    assert found[0]["score"] == pytest.approx(1.0, abs=1e-5)


def test_a_search_reads_as_a_table(mood: Path, run: Run) -> None:
    """For people a search is an aligned table with a heading, the best match first."""
    lines = run("--store", mood, "search", "--like", "maps_001", "--limit", "3").out.splitlines()
    assert lines[0].split() == ["score", "user_id", "updated_at", "source", "confidence"]
    assert len(lines) == 4
    assert {line.index("self_report") for line in lines[1:]} == {lines[0].index("source")}
    assert re.match(r"0\.\d{4}  \w+_\d{3}  +1996-\d\d-\d\dT\d\d:15:00\.000Z", lines[1])


def test_searching_by_axes(small: Path, run: Run) -> None:
    """Axis=value pairs search for a state like that, on both sides of the options."""
    found = run("--store", small, "search", "warmth=0.9", "--threshold", "-0.5", "calm=0.5", "--json").records
    assert [match["user_id"] for match in found] == ["bob", "alice"]
    assert [match["score"] for match in found] == [pytest.approx(1.0), 0.0]


@pytest.mark.parametrize(
    ("options", "people"),
    [
        ("--user alice", ["alice"]),
        ("--exclude alice", ["bob"]),
        ("--source inferred", ["alice"]),
        ("--min-confidence 0.9", ["bob"]),
        ("--since 3000", ["bob"]),
        ("--until 1970-01-01T00:00:02Z", ["alice"]),
        ("--limit 1", ["bob"]),
        ("--threshold 0.5", ["bob"]),
        ("--history --user alice", ["alice", "alice"]),
        ("--user nobody", []),
    ],
)
def test_search_options_narrow_the_result(small: Path, run: Run, options: str, people: list[str]) -> None:
    """Each option of search leaves out what it says."""
    ran = run("--store", small, "search", "warmth=1", "calm=0.5", *options.split(), "--json")
    assert ran.status == 0
    assert [match["user_id"] for match in ran.records] == people


def test_a_search_without_a_match_says_so(small: Path, run: Run) -> None:
    """No match is said in words, and is no failure."""
    assert run("--store", small, "search", "warmth=1", "--user", "nobody") == Ran(0, "no match\n", "")


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        ("search --like nobody", 1, "nobo"),
        ("search wealth=0.5", 2, "wealth"),
        ("search warmth=1.5", 2, "warmth"),
        ("search warmth=nan", 2, "not a number"),
        ("search warmth=inf", 2, "not a number"),
        ("search warmth", 2, "AXIS=VALUE"),
        ("search warmth=1 Warmth=0", 2, "twice"),
        ("search", 2, "--like"),
        ("search warmth=1 --like bob", 2, "--like"),
        ("search warmth=1 --limit 0", 2, "limit"),
        ("search warmth=1 --source rumour", 2, "rumour"),
        ("search --like bob --exclude alice --include-self", 2, "not allowed"),
    ],
)
def test_a_bad_search_changes_nothing(
    small: Path, run: Run, arguments: str, status: int, reason: str
) -> None:
    """What cannot be searched for is one line on stderr."""
    before = kept(small)
    one_line(run("--store", small, *arguments.split()), status, reason)
    assert kept(small) == before


# ------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------


def told_rows(ran: Ran) -> str:
    """What the command told of rows; the hints that come after it are left out."""
    lines = [line.removeprefix("attuned-store: ") for line in ran.err.splitlines()]
    return "\n".join(line for line in lines if re.search(r": (line|row) \d", line))


HEADING = "user_id,updated_at_unix_ms,source,confidence,schema_version,calm,warmth"
LONG = "a" * 65


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param("carol,5000,self_report,1,1,0.5", "6 cells under 7 columns", id="too few cells"),
        pytest.param("carol,5000,self_report,1,1,0.5,0.5,", "8 cells under 7 columns", id="too many cells"),
        pytest.param(",5000,self_report,1,1,0.5,0.5", "user_id", id="no user"),
        pytest.param("c\x07arol,5000,self_report,1,1,0.5,0.5", "user_id", id="control character"),
        pytest.param(f"{'c' * 257},5000,self_report,1,1,0.5,0.5", "user_id", id="long user"),
        pytest.param(f"{'é' * 129},5000,self_report,1,1,0.5,0.5", "user_id", id="long user in bytes"),
        pytest.param(
            "carol,soon,self_report,1,1,0.5,0.5", "updated_at_unix_ms: not a time: 'soon'", id="time"
        ),
        pytest.param("carol,5000.5,self_report,1,1,0.5,0.5", "updated_at_unix_ms", id="half a millisecond"),
        pytest.param("carol,-1,self_report,1,1,0.5,0.5", "updated_at_unix_ms", id="before 1970"),
        pytest.param("carol,253402300800000,self_report,1,1,0.5,0.5", "updated_at_unix_ms", id="year 10000"),
        pytest.param(f"carol,{'9' * 5000},self_report,1,1,0.5,0.5", "updated_at_unix_ms", id="endless time"),
        pytest.param("carol,5000,rumour,1,1,0.5,0.5", "source", id="source"),
        pytest.param("carol,5000,self_report,1.5,1,0.5,0.5", "confidence", id="confidence"),
        pytest.param("carol,5000,self_report,1,0,0.5,0.5", "schema_version", id="schema version"),
        pytest.param("carol,5000,self_report,1,1,lots,0.5", "calm: not a number: 'lots'", id="word"),
        pytest.param("carol,5000,self_report,1,1,true,0.5", "calm: not a number", id="truth"),
        pytest.param("carol,5000,self_report,1,1,NaN,0.5", "calm: not a number", id="NaN"),
        pytest.param("carol,5000,self_report,1,1,inf,0.5", "calm: not a number", id="infinity"),
        pytest.param("carol,5000,self_report,1,1,1e999,0.5", "calm", id="overflow"),
        pytest.param(f"carol,5000,self_report,1,1,{'9' * 5000},0.5", "calm", id="endless number"),
        pytest.param(
            f"carol,5000,self_report,1,{'9' * 5000},0.5,0.5", "schema_version", id="endless version"
        ),
        pytest.param("carol,5000,self_report,1,1,1_0,0.5", "calm: not a number", id="underscore"),
        pytest.param("carol,5000,self_report,1,1,1.01,0.5", "calm", id="above"),
        pytest.param("carol,5000,self_report,1,1,-0.01,0.5", "calm", id="below"),
        pytest.param('carol,5000,self_report,1,1,"0.5,0.5', "quote", id="open quote"),
        pytest.param('"ca"rol,5000,self_report,1,1,0.5,0.5', "quote", id="quote inside"),
    ],
)
def test_a_bad_row_of_csv_is_skipped_and_reported(
    small: Path, run: Run, tmp_path: Path, row: str, reason: str
) -> None:
    """A bad row is reported with its physical line and reason, and skipped; the status is 1."""
    before = kept(small)
    file = tmp_path / "rows.csv"
    good = "dave,7000,self_report,1,1,0.5,0.5", "erin,8000,mixed,0.5,3,,NA"
    file.write_text("\n".join([HEADING, good[0], "", row, good[1], ""]), encoding="utf-8")

    strict = run("--store", small, "import", "--strict", file)
    assert strict.status == 1
    assert "nothing was written" in strict.err
    assert kept(small) == before

    ran = run("--store", small, "import", file)
    assert ran.status == 1
    assert re.fullmatch(rf"\S*rows\.csv: line 4: .*{re.escape(reason)}.*", told_rows(ran)), ran.err
    assert "imported 2 snapshots, skipped 1 bad row" in ran.out
    after = kept(small)
    assert {user: after.pop(user)[0] for user in ("dave", "erin")} == {
        "dave": StateSnapshot("dave", {"calm": 0.5, "warmth": 0.5}, 7_000),
        "erin": StateSnapshot("erin", {}, 8_000, "mixed", 0.5, 3),
    }
    assert after == before


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param("[1, 2]", "not a JSON object", id="list"),
        pytest.param("3", "not a JSON object", id="number"),
        pytest.param('{"user_id": "carol"', "not JSON", id="cut off"),
        pytest.param("[" * 100_000, "nested", id="deep"),
        pytest.param('{"calm": 0.5}', "user_id is missing", id="no user"),
        pytest.param('{"user_id": null, "calm": 0.5}', "user_id is missing", id="null user"),
        pytest.param('{"user_id": 7, "calm": 0.5}', "user_id", id="user is a number"),
        pytest.param('{"user_id": "\\ud800", "calm": 0.5}', "user_id", id="lone surrogate"),
        pytest.param('{"user_id": "carol", "calm": "0.5"}', "calm", id="text"),
        pytest.param('{"user_id": "carol", "calm": true}', "calm", id="truth"),
        pytest.param('{"user_id": "carol", "calm": [0.5]}', "calm", id="list of one"),
        pytest.param('{"user_id": "carol", "calm": NaN}', "not a number: 'NaN'", id="NaN"),
        pytest.param('{"user_id": "carol", "calm": -Infinity}', "not a number: '-Infinity'", id="infinity"),
        pytest.param(f'{{"user_id": "carol", "calm": {10**400}}}', "calm: inf is outside", id="huge"),
        pytest.param(f'{{"user_id": "carol", "calm": -{"9" * 5000}}}', "calm: -inf is outside", id="endless"),
        pytest.param(f'{{"user_id": "carol", "confidence": {10**400}}}', "confidence", id="huge field"),
        pytest.param(
            f'{{"user_id": "carol", "updated_at_unix_ms": {10**400}}}', "updated_at_unix_ms", id="huge time"
        ),
        pytest.param(f'{{"user_id": {10**400}}}', "user_id", id="huge user"),
        pytest.param('{"user_id": "carol", "calm": 1e999}', "calm", id="overflow"),
        pytest.param('{"user_id": "carol", "calm": 2}', "calm", id="above"),
        pytest.param('{"user_id": "carol", "calm": 0.5, "Calm": 0.6}', "calm is there twice", id="twice"),
        pytest.param('{"user_id": "carol", "updated_at_unix_ms": 5.5}', "updated_at_unix_ms", id="time"),
        pytest.param(
            '{"user_id": "carol", "updated_at_unix_ms": "5"}', "updated_at_unix_ms", id="time in text"
        ),
        pytest.param('{"user_id": "carol", "source": 1}', "source", id="source"),
        pytest.param('{"user_id": "carol", "axes": {"calm": 0.5}, "warmth": 1}', "warmth", id="beside axes"),
        pytest.param(f'{{"user_id": "carol", "axes": {{"{LONG}": 0.5}}}}', "aaaa", id="long axis"),
        pytest.param('{"user_id": "carol", "axes": {"": 0.5}}', "ax", id="axis without a name"),
    ],
)
def test_a_bad_row_of_json_lines_is_skipped_and_reported(
    small: Path, run: Run, tmp_path: Path, row: str, reason: str
) -> None:
    """JSON lines are held to the same rules, and its values to their types."""
    before = kept(small)
    file = tmp_path / "rows.jsonl"
    file.write_text(f'\n{row}\n{{"user_id": "dave", "updated_at_unix_ms": 7000, "calm": 1}}')

    strict = run("--store", small, "import", "--strict", file)
    assert strict.status == 1
    assert kept(small) == before

    ran = run("--store", small, "import", file)
    assert ran.status == 1
    assert re.fullmatch(rf"\S*rows\.jsonl: line 2: .*{reason}.*", told_rows(ran)), ran.err
    after = kept(small)
    assert after.pop("dave")[0] == StateSnapshot("dave", {"calm": 1.0}, 7_000)
    assert after == before


def test_a_row_that_is_not_utf8_is_a_bad_row(small: Path, run: Run, tmp_path: Path) -> None:
    """Bytes that are not UTF-8 spoil their row, not the file."""
    for name, text in (
        ("rows.csv", "user_id,calm\ndäve,1\nerin,1\n"),
        ("rows.jsonl", '{"user_id": "däve"}\n'),
    ):
        before = kept(small)
        file = tmp_path / name
        file.write_bytes(text.encode("latin-1"))
        ran = run("--store", small, "import", file)
        assert ran.status == 1
        assert "not UTF-8" in ran.err
        assert set(kept(small)) - set(before) <= {"erin"}
    assert set(kept(small)) == {"alice", "bob", "erin"}


def test_a_value_outside_of_the_scale_is_a_bad_row(path: Path, run: Run, tmp_path: Path) -> None:
    """The scale maps its ends to 0 and 1, for axes only; what lies outside is a bad row."""
    file = tmp_path / "scale.csv"
    file.write_text("user_id,confidence,calm\nlow,0.5,-3\nhigh,0.5,3\nmiddle,0.5,0\nover,0.5,3.5\n")

    ran = run("--store", path, "import", file, "--scale", "-3:3")
    assert ran.status == 1
    assert "line 5: calm: 3.5 is outside of the scale -3:3" in ran.err
    stored = {user: latest for user, (latest, _) in kept(path).items() if latest}
    assert {user: state.axes["calm"] for user, state in stored.items()} == {
        "low": 0,
        "high": 1,
        "middle": 0.5,
    }
    assert {state.confidence for state in stored.values()} == {0.5}


@pytest.mark.parametrize("scale", ["31", "0:", ":", "0:x", "5:5", "31:0", "nan:1", "0:inf", "-1e308:1e308"])
def test_a_scale_is_two_numbers_in_order(tmp_path: Path, run: Run, scale: str) -> None:
    """A scale that is none is refused before anything is made."""
    one_line(run("--store", tmp_path / "store", "import", SAMPLE, "--scale", scale), 2, "LOW")
    assert not (tmp_path / "store").exists()


def test_empty_cells_and_na_are_absent(path: Path, run: Run, tmp_path: Path) -> None:
    """Empty cells and NA are absent: a row with no value is a neutral state, and fields have defaults."""
    file = tmp_path / "gaps.csv"
    file.write_text(
        "user_id,updated_at_unix_ms,source,confidence,calm,warmth\na,1,,NA,NA,0.5\nb,2, mixed ,, ,NA\n"
    )
    assert run("--store", path, "import", file).status == 0
    assert {user: latest for user, (latest, _) in kept(path).items()} == {
        "a": StateSnapshot("a", {"warmth": 0.5}, 1),
        "b": StateSnapshot("b", {}, 2, "mixed"),
    }


def test_a_row_without_a_time_gets_the_time_of_the_import(path: Path, run: Run, tmp_path: Path) -> None:
    """Rows that name no time all get one and the same."""
    file = tmp_path / "untimed.csv"
    file.write_text("\n".join(["user_id,calm", *(f"user{number},0.5" for number in range(3_000))]))
    began = time.time_ns() // 1_000_000
    assert run("--store", path, "import", file).status == 0
    ended = time.time_ns() // 1_000_000
    (at,) = {latest.updated_at_unix_ms for latest, _ in kept(path).values() if latest}
    assert began <= at <= ended


@pytest.mark.parametrize(
    ("heading", "axis"),
    [
        ("Energetic Arousal", "energetic_arousal"),
        ("energeticArousal", "energetic_arousal"),
        ("PANASScore", "panas_score"),
        (" calm (0-30) ", "calm_0_30"),
        ("Wärme", "warme"),
        ("a__b", "a__b"),
        ("q1.b", "q1_b"),
        ('"two\nlines"', "two_lines"),
    ],
)
def test_headings_are_brought_to_snake_case(
    path: Path, run: Run, tmp_path: Path, heading: str, axis: str
) -> None:
    """A heading becomes an axis in snake_case; the five fields are recognised the same way."""
    file = tmp_path / "headings.csv"
    file.write_text(f"User ID,{heading},UpdatedAtUnixMs\nalice,0.5,7\n", encoding="utf-8")
    ran = run("--store", path, "import", file)
    assert ran.status == 0, ran.err
    assert kept(path)["alice"][0] == StateSnapshot("alice", {axis: 0.5}, 7)
    assert axes_of(path) == (axis,)


def test_line_numbers_are_physical(path: Path, run: Run, tmp_path: Path) -> None:
    """A heading over two lines, blank lines and every kind of line end count as they do in an editor."""
    file = tmp_path / "lines.csv"
    file.write_bytes(b'user_id,"two\r\nlines"\r\n\r\na,1\nb,2\rc,3\r\nd,0\r\n')
    ran = run("--store", path, "import", file)
    assert [line.split(": ")[1] for line in told_rows(ran).splitlines()] == ["line 5", "line 6"]
    assert set(kept(path)) == {"a", "d"}


def test_without_a_scale_it_is_named_where_it_is_missed(path: Path, run: Run, tmp_path: Path) -> None:
    """Values outside of 0 to 1 are what a forgotten --scale looks like: the report names it."""
    file = tmp_path / "raw.csv"
    file.write_text("user_id,calm\na,0.5\nb,24\nc,-1\nd,1\n")

    ran = run("--store", path, "import", file)

    assert ran.status == 1
    assert [line.partition("raw.csv: ")[2] for line in ran.err.splitlines()] == [
        "line 3: calm: 24 is outside of the scale 0:1",
        "line 4: calm: -1 is outside of the scale 0:1",
        "values span -1 to 24: try --scale -1:24",
    ]
    assert set(kept(path)) == {"a", "d"}


def test_a_file_from_excel_with_decimal_commas(path: Path, run: Run, tmp_path: Path) -> None:
    """Where semicolons separate the columns, a comma is the decimal mark, but not in a user id."""
    file = tmp_path / "excel.csv"
    file.write_bytes(b"\xef\xbb\xbfuser_id;Calm Now;confidence\r\na,b;7,5;0,5\r\nc;2.5;1\r\nd;1.000,5;1\r\n")

    ran = run("--store", path, "import", file, "--scale", "0:10")

    assert [line.partition("line ")[2] for line in ran.err.splitlines()] == [
        "4: calm_now: not a number: '1.000.5'"
    ]
    assert {user: latest.axes["calm_now"] for user, (latest, _) in kept(path).items() if latest} == {
        "a,b": 0.75,
        "c": 0.25,
    }
    assert {latest.confidence for latest, _ in kept(path).values() if latest} == {0.5, 1.0}


def test_a_comma_between_columns_is_no_decimal_mark(path: Path, run: Run, tmp_path: Path) -> None:
    """Where commas or tabs separate the columns, a number has none."""
    (tmp_path / "quoted.csv").write_text('user_id,calm\na,"0,5"\n')
    ran = run("--store", path, "import", tmp_path / "quoted.csv")
    assert (ran.status, "calm: not a number: '0,5'" in ran.err) == (1, True)


@pytest.mark.parametrize("command", ["put", "patch"])
def test_a_forgotten_user_makes_none(path: Path, run: Run, command: str) -> None:
    """An axis where the user should be is not taken for a user of that name; an id with = is one."""
    one_line(run("--store", path, command, "calm=0.5", "warmth=1"), 2, f"as in '{command} alice calm=0.5'")
    assert not path.exists()
    assert run("--store", path, command, "id=", "warmth=1").status == 0
    assert set(kept(path)) == {"id="}


def test_a_file_that_cannot_be_opened_is_named_plainly(small: Path, run: Run, tmp_path: Path) -> None:
    """What the system refused is named as it was asked for, without numbers and temporary names."""
    for arguments, reason in (
        (("import", tmp_path / "absent.csv"), "No such file or directory"),
        (("import", tmp_path), "Is a directory"),
        (("export", tmp_path / "none" / "out.csv"), "No such file or directory"),
    ):
        ran = run("--store", small, *arguments)
        assert ran == Ran(1, "", f"attuned-store: {arguments[1]}: {reason}\n")


def test_tabs_and_semicolons_separate_too(path: Path, run: Run, tmp_path: Path) -> None:
    """A file whose columns are separated by tabs or semicolons is read the same."""
    (tmp_path / "t.tsv").write_text("user_id\tcalm\na\t0.5\n")
    (tmp_path / "s.csv").write_text("calm;user_id\n0.25;b\n")
    assert run("--store", path, "import", tmp_path / "t.tsv").status == 0
    assert run("--store", path, "import", tmp_path / "s.csv").status == 0
    assert {user: dict(latest.axes) for user, (latest, _) in kept(path).items() if latest} == {
        "a": {"calm": 0.5},
        "b": {"calm": 0.25},
    }


@pytest.mark.parametrize("name", ["rows.csv", "rows.data", "-"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(
    path: Path, run: Run, tmp_path: Path, stdin: Callable[[bytes], None], name: str
) -> None:
    """The mark that spreadsheets put before UTF-8 is taken off."""
    data = b"\xef\xbb\xbfuser_id,calm\na,0.5\n"
    (tmp_path / name).write_bytes(data) if name != "-" else stdin(data)
    assert run("--store", path, "import", name if name == "-" else tmp_path / name).status == 0
    assert set(kept(path)) == {"a"}


def test_json_lines_from_stdin(path: Path, run: Run, stdin: Callable[[bytes], None]) -> None:
    """JSON lines are recognised by their content; nested and flat rows may be mixed, null is absent."""
    rows: list[dict[str, object]] = [
        {"user_id": "a", "axes": {"calm": 30, "new axis": None}, "updated_at_unix_ms": 5, "source": None},
        {"User ID": "b", "Tense Arousal": 0, "updated_at_unix_ms": 6, "schema_version": 2},
    ]
    stdin("\n".join(map(json.dumps, rows)).encode())
    ran = run("--store", path, "import", "-", "--scale", "0:30", "--json")
    assert ran.records == [{"written": 2, "bad_rows": 0, "users": 2, "snapshots": 2}], ran.err
    assert axes_of(path) == ("calm", "tense_arousal")
    assert {user: latest for user, (latest, _) in kept(path).items()} == {
        "a": StateSnapshot("a", {"calm": 1.0}, 5),
        "b": StateSnapshot("b", {"tense_arousal": 0.0}, 6, schema_version=2),
    }


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_whole_floats_are_whole_numbers(path: Path, run: Run, tmp_path: Path, name: str) -> None:
    """A time or version with .0, as pandas writes it, is a whole number, in both formats."""
    texts = {
        "rows.csv": "user_id,updated_at_unix_ms,schema_version,calm\na,8.205408e11,2.0,1\n",
        "rows.jsonl": '{"user_id": "a", "updated_at_unix_ms": 8.205408e11, "schema_version": 2.0, "calm": 1}',
    }
    (tmp_path / name).write_text(texts[name])
    ran = run("--store", path, "import", tmp_path / name)
    assert (ran.status, ran.err) == (0, "")
    assert kept(path)["a"][0] == StateSnapshot("a", {"calm": 1}, 820_540_800_000, schema_version=2)


def test_canonical_axes_in_json_lines_make_a_canonical_store(
    path: Path, run: Run, stdin: Callable[[bytes], None]
) -> None:
    """JSON lines have no heading: a new store of nothing but canonical axes has all of them."""
    stdin(b'{"user_id": "a", "axes": {"warmth": 0.5}}\n')
    assert run("--store", path, "import", "-").status == 0
    assert axes_of(path) == attuned_store.CANONICAL_AXES


def test_configured_axes_win_over_the_columns(
    path: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ATTUNED_STORE_AXES names the axes of a new store, a file must keep to them."""
    monkeypatch.setenv("ATTUNED_STORE_AXES", "warmth,calm")
    file = tmp_path / "rows.csv"
    file.write_text("user_id,wealth\na,1\n")
    one_line(run("--store", path, "import", file), 1, "no axis wealth")
    assert not path.exists()
    file.write_text("user_id,calm\na,1\n")
    assert run("--store", path, "import", file).status == 0
    assert axes_of(path) == ("warmth", "calm")


# ------------------------------------------------------------------------------
# Files from elsewhere
# ------------------------------------------------------------------------------


def test_a_file_of_an_experiment(path: Path, run: Run, tmp_path: Path) -> None:
    """Columns of other names, times in another form, remarks, and two scales: all can be said."""
    file = tmp_path / "study.csv"
    file.write_text(
        "Participant,When,Group,Mood (1-7),Energy,Note\n"
        "p1,17.01.2026 12:30,a,4,50,fine\n"
        "p2,18.01.2026 08:00,b,7,NaN,\n"
    )
    words = ["--user-column", "Participant", "--time-column", "When", "--time-format"]
    options = [*words, "%d.%m.%Y %H:%M", *["--scale", "1:7", "--scale", "energy=0:100", "--absent", "NaN"]]
    one_line(
        run("--store", path, "import", file, *options), 1, r"group \('a'\), note \('fine'\); .*--ignore-text"
    )
    assert not path.exists()

    ran = run("--store", path, "import", file, *options, "--ignore-text")

    assert (ran.status, ran.err) == (0, "")
    assert axes_of(path) == ("mood_1_7", "energy")
    assert {user: latest for user, (latest, _) in kept(path).items()} == {
        "p1": StateSnapshot("p1", {"mood_1_7": 0.5, "energy": 0.5}, 1_768_653_000_000),
        "p2": StateSnapshot("p2", {"mood_1_7": 1.0}, 1_768_723_200_000),
    }


def test_some_columns_are_axes(path: Path, run: Run, tmp_path: Path) -> None:
    """--axes names the columns that are axes, --ignore those that are not; one that is not there is told."""
    file = tmp_path / "rows.csv"
    file.write_text("user_id,calm,warmth,age\na,0.5,1,33\n")
    one_line(
        run("--store", path, "import", file, "--axes", "calm,warmht"), 1, "'warmht' .did you mean 'warmth'"
    )
    assert run("--store", path, "import", file, "--axes", "calm,warmth").status == 0
    assert axes_of(path) == ("calm", "warmth")
    one_line(run("--store", path, "import", file), 1, "no axis age .*--ignore age leaves out")
    assert run("--store", path, "import", file, "--ignore", "age").status == 0


def test_bad_rows_are_told_in_short(path: Path, run: Run, tmp_path: Path) -> None:
    """Five bad rows are told in full, all are counted by their reasons, and what may help is told once."""
    file = tmp_path / "raw.csv"
    rows = [f"u{number},{number % 32}" for number in range(96)]
    file.write_text("\n".join(["user_id,calm", *rows, "v,x", "w,y", ""]))

    ran = run("--store", path, "import", file)

    lines = [line.partition("raw.csv: ")[2] for line in ran.err.splitlines()]
    assert (ran.status, len(kept(path))) == (1, 6)
    assert lines == [
        *(f"line {at + 2}: calm: {at} is outside of the scale 0:1" for at in range(2, 7)),
        "92 bad rows: 90 x calm: outside of the scale 0:1, 2 x calm: not a number",
        "values span 2 to 31: try --scale 2:31",
    ]


def test_export_refuses_what_it_cannot_write(small: Path, run: Run, tmp_path: Path) -> None:
    """A name that promises another format is refused; .json is an array, which is read again."""
    for name in ("states.parquet", "states.xlsx"):
        one_line(run("--store", small, "export", tmp_path / name), 2, r"export writes no \.\w+ file")
        assert not (tmp_path / name).exists()
    assert run("--store", small, "export", tmp_path / "states.json").status == 0
    assert len(json.loads((tmp_path / "states.json").read_text())) == 3
    assert run("--store", tmp_path / "again", "import", tmp_path / "states.json").status == 0
    assert kept(tmp_path / "again") == kept(small)
    with open_store(tmp_path / "empty") as store:
        assert len(store) == 0
    assert run("--store", tmp_path / "empty", "export", tmp_path / "none.json").status == 0
    assert json.loads((tmp_path / "none.json").read_text()) == []


# ------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------

BAD_FILES = [
    pytest.param("a.csv", b"", "empty", id="empty"),
    pytest.param("a.jsonl", b"", "empty", id="empty json"),
    pytest.param("a.csv", b"\n  \n\n", "empty", id="blank"),
    pytest.param("a.csv", b"\xef\xbb\xbf", "empty", id="only a mark"),
    pytest.param("a.csv", b"name,calm\na,0.5\n", "no column user_id", id="no user_id"),
    pytest.param("a.csv", b"user_id,calm,Calm\na,0.5,0.5\n", "same name: 'calm'.*'Calm'", id="duplicates"),
    pytest.param("a.csv", b"user_id,User Id\na,b\n", "same name", id="duplicate user_id"),
    pytest.param("a.csv", b",user_id\nx,a\n", "column 1 has no name", id="no heading"),
    pytest.param("a.csv", b"user_id,--\na,1\n", r"column 2 has no name \('--'\)", id="nothing in a heading"),
    pytest.param("a.csv", b"user_id," + LONG.encode() + b"\na,1\n", "axes|axis", id="long axis"),
    pytest.param("a.csv", "user_id,温度\na,1\n".encode(), "axes|axis", id="no latin letters"),
    pytest.param("a.csv", b'"user_id,calm\na,1\n', "quotes", id="open quote in the heading"),
    pytest.param("a.csv", "user_id,wärme\na,1\n".encode("latin-1"), "not UTF-8", id="latin-1"),
    pytest.param("a.csv", "user_id,calm\na,1\n".encode("utf-16"), "not UTF-8", id="utf-16"),
    pytest.param("a.data", "user_id,calm\na,1\n".encode("utf-16"), "not UTF-8", id="utf-16, unknown name"),
    pytest.param("a.csv", b"user_id,calm\n" + b"a" * (1 << 21), "line 2 is longer", id="endless line"),
    pytest.param("a.csv", b"user_id,calm\na,5\nb,x\n", "no good row", id="only bad rows"),
    pytest.param("a.jsonl", b"[\n]\n", "no good row", id="a JSON array"),
]


@pytest.mark.parametrize(("name", "data", "reason"), BAD_FILES)
def test_a_bad_file_makes_no_store(tmp_path: Path, run: Run, name: str, data: bytes, reason: str) -> None:
    """A file that cannot be used leaves no new store behind."""
    (tmp_path / name).write_bytes(data)
    ran = run("--store", tmp_path / "store", "import", tmp_path / name)
    assert (ran.status, ran.out) == (1, "")
    assert re.search(reason, ran.err.splitlines()[-1]), ran.err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("name", "data", "reason"), BAD_FILES)
def test_a_bad_file_changes_nothing(
    small: Path, tmp_path: Path, run: Run, name: str, data: bytes, reason: str
) -> None:
    """A file that cannot be used leaves an existing store as it was."""
    before = kept(small)
    (tmp_path / name).write_bytes(data)
    ran = run("--store", small, "import", tmp_path / name)
    assert (ran.status, ran.out) == (1, "")
    assert "nothing was written" in ran.err or re.search(reason, ran.err)
    assert kept(small) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "user_id,calm,wealth\na,0.5,1\n"),
        ("a.csv", "user_id,wealth\n"),
        ("a.jsonl", '{"user_id": "a", "calm": 1}\n{"user_id": "b", "wealth": 1}\n'),
    ],
)
def test_unknown_columns_are_one_clear_error(
    small: Path, tmp_path: Path, run: Run, name: str, text: str
) -> None:
    """An existing store keeps its axes: a file with others is refused before anything is written."""
    before = kept(small)
    (tmp_path / name).write_text(text)
    one_line(run("--store", small, "import", tmp_path / name), 1, "no axis wealth .*calm, warmth")
    assert kept(small) == before


def test_a_heading_without_rows_makes_an_empty_store(path: Path, run: Run, tmp_path: Path) -> None:
    """A heading alone is a store with those axes and no users, as an empty store is exported."""
    file = tmp_path / "a.csv"
    file.write_text("user_id,calm\n")
    assert run("--store", path, "import", file).status == 0
    assert (axes_of(path), kept(path)) == (("calm",), {})


@pytest.mark.parametrize("file", ["missing.csv", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, run: Run, file: str) -> None:
    """A file that is not there, or is a folder, is one line and makes no store."""
    one_line(run("--store", tmp_path / "store", "import", file), 1)
    assert not (tmp_path / "store").exists()


@posix
def test_a_file_that_changes_between_the_readings(
    path: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file is cut after it was checked, the error says so, and how much was written."""
    file = tmp_path / "a.csv"
    rows = [f"user{n:05},0.5" for n in range(5_000)]
    file.write_text("\n".join(["user_id,calm", *rows]))

    def cut(*target: Any, **options: Any) -> Any:
        os.truncate(file, file.stat().st_size // 2)
        return open_store(*target, **options)

    monkeypatch.setattr(
        module("arguments"), "open_store", cut
    )  # it is opened once every row has been checked
    one_line(run("--store", path, "import", file), 1, "the file changed while it was read")
    assert 2_000 < len(kept(path)) < 3_000


def test_what_was_read_before_a_failure_is_written(
    path: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where reading fails in the middle of writing, what came before is kept, and the error says how much."""
    file = tmp_path / "a.csv"
    file.write_text("\n".join(["user_id,calm", *(f"user{n:05},0.5" for n in range(1_000))]))
    original = attuned_store.StateTable.__iter__
    readings: list[object] = []

    def failing(table: Any) -> Iterator[object]:
        readings.append(table)
        for number, row in enumerate(original(table)):
            if len(readings) == 2 and number == 777:
                raise OSError(5, "Input/output error")
            yield row

    monkeypatch.setattr(attuned_store.StateTable, "__iter__", failing)
    one_line(
        run("--store", path, "import", file),
        1,
        r"Input/output error \(777 snapshots before that were written\)",
    )
    assert len(kept(path)) == 777


# ------------------------------------------------------------------------------
# Export
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all.jsonl", "all.csv", "-"])
def test_export_and_import_give_the_same_store(
    mood: Path, run: Run, tmp_path: Path, stdin: Callable[[bytes], None], name: str
) -> None:
    """What export writes gives the same store when it is imported, in both formats and through a pipe."""
    file = name if name == "-" else str(tmp_path / name)
    exported = run("--store", mood, "export", file)
    assert exported.status == 0
    stdin(exported.out.encode())

    ran = run("--store", tmp_path / "copy", "import", file)
    assert (ran.status, ran.err) == (0, "")
    assert kept(tmp_path / "copy") == kept(mood)
    assert axes_of(tmp_path / "copy") == axes_of(mood)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_nothing_is_lost_in_a_round_trip(
    path: Path, run: Run, tmp_path: Path, stdin: Callable[[bytes], None], kind: str
) -> None:
    """Odd user ids, neutral states, and the ends of every range come back as they were."""
    ids = [
        "NA",
        " bob ",
        'say "hi"',
        "a,b;c",
        "=1+1",
        "-x",
        "Ödön",
        "\u2028",
        "\U0001f600",
        "x" * 256,
        "null",
        "0",
    ]
    with open_store(path, axes=("tiny", "third", "one")) as store:
        for number, user in enumerate(ids):
            store.upsert_latest(StateSnapshot(user, {}, number))
            store.upsert_latest(
                StateSnapshot(user, {"tiny": 5e-324, "third": 1 / 3, "one": 1}, 1_000 + number)
            )
            store.upsert_latest(StateSnapshot(user, {"third": 0}, 253402300799999, "mixed", 0.1 + 0.2, 7))

    exported = run("--store", path, "export", "--format", kind)
    stdin(exported.out.encode())
    ran = run("--store", tmp_path / "copy", "import", "-")
    assert (ran.status, ran.err) == (0, "")
    assert kept(tmp_path / "copy") == kept(path)
    assert set(axes_of(tmp_path / "copy")) == set(axes_of(path))


FORMULAS = ["=1+1", "+1", "-x", "@x", "'=1", "''-x"]


@pytest.mark.parametrize("options", [(), ("--raw",)])
def test_ids_that_a_spreadsheet_would_run(
    path: Path, run: Run, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """CSV has an apostrophe before what is a formula, which import takes away again, unless --raw."""
    plain = ["a=b", "'quoted'", "' =1"]
    with open_store(path, axes=("calm",)) as store:
        store.upsert_many([StateSnapshot(user, {"calm": 0.5}, 1) for user in (*FORMULAS, *plain)])
    file = tmp_path / "ids.csv"
    assert run("--store", path, "export", file, *options).status == 0
    ids = {line.partition(",")[0] for line in file.read_text().splitlines()[1:]}
    assert ids == {*plain, *(user if options else f"'{user}" for user in FORMULAS)}

    assert run("--store", tmp_path / "copy", "import", file, *options).status == 0
    assert kept(tmp_path / "copy") == kept(path)
    lines = run("--store", path, "export").records
    assert {record["user_id"] for record in lines} == {*plain, *FORMULAS}


def test_exports_at_one_time_do_not_share_a_file(
    small: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an export writes before it is complete has another name each time, whatever the process id."""
    with open_store(small) as store:
        kind = type(store)
    original, seen, out = kind.get_latest, set[str](), tmp_path / "out"
    out.mkdir()

    def watched(self: Any, user_id: str) -> Any:
        seen.update(file.name for file in out.iterdir())
        return original(self, user_id)

    monkeypatch.setattr(kind, "get_latest", watched)
    for _ in range(2):
        assert run("--store", small, "export", out / "all.csv").status == 0
    assert len(seen - {"all.csv"}) == 2
    assert [file.name for file in out.iterdir()] == ["all.csv"]


def test_exported_lines_are_the_fields_of_a_snapshot(small: Path, run: Run) -> None:
    """A line of export is a snapshot with the names of its fields, each user's oldest first."""
    records = run("--store", small, "export").records
    snapshots = [StateSnapshot.from_dict(record) for record in records]
    assert [state for state in snapshots if state.user_id == "alice"] == kept(small)["alice"][1][::-1]
    assert len(snapshots) == 3


def test_export_latest_leaves_the_history_out(small: Path, run: Run) -> None:
    """With --latest each user comes once."""
    records = run("--store", small, "export", "--latest").records
    assert sorted((record["user_id"], record["updated_at_unix_ms"]) for record in records) == [
        ("alice", 2_000),
        ("bob", 3_000),
    ]


def test_a_latest_state_without_history_is_exported(
    path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that keeps no history exports its latest states."""
    monkeypatch.setenv("ATTUNED_STORE_ENABLE_HISTORY", "no")
    assert run("--store", path, "put", "alice", "warmth=1", "--at", "5").status == 0
    assert [record["user_id"] for record in run("--store", path, "export").records] == ["alice"]


def test_a_long_history_is_exported_whole(path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the usual hundred entries are exported where a store keeps more."""
    monkeypatch.setenv("ATTUNED_STORE_MAX_HISTORY_PER_USER", "150")
    with open_store(path) as store:
        store.upsert_many([StateSnapshot("alice", {}, at) for at in range(150)])
    assert len(run("--store", path, "export").records) == 150


def test_a_file_is_replaced_only_when_it_is_complete(small: Path, run: Run, tmp_path: Path) -> None:
    """A failing export leaves the file that was there, and nothing beside it."""
    out = tmp_path / "out"
    out.mkdir()
    file = out / "all.csv"
    file.write_text("precious")
    with open_store(tmp_path / "fields", axes=("confidence", "calm")) as store:
        store.upsert_latest(StateSnapshot("alice", {"confidence": 0.5}, 1))

    one_line(run("--store", tmp_path / "fields", "export", file), 1, "confidence .*--format jsonl")
    assert file.read_text() == "precious"
    assert list(out.iterdir()) == [file]

    ran = run("--store", small, "export", file, "--json")
    assert ran.records == [{"written": 3, "file": str(file)}]
    assert file.read_text().splitlines()[0] == HEADING
    assert list(out.iterdir()) == [file]
    one_line(run("--store", small, "export", out / "missing" / "all.csv"), 1, "missing")


@posix
def test_export_follows_a_link(small: Path, run: Run, tmp_path: Path) -> None:
    """Exporting to a symbolic link replaces the file that it names."""
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "real.jsonl")
    assert run("--store", small, "export", link).status == 0
    assert link.is_symlink()
    assert len((tmp_path / "real.jsonl").read_text().splitlines()) == 3


@posix
def test_export_to_a_named_pipe_writes_into_it(small: Path, run: Run, tmp_path: Path) -> None:
    """A pipe or a device is written to, never replaced."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run("--store", small, "export", pipe).status == 0
        assert len(os.read(reader, 65_536).splitlines()) == 3
        assert pipe.is_fifo()
    finally:
        os.close(reader)


# ------------------------------------------------------------------------------
# The other commands
# ------------------------------------------------------------------------------


def test_put_and_get(path: Path, run: Run) -> None:
    """Put writes a state, making the store where there is none, and get shows it."""
    options = [
        "--at",
        "2026-01-17T12:00+01:00",
        "--source",
        "inferred",
        "--confidence",
        "0.5",
        "--schema-version=3",
    ]
    put = run("--store", path, "put", "alice", "warmth=0.8", *options, "formality=0.25")
    assert (put.status, put.err) == (0, "")
    expected = StateSnapshot("alice", {"warmth": 0.8, "formality": 0.25}, 1768647600000, "inferred", 0.5, 3)
    assert kept(path) == {"alice": (expected, [expected])}

    got = run("--store", path, "get", "alice")
    assert got.out == put.out
    assert got.out.splitlines() == [
        "user_id         alice",
        "updated_at      2026-01-17T11:00:00.000Z",
        "source          inferred",
        "confidence      0.5",
        "schema_version  3",
        "axes",
        "  warmth        0.800",
        "  formality     0.250",
    ]
    assert run("--store", path, "get", "alice", "--json").records == [expected.to_dict()]


def test_put_of_nothing_is_a_neutral_state(path: Path, run: Run) -> None:
    """A state without axes is neutral, and says so."""
    assert "axes            none (neutral)\n" in run("--store", path, "put", "alice").out
    assert run("--store", path, "history", "alice").out.splitlines()[1].endswith("neutral")


def test_put_an_older_state_leaves_the_latest(small: Path, run: Run) -> None:
    """A state from before the latest goes into the history."""
    assert run("--store", small, "put", "bob", "calm=0", "--at", "5").status == 0
    latest, history = kept(small)["bob"]
    assert latest == history[0] == StateSnapshot("bob", {"warmth": 1.0}, 3_000)
    assert [state.updated_at_unix_ms for state in history] == [3_000, 5]


def test_patch_changes_some_axes(small: Path, run: Run) -> None:
    """Patch merges into the latest, becomes the latest, and shows the result."""
    ran = run("--store", small, "patch", "alice", "warmth=0.125", "--at", "9000", "--json")
    expected = {"calm": 0.5, "warmth": 0.125}
    assert ran.records[0]["axes"] == expected
    latest = kept(small)["alice"][0]
    assert latest is not None
    assert (dict(latest.axes), latest.updated_at_unix_ms) == (expected, 9_000)


def test_history_is_newest_first(small: Path, run: Run) -> None:
    """History lists a user's states, newest first, for people and for programs, within bounds."""
    table = run("--store", small, "history", "alice").out.splitlines()
    assert table == [
        "updated_at                source       confidence  axes",
        "1970-01-01T00:00:02.000Z  inferred     0.5         calm=0.500",
        "1970-01-01T00:00:01.000Z  self_report  1           calm=0.250 warmth=0.750",
    ]

    def times(*options: str) -> list[int]:
        records = run("--store", small, "history", "alice", "--json", *options).records
        return [record["updated_at_unix_ms"] for record in records]

    assert times() == [2_000, 1_000]
    assert times("--limit", "1") == [2_000]
    assert times("--limit", "0") == []
    assert times("--since", "1970-01-01T00:00:01.001Z") == [2_000]
    assert times("--until", "1999") == [1_000]
    assert run("--store", small, "history", "alice", "--since", "2026-01-01") == Ran(0, "no history\n", "")


def test_users_are_sorted(path: Path, run: Run) -> None:
    """Users are listed in the order of their ids, which may be found in it."""
    with open_store(path) as store:
        store.upsert_many([StateSnapshot(f"user{at * 7 % 100:02}", {}, 1) for at in range(100)])
    assert run("--store", path, "users").out.split() == [f"user{at:02}" for at in range(100)]


@pytest.mark.parametrize("engine", [engine.values[0] for engine in ENGINES])
def test_the_engine_of_a_new_store_can_be_chosen(run: Run, tmp_path: Path, small: Path, engine: str) -> None:
    """--engine says what a new store is made with, by every command that makes one."""
    file = tmp_path / "rows.csv"
    file.write_text("user_id,calm\na,0.5\n")
    assert run("--store", small, "snapshot", tmp_path / "backups").status == 0
    (backup,) = (tmp_path / "backups").iterdir()
    for at, arguments in enumerate(
        [
            ("--store", tmp_path / "0", "put", "ada", "warmth=1"),
            ("--store", tmp_path / "1", "import", file),
            ("--store", tmp_path / "2", "restore", backup),
            ("copy", small, tmp_path / "3"),
        ]
    ):
        ran = run(*arguments, "--engine", engine)
        assert ran.status == 0, ran.err
        with open_store(tmp_path / str(at), engine="auto") as store:
            assert store.engine == engine


def test_a_search_may_name_its_store_first(small: Path, run: Run) -> None:
    """A store before the axes is the one to be searched; what is none is no axis."""
    ran = run("search", small, "warmth=0.9", "--json")
    assert ran.records[0]["user_id"] == "bob"
    one_line(run("search", "warmth", "calm=1"), 2, "axes are given as AXIS=VALUE.*'warmth'")
    one_line(run("search", small, "wramth=0.9"), 2, "no axis 'wramth' .did you mean 'warmth'")


def test_a_copy_can_rename_and_drop_axes(small: Path, run: Run, tmp_path: Path) -> None:
    """Copy takes new names for axes, and leaves some out."""
    target = tmp_path / "target"
    one_line(run("copy", small, target, "--drop", "clam"), 2, "no axis 'clam' .did you mean 'calm'")
    assert run("copy", small, target, "--rename", "warmth=kindness", "--drop", "calm").status == 0
    assert axes_of(target) == ("kindness",)
    assert kept(target)["bob"][0] == StateSnapshot("bob", {"kindness": 1.0}, 3_000)


def test_users_are_listed_one_a_line(small: Path, run: Run) -> None:
    """Users are listed in full, one a line."""
    assert sorted(run("--store", small, "users").out.splitlines()) == ["alice", "bob"]
    records = run("users", "--json", "--store", small).records
    assert sorted(record["user_id"] for record in records) == ["alice", "bob"]


def test_delete_removes_latest_and_history(small: Path, run: Run) -> None:
    """Delete removes users whole; one that is not there is no failure."""
    ran = run("--store", small, "delete", "alice", "--yes", "nobody", "--json")
    assert ran == Ran(0, ran.out, "")
    assert ran.records == [{"user_id": "alice", "deleted": True}, {"user_id": "nobody", "deleted": False}]
    assert set(kept(small)) == {"bob"}
    assert run("--store", small, "delete", "bob", "alice", "--yes").out == "deleted bob\nthere was no alice\n"


def test_delete_asks_nobody_without_a_terminal(small: Path, run: Run, stdin: Callable[[bytes], None]) -> None:
    """Where nobody can be asked, delete needs --yes."""
    before = kept(small)
    stdin(b"y\n")
    one_line(run("--store", small, "delete", "alice"), 2, "--yes")
    one_line(run("--store", small, "delete", "alice", "--yes", "b\x00b"), 2, "user_id")
    assert kept(small) == before


def test_a_user_id_may_begin_with_a_dash(small: Path, run: Run) -> None:
    """After -- a word that begins with a dash is a user."""
    assert run("--store", small, "put", "--at", "5", "--", "-x", "calm=1").status == 0
    assert run("--store", small, "get", "--json", "--", "-x").records[0]["axes"] == {"calm": 1.0}
    assert run("--store", small, "delete", "--yes", "--", "-x").out == "deleted -x\n"


def test_prune_says_how_many_it_removed(small: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prune applies the retention and counts what it removed; the latest stays."""
    monkeypatch.setenv("ATTUNED_STORE_HISTORY_RETENTION_DAYS", "1")
    ran = run("--store", small, "prune", "--json")
    assert ran.status == 0
    assert ran.records[0]["removed"] >= 1
    assert run("--store", small, "prune").out == "removed 0 snapshots\n"
    assert {user: latest.updated_at_unix_ms for user, (latest, _) in kept(small).items() if latest} == {
        "alice": 2_000,
        "bob": 3_000,
    }


def test_health_of_a_healthy_store(small: Path, run: Run) -> None:
    """A healthy store says so, and the status is 0."""
    ran = run("--store", small, "health")
    assert ran.status == 0
    assert re.match(r"status +healthy\nbackend +(edge|local)\n", ran.out)
    record = run("--store", small, "health", "--json").records[0]
    assert record["status"] == "healthy"
    assert record["users"] == 2


def test_health_of_an_unhealthy_store(small: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unhealthy store makes the status 1."""
    with open_store(small) as store:
        closed = store
    unhealthy = closed.health()
    monkeypatch.setattr(type(closed), "health", lambda _: unhealthy)
    ran = run("--store", small, "health")
    assert ran.status == 1
    assert re.match(r"status +unhealthy\n", ran.out)


@pytest.mark.parametrize("command", ["get", "history", "search --like"])
def test_an_unknown_user_is_told_whole(small: Path, run: Run, command: str) -> None:
    """An unknown user is named as it was given, with one who is like that, where there is one."""
    one_line(
        run("--store", small, *command.split(), "nobody-special"), 1, "no user 'nobody-special' in the store$"
    )
    one_line(run("--store", small, *command.split(), "alicia"), 1, "no user 'alicia' .did you mean 'alice'")


BAD_WRITES = [
    ("put c\x07arol warmth=1", "user_id"),
    (f"put {'c' * 257} warmth=1", "user_id"),
    ("put alice wealth=1", "wealth"),
    ("put alice warmth=1.1", "warmth"),
    ("put alice warmth=-0.1", "warmth"),
    ("put alice warmth=nan", "warmth: not a number"),
    ("put alice warmth=", "warmth: not a number"),
    ("put alice warmth=0x1", "warmth: not a number"),
    (f"put alice warmth={'9' * 5000}", "warmth"),
    ("put alice =1", "AXIS=VALUE"),
    ("put alice warmth", "AXIS=VALUE"),
    ("put alice warmth=1 WARMTH=1", "twice"),
    (f"put alice {LONG}=1", "aaaa"),
    ("put alice warmth=1 --at soon", "ISO 8601"),
    ("put alice warmth=1 --at -5", "updated_at_unix_ms"),
    ("put alice warmth=1 --at 99999999999999999", "updated_at_unix_ms"),
    ("put alice warmth=1 --confidence 2", "confidence"),
    ("put alice warmth=1 --confidence much", "confidence"),
    ("put alice warmth=1 --source rumour", "rumour"),
    ("put alice warmth=1 --schema-version 0", "schema-version"),
    ("put alice warmth=1 --unknown", "--unknown"),
    ("put", "USER"),
    ("patch alice wealth=1", "wealth"),
    ("patch alice warmth=2", "warmth"),
    ("put alice warmth=1 --store=", "--store"),
]


@pytest.mark.parametrize(("arguments", "reason"), BAD_WRITES)
def test_a_bad_write_changes_nothing(small: Path, run: Run, arguments: str, reason: str) -> None:
    """What cannot be written is one line on stderr, status 2, and leaves an existing store as it was."""
    before = kept(small)
    one_line(run("--store", small, *arguments.split(" ")), 2, reason)
    assert kept(small) == before


@pytest.mark.parametrize(("arguments", "reason"), BAD_WRITES)
def test_a_bad_first_write_makes_no_store(tmp_path: Path, run: Run, arguments: str, reason: str) -> None:
    """What cannot be written leaves no new store behind."""
    one_line(run("--store", tmp_path / "store", *arguments.split(" ")), 2, reason)
    assert not (tmp_path / "store").exists()


def test_a_patch_into_the_past_changes_nothing(small: Path, run: Run) -> None:
    """A patch must become the latest."""
    before = kept(small)
    one_line(run("--store", small, "patch", "alice", "calm=1", "--at", "1500"), 2)
    assert kept(small) == before


# ------------------------------------------------------------------------------
# Snapshots
# ------------------------------------------------------------------------------

NAME = r"\d{8}T\d{6}\.\d{3}Z-attuned_state\.attuned"


@pytest.fixture
def taken(small: Path, run: Run, tmp_path: Path) -> Path:
    """A snapshot of the small store, which has changed since."""
    path = Path(run("--store", small, "snapshot", tmp_path / "backups", "--json").records[0]["path"])
    with open_store(small) as store:
        store.delete("bob")
        store.upsert_latest(StateSnapshot("alice", {"calm": 1.0}, 4_000))
        store.upsert_latest(StateSnapshot("carol", {"calm": 0.0}, 5_000))
    return path


SMALL = {
    "alice": [
        StateSnapshot("alice", {"calm": 0.5}, 2_000, "inferred", 0.5, 2),
        StateSnapshot("alice", {"calm": 0.25, "warmth": 0.75}, 1_000),
    ],
    "bob": [StateSnapshot("bob", {"warmth": 1.0}, 3_000)],
}


def histories(path: Path) -> dict[str, list[StateSnapshot]]:
    return {user: history for user, (_, history) in kept(path).items()}


def made(file: Path) -> str:
    """When a snapshot was made, as its name says."""
    return re.sub(r"(....)(..)(..T..)(..)(..\.\d+Z).*", r"\1-\2-\3:\4:\5", file.name)


def damaged(path: Path) -> Path:
    """A copy of a snapshot that lacks its end."""
    cut = path.with_name("cut.attuned")
    cut.write_bytes(path.read_bytes()[:-40])
    return cut


def test_snapshot_writes_a_file_that_others_can_read(small: Path, run: Run, tmp_path: Path) -> None:
    """Snapshot says in one line where the file is and what is in it; gzip and json read it."""
    ran = run("--store", small, "snapshot", tmp_path / "backups")
    assert (ran.status, ran.err) == (0, "")
    line = re.fullmatch(rf"wrote (.*{NAME}): portable, 3 states, ([\d,]+) bytes, \d+\.\d\d s\n", ran.out)
    assert line, ran.out
    file = Path(line[1])
    assert (file.parent, f"{file.stat().st_size:,}") == (tmp_path / "backups", line[2])
    with gzip.open(file) as lines:
        found = [json.loads(line) for line in lines]
    states = [StateSnapshot.from_dict(fields) for fields in found if "user_id" in fields]
    assert sorted(states, key=lambda state: state.updated_at_unix_ms) == [
        *reversed(SMALL["alice"]),
        *SMALL["bob"],
    ]


def test_snapshot_gives_its_report_as_json(
    small: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --json it is the report; without a directory the file goes to the configured one."""
    record = run("--store", small, "snapshot", "--json").records[0]
    file = Path(record["path"])
    assert file.parent == tmp_path / "here" / "data" / "qdrant" / "snapshots"
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (record["status"], record["reason"], record["points"]) == ("completed", "manual", 3)
    monkeypatch.setenv("QDRANT_SNAPSHOT_DIR", str(tmp_path / "named"))
    named = run("--store", small, "snapshot", "--json").records[0]
    assert Path(named["path"]).parent == tmp_path / "named"


def test_snapshot_keeps_the_newest(small: Path, run: Run, tmp_path: Path) -> None:
    """With --keep older ones go, once the new one is there."""
    names = [
        run("--store", small, "snapshot", tmp_path / "backups", "--keep", "2", "--json").records[0]
        for _ in range(3)
    ]
    assert sorted(path.name for path in (tmp_path / "backups").iterdir()) == [
        record["snapshot_name"] for record in names[1:]
    ]


def test_a_snapshot_that_cannot_be_taken(small: Path, run: Run, tmp_path: Path) -> None:
    """What cannot be taken, or not there, is one line, and nothing is left."""
    (tmp_path / "file").write_text("precious")
    one_line(run("--store", small, "snapshot", tmp_path / "file"), 1, "file: cannot be made")
    one_line(run("--store", small, "snapshot", tmp_path / "new", "--kind", "native"), 2, "Qdrant server")
    assert (tmp_path / "file").read_text() == "precious"
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("engine", ENGINES)
def test_restore_makes_a_store_with_the_axes_of_the_snapshot(
    taken: Path, run: Run, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """An absent store is made by restoring, whatever engine the snapshot is from."""
    monkeypatch.setenv("ATTUNED_STORE_ENGINE", engine)
    new = tmp_path / "new"
    ran = run("--store", new, "restore", taken)
    assert (ran.status, ran.err) == (0, "")
    assert re.fullmatch(
        rf"restored .*{NAME} \(replace: portable, 3 states, [\d,]+ bytes\); .*new has 2 users, 3 snapshots\n",
        ran.out,
    )
    assert (histories(new), axes_of(new)) == (SMALL, ("calm", "warmth"))
    exported = finished(start("--store", new, "export"))
    assert len(exported.records) == 3
    assert run("--store", new, "health", "--json").records[0]["backend"] == engine


def test_restore_of_what_is_replaced_needs_a_yes(
    small: Path, taken: Path, run: Run, stdin: Callable[[bytes], None]
) -> None:
    """A store with users is replaced only with --yes where nobody can be asked."""
    before = kept(small)
    stdin(b"y\n")
    one_line(run("--store", small, "restore", taken), 2, "restore asks on a terminal; elsewhere.*--yes")
    assert kept(small) == before
    record = run("--store", small, "restore", taken, "--yes", "--json").records[0]
    assert (record["status"], record["points"]) == ("completed", 3)
    assert histories(small) == SMALL


@pytest.mark.parametrize(("mode", "calm"), [("merge", 0.5), ("skip", 0.75)])
def test_restore_can_add(small: Path, taken: Path, run: Run, mode: str, calm: float) -> None:
    """Merge takes nothing away, skip touches no user who is there, and neither asks."""
    with open_store(small) as store:
        store.upsert_latest(StateSnapshot("alice", {"calm": 0.75}, 2_000))
    ran = run("--store", small, "restore", taken, "--mode", mode)
    assert (ran.status, ran.err) == (0, "")
    assert f"({mode}: portable, 3 states" in ran.out
    stored = histories(small)
    assert {user: [state.updated_at_unix_ms for state in stored[user]] for user in stored} == {
        "alice": [4_000, 2_000, 1_000],
        "bob": [3_000],
        "carol": [5_000],
    }
    assert stored["alice"][1].axis("calm") == calm


@posix
@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("\n", 1)])
def test_restore_asks_on_a_terminal(small: Path, taken: Path, start: Start, answer: str, status: int) -> None:
    """On a terminal restore says what would be lost, and only yes is yes."""
    before = histories(small)
    terminal = Terminal(start, "--store", small, "restore", taken)
    terminal.read_until(r"replace 2 users of .*store by what .*\.attuned holds\? \[y/N\] ")
    terminal.type(answer)
    assert terminal.close() == status
    assert ("nothing was restored" in terminal.seen) == (status == 1)
    assert histories(small) == (before if status else SMALL)


@pytest.mark.parametrize("options", [(), ("--mode", "merge"), ("--mode", "skip")])
def test_a_damaged_snapshot_changes_nothing(
    small: Path, taken: Path, run: Run, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """A file that is damaged, absent or none changes no store and leaves no new one."""
    before = kept(small)
    cases = [(damaged(taken), "cut short"), (tmp_path / "absent", "No such file"), (tmp_path, "not a file")]
    for file, reason in cases:
        one_line(run("--store", tmp_path / "new", "restore", file, *options), 1, reason)
        one_line(run("--store", small, "restore", file, "--yes", *options), 1, reason)
        assert not (tmp_path / "new").exists()
        assert kept(small) == before


def test_a_snapshot_of_other_axes_than_configured(
    taken: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new store has the axes that are configured, if any; a snapshot that has others does not fit."""
    monkeypatch.setenv("ATTUNED_STORE_AXES", "calm,joy")
    one_line(run("--store", tmp_path / "new", "restore", taken), 1, "ax[ei]s.*warmth")
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("ATTUNED_STORE_AXES", "joy,calm,warmth")
    assert run("--store", tmp_path / "new", "restore", taken).status == 0
    assert (histories(tmp_path / "new"), axes_of(tmp_path / "new")) == (SMALL, ("joy", "calm", "warmth"))


def test_verify_looks_at_every_file(taken: Path, run: Run, tmp_path: Path) -> None:
    """Each file gets its line, and the status is 1 if any is bad."""
    cut, absent = damaged(taken), tmp_path / "absent"
    ran = run("verify", taken)
    assert (ran.status, ran.err) == (0, "")
    contents = r"portable, 3 states, [\d,]+ bytes, 2 users, made \d{4}-\d\d-\d\dT[\d:.]+Z, axes calm, warmth"
    assert re.fullmatch(rf".*{NAME} is good: {contents}\n", ran.out)
    record = run("verify", taken, "--json").records[0]
    assert (record["users"], record["axes"]) == (2, ["calm", "warmth"])

    ran = run("verify", cut, taken, absent, taken)
    assert ran.status == 1
    assert [line.endswith("axes calm, warmth") for line in ran.out.splitlines()] == [True, True]
    assert re.fullmatch(r"attuned-store: .*cut short.*\nattuned-store: .*No such file.*\n", ran.err)

    ran = run("verify", cut, "--json", taken)
    assert (ran.status, ran.err) == (1, "")
    assert [record["status"] for record in ran.records] == ["failed", "completed"]
    assert "cut short" in ran.records[0]["message"]
    assert list(Path().iterdir()) == []


def test_snapshots_are_listed_newest_first(
    small: Path, taken: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list has the newest first, and nothing that is no snapshot."""
    newer = Path(run("--store", small, "snapshot", taken.parent, "--json").records[0]["path"])
    (taken.parent / "notes.txt").write_text("not one")
    ran = run("snapshots", taken.parent)
    assert [line.split() for line in ran.out.splitlines()] == [
        ["snapshot", "kind", "created_at", "users", "states", "axes", "bytes"],
        *(
            [file.name, "portable", made(file), "2", states, "2", f"{file.stat().st_size:,}"]
            for file, states in ((newer, "4"), (taken, "3"))
        ),
    ]
    assert [record["path"] for record in run("snapshots", taken.parent, "--json").records] == [
        str(newer),
        str(taken),
    ]
    monkeypatch.setenv("QDRANT_SNAPSHOT_DIR", str(taken.parent))
    assert run("snapshots") == ran


def test_listing_makes_no_directory(run: Run, tmp_path: Path) -> None:
    """A directory without snapshots says so, one that is not there is an error, and none is made."""
    (tmp_path / "empty").mkdir()
    assert run("snapshots", tmp_path / "empty") == Ran(0, "no snapshots\n", "")
    assert run("snapshots", tmp_path / "empty", "--json") == Ran(0, "", "")
    one_line(run("snapshots"), 1, "snapshots: cannot be listed")
    assert list(Path().iterdir()) == []


def test_copy_there_and_back(small: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store is copied with its axes and histories, also to another engine, and back."""
    there, back = tmp_path / "there", tmp_path / "back"
    monkeypatch.delenv("ATTUNED_STORE_ENGINE")  # which would go for both; a new store is one of Edge
    assert run("copy", small, there) == Ran(0, f"copied 3 states from {small} to {there}\n", "")
    assert run("copy", there, back, "--json").records[0]["points"] == 3
    assert histories(there) == histories(back) == SMALL
    assert axes_of(there) == axes_of(back) == ("calm", "warmth")


def test_what_would_be_gone_at_once_is_refused(taken: Path, small: Path, run: Run) -> None:
    """Restoring or copying into memory is refused; reading memory and checking a file by it are not."""
    one_line(run("--store", "memory://", "restore", taken), 2, "memory:// is gone when the command ends")
    one_line(run("copy", small, "memory://"), 2, "memory:// is gone when the command ends")
    assert run("--store", "memory://", "count").out == "0\n"
    ran = run("--store", "memory://", "import", SAMPLE, "--scale", "0:31")
    assert ran == Ran(0, "imported 660 snapshots; memory:// has 330 users, 660 snapshots\n", "")


def test_copy_replaces_only_when_asked(small: Path, taken: Path, run: Run, tmp_path: Path) -> None:
    """A target that holds users is left alone, unless --replace; a source that is not there makes none."""
    other = tmp_path / "other"
    assert run("--store", other, "restore", taken).status == 0
    one_line(run("copy", small, other), 2, "2 users; .*--replace")
    assert histories(other) == SMALL
    assert run("copy", small, other, "--replace").status == 0
    assert histories(other) == histories(small)
    one_line(run("copy", tmp_path / "absent", tmp_path / "new"), 1, "there is no store at .*absent")
    one_line(run("copy", "ftp://somewhere", tmp_path / "new"), 2, "ftp")
    one_line(run("copy", small, ""), 2, "path")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("token", "arguments", "reason"),
    [
        (None, "--host 0.0.0.0", "0.0.0.0 may be reached.*ATTUNED_STORE_TOKEN"),
        (None, "--host ::", "ATTUNED_STORE_TOKEN"),
        (None, "--host example.org", "ATTUNED_STORE_TOKEN"),
        (None, "--host 127.0.0.1.example.org", "ATTUNED_STORE_TOKEN"),
        (None, "--host=", "ATTUNED_STORE_TOKEN"),
        ("", "", "ATTUNED_STORE_TOKEN is empty"),
        ("", "--host 0.0.0.0", "ATTUNED_STORE_TOKEN is empty"),
        ("s3cret s3cret", "", "blanks"),
        (" \n", "", "ATTUNED_STORE_TOKEN is empty"),
        ("s3crét", "", "ASCII"),
    ],
)
def test_serve_refuses_what_is_not_safe(
    run: Run, monkeypatch: pytest.MonkeyPatch, token: str | None, arguments: str, reason: str
) -> None:
    """Without a token only this machine is served, and a token that cannot be one is an error."""
    if token is not None:
        monkeypatch.setenv("ATTUNED_STORE_TOKEN", token)
    ran = run("serve", "--port", "0", *arguments.split())
    one_line(ran, 2, reason)
    assert "s3cr" not in ran.err
    assert list(Path().iterdir()) == []


def test_serve_on_a_port_that_is_taken(run: Run) -> None:
    """A port that is taken, or an address that is not ours, is one line."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        one_line(run("serve", "--port", port), 1, f"127.0.0.1, port {port}: .*in use")
    assert list(Path().iterdir()) == []


def test_serve_without_uvicorn(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extra is not installed, serve says how to install it."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    one_line(run("serve", "--port", "0"), 1, "pip install starlette uvicorn")
    assert list(Path().iterdir()) == []


# ------------------------------------------------------------------------------
# Choosing the store
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "get alice",
        "history alice",
        "users",
        "search --like alice",
        "delete alice --yes",
        "prune",
        "health",
        "count",
        "export",
        "export all.csv",
        "snapshot",
        "snapshot backups --keep 3",
        "serve --port 0",
    ],
)
@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty folder"])
def test_reading_makes_no_store(tmp_path: Path, run: Run, arguments: str, there: bool) -> None:
    """Where there is no store, what needs one says so and how to make one, and makes nothing."""
    store = tmp_path / "store"
    if there:
        store.mkdir()
    one_line(run("--store", store, *arguments.split()), 1, "there is no store at .*import FILE")
    assert list(store.iterdir()) == [] if there else not store.exists()
    assert list(Path().iterdir()) == []


def test_the_store_may_be_named_before_and_after_the_command(small: Path, run: Run, tmp_path: Path) -> None:
    """--store and --json count before and after the command; the later one wins."""
    assert run("--store", small, "--json", "count").records == [{"users": 2}]
    assert run("count", "--json", "--store", small).records == [{"users": 2}]
    assert run("--store", tmp_path / "absent", "count", "--store", small).out == "2\n"
    assert run("--store", small.as_uri(), "count").out == "2\n"


def test_the_environment_names_the_store(
    small: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --store it is ATTUNED_STORE, else ./attuned_state."""
    assert run("put", "carol", "warmth=1").status == 0
    assert set(kept(tmp_path / "here" / "attuned_state")) == {"carol"}
    monkeypatch.setenv("ATTUNED_STORE", str(small))
    assert run("count").out == "2\n"
    assert run("--store", "./attuned_state", "count").out == "1\n"


@pytest.mark.parametrize("arguments", ["count", "put alice warmth=1", f"import {shlex.quote(str(SAMPLE))}"])
def test_a_store_that_is_a_file(tmp_path: Path, run: Run, arguments: str) -> None:
    """A file where the store should be is an error, and stays as it was."""
    file = tmp_path / "file"
    file.write_text("precious")
    one_line(run("--store", file, *shlex.split(arguments)), 1, "file")
    assert file.read_text() == "precious"


@posix
def test_a_read_only_place(read_only: Path, run: Run) -> None:
    """Where no store can be made, the command says so."""
    one_line(run("--store", read_only / "store", "import", SAMPLE, "--scale", "0:31"), 1, "store")
    one_line(run("--store", read_only / "store", "put", "alice", "warmth=1"), 1, "store")
    assert not (read_only / "store").exists()


@pytest.mark.parametrize("arguments", ["count", "put alice warmth=0", "export", "delete alice --yes"])
def test_a_store_of_a_newer_version(small: Path, run: Run, arguments: str) -> None:
    """A store that a newer version wrote is left alone, and the error says to upgrade."""
    files = [*small.glob("*.json"), *small.glob("collections/*.json")]
    text = {file: file.read_text() for file in files}
    newer = {file: re.sub(r'"format_version": *\d+', '"format_version": 999', text[file]) for file in files}
    assert newer != text
    before = kept(small)
    for file in files:
        file.write_text(newer[file])
    one_line(run("--store", small, *arguments.split()), 1, "999.*upgrade")
    assert {file: file.read_text() for file in files} == newer
    for file in files:
        file.write_text(text[file])
    assert kept(small) == before


HOLD = """
import sys
from attuned_store import open_store
with open_store(sys.argv[1]) as store:
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_store_that_another_process_has_open(small: Path, run: Run, start: Start) -> None:
    """While another process has the store, each command fails with its path, and changes nothing."""
    before = kept(small)
    other = start(small, words=(sys.executable, "-c", HOLD))
    assert other.stdout is not None
    assert other.stdout.readline().strip() == b"open"

    for arguments in ("count", "put alice warmth=0", "delete alice --yes", "health"):
        one_line(run("--store", small, *arguments.split()), 1, re.escape(str(small)))
    one_line(run("--store", small, "import", SAMPLE, "--scale", "0:31"), 1, re.escape(str(small)))
    assert finished(other).status == 0
    assert kept(small) == before


def test_an_unknown_scheme(run: Run) -> None:
    """A target that no store understands is one line, and makes nothing."""
    one_line(run("--store", "ftp://somewhere", "count"), 2, "ftp")
    assert list(Path().iterdir()) == []


def test_a_malformed_setting(small: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A malformed environment variable is named."""
    before = kept(small)
    monkeypatch.setenv("ATTUNED_STORE_MAX_HISTORY_PER_USER", "many")
    one_line(run("--store", small, "count"), 2, "ATTUNED_STORE_MAX_HISTORY_PER_USER")
    one_line(run("--store", small, "delete", "alice", "--yes"), 2, "ATTUNED_STORE_MAX_HISTORY_PER_USER")
    monkeypatch.delenv("ATTUNED_STORE_MAX_HISTORY_PER_USER")
    assert kept(small) == before


# ------------------------------------------------------------------------------
# Help and usage
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run: Run, command: str) -> None:
    """Each command explains itself, with an example."""
    ran = run(command, "--help")
    assert (ran.status, ran.err) == (0, "")
    assert f"usage: attuned-store {command}" in ran.out
    assert f"example: attuned-store {command}" in ran.out
    assert "--store TARGET" in ran.out


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("columns", [70, 80, 132])
def test_help_keeps_to_the_width_of_the_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    """No line of help is wider than the terminal, but for a word that is wider by itself."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for line in run(*command.split(), "--help").out.splitlines():
        assert len(line) <= columns or len(line.split()) == 1, line


def test_the_help_lists_every_command(run: Run) -> None:
    """The command's own help lists what there is."""
    ran = run("--help")
    assert ran.status == 0
    assert [line.split()[0] for line in ran.out.splitlines() if re.match(r"    [a-z]", line)] == list(
        COMMANDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_can_be_parsed(run: Run, command: str, tmp_path: Path) -> None:
    """No example is wrong usage."""
    ran = run(command, "--help")
    example = next(line for line in ran.out.splitlines() if line.startswith("example: "))
    arguments = shlex.split(example.removeprefix("example: attuned-store"))
    assert run("--store", tmp_path / "store", *arguments).status in {0, 1}


def test_version(run: Run) -> None:
    """--version says which it is."""
    assert run("--version") == Ran(0, f"attuned-store {attuned_store.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "COMMAND"),
        ("frobnicate", "frobnicate"),
        ("count --hist", "--hist"),
        ("count extra", "extra"),
        ("delete", "USER"),
        ("import", "FILE"),
        ("export --format xml", "xml"),
        ("history alice --limit -1", "--limit"),
        ("history alice --since tomorrow", "ISO 8601"),
        ("snapshot --kind partial", "partial"),
        ("snapshot --keep 0", "--keep"),
        ("snapshot one two", "two"),
        ("restore", "FILE"),
        ("restore file --mode overwrite", "overwrite"),
        ("restore file --mode", "--mode"),
        ("verify", "FILE"),
        ("verify file --strict", "--strict"),
        ("snapshots one two", "two"),
        ("copy here", "TARGET"),
        ("copy here there elsewhere", "elsewhere"),
        ("serve --port 65536", "65535"),
        ("serve --port http", "--port"),
        ("serve --keep none", "--keep"),
        ("serve ::1", "::1"),
        ("--store", "--store"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run: Run, arguments: str, reason: str) -> None:
    """Wrong usage is one line that says what, and where help is; nothing is made."""
    one_line(run(*arguments.split()), 2, reason)
    assert list(Path().iterdir()) == []


def test_an_unexpected_error_is_one_line(small: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a fault of the program itself is one line, with its kind."""

    def broken(*_: object, **__: object) -> int:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(module("arguments"), "open_store", broken)
    one_line(run("--store", small, "count"), 1, "unexpected ZeroDivisionError: division by zero")


# ------------------------------------------------------------------------------
# As a process
# ------------------------------------------------------------------------------


def test_the_package_is_a_program(path: Path, start: Start) -> None:
    """The package runs as the command, and its exit status is the process's."""
    assert finished(start("--store", path, "import", SAMPLE, "--scale", "0:31")).status == 0
    ran = finished(start("--store", path, "count", "--history"))
    assert (ran.status, ran.out.split(), ran.err) == (0, ["660"], "")
    one_line(finished(start("--store", path, "get", "nobody")), 1, "nobo")
    one_line(finished(start("get")), 2, "USER")


@posix
def test_a_closed_pipe_ends_it_cleanly(mood: Path, start: Start) -> None:
    """Where the reader has seen enough, export ends without a word."""
    child = start("--store", mood, "export", stdin=subprocess.DEVNULL)
    assert child.stdout is not None
    assert child.stderr is not None
    assert json.loads(child.stdout.readline())["user_id"]
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait(DEADLINE) == 0


@posix
@pytest.mark.parametrize("command", ["count", "users", "get maps_001", "search --like maps_001", "--help"])
def test_a_pipe_that_was_never_read_ends_it_cleanly(mood: Path, start: Start, command: str) -> None:
    """Short output into a pipe that is closed already is no error either."""
    reader, writer = os.pipe()
    os.close(reader)
    child = start("--store", mood, *command.split(), stdout=writer, stdin=subprocess.DEVNULL)
    os.close(writer)
    ran = finished(child)
    assert (ran.status, ran.err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["count", "export"])
def test_a_full_disk_is_one_line(mood: Path, start: Start, command: str) -> None:
    """Output that cannot be written is a failure."""
    before = kept(mood)
    with Path("/dev/full").open("wb") as full:
        one_line(finished(start("--store", mood, command, stdout=full)), 1, "space")
    assert kept(mood) == before


@posix
def test_an_import_outlives_its_closed_stderr(path: Path, start: Start, tmp_path: Path) -> None:
    """Bad rows that nobody reads about do not stop an import."""
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["user_id,calm", *(f"u{n},5" for n in range(100)), "good,0.5"]))
    reader, writer = os.pipe()
    os.close(reader)
    child = start("--store", path, "import", file, stderr=writer)
    os.close(writer)
    assert finished(child).status == 1
    assert set(kept(path)) == {"good"}


def test_characters_that_the_terminal_lacks(path: Path, start: Start) -> None:
    """A user that stdout cannot show comes out as an escape; export is always UTF-8."""
    with open_store(path) as store:
        store.upsert_latest(StateSnapshot("Ödön", {}, 1))
    env = environment(PYTHONIOENCODING="ascii")
    ran = finished(start("--store", path, "users", env=env))
    assert (ran.status, ran.out.split(), ran.err) == (0, ["\\xd6d\\xf6n"], "")
    ran = finished(start("--store", path, "export", "--format", "csv", env=env))
    assert "Ödön" in ran.out


def test_names_cannot_speak_to_the_terminal(path: Path, run: Run, tmp_path: Path) -> None:
    """What a terminal would obey comes out as an escape, on stdout and stderr; JSON escapes it itself."""
    user = "bob\u202e\u2028admin"
    assert run("--store", path, "put", user, "warmth=1", "--at", "5").status == 0
    escaped = r"bob\u202e\u2028admin"
    for command in ("users", "search warmth=1", f"get {user}", f"delete {user} --yes"):
        ran = run("--store", path, *command.split(" "))
        assert escaped in ran.out, command
        assert not set(ran.out) & {"\u202e", "\u2028"}
        assert run("--store", path, "put", user, "warmth=1").status == 0
    assert run("--store", path, "users", "--json").records == [{"user_id": user}]

    name = "\x1b[31mred\n.csv"
    ran = run("--store", path, "export", tmp_path / name)
    assert ran.out.endswith("\\x1b[31mred\\n.csv\n")
    one_line(run("--store", path, "import", tmp_path / f"no{name}"), 1, r"no\\x1b\[31mred .csv: No such file")


INTERRUPTIBLE = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # even where the tests run in the background
from {PACKAGE} import main
sys.exit(main())
"""
INTERRUPTIBLE_COMMAND = (sys.executable, "-c", INTERRUPTIBLE)


@posix
def test_ctrl_c_ends_it_with_130(path: Path, start: Start, tmp_path: Path) -> None:
    """Ctrl-C is no traceback, and the status is 130."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    child = start("--store", path, "import", pipe, words=INTERRUPTIBLE_COMMAND)
    writer = os.open(pipe, os.O_WRONLY)  # waits until the command has the other end open
    child.send_signal(signal.SIGINT)
    os.close(writer)  # a signal just before the read is noticed just after it
    one_line(finished(child), 130, "interrupted: nothing was written; importing .*pipe again is harmless")
    assert not path.exists()


SLOWLY = f"""
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from attuned_store import StateTable
rows = StateTable.__iter__
readings = []
def slow(table):
    readings.append(table)
    for number, row in enumerate(rows(table)):
        if len(readings) == 2 and number == 5_000:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait()
        yield row
StateTable.__iter__ = slow
from {PACKAGE} import main
sys.exit(main())
"""


@posix
def test_ctrl_c_in_the_middle_of_an_import(path: Path, start: Start, run: Run, tmp_path: Path) -> None:
    """Ctrl-C says how much was written, which is there, and that importing again is harmless, which it is."""
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["user_id,updated_at_unix_ms,calm", *(f"u{n},5,0.5" for n in range(6_000))]))
    ran = finished(start("--store", path, "import", file, words=(sys.executable, "-c", SLOWLY)))
    one_line(ran, 130, r"interrupted: [\d,]+ snapshots were written; importing .*rows\.csv again is harmless")
    written = int(ran.err.split()[2].replace(",", ""))
    assert 0 < written <= 5_000
    assert written <= len(kept(path)) <= 5_000
    assert run("--store", path, "import", file).status == 0
    assert len(kept(path)) == 6_000


class Terminal:
    """The command on a pseudo-terminal: all three streams are it."""

    def __init__(self, start: Start, *argv: object, words: Sequence[str] = ()) -> None:
        import pty

        self.master, slave = pty.openpty()
        env = environment(TERM="xterm-256color", COLUMNS="100")
        self.child = start(*argv, words=words, stdin=slave, stdout=slave, stderr=slave, env=env)
        os.close(slave)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a character may come in two pieces

    def read_until(self, pattern: str) -> None:
        """Read what it shows until it matches, or it ends."""
        end = time.monotonic() + DEADLINE
        while not re.search(pattern, self.seen):
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.seen!r}"
            try:
                data = os.read(self.master, 4096)
            except OSError:  # the other end is closed
                data = b""
            if not data:
                break
            self.seen += self._decoder.decode(data)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> int:
        self.read_until(r"\Zx")
        status = self.child.wait(DEADLINE)
        os.close(self.master)
        return status


@posix
@pytest.mark.parametrize(
    ("answer", "status", "left"),
    [
        ("y\n", 0, {"bob"}),
        ("YES\n", 0, {"bob"}),
        ("n\n", 1, {"alice", "bob"}),
        ("\n", 1, {"alice", "bob"}),
        ("\x04", 1, {"alice", "bob"}),
    ],
)
def test_delete_asks_on_a_terminal(
    small: Path, start: Start, answer: str, status: int, left: set[str]
) -> None:
    """On a terminal delete asks, and only yes is yes."""
    terminal = Terminal(start, "--store", small, "delete", "alice")
    terminal.read_until(r"delete 1 user \(alice\) with all history from .*\? \[y/N\] ")
    terminal.type(answer)
    assert terminal.close() == status
    assert ("deleted alice" in terminal.seen) == (status == 0)
    assert ("nothing was deleted" in terminal.seen) == (status == 1)
    assert set(kept(small)) == left


@posix
def test_ctrl_c_at_the_question(small: Path, start: Start) -> None:
    """Ctrl-C where it asks deletes nothing."""
    terminal = Terminal(start, "--store", small, "delete", "alice", words=INTERRUPTIBLE_COMMAND)
    terminal.read_until(r"\[y/N\] ")
    terminal.child.send_signal(signal.SIGINT)
    terminal.type("\x04")  # a signal just before the read is noticed just after it
    assert terminal.close() == 130
    assert "Traceback" not in terminal.seen
    assert set(kept(small)) == {"alice", "bob"}


WITHOUT_RICH = (
    sys.executable,
    "-c",
    f"import sys; sys.modules['rich'] = None; from {PACKAGE} import main; sys.exit(main())",
)


@posix
@pytest.mark.parametrize(
    ("words", "shown", "wiped"),
    [
        pytest.param((), r"waiting for input .* \d+ s", r"\r\x1b\[2K.*", marks=needs("rich"), id="rich"),
        pytest.param(WITHOUT_RICH, r"waiting for input: \d+ s", r"\r +\r.*", id="plain"),
    ],
)
def test_progress_shows_on_a_terminal(
    path: Path, start: Start, tmp_path: Path, words: Sequence[str], shown: str, wiped: str
) -> None:
    """What takes over a second says so on a terminal, and wipes it away, with rich and without."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    terminal = Terminal(start, "--store", path, "import", pipe, words=words)
    writer = os.open(pipe, os.O_WRONLY)
    terminal.read_until(shown)
    os.write(writer, b"user_id,calm\na,0.5\nb,7\n")
    os.close(writer)
    assert terminal.close() == 1
    assert re.search(wiped + r"line 3: calm: 7 is outside.*imported 1 snapshot, ", terminal.seen, re.DOTALL)
    assert set(kept(path)) == {"a"}


@posix
@pytest.mark.parametrize(
    ("words", "heading"),
    [
        pytest.param(
            (), r"score +user_id +updated_at .*\r\n─{50}.*\n +1\.0000 +\[b\]x", marks=needs("rich"), id="rich"
        ),
        pytest.param(WITHOUT_RICH, r"score   user_id {198}.*\n1\.0000  \[b\]x{200}  1970", id="plain"),
    ],
)
def test_tables_on_a_terminal(small: Path, start: Start, words: Sequence[str], heading: str) -> None:
    """On a terminal rich draws the tables, where it is installed; nothing of an id is cut off."""
    with open_store(small) as store:
        store.upsert_latest(StateSnapshot("[b]" + "x" * 200, {"warmth": 0.9}, 4_000))
    terminal = Terminal(start, "--store", small, "search", "warmth=1", words=words)
    assert terminal.close() == 0
    seen = re.sub(r"\x1b\[[0-9;]*m", "", terminal.seen)
    assert re.search(heading, seen), seen
    assert seen.count("x") == 200
    assert "[b]" in seen


@pytest.mark.parametrize("command", ["search warmth=1", "get alice", "history alice", "users", "health"])
def test_output_into_pipes_does_not_depend_on_rich(small: Path, start: Start, command: str) -> None:
    """What a program reads is the same with rich and without."""
    first, second = (
        finished(start("--store", small, *command.split(), words=words)) for words in ((), WITHOUT_RICH)
    )
    assert first.status == second.status == 0
    assert re.sub(r"\d+\.\d+", "", first.out) == re.sub(r"\d+\.\d+", "", second.out)
    assert "\x1b" not in first.out


def test_no_progress_without_a_terminal(mood: Path, run: Run) -> None:
    """Nothing is shown on a stderr that is no terminal."""
    assert run("--store", mood, "count").err == ""


def test_a_reading_command_makes_no_collection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that reads refuses a collection that a directory does not have, and makes none."""
    place = str(tmp_path / "store")
    assert main(["--store", place, "put", "ann", "warmth=0.5"]) == 0
    before = sorted(path.name for path in (tmp_path / "store" / "collections").iterdir())
    monkeypatch.setenv("QDRANT_COLLECTION", "other")
    capsys.readouterr()
    assert main(["--store", place, "count"]) == 1
    assert "there is no store" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "store" / "collections").iterdir()) == before

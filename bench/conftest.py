"""What the benchmarks share: the record, a fair contest, races of contenders, and the table at the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from attuned_store import CANONICAL_AXES, Axes, StateSnapshot

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # the loopback server stands there

from contenders import FAMILIES, MOST_USERS, Contender, People, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

USERS = 10_000
START_MS = 1_700_000_000_000

# The record of the questions about one store: every canonical axis; no value is neutral.
AXES = {name: (7 * position % 23) / 22 * 0.98 + 0.01 for position, name in enumerate(CANONICAL_AXES)}


def user_ids(number: int = USERS) -> list[str]:
    return [f"user-{position:05}" for position in range(number)]


def varied(position: int) -> dict[str, float]:
    """The record turned by some axes and shaded: a thousand states, of which no two point the same way."""
    values = list(AXES.values())
    turned = values[position % 23 :] + values[: position % 23]
    shade = 0.5 + position % 43 / 86
    return {name: value * shade for name, value in zip(AXES, turned, strict=True)}


def states(users: Sequence[str], time_ms: int = START_MS) -> list[StateSnapshot]:
    return [StateSnapshot(user, varied(place), time_ms) for place, user in enumerate(users)]


def batches(users: Sequence[str], rounds: int, size: int) -> list[list[StateSnapshot]]:
    """New states of one user after another, a batch a round; their axes are shared, and stay in CPU cache."""
    axes = Axes(AXES)
    newer = [StateSnapshot(users[n % len(users)], axes, START_MS + 1 + n) for n in range(rounds * size)]
    return [newer[start : start + size] for start in range(0, len(newer), size)]


# -----------------------------------------------------------------------------
# Contests
# -----------------------------------------------------------------------------


@attrs.frozen
class Outcome:
    """Seconds a call of every contender, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def mean(self, name: str) -> float:
        return statistics.mean(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """The median of the ratios of the rounds: neighbours in time met the same noise."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def contest(
    benchmark: Any,
    contenders: Mapping[str, Callable[[], object]],
    *,
    calls: int | Mapping[str, int] = 1,
    rounds: int = 31,
    setup: Callable[[], object] = tuple,
) -> Outcome:
    """Run contenders by turns, each a round of so many calls; pytest-benchmark shows the first, ours.

    ``setup`` runs before each turn, untimed. A contender may return seconds by its own clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    ours, *rivals = contenders
    number = calls if isinstance(calls, Mapping) else dict.fromkeys(contenders, calls)

    def take(name: str) -> None:
        started = time.perf_counter()
        own = contenders[name]()
        taken = own if isinstance(own, float) else time.perf_counter() - started
        seconds[name].append(taken / number[name])

    def turn_of_rivals() -> None:
        if benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.stats.iterations = number[ours]
        for rival in rivals:
            setup()
            take(rival)
        setup()

    gc.collect()
    gc.disable()  # as timeit does
    try:
        benchmark.pedantic(take, args=(ours,), setup=turn_of_rivals, rounds=rounds, warmup_rounds=2)
    finally:
        gc.enable()
    outcome = Outcome({name: taken[-rounds:] for name, taken in seconds.items()})
    benchmark.extra_info["median_seconds"] = {name: outcome.median(name) for name in contenders}
    benchmark.extra_info["ratios"] = {name: outcome.ratio(ours, name) for name in rivals}
    return outcome


@attrs.define
class Table:
    """One row a question, printed when all have been answered; what the races found stands beside it."""

    rows: list[tuple[str, str, str, str]] = attrs.field(factory=list)
    targets: list[dict[str, Any]] = attrs.field(factory=list)
    races: list[dict[str, Any]] = attrs.field(factory=list)
    versions: dict[str, str] = attrs.field(factory=dict)

    def add(
        self,
        question: str,
        figure: float,
        unit: str,
        *,
        most: float | None = None,
        least: float | None = None,
        note: str = "",
    ) -> None:
        shown = f"{figure:.3g} {unit}" + (f" ({note})" if note else "")
        if most is None and least is None:
            self.rows.append((question, shown, "", ""))
            return
        if most is not None:
            target, met = f"at most {most:g}", figure <= most
        else:
            target, met = f"at least {least:g}", figure >= (least or 0)
        self.rows.append((question, shown, target, "met" if met else "MISSED"))
        goal = {"question": question, "figure": figure, "unit": unit, "most": most, "least": least}
        self.targets.append({**goal, "note": note})


_TABLE = pytest.StashKey[Table]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--users", default="1000,10000,100000", help="numbers of users in races")
    parser.addoption("--results", type=Path, help="where to write, as JSON, what was found")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = Table()
    config.addinivalue_line("markers", "families(*names): the families to which a race is confined")
    # qdrant-client says so of every collection with more than 20,000 points: it is among what is compared.
    config.addinivalue_line("filterwarnings", "ignore:Local mode is not recommended:UserWarning")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Files here are called bench_*.py, which pytest collects by itself only where they are named."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_TABLE].rows
    if not rows:
        return
    rows = [("question", "figure", "target", ""), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("attuned_store: speed")
    for row in rows:
        terminalreporter.write_line(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--results")
    if path is not None:
        found = session.config.stash[_TABLE]
        path.write_text(
            json.dumps({"versions": found.versions, "races": found.races, "targets": found.targets}), "utf-8"
        )


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    return request.config.stash[_TABLE]


def us(*named_seconds: tuple[str, float]) -> str:
    """Times for a note: "store 1.2 us, floor 1.3 us"."""
    return ", ".join(f"{name} {seconds * 1e6:.3g} us" for name, seconds in named_seconds)


def medians(outcome: Outcome, names: Iterable[str] | None = None) -> str:
    return us(*((name, outcome.median(name)) for name in names or outcome.seconds))


# -----------------------------------------------------------------------------
# Races: a question put to all contenders of a family, at several numbers of users
# -----------------------------------------------------------------------------


def sizes(config: pytest.Config) -> list[int]:
    return [int(number) for number in config.getoption("--users").split(",")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every race is run in each family and at each size; what is filled for one serves all."""
    if "lineup" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("families")
    families = FAMILIES if marker is None else marker.args
    cases = [
        pytest.param((family, users), id=f"{family}-{users}")
        for users in sizes(metafunc.config)
        for family in families
        if users <= MOST_USERS.get(family, users)
    ]
    metafunc.parametrize("lineup", cases, indirect=True, scope="session")


@attrs.frozen
class Lineup:
    """The contenders of a family, filled with so many users."""

    family: str
    people: People
    contenders: Mapping[str, Contender]
    loop: asyncio.Runner
    decides: bool  # whether targets are judged by it


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as loop:
        yield loop


@pytest.fixture(scope="session")
def lineup(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, loop: asyncio.Runner
) -> Iterator[Lineup]:
    family, users = request.param
    chosen = sizes(request.config)
    people, directory = People(users), tmp_path_factory.mktemp(f"{family}_{users}_")
    table = request.config.stash[_TABLE]
    with contextlib.ExitStack() as stack:
        place = Place(directory, loop, stack.enter_context(_server()) if family == "remote" else "")
        contenders: dict[str, Contender] = {}
        for kind in FAMILIES[family]:
            if kind.is_installed() and users <= kind.most_users:
                contender = contenders[kind.name] = kind(place)
                contender.open()
                stack.callback(contender.close)
                contender.fill(people)
                contender.newer = people.later_states()
                if kind.library:
                    table.versions[kind.library] = kind.version()
        decides = users == (USERS if USERS in chosen else max(chosen))
        yield Lineup(family, people, contenders, loop, decides)


def _server() -> contextlib.AbstractContextManager[str]:
    from qdrant_server import in_own_process

    return in_own_process()


ROUNDS = 15
_TURN_S = 0.01  # how long a turn should take, so that a clock's grain and a call's overhead do not show
_MOST_CALLS = 16_384


class Race:
    """A contest of all contenders of a lineup, each with as many calls a turn as take about as long."""

    def __init__(self, benchmark: Any, table: Table, lineup: Lineup) -> None:
        self.benchmark = benchmark
        self.table = table
        self.lineup = lineup

    def run(
        self,
        question: str,
        way: Callable[[Contender], Callable[[list[Any]], object] | None],
        arguments: Callable[[Contender], Iterator[Any]],
        *,
        most_calls: int = _MOST_CALLS,
        before: Callable[[Contender], object] | None = None,
        warm: int = 0,
        rounds: int = ROUNDS,
    ) -> Outcome:
        """Time what ``way`` gives for a contender; it is called with the arguments of one turn.

        Before all else ours, which alone keep what they have read, are called with ``warm`` of them.
        """
        turns: dict[str, _Turns] = {}
        for name, contender in self.lineup.contenders.items():
            make = way(contender)
            if make is not None:
                turns[name] = _Turns(contender, make, arguments(contender), before, most_calls)
        if not any(turn.contender.ours for turn in turns.values()):
            pytest.skip("this library has no such operation here")

        def prepare() -> None:
            for turn in turns.values():
                turn.prepare()

        for turn in turns.values():
            if turn.contender.ours:
                turn.warm_up(warm)
        calls = {name: turn.calibrate() for name, turn in turns.items()}
        contenders: dict[str, Callable[[], object]] = {name: turn.take for name, turn in turns.items()}
        outcome = contest(self.benchmark, contenders, calls=calls, rounds=rounds, setup=prepare)
        for turn in turns.values():
            turn.finish()
        self.record(question, "s", {name: outcome.median(name) for name in turns}, outcome.ratio)
        return outcome

    def later_states(self, contender: Contender) -> Iterator[Any]:
        """What a write takes: newer states of users who are written again and again."""
        return map(contender.form, contender.newer)

    def record(
        self,
        question: str,
        unit: str,
        figures: Mapping[str, float],
        ratio: Callable[[str, str], float] | None = None,
    ) -> None:
        """Keep what was found, with the ratios of ours to the floor and to the best peer."""
        contenders = self.lineup.contenders
        peers = [name for name in figures if not contenders[name].ours and name != "floor"]
        best = min(peers, key=figures.__getitem__, default=None)
        rivals = {"floor": "floor" if "floor" in figures else None, "best peer": best}
        quotient = ratio or (lambda mine, theirs: figures[mine] / figures[theirs])
        ratios = {
            name: {role: quotient(name, rival) for role, rival in rivals.items() if rival is not None}
            for name in figures
            if contenders[name].ours
        }
        found = {"question": question, "family": self.lineup.family, "users": self.lineup.people.number}
        self.table.races.append(
            {**found, "unit": unit, "figures": dict(figures), "best peer": best, "ratios": ratios}
        )

    def target(self, question: str, outcome: Outcome, pair: tuple[str, str], **bound: float) -> None:
        """Judge the ratio of two: of times with ``most``, of speeds with ``least``."""
        if not self.lineup.decides or not all(name in outcome.seconds for name in pair):
            return
        quick = "least" in bound
        figure = outcome.ratio(*reversed(pair)) if quick else outcome.ratio(*pair)
        unit = f"times as fast as {pair[1]}" if quick else f"x {pair[1]}"
        self.table.add(question, figure, unit, note=medians(outcome, pair), **bound)


class _Turns:
    """The turns of a contender; what its calls take is made before the clock runs."""

    def __init__(
        self,
        contender: Contender,
        make: Callable[[list[Any]], object],
        arguments: Iterator[Any],
        before: Callable[[Contender], object] | None,
        most_calls: int,
    ) -> None:
        self.contender = contender
        self._make = make
        self._arguments = arguments
        self._before = before
        self._most_calls = most_calls
        self._calls = 1
        self._prepared: list[Any] = []

    def prepare(self) -> None:
        if not self._prepared:
            self._prepared = list(itertools.islice(self._arguments, self._calls))
            if self._before is not None:
                self._before(self.contender)

    def take(self) -> float:
        prepared, self._prepared = self._prepared, []
        started = time.perf_counter()
        self._make(prepared)
        return time.perf_counter() - started

    def finish(self) -> None:
        """Take a turn that was prepared: what has been closed for it is opened by it."""
        if self._prepared:
            self.take()

    def warm_up(self, calls: int) -> None:
        self._make(list(itertools.islice(self._arguments, calls)))

    def calibrate(self) -> int:
        """Find how many calls take as long as a turn should; of three turns the quickest says so."""
        while True:
            taken = min(self._tried() for _ in range(3))  # one alone may have met with a flush of the disk
            if taken > _TURN_S / 4 or self._calls >= self._most_calls:
                self._calls = max(1, min(self._most_calls, round(self._calls * _TURN_S / taken)))
                return self._calls
            self._calls *= 4

    def _tried(self) -> float:
        self.prepare()
        return self.take()


@pytest.fixture
def race(benchmark: Any, table: Table, lineup: Lineup) -> Race:
    return Race(benchmark, table, lineup)

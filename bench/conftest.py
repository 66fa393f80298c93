"""What the benchmarks share: the record, the floors, a fair contest, and the table at the end."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs
import pytest

from attuned_store import CANONICAL_AXES, Axes, StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

USERS = 10_000
START_MS = 1_700_000_000_000

# The record: every canonical axis, in a collection of 24 dimensions; no value is neutral.
AXES = {name: (7 * position % 23) / 22 * 0.98 + 0.01 for position, name in enumerate(CANONICAL_AXES)}

_Value = TypeVar("_Value")


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


class Floor(Generic[_Value]):
    """The least that keeps a latest value and a history for threads: dict + Lock + deque(100)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: dict[str, _Value] = {}
        self._history: dict[str, deque[_Value]] = {}

    def put(self, user_id: str, value: _Value) -> None:
        with self._lock:
            self._latest[user_id] = value
            history = self._history.get(user_id)
            if history is None:
                history = self._history[user_id] = deque(maxlen=100)
            history.append(value)

    def get(self, user_id: str) -> _Value | None:
        with self._lock:
            return self._latest.get(user_id)


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
    calls: int = 1,
    rounds: int = 31,
    setup: Callable[[], object] = tuple,
) -> Outcome:
    """Run contenders by turns, each a round of so many calls; pytest-benchmark shows the first, ours.

    ``setup`` runs before each turn, untimed. A contender may return seconds by its own clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    ours, *rivals = contenders

    def take(name: str) -> None:
        started = time.perf_counter()
        own = contenders[name]()
        taken = own if isinstance(own, float) else time.perf_counter() - started
        seconds[name].append(taken / calls)

    def turn_of_rivals() -> None:
        if benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.stats.iterations = calls
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
    """One row a question, printed when all have been answered."""

    rows: list[tuple[str, str, str, str]] = attrs.field(factory=list)

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
        if most is not None:
            self.rows.append((question, shown, f"at most {most:g}", "met" if figure <= most else "MISSED"))
        elif least is not None:
            self.rows.append((question, shown, f"at least {least:g}", "met" if figure >= least else "MISSED"))
        else:
            self.rows.append((question, shown, "", ""))


_TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = Table()


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


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    return request.config.stash[_TABLE]


def us(*named_seconds: tuple[str, float]) -> str:
    """Times for a note: "store 1.2 us, floor 1.3 us"."""
    return ", ".join(f"{name} {seconds * 1e6:.3g} us" for name, seconds in named_seconds)


def medians(outcome: Outcome, names: Iterable[str] | None = None) -> str:
    return us(*((name, outcome.median(name)) for name in names or outcome.seconds))

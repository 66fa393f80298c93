"""Metrics of Prometheus: each thread adds up its own numbers, collected when asked for."""

from __future__ import annotations

import itertools
import operator
import sys
import threading
import weakref
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = (1e-6, 1e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_SNAPSHOT_SECONDS = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)
_CIRCUIT_STATES = {"closed": 0, "half-open": 1, "open": 2}

_OPERATIONS = "attuned_store_operation_duration_seconds"  # with the status, which its own labels leave out
_METRICS: dict[
    str, tuple[str, list[str], tuple[float, ...]]
] = {  # counters, and histograms of seconds by their bounds
    _OPERATIONS: ("Of stores.", ["backend", "operation"], SECONDS),
    "attuned_store_slow_operations_total": ("Steps slower than allowed.", ["backend", "operation"], ()),
    "attuned_qdrant_request_duration_seconds": ("Each try of its own.", ["operation"], SECONDS),
    "attuned_qdrant_errors_total": ("Requests that failed.", ["operation", "kind"], ()),
    "attuned_qdrant_retries_total": ("Requests sent again.", [], ()),
    "attuned_snapshot_duration_seconds": ("Of snapshots taken and restored.", [], _SNAPSHOT_SECONDS),
}


class Series:
    """A counter, or a histogram where there are bounds: for each thread a cell, to which it alone adds.

    A cell holds the sum of the seconds, how many were within the first bound, in each later bucket and beyond
    the last. Cells of threads that have ended are folded into one. The id of such a thread is given to a new
    one, which goes on with its cell where it finds it: there is no other left to do so.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.cells: dict[int, list[float]] = {}  # by the id of the thread
        self._removed: list[tuple[int, list[float]]] = []  # from the cells, and not folded yet
        self._folded: list[float] = [0] * (len(bounds) + 2)
        self._fold_at = 64  # cells: they must not pile up where nobody collects
        self._lock = threading.Lock()  # of what is folded

    def count(self, seconds: float = 0.0) -> None:
        """Count one that took so long."""
        thread = threading.get_ident()
        cell = self.cells.get(thread)
        if cell is None:
            cell = self.cells[thread] = [0] * (len(self.bounds) + 2)
        cell[0] += seconds
        cell[1 + bisect_left(self.bounds, seconds)] += 1
        # Without waiting: it may be this thread that is folding, where a finalizer counts.
        if len(self.cells) > self._fold_at and self._lock.acquire(blocking=False):
            try:
                self._fold()
                self._fold_at = 2 * len(self.cells) + 64
            finally:
                self._lock.release()

    def total(self) -> list[float]:
        """The sums over all threads, of which none ever becomes less."""
        with self._lock:
            self._fold()
            removed = (cell for _, cell in self._removed)
            cells = [self._folded, *removed, *self.cells.copy().values()]
            return [sum(each) for each in zip(*(cell.copy() for cell in cells), strict=True)]

    def _fold(self) -> None:
        running = set(sys._current_frames())
        for thread in self.cells.copy():
            if thread not in running:
                self._removed.append((thread, self.cells.pop(thread)))
        # Looked at anew: a thread that was given such an id meanwhile may be about to add to a cell that it
        # found before this was removed. A thread that adds is running: the cells of the others are at rest.
        running, removed, self._removed = set(sys._current_frames()), self._removed, []
        for thread, cell in removed:
            if thread in running:
                self._removed.append((thread, cell))
            else:
                self._folded = list(map(operator.add, self._folded, cell))


class Metrics:
    """The metrics of this process, which a registry of prometheus_client collects."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant: a store may be collected while it is held
        self.breakers: weakref.WeakSet[Any] = (
            weakref.WeakSet()
        )  # of the open stores; their class stands below
        self.snapshot_bytes = 0
        self._series: dict[tuple[str, ...], Series] = {}  # by the metric and the values of its labels
        self.series("attuned_qdrant_retries_total")
        self.series("attuned_snapshot_duration_seconds")

    def series(self, metric: str, *labels: str) -> Series:
        """What counts for a metric under these values of its labels."""
        found = self._series.get((metric, *labels))
        return found or self._series.setdefault((metric, *labels), Series(_METRICS[metric][2]))

    def operations(self, backend: str, operation: str, status: str) -> Series:
        """What counts and times the operations of stores."""
        return self.series(_OPERATIONS, backend, operation, status)

    def collect(self) -> Iterator[Any]:
        """Everything that has been counted, as prometheus_client wants it."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        families: dict[str, Any] = {
            metric: (HistogramMetricFamily if bounds else CounterMetricFamily)(metric, meaning, labels=labels)
            for metric, (meaning, labels, bounds) in _METRICS.items()
        }
        counted = CounterMetricFamily(
            "attuned_store_operations_total", "Of stores.", labels=["backend", "operation", "status"]
        )
        sums: dict[tuple[str, ...], list[float]] = {}
        for (metric, *labels), series in self._series.copy().items():
            total = series.total()
            if metric == _OPERATIONS:
                number = sum(total[1:])
                if not number:
                    continue  # made for what has not been called so far
                counted.add_metric(labels, number)
                labels = labels[:-1]  # noqa: PLW2901 - the histogram sums over the status
            known = sums.get((metric, *labels))
            sums[metric, *labels] = list(map(operator.add, known, total)) if known else total
        for (metric, *labels), (seconds, *counts) in sums.items():
            if bounds := _METRICS[metric][2]:
                names = [*(repr(float(bound)) for bound in bounds), "+Inf"]
                buckets = list(zip(names, itertools.accumulate(counts), strict=True))
                families[metric].add_metric(labels, buckets, seconds)
            else:
                families[metric].add_metric(labels, *counts)
        with self.lock:
            breakers = tuple(self.breakers)
        worst = max((_CIRCUIT_STATES[breaker.state] for breaker in breakers), default=0)
        meaning = "0 closed, 1 half-open, 2 open; the worst of all stores."
        yield from (counted, *families.values())
        yield GaugeMetricFamily("attuned_qdrant_circuit_state", meaning, worst)
        yield GaugeMetricFamily(
            "attuned_snapshot_bytes", "Size of the last snapshot file.", self.snapshot_bytes
        )

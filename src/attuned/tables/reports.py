"""What the reading of a table found: good and bad rows, why those are bad, and what may help."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import attrs

from attuned.base.errors import plural
from attuned.tables.rows import RowError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attuned.base.values import Shape

_SHOWN_BAD_ROWS = 5
_REASONS_SHOWN = 100
_SEVERAL = 10
_MOST_OF_A_SCALE = 10**8  # no scale that anybody answers on
_DAYS = 10_000  # about as many as there are since 1970: taken for milliseconds they are seconds
_LATE_1970 = 31_000_000_000


@attrs.frozen
class BadRow:
    """A row that is no state: ``row`` is the line it begins on, or where there are none its number from 0."""

    row: int
    reason: str


@attrs.frozen(kw_only=True)
class TableReport:
    """What was read of a table so far.

    ``good`` and ``bad`` rows; ``examples`` are the first five bad ones, ``reasons`` how many were bad for
    what; ``unit`` says what rows are numbered by, "line" or "row". ``span`` is the lowest and the highest
    value of rows with values outside of the scale, else None. ``hints`` say what else may help.
    """

    good: int = 0
    bad: int = 0
    unit: str = "line"
    examples: tuple[BadRow, ...] = ()
    reasons: Mapping[str, int] = attrs.field(factory=dict[str, int])
    span: tuple[float, float] | None = None
    hints: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{plural(self.good, 'good row')}, {plural(self.bad, 'bad row')}"]
        lines += [f"{self.unit} {each.row}: {each.reason}" for each in self.examples]
        if self.bad > len(self.examples):
            lines += [f"{count:,} times {reason}" for reason, count in self.reasons.items()]
        if self.span is not None:
            low, high = self.span
            lines.append(f"values span {low:g} to {high:g}: try scale=({low:g}, {high:g})")
        return "\n".join([*lines, *self.hints])


class Tally:
    """What one reading found."""

    def __init__(self) -> None:
        self.good = self.bad = 0
        self.examples: list[BadRow] = []
        self.reasons: Counter[str] = Counter()
        self.spans: dict[str, tuple[float, float]] = {}  # by axis, of rows with values outside of the scale
        self.outside = 0  # rows with values outside of the scale
        self.axes: dict[str, None] = {}
        self.shapes: set[Shape] = set()
        self.absent: set[str] = set()  # what may stand for an absent value
        self.newest = 0

    def add_bad(self, row: int, error: ValueError) -> None:
        """Count a bad row."""
        self.bad += 1
        text = str(error)
        if len(self.examples) < _SHOWN_BAD_ROWS:
            self.examples.append(BadRow(row, text))
        reason = error.reason if isinstance(error, RowError) else text.partition(", got ")[0]
        reason = re.sub(r"\d{10,}", "a number", reason.partition("; ")[0])
        if reason not in self.reasons and len(self.reasons) >= _REASONS_SHOWN:
            reason = "something else"
        self.reasons[reason] += 1

    def report(self, unit: str) -> TableReport:
        """What was found so far, of rows that are numbered by this unit."""
        hints: list[str] = []
        times = [name for name, (low, _) in self.spans.items() if low > _MOST_OF_A_SCALE]
        spans = [span for name, span in self.spans.items() if name not in times]
        if times:
            hints.append(
                f"{times[0]} looks like times: time_column={times[0]!r} (or --time-column {times[0]})"
            )
        mostly_bad = self.bad >= self.good
        if mostly_bad and any("looks like seconds" in each.reason for each in self.examples):
            hints.append('times in seconds: try time_format="s" (or --time-format s)')
        elif mostly_bad and any(": not a time" in reason for reason in self.reasons):
            hints.append(
                'times in another form: say in which, as time_format="%d.%m.%Y %H:%M" '
                '(or --time-format "%d.%m.%Y %H:%M")'
            )
        elif _DAYS < self.newest < _LATE_1970 and self.good >= _SEVERAL:
            hints.append("all times lie in 1970: are they in milliseconds?")
        if (
            self.outside >= self.good
            and spans
            and min(high for _, high in spans) < max(high for _, high in spans) / 2
        ):
            shown = [
                f"{name} {low:g} to {high:g}"
                for name, (low, high) in list(self.spans.items())[:5]
                if name not in times
            ]
            hints.append(
                f"axes differ ({', '.join(shown)}): scales (or --scale AXIS=LOW:HIGH) says so for one of them"
            )
        if self.absent:
            texts = ",".join(sorted(self.absent))
            hints.append(f"where {texts} stands for nothing: absent (or --absent {texts})")
        return TableReport(
            good=self.good,
            bad=self.bad,
            unit=unit,
            examples=tuple(self.examples),
            reasons=dict(self.reasons.most_common()),
            span=(min(low for low, _ in spans), max(high for _, high in spans))
            if spans and self.outside >= self.good
            else None,
            hints=tuple(hints),
        )

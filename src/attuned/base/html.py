"""What notebooks show: states, histories, matches, stores and reports as HTML, and plots."""

from __future__ import annotations

import html
import itertools
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attuned.base.config import check_axis_names
from attuned.base.errors import (
    MissingDependencyError,
    ValidationError,
    brief,
    plural,
    short_id,
)
from attuned.base.values import NEUTRAL, Health, Match, StateSnapshot, distinct_users, iso_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# What Jupyter shows: HTML with inline styles alone, everything escaped, of a user id the first four
# characters; colours that can be read on a light and on a dark page.

_MOST_BARS = 64  # axes of a snapshot
_MOST_COLUMNS = 50  # snapshots of a history
_SHOWN_MATCHES = 50
_MOST_REASONS = 5  # axes of a match: those in which the query leans most
_BAR_WIDTH = 140  # pixels
MAX_PLOTTED = 1_000
_ABOVE, _BELOW = (59, 125, 216), (214, 111, 33)  # blue and orange: told apart by all kinds of eyes
FONT = "font-family:sans-serif;font-size:12px;line-height:1.3"
_CELL = "padding:1px 6px;text-align:left;border:none;white-space:nowrap"
_NUMBER = "font-variant-numeric:tabular-nums"
_ROW = "background:none"
TABLE = "border-collapse:collapse;font:inherit;color:inherit"


def _rgba(value: float) -> str:
    """The colour of a value in [0, 1]: none at neutral, full at the ends."""
    red, green, blue = _ABOVE if value > NEUTRAL else _BELOW
    return f"rgba({red},{green},{blue},{2 * abs(value - NEUTRAL):.2f})"


def element(tag: str, style: str, *contents: str, title: str = "") -> str:
    """An HTML element; its contents are HTML already, its title is not."""
    hint = f' title="{html.escape(title)}"' if title else ""
    return f'<{tag} style="{style}"{hint}>{"".join(contents)}</{tag}>'


def table_row(*cells: str) -> str:
    """A row of an HTML table."""
    return element("tr", _ROW, *(element("td", _CELL, cell) for cell in cells))


def _bar(value: float) -> str:
    """A bar from neutral, which is in the middle, to the value."""
    start, width = 100 * min(value, NEUTRAL), 100 * abs(value - NEUTRAL)
    colour = _ABOVE if value > NEUTRAL else _BELOW
    fill = f"position:absolute;top:0;height:100%;left:{start:.1f}%;width:{width:.1f}%;background:rgb{colour}"
    middle = "position:absolute;top:0;height:100%;left:50%;width:1px;background:currentColor;opacity:.6"
    box = f"position:relative;width:{_BAR_WIDTH}px;height:10px;background:rgba(128,128,128,.15)"
    return element("div", box, element("div", fill), element("div", middle))


def _heading(snapshot: StateSnapshot) -> str:
    facts = (iso_time(snapshot.updated_at_unix_ms), snapshot.source, f"confidence {snapshot.confidence:g}")
    return f"<b>{html.escape(short_id(snapshot.user_id))}</b> {html.escape(', '.join(facts))}"


def _more(count: int, noun: str) -> str:
    return element("div", "opacity:.7", f"and {count:,} more {noun}") if count > 0 else ""


def _scale(width: int) -> str:
    """The ends of a scale from 0 to 1, and neutral in its middle."""
    ends = "display:flex;justify-content:space-between;opacity:.7"
    return element("div", f"width:{width}px;{ends}", *(element("span", "", end) for end in ("0", "0.5", "1")))


def snapshot_html(snapshot: StateSnapshot) -> str:
    """A snapshot: its axes as bars around neutral."""
    rows = [
        table_row(html.escape(name), _bar(value), element("span", _NUMBER, f"{value:.3f}"))
        for name, value in itertools.islice(snapshot.axes.items(), _MOST_BARS)
    ]
    scale = table_row("", _scale(_BAR_WIDTH), "")
    shown = element("table", TABLE, *rows, scale) if rows else element("div", "", "no axes: neutral")
    return element("div", FONT, _heading(snapshot), shown, _more(len(snapshot.axes) - len(rows), "axes"))


def _names_in(history: Iterable[StateSnapshot], order: Iterable[str] = ()) -> list[str]:
    """The axes that snapshots have, in this order, then in theirs."""
    there = dict.fromkeys(name for snapshot in history for name in snapshot.axes)
    return list(dict.fromkeys([*(name for name in order if name in there), *there]))


def _history_html(history: Sequence[StateSnapshot]) -> str:
    """Snapshots as a heat map: a row for each axis, a column for each snapshot, the newest at the right.

    The title of a cell tells its value; without one it has no colour.
    """
    shown = history[:_MOST_COLUMNS][::-1]
    if not shown:
        return element("div", FONT, "<b>no history</b>")
    rows = list[str]()
    for name in _names_in(history)[:_MOST_BARS]:
        cells = [element("td", _CELL, html.escape(name))]
        for each in shown:
            said = f"{each.axes[name]:.3f}" if name in each.axes else "no value"
            title = f"{iso_time(each.updated_at_unix_ms)}, {each.source}, {each.confidence:g}: {said}"
            colour = f"padding:0;border:none;min-width:12px;height:12px;background:{_rgba(each.axis(name))}"
            cells.append(element("td", colour, title=title))
        rows.append(element("tr", _ROW, *cells))
    users = html.escape(", ".join(map(short_id, distinct_users(shown))))
    first, last = (iso_time(shown[end].updated_at_unix_ms) for end in (0, -1))
    facts = f"<b>{users}</b> {plural(len(shown), 'snapshot')}, from {first} at the left to {last}"
    older = _more(len(history) - len(shown), "older snapshots")
    colours = ", ".join(_rgba(part / 4) for part in range(5))
    gradient = (
        f"width:{_BAR_WIDTH}px;height:8px;margin-top:4px;background:linear-gradient(to right, {colours})"
    )
    scale = element("div", gradient) + _scale(_BAR_WIDTH)
    return element("div", FONT, facts, element("table", TABLE, *rows), scale, older)


class History(list[StateSnapshot]):
    """What get_history returns: a list, which a notebook shows as a heat map.

    It equals a list of the same snapshots, and what is pickled or copied of it is a plain list.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[type[list[StateSnapshot]], tuple[list[StateSnapshot]]]:
        return list, (self[:],)

    def _repr_html_(self) -> str:
        return _history_html(self)


def _reason(axes: Mapping[str, float], name: str) -> str:
    """A value of a match as a coloured cell with its number."""
    value = axes.get(name)
    colour = f"{_CELL};{_NUMBER};background:{_rgba(NEUTRAL if value is None else value)}"
    return element("td", colour, "" if value is None else f"{value:.2f}")


def _matches_html(matches: Matches) -> str:
    """Matches as rows below what was asked for, with the axes in which that leans most."""
    if not matches:
        return element("div", FONT, "<b>no match</b>")
    shown, asked = matches[:_SHOWN_MATCHES], matches.query
    leaning = sorted(asked, key=lambda name: -abs(asked[name] - NEUTRAL))
    names = leaning[:_MOST_REASONS] or _names_in(match.snapshot for match in shown)[:_MOST_REASONS]
    titles = ("score", "user", "time", "source", *names)
    rows = [element("tr", _ROW, *(element("td", _CELL, f"<b>{html.escape(title)}</b>") for title in titles))]
    if asked:
        cells = (element("td", _CELL, text) for text in ("", "asked for", "", ""))
        rows.append(element("tr", _ROW, *cells, *(_reason(asked, name) for name in names)))
    for match in shown:
        state = match.snapshot
        facts = (
            f"{match.score:.4f}",
            short_id(state.user_id),
            iso_time(state.updated_at_unix_ms),
            state.source,
        )
        cells = (element("td", f"{_CELL};{_NUMBER}", html.escape(fact)) for fact in facts)
        rows.append(element("tr", _ROW, *cells, *(_reason(state.axes, name) for name in names)))
    more = _more(len(asked) - len(names), "axes") + _more(len(matches) - len(shown), "matches")
    return element("div", FONT, element("table", TABLE, *rows), more)


class Matches(list[Match]):
    """What search_similar returns: a list, which a notebook shows beside ``query``, the axes asked for.

    It equals a list of the same matches, and what is pickled or copied of it is a plain list.
    """

    __slots__ = ("query",)

    def __init__(self, matches: Iterable[Match] = (), query: Mapping[str, float] | None = None) -> None:
        super().__init__(matches)
        self.query: Mapping[str, float] = {} if query is None else query

    def __reduce__(self) -> tuple[type[list[Match]], tuple[list[Match]]]:
        return list, (self[:],)

    def _repr_html_(self) -> str:
        return _matches_html(self)


def facts_html(title: str, facts: Mapping[str, object]) -> str:
    """What there is to say of one thing, a row each; what is None or empty is left out."""
    rows = [
        table_row(name, html.escape(f"{fact:,}" if isinstance(fact, int) else str(fact)))
        for name, fact in facts.items()
        if fact not in (None, "")
    ]
    return element("div", FONT, f"<b>{html.escape(title)}</b>", element("table", TABLE, *rows))


def store_html(store: Any, health: Health | None) -> str:
    """A store: where it is, how it is and how much it holds; ``health`` None where nobody asked."""
    facts: dict[str, object] = {
        "place": "" if store.engine == "memory" else store.location,
        "engine": store.engine,
    }
    if store.is_closed:
        facts["health"] = "closed"
    elif health is None:
        facts["health"] = "not asked: await store.health()"
    else:
        facts |= {"health": health.status, "users": health.users, "points": health.points}
        facts |= {"server": health.version, "message": health.message}
    return facts_html(type(store).__name__, facts)


def plot_states(history: Sequence[StateSnapshot], axes: Iterable[str] | None, known: Sequence[str]) -> Any:
    """Each axis as a line of its own, one below the other: its steps through time, around neutral.

    ``axes`` are those to plot, of those that the store knows; None for all that there is anything of.
    """
    if axes is None:
        names = _names_in(history, known) or list(known)
    else:
        names = list(check_axis_names(axes) or ())
        for name in names:
            if name not in known:
                raise ValidationError(f"axes: the store has no axis {brief(name)}; it has {', '.join(known)}")
    try:  # not import statements, at which a type checker would want matplotlib wherever this file is copied
        pyplot: Any = import_module("matplotlib.pyplot")
        dates: Any = import_module("matplotlib.dates")
    except ImportError as error:
        raise MissingDependencyError("plotting needs matplotlib: pip install matplotlib") from error
    entries = history[::-1]
    times = [datetime.fromtimestamp(each.updated_at_unix_ms / 1000, UTC) for each in entries]
    held = (times[-1] - times[0]) * 0.04 or timedelta(hours=1)  # what the last state is drawn for
    height = max(0.34, 0.7 - 0.04 * len(names))  # few axes get more room each
    _, plot = pyplot.subplots(figsize=(9, 1.0 + height * len(names)), layout="constrained")
    for row, name in enumerate(names):
        _plot_axis(plot, row, [*times, times[-1] + held], [each.axis(name) for each in entries])
    plot.set_yticks(range(len(names)), names)
    plot.set_ylim(len(names) - 0.4, -0.6)
    plot.set_xlim(times[0], times[-1] + held)
    plot.xaxis.set_major_formatter(dates.ConciseDateFormatter(plot.xaxis.get_major_locator(), tz=UTC))
    title = f"{short_id(history[0].user_id)}, values from 0 to 1 around neutral 0.5, times in UTC"
    plot.set_title(title, loc="left", fontsize="medium")
    plot.spines[["top", "right", "left"]].set_visible(False)
    plot.tick_params(axis="y", length=0)
    return plot


def _plot_axis(plot: Any, row: int, times: Sequence[datetime], values: Sequence[float]) -> None:
    """One axis: filled above neutral in one colour and below in the other, a dot at each snapshot."""
    heights = [0.9 * (value - NEUTRAL) for value in [*values, values[-1]]]
    for colour, part in ((_ABOVE, max), (_BELOW, min)):
        edge = [row - part(height, 0.0) for height in heights]  # rows are counted downwards
        fill = [channel / 255 for channel in colour]
        plot.fill_between(times, row, edge, step="post", color=fill, alpha=0.55, linewidth=0)
    plot.axhline(row, color="gray", linewidth=0.6)
    dots = [row - height for height in heights[:-1]]
    plot.plot(times[:-1], dots, ".", color="gray", markersize=3)
    at_the_right = plot.get_yaxis_transform()
    plot.text(1.01, row, f"{values[-1]:.2f}", transform=at_the_right, va="center", fontsize="small")

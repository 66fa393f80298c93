"""What `python -m bench` makes of its figures: tables, a chart, parts of two pages, and a comparison.

It needs the standard library alone, save for the chart.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
TABLE = HERE / "RESULTS.md"
CHART = HERE / "curves.svg"
README = HERE.parent / "README.md"
PAGE = HERE.parent / "docs" / "benchmarks.md"

WORSE = 1.3
_BEGIN, _END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"
_OURS = ("attuned memory", "attuned edge", "attuned local", "attuned server")
_SHOWN_USERS = 10_000
_ORDER = (
    "write",
    "write, cold",
    "write, latest alone",
    "write, 8 threads",
    "write, 64 tasks",
    "read, hot",
    "read, cold",
    "read, 8 threads",
    "read, 64 tasks",
    "history of 10, hot",
    "history of 10, cold",
    "search within a user",
    "search over all",
    "opening",
    "bytes on disk per user",
)

Results = dict[str, Any]
_Ratios = dict[tuple[Any, ...], float]


def load(path: Path = RESULTS) -> Results | None:
    return json.loads(path.read_text("utf-8")) if path.exists() else None


# -----------------------------------------------------------------------------
# Figures as text
# -----------------------------------------------------------------------------


def shown(figure: float, unit: str) -> str:
    """A figure with three digits and a unit that suits it: 1.23 µs, 45.6 ms, 1,230 B."""
    if unit == "B":
        return f"{_digits(figure)} B"
    for scale, name in ((1e-6, "µs"), (1e-3, "ms")):
        if figure < 999.5 * scale:
            return f"{_digits(figure / scale)} {name}"
    return f"{_digits(figure)} s"


def _digits(figure: float) -> str:
    """Three digits, and no more after the point than they need."""
    if figure == 0:
        return "0"
    figure = float(f"{figure:.3g}")
    places = max(0, 2 - math.floor(math.log10(abs(figure))))
    return f"{figure:,.{places}f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{_digits(ratio)} x"


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _header(results: Results) -> str:
    machine, versions = results["machine"], results["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{results['date']}; {machine['cpu']}, {machine['cores']} cores; {libraries}."


# -----------------------------------------------------------------------------
# Races
# -----------------------------------------------------------------------------


def exponent(points: Mapping[int, float]) -> float | None:
    """How cost grows with the number of users: the slope of a line through the logarithms."""
    if len(points) < 2:
        return None
    users, figures = zip(*points.items(), strict=True)
    return statistics.linear_regression([*map(math.log, users)], [*map(math.log, figures)]).slope


def curves(results: Results, question: str, family: str) -> dict[str, dict[int, float]]:
    """The figures of every contender by number of users."""
    found: dict[str, dict[int, float]] = {}
    for race in results["races"]:
        if (race["question"], race["family"]) == (question, family):
            for name, figure in race["figures"].items():
                found.setdefault(name, {})[race["users"]] = figure
    return found


def questions(results: Results) -> list[tuple[str, str]]:
    """Every question with its family; what is not in the order of shown questions comes last."""
    asked = dict.fromkeys((race["question"], race["family"]) for race in results["races"])
    place = {question: position for position, question in enumerate(_ORDER)}
    return sorted(asked, key=lambda pair: place.get(pair[0], len(place)))


def _ratio_row(race: Mapping[str, Any], name: str) -> list[str]:
    """The ratios of a contender to the floor and to the best peer: of ours by rounds, of peers by medians."""
    if name in race["ratios"]:
        return [_times(race["ratios"][name].get(role)) for role in ("floor", "best peer")]
    figures = race["figures"]
    if name not in figures:
        return ["", ""]
    rivals = ("floor" if "floor" in figures else None), race["best peer"]
    return [_times(figures[name] / figures[rival] if rival else None) for rival in rivals]


def _races(results: Results, question: str, family: str) -> dict[int, Mapping[str, Any]]:
    return {
        race["users"]: race
        for race in results["races"]
        if (race["question"], race["family"]) == (question, family)
    }


def _reference(races: Mapping[int, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The race whose ratios are shown."""
    return races.get(_SHOWN_USERS) or races[max(races)]


def _race_rows(results: Results, sizes: Sequence[int]) -> Iterator[str]:
    for question, family in questions(results):
        races = _races(results, question, family)
        unit = next(iter(races.values()))["unit"]
        for name, points in curves(results, question, family).items():
            figures = [shown(points[users], unit) if users in points else "" for users in sizes]
            slope = exponent(points)
            growth = "" if slope is None else f"{slope:.2f}"
            bold = f"**{name}**" if name in _OURS else name
            yield _row([question, family, bold, *figures, growth, *_ratio_row(_reference(races), name)])


def _target_rows(results: Results) -> Iterator[str]:
    for target in results["targets"]:
        bound = (
            f"at most {target['most']:g}" if target["most"] is not None else f"at least {target['least']:g}"
        )
        verdict = "met" if is_met(target) else "**missed**"
        measured = f"{_digits(target['figure'])} {target['unit']}"
        yield _row([target["question"], bound, measured, verdict, target["note"]])


def is_met(target: Mapping[str, Any]) -> bool:
    if target["most"] is not None:
        return bool(target["figure"] <= target["most"])
    return bool(target["figure"] >= target["least"])


def table(results: Results) -> str:
    """RESULTS.md."""
    sizes = sorted({race["users"] for race in results["races"]})
    head = ["question", "family", "contender", *(f"{users:,} users" for users in sizes)]
    head += ["exponent", "to the floor", "to the best peer"]
    targets = "".join(_target_rows(results))
    return (
        "# Results\n\n"
        "Written by `python -m bench`; `README.md` beside it says what is measured and how.\n\n"
        f"{_header(results)}\n\n"
        "## Side by side\n\n"
        "Medians of one call (opening: of one opening). Ratios are of the same run, at "
        f"{_SHOWN_USERS:,} users where there were so many; the best peer is the quickest of the others. The "
        "exponent is that of the number of users, by which the cost grows. The floor is a dict, a Lock and a "
        "deque of 100, and for a search the product of a matrix.\n\n"
        f"{_row(head)}{_row(['---', '---', '---', *['--:'] * (len(head) - 3)])}"
        f"{''.join(_race_rows(results, sizes))}\n"
        "## Targets\n\n"
        f"{_row(['what', 'target', 'measured', '', 'medians'])}{_row(['---', '---', '--:', '---', '---'])}"
        f"{targets}"
    )


# -----------------------------------------------------------------------------
# Pages
# -----------------------------------------------------------------------------

_COLUMNS = (
    ("memory", "floor", "dict, Lock, deque"),
    ("memory", "attuned memory", "**memory**"),
    ("memory", "best peer", "best peer in memory"),
    ("embedded", "attuned edge", "**edge**"),
    ("embedded", "attuned local", "**local**"),
    ("embedded", "best peer", "best peer on disk"),
    ("remote", "attuned server", "**server**"),
    ("remote", "best peer", "bare qdrant-client, server"),
)


def _cell(results: Results, question: str, family: str, name: str) -> str:
    races = _races(results, question, family)
    if not races:
        return ""
    race = _reference(races)
    if name != "best peer":
        return shown(race["figures"][name], race["unit"]) if name in race["figures"] else ""
    peer = race["best peer"]
    if peer is None:
        return ""
    figure = shown(race["figures"][peer], race["unit"])
    return figure if family == "remote" else f"{figure} ({peer})"


_NOTHING = "`python -m bench` writes its figures here.\n"


def pages(results: Results | None) -> dict[Path, str]:
    """The pages that show figures, with what stands there between the markers."""
    return {README: readme_block(results), PAGE: page_block(results)}


def readme_block(results: Results | None) -> str:
    """What stands in README.md: what the calls cost that everybody makes."""
    if results is None:
        return _NOTHING
    questions = (
        ("a write takes", "write"),
        ("a repeated read", "read, hot"),
        ("a first read", "read, cold"),
    )
    said = []
    for words, question in questions:
        figures = [
            f"{figure} {where}"
            for family, name, where in (
                ("memory", "attuned memory", "in memory"),
                ("embedded", "attuned edge", "on edge"),
                ("embedded", "attuned local", "on local"),
                ("remote", "attuned server", "on a server"),
            )
            if (figure := _cell(results, question, family, name))
        ]
        if figures:
            said.append(f"{words} {', '.join(figures)}")
    measured = f"{results['machine']['cores']} cores, {results['date']}"
    return f"At {_SHOWN_USERS:,} users {'; '.join(said)} ({measured}).\n"


def page_block(results: Results | None) -> str:
    """What stands in docs/benchmarks.md."""
    if results is None:
        return _NOTHING
    asked = dict.fromkeys(question for question, _ in questions(results))
    head = ["", *(title for _, _, title in _COLUMNS)]
    rows = [
        _row([question, *(_cell(results, question, family, name) for family, name, _ in _COLUMNS)])
        for question in asked
    ]
    met = sum(map(is_met, results["targets"]))
    return (
        f"What one call costs at {_SHOWN_USERS:,} users, records of 24 axes, as the median of the rounds:\n\n"
        f"{_row(head)}{_row(['---', *['--:'] * len(_COLUMNS)])}{''.join(rows)}\n"
        f"Measured on {_header(results)} Of {len(results['targets'])} targets {met} are met; "
        "`bench/RESULTS.md` has them, all contenders, other numbers of users, and ratios.\n\n"
        "How cost grows with the number of users, with the exponent of each curve:\n\n"
        "![Cost of a call over the number of users](../bench/curves.svg)\n"
    )


def block_in(page: str) -> str:
    """What stands between the markers now."""
    return page.partition(_BEGIN)[2].partition(_END)[0]


def with_block(page: str, block: str) -> str:
    pattern = re.escape(_BEGIN) + ".*?" + re.escape(_END)
    found, number = re.subn(pattern, lambda _: _BEGIN + block + _END, page, count=1, flags=re.DOTALL)
    if not number:
        raise ValueError("the page has no markers for the benchmarks")
    return found


# -----------------------------------------------------------------------------
# Comparison with the run before
# -----------------------------------------------------------------------------


def _costs(results: Results) -> _Ratios:
    """Every ratio, such that less is better."""
    found: _Ratios = {}
    for race in results["races"]:
        for name, ratios in race["ratios"].items():
            for role, ratio in ratios.items():
                found[race["question"], race["users"], f"{name} to {role}"] = ratio
    for target in results["targets"]:
        figure = target["figure"] if target["most"] is not None else 1 / target["figure"]
        found[target["question"], target["unit"]] = figure
    return found


def what_became_worse(before: Results, now: Results) -> list[str]:
    """The ratios of now that are more than 30 % worse than those of the run before, worst first."""
    earlier = _costs(before)
    changes = {key: cost / earlier[key] for key, cost in _costs(now).items() if earlier.get(key)}
    worse = sorted(((change, key) for key, change in changes.items() if change > WORSE), reverse=True)
    return [f"{', '.join(map(str, key))}: {change:.2f} times the last" for change, key in worse]


# -----------------------------------------------------------------------------
# Chart
# -----------------------------------------------------------------------------

_PANELS = (
    "write",
    "read, cold",
    "history of 10, cold",
    "search within a user",
    "search over all",
    "opening",
)
_STYLES = {
    "attuned memory": ("tab:green", "-"),
    "attuned edge": ("tab:blue", "-"),
    "attuned local": ("tab:purple", "-"),
    "attuned server": ("tab:red", "-"),
    "floor": ("black", ":"),
    "bare edge": ("tab:blue", "--"),
    "bare qdrant-client local": ("tab:purple", "--"),
    "bare qdrant-client": ("tab:red", "--"),
    "SQLite WAL": ("tab:orange", "--"),
    "langgraph": ("tab:olive", "--"),
}


def _panel_curves(results: Results, question: str) -> dict[str, dict[int, float]]:
    """The curves of a panel; of the floor, which races in every family, the one beside memory."""
    found: dict[str, dict[int, float]] = {}
    for family in ("memory", "embedded", "remote"):
        for name, points in curves(results, question, family).items():
            if name in _STYLES:
                found.setdefault(name, points)
    return found


def draw(results: Results, path: Path = CHART) -> None:
    """The SVG: a panel a question, a curve a contender, its exponent in the legend."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "attuned_store", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(11, 8), sharex=True)
    for question, panel in zip(_PANELS, panels.flat, strict=True):
        for name, points in _panel_curves(results, question).items():
            color, line = _STYLES[name]
            slope = exponent(points)
            label = name if slope is None else f"{name} ({slope:.2f})"
            panel.loglog(
                *zip(*[(users, seconds * 1e6) for users, seconds in sorted(points.items())], strict=True),
                color=color,
                linestyle=line,
                marker=".",
                label=label,
            )
        panel.set_title(question)
        panel.set_ylabel("µs a call")
        panel.set_xlabel("users")
        panel.grid(visible=True, alpha=0.3)
        panel.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    figure.suptitle("Cost over the number of users (with the exponent)")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)

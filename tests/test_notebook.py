"""What a notebook shows, and that both forms of a store work in one."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conformance import NOW, Awaited, Case, needs, run_python, state
from test_import import BLOCK

from attuned_store import (
    CANONICAL_AXES,
    AsyncQdrantStore,
    History,
    Matches,
    MemoryStore,
    StateSnapshot,
    UserNotFoundError,
    ValidationError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conformance import Open

pytestmark = pytest.mark.once

NOTEBOOK = Path(__file__).parent / "data" / "everyday.ipynb"
TAGS = {"div", "b", "table", "tr", "td", "span"}


class Page(HTMLParser):
    """Checks that what is shown is balanced, of plain elements and styled inline, and gathers the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.titles: list[str] = []
        self.styles: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        found = dict(attrs)
        assert found.keys() <= {"style", "title"}
        self._open.append(tag)
        self.styles.append(found.get("style") or "")
        self.titles += filter(None, [found.get("title")])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def shown(value: Any) -> Page:
    return Page(value._repr_html_())


def bars(page: Page) -> list[tuple[float, float]]:
    """Where the bars begin and how long they are, in hundredths."""
    found = [re.search(r"left:([\d.]+)%;width:([\d.]+)%", style) for style in page.styles]
    return [(float(match[1]), float(match[2])) for match in found if match]


def test_a_snapshot_shows_its_axes_as_bars_around_neutral() -> None:
    """A notebook shows a snapshot with its time, its source and a bar for the value of each axis."""
    axes = {"warmth": 0.75, "formality": 0.25, "urgency_sensitivity": 0.5, "ritual_need": 0}
    page = shown(StateSnapshot("ann", axes, NOW, "inferred", 0.25))

    assert bars(page) == [(50.0, 25.0), (25.0, 25.0), (50.0, 0.0), (0.0, 50.0)]
    assert all(name in page.texts for name in axes)
    assert {"0.750", "0.250", "0.500", "0.000"} <= set(page.texts)
    assert "ann" in page.texts
    assert "2026-01-09T23:06:40.000Z, inferred, confidence 0.25" in page.text


def test_what_is_shown_is_escaped_and_the_user_id_is_cut() -> None:
    """Nothing in a snapshot can act in a notebook, and of a user id the first four characters are shown."""
    page = shown(StateSnapshot("<b>&<script>alert(1)</script>", {"warmth": 1}))

    assert "<b>&…" in page.texts
    assert "script" not in page.text
    assert "script" not in shown(History([state("<b>&<script>")])).text


def test_a_neutral_snapshot_and_one_of_many_axes_are_shown_too() -> None:
    """A snapshot without axes says that it is neutral, one with hundreds how many are not shown."""
    many = {f"axis_{number}": 0.5 for number in range(1000)}

    assert "neutral" in shown(StateSnapshot("ann", {})).text
    page = shown(StateSnapshot("ann", many))
    assert len(bars(page)) == 64
    assert "and 936 more axes" in page.text


def history_of(count: int) -> History:
    with MemoryStore(max_history_per_user=count) as store:
        for at in range(count):
            store.upsert_latest(state("somebody", at, {"warmth": at / count, "formality": 0.5}))
        found = store.get_history("somebody", count)
    assert isinstance(found, History)
    return found


def test_a_history_is_a_heat_map() -> None:
    """A notebook shows a history as a row for each axis and a column for each snapshot."""
    page = shown(history_of(4))

    assert {"warmth", "formality", "some…"} <= set(page.texts)
    values = [title.rpartition(": ")[2] for title in page.titles]
    assert values == ["0.000", "0.250", "0.500", "0.750", *["0.500"] * 4]
    times = "from 2026-01-09T23:06:40.000Z at the left to 2026-01-09T23:06:40.003Z"
    assert f"4 snapshots, {times}" in page.text


def test_a_long_history_says_how_much_is_not_shown() -> None:
    """A long history shows its newest fifty snapshots, and an empty one that there is none."""
    page = shown(history_of(120))

    assert len(page.titles) == 2 * 50
    assert "and 70 more older snapshots" in page.text
    assert "no history" in shown(History()).text


def test_matches_are_shown_beside_what_was_asked_for() -> None:
    """A notebook shows matches with their scores and with the axes in which the query leans most."""
    with MemoryStore() as store:
        store.upsert_latest(state("anna-lena", 0, {"warmth": 0.75, "formality": 0.25}))
        store.upsert_latest(state("bob", 0, {"warmth": 0.25}, source="inferred"))
        found = store.search_similar({"formality": 0.125, "ritual_need": 0.4, "warmth": 1})
    assert isinstance(found, Matches)
    page = shown(found)

    assert page.texts[:7] == ["score", "user", "time", "source", "warmth", "formality", "ritual_need"]
    assert page.texts[7:11] == ["asked for", "1.00", "0.12", "0.40"]
    first = page.texts[11:]
    assert first[:6] == [
        f"{found[0].score:.4f}",
        "anna…",
        "2026-01-09T23:06:40.000Z",
        "self_report",
        "0.75",
        "0.25",
    ]
    assert first[7:11] == ["bob", "2026-01-09T23:06:40.000Z", "inferred", "0.25"]
    coloured = [style for style in page.styles if "background:rgba" in style]
    assert len(coloured) == 9
    assert sum("rgba(59,125,216" in style for style in coloured) == 2  # above neutral
    assert found == list(found)
    assert type(pickle.loads(pickle.dumps(found))) is list  # noqa: S301 - our own
    assert "anna…" in shown(found[0]).texts
    assert "no match" in shown(Matches()).text


def test_many_matches_and_axes_say_how_many_are_not_shown() -> None:
    """Of many matches the best fifty are shown, and of many axes the five in which the query leans most."""
    with MemoryStore() as store:
        store.upsert_many(state(f"user{number}", 0, {"warmth": 0.75}) for number in range(60))
        query = {name: 0.5 + number / 100 for number, name in enumerate(CANONICAL_AXES)}
        page = shown(store.search_similar(query, limit=60))

    assert "and 18 more axes" in page.text
    assert "and 10 more matches" in page.text
    assert page.texts[4] == CANONICAL_AXES[-1]


def test_health_and_reports_are_tables(tmp_path: Path) -> None:
    """A notebook shows what health found, and what became of a snapshot, without what is unknown."""
    with MemoryStore(axes=["warmth", "calm"]) as store:
        store.upsert_latest(state("ann", 0, {"warmth": 0.75}))
        health = shown(store.health())
        report = store.create_snapshot(tmp_path)
    assert health.texts[0] == "Health"
    facts = dict(zip(health.texts[1::2], health.texts[2::2], strict=True))
    assert (facts["status"], facts["users"]) == ("healthy", "1")
    assert "version" not in facts

    page = shown(report)
    facts = dict(zip(page.texts[1::2], page.texts[2::2], strict=True))
    assert page.texts[0] == "SnapshotReport"
    assert (facts["status"], facts["axes"], facts["path"]) == ("completed", "warmth, calm", str(report.path))
    assert facts["created_at"].endswith("Z")
    assert "message" not in facts


def test_a_scale_says_what_colours_and_bars_mean() -> None:
    """Below bars and heat maps stands the scale, from 0 over neutral to 1."""
    for value in (history_of(3), state("ann")):
        page = shown(value)
        at = page.texts.index("0.5")
        assert page.texts[at - 1 : at + 2] == ["0", "0.5", "1"]
    assert sum("linear-gradient" in style for style in shown(history_of(3)).styles) == 1


def test_a_history_is_a_list() -> None:
    """What get_history returns is a list to whoever uses it, and a plain one once copied or pickled."""
    history = history_of(3)
    plain = list(history)

    assert isinstance(history, list)
    assert (history, repr(history)) == (plain, repr(plain))
    assert (history[0], history[1:], history + history) == (plain[0], plain[1:], plain + plain)
    for copied in (pickle.loads(pickle.dumps(history)), copy.copy(history), copy.deepcopy(history)):  # noqa: S301
        assert type(copied) is list
        assert copied == plain
    assert b"History" not in pickle.dumps(history)


@pytest.mark.anyio
class TestStores:
    async def test_a_store_shows_place_health_and_counts(self, case: Case, open_store: Open) -> None:
        """A notebook shows what a store is, where and how it is and how much it holds."""
        store = await open_store()
        await store.upsert_many([state("ann"), state("bob"), state("bob", 1)])

        page = shown(store.store if isinstance(store, Awaited) else store)

        kind = "MemoryStore" if case.backend == "memory" else "QdrantStore"
        assert page.texts[0] == ("" if case.face == "sync" else "Async") + kind
        facts = dict(zip(page.texts[1::2], page.texts[2::2], strict=False))
        assert facts["engine"] == ("server" if case.backend == "real" else case.backend)
        if case.backend in ("server", "real") and case.face != "sync":
            assert facts["health"] == "not asked: await store.health()"
        else:
            assert (facts["health"], facts["users"], facts["points"]) == ("healthy", "2", "5")
        if case.backend != "memory":
            assert facts["place"].startswith(("http://", "/"))

        await store.aclose()
        closed = shown(store.store if isinstance(store, Awaited) else store)
        assert "closed" in closed.texts


@needs("qdrant_edge")
def test_a_store_that_is_not_open_yet_is_shown(tmp_path: Path) -> None:
    """An asynchronous store that nobody has awaited is shown with its place, and not opened by that."""
    path = tmp_path / "<b>bold"

    page = shown(AsyncQdrantStore(path=path))

    assert "not asked: await store.health()" in page.texts
    assert any("<b>bold" in text for text in page.texts)
    assert not path.exists()


# ------------------------------------------------------------------------------
# Plots
# ------------------------------------------------------------------------------


@pytest.fixture
def plt() -> Iterator[Any]:
    """The plotting library, drawing into memory."""
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib, the extra [notebook]")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    yield plt
    plt.close("all")


def labels(plot: Any) -> list[str]:
    return [label.get_text() for label in plot.get_yticklabels()]


@pytest.mark.anyio
class TestPlots:
    backends = ("memory", "edge")

    async def test_each_axis_has_a_line_of_its_own(self, plt: Any, open_store: Open) -> None:
        """plot_history draws every axis that there are values of, in the order of the store."""
        store = await open_store()
        for at in range(5):
            await store.upsert_latest(state("somebody", at * 1000, dict.fromkeys(CANONICAL_AXES, at / 8)))

        plot = await store.plot_history("somebody")
        plot.figure.canvas.draw()

        assert labels(plot) == list(CANONICAL_AXES)
        assert [text.get_text() for text in plot.texts] == ["0.50"] * 23
        assert "some…" in plot.get_title(loc="left")
        assert "someb" not in plot.get_title(loc="left")
        boxes = [label.get_window_extent() for label in plot.get_yticklabels()]
        assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes))

    async def test_axes_can_be_chosen(self, plt: Any, open_store: Open) -> None:
        """plot_history draws the axes that are named, from above to below; one the store lacks is refused."""
        store = await open_store()
        await store.upsert_latest(state("ann"))

        assert labels(await store.plot_history("ann", ["formality", "anxiety_level"])) == [
            "formality",
            "anxiety_level",
        ]
        assert labels(await store.plot_history("ann")) == ["warmth", "formality"]
        with pytest.raises(ValidationError, match="the store has no axis 'colour'"):
            await store.plot_history("ann", ["colour"])
        with pytest.raises(UserNotFoundError):
            await store.plot_history("bob")

    async def test_without_a_history_the_latest_is_drawn(self, plt: Any, open_store: Open) -> None:
        """Where a store keeps no history, the latest state is drawn."""
        store = await open_store(enable_history=False)
        await store.upsert_latest(state("ann", axes={"warmth": 0.75}))
        await store.upsert_latest(state("bob", axes={}))

        plot = await store.plot_history("ann")

        assert (labels(plot), [text.get_text() for text in plot.texts]) == (["warmth"], ["0.75"])
        assert labels(await store.plot_history("bob")) == list(CANONICAL_AXES)


def test_the_steps_are_where_the_snapshots_are(plt: Any) -> None:
    """A value is drawn from the time of its snapshot to that of the next, above or below neutral."""
    store = MemoryStore()
    store.upsert_latest(state("ann", 0, {"warmth": 1}))
    store.upsert_latest(state("ann", 1000, {"warmth": 0}))

    plot = store.plot_history("ann")

    from matplotlib.dates import date2num

    first, second = (date2num(datetime.fromtimestamp((NOW + at) / 1000, UTC)) for at in (0, 1000))
    above, below = (fill.get_paths()[0].vertices.tolist() for fill in plot.collections)
    assert {(x, y) for x, y in above if x <= second} >= {(first, -0.45), (second, -0.45)}
    assert max(y for _, y in below) == pytest.approx(0.45)
    assert min(x for x, y in below if y > 0) == second


def test_plotting_without_matplotlib_says_what_to_install() -> None:
    """Without matplotlib, plotting is one error that says what to install."""
    code = (
        "import attuned_store as a\n"
        "store = a.MemoryStore()\nstore.patch('ann', {'warmth': 0.5})\n"
        "try:\n    store.plot_history('ann')\nexcept a.MissingDependencyError as error:\n    print(error)"
    )
    answer = run_python(BLOCK + code, "matplotlib")

    assert (answer.returncode, answer.stdout) == (
        0,
        "plotting needs matplotlib: pip install matplotlib\n",
    ), answer.stderr


# ------------------------------------------------------------------------------
# A notebook
# ------------------------------------------------------------------------------

EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
place = {"metadata": {"path": sys.argv[2]}}
NotebookClient(notebook, timeout=120, kernel_name="python3", resources=place).execute()
nbformat.write(notebook, sys.argv[3])
"""


@pytest.mark.once
@needs("nbclient", "ipykernel", "matplotlib", "pandas")
def test_a_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook both forms of a store work, await at the top level included, and show themselves."""
    for variable in (
        "IPYTHONDIR",
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "MPLCONFIGDIR",
    ):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    executed = tmp_path / "executed.ipynb"

    answer = run_python(EXECUTE, NOTEBOOK, tmp_path, executed)

    assert answer.returncode == 0, answer.stderr
    cells = [cell for cell in json.loads(executed.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    pages = [
        "".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {})
    ]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert printed == "8 2\n['warmth', 'formality']\n"
    assert sum("<b>MemoryStore</b>" in page for page in pages) == 1
    assert sum("<b>AsyncQdrantStore</b>" in page for page in pages) == 1
    assert sum("at the left" in page for page in pages) == 1
    assert sum("dataframe" in page for page in pages) == 1
    assert len(pages) == 5
    assert len(pictures) == 1


def test_the_notebook_is_kept_without_its_outputs() -> None:
    """The notebook in the tests is kept as it is written: without outputs."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)

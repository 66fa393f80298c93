"""bench/: what is reported is what was recorded. The benchmarks themselves are not run here."""

from __future__ import annotations

import ast
import copy
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "bench" / "report.py"))


def race(users: int, seconds: float, ratio: float) -> dict[str, Any]:
    return {
        "question": "write",
        "family": "memory",
        "users": users,
        "unit": "s",
        "figures": {"attuned memory": seconds, "floor": 1e-6, "langgraph": 8e-6},
        "best peer": "langgraph",
        "ratios": {"attuned memory": {"floor": ratio, "best peer": ratio / 8}},
    }


def target(figure: float, most: float | None, least: float | None) -> dict[str, Any]:
    return {
        "question": "a target",
        "figure": figure,
        "unit": "x floor" if most else "times as fast",
        "most": most,
        "least": least,
        "note": "",
    }


RESULTS: dict[str, Any] = {
    "date": "2026-01-17",
    "machine": {"cpu": "some processor", "cores": 2},
    "versions": {"Python": "3.11.0"},
    "races": [race(1_000, 2e-6, 2.0), race(10_000, 4e-6, 4.0)],
    "targets": [target(1.5, 2.0, None), target(3.0, None, 4.0)],
}


def test_the_pages_show_the_last_recorded_run(report: dict[str, Any]) -> None:
    """Every figure of the benchmarks in README.md and in docs/benchmarks.md comes from bench/results.json."""
    blocks = report["pages"](report["load"]())
    assert {path.relative_to(ROOT).as_posix() for path in blocks} == {"README.md", "docs/benchmarks.md"}
    for path, block in blocks.items():
        assert report["block_in"](path.read_text("utf-8")) == block


def test_the_table_is_of_the_last_recorded_run(report: dict[str, Any]) -> None:
    """bench/RESULTS.md comes from bench/results.json, and is there when that is."""
    results = report["load"]()
    assert report["TABLE"].exists() == report["CHART"].exists() == (results is not None)
    if results is not None:
        assert report["TABLE"].read_text("utf-8") == report["table"](results)


def test_the_block_is_replaced_alone(report: dict[str, Any]) -> None:
    """Recording a run changes a page between the markers and nowhere else."""
    readme = "before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n"
    changed = report["with_block"](readme, "new \\1\n")
    assert changed == readme.replace("old", "new \\1")
    assert report["block_in"](changed) == "new \\1\n"
    with pytest.raises(ValueError, match="no markers"):
        report["with_block"]("nothing", "new")


def test_the_tables_show_medians_ratios_and_targets(report: dict[str, Any]) -> None:
    """The table has a row a contender with medians, growth and ratios, and a row a target with a verdict."""
    lines = report["table"](RESULTS).splitlines()
    assert "| write | memory | **attuned memory** | 2.00 µs | 4.00 µs | 0.30 | 4.00 x | 0.500 x |" in lines
    assert "| write | memory | langgraph | 8.00 µs | 8.00 µs | 0.00 | 8.00 x | 1.00 x |" in lines
    assert "| a target | at most 2 | 1.50 x floor | met |  |" in lines
    assert "| a target | at least 4 | 3.00 times as fast | **missed** |  |" in lines
    assert "Of 2 targets 1 are met" in report["page_block"](RESULTS)
    assert "a write takes 4.00 µs in memory (2 cores" in report["readme_block"](RESULTS)


def test_what_became_worse_is_told(report: dict[str, Any]) -> None:
    """A ratio more than 30 % worse than in the run before is reported, a better one is not."""
    worse, now = report["what_became_worse"], copy.deepcopy(RESULTS)
    assert worse(RESULTS, now) == []
    now["races"][1]["ratios"]["attuned memory"] = {"floor": 5.3, "best peer": 0.2}
    now["targets"][1]["figure"] = 1.5
    assert worse(RESULTS, now) == [
        "a target, times as fast: 2.00 times the last",
        "write, 10000, attuned memory to floor: 1.32 times the last",
    ]


@pytest.mark.parametrize(
    ("figure", "text"), [(1.234e-7, "0.123 µs"), (9.996e-4, "1.00 ms"), (0.0456, "45.6 ms"), (2.5, "2.50 s")]
)
def test_a_figure_has_three_digits(report: dict[str, Any], figure: float, text: str) -> None:
    """Times are shown with three digits and the unit that suits them."""
    assert report["shown"](figure, "s") == text


def test_the_program_whose_memory_is_measured_runs(tmp_path: Path) -> None:
    """It stands in a string, where no type checker reads it."""
    tree = ast.parse((ROOT / "bench" / "bench_snapshots.py").read_text("utf-8"))
    (program,) = (
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "LARGE"
        and isinstance(node.value, ast.Constant)
    )
    command = [sys.executable, "-c", str(program), "200", str(tmp_path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)

    assert int(run.stdout) > 1_000
    assert len(list(tmp_path.glob("*.attuned"))) == 1

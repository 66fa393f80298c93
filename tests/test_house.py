"""The house is in order: modules with one subject each, nothing written twice, nothing loaded for nothing."""

from __future__ import annotations

import ast
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

SOURCE = Path(__file__).resolve().parent.parent / "src"
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.read_text("utf-8").strip())
ALIKE = 6  # lines
LONGER = {
    "attuned/stores.py": 850
}  # lines: every public method stands there twice, one line and its documentation


def functions(tree: ast.Module) -> list[tuple[str, list[str]]]:
    """The functions of a module by name and line, with the lines of their bodies, without the docstring.

    One that is defined within another is a part of that.
    """
    found = list[tuple[str, list[str]]]()
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
        else:
            body = node.body[ast.get_docstring(node) is not None :]
            lines = [line.strip() for statement in body for line in ast.unparse(statement).splitlines()]
            found.append(
                (f"{node.name}:{node.lineno}", [line for line in lines if line not in {"...", "pass"}])
            )
    return found


def repeated(sources: dict[str, str]) -> list[str]:
    """The pairs of functions that have so many lines in a row alike."""
    runs = defaultdict[tuple[str, ...], set[str]](set)
    for name, source in sources.items():
        for function, lines in functions(ast.parse(source)):
            for start in range(len(lines) - ALIKE + 1):
                runs[tuple(lines[start : start + ALIKE])].add(f"{name}:{function}")
    return sorted({f"{one} ~ {other}" for places in runs.values() for one, other in pairwise(sorted(places))})


def test_no_two_functions_share_six_lines() -> None:
    """What is done twice is written once."""
    sources = {path.relative_to(SOURCE).as_posix(): path.read_text("utf-8") for path in MODULES}
    assert repeated(sources) == []


def test_functions_that_share_six_lines_are_found() -> None:
    """Two functions of which six lines in a row are alike are found, whatever stands around them."""
    lines = "\n".join(f"    value{number} = {number} + one" for number in range(ALIKE))
    one, other = (
        f"def one(one):\n{lines}\n",
        f"async def other(one):\n    print(one)\n{lines}\n    return one\n",
    )
    assert repeated({"a.py": one, "b.py": other}) == ["a.py:one:1 ~ b.py:other:1"]
    assert repeated({"a.py": one, "b.py": other.replace("3 + one", "4 + one")}) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_module_has_one_subject(path: Path) -> None:
    """The first sentence of a module tells its subject, and it has at most some 700 lines."""
    text = path.read_text("utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert docstring.split("\n")[0].rstrip().endswith((".", ":", "..."))
    assert text.count("\n") <= LONGER.get(path.relative_to(SOURCE).as_posix(), 700)

"""The command for the tests, in this process and as a program: of the checkout, or of the wheel."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ROOT = Path(__file__).resolve().parent.parent
_INSTALLED = "ATTUNED_TEST_WHEEL" in os.environ

PACKAGE = "attuned_store.cli" if _INSTALLED else "attuned.cli"
PROGRAM = (sys.executable, "-m", "attuned_store" if _INSTALLED else "attuned.cli")
main = cast("Callable[[Sequence[str] | None], int]", import_module(PACKAGE).main)


def module(name: str) -> Any:
    """A module of the command."""
    return import_module(f"{PACKAGE}.{name}")


def environment(**variables: str) -> dict[str, str]:
    """What a process of its own finds the library and the command by."""
    folders = [] if _INSTALLED else [str(_ROOT), str(_ROOT / "src")]
    path = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **variables}

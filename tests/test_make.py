"""src/make.py makes one file of many modules, and refuses what would mean something else in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "src"))

from make import Imported, SourceError, import_lines, make, refresh  # noqa: E402

PACKAGE = '"""What the file is."""\n\n__version__ = "1.2.3"\n\n__all__ = []\n'
FUTURE = "from __future__ import annotations\n\n"


def written(repository: Path, files: dict[str, str]) -> Path:
    """Write a source of these files, with what each must begin with, and return its folder."""
    root = repository / "src" / "attuned"
    shutil.rmtree(root, ignore_errors=True)
    for name, text in {"__init__.py": PACKAGE, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.name == "__init__.py" or "__future__" in text
        path.write_text(("" if begun else FUTURE) + dedent(text).strip("\n") + "\n")
    return root


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *arguments],  # not the file of the folder this runs in
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


WHOLE = {
    "__init__.py": '''
        """What the file is.

        >>> describe(Point(1, 2))
        'Point 1, 2 of 1.2.3'
        """

        from __future__ import annotations

        from typing import TYPE_CHECKING

        if TYPE_CHECKING:
            from attuned.base.points import Point
            from attuned.stores import describe

        __version__ = "1.2.3"

        # What is public.
        __all__ = ["Point", "describe"]
        ''',
    "base/__init__.py": '"""What everything stands on."""\n',
    "base/zero.py": '''
        """The origin."""

        from __future__ import annotations

        # Nothing is further down.
        ZERO = 0  # as everywhere
        ''',
    "base/points.py": '''
        """Points.

        A point is where two lines meet.
          Indented, as it was.
        """

        from __future__ import annotations

        import sys
        from collections.abc import Iterator
        from typing import TYPE_CHECKING

        import attrs

        # This comment speaks of the import.
        from attuned.base.zero import ZERO

        if TYPE_CHECKING:
            from collections.abc import Mapping
            from decimal import Decimal

            import numpy as np

            from attuned.stores import describe

        # A comment of its own.


        @attrs.frozen
        class Point(Iterator[int]):
            """A point."""

            x: int = ZERO
            y: int | np.ndarray[int] | Mapping[str, Decimal] = ZERO  # up

            def __next__(self) -> int:
                """Upward."""
                from attuned.stores import describe

                return len(describe(self))


        if sys.platform == "win32":

            def separator() -> str:
                return "\\\\"

        else:

            def separator() -> str:
                return "/"
        ''',
    "engines/waist.py": "",
    "stores.py": """
        from __future__ import annotations

        from typing import TYPE_CHECKING

        from attuned import __version__
        from attuned.base.points import Point

        if TYPE_CHECKING:
            from collections.abc import Iterator


        def describe(point: Point, more: Iterator[Point] | None = None) -> str:
            # Up and down.
            from json import dumps

            from attuned.base.points import separator

            return f"{type(point).__name__} {dumps(point.x)},{separator()[1:]} {point.y} of {__version__}"
        """,
    "cli/main.py": "import rich\n",
    "__main__.py": "from attuned.cli import main\n",
}

RULE = "# " + "-" * 108

MADE = f'''"""What the file is.

>>> describe(Point(1, 2))
'Point 1, 2 of 1.2.3'
"""

# Made by src/make.py from src/attuned: edit there.

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

try:
    import attrs
except ImportError as error:
    raise ImportError("attuned_store needs attrs and cachetools: pip install attrs cachetools") from error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from decimal import Decimal

    import numpy as np

__version__ = "1.2.3"

# What is public.
__all__ = ["Point", "describe"]


{RULE}
# attuned.base
# What everything stands on.
{RULE}


{RULE}
# attuned.base.zero
# The origin.
{RULE}


# Nothing is further down.
ZERO = 0  # as everywhere


{RULE}
# attuned.base.points
# Points.
#
# A point is where two lines meet.
#   Indented, as it was.
{RULE}


# A comment of its own.


@attrs.frozen
class Point(Iterator[int]):
    """A point."""

    x: int = ZERO
    y: int | np.ndarray[int] | Mapping[str, Decimal] = ZERO  # up

    def __next__(self) -> int:
        """Upward."""
        return len(describe(self))


if sys.platform == "win32":

    def separator() -> str:
        return "\\\\"

else:

    def separator() -> str:
        return "/"


{RULE}
# attuned.stores
{RULE}


def describe(point: Point, more: Iterator[Point] | None = None) -> str:
    # Up and down.
    from json import dumps

    return f"{{type(point).__name__}} {{dumps(point.x)}},{{separator()[1:]}} {{point.y}} of {{__version__}}"


if __name__ == "__main__":
    sys.stderr.write(
        'This file is the library. For the command: pip install "attuned-store[cli]", '
        "then attuned-store or python -m attuned_store\\n"
    )
    sys.exit(2)
'''


def test_the_whole_file(tmp_path: Path) -> None:
    """Head, order, banners, comments, docstrings and end are as they should be, to the character."""
    assert make(written(tmp_path, WHOLE)) == MADE


def test_the_made_file_means_what_the_source_does(tmp_path: Path) -> None:
    """The same calls have the same results, through the source and through the made file."""
    written(tmp_path, WHOLE)
    refresh(tmp_path)
    calls = "print(describe(Point(1, 2)), next(Point(3)), Point(), separator())"
    joined = run(
        "-c",
        f"from attuned_store import *\nfrom attuned_store import separator\n{calls}",
        PYTHONPATH=str(tmp_path),
    )
    imports = "from attuned.base.points import Point, separator\nfrom attuned.stores import describe"
    apart = run("-c", f"{imports}\n{calls}", PYTHONPATH=str(tmp_path / "src"))
    assert apart.stdout == joined.stdout == "Point 1, 2 of 1.2.3 19 Point(x=0, y=0) /\n", (
        joined.stderr + apart.stderr
    )


def test_the_made_file_as_a_script(tmp_path: Path) -> None:
    """Run as a script, the file says in one line how to get the command."""
    written(tmp_path, WHOLE)
    refresh(tmp_path)
    ran = run(tmp_path / "attuned_store.py")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1
    assert 'pip install "attuned-store[cli]"' in ran.stderr


def test_the_guard(tmp_path: Path) -> None:
    """Without attrs the import of the file says what to install."""
    written(tmp_path, WHOLE)
    refresh(tmp_path)
    ran = run("-I", "-S", tmp_path / "attuned_store.py")  # no site-packages
    assert ran.returncode == 1
    assert ran.stderr.endswith("attuned_store needs attrs and cachetools: pip install attrs cachetools\n")


@pytest.mark.skipif(shutil.which("ruff") is None, reason="ruff is in the lint environment")
def test_the_made_file_is_formatted(tmp_path: Path) -> None:
    """The formatter and the sorter of imports have nothing to change."""
    written(tmp_path, {**WHOLE, "base/more.py": CUTS})
    refresh(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for command in (["format", "--check"], ["check", "--select", "I,D202,E,F401,W", "--no-cache"]):
        ran = subprocess.run(
            ["ruff", *command, "attuned_store.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


CUTS = '''
def first() -> int:
    from attuned.base.zero import ZERO

    return ZERO


def second() -> int:
    import json

    from attuned.base.points import Point
    from attuned.base.zero import ZERO

    return len(json.dumps([ZERO, Point]))


def third() -> None:
    """Third."""
    from attuned.base.zero import ZERO

    def inner() -> int:
        return ZERO

    inner()
    if ZERO:
        # Which one?
        from attuned.base.points import (
            Point,
            separator,
        )

        separator()
    from attuned.base.points import Point  # once more

    class Inner(Point):
        pass

    # a comment that stays

    from attuned.base.points import Point

    Inner()

    from attuned.base.zero import ZERO

    def last() -> int:
        return ZERO


def fourth() -> None:
    from attuned.base.zero import ZERO

    def inner() -> int:
        return ZERO
'''


def test_imports_within_functions(tmp_path: Path) -> None:
    """Imports of the source go from functions, with comments above them; the formatter has nothing to do."""
    made = make(written(tmp_path, {**WHOLE, "base/more.py": CUTS}))
    expected = '''
        def first() -> int:
            return ZERO


        def second() -> int:
            import json

            return len(json.dumps([ZERO, Point]))


        def third() -> None:
            """Third."""

            def inner() -> int:
                return ZERO

            inner()
            if ZERO:
                separator()

            class Inner(Point):
                pass

            # a comment that stays

            Inner()

            def last() -> int:
                return ZERO


        def fourth() -> None:
            def inner() -> int:
                return ZERO
        '''
    assert dedent(expected) in made


def test_the_order_of_modules(tmp_path: Path) -> None:
    """Modules stand by layer, within one by what they import at the top, then by name."""
    above = "def f_{0}() -> object:\n    from attuned.stores import STORES\n\n    return STORES\n"
    files = {
        "stores.py": "from attuned.open import OPEN\n\nSTORES = OPEN\n",
        "open.py": "OPEN = 1\n",
        "states/a.py": above.format("a"),
        "documents/a.py": above.format("b"),
        "engines/a.py": "from attuned.engines.z import f_c\n\nE = f_c\n",
        "engines/z.py": above.format("c"),
        "base/b.py": above.format("d"),
        "base/a.py": above.format("e"),
        "snapshots/a.py": above.format("f"),
        "connections/a.py": above.format("g"),
    }
    lines = make(written(tmp_path, files)).split("\n")
    assert [line.removeprefix("# attuned.") for line in lines if line.startswith("# attuned.")] == [
        "base.a",
        "base.b",
        "snapshots.a",
        "connections.a",
        "engines.z",
        "engines.a",
        "states.a",
        "documents.a",
        "open",
        "stores",
    ]


def test_import_lines() -> None:
    """Imports are sorted and wrapped as ruff does: constants, classes, others; an alias by itself."""
    names = {"TextIO", "cast", "IO", "Any", "TYPE_CHECKING", "T"}
    long = {f"name_{number:02}_of_a_dozen" for number in range(6)}
    imports = {
        *(Imported("typing", name, "") for name in names),
        *(Imported("os", name, "") for name in long),
        Imported("urllib.parse", "urlsplit", ""),
        Imported("urllib.parse", "quote", "urlquote"),
        Imported("", "zlib", ""),
        Imported("", "os.path", ""),
        Imported("", "attrs", ""),
        Imported("cachetools", "FIFOCache", ""),
        Imported("", "json", "text"),
    }
    assert import_lines(imports, "    ") == dedent("""\
            import json as text
            import os.path
            import zlib
            from os import (
                name_00_of_a_dozen,
                name_01_of_a_dozen,
                name_02_of_a_dozen,
                name_03_of_a_dozen,
                name_04_of_a_dozen,
                name_05_of_a_dozen,
            )
            from typing import IO, TYPE_CHECKING, Any, T, TextIO, cast
            from urllib.parse import quote as urlquote
            from urllib.parse import urlsplit

            import attrs
            from cachetools import FIFOCache""").replace("\n", "\n    ").replace("\n    \n", "\n\n").join(
        ["    ", ""]
    )


ONE = {"base/one.py": "X = 1\n"}
TYPING = "from typing import TYPE_CHECKING\n\n"

# What is wrong, what is said of it, and what is right instead; each on top of ONE.
RULES: dict[str, tuple[dict[str, str], str, dict[str, str]]] = {
    "alias": (
        {"base/two.py": "from attuned.base.one import X as Y\n\nZ = Y\n"},
        "two.py:3: an alias",
        {"base/two.py": "from attuned.base.one import X\n\nZ = X\n"},
    ),
    "alias in a function": (
        {"base/two.py": "def f():\n    from attuned.base.one import X as Y\n\n    return Y\n"},
        "two.py:4: an alias",
        {"base/two.py": "def f():\n    from attuned.base.one import X\n\n    return X\n"},
    ),
    "star": (
        {"base/two.py": "from attuned.base.one import *\n"},
        "two.py:3: a star import",
        {"base/two.py": "from attuned.base.one import X\n\nY = X\n"},
    ),
    "star of another library": (
        {"base/two.py": "from os.path import *\n"},
        "two.py:3: a star import",
        {"base/two.py": "from os.path import join\n\nY = join\n"},
    ),
    "relative": (
        {"base/two.py": "from .one import X\n\nY = X\n"},
        "two.py:3: a relative import",
        {"base/two.py": "from attuned.base.one import X\n\nY = X\n"},
    ),
    "import of the package": (
        {"base/two.py": "import attuned.base.one\n\nY = attuned.base.one.X\n"},
        "two.py:3: an import of the package",
        {"base/two.py": "from attuned.base.one import X\n\nY = X\n"},
    ),
    "import of the package in a function": (
        {"base/two.py": "def f():\n    import attuned\n\n    return attuned\n"},
        "two.py:4: an import of the package",
        {"base/two.py": "def f():\n    from attuned.base.one import X\n\n    return X\n"},
    ),
    "import of the made file": (
        {"base/two.py": "def f():\n    from attuned_store import X\n\n    return X\n"},
        "two.py:4: an import of the package",
        {"base/two.py": "def f():\n    from attuned.base.one import X\n\n    return X\n"},
    ),
    "import in a class": (
        {"base/two.py": "class C:\n    from attuned.base.one import X\n"},
        "two.py:4: an import in a class or block",
        {"base/two.py": "from attuned.base.one import X\n\n\nclass C:\n    Y = X\n"},
    ),
    "import in a block": (
        {"base/two.py": "try:\n    from attuned.base.one import X\nexcept ImportError:\n    Y = 1\n"},
        "two.py:4: an import in a class or block",
        {"base/two.py": "from attuned.base.one import X\n\ntry:\n    Y = X\nexcept KeyError:\n    Y = 1\n"},
    ),
    "nothing but imports in a block": (
        {"base/two.py": "def f(a):\n    if a:\n        from attuned.base.one import X\n    return X\n"},
        "two.py:5: a block of imports",
        {"base/two.py": "def f(a):\n    from attuned.base.one import X\n\n    return a and X\n"},
    ),
    "import on one line with code": (
        {"base/two.py": "from attuned.base.one import X; Y = X\n"},
        "two.py:3: an import on one line with other code",
        {"base/two.py": "from attuned.base.one import X  # why\n\nY = X\n"},
    ),
    "code on one line with import": (
        {"base/two.py": "def f():\n    Y = 1; from attuned.base.one import X\n    return X, Y\n"},
        "two.py:4: an import on one line with other code",
        {"base/two.py": "def f():\n    Y = 1\n    from attuned.base.one import X\n\n    return X, Y\n"},
    ),
    "cycle": (
        {
            "base/two.py": "from attuned.base.three import Z\n\nY = Z\n",
            "base/three.py": "from attuned.base.two import Y\n\nZ = Y\n",
        },
        "three.py:3: attuned.base.three imports attuned.base.two imports attuned.base.three",
        {
            "base/two.py": "from attuned.base.three import f\n\nY = f\n",
            "base/three.py": "def f():\n    from attuned.base.two import Y\n\n    return Y\n",
        },
    ),
    "layer above": (
        {"base/two.py": "from attuned.engines.e import E\n\nY = E\n", "engines/e.py": "E = 1\n"},
        "two.py:3: attuned.engines.e is in a layer above",
        {
            "base/two.py": TYPING + "if TYPE_CHECKING:\n    from attuned.engines.e import E\n\nY: E\n",
            "engines/e.py": "E = 1\n",
        },
    ),
    "no layer": (
        {"cellar/two.py": "Y = 1\n"},
        "cellar/two.py:1: cellar is no layer",
        {"states/two.py": "Y = 1\n"},
    ),
    "defined in two modules": (
        {"base/two.py": "def X():\n    pass\n"},
        "two.py:3: X is defined in attuned.base.one too",
        {"base/two.py": "class C:\n    def X(self):\n        pass\n"},
    ),
    "also an import": (
        {"base/two.py": "json = 1\n", "base/three.py": "import json\n\nZ = json\n"},
        "two.py:3: json is also an import of attuned.base.three",
        {"base/two.py": "JSON = 1\n", "base/three.py": "import json\n\nZ = json\n"},
    ),
    "also an import for typing": (
        {
            "base/two.py": "Mapping = 1\n",
            "base/three.py": TYPING
            + "if TYPE_CHECKING:\n    from collections.abc import Mapping\n\nZ: Mapping\n",
        },
        "two.py:3: Mapping is also an import of attuned.base.three",
        {
            "base/two.py": "Y = 1\n",
            "base/three.py": TYPING
            + "if TYPE_CHECKING:\n    from collections.abc import Mapping\n\nZ: Mapping\n",
        },
    ),
    "also the import of the end": (
        {"base/two.py": "sys = 1\n"},
        "two.py:3: sys is also an import of src/make.py",
        {"base/two.py": "import sys\n\nY = sys\n"},
    ),
    "one import name for two things": (
        {
            "base/two.py": "from os import path\n\nY = path\n",
            "base/three.py": "from sys import path\n\nZ = path\n",
        },
        "two.py:3: path is os.path here and sys.path in attuned.base.three",
        {
            "base/two.py": "from os import path\n\nY = path\n",
            "base/three.py": "from sys import path as where\n\nZ = where\n",
        },
    ),
    "two forms of one import": (
        {
            "base/two.py": "import json.tool as path\n\nY = path\n",
            "base/three.py": "from os import path\n\nZ = path\n",
        },
        "two.py:3: path is json.tool here and os.path",
        {
            "base/two.py": "import os.path as path\n\nY = path\n",
            "base/three.py": "from os import path\n\nZ = path\n",
        },
    ),
    "global": (
        {"base/two.py": "Y = 1\n\n\ndef f():\n    global Y\n    Y = 2\n"},
        "two.py:7: global Y",
        {"base/two.py": "class C:\n    y = 1\n\n\ndef f():\n    C.y = 2\n"},
    ),
    "unknown name": (
        {"base/two.py": "from attuned.base.one import W\n\nY = W\n"},
        "two.py:3: attuned.base.one does not define W",
        {"base/two.py": "from attuned.base.one import X\n\nY = X\n"},
    ),
    "name that the other module imports": (
        {
            "base/two.py": "from attuned.base.three import X\n\nY = X\n",
            "base/three.py": "from attuned.base.one import X\n\nZ = X\n",
        },
        "two.py:3: attuned.base.three does not define X",
        {
            "base/two.py": "from attuned.base.one import X\n\nY = X\n",
            "base/three.py": "from attuned.base.one import X\n\nZ = X\n",
        },
    ),
    "unknown name for typing": (
        {"base/two.py": TYPING + "if TYPE_CHECKING:\n    from attuned.base.one import W\n\nY: W\n"},
        "two.py:6: attuned.base.one does not define W",
        {"base/two.py": TYPING + "if TYPE_CHECKING:\n    from attuned.base.one import X\n\nY: X\n"},
    ),
    "unknown module": (
        {"base/two.py": "from attuned.base.none import X\n\nY = X\n"},
        "two.py:3: there is no module attuned.base.none",
        {"base/two.py": "from attuned.base.one import X\n\nY = X\n"},
    ),
    "module that is left out": (
        {
            "cli/main.py": "M = 1\n",
            "open.py": "def f():\n    from attuned.cli.main import M\n\n    return M\n",
        },
        "open.py:4: there is no module attuned.cli.main",
        {
            "cli/main.py": "M = 1\n",
            "open.py": "def f():\n    from attuned.base.one import X\n\n    return X\n",
        },
    ),
    "underscore": (
        {"base/two.py": "from attuned.base.three import _z\n\nY = _z\n", "base/three.py": "_z = 1\n"},
        "two.py:3: _z is used in two modules",
        {"base/two.py": "from attuned.base.three import z\n\nY = z\n", "base/three.py": "z = 1\n_z = 1\n"},
    ),
    "__all__ in a module": (
        {"base/two.py": '__all__ = ["Y"]\n\nY = 1\n'},
        "two.py:3: __all__ stands in src/attuned/__init__.py alone",
        {"base/two.py": "Y = 1\n", "__init__.py": PACKAGE.replace("[]", '["Y"]')},
    ),
    "unknown name in __all__": (
        {"__init__.py": PACKAGE.replace("[]", '[\n    "X",\n    "Y",\n]')},
        "src/attuned/__init__.py:7: 'Y' in __all__ is defined in no module",
        {"__init__.py": PACKAGE.replace("[]", '["X", "__version__"]')},
    ),
    "code in the package": (
        {"__init__.py": PACKAGE + "\nprint(1)\n"},
        "__init__.py:7: the package holds __version__ and __all__",
        {"__init__.py": PACKAGE + "\n# print(1)\n"},
    ),
    "name in the package": (
        {"__init__.py": PACKAGE + "\nY = 1\n"},
        "__init__.py:7: the package holds __version__ and __all__",
        {"__init__.py": PACKAGE, "base/two.py": "Y = 1\n"},
    ),
    "import in the package": (
        {"__init__.py": PACKAGE + "\nimport os\n"},
        "__init__.py:7: the package holds __version__ and __all__",
        {"__init__.py": PACKAGE + f"\n{TYPING}if TYPE_CHECKING:\n    import os\n"},
    ),
    "no __version__": (
        {"__init__.py": PACKAGE.replace("__version__", "__all__", 1)},
        "__init__.py:1: __version__ is missing",
        {"__init__.py": PACKAGE},
    ),
    "no __all__": (
        {"__init__.py": PACKAGE.replace("__all__ = []", "")},
        "__init__.py:1: __all__ is missing",
        {"__init__.py": PACKAGE},
    ),
    "no docstring": (
        {"__init__.py": PACKAGE.partition("\n")[2]},
        "__init__.py:1: a docstring is missing",
        {"__init__.py": PACKAGE},
    ),
    "code in a layer": (
        {"base/__init__.py": '"""A layer."""\n\nY = 1\n'},
        "base/__init__.py:3: the __init__.py of a layer",
        {"base/__init__.py": '"""A layer."""\n', "engines/__init__.py": ""},
    ),
    "another library": (
        {"base/two.py": "import attrs\nimport anyio\n\nY = attrs, anyio\n"},
        "two.py:4: anyio at module level",
        {"base/two.py": "import attrs\n\n\ndef f():\n    import anyio\n\n    return attrs, anyio\n"},
    ),
    "another library in a try": (
        {"base/two.py": "try:\n    import anyio\nexcept ImportError:\n    anyio = None\n"},
        "two.py:4: anyio at module level",
        {"base/two.py": "try:\n    import fcntl\nexcept ImportError:\n    fcntl = None\n"},
    ),
    "another library in a class": (
        {"base/two.py": "class C:\n    import anyio\n"},
        "two.py:4: anyio at module level",
        {"base/two.py": TYPING + "if TYPE_CHECKING:\n    import anyio\n\n\nclass C:\n    y: anyio.Event\n"},
    ),
    "no such library": (
        {"base/two.py": "import jsn\n\nY = jsn\n"},
        "two.py:3: jsn at module level",
        {"base/two.py": "import json\n\nY = json\n"},
    ),
    "code for typing": (
        {"base/two.py": TYPING + "if TYPE_CHECKING:\n    import os\n\n    Y = os.PathLike[str]\n"},
        "two.py:8: under TYPE_CHECKING",
        {"base/two.py": TYPING + 'if TYPE_CHECKING:\n    import os\n\nY = "os.PathLike[str]"\n'},
    ),
    "else of typing": (
        {"base/two.py": TYPING + "if TYPE_CHECKING:\n    import os\nelse:\n    import json\n"},
        "two.py:8: no else with TYPE_CHECKING",
        {
            "base/two.py": TYPING
            + "import json\n\nif TYPE_CHECKING:\n    import os\n\nY: os.PathLike[str] = json\n"
        },
    ),
    "bound twice": (
        {"base/two.py": "Y = 1\nY = 2\n"},
        "two.py:4: Y is bound twice",
        {"base/two.py": "Y: int\nY = 1\n"},
    ),
    "bound again by adding": (
        {"base/two.py": "Y = 1\nY += 2\n"},
        "two.py:4: Y is bound twice",
        {"base/two.py": "Y = {}\nY[1] = 2\nY[1] += 3\n"},
    ),
    "bound again in a tuple": (
        {"base/two.py": "Y = 1\n(Y, [Z]) = 2, [3]\n"},
        "two.py:4: Y is bound twice",
        {"base/two.py": "Y = 1\n(W, [Z]) = 2, [[Y for Y in (3,)]]\n"},
    ),
    "bound again under a condition": (
        {"base/two.py": "Y = 1\nif Y:\n    Y = 2\n"},
        "two.py:5: Y is bound twice",
        {"base/two.py": "W = 1\nif W:\n    Y = 2\nelif not W:\n    Y = 3\nelse:\n    Y = 4\n"},
    ),
    "bound twice in one alternative": (
        {"base/two.py": "try:\n    Y = 1\nexcept OSError:\n    Y = 2\nelse:\n    Y = 3\n"},
        "two.py:6: Y is bound twice",
        {
            "base/two.py": "try:\n    Y = 1\nexcept OSError:\n    Y = 2\nexcept ValueError:\n"
            "    Y = 3\nfinally:\n    Z = 1\n"
        },
    ),
    "function defined twice": (
        {"base/two.py": "def f():\n    pass\n\n\ndef f():\n    pass\n"},
        "two.py:7: f is bound twice",
        {
            "base/two.py": "from typing import overload\n\n\n@overload\ndef f() -> int: ...\n"
            "@overload\ndef f(a: int) -> str: ...\n"
            "def f(a: int = 1) -> int | str:\n    return a\n"
        },
    ),
    "loop": (
        {"base/two.py": "for Y in (1, 2):\n    pass\n"},
        "two.py:3: a module's top defines names",
        {"base/two.py": "Y = [y for y in (1, 2)]\nassert Y\nY.append(3)\n"},
    ),
    "deletion": (
        {"base/two.py": "Y = 1\ndel Y\n"},
        "two.py:4: a module's top defines names",
        {"base/two.py": "def f(y):\n    del y\n"},
    ),
    "local beside an import": (
        {"base/two.py": "def f(X=None):\n    from attuned.base.one import X\n\n    return X\n"},
        "two.py:4: X is a local of f too",
        {
            "base/two.py": "def f(x=None):\n    from attuned.base.one import X\n\n"
            "    return x or X\n\n\ndef g(X):\n    return X\n"
        },
    ),
    "local assigned after an import": (
        {"base/two.py": "def f():\n    from attuned.base.one import X\n\n    X = X + 1\n    return X\n"},
        "two.py:4: X is a local of f too",
        {"base/two.py": "def f():\n    from attuned.base.one import X\n\n    Y = X + 1\n    return Y\n"},
    ),
    "local around an import": (
        {
            "base/two.py": "def f(X):\n    def g():\n        from attuned.base.one import X\n\n"
            "        return X\n\n    return g(), X\n"
        },
        "two.py:5: X is a local of g too",
        {
            "base/two.py": "def f():\n    from attuned.base.one import X\n\n    def g(X):\n"
            "        return X\n\n    return g(X)\n"
        },
    ),
    "builtin redefined": (
        {
            "base/two.py": "def filter():\n    pass\n",
            "base/three.py": "def f():\n    return filter(None, [])\n",
        },
        "three.py:4: filter is a builtin that attuned.base.two redefines",
        {
            "base/two.py": "def filter():\n    pass\n",
            "base/three.py": "def f(filter):\n    return filter(None, [])\n",
        },
    ),
    "builtin redefined in a class body": (
        {"base/two.py": "filter = 1\n", "base/three.py": "class C:\n    y = filter\n"},
        "three.py:4: filter is a builtin that attuned.base.two redefines",
        {
            "base/two.py": "filter = 1\n",
            "base/three.py": "from attuned.base.two import filter\n\n\nclass C:\n    y = filter\n",
        },
    ),
    "builtin redefined for an annotation": (
        {"base/two.py": "set = 1\n", "base/three.py": "def f(y: set[int]) -> None:\n    pass\n"},
        "three.py:3: set is a builtin that attuned.base.two redefines",
        {
            "base/two.py": "put = 1\n",
            "base/three.py": "def f(y: set[int]):\n    from attuned.base.one import X\n\n    z: X = y\n",
        },
    ),
    "builtin redefined for what is returned": (
        {"base/two.py": "set = 1\n", "base/three.py": "def f() -> set[int]:\n    pass\n"},
        "three.py:3: set is a builtin that attuned.base.two redefines",
        {"base/two.py": "put = 1\n", "base/three.py": "def f() -> set[int]:\n    pass\n"},
    ),
    "builtin imported over": (
        {"base/two.py": "from io import open\n\nY = open\n", "base/three.py": "Z = open\n"},
        "three.py:3: open is a builtin that attuned.base.two redefines",
        {"base/two.py": "from io import open as io_open\n\nY = io_open\n", "base/three.py": "Z = open\n"},
    ),
    "not imported": (
        {"base/two.py": "def f():\n    return X\n"},
        "two.py:4: X is defined in attuned.base.one and not imported here",
        {"base/two.py": "def f():\n    from attuned.base.one import X\n\n    return X\n"},
    ),
    "annotations not postponed": (
        {"base/two.py": "Y = 1  # no __future__\n"},
        "two.py:1: from __future__ import annotations is missing",
        {"base/two.py": "Y = 1\n"},
    ),
    "another future": (
        {"base/two.py": "from __future__ import generator_stop\n" + FUTURE + "Y = 1\n"},
        "two.py:1: a __future__ other than annotations",
        {"base/two.py": FUTURE + "Y = 1\n"},
    ),
    "syntax": ({"base/two.py": "Y =\n"}, "two.py:3: invalid syntax", {"base/two.py": "Y = 1\n"}),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, tmp_path: Path) -> None:
    """What breaks a rule is refused by path and line; mended it is taken, and the made file runs."""
    broken, told, mended = RULES[rule]
    with pytest.raises(SourceError) as refused:
        make(written(tmp_path, ONE | broken))
    assert any(told in problem for problem in refused.value.problems), refused.value.problems
    assert all(problem.startswith("src/attuned/") for problem in refused.value.problems)
    written(tmp_path, ONE | mended)
    refresh(tmp_path)
    spec = spec_from_file_location("attuned_store", tmp_path / "attuned_store.py")
    assert spec
    assert spec.loader
    spec.loader.exec_module(module_from_spec(spec))


def test_all_problems_are_told(tmp_path: Path) -> None:
    """Every problem has a line, by path and line."""
    with pytest.raises(SourceError) as refused:
        make(
            written(tmp_path, {"base/two.py": "import jsn\nimport attuned\n", "base/one.py": "import jsn\n"})
        )
    assert [problem.split(": ")[0] for problem in refused.value.problems] == [
        "src/attuned/base/one.py:3",
        "src/attuned/base/two.py:3",
        "src/attuned/base/two.py:4",
    ]


def test_no_source(tmp_path: Path) -> None:
    """Without a package the error says so."""
    with pytest.raises(SourceError, match=r"__init__\.py is missing"):
        make(tmp_path)


def test_names_for_typing_that_are_imported_at_runtime(tmp_path: Path) -> None:
    """What one module imports for typing and another at runtime is imported once; no empty block is left."""
    files = {
        "base/one.py": TYPING + "if TYPE_CHECKING:\n    from pathlib import Path\n\nX: Path | None = None\n",
        "base/two.py": "from pathlib import Path\n\nY = Path()\n",
    }
    made = make(written(tmp_path, files))
    assert made.count("import Path") == 1
    assert "TYPE_CHECKING" not in made


def test_the_command(tmp_path: Path) -> None:
    """It writes or tells what is stale, and nothing where there is a problem; every run makes the same."""
    root, made = written(tmp_path, WHOLE), tmp_path / "attuned_store.py"
    command = shutil.copy(ROOT / "src" / "make.py", tmp_path / "src")

    def told(*arguments: str, seed: int = 0) -> tuple[int, str]:
        ran = run(command, *arguments, PYTHONHASHSEED=str(seed))
        return ran.returncode, ran.stdout + ran.stderr

    stale = (1, "attuned_store.py is stale: run python src/make.py\n")
    assert told("--check") == stale
    assert not made.exists()
    assert told() == (0, "attuned_store.py is made anew\n")
    assert made.read_text() == MADE
    assert told("--check", seed=1) == told(seed=2) == (0, "attuned_store.py is up to date\n")
    assert not refresh(tmp_path)
    made.write_text(MADE + "# edited\n")
    assert told("--check") == stale
    assert refresh(tmp_path)
    assert made.read_text() == MADE
    (root / "stores.py").write_text(FUTURE + "import jsn\n")
    for arguments in ([], ["--check"]):
        status, text = told(*arguments)
        assert status == 1
        assert "src/attuned/stores.py:3: jsn at module level" in text
    assert made.read_text() == MADE
    assert {path.name for path in tmp_path.iterdir()} == {"attuned_store.py", "src"}


@pytest.mark.skipif(not (ROOT / "src" / "attuned").is_dir(), reason="the source is not there")
def test_the_file_of_the_repository() -> None:
    """The file in the repository is what its source makes."""
    assert (ROOT / "attuned_store.py").read_text(encoding="utf-8") == make(ROOT / "src" / "attuned")

"""Makes attuned_store.py, the library in one file, of the modules under src/attuned.

``python src/make.py`` writes the file if it is stale; ``--check`` only says whether it is.

Every module is written below those that it imports at its top, with its comments and docstrings. Its imports
go, with the comments directly above them: those of other libraries are merged in the head of the file, and
those of the source itself have no use there, since all modules share one namespace. That keeps their meaning
only if they follow some rules. What breaks one is told by path and line, and nothing is written.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import heapq
import os
import symtable
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import reduce
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PACKAGE = "attuned"
MADE = "attuned_store"
LIGHT = ("from __future__ import annotations", "from typing import TYPE_CHECKING")
HELD = ("__version__", "__all__")  # by the package, beside its docstring
# From the bottom; modules in no folder are above them.
LAYERS = ("base", "snapshots", "connections", "engines", "states", "documents", "tables")
LEFT_OUT = ("cli", "__main__.py")
REQUIRED = ("attrs", "cachetools")  # what `import attuned_store` may load beside the standard library
WIDTH = 110
WRITE = f"write from {PACKAGE}.layer.module import Name"
RULE = "# " + "-" * (WIDTH - 2)

GUARD = f"""\
try:
{{imports}}
except ImportError as error:
    raise ImportError("{MADE} needs attrs and cachetools: pip install attrs cachetools") from error"""

ENDING = f"""\
if __name__ == "__main__":
    sys.stderr.write(
        'This file is the library. For the command: pip install "attuned-store[cli]", '
        "then attuned-store or python -m {MADE}\\n"
    )
    sys.exit(2)"""


class SourceError(Exception):
    """The source breaks rules; `problems` has a line for each: where, what is wrong, and what to do."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Imported(NamedTuple):
    """One name that an import binds."""

    module: str  # empty for `import name`
    name: str
    alias: str

    @property
    def binds(self) -> str:
        """The name in the namespace."""
        return self.alias or self.name.partition(".")[0]

    @property
    def thing(self) -> str:
        """What the name is bound to, by its dotted path."""
        return f"{self.module}.{self.name}" if self.module else self.name if self.alias else self.binds

    @property
    def top(self) -> str:
        """The package it is from."""
        return (self.module or self.name).partition(".")[0]


ANNOTATIONS = Imported("__future__", "annotations", "")  # the made file has it


class Internal(NamedTuple):
    """A name that one module of the source imports from another."""

    line: int
    target: str
    name: str
    place: str  # as blocks() says


@dataclass
class Module:
    """A module of the source, and what is wrong with it."""

    name: str
    path: str
    text: str
    tree: ast.Module
    code: str = ""  # the text without the docstring and the imports that go
    defined: dict[str, int] = field(default_factory=dict[str, int])  # at its top, and in which line
    external: dict[Imported, int] = field(default_factory=dict[Imported, int])
    checking: dict[Imported, int] = field(default_factory=dict[Imported, int])  # under TYPE_CHECKING
    internal: list[Internal] = field(default_factory=list[Internal])  # wherever they stand
    problems: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    @property
    def rank(self) -> int:
        """The number of the layer, from the bottom."""
        folder = self.name.split(".")[1:2]
        return -1 if not folder else LAYERS.index(folder[0]) if folder[0] in LAYERS else len(LAYERS)

    def refuse(self, line: int, text: str) -> None:
        """Note a problem."""
        self.problems.append((line, text))


def make(root: Path) -> str:
    """Return the text of the made file, or raise SourceError; `root` is the folder of the package."""
    if not (root / "__init__.py").is_file():
        raise SourceError([f"{root}: there is no package: an __init__.py is missing"])
    paths = [path for path in sorted(root.rglob("*.py")) if not {*path.relative_to(root).parts} & {*LEFT_OUT}]
    modules = {module.name: module for module in (parse(root, path) for path in paths)}
    check_package(modules)
    check_internal(modules)
    check_names(modules)
    ordered = order(modules)
    problems = [(each.path, *problem) for each in modules.values() for problem in each.problems]
    if problems:
        raise SourceError([f"{path}:{line}: {text}" for path, line, text in sorted(problems)])
    return write(*ordered)


# -- Reading one module


def parse(root: Path, path: Path) -> Module:
    """Return the module of a path, with the problems that show without the others."""
    text, shown = path.read_text(encoding="utf-8"), path.relative_to(root.parent.parent).as_posix()
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise SourceError([f"{shown}:{error.lineno}: {error.msg}"]) from error
    name = ".".join((PACKAGE, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
    module = Module(name, shown, text, tree)
    if path.name == "__init__.py" and name != PACKAGE:
        for statement in tree.body[ast.get_docstring(tree) is not None :]:
            module.refuse(statement.lineno, "the __init__.py of a layer holds a docstring and nothing else")
    lines, gone = text.split("\n"), set[int]()
    for place, block in blocks(tree.body, "top"):
        for statement in block:
            read_statement(module, statement, place)
        going = [goes(module, statement, place) for statement in block]
        if place == "function" and all(going):
            module.refuse(block[0].lineno, "a block of imports that are dropped: put them above it")
        gone |= lines_of(module, lines, block, going)
    module.code = "\n".join(line for number, line in enumerate(lines, 1) if number not in gone).strip("\n")
    staying = [statement for statement in tree.body if not goes(module, statement, "top")]
    for bound, times in bindings(module, staying).items():
        if times > 1:
            module.refuse(module.defined[bound], f"{bound} is bound twice: give the second another name")
    if module.code and name != PACKAGE and ANNOTATIONS not in module.external:
        module.refuse(1, "from __future__ import annotations is missing: the made file has it")
    return module


def blocks(block: list[ast.stmt], place: str) -> Iterator[tuple[str, list[ast.stmt]]]:
    """Yield every block of statements with its place: top, typing, conditional, class or function."""
    yield place, block
    for statement in block:
        inner = place
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = "function"
        elif isinstance(statement, ast.ClassDef):
            inner = "class"
        elif place == "top":
            inner = "typing" if is_checking(statement) else "conditional"
        parts: list[Any] = [*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())]
        for holder in (statement, *parts):
            for name in ("body", "orelse", "finalbody"):
                if below := getattr(holder, name, None):
                    yield from blocks(below, inner)


def read_statement(module: Module, statement: ast.stmt, place: str) -> None:
    """Note what a statement imports, and refuse what may not stand there."""
    line = statement.lineno
    if isinstance(statement, ast.Import | ast.ImportFrom):
        read_import(module, statement, place)
    elif place == "typing":
        module.refuse(line, "under TYPE_CHECKING at the top stand imports only: put this elsewhere")
    elif isinstance(statement, ast.Global):
        module.refuse(line, f"global {', '.join(statement.names)}: make it an attribute of an object")
    elif is_checking(statement) and statement.orelse and place == "top":
        module.refuse(statement.orelse[0].lineno, "no else with TYPE_CHECKING: the block goes as a whole")


def read_import(module: Module, statement: ast.Import | ast.ImportFrom, place: str) -> None:
    """Note the names of an import, or refuse it."""
    source = (statement.module or "") if isinstance(statement, ast.ImportFrom) else ""
    names = [Imported(source, each.name, each.asname or "") for each in statement.names]
    internal, in_package = is_internal(statement), source.partition(".")[0] == PACKAGE
    early = place not in {"function", "typing"}  # done when the made file is imported
    foreign = ", ".join(sorted({each.top for each in names} - sys.stdlib_module_names - {*REQUIRED}))
    rules = (
        (isinstance(statement, ast.ImportFrom) and statement.level, f"a relative import: {WRITE}"),
        (internal and not in_package, f"an import of the package: {WRITE}"),
        (any(each.name == "*" for each in names), "a star import: name what is imported"),
        (internal and any(each.alias for each in names), "an alias: a name is the same in all modules"),
        (internal and place in {"class", "conditional"}, "an import in a class or block: put it at the top"),
        (early and foreign and not internal, f"{foreign} at module level: import it in a function"),
        (source == "__future__" and names != [ANNOTATIONS], "a __future__ other than annotations: drop it"),
    )
    if problems := [text for broken, text in rules if broken]:
        module.refuse(statement.lineno, problems[0])
    elif internal:
        module.internal += [Internal(statement.lineno, source, each.name, place) for each in names]
    elif place in {"top", "typing"}:
        kept = module.external if place == "top" else module.checking
        kept.update(dict.fromkeys(names, statement.lineno))


def is_internal(statement: ast.stmt) -> bool:
    """Whether a statement imports from the source itself, in whatever form."""
    names = [each.name for each in statement.names] if isinstance(statement, ast.Import) else []
    if isinstance(statement, ast.ImportFrom):
        names = [PACKAGE if statement.level else statement.module or ""]
    return not {name.partition(".")[0] for name in names}.isdisjoint({PACKAGE, MADE})


def is_checking(statement: ast.stmt) -> TypeGuard[ast.If]:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


def goes(module: Module, statement: ast.stmt, place: str) -> bool:
    """Whether a statement is left out where it stands: the docstring, and imports."""
    if place == "top":
        docstring = statement is module.tree.body[0] and ast.get_docstring(module.tree) is not None
        return docstring or isinstance(statement, ast.Import | ast.ImportFrom) or is_checking(statement)
    return place == "function" and is_internal(statement)


def lines_of(module: Module, lines: list[str], block: list[ast.stmt], going: list[bool]) -> set[int]:
    """Return the numbers of the lines that go with statements, so that the rest is formatted as before."""
    gone, kept, floor = set[int](), None, 0
    for statement, leaves, following in zip(block, going, [*block, None][1:], strict=True):
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        if leaves:
            rest = lines[last - 1].encode()[statement.end_col_offset :].decode().strip()
            if lines[first - 1][: statement.col_offset].strip() or (rest and not rest.startswith("#")):
                module.refuse(first, "an import on one line with other code: put it on its own")
            while first - 1 > floor and lines[first - 2].lstrip().startswith("#"):
                first -= 1
            above = next(number for number in range(first - 1, -1, -1) if number not in gone)
            # The formatter wants a blank line above a definition that is not the first in its block.
            defines = isinstance(following, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            wanted = kept and defines and lines[above - 1].strip()
            while last < len(lines) and not lines[last].strip() and not wanted:
                last += 1
            gone.update(range(first, last + 1))
        else:
            kept = statement
        floor = last
    return gone


def bindings(module: Module, block: list[ast.stmt]) -> Counter[str]:
    """Return how often a block at the top binds each name; of alternatives the most counts."""
    found = Counter[str]()
    for statement in block:
        names = list[str]()
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                decorators = {ast.unparse(each).removeprefix("typing.") for each in statement.decorator_list}
                names = [] if "overload" in decorators else [statement.name]
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                single = (
                    [] if isinstance(statement, ast.Assign) or not statement.value else [statement.target]
                )
                targets: list[ast.expr] = [*single, *getattr(statement, "targets", ())]
                stored = [each for each in ast.walk(ast.Tuple(targets)) if isinstance(each, ast.Name)]
                names = [each.id for each in stored if isinstance(each.ctx, ast.Store)]
            case ast.Import() | ast.ImportFrom():
                names = [each.asname or each.name.partition(".")[0] for each in statement.names]
            case ast.If():
                found += bindings(module, statement.body) | bindings(module, statement.orelse)
            case ast.Try():
                ways = [statement.body + statement.orelse, *(each.body for each in statement.handlers)]
                most = reduce(lambda one, other: one | other, (bindings(module, way) for way in ways))
                found += most + bindings(module, statement.finalbody)
            case ast.Expr() | ast.Assert() | ast.Raise() | ast.Pass():
                pass
            case _:
                module.refuse(statement.lineno, "a module's top defines names: put this into a function")
        found.update(names)
        module.defined.update(dict.fromkeys(names, statement.lineno))
    return found


# -- Looking at all modules together


def check_package(modules: dict[str, Module]) -> None:
    """Check that the package is its docstring, __version__ and __all__, whose names exist."""
    package, missing = modules[PACKAGE], {*HELD}
    everything = {name for module in modules.values() for name in module.defined}
    if ast.get_docstring(package.tree) is None:
        package.refuse(1, "a docstring is missing: it is that of the made file")
    for statement in package.tree.body[1:]:
        name = ast.unparse(statement.targets[0]) if isinstance(statement, ast.Assign) else ""
        light = is_checking(statement) or ast.unparse(statement) in LIGHT
        if not light and name not in missing:
            package.refuse(statement.lineno, f"the package holds {' and '.join(HELD)}: put this in a module")
        missing.discard(name)
        for each in ast.walk(statement) if name == "__all__" else ():
            if isinstance(each, ast.Constant) and each.value not in everything:
                package.refuse(each.lineno, f"{each.value!r} in __all__ is defined in no module: remove it")
    for name in sorted(missing):
        package.refuse(1, f"{name} is missing: the made file has it from here")
    for module in modules.values():
        if module is not package and (line := module.defined.pop("__all__", 0)):
            module.refuse(line, f"__all__ stands in {package.path} alone: add the names there")


def check_internal(modules: dict[str, Module]) -> None:
    """Check what modules import of each other, and that locals do not get between."""
    for module in modules.values():
        folder = module.name.split(".")[1:-1]
        if folder and folder[0] not in LAYERS:
            module.refuse(1, f"{folder[0]} is no layer: add it to LAYERS in src/make.py")
        for each in module.internal:
            target = modules.get(each.target)
            if target is None:
                module.refuse(each.line, f"there is no module {each.target} in the made file")
            elif each.name not in target.defined:
                module.refuse(each.line, f"{each.target} does not define {each.name} at its top")
            elif each.name.startswith("_") and not each.name.endswith("__"):
                module.refuse(each.line, f"{each.name} is used in two modules: take its underscore away")
            elif each.place == "top" and target.rank > module.rank:
                module.refuse(each.line, f"{each.target} is in a layer above: import it in a function")
        check_locals(module, symtable.symtable(module.text, module.path, "exec"), frozenset())


def check_locals(module: Module, scope: symtable.SymbolTable, around: frozenset[str]) -> None:
    """Check that a name imported in a function is not bound in it, or around it, in another way too."""
    dropped = {each.name: each.line for each in module.internal if each.place == "function"}
    if scope.get_type() == "function":
        symbols = scope.get_symbols()
        around |= {each.get_name() for each in symbols if each.is_assigned() or each.is_parameter()}
        for name in sorted({each.get_name() for each in symbols if each.is_imported()} & around & {*dropped}):
            module.refuse(dropped[name], f"{name} is a local of {scope.get_name()} too: rename that")
    for inner in scope.get_children():
        check_locals(module, inner, around)


def check_names(modules: dict[str, Module]) -> None:
    """Check that every name means in the made file what it meant in its module."""
    owners: dict[str, Module] = {}
    bound: dict[str, tuple[str, str]] = {"sys": ("sys", "src/make.py")}  # to what, and where
    for module in modules.values():
        for name, line in module.defined.items():
            other = owners.setdefault(name, module)
            if other is not module:
                module.refuse(line, f"{name} is defined in {other.name} too: give one of them another name")
        for each, line in (module.external | module.checking).items():
            thing, where = bound.setdefault(each.binds, (each.thing, module.name))
            if thing != each.thing:
                told = f"{each.binds} is {each.thing} here and {thing} in {where}: import one by an alias"
                module.refuse(line, told)
    for name in sorted(owners.keys() & bound.keys()):
        module = owners[name]
        line, where = module.defined[name], bound[name][1]
        module.refuse(line, f"{name} is also an import of {where}: give it another name")
    for module in modules.values():
        for name in sorted(free_names(module) & (owners.keys() | bound.keys())):
            where = owners[name].name if name in owners else bound[name][1]
            nodes = (each for each in ast.walk(module.tree) if isinstance(each, ast.Name) and each.id == name)
            line = min((node.lineno for node in nodes), default=1)
            if hasattr(builtins, name):
                module.refuse(line, f"{name} is a builtin that {where} redefines: give that one another name")
            else:
                module.refuse(line, f"{name} is defined in {where} and not imported here: import it")


def free_names(module: Module) -> set[str]:
    """Return the names that a module uses and does not bind at its top."""
    top = symtable.symtable(module.text, module.path, "exec")
    bound = {each.get_name() for each in top.get_symbols() if each.is_assigned() or each.is_imported()}
    used, scopes = set[str](), [top]
    for scope in scopes:
        scopes += scope.get_children()
        used |= {each.get_name() for each in scope.get_symbols() if each.is_global()}
    # Annotations are no code, so that the symbol table has not their names; some are imported in a function.
    for node in ast.walk(module.tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            names = {each.id for each in ast.walk(part or ast.Pass()) if isinstance(each, ast.Name)}
            used |= names - {each.name for each in module.internal}
    return used - bound


def order(modules: dict[str, Module]) -> list[Module]:
    """Return the modules, the package first, each below what it imports; then by layer and by name."""
    graph = dict[str, list[str]]()
    for name, module in modules.items():
        graph[name] = sorted(
            {each.target for each in module.internal if each.place == "top"} & modules.keys()
        )
    sorter, ready, ordered = TopologicalSorter(graph), list[tuple[int, str]](), list[Module]()
    try:
        sorter.prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1][::-1]
        module, told = modules[cycle[0]], f"{' imports '.join(cycle)}: import one in a function"
        lines = (each.line for each in module.internal if (each.target, each.place) == (cycle[1], "top"))
        module.refuse(min(lines, default=1), told)
        return []
    while sorter.is_active():
        for name in sorter.get_ready():
            heapq.heappush(ready, (modules[name].rank, name))
        name = heapq.heappop(ready)[1]
        ordered.append(modules[name])
        sorter.done(name)
    return ordered


# -- Writing


def write(package: Module, *ordered: Module) -> str:
    """Return the text of the made file: the head, the modules, and what the file does as a script."""
    external = {Imported("", "sys", "")}.union(*(module.external for module in ordered))
    checking = set[Imported]().union(*(module.checking for module in ordered)) - external
    external -= {ANNOTATIONS}
    if not checking and all("TYPE_CHECKING" not in module.code for module in ordered):
        external -= {Imported("typing", "TYPE_CHECKING", "")}
    required = {each for each in external if each.top in REQUIRED}
    docstring = "\n".join(package.text.split("\n")[: package.tree.body[0].end_lineno])
    head = [
        docstring,
        f"# Made by src/make.py from src/{PACKAGE}: edit there.",
        "from __future__ import annotations",
        import_lines(external - required, ""),
        GUARD.format(imports=import_lines(required, "    ")) if required else "",
        "if TYPE_CHECKING:\n" + import_lines(checking, "    ") if checking else "",
        package.code,
    ]
    sections = ["\n\n".join(filter(None, head))]
    for module in ordered:
        told = (ast.get_docstring(module.tree) or "").splitlines()
        if told or module.code:
            banner = [f"# {line}".rstrip() for line in (module.name, *told)]
            sections.append("\n".join((RULE, *banner, RULE)))
            sections += [module.code] if module.code else []
    return "\n\n\n".join((*sections, ENDING)) + "\n"


def import_lines(imports: Iterable[Imported], indent: str) -> str:
    """Return import statements, sorted and wrapped as ruff does."""

    def member(each: Imported) -> tuple[int, str, str, str]:
        kind = 0 if each.name.isupper() and len(each.name) > 1 else 1 if each.name[0].isupper() else 2
        return kind, each.name.lower(), each.name, each.alias

    sections = (list[str](), list[str]())  # the standard library, and others
    plain = sorted((each.name.lower(), each) for each in imports if not each.module)
    for _, each in plain:
        alias = f" as {each.alias}" if each.alias else ""
        sections[each.top not in sys.stdlib_module_names].append(f"{indent}import {each.name}{alias}")
    groups = defaultdict[tuple[str, str], list[Imported]](list)  # an alias has a statement of its own
    for each in sorted((each for each in imports if each.module), key=member):
        groups[each.module, f"{each.name} as {each.alias}" if each.alias else ""].append(each)
    ordered = sorted(groups.items(), key=lambda group: (group[0][0].lower(), member(group[1][0])))
    for (module, alias), members in ordered:
        names = [alias] if alias else [each.name for each in members]
        line = f"{indent}from {module} import {', '.join(names)}"
        if len(line) > WIDTH:
            listed = "".join(f"{indent}    {name},\n" for name in names)
            line = f"{indent}from {module} import (\n{listed}{indent})"
        sections[members[0].top not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(section) for section in sections if section)


def refresh(repository: Path, *, write: bool = True) -> bool:
    """Make attuned_store.py anew where it is stale, and return whether it was."""
    made, text = repository / f"{MADE}.py", make(repository / "src" / PACKAGE)
    stale = not made.is_file() or made.read_text(encoding="utf-8") != text
    if stale and write:
        # Put in its place as a whole: another process may be importing it.
        unfinished = made.with_name(f".{MADE}.{os.getpid()}")
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        unfinished.replace(made)
    return stale


def main() -> int:
    """Make the file, or check that it is what would be made; return the exit status."""
    parser = argparse.ArgumentParser(description=f"Makes {MADE}.py of the modules under src/{PACKAGE}.")
    parser.add_argument("--check", action="store_true", help="only say whether the file is stale (status 1)")
    check: bool = parser.parse_args().check
    try:
        stale = refresh(Path(__file__).resolve().parent.parent, write=not check)
    except SourceError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    told = "is stale: run python src/make.py" if check else "is made anew"
    sys.stdout.write(f"{MADE}.py {told if stale else 'is up to date'}\n")
    return int(stale and check)


if __name__ == "__main__":
    sys.exit(main())

"""README.md: what it shows is run, and what it lists is compared with the file."""

from __future__ import annotations

import contextlib
import doctest
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import pytest
from command import main
from conformance import loopback
from packaging.requirements import Requirement

import attuned_store
from attuned_store import MemoryStoreConfig, QdrantStoreConfig, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SAMPLE = Path("tests", "data", "film_mood.csv")

TRY = (
    "python3 -m venv .venv && .venv/bin/python -m pip install --quiet . && "
    ".venv/bin/attuned-store import tests/data/film_mood.csv --scale 0:31 && "
    ".venv/bin/attuned-store search --like maps_001"
)
TESTS = "python3 -m venv .venv && .venv/bin/python -m pip install --quiet tox tox-uv && .venv/bin/tox run"

NOON = 1_768_651_200_000  # 2026-01-17T12:00Z
SERVER = "http://localhost:6333"
OURS = re.compile(r"\battuned-store ")  # not the tests' business: other programs

# A value for each variable: its text, and what the option is then.
VALUES: dict[str, tuple[str, object]] = {
    "axes": ("calm, tense", ("calm", "tense")),
    "vector_size": ("7", 7),
    "enable_history": ("off", False),
    "max_history_per_user": ("5", 5),
    "history_retention_days": ("1.5", 1.5),
    "telemetry": ("off", False),
    "path": ("somewhere", "somewhere"),
    "url": ("https://host:6333", "https://host:6333"),
    "api_key": ("secret", "secret"),
    "collection_name": ("moods", "moods"),
    "engine": ("local", "local"),
    "durability": ("power", "power"),
    "lock_timeout": ("2", 2.0),
    "cache_size": ("0", 0),
    "slow_operation_ms": ("250", 250.0),
    "min_free_bytes": ("1048576", 1_048_576),
    "connect_timeout": ("3", 3.0),
    "request_timeout": ("4", 4.0),
    "pool_size": ("8", 8),
    "verify": ("no", False),
    "cache_ttl": ("0.5", 0.5),
    "snapshot_timeout": ("900", 900.0),
    "shard_number": ("2", 2),
    "replication_factor": ("3", 3),
    "write_consistency_factor": ("2", 2),
    "read_consistency": ("quorum", "quorum"),
    "write_ordering": ("strong", "strong"),
    "exact_search": ("no", False),
}


class Block(NamedTuple):
    """A block of code, and the output that is shown for it."""

    line: int
    text: str
    shown: str


def blocks(language: str) -> Iterator[Block]:
    """Yield the blocks in a language; a block of text after "It prints:" is what one shows."""
    pattern = rf"^```{language}\n(.*?)^```\n(?:\nIt prints:\n\n```text\n(.*?)^```\n)?"
    for found in re.finditer(pattern, README, re.MULTILINE | re.DOTALL):
        yield Block(README.count("\n", 0, found.start()) + 1, found[1], found[2] or "")


def section(title: str) -> str:
    """The text under a heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a text, without headings."""
    lines = re.findall(r"^\| ?(.*?) ?\|$", text, re.MULTILINE)
    tables = [[cell.strip() for cell in line.split("|")] for line in lines]
    rules = [index for index, cells in enumerate(tables) if set("".join(cells)) <= set("-:")]
    headings = {*rules, *(index - 1 for index in rules)}
    return [cells for index, cells in enumerate(tables) if index not in headings]


def options() -> dict[str, tuple[str, str]]:
    """The options that the configuration tables list, each with its variable and default."""
    listed = rows(section("Configuration"))
    assert len({option for option, *_ in listed}) == len(listed), "an option is listed twice"
    return {
        option.strip("`"): (variable.strip("`"), default.strip("`"))
        for option, variable, default, _ in listed
    }


def marked(name: str) -> str:
    """The command between two markers."""
    found = re.search(
        rf"^<!-- {name}: begin -->\n```sh\n(.*)\n```\n<!-- {name}: end -->$", README, re.MULTILINE
    )
    assert found, name
    return found[1]


def without_sizes(text: str) -> str:
    """Put one size and one duration in the place of those that vary with the machine and its zlib."""
    return re.sub(
        r"[\d,]+ bytes, \d+\.\d\d s$|[\d,]+(?= bytes)|(?<=  portable  )[\d,]+$",
        "<size>",
        text,
        flags=re.MULTILINE,
    )


def sessions() -> list[tuple[str, str]]:
    """The commands of the page in their order, each with what is shown below it."""
    text = "".join(block.text for block in blocks("console"))
    shown = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
    assert len(shown) == len(re.findall(r"^\$ ", text, re.MULTILINE)) > 9
    return shown


def pipes() -> list[Any]:
    """The commands of the page that are other programs'."""
    return [
        pytest.param(
            line,
            expected,
            marks=pytest.mark.skipif(missing != [], reason=f"needs {', '.join(missing)}"),
            id=f"{number}",
        )
        for number, (line, expected) in enumerate(sessions(), 1)
        if not OURS.search(line)
        for programs in [re.findall(r"(?:^|\| )(\w+)", line)]
        for missing in [[program for program in programs if shutil.which(program) is None]]
    ]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that has the sample, as the checkout does, and none of our variables."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith(("ATTUNED_STORE", "QDRANT_"))]:
        monkeypatch.delenv(variable)
    SAMPLE.parent.mkdir(parents=True)
    shutil.copy(ROOT / SAMPLE, SAMPLE)
    return tmp_path


@pytest.fixture
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock stand at the time that the sessions show."""
    monkeypatch.setattr(attuned_store.wall_clock, "now_ms", lambda: NOON)


def run_doctest(block: Block) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, {}, "README.md", "README.md", block.line)
    output = io.StringIO()
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=output.write)
    assert not failed, output.getvalue()


def run_script(block: Block) -> None:
    script = Path(f"readme_line_{block.line}.py")
    script.write_text(block.text, "utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(script), run_name="__main__")
    assert output.getvalue() == block.shown, f"README.md, line {block.line}"


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run `VARIABLE=value attuned-store ...` and return its status and all of its output."""
    words = shlex.split(line)
    start = next(index for index, word in enumerate(words) if Path(word).name == "attuned-store")
    with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        for setting in words[:start]:
            patch.setenv(*setting.split("=", 1))
        with contextlib.redirect_stderr(output):
            status = main(words[start + 1 :])
    return status, output.getvalue()


def lacking(block: Block) -> list[str]:
    """The libraries that a block imports and that are not installed."""
    names = re.findall(r"^(?:import|from) (\w+)", block.text, re.MULTILINE)
    return [name for name in names if importlib.util.find_spec(name) is None]


def test_python_blocks_run_and_print_what_is_shown() -> None:
    """Every block of Python runs in the order of the page, without a warning, and prints what is shown."""
    found = list(blocks("python"))
    assert len(found) == README.count("```python\n") >= 4
    left_out: set[str] = set()
    for block in found:
        if block.text.startswith(">>>"):
            run_doctest(block)
        elif missing := lacking(block):
            left_out.update(missing)
        else:
            assert block.shown, f"README.md, line {block.line}: what does it print?"
            run_script(block)
    if left_out:
        pytest.skip(f"all blocks are run but those that need {', '.join(sorted(left_out))}")


def test_commands_print_what_is_shown(monkeypatch: pytest.MonkeyPatch, folder: Path, noon: None) -> None:
    """Every command of the sessions gives the output below it, at noon and with a server in its place."""
    server = loopback().url
    for line, expected in filter(lambda shown: OURS.search(shown[0]), sessions()):
        status, output = run_command(line.replace(SERVER, server), monkeypatch)
        output = output.replace(str(folder), "/home/ada").replace(server, SERVER)
        assert without_sizes(output) == without_sizes(expected), line
        assert (status == 0) is not expected.startswith("attuned-store: "), line


@pytest.mark.parametrize(("line", "expected"), pipes())
def test_other_programs_read_a_snapshot(
    monkeypatch: pytest.MonkeyPatch, noon: None, line: str, expected: str
) -> None:
    """What other programs make of a snapshot is what is shown."""
    for ours, _ in filter(lambda shown: OURS.search(shown[0]), sessions()):
        run_command(ours, monkeypatch)
        if " snapshot " in ours:
            break
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (expected, "")


def test_docstrings_show_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example in a docstring of the file gives what is shown."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Not testmod(), which looks at private objects too and stumbles over the core of a closed store.
    found = doctest.DocTestFinder(recurse=False).find(attuned_store)
    for name in attuned_store.__all__:
        documented = getattr(attuned_store, name)
        if getattr(documented, "__module__", None) == "attuned_store":
            found += doctest.DocTestFinder().find(documented, name, attuned_store)
    runner, output = doctest.DocTestRunner(), io.StringIO()
    for test in found:
        runner.run(test, out=output.write)
    assert not runner.failures, output.getvalue()
    assert runner.tries >= 10


@pytest.mark.parametrize(("name", "command"), [("try", TRY), ("tests", TESTS)])
def test_marked_commands_are_there(name: str, command: str) -> None:
    """The two commands stand between their markers, once and as they are."""
    assert marked(name) == command
    assert README.count(f"<!-- {name}: begin -->") == README.count(f"<!-- {name}: end -->") == 1


def test_command_to_try_succeeds_once_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first command runs after installing succeeds, and finds people like the one named."""
    lines = [line for line in marked("try").split(" && ") if "/attuned-store " in line]
    assert len(lines) == 2
    for line in lines:
        status, output = run_command(line, monkeypatch)
        assert status == 0, output
    assert "maps_091" in output
    assert "maps_001" not in output


def test_every_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The section on the command line names every command that there is."""
    assert main(["--help"]) == 0
    commands = re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    assert len(commands) >= 12
    missing = [name for name in commands if not re.search(rf"(`|mood ){name}\b", section("The command line"))]
    assert missing == []


def test_every_option_is_listed_with_its_default() -> None:
    """The configuration tables list every option and no other, each with its default."""
    fields = attrs.fields(QdrantStoreConfig)
    defaults = QdrantStoreConfig()
    assert {option: default for option, (_, default) in options().items()} == {
        field.name: repr(getattr(defaults, field.name)) for field in fields
    }


def test_options_of_all_stores_are_listed_first() -> None:
    """What the memory stores take is listed for all stores, and nothing else."""
    common = section("Configuration").partition("For all stores:")[2].partition("For stores on disk")[0]
    assert [cells[0].strip("`") for cells in rows(common)] == [
        field.name for field in attrs.fields(MemoryStoreConfig)
    ]


def test_every_variable_is_listed_with_its_option() -> None:
    """Each variable sets the option that it is listed with, and an option without one has none."""
    variables = {option: variable for option, (variable, _) in options().items() if variable != "none"}
    assert variables.keys() == VALUES.keys()
    for option, variable in variables.items():
        text, value = VALUES[option]
        assert QdrantStoreConfig.from_env({variable: text}) == attrs.evolve(
            QdrantStoreConfig(), **{option: value}
        )


def test_no_other_variable_is_read() -> None:
    """The page names every variable that is read, and no other."""
    asked: set[str] = {"ATTUNED_STORE", "QDRANT_TEST_URL"}  # the last one is read by the tests

    class Environment(dict[str, str]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return default

    QdrantStoreConfig.from_env(Environment())
    command = sorted((Path(__file__).parent.parent / "src" / "attuned" / "cli").glob("*.py"))
    source = "".join(path.read_text("utf-8") for path in (Path(str(attuned_store.__file__)), *command))
    asked.update(re.findall(r"""environ(?:\.get\(|\[)\s*["'](\w+)""", source))
    asked.remove("SSL_CERT_FILE")  # which httpx reads: an error names it
    assert set(re.findall(r"\b(?:ATTUNED_STORE|QDRANT)(?:_[A-Z]+)*\b", README)) == asked


def test_every_error_is_listed() -> None:
    """The table of errors lists every public one, with what else it is."""
    listed = {error.strip("`"): base.strip("`") for error, base, _ in rows(section("Errors"))}
    public = {name: getattr(attuned_store, name) for name in attuned_store.__all__}
    errors = {
        name: kind
        for name, kind in public.items()
        if isinstance(kind, type) and issubclass(kind, StoreError) and kind is not StoreError
    }
    assert listed.keys() == errors.keys()
    for name, kind in errors.items():
        bases = [base.__name__ for base in kind.__mro__[1:]]
        others = [base for base in bases if base in ("BackendError", "ValueError", "KeyError", "ImportError")]
        assert listed[name] == (others[0] if others else "")


def test_script_header_asks_for_what_the_project_does() -> None:
    """The header of the script is valid, and its requirements are some of the project's."""
    found = re.search(r"^# /// script\n((?:# .*\n)+?)# ///\n", README, re.MULTILINE)
    assert found
    header = tomllib.loads(re.sub(r"^# ", "", found[1], flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {Requirement(line).name: Requirement(line).specifier for line in project["dependencies"]}
    asked = {Requirement(line).name: Requirement(line).specifier for line in header["dependencies"]}
    assert asked.items() <= declared.items()
    assert header["requires-python"] == project["requires-python"]


def installed(*names: str) -> dict[str, int]:
    """The sizes in bytes of distributions and of what they need in turn, without compiled byte code."""
    sizes: dict[str, int] = {}
    waiting = list(names)
    while waiting:
        distribution = importlib.metadata.distribution(waiting.pop())
        if distribution.name in sizes:
            continue
        files = [Path(str(file.locate())) for file in distribution.files or () if file.suffix != ".pyc"]
        sizes[distribution.name] = sum(file.stat().st_size for file in files if file.is_file())
        needed = map(Requirement, distribution.requires or ())
        waiting += [
            each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})
        ]
    return sizes


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the sizes are those of Linux on x86-64"
)
@pytest.mark.parametrize(
    ("column", "names"),
    [(1, ()), (2, ("qdrant-edge-py",)), (3, ("qdrant-client",))],
    ids=["memory", "edge", "local"],
)
def test_install_sizes_are_about_right(column: int, names: tuple[str, ...]) -> None:
    """The sizes in the table of stores are those of what is installed here, give or take a half."""
    cells = next(cells for cells in rows(section("Which store")) if cells[0] == "install size")
    listed = float(cells[column].removesuffix(" MB"))
    assert listed == pytest.approx(sum(installed("attrs", "cachetools", *names).values()) / 1e6, rel=0.5)


def test_every_extra_is_listed() -> None:
    """The table of extras lists every extra, with what it brings."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    listed = {cells[0].strip("`"): cells[1].lower() for cells in rows(section("Install and try"))}
    assert listed == {name: ", ".join(Requirement(line).name for line in extras[name]) for name in extras}


def test_every_span_and_metric_is_listed() -> None:
    """The tables of spans and metrics list every span of a store, and every metric with its labels."""
    prometheus = pytest.importorskip(
        "prometheus_client", reason="needs prometheus_client, the extra [metrics]"
    )
    listed = rows(section("Seen in production"))
    spans = {
        f"{line[0].split('`')[1].rpartition('.')[0]}.{name.rpartition('.')[2]}"
        for line in listed[:3]
        for name in line[0].split("`")[1::2]
    }
    assert set(attuned_store.SPANS.values()) <= spans
    attuned_store.MemoryStore()
    ours = [
        each for each in prometheus.REGISTRY._collector_to_names if isinstance(each, attuned_store.Metrics)
    ]
    families = [family for each in ours for family in each.collect()]
    found = {each.name: set(getattr(each, "_labelnames", ())) for each in families}
    named = {
        cells[0].strip("`").removesuffix("_total"): set(re.findall(r"\w+", cells[1])) for cells in listed[3:]
    }
    assert named == found


def test_files_that_are_named_are_there() -> None:
    """Every file of the project that the page names exists."""
    named = set(re.findall(r"`((?:tests|bench)/[\w/.]*)`", README))
    assert len(named) >= 3
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_figures_of_the_limits_are_those_of_the_file() -> None:
    """The numbers that the limits name are the ones that the file works with."""
    limits = " ".join(section("Limits").split())
    assert f"a flush after every {attuned_store.EdgeEngine._FLUSH_EVERY:,} changes" in limits
    assert f"after at least {attuned_store.EdgeEngine._REBUILD_EVERY:,} changes" in limits
    assert f"a user id is at most {attuned_store.MAX_USER_ID_BYTES} bytes" in limits
    assert f"a store has at most {attuned_store.MAX_AXES:,} axes" in limits

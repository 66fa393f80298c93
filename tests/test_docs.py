"""docs/: what the pages show is run, and what they list is compared with the library."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from command import main
from conformance import needs
from embedding_server import EmbeddingServer
from packaging.requirements import Requirement
from pages import NAMES, ROOT, SERVER, Page, Reader, headings, links, rows

import attuned_store
from attuned_store import MemoryStoreConfig, QdrantStoreConfig, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

SAMPLE = Path("tests", "data", "film_mood.csv")

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


def options() -> dict[str, tuple[str, str]]:
    """The options that the configuration tables list, each with its variable and default."""
    listed = rows(Page("docs/configuration.md").text)
    assert len({option for option, *_ in listed}) == len(listed), "an option is listed twice"
    return {
        option.strip("`"): (variable.strip("`"), default.strip("`"))
        for option, variable, default, _ in listed
    }


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
def embedding_server() -> Iterator[EmbeddingServer]:
    server = EmbeddingServer()
    yield server
    server.close()


def reading(name: str) -> Any:
    """A page to be read; a recipe, or one with programs of its own, on one Python alone."""
    page = Page(name)
    needs = page.needs()
    marks = [pytest.mark.skipif(bool(needs), reason=f"needs {', '.join(needs)}")]
    if name.startswith("docs/recipes/") or any(block.file for block in page.blocks()):
        marks.append(pytest.mark.once)
    return pytest.param(page, id=name, marks=marks)


@pytest.mark.parametrize("page", [reading(name) for name in NAMES if Page(name).blocks()])
def test_what_a_page_shows_happens(
    page: Page,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Every block of a page, from above to below, runs without a warning and prints what is shown."""
    server = request.getfixturevalue("server").url if SERVER in page.text else SERVER
    if "OPENAI_API_KEY" in page.text:
        monkeypatch.setenv("OPENAI_BASE_URL", request.getfixturevalue("embedding_server").url)
        monkeypatch.setenv("OPENAI_API_KEY", "a key")
    Reader(page, monkeypatch, tmp_path_factory.mktemp("programs"), server).read()


def test_the_pages_have_what_is_to_be_run() -> None:
    """Blocks are found in README.md and in most pages."""
    found = {name: len(Page(name).blocks()) for name in NAMES}
    assert len([name for name, number in found.items() if number]) >= 14
    assert sum(found.values()) >= 35
    assert found["README.md"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    """Every file and every heading that a page refers to is there."""
    for path, heading in links(Page(name)):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        if heading:
            assert heading in headings(target.read_text("utf-8")), f"{path}#{heading}"


@pytest.mark.once
@needs("matplotlib")
def test_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    """docs/pictures.py draws each picture that is kept, with the same words."""
    kept = ROOT / "docs" / "pictures"
    subprocess.run([sys.executable, ROOT / "docs" / "pictures.py", tmp_path], check=True)

    def words(picture: Path) -> list[str]:
        return re.findall(r"<text[^>]*>([^<]*)</text>", picture.read_text("utf-8"))

    assert [path.name for path in sorted(kept.iterdir())] == ["history.svg"]
    assert words(tmp_path / "history.svg") == words(kept / "history.svg") != []


def test_every_page_is_linked_from_readme() -> None:
    """Whoever begins with README.md finds every page."""
    assert {path for path, _ in links(Page("README.md"))} >= {name for name in NAMES if name != "README.md"}


def test_every_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The page on the command line names every command that there is."""
    assert main(["--help"]) == 0
    commands = re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    assert len(commands) >= 12
    missing = [
        name for name in commands if not re.search(rf"(`|mood ){name}\b", Page("docs/command.md").text)
    ]
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
    common = (
        Page("docs/configuration.md").text.partition("For all stores:")[2].partition("For stores on disk")[0]
    )
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
    """The pages name every variable that is read, and no other."""
    text = "".join(Page(name).text for name in NAMES)
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
    assert set(re.findall(r"\b(?:ATTUNED_STORE|QDRANT)(?:_[A-Z]+)*\b", text)) == asked


def test_every_error_is_listed() -> None:
    """The table of errors lists every public one, with what else it is."""
    listed = {error.strip("`"): base.strip("`") for error, base, _ in rows(Page("docs/errors.md").text)}
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
    found = re.search(
        r"^# /// script\n((?:# .*\n)+?)# ///\n", Page("docs/recipes/script.md").text, re.MULTILINE
    )
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
    cells = next(cells for cells in rows(Page("docs/engines.md").text) if cells[0] == "install size")
    listed = float(cells[column].removesuffix(" MB"))
    assert listed == pytest.approx(sum(installed("attrs", "cachetools", *names).values()) / 1e6, rel=0.5)


def test_every_span_and_metric_is_listed() -> None:
    """The tables of spans and metrics list every span of a store, and every metric with its labels."""
    prometheus = pytest.importorskip(
        "prometheus_client", reason="needs prometheus_client, the extra [metrics]"
    )
    listed = rows(Page("docs/operations.md").section("Seen in production"))
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
    """Every file of the project that the pages name exists."""
    named = set(re.findall(r"`((?:tests|bench|docs)/[\w/.]*)`", "".join(Page(name).text for name in NAMES)))
    assert len(named) >= 3
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_figures_of_the_limits_are_those_of_the_file() -> None:
    """The numbers that the pages name as limits are the ones that the file works with."""
    limits = " ".join((Page("docs/engines.md").text + Page("docs/states.md").text).split())
    assert f"a flush after every {attuned_store.EdgeEngine._FLUSH_EVERY:,} changes" in limits
    assert f"after at least {attuned_store.EdgeEngine._REBUILD_EVERY:,} changes" in limits
    assert f"user id is at most {attuned_store.MAX_USER_ID_BYTES} bytes" in limits
    assert f"a store has at most {attuned_store.MAX_AXES:,} axes" in limits

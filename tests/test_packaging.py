"""What is shipped: one file as a typed package, with the version that it says itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import BytesParser
from importlib import metadata
from pathlib import Path, PurePosixPath

import pytest

import attuned_store

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = "ATTUNED_TEST_WHEEL" in os.environ

installed = pytest.mark.skipif(
    not INSTALLED, reason="only where the wheel is installed (tox environment wheel)"
)


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a wheel or an sdist of `source` as an installer would, without its virtual environment."""
    code = f"import sys, hatchling.build as b; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target / done.stdout.split()[-1]


def files(wheel: Path) -> set[str]:
    """Name the files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what is packaged, so that nothing another test leaves in the folder can be in it."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(
        ROOT,
        folder,
        ignore=shutil.ignore_patterns(".git", ".tox", ".venv", ".*cache", ".hypothesis"),
        dirs_exist_ok=True,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of the checkout."""
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the sdist of the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", checkout, folder)) as archive:
        for member in archive:  # extractall's filter is missing from Python 3.11.2, and a must from 3.12 on
            content = archive.extractfile(member)
            if content is not None:
                (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / member.name).write_bytes(content.read())
    return folder / f"attuned_store-{attuned_store.__version__}"


def test_wheel_holds_one_typed_package_and_nothing_else(wheel: Path) -> None:
    """The wheel holds the file, its marker for type checkers, the command and its description."""
    info = f"attuned_store-{attuned_store.__version__}.dist-info"
    assert files(wheel) == {
        "attuned_store/__init__.py",
        "attuned_store/__main__.py",
        *(f"attuned_store/cli/{path.name}" for path in (ROOT / "src" / "attuned" / "cli").glob("*.py")),
        "attuned_store/py.typed",
        f"{info}/METADATA",
        f"{info}/RECORD",
        f"{info}/WHEEL",
        f"{info}/entry_points.txt",
        f"{info}/licenses/LICENSE",
    }
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_holds_the_file_as_it_is(wheel: Path) -> None:
    """The packaged file is the file of the checkout, byte for byte."""
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("attuned_store/__init__.py") == (ROOT / "attuned_store.py").read_bytes()


def test_wheel_runs_as_a_module_and_as_a_command(wheel: Path, tmp_path: Path) -> None:
    """From the wheel alone both `python -m attuned_store` and the entry point run the command."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)  # noqa: S202 - built by this test
    (points,) = tmp_path.glob("*.dist-info/entry_points.txt")
    assert "attuned-store = attuned_store.cli:main" in points.read_text()
    called = "import sys; from attuned_store.cli import main; sys.exit(main())"
    for words in (["-m", "attuned_store"], ["-m", "attuned_store.cli"], ["-c", called]):
        done = subprocess.run(
            [sys.executable, *words, "--version"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.stdout, done.stderr) == (f"attuned-store {attuned_store.__version__}\n", "")


def test_wheel_says_what_the_file_says(wheel: Path) -> None:
    """The version is the file's, and the licence and the Pythons are named."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        fields = BytesParser().parsebytes(archive.read(name))
    assert fields["Version"] == attuned_store.__version__
    assert fields["License-Expression"] == "MIT"
    assert fields["Requires-Python"] == ">=3.11"


def test_sdist_holds_what_the_tests_need(sdist: Path) -> None:
    """From the sdist one can run the tests, and build the same wheel."""
    present = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    wanted = {
        "attuned_store.py",
        "src/attuned/py.typed",
        "src/make.py",
        "docs/architecture.md",
        "pyproject.toml",
        "tox.ini",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        ".ci/run",
    }
    assert wanted <= present
    for folder in ("tests", "src"):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")} <= present


def test_wheel_of_the_sdist_is_the_wheel_of_the_checkout(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    """Nothing that the wheel needs is missing from the sdist."""
    assert files(build("wheel", sdist, tmp_path)) == files(wheel)


def test_changelog_knows_the_version() -> None:
    """The changelog has an entry for this version."""
    assert re.search(
        rf"^## .*\b{re.escape(attuned_store.__version__)}\b",
        (ROOT / "CHANGELOG.md").read_text("utf-8"),
        re.MULTILINE,
    )


def test_every_dependency_has_a_lower_bound() -> None:
    """An environment with the lowest versions declared can be made."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    assert all(re.match(r"[a-z-]+>=\d", line) for line in [*project["dependencies"], *extras])


def test_the_extra_is_what_is_tested() -> None:
    """The lower bounds of the extra are those of the tests."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert set(settings["project"]["optional-dependencies"]["http"]) < set(
        settings["dependency-groups"]["http"]
    )


@installed
def test_installed_package_is_the_one_tested() -> None:
    """The environment for the wheel tests the wheel, not the checkout."""
    place = Path(str(attuned_store.__file__)).resolve()
    assert place.name == "__init__.py"
    assert ROOT not in place.parents or "site-packages" in place.parts
    assert (place.parent / "py.typed").is_file()


@installed
def test_installed_version_is_the_files() -> None:
    """What the installer knows is what the module says."""
    assert metadata.version("attuned-store") == attuned_store.__version__


@installed
def test_installed_files_are_the_package_and_its_command() -> None:
    """Nothing lands beside the package but its command."""
    shipped = {PurePosixPath(path) for path in metadata.files("attuned-store") or ()}
    places = {path.parts[0] for path in shipped}
    assert places == {"..", "attuned_store", f"attuned_store-{attuned_store.__version__}.dist-info"}
    assert {path.name for path in shipped if path.parts[0] == ".."} == {"attuned-store"}


@installed
def test_installed_command_starts() -> None:
    """The command is there and answers."""
    command = Path(sys.executable).parent / "attuned-store"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "import" in done.stdout

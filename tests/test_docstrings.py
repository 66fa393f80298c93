"""Every public name says what it does."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import attuned_store

if TYPE_CHECKING:
    from collections.abc import Iterator

CONSTANTS = {"ANY", "CANONICAL_AXES"}  # said in a comment and in the docstrings of what they are for


def public() -> Iterator[tuple[str, Any]]:
    """The public names of the file, and those of its classes."""
    for name in attuned_store.__all__:
        value = getattr(attuned_store, name)
        if name in CONSTANTS:
            continue
        yield name, value
        if isinstance(value, type):
            for attribute, member in vars(value).items():
                member = member.__func__ if isinstance(member, classmethod) else member  # noqa: PLW2901
                member = member.fget if isinstance(member, property) else member  # noqa: PLW2901
                if not attribute.startswith("_") and inspect.isfunction(member):
                    yield f"{name}.{attribute}", member


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    """Every public class, function and method says what it does, in a first sentence on one line."""
    missing = [
        name
        for name, value in public()
        if not re.match(
            r"\S.*[.;:]",
            (vars(value) if isinstance(value, type) else {"__doc__": value.__doc__})["__doc__"] or "",
        )
    ]
    assert missing == []


def test_a_reference_to_another_docstring_leads_to_one() -> None:
    """A docstring that says "See StateStore.get_latest" names a method that has one."""
    found = [
        reference
        for _, value in public()
        for reference in re.findall(r"See (\w+)\.(\w+)", value.__doc__ or "")
    ]
    assert len(found) > 20
    for owner, name in found:
        member = inspect.getattr_static(getattr(attuned_store, owner), name)
        assert member.__doc__
        assert not member.__doc__.startswith("See ")


def test_every_parameter_is_spoken_of() -> None:
    """The docstring of a public function or of an operation of a store speaks of its parameters."""
    plain = {
        "self",
        "user_id",
        "snapshot",
        "snapshots",
        "user_ids",
        "options",
        "fields",
        "store",
        "path",
        "target",
        "source",
        "query",
    }
    contract = [*inspect.getmembers(attuned_store.StateStore, inspect.isfunction)]
    functions = [(name, value) for name, value in public() if inspect.isfunction(value) and "." not in name]
    missing = [
        f"{name}({parameter})"
        for name, value in [*contract, *functions]
        if not name.startswith("_") and not re.match(r"As |See |The asynchronous", value.__doc__ or "")
        for parameter in inspect.signature(value).parameters
        if parameter not in plain and parameter not in (value.__doc__ or "")
    ]
    assert missing == []

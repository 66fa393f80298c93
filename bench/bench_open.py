"""How long it takes until a store on disk answers its first question, and how much of the disk it takes."""

from __future__ import annotations

from itertools import repeat
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Race
    from contenders import Contender


@pytest.mark.families("embedded")
def test_opening(race: Race) -> None:
    """Each is opened and asked for one user; it was closed before the clock ran."""
    user_id = race.lineup.people.ids[0]

    def opening(contender: Contender) -> Callable[[list[Any]], object] | None:
        if contender.path is None:
            return None

        def opened(_: list[Any]) -> None:
            contender.open()
            if contender.get is None:
                contender.run(contender.async_get(user_id))
            else:
                contender.get(user_id)

        return opened

    rounds = 5 if race.lineup.people.number > 10_000 else 15
    outcome = race.run(
        "opening", opening, lambda _: repeat(None), before=methodcaller("close"), most_calls=1, rounds=rounds
    )
    race.target("opening edge", outcome, ("attuned edge", "bare edge"), most=1.3)
    race.target("opening local", outcome, ("attuned local", "bare qdrant-client local"), most=1.3)


@pytest.mark.families("embedded")
def test_bytes_on_disk(race: Race) -> None:
    """Blocks taken by the files of a closed store; holes take none."""
    sizes: dict[str, float] = {}
    for name, contender in race.lineup.contenders.items():
        if contender.path is not None:
            contender.close()
            sizes[name] = bytes_at(contender.path) / race.lineup.people.number
            contender.open()
    race.benchmark.pedantic(lambda: None)
    race.record("bytes on disk per user", "B", sizes)


def bytes_at(path: Path) -> int:
    """What a directory takes, or the files whose names begin with a path."""
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())

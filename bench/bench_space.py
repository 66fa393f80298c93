"""How much memory a user takes in the memory store, beside a dict, a Lock and a deque."""

from __future__ import annotations

import gc
import tracemalloc
from typing import TYPE_CHECKING, Any

from contenders import START_MS, Contender, Floor, OursInMemory, People, Place, axes_of

from attuned_store import StateSnapshot

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from conftest import Table

USERS = 10_000
STATES = 10


def test_bytes_in_memory(benchmark: Any, table: Table, tmp_path: Path, loop: asyncio.Runner) -> None:
    """What is allocated for ten states of each user, the states themselves included."""
    place = Place(tmp_path, loop)
    kinds = Floor, OursInMemory
    floor, ours = (
        benchmark.pedantic(taken_by, args=(kind, place)) if kind is OursInMemory else taken_by(kind, place)
        for kind in kinds
    )
    note = f"store {ours:,.0f} B, floor {floor:,.0f} B a user"
    table.add("memory, bytes a user", ours / floor, "x floor", most=1.3, note=note)


def taken_by(kind: type[Contender], place: Place) -> float:
    contender = kind(place)
    contender.open()
    ids = People(USERS).ids
    shapes = [dict(axes_of(shape)) for shape in range(984)]
    gc.collect()
    tracemalloc.start()
    try:
        for age in range(STATES):
            for position, user_id in enumerate(ids):
                axes = shapes[(position + age) % len(shapes)]
                contender.put(StateSnapshot(user_id, axes, START_MS + age))
        return tracemalloc.get_traced_memory()[0] / USERS
    finally:
        tracemalloc.stop()
        contender.close()

"""Run by the tox environment `vendored`: the one file in an empty folder, with attrs and cachetools alone.

Not a pytest file: the environment has no pytest. `python -I tests/vendored.py` copies the file, imports the
copy and uses the memory store, both forms of it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

FILE = Path(__file__).resolve().parent.parent / "attuned_store.py"
ABSENT = ("anyio", "httpx", "numpy", "opentelemetry", "prometheus_client", "qdrant_client", "qdrant_edge")


def check(folder: Path) -> None:
    """Use the copy in `folder` as a script that holds it would."""
    sys.path.insert(0, str(folder))
    import attuned_store as a

    assert a.__file__ is not None
    assert Path(a.__file__).parent == folder, a.__file__

    early = a.StateSnapshot("ann", {"warmth": 0.25}, 1_000)
    late = a.StateSnapshot("ann", {"warmth": 0.75}, 2_000)
    other = a.StateSnapshot("bob", {"warmth": 0.875, "formality": 0.5}, 3_000)
    with a.open_store("memory://") as store:
        assert store.upsert_many([late, early, other]) == 3
        assert store.get_latest("ann") == late
        assert store.get_history("ann") == [late, early]
        assert [match.snapshot.user_id for match in store.search_similar("ann")] == ["bob"]
        assert store.patch("ann", {"warmth": 0.5}).axis("warmth") == 0.5
        assert sorted(store.users()) == ["ann", "bob"]
        assert store.delete("bob")
        assert store.count() == 1
        assert store.health().status == "healthy"

    asyncio.run(check_async(a))

    try:
        a.QdrantStore(path=folder / "state")
    except a.MissingDependencyError as error:
        assert "qdrant" in str(error)  # noqa: PT017 - there is no pytest here
    else:
        raise AssertionError("an embedded store opened without its library")
    assert not (folder / "state").exists()


async def check_async(a: ModuleType) -> None:
    """Do the same with the asynchronous form."""
    async with a.open_async_store("memory://") as store:
        snapshot = a.StateSnapshot("ann", {"warmth": 0.25}, 1_000)
        await store.upsert_latest(snapshot)
        assert await store.get_latest("ann") == snapshot
        assert [user async for user in store.users()] == ["ann"]
        assert await store.delete("ann")


def main() -> None:
    """Copy, check and say so."""
    found = [name for name in ABSENT if importlib.util.find_spec(name)]
    assert not found, f"this environment is not bare: {', '.join(found)}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copy(FILE, folder)
        check(folder)


if __name__ == "__main__":
    main()

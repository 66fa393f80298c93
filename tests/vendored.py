"""Run by the tox environments `vendored-*`: the one file in an empty folder, with what one engine needs.

Not a pytest file: the environments have no pytest. `python -I tests/vendored.py ENGINE` copies the file
beside a script, the same one for every engine, and compares what that prints. Then it asks for what is not
installed: each time one line has to say what to install.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "attuned_store.py"
ABSENT = {
    "memory": (
        "anyio",
        "httpx",
        "numpy",
        "opentelemetry",
        "prometheus_client",
        "qdrant_client",
        "qdrant_edge",
    ),
    "edge": ("httpx", "opentelemetry", "prometheus_client", "qdrant_client", "starlette"),
    "local": ("opentelemetry", "prometheus_client", "qdrant_edge", "starlette"),
}

SCRIPT = """
import asyncio
import sys

from attuned_store import StateSnapshot, averify_snapshot, open_async_store, open_store

early = StateSnapshot("ann", {"warmth": 0.25}, 1_000)
late = StateSnapshot("ann", {"warmth": 0.75}, 2_000, "inferred", 0.5)
other = StateSnapshot("bob", {"warmth": 0.875, "formality": 0.5}, 3_000)


async def main(target):
    async with open_async_store(target) as store:
        await store.upsert_many([early, other])
        await store.upsert_latest(late)
        print(await store.get_latest("ann"))
        print(await store.delete("bob"), await store.count())
        report = await store.create_snapshot(sys.argv[2])
        await store.upsert_latest(other)
        await store.restore_snapshot((await averify_snapshot(report.path)).path)
        print(await store.count(), report.points)


asyncio.run(main(sys.argv[1]))
with open_store(sys.argv[1]) as store:
    store.upsert_many([late, early, other])
    history = [snapshot.to_dict() for snapshot in store.get_history("ann")]
    print([tuple(each.values())[1:5] for each in history])
    print([(match.snapshot.user_id, round(match.score, 4)) for match in store.search_similar("ann")])
    print(store.patch("ann", {"formality": 0.5}, updated_at_unix_ms=4_000).axes)
    print(sorted(store), store.count(history=True), store["bob"] == other)
    report = store.create_snapshot(sys.argv[2])
    print(store.delete("bob"), len(store), store.health().status)
    store.restore_snapshot(report.path)
    print(sorted(store), report.points)
"""
PRINTS = """
StateSnapshot('ann', {'warmth': 0.75}, 1970-01-01T00:00:02.000Z, source='inferred', confidence=0.5, \
schema_version=1)
True 1
1 2
[({'warmth': 0.75}, 2000, 'inferred', 0.5), ({'warmth': 0.25}, 1000, 'self_report', 1.0)]
[('bob', 1.0)]
Axes({'warmth': 0.75, 'formality': 0.5})
['ann', 'bob'] 4 True
True 1 healthy
['ann', 'bob'] 4
"""

# What is asked for where it is not installed, and the word that the one line must have.
MISSING = {
    "memory": {
        "a.QdrantStore(path='state')": "pip install qdrant-edge-py",
        "a.QdrantStore(url='http://127.0.0.1:1')": "pip install qdrant-client",
    },
    "edge": {
        "a.QdrantStore(path='other', engine='local')": "pip install qdrant-client",
        "a.QdrantStore(url='http://127.0.0.1:1')": "pip install qdrant-client",
    },
    "local": {"a.QdrantStore(path='other', engine='edge')": "pip install qdrant-edge-py"},
}
EVERYWHERE = {
    "a.snapshot_app(a.MemoryStore())": "pip install starlette",
    "a.service_app(a.MemoryStore())": "pip install starlette",
}
ASK = """
import sys
import attuned_store as a
try:
    eval(sys.argv[1])
except a.MissingDependencyError as error:
    print(error)
"""


def run(folder: Path, code: str, *arguments: str) -> str:
    """What a script beside the copied file prints."""
    script = folder / "script.py"
    script.write_text(code, "utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-W", "error", script, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def check(engine: str, folder: Path) -> None:
    """Use the copy in the folder as a script that holds it would."""
    shutil.copy(FILE, folder)
    target = "memory://" if engine == "memory" else str(folder / "states")
    assert run(folder, SCRIPT, target, str(folder / "backups")) == PRINTS.lstrip("\n")
    for asked, advice in {**MISSING[engine], **EVERYWHERE}.items():
        said = run(folder, ASK, asked)
        assert advice in said, (asked, said)
        assert said.count("\n") == 1, said
    assert not (folder / "state").exists()
    assert not (folder / "other").exists()


def main() -> None:
    """Copy, check and say so."""
    engine = sys.argv[1]
    found = [name for name in ABSENT[engine] if importlib.util.find_spec(name)]
    assert not found, f"this environment is not bare: {', '.join(found)}"
    with tempfile.TemporaryDirectory() as name:
        check(engine, Path(name).resolve())
    sys.stdout.write(f"the copied file works with {engine} alone\n")


if __name__ == "__main__":
    main()

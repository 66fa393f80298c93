"""Which embedded engine a directory belongs to."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal, cast

from attuned.base.config import absolute_path
from attuned.base.disk import read_manifest
from attuned.base.errors import MissingDependencyError, SchemaMismatchError, StoreError
from attuned.engines.edge import EdgeEngine, import_qdrant_edge
from attuned.engines.local import LocalEngine, import_qdrant_local

if TYPE_CHECKING:
    from pathlib import Path

    from attuned.base.config import QdrantStoreConfig


def engine_class(path: Path, config: QdrantStoreConfig) -> type[EdgeEngine | LocalEngine]:
    """The engine that wrote a directory, or the one for a new one; its library is there."""
    written = engine_of(path)
    if written is not None and config.engine not in ("auto", written):
        raise SchemaMismatchError(
            f'{path}: written by engine="{written}", not by "{config.engine}"; '
            f'open it with engine="auto", or export it and import that elsewhere'
        )
    engine = written or config.engine
    if engine == "local":
        import_qdrant_local()
        return LocalEngine
    try:
        import_qdrant_edge()
    except MissingDependencyError:
        if engine == "auto":
            with contextlib.suppress(MissingDependencyError):
                import_qdrant_local()
                return LocalEngine
        raise
    return EdgeEngine


def engine_of(path: Path) -> Literal["edge", "local"] | None:
    """The engine whose files a directory holds; None for neither."""
    try:
        edge, local = (path / "collections").exists(), (path / "meta.json").exists()
        shards = (path / "collections").iterdir() if edge else ()
        found = [each for each in shards if each.is_dir() and each.name[0] != "."]
        manifests = {each.with_name(each.name.partition("@")[0] + ".json") for each in found}
        foreign = bool(found) and not any(manifest.exists() for manifest in manifests)  # ours come first
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    if edge and local:
        raise StoreError(f"{path}: holds the files of two engines (collections/ of edge, meta.json of local)")
    if foreign:
        raise StoreError(f"{path}: holds collections of something else, such as a Qdrant server")
    return "edge" if edge else "local" if local else None


def collection_exists(config: QdrantStoreConfig) -> bool:
    """Whether a directory holds the collection, as far as can be seen without opening it."""
    path = absolute_path(cast("str", config.path))
    match engine_of(path):
        case "edge":
            return (path / "collections" / f"{config.collection_name}.json").exists()
        case "local":
            return config.collection_name in read_manifest(path / "meta.json").get("collections", {})
        case None:
            return False

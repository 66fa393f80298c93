"""Stores by their address."""

from __future__ import annotations

import os
import re
from typing import Any, Unpack, cast

import attrs

from attuned.base.config import (
    MemoryOptions,
    MemoryStoreConfig,
    QdrantOptions,
    QdrantStoreConfig,
    absolute_path,
    check_path,
    shown_url,
)
from attuned.base.errors import ValidationError
from attuned.engines.embedded import collection_exists
from attuned.stores import (
    AsyncMemoryStore,
    AsyncQdrantStore,
    AsyncStateStore,
    MemoryStore,
    QdrantStore,
    StateStore,
)

_DEFAULT_TARGET = "./attuned_state"
_BARE_ADDRESS = re.compile(r":?[\w.-]{2,}:(?=\d|/|$)")  # localhost:6333, :memory: or file:/mood, not C:\mood


def target_options(target: str | os.PathLike[str] | None) -> tuple[bool, dict[str, Any]]:
    """Whether a target is memory, and otherwise the path or url that it means."""
    text = target if target is not None else default_target()
    if not isinstance(text, str):
        return False, {"path": check_path(text), "url": None}
    scheme, separator, rest = text.partition("://")
    if not separator and not _BARE_ADDRESS.match(text):
        return False, {"path": text, "url": None}
    match scheme.lower():
        case "memory" if rest in ("", "/"):
            return True, {}
        case "file":
            from urllib.request import url2pathname  # a third of the time of importing this file

            return False, {"path": url2pathname(rest), "url": None}
        case "http" | "https":
            return False, {"path": None, "url": text}
        case _:
            pass
    raise ValidationError(
        f"target: {shown_url(text)} is not understood; use memory://, a path such as ./mood, file://<path>, "
        "http://<host>:6333 or https://<host>:6333"
    )


def default_target() -> str:
    """What open_store opens without a target."""
    named = (
        os.environ.get(name, "").strip() for name in ("ATTUNED_STORE", "QDRANT_URL", "ATTUNED_STORE_PATH")
    )
    return next(filter(None, named), _DEFAULT_TARGET)


def open_store(target: str | os.PathLike[str] | None = None, **options: Unpack[QdrantOptions]) -> StateStore:
    """A synchronous store: "memory://", a path or "file://<path>", or "http(s)://<host>:6333".

    Without a target: what ATTUNED_STORE names, else QDRANT_URL, else ATTUNED_STORE_PATH, else
    ./attuned_state. Options are the fields
    of the store's configuration; those not given come from the environment (see from_env). Raises
    ValidationError for a target of another kind, and what the store raises on opening.
    """
    in_memory, place = target_options(target)
    if in_memory:
        return MemoryStore(MemoryStoreConfig.from_env(), **cast("MemoryOptions", options))
    return QdrantStore(attrs.evolve(QdrantStoreConfig.from_env(), **place), **options)


def open_async_store(
    target: str | os.PathLike[str] | None = None, **options: Unpack[QdrantOptions]
) -> AsyncStateStore:
    """The asynchronous store for a target, as open_store; not to be awaited: it opens when first used."""
    in_memory, place = target_options(target)
    if in_memory:
        return AsyncMemoryStore(MemoryStoreConfig.from_env(), **cast("MemoryOptions", options))
    return AsyncQdrantStore(attrs.evolve(QdrantStoreConfig.from_env(), **place), **options)


def store_exists(target: str | os.PathLike[str] | None = None) -> bool:
    """Whether there is a store at a target, so that open_store would not make a new one.

    False for "memory://"; True for a server that cannot be asked, so that opening tells why.
    """
    in_memory, place = target_options(target)
    if in_memory:
        return False
    config = attrs.evolve(QdrantStoreConfig.from_env(), **place)
    if config.url is None:
        return collection_exists(config) or absolute_path(cast("str", config.path)).is_file()
    with QdrantStore(config) as store:
        health = store.health()
        return health.status == "unhealthy" or health.collection_status is not None

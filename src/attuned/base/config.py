"""How stores are configured: options, their checks, and the environment."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, TypeVar
from urllib.parse import urlsplit

import attrs

from attuned.base.errors import ValidationError, brief, type_name
from attuned.base.values import MAX_INTEGER, MAX_VECTOR_SIZE, check_integer, check_number, shape_of

TRUE_WORDS = frozenset({"true", "1", "yes", "y", "on"})
_LOOPBACK = re.compile(r"127(?:\.\d+){3}|::1")
HEADER_TEXT = re.compile(r"[!-~]+")
_HOST = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::\d+)?")  # with its port
_MAX_FACTOR = 2**31 - 1
_COLLECTION_NAME = re.compile(r"[^\W.-][\w.-]{0,199}")  # it names files on disk
FALSE_WORDS = frozenset({"false", "0", "no", "n", "off"})
DEFAULT_COLLECTION = "attuned_state"


# Qdrant Edge writes through memory maps, where a full disk is a signal that ends the process. With another
# process filling the disk at the same time, 16 MiB were too few in 2 of 24 runs, 64 MiB in none.
MIN_FREE_BYTES = 64 << 20


def is_loopback(host: str) -> bool:
    """Whether a host, a name or an address, is this machine and can be reached from no other."""
    return host == "localhost" or _LOOPBACK.fullmatch(host) is not None


def check_axis_names(value: Iterable[str] | None) -> tuple[str, ...] | None:
    """Names of axes as a tuple of plain strings; None for those of the store."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValidationError(f"axes: names are needed, such as a tuple of strings; got {brief(value)}")
    try:
        names = shape_of(tuple(value)).names
    except TypeError:
        raise ValidationError(f"axes: strings are needed as names, got {brief(value)}") from None
    if len(set(names)) != len(names):
        raise ValidationError(f"axes: each name once, got {brief(names)}")
    if not names:
        raise ValidationError("axes: at least one name, or None for those of the store")
    return names


def check_path(value: str | os.PathLike[str]) -> str:
    """A path as a string, or ValidationError."""
    try:
        path = os.fspath(value)
        encoded = os.fsencode(path)
    except (TypeError, UnicodeEncodeError):  # a lone surrogate is in no path
        path, encoded = None, b""
    if isinstance(path, str) and encoded and b"\0" not in encoded:
        return path
    raise ValidationError(f"path: a directory is needed, got {brief(value)}")


def check_verify(value: bool | str | os.PathLike[str]) -> bool | str:  # noqa: FBT001 - it is a value
    """True, False, or the path of a certificate as a string; ValidationError for what is neither."""
    if isinstance(value, bool):
        return value
    try:
        return check_path(value)
    except ValidationError:
        raise ValidationError(f"verify: True, False or a path is needed, got {brief(value)}") from None


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """A path as it is meant now: absolute, with ~ expanded."""
    expanded = os.path.expanduser(check_path(path))  # noqa: PTH111 - Path.expanduser raises for an unknown user
    return Path(expanded).absolute()


def shown_url(url: str) -> str:
    """A url, or what was meant as one, for an error message: without what may be a secret."""
    return brief(re.sub(r"[?#].*", "?…", re.sub(r"//.*@", "//…@", url, flags=re.DOTALL), flags=re.DOTALL))


def _check_url(url: object) -> None:
    if not isinstance(url, str):
        raise ValidationError(f"url: a string is needed, got {type_name(url)}")
    if "@" in url:  # whatever stands before it may be a secret
        raise ValidationError(
            "url: must not hold a user or password, got one with @; give the key as api_key"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValidationError(f"url: not a url, got {shown_url(url)}") from None
    usual = parts.scheme in ("http", "https") and not parts.query and not parts.fragment and port != 0
    if not usual or not parts.hostname or not _HOST.fullmatch(parts.netloc) or url.strip() != url:
        raise ValidationError(
            f"url: http://<host>:6333 or https://<host>:6333 is needed, got {shown_url(url)}"
        )


def _join_urls(value: str | Iterable[str] | None) -> Any:
    """The addresses of several nodes as one text, with commas between; what is wrong is found later."""
    if isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        return ",".join(value)
    return value


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValidationError unless a value is one of some."""
    if value not in choices:
        raise ValidationError(f"{field}: one of {', '.join(choices)} is needed, got {brief(value)}")


def check_flag(field: str, value: object) -> bool:
    """True or False, or ValidationError."""
    if isinstance(value, bool):
        return value
    raise ValidationError(f"{field}: True or False is needed, got {brief(value)}")


def check_collection_name(field: str, value: object) -> str:
    """The name of a collection, which also names its files, as a plain string."""
    if isinstance(value, str) and _COLLECTION_NAME.fullmatch(value):
        return str.__str__(value)
    raise ValidationError(
        f"{field}: 1 to 200 of letters, digits and _ - . (not in front) are needed, got {brief(value)}"
    )


def check_callable(field: str, value: object) -> None:
    """Raise ValidationError unless a value can be called."""
    if not callable(value):
        raise ValidationError(f"{field}: a function is needed, got {type_name(value)}")


def check_positive(field: str, value: object, *, zero: bool = False) -> None:
    """Raise ValidationError unless a value is a finite number above 0, or from 0."""
    number = check_number(field, value)
    if not (0 <= number < math.inf) or (number == 0 and not zero):
        raise ValidationError(
            f"{field}: a finite number {'from' if zero else 'above'} 0 is needed, got {brief(value)}"
        )


class MemoryOptions(TypedDict, total=False):
    """The fields of MemoryStoreConfig, as options of the memory stores."""

    axes: Iterable[str] | None
    vector_size: int | None
    enable_history: bool
    max_history_per_user: int
    history_retention_days: float | None
    telemetry: bool


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """How often and how patiently a request to a server is repeated.

    ``attempts`` in all; between them a random wait from 0 to ``base_s`` doubled each time, at most ``cap_s``
    (full jitter; see Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015), or
    what the server asks for with 429; none that would end later than ``deadline_s`` after the first began.
    All in seconds. Raises ValidationError.
    """

    attempts: int = 4
    base_s: float = 0.1
    cap_s: float = 5.0
    deadline_s: float = 60.0

    def __attrs_post_init__(self) -> None:
        check_integer("attempts", self.attempts, 1, 1_000)
        for field in ("base_s", "cap_s", "deadline_s"):
            check_positive(field, getattr(self, field), zero=True)


@attrs.frozen(kw_only=True)
class BreakerPolicy:
    """When a store stops asking a server that fails: after ``failures`` in a row, those of one moment as one.

    After ``first_open_s`` seconds one request is let through; it closes the breaker or opens it again, for
    twice as long each time, at most for ``open_s`` seconds. Raises ValidationError.
    """

    failures: int = 5
    open_s: float = 30.0
    first_open_s: float = 1.0

    def __attrs_post_init__(self) -> None:
        check_integer("failures", self.failures, 1, MAX_INTEGER)
        for field in ("open_s", "first_open_s"):
            check_positive(field, getattr(self, field), zero=True)


class QdrantOptions(MemoryOptions, total=False):
    """The fields of QdrantStoreConfig, as options of the Qdrant stores."""

    path: str | os.PathLike[str] | None
    url: str | Sequence[str] | None
    api_key: str | None
    collection_name: str
    engine: Literal["auto", "edge", "local"]
    durability: Literal["process", "power"]
    lock_timeout: float
    cache_size: int
    slow_operation_ms: float | None
    min_free_bytes: int
    connect_timeout: float
    request_timeout: float
    pool_size: int
    verify: bool | str | os.PathLike[str]
    cache_ttl: float
    snapshot_timeout: float
    shard_number: int | None
    replication_factor: int | None
    write_consistency_factor: int | None
    read_consistency: int | Literal["majority", "quorum", "all"] | None
    write_ordering: Literal["weak", "medium", "strong"] | None
    exact_search: bool
    retry: RetryPolicy
    breaker: BreakerPolicy


@attrs.frozen(kw_only=True)
class MemoryStoreConfig:
    """How a memory store keeps its snapshots; every field is also an option of the store.

    ``axes`` names the schema (None: the canonical ones); ``vector_size`` the dimensions of its vectors (None:
    one per axis, and a spare one with the canonical axes). History keeps the newest ``max_history_per_user``
    of each user, and shows none older than ``history_retention_days``. Without ``telemetry`` the store
    reports nothing, neither spans nor metrics. Raises ValidationError.
    """

    axes: tuple[str, ...] | None = attrs.field(default=None, converter=check_axis_names)
    vector_size: int | None = None
    enable_history: bool = True
    max_history_per_user: int = 100
    history_retention_days: float | None = None
    telemetry: bool = True

    def __attrs_post_init__(self) -> None:
        least = len(self.axes or ()) or 1
        if self.vector_size is not None:
            check_integer("vector_size", self.vector_size, least, MAX_VECTOR_SIZE)
        check_flag("enable_history", self.enable_history)
        check_flag("telemetry", self.telemetry)
        check_integer("max_history_per_user", self.max_history_per_user, 0, MAX_INTEGER)
        if self.history_retention_days is not None:
            check_positive("history_retention_days", self.history_retention_days)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The configuration that the variables ATTUNED_STORE_<FIELD> describe, in capitals.

        Lists are separated by commas. Raises ValidationError, which names the variable.
        """
        if not isinstance(environ, Mapping):
            raise ValidationError(f"environ: a mapping is needed, got {type_name(environ)}")
        found: dict[str, Any] = {}
        for field in attrs.fields(cls):
            if field.name in ("retry", "breaker"):
                continue  # more than one variable can say
            variable = _variable(field.name)
            text = environ.get(variable, "")
            if not isinstance(text, str):
                raise ValidationError(f"{variable}: a string is needed, got {type_name(text)}")
            if text.strip():
                found[field.name] = _parsed(variable, text.strip(), str(field.type))
        try:
            return cls(**found)
        except ValidationError as error:
            field_name, _, rule = str(error).partition(":")
            raise ValidationError(f"{_variable(field_name)}:{rule}") from None


@attrs.frozen(kw_only=True)
class QdrantStoreConfig(MemoryStoreConfig):
    """Where and how a Qdrant store keeps its snapshots; every field is also an option of the store.

    ``path`` is a directory (made where absent) for embedded Qdrant, ``url`` a server; ``engine`` which
    embedded form a new directory gets (auto: edge where qdrant-edge-py is installed, else local).
    ``durability`` "process" survives the death of the process, "power" a power cut too, at the cost of a
    flush, which those who write at the same time share. ``lock_timeout`` is how many seconds to wait for a
    directory that another process has open; ``cache_size`` how many snapshots the read cache holds (0: none).
    A step that takes longer than ``slow_operation_ms`` is logged as a warning (0 or None: none is). A disk
    with less than ``min_free_bytes`` free (local mode: 1 MiB at most), and room for what is to be written, is
    full: nothing is written.

    For a server: ``url``, of several nodes of a cluster a list, or a text with commas: where one cannot be
    reached, the next is asked. ``api_key``; ``connect_timeout`` and ``request_timeout`` in seconds,
    ``snapshot_timeout`` for making or restoring a native snapshot; ``pool_size``, the number of connections
    kept; ``verify``, False or the path of a CA certificate; ``cache_ttl``, the seconds for which a read may
    be answered from memory though other processes write (0: never). A collection is made with
    ``shard_number``, ``replication_factor`` and ``write_consistency_factor``; requests carry
    ``read_consistency`` and ``write_ordering``. A search looks at every state, unless ``exact_search`` is
    False: then the server's graph is asked, which is quicker with millions of users, and misses some.
    ``retry`` and ``breaker`` say what follows a failure. Raises ValidationError.
    """

    path: str | None = attrs.field(default=None, converter=attrs.converters.optional(check_path))
    url: str | None = attrs.field(default=None, converter=_join_urls)
    api_key: str | None = attrs.field(default=None, repr=False)
    collection_name: str = DEFAULT_COLLECTION
    engine: Literal["auto", "edge", "local"] = "auto"
    durability: Literal["process", "power"] = "process"
    lock_timeout: float = 0.0
    cache_size: int = 10_000
    slow_operation_ms: float | None = 100.0
    min_free_bytes: int = MIN_FREE_BYTES
    connect_timeout: float = 10.0
    request_timeout: float = 30.0
    pool_size: int = 64
    verify: bool | str = attrs.field(default=True, converter=check_verify)
    cache_ttl: float = 0.0
    snapshot_timeout: float = 600.0
    shard_number: int | None = None
    replication_factor: int | None = None
    write_consistency_factor: int | None = None
    read_consistency: int | Literal["majority", "quorum", "all"] | None = None
    write_ordering: Literal["weak", "medium", "strong"] | None = None
    exact_search: bool = True
    retry: RetryPolicy = attrs.field(factory=RetryPolicy)
    breaker: BreakerPolicy = attrs.field(factory=BreakerPolicy)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        check_collection_name("collection_name", self.collection_name)
        check_choice("engine", self.engine, ("auto", "edge", "local"))
        check_choice("durability", self.durability, ("process", "power"))
        check_positive("lock_timeout", self.lock_timeout, zero=True)
        check_integer("cache_size", self.cache_size, 0, MAX_INTEGER)
        check_integer("min_free_bytes", self.min_free_bytes, 0, MAX_INTEGER)
        if self.slow_operation_ms is not None:
            check_positive("slow_operation_ms", self.slow_operation_ms, zero=True)
        self._check_server_fields()

    def _check_server_fields(self) -> None:
        if self.url is not None:
            for url in self.url.split(",") if isinstance(self.url, str) else (self.url,):
                _check_url(url)
        key = self.api_key
        if key is not None and not (isinstance(key, str) and HEADER_TEXT.fullmatch(key)):
            raise ValidationError(
                "api_key: printable ASCII characters are needed"
            )  # the value is never shown
        for field in ("connect_timeout", "request_timeout", "snapshot_timeout"):
            check_positive(field, getattr(self, field))
        check_positive("cache_ttl", self.cache_ttl, zero=True)
        check_flag("exact_search", self.exact_search)
        check_integer("pool_size", self.pool_size, 1, 65_535)
        for field in ("shard_number", "replication_factor", "write_consistency_factor"):
            if getattr(self, field) is not None:
                check_integer(field, getattr(self, field), 1, _MAX_FACTOR)
        self._check_policies()

    def _check_policies(self) -> None:
        if isinstance(self.read_consistency, int):
            check_integer("read_consistency", self.read_consistency, 1, _MAX_FACTOR)
        elif self.read_consistency is not None:
            check_choice("read_consistency", self.read_consistency, ("majority", "quorum", "all"))
        if self.write_ordering is not None:
            check_choice("write_ordering", self.write_ordering, ("weak", "medium", "strong"))
        for field, kind in (("retry", RetryPolicy), ("breaker", BreakerPolicy)):
            value = getattr(self, field)
            if not isinstance(value, kind):
                raise ValidationError(f"{field}: a {kind.__name__} is needed, got {brief(value)}")


def _variable(field: str) -> str:
    shared = {"url": "QDRANT_URL", "api_key": "QDRANT_API_KEY", "collection_name": "QDRANT_COLLECTION"}
    return shared.get(field) or f"ATTUNED_STORE_{field.upper()}"


def _parsed(variable: str, text: str, kind: str) -> object:
    try:
        if kind.startswith("bool"):
            return {**dict.fromkeys(TRUE_WORDS, True), **dict.fromkeys(FALSE_WORDS, False)}[text.lower()]
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
    except (ValueError, KeyError):
        if "str" in kind or "Literal" in kind:
            return text  # the field says whether the text will do
        raise ValidationError(f"{variable}: {kind.partition(' ')[0]} is needed, got {brief(text)}") from None
    return tuple(name.strip() for name in text.split(",")) if kind.startswith("tuple") else text


_Config = TypeVar("_Config", bound=MemoryStoreConfig)


def make_config(kind: type[_Config], config: _Config | None, options: Mapping[str, Any]) -> _Config:
    """The configuration with these options instead of its own."""
    if not isinstance(config, kind | None):
        raise ValidationError(
            f"config: a {kind.__name__} is needed, got {type_name(config)}; a place is given by name, "
            "as in path='./mood', or to open_store"
        )
    known = [field.name for field in attrs.fields(kind)]
    for option in options:
        if option not in known:
            raise ValidationError(f"{option}: not an option here; there are {', '.join(known)}")
    return attrs.evolve(config if config is not None else kind(), **options)


def make_qdrant_config(config: QdrantStoreConfig | None, options: Mapping[str, Any]) -> QdrantStoreConfig:
    """The configuration of a Qdrant store, which has a path or a url."""
    if options.get("path") is not None:
        options = {"url": None, **options}  # what is asked for here counts, whatever the configuration says
    elif options.get("url") is not None:
        options = {"path": None, **options}
    config = make_config(QdrantStoreConfig, config, options)
    if (config.path is None) == (config.url is None):
        raise ValidationError("path, url: one of them is needed, a directory or a server")
    return config

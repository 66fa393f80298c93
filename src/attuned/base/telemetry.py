"""What stores report to, where it is installed: OpenTelemetry and prometheus_client."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import time
from bisect import bisect_left
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, cast

from attuned.base.errors import LOGGER, SLOW_LOGGER, BackendError, StoreError, T, short_id
from attuned.base.metrics import SECONDS, Metrics
from attuned.base.values import SnapshotReport, StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

# A store that reports is of a subclass whose public methods do; without the libraries, or with
# telemetry=False, it stays of its own class and nothing is in the way.

UNREPORTED = contextlib.nullcontext()

_REQUESTS = {"retrieve": "get", "write": "upsert"}  # by other names than the engines'
_SYSTEMS = dict.fromkeys(("edge", "local", "server"), "qdrant")  # the others are called as their backend
_OF_A_USER = {  # whose first parameter tells whom it is about
    "upsert_latest",
    "patch",
    "update",
    "get_latest",
    "get_history",
    "search_similar",
    "delete",
}
SPANS = {
    "upsert_latest": "attuned.store.upsert",
    "upsert_many": "attuned.store.upsert_many",
    "patch": "attuned.store.patch",
    "update": "attuned.store.update",
    "get_latest": "attuned.store.get",
    "get_many": "attuned.store.get_many",
    "get_history": "attuned.store.history",
    "search_similar": "attuned.store.search",
    "delete": "attuned.store.delete",
    "count": "attuned.store.count",
    "prune": "attuned.store.prune",
    "create_snapshot": "attuned.snapshot.create",
    "restore_snapshot": "attuned.snapshot.restore",
}


class _Observable(Protocol):
    config: Any
    _operations: Any

    @property
    def engine(self) -> str: ...


class _PublicProvider:
    """The tracer provider by the public interface of opentelemetry, which takes longer."""

    def __init__(self, trace: Any) -> None:
        self._trace = trace

    @property
    def _TRACER_PROVIDER(self) -> Any:  # noqa: N802 - stands in for that of opentelemetry
        provider = self._trace.get_tracer_provider()
        return None if isinstance(provider, self._trace.ProxyTracerProvider) else provider


def provider_source(trace: Any) -> Any:
    """What has the application's tracer provider as ``_TRACER_PROVIDER``, None where it has set none so far.

    All that is relied on beyond the public interface of opentelemetry: that opentelemetry.trace has it so.
    """
    if trace is None:
        return SimpleNamespace(_TRACER_PROVIDER=None)
    trace.get_tracer_provider()  # makes the one that OTEL_PYTHON_TRACER_PROVIDER names
    return trace if hasattr(trace, "_TRACER_PROVIDER") else _PublicProvider(trace)


class Telemetry:
    """Spans and metrics, either of which may be absent."""

    def __init__(self, trace: Any, metrics: Metrics | None) -> None:
        self.metrics = metrics
        self.source = provider_source(trace)
        self.classes: dict[type, type] = {}  # those that report here, by those that do not
        self._trace = trace
        self._tracer: tuple[Any, Any] = (None, None)  # the provider that it is from, and the tracer

    @contextlib.contextmanager
    def _span(self, name: str, attributes: Mapping[str, Any], *, request: bool = False) -> Generator[Any]:
        """A span, or None where the application has set no provider so far."""
        trace, provider = self._trace, self.source._TRACER_PROVIDER
        if provider is None:
            yield None
            return
        from attuned import __version__

        known, tracer = self._tracer
        if known is not provider:
            tracer = provider.get_tracer("attuned_store", __version__)
            self._tracer = provider, tracer
        backend = attributes["backend"]
        given = {f"attuned.{key}": value for key, value in attributes.items() if "." not in key}
        given |= {key: value for key, value in attributes.items() if "." in key}
        given |= {
            "db.system.name": _SYSTEMS.get(backend, backend),
            "db.operation.name": attributes["operation"],
        }
        with tracer.start_as_current_span(
            name,
            kind=trace.SpanKind.CLIENT if request and backend == "server" else trace.SpanKind.INTERNAL,
            attributes={key: value for key, value in given.items() if value is not None},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                kind = _reported_kind(error, request=request)
                span.set_attribute("error.type", kind.__name__)
                # Not the message: a server's answer, or a value that was refused, may hold a user id.
                meaning = (kind.__doc__ or "").partition("\n")[0] if issubclass(kind, StoreError) else ""
                span.set_status(trace.Status(trace.StatusCode.ERROR, meaning or kind.__name__))
                raise

    @contextlib.contextmanager
    def operation(self, name: str, store: _Observable, about: object) -> Generator[None]:
        """Report an operation of a store, about a user or nobody."""
        began, status, operation = time.perf_counter(), "error", name.rpartition(".")[2]
        known = {"backend": store.engine, "operation": operation, "user": id_for_logs(about)}
        try:
            with self._span(name, {**known, "db.collection.name": store._operations.collection}) as span:
                try:
                    yield
                finally:
                    if span is not None:  # an asynchronous store may have been opened only now
                        span.set_attribute("attuned.backend", store.engine)
            status = "ok"
        finally:
            if self.metrics is not None:
                series = self.metrics.operations(store.engine, operation, status)
                series.count(time.perf_counter() - began)

    @contextlib.contextmanager
    def request(self, backend: str, operation: str, attempt: int = 1) -> Generator[None]:
        """Report one try of a request to a backend."""
        began, name = time.perf_counter(), _REQUESTS.get(operation, operation.partition(" ")[0])
        metrics = self.metrics
        if metrics is not None and attempt > 1:
            metrics.series("attuned_qdrant_retries_total").count()
        try:
            attributes = {"backend": backend, "operation": name, "attempt": attempt}
            with self._span(f"attuned.qdrant.{name}", attributes, request=True):
                yield
        except BaseException as error:
            if metrics is not None:
                kind = _reported_kind(error, request=True).__name__
                metrics.series("attuned_qdrant_errors_total", name, kind).count()
            raise
        finally:
            if metrics is not None:
                series = metrics.series("attuned_qdrant_request_duration_seconds", name)
                series.count(time.perf_counter() - began)

    def noted(self, answer: T) -> T:
        """Give back what an operation answered; where it is a report of a snapshot, count that."""
        if isinstance(answer, SnapshotReport) and self.metrics is not None:
            self.metrics.series("attuned_snapshot_duration_seconds").count(answer.duration_ms / 1000)
            self.metrics.snapshot_bytes = answer.bytes or 0
        return answer


def _reported_kind(error: BaseException, *, request: bool) -> type[BaseException]:
    """What an error is called; what an engine itself raises is on its way to be a BackendError."""
    own = isinstance(error, StoreError) or not isinstance(error, Exception)
    return BackendError if request and not own else type(error)


def find_telemetry() -> Telemetry | None:
    """What the libraries that are installed offer to report to."""
    trace: Any = None
    metrics: Metrics | None = None
    with contextlib.suppress(ImportError):
        from opentelemetry import trace
    with contextlib.suppress(ImportError, ValueError):  # another copy of this library may have the names
        from prometheus_client import REGISTRY

        if {"PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"} & os.environ.keys():
            LOGGER.warning(
                "no metrics: they are counted by process, and prometheus_client is in multiprocess mode"
            )
        else:
            REGISTRY.register(found := Metrics())
            metrics = found
    return Telemetry(trace, metrics) if trace or metrics else None


class Reporting:
    """What the stores of this process report to: found when the first asks; None without either library."""

    def __init__(self) -> None:
        self.telemetry: Telemetry | None = None
        self._found = False
        self._lock = threading.RLock()

    def reporter(self, *, wanted: bool) -> Telemetry | None:
        """What to report to, for those who want to."""
        if not wanted:
            return None
        with self._lock:
            if not self._found:
                self.telemetry, self._found = find_telemetry(), True
        return self.telemetry


REPORTING = Reporting()


def report_request(
    reporter: Telemetry | None, backend: str, operation: str, attempt: int = 1
) -> contextlib.AbstractContextManager[None]:
    """Report a request to a backend, if there is anything to report to."""
    return UNREPORTED if reporter is None else reporter.request(backend, operation, attempt)


def report_slow(
    reporter: Telemetry | None, backend: str, operation: str, seconds: float, about: object
) -> None:
    """Log a step of an operation that took too long, and count it where there is anything to report to."""
    user_id = id_for_logs(about)
    whose = "" if user_id is None else f", user {user_id!r}"
    SLOW_LOGGER.warning("slow: %s took %.0f ms on %s%s", operation, seconds * 1000, backend, whose)
    if reporter is not None and reporter.metrics is not None:
        reporter.metrics.series("attuned_store_slow_operations_total", backend, operation).count()


def id_for_logs(first: object) -> str | None:
    """The beginning of the id of the user that an operation is about."""
    user_id = first.user_id if isinstance(first, StateSnapshot) else first
    if not isinstance(user_id, str):
        return None
    return short_id(user_id).encode(errors="replace").decode()  # it has not been checked


def observe(store: _Observable) -> None:
    """Let a store report its operations, or not, as its configuration says."""
    kind = reporting_class(type(store), wanted=store.config.telemetry)
    if type(store) is not kind:
        cast("Any", store).__class__ = kind


def reporting_class(kind: type[Any], *, wanted: bool) -> type[Any]:
    """The class that reports what a class of stores does, or that class itself where nothing is reported.

    ``_reports`` names its methods, ``_always_on`` the engine where that never changes, which saves asking
    each time. A store is best made of it: one whose class is set later is slower at every attribute.
    """
    kind = vars(kind).get("_reported_class", kind)
    telemetry = REPORTING.reporter(wanted=wanted)
    if telemetry is None:
        return kind
    if kind not in telemetry.classes:  # otherwise it is the same class, by name too
        members = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
        members |= {
            name: _reporting(getattr(kind, name), telemetry, kind._always_on) for name in kind._reports
        }
        members["_reported_class"] = kind
        make = cast("Any", type(kind))  # the metaclass
        telemetry.classes.setdefault(kind, make(kind.__name__, (kind,), members))
    return telemetry.classes[kind]


# A method that reports is compiled for the signature of the method: to pass on *args and **kwargs would take
# 0.2 us, twice what a read from memory does. For the same reason it does itself what Series.count does.
_REPORTING = """
{define} {name}{signature}:
    if {always}_source._TRACER_PROVIDER is not None:
        with _operation({span!r}, self, {about}):
            return _noted({call})
"""
_COUNTING = """
    _began = _clock()
    try:
        _answer = {call}
    except BaseException:
        _count(self, "error", _clock() - _began)
        raise
    _seconds = _clock() - _began
    try:
        _cell = {cells}[_thread()]
    except KeyError:
        _count(self, "ok", _seconds)
    else:
        _cell[0] += _seconds
        _cell[1 if _seconds <= {quick} else 2 if _seconds <= {short} else 1 + _bisect(_bounds, _seconds)] += 1
    return _answer
"""


def _reporting(method: Callable[..., Any], telemetry: Telemetry, backend: str) -> Callable[..., Any]:
    """A method that reports: in full where there is a tracer provider, else in numbers, at little cost."""
    name, metrics = method.__name__, telemetry.metrics
    operation = SPANS[name].rpartition(".")[2]
    cells: dict[Any, Any] = {}  # of what succeeds: by thread, or by backend and thread

    def count(store: _Observable, status: str, seconds: float) -> None:
        engine = store.engine
        series = cast("Metrics", metrics).operations(engine, operation, status)
        series.count(seconds)
        if status == "ok" and not backend:
            cells[engine] = series.cells

    if metrics is not None and backend:
        cells = metrics.operations(backend, operation, "ok").cells
    kinds, empty = inspect.Parameter, inspect.Parameter.empty
    forms: dict[Any, str] = {
        kinds.KEYWORD_ONLY: "{0}={0}",
        kinds.VAR_POSITIONAL: "*{0}",
        kinds.VAR_KEYWORD: "**{0}",
    }
    signature = inspect.signature(method)
    bare = [
        each.replace(annotation=empty, default=empty if each.default is empty else None)
        for each in signature.parameters.values()
    ]
    given = ", ".join(forms.get(each.kind, "{0}").format(each.name) for each in bare)
    waits = inspect.iscoroutinefunction(method)
    code = (_REPORTING + (_COUNTING if metrics else "    return {call}")).format(
        define="async def" if waits else "def",
        name=name,
        signature=inspect.Signature(bare),
        always="True or " if SPANS[name].startswith("attuned.snapshot.") else "",
        span=SPANS[name],
        about=bare[1].name if name in _OF_A_USER else None,
        call=f"{'await ' if waits else ''}_method({given})",
        cells="_cells" if backend else "_cells[self.engine]",
        quick=SECONDS[0],
        short=SECONDS[1],
    )
    names: dict[str, Any] = {
        "_source": telemetry.source,
        "_operation": telemetry.operation,
        "_noted": telemetry.noted,
        "_method": method,
        "_clock": time.perf_counter,
        "_count": count,
        "_cells": cells,
        "_thread": threading.get_ident,
        "_bisect": bisect_left,
        "_bounds": SECONDS,
    }
    exec(compile(code, f"<reporting {name}>", "exec"), names)  # noqa: S102 - of what stands above alone
    made: Any = functools.wraps(method)(names[name])
    made.__defaults__, made.__kwdefaults__ = method.__defaults__, method.__kwdefaults__
    return cast("Callable[..., Any]", made)

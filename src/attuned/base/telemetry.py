"""Spans of OpenTelemetry and metrics of Prometheus, where these are installed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from attuned.base.errors import BackendError, StoreError, T, short_id
from attuned.base.values import SnapshotReport, StateSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

# Spans where opentelemetry is installed, metrics where prometheus_client is. A store finds out when it is
# made, and is then of a subclass that reports what it does; without them nothing is in the way.

BREAKERS: weakref.WeakSet[Any] = weakref.WeakSet()  # of this process's open stores; the class stands below


breakers_lock = threading.RLock()  # reentrant: a store may be collected while it is held


_CIRCUIT_STATES = {"closed": 0, "half-open": 1, "open": 2}


_SECONDS = (1e-6, 1e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


_SNAPSHOT_SECONDS = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)


_REQUESTS = {"retrieve": "get", "write": "upsert"}  # by other names than the engines'


def _circuit_state() -> int:
    """The worst state of all circuit breakers: 0 closed, 1 half-open, 2 open."""
    with breakers_lock:
        breakers = tuple(BREAKERS)
    return max((_CIRCUIT_STATES[breaker.state] for breaker in breakers), default=0)


UNREPORTED = contextlib.nullcontext()


class _Metrics:
    """The metrics of this process, in the default registry of prometheus_client."""

    def __init__(self) -> None:
        import prometheus_client as prometheus

        by_operation = ["backend", "operation"]
        self.operations = prometheus.Counter(
            "attuned_store_operations_total", "Operations of stores.", [*by_operation, "status"]
        )
        self.operation_seconds = prometheus.Histogram(
            "attuned_store_operation_duration_seconds", "Of stores.", by_operation, buckets=_SECONDS
        )
        self.request_seconds = prometheus.Histogram(
            "attuned_qdrant_request_duration_seconds", "Each try of its own.", ["operation"], buckets=_SECONDS
        )
        self.errors = prometheus.Counter(
            "attuned_qdrant_errors_total", "Requests that failed.", ["operation", "kind"]
        )
        self.retries = prometheus.Counter("attuned_qdrant_retries_total", "Requests sent again.")
        self.circuit = prometheus.Gauge(
            "attuned_qdrant_circuit_state", "0 closed, 1 half-open, 2 open; the worst of all stores."
        )
        self.circuit.set_function(_circuit_state)
        self.snapshot_seconds = prometheus.Histogram(
            "attuned_snapshot_duration_seconds", "Of snapshots taken and restored.", buckets=_SNAPSHOT_SECONDS
        )
        self.snapshot_bytes = prometheus.Gauge("attuned_snapshot_bytes", "Size of the last snapshot file.")
        self.of = functools.cache(self._of)  # labels() takes as long as a read from memory

    def _of(self, backend: str, operation: str, status: str) -> tuple[Any, Any]:
        """The counter and the histogram of an operation."""
        counter = self.operations.labels(backend, operation, status)
        return counter, self.operation_seconds.labels(backend, operation)


def _reported_kind(error: BaseException, *, in_request: bool) -> type[BaseException]:
    """What an error is called; what an engine itself raises is on its way to be a BackendError."""
    own = isinstance(error, StoreError) or not isinstance(error, Exception)
    return BackendError if in_request and not own else type(error)


class Telemetry:
    """What reports go to: a tracer and metrics, either of which may be None."""

    def __init__(self, trace: Any, metrics: _Metrics | None) -> None:
        from attuned import __version__

        self._trace = trace
        self._tracer = trace and trace.get_tracer("attuned_store", __version__)
        self._metrics = metrics

    def _span(
        self, name: str, attributes: Mapping[str, Any], *, in_request: bool = False
    ) -> contextlib.AbstractContextManager[Any]:
        """A span, or None where there is no tracer, or the application has set no provider for it so far."""
        trace = self._trace
        if self._tracer is None or (
            isinstance(self._tracer, trace.ProxyTracer)
            and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        ):
            return UNREPORTED
        return self._recorded(name, attributes, in_request=in_request)

    @contextlib.contextmanager
    def _recorded(self, name: str, attributes: Mapping[str, Any], *, in_request: bool) -> Generator[Any]:
        given = {f"attuned.{key}": value for key, value in attributes.items() if value is not None}
        with self._tracer.start_as_current_span(
            name, attributes=given, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                kind = _reported_kind(error, in_request=in_request)
                span.set_attribute("error.type", kind.__name__)
                # Not the message: a server's answer, or a value that was refused, may hold a user id.
                meaning = (kind.__doc__ or "").partition("\n")[0] if issubclass(kind, StoreError) else ""
                span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, meaning or kind.__name__))
                raise

    @contextlib.contextmanager
    def operation(self, name: str, store: _Observable, user_id: str | None) -> Generator[None]:
        """Report an operation of a store."""
        began, status, operation = time.perf_counter(), "error", name.rpartition(".")[2]
        known = {"backend": store.engine, "operation": operation, "user": user_id}
        try:
            with self._span(name, known) as span:
                try:
                    yield
                finally:
                    if span is not None:  # an asynchronous store may have been opened only now
                        span.set_attribute("attuned.backend", store.engine)
            status = "ok"
        finally:
            if self._metrics is not None:
                counter, histogram = self._metrics.of(store.engine, operation, status)
                counter.inc()
                histogram.observe(time.perf_counter() - began)

    @contextlib.contextmanager
    def request(self, backend: str, operation: str, attempt: int = 1) -> Generator[None]:
        """Report one try of a request to a backend."""
        began, name = time.perf_counter(), _REQUESTS.get(operation, operation.partition(" ")[0])
        metrics = self._metrics
        if metrics is not None and attempt > 1:
            metrics.retries.inc()
        try:
            attributes = {"backend": backend, "operation": name, "attempt": attempt}
            with self._span(f"attuned.qdrant.{name}", attributes, in_request=True):
                yield
        except BaseException as error:
            if metrics is not None:
                metrics.errors.labels(name, _reported_kind(error, in_request=True).__name__).inc()
            raise
        finally:
            if metrics is not None:
                metrics.request_seconds.labels(name).observe(time.perf_counter() - began)

    def noted(self, answer: T) -> T:
        """Give back what an operation answered; where it is a report of a snapshot, count that."""
        if isinstance(answer, SnapshotReport) and self._metrics is not None:
            self._metrics.snapshot_seconds.observe(answer.duration_ms / 1000)
            self._metrics.snapshot_bytes.set(answer.bytes or 0)
        return answer


@functools.cache
def find_telemetry() -> Telemetry | None:
    trace: Any = None
    metrics: _Metrics | None = None
    with contextlib.suppress(ImportError):
        from opentelemetry import trace
    with contextlib.suppress(ImportError, ValueError):  # another copy of this file may have the names
        metrics = _Metrics()
    return Telemetry(trace, metrics) if trace or metrics else None


class Reporting:
    """What the stores of this process report to; None until the first is made, and without either library."""

    def __init__(self) -> None:
        self.telemetry: Telemetry | None = None
        self.lock = threading.Lock()


REPORTING = Reporting()


def report_request(backend: str, operation: str, attempt: int = 1) -> contextlib.AbstractContextManager[None]:
    """Report a request to a server, if there is anything to report to."""
    telemetry = REPORTING.telemetry
    return UNREPORTED if telemetry is None else telemetry.request(backend, operation, attempt)


_OF_A_USER = {  # the first parameter of what is about one user: it tells who that is
    "upsert_latest": "snapshot",
    "patch": "user_id",
    "update": "user_id",
    "get_latest": "user_id",
    "get_history": "user_id",
    "search_similar": "query",
    "delete": "user_id",
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
    @property
    def engine(self) -> str: ...


ObservableStore = TypeVar("ObservableStore", bound=_Observable)


def observe(store: _Observable) -> None:
    """Let a store report its operations, if there is anything to report to."""
    with REPORTING.lock:
        telemetry = REPORTING.telemetry = find_telemetry()
    if telemetry is not None and not hasattr(store, "_observed_by"):  # as is one that is staged
        cast("Any", store).__class__ = _observed_class(type(store), telemetry)


@functools.cache
def _observed_class(kind: type[ObservableStore], telemetry: Telemetry) -> type[ObservableStore]:
    """The class that reports what a class of stores does; otherwise it is the same, by name too."""
    members: dict[str, Any] = {name: _observed(getattr(kind, name), name, telemetry) for name in SPANS}
    members["_observed_by"] = telemetry
    named = {key: getattr(kind, key) for key in ("__module__", "__qualname__", "__doc__")}
    make = cast("Any", type(kind))  # the metaclass
    return cast("type[ObservableStore]", make(kind.__name__, (kind,), {**named, **members}))


def _observed(method: Callable[..., Any], name: str, telemetry: Telemetry) -> Callable[..., Any]:
    span = SPANS[name]
    first = _OF_A_USER.get(name, "")

    def observation(
        store: _Observable, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        about = (arguments[0] if arguments else options.get(first)) if first else None
        return telemetry.operation(span, store, id_for_logs(about))

    @functools.wraps(method)
    async def awaited(store: _Observable, *arguments: Any, **options: Any) -> Any:
        with observation(store, arguments, options):
            return telemetry.noted(await method(store, *arguments, **options))

    @functools.wraps(method)
    def called(store: _Observable, *arguments: Any, **options: Any) -> Any:
        with observation(store, arguments, options):
            return telemetry.noted(method(store, *arguments, **options))

    return awaited if inspect.iscoroutinefunction(method) else called


def id_for_logs(first: object) -> str | None:
    """The beginning of the id of the user that an operation is about."""
    user_id = first.user_id if isinstance(first, StateSnapshot) else first
    if not isinstance(user_id, str):
        return None
    return short_id(user_id).encode(errors="replace").decode()  # it has not been checked

"""Spans and metrics, seen through the real libraries, and the log line of what is slow."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import logging
import sys
import threading
import time
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from conformance import Case, needs, run_python, state
from test_import import BLOCK

import attuned_store
from attuned_store import (
    AsyncMemoryStore,
    AsyncStateStore,
    BackendError,
    BreakerPolicy,
    CircuitOpenError,
    ConflictError,
    MemoryStore,
    MemoryStoreConfig,
    QdrantStore,
    RetryPolicy,
    StoreError,
    UserNotFoundError,
    ValidationError,
)

prometheus = pytest.importorskip("prometheus_client", reason="needs prometheus_client, the extra [metrics]")
trace = pytest.importorskip("opentelemetry.trace", reason="needs opentelemetry, the extra [otel]")
pytest.importorskip("opentelemetry.sdk", reason="needs opentelemetry-sdk: it records spans for the tests")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider  # noqa: E402 - where it is installed
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conformance import Open
    from qdrant_server import QdrantServer

pytestmark = [pytest.mark.anyio, pytest.mark.once]

LONG_ID = "zaphod.beeblebrox@example.org"
TOO_MUCH = LONG_ID[:5]
QDRANT = ("edge", "local", "server")


class Spans:
    """The spans that have ended since the test began."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def all(self) -> list[ReadableSpan]:
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    @property
    def operations(self) -> list[ReadableSpan]:
        """Those without a parent."""
        return [span for span in self.all if span.parent is None]

    def within(self, operation: ReadableSpan) -> list[ReadableSpan]:
        """The requests that an operation made: its children."""
        assert operation.context
        return [span for span in self.all if span.parent and span.parent.span_id == operation.context.span_id]

    def clear(self) -> None:
        self._exporter.clear()


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return {name.removeprefix("attuned."): value for name, value in (span.attributes or {}).items()}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    """What is traced in this test, by a provider of its own: a process is given one for good."""
    spans = Spans()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", spans.provider)
    return spans


@pytest.fixture
def telemetry() -> attuned_store.Telemetry:
    """What the stores of this process report to."""
    found = attuned_store.REPORTING.reporter(wanted=True)
    assert found is not None
    return found


@pytest.fixture
def metrics(telemetry: attuned_store.Telemetry) -> attuned_store.Metrics:
    assert telemetry.metrics is not None
    return telemetry.metrics


def scraped() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of ours that a scrape returns."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(prometheus.generate_latest().decode())
        for sample in family.samples
        if sample.name.startswith("attuned_")
    }


@pytest.fixture
def counted() -> Callable[..., float]:
    """By how much a sample has grown since the test began."""
    before = scraped()

    def growth(name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return scraped().get(key, 0.0) - before.get(key, 0.0)

    return growth


async def attempt(flow: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        await flow


class TestEveryStore:
    async def test_operations_have_spans_with_backend_and_user(
        self, case: Case, open_store: Open, spans: Spans
    ) -> None:
        """Each operation is a span that tells the backend, the operation and the beginning of the id."""
        store = await open_store()
        spans.clear()

        await store.upsert_latest(state(LONG_ID))
        await store.get_latest(user_id=LONG_ID)
        await store.get_history(LONG_ID)
        await store.search_similar(LONG_ID)
        await store.search_similar({"warmth": 0.5})
        await store.delete(LONG_ID)

        assert [span.name for span in spans.operations] == [
            f"attuned.store.{name}" for name in ("upsert", "get", "history", "search", "search", "delete")
        ]
        for span in spans.operations:
            found = attributes(span)
            assert found["backend"] == ("server" if case.backend == "real" else case.backend)
            assert span.name == f"attuned.store.{found['operation']}"
            assert span.status.is_unset
        users = [attributes(span).get("user") for span in spans.operations]
        assert users == ["zaph…", "zaph…", "zaph…", "zaph…", None, "zaph…"]

    async def test_a_patch_is_one_operation(self, open_store: Open, spans: Spans) -> None:
        """A patch is one operation, whatever it reads and writes."""
        store = await open_store()
        spans.clear()

        await store.patch("ann", {"warmth": 0.5})

        await store.update("ann", lambda latest: latest and latest.patched({"warmth": 0.25}))

        assert [span.name for span in spans.operations] == ["attuned.store.patch", "attuned.store.update"]
        patch, update = spans.operations
        for operation in (patch, update):
            assert not [span for span in spans.within(operation) if span.name.startswith("attuned.store.")]

    async def test_reading_or_searching_many_is_one_operation(
        self, case: Case, open_store: Open, spans: Spans, counted: Callable[..., float]
    ) -> None:
        """What get_many and search_similar look at of each user is no operation of its own."""
        store = await open_store()
        await store.upsert_many([state("ann"), state("bob"), state("cleo")])
        spans.clear()

        await store.get_many(["ann", "bob", "cleo"])
        await store.search_similar({"warmth": 0.5})
        await store.search_similar({"warmth": 0.5}, user_id="bob")

        names = ["attuned.store.get_many", "attuned.store.search", "attuned.store.search"]
        assert [span.name for span in spans.operations] == names
        backend = "server" if case.backend == "real" else case.backend
        assert counted("attuned_store_operations_total", backend=backend, operation="get", status="ok") == 0

    async def test_a_failed_operation_has_an_error_status(
        self, case: Case, open_store: Open, spans: Spans, counted: Callable[..., float]
    ) -> None:
        """An operation that raises is a span with an error status, and is counted with status error."""
        store = await open_store()
        await store.upsert_latest(state(LONG_ID))
        spans.clear()

        await attempt(store.upsert_latest(state(LONG_ID, 1), expected=None), ConflictError)

        [span] = spans.operations
        assert span.status.status_code is trace.StatusCode.ERROR
        assert span.status.description == "The latest snapshot is not the expected one; nothing was written."
        assert attributes(span)["error.type"] == "ConflictError"
        backend = "server" if case.backend == "real" else case.backend
        labels = {"backend": backend, "operation": "upsert"}
        assert counted("attuned_store_operations_total", status="error", **labels) == 1
        assert counted("attuned_store_operations_total", status="ok", **labels) == 1
        assert counted("attuned_store_operation_duration_seconds_count", **labels) == 2

    async def test_no_user_id_is_reported(self, open_store: Open, spans: Spans, tmp_path: Path) -> None:
        """No span and no metric holds more than four characters of a user id, whatever goes wrong."""
        store = await open_store()
        await store.upsert_latest(state(LONG_ID))
        await store.patch(LONG_ID, {"formality": 0.5})
        await attempt(store.upsert_latest(state(LONG_ID), expected=state(LONG_ID, 5)), ConflictError)
        await attempt(store.get_latest(LONG_ID * 10), ValidationError)
        await attempt(store.get_latest(LONG_ID + "\n"), ValidationError)
        await attempt(store.get_latest("a\ud800"), ValidationError)
        await attempt(store.get_history("ann", since=LONG_ID), ValidationError)
        await attempt(store.search_similar(LONG_ID + "x"), UserNotFoundError)
        await attempt(store.search_similar({"warmth": LONG_ID}), ValidationError)
        await store.create_snapshot(tmp_path / LONG_ID, kind="portable")
        await attempt(store.restore_snapshot(tmp_path / LONG_ID / "absent.attuned"), StoreError)

        told = json.dumps([json.loads(span.to_json()) for span in spans.all], ensure_ascii=False)
        assert "\ud800" not in told  # an exporter could not send it
        assert TOO_MUCH not in told
        assert LONG_ID[:4] + "…" in told
        assert TOO_MUCH not in prometheus.generate_latest().decode()
        assert LONG_ID[:4] not in prometheus.generate_latest().decode()

    async def test_snapshots_are_spans_and_their_size_a_metric(
        self, open_store: Open, spans: Spans, counted: Callable[..., float], tmp_path: Path
    ) -> None:
        """Taking and restoring a snapshot are spans; metrics tell the file's size and the time it took."""
        store = await open_store()
        await store.upsert_latest(state("ann"))
        spans.clear()

        report = await store.create_snapshot(tmp_path, kind="portable")
        size = scraped()["attuned_snapshot_bytes", frozenset()]
        assert report.path
        await store.restore_snapshot(report.path)

        assert [span.name for span in spans.operations] == [
            "attuned.snapshot.create",
            "attuned.snapshot.restore",
        ]
        assert all("user" not in attributes(span) for span in spans.operations)
        assert size == report.path.stat().st_size
        assert counted("attuned_snapshot_duration_seconds_count") == 2


class TestRequests:
    backends = QDRANT

    async def test_requests_are_within_their_operation(
        self, case: Case, open_store: Open, spans: Spans
    ) -> None:
        """What an operation asks of the backend are spans within its own, across a worker thread as well."""
        store = await open_store(cache_size=0)
        await store.upsert_latest(state("ann"))
        spans.clear()

        await store.upsert_latest(state("ann", 1))
        await store.get_latest("ann")
        await store.search_similar({"warmth": 0.5})

        upsert, get, search = spans.operations
        assert {span.name for span in spans.within(upsert)} >= {"attuned.qdrant.upsert"}
        assert {span.name for span in spans.within(get)} == {"attuned.qdrant.get"}
        assert {span.name for span in spans.within(search)} == {"attuned.qdrant.search"}
        for operation in spans.operations:
            for span in spans.within(operation):
                found = attributes(span)
                assert (found["backend"], found["attempt"]) == (case.backend, 1)
                assert span.name == f"attuned.qdrant.{found['operation']}"
                assert operation.start_time <= span.start_time <= span.end_time <= operation.end_time

    async def test_requests_are_timed(self, open_store: Open, counted: Callable[..., float]) -> None:
        """The time of each request is a metric, by its kind."""
        store = await open_store(cache_size=0)
        await store.upsert_latest(state("ann"))
        before = counted("attuned_qdrant_request_duration_seconds_count", operation="get")

        await store.get_latest("ann")

        assert counted("attuned_qdrant_request_duration_seconds_count", operation="get") == before + 1

    async def test_what_is_asked_of_the_cache_is_no_request(self, open_store: Open, spans: Spans) -> None:
        """A read that the cache answers is an operation without a request."""
        store = await open_store(cache_ttl=1000.0)
        await store.upsert_latest(state("ann"))
        await store.get_latest("ann")
        spans.clear()

        await store.get_latest("ann")

        assert [span.name for span in spans.all] == ["attuned.store.get"]


@pytest.fixture
def server_options() -> dict[str, Any]:
    """The stores retry as they do by default."""
    return {"verify": False}


@pytest.mark.once
@needs("qdrant_client")
class TestServerRequests:
    async def test_every_attempt_is_a_span(
        self,
        connect: Callable[..., AsyncStateStore],
        server: QdrantServer,
        spans: Spans,
        counted: Callable[..., float],
    ) -> None:
        """A request that is sent again is a span each time, numbered, and counted as a retry."""
        from qdrant_server import reply

        store = connect(retry=RetryPolicy(base_s=0.0))
        await store.upsert_latest(state(LONG_ID))
        spans.clear()
        server.on(reply(503, f"no room for {LONG_ID}"), method="PUT", path="/points", times=2)

        await store.upsert_latest(state(LONG_ID, 1))

        [upsert] = spans.operations
        sent = [span for span in spans.within(upsert) if attributes(span)["operation"] == "upsert"]
        assert upsert.status.is_unset
        assert [attributes(span)["attempt"] for span in sent] == [1, 2, 3]
        assert [attributes(span).get("error.type") for span in sent] == [
            "BackendUnavailableError",
            "BackendUnavailableError",
            None,
        ]
        assert TOO_MUCH not in "".join(span.to_json() for span in spans.all)
        assert counted("attuned_qdrant_retries_total") == 2
        errors = {"operation": "upsert", "kind": "BackendUnavailableError"}
        assert counted("attuned_qdrant_errors_total", **errors) == 2

    async def test_the_state_of_the_breaker_is_a_metric(
        self,
        connect: Callable[..., AsyncStateStore],
        server: QdrantServer,
        metrics: attuned_store.Metrics,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The state of the breakers is 0 closed, 1 half-open, 2 open; a closed store counts no more."""
        from qdrant_server import reply

        monkeypatch.setattr(metrics, "breakers", weakref.WeakSet())
        once = RetryPolicy(attempts=1)
        opening = connect(retry=once, breaker=BreakerPolicy(failures=1, open_s=1000.0))
        probing = connect(retry=once, breaker=BreakerPolicy(failures=1, open_s=0.0))
        await probing.upsert_latest(state("ann"))
        await opening.upsert_latest(state("ann"))

        def circuit() -> float:
            return scraped()["attuned_qdrant_circuit_state", frozenset()]

        assert circuit() == 0
        with server.on(reply(503, "down")):
            await attempt(probing.get_latest("bob"), BackendError)
            assert circuit() == 1
            await attempt(opening.get_latest("bob"), BackendError)
            await attempt(opening.get_latest("bob"), CircuitOpenError)
            assert circuit() == 2
        await opening.aclose()
        assert circuit() == 1
        await probing.get_latest("bob")
        assert circuit() == 0


class TestOpening:
    backends = ("edge", "local")
    faces = ("asyncio", "trio")

    async def test_the_first_operation_names_the_engine_too(
        self, case: Case, spans: Spans, tmp_path: Path, counted: Callable[..., float]
    ) -> None:
        """The operation that opens an asynchronous store is reported under the engine it has."""
        store = attuned_store.AsyncQdrantStore(path=tmp_path / "store", engine=case.backend)
        await store.get_latest("ann")
        await store.aclose()

        operation = spans.operations[0]
        assert operation.name == "attuned.store.get"
        assert attributes(operation)["backend"] == case.backend
        labels = {"backend": case.backend, "operation": "get", "status": "ok"}
        assert counted("attuned_store_operations_total", **labels) == 1


def test_what_an_engine_raises_is_reported_as_what_the_caller_gets(
    spans: Spans, counted: Callable[..., float], telemetry: attuned_store.Telemetry
) -> None:
    """A request that an engine fails is reported under the error that the caller gets."""
    engine: Any = SimpleNamespace(name="edge", reporter=telemetry)
    with pytest.raises(BackendError), attuned_store.backend_errors(engine, "retrieve"):
        raise OSError(LONG_ID)

    [span] = spans.all
    assert (span.name, attributes(span)["error.type"]) == ("attuned.qdrant.get", "BackendError")
    assert TOO_MUCH not in span.to_json()
    assert counted("attuned_qdrant_errors_total", operation="get", kind="BackendError") == 1


def test_what_a_function_of_the_caller_raises_keeps_its_name(spans: Spans) -> None:
    """An error of the function given to update is named in the span, and nothing of what it says."""

    def fail(_: object) -> None:
        raise RuntimeError(LONG_ID)

    with pytest.raises(RuntimeError):
        MemoryStore().update("ann", fail)

    assert {attributes(span).get("error.type") for span in spans.operations} == {"RuntimeError"}
    assert TOO_MUCH not in "".join(span.to_json() for span in spans.all)


def test_metrics_have_the_names_and_labels_that_are_documented(telemetry: attuned_store.Telemetry) -> None:
    """A scrape returns the documented metrics with the documented labels."""
    store = MemoryStore()
    store.upsert_latest(state("ann"))
    attuned_store.report_slow(attuned_store.REPORTING.telemetry, store.engine, "upsert", 1.0, None)
    with pytest.raises(ZeroDivisionError), telemetry.request("edge", "retrieve", 2):
        raise ZeroDivisionError
    labels: dict[str, set[str]] = {}
    for name, found in scraped():
        if not name.endswith("_created"):
            labels.setdefault(name, set()).update(label for label, _ in found)

    assert labels == {
        "attuned_store_operations_total": {"backend", "operation", "status"},
        **{
            f"attuned_store_operation_duration_seconds_{part}": {"backend", "operation", *bucket}
            for part, bucket in (("bucket", ("le",)), ("count", ()), ("sum", ()))
        },
        **{
            f"attuned_qdrant_request_duration_seconds_{part}": {"operation", *bucket}
            for part, bucket in (("bucket", ("le",)), ("count", ()), ("sum", ()))
        },
        "attuned_store_slow_operations_total": {"backend", "operation"},
        "attuned_qdrant_errors_total": {"operation", "kind"},
        "attuned_qdrant_retries_total": set(),
        "attuned_qdrant_circuit_state": set(),
        "attuned_snapshot_duration_seconds_bucket": {"le"},
        "attuned_snapshot_duration_seconds_count": set(),
        "attuned_snapshot_duration_seconds_sum": set(),
        "attuned_snapshot_bytes": set(),
    }


USE_GLOBALLY = """
from attuned_store import MemoryStore, StateSnapshot
store = MemoryStore()  # before the provider: applications do it in any order
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter = InMemorySpanExporter()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
store.upsert_latest(StateSnapshot("ann", {"warmth": 0.5}))
[span] = exporter.get_finished_spans()
print(span.name, span.instrumentation_scope.name)
import prometheus_client
scraped = prometheus_client.generate_latest().decode().splitlines()
print([line for line in scraped if "operations_total{" in line])
"""


@pytest.mark.once
def test_spans_go_to_the_provider_of_the_application() -> None:
    """Spans go to the provider that the application sets, also after it has made the store."""
    answer = run_python(USE_GLOBALLY)

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines() == [
        "attuned.store.upsert attuned_store",
        """['attuned_store_operations_total{backend="memory",operation="upsert",status="ok"} 1.0']""",
    ]


USE_NEITHER = """
import asyncio, tempfile
import attuned_store as a
assert type(a.MemoryStore()) is a.MemoryStore and type(a.AsyncMemoryStore()) is a.AsyncMemoryStore
with tempfile.TemporaryDirectory() as folder, a.QdrantStore(path=folder) as store:
    assert type(store) is a.QdrantStore
    store.patch("ann", {"warmth": 0.5})
assert a.REPORTING.telemetry is None
assert a.report_request(None, "server", "get") is a.report_request(None, "server", "upsert") is a.UNREPORTED
print(sorted({name.partition(".")[0] for name in sys.modules} & {"opentelemetry", "prometheus_client"}))
"""


def test_without_the_libraries_nothing_is_in_the_way() -> None:
    """Without the libraries a store is of the plain class, and a request asks for one attribute."""
    answer = run_python(BLOCK + USE_NEITHER, "opentelemetry,prometheus_client")

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "[]\n"


@pytest.mark.parametrize("blocked", ["opentelemetry", "prometheus_client"])
def test_either_library_will_do(blocked: str) -> None:
    """With one of the libraries its reports are made, and a store works."""
    code = (
        "import attuned_store as a\n"
        "store = a.MemoryStore()\nstore.patch('ann', {'warmth': 0.5})\n"
        "try:\n    store['bob']\nexcept a.UserNotFoundError:\n    pass\n"
        "found = a.REPORTING.telemetry\n"
        "print(len(store), found._trace is not None, found.metrics is not None)"
    )
    answer = run_python(BLOCK + code, blocked)

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == f"1 {blocked != 'opentelemetry'} {blocked != 'prometheus_client'}\n"


MULTIPROCESS = """
import attuned_store, prometheus_client
for _ in range(3):
    store = attuned_store.MemoryStore()
    store.patch("ann", {"warmth": 0.5})
print(len(store), "attuned" in prometheus_client.generate_latest().decode())
"""


@pytest.mark.parametrize("variable", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
def test_there_are_no_metrics_in_multiprocess_mode(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In prometheus_client's multiprocess mode stores work and have no metrics, which is logged once."""
    monkeypatch.setenv(variable, str(tmp_path))
    answer = run_python(MULTIPROCESS)

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "1 False\n"
    assert answer.stderr.count("multiprocess mode") == 1


def test_opentelemetry_keeps_its_provider_where_it_is_looked_for() -> None:
    """The one thing beyond its public interface: opentelemetry.trace has the provider as _TRACER_PROVIDER."""
    set_and_look = (
        "from opentelemetry import trace\nfrom opentelemetry.sdk.trace import TracerProvider\n"
        "print(trace._TRACER_PROVIDER)\n"
        "trace.set_tracer_provider(provider := TracerProvider())\n"
        "print(trace._TRACER_PROVIDER is provider is trace.get_tracer_provider())\n"
        "import attuned_store\nprint(attuned_store.provider_source(trace) is trace)"
    )
    answer = run_python(set_and_look)

    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "None\nTrue\nTrue\n"


def test_without_that_attribute_the_provider_is_asked_for(spans: Spans) -> None:
    """Where opentelemetry has no _TRACER_PROVIDER, its public functions tell whether there is a provider."""
    public = SimpleNamespace(**{name: getattr(trace, name) for name in trace.__all__})
    public.ProxyTracerProvider = trace.ProxyTracerProvider
    telemetry = attuned_store.Telemetry(public, None)

    with telemetry.request("edge", "retrieve"):
        pass
    public.get_tracer_provider = trace.ProxyTracerProvider
    with telemetry.request("edge", "retrieve"):
        pass

    assert telemetry.source is not public
    assert [span.name for span in spans.all] == ["attuned.qdrant.get"]


def test_spans_follow_the_conventions_for_databases(
    spans: Spans, tmp_path: Path, telemetry: attuned_store.Telemetry
) -> None:
    """Spans tell system, operation and collection as OpenTelemetry's conventions for databases have it."""
    MemoryStore().upsert_latest(state("ann"))
    with QdrantStore(path=tmp_path, collection_name="moods") as store:
        store.upsert_latest(state("ann"))
    with pytest.raises(BackendError), telemetry.request("server", "retrieve"):
        raise BackendError("", backend="server", operation="retrieve")

    conventions = ("db.system.name", "db.operation.name", "db.collection.name", "error.type")
    told = {tuple((span.attributes or {}).get(name) for name in conventions) for span in spans.all}
    assert told >= {
        ("memory", "upsert", "attuned_state", None),
        ("qdrant", "upsert", "moods", None),
        ("qdrant", "upsert", None, None),
        ("qdrant", "get", None, "BackendError"),
    }
    assert {span.name for span in spans.all if span.kind is trace.SpanKind.CLIENT} == {"attuned.qdrant.get"}


class TestTelemetryOff:
    async def test_nothing_is_reported(
        self,
        case: Case,
        open_store: Open,
        spans: Spans,
        metrics: attuned_store.Metrics,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """A store with telemetry=False reports no operation, request, snapshot, slow step or breaker."""
        monkeypatch.setattr(metrics, "breakers", weakref.WeakSet())
        before = scraped()
        options = {"slow_operation_ms": 1e-6} if case.backend in QDRANT else {}
        store = await open_store(telemetry=False, **options)
        await store.upsert_latest(state("ann"))
        await store.patch("ann", {"warmth": 0.5})
        await attempt(store.upsert_latest(state("ann", 1), expected=None), ConflictError)
        await store.search_similar("ann")
        report = await store.create_snapshot(tmp_path, kind="portable")
        await store.restore_snapshot(report.path)

        assert spans.all == []
        assert scraped() == before
        assert not metrics.breakers

    def test_a_subclass_may_decide_it_itself(self, counted: Callable[..., float], spans: Spans) -> None:
        """What the configuration of a store says counts, wherever it comes from."""

        class Quiet(MemoryStore):
            def __init__(self) -> None:
                super().__init__(telemetry=False)

        class Loud(MemoryStore):
            def __init__(self, telemetry: bool) -> None:
                super().__init__()

        Quiet().upsert_latest(state("ann"))
        assert spans.all == []
        Loud(telemetry=False).upsert_latest(state("ann"))
        assert [span.name for span in spans.all] == ["attuned.store.upsert"]

    def test_it_is_an_option_like_others(self) -> None:
        """Telemetry is True, False, or what ATTUNED_STORE_TELEMETRY says."""
        assert MemoryStoreConfig().telemetry is True
        assert MemoryStoreConfig.from_env({"ATTUNED_STORE_TELEMETRY": "off"}).telemetry is False
        with pytest.raises(ValidationError, match="telemetry"):
            MemoryStore(telemetry=cast("Any", "off"))


class TestCounting:
    def test_no_count_is_lost_though_threads_come_and_go(self, counted: Callable[..., float]) -> None:
        """Counts are exact while 8 threads at a time begin, count and end, and metrics are collected."""
        store = MemoryStore()
        labels = {"backend": "memory", "operation": "get"}
        generations, reads, seen = 60, 50, [0.0]

        def read() -> None:
            for _ in range(reads):
                store.get_latest("ann")

        def collect() -> None:
            while not done.is_set():
                seen.append(counted("attuned_store_operations_total", status="ok", **labels))

        def generation() -> None:
            for _ in range(generations):
                thread = threading.Thread(target=read)  # with the id of one that has ended, as a rule
                thread.start()
                thread.join()

        done = threading.Event()
        collector = threading.Thread(target=collect)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            collector.start()
            starters = [threading.Thread(target=generation) for _ in range(8)]
            for starter in starters:
                starter.start()
            for starter in starters:
                starter.join()
        finally:
            sys.setswitchinterval(interval)
            done.set()
            collector.join()

        total = 8 * generations * reads
        assert seen == sorted(seen)
        assert counted("attuned_store_operations_total", status="ok", **labels) == total
        assert counted("attuned_store_operation_duration_seconds_count", **labels) == total
        assert counted("attuned_store_operation_duration_seconds_bucket", le="+Inf", **labels) == total

    def test_a_thread_with_a_used_id_is_counted_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A thread that found the cell of one that had ended, just before that is folded, loses nothing."""
        series = attuned_store.Series(())
        real = sys._current_frames
        ended = threading.Thread(target=series.count)
        ended.start()
        ended.join()
        [(thread, cell)] = series.cells.items()
        running = [real(), {**real(), thread: sys._getframe()}]  # it begins between the two looks

        with monkeypatch.context() as patch:
            patch.setattr(sys, "_current_frames", lambda: running.pop(0))
            assert series.total() == [0, 1]
        assert series.cells == {}
        cell[1] += 1  # what it does with the cell that it had found
        with monkeypatch.context() as patch:
            patch.setattr(sys, "_current_frames", lambda: {**real(), thread: sys._getframe()})
            assert series.total() == [0, 2]
        assert series.total() == [0, 2]
        assert series.total() == [0, 2]
        assert series._removed == []

    def test_cells_do_not_pile_up_where_nobody_collects(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The cells of threads that have ended are folded also where metrics are never collected."""
        series = attuned_store.Series(())
        ids = iter(range(1, 1_001))  # never given anew, as on Windows

        for _ in range(1_000):
            with monkeypatch.context() as patch:
                patch.setattr(threading, "get_ident", lambda: next(ids))
                series.count()

        assert len(series.cells) < 200
        assert series.total() == [0, 1_000]

    def test_a_finalizer_may_count_while_cells_are_folded(self) -> None:
        """Counting never waits for who folds: a finalizer may do so in that very thread."""
        series = attuned_store.Series(())
        series._fold_at = 0

        with series._lock:
            series.count()

        assert series.total() == [0, 1]

    @pytest.mark.parametrize("took", [0.0, 5e-7, 1e-6, 2e-6, 1e-5, 2e-5, 3e-4, 0.3, 10.0, 11.0])
    def test_buckets_are_those_of_prometheus(
        self, took: float, monkeypatch: pytest.MonkeyPatch, metrics: attuned_store.Metrics
    ) -> None:
        """What takes so long is in the buckets where a histogram of prometheus_client has it."""
        registry = prometheus.CollectorRegistry()
        theirs = prometheus.Histogram("theirs", "", buckets=attuned_store.SECONDS, registry=registry)
        theirs.observe(took)
        ours = attuned_store.Metrics()
        ours.operations("memory", "get", "ok").count(took)

        class Timed(MemoryStore):
            pass

        ticks = itertools.cycle([0.0, took])
        monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
        telemetry = attuned_store.Telemetry(None, inline := attuned_store.Metrics())
        monkeypatch.setattr(attuned_store.REPORTING, "telemetry", telemetry)
        store = Timed()
        for _ in range(2):  # the first makes the cell, the second finds it
            store.get_latest("ann")

        def buckets(collector: Any, name: str) -> dict[str, float]:
            found = [sample for family in collector.collect() for sample in family.samples]
            return {each.labels["le"]: each.value for each in found if each.name == f"{name}_bucket"}

        expected = buckets(registry, "theirs")
        name = "attuned_store_operation_duration_seconds"
        assert list(buckets(ours, name).items()) == list(expected.items())
        assert buckets(inline, name) == {le: 2 * number for le, number in expected.items()}

    def test_every_way_to_call_is_counted(self, counted: Callable[..., float]) -> None:
        """Positional, by name and with defaults: each call is passed on as it is, and counted."""
        stores: tuple[Any, ...] = (MemoryStore(), AsyncMemoryStore())
        for store in stores:
            answers: list[Any] = [
                store.upsert_latest(state("ann"), expected=None),
                store.get_latest(user_id="ann"),
                store.get_history("ann", 1),
                store.get_history(limit=1, user_id="ann", since=0),
                store.patch("ann", {"warmth": 0.25}, confidence=0.5),
                store.count(),
                store.count(history=True),
            ]
            if isinstance(store, AsyncMemoryStore):
                answers = [attuned_store.run(each) for each in answers]
            assert answers[1] == state("ann")
            assert [len(each) for each in answers[2:4]] == [1, 1]
            assert answers[4].confidence == 0.5
            assert answers[5:] == [1, 2]
            with pytest.raises(TypeError):
                store.get_latest(nobody="ann")

        labels = {"backend": "memory", "status": "ok"}
        found = [
            counted("attuned_store_operations_total", operation=each, **labels) for each in ("get", "count")
        ]
        assert found == [2, 4]  # a patch is one operation, not those that it is made of


def test_a_second_copy_of_the_file_works_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vendored copy beside the installed library works, though the metrics are those of the first alone."""
    spec = importlib.util.spec_from_file_location("attuned_copy", str(attuned_store.__file__))
    assert spec
    assert spec.loader
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "attuned_copy", copy)
    MemoryStore()
    spec.loader.exec_module(copy)

    with copy.MemoryStore() as store:
        assert store.patch("ann", {"warmth": 0.5}).axis("warmth") == 0.5
    assert copy.REPORTING.telemetry.metrics is None


def test_an_observed_store_looks_like_any_other() -> None:
    """A store that reports has the name, the documentation and the signatures of its class."""
    store = MemoryStore()

    assert isinstance(store, MemoryStore)
    assert (type(store).__name__, type(store).__module__) == ("MemoryStore", "attuned_store")
    assert type(store).__doc__ == MemoryStore.__doc__
    assert inspect.signature(store.get_history) == inspect.signature(MemoryStore().get_history)
    assert store.get_latest.__doc__ == MemoryStore.get_latest.__doc__
    assert repr(store) == "<MemoryStore open>"


@pytest.mark.once
class TestSlow:
    backends = QDRANT

    async def test_a_slow_step_is_logged(
        self,
        case: Case,
        open_store: Open,
        caplog: pytest.LogCaptureFixture,
        counted: Callable[..., float],
    ) -> None:
        """What takes longer than slow_operation_ms is a warning and counted, unless known to take long."""
        store = await open_store(slow_operation_ms=1e-6)
        caplog.clear()

        await store.upsert_latest(state(LONG_ID))
        await store.upsert_many([state("ann")])
        await attempt(store.upsert_latest(state(LONG_ID, 1), expected=None), ConflictError)

        found = [record for record in caplog.records if record.name == "attuned_store.slow"]
        assert {record.levelno for record in found} == {logging.WARNING}
        said = [record.getMessage() for record in found]
        assert [text.split(" took ")[0] for text in said] == [
            "slow: upsert",
            "slow: upsert",
        ]
        assert [text.split(" ms on ")[1] for text in said] == [
            f"{case.backend}, user 'zaph…'",
            f"{case.backend}, user 'zaph…'",
        ]
        labels = {"backend": case.backend, "operation": "upsert"}
        assert counted("attuned_store_slow_operations_total", **labels) == 2

    @pytest.mark.parametrize("limit", [0, None, 3_600_000.0])
    async def test_nothing_else_is_logged(
        self, open_store: Open, caplog: pytest.LogCaptureFixture, limit: float | None
    ) -> None:
        """What is fast enough is not logged, and with 0 or None nothing is."""
        store = await open_store(slow_operation_ms=limit)

        await store.upsert_latest(state(LONG_ID))
        await store.get_latest(LONG_ID)

        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    async def test_reads_from_the_cache_are_not_timed(
        self, open_store: Open, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A read that the cache answers costs nothing more: it is not timed."""
        store = await open_store(slow_operation_ms=1e-6, cache_ttl=1000.0)
        await store.upsert_latest(state("ann"))
        await store.get_latest("ann")
        caplog.clear()

        assert await store.get_latest("ann") == state("ann")
        assert not caplog.records


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "fast", True])
def test_a_limit_that_is_none_is_refused(value: Any) -> None:
    """slow_operation_ms is a number of milliseconds from 0 on, or None."""
    with pytest.raises(ValidationError, match="slow_operation_ms"):
        QdrantStore(path="unused", slow_operation_ms=value)

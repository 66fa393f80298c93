"""Stores over HTTP."""

from __future__ import annotations

import functools
import inspect
import json
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from attuned.base.config import absolute_path, check_callable
from attuned.base.errors import MissingDependencyError, ValidationError, type_name
from attuned.base.values import MAX_INTEGER, Health, SnapshotReport, check_integer
from attuned.connections.runtime import run_in_thread
from attuned.copying import AnyStore, failed_report
from attuned.stores import AsyncStateStore, StateStore

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_Answering = Callable[["Request"], Awaitable["Response"]]
_Authorize = Callable[["Request"], bool | Awaitable[bool]]
_STATUSES = ("healthy", "degraded", "unhealthy")  # the worst comes last


def _answer(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    from starlette.responses import Response

    # Of ASCII alone: a path may hold bytes that are no text, which JSONResponse cannot send.
    return Response(json.dumps(content), status, headers, "application/json")


def _guarded(endpoint: _Answering, authorize: _Authorize | None) -> _Answering:
    """Let requests through to which ``authorize`` says True: none to which it says anything else."""
    if authorize is None:
        return endpoint

    async def guarded(request: Request) -> Response:
        allowed = authorize(request)
        if inspect.isawaitable(allowed):
            allowed = await allowed
        if allowed is not True:
            return _answer({"error": "not authorized"}, 401, {"WWW-Authenticate": "Bearer"})
        return await endpoint(request)

    return guarded


async def _health_of(store: AnyStore) -> Health:
    return await run_in_thread(store.health) if isinstance(store, StateStore) else await store.health()


class _Requested:
    """A snapshot of one store after another, for all requests that come before its end.

    One of them takes the snapshots while the others wait; is it cancelled, another goes on where it was.
    """

    def __init__(self, stores: Sequence[AnyStore], directory: Path | None, keep: int | None) -> None:
        from anyio import Lock

        self._stores, self._directory, self._keep = stores, directory, keep
        self._turn = Lock()
        self._thread_turn = threading.Lock()
        self.requests = 0
        self.reports: list[SnapshotReport] = []

    async def finish(self) -> None:
        """Take the snapshots that are left to be taken."""
        async with self._turn:
            while not self.is_done:
                number = len(self.reports)
                store = self._stores[number]
                if isinstance(store, StateStore):
                    await run_in_thread(functools.partial(self._take, store, number))
                else:
                    self.reports.append(await self._async_take(store))

    @property
    def is_done(self) -> bool:
        return len(self.reports) == len(self._stores)

    def _take(self, store: StateStore, number: int) -> None:
        with self._thread_turn:  # asyncio may have cancelled a request without its thread, which goes on
            if number == len(self.reports):
                try:
                    report = store.create_snapshot(self._directory, reason="api", keep=self._keep)
                except Exception as error:  # noqa: BLE001 - the other stores come next
                    report = failed_report(store.location, "api", error)
                self.reports.append(report)

    async def _async_take(self, store: AsyncStateStore) -> SnapshotReport:
        try:
            return await store.create_snapshot(self._directory, reason="api", keep=self._keep)
        except Exception as error:  # noqa: BLE001 - the other stores come next
            return failed_report(store.location, "api", error)


class Endpoint:
    """What answers the requests; it belongs to no event loop."""

    def __init__(self, stores: Sequence[AnyStore], directory: Path | None, keep: int | None) -> None:
        self._stores, self._directory, self._keep = stores, directory, keep
        self._taking: _Requested | None = None

    async def snapshot(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Take a snapshot of every store, or join the request that does."""
        if self._taking is None:
            self._taking = _Requested(self._stores, self._directory, self._keep)
        joined = self._taking
        joined.requests += 1
        try:
            await joined.finish()
        finally:
            joined.requests -= 1
            if self._taking is joined and (joined.is_done or not joined.requests):
                self._taking = None
        completed = [report.status == "completed" for report in joined.reports]
        status, code = (
            ("completed", 200) if all(completed) else ("partial", 207) if any(completed) else ("failed", 503)
        )
        return _answer({"status": status, "results": [report.to_dict() for report in joined.reports]}, code)

    async def health(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Say how every store is."""
        found = [await _health_of(store) for store in self._stores]
        worst = max((health.status for health in found), key=_STATUSES.index)
        content = {"status": worst, "stores": [attrs.asdict(health) for health in found]}
        return _answer(content, 503 if worst == "unhealthy" else 200)

    async def ready(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Say whether every store answers, and no more: anybody may ask."""
        found = [await _health_of(store) for store in self._stores]
        ready = all(health.status != "unhealthy" for health in found)
        return _answer({"ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Hand out what prometheus_client has collected in this process."""
        from starlette.exceptions import HTTPException
        from starlette.responses import Response

        try:
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
        except ImportError:
            raise HTTPException(404) from None
        return Response(generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _check_app(stores: Sequence[AnyStore], authorize: _Authorize | None, keep: int | None) -> None:
    if not stores:
        raise ValidationError("stores: at least one store is needed")
    for store in stores:
        if not isinstance(store, StateStore | AsyncStateStore):
            raise ValidationError(f"stores: a store is needed, got {type_name(store)}")
    if authorize is not None:
        check_callable("authorize", authorize)
    if keep is not None:
        check_integer("keep", keep, 1, MAX_INTEGER)
        names = [store._operations.collection for store in stores]
        if len(set(names)) < len(names):
            raise ValidationError(
                "keep: the stores' collections are to have different names, or each its own app"
            )


def snapshot_app(
    *stores: StateStore | AsyncStateStore,
    authorize: Callable[[Request], bool | Awaitable[bool]] | None = None,
    directory: str | os.PathLike[str] | None = None,
    keep: int | None = None,
) -> Starlette:
    """An ASGI application that takes snapshots of stores on request, and tells how they are.

    ``POST /api/snapshot`` calls create_snapshot of one store after another, with ``directory`` and ``keep``,
    and answers with a report of each: 200 when all are completed, 207 when some failed, 503 when all did; a
    request that comes meanwhile gets the same answer. ``GET /api/health``, ``GET /api/ready`` (503 where a
    store is unhealthy) and, where prometheus_client is installed, ``GET /metrics``. ``authorize`` gets each
    request but those for /api/ready and returns, or returns an awaitable of, True to let it through.
    Mount it in FastAPI or Starlette, or run it by itself; the stores stay the caller's to close. Raises
    ValidationError, MissingDependencyError.
    """
    _check_app(stores, authorize, keep)
    try:
        from starlette.applications import Starlette
        from starlette.routing import Route
    except ImportError as error:
        raise MissingDependencyError("this needs Starlette: pip install starlette") from error
    endpoint = Endpoint(stores, None if directory is None else absolute_path(directory), keep)
    routes = [
        Route("/api/snapshot", _guarded(endpoint.snapshot, authorize), methods=["POST"]),
        Route("/api/health", _guarded(endpoint.health, authorize)),
        Route("/api/ready", endpoint.ready),
        Route("/metrics", _guarded(endpoint.metrics, authorize)),
    ]
    return Starlette(routes=routes)

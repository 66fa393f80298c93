"""Stores over HTTP."""

from __future__ import annotations

import functools
import hashlib
import heapq
import inspect
import json
import math
import re
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote_to_bytes

import attrs

from attuned.base.config import absolute_path, check_callable, is_loopback
from attuned.base.errors import (
    LOGGER,
    BackendError,
    ConflictError,
    MissingDependencyError,
    StoreError,
    StoreLockedError,
    UserNotFoundError,
    ValidationError,
    WaitError,
    brief,
    one_line,
    type_name,
    unknown_user_error,
)
from attuned.base.values import (
    ANY,
    MAX_INTEGER,
    SnapshotFields,
    SnapshotReport,
    StateSnapshot,
    check_integer,
    check_user_id,
)
from attuned.connections.runtime import run_in_thread
from attuned.copying import AnyStore, failed_report
from attuned.openapi import BACKUPS, MAX_PAGE, STATES, Operation, docs_page, openapi_document
from attuned.stores import AsyncStateStore, StateStore

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_Who = bool | str | None
_Authorize = Callable[["Request"], _Who | Awaitable[_Who]]
_STATUSES = ("healthy", "degraded", "unhealthy")  # the worst comes last
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_MAX_BODY = 256 << 10  # bytes: a state of as many axes as there may be has 90 KiB
_MAX_DEPTH = 32
_MAX_ATTEMPTS = 32
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)
_TAGS = re.compile(r'\*|(?:W/)?"[!#-~]*"(?:[ \t]*,[ \t]*(?:W/)?"[!#-~]*")*')
_SEARCH_FIELDS = inspect.signature(StateStore.search_similar).parameters.keys() - {"self"}


class Problem(Exception):  # noqa: N818 - RFC 9457 calls it so
    """An answer that says what is wrong with a request; ``members`` are told beside."""

    def __init__(
        self, status: int, detail: str, headers: Mapping[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.headers, self.members = status, headers, members

    @classmethod
    def of(cls, error: StoreError, operation: Operation) -> Problem:
        """What an error of a store is to who sent the request."""
        members: dict[str, Any] = {"error": type(error).__name__}
        if getattr(error, "ambiguous", False):
            members["ambiguous"] = True
        status = 422 if operation.body else 400
        for kind, other in ((UserNotFoundError, 404), (ConflictError, 409), (ValidationError, status)):
            if isinstance(error, kind):
                return cls(other, str(error), **members)
        # What is wrong beneath may name hosts and directories, which is for the log alone.
        LOGGER.warning("%s %s: %s", operation.method, operation.path, one_line(str(error)))
        headers = dict[str, str]()
        if isinstance(error, StoreLockedError) or (isinstance(error, BackendError) and error.retryable):
            wait_s = error.retry_after_s if isinstance(error, WaitError) else 1.0
            headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
        return cls(503, "the store cannot do this now; the log of the service says why", headers, **members)

    def response(self) -> Response:
        """The problem as a response, without control characters."""
        if self.status == HTTPStatus.NOT_MODIFIED:
            return _answer(None, self.status, self.headers)
        content = {"title": HTTPStatus(self.status).phrase, "status": self.status}
        detail = one_line(str(self))
        return _answer(
            {**content, "detail": detail, **self.members},
            self.status,
            self.headers,
            "application/problem+json",
        )


def _answer(
    content: Mapping[str, Any] | None,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    media_type: str = "application/json",
) -> Response:
    from starlette.responses import Response

    # Of ASCII alone: a path may hold bytes that are no text, which JSONResponse cannot send.
    told = {**_HEADERS, **(headers or {})}
    if content is None:
        return Response(None, status, told)
    return Response(json.dumps(content) + "\n", status, told, media_type)


async def _call(store: AnyStore, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of a store of either form."""
    call = functools.partial(getattr(store, method), *arguments, **options)
    return await run_in_thread(call) if isinstance(store, StateStore) else await call()


# Who may ask.


def _is_cross_site(request: Request) -> bool:
    """Whether a page of another site sends the request, as the browser tells."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin, host = request.headers.get("origin"), request.headers.get("host")
    return origin is not None and (not host or origin.partition("://")[2].lower() != host.lower())


def _is_local(request: Request) -> bool:
    """Authorizes requests that come from this machine and name it.

    A page may give its own host the address 127.0.0.1, and a proxy hands on what comes from anywhere: neither
    gets past this.
    """
    headers, client = request.headers, request.client
    host = re.fullmatch(r"\[?(.*?)\]?(?::\d+)?", headers.get("host", ""))
    forwarded = {"forwarded", "via", "x-forwarded-for", "x-real-ip"} & set(headers)
    # A server that believes X-Forwarded-For may know of nobody.
    local = client is not None and is_loopback(client.host or "") and not forwarded
    return local and host is not None and is_loopback(host[1].lower())


def _is_anybody(request: Request) -> bool:  # noqa: ARG001 - whoever it is
    return True


class _EncodedPaths:
    """Lets an application see paths as they were sent, so that an encoded slash parts nothing."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            root, path = scope.get("root_path", ""), scope["path"]
            prefix = root if path.startswith(f"{root}/") else ""
            sent = (scope.get("raw_path") or quote(path).encode()).partition(b"?")[0].decode("latin-1")
            below = sent.split("/")[1 + prefix.count("/") :]
            scope = {**scope, "path": "/".join([prefix, *below])}
        await self._app(scope, receive, send)


def _user_of(segment: str) -> str:
    """The user that a segment of a path names."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", segment):
        raise ValidationError("user_id: a % in a path begins an escape such as %2F, and is itself %25")
    try:
        return check_user_id(unquote_to_bytes(segment.encode("latin-1")).decode())
    except UnicodeDecodeError:
        raise ValidationError("user_id: a path is percent-encoded UTF-8") from None


class _Resource:
    """What answers requests for one path: an ASGI application over the methods of an endpoint."""

    def __init__(self, endpoint: Endpoint, operations: Sequence[Operation], authorize: _Authorize) -> None:
        self.endpoint = endpoint
        self._operations = {operation.method: operation for operation in operations}
        self._authorize = authorize
        methods = {"OPTIONS", *self._operations, *(["HEAD"] if "GET" in self._operations else [])}
        self._allow = {"Allow": ", ".join(sorted(methods))}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import ClientDisconnect, Request

        request = Request(scope, receive)
        operation = self._operations.get("GET" if request.method == "HEAD" else request.method)
        try:
            if operation is not None:
                response = await self._respond(request, operation)
            elif request.method == "OPTIONS":
                response = _answer(None, 204, self._allow)
            else:
                response = Problem(405, f"allowed are {self._allow['Allow']}", self._allow).response()
        except Problem as problem:
            response = problem.response()
        except ClientDisconnect:
            response = Problem(400, "the body ended early").response()
        await response(scope, receive, send)

    async def _respond(self, request: Request, operation: Operation) -> Response:
        bad: ValidationError | None = None
        if "user_id" in request.path_params:  # authorize sees it decoded, and one that is none as nobody
            try:
                request.path_params["user_id"] = _user_of(request.path_params["user_id"])
            except ValidationError as error:
                request.path_params["user_id"], bad = "", error
        if operation.who != "anybody":
            await self._admit(request, operation)
        if bad is not None:
            raise Problem(400, str(bad), error=type(bad).__name__)
        try:
            return await cast("Awaitable[Response]", getattr(self.endpoint, operation.name)(request))
        except StoreError as error:
            raise Problem.of(error, operation) from error

    async def _admit(self, request: Request, operation: Operation) -> None:
        """Raise unless who sent a request may do what it asks for."""
        challenge = {"WWW-Authenticate": "Bearer"}
        if "authorization" not in request.headers and _is_cross_site(request):
            raise Problem(401, "a request of another site needs the header Authorization", challenge)
        who = self._authorize(request)
        if inspect.isawaitable(who):
            who = await who
        if who is True:
            return
        if not isinstance(who, str) or not who:
            raise Problem(401, "not authorized", challenge)
        if operation.who != "user" or request.path_params["user_id"] != who:
            raise Problem(403, "a user may read and change the own state alone")


# What a request holds.


def _moment(field: str, value: Any) -> Any:
    """A time as a store takes it, of what a query or a body holds."""
    if not isinstance(value, str):
        return value
    try:
        if re.fullmatch(r"\d{1,19}", value, re.ASCII):
            return int(value)
        if len(value) <= 40:  # noqa: PLR2004 - the longest way to write a time has 35
            # In a query a + that is not encoded is a blank.
            return datetime.fromisoformat(re.sub(r"(T.*) (\d\d:?\d\d)$", r"\1+\2", value))
    except ValueError:
        pass  # as below
    raise ValidationError(
        f"{field}: milliseconds since 1970 or ISO 8601 with a time zone are needed, got {brief(value)}"
    )


def _limit_of(request: Request) -> int:
    text = request.query_params.get("limit", "100")
    return check_integer("limit", int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text, 1, MAX_PAGE)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a member is there twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("no number of JSON, or too large a one")
    return number


async def _body_of(request: Request) -> dict[str, Any]:
    """The object that a request brings, read and taken apart within bounds."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not re.fullmatch(r"application/(?:[\w.-]+\+)?json", kind):  # a page of another site cannot send it
        raise Problem(
            415, "the body is to be JSON, with Content-Type: application/json (curl --json sends it)"
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise Problem(413, f"a body has at most {_MAX_BODY:,} bytes")
    depth = deepest = 0
    for token in _BRACKETS.finditer(body):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        deepest = max(depth, deepest)
    if deepest > _MAX_DEPTH:
        raise Problem(400, f"a body has at most {_MAX_DEPTH} levels")
    try:
        found = json.loads(
            body.decode(), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Problem(400, f"the body is not JSON: see {where}") from None
    except ValueError:
        reason = "UTF-8, each member of an object once, and finite numbers are needed"
        raise Problem(400, f"the body is not JSON: {reason}") from None
    if not isinstance(found, dict):
        raise ValidationError(f"the body: an object is needed, got {type_name(found)}")
    return cast("dict[str, Any]", found)


async def _state_fields(request: Request, known: Sequence[str]) -> dict[str, Any]:
    """The fields of a state that a request brings, with the user of its path."""
    user_id = request.path_params["user_id"]
    fields = {"user_id": user_id, **await _body_of(request)}
    if fields["user_id"] != user_id:
        raise ValidationError("user_id: the body is to name the user of the path, or none")
    if not isinstance(fields.get("axes", {}), dict):
        raise ValidationError(f"axes: an object is needed, got {type_name(fields['axes'])}")
    if "updated_at_unix_ms" in fields:
        fields["updated_at_unix_ms"] = _moment("updated_at_unix_ms", fields["updated_at_unix_ms"])
    _check_known(fields, known)
    return fields


def _check_known(fields: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in fields:
        if name not in known:
            raise ValidationError(f"unknown field {brief(name)}; known are {', '.join(known)}")


# Conditional requests (RFC 9110): the ETag of a user's latest state.


def _tag(state: StateSnapshot) -> str:
    text = json.dumps(state.to_dict(), sort_keys=True)
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


def _is_conditional(request: Request) -> bool:
    return "if-match" in request.headers or "if-none-match" in request.headers


def _check_conditions(request: Request, latest: StateSnapshot | None) -> None:
    """Raise unless the latest state is what the request's conditions say."""
    tag = "" if latest is None else _tag(latest)
    for header, weak in (("If-Match", ""), ("If-None-Match", "(?:W/)?")):
        if header.lower() not in request.headers:
            continue
        given = ", ".join(request.headers.getlist(header)).strip()
        if not _TAGS.fullmatch(given):
            raise Problem(400, f'{header}: * or ETags in quotes are needed, as in "0a1b"')
        named = given == "*" or re.search(rf"(?:^|[ \t,]){weak}{tag}", given) is not None
        if (bool(tag) and named) is not bool(weak):
            continue
        if weak and request.method in ("GET", "HEAD"):
            raise Problem(304, "", {"ETag": tag})
        raise Problem(412, f"{header}: the latest state is another one, or not there")


def _state_answer(state: StateSnapshot, status: int = 200) -> Response:
    return _answer(state.to_dict(), status, {"ETag": _tag(state)})


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

    def _store_of(self, request: Request) -> AnyStore:
        """The store that a request names, or the only one."""
        stores = {store._operations.collection: store for store in self._stores}
        name = request.query_params.get("store")
        if name is None and len(self._stores) == 1:
            return self._stores[0]
        if name is None:
            raise Problem(400, f"store: one of {', '.join(stores)} is needed")
        if name not in stores:
            raise Problem(404, f"store: there is none of this name; there are {', '.join(stores)}")
        return stores[name]

    async def list_states(self, request: Request) -> Response:
        """A page of states, by user id."""
        store, limit = self._store_of(request), _limit_of(request)
        after = request.query_params.get("after", "")
        if isinstance(store, StateStore):
            users = store.users  # read in pages, in the thread
            chosen = await run_in_thread(
                lambda: heapq.nsmallest(limit + 1, (user for user in users() if user > after))
            )
        else:
            chosen = heapq.nsmallest(limit + 1, [user async for user in store.users() if user > after])
        page = chosen[:limit]
        states = await _call(store, "get_many", page)
        shown = [states[user].to_dict() for user in page if user in states]
        return _answer({"states": shown, "next": page[-1] if len(chosen) > limit else None})

    async def get_state(self, request: Request) -> Response:
        """The latest state of a user."""
        user_id = request.path_params["user_id"]
        latest = await _call(self._store_of(request), "get_latest", user_id)
        if latest is None:
            raise unknown_user_error(user_id)
        _check_conditions(request, latest)
        return _state_answer(latest)

    async def put_state(self, request: Request) -> Response:
        """Write a state of a user."""
        store, user_id = self._store_of(request), request.path_params["user_id"]
        known = [field.name for field in attrs.fields(StateSnapshot)]
        state = StateSnapshot.from_dict(await _state_fields(request, known))
        for _ in range(_MAX_ATTEMPTS):
            latest = await _call(store, "get_latest", user_id)
            _check_conditions(request, latest)
            try:
                expected = latest if _is_conditional(request) else ANY
                await _call(store, "upsert_latest", state, expected=expected)
            except ConflictError as conflict:
                if conflict.ambiguous:
                    raise
            else:
                return _state_answer(state, 201 if latest is None else 200)
        raise Problem(409, "others write to this user all the while; try again later")

    async def patch_state(self, request: Request) -> Response:
        """Merge axes and fields into the latest state of a user."""
        store = self._store_of(request)
        fields = await _state_fields(request, ["user_id", "axes", *SnapshotFields.__annotations__])
        user_id, axes = fields.pop("user_id"), fields.pop("axes", {})
        given = {name: value for name, value in axes.items() if value is not None}
        found: list[StateSnapshot | None] = []

        def merge(latest: StateSnapshot | None) -> StateSnapshot:
            _check_conditions(request, latest)
            found.append(latest)
            merged = (latest or StateSnapshot(user_id, {}, 0)).patched(
                given, **cast("SnapshotFields", fields)
            )
            kept = {name: value for name, value in merged.axes.items() if name in given or name not in axes}
            return attrs.evolve(merged, axes=kept)

        state = await _call(store, "update", user_id, merge)
        return _state_answer(state, 201 if found[-1] is None else 200)

    async def delete_state(self, request: Request) -> Response:
        """Remove all states of a user."""
        store, user_id = self._store_of(request), request.path_params["user_id"]
        if _is_conditional(request):
            _check_conditions(request, await _call(store, "get_latest", user_id))
        if not await _call(store, "delete", user_id):
            raise unknown_user_error(user_id)
        return _answer(None, 204)

    async def get_history(self, request: Request) -> Response:
        """The states of a user, newest first."""
        store, user_id = self._store_of(request), request.path_params["user_id"]
        bounds = {name: _moment(name, request.query_params.get(name)) for name in ("since", "until")}
        states = await _call(store, "get_history", user_id, _limit_of(request), **bounds)
        if not states and await _call(store, "get_latest", user_id) is None:
            raise unknown_user_error(user_id)
        return _answer({"states": [state.to_dict() for state in states]})

    async def search(self, request: Request) -> Response:
        """The users whose latest states are most like a query."""
        store, options = self._store_of(request), await _body_of(request)
        _check_known(options, sorted(_SEARCH_FIELDS))
        query = options.pop("query", None)
        if not isinstance(query, str | dict):
            raise ValidationError("query: axes, or the id of a user, are needed")
        check_integer("limit", options.get("limit", 1), 1, MAX_PAGE)
        times = {name: _moment(name, options[name]) for name in ("since", "until") if name in options}
        matches = await _call(store, "search_similar", query, **options | times)
        return _answer(
            {"matches": [{"state": match.snapshot.to_dict(), "score": match.score} for match in matches]}
        )

    async def openapi(self, request: Request) -> Response:
        """The service as OpenAPI."""
        return _answer(openapi_document(request.scope.get("root_path", "")))

    async def docs(self, request: Request) -> Response:
        """The service as a page, which fetches nothing."""
        from starlette.responses import HTMLResponse

        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        url = f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '')}"
        return HTMLResponse(docs_page(url), headers={**_HEADERS, **policy})

    async def root(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Lead to the page."""
        from starlette.responses import RedirectResponse

        return RedirectResponse("docs")

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
        found = [await _call(store, "health") for store in self._stores]
        worst = max((health.status for health in found), key=_STATUSES.index)
        content = {"status": worst, "stores": [attrs.asdict(health) for health in found]}
        return _answer(content, 503 if worst == "unhealthy" else 200)

    async def ready(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Say whether every store answers, and no more: anybody may ask."""
        found = [await _call(store, "health") for store in self._stores]
        ready = all(health.status != "unhealthy" for health in found)
        return _answer({"ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002 - nothing in it is looked at
        """Hand out what prometheus_client has collected in this process."""
        from starlette.responses import Response

        try:
            from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
        except ImportError:
            raise Problem(404, "prometheus_client is not installed") from None
        return Response(generate_latest(), headers={**_HEADERS, "Content-Type": CONTENT_TYPE_LATEST})


def _application(
    stores: Sequence[AnyStore],
    operations: Sequence[Operation],
    authorize: _Authorize,
    directory: str | os.PathLike[str] | None,
    keep: int | None,
) -> Starlette:
    """The application that answers some operations."""
    if not stores:
        raise ValidationError("stores: at least one store is needed")
    for store in stores:
        if not isinstance(store, StateStore | AsyncStateStore):
            raise ValidationError(f"stores: a store is needed, got {type_name(store)}")
    check_callable("authorize", authorize)
    if keep is not None:
        check_integer("keep", keep, 1, MAX_INTEGER)
    names = [store._operations.collection for store in stores]
    if (keep is not None or STATES[0] in operations) and len(set(names)) < len(names):
        raise ValidationError(
            f"{'stores' if keep is None else 'keep'}: the stores' collections are to have different names, "
            "or each its own app"
        )
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.routing import Route
    except ImportError as error:
        raise MissingDependencyError("this needs Starlette: pip install starlette") from error

    async def tell(request: Request, error: Exception) -> Response:  # noqa: ARG001 - as Starlette calls it
        if isinstance(error, HTTPException):
            return Problem(error.status_code, str(error.detail), error.headers).response()
        return Problem(500, "an error within the service, or in what authorizes its requests").response()

    endpoint = Endpoint(stores, None if directory is None else absolute_path(directory), keep)
    routes = [
        Route(path, _Resource(endpoint, [row for row in operations if row.path == path], authorize))
        for path in dict.fromkeys(operation.path for operation in operations)
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_EncodedPaths)],
        exception_handlers={HTTPException: tell, Exception: tell},
    )
    app.router.redirect_slashes = False
    return app


def service_app(
    *stores: StateStore | AsyncStateStore,
    authorize: Callable[[Request], bool | str | Awaitable[bool | str | None] | None] | None = None,
    directory: str | os.PathLike[str] | None = None,
    keep: int | None = None,
) -> Starlette:
    """An ASGI application that serves stores: their states, histories and searches, as JSON over HTTP.

    ``GET``, ``PUT``, ``PATCH``, ``DELETE /api/states/{user_id}``, ``GET /api/states/{user_id}/history``,
    ``GET /api/states``, ``POST /api/search``, and what snapshot_app answers, with ``directory`` and ``keep``;
    ``GET /docs`` and ``/openapi.json`` describe it. States have the shape of StateSnapshot.to_dict, and an
    ETag for conditional writes (a DELETE is checked against its condition just before). Where there are
    several stores, ``?store=`` names the collection of the one that is meant.

    ``authorize`` gets each request but those for /api/ready and the description, with the id in
    ``request.path_params["user_id"]``. It returns, or returns an awaitable of, True for who may do
    everything, the id of a user who may read and change the own state alone, or False or None for nobody;
    it may raise an HTTPException. Without it, only requests from this machine to this machine are answered.
    Requests that a page of another site sends are refused unless they have the header Authorization.

    Mount it in FastAPI or Starlette, or run it by itself; the stores stay the caller's to close. Raises
    ValidationError, also where collections of several stores have the same name, MissingDependencyError.
    """
    chosen = _is_local if authorize is None else authorize
    return _application(stores, (*STATES, *BACKUPS), chosen, directory, keep)


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
    chosen = _is_anybody if authorize is None else authorize
    return _application(stores, BACKUPS, chosen, directory, keep)

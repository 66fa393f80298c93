"""What the service answers, in one table: its routes, its OpenAPI document and its page are made of it."""

from __future__ import annotations

import html
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from attuned.base.values import MAX_AXES, MAX_INTEGER, MAX_TIME_MS, MAX_USER_ID_BYTES, Source

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_PAGE: Final = 1_000  # states or matches in one answer


class Operation(NamedTuple):
    """One method of one path; ``name`` is that of the method of Endpoint that answers.

    ``answers`` tells of each status the schema of its body, or the media type where it is no JSON; ``body``
    the schema of what is sent.
    """

    method: str
    path: str
    name: str
    summary: str
    answers: Mapping[int, str]
    parameters: tuple[str, ...] = ()
    body: str = ""

    @property
    def who(self) -> Literal["anybody", "user", "all"]:
        """Who may ask: anybody, the user of the path, or only who may do everything."""
        if self.name in {"ready", "openapi", "docs", "root"}:
            return "anybody"
        return "user" if "user_id" in self.parameters else "all"

    def problems(self) -> set[int]:
        """The statuses of the problems that it may answer with."""
        found: list[tuple[bool, tuple[int, ...]]] = [
            (self.who != "anybody", (401, 403)),
            (bool(self.parameters), (400, 404, 503)),
            (bool(self.body), (413, 415, 422)),
            ("If-Match" in self.parameters, (412,)),
            (self.method in ("PUT", "PATCH"), (409,)),
            (self.name == "metrics", (404,)),
        ]
        return {status for applies, statuses in found if applies for status in statuses}


_STATE = "/api/states/{user_id}"
_PAGE = ("limit", "after", "store")
_RANGE = ("user_id", "limit", "since", "until", "store")
_CONDITIONS = ("user_id", "If-Match", "If-None-Match", "store")
_WRITTEN = {200: "State", 201: "State"}
_REPORTS = {200: "Reports", 207: "Reports", 503: "Reports"}
_LOOKED = {200: "Health", 503: "Health"}
_PUT_SUMMARY = "Writes a state: into history, and as the latest if none is newer."
_PATCH_SUMMARY = "Merges axes and fields into the latest state; null removes an axis."
BACKUPS = (
    Operation("POST", "/api/snapshot", "snapshot", "Takes a snapshot (a backup) of every store.", _REPORTS),
    Operation("GET", "/api/health", "health", "How each store is, and the worst of them.", _LOOKED),
    Operation("GET", "/api/ready", "ready", "Whether every store answers.", {200: "Ready", 503: "Ready"}),
    Operation("GET", "/metrics", "metrics", "What prometheus_client collects.", {200: "text/plain"}),
)
STATES = (
    Operation("GET", "/api/states", "list_states", "The latest states of all users.", {200: "Page"}, _PAGE),
    Operation("GET", _STATE, "get_state", "The latest state.", {200: "State", 304: ""}, _CONDITIONS),
    Operation("PUT", _STATE, "put_state", _PUT_SUMMARY, _WRITTEN, _CONDITIONS, "NewState"),
    Operation("PATCH", _STATE, "patch_state", _PATCH_SUMMARY, _WRITTEN, _CONDITIONS, "Patch"),
    Operation("DELETE", _STATE, "delete_state", "Removes a user's states.", {204: ""}, _CONDITIONS),
    Operation("GET", f"{_STATE}/history", "get_history", "States, newest first.", {200: "States"}, _RANGE),
    Operation(
        "POST", "/api/search", "search", "Who feels most alike.", {200: "Matches"}, ("store",), "Search"
    ),
    Operation("GET", "/openapi.json", "openapi", "This, as OpenAPI 3.1.", {200: "OpenAPI"}),
    Operation("GET", "/docs", "docs", "This, to be read.", {200: "text/html"}),
    Operation("GET", "/", "root", "Leads to /docs.", {307: ""}),
)
_PARAMETERS = {
    "user_id": f"1 to {MAX_USER_ID_BYTES} bytes of UTF-8, percent-encoded: a slash is %2F.",
    "store": "The collection of the store, where several are served.",
    "limit": f"At most so many, 1 to {MAX_PAGE}; default: 100.",
    "after": "Only users after this one, as the next of the page before says.",
    "since": "Not before: milliseconds since 1970, or ISO 8601 with a time zone.",
    "until": "Not after; as since.",
    "If-Match": "Only if the latest state has this ETag, or with * if there is one; else 412.",
    "If-None-Match": "Only if it has another ETag, or with * if there is none; else 412, or 304 to GET.",
}


def _parameter(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if name == "limit":
        schema = {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 100}
    place = "path" if name == "user_id" else "header" if name[0].isupper() else "query"
    required = place == "path"
    return {
        "name": name,
        "in": place,
        "required": required,
        "description": _PARAMETERS[name],
        "schema": schema,
    }


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    """The schema of an object that has these members and no others."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _list_of(name: str) -> dict[str, Any]:
    return {"type": "array", "items": {"$ref": f"#/components/schemas/{name}"}}


def _schemas() -> dict[str, Any]:
    """The schemas of what is sent and answered."""
    text: dict[str, Any] = {"type": "string"}
    unit = {"type": "number", "minimum": 0, "maximum": 1}
    user_id = text | {"minLength": 1, "maxLength": MAX_USER_ID_BYTES}
    time = {"type": "integer", "minimum": 0, "maximum": MAX_TIME_MS}
    any_time = {"oneOf": [time, text | {"format": "date-time"}]}
    source = text | {"enum": [source.value for source in Source]}
    axes = {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z0-9]([a-z0-9_]{0,62}[a-z0-9])?$"},
        "additionalProperties": unit,
        "maxProperties": MAX_AXES,
    }
    state = {
        "user_id": user_id,
        "axes": axes,
        "updated_at_unix_ms": time,
        "source": source,
        "confidence": unit,
        "schema_version": {"type": "integer", "minimum": 1, "maximum": MAX_INTEGER},
    }
    given = state | {"updated_at_unix_ms": any_time}
    merged = axes | {"additionalProperties": {"oneOf": [unit, {"type": "null"}]}}
    search = {
        "query": {"oneOf": [axes, user_id], "description": "Axes, or the id of a user, who is left out."},
        "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 10},
        "score_threshold": {"type": "number"},
        "user_id": user_id,
        "exclude_user_id": text,
        "source": source,
        "min_confidence": unit,
        "since": any_time,
        "until": any_time,
        "history": {"type": "boolean", "default": False},
    }
    one_state = {"$ref": "#/components/schemas/State"}
    loose = {"type": "object"}
    return {
        "State": _object(state),
        "NewState": _object(given, ["axes"]),
        "Patch": _object(given | {"axes": merged}, []),
        "Page": _object({"states": _list_of("State"), "next": {"type": ["string", "null"]}}),
        "States": _object({"states": _list_of("State")}),
        "Search": _object(search, ["query"]),
        "Match": _object({"state": one_state, "score": {"type": "number"}}),
        "Matches": _object({"matches": _list_of("Match")}),
        "Ready": _object({"ready": {"type": "boolean"}}),
        "Health": _object({"status": text, "stores": {"type": "array", "items": loose}}),
        "Reports": _object({"status": text, "results": {"type": "array", "items": loose}}),
        "OpenAPI": loose,
        "Problem": {
            "type": "object",
            "description": "RFC 9457; `error` names the error of the library, where it is one.",
            "properties": {
                "title": text,
                "status": {"type": "integer"},
                "detail": text,
                "error": text,
                "ambiguous": {"type": "boolean", "description": "It may have been done."},
            },
            "required": ["title", "status", "detail"],
        },
    }


def _described(operation: Operation) -> dict[str, Any]:
    """An operation, as OpenAPI describes it."""
    responses: dict[str, Any] = {}
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    problems = operation.problems()
    for status in sorted({*operation.answers} | problems):
        kind = operation.answers.get(status, "")
        response: dict[str, Any] = {"description": HTTPStatus(status).phrase}
        if "/" in kind:
            response["content"] = {kind: {"schema": {"type": "string"}}}
        elif kind:
            schema = {"$ref": f"#/components/schemas/{kind}"}
            response["content"] = {"application/json": {"schema": schema}}
        if status in problems:
            response["content"] = response.get("content", {}) | problem
        if kind == "State":
            response["headers"] = {"ETag": {"schema": {"type": "string"}}}
        responses[str(status)] = response
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": list(map(_parameter, operation.parameters)),
        "responses": responses,
    }
    if operation.body:
        schema = {"$ref": f"#/components/schemas/{operation.body}"}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if operation.who == "anybody":
        described["security"] = []
    return described


def openapi_document(prefix: str) -> dict[str, Any]:
    """The service as an OpenAPI 3.1 document; ``prefix`` is the path that it is mounted under."""
    from attuned import __version__

    paths: dict[str, dict[str, Any]] = {}
    for operation in (*STATES, *BACKUPS):
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "attuned_store", "version": __version__},
        "servers": [{"url": prefix or "/"}],
        "security": [{"bearer": []}, {}],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 13px/1.5 ui-monospace, monospace }
pre { padding: .7rem 1rem; overflow-x: auto; background: rgba(128, 128, 128, .12); border-radius: 6px }
h2 { font-size: 1rem; margin: 2rem 0 .2rem }
h2 b { display: inline-block; min-width: 4.5rem; color: #3b7dd8 }
p { margin: .2rem 0 } dl { margin: .4rem 0 } dt { float: left; clear: left }
dd { margin-left: 9rem } small { opacity: .75 }
"""
_EXAMPLES = {
    "put_state": """curl -X PUT {url}/api/states/ada --json '{"axes": {"warmth": 0.8}, "confidence": 0.9}'""",
    "patch_state": """curl -X PATCH {url}/api/states/ada --json '{"axes": {"warmth": 0.6}}'""",
    "get_state": "curl -i {url}/api/states/ada",
    "get_history": "curl '{url}/api/states/ada/history?limit=10&since=2026-01-01T00:00Z'",
    "search": """curl {url}/api/search --json '{"query": {"warmth": 0.9}, "limit": 5}'""",
}


def docs_page(url: str) -> str:
    """The service as a page of HTML, which fetches nothing; ``url`` is where it is."""
    parts: list[str] = []
    for operation in (*STATES, *BACKUPS):
        parts.append(f"<h2><b>{operation.method}</b> <code>{html.escape(operation.path)}</code></h2>")
        parts.append(f"<p>{html.escape(operation.summary)}</p>")
        told = "".join(
            f"<dt><code>{name}</code></dt><dd>{html.escape(_PARAMETERS[name])}</dd>"
            for name in operation.parameters
        )
        parts.append(f"<dl>{told}</dl>" if told else "")
        answers = ", ".join(map(str, sorted({*operation.answers} | operation.problems())))
        body = f"Body: {operation.body}. " if operation.body else ""
        parts.append(f"<p><small>{body}Answers: {answers}</small></p>")
        if operation.name in _EXAMPLES:
            parts.append(f"<pre>{html.escape(_EXAMPLES[operation.name].replace('{url}', url))}</pre>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>attuned_store</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style><h1>attuned_store</h1>"
        "<p>The states of users over HTTP: JSON in and out, problems as RFC 9457 has them. "
        "A token, where one is asked for, goes into <code>Authorization: Bearer</code>. "
        'Schemas are in <a href="openapi.json">openapi.json</a>.</p>' + "".join(parts) + "</html>\n"
    )

"""A Qdrant server for tests: real HTTP on a loopback socket, Qdrant's semantics underneath, faults on demand.

    with QdrantServer() as server:
        client = QdrantClient(url=server.url, check_compatibility=False)
        server.on(reply(503), method="PUT", times=2)  # the next two PUTs fail
        server.on(lose_reply(), when=Request.is_write, probability=0.1)
        ...
        assert server.counts["PUT /collections/{collection}/points"] == 3

What is real: sockets, HTTP/1.1 with keep-alive, paths, status codes, and the JSON of requests and replies.
Requests are parsed by qdrant_client.http.models; what they ask is executed by qdrant-client's local engine
(in memory), which qdrant-client keeps in step with the server. Where that engine differs from the server, it
is corrected here: of one id twice in a batch the last wins and conditions see the state before the batch (as
in Qdrant Edge, the server's own engine); retrieve drops repeated ids; order_by and facet need an index;
vectors and scores are 32 bit floats. Error texts follow the server's source.

What is not: no persistence, one node, one shard whatever shard_number says (so a request is always atomic),
exact search, every write is visible at once (wait=false only changes the answer), consistency and ordering
are checked and ignored; no JWT, full or shard snapshots, inference, gRPC, TLS or Range. Fields
unknown to qdrant-client are refused, where a server ignores many. A snapshot file is a tar, but of JSON: no
real server reads it.

Everything runs on one asyncio loop in one background thread, so requests are executed one at a time; waiting
(delay, hang, a slow reader) holds up nobody else. Attributes may be set and rules added from any thread. For
measurements, where it must not share an interpreter with the client, there is in_own_process().
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import gzip
import hashlib
import http
import io
import itertools
import json
import logging
import math
import random
import re
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from functools import cache, partial
from typing import IO, Any, Self, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json
from qdrant_client.http import models
from qdrant_client.local.local_collection import LocalCollection
from qdrant_client.local.payload_filters import check_filter, validate_filter
from qdrant_client.local.payload_value_extractor import value_by_key
from qdrant_client.local.qdrant_local import QdrantLocal
from qdrant_client.local.utils import normalize_point_id

log = logging.getLogger("tests.qdrant_server")
log.addHandler(logging.NullHandler())

MIB = 1 << 20
HEAD_LIMIT = 64 << 10  # request line and headers
DEFAULT_PARAMS = {
    "replication_factor": 1,
    "write_consistency_factor": 1,
    "on_disk_payload": True,
    "shard_number": 1,
}
JSON_LIMIT = 32 * MIB  # the server's max_request_size_mb
PEER_ID = 6333633363336333  # part of snapshot names
OPEN_PATHS = ("/", "/healthz", "/readyz", "/livez")  # need no api key


# Requests and responses -------------------------------------------------------


def rounded_float(text: str) -> float:
    """A number as Qdrant reads it: its digits as an integer, which is divided by a power of ten."""
    digits, _, exponent = text.lower().partition("e")
    whole, _, fraction = digits.partition(".")
    places = len(fraction) - int(exponent or 0)
    return float(whole + fraction) / 10.0**places if 0 <= places <= 22 else float(text)


@dataclasses.dataclass(slots=True)
class Request:
    """One request as it arrived. `body` is empty for an upload, whose size is `size`."""

    ordinal: int  # since the server started or clear(), from 0
    connection: int  # ordinal of the accepted socket
    method: str
    path: str  # as sent, still quoted
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes = b""
    size: int = 0
    route: str = ""  # "PUT /collections/{collection}/points", "" for an unknown path
    params: dict[str, str] = dataclasses.field(default_factory=dict)  # of the path, unquoted
    upload: IO[bytes] | None = dataclasses.field(default=None, repr=False)

    @property
    def json(self) -> Any:
        return json.loads(self.body, parse_float=rounded_float)

    def is_write(self) -> bool:
        """Whether it changes points (not collections, indexes, aliases or snapshots)."""
        return self.route in WRITE_ROUTES

    def is_read(self) -> bool:
        """Whether it reads points."""
        return self.route in READ_ROUTES


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """A body that is produced while it is sent."""

    length: int
    chunks: Callable[[], Iterator[bytes]]


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """What is sent back, and how the connection ends."""

    status: int = 200
    body: bytes | Stream = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    cut: int | None = None  # send only so many bytes of the body, then end the connection
    silent: bool = False  # send nothing at all, end the connection
    reset: bool = False  # end it with a reset (RST) and not in an orderly way
    chunked: bool = False  # without Content-Length
    pause: float = 0.0  # seconds after each piece of the body
    slow_head: float = 0.0  # seconds after each byte of the status line and the headers
    continues: int = 0  # how often "100 Continue" is sent before

    @property
    def length(self) -> int:
        return self.body.length if isinstance(self.body, Stream) else len(self.body)

    def pieces(self) -> Iterator[bytes]:
        return self.body.chunks() if isinstance(self.body, Stream) else iter((self.body,))


class ApiError(Exception):
    """Answered as the server's {"status": {"error": ...}}."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers or {}


def json_response(result: Any, started: float, status: int = 200) -> Response:
    body = {"result": result, "status": "ok", "time": time.perf_counter() - started}
    return Response(status, to_json(body, inf_nan_mode="null"))


def error_response(status: int, text: str, started: float | None = None) -> Response:
    elapsed = 0.0 if started is None else time.perf_counter() - started
    return Response(status, to_json({"status": {"error": text}, "time": elapsed}))


# Faults: what can be done to a request instead of, before or after executing it ---


@dataclasses.dataclass(slots=True)
class Exchange:
    """What an action gets: the server, the request, and `proceed`, which executes it or lets another act."""

    server: QdrantServer
    request: Request
    proceed: Callable[[], Awaitable[Response]]


Action: TypeAlias = Callable[[Exchange], Awaitable[Response]]


def reply(
    status: int, body: Any = None, headers: dict[str, str] | None = None, *, apply: bool = False
) -> Action:
    """Answer with this status and headers; `body` is bytes, JSON, or by default the server's error shape."""

    async def act(exchange: Exchange) -> Response:
        if apply:
            await exchange.proceed()
        if body is None:
            return dataclasses.replace(error_response(status, _phrase(status)), headers=headers or {})
        return Response(status, body if isinstance(body, bytes) else json.dumps(body).encode(), headers or {})

    return act


def rate_limited(retry_after: float | str | None = 1) -> Action:
    """429, with Retry-After unless it is None."""
    text = "Rate limiting exceeded: Write rate limit exceeded, retry later"
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return reply(429, {"status": {"error": text}, "time": 0.0}, headers)


def not_json(*, apply: bool = False) -> Action:
    """200 with a page of HTML, as a proxy or a wrong port would answer."""
    return reply(200, b"<html><body>It works!</body></html>", {"Content-Type": "text/html"}, apply=apply)


def other_shape(body: Any = None, *, apply: bool = False) -> Action:
    """200 with JSON that is not Qdrant's."""
    return reply(200, {"message": "hello"} if body is None else body, apply=apply)


def delay(seconds: float) -> Action:
    """Wait, then go on."""

    async def act(exchange: Exchange) -> Response:
        await asyncio.sleep(seconds)
        return await exchange.proceed()

    return act


def hang(bound: float = 10.0, *, apply: str = "never") -> Action:
    """Say nothing until server.release(), at most `bound` seconds; then end the connection without a reply.

    apply="before" executes the request first, "after" once released (then it replies); else it is lost.
    """

    async def act(exchange: Exchange) -> Response:
        if apply == "before":
            await exchange.proceed()
        released = await exchange.server._wait_release(bound)
        return await exchange.proceed() if apply == "after" and released else Response(silent=True)

    return act


def drop(*, reset: bool = False) -> Action:
    """End the connection without executing the request."""

    async def act(_: Exchange) -> Response:
        return Response(silent=True, reset=reset)

    return act


def lose_reply(*, reset: bool = False) -> Action:
    """Execute the request, then end the connection without a reply."""
    return _ending(silent=True, reset=reset)


def truncate(keep: int | None = None) -> Action:
    """Execute, then close after `keep` bytes of the body (half of it), short of Content-Length."""
    return _cutting(keep, reset=False)


def reset(keep: int | None = None) -> Action:
    """Execute, then reset the connection after `keep` bytes of the body (half of it)."""
    return _cutting(keep, reset=True)


def shorten(keep: int = 0) -> Action:
    """Only `keep` bytes of the body, with a Content-Length that agrees: nothing looks wrong to HTTP."""

    async def act(exchange: Exchange) -> Response:
        response = await exchange.proceed()
        body = Stream(min(keep, response.length), partial(_limited, response.pieces, keep))
        return dataclasses.replace(response, body=body)

    return act


def corrupt(offset: int = 0) -> Action:
    """Flip the bits of one byte of the body."""

    def flipped(pieces: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
        start = 0
        for piece in pieces():
            if start <= offset < start + len(piece):
                at = offset - start
                yield piece[:at] + bytes((piece[at] ^ 0xFF,)) + piece[at + 1 :]
            else:
                yield piece
            start += len(piece)

    async def act(exchange: Exchange) -> Response:
        response = await exchange.proceed()
        return dataclasses.replace(response, body=Stream(response.length, partial(flipped, response.pieces)))

    return act


def chunked() -> Action:
    """Send the body chunked, without Content-Length."""
    return _ending(chunked=True)


def drip(seconds: float) -> Action:
    """Send the body byte by byte, so many seconds apart."""

    def bytewise(pieces: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
        return (piece[at : at + 1] for piece in pieces() for at in range(len(piece)))

    async def act(exchange: Exchange) -> Response:
        response = await exchange.proceed()
        body = Stream(response.length, partial(bytewise, response.pieces))
        return dataclasses.replace(response, body=body, pause=seconds)

    return act


def drip_head(seconds: float) -> Action:
    """Send the status line and the headers byte by byte, so many seconds apart."""
    return _ending(slow_head=seconds)


def keep_promising(seconds: float, times: int = 100) -> Action:
    """Send "100 Continue" again and again, so many seconds apart, before the answer."""
    return _ending(continues=times, slow_head=seconds)


def duplicate() -> Action:
    """Execute twice, as if the network had delivered the request twice; the second answer counts."""

    async def act(exchange: Exchange) -> Response:
        await exchange.proceed()
        return await exchange.proceed()

    return act


def edit(change: Callable[[Any], Any]) -> Action:
    """Execute, then pass the reply's JSON through `change` (which may also alter it in place)."""

    async def act(exchange: Exchange) -> Response:
        response = await exchange.proceed()
        body = json.loads(b"".join(response.pieces()))
        changed = change(body)
        return dataclasses.replace(response, body=json.dumps(body if changed is None else changed).encode())

    return act


def edit_result(remove: tuple[str, ...] = (), **fields: Any) -> Action:
    """Execute, then remove and set fields of the "result" in the reply."""

    def change(body: Any) -> Any:
        kept = {name: value for name, value in body["result"].items() if name not in remove}
        return body | {"result": kept | fields}

    return edit(change)


def tear(act: Callable[[], object]) -> Action:
    """Read as from several shards: the latest points as they are, the others after someone has acted."""

    async def action(exchange: Exchange) -> Response:
        first = json.loads(b"".join((await exchange.proceed()).pieces()))
        await asyncio.to_thread(act)
        second = json.loads(b"".join((await exchange.proceed()).pieces()))
        points = [
            point
            for body, takes in ((first, True), (second, False))
            for point in body["result"]["points"]
            if (point["payload"].get("kind") == "latest") == takes
        ]
        second["result"]["points"] = points
        return Response(200, json.dumps(second).encode())

    return action


def postpone(status: str = "wait_timeout", *, apply: bool = False) -> Action:
    """Answer a write that it has been taken in, no more, as a server does whose queue is long."""

    async def act(exchange: Exchange) -> Response:
        if apply:
            await exchange.proceed()
        done = {"operation_id": 0, "status": status}
        batch = exchange.request.route.endswith("/batch")
        return json_response([done for _ in exchange.request.json["operations"]] if batch else done, 0.0)

    return act


def go_down(*, apply: bool = False) -> Action:
    """Stop listening and end every connection, this one too, until server.up()."""

    async def act(exchange: Exchange) -> Response:
        if apply:
            await exchange.proceed()
        exchange.server._stop_listening()
        return Response(silent=True, reset=True)

    return act


def one_of(*actions: Action) -> Action:
    """Any of these, by the server's random numbers."""

    async def act(exchange: Exchange) -> Response:
        return await exchange.server.random.choice(actions)(exchange)

    return act


def any_fault() -> Action:
    """One of the faults a client should survive by retrying; some apply the request and some do not."""
    not_applied = [reply(status) for status in (408, 500, 502, 503, 504)]
    not_applied += [rate_limited(0), drop(), drop(reset=True)]
    applied = [reply(503, apply=True), lose_reply(), lose_reply(reset=True), truncate(), reset(), duplicate()]
    return one_of(*not_applied, *applied)


def _ending(**fields: Any) -> Action:
    async def act(exchange: Exchange) -> Response:
        return dataclasses.replace(await exchange.proceed(), **fields)

    return act


def _cutting(keep: int | None, *, reset: bool) -> Action:
    async def act(exchange: Exchange) -> Response:
        response = await exchange.proceed()
        cut = response.length // 2 if keep is None else keep
        return dataclasses.replace(response, cut=cut, reset=reset)

    return act


def _limited(pieces: Callable[[], Iterator[bytes]], keep: int) -> Iterator[bytes]:
    for piece in pieces():
        yield piece[:keep]
        keep -= len(piece)
        if keep <= 0:
            return


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


@dataclasses.dataclass(slots=True, eq=False)
class Rule:
    """An action and the requests it is for. A context manager: removed at the end of the block."""

    server: QdrantServer
    action: Action
    method: str | None = None
    route: str | None = None
    path: re.Pattern[str] | None = None
    when: Callable[[Request], bool] | None = None
    skip: int = 0
    times: int | None = None
    probability: float = 1.0
    hits: int = 0  # how often it acted

    def takes(self, request: Request) -> bool:
        """Whether it acts on this request; counts."""
        if not self._matches(request) or (self.times is not None and self.hits >= self.times):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.probability < 1 and self.server.random.random() >= self.probability:
            return False
        self.hits += 1
        return True

    def _matches(self, request: Request) -> bool:
        return (
            self.method in (None, request.method)
            and self.route in (None, request.route)
            and (self.path is None or self.path.search(request.path) is not None)
            and (self.when is None or self.when(request))
        )

    def remove(self) -> None:
        with contextlib.suppress(ValueError):
            self.server.rules.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


# Engine: the local collection, faster where tests need it, corrected where the server differs ---


class _Payloads(list[Any]):
    """A collection's payloads, with the points of every value of the keys that have a keyword index."""

    def __init__(self) -> None:
        super().__init__()
        self.postings: dict[str, dict[str, set[int]]] = {}
        self._terms: dict[str, dict[int, set[str]]] = {}

    def append(self, payload: Any) -> None:
        super().append(payload)
        self._post(len(self) - 1)

    def __setitem__(self, position: Any, payload: Any) -> None:
        super().__setitem__(position, payload)
        self._post(position)

    def add_index(self, key: str) -> None:
        self.postings[key], self._terms[key] = collections.defaultdict(set), {}
        for position in range(len(self)):
            self._post_key(key, position)

    def drop_index(self, key: str) -> None:
        self.postings.pop(key, None)
        self._terms.pop(key, None)

    def _post(self, position: int) -> None:
        for key in self.postings:
            self._post_key(key, position)

    def _post_key(self, key: str, position: int) -> None:
        postings = self.postings[key]
        for term in self._terms[key].pop(position, ()):
            postings[term].discard(position)
        terms = {value for value in value_by_key(self[position], key) or () if isinstance(value, str)}
        for term in terms:
            postings[term].add(position)
        self._terms[key][position] = terms


class _Collection(LocalCollection):
    """A local collection whose indexed filters do not look at every point. Positions are internal ids."""

    LARGE_DATA_THRESHOLD = sys.maxsize  # no warning
    payload: _Payloads

    def __init__(self, config: models.CreateCollection) -> None:
        super().__init__(config)
        self.payload = _Payloads()
        self.indexes: dict[str, models.PayloadFieldSchema] = {}
        self.operations = itertools.count()
        self.strict = _StrictMode(self)
        self._order: list[tuple[tuple[str, int], int]] = []  # all ids as the server orders them, positions

    # Indexes

    def create_payload_index(self, field_name: str, field_schema: Any) -> None:
        super().create_payload_index(field_name, field_schema)
        self.indexes[field_name] = field_schema
        self.payload.drop_index(field_name)
        if index_type(field_schema) == "keyword":
            self.payload.add_index(field_name)

    def delete_payload_index(self, field_name: str) -> None:
        super().delete_payload_index(field_name)
        self.indexes.pop(field_name, None)
        self.payload.drop_index(field_name)

    def has_index(self, key: str, *types: str) -> bool:
        return key in self.indexes and index_type(self.indexes[key]) in types

    def indexed_points(self, key: str) -> int:
        """How many points have the key; value_by_key, which knows paths, takes 10 us each."""
        value = dict.get if key.isidentifier() else value_by_key
        return sum(value(self.payload[position], key) is not None for position in self._alive())

    # Filters

    def _payload_and_non_deleted_mask(
        self, payload_filter: models.Filter | None, vector_name: str | None = None
    ) -> Any:
        found, exact = self._narrow(payload_filter)
        if payload_filter is None or found is None:
            return super()._payload_and_non_deleted_mask(payload_filter, vector_name)
        validate_filter(payload_filter)
        mask = np.zeros(len(self.payload), dtype=bool)
        mask[[p for p in found if exact or self._accepts(payload_filter, p)]] = True
        mask[self.deleted.astype(bool)] = False
        if vector_name is not None:
            mask[self.deleted_per_vector[vector_name].astype(bool)] = False
        return mask

    def _accepts(self, payload_filter: models.Filter, position: int) -> bool:
        has_vector = self._calculate_has_vector(position)
        return check_filter(payload_filter, self.payload[position], self.ids_inv[position], has_vector)

    def _narrow(self, payload_filter: models.Filter | None) -> tuple[set[int] | None, bool]:
        """The positions outside of which the filter cannot hold (None: unknown); if it holds for them all."""
        if payload_filter is None or not payload_filter.must:
            return None, False
        must = payload_filter.must if isinstance(payload_filter.must, list) else [payload_filter.must]
        known = [found for found in map(self._positions, must) if found is not None]
        other = payload_filter.must_not or set_fields(payload_filter) - {"must", "must_not"}
        exact = len(known) == len(must) and not other
        return (set.intersection(*known) if known else None), exact

    def _positions(self, condition: models.Condition) -> set[int] | None:
        """The positions that satisfy a condition, when an index knows them."""
        if isinstance(condition, models.HasIdCondition):
            ids = (self.ids.get(normalize_point_id(point_id)) for point_id in condition.has_id)
            return {position for position in ids if position is not None}
        if not isinstance(condition, models.FieldCondition) or condition.key not in self.payload.postings:
            return None
        if set_fields(condition) - {"key", "match"}:
            return None
        postings, match = self.payload.postings[condition.key], condition.match
        if isinstance(match, models.MatchValue) and isinstance(match.value, str):
            return set(postings.get(match.value, ()))
        if isinstance(match, models.MatchAny) and all(isinstance(value, str) for value in match.any):
            return set().union(*(postings.get(str(value), set()) for value in match.any))
        return None

    def _filter_to_ids(self, delete_filter: models.Filter) -> list[models.ExtendedPointId]:
        return [self.ids_inv[position] for position in self._matching(delete_filter)]

    def _matching(self, payload_filter: models.Filter | None) -> list[int]:
        positions: list[int] = np.flatnonzero(self._payload_and_non_deleted_mask(payload_filter)).tolist()
        return positions

    def _alive(self) -> list[int]:
        return self._matching(None)

    # Reading

    def _get_payload(self, idx: int, with_payload: Any = True, return_copy: bool = True) -> Any:
        """Not copied: it is turned into JSON before anything else happens."""
        return super()._get_payload(idx, with_payload, return_copy=False)

    def retrieve(self, ids: Any, with_payload: Any = True, with_vectors: Any = False) -> list[models.Record]:
        """Each point once, in the order asked for."""
        return super().retrieve(list(dict.fromkeys(map(normalize_point_id, ids))), with_payload, with_vectors)

    def scroll(  # type: ignore[override]
        self,
        scroll_filter: models.Filter | None = None,
        limit: int = 10,
        order_by: models.OrderBy | None = None,
        offset: models.ExtendedPointId | None = None,
        with_payload: Any = True,
        with_vectors: Any = False,
    ) -> tuple[list[models.Record], models.ExtendedPointId | None]:
        """The engine's own scroll, shown only the points that can be on this page."""
        validate_filter(scroll_filter)
        ordered = order_by is not None
        positions = self._matching(scroll_filter) if ordered else self._page(scroll_filter, limit, offset)
        everything, self.ids = self.ids, {self.ids_inv[position]: position for position in positions}
        try:
            return super().scroll(None, limit, order_by, offset, with_payload, with_vectors)
        finally:
            self.ids = everything

    def _page(self, scroll_filter: models.Filter | None, limit: int, offset: Any) -> list[int]:
        """The first limit + 1 matching positions in the order of ids."""
        start = ("", 0) if offset is None else self._universal_id(normalize_point_id(offset))
        if scroll_filter is None:
            order = self._ordered()
            rest = itertools.islice(order, bisect_left(order, (start, -1)), None)
            return list(itertools.islice((p for _, p in rest if not self.deleted[p]), limit + 1))
        found = [(self._universal_id(self.ids_inv[p]), p) for p in self._matching(scroll_filter)]
        return [position for _, position in sorted(pair for pair in found if pair[0] >= start)[: limit + 1]]

    def _ordered(self) -> list[tuple[tuple[str, int], int]]:
        if len(self._order) < len(self.ids):
            new = itertools.islice(self.ids.items(), len(self._order), None)
            old = len(self._order)
            added = [(self._universal_id(point_id), position) for point_id, position in new]
            self._order = sorted(self._order[:old] + added)
        return self._order

    # Writing

    def upsert(self, points: Any, update_filter: Any = None, update_mode: Any = None) -> None:
        """Of an id given twice the last wins, and conditions see the state before the request."""
        unique = {normalize_point_id(point.id): point for point in self._materialize_points(points)}
        super().upsert(list(unique.values()), update_filter=update_filter, update_mode=update_mode)

    def _validate_point(self, point: models.PointStruct) -> models.PointStruct:
        if isinstance(point.id, int) and not 0 <= point.id < 1 << 64:
            raise ValueError(f"value {point.id} is not a valid point ID")
        return super()._validate_point(point)

    # Whole collections

    def dump(self) -> Iterator[dict[str, Any]]:
        for position in self._alive():
            vector = self._get_vectors(position, with_vectors=True)
            yield {"id": self.ids_inv[position], "vector": vector, "payload": self.payload[position]}

    def load(self, points: list[models.PointStruct]) -> None:
        """Make the points of a dump the only ones, vectors bit for bit (the engine normalises them again)."""
        self._delete_ids(list(self.ids))
        if points:
            self.upsert(points)
        for point in points:
            if isinstance(point.vector, list) and "" in self.vectors:
                self.vectors[""][self.ids[normalize_point_id(point.id)]] = point.vector


class _StrictMode:
    """What the strict mode of a collection refuses, in the server's words; nothing where it is off."""

    def __init__(self, collection: _Collection) -> None:
        self.collection = collection
        self._tokens: dict[str, tuple[float, float]] = {}  # left, and when that was

    @property
    def config(self) -> models.StrictModeConfig:
        config = self.collection.config.strict_mode_config
        return config if config is not None and config.enabled else models.StrictModeConfig()

    def check_read(
        self, where: models.Filter | None, *, limit: int | None = None, exact: bool = False
    ) -> None:
        config = self.config
        self._check_limit("limit", limit, config.max_query_limit)
        self._check_filter(where, allowed=config.unindexed_filtering_retrieve)
        if exact and config.search_allow_exact is False:
            raise ApiError(400, "Bad request: Exact search disabled!. Help: Set exact=false.")
        self.consume("read", 1 + len(list(_conditions(where))))

    def check_write(self, operation: Any) -> None:
        config, cost = self.config, 1
        if isinstance(operation, models.UpsertOperation) and isinstance(operation.upsert, models.PointsList):
            cost = len(operation.upsert.points)
            self._check_limit("upsert limit", cost, config.upsert_max_batchsize)
        elif isinstance(operation, models.DeleteOperation):
            if isinstance(operation.delete, models.FilterSelector):
                self._check_filter(operation.delete.filter, allowed=config.unindexed_filtering_update)
                cost = max(1, self.collection.count(operation.delete.filter).count)
            else:
                cost = len(operation.delete.points)
        self.consume("write", cost)

    def _check_limit(self, name: str, value: int | None, limit: int | None) -> None:
        if value is not None and limit is not None and value > limit:
            help_ = f'Reduce the "{name}" parameter to or below {limit}.'
            raise ApiError(400, f'Bad request: Limit exceeded {value} > {limit} for "{name}". Help: {help_}')

    def _check_filter(self, where: models.Filter | None, *, allowed: bool | None) -> None:
        for condition in _conditions(where):
            key = getattr(condition, "key", None) or getattr(
                getattr(condition, "is_empty", None), "key", None
            )
            if allowed is False and key is not None and key not in self.collection.indexes:
                text = f'Index required but not found for "{key}" of one of the following types: [keyword]'
                help_ = "Create an index for this key or use a different filter."
                raise ApiError(400, f"Bad request: {text}. Help: {help_}")
            match = getattr(condition, "match", None)
            size = len(getattr(match, "any", None) or getattr(condition, "has_id", None) or ())
            if self.config.condition_max_size is not None and size > self.config.condition_max_size:
                text = f"Condition size limit reached ({size} > {self.config.condition_max_size})"
                raise ApiError(400, f"Bad request: {text}. Help: Reduce the size of your condition.")

    def consume(self, kind: str, cost: int) -> None:
        """A bucket of as many tokens as may be used in a minute."""
        capacity = getattr(self.config, f"{kind}_rate_limit")
        if capacity is None:
            return
        text = f"Rate limiting exceeded: {kind.capitalize()} rate limit exceeded"
        if cost > capacity:
            split = "request larger than rate limiter capacity, please try to split your request"
            raise ApiError(429, f"{text}, {split}")
        now = time.monotonic()
        left, then = self._tokens.get(kind, (capacity, now))
        left = min(capacity, left + (now - then) * capacity / 60)
        if left < cost:
            self._tokens[kind] = left, now
            raise ApiError(429, text, {"Retry-After": str(math.ceil((cost - left) * 60 / capacity))})
        self._tokens[kind] = left - cost, now


def _conditions(where: models.Filter | None) -> Iterator[Any]:
    """The conditions of a filter, those of filters within it included."""
    for field in ("must", "must_not", "should"):
        found = (where and getattr(where, field)) or ()
        for condition in found if isinstance(found, list) else [found]:
            if isinstance(condition, models.Filter):
                yield from _conditions(condition)
            elif condition != ():
                yield condition


def set_fields(model: BaseModel) -> set[str]:
    return {name for name in model.model_fields_set if getattr(model, name) is not None}


def index_type(schema: models.PayloadFieldSchema) -> str:
    kind = schema if isinstance(schema, models.PayloadSchemaType) else schema.type
    return str(getattr(kind, "value", kind))


# Snapshots: a tar of JSON, with as much padding as a test wants ------------------

_PADDING = random.Random(6333).randbytes(MIB)


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot file, whose padding is generated while it is read."""

    name: str
    created: str
    head: bytes
    padding: int
    checksum: str = ""

    @property
    def tail(self) -> bytes:
        return bytes(-(len(self.head) + self.padding) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)

    @property
    def size(self) -> int:
        return len(self.head) + self.padding + len(self.tail)

    def chunks(self) -> Iterator[bytes]:
        yield self.head
        for start in range(0, self.padding, MIB):
            yield _PADDING[: self.padding - start]
        yield self.tail

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def description(self) -> dict[str, Any]:
        described = {"name": self.name, "creation_time": self.created}
        return described | {"size": self.size, "checksum": self.checksum}


def take_snapshot(name: str, collection: _Collection, padding: int) -> Snapshot:
    """Name may contain anything; the checksum is the true one."""
    config = {"config": collection.config, "indexes": collection.indexes}
    points = b"".join(to_json(point) + b"\n" for point in collection.dump())
    head = _member("config.json", to_json(config)) + _member("points.jsonl", points)
    if padding:
        head += _tar_header("padding", padding)
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    snapshot = Snapshot(name, created, head, padding)
    return dataclasses.replace(snapshot, checksum=snapshot.sha256())


def read_snapshot(
    file: IO[bytes],
) -> tuple[models.CreateCollection, dict[str, Any], list[models.PointStruct]]:
    """Configuration, indexes and points; ApiError 500, as the server's, when the file is not a snapshot."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            members = {name: archive.extractfile(name) for name in ("config.json", "points.jsonl")}
            config = json.loads(_read(members, "config.json"))
            lines = _read(members, "points.jsonl").splitlines()
            points = [models.PointStruct.model_validate_json(line) for line in lines]
            return models.CreateCollection.model_validate(config["config"]), config["indexes"], points
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise ApiError(500, f"Service internal error: failed to unpack snapshot: {error}") from error


def _read(members: dict[str, IO[bytes] | None], name: str) -> bytes:
    member = members[name]
    if member is None:
        raise ValueError(f"{name} is not a file")
    return member.read()


def _member(name: str, content: bytes) -> bytes:
    return _tar_header(name, len(content)) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def uploaded_part(request: Request) -> tuple[IO[bytes], int, int]:
    """File, offset and length of the one part of a multipart upload."""
    boundary = re.search(r'boundary="?([^";]+)', request.headers.get("content-type", ""))
    file = request.upload
    if boundary is None or file is None:
        raise ApiError(400, "Multipart error: Could not find Content-Type or boundary")
    opening, closing = f"--{boundary[1]}\r\n".encode(), f"\r\n--{boundary[1]}--\r\n".encode()
    file.seek(0)
    start = file.read(HEAD_LIMIT)
    file.seek(max(request.size - len(closing), 0))
    head = start.partition(b"\r\n\r\n")
    if not start.startswith(opening) or file.read() != closing or b'name="snapshot"' not in head[0]:
        raise ApiError(400, "Multipart error: Multipart stream is incomplete")
    offset = len(head[0]) + len(head[1])
    return file, offset, request.size - len(closing) - offset


def file_sha256(file: IO[bytes], offset: int, length: int) -> str:
    digest = hashlib.sha256()
    file.seek(offset)
    while length > 0 and (piece := file.read(min(length, MIB))):
        digest.update(piece)
        length -= len(piece)
    return digest.hexdigest()


# The API: a handler for each path -----------------------------------------------

Handler: TypeAlias = Callable[["Api", Request], Any]


class Api:
    """Executes requests on the engine; a handler returns the "result", or a Response of its own."""

    def __init__(self, server: QdrantServer) -> None:
        self.server = server
        self.local = QdrantLocal(":memory:")
        self.snapshots: dict[str, dict[str, Snapshot]] = collections.defaultdict(dict)

    def execute(self, request: Request) -> Response:
        """The response to a request, which is an error response when the request is at fault."""
        started = time.perf_counter()
        handler = HANDLERS.get(request.route)
        if handler is None:
            return Response(404, headers={"Content-Type": "text/plain"})
        try:
            result = handler(self, request)
            return result if isinstance(result, Response) else json_response(result, started)
        except ApiError as error:
            response = error_response(error.status, error.text, started)
            return dataclasses.replace(response, headers=error.headers)
        except ValueError as error:
            return error_response(*_engine_error(str(error)), started)

    # Service

    def version(self, _: Request) -> Response:
        body = {"title": "qdrant - vector search engine", "version": self.server.version}
        return Response(200, to_json(body | {"commit": "0" * 40}))

    def alive(self, _: Request) -> Response:
        return Response(200, b"healthz check passed", {"Content-Type": "text/plain; charset=utf-8"})

    def ready(self, _: Request) -> Response:
        return Response(200, b"all shards are ready", {"Content-Type": "text/plain; charset=utf-8"})

    # Collections

    def collection(self, request: Request) -> _Collection:
        name = request.params["collection"]
        try:
            collection = self.local._get_collection(name)
        except ValueError:
            raise ApiError(404, f"Not found: Collection `{name}` doesn't exist!") from None
        assert isinstance(collection, _Collection)
        return collection

    def list_collections(self, _: Request) -> Any:
        return self.local.get_collections()

    def create_collection(self, request: Request) -> bool:
        config = parse(request, models.CreateCollection)
        self._create(request.params["collection"], config)
        return True

    def _create(self, name: str, config: models.CreateCollection) -> _Collection:
        for field in ("shard_number", "replication_factor", "write_consistency_factor"):
            at_least(field, getattr(config, field), 1)
        if name in self.local.collections:
            raise ApiError(409, f"Wrong input: Collection `{name}` already exists!")
        self.local.create_collection(name, config.vectors, config.sparse_vectors, metadata=config.metadata)
        if config.strict_mode_config is None and self.server.strict_mode is not None:
            strict = models.StrictModeConfig.model_validate({"enabled": True, **self.server.strict_mode})
            config = config.model_copy(update={"strict_mode_config": strict})
        collection = _Collection(config)
        self.local.collections[name] = collection
        return collection

    def collection_info(self, request: Request) -> Any:
        collection = self.collection(request)
        info: dict[str, Any] = collection.info().model_dump(mode="json", exclude_none=True)
        info["status"] = self.server.collection_status
        info["indexed_vectors_count"] = self._indexed(info["points_count"])
        info["payload_schema"] = {key: self._schema(collection, key) for key in collection.indexes}
        info["config"]["params"] = DEFAULT_PARAMS | info["config"]["params"]
        if collection.config.strict_mode_config is not None:
            info["config"]["strict_mode_config"] = to_plain(collection.config.strict_mode_config)
        for part in ("hnsw_config", "wal_config"):
            info["config"][part] |= to_plain(getattr(collection.config, part)) or {}
        info["config"]["optimizer_config"] |= to_plain(collection.config.optimizers_config) or {}
        return info

    def cluster_info(self, request: Request) -> Any:
        points = self.collection(request).info().points_count
        return {
            "peer_id": 1,
            "shard_count": len({0, *(shard for shard, _ in self.server.other_shards)}),
            "local_shards": [{"shard_id": 0, "points_count": points, "state": self.server.shard_state}],
            "remote_shards": [
                {"shard_id": shard, "peer_id": peer, "state": "Active"}
                for shard, peer in self.server.other_shards
            ],
            "shard_transfers": [],
        }

    def _indexed(self, points: int) -> int:
        return points if self.server.indexed_vectors is None else self.server.indexed_vectors

    def _schema(self, collection: _Collection, key: str) -> dict[str, Any]:
        schema = collection.indexes[key]
        described = {"data_type": index_type(schema), "points": collection.indexed_points(key)}
        if not isinstance(schema, models.PayloadSchemaType):
            described["params"] = to_plain(schema)
        return described

    def collection_exists(self, request: Request) -> Any:
        return {"exists": self.local.collection_exists(request.params["collection"])}

    def update_collection(self, request: Request) -> bool:
        collection, change = self.collection(request), parse(request, models.UpdateCollection)
        name = request.params["collection"]
        self.local.update_collection(name, change.sparse_vectors, change.metadata, change.vectors)
        for field, value in (to_plain(change.params) or {}).items():
            if field in models.CreateCollection.model_fields:
                setattr(collection.config, field, value)
        for part in ("hnsw_config", "optimizers_config", "strict_mode_config"):
            if (value := getattr(change, part)) is not None:
                old = getattr(collection.config, part)
                setattr(
                    collection.config, part, value if old is None else old.model_copy(update=to_plain(value))
                )
        return True

    def delete_collection(self, request: Request) -> bool:
        self.snapshots.pop(request.params["collection"], None)
        return self.local.delete_collection(request.params["collection"])

    def create_index(self, request: Request) -> Any:
        collection, index = self.collection(request), parse(request, models.CreateFieldIndex)
        schema = index.field_schema
        if schema is None:
            raise ApiError(400, "Wrong input: field_schema is required: the type cannot be inferred")
        collection.create_payload_index(index.field_name, schema)
        return updated(collection, request)

    def delete_index(self, request: Request) -> Any:
        collection = self.collection(request)
        collection.delete_payload_index(request.params["field"])
        return updated(collection, request)

    # Aliases

    def change_aliases(self, request: Request) -> bool:
        actions = parse(request, models.ChangeAliasesOperation).actions
        try:
            return self.local.update_collection_aliases(actions)
        except ValueError as error:
            if missing := re.fullmatch("Collection (.*) not found", str(error)):
                raise ApiError(404, f"Not found: Collection `{missing[1]}` doesn't exist!") from None
            raise

    def list_aliases(self, _: Request) -> Any:
        return self.local.get_aliases()

    def collection_aliases(self, request: Request) -> Any:
        self.collection(request)
        return self.local.get_collection_aliases(request.params["collection"])

    # Reading points

    def get_point(self, request: Request) -> Any:
        raw = request.params["id"]
        found = self.collection(request).retrieve([int(raw) if raw.isdigit() else raw], True, True)
        if not found:
            raise ApiError(404, f"Not found: Point with id {raw} does not exists!")
        return record(found[0])

    def retrieve(self, request: Request) -> Any:
        collection, asked = self.collection(request), parse(request, models.PointRequest)
        payload = True if asked.with_payload is None else asked.with_payload
        collection.strict.consume("read", len(asked.ids))
        return [record(found) for found in collection.retrieve(asked.ids, payload, asked.with_vector)]

    def scroll(self, request: Request) -> Any:
        collection, asked = self.collection(request), parse(request, models.ScrollRequest)
        at_least("limit", asked.limit, 1)
        collection.strict.check_read(asked.filter, limit=asked.limit)
        order = models.OrderBy(key=asked.order_by) if isinstance(asked.order_by, str) else asked.order_by
        if order is not None:
            _check_order(collection, order, asked.offset)
        payload = True if asked.with_payload is None else asked.with_payload
        limit = 10 if asked.limit is None else asked.limit
        found, following = collection.scroll(
            asked.filter, limit, order, asked.offset, payload, asked.with_vector
        )
        return {"points": [record(point) for point in found], "next_page_offset": following}

    def query(self, request: Request) -> Any:
        self.collection(request)
        return self._query(request, parse(request, models.QueryRequest))

    def query_batch(self, request: Request) -> Any:
        self.collection(request)
        return [self._query(request, search) for search in parse(request, models.QueryRequestBatch).searches]

    def _query(self, request: Request, asked: models.QueryRequest) -> Any:
        at_least("internal.limit", asked.limit, 1)
        exact = asked.params is not None and asked.params.exact is True
        self.collection(request).strict.check_read(asked.filter, limit=asked.limit, exact=exact)
        answer = self.local.query_points(
            request.params["collection"],
            query=asked.query,  # type: ignore[arg-type]
            using=asked.using,
            prefetch=asked.prefetch,
            query_filter=asked.filter,
            search_params=_no_effect(asked.params),
            limit=10 if asked.limit is None else asked.limit,
            offset=asked.offset,
            with_payload=False if asked.with_payload is None else asked.with_payload,
            with_vectors=False if asked.with_vector is None else asked.with_vector,
            score_threshold=asked.score_threshold,
            lookup_from=asked.lookup_from,
        )
        return {"points": [record(point) for point in answer.points]}

    def count(self, request: Request) -> Any:
        collection, asked = self.collection(request), parse(request, models.CountRequest)
        collection.strict.check_read(asked.filter, exact=asked.exact is not False)
        return collection.count(asked.filter)

    def facet(self, request: Request) -> Any:
        collection, asked = self.collection(request), parse(request, models.FacetRequest)
        at_least("limit", asked.limit, 1)
        collection.strict.check_read(asked.filter, limit=asked.limit, exact=asked.exact is True)
        if not collection.has_index(asked.key, "keyword", "integer", "uuid", "bool"):
            text = f'Index required but not found for "{asked.key}" of one of the types [keyword, ...].'
            help_ = "Help: Create an index for this key or use a different filter."
            raise ApiError(400, f"Bad request: {text} {help_}")
        return collection.facet(asked.key, asked.filter, 10 if asked.limit is None else asked.limit)

    # Writing points

    def upsert(self, request: Request) -> Any:
        points = parse(request, models.PointInsertOperations)
        return self._update(request, [models.UpsertOperation(upsert=points)])

    def delete(self, request: Request) -> Any:
        points = parse(request, models.PointsSelector)
        return self._update(request, [models.DeleteOperation(delete=points)])

    def set_payload(self, request: Request) -> Any:
        payload = parse(request, models.SetPayload)
        return self._update(request, [models.SetPayloadOperation(set_payload=payload)])

    def overwrite_payload(self, request: Request) -> Any:
        payload = parse(request, models.SetPayload)
        return self._update(request, [models.OverwritePayloadOperation(overwrite_payload=payload)])

    def delete_payload(self, request: Request) -> Any:
        payload = parse(request, models.DeletePayload)
        return self._update(request, [models.DeletePayloadOperation(delete_payload=payload)])

    def clear_payload(self, request: Request) -> Any:
        points = parse(request, models.PointsSelector)
        return self._update(request, [models.ClearPayloadOperation(clear_payload=points)])

    def update_vectors(self, request: Request) -> Any:
        vectors = parse(request, models.UpdateVectors)
        return self._update(request, [models.UpdateVectorsOperation(update_vectors=vectors)])

    def delete_vectors(self, request: Request) -> Any:
        vectors = parse(request, models.DeleteVectors)
        return self._update(request, [models.DeleteVectorsOperation(delete_vectors=vectors)])

    def batch(self, request: Request) -> Any:
        operations = parse(request, models.UpdateOperations).operations
        self._update(request, operations)
        return [updated(self.collection(request), request) for _ in operations]

    def _update(self, request: Request, operations: list[Any]) -> Any:
        collection = self.collection(request)
        for operation in operations:
            collection.strict.check_write(operation)
        try:
            collection.batch_update_points(operations)
        except KeyError as error:
            raise ApiError(404, f"Not found: No point with id {error.args[0]} found") from None
        return updated(collection, request)

    # Snapshots

    def create_snapshot(self, request: Request) -> Any:
        collection, name = self.collection(request), request.params["collection"]
        stamp = datetime.now(UTC).strftime("%Y-%m-%d-%H-%M-%S")
        default = f"{self.local.aliases.get(name, name)}-{PEER_ID}-{stamp}.snapshot"
        snapshot_name = self.server.snapshot_name or default
        snapshot = take_snapshot(snapshot_name, collection, self.server.snapshot_padding)
        if self.server.snapshot_checksum is not None:
            snapshot = dataclasses.replace(snapshot, checksum=self.server.snapshot_checksum)
        self._shelf(request)[snapshot.name] = snapshot
        return accepted_or(request, snapshot.description())

    def _shelf(self, request: Request) -> dict[str, Snapshot]:
        """The snapshots of a collection (not of an alias), by name."""
        self.collection(request)
        name = request.params["collection"]
        return self.snapshots[self.local.aliases.get(name, name)]

    def list_snapshots(self, request: Request) -> Any:
        return [snapshot.description() for snapshot in self._shelf(request).values()]

    def _snapshot(self, request: Request) -> Snapshot:
        name = request.params["snapshot"]
        snapshot = self._shelf(request).get(name)
        if snapshot is None:
            raise ApiError(404, f"Not found: Snapshot {name} not found")
        return snapshot

    def download_snapshot(self, request: Request) -> Response:
        snapshot = self._snapshot(request)
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "none"}
        return Response(200, Stream(snapshot.size, snapshot.chunks), headers)

    def delete_snapshot(self, request: Request) -> Any:
        del self._shelf(request)[self._snapshot(request).name]
        return accepted_or(request, True)

    def upload_snapshot(self, request: Request) -> Any:
        choice("query parameters", "priority", request, "no_sync", "snapshot", "replica")
        file, offset, length = uploaded_part(request)
        wanted = request.query.get("checksum")
        if wanted is not None:
            self._check_sha256(wanted, file_sha256(file, offset, length))
        file.seek(offset)
        self._restore(request.params["collection"], file)
        return accepted_or(request, True)

    def recover_snapshot(self, request: Request) -> Any:
        asked = parse(request, models.SnapshotRecover)
        snapshot = self._located(asked.location)
        if asked.checksum is not None and asked.checksum.lower() != snapshot.sha256():
            text = f"Snapshot checksum mismatch: expected {asked.checksum}, got {snapshot.sha256()}"
            raise ApiError(400, f"Wrong input: {text}")
        self._restore(request.params["collection"], io.BytesIO(b"".join(snapshot.chunks())))
        return accepted_or(request, True)

    def _located(self, location: str) -> Snapshot:
        """The snapshot of file:///qdrant/snapshots/{collection}/{name}, or of the URL of its download."""
        path = [unquote(part) for part in urlsplit(location).path.split("/")]
        parts = [part for part in path if part not in ("", "snapshots")]
        snapshot = self.snapshots.get(parts[-2], {}).get(parts[-1]) if len(parts) > 1 else None
        if snapshot is None:
            raise ApiError(400, f"Bad request: Snapshot file {location} does not exist")
        return snapshot

    def _check_sha256(self, wanted: str, actual: str) -> None:
        if not re.fullmatch("[0-9a-fA-F]{64}", wanted):
            raise ApiError(422, "Validation error in query parameters: [checksum: invalid SHA-256 hash]")
        if wanted.lower() != actual:
            raise ApiError(400, f"Checksum mismatch: expected {wanted}, actual {actual}")

    def _restore(self, name: str, file: IO[bytes]) -> None:
        """Read all of it first; the collection is created from the file, or must fit it."""
        config, indexes, points = read_snapshot(file)
        name = self.local.aliases.get(name, name)
        collection = self.local.collections.get(name) or self._create(name, config)
        assert isinstance(collection, _Collection)
        for field in ("vectors", "shard_number"):
            if (to_plain(getattr(collection.config, field)) or 1) != (to_plain(getattr(config, field)) or 1):
                reason = f"Snapshot is not compatible with existing collection: {field} differ"
                raise ApiError(400, f"Wrong input: {reason}")
        collection.load(points)
        for key, schema in indexes.items():
            collection.create_payload_index(key, _adapter(models.PayloadFieldSchema).validate_python(schema))


ROUTES: dict[str, Handler] = {
    "GET /": Api.version,
    "GET /healthz": Api.alive,
    "GET /livez": Api.alive,
    "GET /readyz": Api.ready,
    "GET /collections": Api.list_collections,
    "POST /collections/aliases": Api.change_aliases,
    "GET /aliases": Api.list_aliases,
    "GET /collections/{collection}": Api.collection_info,
    "GET /collections/{collection}/cluster": Api.cluster_info,
    "PUT /collections/{collection}": Api.create_collection,
    "PATCH /collections/{collection}": Api.update_collection,
    "DELETE /collections/{collection}": Api.delete_collection,
    "GET /collections/{collection}/exists": Api.collection_exists,
    "GET /collections/{collection}/aliases": Api.collection_aliases,
    "PUT /collections/{collection}/index": Api.create_index,
    "DELETE /collections/{collection}/index/{field}": Api.delete_index,
    "POST /collections/{collection}/snapshots": Api.create_snapshot,
    "GET /collections/{collection}/snapshots": Api.list_snapshots,
    "POST /collections/{collection}/snapshots/upload": Api.upload_snapshot,
    "PUT /collections/{collection}/snapshots/recover": Api.recover_snapshot,
    "GET /collections/{collection}/snapshots/{snapshot}": Api.download_snapshot,
    "DELETE /collections/{collection}/snapshots/{snapshot}": Api.delete_snapshot,
}
POINT_READS: dict[str, Handler] = {
    "POST /collections/{collection}/points": Api.retrieve,
    "GET /collections/{collection}/points/{id}": Api.get_point,
    "POST /collections/{collection}/points/scroll": Api.scroll,
    "POST /collections/{collection}/points/query": Api.query,
    "POST /collections/{collection}/points/query/batch": Api.query_batch,
    "POST /collections/{collection}/points/count": Api.count,
    "POST /collections/{collection}/facet": Api.facet,
}
POINT_WRITES: dict[str, Handler] = {
    "PUT /collections/{collection}/points": Api.upsert,
    "POST /collections/{collection}/points/delete": Api.delete,
    "POST /collections/{collection}/points/batch": Api.batch,
    "POST /collections/{collection}/points/payload": Api.set_payload,
    "PUT /collections/{collection}/points/payload": Api.overwrite_payload,
    "POST /collections/{collection}/points/payload/delete": Api.delete_payload,
    "POST /collections/{collection}/points/payload/clear": Api.clear_payload,
    "PUT /collections/{collection}/points/vectors": Api.update_vectors,
    "POST /collections/{collection}/points/vectors/delete": Api.delete_vectors,
}
HANDLERS = ROUTES | POINT_READS | POINT_WRITES
READ_ROUTES, WRITE_ROUTES = frozenset(POINT_READS), frozenset(POINT_WRITES)
UPLOAD_ROUTE = "POST /collections/{collection}/snapshots/upload"


def find_route(method: str, path: str) -> tuple[str, dict[str, str]]:
    """The route of a quoted path and the unquoted parameters in it; "" when there is none."""
    parts = path.split("/")
    for route, template in _templates().get((method, len(parts)), ()):
        pairs = list(zip(template, parts, strict=True))
        if all(part == wanted or (part and wanted[:1] == "{") for wanted, part in pairs):
            return route, {wanted[1:-1]: unquote(part) for wanted, part in pairs if wanted[:1] == "{"}
    return "", {}


@cache
def _templates() -> dict[tuple[str, int], list[tuple[str, list[str]]]]:
    """Routes by method and number of segments, those with fewest parameters first."""
    found: dict[tuple[str, int], list[tuple[str, list[str]]]] = collections.defaultdict(list)
    for route in sorted(HANDLERS, key=lambda name: name.count("{")):
        method, path = route.split(" ")
        found[method, path.count("/") + 1].append((route, path.split("/")))
    return found


# Parsing and shaping -------------------------------------------------------------


def parse(request: Request, kind: Any) -> Any:
    """The body as a model of qdrant_client.http.models, refused as the server would."""
    check_query(request)
    if request.size > JSON_LIMIT:
        text = f"JSON payload ({request.size} bytes) is larger than allowed (limit: {JSON_LIMIT} bytes)."
        raise ApiError(400, f"Payload error: {text}")
    if "json" not in request.headers.get("content-type", ""):
        raise ApiError(400, "Content type error")
    try:
        if b"NaN" in request.body or b"Infinity" in request.body:
            from_json(request.body, allow_inf_nan=False)
        return _adapter(kind).validate_json(json.dumps(request.json) if request.is_write() else request.body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"Format error in JSON body: {where}: {first['msg']}") from None
    except ValueError as error:
        raise ApiError(400, f"Format error in JSON body: {error}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def check_query(request: Request) -> None:
    """The parameters that qdrant-client sends with reads and writes."""
    choice("query parameters", "wait", request, "true", "false")
    choice("query parameters", "ordering", request, "weak", "medium", "strong")
    if not request.query.get("consistency", "1").isdigit():
        choice("query parameters", "consistency", request, "majority", "quorum", "all")
    timeout = request.query.get("timeout", "1")
    if not timeout.isdigit():
        raise ApiError(400, "Deserialize error in query parameters: invalid digit found in string")
    at_least("timeout", int(timeout), 1, "query parameters")


def choice(place: str, name: str, request: Request, *known: str) -> None:
    value = request.query.get(name, known[0])
    if value not in known:
        expected = ", ".join(f"`{each}`" for each in known)
        text = f"unknown variant `{value}`, expected one of {expected}"
        raise ApiError(400, f"Deserialize error in {place}: {text}")


def at_least(name: str, value: int | None, least: int, place: str = "JSON body") -> None:
    if value is not None and value < least:
        text = f"value {value} invalid, must be {least} or larger"
        raise ApiError(422, f"Validation error in {place}: [{name}: {text}]")


def updated(collection: _Collection, request: Request) -> dict[str, Any]:
    waited = request.query.get("wait") == "true"
    return {"operation_id": next(collection.operations), "status": "completed" if waited else "acknowledged"}


def accepted_or(request: Request, result: Any) -> Any:
    """The result, or 202 when the client does not wait for it (then done all the same)."""
    if request.query.get("wait", "true") == "true":
        return result
    return Response(202, to_json({"status": "accepted", "time": 0.0}))


def record(point: models.Record | models.ScoredPoint) -> dict[str, Any]:
    """A point as the server writes it: without absent fields, vectors and scores as 32 bit floats."""
    fields: dict[str, Any] = {"id": point.id}
    if isinstance(point, models.ScoredPoint):
        fields |= {"version": point.version, "score": _f32(point.score)}
    if point.payload is not None:
        fields["payload"] = point.payload
    if point.vector is not None:
        fields["vector"] = _f32(to_plain(point.vector))
    if point.order_value is not None:
        fields["order_value"] = point.order_value
    return fields


def _f32(value: Any) -> Any:
    """Floats with the digits that a 32 bit float is written with."""
    if isinstance(value, dict):
        return {name: _f32(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_f32(part) for part in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def to_plain(value: Any) -> Any:
    """Models to JSON values, without what is not set."""
    if isinstance(value, dict):
        return {name: to_plain(part) for name, part in value.items()}
    return value.model_dump(mode="json", exclude_none=True) if hasattr(value, "model_dump") else value


def _check_order(collection: _Collection, order: models.OrderBy, offset: Any) -> None:
    if not collection.has_index(order.key, "integer", "float", "datetime", "uuid"):
        text = f"No range index for `order_by` key: `{order.key}`. Please create one to use `order_by`."
        raise ApiError(400, f"Bad request: {text}")
    if offset is not None:
        raise ApiError(400, "Bad request: Cannot use an `offset` when using `order_by`.")


def _no_effect(params: models.SearchParams | None) -> models.SearchParams | None:
    """Search parameters that the local engine acts on; it warns of the others, which only choose an index."""
    return None if params is None else models.SearchParams(idf=params.idf)


def _engine_error(text: str) -> tuple[int, str]:
    if text == "Empty update request":
        return 400, f"Bad request: {text}"
    if "already exists" in text:
        return 409, f"Wrong input: {text}"
    return 400, text if text.startswith("Wrong input") else f"Wrong input: {text}"


# The server ----------------------------------------------------------------------


class BadHttpError(Exception):
    """What arrived is not HTTP/1."""


class QdrantServer:
    """The server: started by `with` or start(), on the loopback interface, on a free port or a given one."""

    def __init__(
        self, port: int = 0, *, version: str = "1.17.1", api_key: str | None = None, seed: int = 0
    ) -> None:
        # How it behaves; may be changed at any time
        self.version = version
        self.api_key = api_key
        self.wrong_key_status = 401  # the open source server's since 1.9; Qdrant Cloud's gateway answers 403
        self.collection_status = "green"
        self.indexed_vectors: int | None = None  # as many as points
        self.other_shards: list[tuple[int, int]] = []  # said to be on other nodes: number and peer
        self.shard_state = "Active"  # of the one that is here
        self.snapshot_name: str | None = None  # for the next ones, instead of the server's own; any text
        self.snapshot_padding = 0  # bytes to add to the next ones
        self.snapshot_checksum: str | None = None  # to report for the next ones, instead of the true one
        self.strict_mode: dict[str, Any] | None = None  # of collections that are made from now on
        self.compress = False  # gzip for clients that accept it, chunked, as a real server always does
        self.random = random.Random(seed)
        self.rules: list[Rule] = []
        # What it saw
        self.requests: list[Request] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.accepted = 0  # sockets
        self.errors: list[BaseException] = []  # of this file, answered with 500

        self.port = port
        self._api = Api(self)
        self._lock = threading.RLock()  # around the engine
        self._ordinals = itertools.count()
        self._listener = socket.socket()
        self._listener.close()
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    # Life

    def start(self) -> Self:
        self._listener = self._bound()
        self._listener.listen(1024)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="qdrant-server", daemon=True)
        self._thread.start()
        self._started.wait()
        return self

    def _run(self) -> None:
        asyncio.run(self._main())

    def close(self) -> None:
        """End every connection, thread and socket; idempotent."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
            self._thread = None
            self._api.local.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if self.errors and kind is None:
            raise AssertionError("the test server itself failed") from self.errors[0]

    def __repr__(self) -> str:
        return f"<QdrantServer {self.url} version={self.version} requests={len(self.requests)}>"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    # Programming it

    def on(
        self,
        action: Action,
        *,
        method: str | None = None,
        route: str | None = None,
        path: str | None = None,
        when: Callable[[Request], bool] | None = None,
        skip: int = 0,
        times: int | None = None,
        probability: float = 1.0,
    ) -> Rule:
        """Do this from now on to the requests that match all that is given.

        method, route (a key of HANDLERS), path (a regular expression found in it), when (a predicate); not to
        the first `skip`, at most `times` times, each time with this probability. Rules work one inside the
        other, the first added outermost.
        """
        pattern = None if path is None else re.compile(path)
        rule = Rule(self, action, method, route, pattern, when, skip, times, probability)
        self.rules.append(rule)
        return rule

    def calm(self) -> None:
        """Remove all rules, release what hangs, listen."""
        self.rules.clear()
        self.release()
        self.up()

    def release(self) -> None:
        """Let all that hangs now go on."""
        self._call(self._release)

    def clear(self) -> None:
        """Forget requests, counts and the number of sockets (data and rules stay)."""
        self.requests.clear()
        self.counts.clear()
        self.accepted = 0
        self._ordinals = itertools.count()

    def wipe(self) -> None:
        """Delete all collections, aliases and snapshots."""
        with self._lock:
            self._api = Api(self)

    def down(self) -> None:
        """Stop listening and reset every connection; connecting is refused until up()."""
        self._call(self._stop_listening)

    def up(self) -> None:
        """Listen again, on the same port."""
        self._call(self._listen_again)

    @contextlib.contextmanager
    def unreachable(self) -> Iterator[None]:
        self.down()
        try:
            yield
        finally:
            self.up()

    def disconnect(self) -> None:
        """End every open connection, in an orderly way: a client finds its pool stale."""
        self._call(self._disconnect)

    def dump(self, collection: str) -> list[dict[str, Any]]:
        """All points of a collection ({"id", "vector", "payload"}), read past HTTP."""
        with self._lock:
            found = self._api.local._get_collection(collection)
            assert isinstance(found, _Collection)
            return json.loads(to_json(list(found.dump())))  # type: ignore[no-any-return]

    def snapshots(self, collection: str) -> list[str]:
        """Names of the snapshots that the server keeps, read past HTTP."""
        with self._lock:
            return list(self._api.snapshots.get(collection, ()))

    def _call(self, function: Callable[[], object]) -> None:
        """Run on the loop's thread and wait for it."""

        async def call() -> None:
            function()
            await asyncio.sleep(0)

        if self._thread is not None:
            asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    # On the loop's thread from here on

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping, self._released = asyncio.Event(), asyncio.Event()
        self._accepting = asyncio.create_task(self._accept(self._listener))
        self._started.set()
        await self._stopping.wait()
        self._stop_listening()
        self._listener.close()
        while self._connections:
            await asyncio.wait(self._connections)
        await asyncio.sleep(0)  # transports close their sockets in a callback

    def _bound(self) -> socket.socket:
        listener = socket.socket(
            socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
        )  # TCP named: TCP_NODELAY
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.setblocking(False)
        return listener

    def _stop_listening(self) -> None:
        """Keep the port bound without listening, so that nobody else can get it."""
        self._accepting.cancel()
        self._listener.close()
        self._listener = self._bound()
        for task, writer in self._connections.items():
            set_reset(writer)
            task.cancel()

    def _listen_again(self) -> None:
        if self._accepting.cancelled() or self._accepting.cancelling():
            self._listener.listen(1024)
            self._accepting = asyncio.create_task(self._accept(self._listener))

    def _disconnect(self) -> None:
        for task in self._connections:
            task.cancel()

    def _release(self) -> None:
        self._released.set()
        self._released = asyncio.Event()

    async def _wait_release(self, bound: float) -> bool:
        try:
            await asyncio.wait_for(self._released.wait(), bound)
        except TimeoutError:
            return False
        return True

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = await self._loop.sock_accept(listener)
            ordinal, self.accepted = self.accepted, self.accepted + 1
            reader = asyncio.StreamReader(limit=HEAD_LIMIT)
            protocol = asyncio.StreamReaderProtocol(reader)
            transport, _ = await self._loop.connect_accepted_socket(
                itertools.repeat(protocol).__next__, connection
            )
            writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
            task = asyncio.create_task(self._serve(ordinal, reader, writer))
            self._connections[task] = writer
            task.add_done_callback(self._connections.pop)

    async def _serve(self, ordinal: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side ends it."""
        try:
            while (request := await self._read(ordinal, reader)) is not None:
                response = await self._respond(request)
                if not await self._send(writer, request, response):
                    break
        except BadHttpError as error:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            log.debug("connection %d: %s", ordinal, error)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError) as error:
            log.debug("connection %d ended: %r", ordinal, error)
        except Exception as error:
            log.exception("connection %d", ordinal)
            self.errors.append(error)
        finally:
            await end_connection(writer)

    async def _respond(self, request: Request) -> Response:
        """Record the request and apply the rules around its execution."""
        request.ordinal = next(self._ordinals)
        self.requests.append(request)
        self.counts[request.route or "unknown"] += 1
        actions = [rule.action for rule in tuple(self.rules) if rule.takes(request)]
        proceed: Callable[[], Awaitable[Response]] = partial(self._execute, request)
        for action in reversed(actions):
            proceed = partial(action, Exchange(self, request, proceed))
        try:
            return await proceed()
        finally:
            if request.upload is not None:
                request.upload.close()

    async def _execute(self, request: Request) -> Response:
        refused = self._refusal(request)
        if refused is not None:
            return refused
        try:
            with self._lock:
                response = self._api.execute(request)
            return gzipped(request, response) if self.compress else response
        except Exception as error:
            log.exception("%s %s", request.method, request.path)
            self.errors.append(error)
            return error_response(500, f"Service internal error: {error!r}")

    def _refusal(self, request: Request) -> Response | None:
        """Plain text, as the server answers a request without the right key."""
        if self.api_key is None or request.path in OPEN_PATHS:
            return None
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        key = request.headers.get("api-key", bearer)
        if key == self.api_key:
            return None
        headers = {"Content-Type": "text/plain; charset=utf-8"}
        if not key:
            return Response(401, b"Must provide an API key or an Authorization bearer token", headers)
        return Response(self.wrong_key_status, b"Invalid API key or JWT", headers)

    # HTTP

    async def _read(self, connection: int, reader: asyncio.StreamReader) -> Request | None:
        try:
            first = await reader.readexactly(1)
            if not first.isalpha():
                raise BadHttpError("not HTTP, perhaps TLS")
            head = first + await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            raise BadHttpError("no HTTP headers") from None
        request = parse_head(connection, head)
        if request.route == UPLOAD_ROUTE:
            request.upload = await self._spool(request, reader)
        else:
            await self._read_body(request, reader)
        return request

    async def _read_body(self, request: Request, reader: asyncio.StreamReader) -> None:
        pieces = []
        async for piece in body_pieces(request, reader):
            request.size += len(piece)
            if request.size <= JSON_LIMIT:
                pieces.append(piece)
        if request.size <= JSON_LIMIT:
            request.body = b"".join(pieces)

    async def _spool(self, request: Request, reader: asyncio.StreamReader) -> IO[bytes]:
        """The body as a file, in memory while it is small."""
        file = tempfile.SpooledTemporaryFile(max_size=MIB)  # noqa: SIM115
        try:
            async for piece in body_pieces(request, reader):
                request.size += len(piece)
                file.write(piece)
        except BaseException:
            file.close()
            raise
        return file

    async def _send(self, writer: asyncio.StreamWriter, request: Request, response: Response) -> bool:
        """Send what the response says; whether the connection stays open."""
        if not response.silent:
            close = request.headers.get("connection", "").lower() == "close"
            await send_body(writer, response_head(response, close=close), response)
            if response.cut is None and not close:
                return True
            writer.transport.set_write_buffer_limits(high=0)
            await writer.drain()  # what comes before a reset must have left
        if response.reset:
            set_reset(writer)
        return False


def parse_head(connection: int, head: bytes) -> Request:
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise BadHttpError("not an HTTP request")
    headers = {}
    for line in lines[1:-2]:
        name, colon, value = line.partition(":")
        if not colon:
            raise BadHttpError("not a header")
        headers[name.strip().lower()] = value.strip()
    path, _, query = words[1].partition("?")
    values = (
        {name: found[-1] for name, found in parse_qs(query, keep_blank_values=True).items()} if query else {}
    )
    route, params = find_route(words[0], path)
    return Request(-1, connection, words[0], path, values, headers, route=route, params=params)


async def body_pieces(request: Request, reader: asyncio.StreamReader) -> Any:
    """The body, by Content-Length or chunked."""
    if "chunked" in request.headers.get("transfer-encoding", "").lower():
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return
    length = request.headers.get("content-length", "0")
    if not length.isdigit():
        raise BadHttpError("Content-Length is not a number")
    left = int(length)
    while left:
        piece = await reader.read(min(left, 4 * MIB))
        if not piece:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(piece)
        yield piece


def gzipped(request: Request, response: Response) -> Response:
    if "gzip" not in request.headers.get("accept-encoding", ""):
        return response
    body = gzip.compress(b"".join(response.pieces()), 1)
    headers = response.headers | {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    return dataclasses.replace(response, body=body, headers=headers, chunked=True)


def response_head(response: Response, *, close: bool) -> bytes:
    headers = {"Content-Type": "application/json"}
    if response.chunked:
        headers["Transfer-Encoding"] = "chunked"
    else:
        headers["Content-Length"] = str(response.length)
    if close:
        headers["Connection"] = "close"
    lines = [f"HTTP/1.1 {response.status} {_phrase(response.status)}"]
    lines += [f"{name}: {value}" for name, value in (headers | response.headers).items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


async def send_body(writer: asyncio.StreamWriter, head: bytes, response: Response) -> None:
    """Head and body, together when the body is in one piece."""
    if response.slow_head:
        promises = [b"HTTP/1.1 100 Continue\r\n\r\n"] * response.continues
        for piece in promises or [head[at : at + 1] for at in range(len(head))]:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(response.slow_head)
        head = head if promises else b""
    pieces = response.pieces() if response.cut is None else _limited(response.pieces, response.cut)
    for piece in pieces:
        data = b"%x\r\n%b\r\n" % (len(piece), piece) if response.chunked and piece else piece
        writer.write(head + data if head else data)
        head = b""
        await writer.drain()
        if response.pause:
            await asyncio.sleep(response.pause)
    if response.chunked and response.cut is None:
        writer.write(b"0\r\n\r\n")


def set_reset(writer: asyncio.StreamWriter) -> None:
    """Make closing the connection send a reset, and drop what has not been sent."""
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.transport.is_closing():
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


async def end_connection(writer: asyncio.StreamWriter) -> None:
    """Close it and wait until the socket is closed, without waiting for a client that does not read."""
    writer.close()
    with contextlib.suppress(Exception, asyncio.CancelledError):
        await asyncio.wait_for(writer.wait_closed(), 1)
    writer.transport.abort()


# In a process of its own ------------------------------------------------------------


@contextlib.contextmanager
def in_own_process(*arguments: str) -> Iterator[str]:
    """Run this file as a program, with the arguments of main(); the value is its URL."""
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def main() -> None:
    """Serve until standard input ends; the first line of output is the URL."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that every request takes longer")
    parser.add_argument("--padding", type=int, default=0, help="bytes to add to every snapshot")
    options = parser.parse_args()
    with QdrantServer(options.port) as server:
        server.snapshot_padding = options.padding
        if options.delay:
            server.on(delay(options.delay))
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()

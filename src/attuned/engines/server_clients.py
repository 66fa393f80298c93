"""The clients of a server: one pair for all threads, or one for each event loop."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from attuned.base.errors import StoreError
from attuned.connections.http import (
    BlockingClient,
    BlockingLimits,
    SuspendingLimits,
    cookie_jar,
    limit_client,
    limit_transport,
)
from attuned.connections.pools import ConnectionPools
from attuned.connections.runtime import run
from attuned.connections.server_errors import environment_error
from attuned.engines.client_models import import_qdrant_client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from attuned.base.config import QdrantStoreConfig


class Clients(NamedTuple):
    """qdrant-client of one address and, for what that does not offer, plain httpx."""

    qdrant: Any
    plain: Any


class _OfLoop(NamedTuple):
    """The clients of an event loop, one pair for each address; closing ``ending`` closes them."""

    clients: Sequence[Clients]
    ending: AsyncGenerator[None, None] | None = None


def _event_loop() -> object:
    from anyio.lowlevel import current_token

    return current_token()


async def _until_the_end(
    loop: object, clients: Sequence[Clients], of: weakref.ref[ServerClients]
) -> AsyncGenerator[None, None]:
    """Close clients with their event loop, which at its end closes the generators that are left over.

    It also closes one that is collected, as when a store goes without being closed. As the reference is weak,
    this comes before the collection of the sockets, which would warn.
    """
    import anyio

    try:
        yield
    finally:
        if there := of():
            there.of_loops.pop(loop, None)
        with anyio.CancelScope(shield=True):
            for each in clients:
                await each.qdrant.close()
                await each.plain.aclose()


# Relied on in qdrant-client and httpx beyond their public interfaces; tests/test_canaries.py watches it


def tune_client(client: Any, timeout: Any, transport: Any, limits: BlockingLimits | None = None) -> str:
    """Set what no parameter of qdrant-client offers; returns the base url of its requests.

    Its ``timeout`` is one for all phases, and ``transport=`` would turn the proxies of the environment off.
    """
    remote = client._client
    wrapped = remote.openapi_client.client
    http = getattr(wrapped, "_client", None) or wrapped._async_client
    if limits is not None:
        limit_client(http, limits)
    http.timeout, http._transport = timeout, transport
    return cast("str", remote.rest_uri)


# ------------------------------------------------------------------------------


class ServerClients:
    """The clients of a server or of the nodes of a cluster, made when an event loop first needs them.

    A connection of an asynchronous client belongs to the event loop that it was made in: every loop gets
    clients of its own, which are closed with the store, or with the loop.
    """

    KEEP_ALIVE_S = 3.0  # of an idle connection: a server closes it after 5, perhaps just as a request comes

    def __init__(self, config: QdrantStoreConfig, urls: Sequence[str], *, blocking: bool) -> None:
        import ssl

        import httpx

        self._config, self._urls, self._blocking = config, urls, blocking
        headers = {} if config.api_key is None else {"api-key": config.api_key}  # as api_key= it would warn
        verify = config.verify
        trusted = (
            ssl.create_default_context(cafile=verify)
            if isinstance(verify, str)
            else httpx.create_ssl_context(verify)
        )
        limits = self._pool_limits(config.pool_size)
        self._shared: dict[str, Any] = {"headers": headers, "limits": limits, "verify": trusted}
        self.limits = BlockingLimits() if blocking else SuspendingLimits()
        clients = self._make()  # the first take 0.1 s, for which no event loop is to be held up
        self._prepared = [clients]
        self.of_loops: dict[object, _OfLoop] = {None: _OfLoop(clients)} if blocking else {}

    def timeout(self, seconds: float) -> Any:
        """The timeouts of a request that may take so long."""
        import httpx

        return httpx.Timeout(seconds, connect=self._config.connect_timeout)

    def _make(self) -> list[Clients]:
        import httpx

        try:
            return [self._make_for(url, import_qdrant_client(), httpx) for url in self._urls]
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            if isinstance(error, StoreError):
                raise
            raise environment_error(error) from error

    def _make_for(self, url: str, package: Any, httpx: Any) -> Clients:
        config, blocking = self._config, self._blocking
        kind = package.QdrantClient if blocking else package.AsyncQdrantClient
        timeout = self.timeout(config.request_timeout)
        limits = self.limits if isinstance(self.limits, BlockingLimits) else None
        pools = ConnectionPools(self._make_pool, config.pool_size, limits)
        client = kind(url=url, check_compatibility=False, cookies=cookie_jar(), **self._shared)
        base_url = tune_client(client, timeout, pools, limits)
        plain = (httpx.Client if blocking else httpx.AsyncClient)(
            base_url=base_url, timeout=timeout, cookies=cookie_jar(), **self._shared
        )
        if limits is None:
            return Clients(client, plain)
        limit_client(plain, limits)
        return Clients(BlockingClient(client), BlockingClient(plain))

    def _pool_limits(self, connections: int) -> Any:
        import httpx

        return httpx.Limits(
            max_connections=connections,
            max_keepalive_connections=connections,
            keepalive_expiry=self.KEEP_ALIVE_S,
        )

    def _make_pool(self, connections: int) -> Any:
        import httpx

        options: dict[str, Any] = {"verify": self._shared["verify"], "limits": self._pool_limits(connections)}
        if isinstance(self.limits, BlockingLimits):
            return limit_transport(httpx.HTTPTransport(**options), self.limits)
        return httpx.AsyncHTTPTransport(**options)

    def at(self, number: int) -> Clients:
        """The clients of an address, for this event loop."""
        loop = None if self._blocking else _event_loop()
        return (self.of_loops.get(loop) or self._adopt(loop)).clients[number]

    def _adopt(self, loop: object) -> _OfLoop:
        try:
            clients = self._prepared.pop()
        except IndexError:
            clients = self._make()
        ending = _until_the_end(loop, clients, weakref.ref(self))
        run(cast("Any", anext(ending)))
        adopted = self.of_loops[loop] = _OfLoop(clients, ending)
        return adopted

    async def close(self) -> None:
        """Close the clients of this event loop, or of all threads."""
        found = self.of_loops.get(None if self._blocking else _event_loop())
        if found is None:
            return
        if found.ending is not None:
            await found.ending.aclose()
            return
        for each in found.clients:
            await each.qdrant.close()
            await each.plain.close()

"""The store on a server: the whole contract, over the loopback server and, where there is one, a real one."""

from __future__ import annotations

from conformance import BACKENDS, AsyncStoreTests, MappingTests, StoreTests

SERVERS = tuple(name for name in ("server", "real") if name in BACKENDS)


class TestServer(StoreTests):
    backends = SERVERS


class TestAsyncServer(AsyncStoreTests):
    backends = SERVERS
    faces = ("asyncio", "trio")


class TestServerMapping(MappingTests):
    backends = SERVERS
    faces = ("sync",)

"""The store on a server: the whole contract, over the loopback server and, where there is one, a real one."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from conformance import BACKENDS, AsyncStoreTests, MappingTests, StoreTests

pytestmark = pytest.mark.once

SERVERS = tuple(name for name in ("server", "real") if name in BACKENDS)
if tuple(map(int, version("qdrant-client").split(".")[:2])) < (1, 20):  # its engine differs from the server
    SERVERS = SERVERS[1:]
    if not SERVERS:
        pytest.skip("needs a real server or qdrant-client 1.20", allow_module_level=True)


class TestServer(StoreTests):
    backends = SERVERS


class TestAsyncServer(AsyncStoreTests):
    backends = SERVERS
    faces = ("asyncio", "trio")


class TestServerMapping(MappingTests):
    backends = SERVERS
    faces = ("sync",)

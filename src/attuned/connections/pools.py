"""Connection pools of HTTP clients."""

from __future__ import annotations

import contextlib
import math
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


class ConnectionPools:
    """Several small connection pools of httpx in the place of a large one.

    For each request httpcore compares every connection with every other one, three times over: 64 idle ones
    cost more than 2 ms (encode/httpcore#929). The first of the least busy pools is taken, so that one caller
    stays on one connection.
    """

    CONNECTIONS = 8  # of a pool

    def __init__(self, make: Callable[[int], Any], connections: int) -> None:
        number = math.ceil(connections / self.CONNECTIONS)
        self._pools = [make((connections + place) // number) for place in reversed(range(number))]
        self._busy = [0] * len(self._pools)
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def _least_busy(self) -> Generator[Any]:
        with self._lock:
            place = self._busy.index(min(self._busy))
            self._busy[place] += 1
        try:
            yield self._pools[place]
        finally:
            with self._lock:
                self._busy[place] -= 1

    def handle_request(self, request: Any) -> Any:
        """Send a request over one of the pools."""
        with self._least_busy() as pool:
            return pool.handle_request(request)

    async def handle_async_request(self, request: Any) -> Any:
        """As handle_request, to be awaited."""
        with self._least_busy() as pool:
            return await pool.handle_async_request(request)

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools:
            pool.close()

    async def aclose(self) -> None:
        """As close, to be awaited."""
        for pool in self._pools:
            await pool.aclose()

"""A loopback server that speaks OpenAI's interface for embeddings, and fails as it is told to."""

from __future__ import annotations

import base64
import json
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from attuned_store import HashingEmbedder

if TYPE_CHECKING:
    from collections.abc import Callable

DIMENSIONS = 8
Vector = list[float]


def vector_of(text: str) -> Vector:
    """The vector of a text: numbers that single precision holds exactly, some of them not 0."""
    seed = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    return [((seed >> 4 * place & 15) + 1) / 16 for place in range(DIMENSIONS)]


def vectors_of(texts: list[str]) -> list[Vector]:
    return [vector_of(text) for text in texts]


class Exchange:
    """One request, and what its fault does with it."""

    def __init__(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any], stop: threading.Event) -> None:
        self.handler, self.asked, self.stop = handler, asked, stop
        self.texts: list[str] = asked["input"]

    def send(self, status: int, body: object, **headers: str) -> None:
        content = json.dumps(body).encode()
        self.handler.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("content-length", str(len(content)))
        self.handler.end_headers()
        self.handler.wfile.write(content)

    def refuse(self, status: int, message: str = "no", code: str | None = None, **headers: str) -> None:
        self.send(
            status, {"error": {"message": message, "type": "error", "param": None, "code": code}}, **headers
        )

    def answer(self, vectors: list[Vector]) -> None:
        if self.asked.get("encoding_format") == "base64":
            shown = [base64.b64encode(struct.pack(f"<{len(each)}f", *each)).decode() for each in vectors]
        else:
            shown = vectors
        data = [
            {"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(shown)
        ]
        usage = {"prompt_tokens": len(self.texts), "total_tokens": len(self.texts)}
        self.send(200, {"object": "list", "data": data, "model": self.asked["model"], "usage": usage})

    def drop(self) -> None:
        self.handler.close_connection = True
        self.handler.connection.close()

    def hang(self) -> None:
        self.stop.wait(60)
        self.drop()


class EmbeddingServer(ThreadingHTTPServer):
    """Answers at `url`; `faults` come first, one for a request, then what `when` says for the texts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stop = threading.Event()
        self.batches: list[list[str]] = []  # the texts of each request
        self.faults: list[Callable[[Exchange], None]] = []
        self.when: Callable[[list[str]], Callable[[Exchange], None] | None] = lambda _texts: None
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.stop.set()
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no failure of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: EmbeddingServer

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        exchange = Exchange(self, asked, self.server.stop)
        self.server.batches.append(exchange.texts)
        fault = self.server.faults.pop(0) if self.server.faults else self.server.when(exchange.texts)
        if fault is None:
            embed = HashingEmbedder(asked["dimensions"]).embed if "dimensions" in asked else vectors_of
            exchange.answer(embed(exchange.texts))
        else:
            fault(exchange)

    def log_message(self, *arguments: object) -> None:
        """Write nothing."""

"""A tiny HTTP server for one process: ``/metrics``, ``/livez`` and ``/readyz``.

GET only, one request a connection, nothing else is served: 404 for another path, 405 for another
method. Who connects and asks nothing is dropped after 5 s, earlier when 64 others have come since.
Neither probe may touch the database: liveness says that the process can still work, and readiness
repeats what the process already knows. Both say why when they say no. Nothing of the queue is
known here, so the sidecar uses this module as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

Check = Callable[[], str | None]
"""A probe: None for yes, else the reason for no, in a line that may be published."""

_REQUEST_LIMIT_BYTES: Final = 8192
_REQUEST_TIMEOUT_S: Final = 5.0
_CONNECTIONS_MAX: Final = 64
"""More would take the files from the process that its connections to the database need."""
_TEXT: Final = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request gets."""

    status: HTTPStatus
    body: bytes
    content_type: str = _TEXT

    def encode(self) -> bytes:
        """Return the response as it goes over the wire."""
        lines = [
            f"HTTP/1.1 {self.status} {self.status.phrase}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "Cache-Control: no-store",
            "Connection: close",
        ]
        if self.status is HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append("Allow: GET")
        return "\r\n".join([*lines, "", ""]).encode() + self.body


class HealthServer:
    """Serves the metrics and the probes of one process.

    Args:
        registries: what ``/metrics`` shows, one after the other.
        live: whether ``/livez`` answers 200; otherwise 503 with the reason.
        ready: the same for ``/readyz``.

    >>> server = HealthServer(registry, live=lambda: None, ready=worker.why_not_ready)
    ... # doctest: +SKIP
    >>> await server.start("0.0.0.0", 9100)  # doctest: +SKIP
    """

    def __init__(self, *registries: CollectorRegistry, live: Check, ready: Check) -> None:
        self._registries = registries
        self._checks = {b"/livez": live, b"/readyz": ready}
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.StreamWriter, None] = {}  # in the order in which they came

    @property
    def port(self) -> int:
        """The port in use: the one asked for, or the one the system chose for port 0."""
        if self._server is None:
            raise RuntimeError("the health server has not been started")
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self, host: str, port: int) -> None:
        """Listen; raises OSError when the address is taken."""
        self._server = await asyncio.start_server(
            self._serve, host, port, limit=_REQUEST_LIMIT_BYTES
        )

    async def stop(self) -> None:
        """Stop listening and drop open connections. Safe to call twice."""
        if self._server is None:
            return
        self._server.close()
        for writer in tuple(self._open):
            writer.transport.abort()
        await self._server.wait_closed()
        self._server = None

    def answer(self, request_line: bytes) -> Answer:
        """Return the answer to a request line such as ``GET /livez HTTP/1.1``."""
        parts = request_line.split()
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/"):
            return _plain(HTTPStatus.BAD_REQUEST, "not an HTTP request")
        method, target, _ = parts
        path = target.partition(b"?")[0]
        if path != b"/metrics" and path not in self._checks:
            return _plain(HTTPStatus.NOT_FOUND, "try /metrics, /livez or /readyz")
        if method != b"GET":
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, "GET only")
        if path == b"/metrics":
            body = b"".join(map(generate_latest, self._registries))
            return Answer(HTTPStatus.OK, body, CONTENT_TYPE_PLAIN_0_0_4)
        reason = self._checks[path]()
        if reason is None:
            return _plain(HTTPStatus.OK, "ok")
        return _plain(HTTPStatus.SERVICE_UNAVAILABLE, reason)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open[writer] = None
        if len(self._open) > _CONNECTIONS_MAX:  # the oldest stalls: an honest one is soon done
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()
        try:
            with suppress(OSError, EOFError, TimeoutError):  # a client that went away or stalls
                writer.write((await self._respond(reader)).encode())
                await asyncio.wait_for(writer.drain(), _REQUEST_TIMEOUT_S)
        finally:
            self._open.pop(writer, None)
            writer.close()

    async def _respond(self, reader: asyncio.StreamReader) -> Answer:
        request = reader.readuntil(b"\r\n\r\n")
        try:
            head = await asyncio.wait_for(request, _REQUEST_TIMEOUT_S)
        except asyncio.LimitOverrunError:
            return _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request is too large")
        return self.answer(head.partition(b"\r\n")[0])


def _plain(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, f"{text}\n".encode())

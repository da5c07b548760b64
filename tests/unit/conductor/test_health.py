from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry, Counter

from conductor.health import HealthServer

pytestmark = pytest.mark.anyio


class Process:
    """What the probes ask; a test changes the answers."""

    def __init__(self) -> None:
        self.live: str | None = None
        self.ready: str | None = "not registered yet"
        self.registry = CollectorRegistry()
        Counter("shop_orders", "Orders.", registry=self.registry).inc()
        self.server = HealthServer(self.registry, live=lambda: self.live, ready=lambda: self.ready)


@pytest.fixture
async def process() -> AsyncIterator[Process]:
    process = Process()
    await process.server.start("127.0.0.1", 0)
    yield process
    await process.server.stop()


async def send(process: Process, request: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", process.server.port)
    writer.write(request)
    response = await reader.read()
    writer.close()
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def get(process: Process, path: str, method: str = "GET") -> tuple[int, bytes]:
    return await send(process, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


async def test_metrics_are_those_of_the_registry_alone(process: Process) -> None:
    status, body = await get(process, "/metrics")
    assert status == 200
    assert b"shop_orders_total 1.0" in body
    assert b"python_info" not in body


async def test_probes_say_yes_or_why_not(process: Process) -> None:
    assert await get(process, "/livez") == (200, b"ok\n")
    assert await get(process, "/readyz") == (503, b"not registered yet\n")
    process.ready = None
    assert await get(process, "/readyz?verbose") == (200, b"ok\n")
    process.live = "the stream has not moved for 60 s"
    assert await get(process, "/livez") == (503, b"the stream has not moved for 60 s\n")


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics/", "/livez/x"])
async def test_another_path_is_not_found(process: Process, path: str) -> None:
    assert (await get(process, path))[0] == 404


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
async def test_another_method_is_not_allowed(process: Process, method: str) -> None:
    assert (await get(process, "/metrics", method))[0] == 405


async def test_something_else_than_http_is_refused(process: Process) -> None:
    assert (await send(process, b"\x16\x03\x01 hello\r\n\r\n"))[0] == 400


async def test_an_oversized_request_is_refused(process: Process) -> None:
    status, _ = await send(process, b"GET /livez HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n")
    assert status == 431


async def test_a_client_that_leaves_early_does_no_harm(process: Process) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", process.server.port)
    writer.write(b"GET /livez")
    writer.close()
    await writer.wait_closed()
    assert (await get(process, "/livez"))[0] == 200


async def test_stop_does_not_wait_for_an_idle_client(process: Process) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", process.server.port)
    await get(process, "/livez")  # served after the idle one has been accepted
    await asyncio.wait_for(process.server.stop(), 2)
    writer.close()


async def test_who_connects_and_asks_nothing_takes_no_files_from_the_process(
    process: Process,
) -> None:
    idle = [await asyncio.open_connection("127.0.0.1", process.server.port) for _ in range(80)]
    assert (await get(process, "/livez"))[0] == 200
    for reader, _ in idle[:16]:
        with suppress(ConnectionError):  # what ends, ends in one of two ways
            assert await asyncio.wait_for(reader.read(), 2) == b""
    reader, writer = idle[-1]
    writer.write(b"GET /livez HTTP/1.1\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    for _, writer in idle:
        writer.close()

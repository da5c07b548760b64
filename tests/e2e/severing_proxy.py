"""A proxy before a server that keeps one message back, or the answer to it, until it hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal

from psycopg.conninfo import conninfo_to_dict

from tests.servers import dsn_for

Loss = Literal["request", "reply"]
_Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class SeveringProxy:
    """Passes everything on, until a client sends what it was told to watch for.

    From then on nothing comes back to that client. With the ``reply`` lost, the server gets what
    was sent, and does it; with the ``request`` lost it does not. Neither end is told before
    `hang_up`. `dsn` is the server's, through the proxy.
    """

    def __init__(self, dsn: str) -> None:
        self._direct = dsn
        self._watched: tuple[bytes, Loss] | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._severed: asyncio.Task[None] | None = None
        self.severed = asyncio.Event()
        self.dsn = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[SeveringProxy]:
        """Listen on the loopback until the end of the block."""
        listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        self.dsn = dsn_for(self._direct, host="127.0.0.1", port=str(port))
        try:
            yield self
        finally:
            listener.close()
            for link in self._links:
                link.cancel()
            await asyncio.gather(*self._links, return_exceptions=True)

    def watch(self, words: bytes, lost: Loss) -> None:
        """Sever the connection of the first client that sends these words."""
        self._watched = (words, lost)

    def hang_up(self) -> None:
        """Close the connection that was severed: now both ends know."""
        if self._severed is not None:
            self._severed.cancel()

    def is_watched(self, data: bytes) -> Loss | None:
        """Return what is to be lost if this is what is watched for; it is then no more."""
        if self._watched is None or self._watched[0] not in data:
            return None
        (_, lost), self._watched = self._watched, None
        return lost

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.create_task(self._serve((reader, writer)))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _serve(self, client: _Ends) -> None:
        server = await self._connect()
        answers = asyncio.create_task(_pass_on(server[0], client[1]))
        try:
            await self._requests(client[0], server[1], answers)
        finally:
            answers.cancel()
            client[1].close()
            server[1].close()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answers: asyncio.Task[None],
    ) -> None:
        """Pass on what a client sends; what it has sent before may hold the first of the words."""
        before, lost = b"", None
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if lost is None and (lost := self.is_watched(before + data)) is not None:
                    answers.cancel()
                    self._severed = asyncio.current_task()
                    self.severed.set()
                if lost != "request":
                    writer.write(data)  # with the rest of it, which comes apart
                before = data[-200:]

    async def _connect(self) -> _Ends:
        place = conninfo_to_dict(self._direct)
        host, port = str(place.get("host")), str(place.get("port"))
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, int(port))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()

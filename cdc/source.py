"""The replication stream: bytes from the walsender, status messages back.

`ReplicationStream` moves CopyData payloads and knows nothing of their meaning. It never blocks the
event loop, never buffers more than one read's limit, and never acknowledges on its own: positions
come from the caller. One task reads; any task may send a status.

PostgreSQL documentation, "Streaming Replication Protocol"; libpq, "Functions Associated with the
COPY Command" and "Asynchronous Command Processing".
"""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import psycopg
from psycopg import pq
from psycopg.rows import tuple_row

from cdc import queries
from cdc.connection import (
    Connection,
    connect_source,
    is_connection_error,
    one_line,
    source_error,
    source_errors,
)
from cdc.errors import (
    CdcError,
    PluginRefused,
    PublicationMissing,
    ServerDecodeError,
    SlotBusy,
    SlotForeign,
    SlotLost,
    SlotMissing,
    SourceUnavailable,
)
from cdc.lsn import Lsn
from cdc.wire.frames import status_update

PGOUTPUT: Final = "pgoutput"
READ_LIMIT: Final = 4096
READ_LIMIT_BYTES: Final = 1 << 20
_FINISH_TIMEOUT_S: Final = 1.0
_CALLBACK: Final = re.compile(r"in the \w+ callback(?:, associated LSN [0-9A-F/]+)?")


@dataclass(frozen=True, slots=True)
class SystemIdentity:
    """Who the server is (IDENTIFY_SYSTEM), and up to where its WAL is flushed."""

    system_identifier: str
    timeline: int
    flush_lsn: Lsn
    database: str


class ReplicationStream:
    """A walsender connection: `open`, then `start` (which takes the slot: the leader lock).

    Example:
        stream = await ReplicationStream.open(dsn, application_name="cdc")
        await stream.start("conductor", ["conductor"])      # SlotBusy: another one leads
        for payload in await stream.read():                 # XLogData and keepalive frames
            ...
        await stream.send_status(write_lsn, flush_lsn, apply_lsn)
        await stream.finish()
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._waiting_since: float | None = None
        self._writing = False
        self._ended = False
        self._failure: CdcError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._positions = (0, 0, 0)
        self.bytes_received = 0
        self.statuses_sent = 0

    @classmethod
    async def open(
        cls, dsn: str, *, application_name: str, wal_sender_timeout_s: float = 60
    ) -> Self:
        """Connect, in replication mode, with the session of `connect_source` (and its errors)."""
        connection = await connect_source(
            dsn,
            application_name=application_name,
            replication=True,
            wal_sender_timeout_s=wal_sender_timeout_s,
        )
        return cls(connection)

    @property
    def backend_pid(self) -> int:
        """The walsender's process id."""
        return self._pgconn.backend_pid

    @property
    def silence_s(self) -> float:
        """For how long `read` has waited for the server; 0 when nobody waits."""
        since = self._waiting_since
        return 0.0 if since is None else time.monotonic() - since

    # --- before the stream starts ------------------------------------------------------------

    async def identify(self) -> SystemIdentity:
        """Ask who the server is."""
        with source_errors():
            cursor = await self._connection.cursor(row_factory=tuple_row).execute(
                queries.IDENTIFY_SYSTEM
            )
            row = await cursor.fetchone()
        if row is None:
            raise SourceUnavailable("the source database did not identify itself")
        return SystemIdentity(str(row[0]), int(row[1]), Lsn.parse(row[2]), str(row[3]))

    async def timeline_history(self, timeline: int) -> list[tuple[int, Lsn]]:
        """Return where each earlier timeline was left: (timeline, switch point), oldest first."""
        if timeline <= 1:
            return []
        with source_errors():
            cursor = await self._connection.cursor(row_factory=tuple_row).execute(
                queries.timeline_history(timeline)
            )
            row = await cursor.fetchone()
        content = row[1] if row else ""
        return parse_timeline_history(content if isinstance(content, str) else content.decode())

    async def create_slot(
        self,
        slot: str,
        plugin: str = PGOUTPUT,
        *,
        temporary: bool = False,
        failover: bool = False,
    ) -> Lsn:
        """Create our logical slot; return its consistent point. Waits for every running writer.

        Raises:
            SlotBusy: another process has just created it.
            PluginRefused: the server does not have the plugin, or does not let it be used.
        """
        try:
            cursor = await self._connection.cursor(row_factory=tuple_row).execute(
                queries.create_slot(slot, plugin, temporary=temporary, failover=failover)
            )
            row = await cursor.fetchone()
        except psycopg.errors.DuplicateObject as error:
            raise SlotBusy(f"slot {slot!r}: {one_line(error)}") from error
        except psycopg.Error as error:
            if error.sqlstate == "58P01" or "output plugin" in one_line(error):
                raise PluginRefused(f"plugin {plugin}: {one_line(error)}") from error
            raise source_error(error) from error
        if row is None:
            raise SourceUnavailable(f"the server did not say where slot {slot!r} starts")
        return Lsn.parse(row[1])

    async def command(self, command: queries.Statement) -> None:
        """Run a replication command that returns nothing; cancelling this cancels it."""
        with source_errors():
            await self._connection.execute(command)

    async def cancel(self) -> None:
        """Cancel the command that runs on this connection."""
        with source_errors():
            await self._connection.cancel_safe()

    async def start(
        self,
        slot: str,
        publications: Sequence[str],
        *,
        streaming: str = "off",
        from_lsn: Lsn = queries.FROM_THE_SLOT,
    ) -> None:
        """Take the slot and begin to stream (COPY_BOTH) from its own position.

        Args:
            slot: its name.
            publications: what is streamed.
            streaming: `off`: protocol 1; `on`: 2; `parallel`: 4. Anything but protocol 1 is for
                `streaming.StreamedStream` to read.
            from_lsn: or from there, if the slot stands before it.

        Raises:
            SlotBusy: it is active elsewhere (the connection stays usable: try again later).
            SlotMissing, SlotLost, SlotForeign, WalLevelTooLow, PrivilegeMissing: it cannot be had.
            SourceUnavailable: the connection was lost.
        """
        error = await self._start(
            queries.start_replication(slot, publications, streaming, from_lsn)
        )
        if error is not None:
            raise _start_error(slot, error) from error

    async def start_wal2json(self, slot: str, *, temporary: bool = False) -> bool:
        """Take a slot of wal2json and begin to stream (errors: `start`).

        Args:
            slot: its name.
            temporary: the slot ends with an error of this connection: make it again after one.

        Returns whether numbers come as text: if not, NaN and the infinities are lost.
        """
        error = await self._start(queries.start_wal2json(slot, queries.WAL2JSON_NUMBERS_AS_TEXT))
        if error is None:
            return True
        if isinstance(error, psycopg.errors.InvalidParameterValue):  # an option it does not know
            if temporary:
                await self.create_slot(slot, "wal2json", temporary=True)
            error = await self._start(queries.start_wal2json(slot))
        if error is not None:
            raise _start_error(slot, error) from error
        return False

    async def _start(self, command: queries.Statement) -> psycopg.Error | None:
        """Run START_REPLICATION; return the error with which it was refused."""
        with source_errors():
            self._pgconn.send_query(command.as_bytes(self._connection))
            self._flush()
            result = await self._result()
            if result is not None and result.status == pq.ExecStatus.COPY_BOTH:
                return None
            error = _result_error(result, self._pgconn)
            while await self._result() is not None:  # it may be lost here as well
                pass
        return error

    # --- the stream --------------------------------------------------------------------------

    async def read(
        self, limit: int = READ_LIMIT, limit_bytes: int = READ_LIMIT_BYTES
    ) -> list[bytes]:
        """Return the CopyData payloads that are there, at least one, in order; wait for the first.

        Lets the event loop run once in any case. Cancelling it loses nothing.

        Args:
            limit: most payloads to return.
            limit_bytes: return after the payload that reaches this many bytes.

        Raises:
            SourceUnavailable: the connection was lost or the server ended the stream.
            PublicationMissing, ServerDecodeError: the server cannot decode what comes next.
        """
        await asyncio.sleep(0)
        payloads: list[bytes] = []
        fruitless = 0
        try:
            while True:
                size = (
                    0 if self._ended else self._take(payloads, limit - len(payloads), limit_bytes)
                )
                limit_bytes -= size
                fruitless = 0 if size else fruitless + 1
                if limit_bytes <= 0 or len(payloads) >= limit or (payloads and fruitless):
                    return payloads
                if self._ended and payloads:
                    return payloads  # what came before the end counts; the next call says why
                if self._ended:
                    raise await self._end_error()
                if fruitless > 1:
                    await self._readable()
                # Twice before waiting: with TLS, bytes may be buffered that the socket hides.
                self._pgconn.consume_input()
        except psycopg.Error as error:
            raise _stream_error(error) from error

    def _take(self, payloads: list[bytes], limit: int, limit_bytes: int) -> int:
        """Move what libpq has parsed into `payloads`; return its size. The hot loop."""
        append = payloads.append
        get = self._pgconn.get_copy_data
        size = 0
        for _ in range(limit):
            length, view = get(1)
            if length <= 0:
                self._ended = length < 0
                break
            append(bytes(view))
            size += length
            if size >= limit_bytes:
                break
        self.bytes_received += size
        return size

    async def send_status(
        self, write_lsn: int, flush_lsn: int, apply_lsn: int, *, reply_requested: bool = False
    ) -> None:
        """Send a standby status update. Never waits: what the socket does not take now follows.

        Args:
            write_lsn: received up to here.
            flush_lsn: the slot may move up to here: everything below is durable in the queue.
            apply_lsn: shown in pg_stat_replication as replayed.
            reply_requested: ask the server for a keepalive at once.

        Raises:
            SourceUnavailable: the connection is gone.
        """
        self._positions = (write_lsn, flush_lsn, apply_lsn)
        message = status_update(
            write_lsn=write_lsn,
            flush_lsn=flush_lsn,
            apply_lsn=apply_lsn,
            now_us=time.time_ns() // 1000,
            reply_requested=reply_requested,
        )
        with source_errors():
            # 0: libpq's buffer is full because the server does not read; a later status will do.
            if self._pgconn.put_copy_data(message) > 0:
                self.statuses_sent += 1
            self._flush()

    async def probe(self) -> None:
        """Repeat the last status and ask for an answer: whether the server is still there."""
        await self.send_status(*self._positions, reply_requested=True)

    def abort(self, error: CdcError) -> None:
        """Make the waiting `read` (or the next one that waits) raise this error."""
        self._failure = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    async def finish(self, timeout_s: float = _FINISH_TIMEOUT_S) -> None:
        """End the stream in order, so that the server has read the last status; then close."""
        try:
            async with asyncio.timeout(timeout_s):
                self._pgconn.put_copy_end()
                self._flush()
                while not self._ended:
                    await self.read()
        except (TimeoutError, CdcError, psycopg.Error):
            pass  # in the middle of a large transaction the server goes on sending: just leave
        finally:
            await self.close()

    async def close(self) -> None:
        """Close the connection, in any state. The server frees the slot when it notices."""
        if self._writing:
            asyncio.get_running_loop().remove_writer(self._pgconn.socket)
            self._writing = False
        await self._connection.close()

    # --- waiting -----------------------------------------------------------------------------

    async def _readable(self) -> None:
        """Wait until the socket has something to read."""
        if self._failure is not None:
            raise self._failure
        loop = asyncio.get_running_loop()
        socket = self._pgconn.socket
        waiter = self._waiter = loop.create_future()
        self._waiting_since = time.monotonic()
        loop.add_reader(socket, _wake, waiter)
        try:
            await waiter
        finally:
            loop.remove_reader(socket)
            self._waiter = self._waiting_since = None

    def _flush(self) -> None:
        """Send what libpq has buffered, now or as the socket becomes writable."""
        pending = self._pgconn.flush() != 0
        if pending and not self._writing:
            asyncio.get_running_loop().add_writer(self._pgconn.socket, self._flush_more)
        elif self._writing and not pending:
            asyncio.get_running_loop().remove_writer(self._pgconn.socket)
        self._writing = pending

    def _flush_more(self) -> None:
        try:
            self._flush()
        except psycopg.Error as error:
            asyncio.get_running_loop().remove_writer(self._pgconn.socket)
            self._writing = False
            self.abort(source_error(error))

    async def _result(self) -> pq.abc.PGresult | None:
        while self._pgconn.is_busy():
            await self._readable()
            self._pgconn.consume_input()
        return self._pgconn.get_result()

    async def _end_error(self) -> CdcError:
        """Say why the stream ended: the server's error, or an orderly end."""
        result = await self._result()
        if result is None or result.status == pq.ExecStatus.COMMAND_OK:
            return SourceUnavailable("the source database ended the stream")
        return _stream_error(_result_error(result, self._pgconn))


def parse_timeline_history(content: str) -> list[tuple[int, Lsn]]:
    r"""Read a timeline history file: lines of `timeline<TAB>switch point<TAB>reason`.

    >>> parse_timeline_history("1\t0/3000000\tno recovery target specified")
    [(1, Lsn('0/3000000'))]
    """
    switches = []
    for line in content.splitlines():
        fields = line.split()
        if len(fields) >= 2 and fields[0].isdigit():
            switches.append((int(fields[0]), Lsn.parse(fields[1])))
    return switches


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _result_error(result: pq.abc.PGresult | None, pgconn: pq.abc.PGconn) -> psycopg.Error:
    """Turn a failed result into the driver's error of its SQLSTATE."""
    if result is None:
        return psycopg.OperationalError(pgconn.get_error_message() or "the connection was closed")
    return psycopg.errors.error_from_result(result)


def _start_error(slot: str, error: psycopg.Error) -> CdcError:
    """Name why START_REPLICATION was refused."""
    text = f"slot {slot!r}: {one_line(error)}"
    by_state: dict[str, type[CdcError]] = {
        "42704": SlotMissing,
        "55006": SlotBusy,
        "0A000": SlotForeign,  # a physical slot; an option the plugin does not have
    }
    if error.sqlstate in by_state:
        return by_state[error.sqlstate](text)
    if error.sqlstate == "55000" and "not created in this database" in text:
        return SlotForeign(text)
    if error.sqlstate == "55000" and "wal_level" not in text:
        return SlotLost(text)  # can no longer get changes from replication slot
    return source_error(error)


def _stream_error(error: psycopg.Error) -> CdcError:
    """Name why a running stream broke."""
    text = one_line(error)
    if is_connection_error(error) or error.sqlstate == "42501":
        return source_error(error)
    if error.sqlstate == "42704" and "publication" in text:
        return PublicationMissing(f"the server cannot decode what comes next: {text}")
    where = _CALLBACK.search(error.diag.context or "")
    place = f" ({where[0]})" if where else ""
    return ServerDecodeError(f"the server cannot decode what comes next: {text}{place}")

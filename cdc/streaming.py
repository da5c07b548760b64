"""A stream of protocol 2 or 4 as if it were one of version 1.

With `CDC_STREAMING` the server sends large transactions in pieces, while they run, instead of
keeping all of them on its own disk. `StreamedTransactions` spools the pieces by transaction and
hands a transaction on when its commit comes: Begin, its messages, Commit, in pgoutput's version 1.
So everything after this (what is skipped, ordinals, relations, jobs and their identities) is the
same whichever protocol is spoken.

Descriptions of tables in a piece are spooled like rows: they belong to their transaction until it
commits, and are gone when it is rolled back (router-rules 2). A table may have been described anew
meanwhile, outside: then the rows of the piece are read as they were described with them, and what
follows its commit by the newer description, which is handed on once more. An emitted event of which
the server does not tell whether it was rolled back (`spool`) is handed on as such, and set aside.
Open transactions count for nothing: after an acknowledgement past their beginning the server sends
all of them again, so that the spools of a session end with it.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import Final, Protocol

from cdc.emission import is_emission
from cdc.errors import ProtocolError, ServerDecodeError
from cdc.spool import Spool, SpoolMemory
from cdc.transactions import UNCERTAIN
from cdc.wire.encoding import encode
from cdc.wire.frames import XLOG_DATA, XLOG_DATA_HEADER_SIZE
from cdc.wire.messages import Begin, Commit, StreamAbort, StreamCommit, StreamStart
from cdc.wire.streamed import TAGS, decode_streamed, split_xid

_HEADER: Final = bytes([XLOG_DATA]) + bytes(XLOG_DATA_HEADER_SIZE - 1)  # nobody reads the rest
_ORIGIN: Final = b"O"
_DESCRIPTIONS: Final = frozenset((b"R", b"Y"))
_OID_END: Final = 5
_UNKNOWN_PLACE: Final = (
    "it may be in a transaction that has not committed: CDC_STREAMING=off waits for that, and its "
    "error names the position for `cdc slot skip`"
)


class StreamedTransactions:
    """Takes in the payloads of one session in order; gives them back as version 1's.

    >>> streamed = StreamedTransactions(SpoolMemory(1 << 20))
    >>> [*streamed.feed(b"S" + bytes([0, 0, 2, 228, 1])), *streamed.feed(b"E")]
    []
    """

    __slots__ = ("_arrived", "_current", "_described", "_memory", "_spools")

    def __init__(self, memory: SpoolMemory) -> None:
        self._memory = memory
        self._spools: dict[int, Spool] = {}
        self._current: Spool | None = None  # whose piece is being sent
        self._arrived = 0  # descriptions so far
        self._described: dict[bytes, tuple[int, bytes]] = {}
        """The newest description of each table and type that is committed: when it came, and it."""

    def feed(self, payload: bytes) -> Iterator[bytes]:
        """Return what the next payload gives: itself, nothing, or a whole transaction.

        The iterator must be used up before the next payload. Raises `ProtocolError`.
        """
        tag = payload[:1]
        if tag in TAGS:
            return self._control(payload)
        self._arrived += tag in _DESCRIPTIONS
        if self._current is None:
            if tag in _DESCRIPTIONS:
                self._renew(payload, self._arrived)
            return iter((payload,))
        if tag != _ORIGIN:  # it has no id, and nothing depends on it
            subxid, message = split_xid(payload)
            self._current.append(subxid, message, self._arrived if tag in _DESCRIPTIONS else 0)
        return iter(())

    def close(self) -> None:
        """Forget what was spooled."""
        for spool in self._spools.values():
            spool.close()
        self._spools.clear()
        self._current = None

    def _control(self, payload: bytes) -> Iterator[bytes]:
        message = decode_streamed(payload)
        if isinstance(message, StreamStart):
            self._start(message)
        elif isinstance(message, StreamCommit):
            return self._commit(message)
        elif isinstance(message, StreamAbort):
            self._abort(message)
        else:
            self._current = None
        return iter(())

    def _start(self, message: StreamStart) -> None:
        if self._current is not None:
            raise ProtocolError("S", 0, "the end of the piece before", "another piece")
        spool = self._spools.get(message.xid)
        if message.is_first == (spool is not None):
            which = "its first piece" if message.is_first else "a later one"
            raise ProtocolError("S", 5, f"another piece of {message.xid}", which)
        if spool is None:
            spool = self._spools[message.xid] = Spool(message.xid, self._memory)
        self._current = spool

    def _commit(self, message: StreamCommit) -> Iterator[bytes]:
        spool = self._spools.pop(message.xid, None)
        if spool is None:
            raise ProtocolError("c", 1, "a transaction that came in pieces", f"{message.xid}")
        yield encode(Begin(message.commit_lsn, message.commit_time_us, message.xid))
        replayed: dict[bytes, bytes] = {}
        for body, certain, arrived in spool.drain():
            if body[:1] in _DESCRIPTIONS:
                replayed[_of(body)] = body
                self._renew(body, arrived)
            yield body if certain or not is_emission(body) else UNCERTAIN + body
        ended = Commit(message.flags, message.commit_lsn, message.end_lsn, message.commit_time_us)
        yield encode(ended)
        for what in sorted(replayed, reverse=True):  # types before the tables that have them
            _, newest = self._described[what]
            if newest != replayed[what]:
                yield newest

    def _renew(self, description: bytes, arrived: int) -> None:
        """Take in what a transaction described, unless it was described anew since."""
        what = _of(description)
        known, _ = self._described.get(what, (0, b""))
        if arrived > known:
            self._described[what] = arrived, description

    def _abort(self, message: StreamAbort) -> None:
        spool = self._spools.get(message.xid)
        if spool is None:
            return  # nothing of it was sent
        if message.subxid != message.xid:
            spool.cut(message.subxid)
        else:
            del self._spools[message.xid]
            spool.close()


def _of(description: bytes) -> bytes:
    """Return what a description is of: its kind and OID."""
    return description[:_OID_END]


class StreamingMetrics(Protocol):
    """What is reported of open transactions."""

    def spooled(self, *, transactions: int, memory_bytes: int, disk_bytes: int) -> None:
        """So much of transactions that have not ended is kept."""


class _Source(Protocol):
    async def read(self, limit: int, limit_bytes: int) -> list[bytes]: ...

    async def send_status(
        self, write_lsn: int, flush_lsn: int, apply_lsn: int, *, reply_requested: bool = False
    ) -> None: ...


class StreamedStream:
    """Reads from a stream of protocol 2 or 4; status messages pass through.

    A committed transaction is handed on in pieces of a read's limits, however large it is; until
    all of it is, nothing more is read.
    """

    def __init__(self, stream: _Source, metrics: StreamingMetrics, memory: SpoolMemory) -> None:
        self._stream = stream
        self._metrics = metrics
        self._memory = memory
        self._transactions = StreamedTransactions(self._memory)
        self._received: deque[bytes] = deque()  # of the last read, and not looked at yet
        self._replay: Iterator[bytes] = iter(())

    async def read(self, limit: int, limit_bytes: int) -> list[bytes]:
        """Return CopyData payloads of version 1, at least one.

        Errors are those of `ReplicationStream.read`.
        """
        await asyncio.sleep(0)  # a long replay must not hold up everybody else
        while not (frames := self._take(limit, limit_bytes)):
            self._report()
            self._received.extend(await self._receive(limit, limit_bytes))
        self._report()
        return frames

    async def send_status(
        self, write_lsn: int, flush_lsn: int, apply_lsn: int, *, reply_requested: bool = False
    ) -> None:
        """Send a standby status update."""
        await self._stream.send_status(
            write_lsn, flush_lsn, apply_lsn, reply_requested=reply_requested
        )

    async def _receive(self, limit: int, limit_bytes: int) -> list[bytes]:
        try:
            return await self._stream.read(limit, limit_bytes)
        except ServerDecodeError as error:
            if self._memory.transactions:  # perhaps one of these: where it commits is not known yet
                raise ServerDecodeError(str(error), hint=_UNKNOWN_PLACE) from error
            raise

    def close(self) -> None:
        """Forget what was spooled: the server sends it again, to the next session."""
        self._transactions.close()

    def _take(self, limit: int, limit_bytes: int) -> list[bytes]:
        """Return what is there, up to a limit: of the transaction being replayed, then received."""
        frames: list[bytes] = []
        while len(frames) < limit and limit_bytes > 0:
            payload = next(self._replay, None)
            if payload is not None:
                frames.append(_HEADER + payload)
                limit_bytes -= len(payload)
            elif self._received:
                frame = self._received.popleft()
                if frame[0] != XLOG_DATA:
                    frames.append(frame)
                else:
                    self._replay = self._transactions.feed(frame[XLOG_DATA_HEADER_SIZE:])
            else:
                break
        return frames

    def _report(self) -> None:
        memory = self._memory
        self._metrics.spooled(
            transactions=memory.transactions,
            memory_bytes=memory.held_bytes,
            disk_bytes=memory.disk_bytes,
        )

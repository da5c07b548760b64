"""Where messages of open transactions wait for their commit: in memory, beyond a bound on disk.

A `Spool` is a stack of records, one an open transaction: appended in the order of the stream, cut
off at the end when a subtransaction is rolled back, read from the beginning once. A cut steps back
by whole runs of records of one kind, so that one of millions of rows holds up nobody. All spools of
a session share one `SpoolMemory`: beyond its bound the largest go to a file, which has no name and
so ends with the process, whatever becomes of it. Nothing is kept in memory for each record.

Logical messages are the exception to the order: in a piece the server gives them the id of the
whole transaction, whatever subtransaction wrote them (seen on PostgreSQL 15 and 18). So one that
stands right before a part that is rolled back may belong to that part, or not: it is *uncertain*.
Up to where a run of them is so stands in its first record, not in memory.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from struct import Struct
from typing import BinaryIO, Final

from cdc.errors import SpoolFailed

MEMORY_BYTES: Final = 8 << 20
"""Messages of all open transactions that are held in memory."""

_READ_BYTES: Final = 256 << 10
_HEAD: Final = Struct("<IQ")  # length of the message; its order, or up to where a run is uncertain
_NOTE_START: Final = 4
_NOTE: Final = Struct("<Q")
_TAIL: Final = Struct("<IQ")  # its subtransaction, and where the run began: the way back
_XIDS: Final = 1 << 32
_LOGICAL_MESSAGE: Final = b"M"


class SpoolMemory:
    """What the spools of one session may hold in memory together, and what they hold on disk."""

    __slots__ = ("_limit", "_spools", "disk_bytes", "held_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._spools: set[Spool] = set()
        self.held_bytes = 0
        self.disk_bytes = 0

    @property
    def transactions(self) -> int:
        """How many are open."""
        return len(self._spools)

    def add(self, spool: "Spool") -> None:
        """Count a spool in."""
        self._spools.add(spool)

    def remove(self, spool: "Spool") -> None:
        """Count it out."""
        self._spools.discard(spool)

    def make_room(self) -> None:
        """Let the largest go to disk until the bound is kept."""
        while self.held_bytes > self._limit:
            max(self._spools, key=lambda spool: spool.held_bytes).write_out()


class Spool:
    """The messages of one open transaction.

    >>> spool = Spool(740, SpoolMemory(1 << 20))
    >>> spool.append(740, b"Ione")
    ... spool.append(742, b"Itwo")
    ... spool.cut(742)
    >>> list(spool.drain())
    [(b'Ione', True, 0)]
    """

    __slots__ = (
        "_file",
        "_file_bytes",
        "_memory",
        "_run",
        "_run_start",
        "_tail",
        "xid",
    )

    def __init__(self, xid: int, memory: SpoolMemory) -> None:
        self.xid = xid
        self._memory = memory
        self._file: BinaryIO | None = None
        self._file_bytes = 0
        self._tail = bytearray()  # what comes after the file
        self._run: tuple[int, bool] | None = None  # of whom, and whether of logical messages
        self._run_start = 0
        memory.add(self)

    @property
    def held_bytes(self) -> int:
        """What is held in memory."""
        return len(self._tail)

    def append(self, subxid: int, message: bytes, order: int = 0) -> None:
        """Add a message of a subtransaction; but of a logical one, `order` comes back with it."""
        run = subxid, message[:1] == _LOGICAL_MESSAGE
        if run != self._run:
            self._run, self._run_start = run, self._file_bytes + len(self._tail)
        note = 0 if run[1] else order
        record = _HEAD.pack(len(message), note) + message + _TAIL.pack(subxid, self._run_start)
        self._tail += record
        self._memory.held_bytes += len(record)
        self._memory.make_room()

    def cut(self, subxid: int) -> None:
        """Take off what a subtransaction that is rolled back has left: the end of the stack.

        Whatever has come since it began is its own or of subtransactions within it, and those have
        later ids: ids are assigned in order, a parent's before a child's. So everything from the
        first whose id is not before its own goes. Logical messages before that are uncertain, back
        to what is certainly older.
        """
        least = (subxid - self.xid) % _XIDS
        end = start = self._file_bytes + len(self._tail)
        while start > 0:
            before, of, is_message = self._run_before(start)
            if (of - self.xid) % _XIDS >= least:
                end = before
            elif not (is_message and of == self.xid):
                break
            start = before
        self._truncate(end)
        self._run = None
        if start < end:  # one run, which goes on: what follows is certain again
            self._run, self._run_start = (self.xid, True), start
            self._overwrite(start + _NOTE_START, _NOTE.pack(end))

    def write_out(self) -> None:
        """Move what is in memory to the file. Raises `SpoolFailed`."""
        size = len(self._tail)
        with self._failing(size):
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="cdc-spool-", buffering=0)  # noqa: SIM115  # closed by `close`
            _write_all(self._file.fileno(), self._tail, self._file_bytes)
        self._file_bytes += size
        self._memory.disk_bytes += size
        self._memory.held_bytes -= size
        self._tail.clear()

    def drain(self) -> Iterator[tuple[bytes, bool, int]]:
        """Yield the messages in order, whether they are certain, and their order; then close.

        Nothing may be appended meanwhile.
        """
        buffer, position, offset, doubtful_until = bytearray(), 0, 0, 0
        for piece in self._pieces():
            del buffer[:position]
            position = 0
            buffer += piece
            while (end := _end_of_record(buffer, position)) is not None:
                _, note = _HEAD.unpack_from(buffer, position)
                message = bytes(buffer[position + _HEAD.size : end - _TAIL.size])
                if message[:1] == _LOGICAL_MESSAGE:
                    doubtful_until = max(doubtful_until, note)
                yield message, offset >= doubtful_until, note
                offset += end - position
                position = end
        self.close()

    def close(self) -> None:
        """Forget everything."""
        self._memory.remove(self)
        self._truncate(0)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _pieces(self) -> Iterator[bytes]:
        for start in range(0, self._file_bytes, _READ_BYTES):
            yield self._read(start, min(_READ_BYTES, self._file_bytes - start))
        yield bytes(self._tail)

    def _run_before(self, end: int) -> tuple[int, int, bool]:
        """Return where the run begins that ends here, whose it is, and if it is of messages."""
        subxid, start = _TAIL.unpack(self._read(end - _TAIL.size, _TAIL.size))
        return start, subxid, self._read(start + _HEAD.size, 1) == _LOGICAL_MESSAGE

    def _read(self, start: int, size: int) -> bytes:
        """Read what is in the file, or what is in memory; no record is in both."""
        if start >= self._file_bytes or self._file is None:
            begin = start - self._file_bytes
            return bytes(self._tail[begin : begin + size])
        return os.pread(self._file.fileno(), size, start)

    def _overwrite(self, start: int, data: bytes) -> None:
        """Write over a part of a record: of one in the file, or in memory."""
        if start >= self._file_bytes or self._file is None:
            begin = start - self._file_bytes
            self._tail[begin : begin + len(data)] = data
            return
        with self._failing(len(data)):
            _write_all(self._file.fileno(), data, start)

    @contextmanager
    def _failing(self, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # No name of the folder when there is none that can be written: asking would fail again.
            where = f" in {tempfile.tempdir}" if tempfile.tempdir else ""
            raise SpoolFailed(
                f"{size} bytes of transaction {self.xid} cannot be kept{where}: {error.strerror}"
            ) from error

    def _truncate(self, size: int) -> None:
        in_memory = max(0, size - self._file_bytes)
        self._memory.held_bytes -= len(self._tail) - in_memory
        del self._tail[in_memory:]
        if self._file is not None and size < self._file_bytes:
            self._file.truncate(size)
            self._memory.disk_bytes -= self._file_bytes - size
            self._file_bytes = size


def _write_all(descriptor: int, data: bytes | bytearray, start: int) -> None:
    written = 0
    with memoryview(data) as rest:
        while written < len(rest):
            written += os.pwrite(descriptor, rest[written:], start + written)


def _end_of_record(buffer: bytearray, position: int) -> int | None:
    """Return where the record ends that begins here; None when it is not all there."""
    if len(buffer) < position + _HEAD.size:
        return None
    length, _ = _HEAD.unpack_from(buffer, position)
    end: int = position + _HEAD.size + length + _TAIL.size
    return end if end <= len(buffer) else None

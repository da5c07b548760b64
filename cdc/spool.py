"""Where messages of open transactions wait for their commit: in memory, beyond a bound on disk.

A `Spool` is a stack of records, one an open transaction: appended in the order of the stream, cut
off at the end when a subtransaction is rolled back, read from the beginning once. All spools of a
session share one `SpoolMemory`: beyond its bound the largest go to a file, which has no name and
so ends with the process, whatever becomes of it. Nothing is kept in memory for each record.
"""

import tempfile
from collections.abc import Iterator
from struct import Struct
from typing import BinaryIO, Final

MEMORY_BYTES: Final = 8 << 20
"""Messages of all open transactions that are held in memory."""

_READ_BYTES: Final = 256 << 10
_HEAD: Final = Struct("<I")  # length of the message
_TAIL: Final = Struct("<II")  # its subtransaction, and the length again: the way back
_XIDS: Final = 1 << 32


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
    >>> spool.append(740, b"one")
    ... spool.append(742, b"two")
    ... spool.cut(742)
    >>> list(spool.drain())
    [b'one']
    """

    __slots__ = ("_file", "_file_bytes", "_memory", "_tail", "xid")

    def __init__(self, xid: int, memory: SpoolMemory) -> None:
        self.xid = xid
        self._memory = memory
        self._file: BinaryIO | None = None
        self._file_bytes = 0
        self._tail = bytearray()
        memory.add(self)

    @property
    def held_bytes(self) -> int:
        """What is held in memory."""
        return len(self._tail)

    def append(self, subxid: int, message: bytes) -> None:
        """Add a message of a subtransaction."""
        before = len(self._tail)
        self._tail += _HEAD.pack(len(message)) + message + _TAIL.pack(subxid, len(message))
        memory = self._memory
        memory.held_bytes += len(self._tail) - before
        memory.make_room()

    def cut(self, subxid: int) -> None:
        """Take off what a subtransaction that is rolled back has left: the end of the stack.

        Whatever has come since it began is its own or of subtransactions within it, and those have
        later ids: ids are assigned in order, a parent's before a child's. So everything at the end
        whose id is not before its own goes, and stops at the first that is.
        """
        least = (subxid - self.xid) % _XIDS
        while (last := self._last()) is not None and (last[0] - self.xid) % _XIDS >= least:
            self._drop(last[1])

    def write_out(self) -> None:
        """Move what is in memory to the file."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="cdc-spool-")  # noqa: SIM115  # closed by `close`
        self._file.seek(self._file_bytes)
        self._file.write(self._tail)
        self._file_bytes += len(self._tail)
        self._memory.disk_bytes += len(self._tail)
        self._memory.held_bytes -= len(self._tail)
        self._tail.clear()

    def drain(self) -> Iterator[bytes]:
        """Yield the messages in order, then close. Nothing may be appended meanwhile."""
        buffer, position = bytearray(), 0
        for piece in self._pieces():
            del buffer[:position]
            position = 0
            buffer += piece
            while (end := _end_of_record(buffer, position)) is not None:
                yield bytes(buffer[position + _HEAD.size : end - _TAIL.size])
                position = end
        self.close()

    def close(self) -> None:
        """Forget everything."""
        self._memory.remove(self)
        self._memory.held_bytes -= len(self._tail)
        self._memory.disk_bytes -= self._file_bytes
        self._tail, self._file_bytes = bytearray(), 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _pieces(self) -> Iterator[bytes]:
        if self._file is not None:
            self._file.seek(0)
            while piece := self._file.read(_READ_BYTES):
                yield piece
        yield bytes(self._tail)

    def _last(self) -> tuple[int, int] | None:
        """Return subtransaction and size of the last record; None when there is none."""
        if not self._tail and not self._read_back():
            return None
        subxid, length = _TAIL.unpack_from(self._tail, len(self._tail) - _TAIL.size)
        return subxid, _HEAD.size + length + _TAIL.size

    def _drop(self, size: int) -> None:
        while len(self._tail) < size:
            self._read_back()
        del self._tail[-size:]
        self._memory.held_bytes -= size

    def _read_back(self) -> bool:
        """Take the end of the file into memory again; False when there is none."""
        if self._file is None or not self._file_bytes:
            return False
        start = max(0, self._file_bytes - _READ_BYTES)
        self._file.seek(start)
        piece = self._file.read(self._file_bytes - start)
        self._file.truncate(start)
        self._memory.disk_bytes -= len(piece)
        self._memory.held_bytes += len(piece)
        self._file_bytes = start
        self._tail[:0] = piece
        return True


def _end_of_record(buffer: bytearray, position: int) -> int | None:
    """Return where the record ends that begins here; None when it is not all there."""
    if len(buffer) < position + _HEAD.size:
        return None
    (length,) = _HEAD.unpack_from(buffer, position)
    end: int = position + _HEAD.size + length + _TAIL.size
    return end if end <= len(buffer) else None

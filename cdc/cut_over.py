"""How the second publication gets into a stream that began without it.

The publications of a stream are fixed when it starts, and before PostgreSQL 18 the server fails on
one that did not exist yet where it decodes. So: once every transaction has ended that was open when
the publication came, its position is noted, a marker is written after it, and when that was routed
the stream starts again, from there, with both. A slot that is made after the publication needs none
of this, nor does wal2json, which reads no publication.
"""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from cdc import queries
from cdc.catalog import TableName, insert_only_name, read_publications
from cdc.connection import Connection, source_errors
from cdc.errors import PublicationDrift
from cdc.lsn import Lsn
from cdc.marker import PREFIX, Marker
from cdc.slots import SlotKeeper
from cdc.wanted import EVERY_PUBLICATION, dotted

SLOW_WRITER_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Start:
    """With which publications a stream can start, and from where."""

    publications: tuple[str, ...]
    from_lsn: Lsn = queries.FROM_THE_SLOT
    carried: int | None = None  # the OID of the second one


async def choose_start(source: Connection, slots: SlotKeeper, publication: str) -> Start:
    """Add the second publication, if the server can decode all that was not routed with it.

    Args:
        source: an ordinary connection to the source database.
        slots: the slot, whose progress row has the position.
        publication: the main one.
    """
    name = insert_only_name(publication)
    second = (await read_publications(source, [name])).get(name)
    progress = None if second is None else await slots.read_progress()
    noted = None if progress is None else progress.inserts
    if second is None or progress is None or noted is None:
        return Start((publication,))
    oid, lsn = noted
    if oid != second.oid or progress.routed_lsn < lsn:
        return Start((publication,))
    return Start((publication, name), lsn, oid)


@dataclass(slots=True)
class CutOver:
    """The leader's way from a stream of one publication to a stream of both.

    Args:
        slots: the slot, whose progress row keeps the position.
        source: an ordinary connection to the source database.
        nonce: of the progress row, for the marker.
        routed_lsn: gives the position of the router.
        restart: ends the stream in order, to be started again.
        carried: the OID of the second publication that the stream carries.
        noted: the OID of one that it could carry, and from which position on.
    """

    slots: SlotKeeper
    source: Connection
    nonce: str
    routed_lsn: Callable[[], int]
    restart: Callable[[], None]
    carried: int | None = None
    noted: tuple[int, Lsn] | None = None
    captured: Collection[TableName] = ()
    is_pending: bool = False
    _horizon: tuple[int, int] | None = None  # OID; an xid that came after the publication
    _is_over: bool = False
    _has_gap: bool = False
    _restarts: bool = False
    _waits_since_s: float | None = None
    _has_said: bool = False
    _log: Any = field(default_factory=lambda: structlog.get_logger("cdc"))

    def carries(self, oid: int) -> bool:
        """Whether the stream carries the second publication of that OID."""
        return self.carried in {oid, EVERY_PUBLICATION}

    async def advance(self, oid: int, captured: Collection[TableName]) -> None:
        """Do the next step towards a stream that carries this publication.

        Args:
            oid: of the second publication as it is.
            captured: what has begun to be captured through it: if the stream does not carry it
                (it was made anew), their inserts are being lost, and there is a gap.
        """
        self.captured = captured
        self.is_pending = not self.carries(oid)
        if not self.is_pending:
            if not self._is_over:
                await self.slots.note_carried(oid)
                await self.slots.end_continued()
                self._is_over = True
            return
        if captured and not self._has_gap:
            await self._leave_gap(captured)
            self._has_gap = True
        if self.noted is None or self.noted[0] != oid:
            await self._note(oid)
        elif self.routed_lsn() >= self.noted[1] and not self._restarts:
            await self._restart(self.noted)

    async def _restart(self, noted: tuple[int, Lsn]) -> None:
        """Start again, if the next stream will carry it: it decides by what is durable."""
        progress = await self.slots.read_progress()
        if progress is None or progress.inserts != noted or progress.routed_lsn < noted[1]:
            return
        self._restarts = True
        self._log.info("stream_restarts", reason="the second publication is new")
        self.restart()

    async def _note(self, oid: int) -> None:
        """Note the position, once whoever wrote before the publication came has ended."""
        with source_errors():
            if self._horizon is None or self._horizon[0] != oid:
                cursor = await self.source.execute(queries.TRANSACTION_ID)
                row = await cursor.fetchone()
                self._horizon = (oid, 0 if row is None else int(row["xid"]))
            cursor = await self.source.execute(queries.HORIZON)
            row = await cursor.fetchone()
        if row is None or int(row["xid"]) <= self._horizon[1]:
            await self._say_who_holds_up(self._horizon[1])
            return
        self.noted = (oid, Lsn.parse(row["lsn"]))
        await self.slots.note_inserts(*self.noted)
        content = Marker(slot=self.slots.name, nonce=self.nonce).encode()
        with source_errors():
            await self.source.execute(queries.EMIT_MARK, {"prefix": PREFIX, "content": content})

    async def _say_who_holds_up(self, xid: int) -> None:
        """Name, once, the transactions that have been waited for too long."""
        now_s = asyncio.get_running_loop().time()
        self._waits_since_s = self._waits_since_s or now_s
        if self._has_said or now_s - self._waits_since_s < SLOW_WRITER_S:
            return
        with source_errors():
            cursor = await self.source.execute(queries.OLDER_TRANSACTIONS, {"xid": str(xid)})
            rows = await cursor.fetchall()
        self._has_said = True
        self._log.warning(
            "activation_waits",
            reason="the second publication is new",
            pids=[row["pid"] for row in rows],
            hint="subscriptions to tables without a key begin when these transactions have ended",
        )

    async def _leave_gap(self, captured: Collection[TableName]) -> None:
        tables = ", ".join(map(dotted, sorted(captured)))
        await self.slots.open_gap(
            PublicationDrift(
                f"the publication of {tables} was made anew: their inserts are missing until the "
                "stream has been started again with it",
                hint="cdc does that by itself",
            ),
            policy="continue",
        )

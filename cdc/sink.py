"""Jobs, dead letters, stamps and progress: one transaction of the queue database.

Exactly once rests on three things here. Jobs and the position they stand for commit together. The
last statement of every transaction is a compare-and-swap on epoch and position, so whoever is not
the leader any more, or has lost an asynchronously committed tail, writes nothing. And a position
is acknowledged to the source only when it is durable here (router-rules 1, 5 and 6).

Commits are asynchronous and cheap; about every `DURABLE_EVERY_S`, and at the end of a burst, one is
made durable, and only that one may be acknowledged. This module must not know the
source: it is given batches and positions.
"""

import json
import os
import socket
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.rows import tuple_row

from cdc import job_queries, queries
from cdc.coalescing import fold, merge
from cdc.errors import FenceLost, QueueUnavailable, SinkError
from cdc.lsn import Lsn
from cdc.routing import DeadLetter
from cdc.wakeups import leave_word
from conductor.contract import (
    COPY_HEADER,
    COPY_TRAILER,
    JobSpec,
    encode_copy_rows,
    encode_keyed_rows,
    queue_and_task,
)

DURABLE_EVERY_S = 0.2
_TAKEOVER_TIMEOUT_MS = 3_000
_SEND_BUFFER_BYTES = 4 << 20
_REFUSALS = ("22", "23", "54")


@dataclass(frozen=True, slots=True)
class Position:
    """The progress row as the new leader found it."""

    generation: int
    epoch: int
    routed_lsn: int
    acknowledged_lsn: int
    marker_nonce: str
    is_local: bool = False  # the source is in the queue's own cluster


@dataclass(frozen=True, slots=True)
class Stamp:
    """Subscriptions that start and end with the transaction that committed at `commit_lsn`."""

    commit_lsn: int
    start: tuple[int, ...]
    end: tuple[int, ...]


@dataclass(slots=True)
class Batch:
    """What is written at once: whole source transactions, or a piece of a large one.

    `end_lsn` is the commit end of the last transaction in it; None when the batch ends inside a
    transaction whose rest is still to come: then it is written, but not committed.
    """

    specs: list[JobSpec] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    end_lsn: int | None = None
    waits: list[tuple[str, JobSpec]] = field(default_factory=list)  # what jobs may wait for


class Sink:
    """The leader's hold on the queue database. Make it with `open`; it serves one caller."""

    def __init__(
        self, connection: psycopg.AsyncConnection[tuple[object, ...]], slot: str, position: Position
    ) -> None:
        self.position = position
        self.routed_lsn = position.routed_lsn
        self.durable_lsn = position.acknowledged_lsn
        self._connection = connection
        self._slot = slot
        self._run_at_us: int | None = None  # not None: a transaction is open
        self._waiting: set[int] = set()  # jobs that word was left for
        self._durable_at_s = time.monotonic()

    @classmethod
    async def open(cls, dsn: str, slot: str, *, leader: str) -> "Sink":
        """Connect and raise the epoch: from here on no earlier leader can commit.

        Call it while holding the replication slot, and never through a pooler that lends backends
        to others (`pooling` tells): its session commits asynchronously. A predecessor's backend
        that still stands in a transaction would keep the row locked, so it is ended first. Raises
        `QueueUnavailable`, or `FenceLost` when the slot has no progress row.
        """
        name = f"cdc sink {slot}"[:63]
        async with _queue_errors():
            connection = await psycopg.AsyncConnection.connect(
                dsn, autocommit=True, application_name=name, client_encoding="utf8"
            )
        try:
            async with _queue_errors():
                await _end_previous(connection, slot, name)
                await connection.execute(queries.BEGIN_DURABLE)
                cursor = await connection.execute(
                    queries.RAISE_EPOCH, {"slot": slot, "leader": leader}
                )
                row = await cursor.fetchone()
                await connection.execute(queries.COMMIT)
                await connection.execute(queries.SINK_SETTINGS)
            _widen_send_buffer(connection.fileno())
        except BaseException:
            await connection.close()
            raise
        if row is None:
            await connection.close()
            raise FenceLost(f"slot {slot!r} has no progress row")
        generation, epoch, routed, acknowledged, nonce, is_local = row
        position = Position(
            generation=int(str(generation)),
            epoch=int(str(epoch)),
            routed_lsn=Lsn.parse(str(routed)),
            acknowledged_lsn=Lsn.parse(str(acknowledged)),
            marker_nonce=str(nonce),
            is_local=bool(is_local),
        )
        return cls(connection, slot, position)

    @property
    def is_open(self) -> bool:
        """Whether a piece of a large source transaction is written and not committed."""
        return self._run_at_us is not None

    @property
    def is_durable(self) -> bool:
        """Whether everything committed so far would survive a crash of the queue database."""
        return self.durable_lsn >= self.routed_lsn

    async def write(self, batch: Batch) -> None:
        """Write a batch, and commit it when it ends with a whole transaction.

        Durably when the last durable commit is `DURABLE_EVERY_S` old. Raises `FenceLost`,
        `QueueUnavailable` or `SinkError`: then nothing of the open transaction is left, and the
        sink is of no more use.
        """
        alone = batch.end_lsn is not None and not self.is_open
        async with _queue_errors():
            await self._begin()
            if batch.specs:
                await self._copy(batch.specs, batch, alone=alone)
            if batch.dead_letters:
                generation = self.position.generation
                await insert_dead_letters(
                    self._connection, self._slot, generation, batch.dead_letters
                )
            if batch.waits:
                self._waiting |= await leave_word(self._connection, batch.waits)
            for stamp in batch.stamps:
                await self._stamp(stamp)
            if batch.end_lsn is not None:
                overdue = time.monotonic() - self._durable_at_s >= DURABLE_EVERY_S
                await self._commit(batch.end_lsn, durable=overdue)

    async def persist_acknowledged(self, lsn: int) -> None:
        """Make everything committed durable, with `lsn` as the position to acknowledge.

        For a burst's end and for idle positions; `lsn` is at or beyond the routed position.
        """
        async with _queue_errors():
            await self._connection.execute(queries.BEGIN_DURABLE)
            cursor = await self._connection.execute(
                queries.PERSIST_ACKNOWLEDGED,
                {
                    "slot": self._slot,
                    "epoch": self.position.epoch,
                    "routed": str(Lsn(self.routed_lsn)),
                    "acknowledged": str(Lsn(lsn)),
                },
            )
            self._check_fence(cursor.rowcount)
            await self._connection.execute(queries.COMMIT)
        self._note_durable(lsn)

    async def abandon_open(self) -> None:
        """Undo the pieces of a source transaction whose end will not come."""
        if self.is_open:
            async with _queue_errors():
                await self._connection.rollback()
            self._run_at_us = None

    async def wake(self) -> set[str]:
        """Wake the jobs that word was left for, after the commit; return their queues.

        In a transaction of its own, which waits for nobody: workers wake the others soon.
        """
        jobs, self._waiting = self._waiting, set()
        if not jobs:
            return set()
        async with _queue_errors():
            cursor = await self._connection.execute(queries.WAKE, {"jobs": sorted(jobs)})
            return {str(queue) for (queue,) in await cursor.fetchall()}

    async def hint(self, queues: Iterable[str]) -> None:
        """Tell the workers of these queues that there are jobs. A hint: they poll as well."""
        async with _queue_errors():
            await self._connection.execute(queries.HINT, {"queues": sorted(queues)})

    async def close(self) -> None:
        """Close the connection; what was not committed is gone."""
        await self._connection.close()

    async def _begin(self) -> None:
        if self._run_at_us is None:
            cursor = await self._connection.execute(queries.BEGIN)
            cursor.nextset()
            row = await cursor.fetchone()
            self._run_at_us = int(str(row[0])) if row else 0

    async def _copy(self, specs: Sequence[JobSpec], batch: Batch, *, alone: bool) -> None:
        """COPY the jobs; when the server refuses one of them, find it and set it aside.

        Only then are savepoints needed, unless the transaction holds other pieces (not `alone`).
        """
        if not alone:
            await self._connection.execute(queries.SAVEPOINT)
        try:
            await self._copy_rows(specs)
        except psycopg.Error as error:
            if not is_refusal(error):
                raise
            if alone:
                await self._connection.rollback()
                self._run_at_us = None
                await self._begin()
            else:
                await self._connection.execute(queries.ROLLBACK_TO_SAVEPOINT)
            await self._copy_around_refused(specs, batch)

    async def _copy_rows(self, specs: Sequence[JobSpec]) -> None:
        await copy_jobs(self._connection, specs, self._run_at_us or 0)

    async def _copy_around_refused(self, specs: Sequence[JobSpec], batch: Batch) -> None:
        """Halve until the refused jobs stand alone: they become dead letters, the rest jobs."""
        await self._connection.execute(queries.SAVEPOINT)
        try:
            await self._copy_rows(specs)
        except psycopg.Error as error:
            if not is_refusal(error):
                raise
            await self._connection.execute(queries.ROLLBACK_TO_SAVEPOINT)
            if len(specs) == 1:
                batch.dead_letters.append(_refused(specs[0], error))
                return
            middle = len(specs) // 2
            await self._copy_around_refused(specs[:middle], batch)
            await self._copy_around_refused(specs[middle:], batch)
        else:
            await self._connection.execute(queries.RELEASE_SAVEPOINT)

    async def _stamp(self, stamp: Stamp) -> None:
        lsn = str(Lsn(stamp.commit_lsn))
        for query, ids in ((queries.STAMP_START, stamp.start), (queries.STAMP_END, stamp.end)):
            if ids:
                await self._connection.execute(
                    query, {"slot": self._slot, "lsn": lsn, "ids": list(ids)}
                )

    async def _commit(self, end_lsn: int, *, durable: bool) -> None:
        cursor = await self._connection.execute(
            queries.FENCE,
            {
                "slot": self._slot,
                "epoch": self.position.epoch,
                "from": str(Lsn(self.routed_lsn)),
                "to": str(Lsn(end_lsn)),
                "durable": durable,
            },
        )
        self._check_fence(cursor.rowcount)
        await self._connection.execute(queries.COMMIT_DURABLY if durable else queries.COMMIT)
        self._run_at_us = None
        self.routed_lsn = end_lsn
        if durable:
            self._note_durable(end_lsn)

    def _note_durable(self, lsn: int) -> None:
        self.durable_lsn = max(self.durable_lsn, lsn)
        self._durable_at_s = time.monotonic()

    def _check_fence(self, updated: int) -> None:
        if updated != 1:
            raise FenceLost(
                f"slot {self._slot!r}: progress is not at epoch {self.position.epoch} "
                f"and position {Lsn(self.routed_lsn)} any more"
            )


async def copy_jobs(
    connection: psycopg.AsyncConnection[Any], specs: Sequence[JobSpec], run_at_us: int
) -> None:
    """COPY jobs, due at `run_at_us` (Unix time). Raises the driver's error for one refused."""
    keyed = [spec for spec in specs if spec.key is not None]
    if len(keyed) < len(specs):
        free = [spec for spec in specs if spec.key is None] if keyed else specs
        await _copy(connection, job_queries.COPY_JOBS, encode_copy_rows(free, run_at_us))
    if any(spec.coalesce_us for spec in keyed):
        keyed = await _coalesce(connection, keyed)
    if keyed:
        rows = encode_keyed_rows(keyed, run_at_us)
        await _copy(connection, job_queries.COPY_KEYED_JOBS, rows)
        await _call_lanes(connection, [spec for spec in keyed if spec.ordered])


async def _copy(
    connection: psycopg.AsyncConnection[Any], query: queries.Statement, rows: bytes
) -> None:
    async with connection.cursor().copy(query) as copy:
        await copy.write(COPY_HEADER + rows + COPY_TRAILER)


async def _call_lanes(connection: psycopg.AsyncConnection[Any], specs: Sequence[JobSpec]) -> None:
    """Have the lanes looked at that these jobs stand in."""
    if not specs:
        return
    lanes = sorted({(*queue_and_task(head), key) for head, key in {(s.head, s.key) for s in specs}})
    names = ("queues", "tasks", "keys")
    columns = [list(column) for column in zip(*lanes, strict=True)]
    await connection.execute(job_queries.CALL_LANES, dict(zip(names, columns, strict=True)))


async def _coalesce(
    connection: psycopg.AsyncConnection[Any], specs: Sequence[JobSpec]
) -> list[JobSpec]:
    """Let changes go into the jobs of their keys that have not begun; return the others, in order.

    A job that somebody has locked is about to begin, or to be cancelled: nobody waits for it. Nor
    does an earlier change (a dead letter that is routed again) go into the job of later ones.
    """
    folded = fold([spec for spec in specs if spec.coalesce_us])
    cursor = connection.cursor(row_factory=tuple_row)
    await cursor.execute(
        job_queries.COALESCING_JOBS,
        {
            "subscriptions": [int.from_bytes(spec.head[-8:], "big") for spec in folded],
            "keys": [spec.key for spec in folded],
            "lsns": [_commit_lsn(spec) for spec in folded],
            "ordinals": [spec.ordinal for spec in folded],
        },
    )
    pending = {int(place): (at, payload) for place, at, payload in await cursor.fetchall()}
    if pending:
        found = [(folded[place - 1], at, payload) for place, (at, payload) in pending.items()]
        await cursor.execute(
            job_queries.RENEW_JOBS,
            {
                "ats": [at for _, at, _ in found],
                "payloads": [
                    merge(payload.encode(), spec.payload, fills=spec.fills).decode()
                    for spec, _, payload in found
                ],
                "lsns": [_commit_lsn(spec) for spec, _, _ in found],
                "ordinals": [spec.ordinal for spec, _, _ in found],
            },
        )
    rest = [spec for place, spec in enumerate(folded, 1) if place not in pending]
    rest += [spec for spec in specs if not spec.coalesce_us]
    return sorted(rest, key=_place)


def _place(spec: JobSpec) -> tuple[bytes, int]:
    return spec.position[-8:], spec.ordinal


def _commit_lsn(spec: JobSpec) -> str:
    return str(Lsn(int.from_bytes(spec.position[-8:], "big")))


async def insert_dead_letters(
    connection: psycopg.AsyncConnection[Any],
    slot: str,
    generation: int,
    letters: Sequence[DeadLetter],
) -> None:
    """Store what could not become a job."""
    await connection.execute(
        queries.INSERT_DEAD_LETTERS,
        {
            "slot": slot,
            "generation": generation,
            "commit_lsns": [str(Lsn(letter.commit_lsn)) for letter in letters],
            "commit_times_us": [letter.commit_time_us for letter in letters],
            "ordinals": [letter.ordinal for letter in letters],
            "subscriptions": [letter.subscription for letter in letters],
            "relations": [
                None if letter.relation is None else json.dumps(letter.relation)
                for letter in letters
            ],
            "errors": [letter.error.replace("\0", "") for letter in letters],  # text cannot hold it
            "raws": [letter.raw for letter in letters],
        },
    )


def _widen_send_buffer(descriptor: int) -> None:
    """Let the kernel hold a whole COPY, as far as `net.core.wmem_max` allows.

    The server then works through it while we decode. A Unix socket holds 208 KiB otherwise, which
    the server has inserted before the reader gives way to the writer again: a backlog drained at
    67,000 rows/s, and at 87,000 with this.
    """
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)


async def _end_previous(
    connection: psycopg.AsyncConnection[tuple[object, ...]], slot: str, name: str
) -> None:
    cursor = await connection.execute(queries.PREVIOUS_SINK, {"slot": slot, "name": name})
    for (pid,) in await cursor.fetchall():
        await connection.execute(
            queries.TERMINATE_BACKEND, {"pid": pid, "timeout_ms": _TAKEOVER_TIMEOUT_MS}
        )


def is_refusal(error: psycopg.Error) -> bool:
    """Tell whether the server refused what it was given, rather than being in trouble itself.

    By SQLSTATE: bad data (22), a constraint (23), too complex or too large (54, and XX000 for an
    allocation beyond 1 GB).
    """
    state = error.sqlstate or ""
    return state[:2] in _REFUSALS or state == "XX000"


def _refused(spec: JobSpec, error: psycopg.Error) -> DeadLetter:
    """Describe a job that the queue database would not take. Its payload is kept whole."""
    return DeadLetter(
        commit_lsn=int.from_bytes(spec.position[-8:], "big"),
        ordinal=spec.ordinal,
        subscription=int.from_bytes(spec.head[-8:], "big"),
        relation=None if spec.key is None else {"key": spec.key},
        error=describe_refusal(error),
        raw=spec.payload,
    )


def describe_refusal(error: psycopg.Error) -> str:
    """Say why the queue database would not take a job."""
    return f"refused by the queue database: {error.diag.message_primary or error}"


@asynccontextmanager
async def _queue_errors() -> AsyncIterator[None]:
    """Turn the driver's errors into ours."""
    try:
        yield
    except psycopg.OperationalError as error:
        raise QueueUnavailable(f"queue database: {_first_line(error)}") from error
    except psycopg.Error as error:
        raise SinkError(f"queue database: {_first_line(error)}") from error


def _first_line(error: psycopg.Error) -> str:
    return str(error).strip().split("\n", 1)[0]

"""Dead letters, for operators: list them, look into one, route them again, give them up.

A letter holds the message as it came, the table as the stream described it, and where it was
committed. So it is routed again by the code of today, whenever somebody asks, and becomes the very
job that it would have been: same generation, commit, ordinal and subscription. Job and deletion are
one transaction; what is refused again stays, with the new error. Needs no sidecar and no source.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from cdc import operator_queries, queries
from cdc.config import Settings
from cdc.connection import Connection, connect_queue, queue_errors
from cdc.emission import Place, route_event_again
from cdc.errors import CdcError, ConfigError, ProtocolError
from cdc.lsn import Lsn
from cdc.relations import read_shape
from cdc.routing import Routed, Router
from cdc.sink import copy_jobs, describe_refusal, insert_dead_letters, is_refusal
from cdc.transactions import STANDALONE_ORDINAL
from cdc.wakeups import leave_word
from cdc.wire.messages import UNCHANGED, Delete, Insert, LogicalMessage, Row, Truncate, Update
from cdc.wire.pgoutput import decode
from conductor.contract import JobSpec, encode_position
from conductor.matching import ChangeFilter, EventFilter, Subscription

_NAME: Final = "cdc dead"
_LOGICAL_MESSAGE: Final = b"M"  # a job's payload is JSON, and never begins so


@dataclass(frozen=True, slots=True)
class Letter:
    """A row of conductor.dead_letters.

    Without a relation (or with nothing in it but the job's key) and with a subscription, `raw` is
    a job's payload that the queue database refused, or the message of an emitted event; else it is
    a message about a row. Without a subscription it could not be decoded.
    """

    id: int
    generation: int
    commit_lsn: Lsn
    commit_time_us: int
    ordinal: int
    subscription: int | None
    relation: dict[str, Any] | None
    error: str
    raw: bytes
    created_at: str
    now_us: int  # the queue database's time

    @property
    def is_refused_job(self) -> bool:
        """Whether it was routed, and refused as a job."""
        is_payload = self.relation is None or "key" in self.relation
        return is_payload and self.subscription is not None and not self.is_event

    @property
    def is_event(self) -> bool:
        """Whether it is an emitted event, which a filter could not be asked about."""
        of_one = self.relation is None and self.subscription is not None
        return of_one and self.raw.startswith(_LOGICAL_MESSAGE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a letter: `routed`, `unwanted`, `kept`, `discarded` or `missing`."""

    id: int
    result: str
    jobs: int = 0
    error: str | None = None


async def list_letters(settings: Settings, limit: int) -> list[dict[str, Any]]:
    """Return the oldest letters of the slot, without their contents."""
    async with _queue(settings) as connection:
        cursor = await connection.execute(
            operator_queries.DEAD_LETTERS, {"slot": settings.slot, "limit": limit}
        )
        return await cursor.fetchall()


async def show_letter(settings: Settings, letter_id: int) -> dict[str, Any]:
    """Return all that is known of one letter, its row as far as it can be read.

    Raises:
        ConfigError: there is none of that number.
    """
    async with _queue(settings) as connection:
        letter = await _read(connection, operator_queries.DEAD_LETTER, settings.slot, letter_id)
    if letter is None:
        raise ConfigError(
            f"slot {settings.slot!r} has no dead letter {letter_id}", hint="see `cdc dead list`"
        )
    return {
        "id": letter.id,
        "generation": letter.generation,
        "commit_lsn": str(letter.commit_lsn),
        "ordinal": letter.ordinal,
        "subscription": letter.subscription,
        "created_at": letter.created_at,
        "error": letter.error,
        **_contents(letter),
        "relation": letter.relation,
        "raw": letter.raw.hex(),
    }


async def redrive_letters(settings: Settings, ids: Sequence[int] | None) -> list[Outcome]:
    """Route letters again, each in a transaction of its own; None: all that the slot has now."""
    async with _queue(settings) as connection:
        if ids is None:
            ids = await _all_ids(connection, settings.slot)
        redriver = _Redriver(connection, settings.slot)
        outcomes = [await redriver.redrive(letter_id) for letter_id in ids]
        await redriver.announce()
    return outcomes


async def discard_letters(settings: Settings, ids: Sequence[int]) -> list[Outcome]:
    """Give letters up."""
    outcomes = []
    async with _queue(settings) as connection:
        for letter_id in ids:
            parameters = {"slot": settings.slot, "id": letter_id}
            cursor = await connection.execute(operator_queries.DELETE_DEAD_LETTER, parameters)
            outcomes.append(Outcome(letter_id, "discarded" if cursor.rowcount else "missing"))
    return outcomes


def route_again(letter: Letter, subscriptions: Iterable[Subscription]) -> Routed:
    """Route what a letter holds, for these subscriptions.

    Raises:
        CdcError: it still cannot be decoded, or the table is not known.
    """
    routed = Routed()
    if letter.is_refused_job:
        position = encode_position(letter.generation, letter.commit_lsn)
        key = (letter.relation or {}).get("key")
        for s in subscriptions:
            spec = JobSpec(s.head, position, letter.ordinal, letter.raw, key)
            if key is not None and isinstance(s.filter, ChangeFilter):
                spec.ordered, spec.coalesce_us = s.filter.ordered, s.filter.coalesce_us
                spec.fills = False  # nobody knows what has become of the row before it
            routed.specs.append(spec)
        return routed
    change = decode(letter.raw)
    if isinstance(change, LogicalMessage):
        place = Place(letter.commit_lsn, letter.ordinal, letter.commit_time_us)
        route_event_again(letter.generation, change, place, subscriptions, letter.raw, routed)
        return routed
    if not isinstance(change, Insert | Update | Delete | Truncate):
        raise ProtocolError(letter.raw[:1].decode(), 0, "a change of a table", "something else")
    router = Router(letter.generation, subscriptions)
    router.begin(letter.commit_lsn, letter.commit_time_us)
    router.route(read_shape(letter.relation or {}), change, letter.ordinal, letter.raw, routed)
    router.end(routed)
    return routed


class _Redriver:
    """Redrives letter after letter on one connection; `announce` tells the workers at the end."""

    def __init__(self, connection: Connection, slot: str) -> None:
        self._connection = connection
        self._slot = slot
        self._queues: set[str] = set()
        self._waiting: set[int] = set()

    async def redrive(self, letter_id: int) -> Outcome:
        """Put in again what one letter holds, or keep it with the error of this time."""
        key = {"slot": self._slot, "id": letter_id}
        async with self._connection.transaction():
            letter = await _read(
                self._connection, operator_queries.LOCK_DEAD_LETTER, self._slot, letter_id
            )
            if letter is None:
                return Outcome(letter_id, "missing")
            try:
                outcome = await self._settle(letter)
            except CdcError as error:
                outcome = Outcome(letter_id, "kept", error=str(error))
            if outcome.result == "kept":
                await self._connection.execute(
                    operator_queries.KEEP_DEAD_LETTER, {**key, "error": outcome.error}
                )
            else:
                await self._connection.execute(operator_queries.DELETE_DEAD_LETTER, key)
        return outcome

    async def announce(self) -> None:
        """Wake who waits, and tell the workers that there are jobs."""
        if self._waiting:
            await self._connection.execute(queries.WAKE, {"jobs": sorted(self._waiting)})
        if self._queues:
            await self._connection.execute(queries.HINT, {"queues": sorted(self._queues)})

    async def _settle(self, letter: Letter) -> Outcome:
        """Write what a letter gives; raise or return `kept` when it gives nothing for certain."""
        if letter.ordinal == STANDALONE_ORDINAL or (
            letter.subscription is None and letter.relation is None
        ):
            return Outcome(letter.id, "kept", error=letter.error)
        subscriptions = await self._subscriptions(letter)
        if letter.subscription is not None and not subscriptions:
            return Outcome(
                letter.id, "kept", error=f"subscription {letter.subscription} does not exist"
            )
        routed = route_again(letter, subscriptions)
        if routed.dead_letters and letter.subscription is not None:
            return Outcome(letter.id, "kept", error=routed.dead_letters[0].error)
        if refusal := await self._store(letter, routed):
            return Outcome(letter.id, "kept", error=refusal)
        heads = {spec.head for spec in routed.specs}
        self._queues |= {s.queue for s in subscriptions if s.head in heads}
        wanted = routed.specs or routed.waits or routed.dead_letters
        return Outcome(letter.id, "routed" if wanted else "unwanted", jobs=len(routed.specs))

    async def _store(self, letter: Letter, routed: Routed) -> str | None:
        """Write jobs, word for those who wait, new letters; say why not, if a job is refused."""
        connection = self._connection
        try:
            async with connection.transaction():
                if routed.specs:
                    await copy_jobs(connection, routed.specs, letter.now_us)
                if routed.waits:
                    self._waiting |= await leave_word(connection, routed.waits)
                if routed.dead_letters:
                    await insert_dead_letters(
                        connection, self._slot, letter.generation, routed.dead_letters
                    )
        except psycopg.Error as error:
            if not is_refusal(error):
                raise
            return describe_refusal(error)
        return None

    async def _subscriptions(self, letter: Letter) -> list[Subscription]:
        """Return for whom to route it: its subscription, or else all that routed at its commit."""
        of_one = letter.subscription is not None
        cursor = await self._connection.execute(
            operator_queries.SUBSCRIPTION_OF_LETTER
            if of_one
            else operator_queries.SUBSCRIPTIONS_AT,
            {
                "slot": self._slot,
                "commit_lsn": str(letter.commit_lsn),
                "subscription": letter.subscription,
            },
        )
        found = [Subscription.from_row(row) for row in await cursor.fetchall()]
        wanted = EventFilter if letter.is_event else ChangeFilter
        return [s for s in found if letter.is_refused_job or isinstance(s.filter, wanted)]


@asynccontextmanager
async def _queue(settings: Settings) -> AsyncIterator[Connection]:
    connection = await connect_queue(settings.queue_conninfo, application_name=_NAME)
    with queue_errors():
        async with connection:
            yield connection


async def _all_ids(connection: Connection, slot: str) -> list[int]:
    cursor = await connection.execute(operator_queries.DEAD_LETTER_IDS, {"slot": slot})
    return [row["id"] for row in await cursor.fetchall()]


async def _read(
    connection: Connection, query: queries.Statement, slot: str, letter_id: int
) -> Letter | None:
    cursor = await connection.execute(query, {"slot": slot, "id": letter_id})
    row = await cursor.fetchone()
    return None if row is None else Letter(**{**row, "commit_lsn": Lsn.parse(row["commit_lsn"])})


def _contents(letter: Letter) -> dict[str, Any]:
    """Return a letter's row by column, as text; whatever is no UTF-8 is spelled in escapes."""
    if letter.is_refused_job:
        return {"payload": letter.raw.decode(errors="backslashreplace")}
    try:
        change, names = decode(letter.raw), read_shape(letter.relation or {}).column_names
    except CdcError:
        return {}
    rows: dict[str, Any] = {"op": type(change).__name__.lower()}
    if isinstance(change, Insert | Update):
        rows["new"] = _texts(names, change.new)
    if isinstance(change, Update | Delete) and change.old is not None:
        rows["old"] = _texts(names, change.old)
    return rows


def _texts(names: Sequence[str], row: Row) -> dict[str, str | None]:
    return {
        name: None if value is None else value.decode(errors="backslashreplace")
        for name, value in zip(names, row, strict=False)
        if value is not UNCHANGED
    }

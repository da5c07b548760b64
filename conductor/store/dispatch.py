"""Emitted events on their way to their subscribers: one method per named query."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from psycopg import AsyncConnection
from psycopg.rows import class_row, dict_row, scalar_row

from conductor import sql
from conductor.matching import Subscription

_QUERIES: Final = sql.load("dispatch")
_log = logging.getLogger("conductor.dispatcher")
_unreadable: Final[set[int]] = set()  # subscriptions that have been logged


class Position(NamedTuple):
    """A place in the ready index, before or at a job."""

    rank: int
    run_at: datetime
    id: int


START: Final = Position(-32768, datetime(1, 1, 1, tzinfo=UTC), 0)
"""Before every job."""


@dataclass(slots=True)
class Dispatch:
    """One emitted event. ``payload`` is the envelope as JSON text, the subscribers' job payload.

    ``emitted_by``: the transaction that emitted it; None when that is not known.
    """

    id: int
    rank: int
    run_at: datetime
    created_at: datetime
    payload: str
    metadata: str | None
    emitted_by: str | None = None

    @property
    def position(self) -> Position:
        """Where the job stood."""
        return Position(self.rank, self.run_at, self.id)


@dataclass(frozen=True, slots=True)
class Subscriptions:
    """Live subscriptions, and how many of each event cannot be read."""

    read: list[Subscription]
    unreadable: Counter[str]


class DispatchStore:
    """The dispatcher's queries on one connection."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def take_dispatches(self, after: Position, batch: int) -> list[Dispatch]:
        """Take at most ``batch`` dispatch jobs behind a position, in order."""
        cursor = self._connection.cursor(row_factory=class_row(Dispatch))
        values = {**after._asdict(), "batch": batch}
        await cursor.execute(_QUERIES["take_dispatches"], values)
        return sorted(await cursor.fetchall(), key=lambda taken: taken.position)

    async def subscriptions_of(self, events: Collection[str]) -> Subscriptions:
        """Return the live subscriptions of these events."""
        cursor = self._connection.cursor(row_factory=dict_row)
        await cursor.execute(_QUERIES["subscriptions_of"], {"events": list(events)})
        return read_subscriptions(await cursor.fetchall())

    async def add_event_jobs(self, jobs: Sequence[tuple[Subscription, Dispatch]]) -> None:
        """Insert one ready job for each pair, in order."""
        values = {
            "subscriptions": [subscription.id for subscription, _ in jobs],
            "payloads": [dispatch.payload for _, dispatch in jobs],
            "metadata": [dispatch.metadata for _, dispatch in jobs],
        }
        await self._connection.execute(_QUERIES["add_event_jobs"], values)

    async def fail_event_jobs(self, failed: Sequence[tuple[Subscription, Dispatch, str]]) -> None:
        """Keep the jobs of pairs whose filter failed in history, each with the reason."""
        values = {
            "subscriptions": [subscription.id for subscription, _, _ in failed],
            "payloads": [dispatch.payload for _, dispatch, _ in failed],
            "metadata": [dispatch.metadata for _, dispatch, _ in failed],
            "reasons": [reason for _, _, reason in failed],
        }
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["fail_event_jobs"], values)
        await cursor.execute(_QUERIES["drop_failed_jobs"], {"ids": await cursor.fetchall()})

    async def refuse_dispatches(self, refused: Sequence[tuple[Dispatch, str]]) -> None:
        """Keep dispatch jobs that cannot be read in history, each with the reason."""
        values = {
            "ids": [dispatch.id for dispatch, _ in refused],
            "ranks": [dispatch.rank for dispatch, _ in refused],
            "run_ats": [dispatch.run_at for dispatch, _ in refused],
            "created_ats": [dispatch.created_at for dispatch, _ in refused],
            "payloads": [dispatch.payload for dispatch, _ in refused],
            "metadata": [dispatch.metadata for dispatch, _ in refused],
            "reasons": [reason for _, reason in refused],
        }
        await self._connection.execute(_QUERIES["refuse_dispatches"], values)


def read_subscriptions(rows: Sequence[dict[str, Any]]) -> Subscriptions:
    """Read subscriptions; one that cannot be read is logged once, and stops no other."""
    found = Subscriptions([], Counter())
    for row in rows:
        try:
            found.read.append(Subscription.from_row(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            found.unreadable[row["event"]] += 1
            if row["id"] not in _unreadable:
                _unreadable.add(row["id"])
                what = f"{type(error).__name__}: {error}"
                _log.error("subscription %s cannot be read, and gets no jobs: %s", row["id"], what)
    return found

"""The subscriptions that a slot routes, and their stamps: as the queue database has them.

Read again only when something about them has changed. This module must not bring any of them
forward: `activation` does.
"""

from dataclasses import dataclass
from typing import Any

import structlog

from cdc import gap_queries, queries
from cdc.catalog import TableName
from cdc.connection import Connection, queue_errors
from cdc.errors import TableMissing
from cdc.lsn import Lsn
from cdc.wanted import EVERY_PUBLICATION, Past, Wanted
from conductor.matching import ChangeFilter, Subscription


@dataclass(frozen=True, slots=True)
class Entry:
    """A subscription, whether it is meant to go on, and its stamps for our slot."""

    subscription: Subscription
    retired: bool
    start_lsn: int | None
    end_lsn: int | None

    @property
    def is_change(self) -> bool:
        """Whether it is about the changes of a table, rather than emitted events."""
        return isinstance(self.subscription.filter, ChangeFilter)

    @property
    def wanted(self) -> Wanted:
        """What the publication must carry for it: for one about changes only."""
        started = self.start_lsn is not None
        return Wanted(self.subscription, started=started, retired=self.retired)

    @property
    def place(self) -> tuple[str, str, str]:
        """The trigger it stands for: another definition of it takes its place."""
        return self.subscription.app, self.subscription.task, self.subscription.trigger

    @property
    def routes(self) -> bool:
        """Whether it has begun and not ended."""
        return self.start_lsn is not None and self.end_lsn is None


class SubscriptionBook:
    """The subscriptions that a slot routes, as the queue database has them.

    Those about changes of the source, and once `route_emits` is called those about events as well:
    any slot that sees an event emitted may have to route it. `revision` rises whenever the entries
    change.
    """

    def __init__(self, queue: Connection, *, slot: str, source: str) -> None:
        self._queue = queue
        self._parameters: dict[str, Any] = {"slot": slot, "source": source, "emits": False}
        self._read_revision = ""
        self._known: dict[tuple[int, str | None], Subscription | None] = {}
        self._log = structlog.get_logger("cdc")
        self.entries: list[Entry] = []
        self.past = Past()
        self.revision = 0

    @property
    def changes(self) -> list[Entry]:
        """The entries about changes of tables."""
        return [entry for entry in self.entries if entry.is_change]

    def route_emits(self) -> None:
        """Take in the subscriptions about events, with the next refresh."""
        self._parameters["emits"] = True

    @property
    def stamped(self) -> list[tuple[Subscription, int | None, int | None]]:
        """Every subscription that can still match, with its start and end stamp."""
        return [(e.subscription, e.start_lsn, e.end_lsn) for e in self.entries]

    def task_of(self, head: bytes) -> str | None:
        """Return the task whose jobs carry this head."""
        return next(
            (e.subscription.task for e in self.entries if e.subscription.head == head), None
        )

    async def refresh(self) -> None:
        """Read them again, if anything about them has changed."""
        with queue_errors():
            cursor = await self._queue.execute(queries.SUBSCRIPTIONS_REVISION, self._parameters)
            row = await cursor.fetchone()
            revision = f"{row['revision'] if row else ''} {self._parameters['emits']}"
            if revision == self._read_revision:
                return
            cursor = await self._queue.execute(queries.SUBSCRIPTIONS, self._parameters)
            rows = await cursor.fetchall()
            memberships = await self._tables(queries.MEMBERSHIPS)
            cursor = await self._queue.execute(queries.CARRIED, self._parameters)
            carried = await cursor.fetchone()
            self.past = Past(
                named=set(await self._tables(queries.NAMED_TABLES)),
                interrupted=set(await self._tables(gap_queries.INTERRUPTED_TABLES)),
                memberships={
                    table: row["membership"]
                    for table, row in memberships.items()
                    if not row["is_insert_only"]
                },
                insert_memberships={
                    table: row["membership"]
                    for table, row in memberships.items()
                    if row["is_insert_only"]
                },
                applied={
                    table: (row["membership"], row["condition"])
                    for table, row in (await self._tables(queries.APPLIED)).items()
                },
                # a slot that is to be made will be younger than the publication
                carried=EVERY_PUBLICATION if carried is None else carried["oid"],
            )
        self.entries = [entry for row in rows if (entry := self._entry(row)) is not None]
        self._read_revision = revision
        self.revision += 1

    async def _tables(self, query: queries.Statement) -> dict[TableName, dict[str, Any]]:
        cursor = await self._queue.execute(
            query, {**self._parameters, "condition": TableMissing.condition}
        )
        return {(row["schema"], row["name"]): row for row in await cursor.fetchall()}

    def _entry(self, row: dict[str, Any]) -> Entry | None:
        key = row["id"], row["version"]  # all else of a subscription never changes
        if key not in self._known:
            self._known[key] = self._read(row)
        subscription = self._known[key]
        if subscription is None:
            return None
        return Entry(subscription, row["retired"], _lsn(row["start_lsn"]), _lsn(row["end_lsn"]))

    def _read(self, row: dict[str, Any]) -> Subscription | None:
        """Read a definition. One that cannot be read (of a newer version?) stops no other."""
        try:
            return Subscription.from_row(row)
        except (KeyError, TypeError, ValueError) as error:
            self._log.error(
                "subscription_unreadable",
                subscription=row["id"],
                task=row["task"],
                error=f"{type(error).__name__}: {error}",
            )
            return None


def _lsn(text: str | None) -> int | None:
    return None if text is None else Lsn.parse(text)

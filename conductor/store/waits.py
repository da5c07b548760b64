"""Steps that wait for messages, and telling them: one method per named query."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg.rows import class_row, scalar_row

from conductor import sql

_QUERIES: Final = sql.load("waits")


@dataclass(frozen=True, slots=True)
class Probe:
    """A message by some of its fields. ``place`` is the caller's number of the message."""

    topic: str
    fields: str
    matched: str
    emitted_by: str
    place: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A step that waits for the message at ``place``, if its condition (JSON) holds."""

    place: int
    job: int
    name: str
    condition: str | None


@dataclass(frozen=True, slots=True)
class Wakeup:
    """What has come for a step: its outcome and result (JSON).

    For one that is completed ``result`` is the event's envelope, and the result the payload in it.
    """

    job: int
    step: str
    outcome: str
    result: str


class WaitStore:
    """The queries about waiting steps on one connection."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def wait_fields(self, topics: Collection[str]) -> list[tuple[str, str]]:
        """Return (topic, fields) by which jobs wait for these topics."""
        values = {"topics": list(topics)}
        cursor = await self._connection.execute(_QUERIES["wait_fields"], values)
        return [(topic, fields) for topic, fields in await cursor.fetchall()]

    async def waiting_for(self, probes: Sequence[Probe]) -> list[Waiting]:
        """Return the steps that wait for these messages."""
        cursor = self._connection.cursor(row_factory=class_row(Waiting))
        values = {
            "topics": [probe.topic for probe in probes],
            "fields": [probe.fields for probe in probes],
            "matched": [probe.matched for probe in probes],
            "emitted_by": [probe.emitted_by for probe in probes],
            "places": [probe.place for probe in probes],
        }
        await cursor.execute(_QUERIES["waiting_for"], values)
        return await cursor.fetchall()

    async def add_wakeups(self, wakeups: Sequence[Wakeup]) -> None:
        """Leave word for steps; `wake` brings it to their jobs."""
        values = {
            "jobs": [wakeup.job for wakeup in wakeups],
            "steps": [wakeup.step for wakeup in wakeups],
            "outcomes": [wakeup.outcome for wakeup in wakeups],
            "results": [wakeup.result for wakeup in wakeups],
        }
        await self._connection.execute(_QUERIES["add_wakeups"], values)

    async def wake(self, jobs: Collection[int]) -> set[str]:
        """Bring jobs what has come for them; return the queues of those that it wakes."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["wake_jobs"], {"jobs": list(jobs)})
        return set(await cursor.fetchall())

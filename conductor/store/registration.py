"""What an application registers, read and written: one method per named query.

Every method runs on the connection it was given, in the transaction that is open there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg.rows import args_row, class_row, dict_row, scalar_row
from psycopg.types.json import Json

from conductor import sql
from conductor.catalog import Part, TableFacts

_QUERIES: Final = sql.load("registration")


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A task as ``conductor.tasks`` keeps it."""

    name: str
    queue: str
    max_attempts: int
    retention_s: float
    payload_schema: dict[str, Any] | None
    returns_schema: dict[str, Any] | None
    ordered: bool = False
    on_failure: str = "continue"


@dataclass(frozen=True, slots=True)
class EventRow:
    """An event as ``conductor.events`` keeps it."""

    name: str
    payload_schema: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """A schedule as ``conductor.schedules`` keeps it."""

    task: str
    name: str
    queue: str
    rank: int
    expression: str
    timezone: str
    next_at: str  # ISO 8601


@dataclass(frozen=True, slots=True)
class SubscriptionRow:
    """A subscription as ``conductor.subscriptions`` keeps it."""

    task: str
    trigger: str
    kind: str
    source: str
    queue: str
    rank: int
    definition: dict[str, Any]

    @property
    def trigger_of(self) -> tuple[str, str]:
        """The (task, trigger) pair of which one row is alive at a time."""
        return self.task, self.trigger


@dataclass(frozen=True, slots=True)
class Uncaptured:
    """A change subscription that ``slot`` (None: no slot of its source) does not route yet.

    ``led``: somebody streams from the slot now; ``seen_at``: when its progress was last written.
    """

    id: int
    task: str
    source: str
    schema: str
    table: str
    slot: str | None
    seen_at: datetime | None
    led: bool


class RegistrationStore:
    """The registration queries on one connection."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def lock_app(self, app: str) -> None:
        """Wait until no other process registers this application; held until the commit."""
        await self._connection.execute(_QUERIES["lock_app"], {"app": app})

    async def current_instant(self) -> datetime:
        """Return the database's time."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["current_instant"])
        instant: datetime | None = await cursor.fetchone()
        assert instant is not None  # noqa: S101 - one row always
        return instant

    async def add_queues(self, names: Iterable[str]) -> None:
        """Make queues known; those that are stay as they are."""
        await self._connection.execute(_QUERIES["add_queues"], {"names": list(names)})

    async def put_tasks(self, app: str, version: str | None, rows: Sequence[TaskRow]) -> None:
        """Insert or replace tasks: they are now what was registered last."""
        await self._put("put_tasks", rows, app=app, version=version)

    async def open_lanes(self, rows: Sequence[TaskRow]) -> None:
        """Let the jobs go that stand in lanes of tasks which are not ordered."""
        values = {"queues": [row.queue for row in rows], "tasks": [row.name for row in rows]}
        await self._connection.execute(_QUERIES["open_lanes"], values)

    async def put_events(self, app: str, rows: Sequence[EventRow]) -> None:
        """Insert or replace events."""
        await self._put("put_events", rows, app=app)

    async def drop_schedules(
        self, app: str, tasks: Sequence[str], kept: Sequence[ScheduleRow]
    ) -> None:
        """Delete the schedules of ``tasks`` that are not among ``kept``."""
        await self._put("drop_schedules", kept, app=app, tasks=list(tasks))

    async def put_schedules(
        self, app: str, version: str | None, rows: Sequence[ScheduleRow]
    ) -> None:
        """Insert or replace schedules; an unchanged one keeps its next instant."""
        await self._put("put_schedules", rows, app=app, version=version)

    async def live_subscriptions(
        self, app: str, tasks: Sequence[str]
    ) -> list[tuple[int, SubscriptionRow]]:
        """Return the subscriptions of ``tasks`` that are not retired, by id, and lock them."""
        cursor = self._connection.cursor(row_factory=args_row(_numbered_subscription))
        await cursor.execute(_QUERIES["live_subscriptions"], {"app": app, "tasks": list(tasks)})
        return await cursor.fetchall()

    async def retire_subscriptions(self, ids: Sequence[int], version: str | None) -> None:
        """Ask for subscriptions to end; the router stamps when they do.

        Those that jobs are woken by end when no other version and no job needs them.
        """
        values = {"ids": list(ids), "version": version}
        await self._connection.execute(_QUERIES["retire_subscriptions"], values)

    async def keep_subscriptions(self, ids: Sequence[int], version: str | None) -> None:
        """Note that this version now routes subscriptions whose definitions did not change."""
        values = {"ids": list(ids), "version": version}
        await self._connection.execute(_QUERIES["keep_subscriptions"], values)

    async def add_subscriptions(
        self, app: str, version: str | None, rows: Sequence[SubscriptionRow]
    ) -> list[int]:
        """Insert subscriptions and return their ids."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        values = {"app": app, "version": version, "rows": _json(rows)}
        await cursor.execute(_QUERIES["add_subscriptions"], values)
        return await cursor.fetchall()

    async def notify_subscriptions(self, app: str) -> None:
        """Tell the routers, after the commit, that there is something to activate or retire."""
        await self._connection.execute(_QUERIES["notify_subscriptions"], {"app": app})

    async def uncaptured(self, ids: Sequence[int]) -> list[Uncaptured]:
        """Return which of these subscriptions a slot of their source does not route yet."""
        cursor = self._connection.cursor(row_factory=class_row(Uncaptured))
        await cursor.execute(_QUERIES["uncaptured"], {"ids": list(ids)})
        return await cursor.fetchall()

    async def mark_seen(self) -> None:
        """Note which tasks a live worker offers."""
        await self._connection.execute(_QUERIES["mark_seen"])

    async def abandoned_apps(self, grace_s: float) -> list[str]:
        """Return applications for which `retire_abandoned` has something to do."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["abandoned_apps"], {"grace_s": grace_s})
        return await cursor.fetchall()

    async def retire_abandoned(self, app: str, grace_s: float) -> list[str]:
        """Retire tasks that the newest version lacks and nobody has offered for ``grace_s``."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["retire_abandoned"], {"app": app, "grace_s": grace_s})
        return await cursor.fetchall()

    async def app_names(self) -> list[str]:
        """Return the applications that have tasks."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["app_names"])
        return await cursor.fetchall()

    async def retire_unawaited(self, app: str) -> int:
        """Retire what older versions' jobs were woken by, and none waits for; return how many."""
        cursor = await self._connection.execute(_QUERIES["retire_unawaited"], {"app": app})
        return cursor.rowcount

    async def source_is_elsewhere(self, source: str) -> bool:
        """Return whether a sidecar reads this source from another database than this one."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["source_is_elsewhere"], {"source": source})
        return bool(await cursor.fetchone())

    async def describe_tables(
        self, tables: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], TableFacts]:
        """Return what the catalog says of those (schema, name) that exist."""
        values = {"schemas": [s for s, _ in tables], "names": [n for _, n in tables]}
        cursor = self._connection.cursor(row_factory=dict_row)
        await cursor.execute(_QUERIES["describe_tables"], values)
        facts: dict[tuple[str, str], TableFacts] = {}
        async for row in cursor:
            part = Part(row["quoted"], row["identity"], row["has_key"], tuple(row["key"]))
            name = row["schema"], row["name"]
            if row["asked"]:
                facts[name] = TableFacts(
                    row["kind"],
                    row["persistence"],
                    tuple(row["columns"]),
                    (part,),
                    tuple(row["generated"]),
                    tuple(row["primary_key"]) or part.key,
                    dict(zip(row["columns"], row["types"], strict=True)),
                )
            else:
                facts[name] = replace(facts[name], parts=(*facts[name].parts, part))
        return facts

    async def table_keys(self) -> list[tuple[str, str]]:
        """Return schema and name of every table of the application."""
        cursor = await self._connection.execute(_QUERIES["table_keys"])
        return await cursor.fetchall()

    async def other_relations(self) -> list[tuple[str, str]]:
        """Return schema and name of what has columns and no changes: views, composite types."""
        cursor = await self._connection.execute(_QUERIES["other_relations"])
        return await cursor.fetchall()

    async def table_names(self) -> list[str]:
        """Return every ``schema.table`` of the application, for the nearest name."""
        cursor = self._connection.cursor(row_factory=scalar_row)
        await cursor.execute(_QUERIES["table_names"])
        return await cursor.fetchall()

    async def _put(self, query: str, rows: Sequence[Any], **values: Any) -> None:
        await self._connection.execute(_QUERIES[query], {**values, "rows": _json(rows)})


def _json(rows: Sequence[Any]) -> Json:
    return Json([asdict(row) for row in rows])


def _numbered_subscription(number: int, *values: Any) -> tuple[int, SubscriptionRow]:
    return number, SubscriptionRow(*values)

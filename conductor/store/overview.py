"""Everything that somebody who watches a queue wants to see at once, in one bounded read."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

from psycopg import AsyncConnection
from psycopg.rows import dict_row

from conductor import sql

_QUERIES: Final = sql.load("overview")
_STATES: Final = ("running", "retrying", "scheduled", "waiting", "parked", "suspect")

Row = dict[str, Any]

COUNTED_AT_MOST: Final = 1001
"""A count that shows this says: more than a thousand."""

SHOWN_AT_MOST: Final = 200
"""Tasks, queues, workers, slots: of each the first so many."""

TIMEOUT_S: Final = 5.0


async def read_overview(connection: AsyncConnection[Any]) -> Row:
    """Return queues, tasks, workers and the router's slots, in JSON's types.

    Ages are in seconds, ``at`` is Unix time; None is what is not known or not there. One
    transaction; a statement that takes longer than `TIMEOUT_S` is ended (psycopg's QueryCanceled).
    """
    limits = dict.fromkeys(("tasks", "queues", "workers", "slots"), SHOWN_AT_MOST)
    values = {**limits, "bound": COUNTED_AT_MOST, "timeout_s": TIMEOUT_S}
    cursor = connection.cursor(row_factory=dict_row)

    async def read(query: str) -> list[Row]:
        await cursor.execute(_QUERIES[query], values)
        return await cursor.fetchall()

    async with connection.transaction():
        (limited,) = await read("limit_reading")
        tasks = _with_states(await read("task_rows"), await read("task_states"))
        return {
            "at": limited["at"],
            "queues": _summed(await read("queue_rows"), tasks),
            "tasks": tasks,
            "workers": await read("worker_rows"),
            "slots": await read("slot_rows"),
        }


def _with_states(tasks: list[Row], states: list[Row]) -> list[Row]:
    """Return tasks with what of theirs is in which state; unregistered ones with jobs as well."""
    counts: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    due: dict[tuple[str, str], float] = {}
    for row in states:
        name = row["queue"], row["task"]
        counts[name][row["what"]] = row["jobs"]
        if row["due_s"] is not None:
            due[name] = max(row["due_s"], due.get(name, 0.0))
    known = {(row["queue"], row["task"]) for row in tasks}
    others = [
        {"queue": queue, "task": task, "ready": None, "oldest_ready_s": None}
        for queue, task in sorted(counts.keys() - known)[:SHOWN_AT_MOST]
    ]
    names = [(row, (row["queue"], row["task"])) for row in (*tasks, *others)]
    return [_with_counts(row, counts[name], due.get(name)) for row, name in names]


def _with_counts(task: Row, counts: dict[str, int], due_s: float | None) -> Row:
    states = {state: counts.get(state, 0) for state in _STATES}
    ages = [age for age in (task["oldest_ready_s"], due_s) if age is not None]
    oldest = {"oldest_ready_s": max(ages, default=None)}
    return {**task, **oldest, **states, "failed_per_minute": counts.get("failed", 0)}


def _summed(queues: list[Row], tasks: list[Row]) -> list[Row]:
    """Return queues with the sums of their tasks; sums of bounded counts, so bounds as well."""
    names = ("ready", *_STATES, "failed_per_minute")
    found = []
    for queue in queues:
        own = [task for task in tasks if task["queue"] == queue["queue"]]
        sums = {name: sum(task[name] or 0 for task in own) for name in names}
        ages = [age for task in own if (age := task["oldest_ready_s"]) is not None]
        found.append({**queue, **sums, "oldest_ready_s": max(ages, default=None)})
    return found

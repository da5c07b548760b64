"""Word for jobs that wait: changes and emitted events that have come for their steps.

Runs in the sink's transaction, after the batch was received, and only inserts (router-rules 28):
no job's row is locked. What matches is `conductor.matching`'s to say.
"""

from collections.abc import Sequence
from typing import Any, Final

import orjson
import psycopg
from psycopg.rows import dict_row, tuple_row

from cdc import emission_queries
from cdc.emission import Emission
from cdc.lsn import Lsn
from conductor.contract import JobSpec
from conductor.matching import end_wait, matched_values

Wait = tuple[str, JobSpec]
"""A topic, and what has come for those who wait for it."""

_CHANGE_COLUMNS: Final = ("topics", "fields", "matched", "lsns", "payloads")
_EVENT_COLUMNS: Final = ("topics", "fields", "matched", "xids", "places")
_WORD_COLUMNS: Final = ("jobs", "steps", "outcomes", "results")


async def leave_word(connection: psycopg.AsyncConnection[Any], waits: Sequence[Wait]) -> set[int]:
    """Tell who waits for these; return the jobs that are to be woken after the commit."""
    cursor = connection.cursor(row_factory=tuple_row)
    topics = sorted({topic for topic, _ in waits})
    await cursor.execute(emission_queries.WAIT_FIELDS, {"topics": topics})
    known = [(str(topic), str(fields)) for topic, fields in await cursor.fetchall()]
    if not known:
        return set()
    changes = [(topic, spec) for topic, spec in waits if not isinstance(spec, Emission)]
    events = [(topic, spec) for topic, spec in waits if isinstance(spec, Emission)]
    told = await _tell_of_changes(connection, changes, known) if changes else set()
    return told | (await _tell_of_events(connection, events, known) if events else set())


async def _tell_of_changes(
    connection: psycopg.AsyncConnection[Any],
    waits: Sequence[Wait],
    known: Sequence[tuple[str, str]],
) -> set[int]:
    probes = [
        (topic, fields, matched, str(Lsn(int.from_bytes(spec.position[-8:], "big"))), payload)
        for topic, spec in waits
        for of, fields in known
        if of == topic
        and (matched := matched_values(fields, _row_of(spec.payload))) is not None
        and (payload := spec.payload.decode())
    ]
    if not probes:
        return set()
    cursor = connection.cursor(row_factory=tuple_row)
    await cursor.execute(emission_queries.ADD_WAKEUPS, _by_column(_CHANGE_COLUMNS, probes))
    return {int(str(job)) for (job,) in await cursor.fetchall()}


async def _tell_of_events(
    connection: psycopg.AsyncConnection[Any],
    waits: Sequence[tuple[str, Emission]],
    known: Sequence[tuple[str, str]],
) -> set[int]:
    probes = [
        (topic, fields, matched, emission.emitted_by, place)
        for place, (topic, emission) in enumerate(waits)
        for of, fields in known
        if of == topic and (matched := matched_values(fields, emission.value)) is not None
    ]
    if not probes:
        return set()
    cursor = connection.cursor(row_factory=dict_row)
    await cursor.execute(emission_queries.EVENT_WAITS, _by_column(_EVENT_COLUMNS, probes))
    words = [
        (row["job"], row["name"], *ending)
        for row in await cursor.fetchall()
        if (ending := _ending(row["condition"], waits[row["place"]][1])) is not None
    ]
    if words:
        values = _by_column(_WORD_COLUMNS, words)
        await connection.execute(emission_queries.ADD_EVENT_WAKEUPS, values)
    return {int(job) for job, *_ in words}


def _ending(condition: str | None, emission: Emission) -> tuple[str, str] | None:
    return end_wait(condition, emission.value, emission.payload.decode())


def _by_column(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    columns = [list(column) for column in zip(*rows, strict=True)]
    return dict(zip(names, columns, strict=True))


def _row_of(payload: bytes) -> Any:
    """Return the row of a change's payload: the new one, or else the old; None: it has none."""
    try:
        change = orjson.loads(payload)
    except orjson.JSONDecodeError:  # json takes what is no text: "\\ud800"
        return None
    return change.get("new") or change.get("old")

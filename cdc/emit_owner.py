"""Which slot routes what is emitted through the WAL of a database.

Every slot of a database sees every logical message, so one of them owns our prefix: the first that
comes, until it is dropped. Only where `conductor.emit_wal` is installed can anything be emitted:
in the queue's own database by `conductor migrate`, in another one by its owner. This module must
not decide what becomes of an event.
"""

from typing import Any, Final

import psycopg
import structlog

from cdc import emission_queries
from cdc.connection import Connection, one_line, queue_errors, source_error

_HINT: Final = "let the owner of schema conductor grant it insert, update and select on that table"

_log: Any = structlog.get_logger("cdc")


async def claim_emits(source: Connection, queue: Connection, slot: str) -> str | None:
    """Own the prefix for this slot, if nobody does; return what its messages carry, or None.

    The queue database is told, for those who want to know which slot routes events.

    Args:
        source: an ordinary connection to the source database.
        queue: one to the queue database.
        slot: ours; it must exist.

    Raises:
        SourceUnavailable, QueueUnavailable: a connection was lost.
    """
    secret = await _claim(source, slot)
    with queue_errors():
        parameters = {"slot": slot, "emits": secret is not None}
        await queue.execute(emission_queries.NOTE_EMITS, parameters)
    return secret


async def _claim(source: Connection, slot: str) -> str | None:
    try:
        cursor = await source.execute(emission_queries.EMITS_INSTALLED)
        row = await cursor.fetchone()
        if row is None or not row["installed"]:
            return None
        await source.execute(emission_queries.CLAIM_EMITS, {"slot": slot})
        cursor = await source.execute(emission_queries.EMIT_SECRET, {"slot": slot})
        row = await cursor.fetchone()
    except psycopg.errors.InsufficientPrivilege as error:
        _log.warning("emits_not_routed", slot=slot, error=one_line(error), hint=_HINT)
        return None
    except psycopg.Error as error:
        raise source_error(error) from error
    return None if row is None else str(row["secret"])

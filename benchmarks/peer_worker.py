"""PgQueuer's worker for the comparison, as a process: `python -m benchmarks.peer_worker DSN`.

The same payload, validated the same way, and a handler that does nothing. Jobs are claimed and
logged in batches over a pool of asyncpg connections, as PgQueuer's own benchmark does. It ends when
its queue is empty. With `--enqueue N` it installs its tables and puts jobs in instead.
"""

import argparse
import logging
from importlib import import_module
from typing import Any, Final

from pydantic import BaseModel

# By name, and so untyped: the environment that checks types does not have them.
asyncpg: Any = import_module("asyncpg")
uvloop: Any = import_module("uvloop")
pgqueuer: Any = import_module("pgqueuer")
queries_of: Any = import_module("pgqueuer.queries").Queries
execution: Any = import_module("pgqueuer.types").QueueExecutionMode

BATCH: Final = 500
NAME: Final = "noop"


class Registration(BaseModel):
    """The payload of a no-op job (`benchmarks.tasks` has ours)."""

    user_id: int
    email: str


async def work(dsn: str) -> None:
    """Run every job that there is."""
    async with asyncpg.create_pool(dsn, min_size=2, max_size=4) as pool:
        peer = pgqueuer.PgQueuer.from_asyncpg_pool(pool)

        async def noop(job: Any) -> None:
            Registration.model_validate_json(job.payload)

        peer.entrypoint(NAME)(noop)
        await peer.qm.run(batch_size=BATCH, mode=execution.drain)


async def enqueue(dsn: str, count: int) -> None:
    """Make empty tables and put so many jobs in."""
    async with asyncpg.create_pool(dsn, min_size=1, max_size=2) as pool:
        queries = queries_of.from_asyncpg_pool(pool)
        if await queries.has_table(queries.qbe.settings.queue_table):
            await queries.uninstall()
        await queries.install()
        for first in range(0, count, 1_000):
            numbers = range(first, min(first + 1_000, count))
            payloads = [
                Registration(user_id=n, email=f"user{n}@example.com").model_dump_json().encode()
                for n in numbers
            ]
            await queries.enqueue([NAME] * len(payloads), payloads, [0] * len(payloads))


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_worker")
    parser.add_argument("dsn")
    parser.add_argument("--enqueue", type=int)
    options = parser.parse_args()
    logging.getLogger("pgqueuer").setLevel(logging.ERROR)
    if options.enqueue is None:
        uvloop.run(work(options.dsn))
    else:
        uvloop.run(enqueue(options.dsn, options.enqueue))


if __name__ == "__main__":
    main()

"""Asks the oracle: which jobs should there be, which are there, and do they say what happened.

The comparison itself is SQL (`oracle.sql`); this applies it and reads the verdict. Queue and source
are one database here.
"""

from dataclasses import astuple, dataclass
from importlib.resources import files

import psycopg
from psycopg.rows import class_row

from examples.shop.statements import STATEMENTS


@dataclass(frozen=True)
class Verdict:
    """Numbers of changes and jobs. All but the first three and the last should be 0.

    `wrong` jobs carry another content than their change; `misframed` positions hold not exactly one
    transaction; `misordered` jobs do not follow the writes of their row; `unhandled` jobs have not
    ended well; `stray` ledger rows belong to no job. `redelivered` counts reruns of handlers, which
    a crash of a worker may cause.
    """

    changes: int
    jobs: int
    handled: int
    lost: int
    duplicated: int
    wrong: int
    misframed: int
    misordered: int
    unhandled: int
    stray: int
    redelivered: int

    @property
    def faults(self) -> int:
        """How much is not as it should be."""
        return sum(astuple(self)[3:-1])

    @property
    def summary(self) -> str:
        """One line. Jobs of wrong content or place count as lost, and so do unhandled ones."""
        lost = self.lost + self.wrong + self.misframed + self.misordered + self.unhandled
        return (
            f"{self.changes} changes committed, {self.jobs} jobs enqueued, {self.handled} handled, "
            f"{lost} lost, {self.duplicated + self.stray} duplicated"
        )


def create_shop(dsn: str) -> None:
    """Create the shop's tables and the oracle in a database that has been migrated."""
    folder = files("examples.shop")
    with psycopg.connect(dsn) as connection:
        connection.execute(folder.joinpath("schema.sql").read_bytes())
        connection.execute(folder.joinpath("oracle.sql").read_bytes())


def judge(connection: psycopg.Connection) -> Verdict:
    """Compare what is committed with what is in the queue, job by job.

    Afterwards `oracle.lost`, `oracle.duplicated` and `oracle.wrong` list what is amiss.
    """
    for name in ("analyze_record", "refresh_expected", "refresh_delivered", "analyze_views"):
        connection.execute(STATEMENTS[name])
    with connection.cursor(row_factory=class_row(Verdict)) as cursor:
        verdict = cursor.execute(STATEMENTS["read_verdict"]).fetchone()
    if verdict is None:
        raise LookupError("the oracle has no verdict")
    return verdict


def judge_database(dsn: str) -> Verdict:
    """Connect and `judge` what one snapshot shows: schedules go on firing meanwhile."""
    with psycopg.connect(dsn, options="-c work_mem=64MB") as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        return judge(connection)

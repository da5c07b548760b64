from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from conductor.enqueue import JobOutcome
from conductor.errors import (
    ConductorError,
    DatabaseUnavailable,
    JobCancelled,
    JobFailed,
    MigrationMismatch,
    ResultGone,
)
from conductor.results import ResultPoller

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conductor.results.FIRST_INTERVAL_S", 0.001)


class Database:
    """Answers with scripted outcomes, one list a look, the last for ever."""

    def __init__(self, *looks: list[JobOutcome] | Exception) -> None:
        self.looks = list(looks)
        self.asked: list[set[int]] = []

    async def fetch(self, jobs: Sequence[int]) -> list[JobOutcome]:
        self.asked.append(set(jobs))
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, Exception):
            raise look
        return [outcome for outcome in look if outcome.job in jobs]


def done(job: int, result: str | None = "1") -> JobOutcome:
    return JobOutcome(job, "completed", result, None)


async def wait(poller: ResultPoller, job: int, *, committed: bool = True) -> bytes | None:
    async with asyncio.timeout(10):
        return await poller.wait(job, committed=committed)


async def test_one_query_serves_everybody_who_waits() -> None:
    database = Database([done(1), done(2, None), done(3, '"x"')])
    poller = ResultPoller(database.fetch)
    results = await asyncio.gather(*(wait(poller, job) for job in (1, 2, 3, 3)))
    assert results == [b"1", None, b'"x"', b'"x"']
    assert database.asked == [{1, 2, 3}]


async def test_it_looks_again_until_a_job_has_ended() -> None:
    database = Database([], [], [done(1)])
    assert await wait(ResultPoller(database.fetch), 1) == b"1"
    assert len(database.asked) == 3


@pytest.mark.parametrize(
    ("outcome", "error", "message"),
    [
        (JobOutcome(1, "failed", None, '{"type": "E", "message": "m"}'), JobFailed, "job 1 failed"),
        (JobOutcome(1, "cancelled", None, '{"message": "why"}'), JobCancelled, "cancelled: why"),
        (JobOutcome(1, "cancelled", None, None), JobCancelled, "no reason"),
        (JobOutcome(1, None, None, None), ResultGone, "history is not kept"),
    ],
)
async def test_a_job_that_did_not_complete_raises(
    outcome: JobOutcome, error: type[ConductorError], message: str
) -> None:
    with pytest.raises(error, match=message):
        await wait(ResultPoller(Database([outcome]).fetch), 1)


async def test_a_job_not_committed_yet_may_be_unknown_for_a_while() -> None:
    database = Database([JobOutcome(1, None, None, None)], [done(1)])
    assert await wait(ResultPoller(database.fetch), 1, committed=False) == b"1"


async def test_an_unreachable_database_is_waited_for() -> None:
    database = Database(DatabaseUnavailable("gone"), [done(1)])
    assert await wait(ResultPoller(database.fetch), 1) == b"1"


@pytest.mark.parametrize("error", [MigrationMismatch("old"), RuntimeError("a bug")])
async def test_other_errors_end_every_wait(error: Exception) -> None:
    poller = ResultPoller(Database(error, [done(1), done(2)]).fetch)
    waits = [wait(poller, 1), wait(poller, 2)]
    assert [*await asyncio.gather(*waits, return_exceptions=True)] == [error, error]
    assert await wait(poller, 1) == b"1"


async def test_who_gives_up_is_not_asked_for_again() -> None:
    database = Database([])
    poller = ResultPoller(database.fetch)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await poller.wait(1, committed=True)
    database.looks = [[done(2)]]
    assert await wait(poller, 2) == b"1"
    assert database.asked[-1] == {2}


async def test_closing_cancels_waits() -> None:
    poller = ResultPoller(Database([]).fetch)
    waiting = asyncio.create_task(wait(poller, 1))
    await asyncio.sleep(0)
    await poller.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting

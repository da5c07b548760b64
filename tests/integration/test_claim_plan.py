"""The plans of the hot path: what the server may do is asserted, not what it cost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from json import loads
from typing import Any

import pytest
from psycopg import AsyncConnection

from conductor.sql import load
from conductor.store.arrays import JsonArray, TextArray, literal
from conductor.store.sessions import connect
from tests.integration.conftest import Queue

pytestmark = pytest.mark.anyio

JOBS = load("jobs")
STEP_QUERIES = load("steps")
WORKERS = load("workers")
COUNT = 500
IDS = literal(range(1, COUNT + 1))
ONES = literal([1] * COUNT)
NULLS = literal([None] * COUNT)
DOCUMENTS = JsonArray([None] * COUNT)
CLAIM = {
    "worker": 1,
    "queue": "q",
    "codes": "{}",
    "variants": '{"t": ["1"]}',
    "limit": COUNT,
    "look_back": "2 seconds",
    "tasks": TextArray(["t", "t", "t", "u"]),
    "ranks": literal([-32768, 0, 1, -32768]),
    "run_ats": literal(["-infinity", '"2026-01-01 00:00:00+00"', "-infinity", "-infinity"]),
    "ids": literal([0, 7, 0, 0]),
    "last_ranks": literal([-1, 0, 32767, 32767]),
}
FINISH = {
    "worker": 1,
    "ids": IDS,
    "fences": ONES,
    "retention": ONES,
    "documents": DOCUMENTS,
    "retentions": '{"7 days"}',
    "stepped": "{}",
    "outcome": "completed",
    "failures": 0,
}
RESCHEDULE = {
    "worker": 1,
    "ids": IDS,
    "fences": ONES,
    "failures": ONES,
    "delays": ONES,
    "wake_ats": NULLS,
    "errors": DOCUMENTS,
    "waits": literal(["false"] * COUNT),
}
STEPS = {
    "worker": 1,
    "jobs": IDS,
    "fences": ONES,
    "names": TextArray(["a"] * COUNT),
    "positions": ONES,
    "kinds": TextArray(["step"] * COUNT),
    "results": DOCUMENTS,
    "delays": NULLS,
    "wake_ats": NULLS,
}
SUSPECT = {
    "worker": 1,
    "queue": "q",
    "codes": "{}",
    "variants": '{"t": ["1"]}',
    "tasks": TextArray(["t", "u"]),
    "crashes": 2,
}
PROMOTE = {"after": "2026-01-01 00:00:00+00", "limit": COUNT}
RESCUE = {"worker": 1, "limit": COUNT, "max_crashes": 3}

Plan = dict[str, Any]


@pytest.fixture
async def connection(queue: Queue) -> AsyncIterator[AsyncConnection[Any]]:
    connection = await connect(queue.database.dsn, "plans")
    await connection.execute(
        "insert into conductor.workers (app, queue, tasks, host, pid, slots)"
        " values ('a', 'q', '{t}', 'h', 1, 1)"
    )
    yield connection
    await connection.close()


@pytest.fixture(params=["empty when analysed", "full when analysed"])
async def table(request: pytest.FixtureRequest, connection: AsyncConnection[Any]) -> None:
    """A jobs table with many rows that the statistics may know nothing of."""
    if request.param == "empty when analysed":
        await connection.execute("analyze conductor.jobs")
    await connection.execute(
        "insert into conductor.jobs (queue, task, payload, state, worker, fence, run_at)"
        " select 'q', 't', '{}', (array['ready','ready','running','scheduled'])[1 + i %% 4]"
        "::conductor.job_state, case when i %% 4 = 2 then 1 end, 1,"
        " now() + case when i %% 4 = 3 then interval '1 hour' else interval '0' end"
        " from generate_series(1, %s) i",
        [20_000],
    )
    if request.param == "full when analysed":
        await connection.execute("analyze conductor.jobs")


async def explain(
    connection: AsyncConnection[Any], query: bytes, parameters: dict[str, Any]
) -> list[Plan]:
    """Return the nodes of the plan, after ten executions of the statement."""
    for _ in range(10):
        async with connection.transaction(force_rollback=True):
            await connection.execute(query, parameters)
    cursor = await connection.execute(
        b"explain (format json, verbose) " + query, parameters, prepare=False
    )
    ((text,),) = await cursor.fetchall()
    return list(nodes(loads(text)[0]["Plan"]))


def nodes(plan: Plan) -> Iterator[Plan]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def scans(plan: list[Plan], relation: str = "jobs") -> list[tuple[str, str]]:
    """Return how the plan reads a table: (kind, index), writes left out."""
    found = []
    for node in plan:
        if node.get("Relation Name") == relation and "Scan" in node["Node Type"]:
            found.append((node["Node Type"], node.get("Index Name", "")))
        if node["Node Type"] == "Bitmap Index Scan" and relation in node["Index Name"]:
            found.append((node["Node Type"], node["Index Name"]))
    return sorted(found)


TID = ("Tid Scan", "")


@pytest.mark.usefixtures("table")
async def test_a_claim_is_one_index_range_a_rank(connection: AsyncConnection[Any]) -> None:
    plan = await explain(connection, JOBS["claim_jobs"], CLAIM)
    assert scans(plan) == [("Index Scan", "jobs_ready"), TID]
    (scan,) = [node for node in plan if node.get("Index Name") == "jobs_ready"]
    condition = scan["Index Cond"]
    for part in (
        "c.queue =",
        "c.task =",
        "ROW(c.rank, c.run_at, c.id) >",
        "c.rank <=",
        "c.run_at <=",
    ):
        assert part in condition
    assert "run_at" not in scan.get("Filter", "")
    assert "clock_timestamp" not in condition
    above = [node["Node Type"] for node in plan if node["Node Type"] in {"Sort", "LockRows"}]
    assert above.count("Sort") == 1  # the merge of the ranges; none below their limits
    types = [node["Node Type"] for node in plan]
    assert types.index("Sort") < types.index("Index Scan", types.index("Sort"))


@pytest.mark.usefixtures("table")
async def test_settles_find_rows_by_key_and_write_them_by_place(
    connection: AsyncConnection[Any],
) -> None:
    writes = {"finish_jobs": (FINISH, 1), "reschedule_jobs": (RESCHEDULE, 2)}
    for name, (parameters, count) in writes.items():
        plan = await explain(connection, JOBS[name], parameters)
        assert scans(plan) == [("Index Scan", "jobs_pkey"), *[TID] * count]
        for node in plan:
            if node.get("Index Name") == "jobs_pkey":
                assert "c.id =" in node["Index Cond"]


@pytest.mark.usefixtures("table")
async def test_steps_lock_their_job_by_key(connection: AsyncConnection[Any]) -> None:
    plan = await explain(connection, STEP_QUERIES["write_steps"], STEPS)
    assert scans(plan) == [("Index Scan", "jobs_pkey")]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    "queries, name, parameters, index",
    [
        (JOBS, "claim_suspect", SUSPECT, "jobs_suspect"),
        (JOBS, "cancelled_jobs", {"worker": 1}, "jobs_cancelling"),
        (JOBS, "held_jobs", {"worker": 1}, "jobs_running"),
        (JOBS, "promote_jobs", PROMOTE, "jobs_due"),
        (WORKERS, "rescue_jobs", RESCUE, "jobs_running"),
    ],
)
async def test_the_rest_uses_its_own_index(
    connection: AsyncConnection[Any], queries: Any, name: str, parameters: Any, index: str
) -> None:
    plan = await explain(connection, queries[name], parameters)
    used = {scan for scan in scans(plan) if scan != TID and scan[0] != "Bitmap Heap Scan"}
    assert used
    assert {name for _, name in used} == {index}

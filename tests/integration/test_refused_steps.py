"""Steps that the database refuses, or that cannot be sent at all: whose attempt that costs."""

from __future__ import annotations

from typing import Any

import pytest

from conductor.metrics import Metrics
from tests.integration.conftest import Queue
from tests.integration.test_context import finish
from tests.integration.workers import Workshop, task

pytestmark = pytest.mark.anyio


@pytest.fixture
def workshop(queue: Queue, metrics: Metrics) -> Workshop:
    return Workshop(queue, metrics)


REFUSES = """
create sequence sent;
create function refuse() returns trigger language plpgsql as $$
begin
    if new.name = 'refused' then
        perform nextval('sent');
        raise exception 'no such % here', new.name using errcode = '%STATE%';
    end if;
    if new.name = 'busy' and nextval('sent') < 3 then
        raise exception 'try again' using errcode = '%STATE%';
    end if;
    return new;
end $$;
create trigger refuse before insert on conductor.steps for each row execute function refuse()
"""


@pytest.mark.parametrize("state", ["P0001", "23514", "42501", "XX000", "22P02"])
async def test_a_step_that_the_database_refuses_fails_the_attempt_alone(
    workshop: Workshop, state: str
) -> None:
    await workshop.queue.rows(REFUSES.replace("%STATE%", state).replace("%", "%%"))

    async def handler(event: Any, ctx: Any) -> Any:
        return await ctx.step(event.payload["step"], lambda: 1)

    jobs = await workshop.invoke_many({"step": step} for step in ("fine", "refused", "good"))
    async with workshop.worker([task(handler, max_attempts=2)]):
        rows = [await workshop.ended(job) for job in jobs]
    assert [row["state"] for row in rows] == ["completed", "failed", "completed"]
    assert (rows[1]["attempt"], rows[1]["error"]["type"]) == (2, "StepRefused")
    message = rows[1]["error"]["message"]
    assert f"refuses step 'refused' of job {jobs[1]}" in message
    assert "no such refused here" in message
    assert f"SQLSTATE {state}" in message
    assert "no such refused here" in rows[1]["error"]["traceback"]


async def test_what_cannot_even_be_sent_fails_the_attempt_alone(workshop: Workshop) -> None:
    """It ended the worker, with all that ran in it, and again whoever had the job next."""

    async def handler(event: Any, ctx: Any) -> Any:
        if event.payload["step"] == "unsendable":
            await ctx.cancel(10**30)
        return await ctx.step(event.payload["step"], lambda: 1)

    jobs = await workshop.invoke_many({"step": step} for step in ("fine", "unsendable", "good"))
    async with workshop.worker([task(handler, max_attempts=1)]):
        rows = [await workshop.ended(job) for job in jobs]
        assert (await workshop.ended(await workshop.invoke({"step": "next"})))["result"] == 1
    assert [row["state"] for row in rows] == ["completed", "failed", "completed"]
    assert rows[1]["error"]["type"] == "StepRefused"
    assert "64-bit" in rows[1]["error"]["message"]


@pytest.mark.parametrize("state", ["40001", "40P01", "53300", "25006", "55P03"])
async def test_a_step_that_met_others_is_written_again(workshop: Workshop, state: str) -> None:
    await workshop.queue.rows(REFUSES.replace("%STATE%", state).replace("%", "%%"))

    async def handler(_event: Any, ctx: Any) -> Any:
        return await ctx.step("busy", lambda: 1)

    row = await finish(workshop, handler, max_attempts=1)
    assert (row["state"], row["attempt"], row["result"]) == ("completed", 0, 1)
    assert await workshop.queue.value("select last_value from sent") == 3

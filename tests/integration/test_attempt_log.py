"""What a worker says of an attempt that has failed: which, and of what kind; never its message."""

from typing import Any

import pytest

from conductor.metrics import Metrics
from conductor.retry import RetryPolicy
from tests.integration.conftest import Queue
from tests.integration.workers import Workshop, task


@pytest.fixture
def workshop(queue: Queue, metrics: Metrics) -> Workshop:
    return Workshop(queue, metrics)


async def test_a_failed_attempt_is_logged_without_what_it_said(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(_event: Any, _ctx: Any) -> None:
        raise LookupError("a row")

    async with workshop.worker([task(handler, max_attempts=2, retry=RetryPolicy(initial_s=0))]):
        job = await workshop.invoke({})
        await workshop.ended(job)
    lines = [line for line in caplog.messages if line.startswith(f"job {job} of task ")]
    assert [line.split(": ", 1)[1] for line in lines] == [
        "attempt 1: LookupError",
        "attempt 2: LookupError",
    ]
    assert "a row" not in caplog.text

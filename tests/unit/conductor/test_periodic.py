from __future__ import annotations

import logging

import pytest

from conductor.errors import MigrationMismatch
from conductor.metrics import FAILURES, Metrics
from conductor.periodic import Periodic


@pytest.mark.parametrize(
    ("error", "has_traceback"),
    [(MigrationMismatch("the schema\nis not there"), False), (ValueError("oh"), True)],
)
async def test_what_fails_is_told_with_a_traceback_unless_it_has_a_name(
    caplog: pytest.LogCaptureFixture, error: Exception, has_traceback: bool
) -> None:
    passes = 0

    async def work() -> float:
        nonlocal passes
        passes += 1
        if passes == 1:
            loop.wake()
            raise error
        loop.stop()
        return 0.0

    metrics = Metrics()
    loop = Periodic("gauges", work, metrics)
    with caplog.at_level(logging.ERROR, "conductor"):
        await loop.run()
    (record,) = caplog.records
    said = "the schema is not there" if not has_traceback else "oh"
    assert record.getMessage() == f"gauges failed and will be tried again: {said}"
    assert bool(record.exc_info) is has_traceback
    assert metrics.registry.get_sample_value(f"{FAILURES.name}", {"part": "gauges"}) == 1

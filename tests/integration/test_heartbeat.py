"""The heartbeat: a message timed on the whole way, from the source's WAL to the acknowledgement."""

import time

import psycopg
import pytest

from cdc import session
from cdc.service import Service
from tests.integration.sidecar import eventually, running, value
from tests.servers import ScratchDatabase

pytestmark = pytest.mark.anyio
HELD_S = 1.1
DURATION = "cdc_heartbeat_duration_seconds"


def sample(service: Service, name: str, database: ScratchDatabase, **labels: str) -> float:
    labels = {"slot": database.name, **labels}
    return service._metrics.registry.get_sample_value(name, labels) or 0.0


async def test_a_heartbeat_comes_through_an_idle_pipe(migrated: ScratchDatabase) -> None:
    before_s = time.time()
    async with running(migrated) as (service, _):
        written_at_s = await eventually(
            lambda: sample(service, "cdc_heartbeat_timestamp_seconds", migrated), "a heartbeat"
        )
        assert sample(service, f"{DURATION}_count", migrated) == 1
    assert before_s <= written_at_s <= time.time()


async def test_it_has_come_through_only_when_the_queue_has_taken_it(
    migrated: ScratchDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "HEARTBEAT_EVERY_S", 0.1)
    async with running(migrated) as (service, _):

        def slow() -> float:
            quick = sample(service, f"{DURATION}_bucket", migrated, le="1.0")
            return sample(service, f"{DURATION}_count", migrated) - quick

        await eventually(lambda: sample(service, f"{DURATION}_count", migrated), "a heartbeat")
        assert not slow()
        with psycopg.connect(migrated.dsn) as blocker:
            blocker.execute("select from conductor.progress for update")
            await eventually(
                lambda: value(
                    migrated.admin_dsn,
                    "select bool_or(clock_timestamp() - query_start > make_interval(secs => %s))"
                    " from pg_stat_activity where wait_event_type = 'Lock' and datname = %s",
                    HELD_S,
                    migrated.name,
                ),
                "the sink waits for the row",
            )
        await eventually(slow, "a heartbeat that was held up")

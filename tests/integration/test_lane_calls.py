"""Calls of lanes are looked at from a position on."""

from __future__ import annotations

import pytest

from conductor.store.jobs import Claim, JobStore
from tests.integration.conftest import Queue

pytestmark = pytest.mark.anyio


async def test_calls_before_a_position_are_left_to_a_look_from_the_beginning(queue: Queue) -> None:
    await queue.rows(
        "insert into conductor.jobs (queue, task, key, ordered, state, payload)"
        " select 'default', 'work', k, true, 'parked', '1' from unnest(array['a', 'b']) k"
    )
    await queue.rows(
        "insert into conductor.lane_calls (id, queue, task, key) overriding system value"
        " values (10, 'default', 'work', 'a'), (20, 'default', 'work', 'b')"
    )
    ready = "select array_agg(key order by key) from conductor.jobs where state = 'ready'"
    async with queue.connections.lend() as connection:
        store = JobStore(connection)
        for after, last, keys in ((20, None, None), (10, 20, ["b"]), (0, 10, ["a", "b"])):
            claim = Claim("default", ["work"], [], limit=0, lanes_after=after)
            assert (await store.exchange(0, [], claim)).lanes_last == last
            assert await queue.value(ready) == keys

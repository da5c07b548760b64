from __future__ import annotations

import asyncio

import pytest

from conductor.errors import DatabaseUnavailable
from conductor.hints import QueueHints

pytestmark = pytest.mark.anyio


class Sent:
    """Records what is sent; fails when told to."""

    def __init__(self) -> None:
        self.queues: list[str] = []
        self.error: Exception | None = None

    async def send(self, queue: str) -> None:
        if self.error is not None:
            raise self.error
        self.queues.append(queue)


async def test_the_first_hint_is_sent_at_once_and_the_rest_as_one() -> None:
    sent = Sent()
    hints = QueueHints(sent.send)
    hints.after_commit("mail")
    await asyncio.sleep(0)
    assert sent.queues == ["mail"]
    for _ in range(100):
        hints.after_commit("mail")
    await hints.close()
    assert sent.queues == ["mail", "mail"]


async def test_queues_do_not_wait_for_each_other() -> None:
    sent = Sent()
    hints = QueueHints(sent.send)
    hints.after_commit("a")
    hints.after_commit("b")
    await asyncio.sleep(0)
    assert sent.queues == ["a", "b"]
    await hints.close()


async def test_a_lost_database_ends_the_hints_of_now_not_those_of_later() -> None:
    sent = Sent()
    hints = QueueHints(sent.send)
    sent.error = DatabaseUnavailable("gone")
    hints.after_commit("a")
    await hints.close()
    sent.error = None
    hints.after_commit("a")
    await hints.close()
    assert sent.queues == ["a"]


async def test_closing_does_not_wait_for_a_database_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("conductor.hints.CLOSE_TIMEOUT_S", 0.01)

    async def hang(_: str) -> None:
        await asyncio.Event().wait()

    hints = QueueHints(hang)
    hints.after_commit("a")
    async with asyncio.timeout(10):
        await hints.close()

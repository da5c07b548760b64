from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest

from conductor.definitions import Task, define_task
from conductor.errors import ColumnUnchanged, NonRetryable, PayloadInvalid
from conductor.job import JobInfo
from conductor.retry import RetryPolicy
from conductor.store.jobs import Finished, Rescheduled
from conductor.triggers import Invocable
from conductor.worker import outcomes

NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def handler(_event: Any, _ctx: Any) -> None:
    return None


TASK: Task[Any, Any] = Task(
    definition=define_task("t"),
    triggers=(Invocable(),),
    handler=handler,
    is_sync=False,
    max_attempts=3,
    retry=RetryPolicy(initial_s=1, factor=10, jitter=0.5),
    retention=timedelta(days=2),
)


def job(attempt: int = 0) -> JobInfo:
    return JobInfo(
        7, "t", "q", "invoke", attempt, 0, 4, 0, None, NOW, NOW, None, None, None, "job:7"
    )


def fail(error: Exception) -> None:
    raise error


def raised(error: Exception) -> Exception:
    """Give an error a traceback."""
    try:
        fail(error)
    except Exception as caught:  # noqa: BLE001 - it is ours
        return caught
    return error


def failed(error: BaseException, attempt: int = 0, randomness: float = 0.5) -> Any:
    return outcomes.failed(TASK, job(attempt), error, stepped=False, randomness=randomness)


def test_a_failure_with_attempts_left_waits() -> None:
    outcome = failed(raised(ValueError("x")), attempt=1)
    assert isinstance(outcome, Rescheduled)
    assert (outcome.id, outcome.fence, outcome.failures, outcome.delay_s) == (7, 4, 1, 10.0)
    assert failed(ValueError("x"), 1, randomness=0.0).delay_s == 5.0


def test_the_last_failure_is_kept() -> None:
    outcome = failed(raised(ValueError("x")), attempt=2)
    assert isinstance(outcome, Finished)
    assert (outcome.ending, outcome.retention) == ("failed", timedelta(days=2))
    error = orjson.loads(outcome.document or b"")
    assert (error["type"], error["message"], error["attempt"]) == ("ValueError", "x", 3)
    assert "raise error" in error["traceback"]


@pytest.mark.parametrize("error", [NonRetryable("no"), PayloadInvalid("bad", [{"loc": ("a",)}])])
def test_final_errors_are_not_tried_again(error: Exception) -> None:
    outcome = failed(raised(error))
    assert isinstance(outcome, Finished)
    assert outcome.ending == "failed"


def test_a_validation_error_is_kept() -> None:
    outcome = failed(raised(PayloadInvalid("bad", [{"loc": ("a",), "msg": "m"}])))
    assert orjson.loads(outcome.document)["errors"] == [{"loc": ["a"], "msg": "m"}]


def test_what_to_do_about_an_error_of_ours_is_kept() -> None:
    unchanged = ColumnUnchanged("column 'bio' was not touched")
    for error, hint in (
        (unchanged, ColumnUnchanged.hint),
        (NonRetryable("no", hint="Ask \0 Ada."), "Ask  Ada."),
    ):
        assert orjson.loads(failed(raised(error), attempt=9).document)["hint"] == hint
    theirs = ValueError("x")
    theirs.hint = "secret"  # type: ignore[attr-defined]  # the point of the test
    for other in (theirs, NonRetryable("no", hint="")):
        assert "hint" not in orjson.loads(failed(raised(other), attempt=9).document)


def test_any_text_can_be_kept() -> None:
    outcome = failed(raised(ValueError("\0 \ud800 " + "x" * 100_000)), attempt=9)
    error = orjson.loads(outcome.document)
    assert error["message"].startswith(" ? xxx")
    assert len(outcome.document) < 30_000


def test_a_refused_outcome_becomes_a_failure_with_the_reason() -> None:
    done = outcomes.completed(TASK, job(), b"\xff", stepped=True)
    instead = outcomes.refused(done, "invalid byte")
    assert isinstance(instead, Finished)
    assert (instead.ending, instead.stepped) == ("failed", True)
    assert orjson.loads(instead.document or b"")["message"] == "invalid byte"
    later = outcomes.refused(Rescheduled(7, 4, "t", failures=1, delay_s=3.0), "invalid byte")
    assert isinstance(later, Rescheduled)
    assert (later.failures, later.delay_s) == (1, 3.0)


def test_sleeping_and_giving_back_cost_no_attempt() -> None:
    for outcome in (outcomes.suspended(job(), NOW, waits=False), outcomes.given_back(job())):
        assert isinstance(outcome, Rescheduled)
        assert (outcome.failures, outcome.delay_s, outcome.error) == (0, 0.0, None)


def test_an_error_that_cannot_be_shown_is_a_failure_all_the_same() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    outcome = failed(raised(MuteError()), attempt=2)
    assert isinstance(outcome, Finished)
    shown = orjson.loads(outcome.document or b"")
    assert (shown["type"], shown["attempt"]) == ("MuteError", 3)
    assert "cannot be shown: RuntimeError" in shown["message"]
